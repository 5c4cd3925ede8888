//! Tier 1: every backend and every wrapper keeps the contract of `snapfs::backend`.
//!
//! The suite is functions over a [`Place`]: two handles to the same objects, as two processes would have. A macro at
//! the end runs each of them on each implementation. After it come tests of what only one implementation promises.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use snapfs::backend::local::Local;
use snapfs::backend::placement::Copies;
use snapfs::backend::testing::{Fault, Faulty, Memory, Operation, Recorder, Scope};
use snapfs::backend::{Backend, Key, Listed};
use snapfs::error::{ErrorKind, Result};
use snapfs::limits::RESERVE_BYTES;
use tempfile::TempDir;

struct Place {
    first: Arc<dyn Backend>,
    second: Arc<dyn Backend>,
    _folder: Option<TempDir>,
}

fn local() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let open = || Arc::new(Local::open(folder.path()).unwrap());
    Place { first: open(), second: open(), _folder: Some(folder) }
}

fn local_without_tmpfile() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let open = || Arc::new(Local::open_without_tmpfile(folder.path()).unwrap());
    Place { first: open(), second: open(), _folder: Some(folder) }
}

fn memory() -> Place {
    let memory = Memory::new();
    Place { first: Arc::new(memory.clone()), second: Arc::new(memory), _folder: None }
}

fn recorder() -> Place {
    let Place { first, second, _folder } = memory();
    Place { first: Arc::new(Recorder::new(first)), second: Arc::new(Recorder::new(second)), _folder }
}

fn faulty_that_never_fires() -> Place {
    let Place { first, second, _folder } = memory();
    let wrap = |inner| Arc::new(Faulty::new(inner, Fault::CutBefore, usize::MAX));
    Place { first: wrap(first), second: wrap(second), _folder }
}

/// Three copies of everything, as two processes see them.
fn replicated() -> Place {
    let memories: Vec<Memory> = (0..4).map(|_| Memory::new()).collect();
    let open = || {
        let backends: Vec<Arc<dyn Backend>> =
            memories.iter().map(|m| Arc::new(m.clone()) as Arc<dyn Backend>).collect();
        Arc::new(crate::targets::replicated(backends, Copies { vm: 3, common: 3, quorum: 0 }))
    };
    Place { first: open(), second: open(), _folder: None }
}

fn key(text: &str) -> Key {
    Key::new(text)
}

/// Bytes that differ from place to place.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8 ^ seed).collect()
}

fn names(rows: &[Listed]) -> Vec<&str> {
    rows.iter().map(|row| row.name.as_str()).collect()
}

#[track_caller]
fn assert_fails<T>(outcome: Result<T>, kind: ErrorKind) {
    match outcome {
        Ok(_) => panic!("succeeded, wanted {kind:?}"),
        Err(error) => assert_eq!(error.kind(), kind, "{error}"),
    }
}

// The suite.

fn what_is_put_is_read(place: &Place) {
    let (one, two) = (&*place.first, &*place.second);
    let bytes = pattern(1, 100_000);
    one.put_new(&key("vms/web01/log/1"), &bytes).unwrap();
    for backend in [one, two] {
        assert_eq!(backend.len(&key("vms/web01/log/1")).unwrap(), 100_000);
        assert_eq!(backend.read_all(&key("vms/web01/log/1"), 100_000).unwrap(), bytes);
        for (offset, len) in [(0, 0), (0, 1), (0, 100_000), (4095, 2), (99_999, 1), (100_000, 0)] {
            let mut out = vec![0; len];
            backend.read(&key("vms/web01/log/1"), offset as u64, &mut out).unwrap();
            assert_eq!(out, &bytes[offset..offset + len], "{offset} {len}");
            // And again, as it may be served from another place.
            out.fill(0);
            backend.will_need(&key("vms/web01/log/1"), offset as u64, len as u64);
            backend.read(&key("vms/web01/log/1"), offset as u64, &mut out).unwrap();
            assert_eq!(out, &bytes[offset..offset + len], "{offset} {len}");
        }
    }
}

fn an_empty_object_is_an_object(place: &Place) {
    let one = &*place.first;
    one.put_new(&key("a/empty"), b"").unwrap();
    assert_eq!(one.len(&key("a/empty")).unwrap(), 0);
    assert_eq!(one.read_all(&key("a/empty"), 0).unwrap(), b"");
    assert_eq!(one.list(&key("a")).unwrap(), [Listed { name: "empty".into(), bytes: 0, is_folder: false }]);
    assert_fails(one.put_new(&key("a/empty"), b"more"), ErrorKind::Exists);
}

fn a_taken_key_is_not_replaced(place: &Place) {
    let (one, two) = (&*place.first, &*place.second);
    one.put_new(&key("a/b"), b"first").unwrap();
    assert_fails(one.put_new(&key("a/b"), b"other"), ErrorKind::Exists);
    assert_fails(two.put_new(&key("a/b"), b"first"), ErrorKind::Exists);
    // Taken while it is being written.
    let mut slow = one.create(&key("a/c")).unwrap();
    slow.append(b"slow").unwrap();
    two.put_new(&key("a/c"), b"quick").unwrap();
    assert_fails(slow.finish(), ErrorKind::Exists);
    assert_eq!(one.read_all(&key("a/b"), 10).unwrap(), b"first");
    assert_eq!(one.read_all(&key("a/c"), 10).unwrap(), b"quick");
    assert_eq!(names(&one.list(&key("a")).unwrap()), ["b", "c"]);
}

fn a_copy_is_replaced_only_when_that_is_asked_for(place: &Place) {
    let (one, two) = (&*place.first, &*place.second);
    one.put_new(&key("a/b"), b"first").unwrap();
    two.read(&key("a/b"), 0, &mut [0]).unwrap();
    if one.replicated().is_some() {
        // It has copies, and knows which of them to replace.
        assert_fails(one.create_over(&key("a/b")), ErrorKind::Unsupported);
        return;
    }
    let mut upload = one.create_over(&key("a/b")).unwrap();
    upload.append(b"second").unwrap();
    assert_eq!(two.read_all(&key("a/b"), 10).unwrap(), b"first");
    upload.finish().unwrap();
    one.tidy();
    two.tidy();
    for backend in [one, two] {
        let mut out = [0; 6];
        backend.read(&key("a/b"), 0, &mut out).unwrap();
        assert_eq!(&out, b"second");
    }
    let mut upload = one.create_over(&key("a/new")).unwrap();
    upload.append(b"x").unwrap();
    drop(upload);
    assert_fails(one.len(&key("a/new")), ErrorKind::NotFound);
    let refuse = &mut |bytes: &[u8]| match bytes {
        b"second" => Ok(()),
        _ => Err(snapfs::error::corrupt("other")),
    };
    one.read_all_checked(&key("a/b"), 10, refuse).unwrap();
    assert_fails(one.read_checked(&key("a/b"), 1, &mut [0; 2], refuse), ErrorKind::Corrupt);
}

fn of_racing_writers_one_wins(place: &Place) {
    for round in 0..20 {
        let name = key(&format!("race/{round}/object"));
        let barrier = Barrier::new(8);
        let winners: Vec<u8> = std::thread::scope(|scope| {
            let spawn = |seed: u8| {
                let backend = if seed.is_multiple_of(2) { &place.first } else { &place.second };
                let (name, barrier) = (&name, &barrier);
                scope.spawn(move || {
                    let bytes = pattern(seed, 20_000);
                    barrier.wait();
                    match backend.put_new(name, &bytes) {
                        Ok(()) => Some(seed),
                        Err(error) => {
                            assert_eq!(error.kind(), ErrorKind::Exists, "{error}");
                            // Who loses can read what won.
                            assert_eq!(backend.len(name).unwrap(), 20_000);
                            None
                        }
                    }
                })
            };
            let threads: Vec<_> = (0..8).map(spawn).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(winners.len(), 1, "round {round}");
        assert_eq!(place.first.read_all(&name, 20_000).unwrap(), pattern(winners[0], 20_000));
    }
}

fn an_upload_is_invisible_until_it_is_finished(place: &Place) {
    let (one, two) = (&*place.first, &*place.second);
    let mut upload = one.create(&key("a/object")).unwrap();
    upload.append(b"half ").unwrap();
    for backend in [one, two] {
        assert_fails(backend.len(&key("a/object")), ErrorKind::NotFound);
        assert_fails(backend.read(&key("a/object"), 0, &mut [0]), ErrorKind::NotFound);
        assert_fails(backend.read_all(&key("a/object"), 100), ErrorKind::NotFound);
        assert_fails(backend.pin(&key("a/object")), ErrorKind::NotFound);
        assert_eq!(backend.list(&key("a")).unwrap(), []);
    }
    upload.append(b"").unwrap();
    upload.append(b"whole").unwrap();
    upload.finish().unwrap();
    for backend in [one, two] {
        assert_eq!(backend.read_all(&key("a/object"), 100).unwrap(), b"half whole");
        assert_eq!(names(&backend.list(&key("a")).unwrap()), ["object"]);
    }
}

fn a_dropped_upload_leaves_nothing(place: &Place) {
    let one = &*place.first;
    let mut upload = one.create(&key("a/object")).unwrap();
    upload.append(&pattern(0, 50_000)).unwrap();
    drop(upload);
    assert_fails(one.len(&key("a/object")), ErrorKind::NotFound);
    assert_eq!(one.list(&key("a")).unwrap(), []);
    assert_eq!(one.remove_litter().unwrap(), 0);
    one.put_new(&key("a/object"), b"again").unwrap();
    assert_eq!(one.read_all(&key("a/object"), 5).unwrap(), b"again");
}

fn an_upload_reads_back(place: &Place) {
    let one = &*place.first;
    // Over the size after which writeback begins early.
    let piece = pattern(3, 3 << 20);
    let mut upload = one.create(&key("big")).unwrap();
    for _ in 0..4 {
        upload.append(&piece).unwrap();
    }
    let whole = piece.repeat(4);
    let end = whole.len() as u64;
    for (offset, len) in [(0, 10), ((3 << 20) - 5, 10), (whole.len() - 7, 7), (0, whole.len()), (whole.len(), 0)] {
        let mut out = vec![0; len];
        upload.read(offset as u64, &mut out).unwrap();
        assert!(out == whole[offset..offset + len], "{offset} {len}");
    }
    assert_fails(upload.read(end - 1, &mut [0; 2]), ErrorKind::Invalid);
    assert_fails(upload.read(end + 1, &mut []), ErrorKind::Invalid);
    assert_fails(upload.read(u64::MAX, &mut [0; 2]), ErrorKind::Invalid);
    upload.finish().unwrap();
    assert!(one.read_all(&key("big"), end).unwrap() == whole);
}

fn short_data_is_corrupt(place: &Place) {
    let one = &*place.first;
    one.put_new(&key("a/b"), b"12345").unwrap();
    for (offset, len) in [(0, 6), (4, 2), (5, 1), (6, 1), (6, 0), (u64::MAX, 1), (u64::MAX, 0), (1 << 62, 1 << 10)] {
        let mut out = vec![0; len];
        let error = one.read(&key("a/b"), offset, &mut out).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{offset} {len}");
        let end = offset.saturating_add(len as u64);
        assert_eq!(error.to_string(), format!("a/b: ends at 5, wanted bytes {offset}..{end}"));
    }
    assert_fails(one.read_all(&key("a/b"), 4), ErrorKind::Corrupt);
    assert_eq!(one.read_all(&key("a/b"), 5).unwrap(), b"12345");
}

fn what_is_missing_is_not_found(place: &Place) {
    let one = &*place.first;
    one.put_new(&key("folder/object"), b"x").unwrap();
    // No folder, no object in it, a folder, and a key below an object.
    for missing in ["nowhere/a", "folder/other", "folder", "folder/object/below"] {
        let missing = key(missing);
        assert_fails(one.len(&missing), ErrorKind::NotFound);
        assert_fails(one.read(&missing, 0, &mut [0]), ErrorKind::NotFound);
        assert_fails(one.read(&missing, 0, &mut []), ErrorKind::NotFound);
        assert_fails(one.read_all(&missing, 100), ErrorKind::NotFound);
        assert_fails(one.pin(&missing), ErrorKind::NotFound);
        assert!(!one.is_pinned(&missing).unwrap());
        one.will_need(&missing, 0, 10);
    }
    for missing in ["nowhere/a", "folder/other", "folder/object/below"] {
        one.delete(&key(missing)).unwrap();
    }
    assert_eq!(one.read_all(&key("folder/object"), 1).unwrap(), b"x");
    assert_eq!(one.list(&key("nowhere")).unwrap(), []);
    assert_eq!(one.list(&key("folder/object")).unwrap(), []);
}

fn ages_are_told_in_the_order_of_the_keys(place: &Place) {
    let (one, two) = (&*place.first, &*place.second);
    one.put_new(&key("a/b"), b"x").unwrap();
    two.put_new(&key("a/c/d"), b"y").unwrap();
    for backend in [one, two] {
        assert_eq!(backend.ages(&[]).unwrap(), []);
        let ages = backend.ages(&[key("a/b"), key("a/x"), key("a/b/x"), key("a/c/d")]).unwrap();
        assert_eq!(ages.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, false, true]);
        // Just put. Only a medium whose clock is off by hours from itself would tell otherwise.
        assert!(ages.iter().flatten().all(|age| age.as_secs() < 3600), "{ages:?}");
    }
    // Asking leaves nothing behind.
    assert_eq!(names(&one.list(&key("")).unwrap()), ["a"]);
}

fn a_listing_has_objects_and_folders_in_order(place: &Place) {
    let (one, two) = (&*place.first, &*place.second);
    for text in ["a/b2", "a/b10", "a/B", "a/sub/x", "a/sub/y", "a/sub.z", "a/sub/deep/er/z", "ab", "a!", "top"] {
        one.put_new(&key(text), text.as_bytes()).unwrap();
    }
    one.keep_reserve();
    let file = |name: &str, bytes| Listed { name: name.into(), bytes, is_folder: false };
    let folder = |name: &str| Listed { name: name.into(), bytes: 0, is_folder: true };
    for backend in [one, two] {
        let rows = backend.list(&key("a")).unwrap();
        assert_eq!(rows, [file("B", 3), file("b10", 5), file("b2", 4), folder("sub"), file("sub.z", 7)]);
        assert_eq!(backend.list(&key("a/sub")).unwrap(), [folder("deep"), file("x", 7), file("y", 7)]);
        let rows = backend.list(&key("")).unwrap();
        assert_eq!(rows, [folder("a"), file("a!", 2), file("ab", 2), file("top", 3)]);
    }
}

fn names_are_kept_as_they_are(place: &Place) {
    let one = &*place.first;
    let longest = "é".repeat(127) + "x";
    assert_eq!(longest.len(), 255);
    for name in ["with space", "日本 語", "-rf *", "new\nline", "reserve", "tmp", &longest] {
        let name_key = key(&format!("vms/{name}/{name}"));
        one.put_new(&name_key, name.as_bytes()).unwrap();
        assert_eq!(one.read_all(&name_key, 255).unwrap(), name.as_bytes());
        assert_eq!(names(&one.list(&key(&format!("vms/{name}"))).unwrap()), [name]);
        assert!(names(&one.list(&key("vms")).unwrap()).contains(&name));
        let _pin = one.pin(&name_key).unwrap();
        assert!(one.is_pinned(&name_key).unwrap());
    }
    assert_eq!(one.list(&key("vms")).unwrap().len(), 7);
}

fn a_deleted_object_is_gone(place: &Place) {
    let (one, two) = (&*place.first, &*place.second);
    for text in ["a/b", "a/c"] {
        one.put_new(&key(text), text.as_bytes()).unwrap();
        one.read(&key(text), 0, &mut [0]).unwrap();
    }
    one.delete(&key("a/b")).unwrap();
    one.delete(&key("a/b")).unwrap();
    assert_fails(one.read(&key("a/b"), 0, &mut [0]), ErrorKind::NotFound);
    for backend in [one, two] {
        assert_fails(backend.len(&key("a/b")), ErrorKind::NotFound);
        assert_fails(backend.read_all(&key("a/b"), 10), ErrorKind::NotFound);
        assert_fails(backend.pin(&key("a/b")), ErrorKind::NotFound);
        assert!(!backend.is_pinned(&key("a/b")).unwrap());
        assert_eq!(names(&backend.list(&key("a")).unwrap()), ["c"]);
    }
    assert_eq!(two.read_all(&key("a/c"), 10).unwrap(), b"a/c");
}

fn a_pin_is_seen_by_all_until_its_last_holder_drops_it(place: &Place) {
    let (one, two) = (&*place.first, &*place.second);
    one.put_new(&key("a/b"), b"x").unwrap();
    one.put_new(&key("a/c"), b"x").unwrap();
    let mut out = [0];
    one.read(&key("a/b"), 0, &mut out).unwrap();
    let pinned = |expected: bool| {
        assert_eq!(one.is_pinned(&key("a/b")).unwrap(), expected);
        assert_eq!(two.is_pinned(&key("a/b")).unwrap(), expected);
        assert!(!one.is_pinned(&key("a/c")).unwrap());
    };
    pinned(false);
    let first = one.pin(&key("a/b")).unwrap();
    pinned(true);
    let second = two.pin(&key("a/b")).unwrap();
    let third = one.pin(&key("a/b")).unwrap();
    drop(first);
    pinned(true);
    drop(second);
    pinned(true);
    drop(third);
    pinned(false);
    // A pin holds collection off by being asked for; a deletion all the same works, and ends it.
    let pin = one.pin(&key("a/b")).unwrap();
    two.delete(&key("a/b")).unwrap();
    pinned(false);
    drop(pin);
    pinned(false);
}

fn pins_are_taken_while_others_ask_for_them(place: &Place) {
    place.first.put_new(&key("a"), b"x").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..500 {
                place.second.is_pinned(&key("a")).unwrap();
            }
        });
        for _ in 0..500 {
            let pin = place.first.pin(&key("a")).unwrap();
            assert!(place.first.is_pinned(&key("a")).unwrap());
            drop(pin);
        }
    });
}

fn a_lock_has_one_holder(place: &Place) {
    let (one, two) = (&*place.first, &*place.second);
    let lock = one.try_lock(&key("vms/web01/lock")).unwrap().unwrap();
    for backend in [one, two] {
        assert!(backend.is_pinned(&key("vms/web01/lock")).unwrap());
        assert!(!backend.is_pinned(&key("vms/web02/lock")).unwrap());
        assert!(backend.try_lock(&key("vms/web01/lock")).unwrap().is_none());
        assert!(backend.try_lock(&key("vms/web02/lock")).unwrap().is_some());
    }
    drop(lock);
    let lock = two.try_lock(&key("vms/web01/lock")).unwrap().unwrap();
    assert!(one.try_lock(&key("vms/web01/lock")).unwrap().is_none());
    drop(lock);
    assert!(one.try_lock(&key("vms/web01/lock")).unwrap().is_some());
}

fn of_racing_lockers_one_is_inside(place: &Place) {
    let inside = std::sync::atomic::AtomicU32::new(0);
    let taken = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let backend = if thread % 2 == 0 { &place.first } else { &place.second };
            let (inside, taken) = (&inside, &taken);
            scope.spawn(move || {
                for _ in 0..200 {
                    if let Some(lock) = backend.try_lock(&key("locks/one")).unwrap() {
                        assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        taken.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        std::thread::yield_now();
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(lock);
                    }
                }
            });
        }
    });
    assert!(taken.into_inner() > 0);
}

fn the_reserve_is_given_back_once(place: &Place) {
    let (one, two) = (&*place.first, &*place.second);
    assert!(!one.release_reserve());
    one.keep_reserve();
    one.keep_reserve();
    two.keep_reserve();
    assert!(two.release_reserve());
    assert!(!one.release_reserve());
    one.keep_reserve();
    assert!(one.release_reserve());
    assert_eq!(one.remove_litter().unwrap(), 0);
    assert_eq!(one.list(&key("")).unwrap().iter().filter(|row| !row.is_folder).count(), 0);
}

macro_rules! suite {
    ($($place:ident),*; $checks:tt) => { $(suite!(@one $place $checks);)* };
    (@one $place:ident [$($check:ident),* $(,)?]) => {
        mod $place {
            $(#[test]
            fn $check() {
                super::$check(&super::$place());
            })*
        }
    };
}

suite! {
    local, local_without_tmpfile, memory, recorder, faulty_that_never_fires, replicated;
    [
        what_is_put_is_read,
        an_empty_object_is_an_object,
        a_taken_key_is_not_replaced,
        a_copy_is_replaced_only_when_that_is_asked_for,
        of_racing_writers_one_wins,
        an_upload_is_invisible_until_it_is_finished,
        a_dropped_upload_leaves_nothing,
        an_upload_reads_back,
        short_data_is_corrupt,
        what_is_missing_is_not_found,
        ages_are_told_in_the_order_of_the_keys,
        a_listing_has_objects_and_folders_in_order,
        names_are_kept_as_they_are,
        a_deleted_object_is_gone,
        a_pin_is_seen_by_all_until_its_last_holder_drops_it,
        pins_are_taken_while_others_ask_for_them,
        a_lock_has_one_holder,
        of_racing_lockers_one_is_inside,
        the_reserve_is_given_back_once,
    ]
}

// Only Local.

const BOTH_WAYS: [fn(&Path) -> Result<Local>; 2] = [|root| Local::open(root), |root| Local::open_without_tmpfile(root)];

/// All files and folders below `root`, with their permission bits.
fn tree(root: &Path) -> BTreeMap<String, (bool, u32)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            let path = entry.path();
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            found.insert(name, (meta.is_dir(), meta.permissions().mode() & 0o7777));
            if meta.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

fn files(root: &Path) -> Vec<String> {
    tree(root).into_iter().filter(|(_, (is_folder, _))| !is_folder).map(|(name, _)| name).collect()
}

#[test]
fn local_takes_ages_from_the_medium() {
    for open in BOTH_WAYS {
        let folder = tempfile::tempdir().unwrap();
        let local = open(folder.path()).unwrap();
        for (name, age) in [("old", 2 * 86400), ("new", 0)] {
            local.put_new(&key(name), b"x").unwrap();
            let file = fs::File::options().write(true).open(folder.path().join(name)).unwrap();
            let at = file.metadata().unwrap().modified().unwrap();
            file.set_modified(at - Duration::from_secs(age)).unwrap();
        }
        // One from the future is new.
        local.put_new(&key("future"), b"x").unwrap();
        let file = fs::File::options().write(true).open(folder.path().join("future")).unwrap();
        file.set_modified(file.metadata().unwrap().modified().unwrap() + Duration::from_secs(86400)).unwrap();
        let before = files(folder.path());
        let ages = local.ages(&[key("old"), key("new"), key("future")]).unwrap();
        let days: Vec<u64> = ages.iter().map(|age| age.unwrap().as_secs() / 86400).collect();
        assert_eq!(days, [2, 0, 0]);
        assert_eq!(ages[2], Some(Duration::ZERO));
        assert_eq!(files(folder.path()), before);
    }
}

#[test]
fn memory_has_a_clock_of_its_own() {
    let memory = Memory::new();
    memory.put_new(&key("a"), b"x").unwrap();
    memory.advance(Duration::from_secs(10));
    memory.put_new(&key("b"), b"x").unwrap();
    memory.advance(Duration::from_secs(5));
    let ages = |memory: &Memory| memory.ages(&[key("a"), key("b")]).unwrap().into_iter().flatten().collect::<Vec<_>>();
    for memory in [memory.clone(), memory.fork()] {
        assert_eq!(ages(&memory), [Duration::from_secs(15), Duration::from_secs(5)]);
    }
}

#[test]
fn local_needs_its_root() {
    let folder = tempfile::tempdir().unwrap();
    assert_fails(Local::open(folder.path().join("nowhere")), ErrorKind::NotFound);
    fs::write(folder.path().join("file"), b"").unwrap();
    assert_fails(Local::open(folder.path().join("file")), ErrorKind::NotFolder);
    assert_eq!(Local::open(folder.path()).unwrap().root(), folder.path());
}

#[test]
fn local_leaves_nothing_of_a_killed_writer() {
    let folder = tempfile::tempdir().unwrap();
    let local = Local::open(folder.path()).unwrap();
    let mut upload = local.create(&key("vms/web01/packs/1")).unwrap();
    upload.append(&pattern(0, 9 << 20)).unwrap();
    // Nothing has a name, so nothing stays, whether anybody cleans up or not.
    assert_eq!(files(folder.path()), Vec::<String>::new());
    std::mem::forget(upload);
    assert_eq!(local.remove_litter().unwrap(), 0);
    assert_eq!(local.list(&key("vms/web01/packs")).unwrap(), []);
}

#[test]
fn local_makes_private_files_and_folders() {
    for open in BOTH_WAYS {
        let folder = tempfile::tempdir().unwrap();
        let local = open(folder.path()).unwrap();
        local.put_new(&key("vms/web01/log/1"), b"x").unwrap();
        local.try_lock(&key("locks/new/lock")).unwrap().unwrap();
        local.keep_reserve();
        let tree = tree(folder.path());
        for name in ["vms/web01/log/1", "locks/new/lock", "reserve", "tmp", "vms", "vms/web01/log", "locks/new"] {
            assert!(tree.contains_key(name), "{name}");
        }
        for (name, (is_folder, mode)) in tree {
            assert_eq!(mode, if is_folder { 0o700 } else { 0o600 }, "{name}");
        }
    }
}

#[test]
fn local_removes_litter_only_when_its_writer_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let local = Local::open_without_tmpfile(folder.path()).unwrap();
    let other = Local::open_without_tmpfile(folder.path()).unwrap();
    assert_eq!(local.remove_litter().unwrap(), 0);
    let mut upload = local.create(&key("a/b")).unwrap();
    upload.append(b"alive").unwrap();
    fs::write(folder.path().join("tmp/4711-00"), b"dead").unwrap();
    // A writer that died after it gave its object the second name.
    local.put_new(&key("a/c"), b"kept").unwrap();
    fs::hard_link(folder.path().join("a/c"), folder.path().join("tmp/4711-01")).unwrap();
    fs::create_dir(folder.path().join("tmp/folder")).unwrap();
    assert_eq!(files(folder.path()).len(), 4);
    for backend in [&other, &local] {
        let freed = backend.remove_litter().unwrap();
        assert_eq!(freed, if std::ptr::eq(backend, &other) { 4 } else { 0 });
        assert_eq!(files(folder.path()).len(), 2);
    }
    upload.finish().unwrap();
    assert_eq!(files(folder.path()), ["a/b", "a/c"]);
    assert_eq!(local.read_all(&key("a/b"), 10).unwrap(), b"alive");
    assert_eq!(local.read_all(&key("a/c"), 10).unwrap(), b"kept");
}

#[test]
fn local_without_tmpfile_leaves_no_second_name_when_the_key_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let local = Local::open_without_tmpfile(folder.path()).unwrap();
    local.put_new(&key("a"), b"x").unwrap();
    assert_fails(local.put_new(&key("a"), b"y"), ErrorKind::Exists);
    assert_eq!(files(folder.path()), ["a"]);
}

#[test]
fn local_reads_on_from_an_object_that_another_deleted() {
    let place = local();
    let (reader, collector) = (&*place.first, &*place.second);
    reader.put_new(&key("a/b"), b"12345").unwrap();
    let mut out = [0; 2];
    reader.read(&key("a/b"), 0, &mut out).unwrap();
    collector.delete(&key("a/b")).unwrap();
    reader.read(&key("a/b"), 3, &mut out).unwrap();
    assert_eq!(&out, b"45");
    // But it is known to be gone.
    assert_fails(reader.len(&key("a/b")), ErrorKind::NotFound);
    assert_fails(reader.pin(&key("a/b")), ErrorKind::NotFound);
    assert!(!reader.is_pinned(&key("a/b")).unwrap());
    assert_fails(collector.read(&key("a/b"), 3, &mut out), ErrorKind::NotFound);
}

#[test]
fn local_makes_a_folder_again_that_somebody_removed() {
    for open in BOTH_WAYS {
        let folder = tempfile::tempdir().unwrap();
        let local = open(folder.path()).unwrap();
        local.put_new(&key("a/b/c"), b"x").unwrap();
        fs::remove_dir_all(folder.path().join("a")).unwrap();
        local.put_new(&key("a/b/d"), b"before").unwrap();
        assert_eq!(local.read_all(&key("a/b/d"), 10).unwrap(), b"before");
        // And while the object is being written.
        let mut upload = local.create(&key("a/b/e")).unwrap();
        upload.append(b"during").unwrap();
        fs::remove_dir_all(folder.path().join("a")).unwrap();
        upload.finish().unwrap();
        assert_eq!(local.read_all(&key("a/b/e"), 10).unwrap(), b"during");
        // And under a lock: the new file is locked, not the old one.
        let _old = local.try_lock(&key("a/lock")).unwrap().unwrap();
        fs::remove_dir_all(folder.path().join("a")).unwrap();
        let _new = local.try_lock(&key("a/lock")).unwrap().unwrap();
        assert!(local.try_lock(&key("a/lock")).unwrap().is_none());
    }
}

#[test]
fn local_lists_objects_only() {
    let folder = tempfile::tempdir().unwrap();
    let local = Local::open(folder.path()).unwrap();
    local.put_new(&key("a/b"), b"x").unwrap();
    fs::write(folder.path().join("a/.tmp-copy"), b"").unwrap();
    fs::write(folder.path().join("a").join(std::ffi::OsStr::from_bytes(b"not\xffutf8")), b"").unwrap();
    std::os::unix::fs::symlink("nowhere", folder.path().join("a/dangling")).unwrap();
    std::os::unix::fs::symlink("b", folder.path().join("a/link")).unwrap();
    assert_eq!(names(&local.list(&key("a")).unwrap()), ["b", "link"]);
}

#[test]
fn local_keeps_a_reserve_of_its_full_size() {
    let folder = tempfile::tempdir().unwrap();
    let local = Local::open(folder.path()).unwrap();
    let path = folder.path().join("reserve");
    local.keep_reserve();
    assert_eq!(fs::metadata(&path).unwrap().len(), RESERVE_BYTES);
    // A part of it, as a crash or somebody else left it, is replaced.
    fs::write(&path, b"short").unwrap();
    local.keep_reserve();
    assert_eq!(fs::metadata(&path).unwrap().len(), RESERVE_BYTES);
    assert_eq!(files(folder.path()), ["reserve"]);
    // Where none can be made, nothing is left of the attempt.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    local.keep_reserve();
    assert_eq!(files(folder.path()), Vec::<String>::new());
}

#[test]
fn local_tells_the_space_of_its_medium() {
    let place = local();
    let (total, free) = place.first.space().unwrap();
    assert!(total > 1 << 20 && free <= total, "{total} {free}");
}

#[test]
fn local_without_the_right_to_write_is_denied() {
    let folder = tempfile::tempdir().unwrap();
    let local = Local::open(folder.path()).unwrap();
    local.put_new(&key("a"), b"x").unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o500)).unwrap();
    // The superuser may write all the same.
    match local.put_new(&key("b/c"), b"x") {
        Ok(()) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::Denied, "{error}"),
    }
    let pin = local.pin(&key("a")).unwrap();
    assert!(local.is_pinned(&key("a")).unwrap());
    drop(pin);
    fs::set_permissions(folder.path(), Permissions::from_mode(0o700)).unwrap();
}

// Only Memory.

#[test]
fn memory_has_the_room_it_was_given() {
    let memory = Memory::with_capacity_limit(1000);
    memory.keep_reserve();
    assert_eq!(memory.space(), Some((1000, 875)));
    memory.put_new(&key("a"), &[0; 500]).unwrap();
    let mut upload = memory.create(&key("b")).unwrap();
    upload.append(&[0; 300]).unwrap();
    assert_fails(upload.append(&[0; 76]), ErrorKind::NoSpace);
    assert_fails(memory.put_new(&key("c"), &[0; 76]), ErrorKind::NoSpace);
    assert!(memory.release_reserve());
    upload.append(&[0; 200]).unwrap();
    memory.keep_reserve();
    assert!(!memory.release_reserve(), "no room for it");
    assert_eq!(memory.space(), Some((1000, 0)));
    drop(upload);
    assert_eq!(memory.space(), Some((1000, 500)));
    // What lost against a taken key gives its room back too.
    assert_fails(memory.put_new(&key("a"), &[0; 500]), ErrorKind::Exists);
    assert_eq!(memory.space(), Some((1000, 500)));
    memory.delete(&key("a")).unwrap();
    assert_eq!(memory.space(), Some((1000, 1000)));
    memory.with_reserve_bytes(1000).put_new(&key("a"), &[0; 1000]).unwrap();
}

#[test]
fn memory_forks_and_is_damaged() {
    let memory = Memory::new();
    memory.put_new(&key("a"), b"old").unwrap();
    memory.put_new(&key("b"), b"x").unwrap();
    let _pin = memory.pin(&key("a")).unwrap();
    let _lock = memory.try_lock(&key("lock")).unwrap().unwrap();
    let before = memory.objects();
    let fork = memory.fork();
    assert!(!fork.is_pinned(&key("a")).unwrap());
    assert!(fork.try_lock(&key("lock")).unwrap().is_some());
    memory.replace(&key("a"), b"damaged");
    assert!(memory.is_pinned(&key("a")).unwrap());
    assert_eq!(memory.remove(&key("b")).unwrap().as_slice(), b"x");
    assert_eq!(memory.remove(&key("b")), None);
    assert_eq!(memory.read_all(&key("a"), 10).unwrap(), b"damaged");
    assert_eq!(memory.objects().len(), 1);
    assert_eq!(fork.objects(), before);
    memory.restore(&before);
    assert_eq!(memory.objects(), before);
}

// Only Recorder.

#[test]
fn the_recorder_counts_every_call_once() {
    let recorder = Recorder::new(Arc::new(Memory::new()));
    let (a, b) = (key("a"), key("b"));
    recorder.put_new(&a, b"x").unwrap();
    let mut upload = recorder.create(&b).unwrap();
    upload.append(b"x").unwrap();
    upload.append(b"y").unwrap();
    upload.read(0, &mut [0]).unwrap();
    upload.finish().unwrap();
    recorder.read(&a, 0, &mut [0]).unwrap();
    recorder.read_all(&a, 1).unwrap();
    recorder.read_all(&key("none"), 1).unwrap_err();
    recorder.len(&a).unwrap();
    recorder.list(&key("")).unwrap();
    recorder.pin(&a).unwrap();
    recorder.is_pinned(&a).unwrap();
    recorder.try_lock(&key("lock")).unwrap();
    recorder.delete(&a).unwrap();
    let counts = recorder.counts();
    assert_eq!(
        [counts.create, counts.put_new, counts.append, counts.finish, counts.read, counts.read_all],
        [1, 1, 2, 1, 1, 2]
    );
    assert_eq!(
        [counts.len, counts.list, counts.delete, counts.pin, counts.is_pinned, counts.try_lock],
        [1, 1, 1, 1, 1, 1]
    );
    assert_eq!(recorder.reads(), 3);
    let log = recorder.log();
    assert_eq!(log.len(), 14);
    assert_eq!(log[..3], [(Operation::PutNew, a.clone()), (Operation::Create, b.clone()), (Operation::Append, b)]);
    assert_eq!(log[13], (Operation::Delete, a));
    recorder.reset();
    assert_eq!((recorder.reads(), recorder.log().len(), recorder.counts()), (0, 0, Default::default()));
}

// Only Faulty.

/// Six counted calls of which four change something; returns whether each of them worked.
fn work(backend: &dyn Backend) -> Vec<Option<ErrorKind>> {
    let kind = |outcome: Result<()>| outcome.err().map(|error| error.kind());
    let mut outcomes = vec![
        kind(backend.put_new(&key("a"), b"a")),
        kind(backend.len(&key("old")).map(|_| ())),
        kind(backend.delete(&key("old"))),
    ];
    match backend.create(&key("b")) {
        Err(error) => outcomes.extend([Some(error.kind()), None, None]),
        Ok(mut upload) => {
            outcomes.push(None);
            outcomes.push(kind(upload.append(b"b")));
            outcomes.push(kind(upload.finish()));
        }
    }
    outcomes
}

fn run(fault: Fault, at: usize, scope: Scope) -> (Vec<Option<ErrorKind>>, Vec<String>, bool) {
    let memory = Memory::new();
    memory.put_new(&key("old"), b"x").unwrap();
    let faulty = Faulty::with_scope(Arc::new(memory.clone()), fault, at, scope);
    let outcomes = work(&faulty);
    (outcomes, memory.objects().into_keys().collect(), faulty.fired())
}

const DOWN: Option<ErrorKind> = Some(ErrorKind::Unavailable);
const FULL: Option<ErrorKind> = Some(ErrorKind::NoSpace);

#[test]
fn a_cut_before_has_no_effect_and_nothing_works_after_it() {
    for (at, outcomes, left) in [
        (0, [DOWN, DOWN, DOWN, DOWN, None, None], &["old"][..]),
        (1, [None, DOWN, DOWN, DOWN, None, None], &["a", "old"]),
        (2, [None, None, DOWN, DOWN, None, None], &["a", "old"]),
        (3, [None, None, None, DOWN, None, None], &["a"]),
        (4, [None, None, None, None, DOWN, DOWN], &["a"]),
        (5, [None, None, None, None, None, DOWN], &["a"]),
    ] {
        let (happened, objects, fired) = run(Fault::CutBefore, at, Scope::All);
        assert_eq!(
            (&happened[..], &objects[..], fired),
            (&outcomes[..], &left.iter().map(|s| s.to_string()).collect::<Vec<_>>()[..], true),
            "at {at}"
        );
    }
    let (happened, objects, fired) = run(Fault::CutBefore, 6, Scope::All);
    assert_eq!((happened, objects, fired), (vec![None; 6], vec!["a".into(), "b".into()], false));
}

#[test]
fn a_cut_after_takes_effect_and_nothing_works_after_it() {
    for (at, outcomes, left) in [
        (0, [DOWN, DOWN, DOWN, DOWN, None, None], &["a", "old"][..]),
        (2, [None, None, DOWN, DOWN, None, None], &["a"]),
        (3, [None, None, None, DOWN, None, None], &["a"]),
        (4, [None, None, None, None, DOWN, DOWN], &["a"]),
        (5, [None, None, None, None, None, DOWN], &["a", "b"]),
    ] {
        let (happened, objects, fired) = run(Fault::CutAfter, at, Scope::All);
        assert_eq!(
            (&happened[..], objects, fired),
            (&outcomes[..], left.iter().map(|s| s.to_string()).collect(), true),
            "at {at}"
        );
    }
    assert!(!run(Fault::CutAfter, 6, Scope::All).2);
}

#[test]
fn a_cut_stops_the_calls_that_are_not_counted_too() {
    let memory = Memory::new();
    memory.put_new(&key("a"), b"x").unwrap();
    memory.keep_reserve();
    let faulty = Faulty::new(Arc::new(memory.clone()), Fault::CutBefore, 2);
    let mut upload = faulty.create(&key("b")).unwrap();
    upload.append(b"x").unwrap();
    assert!(!faulty.is_pinned(&key("a")).unwrap());
    upload.read(0, &mut [0]).unwrap();
    assert_eq!((faulty.calls(), faulty.fired()), (2, false));
    assert_fails(faulty.try_lock(&key("lock")), ErrorKind::Unavailable);
    assert!(faulty.fired());
    assert_fails(upload.read(0, &mut [0]), ErrorKind::Unavailable);
    assert_fails(faulty.is_pinned(&key("a")), ErrorKind::Unavailable);
    assert_fails(faulty.pin(&key("a")), ErrorKind::Unavailable);
    assert_fails(faulty.list(&key("")), ErrorKind::Unavailable);
    assert_fails(faulty.read(&key("a"), 0, &mut [0]), ErrorKind::Unavailable);
    assert_fails(faulty.read_all(&key("a"), 1), ErrorKind::Unavailable);
    assert_fails(faulty.remove_litter(), ErrorKind::Unavailable);
    assert!(!faulty.release_reserve());
    assert!(memory.release_reserve());
    faulty.keep_reserve();
    assert!(!memory.release_reserve());
    // is_pinned, reading back and the litter are not counted.
    assert_eq!(faulty.calls(), 7);
}

#[test]
fn a_blip_fails_one_call_without_effect() {
    for (at, failed, left) in
        [(0, 0, &["b"][..]), (1, 1, &["a", "b"]), (2, 2, &["a", "b", "old"]), (3, 3, &["a"]), (5, 5, &["a"])]
    {
        let (happened, objects, fired) = run(Fault::Blip, at, Scope::All);
        let mut outcomes = [None; 6];
        outcomes[failed] = DOWN;
        assert_eq!(
            (&happened[..], objects, fired),
            (&outcomes[..], left.iter().map(|s| s.to_string()).collect(), true),
            "at {at}"
        );
    }
    assert!(!run(Fault::Blip, 6, Scope::All).2);
}

#[test]
fn a_full_medium_reads_and_deletes() {
    for (at, outcomes, left) in [
        (0, [FULL, None, None, FULL, None, None], &[][..]),
        (1, [None, None, None, FULL, None, None], &["a"]),
        (4, [None, None, None, None, FULL, FULL], &["a"]),
        (5, [None, None, None, None, None, FULL], &["a"]),
    ] {
        let (happened, objects, fired) = run(Fault::NoSpace, at, Scope::All);
        let left: Vec<String> = left.iter().map(|s: &&str| s.to_string()).collect();
        assert_eq!((&happened[..], objects, fired), (&outcomes[..], left, true), "at {at}");
    }
    assert!(!run(Fault::NoSpace, 6, Scope::All).2);
}

#[test]
fn the_scope_of_mutations_counts_no_reads() {
    // put_new, delete, create, append, finish: the read between them is none.
    let (happened, objects, fired) = run(Fault::Blip, 1, Scope::Mutations);
    assert_eq!(happened, [None, None, DOWN, None, None, None]);
    assert_eq!((objects.len(), fired), (3, true));
    assert!(run(Fault::Blip, 4, Scope::Mutations).2);
    assert!(!run(Fault::Blip, 5, Scope::Mutations).2);
}
