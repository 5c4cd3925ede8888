//! Plain types of the mounted tree: what the transport hands in and gets back.

use std::path::PathBuf;
use std::time::Duration;

use crate::clock::Timestamp;

/// An inode number. The root is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ino(pub u64);

/// The root folder.
pub const ROOT: Ino = Ino(1);

/// A handle of an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle(pub u64);

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Folder,
    /// A snapshot, a draft, a clone or a file of the control folder.
    File,
    /// `latest`.
    Link,
}

/// What stat(2) tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub ino: Ino,
    /// What it is.
    pub kind: Kind,
    /// Bytes.
    pub bytes: u64,
    /// Units of 512 bytes that hold data.
    pub sectors: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Links.
    pub links: u32,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// How long the kernel may keep these attributes.
    pub keep: Duration,
}

/// How a file was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// Its handle.
    pub handle: Handle,
    /// The kernel must not cache its bytes: a draft, a clone, or a file of the control folder.
    pub direct: bool,
    /// Bytes that the kernel has cached are still right: a sealed snapshot.
    pub keep_cache: bool,
}

/// Attributes to set; `None` stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetAttributes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// New size.
    pub bytes: Option<u64>,
    /// Last change of the content.
    pub mtime: Option<Timestamp>,
}

/// One row of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Inode number.
    pub ino: Ino,
    /// What it is.
    pub kind: Kind,
    /// Name.
    pub name: String,
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What fallocate(2) is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocate {
    /// Make sure that the range is there: the file grows (mode 0).
    Reserve,
    /// Reserve without growing (FALLOC_FL_KEEP_SIZE): nothing to do for us.
    ReserveKeepSize,
    /// Make a hole (PUNCH_HOLE with KEEP_SIZE).
    Punch,
    /// Make zeros and grow (ZERO_RANGE).
    Zero,
    /// Make zeros, do not grow (ZERO_RANGE with KEEP_SIZE).
    ZeroKeepSize,
}

/// Options of a mount that the tree needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Nothing of the store may change; clones are no part of it.
    pub read_only: bool,
    /// How long after the last close a draft is sealed.
    pub seal_after: Duration,
    /// The folder of writable clones of all stores on this host. Without it there are none.
    pub clones: Option<PathBuf>,
    /// Nothing is removed through this mount: no snapshot, no draft, no folder.
    pub no_delete: bool,
    /// A VM is collected in the background after something of it was forgotten through this mount.
    pub collect: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { read_only: false, seal_after: Duration::from_secs(5), clones: None, no_delete: false, collect: false }
    }
}

/// Sizes of the store's medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All bytes.
    pub bytes_total: u64,
    /// Free bytes.
    pub bytes_free: u64,
}
