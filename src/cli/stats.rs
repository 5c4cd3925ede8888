//! `snapfs stats`: what each VM holds, what it takes in the store, and what that saves.

use std::collections::HashMap;
use std::ffi::OsString;

use crate::backend::Key;
use crate::catalog::state::VmState;
use crate::catalog::vm::{COMMON_HOME, home_folder, log_prefix};
use crate::cli::store_arg::{StoreArg, vm_name};
use crate::cli::{DONE, Outcome, exit_code, output};
use crate::error::{ErrorKind, Result, not_found};
use crate::limits::BLOCK_BYTES;
use crate::name::VmName;
use crate::pack::Content;
use crate::pack::index::parse_object_name;
use crate::store::Store;
use crate::units::ObjectId;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs stats /srv/snapfs
  snapfs stats /srv/snapfs web01 --json";

/// Arguments of `stats`.
#[derive(Debug, clap::Args)]
pub struct Stats {
    #[command(flatten)]
    store: StoreArg,

    /// Only this VM
    #[arg(value_name = "VM")]
    vm: Option<OsString>,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// What a VM, or all of them, hold and take.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Usage {
    /// Sealed snapshots.
    pub snapshots: u64,
    /// Others.
    pub drafts: u64,
    /// Forgotten snapshots whose bytes stay because they are held.
    pub held: u64,
    /// Sizes of all images.
    pub logical_bytes: u64,
    /// Bytes of their blocks with data.
    pub data_bytes: u64,
    /// Bytes of the objects below, together.
    pub stored_bytes: u64,
    /// Packs of blocks.
    pub data_pack_bytes: u64,
    /// Packs of recipes.
    pub recipe_pack_bytes: u64,
    /// Root pages.
    pub root_page_bytes: u64,
    /// The log.
    pub log_bytes: u64,
    /// Packs that the log does not have (any more): what `gc --exact` frees.
    pub unreferenced_bytes: u64,
    /// Data to stored; `None` when nothing is stored.
    pub ratio: Option<f64>,
}

#[derive(serde::Serialize)]
struct VmUsage {
    name: String,
    #[serde(flatten)]
    usage: Usage,
}

#[derive(serde::Serialize)]
struct Report {
    vms: Vec<VmUsage>,
    total: Usage,
    /// What VMs share: common packs, popular indexes and their log.
    common_bytes: u64,
}

impl Usage {
    fn add(&mut self, other: &Self) {
        self.snapshots += other.snapshots;
        self.drafts += other.drafts;
        self.held += other.held;
        self.logical_bytes += other.logical_bytes;
        self.data_bytes += other.data_bytes;
        self.stored_bytes += other.stored_bytes;
        self.data_pack_bytes += other.data_pack_bytes;
        self.recipe_pack_bytes += other.recipe_pack_bytes;
        self.root_page_bytes += other.root_page_bytes;
        self.log_bytes += other.log_bytes;
        self.unreferenced_bytes += other.unreferenced_bytes;
        self.ratio = ratio(self.data_bytes, self.stored_bytes);
    }
}

fn ratio(data_bytes: u64, stored_bytes: u64) -> Option<f64> {
    // Two digits: the rest is noise.
    (stored_bytes > 0).then(|| (data_bytes as f64 / stored_bytes as f64 * 100.0).round() / 100.0)
}

/// What a VM holds by `state`, and takes by the listings of its folders. Cost: four listings.
///
/// # Errors
/// `Unavailable`, `Denied`.
pub fn usage_of(store: &Store, vm: &VmName, state: &VmState) -> Result<Usage> {
    let list = |folder: &str| store.backend().list(&Key::new(format!("vms/{}/{folder}", vm.as_str())));
    let mut usage = Usage::default();
    for file in state.files.values() {
        if file.sealed.is_some() {
            usage.snapshots += 1;
        } else {
            usage.drafts += 1;
        }
        usage.logical_bytes = usage.logical_bytes.saturating_add(file.image_bytes);
        usage.data_bytes = usage.data_bytes.saturating_add(file.data_blocks.saturating_mul(BLOCK_BYTES as u64));
    }
    let held = store.vm_handle(vm).held_roots()?;
    usage.held = state.condemned.keys().filter(|root| held.contains(root)).count() as u64;
    let contents: HashMap<ObjectId, Content> = state.packs.values().map(|p| (p.object, p.content)).collect();
    for row in list("packs")?.iter().filter(|row| !row.is_folder) {
        match parse_object_name(&row.name).and_then(|object| contents.get(&object)) {
            Some(Content::Data) => usage.data_pack_bytes += row.bytes,
            Some(Content::Recipes) => usage.recipe_pack_bytes += row.bytes,
            None => usage.unreferenced_bytes += row.bytes,
        }
    }
    usage.root_page_bytes = list("snapshots")?.iter().map(|row| row.bytes).sum();
    usage.log_bytes = store.backend().list(&log_prefix(vm.as_str()))?.iter().map(|row| row.bytes).sum();
    usage.stored_bytes = usage.data_pack_bytes
        + usage.recipe_pack_bytes
        + usage.unreferenced_bytes
        + usage.root_page_bytes
        + usage.log_bytes;
    usage.ratio = ratio(usage.data_bytes, usage.stored_bytes);
    Ok(usage)
}

impl Stats {
    /// Runs the command.
    ///
    /// # Errors
    /// `NotFound` for a VM that is not there, `Unavailable`, `Denied`. Damage is told, and the rest is shown.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let mut report = Report { vms: Vec::new(), total: Usage::default(), common_bytes: common_bytes(&store)? };
        let mut code = DONE;
        let names = match &self.vm {
            Some(vm) => vec![vm_name(vm)?],
            None => store.vm_names()?,
        };
        for name in names {
            let vm = store.vm_handle(&name);
            let state = match vm.refresh() {
                Ok(state) => state,
                Err(e) if self.vm.is_some() => return Err(e.into()),
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) => {
                    output::message(&e);
                    code = code.max(exit_code(e.kind()));
                    continue;
                }
            };
            if let Some(damage) = vm.damage() {
                output::message(&damage);
                code = code.max(exit_code(damage.kind()));
            }
            let usage = usage_of(&store, &name, &state)?;
            // A VM that was deleted is shown as long as it takes room.
            if !state.exists() && (self.vm.is_some() || usage.stored_bytes == usage.log_bytes) {
                if self.vm.is_some() {
                    return Err(not_found(format!("VM {:?} is not there", name.as_str())).into());
                }
                continue;
            }
            report.total.add(&usage);
            report.vms.push(VmUsage { name: name.as_str().to_owned(), usage });
        }
        if self.json {
            output::json(&report)?;
        } else {
            output::print(&as_table(&report))?;
        }
        Ok(code)
    }
}

/// Bytes of what VMs share. Cost: three listings.
fn common_bytes(store: &Store) -> Result<u64> {
    let folder = home_folder(COMMON_HOME);
    let mut bytes = 0;
    for name in ["packs", "popular", "log"] {
        bytes += store.backend().list(&Key::new(format!("{folder}/{name}")))?.iter().map(|row| row.bytes).sum::<u64>();
    }
    Ok(bytes)
}

fn as_table(report: &Report) -> String {
    let header = [
        "VM",
        "SNAPSHOTS",
        "DRAFTS",
        "HELD",
        "IMAGES",
        "DATA",
        "STORED",
        "PACKS",
        "RECIPES",
        "LOG+ROOTS",
        "UNUSED",
        "RATIO",
    ];
    let cells = |name: &str, usage: &Usage| {
        let ratio = usage.ratio.map_or_else(|| "-".to_owned(), |r| format!("{r:.2}"));
        let mut cells = vec![name.to_owned()];
        cells.extend([usage.snapshots, usage.drafts, usage.held].map(|count| count.to_string()));
        let sizes = [
            usage.logical_bytes,
            usage.data_bytes,
            usage.stored_bytes,
            usage.data_pack_bytes,
            usage.recipe_pack_bytes,
            usage.log_bytes + usage.root_page_bytes,
            usage.unreferenced_bytes,
        ];
        cells.extend(sizes.map(output::size));
        cells.push(ratio);
        cells
    };
    let mut rows: Vec<_> = report.vms.iter().map(|vm| cells(&vm.name, &vm.usage)).collect();
    if rows.len() != 1 {
        rows.push(cells("total", &report.total));
    }
    let mut text = output::table(&header, &[], &rows);
    if report.common_bytes > 0 {
        text.push_str(&format!("common packs, which VMs share: {}\n", output::size(report.common_bytes)));
    }
    text
}
