//! `snapfs show`: one snapshot, and what each level of deduplication took of it.

use std::ffi::OsString;

use crate::catalog::vm::Vm;
use crate::cli::output::{self, Levels};
use crate::cli::store_arg::{StoreArg, reference};
use crate::cli::{DONE, Outcome};
use crate::error::Result;
use crate::limits::BLOCK_BYTES;
use crate::store::full_name;
use crate::units::RootId;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs show /srv/snapfs web01/monday.img
  snapfs show /srv/snapfs web01/latest --json";

/// Arguments of `show`.
#[derive(Debug, clap::Args)]
pub struct Show {
    #[command(flatten)]
    store: StoreArg,

    /// The snapshot: VM/NAME or VM/DISK/NAME; NAME latest is the newest
    #[arg(value_name = "SNAPSHOT")]
    snapshot: OsString,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, serde::Serialize)]
struct Report {
    name: String,
    size: u64,
    data_bytes: u64,
    sealed: bool,
    protected: bool,
    /// Bytes that cannot be read any more, by the last repair.
    lost_bytes: u64,
    /// Whose holds keep its bytes even when it is forgotten.
    holds: Vec<String>,
    received: String,
    mtime: String,
    /// The name of the snapshot that it was compared with; `None` without one, or when that is forgotten.
    parent: Option<String>,
    has_parent: bool,
    /// Bytes between a block boundary and the image's start.
    lead_bytes: u32,
    levels: Levels,
    stored_bytes: u64,
}

impl Show {
    /// Runs the command.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Unavailable`.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let (vm, file, image) = store.open_reference(&reference(&self.snapshot)?)?;
        let root = image.tree().root();
        let state = vm.state();
        let parent = root.parent.and_then(|id| state.files.values().find(|f| f.root == id));
        let levels = Levels::of(root.image_bytes, &root.tally);
        let report = Report {
            name: full_name(vm.name(), &file),
            size: root.image_bytes,
            data_bytes: root.data_blocks.saturating_mul(BLOCK_BYTES as u64),
            sealed: file.sealed.is_some(),
            protected: file.protected,
            lost_bytes: state.lost.get(&file.id).copied().unwrap_or(0),
            holds: holds_of(&vm, file.root)?,
            received: output::time(file.received),
            mtime: output::time(file.mtime),
            parent: parent.map(|f| full_name(vm.name(), f)),
            has_parent: root.parent.is_some(),
            lead_bytes: root.lead,
            levels,
            stored_bytes: levels.stored_bytes,
        };
        if self.json {
            output::json(&report)?;
        } else {
            output::print(&as_text(&report))?;
        }
        Ok(DONE)
    }
}

fn holds_of(vm: &Vm, root: RootId) -> Result<Vec<String>> {
    let ids = vm.hold_ids()?.into_iter().filter(|id| id.root == root);
    // One that is damaged holds all the same.
    Ok(ids.map(|id| vm.read_hold(id).map_or_else(|_| format!("hold {id}"), |hold| hold.owner)).collect())
}

fn as_text(report: &Report) -> String {
    let parent = match &report.parent {
        Some(name) => name.as_str(),
        None if report.has_parent => "(forgotten)",
        None => "(none)",
    };
    let state = output::state(report.sealed, report.protected, report.lost_bytes > 0);
    let mut text = format!(
        "{}\n  size      {} ({} bytes)\n  data      {}\n  state     {state}\n  created   {}\n  changed   {}\n  parent    {parent}\n",
        report.name,
        output::size(report.size),
        report.size,
        output::size(report.data_bytes),
        report.received,
        report.mtime,
    );
    if report.lost_bytes > 0 {
        let lost = output::size(report.lost_bytes);
        text.push_str(&format!("  damaged   {lost} cannot be read: check --read-data tells where\n"));
    }
    for owner in &report.holds {
        text.push_str(&format!("  held by   {owner}\n"));
    }
    for (what, bytes) in report.levels.rows() {
        text.push_str(&format!("  {what:<32}{:>12}\n", output::size(bytes)));
    }
    text
}
