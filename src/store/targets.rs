//! The targets of a store: how they are named, made, recognised and opened.
//!
//! A target is a folder with a `target.toml` that says whose it is. A folder without it, such as the mountpoint of a disk
//! that is not mounted, is no target, and nothing is written there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::local::Local;
use crate::backend::placement::{Copies, TargetId};
use crate::backend::replicate::{Layout, Replicated};
use crate::backend::target::Target;
use crate::backend::{Backend, Key};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result, corrupt, invalid, not_found, unsupported};
use crate::fingerprint::short;
use crate::limits::TARGETS_MAX;
use crate::random::fill_random;
use crate::store::Store;
use crate::store::config::{self, ConfigRecord, Replicas, StoreConfig, TargetRow, hex};

/// The file that makes a folder a target.
pub const TARGET_FILE: &str = "target.toml";

/// The same, of a target that is being filled again after it was lost: it counts only for who fills it.
pub const REFILL_FILE: &str = "target.refill";

/// A page of text.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What is asked for when a store is made.
#[derive(Debug, Clone, Default)]
pub struct NewTargets {
    /// Where the targets are to be. None: the store's own folder holds all.
    pub paths: Vec<PathBuf>,
    /// Copies of a VM's objects; two by default, if there are as many targets.
    pub vm_replicas: Option<u16>,
    /// Copies of common packs; three by default, if there are as many targets.
    pub common_replicas: Option<u16>,
    /// How many copies count; by default more than half.
    pub quorum: Option<u16>,
}

impl NewTargets {
    /// How many copies there will be, checked against the number of targets.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn replicas(&self) -> Result<Replicas> {
        let count = u16::try_from(self.paths.len().max(1)).unwrap_or(u16::MAX);
        let replicas = Replicas {
            vm: self.vm_replicas.unwrap_or(count.min(2)),
            common: self.common_replicas.unwrap_or(count.min(3)),
            quorum: self.quorum.unwrap_or(0),
        };
        check_replicas(replicas, usize::from(count))?;
        if self.paths.len() > TARGETS_MAX {
            return Err(invalid(format!("{} targets, at most {TARGETS_MAX} are possible", self.paths.len())));
        }
        Ok(replicas)
    }
}

/// Refuses what so many targets cannot hold.
///
/// # Errors
/// `Invalid`.
pub fn check_replicas(replicas: Replicas, targets: usize) -> Result<()> {
    for (name, count) in [("vm", replicas.vm), ("common", replicas.common)] {
        if count == 0 || usize::from(count) > targets {
            return Err(invalid(format!("{name} replicas: {count}, with {targets} targets it is from 1 to {targets}")));
        }
    }
    if replicas.quorum > replicas.vm {
        return Err(invalid(format!(
            "quorum: {}, with {} VM replicas it is at most that",
            replicas.quorum, replicas.vm
        )));
    }
    Ok(())
}

/// The folder that a target's URL means: a path, or `file:///PATH`.
///
/// # Errors
/// `Invalid`; `Unsupported` for other schemes.
pub fn parse_url(url: &str) -> Result<PathBuf> {
    let wrong = |what: &str| invalid(format!("target {url:?}: {what}"));
    let path = match url.split_once("://") {
        None => PathBuf::from(url),
        Some(("file", path)) if path.starts_with('/') => PathBuf::from(decoded(path).ok_or_else(|| wrong("bad %"))?),
        Some(("file", _)) => return Err(wrong("is not of the form file:///PATH")),
        Some((scheme, _)) => {
            return Err(unsupported(format!("target {url:?}: targets of {scheme}: are not known here")));
        }
    };
    if path.as_os_str().is_empty() {
        return Err(wrong("has no path"));
    }
    // Processes with other working folders open it, too.
    let path = std::path::absolute(&path).map_err(|e| Error::io(format!("target {url:?}"), e))?;
    match path.to_str() {
        Some(_) => Ok(path),
        None => Err(wrong("is not UTF-8")),
    }
}

/// A path of a URL with its `%XX`.
fn decoded(path: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = tail.get(2..)?;
    }
    String::from_utf8(bytes).ok()
}

/// What `target.toml` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetFile {
    /// The store's identity.
    pub store: String,
    /// The target's: 32 hexadecimal digits.
    pub target: String,
    /// BLAKE3 of the fields above, 32 hexadecimal digits.
    pub checksum: String,
}

impl TargetFile {
    /// The file of a target.
    pub fn new(store: &str, id: TargetId) -> Self {
        let mut file = Self { store: store.to_owned(), target: hex(&id.0), checksum: String::new() };
        file.checksum = file.checksum_of();
        file
    }

    fn checksum_of(&self) -> String {
        hex(&short(b"target.toml", &[self.store.as_bytes(), self.target.as_bytes()]))
    }

    /// Its text.
    ///
    /// # Errors
    /// `Corrupt`, which cannot be.
    pub fn to_text(&self) -> Result<String> {
        let text = toml::to_string(self).map_err(|e| corrupt(TARGET_FILE).because(e))?;
        Ok(format!("# A target of a snapfs store. Written once by snapfs; do not edit.\n{text}"))
    }

    /// Reads the text.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(bytes).map_err(|e| corrupt("is no text").because(e))?;
        let file: Self = toml::from_str(text).map_err(|e| corrupt(e.message().replace('\n', " ")))?;
        if file.checksum == file.checksum_of() { Ok(file) } else { Err(corrupt("checksum does not match")) }
    }
}

/// A number of the file system that holds a folder; 0 when it has none.
pub fn medium_of(path: &Path) -> u64 {
    rustix::fs::statvfs(path).map_or(0, |stat| stat.f_fsid)
}

/// A new target, not written yet.
///
/// # Errors
/// `Unavailable`.
pub fn new_row(path: &Path) -> Result<TargetRow> {
    let mut id = [0; 16];
    fill_random(&mut id)?;
    let text = path.to_str().ok_or_else(|| invalid("a target's path is not UTF-8"))?;
    Ok(TargetRow { id, path: text.to_owned(), medium: medium_of(path), leaving: false })
}

/// Makes targets of folders that are empty or not there yet. All are looked at before any is written to.
///
/// # Errors
/// `Exists`, `Invalid` for one that is named twice, `Denied`, `ReadOnly`, `NoSpace`.
pub fn make_targets(store: &str, paths: &[PathBuf]) -> Result<Vec<TargetRow>> {
    for (at, path) in paths.iter().enumerate() {
        if paths.iter().take(at).any(|other| other == path) {
            return Err(invalid(format!("target {} is named twice", path.display())));
        }
    }
    for path in paths {
        config::make_folder(path).map_err(|e| e.within("target"))?;
    }
    let mut rows = Vec::with_capacity(paths.len());
    for path in paths {
        let row = new_row(path)?;
        write_identity(&Local::open(path)?, store, TargetId(row.id), TARGET_FILE)?;
        rows.push(row);
    }
    Ok(rows)
}

/// Makes a folder a target.
///
/// # Errors
/// As [`Backend::put_new`].
pub fn write_identity(backend: &dyn Backend, store: &str, id: TargetId, name: &str) -> Result<()> {
    backend.put_new(&Key::new(name), TargetFile::new(store, id).to_text()?.as_bytes())
}

/// The identity of a target by one of its two files; `None` without it.
///
/// # Errors
/// `Corrupt`, `Unavailable`.
pub fn identity_of(backend: &dyn Backend, name: &str) -> Result<Option<TargetFile>> {
    match backend.read_all(&Key::new(name), FILE_BYTES_MAX) {
        Ok(bytes) => TargetFile::parse(&bytes).map(Some).map_err(|e| e.within(name)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Opens the folder of a target, if it is the one that is meant.
///
/// # Errors
/// `NotFound` when the folder is not there or is no target; `Invalid` when it is another one.
fn open_target(path: &Path, store: &str, id: TargetId) -> Result<Arc<dyn Backend>> {
    let backend = Local::open(path)?;
    match identity_of(&backend, TARGET_FILE)? {
        Some(file) if file.store == store && file.target == hex(&id.0) => Ok(Arc::new(backend)),
        Some(file) => Err(invalid(format!("is target {} of store {}, another one is meant", file.target, file.store))),
        None => Err(not_found(format!("there is no {TARGET_FILE}: its medium is not mounted, or it is lost"))),
    }
}

/// The target of a row. The home stands in for one that it is, so that a store that was moved is found.
pub fn target_of(row: &TargetRow, store: &str, home: &Path, clock: &Arc<dyn Clock>) -> Target {
    let (path, store, home) = (PathBuf::from(&row.path), store.to_owned(), home.to_owned());
    let id = TargetId(row.id);
    let opener = move || match open_target(&path, &store, id) {
        Err(e) if home != path => open_target(&home, &store, id).map_err(|_| e),
        done => done,
    };
    Target::new(id, row.path.clone(), clock.clone(), Box::new(opener))
}

/// The layout that a record describes. Targets that `known` has are taken over.
pub fn layout_of(
    number: u32,
    record: &ConfigRecord,
    home: &Target,
    make: &dyn Fn(&TargetRow) -> Target,
    known: Option<&Layout>,
) -> Layout {
    let old: BTreeMap<TargetId, &Target> =
        known.iter().flat_map(|layout| &layout.targets).map(|(target, _)| (target.id(), target)).collect();
    let target = |row: &TargetRow| match old.get(&TargetId(row.id)) {
        Some(target) if target.name() == row.path => (*target).clone(),
        _ => make(row),
    };
    let replicas = record.replicas;
    Layout {
        generation: number,
        home: home.clone(),
        targets: record.targets.iter().map(|row| (target(row), row.leaving)).collect(),
        copies: Copies {
            vm: usize::from(replicas.vm),
            common: usize::from(replicas.common),
            quorum: usize::from(replicas.quorum),
        },
        is_moving: record.moving,
    }
}

/// Opens a store over several targets, whose configuration begins in the folder `root`.
///
/// # Errors
/// As [`config::newest_record`].
pub fn open_replicated(
    root: &Path,
    home: Arc<dyn Backend>,
    config: &StoreConfig,
    clock: &Arc<dyn Clock>,
) -> Result<Replicated> {
    let own = identity_of(&*home, TARGET_FILE).ok().flatten().filter(|file| file.store == config.store);
    let home_id = own.and_then(|file| id_from_hex(&file.target)).unwrap_or(TargetId([0; 16]));
    let name = root.display().to_string();
    let opened = home.clone();
    let home_target = Target::new(home_id, name, clock.clone(), Box::new(move || Ok(opened.clone())));
    let (store, path, time) = (config.store.clone(), root.to_owned(), clock.clone());
    let make = move |row: &TargetRow| target_of(row, &store, &path, &time);
    let (number, record) = newest_readable(&*home, config)?;
    let first = layout_of(number, &record, &home_target, &make, None);
    // The targets may know of a later record than the folder where the configuration begins.
    let replicated = Replicated::new(first, None);
    let (newest, record) = config::newest_record(&replicated, config)?;
    let layout = layout_of(newest, &record, &home_target, &make, Some(&replicated.layout()));
    let config = config.clone();
    let reload = move |known: &Layout| {
        // All of them are asked: any may have it first.
        let (newest, record) = config::newest_record(&Replicated::new(known.clone(), None), &config)?;
        let is_newer = newest > known.generation;
        Ok(is_newer.then(|| layout_of(newest, &record, &home_target, &make, Some(known))))
    };
    Ok(Replicated::new(layout, Some(Box::new(reload))))
}

/// The identity that 32 hexadecimal digits spell.
pub fn id_from_hex(text: &str) -> Option<TargetId> {
    let mut id = [0; 16];
    let digits = text.as_bytes();
    if digits.len() != 32 {
        return None;
    }
    for (byte, pair) in id.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(TargetId(id))
}

/// A target that lost everything and is filled again.
///
/// Only a folder that is empty, on the file system that the target was made on, is taken for it: the mountpoint of a
/// disk that is not mounted is on another one. Until it is full nobody else takes it for a target.
pub struct Refill {
    id: TargetId,
    backend: Arc<dyn Backend>,
}

impl Refill {
    /// Takes up all targets that lost everything: from now on they are among the targets of this process.
    ///
    /// # Errors
    /// As [`config::newest_record`].
    pub fn begin(store: &Store, replicated: &Replicated) -> Result<Vec<Self>> {
        let (_, record) = config::newest_record(replicated, store.config())?;
        let mut layout = (*replicated.layout()).clone();
        let mut refills = Vec::new();
        for (target, _) in layout.targets.iter_mut().filter(|(_, leaving)| !leaving) {
            let Some(row) = record.targets.iter().find(|row| TargetId(row.id) == target.id()) else { continue };
            if target.is_there() {
                continue;
            }
            match Self::take_up(row, &store.config().store) {
                Ok(refill) => {
                    log::warn!("target {}: is empty, and is filled again", row.path);
                    let backend = refill.backend.clone();
                    let opener = Box::new(move || Ok(backend.clone()));
                    *target = Target::new(target.id(), row.path.clone(), store.clock().clone(), opener);
                    refills.push(refill);
                }
                Err(e) => log::warn!("target {}: is not filled again: {e}", row.path),
            }
        }
        replicated.set_layout(layout);
        Ok(refills)
    }

    /// The target.
    pub fn id(&self) -> TargetId {
        self.id
    }

    fn take_up(row: &TargetRow, store: &str) -> Result<Self> {
        let path = Path::new(&row.path);
        let id = TargetId(row.id);
        let local = Local::open(path)?;
        if medium_of(path) != row.medium {
            return Err(invalid("is on another file system than the target was: mount its disk, or remove the target"));
        }
        let begun = identity_of(&local, REFILL_FILE)?;
        match begun {
            Some(file) if file.store == store && file.target == hex(&id.0) => {}
            Some(_) => return Err(invalid("another target is being filled there")),
            None => {
                config::make_folder(path)?;
                write_identity(&local, store, id, REFILL_FILE)?;
            }
        }
        Ok(Self { id, backend: Arc::new(local) })
    }

    /// It is full: everybody may take it for the target again. Whether that could be written down.
    pub fn finish(&self, store: &Store, replicated: &Replicated) -> bool {
        let done = write_identity(&*self.backend, &store.config().store, self.id, TARGET_FILE)
            .and_then(|()| self.backend.delete(&Key::new(REFILL_FILE)));
        self.backend.keep_reserve();
        if let Err(e) = &done {
            let layout = replicated.layout();
            let name = layout.targets.iter().find(|(t, _)| t.id() == self.id).map_or("?", |(t, _)| t.name());
            log::warn!("target {name}: is full, but not told so: {e}");
        }
        done.is_ok()
    }
}

/// Whether any record tells of targets.
pub fn are_told(home: &dyn Backend, config: &StoreConfig) -> bool {
    newest_readable(home, config).is_ok()
}

/// The newest record that can be read, to find the targets, which have all of them.
fn newest_readable(home: &dyn Backend, config: &StoreConfig) -> Result<(u32, ConfigRecord)> {
    let newest = config::newest_record(home, config);
    let Err(error) = newest else { return newest };
    let mut numbers = config::record_numbers(home)?;
    while let Some(number) = numbers.pop() {
        if let Ok(record) = config::read_record(home, config, number)
            && !record.targets.is_empty()
        {
            log::warn!("{error}; record {number} tells the targets");
            return Ok((number, record));
        }
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_a_path_or_a_file_url() {
        for (url, path) in
            [("/srv/a", "/srv/a"), ("file:///srv/a", "/srv/a"), ("file:///srv/a%20b", "/srv/a b"), ("/a/./b", "/a/b")]
        {
            assert_eq!(parse_url(url).unwrap(), Path::new(path), "{url}");
        }
        assert!(parse_url("here").unwrap().is_absolute());
        for url in ["", "file://srv/a", "file:///a%2", "file:///a%zz", "file:///a%ff"] {
            assert_eq!(parse_url(url).unwrap_err().kind(), ErrorKind::Invalid, "{url}");
        }
        assert_eq!(parse_url("s3://bucket/prefix").unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn an_identity_comes_back_and_a_changed_one_is_refused() {
        let file = TargetFile::new("00112233445566778899aabbccddeeff", TargetId([7; 16]));
        let text = file.to_text().unwrap();
        assert_eq!(TargetFile::parse(text.as_bytes()).unwrap(), file);
        assert_eq!(id_from_hex(&file.target), Some(TargetId([7; 16])));
        let other = text.replace("0707", "0708");
        assert_eq!(TargetFile::parse(other.as_bytes()).unwrap_err().kind(), ErrorKind::Corrupt);
        assert!(TargetFile::parse(b"store = 1").is_err());
    }

    #[test]
    fn more_copies_than_targets_are_refused() {
        let ask = |targets: usize, vm: Option<u16>, quorum: Option<u16>| {
            let paths = (0..targets).map(|n| PathBuf::from(format!("/{n}"))).collect();
            NewTargets { paths, vm_replicas: vm, common_replicas: None, quorum }.replicas()
        };
        assert_eq!(ask(4, None, None).unwrap(), Replicas { vm: 2, common: 3, quorum: 0 });
        assert_eq!(ask(0, None, None).unwrap(), Replicas { vm: 1, common: 1, quorum: 0 });
        assert!(ask(2, Some(3), None).is_err() && ask(2, Some(0), None).is_err() && ask(3, Some(2), Some(3)).is_err());
        assert!(ask(0, Some(2), None).is_err());
    }
}
