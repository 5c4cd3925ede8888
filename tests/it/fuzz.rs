//! Tier 6: every decoder of bytes from outside keeps its promise (`snapfs::fuzz`) on random and on mutated input.
//!
//! The input follows from a seed that a failure names, with the number of the input. Valid encodings are mutated by
//! flipped bits, cuts, splices, changed lengths and small numbers; checksums are then set right in half of the cases,
//! so that what lies behind them is reached.

use std::panic::{AssertUnwindSafe, catch_unwind};

use snapfs::clones::blocks::Blocks;
use snapfs::clones::file::OsFile;
use snapfs::clones::map::{CloneId, append, write};
use snapfs::fingerprint::{fingerprint, short};
use snapfs::fuzz::ALL;
use snapfs::pack::Content;
use snapfs::pack::frame::slot_range;
use snapfs::pack::index::{HEADER_BYTES, PackIndex, TRAILER_BYTES};
use snapfs::popular::index::{IndexBuilder, IndexIdentity};
use snapfs::recipe::GroupPage;
use snapfs::units::{Epoch, Incarnation, Serial, SlotId, VmGroup};

use crate::format::{blocks, clone_json, snapfs_toml};
use crate::world::{Rng, World, noise, put};

/// Inputs of each function.
const INPUTS: u64 = 20_000;

/// Longer inputs are cut: time goes into many short ones.
const INPUT_BYTES_MAX: usize = 16 << 10;

#[test]
fn no_input_breaks_a_decoder() {
    let valid = valid_encodings();
    std::thread::scope(|scope| {
        for (turn, (name, entry)) in (1..).zip(ALL) {
            let valid = &valid;
            scope.spawn(move || {
                let mut rng = Rng(0x5eed_0000 + turn);
                let seeds: Vec<&Vec<u8>> = valid.iter().filter(|(of, _)| of == name).map(|(_, b)| b).collect();
                assert!(!seeds.is_empty(), "no valid input for {name}");
                for seed in &seeds {
                    entry(seed);
                }
                for number in 0..INPUTS {
                    let input = input(&mut rng, &seeds);
                    let outcome = catch_unwind(AssertUnwindSafe(|| entry(&input)));
                    assert!(outcome.is_ok(), "{name}, input {number}: {input:02x?}");
                }
            });
        }
    });
}

/// Inputs that a decoder takes: the examples of docs/FORMAT.md, objects of a store, and texts.
fn valid_encodings() -> Vec<(String, Vec<u8>)> {
    let mut valid: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |name: &str, bytes: &[u8]| valid.push((name.to_owned(), bytes[..bytes.len().min(65536)].to_vec()));
    for (name, bytes) in blocks() {
        match name.as_str() {
            n if n.starts_with("record-") => {
                add("record", &bytes);
                add("record", &bytes[40..]);
                add("envelope", &bytes);
            }
            "config-record" => {
                add("envelope", &bytes);
                add("record", &bytes[40..]);
            }
            "root-page" => {
                add("root_page", &bytes);
                add("root_page", &bytes[40..]);
                add("envelope", &bytes);
            }
            "hold" => {
                add("hold", &bytes);
                add("hold", &bytes[40..]);
                add("hold", b"000000020003.fedcba9876543210");
                add("envelope", &bytes);
            }
            "job" => {
                add("job", &bytes);
                add("envelope", &bytes);
            }
            "partition-result" => add("partition_result", &bytes),
            "group-page" => add("group_page", &bytes),
            "recipe" => add("recipe", &bytes),
            "clone-map-header" => {
                add("clone_map", &bytes);
                let entry = blocks().into_iter().find(|(name, _)| name == "clone-map-entry").unwrap().1;
                add("clone_map", &[bytes, entry].concat());
            }
            "pack-data" | "pack-recipes" => add("pack_header", &bytes[..HEADER_BYTES]),
            "pack-data-tail" | "pack-recipes-tail" => add("pack_tail", &bytes),
            "frame-recipes" => add("frame", &bytes),
            "popular-index" => add("popular_index", &bytes),
            _ => {}
        }
    }
    // Every kind of container: runs, an array, bits.
    let mut page = GroupPage::default();
    page.slots.insert_range(1 << 33..(1 << 33) + 70_000);
    page.slots.extend([7, 9, 11]);
    page.slots.extend((1 << 20..(1 << 20) + 20_000).step_by(2));
    add("group_page", &page.encode());
    let world = World::new();
    let mut image = noise(1, 5 << 20);
    image[..2 << 20].fill(0);
    put(&world.store(), "vm/a.img", &image).unwrap();
    image[3 << 20..][..70_000].fill(7);
    put(&world.store(), "vm/b.img", &image).unwrap();
    for (key, bytes) in world.memory.objects() {
        if key.contains("/log/") {
            add("record", &bytes);
            add("record", &bytes[40..]);
        } else if key.contains("/snapshots/") {
            add("root_page", &bytes[40..]);
        } else if key.ends_with(".pack") {
            add("pack_header", &bytes[..HEADER_BYTES]);
            let tail_bytes = PackIndex::tail_bytes_from_trailer(&bytes[bytes.len() - TRAILER_BYTES..]).unwrap();
            let tail = &bytes[bytes.len() - tail_bytes as usize..];
            add("pack_tail", tail);
            let index = PackIndex::decode_tail(tail, bytes.len() as u64).unwrap();
            for member in index.members.iter().filter(|_| index.identity.content == Content::Recipes) {
                for (row, offset) in member.frames.iter().zip(&member.offsets) {
                    let stored = &bytes[*offset as usize..][..row.stored_bytes as usize];
                    add("frame", stored);
                    let raw = row.open(Content::Recipes, index.identity.incarnation, member.number, stored).unwrap();
                    add("frame", &raw);
                    for rank in 0..row.count() as usize {
                        let slot = &raw[slot_range(Content::Recipes, &raw, rank, row.count() as usize).unwrap()];
                        add(if slot[0] == 1 { "recipe" } else { "group_page" }, slot);
                    }
                }
            }
        }
    }
    let mut builder = IndexBuilder::default();
    for n in 0..600_u64 {
        let slot = SlotId::new(Serial((1 << 47) | (n / 100)), (n % 100) as u16);
        builder.add(VmGroup([(n / 300) as u8; 16]), &fingerprint(&n.to_le_bytes()), slot).unwrap();
    }
    let identity = IndexIdentity { incarnation: Incarnation([1; 16]), epoch: Epoch(1) };
    add("popular_index", &builder.encode(identity).unwrap());
    add("config_text", snapfs_toml().as_bytes());
    add("config_text", b"format = 1\nfeatures = [[[[[[[[]]]]]]]]\na.b.c.d = {e = {f = 1}}\n");
    let map = r#"[{"start": 0, "length": 4096, "data": true, "depth": 0}, {"start": 4096, "length": 1048576,
        "zero": true, "data": false}, {"start": 1052672, "length": 512, "data": true, "offset": [1, {}]}]"#;
    add("change_map", map.as_bytes());
    add("partition_table", &mbr());
    add("partition_table", &gpt());
    for text in ["web01/monday.img", "web01/xvda/monday.img", "a/latest", "\u{e4}/\u{1f4be}/ .tmp"] {
        add("snapshot_name", text.as_bytes());
    }
    let options =
        "ro,allow_other,noexec,seal_after=1.5s,max_memory=512M,threads=8,log=/tmp/log\0rw,x-systemd.automount";
    add("mount_options", options.as_bytes());
    add("clone_description", clone_json().as_bytes());
    add("clone_map", &clone_map());
    valid
}

/// A map of several rounds, as a file has it.
fn clone_map() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("map");
    let file = OsFile::new("map", std::fs::File::create_new(&path).unwrap());
    let clone = CloneId([7; 16]);
    let mut blocks = Blocks::default();
    blocks.insert(3..70_000);
    let mut end = write(&file, clone, 1 << 40, &blocks).unwrap();
    for round in 0..5_u64 {
        let mut blocks = Blocks::default();
        (0..20).for_each(|n| blocks.insert(n * n * 1000 * round..n * n * 1000 * round + n));
        end = append(&file, clone, end, &blocks).unwrap();
    }
    std::fs::read(path).unwrap()
}

fn mbr() -> Vec<u8> {
    let mut sector = vec![0; 512];
    sector[446..462].copy_from_slice(&[0x80, 0, 0, 0, 0x83, 0, 0, 0, 63, 0, 0, 0, 0, 8, 0, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn gpt() -> Vec<u8> {
    let mut disk = mbr();
    disk[446..462].copy_from_slice(&[0, 0, 0, 0, 0xee, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255]);
    disk.resize(512 * 34, 0);
    disk[512..520].copy_from_slice(b"EFI PART");
    for (at, value) in [(536, 1u64), (584, 2), (592, 128 | 128 << 32), (1024, 7), (1056, 34), (1064, 2000)] {
        disk[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    disk
}

fn input(rng: &mut Rng, seeds: &[&Vec<u8>]) -> Vec<u8> {
    let mut bytes = match rng.below(8) {
        0 => noise(rng.next(), rng.below(200) as usize),
        _ => seeds[rng.below(seeds.len() as u64) as usize].clone(),
    };
    for _ in 0..rng.below(4) {
        mutate(rng, &mut bytes, seeds);
    }
    if bytes.len() > INPUT_BYTES_MAX {
        bytes.truncate(INPUT_BYTES_MAX);
    }
    if rng.below(2) == 0 {
        set_checksums(&mut bytes);
    }
    bytes
}

fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>, seeds: &[&Vec<u8>]) {
    let length = bytes.len() as u64;
    let at = rng.below(length) as usize;
    match rng.below(8) {
        0 if length > 0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes.truncate(at),
        2 => {
            let other = seeds[rng.below(seeds.len() as u64) as usize];
            let from = rng.below(other.len() as u64) as usize;
            let count = rng.below(64) as usize;
            let piece: Vec<u8> = other.iter().skip(from).take(count).copied().collect();
            let end = at.saturating_add(rng.below(64) as usize).min(bytes.len());
            bytes.splice(at..end, piece);
        }
        3 => bytes.extend(noise(rng.next(), rng.below(16) as usize)),
        // A number of 2, 4 or 8 bytes: a length, a count, an offset.
        4 | 5 => {
            let values = [0, 1, 2, 0x7f, 0xff, 0xffff, 0x1_0000, 0x7fff_ffff, 0xffff_ffff, 1 << 48, u64::MAX, length];
            let value = values[rng.below(values.len() as u64) as usize].wrapping_add(rng.below(3)).wrapping_sub(1);
            let width = [2, 4, 8][rng.below(3) as usize];
            if let Some(field) = bytes.get_mut(at..at + width) {
                field.copy_from_slice(&value.to_le_bytes()[..width]);
            }
        }
        6 if length > 0 => bytes[at] = bytes[at].wrapping_add(rng.below(5) as u8).wrapping_sub(2),
        _ if length > 0 => bytes[at] = rng.next() as u8,
        _ => {}
    }
}

/// Makes the length and the checksum of an envelope right, or those of a pack's header or tail, of a popular index
/// or of a partition's result.
fn set_checksums(bytes: &mut [u8]) {
    if bytes.starts_with(b"SNAPFS\r\n\x07") {
        return set_popular_checksums(bytes);
    }
    if bytes.len() >= 76 && bytes.starts_with(b"SNAPFS\r\n\x09") {
        let checksum = short(b"snapfs partition header", &[&bytes[..56]]);
        bytes[56..72].copy_from_slice(&checksum);
        let header = bytes[..72].to_vec();
        let rows = u32::from_le_bytes(bytes[72..76].try_into().unwrap()) as usize;
        if let Some(part) = bytes.get(76..76 + rows.min(1 << 20)).map(<[u8]>::to_vec) {
            let checksum = short(b"snapfs partition chunk", &[&header, &[0; 4], &part]);
            let end = 76 + part.len();
            if let Some(place) = bytes.get_mut(end..end + 16) {
                place.copy_from_slice(&checksum);
            }
        }
        return;
    }
    if bytes.len() >= TRAILER_BYTES {
        let (index, trailer) = bytes.split_at_mut(bytes.len() - TRAILER_BYTES);
        if trailer.starts_with(b"SNAPFS\r\n\x03") {
            let header = short(b"snapfs pack header", &[&trailer[..HEADER_BYTES - 16]]);
            trailer[HEADER_BYTES - 16..HEADER_BYTES].copy_from_slice(&header);
            trailer[HEADER_BYTES + 16..HEADER_BYTES + 20].copy_from_slice(&(index.len() as u32).to_le_bytes());
            trailer[HEADER_BYTES + 20..HEADER_BYTES + 36].copy_from_slice(&short(b"snapfs pack index", &[index]));
            let checksum = short(b"snapfs pack trailer", &[&trailer[..TRAILER_BYTES - 16]]);
            trailer[TRAILER_BYTES - 16..].copy_from_slice(&checksum);
            return;
        }
    }
    if bytes.len() == HEADER_BYTES && bytes.starts_with(b"SNAPFS\r\n") && bytes[8] == 3 {
        let checksum = short(b"snapfs pack header", &[&bytes[..HEADER_BYTES - 16]]);
        bytes[HEADER_BYTES - 16..].copy_from_slice(&checksum);
    } else if bytes.len() >= 64 && bytes.starts_with(b"SNAPMAP\n") {
        let (header, entries) = bytes.split_at_mut(64);
        let checksum = short(b"snapfs clone map", &[&header[..48]]);
        header[48..].copy_from_slice(&checksum);
        for (place, entry) in (1_u64..).zip(entries.chunks_exact_mut(64)) {
            let parts = [&header[24..40], &place.to_le_bytes(), &entry[..48]];
            let checksum = short(b"snapfs clone map entry", &parts);
            entry[48..].copy_from_slice(&checksum);
        }
    } else if bytes.len() >= 40 && bytes.starts_with(b"SNAPFS\r\n") {
        let length = (bytes.len() as u64 - 40).to_le_bytes();
        bytes[16..24].copy_from_slice(&length);
        let checksum = short(b"snapfs object", &[&bytes[..16], &length, &bytes[40..]]);
        bytes[24..40].copy_from_slice(&checksum);
    }
}

/// The checksums of a popular index, as far as its bytes reach.
fn set_popular_checksums(bytes: &mut [u8]) {
    let mut set = |from: usize, count: usize, context: &[u8], place: &[u8]| {
        let part = bytes.get(from..from + count)?.to_vec();
        let checksum = if place.is_empty() { short(context, &[&part]) } else { short(context, &[place, &part]) };
        bytes.get_mut(from + count..from + count + 16)?.copy_from_slice(&checksum);
        Some(bytes.to_vec())
    };
    let Some(after) = set(0, 52, b"snapfs popular header", &[]) else { return };
    let place = after[16..40].to_vec();
    let entries = u64::from_le_bytes(after[40..48].try_into().unwrap());
    let packs = u32::from_le_bytes(after[48..52].try_into().unwrap()) as usize;
    if packs > 1000 || entries > 16 * 1024 || set(68, packs * 24, b"snapfs popular packs", &place).is_none() {
        return;
    }
    let buckets = entries.div_ceil(16).next_power_of_two() as usize;
    let from = 84 + packs * 24;
    let counts = after.get(from..from + buckets).unwrap_or_default();
    let count: usize = counts.iter().map(|c| usize::from(*c)).sum();
    set(from, buckets + count * 7, b"snapfs popular chunk", &[&place[..], &[0; 4]].concat());
}
