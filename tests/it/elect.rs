//! The election on the dataflow: it counts what an oracle counts, with any number of partitions and threads, in little
//! memory; two processes publish what one would; one that is killed at any stage is named by the other, leaves nothing
//! half-published, and the next election ends as if it had not been; what it leaves is in nobody's way.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use snapfs::backend::Key;
use snapfs::catalog::record::Op;
use snapfs::check::{CheckOptions, check_store};
use snapfs::clock::SystemClock;
use snapfs::cluster::detect;
use snapfs::cluster::hosts::Hosts;
use snapfs::cluster::job::Job;
use snapfs::cluster::mesh::Patience;
use snapfs::collect::common::collect_common;
use snapfs::collect::gc::{GcOptions, collect_vm};
use snapfs::elect::count::{Count, CountOptions, Counted};
use snapfs::elect::members::{Member, describe};
use snapfs::elect::run::{ElectOptions, ElectReport, Elected, Progress, census, elect, popular_now};
use snapfs::error::Result;
use snapfs::fingerprint::{Fingerprint, fingerprint};
use snapfs::limits::MEMORY_BYTES_MIN;
use snapfs::name::VmName;
use snapfs::popular::choice::Choice;
use snapfs::popular::index::{IndexIdentity, PopularIndex};
use snapfs::store::common::{common_state, group_of};
use snapfs::store::{MemoryShares, Store};
use snapfs::units::{Epoch, VmGroup};

use crate::peers::{self, Order, addresses, killed, outcome};
use crate::popular::elected;
use crate::whole::SNAPFS;
use crate::world::{Rng, World, get, noise, put};

const BLOCK: usize = 4096;
const FULL: CheckOptions = CheckOptions { read_data: true, sample_percent: None, repair: false };

/// A block that compresses well: this number, again and again.
fn block(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK / 8)
}

fn print_of(number: u64) -> Fingerprint {
    fingerprint(&block(number))
}

/// Who has which blocks: by group, VM, numbers.
type Held = BTreeMap<(&'static str, String), BTreeSet<u64>>;

/// VMs of two groups, whose blocks are drawn at random so that low numbers are popular; several snapshots, zeros too.
fn draw(rng: &mut Rng, world: &World, vms: u64, blocks: u64) -> Held {
    let mut held = Held::new();
    for vm in 0..vms {
        let (group, vm) = (if vm % 3 == 2 { "b" } else { "" }, format!("vm{vm}"));
        set_group(&world.store(), &vm, group);
        for snapshot in 0..1 + rng.below(2) {
            let numbers: Vec<u64> = (0..blocks).map(|_| rng.below(40) * rng.below(40)).collect();
            // The block of number 0 is zeros, and is held by nobody.
            let image: Vec<u8> = numbers.iter().flat_map(|number| block(*number)).collect();
            put(&world.store(), &format!("{vm}/{snapshot}.img"), &image).unwrap();
            held.entry((group, vm.clone())).or_default().extend(numbers.into_iter().filter(|n| *n > 0));
        }
    }
    held
}

fn set_group(store: &Store, vm: &str, group: &str) {
    let handle = store.vm_or_create(&VmName::new(vm).unwrap()).unwrap();
    handle.append(None, |_| Ok((vec![Op::Group { name: group.to_owned() }], ()))).unwrap();
}

/// How many VMs hold each block, by group and number.
fn oracle(held: &Held) -> BTreeMap<(VmGroup, Fingerprint), u32> {
    let mut popularity = BTreeMap::new();
    for ((group, _), numbers) in held {
        numbers.iter().for_each(|n| *popularity.entry((group_of(group), print_of(*n))).or_insert(0) += 1);
    }
    popularity
}

fn histogram(popularity: &BTreeMap<(VmGroup, Fingerprint), u32>) -> BTreeMap<u32, u64> {
    let mut blocks = BTreeMap::new();
    popularity.values().for_each(|popularity| *blocks.entry(*popularity).or_insert(0) += 1);
    blocks
}

/// Counts with so many partitions, threads and bytes; the bytes of spill files too.
fn counted(world: &World, partitions: u32, threads: usize, memory_bytes: usize) -> (Counted, u64) {
    let store = Arc::new(world.store());
    let election = describe(&store).unwrap();
    let options = CountOptions { threads, memory_bytes, ..CountOptions::default() };
    let setup = options.setup(&store, Arc::new(|_| {})).unwrap();
    let id = Job::id_of(&[b"test", &partitions.to_le_bytes(), &election.id.0]);
    let job = Job::open_or_create(&**store.backend(), id, || Ok((partitions, Vec::new()))).unwrap();
    let count = Count::new(&store, &election.description, 2, Choice::new(1 << 20));
    let report = count.run(&setup, &job).unwrap();
    let first = count.take();
    // Once more: from the results that are there.
    let count = Count::new(&store, &election.description, 2, Choice::new(1 << 20));
    let again = count.run(&setup, &job).unwrap();
    assert_eq!((again.records, again.partitions, again.partitions_before), (0, 0, u64::from(partitions)));
    let second = count.take();
    assert_eq!(second.census, first.census);
    let (chosen, counts) = first.choice.finish();
    assert_eq!(second.choice.finish(), (chosen.clone(), counts));
    job.remove(&**store.backend()).unwrap();
    let mut choice = Choice::new(chosen.len());
    chosen.into_iter().for_each(|chosen| choice.offer(2, chosen));
    (Counted { census: first.census, choice }, report.spilled_bytes)
}

fn assert_counted(world: &World, held: &Held, counted: Counted, what: &str) {
    let want = oracle(held);
    assert_eq!(counted.census.blocks, histogram(&want), "{what}");
    let store = world.store();
    let members = describe(&store).unwrap().description.members;
    let mut found = BTreeSet::new();
    for chosen in counted.choice.finish().0 {
        let row = &members[chosen.donor as usize];
        let donor = Member::open(&store, row).unwrap().unwrap();
        let page = donor.packs.page_of(chosen.slot).unwrap().unwrap();
        let print = page.fingerprint_of(chosen.slot.slot()).unwrap();
        let holds = |(group, numbers): &(VmGroup, &BTreeSet<u64>)| {
            *group == row.group && numbers.iter().any(|n| print_of(*n) == print)
        };
        let first = held.iter().filter(|(key, n)| holds(&(group_of(key.0), n))).map(|((_, vm), _)| vm).next();
        assert_eq!(first, Some(&row.vm), "{what}: the first VM of a group gives");
        assert!(found.insert((row.group, print)), "{what}: twice");
    }
    let shared: BTreeSet<_> = want.iter().filter(|(_, n)| **n > 1).map(|(key, _)| *key).collect();
    assert_eq!(found, shared, "{what}");
}

#[test]
fn it_counts_what_the_oracle_counts() {
    for seed in 1..=8 {
        let mut rng = Rng(seed);
        let world = World::new();
        let held = draw(&mut rng, &world, 1 + seed % 7, 300);
        for (partitions, threads) in [(1, 1), (7, 2), (40, 3)] {
            let (counted, _) = counted(&world, partitions, threads, 1 << 20);
            assert_counted(&world, &held, counted, &format!("seed {seed}, {partitions} partitions"));
        }
        // What is common, in part forwards and in part not, counts as before.
        let report = elected(&world);
        let popularity = oracle(&held);
        let shared = popularity.values().filter(|n| **n > 1).count() as u64;
        assert_eq!((report.blocks_popular, report.blocks_lost), (shared, 0), "seed {seed}: {report:?}");
        if let Some(vm) = world.store().vm_names().unwrap().first() {
            collect_vm(&world.store(), vm, GcOptions::default(), &mut |_| {}).unwrap();
        }
        let (after, _) = counted(&world, 3, 2, 1 << 20);
        assert_eq!(after.census.blocks, histogram(&popularity), "seed {seed}");
        assert!(after.choice.finish().0.iter().all(|chosen| chosen.slot.pack().is_common()), "seed {seed}");
        let again = elected(&world);
        assert_eq!((again.blocks_kept, again.blocks_copied), (shared, 0), "seed {seed}: {again:?}");
    }
}

#[test]
fn more_records_than_memory_go_through_scratch_files() {
    let world = World::new();
    let mut held = Held::new();
    for vm in 0..4_u64 {
        let numbers: Vec<u64> = (1..=12_000).map(|n| n * 4 + if n % 2 == 0 { 0 } else { vm }).collect();
        let image: Vec<u8> = numbers.iter().flat_map(|number| block(*number)).collect();
        put(&world.store(), &format!("vm{vm}/1.img"), &image).unwrap();
        held.insert(("", format!("vm{vm}")), numbers.into_iter().collect());
    }
    // 2 MB of records in one partition; an eighth of a MiB is sorted at a time.
    let (all, spilled) = counted(&world, 1, 4, 1 << 20);
    assert!(spilled > 2_000_000, "{spilled}");
    assert_eq!(all.census.blocks, histogram(&oracle(&held)));
    assert_eq!(all.choice.finish().0.len(), 6000);
}

#[test]
fn showing_the_census_writes_nothing_to_the_store() {
    let world = World::new();
    let held = draw(&mut Rng(5), &world, 4, 200);
    let before = world.memory.objects();
    let found = census(&Arc::new(world.store()), &CountOptions::default(), Arc::new(|_| {})).unwrap();
    assert_eq!(found.blocks, histogram(&oracle(&held)));
    assert!(world.memory.objects() == before);
}

#[test]
fn a_vm_that_changed_its_group_takes_no_block_of_the_old_one_along() {
    let world = World::new();
    let image: Vec<u8> = (1..=600).flat_map(block).collect();
    for vm in ["a1", "a2", "moves"] {
        set_group(&world.store(), vm, "a");
        put(&world.store(), &format!("{vm}/1.img"), &image).unwrap();
    }
    assert_eq!(elected(&world).blocks_copied, 600);
    collect_vm(&world.store(), &VmName::new("moves").unwrap(), GcOptions::default(), &mut |_| {}).unwrap();
    set_group(&world.store(), "moves", "b");
    set_group(&world.store(), "b1", "b");
    put(&world.store(), "b1/1.img", &image).unwrap();
    // Both groups have it twice: one has it in common packs, the other gets its own.
    let report = elected(&world);
    assert_eq!((report.blocks_kept, report.blocks_copied, report.blocks_popular), (600, 600, 1200), "{report:?}");
    let again = elected(&world);
    assert_eq!((again.blocks_kept, again.blocks_copied), (1200, 0), "{again:?}");
    for vm in ["a1", "a2", "moves", "b1"] {
        assert!(get(&world.store(), &format!("{vm}/1.img")).unwrap() == image, "{vm}");
    }
    assert!(check_store(&world.store(), FULL, &mut |_| {}).unwrap().findings.is_empty());
}

// ------------------------------------------------------------------------------------------------- several processes

struct Place(tempfile::TempDir);

fn open(folder: &Path) -> Arc<Store> {
    let shares = MemoryShares::of(MEMORY_BYTES_MIN).unwrap();
    Arc::new(Store::open(&folder.join("store"), Arc::new(SystemClock::new()), shares).unwrap())
}

impl Place {
    /// A store with five VMs of two groups that share 5 and 6 MiB.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Store::init(&folder.path().join("store"), &SystemClock::new()).unwrap();
        let place = Self(folder);
        for vm in 0..5_u64 {
            let is_b = vm > 2;
            set_group(&place.store(), &format!("vm{vm}"), if is_b { "b" } else { "" });
            put(&place.store(), &format!("vm{vm}/1.img"), &place.image(vm)).unwrap();
        }
        place
    }

    fn image(&self, vm: u64) -> Vec<u8> {
        let common = if vm > 2 { noise(2, 1536 * BLOCK) } else { noise(1, 1280 * BLOCK) };
        [&common[..700 * BLOCK], &noise(100 + vm, 200 * BLOCK), &common[700 * BLOCK..]].concat()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn store(&self) -> Arc<Store> {
        open(self.0.path())
    }

    /// Another place with the same store.
    fn copied(&self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let copy = Command::new("cp").args(["-a"]).arg(self.path("store")).arg(folder.path()).status().unwrap();
        assert!(copy.success());
        Self(folder)
    }

    /// All objects of common packs and popular indexes.
    fn common(&self) -> BTreeMap<String, Vec<u8>> {
        let store = self.store();
        let mut objects = BTreeMap::new();
        for folder in ["common/packs", "common/popular"] {
            for row in store.backend().list(&Key::new(folder)).unwrap() {
                let key = Key::new(format!("{folder}/{}", row.name));
                objects.insert(key.to_string(), store.backend().read_all(&key, 1 << 30).unwrap());
            }
        }
        objects
    }

    fn jobs(&self) -> Vec<Job> {
        Job::all(&**self.store().backend()).unwrap()
    }

    /// What the popular index must lead to, and nothing more.
    fn assert_elected(&self, what: &str) {
        let store = self.store();
        let state = common_state(store.common_home()).unwrap().unwrap();
        let identity = IndexIdentity { incarnation: state.incarnation, epoch: Epoch(state.popular.index) };
        let index = PopularIndex::read(&**store.backend(), identity, usize::MAX).unwrap();
        assert_eq!(index.entries(), 1280 + 1536, "{what}");
        let packs = store.packs(store.common_home());
        for (group, seed, blocks) in [("", 1, 1280), ("b", 2, 1536)] {
            for block in noise(seed, blocks * BLOCK).chunks(BLOCK) {
                let print = fingerprint(block);
                let mut read = vec![0; BLOCK];
                let slots: Vec<_> = index.candidates(group_of(group), &print).collect();
                let is_there = slots.iter().any(|slot| packs.read_blocks(*slot, &mut read).is_ok() && read == block);
                assert!(is_there, "{what}");
            }
        }
        let report = check_store(&store, FULL, &mut |_| {}).unwrap();
        assert!(report.findings.is_empty(), "{what}: {:?}", report.findings);
        assert!(self.jobs().is_empty(), "{what}: the job is over");
    }

    /// Blocks in common packs, after everything that nobody needs was collected.
    fn common_blocks(&self) -> u64 {
        let store = self.store();
        let options = GcOptions { exact: true, dry_run: false };
        for _ in 0..2 {
            for vm in store.vm_names().unwrap() {
                collect_vm(&store, &vm, options, &mut |_| {}).unwrap();
            }
            collect_common(&store, options, &mut |_| {}).unwrap();
        }
        let state = common_state(store.common_home()).unwrap().unwrap();
        state.packs.values().map(|pack| u64::from(pack.slots)).sum()
    }

    fn write_hosts(&self, hosts: &[String]) {
        std::fs::write(self.path("hosts"), hosts.join("\n")).unwrap();
    }

    fn snapfs(&self, words: &[&str]) -> Child {
        let (out, err) = (Stdio::piped(), Stdio::piped());
        Command::new(SNAPFS).args(words).current_dir(self.0.path()).stdout(out).stderr(err).spawn().unwrap()
    }
}

fn ended(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    out.into_owned()
}

#[test]
fn two_processes_of_the_binary_publish_what_one_does() {
    let alone = Place::new();
    // Otherwise each would make another common home.
    let store = alone.store();
    store.common_home().create(store.new_folder()).unwrap();
    drop(store);
    let both = alone.copied();
    let told: serde_json::Value =
        serde_json::from_str(&ended(alone.snapfs(&["popular", "store", "elect", "--json"]))).unwrap();
    assert_eq!((told["blocks_copied"].as_u64(), told["epoch"].as_u64()), (Some(2816), Some(1)), "{told}");
    alone.assert_elected("alone");
    both.write_hosts(&addresses(2));
    let start = |index: &str, more: &[&str]| {
        both.snapfs(&[&["popular", "store", "elect", "--hosts", "hosts", "--index", index], more].concat())
    };
    // Whoever is first waits for the other.
    let (second, first) = (start("1", &[]), start("0", &["--json"]));
    let mut found: serde_json::Value = serde_json::from_str(&ended(first)).unwrap();
    let words = ended(second);
    assert!(words.starts_with("host 1: read 2 VMs") || words.starts_with("host 1: read 3 VMs"), "{words}");
    assert!(found["bytes_received"].as_u64() > Some(0) && found["records"].as_u64() < told["records"].as_u64());
    for own in ["records", "spilled_bytes", "bytes_sent", "bytes_received"] {
        found[own] = told[own].clone();
    }
    assert_eq!(found, told);
    both.assert_elected("both");
    assert!(both.common() == alone.common(), "packs and index are the same, byte by byte");
    // Arguments that do not go together.
    let refused = both.snapfs(&["popular", "store", "show", "--hosts", "hosts", "--index", "0"]);
    let refused = refused.wait_with_output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--hosts goes with elect only"));
}

const STAGES: [&str; 4] = ["scan", "detect", "copy", "late copy"];

/// Not killed, but stopped.
const STUCK: &str = "stuck";

/// With little patience for those who are silent.
const HASTY: &str = "hasty";

fn stage(progress: &Progress, seen: &AtomicUsize) -> &'static str {
    match progress {
        Progress::Counting(detect::Progress::Scan(..)) => "scan",
        Progress::Counting(detect::Progress::Detect(..)) => "detect",
        // The blocks of the first group are brought when those of the second are copied.
        Progress::Copying(done, _) if *done > 1280 => "late copy",
        Progress::Copying(..) if seen.fetch_add(1, Ordering::SeqCst) == 0 => "copy",
        _ => "other",
    }
}

fn options(hosts: Option<Hosts>) -> ElectOptions {
    let patience = Patience { start: Duration::from_secs(3600), silence: Duration::from_secs(3600) };
    let count = CountOptions { hosts, memory_bytes: 4 << 20, patience, ..CountOptions::default() };
    ElectOptions { count, ..ElectOptions::default() }
}

/// What a process of an election does; as a test of its own it has no order and does nothing.
#[test]
fn process_of_an_election() {
    let Some(order) = Order::of_this_process() else { return };
    let (end, seen) = (order.end.clone(), AtomicUsize::new(0));
    let tell = move |progress: Progress| match stage(&progress, &seen) {
        "scan" if end == STUCK => peers::signal_myself(Signal::STOP),
        stage if end == stage => peers::signal_myself(Signal::KILL),
        _ => {}
    };
    let mut options = options(Some(order.hosts.clone()));
    if order.end == HASTY {
        options.count.patience.silence = Duration::from_secs(3);
    }
    order.tell(elect(&open(&order.folder), &options, Arc::new(tell)));
}

fn start(place: &Place, index: usize, end: &str, hosts: &[String]) -> Child {
    peers::start("elect::process_of_an_election", place.0.path(), index, end, hosts)
}

fn run_both(place: &Place, hosts: &[String]) -> String {
    [1, 0].map(|index| start(place, index, "", hosts)).into_iter().for_each(peers::ended);
    let (first, second) = (outcome(place.0.path(), 0), outcome(place.0.path(), 1));
    assert!(first.starts_with("ok Chosen") && second.starts_with("ok Fed"), "{first}\n{second}");
    first
}

#[test]
fn a_killed_process_is_named_and_the_next_election_ends_as_if_nothing_had_been() {
    let whole = Place::new();
    for end in STAGES {
        let place = whole.copied();
        let hosts = addresses(2);
        // So few records make one partition, which the first host has; all of them read.
        let victim = usize::from(end == "scan");
        let [ends, goes_on] =
            [victim, 1 - victim].map(|index| start(&place, index, if index == victim { end } else { "" }, &hosts));
        killed(ends, end);
        peers::ended(goes_on);
        let told = outcome(place.0.path(), 1 - victim);
        if matches!(end, "scan" | "detect") {
            let named = told.contains(&format!("host {victim} (")) && told.starts_with("Unavailable");
            assert!(named, "{end}: {told}");
        } else {
            assert!(told.starts_with("ok Fed"), "{end}: the other had nothing more to do: {told}");
        }
        assert_eq!(popular_now(&place.store()).unwrap().blocks_popular, 0, "{end}: nothing is published");
        assert_eq!(place.jobs().len(), 1, "{end}: what was found out is kept");
        let report = check_store(&place.store(), FULL, &mut |_| {}).unwrap();
        assert!(report.findings.is_empty(), "{end}: {:?}", report.findings);
        let told = run_both(&place, &hosts);
        let goes_on = matches!(end, "detect" | "copy");
        assert_eq!(told.contains("records: 0,"), goes_on, "{end}: {told}");
        // What was brought is not copied again.
        let (kept, copied) = if end == "late copy" { (1280, 1536) } else { (0, 2816) };
        assert!(told.contains(&format!("blocks_kept: {kept}, blocks_copied: {copied},")), "{end}: {told}");
        place.assert_elected(end);
        assert_eq!(place.common_blocks(), 2816, "{end}");
    }
}

#[test]
fn a_stuck_process_is_named_and_nothing_is_published() {
    let place = Place::new();
    let hosts = addresses(2);
    let mut stuck = start(&place, 1, STUCK, &hosts);
    peers::ended(start(&place, 0, HASTY, &hosts));
    stuck.kill().unwrap();
    stuck.wait().unwrap();
    let told = outcome(place.0.path(), 0);
    assert!(told.contains(&format!("host 1 ({}) is stuck", hosts[1])), "{told}");
    assert_eq!(popular_now(&place.store()).unwrap().epoch, 0);
    run_both(&place, &hosts);
    place.assert_elected("with both awake");
}

#[test]
fn what_an_election_left_goes_with_the_next_one_of_a_changed_store() {
    let place = Place::new();
    let hosts = addresses(2);
    let children = [0, 1].map(|index| start(&place, index, if index == 0 { "detect" } else { "" }, &hosts));
    for child in children {
        child.wait_with_output().unwrap();
    }
    let left = place.jobs();
    assert_eq!(left.len(), 1);
    // Jobs that are none of an election stay.
    let store = place.store();
    let other = Job::open_or_create(&**store.backend(), Job::id_of(&[b"x"]), || Ok((1, b"body".to_vec()))).unwrap();
    // Another life of the store: the blocks of one VM are not the same any more.
    put(&store, "vm0/2.img", &noise(77, 64 * BLOCK)).unwrap();
    let report = run(&place, &options(None)).unwrap();
    assert_eq!((report.blocks_popular, report.records > 0), (2816, true), "{report:?}");
    // The first election of a store has nothing to hold others back by, and so cleans up at the next one at the latest.
    run(&place, &options(None)).unwrap();
    assert_eq!(place.jobs(), std::slice::from_ref(&other));
    other.remove(&**store.backend()).unwrap();
    place.assert_elected("after all");
}

fn run(place: &Place, options: &ElectOptions) -> Result<ElectReport> {
    match elect(&place.store(), options, Arc::new(|_| {}))? {
        Elected::Chosen(report) => Ok(report),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_host_that_does_not_come_is_named_and_nothing_happens() {
    let place = Place::new();
    let addresses = addresses(2);
    let hosts = Some(Hosts::parse(&addresses.join("\n"), 0).unwrap());
    let mut options = options(hosts);
    options.count.patience.start = Duration::from_secs(1);
    let error = run(&place, &options).unwrap_err();
    assert!(error.to_string().contains(&format!("host 1 ({})", addresses[1])), "{error}");
    assert_eq!(popular_now(&place.store()).unwrap().epoch, 0);
    run(&place, &self::options(None)).unwrap();
    place.assert_elected("alone then");
    assert_eq!(get(&place.store(), "vm0/1.img").unwrap(), place.image(0));
}
