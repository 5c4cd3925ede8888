//! Tiers 3 and 5: clones over a store in memory. A clone and its hold come and go together, whatever call of the backend
//! fails; a commit reads what was written and nothing else.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use snapfs::backend::testing::{Fault, Faulty};
use snapfs::clones::folder::{ClonesFolder, OpenClone};
use snapfs::clones::lifecycle::{make, open_idle, remove};
use snapfs::clones::snapshot::open_base;
use snapfs::clones::{Base, MapMemory};
use snapfs::collect::forget::forget;
use snapfs::collect::gc::{GcOptions, collect_vm};
use snapfs::error::{ErrorKind, Result};
use snapfs::image::reader::Image;
use snapfs::ingest::backup::BackupReport;
use snapfs::ingest::clone::commit_clone;
use snapfs::name::{SnapshotName, VmName};
use snapfs::store::Store;

use crate::world::{Rng, World, get, name, noise, put};

const SEGMENT: usize = 2 << 20;
const BLOCK: usize = 4096;

struct Scene {
    world: World,
    local: tempfile::TempDir,
    image: Vec<u8>,
}

impl Scene {
    fn new(image: Vec<u8>) -> Self {
        let world = World::new();
        put(&world.store(), "vm/a.img", &image).unwrap();
        Self { world, local: tempfile::tempdir().unwrap(), image }
    }

    fn folder(&self, store: &Store) -> ClonesFolder {
        ClonesFolder::new(self.local.path(), &store.config().store)
    }

    fn make(&self, store: &Store, clone: &str) {
        let reference = SnapshotName::parse_reference("vm/a.img").unwrap();
        make(store, &self.folder(store), &reference, Some(clone), "host1", |_, _| Ok(())).unwrap();
    }

    fn open(&self, store: &Store, clone: &str) -> (OpenClone, Image) {
        let clone = open_idle(store, &self.folder(store), clone).unwrap();
        let image = open_base(store, clone.description()).unwrap();
        (clone, image)
    }

    fn holds(&self, store: &Store) -> usize {
        store.vm_handle(&VmName::new("vm").unwrap()).hold_ids().unwrap().len()
    }

    /// All that lies in the folder, litter too.
    fn entries(&self, store: &Store) -> BTreeSet<String> {
        let rows = std::fs::read_dir(self.folder(store).path()).into_iter().flatten();
        rows.map(|row| row.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// The snapshot, and which bytes of it were read.
struct Counted {
    image: Arc<Image>,
    reads: Arc<Mutex<Vec<Range<u64>>>>,
}

impl Base for Counted {
    fn bytes(&self) -> u64 {
        self.image.bytes()
    }
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.reads.lock().unwrap().push(offset..offset + out.len() as u64);
        self.image.read_at(offset, out)
    }
    fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        self.image.seek_data(offset)
    }
    fn seek_hole(&self, offset: u64) -> Result<u64> {
        self.image.seek_hole(offset)
    }
}

/// Commits a clone; the report, and what was read of the snapshot.
fn commit(scene: &Scene, store: &Store, clone: &str, snapshot: &str) -> Result<(BackupReport, Vec<Range<u64>>)> {
    let (clone, image) = scene.open(store, clone);
    let image = Arc::new(image);
    let reads = Arc::new(Mutex::new(Vec::new()));
    let base = Counted { image: image.clone(), reads: reads.clone() };
    let report = commit_clone(store, clone, &image, base, &name(snapshot), &|_| {})?;
    let reads = std::mem::take(&mut *reads.lock().unwrap());
    Ok((report, reads))
}

/// Changes a clone as a guest does; returns what it is then.
fn change(scene: &Scene, store: &Store, clone: &str, ranges: &[(usize, usize)]) -> Vec<u8> {
    let (clone, image) = scene.open(store, clone);
    clone.begin_writing().unwrap();
    let mut want = vec![0; scene.image.len()];
    clone.overlay().read_at(&image, 0, &mut want).unwrap();
    for (number, (offset, length)) in ranges.iter().enumerate() {
        if number % 4 == 3 {
            clone.overlay().zero(&image, *offset as u64, *length as u64).unwrap();
            want[*offset..offset + length].fill(0);
        } else {
            let bytes = noise(number as u64 + 100, *length);
            clone.overlay().write_at(&image, *offset as u64, &bytes).unwrap();
            want[*offset..offset + length].copy_from_slice(&bytes);
        }
    }
    clone.overlay().flush().unwrap();
    want
}

/// An image of ten segments and a bit, whose first partition may begin anywhere.
fn image(first_sector: u32) -> Vec<u8> {
    let mut bytes = noise(1, 10 * SEGMENT + 12_345);
    bytes[4 * SEGMENT..5 * SEGMENT].fill(0);
    bytes[446..510].fill(0);
    bytes[446..454].copy_from_slice(&[0x80, 0, 0, 0, 0x83, 0, 0, 0]);
    bytes[454..458].copy_from_slice(&first_sector.to_le_bytes());
    bytes[458..462].copy_from_slice(&2000_u32.to_le_bytes());
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

#[test]
fn a_commit_reads_only_what_was_written() {
    for first_sector in [2048, 63] {
        let scene = Scene::new(image(first_sector));
        let store = scene.world.store();
        scene.make(&store, "one");
        // Segments 1, 4 (a hole until now), 7 (becomes partly zero) and the one at the end.
        let end = scene.image.len();
        let ranges =
            [(SEGMENT + 5000, 700), (4 * SEGMENT + 40_000, 9000), (end - 3000, 3000), (7 * SEGMENT + 600_000, 300_000)];
        let want = change(&scene, &store, "one", &ranges);
        let (report, reads) = commit(&scene, &store, "one", "vm/b.img").unwrap();
        assert!(get(&store, "vm/b.img").unwrap() == want, "the new snapshot");
        assert!(get(&store, "vm/a.img").unwrap() == scene.image, "the old snapshot");
        let lead = (4096 - first_sector * 512 % 4096) % 4096;
        let segment_of = |offset: u64| (offset + u64::from(lead)) as usize / SEGMENT;
        let changed: BTreeSet<usize> = ranges.iter().map(|(offset, _)| segment_of(*offset as u64)).collect();
        assert_eq!(changed.len(), 4);
        let bytes_read: u64 = reads.iter().map(|r| r.end - r.start).sum();
        assert!(bytes_read > 0 && bytes_read <= (4 * SEGMENT) as u64, "{bytes_read} bytes");
        for read in reads {
            let segments = [segment_of(read.start), segment_of(read.end - 1)];
            assert!(segments.iter().all(|s| changed.contains(s)), "read {read:?} of segments {segments:?}");
        }
        // All else was taken over: ten segments of data, of which four were written to.
        let written: usize = ranges.iter().map(|(_, length)| length / BLOCK + 2).sum();
        assert!(report.tally.blocks_new <= written as u64, "{:?}", report.tally);
        assert!(report.tally.blocks_unchanged >= 6 * 512 - 2, "{:?}", report.tally);
        let (_, state) = store.vm(&VmName::new("vm").unwrap()).unwrap();
        assert!(state.find(None, "b.img").unwrap().sealed.is_some());
    }
}

#[test]
fn a_commit_of_nothing_reads_nothing() {
    let scene = Scene::new(image(2048));
    let store = scene.world.store();
    scene.make(&store, "one");
    let (report, reads) = commit(&scene, &store, "one", "vm/b.img").unwrap();
    assert!(reads.is_empty(), "{reads:?}");
    assert_eq!((report.tally.blocks_new, report.tally.bytes_stored), (0, 0));
    assert!(get(&store, "vm/b.img").unwrap() == scene.image);
    let taken = commit(&scene, &store, "one", "vm/b.img").unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::Exists);
}

#[test]
fn random_clones_are_committed_as_they_are() {
    for seed in 0..12 {
        let mut rng = Rng(seed + 1);
        let scene = Scene::new(image([2048, 63, 1][seed as usize % 3]));
        let store = scene.world.store();
        scene.make(&store, "one");
        for step in 0..3 {
            let ranges: Vec<(usize, usize)> = (0..rng.below(6) + 1)
                .map(|_| {
                    let length = [1, 512, 4096, 70_000, SEGMENT + 10][rng.below(5) as usize];
                    (rng.below((scene.image.len() - length) as u64) as usize, length)
                })
                .collect();
            let want = change(&scene, &store, "one", &ranges);
            let snapshot = format!("vm/{step}.img");
            commit(&scene, &store, "one", &snapshot).unwrap();
            assert!(get(&store, &snapshot).unwrap() == want, "seed {seed}, step {step}");
        }
    }
}

#[test]
fn a_clone_of_a_forgotten_snapshot_is_committed_just_as_well() {
    let scene = Scene::new(image(63));
    let store = scene.world.store();
    put(&store, "vm/other.img", &noise(50, SEGMENT)).unwrap();
    scene.make(&store, "one");
    let want = change(&scene, &store, "one", &[(3 * SEGMENT, 5000)]);
    forget(&store, &[name("vm/a.img")]).unwrap();
    let vm = VmName::new("vm").unwrap();
    collect_vm(&store, &vm, GcOptions { exact: true, dry_run: false }, &mut |_| {}).unwrap();
    let (report, reads) = commit(&scene, &store, "one", "vm/b.img").unwrap();
    assert!(reads.iter().map(|r| r.end - r.start).sum::<u64>() <= SEGMENT as u64);
    assert!(report.tally.blocks_new <= 3, "{:?}", report.tally);
    // What it took over is its own now.
    remove(&store, &scene.folder(&store), "one").unwrap();
    assert_eq!(scene.holds(&store), 0);
    collect_vm(&store, &vm, GcOptions { exact: true, dry_run: false }, &mut |_| {}).unwrap();
    assert!(get(&scene.world.store(), "vm/b.img").unwrap() == want);
}

#[test]
fn a_clone_can_become_the_first_snapshot_of_another_vm() {
    let scene = Scene::new(image(2048));
    let store = scene.world.store();
    scene.make(&store, "one");
    let want = change(&scene, &store, "one", &[(SEGMENT, 5000)]);
    commit(&scene, &store, "one", "new/first.img").unwrap();
    assert!(get(&store, "new/first.img").unwrap() == want);
}

#[test]
fn nobody_writes_a_clone_that_is_read_by_another() {
    let scene = Scene::new(noise(1, SEGMENT));
    let store = scene.world.store();
    scene.make(&store, "one");
    let memory = Arc::new(MapMemory::new(1 << 20));
    let reader = scene.folder(&store).open("one", &memory).unwrap();
    let second = scene.folder(&store).open("one", &memory).unwrap();
    assert_eq!(second.begin_writing().unwrap_err().kind(), ErrorKind::Busy);
    drop(reader);
    second.begin_writing().unwrap();
    assert_eq!(scene.folder(&store).open("one", &memory).unwrap_err().kind(), ErrorKind::Busy);
    second.end_writing();
    scene.folder(&store).open("one", &memory).unwrap();
}

#[test]
fn i6_a_clone_and_its_hold_come_and_go_together() {
    let image = noise(1, 100_000);
    for fault in [Fault::CutBefore, Fault::CutAfter, Fault::Blip, Fault::NoSpace] {
        for removes in [false, true] {
            for at in 0.. {
                let scene = Scene::new(image.clone());
                let healthy = scene.world.store();
                if removes {
                    scene.make(&healthy, "one");
                }
                let faulty = Arc::new(Faulty::new(Arc::new(scene.world.memory.clone()), fault, at));
                let outcome = scene.world.store_over(faulty.clone()).and_then(|store| {
                    let folder = scene.folder(&store);
                    if removes {
                        return remove(&store, &folder, "one");
                    }
                    let reference = SnapshotName::parse_reference("vm/a.img")?;
                    make(&store, &folder, &reference, Some("one"), "host1", |_, _| Ok(())).map(drop)
                });
                let what = format!("{fault:?} at {at}, removes {removes}: {outcome:?}");
                let store = scene.world.store();
                let is_there = scene.entries(&store).contains("one");
                match (removes, outcome.is_ok()) {
                    (false, true) => assert!(is_there, "{what}"),
                    (true, true) => assert!(!is_there && scene.holds(&store) == 0, "{what}"),
                    _ => {}
                }
                if is_there {
                    let (clone, base) = scene.open(&store, "one");
                    let mut got = vec![0; image.len()];
                    clone.overlay().read_at(&base, 0, &mut got).unwrap();
                    assert!(got == image, "{what}");
                }
                // The next command clears what this one left.
                scene.make(&store, "next");
                let expected: BTreeSet<String> =
                    is_there.then(|| "one".to_owned()).into_iter().chain(["next".to_owned()]).collect();
                assert_eq!(scene.entries(&store), expected, "{what}");
                assert_eq!(scene.holds(&store), expected.len(), "{what}");
                if !faulty.fired() {
                    outcome.unwrap();
                    break;
                }
            }
        }
    }
}
