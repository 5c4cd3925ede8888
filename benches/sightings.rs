//! What a writer pays to learn what other VMs have, when it first meets something new: second sighting's files of so many
//! VMs, with half of the most that a file may have.
//!
//!     cargo bench --bench sightings -- [VMS ...]
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    missing_docs,
    reason = "a bench prints and measures"
)]

mod shared;

use std::sync::Arc;
use std::time::Instant;

use snapfs::clock::SystemClock;
use snapfs::limits::SIGHTINGS_PER_VM_MAX;
use snapfs::name::VmName;
use snapfs::popular::sighting::{FILE_NAME, Sighting, Sightings};
use snapfs::store::sightings::OtherVms;
use snapfs::store::{MemoryShares, Store};
use snapfs::units::{Incarnation, RecordNumber, Serial, SlotId, VmGroup};

use shared::{mix, status};

fn main() {
    let counts: Vec<u64> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let counts = if counts.is_empty() { vec![10, 100, 400] } else { counts };
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let root = folder.path().join("store");
    Store::init(&root, &SystemClock::new()).unwrap();
    println!("| other VMs | their files, MB | ms, the first look | growth of resident memory, MB |");
    println!("|---|---|---|---|");
    let mut made = 0;
    for count in counts {
        for vm in made..count {
            let mut sightings = Sightings::empty(Incarnation([1; 16]), VmGroup::default());
            let pack = Serial::new(RecordNumber(2), 0);
            let entry = |n: u64| Sighting { hook: mix(vm << 32 | n), slot: SlotId::new(pack, n as u16) };
            sightings.entries = (0..SIGHTINGS_PER_VM_MAX as u64 / 2).map(entry).collect();
            sightings.packs.push(pack);
            sightings.settle();
            sightings.write(&root.join(format!("derived/vms/vm{vm}")).join(FILE_NAME)).unwrap();
        }
        made = made.max(count);
        let mut times = Vec::new();
        let before = status("VmRSS");
        for _ in 0..5 {
            let store = Store::open(&root, Arc::new(SystemClock::new()), MemoryShares::default()).unwrap();
            let store = store.promoting(true);
            let vm = store.vm_or_create(&VmName::new("me").unwrap()).unwrap();
            let others = OtherVms::of(&store, &vm, VmGroup::default()).unwrap();
            let began = Instant::now();
            std::hint::black_box(others.look_up(&[mix(1)]));
            times.push(began.elapsed().as_secs_f64() * 1000.0);
        }
        times.sort_by(f64::total_cmp);
        let bytes: u64 = (0..made)
            .map(|vm| std::fs::metadata(root.join(format!("derived/vms/vm{vm}")).join(FILE_NAME)).unwrap().len())
            .sum();
        let growth = status("VmHWM").saturating_sub(before) as f64 * 1024.0 / 1e6;
        println!("| {made} | {:.0} | {:.1} | {growth:.1} |", bytes as f64 / 1e6, times[2]);
    }
}
