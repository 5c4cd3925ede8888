//! `snapfs clone`: a writable image that begins as a snapshot.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::cli::clone_place::{LiveMount, live_mounts};
use crate::cli::output;
use crate::cli::store_arg::{StoreArg, reference};
use crate::cli::{DONE, Outcome};
use crate::clones::description::Description;
use crate::clones::folder::ClonesFolder;
use crate::clones::lifecycle::{Made, make};
use crate::error::{Error, ErrorKind, Result, not_found};
use crate::name::Reference;
use crate::store::Store;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs clone /srv/snapfs web01/monday.img
  snapfs clone /srv/snapfs web01/latest web01-test
  qemu-system-x86_64 -drive file=$(snapfs clone /srv/snapfs web01/latest),format=raw,cache=none

The store must be mounted on this host: the path of a file in the mount is printed. What is written to it is kept on
this host; the snapshot never changes.";

/// Arguments of `clone`.
#[derive(Debug, clap::Args)]
pub struct Clone {
    #[command(flatten)]
    store: StoreArg,

    /// The snapshot: VM/NAME or VM/DISK/NAME; NAME latest is the newest
    #[arg(value_name = "SNAPSHOT")]
    snapshot: OsString,

    /// Name of the clone [default: made of the snapshot's]
    #[arg(value_name = "NAME")]
    name: Option<String>,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Report<'a> {
    name: &'a str,
    path: PathBuf,
    snapshot: &'a str,
    size: u64,
    read_only: bool,
}

impl Clone {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`make_in_mount`].
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let reference = reference(&self.snapshot)?;
        let mounts = live_mounts(&store, &self.store.store)?;
        let mount = mounts.first().ok_or_else(|| {
            not_found(format!("store {} is not mounted here: a clone is a file in a mount", self.store.store.display()))
        })?;
        let made = make_in_mount(&store, mount, &reference, self.name.as_deref(), |_, _| Ok(()))?;
        let path = mount.path_of(&made.name);
        // The last word has the mount.
        std::fs::symlink_metadata(&path).map_err(|e| Error::io(path.display().to_string(), e))?;
        if self.json {
            let (snapshot, size) = (made.description.snapshot.as_str(), made.description.image_bytes);
            output::json(&Report { name: &made.name, path, snapshot, size, read_only: mount.read_only })?;
        } else {
            output::line(path.display().to_string())?;
        }
        if mount.read_only {
            let shown = mount.mountpoint.display();
            let how =
                "`snapfs attach PATH --write` makes a device, and a bind mount of .snapfs/clones can be remounted rw";
            log::warn!("{shown} is mounted with ro: to write to it, {how}");
        }
        Ok(DONE)
    }
}

/// Makes a clone for a mount to show; whether it does is left to be asked. `note` is told of it before, as by [`make`].
///
/// # Errors
/// `ReadOnly` when nothing can be written in the mount in any way; as [`make`].
pub fn make_in_mount(
    store: &Store,
    mount: &LiveMount,
    reference: &Reference,
    name: Option<&str>,
    note: impl FnOnce(&str, &Description) -> Result<()>,
) -> Result<Made> {
    if mount.read_only && !rustix::process::geteuid().is_root() {
        let what = "is mounted with ro, so that clones cannot be written there: mount the store without it";
        return Err(Error::new(ErrorKind::ReadOnly, format!("{}: {what}", mount.mountpoint.display())));
    }
    let folder = ClonesFolder::at(mount.clones.clone());
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    make(store, &folder, reference, name, &host, note)
}
