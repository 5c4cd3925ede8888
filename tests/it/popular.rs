//! The popular set: elections, references to common packs, forwards and the collection of common packs (G6), against
//! what every snapshot must read as; and that no VM group learns of another.

use std::collections::BTreeMap;
use std::sync::Arc;

use snapfs::catalog::record::Op;
use snapfs::check::{CheckOptions, check_store};
use snapfs::collect::common::collect_common;
use snapfs::collect::forget::forget;
use snapfs::collect::gc::{GcOptions, GcReport, collect_vm};
use snapfs::elect::count::CountOptions;
use snapfs::elect::run::{ElectOptions, ElectReport, Elected, census, elect};
use snapfs::fingerprint::fingerprint;
use snapfs::name::VmName;
use snapfs::popular::index::{IndexBuilder, IndexIdentity, PopularIndex};
use snapfs::store::Store;
use snapfs::store::session::Session;
use snapfs::units::{Epoch, Incarnation, Serial, SlotId, VmGroup};

use crate::invariants::keys;
use crate::world::{Rng, World, get, name, noise, put};

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;
const FULL: CheckOptions = CheckOptions { read_data: true, sample_percent: None, repair: false };

fn bytes_below(world: &World, prefix: &str) -> usize {
    world.memory.objects().iter().filter(|(key, _)| key.starts_with(prefix)).map(|(_, bytes)| bytes.len()).sum()
}

pub fn elected(world: &World) -> ElectReport {
    elected_with(world, &ElectOptions::default())
}

fn elected_with(world: &World, options: &ElectOptions) -> ElectReport {
    match elect(&Arc::new(world.store()), options, Arc::new(|_| {})).unwrap() {
        Elected::Chosen(report) => report,
        other => panic!("{other:?}"),
    }
}

/// Collects all VMs, then the common packs.
fn gc(store: &Store, exact: bool) -> Option<GcReport> {
    let options = GcOptions { exact, dry_run: false };
    for vm in store.vm_names().unwrap() {
        let report = collect_vm(store, &vm, options, &mut |_| {}).unwrap();
        assert_eq!((report.bitmaps_wrong, report.recipes_damaged), (0, 0), "{report:?}");
    }
    collect_common(store, options, &mut |_| {}).unwrap()
}

fn assert_clean(world: &World) {
    let report = check_store(&world.store(), FULL, &mut |_| {}).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

/// The image of a VM: what all have, with its own before and between.
fn family(number: u64) -> Vec<u8> {
    let own = noise(100 + number, MIB + number as usize * 5 * BLOCK);
    [noise(1, 3 * MIB), own, noise(2, 3 * MIB)].concat()
}

#[test]
fn an_election_shares_what_vms_hold_and_gc_leaves_one_copy() {
    let world = World::new();
    let images: Vec<Vec<u8>> = (0..4).map(family).collect();
    for (number, image) in images.iter().enumerate() {
        put(&world.store(), &format!("vm{number}/1.img"), image).unwrap();
    }
    assert_eq!(bytes_below(&world, "common/"), 0);
    let report = elected(&world);
    assert_eq!((report.blocks_popular, report.blocks_copied, report.blocks_kept), (1536, 1536, 0), "{report:?}");
    assert_eq!((report.epoch, report.vms, report.worth.duplicates_percent), (Some(1), 4, 100.0), "{report:?}");
    let common = bytes_below(&world, "common/packs/");
    assert!((6 * MIB..6 * MIB + 300_000).contains(&common), "{common}");
    assert_clean(&world);
    // A new VM refers to it.
    let fifth = family(4);
    let tally = put(&world.store(), "vm4/1.img", &fifth).unwrap().tally;
    assert_eq!((tally.blocks_popular, tally.blocks_new), (1536, 276), "{tally:?}");
    assert!(get(&world.store(), "vm4/1.img").unwrap() == fifth);
    // The older ones forward.
    let before = bytes_below(&world, "vms/vm0/packs/");
    gc(&world.store(), false);
    let after = bytes_below(&world, "vms/vm0/packs/");
    assert!(after < before / 4, "{before} bytes became {after}");
    assert_eq!(bytes_below(&world, "common/packs/"), common, "all of it is needed");
    for (number, image) in images.iter().enumerate() {
        assert!(get(&world.store(), &format!("vm{number}/1.img")).unwrap() == *image, "vm{number}");
    }
    assert_clean(&world);
    // A second snapshot matches forwards as it matches blocks.
    let tally = put(&world.store(), "vm0/2.img", &[&noise(9, BLOCK)[..], &images[0][..]].concat()).unwrap().tally;
    assert!(tally.blocks_new <= 20, "{tally:?}");
    // Another election finds all of it where it is.
    let again = elected(&world);
    assert_eq!((again.blocks_popular, again.blocks_copied, again.epoch), (1536, 0, Some(2)), "{again:?}");
    gc(&world.store(), true);
    assert_eq!(bytes_below(&world, "common/packs/"), common);
    assert_clean(&world);
}

#[test]
fn damage_to_common_blocks_does_not_make_gc_write_the_same_again_and_again() {
    let world = World::new();
    let images: Vec<Vec<u8>> = (0..4).map(family).collect();
    for (number, image) in images.iter().enumerate() {
        put(&world.store(), &format!("vm{number}/1.img"), image).unwrap();
    }
    elected(&world);
    for key in keys(&world.memory, "common/packs") {
        let mut bytes = world.memory.objects()[key.as_str()].to_vec();
        // All frames, and not the slot table and the index after them.
        for at in (2000..6 * MIB).step_by(BLOCK) {
            bytes[at] ^= 1;
        }
        world.memory.replace(&key, bytes);
    }
    gc(&world.store(), false);
    let settled = bytes_below(&world, "vms/");
    let packs = || keys(&world.memory, "vms/vm0/packs");
    let before = packs();
    let report = collect_vm(&world.store(), &VmName::new("vm0").unwrap(), GcOptions::default(), &mut |_| {}).unwrap();
    assert_eq!((report.packs_compacted, report.packs_written), (0, 0), "{report:?}");
    assert_eq!(packs(), before);
    assert!(bytes_below(&world, "vms/") - settled < 10_000);
    for (number, image) in images.iter().enumerate() {
        assert!(get(&world.store(), &format!("vm{number}/1.img")).unwrap() == *image, "vm{number}");
    }
}

#[test]
fn what_nobody_needs_any_more_goes_after_it_was_condemned() {
    let world = World::new();
    let images: Vec<Vec<u8>> = (0..3).map(family).collect();
    for (number, image) in images.iter().enumerate() {
        put(&world.store(), &format!("vm{number}/1.img"), image).unwrap();
    }
    elected(&world);
    gc(&world.store(), false);
    let common = bytes_below(&world, "common/packs/");
    forget(&world.store(), &[name("vm1/1.img"), name("vm2/1.img")]).unwrap();
    gc(&world.store(), false);
    // One VM still needs it all, although it is not popular any more.
    assert_eq!(elected(&world).blocks_popular, 0);
    for _ in 0..3 {
        gc(&world.store(), true);
    }
    assert_eq!(bytes_below(&world, "common/packs/"), common);
    assert!(get(&world.store(), "vm0/1.img").unwrap() == images[0]);
    assert_clean(&world);
    forget(&world.store(), &[name("vm0/1.img")]).unwrap();
    let condemned = gc(&world.store(), false).unwrap();
    assert_eq!((condemned.slots_condemned, condemned.bytes_reclaimed), (1536, 0), "{condemned:?}");
    assert_eq!(bytes_below(&world, "common/packs/"), common, "not in the run that condemns");
    // Nothing new refers to it from now on.
    let tally = put(&world.store(), "vm9/1.img", &images[0]).unwrap().tally;
    assert_eq!(tally.blocks_popular, 0, "{tally:?}");
    let gone = gc(&world.store(), false).unwrap();
    assert!(gone.bytes_reclaimed as usize > common * 9 / 10, "{gone:?}");
    assert_eq!((bytes_below(&world, "common/packs/"), gone.slots_condemned), (0, 0));
    assert!(get(&world.store(), "vm9/1.img").unwrap() == images[0]);
    assert_clean(&world);
    let writes = world.memory.objects().len();
    assert!(gc(&world.store(), false).unwrap().idle);
    assert_eq!(world.memory.objects().len(), writes, "an idle run writes nothing");
}

#[test]
fn a_writer_that_knows_an_older_epoch_is_waited_for() {
    let world = World::new();
    let image = family(0);
    for number in 0..2 {
        put(&world.store(), &format!("vm{number}/1.img"), &image).unwrap();
    }
    elected(&world);
    // It began while everything was popular, and refers to it when all others have forgotten it.
    let store = world.store();
    let handle = store.vm_or_create(&VmName::new("late").unwrap()).unwrap();
    let session = Session::begin(&store, &handle).unwrap();
    let slots = session.popular_hints(&fingerprint(&image[..BLOCK]));
    assert_eq!(slots.len(), 1);
    forget(&world.store(), &[name("vm0/1.img"), name("vm1/1.img")]).unwrap();
    let others = || {
        let store = world.store();
        for vm in ["vm0", "vm1"] {
            collect_vm(&store, &VmName::new(vm).unwrap(), GcOptions::default(), &mut |_| {}).unwrap();
        }
        collect_common(&store, GcOptions::default(), &mut |_| {}).unwrap().unwrap()
    };
    others();
    elected(&world);
    others();
    let waiting = others();
    assert_eq!(waiting.waiting_for, ["late"], "{waiting:?}");
    let page = session.page_of(slots[0]).unwrap();
    assert_eq!(page.fingerprint_of(slots[0].slot()), Some(fingerprint(&image[..BLOCK])), "its bytes are there");
    drop(session);
    let gone = others();
    assert!(gone.waiting_for.is_empty() && gone.bytes_reclaimed > 0, "{gone:?}");
    assert_eq!(bytes_below(&world, "common/packs/"), 0);
    assert_clean(&world);
}

#[test]
fn a_vm_that_cannot_be_read_stops_the_collection_of_common_packs() {
    let world = World::new();
    let image = family(0);
    for number in 0..2 {
        put(&world.store(), &format!("vm{number}/1.img"), &image).unwrap();
    }
    elected(&world);
    gc(&world.store(), false);
    let roots = crate::invariants::keys(&world.memory, "vms/vm1/snapshots/");
    let taken = world.memory.remove(&roots[0]).unwrap();
    let error = collect_common(&world.store(), GcOptions::default(), &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("vm1") && error.to_string().contains(roots[0].as_str()), "{error}");
    world.memory.replace(&roots[0], taken.to_vec());
    let logs = crate::invariants::keys(&world.memory, "vms/vm1/log/");
    logs.iter().for_each(|key| {
        world.memory.remove(key);
    });
    let error = collect_common(&world.store(), GcOptions::default(), &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("vm1"), "{error}");
    assert!(get(&world.store(), "vm0/1.img").unwrap() == image);
}

fn set_group(store: &Store, vm: &str, group: &str) {
    let handle = store.vm_or_create(&VmName::new(vm).unwrap()).unwrap();
    handle.append(None, |_| Ok((vec![Op::Group { name: group.to_owned() }], ()))).unwrap();
}

#[test]
fn nothing_crosses_the_border_of_a_vm_group() {
    let world = World::new();
    let image = family(0);
    for (vm, group) in [("a1", "a"), ("b1", "b"), ("none", "")] {
        set_group(&world.store(), vm, group);
        put(&world.store(), &format!("{vm}/1.img"), &image).unwrap();
    }
    let report = elected(&world);
    assert_eq!((report.groups, report.blocks_shared, report.epoch), (3, 0, None), "{report:?}");
    set_group(&world.store(), "a2", "a");
    put(&world.store(), "a2/1.img", &image).unwrap();
    let report = elected(&world);
    assert!(report.blocks_copied > 1536, "{report:?}");
    for (vm, group, shares) in [("a3", "a", true), ("b2", "b", false), ("other", "", false)] {
        set_group(&world.store(), vm, group);
        let tally = put(&world.store(), &format!("{vm}/1.img"), &image).unwrap().tally;
        assert_eq!(tally.blocks_popular > 0, shares, "{vm}: {tally:?}");
        assert_eq!(tally.blocks_new == 0, shares, "{vm}: {tally:?}");
    }
    gc(&world.store(), false);
    for vm in ["b1", "b2", "none", "other"] {
        assert!(bytes_below(&world, &format!("vms/{vm}/packs/")) > image.len(), "{vm}");
    }
    // A second copy for those who may not see the first.
    elected(&world);
    gc(&world.store(), false);
    for vm in ["a1", "a2", "a3", "b1", "b2", "none", "other"] {
        assert!(bytes_below(&world, &format!("vms/{vm}/packs/")) < image.len() / 4, "{vm}");
        assert!(get(&world.store(), &format!("{vm}/1.img")).unwrap() == image, "{vm}");
    }
    assert!(bytes_below(&world, "common/packs/") > 3 * image.len());
    assert_clean(&world);
}

#[test]
fn a_budget_takes_the_most_popular() {
    let world = World::new();
    for number in 0..4u64 {
        // Block n is held by the VMs from n on, modulo five: popularities from 1 to 4.
        let blocks: Vec<u8> = (0..400u64).filter(|n| n % 5 <= number).flat_map(|n| noise(n, BLOCK)).collect();
        put(&world.store(), &format!("vm{number}/1.img"), &blocks).unwrap();
    }
    let census = census(&Arc::new(world.store()), &CountOptions::default(), Arc::new(|_| {})).unwrap();
    assert_eq!(census.blocks, BTreeMap::from([(1, 80), (2, 80), (3, 80), (4, 80)]));
    // Room for 100 blocks: the 80 that four have, and 20 that three have.
    let report = elected_with(&world, &ElectOptions { memory_bytes: 1600, ..ElectOptions::default() });
    assert_eq!((report.blocks_popular, report.blocks_shared, report.blocks_distinct), (100, 240, 320), "{report:?}");
    assert!((report.worth.duplicates_percent - 280.0 / 4.8).abs() < 1e-6, "{report:?}");
    let report = elected_with(&world, &ElectOptions { sigma_percent: Some(50.0), ..ElectOptions::default() });
    assert_eq!((report.blocks_popular, report.blocks_kept), (160, 100), "{report:?}");
    assert!(report.zipf_alpha.is_some());
    assert_clean(&world);
}

#[test]
fn an_index_of_ten_million_blocks_stays_below_120_mib() {
    // A tenth of it, by the same share.
    let entries = 1_000_000_u32;
    let mut builder = IndexBuilder::with_capacity(entries as usize);
    for n in 0..entries {
        let slot = SlotId::new(Serial::common(snapfs::units::RecordNumber(2), (n >> 14) as u16), (n & 0x3fff) as u16);
        builder.add(VmGroup::default(), &fingerprint(&n.to_le_bytes()), slot).unwrap();
    }
    let identity = IndexIdentity { incarnation: Incarnation([1; 16]), epoch: Epoch(1) };
    let index = PopularIndex::decode(&builder.encode(identity).unwrap()).unwrap();
    assert_eq!(index.entries(), u64::from(entries));
    assert!(index.memory_bytes() < 12 * MIB, "{}", index.memory_bytes());
}

/// Images that share parts: a few pieces of 64 blocks, chosen at random from a pool that all VMs draw from.
fn mixed(rng: &mut Rng) -> Vec<u8> {
    let mut image = Vec::new();
    for _ in 0..2 + rng.below(5) {
        match rng.below(4) {
            0 => image.extend(noise(1000 + rng.next() % 1000, 20 * BLOCK)),
            1 => image.extend(vec![0; 10 * BLOCK]),
            _ => image.extend(noise(rng.below(5), 64 * BLOCK)),
        }
    }
    image
}

#[test]
fn random_operations_lose_nothing() {
    for seed in 1..=6 {
        let world = World::new();
        let mut rng = Rng(seed);
        let mut wanted: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut number = 0;
        for step in 0..40 {
            let store = world.store();
            let what = format!("seed {seed}, step {step}");
            match rng.below(10) {
                0..=4 => {
                    number += 1;
                    let snapshot = format!("vm{}/{number}.img", rng.below(3));
                    let image = mixed(&mut rng);
                    put(&store, &snapshot, &image).unwrap();
                    wanted.insert(snapshot, image);
                }
                5 | 6 => {
                    let at = rng.below(wanted.len() as u64) as usize;
                    if let Some(snapshot) = wanted.keys().nth(at).cloned() {
                        forget(&store, &[name(&snapshot)]).unwrap();
                        wanted.remove(&snapshot);
                    }
                }
                7 => {
                    elected(&world);
                }
                _ => {
                    gc(&store, rng.below(2) == 0);
                }
            }
            if step % 8 == 7 {
                for (snapshot, image) in &wanted {
                    assert!(get(&world.store(), snapshot).unwrap() == *image, "{what}: {snapshot}");
                }
                let report = check_store(&world.store(), FULL, &mut |_| {}).unwrap();
                assert!(report.findings.is_empty(), "{what}: {:?}", report.findings);
            }
        }
        let all: Vec<_> = wanted.keys().map(|snapshot| name(snapshot)).collect();
        if !all.is_empty() {
            forget(&world.store(), &all).unwrap();
        }
        gc(&world.store(), true);
        elected(&world);
        gc(&world.store(), true);
        gc(&world.store(), true);
        assert_eq!(bytes_below(&world, "common/packs/"), 0, "seed {seed}");
        assert_clean(&world);
    }
}
