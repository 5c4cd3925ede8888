//! The system calls by which a local folder changes what is on its medium: apart, so that a test can stand before them
//! and know, call by call, what a power failure may undo. Reading, locking and the reserve are no part of it.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{self, AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::{Errno, Result, retry_on_intr};

/// The calls. Paths are relative to `top`, the folder of the store.
pub trait Calls: Send + Sync + fmt::Debug {
    /// Opens a file or a folder; with `CREATE` or `TMPFILE` it makes one.
    ///
    /// # Errors
    /// Those of openat(2).
    fn open(&self, top: &OwnedFd, path: &str, flags: OFlags) -> Result<OwnedFd>;

    /// Makes a folder.
    ///
    /// # Errors
    /// Those of mkdirat(2).
    fn make_folder(&self, top: &OwnedFd, path: &str) -> Result<()>;

    /// Writes some of `bytes`, and tells how many.
    ///
    /// # Errors
    /// Those of pwrite(2).
    fn write(&self, file: &OwnedFd, bytes: &[u8], offset: u64) -> Result<usize>;

    /// Cuts a file to its first `bytes` bytes.
    ///
    /// # Errors
    /// Those of ftruncate(2).
    fn truncate(&self, file: &OwnedFd, bytes: u64) -> Result<()>;

    /// Makes durable what a file holds, or which names a folder holds.
    ///
    /// # Errors
    /// Those of fsync(2).
    fn sync(&self, file: &OwnedFd) -> Result<()>;

    /// Gives a file without a name the name `path`, unless it is taken.
    ///
    /// # Errors
    /// Those of linkat(2).
    fn link_unnamed(&self, top: &OwnedFd, file: &OwnedFd, path: &str) -> Result<()>;

    /// Gives the file at `from` the name `to` as well, unless it is taken.
    ///
    /// # Errors
    /// Those of linkat(2).
    fn link(&self, top: &OwnedFd, from: &str, to: &str) -> Result<()>;

    /// Gives the file at `from` the name `to` instead.
    ///
    /// # Errors
    /// Those of renameat2(2).
    fn rename(&self, top: &OwnedFd, from: &str, to: &str, flags: RenameFlags) -> Result<()>;

    /// Removes a name.
    ///
    /// # Errors
    /// Those of unlinkat(2).
    fn unlink(&self, top: &OwnedFd, path: &str) -> Result<()>;
}

/// The calls themselves.
#[derive(Debug, Clone, Copy, Default)]
pub struct System;

impl Calls for System {
    fn open(&self, top: &OwnedFd, path: &str, flags: OFlags) -> Result<OwnedFd> {
        let mode = Mode::RUSR | Mode::WUSR;
        retry_on_intr(|| fs::openat(top, path, flags | OFlags::CLOEXEC | OFlags::NOCTTY, mode))
    }

    fn make_folder(&self, top: &OwnedFd, path: &str) -> Result<()> {
        fs::mkdirat(top, path, Mode::RWXU)
    }

    fn write(&self, file: &OwnedFd, bytes: &[u8], offset: u64) -> Result<usize> {
        retry_on_intr(|| rustix::io::pwrite(file, bytes, offset))
    }

    fn truncate(&self, file: &OwnedFd, bytes: u64) -> Result<()> {
        fs::ftruncate(file, bytes)
    }

    fn sync(&self, file: &OwnedFd) -> Result<()> {
        retry_on_intr(|| fs::fsync(file))
    }

    fn link_unnamed(&self, top: &OwnedFd, file: &OwnedFd, path: &str) -> Result<()> {
        let through_proc = format!("/proc/self/fd/{}", file.as_raw_fd());
        match fs::linkat(fs::CWD, through_proc, top, path, AtFlags::SYMLINK_FOLLOW) {
            // Without /proc the kernel takes the descriptor itself, from root always, from others since 6.10.
            Err(Errno::NOENT) => fs::linkat(file, "", top, path, AtFlags::EMPTY_PATH),
            outcome => outcome,
        }
    }

    fn link(&self, top: &OwnedFd, from: &str, to: &str) -> Result<()> {
        fs::linkat(top, from, top, to, AtFlags::empty())
    }

    fn rename(&self, top: &OwnedFd, from: &str, to: &str, flags: RenameFlags) -> Result<()> {
        if flags.is_empty() {
            // Media that know no renameat2 know this one.
            return fs::renameat(top, from, top, to);
        }
        fs::renameat_with(top, from, top, to, flags)
    }

    fn unlink(&self, top: &OwnedFd, path: &str) -> Result<()> {
        fs::unlinkat(top, path, AtFlags::empty())
    }
}
