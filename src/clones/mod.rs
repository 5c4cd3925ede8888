//! Writable clones: a snapshot, and beside it what was written since, in a local overlay that no crash mixes up.
//!
//! ```text
//!   read ──> local? ──yes──> data    a sparse file, same offsets as the image
//!                └───no───> base    the snapshot, which never changes
//!   write ─> data, whole blocks (what is missing of one comes from the base), then: local, in memory
//!   flush ─> sync data · append what is newly local to the map · sync map
//! ```
//!
//! Only what the map says is local is ever read from the data file, so after a crash a block is what was flushed, or
//! something newer of the same block, or the snapshot's. A block that is in the map already is overwritten in place,
//! as on any disk.

pub mod blocks;
pub mod description;
pub mod file;
pub mod folder;
pub mod lifecycle;
pub mod map;
pub mod snapshot;
mod stripes;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::clones::blocks::Blocks;
use crate::clones::file::LocalFile;
use crate::clones::map::{CloneId, ENTRY_BYTES, End, Loaded};
use crate::clones::stripes::Stripes;
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::image::reader::Image;
use crate::limits::{BLOCK_BYTES, SEGMENT_BYTES};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Room of the map that is kept ahead of what has to be written to it, so that a flush does not fail on a full disk.
const MAP_RESERVE_BYTES: u64 = 64 << 10;

/// How often the memory of the set of local blocks is looked at, in writes that brought blocks to it: it grows by less
/// than 1 MiB meanwhile.
const WRITES_PER_COUNT: u32 = 16 << 10;

/// What a clone is a clone of.
pub trait Base: Send + Sync {
    /// Bytes of the image.
    fn bytes(&self) -> u64;

    /// Fills `out` from `offset`.
    ///
    /// # Errors
    /// `Invalid` past the end, `Corrupt`, `Unavailable`.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()>;

    /// The next data at or after `offset`, `None` when only a hole is left.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    fn seek_data(&self, offset: u64) -> Result<Option<u64>>;

    /// The next hole at or after `offset`: the end of the image is one.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    fn seek_hole(&self, offset: u64) -> Result<u64>;
}

impl<B: Base + ?Sized> Base for Arc<B> {
    fn bytes(&self) -> u64 {
        (**self).bytes()
    }
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        (**self).read_at(offset, out)
    }
    fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        (**self).seek_data(offset)
    }
    fn seek_hole(&self, offset: u64) -> Result<u64> {
        (**self).seek_hole(offset)
    }
}

impl Base for Image {
    fn bytes(&self) -> u64 {
        Image::bytes(self)
    }
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        Image::read_at(self, offset, out)
    }
    fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        Image::seek_data(self, offset)
    }
    fn seek_hole(&self, offset: u64) -> Result<u64> {
        Image::seek_hole(self, offset)
    }
}

/// The memory that the maps of all open clones may take together (I8).
#[derive(Debug)]
pub struct MapMemory {
    used: AtomicU64,
    bytes_max: u64,
}

impl MapMemory {
    /// At most so many bytes.
    pub fn new(bytes_max: u64) -> Self {
        Self { used: AtomicU64::new(0), bytes_max }
    }

    fn is_full(&self) -> bool {
        self.used.load(Ordering::Relaxed) > self.bytes_max
    }

    fn replace(&self, old: u64, new: u64) {
        self.used.fetch_add(new, Ordering::Relaxed);
        self.used.fetch_sub(old, Ordering::Relaxed);
    }
}

/// What was written to a clone. Reads and writes may come from many threads at once; one that has returned is seen by
/// all that begin later. Where two overlap, either may win, block by block.
#[derive(Debug)]
pub struct Overlay {
    // For messages.
    name: String,
    clone: CloneId,
    image_bytes: u64,
    data: Box<dyn LocalFile>,
    state: RwLock<State>,
    // Who completes a block from the base must be alone with it.
    stripes: Stripes,
    flushing: Mutex<()>,
    is_dirty: AtomicBool,
    is_lost: AtomicBool,
    memory: Arc<MapMemory>,
}

#[derive(Debug)]
struct State {
    map: Arc<dyn LocalFile>,
    end: End,
    // What is read from the data file, and the part of it that the map does not have yet.
    local: Blocks,
    pending: Blocks,
    promise: Promise,
    bytes_counted: u64,
    writes_uncounted: u32,
}

/// Entries that will have to be appended, at the most: one for each write that brought blocks.
#[derive(Debug, Default)]
struct Promise {
    in_flight: u64,
    pending: u64,
    appending: u64,
    // The map has room up to here.
    room_bytes: u64,
}

impl Promise {
    fn entries(&self) -> u64 {
        self.in_flight + self.pending + self.appending
    }
}

impl Overlay {
    /// The overlay in two files. `name` is for messages.
    ///
    /// # Errors
    /// `Corrupt` when the map is damaged or the data file has another size than the image; `Unsupported`,
    /// `Unavailable`, `NoSpace` when the map does not fit into memory.
    pub fn open(
        name: impl Into<String>,
        clone: CloneId,
        image_bytes: u64,
        data: Box<dyn LocalFile>,
        map: Arc<dyn LocalFile>,
        memory: Arc<MapMemory>,
    ) -> Result<Self> {
        let name = name.into();
        let bytes = data.bytes()?;
        if bytes != image_bytes {
            return Err(corrupt(format!("clone {name}: data has {bytes} bytes, the image {image_bytes}")));
        }
        let overlay = Self {
            name,
            clone,
            image_bytes,
            data,
            state: RwLock::new(State {
                map: map.clone(),
                end: End { entries: 0, round: 0 },
                local: Blocks::default(),
                pending: Blocks::default(),
                promise: Promise::default(),
                bytes_counted: 0,
                writes_uncounted: 0,
            }),
            stripes: Stripes::default(),
            flushing: Mutex::default(),
            is_dirty: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            memory,
        };
        overlay.load(map)?;
        Ok(overlay)
    }

    /// Reads the map from a file and goes on with it. Returns whether it must be compacted before anything is
    /// written: its last round is torn, or most of it says what other parts say as well. Nothing may be unflushed.
    ///
    /// # Errors
    /// As [`Overlay::open`].
    pub fn load(&self, map: Arc<dyn LocalFile>) -> Result<bool> {
        let loaded = map::load(&*map, self.clone, self.image_bytes).map_err(|e| self.about("map", e))?;
        let Loaded { mut blocks, end, is_torn, .. } = loaded;
        let bytes_counted = blocks.shrink();
        let is_wasteful = end.entries > 2 * map::compact_entries(&blocks) + WASTED_ENTRIES;
        let mut state = self.state_mut();
        self.memory.replace(state.bytes_counted, bytes_counted);
        let promise = Promise { room_bytes: end.bytes(), ..Promise::default() };
        *state =
            State { map, end, local: blocks, pending: Blocks::default(), promise, bytes_counted, writes_uncounted: 0 };
        self.is_lost.store(false, Ordering::SeqCst);
        if self.memory.is_full() {
            return Err(self.memory_is_full());
        }
        Ok(is_torn || is_wasteful)
    }

    /// Writes the map anew into an empty file and syncs that.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn write_map(&self, file: &dyn LocalFile) -> Result<()> {
        let written = map::write(file, self.clone, self.image_bytes, &self.state().local);
        written.map(drop).map_err(|e| self.about("map", e))
    }

    /// Bytes of the image.
    pub fn bytes(&self) -> u64 {
        self.image_bytes
    }

    /// Blocks that the clone holds itself.
    pub fn blocks_local(&self) -> u64 {
        self.state().local.count()
    }

    /// Whether any byte of a range was written, as far as blocks tell.
    pub fn has_any(&self, range: Range<u64>) -> bool {
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
        range.start < range.end && self.state().local.runs(blocks).next().is_some()
    }

    /// Reads into `out`, which is filled completely on `Ok`.
    ///
    /// # Errors
    /// `Invalid` past the end; what the base returns; `Corrupt`, `Unavailable`.
    pub fn read_at(&self, base: &dyn Base, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = self.end_of(offset, out.len() as u64)?;
        let runs: Vec<Range<u64>> = self.state().local.runs(offset / BLOCK..end.div_ceil(BLOCK)).collect();
        let mut rest = out;
        let mut at = offset;
        for run in runs {
            let from = (run.start * BLOCK).clamp(at, end);
            let until = run.end.saturating_mul(BLOCK).clamp(from, end);
            let (below, tail) = rest.split_at_mut((from - at) as usize);
            let (local, tail) = tail.split_at_mut((until - from) as usize);
            if !below.is_empty() {
                base.read_at(at, below)?;
            }
            self.data.read_at(from, local).map_err(|e| self.about("data", e))?;
            rest = tail;
            at = until;
        }
        if rest.is_empty() { Ok(()) } else { base.read_at(at, rest) }
    }

    /// Writes. Not durable before [`Overlay::flush`].
    ///
    /// # Errors
    /// `TooLarge` past the end of the image, which keeps its size; `NoSpace`; what the base returns when a block has
    /// to be completed; `Unavailable`. After an error any part may be written, block by block.
    pub fn write_at(&self, base: &dyn Base, offset: u64, bytes: &[u8]) -> Result<()> {
        self.end_for_change(offset, bytes.len() as u64)?;
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = SEGMENT_BYTES as u64 - at % SEGMENT_BYTES as u64;
            let (piece, tail) = rest.split_at(rest.len().min(room as usize));
            self.write_piece(base, at, piece)?;
            at += piece.len() as u64;
            rest = tail;
        }
        Ok(())
    }

    /// Writes within one segment.
    fn write_piece(&self, base: &dyn Base, offset: u64, bytes: &[u8]) -> Result<()> {
        let end = offset + bytes.len() as u64;
        let stripe = self.stripes.of(offset / SEGMENT_BYTES as u64);
        {
            let _shared = stripe.read().unwrap_or_else(PoisonError::into_inner);
            if self.missing(offset, end) == (offset, end) {
                return self.put(offset, bytes);
            }
        }
        let _alone = stripe.write().unwrap_or_else(PoisonError::into_inner);
        // Looked at again: somebody may have brought the block meanwhile.
        let (from, until) = self.missing(offset, end);
        let mut whole = vec![0; (until - from) as usize];
        let (head, rest) = whole.split_at_mut((offset - from) as usize);
        let (body, tail) = rest.split_at_mut(bytes.len());
        body.copy_from_slice(bytes);
        for (at, missing) in [(from, head), (end, tail)] {
            if !missing.is_empty() {
                base.read_at(at, missing)?;
            }
        }
        self.put(from, &whole)
    }

    /// A range, widened to whole blocks where it begins or ends within a block that is not local.
    fn missing(&self, offset: u64, end: u64) -> (u64, u64) {
        let state = self.state();
        let is_missing = |at: u64| !state.local.contains(at / BLOCK);
        let from = if offset.is_multiple_of(BLOCK) || !is_missing(offset) { offset } else { offset - offset % BLOCK };
        let is_end = end.is_multiple_of(BLOCK) || end == self.image_bytes;
        let until = if is_end || !is_missing(end) { end } else { end.next_multiple_of(BLOCK).min(self.image_bytes) };
        (from, until)
    }

    /// Writes what needs nothing from the base.
    fn put(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let blocks = offset / BLOCK..(offset + bytes.len() as u64).div_ceil(BLOCK);
        self.bring(blocks, || self.data.write_at(offset, bytes))
    }

    /// Makes a range of the image zeros.
    ///
    /// # Errors
    /// As [`Overlay::write_at`].
    pub fn zero(&self, base: &dyn Base, offset: u64, bytes: u64) -> Result<()> {
        let end = self.end_for_change(offset, bytes)?;
        let zeros = [0; BLOCK_BYTES];
        let whole = offset.next_multiple_of(BLOCK).min(end);
        let head = zeros.get(..(whole - offset) as usize).unwrap_or_default();
        self.write_at(base, offset, head)?;
        let last = if end == self.image_bytes { end } else { (end - end % BLOCK).max(whole) };
        let tail = zeros.get(..(end - last) as usize).unwrap_or_default();
        self.write_at(base, last, tail)?;
        if whole == last {
            return Ok(());
        }
        let segment = SEGMENT_BYTES as u64;
        let _shared = self.stripes.shared(whole / segment..(last - 1) / segment + 1);
        self.bring(whole / BLOCK..last.div_ceil(BLOCK), || self.data.zero(whole, last - whole))
    }

    /// Sees to it that writing to a range finds room.
    ///
    /// # Errors
    /// `TooLarge` past the end, `NoSpace`, `Unavailable`.
    pub fn reserve(&self, offset: u64, bytes: u64) -> Result<()> {
        self.end_for_change(offset, bytes)?;
        self.data.reserve(offset, bytes).map_err(|e| self.about("data", e))
    }

    /// Changes the data file and then calls these blocks local: in this order, so that nobody reads what is not there.
    fn bring(&self, blocks: Range<u64>, change: impl FnOnce() -> Result<()>) -> Result<()> {
        self.check_lost()?;
        let brings = !self.state().local.contains_all(blocks.clone());
        if brings {
            self.promise()?;
        }
        let changed = change().map_err(|e| self.about("data", e));
        if brings {
            let mut state = self.state_mut();
            state.promise.in_flight -= 1;
            if changed.is_ok() {
                state.promise.pending += 1;
                state.local.insert(blocks.clone());
                state.pending.insert(blocks);
                state.writes_uncounted += 1;
                if state.writes_uncounted >= WRITES_PER_COUNT {
                    self.count_memory(&mut state);
                }
            }
        }
        // After the change: a flush that begins later must not pass it by.
        self.is_dirty.store(true, Ordering::SeqCst);
        changed
    }

    /// Sets room for one more entry of the map aside: what was accepted can also be flushed.
    fn promise(&self) -> Result<()> {
        if self.memory.is_full() {
            return Err(self.memory_is_full());
        }
        let mut state = self.state_mut();
        state.promise.in_flight += 1;
        let start = state.end.bytes();
        let wanted = state.promise.entries() * ENTRY_BYTES as u64;
        if start + wanted > state.promise.room_bytes {
            let bytes = wanted + MAP_RESERVE_BYTES;
            if let Err(e) = state.map.reserve(start, bytes) {
                state.promise.in_flight -= 1;
                return Err(self.about("map", e));
            }
            state.promise.room_bytes = start + bytes;
        }
        Ok(())
    }

    fn count_memory(&self, state: &mut State) {
        let bytes = state.local.shrink() + state.pending.shrink();
        self.memory.replace(state.bytes_counted, bytes);
        state.bytes_counted = bytes;
        state.writes_uncounted = 0;
    }

    fn memory_is_full(&self) -> Error {
        let bytes = self.memory.bytes_max;
        let what = "the maps of the open clones fill the memory set aside for them, which max_memory raises";
        Error::new(ErrorKind::NoSpace, format!("clone {}: {what}, bytes={bytes}", self.name))
    }

    /// Everything written by calls that have returned is durable when this returns. Free when there is nothing.
    ///
    /// # Errors
    /// `NoSpace` when the map has no room: nothing is lost, and it can be tried again. `Unavailable` (and after it
    /// every call) when the disk could not write: what was not flushed before may be lost.
    pub fn flush(&self) -> Result<()> {
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_lost()?;
        if !self.is_dirty.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let (map, end, pending) = {
            let mut state = self.state_mut();
            state.promise.appending = std::mem::take(&mut state.promise.pending);
            (state.map.clone(), state.end, std::mem::take(&mut state.pending))
        };
        if let Err(e) = self.data.sync() {
            return Err(self.lose("data", e));
        }
        if pending.is_empty() {
            self.state_mut().promise.appending = 0;
            return Ok(());
        }
        let appended = map::append(&*map, self.clone, end, &pending);
        match appended {
            Ok(end) => {
                if let Err(e) = map.sync() {
                    return Err(self.lose("map", e));
                }
                let mut state = self.state_mut();
                state.end = end;
                state.promise.appending = 0;
                Ok(())
            }
            Err(e) => {
                // What is half there must not be taken for what comes next.
                if let Err(e) = map.set_len(end.bytes()) {
                    return Err(self.lose("map", e));
                }
                let mut state = self.state_mut();
                state.pending.insert_all(&pending);
                state.promise.pending += std::mem::take(&mut state.promise.appending);
                state.promise.room_bytes = end.bytes();
                self.is_dirty.store(true, Ordering::SeqCst);
                Err(self.about("map", e))
            }
        }
    }

    /// The next data at or after `offset`, `None` when only a hole is left.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn seek_data(&self, base: &dyn Base, offset: u64) -> Result<Option<u64>> {
        let found = self.seek(base, offset, true)?;
        Ok((found < self.image_bytes).then_some(found))
    }

    /// The next hole at or after `offset`: the end of the image is one.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn seek_hole(&self, base: &dyn Base, offset: u64) -> Result<u64> {
        self.seek(base, offset, false)
    }

    fn seek(&self, base: &dyn Base, offset: u64, data: bool) -> Result<u64> {
        let mut at = offset;
        while at < self.image_bytes {
            let run = self.state().local.next_run(at / BLOCK);
            let run = run.map_or(self.image_bytes..self.image_bytes, |r| r.start * BLOCK..r.end.saturating_mul(BLOCK));
            let (found, until) = if run.start <= at {
                (self.data.next(at, data).map_err(|e| self.about("data", e))?, run.end)
            } else {
                let found = if data { base.seek_data(at)?.unwrap_or(self.image_bytes) } else { base.seek_hole(at)? };
                (found, run.start)
            };
            let until = until.min(self.image_bytes);
            if found < until {
                return Ok(found);
            }
            at = until;
        }
        Ok(self.image_bytes)
    }

    fn end_of(&self, offset: u64, bytes: u64) -> Result<u64> {
        offset.checked_add(bytes).filter(|end| *end <= self.image_bytes).ok_or_else(|| {
            let what = format!("clone {}: past the end, offset={offset} bytes={bytes}", self.name);
            Error::new(ErrorKind::Invalid, what)
        })
    }

    fn end_for_change(&self, offset: u64, bytes: u64) -> Result<u64> {
        self.end_of(offset, bytes).map_err(|e| e.as_kind(ErrorKind::TooLarge))
    }

    fn check_lost(&self) -> Result<()> {
        if self.is_lost.load(Ordering::SeqCst) {
            let what = "what was written is not all on the disk: close the clone and open it again";
            return Err(Error::new(ErrorKind::Unavailable, format!("clone {}: {what}", self.name)));
        }
        Ok(())
    }

    /// After a failed sync the kernel calls clean what it could not write: no later sync would tell.
    fn lose(&self, what: &str, cause: Error) -> Error {
        self.is_lost.store(true, Ordering::SeqCst);
        self.about(what, cause)
    }

    fn about(&self, what: &str, cause: Error) -> Error {
        cause.within(format!("clone {}: {what}", self.name))
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let bytes = self.state().bytes_counted;
        self.memory.replace(bytes, 0);
    }
}

/// So many entries too many are no reason to write a map anew.
const WASTED_ENTRIES: u64 = 16 << 10;
