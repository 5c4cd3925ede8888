//! Who takes part in an election: the VMs of a group, and the blocks that each holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use roaring::RoaringTreemap;

use crate::catalog::state::VmState;
use crate::catalog::vm::Vm;
use crate::collect::live::common_slots;
use crate::error::{ErrorKind, Result};
use crate::fingerprint::Fingerprint;
use crate::pack::Content;
use crate::pack::reader::{Packs, SlotPage, read_slot_page};
use crate::store::Store;
use crate::store::common::group_of;
use crate::units::{PackNumber, SlotId, VmGroup};

/// A VM that takes part.
pub struct Member {
    /// The VM.
    pub vm: Arc<Vm>,
    /// Its state when the election began.
    pub state: Arc<VmState>,
    /// Its packs, and the common ones.
    pub packs: Arc<Packs>,
    common: RoaringTreemap,
}

/// The members of each group. VMs that cannot be read, or were deleted, do not take part.
///
/// Memory: a bitmap of the common slots that each VM refers to. Cost: each VM's log, root pages and group pages.
///
/// # Errors
/// `Unavailable`, `Denied`.
pub fn members(store: &Store) -> Result<BTreeMap<VmGroup, Vec<Member>>> {
    let mut groups: BTreeMap<VmGroup, Vec<Member>> = BTreeMap::new();
    for name in store.vm_names()? {
        let vm = store.vm_handle(&name);
        let packs = store.packs(&vm);
        let found = vm.refresh().and_then(|state| Ok((common_slots(&vm, &packs, &state)?, state)));
        match found {
            Ok((_, state)) if !state.exists() => {}
            Ok((common, state)) => {
                groups.entry(group_of(&state.group)).or_default().push(Member { vm, state, packs, common });
            }
            // Made at this moment, or damaged: what it holds counts when it can be read.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) if e.kind() == ErrorKind::Corrupt => log::warn!("{name:?} takes no part: {e}; run snapfs check"),
            Err(e) => return Err(e),
        }
    }
    Ok(groups)
}

impl Member {
    /// Slots that it may show, at the most.
    pub fn slots(&self) -> u64 {
        let own = self.state.packs.values().filter(|pack| pack.content == Content::Data);
        own.map(|pack| u64::from(pack.slots)).sum::<u64>() + self.common.len()
    }

    /// Shows every block that it holds with a slot where it is: in a pack of its own or, if it is there too, in a common
    /// one. Blocks may be shown more than once. A pack that cannot be read is left out, with a warning.
    ///
    /// Cost: reads its slot tables, and the pages of common packs that it refers to.
    ///
    /// # Errors
    /// What `visit` returns; `Unavailable`.
    pub fn visit(&self, visit: &mut dyn FnMut(Fingerprint, SlotId) -> Result<()>) -> Result<()> {
        for entry in self.state.packs.values().filter(|pack| pack.content == Content::Data) {
            self.tolerate(entry.number, self.visit_pack(entry.number, visit))?;
        }
        let mut page: Option<Arc<SlotPage>> = None;
        for slot in self.common.iter().map(SlotId) {
            let on = |page: &Arc<SlotPage>| page.fingerprint_of(slot.slot()).filter(|_| page.pack == slot.pack());
            let mut print = page.as_ref().and_then(on);
            if print.is_none() {
                match self.packs.page_of(slot) {
                    Ok(read) => page = read,
                    Err(e) => self.tolerate(slot.pack(), Err(e))?,
                }
                print = page.as_ref().and_then(on);
            }
            // One that is not there is damage: `check` tells of it.
            if let Some(print) = print {
                visit(print, slot)?;
            }
        }
        Ok(())
    }

    fn tolerate(&self, pack: PackNumber, outcome: Result<()>) -> Result<()> {
        match outcome {
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
                log::warn!("VM {:?}: pack {pack} takes no part: {e}", self.vm.name());
                Ok(())
            }
            other => other,
        }
    }

    fn visit_pack(&self, number: PackNumber, visit: &mut dyn FnMut(Fingerprint, SlotId) -> Result<()>) -> Result<()> {
        let place = self.packs.locate(number)?;
        let index = self.packs.index(&place)?;
        let member = index.member(number)?;
        for page in 0..member.pages() {
            let page = read_slot_page(&**self.packs.backend(), &place, member, page)?;
            for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
                let target = member.forward_of(*slot).map(|(target, _)| target);
                visit(*print, target.unwrap_or(SlotId::new(number, *slot)))?;
            }
        }
        Ok(())
    }
}
