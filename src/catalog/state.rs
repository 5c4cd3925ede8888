//! The state of a VM: what its log adds up to. Pure: records in, state out.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalog::record::{Attributes, Changes, Commit, Dead, Op, PackEntry, Record, Target};
use crate::clock::Timestamp;
use crate::error::{Error, ErrorKind, Result, corrupt, not_found};
use crate::limits::FILES_PER_VM_MAX;
use crate::name::{DiskName, FileName, VmName};
use crate::recipe::SlotSet;
use crate::units::{FileId, Incarnation, ObjectId, PackNumber, RecordNumber, RootId, VmGroup};
use crate::wire::{Reader, Wire, wire_struct};

wire_struct! {
    /// A snapshot or a draft.
    pub struct FileEntry {
        /// Its number for life.
        pub id: FileId,
        /// Disk folder, if any.
        pub disk: Option<String>,
        /// Name.
        pub name: String,
        /// Root page of its last commit.
        pub root: RootId,
        /// Bytes of the image.
        pub image_bytes: u64,
        /// Blocks with data.
        pub data_blocks: u64,
        /// Owner.
        pub uid: u32,
        /// Group.
        pub gid: u32,
        /// Last change of the content.
        pub mtime: Timestamp,
        /// When the log first had it: the store's own receipt time.
        pub received: Timestamp,
        /// The record that sealed it; `None` for a draft. The order of these is the order of snapshots.
        pub sealed: Option<RecordNumber>,
        /// Whether the last writer had closed it at its last commit.
        pub closed: bool,
        /// Whether it may not be forgotten.
        pub protected: bool,
        /// Commits so far.
        pub commits: u32,
    }
}

impl FileEntry {
    /// Its path within the VM: `name` or `disk/name`.
    pub fn path(&self) -> String {
        match &self.disk {
            Some(disk) => format!("{disk}/{}", self.name),
            None => self.name.clone(),
        }
    }
}

wire_struct! {
    /// The writer that holds a VM.
    pub struct Session {
        /// Its begin record.
        pub begin: RecordNumber,
        /// Drawn at random by the holder.
        pub holder: [u8; 16],
        /// Host and process, for people.
        pub host: String,
        /// Process number on that host.
        pub process: u32,
        /// Epoch of the popular set that it knew: it may match common slots that were condemned later.
        pub common_epoch: u64,
    }
}

wire_struct! {
    /// What the log of the common home says beside its packs.
    #[derive(Default)]
    pub struct Popular {
        /// The newest epoch; 0 before the first.
        pub epoch: u64,
        /// The epoch whose popular index counts; 0 for none.
        pub index: u64,
        /// The record that published the newest epoch.
        pub published: RecordNumber,
        /// Slots that nothing new may refer to, from that epoch on.
        pub condemned: SlotSet,
        /// Packs of writers that joined before this record are not brought any more.
        pub fence: RecordNumber,
        /// VM groups of the packs whose group is not that of all VMs without one, by pack.
        pub groups: Vec<(PackNumber, VmGroup)>,
    }
}

impl Popular {
    /// Whose blocks a pack holds.
    pub fn group_of(&self, pack: PackNumber) -> VmGroup {
        let at = self.groups.binary_search_by_key(&pack, |(number, _)| *number);
        at.ok().and_then(|at| self.groups.get(at)).map(|(_, group)| *group).unwrap_or_default()
    }
}

/// The state of a VM after some record.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VmState {
    /// The VM's incarnation.
    pub incarnation: Incarnation,
    /// The last record that is in here.
    pub number: RecordNumber,
    /// The VM's folder; `None` when the VM is deleted.
    pub attributes: Option<Attributes>,
    /// The writer that began last.
    pub session: Option<Session>,
    /// Disk folders.
    pub disks: BTreeMap<String, Attributes>,
    /// Snapshots and drafts.
    pub files: BTreeMap<FileId, FileEntry>,
    /// Packs, and the objects that hold them.
    pub packs: BTreeMap<PackNumber, PackEntry>,
    /// Roots of forgotten files and of earlier commits, and since when: dead as soon as nobody reads them.
    pub condemned: BTreeMap<RootId, Timestamp>,
    /// Objects that may be deleted, and may have been already.
    pub dropping: Vec<Dead>,
    /// Name of the VM group; empty for that of all VMs without one.
    pub group: String,
    /// Of the common home only.
    pub popular: Popular,
    /// Snapshots of which a repair found bytes that cannot be read any more, and how many.
    pub lost: BTreeMap<FileId, u64>,
    names: BTreeMap<(Option<String>, String), FileId>,
}

impl VmState {
    /// The state before the first record of a new VM.
    pub fn of_new_vm(incarnation: Incarnation) -> Self {
        Self { incarnation, ..Self::default() }
    }

    /// Whether a root page is of a file, or of one that was forgotten and not dropped yet.
    pub fn knows_root(&self, root: RootId) -> bool {
        self.condemned.contains_key(&root) || self.files.values().any(|file| file.root == root)
    }

    /// Whether the VM is there.
    pub fn exists(&self) -> bool {
        self.attributes.is_some()
    }

    /// The file of this name.
    pub fn find(&self, disk: Option<&str>, name: &str) -> Option<&FileEntry> {
        self.files.get(self.names.get(&(disk.map(str::to_owned), name.to_owned()))?)
    }

    /// The files of one folder.
    pub fn folder<'a>(&'a self, disk: Option<&'a str>) -> impl Iterator<Item = &'a FileEntry> + 'a {
        self.files.values().filter(move |f| f.disk.as_deref() == disk)
    }

    /// The newest sealed snapshot of a folder: what `latest` leads to, and the parent of the next one.
    pub fn latest(&self, disk: Option<&str>) -> Option<&FileEntry> {
        self.files.values().filter(|f| f.disk.as_deref() == disk && f.sealed.is_some()).max_by_key(|f| (f.sealed, f.id))
    }

    /// The file of this number.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn file(&self, id: FileId) -> Result<&FileEntry> {
        self.files.get(&id).ok_or_else(|| not_found(format!("file {id} is not there any more")))
    }

    /// The pack of this number.
    ///
    /// # Errors
    /// `Corrupt`: references only lead to packs that the log has (I2).
    pub fn pack(&self, number: PackNumber) -> Result<&PackEntry> {
        self.packs.get(&number).ok_or_else(|| corrupt(format!("pack {number}: not in the log")))
    }

    /// Applies the next record.
    ///
    /// # Errors
    /// `Corrupt` when it is not the next one, or speaks of what is not there. The state is then partly changed and
    /// must be thrown away.
    pub fn apply(&mut self, record: &Record) -> Result<()> {
        let first = self.number == RecordNumber(0);
        if record.number != self.number.next()? {
            return Err(corrupt(format!("log: record {} after {}", record.number.0, self.number.0)));
        }
        if first {
            if !matches!(record.ops.first(), Some(Op::Create { .. })) {
                return Err(corrupt("log: record 1 does not create the VM"));
            }
            self.incarnation = record.incarnation;
        } else if self.incarnation != record.incarnation {
            return Err(corrupt(format!("log: record {} is of another VM", record.number.0)));
        }
        if let Some(session) = record.session
            && self.session.as_ref().map(|s| s.begin) != Some(session)
        {
            return Err(corrupt(format!("log: record {} of a writer that was fenced", record.number.0)));
        }
        self.number = record.number;
        for op in &record.ops {
            self.apply_op(record, op).map_err(|e| e.within(format!("log: record {}", record.number.0)))?;
        }
        Ok(())
    }

    fn apply_op(&mut self, record: &Record, op: &Op) -> Result<()> {
        match op {
            Op::Create { attributes } => {
                if self.exists() {
                    return Err(corrupt("creates a VM that is there"));
                }
                self.attributes = Some(*attributes);
            }
            Op::Delete {} => {
                for file in std::mem::take(&mut self.files).into_values() {
                    self.condemned.insert(file.root, record.time);
                }
                self.names.clear();
                self.lost.clear();
                self.disks.clear();
                self.attributes = None;
            }
            Op::Begin { holder, host, process, common_epoch } => {
                self.session = Some(Session {
                    begin: record.number,
                    holder: *holder,
                    host: host.clone(),
                    process: *process,
                    common_epoch: *common_epoch,
                });
            }
            Op::MakeDisk { name, attributes } => {
                DiskName::new(name).map_err(illegal)?;
                self.disks.insert(name.clone(), *attributes);
            }
            Op::RemoveDisk { name } => {
                self.disks.remove(name);
            }
            Op::Change { target, changes } => self.change(target, changes)?,
            Op::Commit { commit } => self.commit(record, commit)?,
            Op::Seal { file } => {
                self.file_mut(*file)?.sealed = Some(record.number);
            }
            Op::Rename { file, disk, name, replaced } => {
                FileName::new(name).map_err(illegal)?;
                if let Some(replaced) = replaced {
                    self.forget(*replaced, record.time)?;
                }
                let entry = self.file_mut(*file)?;
                let old = (entry.disk.take(), std::mem::take(&mut entry.name));
                entry.disk.clone_from(disk);
                entry.name.clone_from(name);
                self.names.remove(&old);
                if self.names.insert((disk.clone(), name.clone()), *file).is_some() {
                    return Err(corrupt("renames over a file"));
                }
            }
            Op::Forget { file } => self.forget(*file, record.time)?,
            Op::Protect { file, on } => self.file_mut(*file)?.protected = *on,
            Op::Move { packs, dead } => {
                for entry in packs {
                    match self.packs.get_mut(&entry.number) {
                        Some(old) => *old = *entry,
                        None => return Err(corrupt(format!("moves pack {} that is not there", entry.number))),
                    }
                }
                if self.packs.values().any(|p| dead.contains(&p.object)) {
                    return Err(corrupt("moves packs out of an object that others are still in"));
                }
                self.dropping.extend(dead.iter().map(|object| Dead::Pack { object: *object }));
            }
            Op::Drop { packs, roots } => {
                let mut left = BTreeSet::new();
                self.popular.groups.retain(|(number, _)| !packs.contains(number));
                for number in packs {
                    let Some(entry) = self.packs.remove(number) else {
                        return Err(corrupt(format!("drops pack {number} that is not there")));
                    };
                    left.insert(entry.object);
                }
                // An object goes with its last member.
                for entry in self.packs.values() {
                    left.remove(&entry.object);
                }
                self.dropping.extend(left.into_iter().map(|object| Dead::Pack { object }));
                for root in roots {
                    self.condemned.remove(root);
                    self.dropping.push(Dead::Root { id: *root });
                }
            }
            Op::Deleted {} => self.dropping.clear(),
            Op::Join { .. } => {}
            Op::Bring { group, packs } => self.bring(*group, packs)?,
            Op::Publish { epoch, index, condemned } => {
                if *epoch <= self.popular.epoch || index > epoch {
                    return Err(corrupt(format!("publishes epoch {epoch} after {}", self.popular.epoch)));
                }
                self.popular.epoch = *epoch;
                self.popular.index = *index;
                self.popular.published = record.number;
                self.popular.condemned.clone_from(condemned);
            }
            Op::Fence { before } => {
                self.popular.fence = self.popular.fence.max(*before);
            }
            Op::Group { name } => {
                if !name.is_empty() {
                    VmName::new(name).map_err(illegal)?;
                }
                self.group.clone_from(name);
            }
            Op::Mark { file, lost_bytes } => {
                self.file_mut(*file)?;
                match lost_bytes {
                    0 => self.lost.remove(file),
                    bytes => self.lost.insert(*file, *bytes),
                };
            }
        }
        Ok(())
    }

    fn bring(&mut self, group: VmGroup, packs: &[PackEntry]) -> Result<()> {
        for pack in packs {
            if !pack.number.is_common() || pack.number.begin() < self.popular.fence {
                return Err(corrupt(format!("brings pack {} of a VM, or of a writer that was fenced", pack.number)));
            }
            if self.packs.insert(pack.number, *pack).is_some() {
                return Err(corrupt(format!("brings pack {} a second time", pack.number)));
            }
            if group != VmGroup::default()
                && let Err(at) = self.popular.groups.binary_search_by_key(&pack.number, |(number, _)| *number)
            {
                self.popular.groups.insert(at, (pack.number, group));
            }
        }
        Ok(())
    }

    fn commit(&mut self, record: &Record, commit: &Commit) -> Result<()> {
        FileName::new(&commit.name).map_err(illegal)?;
        for pack in &commit.packs {
            if self.packs.insert(pack.number, *pack).is_some() {
                return Err(corrupt(format!("brings pack {} a second time", pack.number)));
            }
        }
        let name = (commit.disk.clone(), commit.name.clone());
        let known = self.names.get(&name).copied();
        if known.is_some_and(|id| id != commit.file) {
            return Err(corrupt(format!("commits {:?} over another file", commit.name)));
        }
        if let Some(old) = self.files.get(&commit.file) {
            if old.sealed.is_some() {
                return Err(corrupt(format!("commits the sealed file {}", commit.file)));
            }
            self.names.remove(&(old.disk.clone(), old.name.clone()));
            if old.root != commit.root {
                self.condemned.insert(old.root, record.time);
            }
        } else if self.files.len() >= FILES_PER_VM_MAX {
            return Err(corrupt("more files than a VM may have"));
        }
        let old = self.files.get(&commit.file);
        let entry = FileEntry {
            id: commit.file,
            disk: commit.disk.clone(),
            name: commit.name.clone(),
            root: commit.root,
            image_bytes: commit.image_bytes,
            data_blocks: commit.data_blocks,
            uid: commit.uid,
            gid: commit.gid,
            mtime: commit.mtime,
            received: old.map_or(record.time, |o| o.received),
            sealed: commit.sealed.then_some(record.number),
            closed: commit.closed,
            protected: old.is_some_and(|o| o.protected),
            commits: old.map_or(0, |o| o.commits).saturating_add(1),
        };
        self.lost.remove(&commit.file);
        self.names.insert(name, commit.file);
        self.files.insert(commit.file, entry);
        Ok(())
    }

    fn forget(&mut self, id: FileId, time: Timestamp) -> Result<()> {
        let entry = self.files.remove(&id).ok_or_else(|| corrupt(format!("forgets file {id} that is not there")))?;
        self.condemned.insert(entry.root, time);
        self.lost.remove(&id);
        self.names.remove(&(entry.disk, entry.name));
        Ok(())
    }

    fn file_mut(&mut self, id: FileId) -> Result<&mut FileEntry> {
        self.files.get_mut(&id).ok_or_else(|| corrupt(format!("speaks of file {id} that is not there")))
    }

    fn change(&mut self, target: &Target, changes: &Changes) -> Result<()> {
        let folder = |a: &mut Attributes| {
            a.mode = changes.mode.unwrap_or(a.mode);
            a.uid = changes.uid.unwrap_or(a.uid);
            a.gid = changes.gid.unwrap_or(a.gid);
            a.mtime = changes.mtime.unwrap_or(a.mtime);
        };
        match target {
            Target::Vm {} => folder(self.attributes.as_mut().ok_or_else(|| corrupt("changes a VM that is not there"))?),
            Target::Disk { name } => folder(
                self.disks.get_mut(name).ok_or_else(|| corrupt(format!("changes disk {name:?} that is not there")))?,
            ),
            Target::File { id } => {
                let file = self.file_mut(*id)?;
                file.uid = changes.uid.unwrap_or(file.uid);
                file.gid = changes.gid.unwrap_or(file.gid);
                file.mtime = changes.mtime.unwrap_or(file.mtime);
            }
        }
        Ok(())
    }

    /// Every pack object that the state needs, with its bytes.
    pub fn objects(&self) -> BTreeMap<ObjectId, u64> {
        self.packs.values().map(|p| (p.object, p.object_bytes)).collect()
    }
}

/// A name that no writer would have let in: it would go straight into the mount.
fn illegal(error: Error) -> Error {
    error.as_kind(ErrorKind::Corrupt)
}

impl Wire for VmState {
    fn put(&self, out: &mut Vec<u8>) {
        self.incarnation.put(out);
        self.number.put(out);
        self.attributes.put(out);
        self.session.put(out);
        self.disks.iter().map(|(name, a)| (name.clone(), *a)).collect::<Vec<_>>().put(out);
        self.files.values().cloned().collect::<Vec<_>>().put(out);
        self.packs.values().copied().collect::<Vec<_>>().put(out);
        self.condemned.iter().map(|(root, time)| (*root, *time)).collect::<Vec<_>>().put(out);
        self.dropping.put(out);
        self.group.put(out);
        Some(&self.popular).filter(|popular| **popular != Popular::default()).cloned().put(out);
        // Seldom there, and last: nothing at all says that there are none.
        if !self.lost.is_empty() {
            self.lost.iter().map(|(file, bytes)| (*file, *bytes)).collect::<Vec<_>>().put(out);
        }
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        let incarnation = Wire::take(reader)?;
        let number = Wire::take(reader)?;
        let attributes = Wire::take(reader)?;
        let session = Wire::take(reader)?;
        let disks = Vec::<(String, Attributes)>::take(reader)?;
        let files = Vec::<FileEntry>::take(reader)?;
        let packs = Vec::<PackEntry>::take(reader)?;
        let condemned = Vec::<(RootId, Timestamp)>::take(reader)?;
        let dropping = Wire::take(reader)?;
        let group = Wire::take(reader)?;
        let popular: Option<Popular> = Wire::take(reader)?;
        let is_spelled_out = popular.as_ref().is_some_and(|popular| *popular == Popular::default());
        let popular = popular.unwrap_or_default();
        let has_losses = reader.remaining() > 0;
        let lost: Vec<(FileId, u64)> = if has_losses { Wire::take(reader)? } else { Vec::new() };
        let names: BTreeMap<_, _> = files.iter().map(|f| ((f.disk.clone(), f.name.clone()), f.id)).collect();
        let ordered = disks.windows(2).all(|w| matches!(w, [a, b] if a.0 < b.0))
            && files.windows(2).all(|w| matches!(w, [a, b] if a.id < b.id))
            && packs.windows(2).all(|w| matches!(w, [a, b] if a.number < b.number))
            && condemned.windows(2).all(|w| matches!(w, [a, b] if a.0 < b.0));
        let ordered = ordered && popular.groups.windows(2).all(|w| matches!(w, [a, b] if a.0 < b.0));
        let is_spelled_out = is_spelled_out || (has_losses && lost.is_empty());
        let are_files = |lost: &[(FileId, u64)]| {
            let is_there = |file: &FileId| files.binary_search_by_key(file, |f| f.id).is_ok();
            lost.iter().all(|(file, bytes)| *bytes > 0 && is_there(file))
                && lost.windows(2).all(|w| matches!(w, [a, b] if a.0 < b.0))
        };
        let ordered = ordered && are_files(&lost);
        if !ordered || is_spelled_out || names.len() != files.len() {
            return Err(corrupt("state: lists out of order"));
        }
        Ok(Self {
            incarnation,
            number,
            attributes,
            session,
            disks: disks.into_iter().collect(),
            files: files.into_iter().map(|f| (f.id, f)).collect(),
            packs: packs.into_iter().map(|p| (p.number, p)).collect(),
            condemned: condemned.into_iter().collect(),
            dropping,
            group,
            popular,
            lost: lost.into_iter().collect(),
            names,
        })
    }
}
