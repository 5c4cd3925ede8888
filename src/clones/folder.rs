//! The folder of a store's clones on this host: one folder for each clone, there as a whole or not at all.
//!
//! ```text
//!   DIR/<store>/NAME/clone.json   what it is a clone of
//!                    data         sparse, the size of the image; its owner, mode and times are the clone's
//!                    map          which blocks of data count
//!   DIR/<store>/.new-..., .gone-...   being made, being removed; litter when nobody holds the folder's lock
//! ```
//!
//! Who has a clone open holds a lock on its data file: shared to read, exclusive to write. Processes on this host
//! meet in these locks and in nothing else.

use std::fs::{DirBuilder, File, Metadata};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, retry_on_intr};

use crate::clones::blocks::Blocks;
use crate::clones::description::{BYTES_MAX, Description, FILE_NAME};
use crate::clones::file::OsFile;
use crate::clones::map::{CloneId, write};
use crate::clones::{MapMemory, Overlay};
use crate::error::{Error, ErrorKind, Result, busy, corrupt, invalid, not_found};
use crate::name::FileName;

/// Name of the sparse file.
pub const DATA_NAME: &str = "data";

/// Name of the map.
pub const MAP_NAME: &str = "map";

/// A map that is being written anew.
const NEW_MAP_NAME: &str = "map.new";

/// A description that is being written.
const NEW_DESCRIPTION_NAME: &str = "clone.json.new";

/// What names of clones that are being made, and removed, begin with. No clone has such a name.
const BEING_MADE: &str = ".new-";
const BEING_REMOVED: &str = ".gone-";

/// The folder of the clones of one store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClonesFolder {
    path: PathBuf,
}

/// A clone as it lies there.
#[derive(Debug)]
pub struct Found {
    /// What it is a clone of.
    pub description: Description,
    /// Of its data file: owner, mode, times, and what it takes on the disk.
    pub metadata: Metadata,
}

/// Checks the name of a clone: that of a file, and it does not begin with a dot.
///
/// # Errors
/// `Invalid`, `TooLong`.
pub fn check_name(name: &str) -> Result<()> {
    FileName::new(name)?;
    if name.starts_with('.') {
        return Err(invalid(format!("clone {name:?}: begins with a dot")));
    }
    Ok(())
}

impl ClonesFolder {
    /// The folder for the store of this identity below `root`. It need not be there.
    pub fn new(root: &Path, store: &str) -> Self {
        Self { path: root.join(store) }
    }

    /// The folder of one store at this path.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all clones, sorted. None if the folder is not there.
    ///
    /// # Errors
    /// `Denied`, `Unavailable`.
    pub fn names(&self) -> Result<Vec<String>> {
        let about = |e| Error::io(self.path.display().to_string(), e);
        let rows = match std::fs::read_dir(&self.path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            rows => rows.map_err(about)?,
        };
        let mut names = Vec::new();
        for row in rows {
            let row = row.map_err(about)?;
            // What else lies there was not made by us.
            if let Ok(name) = row.file_name().into_string()
                && check_name(&name).is_ok()
                && row.file_type().is_ok_and(|t| t.is_dir())
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Looks at a clone. Cost: one small file is read.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Unsupported`, `Denied`, `Unavailable`; all name the clone.
    pub fn find(&self, name: &str) -> Result<Found> {
        let folder = self.clone_folder(name)?;
        let description = read_description(&folder).map_err(|e| about_clone(name, e))?;
        let data = folder.join(DATA_NAME);
        let metadata = std::fs::symlink_metadata(&data).map_err(|e| about_clone(name, Error::io(DATA_NAME, e)))?;
        if !metadata.is_file() || metadata.len() != description.image_bytes {
            let (bytes, image) = (metadata.len(), description.image_bytes);
            return Err(about_clone(name, corrupt(format!("data has {bytes} bytes, the image {image}"))));
        }
        Ok(Found { description, metadata })
    }

    fn clone_folder(&self, name: &str) -> Result<PathBuf> {
        check_name(name)?;
        let folder = self.path.join(name);
        match std::fs::symlink_metadata(&folder) {
            Ok(of) if of.is_dir() => Ok(folder),
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("clone {name}"), e)),
            _ => Err(not_found(format!("clone {name:?} is not there"))),
        }
    }

    /// Takes the lock for making and removing clones; makes the folder if it is not there.
    ///
    /// # Errors
    /// `Denied`, `NoSpace`, `Unavailable`.
    pub fn lock(&self) -> Result<LockedFolder<'_>> {
        let about = |e| Error::io(format!("clone folder {}", self.path.display()), e);
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path).map_err(about)?;
        let handle = File::open(&self.path).map_err(about)?;
        retry_on_intr(|| flock(&handle, FlockOperation::LockExclusive)).map_err(|e| about(e.into()))?;
        Ok(LockedFolder { folder: self, handle })
    }

    /// Opens a clone for reading, and for writing after [`OpenClone::begin_writing`].
    ///
    /// # Errors
    /// `NotFound`, `Busy` when another process writes it, `Corrupt`, `Unsupported`, `NoSpace` when its map does not
    /// fit into memory, `Denied`, `Unavailable`.
    pub fn open(&self, name: &str, memory: &Arc<MapMemory>) -> Result<OpenClone> {
        let folder = self.clone_folder(name)?;
        let data = open_file(&folder, DATA_NAME).map_err(|e| about_clone(name, e))?;
        if !try_flock(&data, FlockOperation::NonBlockingLockShared)? {
            return Err(busy(format!("clone {name:?} is being written by another process")));
        }
        // Removed between opening and locking: then this is no clone any more.
        if !is_named(&data, &folder.join(DATA_NAME)) {
            return Err(not_found(format!("clone {name:?} is not there")));
        }
        let description = read_description(&folder).map_err(|e| about_clone(name, e))?;
        let lock = data.try_clone().map_err(|e| about_clone(name, Error::io(DATA_NAME, e)))?;
        let map = open_file(&folder, MAP_NAME).map_err(|e| about_clone(name, e))?;
        let overlay = Overlay::open(
            name,
            description.clone,
            description.image_bytes,
            Box::new(OsFile::new(DATA_NAME, data)),
            Arc::new(OsFile::new(MAP_NAME, map)),
            memory.clone(),
        )?;
        Ok(OpenClone { name: name.to_owned(), folder, description, overlay, lock })
    }
}

/// The right to make and remove clones of a store. There is one at a time; it is given back when it is dropped.
#[derive(Debug)]
pub struct LockedFolder<'a> {
    folder: &'a ClonesFolder,
    handle: File,
}

impl LockedFolder<'_> {
    /// Makes a clone that has nothing of its own yet. It is durable and there as a whole when this returns; the path of
    /// its folder, and what it is. `hold` is called when the clone can be found as litter, and gives the name of what it holds.
    ///
    /// # Errors
    /// `Exists`, `Invalid` or `TooLong` for the name, what `hold` returns, `NoSpace`, `Denied`, `Unavailable`. Then
    /// there may be litter.
    pub fn create(
        &self,
        name: &str,
        mut description: Description,
        hold: impl FnOnce(&Description) -> Result<String>,
    ) -> Result<(PathBuf, Description)> {
        check_name(name)?;
        let path = self.folder.path.join(name);
        if std::fs::symlink_metadata(&path).is_ok() {
            return Err(Error::new(ErrorKind::Exists, format!("clone {name:?} exists")));
        }
        let temporary = self.temporary(BEING_MADE, &description.clone);
        let made = fill(&temporary, &description).and_then(|()| self.sync()).and_then(|()| {
            description.hold = Some(hold(&description)?);
            write_description(&temporary, &description)?;
            sync_folder(&temporary)?;
            std::fs::rename(&temporary, &path).map_err(|e| Error::io(path.display().to_string(), e))?;
            self.sync()
        });
        made.map(|()| (path, description)).map_err(|e| about_clone(name, e))
    }

    /// Removes a clone with all that was written to it. `between` runs when it is out of sight for good and before its
    /// bytes go; if it fails, the clone stays as litter for which [`LockedFolder::litter`] asks again.
    ///
    /// # Errors
    /// `NotFound`, `Busy` while somebody has it open, `Denied`, `Unavailable`; what `between` returns.
    pub fn remove(&self, name: &str, between: impl FnOnce(Option<&Description>) -> Result<()>) -> Result<()> {
        let folder = self.folder.clone_folder(name)?;
        let _alone = match open_file(&folder, DATA_NAME) {
            Ok(data) if !try_flock(&data, FlockOperation::NonBlockingLockExclusive)? => {
                return Err(busy(format!("clone {name:?} is open")));
            }
            Ok(data) => Some(data),
            // A clone that is damaged so far can still be removed.
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(about_clone(name, e)),
        };
        let description = read_description(&folder).ok();
        let id = description.as_ref().map_or(CloneId::default(), |d| d.clone);
        let gone = self.temporary(BEING_REMOVED, &id);
        let about = |e| Error::io(format!("clone {name:?}"), e);
        std::fs::rename(&folder, &gone).map_err(about)?;
        self.sync()?;
        between(description.as_ref())?;
        std::fs::remove_dir_all(&gone).map_err(about)
    }

    /// What commands that were killed left behind. `release` gets what is known of each before its bytes go; where it
    /// fails, they stay.
    ///
    /// # Errors
    /// `Unavailable`, `Denied`.
    pub fn litter(&self, mut release: impl FnMut(&Description) -> Result<()>) -> Result<()> {
        let about = |e| Error::io(self.folder.path.display().to_string(), e);
        for row in std::fs::read_dir(&self.folder.path).map_err(about)? {
            let row = row.map_err(about)?;
            let name = row.file_name();
            let is_litter = name.to_str().is_some_and(|n| n.starts_with(BEING_MADE) || n.starts_with(BEING_REMOVED));
            if !is_litter {
                continue;
            }
            // Without a description nothing was held for it.
            if let Ok(description) = read_description(&row.path())
                && let Err(e) = release(&description)
            {
                log::warn!("{}: stays: {e}", row.path().display());
                continue;
            }
            if let Err(e) = std::fs::remove_dir_all(row.path()) {
                log::warn!("{}: stays: {e}", row.path().display());
            }
        }
        Ok(())
    }

    fn temporary(&self, beginning: &str, clone: &CloneId) -> PathBuf {
        let id = crate::clones::description::hex(&clone.0);
        // Two that are damaged have the same identity.
        let names = (0_u32..).map(|number| format!("{beginning}{id}-{number}"));
        let free = names.map(|name| self.folder.path.join(name)).find(|path| std::fs::symlink_metadata(path).is_err());
        free.unwrap_or_else(|| self.folder.path.join(format!("{beginning}{id}")))
    }

    fn sync(&self) -> Result<()> {
        self.handle.sync_all().map_err(|e| Error::io(self.folder.path.display().to_string(), e))
    }
}

/// An open clone: its overlay, and the lock that keeps other processes away.
#[derive(Debug)]
pub struct OpenClone {
    name: String,
    folder: PathBuf,
    description: Description,
    overlay: Overlay,
    lock: File,
}

impl OpenClone {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is a clone of.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// What was written to it.
    pub fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// Its data file's owner, mode, times and blocks.
    ///
    /// # Errors
    /// `Unavailable`.
    pub fn metadata(&self) -> Result<Metadata> {
        self.lock.metadata().map_err(|e| about_clone(&self.name, Error::io(DATA_NAME, e)))
    }

    /// The data file itself, to change its owner, mode or times.
    pub fn data_file(&self) -> &File {
        &self.lock
    }

    /// Takes the right to write. Nobody may write yet.
    ///
    /// # Errors
    /// `Busy` when another process has the clone open, `Corrupt`, `NoSpace`, `Unavailable`.
    pub fn begin_writing(&self) -> Result<()> {
        if !try_flock(&self.lock, FlockOperation::NonBlockingLockExclusive)? {
            // The kernel lets go of the old lock before it tries the new one.
            try_flock(&self.lock, FlockOperation::NonBlockingLockShared)?;
            return Err(busy(format!("clone {:?} is open in another process", self.name)));
        }
        let begun = self.load_map();
        if begun.is_err() {
            self.end_writing();
        }
        begun
    }

    /// Reads the map again, which another process may have changed; writes it anew where it cannot be gone on with.
    fn load_map(&self) -> Result<()> {
        let about = |e| about_clone(&self.name, e);
        let is_named = is_named(&self.lock, &self.folder.join(DATA_NAME));
        if !is_named {
            return Err(not_found(format!("clone {:?} is not there", self.name)));
        }
        let map = open_file(&self.folder, MAP_NAME).map_err(about)?;
        if !self.overlay.load(Arc::new(OsFile::new(MAP_NAME, map)))? {
            return Ok(());
        }
        let new = self.folder.join(NEW_MAP_NAME);
        let file = File::options().read(true).write(true).create(true).truncate(true).mode(0o600).open(&new);
        let file = OsFile::new(MAP_NAME, file.map_err(|e| about(Error::io(NEW_MAP_NAME, e)))?);
        self.overlay.write_map(&file)?;
        std::fs::rename(&new, self.folder.join(MAP_NAME)).map_err(|e| about(Error::io(MAP_NAME, e)))?;
        sync_folder(&self.folder).map_err(about)?;
        self.overlay.load(Arc::new(file)).map(drop)
    }

    /// Gives the right to write back; all must be flushed. Reading goes on.
    pub fn end_writing(&self) {
        // Always possible: nobody else can have a lock.
        if let Err(e) = try_flock(&self.lock, FlockOperation::NonBlockingLockShared) {
            log::warn!("{e}");
        }
    }
}

/// All files of a new clone.
fn fill(folder: &Path, description: &Description) -> Result<()> {
    let about = |e| Error::io(folder.display().to_string(), e);
    DirBuilder::new().mode(0o700).create(folder).map_err(about)?;
    write_description(folder, description)?;
    let data = create_file(folder, DATA_NAME)?;
    data.set_len(description.image_bytes).and_then(|()| data.sync_all()).map_err(about)?;
    let map = create_file(folder, MAP_NAME)?;
    write(&OsFile::new(MAP_NAME, map), description.clone, description.image_bytes, &Blocks::default())?;
    sync_folder(folder)
}

fn write_description(folder: &Path, description: &Description) -> Result<()> {
    let new = folder.join(NEW_DESCRIPTION_NAME);
    let about = |e| Error::io(new.display().to_string(), e);
    let mut file = create_file(folder, NEW_DESCRIPTION_NAME)?;
    file.write_all(description.to_text()?.as_bytes()).and_then(|()| file.sync_all()).map_err(about)?;
    std::fs::rename(&new, folder.join(FILE_NAME)).map_err(about)
}

fn about_clone(name: &str, cause: Error) -> Error {
    cause.within(format!("clone {name:?}"))
}

fn try_flock(file: &File, operation: FlockOperation) -> Result<bool> {
    match retry_on_intr(|| flock(file, operation)) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(Error::io("lock of a clone", e.into())),
    }
}

/// Whether a path still leads to an open file.
fn is_named(file: &File, path: &Path) -> bool {
    let identity = |m: Metadata| (m.dev(), m.ino());
    let there = std::fs::symlink_metadata(path).map(identity);
    there.is_ok_and(|there| file.metadata().is_ok_and(|m| identity(m) == there))
}

fn open_file(folder: &Path, name: &str) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(folder.join(name));
    let file = file.map_err(|e| Error::io(name, e))?;
    let is_file = file.metadata().is_ok_and(|m| m.is_file());
    if is_file { Ok(file) } else { Err(corrupt(format!("{name}: is no file"))) }
}

fn create_file(folder: &Path, name: &str) -> Result<File> {
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(folder.join(name));
    file.map_err(|e| Error::io(name, e))
}

fn read_description(folder: &Path) -> Result<Description> {
    let file = open_file_to_read(folder, FILE_NAME)?;
    let mut bytes = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|e| Error::io(FILE_NAME, e))?;
    if bytes.len() as u64 > BYTES_MAX {
        return Err(corrupt(format!("{FILE_NAME}: has over {BYTES_MAX} bytes")));
    }
    Description::parse(&bytes).map_err(|e| e.within(FILE_NAME))
}

fn open_file_to_read(folder: &Path, name: &str) -> Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(folder.join(name));
    file.map_err(|e| match e.kind() {
        // The folder is there: without this file it is no clone any more.
        std::io::ErrorKind::NotFound => corrupt(format!("{name}: is missing")),
        _ => Error::io(name, e),
    })
}

fn sync_folder(folder: &Path) -> Result<()> {
    let synced = File::open(folder).and_then(|handle| handle.sync_all());
    synced.map_err(|e| Error::io(folder.display().to_string(), e))
}
