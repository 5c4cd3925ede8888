//! Counts, on the dataflow of jobs, how many VMs of a group hold each block.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::cluster::detect::{Feed, Holder, Progress, Report, Setup, Task, run};
use crate::cluster::hosts::Hosts;
use crate::cluster::job::Job;
use crate::cluster::mesh::Patience;
use crate::cluster::record::{Member as Number, WANTED};
use crate::elect::members::{Description, Member, MemberRow};
use crate::error::{Error, Result, corrupt};
use crate::fingerprint::Fingerprint;
use crate::limits::JOB_MEMORY_BYTES;
use crate::popular::choice::{CHOSEN_BYTES, Census, Choice, Chosen};
use crate::store::Store;
use crate::units::{SlotId, VmGroup};

/// Bytes of a row of a result: popularity, donor, slot; little-endian.
const ROW_BYTES: usize = 4 + 4 + 8;

const _: () = assert!(ROW_BYTES as u64 == CHOSEN_BYTES, "docs/FORMAT.md: the rows of an election");

/// The donor of a row that tells of all blocks of a popularity how many they are.
const ALL: u32 = u32::MAX;

const _: () = assert!(WANTED == 1 << 63, "the top bit of a slot is set in common packs only");

/// How to count.
#[derive(Debug, Clone)]
pub struct CountOptions {
    /// All hosts; `None` for this process alone.
    pub hosts: Option<Hosts>,
    /// Worker threads, the same on all hosts.
    pub threads: usize,
    /// Memory for buffers on this host.
    pub memory_bytes: usize,
    /// Where scratch files are made; by default in the store's derived data, or where the system has such files if the
    /// store keeps none or cannot be written.
    pub scratch: Option<PathBuf>,
    /// How long to wait for other hosts.
    pub patience: Patience,
}

impl Default for CountOptions {
    fn default() -> Self {
        Self {
            hosts: None,
            threads: 2,
            memory_bytes: JOB_MEMORY_BYTES as usize,
            scratch: None,
            patience: Patience::default(),
        }
    }
}

impl CountOptions {
    /// A job that is run so, whose results are kept in the store.
    ///
    /// # Errors
    /// `NoSpace`, `Denied`, `Unavailable` of the scratch folder.
    pub fn setup(&self, store: &Store, progress: Arc<dyn Fn(Progress) + Send + Sync>) -> Result<Setup> {
        Ok(Setup {
            backend: Some(store.backend().clone()),
            clock: store.clock().clone(),
            hosts: self.hosts.clone(),
            threads: self.threads,
            memory_bytes: self.memory_bytes,
            scratch: self.scratch(store)?,
            patience: self.patience,
            progress,
        })
    }

    fn scratch(&self, store: &Store) -> Result<PathBuf> {
        let usable = |folder: &PathBuf| {
            let made = std::fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder));
            made.map(drop).map_err(|e| Error::io(folder.display().to_string(), e))
        };
        if let Some(folder) = &self.scratch {
            return usable(folder).map(|()| folder.clone());
        }
        let derived = store.derived_root().map(|derived| derived.join("spill"));
        Ok(derived.filter(|folder| usable(folder).is_ok()).unwrap_or_else(std::env::temp_dir))
    }
}

/// What was counted.
pub struct Counted {
    /// How many blocks are held by how many VMs.
    pub census: Census,
    /// The most popular ones.
    pub choice: Choice,
}

/// The task: each VM feeds its blocks; what is found out goes to a last member, the chooser, which host 0 has.
pub struct Count {
    store: Arc<Store>,
    members: Vec<MemberRow>,
    groups: HashMap<VmGroup, u32>,
    popularity_min: u32,
    counted: Mutex<Counted>,
}

impl Count {
    /// Counts all, and offers those that at least `popularity_min` VMs hold to `choice`.
    pub fn new(store: &Arc<Store>, description: &Description, popularity_min: u32, choice: Choice) -> Arc<Self> {
        let mut groups = HashMap::new();
        for row in &description.members {
            let next = groups.len() as u32;
            groups.entry(row.group).or_insert(next);
        }
        let counted = Mutex::new(Counted { census: Census::default(), choice });
        Arc::new(Self { store: store.clone(), members: description.members.clone(), groups, popularity_min, counted })
    }

    /// Runs it as a job; on host 0 all is counted then.
    ///
    /// # Errors
    /// As [`run`].
    pub fn run(self: &Arc<Self>, setup: &Setup, job: &Job) -> Result<Report> {
        run(setup, job, self.clone())
    }

    /// What was counted.
    pub fn take(&self) -> Counted {
        let empty = Counted { census: Census::default(), choice: Choice::new(0) };
        std::mem::replace(&mut *self.counted.lock().unwrap_or_else(PoisonError::into_inner), empty)
    }

    fn is_common(&self, member: Number) -> bool {
        self.members.get(member.0 as usize).is_some_and(MemberRow::is_common)
    }

    fn popularity(&self, holders: &[Holder]) -> u32 {
        holders.iter().filter(|holder| !self.is_common(holder.member)).count() as u32
    }
}

fn to_row(popularity: u32, donor: u32, value: u64, rows: &mut Vec<u8>) {
    rows.extend_from_slice(&popularity.to_le_bytes());
    rows.extend_from_slice(&donor.to_le_bytes());
    rows.extend_from_slice(&value.to_le_bytes());
}

impl Task for Count {
    fn members(&self) -> u32 {
        self.members.len() as u32 + 1
    }

    fn host_of(&self, member: Number, hosts: usize) -> usize {
        if member.0 as usize == self.members.len() { 0 } else { member.0 as usize % hosts }
    }

    fn group_of(&self, member: Number) -> u32 {
        let group = self.members.get(member.0 as usize).and_then(|row| self.groups.get(&row.group));
        group.copied().unwrap_or(u32::MAX)
    }

    fn feed(&self, member: Number, feed: &mut Feed<'_, '_>) -> Result<()> {
        let Some(row) = self.members.get(member.0 as usize).filter(|_| !feed.is_all_known()) else { return Ok(()) };
        match Member::open(&self.store, row)? {
            Some(member) => member.visit(&mut |print, slot| feed.give(print, slot.0)),
            None => Ok(()),
        }
    }

    fn row_bytes(&self) -> usize {
        ROW_BYTES
    }

    fn judge(&self, _: &Fingerprint, holders: &[Holder], rows: &mut Vec<u8>) {
        let popularity = self.popularity(holders);
        let Some(first) = holders.iter().find(|holder| !self.is_common(holder.member)) else { return };
        if popularity < self.popularity_min {
            return;
        }
        // One that lies in a common pack stays there. What a VM refers to may be condemned, or of another group; what
        // the common packs show is neither.
        let common = holders.iter().find_map(|holder| Some((holder, holder.wanted?)));
        let (donor, slot) = match (common, first.slot) {
            (Some((holder, slot)), _) if self.is_common(holder.member) => (first, slot | WANTED),
            (Some((holder, slot)), _) => (holder, slot | WANTED),
            (None, slot) => (first, slot.unwrap_or(0)),
        };
        to_row(popularity, donor.member.0, slot, rows);
    }

    fn repeats(&self, _: Number, _: u64, _: u64, _: &mut Vec<u8>) {}

    fn count(&self, holders: &[Holder]) -> u32 {
        self.popularity(holders)
    }

    fn counted(&self, popularity: u32, blocks: u64, rows: &mut Vec<u8>) {
        // What only common packs have is held by nobody.
        if popularity > 0 {
            to_row(popularity, ALL, blocks, rows);
        }
    }

    fn member_of(&self, _: &[u8]) -> Option<Number> {
        Some(Number(self.members.len() as u32))
    }

    fn verdict(&self, _: Number, row: &[u8]) -> Result<()> {
        let number = |from: usize| row.get(from..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b));
        let (popularity, donor) = (number(0), number(4));
        let value = row.get(8..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b));
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        if donor == ALL {
            counted.census.add(popularity, value);
        } else if donor as usize >= self.members.len() {
            return Err(corrupt(format!("an election whose result has a member {donor} that it does not have")));
        } else if popularity >= self.popularity_min {
            counted.choice.offer(popularity, Chosen { donor, slot: SlotId(value) });
        }
        Ok(())
    }
}
