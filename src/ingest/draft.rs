//! W2: an image that is being written at any offset, in any order, in bounded memory; readable at any time.
//!
//! Bytes wait in segments of 2 MiB until a segment is whole; whole segments go to the writer in batches, in a
//! thread of the draft's own. Segments that do not become whole are written as they are when memory is short, and
//! kept in a spill file when that happens to the same segment twice.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use roaring::RoaringBitmap;

use crate::catalog::state::FileEntry;
use crate::clock::Timestamp;
use crate::error::{Error, ErrorKind, Result, invalid};
use crate::fingerprint::{Fingerprint, is_zero};
use crate::image::reader::{read_segment, seek};
use crate::image::tree::{Tree, read_recipe};
use crate::ingest::background::step_back;
use crate::ingest::budget::Budget;
use crate::ingest::draft_tree::DraftTree;
use crate::ingest::partition::grid_phase;
use crate::ingest::ranges::Ranges;
use crate::ingest::writer::{CommitRequest, Writer};
use crate::limits::{BATCH_SEGMENTS, BLOCK_BYTES, IMAGE_BYTES_MAX, SEGMENT_BLOCKS, SEGMENT_BYTES};
use crate::pack::reader::Packs;
use crate::recipe::{Place, Recipe, RootPage};
use crate::store::session::Session;
use crate::units::{Grid, SegmentIndex, SlotId};

/// Segments of one draft that may be partly written at a time.
const FILLING_MAX: usize = 24;

/// A segment with bytes that no recipe has yet.
struct Fill {
    bytes: Vec<u8>,
    written: Ranges,
    used: u64,
}

enum Held {
    /// Being written to.
    Filling(Fill),
    /// Given to the writer; not to be changed any more.
    Queued(Arc<Fill>),
    /// In the spill file.
    Spilled { written: Ranges, at: u64 },
}

/// What a draft needs from around it.
pub struct Surroundings {
    /// The writer's session.
    pub session: Arc<Session>,
    /// Memory for segments, shared with all drafts.
    pub budget: Arc<Budget>,
    /// What segments are compared with.
    pub parent: Option<Arc<Tree>>,
    /// Where a spill file may be made.
    pub spill_folder: PathBuf,
}

/// An image that is being written.
pub struct Draft {
    around: Surroundings,
    packs: Arc<Packs>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    bytes: u64,
    mtime: Timestamp,
    // Unknown until data comes that is not zero: its first bytes may tell where the first partition begins.
    grid: Option<Grid>,
    tree: DraftTree,
    root: Option<Arc<RootPage>>,
    held: HashMap<u32, Held>,
    queue: BTreeSet<u32>,
    filling: usize,
    // Segments that were given to the writer since the last commit.
    staged: RoaringBitmap,
    writer: Option<Writer>,
    is_working: bool,
    worker: Option<JoinHandle<()>>,
    // Somebody waits: the queue is worked on even when it makes no whole batch.
    is_urgent: bool,
    is_draining: bool,
    is_dirty: bool,
    failed: Option<Error>,
    spill: Option<File>,
    spill_free: Vec<u64>,
    spill_end: u64,
    clock: u64,
}

impl Draft {
    /// A new, empty draft.
    pub fn create(around: Surroundings, now: Timestamp) -> Arc<Self> {
        let grid = around.parent.as_ref().map(|p| p.root().grid());
        let tree = DraftTree::empty(around.session.packs().clone(), around.parent.clone());
        Self::with(around, tree, None, 0, grid, now, true)
    }

    /// A draft that goes on from its last commit.
    pub fn resume(around: Surroundings, root: Arc<RootPage>, file: &FileEntry) -> Arc<Self> {
        let grid = match root.data_blocks {
            0 => around.parent.as_ref().map(|p| p.root().grid()),
            _ => Some(root.grid()),
        };
        let tree = DraftTree::of_root(&root, around.session.packs().clone(), around.parent.clone());
        Self::with(around, tree, Some(root.clone()), root.image_bytes, grid, file.mtime, false)
    }

    fn with(
        around: Surroundings,
        tree: DraftTree,
        root: Option<Arc<RootPage>>,
        bytes: u64,
        grid: Option<Grid>,
        mtime: Timestamp,
        is_dirty: bool,
    ) -> Arc<Self> {
        let packs = around.session.packs().clone();
        Arc::new(Self {
            around,
            packs,
            inner: Mutex::new(Inner {
                bytes,
                mtime,
                grid,
                tree,
                root,
                held: HashMap::new(),
                queue: BTreeSet::new(),
                filling: 0,
                staged: RoaringBitmap::new(),
                writer: None,
                is_working: false,
                worker: None,
                is_urgent: false,
                is_draining: false,
                is_dirty,
                failed: None,
                spill: None,
                spill_free: Vec::new(),
                spill_end: 0,
                clock: 0,
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }

    /// The session that it is written in.
    pub fn session(&self) -> &Arc<Session> {
        &self.around.session
    }

    /// Bytes of the image now.
    pub fn bytes(&self) -> u64 {
        self.lock().bytes
    }

    /// Last change of the content.
    pub fn mtime(&self) -> Timestamp {
        self.lock().mtime
    }

    /// Sets the time of the last change; durable with the next commit.
    pub fn set_mtime(&self, mtime: Timestamp) {
        let mut inner = self.lock();
        inner.mtime = mtime;
        inner.is_dirty = true;
    }

    /// Blocks with data: exact after a commit, before it segments in memory count in full.
    pub fn data_blocks(&self) -> u64 {
        let inner = self.lock();
        inner.root.as_ref().map_or(0, |r| r.data_blocks) + (inner.held.len() * SEGMENT_BLOCKS) as u64
    }

    /// Whether something was changed since the last commit.
    pub fn is_dirty(&self) -> bool {
        self.lock().is_dirty
    }

    /// Writes bytes at an offset. Waits while memory is short.
    ///
    /// # Errors
    /// `TooLarge`, `NoSpace` and what else an earlier segment met; then all further calls fail until the file is
    /// truncated to nothing.
    pub fn write_at(self: &Arc<Self>, offset: u64, bytes: &[u8], now: Timestamp) -> Result<()> {
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= IMAGE_BYTES_MAX);
        let end = end.ok_or_else(too_large)?;
        let mut inner = self.ready()?;
        inner.mtime = now;
        inner.is_dirty = true;
        if inner.grid.is_none() {
            if is_zero(bytes) {
                // Nothing is held yet: zeros change no more than the size.
                inner.bytes = inner.bytes.max(end);
                return Ok(());
            }
            let phase = if offset == 0 { grid_phase(bytes, u64::MAX) } else { 0 };
            inner.grid = Some(Grid::with_phase(phase));
        }
        inner = self.put(inner, offset, bytes)?;
        inner.bytes = inner.bytes.max(end);
        Ok(())
    }

    /// The lock, once nobody drains the draft.
    fn ready(&self) -> Result<MutexGuard<'_, Inner>> {
        let mut inner = self.lock();
        while inner.is_draining {
            inner = self.wait(inner);
        }
        match &inner.failed {
            Some(e) => Err(e.duplicate()),
            None => Ok(inner),
        }
    }

    /// Puts bytes into their segments.
    fn put<'a>(
        self: &'a Arc<Self>,
        mut inner: MutexGuard<'a, Inner>,
        offset: u64,
        bytes: &[u8],
    ) -> Result<MutexGuard<'a, Inner>> {
        let grid = inner.grid.unwrap_or_default();
        let mut at = grid.offset(offset);
        let mut rest = bytes;
        while !rest.is_empty() {
            let segment = SegmentIndex::holding(at);
            let within = (at - segment.grid_offset()) as usize;
            let count = (SEGMENT_BYTES - within).min(rest.len());
            let (now, later) = rest.split_at(count);
            inner = self.open_segment(inner, segment)?;
            inner.clock += 1;
            let clock = inner.clock;
            let mut is_whole = false;
            if let Some(Held::Filling(fill)) = inner.held.get_mut(&segment.0) {
                if let Some(part) = fill.bytes.get_mut(within..within + count) {
                    part.copy_from_slice(now);
                }
                fill.written.add(within as u32..(within + count) as u32);
                fill.used = clock;
                is_whole = fill.written.covers(SEGMENT_BYTES as u32);
            }
            if is_whole {
                inner.queue(segment.0);
                self.start_work(&mut inner);
            }
            rest = later;
            at += count as u64;
        }
        Ok(inner)
    }

    /// Makes sure that a segment is there to be written to.
    fn open_segment<'a>(
        self: &'a Arc<Self>,
        mut inner: MutexGuard<'a, Inner>,
        segment: SegmentIndex,
    ) -> Result<MutexGuard<'a, Inner>> {
        loop {
            if let Some(e) = &inner.failed {
                return Err(e.duplicate());
            }
            match inner.held.get(&segment.0) {
                Some(Held::Filling(_)) => return Ok(inner),
                Some(Held::Queued(_)) => {
                    inner = self.hurry(inner);
                    continue;
                }
                _ => {}
            }
            let may_fill = inner.filling < FILLING_MAX;
            if may_fill && self.around.budget.try_take() {
                break;
            }
            if !inner.queue.is_empty() || inner.is_working {
                inner = self.hurry(inner);
            } else if inner.filling > 0 {
                self.make_room(&mut inner)?;
            } else {
                // The budget is spent by others; one segment is everybody's right.
                self.around.budget.overdraw();
                break;
            }
        }
        let grid = inner.grid.unwrap_or_default();
        let fill = match inner.held.remove(&segment.0) {
            Some(Held::Spilled { written, at }) => match inner.unspill(written, at) {
                Ok(fill) => fill,
                Err(e) => {
                    self.around.budget.give();
                    inner.failed = Some(e.duplicate());
                    return Err(e);
                }
            },
            _ => {
                let mut written = Ranges::default();
                let lead = if segment.0 == 0 { grid.lead() } else { 0 };
                written.add(0..lead);
                let mut fill = Fill { bytes: self.around.budget.buffer(), written, used: 0 };
                // What is thought in front of the image is zero for ever.
                fill.bytes.iter_mut().take(lead as usize).for_each(|b| *b = 0);
                fill
            }
        };
        inner.filling += 1;
        inner.held.insert(segment.0, Held::Filling(fill));
        Ok(inner)
    }

    /// Has the queue worked on now, and waits for a change.
    fn hurry<'a>(self: &'a Arc<Self>, mut inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        inner.is_urgent = true;
        self.start_work(&mut inner);
        self.wait(inner)
    }

    /// Frees the memory of the segment that was touched longest ago: it is written as it is, or, when that has
    /// happened to it before, spilled: writing it again and again would only make garbage.
    fn make_room(&self, inner: &mut Inner) -> Result<()> {
        let oldest = inner
            .held
            .iter()
            .filter_map(|(segment, held)| match held {
                Held::Filling(fill) => Some((fill.used, *segment)),
                _ => None,
            })
            .min();
        let Some((_, segment)) = oldest else { return Ok(()) };
        if inner.staged.contains(segment) {
            inner.spill(segment, &self.around.spill_folder)?;
            self.around.budget.give();
        } else {
            inner.queue(segment);
        }
        Ok(())
    }

    /// Starts the working thread if there is enough to do and none runs.
    fn start_work(self: &Arc<Self>, inner: &mut Inner) {
        if inner.is_working || !inner.has_work() {
            return;
        }
        inner.is_working = true;
        let draft = self.clone();
        let started = std::thread::Builder::new().name("snapfs-draft".into()).spawn(move || draft.work());
        match started {
            Ok(worker) => inner.worker = Some(worker),
            Err(e) => {
                inner.is_working = false;
                inner.fail(Error::io("thread", e), &self.around.budget);
                self.changed.notify_all();
            }
        }
    }

    fn work(&self) {
        step_back();
        let mut inner = self.lock();
        while inner.failed.is_none() && inner.has_work() {
            let mut batch = Vec::new();
            let mut missing = None;
            while batch.len() < BATCH_SEGMENTS {
                let Some(segment) = inner.queue.pop_first() else { break };
                let Some(Held::Queued(fill)) = inner.held.get(&segment) else { continue };
                let fill = fill.clone();
                let place = match fill.written.covers(SEGMENT_BYTES as u32) {
                    true => Ok(None),
                    false => inner.tree.place(SegmentIndex(segment)),
                };
                match place {
                    Ok(place) => batch.push((SegmentIndex(segment), fill, place)),
                    Err(e) => missing = Some(e),
                }
            }
            let mut writer = match inner.writer.take() {
                Some(writer) => writer,
                None => Writer::new(self.around.session.clone(), self.around.parent.clone()),
            };
            drop(inner);
            let outcome = match missing {
                Some(e) => Err(e),
                None => self.take(&mut writer, &batch),
            };
            let fills: Vec<Arc<Fill>> = batch.into_iter().map(|(_, fill, _)| fill).collect();
            inner = self.lock();
            let outcome = outcome.and_then(|places| {
                for (segment, place) in places {
                    inner.tree.set(segment, place)?;
                    inner.staged.insert(segment.0);
                    inner.held.remove(&segment.0);
                    self.around.budget.give();
                }
                writer.shrink(&mut inner.tree)
            });
            match outcome {
                Ok(()) => inner.writer = Some(writer),
                Err(e) => {
                    // Space that is given back now may be what the next copy needs.
                    writer.abandon();
                    inner.fail(e, &self.around.budget);
                }
            }
            for fill in fills.into_iter().filter_map(Arc::into_inner) {
                self.around.budget.recycle(fill.bytes);
            }
            self.changed.notify_all();
        }
        inner.is_working = false;
        if inner.queue.is_empty() {
            inner.is_urgent = false;
        }
        self.changed.notify_all();
    }

    /// Fills gaps from what was there before, and gives whole segments to the writer.
    fn take(
        &self,
        writer: &mut Writer,
        batch: &[(SegmentIndex, Arc<Fill>, Option<Place>)],
    ) -> Result<Vec<(SegmentIndex, Option<Place>)>> {
        let mut merged: Vec<Option<Vec<u8>>> = Vec::with_capacity(batch.len());
        for (_, fill, place) in batch {
            merged.push(match place {
                None => None,
                Some(place) => Some(self.merge(fill, place)?),
            });
        }
        let segments: Vec<(SegmentIndex, &[u8])> = batch
            .iter()
            .zip(&merged)
            .map(|((segment, fill, _), merged)| (*segment, merged.as_deref().unwrap_or(&fill.bytes)))
            .collect();
        writer.take(&segments)
    }

    fn merge(&self, fill: &Fill, place: &Place) -> Result<Vec<u8>> {
        let recipe = read_recipe(&self.packs, place)?;
        let mut bytes = fill.bytes.clone();
        for gap in fill.written.gaps(0..SEGMENT_BYTES as u32) {
            let gap = gap.start as usize..gap.end as usize;
            read_segment(&self.packs, Some(&recipe), gap.start, bytes.get_mut(gap).unwrap_or_default())?;
        }
        Ok(bytes)
    }

    /// Reads bytes at an offset; returns how many: fewer than asked only at the end.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<usize> {
        let inner = self.lock();
        let count = usize::try_from(inner.bytes.saturating_sub(offset)).unwrap_or(usize::MAX).min(out.len());
        let Some(out) = out.get_mut(..count) else { return Ok(0) };
        let Some(grid) = inner.grid else {
            out.fill(0);
            return Ok(count);
        };
        self.read_range(inner, grid.offset(offset), out)?;
        Ok(count)
    }

    /// Reads a range of the grid: what is held from memory, the rest, without the lock, from where the tree says.
    fn read_range(&self, mut inner: MutexGuard<'_, Inner>, grid_offset: u64, out: &mut [u8]) -> Result<()> {
        let mut below: Vec<(Place, usize, std::ops::Range<usize>)> = Vec::new();
        let mut done = 0;
        while done < out.len() {
            let at = grid_offset + done as u64;
            let segment = SegmentIndex::holding(at);
            let within = (at - segment.grid_offset()) as usize;
            let count = (SEGMENT_BYTES - within).min(out.len() - done);
            let range = within as u32..(within + count) as u32;
            let part = out.get_mut(done..done + count).unwrap_or_default();
            part.fill(0);
            let place = inner.tree.place(segment)?;
            let gaps = match inner.held.get(&segment.0) {
                None => vec![range],
                Some(held) => {
                    let written = match held {
                        Held::Filling(fill) => &fill.written,
                        Held::Queued(fill) => &fill.written,
                        Held::Spilled { written, .. } => written,
                    };
                    for piece in written.within(range.clone()) {
                        let to = (piece.start - range.start) as usize..(piece.end - range.start) as usize;
                        let from = piece.start as usize..piece.end as usize;
                        let part = part.get_mut(to).unwrap_or_default();
                        match held {
                            Held::Filling(fill) => part.copy_from_slice(fill.bytes.get(from).unwrap_or_default()),
                            Held::Queued(fill) => part.copy_from_slice(fill.bytes.get(from).unwrap_or_default()),
                            Held::Spilled { at, .. } => inner.read_spilled(at + from.start as u64, part)?,
                        }
                    }
                    written.gaps(range)
                }
            };
            if let Some(place) = place {
                for gap in gaps {
                    let start = done + gap.start as usize - within;
                    below.push((place, gap.start as usize, start..start + gap.len()));
                }
            }
            done += count;
        }
        drop(inner);
        let mut last: Option<(Place, Recipe)> = None;
        for (place, within, range) in below {
            if last.as_ref().is_none_or(|(p, _)| *p != place) {
                last = Some((place, read_recipe(&self.packs, &place)?));
            }
            let recipe = last.as_ref().map(|(_, recipe)| recipe);
            read_segment(&self.packs, recipe, within, out.get_mut(range).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Makes zeros of a range within the image; whole segments become holes at once.
    ///
    /// # Errors
    /// As [`Draft::write_at`].
    pub fn zero(self: &Arc<Self>, offset: u64, bytes: u64, now: Timestamp) -> Result<()> {
        let mut inner = self.ready()?;
        inner.mtime = now;
        inner.is_dirty = true;
        let end = offset.saturating_add(bytes).min(inner.bytes);
        self.zero_range(inner, offset, end).map(drop)
    }

    fn zero_range<'a>(
        self: &'a Arc<Self>,
        mut inner: MutexGuard<'a, Inner>,
        offset: u64,
        end: u64,
    ) -> Result<MutexGuard<'a, Inner>> {
        let Some(grid) = inner.grid.filter(|_| offset < end) else { return Ok(inner) };
        // Past the end nothing is held that counts: the last segment may go whole.
        let is_to_the_end = end >= inner.bytes;
        let mut at = grid.offset(offset);
        let stop = grid.offset(end);
        while at < stop {
            let segment = SegmentIndex::holding(at);
            let start = segment.grid_offset();
            if !inner.tree.has_group(segment.group()) && inner.nothing_held_in_group(segment.group()) {
                at = u64::from(segment.group() + 1) * crate::limits::GROUP_BYTES;
                continue;
            }
            let until = stop.min(start + SEGMENT_BYTES as u64);
            let from_start = at == start || (segment.0 == 0 && at == grid.offset(0));
            if from_start && (until == start + SEGMENT_BYTES as u64 || is_to_the_end) {
                inner = self.settle(inner, segment)?;
                if let Some(held) = inner.held.remove(&segment.0) {
                    match held {
                        Held::Spilled { at, .. } => inner.spill_free.push(at),
                        _ => {
                            inner.filling -= 1;
                            self.around.budget.give();
                        }
                    }
                }
                inner.tree.set(segment, None)?;
            } else if inner.held.contains_key(&segment.0) || inner.tree.place(segment)?.is_some() {
                let zeros = vec![0; (until - at) as usize];
                inner = self.put(inner, grid.image_offset(at), &zeros)?;
            }
            at = until;
        }
        Ok(inner)
    }

    /// Waits until a segment is not with the writer.
    fn settle<'a>(
        self: &'a Arc<Self>,
        mut inner: MutexGuard<'a, Inner>,
        segment: SegmentIndex,
    ) -> Result<MutexGuard<'a, Inner>> {
        while let Some(Held::Queued(_)) = inner.held.get(&segment.0) {
            inner = self.hurry(inner);
        }
        match &inner.failed {
            Some(e) => Err(e.duplicate()),
            None => Ok(inner),
        }
    }

    /// Sets the size; what is cut off is gone, what is added is a hole. Truncating to nothing also forgets a
    /// failure: the file can be written again.
    ///
    /// # Errors
    /// `TooLarge`, and as [`Draft::write_at`].
    pub fn truncate(self: &Arc<Self>, bytes: u64, now: Timestamp) -> Result<()> {
        if bytes > IMAGE_BYTES_MAX {
            return Err(too_large());
        }
        if bytes == 0 {
            return self.clear(now);
        }
        let mut inner = self.ready()?;
        inner.mtime = now;
        if bytes == inner.bytes {
            return Ok(());
        }
        inner.is_dirty = true;
        let old = inner.bytes;
        if bytes < old {
            inner = self.zero_range(inner, bytes, old)?;
            if let Some(grid) = inner.grid {
                inner.tree.truncate(SegmentIndex(grid.segments(bytes)))?;
            }
        }
        inner.bytes = bytes;
        Ok(())
    }

    fn clear(self: &Arc<Self>, now: Timestamp) -> Result<()> {
        let mut inner = self.lock();
        while inner.is_working || inner.is_draining {
            inner = self.wait(inner);
        }
        inner.drop_held(&self.around.budget);
        if let Some(writer) = inner.writer.take() {
            writer.abandon();
        }
        inner.tree = DraftTree::empty(self.packs.clone(), self.around.parent.clone());
        inner.grid = self.around.parent.as_ref().map(|p| p.root().grid());
        inner.staged.clear();
        inner.failed = None;
        inner.bytes = 0;
        inner.mtime = now;
        inner.is_dirty = true;
        Ok(())
    }

    /// Makes the file at least this long.
    ///
    /// # Errors
    /// As [`Draft::truncate`].
    pub fn extend(self: &Arc<Self>, bytes: u64, now: Timestamp) -> Result<()> {
        let longer = bytes > self.bytes();
        if longer { self.truncate(bytes, now) } else { Ok(()) }
    }

    /// The next data (`true`) or hole at or after an offset, as SEEK_DATA and SEEK_HOLE have it.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn seek(&self, offset: u64, data: bool) -> Result<Option<u64>> {
        let (grid, bytes) = {
            let inner = self.lock();
            (inner.grid, inner.bytes)
        };
        let Some(grid) = grid else { return Ok(if data { None } else { Some(offset) }) };
        let has_group = |group| {
            let inner = self.lock();
            Ok(inner.tree.has_group(group) || !inner.nothing_held_in_group(group))
        };
        seek(grid, bytes, offset, data, has_group, |segment| self.recipe_now(segment))
    }

    /// The recipe of a segment; one that is in memory gets a recipe that tells its holes and nothing else.
    fn recipe_now(&self, segment: SegmentIndex) -> Result<Option<Arc<Recipe>>> {
        let mut inner = self.lock();
        if inner.held.contains_key(&segment.0) {
            let mut bytes = vec![0; SEGMENT_BYTES];
            self.read_range(inner, segment.grid_offset(), &mut bytes)?;
            let any = SlotId(0);
            let slots: Vec<_> = bytes.chunks(BLOCK_BYTES).map(|b| (!is_zero(b)).then_some(any)).collect();
            let recipe = Recipe::from_slots(Fingerprint([0; 32]), &slots);
            return Ok((!recipe.extents.is_empty()).then(|| Arc::new(recipe)));
        }
        let Some(place) = inner.tree.place(segment)? else { return Ok(None) };
        drop(inner);
        Ok(Some(Arc::new(read_recipe(&self.packs, &place)?)))
    }

    /// Takes over whole segments of another image of the VM without reading them: the copy shares its recipes.
    /// Both ranges begin at the same place within a segment; returns how many bytes were taken over.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn adopt(self: &Arc<Self>, from: &Tree, from_offset: u64, to_offset: u64, bytes: u64) -> Result<u64> {
        let root = from.root();
        let mut inner = self.ready()?;
        if inner.grid.is_none() {
            inner.grid = Some(root.grid());
        }
        let grid = inner.grid.unwrap_or_default();
        if grid != root.grid() || from_offset != to_offset {
            return Ok(0);
        }
        let end = from_offset.saturating_add(bytes).min(root.image_bytes);
        let mut at = from_offset;
        while at < end {
            let segment = SegmentIndex::holding(grid.offset(at));
            let start = grid.image_offset(segment.grid_offset());
            let stop = (segment.grid_offset() + SEGMENT_BYTES as u64).min(grid.offset(root.image_bytes));
            let stop = grid.image_offset(stop);
            // Whole segments, or the last one, when the copy does not reach further.
            if at != start || stop > end || (stop == root.image_bytes && inner.bytes > stop) {
                break;
            }
            inner = self.settle(inner, segment)?;
            if inner.held.contains_key(&segment.0) {
                break;
            }
            let place = from.place(segment)?;
            let recipe = from.recipe(segment)?;
            let absent = |slot: SlotId| self.around.session.is_absent(slot.pack());
            let leans_on_absent = place.is_some_and(|p| absent(p.slot))
                || recipe.iter().flat_map(|r| &r.extents).any(|e| absent(e.first_slot));
            if leans_on_absent {
                break;
            }
            inner.tree.set(segment, place)?;
            at = stop;
        }
        if at > from_offset {
            inner.is_dirty = true;
            inner.bytes = inner.bytes.max(at);
        }
        Ok(at - from_offset)
    }

    /// W8: makes everything durable. Nothing to do when nothing was changed since the last commit.
    ///
    /// `describe` fills in what the draft does not know; it is given size, grid and time. Returns the root of the
    /// commit, `None` when there was nothing to do.
    ///
    /// # Errors
    /// What any segment met, and as [`Writer::commit`].
    pub fn commit(
        self: &Arc<Self>,
        describe: impl FnOnce(u64, Grid, Timestamp) -> CommitRequest,
    ) -> Result<Option<Arc<RootPage>>> {
        let mut inner = self.ready()?;
        if !inner.is_dirty {
            return Ok(None);
        }
        inner.is_draining = true;
        let outcome = self.drain(inner).and_then(|mut inner| {
            let request = describe(inner.bytes, inner.grid.unwrap_or_default(), inner.mtime);
            let mut writer = match inner.writer.take() {
                Some(writer) => writer,
                None => Writer::new(self.around.session.clone(), self.around.parent.clone()),
            };
            match writer.commit(&mut inner.tree, &request) {
                Ok(root) => {
                    inner.tree = DraftTree::of_root(&root, self.packs.clone(), self.around.parent.clone());
                    inner.root = Some(root.clone());
                    inner.writer = Some(writer);
                    inner.staged.clear();
                    inner.spill = None;
                    inner.spill_free.clear();
                    inner.spill_end = 0;
                    inner.is_dirty = false;
                    Ok(Some(root))
                }
                Err(e) => {
                    if e.kind() != ErrorKind::Unavailable {
                        writer.abandon();
                    }
                    inner.fail(e.duplicate(), &self.around.budget);
                    Err(e)
                }
            }
        });
        // The thread has nothing left to do, but it still holds the draft and with it the VM's lock: whoever is
        // told that the commit is done finds the lock free when the draft is closed.
        let worker = self.lock().worker.take();
        if let Some(worker) = worker {
            let _ = worker.join();
        }
        self.lock().is_draining = false;
        self.changed.notify_all();
        outcome
    }

    /// Gives every held segment to the writer and waits until it has them.
    fn drain<'a>(self: &'a Arc<Self>, mut inner: MutexGuard<'a, Inner>) -> Result<MutexGuard<'a, Inner>> {
        loop {
            if let Some(e) = &inner.failed {
                return Err(e.duplicate());
            }
            let filling: Vec<u32> =
                inner.held.iter().filter(|(_, h)| matches!(h, Held::Filling(_))).map(|(s, _)| *s).collect();
            for segment in filling {
                inner.queue(segment);
            }
            if inner.queue.is_empty() && !inner.is_working {
                let spilled =
                    inner.held.iter().filter(|(_, h)| matches!(h, Held::Spilled { .. })).map(|(s, _)| *s).min();
                match spilled {
                    None => return Ok(inner),
                    Some(segment) => inner = self.open_segment(inner, SegmentIndex(segment))?,
                }
                continue;
            }
            inner = self.hurry(inner);
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.drop_held(&self.around.budget);
        if let Some(writer) = inner.writer.take() {
            writer.abandon();
        }
    }
}

impl Inner {
    /// Whether there is enough for a batch, or somebody waits for what there is.
    fn has_work(&self) -> bool {
        self.queue.len() >= BATCH_SEGMENTS || (self.is_urgent && !self.queue.is_empty())
    }

    fn queue(&mut self, segment: u32) {
        if let Some(Held::Filling(mut fill)) = self.held.remove(&segment) {
            self.filling -= 1;
            // Where nothing is below, a gap is a hole; the buffer has the bytes of some earlier segment.
            for gap in fill.written.gaps(0..SEGMENT_BYTES as u32) {
                if let Some(gap) = fill.bytes.get_mut(gap.start as usize..gap.end as usize) {
                    gap.fill(0);
                }
            }
            self.held.insert(segment, Held::Queued(Arc::new(fill)));
            self.queue.insert(segment);
        }
    }

    fn nothing_held_in_group(&self, group: u32) -> bool {
        self.held.keys().all(|s| SegmentIndex(*s).group() != group)
    }

    fn fail(&mut self, error: Error, budget: &Budget) {
        self.failed = Some(error);
        self.drop_held(budget);
    }

    fn drop_held(&mut self, budget: &Budget) {
        for held in std::mem::take(&mut self.held).into_values() {
            if !matches!(held, Held::Spilled { .. }) {
                budget.give();
            }
        }
        self.queue.clear();
        self.filling = 0;
        self.spill = None;
        self.spill_free.clear();
        self.spill_end = 0;
    }

    fn spill(&mut self, segment: u32, folder: &std::path::Path) -> Result<()> {
        let about = |e| Error::io("spill file", e);
        if self.spill.is_none() {
            std::fs::create_dir_all(folder).map_err(about)?;
            self.spill = Some(tempfile::tempfile_in(folder).map_err(about)?);
        }
        let at = self.spill_free.pop().unwrap_or(self.spill_end);
        self.spill_end = self.spill_end.max(at + SEGMENT_BYTES as u64);
        let Some(Held::Filling(fill)) = self.held.get(&segment) else { return Ok(()) };
        if let Some(file) = &self.spill {
            file.write_all_at(&fill.bytes, at).map_err(about)?;
        }
        let written = fill.written.clone();
        self.held.insert(segment, Held::Spilled { written, at });
        self.filling -= 1;
        Ok(())
    }

    fn unspill(&mut self, written: Ranges, at: u64) -> Result<Fill> {
        let mut bytes = vec![0; SEGMENT_BYTES];
        self.read_spilled(at, &mut bytes)?;
        self.spill_free.push(at);
        Ok(Fill { bytes, written, used: self.clock })
    }

    fn read_spilled(&self, at: u64, out: &mut [u8]) -> Result<()> {
        let file = self.spill.as_ref().ok_or_else(|| invalid("spill file is gone"))?;
        file.read_exact_at(out, at).map_err(|e| Error::io("spill file", e))
    }
}

fn too_large() -> Error {
    Error::new(ErrorKind::TooLarge, format!("an image has at most {IMAGE_BYTES_MAX} bytes"))
}
