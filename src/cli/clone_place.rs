//! Where the clones of a store are on this host: the folder that they lie in, and the mounts that show them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::cli::host_config::HostConfig;
use crate::cli::mountinfo::{self, SNAPFS_TYPE};
use crate::cli::umount::is_dead;
use crate::clones::folder::ClonesFolder;
use crate::error::{Error, ErrorKind, Result, invalid, not_found};
use crate::store::Store;

/// Below the mountpoint, the folder of clones.
const CLONES_PATH: &str = ".snapfs/clones";

/// Below the mountpoint, what the daemon tells of itself.
const STATUS_PATH: &str = ".snapfs/status";

/// The status is a line of text.
const STATUS_BYTES_MAX: u64 = 1 << 20;

/// Where root's clones lie if nothing else is said.
const ROOTS_FOLDER: &str = "/var/lib/snapfs/clones";

/// The folder of all clones of this host and user: the option, else the host's configuration, else
/// `/var/lib/snapfs/clones` for root and `snapfs/clones` in the user's folder of state for others.
///
/// # Errors
/// `Invalid` when the configuration is wrong, or a user has no home; `Denied`, `Unavailable`.
pub fn clones_root(option: Option<&Path>) -> Result<PathBuf> {
    if let Some(folder) = option {
        return std::path::absolute(folder).map_err(|e| Error::io(folder.display().to_string(), e));
    }
    if let Some(folder) = HostConfig::read()?.clones {
        return Ok(folder);
    }
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from(ROOTS_FOLDER));
    }
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")));
    let state = state.ok_or_else(|| {
        Error::new(ErrorKind::Invalid, "neither XDG_STATE_HOME nor HOME says where clones may lie: -o clones=DIR")
    })?;
    Ok(state.join("snapfs/clones"))
}

/// A mount of a store that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveMount {
    /// Where.
    pub mountpoint: PathBuf,
    /// Whether it was mounted with `ro`.
    pub read_only: bool,
    /// The folder of the store's clones, as the daemon has it.
    pub clones: PathBuf,
}

impl LiveMount {
    /// The path of a clone in it.
    pub fn path_of(&self, clone: &str) -> PathBuf {
        self.mountpoint.join(CLONES_PATH).join(clone)
    }
}

/// The mounts of a store on this host that answer us, those that can be written first.
///
/// # Errors
/// `Unavailable` without a mount table.
pub fn live_mounts(store: &Store, path: &Path) -> Result<Vec<LiveMount>> {
    let path = path.canonicalize().map_err(|e| Error::io(format!("store {}", path.display()), e))?;
    let rows = mountinfo::read()?;
    let mut mounts = Vec::new();
    for row in rows.iter().filter(|row| row.kind == SNAPFS_TYPE && row.root == Path::new("/")) {
        let is_seen = mountinfo::top(&rows, &row.mountpoint).is_some_and(|top| top.id == row.id);
        if row.source != path.as_os_str() || !is_seen || is_dead(&row.mountpoint) {
            continue;
        }
        match clones_of(&row.mountpoint, &store.config().store) {
            Ok(Some(clones)) => {
                mounts.push(LiveMount { mountpoint: row.mountpoint.clone(), read_only: row.read_only, clones });
            }
            Ok(None) => {}
            Err(e) => log::debug!("{}: {e}", row.mountpoint.display()),
        }
    }
    mounts.sort_by_key(|mount| mount.read_only);
    Ok(mounts)
}

/// The mount at `mountpoint`, as its daemon describes it. It waits for the daemon as long as that takes.
///
/// # Errors
/// `Invalid` when it is one of another store, or has no clones; `Unavailable`.
pub fn mount_at(mountpoint: &Path, read_only: bool, store: &str) -> Result<LiveMount> {
    let clones = clones_of(mountpoint, store).map_err(|e| e.within(mountpoint.display()))?;
    let clones = clones.ok_or_else(|| invalid(format!("{}: has no clones of this store", mountpoint.display())))?;
    Ok(LiveMount { mountpoint: mountpoint.to_owned(), read_only, clones })
}

/// What the daemon of a mount says about its clones; `None` when it is one of another store.
fn clones_of(mountpoint: &Path, store: &str) -> Result<Option<PathBuf>> {
    let about = |e| Error::io(STATUS_PATH, e);
    let mut text = Vec::new();
    let file = File::open(mountpoint.join(STATUS_PATH)).map_err(about)?;
    file.take(STATUS_BYTES_MAX).read_to_end(&mut text).map_err(about)?;
    Ok(clones_in(&text, store))
}

fn clones_in(status: &[u8], store: &str) -> Option<PathBuf> {
    let status: serde_json::Value = serde_json::from_slice(status).ok()?;
    let is_it = status.get("store")?.as_str()? == store;
    let clones = PathBuf::from(status.get("clones")?.as_str()?);
    (is_it && clones.is_absolute()).then_some(clones)
}

/// The folders that clones of a store may lie in: the one of the option, else those of its mounts and that of the
/// host's configuration.
///
/// # Errors
/// As [`clones_root`] and [`live_mounts`].
pub fn folders(store: &Store, path: &Path, option: Option<&Path>) -> Result<Vec<ClonesFolder>> {
    let mut found = Vec::new();
    if option.is_none() {
        found.extend(live_mounts(store, path)?.into_iter().map(|mount| ClonesFolder::at(mount.clones)));
    }
    found.push(ClonesFolder::new(&clones_root(option)?, &store.config().store));
    let mut folders: Vec<ClonesFolder> = Vec::new();
    for folder in found {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    Ok(folders)
}

/// The folder that has a clone of this name, damaged or not.
///
/// # Errors
/// `NotFound`; as [`folders`].
pub fn folder_of(store: &Store, path: &Path, option: Option<&Path>, name: &str) -> Result<ClonesFolder> {
    for folder in folders(store, path, option)? {
        match folder.find(name) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) if matches!(e.kind(), ErrorKind::Invalid | ErrorKind::TooLong) => return Err(e),
            _ => return Ok(folder),
        }
    }
    Err(not_found(format!("clone {name:?} is not there")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_read_from_the_status() {
        let status = br#"{"pid": 1, "store": "00ff", "clones": "/var/lib/c/00ff"}"#;
        assert_eq!(clones_in(status, "00ff"), Some(PathBuf::from("/var/lib/c/00ff")));
        assert_eq!(clones_in(status, "0000"), None, "another store");
        for text in
            [&b"{}"[..], b"[]", b"", br#"{"store": "00ff", "clones": null}"#, br#"{"store": 1, "clones": "/x"}"#]
        {
            assert_eq!(clones_in(text, "00ff"), None);
        }
    }

    #[test]
    fn an_option_counts_first() {
        assert_eq!(clones_root(Some(Path::new("/x/y"))).unwrap(), Path::new("/x/y"));
        assert!(clones_root(Some(Path::new("y"))).unwrap().is_absolute());
    }
}
