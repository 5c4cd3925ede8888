//! Runs a job: rows to the owners of their partitions, one partition after another sorted and judged, the result of
//! each an object, verdicts to the owners of the members.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use timely::WorkerConfig;
use timely::communication::Hooks;
use timely::communication::allocator::zero_copy::initialize::initialize_networking_from_sockets;
use timely::communication::allocator::{AllocatorBuilder, ProcessBuilder};
use timely::worker::Worker;

use crate::backend::Backend;
use crate::clock::Clock;
use crate::cluster::flow::{Outbox, exchange};
use crate::cluster::health::Health;
use crate::cluster::hosts::Hosts;
use crate::cluster::job::{Job, ResultWriter, read_result};
use crate::cluster::mesh::{Agreement, Patience, connect};
use crate::cluster::record::{Member, ROW_BYTES, Record, WANTED, partition_of};
use crate::cluster::spill::Spill;
use crate::error::{Error, ErrorKind, Result, invalid};
use crate::fingerprint::{Fingerprint, digest};
use crate::limits::{JOB_MEMORY_BYTES_MIN, JOB_THREADS_MAX};

/// One who holds, or wants, the block of a fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// Who.
    pub member: Member,
    /// Where, the lowest slot if there are several.
    pub slot: Option<u64>,
    /// Where in its image it is wanted first.
    pub wanted: Option<u64>,
}

/// What a job is about. Its methods are called from several threads.
///
/// The outcome must depend on the records alone, never on their order, on hosts or on threads: that is what lets a job
/// go on after a host was lost, with another number of them too.
pub trait Task: Send + Sync + 'static {
    /// Members are numbered from 0 to before this.
    fn members(&self) -> u32;

    /// The host that has a member: it feeds its records and gets its verdicts.
    fn host_of(&self, member: Member, hosts: usize) -> usize;

    /// Members of different groups never meet. Members of a group have consecutive numbers.
    fn group_of(&self, member: Member) -> u32;

    /// Gives all records of a member; its place is below [`WANTED`], or has that bit.
    ///
    /// # Errors
    /// Any; it ends the job.
    fn feed(&self, member: Member, feed: &mut Feed<'_, '_>) -> Result<()>;

    /// Bytes of a row of the result.
    fn row_bytes(&self) -> usize;

    /// Judges a fingerprint: who of one group holds or wants it, in the order of members. Appends whole rows.
    fn judge(&self, print: &Fingerprint, holders: &[Holder], rows: &mut Vec<u8>);

    /// `member` wants at `position` what it wants first at `first`. Appends whole rows.
    fn repeats(&self, member: Member, first: u64, position: u64, rows: &mut Vec<u8>);

    /// Under which number a fingerprint is counted that these have or want. What is not counted needs no rows to be
    /// known of.
    fn count(&self, _: &[Holder]) -> u32 {
        0
    }

    /// At the end of a partition: so many of its fingerprints are counted under a number. Appends whole rows.
    fn counted(&self, _count: u32, _fingerprints: u64, _rows: &mut Vec<u8>) {}

    /// Whom a row is sent to, if anybody.
    fn member_of(&self, row: &[u8]) -> Option<Member>;

    /// Gets the rows that are for a member of this host, in any order.
    ///
    /// # Errors
    /// Any; it ends the job.
    fn verdict(&self, member: Member, row: &[u8]) -> Result<()>;
}

/// Takes the records of one member.
pub struct Feed<'a, 'b> {
    outbox: &'a mut Outbox<'b>,
    member: Member,
    shared: &'a Shared,
}

impl Feed<'_, '_> {
    /// A record.
    ///
    /// # Errors
    /// The error that ended the job.
    pub fn give(&mut self, print: Fingerprint, place: u64) -> Result<()> {
        let row = Record { print, member: self.member, place }.to_row();
        let partition = partition_of(&row, self.shared.job.partitions);
        if self.shared.is_finished(partition) {
            return Ok(());
        }
        self.shared.counts.records.fetch_add(1, Ordering::Relaxed);
        self.outbox.put(partition as usize % self.shared.workers, &row)
    }

    /// Whether an earlier run has finished all partitions: then no record is needed any more.
    pub fn is_all_known(&self) -> bool {
        self.shared.finished.iter().all(|is_finished| *is_finished)
    }

    /// To be called now and then where no record is given for long.
    ///
    /// # Errors
    /// The error that ended the job.
    pub fn tick(&mut self) -> Result<()> {
        self.outbox.tick()
    }
}

/// What a job is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Waits for these hosts to come up.
    Waiting(String),
    /// Members fed on this host, of so many.
    Scan(u64, u64),
    /// Partitions done on this host, of so many.
    Detect(u64, u64),
}

/// How a job is run on this host.
#[derive(Clone)]
pub struct Setup {
    /// Where the job's objects are; `None`: nothing is kept of a job that is short.
    pub backend: Option<Arc<dyn Backend>>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// All hosts; `None` for this process alone.
    pub hosts: Option<Hosts>,
    /// Worker threads, the same on all hosts.
    pub threads: usize,
    /// Memory for buffers on this host.
    pub memory_bytes: usize,
    /// Where the spill files are.
    pub scratch: PathBuf,
    /// How long to wait for others.
    pub patience: Patience,
    /// Is told what the job is doing.
    pub progress: Arc<dyn Fn(Progress) + Send + Sync>,
}

/// What a job did on this host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Records fed.
    pub records: u64,
    /// Partitions judged.
    pub partitions: u64,
    /// Partitions that an earlier run had finished, of the whole job.
    pub partitions_before: u64,
    /// Bytes of spill files, at the most.
    pub spilled_bytes: u64,
    /// Bytes sent to other hosts.
    pub bytes_sent: u64,
    /// Bytes received from other hosts.
    pub bytes_received: u64,
}

#[derive(Default)]
struct Counts {
    records: AtomicU64,
    members: AtomicU64,
    partitions: AtomicU64,
    partitions_done: AtomicU64,
    spilled_bytes: AtomicU64,
}

struct Shared {
    setup: Setup,
    job: Job,
    task: Arc<dyn Task>,
    health: Arc<Health>,
    finished: Vec<bool>,
    hosts: usize,
    host: usize,
    workers: usize,
    members: u64,
    own_partitions: u64,
    counts: Counts,
}

impl Shared {
    fn is_finished(&self, partition: u32) -> bool {
        self.finished.get(partition as usize).copied().unwrap_or(false)
    }

    fn worker_of(&self, member: Member) -> usize {
        let host = self.task.host_of(member, self.hosts) % self.hosts;
        host * self.setup.threads + member.0 as usize % self.setup.threads
    }

    fn share_bytes(&self) -> usize {
        self.setup.memory_bytes / self.setup.threads
    }
}

/// Runs a job to its end: all results are objects then, if they are kept, and every verdict has been given.
///
/// With several hosts, all call this with the same job, and all return together: with `Ok` when all is done, or each with
/// an error that names who was lost or what went wrong where. Then the job may be run again, on the same hosts or on
/// others; partitions that are finished are not judged again.
///
/// Memory: `memory_bytes`, and for each further host about 3 MiB of buffers of the connection, touched as they are used.
///
/// # Errors
/// `Unavailable` for hosts that do not come up, are lost or stuck, `Invalid` for a host that was started with something
/// else; those of the task and of the backend.
pub fn run(setup: &Setup, job: &Job, task: Arc<dyn Task>) -> Result<Report> {
    if setup.threads == 0 || setup.threads > JOB_THREADS_MAX {
        return Err(invalid(format!("a job has 1 to {JOB_THREADS_MAX} threads, threads={}", setup.threads)));
    }
    if (setup.memory_bytes as u64) < JOB_MEMORY_BYTES_MIN {
        return Err(invalid(format!(
            "a job needs {JOB_MEMORY_BYTES_MIN} bytes of memory, bytes={}",
            setup.memory_bytes
        )));
    }
    let finished = match &setup.backend {
        Some(backend) => job.finished(&**backend)?,
        None => vec![false; job.partitions as usize],
    };
    let hosts = setup.hosts.as_ref().map_or(1, Hosts::count);
    let host = setup.hosts.as_ref().map_or(0, Hosts::index);
    let workers = hosts * setup.threads;
    let is_own = |partition: &usize| *partition % workers / setup.threads == host;
    let members = (0..task.members()).filter(|member| task.host_of(Member(*member), hosts) % hosts == host).count();
    let shared = Arc::new(Shared {
        setup: setup.clone(),
        job: job.clone(),
        task,
        health: Health::new(),
        hosts,
        host,
        workers,
        members: members as u64,
        own_partitions: (0..finished.len()).filter(is_own).count() as u64,
        finished,
        counts: Counts::default(),
    });
    let outcome = run_workers(&shared);
    shared.health.check()?;
    outcome?;
    let (bytes_sent, bytes_received) = shared.health.traffic();
    let counts = &shared.counts;
    Ok(Report {
        records: counts.records.load(Ordering::Relaxed),
        partitions: counts.partitions.load(Ordering::Relaxed),
        partitions_before: shared.finished.iter().filter(|is_finished| **is_finished).count() as u64,
        spilled_bytes: counts.spilled_bytes.load(Ordering::Relaxed),
        bytes_sent,
        bytes_received,
    })
}

fn run_workers(shared: &Arc<Shared>) -> Result<()> {
    let setup = &shared.setup;
    let failed = |e: String| Error::new(ErrorKind::Unavailable, format!("dataflow: {e}"));
    let Some(hosts) = setup.hosts.as_ref().filter(|hosts| hosts.count() > 1) else {
        let hooks = Hooks::default();
        let builders = ProcessBuilder::new_typed_vector(setup.threads, hooks.refill, hooks.spill);
        let builders = builders.into_iter().map(AllocatorBuilder::Process).collect();
        return join(shared, builders, Box::new(())).map_err(failed);
    };
    let agreement = Agreement {
        job: shared.job.id.0,
        layout: digest(format!("{} {:?}", setup.threads, hosts.addresses()).as_bytes()).0,
        finished: digest(&shared.finished.iter().map(|f| u8::from(*f)).collect::<Vec<_>>()).0,
        key: shared.job.key.0,
    };
    let waiting = |names: &str| (setup.progress)(Progress::Waiting(names.to_owned()));
    let links = connect(hosts, &agreement, setup.patience, &shared.health, &*setup.clock, &waiting)?;
    let beaten: Vec<_> = links.iter().flatten().cloned().collect();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) && !shared.health.is_failed() {
                beaten.iter().for_each(crate::cluster::link::Link::beat);
                // Also the longest that the end of a job waits for this thread.
                std::thread::park_timeout(Duration::from_secs(1));
            }
        });
        let hooks = Hooks::default();
        let inner = ProcessBuilder::new_typed_vector(setup.threads, hooks.refill.clone(), hooks.spill.clone());
        let networked = initialize_networking_from_sockets(inner, links, shared.host, setup.threads, hooks);
        let outcome = networked.map_err(|e| Error::io("dataflow", e)).and_then(|(builders, guard)| {
            join(shared, builders.into_iter().map(AllocatorBuilder::Tcp).collect(), Box::new(guard)).map_err(failed)
        });
        is_over.store(true, Ordering::SeqCst);
        outcome
    })
}

/// Starts the workers and waits for them.
fn join(
    shared: &Arc<Shared>,
    builders: Vec<AllocatorBuilder>,
    others: Box<dyn std::any::Any + Send>,
) -> std::result::Result<(), String> {
    let context = shared.clone();
    let work = move |worker: &mut Worker| {
        // The error is in the health of the job.
        let _ = work(worker, &context);
    };
    let guards = timely::execute::execute_from(builders, others, WorkerConfig::default(), work)?;
    guards.join().into_iter().collect()
}

fn work(worker: &mut Worker, shared: &Arc<Shared>) -> Result<()> {
    let spill = Rc::new(RefCell::new(None));
    let index = worker.index();
    let share = shared.share_bytes();
    let own: Vec<u32> = (0..shared.job.partitions).filter(|p| *p as usize % shared.workers == index).collect();
    let begun = Spill::new(&shared.setup.scratch, own.len(), share / 4);
    *spill.borrow_mut() = Some(begun.inspect_err(|e| shared.health.fail(e.duplicate()))?);

    let (into, partitions, workers) = (spill.clone(), shared.job.partitions, shared.workers);
    let take = move |rows: &[u8]| -> Result<()> {
        let mut spill = into.borrow_mut();
        let Some(spill) = spill.as_mut() else { return Ok(()) };
        for row in rows.as_chunks::<ROW_BYTES>().0 {
            spill.add(partition_of(row, partitions) as usize / workers, row)?;
        }
        Ok(())
    };
    exchange(worker, &shared.health, share / 8, |outbox| feed_all(shared, index, outbox), take)?;

    let spill = spill.borrow_mut().take();
    let receiver = shared.clone();
    let row_bytes = shared.task.row_bytes();
    let take = move |rows: &[u8]| -> Result<()> {
        for row in rows.chunks_exact(row_bytes) {
            if let Some(member) = receiver.task.member_of(row) {
                receiver.task.verdict(member, row)?;
            }
        }
        Ok(())
    };
    exchange(worker, &shared.health, share / 8, |outbox| judge_all(shared, spill, &own, outbox), take)
}

fn feed_all(shared: &Shared, index: usize, outbox: &mut Outbox<'_>) -> Result<()> {
    for member in (0..shared.task.members()).map(Member).filter(|member| shared.worker_of(*member) == index) {
        shared.task.feed(member, &mut Feed { outbox, member, shared })?;
        let done = shared.counts.members.fetch_add(1, Ordering::Relaxed) + 1;
        (shared.setup.progress)(Progress::Scan(done, shared.members));
    }
    Ok(())
}

fn judge_all(shared: &Shared, spill: Option<Spill<ROW_BYTES>>, own: &[u32], outbox: &mut Outbox<'_>) -> Result<()> {
    let Some(mut spill) = spill else { return Ok(()) };
    shared.counts.spilled_bytes.fetch_add(spill.disk_bytes(), Ordering::Relaxed);
    for (at, partition) in own.iter().enumerate() {
        if !shared.is_finished(*partition) {
            judge_partition(shared, &mut spill, at, *partition, outbox)?;
            shared.counts.partitions.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(backend) = &shared.setup.backend {
            let row_bytes = shared.task.row_bytes();
            read_result(&**backend, &shared.job, *partition, row_bytes, &mut |row| send(shared, row, outbox)).map_err(
                |e| match e.kind() {
                    ErrorKind::Corrupt => e.within("delete the folder of the job and start it again"),
                    _ => e,
                },
            )?;
        }
        outbox.tick()?;
        let done = shared.counts.partitions_done.fetch_add(1, Ordering::Relaxed) + 1;
        (shared.setup.progress)(Progress::Detect(done, shared.own_partitions));
    }
    Ok(())
}

/// Sends a row of a result to whom it is for.
fn send(shared: &Shared, row: &[u8], outbox: &mut Outbox<'_>) -> Result<()> {
    match shared.task.member_of(row) {
        Some(member) if member.0 < shared.task.members() => outbox.put(shared.worker_of(member), row),
        _ => Ok(()),
    }
}

fn judge_partition(
    shared: &Shared,
    spill: &mut Spill<ROW_BYTES>,
    at: usize,
    partition: u32,
    outbox: &mut Outbox<'_>,
) -> Result<()> {
    let task = &*shared.task;
    let mut sorted = spill.sorted(at, shared.share_bytes() / 2, &shared.setup.scratch)?;
    let create =
        |backend: &Arc<dyn Backend>| ResultWriter::create(&**backend, &shared.job, partition, task.row_bytes());
    let mut result = shared.setup.backend.as_ref().map(create).transpose()?;
    let mut add_rows = |rows: &mut Vec<u8>, outbox: &mut Outbox<'_>| {
        let outcome = rows.chunks(task.row_bytes()).try_for_each(|row| match &mut result {
            Some(result) => result.add(row),
            None => send(shared, row, outbox),
        });
        rows.clear();
        outcome
    };
    let mut holders: Vec<Holder> = Vec::new();
    let mut current: Option<(Fingerprint, u32)> = None;
    let mut rows = Vec::new();
    let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
    let mut count = 0_u32;
    loop {
        let record = sorted.read_next()?.map(|row| Record::from_row(&row));
        let key = record.map(|record| (record.print, task.group_of(record.member)));
        if key != current {
            if let Some((print, _)) = current {
                task.judge(&print, &holders, &mut rows);
                *counts.entry(task.count(&holders)).or_default() += 1;
            }
            holders.clear();
            current = key;
        }
        if let Some(record) = record {
            add(&mut holders, &record, task, &mut rows);
        }
        add_rows(&mut rows, outbox)?;
        if record.is_none() {
            break;
        }
        count += 1;
        if count.is_multiple_of(4096) {
            outbox.tick()?;
        }
    }
    counts.into_iter().for_each(|(count, fingerprints)| task.counted(count, fingerprints, &mut rows));
    add_rows(&mut rows, outbox)?;
    result.map_or(Ok(()), ResultWriter::finish)
}

/// Adds a record of the fingerprint at hand. Records come in the order of members and places, slots before wanted ones.
fn add(holders: &mut Vec<Holder>, record: &Record, task: &dyn Task, rows: &mut Vec<u8>) {
    let is_wanted = record.place & WANTED != 0;
    let place = record.place & !WANTED;
    match holders.last_mut().filter(|last| last.member == record.member) {
        Some(last) if is_wanted => match last.wanted {
            Some(first) => task.repeats(record.member, first, place, rows),
            None => last.wanted = Some(place),
        },
        // A block that a member holds twice: the lowest slot is as good as any.
        Some(_) => {}
        None => holders.push(Holder {
            member: record.member,
            slot: (!is_wanted).then_some(place),
            wanted: is_wanted.then_some(place),
        }),
    }
}

/// A list of what several threads collect.
#[derive(Debug)]
pub struct Collected<T>(Mutex<Vec<T>>);

impl<T> Default for Collected<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Collected<T> {
    /// Adds one.
    pub fn add(&self, value: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(value);
    }

    /// All so far.
    pub fn take(&self) -> Vec<T> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
