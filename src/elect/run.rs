//! Runs an election.

use std::sync::Arc;

use serde::Serialize;

use crate::backend::Key;
use crate::catalog::record::Op;
use crate::catalog::vm::Vm;
use crate::elect::candidates::{Candidates, Passes};
use crate::elect::members::{Member, members};
use crate::error::{ErrorKind, Result, corrupt};
use crate::fingerprint::{Fingerprint, fingerprint_blocks};
use crate::ingest::common::CommonWriter;
use crate::limits::{BLOCK_BYTES, POPULAR_ENTRIES_MAX};
use crate::popular::choice::{CHOSEN_BYTES, Census, Choice, Chosen, Point};
use crate::popular::index::{IndexBuilder, IndexIdentity, PopularIndex, index_key, parse_index_name};
use crate::store::Store;
use crate::store::common::common_state;
use crate::store::session::Session;
use crate::units::{Epoch, SlotId, VmGroup};

/// Memory that an election takes for the popular blocks if nothing else is said: four million of them.
pub const ELECTION_BYTES_DEFAULT: u64 = 64 << 20;

/// The least that can be asked for.
pub const ELECTION_BYTES_MIN: u64 = 1 << 20;

/// Memory of a pass over fingerprints.
const PASS_BYTES: u64 = 64 << 20;

/// Blocks that are read from a donor at a time, at the most: 1 MiB.
const RUN_BLOCKS: usize = 256;

/// Blocks after which full frames are compressed and written: 4 MiB of them are in memory.
const FLUSH_BLOCKS: u64 = 1024;

/// How often an epoch is numbered anew when crashed elections left an index of that number.
const EPOCH_TRIES: u64 = 1000;

/// Indexes that stay: of the newest epoch, and of the one before, which a writer may be about to read.
const INDEXES_KEPT: usize = 2;

/// How to elect.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ElectOptions {
    /// Memory that the popular blocks may take while they are chosen: 16 bytes each.
    pub memory_bytes: u64,
    /// Choose at the most this share of all distinct blocks, in percent.
    pub sigma_percent: Option<f64>,
}

impl Default for ElectOptions {
    fn default() -> Self {
        Self { memory_bytes: ELECTION_BYTES_DEFAULT, sigma_percent: None }
    }
}

/// How far an election is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Finding out who holds what: so many distinct blocks so far.
    Counting(u64),
    /// Copying: so many of so many blocks.
    Copying(u64, u64),
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
}

/// Counts without choosing: what `popular show` tells.
///
/// # Errors
/// As [`elect`].
pub fn census(store: &Store, progress: &mut dyn FnMut(Progress)) -> Result<Census> {
    let mut census = Census::default();
    let passes = Passes { memory_bytes: PASS_BYTES };
    let mut seen = 0;
    for members in members(store)?.values() {
        passes.visit(members, &mut |candidate| {
            census.add(candidate.popularity, 1);
            tell(&mut seen, progress);
            Ok(())
        })?;
    }
    Ok(census)
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

fn tell(seen: &mut u64, progress: &mut dyn FnMut(Progress)) {
    *seen += 1;
    if seen.is_multiple_of(1 << 16) {
        progress(Progress::Counting(*seen));
    }
}

/// Elects: one election at a time, beside writers and readers. What they do meanwhile counts in the next one.
///
/// Memory: `memory_bytes`, as much again for the index, a pass over fingerprints. Cost: all slot tables, once for each
/// pass; reads and writes each popular block that is in no common pack yet.
///
/// # Errors
/// `Busy` when another election or a collection of common packs is at work; `Corrupt` when the common home's log is
/// damaged; `NoSpace`, `ReadOnly`, `Unavailable`. Nothing is published then, and what was copied is found again.
pub fn elect(store: &Store, options: ElectOptions, progress: &mut dyn FnMut(Progress)) -> Result<ElectReport> {
    elect_among(store, options, &Passes { memory_bytes: PASS_BYTES }, progress)
}

/// The same with another way to find out who holds what.
///
/// # Errors
/// As [`elect`].
pub fn elect_among(
    store: &Store,
    options: ElectOptions,
    candidates: &dyn Candidates,
    progress: &mut dyn FnMut(Progress),
) -> Result<ElectReport> {
    let home = store.common_home().clone();
    let is_there = common_state(&home)?.is_some();
    let session = if is_there { Some(Session::begin_without_index(store, &home)?) } else { None };
    let groups = members(store)?;
    let room = usize::try_from((options.memory_bytes / CHOSEN_BYTES).min(POPULAR_ENTRIES_MAX)).unwrap_or(usize::MAX);
    let mut choice = Choice::new(room);
    let mut census = Census::default();
    let mut seen = 0;
    let mut offset = 0;
    for members in groups.values() {
        candidates.visit(members, &mut |candidate| {
            census.add(candidate.popularity, 1);
            let donor = Chosen { donor: candidate.donor.donor + offset, ..candidate.donor };
            choice.offer(candidate.popularity, donor);
            tell(&mut seen, progress);
            Ok(())
        })?;
        offset += members.len() as u32;
    }
    if let Some(sigma) = options.sigma_percent {
        choice.shrink((census.distinct() as f64 * sigma / 100.0).ceil() as usize);
    }
    let (chosen, counts) = choice.finish();
    let mut report = ElectReport {
        epoch: None,
        groups: groups.len() as u64,
        vms: u64::from(offset),
        blocks_distinct: census.distinct(),
        blocks_shared: census.shared(),
        blocks_popular: 0,
        blocks_kept: 0,
        blocks_copied: 0,
        bytes_stored: 0,
        blocks_lost: 0,
        zipf_alpha: census.zipf_alpha(),
        worth: census.point(counts.values().sum()),
    };
    if chosen.is_empty() && session.is_none() {
        return Ok(report);
    }
    let session = match session {
        Some(session) => session,
        None => {
            home.create(store.new_folder())?;
            Session::begin_without_index(store, &home)?
        }
    };
    let mut copying = Copying::begin(store, &home, chosen.len(), &mut report, progress)?;
    let mut first = 0;
    for (group, members) in &groups {
        let after = first + members.len() as u32;
        let from = chosen.partition_point(|block| block.donor < first);
        let to = chosen.partition_point(|block| block.donor < after);
        copying.group(*group, members, first, chosen.get(from..to).unwrap_or_default())?;
        first = after;
    }
    let builder = copying.builder;
    report.blocks_popular = builder.len() as u64;
    report.epoch = Some(publish(store, &session, builder)?);
    Ok(report)
}

/// Copies chosen blocks into common packs.
struct Copying<'a> {
    store: &'a Store,
    current: Option<Arc<PopularIndex>>,
    condemned: roaring::RoaringTreemap,
    builder: IndexBuilder,
    report: &'a mut ElectReport,
    progress: &'a mut dyn FnMut(Progress),
    total: u64,
    done: u64,
}

impl<'a> Copying<'a> {
    fn begin(
        store: &'a Store,
        home: &Vm,
        total: usize,
        report: &'a mut ElectReport,
        progress: &'a mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let state = home.refresh()?;
        let identity = IndexIdentity { incarnation: state.incarnation, epoch: Epoch(state.popular.index) };
        // Without it some blocks may be copied that are in common packs already.
        let load = || store.popular().get(&**store.backend(), identity, store.shares().popular_bytes);
        Ok(Self {
            store,
            current: if state.popular.index > 0 { load() } else { None },
            condemned: state.popular.condemned.0.clone(),
            builder: IndexBuilder::with_capacity(total),
            report,
            progress,
            total: total as u64,
            done: 0,
        })
    }

    /// The chosen blocks of one group, in donor order; its members are numbered from `first`.
    fn group(&mut self, group: VmGroup, members: &[Member], first: u32, chosen: &[Chosen]) -> Result<()> {
        let packs = self.store.packs(self.store.common_home());
        let mut writer = CommonWriter::new(self.store, packs, group);
        let outcome = chosen.chunk_by(|a, b| a.donor == b.donor).try_for_each(|blocks| {
            let number = blocks.first().map_or(0, |block| block.donor - first);
            let member = members.get(number as usize).ok_or_else(|| corrupt("an election without its members"))?;
            self.member(group, member, blocks, &mut writer)
        });
        match outcome.and_then(|()| writer.commit()) {
            Ok(()) => {
                self.report.bytes_stored += writer.bytes_stored();
                Ok(())
            }
            Err(e) => {
                writer.abandon();
                Err(e)
            }
        }
    }

    fn member(&mut self, group: VmGroup, member: &Member, blocks: &[Chosen], writer: &mut CommonWriter) -> Result<()> {
        let mut run: Vec<(SlotId, Fingerprint)> = Vec::new();
        for block in blocks {
            let slot = block.slot;
            let page = member.packs.page_of(slot);
            let print = match page.map(|page| page.and_then(|page| page.fingerprint_of(slot.slot()))) {
                Ok(Some(print)) => print,
                Ok(None) => {
                    // Compacted since it was counted.
                    self.lose(1, &format!("slot {slot:?} is not there any more"));
                    continue;
                }
                Err(e) => {
                    self.lose(1, &e.to_string());
                    continue;
                }
            };
            if let Some(there) = self.there(group, member, slot, &print) {
                self.builder.add(group, &print, there)?;
                self.report.blocks_kept += 1;
                self.done += 1;
                continue;
            }
            let goes_on = run.last().is_some_and(|(last, _)| last.plus(1) == Some(slot));
            if !goes_on || run.len() >= RUN_BLOCKS {
                self.copy(group, member, &mut run, writer)?;
            }
            run.push((slot, print));
        }
        self.copy(group, member, &mut run, writer)
    }

    /// A common slot that holds the block already and that may be referred to.
    fn there(&self, group: VmGroup, member: &Member, slot: SlotId, print: &Fingerprint) -> Option<SlotId> {
        if slot.pack().is_common() && !self.condemned.contains(slot.0) {
            return Some(slot);
        }
        let hints = self.current.iter().flat_map(|index| index.candidates(group, print));
        hints.filter(|hint| !self.condemned.contains(hint.0)).find(|hint| {
            let page = member.packs.page_of(*hint).ok().flatten();
            page.and_then(|page| page.fingerprint_of(hint.slot())).as_ref() == Some(print)
        })
    }

    /// Reads a run of blocks, and stores those that are what they should be.
    fn copy(
        &mut self,
        group: VmGroup,
        member: &Member,
        run: &mut Vec<(SlotId, Fingerprint)>,
        writer: &mut CommonWriter,
    ) -> Result<()> {
        let Some((first, _)) = run.first() else { return Ok(()) };
        let mut bytes = vec![0; run.len() * BLOCK_BYTES];
        if let Err(e) = member.packs.read_blocks(*first, &mut bytes) {
            if e.kind() == ErrorKind::Unavailable {
                return Err(e);
            }
            // A frame that is damaged must not take its neighbours along.
            if run.len() > 1 {
                for block in std::mem::take(run) {
                    self.copy(group, member, &mut vec![block], writer)?;
                }
                return Ok(());
            }
            self.lose(1, &e.to_string());
            run.clear();
            return Ok(());
        }
        let (blocks, _) = bytes.as_chunks::<BLOCK_BYTES>();
        let mut prints = Vec::with_capacity(blocks.len());
        fingerprint_blocks(&blocks.iter().collect::<Vec<_>>(), &mut prints);
        for ((block, print), (slot, wanted)) in blocks.iter().zip(prints).zip(run.drain(..)) {
            if print != wanted {
                self.lose(1, &format!("slot {slot:?}: bytes do not match their fingerprint"));
                continue;
            }
            let copied = writer.store(block, print)?;
            self.builder.add(group, &print, copied)?;
            self.report.blocks_copied += 1;
            self.done += 1;
            if self.report.blocks_copied.is_multiple_of(FLUSH_BLOCKS) {
                writer.flush_full_frames()?;
                (self.progress)(Progress::Copying(self.done, self.total));
            }
        }
        Ok(())
    }

    fn lose(&mut self, blocks: u64, why: &str) {
        if self.report.blocks_lost == 0 {
            log::warn!("a popular block is left out: {why}");
        }
        self.report.blocks_lost += blocks;
        self.done += blocks;
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
