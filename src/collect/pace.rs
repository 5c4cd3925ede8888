//! Steps back while VMs are being written: a backup is waited for, a collection is not.

use std::sync::Arc;
use std::time::Duration;

use crate::backend::{Backend, Key};
use crate::clock::Clock;
use crate::error::Result;
use crate::store::{Store, lock_key};

/// After a piece of work, so many times its own length without any: a quarter of the disk's time at the most, as the
/// collection of a mount has it.
const PAUSE_FACTOR: u32 = 3;

/// How often it is looked whether all have ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// When to do nothing for a while.
pub(super) struct Pace {
    others: Option<Others>,
}

struct Others {
    backend: Arc<dyn Backend>,
    clock: Arc<dyn Clock>,
    locks: Vec<Key>,
    since: Duration,
}

impl Pace {
    /// Never waits: somebody else bounds the work.
    pub(super) fn bounded() -> Self {
        Self { others: None }
    }

    /// Waits for writers of all VMs but this one, whose lock the collection itself holds.
    ///
    /// # Errors
    /// `Unavailable`, `Denied` when the VMs cannot be listed.
    pub(super) fn beside(store: &Store, collected: &str) -> Result<Self> {
        let names = store.vm_names()?;
        let locks = names.iter().map(|name| name.as_str()).filter(|name| *name != collected).map(lock_key).collect();
        let clock = store.clock().clone();
        let since = clock.elapsed();
        Ok(Self { others: Some(Others { backend: store.backend().clone(), clock, locks, since }) })
    }

    /// After a piece of work.
    ///
    /// Cost: a look at the lock of each VM; while one is held, three times as long as the work took.
    pub(super) fn step(&mut self) {
        let Some(others) = &mut self.others else { return };
        let mut left = (others.clock.elapsed() - others.since) * PAUSE_FACTOR;
        while !left.is_zero() && others.are_written() {
            let nap = left.min(LOOK_EVERY);
            others.clock.sleep(nap);
            left -= nap;
        }
        others.since = others.clock.elapsed();
    }
}

impl Others {
    /// What cannot be told is nobody.
    fn are_written(&self) -> bool {
        self.locks.iter().any(|lock| self.backend.is_pinned(lock).unwrap_or(false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::Memory;
    use crate::clock::{ManualClock, Timestamp};

    #[test]
    fn three_times_as_long_as_the_work_took_and_only_while_another_vm_is_written() {
        let (backend, clock) = (Arc::new(Memory::new()), Arc::new(ManualClock::at(Timestamp(1))));
        let locks = vec![lock_key("db02"), lock_key("mail03")];
        let since = clock.elapsed();
        let others = Others { backend: backend.clone(), clock: clock.clone(), locks, since };
        let mut pace = Pace { others: Some(others) };
        let waited = |pace: &mut Pace| {
            clock.advance(Duration::from_millis(250));
            let before = clock.elapsed();
            pace.step();
            clock.elapsed() - before
        };
        assert_eq!(waited(&mut pace), Duration::ZERO);
        let own = backend.try_lock(&lock_key("web01")).unwrap();
        assert!(own.is_some());
        assert_eq!(waited(&mut pace), Duration::ZERO);
        let held = backend.try_lock(&lock_key("mail03")).unwrap();
        assert!(held.is_some());
        assert_eq!(waited(&mut pace), Duration::from_millis(750));
        assert_eq!(waited(&mut pace), Duration::from_millis(750));
        drop(held);
        assert_eq!(waited(&mut pace), Duration::ZERO);
        assert_eq!(waited(&mut Pace::bounded()), Duration::ZERO);
    }
}
