//! G1: forgetting is a log record, acknowledged at once. Bytes go with the next collection.

use std::collections::BTreeMap;

use jiff::tz::TimeZone;
use serde::Serialize;

use crate::catalog::record::Op;
use crate::catalog::state::{FileEntry, VmState};
use crate::clock::Timestamp;
use crate::collect::keep::{Rule, Rules};
use crate::collect::young::Young;
use crate::error::{Error, ErrorKind, Result, not_found};
use crate::name::{SnapshotName, VmName};
use crate::store::{Store, disk_and_file, full_name};
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
/// Cost: a listing and a put for each VM, and what [`Young::among`] costs. No lock is needed.
///
/// # Errors
/// `NotFound` when a name is not there and `Denied` when one is protected or younger than the store's `min_age`: then
/// nothing was forgotten, unless another process changed the VM at the same moment. `NoSpace`, `ReadOnly`, `Corrupt`
/// (a log is damaged), `Unavailable`.
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
                must_be_old_enough(store, &vm, state, &files)?;
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
/// `NotFound`, `Denied` for a protected or a young one, `Corrupt`, `Unavailable`.
pub fn resolve(store: &Store, names: &[SnapshotName]) -> Result<BTreeMap<VmName, Files>> {
    let mut by_vm: BTreeMap<VmName, Files> = BTreeMap::new();
    let mut states = BTreeMap::new();
    for name in names {
        if !states.contains_key(&name.vm) {
            let (_, state) = store.vm(&name.vm).map_err(|e| match e.kind() {
                ErrorKind::NotFound => not_found(format!("snapshot {name} is not there")).because(e),
                _ => e,
            })?;
            states.insert(name.vm.clone(), state);
        }
        let Some(state) = states.get(&name.vm) else { continue };
        let file = find(state, name)?.id;
        let files = by_vm.entry(name.vm.clone()).or_default();
        if files.iter().all(|(_, known)| *known != file) {
            files.push((name.clone(), file));
        }
    }
    for (vm, files) in &by_vm {
        if let Some(state) = states.get(vm) {
            must_be_old_enough(store, vm, state, files)?;
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

fn must_be_old_enough(store: &Store, vm: &VmName, state: &VmState, files: &Files) -> Result<()> {
    let files = files.iter().filter_map(|(_, id)| state.files.get(id));
    let young = Young::among(store, vm.as_str(), files.clone())?;
    files.into_iter().try_for_each(|file| young.refuse(vm.as_str(), file))
}

fn outcome(name: &SnapshotName, file: &FileEntry) -> ForgetOutcome {
    ForgetOutcome { name: name.to_string(), image_bytes: file.image_bytes, draft: file.sealed.is_none() }
}

/// What rules mean for one snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Its name.
    pub name: String,
    /// Bytes of its image.
    pub image_bytes: u64,
    /// When the log first had it, which is the time that rules go by.
    pub received: Timestamp,
    /// The rules that keep it.
    pub rules: Vec<Rule>,
    /// Why it stays although no rule keeps it.
    pub stays: Option<Stays>,
}

/// Why a snapshot stays that no rule keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stays {
    /// It is protected.
    Protected,
    /// It is younger than the store's `min_age`, in these words.
    Young(String),
}

impl Verdict {
    /// Whether it is forgotten.
    pub fn is_forgotten(&self) -> bool {
        self.rules.is_empty() && self.stays.is_none()
    }
}

/// Forgets what no rule keeps in a VM, each folder by itself; drafts, what is protected and what is younger than the
/// store's `min_age` stays. Tells of every sealed snapshot, a folder after the other, the oldest first. With `dry_run`
/// nothing is changed.
///
/// Cost: a listing and a put, and what [`Young::among`] costs. No lock is needed.
///
/// # Errors
/// `NotFound` when the VM is not there, `NoSpace`, `ReadOnly`, `Corrupt` (its log is damaged), `Unavailable`.
pub fn forget_by_rules(
    store: &Store,
    name: &VmName,
    rules: &Rules,
    zone: &TimeZone,
    dry_run: bool,
) -> Result<Vec<Verdict>> {
    let (vm, state) = store.vm(name)?;
    if dry_run {
        return Ok(judge(store, name, &state, rules, zone)?.into_iter().map(|(_, verdict)| verdict).collect());
    }
    vm.append(None, |state| {
        let judged = judge(store, name, state, rules, zone)?;
        let gone = judged.iter().filter(|(_, verdict)| verdict.is_forgotten());
        let ops = gone.map(|(file, _)| Op::Forget { file: *file }).collect();
        Ok((ops, judged.into_iter().map(|(_, verdict)| verdict).collect()))
    })
}

fn judge(
    store: &Store,
    vm: &VmName,
    state: &VmState,
    rules: &Rules,
    zone: &TimeZone,
) -> Result<Vec<(FileId, Verdict)>> {
    let mut folders: BTreeMap<Option<&str>, Vec<&FileEntry>> = BTreeMap::new();
    for file in state.files.values().filter(|f| f.sealed.is_some()) {
        folders.entry(file.disk.as_deref()).or_default().push(file);
    }
    let mut kept = Vec::new();
    for files in folders.values_mut() {
        files.sort_by_key(|f| std::cmp::Reverse((f.sealed, f.id)));
        let times: Vec<Timestamp> = files.iter().map(|f| f.received).collect();
        let judged = rules.judge(&times, zone);
        kept.extend(files.iter().copied().zip(judged).rev());
    }
    // Only of those that would go the age is asked.
    let may_go = kept.iter().filter(|(file, rules)| rules.is_empty() && !file.protected).map(|(file, _)| *file);
    let young = Young::among(store, vm.as_str(), may_go)?;
    let verdicts = kept.into_iter().map(|(file, rules)| {
        let young = young.why(file.id).map(Stays::Young);
        let stays = if file.protected { Some(Stays::Protected) } else { young };
        let name = full_name(vm.as_str(), file);
        let (image_bytes, received) = (file.image_bytes, file.received);
        (file.id, Verdict { name, image_bytes, received, stays: stays.filter(|_| rules.is_empty()), rules })
    });
    Ok(verdicts.collect())
}
