//! Second sighting: a sampled index of the blocks that each VM has in packs of its own, one file a VM, so that another
//! VM of the group notices what it is about to store a second time.
//!
//! Derived data: every answer is a hint. Each VM's file is written by the VM's own writer, when it ends, so nobody
//! shares one; it is read by the writers of the other VMs. A file that is missing, damaged or of an earlier life of the VM
//! counts for nothing, and the VM's next writer makes it anew from the slot tables.
//!
//! Who reads the files of many VMs has room for some of each only, so that the entries lie by *level*, the number of zero
//! bits at the end of the hook: every sixteenth, eighth, ... of them is at the front, and no more is read than is kept.
//!
//! ```text
//! derived/vms/<vm>/sightings
//!   magic[8] checksum[16] head: incarnation[16] group[16] (16, (count u32, checksum[16]) ...) count u32 checksum[16]
//!   the entries of level 15 (and more), ... of level 0, by hook: (hook u64, slot u64) ...
//!   packs: (pack u64) ...
//! ```

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use crate::error::{Error, Result, corrupt};
use crate::fingerprint::{Fingerprint, short};
use crate::limits::{SIGHTING_SAMPLING, SIGHTINGS_PER_VM_MAX};
use crate::units::{Incarnation, PackNumber, SlotId, VmGroup};
use crate::wire::{Reader, Wire, decode, encode, wire_struct};

/// Name of the file in the folder of a VM's derived data.
pub const FILE_NAME: &str = "sightings";

const MAGIC: &[u8; 8] = b"snapfsw2";

/// Levels of a file: beyond the last nobody has so many VMs.
const LEVELS: usize = 16;

const HEAD_BYTES: usize = 8 + 16 + 16 + 16 + 4 + LEVELS * PART_BYTES + PART_BYTES;

const PART_BYTES: usize = 4 + 16;

const HEAD_CONTEXT: &[u8] = b"snapfs sightings";

const PART_CONTEXT: &[u8] = b"snapfs sightings part";

/// Packs of a file: far more than its entries can be of.
const PACKS_MAX: usize = 1 << 17;

/// Entries of one hook in memory: more VMs that hold a block would tell nothing new.
const DONORS_PER_HOOK: usize = 2;

/// Bytes of an entry in memory.
const ENTRY_BYTES: usize = 24;

wire_struct! {
    /// A sampled block of a VM.
    #[derive(Copy, PartialOrd, Ord)]
    pub struct Sighting {
        /// The beginning of its fingerprint.
        pub hook: u64,
        /// Where the VM has it.
        pub slot: SlotId,
    }
}

wire_struct! {
    /// Rows of a file that lie together.
    #[derive(Copy)]
    pub struct Part {
        /// How many.
        pub count: u32,
        /// Of their bytes.
        pub checksum: [u8; 16],
    }
}

wire_struct! {
    /// What a file begins with.
    pub struct Head {
        /// The VM's life.
        pub incarnation: Incarnation,
        /// The VM's group when it was written.
        pub group: VmGroup,
        /// The entries, the coarsest level first.
        pub levels: Vec<Part>,
        /// The packs.
        pub packs: Part,
    }
}

/// The sampled blocks of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sightings {
    /// The VM's life.
    pub incarnation: Incarnation,
    /// The VM's group when it was written.
    pub group: VmGroup,
    /// Packs whose blocks are in here.
    pub packs: Vec<PackNumber>,
    /// The blocks, by hook.
    pub entries: Vec<Sighting>,
}

/// The key of a block here, for the one in [`SIGHTING_SAMPLING`] that has one.
pub fn sighting_hook(print: &Fingerprint) -> Option<u64> {
    let hook = print.hook()?;
    let sample = print.0.last_chunk::<8>().map_or(1, |tail| u64::from_le_bytes(*tail));
    sample.is_multiple_of(SIGHTING_SAMPLING).then_some(hook)
}

impl Sightings {
    /// None of a VM.
    pub fn empty(incarnation: Incarnation, group: VmGroup) -> Self {
        Self { incarnation, group, packs: Vec::new(), entries: Vec::new() }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Unavailable`.
    pub fn read(path: &Path) -> Result<Self> {
        open(path).and_then(Self::take).map_err(|e| e.within(path.display()))
    }

    /// Reads what a file has of `level` and above, and no packs. Cost: what it returns, and the head.
    ///
    /// # Errors
    /// As [`Sightings::read`].
    pub fn read_coarse(path: &Path, level: usize) -> Result<Self> {
        let read = |mut file| {
            let head = Head::take(&mut file)?;
            let entries = head.take_entries(&mut file, level)?;
            Ok(Self { incarnation: head.incarnation, group: head.group, packs: Vec::new(), entries })
        };
        open(path).and_then(read).map_err(|e| e.within(path.display()))
    }

    fn take(mut from: impl Read) -> Result<Self> {
        let head = Head::take(&mut from)?;
        let entries = head.take_entries(&mut from, 0)?;
        let packs = head.packs.take_rows(&mut from, (PACKS_MAX, 8))?;
        if from.read(&mut [0]).map_err(|e| Error::io("sightings", e))? > 0 {
            return Err(corrupt("sightings: has more than it says"));
        }
        Ok(Self { incarnation: head.incarnation, group: head.group, packs, entries })
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        Self::take(bytes)
    }

    /// The bytes of its file. The entries must be [settled](Sightings::settle).
    pub fn encode(&self) -> Vec<u8> {
        let mut levels = vec![Vec::new(); LEVELS];
        for entry in &self.entries {
            if let Some(rows) = levels.get_mut(LEVELS - 1 - level_of(entry.hook)) {
                rows.push(*entry);
            }
        }
        let parts: Vec<(Part, Vec<u8>)> = levels.iter().map(|rows| Part::of(rows)).collect();
        let (packs, pack_rows) = Part::of(&self.packs);
        let levels = parts.iter().map(|(part, _)| *part).collect();
        let head = encode(&Head { incarnation: self.incarnation, group: self.group, levels, packs });
        let mut bytes = MAGIC.to_vec();
        short(HEAD_CONTEXT, &[&head]).put(&mut bytes);
        bytes.extend(head);
        parts.iter().for_each(|(_, rows)| bytes.extend_from_slice(rows));
        bytes.extend(pack_rows);
        bytes
    }

    /// Replaces a file. A crash leaves the old one, the new one, or one that is not believed.
    ///
    /// # Errors
    /// `NoSpace`, `Denied`, `Unavailable`.
    pub fn write(&self, path: &Path) -> Result<()> {
        let about = |e| Error::io(path.display().to_string(), e);
        let new = path.with_extension("new");
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(about)?;
        }
        let mut file = File::create(&new).map_err(about)?;
        file.write_all(&self.encode()).map_err(about)?;
        std::fs::rename(&new, path).map_err(about)
    }

    /// Forgets packs that are not there any more.
    pub fn retain(&mut self, is_there: impl Fn(PackNumber) -> bool) {
        self.packs.retain(|pack| is_there(*pack));
        self.entries.retain(|entry| is_there(entry.slot.pack()));
    }

    /// Adds a block.
    pub fn add(&mut self, print: &Fingerprint, slot: SlotId) {
        if let Some(hook) = sighting_hook(print) {
            self.entries.push(Sighting { hook, slot });
        }
    }

    /// Puts all in order, and keeps only every second, fourth, ... hook where there are too many.
    pub fn settle(&mut self) {
        thin_out(&mut self.entries, SIGHTINGS_PER_VM_MAX, 0, |entry| entry.hook);
        self.entries.sort_unstable();
        self.entries.dedup();
        self.packs.sort_unstable();
        self.packs.dedup();
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Error::io("cannot be opened", e))
}

/// Exactly so many bytes.
fn take_bytes(from: &mut impl Read, count: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => corrupt("sightings: ends early"),
        _ => Error::io("sightings", e),
    })?;
    Ok(bytes)
}

/// Where an entry lies in a file.
fn level_of(hook: u64) -> usize {
    (hook.trailing_zeros() as usize).min(LEVELS - 1)
}

impl Part {
    fn of<T: Wire>(rows: &[T]) -> (Self, Vec<u8>) {
        let mut bytes = Vec::new();
        rows.iter().for_each(|row| row.put(&mut bytes));
        (Self { count: rows.len() as u32, checksum: short(PART_CONTEXT, &[&bytes]) }, bytes)
    }

    /// Reads the rows: so many at the most, each of so many bytes.
    fn take_rows<T: Wire>(&self, from: &mut impl Read, (rows_max, row_bytes): (usize, usize)) -> Result<Vec<T>> {
        let count = self.count as usize;
        if count > rows_max {
            return Err(corrupt(format!("sightings: {count} rows")));
        }
        let bytes = take_bytes(from, count * row_bytes)?;
        if short(PART_CONTEXT, &[&bytes]) != self.checksum {
            return Err(corrupt("sightings: checksum does not match"));
        }
        let mut reader = Reader::new(&bytes);
        (0..count).map(|_| T::take(&mut reader)).collect()
    }
}

impl Head {
    /// Reads the head of a file. Cost: one read of some hundred bytes.
    ///
    /// # Errors
    /// As [`Sightings::read`].
    pub fn read(path: &Path) -> Result<Self> {
        open(path).and_then(|mut file| Self::take(&mut file)).map_err(|e| e.within(path.display()))
    }

    fn take(from: &mut impl Read) -> Result<Self> {
        let bytes = take_bytes(from, HEAD_BYTES)?;
        let body = bytes.strip_prefix(MAGIC).and_then(|rest| rest.split_first_chunk::<16>());
        let head: Self = match body {
            Some((sum, body)) if *sum == short(HEAD_CONTEXT, &[body]) => decode(body)?,
            _ => return Err(corrupt("sightings: checksum does not match")),
        };
        if head.levels.len() != LEVELS || head.entries(0) > SIGHTINGS_PER_VM_MAX as u64 {
            return Err(corrupt(format!("sightings: {} entries in {} levels", head.entries(0), head.levels.len())));
        }
        Ok(head)
    }

    /// Entries of `level` and above.
    pub fn entries(&self, level: usize) -> u64 {
        self.parts(level).map(|part| u64::from(part.count)).sum()
    }

    fn parts(&self, level: usize) -> impl Iterator<Item = &Part> {
        self.levels.iter().take(LEVELS.saturating_sub(level))
    }

    fn take_entries(&self, from: &mut impl Read, level: usize) -> Result<Vec<Sighting>> {
        let mut entries = Vec::new();
        for part in self.parts(level) {
            entries.extend(part.take_rows::<Sighting>(from, (SIGHTINGS_PER_VM_MAX, 16))?);
        }
        entries.sort_unstable();
        Ok(entries)
    }
}

/// The level from which on files with these heads have together no more than so many entries; the last one if all have
/// more.
pub fn level_for(heads: &[Head], entries_max: usize) -> usize {
    let fits = |level: &usize| heads.iter().map(|head| head.entries(*level)).sum::<u64>() <= entries_max as u64;
    (0..LEVELS).find(fits).unwrap_or(LEVELS - 1)
}

/// Keeps entries of every second, fourth, ... hook until there are no more than so many. All have so many zero bits at
/// the end of their hooks; returns how many they have then.
fn thin_out<T>(entries: &mut Vec<T>, entries_max: usize, mut bits: u32, hook: impl Fn(&T) -> u64) -> u32 {
    while entries.len() > entries_max && bits < 64 {
        bits += 1;
        entries.retain(|entry| hook(entry).trailing_zeros() >= bits);
    }
    bits
}

/// The sampled blocks of many VMs, in memory.
#[derive(Debug, Default)]
pub struct SightingIndex {
    entries: Vec<(u64, u32, SlotId)>,
    entries_max: usize,
    // Zero bits at the end of the hooks that are kept, of all VMs alike.
    bits: u32,
}

impl SightingIndex {
    /// An empty index that takes about `memory_bytes_max` at the most.
    pub fn new(memory_bytes_max: usize) -> Self {
        Self { entries: Vec::new(), entries_max: (memory_bytes_max / ENTRY_BYTES).max(1), bits: 0 }
    }

    /// Entries that it keeps.
    pub fn entries_max(&self) -> usize {
        self.entries_max
    }

    /// Adds the blocks of a VM, which is known by a number.
    pub fn add(&mut self, donor: u32, sightings: &Sightings) {
        let kept = sightings.entries.iter().filter(|entry| entry.hook.trailing_zeros() >= self.bits);
        self.entries.extend(kept.map(|entry| (entry.hook, donor, entry.slot)));
        self.bits = thin_out(&mut self.entries, self.entries_max, self.bits, |entry| entry.0);
    }

    /// All was added.
    #[must_use]
    pub fn finish(mut self) -> Self {
        self.entries.sort_unstable();
        self.entries.shrink_to_fit();
        self
    }

    /// Bytes that it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        self.entries.capacity() * ENTRY_BYTES
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Where other VMs have blocks of these hooks: by VM, those that have most of them first.
    pub fn look_up(&self, hooks: &[u64]) -> Vec<(u32, Vec<SlotId>)> {
        let mut found: Vec<(u32, Vec<SlotId>)> = Vec::new();
        let mut asked = HashSet::new();
        for hook in hooks.iter().filter(|hook| asked.insert(**hook)) {
            let from = self.entries.partition_point(|(other, ..)| other < hook);
            let rest = self.entries.get(from..).unwrap_or_default();
            let mut donors = 0;
            let mut last = None;
            for (_, donor, slot) in rest.iter().take_while(|(other, ..)| other == hook) {
                // One slot for each VM, the first.
                if last == Some(*donor) {
                    continue;
                }
                last = Some(*donor);
                match found.iter_mut().find(|(other, _)| other == donor) {
                    Some((_, slots)) => slots.push(*slot),
                    None => found.push((*donor, vec![*slot])),
                }
                donors += 1;
                if donors >= DONORS_PER_HOOK {
                    break;
                }
            }
        }
        found.sort_by_key(|(donor, slots)| (std::cmp::Reverse(slots.len()), *donor));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fingerprint::fingerprint;
    use crate::units::Serial;

    fn print(n: u32) -> Fingerprint {
        fingerprint(&n.to_le_bytes())
    }

    fn of(range: std::ops::Range<u32>, pack: u64) -> Sightings {
        let mut sightings = Sightings::empty(Incarnation([1; 16]), VmGroup::default());
        for n in range {
            sightings.add(&print(n), SlotId::new(Serial(pack), n as u16));
        }
        sightings.packs.push(Serial(pack));
        sightings.settle();
        sightings
    }

    #[test]
    fn one_in_so_many_blocks_is_sampled_and_bytes_come_back() {
        let sightings = of(0..64_000, 5);
        let expected = 64_000 / SIGHTING_SAMPLING as usize;
        assert!((expected * 8 / 10..expected * 12 / 10).contains(&sightings.entries.len()));
        let bytes = sightings.encode();
        assert_eq!(Sightings::decode(&bytes).unwrap(), sightings);
        assert_eq!(Head::take(&mut &bytes[..]).unwrap().entries(0), sightings.entries.len() as u64);
        for at in [0, 9, 30, 50, HEAD_BYTES, bytes.len() / 2, bytes.len() - 1] {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(Sightings::decode(&bad).is_err(), "byte {at}");
        }
        for length in [0, 7, 20, HEAD_BYTES - 1, HEAD_BYTES, bytes.len() - 1] {
            assert!(Sightings::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
        assert!(Sightings::decode(&[&bytes[..], &[0]].concat()).is_err());
        let mut fewer = sightings.clone();
        fewer.retain(|_| false);
        assert!(fewer.entries.is_empty() && fewer.packs.is_empty());
    }

    #[test]
    fn of_many_files_no_more_is_read_than_is_kept_and_what_is_read_is_what_thinning_would_leave() {
        let folder = tempfile::tempdir().unwrap();
        let all: Vec<Sightings> = (0..20).map(|vm| of(vm * 9_000..(vm + 1) * 10_000, 5 + u64::from(vm))).collect();
        let paths: Vec<_> = (0..all.len()).map(|vm| folder.path().join(format!("{vm}"))).collect();
        all.iter().zip(&paths).for_each(|(sightings, path)| sightings.write(path).unwrap());
        let heads: Vec<Head> = paths.iter().map(|path| Head::read(path).unwrap()).collect();
        for entries_max in [1, 20, 100, 1_000, 5_000, 1 << 20] {
            let level = level_for(&heads, entries_max);
            let new = || SightingIndex::new(entries_max * ENTRY_BYTES);
            let (mut some, mut every) = (new(), new());
            let mut read = 0;
            for (vm, (path, sightings)) in paths.iter().zip(&all).enumerate() {
                let coarse = Sightings::read_coarse(path, level).unwrap();
                assert_eq!((coarse.incarnation, coarse.group), (sightings.incarnation, sightings.group));
                read += coarse.entries.len();
                some.add(vm as u32, &coarse);
                every.add(vm as u32, sightings);
            }
            assert!(read <= entries_max || level == LEVELS - 1, "{read} entries for {entries_max}");
            assert_eq!(some.finish().entries, every.finish().entries, "{entries_max}");
        }
    }

    #[test]
    fn who_has_most_of_the_hooks_comes_first_and_too_many_are_thinned_out() {
        let mut index = SightingIndex::new(1 << 20);
        index.add(7, &of(0..2_000, 5));
        index.add(3, &of(1_000..9_000, 5));
        let index = index.finish();
        let hooks: Vec<u64> = (0..9_000).filter_map(|n| sighting_hook(&print(n))).collect();
        let found = index.look_up(&hooks);
        assert_eq!(found.iter().map(|(donor, _)| *donor).collect::<Vec<_>>(), [3, 7]);
        let slots: usize = found.iter().map(|(_, slots)| slots.len()).sum();
        assert_eq!(slots, index.entries.len());
        assert!(index.look_up(&[1, 2, 3]).is_empty());
        let mut small = SightingIndex::new(20 * ENTRY_BYTES);
        small.add(0, &of(0..60_000, 5));
        assert!(!small.is_empty() && small.finish().entries.len() <= 20);
    }
}
