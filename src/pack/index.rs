//! The end of a pack: what is in it and where. Header and trailer carry the pack's identity, the index its frames.

use crate::error::{Result, corrupt};
use crate::fingerprint::{Fingerprint, short};
use crate::format::{ObjectKind, check_preamble, preamble};
use crate::limits::{FRAME_SLOTS_MAX, PACK_MEMBERS_MAX, PACK_SLOTS_MAX, SLOT_PAGE_FINGERPRINTS};
use crate::pack::Content;
use crate::pack::frame::{Checksum, FRAME_ROW_BYTES, FrameRow};
use crate::units::{Generation, Incarnation, ObjectId, PackNumber, SlotId};
use crate::wire::{Reader, Wire, wire_struct};

/// Bytes of a pack's header.
pub const HEADER_BYTES: usize = 61;

/// Bytes of a pack's trailer.
pub const TRAILER_BYTES: usize = HEADER_BYTES + 8 + 8 + 4 + 16 + 16;

/// Bytes of a fingerprint in the slot table.
const FINGERPRINT_BYTES: usize = 32;

const _: () = assert!(HEADER_BYTES == 16 + 16 + 8 + 4 + 1 + 16, "docs/FORMAT.md: the header of a pack");
const _: () = assert!(FORWARD_ROW_BYTES == 2 + 2 + 8, "docs/FORMAT.md: a row of forwards");
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
        /// Its slots that are present in frames.
        pub slots: u32,
        /// Its runs of forwards.
        pub forwards: u32,
    }
}

wire_struct! {
    /// A run of slots whose blocks lie in consecutive slots of a common pack: *forwards*.
    #[derive(Copy)]
    pub struct ForwardRow {
        /// The first.
        pub first_slot: u16,
        /// Slots, less one.
        pub slots_less_one: u16,
        /// Where the block of the first is.
        pub target: SlotId,
    }
}

impl ForwardRow {
    /// Slots.
    pub fn count(&self) -> u32 {
        u32::from(self.slots_less_one) + 1
    }

    /// The slots in order.
    pub fn slots(&self) -> impl Iterator<Item = u16> + use<> {
        self.first_slot..=self.first_slot.saturating_add(self.slots_less_one)
    }

    /// Where the block of a slot is, and how many of the run follow from there, its own included.
    pub fn target_of(&self, slot: u16) -> Option<(SlotId, u32)> {
        let skip = u32::from(slot.checked_sub(self.first_slot)?);
        if skip < self.count() { Some((self.target.plus(skip)?, self.count() - skip)) } else { None }
    }

    /// Takes one more slot, if it goes on with the run.
    pub fn extend(&mut self, slot: u16, target: SlotId) -> bool {
        let follows = u32::from(self.first_slot) + self.count() == u32::from(slot);
        if follows && self.target.plus(self.count()) == Some(target) {
            self.slots_less_one += 1;
            return true;
        }
        false
    }
}

/// Bytes of a row of forwards.
pub const FORWARD_ROW_BYTES: usize = 12;

/// What the tail of an object says of one pack in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberTail {
    /// The pack.
    pub number: PackNumber,
    /// Its frames.
    pub frames: Vec<FrameRow>,
    /// Its forwards.
    pub forwards: Vec<ForwardRow>,
    /// Checksums of the pages of its slot table.
    pub checksums: Vec<Checksum>,
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
    /// Slots present in frames.
    pub slots: u32,
    /// Slots whose blocks lie in common packs, in slot order.
    pub forwards: Vec<ForwardRow>,
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

    /// Whether a slot is there: present, or a forward.
    pub fn has(&self, slot: u16) -> bool {
        self.frame_of(slot).is_some() || self.forward_of(slot).is_some()
    }

    /// Where a forward leads, and how many slots of its run follow; `None` for a slot that is none.
    pub fn forward_of(&self, slot: u16) -> Option<(SlotId, u32)> {
        let after = self.forwards.partition_point(|f| f.first_slot <= slot);
        self.forwards.get(after.checked_sub(1)?)?.target_of(slot)
    }

    /// Slots that are forwards.
    pub fn forward_slots(&self) -> u32 {
        self.forwards.iter().map(ForwardRow::count).sum()
    }

    /// All slots: those present, and forwards.
    pub fn all_slots(&self) -> u32 {
        self.slots + self.forward_slots()
    }

    /// Pages of the slot table that are about slots in frames; those about forwards follow.
    pub fn present_pages(&self) -> u32 {
        self.slots.div_ceil(SLOT_PAGE_FINGERPRINTS as u32)
    }

    /// Pages of the slot table.
    pub fn pages(&self) -> u32 {
        self.present_pages() + self.forward_slots().div_ceil(SLOT_PAGE_FINGERPRINTS as u32)
    }

    /// The page of the slot table that a slot stands on; `None` when the slot is not there.
    pub fn page_of(&self, slot: u16) -> Option<u32> {
        if let Some(ordinal) = self.ordinal_of(slot) {
            return Some(ordinal / SLOT_PAGE_FINGERPRINTS as u32);
        }
        self.forward_of(slot)?;
        let before = self.forwards.iter().take_while(|f| f.first_slot <= slot);
        let ordinal: u32 = before.map(|f| f.count().min(u32::from(slot - f.first_slot))).sum();
        Some(self.present_pages() + ordinal / SLOT_PAGE_FINGERPRINTS as u32)
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
        if let Some(page) = page.checked_sub(self.present_pages()) {
            let skip = page as usize * SLOT_PAGE_FINGERPRINTS;
            return self.forwards.iter().flat_map(ForwardRow::slots).skip(skip).take(SLOT_PAGE_FINGERPRINTS).collect();
        }
        let first = page as usize * SLOT_PAGE_FINGERPRINTS;
        let frame = self.ordinals.partition_point(|o| *o as usize <= first).saturating_sub(1);
        let skip = first - self.ordinals.get(frame).map_or(first, |o| *o as usize);
        let frames = self.frames.get(frame..).unwrap_or_default();
        frames.iter().flat_map(FrameRow::slots).skip(skip).take(SLOT_PAGE_FINGERPRINTS).collect()
    }

    /// Offset in the object and bytes of a page of the slot table.
    pub fn page_range(&self, page: u32) -> (u64, usize) {
        let (page, start, slots) = match page.checked_sub(self.present_pages()) {
            Some(page) => (page, self.slots as usize, self.forward_slots() as usize),
            None => (page, 0, self.slots as usize),
        };
        let first = page as usize * SLOT_PAGE_FINGERPRINTS;
        let count = slots.saturating_sub(first).min(SLOT_PAGE_FINGERPRINTS);
        (self.table_offset + ((start + first) * FINGERPRINT_BYTES) as u64, count * FINGERPRINT_BYTES)
    }

    /// Bytes of its part of the slot table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.all_slots()) * FINGERPRINT_BYTES as u64
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
        let per_member = |m: &Member| 160 + m.frames.len() * 52 + m.page_checksums.len() * 16 + m.forwards.len() * 16;
        self.members.iter().map(per_member).sum::<usize>() + 128
    }

    /// Bytes of the whole object.
    pub fn object_bytes(&self) -> u64 {
        let table: u64 = self.members.iter().map(Member::table_bytes).sum();
        HEADER_BYTES as u64 + self.frames_bytes + table + u64::from(self.tail_bytes)
    }

    /// Index and trailer of an object; `members` in the order of their frames, which is that of their numbers.
    pub fn encode_tail(identity: &Identity, members: &[MemberTail]) -> Vec<u8> {
        let mut index = Vec::new();
        let present = |member: &MemberTail| member.frames.iter().map(FrameRow::count).sum::<u32>();
        let forwards = |member: &MemberTail| member.forwards.iter().map(ForwardRow::count).sum::<u32>();
        (members.len() as u32).put(&mut index);
        for member in members {
            let row = MemberRow {
                number: member.number,
                frames: member.frames.len() as u32,
                slots: present(member),
                forwards: member.forwards.len() as u32,
            };
            row.put(&mut index);
        }
        members.iter().flat_map(|m| &m.frames).for_each(|frame| frame.put(&mut index));
        members.iter().flat_map(|m| &m.forwards).for_each(|row| row.put(&mut index));
        members.iter().flat_map(|m| &m.checksums).for_each(|checksum| checksum.put(&mut index));
        let frames_bytes: u64 = members.iter().flat_map(|m| &m.frames).map(|f| u64::from(f.stored_bytes)).sum();
        let slots: u64 = members.iter().map(|m| u64::from(present(m)) + u64::from(forwards(m))).sum();
        let table_bytes = slots * FINGERPRINT_BYTES as u64;
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
            forwards: Vec::new(),
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
        members.push(member);
    }
    for (member, row) in members.iter_mut().zip(&rows) {
        take_forwards(&mut reader, identity, row, member)?;
        member.table_offset = table_offset;
        table_offset += member.table_bytes();
    }
    for member in &mut members {
        for _ in 0..member.pages() {
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

fn take_forwards(reader: &mut Reader<'_>, identity: &Identity, row: &MemberRow, member: &mut Member) -> Result<()> {
    let may_have = identity.content == Content::Data && !row.number.is_common();
    if row.forwards > 0 && (!may_have || row.forwards as usize > reader.remaining() / FORWARD_ROW_BYTES) {
        return Err(corrupt(format!("pack index: member {} has forwards it cannot have", row.number)));
    }
    let mut slots = member.slots;
    for _ in 0..row.forwards {
        let forward = ForwardRow::take(reader)?;
        let last = u32::from(forward.first_slot) + u32::from(forward.slots_less_one);
        let fits = last < PACK_SLOTS_MAX
            && forward.target.pack().is_common()
            && forward.target.plus(u32::from(forward.slots_less_one)).is_some();
        let is_next = member.forwards.last().is_none_or(|before| {
            let end = u32::from(before.first_slot) + before.count();
            // Runs that could be one are not what the writer makes.
            let joins =
                end == u32::from(forward.first_slot) && before.target.plus(before.count()) == Some(forward.target);
            end <= u32::from(forward.first_slot) && !joins
        });
        slots = slots.saturating_add(forward.count());
        if !fits || !is_next || slots > PACK_SLOTS_MAX || forward.slots().any(|slot| member.frame_of(slot).is_some()) {
            return Err(corrupt(format!("pack index: forward of slot {} is out of bounds", forward.first_slot)));
        }
        member.forwards.push(forward);
    }
    Ok(())
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
