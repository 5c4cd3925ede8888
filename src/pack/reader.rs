//! Reads slots of a VM's packs: from a place that a reference remembers, through a pack's index, or from a pack
//! that is still being written.
//!
//! Every frame is checked before its bytes are believed; every cache key has the incarnation in it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use crate::backend::{Backend, Key};
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::fingerprint::{Fingerprint, fingerprint};
use crate::limits::{BLOCK_BYTES, PACK_TAIL_BYTES_MAX, RECIPE_FRAME_BYTES_MAX};
use crate::pack::Content;
use crate::pack::cache::Cache;
use crate::pack::copies;
use crate::pack::frame::{FrameRow, decompress, slot_range};
use crate::pack::index::{Member, PackIndex, TRAILER_BYTES, fingerprints, page_checksum};
use crate::recipe::Place;
use crate::units::{Incarnation, ObjectId, PackNumber, SlotId};

/// Frames that lie side by side are read together up to this many bytes: one request of the kernel's read-ahead.
const READ_RUN_BYTES: u64 = 1 << 20;

/// What the log says about the object that holds a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectPlace {
    /// Where it is.
    pub key: Key,
    /// Which VM's life it belongs to.
    pub incarnation: Incarnation,
    /// Who it is.
    pub object: ObjectId,
    /// What it holds.
    pub content: Content,
    /// Bytes of the object.
    pub bytes: u64,
    /// Bytes of index and trailer.
    pub tail_bytes: u32,
}

/// Finds the object that holds a pack now.
pub trait Locate: Send + Sync {
    /// By what is known; no I/O.
    ///
    /// # Errors
    /// `Corrupt` when no such pack is known.
    fn locate(&self, pack: PackNumber) -> Result<ObjectPlace>;

    /// After looking at the log anew: compaction may have moved the pack.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    fn relocate(&self, pack: PackNumber) -> Result<ObjectPlace>;
}

/// A pack that is still being written.
pub trait Unfinished: Send + Sync {
    /// The bytes of consecutive slots of a data pack.
    ///
    /// # Errors
    /// `Corrupt` when a slot is not there, `Unavailable`.
    fn read_blocks(&self, first_slot: u16, out: &mut [u8]) -> Result<()>;

    /// The bytes of one slot of a recipe pack.
    ///
    /// # Errors
    /// `Corrupt` when it is not there, `Unavailable`.
    fn read_slot(&self, slot: u16) -> Result<Vec<u8>>;

    /// Fingerprints around a slot.
    fn page_of(&self, slot: u16) -> Option<Arc<SlotPage>>;
}

/// A few consecutive present slots of a pack with their fingerprints.
#[derive(Debug, PartialEq, Eq)]
pub struct SlotPage {
    /// The pack.
    pub pack: PackNumber,
    /// Slots, ascending.
    pub slots: Vec<u16>,
    /// One fingerprint per slot.
    pub fingerprints: Vec<Fingerprint>,
}

impl SlotPage {
    /// The fingerprint of a slot, if it is on this page.
    pub fn fingerprint_of(&self, slot: u16) -> Option<Fingerprint> {
        let at = self.slots.binary_search(&slot).ok()?;
        self.fingerprints.get(at).copied()
    }
}

/// A decompressed frame.
#[derive(Debug)]
struct Opened {
    row: FrameRow,
    raw: Vec<u8>,
}

impl Opened {
    fn slot(&self, content: Content, slot: u16) -> Result<Range<usize>> {
        let rank = self.row.rank(slot).ok_or_else(|| corrupt(format!("slot {slot} is not in its frame")))?;
        slot_range(content, &self.raw, rank, self.row.count() as usize)
    }
}

type FrameKey = (Incarnation, ObjectId, u64);

/// Decompressed frames, indexes and slot pages of all VMs, bounded together.
#[derive(Debug)]
pub struct Caches {
    frames: Cache<FrameKey, Arc<Opened>>,
    recipes: Cache<FrameKey, Arc<Opened>>,
    indexes: Cache<(Incarnation, ObjectId), Arc<PackIndex>>,
    pages: Cache<(Incarnation, ObjectId, PackNumber, u32), Arc<SlotPage>>,
}

impl Caches {
    /// Caches that together hold at most about `bytes_max`.
    pub fn new(bytes_max: usize) -> Self {
        Self {
            frames: Cache::new(bytes_max / 2),
            recipes: Cache::new(bytes_max / 6),
            indexes: Cache::new(bytes_max / 6),
            pages: Cache::new(bytes_max / 6),
        }
    }
}

#[derive(Default)]
struct Overlay {
    unfinished: HashMap<PackNumber, Arc<dyn Unfinished>>,
    // Finished, but in no log record yet: only the writer knows them.
    finished: HashMap<PackNumber, ObjectPlace>,
}

/// All packs of one VM, as one reader or writer sees them.
pub struct Packs {
    backend: Arc<dyn Backend>,
    caches: Arc<Caches>,
    locate: Arc<dyn Locate>,
    overlay: RwLock<Overlay>,
}

impl Packs {
    /// The packs that `locate` finds.
    pub fn new(backend: Arc<dyn Backend>, caches: Arc<Caches>, locate: Arc<dyn Locate>) -> Self {
        Self { backend, caches, locate, overlay: RwLock::default() }
    }

    /// Lets readers see a pack that is being written.
    pub fn show_unfinished(&self, pack: PackNumber, unfinished: Arc<dyn Unfinished>) {
        let mut overlay = self.overlay.write().unwrap_or_else(PoisonError::into_inner);
        overlay.unfinished.insert(pack, unfinished);
    }

    /// The pack is an object now, though the log does not know it yet.
    pub fn show_finished(&self, pack: PackNumber, place: ObjectPlace) {
        let mut overlay = self.overlay.write().unwrap_or_else(PoisonError::into_inner);
        overlay.finished.insert(pack, place);
        overlay.unfinished.remove(&pack);
    }

    /// The pack was given up.
    pub fn hide(&self, pack: PackNumber) {
        let mut overlay = self.overlay.write().unwrap_or_else(PoisonError::into_inner);
        overlay.finished.remove(&pack);
        overlay.unfinished.remove(&pack);
    }

    fn unfinished(&self, pack: PackNumber) -> Option<Arc<dyn Unfinished>> {
        self.overlay.read().unwrap_or_else(PoisonError::into_inner).unfinished.get(&pack).cloned()
    }

    fn finished(&self, pack: PackNumber) -> Option<ObjectPlace> {
        self.overlay.read().unwrap_or_else(PoisonError::into_inner).finished.get(&pack).cloned()
    }

    /// The object that holds a pack now.
    ///
    /// # Errors
    /// `Corrupt` when nobody knows the pack.
    pub fn locate(&self, pack: PackNumber) -> Result<ObjectPlace> {
        match self.finished(pack) {
            Some(place) => Ok(place),
            None => self.locate.locate(pack),
        }
    }

    /// The same after looking at the log anew.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn relocate(&self, pack: PackNumber) -> Result<ObjectPlace> {
        match self.finished(pack) {
            Some(place) => Ok(place),
            None => self.locate.relocate(pack),
        }
    }

    /// Does `work` on the object of a pack; when the object is gone because compaction moved the pack, once more
    /// on the new one (G4).
    fn with_object<T>(&self, pack: PackNumber, mut work: impl FnMut(&ObjectPlace) -> Result<T>) -> Result<T> {
        let mut place = self.locate(pack)?;
        // Bounded: a pack that moves faster than it can be read is a fault.
        for _ in 0..8 {
            match work(&place) {
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    let now = self.relocate(pack)?;
                    if now.object == place.object {
                        return Err(Error::new(ErrorKind::Corrupt, format!("{}: is missing", place.key)).because(e));
                    }
                    place = now;
                }
                Err(e) if e.kind() == ErrorKind::Corrupt && !e.to_string().contains(place.key.as_str()) => {
                    return Err(e.within(&place.key));
                }
                done => {
                    if done.is_ok() {
                        self.heal_if_wanted(&place);
                    }
                    return done;
                }
            }
        }
        Err(Error::new(ErrorKind::Unavailable, format!("{}: moves all the time", place.key)))
    }

    /// Replaces bad copies that the last reads met. Free where there is one copy, and while all are good.
    fn heal_if_wanted(&self, place: &ObjectPlace) {
        let Some(replicated) = self.backend.replicated().filter(|r| r.wants_healing(&place.key)) else { return };
        // The read itself was right, whatever comes of this.
        if let Err(e) = copies::heal(replicated, place) {
            log::warn!("{}: its copies stay as they are: {e}", place.key);
        }
    }

    /// The index of an object. Cost: one backend read when it is not cached.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Unsupported`, `Unavailable`.
    pub fn index(&self, place: &ObjectPlace) -> Result<Arc<PackIndex>> {
        let key = (place.incarnation, place.object);
        if let Some(index) = self.caches.indexes.get(&key) {
            return Ok(index);
        }
        let index = Arc::new(read_index(&*self.backend, place)?);
        self.caches.indexes.put(key, index.clone(), index.memory_bytes());
        Ok(index)
    }

    /// The same for one who looks at many objects and at each once: nothing is kept, so that memory does not grow with
    /// them and what others read stays cached.
    ///
    /// # Errors
    /// As [`Packs::index`].
    pub fn index_once(&self, place: &ObjectPlace) -> Result<Arc<PackIndex>> {
        match self.caches.indexes.get(&(place.incarnation, place.object)) {
            Some(index) => Ok(index),
            None => read_index(&*self.backend, place).map(Arc::new),
        }
    }

    /// The bytes of consecutive slots of a data pack, `out.len() / 4096` of them.
    ///
    /// Cost: one backend read per megabyte of stored frames that are not cached, and one for the index.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn read_blocks(&self, first: SlotId, out: &mut [u8]) -> Result<()> {
        if let Some(unfinished) = self.unfinished(first.pack()) {
            return unfinished.read_blocks(first.slot(), out);
        }
        self.with_object(first.pack(), |place| {
            let index = self.index(place)?;
            let member = index.member(first.pack())?;
            self.read_blocks_of(place, member, first.slot(), out)
        })
    }

    fn read_blocks_of(&self, place: &ObjectPlace, member: &Member, first: u16, out: &mut [u8]) -> Result<()> {
        if place.content != Content::Data {
            return Err(corrupt(format!("pack {} holds no data", member.number)));
        }
        let mut slot = u32::from(first);
        let mut rest = out;
        while !rest.is_empty() {
            let wanted = rest.len().div_ceil(BLOCK_BYTES);
            let forward = u16::try_from(slot).ok().and_then(|slot| member.forward_of(slot));
            if let Some((target, blocks)) = forward {
                // A run of forwards is a run of common slots: read as one.
                let count = (blocks as usize).min(wanted);
                let (piece, tail) = rest.split_at_mut((count * BLOCK_BYTES).min(rest.len()));
                self.read_blocks(target, piece)?;
                rest = tail;
                slot += count as u32;
                continue;
            }
            let absent = || corrupt(format!("slot {slot} is not in pack {}", member.number));
            let at = u16::try_from(slot).ok().and_then(|s| member.frame_of(s)).ok_or_else(absent)?;
            let key = |at: usize| (place.incarnation, place.object, member.offsets.get(at).copied().unwrap_or(0));
            let frame = match self.caches.frames.get(&key(at)) {
                Some(frame) => frame,
                None => {
                    // The frames from here on that are wanted, not cached, and side by side: one read.
                    let mut end = at;
                    let mut bytes = 0;
                    while let Some(row) = member.frames.get(end) {
                        let run = bytes + u64::from(row.stored_bytes);
                        let is_wanted = u32::from(row.first_slot) < slot + wanted as u32;
                        let fits = end == at || run <= READ_RUN_BYTES;
                        if !is_wanted || !fits || (end > at && self.caches.frames.contains(&key(end))) {
                            break;
                        }
                        bytes = run;
                        end += 1;
                    }
                    self.read_frames(place, member, at..end)?
                }
            };
            let mut taken = 0;
            for block in rest.chunks_mut(BLOCK_BYTES) {
                let Some(slot) = u16::try_from(slot + taken).ok().filter(|s| frame.row.rank(*s).is_some()) else {
                    break;
                };
                let range = frame.slot(Content::Data, slot)?;
                let bytes = frame.raw.get(range).ok_or_else(absent)?;
                match bytes.get(..block.len()) {
                    Some(bytes) => block.copy_from_slice(bytes),
                    None => return Err(absent()),
                }
                taken += 1;
            }
            if taken == 0 {
                return Err(absent());
            }
            slot += taken;
            let done = (taken as usize * BLOCK_BYTES).min(rest.len());
            rest = &mut rest[done..];
        }
        Ok(())
    }

    /// Reads frames that lie side by side, opens and caches them; returns the first.
    fn read_frames(&self, place: &ObjectPlace, member: &Member, range: Range<usize>) -> Result<Arc<Opened>> {
        let rows = member.frames.get(range.clone()).unwrap_or_default();
        let start = member.offsets.get(range.start).copied().unwrap_or(0);
        let total: usize = rows.iter().map(|r| r.stored_bytes as usize).sum();
        let mut stored = vec![0; total];
        let mut raws = Vec::with_capacity(rows.len());
        self.backend.read_checked(&place.key, start, &mut stored, &mut |stored| {
            raws.clear();
            let mut rest = stored;
            for row in rows {
                let (bytes, tail) = rest.split_at(row.stored_bytes as usize);
                rest = tail;
                raws.push(row.open(place.content, place.incarnation, member.number, bytes)?);
            }
            Ok(())
        })?;
        let mut offset = start;
        let mut first = None;
        for (row, raw) in rows.iter().zip(raws) {
            let opened = Arc::new(Opened { row: *row, raw });
            let cache = match place.content {
                Content::Data => &self.caches.frames,
                Content::Recipes => &self.caches.recipes,
            };
            cache.put((place.incarnation, place.object, offset), opened.clone(), opened.raw.len() + 160);
            offset += u64::from(row.stored_bytes);
            first.get_or_insert(opened);
        }
        first.ok_or_else(|| corrupt(format!("pack {}: no frame", member.number)))
    }

    /// The bytes of a recipe or group page. Cost: one backend read when the hint holds and nothing is cached.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn read_slot(&self, place: &Place) -> Result<Vec<u8>> {
        let slot = place.slot;
        if let Some(unfinished) = self.unfinished(slot.pack()) {
            return unfinished.read_slot(slot.slot());
        }
        self.with_object(slot.pack(), |object| {
            if object.content != Content::Recipes {
                return Err(corrupt(format!("pack {} holds no recipes", slot.pack())));
            }
            if object.object.generation == place.generation
                && let Some(bytes) = self.read_slot_by_hint(object, place)?
            {
                return Ok(bytes);
            }
            let bytes = self.read_slot_by_index(object, slot)?;
            if check_of(&bytes) == place.check {
                Ok(bytes)
            } else {
                Err(corrupt(format!("slot {} of pack {}: not what refers to it wrote", slot.slot(), slot.pack())))
            }
        })
    }

    /// The bytes of a slot of a recipe pack that no reference describes.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn read_slot_unreferenced(&self, slot: SlotId) -> Result<Vec<u8>> {
        if let Some(unfinished) = self.unfinished(slot.pack()) {
            return unfinished.read_slot(slot.slot());
        }
        self.with_object(slot.pack(), |object| self.read_slot_by_index(object, slot))
    }

    fn read_slot_by_index(&self, object: &ObjectPlace, slot: SlotId) -> Result<Vec<u8>> {
        let index = self.index(object)?;
        let member = index.member(slot.pack())?;
        let absent = || corrupt(format!("slot {} is not in pack {}", slot.slot(), slot.pack()));
        let at = member.frame_of(slot.slot()).ok_or_else(absent)?;
        let key = (object.incarnation, object.object, member.offsets.get(at).copied().unwrap_or(0));
        let frame = match self.caches.recipes.get(&key) {
            Some(frame) => frame,
            None => self.read_frames(object, member, at..at + 1)?,
        };
        let range = frame.slot(Content::Recipes, slot.slot())?;
        frame.raw.get(range).map(<[u8]>::to_vec).ok_or_else(absent)
    }

    /// Reads through the remembered place; `None` when what is there is not what was meant.
    fn read_slot_by_hint(&self, object: &ObjectPlace, place: &Place) -> Result<Option<Vec<u8>>> {
        let key = (object.incarnation, object.object, u64::from(place.frame_offset));
        let frame = match self.caches.recipes.get(&key) {
            Some(frame) => frame,
            None => {
                let end = u64::from(place.frame_offset) + u64::from(place.frame_bytes);
                if end > object.bytes || place.frame_bytes as usize > RECIPE_FRAME_BYTES_MAX {
                    return Ok(None);
                }
                let mut stored = vec![0; place.frame_bytes as usize];
                let mut opened = None;
                let mut verify = |stored: &[u8]| {
                    let (row, payload) = FrameRow::split_prefix(stored)?;
                    let raw = decompress(row.codec, payload, row.raw_bytes as usize)?;
                    let read = Opened { row, raw };
                    // Not cached before its slot was found right.
                    if slot_if_right(&read, place).is_none() {
                        return Err(corrupt(format!("slot {} is not what was meant", place.slot.slot())));
                    }
                    opened = Some(Arc::new(read));
                    Ok(())
                };
                match self.backend.read_checked(&object.key, u64::from(place.frame_offset), &mut stored, &mut verify) {
                    Ok(()) => {}
                    Err(e) if e.kind() == ErrorKind::Corrupt => return Ok(None),
                    Err(e) => return Err(e),
                }
                let Some(opened) = opened else { return Ok(None) };
                self.caches.recipes.put(key, opened.clone(), opened.raw.len() + 160);
                opened
            }
        };
        Ok(slot_if_right(&frame, place))
    }

    /// The page of the slot table around a slot; `None` when the slot is not present (any more) or the pack is not
    /// known. Cost: one backend read when the page is not cached, and one for the index.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`. Deduplication takes any error for "not present".
    pub fn page_of(&self, slot: SlotId) -> Result<Option<Arc<SlotPage>>> {
        let pack = slot.pack();
        if let Some(unfinished) = self.unfinished(pack) {
            return Ok(unfinished.page_of(slot.slot()));
        }
        self.with_object(pack, |place| {
            let index = self.index(place)?;
            let member = index.member(pack)?;
            let Some(page) = member.page_of(slot.slot()) else { return Ok(None) };
            let key = (place.incarnation, place.object, pack, page);
            if let Some(page) = self.caches.pages.get(&key) {
                return Ok(Some(page));
            }
            let read = Arc::new(read_slot_page(&*self.backend, place, member, page)?);
            self.caches.pages.put(key, read.clone(), read.slots.len() * 34 + 96);
            Ok(Some(read))
        })
    }

    /// Tells the backend which stored bytes of a run of slots will be read soon (R4). Reads nothing itself but an
    /// index that is not cached.
    pub fn will_need(&self, first: SlotId, blocks: u32) {
        if self.unfinished(first.pack()).is_some() {
            return;
        }
        // A hint: whatever is wrong here, the read itself will say.
        let _ = self.with_object(first.pack(), |place| {
            let index = self.index(place)?;
            let member = index.member(first.pack())?;
            let last = u32::from(first.slot()) + blocks.saturating_sub(1);
            for row in &member.forwards {
                let (start, end) = (u32::from(row.first_slot), u32::from(row.first_slot) + row.count());
                let (from, to) = (start.max(u32::from(first.slot())), end.min(last + 1));
                if from < to
                    && let Some((target, _)) = row.target_of(from as u16)
                {
                    self.will_need(target, to - from);
                }
            }
            let from = member.frames.partition_point(|f| u32::from(f.first_slot) + f.span() <= u32::from(first.slot()));
            let to = member.frames.partition_point(|f| u32::from(f.first_slot) <= last);
            let rows = member.frames.get(from..to).unwrap_or_default();
            let bytes: u64 = rows.iter().map(|r| u64::from(r.stored_bytes)).sum();
            if let Some(start) = member.offsets.get(from) {
                self.backend.will_need(&place.key, *start, bytes);
            }
            Ok(())
        });
    }

    /// Where objects are.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }
}

/// Reads the index of an object. Cost: one backend read.
///
/// # Errors
/// `NotFound`, `Corrupt`, `Unsupported`, `Unavailable`.
pub fn read_index(backend: &dyn Backend, place: &ObjectPlace) -> Result<PackIndex> {
    let wrong = |e: Error| e.within(&place.key);
    let tail_bytes = u64::from(place.tail_bytes);
    let is_possible = (TRAILER_BYTES as u64..=u64::from(PACK_TAIL_BYTES_MAX)).contains(&tail_bytes);
    if tail_bytes > place.bytes || !is_possible {
        return Err(corrupt(format!("{}: tail of {tail_bytes} bytes", place.key)));
    }
    let mut tail = vec![0; place.tail_bytes as usize];
    let mut index = None;
    let mut verify = |tail: &[u8]| {
        let read = PackIndex::decode_tail(tail, place.bytes).map_err(wrong)?;
        let told = (read.identity.incarnation, read.identity.object, read.identity.content);
        if told != (place.incarnation, place.object, place.content) {
            return Err(corrupt(format!("{}: is another object, it says {}", place.key, read.identity.object)));
        }
        index = Some(read);
        Ok(())
    };
    backend.read_checked(&place.key, place.bytes - tail_bytes, &mut tail, &mut verify)?;
    index.ok_or_else(|| corrupt(format!("{}: was not read", place.key)))
}

/// Reads one page of a slot table.
///
/// # Errors
/// `NotFound`, `Corrupt`, `Unavailable`.
pub fn read_slot_page(backend: &dyn Backend, place: &ObjectPlace, member: &Member, page: u32) -> Result<SlotPage> {
    let (offset, bytes) = member.page_range(page);
    let mut table = vec![0; bytes];
    backend.read_checked(&place.key, offset, &mut table, &mut |table| {
        let checksum = page_checksum(place.incarnation, member.number, page, table);
        if member.page_checksums.get(page as usize) == Some(&checksum) {
            return Ok(());
        }
        Err(corrupt(format!("{}: slot table page {page}: checksum does not match", place.key)))
    })?;
    Ok(SlotPage { pack: member.number, slots: member.slots_of_page(page), fingerprints: fingerprints(&table) })
}

/// The check that a reference keeps of a slot's bytes.
pub fn check_of(bytes: &[u8]) -> u64 {
    let print = fingerprint(bytes);
    print.0.first_chunk::<8>().map_or(0, |head| u64::from_le_bytes(*head))
}

fn slot_if_right(frame: &Opened, place: &Place) -> Option<Vec<u8>> {
    let range = frame.slot(Content::Recipes, place.slot.slot()).ok()?;
    let bytes = frame.raw.get(range)?;
    (check_of(bytes) == place.check).then(|| bytes.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::{Memory, Recorder};
    use crate::units::{Generation, RecordNumber, Serial};

    #[test]
    fn no_memory_is_taken_for_a_tail_that_no_pack_has() {
        let recorder = Recorder::new(Arc::new(Memory::new()));
        let object = ObjectId { number: Serial::new(RecordNumber(1), 0), generation: Generation(0) };
        let place = |tail_bytes: u32| ObjectPlace {
            key: Key::new("pack"),
            incarnation: Incarnation([7; 16]),
            object,
            content: Content::Data,
            bytes: 1 << 40,
            tail_bytes,
        };
        for (tail_bytes, is_read) in [(PACK_TAIL_BYTES_MAX, true), (PACK_TAIL_BYTES_MAX + 1, false), (u32::MAX, false)]
        {
            let before = recorder.counts().read;
            let error = read_index(&recorder, &place(tail_bytes)).unwrap_err();
            assert_eq!(error.kind(), if is_read { ErrorKind::NotFound } else { ErrorKind::Corrupt }, "{error}");
            assert_eq!(recorder.counts().read > before, is_read, "{tail_bytes}");
        }
    }
}
