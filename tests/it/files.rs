//! Tier 7: `files` on real filesystems made by real tools: bare and in partitions, whole, crashed and damaged; what a
//! guest has named or linked never reaches this host.

use std::os::unix::ffi::OsStrExt;

use serde_json::json;

use crate::whole::{MIB, Place, loops_of, need_loop, need_mount, need_tools, same, skip};
use crate::world::noise;

/// A folder that becomes the content of a filesystem.
fn make_tree(place: &Place) -> Vec<u8> {
    let data = noise(3, 3 * MIB + 777);
    for folder in ["tree/etc", "tree/var/lib"] {
        std::fs::create_dir_all(place.path(folder)).unwrap();
    }
    place.write("tree/etc/hostname", b"web01\n");
    place.write("tree/var/lib/data", &data);
    place.write("tree/empty", b"");
    std::os::unix::fs::symlink("/etc/hostname", place.path("tree/etc/absolute")).unwrap();
    std::os::unix::fs::symlink("../../../../../../etc/hostname", place.path("tree/etc/climbing")).unwrap();
    std::os::unix::fs::symlink("/proc/self/root/etc/passwd", place.path("tree/etc/outside")).unwrap();
    std::os::unix::fs::symlink("loop", place.path("tree/etc/loop")).unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"odd \x1b[31m\xff\nname");
    std::fs::write(place.path("tree/etc").join(odd), "odd").unwrap();
    data
}

/// Puts `file`'s bytes into `image` at an offset, and makes that a snapshot.
fn put_at(place: &Place, table: &str, parts: &[(&str, usize)], mebibytes: usize) {
    place.shell(&format!("rm -f image && truncate -s {mebibytes}M image")).ok();
    if !table.is_empty() {
        place.shell(&format!("printf '{table}' | sfdisk --quiet image")).ok();
    }
    for (file, mebibyte) in parts {
        place.shell(&format!("dd status=none if={file} of=image bs=1M seek={mebibyte} conv=notrunc,sparse")).ok();
    }
    place.shell("rm -rf store").ok();
    place.snapfs("init store").ok();
    place.snapfs("backup store web01/a.img image").ok();
}

/// Looks at what `make_tree` has made; `more` are options that the filesystem needs.
fn looks_right(place: &Place, more: &str, data: &[u8]) {
    let files = |words: &str| place.snapfs(&format!("files store web01/a.img {words}{more}"));
    let top = files("/ --json").ok().json();
    let names: Vec<&str> = top.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert!(["empty", "etc", "var"].iter().all(|name| names.contains(name)), "{names:?}");
    let etc = files("/etc").ok().text();
    assert!(etc.contains("hostname") && etc.contains("absolute -> /etc/hostname"), "{etc}");
    assert!(etc.contains("odd \\u{1b}[31m\\xff\\nname") && !etc.contains('\x1b'), "{etc}");
    let row = &files("/var/lib/data --json").ok().json()[0];
    assert_eq!((row["kind"].clone(), row["bytes"].clone()), (json!("file"), json!(data.len())));
    same(&files("/var/lib/data --output -").ok().out, data, "a file, printed");
    let _ = std::fs::remove_file(place.path("copy"));
    assert!(files("/var/lib/data --output copy").ok().out.is_empty());
    same(&place.read("copy"), data, "a file, copied");
    assert_eq!(place.mode("copy"), 0o600);
    files("/var/lib/data --output copy").fails(1, "is there already");
    assert!(files("/empty --output -").ok().out.is_empty());
    // Links stay inside, whatever they say.
    for link in ["absolute", "climbing"] {
        assert_eq!(files(&format!("/etc/{link} --output -")).ok().text(), "web01\n", "{link}");
    }
    for (path, code, word) in [
        ("/etc/outside --output -", 3, "no such file"),
        ("/etc/loop --output -", 1, "link"),
        ("/none", 3, "/none: there is no such file in the image"),
        ("/etc --output -", 1, "/etc"),
        ("etc", 2, "must begin with /"),
    ] {
        files(path).fails(code, word);
    }
}

#[test]
fn ext_is_read_bare_and_in_a_partition() {
    const NAME: &str = "files::ext_is_read_bare_and_in_a_partition";
    need_tools!(NAME, "mke2fs", "sfdisk", "truncate");
    let place = Place::new();
    let data = make_tree(&place);
    for kind in ["ext2", "ext3", "ext4"] {
        place.shell(&format!("rm -f fs && mke2fs -q -t {kind} -d tree fs 24M")).ok();
        put_at(&place, "", &[("fs", 0)], 24);
        let rows = place.snapfs("files store web01/a.img --json").ok().json();
        assert_eq!(rows, json!([{"partition": null, "start": 0, "bytes": 24 << 20, "content": "ext4"}]));
        looks_right(&place, "", &data);
    }
    // The usual first partition, and one that begins at an odd sector of a GPT.
    put_at(&place, "2048,49152,L\\n,2048,S\\n", &[("fs", 1)], 32);
    let table = place.snapfs("files store web01/a.img").ok().text();
    assert!(table.contains("1048576  24.0 MiB  ext4"), "{table}");
    looks_right(&place, "", &data);
    looks_right(&place, " --partition 1", &data);
    place.snapfs("files store web01/a.img / --partition 2").fails(1, "partition 2 (unknown)");
    place.snapfs("files store web01/a.img / --partition 7").fails(3, "no partition 7");
    put_at(&place, "label: gpt\\n2048,2048\\n8192,49152\\n", &[("fs", 4)], 32);
    looks_right(&place, "", &data);
    // Two of them: somebody has to choose.
    put_at(&place, "2048,49152\\n51200,49152\\n", &[("fs", 1), ("fs", 25)], 50);
    place.snapfs("files store web01/a.img /").fails(1, "--partition: partition 1 (ext4), partition 2 (ext4)");
    looks_right(&place, " --partition 2", &data);
}

#[test]
fn what_is_damaged_or_unknown_is_told() {
    const NAME: &str = "files::what_is_damaged_or_unknown_is_told";
    need_tools!(NAME, "mke2fs", "truncate");
    let place = Place::new();
    make_tree(&place);
    place.shell("mke2fs -q -t ext4 -d tree fs 24M").ok();
    let whole = place.read("fs");
    // A guest's damage is not the store's: never exit code 4, never a crash.
    for seed in 0..40 {
        let mut bytes = whole.clone();
        let at = noise(seed, 8).iter().fold(0, |sum, b| sum * 251 + usize::from(*b)) % (4 * MIB);
        bytes[at..at + 64].copy_from_slice(&noise(seed + 100, 64));
        bytes[1080..1082].copy_from_slice(b"\x53\xef");
        place.write("fs", &bytes);
        put_at(&place, "", &[("fs", 0)], 24);
        for words in ["/", "/etc", "/etc/hostname --output -", "/var/lib/data --output -"] {
            let done = place.snapfs(&format!("files store web01/a.img {words}"));
            assert!(matches!(done.code, 0 | 1 | 3), "{seed}: {words}: {} {}", done.code, done.err);
            assert!(!done.err.contains("internal error"), "{seed}: {}", done.err);
        }
    }
    place.write("image", &noise(9, MIB));
    place.snapfs("backup store web01/noise.img image").ok();
    place.snapfs("files store web01/noise.img /").fails(1, "no filesystem that can be read");
    let mut lvm = vec![0; MIB];
    lvm[512..520].copy_from_slice(b"LABELONE");
    place.write("image", &lvm);
    place.snapfs("backup store web01/lvm.img image").ok();
    place.snapfs("files store web01/lvm.img / --mount").fails(1, "its content (lvm)");
    place.snapfs("files store web01/none.img /").fails(3, "web01/none.img");
}

#[test]
fn damage_of_the_store_is_its_own() {
    const NAME: &str = "files::damage_of_the_store_is_its_own";
    need_tools!(NAME, "mke2fs");
    let place = Place::new();
    make_tree(&place);
    place.shell("mke2fs -q -t ext4 -d tree fs 24M").ok();
    place.snapfs("backup store web01/a.img fs").ok();
    for pack in place.objects("web01", "packs") {
        let mut bytes = std::fs::read(&pack).unwrap();
        let half = bytes.len() / 2;
        for byte in bytes.iter_mut().take(half).skip(half / 8) {
            *byte ^= 0x55;
        }
        std::fs::remove_file(&pack).unwrap();
        std::fs::write(&pack, bytes).unwrap();
    }
    place.snapfs("files store web01/a.img /var/lib/data --output -").fails(4, "web01/a.img");
}

#[test]
fn xfs_is_mounted_out_of_sight() {
    const NAME: &str = "files::xfs_is_mounted_out_of_sight";
    need_tools!(NAME, "mkfs.xfs", "sfdisk", "unshare", "fsfreeze");
    need_mount!(NAME);
    need_loop!(NAME);
    if !std::fs::read_to_string("/proc/filesystems").unwrap().contains("\txfs\n") {
        return skip(NAME, "this kernel has no xfs");
    }
    let place = Place::new();
    let data = make_tree(&place);
    place.shell("truncate -s 320M fs && mkfs.xfs -q fs && mkdir live && mount -o loop fs live").ok();
    let live = Live(&place);
    // The same filesystem stays mounted on this host: its image has the same UUID.
    place.shell("cp -a tree/. live/ && fsfreeze --freeze live").ok();
    put_at(&place, "2048,,L\\n", &[("fs", 1)], 322);
    place.shell("fsfreeze --unfreeze live && echo more >live/later && sync -f live").ok();
    place.snapfs("files store web01/a.img /").fails(1, "--mount");
    // With a mount of its own, and with one that is there.
    looks_right(&place, " --mount", &data);
    let traces = format!(
        "grep -e {0}/store -e snapfs-files- /proc/mounts; losetup --all | grep snapfs-files-",
        place.path("").display()
    );
    assert_eq!(place.shell(&traces).text(), "");
    assert_eq!(loops_of(&place).len(), 1);
    let mount = place.mount("ro");
    looks_right(&place, " --mount", &data);
    mount.umount();
    drop(live);
    assert!(loops_of(&place).is_empty());
    let left = std::fs::read_dir(std::env::temp_dir()).unwrap();
    let left = left.filter(|row| row.as_ref().unwrap().file_name().to_string_lossy().starts_with("snapfs-inside"));
    assert_eq!(left.count(), 0);
}

/// A filesystem that is mounted at `live`.
struct Live<'a>(&'a Place);

impl Drop for Live<'_> {
    fn drop(&mut self) {
        self.0.shell("umount live || umount -l live");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    const NAME: &str = "files::a_reader_that_goes_away_is_no_failure";
    need_tools!(NAME, "mke2fs");
    let place = Place::new();
    make_tree(&place);
    place.shell("mke2fs -q -t ext4 -d tree fs 24M").ok();
    place.snapfs("backup store web01/a.img fs").ok();
    let done = place.shell(&format!("{} files store web01/a.img / | head -n 1", crate::whole::SNAPFS)).ok();
    assert!(done.text().starts_with("mode"), "{}", done.text());
}
