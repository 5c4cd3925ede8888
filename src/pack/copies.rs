//! The copies of a pack object: which are whole, and how those that are not are made whole again.
//!
//! A bad copy is replaced only by bytes that were proven: by another copy of which all is right, or, where every copy is
//! damaged, by all parts of the object, each from a copy in which it is right.

use crate::backend::replicate::Replicated;
use crate::backend::target::Target;
use crate::backend::{Backend, Key};
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::pack::index::{HEADER_BYTES, Member, MemberTail, PackIndex};
use crate::pack::reader::{ObjectPlace, read_index, read_slot_page};

/// Bytes that are read at a time.
const BATCH_BYTES: u64 = 4 << 20;

/// How much of a copy is looked at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Depth {
    /// Its length, header, index and slot table.
    Metadata,
    /// This share of its frames too, in percent; which ones depends on the seed.
    Sample(f64, u64),
    /// All of it.
    All,
}

/// The state of the copies of an object.
#[derive(Debug, Default)]
pub struct Found {
    /// Targets that hold a whole one.
    pub whole: Vec<Target>,
    /// Targets that hold a damaged one or none, and what is wrong with it.
    pub bad: Vec<(Target, Error)>,
    /// Targets that do not answer.
    pub away: Vec<Target>,
}

/// Proves one copy. Memory: its index, and 4 MiB. Cost: reads what `depth` says.
///
/// # Errors
/// `NotFound`, `Corrupt`, `Unavailable`.
pub fn verify_copy(copy: &dyn Backend, place: &ObjectPlace, depth: Depth) -> Result<()> {
    let bytes = copy.len(&place.key)?;
    if bytes != place.bytes {
        return Err(corrupt(format!("{}: has {bytes} bytes, the log says {}", place.key, place.bytes)));
    }
    let index = read_index(copy, place)?;
    let mut header = [0; HEADER_BYTES];
    copy.read(&place.key, 0, &mut header)?;
    if header[..] != index.identity.header()[..] {
        return Err(corrupt(format!("{}: pack header: is not what the trailer says", place.key)));
    }
    for member in &index.members {
        for page in 0..member.pages() {
            read_slot_page(copy, place, member, page)?;
        }
    }
    let mut frame = 0;
    for_each_run(&index, &mut |offset, bytes, rows| {
        let is_wanted = match depth {
            Depth::Metadata => false,
            Depth::All => true,
            Depth::Sample(percent, seed) => {
                frame += 1;
                let mixed = (seed ^ frame).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11;
                frame == 1 || (mixed as f64 / (1_u64 << 53) as f64) * 100.0 < percent
            }
        };
        if !is_wanted {
            return Ok(());
        }
        let mut stored = vec![0; bytes];
        copy.read(&place.key, offset, &mut stored)?;
        check_run(place, rows, &stored)
    })
}

pub(super) type Rows<'a> = [(crate::units::PackNumber, &'a crate::pack::frame::FrameRow)];

/// Calls `work` with each run of frames: offset, bytes, and the rows.
fn for_each_run(index: &PackIndex, work: &mut dyn FnMut(u64, usize, &Rows<'_>) -> Result<()>) -> Result<()> {
    let all = index.members.iter().flat_map(|member| member.frames.iter().map(|row| (member.number, row)));
    let mut offset = HEADER_BYTES as u64;
    let mut run = Vec::new();
    let mut bytes = 0;
    for (number, row) in all {
        if bytes > 0 && bytes + u64::from(row.stored_bytes) > BATCH_BYTES {
            work(offset, bytes as usize, &run)?;
            offset += bytes;
            bytes = 0;
            run.clear();
        }
        bytes += u64::from(row.stored_bytes);
        run.push((number, row));
    }
    if run.is_empty() { Ok(()) } else { work(offset, bytes as usize, &run) }
}

pub(super) fn check_run(place: &ObjectPlace, rows: &Rows<'_>, stored: &[u8]) -> Result<()> {
    let mut rest = stored;
    for (number, row) in rows {
        let (bytes, tail) = rest.split_at_checked(row.stored_bytes as usize).unwrap_or((rest, &[]));
        rest = tail;
        if row.checksum_of(place.incarnation, *number, bytes) != row.checksum {
            let slot = row.first_slot;
            return Err(corrupt(format!("{}: frame of slot {slot}: checksum does not match", place.key)));
        }
    }
    Ok(())
}

/// Looks at all copies of an object.
pub fn find(replicated: &Replicated, place: &ObjectPlace, depth: Depth) -> Found {
    let mut found = Found::default();
    for target in replicated.places(&place.key).homes {
        match verify_copy(&target, place, depth) {
            Ok(()) => found.whole.push(target),
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => found.bad.push((target, e)),
            Err(_) if !target.is_there() => found.away.push(target),
            // A medium that cannot read it is as good as one that has it not.
            Err(e) => found.bad.push((target, e)),
        }
    }
    found
}

/// Makes bad copies whole, from the whole ones or from what is whole in each. Returns how many were.
///
/// Memory: the index, and 4 MiB. Cost: reads all copies, and writes each bad one.
///
/// # Errors
/// `Corrupt` when some part is whole in no copy: then nothing is changed. What a target refuses is told in the log.
pub fn heal(replicated: &Replicated, place: &ObjectPlace) -> Result<u64> {
    let found = find(replicated, place, Depth::All);
    let mut healed = 0;
    for (target, why) in &found.bad {
        let outcome = match found.whole.first() {
            Some(source) => copy_object(source, target, &place.key),
            None => assemble(replicated, target, place),
        };
        match outcome {
            Ok(()) => {
                healed += 1;
                replicated.is_healed(&place.key, target.id());
                let level = if why.kind() == ErrorKind::NotFound { log::Level::Info } else { log::Level::Warn };
                log::log!(level, "{}: the bad copy on {} is replaced: {why}", place.key, target.name());
            }
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) && found.whole.is_empty() => {
                return Err(e.as_kind(ErrorKind::Corrupt));
            }
            Err(e) => log::warn!("{}: the bad copy on {} stays: {e}", place.key, target.name()),
        }
    }
    Ok(healed)
}

/// Puts a copy that was proven in the place of a bad one. Memory: 4 MiB.
///
/// # Errors
/// As [`Backend::read`] of the source and [`Backend::create_over`] of the target.
pub fn copy_object(source: &Target, target: &Target, key: &Key) -> Result<()> {
    let mut upload = target.create_over(key)?;
    let end = source.len(key)?;
    let mut offset = 0;
    while offset < end {
        let bytes = (end - offset).min(BATCH_BYTES);
        let mut piece = vec![0; bytes as usize];
        source.read(key, offset, &mut piece)?;
        upload.append(&piece)?;
        offset += bytes;
    }
    upload.finish()
}

/// Writes an object from parts, each from a copy in which it is right.
fn assemble(replicated: &Replicated, target: &Target, place: &ObjectPlace) -> Result<()> {
    let index = read_index(replicated, place)?;
    let mut upload = target.create_over(&place.key)?;
    upload.append(&index.identity.header())?;
    let all = index.members.iter().flat_map(|m| m.frames.iter().zip(&m.offsets).map(|(row, at)| (m.number, row, at)));
    for (number, row, offset) in all {
        let mut stored = vec![0; row.stored_bytes as usize];
        let mut verify = |stored: &[u8]| check_run(place, &[(number, row)], stored);
        replicated.read_checked(&place.key, *offset, &mut stored, &mut verify)?;
        upload.append(&stored)?;
    }
    for member in &index.members {
        for page in 0..member.pages() {
            let page = read_slot_page(replicated, place, member, page)?;
            let table: Vec<u8> = page.fingerprints.iter().flat_map(|print| print.0).collect();
            upload.append(&table)?;
        }
    }
    upload.append(&encode_tail_of(&index))?;
    upload.finish()
}

/// Index and trailer as they are stored.
pub(super) fn encode_tail_of(index: &PackIndex) -> Vec<u8> {
    let tail = |member: &Member| MemberTail {
        number: member.number,
        frames: member.frames.clone(),
        forwards: member.forwards.clone(),
        checksums: member.page_checksums.clone(),
    };
    let members: Vec<_> = index.members.iter().map(tail).collect();
    PackIndex::encode_tail(&index.identity, &members)
}
