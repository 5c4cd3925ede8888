//! What a writer knows of the other VMs of its group: their sampled blocks, and the slot tables that these lead to.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::backend::Backend;
use crate::catalog::record::{Attributes, PackEntry};
use crate::catalog::vm::Vm;
use crate::clock::Clock;
use crate::error::{ErrorKind, Result};
use crate::name::VmName;
use crate::pack::Content;
use crate::pack::reader::{Caches, Packs, SlotPage, read_slot_page};
use crate::popular::sighting::{FILE_NAME, Head, SightingIndex, Sightings, level_for};
use crate::store::Store;
use crate::store::common::{CommonAdder, Homes, common_state, group_of};
use crate::units::{Incarnation, PackNumber, SlotId, VmGroup};

/// The other VMs, as they were when the session began; nothing is read before it is wanted.
pub struct OtherVms {
    backend: Arc<dyn Backend>,
    caches: Arc<Caches>,
    clock: Arc<dyn Clock>,
    common: Arc<Vm>,
    common_folder: Attributes,
    /// `derived/vms`.
    folder: PathBuf,
    own: String,
    group: VmGroup,
    memory_bytes_max: usize,
    loaded: OnceLock<Loaded>,
}

#[derive(Default)]
struct Loaded {
    index: SightingIndex,
    donors: Vec<Donor>,
}

/// A VM whose sampled blocks are known.
struct Donor {
    name: VmName,
    incarnation: Incarnation,
    /// `None` when it is not there, was made anew, or is of another group by now.
    packs: OnceLock<Option<Arc<Packs>>>,
}

impl OtherVms {
    /// Those of a VM; `None` where nobody is to look: when that is turned off, without derived data, and where the log of
    /// the common home is damaged, so that nothing can be added.
    pub fn of(store: &Store, vm: &Vm, group: VmGroup) -> Option<Self> {
        let folder = store.derived_root()?.join("vms");
        if !store.promotes() || common_state(store.common_home()).is_err() {
            return None;
        }
        Some(Self {
            backend: store.backend().clone(),
            caches: store.caches().clone(),
            clock: store.clock().clone(),
            common: store.common_home().clone(),
            common_folder: store.new_folder(),
            folder,
            own: vm.name().to_owned(),
            group,
            memory_bytes_max: store.shares().sighting_bytes / 3,
            loaded: OnceLock::new(),
        })
    }

    /// Somebody who adds common packs for the VM with these packs.
    pub fn adder(&self, packs: Arc<Packs>) -> CommonAdder {
        CommonAdder::of(self.common.clone(), self.common_folder, packs, self.group)
    }

    /// Where other VMs of the group have blocks of these hooks: by VM, those that have most of them first.
    pub fn look_up(&self, hooks: &[u64]) -> Vec<(u32, Vec<SlotId>)> {
        if hooks.is_empty() {
            return Vec::new();
        }
        self.loaded().index.look_up(hooks)
    }

    /// The page of a slot table of another VM; what cannot be read is not there.
    pub fn page_of(&self, donor: u32, slot: SlotId) -> Option<Arc<SlotPage>> {
        let donor = self.loaded().donors.get(donor as usize)?;
        let packs = donor.packs.get_or_init(|| self.open(donor)).as_ref()?;
        packs.page_of(slot).ok().flatten()
    }

    /// Its log is asked, not the file: the group may have changed since.
    fn open(&self, donor: &Donor) -> Option<Arc<Packs>> {
        let vm = Arc::new(Vm::new(donor.name.as_str(), self.backend.clone(), self.clock.clone()));
        let state = vm.refresh().ok()?;
        let is_same = state.exists() && state.incarnation == donor.incarnation && group_of(&state.group) == self.group;
        let homes = Homes { vm, common: self.common.clone() };
        is_same.then(|| Arc::new(Packs::new(self.backend.clone(), self.caches.clone(), Arc::new(homes))))
    }

    fn loaded(&self) -> &Loaded {
        self.loaded.get_or_init(|| self.load())
    }

    /// Cost: some hundred bytes of the file of every VM, and of their entries what there is memory for.
    fn load(&self) -> Loaded {
        let mut loaded = Loaded { index: SightingIndex::new(self.memory_bytes_max), donors: Vec::new() };
        let names = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut names: Vec<String> = names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_unstable();
        let names = names.iter().filter(|name| **name != self.own).filter_map(|name| VmName::new(name).ok());
        let of_group = |name: VmName| {
            let head = told(&name, Head::read(&self.path_of(&name)))?;
            (head.group == self.group).then_some((name, head))
        };
        let (names, heads): (Vec<VmName>, Vec<Head>) = names.filter_map(of_group).unzip();
        let level = level_for(&heads, loaded.index.entries_max());
        for name in names {
            // It may be another file by now.
            let sightings = told(&name, Sightings::read_coarse(&self.path_of(&name), level));
            let Some(sightings) = sightings.filter(|sightings| sightings.group == self.group) else { continue };
            loaded.index.add(loaded.donors.len() as u32, &sightings);
            loaded.donors.push(Donor { name, incarnation: sightings.incarnation, packs: OnceLock::new() });
        }
        loaded.index = loaded.index.finish();
        loaded
    }

    fn path_of(&self, vm: &VmName) -> PathBuf {
        self.folder.join(vm.as_str()).join(FILE_NAME)
    }
}

/// What could be read of the file of a VM.
fn told<T>(name: &VmName, outcome: Result<T>) -> Option<T> {
    match outcome {
        Ok(read) => Some(read),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => {
            log::info!("what {name:?} has is not noticed before it is written again: {e}");
            None
        }
    }
}

/// W9: brings the file of a VM up to date, by its writer. `packs` are those of the log. Cost: reads the slot tables of
/// packs that the file does not have, all of them where it is missing or damaged.
///
/// # Errors
/// `NoSpace`, `Denied`, `Unavailable`: then other VMs do not notice what is new.
pub fn remember_sightings(
    folder: &Path,
    incarnation: Incarnation,
    group: VmGroup,
    entries: &[PackEntry],
    packs: &Packs,
) -> Result<()> {
    let path = folder.join(FILE_NAME);
    let old = Sightings::read(&path).ok().filter(|old| old.incarnation == incarnation);
    let mut now = old.clone().unwrap_or_else(|| Sightings::empty(incarnation, group));
    now.group = group;
    let there: HashSet<PackNumber> = entries.iter().map(|entry| entry.number).collect();
    now.retain(|pack| there.contains(&pack));
    let known: HashSet<PackNumber> = now.packs.iter().copied().collect();
    for entry in entries.iter().filter(|entry| entry.content == Content::Data && !known.contains(&entry.number)) {
        // What cannot be read is not looked for.
        if let Err(e) = add_pack(&mut now, entry, packs) {
            log::debug!("pack {}: other VMs do not notice it: {e}", entry.number);
        }
    }
    now.settle();
    if old.as_ref() == Some(&now) { Ok(()) } else { now.write(&path) }
}

fn add_pack(sightings: &mut Sightings, entry: &PackEntry, packs: &Packs) -> Result<()> {
    let place = packs.locate(entry.number)?;
    let index = packs.index(&place)?;
    let member = index.member(entry.number)?;
    for page in 0..member.present_pages() {
        let page = read_slot_page(&**packs.backend(), &place, member, page)?;
        for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
            sightings.add(print, SlotId::new(entry.number, *slot));
        }
    }
    sightings.packs.push(entry.number);
    Ok(())
}
