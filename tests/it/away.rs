//! What must wait while a target is away, since only it may know more: the collection of common packs, the end of a move,
//! the filling of a target that was emptied, writing while objects move.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use snapfs::backend::local::Local;
use snapfs::backend::placement::Copies;
use snapfs::backend::testing::{Memory, Operation, Recorder};
use snapfs::backend::{Backend, Key};
use snapfs::check::moving::{Wanted, remove_target, set_replicas, settle};
use snapfs::check::{CheckOptions, check_store, check_store_from};
use snapfs::collect::common::collect_common;
use snapfs::collect::forget::forget;
use snapfs::collect::gc::{GcOptions, collect_vm};
use snapfs::elect::run::{ElectOptions, elect};
use snapfs::error::{Error, ErrorKind, Result};
use snapfs::name::{SnapshotName, VmName};
use snapfs::store::targets::open_replicated;
use snapfs::store::{MemoryShares, Store, config};

use crate::heal::{Live, compress_otherwise, damage_frames, words};
use crate::invariants::{collect_all, open};
use crate::targets::{Folders, Scene, empty};
use crate::world::{get, noise, put};

const MIB: usize = 1 << 20;
const CHECK: CheckOptions = CheckOptions { read_data: true, sample_percent: None, repair: false };
const REPAIR: CheckOptions = CheckOptions { read_data: true, sample_percent: None, repair: true };

/// A backend with a hook that is called with the number of each listing of one folder, before it.
fn hooked(
    inner: Arc<dyn Backend>,
    folder: &'static str,
    hook: impl Fn(usize) -> Result<()> + Send + Sync + 'static,
) -> Recorder {
    let listed = AtomicUsize::new(0);
    Recorder::with_hook(inner, move |operation, key| match operation == Operation::List && key.as_str() == folder {
        true => hook(listed.fetch_add(1, Ordering::SeqCst)),
        false => Ok(()),
    })
}

/// A store with a hook for listings of the VMs.
fn open_hooked(folders: &Folders, hook: impl Fn(usize) -> Result<()> + Send + Sync + 'static) -> Store {
    let home: Arc<dyn Backend> = Arc::new(Local::open(folders.path("store")).unwrap());
    let config = config::read_file(&*home).unwrap();
    let inner = open_replicated(&folders.path("store"), home, &config, &folders.clock).unwrap();
    let hooked = hooked(Arc::new(inner), "vms", hook);
    Store::with_backend(Arc::new(hooked), None, folders.clock.clone(), MemoryShares::default()).unwrap()
}

/// One whose work ends at this listing of the VMs, as if it were killed.
fn cut_off(folders: &Folders, at: usize) -> Store {
    open_hooked(folders, move |listed| match listed == at {
        true => Err(Error::new(ErrorKind::Unavailable, "cut off")),
        false => Ok(()),
    })
}

/// A VM over which the target in this folder decides.
fn vm_at(folders: &Folders, target: &str) -> String {
    let store = folders.store();
    let decides = |vm: &String| {
        let places = store.backend().replicated().unwrap().places(&Key::new(format!("vms/{vm}/log")));
        places.homes[0].name() == folders.path(target).to_str().unwrap()
    };
    (0..).map(|number| format!("vm{number}")).find(decides).unwrap()
}

fn rename(folders: &Folders, from: &str, to: &str) {
    std::fs::rename(folders.path(from), folders.path(to)).unwrap();
}

fn assert_healthy(folders: &Folders, what: &str) {
    let report = check_store(&folders.store(), CHECK, &mut |_| {}).unwrap();
    assert!(!report.is_damaged(), "{what}: {:?}", report.findings);
}

#[test]
fn common_blocks_of_a_vm_on_a_target_that_is_away_are_not_collected() {
    let scene = Scene::new(3, Copies { vm: 1, common: 3, quorum: 0 });
    let at = |target| (0..).map(|n| format!("vm{target}{n}")).find(|vm| scene.arbiter(vm) == target).unwrap();
    let vms = [1, 2, 3].map(at);
    let image = |number: u64| [noise(1, 3 * MIB), noise(100 + number, MIB)].concat();
    for (number, vm) in (0..).zip(&vms) {
        put(&scene.store(), &format!("{vm}/1.img"), &image(number)).unwrap();
    }
    elect(&Arc::new(scene.store()), &ElectOptions::default(), Arc::new(|_| {})).unwrap();
    let gc = |store: &Store| {
        for vm in store.vm_names().unwrap() {
            collect_vm(store, &vm, GcOptions::default(), &mut |_| {}).unwrap();
        }
        collect_common(store, GcOptions::default(), &mut |_| {}).map(drop)
    };
    gc(&scene.store()).unwrap();
    let packs =
        |target: usize| scene.memories[target].objects().into_keys().filter(|key| key.contains("common/packs/"));
    let there: Vec<String> = packs(1).collect();
    assert!(!there.is_empty());
    // The third VM cannot be seen, and all others let go of what they shared with it and share something else.
    for (number, vm) in (0..).zip(&vms[..2]) {
        let other = [noise(2, 3 * MIB), noise(200 + number, MIB)].concat();
        put(&scene.without(&[3]).unwrap(), &format!("{vm}/2.img"), &other).unwrap();
        let name = SnapshotName::parse(&format!("{vm}/1.img")).unwrap();
        forget(&scene.without(&[3]).unwrap(), &[name]).unwrap();
    }
    gc(&scene.without(&[3]).unwrap()).unwrap_err();
    elect(&Arc::new(scene.without(&[3]).unwrap()), &ElectOptions::default(), Arc::new(|_| {})).unwrap();
    for _ in 0..3 {
        let error = gc(&scene.without(&[3]).unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains("known only to target3"), "{error}");
    }
    assert!(there.iter().all(|key| packs(1).any(|now| now == *key)), "common packs went");
    assert!(get(&scene.store(), &format!("{}/1.img", vms[2])).unwrap() == image(2));
    // With all of them there it goes on.
    gc(&scene.store()).unwrap();
    assert!(get(&scene.store(), &format!("{}/1.img", vms[2])).unwrap() == image(2));
}

#[test]
fn a_target_that_is_removed_and_goes_away_is_not_taken_for_lost() {
    let folders = Folders::new(&["one", "two"], 1);
    let vm = vm_at(&folders, "one");
    let bytes = noise(1, 50_000);
    put(&folders.store(), &format!("{vm}/a.img"), &bytes).unwrap();
    // After all VMs were locked, and the record was put.
    let error = remove_target(&cut_off(&folders, 1), &folders.path("one"), false).unwrap_err();
    assert!(error.to_string().contains("cut off"), "{error}");
    rename(&folders, "one", "away");
    let error = settle(&folders.store()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("/one is away") && error.to_string().contains("--lost"), "{error}");
    // Only it knows of the VM: nobody makes another one of this name meanwhile.
    let error = put(&folders.store(), &format!("{vm}/b.img"), b"b").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    rename(&folders, "away", "one");
    settle(&folders.store()).unwrap();
    std::fs::remove_dir_all(folders.path("one")).unwrap();
    assert_eq!(get(&folders.store(), &format!("{vm}/a.img")).unwrap(), bytes);
    put(&folders.store(), &format!("{vm}/b.img"), b"b").unwrap();
    assert_healthy(&folders, "after the move");
}

#[test]
fn a_removal_that_was_cut_off_goes_on_as_lost_when_it_is_called_lost() {
    let folders = Folders::new(&["one", "two", "three"], 2);
    let vm = vm_at(&folders, "one");
    put(&folders.store(), &format!("{vm}/a.img"), b"a").unwrap();
    remove_target(&cut_off(&folders, 1), &folders.path("one"), false).unwrap_err();
    rename(&folders, "one", "away");
    settle(&folders.store()).unwrap_err();
    remove_target(&folders.store(), &folders.path("one"), true).unwrap();
    assert_eq!(get(&folders.store(), &format!("{vm}/a.img")).unwrap(), b"a");
    put(&folders.store(), &format!("{vm}/b.img"), b"b").unwrap();
    assert_healthy(&folders, "after the move");
}

#[test]
fn who_settles_does_not_end_the_move_that_another_began_meanwhile() {
    let folders = Folders::new(&["one", "two", "three"], 1);
    let vm = vm_at(&folders, "one");
    let bytes = noise(1, 50_000);
    put(&folders.store(), &format!("{vm}/a.img"), &bytes).unwrap();
    // It has looked for what was to be moved when another, that knows of no move yet, begins to remove a target, and is cut off.
    let other = Mutex::new(Some(cut_off(&folders, 1)));
    let one = folders.path("one");
    let hook = move |listed| {
        if listed == 4
            && let Some(other) = other.lock().unwrap().take()
        {
            remove_target(&other, &one, false).unwrap_err();
        }
        Ok(())
    };
    let store = open_hooked(&folders, hook);
    set_replicas(&store, Wanted { common: Some(2), ..Wanted::default() }).unwrap();
    settle(&folders.store()).unwrap();
    assert!(!folders.path("one").join("target.toml").exists(), "the removal came to its end");
    std::fs::remove_dir_all(folders.path("one")).unwrap();
    assert_eq!(get(&folders.store(), &format!("{vm}/a.img")).unwrap(), bytes);
    assert_healthy(&folders, "after both");
}

#[test]
fn what_a_log_names_behind_its_damage_is_not_left_behind() {
    let folders = Folders::new(&["one", "two"], 1);
    let vm = vm_at(&folders, "one");
    let images = [1, 2, 3].map(|seed| noise(seed, 50_000));
    for (number, bytes) in images.iter().enumerate() {
        put(&folders.store(), &format!("{vm}/{number}.img"), bytes).unwrap();
    }
    let logs = folders.path("one").join(format!("vms/{vm}/log"));
    let mut records: Vec<_> = std::fs::read_dir(&logs).unwrap().map(|row| row.unwrap().path()).collect();
    records.sort();
    let record = &records[records.len() / 2];
    let whole = std::fs::read(record).unwrap();
    std::fs::write(record, [&whole[..20], b"damaged", &whole[27..]].concat()).unwrap();
    let error = remove_target(&folders.store(), &folders.path("one"), false).unwrap_err();
    assert!(error.to_string().contains("log is damaged"), "{error}");
    // Put back from elsewhere, all is whole again.
    std::fs::write(record, &whole).unwrap();
    settle(&folders.store()).unwrap();
    std::fs::remove_dir_all(folders.path("one")).unwrap();
    for (number, bytes) in images.iter().enumerate() {
        assert_eq!(get(&folders.store(), &format!("{vm}/{number}.img")).unwrap(), *bytes);
    }
    assert_healthy(&folders, "after the move");
}

#[test]
fn an_emptied_target_is_not_full_before_all_others_were_asked() {
    let folders = Folders::with_quorum(&["one", "two"], 2, Some(1));
    let vm = vm_at(&folders, "one");
    let bytes = noise(1, 50_000);
    put(&folders.store(), &format!("{vm}/a.img"), &bytes).unwrap();
    empty(&folders.path("one"));
    rename(&folders, "two", "away");
    let report = check_store(&folders.store(), REPAIR, &mut |_| {}).unwrap();
    assert!(report.is_damaged());
    assert_eq!(report.targets_away.len(), 2, "{:?}", report.targets_away);
    // Else the VM would not be there, and be made anew over the one that is away.
    let error = put(&folders.store(), &format!("{vm}/b.img"), b"b").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    rename(&folders, "away", "two");
    let report = check_store(&folders.store(), REPAIR, &mut |_| {}).unwrap();
    assert!(!report.is_damaged(), "{:?}", report.findings);
    put(&folders.store(), &format!("{vm}/b.img"), b"b").unwrap();
    empty(&folders.path("two"));
    assert_eq!(get(&folders.store(), &format!("{vm}/a.img")).unwrap(), bytes);
}

#[test]
fn a_copy_that_collection_deletes_during_a_check_is_no_bad_one() {
    let scene = Scene::two(0);
    for (number, name) in (0..).zip(["vm/a.img", "vm/b.img"]) {
        put(&scene.store(), name, &noise(number, 300_000)).unwrap();
    }
    forget(&scene.store(), &[SnapshotName::parse("vm/a.img").unwrap()]).unwrap();
    for folder in ["vms/vm/holds", "vms/vm/log"] {
        let scene = scene.fork();
        let (other, before) = (Mutex::new(Some(scene.store())), scene.objects(1).len());
        let hook = Arc::new(move |_| match other.lock().unwrap().take() {
            Some(other) => collect_all(&other, false).map(drop),
            None => Ok(()),
        });
        let wrap = move |number, memory: Memory| -> Result<Arc<dyn Backend>> {
            let (inner, hook) = (Arc::new(memory), hook.clone());
            Ok(if number == 1 { Arc::new(hooked(inner, folder, move |at| hook(at))) } else { inner })
        };
        let store = open(Arc::new(scene.backend_with(wrap, None)), &scene.clock).unwrap();
        let report = check_store(&store, CHECK, &mut |_| {}).unwrap();
        assert!(scene.objects(1).len() < before, "nothing was collected");
        assert!(!report.is_damaged(), "{folder}: {:?}", report.findings);
    }
}

#[test]
fn nothing_goes_into_a_next_generation_while_a_target_is_away_that_may_have_it_whole() {
    let scene = Scene::two(1);
    let bytes = words(1, 1 << 20);
    put(&scene.store(), "vm/a.img", &bytes).unwrap();
    compress_otherwise(&scene.store(), &scene.store().vm_handle(&VmName::new("vm").unwrap()));
    let decides = scene.arbiter("vm");
    damage_frames(&scene.memories[decides], "vms/vm/");
    // Of one block nobody but the other target knows.
    let mut lacks = bytes.clone();
    lacks[50 * 4096..51 * 4096].fill(3);
    let alone = scene.without(if decides == 1 { &[2] } else { &[1] }).unwrap();
    let report = check_store_from(&alone, REPAIR, &[&Live::new(lacks)], &mut |_| {}).unwrap();
    assert!(report.is_damaged());
    drop(alone);
    collect_all(&scene.store(), true).unwrap();
    assert!(get(&scene.store(), "vm/a.img").unwrap() == bytes);
    let report = scene.check(REPAIR);
    assert!(!report.is_damaged(), "{:?}", report.findings);
}
