//! Deletion against the papers: what it costs to find out what a deleted snapshot leaves dead, in four ways, on one
//! real store.
//!
//!     cargo bench --bench deletion -- [VMS] [MIB] [FOLDER]
//!
//! History: VMS virtual machines (4) with images of MIB MiB (1024), ten snapshots each, of which each changes 2.5 % of
//! the blocks of the one before (a tenth of the segments, a quarter of their blocks). Then of the first VM nine snapshots
//! are deleted, the oldest first. Before each deletion every scheme runs in a process of its own, with empty caches, on
//! the same objects, through a backend that counts:
//!
//! a. exact mark-and-sweep over all VMs: the recipes of all live snapshots, a mark for each block;
//! b. the same within the VM;
//! c. the papers' approximate deletion: one Bloom filter of z = 10 U bits a snapshot (7 hash functions), written when the
//!    snapshot is; the filters of the VM's other snapshots are OR-ed, and of the deleted one's references those that are
//!    absent are dead. What is kept wrongly is a leak; at 5 % of U it is repaired by (b);
//! d. ours: the bitmaps of the distinct group pages. Then the deletion is really done: forget, gc.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    missing_docs,
    reason = "a bench prints and measures"
)]

mod shared;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use roaring::RoaringTreemap;
use snapfs::backend::local::Local;
use snapfs::backend::{Backend, Guard, Key, Listed, Upload};
use snapfs::catalog::roots::read_root;
use snapfs::catalog::state::{FileEntry, VmState};
use snapfs::catalog::vm::Vm;
use snapfs::clock::SystemClock;
use snapfs::collect::forget::forget;
use snapfs::collect::gc::{GcOptions, collect_vm};
use snapfs::collect::grace::Grace;
use snapfs::collect::plan::Plan;
use snapfs::error::Result;
use snapfs::image::tree::{read_group, read_recipe};
use snapfs::ingest::backup::{BackupOptions, backup};
use snapfs::ingest::source::Source;
use snapfs::name::{SnapshotName, VmName};
use snapfs::store::session::PopularView;
use snapfs::store::{MemoryShares, Store};

use shared::{mix, status};

const SNAPSHOTS: u64 = 10;
const BLOCK: usize = 4096;
const SEGMENT_BLOCKS: u64 = 512;
const HASHES: u64 = 7;
/// Bits of a filter for each of the U references.
const BITS: u64 = 10;
/// The leak at which it is repaired.
const TAU: f64 = 0.05;

/// Counts what is read.
#[derive(Debug)]
struct Counting {
    inner: Local,
    bytes: AtomicU64,
    calls: AtomicU64,
}

impl Counting {
    fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Relaxed);
        self.calls.fetch_add(1, Relaxed);
    }
}

impl Backend for Counting {
    fn create(&self, key: &Key) -> Result<Box<dyn Upload>> {
        self.inner.create(key)
    }
    fn read(&self, key: &Key, offset: u64, out: &mut [u8]) -> Result<()> {
        self.add(out.len());
        self.inner.read(key, offset, out)
    }
    fn read_all(&self, key: &Key, bytes_max: u64) -> Result<Vec<u8>> {
        let bytes = self.inner.read_all(key, bytes_max)?;
        self.add(bytes.len());
        Ok(bytes)
    }
    fn len(&self, key: &Key) -> Result<u64> {
        self.inner.len(key)
    }
    fn ages(&self, keys: &[Key]) -> Result<Vec<Option<Duration>>> {
        self.inner.ages(keys)
    }
    fn list(&self, prefix: &Key) -> Result<Vec<Listed>> {
        self.inner.list(prefix)
    }
    fn delete(&self, key: &Key) -> Result<()> {
        self.inner.delete(key)
    }
    fn pin(&self, key: &Key) -> Result<Box<dyn Guard>> {
        self.inner.pin(key)
    }
    fn is_pinned(&self, key: &Key) -> Result<bool> {
        self.inner.is_pinned(key)
    }
    fn try_lock(&self, key: &Key) -> Result<Option<Box<dyn Guard>>> {
        self.inner.try_lock(key)
    }
}

fn open(folder: &Path) -> (Arc<Counting>, Store) {
    let inner = Local::open(folder).unwrap();
    let counting = Arc::new(Counting { inner, bytes: AtomicU64::new(0), calls: AtomicU64::new(0) });
    // The least memory, so that a cache hides little.
    let shares = MemoryShares::of(128 << 20).unwrap();
    let store = Store::with_backend(counting.clone(), None, Arc::new(SystemClock::new()), shares).unwrap();
    (counting, store)
}

/// The content of each block of an image after so many days, as a number.
fn contents(vm: u64, blocks: u64, day: u64) -> Vec<u64> {
    let mut ids: Vec<u64> = (0..blocks).map(|at| mix(vm << 48 | at)).collect();
    for today in 1..=day {
        for segment in 0..blocks / SEGMENT_BLOCKS {
            if !mix(vm << 50 | today << 32 | segment).is_multiple_of(10) {
                continue;
            }
            for at in segment * SEGMENT_BLOCKS..(segment + 1) * SEGMENT_BLOCKS {
                let chance = mix(today << 56 | vm << 48 | at);
                if chance.is_multiple_of(4) {
                    ids[at as usize] = chance;
                }
            }
        }
    }
    ids
}

/// Bytes of blocks, a quarter of each noise: they compress 3 to 4 times.
struct Image {
    ids: Vec<u64>,
    at: usize,
    block: Vec<u8>,
}

impl std::io::Read for Image {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.block.is_empty() {
            let Some(id) = self.ids.get(self.at) else { return Ok(0) };
            self.at += 1;
            self.block.resize(BLOCK, 0);
            blake3::Hasher::new().update(&id.to_le_bytes()).finalize_xof().fill(&mut self.block[..BLOCK / 4]);
        }
        let count = out.len().min(self.block.len());
        out[..count].copy_from_slice(&self.block[..count]);
        self.block.drain(..count);
        Ok(count)
    }
}

fn name(vm: u64, day: u64) -> SnapshotName {
    SnapshotName::parse(&format!("vm{vm}/{day}.img")).unwrap()
}

/// The slots that a snapshot's recipes refer to, and how many references there are. Pages and recipes seen before are
/// not read again.
fn mark(
    store: &Store,
    vm: &Arc<Vm>,
    state: &VmState,
    file: &FileEntry,
    seen: &mut HashSet<u64>,
    mut each: impl FnMut(u64),
) {
    let packs = store.packs(vm);
    let root = read_root(&**store.backend(), vm.name(), state.incarnation, file.root).unwrap();
    for group in &root.groups {
        if !seen.insert(group.page.slot.0) {
            continue;
        }
        let page = read_group(&packs, &group.page).unwrap();
        for place in page.recipes.iter().flatten().filter(|place| seen.insert(place.slot.0)) {
            let recipe = read_recipe(&packs, place).unwrap();
            for extent in &recipe.extents {
                (extent.first_slot.0..extent.first_slot.0 + u64::from(extent.blocks)).for_each(&mut each);
            }
        }
    }
}

/// The papers' summary vector.
struct Bloom(Vec<u8>);

impl Bloom {
    fn new(bits: u64) -> Self {
        Self(vec![0; bits.div_ceil(8) as usize])
    }
    fn bits(&self, slot: u64) -> impl Iterator<Item = (usize, u8)> + use<> {
        let bits = self.0.len() as u64 * 8;
        let (one, two) = (mix(slot), mix(slot ^ 0x5bd1_e995) | 1);
        (0..HASHES).map(move |k| {
            let bit = one.wrapping_add(two.wrapping_mul(k)) % bits;
            ((bit / 8) as usize, 1 << (bit % 8))
        })
    }
    fn insert(&mut self, slot: u64) {
        for (at, mask) in self.bits(slot) {
            self.0[at] |= mask;
        }
    }
    fn contains(&self, slot: u64) -> bool {
        self.bits(slot).all(|(at, mask)| self.0[at] & mask != 0)
    }
}

fn filter_path(folder: &Path, vm: u64, day: u64) -> PathBuf {
    folder.join(format!("filters/{vm}-{day}"))
}

/// The program's text that is touched first is resident memory too, and the same for all schemes: so the heap counts.
#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// Highest growth of resident memory and of the heap since it began, in KiB.
struct Memory {
    resident: u64,
    heap: usize,
}

impl Memory {
    fn begin() -> Self {
        HEAP.reset_peak_usage();
        Self { resident: status("VmRSS"), heap: HEAP.current_usage() }
    }

    fn growth(&self) -> (u64, u64) {
        let heap = HEAP.peak_usage().saturating_sub(self.heap) as u64 / 1024;
        (status("VmHWM").saturating_sub(self.resident), heap)
    }
}

/// What a scheme cost, and what it found.
#[derive(Debug, Default, Clone, Copy)]
struct Cost {
    seconds: f64,
    bytes: u64,
    calls: u64,
    /// Highest growth of resident memory.
    resident_kib: u64,
    /// Highest growth of the heap.
    heap_kib: u64,
    /// Dead blocks found.
    dead: u64,
    /// Dead blocks not found.
    leaked: u64,
}

/// Runs one scheme in this process: `scheme folder vms day`.
fn child(words: &[String]) {
    let (folder, vms, day) = (Path::new(&words[1]), words[2].parse().unwrap(), words[3].parse().unwrap());
    let (counting, store) = open(&folder.join("store"));
    let vm_name = VmName::new("vm0").unwrap();
    let gone = name(0, day);
    let base = Memory::begin();
    let began = Instant::now();
    let mut extra = 0;
    let (mut dead, mut leaked) = (0, 0);
    let is_gone = |file: &FileEntry| file.name == gone.file.as_str();
    match words[0].as_str() {
        "a" | "b" => {
            let mut live = RoaringTreemap::new();
            for vm in 0..if words[0] == "a" { vms } else { 1 } {
                let (vm_handle, state) = store.vm(&VmName::new(format!("vm{vm}").as_str()).unwrap()).unwrap();
                let mut seen = HashSet::new();
                let mut ids = Vec::new();
                for file in state.files.values().filter(|f| vm > 0 || !is_gone(f)) {
                    mark(&store, &vm_handle, &state, file, &mut seen, |slot| ids.push(slot));
                }
                // Marks are kept as the papers do: sorted numbers, each once.
                ids.sort_unstable();
                ids.dedup();
                if vm == 0 {
                    live.extend(ids.iter().copied());
                }
                std::hint::black_box(&ids);
            }
            let (vm, state) = store.vm(&vm_name).unwrap();
            let mut of_gone = RoaringTreemap::new();
            let file = state.files.values().find(|f| is_gone(f)).unwrap();
            mark(&store, &vm, &state, file, &mut HashSet::new(), |slot| _ = of_gone.insert(slot));
            dead = (of_gone - live).len();
        }
        "c" => {
            let mut vector: Option<Bloom> = None;
            let (vm, state) = store.vm(&vm_name).unwrap();
            for other in (day + 1)..SNAPSHOTS {
                let filter = std::fs::read(filter_path(folder, 0, other)).unwrap();
                extra += filter.len() as u64;
                match &mut vector {
                    None => vector = Some(Bloom(filter)),
                    Some(vector) => vector.0.iter_mut().zip(&filter).for_each(|(all, more)| *all |= more),
                }
            }
            let vector = vector.unwrap();
            let file = state.files.values().find(|f| is_gone(f)).unwrap();
            mark(&store, &vm, &state, file, &mut HashSet::new(), |slot| dead += u64::from(!vector.contains(slot)));
        }
        "d" => {
            // What a collection does to find out, on the state as it is after the forget record.
            let (vm, state) = store.vm(&vm_name).unwrap();
            let mut after = (*state).clone();
            after.files.retain(|_, file| !is_gone(file));
            let plan = Plan::make(&vm, &store.packs(&vm), &after, false, &PopularView::now(&store), &Grace::default())
                .unwrap();
            let took = (began.elapsed().as_secs_f64(), counting.bytes.load(Relaxed), counting.calls.load(Relaxed));
            let (resident, heap) = base.growth();
            let live = plan.only.as_ref().expect("one part").live.clone();
            // Not part of it: what the recipes say, to see what the bitmaps miss.
            let mut exact = RoaringTreemap::new();
            let mut seen = HashSet::new();
            for file in after.files.values() {
                mark(&store, &vm, &state, file, &mut seen, |slot| _ = exact.insert(slot));
            }
            let file = state.files.values().find(|f| is_gone(f)).unwrap();
            let mut of_gone = RoaringTreemap::new();
            mark(&store, &vm, &state, file, &mut HashSet::new(), |slot| _ = of_gone.insert(slot));
            let truly = (&of_gone - &exact).len();
            let found = (&of_gone - &live).len();
            assert!(found <= truly, "a live block was taken for dead");
            println!("{} {} {} {resident} {heap} {found} {}", took.0, took.1, took.2, truly - found);
            return;
        }
        // The whole of it: forget and gc, compaction included.
        "gc" => {
            forget(&store, &[gone]).unwrap();
            let report = collect_vm(&store, &vm_name, GcOptions::default(), &mut |_| {}).unwrap();
            dead = report.bytes_reclaimed;
            leaked = report.bytes_reclaimable_left;
        }
        other => panic!("{other}"),
    }
    let seconds = began.elapsed().as_secs_f64();
    let (resident, heap) = base.growth();
    let (bytes, calls) = (counting.bytes.load(Relaxed) + extra, counting.calls.load(Relaxed));
    println!("{seconds} {bytes} {calls} {resident} {heap} {dead} {leaked}");
}

fn run(scheme: &str, folder: &Path, vms: u64, day: u64) -> Cost {
    let program = std::env::current_exe().unwrap();
    let words = ["--child", scheme, folder.to_str().unwrap(), &vms.to_string(), &day.to_string()];
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let row: Vec<f64> = text.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let [seconds, bytes, calls, resident, heap, dead, leaked] = row[..] else { panic!("{text}") };
    Cost {
        seconds,
        bytes: bytes as u64,
        calls: calls as u64,
        resident_kib: resident as u64,
        heap_kib: heap as u64,
        dead: dead as u64,
        leaked: leaked as u64,
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    if words.first().is_some_and(|word| word == "--child") {
        return child(&words[1..]);
    }
    let number = |at: usize, default: u64| words.get(at).map_or(default, |word| word.parse().unwrap());
    let (vms, blocks) = (number(0, 4), number(1, 1024) << 8);
    let outer = words.get(2).map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(outer).unwrap();
    let folder = folder.path();
    Store::init(&folder.join("store"), &SystemClock::new()).unwrap();
    std::fs::create_dir(folder.join("filters")).unwrap();
    let (u, change) = (blocks, blocks / 40);
    let total = u + (SNAPSHOTS - 1) * change;
    for day in 0..SNAPSHOTS {
        for vm in 0..vms {
            let store =
                Store::open(&folder.join("store"), Arc::new(SystemClock::new()), MemoryShares::default()).unwrap();
            let image = Image { ids: contents(vm, blocks, day), at: 0, block: Vec::new() };
            let source = Source::stream("made", image);
            backup(&store, &name(vm, day), source, BackupOptions::default(), &|_| {}).unwrap();
            if vm == 0 {
                let (handle, state) = store.vm(&VmName::new("vm0").unwrap()).unwrap();
                let file = state.files.values().find(|f| f.name == format!("{day}.img")).unwrap();
                let mut filter = Bloom::new(BITS * total);
                mark(&store, &handle, &state, file, &mut HashSet::new(), |slot| filter.insert(slot));
                std::fs::write(filter_path(folder, vm, day), &filter.0).unwrap();
            }
        }
    }
    println!("{vms} VMs, {SNAPSHOTS} snapshots each, {u} blocks an image, 2.5 % change; U = {total}");
    println!(
        "| deletion | scheme | seconds | read, bytes | reads | heap, KiB | resident, KiB | dead blocks found | leaked |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let schemes = ["a", "b", "c", "d"];
    let mut sums = [Cost::default(); 4];
    let (mut leak, mut repairs) = (0, 0);
    for day in 0..SNAPSHOTS - 1 {
        let mut truth = 0;
        for (at, scheme) in schemes.iter().enumerate() {
            let mut cost = run(scheme, folder, vms, day);
            match *scheme {
                "a" => truth = cost.dead,
                "b" => assert_eq!(cost.dead, truth, "a VM's blocks are its own"),
                "c" => {
                    assert!(cost.dead <= truth, "a live block was taken for dead");
                    cost.leaked = truth - cost.dead;
                    leak += cost.leaked;
                    if leak as f64 > TAU * total as f64 {
                        (repairs, leak) = (repairs + 1, 0);
                    }
                }
                _ => assert_eq!(cost.dead + cost.leaked, truth),
            }
            println!(
                "| {} | {scheme} | {:.4} | {} | {} | {} | {} | {} | {} |",
                day + 1,
                cost.seconds,
                cost.bytes,
                cost.calls,
                cost.heap_kib,
                cost.resident_kib,
                cost.dead,
                cost.leaked
            );
            let sum = &mut sums[at];
            sum.seconds += cost.seconds;
            sum.bytes += cost.bytes;
            sum.calls += cost.calls;
            sum.heap_kib = sum.heap_kib.max(cost.heap_kib);
            sum.resident_kib = sum.resident_kib.max(cost.resident_kib);
            sum.dead += cost.dead;
            sum.leaked += cost.leaked;
        }
        let whole = run("gc", folder, vms, day);
        println!(
            "| {} | forget + gc | {:.3} | {} | {} | {} | {} | {} bytes freed | {} bytes left for later |",
            day + 1,
            whole.seconds,
            whole.bytes,
            whole.calls,
            whole.heap_kib,
            whole.resident_kib,
            whole.dead,
            whole.leaked
        );
    }
    println!(
        "\n| scheme, nine deletions | seconds | read, MB | heap, MB (highest) | resident, MB (highest) | leaked, % of U |"
    );
    println!("|---|---|---|---|---|---|");
    for (scheme, sum) in schemes.iter().zip(&sums) {
        println!(
            "| {scheme} | {:.3} | {:.2} | {:.2} | {:.1} | {:.3} |",
            sum.seconds,
            sum.bytes as f64 / 1e6,
            sum.heap_kib as f64 * 1024.0 / 1e6,
            sum.resident_kib as f64 * 1024.0 / 1e6,
            sum.leaked as f64 * 100.0 / total as f64
        );
    }
    println!("repairs of (c): {repairs}; a filter has {} bytes", BITS * total / 8);
    let [_, _, c, d] = sums;
    assert_eq!(d.leaked, 0, "ours leaks");
    println!(
        "(d) against (c): {:.2} of the bytes read, {:.2} of the heap ({:.2} of the resident memory), {:.2} of the time",
        d.bytes as f64 / c.bytes as f64,
        d.heap_kib as f64 / c.heap_kib as f64,
        d.resident_kib as f64 / c.resident_kib as f64,
        d.seconds / c.seconds
    );
}
