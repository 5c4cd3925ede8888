//! Checks the holds of a VM, and finds the forgotten snapshots that they keep.

use std::collections::BTreeMap;

use crate::catalog::hold::{HoldId, holds_prefix};
use crate::catalog::roots::root_key;
use crate::catalog::state::VmState;
use crate::catalog::vm::Vm;
use crate::check::faults::{Faults, Severity, Subject};
use crate::error::{ErrorKind, Result};
use crate::units::RootId;

/// The holds of a VM as they are listed.
#[derive(Debug, Default)]
pub struct Holds {
    ids: Vec<HoldId>,
    strange: Vec<String>,
}

impl Holds {
    /// Lists them. To be done before the log is read: the root page of a hold that counts was in the log before the
    /// hold was put.
    ///
    /// # Errors
    /// `Unavailable`, `Denied`.
    pub fn list(vm: &Vm) -> Result<Self> {
        let mut holds = Self::default();
        for row in vm.backend().list(&holds_prefix(vm.name()))? {
            match HoldId::parse(&row.name).filter(|_| !row.is_folder) {
                Some(id) => holds.ids.push(id),
                None => holds.strange.push(row.name),
            }
        }
        Ok(holds)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.ids.len() + self.strange.len()
    }

    /// Whether just these were listed.
    pub fn are(&self, now: &[HoldId]) -> bool {
        self.ids == now
    }

    /// Checks each hold; the forgotten root pages that they keep, each with a name for people.
    ///
    /// Cost: one read each, and a look for the root page of those that the log does not have.
    pub fn check(&self, vm: &Vm, state: &VmState, faults: &mut Faults) -> BTreeMap<RootId, String> {
        for name in &self.strange {
            let key = format!("{}/{name}", holds_prefix(vm.name()));
            faults.note(Subject::Other(key), Severity::Should, "is no object of snapfs");
        }
        let mut forgotten = BTreeMap::new();
        for id in self.ids.iter().copied() {
            let owner = match vm.read_hold(id) {
                Ok(hold) => hold.owner,
                // Released since it was listed.
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) => {
                    let what = format!("{e}; the snapshot that its name says is kept all the same");
                    faults.note(Subject::Hold(id), Severity::Should, what);
                    "nobody knows whom".to_owned()
                }
            };
            if state.condemned.contains_key(&id.root) {
                forgotten.entry(id.root).or_insert_with(|| format!("{}/(held by {owner})", vm.name()));
            } else if vm.damage().is_none() && !state.files.values().any(|f| f.root == id.root) {
                let root = root_key(vm.name(), id.root);
                // A log that is older than the hold, of a copy of a store, has lost nothing by it.
                let (severity, what) = match vm.backend().len(&root) {
                    Err(e) if e.kind() == ErrorKind::NotFound => (Severity::Must, "is missing: its bytes are gone"),
                    _ => (Severity::Should, "is not in the log"),
                };
                let what = format!("the snapshot that it keeps for {owner} is not there: {root} {what}");
                faults.note(Subject::Hold(id), severity, what);
            }
        }
        forgotten
    }
}
