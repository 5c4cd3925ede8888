//! `gc_grace`: what a reader on another host has open whose locks nobody sees (I6). The medium keeps pins to itself.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use snapfs::clock::{Clock, ManualClock, Timestamp};
use snapfs::collect::forget::forget;
use snapfs::collect::gc::{GcOptions, GcReport, collect_vm};
use snapfs::error::ErrorKind;
use snapfs::fs::MountedStore;
use snapfs::fs::types::{Caller, Handle, Options, ROOT};
use snapfs::name::VmName;
use snapfs::store::{MemoryShares, Store};

use crate::invariants::keys;
use crate::world::{World, get, name, noise, put};

const HOUR: Duration = Duration::from_secs(3600);

/// Three segments and a bit.
const BYTES: usize = (6 << 20) + 5000;

fn set_grace(store: &Store, seconds: u64) {
    let change = |settings: &mut snapfs::store::config::Settings| {
        settings.gc_grace_seconds = seconds;
        Ok(())
    };
    store.change_settings(change).unwrap();
}

fn gc(store: &Store, exact: bool) -> GcReport {
    let options = GcOptions { exact, ..GcOptions::default() };
    collect_vm(store, &VmName::new("web01").unwrap(), options, &mut |_| {}).unwrap()
}

/// A mount on another host.
fn elsewhere(world: &World) -> Arc<MountedStore> {
    MountedStore::new(Arc::new(world.store_over(Arc::new(world.memory.with_blind_pins())).unwrap()), Options::default())
}

fn open(fs: &MountedStore, name: &str) -> Handle {
    let parent = fs.lookup(ROOT, "web01").unwrap().ino;
    fs.open(fs.lookup(parent, name).unwrap().ino, false, false).unwrap().handle
}

/// Reads all in pieces of 256 KiB: how many were right, and how many are said to be gone. Nothing else may come.
fn read(fs: &MountedStore, handle: Handle, wanted: &[u8]) -> (usize, usize) {
    let (mut right, mut gone) = (0, 0);
    for (at, piece) in wanted.chunks(256 << 10).enumerate() {
        let mut out = vec![0; piece.len()];
        match fs.read(handle, (at * (256 << 10)) as u64, &mut out) {
            Ok(count) => {
                assert!(count == piece.len() && out == piece, "piece {at} is another one");
                right += 1;
            }
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::Stale, "piece {at}: {e}");
                assert!(e.to_string().contains("web01/a.img: was forgotten and collected"), "{e}");
                gone += 1;
            }
        }
    }
    (right, gone)
}

#[test]
fn a_reader_whose_lock_nobody_sees_has_its_grace_and_then_no_wrong_byte() {
    for (exact, grace) in [(false, HOUR), (true, HOUR), (false, Duration::ZERO), (true, Duration::ZERO)] {
        let world = World::new();
        let store = world.store();
        set_grace(&store, grace.as_secs());
        let wanted = noise(7, BYTES);
        put(&store, "web01/a.img", &wanted).unwrap();
        put(&store, "web01/b.img", &noise(8, BYTES)).unwrap();
        let reader = elsewhere(&world);
        let handle = open(&reader, "a.img");
        forget(&store, &[name("web01/a.img")]).unwrap();
        let pieces = BYTES.div_ceil(256 << 10);
        if !grace.is_zero() {
            for minutes in [0, 59] {
                world.clock.advance(Duration::from_secs(60 * minutes));
                let report = gc(&store, exact);
                assert_eq!((report.roots_young, report.roots_dropped, report.idle), (1, 0, true), "{report:?}");
                let left = report.young_for_seconds;
                assert!((3540 - 60 * minutes..=3600 - 60 * minutes).contains(&left), "after {minutes} min: {left}");
            }
            assert_eq!(read(&reader, handle, &wanted), (pieces, 0));
            world.clock.advance(Duration::from_secs(60));
        }
        let report = gc(&store, exact);
        assert_eq!((report.roots_young, report.young_for_seconds, report.roots_dropped), (0, 0, 1), "{report:?}");
        // What the reader has in memory may come yet; who has read nothing so far gets nothing.
        let (right, gone) = read(&reader, handle, &wanted);
        assert_eq!(right + gone, pieces);
        assert!(gone == pieces || !grace.is_zero(), "{right} right");
        assert!(get(&store, "web01/b.img").unwrap() == noise(8, BYTES));
    }
}

#[test]
fn damage_to_what_was_not_forgotten_is_damage() {
    let world = World::new();
    let store = world.store();
    put(&store, "web01/a.img", &noise(7, BYTES)).unwrap();
    let reader = elsewhere(&world);
    let handle = open(&reader, "a.img");
    for pack in keys(&world.memory, "vms/web01/packs") {
        world.memory.remove(&pack);
    }
    let damage = |what: &str| {
        let e = reader.read(handle, 0, &mut [0; 4096]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
    };
    damage("in the log");
    // Forgotten, and not collected.
    forget(&store, &[name("web01/a.img")]).unwrap();
    damage("forgotten");
}

#[test]
fn a_clock_that_is_ahead_keeps_nothing_for_ever() {
    let world = World::new();
    let store = world.store();
    set_grace(&store, 3600);
    put(&store, "web01/a.img", &noise(7, BYTES)).unwrap();
    put(&store, "web01/b.img", b"x").unwrap();
    let ahead = Arc::new(ManualClock::at(Timestamp(16_725_225_600_000_000_000)));
    let other = Store::with_backend(Arc::new(world.memory.clone()), None, ahead, MemoryShares::default()).unwrap();
    forget(&other, &[name("web01/a.img")]).unwrap();
    let report = gc(&store, false);
    assert_eq!((report.roots_young, report.young_for_seconds), (1, 3600));
    world.memory.advance(HOUR / 2);
    assert_eq!(gc(&store, false).young_for_seconds, 1800);
    world.memory.advance(HOUR / 2);
    let report = gc(&store, false);
    assert_eq!(report.roots_dropped, 1, "{report:?}");
}

#[test]
fn earlier_states_of_a_draft_have_their_grace_too() {
    let world = World::new();
    let store = world.store();
    set_grace(&store, 3600);
    let fs = MountedStore::new(Arc::new(world.store()), Options::default());
    fs.make_folder(ROOT, "web01", 0, Caller { uid: 0, gid: 0 }).unwrap();
    let parent = fs.lookup(ROOT, "web01").unwrap().ino;
    let (_, draft) = fs.create(parent, "a.part", Caller { uid: 0, gid: 0 }).unwrap();
    for turn in 0..3 {
        fs.write(draft.handle, 0, &noise(turn, 100_000)).unwrap();
        fs.sync(draft.handle).unwrap();
    }
    fs.release(draft.handle);
    let young = gc(&store, false).roots_young;
    assert!(young >= 2, "{young}");
    world.clock.advance(HOUR);
    let report = gc(&store, false);
    assert_eq!((report.roots_young, report.roots_dropped), (0, young), "{report:?}");
}

#[test]
fn a_mount_that_collects_comes_back_when_the_grace_is_over() {
    let world = World::new();
    set_grace(&world.store(), 3600);
    put(&world.store(), "web01/a.img", &noise(7, 100_000)).unwrap();
    let options = Options { collect: true, ..Options::default() };
    let fs = MountedStore::new(Arc::new(world.store()), options);
    let parent = fs.lookup(ROOT, "web01").unwrap().ino;
    fs.unlink(parent, "a.img").unwrap();
    let mut rounds = 0;
    let began = world.clock.now().seconds();
    while !keys(&world.memory, "vms/web01/packs").is_empty() {
        world.clock.advance(Duration::from_secs(10));
        fs.collect_due();
        rounds += 1;
        assert!(rounds < 500, "it never comes back");
    }
    let took = world.clock.now().seconds() - began;
    assert!((3600..3720).contains(&took), "{took}");
}

/// A clock whose second look at the time is the moment at which something else happens.
struct Interrupted {
    clock: Arc<ManualClock>,
    looks: AtomicUsize,
    what: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Clock for Interrupted {
    fn now(&self) -> Timestamp {
        if self.looks.fetch_add(1, Relaxed) == 1
            && let Some(what) = self.what.lock().unwrap().take()
        {
            what();
        }
        self.clock.now()
    }

    fn elapsed(&self) -> Duration {
        self.clock.elapsed()
    }

    fn sleep(&self, length: Duration) {
        self.clock.sleep(length);
    }
}

/// A store on a host whose clock stands in the year 2500.
fn ahead(world: &World) -> Store {
    let clock = Arc::new(ManualClock::at(Timestamp(16_725_225_600_000_000_000)));
    Store::with_backend(Arc::new(world.memory.clone()), None, clock, MemoryShares::default()).unwrap()
}

#[test]
fn what_is_forgotten_while_a_collection_is_on_its_way_has_its_grace() {
    let world = World::new();
    let store = world.store();
    set_grace(&store, 3600);
    for snapshot in ["web01/a.img", "web01/b.img", "web01/c.img"] {
        put(&store, snapshot, snapshot.as_bytes()).unwrap();
    }
    forget(&ahead(&world), &[name("web01/a.img")]).unwrap();
    world.clock.advance(2 * HOUR);
    world.memory.advance(2 * HOUR);
    // The first look is for the grace, the second for the begin record, after the first plan.
    let clock = world.clock.clone();
    let what = move || {
        clock.advance(Duration::from_secs(1));
        forget(&store, &[name("web01/b.img")]).unwrap();
    };
    let clock =
        Interrupted { clock: world.clock.clone(), looks: AtomicUsize::new(0), what: Mutex::new(Some(Box::new(what))) };
    let memory = Arc::new(world.memory.clone());
    let collector = Store::with_backend(memory, None, Arc::new(clock), MemoryShares::default()).unwrap();
    let report = gc(&collector, false);
    assert_eq!((report.roots_dropped, report.roots_young), (1, 1), "{report:?}");
}

#[test]
fn a_clock_that_was_ahead_keeps_nothing_for_ever_where_gc_follows_each_backup() {
    let world = World::new();
    let store = world.store();
    set_grace(&store, 3600);
    put(&store, "web01/a.img", &noise(7, BYTES)).unwrap();
    put(&store, "web01/b.img", b"x").unwrap();
    forget(&ahead(&world), &[name("web01/a.img")]).unwrap();
    let mut dropped = 0;
    for day in 0..10 {
        world.clock.advance(24 * HOUR);
        world.memory.advance(24 * HOUR);
        put(&store, &format!("web01/{day}.img"), &[day; 5000]).unwrap();
        dropped += gc(&store, false).roots_dropped;
    }
    assert_eq!(dropped, 1);
    // The record that forgot it is gone by now: what counts is the oldest checkpoint.
    forget(&ahead(&world), &[name("web01/b.img")]).unwrap();
    for turn in 0..150 {
        put(&store, &format!("web01/turn{turn}.img"), b"turn").unwrap();
    }
    assert_eq!(gc(&store, false).roots_young, 1);
    world.memory.advance(HOUR);
    put(&store, "web01/last.img", b"x").unwrap();
    assert_eq!(gc(&store, false).roots_young, 0);
}

#[test]
fn a_grace_without_end_is_no_overflow() {
    let world = World::new();
    set_grace(&world.store(), u64::MAX);
    put(&world.store(), "web01/a.img", &noise(7, 100_000)).unwrap();
    let fs = MountedStore::new(Arc::new(world.store()), Options { collect: true, ..Options::default() });
    let parent = fs.lookup(ROOT, "web01").unwrap().ino;
    fs.unlink(parent, "a.img").unwrap();
    world.clock.advance(Duration::from_secs(10));
    fs.collect_due();
    assert!(!keys(&world.memory, "vms/web01/packs").is_empty());
}
