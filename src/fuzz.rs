//! One function for each decoder of bytes from outside, for fuzzing: `tests/it/fuzz.rs` and `fuzz/`.
//!
//! A function here panics only when a decoder breaks its promise: whatever the bytes, a decoder does not panic, takes
//! memory bounded by the limits and a constant times the input's length, and when it returns a value, encoding that
//! value gives the bytes that were read.

#![expect(clippy::panic, reason = "a broken promise ends the run, with the input that broke it")]

use crate::catalog::hold::{Hold, HoldId};
use crate::catalog::record::Record;
use crate::catalog::roots::root_object;
use crate::cli::files::partitions::{Source, partitions};
use crate::cli::mount_options::MountOptions;
use crate::clones::description::Description;
use crate::clones::file::LocalFile;
use crate::clones::map::{ENTRY_BYTES, Entry as MapEntry, Header, load};
use crate::cluster::job::{Job, decode_result};
use crate::error::{Result, corrupt, unsupported};
use crate::fingerprint::Fingerprint;
use crate::format::{ObjectKind, envelop, open_envelope};
use crate::ingest::change_map::ChangeMap;
use crate::ingest::partition::{FIRST_BYTES, grid_phase};
use crate::limits::{BLOCK_BYTES, FRAME_SLOTS_MAX, IMAGE_BYTES_MAX, RECIPE_FRAME_BYTES_MAX};
use crate::name::SnapshotName;
use crate::pack::Content;
use crate::pack::frame::{CODEC_RAW, Checksum, FrameRow, RECIPE_PREFIX_BYTES, decompress, join_slots, slot_range};
use crate::pack::index::{HEADER_BYTES, Identity, Member, MemberTail, PackIndex, TRAILER_BYTES};
use crate::popular::index::PopularIndex;
use crate::recipe::{GroupPage, Recipe, RootPage};
use crate::store::config::{ConfigRecord, StoreConfig};
use crate::wire::{decode, encode};

/// Takes any bytes; panics only for a broken promise.
pub type Entry = fn(&[u8]);

/// Every function, by its name.
pub const ALL: &[(&str, Entry)] = &[
    ("record", record),
    ("envelope", envelope),
    ("hold", hold),
    ("root_page", root_page),
    ("group_page", group_page),
    ("recipe", recipe),
    ("pack_header", pack_header),
    ("pack_tail", pack_tail),
    ("frame", frame),
    ("popular_index", popular_index),
    ("job", job),
    ("partition_result", partition_result),
    ("config_text", config_text),
    ("change_map", change_map),
    ("partition_table", partition_table),
    ("snapshot_name", snapshot_name),
    ("mount_options", mount_options),
    ("clone_description", clone_description),
    ("clone_map", clone_map),
];

/// A log record, as an object and as the body of one: most bodies never get past a checksum.
pub fn record(bytes: &[u8]) {
    if let Ok(record) = Record::from_object(bytes) {
        assert!(record.to_object() == bytes, "record: another object comes back");
    }
    if let Ok(record) = decode::<Record>(bytes) {
        assert!(encode(&record) == bytes, "record: other bytes come back");
    }
    if let Ok(record) = decode::<ConfigRecord>(bytes) {
        assert!(encode(&record) == bytes, "config record: other bytes come back");
    }
}

/// The envelope of every kind, and its refusal of every other.
pub fn envelope(bytes: &[u8]) {
    let opened = ObjectKind::ALL.map(|kind| (kind, open_envelope(kind, bytes)));
    for (kind, body) in &opened {
        if let Ok(body) = body {
            assert!(envelop(*kind, body) == bytes, "envelope: other bytes come back");
        }
    }
    assert!(opened.iter().filter(|(_, body)| body.is_ok()).count() <= 1, "envelope: one object of two kinds");
}

/// A hold, as an object and as the body of one.
pub fn hold(bytes: &[u8]) {
    if let Ok(hold) = Hold::from_object(bytes) {
        assert!(hold.to_object() == bytes, "hold: another object comes back");
        assert!(HoldId::parse(&hold.id.to_string()) == Some(hold.id), "hold: its name is none");
    }
    if let Ok(hold) = decode::<Hold>(bytes) {
        assert!(encode(&hold) == bytes, "hold: other bytes come back");
    }
    if let Some(id) = std::str::from_utf8(bytes).ok().and_then(HoldId::parse) {
        assert!(id.to_string().as_bytes() == bytes, "hold: another name comes back");
    }
}

/// A root page, as an object and as the body of one.
pub fn root_page(bytes: &[u8]) {
    if let Ok(root) = open_envelope(ObjectKind::Root, bytes).and_then(RootPage::decode_body) {
        assert!(root_object(&root) == bytes, "root page: another object comes back");
    }
    if let Ok(root) = RootPage::decode_body(bytes) {
        assert!(root.encode_body() == bytes, "root page: other bytes come back");
        let segments = root.grid().segments(root.image_bytes);
        assert!(u64::from(segments) <= IMAGE_BYTES_MAX / (2 << 20) + 1, "root page: larger than an image may be");
        for group in &root.groups {
            assert!(root.group(group.group) == Some(*group), "root page: a group is not found");
        }
    }
}

/// A group page.
pub fn group_page(bytes: &[u8]) {
    if let Ok(page) = GroupPage::decode(bytes) {
        assert!(page.encode() == bytes, "group page: other bytes come back");
    }
}

/// A recipe.
pub fn recipe(bytes: &[u8]) {
    if let Ok(recipe) = Recipe::decode(bytes) {
        assert!(recipe.encode() == bytes, "recipe: other bytes come back");
        let slots = recipe.slots();
        let data = slots.iter().flatten().count();
        assert!(data == recipe.data_blocks() as usize, "recipe: a run leaves its pack");
        for (block, slot) in (0..).zip(slots) {
            assert!(recipe.slot_of(block) == slot, "recipe: block {block} is in two places");
        }
    }
}

/// A pack's header.
pub fn pack_header(bytes: &[u8]) {
    if let Ok(identity) = Identity::from_header(bytes) {
        assert!(identity.header() == bytes, "pack header: other bytes come back");
    }
}

/// A pack's index and trailer, of an object as long as the trailer says.
pub fn pack_tail(bytes: &[u8]) {
    let trailer = bytes.len().checked_sub(TRAILER_BYTES).and_then(|start| bytes.get(start..)).unwrap_or_default();
    if let Ok(tail) = PackIndex::tail_bytes_from_trailer(trailer) {
        assert!(tail as usize >= TRAILER_BYTES, "pack trailer: a tail shorter than itself");
    }
    let number = |at: usize| trailer.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b));
    let parts = [number(HEADER_BYTES), number(HEADER_BYTES + 8), HEADER_BYTES as u64];
    let length = parts.iter().fold(bytes.len() as u64, |sum, part| sum.wrapping_add(*part));
    let Ok(index) = PackIndex::decode_tail(bytes, length) else { return };
    assert!(index.object_bytes() == length, "pack: its length is not the sum of its parts");
    let tail_of = |m: &Member| MemberTail {
        number: m.number,
        frames: m.frames.clone(),
        forwards: m.forwards.clone(),
        checksums: m.page_checksums.clone(),
    };
    let members: Vec<_> = index.members.iter().map(tail_of).collect();
    assert!(PackIndex::encode_tail(&index.identity, &members) == bytes, "pack index: other bytes come back");
    for member in &index.members {
        assert!(member.present().count() == member.slots as usize, "pack index: slots are not counted right");
        for (ordinal, slot) in (0..).zip(member.present()) {
            assert!(member.ordinal_of(slot) == Some(ordinal), "pack index: slot {slot} has another ordinal");
        }
        for page in 0..member.pages() {
            let slots = member.slots_of_page(page);
            assert!(slots.len() * 32 == member.page_range(page).1, "pack index: page {page} has other slots");
            for slot in slots {
                assert!(member.page_of(slot) == Some(page), "pack index: slot {slot} is on another page");
            }
        }
    }
}

/// A frame of a recipe pack, as it is read where a reference says: prefix, payload, slots, and what is in them. Bytes
/// that are no frame are also taken for a payload, and for slots.
pub fn frame(bytes: &[u8]) {
    let plain = FrameRow {
        first_slot: 0,
        span_less_one: 63,
        codec: CODEC_RAW,
        stored_bytes: 0,
        raw_bytes: 0,
        present: u64::MAX,
        checksum: Checksum([0; 16]),
    };
    slots_of(&plain, bytes);
    let Ok((row, payload)) = FrameRow::split_prefix(bytes) else { return };
    assert!(row.prefix()[..] == bytes[..RECIPE_PREFIX_BYTES], "frame: another prefix comes back");
    assert!(row.slots().count() == row.count() as usize, "frame: slots are not counted right");
    if let Ok(raw) = decompress(row.codec, payload, row.raw_bytes as usize) {
        assert!(raw.len() <= RECIPE_FRAME_BYTES_MAX, "frame: larger than a frame may be");
        slots_of(&row, &raw);
    }
}

fn slots_of(row: &FrameRow, raw: &[u8]) {
    assert!(row.count() <= FRAME_SLOTS_MAX, "frame: too many slots");
    let count = row.count() as usize;
    let mut slots = Vec::new();
    for rank in 0..count {
        let Ok(range) = slot_range(Content::Recipes, raw, rank, count) else { break };
        let Some(slot) = raw.get(range) else { panic!("frame: slot {rank} reaches over its end") };
        recipe(slot);
        group_page(slot);
        slots.push(slot.to_vec());
    }
    assert!(slots.is_empty() || join_slots(&slots) == raw, "frame: other bytes come back");
    for rank in 0..=count {
        if let Ok(range) = slot_range(Content::Data, raw, rank, count) {
            assert!(range.end <= raw.len() && range.len() == BLOCK_BYTES, "frame: a block reaches over its end");
        }
    }
}

/// A popular index. Every entry is found under any fingerprint that begins as it says.
pub fn popular_index(bytes: &[u8]) {
    if let Ok(index) = PopularIndex::decode(bytes) {
        assert!(index.encode() == bytes, "popular index: other bytes come back");
        assert!(index.slots().count() as u64 == index.entries(), "popular index: entries are not counted right");
        assert!(index.slots().all(|slot| slot.pack().is_common()), "popular index: a slot of a VM");
        let again = index.retain(|_| true).and_then(|builder| builder.encode(index.identity()));
        assert!(again.is_ok_and(|again| again == bytes), "popular index: other bytes are built");
    }
}

/// The description of a job.
pub fn job(bytes: &[u8]) {
    if let Ok(job) = Job::from_object(bytes) {
        assert!(job.to_object() == bytes, "job: other bytes come back");
    }
}

/// What a job found out about a partition: the job is the one that the bytes name.
pub fn partition_result(bytes: &[u8]) {
    let part = |from: usize| bytes.get(from..).and_then(|rest| rest.first_chunk::<4>()).copied().unwrap_or_default();
    let id = bytes.get(16..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default();
    let row_bytes = u32::from_le_bytes(part(52)).clamp(1, 1024) as usize;
    let mut rest = bytes;
    let mut feed = |out: &mut [u8]| {
        let (now, later) = rest.split_at_checked(out.len()).ok_or_else(|| corrupt("ends early"))?;
        out.copy_from_slice(now);
        rest = later;
        Ok(())
    };
    let mut rows = 0;
    let mut take = |row: &[u8]| {
        rows += row.len();
        Ok(())
    };
    let partition = u32::from_le_bytes(part(48));
    if decode_result(&mut feed, Fingerprint(id), partition, row_bytes, &mut take).is_ok() {
        assert!(rows <= bytes.len(), "partition result: more rows than bytes");
    }
}

/// The text of `snapfs.toml`. It may be spelled in many ways; what was read is read again from what is written.
pub fn config_text(bytes: &[u8]) {
    if let Ok(config) = StoreConfig::parse(bytes) {
        let again = config.to_text().and_then(|text| StoreConfig::parse(text.as_bytes()));
        assert!(again.is_ok_and(|again| again == config), "snapfs.toml: another configuration comes back");
    }
}

/// A change map of an image of 1 GiB.
pub fn change_map(bytes: &[u8]) {
    let image = 1 << 30;
    if let Ok(map) = ChangeMap::parse(bytes, image) {
        let changed = map.changed_bytes();
        assert!(changed <= image, "change map: more changed than there is");
        assert!(map.touches(0, image) == (changed > 0), "change map: a change is lost");
        assert!(!map.touches(image, u64::MAX), "change map: a change past the end");
    }
}

/// The partition table of an image: the size is unknown, as long as the bytes, or one that the bytes say.
pub fn partition_table(bytes: &[u8]) {
    let said = bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    for image_bytes in [u64::MAX, bytes.len() as u64, said] {
        let phase = grid_phase(bytes, image_bytes);
        assert!(phase < BLOCK_BYTES as u32 && phase.is_multiple_of(512), "partition table: phase {phase}");
    }
    let head = bytes.get(..FIRST_BYTES).unwrap_or(bytes);
    assert!(grid_phase(head, 0) < BLOCK_BYTES as u32, "partition table: phase of a cut table");
    for image_bytes in [bytes.len() as u64, said] {
        let read = |offset: u64, out: &mut [u8]| {
            assert!(
                offset.checked_add(out.len() as u64).is_some_and(|end| end <= image_bytes),
                "partitions: past the end"
            );
            let there = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
            out.fill(0);
            out.iter_mut().zip(there).for_each(|(out, byte)| *out = *byte);
            Ok(())
        };
        let found = partitions(&Source { bytes: image_bytes, read: &read }).unwrap_or_default();
        assert!(!found.is_empty(), "partitions: not even the whole image");
        let fits = found.iter().all(|p| p.range.start <= p.range.end && p.range.end <= image_bytes);
        assert!(fits, "partitions: one that reaches out of the image");
    }
}

/// A snapshot's name, to be made and to be read.
pub fn snapshot_name(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match SnapshotName::parse(text) {
        Ok(name) => {
            assert!(name.to_string() == text, "name: another one comes back");
            let reference = SnapshotName::parse_reference(text);
            assert!(reference.is_ok_and(|r| r == name.into()), "name: is no reference to itself");
        }
        Err(e) => assert!(!e.to_string().contains(char::is_control), "name: a control character in a message"),
    }
    if let Ok(reference) = SnapshotName::parse_reference(text) {
        assert!(reference.to_string() == text, "reference: another one comes back");
    }
}

/// The options of `mount -o`; a zero byte stands between two lists.
pub fn mount_options(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let lists: Vec<String> = text.split('\0').map(str::to_owned).collect();
    let options = MountOptions::parse(&lists);
    // A quote that is not closed ends with its list: joined, it would reach into the next.
    if lists.iter().any(|list| list.matches('"').count() % 2 != 0) {
        return;
    }
    let joined = MountOptions::parse(&[lists.join(",")]);
    match (options, joined) {
        (Ok(options), Ok(joined)) => assert!(options == joined, "mount options: lists differ from one list"),
        (Err(_), Err(_)) => {}
        _ => panic!("mount options: lists are taken where one list is not, or the other way round"),
    }
}

/// The text of `clone.json`. It may be spelled in many ways; what was read is read again from what is written.
pub fn clone_description(bytes: &[u8]) {
    if let Ok(description) = Description::parse(bytes) {
        let again = description.to_text().and_then(|text| Description::parse(text.as_bytes()));
        assert!(again.is_ok_and(|again| again == description), "clone.json: another clone comes back");
    }
}

/// The map of a clone, and what it is made of.
pub fn clone_map(bytes: &[u8]) {
    let (head, _) = bytes.split_at(bytes.len().min(ENTRY_BYTES));
    let Ok(header) = Header::parse(head) else { return };
    assert!(header.to_bytes() == head, "map: another header comes back");
    for (place, entry) in (1..).zip(bytes.chunks_exact(ENTRY_BYTES).skip(1)) {
        if let Ok(parsed) = MapEntry::parse(header.clone, header.blocks(), place, entry) {
            assert!(parsed.to_bytes(header.clone, place) == entry, "map: another entry comes back");
            let blocks = header.blocks();
            let is_within = parsed.run().end <= blocks && parsed.masked().all(|block| block < blocks);
            assert!(is_within, "map: an entry leads out of the image");
        }
    }
    if let Ok(loaded) = load(&Bytes(bytes), header.clone, header.image_bytes) {
        let past = loaded.blocks.next_run(header.blocks());
        assert!(past.is_none(), "map: a block past the end of the image");
        assert!(loaded.end.bytes() <= bytes.len() as u64, "map: goes on past its end");
        assert!(loaded.is_torn || loaded.end.bytes() == bytes.len() as u64, "map: whole, and bytes are left");
    }
}

/// Bytes as a file that cannot be changed.
#[derive(Debug)]
struct Bytes<'a>(&'a [u8]);

impl LocalFile for Bytes<'_> {
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = start.checked_add(out.len()).and_then(|end| self.0.get(start..end));
        out.copy_from_slice(found.ok_or_else(|| corrupt("ends early"))?);
        Ok(())
    }
    fn bytes(&self) -> Result<u64> {
        Ok(self.0.len() as u64)
    }
    fn next(&self, offset: u64, _data: bool) -> Result<u64> {
        Ok(offset)
    }
    fn write_at(&self, _offset: u64, _bytes: &[u8]) -> Result<()> {
        Err(unsupported("is not to be changed"))
    }
    fn zero(&self, _offset: u64, _bytes: u64) -> Result<()> {
        Err(unsupported("is not to be changed"))
    }
    fn reserve(&self, _offset: u64, _bytes: u64) -> Result<()> {
        Err(unsupported("is not to be changed"))
    }
    fn set_len(&self, _bytes: u64) -> Result<()> {
        Err(unsupported("is not to be changed"))
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
