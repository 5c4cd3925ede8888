//! Tier 7: `attach`, `detach` and `reap` with real loop devices: what is attached for an owner is there once, is freed
//! completely, and is found again whatever was killed in between.

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::whole::{
    Cleared, Done, Freed, Loop, MIB, Mount, Place, SNAPFS, eventually, image, is_running, loops_of, need_loop,
    need_mount, same,
};

/// A store with two snapshots of one VM, not mounted yet.
fn scene() -> (Place, Vec<u8>, Vec<u8>) {
    let (place, a) = Place::with_snapshot();
    let b = image(2, 6);
    place.write("b", &b);
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
    assert_eq!(traces(&place), 0);
}

/// A scene for clones: the host's configuration tells the mountpoint and where clones are.
fn writable_scene() -> (Place, Vec<u8>, Vec<u8>) {
    let (place, a, b) = scene();
    place.write_host_config();
    (place, a, b)
}

/// The names of all clones.
fn clones(place: &Place) -> Vec<String> {
    let rows = place.snapfs("clones store --json").ok().json();
    rows.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
}

/// What clones hold in the store.
fn holds(place: &Place) -> usize {
    std::fs::read_dir(place.path("store/vms/web01/holds")).map_or(0, Iterator::count)
}

/// Nothing is left of any attachment.
#[track_caller]
fn nothing_is_left(place: &Place) {
    assert_eq!(place.snapfs("reap").ok().text(), "");
    assert!(loops_of(place).is_empty());
    assert_eq!(traces(place), 0);
    assert!(clones(place).is_empty());
    assert_eq!(holds(place), 0);
}

fn write_to(device: &Path, bytes: &[u8], offset: u64) {
    let file = File::options().write(true).open(device).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    file.sync_all().unwrap();
}

fn read_from(device: &Path, length: usize, offset: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    File::open(device).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn a_clone_comes_and_goes_with_its_device() {
    const NAME: &str = "attach::a_clone_comes_and_goes_with_its_device";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, a, _) = writable_scene();
    // In a mount with ro only clones can be written, and they can.
    for options in ["ro", ""] {
        let mount = place.mount(options);
        let _freed = Freed(&place);
        let words = "attach web01/latest --write --owner guest";
        let device = attached(place.snapfs(words));
        same(&std::fs::read(&device).unwrap(), &a, "a new clone");
        let told = place.shell(&format!("losetup --noheadings --output RO,DIO {}", device.display())).ok().text();
        assert_eq!(told.split_whitespace().collect::<Vec<_>>(), ["0", "1"], "{options}");
        write_to(&device, b"written", 4096);
        assert_eq!(read_from(&device, 7, 4096), b"written");
        assert_eq!((clones(&place).len(), holds(&place)), (1, 1));
        same(&place.read("mnt/web01/a.img"), &a, "the snapshot");
        // The same again is the same device. Anything else would lose what was written.
        assert_eq!(attached(place.snapfs(words)), device);
        place.snapfs("attach web01/latest --owner guest").fails(5, "attached for writing");
        place.snapfs("attach web01/a.img --write --owner guest").fails(5, "detach it first");
        place.snapfs("umount mnt").fails(5, "in use");
        assert_eq!(read_from(&device, 7, 4096), b"written");
        // Another owner has another clone.
        let other = attached(place.snapfs("attach web01/latest --write --owner other"));
        same(&std::fs::read(&other).unwrap(), &a, "another clone");
        assert_eq!(clones(&place).len(), 2);
        place.run(&["detach", other.to_str().unwrap()]).ok();
        assert_eq!(loops_of(&place), std::slice::from_ref(&device));
        for _ in 0..2 {
            place.snapfs("detach --owner guest").ok();
            nothing_is_left(&place);
        }
        // And the other way round.
        attached(place.snapfs("attach web01/latest --owner guest"));
        place.snapfs(words).fails(5, "attached read-only");
        attached(place.snapfs(&format!("{words} --fresh")));
        assert_eq!(clones(&place).len(), 1);
        let fresh = attached(place.snapfs(&format!("{words} --fresh")));
        same(&std::fs::read(&fresh).unwrap(), &a, "a clone made anew");
        assert_eq!(clones(&place).len(), 1);
        place.snapfs("detach --owner guest").ok();
        nothing_is_left(&place);
        mount.umount();
    }
}

#[test]
fn a_clone_that_is_kept_or_named_stays() {
    const NAME: &str = "attach::a_clone_that_is_kept_or_named_stays";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, a, _) = writable_scene();
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    place.snapfs("attach web01/latest --keep").fails(2, "--write");
    // That it is to be kept can be said in the beginning, later, and in the end.
    for (first, again, end) in [(" --keep", None, ""), ("", Some(" --keep"), ""), ("", None, " --keep")] {
        let words = "attach web01/latest --write --owner guest";
        let device = attached(place.snapfs(&format!("{words}{first}")));
        if let Some(again) = again {
            assert_eq!(attached(place.snapfs(&format!("{words}{again}"))), device);
        }
        write_to(&device, b"kept", 0);
        place.snapfs(&format!("detach --owner guest{end}")).ok();
        assert!(loops_of(&place).is_empty());
        assert_eq!(traces(&place), 0);
        assert_eq!(clones(&place), ["web01-a.img"]);
        assert_eq!(&place.read("mnt/.snapfs/clones/web01-a.img")[..4], b"kept");
        place.snapfs("unclone store web01-a.img").ok();
    }
    nothing_is_left(&place);

    assert_eq!(place.snapfs("clone store web01/a.img mine").code, 0);
    let path = place.path("mnt/.snapfs/clones/mine").to_str().unwrap().to_owned();
    let attach = |owner: &str, more: &[&str]| place.run(&[&["attach", &path, "--owner", owner], more].concat());
    let device = attached(attach("one", &["--write"]));
    write_to(&device, b"mine", 8192);
    // Two that write, or one that reads what another writes, would see a filesystem fall apart.
    attach("two", &["--write"]).fails(5, "is attached for one");
    attach("two", &[]).fails(5, "is attached for one");
    attach("one", &[]).fails(5, "attached for writing");
    assert_eq!(attached(attach("one", &["--write"])), device);
    place.snapfs("unclone store mine").fails(5, "open");
    place.snapfs("detach --owner one").ok();
    assert_eq!((clones(&place), traces(&place)), (vec!["mine".to_owned()], 0));
    // Any number may read.
    let readers = [attached(attach("one", &[])), attached(attach("two", &[]))];
    for reader in &readers {
        assert_eq!(read_from(reader, 4, 8192), b"mine");
        assert!(File::options().write(true).open(reader).and_then(|file| file.write_all_at(b"x", 0)).is_err());
    }
    attach("three", &["--write"]).fails(5, "is attached for");
    for owner in ["one", "two"] {
        place.snapfs(&format!("detach --owner {owner}")).ok();
    }
    // Through another mount of the folder of clones, too.
    place.shell("mkdir w && mount --bind mnt/.snapfs/clones w").ok();
    let bound = Cleared(&place, "w");
    let device = attached(place.run(&["attach", place.path("w/mine").to_str().unwrap(), "--write", "--owner", "one"]));
    assert_eq!(read_from(&device, 4, 8192), b"mine");
    write_to(&device, b"more", 8192);
    place.snapfs("detach --owner one").ok();
    place.shell("umount w").ok();
    drop(bound);
    assert_eq!(&place.read("mnt/.snapfs/clones/mine")[8192..8196], b"more");
    same(&place.read("mnt/web01/a.img"), &a, "the snapshot");
    place.snapfs("unclone store mine").ok();
    nothing_is_left(&place);
    mount.umount();
}

#[test]
fn where_nothing_can_be_written_no_clone_is_left() {
    const NAME: &str = "attach::where_nothing_can_be_written_no_clone_is_left";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, _, _) = writable_scene();
    let mount = place.mount("");
    let _freed = Freed(&place);
    // What a user's mount with ro is: the filesystem itself can not be written.
    place.shell("mount --internal-only --options remount,ro mnt").ok();
    let refused = place.snapfs("attach web01/latest --write --owner guest").fails(1, "cannot be written");
    assert_eq!(refused.err.lines().count(), 1, "{}", refused.err);
    nothing_is_left(&place);
    place.snapfs("attach web01/none.img --write").fails(3, "no such snapshot");
    place.snapfs("attach none/latest --write --keep").fails(3, "no such snapshot");
    nothing_is_left(&place);
    mount.umount();
}

#[test]
fn a_clone_that_another_daemon_writes_is_busy() {
    const NAME: &str = "attach::a_clone_that_another_daemon_writes_is_busy";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, _, _) = writable_scene();
    let mount = place.mount("");
    let other = place.mount_at("other", "");
    let _freed = Freed(&place);
    place.snapfs("clone store web01/a.img mine").ok();
    let path = place.path("mnt/.snapfs/clones/mine");
    let words = ["attach", path.to_str().unwrap(), "--write", "--owner", "guest"];
    let file = File::options().write(true).open(place.path("other/.snapfs/clones/mine")).unwrap();
    place.run(&words).fails(5, "is open in another process");
    assert!(loops_of(&place).is_empty());
    drop(file);
    eventually("it is closed", || place.run(&words).code == 0);
    place.snapfs("detach --owner guest").ok();
    assert_eq!(clones(&place), ["mine"]);
    other.umount();
    mount.umount();
}

#[test]
fn many_writers_at_a_time_get_a_clone_each() {
    const NAME: &str = "attach::many_writers_at_a_time_get_a_clone_each";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, a, _) = writable_scene();
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    let attach = |owner: &str| attached(place.snapfs(&format!("attach web01/latest --write --owner {owner}")));
    // Two calls each for four owners.
    let owners = ["1", "2", "3", "4"];
    let mut devices: Vec<PathBuf> = std::thread::scope(|scope| {
        let calls: Vec<_> = owners.iter().chain(&owners).map(|owner| scope.spawn(|| attach(owner))).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    assert_eq!(devices[..4], devices[4..]);
    devices.truncate(4);
    for (number, device) in devices.iter().enumerate() {
        write_to(device, &[number as u8; 4096], 8192);
    }
    for (number, device) in devices.iter().enumerate() {
        let mut want = a.clone();
        want[8192..12288].fill(number as u8);
        same(&std::fs::read(device).unwrap(), &want, "a clone");
    }
    assert_eq!((clones(&place).len(), loops_of(&place).len()), (4, 4));
    std::thread::scope(|scope| {
        for device in &devices {
            scope.spawn(|| place.run(&["detach", device.to_str().unwrap()]).ok());
        }
    });
    nothing_is_left(&place);
    mount.umount();
}

/// Runs `attach` with a losetup that kills it, before or after it has done what `at` says.
fn killed(place: &Place, words: &[&str], at: &str, is_after: bool) {
    let real = place.shell("command -v losetup").ok().text();
    let real = real.trim();
    let body = match is_after {
        // When somebody else was faster with the free device, it is not done yet: the program tries another one.
        true => format!("{real} \"$@\" || exit $?; kill -9 $PPID"),
        false => "kill -9 $PPID; exit 1".to_owned(),
    };
    let script = format!("#!/bin/sh\ncase $* in *{at}*) {body} ;; *) exec {real} \"$@\" ;; esac\n");
    let _ = std::fs::create_dir(place.path("bin"));
    place.write("bin/losetup", script.as_bytes());
    std::fs::set_permissions(place.path("bin/losetup"), PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", place.path("bin").display(), std::env::var("PATH").unwrap());
    let child = place.command(SNAPFS).args(words).env("PATH", path).spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert!(!ended.status.success() && !is_running(pid), "{at}");
}

#[test]
fn whatever_is_killed_leaves_no_clone_unnamed() {
    const NAME: &str = "attach::whatever_is_killed_leaves_no_clone_unnamed";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, a, _) = writable_scene();
    let mount = place.mount("");
    let _freed = Freed(&place);
    let words = ["attach", "web01/latest", "--write", "--owner", "guest"];
    // The clone is made, and nothing else; it has a device that is not in use; the device is in use.
    for (at, is_after, loops, reason) in
        [("--find", false, 0, "cut off"), ("--direct-io", false, 0, "its device is gone"), ("--direct-io", true, 1, "")]
    {
        for how in ["reap", "attach", "fresh", "detach"] {
            killed(&place, &words, at, is_after);
            eventually("losetup has ended", || loops_of(&place).len() == loops);
            assert_eq!(clones(&place).len(), 1, "{at}");
            match how {
                "reap" => {
                    let told = place.snapfs("reap").ok().text();
                    // With a device it may well be in use.
                    assert!(if loops == 0 { told.contains(reason) } else { told.is_empty() }, "{at}: {told}");
                }
                "attach" | "fresh" => {
                    let more: &[&str] = if how == "fresh" { &["--fresh"] } else { &[] };
                    let device = attached(place.run(&[&words, more].concat()));
                    same(&std::fs::read(&device).unwrap(), &a, "the device");
                    assert_eq!(loops_of(&place), [device], "{at}");
                    assert_eq!(clones(&place).len(), 1, "{at}");
                }
                _ => {}
            }
            place.snapfs("detach --owner guest").ok();
            nothing_is_left(&place);
        }
    }
    mount.umount();
}

/// Changes the record of an owner.
fn edit_record(place: &Place, owner: &str, edit: impl FnOnce(&mut serde_json::Value)) {
    let name = format!("attached/{owner}.json");
    let mut record: serde_json::Value = serde_json::from_slice(&place.read(&name)).unwrap();
    edit(&mut record);
    place.write(&name, record.to_string().as_bytes());
}

#[test]
fn a_record_of_what_was_never_made_drops_nobodys_clone() {
    const NAME: &str = "attach::a_record_of_what_was_never_made_drops_nobodys_clone";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, _, _) = writable_scene();
    let mount = place.mount("");
    let _freed = Freed(&place);
    // The record that was written right before the clone would have been made.
    attached(place.snapfs("attach web01/latest --write --owner guest"));
    edit_record(&place, "guest", |record| record["binding"] = serde_json::Value::Null);
    let record = place.read("attached/guest.json");
    for device in loops_of(&place) {
        drop(Loop(device));
    }
    eventually("the device is free", || loops_of(&place).is_empty());
    assert!(place.snapfs("reap").ok().text().contains("cut off"));
    nothing_is_left(&place);
    place.write("attached/guest.json", &record);
    assert!(place.snapfs("reap").ok().text().contains("cut off"));
    nothing_is_left(&place);
    // Meanwhile somebody else has made one of this name.
    place.snapfs("clone store web01/latest web01-a.img").ok();
    place.write("attached/guest.json", &record);
    assert!(place.snapfs("reap").ok().text().contains("cut off"));
    assert_eq!((clones(&place), traces(&place), holds(&place)), (vec!["web01-a.img".to_owned()], 0, 1));
    mount.umount();
}

/// Lets the daemon of a mount die and mounts the store anew.
fn restarted<'a>(place: &'a Place, mount: Mount<'_>, options: &str) -> Mount<'a> {
    mount.kill();
    place.mount(options)
}

#[test]
fn what_the_daemons_death_leaves_is_taken_up_or_freed() {
    const NAME: &str = "attach::what_the_daemons_death_leaves_is_taken_up_or_freed";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, a, _) = writable_scene();
    let _cleared = Cleared(&place, "mnt");
    for options in ["ro", ""] {
        let mount = place.mount(options);
        let _freed = Freed(&place);
        let read_only = attached(place.snapfs("attach web01/a.img --owner reader"));
        let words = "attach web01/latest --write --owner guest";
        let writable = attached(place.snapfs(words));
        write_to(&writable, b"flushed", 4096);
        let dropped = attached(place.snapfs("attach web01/latest --write --owner dropped"));
        write_to(&dropped, b"dropped", 4096);
        let mount = restarted(&place, mount, options);
        // The devices are there still, and belong to somebody: nothing is dropped.
        assert_eq!(place.snapfs("reap").ok().text(), "");
        assert_eq!(clones(&place).len(), 2);
        let device = attached(place.snapfs(words));
        assert_eq!(read_from(&device, 7, 4096), b"flushed");
        write_to(&device, b"goes on", 4096);
        assert_eq!(clones(&place).len(), 2);
        let device = attached(place.snapfs("attach web01/a.img --owner reader"));
        same(&std::fs::read(&device).unwrap(), &a, "a snapshot, attached anew");
        for owner in ["reader", "guest", "dropped"] {
            place.snapfs(&format!("detach --owner {owner}")).ok();
        }
        nothing_is_left(&place);
        // The old devices are free, too: they show nothing, or what others have put there since.
        for device in [read_only, writable, dropped] {
            let shown = Path::new("/sys/block").join(device.file_name().unwrap()).join("loop/backing_file");
            let shown = std::fs::read_to_string(shown).unwrap_or_default();
            assert!(!shown.starts_with(place.path("mnt").to_str().unwrap()), "{shown}");
        }
        // Freed without a daemon at all.
        attached(place.snapfs("attach web01/a.img --owner reader"));
        attached(place.snapfs(words));
        mount.kill();
        for owner in ["reader", "guest"] {
            place.snapfs(&format!("detach --owner {owner}")).ok();
        }
        let mount = place.mount(options);
        nothing_is_left(&place);
        mount.umount();
    }
}

#[test]
fn a_boot_of_the_host_is_noticed() {
    const NAME: &str = "attach::a_boot_of_the_host_is_noticed";
    need_mount!(NAME);
    need_loop!(NAME);
    let (place, _, _) = writable_scene();
    let mount = place.mount("");
    let _freed = Freed(&place);
    let words = "attach web01/latest --write --owner guest";
    let device = attached(place.snapfs(words));
    write_to(&device, b"flushed", 4096);
    // As if the host had been restarted: this device is somebody else's.
    edit_record(&place, "guest", |record| record["binding"]["boot"] = "another".into());
    let again = attached(place.snapfs(words));
    assert_ne!(again, device);
    assert_eq!(read_from(&again, 7, 4096), b"flushed");
    assert_eq!((clones(&place).len(), loops_of(&place).len()), (1, 2));
    edit_record(&place, "guest", |record| record["binding"]["boot"] = "another".into());
    for device in loops_of(&place) {
        drop(Loop(device));
    }
    eventually("the devices are free", || loops_of(&place).is_empty());
    let told = place.snapfs("reap").ok().text();
    assert!(told.contains("its device is gone"), "{told}");
    nothing_is_left(&place);
    mount.umount();
}
