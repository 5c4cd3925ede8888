//! `snapfs clones`: the writable clones of a store on this host.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::cli::clone_place::{folders, live_mounts};
use crate::cli::output;
use crate::cli::store_arg::StoreArg;
use crate::cli::{DONE, Outcome};
use crate::error::ErrorKind;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs clones /srv/snapfs
  snapfs clones /srv/snapfs --json";

/// Arguments of `clones`.
#[derive(Debug, clap::Args)]
pub struct Clones {
    #[command(flatten)]
    store: StoreArg,

    /// The folder of clones that a mount was given with -o clones=DIR
    #[arg(long, value_name = "DIR")]
    clones: Option<PathBuf>,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(Default, serde::Serialize)]
struct Row {
    name: String,
    snapshot: Option<String>,
    size: Option<u64>,
    written_bytes: Option<u64>,
    created: Option<String>,
    path: Option<PathBuf>,
    folder: PathBuf,
    damage: Option<String>,
}

impl Clones {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`folders`].
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let mounts = live_mounts(&store, &self.store.store)?;
        let mut rows = Vec::new();
        for folder in folders(&store, &self.store.store, self.clones.as_deref())? {
            let shown = mounts.iter().find(|mount| mount.clones == folder.path());
            for name in folder.names()? {
                let path = shown.map(|mount| mount.path_of(&name));
                let mut row = Row { name, path, folder: folder.path().to_owned(), ..Row::default() };
                match folder.find(&row.name) {
                    Ok(found) => {
                        row.snapshot = Some(found.description.snapshot);
                        row.size = Some(found.description.image_bytes);
                        row.written_bytes = Some(found.metadata.blocks().saturating_mul(512));
                        row.created = Some(output::time(found.description.created));
                    }
                    // Removed since it was listed.
                    Err(e) if e.kind() == ErrorKind::NotFound => continue,
                    Err(e) => row.damage = Some(e.to_string()),
                }
                rows.push(row);
            }
        }
        if self.json {
            output::json(&rows)?;
            return Ok(DONE);
        }
        let cells = rows.iter().map(|row| {
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            let snapshot = row.damage.clone().or_else(|| row.snapshot.clone());
            let (size, written) = (row.size.map(output::size), row.written_bytes.map(output::size));
            vec![row.name.clone(), or_dash(snapshot), or_dash(size), or_dash(written), or_dash(row.created.clone())]
        });
        let cells: Vec<_> = cells.collect();
        output::print(&output::table(&["CLONE", "SNAPSHOT", "SIZE", "WRITTEN", "CREATED"], &[1], &cells))?;
        Ok(DONE)
    }
}
