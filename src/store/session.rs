//! The writer of a VM: its lock, its begin record, the numbers it may use, and the similarity index.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::backend::{Backend, Guard, Key};
use crate::catalog::record::{Op, PackEntry};
use crate::catalog::state::VmState;
use crate::catalog::vm::{COMMON_HOME, Vm, home_folder, pack_key, title};
use crate::error::{Error, Result, busy};
use crate::fingerprint::Fingerprint;
use crate::limits::PROMOTED_SLOTS_MAX;
use crate::pack::Content;
use crate::pack::index::parse_object_name;
use crate::pack::reader::{Packs, SlotPage, read_slot_page};
use crate::popular::current::CurrentIndex;
use crate::popular::index::{IndexIdentity, PopularIndex};
use crate::popular::promoted::Promoted;
use crate::random::fill_random;
use crate::similarity::SimilarityIndex;
use crate::store::common::{PackHome, common_state, group_of};
use crate::store::sightings::{OtherVms, remember_sightings};
use crate::store::{Store, lock_key};
use crate::units::{Epoch, PackNumber, RecordNumber, Serial, SlotId, VmGroup};

/// How often a lock that is held is tried, and the pause between: two seconds in all.
const LOCK_TRIES: usize = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// The one writer of a VM. The lock goes when it is dropped, or when its process ends.
pub struct Session {
    vm: Arc<Vm>,
    packs: Arc<Packs>,
    serials: Mutex<Serials>,
    holder: [u8; 16],
    absent: HashSet<PackNumber>,
    similar: Mutex<Option<SimilarityIndex>>,
    group: VmGroup,
    popular: PopularView,
    /// For second sighting; `None` where nobody looks.
    others: Option<OtherVms>,
    /// Where the VM's derived data is, of a writer of new blocks.
    derived: Option<PathBuf>,
    _lock: Box<dyn Guard>,
}

/// What somebody knows of the popular set. Of an epoch that comes later a writer learns when it begins again: until it
/// ends, nothing goes that it may refer to (G6).
pub struct PopularView {
    /// Of the common home; `None` before the first common pack, and where its log is damaged.
    state: Option<Arc<VmState>>,
    current: Arc<CurrentIndex>,
    backend: Arc<dyn Backend>,
    memory_bytes_max: usize,
    index: OnceLock<Option<Arc<PopularIndex>>>,
    /// The common packs, to read the slot tables of those that the index does not have.
    packs: Arc<Packs>,
    promoted_bytes_max: usize,
    promoted: OnceLock<Promoted>,
}

impl PopularView {
    /// What is to be known now. Cost: a listing, and what is new in the log of the common home.
    pub fn now(store: &Store) -> Self {
        Self::of(store, known_common(store))
    }

    fn of(store: &Store, state: Option<Arc<VmState>>) -> Self {
        Self {
            state,
            current: store.popular().clone(),
            backend: store.backend().clone(),
            memory_bytes_max: store.shares().popular_bytes,
            index: OnceLock::new(),
            packs: store.packs(store.common_home()),
            promoted_bytes_max: store.shares().sighting_bytes / 3 * 2,
            promoted: OnceLock::new(),
        }
    }

    fn epoch(&self) -> u64 {
        self.state.as_ref().map_or(0, |state| state.popular.epoch)
    }

    /// Whether there are blocks to be found: false without any I/O where there are no common packs.
    pub fn has_blocks(&self) -> bool {
        self.index().is_some_and(|index| index.entries() > 0) || !self.promoted().is_empty()
    }

    /// Whether a common slot may go soon (G6): nothing new may refer to it.
    pub fn is_condemned(&self, slot: SlotId) -> bool {
        let condemned = self.state.as_ref().map(|state| &state.popular.condemned.0);
        slot.pack().is_common() && condemned.is_some_and(|condemned| condemned.contains(slot.0))
    }

    /// Common slots that may hold a block of this group and may be referred to: hints. Memory only, but for the index and
    /// the slot tables that it does not have, when they are first wanted.
    pub fn hints(&self, group: VmGroup, print: &Fingerprint) -> impl Iterator<Item = SlotId> + '_ {
        let mut found: Vec<SlotId> = self.index().iter().flat_map(|index| index.candidates(group, print)).collect();
        if let Some(state) = &self.state {
            let of_group = |slot: &SlotId| state.popular.group_of(slot.pack()) == group;
            found.extend(self.promoted().candidates(print).filter(of_group));
        }
        found.into_iter().filter(move |slot| !self.is_condemned(*slot))
    }

    /// The common slot that holds a block, its slot table says so.
    pub fn find(&self, packs: &Packs, group: VmGroup, print: &Fingerprint) -> Option<SlotId> {
        self.hints(group, print).find(|slot| {
            // A hint that cannot be read is no hint.
            let page = packs.page_of(*slot).ok().flatten();
            page.and_then(|page| page.fingerprint_of(slot.slot())).as_ref() == Some(print)
        })
    }

    /// The page of a slot table around a slot, for matching: without what may not be referred to.
    pub fn page_of(&self, packs: &Packs, slot: SlotId) -> Option<Arc<SlotPage>> {
        // A hint that cannot be read is no hint.
        let page = packs.page_of(slot).ok().flatten()?;
        let is_condemned = |slot: &u16| self.is_condemned(SlotId::new(page.pack, *slot));
        if !page.pack.is_common() || !page.slots.iter().any(is_condemned) {
            return Some(page);
        }
        let kept = page.slots.iter().zip(&page.fingerprints).filter(|(slot, _)| !is_condemned(slot));
        let (slots, fingerprints) = kept.map(|(slot, print)| (*slot, *print)).unzip();
        Some(Arc::new(SlotPage { pack: page.pack, slots, fingerprints }))
    }

    /// The index of its epoch, loaded when it is first wanted.
    fn index(&self) -> Option<&Arc<PopularIndex>> {
        let load = || {
            let state = self.state.as_ref().filter(|state| state.popular.index > 0)?;
            let identity = IndexIdentity { incarnation: state.incarnation, epoch: Epoch(state.popular.index) };
            self.current.get(&*self.backend, identity, self.memory_bytes_max)
        };
        self.index.get_or_init(load).as_ref()
    }

    /// The blocks of common packs that the index does not have: brought since the election by second sighting and by
    /// batches. So they are found before the next one, and copies that VMs have of them become forwards.
    fn promoted(&self) -> &Promoted {
        self.promoted.get_or_init(|| {
            let mut promoted = Promoted::new(self.promoted_bytes_max);
            let packs = self.unelected();
            loop {
                let done = packs.iter().all(|pack| {
                    // What cannot be read is not found; `check` tells of it.
                    if let Err(e) = self.add_promoted(*pack, &mut promoted) {
                        log::debug!("common pack {pack} is not found in: {e}");
                    }
                    !promoted.is_over()
                });
                if done {
                    return promoted.finish();
                }
                promoted = promoted.coarser();
            }
        })
    }

    /// The newest common packs that the index does not lead to.
    fn unelected(&self) -> Vec<PackNumber> {
        let Some(state) = self.state.as_ref().filter(|state| !state.packs.is_empty()) else { return Vec::new() };
        let elected = self.index().map(|index| index.packs()).unwrap_or_default();
        let mut packs = Vec::new();
        let mut slots = 0;
        for entry in state.packs.values().rev() {
            if elected.binary_search_by_key(&entry.number, |row| row.pack).is_ok() {
                continue;
            }
            slots += u64::from(entry.slots);
            if slots > PROMOTED_SLOTS_MAX {
                log::info!("some common blocks are not found before the next election: run snapfs popular elect");
                break;
            }
            packs.push(entry.number);
        }
        packs
    }

    fn add_promoted(&self, pack: PackNumber, promoted: &mut Promoted) -> Result<()> {
        let place = self.packs.locate(pack)?;
        let index = self.packs.index(&place)?;
        let member = index.member(pack)?;
        for page in 0..member.present_pages() {
            let page = read_slot_page(&**self.packs.backend(), &place, member, page)?;
            for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
                promoted.add(print, SlotId::new(pack, *slot));
            }
        }
        Ok(())
    }
}

struct Serials {
    begin: RecordNumber,
    next: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    /// W1: takes the VM's write lock and begins.
    ///
    /// Cost: a listing of the packs, a log record; the similarity index is opened, and caught up with packs that
    /// it does not cover.
    ///
    /// # Errors
    /// `Busy` when another writer has the VM, `Corrupt` when its log is damaged, `NoSpace`, `ReadOnly`,
    /// `Unavailable`.
    pub fn begin(store: &Store, vm: &Arc<Vm>) -> Result<Self> {
        let mut session = Self::begin_without_index(store, vm)?;
        session.open_index(store);
        session.others = OtherVms::of(store, vm, session.group);
        session.derived = store.derived_folder(vm.name()).filter(|_| store.promotes());
        Ok(session)
    }

    /// The same for a writer that stores no new blocks: collection.
    ///
    /// # Errors
    /// As [`Session::begin`].
    pub fn begin_without_index(store: &Store, vm: &Arc<Vm>) -> Result<Self> {
        let Some(guard) = wait_for_lock(store, vm)? else {
            let state = vm.refresh()?;
            let holder = state
                .session
                .as_ref()
                .map_or_else(String::new, |s| format!(" (began by process {} on {})", s.process, s.host));
            return Err(busy(format!("{} is being written by another{holder}", title(vm.name()))));
        };
        let mut holder = [0; 16];
        fill_random(&mut holder)?;
        let is_common = vm.name() == COMMON_HOME;
        let before = if is_common { None } else { known_common(store) };
        let epoch = before.as_ref().map_or(0, |state| state.popular.epoch);
        let begin = append_begin(vm, None, holder, epoch)?;
        // An epoch that was published before the begin record could be seen by its collector counts for us.
        let state = if is_common { None } else { known_common(store) };
        let mut absent = absent_packs(vm)?;
        if state.is_some() {
            absent.extend(absent_packs(store.common_home())?);
        }
        let group = group_of(&vm.state().group);
        let popular = PopularView::of(store, state);
        Ok(Self {
            vm: vm.clone(),
            packs: store.packs(vm),
            serials: Mutex::new(Serials { begin, next: 0 }),
            holder,
            absent,
            similar: Mutex::new(None),
            group,
            popular,
            others: None,
            derived: None,
            _lock: guard,
        })
    }

    fn open_index(&self, store: &Store) {
        let Some(folder) = store.derived_folder(self.vm.name()) else { return };
        let mut index = SimilarityIndex::open(&folder.join("similarity"));
        let state = self.vm.state();
        let data: HashSet<u64> =
            state.packs.values().filter(|p| p.content == Content::Data).map(|p| p.number.0).collect();
        index.forget_packs(|pack| data.contains(&pack));
        for entry in state.packs.values().filter(|p| p.content == Content::Data) {
            if !index.covered().contains(entry.number.0) && !self.is_absent(entry.number) {
                // A pack that cannot be read is not deduplicated against; `check` tells of it.
                if let Err(e) = self.cover(&mut index, entry) {
                    log::warn!("VM {:?}: pack {} is left out of deduplication: {e}", self.vm.name(), entry.number);
                }
            }
        }
        *lock(&self.similar) = Some(index);
    }

    /// Puts the hooks of a pack that others wrote into the index. Cost: reads its slot table.
    fn cover(&self, index: &mut SimilarityIndex, entry: &PackEntry) -> Result<()> {
        let place = self.packs.locate(entry.number)?;
        let pack = self.packs.index(&place)?;
        let member = pack.member(entry.number)?;
        for page in 0..member.pages() {
            let page = read_slot_page(&**self.packs.backend(), &place, member, page)?;
            for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
                if let Some(hook) = print.hook() {
                    index.add(hook, SlotId::new(entry.number, *slot).0);
                }
            }
        }
        index.cover(entry.number.0);
        Ok(())
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The VM's packs, those included that this writer has not committed yet.
    pub fn packs(&self) -> &Arc<Packs> {
        &self.packs
    }

    /// The begin record that counts now.
    pub fn begin_record(&self) -> RecordNumber {
        lock(&self.serials).begin
    }

    /// A number that was never used in this VM.
    ///
    /// # Errors
    /// `Busy` when the writer was fenced; as [`Vm::append`].
    pub fn next_serial(&self) -> Result<Serial> {
        let mut serials = lock(&self.serials);
        let index = match u16::try_from(serials.next) {
            Ok(index) => index,
            Err(_) => {
                // All numbers of this begin record are used: begin again, as the same writer.
                serials.begin = append_begin(&self.vm, Some(serials.begin), self.holder, self.popular.epoch())?;
                serials.next = 0;
                0
            }
        };
        serials.next += 1;
        let number = if self.vm.name() == COMMON_HOME { Serial::common } else { Serial::new };
        Ok(number(serials.begin, index))
    }

    /// Appends a record as this writer: the fence.
    ///
    /// # Errors
    /// As [`Vm::append`].
    pub fn append<T>(&self, change: impl FnMut(&VmState) -> Result<(Vec<Op>, T)>) -> Result<T> {
        // The begin record must not change between the look at it and the record.
        let serials = lock(&self.serials);
        self.vm.append(Some(serials.begin), change)
    }

    /// Whether a pack's object was missing or cut when the writer began: nothing new may refer to it.
    pub fn is_absent(&self, pack: PackNumber) -> bool {
        self.absent.contains(&pack)
    }

    /// W6: the common slots that may hold the block of a fingerprint: hints. Memory only.
    pub fn popular_hints(&self, print: &Fingerprint) -> Vec<SlotId> {
        self.popular.hints(self.group, print).filter(|slot| !self.is_absent(slot.pack())).collect()
    }

    /// What it knows of the popular set.
    pub fn popular(&self) -> &PopularView {
        &self.popular
    }

    /// The page of a slot table around a slot, for matching: without what may not be referred to.
    pub fn page_of(&self, slot: SlotId) -> Option<Arc<SlotPage>> {
        if self.is_absent(slot.pack()) {
            return None;
        }
        self.popular.page_of(&self.packs, slot)
    }

    /// The other VMs whose blocks it may notice: for second sighting.
    pub fn others(&self) -> Option<&OtherVms> {
        self.others.as_ref()
    }

    /// The VM group whose blocks it may share.
    pub fn group(&self) -> VmGroup {
        self.group
    }

    /// The epoch of the popular set that it knows.
    pub fn common_epoch(&self) -> u64 {
        self.popular.epoch()
    }

    /// W9: remembers the hooks of blocks that were stored.
    pub fn remember(&self, stored: impl IntoIterator<Item = (SlotId, Fingerprint)>) {
        let mut similar = lock(&self.similar);
        let Some(index) = similar.as_mut() else { return };
        for (slot, print) in stored {
            if let Some(hook) = print.hook() {
                index.add(hook, slot.0);
            }
        }
    }

    /// Packs whose hooks are all remembered and that the log has now.
    pub fn cover_committed(&self, packs: &[PackEntry]) {
        let mut similar = lock(&self.similar);
        let Some(index) = similar.as_mut() else { return };
        for pack in packs.iter().filter(|p| p.content == Content::Data) {
            index.cover(pack.number.0);
        }
    }

    /// Slots of blocks whose hooks are among these: hints. Newest first for each hook.
    pub fn look_up(&self, hooks: &[u64]) -> Vec<SlotId> {
        let mut found = Vec::new();
        if let Some(index) = lock(&self.similar).as_mut() {
            index.lookup(hooks, &mut found);
        }
        found.into_iter().map(|(_, slot)| SlotId(slot)).filter(|slot| slot.pack().is_valid()).collect()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(index) = lock(&self.similar).take() {
            index.close();
        }
        let Some(folder) = &self.derived else { return };
        let state = self.vm.state();
        if !state.exists() {
            return;
        }
        let packs: Vec<PackEntry> = state.packs.values().copied().collect();
        if let Err(e) = remember_sightings(folder, state.incarnation, self.group, &packs, &self.packs) {
            log::warn!("VM {:?}: other VMs do not notice what is new: {e}", self.vm.name());
        }
    }
}

/// The VM's lock; `None` when it is not free for a while. A writer that has just closed its file needs a moment to
/// end, and nobody should be told "busy" for that.
fn wait_for_lock(store: &Store, vm: &Vm) -> Result<Option<Box<dyn Guard>>> {
    let key = lock_key(vm.name());
    for _ in 0..LOCK_TRIES {
        if let Some(guard) = store.backend().try_lock(&key)? {
            return Ok(Some(guard));
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    store.backend().try_lock(&key)
}

impl PackHome for Session {
    fn home(&self) -> &Arc<Vm> {
        self.vm()
    }

    fn packs(&self) -> &Arc<Packs> {
        &self.packs
    }

    fn next_serial(&self) -> Result<Serial> {
        Self::next_serial(self)
    }
}

/// The common home's state as far as it can be told. A writer that cannot read it matches nothing of other VMs.
fn known_common(store: &Store) -> Option<Arc<VmState>> {
    common_state(store.common_home()).unwrap_or_else(|e| {
        log::warn!("blocks of other VMs are not found: {e}; run snapfs check");
        None
    })
}

fn append_begin(vm: &Vm, session: Option<RecordNumber>, holder: [u8; 16], common_epoch: u64) -> Result<RecordNumber> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let process = std::process::id();
    vm.append(session, |state| {
        let op = Op::Begin { holder, host: host.clone(), process, common_epoch };
        Ok((vec![op], state.number.next()?))
    })
}

/// Packs whose object is not there in full length. Cost: one listing.
fn absent_packs(vm: &Vm) -> Result<HashSet<PackNumber>> {
    let state = vm.state();
    let rows = vm.backend().list(&Key::new(format!("{}/packs", home_folder(vm.name()))))?;
    let there: HashMap<_, _> = rows.iter().filter_map(|r| Some((parse_object_name(&r.name)?, r.bytes))).collect();
    let mut absent = HashSet::new();
    for pack in state.packs.values() {
        if there.get(&pack.object) != Some(&pack.object_bytes) {
            let key = pack_key(vm.name(), pack.object);
            log::warn!("{key}: is missing or cut; run snapfs check");
            absent.insert(pack.number);
        }
    }
    Ok(absent)
}

/// Turns a finished pack into its log entry.
///
/// # Errors
/// `Corrupt` when the object has no such member.
pub fn pack_entry(
    number: PackNumber,
    content: Content,
    finished: &crate::pack::writer::Finished,
    object: crate::units::ObjectId,
) -> Result<PackEntry> {
    let slots = finished.slots.iter().find(|(n, _)| *n == number).map(|(_, slots)| *slots);
    let slots =
        slots.ok_or_else(|| Error::new(crate::error::ErrorKind::Corrupt, format!("pack {number}: no member")))?;
    Ok(PackEntry { number, object, content, slots, object_bytes: finished.bytes, tail_bytes: finished.tail_bytes })
}
