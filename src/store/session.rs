//! The writer of a VM: its lock, its begin record, the numbers it may use, and the similarity index.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::{Guard, Key};
use crate::catalog::record::{Op, PackEntry};
use crate::catalog::state::VmState;
use crate::catalog::vm::{Vm, fill_random, pack_key};
use crate::error::{Error, Result, busy};
use crate::fingerprint::Fingerprint;
use crate::limits::SLOT_PAGE_FINGERPRINTS;
use crate::pack::Content;
use crate::pack::index::parse_object_name;
use crate::pack::reader::{Packs, read_slot_page};
use crate::popular::index::PopularIndex;
use crate::similarity::SimilarityIndex;
use crate::store::{Store, lock_key};
use crate::units::{PackNumber, RecordNumber, Serial, SlotId, VmGroup};

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
    popular: Option<Arc<PopularIndex>>,
    _lock: Box<dyn Guard>,
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
        let session = Self::begin_without_index(store, vm)?;
        session.open_index(store);
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
            return Err(busy(format!("VM {:?} is being written by another{holder}", vm.name())));
        };
        let mut holder = [0; 16];
        fill_random(&mut holder)?;
        let begin = append_begin(vm, None, holder)?;
        let absent = absent_packs(vm)?;
        Ok(Self {
            vm: vm.clone(),
            packs: store.packs(vm),
            serials: Mutex::new(Serials { begin, next: 0 }),
            holder,
            absent,
            similar: Mutex::new(None),
            group: VmGroup::default(),
            popular: None,
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
        for page in 0..(member.slots as usize).div_ceil(SLOT_PAGE_FINGERPRINTS) {
            let page = read_slot_page(&**self.packs.backend(), &place, member, page as u32)?;
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
                serials.begin = append_begin(&self.vm, Some(serials.begin), self.holder)?;
                serials.next = 0;
                0
            }
        };
        serials.next += 1;
        Ok(Serial::new(serials.begin, index))
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
        self.popular.iter().flat_map(|index| index.candidates(self.group, print)).collect()
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

fn append_begin(vm: &Vm, session: Option<RecordNumber>, holder: [u8; 16]) -> Result<RecordNumber> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let process = std::process::id();
    vm.append(session, |state| {
        let op = Op::Begin { holder, host: host.clone(), process, common_epoch: 0 };
        Ok((vec![op], state.number.next()?))
    })
}

/// Packs whose object is not there in full length. Cost: one listing.
fn absent_packs(vm: &Vm) -> Result<HashSet<PackNumber>> {
    let state = vm.state();
    let rows = vm.backend().list(&Key::new(format!("vms/{}/packs", vm.name())))?;
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
