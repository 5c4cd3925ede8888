//! `snapfs forget`: snapshots go from the log at once; `gc` frees their bytes.

use std::ffi::OsString;

use crate::cli::store_arg::{StoreArg, snapshot_name};
use crate::cli::{DONE, Outcome, Stop, output};
use crate::collect::forget::{forget, resolve};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs forget /srv/snapfs web01/monday.img
  snapfs forget /srv/snapfs web01/monday.img web01/tuesday.img --dry-run";

/// Arguments of `forget`.
#[derive(Debug, clap::Args)]
pub struct Forget {
    #[command(flatten)]
    store: StoreArg,

    /// Snapshots to forget
    #[arg(value_name = "SNAPSHOT", required = true)]
    snapshots: Vec<OsString>,

    /// Say what would be forgotten, and change nothing
    #[arg(long)]
    dry_run: bool,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Report {
    forgotten: Vec<String>,
    dry_run: bool,
}

impl Forget {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`forget`].
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let names = self.snapshots.iter().map(|name| snapshot_name(name)).collect::<Result<Vec<_>, Stop>>()?;
        let forgotten: Vec<String> = if self.dry_run {
            let found = resolve(&store, &names)?;
            found.into_values().flatten().map(|(name, _)| name.to_string()).collect()
        } else {
            forget(&store, &names)?.into_iter().map(|outcome| outcome.name).collect()
        };
        if self.json {
            output::json(&Report { forgotten, dry_run: self.dry_run })?;
        } else {
            let word = if self.dry_run { "would forget" } else { "forgot" };
            let lines: String = forgotten.iter().map(|name| format!("{word} {name}\n")).collect();
            output::print(&lines)?;
        }
        Ok(DONE)
    }
}
