//! The helpers of mount(8) and umount(8), the units of systemd, and mounts that somebody else has made.
//!
//! Where mount(8) itself has to find a helper, everything happens in a mount namespace and a process namespace of its
//! own: `mount-helpers/install` puts all below a folder, which is laid over the real one. Whatever becomes of a test,
//! its mounts and daemons end with the namespace.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::whole::{Cleared, Done, MIB, Place, SNAPFS, has_tool, is_root, need_mount, need_tools, signal, skip};
use crate::world::noise;

use rustix::process::Signal;

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Runs before each script: the installation becomes that of the machine, as far as the script can see.
///
/// `set -e` does not look at what stands before `&&` or after `!`: scripts have one command a line, and `not`.
const PRELUDE: &str = r#"
set -eEu -o pipefail
trap 'echo "line $LINENO: $BASH_COMMAND" >&2' ERR
sbin=$(readlink -f /sbin)
mount -t overlay overlay -o "lowerdir=$HERE/root/sbin:$sbin" "$sbin"
mount --bind "$HERE/root/usr/local" /usr/local
mkdir -p /run/mount
mount -t tmpfs tmpfs /run/mount
[ -e "$HERE/fuse" ] || mknod "$HERE/fuse" c 10 229
chmod 666 "$HERE/fuse"
mount --bind "$HERE/fuse" /dev/fuse
S=${S:-$HERE/store} D=${D:-$HERE/mnt}
mkdir -p "$D"
is_mounted() { findmnt -n -t fuse.snapfs -- "$D" >/dev/null; }
daemon() { sed 's/.*"pid":\([0-9]*\).*/\1/' "$D/.snapfs/status"; }
ended() { [ ! -e "/proc/$1" ] || grep -q '^State:.[ZX]' "/proc/$1/status"; }
is_cut_off() { { ls "$D" 2>&1 || :; } | grep -q 'not connected'; }
not() { if "$@"; then echo "is so: $*" >&2; exit 98; fi; }
fails() {
    local wanted=$1 word=$2 code=0
    shift 2
    "$@" 2>"$HERE/error" || code=$?
    if [ "$code" != "$wanted" ] || [ "$(wc -l <"$HERE/error")" != 1 ] || ! grep -q "$word" "$HERE/error"; then
        echo "$*: $code, $(cat "$HERE/error")" >&2
        exit 97
    fi
}
eventually() {
    for try in $(seq 3000); do if "$@"; then return; fi; sleep 0.1; done
    echo "never: $*" >&2
    exit 96
}
as_nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
"#;

/// A place with a store and an installation beside it.
struct Host {
    place: Place,
}

impl Host {
    fn new() -> Self {
        let place = Place::new();
        let mut install = place.command(source("mount-helpers/install"));
        let installed = install.env("DESTDIR", place.path("root")).env("SNAPFS", SNAPFS).output().unwrap();
        assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
        Self { place }
    }

    /// The folder that scripts run in.
    fn here(&self) -> PathBuf {
        // Without a slash at its end.
        self.place.path("store").parent().unwrap().to_owned()
    }

    /// Runs a script in namespaces of its own, as process 1 there.
    fn script(&self, script: &str) -> Done {
        self.script_with(script, &[])
    }

    fn script_with(&self, script: &str, variables: &[(&str, &Path)]) -> Done {
        let mut command = self.place.command("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]);
        command.args(["bash", "-c", &format!("{PRELUDE}\n{script}")]).env("HERE", self.here());
        command.envs(variables.iter().copied());
        Done::of(script.to_owned(), command.output().unwrap())
    }
}

/// What a private installation needs.
fn can_install() -> Result<(), String> {
    if !is_root() {
        return Err("namespaces need root".to_owned());
    }
    for tool in ["bash", "unshare", "nsenter", "setpriv", "findmnt", "mount", "umount"] {
        if !has_tool(tool) {
            return Err(format!("{tool} is not installed"));
        }
    }
    let kinds = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !kinds.contains("overlay") {
        return Err("the kernel has no overlay".to_owned());
    }
    Ok(())
}

/// Returns from the test unless helpers can be installed in a namespace.
macro_rules! need_host {
    ($name:expr) => {
        need_mount!($name);
        if let Err(why) = can_install() {
            skip($name, &why);
            return;
        }
    };
}

const UNITS: [&str; 7] = [
    "snapfs@.service",
    "snapfs-check@.service",
    "snapfs-check@.timer",
    "snapfs-prune@.service",
    "snapfs-prune@.timer",
    "snapfs-elect@.service",
    "snapfs-elect@.timer",
];

/// The helper itself, as mount(8) would call it.
fn helper(place: &Place, name: &str, words: &[&str]) -> Done {
    let mut command = place.command(source("mount-helpers").join(name));
    let folder = Path::new(SNAPFS).parent().unwrap().to_str().unwrap();
    let path = format!("{folder}:{}", std::env::var("PATH").unwrap());
    let output = command.args(words).env("PATH", path).output().unwrap();
    Done::of(format!("{name} {}", words.join(" ")), output)
}

#[track_caller]
fn one_line(done: Done, code: i32, word: &str) {
    let done = done.fails(code, word);
    assert_eq!(done.err.lines().count(), 1, "{}: {}", done.command, done.err);
    assert!(done.out.is_empty());
}

#[test]
fn an_installation_has_everything_in_its_place() {
    let host = Host::new();
    let root = |name: &str| host.place.path("root").join(name);
    for name in ["mount.snapfs", "mount.fuse.snapfs", "umount.snapfs", "umount.fuse.snapfs"] {
        assert_eq!(root("sbin").join(name).metadata().unwrap().mode() & 0o777, 0o755, "{name}");
    }
    assert_eq!(root("usr/local/bin/snapfs").metadata().unwrap().mode() & 0o777, 0o755);
    for name in UNITS {
        assert!(root("usr/local/lib/systemd/system").join(name).is_file(), "{name}");
    }
    assert!(root("usr/local/share/man/man1/snapfs.1").is_file());
    assert!(root("etc/snapfs").is_dir());
    // The program that is not in PATH is found beside the helper.
    let mount = |folder: &Path| host.place.command(folder.join("mount.snapfs")).env("PATH", "/usr/bin:/bin").output();
    std::fs::copy(SNAPFS, root("sbin/snapfs")).unwrap();
    assert_eq!(mount(&root("sbin")).unwrap().status.code(), Some(1));
}

#[test]
fn a_failure_is_one_line_and_a_code_of_mount() {
    need_mount!("mount_helper::a_failure_is_one_line_and_a_code_of_mount");
    let place = Place::new();
    std::fs::create_dir(place.path("mnt")).unwrap();
    place.write("file", b"");
    let mount = |words: &str| helper(&place, "mount.snapfs", &words.split_whitespace().collect::<Vec<_>>());
    for words in ["", "store", "store mnt third", "store mnt -x", "store mnt -o"] {
        one_line(mount(words), 1, "usage: mount.snapfs");
    }
    one_line(mount("store mnt -o ro,frobnicate=7"), 1, "frobnicate=7");
    one_line(mount("store mnt -o max_memory=lots"), 1, "max_memory");
    // Sloppy about what is unknown, not about what is wrong.
    one_line(mount("store mnt -s -o max_memory=lots"), 1, "max_memory");
    one_line(mount("store mnt -o remount,ro"), 32, "remount");
    one_line(mount("nowhere mnt"), 32, "nowhere");
    one_line(mount("store nowhere"), 32, "nowhere");
    one_line(mount("store file"), 32, "is no folder");
    one_line(mount("mnt store"), 32, "mnt");
    one_line(mount("store mnt -N /nowhere"), 2, "/nowhere");
    one_line(mount("store /dev/fd/77"), 32, "/dev/fd/77");
    one_line(mount("store /dev/fd/x"), 32, "/dev/fd/x");
    let umount = |words: &str| helper(&place, "umount.snapfs", &words.split_whitespace().collect::<Vec<_>>());
    one_line(umount(""), 1, "usage: umount.snapfs");
    one_line(umount("mnt -x"), 1, "usage: umount.snapfs");
    for words in ["mnt", "mnt -l", "mnt -f", "mnt -flnrv -t fuse.snapfs"] {
        one_line(umount(words), 32, "nothing is mounted there");
    }
    one_line(umount("/proc"), 32, "not a store");
    // What is busy is told in one line too.
    let mount_of_it = place.mount("");
    one_line(mount("store mnt"), 32, "is mounted there");
    one_line(mount("-f store mnt"), 32, "is mounted there");
    let file = std::fs::File::open(place.path("mnt/.snapfs/status")).unwrap();
    one_line(umount("mnt -r"), 32, "in use");
    drop(file);
    mount_of_it.umount();
}

#[test]
fn a_fake_mount_checks_everything_and_mounts_nothing() {
    need_mount!("mount_helper::a_fake_mount_checks_everything_and_mounts_nothing");
    let place = Place::new();
    std::fs::create_dir(place.path("mnt")).unwrap();
    std::fs::create_dir(place.path("store/inside")).unwrap();
    let fake = |words: &str| helper(&place, "mount.snapfs", &words.split(' ').collect::<Vec<_>>());
    fake("store mnt -f -o ro,_netdev").ok();
    fake("-sfnv store mnt -o whatever=7 -t fuse.snapfs").ok();
    assert!(!place.exists("mnt/.snapfs"));
    one_line(fake("store mnt -f -o whatever=7"), 1, "whatever");
    one_line(fake("nowhere mnt -f"), 32, "nowhere");
    one_line(fake("mnt store -f"), 32, "no snapfs store");
    one_line(fake("store nowhere -f"), 32, "nowhere");
    one_line(fake("store store/inside -f"), 32, "lies in the store");
    one_line(fake("store mnt -f -o max_memory=1M"), 32, "memory");
}

#[test]
fn fstab_lines_are_mounted_and_unmounted_whatever_the_paths() {
    need_host!("mount_helper::fstab_lines_are_mounted_and_unmounted_whatever_the_paths");
    let host = Host::new();
    host.place.write("image.raw", &noise(1, 3 * MIB));
    let (store, folder) = (host.place.path("my store, #1 \\x"), host.place.path("a mnt,#\\134\tb"));
    std::fs::rename(host.place.path("store"), &store).unwrap();
    let escaped = |path: &Path| {
        let text = path.to_str().unwrap().replace('\\', "\\134").replace('\t', "\\011");
        text.replace(' ', "\\040").replace('#', "\\043")
    };
    for kind in ["snapfs", "fuse.snapfs"] {
        let options = "rw,_netdev,nofail,user,noauto,x-systemd.requires-mounts-for=/,comment=backups,seal_after=100h";
        let line = format!("# private\n{} {} {kind} {} 0 0\n", escaped(&store), escaped(&folder), options);
        host.place.write("fstab", line.as_bytes());
        host.place.write("fstab.auto", line.replace(",noauto", "").as_bytes());
        let done = host.script_with(
            r#"
            mount -T "$HERE/fstab" "$D"
            is_mounted
            umount "$D"
            not is_mounted
            mount -a -T "$HERE/fstab"
            not is_mounted
            mount -a -T "$HERE/fstab.auto"
            is_mounted
            findmnt -nro OPTIONS -- "$D" | grep -q noexec
            mount -a -T "$HERE/fstab.auto"
            mkdir -p "$D/web01"
            cp image.raw "$D/web01/$$.part"
            mv "$D/web01/$$.part" "$D/web01/$(ls "$D/web01" | wc -l).img"
            cmp image.raw "$D/web01/latest"
            daemon=$(daemon)
            umount "$D"
            not is_mounted
            ended "$daemon"
            snapfs restore "$S" web01/latest - | cmp - image.raw
            "#,
            &[("S", &store), ("D", &folder)],
        );
        assert_eq!(done.code, 0, "{kind}: {} {}", done.text(), done.err);
        assert_eq!(done.err, "", "{kind}");
    }
}

#[test]
fn a_store_that_is_missing_fails_the_mount_and_no_more() {
    need_host!("mount_helper::a_store_that_is_missing_fails_the_mount_and_no_more");
    let host = Host::new();
    let fstab = format!(
        "{0}/nowhere {0}/one snapfs nofail,_netdev 0 0\n{0}/store {0}/mnt snapfs _netdev 0 0\n",
        host.here().display()
    );
    host.place.write("fstab", fstab.as_bytes());
    std::fs::create_dir(host.place.path("one")).unwrap();
    let done = host.script(
        r#"
        fails 32 nowhere mount -t snapfs "$HERE/nowhere" "$D"
        fails 1 frobnicate mount -t snapfs "$S" "$D" -o frobnicate
        mount -s -t snapfs "$S" "$D" -o frobnicate
        is_mounted
        umount "$D"
        mount -f -t snapfs "$S" "$D"
        not is_mounted
        mount -n -v -t snapfs "$S" "$D"
        is_mounted
        umount "$D"
        code=0; mount -a -T "$HERE/fstab" 2>error || code=$?
        is_mounted
        [ "$code" != 0 ]
        grep -q nowhere error
        umount "$D"
        "#,
    );
    assert_eq!(done.code, 0, "{} {}", done.text(), done.err);
}

#[test]
fn umount_waits_for_the_commit_whoever_calls_it() {
    need_host!("mount_helper::umount_waits_for_the_commit_whoever_calls_it");
    let host = Host::new();
    host.place.write("image.raw", &noise(1, 16 * MIB));
    // As systemd does it, with options that mount(8) remembers, by a relative path, by ourselves.
    let ways = [
        ("", "umount -c \"$D\""),
        ("_netdev", "umount \"$D\""),
        ("x-anything", "umount \"$D\""),
        ("helper=snapfs", "umount \"$D\""),
        ("rw", "umount mnt"),
        ("rw", "/sbin/umount.snapfs \"$D\" -nv"),
        ("rw", "snapfs umount \"$D\""),
    ];
    for (number, (options, umount)) in ways.into_iter().enumerate() {
        let done = host.script(&format!(
            r#"
            mount -t snapfs "$S" "$D" -o "{options}"
            daemon=$(daemon)
            mkdir -p "$D/web01"
            cp image.raw "$D/web01/{number}.img"
            {umount}
            not is_mounted
            ended "$daemon"
            # Sealed on the way out: nobody else would do it now.
            snapfs show "$S" web01/{number}.img >/dev/null
            not grep -q TARGET= /run/mount/utab
            "#
        ));
        assert_eq!(done.code, 0, "{options} {umount}: {} {}", done.text(), done.err);
    }
}

#[test]
fn a_mount_in_use_or_dead_is_unmounted_as_umount_is_told() {
    need_host!("mount_helper::a_mount_in_use_or_dead_is_unmounted_as_umount_is_told");
    let host = Host::new();
    let done = host.script(
        r#"
        mount -t snapfs "$S" "$D" -o _netdev
        daemon=$(daemon)
        exec 9<"$D/.snapfs/status"
        fails 32 "in use" umount "$D"
        is_mounted
        umount -l "$D"
        not is_mounted
        not ended "$daemon"
        exec 9<&-
        eventually ended "$daemon"

        # The daemon is killed: a mount takes the dead mountpoint over, and umount takes it away.
        mount -t snapfs "$S" "$D" -o _netdev
        kill -9 "$(daemon)"
        eventually is_cut_off
        mount -t snapfs "$S" "$D" -o _netdev 2>error
        is_mounted
        grep -q "has died" error
        [ -e "$D/.snapfs/status" ]
        [ "$(findmnt -nr -- "$D" | wc -l)" = 1 ]
        kill -9 "$(daemon)"
        eventually is_cut_off
        umount "$D"
        not is_mounted

        # One that hangs: nothing is asked of it.
        mount -t snapfs "$S" "$D" -o _netdev
        daemon=$(daemon)
        kill -STOP "$daemon"
        umount -f -l "$D"
        not is_mounted
        kill -CONT "$daemon"
        eventually ended "$daemon"
        snapfs check "$S"
        "#,
    );
    assert_eq!(done.code, 0, "{} {}", done.text(), done.err);
}

#[test]
fn users_mount_what_fstab_lets_them() {
    need_host!("mount_helper::users_mount_what_fstab_lets_them");
    if !has_tool("fusermount3") {
        return skip("mount_helper::users_mount_what_fstab_lets_them", "fusermount3 is not installed");
    }
    let host = Host::new();
    let here = host.here().display().to_string();
    host.place.write("fstab", format!("{here}/store {here}/mnt snapfs noauto,users,exec 0 0\n").as_bytes());
    let done = host.script(
        r#"
        mount --bind "$HERE/fstab" /etc/fstab
        code=0; as_nobody mount "$D" 2>error || code=$?
        [ "$code" != 0 ]
        [ "$(wc -l <error)" = 1 ]
        not is_mounted
        chown -R 65534:65534 "$S" "$D"
        as_nobody mount "$D"
        is_mounted
        as_nobody mkdir "$D/web01"
        as_nobody sh -c "echo x > '$D/web01/a.part'"
        daemon=$(as_nobody cat "$D/.snapfs/status" | sed 's/.*"pid":\([0-9]*\).*/\1/')
        grep -q '^Uid:.65534' "/proc/$daemon/status"
        as_nobody umount "$D"
        not is_mounted
        ended "$daemon"
        "#,
    );
    assert_eq!(done.code, 0, "{} {}", done.text(), done.err);
}

#[test]
fn another_user_or_nobody_with_privileges_serves_a_mount() {
    const NAME: &str = "mount_helper::another_user_or_nobody_with_privileges_serves_a_mount";
    need_host!(NAME);
    need_tools!(NAME, "mount.fuse3");
    let host = Host::new();
    host.place.write("image.raw", &noise(1, 3 * MIB));
    let done = host.script(
        r#"
        try() {
            mount -t snapfs "$S" "$D" -o "_netdev,$1,seal_after=1h"
            is_mounted
            [ "$(findmnt -nro SOURCE -- "$D")" = "$S" ]
            findmnt -nro OPTIONS -- "$D" | grep nosuid | grep nodev | grep -q default_permissions
            daemon=$(daemon)
            grep -q "^Uid:.$2" "/proc/$daemon/status"
            grep -q '^CapEff:.0000000000000000$' "/proc/$daemon/status"
            grep -q '^CapBnd:.0000000000000000$' "/proc/$daemon/status"
            # What nobody may read, nobody can.
            mkdir -p "$D/web01"
            cp image.raw "$D/web01/$2.img"
            [ "$(stat -c %a "$D/web01")" = 700 ]
            cmp image.raw "$D/web01/$2.img"
            umount "$D"
            not is_mounted
            ended "$daemon"
            snapfs restore "$S" "web01/$2.img" - | cmp - image.raw
        }
        try drop_privileges 0
        chown -R 65534:65534 "$S"
        try setuid=nobody,drop_privileges 65534

        # Told to end, it commits, and leaves the unmounting to whoever has mounted.
        mount -t snapfs "$S" "$D" -o drop_privileges,setuid=nobody,seal_after=1h
        daemon=$(daemon)
        cp image.raw "$D/web01/last.img"
        chmod 755 "$D/web01"
        kill "$daemon"
        eventually ended "$daemon"
        eventually is_cut_off
        umount -c "$D"
        not is_mounted
        snapfs restore "$S" web01/last.img - | cmp - image.raw

        # A user alone, through fusermount3.
        chown 65534:65534 "$D"
        mount -t fuse.snapfs "$S" "$D" -o setuid=nobody,ro
        is_mounted
        daemon=$(as_nobody cat "$D/.snapfs/status" | sed 's/.*"pid":\([0-9]*\).*/\1/')
        grep -q '^Uid:.65534' "/proc/$daemon/status"
        as_nobody cat "$D/web01/last.img" | cmp - image.raw
        umount "$D"
        eventually ended "$daemon"
        "#,
    );
    assert_eq!(done.code, 0, "{} {}", done.text(), done.err);
}

#[test]
fn a_mount_that_somebody_else_has_made_is_served_in_the_foreground() {
    const NAME: &str = "mount_helper::a_mount_that_somebody_else_has_made_is_served_in_the_foreground";
    need_host!(NAME);
    need_tools!(NAME, "mount.fuse3");
    let host = Host::new();
    // mount.fuse3 mounts, and becomes the program that has the name of the type.
    let bin = host.place.path("root/usr/local/bin");
    std::fs::rename(bin.join("snapfs"), bin.join("real")).unwrap();
    let serve = "#!/bin/sh\ncase $1 in *-helper) exec real \"$@\" ;; esac\n\
                 exec real mount \"$1\" \"$2\" --foreground -o \"$4,seal_after=1h\"\n";
    std::fs::write(bin.join("snapfs"), serve).unwrap();
    std::fs::set_permissions(bin.join("snapfs"), PermissionsExt::from_mode(0o755)).unwrap();
    let done = host.script(
        r#"
        begin() {
            mount.fuse3 "$S" "$D" -t fuse.snapfs -o "drop_privileges,$1" 2>said &
            helper=$!
            eventually is_mounted
            eventually [ -e "$D/.snapfs/status" ]
            daemon=$(daemon)
        }
        begin fsname=x
        mkdir "$D/web01"
        echo hello >"$D/web01/a.img"
        real umount "$D"
        wait "$helper"
        not is_mounted
        [ "$(real restore "$S" web01/a.img -)" = hello ]

        begin fsname=x
        exec 9>"$D/web01/b.img"
        echo hello >&9
        kill -TERM "$daemon"
        wait "$helper"
        grep -q "has to unmount" said
        exec 9>&- || :
        umount -l "$D"
        real list "$S" web01 --drafts | grep -q b.img

        # Who lets others in must let the kernel check what they may.
        code=0; mount.fuse3 "$S" "$D" -t fuse.snapfs -o drop_privileges,allow_other 2>said || code=$?
        [ "$code" = 1 ]
        grep -q default_permissions said
        umount -l "$D"
        begin allow_other,default_permissions
        as_nobody ls "$D" >/dev/null
        umount "$D"
        wait "$helper"
        real check "$S"
        "#,
    );
    assert_eq!(done.code, 0, "{} {}", done.text(), done.err);
}

#[test]
fn a_mount_on_demand_does_not_wait_for_itself() {
    const NAME: &str = "mount_helper::a_mount_on_demand_does_not_wait_for_itself";
    need_host!(NAME);
    need_tools!(NAME, "timeout", "mkfifo", "setsid");
    if !std::fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("\tautofs\n") {
        return skip(NAME, "the kernel has no autofs");
    }
    let host = Host::new();
    // As x-systemd.automount does it: the mountpoint is a trigger. Whoever pulls it waits until there is a mount, and so
    // does everybody else who comes by, but for the process group that is to mount.
    let done = host.script(
        r#"
        mkfifo pulled
        exec 7<>pulled
        mount -i -t autofs -o fd=7,minproto=5,maxproto=5,direct trigger "$D"
        setsid cat "$D/.snapfs/status" >said 2>&1 &
        timeout 300 head -c 1 <&7 >packet
        timeout --foreground 300 mount -t snapfs "$S" "$D"
        is_mounted
        timeout --foreground 300 umount -c "$D"
        not is_mounted
        timeout --foreground 300 mount -f -t snapfs "$S" "$D"
        umount -l "$D"

        # Nor is the trigger pulled by those who only mount.
        exec 7>&-
        exec 7<>pulled
        setsid mount -i -t autofs -o fd=7,minproto=5,maxproto=5,direct trigger "$D"
        code=0
        timeout 1 ls "$D" >/dev/null 2>&1 || code=$?
        [ "$code" = 124 ]
        timeout --foreground 300 mount -t snapfs "$S" "$D"
        is_mounted
        timeout --foreground 300 umount -c "$D"
        not is_mounted
        "#,
    );
    assert_eq!(done.code, 0, "{} {}", done.text(), done.err);
}

#[test]
fn a_mount_goes_into_the_namespace_that_mount_names() {
    need_host!("mount_helper::a_mount_goes_into_the_namespace_that_mount_names");
    let host = Host::new();
    let done = host.script(
        r#"
        unshare --mount --propagation private sleep 1000 &
        other=$!
        eventually sh -c "[ \"\$(readlink /proc/$other/ns/mnt)\" != \"\$(readlink /proc/self/ns/mnt)\" ]"
        mount -N "/proc/$other/ns/mnt" -t snapfs "$S" "$D"
        not is_mounted
        nsenter --mount="/proc/$other/ns/mnt" findmnt -n -t fuse.snapfs -- "$D" >/dev/null
        umount -N "/proc/$other/ns/mnt" "$D"
        not nsenter --mount="/proc/$other/ns/mnt" findmnt -n -t fuse.snapfs -- "$D"
        "#,
    );
    assert_eq!(done.code, 0, "{} {}", done.text(), done.err);
}

/// A service manager's socket.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(place: &Place) -> Self {
        let path = place.path("notify");
        Self { socket: UnixDatagram::bind(&path).unwrap(), path }
    }

    /// The next message; waits for it.
    fn next(&self) -> String {
        let mut bytes = [0; 4096];
        self.socket.set_read_timeout(Some(std::time::Duration::from_secs(300))).unwrap();
        let len = self.socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    }

    fn is_silent(&self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let silent = self.socket.recv(&mut [0; 4096]).is_err();
        self.socket.set_nonblocking(false).unwrap();
        silent
    }

    fn start(&self, place: &Place) -> std::process::Child {
        let mut command = place.command(SNAPFS);
        command.args(["mount", "store", "mnt", "--foreground"]).env("NOTIFY_SOCKET", &self.path);
        command.stderr(std::process::Stdio::null()).spawn().unwrap()
    }
}

#[test]
fn a_service_manager_is_told_when_the_mount_answers_and_when_it_ends() {
    need_mount!("mount_helper::a_service_manager_is_told_when_the_mount_answers_and_when_it_ends");
    let place = Place::new();
    let _cleared = Cleared(&place, "mnt");
    std::fs::create_dir(place.path("mnt")).unwrap();
    let manager = Manager::new(&place);
    let mut daemon = manager.start(&place);
    let ready = manager.next();
    assert!(ready.contains("READY=1\n") && ready.contains("STATUS=serving "), "{ready:?}");
    // At once, without trying again.
    assert!(place.exists("mnt/.snapfs/status"), "ready, and it does not answer");
    place.snapfs("umount mnt").ok();
    assert!(manager.next().contains("STOPPING=1\n"));
    assert!(daemon.wait().unwrap().success());

    // As the manager itself ends it.
    let mut daemon = manager.start(&place);
    assert!(manager.next().contains("READY=1"));
    signal(i32::try_from(daemon.id()).unwrap(), Signal::TERM);
    assert!(manager.next().contains("STOPPING=1"));
    assert!(daemon.wait().unwrap().success());
    assert!(manager.next().contains("STATUS=committing"));

    // Killed, and started again: the dead mountpoint is no obstacle.
    let mut daemon = manager.start(&place);
    assert!(manager.next().contains("READY=1"));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let mut daemon = manager.start(&place);
    assert!(manager.next().contains("READY=1"));
    place.snapfs("umount mnt").ok();
    assert!(daemon.wait().unwrap().success());
    assert!(manager.next().contains("STOPPING=1"));

    // A failure is no readiness, and a mount in the background is nobody's service.
    let mut failed = place.command(SNAPFS);
    failed.args(["mount", "nowhere", "mnt", "--foreground"]).env("NOTIFY_SOCKET", &manager.path);
    assert_eq!(failed.output().unwrap().status.code(), Some(3));
    let mut background = place.command(SNAPFS);
    background.args(["mount", "store", "mnt"]).env("NOTIFY_SOCKET", &manager.path);
    assert!(background.output().unwrap().status.success());
    place.snapfs("umount mnt").ok();
    assert!(manager.is_silent());
}

#[test]
fn units_are_what_systemd_expects() {
    const NAME: &str = "mount_helper::units_are_what_systemd_expects";
    need_tools!(NAME, "systemd-analyze");
    let place = Place::without_store();
    let mut seen = 0;
    for row in std::fs::read_dir(source("mount-helpers")).unwrap() {
        let path = row.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if ![".service", ".timer"].iter().any(|end| name.ends_with(end)) {
            continue;
        }
        seen += 1;
        let text = std::fs::read_to_string(&path).unwrap();
        // Where the program is found must be a program, whatever its name is here.
        place.write(&name.replace("@.", "@web01."), text.replace("=snapfs ", "=/bin/true ").as_bytes());
    }
    assert_eq!(seen, UNITS.len());
    for unit in UNITS.map(|name| name.replace("@.", "@web01.")) {
        let done = place.shell(&format!("SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no ./{unit}"));
        let about: Vec<&str> = done.err.lines().filter(|line| line.contains("snapfs")).collect();
        assert!(about.is_empty(), "{unit}: {about:?}");
    }
}

/// The commands of the unit, run as systemd would run them: words of a variable without braces are split.
#[test]
fn the_nightly_unit_forgets_by_the_rules_of_the_configuration_and_collects() {
    let unit = std::fs::read_to_string(source("mount-helpers/snapfs-prune@.service")).unwrap();
    let commands: Vec<&str> = unit.lines().filter_map(|line| line.strip_prefix("ExecStart=")).collect();
    assert_eq!(commands, ["snapfs forget $SNAPFS_KEEP", "snapfs gc $SNAPFS_GC"]);
    let example = std::fs::read_to_string(source("mount-helpers/store.conf.example")).unwrap();
    let value = |name: &str| {
        let line = example.lines().find_map(|line| line.strip_prefix(&format!("#{name}="))).unwrap();
        line.to_owned()
    };
    let place = Place::new();
    for (name, seed) in [("a.img", 1), ("b.img", 2), ("c.img", 3), ("d.img", 4), ("e.img", 5)] {
        place.write(name, &crate::whole::image(seed, 2));
        place.snapfs(&format!("backup store web01/{name} {name}")).ok();
    }
    let run = |keep: &str, gc: &str| {
        let line = commands.join(" && ").replace("snapfs ", &format!("{SNAPFS} "));
        place.shell(&format!("export SNAPFS_STORE=store SNAPFS_KEEP='{keep}' SNAPFS_GC='{gc}'; {line}"))
    };
    let count = || place.snapfs("list store --json").ok().json().as_array().unwrap().len();
    run("", "").fails(2, "NAME");
    assert_eq!(count(), 5);
    let packs = place.objects("web01", "packs").len();
    let done = run(&value("SNAPFS_KEEP"), &value("SNAPFS_GC")).ok();
    // All are of this moment: the newest three, the newest of which is the newest of its day, week and month, too.
    assert_eq!(count(), 3, "{}", done.text());
    assert!(place.objects("web01", "packs").len() < packs, "{}", done.text());
    place.snapfs("check store --read-data").ok();
}

#[test]
fn nothing_hides_the_mount_of_the_service_from_the_host() {
    let unit = std::fs::read_to_string(source("mount-helpers/snapfs@.service")).unwrap();
    let set: Vec<&str> = unit.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.split('=').next()).collect();
    // Each of these gives a service a mount namespace of its own, or takes /dev/fuse away.
    let hiding =
        ["Private", "Protect", "ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths"]
            .into_iter()
            .chain(["Bind", "Temporary", "Root", "MountFlags", "MountImages", "LogNamespace", "DynamicUser", "Device"])
            .chain(["ProcSubset", "Extension", "NetworkNamespacePath", "IPCNamespacePath", "User", "Group"]);
    for word in hiding {
        assert!(!set.iter().any(|key| key.starts_with(word)), "{word}");
    }
    assert!(set.contains(&"Type") && set.contains(&"ExecStop") && set.contains(&"NoNewPrivileges"));
}

#[test]
fn shell_scripts_are_sound() {
    const NAME: &str = "mount_helper::shell_scripts_are_sound";
    for script in ["mount-helpers/mount.snapfs", "mount-helpers/install"] {
        let parsed = Command::new("sh").arg("-n").arg(source(script)).output().unwrap();
        assert!(parsed.status.success(), "{script}: {}", String::from_utf8_lossy(&parsed.stderr));
    }
    need_tools!(NAME, "shellcheck");
    for script in ["mount-helpers/mount.snapfs", "mount-helpers/install"] {
        let checked = Command::new("shellcheck").arg(source(script)).output().unwrap();
        assert!(checked.status.success(), "{script}: {}", String::from_utf8_lossy(&checked.stdout));
    }
}
