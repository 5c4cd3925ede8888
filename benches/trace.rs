//! Deduplication across VMs on a generated trace, fingerprints only: what is left after each level, what elections on past
//! days and second sighting find, and the batch with 1, 2 and 4 processes.
//!
//!     cargo bench --bench trace -- levels
//!     cargo bench --bench trace -- batch SCRATCH-FOLDER
//!
//! The trace is not measured anywhere: it is made from a seed, with the parameters that the papers give for their
//! data (see docs/BENCHMARKS.md): 100 VMs of 7 systems, 10 days, 15.7 % of the 2 MiB segments changed a day, of which 14.5 %
//! of the blocks are new to the VM, popularity after levels 1 and 2 as Zipf has it with an exponent of about 0.7.
//! An image has 1/64 of the papers' 40 GB, so that the trace fits into memory.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a bench prints and measures"
)]

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use snapfs::backend::Backend;
use snapfs::backend::local::Local;
use snapfs::clock::SystemClock;
use snapfs::cluster::detect::{Feed, Holder, Setup, Task, run};
use snapfs::cluster::hosts::Hosts;
use snapfs::cluster::job::{Job, partitions_for};
use snapfs::cluster::mesh::Patience;
use snapfs::cluster::record::{Member, WANTED};
use snapfs::error::Result;
use snapfs::fingerprint::{Fingerprint, fingerprint};
use snapfs::popular::index::{IndexBuilder, IndexIdentity, PopularIndex};
use snapfs::units::{Epoch, Incarnation, Serial, SlotId, VmGroup};

const VMS: usize = 100;
const DAYS: usize = 10;
const SYSTEMS: usize = 7;
const SEGMENT: usize = 512;
/// 640 MiB: 1/64 of 40 GB.
const SEGMENTS: usize = 320;
const BLOCKS: usize = SEGMENT * SEGMENTS;
/// Segments changed a day, and new blocks in these.
const DIRTY: f64 = 0.157;
const CHANGED: f64 = 0.145;
/// Exponent of the popularity of files.
const ALPHA: f64 = 0.70;
/// Blocks of a file, on average: runs of popular blocks.
const RUN: u64 = 7;
/// Of what a VM has, or gets on a day: the share that other VMs may have, too.
const SHARED: f64 = 0.74;
/// A pack of the store.
const PACK: usize = 16_384;
/// One block in this many is in the sampled index of second sighting.
const SIGHTING: u64 = 64;
/// Packs that a segment is compared with besides those that its hooks name: the last that matched.
const RECENT: usize = 4;

/// A stream of random numbers that follows from its seed.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// A block is a number; equal numbers are equal blocks.
type Block = u64;

fn block(kind: u64, of: u64, file: u64, at: u64) -> Block {
    mix(mix(mix(kind << 56 | of << 40 | file) ^ 0x5eed) ^ at)
}

fn file_blocks(kind: u64, of: u64, file: u64) -> impl Iterator<Item = Block> {
    let length = 1 + mix(kind ^ mix(of) ^ mix(file)) % (2 * RUN - 1);
    (0..length).map(move |at| block(kind, of, file, at))
}

/// One VM's image, day by day: what each changed segment holds.
struct Vm {
    number: u64,
    image: Vec<Block>,
    rng: Rng,
    own_files: u64,
}

/// Changed segments of a day.
type Day = Vec<(usize, Vec<Block>)>;

impl Vm {
    fn new(number: u64) -> Self {
        Self { number, image: vec![0; BLOCKS], rng: Rng(mix(number) ^ 0xabcd), own_files: 0 }
    }

    /// Data that is new to the VM: files of its own, files of its system, files that all systems have. Files of day
    /// `born` are in the pool of that day; popular ones come first.
    fn fresh(&mut self, blocks: usize, born: u64) -> Vec<Block> {
        let mut out = Vec::with_capacity(blocks + 16);
        // Half of what is shared is of the system, half of all.
        let wanted = (blocks as f64 * SHARED) as usize;
        for (kind, of) in [(1, self.number % SYSTEMS as u64), (2, 0)] {
            let vms = if kind == 1 { VMS as f64 / SYSTEMS as f64 } else { VMS as f64 };
            // A VM takes file i of the pool with probability min(1, (k / i)^alpha): the expected number of VMs that have it
            // is Zipf's. k follows from how much is wanted; the pool ends where less than half a VM would have a file.
            let files = wanted as f64 / 2.0 / RUN as f64;
            let reach = (2.0 * vms).powf(1.0 / ALPHA);
            let k = files / (1.0 + (reach.powf(1.0 - ALPHA) - 1.0) / (1.0 - ALPHA));
            for file in 0..(k * reach) as u64 {
                let chance = (k / (file as f64 + 1.0)).powf(ALPHA);
                if chance >= 1.0 || self.rng.unit() < chance {
                    out.extend(file_blocks(kind, of << 8 | born, file));
                }
            }
        }
        while out.len() < blocks {
            out.extend(file_blocks(3, self.number, self.own_files));
            self.own_files += 1;
        }
        out.truncate(blocks);
        out
    }

    fn day(&mut self, day: usize) -> Day {
        if day == 0 {
            self.image = self.fresh(BLOCKS, 0);
            return self.image.chunks(SEGMENT).map(<[u64]>::to_vec).enumerate().collect();
        }
        let dirty: Vec<usize> = (0..SEGMENTS).filter(|_| self.rng.unit() < DIRTY).collect();
        let count = (dirty.len() as f64 * SEGMENT as f64 * CHANGED) as usize;
        // Updates come to most VMs on the day they appear, to the others a day later.
        let born = if self.rng.unit() < 0.7 { day as u64 } else { day as u64 - 1 };
        let fresh = self.fresh(count, born.max(1));
        let each = count.div_ceil(dirty.len().max(1));
        for (segment, part) in dirty.iter().zip(fresh.chunks(each)) {
            // A run at a place of the segment; the rest moves behind it now and then, which level 2 sees through.
            let at = segment * SEGMENT + self.rng.next() as usize % (SEGMENT - part.len().min(SEGMENT - 1));
            self.image[at..at + part.len()].copy_from_slice(part);
        }
        dirty.iter().map(|s| (*s, self.image[s * SEGMENT..(s + 1) * SEGMENT].to_vec())).collect()
    }
}

/// The blocks of each VM and day that level 2 leaves: new to the VM, with the segment boundaries.
struct Trace {
    /// By day, by VM: for each changed segment, what is new to the VM.
    fresh: Vec<Vec<Vec<Vec<Block>>>>,
    /// Blocks in changed segments, by day.
    after_level_1: Vec<u64>,
}

fn trace() -> Trace {
    let mut fresh: Vec<Vec<Vec<Vec<Block>>>> = (0..DAYS).map(|_| Vec::new()).collect();
    let mut after_level_1 = vec![0; DAYS];
    for number in 0..VMS as u64 {
        let mut vm = Vm::new(number);
        let mut held = HashSet::new();
        for day in 0..DAYS {
            let changed = vm.day(day);
            after_level_1[day] += (changed.len() * SEGMENT) as u64;
            let new = |(_, blocks): (usize, Vec<Block>)| blocks.into_iter().filter(|b| held.insert(*b)).collect();
            fresh[day].push(changed.into_iter().map(new).collect());
        }
    }
    Trace { fresh, after_level_1 }
}

/// How a run stores what level 2 leaves.
#[derive(Clone, Copy)]
struct Scheme {
    /// Of the unique blocks, the share that is elected, in percent; 0 for none.
    sigma: f64,
    /// Elections are made with what is known at the end of each of these days.
    elect_after: &'static [usize],
    /// Elects on all days, the tested ones included: what the papers did.
    oracle: bool,
    promote: bool,
}

#[derive(Default, Clone, Copy)]
struct Outcome {
    /// Stored on the days that are tested.
    stored: u64,
    /// The same when packs were compacted since: other VMs' copies of common blocks are forwards.
    compacted: u64,
    popular: u64,
    sighting: u64,
}

fn elect(popularity: &HashMap<Block, u32>, sigma: f64) -> HashSet<Block> {
    let mut ranked: Vec<(u32, Block)> = popularity.iter().filter(|(_, n)| **n > 1).map(|(b, n)| (*n, *b)).collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.truncate((popularity.len() as f64 * sigma / 100.0) as usize);
    ranked.into_iter().map(|(_, block)| block).collect()
}

fn store(trace: &Trace, scheme: Scheme, tested: std::ops::Range<usize>) -> Outcome {
    let mut popularity: HashMap<Block, u32> = HashMap::new();
    let mut common: HashSet<Block> = HashSet::new();
    let mut elected = 0;
    let mut outcome = Outcome::default();
    if scheme.oracle {
        trace.fresh.iter().flatten().flatten().flatten().for_each(|b| *popularity.entry(*b).or_default() += 1);
        common = elect(&popularity, scheme.sigma);
        elected = common.len();
    }
    // Second sighting: sampled blocks name a pack; packs keep their blocks.
    let mut hooks: HashMap<Block, Vec<u32>> = HashMap::new();
    let mut packs: Vec<(usize, HashSet<Block>)> = Vec::new();
    let mut own: HashMap<Block, u32> = HashMap::new();
    let mut on_test: Vec<Block> = Vec::new();
    // Common blocks are on disk once, when they are first used or were elected.
    let mut written: HashSet<Block> = HashSet::new();
    for (day, vms) in trace.fresh.iter().enumerate() {
        for (vm, segments) in vms.iter().enumerate() {
            let mut open: Option<u32> = None;
            let mut recent: Vec<u32> = Vec::new();
            for segment in segments {
                let left: Vec<Block> = segment.iter().copied().filter(|block| !common.contains(block)).collect();
                let mut seen: Vec<u32> = recent.clone();
                if scheme.promote {
                    let named = left.iter().filter(|b| **b % SIGHTING == 0).filter_map(|b| hooks.get(b)).flatten();
                    seen.extend(named.copied().filter(|pack| packs[*pack as usize].0 != vm));
                    seen.sort_unstable();
                    seen.dedup();
                }
                let mut matched: HashMap<u32, usize> = HashMap::new();
                for block in segment {
                    if !scheme.oracle {
                        *popularity.entry(*block).or_default() += 1;
                    }
                    if common.contains(block) {
                        if written.insert(*block) && tested.contains(&day) {
                            outcome.stored += 1;
                            on_test.push(*block);
                        }
                        continue;
                    }
                    if let Some(pack) = seen.iter().find(|pack| packs[**pack as usize].1.contains(block)) {
                        *matched.entry(*pack).or_default() += 1;
                        common.insert(*block);
                        written.insert(*block);
                        if tested.contains(&day) {
                            outcome.stored += 1;
                            on_test.push(*block);
                        }
                        continue;
                    }
                    let pack = match open.filter(|pack| packs[*pack as usize].1.len() < PACK) {
                        Some(pack) => pack,
                        None => {
                            packs.push((vm, HashSet::new()));
                            packs.len() as u32 - 1
                        }
                    };
                    open = Some(pack);
                    if scheme.promote {
                        packs[pack as usize].1.insert(*block);
                        if block % SIGHTING == 0 {
                            hooks.entry(*block).or_default().push(pack);
                        }
                    }
                    if tested.contains(&day) {
                        outcome.stored += 1;
                        *own.entry(*block).or_default() += 1;
                    }
                }
                let mut best: Vec<(usize, u32)> = matched.into_iter().map(|(pack, count)| (count, pack)).collect();
                best.sort_unstable_by(|a, b| b.cmp(a));
                if !best.is_empty() {
                    recent = best.into_iter().map(|(_, pack)| pack).take(RECENT).collect();
                }
            }
        }
        if scheme.elect_after.contains(&day) && scheme.sigma > 0.0 {
            let chosen = elect(&popularity, scheme.sigma);
            elected = chosen.len();
            // Elected blocks lie in the packs of VMs already: copying them is the election's cost, until packs are compacted.
            written.extend(chosen.iter().copied());
            common.extend(chosen);
        }
    }
    let copies: u64 =
        own.iter().map(|(block, copies)| if common.contains(block) { 0 } else { u64::from(*copies) }).sum();
    // Of what the tested days brought, common blocks count once.
    let shared: HashSet<Block> =
        on_test.into_iter().chain(own.keys().copied().filter(|b| common.contains(b))).collect();
    outcome.compacted = copies + shared.len() as u64;
    outcome.popular = common.len().max(elected) as u64;
    outcome.sighting = hooks.values().map(Vec::len).sum::<usize>() as u64;
    outcome
}

fn percent(part: f64, whole: f64) -> f64 {
    100.0 * part / whole
}

fn rss_mib(what: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// New blocks of a range of days that no VM had before it, and all that level 2 leaves of these days.
fn unique_and_left(trace: &Trace, days: std::ops::Range<usize>) -> (u64, u64) {
    let mut seen: HashSet<Block> = HashSet::new();
    let (mut unique, mut left) = (0, 0);
    for (day, vms) in trace.fresh.iter().enumerate() {
        for block in vms.iter().flatten().flatten() {
            let is_new = seen.insert(*block);
            if days.contains(&day) {
                left += 1;
                unique += u64::from(is_new);
            }
        }
    }
    (unique, left)
}

fn levels() {
    let began = Instant::now();
    let trace = trace();
    let raw = (VMS * BLOCKS) as f64;
    let all = raw * DAYS as f64;
    let level_1: u64 = trace.after_level_1.iter().sum();
    let (unique, left) = unique_and_left(&trace, 0..DAYS);
    println!(
        "trace: {VMS} VMs, {DAYS} days, {:.1} million blocks, made in {:.0} s",
        all / 1e6,
        began.elapsed().as_secs_f64()
    );
    println!("| left, % of raw | trace | papers |\n|---|---|---|");
    println!("| level 1 | {:.2} | 24.14 |", percent(level_1 as f64, all));
    println!("| level 2 | {:.2} | 12.05 |", percent(left as f64, all));
    println!("| perfect | {:.2} | 5.62 |", percent(unique as f64, all));
    let mut popularity: HashMap<Block, u32> = HashMap::new();
    trace.fresh.iter().flatten().flatten().flatten().for_each(|b| *popularity.entry(*b).or_default() += 1);
    let mut counts: Vec<u32> = popularity.values().copied().collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    println!(
        "\n| sigma % | coverage of what level 2 leaves, % | papers, measured | sigma^(1 - 0.70) |\n|---|---|---|---|"
    );
    for (sigma, told) in [(1.0, "18.6 to 23.6"), (2.0, "22.1 to 33.6"), (4.0, "31.4 to 38.8")] {
        let top = (counts.len() as f64 * sigma / 100.0) as usize;
        let covered: u64 = counts[..top].iter().map(|n| u64::from(*n)).sum();
        let model = 100.0 * (sigma / 100.0_f64).powf(1.0 - ALPHA);
        println!("| {sigma} | {:.1} | {told} | {model:.1} |", percent(covered as f64, left as f64));
    }
    drop((popularity, counts));
    let tables: [(&str, std::ops::Range<usize>, &'static [usize]); 2] = [
        ("days 6 to 10, elected once, after day 5", 5..DAYS, &[4]),
        ("all 10 days, elected after days 1 and 8", 0..DAYS, &[0, 7]),
    ];
    for (title, days, elect_after) in tables {
        let (unique, left) = unique_and_left(&trace, days.clone());
        let raw = raw * days.len() as f64;
        let efficiency = |stored: u64| percent(raw - stored as f64, raw - unique as f64);
        println!("\n{title}: local levels alone {:.2} % of perfect", efficiency(left));
        println!(
            "| scheme | sigma % | efficiency inline, % | after compaction, % | of the cross-VM duplicates, % | popular blocks | index MB | sighting MB | raw : memory | papers |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|");
        let mut rows: Vec<(&str, Scheme, &str)> = Vec::new();
        for (sigma, told) in
            [(0.5, ""), (1.0, ""), (2.0, "96.01 (oracle, 118 MB, 85 000 : 1)"), (4.0, "96.58 (oracle, 190 to 220 MB)")]
        {
            let plain = Scheme { sigma, elect_after, oracle: false, promote: false };
            rows.push(("oracle election", Scheme { oracle: true, elect_after: &[], ..plain }, told));
            rows.push(("past-only election", plain, ""));
            rows.push(("past-only, promotion", Scheme { promote: true, ..plain }, ""));
        }
        let nothing = Scheme { sigma: 0.0, elect_after: &[], oracle: false, promote: true };
        rows.push(("promotion alone", nothing, ""));
        rows.push(("past-only, all shared", Scheme { sigma: 100.0, elect_after, oracle: false, promote: false }, ""));
        rows.push((
            "past-only, all shared, promotion",
            Scheme { sigma: 100.0, elect_after, oracle: false, promote: true },
            "",
        ));
        for (name, scheme, told) in rows {
            let outcome = store(&trace, scheme, days.clone());
            let index = outcome.popular as f64 * 8.0 / 1e6;
            let sighting = outcome.sighting as f64 * 16.0 / 1e6;
            let duplicates = percent((left - outcome.compacted) as f64, (left - unique) as f64);
            println!(
                "| {name} | {} | {:.2} | {:.2} | {:.1} | {} | {index:.1} | {sighting:.1} | {:.0} : 1 | {told} |",
                scheme.sigma,
                efficiency(outcome.stored),
                efficiency(outcome.compacted),
                duplicates,
                outcome.popular,
                all * 4096.0 / 1e6 / (index + sighting).max(0.001),
            );
        }
    }
    lookups(&trace);
}

/// The real popular index over all shared blocks: memory and time of the lookups of a changed segment.
fn lookups(trace: &Trace) {
    let print = |block: &Block| fingerprint(&block.to_le_bytes());
    let mut popularity: HashMap<Block, u32> = HashMap::new();
    trace.fresh.iter().flatten().flatten().flatten().for_each(|b| *popularity.entry(*b).or_default() += 1);
    let mut builder = IndexBuilder::default();
    for (n, (block, _)) in popularity.iter().filter(|(_, copies)| **copies > 1).enumerate() {
        let pack = Serial((1 << 47) | (n / PACK) as u64);
        builder.add(VmGroup::default(), &print(block), SlotId::new(pack, (n % PACK) as u16)).unwrap();
    }
    let identity = IndexIdentity { incarnation: Incarnation([1; 16]), epoch: Epoch(1) };
    let index = PopularIndex::decode(&builder.encode(identity).unwrap()).unwrap();
    let segments: Vec<Vec<Fingerprint>> =
        trace.fresh[1].iter().take(20).flatten().map(|segment| segment.iter().map(print).collect()).collect();
    let began = Instant::now();
    let mut found = 0;
    for segment in &segments {
        found += segment.iter().filter(|print| index.candidates(VmGroup::default(), print).next().is_some()).count();
    }
    let each = began.elapsed().as_secs_f64() * 1e6 / segments.len() as f64;
    let mib = index.memory_bytes() as f64 / 1e6;
    println!(
        "\nreal index of all {} shared blocks: {mib:.1} MB; lookups of a changed segment {each:.1} us ({found} found); papers: 5.78 ms",
        index.entries()
    );
}

// ------------------------------------------------------------------------------------------------------------ batch

/// The last day as a batch: all slots of the days before, and what the changed segments of the last day hold.
struct Batch {
    wanted: AtomicU64,
    verdicts: AtomicU64,
}

impl Task for Batch {
    fn members(&self) -> u32 {
        VMS as u32
    }
    fn host_of(&self, member: Member, hosts: usize) -> usize {
        member.0 as usize % hosts
    }
    fn group_of(&self, _: Member) -> u32 {
        0
    }
    fn feed(&self, member: Member, feed: &mut Feed<'_, '_>) -> Result<()> {
        let mut vm = Vm::new(u64::from(member.0));
        let mut held = HashSet::new();
        let mut slot = 0;
        for day in 0..DAYS {
            for (segment, blocks) in vm.day(day) {
                for (at, block) in blocks.iter().enumerate() {
                    let print = fingerprint(&block.to_le_bytes());
                    if day + 1 == DAYS {
                        self.wanted.fetch_add(1, Ordering::Relaxed);
                        feed.give(print, (segment * SEGMENT + at) as u64 | WANTED)?;
                    } else if held.insert(*block) {
                        feed.give(print, slot)?;
                        slot += 1;
                    }
                }
                feed.tick()?;
            }
        }
        Ok(())
    }
    fn row_bytes(&self) -> usize {
        21
    }
    fn judge(&self, _: &Fingerprint, holders: &[Holder], rows: &mut Vec<u8>) {
        for holder in
            holders.iter().filter(|holder| holder.wanted.is_some() && (holders.len() > 1 || holder.slot.is_some()))
        {
            rows.extend([&holder.member.0.to_le_bytes()[..], &[1; 17]].concat());
        }
    }
    fn repeats(&self, member: Member, _: u64, _: u64, rows: &mut Vec<u8>) {
        rows.extend([&member.0.to_le_bytes()[..], &[2; 17]].concat());
    }
    fn member_of(&self, row: &[u8]) -> Option<Member> {
        Some(Member(u32::from_le_bytes(*row.first_chunk()?)))
    }
    fn verdict(&self, _: Member, _: &[u8]) -> Result<()> {
        self.verdicts.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

fn batch_process(folder: &Path, hosts: Option<Hosts>, records: u64) {
    let backend: Arc<dyn Backend> = Arc::new(Local::open(folder).unwrap());
    let id = Job::id_of(&[b"bench", &std::process::id().to_le_bytes()[..0]]);
    let job = Job::open_or_create(&*backend, id, || Ok((partitions_for(records), Vec::new()))).unwrap();
    let index = hosts.as_ref().map_or(0, Hosts::index);
    let setup = Setup {
        backend: Some(backend),
        clock: Arc::new(SystemClock::new()),
        threads: if hosts.is_some() { 1 } else { 2 },
        hosts,
        memory_bytes: 32 << 20,
        scratch: folder.to_owned(),
        patience: Patience::default(),
        progress: Arc::new(|_| {}),
    };
    let task = Arc::new(Batch { wanted: AtomicU64::new(0), verdicts: AtomicU64::new(0) });
    let began = Instant::now();
    let report = run(&setup, &job, task.clone()).unwrap();
    let verdicts = task.verdicts.load(Ordering::Relaxed);
    println!(
        "| {index} | {:.0} | {:.2} | {:.2} | {:.2} | {:.1} | {:.1} | {:.1} |",
        began.elapsed().as_secs_f64(),
        report.records as f64 / 1e6,
        task.wanted.load(Ordering::Relaxed) as f64 / 1e6,
        verdicts as f64 / 1e6,
        report.spilled_bytes as f64 / 1e6,
        report.bytes_sent as f64 / 1e6,
        rss_mib("VmHWM:"),
    );
}

fn batch(folder: &Path) {
    const RECORDS: u64 = 22_000_000;
    if let Ok(order) = std::env::var("SNAPFS_BENCH_HOST") {
        let (index, hosts) = order.split_once('\n').unwrap();
        batch_process(folder, Some(Hosts::parse(hosts, index.parse().unwrap()).unwrap()), RECORDS);
        return;
    }
    println!(
        "| process | s | million records | of these wanted | verdicts, million | spilled MB | sent MB | largest resident MiB |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for processes in [1_usize, 2, 4] {
        let scratch = tempfile::tempdir_in(folder).unwrap();
        if processes == 1 {
            // A process of its own: its memory is not this one's.
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["batch-alone", scratch.path().to_str().unwrap()])
                .status();
            assert!(status.unwrap().success());
            continue;
        }
        let hosts: String = (0..processes).map(|n| format!("127.66.6.{processes}:{}\n", 7100 + n)).collect();
        let children: Vec<_> = (0..processes)
            .map(|index| {
                Command::new(std::env::current_exe().unwrap())
                    .args(["batch", scratch.path().to_str().unwrap()])
                    .env("SNAPFS_BENCH_HOST", format!("{index}\n{hosts}"))
                    .spawn()
                    .unwrap()
            })
            .collect();
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
    }
    stage_model();
}

/// The papers' model of the stages, with their constants, for 100 machines; and with what this program sends.
fn stage_model() {
    println!("\n| stage model, 100 machines of 25 VMs of 40 GB | hours | papers |\n|---|---|---|");
    let (s, v, c) = (40e9, 25.0, 4096.0);
    for (name, u, e, rescan) in [
        ("papers' constants (u 40, e 48, two scans)", 40.0, 48.0, true),
        ("this program (u 44, e 21; a second scan of what is new only)", 44.0, 21.0, false),
    ] {
        let (d1, d2, d3, b, beta) = (0.78, 0.5, 0.01, 50e6, 1e-6);
        let (a_n, m_n) = (0.0005, 25e6);
        let r = s * v * (1.0 - d1) / c;
        let n = 262_144_000.0;
        let scan = r * c / b + a_n * u * r / m_n + r * u / b;
        let detect = r * u / b + n * e / b + r * beta + r * e / b;
        let back = r * (1.0 - d2) * e / b + a_n * e * r * (1.0 - d2) / m_n + r * (1.0 - d2) * e / b;
        let write = if rescan { r * c / b } else { r * (1.0 - d2) * c / b } + r * (1.0 - d2) * e / b;
        let update = r * (1.0 - d2) * e / b * 2.0 + r * ((1.0 - d2) + d3) * e / b * 2.0 + r * d3 * beta;
        let last = r * d2 * e / b * 2.0 + a_n * e * r * d2 / m_n;
        let hours = (scan + detect + back + write + update + last) / 3600.0;
        let told = if rescan { "3.12 (measured)" } else { "" };
        println!("| {name} | {hours:.2} | {told} |");
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["levels"] => levels(),
        ["batch", folder] => batch(Path::new(folder)),
        ["batch-alone", folder] => batch_process(Path::new(folder), None, 22_000_000),
        _ => println!("trace: cargo bench --bench trace -- levels, or: -- batch SCRATCH-FOLDER"),
    }
}
