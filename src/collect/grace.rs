//! The store's `gc_grace`: for so long after a snapshot was forgotten, a reader may have it open whose lock nobody here
//! sees, because it is on another host and the medium keeps locks to each host (I6).

use std::cell::OnceCell;
use std::time::Duration;

use crate::catalog::state::VmState;
use crate::catalog::vm::{Vm, record_key};
use crate::clock::Timestamp;
use crate::error::Result;
use crate::store::Store;

/// How long what was forgotten stays, as of one moment.
#[derive(Debug, Default)]
pub struct Grace {
    length: Duration,
    now: Timestamp,
    // How long the medium had the newest record of the log when that was asked first: a collection writes records too.
    newest_age: OnceCell<Duration>,
}

/// Root pages that are not collected yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Young {
    /// How many.
    pub count: u64,
    /// When the first of them may go.
    pub first_in: Duration,
}

impl Young {
    pub(super) fn add(&mut self, left: Duration) {
        self.first_in = if self.count == 0 { left } else { self.first_in.min(left) };
        self.count += 1;
    }
}

impl Grace {
    /// As it is set in the store. Cost: a listing and a read.
    ///
    /// # Errors
    /// As [`Store::settings`].
    pub fn of(store: &Store) -> Result<Self> {
        let length = Duration::from_secs(store.settings()?.gc_grace_seconds);
        Ok(Self { length, now: store.clock().now(), newest_age: OnceCell::new() })
    }

    /// How long something stays that was forgotten at a time by the clock of whoever did it; `None`: no longer.
    ///
    /// A time that is not past yet comes from a clock that is ahead of ours: then what counts is how long the medium has
    /// had the newest record of the log, which is not older than that of the forget. Cost: nothing, but one look then.
    pub fn left(&self, vm: &Vm, state: &VmState, forgotten: Timestamp) -> Option<Duration> {
        if self.length.is_zero() {
            return None;
        }
        let age = match self.now.0.checked_sub(forgotten.0) {
            Some(nanos) => Duration::from_nanos(nanos),
            None => *self.newest_age.get_or_init(|| {
                let key = record_key(vm.name(), state.number);
                let ages = vm.backend().ages(&[key]).inspect_err(|e| log::debug!("the age of a record: {e}"));
                // What cannot be told is taken for new.
                ages.ok().and_then(|ages| ages.first().copied().flatten()).unwrap_or_default()
            }),
        };
        self.length.checked_sub(age).filter(|left| !left.is_zero())
    }
}
