//! The clone that is made for an attachment and goes with it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cli::attach::target::{LIMIT, Target};
use crate::cli::attach::tool::bounded;
use crate::cli::clone::make_in_mount;
use crate::cli::clone_place::mount_at;
use crate::clock::SystemClock;
use crate::clones::description::hex;
use crate::clones::folder::ClonesFolder;
use crate::clones::lifecycle::remove_this;
use crate::error::{Result, invalid};
use crate::name::{Reference, SnapshotName};
use crate::store::{MemoryShares, Store};

/// A clone, with all that is needed to find it again when the mount and the daemon are gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnClone {
    /// The store.
    pub store: PathBuf,
    /// The folder of the store's clones on this host.
    pub folder: PathBuf,
    /// Its name.
    pub name: String,
    /// Its identity: another clone of this name is none of ours.
    pub id: String,
    /// Its file in the mount.
    pub path: PathBuf,
    /// Whether it stays when the attachment goes.
    pub keep: bool,
}

impl OwnClone {
    /// Makes a clone of a snapshot that a mount shows, for the mount to show. `note` is told before anything of it is
    /// there.
    ///
    /// # Errors
    /// Those of `note`; as [`make_in_mount`]; `Unavailable` when the mount does not answer.
    pub fn make(
        target: &Target,
        snapshot: &SnapshotName,
        keep: bool,
        note: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<Self> {
        let top = target.top.clone().ok_or_else(|| {
            invalid(format!("{snapshot}: only a part of its store is mounted here, where no clone can be"))
        })?;
        let store = open(&target.store)?;
        let (identity, read_only) = (store.config().store.clone(), target.read_only);
        let mount =
            bounded("mount", LIMIT, move || mount_at(&top, read_only, &identity)).map_err(|e| e.within(snapshot))?;
        let reference = Reference::from(snapshot.clone());
        let mut own = None;
        make_in_mount(&store, &mount, &reference, None, |name, description| {
            let clone = Self {
                store: target.store.clone(),
                folder: mount.clones.clone(),
                name: name.to_owned(),
                id: hex(&description.clone.0),
                path: mount.path_of(name),
                keep,
            };
            note(&clone)?;
            own = Some(clone);
            Ok(())
        })?;
        own.ok_or_else(|| invalid("the clone has no name"))
    }

    /// Removes the clone with all that was written to it, and what is left of it when its making was cut off. Done when
    /// there is nothing. It needs no mount.
    ///
    /// # Errors
    /// As [`remove_this`].
    pub fn remove(&self) -> Result<()> {
        let store = open(&self.store)?;
        remove_this(&store, &ClonesFolder::at(self.folder.clone()), &self.name, &self.id)
    }

    /// Whether it is there, as a whole or damaged.
    pub fn is_there(&self) -> bool {
        let found = ClonesFolder::at(self.folder.clone()).find(&self.name);
        found.map_or_else(
            |e| e.kind() != crate::error::ErrorKind::NotFound,
            |found| hex(&found.description.clone.0) == self.id,
        )
    }
}

fn open(store: &Path) -> Result<Store> {
    Store::open(store, Arc::new(SystemClock::new()), MemoryShares::default())
}
