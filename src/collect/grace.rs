//! The store's `gc_grace`: for so long after a snapshot was forgotten, a reader may have it open whose lock nobody here
//! sees, because it is on another host and the medium keeps locks to each host (I6).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use crate::backend::Key;
use crate::catalog::state::VmState;
use crate::catalog::vm::Vm;
use crate::clock::Timestamp;
use crate::error::Result;
use crate::store::Store;
use crate::units::{RecordNumber, RootId};

/// How long what was forgotten of a VM stays, as of one moment.
#[derive(Debug, Default)]
pub struct Grace {
    length: Duration,
    now: Timestamp,
    // Ages on the medium, as of a record: what is forgotten while a plan is made or the lock is waited for is younger.
    ages: RefCell<Option<(RecordNumber, BTreeMap<RootId, Duration>)>>,
}

impl Grace {
    /// As it is set in the store. Cost: a listing and a read.
    ///
    /// # Errors
    /// As [`Store::settings`].
    pub fn of(store: &Store) -> Result<Self> {
        let length = Duration::from_secs(store.settings()?.gc_grace_seconds);
        Ok(Self { length, now: store.clock().now(), ages: RefCell::default() })
    }

    /// How long a root page stays that was forgotten at a time by the clock of whoever did it; `None`: no longer.
    ///
    /// A time that is not past yet comes from a clock that is ahead of ours, or from after we looked at it: then what
    /// counts is how long the medium has had the record that forgot it. Cost: nothing, but what
    /// [`Vm::condemned_since`] costs then, once for a state.
    pub fn left(&self, vm: &Vm, state: &VmState, root: RootId, forgotten: Timestamp) -> Option<Duration> {
        if self.length.is_zero() {
            return None;
        }
        let age = match self.now.0.checked_sub(forgotten.0) {
            Some(nanos) => Duration::from_nanos(nanos),
            None => self.age_on_medium(vm, state, root),
        };
        self.length.checked_sub(age).filter(|left| !left.is_zero())
    }

    fn age_on_medium(&self, vm: &Vm, state: &VmState, root: RootId) -> Duration {
        let mut known = self.ages.borrow_mut();
        if known.as_ref().is_none_or(|(number, _)| *number != state.number) {
            let read =
                self.read_ages(vm, state).inspect_err(|e| log::debug!("since when root pages are forgotten: {e}"));
            *known = Some((state.number, read.unwrap_or_default()));
        }
        // What cannot be told is taken for new.
        known.as_ref().and_then(|(_, ages)| ages.get(&root).copied()).unwrap_or_default()
    }

    fn read_ages(&self, vm: &Vm, state: &VmState) -> Result<BTreeMap<RootId, Duration>> {
        let since = vm.condemned_since(state.number)?;
        let is_asked = |root: &RootId| state.condemned.get(root).is_some_and(|time| *time > self.now);
        let (roots, keys): (Vec<RootId>, Vec<Key>) = since.into_iter().filter(|(root, _)| is_asked(root)).unzip();
        let ages = vm.backend().ages(&keys)?;
        Ok(roots.into_iter().zip(ages).filter_map(|(root, age)| Some((root, age?))).collect())
    }
}
