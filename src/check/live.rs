//! Live images as a place where lost blocks may still be: looked through by fingerprint.

use std::collections::HashMap;

use rayon::prelude::*;

use crate::error::Result;
use crate::fingerprint::{Fingerprint, fingerprint, is_zero};
use crate::limits::BLOCK_BYTES;
use crate::units::Grid;

/// Bytes that are read, and worked on by all cores, at a time.
const CHUNK_BYTES: u64 = 4 << 20;

/// An image that may still have blocks that the store lost. It may change at any time: what is read is proven.
pub trait LiveImage: Send + Sync {
    /// Its size.
    fn bytes(&self) -> u64;

    /// The next range with data at or after an offset: its first byte, and the first after it.
    ///
    /// # Errors
    /// Those of where it comes from.
    fn next_data(&self, from: u64) -> Result<Option<(u64, u64)>>;

    /// Fills `out` from `offset`.
    ///
    /// # Errors
    /// `Invalid` past the end, and those of where it comes from.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()>;
}

/// Where a block was seen.
#[derive(Debug, Clone, Copy)]
struct Seen {
    image: usize,
    grid: Grid,
    grid_offset: u64,
}

/// The blocks that are looked for, and where they were seen.
pub struct Search<'a> {
    images: &'a [&'a dyn LiveImage],
    wanted: HashMap<Fingerprint, Option<Seen>>,
    missing: usize,
}

impl<'a> Search<'a> {
    /// A search in these images, for nothing yet.
    pub fn new(images: &'a [&'a dyn LiveImage]) -> Self {
        Self { images, wanted: HashMap::new(), missing: 0 }
    }

    /// Looks for this block too.
    pub fn want(&mut self, print: Fingerprint) {
        self.missing += usize::from(self.wanted.insert(print, None).is_none_or(|before| before.is_some()));
    }

    /// Blocks that are looked for.
    pub fn len(&self) -> usize {
        self.wanted.len()
    }

    /// Whether nothing is looked for.
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Looks through all images, once for each grid, until all is found.
    ///
    /// Memory: 4 MiB. Cost: reads and hashes what is no hole, for each grid. What cannot be read is left out with a
    /// warning.
    ///
    /// # Errors
    /// When an image cannot tell where its data is.
    pub fn run(&mut self, grids: &[Grid]) -> Result<()> {
        for (at, image) in self.images.iter().enumerate() {
            for grid in grids {
                let mut from = 0;
                while self.missing > 0
                    && let Some((start, end)) = image.next_data(from)?
                {
                    self.scan(at, *grid, start, end);
                    from = end;
                }
            }
        }
        Ok(())
    }

    fn scan(&mut self, image: usize, grid: Grid, start: u64, end: u64) {
        let block = BLOCK_BYTES as u64;
        let mut at = grid.offset(start) / block * block;
        let stop = grid.offset(end);
        while at < stop && self.missing > 0 {
            let bytes = (stop - at).min(CHUNK_BYTES).div_ceil(block) * block;
            match self.read(image, grid, at, bytes as usize) {
                Ok(read) => self.look_at(image, grid, at, &read),
                Err(e) => {
                    log::warn!("some of it is left out: {e}");
                    // A medium that cannot read one sector can read the others.
                    for one in (at..at + bytes).step_by(BLOCK_BYTES) {
                        if let Ok(read) = self.read(image, grid, one, BLOCK_BYTES) {
                            self.look_at(image, grid, one, &read);
                        }
                    }
                }
            }
            at += bytes;
        }
    }

    fn look_at(&mut self, image: usize, grid: Grid, at: u64, bytes: &[u8]) {
        let wanted = &self.wanted;
        let found: Vec<(Fingerprint, u64)> = bytes
            .par_chunks(BLOCK_BYTES)
            .enumerate()
            .filter(|(_, block)| !is_zero(block))
            .map(|(turn, block)| (fingerprint(block), at + (turn * BLOCK_BYTES) as u64))
            .filter(|(print, _)| wanted.get(print).is_some_and(Option::is_none))
            .collect();
        for (print, grid_offset) in found {
            if let Some(seen) = self.wanted.get_mut(&print).filter(|seen| seen.is_none()) {
                *seen = Some(Seen { image, grid, grid_offset });
                self.missing -= 1;
            }
        }
    }

    /// Bytes by their place on the grid; zeros before the image and behind it.
    fn read(&self, image: usize, grid: Grid, at: u64, bytes: usize) -> Result<Vec<u8>> {
        let mut out = vec![0; bytes];
        let Some(image) = self.images.get(image) else { return Ok(out) };
        let start = grid.image_offset(at);
        let skip = (grid.offset(start) - at) as usize;
        let count = (bytes - skip).min(image.bytes().saturating_sub(start) as usize);
        if let Some(piece) = out.get_mut(skip..skip + count) {
            image.read_at(start, piece)?;
        }
        Ok(out)
    }

    /// The bytes of a block that was seen, if they are still there.
    pub fn find(&self, print: &Fingerprint) -> Option<Vec<u8>> {
        let seen = self.wanted.get(print).copied().flatten()?;
        let bytes = self.read(seen.image, seen.grid, seen.grid_offset, BLOCK_BYTES).ok()?;
        (fingerprint(&bytes) == *print).then_some(bytes)
    }
}
