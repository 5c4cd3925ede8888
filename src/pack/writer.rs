//! Writes one pack object, frame after frame, member after member.

use crate::backend::{Backend, Key, Upload};
use crate::error::{Result, invalid};
use crate::fingerprint::Fingerprint;
use crate::limits::SLOT_PAGE_FINGERPRINTS;
use crate::pack::Content;
use crate::pack::frame::{Checksum, FrameRow};
use crate::pack::index::{ForwardRow, HEADER_BYTES, Identity, MemberTail, PackIndex, page_checksum};
use crate::units::{PackNumber, SlotId};

/// A frame, compressed and ready to be appended.
#[derive(Debug)]
pub struct PackedFrame {
    /// First slot that it spans.
    pub first_slot: u16,
    /// Slots that it spans.
    pub span: u32,
    /// Which are present.
    pub present: u64,
    /// Bytes when decompressed.
    pub raw_bytes: u32,
    /// How it is stored.
    pub codec: u8,
    /// The stored bytes, without the prefix that recipe frames get.
    pub payload: Vec<u8>,
}

/// What a finished object is, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Bytes of the object.
    pub bytes: u64,
    /// Bytes of its index and trailer.
    pub tail_bytes: u32,
    /// Slots of every member: those present, and forwards.
    pub slots: Vec<(PackNumber, u32)>,
}

struct Part {
    number: PackNumber,
    frames: Vec<FrameRow>,
    fingerprints: Vec<Fingerprint>,
    forwards: Vec<ForwardRow>,
    forward_fingerprints: Vec<Fingerprint>,
}

impl Part {
    fn new(number: PackNumber) -> Self {
        Self {
            number,
            frames: Vec::new(),
            fingerprints: Vec::new(),
            forwards: Vec::new(),
            forward_fingerprints: Vec::new(),
        }
    }
}

/// A pack object that is being written. Nothing is visible before [`PackWriter::finish`].
pub struct PackWriter {
    upload: Box<dyn Upload>,
    identity: Identity,
    parts: Vec<Part>,
    frames_bytes: u64,
}

impl PackWriter {
    /// Begins an object under `key`; its first member is the identity's number.
    ///
    /// # Errors
    /// As [`Backend::create`].
    pub fn create(backend: &dyn Backend, key: &Key, identity: Identity) -> Result<Self> {
        let mut upload = backend.create(key)?;
        upload.append(&identity.header())?;
        let part = Part::new(identity.object.number);
        Ok(Self { upload, identity, parts: vec![part], frames_bytes: 0 })
    }

    /// Who the object is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Further frames belong to this pack, whose number is higher than all before.
    ///
    /// # Errors
    /// `Invalid` when it is not.
    pub fn begin_member(&mut self, number: PackNumber) -> Result<()> {
        match self.parts.last() {
            Some(last) if last.number >= number => Err(invalid(format!("pack members out of order: {number}"))),
            _ => {
                self.parts.push(Part::new(number));
                Ok(())
            }
        }
    }

    /// Appends a frame with one fingerprint per present slot; returns its row and its offset.
    ///
    /// # Errors
    /// As [`Upload::append`].
    pub fn append(&mut self, frame: PackedFrame, fingerprints: &[Fingerprint]) -> Result<(FrameRow, u64)> {
        let Some(part) = self.parts.last_mut() else { return Err(invalid("pack without a member")) };
        let mut row = FrameRow {
            first_slot: frame.first_slot,
            span_less_one: (frame.span - 1) as u8,
            codec: frame.codec,
            stored_bytes: 0,
            raw_bytes: frame.raw_bytes,
            present: frame.present,
            checksum: Checksum([0; 16]),
        };
        let mut stored = frame.payload;
        if self.identity.content == Content::Recipes {
            stored.splice(0..0, row.prefix());
        }
        row.stored_bytes = stored.len() as u32;
        row.checksum = row.checksum_of(self.identity.incarnation, part.number, &stored);
        self.upload.append(&stored)?;
        let offset = HEADER_BYTES as u64 + self.frames_bytes;
        self.frames_bytes += stored.len() as u64;
        part.frames.push(row);
        part.fingerprints.extend_from_slice(fingerprints);
        Ok((row, offset))
    }

    /// Appends a frame that another object holds, byte for byte, under its own row.
    ///
    /// # Errors
    /// As [`Upload::append`].
    pub fn append_verbatim(&mut self, row: FrameRow, stored: &[u8], fingerprints: &[Fingerprint]) -> Result<()> {
        let Some(part) = self.parts.last_mut() else { return Err(invalid("pack without a member")) };
        self.upload.append(stored)?;
        self.frames_bytes += stored.len() as u64;
        part.frames.push(row);
        part.fingerprints.extend_from_slice(fingerprints);
        Ok(())
    }

    /// A slot of the member that is being written leads to a common slot, which holds the block of `print`. To be
    /// called in the order of slots.
    ///
    /// # Errors
    /// `Invalid` for a target in a VM's pack.
    pub fn forward(&mut self, slot: u16, target: SlotId, print: Fingerprint) -> Result<()> {
        let Some(part) = self.parts.last_mut() else { return Err(invalid("pack without a member")) };
        if !target.pack().is_common() {
            return Err(invalid(format!("forward of slot {slot} into a VM's pack")));
        }
        if !part.forwards.last_mut().is_some_and(|last| last.extend(slot, target)) {
            part.forwards.push(ForwardRow { first_slot: slot, slots_less_one: 0, target });
        }
        part.forward_fingerprints.push(print);
        Ok(())
    }

    /// Bytes of frames so far.
    pub fn frames_bytes(&self) -> u64 {
        self.frames_bytes
    }

    /// Reads bytes that were appended.
    ///
    /// # Errors
    /// As [`Upload::read`].
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.upload.read(offset, out)
    }

    /// Writes slot table, index and trailer, and makes the object durable and visible (I4).
    ///
    /// # Errors
    /// As [`Upload::finish`].
    pub fn finish(mut self) -> Result<Finished> {
        let mut members = Vec::with_capacity(self.parts.len());
        let mut slots = Vec::with_capacity(self.parts.len());
        let mut bytes = HEADER_BYTES as u64 + self.frames_bytes;
        for part in self.parts {
            let mut checksums = Vec::new();
            let pages = part.fingerprints.chunks(SLOT_PAGE_FINGERPRINTS);
            let pages = pages.chain(part.forward_fingerprints.chunks(SLOT_PAGE_FINGERPRINTS));
            for (page, fingerprints) in pages.enumerate() {
                let table: Vec<u8> = fingerprints.iter().flat_map(|f| f.0).collect();
                checksums.push(page_checksum(self.identity.incarnation, part.number, page as u32, &table));
                bytes += table.len() as u64;
                self.upload.append(&table)?;
            }
            slots.push((part.number, (part.fingerprints.len() + part.forward_fingerprints.len()) as u32));
            members.push(MemberTail { number: part.number, frames: part.frames, forwards: part.forwards, checksums });
        }
        let tail = PackIndex::encode_tail(&self.identity, &members);
        self.upload.append(&tail)?;
        self.upload.finish()?;
        Ok(Finished { bytes: bytes + tail.len() as u64, tail_bytes: tail.len() as u32, slots })
    }
}
