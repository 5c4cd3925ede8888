//! What is attached on this host: one file for each owner, in a folder that outlives the host's boots, as clones do.
//!
//! A record is durable before its clone is made and before its device is in use, and is deleted after both are gone, so
//! that whatever is cut off in between can be told from it.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::cli::attach::loop_device::{Binding, Shows};
use crate::cli::attach::own_clone::OwnClone;
use crate::error::{Error, Result, busy, corrupt, invalid};

/// The variable that names another folder.
pub const FOLDER_VARIABLE: &str = "SNAPFS_ATTACHED";

const FOLDER: &str = "/var/lib/snapfs/attached";

/// Bytes of an owner's name: escaped, it is a file name with an ending.
const OWNER_BYTES_MAX: usize = 80;

/// A record is a few lines.
const RECORD_BYTES_MAX: u64 = 64 << 10;

/// Records are read one after the other; a host has a few hundred devices at the most.
const RECORDS_MAX: usize = 65_536;

/// Another that works for the same owner is waited for so often, with this pause.
const LOCK_TRIES: usize = 160;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

const RECORD_ENDING: &str = ".json";
const LOCK_ENDING: &str = ".lock";

/// What a record has in place of its ending while it is being written.
const NEW_EXTENSION: &str = "new";

/// For whom something is attached, such as `xen:backend/vbd/7/51728`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Owner(String);

impl Owner {
    /// Checks a name.
    ///
    /// # Errors
    /// `Invalid` unless it has 1 to 80 bytes of printable ASCII.
    pub fn new(text: &str) -> Result<Self> {
        let fits = (1..=OWNER_BYTES_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        if fits { Ok(Self(text.to_owned())) } else { Err(invalid(format!("{text:?} is no name of an owner"))) }
    }

    /// An owner that nobody has named.
    ///
    /// # Errors
    /// `Unavailable` without randomness.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::io("getrandom", e.into()))?;
        Ok(Self(format!("once:{:016x}", u64::from_le_bytes(bytes))))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its file's name without the ending. No two owners share one.
    fn file_stem(&self) -> String {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_:".contains(&b);
        self.0.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02x}") }).collect()
    }
}

impl TryFrom<String> for Owner {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::new(&text)
    }
}

impl From<Owner> for String {
    fn from(owner: Owner) -> Self {
        owner.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// A record: what is attached for an owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// For whom.
    pub owner: Owner,
    /// What was asked for, as it was said.
    pub target: String,
    /// Whether the device can be written to.
    pub writable: bool,
    /// The clone that was made for it, or was about to be; `None` when the target itself is shown.
    #[serde(default)]
    pub clone: Option<OwnClone>,
    /// The device and its file; `None` until they are chosen.
    #[serde(default)]
    pub binding: Option<Binding>,
}

impl Attachment {
    /// What its device shows.
    ///
    /// # Errors
    /// As [`Binding::shows`].
    pub fn shows(&self) -> Result<Shows> {
        self.binding.as_ref().map_or(Ok(Shows::Other), Binding::shows)
    }

    /// The path of its device, for people.
    pub fn device(&self) -> String {
        self.binding.as_ref().map_or_else(|| "no device".to_owned(), |b| b.device.path().display().to_string())
    }
}

/// The folder of records.
pub struct Registry {
    folder: PathBuf,
}

impl Registry {
    /// The registry of this host; its folder is made if it is not there.
    ///
    /// # Errors
    /// `Denied` for all but root, `Unavailable`.
    pub fn open() -> Result<Self> {
        Self::at(folder())
    }

    /// The registry of this host, if it has one.
    pub fn existing() -> Option<Self> {
        let folder = folder();
        folder.is_dir().then_some(Self { folder })
    }

    fn at(folder: PathBuf) -> Result<Self> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(|e| Error::io(folder.display().to_string(), e))?;
        Ok(Self { folder })
    }

    /// Takes an owner: whoever else works for it has to wait.
    ///
    /// # Errors
    /// `Busy` when that takes too long; `Denied`, `NoSpace`, `Unavailable`.
    pub fn lock(&self, owner: &Owner) -> Result<Held<'_>> {
        let path = self.folder.join(owner.file_stem() + LOCK_ENDING);
        let failed = |e: std::io::Error| Error::io(path.display().to_string(), e);
        for _ in 0..LOCK_TRIES {
            let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_at(&file, &path) => return Ok(Held { registry: self, owner: owner.clone(), file, path }),
                // Its last holder has deleted it in between: the next one makes it anew.
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PAUSE),
                Err(e) => return Err(failed(e.into())),
            }
        }
        Err(busy(format!("another process attaches or detaches for {owner}")))
    }

    /// Deletes the locks and half-written records of processes that were killed.
    ///
    /// # Errors
    /// `Denied`, `Unavailable`.
    pub fn sweep(&self) -> Result<()> {
        let failed = |e: std::io::Error| Error::io(self.folder.display().to_string(), e);
        for row in std::fs::read_dir(&self.folder).map_err(failed)?.take(RECORDS_MAX) {
            let path = row.map_err(failed)?.path();
            let is_new = path.extension().is_some_and(|ending| ending == NEW_EXTENSION);
            let lock = path.with_extension(LOCK_ENDING.trim_start_matches('.'));
            if !is_new && lock != path {
                continue;
            }
            let Ok(file) = File::options().create(true).truncate(false).write(true).open(&lock) else { continue };
            let taken = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
            // While it is held and has this name nobody works there.
            if taken.is_ok() && is_at(&file, &lock) {
                if is_new {
                    let _ = std::fs::remove_file(&path);
                }
                let _ = std::fs::remove_file(&lock);
            }
        }
        Ok(())
    }

    /// All owners that have something attached.
    ///
    /// # Errors
    /// `Unavailable`.
    pub fn owners(&self) -> Result<Vec<Owner>> {
        let failed = |e: std::io::Error| Error::io(self.folder.display().to_string(), e);
        let mut owners = Vec::new();
        for row in std::fs::read_dir(&self.folder).map_err(failed)?.take(RECORDS_MAX) {
            let name = row.map_err(failed)?.file_name();
            if name.to_str().is_some_and(|name| name.ends_with(RECORD_ENDING))
                && let Some(record) = read_record(&self.folder.join(&name))?
            {
                owners.push(record.owner);
            }
        }
        owners.sort();
        Ok(owners)
    }

    /// What is attached for an owner.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn get(&self, owner: &Owner) -> Result<Option<Attachment>> {
        read_record(&self.record_path(owner))
    }

    fn record_path(&self, owner: &Owner) -> PathBuf {
        self.folder.join(owner.file_stem() + RECORD_ENDING)
    }
}

fn folder() -> PathBuf {
    let folder = std::env::var_os(FOLDER_VARIABLE).filter(|path| !path.is_empty());
    folder.map_or_else(|| PathBuf::from(FOLDER), PathBuf::from)
}

fn is_at(file: &File, path: &Path) -> bool {
    let same = |a: &std::fs::Metadata, b: &std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    matches!((file.metadata(), path.symlink_metadata()), (Ok(open), Ok(there)) if same(&open, &there))
}

fn read_record(path: &Path) -> Result<Option<Attachment>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|e| Error::io(path.display().to_string(), e))?,
    };
    let mut text = Vec::new();
    file.take(RECORD_BYTES_MAX).read_to_end(&mut text).map_err(|e| Error::io(path.display().to_string(), e))?;
    let record = serde_json::from_slice(&text).map_err(|e| corrupt(path.display().to_string()).because(e))?;
    Ok(Some(record))
}

/// An owner that is taken. Let go of when dropped.
pub struct Held<'a> {
    registry: &'a Registry,
    owner: Owner,
    // The lock lives as long as this is open.
    file: File,
    path: PathBuf,
}

impl Held<'_> {
    /// What is attached for it.
    ///
    /// # Errors
    /// As [`Registry::get`].
    pub fn get(&self) -> Result<Option<Attachment>> {
        self.registry.get(&self.owner)
    }

    /// Writes the record, all of it or nothing; it is durable when this returns.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn put(&self, attachment: &Attachment) -> Result<()> {
        let path = self.registry.record_path(&self.owner);
        let about = path.display().to_string();
        let text = serde_json::to_vec_pretty(attachment).map_err(|e| corrupt("JSON").because(e))?;
        // One name for each owner: what is left by a process that was killed is written over.
        let new = path.with_extension(NEW_EXTENSION);
        let written = File::options().create(true).truncate(true).write(true).mode(0o600).open(&new);
        let written = written.and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()));
        let written = written.and_then(|()| std::fs::rename(&new, &path));
        let synced = written.and_then(|()| File::open(&self.registry.folder)?.sync_all());
        synced.map_err(|e| Error::io(about, e))
    }

    /// Deletes the record. Done when there is none.
    ///
    /// # Errors
    /// `Denied`, `Unavailable`.
    pub fn delete(&self) -> Result<()> {
        let path = self.registry.record_path(&self.owner);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path.display().to_string(), e)),
            _ => Ok(()),
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Only while it is locked and has this name may it be deleted.
        if is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::attach::loop_device::{FileIdentity, LoopDevice};
    use crate::error::ErrorKind;

    fn registry(folder: &tempfile::TempDir) -> Registry {
        Registry::at(folder.path().join("run/attached")).unwrap()
    }

    fn attachment(owner: &Owner) -> Attachment {
        Attachment {
            owner: owner.clone(),
            target: "web01/latest".to_owned(),
            writable: false,
            clone: None,
            binding: Some(Binding {
                device: LoopDevice::parse(Path::new("/dev/loop4711")).unwrap(),
                path: PathBuf::from("/mnt/snapfs/web01/a.img"),
                file: FileIdentity { device: "0:45".to_owned(), inode: 7 },
                boot: "this".to_owned(),
            }),
        }
    }

    #[test]
    fn a_record_is_there_until_it_is_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let registry = registry(&folder);
        let owner = Owner::new("xen:backend/vbd/7/51728").unwrap();
        assert_eq!(registry.get(&owner).unwrap(), None);
        let held = registry.lock(&owner).unwrap();
        held.delete().unwrap();
        held.put(&attachment(&owner)).unwrap();
        assert_eq!(registry.get(&owner).unwrap(), Some(attachment(&owner)));
        let clone = OwnClone {
            store: PathBuf::from("/srv/snapfs"),
            folder: PathBuf::from("/var/lib/snapfs/clones/00"),
            name: "web01-a.img".to_owned(),
            id: "00".to_owned(),
            path: PathBuf::from("/mnt/snapfs/.snapfs/clones/web01-a.img"),
            keep: true,
        };
        let newer = Attachment { writable: true, clone: Some(clone), binding: None, ..attachment(&owner) };
        held.put(&newer).unwrap();
        assert_eq!(held.get().unwrap(), Some(newer));
        assert_eq!(registry.owners().unwrap(), std::slice::from_ref(&owner));
        held.delete().unwrap();
        drop(held);
        assert_eq!(registry.get(&owner).unwrap(), None);
        assert_eq!(std::fs::read_dir(&registry.folder).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn an_owner_is_one_word_and_has_a_file_of_its_own() {
        for bad in ["", "a b", "a\n", "\u{e9}", &"x".repeat(81)] {
            assert_eq!(Owner::new(bad).unwrap_err().kind(), ErrorKind::Invalid, "{bad:?}");
        }
        let stems: Vec<String> =
            ["a/b", "a%2fb", "..", ".", "a:b", "a.b"].map(|text| Owner::new(text).unwrap().file_stem()).into();
        assert_eq!(stems, ["a%2fb", "a%252fb", "%2e%2e", "%2e", "a:b", "a%2eb"]);
        assert!(Owner::new(&"/".repeat(80)).unwrap().file_stem().len() < 250);
        assert_ne!(Owner::random().unwrap(), Owner::random().unwrap());
    }

    #[test]
    fn one_works_for_an_owner_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let registry = registry(&folder);
        let owner = Owner::new("x").unwrap();
        let at_work = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        let held = registry.lock(&owner).unwrap();
                        assert_eq!(at_work.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        at_work.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(held);
                    }
                });
            }
        });
        let held = registry.lock(&owner).unwrap();
        registry.lock(&Owner::new("y").unwrap()).unwrap();
        assert_eq!(registry.lock(&owner).map(drop).unwrap_err().kind(), ErrorKind::Busy);
        drop(held);
    }

    #[test]
    fn what_a_killed_process_leaves_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let registry = registry(&folder);
        let owner = Owner::new("x").unwrap();
        let held = registry.lock(&owner).unwrap();
        held.put(&attachment(&owner)).unwrap();
        let others = ["y.lock", "y.new", "z.lock", "u.new", "x.new"];
        for name in others {
            std::fs::write(registry.folder.join(name), "").unwrap();
        }
        registry.sweep().unwrap();
        let left = || {
            let rows = std::fs::read_dir(&registry.folder).unwrap();
            let mut names: Vec<_> = rows.map(|row| row.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(left(), ["x.json", "x.lock", "x.new"], "what is at work is left alone");
        drop(held);
        registry.sweep().unwrap();
        assert_eq!(left(), ["x.json"]);
        assert_eq!(registry.get(&owner).unwrap(), Some(attachment(&owner)));
    }

    #[test]
    fn a_damaged_record_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let registry = registry(&folder);
        let owner = Owner::new("x").unwrap();
        for text in ["", "{", "{}", r#"{"owner": ""}"#] {
            std::fs::write(registry.record_path(&owner), text).unwrap();
            let refused = registry.get(&owner).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Corrupt);
            assert!(refused.to_string().contains("x.json"), "{refused}");
        }
    }
}
