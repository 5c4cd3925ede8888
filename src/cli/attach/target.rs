//! What is to be attached: a snapshot or a clone, by its path in a mount or by its name.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cli::attach::loop_device::FileIdentity;
use crate::cli::attach::tool::{bounded, command};
use crate::cli::host_config::{self, HostConfig};
use crate::cli::mountinfo::{self, SNAPFS_TYPE};
use crate::error::{Error, ErrorKind, Result, invalid, not_found};
use crate::name::{CONTROL_FOLDER, SnapshotName};

/// What a mount may take to tell about a file of it.
pub const LIMIT: Duration = Duration::from_secs(8);

/// Makes a mountpoint, the first argument, writable and becomes the program that follows. No helper of ours and no line
/// of fstab has a say in it.
const MAKE_WRITABLE: &str =
    r#"mount --internal-only --options-source disable --options remount,bind,rw "$1" && shift && exec "$@""#;

/// In the folder of control files, the folder of clones.
const CLONES_FOLDER: &str = "clones";

/// A file of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its path, without links: it stays with this snapshot when `latest` moves on.
    pub path: PathBuf,
    /// What it is, whatever its name.
    pub file: FileIdentity,
    /// Where the mount begins that it lies in.
    pub mountpoint: PathBuf,
    /// Whether nothing can be written through that mount.
    pub read_only: bool,
    /// Where the whole store is mounted: the same place, unless that shows only a part of it.
    pub top: Option<PathBuf>,
    /// The store that is mounted there.
    pub store: PathBuf,
    /// What kind of file it is.
    pub kind: Kind,
}

/// Files of a mount that can be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A snapshot, by its name.
    Snapshot(SnapshotName),
    /// A writable clone that somebody made.
    Clone,
}

impl Target {
    /// Finds what `text` names: an absolute path in a mount, or a snapshot in the mount that the host's configuration
    /// has. `latest` stands for the newest.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for what is no snapshot or lies in no mount; `Unavailable` when the mount does not answer.
    pub fn find(text: &str, host: &HostConfig) -> Result<Self> {
        let path = path_of(text, host)?;
        let text = text.to_owned();
        bounded(&text.clone(), LIMIT, move || Self::at(&path).map_err(|e| e.within(text)))
    }

    /// What lies at a path in a mount.
    ///
    /// # Errors
    /// As [`Target::find`].
    pub fn at_path(path: &Path) -> Result<Self> {
        let (path, about) = (path.to_owned(), path.display().to_string());
        bounded(&about.clone(), LIMIT, move || Self::at(&path).map_err(|e| e.within(about)))
    }

    fn at(path: &Path) -> Result<Self> {
        let failed = |e: std::io::Error| match e.raw_os_error() {
            Some(libc::ENOENT) => not_found("there is no such snapshot"),
            Some(libc::ENOTCONN | libc::ECONNABORTED) => {
                Error::new(ErrorKind::Unavailable, "the daemon of the mount has died: mount the store again")
            }
            _ => Error::io("stat", e),
        };
        let real = path.canonicalize().map_err(failed)?;
        let metadata = std::fs::metadata(&real).map_err(failed)?;
        let file = FileIdentity::of(&metadata);
        let rows = mountinfo::read()?;
        let row = rows
            .iter()
            .filter(|row| row.kind == SNAPFS_TYPE && row.device == file.device && real.starts_with(&row.mountpoint))
            .max_by_key(|row| row.mountpoint.as_os_str().len());
        let row = row.ok_or_else(|| invalid("lies in no mounted store"))?;
        if !metadata.is_file() {
            return Err(invalid("is no snapshot but a folder"));
        }
        let within = real.strip_prefix(&row.mountpoint).unwrap_or(&real);
        // A part of a mount that is mounted again shows itself.
        let within = row.root.strip_prefix("/").unwrap_or(&row.root).join(within);
        let kind = kind_of(&within, metadata.mode())?;
        let is_whole = |row: &&mountinfo::Row| row.kind == SNAPFS_TYPE && row.root == Path::new("/");
        let mut whole = std::iter::once(row).chain(rows.iter().filter(|other| other.device == row.device));
        let top = whole.find(is_whole).map(|row| row.mountpoint.clone());
        let (mountpoint, read_only, store) = (row.mountpoint.clone(), row.read_only, PathBuf::from(&row.source));
        Ok(Self { path: real, file, mountpoint, read_only, top, store, kind })
    }

    /// Has a program see the mount as one that can be written, which nobody else does: with `ro` only the mountpoint is
    /// read-only, for the clones behind it are not.
    pub fn made_writable(&self, plain: Command) -> Command {
        if !self.read_only {
            return plain;
        }
        let mut inside = command("unshare");
        inside.args(["--mount", "--propagation", "private", "sh", "-c", MAKE_WRITABLE, "sh"]);
        inside.arg(&self.mountpoint).arg(plain.get_program()).args(plain.get_args());
        inside
    }
}

/// What a file is, by its path in the mount and its mode.
fn kind_of(within: &Path, mode: u32) -> Result<Kind> {
    if let Ok(control) = within.strip_prefix(CONTROL_FOLDER) {
        return match control.strip_prefix(CLONES_FOLDER) {
            Ok(_) => Ok(Kind::Clone),
            Err(_) => Err(invalid("is no snapshot")),
        };
    }
    let text = within.to_str().ok_or_else(|| invalid("is not UTF-8"))?;
    // Sealed: nobody can write to it, and its bytes stay.
    if mode & 0o222 != 0 {
        return Err(invalid("is a draft: only what is sealed is attached"));
    }
    Ok(Kind::Snapshot(SnapshotName::parse(text)?))
}

fn path_of(text: &str, host: &HostConfig) -> Result<PathBuf> {
    if text.is_empty() {
        return Err(invalid("no target is named"));
    }
    if text.starts_with('/') {
        return Ok(PathBuf::from(text));
    }
    SnapshotName::parse_reference(text)?;
    let mountpoint = host.mountpoint.as_ref().ok_or_else(|| {
        let file = host_config::file();
        invalid(format!("{text}: is no absolute path, and {} has no \"mountpoint\"", file.display()))
    })?;
    let rows = mountinfo::read()?;
    if mountinfo::top(&rows, mountpoint).is_none_or(|row| row.kind != SNAPFS_TYPE) {
        return Err(not_found(format!("{text}: no store is mounted at {}", mountpoint.display())));
    }
    Ok(mountpoint.join(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_told_by_its_place_and_mode() {
        let name = |text| Kind::Snapshot(SnapshotName::parse(text).unwrap());
        assert_eq!(kind_of(Path::new("web01/a.img"), 0o100_444).unwrap(), name("web01/a.img"));
        assert_eq!(kind_of(Path::new("web01/xvda/a.img"), 0o100_444).unwrap(), name("web01/xvda/a.img"));
        assert_eq!(kind_of(Path::new(".snapfs/clones/x"), 0o100_600).unwrap(), Kind::Clone);
        for (within, mode, word) in [
            ("web01/a.img", 0o100_600, "draft"),
            (".snapfs/status", 0o100_444, "is no snapshot"),
            ("a.img", 0o100_444, "form"),
            ("", 0o100_444, "form"),
        ] {
            let refused = kind_of(Path::new(within), mode).unwrap_err();
            assert!(refused.to_string().contains(word), "{within}: {refused}");
        }
    }

    #[test]
    fn what_cannot_be_found_is_told_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let host = HostConfig { mountpoint: Some(folder.path().to_owned()), ..HostConfig::default() };
        let file = folder.path().join("plain");
        std::fs::write(&file, "x").unwrap();
        for (text, host, kind, word) in [
            ("", &host, ErrorKind::Invalid, "no target"),
            ("web01", &host, ErrorKind::Invalid, "vm/snapshot"),
            ("web01/../a", &host, ErrorKind::Invalid, "not a name"),
            ("web01/a.img", &host, ErrorKind::NotFound, "no store is mounted at"),
            ("web01/latest", &HostConfig::default(), ErrorKind::Invalid, "mountpoint"),
            ("/no/such/file", &host, ErrorKind::NotFound, "/no/such/file: there is no such snapshot"),
            (file.to_str().unwrap(), &host, ErrorKind::Invalid, "lies in no mounted store"),
        ] {
            let refused = Target::find(text, host).unwrap_err();
            assert_eq!(refused.kind(), kind, "{text}: {refused}");
            assert!(refused.to_string().contains(word) && !refused.to_string().contains('\n'), "{text}: {refused}");
        }
    }
}
