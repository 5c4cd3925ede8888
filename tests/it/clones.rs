//! Tier 7: writable clones in the real mount: what is written is kept, what is flushed survives anything, and the
//! snapshot never changes.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::whole::{
    Cleared, Disk, Freed, Loop, MIB, Mount, Place, eventually, image, is_root, need_loop, need_mount, need_tools, same,
};
use crate::world::{Rng, noise};

const BLOCK: usize = 4096;

/// A place with one snapshot, `web01/a.img`, and a folder for clones.
struct Scene {
    place: Place,
    image: Vec<u8>,
}

impl Scene {
    fn new() -> Self {
        Self::of(image(1, 8))
    }

    fn of(image: Vec<u8>) -> Self {
        let place = Place::new();
        place.write("image.raw", &image);
        place.snapfs("backup store web01/a.img image.raw").ok();
        Self { place, image }
    }

    fn mount(&self, options: &str) -> Mount<'_> {
        let clones = self.place.path("clones");
        self.place.mount(&format!("clones={},{options}", clones.display()))
    }

    /// Makes a clone; its path.
    #[track_caller]
    fn make(&self, name: &str) -> PathBuf {
        let path = self.place.snapfs(&format!("clone store web01/a.img {name}")).ok().text();
        let path = PathBuf::from(path.strip_suffix('\n').unwrap());
        assert_eq!(path, self.place.path("mnt/.snapfs/clones").canonicalize().unwrap().join(name));
        path
    }

    fn open(&self, name: &str) -> File {
        File::options().read(true).write(true).open(self.place.path(&format!("mnt/.snapfs/clones/{name}"))).unwrap()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        self.place.read(&format!("mnt/.snapfs/clones/{name}"))
    }

    #[track_caller]
    fn snapshot_is_unchanged(&self) {
        same(&self.place.snapfs("restore store web01/a.img -").ok().out, &self.image, "the snapshot");
    }

    /// The folder of a clone on the disk.
    fn folder(&self, name: &str) -> PathBuf {
        let mut rows = std::fs::read_dir(self.place.path("clones")).unwrap().map(|row| row.unwrap().path());
        let store = rows.find(|path| !path.ends_with("lost+found")).unwrap();
        store.join(name)
    }

    fn unmounted(&self) -> Cleared<'_> {
        Cleared(&self.place, "mnt")
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: std::io::Result<T>, numbers: &[i32]) {
    let error = outcome.unwrap_err();
    assert!(numbers.contains(&error.raw_os_error().unwrap_or(0)), "{error}");
}

#[test]
fn a_clone_begins_as_its_snapshot_and_goes_its_own_way() {
    need_mount!("clones::a_clone_begins_as_its_snapshot_and_goes_its_own_way");
    let scene = Scene::new();
    let mount = scene.mount("");
    let path = scene.make("one");
    scene.make("two");
    let of = path.metadata().unwrap();
    assert_eq!((of.len(), of.mode() & 0o7777), (8 << 20, 0o600));
    assert!(of.blocks() >= 6 << 11 && of.blocks() <= 8 << 11, "{} blocks", of.blocks());
    same(&scene.read("one"), &scene.image, "a new clone");
    // Hidden, and listed where it is asked for.
    assert!(!std::fs::read_dir(scene.place.path("mnt")).unwrap().any(|r| r.unwrap().file_name() == ".snapfs"));
    let rows = std::fs::read_dir(scene.place.path("mnt/.snapfs/clones")).unwrap();
    let mut rows: Vec<_> = rows.map(|r| r.unwrap().file_name()).collect();
    rows.sort();
    assert_eq!(rows, ["one", "two"]);

    let (one, two) = (scene.open("one"), scene.open("two"));
    let mut want = scene.image.clone();
    let mut rng = Rng(7);
    for step in 0..200 {
        let length = [1, 512, 4096, 5000, 65536, 300_000][rng.below(6) as usize];
        let offset = rng.below((scene.image.len() - length) as u64) as usize;
        let bytes = noise(step, length);
        one.write_all_at(&bytes, offset as u64).unwrap();
        want[offset..offset + length].copy_from_slice(&bytes);
    }
    one.sync_all().unwrap();
    same(&scene.read("one"), &want, "a written clone");
    same(&scene.read("two"), &scene.image, "another clone of the same snapshot");
    two.write_all_at(b"two", 0).unwrap();
    drop((one, two));
    mount.umount();

    // They survive the daemon, each with its own.
    let mount = scene.mount("");
    same(&scene.read("one"), &want, "after a restart");
    assert_eq!(&scene.read("two")[..3], b"two");
    same(&scene.read("two")[3..], &scene.image[3..], "another clone after a restart");
    let listed = scene.place.snapfs("clones store --json").ok().json();
    let rows = listed.as_array().unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!((rows[0]["name"].as_str(), rows[0]["snapshot"].as_str()), (Some("one"), Some("web01/a.img")));
    assert_eq!(rows[0]["size"], 8 << 20);
    assert!(rows[0]["written_bytes"].as_u64().unwrap() > rows[1]["written_bytes"].as_u64().unwrap());
    assert!(scene.place.snapfs("clones store").ok().text().contains("web01/a.img"));
    mount.umount();
    scene.snapshot_is_unchanged();
    scene.place.snapfs("check store --read-data").ok();
}

#[test]
fn clones_are_made_and_removed_by_commands_alone() {
    need_mount!("clones::clones_are_made_and_removed_by_commands_alone");
    let scene = Scene::new();
    let place = &scene.place;
    place.snapfs("clone store web01/a.img").fails(3, "not mounted");
    let mount = scene.mount("");
    // Names: one is made if none is given.
    let first = place.snapfs("clone store web01/latest").ok().text();
    assert!(first.ends_with("/mnt/.snapfs/clones/web01-a.img\n"), "{first}");
    let second = place.snapfs("clone store web01/a.img --json").ok().json();
    assert_eq!(second["name"], "web01-a.img-2");
    place.snapfs("clone store web01/a.img web01-a.img").fails(1, "exists");
    for name in [".hidden", "a/b", "latest", "..", ""] {
        place.run(&["clone", "store", "web01/a.img", name]).fails(1, "");
    }
    place.snapfs("clone store web01/none.img").fails(3, "web01/none.img");
    place.snapfs("clone store none/latest").fails(3, "none/latest");
    std::fs::create_dir(place.path("mnt/web02")).unwrap();
    place.write("mnt/web02/draft.part", b"some");
    place.snapfs("clone store web02/draft.part").fails(1, "draft");

    let clones = place.path("mnt/.snapfs/clones");
    let clone = clones.join("web01-a.img");
    refused(std::fs::remove_file(&clone), &[libc::EPERM]);
    refused(std::fs::rename(&clone, clones.join("other")), &[libc::EPERM]);
    refused(File::create(clones.join("new")), &[libc::EPERM]);
    refused(std::fs::create_dir(clones.join("new")), &[libc::EPERM]);
    refused(std::fs::remove_dir(&clones), &[libc::EPERM]);
    refused(File::create(&clone), &[libc::EPERM]);
    let file = scene.open("web01-a.img");
    refused(file.set_len(5), &[libc::EPERM]);
    refused(file.set_len(9 << 20), &[libc::EPERM]);
    file.set_len(8 << 20).unwrap();
    refused(file.write_all_at(b"xx", (8 << 20) - 1), &[libc::EFBIG]);
    refused(file.write_all_at(b"x", 8 << 20), &[libc::EFBIG]);
    refused(std::fs::hard_link(&clone, clones.join("link")), &[libc::EPERM, libc::ENOSYS]);

    place.snapfs("unclone store web01-a.img").fails(5, "web01-a.img");
    drop(file);
    // The kernel tells the daemon of the close a moment later: the command waits for that.
    place.snapfs("unclone store web01-a.img").ok();
    assert!(!clone.exists());
    place.snapfs("unclone store web01-a.img").fails(3, "web01-a.img");
    place.snapfs("unclone store none").fails(3, "none");
    // Unmounted: the folder is found only by whoever names it.
    mount.umount();
    place.snapfs("unclone store web01-a.img-2").fails(3, "web01-a.img-2");
    place.snapfs("unclone store web01-a.img-2 --clones clones").ok();
    let left: Vec<_> = std::fs::read_dir(scene.folder("")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn owner_and_mode_are_kept_for_who_runs_the_guest() {
    const NAME: &str = "clones::owner_and_mode_are_kept_for_who_runs_the_guest";
    need_mount!(NAME);
    if !is_root() {
        return crate::whole::skip(NAME, "needs root");
    }
    let scene = Scene::new();
    let mount = scene.mount("");
    let path = scene.make("one");
    std::os::unix::fs::chown(&path, Some(1234), Some(5678)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    mount.umount();
    let mount = scene.mount("");
    let of = path.metadata().unwrap();
    assert_eq!((of.uid(), of.gid(), of.mode() & 0o7777), (1234, 5678, 0o640));
    mount.umount();
}

#[test]
fn a_service_without_privileges_gives_clones_away() {
    const NAME: &str = "clones::a_service_without_privileges_gives_clones_away";
    need_mount!(NAME);
    need_tools!(NAME, "setpriv");
    if !is_root() {
        return crate::whole::skip(NAME, "needs root");
    }
    let unit = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-helpers/snapfs@.service");
    let unit = std::fs::read_to_string(unit).unwrap();
    let names = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let names: String =
        names.split(' ').map(|name| format!(",+{}", name.strip_prefix("CAP_").unwrap().to_lowercase())).collect();
    let scene = Scene::new();
    let place = &scene.place;
    let program = crate::whole::SNAPFS;
    let _cleared = scene.unmounted();
    std::fs::create_dir(place.path("mnt")).unwrap();
    let mount = format!("{program} mount store mnt -o clones={}", place.path("clones").display());
    place.shell(&format!("setpriv --bounding-set=-all{names} --no-new-privs {mount}")).ok();
    let path = scene.make("one");
    std::os::unix::fs::chown(&path, Some(1234), Some(5678)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    scene.open("one").write_all_at(b"written", 0).unwrap();
    let of = path.metadata().unwrap();
    assert_eq!((of.uid(), of.gid(), of.mode() & 0o7777), (1234, 5678, 0o640));
    place.snapfs("unclone store one").ok();
    place.snapfs("umount mnt").ok();
}

#[test]
fn zeros_and_holes_of_a_clone_are_true() {
    const NAME: &str = "clones::zeros_and_holes_of_a_clone_are_true";
    need_mount!(NAME);
    need_tools!(NAME, "fallocate");
    let scene = Scene::new();
    let mount = scene.mount("");
    scene.make("one");
    let clone = "mnt/.snapfs/clones/one";
    scene.place.write("plain", &scene.image);
    let file = scene.open("one");
    let at = |from| rustix::fs::seek(&file, from).ok();
    let steps = [
        "fallocate --punch-hole --offset 1000000 --length 2000000 FILE",
        "HOLES",
        "fallocate --zero-range --keep-size --offset 7000000 --length 3000000 FILE",
        "dd status=none if=image.raw of=FILE bs=4095 count=7 seek=300 conv=notrunc",
        "fallocate --keep-size --offset 0 --length 20000000 FILE",
        "fallocate --zero-range --offset 12345 --length 1 FILE",
        "fallocate --offset 0 --length 8388608 FILE",
        "dd status=none if=/dev/zero of=FILE bs=1M count=1 seek=1 conv=notrunc",
    ];
    for step in steps {
        if step == "HOLES" {
            // The one that was punched, and the one of the snapshot: its third quarter.
            assert_eq!(at(rustix::fs::SeekFrom::Hole(0)), Some(1_000_000_u64.next_multiple_of(4096)));
            assert_eq!(at(rustix::fs::SeekFrom::Data(1_100_000)), Some(3_000_000 / 4096 * 4096));
            assert_eq!(at(rustix::fs::SeekFrom::Hole(3_000_000)), Some(4 << 20));
            assert_eq!(at(rustix::fs::SeekFrom::Data(4 << 20)), Some(6 << 20));
            continue;
        }
        let plain = scene.place.shell(&step.replace("FILE", "plain"));
        if plain.code != 0 && plain.err.contains("not supported") {
            return crate::whole::skip(NAME, "the temporary folder does not know fallocate");
        }
        plain.ok();
        scene.place.shell(&step.replace("FILE", clone)).ok();
        same(&scene.read("one"), &scene.place.read("plain"), step);
    }
    scene.place.shell(&format!("cp --sparse=auto {clone} out.img && cmp out.img plain")).ok();
    drop(file);
    scene.place.shell(&format!("! fallocate --offset 0 --length 9000000 {clone}")).ok();
    mount.umount();
}

/// A guest's file system on a clone through a loop device.
fn ext4_on_a_loop_device(name: &str, direct: &str) {
    need_mount!(name);
    need_loop!(name);
    need_tools!(name, "mke2fs", "e2fsck", "losetup");
    let place = Place::without_store();
    place.shell("truncate -s 96M disk && mke2fs -q -F -t ext4 disk").ok();
    let scene = Scene::of(place.read("disk"));
    let mount = scene.mount("");
    let path = scene.make("one");
    {
        let device = match Loop::attach(&path, &[direct]) {
            Ok(device) => device,
            Err(why) => return crate::whole::skip(name, &why),
        };
        let device = device.0.display();
        scene.place.shell(&format!("mkdir m && mount {device} m")).ok();
        scene
            .place
            .shell("head -c 20M image.raw > m/copy && dd status=none if=/dev/urandom of=m/x bs=64k count=80")
            .ok();
        scene.place.shell("rm m/copy && mkdir m/d && cp m/x m/d/y && sync && cmp m/x m/d/y && cp m/x x").ok();
        scene.place.shell("umount m").ok();
        scene.place.shell(&format!("e2fsck -fn {device}")).ok();
        scene.place.snapfs("unclone store one").fails(5, "one");
    }
    mount.umount();
    let mount = scene.mount("");
    {
        let device = Loop::attach(&path, &[direct]).unwrap();
        let device = device.0.display();
        scene.place.shell(&format!("e2fsck -fn {device} && mount {device} m && cmp x m/d/y && umount m")).ok();
    }
    mount.umount();
    scene.snapshot_is_unchanged();
}

#[test]
fn a_guests_file_system_on_a_loop_device_with_direct_io() {
    ext4_on_a_loop_device("clones::a_guests_file_system_on_a_loop_device_with_direct_io", "--direct-io=on");
}

#[test]
fn a_guests_file_system_on_a_buffered_loop_device() {
    ext4_on_a_loop_device("clones::a_guests_file_system_on_a_buffered_loop_device", "--direct-io=off");
}

#[test]
fn parallel_readers_and_writers_see_one_clone() {
    need_mount!("clones::parallel_readers_and_writers_see_one_clone");
    let scene = Scene::of(noise(3, 4 * MIB));
    let mount = scene.mount("threads=8");
    scene.make("one");
    let is_over = AtomicBool::new(false);
    let writers_left = AtomicUsize::new(6);
    std::thread::scope(|scope| {
        // Every writer has its own sectors, which lie in the same blocks, and its own descriptor.
        for writer in 0..6_usize {
            let (scene, is_over, writers_left) = (&scene, &is_over, &writers_left);
            scope.spawn(move || {
                let file = scene.open("one");
                for sector in (writer..4 * MIB / 512).step_by(7) {
                    file.write_all_at(&noise(sector as u64 + 9, 512), sector as u64 * 512).unwrap();
                    if sector % 50 == writer {
                        file.sync_data().unwrap();
                    }
                }
                if writers_left.fetch_sub(1, Ordering::SeqCst) == 1 {
                    is_over.store(true, Ordering::SeqCst);
                }
            });
        }
        for reader in 0..2_u64 {
            let (scene, is_over) = (&scene, &is_over);
            scope.spawn(move || {
                let file = scene.open("one");
                let mut rng = Rng(reader + 1);
                while !is_over.load(Ordering::SeqCst) {
                    let first = rng.below((4 * MIB / 512 - 64) as u64) as usize;
                    let mut out = vec![0; 64 * 512];
                    file.read_exact_at(&mut out, first as u64 * 512).unwrap();
                    for (sector, bytes) in (first..).zip(out.chunks(512)) {
                        let old = &scene.image[sector * 512..][..512];
                        assert!(bytes == old || bytes == noise(sector as u64 + 9, 512), "sector {sector}");
                    }
                }
            });
        }
    });
    let mut want = scene.image.clone();
    for sector in (0..4 * MIB / 512).filter(|s| s % 7 != 6) {
        want[sector * 512..][..512].copy_from_slice(&noise(sector as u64 + 9, 512));
    }
    same(&scene.read("one"), &want, "all writers together");
    mount.umount();
    let mount = scene.mount("");
    same(&scene.read("one"), &want, "after a restart");
    mount.umount();
}

#[test]
fn qemu_works_on_a_clone() {
    const NAME: &str = "clones::qemu_works_on_a_clone";
    need_mount!(NAME);
    need_tools!(NAME, "qemu-io", "qemu-img");
    let scene = Scene::new();
    let mount = scene.mount("");
    scene.make("one");
    let clone = "mnt/.snapfs/clones/one";
    for cache in ["none", "writeback", "writethrough", "directsync"] {
        let commands = "-c 'write -P 7 4096 65536' -c 'write -P 8 1M 3M' -c 'discard 2M 64k' -c flush";
        let checks = "-c 'read -P 7 4096 65536' -c 'read -P 8 1M 1M' -c 'read -P 0 2M 64k'";
        scene.place.shell(&format!("qemu-io -f raw -t {cache} {commands} {checks} {clone}")).ok();
        scene.place.shell(&format!("qemu-img bench -f raw -t {cache} -w -c 300 -d 16 -s 4096 -S 12288 {clone}")).ok();
    }
    scene.place.shell(&format!("qemu-img convert -f raw -O raw {clone} out.img && cmp out.img {clone}")).ok();
    scene.place.shell(&format!("qemu-img convert -n -f raw -O raw image.raw {clone}")).ok();
    same(&scene.read("one"), &scene.image, "a copy of the image over a clone");
    mount.umount();
    scene.snapshot_is_unchanged();
}

/// Writes numbered records, each in a block of its own, and says after each sync how many are durable.
fn write_records(file: &File, records: usize, synced: &AtomicUsize) {
    for number in 0..records {
        let block = (number * 37) % 1024;
        if file.write_all_at(&noise(number as u64 + 1, BLOCK), (block * BLOCK) as u64).is_err() {
            return;
        }
        // Overwrites something older too, and a part of a block that was never written.
        let part = file.write_all_at(&(number as u64).to_le_bytes(), (1024 * BLOCK + 512 * (number % 900)) as u64);
        if part.is_err() || (number % 3 == 2 && file.sync_data().is_err()) {
            return;
        }
        if number % 3 == 2 {
            synced.store(number + 1, Ordering::SeqCst);
        }
    }
}

/// All records before `synced` are there; those after it are there or are the snapshot's.
fn check_records(scene: &Scene, got: &[u8], synced: usize, records: usize) {
    for number in 0..records.min(1024) {
        let at = (number * 37) % 1024 * BLOCK;
        let block = &got[at..at + BLOCK];
        let is_record = block == noise(number as u64 + 1, BLOCK);
        let is_snapshots = block == &scene.image[at..at + BLOCK];
        assert!(is_record || (number >= synced && is_snapshots), "record {number} of {synced} that were flushed");
    }
    for number in 0..records.min(900) {
        let at = 1024 * BLOCK + 512 * number;
        let is_record = got[at..at + 8] == (number as u64).to_le_bytes();
        let is_snapshots = got[at..at + 8] == scene.image[at..at + 8];
        assert!(is_record || (number >= synced && is_snapshots), "part {number} of {synced} that were flushed");
        assert!(got[at + 8..at + 512] == scene.image[at + 8..at + 512], "part {number} brought something along");
    }
}

#[test]
fn i9_what_a_guest_flushed_survives_kill_9() {
    need_mount!("clones::i9_what_a_guest_flushed_survives_kill_9");
    for turn in 0..4_usize {
        let scene = Scene::of(noise(5, 5 * MIB));
        let _cleared = scene.unmounted();
        let mount = scene.mount("");
        scene.make("one");
        let synced = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let file = scene.open("one");
            let counter = &synced;
            scope.spawn(move || write_records(&file, 900, counter));
            eventually("some records are flushed", || synced.load(Ordering::SeqCst) >= 30 + 100 * turn);
            mount.kill();
        });
        let synced = synced.load(Ordering::SeqCst);
        let mount = scene.mount("");
        check_records(&scene, &scene.read("one"), synced, 900);
        // And it goes on.
        let file = scene.open("one");
        let again = AtomicUsize::new(0);
        write_records(&file, 900, &again);
        assert_eq!(again.load(Ordering::SeqCst), 900);
        drop(file);
        check_records(&scene, &scene.read("one"), 900, 900);
        mount.umount();
        scene.snapshot_is_unchanged();
    }
}

#[test]
fn i9_what_was_flushed_through_a_loop_device_survives_kill_9() {
    const NAME: &str = "clones::i9_what_was_flushed_through_a_loop_device_survives_kill_9";
    need_mount!(NAME);
    need_loop!(NAME);
    need_tools!(NAME, "losetup");
    let scene = Scene::of(noise(5, 5 * MIB));
    let _cleared = scene.unmounted();
    let mount = scene.mount("");
    let path = scene.make("one");
    let device = match Loop::attach(&path, &["--direct-io=on"]) {
        Ok(device) => device,
        Err(why) => return crate::whole::skip(NAME, &why),
    };
    let synced = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let file = File::options().write(true).read(true).open(&device.0).unwrap();
        let counter = &synced;
        scope.spawn(move || write_records(&file, 900, counter));
        eventually("some records are flushed", || synced.load(Ordering::SeqCst) >= 60);
        mount.kill();
    });
    drop(device);
    let synced = synced.load(Ordering::SeqCst);
    let mount = scene.mount("");
    check_records(&scene, &scene.read("one"), synced, 900);
    mount.umount();
}

#[test]
fn i9_what_a_guest_of_an_attached_clone_flushed_survives_kill_9() {
    const NAME: &str = "clones::i9_what_a_guest_of_an_attached_clone_flushed_survives_kill_9";
    need_mount!(NAME);
    need_loop!(NAME);
    for (turn, options) in ["ro", "", "ro"].into_iter().enumerate() {
        let scene = Scene::of(noise(5, 5 * MIB));
        let _cleared = scene.unmounted();
        let mount = scene.mount(options);
        let _freed = Freed(&scene.place);
        let snapshot = scene.place.path("mnt/web01/a.img");
        let attach =
            || scene.place.run(&["attach", snapshot.to_str().unwrap(), "--write", "--owner", "guest"]).ok().text();
        let synced = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let file = File::options().write(true).read(true).open(attach().trim_end()).unwrap();
            let counter = &synced;
            scope.spawn(move || write_records(&file, 900, counter));
            eventually("some records are flushed", || synced.load(Ordering::SeqCst) >= 30 + 100 * turn);
            mount.kill();
        });
        let synced = synced.load(Ordering::SeqCst);
        let mount = scene.mount(options);
        scene.place.snapfs("reap").ok();
        let device = PathBuf::from(attach().trim_end());
        check_records(&scene, &std::fs::read(&device).unwrap(), synced, 900);
        // And it goes on.
        let file = File::options().write(true).read(true).open(&device).unwrap();
        let again = AtomicUsize::new(0);
        write_records(&file, 900, &again);
        drop(file);
        check_records(&scene, &std::fs::read(&device).unwrap(), 900, 900);
        scene.place.snapfs("detach --owner guest").ok();
        mount.umount();
        scene.snapshot_is_unchanged();
    }
}

#[test]
fn a_read_only_mount_has_writable_clones() {
    const NAME: &str = "clones::a_read_only_mount_has_writable_clones";
    need_mount!(NAME);
    if !is_root() {
        return crate::whole::skip(NAME, "needs root to bind a mount");
    }
    let scene = Scene::new();
    let place = &scene.place;
    let mount = scene.mount("ro,noexec");
    // For the kernel and for all programs it is read-only, with all that it was mounted with.
    let flags = rustix::fs::statvfs(place.path("mnt")).unwrap().f_flag;
    for flag in [
        rustix::fs::StatVfsMountFlags::RDONLY,
        rustix::fs::StatVfsMountFlags::NOSUID,
        rustix::fs::StatVfsMountFlags::NODEV,
        rustix::fs::StatVfsMountFlags::NOEXEC,
    ] {
        assert!(flags.contains(flag), "{flags:?} lacks {flag:?}");
    }
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let row = table.lines().find(|line| line.contains(place.path("mnt").to_str().unwrap())).unwrap();
    assert!(row.split(' ').nth(3).unwrap().split(',').any(|option| option == "ro"), "{row}");
    refused(std::fs::create_dir(place.path("mnt/web02")), &[libc::EROFS]);

    let made = place.snapfs("clone store web01/a.img one");
    assert_eq!(made.code, 0, "{}", made.err);
    assert!(made.err.contains("ro"), "{}", made.err);
    let path = place.path("mnt/.snapfs/clones/one");
    refused(File::options().write(true).open(&path), &[libc::EROFS]);
    same(&place.read("mnt/.snapfs/clones/one"), &scene.image, "the clone");

    // Another mount of the same filesystem, which can be written: nothing but clones can be changed through it.
    place.shell("mkdir w all && mount --bind mnt/.snapfs/clones w && mount -o remount,bind,rw w").ok();
    let _bound = Cleared(place, "w");
    let _all = Cleared(place, "all");
    let file = File::options().read(true).write(true).open(place.path("w/one")).unwrap();
    file.write_all_at(b"written", 100).unwrap();
    file.sync_all().unwrap();
    assert_eq!(&place.read("mnt/.snapfs/clones/one")[100..107], b"written");
    place.shell("mount --bind mnt all && mount -o remount,bind,rw all").ok();
    refused(std::fs::create_dir(place.path("all/web02")), &[libc::EROFS]);
    refused(std::fs::remove_file(place.path("all/web01/a.img")), &[libc::EROFS]);
    refused(std::fs::rename(place.path("all/web01/a.img"), place.path("all/web01/b.img")), &[libc::EROFS]);
    refused(File::create(place.path("all/web01/b.img")), &[libc::EROFS]);
    refused(std::fs::set_permissions(place.path("all/web01"), PermissionsExt::from_mode(0o777)), &[libc::EROFS]);
    place.snapfs("unclone store one").fails(5, "one");
    drop(file);
    place.snapfs("unclone store one").ok();
    place.shell("umount w all").ok();
    mount.umount();
    scene.snapshot_is_unchanged();
}

#[test]
fn a_full_disk_stops_a_clone_and_loses_nothing() {
    const NAME: &str = "clones::a_full_disk_stops_a_clone_and_loses_nothing";
    need_mount!(NAME);
    if !is_root() {
        return crate::whole::skip(NAME, "needs root to mount a small disk");
    }
    let scene = Scene::of(noise(6, 24 * MIB));
    let place = &scene.place;
    place.shell("mkdir clones && mount -t tmpfs -o size=6M none clones").ok();
    let _disk = Cleared(place, "clones");
    let mount = scene.mount("");
    scene.make("one");
    let file = scene.open("one");
    let mut want = scene.image.clone();
    let mut flushed = 0;
    let full = loop {
        let bytes = noise(flushed as u64 + 50, 300_000);
        match file.write_all_at(&bytes, flushed as u64 * 300_000).and_then(|()| file.sync_all()) {
            Ok(()) => want[flushed * 300_000..][..300_000].copy_from_slice(&bytes),
            Err(e) => break e,
        }
        flushed += 1;
    };
    assert_eq!(full.kind(), ErrorKind::StorageFull, "{full}");
    assert!(flushed > 10);
    // What is there can be read, overwritten and flushed.
    let known = flushed * 300_000;
    same(&scene.read("one")[..known], &want[..known], "on a full disk");
    file.write_all_at(b"again", 5000).unwrap();
    want[5000..5005].copy_from_slice(b"again");
    file.sync_all().unwrap();
    place.snapfs("clone store web01/a.img two").fails(6, "two");
    assert_eq!(std::fs::read_dir(scene.folder("")).unwrap().count(), 1, "litter");
    drop(file);
    mount.umount();
    let mount = scene.mount("");
    let got = scene.read("one");
    same(&got[..known], &want[..known], "after a restart");
    // The write that failed may be there in part, block by block.
    let failed = noise(flushed as u64 + 50, 300_000);
    for at in (known.next_multiple_of(BLOCK)..known + 290_000).step_by(BLOCK) {
        let block = &got[at..at + BLOCK];
        assert!(block == &scene.image[at..at + BLOCK] || block == &failed[at - known..][..BLOCK], "byte {at}");
    }
    place.snapfs("unclone store one").ok();
    mount.umount();
    scene.snapshot_is_unchanged();
}

#[test]
fn a_damaged_clone_says_so_and_can_be_removed() {
    need_mount!("clones::a_damaged_clone_says_so_and_can_be_removed");
    let scene = Scene::new();
    let mount = scene.mount("");
    let flip = |file: &str, at: u64| {
        let path = scene.folder("one").join(file);
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    let damages: [(&str, &dyn Fn()); 6] = [
        ("map", &|| flip("map", 20)),
        ("map", &|| flip("map", 64 + 30)),
        ("map", &|| std::fs::remove_file(scene.folder("one").join("map")).unwrap()),
        ("clone.json", &|| flip("clone.json", 60)),
        ("clone.json", &|| std::fs::remove_file(scene.folder("one").join("clone.json")).unwrap()),
        ("data", &|| {
            let data = File::options().write(true).open(scene.folder("one").join("data")).unwrap();
            data.set_len(5).unwrap();
        }),
    ];
    for (number, (file, damage)) in damages.into_iter().enumerate() {
        let path = scene.make("one");
        let open = scene.open("one");
        for block in 0..3 {
            open.write_all_at(&noise(1, BLOCK), block * 8 * BLOCK as u64).unwrap();
            open.sync_all().unwrap();
        }
        drop(open);
        eventually("the clone is closed", || File::open(&path).is_ok_and(|f| f.metadata().is_ok()));
        std::thread::sleep(std::time::Duration::from_millis(200));
        damage();
        let refused = File::open(&path).unwrap_err();
        assert!([libc::EIO, libc::ENOENT].contains(&refused.raw_os_error().unwrap()), "{number}: {refused}");
        // The folder can be listed all the same.
        assert_eq!(std::fs::read_dir(scene.place.path("mnt/.snapfs/clones")).unwrap().count(), 1, "{number}");
        if file != "map" {
            let listed = scene.place.snapfs("clones store --json").ok().json();
            let said = listed[0]["damage"].as_str().unwrap();
            assert!(said.contains("one") && said.contains(file), "{number}: {said}");
        }
        let removed = scene.place.snapfs("unclone store one");
        assert_eq!(removed.code, 0, "{number}: {}", removed.err);
        assert_eq!(std::fs::read_dir(scene.folder("")).unwrap().count(), 0, "{number}: litter");
    }
    mount.umount();
    scene.snapshot_is_unchanged();
}

#[test]
fn a_clone_keeps_a_forgotten_snapshot() {
    need_mount!("clones::a_clone_keeps_a_forgotten_snapshot");
    let scene = Scene::new();
    let place = &scene.place;
    place.write("other.raw", &image(77, 2));
    place.snapfs("backup store web01/b.img other.raw").ok();
    let stored = || place.snapfs("stats store --json").ok().json().to_string();
    let mount = scene.mount("");
    scene.make("one");
    let open = scene.open("one");
    open.write_all_at(b"kept", 1 << 20).unwrap();
    drop(open);
    let mut want = scene.image.clone();
    want[1 << 20..][..4].copy_from_slice(b"kept");
    std::fs::remove_file(place.path("mnt/web01/a.img")).unwrap();
    place.snapfs("gc store --exact").ok();
    same(&scene.read("one"), &want, "forgotten and collected");
    mount.umount();
    place.snapfs("gc store --exact").ok();
    let mount = scene.mount("");
    same(&scene.read("one"), &want, "forgotten, collected and restarted");
    // Writing goes on, blocks are completed from the snapshot.
    let open = scene.open("one");
    open.write_all_at(b"more", 5 << 20).unwrap();
    want[5 << 20..][..4].copy_from_slice(b"more");
    drop(open);
    same(&scene.read("one"), &want, "written after that");
    place.snapfs("clone store web01/a.img two").fails(3, "web01/a.img");
    place.snapfs("check store --read-data").ok();
    let before = (stored(), place.objects("web01", "packs").len());
    place.snapfs("unclone store one").ok();
    assert_eq!(std::fs::read_dir(place.path("store/vms/web01/holds")).map_or(0, Iterator::count), 0, "a hold is left");
    place.snapfs("gc store").ok();
    assert_ne!((stored(), place.objects("web01", "packs").len()), before, "nothing was freed");
    mount.umount();
    place.snapfs("check store --read-data").ok();
}

#[test]
fn a_clone_becomes_a_snapshot() {
    need_mount!("clones::a_clone_becomes_a_snapshot");
    let scene = Scene::new();
    let place = &scene.place;
    let mount = scene.mount("");
    scene.make("one");
    let file = scene.open("one");
    file.write_all_at(&noise(40, 100_000), 3_000_000).unwrap();
    place.snapfs("commit store one web01/b.img").fails(5, "one");
    drop(file);
    let want = scene.read("one");
    let report = place.snapfs("commit store one web01/b.img --json").ok().json();
    assert_eq!(report["name"], "web01/b.img");
    assert!(report["levels"]["new_bytes"].as_u64().unwrap() <= 27 * 4096, "{report}");
    place.snapfs("commit store one web01/b.img").fails(1, "exists");
    place.snapfs("commit store none web01/c.img").fails(3, "none");
    place.snapfs("commit store one web01/a.img").fails(1, "exists");
    same(&place.snapfs("restore store web01/b.img -").ok().out, &want, "the new snapshot");
    eventually("the mount shows it", || place.exists("mnt/web01/b.img"));
    same(&place.read("mnt/web01/b.img"), &want, "the new snapshot in the mount");
    assert_eq!(place.mode("mnt/web01/b.img"), 0o444);
    same(&scene.read("one"), &want, "the clone after it");
    // It goes on from there; a reader does not stand in the way of a commit.
    let file = scene.open("one");
    file.write_all_at(b"more", 7_000_000).unwrap();
    drop(file);
    let want = scene.read("one");
    let reader = File::open(place.path("mnt/.snapfs/clones/one")).unwrap();
    place.snapfs("commit store one web01/disk/c.img").ok();
    drop(reader);
    same(&place.snapfs("restore store web01/disk/c.img -").ok().out, &want, "on another disk");
    mount.umount();
    place.snapfs("commit store one web02/first.img --clones clones").ok();
    same(&place.snapfs("restore store web02/first.img -").ok().out, &want, "in another VM");
    scene.snapshot_is_unchanged();
    place.snapfs("check store --read-data").ok();
}

#[test]
fn a_clone_that_was_cut_off_leaves_nothing_behind() {
    need_mount!("clones::a_clone_that_was_cut_off_leaves_nothing_behind");
    let scene = Scene::new();
    let place = &scene.place;
    let mount = scene.mount("");
    scene.make("one");
    // As a command leaves it that was killed before it gave the clone its name, and one before it noted the hold.
    let holds = || std::fs::read_dir(place.path("store/vms/web01/holds")).unwrap().count();
    scene.make("two");
    scene.make("three");
    assert_eq!(holds(), 3);
    std::fs::rename(scene.folder("two"), scene.folder(".new-two")).unwrap();
    std::fs::rename(scene.folder("three"), scene.folder(".gone-three")).unwrap();
    let names = std::fs::read_dir(place.path("mnt/.snapfs/clones")).unwrap();
    assert_eq!(names.map(|r| r.unwrap().file_name()).collect::<Vec<_>>(), ["one"]);
    scene.make("four");
    assert_eq!(holds(), 2);
    let mut left: Vec<_> = std::fs::read_dir(scene.folder("")).unwrap().map(|r| r.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["four", "one"]);
    same(&scene.read("one"), &scene.image, "a clone beside litter");
    mount.umount();
}

#[test]
fn two_mounts_do_not_write_one_clone() {
    need_mount!("clones::two_mounts_do_not_write_one_clone");
    let scene = Scene::new();
    let place = &scene.place;
    let mount = scene.mount("");
    let other = place.mount_at("other", &format!("clones={}", place.path("clones").display()));
    scene.make("one");
    let writer = scene.open("one");
    let second = place.path("other/.snapfs/clones/one");
    refused(File::options().write(true).open(&second), &[libc::EBUSY]);
    refused(File::open(&second), &[libc::EBUSY]);
    writer.write_all_at(b"first", 0).unwrap();
    drop(writer);
    let mut reader = None;
    eventually("the first mount lets go", || {
        reader = File::open(&second).ok();
        reader.is_some()
    });
    let mut out = [0; 5];
    reader.as_ref().unwrap().read_exact_at(&mut out, 0).unwrap();
    assert_eq!(&out, b"first");
    // Both may read; then nobody writes.
    same(&scene.read("one")[5..], &scene.image[5..], "read by both");
    refused(File::options().write(true).custom_flags(0).open(place.path("mnt/.snapfs/clones/one")), &[libc::EBUSY]);
    drop(reader);
    other.umount();
    mount.umount();
}

#[test]
fn a_small_disk_of_clones_frees_what_a_guest_discards() {
    const NAME: &str = "clones::a_small_disk_of_clones_frees_what_a_guest_discards";
    need_mount!(NAME);
    need_loop!(NAME);
    need_tools!(NAME, "mke2fs");
    let scene = Scene::of(noise(8, 16 * MIB));
    let disk = Disk::mount(&scene.place, "clones", 64 * MIB);
    let mount = scene.mount("");
    scene.make("one");
    let file = scene.open("one");
    file.write_all_at(&noise(9, 16 * MIB), 0).unwrap();
    file.sync_all().unwrap();
    let data = scene.folder("one").join("data");
    let used = |path: &PathBuf| path.metadata().unwrap().blocks() * 512;
    assert!(used(&data) >= 16 << 20);
    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        4096,
        12 << 20,
    )
    .unwrap();
    file.sync_all().unwrap();
    assert!(used(&data) < 5 << 20, "{} bytes are still used", used(&data));
    let got = scene.read("one");
    assert!(got[4096..4096 + (12 << 20)].iter().all(|b| *b == 0));
    drop(file);
    mount.umount();
    drop(disk);
}
