//! Common blocks that no popular index has yet: those that second sighting and batches brought since the last election.

use crate::fingerprint::Fingerprint;
use crate::units::SlotId;

/// Bytes of an entry in memory.
const ENTRY_BYTES: usize = 16;

/// From the beginning of a fingerprint to the common slots that may hold its block: hints, as those of a popular index.
#[derive(Debug, Default)]
pub struct Promoted {
    /// Sorted once it is finished.
    entries: Vec<(u64, SlotId)>,
    entries_max: usize,
    /// Only blocks whose sample has so many zero bits are kept.
    coarse_bits: u32,
}

/// The key of a block, and what decides whether it is kept: other bytes, so that keys stay evenly spread.
fn key_of(print: &Fingerprint) -> (u64, u64) {
    let [k0, k1, k2, k3, k4, k5, k6, k7, .., s0, s1, s2, s3, s4, s5, s6, s7] = print.0;
    (u64::from_le_bytes([k0, k1, k2, k3, k4, k5, k6, k7]), u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]))
}

impl Promoted {
    /// An empty map that takes about `memory_bytes_max` at the most. Of more blocks it keeps every second, fourth, ...:
    /// a hint brings its neighbours along, so that runs are still found.
    pub fn new(memory_bytes_max: usize) -> Self {
        Self { entries: Vec::new(), entries_max: (memory_bytes_max / ENTRY_BYTES).max(1), coarse_bits: 0 }
    }

    /// Adds a block.
    pub fn add(&mut self, print: &Fingerprint, slot: SlotId) {
        let (key, sample) = key_of(print);
        if sample.trailing_zeros() < self.coarse_bits {
            return;
        }
        self.entries.push((key, slot));
    }

    /// Whether it has more than it may keep: whoever adds blocks begins again with [`Promoted::coarser`].
    pub fn is_over(&self) -> bool {
        self.entries.len() > self.entries_max
    }

    /// An empty map that keeps half as many of the blocks.
    #[must_use]
    pub fn coarser(&self) -> Self {
        Self { entries: Vec::new(), entries_max: self.entries_max, coarse_bits: self.coarse_bits + 1 }
    }

    /// All was added.
    #[must_use]
    pub fn finish(mut self) -> Self {
        self.entries.sort_unstable();
        self.entries.shrink_to_fit();
        self
    }

    /// Slots that may hold the block of a fingerprint. Cost: memory only.
    pub fn candidates(&self, print: &Fingerprint) -> impl Iterator<Item = SlotId> + '_ {
        let (key, _) = key_of(print);
        let from = self.entries.partition_point(|(other, _)| *other < key);
        let rest = self.entries.get(from..).unwrap_or_default();
        rest.iter().take_while(move |(other, _)| *other == key).map(|(_, slot)| *slot)
    }

    /// Bytes that it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        self.entries.capacity() * ENTRY_BYTES
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fingerprint::fingerprint;

    #[test]
    fn blocks_are_found_and_too_many_are_thinned_out() {
        let print = |n: u32| fingerprint(&n.to_le_bytes());
        let fill = |mut map: Promoted| {
            (0..1000).for_each(|n| map.add(&print(n), SlotId(u64::from(n))));
            map
        };
        let map = fill(Promoted::new(1 << 20));
        assert!(!map.is_over() && !map.is_empty());
        let map = map.finish();
        assert!((0..1000).all(|n| map.candidates(&print(n)).eq([SlotId(u64::from(n))])));
        assert_eq!(map.candidates(&print(1000)).count(), 0);
        let mut small = fill(Promoted::new(300 * ENTRY_BYTES));
        let mut rounds = 0;
        while small.is_over() {
            small = fill(small.coarser());
            rounds += 1;
        }
        let small = small.finish();
        let found = (0..1000).filter(|n| small.candidates(&print(*n)).count() == 1).count();
        assert!((rounds, found) == (2, small.entries.len()) && (150..=300).contains(&found), "{rounds} {found}");
    }
}
