//! The dataflow of elections and batches: it finds what an oracle in memory finds, with any number of partitions,
//! threads and processes and any memory; a process that is killed, stuck or no host of the job ends it with one error
//! that names it; and a job that was cut off goes on where it was.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use rustix::process::Signal;
use snapfs::backend::Backend;
use snapfs::backend::local::Local;
use snapfs::backend::testing::Memory;
use snapfs::clock::SystemClock;
use snapfs::cluster::detect::{Collected, Feed, Holder, Progress, Report, Setup, Task, run};
use snapfs::cluster::hosts::Hosts;
use snapfs::cluster::job::Job;
use snapfs::cluster::mesh::Patience;
use snapfs::cluster::record::{Member, WANTED};
use snapfs::error::{ErrorKind, Result};
use snapfs::fingerprint::{Fingerprint, fingerprint};

use crate::peers::{self, Order, addresses, ended, killed, signal_myself};

const ROW: usize = 4 + 1 + 8 + 8;

/// Records, by rules from a seed: some fingerprints are popular, some come again and again in one member.
#[derive(Debug, Clone, Copy)]
struct Rules {
    members: u32,
    records: u64,
    prints: u64,
    groups: u32,
}

impl Rules {
    fn record(&self, member: u32, n: u64) -> (Fingerprint, u64) {
        let mixed = fingerprint(&[u64::from(member), n].map(u64::to_le_bytes).concat());
        let number = mixed.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        // A third wants, the rest holds; the square makes low numbers popular.
        let popular = (number % self.prints) * (number % self.prints) / self.prints;
        let place = if number % 3 == 0 { n | WANTED } else { n };
        (fingerprint(&popular.to_le_bytes()), place)
    }

    fn group(&self, member: u32) -> u32 {
        member * self.groups / self.members
    }
}

fn row(member: u32, kind: u8, position: u64, value: u64) -> Vec<u8> {
    [&member.to_le_bytes()[..], &[kind], &position.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// Who wants a block is told who else has it: 1 an own slot, 2 how many have or want it, 3 a repetition.
fn judged(holders: &[Holder]) -> Vec<Vec<u8>> {
    let wanted = holders.iter().filter_map(|h| Some((h, h.wanted?)));
    wanted
        .filter_map(|(holder, position)| match holder.slot {
            Some(slot) => Some(row(holder.member.0, 1, position, slot)),
            None if holders.len() > 1 => Some(row(holder.member.0, 2, position, holders.len() as u64)),
            None => None,
        })
        .collect()
}

/// Slots and wanted positions of each member.
type ByMember = BTreeMap<u32, (BTreeSet<u64>, BTreeSet<u64>)>;

fn oracle(rules: &Rules) -> BTreeSet<Vec<u8>> {
    let mut by_print: BTreeMap<(Fingerprint, u32), ByMember> = BTreeMap::new();
    for member in 0..rules.members {
        for n in 0..rules.records {
            let (print, place) = rules.record(member, n);
            let (slots, wanted) = by_print.entry((print, rules.group(member))).or_default().entry(member).or_default();
            if place & WANTED == 0 {
                slots.insert(place)
            } else {
                wanted.insert(place & !WANTED)
            };
        }
    }
    let mut rows = BTreeSet::new();
    for members in by_print.values() {
        let mut holders = Vec::new();
        for (member, (slots, wanted)) in members {
            let (slot, first) = (slots.first().copied(), wanted.first().copied());
            holders.push(Holder { member: Member(*member), slot, wanted: first });
            rows.extend(wanted.iter().skip(1).map(|position| row(*member, 3, *position, first.unwrap())));
        }
        rows.extend(judged(&holders));
    }
    rows
}

/// Where a process kills or stops itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Never,
    Scan,
    Judge,
    Verdict,
    Stop,
}

struct Test {
    rules: Rules,
    end: End,
    judged: AtomicU32,
    got: Collected<Vec<u8>>,
}

impl Task for Test {
    fn members(&self) -> u32 {
        self.rules.members
    }
    fn host_of(&self, member: Member, hosts: usize) -> usize {
        member.0 as usize % hosts
    }
    fn group_of(&self, member: Member) -> u32 {
        self.rules.group(member.0)
    }
    fn feed(&self, member: Member, feed: &mut Feed<'_, '_>) -> Result<()> {
        for n in 0..self.rules.records {
            let (print, place) = self.rules.record(member.0, n);
            feed.give(print, place)?;
            if n == self.rules.records / 2 {
                match self.end {
                    End::Scan => signal_myself(Signal::KILL),
                    End::Stop => signal_myself(Signal::STOP),
                    _ => {}
                }
            }
        }
        feed.tick()
    }
    fn row_bytes(&self) -> usize {
        ROW
    }
    fn judge(&self, _: &Fingerprint, holders: &[Holder], rows: &mut Vec<u8>) {
        if self.end == End::Judge && self.judged.fetch_add(1, Ordering::SeqCst) == 300 {
            signal_myself(Signal::KILL);
        }
        rows.extend(judged(holders).concat());
    }
    fn repeats(&self, member: Member, first: u64, position: u64, rows: &mut Vec<u8>) {
        rows.extend(row(member.0, 3, position, first));
    }
    fn member_of(&self, row: &[u8]) -> Option<Member> {
        Some(Member(u32::from_le_bytes(*row.first_chunk()?)))
    }
    fn verdict(&self, _: Member, row: &[u8]) -> Result<()> {
        if self.end == End::Verdict && self.judged.fetch_add(1, Ordering::SeqCst) == 100 {
            signal_myself(Signal::KILL);
        }
        self.got.add(row.to_vec());
        Ok(())
    }
}

fn setup(backend: Arc<dyn Backend>, scratch: &Path, threads: usize, memory_bytes: usize) -> Setup {
    Setup {
        backend: Some(backend),
        clock: Arc::new(SystemClock::new()),
        hosts: None,
        threads,
        memory_bytes,
        scratch: scratch.to_owned(),
        patience: Patience { start: Duration::from_secs(3600), silence: Duration::from_secs(3600) },
        progress: Arc::new(|_| {}),
    }
}

fn job(backend: &dyn Backend, rules: &Rules, partitions: u32) -> Job {
    let id = Job::id_of(&[b"test", format!("{rules:?}").as_bytes()]);
    Job::open_or_create(backend, id, || Ok((partitions, Vec::new()))).unwrap()
}

fn test(rules: Rules, end: End) -> Arc<Test> {
    Arc::new(Test { rules, end, judged: AtomicU32::new(0), got: Collected::default() })
}

/// All verdicts, each once.
fn verdicts(rows: Vec<Vec<u8>>) -> BTreeSet<Vec<u8>> {
    let count = rows.len();
    let set: BTreeSet<_> = rows.into_iter().collect();
    assert_eq!(set.len(), count, "a verdict came twice");
    set
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn one_process_finds_what_the_oracle_finds(
        members in 1_u32..9,
        records in 0_u64..4000,
        prints in 1_u64..5000,
        groups in 1_u32..4,
        partitions in 1_u32..40,
        threads in 1_usize..4,
        memory in (1_usize << 20)..(3 << 20),
    ) {
        let rules = Rules { members, records, prints, groups: groups.min(members) };
        let memory_backend: Arc<dyn Backend> = Arc::new(Memory::default());
        let scratch = tempfile::tempdir().unwrap();
        let job = job(&*memory_backend, &rules, partitions);
        let setup = setup(memory_backend, scratch.path(), threads, memory);
        let task = test(rules, End::Never);
        let report = run(&setup, &job, task.clone()).unwrap();
        prop_assert_eq!(verdicts(task.got.take()), oracle(&rules));
        prop_assert_eq!(report.records, u64::from(members) * records);
        prop_assert_eq!(report.partitions, u64::from(partitions));
        // Once more: nothing is left to do but to tell.
        let again = run(&setup, &job, task.clone()).unwrap();
        prop_assert_eq!(verdicts(task.got.take()), oracle(&rules));
        prop_assert_eq!((again.records, again.partitions), (0, 0));
    }
}

#[test]
fn more_records_than_memory_are_sorted_on_disk() {
    let rules = Rules { members: 3, records: 200_000, prints: 40_000, groups: 1 };
    let backend: Arc<dyn Backend> = Arc::new(Memory::default());
    let scratch = tempfile::tempdir().unwrap();
    let task = test(rules, End::Never);
    // 26 MB of rows in one partition, 1 MiB of memory.
    let report =
        run(&setup(backend.clone(), scratch.path(), 1, 1 << 20), &job(&*backend, &rules, 1), task.clone()).unwrap();
    assert!(report.spilled_bytes > 25_000_000, "{report:?}");
    assert_eq!(verdicts(task.got.take()), oracle(&rules));
}

#[test]
fn an_error_of_the_task_ends_the_job_with_it() {
    struct Broken(Test);
    impl Task for Broken {
        fn members(&self) -> u32 {
            self.0.members()
        }
        fn host_of(&self, member: Member, hosts: usize) -> usize {
            self.0.host_of(member, hosts)
        }
        fn group_of(&self, member: Member) -> u32 {
            self.0.group_of(member)
        }
        fn feed(&self, member: Member, feed: &mut Feed<'_, '_>) -> Result<()> {
            self.0.feed(member, feed)
        }
        fn row_bytes(&self) -> usize {
            ROW
        }
        fn judge(&self, print: &Fingerprint, holders: &[Holder], rows: &mut Vec<u8>) {
            self.0.judge(print, holders, rows);
        }
        fn repeats(&self, member: Member, first: u64, position: u64, rows: &mut Vec<u8>) {
            self.0.repeats(member, first, position, rows);
        }
        fn member_of(&self, row: &[u8]) -> Option<Member> {
            self.0.member_of(row)
        }
        fn verdict(&self, _: Member, _: &[u8]) -> Result<()> {
            Err(snapfs::error::Error::new(ErrorKind::NoSpace, "no room for verdicts"))
        }
    }
    let rules = Rules { members: 4, records: 3000, prints: 500, groups: 1 };
    let backend: Arc<dyn Backend> = Arc::new(Memory::default());
    let scratch = tempfile::tempdir().unwrap();
    let job = job(&*backend, &rules, 8);
    let Ok(inner) = Arc::try_unwrap(test(rules, End::Never)) else { panic!("shared") };
    let error = run(&setup(backend, scratch.path(), 2, 4 << 20), &job, Arc::new(Broken(inner))).unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::NoSpace, "no room for verdicts"));
}

// ------------------------------------------------------------------------------------------------- several processes

const RULES: Rules = Rules { members: 7, records: 30_000, prints: 20_000, groups: 2 };

const PARTITIONS: u32 = 12;

/// What a process of a job does; as a test of its own it has no order and does nothing.
#[test]
fn process_of_a_job() {
    let Some(order) = Order::of_this_process() else { return };
    let (end, silence) = order.end.split_once(' ').unwrap();
    let ends = [End::Never, End::Scan, End::Judge, End::Verdict, End::Stop];
    let end = ends.into_iter().find(|known| format!("{known:?}") == end).unwrap();
    let backend: Arc<dyn Backend> = Arc::new(Local::open(&order.folder).unwrap());
    let setup = setup(backend.clone(), &order.folder, 2, 2 << 20);
    let patience = Patience { silence: Duration::from_secs(silence.parse().unwrap()), ..setup.patience };
    let setup = Setup { hosts: Some(order.hosts.clone()), patience, ..setup };
    let task = test(RULES, end);
    order.tell(run(&setup, &job(&*backend, &RULES, PARTITIONS), task.clone()));
    std::fs::write(order.folder.join(format!("verdicts.{}", order.index)), task.got.take().concat()).unwrap();
}

struct World {
    folder: tempfile::TempDir,
    hosts: Vec<String>,
}

impl World {
    fn new(count: usize) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), hosts: addresses(count) }
    }

    fn start(&self, index: usize, end: End, silence: u32) -> Child {
        let end = format!("{end:?} {silence}");
        peers::start("cluster::process_of_a_job", self.folder.path(), index, &end, &self.hosts)
    }

    fn outcome(&self, index: usize) -> String {
        peers::outcome(self.folder.path(), index)
    }

    /// Runs the job to its end on all hosts, and compares what comes out.
    fn finish(&self) {
        let children: Vec<_> = (0..self.hosts.len()).map(|index| self.start(index, End::Never, 3600)).collect();
        let mut rows = Vec::new();
        for (index, child) in children.into_iter().enumerate() {
            ended(child);
            assert!(self.outcome(index).starts_with("ok "), "{}", self.outcome(index));
            let bytes = std::fs::read(self.folder.path().join(format!("verdicts.{index}"))).unwrap();
            rows.extend(bytes.chunks(ROW).map(<[u8]>::to_vec));
        }
        assert_eq!(verdicts(rows), oracle(&RULES));
    }
}

#[test]
fn several_processes_find_what_the_oracle_finds() {
    for hosts in [2, 3] {
        World::new(hosts).finish();
    }
}

#[test]
fn a_killed_process_ends_the_job_with_its_name_and_the_job_goes_on() {
    for end in [End::Scan, End::Judge, End::Verdict] {
        let world = World::new(3);
        let children: Vec<_> =
            (0..3).map(|index| world.start(index, if index == 1 { end } else { End::Never }, 3600)).collect();
        for (index, child) in children.into_iter().enumerate() {
            if index == 1 {
                killed(child, &format!("{end:?}"));
                continue;
            }
            ended(child);
            let told = world.outcome(index);
            let lost = format!("host 1 ({}) was lost", world.hosts[1]);
            assert!(told.starts_with("Unavailable ") && told.contains(&lost), "{end:?}: {told}");
        }
        let finished = job(&Local::open(world.folder.path()).unwrap(), &RULES, PARTITIONS)
            .finished(&Local::open(world.folder.path()).unwrap())
            .unwrap();
        let count = finished.iter().filter(|f| **f).count();
        match end {
            End::Scan => assert_eq!(count, 0),
            // A verdict comes from a partition that is finished; of a host that judges its first one, none need be.
            End::Verdict => assert!(count > 0),
            _ => {}
        }
        world.finish();
    }
}

#[test]
fn a_stuck_process_is_named() {
    let world = World::new(2);
    let mut stuck = world.start(1, End::Stop, 3600);
    ended(world.start(0, End::Never, 3));
    stuck.kill().unwrap();
    stuck.wait().unwrap();
    let told = world.outcome(0);
    assert!(told.contains(&format!("host 1 ({}) is stuck", world.hosts[1])), "{told}");
    world.finish();
}

#[test]
fn strangers_at_the_port_do_not_disturb() {
    let world = World::new(2);
    let first = world.start(0, End::Never, 3600);
    // Until it listens.
    let mut strangers = Vec::new();
    while strangers.len() < 3 {
        if let Ok(mut socket) = TcpStream::connect(&world.hosts[0]) {
            // Nothing, noise, and a greeting without the key.
            let greeting = [&b"snapfsJ1"[..], &1_u32.to_le_bytes(), &[7; 32 + 3 * 32], &[9; 32]].concat();
            let bytes = [&[][..], &[0x55; 4000], &greeting][strangers.len()];
            socket.write_all(bytes).unwrap();
            if strangers.is_empty() {
                socket.shutdown(std::net::Shutdown::Both).unwrap();
            }
            strangers.push(socket);
        }
    }
    let second = world.start(1, End::Never, 3600);
    [first, second].into_iter().for_each(ended);
    assert!(world.outcome(0).starts_with("ok ") && world.outcome(1).starts_with("ok "));
}

#[test]
fn hosts_that_do_not_fit_together_are_told_so() {
    let backend: Arc<dyn Backend> = Arc::new(Memory::default());
    let scratch = tempfile::tempdir().unwrap();
    let rules = Rules { members: 2, records: 10, prints: 10, groups: 1 };
    let text = addresses(2).join("\n");
    let outcomes: Vec<Result<Report>> = std::thread::scope(|scope| {
        let start = |index: usize| {
            let (backend, text, scratch) = (backend.clone(), &text, scratch.path());
            scope.spawn(move || {
                let hosts = Some(Hosts::parse(text, index).unwrap());
                // Another number of threads on each.
                let setup = Setup { hosts, ..setup(backend.clone(), scratch, index + 1, 2 << 20) };
                run(&setup, &job(&*backend, &rules, 4), test(rules, End::Never))
            })
        };
        let started: Vec<_> = (0..2).map(start).collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("another number of threads"), "{error}");
    }
}

#[test]
fn a_host_that_does_not_come_up_is_named() {
    let backend: Arc<dyn Backend> = Arc::new(Memory::default());
    let scratch = tempfile::tempdir().unwrap();
    let rules = Rules { members: 2, records: 10, prints: 10, groups: 1 };
    let world = World::new(2);
    let waited = Arc::new(Collected::default());
    let told = waited.clone();
    let setup = Setup {
        hosts: Some(Hosts::parse(&world.hosts.join("\n"), 0).unwrap()),
        patience: Patience { start: Duration::from_millis(1500), silence: Duration::from_secs(3600) },
        progress: Arc::new(move |progress| told.add(progress)),
        ..setup(backend.clone(), scratch.path(), 1, 2 << 20)
    };
    let error = run(&setup, &job(&*backend, &rules, 4), test(rules, End::Never)).unwrap_err();
    assert!(error.to_string().contains(&format!("did not come up within 1 s: host 1 ({})", world.hosts[1])), "{error}");
    assert_eq!(waited.take(), [Progress::Waiting(format!("host 1 ({})", world.hosts[1]))]);
}
