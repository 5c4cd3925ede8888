//! Checks one VM: its log, then its objects, then its snapshots.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::backend::Key;
use crate::backend::replicate::Replicated;
use crate::catalog::record::{Dead, PackEntry, Record, open_checkpoint};
use crate::catalog::roots::parse_root_name;
use crate::catalog::state::VmState;
use crate::catalog::vm::{LogEntry, Vm, home_folder, log_prefix, parse_log_name};
use crate::check::common::Common;
use crate::check::faults::{Faults, Severity, Subject};
use crate::check::holds::Holds;
use crate::check::losses::{mark, name_losses};
use crate::check::objects::ObjectCheck;
use crate::check::store::{CheckOptions, CheckReport};
use crate::check::trees::TreeCheck;
use crate::error::{ErrorKind, Result, corrupt};
use crate::limits::LOG_RECORD_BYTES_MAX;
use crate::name::VmName;
use crate::pack::index::parse_object_name;
use crate::store::Store;
use crate::units::{ObjectId, RootId};

/// Checks a VM and adds what is found to the report. `common` is what the check of the common home found.
///
/// # Errors
/// `Unavailable`, `Denied` when its folders cannot be listed.
pub fn check_vm(
    store: &Store,
    name: &VmName,
    options: CheckOptions,
    common: &Common,
    report: &mut CheckReport,
    tell: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let vm = store.vm_handle(name);
    let mut faults = common.faults();
    let log = log_prefix(vm.name()).to_string();
    let holds = Holds::list(&vm)?;
    let state = match vm.refresh() {
        Ok(state) => state,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            // A folder in which a writer died before its first record holds nothing.
            let there = list(&vm, "packs")?.len() + list(&vm, "snapshots")?.len() + holds.count();
            let severity = if there > 0 { Severity::Must } else { Severity::Should };
            report.add_one(vm.name(), log, format!("there is no log, but {there} other objects"), severity);
            return Ok(());
        }
        Err(e) => {
            report.add_one(vm.name(), log, e.to_string(), Severity::Must);
            return Ok(());
        }
    };
    let whole = check_log(&vm, &mut faults)?;
    check_objects(store, &vm, &state, options, &mut faults, report, tell);
    let held = holds.check(&vm, &state, &mut faults);
    report.snapshots += state.files.len() as u64;
    report.snapshots_held += held.len() as u64;
    let packs = store.packs(&vm);
    let shared = common.state.as_deref();
    TreeCheck::new(&vm, &packs, &state, shared, &held).check(&mut faults);
    let lost = name_losses(&vm, &packs, &state, shared, &held, &mut faults);
    if whole {
        count_leaks(&vm, &mut faults, report)?;
    }
    if let (Ok(now), Ok(held)) = (vm.refresh(), vm.hold_ids())
        && (now.number != state.number || !holds.are(&held))
    {
        faults.forget_stale(&now, &held);
    }
    let (findings, dropped) = faults.into_findings(vm.name());
    report.add(findings, dropped);
    // What is on a target that is away is not lost.
    let is_seen = vm.backend().replicated().is_none_or(Replicated::is_whole);
    if options.repair && whole && is_seen && report.targets_away.is_empty() {
        match mark(&vm, &state, &lost, options.read_data) {
            Ok((marked, unmarked)) => {
                report.snapshots_marked += marked;
                report.snapshots_unmarked += unmarked;
            }
            Err(e) => report.add_one(vm.name(), log, format!("losses cannot be marked: {e}"), Severity::Should),
        }
    }
    report.snapshots_damaged += vm.state().lost.len() as u64;
    Ok(())
}

pub(super) fn list(vm: &Vm, folder: &str) -> Result<Vec<crate::backend::Listed>> {
    vm.backend().list(&Key::new(format!("{}/{folder}", home_folder(vm.name()))))
}

/// Whether the log is readable to its end. What lies before the newest checkpoint is looked at too: it is there in
/// case that one is damaged.
pub(super) fn check_log(vm: &Vm, faults: &mut Faults) -> Result<bool> {
    let damage = vm.damage();
    if let Some(damage) = &damage {
        faults.note(Subject::Log, Severity::Must, damage.to_string());
        return Ok(false);
    }
    for row in list(vm, "log")? {
        let key = Key::new(format!("{}/{}", log_prefix(vm.name()), row.name));
        let Some(entry) = parse_log_name(&row.name) else { continue };
        let mut read = None;
        let mut verify = |bytes: &[u8]| {
            read = Some(match entry {
                LogEntry::Record(number) => {
                    let record = Record::from_object(bytes)?;
                    (record.number, record.incarnation, number)
                }
                LogEntry::Checkpoint(number) => {
                    let state = open_checkpoint(bytes)?;
                    (state.number, state.incarnation, number)
                }
            });
            Ok(())
        };
        let told = vm.backend().read_all_checked(&key, LOG_RECORD_BYTES_MAX, &mut verify);
        let told = told.and_then(|_| read.ok_or_else(|| corrupt("was not read")));
        // The log could be read: nothing is lost by what is found here, but one more such and it could not.
        match told {
            Ok((told, incarnation, named)) if told == named && incarnation == vm.state().incarnation => {}
            // Older entries go when a checkpoint is written.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Ok((told, _, _)) => {
                let what = format!("is of record {} or of another VM", told.0);
                faults.note(Subject::Other(key.to_string()), Severity::Should, what);
            }
            Err(e) => faults.note(Subject::Other(key.to_string()), Severity::Should, e.to_string()),
        }
    }
    Ok(true)
}

pub(super) fn check_objects(
    store: &Store,
    vm: &Arc<Vm>,
    state: &VmState,
    options: CheckOptions,
    faults: &mut Faults,
    report: &mut CheckReport,
    tell: &mut dyn FnMut(u64, u64),
) {
    let mut objects: BTreeMap<ObjectId, Vec<PackEntry>> = BTreeMap::new();
    for entry in state.packs.values() {
        objects.entry(entry.object).or_default().push(*entry);
    }
    let total: u64 = state.objects().values().sum();
    let packs = store.packs(vm);
    let mut check = ObjectCheck::new(vm, &packs, state.incarnation, options, store.clock().now().0);
    let mut done = 0;
    for (object, entries) in objects {
        check.check(object, &entries, faults);
        done += entries.first().map_or(0, |e| e.object_bytes);
        report.objects += 1;
        tell(done, total);
    }
    report.frames_read += check.frames_read;
    report.bytes_read += check.bytes_read;
}

/// Counts objects that the log does not know. They are no damage: a writer that died, or one at work.
pub(super) fn count_leaks(vm: &Vm, faults: &mut Faults, report: &mut CheckReport) -> Result<()> {
    // Listed before the log is read again: what a writer commits in between is then known.
    let rows = [list(vm, "packs")?, list(vm, "snapshots")?];
    let Ok(state) = vm.refresh() else { return Ok(()) };
    let objects = state.objects();
    let dropping: BTreeSet<Dead> = state.dropping.iter().copied().collect();
    let roots: BTreeSet<RootId> = state.files.values().map(|f| f.root).chain(state.condemned.keys().copied()).collect();
    for (folder, rows) in ["packs", "snapshots"].into_iter().zip(rows) {
        for row in rows {
            let pack = parse_object_name(&row.name).map(|object| Dead::Pack { object });
            let root = parse_root_name(&row.name).map(|id| Dead::Root { id });
            let dead = if folder == "packs" { pack } else { root };
            let known = match dead {
                Some(Dead::Pack { object }) => objects.contains_key(&object),
                Some(Dead::Root { id }) => roots.contains(&id),
                None => {
                    let key = format!("{}/{folder}/{}", home_folder(vm.name()), row.name);
                    faults.note(Subject::Other(key), Severity::Should, "is no object of snapfs");
                    continue;
                }
            };
            if !known && dead.is_none_or(|dead| !dropping.contains(&dead)) {
                report.leaked_objects += 1;
                report.leaked_bytes += row.bytes;
            }
        }
    }
    Ok(())
}
