//! Where the guest's blocks begin: an image's first partition need not start at a multiple of 4 KiB, and then none of
//! its blocks does. Whoever cuts the image into blocks shifts the cuts by the phase found here.
//!
//! The bytes come from the guest and decide nothing but efficiency: what is not understood has phase 0.

use crate::limits::BLOCK_BYTES;

/// Bytes of a sector, the unit of both kinds of tables. Tables of 4096-byte sectors need no phase.
const SECTOR_BYTES: u64 = 512;

/// Sectors of a block: a start is at a block's begin if it is a multiple of this.
const BLOCK_SECTORS: u64 = BLOCK_BYTES as u64 / SECTOR_BYTES;

/// Where an MBR has its four entries of 16 bytes, and then its signature.
const MBR_ENTRIES_OFFSET: usize = 446;
const MBR_ENTRY_BYTES: usize = 16;
const MBR_SIGNATURE_OFFSET: usize = 510;

/// The type of the entry that stands for a whole GPT.
const MBR_TYPE_GPT: u8 = 0xee;

/// Sectors that a partition may reach past the image: one cylinder. Old tools rounded the last one up.
const EXCESS_SECTORS_MAX: u64 = 255 * 63;

/// Entries of a GPT, and bytes of one: 128 each on every real disk.
const GPT_ENTRIES_MAX: usize = 256;
const GPT_ENTRY_BYTES_MIN: usize = 128;
const GPT_ENTRY_BYTES_MAX: usize = 4096;

/// Bytes of an image's begin that [`grid_phase`] can make use of: the sectors up to a GPT's entries at their usual
/// place, and 128 entries.
pub const FIRST_BYTES: usize = 34 * SECTOR_BYTES as usize;

/// The bytes, modulo 4096, at which the first partition of an image begins.
///
/// `first_bytes` is the begin of the image, as much as there is; [`FIRST_BYTES`] are enough for every usual table.
/// `image_bytes` is its whole size, `u64::MAX` where that is not known. 0 if there is no partition table, or one that
/// makes no sense: a boot sector of a file system has an MBR's signature, too.
pub fn grid_phase(first_bytes: &[u8], image_bytes: u64) -> u32 {
    let start = first_partition(first_bytes, image_bytes.div_ceil(SECTOR_BYTES)).unwrap_or(0);
    // Below 4096, so that it always fits.
    u32::try_from(start % BLOCK_SECTORS * SECTOR_BYTES).unwrap_or(0)
}

/// The first sector of the first partition by either table.
fn first_partition(first_bytes: &[u8], image_sectors: u64) -> Option<u64> {
    if array_at(first_bytes, MBR_SIGNATURE_OFFSET)? != [0x55, 0xaa] {
        return None;
    }
    let table = first_bytes.get(MBR_ENTRIES_OFFSET..MBR_SIGNATURE_OFFSET)?;
    let (entries, _) = table.as_chunks::<MBR_ENTRY_BYTES>();

    let mut first = None;
    let mut has_gpt = false;
    for entry in entries {
        let [status, _, _, _, kind, _, _, _, s0, s1, s2, s3, l0, l1, l2, l3] = *entry;
        // Unused entries count here as well: this is what gives boot code away that stands where a table would.
        if !matches!(status, 0x00 | 0x80) {
            return None;
        }
        let start = u64::from(u32::from_le_bytes([s0, s1, s2, s3]));
        let sectors = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
        if kind == MBR_TYPE_GPT {
            has_gpt = true;
        } else if kind != 0 && sectors != 0 {
            if start == 0 || start + sectors > image_sectors.saturating_add(EXCESS_SECTORS_MAX) {
                return None;
            }
            first = smaller(first, start, image_sectors);
        }
    }
    if has_gpt { first_gpt_partition(first_bytes, image_sectors) } else { first }
}

/// The first sector of the first partition of a GPT, by as many of its entries as `first_bytes` holds.
fn first_gpt_partition(first_bytes: &[u8], image_sectors: u64) -> Option<u64> {
    let (_, header) = first_bytes.split_at_checked(usize::try_from(SECTOR_BYTES).ok()?)?;
    let own_sector = u64::from_le_bytes(array_at(header, 24)?);
    if array_at(header, 0)? != *b"EFI PART" || own_sector != 1 {
        return None;
    }
    let entries_sector = u64::from_le_bytes(array_at(header, 72)?);
    let count = usize::try_from(u32::from_le_bytes(array_at(header, 80)?)).ok()?;
    let entry_bytes = usize::try_from(u32::from_le_bytes(array_at(header, 84)?)).ok()?;
    if entries_sector < 2
        || count > GPT_ENTRIES_MAX
        || !(GPT_ENTRY_BYTES_MIN..=GPT_ENTRY_BYTES_MAX).contains(&entry_bytes)
    {
        return None;
    }

    let entries_offset = usize::try_from(entries_sector.checked_mul(SECTOR_BYTES)?).ok()?;
    let mut first = None;
    for entry in first_bytes.get(entries_offset..)?.chunks_exact(entry_bytes).take(count) {
        if array_at(entry, 0)? == [0; 16] {
            continue;
        }
        let start = u64::from_le_bytes(array_at(entry, 32)?);
        let last = u64::from_le_bytes(array_at(entry, 40)?);
        if start < 2 || last < start {
            return None;
        }
        first = smaller(first, start, image_sectors);
    }
    first
}

/// The smaller of `first` and `start`, if that begins within the image.
fn smaller(first: Option<u64>, start: u64, image_sectors: u64) -> Option<u64> {
    if start >= image_sectors {
        return first;
    }
    Some(first.map_or(start, |first| first.min(start)))
}

/// The `N` bytes of `bytes` at `offset`, if they are all there.
fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IMAGE_BYTES: u64 = 10 << 30;

    /// One entry of an MBR: status, type, first sector, sectors.
    type Entry = (u8, u8, u32, u32);

    fn mbr(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        for (index, (status, kind, start, sectors)) in entries.iter().enumerate() {
            let entry = &mut bytes[446 + 16 * index..][..16];
            entry[0] = *status;
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..].copy_from_slice(&sectors.to_le_bytes());
        }
        bytes[510..].copy_from_slice(&[0x55, 0xaa]);
        bytes
    }

    /// A GPT with its entries at `entries_sector`: (index, first sector, last sector).
    fn gpt(entries_sector: u64, count: u32, entry_bytes: u32, entries: &[(usize, u64, u64)]) -> Vec<u8> {
        let mut bytes = mbr(&[(0, 0xee, 1, u32::MAX)]);
        bytes.resize(512 * entries_sector as usize + count as usize * entry_bytes as usize, 0);
        bytes[512..520].copy_from_slice(b"EFI PART");
        bytes[536..544].copy_from_slice(&1_u64.to_le_bytes());
        bytes[584..592].copy_from_slice(&entries_sector.to_le_bytes());
        bytes[592..596].copy_from_slice(&count.to_le_bytes());
        bytes[596..600].copy_from_slice(&entry_bytes.to_le_bytes());
        for (index, first, last) in entries {
            let entry = &mut bytes[512 * entries_sector as usize + index * entry_bytes as usize..];
            entry[..16].fill(0xaf);
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn the_phase_is_that_of_the_first_mbr_partition() {
        for start in 1..100 {
            let expected = start * 512 % 4096;
            assert_eq!(grid_phase(&mbr(&[(0x80, 0x83, start, 2000)]), IMAGE_BYTES), expected);
            assert_eq!(grid_phase(&mbr(&[(0x80, 0x83, start, 2000)]), u64::MAX), expected);
        }
        // DOS and Windows XP begin at 63, later systems at 2048.
        assert_eq!(grid_phase(&mbr(&[(0x80, 0x07, 63, 1000)]), IMAGE_BYTES), 3584);
        assert_eq!(grid_phase(&mbr(&[(0x80, 0x07, 2048, 1000)]), IMAGE_BYTES), 0);
        // The smallest start, in whatever order; unused entries do not count.
        let entries = [(0, 0x83, 2048, 9), (0, 0, 1, 9), (0, 0x82, 63, 9), (0, 0x83, 2, 0)];
        assert_eq!(grid_phase(&mbr(&entries), IMAGE_BYTES), 3584);
        assert_eq!(grid_phase(&mbr(&[(0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (0, 5, 63, 9)]), IMAGE_BYTES), 3584);
    }

    #[test]
    fn what_is_no_table_has_no_phase() {
        assert_eq!(grid_phase(&[], 0), 0);
        assert_eq!(grid_phase(&[0; 4096], IMAGE_BYTES), 0);
        assert_eq!(grid_phase(&mbr(&[]), IMAGE_BYTES), 0);
        let good = (0x80, 0x83, 63, 1000);
        assert_eq!(grid_phase(&mbr(&[good]), IMAGE_BYTES), 3584);
        let sectors = (IMAGE_BYTES / 512) as u32;
        for bad in [(0x01, 0x83, 100, 9), (0xff, 0, 0, 0), (0, 0x83, 0, 9), (0, 0x83, 100, sectors + 20_000)] {
            assert_eq!(grid_phase(&mbr(&[good, bad]), IMAGE_BYTES), 0, "{bad:?}");
            assert_eq!(grid_phase(&mbr(&[bad, good]), IMAGE_BYTES), 0, "{bad:?}");
        }
        let mut unsigned = mbr(&[good]);
        unsigned[511] = 0;
        assert_eq!(grid_phase(&unsigned, IMAGE_BYTES), 0);
        // A FAT boot sector: a jump, a name, and text of the boot code where a table would be.
        let mut boot = mbr(&[]);
        boot[..11].copy_from_slice(b"\xeb\x3c\x90mkfs.fat");
        boot[446..510].fill(b'x');
        assert_eq!(grid_phase(&boot, IMAGE_BYTES), 0);
    }

    #[test]
    fn a_partition_may_reach_a_little_past_the_image() {
        let image_bytes = 1_000_000 * 512;
        assert_eq!(grid_phase(&mbr(&[(0, 0x83, 63, 1_000_000)]), image_bytes), 3584);
        let most = 1_000_000 + 255 * 63 - 63;
        assert_eq!(grid_phase(&mbr(&[(0, 0x83, 63, most)]), image_bytes), 3584);
        assert_eq!(grid_phase(&mbr(&[(0, 0x83, 63, most + 1)]), image_bytes), 0);
        // One that begins past the end is not the first, even if it is the only one.
        assert_eq!(grid_phase(&mbr(&[(0, 0x83, 1_000_001, 9)]), image_bytes), 0);
        assert_eq!(grid_phase(&mbr(&[(0, 0x83, 999_999, 1)]), image_bytes), 999_999 % 8 * 512);
        assert_eq!(grid_phase(&mbr(&[(0, 0x83, u32::MAX, u32::MAX)]), image_bytes), 0);
    }

    #[test]
    fn the_phase_is_that_of_the_first_gpt_partition() {
        let entries = [(0, 2048, 4095), (3, 34, 2047), (5, 40, 50)];
        for (entry_bytes, sector) in [(128, 2), (256, 2), (4096, 2), (128, 3), (200, 9)] {
            let bytes = gpt(sector, 128, entry_bytes, &entries);
            assert_eq!(grid_phase(&bytes, IMAGE_BYTES), 34 % 8 * 512, "{entry_bytes} at {sector}");
        }
        assert_eq!(grid_phase(&gpt(2, 128, 128, &[(127, 35, 99)]), IMAGE_BYTES), 3 * 512);
        assert_eq!(gpt(2, 128, 128, &[]).len(), FIRST_BYTES);
        // Only the entries that the header counts, and only those that begin within the image.
        let mut counted = gpt(2, 128, 128, &[(0, 2049, 4095), (3, 34, 2047)]);
        counted[592] = 3;
        assert_eq!(grid_phase(&counted, IMAGE_BYTES), 512);
        assert_eq!(grid_phase(&gpt(2, 128, 128, &[(0, 2049, 4095)]), 2049 * 512), 0);
        // A protective entry need not be the first of the MBR, and the others do not count then.
        let mut hybrid = gpt(2, 128, 128, &[(0, 34, 99)]);
        hybrid[..512].copy_from_slice(&mbr(&[(0x80, 0x0c, 63, 9), (0, 0xee, 1, 62)]));
        assert_eq!(grid_phase(&hybrid, IMAGE_BYTES), 1024);
    }

    #[test]
    fn a_malformed_gpt_has_no_phase() {
        let good = gpt(2, 128, 128, &[(0, 35, 99)]);
        assert_eq!(grid_phase(&good, IMAGE_BYTES), 3 * 512);
        let damaged = |offset: usize, value: &[u8]| {
            let mut bytes = good.clone();
            bytes[offset..offset + value.len()].copy_from_slice(value);
            grid_phase(&bytes, IMAGE_BYTES)
        };
        assert_eq!(damaged(512, b"efi part"), 0);
        assert_eq!(damaged(536, &2_u64.to_le_bytes()), 0, "the header of another sector");
        for sector in [0, 1, 1 << 20, u64::MAX / 512, u64::MAX] {
            assert_eq!(damaged(584, &sector.to_le_bytes()), 0, "entries at {sector}");
        }
        for count in [0, 257, u32::MAX] {
            assert_eq!(damaged(592, &count.to_le_bytes()), 0, "{count} entries");
        }
        for size in [0, 1, 127, 4097, u32::MAX] {
            assert_eq!(damaged(596, &size.to_le_bytes()), 0, "{size} bytes");
        }
        assert_eq!(damaged(1024 + 32, &0_u64.to_le_bytes()), 0, "a partition over the MBR");
        assert_eq!(damaged(1024 + 32, &100_u64.to_le_bytes()), 0, "the last sector before the first");
        // A GPT of 4096-byte sectors has its header in the ninth sector of 512.
        let mut wide = mbr(&[(0, 0xee, 1, u32::MAX)]);
        wide.resize(1 << 16, 0);
        wide[4096..4608].copy_from_slice(&good[512..1024]);
        wide[8192..8704].copy_from_slice(&good[1024..1536]);
        assert_eq!(grid_phase(&wide, IMAGE_BYTES), 0);
    }

    #[test]
    fn every_truncation_is_answered() {
        let plain = mbr(&[(0x80, 0x83, 63, 1000)]);
        for len in 0..=plain.len() {
            let expected = if len == plain.len() { 3584 } else { 0 };
            assert_eq!(grid_phase(&plain[..len], IMAGE_BYTES), expected, "{len} bytes");
        }
        let table = gpt(2, 128, 128, &[(0, 34, 99), (2, 33, 33)]);
        for len in 0..=table.len() {
            let expected = match len {
                ..1152 => 0,
                1152..1408 => 1024,
                1408.. => 512,
            };
            assert_eq!(grid_phase(&table[..len], IMAGE_BYTES), expected, "{len} bytes");
        }
    }

    #[test]
    fn random_bytes_are_answered() {
        let mut bytes = vec![0; 100 << 10];
        blake3::Hasher::new().update(b"seed 1").finalize_xof().fill(&mut bytes);
        for window in bytes.windows(2048).step_by(7) {
            let mut window = window.to_vec();
            assert_eq!(grid_phase(&window, IMAGE_BYTES) % 512, 0);
            window[510..512].copy_from_slice(&[0x55, 0xaa]);
            for entry in 0..4 {
                window[446 + 16 * entry] = 0x80;
            }
            window[450] = 0xee;
            window[512..520].copy_from_slice(b"EFI PART");
            window[536..544].copy_from_slice(&1_u64.to_le_bytes());
            assert!(grid_phase(&window, u64::MAX) < 4096);
        }
    }

    proptest! {
        #[test]
        fn any_entries_are_answered(
            entries in prop::collection::vec((any::<bool>(), any::<u8>(), any::<u32>(), any::<u32>()), 4),
            image_bytes: u64,
        ) {
            let entries: Vec<Entry> = entries.into_iter().map(|(a, k, s, l)| (u8::from(a) << 7, k, s, l)).collect();
            let phase = grid_phase(&mbr(&entries), image_bytes);
            prop_assert!(phase < 4096 && phase.is_multiple_of(512));
        }

        #[test]
        fn any_gpt_header_is_answered(
            fields in prop::collection::vec(any::<u8>(), 28),
            mild in any::<bool>(),
            entry in prop::collection::vec(any::<u8>(), 48),
            image_bytes: u64,
        ) {
            let mut bytes = gpt(2, 128, 128, &[]);
            if !mild {
                bytes[584..584 + 28].copy_from_slice(&fields);
            }
            bytes[1024..1024 + 48].copy_from_slice(&entry);
            let phase = grid_phase(&bytes, image_bytes);
            prop_assert!(phase < 4096 && phase.is_multiple_of(512));
        }

        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..1500), image_bytes: u64) {
            prop_assert!(grid_phase(&bytes, image_bytes) < 4096);
        }
    }
}
