//! Levels: what each leaves of the trace, beside the papers' figures.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::Instant;

use snapfs::limits::PROMOTED_SLOTS_MAX;
use snapfs::popular::choice::{CHOSEN_BYTES, Census, Choice, Chosen};
use snapfs::units::SlotId;

use crate::make::{BLOCKS, Block, DAYS, VMS, Vm};
use crate::model::{Limits, Outcome, Scheme, WEEKLY, run};
use crate::percent;

/// What a terabyte (10^12 bytes) of distinct blocks may take.
const MEMORY: f64 = 64.0 * 1048576.0;

/// What level 2 leaves.
pub struct Trace {
    /// By day, by VM: for each changed segment, what is new to the VM.
    pub fresh: Vec<Vec<Vec<Vec<Block>>>>,
    /// Blocks in changed segments.
    after_level_1: u64,
}

fn trace() -> Trace {
    let mut fresh: Vec<Vec<Vec<Vec<Block>>>> = (0..DAYS).map(|_| Vec::new()).collect();
    let mut after_level_1 = 0;
    for number in 0..VMS as u64 {
        let mut vm = Vm::new(number, VMS);
        let mut held = HashSet::new();
        for (day, fresh) in fresh.iter_mut().enumerate() {
            let changed = vm.day(day);
            after_level_1 += changed.iter().map(|(_, blocks)| blocks.len() as u64).sum::<u64>();
            let new = |(_, blocks): (usize, Vec<Block>)| blocks.into_iter().filter(|b| held.insert(*b)).collect();
            fresh.push(changed.into_iter().map(new).collect());
        }
    }
    Trace { fresh, after_level_1 }
}

impl Trace {
    /// What a VM is left to store up to a day, in order.
    fn of_vm(&self, vm: usize, days: usize) -> impl Iterator<Item = Block> + '_ {
        self.fresh.iter().take(days).flat_map(move |vms| vms[vm].iter().flatten().copied())
    }

    /// The election of the program over what these VMs hold after so many days: the blocks chosen, in donor order.
    pub fn elect(&self, vms: usize, days: usize, room: usize) -> Vec<Block> {
        let mut popularity: HashMap<Block, (u32, u32, u32)> = HashMap::new();
        for vm in 0..vms {
            for (at, block) in self.of_vm(vm, days).enumerate() {
                popularity.entry(block).or_insert((0, vm as u32, at as u32)).0 += 1;
            }
        }
        let mut choice = Choice::new(room);
        for (count, donor, at) in popularity.values() {
            choice.offer(*count, Chosen { donor: *donor, slot: SlotId(u64::from(*at)) });
        }
        drop(popularity);
        let (chosen, _) = choice.finish();
        let mut chosen = chosen.into_iter().peekable();
        let mut out = Vec::with_capacity(chosen.len());
        for vm in 0..vms {
            for (at, block) in self.of_vm(vm, days).enumerate() {
                if chosen.next_if(|next| next.donor == vm as u32 && next.slot.0 == at as u64).is_some() {
                    out.push(block);
                }
            }
        }
        assert!(chosen.next().is_none());
        out
    }

    fn census(&self) -> Census {
        let mut popularity: HashMap<Block, u32> = HashMap::new();
        self.fresh.iter().flatten().flatten().flatten().for_each(|b| *popularity.entry(*b).or_default() += 1);
        let mut census = Census::default();
        popularity.values().for_each(|count| census.add(*count, 1));
        census
    }

    /// Blocks after the first days that no VM had before, and all that level 2 leaves of these days.
    fn unique_and_left(&self, from: usize) -> (u64, u64) {
        let mut seen: HashSet<Block> = HashSet::new();
        let (mut unique, mut left) = (0, 0);
        for (day, vms) in self.fresh.iter().enumerate() {
            for block in vms.iter().flatten().flatten() {
                let is_new = seen.insert(*block);
                if day >= from {
                    left += 1;
                    unique += u64::from(is_new);
                }
            }
        }
        (unique, left)
    }

    /// How many blocks follow each other, on average, that are in the most popular 2 % of all.
    fn hit_run(&self, distinct: u64) -> f64 {
        let popular: HashSet<Block> = self.elect(VMS, DAYS, distinct as usize / 50).into_iter().collect();
        let (mut hits, mut runs) = (0_u64, 0_u64);
        for segment in self.fresh.iter().flatten().flatten() {
            let mut is_in_run = false;
            for block in segment {
                let hit = popular.contains(block);
                hits += u64::from(hit);
                runs += u64::from(hit && !is_in_run);
                is_in_run = hit;
            }
        }
        hits as f64 / runs as f64
    }
}

/// Prints all tables, of all schemes or of those whose names contain a word.
pub fn levels(word: &str) {
    let began = Instant::now();
    let trace = trace();
    let raw = (VMS * BLOCKS * DAYS) as f64;
    let (unique, left) = trace.unique_and_left(0);
    println!("trace: {VMS} VMs, {DAYS} days, {:.1} million blocks, {unique} distinct", raw / 1e6);
    statistics(&trace, raw, unique, left);
    let (unique_later, left_later) = trace.unique_and_left(1);
    // Of everything that has an absolute limit in the program, the share of a store of this size in one of a terabyte.
    let scale = unique as f64 * 4096.0 / 1e12;
    let limits = |bytes: f64| Limits {
        // As the program shares it out: three quarters for the popular index.
        popular_bytes: (bytes * scale * 0.75) as usize,
        promoted_bytes: (bytes * scale / 6.0) as usize,
        sighting_bytes: (bytes * scale / 12.0) as usize,
        promoted_slots: (PROMOTED_SLOTS_MAX as f64 * scale) as u64,
    };
    let room = (MEMORY * scale) as usize / CHOSEN_BYTES as usize;
    let sigma = |percent: f64| (unique as f64 * percent / 100.0) as usize;
    let plain = Scheme { room: 0, oracle: false, promote: false, elect_after: WEEKLY, limits: Limits::NONE };
    let mut rows: Vec<(String, Scheme, &str)> = Vec::new();
    for (percent, told) in [(0.5, "-"), (1.0, "-"), (2.0, "96.0 to 96.3; 118 MB"), (4.0, "96.6 to 96.9; 190 to 220 MB")]
    {
        let scheme = Scheme { room: sigma(percent), oracle: true, ..plain };
        rows.push((format!("papers': sigma {percent} %, elected on the days tested"), scheme, told));
    }
    for percent in [0.5, 1.0, 2.0, 4.0] {
        rows.push((format!("sigma {percent} %, past only"), Scheme { room: sigma(percent), ..plain }, ""));
    }
    let ours = Scheme { promote: true, limits: limits(MEMORY), ..plain };
    rows.push(("promotion alone".to_owned(), ours, ""));
    for times in [1, 2, 4, 8] {
        let name = format!("ours: elect --max-memory {}M", 64 * times);
        rows.push((name, Scheme { room: room * times, ..ours }, ""));
    }
    rows.push(("ours: all shared blocks elected".to_owned(), Scheme { room: usize::MAX, ..ours }, ""));
    let fewer = Scheme { room: room * 4, limits: limits(MEMORY / 2.0), ..ours };
    rows.push(("elect --max-memory 256M, 32 MiB resident".to_owned(), fewer, ""));
    let all = Scheme { room: usize::MAX, limits: Limits::NONE, ..ours };
    rows.push(("all shared blocks, no limit of memory".to_owned(), all, ""));

    rows.retain(|row| row.0.contains(word));
    let names: Vec<String> = rows.iter().map(|row| row.0.clone()).collect();
    let outcomes = in_pairs(&rows.iter().map(|row| row.1).collect::<Vec<_>>(), &|scheme| run(&trace, *scheme));
    let raw_later = raw / DAYS as f64 * (DAYS - 1) as f64;
    let all = |stored: u64| percent(raw - stored as f64, raw - unique as f64);
    let later = |stored: u64| percent(raw_later - stored as f64, raw_later - unique_later as f64);
    let found = |stored: u64, left: u64, unique: u64| percent(left as f64 - stored as f64, (left - unique) as f64);
    println!(
        "\nlevel 2 alone: {:.2} % of perfect over all days (papers 93.0), {:.2} % on days 2 to 10. Elected after days 1 and 8.",
        all(left),
        later(left_later)
    );
    println!(
        "| scheme | all days: before collection | after | of the duplicates between VMs, % | left, % of raw | days 2 to 10: before | after | of the duplicates, % | papers |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for ((name, outcome), (.., told)) in names.iter().zip(&outcomes).zip(&rows) {
        let Outcome { inline, collected, inline_later, collected_later, .. } = *outcome;
        print!(
            "| {name} | {:.2} | {:.2} | {:.1} | {:.2} |",
            all(inline),
            all(collected),
            found(collected, left, unique),
            percent(collected as f64, raw),
        );
        if told.is_empty() {
            print!(
                " {:.2} | {:.2} | {:.1} |",
                later(inline_later),
                later(collected_later),
                found(collected_later, left_later, unique_later),
            );
        } else {
            print!(" - | - | - |");
        }
        println!(" {told} |");
    }
    println!(
        "\n| scheme | popular blocks | in memory, one of | index KiB | promoted KiB | sightings KiB | for 1 TB, MiB | raw : memory | us a changed segment | ms a session |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for (name, outcome) in names.iter().zip(&outcomes) {
        let kib = |bytes: usize| bytes as f64 / 1024.0;
        let bytes = (outcome.index_bytes + outcome.promoted_bytes + outcome.sighting_bytes) as f64;
        println!(
            "| {name} | {} | {} | {:.0} | {:.0} | {:.0} | {:.1} | {:.0} : 1 | {:.0} | {:.1} |",
            outcome.popular,
            outcome.sampling,
            kib(outcome.index_bytes),
            kib(outcome.promoted_bytes),
            kib(outcome.sighting_bytes),
            bytes / scale / 1048576.0,
            raw * 4096.0 / bytes.max(1.0),
            outcome.segment_us,
            outcome.session_ms,
        );
    }
    newcomers(&trace, scale);
    println!("\n{:.0} s in all", began.elapsed().as_secs_f64());
}

fn statistics(trace: &Trace, raw: f64, unique: u64, left: u64) {
    let census = trace.census();
    assert_eq!((census.distinct(), census.held()), (unique, left));
    println!("\n| of the trace | it has | papers |\n|---|---|---|");
    println!("| left after level 1, % of raw | {:.2} | 24.14 |", percent(trace.after_level_1 as f64, raw));
    println!("| after level 2 | {:.2} | 12.05 |", percent(left as f64, raw));
    println!("| perfect | {:.2} | 5.62 |", percent(unique as f64, raw));
    println!("| Zipf exponent, fitted | {:.2} | 0.65 to 0.70 |", census.zipf_alpha().unwrap());
    println!("| run of popular blocks (sigma 2 %) | {:.1} | below 7 |", trace.hit_run(unique));
    println!(
        "\n| sigma % | coverage, % | papers, measured | sigma^(1 - fitted) | sigma^0.30 | of the duplicates, % |\n|---|---|---|---|---|---|"
    );
    let told = ["", "18.6 to 23.6", "22.1 to 33.6, 28.6", "31.4 to 38.8"];
    for (point, told) in census.curve(&[0.5, 1.0, 2.0, 4.0]).iter().zip(told) {
        println!(
            "| {:.1} | {:.1} | {told} | {:.1} | {:.1} | {:.1} |",
            point.sigma_percent,
            point.coverage_percent,
            point.predicted_percent.unwrap(),
            100.0 * (point.sigma_percent / 100.0_f64).powf(0.30),
            point.duplicates_percent,
        );
    }
    println!(
        "shared by two VMs or more: {:.1} % of the distinct blocks",
        percent(census.shared() as f64, unique as f64)
    );
}

/// The second half of the VMs comes when an election over the first half is done: what the papers tried once.
fn newcomers(trace: &Trace, scale: f64) {
    let half = VMS / 2;
    let old: HashSet<Block> = (0..half).flat_map(|vm| trace.of_vm(vm, 1)).collect();
    println!("\nfirst images of VMs {} to {VMS}, elected over those of the others:", half + 1);
    println!("| scheme | of what all blocks of the others would save, % |\n|---|---|");
    let saved_by = |known: &HashSet<Block>| {
        (half..VMS).flat_map(|vm| trace.of_vm(vm, 1)).filter(|block| known.contains(block)).count() as f64
    };
    let most = saved_by(&old);
    for (name, room) in [
        ("sigma 1 %", old.len() / 100),
        ("sigma 2 %", old.len() / 50),
        ("64 MiB / 16 bytes for 1 TB", (MEMORY * scale) as usize / CHOSEN_BYTES as usize),
        ("all that two VMs have", usize::MAX),
    ] {
        let known: HashSet<Block> = trace.elect(half, 1, room).into_iter().collect();
        println!("| {name} | {:.1} |", percent(saved_by(&known), most));
    }
}

/// Runs schemes, two at a time, the timed ones too: the ratio of their times counts.
fn in_pairs<T: Sync>(work: &[T], run: &(dyn Fn(&T) -> Outcome + Sync)) -> Vec<Outcome> {
    let next = Mutex::new(0);
    let done = Mutex::new(vec![Outcome::default(); work.len()]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let at = {
                        let mut next = next.lock().unwrap();
                        *next += 1;
                        *next - 1
                    };
                    let Some(item) = work.get(at) else { return };
                    let began = Instant::now();
                    let outcome = run(item);
                    eprintln!(
                        "scheme {} of {}: {:.0} s, {} blocks stored, {} when collected",
                        at + 1,
                        work.len(),
                        began.elapsed().as_secs_f64(),
                        outcome.inline,
                        outcome.collected
                    );
                    done.lock().unwrap()[at] = outcome;
                }
            });
        }
    });
    done.into_inner().unwrap()
}
