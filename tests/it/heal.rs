//! Tier 3 and 4: packs that are damaged in every copy, healed from live images that still have the blocks; also common
//! packs, and packs that another version of zstd compressed, whose healing is cut off at every call of the backend.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use snapfs::backend::placement::Copies;
use snapfs::backend::testing::{Fault, Faulty, Memory};
use snapfs::backend::{Backend, Key};
use snapfs::catalog::record::Op;
use snapfs::catalog::vm::{Vm, pack_key};
use snapfs::check::live::LiveImage;
use snapfs::check::{CheckOptions, CheckReport, Severity, check_store_from};
use snapfs::clock::{ManualClock, Timestamp};
use snapfs::elect::run::{ElectOptions, elect};
use snapfs::error::{ErrorKind, Result, invalid};
use snapfs::pack::Content;
use snapfs::pack::frame::compress;
use snapfs::pack::index::{HEADER_BYTES, Identity, PackIndex};
use snapfs::pack::reader::{Locate, read_index, read_slot_page};
use snapfs::pack::writer::{PackWriter, PackedFrame};
use snapfs::store::Store;
use snapfs::store::config::write_new;
use snapfs::store::session::{Session, pack_entry};
use snapfs::units::{Generation, ObjectId};

use crate::invariants::{assert_no_leaks, collect_all};
use crate::targets::replicated;
use crate::world::{World, get, name, noise, put};

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

/// Words by chance: what zstd compresses to other bytes at another level.
pub fn words(seed: u64, bytes: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes + 16);
    for chance in noise(seed, bytes).chunks(2) {
        text.extend_from_slice(format!("word{} ", u16::from_le_bytes([chance[0], chance[1]]) % 700).as_bytes());
        if text.len() >= bytes {
            break;
        }
    }
    text.truncate(bytes);
    text
}

/// As if another version of zstd had written the data packs of a home: the same blocks, in frames of other bytes.
pub fn compress_otherwise(store: &Store, vm: &Arc<Vm>) {
    let session = Session::begin_without_index(store, vm).unwrap();
    let backend = &**store.backend();
    let (mut packs, mut dead) = (Vec::new(), Vec::new());
    for entry in vm.state().packs.values().filter(|entry| entry.content == Content::Data) {
        let place = vm.locate(entry.number).unwrap();
        let index = read_index(backend, &place).unwrap();
        assert_eq!(index.members.len(), 1);
        let member = index.member(entry.number).unwrap();
        let pages = 0..member.present_pages();
        let prints = pages.flat_map(|page| read_slot_page(backend, &place, member, page).unwrap().fingerprints.clone());
        let mut prints = prints.collect::<Vec<_>>().into_iter();
        let object = ObjectId { number: entry.number, generation: Generation(session.begin_record().0) };
        let key = pack_key(vm.name(), object);
        let mut writer = PackWriter::create(backend, &key, Identity { object, ..index.identity }).unwrap();
        let mut others = 0;
        for (row, at) in member.frames.iter().zip(&member.offsets) {
            let mut stored = vec![0; row.stored_bytes as usize];
            backend.read(&place.key, *at, &mut stored).unwrap();
            let raw = row.open(place.content, place.incarnation, entry.number, &stored).unwrap();
            let (codec, payload) = compress(&raw, 19);
            others += usize::from(payload != stored);
            let (first_slot, span, present) = (row.first_slot, row.span(), row.present);
            let frame = PackedFrame { first_slot, span, present, raw_bytes: row.raw_bytes, codec, payload };
            writer.append(frame, &prints.by_ref().take(row.count() as usize).collect::<Vec<_>>()).unwrap();
        }
        for page in member.present_pages()..member.pages() {
            let page = read_slot_page(backend, &place, member, page).unwrap();
            for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
                writer.forward(*slot, member.forward_of(*slot).unwrap().0, *print).unwrap();
            }
        }
        assert!(others > 0, "zstd gives the same bytes at every level");
        packs.push(pack_entry(entry.number, entry.content, &writer.finish().unwrap(), object).unwrap());
        dead.push(entry.object);
    }
    session.append(|_| Ok((vec![Op::Move { packs: packs.clone(), dead: dead.clone() }], ()))).unwrap();
    drop(session);
    for object in dead {
        backend.delete(&pack_key(vm.name(), object)).unwrap();
    }
}

/// Damages every frame of the data packs of a home.
pub fn damage_frames(memory: &Memory, home: &str) -> u64 {
    let mut frames = 0;
    for (key, (index, _)) in packs(memory, Content::Data).iter().filter(|(key, _)| key.starts_with(home)) {
        frames += in_frames(index).len() as u64;
        flip(memory, key, &in_frames(index));
    }
    frames
}

#[test]
fn frames_that_another_zstd_compressed_go_into_the_next_generation() {
    let world = World::new();
    let bytes = words(1, (3 << 20) + 1000);
    put(&world.store(), "vm/a.img", &bytes).unwrap();
    let vm = world.store().vm_handle(&name("vm/a.img").vm);
    compress_otherwise(&world.store(), &vm);
    assert!(get(&world.store(), "vm/a.img").unwrap() == bytes);
    let before: Vec<_> = packs(&world.memory, Content::Data).into_keys().collect();
    let frames = damage_frames(&world.memory, "vms/vm/");
    assert!(frames > 10);
    let mut live = bytes.clone();
    live.extend_from_slice(&[0; 4096]);
    // While somebody writes the VM nothing is changed, and it is said why.
    let damaged = world.memory.fork();
    let store = world.store();
    let writer = Session::begin_without_index(&store, &store.vm_handle(&name("vm/a.img").vm)).unwrap();
    let report = repair(&world.store(), &[&Live::new(live.clone())]);
    assert_eq!((report.frames_mended, report.frames_unmended), (0, frames), "{:?}", report.findings);
    assert!(report.is_damaged() && report.findings.iter().any(|f| f.what.contains("is being written")));
    drop(writer);
    drop(store);
    let objects =
        |memory: &Memory| packs(memory, Content::Data).into_iter().map(|(k, (_, b))| (k, b)).collect::<Vec<_>>();
    assert_eq!(objects(&world.memory), objects(&damaged));
    // One block is not there: its frame stays as it is, the others heal.
    let mut lacks = live.clone();
    lacks[50 * 4096..51 * 4096].fill(3);
    let report = repair(&world.store(), &[&Live::new(lacks)]);
    assert_eq!((report.frames_mended, report.frames_unmended), (frames - 1, 1), "{:?}", report.findings);
    assert!(report.is_damaged());
    assert!(report.findings.iter().any(|f| f.what.contains("in a new generation")), "{:?}", report.findings);
    let error = get(&world.store(), "vm/a.img").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let report = repair(&world.store(), &[&Live::new(live)]);
    assert_eq!((report.frames_mended, report.frames_unmended), (1, 0), "{:?}", report.findings);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    assert!(get(&world.store(), "vm/a.img").unwrap() == bytes);
    // The damaged generations go with the next collection.
    collect_all(&world.store(), true).unwrap();
    assert_no_leaks(&world.memory, &world.clock, "after collection");
    assert!(packs(&world.memory, Content::Data).keys().all(|key| !before.contains(key)));
    assert!(get(&world.store(), "vm/a.img").unwrap() == bytes);
    // Writing goes on, and finds the blocks under the numbers that they have.
    put(&world.store(), "vm/b.img", &bytes).unwrap();
    assert_eq!(packs(&world.memory, Content::Data).len(), 1);
    assert!(get(&world.store(), "vm/b.img").unwrap() == bytes);
}

#[test]
fn healing_into_the_next_generation_may_be_cut_off_at_every_call() {
    let world = World::new();
    let bytes = words(5, 40 * 4096);
    put(&world.store(), "vm/a.img", &bytes).unwrap();
    compress_otherwise(&world.store(), &world.store().vm_handle(&name("vm/a.img").vm));
    assert!(damage_frames(&world.memory, "vms/vm/") > 1);
    let mut healed_at_once = 0;
    for fault in [Fault::CutBefore, Fault::CutAfter, Fault::Blip, Fault::NoSpace] {
        for at in 0.. {
            let what = format!("{fault:?} at {at}");
            let memory = world.memory.fork();
            let faulty = Arc::new(Faulty::new(Arc::new(memory.clone()), fault, at));
            if let Ok(store) = crate::invariants::open(faulty.clone(), &world.clock) {
                // Whatever it says.
                let _ = check_store_from(&store, REPAIR, &[&Live::new(bytes.clone())], &mut |_| {});
            }
            let store = || crate::invariants::open(Arc::new(memory.clone()), &world.clock).unwrap();
            healed_at_once += usize::from(get(&store(), "vm/a.img").is_ok());
            let report = repair(&store(), &[&Live::new(bytes.clone())]);
            assert!(!report.is_damaged(), "{what}: {:?}", report.findings);
            assert!(get(&store(), "vm/a.img").unwrap() == bytes, "{what}");
            collect_all(&store(), true).unwrap();
            assert_no_leaks(&memory, &world.clock, &what);
            if !faulty.fired() {
                break;
            }
        }
    }
    assert!(healed_at_once > 4);
}

/// Two VMs that share most of what they have by way of common packs.
fn sharing() -> (World, Vec<u8>, Vec<u8>) {
    let world = World::new();
    let shared = words(7, 2 << 20);
    let one = [shared.clone(), words(8, 300_000)].concat();
    let two = [words(9, 40 * 4096), shared].concat();
    put(&world.store(), "one/a.img", &one).unwrap();
    put(&world.store(), "two/a.img", &two).unwrap();
    elect(&Arc::new(world.store()), &ElectOptions::default(), Arc::new(|_| {})).unwrap();
    // Their own copies become forwards.
    collect_all(&world.store(), false).unwrap();
    assert!(packs(&world.memory, Content::Data).keys().any(|key| key.starts_with("common/")));
    (world, one, two)
}

#[test]
fn common_packs_heal_from_an_image_of_any_vm() {
    let (world, one, two) = sharing();
    let whole = world.memory.fork();
    for live in [&one, &two] {
        let frames = damage_frames(&world.memory, "common/");
        assert!(frames > 10);
        for snapshot in ["one/a.img", "two/a.img"] {
            assert_eq!(get(&world.store(), snapshot).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        let report = repair(&world.store(), &[&Live::new(live.clone())]);
        assert_eq!((report.frames_mended, report.frames_unmended), (frames, 0), "{:?}", report.findings);
        assert!(!report.is_damaged(), "{:?}", report.findings);
        assert_same(&world.memory, &whole);
    }
    assert!(get(&world.store(), "one/a.img").unwrap() == one && get(&world.store(), "two/a.img").unwrap() == two);
}

#[test]
fn common_packs_and_packs_with_forwards_heal_into_the_next_generation() {
    let (world, one, two) = sharing();
    let has_forwards = |(_, (index, _)): (&String, &(PackIndex, Vec<u8>))| !index.members[0].forwards.is_empty();
    assert!(packs(&world.memory, Content::Data).iter().any(has_forwards));
    for home in [world.store().common_home().clone(), world.store().vm_handle(&name("one/a.img").vm)] {
        home.refresh().unwrap();
        compress_otherwise(&world.store(), &home);
    }
    let frames = damage_frames(&world.memory, "common/") + damage_frames(&world.memory, "vms/one/");
    let report = repair(&world.store(), &[&Live::new(one.clone())]);
    assert_eq!((report.frames_mended, report.frames_unmended), (frames, 0), "{:?}", report.findings);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    let read = || {
        assert!(get(&world.store(), "one/a.img").unwrap() == one);
        assert!(get(&world.store(), "two/a.img").unwrap() == two);
    };
    read();
    collect_all(&world.store(), true).unwrap();
    assert_no_leaks(&world.memory, &world.clock, "after collection");
    read();
    // The common slots have the numbers that they had: a third VM is told of them.
    let report = put(&world.store(), "three/a.img", &two).unwrap();
    let own: usize = packs(&world.memory, Content::Data).keys().filter(|key| key.starts_with("vms/three/")).count();
    assert!(own <= 1, "{report:?}");
    let report = repair(&world.store(), &[]);
    assert_eq!(report.findings, Vec::new());
}

#[test]
fn the_next_generation_is_on_all_targets() {
    let clock = Arc::new(ManualClock::at(Timestamp(1_700_000_000_000_000_000)));
    let memories = [Memory::new(), Memory::new(), Memory::new()];
    let backends = || memories.iter().map(|memory| Arc::new(memory.clone()) as Arc<dyn Backend>);
    let open = || Arc::new(replicated(backends().collect(), Copies { vm: 2, common: 2, quorum: 0 }));
    write_new(&*open(), &*clock).unwrap();
    let bytes = words(3, 1 << 20);
    let store = || crate::invariants::open(open(), &clock).unwrap();
    put(&store(), "vm/a.img", &bytes).unwrap();
    compress_otherwise(&store(), &store().vm_handle(&name("vm/a.img").vm));
    let frames = damage_frames(&memories[1], "vms/vm/");
    assert_eq!(damage_frames(&memories[2], "vms/vm/"), frames);
    let report = repair(&store(), &[&Live::new(bytes.clone())]);
    assert_eq!((report.frames_mended, report.frames_unmended), (frames, 0), "{:?}", report.findings);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    collect_all(&store(), true).unwrap();
    assert!(get(&store(), "vm/a.img").unwrap() == bytes);
    let (one, two) = (packs(&memories[1], Content::Data), packs(&memories[2], Content::Data));
    assert_eq!(one.len(), 1);
    assert!(one.iter().zip(&two).all(|((key, (_, bytes)), (other, (_, same)))| key == other && bytes == same));
}
