//! `clone.json`: what a clone is a clone of. Written once, when it is made.

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::clones::map::CloneId;
use crate::error::{Result, corrupt, unsupported};
use crate::fingerprint::short;
use crate::limits::IMAGE_BYTES_MAX;
use crate::units::{FileId, Incarnation, RootId, Serial};

/// Name of the file in a clone's folder.
pub const FILE_NAME: &str = "clone.json";

/// The version of a clone's folder that this program writes and reads.
pub const VERSION: u32 = 1;

/// The file is a page of text.
pub const BYTES_MAX: u64 = 64 << 10;

/// What a clone is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The clone's identity.
    pub clone: CloneId,
    /// The store's identity: 32 hexadecimal digits.
    pub store: String,
    /// Name of the snapshot when the clone was made; it may have been renamed since.
    pub snapshot: String,
    /// The snapshot's VM.
    pub vm: String,
    /// Which VM of that name.
    pub incarnation: Incarnation,
    /// Which file of the VM.
    pub file: FileId,
    /// Its root page.
    pub root: RootId,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Blocks of the snapshot that hold data.
    pub data_blocks: u64,
    /// When the clone was made.
    pub created: Timestamp,
    /// What keeps collection away from the snapshot if it is forgotten.
    pub hold: Option<String>,
}

/// The text's form: numbers that JSON readers would round are text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    version: u32,
    clone: String,
    store: String,
    snapshot: String,
    vm: String,
    incarnation: String,
    file: String,
    root: String,
    image_bytes: u64,
    data_blocks: u64,
    created_seconds: u64,
    created_nanoseconds: u32,
    hold: Option<String>,
    checksum: String,
}

impl Description {
    /// The text of the file.
    ///
    /// # Errors
    /// `Corrupt` never: all fields can be spelled.
    pub fn to_text(&self) -> Result<String> {
        let mut text = self.text();
        text.checksum = text.checksum_of();
        let mut spelled = serde_json::to_string_pretty(&text).map_err(|e| corrupt(FILE_NAME).because(e))?;
        spelled.push('\n');
        Ok(spelled)
    }

    /// Reads the text of the file.
    ///
    /// # Errors
    /// `Corrupt`; `Unsupported`, naming it, for another version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let json: serde_json::Value = serde_json::from_slice(bytes).map_err(|e| corrupt("is no JSON").because(e))?;
        // The version is looked at first: a newer one may have other fields.
        match json.get("version").map(serde_json::Value::as_u64) {
            Some(Some(version)) if version == u64::from(VERSION) => {}
            Some(Some(version)) => {
                let newer = format!("version {version} of a clone is not known here, this program reads {VERSION}");
                return Err(unsupported(newer));
            }
            _ => return Err(corrupt("has no version")),
        }
        let text: Text = serde_json::from_value(json).map_err(|e| corrupt("wrong field").because(e))?;
        if text.checksum != text.checksum_of() {
            return Err(corrupt("checksum does not match: the file was changed"));
        }
        let nanoseconds = u64::from(text.created_nanoseconds);
        let created = text.created_seconds.checked_mul(1_000_000_000).and_then(|s| s.checked_add(nanoseconds));
        let description = Self {
            clone: CloneId(bytes_of("clone", &text.clone)?),
            incarnation: Incarnation(bytes_of("incarnation", &text.incarnation)?),
            file: serial_of("file", &text.file)?,
            root: serial_of("root", &text.root)?,
            image_bytes: text.image_bytes,
            data_blocks: text.data_blocks,
            created: Timestamp(created.ok_or_else(|| corrupt("created: is no time"))?),
            store: text.store,
            snapshot: text.snapshot,
            vm: text.vm,
            hold: text.hold,
        };
        if description.image_bytes > IMAGE_BYTES_MAX {
            return Err(corrupt(format!("an image of {} bytes", description.image_bytes)));
        }
        Ok(description)
    }

    fn text(&self) -> Text {
        Text {
            version: VERSION,
            clone: hex(&self.clone.0),
            store: self.store.clone(),
            snapshot: self.snapshot.clone(),
            vm: self.vm.clone(),
            incarnation: hex(&self.incarnation.0),
            file: self.file.to_string(),
            root: self.root.to_string(),
            image_bytes: self.image_bytes,
            data_blocks: self.data_blocks,
            created_seconds: self.created.seconds(),
            created_nanoseconds: (self.created.0 % 1_000_000_000) as u32,
            hold: self.hold.clone(),
            checksum: String::new(),
        }
    }
}

impl Text {
    fn checksum_of(&self) -> String {
        let numbers = [
            u64::from(self.version),
            self.image_bytes,
            self.data_blocks,
            self.created_seconds,
            u64::from(self.created_nanoseconds),
            u64::from(self.hold.is_some()),
        ];
        let numbers = numbers.map(u64::to_le_bytes).concat();
        let hold = self.hold.as_deref().unwrap_or_default();
        let texts =
            [&self.clone, &self.store, &self.snapshot, &self.vm, &self.incarnation, &self.file, &self.root, hold];
        let mut parts: Vec<&[u8]> = vec![&numbers];
        parts.extend(texts.map(str::as_bytes));
        hex(&short(b"snapfs clone", &parts))
    }
}

/// The one spelling of bytes.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn bytes_of(field: &str, text: &str) -> Result<[u8; 16]> {
    let wrong = || corrupt(format!("{field}: is no identity"));
    let mut bytes = [0; 16];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
    }
    if hex(&bytes) == text { Ok(bytes) } else { Err(wrong()) }
}

fn serial_of(field: &str, text: &str) -> Result<Serial> {
    let serial = u64::from_str_radix(text, 16).map(Serial).ok().filter(|s| s.is_valid() && s.to_string() == text);
    serial.ok_or_else(|| corrupt(format!("{field}: is no serial number")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn description() -> Description {
        Description {
            clone: CloneId([7; 16]),
            store: "00112233445566778899aabbccddeeff".to_owned(),
            snapshot: "web01/\u{e4} \"b\".img".to_owned(),
            vm: "web01".to_owned(),
            incarnation: Incarnation([0xab; 16]),
            file: Serial(0x2_0000),
            root: Serial(0xffff_ffff_ffff),
            image_bytes: 1 << 40,
            data_blocks: 12,
            created: Timestamp(1_700_000_000_123_456_789),
            hold: Some("0000000000000001".to_owned()),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for hold in [None, Some(String::new()), description().hold] {
            let of = Description { hold, ..description() };
            assert_eq!(Description::parse(of.to_text().unwrap().as_bytes()).unwrap(), of);
        }
    }

    #[test]
    fn every_changed_digit_is_found() {
        let text = description().to_text().unwrap();
        for (at, byte) in text.bytes().enumerate().filter(|(_, b)| b.is_ascii_alphanumeric()) {
            let mut bad = text.clone().into_bytes();
            bad[at] = if byte == b'1' { b'2' } else { b'1' };
            let refused = Description::parse(&bad).unwrap_err();
            let kinds = [ErrorKind::Corrupt, ErrorKind::Unsupported];
            assert!(kinds.contains(&refused.kind()), "byte {at}: {refused}");
        }
        for length in 0..text.len() - 1 {
            assert!(Description::parse(&text.as_bytes()[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let refused = Description::parse(br#"{"version": 2, "colour": "red"}"#).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert!(refused.to_string().contains("version 2"), "{refused}");
        assert_eq!(Description::parse(b"{}").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
