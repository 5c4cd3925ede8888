//! Tier 7: `attach`, `detach` and `reap` with real loop devices: what is attached for an owner is there once, is freed
//! completely, and is found again whatever was killed in between.

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::whole::{Done, Freed, Loop, MIB, Place, SNAPFS, image, is_running, loops_of, need_loop, need_mount, same};

/// A store with two snapshots of one VM, not mounted yet.
fn scene() -> (Place, Vec<u8>, Vec<u8>) {
    let place = Place::new();
    let (a, b) = (image(1, 8), image(2, 6));
    place.write("a", &a);
    place.write("b", &b);
    place.snapfs("backup store web01/a.img a").ok();
    (place, a, b)
}

fn attached(done: Done) -> PathBuf {
    PathBuf::from(done.ok().text().trim_end())
}

/// What is left of attachments: records, locks.
fn traces(place: &Place) -> usize {
    std::fs::read_dir(place.path("attached")).map_or(0, Iterator::count)
}

#[test]
fn a_snapshot_becomes_a_device_that_nobody_can_write_to() {
    const NAME: &str = "attach::a_snapshot_becomes_a_device_that_nobody_can_write_to";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, a, _) = scene();
    // Read-only for the device even where the mount is not.
    for options in ["ro", ""] {
        let mount = place.mount(options);
        let _freed = Freed(&place);
        let device = attached(place.run(&["attach", place.path("mnt/web01/a.img").to_str().unwrap()]));
        same(&std::fs::read(&device).unwrap(), &a, "the device");
        let written = File::options().write(true).open(&device).and_then(|file| file.write_all_at(b"x", 0));
        assert!(written.is_err(), "{options}");
        let direct = place.shell(&format!("losetup --noheadings --output RO,DIO {}", device.display())).ok().text();
        assert_eq!(direct.split_whitespace().collect::<Vec<_>>(), ["1", "1"]);
        place.snapfs("umount mnt").fails(5, "in use");
        place.run(&["detach", device.to_str().unwrap()]).ok();
        assert!(loops_of(&place).is_empty());
        place.run(&["detach", device.to_str().unwrap()]).ok();
        assert_eq!(traces(&place), 0);
        mount.umount();
    }
}

#[test]
fn for_an_owner_the_same_is_attached_once() {
    const NAME: &str = "attach::for_an_owner_the_same_is_attached_once";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, a, b) = scene();
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    place.write("host.toml", format!("mountpoint = {:?}\n", place.path("mnt")).as_bytes());
    let first = attached(place.snapfs("attach web01/latest --owner one"));
    assert_eq!(attached(place.snapfs("attach web01/latest --owner one")), first);
    let other = attached(place.snapfs("attach web01/latest --owner two"));
    assert_ne!(other, first);
    assert_eq!(loops_of(&place).len(), 2);
    // It stays with what was the newest then, for this owner also when it is asked for again.
    place.snapfs("backup store web01/b.img b").ok();
    crate::whole::eventually("the new snapshot is seen", || place.exists("mnt/web01/b.img"));
    assert_eq!(attached(place.snapfs("attach web01/latest --owner one")), first);
    same(&std::fs::read(&first).unwrap(), &a, "the device of an older latest");
    // Another target takes its place.
    let newer = attached(place.snapfs("attach web01/b.img --owner one"));
    same(&std::fs::read(&newer).unwrap(), &b, "the device of another target");
    assert_eq!(loops_of(&place).len(), 2);
    // A device that was freed by hand is made anew.
    place.shell(&format!("losetup --detach {}", newer.display())).ok();
    crate::whole::eventually("it is free", || loops_of(&place).len() == 1);
    let again = attached(place.snapfs("attach web01/b.img --owner one"));
    same(&std::fs::read(&again).unwrap(), &b, "the device made anew");
    for owner in ["one", "two", "two", "three"] {
        place.snapfs(&format!("detach --owner {owner}")).ok();
    }
    assert!(loops_of(&place).is_empty());
    assert_eq!(traces(&place), 0);
    mount.umount();
}

#[test]
fn what_cannot_be_attached_is_told() {
    const NAME: &str = "attach::what_cannot_be_attached_is_told";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, _, _) = scene();
    let mount = place.mount("seal_after=1h");
    let _freed = Freed(&place);
    place.shell("cp b mnt/web01/draft.img").ok();
    let absolute = |name: &str| place.path(name).to_str().unwrap().to_owned();
    for (target, code, word) in [
        (absolute("mnt/web01/none.img"), 3, "no such snapshot"),
        (absolute("mnt/none/latest"), 3, "no such snapshot"),
        (absolute("mnt/web01"), 1, "folder"),
        (absolute("mnt/web01/draft.img"), 1, "draft"),
        (absolute("mnt/.snapfs/status"), 1, "is no snapshot"),
        (absolute("b"), 1, "lies in no mounted store"),
        (String::new(), 1, "no target"),
        ("web01/a.img".to_owned(), 1, "mountpoint"),
        ("a/b/c/d".to_owned(), 1, "snapshot name"),
    ] {
        let done = place.run(&["attach", &target]).fails(code, word);
        assert_eq!(done.err.lines().count(), 1, "{}", done.err);
        assert!(done.out.is_empty());
    }
    place.write("host.toml", format!("mountpoint = {:?}\n", place.path("elsewhere")).as_bytes());
    place.snapfs("attach web01/a.img").fails(3, "no store is mounted at");
    place.run(&["attach", &absolute("mnt/web01/a.img"), "--owner", "a b"]).fails(2, "owner");
    place.run(&["detach", "/dev/null"]).fails(2, "no loop device");
    place.run(&["detach"]).fails(2, "required");
    // Devices that others have made are theirs.
    let foreign = Loop::attach(&place.path("a"), &["--read-only"]).unwrap();
    place.run(&["detach", foreign.0.to_str().unwrap()]).fails(1, "was not made by");
    drop(foreign);
    assert!(loops_of(&place).is_empty());
    assert_eq!(traces(&place), 0);
    // A mount whose daemon has died says so, at once.
    mount.kill();
    let _cleared = crate::whole::Cleared(&place, "mnt");
    place.run(&["attach", &absolute("mnt/web01/a.img")]).fails(1, "has died");
}

#[test]
fn a_device_in_use_is_busy_and_freed_by_its_last_user() {
    const NAME: &str = "attach::a_device_in_use_is_busy_and_freed_by_its_last_user";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, a, _) = scene();
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    let path = place.path("mnt/web01/a.img");
    let device = attached(place.run(&["attach", path.to_str().unwrap(), "--owner", "guest"]));
    let user = File::open(&device).unwrap();
    place.run(&["detach", "--owner", "guest"]).fails(5, "is in use");
    let mut bytes = vec![0; MIB];
    user.read_exact_at(&mut bytes, MIB as u64).unwrap();
    same(&bytes, &a[MIB..2 * MIB], "what its user reads");
    assert!(traces(&place) > 0, "it is remembered");
    drop(user);
    crate::whole::eventually("it is freed", || loops_of(&place).is_empty());
    let reaped = place.snapfs("reap").ok().text();
    assert!(reaped.contains("its device is gone"), "{reaped}");
    assert_eq!(traces(&place), 0);
    mount.umount();
}

#[test]
fn whatever_is_killed_leaves_no_device_unnamed() {
    const NAME: &str = "attach::whatever_is_killed_leaves_no_device_unnamed";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, _, _) = scene();
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    std::fs::create_dir(place.path("bin")).unwrap();
    let path = place.path("mnt/web01/a.img");
    let words = ["attach", path.to_str().unwrap(), "--owner", "guest"];
    let real = place.shell("command -v losetup").ok().text();
    // In place of losetup: one that kills whoever calls it, before or after it has done its work.
    for (when, body, loops) in
        [("before", "kill -9 $PPID; exit 1", 0), ("after", &format!("{} \"$@\"; kill -9 $PPID", real.trim()), 1)]
    {
        let script = format!("#!/bin/sh\ncase $* in *--direct-io*) {body} ;; *) exec {} \"$@\" ;; esac\n", real.trim());
        place.write("bin/losetup", script.as_bytes());
        std::fs::set_permissions(place.path("bin/losetup"), PermissionsExt::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", place.path("bin").display(), std::env::var("PATH").unwrap());
        let child = place.command(SNAPFS).args(words).env("PATH", path).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let ended = child.wait_with_output().unwrap();
        assert!(!ended.status.success() && !is_running(pid), "{when}");
        crate::whole::eventually("losetup has ended", || loops_of(&place).len() == loops);
        let device = attached(place.run(&words));
        assert_eq!(loops_of(&place), [device], "{when}");
        place.snapfs("detach --owner guest").ok();
        assert!(loops_of(&place).is_empty(), "{when}");
        assert_eq!(traces(&place), 0, "{when}");
    }
    mount.umount();
}

#[test]
fn many_at_a_time_get_a_device_each() {
    const NAME: &str = "attach::many_at_a_time_get_a_device_each";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, _, _) = scene();
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    let path = place.path("mnt/web01/a.img");
    let attach = |owner: &str| attached(place.run(&["attach", path.to_str().unwrap(), "--owner", owner]));
    // Two calls each for four owners.
    let owners = ["1", "2", "3", "4"];
    let mut devices: Vec<PathBuf> = std::thread::scope(|scope| {
        let calls: Vec<_> = owners.iter().chain(&owners).map(|owner| scope.spawn(|| attach(owner))).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    assert_eq!(devices[..4], devices[4..]);
    devices.truncate(4);
    devices.sort();
    devices.dedup();
    assert_eq!(devices.len(), 4);
    assert_eq!(loops_of(&place), devices);
    std::thread::scope(|scope| {
        for device in &devices {
            scope.spawn(|| place.run(&["detach", device.to_str().unwrap()]).ok());
        }
    });
    assert!(loops_of(&place).is_empty());
    assert_eq!(traces(&place), 0);
    mount.umount();
}

#[test]
fn without_root_it_is_denied_in_one_line() {
    const NAME: &str = "attach::without_root_it_is_denied_in_one_line";
    need_loop!(NAME);
    crate::whole::need_tools!(NAME, "setpriv");
    let place = Place::without_store();
    let line = format!("setpriv --reuid=65534 --clear-groups {SNAPFS} attach /none");
    if place.shell(&format!("setpriv --reuid=65534 --clear-groups test -x {SNAPFS}")).code != 0 {
        return crate::whole::skip(NAME, "the program lies where only root may look");
    }
    let done = place.shell(&line).fails(1, "attached");
    assert_eq!(done.err.lines().count(), 1, "{}", done.err);
    assert!(!Path::new("/run/snapfs/attached/none").exists());
}
