//! `snapfs commit`: a writable clone becomes a new sealed snapshot.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use crate::cli::Outcome;
use crate::cli::backup::tell;
use crate::cli::clone_place::folder_of;
use crate::cli::output::Progress;
use crate::cli::store_arg::{StoreArg, snapshot_name};
use crate::clones::lifecycle::open_idle;
use crate::clones::snapshot::open_base;
use crate::ingest::backup::BackupProgress;
use crate::ingest::clone::commit_clone;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs commit /srv/snapfs web01-test web01/after-test.img

The clone must not be open for writing. Only what was written to it is read. It stays as it is: to remove it, there is
snapfs unclone.";

/// Arguments of `commit`.
#[derive(Debug, clap::Args)]
pub struct Commit {
    #[command(flatten)]
    store: StoreArg,

    /// The clone
    #[arg(value_name = "CLONE")]
    clone: String,

    /// Name of the new snapshot: VM/NAME, or VM/DISK/NAME
    #[arg(value_name = "SNAPSHOT")]
    snapshot: OsString,

    /// The folder of clones that a mount was given with -o clones=DIR
    #[arg(long, value_name = "DIR")]
    clones: Option<PathBuf>,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

impl Commit {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`commit_clone`].
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let name = snapshot_name(&self.snapshot)?;
        let folder = folder_of(&store, &self.store.store, self.clones.as_deref(), &self.clone)?;
        let clone = open_idle(&store, &folder, &self.clone)?;
        let image = open_base(&store, clone.description()).map_err(|e| e.within(format!("clone {:?}", self.clone)))?;
        let image = Arc::new(image);
        let bar = Progress::new("commit", Some(image.bytes()), self.json);
        let report =
            commit_clone(&store, clone, &image, image.clone(), &name, &|p: BackupProgress| bar.set(p.bytes_done))?;
        drop(bar);
        tell(&report, self.json)
    }
}
