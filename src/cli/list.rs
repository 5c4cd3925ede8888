//! `snapfs list`: the snapshots of a store or of a VM.

use std::ffi::OsString;
use std::sync::Arc;

use crate::catalog::roots::read_root;
use crate::catalog::state::{FileEntry, VmState};
use crate::catalog::vm::Vm;
use crate::cli::store_arg::{StoreArg, vm_name};
use crate::cli::{DONE, Outcome, exit_code, output};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::BLOCK_BYTES;
use crate::name::VmName;
use crate::store::{Store, full_name};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs list /srv/snapfs
  snapfs list /srv/snapfs web01 --drafts
  snapfs list /srv/snapfs --json";

/// Arguments of `list`.
#[derive(Debug, clap::Args)]
pub struct List {
    #[command(flatten)]
    store: StoreArg,

    /// Only this VM
    #[arg(value_name = "VM")]
    vm: Option<OsString>,

    /// Also those that are still being written
    #[arg(long)]
    drafts: bool,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// One snapshot or draft.
#[derive(Debug, serde::Serialize)]
struct Row {
    name: String,
    size: u64,
    data_bytes: u64,
    /// `None` when its root page cannot be read.
    new_bytes: Option<u64>,
    sealed: bool,
    protected: bool,
    /// Bytes that cannot be read any more, by the last repair.
    lost_bytes: u64,
    received: String,
    mtime: String,
}

/// What was found, and the worst that was met on the way.
#[derive(Default)]
struct Listing {
    rows: Vec<Row>,
    code: u8,
}

impl List {
    /// Runs the command.
    ///
    /// # Errors
    /// `NotFound` for a VM that is not there, `Unavailable`, `Denied`. Damage is told, and what is whole is listed.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let mut listing = Listing { rows: Vec::new(), code: DONE };
        match &self.vm {
            Some(vm) => listing.add_vm(&store, &vm_name(vm)?, self.drafts)?,
            None => {
                for vm in store.vm_names()? {
                    match listing.add_vm(&store, &vm, self.drafts) {
                        // A VM that was deleted leaves its log behind for a while.
                        Err(e) if e.kind() == ErrorKind::NotFound => {}
                        Err(e) => listing.tell(&e),
                        Ok(()) => {}
                    }
                }
            }
        }
        if self.json {
            output::json(&listing.rows)?;
        } else {
            output::print(&as_table(&listing.rows, self.drafts))?;
        }
        Ok(listing.code)
    }
}

impl Listing {
    fn tell(&mut self, error: &Error) {
        output::message(error);
        self.code = self.code.max(exit_code(error.kind()));
    }

    fn add_vm(&mut self, store: &Store, name: &VmName, with_drafts: bool) -> Result<()> {
        let (vm, state) = store.vm(name)?;
        if let Some(damage) = vm.damage() {
            self.tell(&damage);
        }
        let mut files: Vec<&FileEntry> = state.files.values().filter(|f| with_drafts || f.sealed.is_some()).collect();
        files.sort_by_key(|f| (&f.disk, f.sealed.is_none(), f.sealed, f.id));
        for file in files {
            self.add_file(store, &vm, &state, file);
        }
        Ok(())
    }

    fn add_file(&mut self, store: &Store, vm: &Arc<Vm>, state: &VmState, file: &FileEntry) {
        let name = full_name(vm.name(), file);
        let new_bytes = match read_root(&**store.backend(), vm.name(), state.incarnation, file.root) {
            Ok(root) => Some(root.tally.blocks_new.saturating_mul(BLOCK_BYTES as u64)),
            Err(e) => {
                // Gone because it was forgotten, or replaced by a newer commit, since the log was read?
                let now = vm.refresh().ok();
                let still = now.as_ref().and_then(|now| now.files.get(&file.id));
                if still.is_none() {
                    return;
                }
                if still.is_some_and(|f| f.root == file.root) {
                    let e = if e.kind() == ErrorKind::NotFound { e.as_kind(ErrorKind::Corrupt) } else { e };
                    self.tell(&e.within(&name));
                }
                None
            }
        };
        self.rows.push(Row {
            name,
            size: file.image_bytes,
            data_bytes: file.data_blocks.saturating_mul(BLOCK_BYTES as u64),
            new_bytes,
            sealed: file.sealed.is_some(),
            protected: file.protected,
            lost_bytes: state.lost.get(&file.id).copied().unwrap_or(0),
            received: output::time(file.received),
            mtime: output::time(file.mtime),
        });
    }
}

fn as_table(rows: &[Row], with_drafts: bool) -> String {
    let mut header = vec!["NAME", "SIZE", "DATA", "NEW", "CREATED"];
    let with_state = with_drafts || rows.iter().any(|row| row.protected || row.lost_bytes > 0);
    if with_state {
        header.push("STATE");
    }
    let cells = |row: &Row| {
        let new = row.new_bytes.map_or_else(|| "?".to_owned(), output::size);
        let mut cells =
            vec![row.name.clone(), output::size(row.size), output::size(row.data_bytes), new, row.received.clone()];
        if with_state {
            cells.push(output::state(row.sealed, row.protected, row.lost_bytes > 0));
        }
        cells
    };
    output::table(&header, &[4, 5], &rows.iter().map(cells).collect::<Vec<_>>())
}
