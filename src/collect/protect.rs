//! Protects snapshots against being forgotten, by whatever way, and lets go of them again.

use std::collections::BTreeMap;

use crate::catalog::record::Op;
use crate::error::{ErrorKind, Result, invalid, not_found};
use crate::name::{Reference, VmName};
use crate::store::{Store, full_name};

/// Protects these snapshots (`on`), or no longer: one record for each VM. Returns their names, and whether that was
/// anything new.
///
/// Cost: a listing and a put for each VM. No lock is needed.
///
/// # Errors
/// `NotFound`, and `Invalid` for a draft: then nothing of its VM was changed. `NoSpace`, `ReadOnly`, `Corrupt` (a log
/// is damaged), `Unavailable`.
pub fn protect(store: &Store, references: &[Reference], on: bool) -> Result<Vec<(String, bool)>> {
    let mut by_vm: BTreeMap<VmName, Vec<&Reference>> = BTreeMap::new();
    for reference in references {
        by_vm.entry(reference.vm.clone()).or_default().push(reference);
    }
    let mut told = Vec::new();
    for (name, references) in by_vm {
        let (vm, _) = store.vm(&name).map_err(|e| match (e.kind(), references.first()) {
            (ErrorKind::NotFound, Some(first)) => not_found(format!("snapshot {first} is not there")).because(e),
            _ => e,
        })?;
        told.extend(vm.append(None, |state| {
            let mut ops = Vec::new();
            let mut told = Vec::new();
            for reference in &references {
                let file = Store::resolve(state, reference)?;
                if file.sealed.is_none() {
                    return Err(invalid(format!("{reference} is a draft: it can be protected when it is sealed")));
                }
                let is_new = file.protected != on;
                let op = Op::Protect { file: file.id, on };
                if is_new && !ops.contains(&op) {
                    ops.push(op);
                }
                told.push((full_name(name.as_str(), &file), is_new));
            }
            Ok((ops, told))
        })?);
    }
    Ok(told)
}
