//! Many at work on one VM: one writer at a time, a writer whose lock is lost is fenced by the log, records that need
//! no lock happen once each, and readers wait for nobody.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use snapfs::backend::local::Local;
use snapfs::backend::testing::{Memory, Recorder};
use snapfs::backend::{Backend, Guard, Key, Listed, Upload};
use snapfs::catalog::record::{Changes, Op, Target};
use snapfs::clock::{Clock, ManualClock, Timestamp};
use snapfs::collect::forget::forget;
use snapfs::collect::gc::{GcOptions, GcReport, collect_vm};
use snapfs::error::{ErrorKind, Result};
use snapfs::ingest::draft_tree::DraftTree;
use snapfs::ingest::writer::{CommitRequest, Writer};
use snapfs::limits::LOG_CHECKPOINT_INTERVAL;
use snapfs::name::{SnapshotName, VmName};
use snapfs::store::config::write_new;
use snapfs::store::session::Session;
use snapfs::store::{MemoryShares, Store};
use snapfs::units::{Grid, SegmentIndex};

use crate::invariants::{
    Shown, assert_invariants, assert_no_leaks, collect_all, keys, open, read_image, read_store, shown,
};
use crate::world::{get, name, noise, put};

const SEGMENT: usize = 2 << 20;

fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at(Timestamp(1_700_000_000_000_000_000)))
}

fn vm() -> VmName {
    VmName::new("vm").unwrap()
}

/// A mostly empty image of two segments with 60 blocks of noise.
fn image(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; SEGMENT + 50_000];
    bytes[4096..][..50 * 4096].copy_from_slice(&noise(seed, 50 * 4096));
    bytes[SEGMENT..][..10 * 4096].copy_from_slice(&noise(seed + 1, 10 * 4096));
    bytes
}

struct NoLock;

impl Guard for NoLock {}

type Hook = Box<dyn FnOnce() + Send>;

/// A store as a process sees it that sleeps before its call number `at` while its lock is lost: every lock is free,
/// and others do what they do in that time.
pub struct Asleep {
    inner: Memory,
    at: usize,
    shared: Arc<Shared>,
}

struct Shared {
    calls: AtomicUsize,
    at: usize,
    meanwhile: Mutex<Option<Hook>>,
}

impl Shared {
    fn call(&self) {
        if self.calls.fetch_add(1, Ordering::SeqCst) == self.at {
            let meanwhile = self.meanwhile.lock().unwrap().take();
            if let Some(meanwhile) = meanwhile {
                meanwhile();
            }
        }
    }
}

impl Asleep {
    pub fn new(inner: Memory, at: usize, meanwhile: impl FnOnce() + Send + 'static) -> Self {
        let meanwhile = Mutex::new(Some(Box::new(meanwhile) as Hook));
        Self { inner, at, shared: Arc::new(Shared { calls: AtomicUsize::new(0), at, meanwhile }) }
    }

    /// Whose locks are lost, and who never sleeps.
    fn awake(inner: Memory) -> Self {
        Self::new(inner, usize::MAX, || {})
    }

    pub fn has_slept(&self) -> bool {
        self.shared.meanwhile.lock().unwrap().is_none()
    }
}

impl fmt::Debug for Asleep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "asleep at {}", self.at)
    }
}

impl Backend for Asleep {
    fn create(&self, key: &Key) -> Result<Box<dyn Upload>> {
        self.shared.call();
        Ok(Box::new(AsleepUpload { inner: self.inner.create(key)?, shared: self.shared.clone() }))
    }

    fn put_new(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        self.shared.call();
        self.inner.put_new(key, bytes)
    }

    fn read(&self, key: &Key, offset: u64, out: &mut [u8]) -> Result<()> {
        self.shared.call();
        self.inner.read(key, offset, out)
    }

    fn read_all(&self, key: &Key, bytes_max: u64) -> Result<Vec<u8>> {
        self.shared.call();
        self.inner.read_all(key, bytes_max)
    }

    fn len(&self, key: &Key) -> Result<u64> {
        self.shared.call();
        self.inner.len(key)
    }

    fn ages(&self, keys: &[Key]) -> Result<Vec<Option<Duration>>> {
        self.shared.call();
        self.inner.ages(keys)
    }

    fn list(&self, prefix: &Key) -> Result<Vec<Listed>> {
        self.shared.call();
        self.inner.list(prefix)
    }

    fn delete(&self, key: &Key) -> Result<()> {
        self.shared.call();
        self.inner.delete(key)
    }

    fn pin(&self, key: &Key) -> Result<Box<dyn Guard>> {
        self.shared.call();
        self.inner.pin(key)
    }

    fn is_pinned(&self, key: &Key) -> Result<bool> {
        self.shared.call();
        self.inner.is_pinned(key)
    }

    fn try_lock(&self, _key: &Key) -> Result<Option<Box<dyn Guard>>> {
        self.shared.call();
        Ok(Some(Box::new(NoLock)))
    }
}

struct AsleepUpload {
    inner: Box<dyn Upload>,
    shared: Arc<Shared>,
}

impl Upload for AsleepUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.shared.call();
        self.inner.append(bytes)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.inner.read(offset, out)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.shared.call();
        self.inner.finish()
    }
}

/// A store in memory with these images.
fn prepared(images: &[(&str, &[u8])]) -> (Memory, Arc<ManualClock>) {
    let (memory, clock) = (Memory::new(), clock());
    write_new(&memory, &*clock).unwrap();
    let store = open(Arc::new(memory.clone()), &clock).unwrap();
    for (name, bytes) in images {
        put(&store, name, bytes).unwrap();
    }
    (memory, clock)
}

fn with_folder(rows: &[(&str, &[u8])]) -> Shown {
    shown([("vm/", &[][..])].into_iter().chain(rows.iter().copied()))
}

#[test]
fn a_vm_has_one_writer_in_one_process_and_in_two() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    Store::init(&root, &*clock()).unwrap();
    let stores = [(); 2].map(|()| Store::open(&root, clock() as Arc<dyn Clock>, MemoryShares::default()).unwrap());
    stores[0].vm_or_create(&vm()).unwrap();
    let begin = |store: &Store| Session::begin(store, &store.vm(&vm()).unwrap().0);
    for (holder, other) in [(0, 0), (0, 1), (1, 0)] {
        let session = begin(&stores[holder]).unwrap();
        let error = begin(&stores[other]).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        assert_eq!(put(&stores[other], "vm/a.img", b"x").unwrap_err().kind(), ErrorKind::Busy);
        // Another VM is nobody's business.
        put(&stores[other], &format!("vm{holder}{other}/a.img"), &noise(1, 5000)).unwrap();
        drop(session);
        put(&stores[other], &format!("vm/{holder}{other}.img"), &noise(1, 5000)).unwrap();
    }
}

#[test]
fn a_paused_writer_publishes_nothing_and_deletes_nothing() {
    let base = image(1);
    let (memory, clock) = prepared(&[("vm/base.img", &base)]);
    let store = open(Arc::new(Asleep::awake(memory.clone())), &clock).unwrap();
    let (handle, _) = store.vm(&vm()).unwrap();
    let session = Arc::new(Session::begin(&store, &handle).unwrap());
    let mut writer = Writer::new(session.clone(), None);
    let mut tree = DraftTree::empty(session.packs().clone(), None);
    let segment = noise(9, SEGMENT);
    for (at, place) in writer.take(&[(SegmentIndex(0), &segment)]).unwrap() {
        tree.set(at, place).unwrap();
    }
    // Its lock is lost, and another writer takes over.
    let other = open(Arc::new(Asleep::awake(memory.clone())), &clock).unwrap();
    let later = image(5);
    put(&other, "vm/later.img", &later).unwrap();
    let before = memory.objects();
    let request = CommitRequest {
        file: session.next_serial().unwrap(),
        disk: None,
        name: "paused.img".to_owned(),
        is_known: false,
        image_bytes: SEGMENT as u64,
        grid: Grid::default(),
        uid: 0,
        gid: 0,
        mtime: Timestamp(1),
        closed: true,
        sealed: true,
    };
    assert_eq!(writer.commit(&mut tree, &request).unwrap_err().kind(), ErrorKind::Busy);
    let fresh: Vec<_> = memory.objects().into_keys().filter(|key| !before.contains_key(key)).collect();
    assert!(fresh.iter().all(|key| key.contains("/packs/")), "{fresh:?}");
    assert_eq!(fresh.len(), 2);
    writer.abandon();
    assert_eq!(memory.objects(), before);
    // Nor can it begin again under its old record.
    let error = session.append(|state| Ok((vec![Op::Forget { file: *state.files.keys().next().unwrap() }], ())));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Busy);
    drop(session);
    let wanted = with_folder(&[("vm/base.img", &base), ("vm/later.img", &later)]);
    assert_invariants(&memory, &clock, &wanted, "after the pause");
}

#[test]
fn a_writer_may_lose_its_lock_at_any_call() {
    let base = image(1);
    let (whole, clock) = prepared(&[("vm/base.img", &base)]);
    let (first, other) = (image(30), image(40));
    let mut outcomes = BTreeSet::new();
    for at in 0.. {
        let what = format!("asleep at {at}");
        let memory = whole.fork();
        let told: Arc<Mutex<Option<Result<()>>>> = Arc::default();
        let meanwhile = {
            let (memory, clock, told, other) = (memory.clone(), clock.clone(), told.clone(), other.clone());
            move || {
                let store = open(Arc::new(Asleep::awake(memory)), &clock).unwrap();
                *told.lock().unwrap() = Some(put(&store, "vm/other.img", &other).map(drop));
            }
        };
        let asleep = Arc::new(Asleep::new(memory.clone(), at, meanwhile));
        let outcome =
            put(&open(asleep.clone(), &clock).unwrap_or_else(|e| panic!("{what}: {e}")), "vm/first.img", &first);
        let mut rows: Vec<(&str, &[u8])> = vec![("vm/base.img", &base)];
        match &outcome {
            Ok(_) => rows.push(("vm/first.img", &first)),
            Err(e) => assert_eq!(e.kind(), ErrorKind::Busy, "{what}: {e}"),
        }
        if asleep.has_slept() {
            told.lock().unwrap().take().unwrap().unwrap_or_else(|e| panic!("{what}: the other: {e}"));
            rows.push(("vm/other.img", &other));
        }
        outcomes.insert(outcome.is_ok());
        let wanted = with_folder(&rows);
        let disk = memory.fork();
        assert_invariants(&disk, &clock, &wanted, &what);
        // Again, and collected.
        let store = open(Arc::new(disk.clone()), &clock).unwrap();
        put(&store, "vm/again.img", &first).unwrap();
        collect_all(&store, true).unwrap();
        rows.push(("vm/again.img", &first));
        assert_invariants(&disk, &clock, &with_folder(&rows), &what);
        assert_no_leaks(&disk, &clock, &what);
        if !asleep.has_slept() {
            break;
        }
    }
    assert_eq!(outcomes.len(), 2, "it must be fenced at some call and not at another");
}

#[test]
fn a_collection_may_lose_its_lock_at_any_call() {
    let (zero, one) = (image(10), image(20));
    let half = [&zero[..SEGMENT], &image(25)[SEGMENT..]].concat();
    let (whole, clock) = prepared(&[("vm/0.img", &zero), ("vm/1.img", &one), ("vm/2.img", &half)]);
    forget(&open(Arc::new(whole.clone()), &clock).unwrap(), &[name("vm/0.img"), name("vm/1.img")]).unwrap();
    let mut shared_dead = false;
    for exact in [false, true] {
        for at in 0.. {
            let what = format!("gc (exact: {exact}) asleep at {at}");
            let memory = whole.fork();
            let told: Arc<Mutex<Option<u64>>> = Arc::default();
            let meanwhile = {
                let (memory, clock, told, zero, one) =
                    (memory.clone(), clock.clone(), told.clone(), zero.clone(), one.clone());
                move || {
                    // With the similarity index: it finds what is dead, and still there.
                    let derived = tempfile::tempdir().unwrap();
                    let folder = Some(derived.path().to_owned());
                    let backend = Arc::new(Asleep::awake(memory));
                    let store = Store::with_backend(backend, folder, clock, MemoryShares::default()).unwrap();
                    let again = put(&store, "vm/again.img", &zero).unwrap();
                    put(&store, "vm/more.img", &one).unwrap();
                    *told.lock().unwrap() = Some(again.tally.blocks_data - again.tally.blocks_new);
                }
            };
            let asleep = Arc::new(Asleep::new(memory.clone(), at, meanwhile));
            let store = open(asleep.clone(), &clock).unwrap();
            let outcome = collect_vm(&store, &vm(), GcOptions { exact, dry_run: false }, &mut |_| {});
            if let Err(e) = &outcome {
                assert_eq!(e.kind(), ErrorKind::Busy, "{what}: {e}");
            }
            let mut rows: Vec<(&str, &[u8])> = vec![("vm/2.img", &half)];
            if asleep.has_slept() {
                shared_dead |= told.lock().unwrap().unwrap() > 0;
                rows.extend([("vm/again.img", &zero[..]), ("vm/more.img", &one[..])]);
            }
            let wanted = with_folder(&rows);
            let disk = memory.fork();
            assert_invariants(&disk, &clock, &wanted, &what);
            collect_all(&open(Arc::new(disk.clone()), &clock).unwrap(), true).unwrap();
            assert_invariants(&disk, &clock, &wanted, &what);
            assert_no_leaks(&disk, &clock, &what);
            if !asleep.has_slept() {
                break;
            }
        }
    }
    assert!(shared_dead, "the other writer never used what was dead: the test is no test");
}

#[test]
fn readers_take_no_lock_and_wait_for_no_writer() {
    let base = image(1);
    let (memory, clock) = prepared(&[("vm/base.img", &base)]);
    let writing = open(Arc::new(memory.clone()), &clock).unwrap();
    let (handle, _) = writing.vm(&vm()).unwrap();
    let session = Session::begin(&writing, &handle).unwrap();
    let recorder = Arc::new(Recorder::new(Arc::new(memory.clone())));
    let reading = open(recorder.clone(), &clock).unwrap();
    assert!(get(&reading, "vm/base.img").unwrap() == base);
    assert_eq!(read_store(&reading).unwrap(), with_folder(&[("vm/base.img", &base)]));
    let counts = recorder.counts();
    assert_eq!((counts.try_lock, counts.create, counts.put_new, counts.delete), (0, 0, 0, 0));
    drop(session);
}

/// Renames, forgets and changes of two processes at a time, beside backups: each happens once.
fn race(backends: [Arc<dyn Backend>; 2]) {
    const FILES: usize = 6;
    const RENAMES: usize = 12;
    let stores = backends.map(|b| Arc::new(open(b, &clock()).unwrap()));
    for owner in 0..4 {
        for file in 0..FILES {
            put(&stores[0], &format!("vm/{owner}-{file}.0"), &noise((owner * FILES + file) as u64, 5000)).unwrap();
        }
    }
    let append = |store: &Store, op: &dyn Fn(&snapfs::catalog::state::VmState) -> Op| {
        store.vm(&vm()).unwrap().0.append(None, |state| Ok((vec![op(state)], ()))).unwrap();
    };
    std::thread::scope(|scope| {
        for owner in 0..4 {
            let store = stores[owner % 2].clone();
            scope.spawn(move || {
                for round in 0..RENAMES {
                    // The last file is forgotten, each other gets its next name: from one that it must have.
                    for file in 0..FILES - 1 {
                        let (old, new) = (format!("{owner}-{file}.{round}"), format!("{owner}-{file}.{}", round + 1));
                        append(&store, &|state| {
                            let file = state.find(None, &old).unwrap_or_else(|| panic!("{old} is not there")).id;
                            Op::Rename { file, disk: None, name: new.clone(), replaced: None }
                        });
                    }
                    let mode = Some(0o700 + round as u32 % 8);
                    append(&store, &|_| Op::Change {
                        target: Target::Vm {},
                        changes: Changes { mode, ..Changes::default() },
                    });
                    if round == owner {
                        forget(&store, &[name(&format!("vm/{owner}-{}.0", FILES - 1))]).unwrap();
                    }
                }
            });
        }
        let store = stores[0].clone();
        scope.spawn(move || {
            for number in 0..10 {
                put(&store, &format!("vm/backup-{number}.img"), &noise(100 + number, 9000)).unwrap();
            }
        });
    });
    let states = stores.clone().map(|store| store.vm(&vm()).unwrap().1);
    assert_eq!(states[0], states[1]);
    // And as a third one sees it that reads the log from its beginning, or its last checkpoint.
    let third = open(stores[0].backend().clone(), &clock()).unwrap();
    assert_eq!(third.vm(&vm()).unwrap().1, states[0]);
    let names: BTreeSet<String> = states[0].files.values().map(|f| f.name.clone()).collect();
    let mut wanted: BTreeSet<String> = (0..10).map(|n| format!("backup-{n}.img")).collect();
    for owner in 0..4 {
        wanted.extend((0..FILES - 1).map(|file| format!("{owner}-{file}.{RENAMES}")));
    }
    assert_eq!(names, wanted);
    // Create; begin and commit of each backup; the records of the threads.
    let records = 1 + 2 * (4 * FILES + 10) + 4 * (RENAMES * FILES + 1);
    let number = states[0].number.0 as usize;
    assert_eq!(number, records);
    for owner in 0..4 {
        for file in 0..FILES - 1 {
            let bytes = get(&third, &format!("vm/{owner}-{file}.{RENAMES}")).unwrap();
            assert!(bytes == noise((owner * FILES + file) as u64, 5000));
        }
    }
}

/// Appends `count` records that change nothing that counts.
fn fill_log(store: &Store, count: u64) {
    let (handle, _) = store.vm(&vm()).unwrap();
    for mode in 0..count {
        let changes = Changes { mode: Some(0o700 + mode as u32 % 8), ..Changes::default() };
        handle.append(None, |_| Ok((vec![Op::Change { target: Target::Vm {}, changes }], ()))).unwrap();
    }
}

#[test]
fn a_record_that_was_acknowledged_counts_however_long_its_writer_slept() {
    let (whole, clock) = prepared(&[("vm/base.img", &image(1))]);
    let writer = open(Arc::new(whole.clone()), &clock).unwrap();
    let (handle, _) = writer.vm(&vm()).unwrap();
    let holder = Session::begin(&writer, &handle).unwrap().begin_record();
    for session in [None, Some(holder)] {
        // With and without a log that has been cut before.
        for before in [0, 3 * LOG_CHECKPOINT_INTERVAL] {
            let mut outcomes = BTreeSet::new();
            for at in 0.. {
                let what = format!("{session:?} asleep at {at}, after {before} records");
                let memory = whole.fork();
                fill_log(&open(Arc::new(memory.clone()), &clock).unwrap(), before);
                let meanwhile = {
                    let (memory, clock) = (memory.clone(), clock.clone());
                    move || {
                        let store = open(Arc::new(Asleep::awake(memory)), &clock).unwrap();
                        fill_log(&store, 3 * LOG_CHECKPOINT_INTERVAL);
                        Session::begin(&store, &store.vm(&vm()).unwrap().0).unwrap();
                    }
                };
                let asleep = Arc::new(Asleep::new(memory.clone(), at, meanwhile));
                let store = open(asleep.clone(), &clock).unwrap();
                let attributes = store.new_folder();
                let told = store.vm(&vm()).and_then(|(handle, _)| {
                    let op = Op::MakeDisk { name: "slept".into(), attributes };
                    handle.append(session, |state| {
                        let is_there = state.disks.contains_key("slept");
                        Ok((if is_there { vec![] } else { vec![op.clone()] }, ()))
                    })
                });
                let (_, state) = open(Arc::new(memory.clone()), &clock).unwrap().vm(&vm()).unwrap();
                let is_there = state.disks.contains_key("slept");
                match &told {
                    Ok(()) => assert!(is_there, "{what}: acknowledged, and not in the log"),
                    // Fenced by the other, or it slept between its record and the look at the log.
                    Err(e) if e.kind() == ErrorKind::Busy => assert!(session.is_some() && !is_there, "{what}: {e}"),
                    Err(e) => assert_eq!(e.kind(), ErrorKind::Unavailable, "{what}: {e}"),
                }
                outcomes.insert(told.err().map(|e| e.to_string().contains("is not known")));
                if !asleep.has_slept() {
                    break;
                }
            }
            assert_eq!(outcomes.len(), 2 + usize::from(session.is_some()), "{outcomes:?}");
        }
    }
}

#[test]
fn records_without_a_lock_happen_once_each_in_memory() {
    let (memory, _) = prepared(&[]);
    race([Arc::new(memory.clone()), Arc::new(memory)]);
}

#[test]
fn records_without_a_lock_happen_once_each_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    Store::init(&root, &*clock()).unwrap();
    race([Arc::new(Local::open(&root).unwrap()), Arc::new(Local::open(&root).unwrap())]);
}

fn gc(store: &Store) -> GcReport {
    collect_vm(store, &vm(), GcOptions::default(), &mut |_| {}).unwrap()
}

/// An image that somebody has open outlives its snapshot, for a reader in the same process and in another.
fn outlives(backends: [Arc<dyn Backend>; 2]) {
    let stores = backends.map(|b| open(b, &clock()).unwrap());
    for (reader, collector) in [(0, 1), (0, 0)] {
        let snapshot = format!("vm/{reader}{collector}.img");
        let bytes = image(60 + collector as u64);
        put(&stores[0], &snapshot, &bytes).unwrap();
        put(&stores[0], "vm/next.img", &image(70)).unwrap();
        let (_, _, open) = stores[reader].open_reference(&SnapshotName::parse_reference(&snapshot).unwrap()).unwrap();
        forget(&stores[collector], &[name(&snapshot), name("vm/next.img")]).unwrap();
        let report = gc(&stores[collector]);
        assert_eq!((report.roots_pinned, report.roots_dropped), (1, 1));
        assert!(read_image(&open).unwrap() == bytes);
        assert_eq!(get(&stores[reader], &snapshot).unwrap_err().kind(), ErrorKind::NotFound);
        drop(open);
        let report = gc(&stores[collector]);
        assert_eq!(report.roots_dropped, 1);
        assert!(report.packs_dropped >= 1, "{report:?}");
        for folder in ["packs", "snapshots"] {
            assert_eq!(stores[0].backend().list(&Key::new(format!("vms/vm/{folder}"))).unwrap(), []);
        }
    }
}

#[test]
fn an_open_image_outlives_its_snapshot() {
    let (memory, _) = prepared(&[]);
    outlives([Arc::new(memory.clone()), Arc::new(memory)]);
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    Store::init(&root, &*clock()).unwrap();
    outlives([Arc::new(Local::open(&root).unwrap()), Arc::new(Local::open(&root).unwrap())]);
}

#[test]
fn a_reader_goes_on_while_its_packs_are_compacted() {
    let zero = image(1);
    // Shares a third of the first, which is forgotten.
    let mut kept = vec![0; zero.len()];
    kept[4096..][..20 * 4096].copy_from_slice(&zero[4096..][..20 * 4096]);
    kept[SEGMENT + 8192..][..4096].copy_from_slice(&noise(77, 4096));
    let (memory, clock) = prepared(&[("vm/0.img", &zero), ("vm/kept.img", &kept)]);
    let reading = open(Arc::new(memory.clone()), &clock).unwrap();
    let (_, _, image) = reading.open_reference(&SnapshotName::parse_reference("vm/kept.img").unwrap()).unwrap();
    let mut block = [0; 4096];
    // Index and group page are known to it, the frames behind are not.
    image.read_at(4096, &mut block).unwrap();
    let before = keys(&memory, "vms/vm/packs");
    let collecting = open(Arc::new(memory.clone()), &clock).unwrap();
    forget(&collecting, &[name("vm/0.img")]).unwrap();
    let report = gc(&collecting);
    assert!(report.packs_compacted > 0, "{report:?}");
    assert!(before.iter().any(|key| !keys(&memory, "vms/vm/packs").contains(key)), "{before:?}");
    assert!(read_image(&image).unwrap() == kept);
    // And once more, under a reader that has all of it cached, and one that has nothing.
    assert!(read_image(&image).unwrap() == kept);
    assert!(get(&open(Arc::new(memory), &clock).unwrap(), "vm/kept.img").unwrap() == kept);
}
