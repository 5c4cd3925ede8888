//! The map of a clone: which blocks the clone has itself, as a log of entries that a crash can only cut.
//!
//! A header, then entries of 64 bytes, so that none lies in two sectors of a disk. What one flush brings is a *round*:
//! all its entries carry its number and their count. A round is written when its blocks are durable, and the next one
//! when it is durable itself; so a bad entry of the last round was not finished, and nobody was told that it was,
//! while a bad entry before it is damage. docs/FORMAT.md is normative.

use std::ops::Range;

use crate::clones::blocks::Blocks;
use crate::clones::file::LocalFile;
use crate::error::{Result, corrupt, unsupported};
use crate::fingerprint::short;
use crate::limits::{BLOCK_BYTES, IMAGE_BYTES_MAX};
use crate::wire::{Reader, Wire, encode, wire_struct};

/// The first bytes of a map.
pub const MAGIC: [u8; 8] = *b"SNAPMAP\n";

/// The version of the map that this program writes and reads.
pub const VERSION: u32 = 1;

/// Bytes of the header, and of an entry.
pub const ENTRY_BYTES: usize = 64;

/// Blocks that the mask of an entry speaks of.
pub const MASK_BLOCKS: u64 = 192;

/// Entries that are read or written at a time: 1 MiB.
const CHUNK_ENTRIES: usize = 16 << 10;

/// The identity of a clone: 16 random bytes, drawn when it is made. It is in all checksums of the map, so that no entry
/// of another clone passes for one of this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct CloneId(pub [u8; 16]);

wire_struct! {
    /// What a map begins with, without its checksum.
    pub struct Header {
        /// Version of the map.
        pub version: u32,
        /// Bytes of a block.
        pub block_bytes: u32,
        /// Bytes of the image.
        pub image_bytes: u64,
        /// Of which clone.
        pub clone: CloneId,
        /// Entries that were durable before the file got its name, the header included: none of them can be unfinished.
        pub settled: u64,
    }
}

wire_struct! {
    /// One entry of the map, without its checksum: a run of blocks, and some of the blocks after it.
    pub struct Entry {
        /// Number of the round, from 1.
        pub round: u32,
        /// Place in the round, from 0.
        pub index: u32,
        /// Entries of the round.
        pub count: u32,
        /// First block of the run.
        pub first: u64,
        /// Blocks of the run, at least 1.
        pub run: u32,
        /// Bit `n` (from the lowest of the first byte on) stands for block `first + run + n`.
        pub mask: Mask,
    }
}

/// The mask of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mask(pub [u8; 24]);

impl Wire for CloneId {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        Ok(Self(reader.array()?))
    }
}

impl Wire for Mask {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        Ok(Self(reader.array()?))
    }
}

impl Header {
    /// The header of a map that is begun with `blocks`.
    pub fn new(clone: CloneId, image_bytes: u64, blocks: &Blocks) -> Self {
        let settled = compact_entries(blocks);
        Self { version: VERSION, block_bytes: BLOCK_BYTES as u32, image_bytes, clone, settled }
    }

    /// The 64 bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        self.put(&mut bytes);
        let checksum = short(b"snapfs clone map", &[&bytes]);
        bytes.extend_from_slice(&checksum);
        bytes
    }

    /// Reads the 64 bytes.
    ///
    /// # Errors
    /// `Corrupt`; `Unsupported`, naming it, for another version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        if reader.array::<8>()? != MAGIC {
            return Err(corrupt("is no map of a clone: wrong magic"));
        }
        let header = Self::take(&mut reader)?;
        let checksum = reader.array::<16>()?;
        reader.end()?;
        let body = bytes.get(..bytes.len().saturating_sub(16)).unwrap_or_default();
        if short(b"snapfs clone map", &[body]) != checksum {
            return Err(corrupt("header: checksum does not match"));
        }
        if header.version != VERSION {
            let version = header.version;
            return Err(unsupported(format!("map version {version} is not known here, this program reads {VERSION}")));
        }
        if header.block_bytes as usize != BLOCK_BYTES {
            return Err(unsupported(format!("blocks of {} bytes", header.block_bytes)));
        }
        if header.image_bytes > IMAGE_BYTES_MAX {
            return Err(corrupt(format!("header: an image of {} bytes", header.image_bytes)));
        }
        Ok(header)
    }

    /// Blocks of the image; the last one may be cut.
    pub fn blocks(&self) -> u64 {
        self.image_bytes.div_ceil(BLOCK_BYTES as u64)
    }
}

impl Entry {
    /// The 64 bytes of the entry at `place`: the header is at 0, the first entry at 1.
    pub fn to_bytes(&self, clone: CloneId, place: u64) -> Vec<u8> {
        let mut bytes = encode(self);
        let checksum = entry_checksum(clone, place, &bytes);
        bytes.extend_from_slice(&checksum);
        bytes
    }

    /// Reads the 64 bytes at `place` of a map of an image of `blocks` blocks.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn parse(clone: CloneId, blocks: u64, place: u64, bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let entry = Self::take(&mut reader)?;
        let checksum = reader.array::<16>()?;
        reader.end()?;
        let body = bytes.get(..bytes.len().saturating_sub(16)).unwrap_or_default();
        if entry_checksum(clone, place, body) != checksum {
            return Err(corrupt("checksum does not match"));
        }
        let past = entry.first.checked_add(u64::from(entry.run)).filter(|end| *end <= blocks);
        let fits = past.is_some_and(|end| entry.masked().all(|block| block < blocks && block >= end));
        if entry.round == 0 || entry.run == 0 || entry.index >= entry.count || !fits {
            return Err(corrupt("speaks of what cannot be"));
        }
        Ok(entry)
    }

    /// The blocks of the run.
    pub fn run(&self) -> Range<u64> {
        self.first..self.first.saturating_add(u64::from(self.run))
    }

    /// The blocks of the mask.
    pub fn masked(&self) -> impl Iterator<Item = u64> + '_ {
        let from = self.run().end;
        let bits = (0..MASK_BLOCKS)
            .filter(|bit| self.mask.0.get((bit / 8) as usize).is_some_and(|byte| byte & (1 << (bit % 8)) != 0));
        bits.map(move |bit| from.saturating_add(bit))
    }
}

fn entry_checksum(clone: CloneId, place: u64, body: &[u8]) -> [u8; 16] {
    short(b"snapfs clone map entry", &[&clone.0, &place.to_le_bytes(), body])
}

/// The entries that a set of blocks takes, as (first, run, mask). Never more than the ranges that it was made of.
fn entries_of(blocks: &Blocks) -> impl Iterator<Item = (u64, u32, Mask)> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let found = blocks.next_run(at)?;
        let run = (found.end - found.start).min(u64::from(u32::MAX)) as u32;
        let first = found.start;
        let from = first + u64::from(run);
        let mut mask = Mask::default();
        for block in blocks.runs(from..from + MASK_BLOCKS).flatten() {
            let bit = block - from;
            if let Some(byte) = mask.0.get_mut((bit / 8) as usize) {
                *byte |= 1 << (bit % 8);
            }
        }
        at = from + MASK_BLOCKS;
        Some((first, run, mask))
    })
}

/// What a map says when it is read.
#[derive(Debug)]
pub struct Loaded {
    /// The header.
    pub header: Header,
    /// The blocks that the clone has.
    pub blocks: Blocks,
    /// Where the log goes on.
    pub end: End,
    /// Its last round was not finished, or there is something after it: it must be compacted before it goes on.
    pub is_torn: bool,
}

/// Where a log goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Entries, the header included.
    pub entries: u64,
    /// Number of the last round.
    pub round: u32,
}

impl End {
    /// The same in bytes.
    pub fn bytes(&self) -> u64 {
        self.entries * ENTRY_BYTES as u64
    }
}

/// Reads a map. Cost: all of it, 1 MiB at a time.
///
/// # Errors
/// `Corrupt` when anything but the last round is damaged, `Unsupported`, `Unavailable`.
pub fn load(file: &dyn LocalFile, clone: CloneId, image_bytes: u64) -> Result<Loaded> {
    let bytes = file.bytes()?;
    let mut first = [0; ENTRY_BYTES];
    if bytes < ENTRY_BYTES as u64 {
        return Err(corrupt("ends before its header does"));
    }
    file.read_at(0, &mut first)?;
    let header = Header::parse(&first)?;
    if (header.clone, header.image_bytes) != (clone, image_bytes) {
        return Err(corrupt("belongs to another clone"));
    }
    let mut scan = Scan::new(&header);
    let entries = bytes / ENTRY_BYTES as u64;
    if entries < header.settled {
        return Err(corrupt(format!(
            "has {entries} entries, fewer than the {} that it was begun with",
            header.settled
        )));
    }
    let mut chunk = vec![0; CHUNK_ENTRIES.min(usize::try_from(entries).unwrap_or(usize::MAX)) * ENTRY_BYTES];
    let mut place = 1;
    while place < entries {
        let count = (entries - place).min(CHUNK_ENTRIES as u64);
        let part = chunk.get_mut(..count as usize * ENTRY_BYTES).unwrap_or_default();
        file.read_at(place * ENTRY_BYTES as u64, part)?;
        for entry in part.chunks_exact(ENTRY_BYTES) {
            scan.take(entry)?;
        }
        place += count;
    }
    let is_torn = scan.bad.is_some() || scan.left > 0 || !bytes.is_multiple_of(ENTRY_BYTES as u64);
    let end = End { entries: scan.bad.unwrap_or(entries), round: scan.round };
    Ok(Loaded { header, blocks: scan.blocks, end, is_torn })
}

/// The state of reading entries one after another.
struct Scan {
    clone: CloneId,
    image_blocks: u64,
    settled: u64,
    blocks: Blocks,
    place: u64,
    // The round that is being read, or was read last, and how many of its entries are still to come.
    round: u32,
    left: u32,
    // Place of the first bad entry.
    bad: Option<u64>,
}

impl Scan {
    fn new(header: &Header) -> Self {
        let (clone, image_blocks, settled) = (header.clone, header.blocks(), header.settled);
        Self { clone, image_blocks, settled, blocks: Blocks::default(), place: 1, round: 0, left: 0, bad: None }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        let place = self.place;
        self.place += 1;
        let parsed = Entry::parse(self.clone, self.image_blocks, place, bytes).ok();
        // What is written after the round with the bad entry proves that this round was durable once.
        let unfinished = if self.left > 0 { self.round } else { self.round.saturating_add(1) };
        let Some(bad) = self.bad else {
            match parsed.as_ref().filter(|entry| self.goes_on(entry)) {
                Some(entry) => {
                    self.round = entry.round;
                    self.left = entry.count - entry.index - 1;
                    self.blocks.insert(entry.run());
                    entry.masked().for_each(|block| self.blocks.insert(block..block + 1));
                }
                None if place < self.settled => {
                    return Err(corrupt(format!(
                        "entry {place} is damaged, which was durable before the map was used"
                    )));
                }
                None => {
                    self.bad = Some(place);
                    return self.check_follower(parsed.as_ref(), unfinished, place);
                }
            }
            return Ok(());
        };
        self.check_follower(parsed.as_ref(), unfinished, bad)
    }

    fn check_follower(&self, entry: Option<&Entry>, unfinished: u32, bad: u64) -> Result<()> {
        match entry {
            Some(entry) if entry.round > unfinished => {
                Err(corrupt(format!("entry {bad} is damaged, and what was written after it is not")))
            }
            _ => Ok(()),
        }
    }

    /// Whether an entry is the next one: of the round that is being read, or the first of the next round.
    fn goes_on(&self, entry: &Entry) -> bool {
        if self.left > 0 {
            entry.round == self.round && entry.count - entry.index == self.left
        } else {
            Some(entry.round) == self.round.checked_add(1) && entry.index == 0
        }
    }
}

/// Appends a round; nothing is written for no blocks. The caller syncs the file, before the next round at the latest.
///
/// # Errors
/// `NoSpace`, `Unavailable`; then the file must be cut to `end` before anything else is appended.
pub fn append(file: &dyn LocalFile, clone: CloneId, end: End, blocks: &Blocks) -> Result<End> {
    let count = entries_of(blocks).count();
    let Some(round) = end.round.checked_add(1).filter(|_| count > 0) else { return Ok(end) };
    let count = u32::try_from(count).map_err(|_| corrupt("map: more entries than a round can have"))?;
    let mut chunk = Vec::with_capacity((count as usize).min(CHUNK_ENTRIES) * ENTRY_BYTES);
    let mut written = end.entries;
    for (index, (first, run, mask)) in (0..count).zip(entries_of(blocks)) {
        let entry = Entry { round, index, count, first, run, mask };
        chunk.extend_from_slice(&entry.to_bytes(clone, end.entries + u64::from(index)));
        if chunk.len() >= CHUNK_ENTRIES * ENTRY_BYTES {
            file.write_at(written * ENTRY_BYTES as u64, &chunk)?;
            written = end.entries + u64::from(index) + 1;
            chunk.clear();
        }
    }
    if !chunk.is_empty() {
        file.write_at(written * ENTRY_BYTES as u64, &chunk)?;
    }
    Ok(End { entries: end.entries + u64::from(count), round })
}

/// Writes a whole map into an empty file and syncs it. The file must get its name only then.
///
/// # Errors
/// `NoSpace`, `Unavailable`.
pub fn write(file: &dyn LocalFile, clone: CloneId, image_bytes: u64, blocks: &Blocks) -> Result<End> {
    file.write_at(0, &Header::new(clone, image_bytes, blocks).to_bytes())?;
    let end = append(file, clone, End { entries: 1, round: 0 }, blocks)?;
    file.sync()?;
    Ok(end)
}

/// Entries that a map of these blocks takes when it is written anew, the header included.
pub fn compact_entries(blocks: &Blocks) -> u64 {
    1 + entries_of(blocks).count() as u64
}

const _: () = assert!(8 + 4 + 4 + 8 + 16 + 8 + 16 == ENTRY_BYTES, "docs/FORMAT.md: the header has 64 bytes");
const _: () = assert!(4 + 4 + 4 + 8 + 4 + 24 + 16 == ENTRY_BYTES, "docs/FORMAT.md: an entry has 64 bytes");
