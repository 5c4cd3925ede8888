//! A set of blocks of an image: which ones a clone has itself.

use std::ops::Range;

use roaring::RoaringBitmap;

/// Numbers of one bitmap: 16 TiB of image. An image of the largest size takes four of them.
const PART_BLOCKS: u64 = 1 << 32;

/// Blocks by their number: 4 KiB of the image each, from its first byte on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Blocks {
    parts: Vec<RoaringBitmap>,
}

impl Blocks {
    /// Adds the blocks of a range.
    pub fn insert(&mut self, range: Range<u64>) {
        for (part, within) in pieces(range) {
            if self.parts.len() <= part {
                self.parts.resize_with(part + 1, RoaringBitmap::new);
            }
            if let Some(bitmap) = self.parts.get_mut(part) {
                bitmap.insert_range(within);
            }
        }
    }

    /// Adds all blocks of another set.
    pub fn insert_all(&mut self, other: &Self) {
        if self.parts.len() < other.parts.len() {
            self.parts.resize_with(other.parts.len(), RoaringBitmap::new);
        }
        for (bitmap, other) in self.parts.iter_mut().zip(&other.parts) {
            *bitmap |= other;
        }
    }

    /// Whether a block is in the set.
    pub fn contains(&self, block: u64) -> bool {
        pieces(block..block + 1).all(|(part, within)| self.parts.get(part).is_some_and(|b| b.contains(*within.start())))
    }

    /// Whether all blocks of a range are in the set; those of an empty one are.
    pub fn contains_all(&self, range: Range<u64>) -> bool {
        pieces(range).all(|(part, within)| self.parts.get(part).is_some_and(|b| b.contains_range(within)))
    }

    /// The runs of blocks in the set that lie in a range, in order, apart from each other.
    pub fn runs(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut found = pieces(range).flat_map(|(part, within)| {
            let first = part as u64 * PART_BLOCKS;
            let mut runs = self.parts.get(part).map(|bitmap| bitmap.range(within.clone()));
            std::iter::from_fn(move || {
                let run = runs.as_mut()?.next_range()?;
                Some(first + u64::from(*run.start())..first + u64::from(*run.end()) + 1)
            })
        });
        let mut waiting = found.next();
        // What ends with one bitmap may go on with the next.
        std::iter::from_fn(move || {
            let mut run = waiting.take()?;
            for next in found.by_ref() {
                if next.start != run.end {
                    waiting = Some(next);
                    break;
                }
                run.end = next.end;
            }
            Some(run)
        })
    }

    /// The first run at or after a block: from there to its end.
    pub fn next_run(&self, block: u64) -> Option<Range<u64>> {
        self.runs(block..u64::MAX).next()
    }

    /// How many blocks are in the set.
    pub fn count(&self) -> u64 {
        self.parts.iter().map(RoaringBitmap::len).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.parts.iter().all(RoaringBitmap::is_empty)
    }

    /// Bytes of memory that the set takes, after it was made as small as it can be: at the most one bit for each
    /// block of the image, and next to nothing for long runs. Cost: some microseconds for each GiB of image.
    pub fn shrink(&mut self) -> u64 {
        let bytes = self.parts.iter_mut().map(|bitmap| {
            bitmap.optimize();
            let of = bitmap.statistics();
            // The library counts the bits of a bit set as its bytes.
            let bits = u64::from(of.n_bitset_containers) * BITSET_BYTES;
            of.n_bytes_array_containers
                + of.n_bytes_run_containers
                + bits
                + u64::from(of.n_containers) * CONTAINER_BYTES
        });
        bytes.sum()
    }
}

/// What a container of a bitmap takes beside its content.
const CONTAINER_BYTES: u64 = 40;

/// A container as bits: one for each of its 65 536 numbers.
const BITSET_BYTES: u64 = 8 << 10;

/// The parts that a range lies in, and the numbers within them.
fn pieces(range: Range<u64>) -> impl Iterator<Item = (usize, std::ops::RangeInclusive<u32>)> {
    let last_part = crate::limits::IMAGE_BYTES_MAX / crate::limits::BLOCK_BYTES as u64 / PART_BLOCKS;
    let end = range.end.min((last_part + 1) * PART_BLOCKS);
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let part = at / PART_BLOCKS;
        let until = end.min((part + 1) * PART_BLOCKS);
        let within = (at % PART_BLOCKS) as u32..=((until - 1) % PART_BLOCKS) as u32;
        at = until;
        Some((part as usize, within))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn they_equal_a_set_of_numbers() {
        // Around the end of a container, and of a part.
        for base in [0, 65_530, PART_BLOCKS - 6, 3 * PART_BLOCKS - 6] {
            for seed in 0..200_u64 {
                let mut rng = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                let mut next = |end: u64| {
                    rng ^= rng << 13;
                    rng ^= rng >> 7;
                    rng ^= rng << 17;
                    rng % end
                };
                let mut blocks = Blocks::default();
                let mut model = BTreeSet::new();
                for _ in 0..next(6) {
                    let start = next(12);
                    let end = start + next(6);
                    blocks.insert(base + start..base + end);
                    model.extend(base + start..base + end);
                }
                if seed % 2 == 0 {
                    blocks.shrink();
                }
                let seen: BTreeSet<u64> = blocks.runs(0..u64::MAX).flatten().collect();
                assert_eq!(seen, model, "base {base} seed {seed}");
                assert_eq!((blocks.count(), blocks.is_empty()), (model.len() as u64, model.is_empty()));
                for from in 0..20 {
                    for to in from..20 {
                        let range = base + from..base + to;
                        let all = range.clone().all(|b| model.contains(&b));
                        assert_eq!(blocks.contains_all(range.clone()), all, "{range:?}");
                        let runs: Vec<_> = blocks.runs(range.clone()).collect();
                        assert!(runs.windows(2).all(|w| w[0].end < w[1].start), "{runs:?}");
                        let seen: Vec<u64> = runs.into_iter().flatten().collect();
                        assert_eq!(seen, model.range(range.clone()).copied().collect::<Vec<_>>(), "{range:?}");
                    }
                    assert_eq!(blocks.contains(base + from), model.contains(&(base + from)));
                    let next = blocks.next_run(base + from).map(|r| r.start);
                    assert_eq!(next, model.range(base + from..).next().copied());
                }
                let mut twice = Blocks::default();
                twice.insert(base + 3..base + 9);
                twice.insert_all(&blocks);
                model.extend(base + 3..base + 9);
                assert_eq!(twice.runs(0..u64::MAX).flatten().collect::<BTreeSet<u64>>(), model);
            }
        }
    }

    #[test]
    fn runs_take_next_to_nothing_and_all_else_a_bit_a_block() {
        let mut blocks = Blocks::default();
        blocks.insert(0..1 << 34);
        assert!(blocks.shrink() < 16 << 20, "a whole image of 64 TiB");
        let mut blocks = Blocks::default();
        for block in (0..1 << 20).step_by(2) {
            blocks.insert(block..block + 1);
        }
        // 4 GiB of image, every other block.
        assert!(blocks.shrink() <= (1 << 20) / 8 + 16 * CONTAINER_BYTES);
    }
}
