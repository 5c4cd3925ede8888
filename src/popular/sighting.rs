//! Second sighting: a sampled index of the blocks that each VM has in packs of its own, one file a VM, so that another
//! VM of the group notices what it is about to store a second time.
//!
//! Derived data: every answer is a hint. Each VM's file is written by the VM's own writer, when it ends, so nobody
//! shares one; it is read by the writers of the other VMs. A file that is missing, damaged or of an earlier life of the VM
//! counts for nothing, and the VM's next writer makes it anew from the slot tables.
//!
//! ```text
//! derived/vms/<vm>/sightings
//!   magic[8] checksum[16] incarnation[16] group[16] (count u32, pack u64 ...) (count u32, (hook u64, slot u64) ...)
//! ```

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use crate::error::{Error, Result, corrupt};
use crate::fingerprint::{Fingerprint, short};
use crate::limits::{SIGHTING_SAMPLING, SIGHTINGS_PER_VM_MAX};
use crate::units::{Incarnation, PackNumber, SlotId, VmGroup};
use crate::wire::{Wire, decode, encode, wire_struct};

/// Name of the file in the folder of a VM's derived data.
pub const FILE_NAME: &str = "sightings";

const MAGIC: &[u8; 8] = b"snapfsw1";

/// A file is read whole: its entries, and packs far more than these can be of.
const FILE_BYTES_MAX: u64 = SIGHTINGS_PER_VM_MAX as u64 * 24 + (1 << 20);

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
    /// The sampled blocks of one VM.
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
        let about = |e| Error::io(path.display().to_string(), e);
        let file = File::open(path).map_err(about)?;
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(about)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(corrupt(format!("{}: is too large", path.display())));
        }
        Self::decode(&bytes).map_err(|e| e.within(path.display()))
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let body = bytes.strip_prefix(MAGIC).and_then(|rest| rest.split_first_chunk::<16>());
        match body {
            Some((sum, body)) if *sum == short(b"snapfs sightings", &[body]) => decode(body),
            _ => Err(corrupt("sightings: checksum does not match")),
        }
    }

    /// The bytes of its file.
    pub fn encode(&self) -> Vec<u8> {
        let body = encode(self);
        let mut bytes = MAGIC.to_vec();
        short(b"snapfs sightings", &[&body]).put(&mut bytes);
        bytes.extend_from_slice(&body);
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
        thin_out(&mut self.entries, SIGHTINGS_PER_VM_MAX, |entry| entry.hook);
        self.entries.sort_unstable();
        self.entries.dedup();
        self.packs.sort_unstable();
        self.packs.dedup();
    }
}

/// Keeps entries of every second, fourth, ... hook until there are no more than so many.
fn thin_out<T>(entries: &mut Vec<T>, entries_max: usize, hook: impl Fn(&T) -> u64) {
    let mut bits = 0;
    while entries.len() > entries_max && bits < 64 {
        bits += 1;
        entries.retain(|entry| hook(entry).trailing_zeros() >= bits);
    }
}

/// The sampled blocks of many VMs, in memory.
#[derive(Debug, Default)]
pub struct SightingIndex {
    entries: Vec<(u64, u32, SlotId)>,
    entries_max: usize,
}

impl SightingIndex {
    /// An empty index that takes about `memory_bytes_max` at the most.
    pub fn new(memory_bytes_max: usize) -> Self {
        Self { entries: Vec::new(), entries_max: (memory_bytes_max / ENTRY_BYTES).max(1) }
    }

    /// Adds the blocks of a VM, which is known by a number.
    pub fn add(&mut self, donor: u32, sightings: &Sightings) {
        self.entries.extend(sightings.entries.iter().map(|entry| (entry.hook, donor, entry.slot)));
        thin_out(&mut self.entries, self.entries_max, |entry| entry.0);
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
        for at in [0, 9, 30, bytes.len() - 1] {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(Sightings::decode(&bad).is_err(), "byte {at}");
        }
        assert!(Sightings::decode(&bytes[..20]).is_err());
        let mut fewer = sightings.clone();
        fewer.retain(|_| false);
        assert!(fewer.entries.is_empty() && fewer.packs.is_empty());
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
