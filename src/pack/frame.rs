//! Frames: runs of slots compressed together, each with its checksum in the index.

use crate::error::{Result, corrupt};
use crate::fingerprint::short;
use crate::limits::{BLOCK_BYTES, FRAME_SLOTS_MAX, PACK_SLOTS_MAX, RECIPE_FRAME_BYTES_MAX, RECIPE_SLOT_BYTES_MAX};
use crate::pack::Content;
use crate::units::{Incarnation, PackNumber};
use crate::wire::{Reader, Wire, wire_struct};

/// The frame's bytes are as they are.
pub const CODEC_RAW: u8 = 1;
/// The frame's bytes are one zstd frame.
pub const CODEC_ZSTD: u8 = 2;

wire_struct! {
    /// One row of a pack's frame index. Its offset is the sum of the lengths before it.
    #[derive(Copy)]
    pub struct FrameRow {
        /// First slot that it spans.
        pub first_slot: u16,
        /// Slots that it spans, less one.
        pub span_less_one: u8,
        /// How it is stored.
        pub codec: u8,
        /// Bytes in the object.
        pub stored_bytes: u32,
        /// Bytes when decompressed.
        pub raw_bytes: u32,
        /// Which of the spanned slots are present, the first in the lowest bit.
        pub present: u64,
        /// Checksum over identity, place and stored bytes.
        pub checksum: Checksum,
    }
}

/// Bytes of a row.
pub const FRAME_ROW_BYTES: usize = 36;

/// Bytes that stand before the payload of a recipe frame: what its row says, so that a reader who has the place
/// from a reference needs no index.
pub const RECIPE_PREFIX_BYTES: usize = 16;

/// Bytes before the payload of a frame.
pub fn prefix_bytes(content: Content) -> usize {
    match content {
        Content::Data => 0,
        Content::Recipes => RECIPE_PREFIX_BYTES,
    }
}

/// A 16-byte checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum(pub [u8; 16]);

impl Wire for Checksum {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        Ok(Self(reader.array()?))
    }
}

impl FrameRow {
    /// Slots that it spans.
    pub fn span(&self) -> u32 {
        u32::from(self.span_less_one) + 1
    }

    /// Slots present.
    pub fn count(&self) -> u32 {
        self.present.count_ones()
    }

    /// Place of a slot among the present ones; `None` when it is not present.
    pub fn rank(&self, slot: u16) -> Option<usize> {
        let bit = u32::from(slot).checked_sub(u32::from(self.first_slot)).filter(|b| *b < self.span())?;
        let mask = 1u64 << bit;
        (self.present & mask != 0).then(|| (self.present & (mask - 1)).count_ones() as usize)
    }

    /// The present slots in order.
    pub fn slots(&self) -> impl Iterator<Item = u16> + '_ {
        (0..self.span()).filter(|b| self.present & (1 << b) != 0).map(|b| self.first_slot + b as u16)
    }

    /// Checks what can be checked without the bytes.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn check(&self, content: Content) -> Result<()> {
        let span = self.span();
        let beyond = if span < 64 { self.present >> span } else { 0 };
        let fits = span <= FRAME_SLOTS_MAX
            && u32::from(self.first_slot) + span <= PACK_SLOTS_MAX
            && self.present != 0
            && beyond == 0
            && matches!(self.codec, CODEC_RAW | CODEC_ZSTD)
            && (self.codec != CODEC_RAW
                || self.stored_bytes as usize == self.raw_bytes as usize + prefix_bytes(content))
            && self.stored_bytes as usize > prefix_bytes(content);
        let sized = match content {
            Content::Data => self.raw_bytes as usize == self.count() as usize * BLOCK_BYTES,
            Content::Recipes => self.raw_bytes as usize <= RECIPE_FRAME_BYTES_MAX,
        };
        if fits && sized {
            Ok(())
        } else {
            Err(corrupt(format!("pack: frame row of slot {} is out of bounds", self.first_slot)))
        }
    }

    /// The checksum that belongs to these stored bytes at this place.
    pub fn checksum_of(&self, incarnation: Incarnation, number: PackNumber, stored: &[u8]) -> Checksum {
        let mut place = Vec::with_capacity(44);
        place.extend_from_slice(&incarnation.0);
        number.put(&mut place);
        self.first_slot.put(&mut place);
        self.span_less_one.put(&mut place);
        self.codec.put(&mut place);
        self.raw_bytes.put(&mut place);
        self.present.put(&mut place);
        Checksum(short(b"snapfs frame", &[&place, stored]))
    }

    /// Checks and decompresses stored bytes.
    ///
    /// # Errors
    /// `Corrupt` when the checksum or the decompressed length is not right.
    pub fn open(
        &self,
        content: Content,
        incarnation: Incarnation,
        number: PackNumber,
        stored: &[u8],
    ) -> Result<Vec<u8>> {
        if self.checksum_of(incarnation, number, stored) != self.checksum {
            return Err(corrupt(format!("frame of slot {}: checksum does not match", self.first_slot)));
        }
        let payload = match content {
            Content::Data => stored,
            Content::Recipes => {
                let (told, payload) = Self::split_prefix(stored)?;
                if told.prefix() != self.prefix() {
                    return Err(corrupt(format!("frame of slot {}: prefix differs from its row", self.first_slot)));
                }
                payload
            }
        };
        decompress(self.codec, payload, self.raw_bytes as usize)
            .map_err(|e| e.within(format!("frame of slot {}", self.first_slot)))
    }

    /// What stands before the payload of a recipe frame.
    pub fn prefix(&self) -> [u8; RECIPE_PREFIX_BYTES] {
        let mut bytes = Vec::with_capacity(RECIPE_PREFIX_BYTES);
        self.first_slot.put(&mut bytes);
        self.span_less_one.put(&mut bytes);
        self.codec.put(&mut bytes);
        self.raw_bytes.put(&mut bytes);
        self.present.put(&mut bytes);
        let mut out = [0; RECIPE_PREFIX_BYTES];
        out.copy_from_slice(&bytes);
        out
    }

    /// The row that the prefix of a recipe frame tells (without its checksum), and the payload.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn split_prefix(stored: &[u8]) -> Result<(Self, &[u8])> {
        let mut reader = Reader::new(stored);
        let row = Self {
            first_slot: Wire::take(&mut reader)?,
            span_less_one: Wire::take(&mut reader)?,
            codec: Wire::take(&mut reader)?,
            raw_bytes: Wire::take(&mut reader)?,
            present: Wire::take(&mut reader)?,
            stored_bytes: u32::try_from(stored.len()).unwrap_or(u32::MAX),
            checksum: Checksum([0; 16]),
        };
        row.check(Content::Recipes)?;
        Ok((row, reader.bytes(reader.remaining())?))
    }
}

/// Compresses at `level`; what does not shrink by a thirty-second is kept as it is, which reads faster.
pub fn compress(raw: &[u8], level: i32) -> (u8, Vec<u8>) {
    thread_local! {
        // A context is a few hundred KiB and costly to set up; each thread keeps one.
        static CONTEXT: std::cell::RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> =
            const { std::cell::RefCell::new(None) };
    }
    let packed = CONTEXT.with_borrow_mut(|context| {
        if context.as_ref().is_none_or(|(l, _)| *l != level) {
            *context = zstd::bulk::Compressor::new(level).ok().map(|c| (level, c));
        }
        context.as_mut().and_then(|(_, c)| c.compress(raw).ok())
    });
    match packed {
        Some(packed) if packed.len() + raw.len() / 32 < raw.len() => (CODEC_ZSTD, packed),
        _ => (CODEC_RAW, raw.to_vec()),
    }
}

/// Undoes [`compress`]; never sets aside more than `raw_bytes`.
///
/// # Errors
/// `Corrupt`.
pub fn decompress(codec: u8, stored: &[u8], raw_bytes: usize) -> Result<Vec<u8>> {
    thread_local! {
        static CONTEXT: std::cell::RefCell<Option<zstd::bulk::Decompressor<'static>>> =
            const { std::cell::RefCell::new(None) };
    }
    let raw = match codec {
        CODEC_RAW => stored.to_vec(),
        CODEC_ZSTD => CONTEXT.with_borrow_mut(|context| {
            if context.is_none() {
                *context = zstd::bulk::Decompressor::new().ok();
            }
            let decompressor = context.as_mut().ok_or_else(|| corrupt("no zstd context"))?;
            decompressor.decompress(stored, raw_bytes).map_err(|e| corrupt("does not decompress").because(e))
        })?,
        other => return Err(corrupt(format!("unknown codec, value={other}"))),
    };
    if raw.len() == raw_bytes {
        Ok(raw)
    } else {
        Err(corrupt(format!("decompressed to {} bytes, wanted {raw_bytes}", raw.len())))
    }
}

/// The raw bytes of a frame of a recipe pack: the length of each slot, then their bytes.
pub fn join_slots(slots: &[Vec<u8>]) -> Vec<u8> {
    let mut raw = Vec::new();
    for slot in slots {
        (slot.len() as u32).put(&mut raw);
    }
    for slot in slots {
        raw.extend_from_slice(slot);
    }
    raw
}

/// The range of the `rank`-th of `count` slots in the raw bytes of a frame.
///
/// # Errors
/// `Corrupt`.
pub fn slot_range(content: Content, raw: &[u8], rank: usize, count: usize) -> Result<std::ops::Range<usize>> {
    match content {
        Content::Data => {
            let start = rank * BLOCK_BYTES;
            if rank < count && start + BLOCK_BYTES <= raw.len() {
                Ok(start..start + BLOCK_BYTES)
            } else {
                Err(corrupt("frame is shorter than its slots"))
            }
        }
        Content::Recipes => {
            let mut reader = Reader::new(raw);
            let mut start = count * 4;
            let mut range = None;
            for at in 0..count {
                let length = u32::take(&mut reader)? as usize;
                if length > RECIPE_SLOT_BYTES_MAX || start + length > raw.len() {
                    return Err(corrupt("slot reaches over the end of its frame"));
                }
                if at == rank {
                    range = Some(start..start + length);
                }
                start += length;
            }
            match range {
                Some(range) if start == raw.len() => Ok(range),
                _ => Err(corrupt("frame does not end with its last slot")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_a_recipe_frame_are_found_and_bounds_hold() {
        let slots = vec![b"one".to_vec(), Vec::new(), b"three".to_vec()];
        let raw = join_slots(&slots);
        for (rank, slot) in slots.iter().enumerate() {
            assert_eq!(&raw[slot_range(Content::Recipes, &raw, rank, 3).unwrap()], &slot[..]);
        }
        assert!(slot_range(Content::Recipes, &raw, 3, 3).is_err());
        assert!(slot_range(Content::Recipes, &raw[..raw.len() - 1], 0, 3).is_err());
        assert!(slot_range(Content::Recipes, &raw, 0, 2).is_err());
    }

    #[test]
    fn text_shrinks_and_noise_stays() {
        let text = b"the same words again and again ".repeat(200);
        let (codec, stored) = compress(&text, 1);
        assert_eq!(codec, CODEC_ZSTD);
        assert_eq!(decompress(codec, &stored, text.len()).unwrap(), text);
        assert!(decompress(codec, &stored, text.len() - 1).is_err());
        assert!(decompress(codec, &stored, text.len() + 1).is_err());
        let mut noise = Vec::new();
        blake3::Hasher::new().finalize_xof().fill({
            noise.resize(5000, 0);
            &mut noise
        });
        assert_eq!(compress(&noise, 1), (CODEC_RAW, noise.clone()));
    }

    #[test]
    fn ranks_follow_the_mask() {
        let row = FrameRow {
            first_slot: 10,
            span_less_one: 3,
            codec: CODEC_RAW,
            stored_bytes: 8192,
            raw_bytes: 8192,
            present: 0b1010,
            checksum: Checksum([0; 16]),
        };
        row.check(Content::Data).unwrap();
        assert_eq!(
            (row.rank(10), row.rank(11), row.rank(12), row.rank(13), row.rank(14)),
            (None, Some(0), None, Some(1), None)
        );
        assert_eq!(row.slots().collect::<Vec<_>>(), [11, 13]);
        let bytes = crate::wire::encode(&row);
        assert_eq!(bytes.len(), FRAME_ROW_BYTES);
    }
}
