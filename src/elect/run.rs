//! Runs an election.

use std::sync::Arc;

use serde::Serialize;

use crate::backend::Key;
use crate::catalog::record::Op;
use crate::cluster::announce::announce;
use crate::cluster::detect::{self, Setup};
use crate::cluster::hosts::Hosts;
use crate::cluster::job::Job;
use crate::elect::copy::Copying;
use crate::elect::count::{Count, CountOptions, Counted};
use crate::elect::members::{Description, MemberRow, describe};
use crate::error::{ErrorKind, Result};
use crate::fingerprint::Fingerprint;
use crate::limits::POPULAR_ENTRIES_MAX;
use crate::popular::choice::{CHOSEN_BYTES, Census, Choice, POPULARITY_MIN, Point};
use crate::popular::index::{IndexBuilder, IndexIdentity, PopularIndex, index_key, parse_index_name};
use crate::store::Store;
use crate::store::common::common_state;
use crate::store::session::Session;
use crate::units::Epoch;
use crate::wire::encode;

/// Memory that an election takes for the popular blocks if nothing else is said: four million of them.
pub const ELECTION_BYTES_DEFAULT: u64 = 64 << 20;

/// The least that can be asked for.
pub const ELECTION_BYTES_MIN: u64 = 1 << 20;

/// How often an epoch is numbered anew when crashed elections left an index of that number.
const EPOCH_TRIES: u64 = 1000;

/// Indexes that stay: of the newest epoch, and of the one before, which a writer may be about to read.
const INDEXES_KEPT: usize = 2;

/// How to elect.
#[derive(Debug, Clone)]
pub struct ElectOptions {
    /// Memory that the popular blocks may take while they are chosen: 16 bytes each.
    pub memory_bytes: u64,
    /// Choose at the most this share of all distinct blocks, in percent.
    pub sigma_percent: Option<f64>,
    /// How to count who holds what.
    pub count: CountOptions,
}

impl Default for ElectOptions {
    fn default() -> Self {
        Self { memory_bytes: ELECTION_BYTES_DEFAULT, sigma_percent: None, count: CountOptions::default() }
    }
}

/// How far an election is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Finding out who holds what.
    Counting(detect::Progress),
    /// Copying: so many of so many blocks.
    Copying(u64, u64),
}

/// Is told how far an election is, by any thread.
pub type Tell = Arc<dyn Fn(Progress) + Send + Sync>;

/// What a host of an election did.
#[derive(Debug, Clone, PartialEq)]
pub enum Elected {
    /// Host 0, or the only one: it chose, copied and published.
    Chosen(ElectReport),
    /// Another: it read what its VMs hold.
    Fed(FedReport),
}

/// What a host did that does not choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct FedReport {
    /// Which host it is.
    pub host: u64,
    /// VMs that it read.
    pub vms: u64,
    /// Records of blocks that it sent to the owners of their partitions.
    pub records: u64,
    /// Bytes sent to other hosts.
    pub bytes_sent: u64,
    /// Bytes received from other hosts.
    pub bytes_received: u64,
}

/// What an election did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ElectReport {
    /// The epoch that was published; `None` when there was nothing to publish.
    pub epoch: Option<u64>,
    /// VM groups.
    pub groups: u64,
    /// VMs that took part.
    pub vms: u64,
    /// Distinct blocks.
    pub blocks_distinct: u64,
    /// Of these, blocks that two VMs or more hold.
    pub blocks_shared: u64,
    /// Popular blocks: entries of the index.
    pub blocks_popular: u64,
    /// Of these, blocks that were in common packs already.
    pub blocks_kept: u64,
    /// Blocks that were copied into common packs.
    pub blocks_copied: u64,
    /// Bytes of their frames.
    pub bytes_stored: u64,
    /// Blocks that were chosen, but could not be read.
    pub blocks_lost: u64,
    /// The exponent of the Zipf distribution that fits best.
    pub zipf_alpha: Option<f64>,
    /// What the popular blocks are worth.
    pub worth: Point,
    /// Records of blocks that this host sent to the owners of their partitions.
    pub records: u64,
    /// Bytes of its scratch files.
    pub spilled_bytes: u64,
    /// Bytes sent to other hosts.
    pub bytes_sent: u64,
    /// Bytes received from other hosts.
    pub bytes_received: u64,
}

/// Counts without choosing: what `popular show` tells. Alone, and without writing to the store.
///
/// # Errors
/// As [`elect`].
pub fn census(store: &Arc<Store>, options: &CountOptions, tell: Tell) -> Result<Census> {
    let election = describe(store)?;
    let setup = options.setup(store, counting(tell))?;
    let setup = Setup { backend: None, hosts: None, ..setup };
    // Nobody else takes part.
    let key = Fingerprint([0; 32]);
    let job = Job { id: election.id, key, partitions: election.partitions, body: Vec::new() };
    let count = Count::new(store, &election.description, u32::MAX, Choice::new(0));
    count.run(&setup, &job)?;
    Ok(count.take().census)
}

fn counting(tell: Tell) -> Arc<dyn Fn(detect::Progress) + Send + Sync> {
    Arc::new(move |now| tell(Progress::Counting(now)))
}

/// The popular set as it is now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PopularNow {
    /// The newest epoch; 0 before the first.
    pub epoch: u64,
    /// Entries of its index.
    pub blocks_popular: u64,
    /// Common blocks that nothing new may refer to.
    pub blocks_condemned: u64,
    /// Bytes of all common packs.
    pub common_bytes: u64,
}

/// What the popular set is now. Cost: the log of the common home, and the index.
///
/// # Errors
/// `Corrupt` when its log or the index is damaged, `Unavailable`.
pub fn popular_now(store: &Store) -> Result<PopularNow> {
    let Some(state) = common_state(store.common_home())? else { return Ok(PopularNow::default()) };
    let popular = &state.popular;
    let mut now = PopularNow {
        epoch: popular.epoch,
        blocks_popular: 0,
        blocks_condemned: popular.condemned.0.len(),
        common_bytes: state.objects().values().sum(),
    };
    if popular.index > 0 {
        let identity = IndexIdentity { incarnation: state.incarnation, epoch: Epoch(popular.index) };
        let backend = &**store.backend();
        now.blocks_popular = PopularIndex::read(backend, identity, store.shares().popular_bytes)?.entries();
    }
    Ok(now)
}

/// Elects, together with the other hosts if there are any: one election at a time, beside writers and readers. What they
/// do meanwhile counts in the next one.
///
/// An election that was cut off is taken up by the next one if nothing in the store has changed: what was counted is not
/// counted again.
///
/// Memory: on host 0 `memory_bytes`, and as much again for the index; on all what the count takes. Cost: all slot tables;
/// reads and writes each popular block that is in no common pack yet.
///
/// # Errors
/// `Busy` when another election or a collection of common packs is at work; `Corrupt` when the common home's log is
/// damaged; `Unavailable`, naming them, when hosts do not come up, are lost or stuck; `Invalid` for one that was started
/// otherwise; `NoSpace`, `ReadOnly`. Nothing is published then, and what was copied is found again.
pub fn elect(store: &Arc<Store>, options: &ElectOptions, tell: Tell) -> Result<Elected> {
    let setup = options.count.setup(store, counting(tell.clone()))?;
    match setup.hosts.as_ref().filter(|hosts| hosts.index() > 0) {
        Some(hosts) => feed(store, &setup, hosts).map(Elected::Fed),
        None => choose(store, options, &setup, &*tell).map(Elected::Chosen),
    }
}

/// The job by which host 0 tells the others which election it is. All find it by the store alone.
fn gate(store: &Store) -> Result<Job> {
    let id = Job::id_of(&[b"snapfs election hosts", store.config().store.as_bytes()]);
    Job::open_or_create(&**store.backend(), id, || Ok((1, Vec::new())))
}

/// What a host does that does not choose.
fn feed(store: &Arc<Store>, setup: &Setup, hosts: &Hosts) -> Result<FedReport> {
    let id = announce(setup, &gate(store)?, None)?;
    let job = Job::open(&**store.backend(), id)?;
    let description = Description::of(&job)?;
    let report = Count::new(store, &description, POPULARITY_MIN, Choice::new(0)).run(setup, &job)?;
    let is_own = |(number, row): &(usize, &MemberRow)| number % hosts.count() == hosts.index() && !row.is_common();
    Ok(FedReport {
        host: hosts.index() as u64,
        vms: description.members.iter().enumerate().filter(is_own).count() as u64,
        records: report.records,
        bytes_sent: report.bytes_sent,
        bytes_received: report.bytes_received,
    })
}

/// What host 0 does, or the only one.
fn choose(store: &Arc<Store>, options: &ElectOptions, setup: &Setup, tell: &dyn Fn(Progress)) -> Result<ElectReport> {
    let home = store.common_home().clone();
    let backend = &**store.backend();
    let is_there = common_state(&home)?.is_some();
    // From here on nothing of what is common goes (G6), and nobody else elects.
    let session = if is_there { Some(Session::begin_without_index(store, &home)?) } else { None };
    let election = describe(store)?;
    let description = election.description;
    let job = Job::open_or_create(backend, election.id, || Ok((election.partitions, encode(&description))))?;
    if session.is_some() {
        remove_abandoned(store, &job);
    }
    if setup.hosts.is_some() {
        let gate = gate(store)?;
        let announced = announce(setup, &gate, Some(job.id));
        // All have gone through, or start again.
        remove(store, &gate);
        announced?;
    }
    let room = usize::try_from((options.memory_bytes / CHOSEN_BYTES).min(POPULAR_ENTRIES_MAX)).unwrap_or(usize::MAX);
    let count = Count::new(store, &description, POPULARITY_MIN, Choice::new(room));
    let counting = count.run(setup, &job)?;
    let Counted { census, mut choice } = count.take();
    if let Some(sigma) = options.sigma_percent {
        choice.shrink((census.distinct() as f64 * sigma / 100.0).ceil() as usize);
    }
    let (chosen, counts) = choice.finish();
    let (vms, groups) = description.counts();
    let mut report = ElectReport {
        epoch: None,
        groups,
        vms,
        blocks_distinct: census.distinct(),
        blocks_shared: census.shared(),
        blocks_popular: 0,
        blocks_kept: 0,
        blocks_copied: 0,
        bytes_stored: 0,
        blocks_lost: 0,
        zipf_alpha: census.zipf_alpha(),
        worth: census.point(counts.values().sum()),
        records: counting.records,
        spilled_bytes: counting.spilled_bytes,
        bytes_sent: counting.bytes_sent,
        bytes_received: counting.bytes_received,
    };
    if !chosen.is_empty() || session.is_some() {
        let session = match session {
            Some(session) => session,
            None => {
                home.create(store.new_folder())?;
                Session::begin_without_index(store, &home)?
            }
        };
        let builder = Copying::begin(store, &description, chosen.len(), &mut report, tell)?.all(&chosen)?;
        report.blocks_popular = builder.len() as u64;
        report.epoch = Some(publish(store, &session, builder)?);
    }
    remove(store, &job);
    Ok(report)
}

/// Deletes an election's job. What stays is only in the way until the next one: never an error.
fn remove(store: &Store, job: &Job) {
    if let Err(e) = job.remove(&**store.backend()) {
        log::debug!("{}: stays: {e}", Job::key_of(job.id));
    }
}

/// Deletes what elections have left that were cut off and that the store has changed since.
fn remove_abandoned(store: &Store, now: &Job) {
    match Job::all(&**store.backend()) {
        Ok(jobs) => {
            let old = jobs.iter().filter(|job| job.id != now.id && Description::is_in(job));
            old.for_each(|job| remove(store, job));
        }
        Err(e) => log::debug!("jobs of earlier elections stay: {e}"),
    }
}

/// Puts the index under the next free number, then the record that makes it count; older indexes go.
fn publish(store: &Store, session: &Session, builder: IndexBuilder) -> Result<u64> {
    let home = session.vm();
    let backend = &**store.backend();
    let state = home.refresh()?;
    let mut epoch = state.popular.epoch + 1;
    // An election that was cut off between its index and its record left one.
    for _ in 0..EPOCH_TRIES {
        match backend.len(&index_key(Epoch(epoch))) {
            Err(e) if e.kind() == ErrorKind::NotFound => break,
            Err(e) => return Err(e),
            Ok(_) => epoch += 1,
        }
    }
    let identity = IndexIdentity { incarnation: state.incarnation, epoch: Epoch(epoch) };
    builder.write(backend, identity)?;
    let outcome = session.append(|state| {
        let condemned = state.popular.condemned.clone();
        Ok((vec![Op::Publish { epoch, index: epoch, condemned }], ()))
    });
    if let Err(e) = outcome {
        if e.kind() != ErrorKind::Unavailable
            && let Err(e) = backend.delete(&index_key(Epoch(epoch)))
        {
            log::debug!("{}: stays: {e}", index_key(Epoch(epoch)));
        }
        return Err(e);
    }
    remove_old(store, epoch);
    Ok(epoch)
}

/// Deletes the indexes of old epochs. What stays is only in the way: never an error.
fn remove_old(store: &Store, newest: u64) {
    let backend = &**store.backend();
    let Ok(rows) = backend.list(&Key::new("common/popular")) else { return };
    let mut epochs: Vec<Epoch> = rows.iter().filter_map(|row| parse_index_name(&row.name)).collect();
    epochs.retain(|epoch| epoch.0 <= newest);
    epochs.sort_unstable();
    for epoch in epochs.iter().rev().skip(INDEXES_KEPT) {
        if let Err(e) = backend.delete(&index_key(*epoch)) {
            log::debug!("{}: stays: {e}", index_key(*epoch));
        }
    }
}
