//! Retention: rules on real histories, protection, and a least age that no client's clock gets around. All on a store in
//! memory, whose medium has a clock of its own.

use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use snapfs::backend::testing::{Operation, Recorder};
use snapfs::catalog::roots::root_key;
use snapfs::clock::{ManualClock, Timestamp};
use snapfs::collect::forget::{Stays, Verdict, forget, forget_by_rules, resolve};
use snapfs::collect::keep::{Rule, Rules};
use snapfs::collect::protect::protect;
use snapfs::error::{ErrorKind, Result};
use snapfs::fs::MountedStore;
use snapfs::fs::types::{Caller, Options, ROOT};
use snapfs::name::{Reference, SnapshotName, VmName};
use snapfs::store::{MemoryShares, Store};

use crate::invariants::keys;
use crate::world::{World, name, put};

const DAY: Duration = Duration::from_secs(86400);
const WEEK_SECONDS: u64 = 7 * 86400;

fn vm(text: &str) -> VmName {
    VmName::new(text).unwrap()
}

fn reference(text: &str) -> Reference {
    SnapshotName::parse_reference(text).unwrap()
}

fn names(store: &Store) -> Vec<String> {
    let mut names = Vec::new();
    for name in store.vm_names().unwrap() {
        let (vm, state) = store.vm(&name).unwrap();
        names.extend(state.files.values().map(|f| snapfs::store::full_name(vm.name(), f)));
    }
    names.sort();
    names
}

/// A store as a client with this clock sees it.
fn with_clock(world: &World, now: Timestamp) -> Store {
    let clock = Arc::new(ManualClock::at(now));
    Store::with_backend(Arc::new(world.memory.clone()), None, clock, MemoryShares::default()).unwrap()
}

fn by_rules(store: &Store, rules: Rules) -> Result<Vec<Verdict>> {
    forget_by_rules(store, &vm("web01"), &rules, &TimeZone::UTC, false)
}

#[track_caller]
fn denied<T: std::fmt::Debug>(outcome: Result<T>, why: &str) {
    let e = outcome.unwrap_err();
    assert!(e.kind() == ErrorKind::Denied && e.to_string().contains(why), "{e}");
}

#[test]
fn rules_judge_each_folder_by_itself_and_leave_drafts_and_others_alone() {
    let world = World::new();
    let store = world.store();
    for day in 0..4 {
        for image in ["web01/a", "web01/xvda/a", "web01/xvda/b", "db02/a"] {
            put(&store, &format!("{image}{day}.img"), b"x").unwrap();
        }
        world.clock.advance(DAY);
    }
    let fs = MountedStore::new(Arc::new(world.store()), Options::default());
    let parent = fs.lookup(ROOT, "web01").unwrap().ino;
    fs.create(parent, "d.part", Caller { uid: 0, gid: 0 }).unwrap();
    protect(&store, &[reference("web01/a0.img")], true).unwrap();
    let before = names(&store);
    let rules = Rules { last: 1, daily: 3, ..Rules::default() };
    let foreseen = forget_by_rules(&store, &vm("web01"), &rules, &TimeZone::UTC, true).unwrap();
    assert_eq!(names(&store), before);
    let verdicts = by_rules(&store, rules).unwrap();
    assert_eq!(verdicts, foreseen);
    let told: Vec<(&str, &[Rule], bool)> =
        verdicts.iter().map(|v| (v.name.as_str(), v.rules.as_slice(), v.is_forgotten())).collect();
    let daily: &[Rule] = &[Rule::Daily];
    let newest: &[Rule] = &[Rule::Last, Rule::Daily];
    let expected = [
        ("web01/a0.img", &[][..], false),
        ("web01/a1.img", daily, false),
        ("web01/a2.img", daily, false),
        ("web01/a3.img", newest, false),
        ("web01/xvda/a0.img", &[], true),
        ("web01/xvda/b0.img", &[], true),
        ("web01/xvda/a1.img", &[], true),
        ("web01/xvda/b1.img", daily, false),
        ("web01/xvda/a2.img", &[], true),
        ("web01/xvda/b2.img", daily, false),
        ("web01/xvda/a3.img", &[], true),
        ("web01/xvda/b3.img", newest, false),
    ];
    assert_eq!(told, expected);
    assert_eq!(verdicts[0].stays, Some(Stays::Protected));
    let gone: Vec<&str> = told.iter().filter(|(_, _, gone)| *gone).map(|(name, ..)| *name).collect();
    let left: Vec<String> = before.into_iter().filter(|name| !gone.contains(&name.as_str())).collect();
    assert_eq!(names(&store), left);
    assert!(left.contains(&"web01/d.part".to_owned()));
    // A second time nothing goes, and nothing is written.
    let log = keys(&world.memory, "vms/web01/log").len();
    assert!(by_rules(&store, rules).unwrap().iter().all(|v| !v.is_forgotten()));
    assert_eq!(keys(&world.memory, "vms/web01/log").len(), log);
    assert_eq!(by_rules(&store, Rules { last: 1, ..rules }).unwrap().len(), 7);
    let gone = forget_by_rules(&store, &vm("nobody"), &rules, &TimeZone::UTC, false);
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn what_is_protected_is_not_forgotten_by_any_way() {
    let world = World::new();
    let store = world.store();
    for image in ["web01/a.img", "web01/b.img", "db02/a.img"] {
        put(&store, image, b"x").unwrap();
    }
    let both = [reference("web01/a.img"), reference("db02/latest"), reference("web01/a.img")];
    let told = protect(&store, &both, true).unwrap();
    let expected = [("db02/a.img", true), ("web01/a.img", true), ("web01/a.img", true)];
    assert_eq!(told, expected.map(|(name, new)| (name.to_owned(), new)));
    assert!(protect(&store, &both, true).unwrap().iter().all(|(_, is_new)| !is_new));
    denied(forget(&store, &[name("web01/b.img"), name("web01/a.img")]), "web01/a.img is protected");
    denied(resolve(&store, &[name("web01/a.img")]), "protected");
    let verdicts = by_rules(&store, Rules { last: 1, ..Rules::default() }).unwrap();
    assert_eq!(verdicts[0].stays, Some(Stays::Protected));
    let fs = MountedStore::new(Arc::new(world.store()), Options::default());
    let parent = fs.lookup(ROOT, "web01").unwrap().ino;
    denied(fs.unlink(parent, "a.img"), "protected");
    assert_eq!(names(&store).len(), 3);
    protect(&store, &both, false).unwrap();
    fs.unlink(parent, "a.img").unwrap();
    forget(&store, &[name("db02/a.img")]).unwrap();
    // Not there, and not yet a snapshot.
    let missing = protect(&store, &[reference("web01/b.img"), reference("web01/a.img")], true);
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(protect(&store, &[reference("web02/a.img")], true).unwrap_err().kind(), ErrorKind::NotFound);
    fs.create(parent, "d.part", Caller { uid: 0, gid: 0 }).unwrap();
    let draft = protect(&store, &[reference("web01/d.part")], true);
    assert_eq!(draft.unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn no_clock_of_a_client_gets_around_the_least_age() {
    let world = World::new();
    let store = world.store();
    store
        .change_settings(|s| {
            s.min_age_seconds = WEEK_SECONDS;
            Ok(())
        })
        .unwrap();
    put(&store, "web01/old.img", b"x").unwrap();
    world.memory.advance(DAY * 5);
    put(&store, "web01/new.img", b"y").unwrap();
    world.memory.advance(DAY);
    // Whatever a client holds for now: 1970, and the year 2500.
    for now in [Timestamp(0), Timestamp(u64::MAX / 2), Timestamp(16_725_225_600_000_000_000)] {
        let store = with_clock(&world, now);
        for image in ["web01/old.img", "web01/new.img"] {
            denied(forget(&store, &[name(image)]), "min_age is 7d");
            denied(resolve(&store, &[name(image)]), "min_age");
        }
        let verdicts = by_rules(&store, Rules { last: 1, ..Rules::default() }).unwrap();
        let why = "is 6d old, the store's min_age is 7d".to_owned();
        assert_eq!(verdicts.iter().map(|v| v.stays.clone()).collect::<Vec<_>>(), [Some(Stays::Young(why)), None]);
        let fs = MountedStore::new(Arc::new(with_clock(&world, now)), Options::default());
        let parent = fs.lookup(ROOT, "web01").unwrap().ino;
        denied(fs.unlink(parent, "old.img"), "min_age");
        let over = fs.rename(parent, "new.img", parent, "old.img", false);
        assert_eq!(over.unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(fs.remove_folder(ROOT, "web01").unwrap_err().kind(), ErrorKind::NotEmpty);
        // A draft is no history.
        fs.create(parent, "d.part", Caller { uid: 0, gid: 0 }).unwrap();
        fs.unlink(parent, "d.part").unwrap();
        assert_eq!(names(&store), ["web01/new.img", "web01/old.img"]);
    }
    // By the medium's clock alone a week passes.
    world.memory.advance(DAY);
    let store = with_clock(&world, Timestamp(0));
    denied(forget(&store, &[name("web01/old.img"), name("web01/new.img")]), "web01/new.img is 2d old");
    assert_eq!(names(&store).len(), 2);
    forget(&store, &[name("web01/old.img")]).unwrap();
    // One whose root page is lost has nothing left to be kept for.
    let (_, state) = store.vm(&vm("web01")).unwrap();
    let root = state.files.values().next().unwrap().root;
    world.memory.remove(&root_key("web01", root));
    forget(&store, &[name("web01/new.img")]).unwrap();
}

#[test]
fn without_a_least_age_nothing_is_asked_of_the_medium() {
    let world = World::new();
    put(&world.store(), "web01/a.img", b"x").unwrap();
    let recorder = Arc::new(Recorder::new(Arc::new(world.memory.clone())));
    let store = world.store_over(recorder.clone()).unwrap();
    forget(&store, &[name("web01/a.img")]).unwrap();
    assert!(recorder.log().iter().all(|(operation, _)| *operation != Operation::Ages));
}

#[test]
fn settings_that_are_changed_at_the_same_time_are_all_kept_in_order() {
    let world = World::new();
    let store = world.store();
    assert_eq!(store.settings().unwrap().min_age_seconds, 0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let other = world.store();
            scope.spawn(move || {
                for _ in 0..10 {
                    other
                        .change_settings(|s| {
                            s.min_age_seconds += 1;
                            Ok(())
                        })
                        .unwrap();
                }
            });
        }
    });
    assert_eq!(store.settings().unwrap().min_age_seconds, 40);
    assert_eq!(keys(&world.memory, "config/").len(), 41);
    // What changes nothing writes nothing, and what fails changes nothing.
    store.change_settings(|_| Ok(())).unwrap();
    store
        .change_settings(|s| {
            s.min_age_seconds = 0;
            Err(snapfs::error::invalid("no"))
        })
        .unwrap_err();
    assert_eq!(keys(&world.memory, "config/").len(), 41);
    assert_eq!(world.store().settings().unwrap().min_age_seconds, 40);
}

fn bytes_of(world: &World, prefix: &str) -> usize {
    world.memory.objects().iter().filter(|(key, _)| key.starts_with(prefix)).map(|(_, bytes)| bytes.len()).sum()
}

#[test]
fn nothing_is_removed_through_a_mount_with_nodelete() {
    let world = World::new();
    let store = world.store();
    put(&store, "web01/a.img", b"x").unwrap();
    put(&store, "web01/xvda/a.img", b"x").unwrap();
    let options = Options { no_delete: true, ..Options::default() };
    let fs = MountedStore::new(Arc::new(world.store()), options);
    let caller = Caller { uid: 0, gid: 0 };
    let parent = fs.lookup(ROOT, "web01").unwrap().ino;
    for name in ["d.part", "e.part"] {
        let (_, opened) = fs.create(parent, name, caller).unwrap();
        fs.write(opened.handle, 0, b"draft").unwrap();
        fs.flush(opened.handle).unwrap();
        fs.release(opened.handle);
    }
    fs.make_folder(ROOT, "web02", 0, caller).unwrap();
    for name in ["a.img", "d.part", "latest"] {
        denied(fs.unlink(parent, name), "nodelete");
    }
    denied(fs.remove_folder(ROOT, "web02"), "nodelete");
    denied(fs.remove_folder(parent, "xvda"), "nodelete");
    denied(fs.rename(parent, "d.part", parent, "e.part", false), "nodelete");
    // To add and to name is what such a mount is for.
    fs.rename(parent, "d.part", parent, "b.img", false).unwrap();
    assert_eq!(names(&store), ["web01/a.img", "web01/b.img", "web01/e.part", "web01/xvda/a.img"]);
    assert!(store.vm_names().unwrap().contains(&vm("web02")));
}

#[test]
fn a_mount_collects_what_was_removed_through_it_when_it_is_told_to() {
    const LATER: Duration = Duration::from_secs(31);
    let world = World::new();
    for name in ["web01/a.img", "web01/b.img", "db02/a.img"] {
        put(&world.store(), name, &crate::world::noise(name.len() as u64, 100_000)).unwrap();
    }
    for (is_on, share) in [(false, 1), (true, 2)] {
        let options = Options { collect: is_on, ..Options::default() };
        let fs = MountedStore::new(Arc::new(world.store()), options);
        let parent = fs.lookup(ROOT, "web01").unwrap().ino;
        let before = bytes_of(&world, "vms/web01/packs");
        let gone = if is_on { "b.img" } else { "a.img" };
        let reading = fs.open(fs.lookup(parent, gone).unwrap().ino, false, false).unwrap();
        fs.unlink(parent, gone).unwrap();
        // Not at once, and not while it is read.
        for _ in 0..2 {
            fs.collect_due();
            assert_eq!(bytes_of(&world, "vms/web01/packs"), before);
            world.clock.advance(LATER);
        }
        fs.release(reading.handle);
        // Not while the VM is written through this mount either.
        let (_, writing) = fs.create(parent, "d.part", Caller { uid: 0, gid: 0 }).unwrap();
        world.clock.advance(LATER);
        fs.collect_due();
        assert_eq!(bytes_of(&world, "vms/web01/packs"), before);
        fs.release(writing.handle);
        fs.unlink(parent, "d.part").unwrap();
        world.clock.advance(LATER);
        let wait = fs.collect_due();
        assert!(wait >= Duration::from_millis(100), "{wait:?}");
        let after = bytes_of(&world, "vms/web01/packs");
        assert!(after * share <= before && (is_on || after == before), "{is_on}: {before} before, {after} after");
    }
    // The last of them took what the first had left, too; other VMs were never looked at.
    assert_eq!(bytes_of(&world, "vms/web01/packs"), 0);
    assert_eq!(names(&world.store()), ["db02/a.img"]);
}
