//! Numbers with their meaning: indexes, counts and identities never meet without a named conversion.

use std::fmt;

use crate::error::{Result, corrupt};
use crate::limits::{BLOCK_BYTES, GROUP_SEGMENTS, PACK_SLOTS_MAX, SEGMENT_BYTES};

/// The identity of one life of a VM: 16 random bytes, drawn when its log begins. It goes into every frame
/// checksum, so that a reused name can never serve old bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Incarnation(pub [u8; 16]);

/// Whose blocks may be shared: a digest of the name of a VM's group, zeros for the group of all VMs that have none.
/// Deduplication between VMs never crosses groups, so that it tells nobody what another group has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct VmGroup(pub [u8; 16]);

/// The number of an election, from 1: it names the popular index that was published with it. 0 is before the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Epoch(pub u64);

/// The number of a log record of a VM, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct RecordNumber(pub u32);

impl RecordNumber {
    /// The number after this one.
    ///
    /// # Errors
    /// `Corrupt` after 2^32 records: 136 years of one a second, or damage.
    pub fn next(self) -> Result<Self> {
        self.0.checked_add(1).map(Self).ok_or_else(|| corrupt("log: record numbers are used up"))
    }
}

/// The highest bit of a serial: set in the numbers of common packs.
const COMMON_BIT: u64 = 1 << 47;

/// A number that is never used twice within a VM: the begin record that allotted it, and a count from there.
/// Packs, roots and files are numbered so; a writer that was taken over can only touch its own numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Serial(pub u64);

impl Serial {
    /// The `index`-th serial of the writer that began with record `begin`.
    pub fn new(begin: RecordNumber, index: u16) -> Self {
        Self((u64::from(begin.0) << 16) | u64::from(index))
    }

    /// The `index`-th serial of the writer of common packs that began with record `begin` of the common home.
    pub fn common(begin: RecordNumber, index: u16) -> Self {
        Self(COMMON_BIT | Self::new(begin, index).0)
    }

    /// The begin record that allotted it, in the log of its home.
    pub fn begin(self) -> RecordNumber {
        RecordNumber(u32::try_from((self.0 & !COMMON_BIT) >> 16).unwrap_or(u32::MAX))
    }

    /// Whether it fits the 48 bits that a serial has.
    pub fn is_valid(self) -> bool {
        self.0 < 1 << 48
    }

    /// Whether it numbers a common pack, which VMs share: these have the top bit, which no begin record of a VM
    /// reaches.
    pub fn is_common(self) -> bool {
        self.0 & COMMON_BIT != 0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:012x}", self.0)
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:012x}", self.0)
    }
}

/// The number of a pack.
pub type PackNumber = Serial;
/// The number of a root page.
pub type RootId = Serial;
/// The number of a file (a snapshot or a draft) for all its life, whatever it is called.
pub type FileId = Serial;

/// The state of a pack: 0 as first written, then the begin record of the writer that compacted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Generation(pub u32);

/// One object that holds packs: named after its first member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ObjectId {
    /// The number of the first member.
    pub number: PackNumber,
    /// The generation of all members in it.
    pub generation: Generation,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}", self.number, self.generation.0)
    }
}

/// The place of one block (or recipe) for ever: a pack, and a slot in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u64);

impl SlotId {
    /// Slot `slot` of `pack`.
    pub fn new(pack: PackNumber, slot: u16) -> Self {
        Self((pack.0 << 16) | u64::from(slot))
    }

    /// The pack.
    pub fn pack(self) -> PackNumber {
        Serial(self.0 >> 16)
    }

    /// The slot within the pack.
    pub fn slot(self) -> u16 {
        u16::try_from(self.0 & 0xffff).unwrap_or(u16::MAX)
    }

    /// The slot `count` further on in the same pack; `None` past the last.
    pub fn plus(self, count: u32) -> Option<Self> {
        let slot = u32::from(self.slot()).checked_add(count)?;
        (slot < PACK_SLOTS_MAX).then(|| Self(self.0 + u64::from(count)))
    }
}

impl fmt::Debug for SlotId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.pack(), self.slot())
    }
}

/// An index of a 2 MiB segment of the grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentIndex(pub u32);

impl SegmentIndex {
    /// The segment that holds this grid offset.
    pub fn holding(grid_offset: u64) -> Self {
        Self(u32::try_from(grid_offset / SEGMENT_BYTES as u64).unwrap_or(u32::MAX))
    }

    /// Grid offset of its first byte.
    pub fn grid_offset(self) -> u64 {
        u64::from(self.0) * SEGMENT_BYTES as u64
    }

    /// The group that it belongs to.
    pub fn group(self) -> u32 {
        self.0 / GROUP_SEGMENTS as u32
    }

    /// Its place within the group.
    pub fn in_group(self) -> u16 {
        (self.0 % GROUP_SEGMENTS as u32) as u16
    }
}

/// How an image lies on the grid of blocks and segments: `lead` zero bytes are thought in front of it, so that
/// its first partition begins on a block boundary. Offset `o` of the image is offset `o + lead` of the grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Grid {
    lead: u32,
}

impl Grid {
    /// The grid whose blocks begin at image offset `phase` + k * 4 KiB.
    pub fn with_phase(phase: u32) -> Self {
        let block = BLOCK_BYTES as u32;
        Self { lead: (block - phase % block) % block }
    }

    /// Bytes thought in front of the image; below 4096.
    pub fn lead(self) -> u32 {
        self.lead
    }

    /// From the stored number of lead bytes.
    ///
    /// # Errors
    /// `Corrupt` when it is a block or more.
    pub fn from_lead(lead: u32) -> Result<Self> {
        if (lead as usize) < BLOCK_BYTES {
            Ok(Self { lead })
        } else {
            Err(corrupt(format!("grid: lead of a block or more, lead={lead}")))
        }
    }

    /// Image offset to grid offset.
    pub fn offset(self, image_offset: u64) -> u64 {
        image_offset + u64::from(self.lead)
    }

    /// Grid offset to image offset; what lies in the lead becomes 0.
    pub fn image_offset(self, grid_offset: u64) -> u64 {
        grid_offset.saturating_sub(u64::from(self.lead))
    }

    /// Segments of an image of this size.
    pub fn segments(self, image_bytes: u64) -> u32 {
        if image_bytes == 0 {
            return 0;
        }
        u32::try_from(self.offset(image_bytes).div_ceil(SEGMENT_BYTES as u64)).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_puts_the_first_partition_on_a_block_boundary() {
        for phase in 0..4096 {
            let grid = Grid::with_phase(phase);
            assert_eq!(grid.offset(u64::from(phase)) % 4096, 0);
            assert_eq!(grid.image_offset(grid.offset(12345)), 12345);
            assert_eq!(Grid::from_lead(grid.lead()).unwrap(), grid);
        }
        assert_eq!(Grid::with_phase(63 * 512).lead(), 512);
        assert_eq!(Grid::default().segments(0), 0);
        assert_eq!(Grid::default().segments(1), 1);
        assert_eq!(Grid::default().segments(2 << 20), 1);
        assert_eq!(Grid::with_phase(512).segments((2 << 20) - 3583), 2);
    }

    #[test]
    fn a_slot_id_is_its_pack_and_slot() {
        let pack = Serial::new(RecordNumber(7), 9);
        let slot = SlotId::new(pack, 65535);
        assert_eq!((slot.pack(), slot.slot(), slot.plus(1)), (pack, 65535, None));
        assert_eq!(SlotId::new(pack, 3).plus(4), Some(SlotId::new(pack, 7)));
        assert_eq!(pack.begin(), RecordNumber(7));
        assert!(pack.is_valid() && !Serial(1 << 48).is_valid());
    }
}
