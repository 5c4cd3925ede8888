//! The synchronous batch: exact deduplication within and between VMs, on one host and on several; a source that changes
//! is read again as a whole; a process that is killed at any stage leaves nothing half, and the job goes on.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use snapfs::batch::run::{BatchOptions, BatchProgress, BatchReport, batch};
use snapfs::catalog::state::VmState;
use snapfs::clock::SystemClock;
use snapfs::cluster::detect::Progress;
use snapfs::cluster::mesh::Patience;
use snapfs::error::{Error, ErrorKind, Result};
use snapfs::limits::MEMORY_BYTES_MIN;
use snapfs::name::VmName;
use snapfs::pack::Content;
use snapfs::store::common::common_state;
use snapfs::store::{MemoryShares, Store};

use crate::peers::{self, Order, addresses, outcome};
use crate::world::{get, noise};

const BLOCK: usize = 4096;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Store::init(&folder.path().join("store"), &SystemClock::new()).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    fn store(&self) -> Arc<Store> {
        open(self.0.path())
    }

    /// Blocks in data packs, of VMs and common ones.
    fn stored(&self) -> u64 {
        let store = self.store();
        let slots = |state: &VmState| -> u64 {
            state.packs.values().filter(|p| p.content == Content::Data).map(|p| u64::from(p.slots)).sum()
        };
        let vms = store.vm_names().unwrap();
        let vms: u64 = vms.iter().filter_map(|vm| store.vm(vm).ok()).map(|(_, state)| slots(&state)).sum();
        vms + common_state(store.common_home()).unwrap().map_or(0, |state| slots(&state))
    }

    /// Objects of jobs that are not done.
    fn job_objects(&self) -> usize {
        let Ok(jobs) = std::fs::read_dir(self.path("store/derived/jobs")) else { return 0 };
        jobs.map(|job| std::fs::read_dir(job.unwrap().path()).unwrap().count()).sum()
    }

    fn snapshots(&self) -> Vec<String> {
        let store = self.store();
        let mut names = Vec::new();
        for vm in store.vm_names().unwrap() {
            let Ok((_, state)) = store.vm(&vm) else { continue };
            names.extend(state.files.values().map(|file| format!("{vm}/{}", file.path())));
        }
        names.sort();
        names
    }
}

fn open(folder: &Path) -> Arc<Store> {
    let shares = MemoryShares::of(MEMORY_BYTES_MIN).unwrap();
    Arc::new(Store::open(&folder.join("store"), Arc::new(SystemClock::new()), shares).unwrap())
}

fn options(scratch: &Path) -> BatchOptions {
    BatchOptions {
        hosts: None,
        threads: 2,
        rounds: 1,
        memory_bytes: 4 << 20,
        scratch: scratch.to_owned(),
        patience: Patience { start: Duration::from_secs(3600), silence: Duration::from_secs(3600) },
    }
}

fn run(place: &Place, jobs: &str, options: &BatchOptions) -> Result<BatchReport> {
    batch(&place.store(), jobs.as_bytes(), options, Arc::new(|_| {}))
}

fn distinct(images: &[Vec<u8>]) -> u64 {
    let blocks = images.iter().flat_map(|image| image.chunks(BLOCK));
    blocks.filter(|block| block.iter().any(|b| *b != 0)).collect::<HashSet<_>>().len() as u64
}

/// Images of VMs: a part that all have at other offsets, one that half of them has, repetitions, holes, own data.
fn family(vms: usize) -> Vec<Vec<u8>> {
    let base = noise(1, 5 << 20);
    let half = noise(2, 3 << 20);
    let image = |vm: usize| {
        let own = noise(100 + vm as u64, (1 << 20) + vm * 5 * BLOCK);
        let mut image = [&base[..2 << 20], &own, &base[2 << 20..], &vec![0; 3 << 20], &own[..200 * BLOCK]].concat();
        if vm.is_multiple_of(2) {
            image.extend_from_slice(&half);
        }
        image.extend(vec![7; 200 * BLOCK]);
        image.resize(image.len().next_multiple_of(BLOCK), 0);
        image
    };
    (0..vms).map(image).collect()
}

fn assert_restored(place: &Place, images: &[(String, &[u8])]) {
    let store = place.store();
    for (name, image) in images {
        assert!(get(&store, name).unwrap() == *image, "{name} is not what was taken up");
    }
}

#[test]
fn every_distinct_block_is_stored_once() {
    let place = Place::new();
    let images = family(5);
    let mut jobs = String::new();
    for (vm, image) in images.iter().enumerate() {
        jobs += &format!("vm{vm}/1.img\t{}\n", place.write(&format!("vm{vm}"), image).display());
    }
    let report = run(&place, &jobs, &options(place.0.path())).unwrap();
    assert_eq!(place.stored(), distinct(&images));
    assert!(report.blocks_shared >= (8 << 20) / BLOCK as u64, "{report:?}");
    let named: Vec<_> = images.iter().enumerate().map(|(vm, image)| (format!("vm{vm}/1.img"), &image[..])).collect();
    assert_restored(&place, &named);
    assert_eq!(place.snapshots(), named.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
    assert_eq!(place.job_objects(), 0);

    // The next day: something new for all, something new for one, blocks that moved.
    let news = noise(50, 1 << 20);
    let mut jobs = String::new();
    let mut next = Vec::new();
    for (vm, image) in images.iter().enumerate() {
        let mut image = image.clone();
        image[3 << 20..4 << 20].copy_from_slice(&news);
        image.rotate_right((vm % 2) * 9 * BLOCK);
        jobs += &format!("vm{vm}/2.img\t{}\n", place.write(&format!("vm{vm}"), &image).display());
        next.push(image);
    }
    run(&place, &jobs, &options(place.0.path())).unwrap();
    let all: Vec<Vec<u8>> = images.iter().chain(&next).cloned().collect();
    assert_eq!(place.stored(), distinct(&all));
    let named: Vec<_> = next.iter().enumerate().map(|(vm, image)| (format!("vm{vm}/2.img"), &image[..])).collect();
    assert_restored(&place, &named);
}

#[test]
fn a_vm_has_all_its_disks_or_none_and_rounds_change_nothing() {
    let place = Place::new();
    let images = family(4);
    let names = ["a/root/1.img", "a/data/1.img", "b/1.img", "c/1.img"];
    let mut jobs = String::new();
    for (name, image) in names.iter().zip(&images) {
        jobs += &format!("{name}\t{}\n", place.write(&name.replace('/', "-"), image).display());
    }
    let report = run(&place, &jobs, &BatchOptions { rounds: 2, ..options(place.0.path()) }).unwrap();
    let rounds: Vec<_> = report.vms.iter().map(|vm| (vm.vm.as_str(), vm.round)).collect();
    assert_eq!(rounds, [("a", 1), ("b", 2), ("c", 2)]);
    let named: Vec<_> = names.iter().zip(&images).map(|(name, image)| ((*name).to_owned(), &image[..])).collect();
    assert_restored(&place, &named);
    // One record has both disks of a.
    let (vm, state) = place.store().vm(&VmName::new("a").unwrap()).unwrap();
    assert_eq!((vm.name(), state.files.len()), ("a", 2));
}

#[test]
fn a_source_that_changes_is_never_mixed() {
    let place = Place::new();
    let images = family(2);
    let jobs: String = (0..2)
        .map(|vm| format!("vm{vm}/1.img\t{}\n", place.write(&format!("vm{vm}"), &images[vm]).display()))
        .collect();
    let changed: Vec<u8> = noise(77, images[0].len());
    let (path, bytes) = (place.path("vm0"), changed.clone());
    let once = AtomicBool::new(false);
    let change = move |progress: BatchProgress| {
        if matches!(progress, BatchProgress::Share(_)) && !once.swap(true, Ordering::SeqCst) {
            std::fs::write(&path, &bytes).unwrap();
        }
    };
    batch(&place.store(), jobs.as_bytes(), &options(place.0.path()), Arc::new(change)).unwrap();
    assert_restored(&place, &[("vm0/1.img".into(), &changed), ("vm1/1.img".into(), &images[1])]);
}

#[test]
fn a_change_map_spares_reading_and_is_not_believed() {
    let place = Place::new();
    let mut image = family(1).remove(0);
    let source = place.write("vm", &image);
    run(&place, &format!("vm/1.img\t{}\n", source.display()), &options(place.0.path())).unwrap();
    image[2 << 20..3 << 20].copy_from_slice(&noise(60, 1 << 20));
    place.write("vm", &image);
    let map = |start: usize| format!("[{{\"start\": {start}, \"length\": {}, \"data\": true}}]", 1 << 20);
    let wrong = place.write("wrong", map(8 << 20).as_bytes());
    let line = |n: u32, map: &Path| format!("vm/{n}.img\t{}\t0\t{}\n", source.display(), map.display());
    let error = run(&place, &line(2, &wrong), &options(place.0.path())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert_eq!(place.snapshots(), ["vm/1.img"]);
    let right = place.write("right", map(2 << 20).as_bytes());
    run(&place, &line(3, &right), &options(place.0.path())).unwrap();
    assert_restored(&place, &[("vm/3.img".into(), &image)]);
}

#[test]
fn bad_jobs_leave_nothing() {
    let place = Place::new();
    let source = place.write("source", &noise(3, 1 << 20));
    run(&place, &format!("vm/there.img\t{}\n", source.display()), &options(place.0.path())).unwrap();
    let source = source.display();
    for (jobs, kind, words) in [
        (format!("vm/new.img\t{source}\nvm/more.img\t{source}-not\n"), ErrorKind::NotFound, "vm/more.img"),
        (format!("vm/new.img\t{source}\nvm/there.img\t{source}\n"), ErrorKind::Exists, "vm/there.img exists already"),
        (format!("vm/new.img\t{source}\nvm/new.img\t{source}\n"), ErrorKind::Invalid, "line 2"),
        (format!("vm/new.img\t{source}\nvm/sub.img\t{}\n", place.0.path().display()), ErrorKind::Invalid, "a folder"),
        ("garbage\n".to_owned(), ErrorKind::Invalid, "line 1"),
    ] {
        let error: Error = run(&place, &jobs, &options(place.0.path())).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(words) && !error.to_string().contains('\n'), "{error}");
        assert_eq!(place.snapshots(), ["vm/there.img"]);
        assert_eq!(place.job_objects(), 0);
    }
}

// ------------------------------------------------------------------------------------------------- several processes

const STAGES: [&str; 6] = ["scan", "detect", "share", "link", "write", "end"];

/// Which stage a report is of.
fn stage(progress: &BatchProgress) -> Option<&'static str> {
    match progress {
        BatchProgress::Job("detect", Progress::Scan(..)) => Some("scan"),
        BatchProgress::Job("detect", Progress::Detect(..)) => Some("detect"),
        BatchProgress::Share(_) => Some("share"),
        BatchProgress::Job("link", Progress::Detect(..)) => Some("link"),
        BatchProgress::Write(_) => Some("write"),
        BatchProgress::Job("end", Progress::Detect(..)) => Some("end"),
        BatchProgress::Job(..) => None,
    }
}

/// What a process of a batch does; as a test of its own it has no order and does nothing.
#[test]
fn process_of_a_batch() {
    let Some(order) = Order::of_this_process() else { return };
    let jobs = std::fs::read(order.folder.join("jobs")).unwrap();
    let (end, seen) = (order.end.clone(), AtomicBool::new(false));
    let tell = move |progress: BatchProgress| {
        // The second image that is scanned; of the other stages a process may have a single report.
        if stage(&progress) == Some(&end) && (end != "scan" || seen.swap(true, Ordering::SeqCst)) {
            peers::signal_myself(Signal::KILL);
        }
    };
    let options = BatchOptions { hosts: Some(order.hosts.clone()), ..options(&order.folder) };
    order.tell(batch(&open(&order.folder), &jobs, &options, Arc::new(tell)));
}

fn start(place: &Place, index: usize, end: &str, hosts: &[String]) -> Child {
    peers::start("batch::process_of_a_batch", place.0.path(), index, end, hosts)
}

fn run_all(place: &Place, hosts: &[String]) {
    let children: Vec<_> = (0..hosts.len()).map(|index| start(place, index, "", hosts)).collect();
    for (index, child) in children.into_iter().enumerate() {
        peers::ended(child);
        let told = outcome(place.0.path(), index);
        assert!(told.starts_with("ok "), "{told}");
    }
}

#[test]
fn a_killed_process_is_made_good_by_starting_again() {
    let images = family(6);
    let distinct = distinct(&images);
    for end in STAGES {
        let place = Place::new();
        let hosts = addresses(3);
        let mut jobs = String::new();
        for (vm, image) in images.iter().enumerate() {
            jobs += &format!("vm{vm}/1.img\t{}\n", place.write(&format!("vm{vm}"), image).display());
        }
        place.write("jobs", jobs.as_bytes());
        // So few records make one partition, which the first host has; all hosts scan, share and write.
        let killed = usize::from(!matches!(end, "detect" | "link" | "end"));
        // Those who wait for a host that is gone before it connects are told by the patience of the next pass: here the
        // survivors are ended as their users would.
        let mut children: Vec<_> =
            (0..3).map(|index| start(&place, index, if index == killed { end } else { "" }, &hosts)).collect();
        assert!(!children[killed].wait().unwrap().success(), "{end}: it did not die");
        for index in (0..3).filter(|index| *index != killed) {
            let survivor = &mut children[index];
            if matches!(end, "scan" | "detect" | "link") {
                assert!(survivor.wait().unwrap().success(), "{end}: no orderly end");
                let told = outcome(place.0.path(), index);
                let named = told.contains(&format!("host {killed} (")) && told.starts_with("Unavailable");
                assert!(named, "{end}, {index}: {told}");
            } else {
                survivor.kill().unwrap();
                survivor.wait().unwrap();
            }
        }
        for name in place.snapshots() {
            let vm: usize = name[2..3].parse().unwrap();
            assert_restored(&place, &[(name, &images[vm])]);
        }
        run_all(&place, &hosts);
        let named: Vec<_> =
            images.iter().enumerate().map(|(vm, image)| (format!("vm{vm}/1.img"), &image[..])).collect();
        assert_restored(&place, &named);
        assert_eq!(place.snapshots(), named.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
        let stored = place.stored();
        assert_eq!(stored, distinct, "killed at {end}");
    }
}

#[test]
fn two_hosts_store_what_one_would() {
    let images = family(5);
    let place = Place::new();
    let mut jobs = String::new();
    for (vm, image) in images.iter().enumerate() {
        jobs += &format!("vm{vm}/1.img\t{}\n", place.write(&format!("vm{vm}"), image).display());
    }
    place.write("jobs", jobs.as_bytes());
    run_all(&place, &addresses(2));
    assert_eq!(place.stored(), distinct(&images));
    let named: Vec<_> = images.iter().enumerate().map(|(vm, image)| (format!("vm{vm}/1.img"), &image[..])).collect();
    assert_restored(&place, &named);
}
