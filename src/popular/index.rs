//! The popular index: from a fingerprint to the common slots that may hold its block.
//!
//! It lies in memory as a whole: 2^n buckets by the first n bits of the fingerprint, in a bucket up to sixteen rows of
//! seven bytes on average. A row has the next 16 bits of the fingerprint (the *tag*), a pack and a slot. So a lookup
//! reads two cache lines and no disk, one lookup in 4000 of something else finds a row by chance, and a hint counts
//! only after the slot table of the common pack has confirmed all 32 bytes. That page of the slot table has the 127
//! neighbours too, and neighbours were stored in the order of a donor's image: a run of popular blocks costs one page,
//! where an index with whole fingerprints, in their order, would cost a page for every block.
//!
//! The layout is in docs/FORMAT.md. An object is written once and checked as a whole when it is read.

use std::collections::BTreeMap;

use crate::backend::{Backend, Key};
use crate::error::{Error, ErrorKind, Result, corrupt, invalid};
use crate::fingerprint::{Fingerprint, short};
use crate::format::{ObjectKind, check_preamble, preamble};
use crate::limits::{
    POPULAR_BUCKET_ENTRIES, POPULAR_BUCKET_ENTRIES_MAX, POPULAR_CHUNK_BUCKETS, POPULAR_ENTRIES_MAX, POPULAR_PACKS_MAX,
};
use crate::units::{Epoch, Incarnation, PackNumber, SlotId, VmGroup};
use crate::wire::{Reader, Wire, wire_struct};

/// Bytes before the rows of the packs.
pub const POPULAR_HEADER_BYTES: usize = 16 + 16 + 8 + 8 + 4 + CHECKSUM_BYTES;

/// Bytes of the row of a pack.
pub const POPULAR_PACK_BYTES: usize = 8 + 16;

/// Bytes of an entry: tag, pack, slot.
pub const POPULAR_ENTRY_BYTES: usize = 2 + 3 + 2;

const CHECKSUM_BYTES: usize = 16;

/// Bits of a tag.
const TAG_BITS: u32 = 16;

/// Bytes read at a time.
const BUFFER_BYTES: usize = 1 << 20;

const _: () = assert!(POPULAR_HEADER_BYTES == 68, "docs/FORMAT.md: the header of a popular index");

/// Which election an index belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexIdentity {
    /// Incarnation of the common home.
    pub incarnation: Incarnation,
    /// Its epoch.
    pub epoch: Epoch,
}

wire_struct! {
    /// A common pack that entries refer to.
    #[derive(Copy)]
    pub struct PackRow {
        /// The pack.
        pub pack: PackNumber,
        /// Whose blocks it holds.
        pub group: VmGroup,
    }
}

impl Wire for VmGroup {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        Ok(Self(reader.array()?))
    }
}

/// The key of the popular index of an epoch.
pub fn index_key(epoch: Epoch) -> Key {
    Key::new(format!("common/popular/{:010}.popular", epoch.0))
}

/// The epoch that a file name in the folder of popular indexes stands for.
pub fn parse_index_name(name: &str) -> Option<Epoch> {
    let epoch = Epoch(name.strip_suffix(".popular")?.parse().ok()?);
    index_key(epoch).as_str().ends_with(&format!("/{name}")).then_some(epoch)
}

/// The first eight bytes of a fingerprint as a number: what order and buckets are made of.
fn prefix_of(print: &Fingerprint) -> u64 {
    print.0.first_chunk().map_or(0, |head| u64::from_be_bytes(*head))
}

/// Bits that number the buckets of an index of this many entries: as few as keep the average.
fn bucket_bits(entries: u64) -> u32 {
    let buckets = entries.div_ceil(POPULAR_BUCKET_ENTRIES).max(1);
    buckets.next_power_of_two().trailing_zeros()
}

fn bucket_of(prefix: u64, bits: u32) -> usize {
    prefix.checked_shr(64 - bits).map_or(0, |bucket| bucket as usize)
}

fn tag_of(prefix: u64, bits: u32) -> u16 {
    ((prefix << bits) >> (64 - TAG_BITS)) as u16
}

/// One row of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    tag: u16,
    pack: u32,
    slot: u16,
}

impl Row {
    fn put(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.tag.to_le_bytes());
        out.extend_from_slice(self.pack.to_le_bytes().first_chunk::<3>().unwrap_or(&[0; 3]));
        out.extend_from_slice(&self.slot.to_le_bytes());
    }

    fn from_stored(bytes: &[u8; POPULAR_ENTRY_BYTES]) -> Self {
        let [t0, t1, p0, p1, p2, s0, s1] = *bytes;
        Self {
            tag: u16::from_le_bytes([t0, t1]),
            pack: u32::from_le_bytes([p0, p1, p2, 0]),
            slot: u16::from_le_bytes([s0, s1]),
        }
    }
}

/// A popular index in memory. It never changes: all writers of a process share one.
pub struct PopularIndex {
    identity: IndexIdentity,
    packs: Vec<PackRow>,
    entries: u64,
    /// One in this many tags is in memory; 1 but for an index that was larger than its share.
    sampling: u16,
    bits: u32,
    /// Where the rows of each bucket begin, and where the last ends.
    starts: Vec<u32>,
    rows: Vec<[u8; POPULAR_ENTRY_BYTES]>,
}

impl std::fmt::Debug for PopularIndex {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "PopularIndex({:?}, {} entries in {} packs)", self.identity, self.entries, self.packs.len())
    }
}

impl PopularIndex {
    /// Reads an index of which at most about `memory_bytes_max` may stay in memory. Of one that is larger, only every
    /// second, fourth, ... tag is kept: a hint brings its neighbours along, so that runs are still found.
    ///
    /// Cost: one pass over the object, a MiB at a time.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt` (also when it is another home's or another epoch's), `Unsupported`, `Unavailable`.
    pub fn read(backend: &dyn Backend, identity: IndexIdentity, memory_bytes_max: usize) -> Result<Self> {
        let key = index_key(identity.epoch);
        // Its parts have checksums, and one copy of several is enough.
        let copies = backend.replicated().map(|replicated| replicated.places(&key).homes).unwrap_or_default();
        for copy in &copies {
            if let Ok(index) = Self::read_visiting(copy, identity, memory_bytes_max, &mut |_| {}) {
                return Ok(index);
            }
        }
        Self::read_visiting(backend, identity, memory_bytes_max, &mut |_| {})
    }

    /// The same, and shows all slots that it leads to, those that do not stay in memory too.
    ///
    /// # Errors
    /// As [`PopularIndex::read`]; then what was shown counts for nothing.
    pub fn read_visiting(
        backend: &dyn Backend,
        identity: IndexIdentity,
        memory_bytes_max: usize,
        visit: &mut dyn FnMut(SlotId),
    ) -> Result<Self> {
        let key = index_key(identity.epoch);
        let about = |e: Error| e.within(&key);
        let bytes = backend.len(&key).map_err(about)?;
        let mut feed = ObjectFeed { backend, key: &key, bytes, offset: 0, buffer: Vec::new(), at: 0 };
        let index = Self::take(&mut feed, bytes, memory_bytes_max, visit).map_err(about)?;
        if index.identity != identity {
            return Err(corrupt(format!("{key}: belongs to another epoch or another store")));
        }
        Ok(index)
    }

    /// Reads an index from the bytes of its object.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        Self::take(&mut SliceFeed(Reader::new(bytes)), bytes.len() as u64, usize::MAX, &mut |_| {})
    }

    /// The bytes of its object; empty for one that is not in memory as a whole.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if self.sampling > 1 {
            return out;
        }
        put_head(&self.identity, self.entries, &self.packs, &mut out);
        for (number, chunk) in (0..).zip(self.starts_of_chunks()) {
            let mut bytes = Vec::new();
            bytes.extend(chunk.windows(2).map(|pair| match pair {
                [start, end] => (end - start) as u8,
                _ => 0,
            }));
            let rows = match (chunk.first(), chunk.last()) {
                (Some(start), Some(end)) => self.rows.get(*start as usize..*end as usize).unwrap_or_default(),
                _ => &[],
            };
            bytes.extend_from_slice(rows.as_flattened());
            let checksum = chunk_checksum(&self.identity, number, &bytes);
            out.extend_from_slice(&bytes);
            out.extend_from_slice(&checksum);
        }
        out
    }

    /// The starts of the buckets of each chunk, with the end of its last.
    fn starts_of_chunks(&self) -> impl Iterator<Item = &[u32]> {
        let buckets = self.starts.len().saturating_sub(1);
        (0..buckets).step_by(POPULAR_CHUNK_BUCKETS).filter_map(move |first| {
            let end = (first + POPULAR_CHUNK_BUCKETS).min(buckets);
            self.starts.get(first..=end)
        })
    }

    fn take(
        feed: &mut dyn Feed,
        object_bytes: u64,
        memory_bytes_max: usize,
        visit: &mut dyn FnMut(SlotId),
    ) -> Result<Self> {
        let (identity, entries, pack_count) = take_header(feed)?;
        let bits = bucket_bits(entries);
        let buckets = 1_usize << bits;
        let chunks = buckets.div_ceil(POPULAR_CHUNK_BUCKETS);
        let fixed = POPULAR_HEADER_BYTES + pack_count as usize * POPULAR_PACK_BYTES + CHECKSUM_BYTES;
        let wanted = (fixed + buckets + chunks * CHECKSUM_BYTES) as u64 + entries * POPULAR_ENTRY_BYTES as u64;
        // Before anything is set aside: from here on the object's own length bounds the memory.
        if wanted != object_bytes {
            return Err(corrupt(format!("popular index: has {object_bytes} bytes, should have {wanted}")));
        }
        let mut table = vec![0; pack_count as usize * POPULAR_PACK_BYTES];
        feed.fill(&mut table)?;
        if feed.checksum()? != short(b"snapfs popular packs", &[&place(&identity), &table]) {
            return Err(corrupt("popular index: checksum of its packs does not match"));
        }
        let mut reader = Reader::new(&table);
        let packs = (0..pack_count).map(|_| PackRow::take(&mut reader)).collect::<Result<Vec<_>>>()?;
        let ordered = packs.windows(2).all(|rows| matches!(rows, [a, b] if a.pack < b.pack));
        if !ordered || !packs.iter().all(|row| row.pack.is_common()) {
            return Err(corrupt("popular index: its packs are not in order or not common"));
        }
        let sampling = sampling_for(entries, buckets, memory_bytes_max);
        let mut starts = Vec::with_capacity(buckets + 1);
        starts.push(0);
        let expected = entries / u64::from(sampling);
        let mut rows = Vec::with_capacity(if sampling == 1 { expected } else { expected + expected / 16 } as usize);
        let mut used = vec![false; packs.len()];
        let mut seen = 0;
        for number in 0..chunks as u32 {
            let in_chunk = buckets.min(POPULAR_CHUNK_BUCKETS);
            let mut bytes = vec![0; in_chunk];
            feed.fill(&mut bytes)?;
            let count: usize = bytes.iter().map(|c| usize::from(*c)).sum();
            seen += count as u64;
            if seen > entries {
                return Err(corrupt("popular index: more entries than its header says"));
            }
            bytes.resize(in_chunk + count * POPULAR_ENTRY_BYTES, 0);
            feed.fill(bytes.get_mut(in_chunk..).unwrap_or_default())?;
            if feed.checksum()? != chunk_checksum(&identity, number, &bytes) {
                return Err(corrupt(format!("popular index: checksum of chunk {number} does not match")));
            }
            let (counts, stored) = bytes.split_at(in_chunk);
            let mut stored = stored.as_chunks::<POPULAR_ENTRY_BYTES>().0.iter();
            for count in counts {
                let mut last = None;
                for bytes in stored.by_ref().take(usize::from(*count)) {
                    let row = Row::from_stored(bytes);
                    if last.is_some_and(|last| last >= row) {
                        return Err(corrupt(format!("popular index: entries of chunk {number} are not in order")));
                    }
                    last = Some(row);
                    match used.get_mut(row.pack as usize) {
                        Some(used) => *used = true,
                        None => return Err(corrupt(format!("popular index: no such pack, pack={}", row.pack))),
                    }
                    if let Some(pack) = packs.get(row.pack as usize) {
                        visit(SlotId::new(pack.pack, row.slot));
                    }
                    if row.tag.is_multiple_of(sampling) {
                        rows.push(*bytes);
                    }
                }
                starts.push(rows.len() as u32);
            }
        }
        feed.end()?;
        if seen != entries || used.contains(&false) {
            return Err(corrupt("popular index: fewer entries than its header says, or a pack without any"));
        }
        rows.shrink_to_fit();
        Ok(Self { identity, packs, entries, sampling, bits, starts, rows })
    }

    /// Common slots of this group that may hold the block of a fingerprint: hints, to be confirmed by the pack's slot
    /// table. Mostly none or one; one lookup in 4000 has one more by chance.
    ///
    /// Cost: memory only, some twenty comparisons.
    pub fn candidates(&self, group: VmGroup, print: &Fingerprint) -> impl Iterator<Item = SlotId> + '_ {
        let prefix = prefix_of(print);
        let tag = tag_of(prefix, self.bits);
        let kept = tag.is_multiple_of(self.sampling);
        let bucket = if kept { self.bucket(bucket_of(prefix, self.bits)) } else { &[] };
        let found = bucket.iter().map(Row::from_stored).filter(move |row| row.tag == tag);
        found.filter_map(move |row| {
            let pack = self.packs.get(row.pack as usize)?;
            (pack.group == group).then(|| SlotId::new(pack.pack, row.slot))
        })
    }

    fn bucket(&self, bucket: usize) -> &[[u8; POPULAR_ENTRY_BYTES]] {
        match (self.starts.get(bucket), self.starts.get(bucket + 1)) {
            (Some(start), Some(end)) => self.rows.get(*start as usize..*end as usize).unwrap_or_default(),
            _ => &[],
        }
    }

    /// Which election it belongs to.
    pub fn identity(&self) -> IndexIdentity {
        self.identity
    }

    /// Entries of its object.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// One in this many entries is in memory.
    pub fn sampling(&self) -> u16 {
        self.sampling
    }

    /// The packs that it refers to, by number.
    pub fn packs(&self) -> &[PackRow] {
        &self.packs
    }

    /// Bytes that it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        self.rows.capacity() * POPULAR_ENTRY_BYTES + self.starts.capacity() * 4 + self.packs.capacity() * 24
    }

    /// The slots of all entries in memory, in no useful order.
    pub fn slots(&self) -> impl Iterator<Item = SlotId> + '_ {
        self.rows.iter().map(Row::from_stored).filter_map(|row| {
            let pack = self.packs.get(row.pack as usize)?;
            Some(SlotId::new(pack.pack, row.slot))
        })
    }

    /// A builder with those of its entries that `keep` wants: for an epoch that only takes slots away. Needs no
    /// fingerprints, since fewer entries never look at more of their bits.
    ///
    /// # Errors
    /// `Invalid` for an index that is not in memory as a whole.
    pub fn retain(&self, keep: impl Fn(SlotId) -> bool) -> Result<IndexBuilder> {
        if self.sampling > 1 {
            return Err(invalid("popular index: only a part of it is in memory"));
        }
        let mut builder = IndexBuilder::default();
        for bucket in 0..self.starts.len().saturating_sub(1) {
            let high = (bucket as u64).checked_shl(64 - self.bits).unwrap_or(0);
            for row in self.bucket(bucket).iter().map(Row::from_stored) {
                let Some(pack) = self.packs.get(row.pack as usize) else { continue };
                let slot = SlotId::new(pack.pack, row.slot);
                if keep(slot) {
                    builder.groups.insert(pack.pack, pack.group);
                    builder.entries.push((high | (u64::from(row.tag) << (64 - TAG_BITS - self.bits)), slot));
                }
            }
        }
        Ok(builder)
    }
}

/// How many tags share a place in memory, so that an index stays under its share.
fn sampling_for(entries: u64, buckets: usize, memory_bytes_max: usize) -> u16 {
    let rows_max = memory_bytes_max.saturating_sub(buckets * 4) / POPULAR_ENTRY_BYTES;
    let mut sampling = 1;
    while entries / u64::from(sampling) > rows_max as u64 && sampling < 1 << 8 {
        sampling *= 2;
    }
    sampling
}

fn place(identity: &IndexIdentity) -> Vec<u8> {
    let mut place = identity.incarnation.0.to_vec();
    identity.epoch.0.put(&mut place);
    place
}

fn chunk_checksum(identity: &IndexIdentity, chunk: u32, bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut place = place(identity);
    chunk.put(&mut place);
    short(b"snapfs popular chunk", &[&place, bytes])
}

/// Header and packs.
fn put_head(identity: &IndexIdentity, entries: u64, packs: &[PackRow], out: &mut Vec<u8>) {
    out.extend_from_slice(&preamble(ObjectKind::Popular));
    out.extend_from_slice(&place(identity));
    entries.put(out);
    (packs.len() as u32).put(out);
    let checksum = short(b"snapfs popular header", &[out]);
    out.extend_from_slice(&checksum);
    let from = out.len();
    packs.iter().for_each(|row| row.put(out));
    let table = out.get(from..).unwrap_or_default();
    let checksum = short(b"snapfs popular packs", &[&place(identity), table]);
    out.extend_from_slice(&checksum);
}

fn take_header(feed: &mut dyn Feed) -> Result<(IndexIdentity, u64, u32)> {
    let mut told = [0; POPULAR_HEADER_BYTES - CHECKSUM_BYTES];
    feed.fill(&mut told)?;
    if feed.checksum()? != short(b"snapfs popular header", &[&told]) {
        return Err(corrupt("popular index: checksum of its header does not match"));
    }
    let mut reader = Reader::new(&told);
    check_preamble(&reader.array()?, ObjectKind::Popular)?;
    let identity = IndexIdentity { incarnation: Wire::take(&mut reader)?, epoch: Epoch(Wire::take(&mut reader)?) };
    let (entries, packs) = (u64::take(&mut reader)?, u32::take(&mut reader)?);
    if entries > POPULAR_ENTRIES_MAX || packs > POPULAR_PACKS_MAX {
        return Err(corrupt(format!("popular index: over its limits, entries={entries}, packs={packs}")));
    }
    Ok((identity, entries, packs))
}

/// Bytes of an object, front to back.
trait Feed {
    /// Fills `out`. `Corrupt` when there are fewer bytes.
    fn fill(&mut self, out: &mut [u8]) -> Result<()>;
    /// Asserts that all was read.
    fn end(&self) -> Result<()>;
    /// The checksum that follows.
    fn checksum(&mut self) -> Result<[u8; CHECKSUM_BYTES]> {
        let mut checksum = [0; CHECKSUM_BYTES];
        self.fill(&mut checksum)?;
        Ok(checksum)
    }
}

struct SliceFeed<'a>(Reader<'a>);

impl Feed for SliceFeed<'_> {
    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        out.copy_from_slice(self.0.bytes(out.len())?);
        Ok(())
    }

    fn end(&self) -> Result<()> {
        if self.0.remaining() == 0 { Ok(()) } else { Err(corrupt(format!("{} bytes too many", self.0.remaining()))) }
    }
}

struct ObjectFeed<'a> {
    backend: &'a dyn Backend,
    key: &'a Key,
    bytes: u64,
    offset: u64,
    buffer: Vec<u8>,
    at: usize,
}

impl Feed for ObjectFeed<'_> {
    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        let mut rest = out;
        while !rest.is_empty() {
            let mut there = self.buffer.get(self.at..).unwrap_or_default();
            if there.is_empty() {
                let left = self.bytes - self.offset;
                if left == 0 {
                    return Err(corrupt("popular index: ends early"));
                }
                self.buffer.resize(left.min(BUFFER_BYTES as u64) as usize, 0);
                self.backend.read(self.key, self.offset, &mut self.buffer)?;
                self.offset += self.buffer.len() as u64;
                self.at = 0;
                there = &self.buffer;
            }
            let count = rest.len().min(there.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(there.get(..count).unwrap_or_default());
            self.at += count;
            rest = later;
        }
        Ok(())
    }

    fn end(&self) -> Result<()> {
        let left = self.bytes - self.offset + (self.buffer.len() - self.at) as u64;
        if left == 0 { Ok(()) } else { Err(corrupt(format!("{left} bytes too many"))) }
    }
}

/// Takes the entries of a new index, in any order.
///
/// Memory: 16 bytes an entry, which is what elections count for one.
#[derive(Debug, Default)]
pub struct IndexBuilder {
    entries: Vec<(u64, SlotId)>,
    groups: BTreeMap<PackNumber, VmGroup>,
}

impl IndexBuilder {
    /// An empty builder with room for this many entries.
    pub fn with_capacity(entries: usize) -> Self {
        Self { entries: Vec::with_capacity(entries), groups: BTreeMap::new() }
    }

    /// Adds an entry: `slot` of a common pack of this group holds the block of `print`. A pack belongs to one group.
    ///
    /// # Errors
    /// `Invalid` for a slot of a VM's pack, for a pack of two groups, and over `POPULAR_ENTRIES_MAX`.
    pub fn add(&mut self, group: VmGroup, print: &Fingerprint, slot: SlotId) -> Result<()> {
        if !slot.pack().is_common() || self.entries.len() as u64 >= POPULAR_ENTRIES_MAX {
            return Err(invalid(format!("popular index: slot of a VM, or too many entries, slot={slot:?}")));
        }
        if *self.groups.entry(slot.pack()).or_insert(group) != group {
            return Err(invalid(format!("popular index: pack of two groups, pack={}", slot.pack())));
        }
        self.entries.push((prefix_of(print), slot));
        Ok(())
    }

    /// Entries so far, repeated ones included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Writes the index, a chunk at a time; returns the bytes of the object. Repeated entries are written once;
    /// what a bucket cannot hold is left out.
    ///
    /// # Errors
    /// `Exists` when the epoch has one, `NoSpace`, `Unavailable`.
    pub fn write(self, backend: &dyn Backend, identity: IndexIdentity) -> Result<u64> {
        let mut upload = backend.create(&index_key(identity.epoch))?;
        let mut bytes = 0;
        self.put(&identity, &mut |part| {
            bytes += part.len() as u64;
            upload.append(part)
        })?;
        upload.finish()?;
        Ok(bytes)
    }

    /// The bytes of the object.
    ///
    /// # Errors
    /// `Invalid` with more packs than an index can refer to.
    pub fn encode(self, identity: IndexIdentity) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        self.put(&identity, &mut |part| {
            out.extend_from_slice(part);
            Ok(())
        })?;
        Ok(out)
    }

    fn put(mut self, identity: &IndexIdentity, append: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.entries.sort_unstable();
        self.entries.dedup();
        self.trim();
        let mut packs: Vec<PackNumber> = self.entries.iter().map(|(_, slot)| slot.pack()).collect();
        packs.sort_unstable();
        packs.dedup();
        if packs.len() as u64 > u64::from(POPULAR_PACKS_MAX) {
            return Err(Error::new(ErrorKind::Invalid, format!("popular index: {} packs", packs.len())));
        }
        let group = |pack| self.groups.get(&pack).copied().unwrap_or_default();
        let rows: Vec<PackRow> = packs.iter().map(|pack| PackRow { pack: *pack, group: group(*pack) }).collect();
        let entries = self.entries.len() as u64;
        let bits = bucket_bits(entries);
        let mut head = Vec::new();
        put_head(identity, entries, &rows, &mut head);
        append(&head)?;
        let buckets = 1_usize << bits;
        let mut rest = self.entries.as_slice();
        let mut bucket = Vec::new();
        for (number, first) in (0..).zip((0..buckets).step_by(POPULAR_CHUNK_BUCKETS)) {
            let end = (first + POPULAR_CHUNK_BUCKETS).min(buckets);
            let mut chunk = Vec::new();
            let mut stored = Vec::new();
            for this in first..end {
                let count = rest.partition_point(|(prefix, _)| bucket_of(*prefix, bits) <= this);
                let (here, later) = rest.split_at(count);
                rest = later;
                bucket.clear();
                bucket.extend(here.iter().map(|(prefix, slot)| Row {
                    tag: tag_of(*prefix, bits),
                    pack: packs.binary_search(&slot.pack()).unwrap_or(0) as u32,
                    slot: slot.slot(),
                }));
                bucket.sort_unstable();
                chunk.push(bucket.len() as u8);
                bucket.iter().for_each(|row| row.put(&mut stored));
            }
            chunk.extend_from_slice(&stored);
            append(&chunk)?;
            append(&chunk_checksum(identity, number, &chunk))?;
        }
        Ok(())
    }

    /// Leaves out what the index cannot hold: more entries than a bucket counts, and the same slot twice for one tag.
    fn trim(&mut self) {
        loop {
            let bits = bucket_bits(self.entries.len() as u64);
            let before = self.entries.len();
            let mut bucket = None;
            let mut tags: Vec<(u16, SlotId)> = Vec::new();
            self.entries.retain(|(prefix, slot)| {
                let this = bucket_of(*prefix, bits);
                if bucket != Some(this) {
                    bucket = Some(this);
                    tags.clear();
                }
                let entry = (tag_of(*prefix, bits), *slot);
                let fits = tags.len() < POPULAR_BUCKET_ENTRIES_MAX && !tags.contains(&entry);
                if fits {
                    tags.push(entry);
                }
                fits
            });
            // Fewer entries may mean fewer buckets, which may be too full again.
            if self.entries.len() == before {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::Memory;
    use crate::error::ErrorKind;
    use crate::fingerprint::fingerprint;
    use crate::units::Serial;

    const IDENTITY: IndexIdentity = IndexIdentity { incarnation: Incarnation([7; 16]), epoch: Epoch(3) };
    const OTHERS: VmGroup = VmGroup([9; 16]);

    fn print(n: u32) -> Fingerprint {
        fingerprint(&n.to_le_bytes())
    }

    fn slot(n: u32) -> SlotId {
        SlotId::new(Serial((1 << 47) + u64::from(n / 1000)), (n % 1000) as u16)
    }

    fn builder(entries: u32) -> IndexBuilder {
        let mut builder = IndexBuilder::with_capacity(entries as usize);
        // Not in the order of anything.
        (0..entries).rev().for_each(|n| builder.add(VmGroup::default(), &print(n), slot(n)).unwrap());
        builder
    }

    #[test]
    fn every_entry_is_found_and_almost_nothing_else() {
        for entries in [0, 1, 16, 17, 1000, 70_000] {
            let bytes = builder(entries).encode(IDENTITY).unwrap();
            let index = PopularIndex::decode(&bytes).unwrap();
            assert_eq!(index.encode(), bytes);
            assert_eq!((index.entries(), index.slots().count()), (u64::from(entries), entries as usize));
            for n in 0..entries {
                let found: Vec<_> = index.candidates(VmGroup::default(), &print(n)).collect();
                assert!(found.contains(&slot(n)) && found.len() < 4, "{n} of {entries}: {found:?}");
                assert_eq!(index.candidates(OTHERS, &print(n)).count(), 0);
            }
            let by_chance =
                (entries..entries + 100_000).map(|n| index.candidates(VmGroup::default(), &print(n)).count());
            assert!(by_chance.sum::<usize>() < 100, "one in 4000 was expected at the most");
        }
    }

    #[test]
    fn groups_have_entries_of_their_own() {
        let mut builder = IndexBuilder::default();
        builder.add(VmGroup::default(), &print(1), slot(1)).unwrap();
        builder.add(OTHERS, &print(1), slot(2001)).unwrap();
        assert_eq!(builder.add(OTHERS, &print(1), slot(2)).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(builder.add(OTHERS, &print(1), SlotId::new(Serial(5), 1)).unwrap_err().kind(), ErrorKind::Invalid);
        let index = PopularIndex::decode(&builder.encode(IDENTITY).unwrap()).unwrap();
        let found = |group| index.candidates(group, &print(1)).collect::<Vec<_>>();
        assert_eq!((found(VmGroup::default()), found(OTHERS)), (vec![slot(1)], vec![slot(2001)]));
        assert!(found(VmGroup([1; 16])).is_empty());
    }

    #[test]
    fn an_object_is_read_back_as_its_own_epoch_only() {
        let memory = Memory::default();
        let bytes = builder(70_000).write(&memory, IDENTITY).unwrap();
        assert_eq!(memory.len(&index_key(IDENTITY.epoch)).unwrap(), bytes);
        let index = PopularIndex::read(&memory, IDENTITY, usize::MAX).unwrap();
        assert_eq!(index.encode().len() as u64, bytes);
        assert_eq!(builder(1).write(&memory, IDENTITY).unwrap_err().kind(), ErrorKind::Exists);
        let kind = |identity| PopularIndex::read(&memory, identity, usize::MAX).unwrap_err().kind();
        assert_eq!(kind(IndexIdentity { epoch: Epoch(4), ..IDENTITY }), ErrorKind::NotFound);
        assert_eq!(kind(IndexIdentity { incarnation: Incarnation([8; 16]), ..IDENTITY }), ErrorKind::Corrupt);
        assert_eq!(parse_index_name("0000000003.popular"), Some(Epoch(3)));
        assert_eq!((parse_index_name("3.popular"), parse_index_name("0000000003")), (None, None));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let bytes = builder(40).encode(IDENTITY).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(PopularIndex::decode(&bad).unwrap_err().kind(), ErrorKind::Corrupt, "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(PopularIndex::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
        assert!(PopularIndex::decode(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn an_index_over_its_share_keeps_a_part_that_is_still_right() {
        let memory = Memory::default();
        builder(70_000).write(&memory, IDENTITY).unwrap();
        let whole = PopularIndex::read(&memory, IDENTITY, usize::MAX).unwrap();
        let part = PopularIndex::read(&memory, IDENTITY, whole.memory_bytes() / 3).unwrap();
        assert_eq!(part.sampling(), 4);
        assert!(part.memory_bytes() < whole.memory_bytes() / 3 + 8192, "{}", part.memory_bytes());
        let found = (0..70_000).filter(|n| part.candidates(VmGroup::default(), &print(*n)).any(|s| s == slot(*n)));
        let found = found.count();
        assert!((16_500..18_500).contains(&found), "{found}");
        assert!(part.encode().is_empty() && part.retain(|_| true).is_err());
    }

    #[test]
    fn an_epoch_without_condemned_slots_needs_no_fingerprints() {
        let whole = PopularIndex::decode(&builder(70_000).encode(IDENTITY).unwrap()).unwrap();
        for keep in [70_000_u32, 69_000, 30_000, 300, 1, 0] {
            let next = IndexIdentity { epoch: Epoch(4), ..IDENTITY };
            let last = keep.checked_sub(1).map(slot);
            let rest = whole.retain(|slot| last.is_some_and(|last| slot <= last)).unwrap();
            let rest = PopularIndex::decode(&rest.encode(next).unwrap()).unwrap();
            let anew = PopularIndex::decode(&builder(keep).encode(next).unwrap()).unwrap();
            assert_eq!(rest.encode(), anew.encode(), "{keep}");
        }
    }

    #[test]
    fn forged_fingerprints_overfill_no_bucket() {
        let mut builder = builder(2000);
        for n in 0..1000 {
            let mut forged = print(n);
            forged.0[..4].fill(0x55);
            builder.add(VmGroup::default(), &forged, slot(5000 + n)).unwrap();
        }
        let index = PopularIndex::decode(&builder.encode(IDENTITY).unwrap()).unwrap();
        assert!(index.entries() < 2300, "{}", index.entries());
        let honest = (0..2000).filter(|n| index.candidates(VmGroup::default(), &print(*n)).any(|s| s == slot(*n)));
        assert!(honest.count() > 1980);
    }
}
