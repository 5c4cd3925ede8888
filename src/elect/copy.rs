//! Copies what an election has chosen into common packs.

use std::sync::Arc;

use crate::catalog::state::Popular;
use crate::elect::members::{Description, Member, MemberRow};
use crate::elect::run::{ElectReport, Progress};
use crate::error::{ErrorKind, Result, corrupt};
use crate::fingerprint::{Fingerprint, fingerprint_blocks};
use crate::ingest::common::CommonWriter;
use crate::limits::BLOCK_BYTES;
use crate::pack::reader::Packs;
use crate::popular::choice::Chosen;
use crate::popular::index::IndexBuilder;
use crate::store::Store;
use crate::units::{SlotId, VmGroup};

/// Blocks that are read from a donor at a time, at the most: 1 MiB.
const RUN_BLOCKS: usize = 256;

/// Blocks after which full frames are compressed and written: 4 MiB of them are in memory.
const FLUSH_BLOCKS: u64 = 1024;

/// Copies chosen blocks into common packs.
pub struct Copying<'a> {
    store: &'a Store,
    members: &'a [MemberRow],
    packs: Arc<Packs>,
    popular: Popular,
    builder: IndexBuilder,
    report: &'a mut ElectReport,
    progress: &'a dyn Fn(Progress),
    total: u64,
    done: u64,
}

impl<'a> Copying<'a> {
    /// Begins with nothing.
    ///
    /// # Errors
    /// As `Vm::refresh` of the common home.
    pub fn begin(
        store: &'a Store,
        description: &'a Description,
        total: usize,
        report: &'a mut ElectReport,
        progress: &'a dyn Fn(Progress),
    ) -> Result<Self> {
        let home = store.common_home();
        Ok(Self {
            store,
            members: &description.members,
            packs: store.packs(home),
            popular: home.refresh()?.popular.clone(),
            builder: IndexBuilder::with_capacity(total),
            report,
            progress,
            total: total as u64,
            done: 0,
        })
    }

    /// Copies what is in no common pack yet, in donor order, and brings the packs; the index of all is returned.
    ///
    /// # Errors
    /// `NoSpace`, `Busy`, `Corrupt` (the common home's log is damaged), `Unavailable`. What was not brought is deleted.
    pub fn all(mut self, chosen: &[Chosen]) -> Result<IndexBuilder> {
        let row_of = |block: &Chosen| self.members.get(block.donor as usize);
        let is_one_group = |a: &Chosen, b: &Chosen| row_of(a).map(|row| row.group) == row_of(b).map(|row| row.group);
        for blocks in chosen.chunk_by(is_one_group) {
            let row = blocks.first().and_then(row_of);
            let group = row.ok_or_else(|| corrupt("an election without its members"))?.group;
            let mut writer = CommonWriter::new(self.store, self.packs.clone(), group);
            let mut donors = blocks.chunk_by(|a, b| a.donor == b.donor);
            let outcome = donors.try_for_each(|blocks| self.donor(group, blocks, &mut writer));
            match outcome.and_then(|()| writer.commit()) {
                Ok(()) => self.report.bytes_stored += writer.bytes_stored(),
                Err(e) => {
                    writer.abandon();
                    return Err(e);
                }
            }
        }
        Ok(self.builder)
    }

    /// Whether a block is where it should be. One that a VM refers to may be condemned, or be of the VM group that the VM
    /// was in before.
    fn may_stay(&self, group: VmGroup, slot: SlotId) -> bool {
        let pack = slot.pack();
        pack.is_common() && !self.popular.condemned.0.contains(slot.0) && self.popular.group_of(pack) == group
    }

    /// The blocks of one donor.
    fn donor(&mut self, group: VmGroup, blocks: &[Chosen], writer: &mut CommonWriter) -> Result<()> {
        let row = blocks.first().and_then(|block| self.members.get(block.donor as usize));
        let row = row.ok_or_else(|| corrupt("an election without its members"))?;
        let member = Member::open(self.store, row)?;
        let mut run: Vec<(SlotId, Fingerprint)> = Vec::new();
        for block in blocks {
            let slot = block.slot;
            let packs = if slot.pack().is_common() { Some(&self.packs) } else { member.as_ref().map(|m| &m.packs) };
            let Some(packs) = packs.cloned() else {
                self.lose(1, &format!("VM {:?} is not there any more", row.vm));
                continue;
            };
            let page = packs.page_of(slot);
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
            if self.may_stay(group, slot) {
                self.builder.add(group, &print, slot)?;
                self.report.blocks_kept += 1;
                self.done += 1;
                continue;
            }
            let goes_on = run.last().is_some_and(|(last, _)| last.plus(1) == Some(slot));
            if !goes_on || run.len() >= RUN_BLOCKS {
                self.copy(group, member.as_ref(), &mut run, writer)?;
            }
            run.push((slot, print));
        }
        self.copy(group, member.as_ref(), &mut run, writer)
    }

    /// Reads a run of blocks, and stores those that are what they should be.
    fn copy(
        &mut self,
        group: VmGroup,
        member: Option<&Member>,
        run: &mut Vec<(SlotId, Fingerprint)>,
        writer: &mut CommonWriter,
    ) -> Result<()> {
        let Some((first, _)) = run.first() else { return Ok(()) };
        let mut bytes = vec![0; run.len() * BLOCK_BYTES];
        let packs = member.map_or(&self.packs, |member| &member.packs);
        if let Err(e) = packs.read_blocks(*first, &mut bytes) {
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
