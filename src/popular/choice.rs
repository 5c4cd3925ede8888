//! The pure part of an election: which blocks are popular enough, and what choosing them is worth.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use crate::units::SlotId;

/// Bytes that an election counts for a block: what it takes while it is chosen.
pub const CHOSEN_BYTES: u64 = 16;

/// Blocks that so many VMs hold are worth a place in common packs.
pub const POPULARITY_MIN: u32 = 2;

/// A block that was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chosen {
    /// Who gives it, as the election numbers its members.
    pub donor: u32,
    /// Where it is: in the donor's pack, or in a common one already.
    pub slot: SlotId,
}

/// Popularity, donor, slot: the more popular is greater, of equals the one that comes first in donor order.
type Rank = (u32, Reverse<u32>, Reverse<SlotId>);

/// Keeps the most popular of the blocks that it is shown.
///
/// Memory: [`CHOSEN_BYTES`] a block.
#[derive(Debug)]
pub struct Choice {
    room: usize,
    // The least first.
    kept: BinaryHeap<Reverse<Rank>>,
}

impl Choice {
    /// Room for this many.
    pub fn new(room: usize) -> Self {
        Self { room, kept: BinaryHeap::new() }
    }

    /// Shows it a block that `popularity` VMs hold.
    pub fn offer(&mut self, popularity: u32, block: Chosen) {
        if popularity < POPULARITY_MIN || self.room == 0 {
            return;
        }
        let entry = (popularity, Reverse(block.donor), Reverse(block.slot));
        if self.kept.len() < self.room {
            self.kept.push(Reverse(entry));
        } else if self.kept.peek().is_some_and(|Reverse(least)| *least < entry) {
            self.kept.pop();
            self.kept.push(Reverse(entry));
        }
    }

    /// Leaves the `room` most popular; fewer than before or no change.
    pub fn shrink(&mut self, room: usize) {
        self.room = self.room.min(room);
        while self.kept.len() > self.room {
            self.kept.pop();
        }
    }

    /// Those chosen in donor order, so that what lies together stays together; and how many of each popularity.
    pub fn finish(self) -> (Vec<Chosen>, BTreeMap<u32, u64>) {
        let mut counts = BTreeMap::new();
        let entries = self.kept.into_iter();
        let mut chosen: Vec<Chosen> = entries
            .map(|Reverse((popularity, Reverse(donor), Reverse(slot)))| {
                *counts.entry(popularity).or_insert(0) += 1;
                Chosen { donor, slot }
            })
            .collect();
        chosen.sort_unstable();
        (chosen, counts)
    }
}

/// How many blocks are held by how many VMs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census {
    /// Distinct blocks by the number of VMs that hold them.
    pub blocks: BTreeMap<u32, u64>,
}

/// A point of the coverage curve.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Point {
    /// Popular blocks, the most popular first.
    pub blocks: u64,
    /// Their share of all distinct blocks, in percent: sigma.
    pub sigma_percent: f64,
    /// The share of what all VMs hold, each block counted once for each VM, that they are.
    pub coverage_percent: f64,
    /// The share of the duplicates between VMs that they save.
    pub duplicates_percent: f64,
    /// sigma^(1 - alpha), which a Zipf distribution predicts for the coverage.
    pub predicted_percent: Option<f64>,
}

impl Census {
    /// Counts a block that `popularity` VMs hold.
    pub fn add(&mut self, popularity: u32, blocks: u64) {
        *self.blocks.entry(popularity).or_insert(0) += blocks;
    }

    /// Adds another group's.
    pub fn add_all(&mut self, other: &Self) {
        other.blocks.iter().for_each(|(popularity, blocks)| self.add(*popularity, *blocks));
    }

    /// Distinct blocks.
    pub fn distinct(&self) -> u64 {
        self.blocks.values().sum()
    }

    /// Blocks, each counted once for each VM that holds it.
    pub fn held(&self) -> u64 {
        self.blocks.iter().map(|(popularity, blocks)| u64::from(*popularity) * blocks).sum()
    }

    /// Distinct blocks that two VMs or more hold.
    pub fn shared(&self) -> u64 {
        self.blocks.range(POPULARITY_MIN..).map(|(_, blocks)| blocks).sum()
    }

    /// Copies that sharing all of these would save.
    pub fn duplicates(&self) -> u64 {
        self.held() - self.distinct()
    }

    /// The exponent of the Zipf distribution that fits best: the slope of popularity over rank, both as logarithms, by
    /// least squares over the popularities that occur, each at the middle of its ranks. `None` with fewer than two.
    pub fn zipf_alpha(&self) -> Option<f64> {
        let mut points = Vec::new();
        let mut rank = 0;
        for (popularity, blocks) in self.blocks.iter().rev().filter(|(_, blocks)| **blocks > 0) {
            let (first, last) = ((rank + 1) as f64, (rank + blocks) as f64);
            points.push((f64::midpoint(first.ln(), last.ln()), f64::from(*popularity).ln()));
            rank += blocks;
        }
        if points.len() < 2 {
            return None;
        }
        let count = points.len() as f64;
        let mean_x = points.iter().map(|(x, _)| x).sum::<f64>() / count;
        let mean_y = points.iter().map(|(_, y)| y).sum::<f64>() / count;
        let spread: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
        let slope = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>() / spread;
        (spread > 0.0 && slope.is_finite()).then_some(-slope)
    }

    /// What the `blocks` most popular blocks are worth.
    pub fn point(&self, blocks: u64) -> Point {
        let (mut left, mut held, mut saved) = (blocks, 0, 0);
        for (popularity, there) in self.blocks.iter().rev() {
            let taken = left.min(*there);
            held += taken * u64::from(*popularity);
            saved += taken * u64::from(popularity.saturating_sub(1));
            left -= taken;
        }
        let percent = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 };
        let taken = blocks - left;
        let sigma = percent(taken, self.distinct());
        let predicted = |alpha: f64| (sigma / 100.0).powf(1.0 - alpha).clamp(0.0, 1.0) * 100.0;
        Point {
            blocks: taken,
            sigma_percent: sigma,
            coverage_percent: percent(held, self.held()),
            duplicates_percent: percent(saved, self.duplicates()),
            predicted_percent: self.zipf_alpha().map(predicted),
        }
    }

    /// The coverage curve, at these shares of the distinct blocks in percent.
    pub fn curve(&self, sigmas: &[f64]) -> Vec<Point> {
        let distinct = self.distinct() as f64;
        sigmas.iter().map(|sigma| self.point((distinct * sigma / 100.0).ceil() as u64)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Serial;

    fn block(donor: u32, slot: u16) -> Chosen {
        Chosen { donor, slot: SlotId::new(Serial(7), slot) }
    }

    #[test]
    fn the_most_popular_are_kept_and_come_in_donor_order() {
        let mut choice = Choice::new(3);
        for (popularity, donor, slot) in [(2, 0, 9), (1, 0, 1), (5, 1, 4), (2, 0, 2), (3, 0, 8), (2, 1, 0)] {
            choice.offer(popularity, block(donor, slot));
        }
        let (chosen, counts) = choice.finish();
        assert_eq!(chosen, [block(0, 2), block(0, 8), block(1, 4)]);
        assert_eq!(counts, BTreeMap::from([(2, 1), (3, 1), (5, 1)]));
        let mut none = Choice::new(0);
        none.offer(9, block(0, 0));
        assert!(none.finish().0.is_empty());
        let mut fewer = Choice::new(10);
        (2..8).for_each(|popularity| fewer.offer(popularity, block(0, popularity as u16)));
        fewer.shrink(2);
        assert_eq!(fewer.finish().0, [block(0, 6), block(0, 7)]);
    }

    #[test]
    fn a_zipf_distribution_is_recognised_and_its_coverage_predicted() {
        // Popularities as Zipf has them: c / rank^alpha, rounded down.
        for alpha in [0.6_f64, 0.7, 0.9] {
            let mut census = Census::default();
            let top = 1e6_f64;
            for rank in 1..=200_000 {
                census.add((top / f64::from(rank).powf(alpha)) as u32, 1);
            }
            let fitted = census.zipf_alpha().unwrap();
            assert!((fitted - alpha).abs() < 0.03, "{alpha}: {fitted}");
            let point = census.point(4000);
            let predicted = point.predicted_percent.unwrap();
            assert!((predicted / point.coverage_percent - 1.0).abs() < 0.25, "{alpha}: {point:?}");
        }
    }

    #[test]
    fn the_curve_ends_at_all_and_an_empty_census_has_none() {
        let mut census = Census::default();
        census.add(1, 90);
        census.add(4, 10);
        assert_eq!((census.distinct(), census.held(), census.shared(), census.duplicates()), (100, 130, 10, 30));
        let point = census.point(10);
        assert_eq!((point.blocks, point.duplicates_percent), (10, 100.0));
        assert!((point.coverage_percent - 40.0 / 1.3).abs() < 1e-9);
        let all = census.point(1000);
        assert_eq!((all.blocks, all.coverage_percent, all.sigma_percent), (100, 100.0, 100.0));
        let empty = Census::default();
        assert_eq!((empty.zipf_alpha(), empty.point(5).coverage_percent), (None, 0.0));
    }
}
