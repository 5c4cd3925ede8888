//! `snapfs protect` and `snapfs unprotect`: snapshots that nothing forgets.

use std::ffi::OsString;

use crate::cli::store_arg::{StoreArg, reference};
use crate::cli::{DONE, Outcome, Stop, output};
use crate::collect::protect::protect;

/// Shown by `--help` of `protect`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs protect /srv/snapfs web01/before-upgrade.img
  snapfs protect /srv/snapfs web01/latest db02/latest";

/// Shown by `--help` of `unprotect`.
pub const UNPROTECT_EXAMPLES: &str = "\
Examples:
  snapfs unprotect /srv/snapfs web01/before-upgrade.img";

/// Arguments of `protect` and `unprotect`.
#[derive(Debug, clap::Args)]
pub struct Protect {
    #[command(flatten)]
    store: StoreArg,

    /// Snapshots: VM/NAME or VM/DISK/NAME; NAME latest is the newest
    #[arg(value_name = "SNAPSHOT", required = true)]
    snapshots: Vec<OsString>,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Row {
    name: String,
    protected: bool,
    changed: bool,
}

impl Protect {
    /// Runs the command: protects (`on`), or ends that.
    ///
    /// # Errors
    /// As [`protect()`].
    pub fn run(&self, on: bool) -> Outcome {
        let references = self.snapshots.iter().map(|name| reference(name)).collect::<Result<Vec<_>, Stop>>()?;
        let store = self.store.open()?;
        let told = protect(&store, &references, on)?;
        let rows = told.into_iter().map(|(name, changed)| Row { name, protected: on, changed });
        if self.json {
            output::json(&rows.collect::<Vec<_>>())?;
        } else {
            let line = |row: Row| {
                let was = if row.changed { "" } else { " already" };
                format!("{} is{was} {}protected\n", row.name, if row.protected { "" } else { "not " })
            };
            output::print(&rows.map(line).collect::<String>())?;
        }
        Ok(DONE)
    }
}
