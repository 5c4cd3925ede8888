//! Tier 3: holds. Whoever was told that a hold is there reads its snapshot to the last byte, whoever forgets it,
//! collects it, removes its VM, and at whatever call of the backend that happens; whoever was refused leaves nothing
//! behind; and what is released goes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use snapfs::backend::testing::{Fault, Faulty, Memory};
use snapfs::backend::{Backend, Key};
use snapfs::catalog::hold::{Hold, HoldId, hold_key};
use snapfs::catalog::roots::root_key;
use snapfs::catalog::state::FileEntry;
use snapfs::check::{CheckOptions, CheckReport, Severity, check_store};
use snapfs::clock::{ManualClock, Timestamp};
use snapfs::collect::forget::forget;
use snapfs::collect::gc::{GcOptions, GcReport, collect_vm};
use snapfs::error::{ErrorKind, Result};
use snapfs::fs::MountedStore;
use snapfs::fs::types::{Options, ROOT};
use snapfs::image::reader::Image;
use snapfs::name::VmName;
use snapfs::store::Store;
use snapfs::store::config::write_new;

use crate::fence::Asleep;
use crate::invariants::{assert_no_leaks, collect_all, keys, open, read_image, read_store};
use crate::world::{Rng, name, noise, put};

const FAULTS: [Fault; 4] = [Fault::CutBefore, Fault::CutAfter, Fault::Blip, Fault::NoSpace];
const SEGMENT: usize = 2 << 20;
const OWNER: &str = "host1: clone web01-monday";

fn vm() -> VmName {
    VmName::new("vm").unwrap()
}

/// A mostly empty image: blocks that all have, and blocks of its own.
fn image(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; SEGMENT + 50_000];
    bytes[4096..][..20 * 4096].copy_from_slice(&noise(1, 20 * 4096));
    bytes[SEGMENT - 40 * 4096..][..44 * 4096].copy_from_slice(&noise(seed, 44 * 4096));
    bytes
}

/// A store with three snapshots: `vm/0.img` to `vm/2.img`.
struct Scene {
    memory: Memory,
    clock: Arc<ManualClock>,
    images: [Vec<u8>; 3],
}

impl Scene {
    fn new() -> Self {
        let memory = Memory::new();
        let clock = Arc::new(ManualClock::at(Timestamp(1_700_000_000_000_000_000)));
        write_new(&memory, &*clock).unwrap();
        let images = [10, 20, 30].map(image);
        let scene = Self { memory, clock, images };
        for (number, bytes) in scene.images.iter().enumerate() {
            put(&scene.store(&scene.memory), &format!("vm/{number}.img"), bytes).unwrap();
        }
        scene
    }

    fn store(&self, memory: &Memory) -> Store {
        self.over(Arc::new(memory.clone())).unwrap()
    }

    fn over(&self, backend: Arc<dyn Backend>) -> Result<Store> {
        open(backend, &self.clock)
    }

    fn file(&self, number: usize) -> FileEntry {
        let (_, state) = self.store(&self.memory).vm(&vm()).unwrap();
        state.find(None, &format!("{number}.img")).unwrap().clone()
    }

    /// After a hold of `vm/1.img` that was acknowledged or not: all is well, now, after collections, and when it is
    /// released.
    fn assert_settles(&self, memory: &Memory, held: Option<HoldId>, what: &str) {
        let memory = memory.fork();
        let store = self.store(&memory);
        let rows = read_store(&store).unwrap();
        for turn in 0..2 {
            assert_eq!(lost(&store), Vec::<String>::new(), "{what}");
            if let Some(id) = held {
                let image = open_held(&store, id).unwrap_or_else(|e| panic!("{what}, turn {turn}: {e}"));
                assert!(read_image(&image).unwrap() == self.images[1], "{what}, turn {turn}");
            }
            if store.vm(&vm()).unwrap().1.find(None, "1.img").is_some() {
                forget(&store, &[name("vm/1.img")]).unwrap();
            }
            let reports = collect_all(&store, turn == 1).unwrap();
            assert_eq!(reports[0].roots_held, u64::from(held.is_some()), "{what}, turn {turn}");
        }
        let handle = store.vm_handle(&vm());
        for id in handle.hold_ids().unwrap() {
            assert!(held.is_none_or(|held| held == id), "{what}: two holds");
            handle.release_hold(id).unwrap();
            handle.release_hold(id).unwrap();
        }
        collect_all(&store, true).unwrap();
        for (name, bytes) in read_store(&store).unwrap() {
            assert!(rows[&name] == bytes, "{what}: {name}");
        }
        assert_no_leaks(&memory, &self.clock, what);
        assert!(keys(&memory, "vms/vm/holds").is_empty(), "{what}");
    }
}

fn open_held(store: &Store, id: HoldId) -> Result<Image> {
    store.open_held(&store.vm_handle(&vm()), id, "the held one")
}

fn check(store: &Store) -> CheckReport {
    check_store(store, CheckOptions { read_data: true, sample_percent: None, repair: false }, &mut |_| {}).unwrap()
}

/// What a check finds lost.
fn lost(store: &Store) -> Vec<String> {
    let findings = check(store).findings;
    findings.iter().filter(|f| f.severity == Severity::Must).map(|f| format!("{}: {}", f.object, f.what)).collect()
}

fn gc(store: &Store, exact: bool) -> Result<GcReport> {
    collect_vm(store, &vm(), GcOptions { exact, dry_run: false }, &mut |_| {})
}

fn hold(store: &Store, file: &FileEntry) -> Result<HoldId> {
    store.vm(&vm())?.0.put_hold(file.id, file.root, OWNER)
}

#[test]
fn a_held_snapshot_is_read_and_checked_as_if_nobody_had_forgotten_it() {
    let scene = Scene::new();
    let store = scene.store(&scene.memory);
    let file = scene.file(1);
    let id = hold(&store, &file).unwrap();
    let second = hold(&store, &file).unwrap();
    assert_ne!(id, second);
    let (handle, state) = store.vm(&vm()).unwrap();
    let hold = handle.read_hold(id).unwrap();
    let told = (hold.id, hold.file, hold.owner.as_str(), hold.incarnation);
    assert_eq!(told, (id, file.id, OWNER, state.incarnation));
    assert_eq!(handle.holds().unwrap().iter().map(|h| h.id).collect::<BTreeSet<_>>(), [id, second].into());
    assert_eq!(check(&store).snapshots_held, 0);
    forget(&store, &[name("vm/0.img"), name("vm/1.img")]).unwrap();
    // Told before it is done, and done.
    let foreseen = collect_vm(&store, &vm(), GcOptions { exact: true, dry_run: true }, &mut |_| {}).unwrap();
    let done = gc(&store, true).unwrap();
    for report in [&foreseen, &done] {
        assert_eq!((report.roots_held, report.roots_dropped, report.roots_pinned), (1, 1, 0));
    }
    assert!(done.packs_dropped > 0);
    assert!(gc(&store, true).unwrap().idle);
    let report = check(&store);
    assert_eq!((report.snapshots, report.snapshots_held, report.findings.len()), (1, 1, 0));
    assert!(read_image(&open_held(&store, id).unwrap()).unwrap() == scene.images[1]);
    // The other hold holds on.
    handle.release_hold(id).unwrap();
    gc(&store, true).unwrap();
    assert!(read_image(&open_held(&scene.store(&scene.memory), second).unwrap()).unwrap() == scene.images[1]);
    // Whoever has it open reads on, though the last hold goes.
    let image = open_held(&store, second).unwrap();
    handle.release_hold(second).unwrap();
    assert_eq!(gc(&store, true).unwrap().roots_pinned, 1);
    assert!(read_image(&image).unwrap() == scene.images[1]);
    assert_eq!(open_held(&store, second).err().unwrap().kind(), ErrorKind::Stale);
    drop(image);
    assert_eq!(gc(&store, true).unwrap().roots_dropped, 1);
    assert_eq!(open_held(&store, second).err().unwrap().kind(), ErrorKind::Stale);
    assert_no_leaks(&scene.memory, &scene.clock, "released");
}

#[test]
fn what_is_gone_cannot_be_held() {
    let scene = Scene::new();
    let store = scene.store(&scene.memory);
    let (file, other) = (scene.file(1), scene.file(2));
    for owner in ["a\nb".to_owned(), "x".repeat(2000)] {
        let error = store.vm(&vm()).unwrap().0.put_hold(file.id, file.root, &owner).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    let mixed = FileEntry { root: other.root, ..file.clone() };
    assert_eq!(hold(&store, &mixed).unwrap_err().kind(), ErrorKind::Stale);
    forget(&store, &[name("vm/1.img")]).unwrap();
    assert_eq!(hold(&store, &file).unwrap_err().kind(), ErrorKind::Stale);
    assert!(keys(&scene.memory, "vms/vm/holds").is_empty());
}

#[test]
fn the_removal_of_a_vm_keeps_what_is_held() {
    let scene = Scene::new();
    let store = Arc::new(scene.store(&scene.memory));
    let id = hold(&store, &scene.file(1)).unwrap();
    forget(&store, &["vm/0.img", "vm/1.img", "vm/2.img"].map(name)).unwrap();
    let mount = MountedStore::new(store.clone(), Options::default());
    mount.remove_folder(ROOT, "vm").unwrap();
    assert_eq!(store.vm(&vm()).err().unwrap().kind(), ErrorKind::NotFound);
    let again = scene.store(&scene.memory);
    for exact in [false, true] {
        assert_eq!(gc(&again, exact).unwrap().roots_held, 1);
        assert!(read_image(&open_held(&again, id).unwrap()).unwrap() == scene.images[1]);
        assert_eq!(lost(&again), Vec::<String>::new());
    }
    // One of the same name goes on beside it.
    put(&again, "vm/1.img", &scene.images[0]).unwrap();
    gc(&again, true).unwrap();
    assert!(read_image(&open_held(&again, id).unwrap()).unwrap() == scene.images[1]);
    again.vm_handle(&vm()).release_hold(id).unwrap();
    gc(&again, true).unwrap();
    assert_eq!(lost(&again), Vec::<String>::new());
    assert_no_leaks(&scene.memory, &scene.clock, "released");
}

#[test]
fn i6_a_hold_that_was_acknowledged_holds_whatever_fails() {
    let scene = Scene::new();
    let file = scene.file(1);
    for fault in FAULTS {
        let mut outcomes = BTreeSet::new();
        for at in 0.. {
            let what = format!("{fault:?} at {at}");
            let disk = scene.memory.fork();
            let faulty = Arc::new(Faulty::new(Arc::new(disk.clone()), fault, at));
            let held = scene.over(faulty.clone()).and_then(|store| {
                let id = hold(&store, &file)?;
                // What follows may fail anywhere.
                let _ = forget(&store, &[name("vm/1.img")]).and_then(|_| gc(&store, at % 2 == 0));
                Ok(id)
            });
            outcomes.insert(held.is_ok());
            if let Err(e) = &held {
                assert!(matches!(e.kind(), ErrorKind::Unavailable | ErrorKind::NoSpace), "{what}: {e}");
            }
            // Another machine. A hold that was not acknowledged may be left: it keeps, or it goes.
            let disk = disk.fork();
            let left = scene.store(&disk).vm_handle(&vm()).hold_ids().unwrap();
            assert!(left.len() <= 1 && held.as_ref().map_or(true, |id| left == [*id]), "{what}: {left:?}");
            scene.assert_settles(&disk, left.first().copied(), &what);
            if !faulty.fired() {
                break;
            }
        }
        assert_eq!(outcomes.len(), 2, "{fault:?}");
    }
}

#[test]
fn i6_releasing_may_be_cut_off_at_any_call() {
    let scene = Scene::new();
    let id = hold(&scene.store(&scene.memory), &scene.file(1)).unwrap();
    for fault in FAULTS {
        for at in 0.. {
            let disk = scene.memory.fork();
            let faulty = Arc::new(Faulty::new(Arc::new(disk.clone()), fault, at));
            let _ = scene.over(faulty.clone()).and_then(|store| {
                forget(&store, &[name("vm/1.img")])?;
                store.vm_handle(&vm()).release_hold(id)?;
                gc(&store, true)
            });
            let disk = disk.fork();
            let left = scene.store(&disk).vm_handle(&vm()).hold_ids().unwrap();
            scene.assert_settles(&disk, left.first().copied(), &format!("release, {fault:?} at {at}"));
            if !faulty.fired() {
                break;
            }
        }
    }
}

/// Somebody who stops before a call of the backend until told to go on.
struct Paused<T> {
    has_stopped: bool,
    resume: Sender<()>,
    done: JoinHandle<Result<T>>,
}

impl<T: Send + 'static> Paused<T> {
    /// Does `work` up to call number `at`; returns when it stops there, or is through before.
    fn start(
        scene: &Scene,
        memory: &Memory,
        at: usize,
        work: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> Self {
        let (arrive, arrived) = channel();
        let (resume, wait) = channel::<()>();
        let (memory, clock) = (memory.clone(), scene.clock.clone());
        let done = std::thread::spawn(move || {
            let told = arrive.clone();
            let stop = move || {
                // When what it opened is used later on, nobody listens and nobody tells any more.
                let _ = told.send(true);
                let _ = wait.recv();
            };
            let outcome = open(Arc::new(Asleep::new(memory, at, stop)), &clock).and_then(|store| work(&store));
            // Heard only if it never came to that call.
            let _ = arrive.send(false);
            outcome
        });
        Self { has_stopped: arrived.recv().unwrap(), resume, done }
    }

    fn finish(self) -> Result<T> {
        // One that is through does not listen.
        let _ = self.resume.send(());
        self.done.join().unwrap()
    }
}

/// Runs `work` up to each of its calls, then `between`, then a collection up to each of its calls, then `work` to its
/// end, then the collection to its end, then `judge`.
fn interleave<T: Send + 'static>(
    scene: &Scene,
    work: impl Fn(&Store) -> Result<T> + Send + Clone + 'static,
    between: impl Fn(&Store),
    mut judge: impl FnMut(&Memory, Result<T>, &str),
) {
    for first in 0.. {
        let mut has_stopped = false;
        for second in 0.. {
            let what = format!("stopped at {first}, the collection at {second}");
            let memory = scene.memory.fork();
            let work = work.clone();
            let paused = Paused::start(scene, &memory, first, move |store| work(store));
            has_stopped |= paused.has_stopped;
            between(&scene.store(&memory));
            let (send, told) = channel();
            let asleep = Arc::new(Asleep::new(memory.clone(), second, move || send.send(paused.finish()).unwrap()));
            let report = scene.over(asleep.clone()).and_then(|store| gc(&store, (first + second) % 2 == 0));
            if !asleep.has_slept() {
                // It has no more calls.
                break;
            }
            report.unwrap_or_else(|e| panic!("{what}: {e}"));
            judge(&memory, told.recv().unwrap(), &what);
        }
        if !has_stopped {
            break;
        }
    }
}

#[test]
fn i6_a_hold_races_forgetting_and_collection_at_every_pair_of_calls() {
    let scene = Scene::new();
    let file = scene.file(1);
    let mut outcomes = BTreeSet::new();
    interleave(
        &scene,
        move |store| hold(store, &file),
        |store| drop(forget(store, &[name("vm/1.img")]).unwrap()),
        |memory, held, what| {
            outcomes.insert(held.is_ok());
            if let Err(e) = &held {
                assert_eq!(e.kind(), ErrorKind::Stale, "{what}: {e}");
                assert!(keys(memory, "vms/vm/holds").is_empty(), "{what}");
            }
            scene.assert_settles(memory, held.ok(), what);
        },
    );
    assert_eq!(outcomes.len(), 2);
}

#[test]
fn i6_the_opening_of_a_held_snapshot_races_release_and_collection_at_every_pair_of_calls() {
    let scene = Scene::new();
    let store = scene.store(&scene.memory);
    let id = hold(&store, &scene.file(1)).unwrap();
    forget(&store, &[name("vm/1.img")]).unwrap();
    let mut outcomes = BTreeSet::new();
    interleave(
        &scene,
        move |store| open_held(store, id),
        |store| store.vm_handle(&vm()).release_hold(id).unwrap(),
        |memory, image, what| {
            outcomes.insert(image.is_ok());
            match &image {
                Ok(image) => assert!(read_image(image).unwrap() == scene.images[1], "{what}"),
                Err(e) => assert_eq!(e.kind(), ErrorKind::Stale, "{what}: {e}"),
            }
            drop(image);
            scene.assert_settles(memory, None, what);
        },
    );
    assert_eq!(outcomes.len(), 2);
}

#[test]
fn a_damaged_hold_keeps_what_it_kept() {
    let scene = Scene::new();
    let store = scene.store(&scene.memory);
    let id = hold(&store, &scene.file(1)).unwrap();
    let other = hold(&store, &scene.file(0)).unwrap();
    forget(&store, &[name("vm/1.img")]).unwrap();
    let key = hold_key("vm", id);
    let object = scene.memory.objects()[key.as_str()].to_vec();
    let flips = (0..object.len()).step_by(7).map(|at| {
        let mut bytes = object.clone();
        bytes[at] ^= 1 << (at % 8);
        bytes
    });
    let cuts = [0, 1, 30, 60, object.len() - 1].map(|end| object[..end].to_vec());
    let foreign = Hold { incarnation: snapfs::units::Incarnation([9; 16]), ..Hold::from_object(&object).unwrap() };
    let swapped = [scene.memory.objects()[hold_key("vm", other).as_str()].to_vec(), foreign.to_object()];
    let mut newer = object.clone();
    newer[10] = 2;
    let checksum = snapfs::fingerprint::short(b"snapfs object", &[&newer[..16], &newer[16..24], &newer[40..]]);
    newer[24..40].copy_from_slice(&checksum);
    for (turn, bytes) in flips.chain(cuts).chain(swapped).chain([newer, vec![7; 5000]]).enumerate() {
        let memory = scene.memory.fork();
        memory.replace(&key, bytes);
        let store = scene.store(&memory);
        let found = check(&store).findings;
        assert!(
            matches!(found.as_slice(), [f] if f.object == key.as_str() && f.severity == Severity::Should),
            "{turn}"
        );
        let handle = store.vm(&vm()).unwrap().0;
        let kind = handle.holds().unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::Corrupt | ErrorKind::Unsupported), "{turn}");
        for exact in [false, true] {
            assert_eq!(gc(&store, exact).unwrap().roots_held, 1, "{turn}");
            assert!(read_image(&open_held(&store, id).unwrap()).unwrap() == scene.images[1], "{turn}");
        }
        handle.release_hold(id).unwrap();
        assert_eq!(gc(&store, true).unwrap().roots_dropped, 1, "{turn}");
    }
}

#[test]
fn what_is_no_hold_holds_nothing() {
    let scene = Scene::new();
    let root = scene.file(1).root;
    for name in [format!("{root}"), format!("{root}.1"), format!("{root}.00000000000000AA"), "notes.txt".to_owned()] {
        scene.memory.put_new(&Key::new(format!("vms/vm/holds/{name}")), b"x").unwrap();
    }
    let store = scene.store(&scene.memory);
    let found = check(&store).findings;
    assert_eq!(found.len(), 4);
    assert!(found.iter().all(|f| f.severity == Severity::Should && f.object.starts_with("vms/vm/holds/")), "{found:?}");
    forget(&store, &[name("vm/1.img")]).unwrap();
    assert_eq!(gc(&store, true).unwrap().roots_dropped, 1);
}

#[test]
fn a_held_root_page_that_is_lost_is_damage_and_stops_collection() {
    let scene = Scene::new();
    let store = scene.store(&scene.memory);
    let file = scene.file(1);
    let id = hold(&store, &file).unwrap();
    forget(&store, &[name("vm/0.img"), name("vm/1.img")]).unwrap();
    let root = root_key("vm", file.root);
    let whole = scene.memory.objects();
    let cut = whole[root.as_str()][..50].to_vec();
    for bytes in [None, Some(cut)] {
        match bytes {
            None => drop(scene.memory.remove(&root)),
            Some(bytes) => scene.memory.replace(&root, bytes),
        }
        let damaged = scene.memory.objects();
        let store = scene.store(&scene.memory);
        let report = check(&store);
        assert!(report.is_damaged());
        let [found] = report.findings.as_slice() else { panic!("{:?}", report.findings) };
        assert_eq!(
            (found.object.as_str(), found.snapshots.as_slice()),
            (root.as_str(), &[format!("vm/(held by {OWNER})")][..])
        );
        for exact in [false, true] {
            let error = gc(&store, exact).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            let text = error.to_string();
            assert!(text.contains(root.as_str()) && text.contains("vms/vm/holds names it"), "{text}");
        }
        assert_eq!(scene.memory.objects(), damaged);
        assert_eq!(open_held(&store, id).err().unwrap().kind(), ErrorKind::Corrupt);
        scene.memory.restore(&whole);
    }
    // Without the hold nobody needs it: what is left goes.
    scene.memory.remove(&root);
    let store = scene.store(&scene.memory);
    store.vm_handle(&vm()).release_hold(id).unwrap();
    gc(&store, true).unwrap();
    assert_eq!(lost(&store), Vec::<String>::new());
    // A hold that came too late, by a program that did not look: it keeps nothing, and check says so.
    scene.memory.put_new(&hold_key("vm", id), &whole[hold_key("vm", id).as_str()]).unwrap();
    let found = lost(&store);
    assert!(matches!(found.as_slice(), [one] if one.contains("is missing: its bytes are gone")), "{found:?}");
    assert!(gc(&store, true).unwrap().idle);
}

#[test]
fn a_hold_that_is_younger_than_the_log_of_a_copy_is_no_damage() {
    let scene = Scene::new();
    let log = scene.memory.objects();
    let store = scene.store(&scene.memory);
    put(&store, "vm/3.img", &image(40)).unwrap();
    let (_, state) = store.vm(&vm()).unwrap();
    hold(&store, state.find(None, "3.img").unwrap()).unwrap();
    // As docs/OPERATIONS.md copies a store: logs first, put into the copy last.
    let mut copy = scene.memory.objects();
    copy.retain(|key, _| !key.contains("/log/") || log.contains_key(key));
    let memory = Memory::new();
    memory.restore(&copy);
    let report = check(&scene.store(&memory));
    assert!(!report.is_damaged() && report.findings.len() == 1, "{:?}", report.findings);
    gc(&scene.store(&memory), false).unwrap();
    assert_eq!(lost(&scene.store(&memory)), Vec::<String>::new());
}

/// Random backups, forgets, holds, releases, removals and collections against a model.
#[test]
fn any_history_keeps_what_is_live_or_held_and_nothing_else() {
    for seed in 1..=24 {
        let mut rng = Rng(seed * 0x9e37_79b9);
        let scene = Scene::new();
        let memory = scene.memory.fork();
        let mut store = scene.store(&memory);
        let mut live: BTreeMap<String, Vec<u8>> =
            (0..3).map(|n| (format!("vm/{n}.img"), scene.images[n].clone())).collect();
        let mut held: BTreeMap<HoldId, Vec<u8>> = BTreeMap::new();
        let mut open_images: Vec<(Image, Vec<u8>)> = Vec::new();
        for step in 0..40 {
            let what = format!("seed {seed}, step {step}");
            let one_of = |rng: &mut Rng| live.keys().nth(rng.below(live.len() as u64) as usize).cloned();
            match rng.below(10) {
                0 | 1 => {
                    let bytes = image(100 + rng.below(6));
                    let name = format!("vm/s{step}.img");
                    put(&store, &name, &bytes).unwrap();
                    live.insert(name, bytes);
                }
                2 | 3 => {
                    if let Some(gone) = one_of(&mut rng) {
                        forget(&store, &[name(&gone)]).unwrap();
                        live.remove(&gone);
                    }
                }
                4 | 5 => {
                    if let Some(kept) = one_of(&mut rng) {
                        let (_, state) = store.vm(&vm()).unwrap();
                        let file = state.find(None, kept.strip_prefix("vm/").unwrap()).unwrap();
                        held.insert(hold(&store, file).unwrap(), live[&kept].clone());
                    }
                }
                6 => {
                    if let Some(id) = held.keys().nth(rng.below(held.len() as u64) as usize).copied() {
                        if rng.below(2) == 0 {
                            open_images.push((open_held(&store, id).unwrap(), held[&id].clone()));
                        }
                        store.vm_handle(&vm()).release_hold(id).unwrap();
                        held.remove(&id);
                    }
                }
                7 if live.is_empty() => {
                    let options = Options::default();
                    let mount = MountedStore::new(Arc::new(scene.store(&memory)), options);
                    // It may be removed already.
                    let _ = mount.remove_folder(ROOT, "vm");
                }
                7 => drop(open_images.pop()),
                8 => store = scene.store(&memory),
                _ => {
                    let roots: BTreeSet<_> = held.keys().map(|id| id.root).collect();
                    let report = gc(&store, rng.below(2) == 0).unwrap();
                    assert!(report.roots_held <= roots.len() as u64 && !report.busy, "{what}");
                }
            }
            for (image, bytes) in &open_images {
                assert!(read_image(image).unwrap() == *bytes, "{what}: an open image");
            }
            for (id, bytes) in &held {
                assert!(read_image(&open_held(&store, *id).unwrap()).unwrap() == *bytes, "{what}: {id}");
            }
        }
        gc(&store, true).unwrap();
        assert_eq!(lost(&store), Vec::<String>::new(), "seed {seed}");
        let shown = read_store(&store).unwrap();
        assert!(live.iter().all(|(name, bytes)| *shown[name] == *bytes), "seed {seed}");
        open_images.clear();
        held.keys().for_each(|id| store.vm_handle(&vm()).release_hold(*id).unwrap());
        gc(&store, true).unwrap();
        assert_no_leaks(&memory, &scene.clock, &format!("seed {seed}"));
    }
}
