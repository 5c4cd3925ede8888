//! What travels: rows of a fingerprint, who holds its block, and where.

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::fingerprint::Fingerprint;

/// Bytes of a row: fingerprint, member, place. Big-endian, so that rows sort as their bytes do.
pub const ROW_BYTES: usize = 32 + 4 + 8;

/// A row as it is sent, spilled and sorted.
pub type Row = [u8; ROW_BYTES];

/// In a batch: set in a place that is a position in an image, whose block is not stored yet; clear in a slot. Slots of
/// common packs, which have it themselves, are given without it there. An election wants nothing: its places are slots
/// as they are, and those of common packs come second for that.
pub const WANTED: u64 = 1 << 63;

/// The holder of blocks, numbered within a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member(pub u32);

/// A member holds, or wants, the block of a fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    /// Of the block.
    pub print: Fingerprint,
    /// Who.
    pub member: Member,
    /// A slot, or a position with [`WANTED`].
    pub place: u64,
}

impl Record {
    /// The row.
    pub fn to_row(self) -> Row {
        let mut row = [0; ROW_BYTES];
        let (print, rest) = row.split_at_mut(32);
        print.copy_from_slice(&self.print.0);
        let (member, place) = rest.split_at_mut(4);
        member.copy_from_slice(&self.member.0.to_be_bytes());
        place.copy_from_slice(&self.place.to_be_bytes());
        row
    }

    /// The record of a row.
    pub fn from_row(row: &Row) -> Self {
        let part = |from: usize| row.get(from..).unwrap_or_default();
        Self {
            print: Fingerprint(part(0).first_chunk().copied().unwrap_or_default()),
            member: Member(part(32).first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))),
            place: part(36).first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes)),
        }
    }
}

/// The partition of a row, of so many: by the head of its fingerprint, so that partitions are ranges.
pub fn partition_of(row: &[u8], partitions: u32) -> u32 {
    let head = row.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
    ((u64::from(head) * u64::from(partitions)) >> 32) as u32
}

/// Rows on their way from one worker to another.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Chunk {
    /// The worker that sent it.
    pub from: u32,
    /// The worker that it is for.
    pub to: u32,
    /// The rows.
    #[serde(serialize_with = "put_bytes", deserialize_with = "take_bytes")]
    pub bytes: Vec<u8>,
}

fn put_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

fn take_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    struct Bytes;
    impl<'de> Visitor<'de> for Bytes {
        type Value = Vec<u8>;
        fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            out.write_str("bytes")
        }
        fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(bytes)
        }
        fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Vec<u8>, A::Error> {
            Err(A::Error::custom("a list, not bytes"))
        }
    }
    deserializer.deserialize_byte_buf(Bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_sort_as_records_do() {
        let record =
            |print: u8, member, place| Record { print: Fingerprint([print; 32]), member: Member(member), place };
        let mut records =
            vec![record(2, 1, 1), record(1, 300, 2), record(1, 2, WANTED), record(1, 2, 255), record(1, 2, 256)];
        let mut rows: Vec<Row> = records.iter().map(|record| record.to_row()).collect();
        records.sort_unstable();
        rows.sort_unstable();
        assert_eq!(rows.iter().map(Record::from_row).collect::<Vec<_>>(), records);
        assert_eq!(records.last(), Some(&record(2, 1, 1)));
    }

    #[test]
    fn partitions_are_ranges_of_fingerprints() {
        for partitions in [1, 2, 3, 7, 1000] {
            assert_eq!(partition_of(&[0; 32], partitions), 0);
            assert_eq!(partition_of(&[0xff; 32], partitions), partitions - 1);
        }
        assert_eq!((partition_of(&[0x7f; 32], 2), partition_of(&[0x80; 32], 2)), (0, 1));
    }
}
