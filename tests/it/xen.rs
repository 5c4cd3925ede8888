//! Tier 7: `xen-scripts/block-snapfs` as libxl calls it: the real library of Debian's xen-utils-common, a folder in
//! place of the xenstore, real loop devices. `tests/run` unpacks the package; the whole way with a real Xen is
//! `tests/xen/run`.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::whole::{
    Cleared, Done, Freed, Place, SNAPFS, eventually, image, loops_of, need_loop, need_mount, same, skip,
};

/// The variable that names another folder of scripts.
const SCRIPTS_VARIABLE: &str = "SNAPFS_XEN_SCRIPTS";

const BACKEND: &str = "backend/vbd/7/51728";

/// In place of the xenstore's programs: a folder for each key, its value in a file.
const XENSTORE: [(&str, &str); 5] = [
    (
        "xenstore-read",
        r#"for k; do [ -f "$XS/$k/.v" ] || { echo "xenstore-read: couldn't read path $k" >&2; exit 1; }; cat "$XS/$k/.v"; echo; done"#,
    ),
    ("xenstore-write", r#"while [ $# -ge 2 ]; do mkdir -p "$XS/$1"; printf %s "$2" >"$XS/$1/.v"; shift 2; done"#),
    ("xenstore-rm", r#"for k; do rm -rf "${XS:?}/$k"; done"#),
    ("xenstore-list", r#"ls "$XS/$1""#),
    ("logger", "exit 0"),
];

/// The folder of Xen's own scripts.
fn scripts() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let named = std::env::var_os(SCRIPTS_VARIABLE).map(PathBuf::from);
    let places = [root.join("target/xen-utils-common/etc/xen/scripts"), PathBuf::from("/etc/xen/scripts")];
    named.into_iter().chain(places).find(|folder| folder.join("block-common.sh").is_file())
}

/// Returns from the test unless Xen's scripts are there.
macro_rules! need_xen {
    ($name:expr) => {
        match scripts() {
            Some(folder) => folder,
            None => return skip($name, "xen-utils-common is neither unpacked by tests/run nor installed"),
        }
    };
}

/// A host with a xenstore, as far as a hotplug script can tell.
struct Host<'a> {
    place: &'a Place,
}

impl<'a> Host<'a> {
    fn new(place: &'a Place, scripts: &Path) -> Self {
        for folder in ["scripts", "bin", "xenstore", "xenlog", "xenlock"] {
            std::fs::create_dir(place.path(folder)).unwrap();
        }
        for row in std::fs::read_dir(scripts).unwrap() {
            let path = row.unwrap().path();
            if path.is_file() {
                std::fs::copy(&path, place.path("scripts").join(path.file_name().unwrap())).unwrap();
            }
        }
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("xen-scripts/block-snapfs");
        std::fs::copy(own, place.path("scripts/block-snapfs")).unwrap();
        let host = Self { place };
        // The library begins the search path with its own folders, and logs and locks for the whole machine.
        host.edit("hotplugpath.sh", "bindir=\"/usr/bin\"", &format!("bindir=\"{}:/usr/bin\"", host.at("bin")));
        host.edit("xen-hotplug-common.sh", "/var/log/xen", &host.at("xenlog"));
        host.edit("locking.sh", "/var/run/xen-hotplug", &host.at("xenlock"));
        std::os::unix::fs::symlink(SNAPFS, place.path("bin/snapfs")).unwrap();
        for (name, body) in XENSTORE {
            host.tool(name, body);
        }
        place.write_host_config();
        host
    }

    fn at(&self, name: &str) -> String {
        self.place.path(name).to_str().unwrap().to_owned()
    }

    fn edit(&self, script: &str, old: &str, new: &str) {
        let path = self.place.path("scripts").join(script);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(old), "{script}: no {old}");
        std::fs::write(path, text.replace(old, new)).unwrap();
    }

    fn tool(&self, name: &str, body: &str) {
        let path = self.place.path("bin").join(name);
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn key(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.place.path("xenstore").join(BACKEND).join(name).join(".v")).ok()
    }

    fn put(&self, name: &str, value: &str) {
        let folder = self.place.path("xenstore").join(BACKEND).join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(".v"), value).unwrap();
    }

    /// What libxl deletes when a disk is gone.
    fn forget(&self) {
        std::fs::remove_dir_all(self.place.path("xenstore/backend")).unwrap();
    }

    /// What libxl writes before it calls the script.
    fn prepare(&self, target: &str, mode: &str) {
        let frontend = "/local/domain/7/device/vbd/51728";
        for (name, value) in [
            ("params", target),
            ("mode", mode),
            ("state", "2"),
            ("frontend-id", "7"),
            ("frontend", frontend),
            ("online", "1"),
        ] {
            self.put(name, value);
        }
    }

    fn shell(&self, line: &str) -> Done {
        let path = format!("{}:{}", self.at("bin"), std::env::var("PATH").unwrap());
        let mut command = self.place.command("sh");
        command.args(["-c", line]).env("PATH", path).env("XS", self.at("xenstore"));
        command.env("XENBUS_TYPE", "vbd").env("XENBUS_PATH", BACKEND).env("XENBUS_BASE_PATH", "backend");
        Done::of(line.to_owned(), command.output().unwrap())
    }

    fn call(&self, verb: &str) -> Done {
        self.shell(&format!("script=scripts/block-snapfs scripts/block-snapfs {verb}"))
    }

    #[track_caller]
    fn add(&self) -> PathBuf {
        let done = self.call("add");
        assert_eq!(done.code, 0, "{:?} {}", self.key("hotplug-error"), self.log());
        self.device()
    }

    /// The device that was written for blkback, in both ways.
    #[track_caller]
    fn device(&self) -> PathBuf {
        assert_eq!(self.key("hotplug-status").as_deref(), Some("connected"), "{:?}", self.key("hotplug-error"));
        let path = PathBuf::from(self.key("physical-device-path").unwrap());
        let metadata = path.metadata().unwrap();
        assert!(metadata.file_type().is_block_device());
        let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        assert_eq!(self.key("physical-device"), Some(format!("{major:x}:{minor:x}")));
        path
    }

    /// It failed, and told the guest's administrator why.
    #[track_caller]
    fn add_fails(&self, word: &str) {
        let done = self.call("add");
        assert_ne!(done.code, 0);
        assert_eq!(self.key("hotplug-status").as_deref(), Some("error"));
        let said = self.key("hotplug-error").unwrap();
        assert!(said.contains(word) && !said.contains('\n'), "no {word:?} in {said:?}");
        assert_eq!(self.key("physical-device"), None);
    }

    #[track_caller]
    fn remove(&self) {
        let done = self.call("remove");
        assert_eq!(done.code, 0, "{}", self.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.place.path("xenlog/xen-hotplug.log")).unwrap_or_default()
    }
}

#[test]
fn a_guest_gets_a_snapshot_read_only_and_gives_it_back() {
    const NAME: &str = "xen::a_guest_gets_a_snapshot_read_only_and_gives_it_back";
    need_mount!(NAME);
    need_loop!(NAME);
    let scripts = need_xen!(NAME);
    let (place, bytes) = Place::with_snapshot();
    let host = Host::new(&place, &scripts);
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    // By path, and by name in the default mount.
    for target in [host.at("mnt/web01/a.img"), "web01/a.img".to_owned(), "web01/latest".to_owned()] {
        host.prepare(&target, "r");
        let device = host.add();
        same(&std::fs::read(&device).unwrap(), &bytes, &target);
        assert_eq!(place.shell(&format!("blockdev --getro {}", device.display())).ok().text(), "1\n");
        // Twice is once.
        host.put("state", "4");
        assert_eq!(host.add(), device);
        assert_eq!(loops_of(&place).len(), 1);
        host.remove();
        assert!(loops_of(&place).is_empty());
        host.remove();
        host.forget();
    }
    assert_eq!(std::fs::read_dir(place.path("attached")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(place.path("xenlock")).unwrap().count(), 0);
    mount.umount();
}

#[test]
fn a_guest_stays_with_what_was_the_latest() {
    const NAME: &str = "xen::a_guest_stays_with_what_was_the_latest";
    need_mount!(NAME);
    need_loop!(NAME);
    let scripts = need_xen!(NAME);
    let (place, bytes) = Place::with_snapshot();
    let host = Host::new(&place, &scripts);
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    host.prepare("web01/latest", "r");
    let device = host.add();
    place.write("b", &image(2, 2));
    place.snapfs("backup store web01/b.img b").ok();
    eventually("the new snapshot is seen", || place.exists("mnt/web01/b.img"));
    assert_eq!(host.add(), device);
    same(&std::fs::read(&device).unwrap(), &bytes, "the device");
    host.remove();
    mount.umount();
}

#[test]
fn what_is_wrong_is_told_in_hotplug_error() {
    const NAME: &str = "xen::what_is_wrong_is_told_in_hotplug_error";
    need_mount!(NAME);
    need_loop!(NAME);
    let scripts = need_xen!(NAME);
    let (place, _) = Place::with_snapshot();
    let host = Host::new(&place, &scripts);
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    for (target, mode, word) in [
        ("web01/none.img", "r", "web01/none.img: there is no such snapshot"),
        ("none/latest", "r", "none/latest: there is no such snapshot"),
        (&host.at("mnt/web01"), "r", "folder"),
        (&host.at("a"), "r", "lies in no mounted store"),
        ("", "r", "no target"),
        ("--help", "r", "snapshot name"),
        ("web01/a.img; touch x", "r", "no such snapshot"),
        ("web01/a.img,keep", "r", "web01/a.img: keep is for clones"),
        ("web01/none.img", "w", "web01/none.img: there is no such snapshot"),
        ("web01/none.img,keep", "w", "web01/none.img: there is no such snapshot"),
        (",keep", "w", "no target"),
    ] {
        host.prepare(target, mode);
        host.add_fails(word);
        host.remove();
        host.forget();
    }
    // The disk was given up while the script waited for the lock.
    host.prepare("web01/a.img", "r");
    host.put("state", "6");
    host.add_fails("given up");
    host.forget();
    // Another script does not let go of the lock.
    host.edit("block-snapfs", "lock_limit=10", "lock_limit=1");
    let mut other = place.command("flock");
    other.args([&host.at("xenlock/block"), "sh", "-c", "echo; read x"]);
    let mut other = other.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    host.prepare("web01/a.img", "r");
    host.add_fails("have held the lock for 1 seconds");
    host.forget();
    drop(other.stdin.take());
    other.wait().unwrap();
    // The program is missing, or it hangs: whatever happens, libxl hears of it before its own patience ends.
    host.edit("block-snapfs", "\nlimit=30", "\nlimit=3");
    host.edit("block-snapfs", "PATH=$PATH:/usr/local/sbin:/usr/local/bin", "");
    for (body, word) in [("exec sleep 600", "no answer within 3 seconds"), ("echo /dev/nothing", "got no block device")]
    {
        host.prepare("web01/a.img", "r");
        host.tool("snapfs", body);
        host.add_fails(word);
        host.forget();
    }
    std::fs::remove_file(place.path("bin/snapfs")).unwrap();
    if place.shell("command -v snapfs").code != 0 {
        host.prepare("web01/a.img", "r");
        host.add_fails("not installed");
    }
    assert!(loops_of(&place).is_empty());
    assert!(!place.exists("x"));
    mount.umount();
}

#[test]
fn no_child_of_the_script_inherits_its_lock() {
    const NAME: &str = "xen::no_child_of_the_script_inherits_its_lock";
    need_mount!(NAME);
    need_loop!(NAME);
    let scripts = need_xen!(NAME);
    let (place, _) = Place::with_snapshot();
    let host = Host::new(&place, &scripts);
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    // What begins before the real program does: it notes what it has open.
    host.tool("snapfs", &format!("ls -l /proc/self/fd >'{}'; exec {SNAPFS} \"$@\"", host.at("open")));
    host.prepare("web01/a.img", "r");
    for verb in ["add", "remove"] {
        assert_eq!(host.call(verb).code, 0, "{}", host.log());
        let open = String::from_utf8(place.read("open")).unwrap();
        assert!(open.contains("/proc/") && !open.contains("xenlock"), "{verb}: {open}");
    }
    mount.umount();
}

#[test]
fn reap_frees_what_a_guest_left_and_nothing_else() {
    const NAME: &str = "xen::reap_frees_what_a_guest_left_and_nothing_else";
    need_mount!(NAME);
    need_loop!(NAME);
    let scripts = need_xen!(NAME);
    let (place, bytes) = Place::with_snapshot();
    let host = Host::new(&place, &scripts);
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    host.prepare("web01/a.img", "r");
    let device = host.add();
    let kept = PathBuf::from(place.snapfs("attach web01/a.img --owner mine").ok().text().trim_end());
    // The guest is there.
    assert_eq!(host.shell("snapfs reap").ok().text(), "");
    // Nothing is known while the xenstore does not answer.
    host.tool("xenstore-read", "echo 'xs_open: No such file or directory' >&2; exit 1");
    host.shell("snapfs reap").fails(1, "xs_open");
    assert_eq!(loops_of(&place).len(), 2);
    host.tool("xenstore-read", XENSTORE[0].1);
    // The guest's toolstack was killed, and its disk is gone without the script being called.
    host.forget();
    let told = host.shell("snapfs reap --dry-run").ok().text();
    assert!(told.contains("would be freed, its guest is gone") && told.contains(device.to_str().unwrap()), "{told}");
    assert_eq!(loops_of(&place).len(), 2);
    let rows = host.shell("snapfs reap --json").ok().json();
    assert_eq!(rows[0]["owner"], format!("xen:{BACKEND}"));
    assert_eq!(loops_of(&place), std::slice::from_ref(&kept));
    same(&std::fs::read(&kept).unwrap(), &bytes, "what belongs to another owner");
    assert_eq!(host.shell("snapfs reap --json").ok().json(), serde_json::json!([]));
    place.snapfs("detach --owner mine").ok();
    mount.umount();
}

/// The names of all clones.
fn clones(place: &Place) -> Vec<String> {
    let rows = place.snapfs("clones store --json").ok().json();
    rows.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
}

fn write_to(device: &Path, bytes: &[u8], offset: u64) {
    let file = File::options().write(true).open(device).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_guest_writes_to_a_clone_that_goes_with_its_disk() {
    const NAME: &str = "xen::a_guest_writes_to_a_clone_that_goes_with_its_disk";
    need_mount!(NAME);
    need_loop!(NAME);
    let scripts = need_xen!(NAME);
    let (place, bytes) = Place::with_snapshot();
    let host = Host::new(&place, &scripts);
    for options in ["ro", ""] {
        let mount = place.mount(options);
        let _freed = Freed(&place);
        for target in [host.at("mnt/web01/a.img"), "web01/latest".to_owned()] {
            host.prepare(&target, "w");
            let device = host.add();
            same(&std::fs::read(&device).unwrap(), &bytes, &target);
            assert_eq!(place.shell(&format!("blockdev --getro {}", device.display())).ok().text(), "0\n");
            write_to(&device, b"the guest's", 12345);
            // Twice is once, and takes nothing from the guest.
            host.put("state", "4");
            assert_eq!(host.add(), device);
            assert_eq!((loops_of(&place).len(), clones(&place).len()), (1, 1));
            assert_eq!(&std::fs::read(&device).unwrap()[12345..12356], b"the guest's");
            same(&place.read("mnt/web01/a.img"), &bytes, "the snapshot");
            for _ in 0..2 {
                host.remove();
                assert!(loops_of(&place).is_empty() && clones(&place).is_empty());
            }
            host.forget();
        }
        assert_eq!(std::fs::read_dir(place.path("attached")).unwrap().count(), 0);
        assert_eq!(std::fs::read_dir(place.path("store/vms/web01/holds")).map_or(0, Iterator::count), 0);
        mount.umount();
    }
}

#[test]
fn a_guest_keeps_its_clone_when_asked_to() {
    const NAME: &str = "xen::a_guest_keeps_its_clone_when_asked_to";
    need_mount!(NAME);
    need_loop!(NAME);
    let scripts = need_xen!(NAME);
    let (place, bytes) = Place::with_snapshot();
    let host = Host::new(&place, &scripts);
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    host.prepare("web01/latest,keep", "w");
    write_to(&host.add(), b"first", 0);
    host.remove();
    host.forget();
    assert!(loops_of(&place).is_empty());
    assert_eq!(clones(&place), ["web01-a.img"]);
    // It goes on with the clone, which is nobody's to drop now.
    for (target, written) in [("mnt/.snapfs/clones/web01-a.img", "again"), ("mnt/.snapfs/clones/web01-a.img", "third")]
    {
        host.prepare(&host.at(target), "w");
        let device = host.add();
        assert_ne!(&std::fs::read(&device).unwrap()[..5], &bytes[..5]);
        write_to(&device, written.as_bytes(), 0);
        host.remove();
        host.forget();
        assert_eq!(&place.read(target)[..5], written.as_bytes());
    }
    assert_eq!(clones(&place), ["web01-a.img"]);
    assert_eq!(std::fs::read_dir(place.path("attached")).unwrap().count(), 0);
    same(&place.read("mnt/web01/a.img"), &bytes, "the snapshot");
    place.snapfs("unclone store web01-a.img").ok();
    mount.umount();
}

#[test]
fn reap_drops_the_clone_of_a_guest_that_is_gone_and_of_no_other() {
    const NAME: &str = "xen::reap_drops_the_clone_of_a_guest_that_is_gone_and_of_no_other";
    need_mount!(NAME);
    need_loop!(NAME);
    let scripts = need_xen!(NAME);
    let (place, bytes) = Place::with_snapshot();
    let _cleared = Cleared(&place, "mnt");
    let host = Host::new(&place, &scripts);
    let mount = place.mount("ro");
    let _freed = Freed(&place);
    host.prepare("web01/latest", "w");
    let device = host.add();
    write_to(&device, b"flushed", 0);
    // The daemon dies and is there again: the guest is there, and so is what it had flushed, whatever became of the device.
    mount.kill();
    let mount = place.mount("ro");
    for is_freed in [false, true] {
        if is_freed {
            place.shell(&format!("losetup --detach {}", device.display())).ok();
        }
        assert_eq!(host.shell("snapfs reap").ok().text(), "");
        assert_eq!(clones(&place), ["web01-a.img"]);
        assert_eq!(&place.read("mnt/.snapfs/clones/web01-a.img")[..7], b"flushed");
    }
    // Called once more for the same disk, the script goes on with it.
    let device = host.add();
    assert_eq!(&std::fs::read(&device).unwrap()[..7], b"flushed");
    // Gone without the script being called.
    host.forget();
    let told = host.shell("snapfs reap --dry-run --json").ok().json();
    assert_eq!((&told[0]["clone"], &told[0]["reason"]), (&"web01-a.img".into(), &"its guest is gone".into()));
    host.shell("snapfs reap").ok();
    assert!(loops_of(&place).is_empty() && clones(&place).is_empty());
    assert_eq!(host.shell("snapfs reap --json").ok().json(), serde_json::json!([]));

    // And when it is not called: the next disk with this path begins anew.
    host.prepare("web01/latest", "w");
    write_to(&host.add(), b"another", 0);
    host.forget();
    host.prepare("web01/latest", "w");
    let device = host.add();
    same(&std::fs::read(&device).unwrap(), &bytes, "the disk of another guest");
    assert_eq!((loops_of(&place).len(), clones(&place).len()), (1, 1));
    // What is to be kept is kept by reap, too.
    host.forget();
    host.prepare("web01/latest,keep", "w");
    write_to(&host.add(), b"kept", 0);
    host.forget();
    host.shell("snapfs reap").ok();
    assert!(loops_of(&place).is_empty());
    assert_eq!(clones(&place).len(), 1);
    assert_eq!(&place.read("mnt/.snapfs/clones/web01-a.img")[..4], b"kept");
    mount.umount();
}
