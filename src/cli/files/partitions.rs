//! Where filesystems lie in an image, and which: partition tables (MBR with logical partitions, GPT) and the marks that
//! filesystems begin with.
//!
//! The bytes come from a guest. Nothing here believes them further than to offer a place to look at: every loop has an
//! end, and what makes no sense is left out.

use std::ops::Range;

use crate::error::Result;

/// Bytes of a sector, the unit of both kinds of tables.
const SECTOR_BYTES: u64 = 512;

/// A GPT on a disk with sectors of 4 KiB counts in these.
const LARGE_SECTOR_BYTES: u64 = 4096;

const MBR_ENTRIES_OFFSET: usize = 446;
const MBR_ENTRY_BYTES: usize = 16;
const MBR_SIGNATURE_OFFSET: usize = 510;

const MBR_TYPE_GPT: u8 = 0xee;
const MBR_TYPES_EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// Number of the first logical partition.
const LOGICAL_FIRST: u32 = 5;

/// Partitions that are looked at: more than any system uses, and a chain of tables may lead in a circle.
const PARTITIONS_MAX: usize = 256;

const GPT_ENTRY_BYTES_MIN: usize = 128;
const GPT_ENTRY_BYTES_MAX: usize = 4096;

/// A part of an image that may hold a filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Its number, as the guest counts; `None` is the whole image.
    pub number: Option<u32>,
    /// The bytes of the image that are its.
    pub range: Range<u64>,
    /// What lies in it.
    pub content: Content,
}

/// What a partition holds, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// ext2, ext3 or ext4.
    Ext,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// FAT of any width.
    Fat,
    /// NTFS.
    Ntfs,
    /// A physical volume of LVM.
    Lvm,
    /// Encrypted with LUKS.
    Luks,
    /// Swap space.
    Swap,
    /// Nothing that is known.
    Unknown,
}

impl Content {
    /// Its name for people and programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Fat => "fat",
            Self::Ntfs => "ntfs",
            Self::Lvm => "lvm",
            Self::Luks => "luks",
            Self::Swap => "swap",
            Self::Unknown => "unknown",
        }
    }
}

/// An image to look into: its bytes, which a function reads at an offset.
pub struct Source<'a> {
    /// Bytes of the image.
    pub bytes: u64,
    /// Fills its argument from an offset on; not asked for anything past the end.
    pub read: &'a dyn Fn(u64, &mut [u8]) -> Result<()>,
}

impl Source<'_> {
    /// The `N` bytes at `offset`; zeros past the end.
    fn at<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        let there = usize::try_from(self.bytes.saturating_sub(offset)).unwrap_or(usize::MAX).min(N);
        if let Some(part) = bytes.get_mut(..there).filter(|part| !part.is_empty()) {
            (self.read)(offset, part)?;
        }
        Ok(bytes)
    }
}

/// The partitions of an image, in the order of their numbers; the whole image when it has no table.
///
/// # Errors
/// Those of reading.
pub fn partitions(source: &Source<'_>) -> Result<Vec<Partition>> {
    let whole = 0..source.bytes;
    let content = content_of(source, &whole)?;
    let mut found = Vec::new();
    // A filesystem over all of an image may begin with what looks like a table: FAT and NTFS do.
    if content == Content::Unknown {
        found = gpt(source)?.map_or_else(|| mbr(source), Ok)?;
    }
    found.truncate(PARTITIONS_MAX);
    found.retain(|(_, range)| range.start < range.end && range.start < source.bytes);
    if found.is_empty() {
        return Ok(vec![Partition { number: None, range: whole, content }]);
    }
    let partition = |(number, range): (u32, Range<u64>)| {
        let range = range.start..range.end.min(source.bytes);
        Ok(Partition { number: Some(number), content: content_of(source, &range)?, range })
    };
    found.into_iter().map(partition).collect()
}

type Numbered = (u32, Range<u64>);

/// The entries of an MBR: type, first sector, sectors; `None` when it is none.
fn mbr_entries(sector: &[u8; 512]) -> Option<Vec<(u8, u64, u64)>> {
    if array_at(sector, MBR_SIGNATURE_OFFSET)? != [0x55, 0xaa] {
        return None;
    }
    let (entries, _) = sector.get(MBR_ENTRIES_OFFSET..MBR_SIGNATURE_OFFSET)?.as_chunks::<MBR_ENTRY_BYTES>();
    let mut found = Vec::new();
    for entry in entries {
        let [status, _, _, _, kind, _, _, _, s0, s1, s2, s3, l0, l1, l2, l3] = *entry;
        // This gives boot code away that stands where a table would.
        if !matches!(status, 0x00 | 0x80) {
            return None;
        }
        let start = u64::from(u32::from_le_bytes([s0, s1, s2, s3]));
        found.push((kind, start, u64::from(u32::from_le_bytes([l0, l1, l2, l3]))));
    }
    Some(found)
}

fn sectors(start: u64, count: u64) -> Range<u64> {
    start * SECTOR_BYTES..start.saturating_add(count).saturating_mul(SECTOR_BYTES)
}

fn mbr(source: &Source<'_>) -> Result<Vec<Numbered>> {
    let mut found = Vec::new();
    for (number, (kind, start, count)) in (1..).zip(mbr_entries(&source.at(0)?).unwrap_or_default()) {
        if MBR_TYPES_EXTENDED.contains(&kind) {
            found.extend(logical(source, start)?);
        } else if kind != 0 && start != 0 {
            found.push((number, sectors(start, count)));
        }
    }
    found.sort_by_key(|(number, _)| *number);
    Ok(found)
}

/// The logical partitions: a chain of tables, each with one of them and the place of the next table.
fn logical(source: &Source<'_>, extended: u64) -> Result<Vec<Numbered>> {
    let mut found = Vec::new();
    let mut table = extended;
    for number in (LOGICAL_FIRST..).take(PARTITIONS_MAX) {
        // Below 2^33, so that no product of it overflows.
        let Some(entries) = mbr_entries(&source.at(table * SECTOR_BYTES)?) else { break };
        let own =
            entries.iter().find(|(kind, _, count)| *count != 0 && !MBR_TYPES_EXTENDED.contains(kind) && *kind != 0);
        let Some((_, start, count)) = own else { break };
        found.push((number, sectors(table + start, *count)));
        let next = entries.iter().find(|(kind, ..)| MBR_TYPES_EXTENDED.contains(kind));
        let Some((_, start, _)) = next else { break };
        table = extended + start;
    }
    Ok(found)
}

/// The partitions of a GPT; `None` when the image has none.
fn gpt(source: &Source<'_>) -> Result<Option<Vec<Numbered>>> {
    let protective = mbr_entries(&source.at(0)?).unwrap_or_default();
    if !protective.iter().any(|(kind, ..)| *kind == MBR_TYPE_GPT) {
        return Ok(None);
    }
    for sector_bytes in [SECTOR_BYTES, LARGE_SECTOR_BYTES] {
        let header: [u8; 512] = source.at(sector_bytes)?;
        if array_at(&header, 0) == Some(*b"EFI PART")
            && let Some(layout) = gpt_layout(&header)
        {
            return gpt_entries(source, sector_bytes, layout).map(Some);
        }
    }
    Ok(None)
}

/// First sector, number and bytes of a GPT's entries.
fn gpt_layout(header: &[u8]) -> Option<(u64, usize, usize)> {
    let first = u64::from_le_bytes(array_at(header, 72)?);
    let count = usize::try_from(u32::from_le_bytes(array_at(header, 80)?)).ok()?;
    let bytes = usize::try_from(u32::from_le_bytes(array_at(header, 84)?)).ok()?;
    (GPT_ENTRY_BYTES_MIN..=GPT_ENTRY_BYTES_MAX).contains(&bytes).then_some((first, count, bytes))
}

fn gpt_entries(source: &Source<'_>, sector_bytes: u64, layout: (u64, usize, usize)) -> Result<Vec<Numbered>> {
    let (first, count, entry_bytes) = layout;
    let mut found = Vec::new();
    let Some(table) = first.checked_mul(sector_bytes) else { return Ok(found) };
    for (number, index) in (1..).zip(0..count.min(PARTITIONS_MAX) as u64) {
        let entry: [u8; GPT_ENTRY_BYTES_MIN] = source.at(table.saturating_add(index * entry_bytes as u64))?;
        let numbers = (array_at(&entry, 0), array_at(&entry, 32), array_at(&entry, 40));
        let (Some(kind), Some(start), Some(last)) = numbers else { break };
        if u128::from_le_bytes(kind) == 0 {
            continue;
        }
        let start = u64::from_le_bytes(start).saturating_mul(sector_bytes);
        let end = u64::from_le_bytes(last).saturating_add(1).saturating_mul(sector_bytes);
        found.push((number, start..end));
    }
    Ok(found)
}

/// What lies in a part of an image.
fn content_of(source: &Source<'_>, range: &Range<u64>) -> Result<Content> {
    const MARKS: [(u64, &[u8], Content); 12] = [
        (0, b"XFSB", Content::Xfs),
        (0, b"LUKS\xba\xbe", Content::Luks),
        (3, b"NTFS    ", Content::Ntfs),
        (54, b"FAT1", Content::Fat),
        (82, b"FAT32   ", Content::Fat),
        // LVM's label may stand in any of the first four sectors.
        (0, b"LABELONE", Content::Lvm),
        (512, b"LABELONE", Content::Lvm),
        (1024, b"LABELONE", Content::Lvm),
        (1536, b"LABELONE", Content::Lvm),
        (1024 + 56, b"\x53\xef", Content::Ext),
        (4096 - 10, b"SWAPSPACE2", Content::Swap),
        (0x1_0040, b"_BHRfS_M", Content::Btrfs),
    ];
    for (offset, mark, content) in MARKS {
        let here = range.start.saturating_add(offset);
        if here.saturating_add(mark.len() as u64) > range.end {
            continue;
        }
        let bytes: [u8; 16] = source.at(here)?;
        if bytes.starts_with(mark) {
            return Ok(content);
        }
    }
    Ok(Content::Unknown)
}

/// The `N` bytes of `bytes` at `offset`, if they are all there.
fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(image: &[u8]) -> Vec<Partition> {
        let read = |offset: u64, out: &mut [u8]| {
            let from = usize::try_from(offset).unwrap();
            out.copy_from_slice(&image[from..from + out.len()]);
            Ok(())
        };
        partitions(&Source { bytes: image.len() as u64, read: &read }).unwrap()
    }

    /// Numbers, first sectors and ends in sectors.
    fn places(image: &[u8]) -> Vec<(Option<u32>, u64, u64)> {
        found(image).into_iter().map(|p| (p.number, p.range.start / 512, p.range.end / 512)).collect()
    }

    fn put_table(image: &mut [u8], sector: usize, entries: &[(u8, u32, u32)]) {
        let table = &mut image[sector * 512..][..512];
        for (index, (kind, start, count)) in entries.iter().enumerate() {
            let entry = &mut table[446 + 16 * index..][..16];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..].copy_from_slice(&count.to_le_bytes());
        }
        table[510..].copy_from_slice(&[0x55, 0xaa]);
    }

    #[test]
    fn an_image_without_a_table_is_whole() {
        let whole = |content| vec![Partition { number: None, range: 0..1 << 20, content }];
        let mut image = vec![0; 1 << 20];
        assert_eq!(found(&image), whole(Content::Unknown));
        image[1080..1082].copy_from_slice(b"\x53\xef");
        assert_eq!(found(&image), whole(Content::Ext));
        // A boot sector of a filesystem has the signature of a table, too.
        let mut image = vec![0; 1 << 20];
        put_table(&mut image, 0, &[(0x07, 8, 8)]);
        image[3..11].copy_from_slice(b"NTFS    ");
        assert_eq!(found(&image), whole(Content::Ntfs));
        assert_eq!(found(&[]), [Partition { number: None, range: 0..0, content: Content::Unknown }]);
        assert_eq!(found(&[0; 100]).len(), 1);
    }

    #[test]
    fn primary_and_logical_partitions_have_the_numbers_that_linux_gives() {
        let mut image = vec![0; 1000 * 512];
        put_table(&mut image, 0, &[(0x83, 10, 20), (0, 0, 0), (0x05, 100, 800), (0x82, 40, 10_000)]);
        put_table(&mut image, 100, &[(0x83, 2, 50), (0x05, 200, 60)]);
        put_table(&mut image, 300, &[(0x83, 1, 40), (0x05, 300, 60)]);
        put_table(&mut image, 400, &[(0x83, 4, 6)]);
        let expected = [(1, 10, 30), (4, 40, 1000), (5, 102, 152), (6, 301, 341), (7, 404, 410)];
        assert_eq!(places(&image), expected.map(|(number, start, end)| (Some(number), start, end)));
        // A chain that leads in a circle has an end.
        put_table(&mut image, 400, &[(0x83, 4, 6), (0x05, 200, 60)]);
        assert!(places(&image).len() <= PARTITIONS_MAX);
    }

    #[test]
    fn a_gpt_counts_in_its_own_sectors() {
        for (sector, large) in [(512_usize, false), (4096, true)] {
            let mut image = vec![0; 4096 * 100];
            put_table(&mut image, 0, &[(0xee, 1, u32::MAX)]);
            image[sector..sector + 8].copy_from_slice(b"EFI PART");
            image[sector + 72..sector + 80].copy_from_slice(&2_u64.to_le_bytes());
            image[sector + 80..sector + 84].copy_from_slice(&128_u32.to_le_bytes());
            image[sector + 84..sector + 88].copy_from_slice(&128_u32.to_le_bytes());
            for (index, first, last) in [(0_usize, 40_u64, 49_u64), (2, 50, u64::MAX), (3, u64::MAX, 3)] {
                let entry = &mut image[2 * sector + 128 * index..][..128];
                entry[..16].fill(0xaf);
                entry[32..40].copy_from_slice(&first.to_le_bytes());
                entry[40..48].copy_from_slice(&last.to_le_bytes());
            }
            let unit = if large { 8 } else { 1 };
            assert_eq!(places(&image), [(Some(1), 40 * unit, 50 * unit), (Some(3), 50 * unit, 800)]);
        }
    }

    #[test]
    fn filesystems_are_known_by_their_marks() {
        for (offset, mark, content) in [
            (0, &b"XFSB"[..], Content::Xfs),
            (0, b"LUKS\xba\xbe", Content::Luks),
            (3, b"NTFS    ", Content::Ntfs),
            (54, b"FAT16   ", Content::Fat),
            (82, b"FAT32   ", Content::Fat),
            (512, b"LABELONE", Content::Lvm),
            (1080, b"\x53\xef", Content::Ext),
            (4086, b"SWAPSPACE2", Content::Swap),
            (65_600, b"_BHRfS_M", Content::Btrfs),
            (0, b"", Content::Unknown),
        ] {
            let mut image = vec![0; 400 * 512];
            put_table(&mut image, 0, &[(0x83, 16, 300)]);
            image[16 * 512 + offset..][..mark.len()].copy_from_slice(mark);
            let [partition] = found(&image).try_into().unwrap();
            assert_eq!((partition.number, partition.content), (Some(1), content), "{}", content.name());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_have_an_end(
            seed in proptest::collection::vec(any::<u8>(), 0..2048),
            kinds in proptest::collection::vec(prop_oneof![Just(0x83), Just(0x05), Just(0xee)], 4),
        ) {
            let mut image = seed;
            image.resize(image.len().max(512), 0);
            for (index, kind) in kinds.iter().enumerate() {
                image[446 + 16 * index] = 0;
                image[446 + 16 * index + 4] = *kind;
            }
            image[510..512].copy_from_slice(&[0x55, 0xaa]);
            let found = found(&image);
            prop_assert!(found.len() <= PARTITIONS_MAX);
            for partition in found {
                prop_assert!(partition.range.start <= partition.range.end);
                prop_assert!(partition.range.end <= image.len() as u64);
            }
        }
    }
}
