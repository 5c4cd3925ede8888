//! The levels of deduplication below the segment (W5, W6): same place, elsewhere in the VM, popular, new.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use crate::fingerprint::Fingerprint;
use crate::pack::reader::SlotPage;
use crate::recipe::Tally;
use crate::units::{RecordNumber, SlotId};

/// Where one block comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// All zeros: a hole (level 0).
    Zero,
    /// Held already, in this slot.
    Held(SlotId),
    /// The same as an earlier new block of this segment.
    Repeats(u16),
    /// To be stored.
    New,
}

/// What is to be done with a segment.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// One origin per block.
    pub origins: Vec<Origin>,
    /// Slots next to runs that were found, whose pages may extend the runs.
    pub wanted: Vec<SlotId>,
    /// What each level did.
    pub tally: Tally,
}

/// Fingerprints are uniform: their first bytes are their hash.
#[derive(Default)]
struct Prefix(u64);

impl Hasher for Prefix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.first_chunk::<8>().map_or(0, |head| u64::from_le_bytes(*head));
    }
    fn write_usize(&mut self, _: usize) {}
}

type ByPrint<V> = HashMap<Fingerprint, V, BuildHasherDefault<Prefix>>;

/// The parts of slot tables that a segment is compared with.
#[derive(Default)]
pub struct Held {
    pages: Vec<Arc<SlotPage>>,
    by_print: ByPrint<(u32, u32)>,
}

impl Held {
    /// Adds a page; one that is there already is not added again.
    pub fn add(&mut self, page: Arc<SlotPage>) {
        if self.pages.iter().any(|p| Arc::ptr_eq(p, &page) || (p.pack == page.pack && p.slots == page.slots)) {
            return;
        }
        let at = self.pages.len() as u32;
        for (position, print) in page.fingerprints.iter().enumerate() {
            self.by_print.entry(*print).or_insert((at, position as u32));
        }
        self.pages.push(page);
    }

    /// Whether a slot's page is here.
    pub fn has(&self, slot: SlotId) -> bool {
        let number = slot.pack();
        self.pages.iter().any(|p| p.pack == number && p.slots.binary_search(&slot.slot()).is_ok())
    }

    /// Whether a block of this fingerprint is held.
    pub fn holds(&self, print: &Fingerprint) -> bool {
        self.by_print.contains_key(print)
    }

    /// Pages held.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    fn slot_at(&self, page: u32, position: u32) -> Option<SlotId> {
        let page = self.pages.get(page as usize)?;
        page.slots.get(position as usize).map(|slot| SlotId::new(page.pack, *slot))
    }

    /// The slot after `(page, position)`, if it stands on the same page and has this fingerprint.
    fn follows(&self, (page, position): (u32, u32), print: &Fingerprint) -> Option<(u32, u32)> {
        let next = position + 1;
        let found = self.pages.get(page as usize)?.fingerprints.get(next as usize)?;
        (found == print).then_some((page, next))
    }
}

/// Plans one segment. `prints` has one fingerprint per block (`None`: zeros), `same_place` what the parent has at
/// the same place, `held` pages of slot tables of this VM's packs and of common packs (level 3), `session` the writer's
/// begin record, whose packs hold the snapshot being written.
///
/// Cost: linear in the blocks.
pub fn plan(
    prints: &[Option<Fingerprint>],
    same_place: &[Option<(SlotId, Fingerprint)>],
    held: &Held,
    session: RecordNumber,
) -> Plan {
    let mut origins = Vec::with_capacity(prints.len());
    let mut tally = Tally::default();
    let mut new: ByPrint<u16> = ByPrint::default();
    // Where the run that the last block belongs to stands among the held pages.
    let mut run: Option<(u32, u32)> = None;
    let mut places = Vec::with_capacity(prints.len());
    for (block, print) in prints.iter().enumerate() {
        let mut place = None;
        let origin = match print {
            None => Origin::Zero,
            Some(print) => {
                tally.blocks_data += 1;
                let same = same_place.get(block).copied().flatten().filter(|(_, p)| p == print);
                // Unchanged in place first: it keeps the parent's runs; then the run that is going on: it keeps
                // what was stored together together; then wherever it is held.
                place = run
                    .and_then(|at| held.follows(at, print))
                    .or_else(|| held.by_print.get(print).copied())
                    .filter(|_| same.is_none());
                if let Some((slot, _)) = same {
                    tally.blocks_same_place += 1;
                    Origin::Held(slot)
                } else if let Some(slot) = place.and_then(|(page, position)| held.slot_at(page, position)) {
                    if slot.pack().is_common() {
                        tally.blocks_popular += 1;
                    } else if slot.pack().begin() == session {
                        tally.blocks_repeated += 1;
                    } else {
                        tally.blocks_similar += 1;
                    }
                    Origin::Held(slot)
                } else if let Some(first) = new.get(print) {
                    tally.blocks_repeated += 1;
                    Origin::Repeats(*first)
                } else {
                    tally.blocks_new += 1;
                    new.insert(*print, block as u16);
                    Origin::New
                }
            }
        };
        run = place;
        places.push(place);
        origins.push(origin);
    }
    let wanted = wanted(&origins, &places, held);
    Plan { origins, wanted, tally }
}

/// Slots just before and just after runs that stop at the edge of a page, where the next block is new.
fn wanted(origins: &[Origin], places: &[Option<(u32, u32)>], held: &Held) -> Vec<SlotId> {
    let mut wanted = Vec::new();
    for (at, place) in places.iter().enumerate() {
        let Some((page, position)) = *place else { continue };
        let Some(slot) = held.slot_at(page, position) else { continue };
        let is_new = |at: usize| origins.get(at) == Some(&Origin::New);
        let after = slot.plus(1).filter(|next| is_new(at + 1) && !held.has(*next));
        let before = at
            .checked_sub(1)
            .filter(|at| is_new(*at))
            .and_then(|_| slot.slot().checked_sub(1))
            .map(|previous| SlotId::new(slot.pack(), previous))
            .filter(|previous| !held.has(*previous));
        wanted.extend(after.into_iter().chain(before));
    }
    wanted.sort_unstable();
    wanted.dedup();
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Serial;

    fn print(n: u32) -> Fingerprint {
        crate::fingerprint::fingerprint(&n.to_le_bytes())
    }

    fn page(pack: u64, first: u16, prints: std::ops::Range<u32>) -> Arc<SlotPage> {
        Arc::new(SlotPage {
            pack: Serial(pack),
            slots: (first..).take(prints.len()).collect(),
            fingerprints: prints.map(print).collect(),
        })
    }

    /// The number of a common pack.
    const COMMON: u64 = 1 << 47;

    fn slot(pack: u64, slot: u16) -> SlotId {
        SlotId::new(Serial(pack), slot)
    }

    #[test]
    fn each_level_takes_what_is_its_own() {
        let mut held = Held::default();
        held.add(page(1, 10, 100..104));
        held.add(page(7 << 16, 0, 200..202));
        held.add(page(COMMON, 9, 300..302));
        let prints = [
            None,
            Some(print(1)),
            Some(print(101)),
            Some(print(102)),
            Some(print(200)),
            Some(print(300)),
            Some(print(5)),
            Some(print(5)),
        ];
        let same = [None, Some((slot(3, 3), print(1))), Some((slot(3, 4), print(9)))];
        let plan = plan(&prints, &same, &held, RecordNumber(7));
        let at = |pack, number| Origin::Held(slot(pack, number));
        let (zero, new, repeats) = (Origin::Zero, Origin::New, Origin::Repeats(6));
        let want = [zero, at(3, 3), at(1, 11), at(1, 12), at(7 << 16, 0), at(COMMON, 9), new, repeats];
        assert_eq!(plan.origins, want);
        let t = &plan.tally;
        assert_eq!(
            (t.blocks_data, t.blocks_same_place, t.blocks_similar, t.blocks_repeated, t.blocks_popular, t.blocks_new),
            (7, 1, 2, 2, 1, 1)
        );
    }

    #[test]
    fn a_run_that_stops_at_the_edge_of_a_page_wants_the_next_one() {
        let mut held = Held::default();
        held.add(page(1, 10, 100..104));
        let prints: Vec<_> = (98..108).map(|n| Some(print(n))).collect();
        let first = plan(&prints, &[], &held, RecordNumber(7));
        assert_eq!(first.wanted, [slot(1, 9), slot(1, 14)]);
        held.add(page(1, 14, 104..108));
        let second = plan(&prints, &[], &held, RecordNumber(7));
        assert_eq!(second.wanted, [slot(1, 9)]);
        assert_eq!(second.tally.blocks_new, 2);
    }

    #[test]
    fn a_run_is_kept_together_when_a_block_is_held_twice() {
        let mut held = Held::default();
        held.add(page(1, 0, 50..51));
        held.add(page(2, 20, 49..52));
        let prints: Vec<_> = (49..52).map(|n| Some(print(n))).collect();
        let plan = plan(&prints, &[], &held, RecordNumber(7));
        assert_eq!(plan.origins, [Origin::Held(slot(2, 20)), Origin::Held(slot(2, 21)), Origin::Held(slot(2, 22))]);
    }
}
