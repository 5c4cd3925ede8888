//! The transport: turns requests of the kernel into calls of [`MountedStore`] and its answers into replies.
//!
//! This is the only file that names `fuser`. It decides nothing about snapshots: it converts types, keeps listings
//! of open folders, maps error kinds to error numbers, and makes sure that no request stays without an answer.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BackgroundSession, BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, MountOption,
    OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::clock::{Clock, SystemClock, Timestamp};
use crate::error::{Error, ErrorKind, Result};
use crate::fs::MountedStore;
use crate::fs::types::{Allocate, Attributes, Caller, Entry, Handle, Ino, Kind, Opened, SetAttributes};
use crate::limits::NAME_BYTES_MAX;

/// The type that the mount has in the mount table, after `fuse.`.
pub const SUBTYPE: &str = "snapfs";

/// Where the kernel offers FUSE.
const DEVICE: &str = "/dev/fuse";

/// Bytes of a write request. The kernel's own limit is 256 pages, so more would only be memory.
const WRITE_BYTES_MAX: u32 = 1 << 20;

/// Read-ahead and asynchronous direct requests under way; the default of 16 starves parallel readers.
const BACKGROUND_REQUESTS_MAX: u16 = 64;

/// What files tell as their preferred size of I/O. `cp` writes in pieces of it: 1 MiB is one request, 4 KiB would be
/// 128 KiB pieces, eight requests.
const FILE_IO_BYTES: u32 = 1 << 20;

/// Unit of statfs(2), and what folders and links tell.
const SPACE_UNIT_BYTES: u32 = 4096;

/// A copy_file_range reply counts in 32 bits. Whole segments, so that the next request begins at a segment again.
const COPY_BYTES_MAX: u64 = 0xffe0_0000;

/// Identical log lines within this time are one line.
const LOG_WINDOW: Duration = Duration::from_secs(10);

/// Different log lines within [`LOG_WINDOW`]: a damaged disk must not fill the log's disk.
const LOG_LINES_MAX: usize = 32;

thread_local! {
    /// Each request thread reads into its own buffer, used again and again.
    static READ_BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// What a mount is asked for.
#[derive(Debug)]
pub struct MountSettings {
    /// An existing folder, as an absolute path; with `device` only what messages call it.
    pub mountpoint: PathBuf,
    /// An open `/dev/fuse` that somebody has mounted already, for us to serve.
    pub device: Option<OwnedFd>,
    /// What the mount table shows as the source: the store's path.
    pub fsname: String,
    /// The kernel refuses changes: those of every path of this filesystem, clones included.
    pub read_only: bool,
    /// Users other than the mount's owner may ask; permissions still count.
    pub allow_other: bool,
    /// The kernel refuses to run programs from the mount.
    pub no_exec: bool,
    /// Threads that answer requests, at least 1.
    pub threads: usize,
}

/// A mount that answers.
#[derive(Debug)]
pub struct Mounted {
    session: BackgroundSession,
    mountpoint: PathBuf,
    undo: Undo,
}

impl Mounted {
    /// Blocks until the mount is gone, whoever unmounts it. All requests are answered then.
    ///
    /// # Errors
    /// `Unavailable` when the connection to the kernel broke.
    pub fn join(mut self) -> Result<()> {
        self.undo.0 = None;
        let about = format!("mount {}", self.mountpoint.display());
        self.session.join().map_err(|e| Error::io(about, e))
    }
}

/// Unmounts what is mounted there, unless the mount comes into service.
#[derive(Debug)]
struct Undo(Option<PathBuf>);

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(mountpoint) = self.0.take()
            && let Err(e) = rustix::mount::unmount(&mountpoint, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        {
            log::warn!("umount {}: {e}", mountpoint.display());
        }
    }
}

/// Mounts `fs`. When this returns, the kernel and the adapter have agreed on the terms and requests are answered.
///
/// # Errors
/// `NotFound` without `/dev/fuse` or a mountpoint, `Denied`, `Unavailable`.
pub fn mount(fs: Arc<MountedStore>, settings: &MountSettings) -> Result<Mounted> {
    let failed = |e: std::io::Error| Error::io(format!("mount {}", settings.mountpoint.display()), e);
    let mut config = Config::default();
    config.acl = if settings.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(settings.threads.max(1));
    // A clone needs the device itself, which a user who mounts through fusermount3 may not be allowed to open.
    config.clone_fd = File::options().read(true).write(true).open(DEVICE).is_ok();
    let adapter = Adapter::new(fs);
    let mut undo = Undo(None);
    let device = match &settings.device {
        Some(device) => Some(device.try_clone().map_err(failed)?),
        None => {
            let mounted = mount_directly(settings).map_err(failed)?;
            undo.0 = mounted.is_some().then(|| settings.mountpoint.clone());
            mounted
        }
    };
    let session = match device {
        Some(device) => Session::from_fd(adapter, device, config.acl, config).and_then(Session::spawn),
        None => {
            config.mount_options = options_of_helper(settings);
            fuser::spawn_mount(adapter, &settings.mountpoint, &config)
        }
    };
    let session = session.map_err(failed)?;
    Ok(Mounted { session, mountpoint: settings.mountpoint.clone(), undo })
}

/// Mounts without a helper, as root may. Returns the device to serve, or `None` when that is not allowed.
///
/// Nothing opens the mountpoint here: where systemd mounts on demand, that would wait for this very mount.
fn mount_directly(settings: &MountSettings) -> std::io::Result<Option<OwnedFd>> {
    let Ok(device) = File::options().read(true).write(true).open(DEVICE) else { return Ok(None) };
    let mut flags = MountFlags::NODEV | MountFlags::NOSUID;
    flags.set(MountFlags::RDONLY, settings.read_only);
    flags.set(MountFlags::NOEXEC, settings.no_exec);
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let mut data = format!("fd={},rootmode=40000,user_id={user},group_id={group}", device.as_raw_fd());
    data.push_str(",default_permissions");
    if settings.allow_other {
        data.push_str(",allow_other");
    }
    let kind = format!("fuse.{SUBTYPE}");
    let data = CString::new(data)?;
    match rustix::mount::mount(&settings.fsname, &settings.mountpoint, kind, flags, &*data) {
        Ok(()) => Ok(Some(device.into())),
        Err(rustix::io::Errno::PERM) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The options with which fusermount3 makes the same mount.
fn options_of_helper(settings: &MountSettings) -> Vec<MountOption> {
    let mut options = vec![
        MountOption::FSName(fsname(&settings.fsname)),
        // As a plain option: fuser keeps its own Subtype from the kernel where it mounts by itself.
        MountOption::CUSTOM(format!("subtype={SUBTYPE}")),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        if settings.read_only { MountOption::RO } else { MountOption::RW },
    ];
    if settings.no_exec {
        options.push(MountOption::NoExec);
    }
    options
}

/// fusermount3 gets all options as one string, where a comma ends one.
fn fsname(source: &str) -> String {
    source.replace('\\', "\\\\").replace(',', "\\,")
}

/// The error number of an error kind: the one place that decides it (docs/OPERATIONS.md has the table).
pub fn errno(kind: ErrorKind) -> Errno {
    match kind {
        ErrorKind::NotFound => Errno::ENOENT,
        ErrorKind::Exists => Errno::EEXIST,
        ErrorKind::Corrupt | ErrorKind::Unavailable => Errno::EIO,
        ErrorKind::Busy => Errno::EBUSY,
        ErrorKind::NoSpace => Errno::ENOSPC,
        ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        ErrorKind::Invalid => Errno::EINVAL,
        ErrorKind::Sealed | ErrorKind::Denied => Errno::EPERM,
        ErrorKind::ReadOnly => Errno::EROFS,
        ErrorKind::Stale => Errno::ESTALE,
        ErrorKind::NotEmpty => Errno::ENOTEMPTY,
        ErrorKind::CrossVm => Errno::EXDEV,
        ErrorKind::TooLong => Errno::ENAMETOOLONG,
        ErrorKind::TooLarge => Errno::EFBIG,
        ErrorKind::IsFolder => Errno::EISDIR,
        ErrorKind::NotFolder => Errno::ENOTDIR,
    }
}

/// The rows of one open folder, taken when reading begins, so that offsets stay what they were.
type Listing = Arc<Mutex<Arc<Vec<Entry>>>>;

/// The filesystem as the kernel sees it.
pub struct Adapter {
    fs: Arc<MountedStore>,
    clock: SystemClock,
    listings: Mutex<HashMap<u64, Listing>>,
    next_listing: AtomicU64,
    throttle: Mutex<Throttle>,
}

/// The outcome of a request: the answer, or the number of the error.
type Answer<T> = std::result::Result<T, Errno>;

impl Adapter {
    /// An adapter of `fs`.
    pub fn new(fs: Arc<MountedStore>) -> Self {
        Self {
            fs,
            clock: SystemClock::new(),
            listings: Mutex::default(),
            next_listing: AtomicU64::new(1),
            throttle: Mutex::default(),
        }
    }

    /// Does the work of a request. A panic in it is a bug, but it costs only this request: it is answered EIO, and
    /// the thread lives on.
    fn guarded<T>(&self, operation: &str, work: impl FnOnce(&MountedStore) -> Result<T>) -> Answer<T> {
        match catch_unwind(AssertUnwindSafe(|| work(&self.fs))) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                self.report(operation, &error);
                Err(errno(error.kind()))
            }
            Err(payload) => {
                let text = payload.downcast_ref::<&str>().copied();
                let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
                let line = format!("{operation}: internal error: {}", text.unwrap_or("no message"));
                self.log(log::Level::Error, &line);
                Err(Errno::EIO)
            }
        }
    }

    /// Tells of an error that the caller of a system call cannot see the reason of.
    fn report(&self, operation: &str, error: &Error) {
        match error.kind() {
            ErrorKind::Corrupt => self.log(log::Level::Error, &format!("{operation}: {error}")),
            ErrorKind::Unavailable | ErrorKind::NoSpace => {
                self.log(log::Level::Warn, &format!("{operation}: {error}"));
            }
            _ => log::debug!("{operation}: {error}"),
        }
    }

    fn log(&self, level: log::Level, line: &str) {
        let admission = locked(&self.throttle).admit(self.clock.elapsed(), line);
        if admission.left_out > 0 {
            log::warn!("{} more lines like the last ones were left out", admission.left_out);
        }
        if admission.admitted {
            log::log!(level, "{line}");
        }
    }

    /// Opens a file that the caller wanted to create and that was there already.
    fn open_existing(fs: &MountedStore, parent: Ino, name: &str, truncate: bool) -> Result<(Attributes, Opened)> {
        let found = fs.lookup(parent, name)?;
        if found.kind == Kind::Folder {
            return Err(Error::new(ErrorKind::IsFolder, format!("{name:?} is a folder")));
        }
        let opened = fs.open(found.ino, true, truncate)?;
        Ok((fs.attributes(found.ino, Some(opened.handle))?, opened))
    }

    fn mtime(&self, time: TimeOrNow) -> Timestamp {
        match time {
            TimeOrNow::SpecificTime(time) => Timestamp::from_system_time(time),
            TimeOrNow::Now => self.clock.now(),
        }
    }

    fn listing(&self, handle: FileHandle) -> Answer<Listing> {
        locked(&self.listings).get(&handle.0).cloned().ok_or(Errno::EBADF)
    }

    /// All rows of a folder, with `.` and `..` in front.
    fn rows(fs: &MountedStore, ino: Ino) -> Result<Vec<Entry>> {
        let mut rows = vec![
            Entry { ino, kind: Kind::Folder, name: ".".to_owned() },
            Entry { ino: fs.parent_of(ino), kind: Kind::Folder, name: "..".to_owned() },
        ];
        rows.append(&mut fs.list(ino)?);
        Ok(rows)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Folder => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
    }
}

fn file_attr(of: &Attributes) -> FileAttr {
    let mtime = of.mtime.system_time();
    FileAttr {
        ino: INodeNo(of.ino.0),
        size: of.bytes,
        blocks: of.sectors,
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(of.kind),
        perm: u16::try_from(of.mode & 0o7777).unwrap_or_default(),
        nlink: of.links,
        uid: of.uid,
        gid: of.gid,
        rdev: 0,
        blksize: if of.kind == Kind::File { FILE_IO_BYTES } else { SPACE_UNIT_BYTES },
        flags: 0,
    }
}

fn open_flags(opened: &Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    if opened.direct {
        flags |= FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
    } else if opened.keep_cache {
        // Nothing can be dirty in it: a close need not ask.
        flags |= FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH;
    }
    flags
}

/// What mode bits of fallocate(2) ask for.
fn allocation(mode: i32) -> Option<Allocate> {
    const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP_SIZE;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    const ZERO_KEEP_SIZE: i32 = ZERO | KEEP_SIZE;
    match mode {
        0 => Some(Allocate::Reserve),
        KEEP_SIZE => Some(Allocate::ReserveKeepSize),
        PUNCH => Some(Allocate::Punch),
        ZERO => Some(Allocate::Zero),
        ZERO_KEEP_SIZE => Some(Allocate::ZeroKeepSize),
        _ => None,
    }
}

/// A name to look for: what is not UTF-8 was never made here.
fn known_name(name: &OsStr) -> Answer<&str> {
    name.to_str().ok_or(Errno::ENOENT)
}

/// A name to make.
fn new_name(name: &OsStr) -> Answer<&str> {
    name.to_str().ok_or(Errno::EILSEQ)
}

/// Sends an answer, or the error in its place.
macro_rules! answer {
    ($reply:expr, $outcome:expr, |$value:pat_param| $send:expr) => {
        match $outcome {
            Ok($value) => $send,
            Err(number) => $reply.error(number),
        }
    };
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // The nearest possible value comes back as the error.
        if let Err(nearest) = config.set_max_write(WRITE_BYTES_MAX) {
            let _ = config.set_max_write(nearest);
        }
        let _ = config.set_max_background(BACKGROUND_REQUESTS_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_REQUESTS_MAX / 4 * 3);
        // No writeback cache: it costs large writes a third more and reports a full disk too late. No
        // HANDLE_KILLPRIV: answering getxattr with ENOSYS saves the same request per write without its duties.
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // open(O_TRUNC) arrives as one request: there is no moment at which it is open and not empty.
            InitFlags::FUSE_ATOMIC_O_TRUNC,
        ];
        for capability in wanted {
            if config.add_capabilities(capability).is_err() {
                log::debug!("init: the kernel does not offer {capability:?}");
            }
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = known_name(name).and_then(|name| self.guarded("lookup", |fs| fs.lookup(Ino(parent.0), name)));
        answer!(reply, found, |of| reply.entry(&of.keep, &file_attr(&of), Generation(0)));
    }

    fn forget(&self, _req: &Request, ino: INodeNo, lookups: u64) {
        self.fs.forget_inode(Ino(ino.0), lookups);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let found = self.guarded("getattr", |fs| fs.attributes(Ino(ino.0), fh.map(|fh| Handle(fh.0))));
        answer!(reply, found, |of| reply.attr(&of.keep, &file_attr(&of)));
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttributes {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            bytes: size,
            mtime: mtime.map(|time| self.mtime(time)),
        };
        let (ino, handle) = (Ino(ino.0), fh.map(|fh| Handle(fh.0)));
        let done = self.guarded("setattr", |fs| {
            // Times of access are not kept: to set one is to set nothing.
            if set == SetAttributes::default() {
                fs.attributes(ino, handle)
            } else {
                fs.set_attributes(ino, handle, set)
            }
        });
        answer!(reply, done, |of| reply.attr(&of.keep, &file_attr(&of)));
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let target = self.guarded("readlink", |fs| fs.read_link(Ino(ino.0)));
        answer!(reply, target, |target| reply.data(target.as_bytes()));
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _link_name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let caller = Caller { uid: req.uid(), gid: req.gid() };
        let mode = mode & !umask & 0o7777;
        let made = new_name(name)
            .and_then(|name| self.guarded("mkdir", |fs| fs.make_folder(Ino(parent.0), name, mode, caller)));
        answer!(reply, made, |of| reply.entry(&of.keep, &file_attr(&of), Generation(0)));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = known_name(name).and_then(|name| self.guarded("unlink", |fs| fs.unlink(Ino(parent.0), name)));
        answer!(reply, done, |()| reply.ok());
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = known_name(name).and_then(|name| self.guarded("rmdir", |fs| fs.remove_folder(Ino(parent.0), name)));
        answer!(reply, done, |()| reply.ok());
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let no_replace = flags.contains(RenameFlags::RENAME_NOREPLACE);
        if !flags.difference(RenameFlags::RENAME_NOREPLACE).is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let done = known_name(name).and_then(|name| {
            let newname = new_name(newname)?;
            self.guarded("rename", |fs| fs.rename(Ino(parent.0), name, Ino(newparent.0), newname, no_replace))
        });
        answer!(reply, done, |()| reply.ok());
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let truncate = flags.0 & libc::O_TRUNC != 0;
        let opened = self.guarded("open", |fs| fs.open(Ino(ino.0), write, truncate));
        answer!(reply, opened, |opened| reply.opened(FileHandle(opened.handle.0), open_flags(&opened)));
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let caller = Caller { uid: req.uid(), gid: req.gid() };
        let (parent, only_new, truncate) = (Ino(parent.0), flags & libc::O_EXCL != 0, flags & libc::O_TRUNC != 0);
        let made = new_name(name).and_then(|name| {
            self.guarded("create", |fs| match fs.create(parent, name, caller) {
                // Made by somebody else after the kernel has looked.
                Err(e) if e.kind() == ErrorKind::Exists && !only_new => Self::open_existing(fs, parent, name, truncate),
                other => other,
            })
        });
        answer!(reply, made, |(of, opened)| {
            let flags = open_flags(&opened);
            reply.created(&of.keep, &file_attr(&of), Generation(0), FileHandle(opened.handle.0), flags);
        });
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = READ_BUFFER.take();
        let size = size as usize;
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        let out = buffer.get_mut(..size).unwrap_or_default();
        let count = self.guarded("read", |fs| fs.read(Handle(fh.0), offset, out));
        answer!(reply, count, |count| reply.data(buffer.get(..count.min(size)).unwrap_or_default()));
        READ_BUFFER.set(buffer);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let done = self.guarded("write", |fs| fs.write(Handle(fh.0), offset, data));
        answer!(reply, done, |()| reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)));
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        let done = self.guarded("flush", |fs| fs.flush(Handle(fh.0)));
        answer!(reply, done, |()| reply.ok());
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let done = self.guarded("fsync", |fs| fs.sync(Handle(fh.0)));
        answer!(reply, done, |()| reply.ok());
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let done = self.guarded("release", |fs| {
            fs.release(Handle(fh.0));
            Ok(())
        });
        answer!(reply, done, |()| reply.ok());
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(how) = allocation(mode) else { return reply.error(Errno::EOPNOTSUPP) };
        let done = self.guarded("fallocate", |fs| fs.allocate(Handle(fh.0), offset, length, how));
        answer!(reply, done, |()| reply.ok());
    }

    fn lseek(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let found = self.guarded("lseek", |fs| match whence {
            libc::SEEK_DATA => fs.seek_data(Handle(fh.0), offset),
            libc::SEEK_HOLE => fs.seek_hole(Handle(fh.0), offset),
            _ => Err(Error::new(ErrorKind::Invalid, format!("whence {whence}"))),
        });
        let found = found.and_then(|found| found.and_then(|at| i64::try_from(at).ok()).ok_or(Errno::ENXIO));
        answer!(reply, found, |at| reply.offset(at));
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let len = len.min(COPY_BYTES_MAX);
        let copied = self.guarded("copy_file_range", |fs| {
            fs.copy_range(Handle(fh_in.0), offset_in, Handle(fh_out.0), offset_out, len)
        });
        answer!(reply, copied, |count| reply.written(u32::try_from(count).unwrap_or(u32::MAX)));
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let handle = self.next_listing.fetch_add(1, Ordering::Relaxed);
        locked(&self.listings).insert(handle, Listing::default());
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let rows = self.listing(fh).and_then(|listing| {
            // At the beginning, and after rewinddir(3), the folder is looked at anew.
            if offset == 0 {
                *locked(&listing) = Arc::new(self.guarded("readdir", |fs| Self::rows(fs, Ino(ino.0)))?);
            }
            Ok(locked(&listing).clone())
        });
        answer!(reply, rows, |rows| {
            let skip = usize::try_from(offset).unwrap_or(usize::MAX);
            for (next, row) in (1..).zip(rows.iter()).skip(skip) {
                if reply.add(INodeNo(row.ino.0), next, file_type(row.kind), &row.name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        locked(&self.listings).remove(&fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        // Changes of folders are log records, durable when their request is answered. ENOSYS means: done, and do
        // not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let unit = u64::from(SPACE_UNIT_BYTES);
        let space = self.guarded("statfs", |fs| Ok(fs.space()));
        answer!(reply, space, |space| {
            let (all, free) = (space.bytes_total / unit, space.bytes_free / unit);
            let name_bytes_max = u32::try_from(NAME_BYTES_MAX).unwrap_or(255);
            reply.statfs(all, free, free, 0, 0, SPACE_UNIT_BYTES, name_bytes_max, SPACE_UNIT_BYTES);
        });
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks permissions by itself (default_permissions).
        reply.error(Errno::ENOSYS);
    }

    // ENOSYS to the four below is remembered by the kernel. Any other answer to getxattr would cost one more request
    // per write, which asks for security.capability.

    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn bmap(&self, _req: &Request, _ino: INodeNo, _blocksize: u32, _idx: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }
}

/// Bounds what is logged: each line once in [`LOG_WINDOW`], and no more than [`LOG_LINES_MAX`] lines.
#[derive(Debug, Default)]
struct Throttle {
    began: Duration,
    lines: HashSet<String>,
    left_out: u64,
}

/// What [`Throttle::admit`] says.
#[derive(Debug, PartialEq, Eq)]
struct Admission {
    admitted: bool,
    /// Lines left out in the window that has just ended.
    left_out: u64,
}

impl Throttle {
    fn admit(&mut self, now: Duration, line: &str) -> Admission {
        let mut left_out = 0;
        if now.saturating_sub(self.began) >= LOG_WINDOW {
            self.began = now;
            self.lines.clear();
            left_out = std::mem::take(&mut self.left_out);
        }
        let admitted = self.lines.len() < LOG_LINES_MAX && self.lines.insert(line.to_owned());
        if !admitted {
            self.left_out += 1;
        }
        Admission { admitted, left_out }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_error_number() {
        let table = [
            (ErrorKind::NotFound, libc::ENOENT),
            (ErrorKind::Exists, libc::EEXIST),
            (ErrorKind::Corrupt, libc::EIO),
            (ErrorKind::Unavailable, libc::EIO),
            (ErrorKind::Busy, libc::EBUSY),
            (ErrorKind::NoSpace, libc::ENOSPC),
            (ErrorKind::Unsupported, libc::EOPNOTSUPP),
            (ErrorKind::Invalid, libc::EINVAL),
            (ErrorKind::Sealed, libc::EPERM),
            (ErrorKind::ReadOnly, libc::EROFS),
            (ErrorKind::Denied, libc::EPERM),
            (ErrorKind::Stale, libc::ESTALE),
            (ErrorKind::NotEmpty, libc::ENOTEMPTY),
            (ErrorKind::CrossVm, libc::EXDEV),
            (ErrorKind::TooLong, libc::ENAMETOOLONG),
            (ErrorKind::TooLarge, libc::EFBIG),
            (ErrorKind::IsFolder, libc::EISDIR),
            (ErrorKind::NotFolder, libc::ENOTDIR),
        ];
        for (kind, number) in table {
            assert_eq!(errno(kind).code(), number, "{kind:?}");
        }
    }

    #[test]
    fn allocation_modes_are_the_ones_of_the_manual() {
        let table = [
            (0, Allocate::Reserve),
            (1, Allocate::ReserveKeepSize),
            (3, Allocate::Punch),
            (0x10, Allocate::Zero),
            (0x11, Allocate::ZeroKeepSize),
        ];
        for mode in 0..0x100 {
            let expected = table.iter().find(|(m, _)| *m == mode).map(|(_, how)| *how);
            assert_eq!(allocation(mode), expected, "mode {mode:#x}");
        }
    }

    #[test]
    fn open_flags_follow_the_kind_of_file() {
        let opened = |direct, keep_cache| open_flags(&Opened { handle: Handle(1), direct, keep_cache });
        assert!(opened(true, true).contains(FopenFlags::FOPEN_DIRECT_IO));
        assert!(!opened(true, true).contains(FopenFlags::FOPEN_NOFLUSH), "the flush of a draft commits it");
        assert!(opened(false, true).contains(FopenFlags::FOPEN_KEEP_CACHE));
        assert_eq!(opened(false, false), FopenFlags::empty());
    }

    #[test]
    fn names_that_are_not_utf8_cannot_be_found_nor_made() {
        use std::os::unix::ffi::OsStrExt;
        let name = OsStr::from_bytes(b"a\xff");
        assert_eq!(known_name(name).unwrap_err().code(), libc::ENOENT);
        assert_eq!(new_name(name).unwrap_err().code(), libc::EILSEQ);
    }

    #[test]
    fn attributes_keep_their_units() {
        let of = Attributes {
            ino: Ino(7),
            kind: Kind::File,
            bytes: 1 << 40,
            sectors: 24,
            mode: 0o100_444,
            uid: 1,
            gid: 2,
            links: 1,
            mtime: Timestamp(1_500_000_000),
            keep: Duration::from_secs(1),
        };
        let attr = file_attr(&of);
        assert_eq!((attr.ino.0, attr.size, attr.blocks, attr.perm), (7, 1 << 40, 24, 0o444));
        assert_eq!(attr.mtime, SystemTime::UNIX_EPOCH + Duration::from_millis(1500));
    }

    #[test]
    fn a_repeated_line_is_logged_once_and_counted() {
        let mut throttle = Throttle::default();
        let mut admit = |seconds, line: &str| throttle.admit(Duration::from_secs(seconds), line);
        assert_eq!(admit(1, "a"), Admission { admitted: true, left_out: 0 });
        assert_eq!(admit(2, "a"), Admission { admitted: false, left_out: 0 });
        assert_eq!(admit(3, "b"), Admission { admitted: true, left_out: 0 });
        assert_eq!(admit(30, "a"), Admission { admitted: true, left_out: 1 });
        let many = (0..100).filter(|i| admit(31, &format!("line {i}")).admitted).count();
        assert_eq!(many, LOG_LINES_MAX - 1);
        assert_eq!(admit(60, "c"), Admission { admitted: true, left_out: 69 });
    }
}
