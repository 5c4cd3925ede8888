//! W7: packs that are being written. A data lane takes new blocks in image order; a recipe lane takes recipes and
//! group pages. What is in them can be read back at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use crate::backend::Key;
use crate::catalog::record::PackEntry;
use crate::catalog::vm::pack_key;
use crate::error::{Error, Result, corrupt};
use crate::fingerprint::{Fingerprint, fingerprint};
use crate::limits::{
    BLOCK_BYTES, FRAME_BLOCKS, FRAME_SLOTS_MAX, PACK_BYTES_MAX, PACK_SLOTS_MAX, RECIPE_FRAME_BYTES, RECIPE_ZSTD_LEVEL,
    SLOT_PAGE_FINGERPRINTS, ZSTD_LEVEL,
};
use crate::pack::Content;
use crate::pack::frame::{FrameRow, compress, join_slots, slot_range};
use crate::pack::index::Identity;
use crate::pack::reader::{ObjectPlace, Packs, SlotPage, Unfinished, check_of};
use crate::pack::writer::{Finished, PackWriter, PackedFrame};
use crate::recipe::Place;
use crate::store::common::PackHome;
use crate::store::session::{Session, pack_entry};
use crate::units::{Generation, ObjectId, PackNumber, SlotId};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// First slot, slots that it spans, bytes.
type RawFrame = (u16, u32, Arc<Vec<u8>>);

/// A pack that is being written, as its readers see it.
struct OpenPack {
    number: PackNumber,
    content: Content,
    key: Key,
    packs: Arc<Packs>,
    inner: Mutex<Inner>,
    finished: Condvar,
}

struct Inner {
    // `None` once it is being finished.
    writer: Option<PackWriter>,
    // The rows that were appended, with their offsets, by first slot.
    rows: BTreeMap<u16, (FrameRow, u64)>,
    // Raw slots that are in no frame of the object yet, by first slot.
    raw: BTreeMap<u16, Arc<Vec<u8>>>,
    // One per slot that was given out.
    prints: Vec<Fingerprint>,
    outcome: Option<std::result::Result<Finished, Arc<Error>>>,
}

impl OpenPack {
    fn create(home: &dyn PackHome, content: Content) -> Result<Arc<Self>> {
        let number = home.next_serial()?;
        let object = ObjectId { number, generation: Generation(0) };
        let vm = home.home();
        let identity = Identity { incarnation: vm.state().incarnation, object, content };
        let key = pack_key(vm.name(), object);
        let writer = PackWriter::create(&**vm.backend(), &key, identity)?;
        let pack = Arc::new(Self {
            number,
            content,
            key,
            packs: home.packs().clone(),
            inner: Mutex::new(Inner {
                writer: Some(writer),
                rows: BTreeMap::new(),
                raw: BTreeMap::new(),
                prints: Vec::new(),
                outcome: None,
            }),
            finished: Condvar::new(),
        });
        home.packs().show_unfinished(number, pack.clone());
        Ok(pack)
    }

    fn object(&self) -> ObjectId {
        ObjectId { number: self.number, generation: Generation(0) }
    }

    /// Appends a packed frame; its raw slots are read from the object from now on.
    fn append(&self, frame: PackedFrame) -> Result<()> {
        let mut inner = lock(&self.inner);
        let first = frame.first_slot;
        let count = frame.present.count_ones() as usize;
        let prints = inner.prints.get(usize::from(first)..usize::from(first) + count).map(<[_]>::to_vec);
        let prints = prints.ok_or_else(|| corrupt("frame without fingerprints"))?;
        let writer = inner.writer.as_mut().ok_or_else(|| corrupt("pack is finished already"))?;
        let (row, offset) = writer.append(frame, &prints)?;
        inner.rows.insert(first, (row, offset));
        inner.raw.remove(&first);
        Ok(())
    }

    /// Makes the object durable. Readers wait until it is.
    fn finish(&self) {
        let Some(writer) = lock(&self.inner).writer.take() else { return };
        let identity = *writer.identity();
        let outcome = writer.finish();
        let mut inner = lock(&self.inner);
        match outcome {
            Ok(done) => {
                let place = self.place(&identity, &done);
                inner.outcome = Some(Ok(done));
                inner.raw.clear();
                inner.rows.clear();
                inner.prints = Vec::new();
                self.packs.show_finished(self.number, place);
            }
            Err(e) => inner.outcome = Some(Err(Arc::new(e))),
        }
        self.finished.notify_all();
    }

    fn place(&self, identity: &Identity, done: &Finished) -> ObjectPlace {
        ObjectPlace {
            key: self.key.clone(),
            incarnation: identity.incarnation,
            object: identity.object,
            content: self.content,
            bytes: done.bytes,
            tail_bytes: done.tail_bytes,
        }
    }

    /// Waits for `finish`, and returns what came of it.
    fn outcome(&self) -> Result<Finished> {
        let mut inner = lock(&self.inner);
        loop {
            match &inner.outcome {
                Some(Ok(done)) => return Ok(done.clone()),
                Some(Err(e)) => return Err(e.duplicate()),
                None => inner = self.finished.wait(inner).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Bytes of the frame or raw run that holds a slot, with its first slot and what it spans.
    fn frame_at(&self, slot: u16) -> Result<Option<RawFrame>> {
        let inner = lock(&self.inner);
        if let Some((first, raw)) = inner.raw.range(..=slot).next_back() {
            let count = match self.content {
                Content::Data => raw.len() / BLOCK_BYTES,
                Content::Recipes => usize::MAX,
            };
            if usize::from(slot - first) < count && inner.rows.range(first..=&slot).next().is_none() {
                return Ok(Some((*first, count.min(65536) as u32, raw.clone())));
            }
        }
        let Some((first, (row, offset))) = inner.rows.range(..=slot).next_back() else { return Ok(None) };
        if row.rank(slot).is_none() {
            return Ok(None);
        }
        let Some(writer) = &inner.writer else { return Ok(None) };
        let mut stored = vec![0; row.stored_bytes as usize];
        writer.read(*offset, &mut stored)?;
        let raw = row.open(self.content, writer.identity().incarnation, self.number, &stored)?;
        Ok(Some((*first, row.count(), Arc::new(raw))))
    }

    /// Whether readers must go to the finished object; waits while it is being finished.
    fn wait_if_finishing(&self) -> Result<bool> {
        let inner = lock(&self.inner);
        if inner.writer.is_some() {
            return Ok(false);
        }
        drop(inner);
        self.outcome().map(|_| true)
    }
}

impl Unfinished for OpenPack {
    fn read_blocks(&self, first_slot: u16, out: &mut [u8]) -> Result<()> {
        let mut slot = u32::from(first_slot);
        let mut rest = out;
        while !rest.is_empty() {
            let this = u16::try_from(slot).map_err(|e| corrupt("slot over the end of a pack").because(e))?;
            let found = self.frame_at(this)?;
            let Some((first, count, raw)) = found else {
                // Finished between the look at the overlay and here.
                if self.wait_if_finishing()? {
                    return self.packs.read_blocks(SlotId::new(self.number, this), rest);
                }
                return Err(corrupt(format!("slot {this} is not in the pack being written, {}", self.number)));
            };
            let skip = (slot - u32::from(first)) as usize;
            let bytes = raw.get(skip * BLOCK_BYTES..).unwrap_or_default();
            let take = bytes.len().min(rest.len()).min((count as usize - skip) * BLOCK_BYTES);
            let (piece, tail) = rest.split_at_mut(take);
            piece.copy_from_slice(bytes.get(..take).unwrap_or_default());
            rest = tail;
            slot += take.div_ceil(BLOCK_BYTES) as u32;
        }
        Ok(())
    }

    fn read_slot(&self, slot: u16) -> Result<Vec<u8>> {
        {
            let inner = lock(&self.inner);
            // Recipes that wait for their frame stand one by one.
            if let Some(raw) = inner.raw.get(&slot) {
                return Ok(raw.to_vec());
            }
        }
        let row = lock(&self.inner).rows.range(..=slot).next_back().map(|(_, (row, _))| *row);
        match (self.frame_at(slot)?, row) {
            (Some((_, _, raw)), Some(row)) => {
                let rank = row.rank(slot).ok_or_else(|| corrupt("slot is not in its frame"))?;
                let range = slot_range(Content::Recipes, &raw, rank, row.count() as usize)?;
                Ok(raw.get(range).unwrap_or_default().to_vec())
            }
            _ => {
                if self.wait_if_finishing()? {
                    return self.packs.read_slot_unreferenced(SlotId::new(self.number, slot));
                }
                Err(corrupt(format!("slot {slot} is not in the pack being written, {}", self.number)))
            }
        }
    }

    fn page_of(&self, slot: u16) -> Option<Arc<SlotPage>> {
        let inner = lock(&self.inner);
        let first = usize::from(slot) / SLOT_PAGE_FINGERPRINTS * SLOT_PAGE_FINGERPRINTS;
        let prints: Vec<_> = inner.prints.iter().skip(first).take(SLOT_PAGE_FINGERPRINTS).copied().collect();
        if inner.prints.len() <= usize::from(slot) {
            return None;
        }
        let slots = (first..first + prints.len()).map(|s| s as u16).collect();
        Some(Arc::new(SlotPage { pack: self.number, slots, fingerprints: prints }))
    }
}

/// Packs of a lane that are full and becoming durable, in the background.
#[derive(Default)]
struct Finishing {
    packs: Vec<Arc<OpenPack>>,
}

impl Finishing {
    /// Packs that may be on their way at a time: more would only queue up at the disk.
    const AT_A_TIME: usize = 2;

    fn start(&mut self, pack: Arc<OpenPack>) -> Result<()> {
        let oldest = self.packs.len().checked_sub(Self::AT_A_TIME).and_then(|at| self.packs.get(at));
        let ready = oldest.map_or(Ok(()), |oldest| oldest.outcome().map(drop));
        let worker = pack.clone();
        let started = ready.and_then(|()| {
            let thread = std::thread::Builder::new().name("snapfs-finish".into());
            thread.spawn(move || worker.finish()).map_err(|e| Error::io("thread", e))
        });
        match started {
            Ok(_) => self.packs.push(pack),
            Err(e) => {
                give_up(Some(pack));
                return Err(e);
            }
        }
        Ok(())
    }

    /// Entries of those that became objects, for deletion.
    fn abandoned(&mut self) -> Vec<PackEntry> {
        let packs = std::mem::take(&mut self.packs);
        let entry = |pack: Arc<OpenPack>| {
            let outcome = pack.outcome();
            pack.packs.hide(pack.number);
            let done = outcome.ok()?;
            pack_entry(pack.number, pack.content, &done, pack.object()).ok()
        };
        packs.into_iter().filter_map(entry).collect()
    }

    /// Waits for all; their log entries.
    fn entries(&mut self) -> Result<Vec<PackEntry>> {
        let mut entries = Vec::new();
        for pack in &self.packs {
            let done = pack.outcome()?;
            entries.push(pack_entry(pack.number, pack.content, &done, pack.object())?);
        }
        // Not before all are there: what is given up must know every one of them.
        self.packs.clear();
        Ok(entries)
    }
}

impl Drop for Finishing {
    /// A pack and the readers' view of it hold each other: left so, neither would ever go.
    fn drop(&mut self) {
        self.packs.iter().for_each(|pack| pack.packs.hide(pack.number));
    }
}

/// Takes new blocks, in image order, into data packs.
pub struct DataLane {
    home: Arc<dyn PackHome>,
    open: Option<Arc<OpenPack>>,
    // The frame that is being filled, and frames that wait for compression, of the open pack.
    filling: Vec<u8>,
    ready: Vec<u16>,
    // Bytes given to the open pack: raw where not compressed yet.
    bytes_bound: u64,
    bytes_stored: u64,
    finishing: Finishing,
}

impl Drop for DataLane {
    fn drop(&mut self) {
        give_up(self.open.take());
    }
}

impl DataLane {
    /// A lane without a pack yet.
    pub fn new(home: Arc<dyn PackHome>) -> Self {
        Self {
            home,
            open: None,
            filling: Vec::new(),
            ready: Vec::new(),
            bytes_bound: 0,
            bytes_stored: 0,
            finishing: Finishing::default(),
        }
    }

    /// Takes a block; its slot is final.
    ///
    /// # Errors
    /// As [`PackWriter::create`], `Busy` when fenced.
    pub fn store(&mut self, block: &[u8], print: Fingerprint) -> Result<SlotId> {
        let used = self.open.as_ref().map_or(0, |p| lock(&p.inner).prints.len() as u32);
        if self.bytes_bound + BLOCK_BYTES as u64 > PACK_BYTES_MAX || used >= PACK_SLOTS_MAX {
            self.close_pack()?;
        }
        let pack = match &self.open {
            Some(pack) => pack.clone(),
            None => {
                self.bytes_bound = 0;
                self.open.insert(OpenPack::create(&*self.home, Content::Data)?).clone()
            }
        };
        let mut inner = lock(&pack.inner);
        let slot = inner.prints.len() as u16;
        inner.prints.push(print);
        self.filling.extend_from_slice(block);
        self.bytes_bound += BLOCK_BYTES as u64;
        if self.filling.len() >= FRAME_BLOCKS as usize * BLOCK_BYTES {
            // The last slot of a pack is the last number there is.
            let first = slot - (FRAME_BLOCKS as u16 - 1);
            let raw = std::mem::replace(&mut self.filling, Vec::with_capacity(FRAME_BLOCKS as usize * BLOCK_BYTES));
            inner.raw.insert(first, Arc::new(raw));
            self.ready.push(first);
        }
        Ok(SlotId::new(pack.number, slot))
    }

    /// Compresses, on all cores, the frames that are full, and appends them in order. Blocks of a frame that is
    /// not full yet become readable.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn flush_full_frames(&mut self) -> Result<()> {
        let Some(pack) = self.open.clone() else { return Ok(()) };
        let ready = std::mem::take(&mut self.ready);
        let raws: Vec<(u16, Arc<Vec<u8>>)> = {
            let inner = lock(&pack.inner);
            ready.iter().filter_map(|first| Some((*first, inner.raw.get(first)?.clone()))).collect()
        };
        let frames: Vec<PackedFrame> = raws.par_iter().map(|(first, raw)| pack_blocks(*first, raw)).collect();
        for frame in frames {
            let raw_bytes = u64::from(frame.raw_bytes);
            let stored = frame.payload.len() as u64;
            pack.append(frame)?;
            self.bytes_bound = self.bytes_bound.saturating_sub(raw_bytes) + stored;
            self.bytes_stored += stored;
        }
        if !self.filling.is_empty() {
            let mut inner = lock(&pack.inner);
            let first = inner.prints.len() - self.filling.len() / BLOCK_BYTES;
            inner.raw.insert(first as u16, Arc::new(self.filling.clone()));
        }
        Ok(())
    }

    /// Ends the open pack: its last frame may be short. It becomes durable in the background.
    fn close_pack(&mut self) -> Result<()> {
        self.flush_full_frames()?;
        let Some(pack) = self.open.clone() else { return Ok(()) };
        if !self.filling.is_empty() {
            let first = lock(&pack.inner).prints.len() - self.filling.len() / BLOCK_BYTES;
            let frame = pack_blocks(first as u16, &std::mem::take(&mut self.filling));
            self.bytes_stored += frame.payload.len() as u64;
            pack.append(frame)?;
        }
        self.bytes_bound = 0;
        self.open = None;
        self.finishing.start(pack)
    }

    /// W8: all that was taken is durable; the packs' log entries.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn finish(&mut self) -> Result<Vec<PackEntry>> {
        self.close_pack()?;
        self.finishing.entries()
    }

    /// Gives up what is not durable yet; entries of what became objects, for deletion.
    pub fn abandon(&mut self) -> Vec<PackEntry> {
        give_up(self.open.take());
        self.finishing.abandoned()
    }

    /// Bytes of frames appended since the lane was made.
    pub fn bytes_stored(&self) -> u64 {
        self.bytes_stored
    }
}

/// Nobody sees a pack that is given up: its upload ends with it.
fn give_up(open: Option<Arc<OpenPack>>) {
    if let Some(pack) = open {
        pack.packs.hide(pack.number);
    }
}

fn pack_blocks(first_slot: u16, raw: &[u8]) -> PackedFrame {
    let span = (raw.len() / BLOCK_BYTES) as u32;
    let (codec, payload) = compress(raw, ZSTD_LEVEL);
    let present = if span >= 64 { u64::MAX } else { (1 << span) - 1 };
    PackedFrame { first_slot, span, present, raw_bytes: raw.len() as u32, codec, payload }
}

/// Takes recipes and group pages into recipe packs.
pub struct RecipeLane {
    session: Arc<Session>,
    open: Option<Arc<OpenPack>>,
    pending: Vec<Vec<u8>>,
    pending_bytes: usize,
    finishing: Finishing,
    // Frames of the packs of this lane: where each run of slots is.
    frames: BTreeMap<SlotId, (u32, u32, u32)>,
}

impl Drop for RecipeLane {
    fn drop(&mut self) {
        give_up(self.open.take());
    }
}

impl RecipeLane {
    /// A lane without a pack yet.
    pub fn new(session: Arc<Session>) -> Self {
        Self {
            session,
            open: None,
            pending: Vec::new(),
            pending_bytes: 0,
            finishing: Finishing::default(),
            frames: BTreeMap::new(),
        }
    }

    /// Takes a recipe or group page. The place has no hint before [`RecipeLane::flush`].
    ///
    /// # Errors
    /// As [`PackWriter::create`], `Busy` when fenced.
    pub fn store(&mut self, bytes: Vec<u8>) -> Result<Place> {
        if self.pending_bytes + bytes.len() > RECIPE_FRAME_BYTES || self.pending.len() >= FRAME_SLOTS_MAX as usize {
            self.flush()?;
        }
        let is_full = self.open.as_ref().is_some_and(|pack| {
            let inner = lock(&pack.inner);
            let bytes_there = inner.writer.as_ref().map_or(0, PackWriter::frames_bytes);
            inner.prints.len() as u32 >= PACK_SLOTS_MAX || bytes_there + bytes.len() as u64 >= PACK_BYTES_MAX
        });
        if is_full {
            self.close_pack()?;
        }
        let pack = match &self.open {
            Some(pack) => pack.clone(),
            None => self.open.insert(OpenPack::create(&*self.session, Content::Recipes)?).clone(),
        };
        let mut inner = lock(&pack.inner);
        let slot = inner.prints.len() as u16;
        inner.prints.push(fingerprint(&bytes));
        let check = check_of(&bytes);
        inner.raw.insert(slot, Arc::new(bytes.clone()));
        drop(inner);
        self.pending_bytes += bytes.len();
        self.pending.push(bytes);
        Ok(Place {
            slot: SlotId::new(pack.number, slot),
            generation: Generation(0),
            frame_offset: 0,
            frame_bytes: 0,
            check,
        })
    }

    /// Whether something new may refer to a pack: its object was whole when the writer began.
    pub fn may_refer_to(&self, pack: PackNumber) -> bool {
        !self.session.is_absent(pack)
    }

    /// Writes the frame that is being filled: all places have hints now.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn flush(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        let Some(pack) = self.open.clone().filter(|_| !pending.is_empty()) else { return Ok(()) };
        let count = pending.len() as u32;
        let first = (lock(&pack.inner).prints.len() - pending.len()) as u16;
        let raw = join_slots(&pending);
        let (codec, payload) = compress(&raw, RECIPE_ZSTD_LEVEL);
        let present = if count >= 64 { u64::MAX } else { (1 << count) - 1 };
        pack.append(PackedFrame {
            first_slot: first,
            span: count,
            present,
            raw_bytes: raw.len() as u32,
            codec,
            payload,
        })?;
        let mut inner = lock(&pack.inner);
        // Slots of a recipe frame wait one by one; `append` removed the first.
        inner.raw.clear();
        if let Some((row, offset)) = inner.rows.get(&first) {
            let at = u32::try_from(*offset).map_err(|e| corrupt("recipe pack over 4 GiB").because(e))?;
            self.frames.insert(SlotId::new(pack.number, first), (count, at, row.stored_bytes));
        }
        Ok(())
    }

    /// The place with its hint, if its recipe is in this lane; any other is returned as it is.
    pub fn with_hint(&self, place: Place) -> Place {
        match self.frames.range(..=place.slot).next_back() {
            Some((first, (count, offset, bytes)))
                if first.pack() == place.slot.pack() && place.slot.0 - first.0 < u64::from(*count) =>
            {
                Place { frame_offset: *offset, frame_bytes: *bytes, ..place }
            }
            _ => place,
        }
    }

    fn close_pack(&mut self) -> Result<()> {
        self.flush()?;
        match self.open.take() {
            Some(pack) => self.finishing.start(pack),
            None => Ok(()),
        }
    }

    /// W8: all that was taken is durable; the packs' log entries.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn finish(&mut self) -> Result<Vec<PackEntry>> {
        self.close_pack()?;
        self.frames.clear();
        self.finishing.entries()
    }

    /// Gives up what is not durable yet; entries of what became objects, for deletion.
    pub fn abandon(&mut self) -> Vec<PackEntry> {
        give_up(self.open.take());
        self.finishing.abandoned()
    }
}
