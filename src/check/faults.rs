//! What a check finds, bounded: one finding an object, however much of it is wrong.

use std::collections::{BTreeMap, BTreeSet};

use roaring::RoaringTreemap;
use serde::Serialize;

use crate::catalog::hold::{HoldId, hold_key};
use crate::catalog::roots::root_key;
use crate::catalog::state::VmState;
use crate::catalog::vm::{COMMON_HOME, home_folder, log_prefix, pack_key};
use crate::check::losses::Lost;
use crate::check::trees::packs_of;
use crate::units::{ObjectId, PackNumber, RootId, SlotId};

/// Findings that are kept. More are only counted.
pub const FINDINGS_MAX: usize = 10_000;

/// Names of snapshots that a finding tells. A damaged base image concerns all that came after it.
const SNAPSHOTS_MAX: usize = 32;

/// Lists of ranges that are kept, of all findings together (about 6 MiB). Of more snapshots only the names are told.
pub const LOST_MAX: usize = 16_384;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Bytes are lost or cannot be trusted, or the next collection would lose some.
    Must,
    /// One copy is damaged or missing, and another is whole.
    Copy,
    /// Not as it should be, but nothing is lost.
    Should,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The VM; empty for what all VMs share.
    pub vm: String,
    /// The object (or folder): its key.
    pub object: String,
    /// The snapshots that it concerns, as far as is known; not all when they are many.
    pub snapshots: Vec<String>,
    /// Which bytes of these cannot be read, as far as is known.
    pub lost: Vec<Lost>,
    /// What is wrong with it.
    pub what: String,
    /// How bad it is.
    pub severity: Severity,
}

/// What a fault is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The log.
    Log,
    /// A root page.
    Root(RootId),
    /// A pack object.
    Object(ObjectId),
    /// A pack that the log does not have.
    Unknown(PackNumber),
    /// A common pack object.
    Common(ObjectId),
    /// A hold.
    Hold(HoldId),
    /// Something else, by its key.
    Other(String),
}

#[derive(Debug, Clone, Default)]
struct Fault {
    what: String,
    count: u64,
    snapshots: BTreeSet<String>,
    lost: Vec<Lost>,
    // The first root below which it was found; `None` for what was found without one.
    root: Option<RootId>,
}

impl Subject {
    /// What the slots of a pack of a VM with this state are part of; `common` is the state of the common home.
    pub fn of_pack(pack: PackNumber, state: &VmState, common: Option<&VmState>) -> Self {
        if pack.is_common() {
            let entry = common.and_then(|common| common.packs.get(&pack));
            return entry.map_or(Self::Unknown(pack), |entry| Self::Common(entry.object));
        }
        state.packs.get(&pack).map_or(Self::Unknown(pack), |entry| Self::Object(entry.object))
    }
}

/// The faults of one VM.
#[derive(Debug, Default)]
pub struct Faults {
    found: BTreeMap<(Subject, Severity), Fault>,
    dropped: u64,
    lost_kept: usize,
    /// Snapshots whose root page cannot be read.
    pub lost_roots: BTreeSet<RootId>,
    /// Packs of which nothing can be read.
    pub lost_packs: BTreeSet<PackNumber>,
    /// Slots that cannot be read or are not what they should be.
    pub lost_slots: RoaringTreemap,
}

impl Faults {
    /// Notes a fault; of several of one subject the first is told.
    pub fn note(&mut self, subject: Subject, severity: Severity, what: impl Into<String>) {
        self.note_below(subject, severity, what, None);
    }

    /// Notes a fault that was found on the way down from a snapshot.
    pub fn note_below(
        &mut self,
        subject: Subject,
        severity: Severity,
        what: impl Into<String>,
        below: Option<(RootId, &str)>,
    ) {
        let key = (subject, severity);
        if self.found.len() >= FINDINGS_MAX && !self.found.contains_key(&key) {
            self.dropped += 1;
            return;
        }
        let fault = self.found.entry(key).or_insert_with(|| Fault {
            what: what.into(),
            root: below.map(|(root, _)| root),
            ..Fault::default()
        });
        fault.count += 1;
        if let Some((_, name)) = below {
            fault.concern(name);
        }
    }

    /// Whether it is known already that a slot is lost.
    pub fn is_lost(&self, slot: SlotId) -> bool {
        self.lost_packs.contains(&slot.pack()) || self.lost_slots.contains(slot.0)
    }

    /// Whether any object has lost anything.
    pub fn has_losses(&self) -> bool {
        !self.lost_packs.is_empty() || !self.lost_slots.is_empty()
    }

    /// Whether any of these slots is lost.
    pub fn touch(&self, slots: &RoaringTreemap) -> bool {
        !slots.is_disjoint(&self.lost_slots) || packs_of(slots).iter().any(|pack| self.lost_packs.contains(pack))
    }

    /// A snapshot stands on what an object has lost.
    pub fn concern(&mut self, subject: &Subject, lost: Lost) {
        if let Subject::Common(_) = subject
            && !self.found.contains_key(&(subject.clone(), Severity::Must))
        {
            // What is wrong with it is told once, of the common home.
            self.note(subject.clone(), Severity::Must, "blocks that this VM needs are lost in it");
        }
        if let Some(fault) = self.found.get_mut(&(subject.clone(), Severity::Must)) {
            fault.concern(&lost.snapshot);
            if fault.lost.len() < SNAPSHOTS_MAX && lost.bytes > 0 && self.lost_kept < LOST_MAX {
                self.lost_kept += 1;
                fault.lost.push(lost);
            }
        }
    }

    /// Takes out what was only seen because others changed the VM during the check: objects that the newest state
    /// does not need any more, and what was found below snapshots that are gone and holds that were released.
    pub fn forget_stale(&mut self, now: &VmState, holds: &[HoldId]) {
        let roots: BTreeSet<RootId> = now.files.values().map(|f| f.root).chain(holds.iter().map(|h| h.root)).collect();
        let objects = now.objects();
        self.found.retain(|(subject, _), fault| {
            let is_there = match subject {
                Subject::Root(id) => roots.contains(id),
                Subject::Hold(id) => holds.contains(id),
                Subject::Object(object) => objects.contains_key(object),
                Subject::Log | Subject::Unknown(_) | Subject::Common(_) | Subject::Other(_) => true,
            };
            is_there && fault.root.is_none_or(|root| roots.contains(&root))
        });
    }

    /// The findings, and how many there are besides.
    pub fn into_findings(self, vm: &str) -> (Vec<Finding>, u64) {
        let findings = self.found.into_iter().map(|((subject, severity), fault)| Finding {
            vm: if vm == COMMON_HOME { String::new() } else { vm.to_owned() },
            object: match &subject {
                Subject::Log => log_prefix(vm).to_string(),
                Subject::Root(id) => root_key(vm, *id).to_string(),
                Subject::Object(object) => pack_key(vm, *object).to_string(),
                Subject::Unknown(pack) => {
                    let home = if pack.is_common() { COMMON_HOME } else { vm };
                    format!("{}/packs/{pack}", home_folder(home))
                }
                Subject::Common(object) => pack_key(COMMON_HOME, *object).to_string(),
                Subject::Hold(id) => hold_key(vm, *id).to_string(),
                Subject::Other(key) => key.clone(),
            },
            snapshots: fault.snapshots.into_iter().collect(),
            lost: fault.lost,
            what: match fault.count {
                0 | 1 => fault.what,
                more => format!("{} (and {} more)", fault.what, more - 1),
            },
            severity,
        });
        (findings.collect(), self.dropped)
    }
}

impl Fault {
    fn concern(&mut self, name: &str) {
        if self.snapshots.len() < SNAPSHOTS_MAX {
            self.snapshots.insert(name.to_owned());
        }
    }
}
