//! G2: which slots of a VM are live. Everything here errs on the side of "live".

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use roaring::RoaringTreemap;

use crate::catalog::hold::holds_prefix;
use crate::catalog::roots::{read_root, root_key};
use crate::catalog::state::VmState;
use crate::catalog::vm::{Vm, title};
use crate::collect::grace::Grace;
use crate::error::{Error, ErrorKind, Result};
use crate::image::tree::{read_group, read_recipe};
use crate::pack::reader::Packs;
use crate::recipe::GroupPage;
use crate::units::{Incarnation, PackNumber, RootId, SlotId};

/// Root pages of a VM, sorted by whether anybody needs them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roots {
    /// Of snapshots and drafts, and condemned ones that a reader has open or may have, or a hold names (I6).
    pub live: BTreeSet<RootId>,
    /// Condemned, and needed by nobody.
    pub dead: Vec<RootId>,
    /// Condemned ones that are live only because a reader has them open.
    pub pinned: u64,
    /// Condemned ones that are live because a hold names them.
    pub held: BTreeSet<RootId>,
    /// Condemned ones that are live only because it was not long ago, and for how long yet.
    pub young: BTreeMap<RootId, Duration>,
}

impl Roots {
    /// The roots of a state. Cost: a listing of the holds, one look for a pin for each other condemned root.
    ///
    /// Who reads pins, and who clones puts a hold, and then looks whether the log still has the file; here the log was
    /// read before holds are listed and pins are asked for. So one of the two sees the other.
    ///
    /// # Errors
    /// `Unavailable`, `Denied`.
    pub fn of(vm: &Vm, state: &VmState, grace: &Grace) -> Result<Self> {
        let mut roots = Self { live: state.files.values().map(|f| f.root).collect(), ..Self::default() };
        // Named by their keys alone: a hold whose object is damaged keeps what it kept.
        let held = vm.held_roots()?;
        for (id, forgotten) in state.condemned.iter().map(|(id, time)| (*id, *time)) {
            if roots.live.contains(&id) {
                continue;
            }
            if held.contains(&id) {
                roots.live.insert(id);
                roots.held.insert(id);
            } else if vm.backend().is_pinned(&root_key(vm.name(), id))? {
                roots.live.insert(id);
                roots.pinned += 1;
            } else if let Some(left) = grace.left(vm, state, id, forgotten) {
                roots.live.insert(id);
                roots.young.insert(id, left);
            } else {
                roots.dead.push(id);
            }
        }
        Ok(roots)
    }
}

/// What an exact count found different from the group pages (G5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exactness {
    /// Group pages whose bitmap is not what their recipes use.
    pub bitmaps_wrong: u64,
    /// Recipes that could not be read; the bitmap stands for them.
    pub recipes_damaged: u64,
}

/// Reads the metadata of a VM's live roots.
pub struct Walk<'a> {
    /// The VM.
    pub vm: &'a Vm,
    /// Its packs.
    pub packs: &'a Packs,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Whether recipes are read too (G5).
    pub exact: bool,
}

impl Walk<'_> {
    /// The live slots of the packs `within`: blocks, recipes and group pages that the roots lead to.
    ///
    /// Memory: the bitmap of these packs, one bit for each group page, one root page. Cost: one read for each root
    /// page and each distinct group page (if exact, for each recipe too) that is not cached.
    ///
    /// # Errors
    /// `Corrupt`, naming snapshot page and object, when anything cannot be read that says what is live: then nothing
    /// of the VM may be collected. `Unavailable`.
    pub fn live_slots(
        &self,
        roots: &Roots,
        within: &HashSet<PackNumber>,
        exactness: &mut Exactness,
    ) -> Result<RoaringTreemap> {
        let mut live = RoaringTreemap::new();
        let mut seen = RoaringTreemap::new();
        for id in roots.live.iter().copied() {
            let stop = |e| self.stop(id, roots, e);
            let root = read_root(&**self.vm.backend(), self.vm.name(), self.incarnation, id).map_err(stop)?;
            for group in &root.groups {
                if !seen.insert(group.page.slot.0) {
                    continue;
                }
                let mut page = read_group(self.packs, &group.page).map_err(stop)?;
                if self.exact {
                    self.add_recipes(&mut page, exactness);
                }
                let metadata = page.recipes.iter().flatten().map(|p| p.slot).chain([group.page.slot]);
                for slot in metadata.filter(|slot| within.contains(&slot.pack())) {
                    live.insert(slot.0);
                }
                restrict(&mut page.slots, within);
                live |= page.slots;
            }
        }
        Ok(live)
    }

    fn stop(&self, root: RootId, roots: &Roots, error: Error) -> Error {
        let kind = match error.kind() {
            ErrorKind::NotFound | ErrorKind::Corrupt => ErrorKind::Corrupt,
            other => other,
        };
        let (vm, key) = (self.vm.name(), root_key(self.vm.name(), root));
        let why = match (roots.held.contains(&root), roots.young.contains_key(&root)) {
            (true, _) => format!(" (forgotten; {} names it)", holds_prefix(vm)),
            (_, true) => " (forgotten; within gc_grace)".to_owned(),
            _ => String::new(),
        };
        error.as_kind(kind).within(format!("VM {vm:?}: nothing is collected: what {key}{why} needs is not known"))
    }

    /// G5: what the recipes use is live, whatever the bitmap says. What only the bitmap has stays live too.
    fn add_recipes(&self, page: &mut GroupPage, exactness: &mut Exactness) {
        let mut used = GroupPage::default();
        let mut damaged = 0;
        for place in page.recipes.iter().flatten() {
            match read_recipe(self.packs, place) {
                Ok(recipe) => used.add_slots_of(&recipe),
                Err(e) => {
                    log::warn!("VM {:?}: {e}", self.vm.name());
                    damaged += 1;
                }
            }
        }
        exactness.recipes_damaged += damaged;
        if damaged == 0 && (&used.slots, &used.common) != (&page.slots, &page.common) {
            log::warn!("VM {:?}: the bitmap of a group page is not what its recipes use", self.vm.name());
            exactness.bitmaps_wrong += 1;
        }
        page.slots |= used.slots;
        page.common |= used.common;
    }
}

/// The common slots that a VM refers to: through the group pages of every root page that its log has. Forgotten ones
/// count until they are dropped, which the VM's own collection does when no writer is at work: what a writer takes over
/// from any of them stays.
///
/// Memory: these slots, one bit for each group page. Cost: one read for each root page and each distinct group page.
///
/// # Errors
/// `Corrupt`, naming what cannot be read; `Unavailable`.
pub fn common_slots(vm: &Vm, packs: &Packs, state: &VmState) -> Result<RoaringTreemap> {
    if let Some(damage) = vm.damage() {
        return Err(damage.duplicate());
    }
    let mut common = RoaringTreemap::new();
    let mut seen = RoaringTreemap::new();
    let roots: BTreeSet<RootId> = state.files.values().map(|f| f.root).chain(state.condemned.keys().copied()).collect();
    for id in roots {
        let lost = |e: Error| {
            let kind = if e.kind() == ErrorKind::NotFound { ErrorKind::Corrupt } else { e.kind() };
            e.as_kind(kind).within(format!("{}: which common blocks it needs is not known", title(vm.name())))
        };
        let root = read_root(&**vm.backend(), vm.name(), state.incarnation, id).map_err(lost)?;
        for group in &root.groups {
            if seen.insert(group.page.slot.0) {
                common |= read_group(packs, &group.page).map_err(lost)?.common;
            }
        }
    }
    Ok(common)
}

/// First and last slot that a pack can have.
pub fn slot_range(pack: PackNumber) -> std::ops::RangeInclusive<u64> {
    SlotId::new(pack, 0).0..=SlotId::new(pack, u16::MAX).0
}

/// Takes out the slots of all packs but those `within`.
fn restrict(slots: &mut RoaringTreemap, within: &HashSet<PackNumber>) {
    let mut others = Vec::new();
    let mut rest = slots.iter();
    while let Some(slot) = rest.next() {
        let pack = SlotId(slot).pack();
        if !within.contains(&pack) {
            others.push(pack);
        }
        match slot_range(pack).end().checked_add(1) {
            Some(next) => rest.advance_to(next),
            None => break,
        }
    }
    for pack in others {
        slots.remove_range(slot_range(pack));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{RecordNumber, Serial};

    #[test]
    fn only_the_wanted_packs_stay() {
        let pack = |begin, index| Serial::new(RecordNumber(begin), index);
        let all = [pack(1, 0), pack(1, 1), pack(1, 65535), pack(2, 0), pack(90_000, 3), Serial((1 << 48) - 1)];
        let mut slots = RoaringTreemap::new();
        for pack in all {
            for slot in [0, 5, 65535] {
                slots.insert(SlotId::new(pack, slot).0);
            }
        }
        for wanted in 0..1 << all.len() {
            let within: HashSet<_> =
                all.iter().enumerate().filter(|(i, _)| wanted & (1 << i) != 0).map(|(_, p)| *p).collect();
            let mut some = slots.clone();
            restrict(&mut some, &within);
            let expected: RoaringTreemap = slots.iter().filter(|s| within.contains(&SlotId(*s).pack())).collect();
            assert_eq!(some, expected);
        }
    }
}
