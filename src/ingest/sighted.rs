//! Second sighting: which of the blocks that a segment would store anew another VM of the group has already. These go to
//! a common pack and not to the VM's own (I5); the other VM's copy becomes a forward when its pack is rewritten.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::dedup::ladder::{Held, Origin, Plan, plan};
use crate::fingerprint::Fingerprint;
use crate::pack::reader::SlotPage;
use crate::popular::sighting::sighting_hook;
use crate::store::sightings::OtherVms;
use crate::units::{RecordNumber, SlotId};

/// Other VMs that one segment is compared with, at the most: those that have most of its hooks.
const DONORS_MAX: usize = 4;

/// Places that a [`Trail`] keeps.
const TRAIL_MAX: usize = 8;

/// Pages of slot tables of one other VM, at the most: as many as level 2 looks at.
const PAGES_MAX: usize = 64;

/// How often a comparison is made again with further pages.
const ROUNDS_MAX: usize = 4;

/// Where the last segments that had blocks of other VMs went on in these. A segment with few new blocks may have no hook,
/// and images often go on alike; it helps most where the sample had to be thinned out.
#[derive(Debug, Default)]
pub struct Trail(VecDeque<(u32, SlotId)>);

impl Trail {
    /// A segment had blocks of this VM, the last one just before this slot.
    fn go_on(&mut self, donor: u32, next: SlotId) {
        // One place in each pack.
        self.0.retain(|(other, slot)| (*other, slot.pack()) != (donor, next.pack()));
        self.0.push_back((donor, next));
        if self.0.len() > TRAIL_MAX {
            self.0.pop_front();
        }
    }

    fn add_to(&self, donors: &mut Vec<(u32, Vec<SlotId>)>) {
        for (donor, slot) in self.0.iter().rev() {
            match donors.iter_mut().find(|(other, _)| other == donor) {
                Some((_, slots)) => slots.push(*slot),
                None => donors.push((*donor, vec![*slot])),
            }
        }
    }
}

/// What is known of other VMs: those of a store, or those of a trace that a bench made.
pub trait Neighbours {
    /// Where other VMs have blocks of these hooks: by VM, those that have most of them first.
    fn look_up(&self, hooks: &[u64]) -> Vec<(u32, Vec<SlotId>)>;

    /// The page of a slot table of another VM; what cannot be read is not there.
    fn page_of(&self, donor: u32, slot: SlotId) -> Option<Arc<SlotPage>>;
}

impl Neighbours for OtherVms {
    fn look_up(&self, hooks: &[u64]) -> Vec<(u32, Vec<SlotId>)> {
        self.look_up(hooks)
    }
    fn page_of(&self, donor: u32, slot: SlotId) -> Option<Arc<SlotPage>> {
        self.page_of(donor, slot)
    }
}

/// For each block, whether it is new to its VM and another VM has it.
///
/// Cost: memory only where no hook is known; else pages of slot tables, cached.
pub fn sighted(
    others: &impl Neighbours,
    prints: &[Option<Fingerprint>],
    planned: &Plan,
    trail: &mut Trail,
) -> Vec<bool> {
    let mut seen = vec![false; prints.len()];
    // What is left to be looked for; the rest is as good as zeros.
    let mut left: Vec<Option<Fingerprint>> =
        prints.iter().zip(&planned.origins).map(|(print, origin)| print.filter(|_| *origin == Origin::New)).collect();
    let hooks: Vec<u64> = left.iter().flatten().filter_map(sighting_hook).collect();
    let mut donors = others.look_up(&hooks);
    donors.truncate(DONORS_MAX);
    trail.add_to(&mut donors);
    for (donor, slots) in donors {
        // Numbers of packs of different VMs may be equal: one VM at a time.
        let mut held = Held::default();
        let mut wanted = slots;
        let mut found = Vec::new();
        for _ in 0..ROUNDS_MAX {
            if !add_pages(others, donor, &mut held, &wanted) {
                break;
            }
            let compared = plan(&left, &[], &held, RecordNumber(0));
            wanted = compared.wanted;
            found = compared.origins;
        }
        let mut last = None;
        for ((seen, left), origin) in seen.iter_mut().zip(&mut left).zip(found) {
            if let Origin::Held(slot) = origin {
                last = Some(slot);
                *seen = true;
                *left = None;
            }
        }
        if let Some(next) = last.and_then(|slot| slot.plus(1)) {
            trail.go_on(donor, next);
        }
    }
    seen
}

/// Adds the pages of these slots; whether there was any.
fn add_pages(others: &impl Neighbours, donor: u32, held: &mut Held, wanted: &[SlotId]) -> bool {
    let before = held.len();
    for slot in wanted {
        if held.len() >= PAGES_MAX {
            break;
        }
        if !held.has(*slot)
            && let Some(page) = others.page_of(donor, *slot)
        {
            held.add(page);
        }
    }
    held.len() > before
}
