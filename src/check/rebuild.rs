//! Rebuilds derived data (I7): deletes it, and lets a writer that begins make it anew.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::name::VmName;
use crate::store::session::Session;
use crate::store::{Store, lock_key};

/// What a rebuild did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RebuildReport {
    /// VMs whose derived data is new.
    pub rebuilt: Vec<String>,
    /// VMs that are being written: theirs was left as it is.
    pub busy: Vec<String>,
    /// VMs for which it failed, each with the reason.
    pub failed: Vec<String>,
}

/// Rebuilds the derived data of all VMs. Of VMs that are not there any more it is only deleted.
///
/// Cost: the slot tables of all packs; a log record for each VM.
///
/// # Errors
/// `Unavailable`, `Denied` when the VMs cannot be listed. What fails for one VM is in the report.
pub fn rebuild(store: &Store) -> Result<RebuildReport> {
    let mut report = RebuildReport::default();
    let Some(root) = store.derived_root() else { return Ok(report) };
    let mut names: BTreeSet<VmName> = store.vm_names()?.into_iter().collect();
    let known = names.clone();
    names.extend(derived_names(&root.join("vms"))?);
    for name in names {
        let text = name.as_str().to_owned();
        match rebuild_vm(store, &name, known.contains(&name)) {
            Ok(true) => report.rebuilt.push(text),
            Ok(false) => {}
            Err(e) if e.kind() == ErrorKind::Busy => report.busy.push(text),
            Err(e) => report.failed.push(format!("{text}: {e}")),
        }
    }
    Ok(report)
}

fn derived_names(folder: &Path) -> Result<Vec<VmName>> {
    let about = |e| Error::io(folder.display().to_string(), e);
    let rows = match std::fs::read_dir(folder) {
        Ok(rows) => rows,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(about(e)),
    };
    let mut names = Vec::new();
    for row in rows {
        // What has no legal name was not made by us and is left alone.
        if let Some(name) = row.map_err(about)?.file_name().to_str().and_then(|name| VmName::new(name).ok()) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Whether there was a VM to rebuild for.
fn rebuild_vm(store: &Store, name: &VmName, has_folder: bool) -> Result<bool> {
    let Some(folder) = store.derived_folder(name.as_str()) else { return Ok(false) };
    if !has_folder {
        delete_folder(&folder)?;
        return Ok(false);
    }
    let vm = store.vm_handle(name);
    let exists = match vm.refresh() {
        Ok(state) => state.exists(),
        Err(e) if e.kind() == ErrorKind::NotFound => false,
        Err(e) => return Err(e),
    };
    {
        let lock = store.backend().try_lock(&lock_key(name.as_str()))?;
        if lock.is_none() {
            return Err(Error::new(ErrorKind::Busy, format!("VM {:?} is being written", name.as_str())));
        }
        delete_folder(&folder)?;
    }
    if exists {
        Session::begin(store, &vm)?;
    }
    Ok(exists)
}

fn delete_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(folder.display().to_string(), e)),
        _ => Ok(()),
    }
}
