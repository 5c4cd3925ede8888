//! Second sighting: what a VM is about to store and another VM of its group has goes to a common pack at once.

use std::sync::Arc;

use snapfs::backend::testing::{Fault, Faulty};
use snapfs::catalog::record::Op;
use snapfs::check::{CheckOptions, check_store};
use snapfs::collect::common::collect_common;
use snapfs::collect::forget::forget;
use snapfs::collect::gc::{GcOptions, collect_vm};
use snapfs::ingest::backup::BackupReport;
use snapfs::name::VmName;
use snapfs::store::Store;

use crate::whole::{Done, Place, SNAPFS, image, need_mount, same};
use crate::world::{World, get, name, noise, put};

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;
const FULL: CheckOptions = CheckOptions { read_data: true, sample_percent: None, repair: false };

fn promoting(world: &World) -> Store {
    world.store().promoting(true)
}

/// Backs up as a process of its own.
fn put_new(world: &World, snapshot: &str, bytes: &[u8]) -> BackupReport {
    put(&promoting(world), snapshot, bytes).unwrap()
}

fn bytes_below(world: &World, prefix: &str) -> usize {
    world.memory.objects().iter().filter(|(key, _)| key.starts_with(prefix)).map(|(_, bytes)| bytes.len()).sum()
}

fn assert_clean(world: &World) {
    let report = check_store(&world.store(), FULL, &mut |_| {}).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

fn gc(world: &World) {
    let store = world.store();
    for vm in store.vm_names().unwrap() {
        let report = collect_vm(&store, &vm, GcOptions { exact: true, dry_run: false }, &mut |_| {}).unwrap();
        assert_eq!((report.bitmaps_wrong, report.recipes_damaged), (0, 0), "{report:?}");
    }
    collect_common(&store, GcOptions::default(), &mut |_| {}).unwrap();
}

/// The image of a VM: what all have, with its own before and between, and something that repeats.
fn family(number: u64) -> Vec<u8> {
    let own = noise(100 + number, MIB + number as usize * 5 * BLOCK);
    [noise(1, 3 * MIB), own, noise(2, 3 * MIB), noise(1, MIB)].concat()
}

fn set_group(store: &Store, vm: &str, group: &str) {
    let handle = store.vm_or_create(&VmName::new(vm).unwrap()).unwrap();
    handle.append(None, |_| Ok((vec![Op::Group { name: group.to_owned() }], ()))).unwrap();
}

#[test]
fn what_another_vm_has_is_shared_at_once_and_its_copy_becomes_a_forward() {
    let world = World::new();
    let images: Vec<Vec<u8>> = (0..3).map(family).collect();
    put_new(&world, "vm0/1.img", &images[0]);
    assert_eq!(bytes_below(&world, "common/"), 0, "nobody else has anything");
    let own = bytes_below(&world, "vms/vm0/packs/");
    let second = put_new(&world, "vm1/1.img", &images[1]);
    let shared = bytes_below(&world, "common/packs/");
    assert!((5 * MIB..6 * MIB + 400_000).contains(&shared), "{shared}");
    assert!(bytes_below(&world, "vms/vm1/packs/") < 2 * MIB, "its own only: {second:?}");
    assert!(second.tally.bytes_stored > 6 * MIB as u64, "common packs count: {second:?}");
    // The third refers to what the second has shared.
    let third = put_new(&world, "vm2/1.img", &images[2]).tally;
    assert!(third.blocks_popular > 1400, "{third:?}");
    assert!(bytes_below(&world, "common/packs/") < 6 * MIB + 400_000);
    assert_clean(&world);
    // Without any election the first one's copy becomes forwards.
    gc(&world);
    let after = bytes_below(&world, "vms/vm0/packs/");
    assert!(after < own / 3, "{own} bytes became {after}");
    assert_clean(&world);
    for (number, image) in images.iter().enumerate() {
        assert!(get(&world.store(), &format!("vm{number}/1.img")).unwrap() == *image, "vm{number}");
    }
    // An election takes them as they are.
    let report = crate::popular::elected(&world);
    assert!(report.blocks_kept > 1300 && report.blocks_popular == 1536, "{report:?}");
    gc(&world);
    gc(&world);
    assert_clean(&world);
    for (number, image) in images.iter().enumerate() {
        assert!(get(&world.store(), &format!("vm{number}/1.img")).unwrap() == *image, "vm{number}");
    }
}

#[test]
fn it_is_off_where_nobody_asked_for_it_and_never_crosses_groups() {
    let world = World::new();
    let image = family(0);
    let store = promoting(&world);
    set_group(&store, "a1", "a");
    set_group(&store, "b1", "b");
    put(&store, "a1/1.img", &image).unwrap();
    let off = put(&world.store(), "none/1.img", &image).unwrap();
    put_new(&world, "b1/1.img", &image);
    put_new(&world, "plain/1.img", &image);
    assert_eq!((bytes_below(&world, "common/"), off.tally.blocks_popular), (0, 0));
    // A VM that went over to another group is told by its log, not by what was written down before.
    set_group(&store, "a1", "c");
    set_group(&store, "a2", "a");
    put_new(&world, "a2/1.img", &image);
    assert_eq!(bytes_below(&world, "common/"), 0);
    // And what one group shares another does not find.
    set_group(&store, "b2", "b");
    put_new(&world, "b2/1.img", &image);
    assert!(bytes_below(&world, "common/packs/") > 5 * MIB);
    set_group(&store, "d1", "d");
    let stranger = put_new(&world, "d1/1.img", &image).tally;
    assert_eq!(stranger.blocks_popular, 0, "{stranger:?}");
    assert_clean(&world);
}

#[test]
fn a_vm_that_goes_takes_nothing_of_the_others_along() {
    let world = World::new();
    let images = [family(0), family(1)];
    put_new(&world, "vm0/1.img", &images[0]);
    put_new(&world, "vm1/1.img", &images[1]);
    forget(&world.store(), &[name("vm0/1.img")]).unwrap();
    for _ in 0..3 {
        gc(&world);
    }
    assert!(get(&world.store(), "vm1/1.img").unwrap() == images[1]);
    // Not only forgotten, but lost as a whole; the second VM goes on, and a third finds what is in common packs.
    for key in crate::invariants::keys(&world.memory, "vms/vm0/") {
        world.memory.remove(&key);
    }
    assert!(get(&world.store(), "vm1/1.img").unwrap() == images[1]);
    let third = family(2);
    let tally = put_new(&world, "vm2/1.img", &third).tally;
    assert!(tally.blocks_popular > 1300, "{tally:?}");
    assert!(get(&world.store(), "vm2/1.img").unwrap() == third);
}

#[test]
fn an_index_that_is_damaged_or_missing_costs_savings_only_and_comes_back() {
    let world = World::new();
    let images: Vec<Vec<u8>> = (0..4).map(family).collect();
    let path = world.derived.as_ref().unwrap().path().join("vms/vm0/sightings");
    put_new(&world, "vm0/1.img", &images[0]);
    let good = std::fs::read(&path).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    put_new(&world, "vm1/1.img", &images[1]);
    assert_eq!(bytes_below(&world, "common/"), 0);
    assert!(get(&world.store(), "vm1/1.img").unwrap() == images[1]);
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(world.derived.as_ref().unwrap().path().join("vms/vm1/sightings")).unwrap();
    put_new(&world, "vm2/1.img", &noise(77, MIB));
    assert_eq!(bytes_below(&world, "common/"), 0);
    // The next writer of the VM makes it anew.
    put_new(&world, "vm0/2.img", &images[0]);
    assert_eq!(std::fs::read(&path).unwrap(), good);
    put_new(&world, "vm3/1.img", &images[3]);
    assert!(bytes_below(&world, "common/packs/") > 5 * MIB);
    assert!(get(&world.store(), "vm3/1.img").unwrap() == images[3]);
    assert_clean(&world);
}

#[test]
fn a_fault_at_any_call_leaves_a_store_that_is_whole() {
    let donor = noise(1, 2 * MIB);
    let image = [&noise(8, 3 * BLOCK)[..], &donor[..]].concat();
    for fault in [Fault::CutBefore, Fault::CutAfter, Fault::Blip, Fault::NoSpace] {
        let mut at = 0;
        let mut shared = 0;
        loop {
            let world = World::new();
            put_new(&world, "vm0/1.img", &donor);
            let faulty = Arc::new(Faulty::new(Arc::new(world.memory.clone()), fault, at));
            let outcome =
                world.store_over(faulty.clone()).and_then(|store| put(&store.promoting(true), "vm1/1.img", &image));
            if !faulty.fired() {
                outcome.unwrap();
                assert!(bytes_below(&world, "common/packs/") > MIB);
                break;
            }
            shared += usize::from(bytes_below(&world, "common/packs/") > 0);
            match get(&world.store(), "vm1/1.img") {
                Ok(there) => assert!(there == image, "{fault:?} at {at}"),
                Err(_) => assert!(outcome.is_err(), "{fault:?} at {at}: was acknowledged"),
            }
            assert!(get(&world.store(), "vm0/1.img").unwrap() == donor, "{fault:?} at {at}");
            // Whoever comes after finds a store that works.
            put_new(&world, "vm1/2.img", &image);
            gc(&world);
            assert!(get(&world.store(), "vm1/2.img").unwrap() == image, "{fault:?} at {at}");
            assert!(get(&world.store(), "vm0/1.img").unwrap() == donor, "{fault:?} at {at}");
            assert_clean(&world);
            at += 1;
        }
        assert!(at > 20 && shared > 2, "{fault:?}: {at} calls, {shared} with common packs");
    }
}

// ------------------------------------------------------------------------------------------------ of the real program

/// Bytes of the packs in a folder of the store.
fn pack_bytes(place: &Place, folder: &str) -> u64 {
    let Ok(rows) = std::fs::read_dir(place.path(&format!("store/{folder}/packs"))) else { return 0 };
    rows.map(|row| row.unwrap().metadata().unwrap().len()).sum()
}

/// Two VMs have the same image: is the second one's copy shared at once, or its own?
fn assert_shares(place: &Place, is_on: bool, bytes: &[u8], what: &str) {
    let (common, second) = (pack_bytes(place, "common"), pack_bytes(place, "vms/b"));
    let whole = bytes.len() as u64 / 2;
    if is_on {
        assert!(common > whole && second < whole / 4, "{what}: {common} common, {second} of the second VM");
    } else {
        assert!(common == 0 && second > whole, "{what}: {common} common, {second} of the second VM");
    }
    for vm in ["a", "b"] {
        same(&place.snapfs(&format!("restore store {vm}/latest -")).ok().out, bytes, what);
    }
    place.snapfs("check store --read-data").ok();
}

#[test]
fn the_variable_turns_it_off_for_a_command() {
    for (value, is_on) in [(None, true), (Some("on"), true), (Some("off"), false)] {
        let place = Place::new();
        let bytes = image(1, 6);
        place.write("image.raw", &bytes);
        for vm in ["a", "b"] {
            let mut command = place.command(SNAPFS);
            command.args(["backup", "store", &format!("{vm}/1.img"), "image.raw"]);
            value.map(|value| command.env("SNAPFS_PROMOTE", value));
            Done::of(format!("backup of {vm}"), command.output().unwrap()).ok();
        }
        assert_shares(&place, is_on, &bytes, &format!("SNAPFS_PROMOTE {value:?}"));
    }
    let place = Place::new();
    place.write("image.raw", b"x");
    let refused = place.shell(&format!("SNAPFS_PROMOTE=yes {SNAPFS} backup store a/1.img image.raw"));
    assert!(refused.code == 2 && refused.err.contains("SNAPFS_PROMOTE: neither on nor off"), "{}", refused.err);
}

#[test]
fn an_option_turns_it_off_for_a_mount_whatever_the_variable_says() {
    need_mount!("sighting::an_option_turns_it_off_for_a_mount_whatever_the_variable_says");
    for (variable, option, is_on) in
        [("", "", true), ("", "-o promote=off", false), ("off", "", false), ("off", "-o promote=on", true)]
    {
        let place = Place::new();
        let bytes = image(2, 6);
        place.write("image.raw", &bytes);
        std::fs::create_dir(place.path("mnt")).unwrap();
        for vm in ["a", "b"] {
            // What a VM leaves for the others is there when its writer has ended.
            place
                .shell(&format!(
                    "export SNAPFS_PROMOTE={variable} && {SNAPFS} mount store mnt {option} && mkdir mnt/{vm} && \
                 cp image.raw mnt/{vm}/1.img && {SNAPFS} umount mnt"
                ))
                .ok();
        }
        assert_shares(&place, is_on, &bytes, &format!("variable {variable:?}, option {option:?}"));
    }
}
