//! The contract of the two files that a clone is written to, and files of the operating system that keep it.
//!
//! There is a contract so that tests can put a file in between that loses what was not synced.

use std::fmt::Debug;
use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::error::{Error, Result, corrupt};

/// Zeros that are written at a time where no holes can be made.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A file of this host. All calls may come from many threads at once.
pub trait LocalFile: Send + Sync + Debug {
    /// Fills `out` from `offset`. `Ok` means that all of it is set.
    ///
    /// # Errors
    /// `Corrupt` when the file ends before, `Unavailable`.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()>;

    /// Writes all of `bytes` at `offset`. After an error any part of them may be written.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Makes a range read as zeros, without room on the disk where that is possible. The size stays.
    ///
    /// # Errors
    /// As [`LocalFile::write_at`].
    fn zero(&self, offset: u64, bytes: u64) -> Result<()>;

    /// Sees to it that writing to a range, which may lie past the end, finds room. The size stays.
    /// Where that is not possible nothing is done.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    fn reserve(&self, offset: u64, bytes: u64) -> Result<()>;

    /// Cuts the file, or lets it grow by zeros.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    fn set_len(&self, bytes: u64) -> Result<()>;

    /// Bytes of the file.
    ///
    /// # Errors
    /// `Unavailable`.
    fn bytes(&self) -> Result<u64>;

    /// Returns when everything written is durable.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`: then what was written since the last sync may be lost, and no later call tells.
    fn sync(&self) -> Result<()>;

    /// The next data (or hole) at or after `offset`, which lies within the file: where it begins, or the end of the
    /// file. Where holes are not known all is data.
    ///
    /// # Errors
    /// `Unavailable`.
    fn next(&self, offset: u64, data: bool) -> Result<u64>;
}

/// A file of the operating system; the name is for messages.
#[derive(Debug)]
pub struct OsFile {
    name: String,
    file: File,
}

impl OsFile {
    /// An open file, readable and writable.
    pub fn new(name: impl Into<String>, file: File) -> Self {
        Self { name: name.into(), file }
    }

    fn failed(&self, what: &str, cause: impl Into<std::io::Error>) -> Error {
        Error::io(format!("{}: {what}", self.name), cause.into())
    }
}

impl LocalFile for OsFile {
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                let end = offset.saturating_add(out.len() as u64);
                corrupt(format!("{}: ends within bytes {offset}..{end}", self.name))
            }
            _ => self.failed("read", e),
        })
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|e| self.failed("write", e))
    }

    fn zero(&self, offset: u64, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, bytes) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(e) => return Err(self.failed("make a hole", e)),
        }
        let mut at = offset;
        let end = offset.saturating_add(bytes);
        while at < end {
            let count = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
            self.write_at(at, ZEROS.get(..count).unwrap_or_default())?;
            at += count as u64;
        }
        Ok(())
    }

    fn reserve(&self, offset: u64, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        match fallocate(&self.file, FallocateFlags::KEEP_SIZE, offset, bytes) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(e) => Err(self.failed("reserve", e)),
        }
    }

    fn set_len(&self, bytes: u64) -> Result<()> {
        self.file.set_len(bytes).map_err(|e| self.failed("set the size", e))
    }

    fn bytes(&self) -> Result<u64> {
        self.file.metadata().map(|m| m.len()).map_err(|e| self.failed("size", e))
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| self.failed("sync", e))
    }

    fn next(&self, offset: u64, data: bool) -> Result<u64> {
        let from = if data { SeekFrom::Data(offset) } else { SeekFrom::Hole(offset) };
        match seek(&self.file, from) {
            Ok(at) => Ok(at),
            Err(Errno::NXIO) => self.bytes(),
            Err(Errno::INVAL | Errno::OPNOTSUPP) if data => Ok(offset),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => self.bytes(),
            Err(e) => Err(self.failed("look for holes", e)),
        }
    }
}
