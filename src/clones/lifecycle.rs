//! Making and removing clones: the folder on this host and the hold in the store, together or not at all.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::clones::MapMemory;
use crate::clones::description::{Description, hex};
use crate::clones::folder::{ClonesFolder, LockedFolder, OpenClone, check_name};
use crate::clones::snapshot::{describe, hold, release};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::NAME_BYTES_MAX;
use crate::name::Reference;
use crate::store::Store;

/// A clone that was closed a moment ago is open for a moment more: the kernel tells the daemon later. Asked again after
/// [`BUSY_PAUSE`].
const BUSY_TRIES: u32 = 40;
/// The pause between.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// Names that are tried when none was asked for.
const NAMES_MAX: u32 = 10_000;

/// A clone that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// What it is a clone of.
    pub description: Description,
}

/// Makes a clone of a snapshot, held by the store from before it appears. Without a name it gets one that is free, made
/// of the snapshot's. `host` says where it is, for people. `note` is told what it will be before anything of it is
/// there, so that whoever is cut off can find it again.
///
/// Cost: three listings of the VM's log, one put, and a few small files.
///
/// # Errors
/// Those of `note`; `NotFound`, `Invalid` for a draft or a name that is none, `Exists`, `Stale` when the snapshot was
/// forgotten meanwhile, `NoSpace`, `ReadOnly`, `Denied`, `Corrupt`, `Unavailable`.
pub fn make(
    store: &Store,
    folder: &ClonesFolder,
    reference: &Reference,
    name: Option<&str>,
    host: &str,
    note: impl FnOnce(&str, &Description) -> Result<()>,
) -> Result<Made> {
    name.map_or(Ok(()), check_name)?;
    let description = describe(store, reference)?;
    let locked = folder.lock()?;
    locked.litter(|litter| release(store, litter))?;
    let name = match name {
        Some(name) => name.to_owned(),
        None => free_name(folder, &description.snapshot)?,
    };
    note(&name, &description)?;
    let place = format!("{host}:{}/{name}", folder.path().display());
    let made = locked.create(&name, description, |description| hold(store, description, &place));
    match made {
        Ok((folder, description)) => Ok(Made { name, folder, description }),
        Err(e) => {
            if let Err(litter) = locked.litter(|litter| release(store, litter)) {
                log::warn!("{litter}");
            }
            Err(e)
        }
    }
}

/// `web01/xvda/monday.img` becomes `web01-xvda-monday.img`, with a number if that is taken.
fn free_name(folder: &ClonesFolder, snapshot: &str) -> Result<String> {
    let plain = snapshot.replace('/', "-");
    let plain = plain.trim_start_matches('.');
    for number in 1..NAMES_MAX {
        let end = if number == 1 { String::new() } else { format!("-{number}") };
        let mut cut = NAME_BYTES_MAX.saturating_sub(end.len()).min(plain.len());
        while !plain.is_char_boundary(cut) {
            cut -= 1;
        }
        let name = format!("{}{end}", plain.get(..cut).unwrap_or_default());
        if std::fs::symlink_metadata(folder.path().join(&name)).is_err() {
            return Ok(name);
        }
    }
    Err(Error::new(ErrorKind::Exists, format!("clones of {snapshot}: give this one a name")))
}

/// Removes a clone, what was written to it, and its hold. It waits a moment for a clone that is just being closed.
///
/// # Errors
/// `NotFound`, `Busy` while it is open, `ReadOnly`, `Denied`, `Unavailable`.
pub fn remove(store: &Store, folder: &ClonesFolder, name: &str) -> Result<()> {
    check_name(name)?;
    // Not to make a folder only to find it empty.
    folder.find(name).map(drop).or_else(|e| if e.kind() == ErrorKind::NotFound { Err(e) } else { Ok(()) })?;
    let locked = folder.lock()?;
    locked.litter(|litter| release(store, litter))?;
    remove_locked(store, &locked, name)
}

/// Removes the clone of this name if it is the one of this identity, and what was left of it by whoever was cut off.
/// Done when there is nothing.
///
/// # Errors
/// `Corrupt` when it cannot be told which clone it is; else as [`remove`].
pub fn remove_this(store: &Store, folder: &ClonesFolder, name: &str, id: &str) -> Result<()> {
    check_name(name)?;
    // Not to make a folder only to find it empty.
    if std::fs::symlink_metadata(folder.path()).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        return Ok(());
    }
    let locked = folder.lock()?;
    locked.litter(|litter| release(store, litter))?;
    match folder.find(name) {
        Ok(found) if hex(&found.description.clone.0) == id => remove_locked(store, &locked, name),
        // Somebody else's.
        Ok(_) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

fn remove_locked(store: &Store, locked: &LockedFolder<'_>, name: &str) -> Result<()> {
    when_idle(|| {
        locked.remove(name, |description| match description {
            Some(description) => release(store, description),
            None => {
                log::warn!("clone {name:?} is damaged: what it held of the store stays held");
                Ok(())
            }
        })
    })
}

/// Opens a clone that nobody writes; nobody can while it is open. It waits a moment for one that is just being closed.
///
/// # Errors
/// `Busy` while it is being written; as [`ClonesFolder::open`].
pub fn open_idle(store: &Store, folder: &ClonesFolder, name: &str) -> Result<OpenClone> {
    let memory = Arc::new(MapMemory::new(store.shares().map_bytes));
    when_idle(|| folder.open(name, &memory))
}

fn when_idle<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..BUSY_TRIES {
        match attempt() {
            Err(e) if e.kind() == ErrorKind::Busy => std::thread::sleep(BUSY_PAUSE),
            outcome => return outcome,
        }
    }
    attempt()
}
