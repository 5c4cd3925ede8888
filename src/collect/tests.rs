//! Collection on a store in memory: what survives, what goes, and that a fault at any call loses nothing.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::backend::Backend;
use crate::backend::testing::{Fault, Faulty, Memory, Operation, Recorder, Scope};
use crate::catalog::record::Op;
use crate::catalog::roots::root_key;
use crate::catalog::vm::pack_key;
use crate::collect::gc::{Bounds, GcOptions, GcReport, collect_some, collect_vm};
use crate::collect::grace::Grace;
use crate::collect::plan::Plan;
use crate::collect::testing::{Bench, Model, block, open, read, vm};
use crate::error::ErrorKind;
use crate::pack::Content;
use crate::store::lock_key;

fn gc(bench: &Bench, exact: bool, dry_run: bool) -> GcReport {
    collect_vm(&bench.store, &vm("web01"), GcOptions { exact, dry_run }, &mut |_| {}).unwrap()
}

/// A base of three segments, of which each version writes a part anew and keeps some of the last one's.
fn version(number: u64) -> Model {
    let mut model: Model = (1..=1500).collect();
    for (at, content) in model.iter_mut().enumerate().take(400).skip(100) {
        *content = 10_000 * (number + 1) + at as u64;
    }
    for at in 0..number as usize * 20 {
        model[600 + at] = 5_000_000 + at as u64;
    }
    model.extend([0, 0, 7, 7, 0, 900_000 + number]);
    model
}

fn history(memory: Memory, count: u64) -> Bench {
    let mut bench = Bench::in_memory(memory);
    for number in 0..count {
        bench.backup(&format!("web01/{number}.img"), version(number));
    }
    bench.backup("db02/0.img", version(20));
    bench
}

#[test]
fn any_choice_of_snapshots_survives_and_a_second_run_changes_nothing() {
    for choice in 0..16u32 {
        let mut bench = history(Memory::new(), 4);
        let other = bench.bytes("vms/db02");
        let gone: Vec<String> = (0..4).filter(|n| choice & (1 << n) == 0).map(|n| format!("web01/{n}.img")).collect();
        bench.forget(&gone.iter().map(String::as_str).collect::<Vec<_>>());
        let before = bench.memory.objects();
        let foreseen = gc(&bench, false, true);
        assert_eq!(bench.memory.objects(), before, "a dry run changes nothing");
        let bytes = bench.bytes("vms/web01/packs") + bench.bytes("vms/web01/snapshots");
        let report = gc(&bench, false, false);
        let after = bench.bytes("vms/web01/packs") + bench.bytes("vms/web01/snapshots");
        assert_eq!(report.bytes_reclaimed, bytes - after);
        assert_eq!((report.idle, foreseen.idle), (gone.is_empty(), gone.is_empty()));
        assert!(foreseen.bytes_reclaimed.abs_diff(report.bytes_reclaimed) < 20_000, "{foreseen:?} {report:?}");
        bench.verify(&bench.memory);
        let settled = bench.memory.objects();
        for exact in [false, true] {
            let again = gc(&bench, exact, false);
            assert!(again.idle, "{again:?}");
            assert_eq!((again.bitmaps_wrong, again.leaked_objects), (0, 0));
            assert_eq!(bench.memory.objects(), settled);
        }
        if choice == 0 {
            assert_eq!(after, 0);
        }
        assert_eq!(bench.bytes("vms/db02"), other);
        // What is written afterwards stands on what is left.
        bench.forget_slots();
        bench.backup("web01/again.img", version(2));
        bench.verify(&bench.memory);
    }
}

#[test]
fn a_deleted_vm_leaves_its_log() {
    let mut bench = history(Memory::new(), 3);
    bench.store.vm_handle(&vm("web01")).append(None, |_| Ok((vec![Op::Delete {}], ()))).unwrap();
    bench.wanted.retain(|name, _| !name.starts_with("web01"));
    gc(&bench, false, false);
    assert!(bench.keys("vms/web01").iter().all(|key| key.as_str().contains("/log/")));
    bench.verify(&bench.memory);
    assert!(gc(&bench, true, false).idle);
}

#[test]
fn what_a_reader_has_open_stays_until_it_closes() {
    let mut bench = history(Memory::new(), 3);
    let (handle, state) = bench.store.vm(&vm("web01")).unwrap();
    let file = state.find(None, "1.img").unwrap().clone();
    let image = bench.store.open_image(&handle, &file).unwrap();
    bench.forget(&["web01/0.img", "web01/1.img"]);
    let report = gc(&bench, false, false);
    assert_eq!((report.roots_pinned, report.roots_dropped), (1, 1));
    let mut out = vec![0; image.bytes() as usize];
    image.read_at(0, &mut out).unwrap();
    for (at, content) in version(1).iter().enumerate() {
        assert!(out[at * 4096..][..4096] == block(*content));
    }
    assert!(gc(&bench, false, false).idle);
    drop(image);
    assert_eq!(gc(&bench, false, false).roots_dropped, 1);
    bench.verify(&bench.memory);
}

#[test]
fn many_small_packs_become_few() {
    let mut bench = history(Memory::new(), 12);
    let before = bench.keys("vms/web01/packs").len();
    assert_eq!(before, 24);
    let report = gc(&bench, false, false);
    assert_eq!((report.packs_written, report.packs_compacted), (2, 24));
    assert_eq!(bench.keys("vms/web01/packs").len(), 2);
    bench.verify(&bench.memory);
    assert!(gc(&bench, true, false).idle);
    // Members that die inside of it do not make it work again and again.
    bench.forget(&["web01/11.img"]);
    gc(&bench, false, false);
    let settled = bench.memory.objects();
    assert!(gc(&bench, false, false).idle);
    assert_eq!(bench.memory.objects(), settled);
    bench.forget(&["web01/1.img", "web01/2.img", "web01/3.img", "web01/4.img", "web01/5.img"]);
    bench.forget(&["web01/6.img", "web01/7.img", "web01/8.img", "web01/9.img", "web01/10.img"]);
    gc(&bench, false, false);
    bench.verify(&bench.memory);
    assert!(gc(&bench, false, false).idle);
}

#[test]
fn only_an_exact_run_removes_what_a_killed_writer_left() {
    let mut bench = history(Memory::new(), 2);
    let settled = bench.memory.objects();
    let unlike: Model = (40_000..45_000).collect();
    bench.write("web01/killed.img", &unlike, false).unwrap();
    assert!(gc(&bench, false, false).idle);
    let report = gc(&bench, true, false);
    assert_eq!(report.leaked_objects, 3);
    let now = bench.memory.objects();
    assert!(now.keys().filter(|k| !k.contains("/log/")).eq(settled.keys().filter(|k| !k.contains("/log/"))));
    bench.verify(&bench.memory);
}

#[test]
fn a_writer_at_work_is_left_alone() {
    let mut bench = history(Memory::new(), 2);
    bench.forget(&["web01/0.img"]);
    let _held = bench.memory.try_lock(&lock_key("web01")).unwrap().unwrap();
    let before = bench.memory.objects();
    assert!(gc(&bench, true, false).busy);
    assert_eq!(bench.memory.objects(), before);
}

#[test]
fn nothing_is_collected_when_it_is_not_known_what_is_live() {
    let mut bench = history(Memory::new(), 3);
    bench.forget(&["web01/0.img"]);
    let whole = bench.memory.objects();
    let (_, state) = bench.store.vm(&vm("web01")).unwrap();
    let root = root_key("web01", state.find(None, "1.img").unwrap().root);
    let recipes: Vec<_> = state.packs.values().filter(|p| p.content == Content::Recipes).collect();
    for key in recipes.iter().map(|p| pack_key("web01", p.object)).skip(1).chain([root]) {
        for cut in [None, Some(70), Some(10)] {
            match cut {
                None => drop(bench.memory.remove(&key)),
                Some(at) => bench.memory.replace(&key, whole[key.as_str()][..at].to_vec()),
            }
            let damaged = bench.memory.objects();
            let store = open(Arc::new(bench.memory.clone()));
            let error = collect_vm(&store, &vm("web01"), GcOptions::default(), &mut |_| {}).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            assert_eq!(bench.memory.objects(), damaged);
            bench.memory.restore(&whole);
        }
    }
    gc(&bench, false, false);
    bench.verify(&bench.memory);
}

#[test]
fn a_damaged_data_pack_is_left_as_it_is_and_the_rest_is_collected() {
    let mut bench = history(Memory::new(), 3);
    // The second version's own blocks are dead, but for a few that the third has too.
    let shared: Model = (20_100..20_110).collect();
    bench.backup("web01/few.img", shared);
    bench.forget(&["web01/1.img", "web01/2.img"]);
    let (_, state) = bench.store.vm(&vm("web01")).unwrap();
    let data: Vec<_> = state.packs.values().filter(|p| p.content == Content::Data).collect();
    let key = pack_key("web01", data[1].object);
    let mut bytes = bench.memory.objects()[key.as_str()].to_vec();
    // In the first frame, which holds the ten blocks.
    bytes[100] ^= 1;
    bench.memory.replace(&key, bytes);
    let report = gc(&bench, false, false);
    assert_eq!(report.damaged, [key.to_string()]);
    assert!(bench.memory.objects().contains_key(key.as_str()));
    assert!(report.packs_dropped > 0);
    read(&open(Arc::new(bench.memory.clone())), "web01/0.img", &version(0));
}

#[test]
fn a_fault_at_every_call_loses_nothing_and_the_next_run_ends_the_work() {
    let mut bench = history(Memory::new(), 5);
    bench.forget(&["web01/0.img", "web01/2.img", "web01/3.img"]);
    let mut wanted = None;
    let everywhere = [Fault::CutBefore, Fault::CutAfter, Fault::Blip, Fault::NoSpace].map(|f| (f, Scope::Mutations));
    for (fault, scope) in everywhere.into_iter().chain([(Fault::Blip, Scope::All)]) {
        // The first calls open the store.
        for at in if scope == Scope::All { 3.. } else { 0.. } {
            let disk = bench.memory.fork();
            let faulty = Arc::new(Faulty::with_scope(Arc::new(disk.clone()), fault, at, scope));
            let options = GcOptions { exact: at % 2 == 1, dry_run: false };
            let _ = collect_vm(&open(faulty.clone()), &vm("web01"), options, &mut |_| {});
            // Another machine after the crash.
            let disk = disk.fork();
            bench.verify(&disk);
            let store = open(Arc::new(disk.clone()));
            collect_vm(&store, &vm("web01"), GcOptions::default(), &mut |_| {}).unwrap();
            collect_vm(&store, &vm("web01"), GcOptions { exact: true, dry_run: false }, &mut |_| {}).unwrap();
            bench.verify(&disk);
            let left = disk.objects();
            let bytes: usize = left.iter().filter(|(k, _)| !k.contains("/log/")).map(|(_, b)| b.len()).sum();
            // An object that could not be read in the first run is rewritten by itself in the second.
            let slack = if scope == Scope::All { 2000 } else { 0 };
            let wanted = *wanted.get_or_insert(bytes);
            assert!(wanted.abs_diff(bytes) <= slack, "{fault:?} at {at}: {bytes}, wanted {wanted}");
            if !faulty.fired() {
                break;
            }
        }
    }
}

#[test]
fn dead_packs_go_although_there_is_no_room_for_compaction() {
    let mut bench = history(Memory::new(), 3);
    bench.forget(&["web01/1.img", "web01/0.img"]);
    let whole = gc(&bench, false, true);
    assert!(whole.packs_dropped > 0 && whole.packs_compacted > 0, "{whole:?}");
    let bytes: u64 = bench.memory.objects().values().map(|b| b.len() as u64).sum();
    let full = Memory::with_capacity_limit(bytes + 1000).with_reserve_bytes(1000);
    full.restore(&bench.memory.objects());
    full.keep_reserve();
    let store = open(Arc::new(full.clone()));
    let report = collect_vm(&store, &vm("web01"), GcOptions::default(), &mut |_| {}).unwrap();
    assert!(report.packs_dropped > 0 && report.bytes_reclaimed > 0, "{report:?}");
    bench.verify(&full);
}

#[test]
fn a_bounded_round_drops_what_is_dead_and_leaves_the_rest_to_the_next() {
    let mut bench = history(Memory::new(), 12);
    bench.forget(&["web01/1.img", "web01/0.img"]);
    let whole = gc(&bench, false, true);
    assert!(whole.packs_dropped > 0 && whole.packs_compacted > 1, "{whole:?}");
    let round = |bytes: u64, stop: bool| {
        collect_some(&bench.store, &vm("web01"), Bounds { bytes, stop: &AtomicBool::new(stop) }).unwrap()
    };
    for (bytes, stop) in [(u64::MAX, true), (0, false)] {
        let stopped = round(bytes, stop);
        assert!(stopped.partial && stopped.packs_written == 0, "{stopped:?}");
        bench.verify(&bench.memory);
    }
    // What is dead as a whole went in the first of them.
    assert_eq!(gc(&bench, false, true).packs_dropped, 0);
    let mut rounds = Vec::new();
    loop {
        let report = round(1, false);
        bench.verify(&bench.memory);
        let is_partial = report.partial;
        rounds.push(report.packs_written);
        if !is_partial {
            break;
        }
    }
    assert!(rounds.len() > 1 && rounds.iter().all(|written| *written <= 1), "{rounds:?}");
    let rest = gc(&bench, true, false);
    assert!(rest.idle && !rest.partial, "{rest:?}");
}

#[test]
fn a_wrong_bitmap_does_not_lose_what_recipes_use() {
    let mut bench = history(Memory::new(), 1);
    bench.bitmap_lacks = 500;
    bench.backup("web01/1.img", version(1));
    bench.forget(&["web01/0.img"]);
    let (handle, state) = bench.store.vm(&vm("web01")).unwrap();
    let popular = crate::store::session::PopularView::now(&bench.store);
    let plan = Plan::make(&handle, &bench.store.packs(&handle), &state, false, &popular, &Grace::default()).unwrap();
    assert_eq!(plan.exactness.bitmaps_wrong, 0);
    let exact = Plan::make(&handle, &bench.store.packs(&handle), &state, true, &popular, &Grace::default()).unwrap();
    assert_eq!(exact.exactness.bitmaps_wrong, 1);
    let live = |plan: &Plan| plan.only.as_ref().map(|s| s.live.len()).unwrap();
    assert_eq!(live(&exact), live(&plan) + 500);
    assert_eq!(gc(&bench, true, false).bitmaps_wrong, 1);
    bench.verify(&bench.memory);
}

#[test]
fn forwards_are_found_between_own_blocks_where_one_entry_of_eight_is_in_memory() {
    use crate::clock::ManualClock;
    use crate::elect::run::{ElectOptions, Elected, elect};
    use crate::store::{MemoryShares, Store};
    let mut bench = Bench::new();
    bench.backup("db02/0.img", (1..=3000).collect());
    // Of three blocks, the third is its own.
    bench.backup(
        "web01/0.img",
        (1..=3000).flat_map(|n| [n, 10_000 + n].into_iter().take(1 + (n as usize + 1) % 2)).collect(),
    );
    let options = ElectOptions { memory_bytes: 1 << 20, ..ElectOptions::default() };
    let store = Arc::new(open(Arc::new(bench.memory.clone())));
    let Elected::Chosen(elected) = elect(&store, &options, Arc::new(|_| {})).unwrap() else { unreachable!() };
    assert_eq!(elected.blocks_popular, 3000);
    let shares = MemoryShares { popular_bytes: 4000, ..MemoryShares::default() };
    let clock = Arc::new(ManualClock::default());
    bench.store = Store::with_backend(Arc::new(bench.memory.clone()), None, clock, shares).unwrap();
    let before = bench.bytes("vms/web01/packs");
    gc(&bench, false, false);
    let after = bench.bytes("vms/web01/packs");
    assert!(after * 100 < before * 40, "a third is its own: {before} bytes, {after} left");
    bench.verify(&bench.memory);
}

#[test]
fn what_another_collection_moves_meanwhile_is_not_called_damaged() {
    let mut bench = Bench::new();
    bench.backup("web01/a.img", (1..=1000).collect());
    bench.backup("web01/b.img", (1..=500).collect());
    bench.forget(&["web01/a.img"]);
    let (_, state) = bench.store.vm(&vm("web01")).unwrap();
    let data = state.packs.values().find(|p| p.content == Content::Data).unwrap();
    let before = pack_key("web01", data.object);
    let other = open(Arc::new(bench.memory.clone()));
    let what = move || {
        let report = collect_vm(&other, &vm("web01"), GcOptions::default(), &mut |_| {}).unwrap();
        assert_eq!(report.packs_compacted, 1, "{report:?}");
    };
    let what = Mutex::new(Some(what));
    let meddled = Recorder::with_hook(Arc::new(bench.memory.clone()), move |operation, key| {
        if operation == Operation::Read
            && *key == before
            && let Some(what) = what.lock().unwrap().take()
        {
            what();
        }
        Ok(())
    });
    let options = GcOptions { exact: false, dry_run: true };
    let report = collect_vm(&open(Arc::new(meddled)), &vm("web01"), options, &mut |_| {}).unwrap();
    assert_eq!((report.damaged.len(), report.idle), (0, true), "{report:?}");
}

#[test]
fn a_forgotten_snapshot_that_stops_collection_is_told_to_be_in_its_grace() {
    let mut bench = history(Memory::new(), 2);
    let grace = |settings: &mut crate::store::config::Settings| {
        settings.gc_grace_seconds = 60;
        Ok(())
    };
    bench.store.change_settings(grace).unwrap();
    let (_, state) = bench.store.vm(&vm("web01")).unwrap();
    let root = root_key("web01", state.find(None, "0.img").unwrap().root);
    bench.forget(&["web01/0.img"]);
    bench.memory.remove(&root);
    let error = collect_vm(&bench.store, &vm("web01"), GcOptions::default(), &mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains(&format!("{root} (forgotten; within gc_grace) needs")), "{error}");
}

struct Tell<'a>(&'a AtomicBool);

impl Drop for Tell<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn readers_of_what_stays_notice_nothing() {
    let mut bench = history(Memory::new(), 12);
    let reader = open(Arc::new(bench.memory.clone()));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut rounds = 0;
            while !done.load(Relaxed) || rounds == 0 {
                read(&reader, "web01/11.img", &version(11));
                rounds += 1;
            }
        });
        // However this ends, the reader is told.
        let _tell = Tell(&done);
        for number in 0..11 {
            bench.forget(&[format!("web01/{number}.img").as_str()]);
            gc(&bench, number % 3 == 0, false);
            assert!(!reading.is_finished(), "the reader met an error");
        }
    });
    bench.verify(&bench.memory);
}

#[test]
fn forgetting_is_all_or_nothing() {
    use crate::collect::forget::forget;
    use crate::name::SnapshotName;
    let bench = history(Memory::new(), 3);
    let names = |list: &[&str]| list.iter().map(|n| SnapshotName::parse(n).unwrap()).collect::<Vec<_>>();
    let before = bench.memory.objects();
    for absent in ["web01/9.img", "web01/disk/0.img", "nobody/0.img"] {
        let error = forget(&bench.store, &names(&["db02/0.img", "web01/0.img", absent])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
    assert_eq!(bench.memory.objects(), before);
    let (handle, state) = bench.store.vm(&vm("web01")).unwrap();
    let file = state.find(None, "1.img").unwrap().id;
    handle.append(None, |_| Ok((vec![Op::Protect { file, on: true }], ()))).unwrap();
    let error = forget(&bench.store, &names(&["web01/0.img", "web01/1.img"])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    let records = bench.keys("vms/web01/log").len();
    let told = forget(&bench.store, &names(&["web01/0.img", "db02/0.img", "web01/2.img", "web01/0.img"])).unwrap();
    assert_eq!(told.len(), 3);
    assert_eq!(bench.keys("vms/web01/log").len(), records + 1);
    let (_, state) = bench.store.vm(&vm("web01")).unwrap();
    assert_eq!(state.files.len(), 1);
}
