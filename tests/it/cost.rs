//! Tier 5: what things cost, in calls of the backend.

use std::sync::Arc;

use snapfs::backend::Backend;
use snapfs::backend::testing::Recorder;
use snapfs::name::SnapshotName;

use crate::world::{World, noise, put};

fn recorded(world: &World) -> (Arc<Recorder>, snapfs::store::Store) {
    let recorder = Arc::new(Recorder::new(Arc::new(world.memory.clone())));
    let store = world.store_over(recorder.clone() as Arc<dyn Backend>).unwrap();
    (recorder, store)
}

#[test]
fn a_4_kib_read_costs_at_most_two_reads_warm_and_four_cold() {
    let world = World::new();
    let image = noise(1, 48 << 20);
    put(&world.store(), "vm/a.img", &image).unwrap();
    for probe in 0..40u64 {
        // A new store has nothing cached.
        let (recorder, store) = recorded(&world);
        let (_, _, open) = store.open_reference(&SnapshotName::parse_reference("vm/a.img").unwrap()).unwrap();
        let offset = (probe * 1_234_567) / 4096 * 4096 % (48 << 20);
        let mut block = [0; 4096];
        recorder.reset();
        open.read_at(offset, &mut block).unwrap();
        assert_eq!(block[..], image[offset as usize..][..4096]);
        let cold = recorder.reads();
        assert!(cold <= 4, "cold read at {offset}: {cold} backend reads");
        // Group page and pack index are cached now; another segment needs its recipe and a frame.
        let other = (offset + (20 << 20)) % (48 << 20);
        recorder.reset();
        open.read_at(other, &mut block).unwrap();
        let warm = recorder.reads();
        assert!(warm <= 2, "warm read at {other}: {warm} backend reads");
        recorder.reset();
        open.read_at(other, &mut block).unwrap();
        assert_eq!(recorder.reads(), 0, "a cached block is read again");
    }
}

#[test]
fn a_hole_costs_no_read() {
    let world = World::new();
    let mut image = vec![0; 8 << 20];
    image[..4096].copy_from_slice(&noise(1, 4096));
    put(&world.store(), "vm/a.img", &image).unwrap();
    let (recorder, store) = recorded(&world);
    let (_, _, open) = store.open_reference(&SnapshotName::parse_reference("vm/a.img").unwrap()).unwrap();
    let mut block = [0; 4096];
    open.read_at(0, &mut block).unwrap();
    recorder.reset();
    open.read_at(6 << 20, &mut block).unwrap();
    assert_eq!(recorder.reads(), 0);
}

#[test]
fn an_unchanged_image_writes_no_pack_of_data_and_few_bytes() {
    let world = World::new();
    let image = noise(2, 16 << 20);
    put(&world.store(), "vm/a.img", &image).unwrap();
    let before: usize = world.memory.objects().values().map(|o| o.len()).sum();
    let (recorder, store) = recorded(&world);
    let report = put(&store, "vm/b.img", &image).unwrap();
    assert_eq!((report.tally.blocks_new, report.tally.blocks_unchanged), (0, 4096));
    let after: usize = world.memory.objects().values().map(|o| o.len()).sum();
    assert!(after - before < 4096, "{} bytes for nothing new", after - before);
    // Begin, root page, commit: not even a group page.
    let counts = recorder.counts();
    assert_eq!(counts.create + counts.put_new, 3, "{counts:?}");
}

#[test]
fn opening_a_vm_reads_no_more_records_than_two_checkpoint_intervals() {
    let world = World::new();
    for number in 0..150 {
        put(&world.store(), &format!("vm/{number}.img"), &noise(number, 4096)).unwrap();
    }
    let (recorder, store) = recorded(&world);
    recorder.reset();
    let (_, state) = store.vm(&snapfs::name::VmName::new("vm").unwrap()).unwrap();
    assert_eq!(state.files.len(), 150);
    let interval = snapfs::limits::LOG_CHECKPOINT_INTERVAL as usize;
    assert!(recorder.reads() as usize <= interval + 1, "{} reads", recorder.reads());
    let records = world.memory.objects().keys().filter(|k| k.contains("/log/")).count();
    assert!(records <= 2 * interval + 2, "{records} records are kept");
}
