//! Loop devices of this host, through `losetup`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::cli::attach::tool::{command, run, succeed};
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

/// The identity of this boot of the host.
const BOOT_PATH: &str = "/proc/sys/kernel/random/boot_id";

/// A device that was put on a file, or was about to be: what can be told of it later, whatever was killed meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct Binding {
    /// The device.
    pub device: LoopDevice,
    /// The file, by its path then.
    pub path: PathBuf,
    /// The same, whatever its name.
    pub file: FileIdentity,
    /// The boot of the host: no device outlives it.
    pub boot: String,
}

/// What has become of a [`Binding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shows {
    /// The device shows the file.
    File,
    /// It shows it still, but the daemon of the mount has died, and every access fails.
    DeadFile,
    /// It is free, or shows something else.
    Other,
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

    /// Puts a free device on the file at `path`, with direct I/O: the mount and its daemon cache already.
    ///
    /// `before` is told which device it will be, before that is in use: what it notes down is true after a crash, too.
    /// `wrap` may have the program run by another one.
    ///
    /// # Errors
    /// Those of `before`; `Busy` when all devices that were free were taken by others first or the file is a clone that
    /// another process has open, `ReadOnly` when the file
    /// cannot be written but should be, `Denied`, `Unavailable`.
    pub fn bind(
        path: &Path,
        access: Access,
        mut before: impl FnMut(&Self) -> Result<()>,
        wrap: impl Fn(std::process::Command) -> std::process::Command,
    ) -> Result<Self> {
        let mut is_file_busy = false;
        for _ in 0..TRIES {
            let device = Self::next_free()?;
            before(&device)?;
            let mut bind = command("losetup");
            if access == Access::ReadOnly {
                bind.arg("--read-only");
            }
            bind.arg("--direct-io=on").arg(device.path()).arg(path);
            match succeed(wrap(bind), LIMIT) {
                // It takes what it gets, and tells nobody.
                Ok(_) if access == Access::ReadWrite && device.is_read_only() => {
                    device.detach()?;
                    let what = "cannot be written: mount the store as root, or without ro";
                    return Err(Error::new(ErrorKind::ReadOnly, format!("{}: {what}", path.display())));
                }
                Ok(_) => return Ok(device),
                Err(e) if e.kind() == ErrorKind::Busy => {
                    log::debug!("{e}");
                    is_file_busy |= !device.is_bound();
                }
                Err(e) => return Err(e.within(path.display())),
            }
        }
        // The word is the same for a device and for the file: what was free all the same was not the reason.
        let why = if is_file_busy { "is open in another process" } else { "others took every free loop device" };
        Err(busy(format!("{}: {why}", path.display())))
    }

    fn is_read_only(&self) -> bool {
        self.attribute("ro").is_none_or(|text| text.trim() != "0")
    }

    /// What the kernel tells of the device, without asking the mount.
    fn attribute(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(Path::new("/sys/block").join(self.0.file_name()?).join(name)).ok()
    }

    fn detach(&self) -> Result<()> {
        let mut detach = command("losetup");
        detach.arg("--detach").arg(&self.0);
        succeed(detach, LIMIT).map(drop)
    }

    /// The path of what it shows, as far as that can be told; `None` when it is free.
    fn backing(&self) -> Option<String> {
        self.attribute("loop/backing_file")
    }

    /// Whether it shows any file.
    pub fn is_bound(&self) -> bool {
        self.backing().is_some()
    }
}

impl Binding {
    /// Whether the host has not been restarted since.
    ///
    /// # Errors
    /// As [`boot`].
    pub fn is_of_this_boot(&self) -> Result<bool> {
        Ok(boot()? == self.boot)
    }

    /// What the device shows now.
    ///
    /// # Errors
    /// `Corrupt` when `losetup` cannot be understood; `Denied`; `Unavailable`, also while the mount does not answer.
    pub fn shows(&self) -> Result<Shows> {
        if !self.is_of_this_boot()? || !self.device.is_bound() {
            return Ok(Shows::Other);
        }
        let mut list = command("losetup");
        list.args(["--json", "--list", "--output", "BACK-INO,BACK-MAJ:MIN"]).arg(self.device.path());
        let text = match succeed(list, LIMIT) {
            Ok(text) => text,
            // It was freed this moment.
            Err(_) if !self.device.is_bound() => return Ok(Shows::Other),
            Err(e) => return Err(e),
        };
        let row = match text.trim() {
            "" => None,
            text => {
                let listing: Listing = serde_json::from_str(text).map_err(|e| corrupt("losetup --json").because(e))?;
                listing.loopdevices.into_iter().next()
            }
        };
        Ok(match row {
            // Padded with blanks where tables would be.
            Some(Row { inode: Some(inode), device: Some(device) }) => {
                let same = inode == self.file.inode && device.trim() == self.file.device;
                if same { Shows::File } else { Shows::Other }
            }
            // The mount of the file does not tell any more which one it was.
            Some(_) if self.device.backing().is_some_and(|text| self.is_path(text.trim_end_matches('\n'))) => {
                Shows::DeadFile
            }
            _ => Shows::Other,
        })
    }

    /// Whether what the device shows can be read: of a file that never changes the kernel tells much from memory, whether
    /// its daemon lives or not.
    ///
    /// # Errors
    /// `NotFound` without `dd`; `Unavailable` when the mount does not answer.
    pub fn answers(&self) -> Result<bool> {
        let mut read = command("dd");
        read.args(["of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none"]);
        read.arg(format!("if={}", self.device.path().display()));
        Ok(run(read, LIMIT)?.status.success())
    }

    /// Whether this is what the kernel tells of our path. It leaves out where the mount lies when that was in a
    /// namespace that is gone, or was taken out of sight.
    fn is_path(&self, told: &str) -> bool {
        told.starts_with('/') && self.path.to_str().is_some_and(|path| path.ends_with(told))
    }

    /// Frees the device if it shows this file, dead or not, and waits until it is really free. Done when it does not.
    ///
    /// # Errors
    /// `Busy` while somebody has it open: it is freed when that is closed. `Denied`, `Unavailable`.
    pub fn free(&self) -> Result<()> {
        if self.shows()? == Shows::Other {
            return Ok(());
        }
        match self.device.detach() {
            Ok(()) => {}
            Err(_) if self.shows()? == Shows::Other => return Ok(()),
            Err(e) => return Err(e),
        }
        for _ in 0..FREE_TRIES {
            if self.shows()? == Shows::Other {
                return Ok(());
            }
            std::thread::sleep(FREE_PAUSE);
        }
        let path = self.device.path().display();
        Err(busy(format!("{path}: is in use, and is freed when it is closed")))
    }
}

/// Which boot of the host this is.
///
/// # Errors
/// `Unavailable` without `/proc`.
pub fn boot() -> Result<String> {
    let text = std::fs::read_to_string(BOOT_PATH).map_err(|e| Error::io(BOOT_PATH, e))?;
    Ok(text.trim().to_owned())
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

    fn binding() -> Binding {
        let file = FileIdentity::of(&std::fs::metadata("/").unwrap());
        let device = LoopDevice::parse(Path::new("/dev/loop4711")).unwrap();
        Binding { device, path: PathBuf::from("/mnt/snapfs/web01/a.img"), file, boot: boot().unwrap() }
    }

    #[test]
    fn a_device_that_is_not_there_shows_nothing() {
        let binding = binding();
        assert!(!binding.device.is_bound());
        assert_eq!(binding.shows().unwrap(), Shows::Other);
        binding.free().unwrap();
        assert_eq!(Binding { boot: "before".to_owned(), ..binding }.shows().unwrap(), Shows::Other);
    }

    #[test]
    fn a_path_is_known_without_where_its_mount_was() {
        for told in ["/mnt/snapfs/web01/a.img", "/web01/a.img", "/a.img"] {
            assert!(binding().is_path(told), "{told}");
        }
        for told in ["", "a.img", "img", "/b.img", "/mnt/snapfs/web01/a.img (deleted)", "/x/mnt/snapfs/web01/a.img"] {
            assert!(!binding().is_path(told), "{told}");
        }
    }
}
