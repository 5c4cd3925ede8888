//! A directory as a place of objects: one file an object, its path below the root is its key.
//!
//! An object is written into a file without a name and linked to its key when all of it is on the medium, so a
//! writer that is killed leaves nothing. Where the medium knows no files without names, they are written in `tmp/`
//! below the root, under a lock that ends with their writer; [`Backend::remove_litter`] removes the unlocked ones.
//!
//! All paths are looked up from the opened root: when its medium is unmounted, nothing is written to, or found
//! missing in, the empty directory that was mounted over.

use std::io;
use std::num::{NonZeroU64, NonZeroUsize};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;
use rustix::fs::{self, AtFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::{Errno, retry_on_intr};

use crate::backend::calls::{Calls, System};
use crate::backend::{Backend, Guard, Key, Listed, Upload};
use crate::error::{Error, ErrorKind, Result, corrupt, invalid, not_found};
use crate::limits::RESERVE_BYTES;
use crate::random::fill_random;

/// Objects kept open: as many as a few readers touch in turn, far below the usual limit of 1024 open files.
const OPEN_FILES_MAX: usize = 64;

/// Folders remembered as being on the medium. One that is forgotten costs its syncs again, nothing else.
const KNOWN_FOLDERS_MAX: usize = 1024;

/// How often a full medium is written to again, and the pause between.
const FULL_TRIES: u32 = 5;
const FULL_PAUSE: Duration = Duration::from_millis(200);

/// Bytes appended after which their writeback is begun, so that little is left to write at the end.
const WRITEBACK_BYTES: u64 = 8 << 20;

/// Tries of a step that another process can spoil by removing the file at the wrong moment.
const ATTEMPTS_MAX: usize = 16;

/// Tries of a pin while somebody asks whether the object is pinned, which takes microseconds.
const PIN_ATTEMPTS_MAX: usize = 200;

/// The pause between them.
const PIN_PAUSE: Duration = Duration::from_millis(1);

/// Bytes of a piece of the reserve where it must be written.
const RESERVE_PIECE_BYTES: usize = 64 << 10;

/// The folder of unfinished files, on media where they need a name. No objects are in it.
const TEMPORARY_FOLDER: &str = "tmp";

/// The file of bytes kept aside. No object.
const RESERVE_NAME: &str = "reserve";

/// Files whose name begins so are somebody's unfinished copies and no objects.
const UNFINISHED_PREFIX: &str = ".tmp";

/// A directory that holds objects.
#[derive(Debug)]
pub struct Local {
    place: Arc<Place>,
    without_tmpfile: bool,
    open_files: OpenFiles,
}

type OpenFiles = Arc<Mutex<LruCache<Key, Arc<OwnedFd>>>>;

impl Local {
    /// Opens the directory at `root`, which must exist. It is held open, so its medium cannot be unmounted.
    ///
    /// # Errors
    /// `NotFound`, `NotFolder`, `Denied`.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        Self::open_with(root.into(), false, Arc::new(System))
    }

    /// The same for media without files that have no name (O_TMPFILE), and for tests. [`Local::open`] finds such
    /// media by itself.
    ///
    /// # Errors
    /// `NotFound`, `NotFolder`, `Denied`.
    pub fn open_without_tmpfile(root: impl Into<PathBuf>) -> Result<Self> {
        Self::open_with(root.into(), true, Arc::new(System))
    }

    /// The same with other calls, for tests of what a power failure leaves.
    ///
    /// # Errors
    /// `NotFound`, `NotFolder`, `Denied`.
    pub fn open_with_calls(root: impl Into<PathBuf>, without_tmpfile: bool, calls: Arc<dyn Calls>) -> Result<Self> {
        Self::open_with(root.into(), without_tmpfile, calls)
    }

    fn open_with(root: PathBuf, without_tmpfile: bool, calls: Arc<dyn Calls>) -> Result<Self> {
        let top = fs::open(&root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|cause| failed(root.display().to_string(), cause))?;
        let place = Place { root, top, calls, folders: Mutex::new(LruCache::new(at_least_one(KNOWN_FOLDERS_MAX))) };
        let open_files = Arc::new(Mutex::new(LruCache::new(at_least_one(OPEN_FILES_MAX))));
        Ok(Self { place: Arc::new(place), without_tmpfile, open_files })
    }

    /// The directory, as it was given.
    pub fn root(&self) -> &Path {
        &self.place.root
    }

    /// The object's file, from among the open ones if it is there.
    fn open_cached(&self, key: &Key) -> Result<Arc<OwnedFd>> {
        if let Some(file) = held(&self.open_files).get(key) {
            return Ok(Arc::clone(file));
        }
        let (file, _) = self.place.open_object(key)?;
        let file = Arc::new(file);
        // The pushed-out file is closed after the lock is given back: the last close of a deleted file frees it.
        let _pushed_out = held(&self.open_files).push(key.clone(), Arc::clone(&file));
        Ok(file)
    }

    fn forget_cached(&self, key: &Key) {
        let _closed_unlocked = held(&self.open_files).pop(key);
    }
}

impl Backend for Local {
    fn create(&self, key: &Key) -> Result<Box<dyn Upload>> {
        let (file, temporary) = match self.open_unnamed(key)? {
            Some(file) => (file, None),
            None => {
                let (file, temporary) = Temporary::create(&self.place)?;
                (file, Some(temporary))
            }
        };
        let place = Arc::clone(&self.place);
        Ok(Box::new(Writing {
            place,
            open_files: Arc::clone(&self.open_files),
            key: key.clone(),
            file,
            temporary,
            is_over: false,
            bytes: 0,
            bytes_begun: 0,
            is_torn: false,
        }))
    }

    fn create_over(&self, key: &Key) -> Result<Box<dyn Upload>> {
        self.place.make_folders(folder_of(key))?;
        let (file, temporary) = Temporary::create(&self.place)?;
        Ok(Box::new(Writing {
            place: Arc::clone(&self.place),
            open_files: Arc::clone(&self.open_files),
            key: key.clone(),
            file,
            temporary: Some(temporary),
            is_over: true,
            bytes: 0,
            bytes_begun: 0,
            is_torn: false,
        }))
    }

    fn read(&self, key: &Key, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut file = self.open_cached(key)?;
        let mut outcome = fill(&file, offset, out);
        if outcome == Err(Errno::STALE) {
            // A network medium forgot the file behind the descriptor; the name tells whether it is still there.
            self.forget_cached(key);
            file = self.open_cached(key)?;
            outcome = fill(&file, offset, out);
        }
        let filled = outcome.map_err(|cause| failed(key, cause))?;
        // Nothing wanted is nothing read, so the end is looked at.
        if filled < out.len() || out.is_empty() {
            let bytes = bytes_of(&fs::fstat(&file).map_err(|cause| failed(key, cause))?);
            let end = offset.saturating_add(out.len() as u64);
            if filled < out.len() || bytes < end {
                return Err(corrupt(format!("{key}: ends at {bytes}, wanted bytes {offset}..{end}")));
            }
        }
        Ok(())
    }

    fn read_checked(
        &self,
        key: &Key,
        offset: u64,
        out: &mut [u8],
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut read = |out: &mut [u8]| self.read(key, offset, out).and_then(|()| verify(out));
        match read(out) {
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                // Another process may have healed it: the file that is kept open is then the bad copy.
                self.forget_cached(key);
                read(out)
            }
            done => done,
        }
    }

    fn read_all(&self, key: &Key, bytes_max: u64) -> Result<Vec<u8>> {
        // Not through the open files: such objects are read once, and would push out those that are read in ranges.
        let (file, stat) = self.place.open_object(key)?;
        let bytes = bytes_of(&stat);
        let too_large = || corrupt(format!("{key}: has {bytes} bytes, at most {bytes_max} are allowed"));
        if bytes > bytes_max {
            return Err(too_large());
        }
        let mut out = vec![0; usize::try_from(bytes).map_err(|_| too_large())?];
        let filled = fill(&file, 0, &mut out).map_err(|cause| failed(key, cause))?;
        if filled < out.len() {
            return Err(corrupt(format!("{key}: ends at {filled}, wanted bytes 0..{bytes}")));
        }
        Ok(out)
    }

    fn len(&self, key: &Key) -> Result<u64> {
        let stat =
            fs::statat(&self.place.top, key.as_str(), AtFlags::empty()).map_err(|cause| not_looked_up(key, cause))?;
        only_files(key, &stat)?;
        Ok(bytes_of(&stat))
    }

    fn ages(&self, keys: &[Key]) -> Result<Vec<Option<Duration>>> {
        // After the objects are looked at, none of them can be younger than it is.
        let mut received = Vec::with_capacity(keys.len());
        for key in keys {
            match fs::statat(&self.place.top, key.as_str(), AtFlags::empty()) {
                Ok(stat) => received.push(Some(time_of(&stat))),
                Err(Errno::NOENT | Errno::NOTDIR) => received.push(None),
                Err(cause) => return Err(failed(key, cause)),
            }
        }
        let now = self.time_of_medium()?;
        Ok(received.into_iter().map(|at| at.map(|at| now.saturating_sub(at))).collect())
    }

    fn list(&self, prefix: &Key) -> Result<Vec<Listed>> {
        let folder = match self.place.open_folder(prefix.as_str()) {
            Ok(folder) => folder,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new()),
            Err(cause) => return Err(failed(prefix, cause)),
        };
        let mut rows = Vec::new();
        for entry in fs::Dir::read_from(&folder).map_err(|cause| failed(prefix, cause))? {
            let entry = entry.map_err(|cause| failed(prefix, cause))?;
            let Ok(name) = entry.file_name().to_str() else {
                log::warn!("{prefix}: a name that is not UTF-8 is skipped: {:?}", entry.file_name());
                continue;
            };
            if is_hidden(prefix, name) {
                continue;
            }
            let mut kind = entry.file_type();
            let mut bytes = 0;
            if kind != FileType::Directory {
                let stat = match fs::statat(&folder, name, AtFlags::empty()) {
                    Ok(stat) => stat,
                    Err(Errno::NOENT) => continue,
                    Err(cause) => return Err(failed(format!("{prefix}/{name}"), cause)),
                };
                kind = FileType::from_raw_mode(stat.st_mode);
                bytes = bytes_of(&stat);
            }
            match kind {
                FileType::Directory => rows.push(Listed { name: name.to_owned(), bytes: 0, is_folder: true }),
                FileType::RegularFile => rows.push(Listed { name: name.to_owned(), bytes, is_folder: false }),
                _ => log::warn!("{prefix}/{name}: neither a file nor a directory, skipped"),
            }
        }
        rows.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(rows)
    }

    fn delete(&self, key: &Key) -> Result<()> {
        self.forget_cached(key);
        // The directory is not synced: a deletion that a power failure undoes is only done again by the next
        // collection, and nothing is ever put under this key again.
        match self.place.calls.unlink(&self.place.top, key.as_str()) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            Err(cause) => Err(failed(key, cause)),
        }
    }

    fn will_need(&self, key: &Key, offset: u64, bytes: u64) {
        // An error here comes again at the read, which reports it.
        if let (Some(bytes), Ok(file)) = (NonZeroU64::new(bytes), self.open_cached(key)) {
            let _ = fs::fadvise(&*file, offset, Some(bytes), fs::Advice::WillNeed);
        }
    }

    fn pin(&self, key: &Key) -> Result<Box<dyn Guard>> {
        for _ in 0..PIN_ATTEMPTS_MAX {
            let (file, _) = self.place.open_object(key)?;
            if !flock(&file, FlockOperation::NonBlockingLockShared).map_err(|cause| failed(key, cause))? {
                // Only `is_pinned` locks objects exclusively, and it lets go at once.
                std::thread::sleep(PIN_PAUSE);
                continue;
            }
            // Who deletes looks for pins first: a pin taken after that look must not pass for one.
            if self.place.is_named(&file, key.as_str()).map_err(|cause| failed(key, cause))? {
                return Ok(Box::new(Held { _file: file }));
            }
        }
        Err(Error::new(
            ErrorKind::Unavailable,
            format!("{key}: held exclusively, no pin after {PIN_ATTEMPTS_MAX} tries"),
        ))
    }

    fn is_pinned(&self, key: &Key) -> Result<bool> {
        // Writable where possible, as network media lock exclusively only then.
        let mut opened = self.place.open_file(key.as_str(), OFlags::RDWR);
        if let Err(Errno::ROFS | Errno::ACCESS | Errno::PERM | Errno::TXTBSY) = opened {
            opened = self.place.open_file(key.as_str(), OFlags::RDONLY);
        }
        let file = match opened {
            Ok(file) => file,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ISDIR) => return Ok(false),
            Err(cause) => return Err(failed(key, cause)),
        };
        let is_free = flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|cause| failed(key, cause))?;
        // One deleted meanwhile is not there, whoever holds it.
        Ok(!is_free && fs::fstat(&file).map_err(|cause| failed(key, cause))?.st_nlink > 0)
    }

    fn try_lock(&self, key: &Key) -> Result<Option<Box<dyn Guard>>> {
        for _ in 0..ATTEMPTS_MAX {
            let file = match self.place.open_file(key.as_str(), OFlags::RDWR | OFlags::CREATE) {
                Ok(file) => file,
                Err(Errno::NOENT) => {
                    self.place.forget_folders();
                    self.place.make_folders(folder_of(key))?;
                    continue;
                }
                Err(cause) => return Err(failed(key, cause)),
            };
            if !flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|cause| failed(key, cause))? {
                return Ok(None);
            }
            // A lock on a file without its name excludes nobody.
            if self.place.is_named(&file, key.as_str()).map_err(|cause| failed(key, cause))? {
                return Ok(Some(Box::new(Held { _file: file })));
            }
        }
        Err(Error::new(ErrorKind::Unavailable, format!("{key}: lock file vanished {ATTEMPTS_MAX} times")))
    }

    fn release_reserve(&self) -> bool {
        fs::unlinkat(&self.place.top, RESERVE_NAME, AtFlags::empty()).is_ok()
    }

    fn keep_reserve(&self) {
        let there = fs::statat(&self.place.top, RESERVE_NAME, AtFlags::SYMLINK_NOFOLLOW);
        if there.is_ok_and(|stat| bytes_of(&stat) == RESERVE_BYTES) {
            return;
        }
        if let Err(error) = self.place.make_reserve() {
            log::debug!("no reserve is kept: {error}");
        }
    }

    fn remove_litter(&self) -> Result<u64> {
        self.place.remove_litter()
    }

    fn tidy(&self) {
        let mut open_files = held(&self.open_files);
        let is_deleted = |file: &OwnedFd| fs::fstat(file).is_ok_and(|stat| stat.st_nlink == 0);
        let gone: Vec<Key> =
            open_files.iter().filter(|(_, file)| is_deleted(file)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            open_files.pop(&key);
        }
    }

    fn space(&self) -> Option<(u64, u64)> {
        let stat = fs::fstatvfs(&self.place.top).ok()?;
        Some((stat.f_blocks.saturating_mul(stat.f_frsize), stat.f_bavail.saturating_mul(stat.f_frsize)))
    }
}

impl Local {
    /// The time that the medium gives to a file that is written now: on a network medium it is the server's.
    fn time_of_medium(&self) -> Result<Duration> {
        let fresh = || match self.open_unnamed(&Key::new("now"))? {
            Some(file) => Ok((file, None)),
            None => Temporary::create(&self.place).map(|(file, temporary)| (file, Some(temporary))),
        };
        let (file, _temporary) = match fresh() {
            // A forget must work on a full medium.
            Err(e) if e.kind() == ErrorKind::NoSpace && self.release_reserve() => fresh()?,
            made => made?,
        };
        let error = |cause| failed("time of the medium", cause);
        // Without room for a byte the time of its creation is just as good.
        match retry_on_intr(|| rustix::io::pwrite(&file, b"x", 0)) {
            Ok(_) | Err(Errno::NOSPC | Errno::DQUOT) => {}
            Err(cause) => return Err(error(cause)),
        }
        // Until then a network medium has not seen the byte, and the time is the client's guess.
        sync(&file).map_err(error)?;
        Ok(time_of(&fs::fstat(&file).map_err(error)?))
    }

    /// A file without a name on the medium of `key`, whose folder is made if need be; `None` where the medium has
    /// no such files.
    fn open_unnamed(&self, key: &Key) -> Result<Option<OwnedFd>> {
        let folder = folder_of(key);
        self.place.make_folders(folder)?;
        if self.without_tmpfile {
            return Ok(None);
        }
        match self.place.open_file(or_dot(folder), OFlags::RDWR | OFlags::TMPFILE) {
            // Somebody removed the folder after it was made, or long ago.
            Err(Errno::NOENT) => {
                self.place.forget_folders();
                self.place.make_folders(folder)?;
            }
            outcome => return unless_unsupported(outcome, key),
        }
        match self.place.open_file(or_dot(folder), OFlags::RDWR | OFlags::TMPFILE) {
            // Kernels before 3.11 answer so too.
            Err(Errno::NOENT) => Ok(None),
            outcome => unless_unsupported(outcome, key),
        }
    }
}

fn unless_unsupported(outcome: rustix::io::Result<OwnedFd>, key: &Key) -> Result<Option<OwnedFd>> {
    match outcome {
        Ok(file) => Ok(Some(file)),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Ok(None),
        Err(cause) => Err(failed(key, cause)),
    }
}

/// The opened root and what is known of the folders below it. Paths are relative to the root.
#[derive(Debug)]
struct Place {
    root: PathBuf,
    top: OwnedFd,
    calls: Arc<dyn Calls>,
    /// Folders that this process has seen onto the medium.
    folders: Mutex<LruCache<String, ()>>,
}

impl Place {
    fn open_file(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        self.calls.open(&self.top, path, flags)
    }

    fn open_folder(&self, folder: &str) -> rustix::io::Result<OwnedFd> {
        self.open_file(or_dot(folder), OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// The object's file, by its name.
    fn open_object(&self, key: &Key) -> Result<(OwnedFd, Stat)> {
        let file = self.open_file(key.as_str(), OFlags::RDONLY).map_err(|cause| not_looked_up(key, cause))?;
        let stat = fs::fstat(&file).map_err(|cause| failed(key, cause))?;
        only_files(key, &stat)?;
        Ok((file, stat))
    }

    /// Whether `path` leads to this very file.
    fn is_named(&self, file: &OwnedFd, path: &str) -> rustix::io::Result<bool> {
        let ours = fs::fstat(file)?;
        match fs::statat(&self.top, path, AtFlags::empty()) {
            Ok(named) => Ok((named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino)),
            Err(Errno::NOENT) => Ok(false),
            Err(cause) => Err(cause),
        }
    }

    /// Makes `folder` and those above it, and sees that they are on the medium.
    ///
    /// A folder that is there already is synced too, once for each process: who made it may have been killed before
    /// it was durable, or may not have come to it yet.
    fn make_folders(&self, folder: &str) -> Result<()> {
        if folder.is_empty() || held(&self.folders).get(folder).is_some() {
            return Ok(());
        }
        let mut path = String::with_capacity(folder.len());
        for part in folder.split('/') {
            let above = path.clone();
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(part);
            if held(&self.folders).get(&path).is_some() {
                continue;
            }
            match self.calls.make_folder(&self.top, &path) {
                Ok(()) | Err(Errno::EXIST) => self.sync_folder(&above)?,
                Err(cause) => return Err(failed(path, cause)),
            }
            held(&self.folders).put(path.clone(), ());
        }
        Ok(())
    }

    /// After somebody removed a folder: none is taken for granted.
    fn forget_folders(&self) {
        held(&self.folders).clear();
    }

    fn sync_folder(&self, folder: &str) -> Result<()> {
        match self.open_folder(folder).and_then(|folder| self.calls.sync(&folder)) {
            // Media that keep no directories of their own refuse this; there is nothing to sync then.
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(cause) => Err(failed(or_dot(folder), cause)),
        }
    }

    /// Gives a file without a name the name `path`, unless it is taken.
    fn link_unnamed(&self, file: &OwnedFd, path: &str) -> rustix::io::Result<()> {
        self.calls.link_unnamed(&self.top, file, path)
    }

    /// Gives the file at `temporary` the name `path`, unless it is taken. The first name may stay.
    fn rename_temporary(&self, temporary: &str, path: &str) -> rustix::io::Result<()> {
        match self.calls.rename(&self.top, temporary, path, fs::RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS) => self.link_temporary(temporary, path),
            outcome => outcome,
        }
    }

    /// The same where the medium knows no rename that does not replace. The first name stays.
    fn link_temporary(&self, temporary: &str, path: &str) -> rustix::io::Result<()> {
        self.calls.link(&self.top, temporary, path)
    }

    fn make_reserve(self: &Arc<Self>) -> Result<()> {
        let (file, temporary) = Temporary::create(self)?;
        let filled = match fs::fallocate(&file, fs::FallocateFlags::empty(), 0, RESERVE_BYTES) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => write_random(&file, RESERVE_BYTES),
            outcome => outcome,
        };
        // Some media find out at the sync that there is no room.
        filled
            .and_then(|()| sync(&file))
            .and_then(|()| fs::renameat(&self.top, &temporary.path, &self.top, RESERVE_NAME))
            .map_err(|cause| failed(RESERVE_NAME, cause))
    }

    fn remove_litter(&self) -> Result<u64> {
        let folder = match self.open_folder(TEMPORARY_FOLDER) {
            Ok(folder) => folder,
            Err(Errno::NOENT) => return Ok(0),
            Err(cause) => return Err(failed(TEMPORARY_FOLDER, cause)),
        };
        let mut bytes_freed: u64 = 0;
        for entry in fs::Dir::read_from(&folder).map_err(|cause| failed(TEMPORARY_FOLDER, cause))? {
            let entry = entry.map_err(|cause| failed(TEMPORARY_FOLDER, cause))?;
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                continue;
            }
            let error = |cause| failed(format!("{TEMPORARY_FOLDER}/{}", entry.file_name().to_string_lossy()), cause);
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
            let file = match fs::openat(&folder, entry.file_name(), flags, Mode::empty()) {
                Ok(file) => file,
                // Gone meanwhile, or nothing that a writer of ours makes.
                Err(Errno::NOENT | Errno::ISDIR | Errno::LOOP | Errno::NXIO) => continue,
                Err(cause) => return Err(error(cause)),
            };
            let stat = fs::fstat(&file).map_err(error)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
                || !flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(error)?
            {
                continue;
            }
            match fs::unlinkat(&folder, entry.file_name(), AtFlags::empty()) {
                // With a second name it is an object whose writer died before it removed the first.
                Ok(()) if stat.st_nlink == 1 => bytes_freed = bytes_freed.saturating_add(bytes_of(&stat)),
                Ok(()) | Err(Errno::NOENT) => {}
                Err(cause) => return Err(error(cause)),
            }
        }
        Ok(bytes_freed)
    }
}

/// The name of an unfinished file; it is removed when this is dropped.
#[derive(Debug)]
struct Temporary {
    place: Arc<Place>,
    path: String,
}

impl Temporary {
    /// A new file in the temporary folder, locked as long as it is open.
    fn create(place: &Arc<Place>) -> Result<(OwnedFd, Self)> {
        for _ in 0..ATTEMPTS_MAX {
            place.make_folders(TEMPORARY_FOLDER)?;
            let mut random = [0; 8];
            fill_random(&mut random).map_err(|e| e.within(TEMPORARY_FOLDER))?;
            let path = format!("{TEMPORARY_FOLDER}/{}-{:016x}", std::process::id(), u64::from_le_bytes(random));
            let file = match place.open_file(&path, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL) {
                Ok(file) => file,
                Err(Errno::EXIST) => continue,
                Err(Errno::NOENT) => {
                    place.forget_folders();
                    continue;
                }
                Err(cause) => return Err(failed(path, cause)),
            };
            let temporary = Self { place: Arc::clone(place), path };
            let error = |cause| failed(&temporary.path, cause);
            // Between the two calls the file passed for litter; then it is locked or nameless by now.
            if flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(error)?
                && fs::fstat(&file).map_err(error)?.st_nlink > 0
            {
                return Ok((file, temporary));
            }
        }
        Err(Error::new(ErrorKind::Unavailable, format!("{TEMPORARY_FOLDER}: no file after {ATTEMPTS_MAX} tries")))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename it is gone already. What cannot be removed is litter.
        let _ = self.place.calls.unlink(&self.place.top, &self.path);
    }
}

/// An object that is being written.
#[derive(Debug)]
struct Writing {
    place: Arc<Place>,
    // Where what was under the key may be kept open.
    open_files: OpenFiles,
    key: Key,
    file: OwnedFd,
    /// `None` for a file without a name.
    temporary: Option<Temporary>,
    /// Whether it takes the place of what is under its key.
    is_over: bool,
    bytes: u64,
    /// How far writeback was begun.
    bytes_begun: u64,
    /// Whether a failed append may have left bytes after the end.
    is_torn: bool,
}

impl Upload for Writing {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        let mut offset = self.bytes;
        let mut waited = 0;
        while !rest.is_empty() {
            let outcome = match self.place.calls.write(&self.file, rest, offset) {
                Ok(0) => Err(Errno::IO),
                // Objects that collection has just deleted are held by readers a moment longer.
                Err(Errno::NOSPC) if waited < FULL_TRIES => {
                    waited += 1;
                    std::thread::sleep(FULL_PAUSE);
                    continue;
                }
                outcome => outcome,
            };
            match outcome {
                Ok(written) => {
                    rest = rest.get(written..).unwrap_or_default();
                    offset += written as u64;
                }
                Err(cause) => {
                    // The end stays where it was, so that the same bytes can be appended again when there is room.
                    self.is_torn = true;
                    return Err(failed(&self.key, cause));
                }
            }
        }
        self.bytes = offset;
        if self.bytes - self.bytes_begun >= WRITEBACK_BYTES {
            // The kernel answers this advice by beginning to write the range and not waiting for it. Pages still
            // being written stay in its cache. Only a hint: `finish` is what reports errors.
            let range = NonZeroU64::new(self.bytes - self.bytes_begun);
            let _ = fs::fadvise(&self.file, self.bytes_begun, range, fs::Advice::DontNeed);
            self.bytes_begun = self.bytes;
        }
        Ok(())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let (key, end) = (&self.key, offset.saturating_add(out.len() as u64));
        if end > self.bytes {
            return Err(invalid(format!("{key}: {} bytes were appended, wanted bytes {offset}..{end}", self.bytes)));
        }
        let filled = fill(&self.file, offset, out).map_err(|cause| failed(key, cause))?;
        if filled < out.len() {
            return Err(corrupt(format!("{key}: ends at {}, wanted bytes {offset}..{end}", offset + filled as u64)));
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let (place, key) = (&self.place, &self.key);
        if self.is_torn {
            place.calls.truncate(&self.file, self.bytes).map_err(|cause| failed(key, cause))?;
        }
        // Sync before the name: a name must never lead to missing bytes (I4).
        place.calls.sync(&self.file).map_err(|cause| failed(key, cause))?;
        let name = || match &self.temporary {
            None => place.link_unnamed(&self.file, key.as_str()),
            Some(temporary) if self.is_over => {
                place.calls.rename(&place.top, &temporary.path, key.as_str(), fs::RenameFlags::empty())
            }
            Some(temporary) => place.rename_temporary(&temporary.path, key.as_str()),
        };
        let mut outcome = name();
        if outcome == Err(Errno::NOENT) {
            // Somebody removed the folder meanwhile.
            place.forget_folders();
            place.make_folders(folder_of(key))?;
            outcome = name();
        }
        outcome.map_err(|cause| failed(key, cause))?;
        if self.is_over {
            // Who reads through the file that was there before would go on with the bad copy.
            let _closed_unlocked = held(&self.open_files).pop(key);
        }
        // Visible from here on, so whatever goes wrong, the object may be there (I9).
        place.sync_folder(folder_of(key)).map_err(|error| error.within(key).as_kind(ErrorKind::Unavailable))
    }
}

/// A lock or a pin: the kernel lets go of it when the file is closed.
struct Held {
    _file: OwnedFd,
}

impl Guard for Held {}

/// Locks the file without waiting; `false` when another holder stands against it.
fn flock(file: &OwnedFd, operation: FlockOperation) -> rustix::io::Result<bool> {
    match retry_on_intr(|| fs::flock(file, operation)) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(cause) => Err(cause),
    }
}

fn sync(file: impl AsFd) -> rustix::io::Result<()> {
    retry_on_intr(|| fs::fsync(&file))
}

/// Reads until `out` is full or the file ends; returns the bytes read.
fn fill(file: impl AsFd, offset: u64, out: &mut [u8]) -> rustix::io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        // No file goes further than the kernel can count.
        let Some(at) = offset.checked_add(filled as u64).filter(|at| i64::try_from(*at).is_ok()) else { break };
        match rustix::io::pread(&file, &mut *rest, at) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(Errno::INTR) => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok(filled)
}

/// Writes `bytes` bytes that no medium can compress.
fn write_random(file: &OwnedFd, bytes: u64) -> rustix::io::Result<()> {
    let mut piece = vec![0; RESERVE_PIECE_BYTES];
    let mut offset: u64 = 0;
    while offset < bytes {
        fill_random(&mut piece).map_err(|_| Errno::IO)?;
        let wanted = usize::try_from(bytes - offset).unwrap_or(usize::MAX).min(piece.len());
        match retry_on_intr(|| rustix::io::pwrite(file, piece.get(..wanted).unwrap_or_default(), offset))? {
            0 => return Err(Errno::IO),
            written => offset += written as u64,
        }
    }
    Ok(())
}

/// The key without its last part; empty for the root.
fn folder_of(key: &Key) -> &str {
    key.as_str().rsplit_once('/').map_or("", |(folder, _)| folder)
}

fn or_dot(folder: &str) -> &str {
    if folder.is_empty() { "." } else { folder }
}

/// Names that are no objects.
fn is_hidden(prefix: &Key, name: &str) -> bool {
    let is_ours = prefix.as_str().is_empty() && (name == TEMPORARY_FOLDER || name == RESERVE_NAME);
    is_ours || name == "." || name == ".." || name.starts_with(UNFINISHED_PREFIX)
}

fn bytes_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// When the content was last written, since the epoch: for an object that is when it came.
fn time_of(stat: &Stat) -> Duration {
    let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
    Duration::new(seconds, u32::try_from(stat.st_mtime_nsec).unwrap_or(0))
}

fn failed(context: impl std::fmt::Display, cause: Errno) -> Error {
    Error::io(context.to_string(), io::Error::from(cause))
}

/// An error of looking an object up. Below an object there is none, which a directory tells in another way.
fn not_looked_up(key: &Key, cause: Errno) -> Error {
    let error = failed(key, cause);
    if cause == Errno::NOTDIR { error.as_kind(ErrorKind::NotFound) } else { error }
}

/// `NotFound` for a folder: it is a prefix of keys and no object.
fn only_files(key: &Key, stat: &Stat) -> Result<()> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(()),
        kind => Err(not_found(format!("{key}: no file but {kind:?}"))),
    }
}

fn at_least_one(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN)
}

/// The locked value. Who panicked while holding it left nothing half done: all are single calls on maps.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_rename_that_does_not_replace_a_name_is_linked_and_the_first_one_goes() {
        let folder = tempfile::tempdir().unwrap();
        let local = Local::open_without_tmpfile(folder.path()).unwrap();
        let (file, temporary) = Temporary::create(&local.place).unwrap();
        rustix::io::pwrite(&file, b"whole", 0).unwrap();
        local.place.link_temporary(&temporary.path, "object").unwrap();
        assert_eq!(local.place.link_temporary(&temporary.path, "object"), Err(Errno::EXIST));
        drop((file, temporary));
        assert_eq!(std::fs::read_dir(folder.path().join(TEMPORARY_FOLDER)).unwrap().count(), 0);
        assert_eq!(local.read_all(&Key::new("object"), 100).unwrap(), b"whole");
    }

    #[test]
    fn a_reserve_that_must_be_written_has_all_its_bytes_and_no_run_of_zeros() {
        let folder = tempfile::tempdir().unwrap();
        let local = Local::open(folder.path()).unwrap();
        let (file, _temporary) = Temporary::create(&local.place).unwrap();
        write_random(&file, 100_000).unwrap();
        assert_eq!(bytes_of(&fs::fstat(&file).unwrap()), 100_000);
        let mut bytes = vec![0; 100_000];
        assert_eq!(fill(&file, 0, &mut bytes), Ok(100_000));
        assert!(bytes.chunks(32).all(|chunk| chunk.iter().any(|byte| *byte != 0)));
    }

    #[test]
    fn a_failed_append_leaves_no_bytes_behind_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let local = Local::open(folder.path()).unwrap();
        let key = Key::new("object");
        let file = local.open_unnamed(&key).unwrap().unwrap();
        // As after an append of which only a part found room.
        rustix::io::pwrite(&file, b"abcdef", 0).unwrap();
        let place = Arc::clone(&local.place);
        let mut writing = Writing {
            place,
            open_files: Arc::clone(&local.open_files),
            key: key.clone(),
            file,
            temporary: None,
            is_over: false,
            bytes: 0,
            bytes_begun: 0,
            is_torn: true,
        };
        writing.append(b"xy").unwrap();
        Box::new(writing).finish().unwrap();
        assert_eq!(local.read_all(&key, 100).unwrap(), b"xy");
    }

    #[test]
    fn a_replaced_object_is_seen_though_the_one_before_is_open() {
        let folder = tempfile::tempdir().unwrap();
        let [local, other] = [(); 2].map(|()| Local::open(folder.path()).unwrap());
        let key = Key::new("objects/one");
        local.put_new(&key, b"bad").unwrap();
        let mut out = [0; 3];
        let mut verify = |bytes: &[u8]| if bytes == b"one" { Ok(()) } else { Err(crate::error::corrupt("is bad")) };
        assert_eq!(other.read_checked(&key, 0, &mut out, &mut verify).unwrap_err().kind(), ErrorKind::Corrupt);
        let mut upload = local.create_over(&key).unwrap();
        // Read while it is written, as who takes over what is whole does.
        local.read(&key, 0, &mut out).unwrap();
        upload.append(b"one").unwrap();
        upload.finish().unwrap();
        local.read(&key, 0, &mut out).unwrap();
        assert_eq!(&out, b"one");
        // The other process is told nothing.
        other.read_checked(&key, 0, &mut out, &mut verify).unwrap();
        assert_eq!(&out, b"one");
    }

    #[test]
    fn the_open_files_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let local = Local::open(folder.path()).unwrap();
        for number in 0..OPEN_FILES_MAX + 10 {
            let key = Key::new(format!("objects/{number}"));
            local.put_new(&key, b"x").unwrap();
            local.read(&key, 0, &mut [0]).unwrap();
        }
        assert_eq!(held(&local.open_files).len(), OPEN_FILES_MAX);
        local.delete(&Key::new(format!("objects/{OPEN_FILES_MAX}"))).unwrap();
        assert_eq!(held(&local.open_files).len(), OPEN_FILES_MAX - 1);
    }
}
