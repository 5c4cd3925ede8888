//! G3, G4: what is dead, and which objects are worth writing anew. Reads metadata, changes nothing.

use std::collections::{BTreeMap, HashSet};

use roaring::{RoaringBitmap, RoaringTreemap};

use crate::catalog::record::PackEntry;
use crate::catalog::state::VmState;
use crate::catalog::vm::Vm;
use crate::collect::grace::Grace;
use crate::collect::live::{Exactness, Roots, Walk, slot_range};
use crate::dedup::ladder::{self, Origin, plan};
use crate::error::Result;
use crate::fingerprint::{Fingerprint, fingerprint_blocks};
use crate::limits::{BLOCK_BYTES, PACK_BYTES_MAX, PACK_MEMBERS_MAX, SLOT_PAGE_FINGERPRINTS};
use crate::pack::Content;
use crate::pack::frame::FrameRow;
use crate::pack::index::{ForwardRow, HEADER_BYTES};
use crate::pack::reader::{Packs, read_slot_page};
use crate::store::common::group_of;
use crate::store::session::PopularView;
use crate::units::{ObjectId, PackNumber, RecordNumber, SlotId, VmGroup};

/// Slots whose bitmap is held at a time: 4 MiB when dense, 64 MiB in the worst case of many small packs (I8).
const SLOTS_AT_A_TIME: u64 = 32 << 20;

/// Of an object with more pages of slot tables than this, one in `PAGES_STEP` tells how much of it is popular.
const PAGES_ALL_MAX: u64 = 32;

/// See [`PAGES_ALL_MAX`]: popular blocks come in runs, and the exact count comes before anything is written.
const PAGES_STEP: u32 = 8;

/// Pages of a slot table that are compared with common packs at a time: as many slots as a segment has blocks.
const PAGES_AT_A_TIME: u32 = 4;

/// Blocks of common packs that are read and verified at a time, at the most: 1 MiB.
const VERIFY_BLOCKS: usize = 256;

/// Pages of common packs that these are compared with, at the most: one for each slot.
const COMMON_PAGES_MAX: usize = PAGES_AT_A_TIME as usize * SLOT_PAGE_FINGERPRINTS;

/// How often a comparison is made again with further pages.
const ROUNDS_MAX: usize = 4;

/// An object is rewritten when at least this share of its frames' bytes is dead or forwardable; see also
/// [`FORWARDABLE_PERCENT_MIN`].
const DEAD_PERCENT_MIN: u64 = 30;

/// The same for what is forwardable alone. It is less, since a block that became a forward never comes back, while one that
/// lies in the pack and in a common one is stored twice for good.
const FORWARDABLE_PERCENT_MIN: u64 = 10;

/// Below this share of dead slots the index is not read to see how many bytes they take.
const DEAD_SLOTS_PERCENT_MIN: u64 = 10;

/// Objects with fewer live bytes are small: each fsync of a draft makes one.
const SMALL_BYTES: u64 = 4 << 20;

/// As many small objects of one kind are merged; fewer are not worth the writing.
const SMALL_OBJECTS_MIN: usize = 8;

/// Slots of one merged object: its slot table (8 MiB) is in memory while it is written.
const MERGED_SLOTS_MAX: u64 = 1 << 18;

/// An object and the packs in it that the log has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The object.
    pub object: ObjectId,
    /// Its packs, by number.
    pub packs: Vec<PackEntry>,
}

/// How much of an object is live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// The object and its packs.
    pub held: Held,
    /// What it holds.
    pub content: Content,
    /// Live slots.
    pub live: u64,
    /// Slots.
    pub slots: u64,
    /// Bytes of all frames.
    pub frames_bytes: u64,
    /// Bytes of its frames that are live; a frame counts by its live slots.
    pub live_bytes: u64,
    /// Bytes of frames that a rewritten object would have at the most.
    pub bound_bytes: u64,
    /// Of the live slots, about so many whose blocks are in common packs too.
    pub forwardable: u64,
    /// Bytes of frames that these take, about.
    pub forwardable_bytes: u64,
    /// Slots that are forwards already, and how many of them are dead.
    pub forwards: (u64, u64),
    /// Why its index cannot be read, if so: then it stays as it is.
    pub damage: Option<String>,
}

impl Survey {
    /// Whether nothing in it is live.
    pub fn is_dead(&self) -> bool {
        self.live == 0
    }

    /// Frame bytes that a rewritten object would not have: nobody needs them, or they are in common packs too.
    pub fn dead_bytes(&self) -> u64 {
        self.frames_bytes.saturating_sub(self.live_bytes) + self.forwardable_bytes
    }

    /// Whether enough of it is dead or forwardable.
    pub fn is_worth_rewriting(&self) -> bool {
        let (forwards, dead_forwards) = self.forwards;
        let in_frames = self.frames_bytes > 0 && self.dead_bytes() * 100 >= self.frames_bytes * DEAD_PERCENT_MIN;
        let in_common = self.forwardable_bytes * 100 >= self.frames_bytes * FORWARDABLE_PERCENT_MIN;
        let in_frames = in_frames || (in_common && self.forwardable_bytes > 0);
        // Dead forwards keep common slots alive.
        let in_forwards = dead_forwards > 0 && dead_forwards * 100 >= forwards * DEAD_PERCENT_MIN;
        self.damage.is_none()
            && !self.is_dead()
            && (in_frames || in_forwards)
            && (self.live < self.slots || self.forwardable > 0)
    }

    /// The same with this many slots that were found forwardable.
    #[must_use]
    pub fn with_forwards(&self, found: u64) -> Self {
        let in_frames = self.live.saturating_sub(self.forwards.0 - self.forwards.1).max(1);
        let forwardable_bytes = self.live_bytes * found.min(in_frames) / in_frames;
        Self { forwardable: found, forwardable_bytes, ..self.clone() }
    }

    fn is_small(&self) -> bool {
        self.damage.is_none() && !self.is_dead() && self.live_bytes < SMALL_BYTES
    }
}

/// What a collection would do.
#[derive(Debug, Default)]
pub struct Plan {
    /// Which roots count.
    pub roots: Roots,
    /// The objects, in parts whose bitmaps fit into memory, and whether anything of a part is to be rewritten.
    pub parts: Vec<(Vec<Held>, bool)>,
    /// Packs of objects in which nothing is live.
    pub dead_packs: Vec<PackNumber>,
    /// Those objects.
    pub dead_objects: u64,
    /// Their bytes.
    pub dead_bytes: u64,
    /// Objects to be rewritten.
    pub rewritten: u64,
    /// Bytes that rewriting gives back, about.
    pub rewritten_bytes: u64,
    /// Dead bytes that stay in objects which are not worth rewriting.
    pub left_bytes: u64,
    /// Objects that cannot be read, with the reason.
    pub damaged: Vec<(ObjectId, String)>,
    /// What an exact count found.
    pub exactness: Exactness,
    /// The surveyed part with its live slots, when there is only one.
    pub only: Option<Surveyed>,
    /// What is live, where it is known as a whole: of common packs.
    pub known: Option<RoaringTreemap>,
}

/// What tells which blocks are in common packs.
#[derive(Clone, Copy)]
pub struct Sharing<'a> {
    /// The popular set.
    pub popular: &'a PopularView,
    /// The group of the VM that is collected.
    pub group: VmGroup,
}

impl Sharing<'_> {
    /// The common slots that hold live blocks of a pack which are in its frames. With `step`, only a part of
    /// its slot table is looked at, one in so many. Returns those found, and how many slots were looked at.
    ///
    /// Cost: reads these pages, and pages of common packs around hits.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn forwards(
        &self,
        packs: &Packs,
        pack: PackNumber,
        live: &RoaringBitmap,
        step: u32,
    ) -> Result<(BTreeMap<SlotId, SlotId>, u64)> {
        self.forwards_if(packs, pack, live, step, |found| found)
    }

    /// All of them whose blocks were read and found right: what is not stays where it is, and must not count for what
    /// rewriting gives back, or the same would be written again and again.
    ///
    /// Cost: reads the slot table, pages of common packs around hits, and the common blocks.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn proven_forwards(
        &self,
        packs: &Packs,
        pack: PackNumber,
        live: &RoaringBitmap,
    ) -> Result<BTreeMap<SlotId, SlotId>> {
        Ok(self.forwards_if(packs, pack, live, 1, |found| proven(packs, found))?.0)
    }

    fn forwards_if(
        &self,
        packs: &Packs,
        pack: PackNumber,
        live: &RoaringBitmap,
        step: u32,
        choose: impl Fn(Vec<Forward>) -> Vec<Forward>,
    ) -> Result<(BTreeMap<SlotId, SlotId>, u64)> {
        let mut found = BTreeMap::new();
        let mut seen = 0;
        let place = packs.locate(pack)?;
        let index = packs.index(&place)?;
        let member = index.member(pack)?;
        let pages = member.present_pages();
        for first in (0..pages).step_by((PAGES_AT_A_TIME * step.max(1)) as usize) {
            let (mut slots, mut prints) = (Vec::new(), Vec::new());
            for page in first..pages.min(first + PAGES_AT_A_TIME) {
                let page = read_slot_page(&**packs.backend(), &place, member, page)?;
                for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
                    if live.contains(u32::from(*slot)) {
                        slots.push(SlotId::new(pack, *slot));
                        prints.push(Some(*print));
                    }
                }
            }
            seen += slots.len() as u64;
            let origins = self.compare(packs, &prints);
            let hits = slots.into_iter().zip(prints).zip(origins).filter_map(|((slot, print), origin)| match origin {
                Origin::Held(target) => Some((slot, target, print?)),
                _ => None,
            });
            found.extend(choose(hits.collect()).into_iter().map(|(slot, target, _)| (slot, target)));
        }
        Ok((found, seen))
    }

    /// Where common packs have these blocks. A hint brings its page along, and where a run goes on the next one: so
    /// all is found where only a part of the index is in memory.
    fn compare(&self, packs: &Packs, prints: &[Option<Fingerprint>]) -> Vec<Origin> {
        let mut held = ladder::Held::default();
        for print in prints.iter().flatten() {
            if !held.holds(print)
                && let Some(slot) = self.popular.find(packs, self.group, print)
                && let Some(page) = self.popular.page_of(packs, slot)
            {
                held.add(page);
            }
        }
        let mut planned = plan(prints, &[], &held, RecordNumber(0));
        for _ in 0..ROUNDS_MAX {
            let before = held.len();
            for slot in planned.wanted.iter().filter(|slot| slot.pack().is_common()) {
                if held.len() < COMMON_PAGES_MAX
                    && !held.has(*slot)
                    && let Some(page) = self.popular.page_of(packs, *slot)
                {
                    held.add(page);
                }
            }
            if held.len() == before {
                break;
            }
            planned = plan(prints, &[], &held, RecordNumber(0));
        }
        planned.origins
    }
}

/// A slot, the common slot that it may lead to, and the fingerprint of the block.
type Forward = (SlotId, SlotId, Fingerprint);

/// Those whose common slots hold the block. Cost: reads them, a run at a time.
fn proven(packs: &Packs, found: Vec<Forward>) -> Vec<Forward> {
    let mut right = Vec::with_capacity(found.len());
    let mut run: Vec<Forward> = Vec::new();
    for forward in found {
        let goes_on = run.last().is_some_and(|(_, last, _)| last.plus(1) == Some(forward.1));
        if !goes_on || run.len() >= VERIFY_BLOCKS {
            prove(packs, &mut run, &mut right);
        }
        run.push(forward);
    }
    prove(packs, &mut run, &mut right);
    right
}

fn prove(packs: &Packs, run: &mut Vec<Forward>, right: &mut Vec<Forward>) {
    let Some((_, first, _)) = run.first() else { return };
    let mut bytes = vec![0; run.len() * BLOCK_BYTES];
    if let Err(e) = packs.read_blocks(*first, &mut bytes) {
        log::warn!("blocks stay where they are: {e}");
        run.clear();
        return;
    }
    let (blocks, _) = bytes.as_chunks::<BLOCK_BYTES>();
    let mut prints = Vec::with_capacity(blocks.len());
    fingerprint_blocks(&blocks.iter().collect::<Vec<_>>(), &mut prints);
    for ((slot, target, wanted), print) in run.drain(..).zip(prints) {
        if print == wanted {
            right.push((slot, target, wanted));
        } else {
            log::warn!("common slot {target:?}: bytes do not match their fingerprint; run snapfs check");
        }
    }
}

/// A part whose objects were surveyed.
#[derive(Debug)]
pub struct Surveyed {
    /// The objects.
    pub surveys: Vec<Survey>,
    /// The live slots of their packs.
    pub live: RoaringTreemap,
}

impl Plan {
    /// Plans for a state. Cost: the group pages, once for each part of the packs; an index for each object with
    /// dead slots. If exact, the recipes too.
    ///
    /// # Errors
    /// As [`Walk::live_slots`].
    pub fn make(
        vm: &Vm,
        packs: &Packs,
        state: &VmState,
        exact: bool,
        popular: &PopularView,
        grace: &Grace,
    ) -> Result<Self> {
        let mut plan = Self { roots: Roots::of(vm, state, grace)?, ..Self::default() };
        let parts = split(state);
        let count = parts.len();
        for part in parts {
            let mut surveyed = Surveyed::of(vm, packs, state, &part, &plan.roots, exact, &mut plan.exactness)?;
            surveyed.find_forwardable(packs, Sharing { popular, group: group_of(&state.group) });
            let bins = bins(&surveyed.surveys);
            plan.count(&surveyed.surveys, &bins);
            plan.parts.push((part, !bins.is_empty()));
            if count == 1 {
                plan.only = Some(surveyed);
            }
        }
        Ok(plan)
    }

    /// Plans for the common home, of which it is known what is live. Cost: an index for each object with dead slots.
    pub fn of_known(packs: &Packs, state: &VmState, live: RoaringTreemap) -> Self {
        let mut plan = Self::default();
        for part in split(state) {
            let surveys: Vec<Survey> = part.iter().map(|held| survey(packs, held, &live)).collect();
            let bins = bins(&surveys);
            plan.count(&surveys, &bins);
            plan.parts.push((part, !bins.is_empty()));
        }
        plan.known = Some(live);
        plan
    }

    fn count(&mut self, surveys: &[Survey], bins: &[Vec<usize>]) {
        let rewritten: HashSet<usize> = bins.iter().flatten().copied().collect();
        self.rewritten += rewritten.len() as u64;
        for (at, survey) in surveys.iter().enumerate() {
            if let Some(damage) = &survey.damage {
                self.damaged.push((survey.held.object, damage.clone()));
            }
            if survey.is_dead() {
                self.dead_objects += 1;
                self.dead_bytes += survey.held.packs.first().map_or(0, |p| p.object_bytes);
                self.dead_packs.extend(survey.held.packs.iter().map(|p| p.number));
            } else if rewritten.contains(&at) {
                // Its part of the slot table goes too.
                self.rewritten_bytes += survey.dead_bytes() + survey.slots.saturating_sub(survey.live) * 32;
            } else {
                self.left_bytes += survey.dead_bytes();
            }
        }
    }

    /// Whether packs or roots are to be dropped or rewritten.
    pub fn has_work(&self) -> bool {
        !self.dead_packs.is_empty() || !self.roots.dead.is_empty() || self.rewritten > 0
    }
}

impl Surveyed {
    /// Finds out what is live in some objects.
    ///
    /// # Errors
    /// As [`Walk::live_slots`].
    pub fn of(
        vm: &Vm,
        packs: &Packs,
        state: &VmState,
        part: &[Held],
        roots: &Roots,
        exact: bool,
        exactness: &mut Exactness,
    ) -> Result<Self> {
        let within: HashSet<PackNumber> = part.iter().flat_map(|h| &h.packs).map(|p| p.number).collect();
        // Each part counts the same pages anew.
        let mut found = Exactness::default();
        let walk = Walk { vm, packs, incarnation: state.incarnation, exact };
        let live = walk.live_slots(roots, &within, &mut found)?;
        exactness.bitmaps_wrong = exactness.bitmaps_wrong.max(found.bitmaps_wrong);
        exactness.recipes_damaged = exactness.recipes_damaged.max(found.recipes_damaged);
        let surveys = part.iter().map(|held| survey(packs, held, &live)).collect();
        Ok(Self { surveys, live })
    }
}

impl Surveyed {
    /// The same where it is known what is live.
    pub fn of_known(packs: &Packs, part: &[Held], live: &RoaringTreemap) -> Self {
        Self { surveys: part.iter().map(|held| survey(packs, held, live)).collect(), live: live.clone() }
    }

    /// The same, and how much is in common packs too.
    #[must_use]
    pub fn with_forwardable(mut self, packs: &Packs, sharing: Sharing<'_>) -> Self {
        self.find_forwardable(packs, sharing);
        self
    }

    /// Finds out how much is in common packs too, by a sample of the slot tables. What cannot be read has nothing.
    fn find_forwardable(&mut self, packs: &Packs, sharing: Sharing<'_>) {
        if !sharing.popular.has_blocks() {
            return;
        }
        let live = &self.live;
        for survey in self.surveys.iter_mut().filter(|s| s.content == Content::Data && s.live > 0 && s.damage.is_none())
        {
            let pages = survey.slots / SLOT_PAGE_FINGERPRINTS as u64;
            let step = if pages <= PAGES_ALL_MAX { 1 } else { PAGES_STEP };
            let (mut hits, mut seen) = (0, 0);
            for entry in &survey.held.packs {
                match sharing.forwards(packs, entry.number, &live_of(live, entry.number), step) {
                    Ok((found, looked)) => {
                        hits += found.len() as u64;
                        seen += looked;
                    }
                    Err(e) => log::debug!("pack {}: nothing is forwarded: {e}", entry.number),
                }
            }
            let in_frames = survey.live - (survey.forwards.0 - survey.forwards.1).min(survey.live);
            survey.forwardable = in_frames * hits / seen.max(1);
            survey.forwardable_bytes = survey.live_bytes * hits / seen.max(1);
        }
    }
}

/// The objects of a state by number, in parts of at most [`SLOTS_AT_A_TIME`].
fn split(state: &VmState) -> Vec<Vec<Held>> {
    let mut objects: BTreeMap<ObjectId, Vec<PackEntry>> = BTreeMap::new();
    for entry in state.packs.values() {
        objects.entry(entry.object).or_default().push(*entry);
    }
    let mut parts: Vec<Vec<Held>> = Vec::new();
    let mut slots = u64::MAX;
    for (object, packs) in objects {
        let more: u64 = packs.iter().map(|p| u64::from(p.slots)).sum();
        if slots.saturating_add(more) > SLOTS_AT_A_TIME {
            parts.push(Vec::new());
            slots = 0;
        }
        slots += more;
        if let Some(part) = parts.last_mut() {
            part.push(Held { object, packs });
        }
    }
    parts
}

/// The live slots of a pack.
pub fn live_of(live: &RoaringTreemap, pack: PackNumber) -> RoaringBitmap {
    let range = slot_range(pack);
    let mut slots = live.iter();
    slots.advance_to(*range.start());
    slots.take_while(|slot| slot <= range.end()).map(|slot| u32::from(SlotId(slot).slot())).collect()
}

/// Which of the slots that a frame has are live, as a mask of its span.
pub fn live_mask(row: &FrameRow, live: &RoaringBitmap) -> u64 {
    let mut mask = 0;
    for slot in row.slots().filter(|slot| live.contains(u32::from(*slot))) {
        mask |= 1 << (slot - row.first_slot);
    }
    mask
}

fn survey(packs: &Packs, held: &Held, live: &RoaringTreemap) -> Survey {
    let slots: u64 = held.packs.iter().map(|p| u64::from(p.slots)).sum();
    let alive: u64 = held.packs.iter().map(|p| live.range_cardinality(slot_range(p.number))).sum();
    let first = held.packs.first();
    let around = first.map_or(0, |p| u64::from(p.tail_bytes)) + HEADER_BYTES as u64 + slots * 32;
    let frames_bytes = first.map_or(0, |p| p.object_bytes).saturating_sub(around);
    let mut survey = Survey {
        held: held.clone(),
        content: first.map_or(Content::Data, |p| p.content),
        live: alive,
        slots,
        frames_bytes,
        live_bytes: frames_bytes * alive.min(slots) / slots.max(1),
        bound_bytes: frames_bytes,
        forwardable: 0,
        forwardable_bytes: 0,
        forwards: (0, 0),
        damage: None,
    };
    // Only what a collection wrote can have forwards.
    let may_forward = held.object.generation.0 > 0 && survey.content == Content::Data;
    let dead = slots.saturating_sub(alive);
    if alive > slots {
        survey.damage = Some(format!("{alive} slots are in use, it has {slots}"));
    } else if alive > 0 && (dead * 100 >= slots * DEAD_SLOTS_PERCENT_MIN || may_forward) {
        match measure(packs, held, live) {
            Ok((live_bytes, bound_bytes, forwards)) => {
                survey.forwards = forwards;
                survey.live_bytes = live_bytes;
                survey.bound_bytes = bound_bytes;
            }
            Err(e) => survey.damage = Some(e.to_string()),
        }
    }
    survey
}

/// Bytes of live frames, by their live slots, and whole; forwards, and how many of them are dead.
fn measure(packs: &Packs, held: &Held, live: &RoaringTreemap) -> Result<(u64, u64, (u64, u64))> {
    let (mut live_bytes, mut bound_bytes) = (0, 0);
    let mut forwards = (0, 0);
    for entry in &held.packs {
        let place = packs.locate(entry.number)?;
        let index = packs.index_once(&place)?;
        let slots = live_of(live, entry.number);
        for slot in index.member(entry.number)?.forwards.iter().flat_map(ForwardRow::slots) {
            forwards.0 += 1;
            forwards.1 += u64::from(!slots.contains(u32::from(slot)));
        }
        for row in &index.member(entry.number)?.frames {
            let count = u64::from(live_mask(row, &slots).count_ones());
            if count > 0 {
                live_bytes += u64::from(row.stored_bytes) * count / u64::from(row.count()).max(1);
                bound_bytes += u64::from(row.stored_bytes);
            }
        }
    }
    Ok((live_bytes, bound_bytes, forwards))
}

/// Which surveyed objects are rewritten, those of each inner list into one object.
///
/// Small ones are kept apart from large ones: then what comes out is such that the next collection finds nothing.
pub fn bins(surveys: &[Survey]) -> Vec<Vec<usize>> {
    let mut bins = Vec::new();
    for content in [Content::Data, Content::Recipes] {
        let of_content = || surveys.iter().enumerate().filter(move |(_, s)| s.content == content);
        let small: Vec<usize> = of_content().filter(|(_, s)| s.is_small()).map(|(at, _)| at).collect();
        let all = small.len() >= SMALL_OBJECTS_MIN;
        let is_worth = |at: &usize| surveys.get(*at).is_some_and(Survey::is_worth_rewriting);
        let small: Vec<usize> = small.into_iter().filter(|at| all || is_worth(at)).collect();
        let large = of_content().filter(|(_, s)| !s.is_small()).map(|(at, _)| at).filter(is_worth).collect();
        for list in [small, large] {
            let packed = next_fit(surveys, &list);
            bins.extend(packed.into_iter().filter(|bin| bin.len() > 1 || bin.iter().any(is_worth)));
        }
    }
    bins
}

fn next_fit(surveys: &[Survey], list: &[usize]) -> Vec<Vec<usize>> {
    let mut bins: Vec<Vec<usize>> = Vec::new();
    let mut room = (0, 0, 0);
    for at in list {
        let Some(survey) = surveys.get(*at) else { continue };
        let (bytes, members, slots) = (survey.bound_bytes, survey.held.packs.len(), survey.live);
        if bytes > room.0 || members > room.1 || slots > room.2 || bins.is_empty() {
            bins.push(Vec::new());
            room = (PACK_BYTES_MAX, PACK_MEMBERS_MAX, MERGED_SLOTS_MAX);
        }
        room = (room.0.saturating_sub(bytes), room.1.saturating_sub(members), room.2.saturating_sub(slots));
        if let Some(bin) = bins.last_mut() {
            bin.push(*at);
        }
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Generation, RecordNumber, Serial};

    fn survey(index: u16, frames_bytes: u64, live_percent: u64) -> Survey {
        let number = Serial::new(RecordNumber(1), index);
        let object = ObjectId { number, generation: Generation(0) };
        let entry = PackEntry {
            number,
            object,
            content: Content::Data,
            slots: 100,
            object_bytes: frames_bytes + 4000,
            tail_bytes: 739,
        };
        Survey {
            held: Held { object, packs: vec![entry] },
            content: Content::Data,
            live: live_percent,
            slots: 100,
            frames_bytes,
            live_bytes: frames_bytes * live_percent / 100,
            bound_bytes: frames_bytes * live_percent / 100,
            forwardable: 0,
            forwardable_bytes: 0,
            forwards: (0, 0),
            damage: None,
        }
    }

    #[test]
    fn what_is_mostly_live_stays_and_what_is_not_is_rewritten() {
        let surveys = [(100, false), (71, false), (70, true), (1, true), (0, false)];
        for (percent, wanted) in surveys {
            let found = !bins(&[survey(0, 60 << 20, percent)]).is_empty();
            assert_eq!(found, wanted, "{percent} % live");
        }
        let damaged = Survey { damage: Some("x".into()), ..survey(0, 60 << 20, 10) };
        assert!(bins(&[damaged]).is_empty());
    }

    #[test]
    fn eight_small_ones_become_one_and_seven_do_not() {
        let small: Vec<_> = (0..8).map(|i| survey(i, 1 << 20, 100)).collect();
        assert!(bins(&small[..7]).is_empty());
        assert_eq!(bins(&small), [(0..8).collect::<Vec<_>>()]);
        // Of twenty of 3.9 MiB come two; a single one that is left over is not written anew.
        let many: Vec<_> = (0..17).map(|i| survey(i, (4 << 20) - 1, 100)).collect();
        assert_eq!(bins(&many), [(0..16).collect::<Vec<_>>()]);
    }

    #[test]
    fn no_object_gets_over_its_limits() {
        let many: Vec<_> = (0..3000).map(|i| survey(i, 1000, 100)).collect();
        let found = bins(&many);
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [1024, 1024, 952]);
        let dense: Vec<_> = (0..10).map(|i| Survey { live: 65536, slots: 65536, ..survey(i, 1000, 100) }).collect();
        assert_eq!(bins(&dense).iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
    }
}
