//! R3-R5: reads ranges of an image, from many threads at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::Guard;
use crate::error::{Error, ErrorKind, Result, corrupt, invalid};
use crate::fingerprint::digest;
use crate::image::tree::Tree;
use crate::limits::{BLOCK_BYTES, GROUP_SEGMENTS, SEGMENT_BYTES};
use crate::pack::reader::Packs;
use crate::recipe::{Recipe, RootPage};
use crate::units::{Grid, SegmentIndex};

/// How far sequential reading is announced to the backend, in segments.
const READ_AHEAD_SEGMENTS: u32 = 2;

/// Whether the store does not know an image any more that was open: where nobody sees our pin, because the medium keeps
/// locks to each host, it may have been forgotten and collected. Asked only when something could not be read.
pub type IsGone = Box<dyn Fn() -> bool + Send + Sync>;

/// An open snapshot.
pub struct Image {
    name: String,
    tree: Tree,
    is_gone: IsGone,
    // Keeps collection away from what we read (I6).
    _pin: Box<dyn Guard>,
    // Segment up to which reading ahead was announced, and where the last read ended: hints for R4 only.
    announced: AtomicU64,
    last_end: AtomicU64,
}

impl Image {
    /// Opens the image under `root`; `name` is for messages, `pin` is held as long as the image is open.
    pub fn new(name: String, root: Arc<RootPage>, packs: Arc<Packs>, pin: Box<dyn Guard>, is_gone: IsGone) -> Self {
        let tree = Tree::new(root, packs);
        Self { name, tree, is_gone, _pin: pin, announced: AtomicU64::new(0), last_end: AtomicU64::new(0) }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of the image.
    pub fn bytes(&self) -> u64 {
        self.tree.root().image_bytes
    }

    /// Its metadata.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// How it lies on the grid.
    pub fn grid(&self) -> Grid {
        self.tree.root().grid()
    }

    /// What it means that something of the image could not be read.
    fn explain(&self, error: Error) -> Error {
        if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) || !(self.is_gone)() {
            return error;
        }
        Error::new(ErrorKind::Stale, format!("{}: was forgotten and collected", self.name)).because(error)
    }

    /// Reads the image at `offset` into `out`.
    ///
    /// `out` may have any length and alignment; it is filled completely on `Ok`, unspecified on `Err`.
    /// Cost: for 4 KiB at most two backend reads when group page and pack index are cached, at most four if not.
    ///
    /// # Errors
    /// `Invalid` past the end, `Corrupt` (naming snapshot, offset and object), `Stale` when it was collected although it
    /// is open, `Unavailable`.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(out.len() as u64).filter(|end| *end <= self.bytes());
        let Some(end) = end else {
            return Err(invalid(format!("{}: read past the end, offset={offset}", self.name)));
        };
        let grid = self.grid();
        let mut at = grid.offset(offset);
        let mut rest = out;
        while !rest.is_empty() {
            let segment = SegmentIndex::holding(at);
            let within = (at - segment.grid_offset()) as usize;
            let count = (SEGMENT_BYTES - within).min(rest.len());
            let (piece, tail) = rest.split_at_mut(count);
            let recipe = self.tree.recipe(segment);
            recipe
                .and_then(|recipe| read_segment(self.tree.packs(), recipe.as_deref(), within, piece))
                .map_err(|e| self.explain(e).within(format!("{}: offset {}", self.name, grid.image_offset(at))))?;
            rest = tail;
            at += count as u64;
        }
        self.read_ahead(offset, end);
        Ok(())
    }

    /// R4: when reading goes on where it ended, announces what the recipes of the next segments lead to.
    fn read_ahead(&self, offset: u64, end: u64) {
        let sequential = self.last_end.swap(end, Ordering::Relaxed).abs_diff(offset) <= 2 << 20;
        let segment = u64::from(SegmentIndex::holding(self.grid().offset(end)).0);
        let announced = self.announced.load(Ordering::Relaxed);
        if !sequential || end - offset < 64 << 10 || announced > segment + u64::from(READ_AHEAD_SEGMENTS) / 2 {
            if !sequential {
                self.announced.store(segment, Ordering::Relaxed);
            }
            return;
        }
        let until = (segment + u64::from(READ_AHEAD_SEGMENTS)).min(u64::from(self.grid().segments(self.bytes())));
        self.announced.store(until, Ordering::Relaxed);
        for next in announced.max(segment + 1)..until {
            // A hint: what is wrong with a recipe, the read itself will say.
            let Ok(Some(recipe)) = self.tree.recipe(SegmentIndex(next as u32)) else { continue };
            for extent in &recipe.extents {
                self.tree.packs().will_need(extent.first_slot, u32::from(extent.blocks));
            }
        }
    }

    /// Reads a whole segment as it lies on the grid and proves its digest. `out` has 2 MiB. Returns whether the
    /// segment has any data.
    ///
    /// # Errors
    /// `Corrupt`, `Stale`, `Unavailable`.
    pub fn read_segment_verified(&self, segment: SegmentIndex, out: &mut [u8]) -> Result<bool> {
        let wrong = |e: Error| {
            self.explain(e).within(format!("{}: offset {}", self.name, self.grid().image_offset(segment.grid_offset())))
        };
        let Some(recipe) = self.tree.recipe(segment).map_err(wrong)? else { return Ok(false) };
        read_segment(self.tree.packs(), Some(&recipe), 0, out).map_err(wrong)?;
        if digest(out) == recipe.digest {
            Ok(true)
        } else {
            Err(wrong(corrupt(format!("segment {}: digest does not match", segment.0))))
        }
    }

    /// The next data at or after `offset` as SEEK_DATA has it: its offset, or `None` when only a hole is left.
    ///
    /// # Errors
    /// `Corrupt`, `Stale`, `Unavailable`.
    pub fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        seek(
            self.grid(),
            self.bytes(),
            offset,
            true,
            |group| Ok(self.tree.root().group(group).is_some()),
            |s| self.tree.recipe(s),
        )
        .map_err(|e| self.explain(e))
    }

    /// The next hole at or after `offset` as SEEK_HOLE has it: the end of the image is one.
    ///
    /// # Errors
    /// `Corrupt`, `Stale`, `Unavailable`.
    pub fn seek_hole(&self, offset: u64) -> Result<u64> {
        let found = seek(self.grid(), self.bytes(), offset, false, |_| Ok(true), |s| self.tree.recipe(s))
            .map_err(|e| self.explain(e))?;
        Ok(found.unwrap_or(self.bytes()))
    }
}

/// Reads part of a segment; `None` for a recipe means a hole.
///
/// # Errors
/// `Corrupt`, `Unavailable`.
pub fn read_segment(packs: &Packs, recipe: Option<&Recipe>, within: usize, out: &mut [u8]) -> Result<()> {
    let Some(recipe) = recipe else {
        out.fill(0);
        return Ok(());
    };
    let end = within + out.len();
    let mut at = within;
    for extent in &recipe.extents {
        let start = usize::from(extent.first_block) * BLOCK_BYTES;
        let stop = usize::from(extent.end_block()) * BLOCK_BYTES;
        if stop <= at || start >= end {
            continue;
        }
        if start > at {
            fill(out, at - within, start - within);
            at = start;
        }
        let until = stop.min(end);
        read_extent(packs, extent, at - start, until - start, out.get_mut(at - within..until - within))?;
        at = until;
    }
    fill(out, at - within, end - within);
    Ok(())
}

fn fill(out: &mut [u8], from: usize, to: usize) {
    if let Some(hole) = out.get_mut(from..to) {
        hole.fill(0);
    }
}

/// Reads bytes `from..to` of an extent.
fn read_extent(
    packs: &Packs,
    extent: &crate::recipe::Extent,
    from: usize,
    to: usize,
    out: Option<&mut [u8]>,
) -> Result<()> {
    let Some(mut out) = out else { return Err(corrupt("extent outside of its segment")) };
    let mut at = from;
    let slot = |block: usize| {
        extent.first_slot.plus(block as u32).ok_or_else(|| corrupt("extent reaches over the end of its pack"))
    };
    // The first block may be wanted from its middle on: through a block of our own.
    if !at.is_multiple_of(BLOCK_BYTES) {
        let mut block = [0; BLOCK_BYTES];
        packs.read_blocks(slot(at / BLOCK_BYTES)?, &mut block)?;
        let head = (BLOCK_BYTES - at % BLOCK_BYTES).min(to - at);
        let (piece, rest) = out.split_at_mut(head);
        piece.copy_from_slice(block.get(at % BLOCK_BYTES..at % BLOCK_BYTES + head).unwrap_or_default());
        out = rest;
        at += head;
    }
    if !out.is_empty() {
        // `read_blocks` takes a last block that is not whole.
        packs.read_blocks(slot(at / BLOCK_BYTES)?, out)?;
    }
    Ok(())
}

/// Finds the next block with data (`data`) or without it, as an image offset not below `offset`.
///
/// # Errors
/// What `recipe` and `has_group` return.
pub fn seek(
    grid: Grid,
    image_bytes: u64,
    offset: u64,
    data: bool,
    has_group: impl Fn(u32) -> Result<bool>,
    recipe: impl Fn(SegmentIndex) -> Result<Option<Arc<Recipe>>>,
) -> Result<Option<u64>> {
    let segments = grid.segments(image_bytes);
    let mut at = grid.offset(offset);
    if offset >= image_bytes {
        return Ok(None);
    }
    loop {
        let segment = SegmentIndex::holding(at);
        if segment.0 >= segments {
            return Ok(None);
        }
        if data && !has_group(segment.group())? {
            at = u64::from(segment.group() + 1) * (GROUP_SEGMENTS * SEGMENT_BYTES) as u64;
            continue;
        }
        let recipe = recipe(segment)?;
        let first = ((at - segment.grid_offset()) / BLOCK_BYTES as u64) as u16;
        let next = next_block(recipe.as_deref(), first, data);
        if let Some(block) = next {
            let found = segment.grid_offset() + u64::from(block) * BLOCK_BYTES as u64;
            let found = grid.image_offset(found).max(offset);
            return Ok((found < image_bytes).then_some(found));
        }
        at = segment.grid_offset() + SEGMENT_BYTES as u64;
    }
}

/// The first block at or after `first` that has data or has none.
fn next_block(recipe: Option<&Recipe>, first: u16, data: bool) -> Option<u16> {
    let Some(recipe) = recipe else { return (!data).then_some(first) };
    if data {
        let extent = recipe.extents.iter().find(|e| e.end_block() > first)?;
        return Some(extent.first_block.max(first));
    }
    let mut at = first;
    for extent in recipe.extents.iter().filter(|e| e.end_block() > first) {
        if extent.first_block > at {
            break;
        }
        at = extent.end_block();
    }
    (usize::from(at) < crate::limits::SEGMENT_BLOCKS).then_some(at)
}
