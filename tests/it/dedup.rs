//! What the levels find: bounds on new blocks for the ways in which images change, and what compaction must not touch.

use std::sync::Arc;

use snapfs::collect::forget::forget;
use snapfs::collect::gc::{GcOptions, collect_vm};
use snapfs::name::{SnapshotName, VmName};
use snapfs::recipe::{Recipe, Tally};
use snapfs::units::SegmentIndex;

use crate::world::{World, get, name, noise, put};

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;

/// Backs up one image after the other; what the levels did for the last, which must come back as it was.
fn last_tally(images: &[&[u8]]) -> Tally {
    let world = World::new();
    let mut tally = Tally::default();
    for (number, bytes) in images.iter().enumerate() {
        // A new process each time.
        tally = put(&world.store(), &format!("vm/{number}.img"), bytes).unwrap().tally;
    }
    for (number, bytes) in images.iter().enumerate() {
        assert!(get(&world.store(), &format!("vm/{number}.img")).unwrap() == *bytes, "image {number}");
    }
    let parts = [
        tally.blocks_unchanged,
        tally.blocks_same_place,
        tally.blocks_similar,
        tally.blocks_repeated,
        tally.blocks_popular,
        tally.blocks_new,
    ];
    assert_eq!(parts.iter().sum::<u64>(), tally.blocks_data, "{tally:?}");
    tally
}

fn percent_new(tally: &Tally) -> u64 {
    tally.blocks_new * 100 / tally.blocks_data.max(1)
}

#[test]
fn an_image_that_is_shifted_by_blocks_is_found() {
    let image = noise(1, 16 * MIB);
    for blocks in [1, 7, 512, 513] {
        let shifted = [noise(2, blocks * BLOCK), image.clone()].concat();
        let tally = last_tally(&[&image, &shifted]);
        assert!(tally.blocks_new >= blocks as u64);
        assert!(tally.blocks_new - blocks as u64 <= 4096 / 50, "shifted by {blocks}: {tally:?}");
    }
}

#[test]
fn runs_that_moved_are_found() {
    let image = noise(3, 16 * MIB);
    // Pieces of 1 MiB in another order, at other places within their segments.
    let mut moved = noise(4, 100 * BLOCK);
    for turn in 0..16 {
        let piece = (turn * 7 + 3) % 16;
        moved.extend_from_slice(&image[piece * MIB..][..MIB]);
    }
    let tally = last_tally(&[&image, &moved]);
    assert!(tally.blocks_new >= 100);
    assert!(tally.blocks_new - 100 <= 4096 / 25, "{tally:?}");
}

#[test]
fn what_comes_back_after_it_was_gone_is_found() {
    let (a, b) = (noise(5, 12 * MIB), noise(6, 12 * MIB));
    let tally = last_tally(&[&a, &b, &a]);
    assert!(percent_new(&tally) <= 2, "{tally:?}");
    // Where half of it is still there.
    let half = [&a[..6 * MIB], &b[6 * MIB..]].concat();
    let tally = last_tally(&[&a, &half, &a]);
    assert_eq!(tally.blocks_unchanged, 6 * 256);
    assert!(percent_new(&tally) <= 1, "{tally:?}");
}

#[test]
fn duplicates_inside_an_image_are_stored_once() {
    // The same 3 MiB four times: once a segment apart, and once inside of one.
    let piece = noise(7, 3 * MIB);
    let tally = last_tally(&[&piece.repeat(4)]);
    assert!(tally.blocks_new >= 768 && tally.blocks_new <= 768 + 768 / 20, "{tally:?}");
    let block = noise(8, BLOCK);
    let tally = last_tally(&[&block.repeat(2048)]);
    assert!(tally.blocks_new <= 4, "{tally:?}");
    assert!(tally.bytes_stored <= 5 * BLOCK as u64, "{tally:?}");
}

#[test]
fn small_changes_cost_what_they_are() {
    let image = noise(9, 16 * MIB);
    let mut changed = image.clone();
    // Every hundredth block, by one bit.
    for block in (0..4096).step_by(100) {
        changed[block * BLOCK + 17] ^= 1;
    }
    let tally = last_tally(&[&image, &changed]);
    assert_eq!((tally.blocks_new, tally.blocks_same_place + tally.blocks_unchanged), (41, 4096 - 41), "{tally:?}");
    let tally = last_tally(&[&image, &vec![0; 16 * MIB]]);
    assert_eq!((tally.blocks_data, tally.blocks_new), (0, 0));
}

/// The recipes of all segments of a snapshot.
fn recipes(world: &World, snapshot: &str) -> Vec<Option<Arc<Recipe>>> {
    let store = world.store();
    let (_, _, image) = store.open_reference(&SnapshotName::parse_reference(snapshot).unwrap()).unwrap();
    let segments = image.grid().segments(image.bytes());
    (0..segments).map(|s| image.tree().recipe(SegmentIndex(s)).unwrap()).collect()
}

#[test]
fn compaction_keeps_slots_and_recipes() {
    let world = World::new();
    let first = noise(10, 12 * MIB);
    // Every second run of twenty blocks stays.
    let mut kept = first.clone();
    for run in (0..3072 / 20).step_by(2) {
        kept[run * 20 * BLOCK..][..20 * BLOCK].fill(0);
    }
    put(&world.store(), "vm/first.img", &first).unwrap();
    put(&world.store(), "vm/kept.img", &kept).unwrap();
    let before = recipes(&world, "vm/kept.img");
    forget(&world.store(), &[name("vm/first.img")]).unwrap();
    let vm = VmName::new("vm").unwrap();
    let bytes: usize = world.memory.objects().values().map(|o| o.len()).sum();
    let report = collect_vm(&world.store(), &vm, GcOptions::default(), &mut |_| {}).unwrap();
    assert!(report.packs_compacted > 0, "{report:?}");
    let after: usize = world.memory.objects().values().map(|o| o.len()).sum();
    assert!(after < bytes * 6 / 10, "{bytes} bytes became {after}");
    let now = recipes(&world, "vm/kept.img");
    assert_eq!(before.len(), now.len());
    assert!(before == now, "a recipe has changed");
    assert!(get(&world.store(), "vm/kept.img").unwrap() == kept);
    // What is in the new generation is shared as before; what is not there any more is stored again.
    let tally = put(&world.store(), "vm/again.img", &first).unwrap().tally;
    assert!(tally.blocks_new >= 1540 && tally.blocks_new <= 1560, "{tally:?}");
    assert!(get(&world.store(), "vm/again.img").unwrap() == first);
}
