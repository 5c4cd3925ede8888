//! Tier 4: packs that are damaged in every copy, healed from live images that still have the blocks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use snapfs::backend::Key;
use snapfs::backend::placement::Copies;
use snapfs::backend::testing::Memory;
use snapfs::check::live::LiveImage;
use snapfs::check::{CheckOptions, CheckReport, Severity, check_store_from};
use snapfs::clock::{ManualClock, Timestamp};
use snapfs::error::{ErrorKind, Result, invalid};
use snapfs::pack::Content;
use snapfs::pack::index::{HEADER_BYTES, PackIndex};
use snapfs::store::Store;
use snapfs::store::config::write_new;

use crate::targets::replicated;
use crate::world::{World, get, noise, put};

pub const REPAIR: CheckOptions = CheckOptions { read_data: true, sample_percent: None, repair: true };

/// An image in memory; with a hole where asked, and other bytes from the given read on.
pub struct Live {
    bytes: Vec<u8>,
    reads: AtomicU64,
    changes_after: u64,
}

impl Live {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, reads: AtomicU64::new(0), changes_after: u64::MAX }
    }
}

impl LiveImage for Live {
    fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn next_data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        Ok((from < self.bytes()).then_some((from, self.bytes())))
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let past = || invalid("past the end");
        out.copy_from_slice(self.bytes.get(offset as usize..offset as usize + out.len()).ok_or_else(past)?);
        if self.reads.fetch_add(1, Ordering::Relaxed) >= self.changes_after {
            out.iter_mut().for_each(|byte| *byte ^= 1);
        }
        Ok(())
    }
}

/// 3 MiB of blocks that shrink by half, then 3 MiB of noise and an end that is no whole block.
fn image(seed: u64) -> Vec<u8> {
    let mut bytes = noise(seed, (6 << 20) + 1000);
    for block in bytes[..3 << 20].chunks_mut(4096) {
        block[2048..].fill(7);
    }
    bytes
}

fn repair(store: &Store, images: &[&dyn LiveImage]) -> CheckReport {
    check_store_from(store, REPAIR, images, &mut |_| {}).unwrap()
}

/// The data pack objects and the recipe pack objects, with their indexes.
pub fn packs(memory: &Memory, content: Content) -> BTreeMap<String, (PackIndex, Vec<u8>)> {
    let objects = memory.objects();
    let packs = objects.iter().filter(|(key, _)| key.contains("/packs/"));
    let opened = packs.map(|(key, bytes)| {
        let trailer = &bytes[bytes.len() - snapfs::pack::index::TRAILER_BYTES..];
        let tail = PackIndex::tail_bytes_from_trailer(trailer).unwrap() as usize;
        let index = PackIndex::decode_tail(&bytes[bytes.len() - tail..], bytes.len() as u64).unwrap();
        (key.clone(), (index, bytes.to_vec()))
    });
    opened.filter(|(_, (index, _))| index.identity.content == content).collect()
}

/// A disk whose first partition, with this in it, begins at sector 63: by its partition table and indeed.
pub fn behind_sector_63(content: &[u8]) -> Vec<u8> {
    let mut bytes = noise(3, 63 * 512);
    bytes.extend_from_slice(content);
    bytes[..512].fill(0);
    bytes[446 + 4] = 0x83;
    bytes[446 + 8..446 + 12].copy_from_slice(&63_u32.to_le_bytes());
    bytes[446 + 12..446 + 16].copy_from_slice(&10_000_u32.to_le_bytes());
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

pub fn flip(memory: &Memory, key: &str, offsets: &[u64]) {
    let mut bytes = memory.objects()[key].to_vec();
    for at in offsets {
        bytes[*at as usize] ^= 0x40;
    }
    memory.replace(&Key::new(key), bytes);
}

/// The offset of one byte in each frame of all packs in an object.
pub fn in_frames(index: &PackIndex) -> Vec<u64> {
    index.members.iter().flat_map(|member| member.offsets.iter().map(|at| at + 30)).collect()
}

fn assert_same(memory: &Memory, whole: &Memory) {
    assert_same_but(memory, whole, "nothing");
}

/// `whole` but for objects whose key has this part.
fn assert_same_but(memory: &Memory, whole: &Memory, but: &str) {
    let [is, was] = [memory, whole].map(|memory| {
        let objects = memory.objects().into_iter().filter(|(key, _)| !key.contains(but));
        objects.collect::<BTreeMap<_, _>>()
    });
    assert_eq!(is.keys().collect::<Vec<_>>(), was.keys().collect::<Vec<_>>());
    for (key, bytes) in &was {
        assert!(is[key] == *bytes, "{key} has other bytes");
    }
}

#[test]
fn frames_are_put_together_again_byte_for_byte() {
    let world = World::new();
    let bytes = image(1);
    put(&world.store(), "vm/a.img", &bytes).unwrap();
    put(&world.store(), "other/a.img", &image(2)).unwrap();
    let whole = world.memory.fork();
    let mut frames = 0;
    for (key, (index, _)) in packs(&whole, Content::Data).iter().filter(|(key, _)| key.contains("vms/vm/")) {
        frames += in_frames(index).len() as u64;
        flip(&world.memory, key, &in_frames(index));
    }
    assert!(frames > 10);
    assert_eq!(get(&world.store(), "vm/a.img").unwrap_err().kind(), ErrorKind::Corrupt);
    // Moved by some blocks, behind another image that has nothing, and as the guest goes on to write.
    let mut live = noise(9, 40 * 4096);
    live.extend_from_slice(&bytes);
    live.extend_from_slice(&[0; 4096]);
    let (nothing, live) = (Live::new(noise(5, 100_000)), Live::new(live));
    let report = repair(&world.store(), &[&nothing, &live]);
    assert_eq!((report.frames_mended, report.frames_unmended), (frames, 0), "{:?}", report.findings);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    assert!(report.findings.iter().all(|f| f.vm == "vm" && f.what.contains("healed")), "{:?}", report.findings);
    assert_same(&world.memory, &whole);
    assert!(get(&world.store(), "vm/a.img").unwrap() == bytes);
    // Nothing is left to do, and nothing of the image is read.
    let read = live.reads.load(Ordering::Relaxed);
    let report = repair(&world.store(), &[&live]);
    assert_eq!((report.findings, report.frames_mended), (Vec::new(), 0));
    assert_eq!(live.reads.load(Ordering::Relaxed), read);
}

#[test]
fn blocks_are_found_on_the_grid_of_the_snapshots() {
    let world = World::new();
    let bytes = behind_sector_63(&image(4));
    put(&world.store(), "vm/a.img", &bytes).unwrap();
    let (_, _, snapshot) =
        world.store().open_reference(&snapfs::name::SnapshotName::parse_reference("vm/a.img").unwrap()).unwrap();
    assert_ne!(snapshot.grid().lead(), 0);
    drop(snapshot);
    let whole = world.memory.fork();
    for (key, (index, _)) in packs(&whole, Content::Data) {
        flip(&world.memory, &key, &in_frames(&index));
    }
    let report = repair(&world.store(), &[&Live::new(bytes)]);
    assert!(!report.is_damaged() && report.frames_mended > 10, "{:?}", report.findings);
    assert_same(&world.memory, &whole);
}

#[test]
fn what_is_not_found_stays_as_it_is_and_the_rest_heals() {
    let world = World::new();
    let bytes = image(1);
    put(&world.store(), "vm/a.img", &bytes).unwrap();
    let whole = world.memory.fork();
    let (key, (index, _)) = packs(&whole, Content::Data).into_iter().next().unwrap();
    let hits = in_frames(&index);
    flip(&world.memory, &key, &hits);
    // One block was overwritten since: of those that shrink, so that its whole frame is lost.
    let mut newer = bytes.clone();
    newer[50 * 4096..51 * 4096].fill(3);
    let report = repair(&world.store(), &[&Live::new(newer.clone())]);
    assert_eq!((report.frames_mended, report.frames_unmended), (hits.len() as u64 - 1, 1), "{:?}", report.findings);
    assert!(report.is_damaged());
    let (is, was) = (world.memory.objects()[&key].to_vec(), whole.objects()[&key].to_vec());
    assert_eq!(is.iter().zip(&was).filter(|(is, was)| is != was).count(), 1, "only the one byte is still wrong");
    assert_eq!(get(&world.store(), "vm/a.img").unwrap_err().kind(), ErrorKind::Corrupt);
    // An image that changes after it was looked through heals nothing, and nothing wrong gets in.
    let before = world.memory.fork();
    let mut changing = Live::new(bytes.clone());
    changing.changes_after = 2;
    let report = repair(&world.store(), &[&changing]);
    assert_eq!((report.frames_mended, report.frames_unmended), (0, 1), "{:?}", report.findings);
    assert_same(&world.memory, &before);
    // Another image has the block.
    let report = repair(&world.store(), &[&Live::new(newer), &Live::new(bytes[40 * 4096..60 * 4096].to_vec())]);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    // The log has the mark of the loss, and that it went.
    assert_same_but(&world.memory, &whole, "/log/");
}

#[test]
fn headers_and_slot_tables_heal_from_the_frames() {
    let world = World::new();
    put(&world.store(), "vm/a.img", &image(1)).unwrap();
    let whole = world.memory.fork();
    for content in [Content::Data, Content::Recipes] {
        for (key, (index, _)) in packs(&whole, content) {
            let table = index.members[0].page_range(0).0;
            assert!(table > HEADER_BYTES as u64);
            flip(&world.memory, &key, &[20, table + 3]);
        }
    }
    let report = repair(&world.store(), &[&Live::new(Vec::new())]);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    assert_eq!((report.frames_mended, report.frames_unmended), (0, 0));
    assert_same(&world.memory, &whole);
}

#[test]
fn what_has_no_index_is_said_to_be_beyond_healing() {
    let world = World::new();
    let bytes = image(1);
    put(&world.store(), "vm/a.img", &bytes).unwrap();
    let whole = world.memory.fork();
    let (key, (_, stored)) = packs(&whole, Content::Data).into_iter().next().unwrap();
    for cut in [None, Some(0), Some(stored.len() - 1)] {
        match cut {
            Some(cut) => world.memory.replace(&Key::new(key.clone()), stored[..cut].to_vec()),
            None => drop(world.memory.remove(&Key::new(key.clone()))),
        }
        let before = world.memory.fork();
        let report = repair(&world.store(), &[&Live::new(bytes.clone())]);
        assert!(report.is_damaged());
        let said = |f: &&snapfs::check::Finding| f.object == key && f.what.contains("without its index");
        assert_eq!(report.findings.iter().filter(said).count(), 1, "{:?}", report.findings);
        assert_same_but(&world.memory, &before, "/log/");
        world.memory.replace(&Key::new(key.clone()), stored.clone());
    }
    let error = check_store_from(
        &world.store(),
        CheckOptions { repair: false, ..REPAIR },
        &[&Live::new(Vec::new())],
        &mut |_| {},
    );
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn all_copies_heal_when_none_is_whole() {
    let clock = Arc::new(ManualClock::at(Timestamp(1_700_000_000_000_000_000)));
    let memories = [Memory::new(), Memory::new(), Memory::new()];
    let backends = || memories.iter().map(|memory| Arc::new(memory.clone()) as Arc<dyn snapfs::backend::Backend>);
    let open = || Arc::new(replicated(backends().collect(), Copies { vm: 2, common: 2, quorum: 0 }));
    write_new(&*open(), &*clock).unwrap();
    let bytes = image(1);
    let store = || crate::invariants::open(open(), &clock).unwrap();
    put(&store(), "vm/a.img", &bytes).unwrap();
    let whole: Vec<Memory> = memories.iter().map(Memory::fork).collect();
    for memory in &memories[1..] {
        for (key, (index, _)) in packs(memory, Content::Data) {
            flip(memory, &key, &in_frames(&index)[3..5]);
        }
    }
    // One of them lost a frame more; it is whole in the other.
    let (key, (index, _)) = packs(&whole[1], Content::Data).into_iter().next().unwrap();
    flip(&memories[2], &key, &in_frames(&index)[8..9]);
    let report = repair(&store(), &[&Live::new(bytes)]);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    assert!(report.frames_mended >= 2 && report.findings.iter().all(|f| f.severity == Severity::Copy));
    for (memory, whole) in memories.iter().zip(&whole) {
        assert_same(memory, whole);
    }
}
