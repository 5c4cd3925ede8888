//! G4: writes the live slots of some objects into one new object. Pack and slot numbers stay, so that no recipe
//! changes; the generation is new.
//!
//! Frames that are live as a whole are copied byte for byte, after their checksum was found right. Of others the live
//! slots are packed anew, after each was compared with its fingerprint. Dead frames are not even read, so damage in
//! them goes with them.
//!
//! A live slot whose block a common pack holds becomes a *forward*: its own bytes are not read, those of the common slot
//! were, and compared with the fingerprint ([`Sharing::proven_forwards`](crate::collect::plan::Sharing::proven_forwards)).

use std::collections::BTreeMap;

use rayon::prelude::*;
use roaring::RoaringBitmap;

use crate::backend::Backend;
use crate::catalog::record::PackEntry;
use crate::catalog::vm::pack_key;
use crate::collect::plan::live_mask;
use crate::error::{Error, Result, corrupt, invalid};
use crate::fingerprint::{Fingerprint, fingerprint};
use crate::limits::{RECIPE_ZSTD_LEVEL, ZSTD_LEVEL};
use crate::pack::Content;
use crate::pack::frame::{FrameRow, compress, join_slots, slot_range};
use crate::pack::index::{ForwardRow, Identity, Member, PackIndex};
use crate::pack::reader::{ObjectPlace, read_index, read_slot_page};
use crate::pack::writer::{PackWriter, PackedFrame};
use crate::store::session::{Session, pack_entry};
use crate::units::{Generation, Incarnation, ObjectId, PackNumber, SlotId};

/// Bytes of frames that are read, and worked on by all cores, at a time.
const BATCH_BYTES: u64 = 4 << 20;

/// An object whose live slots move.
#[derive(Debug, Clone)]
pub struct Source {
    /// The object by the log.
    pub place: ObjectPlace,
    /// Its packs that have live slots, with these.
    pub live: Vec<(PackNumber, RoaringBitmap)>,
    /// Live slots that are to lead to common slots from now on, whose bytes were read and found right.
    pub forwards: BTreeMap<SlotId, SlotId>,
}

/// Why an object was not written.
#[derive(Debug)]
pub enum Failure {
    /// This one of the sources cannot be read or is not what it should be. It must be left as it is.
    Source(usize, Error),
    /// The new object cannot be written.
    Target(Error),
}

/// Writes one object with the live slots of all `sources`, durably, and reads its index back. Nothing refers to it
/// before the entries that are returned are in the log.
///
/// Memory: the slot table of the new object, and a few MiB. Cost: reads all live frames.
///
/// # Errors
/// See [`Failure`]; nothing is left behind then, unless `Target` is `Unavailable`.
pub fn rewrite(session: &Session, sources: &[Source]) -> std::result::Result<Vec<PackEntry>, Failure> {
    let target = Failure::Target;
    let mut members: Vec<(PackNumber, usize, &RoaringBitmap)> = sources
        .iter()
        .enumerate()
        .flat_map(|(at, source)| source.live.iter().map(move |(number, live)| (*number, at, live)))
        .filter(|(_, _, live)| !live.is_empty())
        .collect();
    members.sort_unstable_by_key(|(number, _, _)| *number);
    let (Some((first, _, _)), Some(source)) = (members.first(), sources.first()) else {
        return Err(target(invalid("compaction of nothing")));
    };
    let identity = Identity {
        incarnation: source.place.incarnation,
        object: ObjectId { number: *first, generation: Generation(session.begin_record().0) },
        content: source.place.content,
    };
    let vm = session.vm();
    let backend = &**vm.backend();
    let key = pack_key(vm.name(), identity.object);
    let indexes = read_indexes(backend, sources, &identity)?;
    let mut writer = PackWriter::create(backend, &key, identity).map_err(target)?;
    let copy = Copy { backend };
    for (turn, (number, at, live)) in members.iter().enumerate() {
        let (Some(source), Some(index)) = (sources.get(*at), indexes.get(*at)) else { continue };
        if turn > 0 {
            writer.begin_member(*number).map_err(target)?;
        }
        let wrong = |e: Error| Failure::Source(*at, e.within(&source.place.key));
        let member = index.member(*number).map_err(wrong)?;
        copy.member(source, member, live, &mut writer).map_err(|e| match e {
            Failure::Source(_, e) => wrong(e),
            other => other,
        })?;
    }
    let finished = writer.finish().map_err(target)?;
    let place = ObjectPlace {
        key,
        incarnation: identity.incarnation,
        object: identity.object,
        content: identity.content,
        bytes: finished.bytes,
        tail_bytes: finished.tail_bytes,
    };
    // The old objects go soon: what replaces them must be what was meant.
    let index = read_index(backend, &place).map_err(target)?;
    let mut entries = Vec::with_capacity(members.len());
    for (number, _, live) in &members {
        let member = index.member(*number).map_err(target)?;
        let forwards = member.forwards.iter().flat_map(ForwardRow::slots);
        let there: RoaringBitmap = member.present().chain(forwards).map(u32::from).collect();
        if there != **live {
            return Err(target(corrupt(format!("{}: pack {number} has other slots than were written", place.key))));
        }
        entries.push(pack_entry(*number, identity.content, &finished, identity.object).map_err(target)?);
    }
    Ok(entries)
}

fn read_indexes(
    backend: &dyn Backend,
    sources: &[Source],
    identity: &Identity,
) -> std::result::Result<Vec<PackIndex>, Failure> {
    let mut indexes = Vec::with_capacity(sources.len());
    for (at, source) in sources.iter().enumerate() {
        let place = &source.place;
        if (place.incarnation, place.content) != (identity.incarnation, identity.content) {
            return Err(Failure::Target(invalid(format!("{}: does not go together with the others", place.key))));
        }
        indexes.push(read_index(backend, place).map_err(|e| Failure::Source(at, e))?);
    }
    Ok(indexes)
}

/// A frame of the new object.
enum Kept {
    Whole(Vec<u8>),
    Part(PackedFrame),
}

struct Task<'a> {
    row: &'a FrameRow,
    mask: u64,
    prints: &'a [Fingerprint],
}

/// What copying needs beside the source.
struct Copy<'a> {
    backend: &'a dyn Backend,
}

impl Copy<'_> {
    fn member(
        &self,
        source: &Source,
        member: &Member,
        live: &RoaringBitmap,
        writer: &mut PackWriter,
    ) -> std::result::Result<(), Failure> {
        let wrong = |e: Error| Failure::Source(0, e);
        let place = &source.place;
        let prints = read_table(self.backend, place, member).map_err(wrong)?;
        let forwards = self.forwards(source, member, live, &prints).map_err(wrong)?;
        let mut kept = live.clone();
        forwards.keys().for_each(|slot| {
            kept.remove(u32::from(*slot));
        });
        let masks: Vec<u64> = member.frames.iter().map(|row| live_mask(row, &kept)).collect();
        let found: u64 = masks.iter().map(|mask| u64::from(mask.count_ones())).sum();
        if found != kept.len() {
            let missing = kept.len() - found;
            return Err(wrong(corrupt(format!(
                "pack {}: {missing} slots that are in use are not in it",
                member.number
            ))));
        }
        self.frames(place, member, &masks, &prints, writer)?;
        for (slot, (target, print)) in forwards {
            writer.forward(slot, target, print).map_err(Failure::Target)?;
        }
        Ok(())
    }

    /// The live slots that lead to common slots: those that do already, and those wanted.
    fn forwards(
        &self,
        source: &Source,
        member: &Member,
        live: &RoaringBitmap,
        prints: &[Fingerprint],
    ) -> Result<BTreeMap<u16, (SlotId, Fingerprint)>> {
        let mut forwards = BTreeMap::new();
        for page in member.present_pages()..member.pages() {
            let page = read_slot_page(self.backend, &source.place, member, page)?;
            for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
                let there = member.forward_of(*slot).filter(|_| live.contains(u32::from(*slot)));
                forwards.extend(there.map(|(target, _)| (*slot, (target, *print))));
            }
        }
        let first = SlotId::new(member.number, 0);
        let wanted = source.forwards.range(first..=SlotId::new(member.number, u16::MAX));
        let wanted = wanted.filter(|(slot, _)| live.contains(u32::from(slot.slot())));
        for (slot, target) in wanted {
            let ordinal = member.ordinal_of(slot.slot());
            let Some(print) = ordinal.and_then(|at| prints.get(at as usize)) else { continue };
            forwards.insert(slot.slot(), (*target, *print));
        }
        Ok(forwards)
    }

    /// Copies what the masks leave of each frame.
    fn frames(
        &self,
        place: &ObjectPlace,
        member: &Member,
        masks: &[u64],
        prints: &[Fingerprint],
        writer: &mut PackWriter,
    ) -> std::result::Result<(), Failure> {
        let wrong = |e: Error| Failure::Source(0, e);
        let mut at = 0;
        while at < member.frames.len() {
            let mut end = at;
            let mut bytes = 0;
            while let (Some(row), Some(mask)) = (member.frames.get(end), masks.get(end)) {
                if *mask == 0 || (end > at && bytes + u64::from(row.stored_bytes) > BATCH_BYTES) {
                    break;
                }
                bytes += u64::from(row.stored_bytes);
                end += 1;
            }
            if end == at {
                at += 1;
                continue;
            }
            let mut stored = vec![0; bytes as usize];
            self.backend.read(&place.key, member.offsets.get(at).copied().unwrap_or(0), &mut stored).map_err(wrong)?;
            let mut rest = &stored[..];
            let mut work = Vec::with_capacity(end - at);
            for frame in at..end {
                let (Some(row), Some(mask), Some(first)) =
                    (member.frames.get(frame), masks.get(frame), member.ordinals.get(frame))
                else {
                    break;
                };
                let (bytes, tail) = rest.split_at(row.stored_bytes as usize);
                rest = tail;
                let first = *first as usize;
                let prints = prints.get(first..first + row.count() as usize);
                let prints = prints.ok_or_else(|| wrong(corrupt("slot table is shorter than its frames")))?;
                work.push((Task { row, mask: *mask, prints }, bytes));
            }
            let kept: Vec<Result<Kept>> = work
                .par_iter()
                .map(|(task, bytes)| keep(task, place.content, place.incarnation, member.number, bytes))
                .collect();
            for ((task, _), kept) in work.iter().zip(kept) {
                match kept.map_err(wrong)? {
                    Kept::Whole(bytes) => writer.append_verbatim(*task.row, &bytes, task.prints),
                    Kept::Part(frame) => writer.append(frame, &live_prints(task)).map(|_| ()),
                }
                .map_err(Failure::Target)?;
            }
            at = end;
        }
        Ok(())
    }
}

/// The fingerprints of all slots in frames, in their order.
fn read_table(backend: &dyn Backend, place: &ObjectPlace, member: &Member) -> Result<Vec<Fingerprint>> {
    let mut prints = Vec::with_capacity(member.slots as usize);
    for page in 0..member.present_pages() {
        prints.extend_from_slice(&read_slot_page(backend, place, member, page)?.fingerprints);
    }
    Ok(prints)
}

fn live_slots(task: &Task<'_>) -> impl Iterator<Item = (usize, u16)> {
    let (first, mask) = (task.row.first_slot, task.mask);
    task.row.slots().enumerate().filter(move |(_, slot)| mask & (1 << (slot - first)) != 0)
}

fn live_prints(task: &Task<'_>) -> Vec<Fingerprint> {
    live_slots(task).filter_map(|(rank, _)| task.prints.get(rank).copied()).collect()
}

fn keep(
    task: &Task<'_>,
    content: Content,
    incarnation: Incarnation,
    number: PackNumber,
    stored: &[u8],
) -> Result<Kept> {
    let row = task.row;
    if task.mask == row.present {
        if row.checksum_of(incarnation, number, stored) != row.checksum {
            return Err(corrupt(format!("frame of slot {}: checksum does not match", row.first_slot)));
        }
        return Ok(Kept::Whole(stored.to_vec()));
    }
    let raw = row.open(content, incarnation, number, stored)?;
    let mut slots = Vec::with_capacity(task.mask.count_ones() as usize);
    for (rank, slot) in live_slots(task) {
        let range = slot_range(content, &raw, rank, row.count() as usize)?;
        let bytes = raw.get(range).ok_or_else(|| corrupt("frame is shorter than its slots"))?;
        if task.prints.get(rank) != Some(&fingerprint(bytes)) {
            return Err(corrupt(format!("slot {slot}: bytes do not match their fingerprint")));
        }
        slots.push(bytes.to_vec());
    }
    let (raw, level) = match content {
        Content::Data => (slots.concat(), ZSTD_LEVEL),
        Content::Recipes => (join_slots(&slots), RECIPE_ZSTD_LEVEL),
    };
    let (codec, payload) = compress(&raw, level);
    Ok(Kept::Part(PackedFrame {
        first_slot: row.first_slot,
        span: row.span(),
        present: task.mask,
        raw_bytes: raw.len() as u32,
        codec,
        payload,
    }))
}
