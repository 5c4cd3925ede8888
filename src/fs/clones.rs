//! `.snapfs/clones/`: writable clones as files. Everything about them is read from their folder when it is asked for,
//! so that what commands make and remove there is seen at once.

use std::collections::HashMap;
use std::fs::{FileTimes, Metadata};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::clock::Timestamp;
use crate::clones::description::Description;
use crate::clones::folder::{ClonesFolder, OpenClone};
use crate::clones::map::CloneId;
use crate::clones::snapshot::open_base;
use crate::clones::{MapMemory, Overlay};
use crate::error::{Error, ErrorKind, Result, not_found};
use crate::fs::nodes::Node;
use crate::fs::types::{Allocate, Attributes, Entry, Ino, Kind, SetAttributes};
use crate::fs::types::{Handle, Opened};
use crate::fs::{MountedStore, OpenHandle, denied, lock};
use crate::image::reader::Image;
use crate::limits::BLOCK_BYTES;

/// The clones of the store on this host.
pub(super) struct Clones {
    folder: Option<ClonesFolder>,
    memory: Arc<MapMemory>,
    // Held while one is opened: two openers share what one of them opens.
    open: Mutex<HashMap<String, Arc<Mutex<Weak<CloneFile>>>>>,
}

/// A clone that somebody has open.
pub(super) struct CloneFile {
    clone: OpenClone,
    base: Image,
    writers: Mutex<u32>,
}

impl Clones {
    pub(super) fn new(root: Option<&Path>, store: &str, map_bytes: u64) -> Self {
        let folder = root.map(|root| ClonesFolder::new(root, store));
        Self { folder, memory: Arc::new(MapMemory::new(map_bytes)), open: Mutex::default() }
    }

    /// Where they lie.
    pub(super) fn path(&self) -> Option<&Path> {
        self.folder.as_ref().map(ClonesFolder::path)
    }

    fn folder(&self) -> Result<&ClonesFolder> {
        self.folder.as_ref().ok_or_else(|| not_found("this mount has no clones"))
    }

    fn slot(&self, name: &str) -> Arc<Mutex<Weak<CloneFile>>> {
        let mut open = lock(&self.open);
        // What nobody has open any more is of no use.
        open.retain(|_, slot| Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|weak| weak.strong_count() > 0));
        open.entry(name.to_owned()).or_insert_with(|| Arc::new(Mutex::new(Weak::new()))).clone()
    }

    /// The clone, if somebody has it open.
    fn opened(&self, name: &str, id: CloneId) -> Option<Arc<CloneFile>> {
        let slot = lock(&self.open).get(name).cloned()?;
        let file = slot.lock().unwrap_or_else(PoisonError::into_inner).upgrade()?;
        (file.clone.description().clone == id).then_some(file)
    }

    fn all_open(&self) -> Vec<Arc<CloneFile>> {
        let slots: Vec<_> = lock(&self.open).values().cloned().collect();
        slots.iter().filter_map(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).upgrade()).collect()
    }
}

impl CloneFile {
    pub(super) fn overlay(&self) -> &Overlay {
        self.clone.overlay()
    }

    pub(super) fn base(&self) -> &Image {
        &self.base
    }

    fn begin_writing(&self) -> Result<()> {
        let mut writers = lock(&self.writers);
        if *writers == 0 {
            self.clone.begin_writing()?;
        }
        *writers += 1;
        Ok(())
    }

    fn end_writing(&self) {
        let mut writers = lock(&self.writers);
        *writers = writers.saturating_sub(1);
        if *writers == 0 {
            // Every close has flushed before; what fails here was told there.
            if let Err(e) = self.overlay().flush() {
                log::error!("closed with changes that are lost: {e}");
            }
            self.clone.end_writing();
        }
    }

    /// Reads; fewer bytes than asked only at the end.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<usize> {
        let rest = self.overlay().bytes().saturating_sub(offset);
        let count = usize::try_from(rest).unwrap_or(usize::MAX).min(out.len());
        self.overlay().read_at(&self.base, offset, out.get_mut(..count).unwrap_or_default())?;
        Ok(count)
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.overlay().write_at(&self.base, offset, bytes)
    }

    pub(super) fn allocate(&self, offset: u64, bytes: u64, how: Allocate) -> Result<()> {
        let rest = self.overlay().bytes().saturating_sub(offset);
        match how {
            Allocate::Reserve => self.overlay().reserve(offset, bytes),
            Allocate::ReserveKeepSize => self.overlay().reserve(offset, bytes.min(rest)),
            Allocate::Punch | Allocate::ZeroKeepSize => self.overlay().zero(&self.base, offset, bytes.min(rest)),
            Allocate::Zero => self.overlay().zero(&self.base, offset, bytes),
        }
    }
}

impl MountedStore {
    /// What a name in the folder of clones leads to.
    pub(super) fn find_clone(&self, name: &str) -> Result<Node> {
        let found = self.clones.folder()?.find(name).map_err(|e| match e.kind() {
            // What cannot be a clone's name is none.
            ErrorKind::Invalid | ErrorKind::TooLong => e.as_kind(ErrorKind::NotFound),
            _ => e,
        })?;
        Ok(Node::Clone(name.to_owned(), found.description.clone))
    }

    pub(super) fn clone_attributes(&self, name: &str, id: CloneId, ino: Ino) -> Result<Attributes> {
        if let Some(file) = self.clones.opened(name, id) {
            return Ok(attributes(ino, file.clone.description(), &file.clone.metadata()?));
        }
        let found = self.clones.folder()?.find(name)?;
        if found.description.clone != id {
            return Err(Error::new(ErrorKind::Stale, format!("clone {name:?} is another one now")));
        }
        Ok(attributes(ino, &found.description, &found.metadata))
    }

    pub(super) fn list_clones(&self, rows: &mut Vec<Entry>) -> Result<()> {
        let Ok(folder) = self.clones.folder() else { return Ok(()) };
        for name in folder.names()? {
            match self.find_clone(&name) {
                Ok(node) => rows.push(Entry { ino: self.nodes.ino(&node), kind: Kind::File, name }),
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                // To be seen, so that it can be removed.
                Err(e) => {
                    log::warn!("{e}");
                    let node = Node::Clone(name.clone(), CloneId::default());
                    rows.push(Entry { ino: self.nodes.ino(&node), kind: Kind::File, name });
                }
            }
        }
        Ok(())
    }

    /// Opens a clone. A mount with `ro` does not stand in the way: that speaks of the store.
    pub(super) fn open_clone(&self, name: &str, id: CloneId, write: bool, truncate: bool) -> Result<Opened> {
        let slot = self.clones.slot(name);
        let mut weak = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match weak.upgrade() {
            Some(file) => file,
            None => {
                let clone = self.clones.folder()?.open(name, &self.clones.memory)?;
                let base =
                    open_base(&self.store, clone.description()).map_err(|e| e.within(format!("clone {name}")))?;
                Arc::new(CloneFile { clone, base, writers: Mutex::new(0) })
            }
        };
        if file.clone.description().clone != id {
            return Err(Error::new(ErrorKind::Stale, format!("clone {name:?} is another one now")));
        }
        if truncate && file.overlay().bytes() > 0 {
            return Err(keeps_its_size());
        }
        if write {
            file.begin_writing()?;
        }
        *weak = Arc::downgrade(&file);
        drop(weak);
        let handle = self.keep_handle(OpenHandle::Clone { file, write });
        Ok(Opened { handle, direct: true, keep_cache: false })
    }

    pub(super) fn close_clone(&self, file: Arc<CloneFile>, write: bool) {
        if write {
            file.end_writing();
        }
    }

    /// Owner, mode and times are those of the data file. The size stays.
    pub(super) fn set_clone_attributes(&self, name: &str, id: CloneId, set: SetAttributes) -> Result<()> {
        let folder = self.clones.folder()?;
        let file = match self.clones.opened(name, id) {
            Some(file) => file,
            None => {
                let opened = self.open_clone(name, id, false, false)?;
                let handle = lock(&self.handles).remove(&opened.handle.0);
                let Some(OpenHandle::Clone { file, .. }) = handle else { return Err(not_found(name)) };
                file
            }
        };
        let about = |e| Error::io(format!("clone {name:?} in {}", folder.path().display()), e);
        if set.bytes.is_some_and(|bytes| bytes != file.overlay().bytes()) {
            return Err(keeps_its_size());
        }
        let data = file.clone.data_file();
        if set.uid.is_some() || set.gid.is_some() {
            fchown(data, set.uid, set.gid).map_err(about)?;
        }
        if let Some(mode) = set.mode {
            data.set_permissions(PermissionsExt::from_mode(mode & 0o777)).map_err(about)?;
        }
        if let Some(mtime) = set.mtime {
            data.set_times(FileTimes::new().set_modified(mtime.system_time())).map_err(about)?;
        }
        Ok(())
    }

    /// Makes what was written to all open clones durable; the first error.
    pub(super) fn flush_clones(&self) -> Result<()> {
        let mut outcome = Ok(());
        for file in self.clones.all_open() {
            if let Err(e) = file.overlay().flush() {
                log::error!("not flushed: {e}");
                outcome = outcome.and(Err(e));
            }
        }
        outcome
    }

    /// The clone behind a handle that was opened for writing.
    pub(super) fn written_clone(&self, handle: Handle) -> Result<Option<Arc<CloneFile>>> {
        match self.handle(handle)? {
            OpenHandle::Clone { file, write: true } => Ok(Some(file)),
            OpenHandle::Clone { .. } => Err(denied("is not open for writing")),
            _ => Ok(None),
        }
    }
}

fn keeps_its_size() -> Error {
    denied("a clone keeps its size")
}

fn attributes(ino: Ino, description: &Description, data: &Metadata) -> Attributes {
    let bytes = description.image_bytes;
    // What the snapshot has and what was written, which may be the same blocks: no more than there are.
    let sectors = description.data_blocks.saturating_mul(BLOCK_BYTES as u64 / 512).saturating_add(data.blocks());
    let seconds = u64::try_from(data.mtime()).unwrap_or(0);
    let nanoseconds = u64::try_from(data.mtime_nsec()).unwrap_or(0);
    Attributes {
        ino,
        kind: Kind::File,
        bytes,
        sectors: sectors.min(bytes.div_ceil(512)),
        mode: data.mode() & 0o777,
        uid: data.uid(),
        gid: data.gid(),
        links: 1,
        mtime: Timestamp(seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)),
        // Commands make and remove clones without telling us.
        keep: std::time::Duration::ZERO,
    }
}
