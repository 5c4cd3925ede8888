//! Checks the copies of everything, on all targets of a store, and repairs them: what is missing is put back, what is
//! damaged is replaced by what is proven.
//!
//! A log says which packs and root pages there must be, so nothing that collection deleted is put back from a target
//! that was away. The order is that of reading: configuration, logs, holds, root pages, packs.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::backend::placement::TargetId;
use crate::backend::replicate::{Replicated, is_log};
use crate::backend::target::Target;
use crate::backend::{Backend, Key};
use crate::catalog::hold::Hold;
use crate::catalog::record::{Dead, Record, open_checkpoint};
use crate::catalog::roots::{open_root, root_key};
use crate::catalog::state::VmState;
use crate::catalog::vm::{LogEntry, Vm, incarnation_by_copies, log_prefix, object_place, parse_log_name};
use crate::check::faults::Severity;
use crate::check::store::{CheckOptions, CheckReport};
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::limits::{HOLD_BYTES_MAX, LOG_RECORD_BYTES_MAX, ROOT_PAGE_BYTES_MAX};
use crate::name::VmName;
use crate::pack::copies::{Depth, copy_object, find, heal};
use crate::pack::reader::ObjectPlace;
use crate::popular::index::{IndexIdentity, PopularIndex, parse_index_name};
use crate::store::Store;
use crate::store::config::{FILE_NAME, StoreConfig, open_record, record_key, record_numbers};
use crate::store::targets::Refill;
use crate::units::{Incarnation, RootId};

/// The largest object that is no pack and is looked at as a whole.
const WHOLE_BYTES_MAX: u64 = LOG_RECORD_BYTES_MAX;

/// Checks all copies, and repairs them if the options say so.
///
/// Memory: one small object of each target, or the index of a pack, and 4 MiB. Cost: reads all small objects and the
/// metadata of all packs on every target, and what else the options ask for.
///
/// # Errors
/// `Unavailable`, `Denied` when the VMs cannot be listed.
pub fn check_copies(
    store: &Store,
    replicated: &Replicated,
    options: CheckOptions,
    report: &mut CheckReport,
) -> Result<()> {
    let refills = if options.repair { Refill::begin(store, replicated)? } else { Vec::new() };
    let told_away = BTreeSet::new();
    let mut check = CopyCheck { store, replicated, options, report, told_away, has_lacking_logs: false };
    check.run()?;
    // Who lacks records must decide over no log: another target may have them.
    let is_full = refills.is_empty() || (!check.has_lacking_logs && check.all_staying_are_there());
    let refilled = refills.iter().filter(|refill| is_full && refill.finish(store, replicated)).count();
    if refilled > 0 {
        // What was written before others knew of the target again.
        check.run()?;
    }
    if !is_full {
        refills.iter().for_each(|refill| check.tell_not_full(refill.id()));
    }
    check.tell_away();
    Ok(())
}

struct CopyCheck<'a> {
    store: &'a Store,
    replicated: &'a Replicated,
    options: CheckOptions,
    report: &'a mut CheckReport,
    told_away: BTreeSet<String>,
    /// Whether a record of a log is not where it should be.
    has_lacking_logs: bool,
}

type Verify<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

impl CopyCheck<'_> {
    fn run(&mut self) -> Result<()> {
        self.check_config()?;
        let names = self.store.vm_names()?;
        for name in &names {
            if let Err(e) = self.check_vm(name) {
                let key = format!("vms/{name}");
                self.report.add_one(name.as_str(), key, format!("its copies cannot be checked: {e}"), Severity::Must);
            }
        }
        self.check_home(&self.store.common_home().clone())?;
        self.check_popular()
    }

    /// Whether all targets that are not being removed were there all the time.
    fn all_staying_are_there(&self) -> bool {
        let layout = self.replicated.layout();
        let mut staying = layout.targets.iter().filter(|(_, leaving)| !leaving);
        staying.all(|(target, _)| target.is_there() && !self.told_away.contains(target.name()))
    }

    fn tell_not_full(&mut self, id: TargetId) {
        let layout = self.replicated.layout();
        let Some((target, _)) = layout.targets.iter().find(|(target, _)| target.id() == id) else { return };
        let what = "the target was empty, and is not full yet: repair again when all others are there";
        self.report.targets_away.push(target.name().to_owned());
        self.report.add_one("", target.name().to_owned(), what.to_owned(), Severity::Copy);
    }

    fn tell_away(&mut self) {
        let layout = self.replicated.layout();
        for (target, _) in &layout.targets {
            if target.is_there() && !self.told_away.contains(target.name()) {
                continue;
            }
            let why = target.trouble().unwrap_or_else(|| "does not answer".to_owned());
            self.report.targets_away.push(target.name().to_owned());
            self.report.add_one("", target.name().to_owned(), format!("the target is away: {why}"), Severity::Copy);
        }
    }

    fn check_config(&mut self) -> Result<()> {
        let config = self.store.config().clone();
        let homes = self.replicated.places(&Key::new(FILE_NAME)).homes;
        let mut verify = |bytes: &[u8]| match StoreConfig::parse(bytes)? == config {
            true => Ok(()),
            false => Err(corrupt("is of another store")),
        };
        self.check_small("", &Key::new(FILE_NAME), &homes, WHOLE_BYTES_MAX, &mut verify, &|| true);
        for number in record_numbers(self.replicated)? {
            let key = record_key(number);
            let mut verify = |bytes: &[u8]| open_record(&key, &config, bytes).map(drop);
            self.check_small("", &key, &homes, WHOLE_BYTES_MAX, &mut verify, &|| true);
        }
        Ok(())
    }

    fn check_vm(&mut self, name: &VmName) -> Result<()> {
        self.check_home(&self.store.vm_handle(name))
    }

    /// A VM, or the common home.
    fn check_home(&mut self, vm: &Arc<Vm>) -> Result<()> {
        let prefix = log_prefix(vm.name());
        let homes = self.replicated.places(&prefix).homes;
        let entries = entries_of(self.replicated, &prefix)?;
        if entries.is_empty() {
            return Ok(());
        }
        let Some(incarnation) = incarnation_by_copies(vm.name(), self.replicated)? else {
            return Err(corrupt(format!("{prefix}: no copy of any record can be read")));
        };
        let oldest = oldest_needed(&entries);
        for (entry, file) in entries {
            let key = Key::new(format!("{prefix}/{file}"));
            if is_obsolete(entry, oldest) {
                // Of a target that was away when it was deleted.
                if self.options.repair
                    && let Err(e) = self.replicated.delete(&key)
                {
                    log::debug!("{key}: stays: {e}");
                }
                continue;
            }
            let mut verify = |bytes: &[u8]| verify_entry(entry, incarnation, bytes);
            let is_needed =
                || !entries_of(self.replicated, &prefix).is_ok_and(|now| is_obsolete(entry, oldest_needed(&now)));
            self.check_small(vm.name(), &key, &homes, LOG_RECORD_BYTES_MAX, &mut verify, &is_needed);
        }
        let state = vm.refresh()?;
        for id in vm.hold_ids()? {
            let key = crate::catalog::hold::hold_key(vm.name(), id);
            let mut verify = |bytes: &[u8]| match Hold::from_object(bytes)? {
                hold if (hold.incarnation, hold.id) == (incarnation, id) => Ok(()),
                hold => Err(corrupt(format!("is another hold, {}", hold.id))),
            };
            let is_needed = || !vm.hold_ids().is_ok_and(|now| !now.contains(&id));
            self.check_small(vm.name(), &key, &homes, HOLD_BYTES_MAX, &mut verify, &is_needed);
        }
        self.check_roots(vm, &state, &homes);
        self.check_packs(vm, &state);
        Ok(())
    }

    fn check_roots(&mut self, vm: &Vm, state: &VmState, homes: &[Target]) {
        let mut roots: BTreeSet<_> = state.files.values().map(|file| file.root).collect();
        roots.extend(state.condemned.keys());
        for id in roots.into_iter().filter(|id| needs_root(state, *id)) {
            let key = root_key(vm.name(), id);
            let mut verify = |bytes: &[u8]| open_root(bytes, state.incarnation, id).map(drop);
            let is_needed = || !vm.refresh().is_ok_and(|now| !needs_root(&now, id));
            self.check_small(vm.name(), &key, homes, ROOT_PAGE_BYTES_MAX, &mut verify, &is_needed);
        }
    }

    fn check_packs(&mut self, vm: &Vm, state: &VmState) {
        let mut seen = BTreeSet::new();
        for entry in state.packs.values().filter(|entry| seen.insert(entry.object)) {
            let place = object_place(vm.name(), state.incarnation, entry);
            self.check_pack(vm, &place);
        }
    }

    fn depth(&self) -> Depth {
        match self.options.sample_percent {
            _ if self.options.read_data => Depth::All,
            Some(percent) if percent > 0.0 => Depth::Sample(percent, self.store.clock().now().0),
            _ => Depth::Metadata,
        }
    }

    fn check_pack(&mut self, vm: &Vm, place: &ObjectPlace) {
        let found = find(self.replicated, place, self.depth());
        // Collection may have moved what is in it meanwhile.
        if !found.bad.is_empty() && vm.refresh().is_ok_and(|now| !now.objects().contains_key(&place.object)) {
            return;
        }
        self.report.copies += (found.whole.len() + found.bad.len()) as u64;
        self.told_away.extend(found.away.iter().map(|target| target.name().to_owned()));
        if found.bad.is_empty() {
            return;
        }
        let bad = found.bad.len() as u64;
        let healed = match self.options.repair {
            true => heal(self.replicated, place),
            false => Ok(0),
        };
        let healed = healed.unwrap_or_else(|e| {
            log::warn!("{}: no copy of some part of it is whole: {e}", place.key);
            self.report.copies_hopeless += bad;
            0
        });
        for (target, why) in &found.bad {
            self.tell(vm.name(), &place.key, target, why, healed >= bad);
        }
        self.count(bad, healed.min(bad));
    }

    /// Checks the copies of an object that is read as a whole. One that is not right is told of if, looked at again, the
    /// object `is_needed`: others may be deleting it.
    fn check_small(
        &mut self,
        vm: &str,
        key: &Key,
        homes: &[Target],
        bytes_max: u64,
        verify: Verify<'_>,
        is_needed: &dyn Fn() -> bool,
    ) {
        let mut good: Option<Vec<u8>> = None;
        let mut bad: Vec<(&Target, Error)> = Vec::new();
        for target in homes {
            let read = target.read_all(key, bytes_max).and_then(|bytes| verify(&bytes).map(|()| bytes));
            match read {
                Ok(bytes) => match &good {
                    // The first of them, the arbiter's, decides.
                    Some(first) if *first != bytes => bad.push((target, corrupt("differs from the other copy"))),
                    Some(_) => {}
                    None => good = Some(bytes),
                },
                Err(e) if e.kind() == ErrorKind::Unavailable => {
                    self.told_away.insert(target.name().to_owned());
                    continue;
                }
                Err(e) => bad.push((target, e)),
            }
            self.report.copies += 1;
        }
        if bad.is_empty() || !is_needed() {
            return;
        }
        // While objects move it may be where it was before. Without a good one the rest of the check tells of it; without
        // any it was deleted meanwhile.
        let good = good.map_or_else(|| self.replicated.read_all_checked(key, bytes_max, verify), Ok);
        let bytes = match good {
            Ok(bytes) => bytes,
            Err(e) => {
                if e.kind() == ErrorKind::Unavailable {
                    // The one that has it does not answer.
                    log::warn!("{e}");
                    self.has_lacking_logs |= is_log(key.as_str());
                    bad.iter().for_each(|(target, why)| self.tell(vm, key, target, why, false));
                    self.count(bad.len() as u64, 0);
                }
                return;
            }
        };
        for (target, why) in bad {
            let is_repaired = self.options.repair
                && match self.replicated.replace(target, key, &bytes) {
                    Ok(()) => true,
                    Err(e) => {
                        log::warn!("{key}: the bad copy on {} stays: {e}", target.name());
                        false
                    }
                };
            self.has_lacking_logs |= !is_repaired && is_log(key.as_str());
            self.tell(vm, key, target, &why, is_repaired);
            self.count(1, u64::from(is_repaired));
        }
    }

    fn tell(&mut self, vm: &str, key: &Key, target: &Target, why: &Error, is_repaired: bool) {
        let what = if why.kind() == ErrorKind::NotFound { "is missing".to_owned() } else { why.to_string() };
        let done = if is_repaired { ", repaired" } else { "" };
        let text = format!("the copy on {}: {what}{done}", target.name());
        self.report.add_one(vm, key.to_string(), text, Severity::Copy);
    }

    fn count(&mut self, bad: u64, repaired: u64) {
        self.report.copies_bad += bad;
        self.report.copies_repaired += repaired;
    }

    /// The popular indexes: derived from common packs, but not rebuilt before the next election.
    fn check_popular(&mut self) -> Result<()> {
        let incarnation = self.store.common_home().state().incarnation;
        let bytes_max = self.store.shares().popular_bytes;
        let folder = Key::new("common/popular");
        for row in self.replicated.list(&folder)?.iter().filter(|row| !row.is_folder) {
            let Some(epoch) = parse_index_name(&row.name) else { continue };
            let key = Key::new(format!("{folder}/{}", row.name));
            let identity = IndexIdentity { incarnation, epoch };
            let verify = |target: &Target| PopularIndex::read(target, identity, bytes_max).map(drop);
            let homes = self.replicated.places(&key).homes;
            let Some(whole) = homes.iter().find(|home| verify(home).is_ok()) else { continue };
            for target in &homes {
                let why = match verify(target) {
                    Ok(()) => continue,
                    Err(e) if e.kind() == ErrorKind::Unavailable => continue,
                    Err(e) => e,
                };
                let is_repaired = self.options.repair
                    && copy_object(whole, target, &key)
                        .inspect_err(|e| log::warn!("{key}: the bad copy on {} stays: {e}", target.name()))
                        .is_ok();
                self.tell("", &key, target, &why, is_repaired);
                self.count(1, u64::from(is_repaired));
            }
        }
        Ok(())
    }
}

fn entries_of(replicated: &Replicated, log: &Key) -> Result<Vec<(LogEntry, String)>> {
    let rows = replicated.list(log)?;
    Ok(rows.into_iter().filter_map(|row| Some((parse_log_name(&row.name)?, row.name))).collect())
}

fn needs_root(state: &VmState, id: RootId) -> bool {
    state.knows_root(id) && !state.dropping.contains(&Dead::Root { id })
}

/// The checkpoint from which on the log is needed: the last but one.
fn oldest_needed(entries: &[(LogEntry, String)]) -> u32 {
    let mut checkpoints: Vec<u32> = entries
        .iter()
        .filter_map(|(entry, _)| match entry {
            LogEntry::Checkpoint(number) => Some(number.0),
            LogEntry::Record(_) => None,
        })
        .collect();
    checkpoints.sort_unstable();
    checkpoints.iter().rev().nth(1).copied().unwrap_or(0)
}

fn is_obsolete(entry: LogEntry, oldest: u32) -> bool {
    match entry {
        LogEntry::Record(number) => number.0 <= oldest,
        LogEntry::Checkpoint(number) => number.0 < oldest,
    }
}

fn verify_entry(entry: LogEntry, incarnation: Incarnation, bytes: &[u8]) -> Result<()> {
    let (told, wanted) = match entry {
        LogEntry::Record(number) => {
            let record = Record::from_object(bytes)?;
            ((record.number, record.incarnation), number)
        }
        LogEntry::Checkpoint(number) => {
            let state = open_checkpoint(bytes)?;
            ((state.number, state.incarnation), number)
        }
    };
    if told == (wanted, incarnation) {
        Ok(())
    } else {
        Err(corrupt(format!("is of record {} or of another VM", told.0.0)))
    }
}
