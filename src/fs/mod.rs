//! The mounted tree on plain types: the filesystem without its transport.
//!
//! The log of each VM is the truth for names; what is added here is what lives between open and close: drafts,
//! their grace times, and the sessions that they share.

mod clones;
mod collect;
mod files;
mod nodes;
mod seal;
pub mod types;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::catalog::record::{Attributes as FolderAttributes, Changes, Op, Target};
use crate::catalog::state::{FileEntry, VmState};
use crate::catalog::vm::Vm;
use crate::collect::young::Young;
use crate::error::{Error, ErrorKind, Result, invalid, not_found};
use crate::fs::clones::{CloneFile, Clones};
use crate::fs::collect::Collecting;
use crate::fs::files::OpenFile;
use crate::fs::nodes::{Node, Nodes};
use crate::fs::seal::Candidate;
use crate::fs::types::{Attributes, Caller, Entry, Handle, Ino, Kind, Opened, Options, ROOT, SetAttributes, Space};
use crate::ingest::background::prepare;
use crate::ingest::budget::Budget;
use crate::limits::BLOCK_BYTES;
use crate::name::{CONTROL_FOLDER, DiskName, FileName, LATEST, VmName};
use crate::store::Store;
use crate::store::session::Session;
use crate::units::FileId;

/// How long the kernel may keep what only records of other processes change.
const KEEP: Duration = Duration::from_secs(1);

/// In the control folder, the folder of writable clones.
const CLONES_FOLDER: &str = "clones";

/// A VM's log is looked at anew when the last look is older than this.
const REFRESH_AFTER: Duration = Duration::from_millis(300);

/// How long `latest` still answers after the last snapshot of its folder was removed, so that `rm -r`, which has
/// seen it in the listing, finds it.
const LINK_LINGERS: Duration = Duration::from_secs(3);

/// A file of a VM, whatever its name.
type FileKey = (String, FileId);

/// A mounted store.
pub struct MountedStore {
    store: Arc<Store>,
    options: Options,
    nodes: Nodes,
    handles: Mutex<HashMap<u64, OpenHandle>>,
    next_handle: AtomicU64,
    open_files: Mutex<HashMap<FileKey, Arc<OpenFile>>>,
    sessions: Mutex<HashMap<String, Arc<Mutex<Weak<Session>>>>>,
    candidates: Mutex<HashMap<FileKey, Candidate>>,
    to_merge: Mutex<BTreeSet<String>>,
    collecting: Collecting,
    looked_at: Mutex<HashMap<String, Duration>>,
    lingering_links: Mutex<HashMap<(String, Option<String>), Duration>>,
    clones: Clones,
    budget: Arc<Budget>,
    spill_folder: PathBuf,
    is_scanned: AtomicBool,
}

#[derive(Clone)]
enum OpenHandle {
    File { file: Arc<OpenFile>, write: bool },
    Clone { file: Arc<CloneFile>, write: bool },
    Text(Arc<str>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MountedStore {
    /// The tree of a store.
    pub fn new(store: Arc<Store>, options: Options) -> Arc<Self> {
        prepare();
        let budget = Arc::new(Budget::new(store.shares().segments));
        let spill_folder = store.derived_root().map_or_else(std::env::temp_dir, |d| d.join("spill"));
        let clones = Clones::new(options.clones.as_deref(), &store.config().store, store.shares().map_bytes);
        Arc::new(Self {
            store,
            options,
            clones,
            nodes: Nodes::default(),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(1),
            open_files: Mutex::default(),
            sessions: Mutex::default(),
            candidates: Mutex::default(),
            to_merge: Mutex::default(),
            collecting: Collecting::default(),
            looked_at: Mutex::default(),
            lingering_links: Mutex::default(),
            budget,
            spill_folder,
            is_scanned: AtomicBool::new(false),
        })
    }

    fn writable(&self) -> Result<()> {
        if self.options.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "mounted read-only"));
        }
        Ok(())
    }

    /// Whether anything may be removed.
    fn deletable(&self) -> Result<()> {
        self.writable()?;
        if self.options.no_delete {
            return Err(denied("nothing can be removed through this mount: it has the option nodelete"));
        }
        Ok(())
    }

    /// A VM with a state that is not older than a moment.
    fn vm(&self, name: &str) -> Result<(Arc<Vm>, Arc<VmState>)> {
        let vm = self.store.vm_handle(&VmName::new(name)?);
        let now = self.store.clock().elapsed();
        let is_recent = lock(&self.looked_at).get(name).is_some_and(|then| now < *then + REFRESH_AFTER);
        let state = if is_recent { vm.state() } else { vm.refresh()? };
        if !is_recent {
            lock(&self.looked_at).insert(name.to_owned(), now);
            if let Some(damage) = vm.damage() {
                log::warn!("{damage}");
            }
        }
        if state.exists() { Ok((vm, state)) } else { Err(not_found(format!("VM {name:?} is not there"))) }
    }

    fn file(&self, key: &FileKey) -> Result<(Arc<Vm>, FileEntry)> {
        let (vm, state) = self.vm(&key.0)?;
        let entry = state.file(key.1).map_err(|e| e.as_kind(ErrorKind::Stale))?.clone();
        Ok((vm, entry))
    }

    fn file_node(state: &VmState, vm: &str, entry: &FileEntry) -> Node {
        Node::File(vm.to_owned(), state.incarnation, entry.id)
    }

    /// What a name in a folder leads to.
    fn find(&self, parent: &Node, name: &str) -> Result<Node> {
        let absent = || not_found(format!("{name:?} is not there"));
        match parent {
            Node::Root if name == CONTROL_FOLDER => Ok(Node::Control),
            Node::Root => {
                let vm = VmName::new(name).map_err(|_| absent())?;
                self.vm(vm.as_str())?;
                Ok(Node::Vm(name.to_owned()))
            }
            Node::Control if name == "status" => Ok(Node::Status),
            Node::Control if name == CLONES_FOLDER => Ok(Node::Clones),
            Node::Clones => self.find_clone(name),
            Node::Vm(vm) => {
                let (_, state) = self.vm(vm)?;
                if state.disks.contains_key(name) {
                    return Ok(Node::Disk(vm.clone(), name.to_owned()));
                }
                self.find_file(&state, vm, None, name)
            }
            Node::Disk(vm, disk) => {
                let (_, state) = self.vm(vm)?;
                self.find_file(&state, vm, Some(disk), name)
            }
            _ => Err(absent()),
        }
    }

    fn find_file(&self, state: &VmState, vm: &str, disk: Option<&str>, name: &str) -> Result<Node> {
        if name == LATEST {
            let link = (vm.to_owned(), disk.map(str::to_owned));
            let lingers =
                lock(&self.lingering_links).get(&link).is_some_and(|until| self.store.clock().elapsed() < *until);
            if state.latest(disk).is_some() || lingers {
                return Ok(Node::Latest(link.0, link.1));
            }
        }
        let entry = state.find(disk, name).ok_or_else(|| not_found(format!("{name:?} is not there")))?;
        Ok(Self::file_node(state, vm, entry))
    }

    /// Looks a name up.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Unavailable`.
    pub fn lookup(&self, parent: Ino, name: &str) -> Result<Attributes> {
        let node = self.find(&self.nodes.node(parent)?, name)?;
        self.told(&node)
    }

    /// Attributes whose inode number the kernel keeps until it calls [`MountedStore::forget_inode`].
    fn told(&self, node: &Node) -> Result<Attributes> {
        let attributes = self.attributes_of(node)?;
        Ok(Attributes { ino: self.nodes.remember(node), ..attributes })
    }

    /// The kernel has forgotten an inode: so many of the lookups (and creations) that told it of the number.
    pub fn forget_inode(&self, ino: Ino, lookups: u64) {
        self.nodes.forget(ino, lookups);
    }

    /// The attributes of an inode.
    ///
    /// # Errors
    /// `Stale` when what it was is gone, `Corrupt`, `Unavailable`.
    pub fn attributes(&self, ino: Ino, _handle: Option<Handle>) -> Result<Attributes> {
        let node = self.nodes.node(ino)?;
        self.attributes_of(&node).map_err(|e| match e.kind() {
            ErrorKind::NotFound => e.as_kind(ErrorKind::Stale),
            _ => e,
        })
    }

    fn attributes_of(&self, node: &Node) -> Result<Attributes> {
        let ino = self.nodes.ino(node);
        let now = self.store.clock().now();
        let fixed = |kind, bytes, mode, links| Attributes {
            ino,
            kind,
            bytes,
            sectors: 0,
            mode,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            links,
            mtime: now,
            keep: KEEP,
        };
        let folder = |a: &FolderAttributes, links| Attributes {
            mode: a.mode & 0o7777,
            uid: a.uid,
            gid: a.gid,
            mtime: a.mtime,
            ..fixed(Kind::Folder, 0, 0, links)
        };
        match node {
            Node::Root => Ok(fixed(Kind::Folder, 0, 0o755, 2)),
            Node::Control => Ok(fixed(Kind::Folder, 0, 0o755, 2)),
            Node::Status => {
                let bytes = self.status_text().len() as u64;
                Ok(Attributes { keep: Duration::ZERO, ..fixed(Kind::File, bytes, 0o444, 1) })
            }
            // Names of clones are their owners' alone; who knows one may pass.
            Node::Clones => Ok(fixed(Kind::Folder, 0, 0o711, 2)),
            Node::Clone(name, id) => self.clone_attributes(name, *id, ino),
            Node::Vm(vm) => {
                let (_, state) = self.vm(vm)?;
                let attributes = state.attributes.ok_or_else(|| not_found(format!("VM {vm:?} is not there")))?;
                Ok(folder(&attributes, 2 + state.disks.len() as u32))
            }
            Node::Disk(vm, disk) => {
                let (_, state) = self.vm(vm)?;
                let attributes = state.disks.get(disk);
                Ok(folder(attributes.ok_or_else(|| not_found(format!("disk {disk:?} is not there")))?, 2))
            }
            Node::Latest(vm, disk) => {
                let (_, state) = self.vm(vm)?;
                let target = state.latest(disk.as_deref());
                let bytes = target.map_or(0, |f| f.name.len() as u64);
                let mtime = target.map_or(now, |f| f.mtime);
                Ok(Attributes { mtime, ..fixed(Kind::Link, bytes, 0o777, 1) })
            }
            Node::File(vm, _, id) => self.file_attributes(&(vm.clone(), *id), ino),
        }
    }

    fn file_attributes(&self, key: &FileKey, ino: Ino) -> Result<Attributes> {
        let open = lock(&self.open_files).get(key).cloned();
        let draft = open.as_ref().and_then(|f| f.draft());
        let (entry, links) = match self.file(key) {
            Ok((_, entry)) => (entry, 1),
            // Unlinked, but still open.
            Err(e) => (open.as_ref().map(|f| f.entry()).ok_or(e)?, 0),
        };
        let (bytes, blocks, mtime) = match &draft {
            Some(draft) => (draft.bytes(), draft.data_blocks(), draft.mtime()),
            None => (entry.image_bytes, entry.data_blocks, entry.mtime),
        };
        let is_sealed = entry.sealed.is_some();
        Ok(Attributes {
            ino,
            kind: Kind::File,
            bytes,
            sectors: blocks * (BLOCK_BYTES as u64 / 512),
            mode: if is_sealed { 0o444 } else { 0o600 },
            uid: entry.uid,
            gid: entry.gid,
            links,
            mtime,
            keep: if is_sealed { KEEP } else { Duration::ZERO },
        })
    }

    /// Sets attributes.
    ///
    /// # Errors
    /// `Sealed`, `ReadOnly`, `Denied`, `Busy`, `NoSpace`, `TooLarge`, `Corrupt`, `Unavailable`.
    pub fn set_attributes(&self, ino: Ino, handle: Option<Handle>, set: SetAttributes) -> Result<Attributes> {
        let node = self.nodes.node(ino)?;
        if let Node::Clone(name, id) = &node {
            self.set_clone_attributes(name, *id, set)?;
            return self.attributes_of(&node);
        }
        self.writable()?;
        let changes = Changes { mode: set.mode.map(|m| m & 0o7777), uid: set.uid, gid: set.gid, mtime: set.mtime };
        match &node {
            Node::Vm(vm) => self.change(vm, Target::Vm {}, changes)?,
            Node::Disk(vm, disk) => self.change(vm, Target::Disk { name: disk.clone() }, changes)?,
            Node::File(vm, _, id) => {
                let key = (vm.clone(), *id);
                if let Some(bytes) = set.bytes {
                    self.set_size(&key, handle, bytes)?;
                }
                let draft = lock(&self.open_files).get(&key).and_then(|f| f.draft());
                let mut changes = Changes { mode: None, ..changes };
                if let (Some(draft), Some(mtime)) = (draft, set.mtime) {
                    // Durable with the next commit, which would otherwise bring its own time.
                    draft.set_mtime(mtime);
                    changes.mtime = None;
                }
                let (_, entry) = self.file(&key)?;
                let loosens = set.mode.is_some_and(|mode| mode & 0o222 != 0);
                if entry.sealed.is_some() && loosens {
                    return Err(sealed(&entry));
                }
                if changes != Changes::default() {
                    self.change(vm, Target::File { id: *id }, changes)?;
                }
            }
            _ => return Err(denied("is not to be changed")),
        }
        self.attributes_of(&node)
    }

    fn change(&self, vm: &str, target: Target, changes: Changes) -> Result<()> {
        let (vm, _) = self.vm(vm)?;
        vm.append(None, |state| {
            let is_there = match &target {
                Target::Vm {} => state.exists(),
                Target::Disk { name } => state.disks.contains_key(name),
                Target::File { id } => state.files.contains_key(id),
            };
            if !is_there {
                return Err(Error::new(ErrorKind::Stale, "is not there any more"));
            }
            Ok((vec![Op::Change { target: target.clone(), changes }], ()))
        })
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// `Invalid` for what is no link, `NotFound`.
    pub fn read_link(&self, ino: Ino) -> Result<String> {
        match self.nodes.node(ino)? {
            Node::Latest(vm, disk) => {
                let (_, state) = self.vm(&vm)?;
                let newest = state.latest(disk.as_deref());
                newest.map(|f| f.name.clone()).ok_or_else(|| not_found("no snapshot yet"))
            }
            _ => Err(invalid("is no link")),
        }
    }

    /// Makes a VM's or a disk's folder: 0700 and the caller's, whatever mode was asked for.
    ///
    /// # Errors
    /// `Exists`, `Denied` below a disk, `Invalid` or `TooLong` for the name, `ReadOnly`, `NoSpace`, `Unavailable`.
    pub fn make_folder(&self, parent: Ino, name: &str, _mode: u32, caller: Caller) -> Result<Attributes> {
        self.writable()?;
        let now = self.store.clock().now();
        let attributes = FolderAttributes { mode: 0o700, uid: caller.uid, gid: caller.gid, mtime: now };
        let exists = || Error::new(ErrorKind::Exists, format!("{name:?} exists"));
        let node = match self.nodes.node(parent)? {
            Node::Root => {
                if name == CONTROL_FOLDER {
                    return Err(exists());
                }
                let vm = self.store.vm_handle(&VmName::new(name)?);
                if !vm.create(attributes)? {
                    return Err(exists());
                }
                Node::Vm(name.to_owned())
            }
            Node::Vm(vm) => {
                DiskName::new(name)?;
                let (handle, _) = self.vm(&vm)?;
                handle.append(None, |state| {
                    if state.disks.contains_key(name) || state.find(None, name).is_some() {
                        return Err(exists());
                    }
                    Ok((vec![Op::MakeDisk { name: name.to_owned(), attributes }], ()))
                })?;
                Node::Disk(vm, name.to_owned())
            }
            _ => return Err(denied("folders are VMs, and disks of VMs; there is no third level")),
        };
        self.told(&node)
    }

    /// Removes an empty folder.
    ///
    /// # Errors
    /// `NotEmpty`, `NotFound`, `NotFolder`, `Denied` (for all in a mount with `nodelete`), `ReadOnly`, `NoSpace`,
    /// `Unavailable`.
    pub fn remove_folder(&self, parent: Ino, name: &str) -> Result<()> {
        self.deletable()?;
        let not_empty = || Error::new(ErrorKind::NotEmpty, format!("{name:?} is not empty"));
        match self.find(&self.nodes.node(parent)?, name)? {
            Node::Vm(vm) => {
                let (vm, _) = self.vm(&vm)?;
                vm.append(None, |state| {
                    if !state.files.is_empty() || !state.disks.is_empty() {
                        return Err(not_empty());
                    }
                    Ok((if state.exists() { vec![Op::Delete {}] } else { Vec::new() }, ()))
                })?;
                self.note_forgotten(vm.name());
                Ok(())
            }
            Node::Disk(vm, disk) => {
                let (vm, _) = self.vm(&vm)?;
                vm.append(None, |state| {
                    if state.folder(Some(&disk)).next().is_some() {
                        return Err(not_empty());
                    }
                    let there = state.disks.contains_key(&disk);
                    Ok((if there { vec![Op::RemoveDisk { name: disk.clone() }] } else { Vec::new() }, ()))
                })
            }
            Node::Control | Node::Clones => Err(denied("is not to be removed")),
            _ => Err(Error::new(ErrorKind::NotFolder, format!("{name:?} is no folder"))),
        }
    }

    /// Forgets a snapshot or a draft (G1).
    ///
    /// # Errors
    /// `NotFound`, `IsFolder`, `Denied` when it is protected, younger than the store's `min_age` or in a mount with
    /// `nodelete`, `ReadOnly`, `NoSpace`, `Unavailable`.
    pub fn unlink(&self, parent: Ino, name: &str) -> Result<()> {
        self.deletable()?;
        match self.find(&self.nodes.node(parent)?, name)? {
            Node::File(vm, _, id) => {
                let (handle, entry) = self.file(&(vm.clone(), id))?;
                handle.append(None, |state| {
                    let Some(file) = state.files.get(&id) else { return Ok((Vec::new(), ())) };
                    self.may_forget(&vm, file)?;
                    Ok((vec![Op::Forget { file: id }], ()))
                })?;
                let until = self.store.clock().elapsed() + LINK_LINGERS;
                lock(&self.lingering_links).insert((vm.clone(), entry.disk), until);
                lock(&self.candidates).remove(&(vm.clone(), id));
                self.note_forgotten(&vm);
                if let Some(open) = lock(&self.open_files).get(&(vm, id)) {
                    open.unlinked();
                }
                Ok(())
            }
            // It follows from the snapshots beside it; `rm -r` tries all the same.
            Node::Latest(..) => Ok(()),
            Node::Status => Err(denied("is not to be removed")),
            Node::Clone(..) => Err(denied("a clone is removed by snapfs unclone")),
            _ => Err(Error::new(ErrorKind::IsFolder, format!("{name:?} is a folder"))),
        }
    }

    fn may_forget(&self, vm: &str, file: &FileEntry) -> Result<()> {
        if file.protected {
            return Err(denied(format!("{:?} is protected", file.name)));
        }
        Young::among(&self.store, vm, [file])?.refuse(vm, file)
    }

    /// Gives a file another name within its VM; a draft that gets the name of a snapshot is sealed.
    ///
    /// # Errors
    /// `CrossVm`, `Exists` onto a sealed snapshot (or anything with `no_replace`), `NotFound`, `Invalid` or
    /// `TooLong` for the name, `Denied`, `ReadOnly`, `NoSpace`, `Unavailable`.
    pub fn rename(&self, parent: Ino, name: &str, new_parent: Ino, new_name: &str, no_replace: bool) -> Result<()> {
        self.writable()?;
        let node = self.find(&self.nodes.node(parent)?, name)?;
        let (new_vm, new_disk) = match self.nodes.node(new_parent)? {
            Node::Vm(vm) => (vm, None),
            Node::Disk(vm, disk) => (vm, Some(disk)),
            Node::Root => return Err(Error::new(ErrorKind::CrossVm, "a VM's folder keeps its name")),
            _ => return Err(denied("is no place for it")),
        };
        let Node::File(vm, _, id) = node else {
            return Err(match node {
                Node::Disk(..) | Node::Vm(_) => Error::new(ErrorKind::CrossVm, "folders keep their names"),
                _ => denied("keeps its name"),
            });
        };
        if vm != new_vm {
            return Err(Error::new(ErrorKind::CrossVm, "a snapshot stays in its VM"));
        }
        let file_name = FileName::new(new_name)?;
        let key = (vm.clone(), id);
        let (handle, _) = self.vm(&vm)?;
        let guard = self.seal_guard(&handle, &vm)?;
        let has_writers = lock(&self.open_files).get(&key).is_some_and(|f| f.has_writers());
        let may_seal = guard.is_some() && !has_writers && !file_name.is_draft_name();
        let (replaced, sealed_now) = handle.append(None, |state| {
            let file = state.file(id)?;
            if (file.disk.as_ref(), file.name.as_str()) == (new_disk.as_ref(), new_name) {
                return Ok((Vec::new(), (None, None)));
            }
            let exists = || Error::new(ErrorKind::Exists, format!("{new_name:?} exists"));
            if new_disk.is_none() && state.disks.contains_key(new_name) {
                return Err(Error::new(ErrorKind::IsFolder, format!("{new_name:?} is a folder")));
            }
            let target = state.find(new_disk.as_deref(), new_name);
            if target.is_some_and(|t| no_replace || t.sealed.is_some() || t.protected) {
                return Err(exists());
            }
            if target.is_some() {
                self.deletable()?;
            }
            let replaced = target.map(|t| t.id);
            let rename = Op::Rename { file: id, disk: new_disk.clone(), name: new_name.to_owned(), replaced };
            let mut ops = vec![rename];
            let seals = may_seal && file.sealed.is_none() && file.data_blocks > 0;
            if seals {
                ops.push(Op::Seal { file: id });
            }
            Ok((ops, (replaced, seals.then(|| file.clone()))))
        })?;
        drop(guard);
        if let Some(entry) = sealed_now {
            self.note_sealed(&vm, &entry);
        }
        if replaced.is_some() {
            self.note_forgotten(&vm);
        }
        if let Some(replaced) = replaced
            && let Some(open) = lock(&self.open_files).get(&(vm.clone(), replaced))
        {
            open.unlinked();
        }
        self.after_rename(&key, has_writers, &file_name);
        Ok(())
    }

    /// All rows of a folder, without `.` and `..`; `latest` first, so that `rm -r` meets it while it is there.
    ///
    /// # Errors
    /// `NotFolder`, `Stale`, `Corrupt`, `Unavailable`.
    pub fn list(&self, ino: Ino) -> Result<Vec<Entry>> {
        let node = self.nodes.node(ino)?;
        let entry = |node: &Node, kind, name: &str| Entry { ino: self.nodes.ino(node), kind, name: name.to_owned() };
        let mut rows = Vec::new();
        match &node {
            Node::Root => {
                for name in self.store.vm_names()? {
                    match self.vm(name.as_str()) {
                        Ok(_) => {
                            rows.push(entry(&Node::Vm(name.as_str().to_owned()), Kind::Folder, name.as_str()));
                        }
                        Err(e) if e.kind() == ErrorKind::NotFound => {}
                        Err(e) => log::warn!("{name}: not listed: {e}"),
                    }
                }
            }
            // The control folder itself is never listed; what is in it may be.
            Node::Control => {
                rows.push(entry(&Node::Status, Kind::File, "status"));
                rows.push(entry(&Node::Clones, Kind::Folder, CLONES_FOLDER));
            }
            Node::Clones => self.list_clones(&mut rows)?,
            Node::Vm(vm) => {
                let (_, state) = self.vm(vm)?;
                self.list_files(&state, vm, None, &mut rows);
                for disk in state.disks.keys() {
                    rows.push(entry(&Node::Disk(vm.clone(), disk.clone()), Kind::Folder, disk));
                }
            }
            Node::Disk(vm, disk) => {
                let (_, state) = self.vm(vm)?;
                self.list_files(&state, vm, Some(disk), &mut rows);
            }
            _ => return Err(Error::new(ErrorKind::NotFolder, "is no folder")),
        }
        Ok(rows)
    }

    fn list_files(&self, state: &VmState, vm: &str, disk: Option<&str>, rows: &mut Vec<Entry>) {
        if state.latest(disk).is_some() {
            let node = Node::Latest(vm.to_owned(), disk.map(str::to_owned));
            rows.push(Entry { ino: self.nodes.ino(&node), kind: Kind::Link, name: LATEST.to_owned() });
        }
        for file in state.folder(disk) {
            let ino = self.nodes.ino(&Self::file_node(state, vm, file));
            rows.push(Entry { ino, kind: Kind::File, name: file.name.clone() });
        }
    }

    /// The folder that an inode lies in.
    pub fn parent_of(&self, ino: Ino) -> Ino {
        match self.nodes.node(ino) {
            Ok(Node::Disk(vm, _)) => self.nodes.ino(&Node::Vm(vm)),
            Ok(Node::Status | Node::Clones) => self.nodes.ino(&Node::Control),
            Ok(Node::Clone(..)) => self.nodes.ino(&Node::Clones),
            _ => ROOT,
        }
    }

    /// Sizes of the medium.
    pub fn space(&self) -> Space {
        let (bytes_total, bytes_free) = self.store.backend().space().unwrap_or((0, 0));
        Space { bytes_total, bytes_free }
    }

    fn status_text(&self) -> String {
        let status = serde_json::json!({
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "store": self.store.config().store,
            "read_only": self.options.read_only,
            "clones": self.clones.path(),
            "nodelete": self.options.no_delete,
            "gc": self.options.collect,
        });
        format!("{status}\n")
    }

    fn open_text(&self, text: String) -> Opened {
        let handle = self.keep_handle(OpenHandle::Text(text.into()));
        Opened { handle, direct: true, keep_cache: false }
    }
}

fn denied(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Denied, context)
}

fn sealed(entry: &FileEntry) -> Error {
    Error::new(ErrorKind::Sealed, format!("{:?} is sealed", entry.name))
}
