//! `snapfs init`: makes a store.

use std::path::Path;

use crate::cli::store_arg::StoreArg;
use crate::cli::{DONE, Outcome, output};
use crate::clock::SystemClock;
use crate::store::Store;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs init /srv/snapfs";

/// Arguments of `init`.
#[derive(Debug, clap::Args)]
pub struct Init {
    #[command(flatten)]
    store: StoreArg,
}

impl Init {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`Store::init`].
    pub fn run(&self) -> Outcome {
        let path: &Path = &self.store.store;
        Store::init(path, &SystemClock::new())?;
        output::line(format!("made a store in {}", path.display()))?;
        Ok(DONE)
    }
}
