//! Tier 7: the real mount with real tools: what copies in and out, when a draft becomes a snapshot, and what is left
//! after signals, crashes and a second mount.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;

use rustix::process::Signal;

use crate::whole::{
    Cleared, Disk, Loop, MIB, Place, SNAPFS, eventually, image, is_root, is_running, need_loop, need_mount, need_tools,
    same, signal,
};
use crate::world::noise;

/// Small enough that a test need not wait, large enough that a copy is not sealed between two of its steps.
const SOON: &str = "seal_after=200ms";

/// For tests in which nothing may be sealed by time.
const NEVER: &str = "seal_after=1h";

fn wait_for_seal(place: &Place, name: &str) {
    eventually(&format!("{name} is sealed"), || {
        place.path(name).metadata().is_ok_and(|of| of.mode() & 0o7777 == 0o444)
    });
}

/// An image that exercises a copy: noise, written zeros, a hole, an odd end.
fn make_image(place: &Place, name: &str, seed: u64) -> Vec<u8> {
    let mut bytes = image(seed, 8);
    bytes.extend_from_slice(&noise(seed + 1, 70_003));
    let file = File::create(place.path(name)).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(&bytes[..5 * MIB], 0).unwrap();
    file.write_all_at(&bytes[6 * MIB..], 6 * MIB as u64).unwrap();
    bytes
}

/// Copies an image in by a line of shell: it is right at once, and a snapshot that is right after a clean unmount.
fn copies_in(name: &str, line: &str) {
    let place = Place::new();
    // Not sealed by time: some tools do more after they have closed the file, and this machine may be slow.
    let mount = place.mount(NEVER);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    let bytes = make_image(&place, "image.raw", 1);
    place.shell(line).ok();
    same(&place.read("mnt/web01/a.img"), &bytes, name);
    mount.umount();
    let mount = place.mount("ro");
    assert_eq!(place.mode("mnt/web01/a.img"), 0o444);
    same(&place.read("mnt/web01/a.img"), &bytes, name);
    mount.umount();
    same(&place.snapfs("restore store web01/latest -").ok().out, &bytes, name);
    place.snapfs("check store --read-data").ok();
}

/// One test for each way to copy in: `name, tools, line of shell`.
macro_rules! copy_tests {
    ($($name:ident: [$($tool:literal),*] $line:literal,)*) => {$(
        #[test]
        fn $name() {
            const NAME: &str = concat!("mount::", stringify!($name));
            need_mount!(NAME);
            $(need_tools!(NAME, $tool);)*
            copies_in(NAME, $line);
        }
    )*};
}

copy_tests! {
    cp_copies_in: [] "cp image.raw mnt/web01/a.img",
    cp_with_holes_copies_in: [] "cp --sparse=always image.raw mnt/web01/a.img",
    cp_without_holes_copies_in: [] "cp --sparse=never image.raw mnt/web01/a.img",
    cat_copies_in: [] "cat image.raw > mnt/web01/a.img",
    dd_copies_in: [] "dd status=none if=image.raw of=mnt/web01/a.img bs=64k conv=fsync",
    dd_in_odd_pieces_copies_in: [] "dd status=none if=image.raw of=mnt/web01/a.img bs=4080",
    dd_in_sectors_copies_in: [] "dd status=none if=image.raw of=mnt/web01/a.img bs=512 conv=sparse",
    dd_direct_copies_in: [] "dd status=none if=image.raw of=mnt/web01/a.img bs=1M oflag=direct",
    dd_in_two_halves_copies_in: [] "dd status=none if=image.raw of=mnt/web01/a.img bs=1M skip=4 seek=4 && \
        dd status=none if=image.raw of=mnt/web01/a.img bs=1M count=4 conv=notrunc",
    tar_copies_in: ["tar"] "mv image.raw a.img && tar -Scf - a.img | tar -Sxf - -C mnt/web01 --no-same-owner",
    rsync_copies_in: ["rsync"] "rsync image.raw mnt/web01/a.img",
    rsync_in_place_copies_in: ["rsync"] "rsync --inplace image.raw mnt/web01/a.img",
    rsync_with_holes_copies_in: ["rsync"] "rsync -aS image.raw mnt/web01/a.img",
    part_and_rename_copies_in: [] "cp image.raw mnt/web01/a.part && mv mnt/web01/a.part mnt/web01/a.img",
}

#[test]
fn qemu_img_copies_in() {
    const NAME: &str = "mount::qemu_img_copies_in";
    need_mount!(NAME);
    need_tools!(NAME, "qemu-img");
    // It rounds sizes up to sectors.
    let place = Place::new();
    let bytes = image(1, 8);
    place.write("image.raw", &bytes);
    let mount = place.mount(NEVER);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    place.shell("qemu-img convert -f raw -O raw image.raw mnt/web01/a.img").ok();
    place.shell("truncate -s 8M mnt/web01/b.img && qemu-img convert -n -f raw -O raw image.raw mnt/web01/b.img").ok();
    place.shell("qemu-img convert -f raw -O qcow2 image.raw x.qcow2").ok();
    place.shell("qemu-img convert -m 8 -W -f qcow2 -O raw x.qcow2 mnt/web01/c.img").ok();
    for name in ["a.img", "b.img", "c.img"] {
        place.shell(&format!("qemu-img compare -f raw -F raw image.raw mnt/web01/{name}")).ok();
    }
    mount.umount();
    for name in ["a.img", "b.img", "c.img"] {
        same(&place.snapfs(&format!("restore store web01/{name} -")).ok().out, &bytes, name);
    }
}

#[test]
fn a_file_is_what_the_same_commands_make_elsewhere() {
    const NAME: &str = "mount::a_file_is_what_the_same_commands_make_elsewhere";
    need_mount!(NAME);
    need_tools!(NAME, "fallocate", "truncate");
    let place = Place::new();
    let mount = place.mount(NEVER);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    place.write("image.raw", &noise(3, 7 * MIB));
    // The temporary folder's own file system may not know all of fallocate: then the test has nothing to compare with.
    let steps = [
        "cp image.raw FILE",
        "fallocate --punch-hole --offset 1000000 --length 3000000 FILE",
        "fallocate --zero-range --offset 6000000 --length 5000000 FILE",
        "truncate -s 5000001 FILE",
        "fallocate --keep-size --offset 0 --length 20000000 FILE",
        "fallocate --zero-range --keep-size --offset 4999000 --length 10000 FILE",
        "dd status=none if=image.raw of=FILE bs=4095 count=7 seek=900 conv=notrunc",
        "truncate -s 9000000 FILE",
        "fallocate --offset 8000000 --length 2000000 FILE",
        "dd status=none if=image.raw of=FILE bs=1 count=1 seek=12345678 conv=notrunc",
        "truncate -s 12000000 FILE",
    ];
    for step in steps {
        let plain = place.shell(&step.replace("FILE", "plain"));
        if plain.code != 0 && plain.err.contains("not supported") {
            return crate::whole::skip(NAME, "the temporary folder does not know fallocate");
        }
        plain.ok();
        place.shell(&step.replace("FILE", "mnt/web01/a.part")).ok();
        same(&place.read("mnt/web01/a.part"), &place.read("plain"), step);
    }
    std::fs::rename(place.path("mnt/web01/a.part"), place.path("mnt/web01/a.img")).unwrap();
    assert_eq!(place.mode("mnt/web01/a.img"), 0o444);
    mount.umount();
    same(&place.snapfs("restore store web01/a.img -").ok().out, &place.read("plain"), "the snapshot");
}

#[test]
fn holes_are_true() {
    need_mount!("mount::holes_are_true");
    let place = Place::new();
    let mount = place.mount(SOON);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    let mut bytes = vec![0; 6 * MIB];
    bytes[2 * MIB..2 * MIB + 8192].copy_from_slice(&noise(1, 8192));
    place.write("mnt/web01/a.img", &bytes);
    wait_for_seal(&place, "mnt/web01/a.img");
    let of = place.path("mnt/web01/a.img").metadata().unwrap();
    assert_eq!((of.len(), of.blocks()), (6 << 20, 16));
    let file = File::open(place.path("mnt/web01/a.img")).unwrap();
    let at = |from| rustix::fs::seek(&file, from).ok();
    assert_eq!(at(rustix::fs::SeekFrom::Data(0)), Some(2 << 20));
    assert_eq!(at(rustix::fs::SeekFrom::Hole(2 << 20)), Some((2 << 20) + 8192));
    assert_eq!(at(rustix::fs::SeekFrom::Data((2 << 20) + 8192)), None);
    drop(file);
    place.shell("cp --sparse=auto mnt/web01/a.img out.img").ok();
    same(&place.read("out.img"), &bytes, "a copy out");
    assert!(place.path("out.img").metadata().unwrap().blocks() <= 64, "the copy out is not sparse");
    mount.umount();
}

#[test]
fn a_sealed_snapshot_is_immutable() {
    need_mount!("mount::a_sealed_snapshot_is_immutable");
    let place = Place::new();
    let mount = place.mount(SOON);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    let bytes = image(1, 3);
    place.write("mnt/web01/a.img", &bytes);
    wait_for_seal(&place, "mnt/web01/a.img");
    for options in
        [File::options().write(true), File::options().append(true), File::options().write(true).truncate(true)]
    {
        let refused = options.open(place.path("mnt/web01/a.img")).unwrap_err();
        assert!(matches!(refused.raw_os_error(), Some(libc::EPERM | libc::EACCES)), "{refused}");
    }
    place.write("mnt/web01/b.part", &bytes[..MIB]);
    let refused = std::fs::rename(place.path("mnt/web01/b.part"), place.path("mnt/web01/a.img")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EEXIST));
    std::fs::create_dir(place.path("mnt/web02")).unwrap();
    let refused = std::fs::rename(place.path("mnt/web01/a.img"), place.path("mnt/web02/a.img")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EXDEV));
    same(&place.read("mnt/web01/a.img"), &bytes, "all the same");
    assert_eq!(std::fs::read_link(place.path("mnt/web01/latest")).unwrap().to_str(), Some("a.img"));
    std::fs::remove_file(place.path("mnt/web01/a.img")).unwrap();
    place.snapfs("show store web01/a.img").fails(3, "web01/a.img");
    mount.umount();
}

#[test]
fn a_draft_waits_for_its_time() {
    need_mount!("mount::a_draft_waits_for_its_time");
    let place = Place::new();
    let mount = place.mount(NEVER);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    let bytes = image(1, 3);
    place.write("mnt/web01/a.img", &bytes[..MIB]);
    place.write("mnt/web01/b.img.part", &bytes);
    assert_eq!((place.mode("mnt/web01/a.img"), place.mode("mnt/web01/b.img.part")), (0o600, 0o600));
    assert!(!place.exists("mnt/web01/latest"));
    assert_eq!(place.snapfs("list store --json").ok().json(), serde_json::json!([]));
    assert_eq!(place.snapfs("list store --drafts --json").ok().json().as_array().unwrap().len(), 2);
    // It can be opened again and goes on where it was.
    let mut file = File::options().append(true).open(place.path("mnt/web01/a.img")).unwrap();
    file.write_all(&bytes[MIB..]).unwrap();
    drop(file);
    same(&place.read("mnt/web01/a.img"), &bytes, "an appended draft");
    // A rename to a plain name seals at once.
    std::fs::rename(place.path("mnt/web01/b.img.part"), place.path("mnt/web01/b.img")).unwrap();
    assert_eq!((place.mode("mnt/web01/b.img"), place.mode("mnt/web01/a.img")), (0o444, 0o600));
    assert_eq!(std::fs::read_link(place.path("mnt/web01/latest")).unwrap().to_str(), Some("b.img"));
    // Names of drafts and files without data are never sealed by time.
    place.write("mnt/web01/c.part", &bytes);
    File::create(place.path("mnt/web01/zeros.img")).unwrap().set_len(1 << 30).unwrap();
    // A clean end seals what was closed and has data and a plain name.
    mount.umount();
    let mount = place.mount(SOON);
    assert_eq!(place.mode("mnt/web01/a.img"), 0o444);
    for name in ["mnt/web01/c.part", "mnt/web01/zeros.img"] {
        assert_eq!(place.mode(name), 0o600, "{name}");
        File::options().append(true).open(place.path(name)).unwrap().write_all(b"more").unwrap();
    }
    wait_for_seal(&place, "mnt/web01/zeros.img");
    assert_eq!(place.mode("mnt/web01/c.part"), 0o600);
    mount.umount();
    place.snapfs("check store --read-data").ok();
}

#[test]
fn i9_what_close_and_fsync_acknowledged_survives_kill_9() {
    need_mount!("mount::i9_what_close_and_fsync_acknowledged_survives_kill_9");
    let place = Place::new();
    let _cleared = Cleared(&place, "mnt");
    let mount = place.mount(NEVER);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    let bytes = image(1, 5);
    place.write("mnt/web01/closed.img", &bytes);
    let mut open = File::create(place.path("mnt/web01/open.img")).unwrap();
    open.write_all(&bytes[..3 * MIB]).unwrap();
    open.sync_all().unwrap();
    open.write_all(&bytes[3 * MIB..]).unwrap();
    mount.kill();
    drop(open);
    // A request that was under way while the daemon died is answered ECONNABORTED: the next one tells.
    let is_dead = |e: std::io::Error| e.raw_os_error() == Some(libc::ENOTCONN);
    eventually("the mount is dead", || std::fs::read_dir(place.path("mnt")).is_err_and(is_dead));
    // The dead mountpoint is taken over, and what was closed before gets its grace time anew.
    let mount = place.mount(SOON);
    same(&place.read("mnt/web01/closed.img"), &bytes, "closed");
    let open = place.read("mnt/web01/open.img");
    assert!(open.len() >= 3 * MIB, "{} bytes", open.len());
    same(&open, &bytes[..open.len()], "synced");
    wait_for_seal(&place, "mnt/web01/closed.img");
    mount.kill();
    // A dead one can be unmounted too.
    place.snapfs("umount mnt").ok();
    place.snapfs("umount mnt").fails(3, "mnt");
    place.snapfs("gc store --exact").ok();
    place.snapfs("check store --read-data").ok();
}

#[test]
fn a_copy_that_is_cut_off_leaves_a_whole_store() {
    need_mount!("mount::a_copy_that_is_cut_off_leaves_a_whole_store");
    let place = Place::new();
    let _cleared = Cleared(&place, "mnt");
    let bytes = noise(1, 24 * MIB);
    place.write("image.raw", &bytes);
    for cut in 0..4 {
        let mount = place.mount(SOON);
        let name = format!("mnt/web01/{cut}.img");
        if cut == 0 {
            std::fs::create_dir(place.path("mnt/web01")).unwrap();
            place.shell("cp image.raw mnt/web01/base.img").ok();
        }
        let mut file = File::create(place.path(&name)).unwrap();
        file.write_all(&noise(cut + 2, (cut as usize * 5 + 1) * MIB)).unwrap();
        mount.kill();
        drop(file);
        place.snapfs("check store").ok();
        same(&place.snapfs("restore store web01/base.img -").ok().out, &bytes, "the snapshot before");
    }
    let mount = place.mount(SOON);
    place.shell("cp image.raw mnt/web01/last.img").ok();
    same(&place.read("mnt/web01/last.img"), &bytes, "the next copy");
    mount.umount();
    place.snapfs("gc store --exact").ok();
    place.snapfs("check store --read-data").ok();
}

#[test]
fn sigterm_commits_and_unmounts() {
    need_mount!("mount::sigterm_commits_and_unmounts");
    let place = Place::new();
    let _cleared = Cleared(&place, "mnt");
    let bytes = image(1, 4);
    let mount = place.mount(NEVER);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    place.write("mnt/web01/a.img", &bytes);
    signal(mount.pid, Signal::TERM);
    mount.wait();
    assert!(!place.exists("mnt/web01"), "still mounted");
    same(&place.snapfs("restore store web01/a.img -").ok().out, &bytes, "a closed file");

    // With a file open the mount goes out of sight, and the daemon stays until the file is closed.
    let mount = place.mount(NEVER);
    let mut file = File::create(place.path("mnt/web01/b.img")).unwrap();
    file.write_all(&bytes[..MIB]).unwrap();
    signal(mount.pid, Signal::TERM);
    eventually("the mount goes out of sight", || !place.exists("mnt/web01"));
    assert!(is_running(mount.pid));
    file.write_all(&bytes[MIB..]).unwrap();
    drop(file);
    mount.wait();
    same(&place.snapfs("restore store web01/b.img -").ok().out, &bytes, "an open file");
    place.snapfs("check store --read-data").ok();
}

#[test]
fn umount_returns_when_all_is_committed() {
    need_mount!("mount::umount_returns_when_all_is_committed");
    let place = Place::new();
    let bytes = noise(1, 32 * MIB);
    place.write("image.raw", &bytes);
    let mount = place.mount("");
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    place.shell("cp image.raw mnt/web01/a.img").ok();
    // Asserts that the daemon is gone.
    mount.umount();
    place.write("b.img", &bytes[..MIB]);
    place.snapfs("backup store web01/b.img b.img").ok();
    same(&place.snapfs("restore store web01/a.img -").ok().out, &bytes, "the copy");
    // One that is in use is not unmounted.
    let mount = place.mount("");
    let file = File::open(place.path("mnt/web01/a.img")).unwrap();
    place.snapfs("umount mnt").fails(5, "in use");
    drop(file);
    mount.umount();
}

#[test]
fn what_the_kernel_has_forgotten_is_found_again_under_its_number() {
    need_mount!("mount::what_the_kernel_has_forgotten_is_found_again_under_its_number");
    if !rustix::process::geteuid().is_root() {
        println!("skipped: mount::what_the_kernel_has_forgotten_is_found_again_under_its_number: needs root");
        return;
    }
    let place = Place::new();
    let mount = place.mount(SOON);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    let bytes = image(2, 9);
    place.write("mnt/web01/a.part", &bytes);
    std::fs::rename(place.path("mnt/web01/a.part"), place.path("mnt/web01/a.img")).unwrap();
    let mut open = File::open(place.path("mnt/web01/a.img")).unwrap();
    let names: Vec<String> = (0..200).map(|n| format!("mnt/web01/{n}.part")).collect();
    for name in &names {
        place.write(name, b"");
    }
    let numbers = || names.iter().map(|name| place.path(name).metadata().unwrap().ino()).collect::<Vec<_>>();
    let before = numbers();
    for _ in 0..3 {
        std::fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        assert_eq!(numbers(), before);
    }
    let mut read = Vec::new();
    open.read_to_end(&mut read).unwrap();
    same(&read, &bytes, "a file that was open all the time");
    drop(open);
    mount.umount();
}

#[test]
fn two_mounts_of_one_store_see_each_other() {
    need_mount!("mount::two_mounts_of_one_store_see_each_other");
    let place = Place::new();
    let (one, two) = (place.mount_at("one", SOON), place.mount_at("two", SOON));
    std::fs::create_dir(place.path("one/web01")).unwrap();
    let bytes = image(1, 3);
    place.write("one/web01/a.img", &bytes);
    eventually("the other mount shows it", || place.exists("two/web01/a.img"));
    same(&place.read("two/web01/a.img"), &bytes, "through the other mount");
    wait_for_seal(&place, "two/web01/a.img");
    let ino = |name: &str| place.path(name).metadata().unwrap().ino();
    assert_eq!(ino("one/web01/a.img"), ino("two/web01/a.img"));
    // One VM has one writer; another VM has its own.
    let open = File::create(place.path("one/web01/b.img")).unwrap();
    let refused = File::create(place.path("two/web01/c.img")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
    std::fs::create_dir(place.path("two/web02")).unwrap();
    place.write("two/web02/c.img", &bytes);
    drop(open);
    eventually("the VM is free", || File::create(place.path("two/web01/c.img")).is_ok());
    std::fs::remove_file(place.path("two/web01/a.img")).unwrap();
    eventually("it is gone here too", || !place.exists("one/web01/a.img"));
    two.umount();
    one.umount();
    place.snapfs("check store --read-data").ok();
}

#[test]
fn a_mount_and_commands_write_side_by_side() {
    need_mount!("mount::a_mount_and_commands_write_side_by_side");
    let place = Place::new();
    let mount = place.mount(SOON);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    let bytes = image(1, 3);
    place.write("image.raw", &bytes);
    let mut open = File::create(place.path("mnt/web01/a.img")).unwrap();
    open.write_all(&bytes[..MIB]).unwrap();
    place.snapfs("backup store web01/b.img image.raw").fails(5, "web01");
    place.snapfs("backup store web02/b.img image.raw").ok();
    eventually("what a command made shows in the mount", || place.exists("mnt/web02/b.img"));
    same(&place.read("mnt/web02/b.img"), &bytes, "made by a command");
    open.write_all(&bytes[MIB..]).unwrap();
    drop(open);
    wait_for_seal(&place, "mnt/web01/a.img");
    place.snapfs("backup store web01/b.img image.raw").ok();
    let link = place.path("mnt/web01/latest");
    eventually("latest follows", || std::fs::read_link(&link).is_ok_and(|to| to.to_str() == Some("b.img")));
    // A reader goes on while its snapshot is forgotten and collected (I6).
    let mut reader = File::open(place.path("mnt/web01/a.img")).unwrap();
    let mut head = vec![0; 4096];
    reader.read_exact(&mut head).unwrap();
    place.snapfs("forget store web01/a.img").ok();
    place.snapfs("gc store").ok();
    reader.seek(SeekFrom::Start(0)).unwrap();
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    same(&all, &bytes, "a forgotten snapshot that is open");
    drop(reader);
    mount.umount();
    place.snapfs("check store --read-data").ok();
}

#[test]
fn a_copy_inside_a_vm_is_a_clone() {
    need_mount!("mount::a_copy_inside_a_vm_is_a_clone");
    let place = Place::new();
    let mount = place.mount(SOON);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    let bytes = noise(1, 16 * MIB);
    place.write("mnt/web01/a.img", &bytes);
    wait_for_seal(&place, "mnt/web01/a.img");
    place.shell("cp mnt/web01/a.img mnt/web01/b.img").ok();
    same(&place.read("mnt/web01/b.img"), &bytes, "the clone");
    wait_for_seal(&place, "mnt/web01/b.img");
    let show = place.snapfs("show store web01/b.img --json").ok().json();
    assert_eq!(show["levels"]["new_bytes"].as_u64(), Some(0), "{show}");
    mount.umount();
}

#[test]
fn loop_devices_work_on_snapshots() {
    const NAME: &str = "mount::loop_devices_work_on_snapshots";
    need_mount!(NAME);
    need_loop!(NAME);
    need_tools!(NAME, "mke2fs", "e2fsck", "mount");
    let place = Place::new();
    // A real file system with something in it.
    let disk = Disk::mount(&place, "guest", 32 * MIB);
    place.write("guest/file", &noise(1, 5 * MIB));
    drop(disk);
    let mount = place.mount(SOON);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    place.shell("cp --sparse=always guest.ext4 mnt/web01/a.img").ok();
    wait_for_seal(&place, "mnt/web01/a.img");
    let snapshot = place.path("mnt/web01/a.img");
    let device = Loop::attach(&snapshot, &["--read-only", "--direct-io=on"])
        .or_else(|_| Loop::attach(&snapshot, &["--read-only"]))
        .unwrap();
    let path = device.0.display();
    place.shell(&format!("e2fsck -fn {path}")).ok();
    std::fs::create_dir(place.path("inside")).unwrap();
    place.shell(&format!("mount -o ro,noload {path} inside && {{ cp inside/file guest.copy; umount inside; }}")).ok();
    same(&place.read("guest.copy"), &noise(1, 5 * MIB), "a file of the guest");
    drop(device);
    mount.umount();
}

#[test]
fn others_see_only_what_they_may() {
    const NAME: &str = "mount::others_see_only_what_they_may";
    need_mount!(NAME);
    if !is_root() {
        return crate::whole::skip(NAME, "other users need root");
    }
    let place = Place::new();
    let mount = place.mount(SOON);
    std::fs::create_dir(place.path("mnt/web01")).unwrap();
    place.write("mnt/web01/a.img", &image(1, 1));
    wait_for_seal(&place, "mnt/web01/a.img");
    assert_eq!(place.mode("mnt/web01"), 0o700);
    let nobody = |words: &str| {
        let mut command = place.command("sh");
        command.args(["-c", words]).uid(65534).gid(65534);
        command.output().unwrap().status.success()
    };
    // Root's mount lets others ask, and permissions decide.
    assert!(nobody("ls mnt >/dev/null"), "root's mount is closed to others");
    assert!(!nobody("ls mnt/web01 >/dev/null 2>&1"), "a VM's folder is open to others");
    assert!(!nobody("cat mnt/web01/a.img >/dev/null 2>&1"));
    assert!(!nobody("mkdir mnt/web02 2>/dev/null"), "others may make VMs");
    std::fs::set_permissions(place.path("mnt/web01"), PermissionsExt::from_mode(0o755)).unwrap();
    assert!(nobody("cat mnt/web01/a.img >/dev/null"), "a folder that was opened stays closed");
    assert!(!nobody("rm -f mnt/web01/a.img 2>/dev/null"));
    assert!(!nobody("ls store >/dev/null 2>&1"), "the store is open to others");
    mount.umount();
    let mount = place.mount("noallow_other");
    assert_eq!(place.mode("mnt/web01"), 0o755, "modes are kept");
    assert!(!nobody("ls mnt >/dev/null 2>&1"), "noallow_other lets others in");
    mount.umount();
}

#[test]
fn a_read_only_mount_changes_nothing() {
    need_mount!("mount::a_read_only_mount_changes_nothing");
    let place = Place::new();
    place.write("a.img", &image(1, 3));
    place.snapfs("backup store web01/a.img a.img").ok();
    let records = place.records("web01");
    let mount = place.mount("ro");
    same(&place.read("mnt/web01/a.img"), &place.read("a.img"), "reading");
    let refused = [
        File::create(place.path("mnt/web01/b.img")).map(drop),
        std::fs::create_dir(place.path("mnt/web02")),
        std::fs::remove_file(place.path("mnt/web01/a.img")),
        std::fs::rename(place.path("mnt/web01/a.img"), place.path("mnt/web01/b.img")),
    ];
    for outcome in refused {
        assert_eq!(outcome.unwrap_err().raw_os_error(), Some(libc::EROFS));
    }
    mount.umount();
    assert_eq!(place.records("web01"), records);
}

#[test]
fn a_mountpoint_that_cannot_be_is_refused() {
    need_mount!("mount::a_mountpoint_that_cannot_be_is_refused");
    let place = Place::new();
    let _cleared = Cleared(&place, "mnt");
    for folder in ["store/inside", "mnt", "empty"] {
        std::fs::create_dir(place.path(folder)).unwrap();
    }
    place.snapfs("mount store store").fails(1, "store");
    place.snapfs("mount store store/inside").fails(1, "store");
    place.snapfs("mount store .").fails(1, "store");
    place.snapfs("mount store nowhere").fails(3, "nowhere");
    place.snapfs("mount nowhere mnt").fails(3, "nowhere");
    place.snapfs("mount empty mnt").fails(3, "empty");
    place.snapfs("mount store mnt -o frobnicate").fails(1, "frobnicate");
    let mount = place.mount("");
    place.snapfs("mount store mnt").fails(5, "mnt");
    // The control folder answers, and is never listed.
    assert!(std::fs::read_dir(place.path("mnt")).unwrap().next().is_none());
    assert!(place.exists("mnt/.snapfs/status"));
    mount.umount();
}

#[test]
fn what_is_left_out_comes_from_the_configuration() {
    need_mount!("mount::what_is_left_out_comes_from_the_configuration");
    let place = Place::new();
    let _cleared = Cleared(&place, "mnt");
    std::fs::create_dir(place.path("mnt")).unwrap();
    place.snapfs("mount").fails(2, "no STORE is given");
    place.snapfs("mount store").fails(2, "no MOUNTPOINT is given");
    place.snapfs("umount").fails(2, "no MOUNTPOINT is given");
    place.write("host.toml", b"colour = 'red'");
    place.snapfs("mount store").fails(1, "colour");
    let text = format!("store = {:?}\nmountpoint = {:?}\n", place.path("nowhere"), place.path("mnt"));
    place.write("host.toml", text.as_bytes());
    place.snapfs("mount").fails(3, "nowhere");
    // What is told wins, by whichever of the ways.
    for words in ["mount store", "mount --store store"] {
        place.snapfs(words).ok();
        assert!(place.exists("mnt/.snapfs/status"), "{words}");
        place.snapfs("umount").ok();
    }
    let mounted = place.command(SNAPFS).arg("mount").env("SNAPFS_STORE", place.path("store")).output().unwrap();
    assert!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
    place.snapfs("umount").ok();
    place.write("host.toml", text.replace("nowhere", "store").as_bytes());
    place.snapfs("mount -o ro").ok();
    place.snapfs("umount").ok();
}

#[test]
fn in_the_foreground_it_stays_until_the_end() {
    need_mount!("mount::in_the_foreground_it_stays_until_the_end");
    let place = Place::new();
    let _cleared = Cleared(&place, "mnt");
    std::fs::create_dir(place.path("mnt")).unwrap();
    let mut daemon = place.start("mount store mnt --foreground");
    eventually("it is mounted", || place.exists("mnt/.snapfs/status") || daemon.has_ended());
    place.snapfs("umount mnt").ok();
    let done = daemon.finish();
    assert_eq!(done.code, 0, "{}", done.err);
}

#[test]
fn the_tour_ends_well() {
    const NAME: &str = "mount::the_tour_ends_well";
    need_mount!(NAME);
    need_tools!(NAME, "mke2fs");
    let place = Place::without_store();
    let output = place.command(SNAPFS).args(["demo", "--size", "64M"]).env("TMPDIR", place.path("")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 0, "the tour leaves something behind");
}

#[test]
fn nothing_can_be_removed_where_the_mount_says_so() {
    need_mount!("mount::nothing_can_be_removed_where_the_mount_says_so");
    let place = Place::new();
    let mount = place.mount(&format!("nodelete,{SOON}"));
    place.shell("mkdir mnt/web01 && echo a > mnt/web01/a.img && echo b > mnt/web01/b.part").ok();
    wait_for_seal(&place, "mnt/web01/a.img");
    for line in ["rm -f mnt/web01/a.img", "rm -f mnt/web01/b.part", "rmdir mnt/web01", "rm -rf mnt/web01"] {
        place.shell(line).fails(1, "Operation not permitted");
    }
    place.shell("mv mnt/web01/b.part mnt/web01/b.img").ok();
    let status: serde_json::Value = serde_json::from_slice(&place.read("mnt/.snapfs/status")).unwrap();
    assert_eq!((&status["nodelete"], &status["gc"]), (&true.into(), &false.into()));
    mount.umount();
    assert_eq!(place.snapfs("list store --json").ok().json().as_array().unwrap().len(), 2);
}

#[test]
fn what_is_removed_is_collected_by_the_mount_when_it_is_told_to() {
    need_mount!("mount::what_is_removed_is_collected_by_the_mount_when_it_is_told_to");
    let place = Place::new();
    let bytes = [image(70, 8), image(71, 8)];
    place.write("a.img", &bytes[0]);
    place.write("b.img", &bytes[1]);
    place.snapfs("backup store web01/a.img a.img").ok();
    place.snapfs("backup store web01/b.img b.img").ok();
    let stored = || place.objects("web01", "packs").iter().map(|pack| pack.metadata().unwrap().len()).sum::<u64>();
    let before = stored();
    let mount = place.mount(&format!("gc=on,{NEVER}"));
    place.shell("rm mnt/web01/a.img").ok();
    eventually("the mount collects", || stored() < before * 6 / 10);
    same(&place.read("mnt/web01/b.img"), &bytes[1], "what stays");
    // A writer comes in at any moment.
    place.shell("rm mnt/web01/b.img && cp a.img mnt/web01/c.img").ok();
    same(&place.read("mnt/web01/c.img"), &bytes[0], "what was written meanwhile");
    // It does not hold the end up.
    place.shell("rm mnt/web01/c.img").ok();
    mount.umount();
    place.snapfs("check store --read-data").ok();
}
