//! Tier 4: every kind of object × {missing, cut, a flipped bit, swapped with that of another VM}.
//!
//! For each: the check finds it and names the object (or it was not needed); reading gives right bytes or `Corrupt`;
//! the other VM is unharmed; a later backup works or is refused; and no collection deletes anything that a snapshot
//! needs once the object is as it was.

use std::collections::BTreeMap;
use std::sync::Arc;

use snapfs::backend::Key;
use snapfs::backend::testing::Memory;
use snapfs::catalog::record::{Changes, Op, Target};
use snapfs::catalog::roots::root_key;
use snapfs::catalog::vm::{checkpoint_key, log_prefix, pack_key, record_key};
use snapfs::check::{CheckOptions, CheckReport, Severity, check_store};
use snapfs::clock::{ManualClock, Timestamp};
use snapfs::collect::forget::forget;
use snapfs::collect::gc::{GcOptions, collect_vm};
use snapfs::error::{Error, ErrorKind, Result};
use snapfs::limits::LOG_CHECKPOINT_INTERVAL;
use snapfs::name::{SnapshotName, VmName};
use snapfs::pack::Content;
use snapfs::store::Store;
use snapfs::store::config::write_new;
use snapfs::units::RecordNumber;

use crate::invariants::{Shown, assert_invariants, open, read_image, read_store};
use crate::world::{name, noise, put};

const VMS: [&str; 2] = ["web01", "db02"];
const CHECK: CheckOptions = CheckOptions { read_data: true, sample_percent: None, repair: false };

/// A store with two VMs of the same shape, whose objects have the same sizes.
struct Scene {
    whole: Memory,
    clock: Arc<ManualClock>,
    wanted: Shown,
}

/// What is done to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    Missing,
    Cut(usize),
    Flip(usize),
    Swapped,
}

/// Blocks of noise in two segments, of which `step` changes some.
fn image(vm: usize, step: u64) -> Vec<u8> {
    let seed = 1000 * (vm as u64 + 1);
    let mut bytes = vec![0; (2 << 20) + 300_000];
    bytes[8192..][..160 * 4096].copy_from_slice(&noise(seed, 160 * 4096));
    let tail = bytes.len() - 200_000;
    bytes[tail..].copy_from_slice(&noise(seed + 1, 200_000));
    bytes[20 * 4096..][..30 * 4096].copy_from_slice(&noise(seed + 10 + step, 30 * 4096));
    bytes
}

/// Appends records that change nothing that counts.
fn fill_log(store: &Store, vm: &str, count: u32) {
    let (vm, _) = store.vm(&VmName::new(vm).unwrap()).unwrap();
    for mode in 0..count {
        let changes = Changes { mode: Some(0o700 + mode % 8), ..Changes::default() };
        vm.append(None, |_| Ok((vec![Op::Change { target: Target::Vm {}, changes }], ()))).unwrap();
    }
}

impl Scene {
    fn new() -> Self {
        Self::with(true)
    }

    /// The checkpoint ends the log, or has a snapshot behind it.
    fn with(is_continued: bool) -> Self {
        let whole = Memory::new();
        let clock = Arc::new(ManualClock::at(Timestamp(1_700_000_000_000_000_000)));
        write_new(&whole, &*clock).unwrap();
        let scene = Self { whole, clock, wanted: Shown::new() };
        for (vm, text) in VMS.into_iter().enumerate() {
            for step in 0..3 {
                put(&scene.store(), &format!("{text}/{step}.img"), &image(vm, step)).unwrap();
            }
            forget(&scene.store(), &[name(&format!("{text}/1.img"))]).unwrap();
            fill_log(&scene.store(), text, LOG_CHECKPOINT_INTERVAL as u32 - 8);
            if is_continued {
                put(&scene.store(), &format!("{text}/3.img"), &image(vm, 3)).unwrap();
            }
        }
        let wanted = read_store(&scene.store()).unwrap();
        assert_eq!(wanted.len(), if is_continued { 8 } else { 6 });
        Self { wanted, ..scene }
    }

    fn store(&self) -> Store {
        self.open(&self.whole).unwrap()
    }

    fn open(&self, memory: &Memory) -> Result<Store> {
        open(Arc::new(memory.clone()), &self.clock)
    }

    /// What the snapshots of a VM must give.
    fn wanted_of(&self, vm: &str) -> BTreeMap<&str, &[u8]> {
        let rows = self.wanted.iter().filter(|(name, _)| name.starts_with(vm) && !name.ends_with('/'));
        rows.map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect()
    }

    fn state(&self, vm: &str) -> Arc<snapfs::catalog::state::VmState> {
        self.store().vm(&VmName::new(vm).unwrap()).unwrap().1
    }

    fn root(&self, vm: &str, file: &str) -> Key {
        root_key(vm, self.state(vm).find(None, file).unwrap().root)
    }

    fn pack(&self, vm: &str, content: Content, turn: usize) -> Key {
        let state = self.state(vm);
        let object = state.packs.values().filter(|p| p.content == content).nth(turn).unwrap().object;
        pack_key(vm, object)
    }

    /// The number of the newest checkpoint.
    fn checkpoint(&self, vm: &str) -> u32 {
        let objects = self.whole.objects();
        let prefix = format!("vms/{vm}/log/");
        let mut names = objects.keys().filter_map(|key| key.strip_prefix(&prefix)?.strip_suffix(".checkpoint"));
        let checkpoint = names.next_back().unwrap().parse().unwrap();
        assert_eq!(u64::from(checkpoint), LOG_CHECKPOINT_INTERVAL);
        checkpoint
    }

    fn bytes(&self, key: &Key) -> Vec<u8> {
        self.whole.objects()[key.as_str()].to_vec()
    }

    /// All that is done to an object: cuts and flips all over it, and at its ends.
    fn damages(&self, key: &Key) -> Vec<Damage> {
        let bytes = self.bytes(key).len();
        let mut all = vec![Damage::Missing, Damage::Swapped];
        all.extend([0, 1, 30, bytes / 2, bytes - 1].map(Damage::Cut));
        let ends = [0, 9, 17, 41, 60, bytes - 1, bytes - 20, bytes - 70];
        let spread = (1..8).map(|part| bytes * part / 8);
        all.extend(ends.into_iter().chain(spread).map(Damage::Flip));
        all
    }

    /// A store in which `key`, of the first VM, is damaged; when swapped, its twin too.
    fn damaged(&self, key: &Key, damage: Damage) -> Memory {
        let memory = self.whole.fork();
        let mut bytes = self.bytes(key);
        match damage {
            Damage::Missing => drop(memory.remove(key)),
            Damage::Cut(at) => memory.replace(key, bytes[..at].to_vec()),
            Damage::Flip(at) => {
                bytes[at] ^= 1 << (at % 8);
                memory.replace(key, bytes);
            }
            Damage::Swapped => {
                let twin = twin(key);
                memory.replace(&twin, bytes);
                memory.replace(key, self.bytes(&twin));
            }
        }
        memory
    }

    /// Reads what of a VM can be read: right bytes or `Corrupt`. How many snapshots gave their bytes.
    fn read(&self, memory: &Memory, vm: &str, what: &str) -> usize {
        let store = self.open(memory).unwrap();
        let mut right = 0;
        for (name, wanted) in self.wanted_of(vm) {
            match get(&store, name) {
                Ok(bytes) => {
                    assert!(bytes == wanted, "{what}: {name} has wrong bytes");
                    right += 1;
                }
                Err(e) => assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {name}: {e}"),
            }
        }
        right
    }

    fn assert_whole(&self, memory: &Memory, vm: &str, what: &str) {
        assert_eq!(self.read(memory, vm, what), self.wanted_of(vm).len(), "{what}: {vm}");
    }

    /// No collection deletes what is needed: with the object as it was, all is there.
    fn collect(&self, memory: &Memory, damaged: &[Key], what: &str) {
        for exact in [false, true] {
            let memory = memory.fork();
            let store = self.open(&memory).unwrap();
            for vm in VMS {
                let options = GcOptions { exact, dry_run: false };
                if let Err(e) = collect_vm(&store, &VmName::new(vm).unwrap(), options, &mut |_| {}) {
                    assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: gc of {vm}: {e}");
                }
            }
            for key in damaged {
                memory.replace(key, self.bytes(key));
            }
            for vm in VMS {
                self.assert_whole(&memory, vm, &format!("{what}, after gc (exact: {exact}) and healed"));
            }
        }
    }

    /// A later backup: refused with `Corrupt`, or there. Whether it gives its bytes back.
    fn back_up(&self, memory: &Memory, vm: &str, what: &str) -> bool {
        let memory = memory.fork();
        let bytes = image(VMS.iter().position(|v| *v == vm).unwrap(), 9);
        let later = format!("{vm}/later.img");
        match put(&self.open(&memory).unwrap(), &later, &bytes) {
            Ok(_) => match get(&self.open(&memory).unwrap(), &later) {
                Ok(back) => {
                    assert!(back == bytes, "{what}: a later backup has wrong bytes");
                    true
                }
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
                    false
                }
            },
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
                false
            }
        }
    }
}

fn twin(key: &Key) -> Key {
    Key::new(key.as_str().replace(VMS[0], VMS[1]))
}

fn get(store: &Store, snapshot: &str) -> Result<Vec<u8>> {
    let (_, _, image) = store.open_reference(&SnapshotName::parse_reference(snapshot).unwrap())?;
    read_image(&image)
}

fn check(store: &Store) -> CheckReport {
    check_store(store, CHECK, &mut |_| {}).unwrap()
}

/// Whether a finding names the object.
fn is_named(report: &CheckReport, key: &Key) -> bool {
    report.findings.iter().any(|f| f.object == key.as_str() || f.what.contains(key.as_str()))
}

/// What is the same for all objects that data or snapshots are in.
fn run(scene: &Scene, key: &Key, later_works: impl Fn(Damage) -> bool) {
    assert!(scene.whole.objects().contains_key(twin(key).as_str()), "{key} has no twin");
    for damage in scene.damages(key) {
        let what = format!("{key} {damage:?}");
        let memory = scene.damaged(key, damage);
        let damaged = if damage == Damage::Swapped { vec![key.clone(), twin(key)] } else { vec![key.clone()] };
        let report = check(&scene.open(&memory).unwrap());
        assert!(report.is_damaged(), "{what}");
        for key in &damaged {
            assert!(is_named(&report, key), "{what}: {:?}", report.findings);
        }
        if damage != Damage::Swapped {
            assert!(report.findings.iter().all(|f| f.vm == VMS[0]), "{what}: {:?}", report.findings);
            scene.assert_whole(&memory, VMS[1], &what);
        }
        for vm in VMS {
            scene.read(&memory, vm, &what);
        }
        let worked = scene.back_up(&memory, VMS[0], &what);
        assert!(worked || !later_works(damage), "{what}: a later backup failed");
        assert!(scene.back_up(&memory, VMS[1], &what) || damage == Damage::Swapped, "{what}: the other VM");
        scene.collect(&memory, &damaged, &what);
    }
}

#[test]
fn a_root_page() {
    let scene = Scene::new();
    // The parent of the next backup, and another.
    run(&scene, &scene.root(VMS[0], "3.img"), |_| true);
    run(&scene, &scene.root(VMS[0], "0.img"), |_| true);
}

#[test]
fn a_data_pack() {
    let scene = Scene::new();
    // That a pack is missing or cut is seen when a writer begins, without reading it; a flipped bit in a frame is not.
    let is_seen = |damage| matches!(damage, Damage::Missing | Damage::Cut(_));
    for turn in [0, 2] {
        run(&scene, &scene.pack(VMS[0], Content::Data, turn), is_seen);
    }
}

#[test]
fn a_recipe_pack() {
    let scene = Scene::new();
    for turn in [0, 3] {
        run(&scene, &scene.pack(VMS[0], Content::Recipes, turn), |_| true);
    }
}

#[test]
fn nothing_new_refers_to_a_pack_that_is_cut() {
    let scene = Scene::new();
    // A snapshot whose group page is all that its recipe pack holds; the next one could share that page.
    let mut bytes = image(0, 3);
    bytes[2 << 20..].fill(0);
    let memory = scene.whole.fork();
    put(&scene.open(&memory).unwrap(), "web01/4.img", &bytes).unwrap();
    let (_, state) = scene.open(&memory).unwrap().vm(&VmName::new(VMS[0]).unwrap()).unwrap();
    let last = state.packs.values().next_back().unwrap();
    assert_eq!((last.content, last.slots), (Content::Recipes, 1));
    let key = pack_key(VMS[0], last.object);
    let whole = memory.remove(&key).unwrap();
    // Cut behind the page, so that the page itself can be read.
    memory.replace(&key, whole[..whole.len() - 1].to_vec());
    put(&scene.open(&memory).unwrap(), "web01/5.img", &bytes).unwrap();
    memory.remove(&key);
    assert!(get(&scene.open(&memory).unwrap(), "web01/5.img").unwrap() == bytes);
}

/// A damaged record: what the log tells before it can be read, nothing can be written, and both are said.
fn run_log(scene: &Scene, number: u32, damages: &[Damage], at_least: usize) {
    let key = record_key(VMS[0], RecordNumber(number));
    for damage in damages.iter().copied() {
        let what = format!("{key} {damage:?}");
        let memory = scene.damaged(&key, damage);
        let damaged = if damage == Damage::Swapped { vec![key.clone(), twin(&key)] } else { vec![key.clone()] };
        for (vm, key) in VMS.into_iter().zip(&damaged) {
            let store = scene.open(&memory).unwrap();
            let handle = store.vm_handle(&VmName::new(vm).unwrap());
            handle.refresh().unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(handle.damage().is_some(), "{what}: not said to be damaged");
            let report = check(&scene.open(&memory).unwrap());
            let must = |f: &&snapfs::check::Finding| f.vm == vm && f.severity == Severity::Must;
            let found: Vec<_> = report.findings.iter().filter(must).collect();
            assert!(found.iter().any(|f| f.object == log_prefix(vm).as_str()), "{what}: {:?}", report.findings);
            let names = |key: &Key| found.iter().any(|f| f.what.contains(key.as_str()) || says_record(&f.what, key));
            assert!(names(key), "{what}: {found:?}");
            // Nothing is written to it, and nothing is taken from it.
            assert!(!scene.back_up(&memory, vm, &what), "{what}");
            let refused = [
                forget(&store, &[name(&format!("{vm}/0.img"))]).unwrap_err(),
                collect_vm(&store, &VmName::new(vm).unwrap(), GcOptions { exact: true, dry_run: false }, &mut |_| {})
                    .unwrap_err(),
            ];
            for error in refused {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
            }
        }
        // What was there before the damage can be read; what came later is not there, and is never wrong.
        let store = scene.open(&memory).unwrap();
        let mut right = 0;
        for (name, wanted) in scene.wanted_of(VMS[0]) {
            match get(&store, name) {
                Ok(bytes) => {
                    assert!(bytes == wanted, "{what}: {name} has wrong bytes");
                    right += 1;
                }
                Err(e) => assert!(matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Corrupt), "{what}: {name}: {e}"),
            }
        }
        assert!(right >= at_least, "{what}: only {right} snapshots are readable");
        if damaged.len() == 1 {
            scene.assert_whole(&memory, VMS[1], &what);
            assert!(scene.back_up(&memory, VMS[1], &what), "{what}: the other VM");
        }
        let before = memory.objects();
        scene.collect(&memory, &damaged, &what);
        assert_eq!(memory.objects(), before);
    }
}

/// A gap is told by the record behind it.
fn says_record(what: &str, key: &Key) -> bool {
    let number: u32 = key.as_str().rsplit('/').next().unwrap().parse().unwrap();
    what.contains(&format!("record {} after {}", number + 1, number - 1))
        || what.contains(&format!("record {} is of another VM", number + 1))
        || what.contains(&format!("record {number} is of another VM"))
}

#[test]
fn the_last_record() {
    let scene = Scene::new();
    let number = scene.state(VMS[0]).number.0;
    let key = record_key(VMS[0], RecordNumber(number));
    let damages: Vec<Damage> = scene.damages(&key).into_iter().filter(|d| *d != Damage::Missing).collect();
    run_log(&scene, number, &damages, 2);
}

#[test]
fn a_last_record_that_is_missing_is_a_log_that_ends_earlier() {
    let scene = Scene::new();
    let key = record_key(VMS[0], scene.state(VMS[0]).number);
    let memory = scene.damaged(&key, Damage::Missing);
    // Nothing can tell it from a writer that died before its commit; what that one wrote is seen.
    let report = check(&scene.open(&memory).unwrap());
    assert_eq!((report.damaged, report.leaked_objects), (0, 3), "{:?}", report.findings);
    let mut wanted = scene.wanted.clone();
    wanted.remove("web01/3.img");
    assert_invariants(&memory, &scene.clock, &wanted, "the last record is missing");
    assert!(scene.back_up(&memory, VMS[0], "the last record is missing"));
    let store = scene.open(&memory).unwrap();
    for exact in [false, true] {
        collect_vm(&store, &VmName::new(VMS[0]).unwrap(), GcOptions { exact, dry_run: false }, &mut |_| {}).unwrap();
        assert_invariants(&memory, &scene.clock, &wanted, "the last record is missing");
    }
}

#[test]
fn a_begin_record_that_is_missing_does_not_stop_later_writers() {
    let scene = Scene::new();
    // A writer that died behind its packs, and then its begin record is lost.
    let memory = scene.whole.fork();
    let number = scene.state(VMS[0]).number.next().unwrap();
    let begun = {
        use snapfs::backend::testing::{Fault, Faulty, Scope};
        let backend = || Arc::new(memory.clone());
        let calls = {
            let faulty =
                Arc::new(Faulty::with_scope(Arc::new(memory.fork()), Fault::Blip, usize::MAX, Scope::Mutations));
            put(&open(faulty.clone(), &scene.clock).unwrap(), "web01/dead.img", &image(0, 70)).unwrap();
            faulty.calls()
        };
        let faulty = Faulty::with_scope(backend(), Fault::CutBefore, calls - 1, Scope::Mutations);
        put(&open(Arc::new(faulty), &scene.clock).unwrap(), "web01/dead.img", &image(0, 70)).unwrap_err();
        record_key(VMS[0], number)
    };
    assert!(memory.remove(&begun).is_some());
    let store = scene.open(&memory).unwrap();
    // The next writer gets the same number and finds names taken: refused, and nothing is lost. The one after that
    // works.
    let mut outcomes = Vec::new();
    for turn in 0..3 {
        outcomes.push(put(&store, &format!("web01/{turn}.new"), &image(0, 80 + turn)).map(drop));
    }
    assert!(outcomes.iter().skip(1).all(Result::is_ok), "{outcomes:?}");
    for vm in VMS {
        scene.assert_whole(&memory, vm, "a begin record is missing");
    }
    assert!(!check(&scene.open(&memory).unwrap()).is_damaged());
}

#[test]
fn a_record_behind_the_checkpoint() {
    let scene = Scene::new();
    // The begin record of the last backup.
    let number = scene.state(VMS[0]).number.0 - 1;
    assert!(number > scene.checkpoint(VMS[0]));
    let damages = scene.damages(&record_key(VMS[0], RecordNumber(number)));
    run_log(&scene, number, &damages, 2);
}

#[test]
fn a_damaged_checkpoint_costs_nothing() {
    for is_continued in [true, false] {
        let scene = Scene::with(is_continued);
        let number = RecordNumber(scene.checkpoint(VMS[0]));
        assert_eq!(scene.state(VMS[0]).number == number, !is_continued);
        run_unneeded(&scene, &checkpoint_key(VMS[0], number));
    }
}

#[test]
fn records_before_the_checkpoint_are_not_needed() {
    let scene = Scene::new();
    let checkpoint = scene.checkpoint(VMS[0]);
    for number in [1, 3, checkpoint / 2, checkpoint - 1] {
        run_unneeded(&scene, &record_key(VMS[0], RecordNumber(number)));
    }
}

/// What the log can do without is named when it is damaged, and nothing else happens.
fn run_unneeded(scene: &Scene, key: &Key) {
    for damage in scene.damages(key) {
        let what = format!("{key} {damage:?}");
        let memory = scene.damaged(key, damage);
        assert_invariants(&memory, &scene.clock, &scene.wanted, &what);
        let report = check(&scene.open(&memory).unwrap());
        let is_told = is_named(&report, key);
        assert!(is_told || damage == Damage::Missing, "{what}: {:?}", report.findings);
        assert!(scene.back_up(&memory, VMS[0], &what), "{what}");
        scene.collect(&memory, &[key.clone(), twin(key)], &what);
    }
}

#[test]
fn the_configuration() {
    let scene = Scene::new();
    for key in [Key::new("snapfs.toml"), Key::new("config/0000000001")] {
        let bytes = scene.bytes(&key);
        let mut damages = vec![Damage::Missing];
        damages.extend((0..bytes.len()).step_by(7).map(Damage::Cut));
        damages.extend((0..bytes.len()).map(Damage::Flip));
        for damage in damages {
            let what = format!("{key} {damage:?}");
            let memory = scene.damaged(&key, damage);
            match scene.open(&memory) {
                // A comment, or white space.
                Ok(store) => {
                    assert!(key.as_str() == "snapfs.toml" && matches!(damage, Damage::Flip(_)), "{what}");
                    assert_eq!(store.config(), scene.store().config(), "{what}");
                    for vm in VMS {
                        scene.assert_whole(&memory, vm, &what);
                    }
                }
                Err(e) => {
                    let kinds = [ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::NotFound];
                    assert!(kinds.contains(&e.kind()), "{what}: {e}");
                    assert!(e.kind() != ErrorKind::NotFound || damage == Damage::Missing, "{what}: {e}");
                    assert!(says_where(&e, &key), "{what}: {e}");
                }
            }
        }
    }
    // Of another store.
    let other = Scene::new();
    for key in [Key::new("snapfs.toml"), Key::new("config/0000000001")] {
        let memory = scene.whole.fork();
        memory.replace(&key, other.bytes(&key));
        assert_eq!(scene.open(&memory).err().map(|e| e.kind()), Some(ErrorKind::Corrupt), "{key}");
    }
}

fn says_where(error: &Error, key: &Key) -> bool {
    let text = error.to_string();
    text.contains(key.as_str()) || text.contains("config/ has no record")
}

#[test]
fn a_gap_in_an_open_store_is_noticed() {
    let scene = Scene::new();
    let memory = scene.whole.fork();
    let store = scene.open(&memory).unwrap();
    let (vm, before) = store.vm(&VmName::new(VMS[0]).unwrap()).unwrap();
    // Another process writes two records, the first of which is lost.
    fill_log(&scene.open(&memory).unwrap(), VMS[0], 2);
    let lost = record_key(VMS[0], before.number.next().unwrap());
    let record = memory.remove(&lost).unwrap();
    assert_eq!(vm.refresh().unwrap().number, before.number);
    assert!(vm.damage().is_some());
    let nothing =
        || vm.append(None, |_| Ok((vec![Op::MakeDisk { name: "x".into(), attributes: store.new_folder() }], ())));
    assert_eq!(nothing().unwrap_err().kind(), ErrorKind::Corrupt);
    scene.assert_whole(&memory, VMS[0], "a gap");
    // With the record back it goes on.
    memory.replace(&lost, record.to_vec());
    assert_eq!(vm.refresh().unwrap().number.0, before.number.0 + 2);
    assert!(vm.damage().is_none());
    nothing().unwrap();
}
