//! A store of fingerprints: what sessions of the program find in it, day by day, VM by VM. Slot tables, popular index,
//! promoted and sampled blocks are the program's own; what is made up is that there are no blocks behind them.
//!
//! Sessions come one after another: what a VM stored is seen by all later ones. Level 2 is exact within each VM.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapfs::backend::Backend;
use snapfs::backend::local::Local;
use snapfs::dedup::ladder::{Held, Origin, Plan, plan};
use snapfs::fingerprint::Fingerprint;
use snapfs::ingest::sighted::{Neighbours, Trail, sighted};
use snapfs::limits::SLOT_PAGE_FINGERPRINTS;
use snapfs::pack::reader::SlotPage;
use snapfs::popular::index::{IndexBuilder, IndexIdentity, PopularIndex};
use snapfs::popular::promoted::Promoted;
use snapfs::popular::sighting::{SightingIndex, Sightings};
use snapfs::units::{Epoch, Incarnation, PackNumber, RecordNumber, Serial, SlotId, VmGroup};

use crate::levels::Trace;
use crate::make::{Block, VMS, mix};

/// Blocks of a pack.
const PACK: usize = 16_384;

/// Elections after days 1 and 8.
pub const WEEKLY: &[usize] = &[0, 7];

/// As in the writer: pages of common packs for a segment, and how often they are looked at.
const POPULAR_PAGES_MAX: usize = 512;
const ROUNDS_MAX: usize = 4;

/// As in collection: slots of a VM's pack that are compared with common packs at a time.
const COLLECTED_AT_A_TIME: usize = 4 * SLOT_PAGE_FINGERPRINTS;

/// Limits of memory.
#[derive(Clone, Copy)]
pub struct Limits {
    /// The popular index.
    pub popular_bytes: usize,
    /// Common blocks that it does not have.
    pub promoted_bytes: usize,
    /// Sampled blocks of other VMs.
    pub sighting_bytes: usize,
    /// Common slots that it does not have, the newest.
    pub promoted_slots: u64,
}

impl Limits {
    /// No limits.
    pub const NONE: Self =
        Self { popular_bytes: usize::MAX, promoted_bytes: 1 << 40, sighting_bytes: 1 << 40, promoted_slots: u64::MAX };
}

/// How a run stores what level 2 leaves.
#[derive(Clone, Copy)]
pub struct Scheme {
    /// Blocks that are elected at the most.
    pub room: usize,
    /// Elects before the first day with what all days will bring: what the papers did.
    pub oracle: bool,
    /// Second sighting.
    pub promote: bool,
    /// Else elections are made with what is known at the end of each of these days.
    pub elect_after: &'static [usize],
    /// Memory.
    pub limits: Limits,
}

/// What a run stored.
#[derive(Default, Clone, Copy)]
pub struct Outcome {
    /// Blocks stored, before any collection: those that an election copied are there twice.
    pub inline: u64,
    /// Blocks stored when all packs have been collected.
    pub collected: u64,
    /// The same of what was stored after the first day.
    pub inline_later: u64,
    /// The same of what was stored after the first day.
    pub collected_later: u64,
    /// Entries of the last popular index.
    pub popular: u64,
    /// One in this many of them in memory.
    pub sampling: u16,
    /// Largest.
    pub index_bytes: usize,
    /// Largest.
    pub promoted_bytes: usize,
    /// Largest.
    pub sighting_bytes: usize,
    /// Level 3 and second sighting, of one segment.
    pub segment_us: f64,
    /// What a session reads before.
    pub session_ms: f64,
}

/// The fingerprint that stands for a block.
pub fn print(block: Block) -> Fingerprint {
    let mut bytes = [0; 32];
    for (part, salt) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(1..) {
        *part = mix(block ^ mix(salt)).to_le_bytes();
    }
    Fingerprint(bytes)
}

/// Packs of one home: their slot tables.
#[derive(Default)]
struct Home {
    packs: BTreeMap<PackNumber, Vec<Arc<SlotPage>>>,
}

impl Home {
    /// Stores blocks in new packs, numbered from `number`; the slot of each.
    fn add(&mut self, blocks: &[Block], number: impl Fn(u16) -> PackNumber) -> Vec<SlotId> {
        let mut slots = Vec::with_capacity(blocks.len());
        for (index, blocks) in (0..).zip(blocks.chunks(PACK)) {
            let pack = number(index);
            let pages = (0..).step_by(SLOT_PAGE_FINGERPRINTS).zip(blocks.chunks(SLOT_PAGE_FINGERPRINTS));
            let pages = pages.map(|(first, blocks)| {
                Arc::new(SlotPage {
                    pack,
                    slots: (first..).take(blocks.len()).collect(),
                    fingerprints: blocks.iter().map(|block| print(*block)).collect(),
                })
            });
            self.packs.insert(pack, pages.collect());
            slots.extend((0..blocks.len()).map(|slot| SlotId::new(pack, slot as u16)));
        }
        slots
    }

    fn page_of(&self, slot: SlotId) -> Option<Arc<SlotPage>> {
        self.packs.get(&slot.pack())?.get(usize::from(slot.slot()) / SLOT_PAGE_FINGERPRINTS).cloned()
    }

    fn slots(pages: &[Arc<SlotPage>]) -> u64 {
        pages.iter().map(|page| page.slots.len() as u64).sum()
    }
}

/// What a session knows of other VMs.
struct Others<'a> {
    index: SightingIndex,
    homes: &'a [Home],
}

impl Neighbours for Others<'_> {
    fn look_up(&self, hooks: &[u64]) -> Vec<(u32, Vec<SlotId>)> {
        self.index.look_up(hooks)
    }
    fn page_of(&self, donor: u32, slot: SlotId) -> Option<Arc<SlotPage>> {
        self.homes[donor as usize].page_of(slot)
    }
}

/// What a session knows of common packs.
struct View<'a> {
    common: &'a Home,
    index: Option<&'a PopularIndex>,
    promoted: Promoted,
}

impl View<'_> {
    fn hints(&self, print: &Fingerprint) -> impl Iterator<Item = SlotId> + '_ {
        let elected = self.index.into_iter().flat_map(|index| index.candidates(VmGroup::default(), print));
        elected.chain(self.promoted.candidates(print)).collect::<Vec<_>>().into_iter()
    }

    /// The page that holds a block, found by a hint.
    fn page(&self, print: &Fingerprint) -> Option<(SlotId, Arc<SlotPage>)> {
        self.hints(print).find_map(|slot| {
            let page = self.common.page_of(slot)?;
            (page.fingerprint_of(slot.slot()) == Some(*print)).then_some((slot, page))
        })
    }

    /// W6.
    fn plan(&self, prints: &[Option<Fingerprint>]) -> Plan {
        let mut held = Held::default();
        for print in prints.iter().flatten() {
            if !held.holds(print)
                && let Some((_, page)) = self.page(print)
            {
                held.add(page);
            }
        }
        let mut planned = plan(prints, &[], &held, RecordNumber(0));
        for _ in 1..ROUNDS_MAX {
            let before = held.len();
            for slot in &planned.wanted {
                if held.len() < POPULAR_PAGES_MAX
                    && !held.has(*slot)
                    && let Some(page) = self.common.page_of(*slot)
                {
                    held.add(page);
                }
            }
            if held.len() == before {
                break;
            }
            planned = plan(prints, &[], &held, RecordNumber(0));
        }
        planned
    }

    /// Leaves those blocks of a part of a VM's slot table that do not become forwards when its pack is collected.
    fn without_forwards(&self, blocks: &[Block]) -> Vec<Block> {
        let prints: Vec<_> = blocks.iter().map(|block| Some(print(*block))).collect();
        let origins = self.plan(&prints).origins;
        blocks.iter().zip(origins).filter(|(_, origin)| *origin == Origin::New).map(|(block, _)| *block).collect()
    }
}

/// A run that is under way.
struct Run {
    scheme: Scheme,
    folder: tempfile::TempDir,
    homes: Vec<Home>,
    sightings: Vec<Sightings>,
    /// What each VM has in packs of its own, in order, of the first day and later.
    own: [Vec<Vec<Block>>; 2],
    common: Home,
    common_of: HashMap<Block, SlotId>,
    sessions: u32,
    epoch: u64,
    index: Option<PopularIndex>,
    outcome: Outcome,
    in_segments: Duration,
    in_sessions: Duration,
    segments: u32,
}

/// Stores the trace.
pub fn run(trace: &Trace, scheme: Scheme) -> Outcome {
    let mut run = Run {
        scheme,
        folder: tempfile::tempdir().unwrap(),
        homes: (0..VMS).map(|_| Home::default()).collect(),
        sightings: (0..VMS).map(|_| Sightings::empty(Incarnation([1; 16]), VmGroup::default())).collect(),
        own: std::array::from_fn(|_| vec![Vec::new(); VMS]),
        common: Home::default(),
        common_of: HashMap::new(),
        sessions: 0,
        epoch: 0,
        index: None,
        outcome: Outcome::default(),
        in_segments: Duration::ZERO,
        in_sessions: Duration::ZERO,
        segments: 0,
    };
    if scheme.oracle {
        run.elect(trace.elect(VMS, trace.fresh.len(), scheme.room), true);
    }
    for (day, vms) in trace.fresh.iter().enumerate() {
        for (vm, segments) in vms.iter().enumerate() {
            run.session(day, vm, segments);
        }
        if !scheme.oracle && scheme.room > 0 && scheme.elect_after.contains(&day) {
            run.elect(trace.elect(VMS, day + 1, scheme.room), day > 0);
            run.collect();
        }
    }
    run.finish()
}

impl Run {
    /// What a session or a collection that begins now knows of common packs.
    fn view(&self) -> View<'_> {
        let elected = self.index.as_ref().map(PopularIndex::packs).unwrap_or_default();
        let is_elected = |pack: &PackNumber| elected.binary_search_by_key(pack, |row| row.pack).is_ok();
        let mut packs = Vec::new();
        let mut slots = 0;
        for (number, pages) in self.common.packs.iter().rev().filter(|(number, _)| !is_elected(number)) {
            slots += Home::slots(pages);
            if slots > self.scheme.limits.promoted_slots {
                break;
            }
            packs.push((*number, pages));
        }
        let mut promoted = Promoted::new(self.scheme.limits.promoted_bytes);
        loop {
            for page in packs.iter().flat_map(|(_, pages)| pages.iter()) {
                for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
                    promoted.add(print, SlotId::new(page.pack, *slot));
                }
            }
            if !promoted.is_over() {
                break;
            }
            promoted = promoted.coarser();
        }
        View { common: &self.common, index: self.index.as_ref(), promoted: promoted.finish() }
    }

    fn others(&self, vm: usize) -> Others<'_> {
        let mut index = SightingIndex::new(self.scheme.limits.sighting_bytes);
        for (donor, sightings) in self.sightings.iter().enumerate().filter(|(donor, _)| *donor != vm) {
            index.add(donor as u32, sightings);
        }
        Others { index: index.finish(), homes: &self.homes }
    }

    fn session(&mut self, day: usize, vm: usize, segments: &[Vec<Block>]) {
        self.sessions += 1;
        let began = Instant::now();
        let view = self.view();
        let others = self.scheme.promote.then(|| self.others(vm));
        let (promoted_bytes, sighting_bytes) =
            (view.promoted.memory_bytes(), others.as_ref().map_or(0, |others| others.index.memory_bytes()));
        let in_session = began.elapsed();
        let (mut own, mut shared) = (Vec::new(), Vec::new());
        let mut trail = Trail::default();
        let began = Instant::now();
        for segment in segments {
            let prints: Vec<Option<Fingerprint>> = segment.iter().map(|block| Some(print(*block))).collect();
            let planned = view.plan(&prints);
            let seen = others.as_ref().map(|others| sighted(others, &prints, &planned, &mut trail)).unwrap_or_default();
            for (at, (block, origin)) in segment.iter().zip(&planned.origins).enumerate() {
                match origin {
                    Origin::New if seen.get(at) == Some(&true) => shared.push(*block),
                    Origin::New => own.push(*block),
                    _ => {}
                }
            }
        }
        let in_segments = began.elapsed();
        drop((view, others));
        self.in_sessions += in_session;
        self.in_segments += in_segments;
        self.segments += segments.len() as u32;
        let largest = &mut self.outcome;
        largest.promoted_bytes = largest.promoted_bytes.max(promoted_bytes);
        largest.sighting_bytes = largest.sighting_bytes.max(sighting_bytes);
        let session = RecordNumber(self.sessions);
        if self.scheme.promote {
            let slots = self.homes[vm].add(&own, |index| Serial::new(session, index));
            let sightings = &mut self.sightings[vm];
            own.iter().zip(slots).for_each(|(block, slot)| sightings.add(&print(*block), slot));
            sightings.settle();
        }
        self.share(&shared, day > 0);
        self.count(own.len(), day > 0);
        self.own[usize::from(day > 0)][vm].extend(own);
    }

    fn count(&mut self, blocks: usize, is_later: bool) {
        self.outcome.inline += blocks as u64;
        self.outcome.inline_later += if is_later { blocks as u64 } else { 0 };
    }

    /// Stores blocks in common packs.
    fn share(&mut self, blocks: &[Block], is_later: bool) {
        let session = RecordNumber(self.sessions);
        let slots = self.common.add(blocks, |index| Serial::common(session, index));
        blocks.iter().zip(slots).for_each(|(block, slot)| {
            self.common_of.entry(*block).or_insert(slot);
        });
        self.count(blocks.len(), is_later);
        self.outcome.collected += blocks.len() as u64;
        self.outcome.collected_later += if is_later { blocks.len() as u64 } else { 0 };
    }

    /// Publishes what was chosen; those that are common already stay where they are.
    fn elect(&mut self, chosen: Vec<Block>, is_later: bool) {
        self.sessions += 1;
        self.epoch += 1;
        let copied: Vec<Block> = chosen.iter().copied().filter(|block| !self.common_of.contains_key(block)).collect();
        self.share(&copied, is_later && !self.scheme.oracle);
        let mut builder = IndexBuilder::with_capacity(chosen.len());
        for block in &chosen {
            builder.add(VmGroup::default(), &print(*block), self.common_of[block]).unwrap();
        }
        let backend = Local::open(self.folder.path()).unwrap();
        let identity = IndexIdentity { incarnation: Incarnation([1; 16]), epoch: Epoch(self.epoch) };
        builder.write(&backend as &dyn Backend, identity).unwrap();
        let index = PopularIndex::read(&backend, identity, self.scheme.limits.popular_bytes).unwrap();
        self.outcome.popular = index.entries();
        self.outcome.sampling = index.sampling();
        self.outcome.index_bytes = self.outcome.index_bytes.max(index.memory_bytes());
        self.index = Some(index);
    }

    /// Collects all packs of VMs. Where their blocks can be looked up stays as it is: these are popular by now.
    fn collect(&mut self) {
        let mut all = std::mem::take(&mut self.own);
        let view = self.view();
        for blocks in all.iter_mut().flatten() {
            *blocks = blocks.chunks(COLLECTED_AT_A_TIME).flat_map(|part| view.without_forwards(part)).collect();
        }
        drop(view);
        self.own = all;
    }

    fn finish(mut self) -> Outcome {
        self.collect();
        let [first, later] = self.own.each_ref().map(|own| own.iter().map(|blocks| blocks.len() as u64).sum::<u64>());
        self.outcome.collected += first + later;
        self.outcome.collected_later += later;
        let per = |time: Duration, count: u32| time.as_secs_f64() / f64::from(count.max(1));
        self.outcome.segment_us = per(self.in_segments, self.segments) * 1e6;
        self.outcome.session_ms = per(self.in_sessions, self.sessions) * 1e3;
        self.outcome
    }
}
