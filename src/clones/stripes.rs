//! Locks for segments: a fixed number of them, shared by all segments.

use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

const STRIPES: usize = 64;
const STRIPES_U64: u64 = STRIPES as u64;

/// One lock for every 64th segment.
#[derive(Debug)]
pub(super) struct Stripes([RwLock<()>; STRIPES]);

impl Default for Stripes {
    fn default() -> Self {
        Self(std::array::from_fn(|_| RwLock::default()))
    }
}

impl Stripes {
    /// The lock of a segment. Whoever holds one takes no other.
    pub(super) fn of(&self, segment: u64) -> &RwLock<()> {
        let [first, ..] = &self.0;
        self.0.get((segment % STRIPES_U64) as usize).unwrap_or(first)
    }

    /// The locks of a range of segments, shared; always taken in the same order.
    pub(super) fn shared(&self, segments: Range<u64>) -> Vec<RwLockReadGuard<'_, ()>> {
        let count = (segments.end.saturating_sub(segments.start)).min(STRIPES_U64);
        let first = segments.start % STRIPES_U64;
        let is_wanted = |stripe: u64| (stripe + STRIPES_U64 - first) % STRIPES_U64 < count;
        let wanted = (0..).zip(&self.0).filter(|(stripe, _)| is_wanted(*stripe));
        wanted.map(|(_, lock)| lock.read().unwrap_or_else(PoisonError::into_inner)).collect()
    }
}
