//! The end of a pack: what is in it and where. Header and trailer carry the pack's identity, the index its frames.

use crate::error::{Result, corrupt};
use crate::fingerprint::{Fingerprint, short};
use crate::format::{ObjectKind, check_preamble, preamble};
use crate::limits::{FRAME_SLOTS_MAX, PACK_MEMBERS_MAX, PACK_SLOTS_MAX, SLOT_PAGE_FINGERPRINTS};
use crate::pack::Content;
use crate::pack::frame::{Checksum, FRAME_ROW_BYTES, FrameRow};
use crate::units::{Generation, Incarnation, ObjectId, PackNumber};
use crate::wire::{Reader, Wire, wire_struct};

/// Bytes of a pack's header.
pub const HEADER_BYTES: usize = 61;

/// Bytes of a pack's trailer.
pub const TRAILER_BYTES: usize = HEADER_BYTES + 8 + 8 + 4 + 16 + 16;

/// Bytes of a fingerprint in the slot table.
const FINGERPRINT_BYTES: usize = 32;

const _: () = assert!(HEADER_BYTES == 16 + 16 + 8 + 4 + 1 + 16, "docs/FORMAT.md: the header of a pack");
const _: () = assert!(TRAILER_BYTES == 113, "docs/FORMAT.md: the trailer of a pack");

/// Who a pack object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The VM's incarnation.
    pub incarnation: Incarnation,
    /// Number of the first member, and generation.
    pub object: ObjectId,
    /// What the slots hold.
    pub content: Content,
}

impl Identity {
    /// The header: preamble, identity, checksum.
    pub fn header(&self) -> Vec<u8> {
        let mut out = preamble(ObjectKind::Pack).to_vec();
        out.extend_from_slice(&self.incarnation.0);
        self.object.put(&mut out);
        self.content.put(&mut out);
        let checksum = short(b"snapfs pack header", &[&out]);
        out.extend_from_slice(&checksum);
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`.
    pub fn from_header(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let told = reader.bytes(HEADER_BYTES - 16)?;
        if reader.array::<16>()? != short(b"snapfs pack header", &[told]) {
            return Err(corrupt("pack header: checksum does not match"));
        }
        reader.end()?;
        let mut reader = Reader::new(told);
        check_preamble(&reader.array()?, ObjectKind::Pack)?;
        Ok(Self {
            incarnation: Wire::take(&mut reader)?,
            object: Wire::take(&mut reader)?,
            content: Wire::take(&mut reader)?,
        })
    }
}

wire_struct! {
    /// One pack number within an object.
    #[derive(Copy)]
    pub struct MemberRow {
        /// The pack.
        pub number: PackNumber,
        /// Its frames.
        pub frames: u32,
        /// Its present slots.
        pub slots: u32,
    }
}

/// One pack within an object, as a reader needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The pack.
    pub number: PackNumber,
    /// Its frames in slot order.
    pub frames: Vec<FrameRow>,
    /// Offset in the object of every frame.
    pub offsets: Vec<u64>,
    /// Present slots before every frame: the slot's place in the slot table.
    pub ordinals: Vec<u32>,
    /// Offset in the object of its part of the slot table.
    pub table_offset: u64,
    /// Present slots.
    pub slots: u32,
    /// One checksum per page of the slot table.
    pub page_checksums: Vec<Checksum>,
}

impl Member {
    /// The frame that has this slot; `None` when the slot is not present.
    pub fn frame_of(&self, slot: u16) -> Option<usize> {
        let after = self.frames.partition_point(|f| f.first_slot <= slot);
        let at = after.checked_sub(1)?;
        self.frames.get(at)?.rank(slot)?;
        Some(at)
    }

    /// The place of a slot in the slot table.
    pub fn ordinal_of(&self, slot: u16) -> Option<u32> {
        let at = self.frame_of(slot)?;
        let rank = self.frames.get(at)?.rank(slot)?;
        Some(self.ordinals.get(at)? + rank as u32)
    }

    /// The present slots in order.
    pub fn present(&self) -> impl Iterator<Item = u16> + '_ {
        self.frames.iter().flat_map(FrameRow::slots)
    }

    /// The slots whose fingerprints stand on a page of the slot table.
    pub fn slots_of_page(&self, page: u32) -> Vec<u16> {
        let first = page as usize * SLOT_PAGE_FINGERPRINTS;
        let frame = self.ordinals.partition_point(|o| *o as usize <= first).saturating_sub(1);
        let skip = first - self.ordinals.get(frame).map_or(first, |o| *o as usize);
        let frames = self.frames.get(frame..).unwrap_or_default();
        frames.iter().flat_map(FrameRow::slots).skip(skip).take(SLOT_PAGE_FINGERPRINTS).collect()
    }

    /// Offset in the object and bytes of a page of the slot table.
    pub fn page_range(&self, page: u32) -> (u64, usize) {
        let first = page as usize * SLOT_PAGE_FINGERPRINTS;
        let count = (self.slots as usize).saturating_sub(first).min(SLOT_PAGE_FINGERPRINTS);
        (self.table_offset + (first * FINGERPRINT_BYTES) as u64, count * FINGERPRINT_BYTES)
    }

    /// Bytes of its part of the slot table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.slots) * FINGERPRINT_BYTES as u64
    }
}

/// The checksum of a page of a slot table.
pub fn page_checksum(incarnation: Incarnation, number: PackNumber, page: u32, bytes: &[u8]) -> Checksum {
    let mut place = incarnation.0.to_vec();
    number.put(&mut place);
    page.put(&mut place);
    Checksum(short(b"snapfs slots", &[&place, bytes]))
}

/// Cuts the bytes of a slot table (or of a page of it) into fingerprints.
pub fn fingerprints(bytes: &[u8]) -> Vec<Fingerprint> {
    bytes.as_chunks::<FINGERPRINT_BYTES>().0.iter().map(|f| Fingerprint(*f)).collect()
}

/// All of a pack that a reader needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackIndex {
    /// Who it is.
    pub identity: Identity,
    /// The packs in it, by number.
    pub members: Vec<Member>,
    /// Bytes of all frames.
    pub frames_bytes: u64,
    /// Bytes of the index and the trailer.
    pub tail_bytes: u32,
}

impl PackIndex {
    /// The member of this number.
    ///
    /// # Errors
    /// `Corrupt` when the object does not hold it.
    pub fn member(&self, number: PackNumber) -> Result<&Member> {
        let at = self.members.binary_search_by_key(&number, |m| m.number);
        at.ok()
            .and_then(|at| self.members.get(at))
            .ok_or_else(|| corrupt(format!("pack {}: has no member {number}", self.identity.object)))
    }

    /// Bytes that it takes in memory, about.
    pub fn memory_bytes(&self) -> usize {
        let per_member = |m: &Member| 160 + m.frames.len() * 52 + m.page_checksums.len() * 16;
        self.members.iter().map(per_member).sum::<usize>() + 128
    }

    /// Bytes of the whole object.
    pub fn object_bytes(&self) -> u64 {
        let table: u64 = self.members.iter().map(Member::table_bytes).sum();
        HEADER_BYTES as u64 + self.frames_bytes + table + u64::from(self.tail_bytes)
    }

    /// Index and trailer of an object; `members` in the order of their frames, which is that of their numbers.
    pub fn encode_tail(identity: &Identity, members: &[(PackNumber, Vec<FrameRow>, Vec<Checksum>)]) -> Vec<u8> {
        let mut index = Vec::new();
        let slots = |frames: &[FrameRow]| frames.iter().map(FrameRow::count).sum::<u32>();
        (members.len() as u32).put(&mut index);
        for (number, frames, _) in members {
            MemberRow { number: *number, frames: frames.len() as u32, slots: slots(frames) }.put(&mut index);
        }
        for frame in members.iter().flat_map(|(_, frames, _)| frames) {
            frame.put(&mut index);
        }
        for checksum in members.iter().flat_map(|(_, _, checksums)| checksums) {
            checksum.put(&mut index);
        }
        let frames_bytes: u64 = members.iter().flat_map(|(_, f, _)| f).map(|f| u64::from(f.stored_bytes)).sum();
        let table_bytes: u64 = members.iter().map(|(_, f, _)| u64::from(slots(f)) * FINGERPRINT_BYTES as u64).sum();
        let mut trailer = identity.header();
        frames_bytes.put(&mut trailer);
        table_bytes.put(&mut trailer);
        (index.len() as u32).put(&mut trailer);
        trailer.extend_from_slice(&short(b"snapfs pack index", &[&index]));
        let checksum = short(b"snapfs pack trailer", &[&trailer]);
        trailer.extend_from_slice(&checksum);
        index.extend_from_slice(&trailer);
        index
    }

    /// How many bytes at the end of an object make its tail, from its last [`TRAILER_BYTES`].
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`.
    pub fn tail_bytes_from_trailer(trailer: &[u8]) -> Result<u32> {
        let (_, _, _, index_bytes, _) = read_trailer(trailer)?;
        index_bytes.checked_add(TRAILER_BYTES as u32).ok_or_else(|| corrupt("pack trailer: index over 4 GiB"))
    }

    /// Reads index and trailer of an object of `object_bytes`.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`.
    pub fn decode_tail(tail: &[u8], object_bytes: u64) -> Result<Self> {
        let split = tail.len().checked_sub(TRAILER_BYTES).ok_or_else(|| corrupt("pack ends in its trailer"))?;
        let (index, trailer) = tail.split_at(split);
        let (identity, frames_bytes, table_bytes, index_bytes, checksum) = read_trailer(trailer)?;
        let whole = (HEADER_BYTES as u64)
            .checked_add(frames_bytes)
            .and_then(|sum| sum.checked_add(table_bytes))
            .and_then(|sum| sum.checked_add(tail.len() as u64));
        if index_bytes as usize != index.len() || whole != Some(object_bytes) {
            return Err(corrupt(format!("pack: its parts do not add up to its {object_bytes} bytes")));
        }
        if short(b"snapfs pack index", &[index]) != checksum {
            return Err(corrupt("pack index: checksum does not match"));
        }
        let members = read_members(index, &identity, frames_bytes, table_bytes)?;
        Ok(Self { identity, members, frames_bytes, tail_bytes: tail.len() as u32 })
    }
}

fn read_trailer(trailer: &[u8]) -> Result<(Identity, u64, u64, u32, [u8; 16])> {
    let mut reader = Reader::new(trailer);
    let told = reader.bytes(TRAILER_BYTES - 16)?;
    if reader.array::<16>()? != short(b"snapfs pack trailer", &[told]) {
        return Err(corrupt("pack trailer: checksum does not match"));
    }
    reader.end()?;
    let mut reader = Reader::new(told);
    let identity = Identity::from_header(reader.bytes(HEADER_BYTES)?)?;
    Ok((identity, u64::take(&mut reader)?, u64::take(&mut reader)?, u32::take(&mut reader)?, reader.array()?))
}

fn read_members(index: &[u8], identity: &Identity, frames_bytes: u64, table_bytes: u64) -> Result<Vec<Member>> {
    let mut reader = Reader::new(index);
    let rows = Vec::<MemberRow>::take(&mut reader)?;
    let ordered = rows.windows(2).all(|r| matches!(r, [a, b] if a.number < b.number));
    if rows.is_empty() || rows.len() > PACK_MEMBERS_MAX || !ordered {
        return Err(corrupt(format!("pack index: {} members", rows.len())));
    }
    if rows.first().map(|r| r.number) != Some(identity.object.number) {
        return Err(corrupt("pack index: the first member is not the pack's number"));
    }
    let mut offset = HEADER_BYTES as u64;
    let mut table_offset = HEADER_BYTES as u64 + frames_bytes;
    let mut members = Vec::new();
    for row in &rows {
        if row.frames as usize > reader.remaining() / FRAME_ROW_BYTES || row.slots > PACK_SLOTS_MAX {
            return Err(corrupt(format!("pack index: member {} is out of bounds", row.number)));
        }
        let mut member = Member {
            number: row.number,
            frames: Vec::with_capacity(row.frames as usize),
            offsets: Vec::with_capacity(row.frames as usize),
            ordinals: Vec::with_capacity(row.frames as usize),
            table_offset,
            slots: row.slots,
            page_checksums: Vec::new(),
        };
        let mut ordinal = 0;
        let mut next_slot = 0;
        for _ in 0..row.frames {
            let frame = FrameRow::take(&mut reader)?;
            frame.check(identity.content)?;
            if u32::from(frame.first_slot) < next_slot || frame.span() > FRAME_SLOTS_MAX {
                return Err(corrupt("pack index: frames overlap"));
            }
            next_slot = u32::from(frame.first_slot) + frame.span();
            member.offsets.push(offset);
            member.ordinals.push(ordinal);
            offset += u64::from(frame.stored_bytes);
            ordinal += frame.count();
            member.frames.push(frame);
        }
        if ordinal != row.slots {
            return Err(corrupt(format!("pack index: member {} has {ordinal} slots, says {}", row.number, row.slots)));
        }
        table_offset += member.table_bytes();
        members.push(member);
    }
    for member in &mut members {
        for _ in 0..(member.slots as usize).div_ceil(SLOT_PAGE_FINGERPRINTS) {
            member.page_checksums.push(Checksum::take(&mut reader)?);
        }
    }
    reader.end()?;
    let frames_end = HEADER_BYTES as u64 + frames_bytes;
    if offset != frames_end || table_offset != frames_end + table_bytes {
        return Err(corrupt("pack index: frames or slots do not fill their part"));
    }
    Ok(members)
}

/// The key of a pack object in the folder of its VM.
pub fn object_name(object: ObjectId) -> String {
    format!("{object}.pack")
}

/// The object that a file name in a folder of packs stands for.
pub fn parse_object_name(name: &str) -> Option<ObjectId> {
    let (number, generation) = name.strip_suffix(".pack")?.split_once('.')?;
    let object = ObjectId {
        number: crate::units::Serial(u64::from_str_radix(number, 16).ok()?),
        generation: Generation(generation.parse().ok()?),
    };
    // Only the one spelling that the writer uses.
    (object_name(object) == name && object.number.is_valid()).then_some(object)
}
