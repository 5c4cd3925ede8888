//! Checks snapshots: root page, group pages, recipes, and that all slots that they use are there (I1, I2, I5).

use std::collections::{BTreeMap, HashMap};

use roaring::RoaringTreemap;

use crate::catalog::roots::read_root;
use crate::catalog::state::{FileEntry, VmState};
use crate::catalog::vm::Vm;
use crate::check::faults::{Faults, Severity, Subject};
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::image::tree::{read_group, read_recipe};
use crate::pack::Content;
use crate::pack::reader::Packs;
use crate::recipe::{GroupPage, GroupRef, RootPage};
use crate::store::full_name;
use crate::units::{PackNumber, RootId, SlotId};

/// Group pages whose number of blocks is remembered (16 MiB). Beyond, sums are not compared.
const PAGES_COUNTED_MAX: usize = 1 << 18;

/// Checks the snapshots of one VM. A page that many share is checked once.
pub struct TreeCheck<'a> {
    vm: &'a Vm,
    packs: &'a Packs,
    state: &'a VmState,
    common: Option<&'a VmState>,
    held: &'a BTreeMap<RootId, String>,
    seen: RoaringTreemap,
    blocks: HashMap<u64, u32>,
}

type Below<'a> = Option<(RootId, &'a str)>;

impl<'a> TreeCheck<'a> {
    /// A check of the snapshots of `state`, and of the forgotten ones that are `held`, with a name for each; `common` is
    /// the state of the common home.
    pub fn new(
        vm: &'a Vm,
        packs: &'a Packs,
        state: &'a VmState,
        common: Option<&'a VmState>,
        held: &'a BTreeMap<RootId, String>,
    ) -> Self {
        Self { vm, packs, state, common, held, seen: RoaringTreemap::new(), blocks: HashMap::new() }
    }

    /// Checks them all.
    pub fn check(&mut self, faults: &mut Faults) {
        for file in self.state.files.values() {
            self.check_snapshot(file.root, &full_name(self.vm.name(), file), Some(file), faults);
        }
        for (root, name) in self.held {
            self.check_snapshot(*root, name, None, faults);
        }
    }

    fn read_root(&self, id: RootId) -> Result<RootPage> {
        read_root(&**self.vm.backend(), self.vm.name(), self.state.incarnation, id)
    }

    fn subject(&self, pack: PackNumber) -> Subject {
        Subject::of_pack(pack, self.state, self.common)
    }

    /// Checks one snapshot; `file` is what the log says of it. Cost: its root page, and the group pages and recipes
    /// that were not seen before.
    fn check_snapshot(&mut self, id: RootId, name: &str, file: Option<&FileEntry>, faults: &mut Faults) {
        let below = Some((id, name));
        let subject = Subject::Root(id);
        let root = match self.read_root(id) {
            Ok(root) => root,
            Err(e) => {
                let what = if e.kind() == ErrorKind::NotFound { "is missing".into() } else { e.to_string() };
                faults.lost_roots.insert(id);
                return faults.note_below(subject, Severity::Must, what, below);
            }
        };
        if let Some(file) = file.filter(|file| root.image_bytes != file.image_bytes) {
            let what = format!("the image has {} bytes, the log says {}", root.image_bytes, file.image_bytes);
            faults.note_below(subject.clone(), Severity::Must, what, below);
        }
        if let Some(file) = file.filter(|file| root.file != file.id) {
            let what = format!("is of file {}, the log says {}", root.file, file.id);
            faults.note_below(subject.clone(), Severity::Should, what, below);
        }
        let mut blocks = Some(0);
        for group in &root.groups {
            let slot = group.page.slot;
            if self.seen.insert(slot.0) {
                self.check_group(group, below, faults);
            }
            let more = self.blocks.get(&slot.0).copied();
            blocks = blocks.zip(more).map(|(sum, more)| sum + u64::from(more));
        }
        // The log says nothing of one that is forgotten.
        let told = (root.data_blocks, file.map_or(root.data_blocks, |f| f.data_blocks));
        if blocks.is_some_and(|blocks| told != (blocks, blocks)) {
            let (root, log) = told;
            let what = format!("{} blocks with data, it says {root}, the log {log}", blocks.unwrap_or(0));
            faults.note_below(subject, Severity::Must, what, below);
        }
    }

    fn check_group(&mut self, group: &GroupRef, below: Below<'_>, faults: &mut Faults) {
        let slot = group.page.slot;
        if faults.is_lost(slot) {
            return;
        }
        let page = match read_group(self.packs, &group.page) {
            Ok(page) => page,
            Err(e) => return self.lose(slot, &e, below, faults),
        };
        if self.blocks.len() < PAGES_COUNTED_MAX {
            self.blocks.insert(slot.0, page.data_blocks);
        }
        let mut used = GroupPage::default();
        let mut blocks = 0;
        let mut is_whole = true;
        for place in page.recipes.iter().flatten() {
            if faults.is_lost(place.slot) {
                is_whole = false;
                continue;
            }
            match read_recipe(self.packs, place) {
                Ok(recipe) => {
                    used.add_slots_of(&recipe);
                    blocks += recipe.data_blocks();
                }
                Err(e) => {
                    is_whole = false;
                    self.lose(place.slot, &e, below, faults);
                }
            }
        }
        if is_whole {
            self.check_sums(slot, &page, &used, blocks, below, faults);
        }
        self.check_slots(&used.slots, below, faults);
        self.check_slots(&used.common, below, faults);
    }

    /// A recipe or group page that cannot be read.
    fn lose(&self, slot: SlotId, why: &Error, below: Below<'_>, faults: &mut Faults) {
        faults.note_below(self.subject(slot.pack()), Severity::Must, why.to_string(), below);
        faults.lost_slots.insert(slot.0);
    }

    fn check_sums(
        &self,
        slot: SlotId,
        page: &GroupPage,
        used: &GroupPage,
        blocks: u32,
        below: Below<'_>,
        faults: &mut Faults,
    ) {
        let subject = self.subject(slot.pack());
        let lacking = (&used.slots - &page.slots).len() + (&used.common - &page.common).len();
        let count = |page: &GroupPage| page.slots.len() + page.common.len();
        if lacking > 0 {
            // Collection goes by the bitmap: it would take these away.
            let what = format!("group page {slot:?}: its bitmap lacks {lacking} slots that its recipes use");
            faults.note_below(subject.clone(), Severity::Must, what, below);
        } else if count(used) != count(page) {
            let more = count(page) - count(used);
            let what = format!("group page {slot:?}: its bitmap has {more} slots that no recipe uses");
            faults.note_below(subject.clone(), Severity::Should, what, below);
        }
        if blocks != page.data_blocks {
            let what = format!("group page {slot:?}: says {} blocks, its recipes have {blocks}", page.data_blocks);
            faults.note_below(subject, Severity::Should, what, below);
        }
    }

    /// I2, I5: every slot in use is in a pack of this VM, or in a common one.
    fn check_slots(&self, used: &RoaringTreemap, below: Below<'_>, faults: &mut Faults) {
        for pack in packs_of(used) {
            if faults.lost_packs.contains(&pack) {
                continue;
            }
            match self.missing_slots(pack, used) {
                Ok(missing) => {
                    let Some(first) = missing.first() else { continue };
                    // Told once for each slot, however many pages use it.
                    if missing.iter().all(|slot| faults.is_lost(*slot)) {
                        continue;
                    }
                    let what =
                        format!("{} slots that snapshots use are not in it, slot {}", missing.len(), first.slot());
                    faults.note_below(self.subject(pack), Severity::Must, what, below);
                    faults.lost_slots.extend(missing.iter().map(|slot| slot.0));
                }
                Err(e) => {
                    faults.note_below(self.subject(pack), Severity::Must, e.to_string(), below);
                    faults.lost_packs.insert(pack);
                }
            }
        }
    }

    fn missing_slots(&self, pack: PackNumber, used: &RoaringTreemap) -> Result<Vec<SlotId>> {
        let of_common = self.common.filter(|_| pack.is_common());
        let entry = of_common.unwrap_or(self.state).pack(pack)?;
        if entry.content != Content::Data {
            return Err(corrupt(format!("pack {pack}: recipes lead to it, but it holds no blocks")));
        }
        // By the newest log: compaction may have moved the pack since.
        let mut tries = 0;
        let index = loop {
            let place = self.packs.locate(pack)?;
            match self.packs.index(&place) {
                Err(e) if e.kind() == ErrorKind::NotFound && tries < 8 => {
                    tries += 1;
                    // Also when it is a common one.
                    self.packs.relocate(pack)?;
                }
                done => break done?,
            }
        };
        let member = index.member(pack)?;
        Ok(slots_of(used, pack).filter(|slot| !member.has(slot.slot())).collect())
    }
}

/// The packs whose slots are in a bitmap.
pub(super) fn packs_of(slots: &RoaringTreemap) -> Vec<PackNumber> {
    let mut packs = Vec::new();
    let mut rest = slots.iter();
    while let Some(slot) = rest.next() {
        let pack = SlotId(slot).pack();
        packs.push(pack);
        match SlotId::new(pack, u16::MAX).0.checked_add(1) {
            Some(next) => rest.advance_to(next),
            None => break,
        }
    }
    packs
}

fn slots_of(slots: &RoaringTreemap, pack: PackNumber) -> impl Iterator<Item = SlotId> {
    let mut rest = slots.iter();
    rest.advance_to(SlotId::new(pack, 0).0);
    rest.map(SlotId).take_while(move |slot| slot.pack() == pack)
}
