//! G1: forgetting is a log record, acknowledged at once. Bytes go with the next collection.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::catalog::record::Op;
use crate::catalog::state::{FileEntry, VmState};
use crate::error::{Error, ErrorKind, Result, not_found};
use crate::name::{SnapshotName, VmName};
use crate::store::{Store, disk_and_file};
use crate::units::FileId;

/// A snapshot (or draft) that was forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForgetOutcome {
    /// Its name.
    pub name: String,
    /// Bytes of its image.
    pub image_bytes: u64,
    /// Whether it was never sealed.
    pub draft: bool,
}

/// Forgets these snapshots: one record for each VM. A name that is given twice counts once.
///
/// Cost: a listing and a put for each VM. No lock is needed.
///
/// # Errors
/// `NotFound` when a name is not there and `Denied` when one is protected: then nothing was forgotten, unless another
/// process changed the VM at the same moment. `NoSpace`, `ReadOnly`, `Corrupt` (a log is damaged), `Unavailable`.
pub fn forget(store: &Store, names: &[SnapshotName]) -> Result<Vec<ForgetOutcome>> {
    let by_vm = resolve(store, names)?;
    let mut outcomes = Vec::new();
    for (vm, files) in by_vm {
        store
            .vm_handle(&vm)
            .append(None, |state| {
                let mut ops = Vec::with_capacity(files.len());
                for (name, file) in &files {
                    // The name may mean another file by now: that one was not asked for.
                    find(state, name).and_then(|now| still(name, now, *file))?;
                    ops.push(Op::Forget { file: *file });
                }
                let told = files.iter().filter_map(|(name, file)| Some(outcome(name, state.files.get(file)?)));
                Ok((ops, told.collect::<Vec<_>>()))
            })
            .map(|told| outcomes.extend(told))?;
    }
    Ok(outcomes)
}

type Files = Vec<(SnapshotName, FileId)>;

/// What `names` mean now, by VM. Changes nothing: also what a dry run asks for.
///
/// # Errors
/// `NotFound`, `Denied` for a protected one, `Corrupt`, `Unavailable`.
pub fn resolve(store: &Store, names: &[SnapshotName]) -> Result<BTreeMap<VmName, Files>> {
    let mut by_vm: BTreeMap<VmName, Files> = BTreeMap::new();
    for name in names {
        let (_, state) = store.vm(&name.vm).map_err(|e| match e.kind() {
            ErrorKind::NotFound => not_found(format!("snapshot {name} is not there")).because(e),
            _ => e,
        })?;
        let file = find(&state, name)?.id;
        let files = by_vm.entry(name.vm.clone()).or_default();
        if files.iter().all(|(_, known)| *known != file) {
            files.push((name.clone(), file));
        }
    }
    Ok(by_vm)
}

fn find<'a>(state: &'a VmState, name: &SnapshotName) -> Result<&'a FileEntry> {
    let (disk, file) = disk_and_file(name);
    let entry = state.find(disk.as_deref(), &file);
    let entry = entry.ok_or_else(|| not_found(format!("snapshot {name} is not there")))?;
    if entry.protected {
        return Err(Error::new(ErrorKind::Denied, format!("snapshot {name} is protected")));
    }
    Ok(entry)
}

fn still(name: &SnapshotName, now: &FileEntry, file: FileId) -> Result<()> {
    if now.id == file { Ok(()) } else { Err(not_found(format!("snapshot {name} was replaced by another meanwhile"))) }
}

fn outcome(name: &SnapshotName, file: &FileEntry) -> ForgetOutcome {
    ForgetOutcome { name: name.to_string(), image_bytes: file.image_bytes, draft: file.sealed.is_none() }
}
