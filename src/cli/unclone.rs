//! `snapfs unclone`: a writable clone goes, with all that was written to it.

use std::path::PathBuf;

use crate::cli::clone_place::folder_of;
use crate::cli::store_arg::StoreArg;
use crate::cli::{DONE, Outcome};
use crate::clones::lifecycle::remove;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs unclone /srv/snapfs web01-test";

/// Arguments of `unclone`.
#[derive(Debug, clap::Args)]
pub struct Unclone {
    #[command(flatten)]
    store: StoreArg,

    /// The clone
    #[arg(value_name = "NAME")]
    name: String,

    /// The folder of clones that a mount was given with -o clones=DIR
    #[arg(long, value_name = "DIR")]
    clones: Option<PathBuf>,
}

impl Unclone {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`remove`].
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let folder = folder_of(&store, &self.store.store, self.clones.as_deref(), &self.name)?;
        remove(&store, &folder, &self.name)?;
        Ok(DONE)
    }
}
