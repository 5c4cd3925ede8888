//! Tier 3: a fault at every backend call of every operation that changes a store.
//!
//! Then power is lost at every call to the medium of a local folder that runs the same operation: see `power.rs`.
//!
//! Each operation runs on a fork of a prepared store, once for each of its calls and each kind of fault. Then, as on
//! another machine after a crash: what was acknowledged is there, what was there before is intact byte for byte, the
//! invariants hold, the same operation works, and an exact collection leaves no object that the log does not need.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use snapfs::backend::Backend;
use snapfs::backend::testing::{Fault, Faulty, Memory};
use snapfs::catalog::record::{Changes, Op, Target};
use snapfs::clock::{ManualClock, Timestamp};
use snapfs::collect::common::collect_common;
use snapfs::collect::forget::{forget, forget_by_rules};
use snapfs::collect::gc::{GcOptions, collect_vm};
use snapfs::collect::keep::Rules;
use snapfs::collect::protect::protect;
use snapfs::elect::count::CountOptions;
use snapfs::elect::run::{ElectOptions, elect};
use snapfs::error::{Error, ErrorKind, Result};
use snapfs::fs::MountedStore;
use snapfs::fs::types::{Caller, Ino, Options, ROOT};
use snapfs::limits::LOG_CHECKPOINT_INTERVAL;
use snapfs::name::{SnapshotName, VmName};
use snapfs::store::Store;
use snapfs::store::config::{Settings, write_new};

use crate::invariants::{Shown, assert_invariants, assert_no_leaks, assert_one_of, collect_all, keys, open, shown};
use crate::power::{Recording, lose_power};
use crate::world::{name, noise, put};

const FAULTS: [Fault; 4] = [Fault::CutBefore, Fault::CutAfter, Fault::Blip, Fault::NoSpace];
const CALLER: Caller = Caller { uid: 0, gid: 0 };
const SEGMENT: usize = 2 << 20;
const CAPACITY: u64 = 1 << 40;

/// A store that an operation will change, and what it must show.
pub struct Scene {
    pub base: Memory,
    pub clock: Arc<ManualClock>,
    /// Before the operation, and after each of its steps.
    pub states: Vec<Shown>,
    /// Steps that may have happened although none was acknowledged since the last.
    pub reach: usize,
    /// Whether ages do not matter: a local folder goes by the machine's clock.
    is_timeless: bool,
}

/// Counts what was acknowledged.
#[derive(Default)]
pub struct Steps {
    pub count: Cell<usize>,
    /// After how many calls each was, where they are recorded.
    pub told: RefCell<Vec<usize>>,
    pub recording: Option<Arc<Recording>>,
}

impl Steps {
    fn done(&self) {
        self.count.set(self.count.get() + 1);
        if let Some(recording) = &self.recording {
            self.told.borrow_mut().push(recording.calls());
        }
    }
}

impl Scene {
    /// A store with another VM, which nothing may touch.
    fn new() -> Self {
        // A limit, so that room that is never given back is noticed.
        let base = Memory::with_capacity_limit(CAPACITY).with_reserve_bytes(0);
        let clock = Arc::new(ManualClock::at(Timestamp(1_700_000_000_000_000_000)));
        write_new(&base, &*clock).unwrap();
        let mut scene = Self { base, clock, states: Vec::new(), reach: 1, is_timeless: true };
        put(&scene.store(), "bystander/a.img", &image(900, &[(0, 9)])).unwrap();
        scene.states.push(scene.with(&[]));
        scene
    }

    /// A store that a changed image comes to, which is returned.
    pub fn of_a_backup() -> (Self, Vec<u8>) {
        let mut scene = Self::new();
        let (a, b) = (first(), second());
        put(&scene.store(), "vm/a.img", &a).unwrap();
        scene.states = vec![
            scene.with(&[("vm/", &[]), ("vm/a.img", &a)]),
            scene.with(&[("vm/", &[]), ("vm/a.img", &a), ("vm/b.img", &b)]),
        ];
        (scene, b)
    }

    fn store(&self) -> Store {
        open(Arc::new(self.base.clone()), &self.clock).unwrap()
    }

    /// The bystander and these.
    fn with(&self, rows: &[(&str, &[u8])]) -> Shown {
        let bystander = image(900, &[(0, 9)]);
        let all = [("bystander/", &[][..]), ("bystander/a.img", &bystander[..])];
        shown(all.into_iter().chain(rows.iter().copied()))
    }

    /// Runs `work` with every fault at every call. `work` counts the steps that were acknowledged; it is run again
    /// without faults on what the first run left, and must then get to the last state.
    fn enumerate(&self, work: impl Fn(&Arc<Store>, &Steps) -> Result<()>) {
        let last = self.states.len() - 1;
        for fault in FAULTS {
            for at in 0.. {
                let what = format!("{fault:?} at {at}");
                let disk = self.base.fork();
                let faulty = Arc::new(Faulty::new(Arc::new(disk.clone()), fault, at));
                let steps = Steps::default();
                let store = open(faulty.clone(), &self.clock).map(Arc::new);
                let run = |steps: &Steps| store.as_ref().map_err(Error::duplicate).and_then(|store| work(store, steps));
                let mut outcome = run(&steps);
                let fired = faulty.fired();
                if let Err(e) = &outcome {
                    let is_full = fault == Fault::NoSpace;
                    let kind = if is_full { ErrorKind::NoSpace } else { ErrorKind::Unavailable };
                    assert_eq!(e.kind(), kind, "{what}: {e}");
                }
                // What may be there now.
                let first = if outcome.is_ok() { last } else { steps.count.get() };
                let end = if outcome.is_ok() { last } else { last.min(first + self.reach) };
                let mut may_be = &self.states[first..=end];
                if fault == Fault::Blip && outcome.is_err() && store.is_ok() {
                    // The same process goes on.
                    assert_one_of(&disk.fork(), &self.clock, may_be, &what);
                    outcome = run(&Steps::default());
                    assert!(outcome.is_ok(), "{what}: again in the same process: {outcome:?}");
                    may_be = &self.states[last..];
                }
                assert!(fired || outcome.is_ok(), "{what}: {outcome:?}");
                drop((store, faulty));
                assert_room_is_free(&disk, &what);
                // Another machine.
                let disk = disk.fork();
                assert_one_of(&disk, &self.clock, may_be, &what);
                let store = Arc::new(open(Arc::new(disk.clone()), &self.clock).unwrap());
                work(&store, &Steps::default()).unwrap_or_else(|e| panic!("{what}: again: {e}"));
                drop(store);
                let store = open(Arc::new(disk.clone()), &self.clock).unwrap();
                collect_all(&store, true).unwrap_or_else(|e| panic!("{what}: gc: {e}"));
                assert_invariants(&disk, &self.clock, &self.states[last], &format!("{what}, in the end"));
                assert_no_leaks(&disk, &self.clock, &what);
                if !fired {
                    break;
                }
            }
        }
        if self.is_timeless {
            lose_power(self, &work);
        }
    }
}

/// Nobody holds an unfinished upload any more.
fn assert_room_is_free(disk: &Memory, what: &str) {
    let mut taken = (0, 0);
    // Threads that finish a pack end a moment after who gave it up.
    for _ in 0..200 {
        let objects: u64 = disk.objects().values().map(|o| o.len() as u64).sum();
        taken = (CAPACITY - disk.space().unwrap().1, objects);
        if taken.0 == taken.1 {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{what}: {} bytes are taken, the objects have {}", taken.0, taken.1);
}

/// An image of two segments that is mostly hole: runs of blocks (first block, count) of noise.
fn image(seed: u64, runs: &[(usize, usize)]) -> Vec<u8> {
    let mut bytes = vec![0; SEGMENT + 70_000];
    for (at, count) in runs {
        let run = noise(seed + *at as u64, count * 4096);
        bytes[at * 4096..][..run.len()].copy_from_slice(&run);
    }
    bytes
}

/// The first image: blocks in two segments.
fn first() -> Vec<u8> {
    image(1, &[(3, 40), (513, 12)])
}

/// The same with a part overwritten, a part zeroed, a part copied and a tail.
fn second() -> Vec<u8> {
    let mut bytes = first();
    bytes[10 * 4096..20 * 4096].copy_from_slice(&noise(7, 10 * 4096));
    bytes[30 * 4096..33 * 4096].fill(0);
    bytes.copy_within(513 * 4096..517 * 4096, 100 * 4096);
    let end = bytes.len();
    bytes[end - 100..].copy_from_slice(&noise(8, 100));
    bytes
}

fn unless(kind: ErrorKind, outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(e) if e.kind() == kind => Ok(()),
        done => done,
    }
}

/// A backup; one that is there already is as good.
pub fn backed_up(store: &Store, snapshot: &str, bytes: &[u8]) -> Result<()> {
    unless(ErrorKind::Exists, put(store, snapshot, bytes).map(drop))
}

#[test]
fn the_backup_of_a_first_image() {
    let mut scene = Scene::new();
    let bytes = first();
    scene.states.push(scene.with(&[("vm/", &[])]));
    scene.states.push(scene.with(&[("vm/", &[]), ("vm/xvda/", &[])]));
    scene.states.push(scene.with(&[("vm/", &[]), ("vm/xvda/", &[]), ("vm/xvda/a.img", &bytes)]));
    scene.reach = 3;
    scene.enumerate(|store, _| backed_up(store, "vm/xvda/a.img", &bytes));
}

#[test]
fn the_backup_of_a_changed_image() {
    let (scene, b) = Scene::of_a_backup();
    scene.enumerate(|store, _| backed_up(store, "vm/b.img", &b));
}

/// Three VMs that share a run of blocks, each with some of its own.
fn sharing(scene: &mut Scene) -> Vec<Vec<u8>> {
    let images: Vec<Vec<u8>> = (0..3)
        .map(|number| {
            let mut bytes = image(50 + number, &[(60, 4)]);
            bytes[4096..][..40 * 4096].copy_from_slice(&noise(77, 40 * 4096));
            bytes
        })
        .collect();
    for (vm, bytes) in ["a", "b", "c"].into_iter().zip(&images) {
        put(&scene.store(), &format!("{vm}/1.img"), bytes).unwrap();
    }
    let rows = [("a/", &[][..]), ("a/1.img", &images[0]), ("b/", &[]), ("b/1.img", &images[1]), ("c/", &[])];
    scene.states = vec![scene.with(&[&rows[..], &[("c/1.img", &images[2][..])]].concat())];
    images
}

fn elected(store: &Arc<Store>) -> Result<()> {
    // One thread: every call comes at the same place each time.
    let count = CountOptions { threads: 1, ..CountOptions::default() };
    elect(store, &ElectOptions { count, ..ElectOptions::default() }, Arc::new(|_| {})).map(drop)
}

#[test]
fn an_election() {
    let mut scene = Scene::new();
    sharing(&mut scene);
    scene.enumerate(|store, _| elected(store));
}

#[test]
fn a_collection_that_forwards() {
    let mut scene = Scene::new();
    sharing(&mut scene);
    elected(&Arc::new(scene.store())).unwrap();
    scene.enumerate(|store, _| collect_all(store, false).map(drop));
}

#[test]
fn a_backup_that_refers_to_common_packs() {
    let mut scene = Scene::new();
    let images = sharing(&mut scene);
    elected(&Arc::new(scene.store())).unwrap();
    let before = scene.states.remove(0);
    let mut last = before.clone();
    last.insert("d/".to_owned(), Arc::default());
    let made = last.clone();
    last.insert("d/1.img".to_owned(), Arc::new(images[0].clone()));
    scene.states = vec![before, made, last];
    scene.reach = 2;
    scene.enumerate(|store, _| backed_up(store, "d/1.img", &images[0]));
}

#[test]
fn the_collection_of_common_packs() {
    let mut scene = Scene::new();
    sharing(&mut scene);
    elected(&Arc::new(scene.store())).unwrap();
    collect_all(&scene.store(), false).unwrap();
    forget(&scene.store(), &[name("a/1.img"), name("b/1.img"), name("c/1.img")]).unwrap();
    scene.states = vec![scene.with(&[("a/", &[]), ("b/", &[]), ("c/", &[])])];
    for vm in ["a", "b", "c"] {
        collect_vm(&scene.store(), &VmName::new(vm).unwrap(), GcOptions::default(), &mut |_| {}).unwrap();
    }
    elected(&Arc::new(scene.store())).unwrap();
    scene.enumerate(|store, _| {
        for _ in 0..2 {
            collect_common(store, GcOptions::default(), &mut |_| {})?;
        }
        Ok(())
    });
}

fn tree(store: &Arc<Store>) -> Arc<MountedStore> {
    MountedStore::new(store.clone(), Options::default())
}

fn folder(fs: &MountedStore, name: &str) -> Result<Ino> {
    fs.lookup(ROOT, name).map(|a| a.ino)
}

#[test]
fn a_draft_in_the_mounted_tree() {
    let mut scene = Scene::new();
    let a = first();
    put(&scene.store(), "vm/a.img", &a).unwrap();
    // What fsync makes durable: some bytes that the parent has, too, and others.
    let head = [&a[..50 * 4096], &noise(20, 5000)[..]].concat();
    let mut whole = head.clone();
    whole.resize(SEGMENT + 30_000, 0);
    whole[100..9000].copy_from_slice(&noise(21, 8900));
    whole[SEGMENT + 10_000..].copy_from_slice(&noise(22, 20_000));
    let rows = |more: &[(&str, &[u8])]| scene.with(&[&[("vm/", &[][..]), ("vm/a.img", &a[..])], more].concat());
    scene.states = vec![
        rows(&[]),
        rows(&[("vm/d.part", &[])]),
        rows(&[("vm/d.part", &head)]),
        rows(&[("vm/d.part", &whole)]),
        rows(&[("vm/d.img", &whole)]),
    ];
    scene.enumerate(|store, steps| {
        let fs = tree(store);
        let parent = folder(&fs, "vm")?;
        match fs.lookup(parent, "d.img") {
            Ok(attributes) => {
                assert_eq!(attributes.mode, 0o444, "renamed, and not sealed");
                return Ok(());
            }
            Err(e) => unless(ErrorKind::NotFound, Err(e))?,
        }
        unless(ErrorKind::NotFound, fs.unlink(parent, "d.part"))?;
        let (_, opened) = fs.create(parent, "d.part", CALLER)?;
        steps.done();
        fs.write(opened.handle, 0, &head[..100_000])?;
        fs.write(opened.handle, 100_000, &head[100_000..])?;
        fs.sync(opened.handle)?;
        steps.done();
        fs.write(opened.handle, SEGMENT as u64 + 10_000, &whole[SEGMENT + 10_000..])?;
        fs.write(opened.handle, 100, &whole[100..9000])?;
        fs.flush(opened.handle)?;
        steps.done();
        fs.release(opened.handle);
        fs.rename(parent, "d.part", parent, "d.img", false)?;
        steps.done();
        Ok(())
    });
}

/// Copies a file as rsync does; one that is left half done is removed first.
fn copied(fs: &MountedStore, to: &str, bytes: &[u8]) -> Result<()> {
    let parent = folder(fs, "vm")?;
    if fs.lookup(parent, to).is_ok() {
        return Ok(());
    }
    unless(ErrorKind::NotFound, fs.unlink(parent, "d.part"))?;
    let (_, opened) = fs.create(parent, "d.part", CALLER)?;
    let written = fs
        .write(opened.handle, 0, &bytes[..100_000])
        .and_then(|()| fs.sync(opened.handle))
        .and_then(|()| fs.write(opened.handle, 100_000, &bytes[100_000..]))
        .and_then(|()| fs.flush(opened.handle));
    fs.release(opened.handle);
    written?;
    fs.rename(parent, "d.part", parent, to, false)
}

#[test]
fn a_daemon_goes_on_after_a_draft_has_failed() {
    let scene = Scene::new();
    let (a, bytes) = (first(), second());
    put(&scene.store(), "vm/a.img", &a).unwrap();
    let wanted = scene.with(&[("vm/", &[]), ("vm/a.img", &a), ("vm/d.img", &bytes), ("vm/e.img", &a)]);
    // The first calls open the store.
    for at in 3.. {
        let what = format!("blip at {at}");
        let disk = scene.base.fork();
        let faulty = Arc::new(Faulty::new(Arc::new(disk.clone()), Fault::Blip, at));
        let fs = tree(&Arc::new(open(faulty.clone(), &scene.clock).unwrap()));
        for (to, bytes) in [("d.img", &bytes), ("e.img", &a)] {
            if let Err(e) = copied(&fs, to, bytes) {
                assert_eq!(e.kind(), ErrorKind::Unavailable, "{what}: {e}");
                copied(&fs, to, bytes).unwrap_or_else(|e| panic!("{what}: {to} again: {e}"));
            }
        }
        if !faulty.fired() {
            break;
        }
        // What was left is sealed in time, and the VM is free.
        for _ in 0..3 {
            scene.clock.advance(Duration::from_secs(60));
            fs.tick();
        }
        let modes = ["d.img", "e.img"].map(|name| fs.lookup(folder(&fs, "vm").unwrap(), name).unwrap().mode);
        assert_eq!(modes, [0o444; 2], "{what}");
        let store = open(Arc::new(disk.clone()), &scene.clock).unwrap();
        let reports = collect_all(&store, true).unwrap();
        assert!(reports.iter().all(|r| !r.busy), "{what}: the VM stays locked");
        drop((fs, faulty, store));
        assert_room_is_free(&disk, &what);
        assert_invariants(&disk, &scene.clock, &wanted, &what);
        assert_no_leaks(&disk, &scene.clock, &what);
    }
}

#[test]
fn a_draft_that_is_sealed_by_time() {
    let mut scene = Scene::new();
    let bytes = first();
    scene.store().vm_or_create(&VmName::new("vm").unwrap()).unwrap();
    {
        let fs = tree(&Arc::new(scene.store()));
        let parent = folder(&fs, "vm").unwrap();
        let (_, opened) = fs.create(parent, "d.img", CALLER).unwrap();
        fs.write(opened.handle, 0, &bytes).unwrap();
        fs.flush(opened.handle).unwrap();
        fs.release(opened.handle);
    }
    scene.states = vec![scene.with(&[("vm/", &[]), ("vm/d.img", &bytes)])];
    let is_sealed = |fs: &MountedStore| Ok(fs.lookup(folder(fs, "vm")?, "d.img")?.mode == 0o444);
    scene.enumerate(|store, _| {
        // A new daemon finds what the last one left.
        let fs = tree(store);
        // Only a full disk may keep it from being sealed while everything else works.
        let mut told = Err(Error::new(ErrorKind::NoSpace, "not sealed in a minute"));
        for _ in 0..12 {
            fs.tick();
            scene.clock.advance(Duration::from_secs(5));
            match is_sealed(&fs) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(e) => told = Err(e),
            }
        }
        told
    });
}

/// Two unlike images, and one that shares a third of the first.
fn history(scene: &mut Scene) -> [Vec<u8>; 3] {
    let [zero, one, two] = [image(50, &[(0, 64), (514, 10)]), image(60, &[(5, 33)]), image(50, &[(0, 20)])];
    for (name, bytes) in [("vm/0.img", &zero), ("vm/2.img", &two), ("vm/1.img", &one)] {
        put(&scene.store(), name, bytes).unwrap();
    }
    [zero, one, two]
}

#[test]
fn forgetting() {
    let mut scene = Scene::new();
    let [zero, one, two] = history(&mut scene);
    let all: [(&str, &[u8]); 4] = [("vm/", &[]), ("vm/2.img", &two), ("vm/0.img", &zero), ("vm/1.img", &one)];
    scene.states = vec![scene.with(&all), scene.with(&all[..2])];
    let names = [name("vm/0.img"), name("vm/1.img")];
    scene.enumerate(|store, _| unless(ErrorKind::NotFound, forget(store, &names).map(drop)));
}

#[test]
fn forgetting_by_rules_with_a_least_age() {
    let mut scene = Scene::new();
    scene.is_timeless = false;
    let week = |s: &mut Settings| {
        s.min_age_seconds = 7 * 86400;
        Ok(())
    };
    scene.store().change_settings(week).unwrap();
    let [zero, one, two] = history(&mut scene);
    scene.base.advance(Duration::from_secs(8 * 86400));
    put(&scene.store(), "vm/3.img", &one).unwrap();
    put(&scene.store(), "vm/4.img", &one).unwrap();
    let all: [(&str, &[u8]); 6] = [
        ("vm/", &[]),
        ("vm/3.img", &one),
        ("vm/4.img", &one),
        ("vm/2.img", &two),
        ("vm/0.img", &zero),
        ("vm/1.img", &one),
    ];
    scene.states = vec![scene.with(&all), scene.with(&all[..3])];
    let rules = Rules { last: 1, ..Rules::default() };
    let vm = VmName::new("vm").unwrap();
    scene.enumerate(|store, _| forget_by_rules(store, &vm, &rules, &TimeZone::UTC, false).map(drop));
}

#[test]
fn changing_a_setting_and_protecting() {
    let mut scene = Scene::new();
    let bytes = first();
    put(&scene.store(), "vm/a.img", &bytes).unwrap();
    scene.states = vec![scene.with(&[("vm/", &[]), ("vm/a.img", &bytes)])];
    let latest = SnapshotName::parse_reference("vm/latest").unwrap();
    scene.enumerate(|store, _| {
        let day = |s: &mut Settings| {
            s.min_age_seconds = 86400;
            Ok(())
        };
        assert_eq!(store.change_settings(day)?.min_age_seconds, 86400);
        protect(store, std::slice::from_ref(&latest), true)?;
        let (_, state) = store.vm(&latest.vm)?;
        assert!(state.files.values().all(|f| f.protected));
        Ok(())
    });
}

#[test]
fn collection_of_dead_packs() {
    let mut scene = Scene::new();
    let [zero, _, two] = history(&mut scene);
    forget(&scene.store(), &[name("vm/1.img")]).unwrap();
    scene.states = vec![scene.with(&[("vm/", &[]), ("vm/0.img", &zero), ("vm/2.img", &two)])];
    scene.enumerate(|store, _| {
        let reports = collect_all(store, false)?;
        assert!(reports.iter().any(|r| r.objects_deleted > 0 || r.idle), "{reports:?}");
        Ok(())
    });
}

#[test]
fn collection_with_compaction() {
    let mut scene = Scene::new();
    let [_, one, two] = history(&mut scene);
    let before = keys(&scene.base, "vms/vm/packs");
    forget(&scene.store(), &[name("vm/0.img")]).unwrap();
    scene.states = vec![scene.with(&[("vm/", &[]), ("vm/1.img", &one), ("vm/2.img", &two)])];
    {
        let disk = scene.base.fork();
        collect_all(&open(Arc::new(disk.clone()), &scene.clock).unwrap(), false).unwrap();
        let moved = keys(&disk, "vms/vm/packs").into_iter().filter(|key| !before.contains(key)).count();
        assert!(moved > 0, "nothing was compacted: the test is no test");
    }
    scene.enumerate(|store, _| collect_all(store, false).map(drop));
}

#[test]
fn merging_of_many_small_packs() {
    let mut scene = Scene::new();
    let mut rows = vec![("vm/".to_owned(), Vec::new())];
    for number in 0..9 {
        let bytes = noise(number * 1000, 30_000);
        put(&scene.store(), &format!("vm/{number}.img"), &bytes).unwrap();
        rows.push((format!("vm/{number}.img"), bytes));
    }
    let rows: Vec<(&str, &[u8])> = rows.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    scene.states = vec![scene.with(&rows)];
    scene.enumerate(|store, _| collect_all(store, false).map(drop));
}

#[test]
fn exact_collection_of_orphans() {
    let mut scene = Scene::new();
    let [zero, _, two] = history(&mut scene);
    // Writers that died at the last moments before their commit.
    let dead = image(99, &[(7, 30)]);
    let calls = {
        let faulty = Arc::new(Faulty::new(Arc::new(scene.base.fork()), Fault::Blip, usize::MAX));
        put(&open(faulty.clone(), &scene.clock).unwrap(), "vm/dead.img", &dead).unwrap();
        faulty.calls()
    };
    // The very last call looks at the log after the commit.
    for back in 2..6 {
        let faulty = Arc::new(Faulty::new(Arc::new(scene.base.clone()), Fault::CutBefore, calls - back));
        put(&open(faulty, &scene.clock).unwrap(), "vm/dead.img", &dead).unwrap_err();
    }
    forget(&scene.store(), &[name("vm/1.img")]).unwrap();
    scene.states = vec![scene.with(&[("vm/", &[]), ("vm/0.img", &zero), ("vm/2.img", &two)])];
    scene.enumerate(|store, _| collect_all(store, true).map(drop));
}

/// Appends records that change nothing that counts until the log ends with record `number`.
fn fill_log(store: &Store, number: u32) {
    let (vm, mut state) = store.vm(&VmName::new("vm").unwrap()).unwrap();
    while state.number.0 < number {
        let changes = Changes { mode: Some(0o700 + state.number.0 % 8), ..Changes::default() };
        vm.append(None, |_| Ok((vec![Op::Change { target: Target::Vm {}, changes }], ()))).unwrap();
        state = vm.state();
    }
    assert_eq!(state.number.0, number);
}

#[test]
fn writing_a_first_checkpoint() {
    let mut scene = Scene::new();
    let bytes = first();
    put(&scene.store(), "vm/a.img", &bytes).unwrap();
    fill_log(&scene.store(), LOG_CHECKPOINT_INTERVAL as u32 - 1);
    let rows = |name| scene.with(&[("vm/", &[]), (name, &bytes)]);
    scene.states = vec![rows("vm/a.img"), rows("vm/b.img")];
    scene.enumerate(|store, _| renamed(store, "a.img", "b.img"));
}

#[test]
fn writing_a_checkpoint_and_removing_old_records() {
    let mut scene = Scene::new();
    let bytes = first();
    put(&scene.store(), "vm/a.img", &bytes).unwrap();
    let interval = LOG_CHECKPOINT_INTERVAL as u32;
    // All records so far, and the first checkpoint.
    fill_log(&scene.store(), 2 * interval - 1);
    assert_eq!(keys(&scene.base, "vms/vm/log").len(), 2 * interval as usize);
    let rows = |name| scene.with(&[("vm/", &[]), (name, &bytes)]);
    scene.states = vec![rows("vm/a.img"), rows("vm/b.img")];
    {
        let disk = scene.base.fork();
        renamed(&Arc::new(open(Arc::new(disk.clone()), &scene.clock).unwrap()), "a.img", "b.img").unwrap();
        assert_eq!(keys(&disk, "vms/vm/log").len(), interval as usize + 2);
    }
    scene.enumerate(|store, _| renamed(store, "a.img", "b.img"));
}

/// A rename in the mounted tree; one that has happened already is as good.
fn renamed(store: &Arc<Store>, from: &str, to: &str) -> Result<()> {
    let fs = tree(store);
    let parent = folder(&fs, "vm")?;
    unless(ErrorKind::NotFound, fs.rename(parent, from, parent, to, false))
}

#[test]
fn a_rename() {
    let mut scene = Scene::new();
    let bytes = first();
    put(&scene.store(), "vm/a.img", &bytes).unwrap();
    let rows = |name| scene.with(&[("vm/", &[]), (name, &bytes)]);
    scene.states = vec![rows("vm/a.img"), rows("vm/b.img")];
    scene.enumerate(|store, _| renamed(store, "a.img", "b.img"));
}

#[test]
fn a_vm_is_made_and_deleted() {
    let mut scene = Scene::new();
    let (none, vm) = (scene.with(&[]), scene.with(&[("vm/", &[])]));
    scene.states = vec![none.clone(), vm.clone(), scene.with(&[("vm/", &[]), ("vm/xvda/", &[])]), vm, none];
    scene.enumerate(|store, steps| {
        let fs = tree(store);
        unless(ErrorKind::Exists, fs.make_folder(ROOT, "vm", 0o755, CALLER).map(drop))?;
        steps.done();
        let parent = folder(&fs, "vm")?;
        unless(ErrorKind::Exists, fs.make_folder(parent, "xvda", 0o755, CALLER).map(drop))?;
        steps.done();
        fs.remove_folder(parent, "xvda")?;
        steps.done();
        fs.remove_folder(ROOT, "vm")?;
        steps.done();
        Ok(())
    });
}

#[test]
fn a_vm_that_was_deleted_begins_again() {
    let mut scene = Scene::new();
    let bytes = second();
    put(&scene.store(), "vm/a.img", &first()).unwrap();
    forget(&scene.store(), &[name("vm/a.img")]).unwrap();
    tree(&Arc::new(scene.store())).remove_folder(ROOT, "vm").unwrap();
    scene.states.push(scene.with(&[("vm/", &[])]));
    scene.states.push(scene.with(&[("vm/", &[]), ("vm/a.img", &bytes)]));
    scene.reach = 2;
    scene.enumerate(|store, _| backed_up(store, "vm/a.img", &bytes));
}
