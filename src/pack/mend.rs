//! Objects of which some part is whole in no copy: what is wrong with one, and how it is written anew from what is
//! whole and from blocks that are found elsewhere.
//!
//! An object never changes (I4). What is written has the bytes that the index proves: a frame that is put together from
//! its blocks again counts only if its checksum comes out, which it does with the same version of zstd. What cannot be
//! proven keeps the bytes that it had. Blocks that another version of zstd compressed go into the next generation of the
//! object ([`renew`]), under the slot numbers that they have.

use std::collections::{BTreeMap, BTreeSet};

use crate::backend::{Backend, Key};
use crate::error::{Result, corrupt};
use crate::fingerprint::{Fingerprint, fingerprint};
use crate::limits::{BLOCK_BYTES, ZSTD_LEVEL};
use crate::pack::Content;
use crate::pack::copies::{Depth, check_run, encode_tail_of, verify_copy};
use crate::pack::frame::{CODEC_RAW, FrameRow, compress, slot_range};
use crate::pack::index::{HEADER_BYTES, Identity, Member, PackIndex, page_checksum};
use crate::pack::reader::{ObjectPlace, read_index, read_slot_page};
use crate::pack::writer::{Finished, PackWriter, PackedFrame};
use crate::units::{Generation, ObjectId, PackNumber};

/// A frame that is whole in no copy.
#[derive(Debug)]
pub struct LostFrame {
    /// The fingerprint of each present slot, in order; `None` where the slot table does not tell.
    pub wanted: Vec<Option<Fingerprint>>,
}

/// What is wrong with an object in all copies.
#[derive(Debug)]
pub struct Wounds {
    index: PackIndex,
    header: bool,
    // By member, then frame or page.
    frames: BTreeMap<(usize, usize), LostFrame>,
    pages: BTreeSet<(usize, u32)>,
}

impl Wounds {
    /// Whether all is right.
    pub fn is_none(&self) -> bool {
        !self.header && self.frames.is_empty() && self.pages.is_empty()
    }

    /// Whether the header or a page of a slot table is damaged.
    pub fn has_bad_parts(&self) -> bool {
        self.header || !self.pages.is_empty()
    }

    /// The frames that are lost.
    pub fn frames(&self) -> impl Iterator<Item = &LostFrame> {
        self.frames.values()
    }
}

/// What came of mending.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mended {
    /// Frames put together again.
    pub frames: u64,
    /// Other parts put right: the header, pages of slot tables.
    pub parts: u64,
    /// Frames that stay damaged since some of their blocks were not found.
    pub frames_without_blocks: u64,
    /// Frames whose blocks are all there, but which this version of zstd compresses to other bytes.
    pub frames_otherwise: u64,
    /// Frames that were compressed anew, into the next generation of the object.
    pub frames_anew: u64,
    /// Other parts that stay damaged.
    pub parts_left: u64,
}

impl Mended {
    /// Whether nothing stays damaged.
    pub fn is_whole(&self) -> bool {
        self.frames_without_blocks + self.frames_otherwise + self.parts_left == 0
    }
}

/// Gives the bytes of a block of this fingerprint, proven, if it is known where one is.
pub type FindBlock<'a> = &'a mut dyn FnMut(&Fingerprint) -> Option<Vec<u8>>;

/// Finds what is wrong with an object. Memory: its index, one frame, and 33 bytes for each lost slot. Cost: reads all
/// of it.
///
/// # Errors
/// `NotFound`, `Corrupt` when its index cannot be read: nothing is known of it then. `Unavailable`.
pub fn examine(backend: &dyn Backend, place: &ObjectPlace) -> Result<Wounds> {
    let index = read_index(backend, place)?;
    let mut header = vec![0; HEADER_BYTES];
    let mut verify = |header: &[u8]| match Identity::from_header(header)? == index.identity {
        true => Ok(()),
        false => Err(corrupt("is of another object")),
    };
    let header = backend.read_checked(&place.key, 0, &mut header, &mut verify).is_err();
    let mut frames = BTreeMap::new();
    let mut pages = BTreeSet::new();
    for (at, member) in index.members.iter().enumerate() {
        for page in 0..member.pages() {
            if read_slot_page(backend, place, member, page).is_err() {
                pages.insert((at, page));
            }
        }
        for (frame, row) in member.frames.iter().enumerate() {
            if read_frame(backend, place, member, frame).is_err() {
                let wanted = row.slots().map(|slot| print_of(backend, place, member, slot)).collect();
                frames.insert((at, frame), LostFrame { wanted });
            }
        }
    }
    Ok(Wounds { index, header, frames, pages })
}

/// The stored bytes of a frame, with the right checksum.
fn read_frame(backend: &dyn Backend, place: &ObjectPlace, member: &Member, frame: usize) -> Result<Vec<u8>> {
    let absent = || corrupt(format!("{}: no such frame", place.key));
    let row = member.frames.get(frame).ok_or_else(absent)?;
    let offset = member.offsets.get(frame).copied().ok_or_else(absent)?;
    let mut stored = vec![0; row.stored_bytes as usize];
    let mut verify = |stored: &[u8]| check_run(place, &[(member.number, row)], stored);
    backend.read_checked(&place.key, offset, &mut stored, &mut verify)?;
    Ok(stored)
}

fn print_of(backend: &dyn Backend, place: &ObjectPlace, member: &Member, slot: u16) -> Option<Fingerprint> {
    let page = read_slot_page(backend, place, member, member.page_of(slot)?).ok()?;
    page.fingerprint_of(slot)
}

/// Writes the object anew in the place of the copy in `over`: what is whole as `backend` has it, lost frames from the
/// blocks that `find` gives, and what stays damaged as `over` has it. Nothing is written when nothing gets better.
///
/// Memory: the index, one frame, and the fingerprints of a pack whose slot table is damaged. Cost: reads and writes
/// all of it, and, when it is whole then, reads it once more as a proof.
///
/// # Errors
/// As [`Backend::read`] and [`Backend::create_over`]; `Corrupt` when what was written is not what should be there.
pub fn mend(
    backend: &dyn Backend,
    over: &dyn Backend,
    place: &ObjectPlace,
    wounds: &Wounds,
    find: FindBlock<'_>,
) -> Result<Mended> {
    let mut mended = Mended { parts: u64::from(wounds.header), ..Mended::default() };
    let mut upload = over.create_over(&place.key)?;
    upload.append(&wounds.index.identity.header())?;
    let mut prints: BTreeMap<(usize, u16), Fingerprint> = BTreeMap::new();
    for (at, member) in wounds.index.members.iter().enumerate() {
        let has_bad_pages = wounds.pages.range((at, 0)..=(at, u32::MAX)).next().is_some();
        for (frame, row) in member.frames.iter().enumerate() {
            let stored = match wounds.frames.get(&(at, frame)) {
                None => read_frame(backend, place, member, frame)?,
                Some(lost) => {
                    let offset = member.offsets.get(frame).copied().unwrap_or(0);
                    let mut there = vec![0; row.stored_bytes as usize];
                    let read = over.read(&place.key, offset, &mut there);
                    match remake(place, member, row, lost, read.is_ok().then_some(&there[..]), find, &mut mended) {
                        Some(stored) => stored,
                        // What a medium cannot read now is not given up for zeros.
                        None => read.map(|()| there)?,
                    }
                }
            };
            upload.append(&stored)?;
            if has_bad_pages && let Ok(raw) = row.open(place.content, place.incarnation, member.number, &stored) {
                for (rank, slot) in row.slots().enumerate() {
                    let range = slot_range(place.content, &raw, rank, row.count() as usize);
                    if let Some(bytes) = range.ok().and_then(|range| raw.get(range)) {
                        prints.insert((at, slot), fingerprint(bytes));
                    }
                }
            }
        }
    }
    for (at, member) in wounds.index.members.iter().enumerate() {
        for page in 0..member.pages() {
            let table: Vec<u8> = if wounds.pages.contains(&(at, page)) {
                let slots = member.slots_of_page(page);
                let known: Option<Vec<_>> = slots.iter().map(|slot| prints.get(&(at, *slot))).collect();
                let table: Vec<u8> = known.unwrap_or_default().into_iter().flat_map(|print| print.0).collect();
                let sum = page_checksum(place.incarnation, member.number, page, &table);
                if member.page_checksums.get(page as usize) == Some(&sum) {
                    mended.parts += 1;
                    table
                } else {
                    mended.parts_left += 1;
                    let (offset, bytes) = member.page_range(page);
                    let mut there = vec![0; bytes];
                    over.read(&place.key, offset, &mut there)?;
                    there
                }
            } else {
                let page = read_slot_page(backend, place, member, page)?;
                page.fingerprints.iter().flat_map(|print| print.0).collect()
            };
            upload.append(&table)?;
        }
    }
    upload.append(&encode_tail_of(&wounds.index))?;
    if mended.frames + mended.parts == 0 {
        return Ok(mended);
    }
    upload.finish()?;
    if mended.is_whole() {
        verify_copy(over, place, Depth::All)?;
    }
    Ok(mended)
}

/// Writes the next generation of an object for a log that has `packs` in it: what is whole byte for byte, the blocks of
/// lost frames compressed anew, and what stays damaged as `backend` has it. Every slot keeps its number. Nothing refers
/// to the new object before the log says so.
///
/// Nothing is written, and there is no object, when no lost frame can be had. Memory: the slot table, and one frame. Cost:
/// reads and writes all of it.
///
/// # Errors
/// `Corrupt` when a page of the slot table is damaged, which [`mend`] may heal first. As [`Backend::read`] and
/// [`Backend::create`].
pub fn renew(
    backend: &dyn Backend,
    place: &ObjectPlace,
    wounds: &Wounds,
    packs: &BTreeSet<PackNumber>,
    generation: Generation,
    key_of: &dyn Fn(ObjectId) -> Key,
    find: FindBlock<'_>,
) -> Result<Option<(Mended, ObjectId, Finished)>> {
    let members = || wounds.index.members.iter().enumerate().filter(|(_, member)| packs.contains(&member.number));
    let Some((_, first)) = members().next() else { return Ok(None) };
    let object = ObjectId { number: first.number, generation };
    let identity = Identity { object, ..wounds.index.identity };
    let mut writer = PackWriter::create(backend, &key_of(object), identity)?;
    let mut mended = Mended::default();
    for (turn, (at, member)) in members().enumerate() {
        if turn > 0 {
            writer.begin_member(member.number)?;
        }
        let mut prints = Vec::with_capacity(member.slots as usize);
        for page in 0..member.present_pages() {
            prints.extend_from_slice(&read_slot_page(backend, place, member, page)?.fingerprints);
        }
        let mut rest = &prints[..];
        for (frame, row) in member.frames.iter().enumerate() {
            let (prints, tail) = rest.split_at_checked(row.count() as usize).ok_or_else(|| corrupt("slot table"))?;
            rest = tail;
            let Some(lost) = wounds.frames.get(&(at, frame)) else {
                writer.append_verbatim(*row, &read_frame(backend, place, member, frame)?, prints)?;
                continue;
            };
            let offset = member.offsets.get(frame).copied().unwrap_or(0);
            let mut there = vec![0; row.stored_bytes as usize];
            let read = backend.read(&place.key, offset, &mut there);
            match blocks_of(place, row, lost, read.is_ok().then_some(&there[..]), find) {
                Some(raw) => {
                    let (first_slot, span, present) = (row.first_slot, row.span(), row.present);
                    let (codec, payload) = compress(&raw, ZSTD_LEVEL);
                    let frame = PackedFrame { first_slot, span, present, raw_bytes: row.raw_bytes, codec, payload };
                    writer.append(frame, prints)?;
                    mended.frames_anew += 1;
                }
                None => {
                    mended.frames_without_blocks += 1;
                    // What a medium cannot read now is not given up for zeros.
                    read?;
                    writer.append_verbatim(*row, &there, prints)?;
                }
            }
        }
        for page in member.present_pages()..member.pages() {
            let page = read_slot_page(backend, place, member, page)?;
            for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
                if let Some((target, _)) = member.forward_of(*slot) {
                    writer.forward(*slot, target, *print)?;
                }
            }
        }
    }
    if mended.frames_anew == 0 {
        return Ok(None);
    }
    Ok(Some((mended, object, writer.finish()?)))
}

/// The raw bytes of a lost frame of blocks, if they can be had: from `there`, what the damaged copy has in its place, and
/// `find`.
fn blocks_of(
    place: &ObjectPlace,
    row: &FrameRow,
    lost: &LostFrame,
    there: Option<&[u8]>,
    find: FindBlock<'_>,
) -> Option<Vec<u8>> {
    let mut raw = Vec::with_capacity(row.raw_bytes as usize);
    for (rank, print) in lost.wanted.iter().enumerate() {
        // What is not compressed has lost only the blocks that are hit.
        let whole = there.filter(|_| row.codec == CODEC_RAW && place.content == Content::Data);
        let whole = whole.and_then(|there| there.get(rank * BLOCK_BYTES..(rank + 1) * BLOCK_BYTES));
        let block = print.as_ref().and_then(|print| match whole.filter(|block| fingerprint(block) == *print) {
            Some(block) => Some(block.to_vec()),
            None => find(print),
        });
        raw.extend_from_slice(&block?);
    }
    Some(raw)
}

/// The stored bytes of a lost frame, if they can be had.
fn remake(
    place: &ObjectPlace,
    member: &Member,
    row: &FrameRow,
    lost: &LostFrame,
    there: Option<&[u8]>,
    find: FindBlock<'_>,
    mended: &mut Mended,
) -> Option<Vec<u8>> {
    let Some(raw) = blocks_of(place, row, lost, there, find) else {
        mended.frames_without_blocks += 1;
        return None;
    };
    let stored = if row.codec == CODEC_RAW { raw } else { compress(&raw, ZSTD_LEVEL).1 };
    if check_run(place, &[(member.number, row)], &stored).is_ok() && stored.len() == row.stored_bytes as usize {
        mended.frames += 1;
        Some(stored)
    } else {
        mended.frames_otherwise += 1;
        None
    }
}
