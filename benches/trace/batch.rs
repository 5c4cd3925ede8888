//! The last day of the trace as a batch, with the dataflow of the program: all slots of the days before, and what the changed
//! segments of the last day hold.

use std::collections::HashSet;
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
use snapfs::fingerprint::Fingerprint;

use crate::make::{DAYS, SEGMENT, Vm};
use crate::model::print;

/// Records of a VM, about: what it holds after nine days, and the changed segments of the tenth.
const RECORDS_A_VM: u64 = 220_000;

/// Bytes of a row of the result: member, position, whether it is new, slot.
const ROW_BYTES: usize = 21;

struct Batch {
    vms: usize,
    wanted: AtomicU64,
    verdicts: AtomicU64,
    /// Distinct blocks that are wanted and that nobody has.
    new: AtomicU64,
}

impl Task for Batch {
    fn members(&self) -> u32 {
        self.vms as u32
    }
    fn host_of(&self, member: Member, hosts: usize) -> usize {
        member.0 as usize % hosts
    }
    fn group_of(&self, _: Member) -> u32 {
        0
    }
    fn feed(&self, member: Member, feed: &mut Feed<'_, '_>) -> Result<()> {
        let mut vm = Vm::new(u64::from(member.0), self.vms);
        let mut held = HashSet::new();
        let mut slot = 0;
        for day in 0..DAYS {
            for (segment, blocks) in vm.day(day) {
                for (at, block) in blocks.iter().enumerate() {
                    if day + 1 == DAYS {
                        self.wanted.fetch_add(1, Ordering::Relaxed);
                        feed.give(print(*block), (segment * SEGMENT + at) as u64 | WANTED)?;
                    } else if held.insert(*block) {
                        feed.give(print(*block), slot)?;
                        slot += 1;
                    }
                }
                feed.tick()?;
            }
        }
        Ok(())
    }
    fn row_bytes(&self) -> usize {
        ROW_BYTES
    }
    fn judge(&self, _: &Fingerprint, holders: &[Holder], rows: &mut Vec<u8>) {
        let is_held = holders.iter().any(|holder| holder.slot.is_some());
        if !is_held {
            self.new.fetch_add(1, Ordering::Relaxed);
        }
        for holder in holders.iter().filter(|holder| holder.wanted.is_some() && (holders.len() > 1 || is_held)) {
            rows.extend([&holder.member.0.to_le_bytes()[..], &[1; ROW_BYTES - 4]].concat());
        }
    }
    fn repeats(&self, member: Member, _: u64, _: u64, rows: &mut Vec<u8>) {
        rows.extend([&member.0.to_le_bytes()[..], &[2; ROW_BYTES - 4]].concat());
    }
    fn member_of(&self, row: &[u8]) -> Option<Member> {
        Some(Member(u32::from_le_bytes(*row.first_chunk()?)))
    }
    fn verdict(&self, _: Member, _: &[u8]) -> Result<()> {
        self.verdicts.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

fn largest_resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// One process of a job. Leaves what it counted as new in a file.
fn process(folder: &Path, vms: usize, hosts: Option<Hosts>) {
    let backend: Arc<dyn Backend> = Arc::new(Local::open(folder).unwrap());
    let id = Job::id_of(&[b"bench"]);
    let describe = || Ok((partitions_for(RECORDS_A_VM * vms as u64), Vec::new()));
    let job = Job::open_or_create(&*backend, id, describe).unwrap();
    let (index, count) = hosts.as_ref().map_or((0, 1), |hosts| (hosts.index(), hosts.count()));
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
    let [wanted, verdicts, new] = std::array::from_fn(|_| AtomicU64::new(0));
    let task = Arc::new(Batch { vms, wanted, verdicts, new });
    let began = Instant::now();
    let report = run(&setup, &job, task.clone()).unwrap();
    let verdicts = task.verdicts.load(Ordering::Relaxed);
    println!(
        "| {vms} | {} of {count} | {:.0} | {:.2} | {:.2} | {:.2} | {:.1} | {:.1} | {:.1} | {:.1} |",
        index + 1,
        began.elapsed().as_secs_f64(),
        report.records as f64 / 1e6,
        task.wanted.load(Ordering::Relaxed) as f64 / 1e6,
        verdicts as f64 / 1e6,
        report.spilled_bytes as f64 / 1e6,
        verdicts as f64 * ROW_BYTES as f64 / 1e6,
        report.bytes_sent as f64 / 1e6,
        largest_resident_mib(),
    );
    std::fs::write(folder.join(format!("new-{index}")), task.new.load(Ordering::Relaxed).to_string()).unwrap();
}

/// Distinct blocks of the last day that nobody has before, counted in memory; and the seconds that making the trace takes.
fn oracle(vms: usize) -> (u64, f64) {
    let began = Instant::now();
    let (mut held, mut wanted) = (HashSet::new(), HashSet::new());
    for number in 0..vms as u64 {
        let mut vm = Vm::new(number, vms);
        for day in 0..DAYS {
            let into = if day + 1 == DAYS { &mut wanted } else { &mut held };
            vm.day(day).into_iter().for_each(|(_, blocks)| into.extend(blocks));
        }
    }
    (wanted.difference(&held).count() as u64, began.elapsed().as_secs_f64())
}

/// Runs the batch with 1, 2 and 4 processes.
pub fn batch(folder: &Path, vms: usize) {
    if let Ok(order) = std::env::var("SNAPFS_BENCH_HOST") {
        let (index, hosts) = order.split_once('\n').unwrap();
        process(folder, vms, (!hosts.is_empty()).then(|| Hosts::parse(hosts, index.parse().unwrap()).unwrap()));
        return;
    }
    let (expected, seconds) = oracle(vms);
    println!(
        "{expected} distinct blocks are new on the last day; an exact set of all blocks in memory took {seconds:.0} s"
    );
    println!(
        "| VMs | process | s | million records | of these wanted | verdicts, million | spilled MB | results MB | sent MB | largest resident MiB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for processes in [1_usize, 2, 4] {
        let scratch = tempfile::tempdir_in(folder).unwrap();
        let hosts: String = match processes {
            1 => String::new(),
            _ => (0..processes).map(|n| format!("127.66.6.{processes}:{}\n", 7100 + n)).collect(),
        };
        let children: Vec<_> = (0..processes)
            .map(|index| {
                Command::new(std::env::current_exe().unwrap())
                    .args(["batch", scratch.path().to_str().unwrap(), &vms.to_string()])
                    .env("SNAPFS_BENCH_HOST", format!("{index}\n{hosts}"))
                    .spawn()
                    .unwrap()
            })
            .collect();
        let mut new = 0;
        for (index, mut child) in children.into_iter().enumerate() {
            assert!(child.wait().unwrap().success());
            let told = std::fs::read_to_string(scratch.path().join(format!("new-{index}"))).unwrap();
            new += told.parse::<u64>().unwrap();
        }
        assert_eq!(new, expected, "distinct blocks that the batch finds new");
    }
    println!("all found exactly {expected} distinct blocks to store");
    stage_model();
}

/// The papers' model of the stages, with their constants, for 100 machines; and with what this program sends.
fn stage_model() {
    println!("\n| stage model, 100 machines of 25 VMs of 40 GB | hours | papers |\n|---|---|---|");
    let (s, v, c) = (40e9, 25.0, 4096.0);
    // Days of snapshots times VMs times blocks: the papers' index of a machine.
    let n = 262_144_000.0;
    let (d1, d2, d3, b, beta) = (0.78, 0.5, 0.01, 50e6, 1e-6);
    let (a_n, m_n) = (0.0005, 25e6);
    let r = s * v * (1.0 - d1) / c;
    for (name, u, e, rescan, told) in [
        ("papers' constants (u 40, e 48, two scans)", 40.0, 48.0, true, "3.12 (measured)"),
        ("this program (u 44, e 21; a second scan of what is new only)", 44.0, f64::from(ROW_BYTES as u32), false, ""),
    ] {
        let scan = r * c / b + a_n * u * r / m_n + r * u / b;
        let detect = r * u / b + n * e / b + r * beta + r * e / b;
        let back = r * (1.0 - d2) * e / b + a_n * e * r * (1.0 - d2) / m_n + r * (1.0 - d2) * e / b;
        let write = if rescan { r * c / b } else { r * (1.0 - d2) * c / b } + r * (1.0 - d2) * e / b;
        let told_back = back;
        let update = r * ((1.0 - d2) + d3) * e / b * 2.0 + r * d3 * beta;
        let last = r * d2 * e / b + a_n * e * r * d2 / m_n + r * e / b;
        let hours = (scan + detect + back + write + told_back + update + last) / 3600.0;
        println!("| {name} | {hours:.2} | {told} |");
    }
}
