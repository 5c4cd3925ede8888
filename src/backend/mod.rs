//! The contract that every place of objects keeps, and every wrapper around one.
//!
//! Objects are write-once: they are put under a key that must be free, read in ranges, listed and deleted.
//! The conformance suite in `tests/it/backend_suite.rs` runs against every implementation and every wrapper.

pub mod calls;
pub mod limit;
pub mod local;
pub mod placement;
pub mod replicate;
pub mod target;
pub mod testing;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::replicate::Replicated;
use crate::error::{Error, ErrorKind, Result};

/// The name of an object: `/`-separated, relative to its target, for example `vms/web01/log/00000001`.
///
/// Parts are never empty, `.` or `..`; who builds a key from a name has checked the name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Arc<str>);

impl Key {
    /// A key of this text. The caller vouches for its parts.
    pub fn new(text: impl Into<String>) -> Self {
        Self(Arc::from(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// One row of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Last part of the key.
    pub name: String,
    /// Bytes of the object; 0 for a folder.
    pub bytes: u64,
    /// Whether it is a prefix of further keys and no object.
    pub is_folder: bool,
}

/// A place that holds objects.
///
/// All calls may come from many threads at once. Cost is counted in calls: each is one round trip to a remote store.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Begins a new object; nothing is visible under `key` until [`Upload::finish`] returns.
    ///
    /// # Errors
    /// `NoSpace`, `ReadOnly`, `Unavailable`. `Exists` may come here or at `finish`.
    fn create(&self, key: &Key) -> Result<Box<dyn Upload>>;

    /// Writes a whole small object, durably, if `key` is free.
    ///
    /// # Errors
    /// `Exists` when the key is taken (the object there is untouched); `Unavailable` means it may or may not be there.
    fn put_new(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        let mut upload = self.create(key)?;
        upload.append(bytes)?;
        upload.finish()
    }

    /// Fills `out` from `offset`. Short data is an error, so `Ok` means that all of `out` is set.
    ///
    /// # Errors
    /// `NotFound` without the object, `Corrupt` when it ends before `offset + out.len()`, `Unavailable`.
    fn read(&self, key: &Key, offset: u64, out: &mut [u8]) -> Result<()>;

    /// The whole object, which must not have more than `bytes_max` bytes.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt` when it is larger, `Unavailable`.
    fn read_all(&self, key: &Key, bytes_max: u64) -> Result<Vec<u8>>;

    /// As [`Backend::read`], of bytes of which `verify` can tell whether they are right. Where there are several copies,
    /// one that is not right is left for the next. `verify` is called once for each copy that could be read.
    ///
    /// # Errors
    /// As [`Backend::read`], and what `verify` says of the last copy.
    fn read_checked(
        &self,
        key: &Key,
        offset: u64,
        out: &mut [u8],
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.read(key, offset, out)?;
        verify(out)
    }

    /// As [`Backend::read_all`], of an object of which `verify` can tell whether it is right. Where there are several
    /// copies, one that is not right is left for the next, and replaced by the right one.
    ///
    /// # Errors
    /// As [`Backend::read_all`], and what `verify` says of the last copy.
    fn read_all_checked(
        &self,
        key: &Key,
        bytes_max: u64,
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let bytes = self.read_all(key, bytes_max)?;
        verify(&bytes)?;
        Ok(bytes)
    }

    /// Begins an object that takes the place of a damaged copy of the same object, or of one that is missing. What is
    /// under `key` stays until [`Upload::finish`] returns. Only who has proven the bytes may do this (I4).
    ///
    /// # Errors
    /// As [`Backend::create`]; `Unsupported` where nothing can be replaced.
    fn create_over(&self, key: &Key) -> Result<Box<dyn Upload>> {
        Err(Error::new(ErrorKind::Unsupported, format!("{key}: cannot be replaced here")))
    }

    /// Makes sure that an object that is there counts: that enough copies of it are there. `verify` as in
    /// [`Backend::read_all_checked`]. Free where there is only one copy.
    ///
    /// # Errors
    /// `Unavailable` when there are not enough.
    fn settle(&self, _key: &Key, _verify: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        Ok(())
    }

    /// The copies behind this backend, if it keeps several.
    fn replicated(&self) -> Option<&Replicated> {
        None
    }

    /// Bytes of the object.
    ///
    /// # Errors
    /// `NotFound`, `Unavailable`.
    fn len(&self, key: &Key) -> Result<u64>;

    /// How long the medium has had each of these objects, by its own clock on both sides, so that a client whose clock
    /// is wrong is told the truth. `None` for one that is not there. Cost: one call, whatever their number; a local
    /// medium is looked at once for each.
    ///
    /// # Errors
    /// `NoSpace` or `ReadOnly` where the medium tells its time only to those who write, `Unavailable`.
    fn ages(&self, keys: &[Key]) -> Result<Vec<Option<Duration>>>;

    /// Everything directly below `prefix` (a folder key without a slash at its end), sorted by name.
    /// A prefix that holds nothing gives an empty list.
    ///
    /// # Errors
    /// `Unavailable`, `Denied`.
    fn list(&self, prefix: &Key) -> Result<Vec<Listed>>;

    /// Deletes the object; one that is not there is no error.
    ///
    /// # Errors
    /// `ReadOnly`, `Unavailable`.
    fn delete(&self, key: &Key) -> Result<()>;

    /// A hint that this range is read soon. Free; may do nothing.
    fn will_need(&self, _key: &Key, _offset: u64, _bytes: u64) {}

    /// Holds the object against collection as long as the guard lives (I6). Works on read-only media.
    ///
    /// # Errors
    /// `NotFound`, `Unavailable`.
    fn pin(&self, key: &Key) -> Result<Box<dyn Guard>>;

    /// Whether anybody holds a pin on the object, or the lock of this key. `false` when it is not there.
    ///
    /// # Errors
    /// `Unavailable`.
    fn is_pinned(&self, key: &Key) -> Result<bool>;

    /// Takes the exclusive lock of this name without waiting, or tells that another holder has it (`Ok(None)`).
    /// It is released when the guard is dropped or its process ends, however it ends.
    ///
    /// # Errors
    /// `ReadOnly`, `NoSpace`, `Unavailable`.
    fn try_lock(&self, key: &Key) -> Result<Option<Box<dyn Guard>>>;

    /// Gives back the bytes kept aside for a full disk; `true` if there were any.
    fn release_reserve(&self) -> bool {
        false
    }

    /// Keeps bytes aside again, if there is room. Never an error: without room there is no reserve.
    fn keep_reserve(&self) {}

    /// Removes what writers that died left behind and nobody can see; returns the bytes freed.
    ///
    /// # Errors
    /// `ReadOnly`, `Unavailable`.
    fn remove_litter(&self) -> Result<u64> {
        Ok(0)
    }

    /// Lets go of what was deleted by others and is kept open here only for speed, so that its bytes are freed.
    fn tidy(&self) {}

    /// Bytes of the medium: (total, free). `None` where the notion has no meaning.
    fn space(&self) -> Option<(u64, u64)> {
        None
    }
}

/// An object that is being written. Dropped unfinished, it leaves nothing behind.
pub trait Upload: Send + Sync {
    /// Appends bytes.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;

    /// Reads back what was appended, before it is finished. `Ok` means that all of `out` is set.
    ///
    /// # Errors
    /// `Invalid` past the end, `Unavailable`.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()>;

    /// Makes the object durable and visible under its key (I4, I9).
    ///
    /// # Errors
    /// `Exists` when the key is taken by now, `NoSpace`, `Unavailable` (may or may not be there).
    fn finish(self: Box<Self>) -> Result<()>;
}

/// Something held until it is dropped.
pub trait Guard: Send + Sync {}
