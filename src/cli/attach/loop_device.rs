//! Loop devices of this host, through `losetup`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::cli::attach::tool::{command, succeed};
use crate::error::{Error, ErrorKind, Result, busy, corrupt, invalid};

/// What a call of `losetup` may take. It opens a file of a mount, whose daemon may be slow.
const LIMIT: Duration = Duration::from_secs(8);

/// Devices that are tried when others take them first.
const TRIES: usize = 16;

/// A device is free when its last user has closed it: asked so often, with this pause.
const FREE_TRIES: usize = 60;
const FREE_PAUSE: Duration = Duration::from_millis(50);

/// A file, whatever its name: where it lies and its number there.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct FileIdentity {
    /// Device of its filesystem as `major:minor`.
    pub device: String,
    /// Inode number.
    pub inode: u64,
}

impl FileIdentity {
    /// The identity in what stat(2) tells.
    pub fn of(metadata: &std::fs::Metadata) -> Self {
        let device = metadata.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        Self { device: format!("{major}:{minor}"), inode: metadata.ino() }
    }
}

/// Who may write to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nobody.
    ReadOnly,
    /// Whoever has opened it.
    ReadWrite,
}

/// A loop device, used or not.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
#[serde(transparent)]
pub struct LoopDevice(PathBuf);

#[derive(Deserialize)]
struct Listing {
    loopdevices: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    #[serde(rename = "back-ino")]
    inode: Option<u64>,
    #[serde(rename = "back-maj:min")]
    device: Option<String>,
}

impl LoopDevice {
    /// The device of a path, `/dev/loopN`; a link to it will do.
    ///
    /// # Errors
    /// `Invalid` for anything else.
    pub fn parse(path: &Path) -> Result<Self> {
        // What is not there any more can still be named.
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let number = real.to_str().and_then(|text| text.strip_prefix("/dev/loop"));
        match number {
            Some(digits) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => Ok(Self(real)),
            _ => Err(invalid(format!("{}: is no loop device", path.display()))),
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// One that nobody uses now; the next moment somebody may.
    ///
    /// # Errors
    /// `NotFound` without `losetup`, `Denied`, `Unavailable`.
    fn next_free() -> Result<Self> {
        let mut find = command("losetup");
        find.arg("--find");
        Self::parse(Path::new(succeed(find, LIMIT)?.trim()))
    }

    /// Puts a free device on the file at `path`, read with direct I/O: the mount and its daemon cache already.
    ///
    /// `before` is told which device it will be, before that is in use: what it notes down is true after a crash, too.
    /// `wrap` may have the program run by another one.
    ///
    /// # Errors
    /// Those of `before`; `Busy` when all devices that were free were taken by others first, `Denied`, `Unavailable`.
    pub fn bind(
        path: &Path,
        access: Access,
        mut before: impl FnMut(&Self) -> Result<()>,
        wrap: impl Fn(std::process::Command) -> std::process::Command,
    ) -> Result<Self> {
        for _ in 0..TRIES {
            let device = Self::next_free()?;
            before(&device)?;
            let mut bind = command("losetup");
            if access == Access::ReadOnly {
                bind.arg("--read-only");
            }
            bind.arg("--direct-io=on").arg(device.path()).arg(path);
            match succeed(wrap(bind), LIMIT) {
                Ok(_) => return Ok(device),
                Err(e) if e.kind() == ErrorKind::Busy => log::debug!("{e}"),
                Err(e) => return Err(e.within(path.display())),
            }
        }
        Err(busy(format!("{}: others took every free loop device", path.display())))
    }

    /// Whether it shows this file.
    ///
    /// # Errors
    /// `Corrupt` when `losetup` cannot be understood; `Denied`, `Unavailable`.
    pub fn shows(&self, file: &FileIdentity) -> Result<bool> {
        if !self.is_bound() {
            return Ok(false);
        }
        let mut list = command("losetup");
        list.args(["--json", "--list", "--output", "BACK-INO,BACK-MAJ:MIN"]).arg(&self.0);
        let text = match succeed(list, LIMIT) {
            Ok(text) => text,
            // It was freed this moment.
            Err(_) if !self.is_bound() => return Ok(false),
            Err(e) => return Err(e),
        };
        if text.trim().is_empty() {
            return Ok(false);
        }
        let listing: Listing = serde_json::from_str(&text).map_err(|e| corrupt("losetup --json").because(e))?;
        // Padded with blanks where tables would be.
        let same = |row: &Row| {
            row.inode == Some(file.inode) && row.device.as_deref().map(str::trim) == Some(file.device.as_str())
        };
        Ok(listing.loopdevices.iter().any(same))
    }

    /// Whether it shows any file.
    pub fn is_bound(&self) -> bool {
        let Some(name) = self.0.file_name() else { return false };
        Path::new("/sys/block").join(name).join("loop/backing_file").exists()
    }

    /// Frees the device if it shows this file, and waits until it is really free. Done when it does not.
    ///
    /// # Errors
    /// `Busy` while somebody has it open: it is freed when that is closed. `Denied`, `Unavailable`.
    pub fn free(&self, file: &FileIdentity) -> Result<()> {
        if !self.shows(file)? {
            return Ok(());
        }
        let mut detach = command("losetup");
        detach.arg("--detach").arg(&self.0);
        match succeed(detach, LIMIT) {
            Ok(_) => {}
            Err(_) if !self.shows(file)? => return Ok(()),
            Err(e) => return Err(e),
        }
        for _ in 0..FREE_TRIES {
            if !self.shows(file)? {
                return Ok(());
            }
            std::thread::sleep(FREE_PAUSE);
        }
        Err(Error::new(ErrorKind::Busy, format!("{}: is in use, and is freed when it is closed", self.0.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loop_devices_are_taken() {
        for good in ["/dev/loop0", "/dev/loop4711"] {
            assert_eq!(LoopDevice::parse(Path::new(good)).unwrap().path(), Path::new(good));
        }
        for bad in ["", "/dev/loop", "/dev/loop0p1", "/dev/loop-control", "/dev/sda", "loop0", "/dev/null", "/"] {
            assert_eq!(LoopDevice::parse(Path::new(bad)).unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
        }
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/dev/loop4711", &link).unwrap();
        assert!(LoopDevice::parse(&link).is_err(), "a link that leads nowhere");
    }

    #[test]
    fn a_device_that_is_not_there_shows_nothing() {
        let device = LoopDevice::parse(Path::new("/dev/loop4711")).unwrap();
        let file = FileIdentity::of(&std::fs::metadata("/").unwrap());
        assert!(!device.is_bound());
        assert!(!device.shows(&file).unwrap());
        device.free(&file).unwrap();
    }
}
