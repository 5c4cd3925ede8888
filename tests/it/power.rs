//! Tier 3: power is lost after every call to the medium, and what was not synced is lost, torn or comes in another order.
//!
//! The real local backend does each operation of `crash.rs` once, in a real folder; its calls are recorded. Then, for
//! every number of calls, media are made as a power failure may leave them ([`Disk`] is the model, docs/TESTING.md says
//! it in words). On each of them what was acknowledged must be there, what was there before intact byte for byte and the
//! invariants true; the same operation must work, and an exact collection leave nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{OFlags, RenameFlags, Stat, fstat};
use snapfs::backend::calls::{Calls, System};
use snapfs::backend::local::Local;
use snapfs::backend::testing::Memory;
use snapfs::backend::{Backend, Key};
use snapfs::error::Result;
use snapfs::store::Store;

use crate::crash::{Scene, Steps};
use crate::invariants::{assert_invariants, assert_no_leaks, assert_one_of, collect_all, open};
use crate::world::Rng;

/// Media by chance for each number of calls, beside those that are always made.
const CHANCES: usize = 3;

/// Bytes that a medium writes as a whole.
const SECTOR: usize = 512;

/// The operation is done again on the first media, and then on one in so many: it costs more than all else.
const AGAIN_ALWAYS: usize = 64;
const AGAIN_EVERY: usize = 5;

/// A file, whatever its names.
type FileNumber = usize;

/// A call that changed the medium.
#[derive(Debug, Clone)]
enum Call {
    /// A new file; without a name, or with one.
    Create {
        file: FileNumber,
        path: Option<String>,
    },
    Write {
        file: FileNumber,
        offset: u64,
        bytes: Arc<Vec<u8>>,
    },
    Truncate {
        file: FileNumber,
        bytes: u64,
    },
    SyncFile {
        file: FileNumber,
    },
    SyncFolder {
        path: String,
    },
    MakeFolder {
        path: String,
    },
    Link {
        file: FileNumber,
        path: String,
    },
    Rename {
        file: FileNumber,
        from: String,
        to: String,
    },
    Unlink {
        path: String,
    },
}

/// What is made to go wrong, to prove that the model sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    None,
    /// Files are never synced.
    Files,
    /// Folders are never synced.
    Folders,
}

/// Makes the calls, one at a time, and remembers them.
#[derive(Debug)]
pub struct Recording {
    root: PathBuf,
    lie: Lie,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    calls: Vec<Call>,
    files: usize,
    by_inode: HashMap<u64, FileNumber>,
    by_path: HashMap<String, FileNumber>,
}

impl Seen {
    fn create(&mut self, stat: &Stat, path: Option<String>) {
        let file = self.files;
        self.files += 1;
        // The number of an inode is used again when its file is gone.
        self.by_inode.insert(stat.st_ino, file);
        if let Some(path) = &path {
            self.by_path.insert(path.clone(), file);
        }
        self.calls.push(Call::Create { file, path });
    }

    fn of(&self, file: &OwnedFd) -> FileNumber {
        self.by_inode[&fstat(file).unwrap().st_ino]
    }
}

impl Recording {
    fn new(root: PathBuf, lie: Lie) -> Self {
        Self { root, lie, seen: Mutex::default() }
    }

    /// Calls so far.
    pub fn calls(&self) -> usize {
        self.seen().calls.len()
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path_of(&self, folder: &OwnedFd) -> String {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(folder))).unwrap();
        path.strip_prefix(&self.root).unwrap().to_str().unwrap().to_owned()
    }
}

impl Calls for Recording {
    fn open(&self, top: &OwnedFd, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let mut seen = self.seen();
        let file = System.open(top, path, flags)?;
        if flags.contains(OFlags::TMPFILE) {
            seen.create(&fstat(&file)?, None);
        } else if flags.contains(OFlags::EXCL) {
            seen.create(&fstat(&file)?, Some(path.to_owned()));
        }
        Ok(file)
    }

    fn make_folder(&self, top: &OwnedFd, path: &str) -> rustix::io::Result<()> {
        let mut seen = self.seen();
        System.make_folder(top, path)?;
        seen.calls.push(Call::MakeFolder { path: path.to_owned() });
        Ok(())
    }

    fn write(&self, file: &OwnedFd, bytes: &[u8], offset: u64) -> rustix::io::Result<usize> {
        let mut seen = self.seen();
        let written = System.write(file, bytes, offset)?;
        let file = seen.of(file);
        seen.calls.push(Call::Write { file, offset, bytes: Arc::new(bytes[..written].to_vec()) });
        Ok(written)
    }

    fn truncate(&self, file: &OwnedFd, bytes: u64) -> rustix::io::Result<()> {
        let mut seen = self.seen();
        System.truncate(file, bytes)?;
        let file = seen.of(file);
        seen.calls.push(Call::Truncate { file, bytes });
        Ok(())
    }

    fn sync(&self, file: &OwnedFd) -> rustix::io::Result<()> {
        let mut seen = self.seen();
        System.sync(file)?;
        let is_folder = File::from(file.try_clone().unwrap()).metadata().unwrap().is_dir();
        match (is_folder, self.lie) {
            (true, Lie::Folders) | (false, Lie::Files) => {}
            (true, _) => {
                let path = self.path_of(file);
                seen.calls.push(Call::SyncFolder { path });
            }
            (false, _) => {
                let file = seen.of(file);
                seen.calls.push(Call::SyncFile { file });
            }
        }
        Ok(())
    }

    fn link_unnamed(&self, top: &OwnedFd, file: &OwnedFd, path: &str) -> rustix::io::Result<()> {
        let mut seen = self.seen();
        System.link_unnamed(top, file, path)?;
        let file = seen.of(file);
        seen.by_path.insert(path.to_owned(), file);
        seen.calls.push(Call::Link { file, path: path.to_owned() });
        Ok(())
    }

    fn link(&self, top: &OwnedFd, from: &str, to: &str) -> rustix::io::Result<()> {
        let mut seen = self.seen();
        System.link(top, from, to)?;
        let file = seen.by_path[from];
        seen.by_path.insert(to.to_owned(), file);
        seen.calls.push(Call::Link { file, path: to.to_owned() });
        Ok(())
    }

    fn rename(&self, top: &OwnedFd, from: &str, to: &str, flags: RenameFlags) -> rustix::io::Result<()> {
        let mut seen = self.seen();
        System.rename(top, from, to, flags)?;
        let file = seen.by_path.remove(from).unwrap();
        seen.by_path.insert(to.to_owned(), file);
        seen.calls.push(Call::Rename { file, from: from.to_owned(), to: to.to_owned() });
        Ok(())
    }

    fn unlink(&self, top: &OwnedFd, path: &str) -> rustix::io::Result<()> {
        let mut seen = self.seen();
        System.unlink(top, path)?;
        seen.by_path.remove(path);
        seen.calls.push(Call::Unlink { path: path.to_owned() });
        Ok(())
    }
}

/// What a name leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Folder,
    File(FileNumber),
    /// Of before the operation.
    Old(Arc<Vec<u8>>),
}

/// A change of names that no folder's sync has made durable yet.
#[derive(Debug, Clone)]
enum NameChange {
    Set { path: String, node: Node },
    Move { file: FileNumber, from: String, to: String },
    Remove { path: String },
}

impl NameChange {
    /// The folder whose sync makes it durable. A move is one change of both its folders.
    fn folder(&self) -> &str {
        let (Self::Set { path, .. } | Self::Move { to: path, .. } | Self::Remove { path }) = self;
        path.rsplit_once('/').map_or("", |(folder, _)| folder)
    }

    fn apply(&self, names: &mut BTreeMap<String, Node>) {
        match self {
            Self::Set { path, node } => drop(names.insert(path.clone(), node.clone())),
            Self::Move { file, from, to } => {
                names.remove(from);
                names.insert(to.clone(), Node::File(*file));
            }
            Self::Remove { path } => drop(names.remove(path)),
        }
    }
}

/// A change of a file's content that no sync of the file has made durable yet.
#[derive(Debug, Clone)]
enum Change {
    Write(u64, Arc<Vec<u8>>),
    Truncate(u64),
}

/// What became of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kept,
    Lost,
    /// Of a write only so many bytes, in whole sectors, are on the medium.
    Torn(usize),
    /// Room was found for it, so the file has its length, but the bytes are zeros.
    Hollow,
}

#[derive(Debug, Clone, Default)]
struct Content {
    durable: Vec<u8>,
    pending: Vec<Change>,
}

impl Content {
    fn with(&self, fate: &mut dyn FnMut(&Change) -> Fate) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for change in &self.pending {
            let fate = fate(change);
            match change {
                Change::Truncate(len) if fate != Fate::Lost => bytes.resize(*len as usize, 0),
                Change::Truncate(_) => {}
                Change::Write(offset, written) => {
                    let (at, kept) = match fate {
                        Fate::Lost => continue,
                        Fate::Kept => (*offset as usize, written.len()),
                        Fate::Torn(kept) => (*offset as usize, kept.min(written.len())),
                        Fate::Hollow => (*offset as usize, 0),
                    };
                    let end = at + if fate == Fate::Hollow { written.len() } else { kept };
                    bytes.resize(bytes.len().max(end), 0);
                    bytes[at..at + kept].copy_from_slice(&written[..kept]);
                }
            }
        }
        bytes
    }
}

/// A medium: what is durable, and what is pending.
#[derive(Debug, Clone, Default)]
struct Disk {
    names: BTreeMap<String, Node>,
    pending: Vec<NameChange>,
    files: HashMap<FileNumber, Content>,
}

impl Disk {
    fn of(base: &Memory) -> Self {
        let mut disk = Self::default();
        for (key, bytes) in base.objects() {
            for (at, _) in key.match_indices('/') {
                disk.names.insert(key[..at].to_owned(), Node::Folder);
            }
            disk.names.insert(key, Node::Old(bytes));
        }
        disk
    }

    fn take(&mut self, call: &Call) {
        match call.clone() {
            Call::Create { file, path } => {
                self.files.insert(file, Content::default());
                if let Some(path) = path {
                    self.pending.push(NameChange::Set { path, node: Node::File(file) });
                }
            }
            Call::Write { file, offset, bytes } => self.content(file).pending.push(Change::Write(offset, bytes)),
            Call::Truncate { file, bytes } => self.content(file).pending.push(Change::Truncate(bytes)),
            Call::SyncFile { file } => {
                let content = self.content(file);
                content.durable = content.with(&mut |_| Fate::Kept);
                content.pending.clear();
            }
            Call::SyncFolder { path } => {
                let (now, later): (Vec<_>, Vec<_>) = self.pending.drain(..).partition(|c| c.folder() == path);
                now.iter().for_each(|change| change.apply(&mut self.names));
                self.pending = later;
            }
            Call::MakeFolder { path } => self.pending.push(NameChange::Set { path, node: Node::Folder }),
            Call::Link { file, path } => self.pending.push(NameChange::Set { path, node: Node::File(file) }),
            Call::Rename { file, from, to } => self.pending.push(NameChange::Move { file, from, to }),
            Call::Unlink { path } => self.pending.push(NameChange::Remove { path }),
        }
    }

    fn content(&mut self, file: FileNumber) -> &mut Content {
        self.files.get_mut(&file).unwrap()
    }

    /// The medium after the failure: changes of names as `kept` says, of contents as `fate` says. What is not reached
    /// through folders that are there is lost, and so is what has no name.
    fn after(&self, mut kept: impl FnMut(usize) -> bool, mut fate: impl FnMut(&Change) -> Fate) -> Memory {
        let mut names = self.names.clone();
        for (_, change) in self.pending.iter().enumerate().filter(|(at, _)| kept(*at)) {
            change.apply(&mut names);
        }
        let memory = Memory::new().with_reserve_bytes(0);
        let is_there =
            |path: &str| path.match_indices('/').all(|(at, _)| names.get(&path[..at]) == Some(&Node::Folder));
        for (path, node) in &names {
            // Neither is an object.
            if path.starts_with("tmp/") || path.ends_with(".lock") || !is_there(path) {
                continue;
            }
            match node {
                Node::Folder => {}
                Node::Old(bytes) => memory.replace(&Key::new(path.clone()), bytes.to_vec()),
                Node::File(file) => memory.replace(&Key::new(path.clone()), self.files[file].with(&mut fate)),
            }
        }
        memory
    }

    /// Media as the failure may leave this one: those that show one thing each, and some by chance.
    fn fates(&self, rng: &mut Rng) -> Vec<Memory> {
        let count = self.pending.len();
        let mut media = vec![
            // All that is pending is lost; nothing is (a kill); names without their contents; torn, and hollow ones.
            self.after(|_| false, |_| Fate::Lost),
            self.after(|_| true, |_| Fate::Kept),
            self.after(|_| true, |_| Fate::Lost),
            self.after(|_| true, |_| Fate::Torn(SECTOR)),
            self.after(|_| true, |_| Fate::Hollow),
        ];
        // The newest change of a name comes before all others, and each of the last few alone is lost or kept.
        for chosen in count.saturating_sub(4)..count {
            media.push(self.after(|at| at == chosen, |_| Fate::Kept));
            media.push(self.after(|at| at != chosen, |_| Fate::Kept));
        }
        for _ in 0..CHANCES {
            let names: Vec<bool> = (0..count).map(|_| rng.below(2) == 0).collect();
            let fate = |change: &Change| match (rng.below(4), change) {
                (0, _) => Fate::Kept,
                (1, _) => Fate::Lost,
                (2, Change::Write(_, bytes)) => {
                    Fate::Torn(rng.below((bytes.len() / SECTOR) as u64 + 1) as usize * SECTOR)
                }
                _ => Fate::Hollow,
            };
            media.push(self.after(|at| names[at], fate));
        }
        media
    }
}

/// What an operation did to a medium.
struct Recorded {
    calls: Vec<Call>,
    /// After how many calls each step was acknowledged.
    told: Vec<usize>,
}

/// Runs the operation once on a real folder.
fn record(
    scene: &Scene,
    work: &dyn Fn(&Arc<Store>, &Steps) -> Result<()>,
    without_tmpfile: bool,
    lie: Lie,
) -> Option<Recorded> {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().canonicalize().unwrap();
    for (key, bytes) in scene.base.objects() {
        let path = root.join(&key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, &**bytes).unwrap();
    }
    let recording = Arc::new(Recording::new(root.clone(), lie));
    let local = Local::open_with_calls(&root, without_tmpfile, recording.clone()).unwrap();
    let store = Arc::new(open(Arc::new(local), &scene.clock).unwrap());
    let steps = Steps { recording: Some(recording.clone()), ..Steps::default() };
    work(&store, &steps).unwrap();
    let calls = recording.seen().calls.clone();
    // What a thread does that outlives the operation belongs to it no more.
    drop(store);
    let has_files = calls.iter().any(|call| matches!(call, Call::Link { .. } | Call::Rename { .. }));
    has_files.then(|| Recorded { calls, told: steps.told.take() })
}

/// A medium's objects in a few bytes.
fn digest(memory: &Memory) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for (key, bytes) in memory.objects() {
        hasher.update(&(key.len() as u64).to_le_bytes()).update(key.as_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
    }
    *hasher.finalize().as_bytes()
}

fn replay(scene: &Scene, work: &dyn Fn(&Arc<Store>, &Steps) -> Result<()>, recorded: &Recorded) -> usize {
    let last = scene.states.len() - 1;
    let mut disk = Disk::of(&scene.base);
    let mut rng = Rng(0x5eed_0001);
    let mut seen = BTreeSet::new();
    for done in 0..=recorded.calls.len() {
        if let Some(call) = done.checked_sub(1).and_then(|at| recorded.calls.get(at)) {
            disk.take(call);
        }
        let is_over = done == recorded.calls.len();
        let first = if is_over { last } else { recorded.told.iter().filter(|told| **told <= done).count() };
        let end = if is_over { last } else { last.min(first + scene.reach) };
        for (number, memory) in disk.fates(&mut rng).into_iter().enumerate() {
            if !seen.insert((digest(&memory), first, end)) {
                continue;
            }
            let what = format!("power lost after call {done} of {}, medium {number}", recorded.calls.len());
            assert_one_of(&memory, &scene.clock, &scene.states[first..=end], &what);
            if seen.len() > AGAIN_ALWAYS && !seen.len().is_multiple_of(AGAIN_EVERY) {
                continue;
            }
            let store = Arc::new(open(Arc::new(memory.clone()), &scene.clock).unwrap());
            work(&store, &Steps::default()).unwrap_or_else(|e| panic!("{what}: again: {e}"));
            drop(store);
            let store = open(Arc::new(memory.clone()), &scene.clock).unwrap();
            collect_all(&store, true).unwrap_or_else(|e| panic!("{what}: gc: {e}"));
            assert_invariants(&memory, &scene.clock, &scene.states[last], &format!("{what}, in the end"));
            assert_no_leaks(&memory, &scene.clock, &what);
        }
    }
    seen.len()
}

/// Loses power at every call of an operation, on a medium that knows files without names and on one that does not. An
/// operation that puts no object is over with its deletions, which are tried too.
pub fn lose_power(scene: &Scene, work: &dyn Fn(&Arc<Store>, &Steps) -> Result<()>) {
    for without_tmpfile in [false, true] {
        if let Some(recorded) = record(scene, work, without_tmpfile, Lie::None) {
            let media = replay(scene, work, &recorded);
            println!("{} calls, {media} different media", recorded.calls.len());
        }
    }
}

/// The model itself: a backend that does not sync is found out, whichever of the two it leaves out.
#[test]
fn a_folder_that_is_not_synced_as_it_should_be_is_found_out() {
    for (lie, without_tmpfile) in [(Lie::Files, false), (Lie::Files, true), (Lie::Folders, false), (Lie::Folders, true)]
    {
        let (scene, bytes) = Scene::of_a_backup();
        let work = |store: &Arc<Store>, _: &Steps| crate::crash::backed_up(store, "vm/b.img", &bytes);
        let recorded = record(&scene, &work, without_tmpfile, lie).unwrap();
        let outcome = catch_unwind(AssertUnwindSafe(|| replay(&scene, &work, &recorded)));
        assert!(outcome.is_err(), "{lie:?} {without_tmpfile}: {:?}", outcome.ok());
    }
}

#[test]
fn the_model_keeps_what_was_synced_and_may_lose_all_else() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().canonicalize().unwrap();
    let recording = Arc::new(Recording::new(root.clone(), Lie::None));
    let local = Local::open_with_calls(&root, false, recording.clone()).unwrap();
    local.put_new(&Key::new("a/b/object"), &[7; 2000]).unwrap();
    local.delete(&Key::new("a/b/object")).unwrap();
    let mut upload = local.create(&Key::new("a/b/unfinished")).unwrap();
    upload.append(b"never named").unwrap();
    let calls = recording.seen().calls.clone();
    let mut disk = Disk::default();
    let mut shown = Vec::new();
    for call in &calls {
        disk.take(call);
        let all = |memory: &Memory| memory.objects().into_iter().map(|(k, b)| (k, b.len())).collect::<Vec<_>>();
        shown.push((all(&disk.after(|_| false, |_| Fate::Lost)), all(&disk.after(|_| true, |_| Fate::Torn(512)))));
    }
    let object = vec![("a/b/object".to_owned(), 2000)];
    let is = |wanted: fn(&Call) -> bool| calls.iter().position(wanted).unwrap();
    let linked = is(|call| matches!(call, Call::Link { .. }));
    // Named, but not yet sure to be.
    assert_eq!(shown[linked], (Vec::new(), object.clone()));
    assert!(matches!(&calls[linked + 1], Call::SyncFolder { path } if path == "a/b"));
    assert_eq!(shown[linked + 1], (object.clone(), object.clone()));
    // A deletion that may come undone; a file that never had a name.
    let gone = is(|call| matches!(call, Call::Unlink { .. }));
    assert_eq!(shown[gone], (object.clone(), Vec::new()));
    assert_eq!(shown[calls.len() - 1], (object, Vec::new()));
    // Without its sync the name would lead to torn bytes.
    let mut torn = Disk::default();
    calls[..=linked].iter().filter(|call| !matches!(call, Call::SyncFile { .. })).for_each(|call| torn.take(call));
    let memory = torn.after(|_| true, |_| Fate::Torn(512));
    assert_eq!(memory.objects()["a/b/object"].len(), 512);
}
