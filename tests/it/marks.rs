//! Tier 4: a check tells which bytes of which snapshots are lost, which are just those that cannot be read; a repair marks
//! the snapshots concerned, and takes the mark from those that were healed.

use std::collections::BTreeMap;

use snapfs::backend::{Backend, Key};
use snapfs::catalog::state::VmState;
use snapfs::check::live::LiveImage;
use snapfs::check::{CheckOptions, CheckReport, check_store_from};
use snapfs::collect::forget::forget;
use snapfs::error::ErrorKind;
use snapfs::name::{SnapshotName, VmName};
use snapfs::pack::Content;
use snapfs::store::Store;

use crate::heal::{Live, REPAIR, behind_sector_63, flip, in_frames, packs};
use crate::world::{World, noise, put};

const LOOK: CheckOptions = CheckOptions { repair: false, ..REPAIR };
const GLANCE: CheckOptions = CheckOptions { read_data: false, ..REPAIR };

fn check(store: &Store, options: CheckOptions, images: &[&dyn LiveImage]) -> CheckReport {
    check_store_from(store, options, images, &mut |_| {}).unwrap()
}

fn state(store: &Store) -> std::sync::Arc<VmState> {
    store.vm(&VmName::new("vm").unwrap()).unwrap().1
}

/// Marks by name.
fn marks(store: &Store) -> BTreeMap<String, u64> {
    let state = state(store);
    state.lost.iter().map(|(id, bytes)| (state.files[id].name.clone(), *bytes)).collect()
}

/// 4 KiB pieces of a snapshot that cannot be read.
fn unreadable(store: &Store, name: &str) -> Vec<u64> {
    let reference = SnapshotName::parse_reference(&format!("vm/{name}")).unwrap();
    let Ok((_, _, image)) = store.open_reference(&reference) else { return Vec::new() };
    let mut lost = Vec::new();
    for at in (0..image.bytes()).step_by(4096) {
        let mut piece = vec![0; 4096.min(image.bytes() - at) as usize];
        if let Err(e) = image.read_at(at, &mut piece) {
            assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
            lost.push(at);
        }
    }
    lost
}

/// The same by what a check told, and the sum of bytes.
fn told(report: &CheckReport, name: &str) -> (Vec<u64>, u64) {
    let mut pieces = Vec::new();
    let mut bytes = 0;
    let lost = report.findings.iter().flat_map(|finding| &finding.lost);
    for lost in lost.filter(|lost| lost.snapshot == format!("vm/{name}")) {
        assert_eq!(lost.ranges_more, 0);
        assert_eq!(lost.bytes, lost.ranges.iter().map(|range| range.bytes).sum::<u64>());
        bytes += lost.bytes;
        pieces.extend(lost.ranges.iter().flat_map(|range| (range.offset..range.offset + range.bytes).step_by(4096)));
    }
    pieces.sort_unstable();
    (pieces, bytes)
}

/// Three days: the second is like the first, the third has a new middle; the last block is no whole one.
fn days() -> [Vec<u8>; 3] {
    let first = noise(1, (7 << 20) + 1000);
    let mut third = first.clone();
    third[3 << 20..4 << 20].copy_from_slice(&noise(2, 1 << 20));
    [first.clone(), first, third]
}

fn world() -> World {
    let world = World::new();
    for (day, bytes) in days().iter().enumerate() {
        put(&world.store(), &format!("vm/{day}.img"), bytes).unwrap();
        world.clock.advance(std::time::Duration::from_secs(86_400));
    }
    world
}

/// The same three days behind a partition table.
fn shifted() -> World {
    let world = World::new();
    for (day, bytes) in days().iter().enumerate() {
        put(&world.store(), &format!("vm/{day}.img"), &behind_sector_63(bytes)).unwrap();
        world.clock.advance(std::time::Duration::from_secs(86_400));
    }
    world
}

/// Pieces of 4 KiB that a block at this offset is in.
fn touched(offset: u64) -> [u64; 2] {
    [offset / 4096 * 4096, offset.next_multiple_of(4096)]
}

#[test]
fn what_a_check_tells_is_what_cannot_be_read() {
    // On the grid of a partition that begins at sector 63, too.
    for (every, shift) in [(1, false), (5, false), (13, true)] {
        let whole = if shift { shifted() } else { world() };
        let world = World { memory: whole.memory.fork(), ..World::new() };
        for (key, (index, _)) in packs(&whole.memory, Content::Data) {
            let some: Vec<u64> = in_frames(&index).into_iter().step_by(every).collect();
            flip(&world.memory, &key, &some[some.len() / 2..]);
        }
        let report = check(&world.store(), LOOK, &[]);
        assert!(report.is_damaged());
        for name in ["0.img", "1.img", "2.img"] {
            let (pieces, bytes) = told(&report, name);
            // A piece of 4 KiB of the image has parts of two blocks of a shifted grid.
            let pieces: Vec<u64> = if shift { pieces.iter().flat_map(|at| touched(*at)).collect() } else { pieces };
            let pieces: Vec<u64> = std::collections::BTreeSet::from_iter(pieces).into_iter().collect();
            assert_eq!(pieces, unreadable(&world.store(), name), "{name}");
            assert!(!pieces.is_empty() && pieces.len() < 1793, "{name}: {}", pieces.len());
            if !shift {
                let last = pieces.last().is_some_and(|at| *at == 7 << 20);
                assert_eq!(bytes, pieces.len() as u64 * 4096 - if last { 4096 - 1000 } else { 0 });
            }
        }
        // Who only looks changes nothing.
        assert_eq!(marks(&world.store()), BTreeMap::new());
    }
}

#[test]
fn lost_recipes_and_root_pages_are_ranges_too() {
    let world = world();
    // Recipes of the third day: one frame of the newest recipe pack.
    let recipes = packs(&world.memory, Content::Recipes);
    let (key, (index, _)) = recipes.last_key_value().unwrap();
    flip(&world.memory, key, &in_frames(index)[..1]);
    let vm = state(&world.store());
    let root = vm.find(None, "0.img").unwrap().root;
    world.memory.delete(&Key::new(format!("vms/vm/snapshots/{root}.snap"))).unwrap();
    let report = check(&world.store(), REPAIR, &[]);
    assert_eq!(told(&report, "0.img").1, (7 << 20) + 1000);
    let (pieces, bytes) = told(&report, "2.img");
    let lost = unreadable(&world.store(), "2.img");
    assert!(!lost.is_empty() && lost.iter().all(|at| pieces.contains(at)), "{pieces:?}");
    assert_eq!(marks(&world.store()), [("0.img".into(), (7 << 20) + 1000), ("2.img".into(), bytes)].into());
}

#[test]
fn a_repair_marks_what_it_cannot_heal_and_takes_the_mark_from_what_it_has_healed() {
    let world = world();
    let [first, _, third] = days();
    for (key, (index, _)) in packs(&world.memory, Content::Data) {
        flip(&world.memory, &key, &in_frames(&index));
    }
    let store = world.store();
    let report = check(&store, REPAIR, &[]);
    assert_eq!((report.snapshots_damaged, report.snapshots_marked, report.snapshots_unmarked), (3, 3, 0));
    let all = marks(&store);
    assert_eq!(all.values().copied().collect::<Vec<_>>(), [(7 << 20) + 1000; 3]);
    // Known already: no record. One that does not read the data sees nothing, and believes the mark.
    let number = state(&store).number;
    for options in [REPAIR, GLANCE] {
        let report = check(&store, options, &[]);
        assert_eq!((report.snapshots_damaged, report.snapshots_marked, report.snapshots_unmarked), (3, 0, 0));
        assert_eq!((state(&store).number, marks(&store)), (number, all.clone()));
    }
    // The first image heals the first days, and of the third what it has in common with them.
    let report = check(&store, REPAIR, &[&Live::new(first)]);
    assert_eq!((report.snapshots_damaged, report.snapshots_marked, report.snapshots_unmarked), (1, 1, 2));
    assert_eq!(marks(&store), [("2.img".into(), 1 << 20)].into());
    assert_eq!(marks(&world.store()), marks(&store));
    let report = check(&store, REPAIR, &[&Live::new(third)]);
    assert!(!report.is_damaged());
    assert_eq!((report.snapshots_damaged, report.snapshots_unmarked), (0, 1));
}

#[test]
fn a_mark_goes_with_its_snapshot_and_stays_in_a_checkpoint() {
    let world = world();
    for (key, (index, _)) in packs(&world.memory, Content::Data) {
        flip(&world.memory, &key, &in_frames(&index)[..1]);
    }
    check(&world.store(), REPAIR, &[]);
    assert_eq!(marks(&world.store()).len(), 3);
    forget(&world.store(), &[SnapshotName::parse("vm/1.img").unwrap()]).unwrap();
    let before = marks(&world.store());
    assert_eq!(before.keys().collect::<Vec<_>>(), ["0.img", "2.img"]);
    for n in 0..snapfs::limits::LOG_CHECKPOINT_INTERVAL {
        put(&world.store(), &format!("vm/more{n}.img"), b"x").unwrap();
    }
    assert!(world.memory.objects().keys().any(|key| key.contains("vms/vm/log/") && key.ends_with(".checkpoint")));
    assert_eq!(marks(&world.store()), before);
}
