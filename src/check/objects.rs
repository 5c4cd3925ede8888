//! Checks pack objects: that each is there, is what the log says, and that its frames hold what they should.

use rayon::prelude::*;

use crate::backend::Backend;
use crate::catalog::record::PackEntry;
use crate::catalog::vm::{Vm, object_place};
use crate::check::faults::{Faults, Severity, Subject};
use crate::check::store::CheckOptions;
use crate::error::{ErrorKind, Result, corrupt};
use crate::fingerprint::{Fingerprint, fingerprint};
use crate::limits::SLOT_PAGE_FINGERPRINTS;
use crate::pack::frame::{FrameRow, slot_range};
use crate::pack::index::{HEADER_BYTES, Identity, Member};
use crate::pack::reader::{ObjectPlace, Packs, read_index, read_slot_page};
use crate::units::{Incarnation, ObjectId, SlotId};

/// Bytes of frames that are read, and worked on by all cores, at a time.
const BATCH_BYTES: u64 = 4 << 20;

/// Checks the pack objects of one VM.
pub struct ObjectCheck<'a> {
    vm: &'a Vm,
    packs: &'a Packs,
    incarnation: Incarnation,
    options: CheckOptions,
    random: u64,
    /// Frames compared with their fingerprints so far.
    pub frames_read: u64,
    /// Their stored bytes.
    pub bytes_read: u64,
}

/// What is wrong with a frame, and which slots are lost.
struct BadFrame {
    what: String,
    slots: Vec<u16>,
}

impl<'a> ObjectCheck<'a> {
    /// A check whose samples follow from `seed`.
    pub fn new(vm: &'a Vm, packs: &'a Packs, incarnation: Incarnation, options: CheckOptions, seed: u64) -> Self {
        Self { vm, packs, incarnation, options, random: seed, frames_read: 0, bytes_read: 0 }
    }

    fn backend(&self) -> &dyn Backend {
        &**self.vm.backend()
    }

    /// Checks one object with the packs that the log says are in it.
    ///
    /// Cost: index and slot tables; the frames that the options ask for.
    pub fn check(&mut self, object: ObjectId, entries: &[PackEntry], faults: &mut Faults) {
        let Some(first) = entries.first() else { return };
        let place = object_place(self.vm.name(), self.incarnation, first);
        let subject = Subject::Object(object);
        let index = self.check_length(&place).and_then(|()| read_index(self.backend(), &place));
        let index = match index {
            Ok(index) => index,
            Err(e) => {
                let what = if e.kind() == ErrorKind::NotFound { "is missing".into() } else { e.to_string() };
                faults.note(subject, Severity::Must, what);
                faults.lost_packs.extend(entries.iter().map(|e| e.number));
                return;
            }
        };
        if let Err(e) = self.check_header(&place) {
            faults.note(subject.clone(), Severity::Must, e.to_string());
        }
        for entry in entries {
            let told = (entry.content, entry.object_bytes, entry.tail_bytes);
            if told != (place.content, place.bytes, place.tail_bytes) {
                let what = format!("the log says different things about it, pack {}", entry.number);
                faults.note(subject.clone(), Severity::Must, what);
            }
            match index.member(entry.number) {
                Ok(member) => {
                    if member.all_slots() != entry.slots {
                        let (slots, told) = (member.all_slots(), entry.slots);
                        let what = format!("pack {} has {slots} slots, the log says {told}", entry.number);
                        faults.note(subject.clone(), Severity::Must, what);
                    }
                    self.check_member(&place, member, faults);
                }
                Err(e) => {
                    faults.note(subject.clone(), Severity::Must, e.to_string());
                    faults.lost_packs.insert(entry.number);
                }
            }
        }
    }

    fn check_length(&self, place: &ObjectPlace) -> Result<()> {
        let mut bytes = self.backend().len(&place.key)?;
        if let Some(replicated) = self.backend().replicated() {
            // One whole copy is enough; others are told of by who checks copies.
            let homes = replicated.places(&place.key).homes;
            let whole = homes.iter().any(|home| home.len(&place.key).is_ok_and(|there| there == place.bytes));
            bytes = if whole { place.bytes } else { bytes };
        }
        if bytes == place.bytes {
            Ok(())
        } else {
            Err(corrupt(format!("has {bytes} bytes, the log says {}", place.bytes)))
        }
    }

    fn check_header(&self, place: &ObjectPlace) -> Result<()> {
        let mut header = [0; HEADER_BYTES];
        let wanted = Identity { incarnation: place.incarnation, object: place.object, content: place.content };
        self.backend().read_checked(&place.key, 0, &mut header, &mut |header| {
            if Identity::from_header(header)? == wanted {
                Ok(())
            } else {
                Err(corrupt("pack header: is of another object"))
            }
        })
    }

    fn check_member(&mut self, place: &ObjectPlace, member: &Member, faults: &mut Faults) {
        let subject = Subject::Object(place.object);
        // `None` where the page of the table cannot be read.
        let mut prints: Vec<Option<Fingerprint>> = Vec::with_capacity(member.slots as usize);
        for page in 0..member.present_pages() {
            match read_slot_page(self.backend(), place, member, page) {
                Ok(page) => prints.extend(page.fingerprints.into_iter().map(Some)),
                Err(e) => {
                    faults.note(subject.clone(), Severity::Must, e.to_string());
                    prints.resize((prints.len() + SLOT_PAGE_FINGERPRINTS).min(member.slots as usize), None);
                }
            }
        }
        for bad in self.check_frames(place, member, &prints) {
            faults.note(subject.clone(), Severity::Must, format!("pack {}: {}", member.number, bad.what));
            for slot in bad.slots {
                faults.lost_slots.insert(SlotId::new(member.number, slot).0);
            }
        }
        self.check_forwards(place, member, faults);
    }

    /// I2, I3: every forward leads to a common slot of the same block.
    fn check_forwards(&self, place: &ObjectPlace, member: &Member, faults: &mut Faults) {
        let subject = Subject::Object(place.object);
        for page in member.present_pages()..member.pages() {
            let page = match read_slot_page(self.backend(), place, member, page) {
                Ok(page) => page,
                Err(e) => {
                    faults.note(subject.clone(), Severity::Must, e.to_string());
                    continue;
                }
            };
            for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
                let Some((target, _)) = member.forward_of(*slot) else { continue };
                let there = if faults.is_lost(target) {
                    Err(corrupt(format!("slot {} of common pack {} is lost", target.slot(), target.pack())))
                } else {
                    self.packs.page_of(target)
                };
                let what = match there.map(|page| page.and_then(|page| page.fingerprint_of(target.slot()))) {
                    Ok(Some(there)) if there == *print => continue,
                    Ok(Some(_)) => format!("leads to another block, slot {} of {}", target.slot(), target.pack()),
                    Ok(None) => format!("leads to nothing, slot {} of {}", target.slot(), target.pack()),
                    Err(e) => e.to_string(),
                };
                let what = format!("pack {}: forward of slot {slot}: {what}", member.number);
                faults.note(subject.clone(), Severity::Must, what);
                faults.lost_slots.insert(SlotId::new(member.number, *slot).0);
            }
        }
    }

    fn check_frames(&mut self, place: &ObjectPlace, member: &Member, prints: &[Option<Fingerprint>]) -> Vec<BadFrame> {
        let chosen = self.choose(member.frames.len());
        let mut bad = Vec::new();
        let mut rest = &chosen[..];
        while let Some(first) = rest.first().copied() {
            let mut bytes = 0;
            let mut count = 0;
            for (turn, frame) in rest.iter().enumerate() {
                let stored = member.frames.get(*frame).map_or(0, |row| u64::from(row.stored_bytes));
                if *frame != first + turn || (turn > 0 && bytes + stored > BATCH_BYTES) {
                    break;
                }
                bytes += stored;
                count += 1;
            }
            let (batch, tail) = rest.split_at(count);
            rest = tail;
            self.frames_read += count as u64;
            self.bytes_read += bytes;
            bad.extend(self.check_batch(place, member, prints, batch));
        }
        bad
    }

    /// Frames that lie side by side.
    fn check_batch(
        &self,
        place: &ObjectPlace,
        member: &Member,
        prints: &[Option<Fingerprint>],
        batch: &[usize],
    ) -> Vec<BadFrame> {
        let rows: Vec<&FrameRow> = batch.iter().filter_map(|at| member.frames.get(*at)).collect();
        let start = batch.first().and_then(|at| member.offsets.get(*at)).copied().unwrap_or(0);
        let mut stored = vec![0; rows.iter().map(|row| row.stored_bytes as usize).sum()];
        // Where there are copies, one in which all is right is wanted; where there is one, it is looked at below.
        let has_copies = self.backend().replicated().is_some();
        let mut verify = |stored: &[u8]| match has_copies {
            true => check_sums(place, member, &rows, stored),
            false => Ok(()),
        };
        if let Err(e) = self.backend().read_checked(&place.key, start, &mut stored, &mut verify) {
            // A medium that cannot read one sector can read the others.
            return match rows.as_slice() {
                [row] => vec![BadFrame { what: e.to_string(), slots: row.slots().collect() }],
                _ => batch.iter().flat_map(|at| self.check_batch(place, member, prints, &[*at])).collect(),
            };
        }
        let mut rest = &stored[..];
        let mut work = Vec::with_capacity(rows.len());
        for (row, at) in rows.into_iter().zip(batch) {
            let (bytes, tail) = rest.split_at(row.stored_bytes as usize);
            rest = tail;
            let ordinal = member.ordinals.get(*at).copied().unwrap_or(0) as usize;
            work.push((row, bytes, prints.get(ordinal..).unwrap_or_default()));
        }
        work.par_iter().filter_map(|(row, bytes, prints)| verify_frame(place, member, row, bytes, prints)).collect()
    }

    /// Which frames to read.
    fn choose(&mut self, frames: usize) -> Vec<usize> {
        let percent = match self.options.sample_percent {
            _ if self.options.read_data => 100.0,
            Some(percent) if percent > 0.0 => percent,
            _ => return Vec::new(),
        };
        let wanted = (frames as f64 * percent / 100.0).ceil() as usize;
        let mut wanted = wanted.clamp(frames.min(1), frames);
        let mut chosen = Vec::with_capacity(wanted);
        for frame in 0..frames {
            if self.next_random() % ((frames - frame) as u64) < wanted as u64 {
                chosen.push(frame);
                wanted -= 1;
            }
        }
        chosen
    }

    /// Any sequence will do that another run does not repeat: splitmix64.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Whether frames that lie side by side have their checksums.
fn check_sums(place: &ObjectPlace, member: &Member, rows: &[&FrameRow], stored: &[u8]) -> Result<()> {
    let mut rest = stored;
    for row in rows {
        let (bytes, tail) = rest.split_at_checked(row.stored_bytes as usize).unwrap_or((rest, &[]));
        rest = tail;
        if row.checksum_of(place.incarnation, member.number, bytes) != row.checksum {
            return Err(corrupt(format!("frame of slot {}: checksum does not match", row.first_slot)));
        }
    }
    Ok(())
}

/// I3: checksum, decompression, and the fingerprint of every slot.
fn verify_frame(
    place: &ObjectPlace,
    member: &Member,
    row: &FrameRow,
    stored: &[u8],
    prints: &[Option<Fingerprint>],
) -> Option<BadFrame> {
    let raw = match row.open(place.content, place.incarnation, member.number, stored) {
        Ok(raw) => raw,
        Err(e) => return Some(BadFrame { what: e.to_string(), slots: row.slots().collect() }),
    };
    let count = row.count() as usize;
    let is_bad = |rank: usize| {
        let Ok(range) = slot_range(place.content, &raw, rank, count) else { return true };
        let Some(Some(print)) = prints.get(rank) else { return false };
        raw.get(range).map(fingerprint) != Some(*print)
    };
    let slots: Vec<u16> = row.slots().enumerate().filter(|(rank, _)| is_bad(*rank)).map(|(_, slot)| slot).collect();
    let first = slots.first()?;
    Some(BadFrame { what: format!("slot {first}: bytes do not match their fingerprint"), slots })
}
