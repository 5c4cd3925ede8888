//! Names: `vm/file` or `vm/disk/file`, as they stand on the command line and in the mounted tree.
//!
//! A name becomes a folder entry and an argument, so whatever could be taken for something else there is refused:
//! separators, control characters, `.` and `..`, the link `latest` and the control folder.

use crate::error::{Error, ErrorKind, Result, invalid};
use crate::limits::NAME_BYTES_MAX;
use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// In a folder of snapshots, the link to the newest one.
pub const LATEST: &str = "latest";

/// In the folder of VMs, the folder of control files.
pub const CONTROL_FOLDER: &str = ".snapfs";

/// Endings of files that are being written; they are renamed when they are whole.
const DRAFT_ENDINGS: [&str; 3] = [".part", ".partial", ".tmp"];

/// Characters of a refused name that a message shows.
const SHOWN_CHARS_MAX: usize = 80;

/// Types of names: one part each, alike but for what is kept for other use.
macro_rules! part {
    ($(#[$doc:meta])* $name:ident, $what:literal, reserved $reserved:ident, $why:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            #[doc = concat!("Checks `text` and keeps it as the name of a ", $what, ".")]
            ///
            /// # Errors
            /// `TooLong` over 255 bytes, `Invalid` for anything else that is not a name.
            pub fn new(text: &str) -> Result<Self> {
                check_part(text)?;
                if text == $reserved {
                    return Err(invalid(format!("{text:?} is not a name of a {}, it is {}", $what, $why)));
                }
                Ok(Self(text.into()))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, out)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

part! {
    /// The name of a VM, a folder at the top of the mounted tree.
    VmName, "VM", reserved CONTROL_FOLDER, "the folder of control files"
}

part! {
    /// The name of a disk, a folder in its VM's.
    DiskName, "disk", reserved LATEST, "the link to the newest snapshot"
}

part! {
    /// The name of a snapshot, or of a draft of one, within its VM or disk.
    FileName, "snapshot", reserved LATEST, "the link to the newest snapshot"
}

impl FileName {
    /// Whether the name says that its file is still being written: a leading dot, or a usual ending of such files.
    pub fn is_draft_name(&self) -> bool {
        self.0.starts_with('.') || DRAFT_ENDINGS.iter().any(|ending| self.0.ends_with(ending))
    }
}

/// What every part of a name has to be: a plain entry of a folder.
fn check_part(text: &str) -> Result<()> {
    if text.is_empty() {
        return Err(invalid("a part of it is empty"));
    }
    if text.len() > NAME_BYTES_MAX {
        let shown = quoted(text);
        let context = format!("{shown} is too long, bytes={} max={NAME_BYTES_MAX}", text.len());
        return Err(Error::new(ErrorKind::TooLong, context));
    }
    if matches!(text, "." | "..") {
        return Err(invalid(format!("{text:?} is not a name")));
    }
    if text.contains('/') {
        return Err(invalid(format!("{} has a slash", quoted(text))));
    }
    if text.contains(char::is_control) {
        return Err(invalid(format!("{} has a control character", quoted(text))));
    }
    Ok(())
}

/// `text` for a message: in quotes, escaped to one line, and cut short.
fn quoted(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{:?}...", text.get(..end).unwrap_or_default()),
        None => format!("{text:?}"),
    }
}

/// The full name of a snapshot: `vm/file`, or `vm/disk/file` for a VM with several disks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotName {
    /// The VM.
    pub vm: VmName,
    /// The disk, where the VM has its snapshots by disk.
    pub disk: Option<DiskName>,
    /// The snapshot.
    pub file: FileName,
}

impl SnapshotName {
    /// Parses `vm/file` or `vm/disk/file`. `Display` is the inverse.
    ///
    /// # Errors
    /// `TooLong` if a part has over 255 bytes, `Invalid` for anything else that is not a name; one line, which quotes
    /// the part.
    pub fn parse(text: &str) -> Result<Self> {
        let parse = || {
            let (vm, disk, file) = split(text)?;
            Ok(Self { vm, disk, file: FileName::new(file)? })
        };
        parse().map_err(|error: Error| named(error, text))
    }

    /// Parses the name of a snapshot to read, where `vm/latest` and `vm/disk/latest` stand for the newest one.
    ///
    /// # Errors
    /// As [`SnapshotName::parse`].
    pub fn parse_reference(text: &str) -> Result<Reference> {
        let parse = || {
            let (vm, disk, file) = split(text)?;
            let file = if file == LATEST { None } else { Some(FileName::new(file)?) };
            Ok(Reference { vm, disk, file })
        };
        parse().map_err(|error: Error| named(error, text))
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_name(out, &self.vm, self.disk.as_ref(), self.file.as_str())
    }
}

/// What a reader asks for: a snapshot by its name, or the newest of a VM or disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// The VM.
    pub vm: VmName,
    /// The disk, where the VM has its snapshots by disk.
    pub disk: Option<DiskName>,
    /// The snapshot; `None` is the newest.
    pub file: Option<FileName>,
}

impl fmt::Display for Reference {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_name(out, &self.vm, self.disk.as_ref(), self.file.as_ref().map_or(LATEST, FileName::as_str))
    }
}

impl From<SnapshotName> for Reference {
    fn from(name: SnapshotName) -> Self {
        Self { vm: name.vm, disk: name.disk, file: Some(name.file) }
    }
}

fn write_name(out: &mut fmt::Formatter<'_>, vm: &VmName, disk: Option<&DiskName>, file: &str) -> fmt::Result {
    match disk {
        Some(disk) => write!(out, "{vm}/{disk}/{file}"),
        None => write!(out, "{vm}/{file}"),
    }
}

/// The checked VM and disk of `text`, and the last part as it stands.
fn split(text: &str) -> Result<(VmName, Option<DiskName>, &str)> {
    let mut parts = text.split('/');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(vm), Some(file), None, None) => Ok((VmName::new(vm)?, None, file)),
        (Some(vm), Some(disk), Some(file), None) => Ok((VmName::new(vm)?, Some(DiskName::new(disk)?), file)),
        _ => Err(invalid("it is not of the form vm/snapshot or vm/disk/snapshot")),
    }
}

fn named(error: Error, text: &str) -> Error {
    error.within(format_args!("snapshot name {}", quoted(text)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The kind and the message of a refusal.
    fn refusal<T: fmt::Debug>(outcome: Result<T>) -> (ErrorKind, String) {
        let error = outcome.unwrap_err();
        (error.kind(), error.to_string())
    }

    #[test]
    fn a_name_has_two_or_three_parts() {
        let two = SnapshotName::parse("web01/monday").unwrap();
        assert_eq!((two.vm.as_str(), two.disk.as_ref(), two.file.as_str()), ("web01", None, "monday"));
        assert_eq!(two.to_string(), "web01/monday");

        let three = SnapshotName::parse("web01/xvda/monday").unwrap();
        assert_eq!(three.disk.as_ref().map(DiskName::as_str), Some("xvda"));
        assert_eq!((three.vm.as_str(), three.file.as_str()), ("web01", "monday"));
        assert_eq!(three.to_string(), "web01/xvda/monday");
        assert_ne!(two, three);

        let message = "it is not of the form vm/snapshot or vm/disk/snapshot";
        for text in ["", "web01", "a/b/c/d", "a/b/c/", "/a/b/c", "a//b/c", "////"] {
            let expected = (ErrorKind::Invalid, format!("snapshot name {text:?}: {message}"));
            assert_eq!(refusal(SnapshotName::parse(text)), expected);
            assert_eq!(refusal(SnapshotName::parse_reference(text)), expected);
        }
        for text in ["/", "//", "a/", "/a", "a//", "a//b", "/a/b", "a/b/", "//a"] {
            let expected = (ErrorKind::Invalid, format!("snapshot name {text:?}: a part of it is empty"));
            assert_eq!(refusal(SnapshotName::parse(text)), expected);
            assert_eq!(refusal(SnapshotName::parse_reference(text)), expected);
        }
    }

    #[test]
    fn dots_are_refused_in_every_place() {
        for dots in [".", ".."] {
            for text in [
                format!("{dots}/b"),
                format!("a/{dots}"),
                format!("{dots}/b/c"),
                format!("a/{dots}/c"),
                format!("a/b/{dots}"),
            ] {
                let expected = (ErrorKind::Invalid, format!("snapshot name {text:?}: {dots:?} is not a name"));
                assert_eq!(refusal(SnapshotName::parse(&text)), expected);
                assert_eq!(refusal(SnapshotName::parse_reference(&text)), expected);
            }
        }
    }

    #[test]
    fn odd_but_plain_names_are_names() {
        let odd = [
            "...",
            "..a",
            "a..",
            "a..b",
            ".hidden",
            "-rf",
            "--",
            " ",
            " a ",
            "it's",
            "\"",
            "\\",
            "%2e%2e",
            "a:b",
            "*",
            "~",
            "#",
            "$HOME",
            "`id`",
            "\u{e4}\u{f6}",
            "\u{65e5}\u{672c}",
            "Latest",
            "latest.",
            "lat est",
            "snapfs",
            ".SNAPFS",
            ".snapfs.",
            "\u{a0}",
            "\u{202e}",
            "\u{1f4be}",
        ];
        for text in odd {
            assert_eq!(VmName::new(text).unwrap().to_string(), text);
            assert_eq!(DiskName::new(text).unwrap().to_string(), text);
            assert_eq!(FileName::new(text).unwrap().to_string(), text);
            let full = format!("{text}/{text}/{text}");
            assert_eq!(SnapshotName::parse(&full).unwrap().to_string(), full);
            assert_eq!(SnapshotName::parse_reference(&full).unwrap().to_string(), full);
        }
    }

    #[test]
    fn every_control_character_is_refused_and_escaped() {
        let controls: Vec<char> = ('\0'..='\u{ff}').filter(|c| c.is_control()).collect();
        assert_eq!(controls.len(), 65);
        for control in controls {
            for part in [format!("{control}"), format!("a{control}"), format!("{control}a")] {
                let expected = (ErrorKind::Invalid, format!("{part:?} has a control character"));
                assert_eq!(refusal(VmName::new(&part)), expected);
                assert_eq!(refusal(DiskName::new(&part)), expected);
                assert_eq!(refusal(FileName::new(&part)), expected);
                for text in [format!("{part}/b"), format!("a/{part}"), format!("a/{part}/c"), format!("a/b/{part}")] {
                    let (kind, message) = refusal(SnapshotName::parse(&text));
                    assert_eq!(kind, ErrorKind::Invalid);
                    assert_eq!(message, format!("snapshot name {text:?}: {part:?} has a control character"));
                    assert!(!message.contains(char::is_control));
                    assert_eq!(refusal(SnapshotName::parse_reference(&text)), (kind, message));
                }
            }
        }
    }

    #[test]
    fn a_part_has_at_most_255_bytes() {
        for longest in ["a".repeat(255), "\u{e4}".repeat(127) + "a", "\u{1f4be}".repeat(63) + "abc"] {
            assert_eq!(longest.len(), NAME_BYTES_MAX);
            let full = format!("{longest}/{longest}/{longest}");
            assert_eq!(SnapshotName::parse(&full).unwrap().to_string(), full);

            let over = format!("{longest}a");
            assert_eq!(refusal(VmName::new(&over)).0, ErrorKind::TooLong);
            assert_eq!(refusal(DiskName::new(&over)).0, ErrorKind::TooLong);
            assert_eq!(refusal(FileName::new(&over)).0, ErrorKind::TooLong);
            for text in [format!("{over}/b"), format!("a/{over}"), format!("a/{over}/c"), format!("a/b/{over}")] {
                let (kind, message) = refusal(SnapshotName::parse(&text));
                assert_eq!(kind, ErrorKind::TooLong);
                assert!(message.ends_with(" is too long, bytes=256 max=255"), "{message}");
                assert_eq!(refusal(SnapshotName::parse_reference(&text)), (kind, message));
            }
        }
        // A message stays a line of reasonable length.
        assert!(refusal(SnapshotName::parse(&"\u{1f4be}/".repeat(1 << 20))).1.len() < 1000);
    }

    #[test]
    fn what_is_kept_for_other_use_is_refused() {
        let latest = |what| format!("\"latest\" is not a name of a {what}, it is the link to the newest snapshot");
        assert_eq!(refusal(FileName::new("latest")), (ErrorKind::Invalid, latest("snapshot")));
        assert_eq!(refusal(DiskName::new("latest")), (ErrorKind::Invalid, latest("disk")));
        let control = "\".snapfs\" is not a name of a VM, it is the folder of control files";
        assert_eq!(refusal(VmName::new(".snapfs")), (ErrorKind::Invalid, control.to_string()));

        let refused =
            ["web01/latest", "web01/xvda/latest", "web01/latest/monday", ".snapfs/monday", ".snapfs/xvda/monday"];
        for text in refused {
            assert_eq!(refusal(SnapshotName::parse(text)).0, ErrorKind::Invalid, "{text}");
        }
        for text in ["latest/monday", "latest/xvda/monday", "a/.snapfs", "a/.snapfs/b", "a/b/.snapfs"] {
            assert_eq!(SnapshotName::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_reference_may_be_the_newest() {
        for text in ["web01/latest", "web01/xvda/latest", "latest/latest"] {
            let reference = SnapshotName::parse_reference(text).unwrap();
            assert_eq!(reference.file, None);
            assert_eq!(reference.to_string(), text);
        }
        for text in ["web01/monday", "web01/xvda/monday"] {
            let reference = SnapshotName::parse_reference(text).unwrap();
            assert_eq!(reference, SnapshotName::parse(text).unwrap().into());
            assert_eq!(reference.to_string(), text);
        }
        for text in ["web01/latest/latest", "web01/latest/monday", ".snapfs/latest", "latest"] {
            assert_eq!(refusal(SnapshotName::parse_reference(text)).0, ErrorKind::Invalid, "{text}");
        }
    }

    #[test]
    fn a_slash_is_no_part_of_a_part() {
        assert_eq!(refusal(VmName::new("a/b")), (ErrorKind::Invalid, "\"a/b\" has a slash".to_string()));
        assert_eq!(refusal(DiskName::new("/")).0, ErrorKind::Invalid);
        assert_eq!(refusal(FileName::new("../x")).0, ErrorKind::Invalid);
        assert_eq!(refusal(FileName::new("")).0, ErrorKind::Invalid);
    }

    #[test]
    fn draft_names_show_by_their_ends() {
        for text in [".a", "...", ".snapfs", "a.part", "a.partial", "a.tmp", ".part", ".tmp", "a.b.tmp", " .part"] {
            assert!(FileName::new(text).unwrap().is_draft_name(), "{text}");
        }
        for text in ["a", "a.", "part", "tmp", "partial", "a.part1", "a.tmp.img", "a.PART", "a.partially", "apart"] {
            assert!(!FileName::new(text).unwrap().is_draft_name(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn whatever_parses_prints_as_it_was(text in "[a-z./\u{0}\n -]{0,12}") {
            let parsed = SnapshotName::parse(&text);
            let legal = {
                let parts: Vec<_> = text.split('/').collect();
                (2..=3).contains(&parts.len())
                    && parts.iter().all(|p| !matches!(*p, "" | "." | "..") && !p.contains(['\0', '\n']))
                    && !parts[1..].contains(&LATEST)
                    && parts[0] != CONTROL_FOLDER
            };
            prop_assert_eq!(parsed.is_ok(), legal);
            match parsed {
                Ok(name) => prop_assert_eq!(name.to_string(), text),
                Err(error) => prop_assert!(!error.to_string().contains(char::is_control)),
            }
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = SnapshotName::parse(&text);
            let _ = SnapshotName::parse_reference(&text);
        }
    }
}
