//! What every object begins with, and how an object of an unknown kind, version or feature is refused.
//!
//! docs/FORMAT.md is normative; its examples are tested in `tests/it/format.rs`.

use crate::error::{Result, corrupt, unsupported};
use crate::fingerprint::short;
use crate::wire::{Reader, Wire};

/// The first bytes of every object.
pub const MAGIC: [u8; 8] = *b"SNAPFS\r\n";

/// The version of the format that this program writes and reads.
pub const VERSION: u16 = 1;

/// Features that a reader must know to understand an object. None is defined in version 1.
pub const FEATURES_KNOWN: u32 = 0;

/// Bytes before the body of an enveloped object.
pub const ENVELOPE_BYTES: usize = 40;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum ObjectKind {
    /// A record of a VM's log.
    Record = 1,
    /// The root page of a snapshot.
    Root = 2,
    /// A pack of data or of recipes.
    Pack = 3,
    /// A record of the store's configuration.
    Config = 4,
    /// The whole state of a VM after some record of its log.
    Checkpoint = 5,
    /// What keeps a snapshot although it is forgotten.
    Hold = 6,
    /// A popular index.
    Popular = 7,
    /// The description of a job that several hosts work on.
    Job = 8,
    /// What a job found out about one partition.
    Partition = 9,
}

impl ObjectKind {
    /// Every kind that there is in this version.
    pub const ALL: [Self; 9] = [
        Self::Record,
        Self::Root,
        Self::Pack,
        Self::Config,
        Self::Checkpoint,
        Self::Hold,
        Self::Popular,
        Self::Job,
        Self::Partition,
    ];
}

/// The 16 bytes that magic, kind, version and features take at the start of every object.
pub fn preamble(kind: ObjectKind) -> [u8; 16] {
    let mut out = [0; 16];
    let fields = [&MAGIC[..], &(kind as u16).to_le_bytes(), &VERSION.to_le_bytes(), &0u32.to_le_bytes()].concat();
    out.copy_from_slice(&fields);
    out
}

/// Checks kind, version and features of a preamble whose checksum was found right.
///
/// # Errors
/// `Corrupt` for another magic or another of our kinds, `Unsupported` (with the name of what is unknown) for an object
/// of another version, kind or feature.
pub fn check_preamble(bytes: &[u8; 16], kind: ObjectKind) -> Result<()> {
    let mut reader = Reader::new(bytes);
    if reader.array::<8>()? != MAGIC {
        return Err(corrupt("no snapfs object: wrong magic"));
    }
    let found = u16::take(&mut reader)?;
    let version = u16::take(&mut reader)?;
    // First the version: what another version calls its kinds is not known here.
    if version != VERSION {
        return Err(unsupported(format!("format version {version} is not known here, this program reads {VERSION}")));
    }
    if !ObjectKind::ALL.iter().any(|k| *k as u16 == found) {
        return Err(unsupported(format!("unknown kind of object, kind={found}")));
    }
    if found != kind as u16 {
        return Err(corrupt(format!("object of another kind, kind={found}, wanted={}", kind as u16)));
    }
    let unknown = u32::take(&mut reader)? & !FEATURES_KNOWN;
    if unknown != 0 {
        return Err(unsupported(format!("unknown incompatible feature, bits={unknown:#x}")));
    }
    Ok(())
}

/// A whole small object: preamble, length, checksum, `body`.
pub fn envelop(kind: ObjectKind, body: &[u8]) -> Vec<u8> {
    let preamble = preamble(kind);
    let length = (body.len() as u64).to_le_bytes();
    let checksum = short(b"snapfs object", &[&preamble, &length, body]);
    [&preamble[..], &length, &checksum, body].concat()
}

/// The body of an object made by [`envelop`].
///
/// The checksum is looked at before version and features: a flipped bit is damage, a whole object with an unknown
/// version is a newer program's.
///
/// # Errors
/// `Corrupt`, `Unsupported`.
pub fn open_envelope(kind: ObjectKind, bytes: &[u8]) -> Result<&[u8]> {
    let mut reader = Reader::new(bytes);
    let preamble = reader.array::<16>()?;
    if preamble[..8] != MAGIC {
        return Err(corrupt("no snapfs object: wrong magic"));
    }
    let length = u64::take(&mut reader)?;
    let checksum = reader.array::<16>()?;
    if length != reader.remaining() as u64 {
        return Err(corrupt(format!("body has {} bytes, header says {length}", reader.remaining())));
    }
    let body = reader.bytes(reader.remaining())?;
    if short(b"snapfs object", &[&preamble, &length.to_le_bytes(), body]) != checksum {
        return Err(corrupt("checksum does not match"));
    }
    check_preamble(&preamble, kind)?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let object = envelop(ObjectKind::Root, b"some body");
        assert_eq!(open_envelope(ObjectKind::Root, &object).unwrap(), b"some body");
        for bit in 0..object.len() * 8 {
            let mut bad = object.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open_envelope(ObjectKind::Root, &bad).unwrap_err().kind(), ErrorKind::Corrupt, "bit {bit}");
        }
        for length in 0..object.len() {
            assert!(open_envelope(ObjectKind::Root, &object[..length]).is_err());
        }
        assert!(open_envelope(ObjectKind::Record, &object).is_err());
    }

    #[test]
    fn what_is_newer_is_refused_by_name() {
        for (at, value, name) in [(10, 2u8, "version 2"), (13, 4, "bits=0x400"), (8, 99, "kind=99")] {
            let mut newer = preamble(ObjectKind::Root);
            newer[at] = value;
            let checksum = short(b"snapfs object", &[&newer, &0u64.to_le_bytes(), b""]);
            let object = [&newer[..], &0u64.to_le_bytes(), &checksum].concat();
            let error = open_envelope(ObjectKind::Root, &object).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
