//! Tier 7: the commands of the real binary on temporary folders: exit codes, JSON, restoring to everything that can
//! be restored to, and what happens when the source, the medium or a second writer is in the way.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use snapfs::clock::{Clock, SystemClock};

use crate::whole::{
    Cleared, Disk, Loop, MIB, Place, eventually, image, is_root, need_loop, need_tools, same, signal, skip,
};
use crate::world::noise;

const COMMANDS: [&str; 27] = [
    "init",
    "mount",
    "umount",
    "backup",
    "batch",
    "restore",
    "list",
    "show",
    "diff",
    "forget",
    "protect",
    "unprotect",
    "gc",
    "popular",
    "check",
    "stats",
    "target",
    "settings",
    "files",
    "attach",
    "detach",
    "reap",
    "clone",
    "clones",
    "unclone",
    "commit",
    "demo",
];

#[test]
fn every_command_has_help_with_an_example() {
    let place = Place::without_store();
    let help = place.snapfs("--help").ok().text();
    let listed: BTreeSet<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next().filter(|_| !line.starts_with("   ")))
        .filter(|name| *name != "help")
        .collect();
    assert_eq!(listed, BTreeSet::from(COMMANDS));
    for command in COMMANDS {
        let help = place.snapfs(&format!("{command} --help")).ok().text();
        assert!(help.contains("Examples:"), "{command}: {help}");
        assert!(help.contains(&format!("  snapfs {command}")), "{command}: {help}");
    }
}

#[test]
fn targets_are_made_listed_added_and_removed() {
    let place = Place::without_store();
    place.snapfs("init many --target one --target two --vm-replicas 3").fails(2, "replicas");
    place.snapfs("init many --target s3://bucket/x").fails(2, "s3");
    place.snapfs("init many --target one --target one").fails(1, "twice");
    place.snapfs("init many --target one --target two").ok();
    place.write("a.img", &image(1, 1));
    place.snapfs("backup many web01/a.img a.img").ok();
    let list = place.snapfs("target many list --json").ok().text();
    assert_eq!(list.matches("\"state\": \"ok\"").count(), 2, "{list}");
    place.snapfs("target many add").fails(2, "URL");
    place.snapfs("target many set").fails(2, "nothing");
    place.snapfs("target many list one").fails(2, "URL");
    place.snapfs("target many add three").ok();
    place.snapfs("target many remove one").ok();
    place.snapfs("target many remove one").fails(3, "no target");
    place.snapfs("target many remove two").fails(1, "replicas");
    place.snapfs("target many set --vm-replicas 1 --common-replicas 1").ok();
    place.snapfs("target many settle --json").ok();
    place.snapfs("check many --read-data --repair").ok();
    let list = place.snapfs("target many list").ok().text();
    assert!(!list.contains("/one") && list.contains("/two") && list.contains("/three"), "{list}");
    place.snapfs("restore many web01/a.img b.img").ok();
    place.snapfs("init plain").ok();
    let list = place.snapfs("target plain list").ok().text();
    assert!(list.contains("one folder"), "{list}");
    place.snapfs("target plain remove two").fails(1, "no targets");
}

#[test]
fn a_target_that_cannot_be_written_to_is_in_the_way_of_a_change_until_it_can() {
    const NAME: &str = "cli::a_target_that_cannot_be_written_to_is_in_the_way_of_a_change_until_it_can";
    let place = Place::without_store();
    place.snapfs("init store --target one --target two --target three --target four").ok();
    place.write("a.img", &image(1, 1));
    place.snapfs("backup store web01/a.img a.img").ok();
    place.snapfs("backup store web02/a.img a.img").ok();
    place.snapfs("popular store elect").ok();
    // One that decides neither for a VM nor for the common packs: without their locks the change would not begin.
    let decides = |target: &&str| !place.shell(&format!("find {target} -name write.lock")).text().is_empty();
    let target = ["one", "two", "three", "four"].into_iter().find(|target| !decides(target)).unwrap();
    let _cleared = Cleared(&place, target);
    let mount = format!("mount --bind {target} {target} && mount -o remount,bind,ro {target}");
    if !is_root() || place.shell(&mount).code != 0 {
        return skip(NAME, "bind mounts are not allowed here");
    }
    place.snapfs("target store add five").fails(1, "missed the change");
    place.snapfs("target store settle").fails(1, "Read-only");
    place.shell(&format!("umount {target}")).ok();
    assert_eq!(place.snapfs("target store settle").code, 0);
    place.snapfs("check store --read-data").ok();
    let list = place.snapfs("target store list --json").ok().text();
    assert_eq!(list.matches("\"state\": \"ok\"").count(), 5, "{list}");
    same(&place.snapfs("restore store web01/a.img -").ok().out, &place.read("a.img"), "after the change");
}

#[test]
fn what_vms_share_is_elected_shown_and_drawn() {
    let place = Place::new();
    let shown = |words: &str| place.snapfs(&format!("popular store {words}")).ok().text();
    assert!(shown("elect").contains("nothing is elected"));
    for (vm, seed) in [("a", 1), ("b", 2), ("c", 3)] {
        let bytes = [noise(77, 2 * MIB), noise(seed, MIB)].concat();
        place.write("image", &bytes);
        place.snapfs(&format!("backup store {vm}/1.img image")).ok();
    }
    place.snapfs("popular store").fails(2, "ACTION");
    place.snapfs("popular store elect --plot x.svg").fails(2, "--plot");
    place.snapfs("popular store show --sigma 2").fails(2, "--sigma");
    place.snapfs("popular store elect --sigma 0").fails(2, "0");
    place.snapfs("popular store elect --max-memory 1K").fails(2, "max-memory");
    place.snapfs("popular store group").fails(2, "VM");
    place.snapfs("popular store group nobody").fails(3, "nobody");
    assert!(shown("group c tenant").contains("group tenant"));
    assert!(shown("group c").contains("group tenant"));
    assert!(shown("elect").contains("512 blocks"));
    let report: serde_json::Value = serde_json::from_str(&shown("show --json --plot curve.svg")).unwrap();
    assert_eq!((&report["epoch"], &report["blocks_popular"]), (&1.into(), &512.into()), "{report}");
    assert_eq!(report["worth"]["duplicates_percent"], 100.0, "{report}");
    let drawn = std::fs::read_to_string(place.path("curve.svg")).unwrap();
    assert!(drawn.starts_with("<svg") && drawn.ends_with("</svg>\n") && drawn.matches("<polyline").count() == 3);
    assert!(shown("show").contains("SIGMA"));
    let text = place.snapfs("gc store").ok().text();
    assert!(text.contains("a: "), "{text}");
    assert!(place.snapfs("stats store").ok().text().contains("common packs"));
    place.snapfs("check store --read-data").ok();
}

#[test]
fn exit_codes_are_those_of_the_table() {
    let place = Place::new();
    place.write("a.img", &image(1, 1));
    place.snapfs("backup store web01/a.img a.img").ok();
    place.snapfs("frobnicate").fails(2, "frobnicate");
    place.snapfs("list store --no-such-option").fails(2, "--no-such-option");
    place.snapfs("backup store").fails(2, "SNAPSHOT");
    place.snapfs("forget store").fails(2, "NAME");
    place.snapfs("forget store --keep-last 0 --keep-daily 0").fails(2, "keep nothing");
    place.snapfs("forget store web01/a.img --keep-last 1").fails(2, "web01/a.img");
    place.snapfs("protect store").fails(2, "SNAPSHOT");
    place.snapfs("settings store min_age=soon").fails(2, "soon");
    place.snapfs("list store --max-memory 1M").fails(2, "max-memory");
    place.snapfs("list nowhere").fails(3, "nowhere");
    place.snapfs("list store web02").fails(3, "web02");
    place.snapfs("show store web01/b.img").fails(3, "web01/b.img");
    place.snapfs("restore store web02/a.img x").fails(3, "web02/a.img");
    place.snapfs("backup store web01/b.img nowhere").fails(3, "nowhere");
    place.snapfs("forget store web01/b.img").fails(3, "web01/b.img");
    place.snapfs("forget store web02 --keep-last 1").fails(3, "web02");
    place.snapfs("protect store web01/b.img").fails(3, "web01/b.img");
    place.snapfs("umount nowhere").fails(3, "nowhere");
    place.snapfs("backup store web01/b.img a.img --parent web01/0.img").fails(3, "web01/0.img");
    place.snapfs("init store").fails(1, "store");
    place.snapfs("backup store web01/a.img a.img").fails(1, "exists");
    place.snapfs("backup store web01/b.img .").fails(1, "folder");
    assert!(!place.exists("x"));
    place.snapfs("check store --read-data").ok();
}

#[test]
fn snapshots_are_forgotten_by_rules_and_stay_when_protected_or_young() {
    let place = Place::new();
    place.write("a.img", &image(1, 1));
    for image in ["web01/a", "web01/b", "web01/c", "db02/a", "db02/b"] {
        place.snapfs(&format!("backup store {image}.img a.img")).ok();
    }
    let listed = |vm: &str| {
        let rows = place.snapfs(&format!("list store {vm} --json").replace("  ", " ")).ok().json();
        rows.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(place.snapfs("protect store web01/a.img").ok().text(), "web01/a.img is protected\n");
    assert!(place.snapfs("list store web01").ok().text().contains("sealed, protected"));
    assert!(place.snapfs("show store web01/a.img").ok().text().contains("sealed, protected"));
    place.snapfs("forget store web01/a.img").fails(1, "protected");
    let told = place.snapfs("forget store --keep-last 1 --dry-run").ok().text();
    assert!(told.contains("kept: protected") && told.contains("3 kept, 2 would be forgotten"), "{told}");
    assert_eq!(listed("").len(), 5);
    let told = place.snapfs("forget store web01 --keep-last 1 --keep-daily 3 --json").ok().json();
    assert_eq!(told["forgotten"], serde_json::json!(["web01/b.img"]));
    assert_eq!(told["kept"][0]["stays"], "protected");
    assert_eq!(told["kept"][1]["rules"], serde_json::json!(["last", "daily"]));
    assert_eq!(listed("web01"), ["web01/a.img", "web01/c.img"]);
    assert_eq!(listed("db02").len(), 2);
    assert_eq!(place.snapfs("settings store").ok().text(), "min_age=0s\ngc_grace=0s\n");
    assert_eq!(place.snapfs("settings store min_age=1d12h").ok().text(), "min_age=1d12h\ngc_grace=0s\n");
    place.snapfs("forget store db02/a.img").fails(1, "min_age is 1d 12h");
    let told = place.snapfs("forget store --keep-last 1").ok().text();
    assert!(told.contains("min_age") && told.contains("4 kept, 0 forgotten"), "{told}");
    assert_eq!(place.snapfs("settings store min_age=0").ok().text(), "min_age=0s\ngc_grace=0s\n");
    place.snapfs("settings store gc_grace=1h").ok();
    place.snapfs("forget store db02/a.img").ok();
    let told = place.snapfs("gc store db02").ok().text();
    assert!(
        told.contains("nothing to collect; within gc_grace, the first for ") && told.contains("1 forgotten"),
        "{told}"
    );
    assert_eq!(place.snapfs("gc store db02 --json").ok().json()["vms"][0]["roots_young"], 1);
    assert_eq!(place.snapfs("settings store gc_grace=0 --json").ok().json()["gc_grace_seconds"], 0);
    let told = place.snapfs("gc store db02 --json").ok().json();
    assert_eq!(told["vms"][0]["roots_dropped"], 1, "{told}");
    assert_eq!(place.snapfs("unprotect store web01/a.img").ok().text(), "web01/a.img is not protected\n");
    place.snapfs("forget store --keep-last 1").ok();
    assert_eq!(listed(""), ["db02/b.img", "web01/c.img"]);
}

#[test]
fn damage_is_exit_code_4_and_is_named() {
    let place = Place::new();
    place.write("a.img", &image(1, 2));
    place.snapfs("backup store web01/a.img a.img").ok();
    let pack = place.objects("web01", "packs").remove(0);
    std::fs::set_permissions(&pack, PermissionsExt::from_mode(0o600)).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&pack).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 300_000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 300_000).unwrap();
    let name = pack.file_name().unwrap().to_str().unwrap();
    let told = place.snapfs("restore store web01/a.img b.img").fails(4, name);
    assert!(told.err.contains("web01/a.img"), "{}", told.err);
    assert!(!place.exists("b.img"));
    let told = place.snapfs("check store --read-data").fails(4, "");
    assert!(told.text().contains(name) && told.text().contains("web01/a.img"), "{}", told.text());
    // Without reading the data there is nothing to see.
    place.snapfs("check store").ok();
    // An image that has nothing heals nothing; the one that was backed up does.
    place.snapfs("check store --from a.img").fails(2, "--repair");
    place.snapfs("check store --repair --from none.img").fails(3, "none.img");
    place.write("c.img", &image(9, 2));
    let told = place.snapfs("check store --repair --from c.img").fails(4, "");
    assert!(told.text().contains("healed from images 0, not healed 1"), "{}", told.text());
    let told = place.snapfs("check store --repair --from c.img --from a.img").ok();
    assert!(told.text().contains("healed from images 1, not healed 0"), "{}", told.text());
    place.snapfs("check store --read-data").ok();
    place.snapfs("restore store web01/a.img b.img").ok();
}

#[test]
fn the_store_may_come_from_an_option_or_the_environment() {
    let place = Place::new();
    place.write("a.img", &image(1, 1));
    place.snapfs("--store store backup web01/a.img a.img").ok();
    place.snapfs("backup web01/b.img a.img --store=store").ok();
    let listed = place.command(crate::whole::SNAPFS).args(["list", "--json"]).env("SNAPFS_STORE", "store").output();
    let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
    assert!(listed.contains("web01/a.img") && listed.contains("web01/b.img"), "{listed}");
}

#[test]
fn bad_names_are_refused_and_leave_nothing() {
    let place = Place::new();
    place.write("a.img", &image(1, 1));
    let long = format!("web01/{}", "a".repeat(256));
    let bad = [
        "",
        "web01",
        "/web01/a",
        "web01/",
        "web01//a",
        "../a",
        "web01/..",
        "web01/.",
        "a/b/c/d",
        "web01/latest",
        "web01/latest/a",
        ".snapfs/a",
        "web01/a\nb",
        "web01/a\tb",
        &long,
    ];
    for name in bad {
        let done = place.run(&["backup", "store", name, "a.img"]);
        assert!(matches!(done.code, 1 | 2), "{name:?}: {} {}", done.code, done.err);
        assert!(done.err.starts_with("snapfs: ") || done.err.starts_with("error: "), "{name:?}: {}", done.err);
    }
    assert!(!place.exists("store/vms/web01"));
    assert_eq!(place.snapfs("list store --json").ok().json(), serde_json::json!([]));
}

#[test]
fn odd_names_are_names() {
    let place = Place::new();
    place.write("a.img", &image(1, 1));
    for name in ["web 01/a b", "-x/-y", "\u{e4}\u{1f4be}/it's \"it\"", "web01/xvda/a.img", "web01/.hidden"] {
        place.run(&["backup", "store", "--", name, "a.img"]).ok();
        place.run(&["restore", "store", "--", name, "back"]).ok();
        same(&place.read("back"), &place.read("a.img"), name);
        std::fs::remove_file(place.path("back")).unwrap();
    }
    assert_eq!(place.snapfs("list store --json").ok().json().as_array().unwrap().len(), 5);
}

#[test]
fn reports_parse_as_json_and_hold_names_and_sizes() {
    let place = Place::new();
    place.write("a.img", &image(1, 3));
    place.write("b.img", &image(2, 3));
    let report = place.snapfs("backup store web01/a.img a.img --json").ok().json();
    assert_eq!((report["name"].as_str(), report["size"].as_u64()), (Some("web01/a.img"), Some(3 << 20)));
    place.snapfs("backup store web01/b.img b.img").ok();
    let list = place.snapfs("list store --json").ok().json();
    assert_eq!((list[0]["name"].as_str(), list[0]["size"].as_u64()), (Some("web01/a.img"), Some(3 << 20)));
    let show = place.snapfs("show store web01/latest --json").ok().json();
    assert_eq!((show["name"].as_str(), show["parent"].as_str()), (Some("web01/b.img"), Some("web01/a.img")));
    for words in [
        "stats store --json",
        "diff store web01/a.img web01/b.img --json",
        "check store --json",
        "restore store web01/a.img c.img --json",
        "forget store web01/a.img --dry-run --json",
        "gc store --dry-run --json",
    ] {
        assert!(place.snapfs(words).ok().json().is_object(), "{words}");
    }
    for words in ["list store", "show store web01/a.img", "stats store", "diff store web01/a.img web01/b.img"] {
        let text = place.snapfs(words).ok().text();
        assert!(!text.trim_start().starts_with(['{', '[']) && text.lines().count() > 1, "{words}: {text}");
    }
}

#[test]
fn an_image_is_restored_to_files_and_streams() {
    let place = Place::new();
    let bytes = image(3, 5);
    place.write("a.img", &bytes);
    place.snapfs("backup store web01/a.img a.img").ok();

    place.snapfs("restore store web01/a.img new.img").ok();
    same(&place.read("new.img"), &bytes, "a new file");
    assert_eq!(place.mode("new.img"), 0o600);
    let sectors = std::os::unix::fs::MetadataExt::blocks(&place.path("new.img").metadata().unwrap());
    assert!(sectors * 512 <= 4 << 20, "holes do not stay holes: {sectors} sectors");

    // Only what differs is written.
    let again = place.snapfs("restore store web01/a.img new.img --json").ok().json();
    assert_eq!(again["bytes_written"].as_u64(), Some(0), "{again}");
    let mut other = bytes.clone();
    other[12345] ^= 1;
    place.write("other.img", &other);
    let mended = place.snapfs("restore store web01/a.img other.img --json").ok().json();
    assert!((1..=2 << 20).contains(&mended["bytes_written"].as_u64().unwrap()), "{mended}");
    same(&place.read("other.img"), &bytes, "a file that differs");
    place.write("short.img", b"short");
    place.snapfs("restore store web01/a.img short.img").ok();
    same(&place.read("short.img"), &bytes, "a shorter file");

    let stream = place.snapfs("restore store web01/a.img -").ok();
    same(&stream.out, &bytes, "standard output");
    place.snapfs("restore store web01/a.img - --json").fails(2, "--json");
    same(&place.snapfs("restore store web01/a.img /dev/stdout").ok().out, &bytes, "/dev/stdout");

    // A reader that goes away is an error or a quiet end, not a panic.
    let cut = place.shell(&format!("{} restore store web01/a.img - | head -c 10 | wc -c", crate::whole::SNAPFS));
    assert_eq!(cut.text().trim(), "10");
    assert!(!cut.err.contains("internal error"), "{}", cut.err);
    assert!(
        !std::fs::read_dir(place.path("")).unwrap().any(|r| r
            .unwrap()
            .file_name()
            .to_string_lossy()
            .contains("partial"))
    );
}

#[test]
fn a_device_is_backed_up_and_restored_to() {
    need_loop!("cli::a_device_is_backed_up_and_restored_to");
    let place = Place::new();
    let (old, new) = (image(4, 4), image(5, 4));
    place.write("disk", &old);
    let device = Loop::attach(&place.path("disk"), &[]).unwrap();
    let path = device.0.to_str().unwrap().to_owned();
    place.run(&["backup", "store", "web01/old.img", &path]).ok();
    same(&place.snapfs("restore store web01/old.img -").ok().out, &old, "the device's backup");
    place.write("new.img", &new);
    place.snapfs("backup store web01/new.img new.img").ok();
    place.run(&["restore", "store", "web01/new.img", &path]).ok();
    place.run(&["backup", "store", "web01/again.img", &path]).ok();
    let again = place.snapfs("show store web01/again.img --json").ok().json();
    assert_eq!(again["levels"]["new_bytes"].as_u64(), Some(0), "{again}");
    // A device that is too small is refused before a byte of it is written.
    place.write("big.img", &image(6, 6));
    place.snapfs("backup store web01/big.img big.img").ok();
    assert_ne!(place.run(&["restore", "store", "web01/big.img", &path]).code, 0);
    place.shell("sync").ok();
    drop(device);
    same(&place.read("disk"), &new, "the device");
}

#[test]
fn a_change_map_is_believed_only_as_far_as_it_is_true() {
    let place = Place::new();
    let mut bytes = noise(7, 64 * MIB);
    place.write("a.img", &bytes);
    place.snapfs("backup store web01/a.img a.img").ok();
    bytes[10 * MIB..10 * MIB + 4096].copy_from_slice(&noise(8, 4096));
    place.write("b.img", &bytes);
    place.write("map", br#"[{"start": 10485760, "length": 4096, "data": true}]"#);
    place.snapfs("backup store web01/b.img b.img --changed map").fails(2, "--parent");
    let report = place.snapfs("backup store web01/b.img b.img --parent web01/a.img --changed map --json").ok().json();
    assert_eq!(report["levels"]["new_bytes"].as_u64(), Some(4096), "{report}");
    same(&place.snapfs("restore store web01/b.img -").ok().out, &bytes, "the image");
    place.write("c.img", &noise(9, 64 * MIB));
    place.snapfs("backup store web01/c.img c.img --parent web01/b.img --changed map").fails(1, "map");
    for text in ["", "{}", "[{\"start\": -1, \"length\": 1, \"data\": true}]", "no json"] {
        place.write("bad", text.as_bytes());
        place.snapfs("backup store web01/c.img b.img --parent web01/b.img --changed bad").fails(1, "change map");
    }
    // A block that the map does not list is found when all is verified.
    bytes[50 * MIB] ^= 1;
    place.write("c.img", &bytes);
    place.snapfs("backup store web01/c.img c.img --parent web01/b.img --changed map --verify-map").fails(1, "map");
    assert_eq!(place.snapfs("list store --json").ok().json().as_array().unwrap().len(), 2);
    place.snapfs("check store --read-data").ok();
}

#[test]
fn what_is_forgotten_is_freed_and_the_rest_stays_whole() {
    let place = Place::new();
    for number in 0..4 {
        place.write(&format!("{number}.img"), &image(10 + number, 4));
        place.snapfs(&format!("backup store web01/{number}.img {number}.img")).ok();
    }
    let bytes =
        |place: &Place| place.snapfs("stats store --json").ok().json()["total"]["stored_bytes"].as_u64().unwrap();
    let before = bytes(&place);
    place.snapfs("forget store web01/0.img web01/2.img --dry-run").ok();
    place.snapfs("gc store --dry-run").ok();
    assert_eq!((bytes(&place), place.snapfs("list store --json").ok().json().as_array().unwrap().len()), (before, 4));
    place.snapfs("forget store web01/0.img web01/2.img").ok();
    place.snapfs("show store web01/0.img").fails(3, "web01/0.img");
    place.snapfs("gc store").ok();
    let after = bytes(&place);
    assert!(after < before * 6 / 10, "{before} before, {after} after");
    let idle = place.snapfs("gc store web01 --json").ok().json();
    assert_eq!(idle["vms"][0]["idle"].as_bool(), Some(true), "{idle}");
    place.snapfs("gc store --exact").ok();
    for number in [1, 3] {
        let back = place.snapfs(&format!("restore store web01/{number}.img -")).ok();
        same(&back.out, &place.read(&format!("{number}.img")), "what is left");
    }
    place.snapfs("check store --read-data").ok();
    place.snapfs("check store --rebuild").ok();
    // What was forgotten may come back.
    place.snapfs("backup store web01/0.img 0.img").ok();
    same(&place.snapfs("restore store web01/0.img -").ok().out, &place.read("0.img"), "what came back");
    place.snapfs("check store --read-data").ok();
}

#[test]
fn collection_keeps_to_its_rate() {
    let place = Place::new();
    for number in 0..10 {
        place.write(&format!("{number}.img"), &image(50 + number, 2));
        place.snapfs(&format!("backup store web01/{number}.img {number}.img")).ok();
    }
    place.snapfs("forget store web01/9.img").ok();
    place.snapfs("gc store --limit-rate lots").fails(2, "lots");
    place.snapfs("gc store --limit-rate 63K").fails(2, "64K");
    let bytes: u64 = place.objects("web01", "packs").iter().map(|pack| pack.metadata().unwrap().len()).sum();
    let clock = SystemClock::new();
    let report = place.snapfs("gc store --limit-rate 4M --json").ok().json();
    assert!(report["vms"][0]["packs_compacted"].as_u64().unwrap() >= 9, "{report}");
    // What stays is read and written, but for a burst of a quarter of a second.
    let least = (bytes as f64 * 8.0 / 10.0 * 2.0) / f64::from(4 << 20) - 0.3;
    let took = clock.elapsed().as_secs_f64();
    assert!(least > 1.0 && took >= least, "{took} s, at least {least}");
    place.snapfs("check store --read-data").ok();
}

#[test]
fn a_source_that_shrinks_while_it_is_read_is_refused() {
    let place = Place::new();
    place.write("seed.img", &image(1, 1));
    place.snapfs("backup store web01/seed.img seed.img").ok();
    for _ in 0..20 {
        place.write("a.img", &noise(2, 8 * MIB));
        // Held up between the opening of its source and the first read: the VM's lock is ours.
        let lock = std::fs::File::options().write(true).open(place.path("store/vms/web01/write.lock")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let mut backup = place.start("backup store web01/a.img a.img");
        let source = place.path("a.img").canonicalize().unwrap();
        let fds = format!("/proc/{}/fd", backup.pid());
        eventually("the source is open", || {
            let opened = std::fs::read_dir(&fds).is_ok_and(|rows| {
                rows.filter_map(Result::ok).any(|row| std::fs::read_link(row.path()).is_ok_and(|to| to == source))
            });
            opened || backup.has_ended()
        });
        std::fs::File::options().write(true).open(&source).unwrap().set_len(3 * MIB as u64 + 100).unwrap();
        drop(lock);
        let done = backup.finish();
        if done.code == 5 {
            // This machine was so slow that the lock was given up.
            continue;
        }
        done.fails(1, "a.img");
        assert_eq!(place.snapfs("list store --json").ok().json().as_array().unwrap().len(), 1);
        place.snapfs("gc store --exact").ok();
        place.snapfs("check store --read-data").ok();
        return;
    }
    panic!("the lock was given up twenty times");
}

#[test]
fn a_stream_is_as_long_as_it_is() {
    let place = Place::new();
    let bytes = image(1, 3);
    let mut backup = place.start("backup store web01/a.img -");
    backup.write(&bytes[..MIB + 17]);
    backup.finish().ok();
    same(&place.snapfs("restore store web01/a.img -").ok().out, &bytes[..MIB + 17], "a stream");
    place.shell("mkfifo pipe").ok();
    place.snapfs("backup store web01/b.img pipe").fails(1, "FIFO");
}

#[test]
fn a_second_writer_of_a_vm_is_told_busy() {
    let place = Place::new();
    place.write("a.img", &image(1, 1));
    place.snapfs("backup store web01/a.img a.img").ok();
    let records = place.records("web01");
    let mut first = place.start("backup store web01/b.img -");
    first.write(&image(2, 1));
    eventually("the first writer begins", || place.records("web01") > records);
    place.snapfs("backup store web01/c.img a.img").fails(5, "web01");
    // Collection neither waits nor harms.
    let gc = place.snapfs("gc store web01 --exact");
    assert!(matches!(gc.code, 0 | 5), "{}: {}", gc.code, gc.err);
    place.snapfs("backup store web02/c.img a.img").ok();
    same(&place.snapfs("restore store web01/a.img -").ok().out, &place.read("a.img"), "reading goes on");
    first.finish().ok();
    let names = place.snapfs("list store web01 --json").ok().text();
    assert!(names.contains("web01/b.img") && !names.contains("web01/c.img"), "{names}");
    place.snapfs("check store --read-data").ok();
}

#[test]
fn a_killed_writer_leaves_no_lock_and_no_snapshot() {
    let place = Place::new();
    let mut first = place.start("backup store web01/a.img -");
    first.write(&noise(1, 4 * MIB));
    eventually("the writer begins", || place.records("web01") >= 2);
    signal(first.pid(), rustix::process::Signal::KILL);
    assert_eq!(first.finish().code, -1);
    assert_eq!(place.snapfs("list store --json").ok().json(), serde_json::json!([]));
    place.write("a.img", &image(1, 1));
    // The index that the killed writer had open is made anew, and that is told.
    let next = place.snapfs("backup store web01/a.img a.img");
    assert!(next.code == 0 && next.err.lines().count() <= 1, "{}", next.err);
    assert!(next.err.is_empty() || next.err.contains("similarity index starts empty"), "{}", next.err);
    place.snapfs("gc store --exact").ok();
    place.snapfs("check store --read-data").ok();
}

#[test]
fn a_full_medium_is_exit_code_6_and_gc_makes_room() {
    const NAME: &str = "cli::a_full_medium_is_exit_code_6_and_gc_makes_room";
    need_loop!(NAME);
    need_tools!(NAME, "mke2fs", "mount");
    let place = Place::without_store();
    let _disk = Disk::mount(&place, "disk", 48 * MIB);
    place.snapfs("init disk/store").ok();
    place.write("a.img", &noise(1, 16 * MIB));
    place.write("b.img", &noise(2, 40 * MIB));
    place.snapfs("backup disk/store web01/a.img a.img").ok();
    place.snapfs("backup disk/store web01/b.img b.img").fails(6, "o space");
    let names = place.snapfs("list disk/store --json").ok().text();
    assert!(names.contains("web01/a.img") && !names.contains("web01/b.img"), "{names}");
    place.snapfs("check disk/store --read-data").ok();
    // Others take the last byte.
    place.shell("cat /dev/zero > disk/filler 2>/dev/null; sync; true");
    same(&place.snapfs("restore disk/store web01/a.img -").ok().out, &place.read("a.img"), "a full disk");
    place.snapfs("forget disk/store web01/a.img").ok();
    let freed = place.snapfs("gc disk/store --json").ok().json();
    assert!(freed["vms"][0]["bytes_reclaimed"].as_u64().unwrap() > 15 << 20, "{freed}");
    place.write("c.img", &noise(3, 8 * MIB));
    place.snapfs("backup disk/store web01/c.img c.img").ok();
    place.snapfs("check disk/store --read-data").ok();
}

#[test]
fn a_read_only_store_can_be_read() {
    const NAME: &str = "cli::a_read_only_store_can_be_read";
    need_loop!(NAME);
    need_tools!(NAME, "mke2fs", "mount");
    let place = Place::without_store();
    let disk = Disk::mount(&place, "disk", 32 * MIB);
    place.snapfs("init disk/store").ok();
    place.write("a.img", &image(1, 4));
    place.snapfs("backup disk/store web01/a.img a.img").ok();
    disk.remount("ro");
    for words in ["list disk/store", "show disk/store web01/latest", "stats disk/store", "check disk/store --read-data"]
    {
        place.snapfs(words).ok();
    }
    same(&place.snapfs("restore disk/store web01/a.img -").ok().out, &place.read("a.img"), "a read-only store");
    place.snapfs("backup disk/store web01/b.img a.img").fails(1, "ead-only");
    place.snapfs("forget disk/store web01/a.img").fails(1, "ead-only");
    disk.remount("rw");
    place.snapfs("backup disk/store web01/b.img a.img").ok();
}

#[test]
fn the_store_is_nobody_elses_business() {
    let place = Place::new();
    assert_eq!(place.mode("store"), 0o700);
    assert!(Path::new(&place.path("store/snapfs.toml")).is_file());
    std::fs::create_dir(place.path("full")).unwrap();
    place.write("full/file", b"");
    place.snapfs("init full").fails(1, "not empty");
    assert_eq!(place.read("full/file"), b"");
    place.snapfs("list full").fails(3, "full");
}
