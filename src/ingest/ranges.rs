//! Which bytes of a segment were written.

use std::ops::Range;

/// Byte ranges in order, apart from each other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ranges(Vec<Range<u32>>);

impl Ranges {
    /// Adds a range; what it touches becomes one with it.
    pub fn add(&mut self, range: Range<u32>) {
        if range.is_empty() {
            return;
        }
        let from = self.0.partition_point(|r| r.end < range.start);
        let to = self.0.partition_point(|r| r.start <= range.end);
        let touched = self.0.get(from..to).unwrap_or_default();
        let start = touched.first().map_or(range.start, |r| r.start.min(range.start));
        let end = touched.last().map_or(range.end, |r| r.end.max(range.end));
        self.0.splice(from..to, std::iter::once(start..end));
    }

    /// Whether all of `0..end` was written.
    pub fn covers(&self, end: u32) -> bool {
        matches!(self.0.as_slice(), [only] if only.start == 0 && only.end >= end)
    }

    /// The written parts of a range.
    pub fn within(&self, range: Range<u32>) -> impl Iterator<Item = Range<u32>> + '_ {
        let clip = range.clone();
        self.0.iter().map(move |r| r.start.max(clip.start)..r.end.min(clip.end)).filter(|r| !r.is_empty())
    }

    /// The parts of a range that were not written.
    pub fn gaps(&self, range: Range<u32>) -> Vec<Range<u32>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for written in self.within(range.clone()) {
            if written.start > at {
                gaps.push(at..written.start);
            }
            at = written.end;
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_equal_a_set_of_bytes() {
        // Every sequence of three ranges over twelve bytes.
        let all: Vec<Range<u32>> = (0..12).flat_map(|a| (a..=12).map(move |b| a..b)).collect();
        for a in &all {
            for b in &all {
                for c in all.iter().step_by(7) {
                    let mut ranges = Ranges::default();
                    let mut model = [false; 12];
                    for r in [a, b, c] {
                        ranges.add(r.clone());
                        (r.start..r.end).for_each(|i| model[i as usize] = true);
                    }
                    let mut seen = [false; 12];
                    ranges.within(0..12).for_each(|r| r.for_each(|i| seen[i as usize] = true));
                    assert_eq!(seen, model);
                    let mut gaps = [false; 12];
                    ranges.gaps(0..12).into_iter().for_each(|r| r.for_each(|i| gaps[i as usize] = true));
                    assert!(gaps.iter().zip(&model).all(|(g, m)| g != m));
                    assert_eq!(ranges.covers(12), model.iter().all(|m| *m));
                }
            }
        }
    }
}
