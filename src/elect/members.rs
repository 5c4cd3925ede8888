//! Who takes part in an election: the VMs of all groups, and the blocks that each holds; and the common packs of each
//! group, so that what is common already is seen to be.

use std::collections::BTreeSet;
use std::sync::Arc;

use roaring::RoaringTreemap;

use crate::catalog::state::VmState;
use crate::catalog::vm::Vm;
use crate::cluster::job::{Job, partitions_for};
use crate::collect::live::common_slots;
use crate::error::{ErrorKind, Result, corrupt};
use crate::fingerprint::Fingerprint;
use crate::name::VmName;
use crate::pack::Content;
use crate::pack::reader::{Packs, SlotPage, read_slot_page};
use crate::store::Store;
use crate::store::common::{common_state, group_of};
use crate::units::{Incarnation, PackNumber, SlotId, VmGroup};
use crate::wire::{decode, encode, wire_struct};

/// What the description of an election's job begins with: it tells these from other jobs.
const KIND: [u8; 16] = *b"snapfs election\0";

wire_struct! {
    /// One who takes part: a VM, or the common packs of a VM group.
    pub struct MemberRow {
        /// Of the VM; empty for common packs.
        pub vm: String,
        /// Its life; of the common home for common packs.
        pub incarnation: Incarnation,
        /// Whose blocks it may share.
        pub group: VmGroup,
    }
}

wire_struct! {
    /// What all hosts of an election must know alike.
    pub struct Description {
        /// That it is one of an election.
        pub kind: [u8; 16],
        /// All members, by group, the common packs first.
        pub members: Vec<MemberRow>,
    }
}

/// An election as the store is now.
#[derive(Debug)]
pub struct Election {
    /// Of its job: a digest of the store, of all members and of how far their logs are. Another election of the same
    /// store as it is has the same; with anything that changed it is another job.
    pub id: Fingerprint,
    /// Partitions of its job.
    pub partitions: u32,
    /// The members.
    pub description: Description,
}

impl Description {
    /// The description in a job.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn of(job: &Job) -> Result<Self> {
        let description: Self = decode(&job.body)?;
        if description.kind != KIND {
            return Err(corrupt(format!("{}: is no election", Job::key_of(job.id))));
        }
        Ok(description)
    }

    /// Whether a job is an election.
    pub fn is_in(job: &Job) -> bool {
        job.body.starts_with(&KIND)
    }

    /// VMs and VM groups.
    pub fn counts(&self) -> (u64, u64) {
        let groups: BTreeSet<VmGroup> = self.members.iter().map(|row| row.group).collect();
        (self.members.iter().filter(|row| !row.is_common()).count() as u64, groups.len() as u64)
    }
}

impl MemberRow {
    /// Whether it stands for common packs.
    pub fn is_common(&self) -> bool {
        self.vm.is_empty()
    }
}

fn data_slots(state: &VmState) -> u64 {
    state.packs.values().filter(|pack| pack.content == Content::Data).map(|pack| u64::from(pack.slots)).sum()
}

/// The election that the store is due for. VMs whose log cannot be read, or that were deleted, do not take part.
///
/// Cost: each VM's log, and that of the common home.
///
/// # Errors
/// `Corrupt` when the common home's log is damaged; `Unavailable`, `Denied`.
pub fn describe(store: &Store) -> Result<Election> {
    let mut rows = Vec::new();
    let mut slots = 0;
    for name in store.vm_names()? {
        let vm = store.vm_handle(&name);
        let found = vm.refresh().and_then(|state| match vm.damage() {
            Some(damage) => Err(damage.duplicate()),
            None => Ok(state),
        });
        match found {
            Ok(state) if !state.exists() => {}
            Ok(state) => {
                slots += data_slots(&state);
                let (vm, group) = (name.as_str().to_owned(), group_of(&state.group));
                rows.push((MemberRow { vm, incarnation: state.incarnation, group }, state.number.0));
            }
            // Made at this moment, or damaged: what it holds counts when it can be read.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) if e.kind() == ErrorKind::Corrupt => log::warn!("{name:?} takes no part: {e}; run snapfs check"),
            Err(e) => return Err(e),
        }
    }
    let mut common: (u64, Vec<PackNumber>) = (0, Vec::new());
    // A home that was only made has nothing that counts.
    if let Some(state) = common_state(store.common_home())?.filter(|state| !state.packs.is_empty()) {
        slots += data_slots(&state);
        // Whatever goes from common packs was condemned by an epoch; and what an election that was cut off has brought is
        // found instead of copied again.
        common = (state.popular.epoch, state.packs.keys().copied().collect());
        let groups: BTreeSet<VmGroup> = rows.iter().map(|(row, _)| row.group).collect();
        let incarnation = state.incarnation;
        rows.extend(groups.into_iter().map(|group| (MemberRow { vm: String::new(), incarnation, group }, 0)));
    }
    rows.sort_by(|(a, _), (b, _)| (a.group, &a.vm).cmp(&(b.group, &b.vm)));
    let (members, logs): (Vec<MemberRow>, Vec<u32>) = rows.into_iter().unzip();
    let description = Description { kind: KIND, members };
    let id = Job::id_of(&[
        &KIND,
        store.config().store.as_bytes(),
        &encode(&description),
        &encode(&logs),
        &common.0.to_le_bytes(),
        &encode(&common.1),
    ]);
    Ok(Election { id, partitions: partitions_for(slots), description })
}

/// A VM, or the common packs of a group, as they are now.
pub struct Member {
    home: Arc<Vm>,
    state: Arc<VmState>,
    group: VmGroup,
    is_common: bool,
    /// Its packs, and the common ones.
    pub packs: Arc<Packs>,
}

impl Member {
    /// A member of an election that began before; `None` when it is gone, or cannot be read any more.
    ///
    /// # Errors
    /// `Unavailable`, `Denied`.
    pub fn open(store: &Store, row: &MemberRow) -> Result<Option<Self>> {
        let is_common = row.is_common();
        let home = if is_common { store.common_home().clone() } else { store.vm_handle(&VmName::new(&row.vm)?) };
        match home.refresh() {
            Ok(state) if !is_common && !state.exists() => Ok(None),
            Ok(state) if state.incarnation != row.incarnation => Ok(None),
            Ok(state) => {
                let packs = store.packs(&home);
                Ok(Some(Self { home, state, group: row.group, is_common, packs }))
            }
            Err(e) => left_out(home.name(), Err(e)).map(|()| None),
        }
    }

    /// Shows every block that it holds with a slot where it is: in a pack of its own, in a common one, or both. Blocks
    /// may be shown more than once; common slots that nothing new may refer to are not shown by the common packs. A pack
    /// that cannot be read is left out, with a warning; so is a VM of which cannot be told what it refers to.
    ///
    /// Memory: a bitmap of the common slots that it refers to. Cost: its root pages, group pages and slot tables, and
    /// the pages of common packs that it refers to.
    ///
    /// # Errors
    /// What `visit` returns; `Unavailable`.
    pub fn visit(&self, visit: &mut dyn FnMut(Fingerprint, SlotId) -> Result<()>) -> Result<()> {
        if self.is_common {
            let condemned = &self.state.popular.condemned.0;
            let of_group = |pack: PackNumber| self.state.popular.group_of(pack) == self.group;
            let mut offer = |print, slot: SlotId| if condemned.contains(slot.0) { Ok(()) } else { visit(print, slot) };
            return self.visit_packs(&of_group, &mut offer);
        }
        let common = match common_slots(&self.home, &self.packs, &self.state) {
            Err(e) => return left_out(self.home.name(), Err(e)),
            Ok(common) => common,
        };
        self.visit_packs(&|_| true, visit)?;
        self.visit_common(&common, visit)
    }

    fn visit_packs(
        &self,
        wanted: &dyn Fn(PackNumber) -> bool,
        visit: &mut dyn FnMut(Fingerprint, SlotId) -> Result<()>,
    ) -> Result<()> {
        let data = self.state.packs.values().filter(|pack| pack.content == Content::Data && wanted(pack.number));
        for entry in data {
            self.tolerate(entry.number, self.visit_pack(entry.number, visit))?;
        }
        Ok(())
    }

    fn visit_common(
        &self,
        common: &RoaringTreemap,
        visit: &mut dyn FnMut(Fingerprint, SlotId) -> Result<()>,
    ) -> Result<()> {
        let mut page: Option<Arc<SlotPage>> = None;
        for slot in common.iter().map(SlotId) {
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
        left_out(&format!("{}: pack {pack}", self.home.name()), outcome)
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

/// What is gone or damaged does not end an election.
fn left_out(what: &str, outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            log::info!("{what} takes no part: {e}");
            Ok(())
        }
        Err(e) if e.kind() == ErrorKind::Corrupt => {
            log::warn!("{what} takes no part: {e}; run snapfs check");
            Ok(())
        }
        other => other,
    }
}
