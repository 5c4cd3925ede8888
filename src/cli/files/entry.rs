//! What a filesystem inside of an image tells, on plain types, and how it is printed.

use std::io::Write;

use serde::Serialize;

use crate::cli::output;
use crate::clock::Timestamp;
use crate::error::Result;

/// A filesystem inside of an image. Paths begin with `/`, and links lead nowhere outside of it.
pub trait Filesystem {
    /// The entries of a folder by name, or the one entry that the path is.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a damaged filesystem, `Unsupported`; those of reading the image.
    fn entries(&self, path: &str) -> Result<Vec<Entry>>;

    /// Writes the bytes of a regular file to `out`. Returns how many.
    ///
    /// # Errors
    /// As [`Self::entries`]; `IsFolder`; `Invalid` for what is no regular file; those of writing.
    fn copy(&self, path: &str, out: &mut dyn Write) -> Result<u64>;
}

/// One entry of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Its name; what is not UTF-8 or would move the cursor is escaped.
    pub name: String,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub bytes: u64,
    /// Last change, in seconds since 1970.
    pub mtime: i64,
    /// Where a link leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A device, a pipe, a socket.
    Special,
}

/// A name that comes from a guest, safe to print: one line, no control characters, no bytes that are no text.
pub fn printable(name: &[u8]) -> String {
    let mut text = String::new();
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || c == '\\' { text.extend(c.escape_default()) } else { text.push(c) }
        }
        text.extend(chunk.invalid().iter().map(|b| format!("\\x{b:02x}")));
    }
    text
}

/// Entries as a table.
pub fn as_table(entries: &[Entry]) -> String {
    let rows: Vec<Vec<String>> = entries.iter().map(row).collect();
    output::table(&["mode", "uid", "gid", "bytes", "changed", "name"], &[4, 5], &rows)
}

fn row(entry: &Entry) -> Vec<String> {
    let name = match &entry.target {
        Some(target) => format!("{} -> {target}", entry.name),
        None => entry.name.clone(),
    };
    let seconds = u64::try_from(entry.mtime).unwrap_or(0);
    let changed = output::time(Timestamp(seconds.saturating_mul(1_000_000_000)));
    vec![mode(entry), entry.uid.to_string(), entry.gid.to_string(), entry.bytes.to_string(), changed, name]
}

/// As `ls -l` has it.
fn mode(entry: &Entry) -> String {
    let mut text = String::from(match entry.kind {
        EntryKind::File => "-",
        EntryKind::Folder => "d",
        EntryKind::Link => "l",
        EntryKind::Special => "?",
    });
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = entry.mode >> shift;
        text.push(if bits & 4 == 0 { '-' } else { 'r' });
        text.push(if bits & 2 == 0 { '-' } else { 'w' });
        text.push(match (bits & 1 != 0, entry.mode & special != 0) {
            (true, false) => 'x',
            (false, false) => '-',
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, kind: EntryKind, mode: u32) -> Entry {
        Entry { name: name.to_owned(), kind, mode, uid: 0, gid: 5, bytes: 7, mtime: 0, target: None }
    }

    #[test]
    fn a_name_of_a_guest_cannot_write_to_the_terminal() {
        assert_eq!(printable("Grüße.txt".as_bytes()), "Grüße.txt");
        assert_eq!(printable(b"a\x1b[2Jb\nc\\d\xff\xfe"), "a\\u{1b}[2Jb\\nc\\\\d\\xff\\xfe");
    }

    #[test]
    fn entries_look_as_in_ls() {
        let link = Entry { target: Some("/etc".to_owned()), ..entry("l", EntryKind::Link, 0o777) };
        let text = as_table(&[entry("bin", EntryKind::Folder, 0o1755), entry("su", EntryKind::File, 0o4711), link]);
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "drwxr-xr-t    0    5      7  1970-01-01T00:00:00Z  bin",
                "-rws--x--x    0    5      7  1970-01-01T00:00:00Z  su",
                "lrwxrwxrwx    0    5      7  1970-01-01T00:00:00Z  l -> /etc",
            ]
        );
    }
}
