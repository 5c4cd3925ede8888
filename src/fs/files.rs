//! Open files: reading from an image or a draft, writing to a draft, commit at flush and fsync.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::catalog::state::FileEntry;
use crate::catalog::vm::Vm;
use crate::error::{Error, ErrorKind, Result, invalid};
use crate::fs::nodes::Node;
use crate::fs::types::{Allocate, Attributes, Caller, Handle, Ino, Opened};
use crate::fs::{FileKey, MountedStore, OpenHandle, denied, lock, sealed};
use crate::image::reader::Image;
use crate::ingest::backup::newest_parent;
use crate::ingest::draft::{Draft, Surroundings};
use crate::ingest::writer::CommitRequest;
use crate::name::FileName;
use crate::store::session::Session;

/// Bytes that one request copies between files when they cannot be shared.
const COPY_BYTES: usize = 8 << 20;

/// A file that somebody has open.
pub(super) struct OpenFile {
    vm: Arc<Vm>,
    key: FileKey,
    state: Mutex<OpenState>,
}

struct OpenState {
    writers: u32,
    readers: u32,
    draft: Option<Arc<Draft>>,
    image: Option<Arc<Image>>,
    // As last seen in the log; all that is left when the file is unlinked.
    entry: FileEntry,
    is_unlinked: bool,
    is_renamed: bool,
}

impl OpenFile {
    /// The draft, while somebody writes.
    pub(super) fn draft(&self) -> Option<Arc<Draft>> {
        lock(&self.state).draft.clone()
    }

    /// The entry as last seen.
    pub(super) fn entry(&self) -> FileEntry {
        lock(&self.state).entry.clone()
    }

    /// Whether somebody has it open for writing.
    pub(super) fn has_writers(&self) -> bool {
        lock(&self.state).writers > 0
    }

    /// The file was forgotten through this mount: its content goes with its last handle.
    pub(super) fn unlinked(&self) {
        lock(&self.state).is_unlinked = true;
    }

    /// The file got the name of a snapshot while it was written: it is sealed at the last close.
    pub(super) fn renamed(&self) {
        lock(&self.state).is_renamed = true;
    }
}

impl MountedStore {
    pub(super) fn keep_handle(&self, open: OpenHandle) -> Handle {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        lock(&self.handles).insert(number, open);
        Handle(number)
    }

    pub(super) fn handle(&self, handle: Handle) -> Result<OpenHandle> {
        lock(&self.handles).get(&handle.0).cloned().ok_or_else(|| invalid("unknown handle"))
    }

    fn open_handle(&self, handle: Handle) -> Result<Arc<OpenFile>> {
        match self.handle(handle)? {
            OpenHandle::File { file, .. } => Ok(file),
            OpenHandle::Clone { .. } | OpenHandle::Text(_) => Err(invalid("is no image")),
        }
    }

    /// The draft behind a handle that was opened for writing.
    fn draft_of(&self, handle: Handle) -> Result<Arc<Draft>> {
        match self.handle(handle)? {
            OpenHandle::File { file, write: true } => {
                file.draft().ok_or_else(|| Error::new(ErrorKind::Stale, "the draft is gone"))
            }
            _ => Err(denied("is not open for writing")),
        }
    }

    /// The one session of this process for a VM: all its drafts share it.
    fn session(&self, vm: &Arc<Vm>) -> Result<Arc<Session>> {
        let slot = lock(&self.sessions)
            .entry(vm.name().to_owned())
            .or_insert_with(|| Arc::new(Mutex::new(Weak::new())))
            .clone();
        self.stop_collecting(vm.name());
        // Held while a session begins: two openers share what one of them begins. Held, too, while collection is at work.
        let mut weak = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = weak.upgrade() {
            return Ok(session);
        }
        let session = Arc::new(Session::begin(&self.store, vm)?);
        *weak = Arc::downgrade(&session);
        Ok(session)
    }

    /// Drops a draft. The last one takes the session with it, whose end takes a moment: whoever wants to begin a new
    /// one waits for it.
    fn let_go(&self, vm: &str, draft: Option<Arc<Draft>>) {
        let slot = lock(&self.sessions).get(vm).cloned();
        let _ending = slot.as_ref().map(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner));
        drop(draft);
    }

    /// Does `work` while nobody in this process writes the VM, nor can begin to; `None` when somebody does.
    pub(super) fn without_session<T>(&self, vm: &str, work: impl FnOnce() -> T) -> Option<T> {
        let slot = lock(&self.sessions).entry(vm.to_owned()).or_default().clone();
        let weak = slot.lock().unwrap_or_else(PoisonError::into_inner);
        (weak.strong_count() == 0).then(work)
    }

    /// Whether this process is the VM's writer now.
    pub(super) fn has_session(&self, vm: &str) -> bool {
        let slot = lock(&self.sessions).get(vm).cloned();
        slot.is_some_and(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).strong_count() > 0)
    }

    fn surroundings(&self, session: Arc<Session>, disk: Option<&str>) -> Result<Surroundings> {
        let parent = newest_parent(&self.store, &session, disk)?;
        Ok(Surroundings { session, budget: self.budget.clone(), parent, spill_folder: self.spill_folder.clone() })
    }

    /// The open file of a key, made if it is not there.
    fn open_file(&self, vm: &Arc<Vm>, key: &FileKey, entry: &FileEntry) -> Arc<OpenFile> {
        let mut files = lock(&self.open_files);
        let file = files.entry(key.clone()).or_insert_with(|| {
            Arc::new(OpenFile {
                vm: vm.clone(),
                key: key.clone(),
                state: Mutex::new(OpenState {
                    writers: 0,
                    readers: 0,
                    draft: None,
                    image: None,
                    entry: entry.clone(),
                    is_unlinked: false,
                    is_renamed: false,
                }),
            })
        });
        // Counted under the table's lock: `release` removes only what nobody has.
        lock(&file.state).readers += 1;
        file.clone()
    }

    /// Opens a file.
    ///
    /// # Errors
    /// `Sealed` when it is to be written and must not be, `Busy` when another process writes the VM, `IsFolder`,
    /// `ReadOnly`, `NotFound`, `Stale`, `Corrupt`, `Unavailable`.
    pub fn open(&self, ino: Ino, write: bool, truncate: bool) -> Result<Opened> {
        let key = match self.nodes.node(ino)? {
            Node::File(vm, _, id) => (vm, id),
            Node::Status if write => return Err(denied("is not to be written")),
            Node::Status => return Ok(self.open_text(self.status_text())),
            Node::Clone(name, id) => return self.open_clone(&name, id, write, truncate),
            _ => return Err(Error::new(ErrorKind::IsFolder, "is a folder")),
        };
        if write || truncate {
            self.writable()?;
        }
        let (vm, entry) = self.file(&key)?;
        if (write || truncate) && entry.sealed.is_some() {
            return Err(sealed(&entry));
        }
        let file = self.open_file(&vm, &key, &entry);
        let opened = self.open_content(&file, write || truncate, truncate);
        if let Err(e) = opened {
            self.close(&file, false);
            return Err(e);
        }
        let is_sealed = entry.sealed.is_some();
        let handle = self.keep_handle(OpenHandle::File { file, write });
        Ok(Opened { handle, direct: !is_sealed, keep_cache: is_sealed })
    }

    fn open_content(&self, file: &Arc<OpenFile>, write: bool, truncate: bool) -> Result<()> {
        if !write {
            let mut state = lock(&file.state);
            return if state.draft.is_some() { Ok(()) } else { self.image(file, &mut state).map(drop) };
        }
        let mut state = lock(&file.state);
        if state.draft.is_none() {
            let session = self.session(&file.vm)?;
            // Looked at again as the VM's writer: nobody else can change it from here on.
            let now = file.vm.state();
            let entry = now.file(file.key.1).map_err(|e| e.as_kind(ErrorKind::Stale))?.clone();
            if entry.sealed.is_some() {
                return Err(sealed(&entry));
            }
            let image = self.store.open_image(&file.vm, &entry)?;
            let around = self.surroundings(session, entry.disk.as_deref())?;
            state.draft = Some(Draft::resume(around, image.tree().root().clone(), &entry));
            state.entry = entry;
        }
        if truncate && let Some(draft) = &state.draft {
            draft.truncate(0, self.store.clock().now())?;
        }
        state.writers += 1;
        state.readers -= 1;
        drop(state);
        // Writing again cancels the grace time.
        lock(&self.candidates).remove(&file.key);
        Ok(())
    }

    /// The image that readers see when nobody writes: that of the last commit.
    fn image(&self, file: &OpenFile, state: &mut OpenState) -> Result<Arc<Image>> {
        if !state.is_unlinked {
            let now = file.vm.state();
            if let Some(entry) = now.files.get(&file.key.1) {
                if entry.root != state.entry.root {
                    state.image = None;
                }
                state.entry = entry.clone();
            }
        }
        if let Some(image) = &state.image {
            return Ok(image.clone());
        }
        let image = Arc::new(self.store.open_image(&file.vm, &state.entry)?);
        state.image = Some(image.clone());
        Ok(image)
    }

    /// Makes a file and opens it for writing. The log has it at once, empty.
    ///
    /// # Errors
    /// `Exists`, `Denied` in the root, `Invalid` or `TooLong` for the name, `Busy` when another process writes the
    /// VM, `ReadOnly`, `NoSpace`, `Corrupt`, `Unavailable`.
    pub fn create(&self, parent: Ino, name: &str, caller: Caller) -> Result<(Attributes, Opened)> {
        self.writable()?;
        let (vm_name, disk) = match self.nodes.node(parent)? {
            Node::Vm(vm) => (vm, None),
            Node::Disk(vm, disk) => (vm, Some(disk)),
            Node::Root => return Err(denied("images lie in a VM's folder: make one first")),
            _ => return Err(denied("is no place for it")),
        };
        let exists = || Error::new(ErrorKind::Exists, format!("{name:?} exists"));
        FileName::new(name)?;
        let (vm, state) = self.vm(&vm_name)?;
        let is_taken = |state: &crate::catalog::state::VmState| {
            state.find(disk.as_deref(), name).is_some() || (disk.is_none() && state.disks.contains_key(name))
        };
        if is_taken(&state) {
            return Err(exists());
        }
        let session = self.session(&vm)?;
        let id = session.next_serial()?;
        let around = self.surroundings(session, disk.as_deref())?;
        let draft = Draft::create(around, self.store.clock().now());
        draft.commit(|image_bytes, grid, mtime| CommitRequest {
            file: id,
            disk: disk.clone(),
            name: name.to_owned(),
            is_known: false,
            image_bytes,
            grid,
            uid: caller.uid,
            gid: caller.gid,
            mtime,
            closed: false,
            sealed: false,
        })?;
        let key = (vm_name, id);
        let state = vm.state();
        let entry = state.file(id)?.clone();
        let file = self.open_file(&vm, &key, &entry);
        {
            let mut open = lock(&file.state);
            open.draft = Some(draft);
            open.writers += 1;
            open.readers -= 1;
        }
        let handle = self.keep_handle(OpenHandle::File { file, write: true });
        let attributes = self.told(&Self::file_node(&state, &key.0, &entry))?;
        Ok((attributes, Opened { handle, direct: true, keep_cache: false }))
    }

    /// Reads; returns how many bytes: fewer than asked only at the end of the file.
    ///
    /// # Errors
    /// `Corrupt`, `Stale`, `Unavailable`.
    pub fn read(&self, handle: Handle, offset: u64, out: &mut [u8]) -> Result<usize> {
        let file = match self.handle(handle)? {
            OpenHandle::File { file, .. } => file,
            OpenHandle::Clone { file, .. } => return file.read(offset, out),
            OpenHandle::Text(text) => {
                let rest = text.as_bytes().get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
                let count = rest.len().min(out.len());
                let (to, _) = out.split_at_mut(count);
                to.copy_from_slice(rest.get(..count).unwrap_or_default());
                return Ok(count);
            }
        };
        if let Some(draft) = file.draft() {
            return draft.read_at(offset, out);
        }
        let image = self.image(&file, &mut lock(&file.state))?;
        let count = usize::try_from(image.bytes().saturating_sub(offset)).unwrap_or(usize::MAX).min(out.len());
        image.read_at(offset, out.get_mut(..count).unwrap_or_default())?;
        Ok(count)
    }

    /// Writes.
    ///
    /// # Errors
    /// `Denied`, `TooLarge`, `NoSpace`, `Busy` when fenced, `Corrupt`, `Unavailable`.
    pub fn write(&self, handle: Handle, offset: u64, bytes: &[u8]) -> Result<()> {
        match self.written_clone(handle)? {
            Some(clone) => clone.write(offset, bytes),
            None => self.draft_of(handle)?.write_at(offset, bytes, self.store.clock().now()),
        }
    }

    /// close(2) of one descriptor: everything written is durable when this returns (I9). Free when nothing was
    /// written since the last time.
    ///
    /// # Errors
    /// What any write met, and as a commit.
    pub fn flush(&self, handle: Handle) -> Result<()> {
        match self.handle(handle)? {
            OpenHandle::File { file, write: true } => self.commit(&file, true),
            OpenHandle::Clone { file, write: true } => file.overlay().flush(),
            _ => Ok(()),
        }
    }

    /// fsync(2): everything written is durable when this returns (I9).
    ///
    /// # Errors
    /// As [`MountedStore::flush`].
    pub fn sync(&self, handle: Handle) -> Result<()> {
        match self.handle(handle)? {
            OpenHandle::File { file, write: true } => self.commit(&file, false),
            OpenHandle::Clone { file, .. } => file.overlay().flush(),
            _ => Ok(()),
        }
    }

    fn commit(&self, file: &OpenFile, by_close: bool) -> Result<()> {
        let (draft, entry, closed) = {
            let state = lock(&file.state);
            let Some(draft) = state.draft.clone().filter(|_| !state.is_unlinked) else { return Ok(()) };
            (draft, state.entry.clone(), by_close && state.writers == 1)
        };
        draft.commit(|image_bytes, grid, mtime| CommitRequest {
            file: entry.id,
            disk: entry.disk,
            name: entry.name,
            is_known: true,
            image_bytes,
            grid,
            uid: entry.uid,
            gid: entry.gid,
            mtime,
            closed,
            sealed: false,
        })?;
        Ok(())
    }

    /// The last close of a handle.
    pub fn release(&self, handle: Handle) {
        let open = lock(&self.handles).remove(&handle.0);
        match open {
            Some(OpenHandle::File { file, write }) => self.close(&file, write),
            Some(OpenHandle::Clone { file, write }) => self.close_clone(file, write),
            Some(OpenHandle::Text(_)) | None => {}
        }
    }

    fn close(&self, file: &Arc<OpenFile>, write: bool) {
        if write && let Err(e) = self.commit(file, true) {
            // Flush has told the writer; nobody hears this.
            log::warn!("{}: closed with changes that are lost: {e}", self.name_of(file));
        }
        let mut files = lock(&self.open_files);
        let mut state = lock(&file.state);
        if write {
            state.writers -= 1;
        } else {
            state.readers -= 1;
        }
        let mut last = None;
        let mut considered = None;
        if state.writers == 0 {
            last = state.draft.take();
            if last.is_some() && !state.is_unlinked {
                state.image = None;
                considered = Some(std::mem::take(&mut state.is_renamed));
            }
        }
        if state.writers == 0 && state.readers == 0 {
            files.remove(&file.key);
        }
        drop(state);
        drop(files);
        self.let_go(file.key.0.as_str(), last);
        if let Some(at_once) = considered {
            self.consider(&file.key, at_once);
        }
    }

    fn name_of(&self, file: &OpenFile) -> String {
        format!("{}/{}", file.key.0, lock(&file.state).entry.path())
    }

    /// Sets the size of a file, through a handle or without one.
    pub(super) fn set_size(&self, key: &FileKey, handle: Option<Handle>, bytes: u64) -> Result<()> {
        let now = self.store.clock().now();
        if let Some(draft) = handle.and_then(|h| self.draft_of(h).ok()) {
            return draft.truncate(bytes, now);
        }
        let (vm, entry) = self.file(key)?;
        if entry.sealed.is_some() {
            return Err(sealed(&entry));
        }
        let file = self.open_file(&vm, key, &entry);
        if let Err(e) = self.open_content(&file, true, false) {
            self.close(&file, false);
            return Err(e);
        }
        let outcome = match file.draft() {
            Some(draft) => draft.truncate(bytes, now).and_then(|()| self.commit(&file, true)),
            None => Ok(()),
        };
        self.close(&file, true);
        outcome
    }

    /// fallocate(2).
    ///
    /// # Errors
    /// As [`MountedStore::write`].
    pub fn allocate(&self, handle: Handle, offset: u64, bytes: u64, how: Allocate) -> Result<()> {
        if let Some(clone) = self.written_clone(handle)? {
            return clone.allocate(offset, bytes, how);
        }
        let draft = self.draft_of(handle)?;
        let now = self.store.clock().now();
        let end = offset.checked_add(bytes).ok_or_else(|| Error::new(ErrorKind::TooLarge, "range is too large"))?;
        match how {
            Allocate::Reserve => draft.extend(end, now),
            Allocate::ReserveKeepSize => Ok(()),
            Allocate::Punch | Allocate::ZeroKeepSize => draft.zero(offset, bytes, now),
            Allocate::Zero => {
                draft.zero(offset, bytes, now)?;
                draft.extend(end, now)
            }
        }
    }

    /// SEEK_DATA: the next data, `None` when only a hole is left.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn seek_data(&self, handle: Handle, offset: u64) -> Result<Option<u64>> {
        if let OpenHandle::Clone { file, .. } = self.handle(handle)? {
            return file.overlay().seek_data(file.base(), offset);
        }
        let file = self.open_handle(handle)?;
        match file.draft() {
            Some(draft) if offset >= draft.bytes() => Ok(None),
            Some(draft) => draft.seek(offset, true),
            None => {
                let image = self.image(&file, &mut lock(&file.state))?;
                image.seek_data(offset)
            }
        }
    }

    /// SEEK_HOLE: the next hole (the end of the file is one), `None` past the end.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn seek_hole(&self, handle: Handle, offset: u64) -> Result<Option<u64>> {
        if let OpenHandle::Clone { file, .. } = self.handle(handle)? {
            let is_past = offset >= file.overlay().bytes();
            return if is_past { Ok(None) } else { file.overlay().seek_hole(file.base(), offset).map(Some) };
        }
        let file = self.open_handle(handle)?;
        if let Some(draft) = file.draft() {
            let bytes = draft.bytes();
            if offset >= bytes {
                return Ok(None);
            }
            return Ok(Some(draft.seek(offset, false)?.unwrap_or(bytes)));
        }
        let image = self.image(&file, &mut lock(&file.state))?;
        if offset >= image.bytes() { Ok(None) } else { image.seek_hole(offset).map(Some) }
    }

    /// copy_file_range(2): inside a VM whole segments are shared and not read; what cannot be shared is copied.
    /// Returns how many bytes were done, fewer than asked where the caller has to ask again.
    ///
    /// # Errors
    /// As [`MountedStore::read`] and [`MountedStore::write`].
    pub fn copy_range(&self, from: Handle, from_offset: u64, to: Handle, to_offset: u64, bytes: u64) -> Result<u64> {
        let (OpenHandle::File { file: source, .. }, None) = (self.handle(from)?, self.written_clone(to)?) else {
            return self.copy_bytes(from, from_offset, to, to_offset, bytes);
        };
        let target = self.draft_of(to)?;
        if source.vm.name() == target.session().vm().name() && source.draft().is_none() {
            let image = self.image(&source, &mut lock(&source.state))?;
            let done = target.adopt(image.tree(), from_offset, to_offset, bytes)?;
            if done > 0 {
                return Ok(done);
            }
        }
        self.copy_bytes(from, from_offset, to, to_offset, bytes)
    }

    fn copy_bytes(&self, from: Handle, from_offset: u64, to: Handle, to_offset: u64, bytes: u64) -> Result<u64> {
        let count = usize::try_from(bytes).unwrap_or(usize::MAX).min(COPY_BYTES);
        let mut buffer = vec![0; count];
        let count = self.read(from, from_offset, &mut buffer)?;
        let part = buffer.get(..count).unwrap_or_default();
        if !part.is_empty() {
            self.write(to, to_offset, part)?;
        }
        Ok(count as u64)
    }

    /// Commits every draft that is open; the first error.
    pub(super) fn commit_all(&self) -> Result<()> {
        let files: Vec<_> = lock(&self.open_files).values().cloned().collect();
        let mut outcome = Ok(());
        for file in files {
            if let Err(e) = self.commit(&file, true) {
                log::error!("{}: not committed: {e}", self.name_of(&file));
                outcome = outcome.and(Err(e));
            }
            let mut state = lock(&file.state);
            let was_written = state.draft.is_some() && !state.is_unlinked;
            let last = state.draft.take();
            drop(state);
            self.let_go(file.key.0.as_str(), last);
            if was_written {
                self.consider(&file.key, false);
            }
        }
        outcome
    }
}
