//! Tier 3 and 4 for stores over several targets: a fault at every call of one of two targets, damage of every kind to
//! every copy, targets that are away, late, full or come back, and targets that are added and removed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use snapfs::backend::placement::{Copies, TargetId};
use snapfs::backend::replicate::{Layout, Replicated};
use snapfs::backend::target::Target;
use snapfs::backend::testing::{Fault, Faulty, Memory, Operation, Recorder};
use snapfs::backend::{Backend, Key};
use snapfs::check::moving::{Wanted, add_target, remove_target, set_replicas, target_list};
use snapfs::check::{CheckOptions, CheckReport, check_store};
use snapfs::clock::{Clock, ManualClock, SystemClock, Timestamp};
use snapfs::collect::forget::forget;
use snapfs::error::{Error, ErrorKind, Result};
use snapfs::name::SnapshotName;
use snapfs::store::config::write_new;
use snapfs::store::targets::NewTargets;
use snapfs::store::{MemoryShares, Store};

use crate::invariants::{collect_all, open, read_store, shown};
use crate::world::{get, noise, put};

const CHECK: CheckOptions = CheckOptions { read_data: true, sample_percent: None, repair: false };
const REPAIR: CheckOptions = CheckOptions { read_data: true, sample_percent: None, repair: true };

/// What the program uses, unless a test says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);

fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at(Timestamp(1_700_000_000_000_000_000)))
}

type Opened = Box<dyn Fn() -> Result<Arc<dyn Backend>> + Send + Sync>;

fn target(number: u8, clock: &Arc<ManualClock>, patience: Duration, opener: Opened) -> Target {
    let clock = clock.clone() as Arc<dyn Clock>;
    Target::with_patience(TargetId([number; 16]), format!("target{number}"), clock, opener, patience)
}

fn layout(mut targets: Vec<Target>, copies: Copies) -> Layout {
    let home = targets.remove(0);
    let targets = targets.into_iter().map(|target| (target, false)).collect();
    Layout { generation: 1, home, targets, copies, is_moving: false }
}

/// The first backend is where the configuration begins, the others are targets.
pub fn replicated(backends: Vec<Arc<dyn Backend>>, copies: Copies) -> Replicated {
    let clock = clock();
    let targets = backends
        .into_iter()
        .enumerate()
        .map(|(number, backend)| target(number as u8, &clock, PATIENCE, Box::new(move || Ok(backend.clone()))));
    Replicated::new(layout(targets.collect(), copies), None)
}

/// A store in memory over some targets, the home first.
pub struct Scene {
    pub memories: Vec<Memory>,
    pub clock: Arc<ManualClock>,
    copies: Copies,
}

impl Scene {
    pub fn new(targets: usize, copies: Copies) -> Self {
        let scene = Self { memories: (0..=targets).map(|_| Memory::new()).collect(), clock: clock(), copies };
        write_new(&scene.backend(), &*scene.clock).unwrap();
        scene
    }

    /// Two targets, both with all objects.
    pub fn two(quorum: usize) -> Self {
        Self::new(2, Copies { vm: 2, common: 2, quorum })
    }

    pub fn fork(&self) -> Self {
        let memories = self.memories.iter().map(Memory::fork).collect();
        Self { memories, clock: self.clock.clone(), copies: self.copies }
    }

    pub fn backend(&self) -> Replicated {
        self.backend_with(|_, memory| Ok(Arc::new(memory)), None)
    }

    /// With another backend in the place of some.
    pub fn backend_with(
        &self,
        wrap: impl Fn(usize, Memory) -> Result<Arc<dyn Backend>> + Clone + Send + Sync + 'static,
        impatient: Option<usize>,
    ) -> Replicated {
        let targets = self.memories.iter().cloned().enumerate().map(|(number, memory)| {
            let wrap = wrap.clone();
            let opener = Box::new(move || wrap(number, memory.clone()));
            // Only with the one that hangs is anybody in a hurry.
            let patience = if impatient == Some(number) { Duration::from_millis(100) } else { PATIENCE };
            target(number as u8, &self.clock, patience, opener)
        });
        Replicated::new(layout(targets.collect(), self.copies), None)
    }

    pub fn store(&self) -> Store {
        open(Arc::new(self.backend()), &self.clock).unwrap()
    }

    /// As if these targets were not there.
    pub fn without(&self, away: &'static [usize]) -> Result<Store> {
        let wrap = move |number, memory| match away.contains(&number) {
            true => Err(Error::new(ErrorKind::NotFound, "not mounted")),
            false => Ok(Arc::new(memory) as Arc<dyn Backend>),
        };
        open(Arc::new(self.backend_with(wrap, None)), &self.clock)
    }

    /// The number of the target that decides over a VM.
    pub fn arbiter(&self, vm: &str) -> usize {
        usize::from(self.backend().places(&Key::new(format!("vms/{vm}/log"))).homes[0].id().0[0])
    }

    pub fn check(&self, options: CheckOptions) -> CheckReport {
        check_store(&self.store(), options, &mut |_| {}).unwrap()
    }

    /// The objects of VMs on a target; a checkpoint may be anywhere.
    pub fn objects(&self, number: usize) -> BTreeMap<String, Arc<Vec<u8>>> {
        let mut objects = self.memories[number].objects();
        objects.retain(|key, _| key.starts_with("vms/"));
        objects
    }

    pub fn assert_equal_copies(&self, what: &str) {
        let (one, two) = (self.objects(1), self.objects(2));
        let keys = |objects: &BTreeMap<String, Arc<Vec<u8>>>| objects.keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&one), keys(&two), "{what}");
        assert!(one == two, "{what}: copies differ");
    }
}

fn image(seed: u64) -> Vec<u8> {
    let mut bytes = noise(seed, 300_000);
    bytes.resize(2 << 20, 0);
    bytes.extend(noise(seed + 1, 70_000));
    bytes
}

fn forget_one(store: &Store, name: &str) -> Result<()> {
    forget(store, &[SnapshotName::parse(name).unwrap()]).map(drop)
}

#[test]
fn a_fault_at_every_call_of_one_of_two_targets() {
    let (a, b) = (image(1), image(50));
    for quorum in [0, 1] {
        let base = Scene::two(quorum);
        put(&base.store(), "vm/a.img", &a).unwrap();
        let arbiter = base.arbiter("vm");
        for victim in [1, 2] {
            for fault in [Fault::CutBefore, Fault::CutAfter, Fault::Blip, Fault::NoSpace] {
                for at in 0.. {
                    let what = format!("quorum {quorum}, target {victim} (arbiter {arbiter}), {fault:?} at {at}");
                    let scene = base.fork();
                    let faulty = Arc::new(Faulty::new(Arc::new(scene.memories[victim].clone()), fault, at));
                    let wrapped = faulty.clone() as Arc<dyn Backend>;
                    let wrap = move |number, memory: Memory| -> Result<Arc<dyn Backend>> {
                        Ok(if number == victim { wrapped.clone() } else { Arc::new(memory) })
                    };
                    let backend = Arc::new(scene.backend_with(wrap, None));
                    let outcome = open(backend, &scene.clock).and_then(|store| put(&store, "vm/b.img", &b));
                    if quorum == 1 && victim != arbiter {
                        assert!(outcome.is_ok(), "{what}: one copy is enough: {:?}", outcome.err());
                    }
                    if let Err(e) = &outcome {
                        let kinds = [ErrorKind::Unavailable, ErrorKind::NoSpace];
                        assert!(kinds.contains(&e.kind()), "{what}: {e}");
                    }
                    // Another machine, on which both targets work: all or nothing, and what was acknowledged is there.
                    let seen = read_store(&scene.store()).unwrap_or_else(|e| panic!("{what}: {e}"));
                    let before = shown([("vm/", &[][..]), ("vm/a.img", &a)]);
                    let after = shown([("vm/", &[][..]), ("vm/a.img", &a), ("vm/b.img", &b)]);
                    assert!(seen == after || (outcome.is_err() && seen == before), "{what}: {:?}", seen.keys());
                    // If the arbiter alone is lost right now, what had its quorum is still there.
                    if quorum == 0 && outcome.is_ok() {
                        let alone = scene.without(if arbiter == 1 { &[1] } else { &[2] }).unwrap();
                        assert!(read_store(&alone).unwrap() == after, "{what}");
                    }
                    // It goes on, and after a repair each target has all.
                    match put(&scene.store(), "vm/b.img", &b) {
                        Err(e) => assert_eq!(e.kind(), ErrorKind::Exists, "{what}: again: {e}"),
                        Ok(_) => assert!(seen == before, "{what}"),
                    }
                    let report = scene.check(REPAIR);
                    assert!(!report.is_damaged(), "{what}: {:?}", report.findings);
                    for away in [&[1][..], &[2]] {
                        let alone = scene.without(if away == [1] { &[1] } else { &[2] }).unwrap();
                        assert!(read_store(&alone).unwrap() == after, "{what}, without {away:?}");
                    }
                    collect_all(&scene.store(), true).unwrap();
                    scene.assert_equal_copies(&what);
                    if !faulty.fired() {
                        break;
                    }
                }
            }
        }
    }
}

/// Every object of a VM on every target, and every way to damage it: never noticed by who reads, told and repaired.
#[test]
fn each_copy_can_be_damaged_in_every_way() {
    let base = Scene::two(0);
    let images =
        [("vm/a.img", image(1)), ("vm/b.img", image(20)), ("other/a.img", image(40)), ("other/b.img", image(60))];
    for (name, bytes) in &images {
        put(&base.store(), name, bytes).unwrap();
    }
    let want = read_store(&base.store()).unwrap();
    let keys: Vec<String> = base.objects(1).into_keys().filter(|key| key.starts_with("vms/vm/")).collect();
    let kinds = ["/log/", "/packs/", "/snapshots/"].map(|kind| keys.iter().filter(|key| key.contains(kind)).count());
    assert!(kinds.iter().all(|count| *count >= 2), "{kinds:?}");
    for victim in [1, 2] {
        for key in &keys {
            let whole = base.objects(victim)[key].clone();
            let partner = base.objects(victim).get(&key.replace("vms/vm/", "vms/other/")).cloned();
            let mut flipped = whole.to_vec();
            let middle = flipped.len() / 2;
            flipped[middle] ^= 0x10;
            let mut damages =
                vec![("missing", None), ("cut", Some(whole[..whole.len() / 2].to_vec())), ("flipped", Some(flipped))];
            damages.extend(partner.map(|partner| ("swapped", Some(partner.to_vec()))));
            for (how, bytes) in damages {
                let what = format!("{key} on target {victim}, {how}");
                let scene = base.fork();
                let key = Key::new(key.clone());
                match bytes {
                    Some(bytes) => scene.memories[victim].replace(&key, bytes),
                    None => drop(scene.memories[victim].remove(&key)),
                }
                let damaged = scene.objects(victim);
                // Told by who looks, and left as it is.
                let report = scene.check(CHECK);
                assert!(report.is_damaged() && report.damaged == 0, "{what}: {:?}", report.findings);
                assert!(report.findings.iter().any(|f| f.object == key.as_str()), "{what}: {:?}", report.findings);
                assert!(scene.objects(victim) == damaged, "{what}: a check changed something");
                // Not noticed by who reads, who heals what it meets.
                let reader = scene.fork();
                assert!(read_store(&reader.store()).unwrap() == want, "{what}");
                let is_met = !key.as_str().contains("/log/") || how != "missing";
                let is_read = !key.as_str().contains("/packs/") || matches!(how, "missing" | "swapped");
                if is_met && is_read && reader.arbiter("vm") == victim {
                    assert!(reader.objects(victim)[key.as_str()] == whole, "{what}: reading does not heal");
                }
                // Repaired.
                let report = scene.check(REPAIR);
                assert_eq!((report.copies_bad, report.copies_repaired), (1, 1), "{what}: {:?}", report.findings);
                assert!(!report.is_damaged(), "{what}");
                scene.assert_equal_copies(&what);
                assert!(!scene.check(CHECK).is_damaged(), "{what}");
            }
        }
    }
}

#[test]
fn copies_that_are_damaged_in_different_places_make_one_whole() {
    let scene = Scene::two(0);
    let bytes = noise(7, 6 << 20);
    put(&scene.store(), "vm/a.img", &bytes).unwrap();
    let (key, whole) = scene.objects(1).into_iter().max_by_key(|(_, object)| object.len()).unwrap();
    for (victim, at) in [(1, whole.len() / 4), (2, whole.len() / 2)] {
        let mut damaged = whole.to_vec();
        damaged[at] ^= 1;
        scene.memories[victim].replace(&Key::new(key.clone()), damaged);
    }
    assert_eq!(get(&scene.store(), "vm/a.img").unwrap(), bytes);
    let report = scene.check(REPAIR);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    assert!(scene.objects(1)[&key] == whole && scene.objects(2)[&key] == whole);
}

#[test]
fn without_a_quorum_nothing_is_written_and_one_copy_is_read() {
    let scene = Scene::two(0);
    put(&scene.store(), "vm/a.img", &image(1)).unwrap();
    let before = [scene.objects(1), scene.objects(2)];
    for away in [&[1][..], &[2]] {
        let store = scene.without(if away == [1] { &[1] } else { &[2] }).unwrap();
        let error = put(&store, "vm/b.img", &image(3)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains(&format!("target{}", away[0])), "{error}");
        assert_eq!(get(&store, "vm/a.img").unwrap(), image(1));
        let report = check_store(&store, CHECK, &mut |_| {}).unwrap();
        assert_eq!(report.targets_away, [format!("target{}", away[0])]);
        assert!(report.is_damaged() && report.damaged == 0);
    }
    let after = [scene.objects(1), scene.objects(2)];
    let logs = |objects: &[BTreeMap<String, Arc<Vec<u8>>>; 2]| {
        objects.each_ref().map(|o| o.keys().filter(|k| k.contains("/log/")).count())
    };
    assert_eq!(logs(&before), logs(&after), "nothing half-visible");
}

#[test]
fn a_target_that_comes_back_late_resurrects_nothing() {
    let scene = Scene::two(1);
    put(&scene.store(), "vm/a.img", &image(1)).unwrap();
    put(&scene.store(), "vm/b.img", &image(50)).unwrap();
    let late: &'static [usize] = if scene.arbiter("vm") == 1 { &[2] } else { &[1] };
    // While it is away a snapshot is forgotten and collected, and another one made.
    let store = scene.without(late).unwrap();
    forget_one(&store, "vm/a.img").unwrap();
    collect_all(&store, false).unwrap();
    put(&store, "vm/c.img", &image(90)).unwrap();
    // A long time, too: the log is cut off meanwhile.
    for turn in 0..70 {
        let name = format!("vm/d{turn}.img");
        put(&store, &name, b"x").unwrap();
        forget_one(&store, &name).unwrap();
    }
    drop(store);
    let wanted = shown([("vm/", &[][..]), ("vm/b.img", &image(50)), ("vm/c.img", &image(90))]);
    assert_eq!(read_store(&scene.store()).unwrap(), wanted, "with the late target");
    // Who may only ask the late one sees an old state, and cannot write.
    let alone = scene.without(if late == [1] { &[2] } else { &[1] }).unwrap();
    assert_eq!(put(&alone, "vm/x.img", b"x").unwrap_err().kind(), ErrorKind::Unavailable);
    collect_all(&scene.store(), false).unwrap();
    let report = scene.check(REPAIR);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    collect_all(&scene.store(), true).unwrap();
    scene.assert_equal_copies("after the target is back");
    assert_eq!(read_store(&scene.store()).unwrap(), wanted);
}

#[test]
fn what_a_target_kept_while_it_was_away_is_no_bad_copy_elsewhere() {
    for exact in [false, true] {
        let scene = Scene::two(1);
        put(&scene.store(), "vm/a.img", &image(1)).unwrap();
        put(&scene.store(), "vm/b.img", &image(50)).unwrap();
        let decides = scene.arbiter("vm");
        let (late, away): (usize, &'static [usize]) = if decides == 1 { (2, &[2]) } else { (1, &[1]) };
        let store = scene.without(away).unwrap();
        forget_one(&store, "vm/a.img").unwrap();
        collect_all(&store, false).unwrap();
        drop(store);
        let there = scene.objects(decides);
        let kept: Vec<String> = scene.objects(late).into_keys().filter(|key| !there.contains_key(key)).collect();
        assert!(kept.iter().any(|key| key.contains("/snapshots/")), "the late target kept a root page: {kept:?}");
        assert!(kept.iter().any(|key| key.contains("/packs/")), "and packs: {kept:?}");
        // They go, and nobody is told that the other target lacks them.
        let store = scene.store();
        collect_all(&store, exact).unwrap();
        let targets = store.backend().replicated().unwrap();
        let accused: Vec<&String> = kept.iter().filter(|key| targets.wants_healing(&Key::new(*key))).collect();
        assert!(accused.is_empty(), "exact: {exact}: {accused:?}");
        let left = scene.objects(late);
        assert!(kept.iter().all(|key| !left.contains_key(key)), "exact: {exact}: what was kept is gone");
    }
}

/// In front of a medium that hangs in every call while it is told to.
#[derive(Debug, Default)]
struct Gate {
    is_closed: Mutex<bool>,
    opened: Condvar,
    waited: AtomicBool,
}

impl Gate {
    fn set(&self, closed: bool) {
        *self.is_closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let mut closed = self.is_closed.lock().unwrap();
        while *closed {
            self.waited.store(true, Ordering::SeqCst);
            closed = self.opened.wait(closed).unwrap();
        }
    }
}

#[test]
fn a_target_that_hangs_is_left_out_until_it_answers() {
    let scene = Scene::two(1);
    put(&scene.store(), "vm/a.img", &image(1)).unwrap();
    let arbiter = scene.arbiter("vm");
    for victim in [1, 2] {
        let scene = scene.fork();
        let gate = Arc::new(Gate::default());
        let held = gate.clone();
        let wrap = move |number, memory: Memory| -> Result<Arc<dyn Backend>> {
            let gate = held.clone();
            let hang = move |_, _: &Key| {
                gate.pass();
                Ok(())
            };
            let memory = Arc::new(memory);
            Ok(if number == victim { Arc::new(Recorder::with_hook(memory, hang)) } else { memory })
        };
        let backend = Arc::new(scene.backend_with(wrap, Some(victim)));
        let store = open(backend.clone(), &scene.clock).unwrap();
        gate.set(true);
        assert_eq!(get(&store, "vm/a.img").unwrap(), image(1));
        assert!(gate.waited.load(Ordering::SeqCst), "target {victim} was never asked");
        let outcome = put(&store, "vm/b.img", &image(9));
        if victim == arbiter {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unavailable);
        } else {
            outcome.unwrap();
        }
        assert!(!backend.is_whole());
        gate.set(false);
        // The calls that hung return when they can.
        while !backend.is_whole() {
            scene.clock.advance(Duration::from_secs(10));
            std::thread::yield_now();
        }
        // On a busy machine it may seem to hang again.
        while let Err(e) = put(&store, "vm/c.img", &image(11)) {
            if e.kind() == ErrorKind::Exists {
                break;
            }
            assert_eq!(e.kind(), ErrorKind::Unavailable, "target {victim} answers again: {e}");
            scene.clock.advance(Duration::from_secs(10));
        }
        drop((store, backend));
        let report = scene.check(REPAIR);
        assert!(!report.is_damaged(), "{:?}", report.findings);
        assert_eq!(get(&scene.store(), "vm/c.img").unwrap(), image(11));
    }
}

#[test]
fn vms_lie_together_and_a_lost_target_touches_only_its_own() {
    let scene = Scene::new(5, Copies { vm: 2, common: 3, quorum: 0 });
    for vm in 0..8 {
        put(&scene.store(), &format!("vm{vm}/a.img"), &noise(vm, 50_000)).unwrap();
    }
    for vm in 0..8 {
        let prefix = format!("vms/vm{vm}/");
        let counts: Vec<usize> =
            (1..=5).map(|t| scene.objects(t).keys().filter(|key| key.starts_with(&prefix)).count()).collect();
        let homes = counts.iter().filter(|count| **count > 0).collect::<Vec<_>>();
        assert!(homes.len() == 2 && homes[0] == homes[1], "{prefix}: {counts:?}");
    }
    // Of common packs each has places of its own.
    let backend = scene.backend();
    for pack in 0..30 {
        backend.put_new(&Key::new(format!("common/packs/{pack:012x}.0.pack")), b"pack").unwrap();
    }
    let rows = backend.list(&Key::new("common/packs")).unwrap();
    assert_eq!(rows.len(), 30);
    let per_target: Vec<usize> = (1..=5)
        .map(|t| scene.memories[t].objects().keys().filter(|key| key.starts_with("common/packs/")).count())
        .collect();
    assert_eq!(per_target.iter().sum::<usize>(), 90);
    assert!(per_target.iter().all(|count| (8..=28).contains(count)), "{per_target:?}");
}

/// Folders on the disk.
pub struct Folders {
    root: tempfile::TempDir,
    pub clock: Arc<dyn Clock>,
}

impl Folders {
    pub fn new(targets: &[&str], vm: u16) -> Self {
        Self::with_quorum(targets, vm, None)
    }

    pub fn with_quorum(targets: &[&str], vm: u16, quorum: Option<u16>) -> Self {
        let folders = Self { root: tempfile::tempdir().unwrap(), clock: Arc::new(SystemClock::new()) };
        let paths = targets.iter().map(|name| folders.path(name)).collect();
        let new = NewTargets { paths, vm_replicas: Some(vm), common_replicas: Some(vm), quorum };
        Store::init_with(&folders.path("store"), &new, &*folders.clock).unwrap();
        folders
    }

    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.root.path().join(name)
    }

    pub fn store(&self) -> Store {
        Store::open(&self.path("store"), self.clock.clone(), MemoryShares::default()).unwrap()
    }

    pub fn files(&self, target: &str) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.path(target).join("vms")];
        while let Some(folder) = folders.pop() {
            let Ok(rows) = std::fs::read_dir(&folder) else { continue };
            for row in rows.map(|row| row.unwrap().path()) {
                match row.is_dir() {
                    true => folders.push(row),
                    false => found.push(row.strip_prefix(self.path(target)).unwrap().display().to_string()),
                }
            }
        }
        found.retain(|name| !name.ends_with("write.lock"));
        found.sort();
        found
    }
}

pub fn empty(folder: &Path) {
    for row in std::fs::read_dir(folder).unwrap().map(|row| row.unwrap().path()) {
        if row.is_dir() { std::fs::remove_dir_all(row).unwrap() } else { std::fs::remove_file(row).unwrap() }
    }
}

#[test]
fn an_empty_folder_is_no_target_until_a_repair_fills_it() {
    let folders = Folders::new(&["one", "two"], 2);
    put(&folders.store(), "vm/a.img", &image(1)).unwrap();
    assert_eq!(folders.files("store"), Vec::<String>::new());
    assert_eq!(folders.files("one"), folders.files("two"));
    let wanted = folders.files("one");
    empty(&folders.path("one"));
    let store = folders.store();
    assert_eq!(get(&store, "vm/a.img").unwrap(), image(1));
    assert_eq!(put(&store, "vm/b.img", &image(2)).unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(std::fs::read_dir(folders.path("one")).unwrap().count(), 0, "something was written there");
    let states: Vec<_> = target_list(&store).unwrap().into_iter().map(|row| row.state).collect();
    assert_eq!(states, ["away", "ok"]);
    let report = check_store(&folders.store(), REPAIR, &mut |_| {}).unwrap();
    assert!(!report.is_damaged(), "{:?}", report.findings);
    let filled = folders.files("one");
    assert!(wanted.iter().all(|key| filled.contains(key)), "{filled:?}");
    put(&folders.store(), "vm/b.img", &image(2)).unwrap();
    empty(&folders.path("two"));
    assert_eq!(get(&folders.store(), "vm/b.img").unwrap(), image(2));
}

#[test]
fn a_folder_on_another_medium_is_not_filled() {
    let folders = Folders::new(&["one", "two"], 2);
    put(&folders.store(), "vm/a.img", &image(1)).unwrap();
    // The disk of the target is not mounted: in its place is an empty folder of another file system.
    let mount = |arguments: &[&str]| std::process::Command::new("mount").args(arguments).output();
    let one = folders.path("one");
    let done = mount(&["-t", "tmpfs", "none", one.to_str().unwrap()]);
    if !done.is_ok_and(|done| done.status.success()) {
        println!("skipped: a_folder_on_another_medium_is_not_filled: mounting needs privileges");
        return;
    }
    let report = check_store(&folders.store(), REPAIR, &mut |_| {}).unwrap();
    let count = std::fs::read_dir(&one).unwrap().count();
    assert!(std::process::Command::new("umount").arg(&one).status().unwrap().success());
    assert_eq!(count, 0, "something was written to the wrong medium");
    assert_eq!(report.targets_away, [one.display().to_string()]);
    let report = check_store(&folders.store(), CHECK, &mut |_| {}).unwrap();
    assert!(!report.is_damaged(), "{:?}", report.findings);
}

#[test]
fn targets_are_added_and_removed_under_processes_that_do_not_know() {
    let folders = Folders::new(&["one", "two"], 1);
    for vm in 0..16 {
        put(&folders.store(), &format!("vm{vm}/a.img"), &noise(vm, 40_000)).unwrap();
    }
    let store = folders.path("store");
    // It has read logs and packs, and stays.
    let other = folders.store();
    for vm in 0..16 {
        assert_eq!(get(&other, &format!("vm{vm}/a.img")).unwrap(), noise(vm, 40_000));
    }
    let none = Wanted::default();
    add_target(&store, &folders.path("three"), none, folders.clock.clone()).unwrap();
    let error = add_target(&store, &folders.path("three"), none, folders.clock.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let all: usize = ["one", "two", "three"].iter().map(|target| folders.files(target).len()).sum();
    let mut distinct: Vec<String> = ["one", "two", "three"].iter().flat_map(|target| folders.files(target)).collect();
    distinct.sort();
    distinct.dedup();
    assert_eq!(all, distinct.len(), "what moved was not deleted where it was");
    // Who did not know writes where it belongs now.
    for vm in 0..16 {
        put(&other, &format!("vm{vm}/b.img"), &noise(100 + vm, 40_000)).unwrap();
        forget_one(&other, &format!("vm{vm}/a.img")).unwrap();
    }
    let mut wanted: Vec<String> = (0..16).map(|vm| format!("vm{vm}/b.img")).collect();
    wanted.sort();
    let verify = |what: &str| {
        let store = folders.store();
        let names: Vec<String> = read_store(&store).unwrap().into_keys().filter(|name| name.contains("img")).collect();
        assert_eq!(names, wanted, "{what}");
        for vm in 0..16 {
            assert_eq!(get(&store, &format!("vm{vm}/b.img")).unwrap(), noise(100 + vm, 40_000), "{what}");
        }
        let report = check_store(&store, CHECK, &mut |_| {}).unwrap();
        assert!(!report.is_damaged(), "{what}: {:?}", report.findings);
    };
    verify("after add");
    set_replicas(&folders.store(), Wanted { vm: Some(2), common: Some(2), quorum: None }).unwrap();
    verify("with two copies");
    remove_target(&folders.store(), &folders.path("one"), false).unwrap();
    verify("after remove");
    assert!(!folders.path("one").join("target.toml").exists());
    std::fs::remove_dir_all(folders.path("one")).unwrap();
    verify("without the removed one");
    assert_eq!(folders.files("two"), folders.files("three"));
    let error = remove_target(&folders.store(), &folders.path("two"), false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    // One of the two is lost for ever.
    std::fs::remove_dir_all(folders.path("two")).unwrap();
    let error = remove_target(&folders.store(), &folders.path("two"), false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
}

#[test]
fn a_lost_target_is_removed_and_replaced() {
    let folders = Folders::new(&["one", "two", "three"], 2);
    for vm in 0..4 {
        put(&folders.store(), &format!("vm{vm}/a.img"), &noise(vm, 40_000)).unwrap();
    }
    std::fs::remove_dir_all(folders.path("two")).unwrap();
    remove_target(&folders.store(), &folders.path("two"), true).unwrap();
    for vm in 0..4 {
        assert_eq!(get(&folders.store(), &format!("vm{vm}/a.img")).unwrap(), noise(vm, 40_000));
        put(&folders.store(), &format!("vm{vm}/b.img"), &noise(vm, 30_000)).unwrap();
    }
    assert_eq!(folders.files("one"), folders.files("three"));
    assert!(!check_store(&folders.store(), CHECK, &mut |_| {}).unwrap().is_damaged());
    add_target(&folders.path("store"), &folders.path("two"), Wanted::default(), folders.clock.clone()).unwrap();
    assert!(!check_store(&folders.store(), CHECK, &mut |_| {}).unwrap().is_damaged());
}

#[test]
fn a_store_in_one_folder_gets_targets_when_nobody_has_it_open() {
    let folders = Folders::new(&[], 1);
    put(&folders.store(), "vm/a.img", &image(1)).unwrap();
    let open = folders.store();
    let wanted = Wanted { vm: Some(2), common: Some(2), quorum: None };
    let add = || add_target(&folders.path("store"), &folders.path("two"), wanted, folders.clock.clone());
    assert_eq!(add().unwrap_err().kind(), ErrorKind::Busy);
    drop(open);
    add().unwrap();
    assert_eq!(folders.files("store"), folders.files("two"));
    assert_eq!(get(&folders.store(), "vm/a.img").unwrap(), image(1));
    // The folder was moved: it is recognised.
    std::fs::rename(folders.path("store"), folders.path("moved")).unwrap();
    let moved = Store::open(&folders.path("moved"), folders.clock.clone(), MemoryShares::default()).unwrap();
    put(&moved, "vm/b.img", &image(5)).unwrap();
    // Each target tells where the others are.
    let by_target = Store::open(&folders.path("two"), folders.clock.clone(), MemoryShares::default()).unwrap();
    assert_eq!(get(&by_target, "vm/b.img").unwrap(), image(5));
}

#[test]
fn one_folder_is_asked_as_often_as_before() {
    // The recorder sees what a store without targets asks: nothing of copies.
    let memory = Memory::new();
    let clock = clock();
    write_new(&memory, &*clock).unwrap();
    let recorder = Arc::new(Recorder::new(Arc::new(memory)));
    let store = open(recorder.clone(), &clock).unwrap();
    put(&store, "vm/a.img", &image(1)).unwrap();
    assert!(recorder.replicated().is_none());
    let log = recorder.log();
    assert!(log.iter().all(|(operation, _)| *operation != Operation::Ages));
    let puts = log.iter().filter(|(operation, key)| *operation == Operation::PutNew && key.as_str().contains("/log/"));
    assert_eq!(puts.count(), 3, "create, begin, commit");
}
