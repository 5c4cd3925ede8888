//! Changes the targets of a store: adds, removes, and changes how many hold an object.
//!
//! ```text
//!   all VMs locked ──> record n + 1: the new targets, moving ──> VMs free ──> everything is put where it belongs
//!                 ──> record n + 2: no longer moving ──> what lies where it does not belong is deleted
//! ```
//!
//! From record n + 1 on everybody writes to the new places and reads from both. Who does not know of it yet finds out
//! with the next lock or log record: the record is on all targets before anything moves. What is cut off is taken up by
//! [`settle`].

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use crate::backend::local::Local;
use crate::backend::placement::TargetId;
use crate::backend::replicate::{Layout, Replicated};
use crate::backend::target::Target;
use crate::backend::{Backend, Guard, Key};
use crate::catalog::vm::{COMMON_HOME, LogEntry, log_prefix, parse_log_name, title};
use crate::check::copies::check_copies;
use crate::check::store::{CheckOptions, CheckReport};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result, busy, corrupt, invalid, not_found};
use crate::store::config::{self, ConfigRecord, FILE_NAME, Replicas, TargetRow, change_record, record_key};
use crate::store::targets::{
    TARGET_FILE, check_replicas, id_from_hex, identity_of, make_targets, new_row, write_identity,
};
use crate::store::{MemoryShares, Store, lock_key};

/// The folders of a VM's objects.
const VM_FOLDERS: [&str; 4] = ["log", "snapshots", "holds", "packs"];

/// What a change of the targets did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct MoveReport {
    /// Copies that were put where they belong.
    pub copied: u64,
    /// Copies that were deleted where they do not belong any more.
    pub deleted: u64,
}

/// New numbers of copies; what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Of a VM's objects.
    pub vm: Option<u16>,
    /// Of common packs.
    pub common: Option<u16>,
    /// How many count; 0 for more than half.
    pub quorum: Option<u16>,
}

impl Wanted {
    fn apply(self, replicas: &mut Replicas) {
        replicas.vm = self.vm.unwrap_or(replicas.vm);
        replicas.common = self.common.unwrap_or(replicas.common);
        replicas.quorum = self.quorum.unwrap_or(replicas.quorum);
    }
}

fn check_record(record: &ConfigRecord) -> Result<()> {
    check_replicas(record.replicas, record.targets.iter().filter(|row| !row.leaving).count())
}

fn replicated(store: &Store) -> Result<&Replicated> {
    store.backend().replicated().ok_or_else(|| invalid("the store is one folder and has no targets"))
}

/// Adds a target: a folder that is empty or not there yet. A store that is one folder becomes one of several targets,
/// the folder being the first; nobody else may have it open then.
///
/// Cost: moves what belongs on the new target; see [`check_copies`].
///
/// # Errors
/// `Busy` when a VM is being written (or the folder is open elsewhere), `Exists` when something is in the new folder,
/// `Invalid` numbers, `Unavailable` when a target is away or something could not be moved: then [`settle`] goes on.
pub fn add_target(root: &Path, path: &Path, wanted: Wanted, clock: Arc<dyn Clock>) -> Result<MoveReport> {
    let open = || Store::open(root, clock.clone(), MemoryShares::default());
    let mut store = open()?;
    if store.backend().replicated().is_none() {
        let home = std::path::absolute(root).map_err(|e| Error::io(root.display().to_string(), e))?;
        if path.starts_with(&home) || home.starts_with(path) {
            return Err(invalid(format!("target {}: one of it and the store is in the other", path.display())));
        }
        store.forget_alone();
        begin_targets(&store, &home, path, wanted, &*clock)?;
        drop(store);
        return settle(&open()?);
    }
    let layout = replicated(&store)?.layout();
    if layout.is_moving {
        return Err(busy("objects are still moving: snapfs target STORE settle"));
    }
    let inside = |other: &str| path.starts_with(other) || Path::new(other).starts_with(path);
    if inside(layout.home.name()) || layout.targets.iter().any(|(target, _)| inside(target.name())) {
        return Err(invalid(format!(
            "target {}: one of it and another folder of the store is in the other",
            path.display()
        )));
    }
    let locks = lock_all(&store, false)?;
    // Numbers that do not fit are told before anything is made.
    let (_, mut probe) = config::newest_record(&**store.backend(), store.config())?;
    wanted.apply(&mut probe.replicas);
    probe.targets.push(new_row(path)?);
    check_record(&probe)?;
    let made = make_targets(&store.config().store, &[path.to_owned()])?;
    let change = |record: &mut ConfigRecord| {
        record.targets.extend(made.iter().cloned());
        wanted.apply(&mut record.replicas);
        record.moving = true;
        check_record(record)
    };
    publish(&store, change, false)?;
    drop(locks);
    settle(&store)
}

/// The folder of a store becomes its first target, `path` its second.
fn begin_targets(store: &Store, home: &Path, path: &Path, wanted: Wanted, clock: &dyn Clock) -> Result<()> {
    let file = Key::new(FILE_NAME);
    let in_use = || busy("the store is open elsewhere: unmount it, and let commands on it end");
    if store.backend().is_pinned(&file)? {
        return Err(in_use());
    }
    let mut replicas = Replicas { vm: 1, common: 1, quorum: 0 };
    wanted.apply(&mut replicas);
    check_replicas(replicas, 2)?;
    let local = Local::open(home)?;
    let first = match identity_of(&local, TARGET_FILE)? {
        // Of an attempt that was cut off.
        Some(file) if file.store == store.config().store => {
            let id = id_from_hex(&file.target).ok_or_else(|| corrupt(TARGET_FILE))?;
            TargetRow { id: id.0, ..new_row(home)? }
        }
        Some(_) => return Err(invalid(format!("{}: is a target of another store", home.display()))),
        None => {
            let row = new_row(home)?;
            write_identity(&local, &store.config().store, TargetId(row.id), TARGET_FILE)?;
            row
        }
    };
    let mut rows = vec![first];
    rows.extend(make_targets(&store.config().store, &[path.to_owned()])?);
    let change = |record: &mut ConfigRecord| {
        if !record.targets.is_empty() {
            return Err(busy("another process changes the targets"));
        }
        record.targets.clone_from(&rows);
        record.replicas = replicas;
        record.moving = true;
        Ok(())
    };
    change_record(&**store.backend(), store.config(), clock, change)?;
    // Who opens the store pins the file and then reads the record: now it has either seen the record, or we see the pin.
    if store.backend().is_pinned(&file)? {
        let back = |record: &mut ConfigRecord| {
            record.targets.clear();
            record.replicas = Replicas::default();
            record.moving = false;
            Ok(())
        };
        change_record(&**store.backend(), store.config(), clock, back)?;
        return Err(in_use());
    }
    Ok(())
}

/// Removes the target in the folder `path`, after everything on it was put on others. With `is_lost` it may be away: what
/// only it had is then lost.
///
/// # Errors
/// `NotFound` when no target is there, `Invalid` when too few would be left, `Busy`, `Unavailable` when the target is
/// away and not called lost, or something could not be moved: then [`settle`] goes on.
pub fn remove_target(store: &Store, path: &Path, is_lost: bool) -> Result<MoveReport> {
    let layout = replicated(store)?.layout();
    let found = layout.targets.iter().find(|(target, _)| Path::new(target.name()) == path);
    let Some((target, _)) = found else { return Err(not_found(format!("{} is no target", path.display()))) };
    let id = target.id();
    if !target.is_there() && !is_lost {
        let what = "is away: when it never comes back, --lost removes it, with what only it has";
        return Err(Error::new(ErrorKind::Unavailable, format!("target {} {what}", target.name())));
    }
    if layout.is_moving && !is_lost {
        return Err(busy("objects are still moving: snapfs target STORE settle"));
    }
    let locks = lock_all(store, is_lost)?;
    let change = |record: &mut ConfigRecord| {
        for row in record.targets.iter_mut().filter(|row| TargetId(row.id) == id) {
            row.leaving = true;
        }
        record.moving = true;
        check_record(record)
    };
    publish(store, change, is_lost)?;
    drop(locks);
    settle_with(store, is_lost)
}

/// Changes how many targets hold an object.
///
/// # Errors
/// As [`add_target`].
pub fn set_replicas(store: &Store, wanted: Wanted) -> Result<MoveReport> {
    replicated(store)?;
    let locks = lock_all(store, false)?;
    let change = |record: &mut ConfigRecord| {
        wanted.apply(&mut record.replicas);
        record.moving = true;
        check_record(record)
    };
    publish(store, change, false)?;
    drop(locks);
    settle(store)
}

/// Takes the locks of all VMs, so that no writer has packs where they will not be looked for.
fn lock_all(store: &Store, is_lost: bool) -> Result<Vec<Box<dyn Guard>>> {
    raise_open_files();
    let mut locks = Vec::new();
    let mut names: Vec<String> = store.vm_names()?.iter().map(|name| name.as_str().to_owned()).collect();
    names.push(COMMON_HOME.to_owned());
    for name in names {
        match store.backend().try_lock(&lock_key(&name)) {
            Ok(Some(lock)) => locks.push(lock),
            Ok(None) => return Err(busy(format!("{} is being written", title(&name)))),
            // Without its arbiter nobody writes it.
            Err(e) if is_lost && e.kind() == ErrorKind::Unavailable => {}
            Err(e) => return Err(e),
        }
    }
    Ok(locks)
}

/// A lock is an open file.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        log::debug!("open files: {e}");
    }
}

/// Puts a record, and sees that every target that is there has it: that is what others are stopped by.
fn publish(store: &Store, change: impl Fn(&mut ConfigRecord) -> Result<()>, is_lost: bool) -> Result<()> {
    let replicated = replicated(store)?;
    let before = replicated.layout();
    if let Some((away, _)) = before.targets.iter().find(|(target, _)| !target.is_there()).filter(|_| !is_lost) {
        return Err(Error::new(ErrorKind::Unavailable, format!("target {} is away: nothing is changed", away.name())));
    }
    change_record(replicated, store.config(), &**store.clock(), change)?;
    let (number, _) = config::newest_record(replicated, store.config())?;
    for (target, _) in before.targets.iter().filter(|(target, _)| target.is_there()) {
        // Whatever it says: it is the target that is in the way, and settling goes on when it is not.
        let missed = |e: Error| {
            let what = format!("target {} missed the change: settle when it can be written", target.name());
            Error::new(ErrorKind::Unavailable, what).because(e)
        };
        target.len(&record_key(number)).map_err(missed)?;
    }
    replicated.reload_now()?;
    Ok(())
}

/// Puts everything where it belongs, and ends the move when all is there.
///
/// # Errors
/// `Unavailable` when something could not be put where it belongs, or a target is away that is removed and was not called
/// lost; nothing is deleted then. `Corrupt` when a log is damaged: what it would name may be where it is.
pub fn settle(store: &Store) -> Result<MoveReport> {
    settle_with(store, false)
}

/// With `is_lost` nothing more is expected of targets that are being removed and are away.
fn settle_with(store: &Store, is_lost: bool) -> Result<MoveReport> {
    let replicated = replicated(store)?;
    let mut report = MoveReport::default();
    loop {
        let (_, begun) = config::newest_record(replicated, store.config())?;
        replicated.reload_now()?;
        if !replicated.layout().is_moving {
            break;
        }
        // The second time for what was written meanwhile by who did not know yet.
        for _ in 0..2 {
            report.copied += put_where_it_belongs(store, replicated, is_lost)?;
        }
        let gone: Vec<_> = replicated.layout().targets.iter().filter(|(_, leaving)| *leaving).cloned().collect();
        let change = |record: &mut ConfigRecord| {
            // Whoever changed the targets meanwhile has moved nothing yet: that is not to be ended here.
            if *record != begun {
                return Err(busy("another process changes the targets"));
            }
            record.targets.retain(|row| !row.leaving);
            record.moving = false;
            Ok(())
        };
        match publish(store, change, true) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::Busy => {
                log::info!("{e}: once more");
                continue;
            }
            Err(e) => return Err(e),
        }
        for (target, _) in gone {
            // Nobody takes it for a target any more; its objects are left to whoever owns the disk.
            if let Err(e) = target.delete(&Key::new(TARGET_FILE)) {
                log::warn!("target {}: {TARGET_FILE} stays: {e}", target.name());
            }
        }
    }
    report.deleted = delete_misplaced(replicated)?;
    Ok(report)
}

/// Puts back what a repair would, and makes sure that nothing is left; how many copies were made.
fn put_where_it_belongs(store: &Store, replicated: &Replicated, is_lost: bool) -> Result<u64> {
    let mut found = CheckReport::default();
    let options = CheckOptions { read_data: false, sample_percent: None, repair: true };
    check_copies(store, replicated, options, &mut found)?;
    let layout = replicated.layout();
    let is_given_up = |name: &str| is_lost && layout.targets.iter().any(|(t, leaving)| *leaving && t.name() == name);
    if let Some(away) = found.targets_away.iter().find(|name| !is_given_up(name)) {
        let leaving = layout.targets.iter().any(|(t, leaving)| *leaving && t.name() == away);
        let else_lost = if leaving { "; when it never comes back, remove it with --lost" } else { "" };
        let what = format!("target {away} is away: bring it back, then settle goes on{else_lost}");
        return Err(Error::new(ErrorKind::Unavailable, what));
    }
    // What only a lost target had is nowhere.
    let has_lost = is_lost && layout.targets.iter().any(|(target, leaving)| *leaving && !target.is_there());
    let hopeless = if has_lost { found.copies_hopeless } else { 0 };
    let left = (found.copies_bad - found.copies_repaired).saturating_sub(hopeless);
    if left > 0 || found.damaged > 0 {
        let what = format!("{left} copies could not be put where they belong, see check; then settle goes on");
        return Err(Error::new(ErrorKind::Unavailable, what));
    }
    if !has_lost {
        logs_must_be_whole(store)?;
    }
    Ok(found.copies_repaired)
}

/// What a log names behind its damage was not moved.
fn logs_must_be_whole(store: &Store) -> Result<()> {
    let names = store.vm_names()?;
    let vms = names.iter().map(|name| store.vm_handle(name)).chain([store.common_home().clone()]);
    for vm in vms {
        if let Some(damage) = vm.damage() {
            return Err(damage.duplicate().within("nothing more is moved"));
        }
    }
    Ok(())
}

/// Deletes what lies on targets where nobody looks for it any more.
fn delete_misplaced(replicated: &Replicated) -> Result<u64> {
    let layout = replicated.layout();
    let mut deleted = 0;
    for (target, _) in &layout.targets {
        let is_home = |key: &Key| layout.places(key.as_str()).homes.iter().any(|home| home.id() == target.id());
        let Ok(vms) = target.list(&Key::new("vms")) else { continue };
        for vm in vms.iter().filter(|row| row.is_folder) {
            if is_home(&Key::new(format!("vms/{}/log", vm.name))) {
                continue;
            }
            must_be_at_home(&layout, target, &log_prefix(&vm.name))?;
            for folder in VM_FOLDERS {
                let folder = Key::new(format!("vms/{}/{folder}", vm.name));
                deleted += delete_all(target, &folder, &|_| false)?;
            }
        }
        deleted += delete_all(target, &Key::new("common/packs"), &is_home)?;
    }
    Ok(deleted)
}

/// Refuses to go on where a target has a newer record of a log than the log's arbiter: then its objects are not where they
/// belong, whatever was counted, and what lies here may be all there is.
fn must_be_at_home(layout: &Layout, target: &Target, log: &Key) -> Result<()> {
    let newest = |at: &Target| -> Result<u32> {
        let numbers = at.list(log)?.into_iter().filter_map(|row| match parse_log_name(&row.name)? {
            LogEntry::Record(number) => Some(number.0),
            LogEntry::Checkpoint(_) => None,
        });
        Ok(numbers.max().unwrap_or(0))
    };
    let places = layout.places(log.as_str());
    let Some(arbiter) = places.homes.first() else { return Ok(()) };
    let (here, there) = (newest(target)?, newest(arbiter)?);
    if here > there {
        let (here_name, arbiter_name) = (target.name(), arbiter.name());
        let what = format!("{log}: {here_name} has record {here}, {arbiter_name} has {there}: nothing is deleted");
        return Err(corrupt(what));
    }
    Ok(())
}

fn delete_all(target: &dyn Backend, folder: &Key, keep: &dyn Fn(&Key) -> bool) -> Result<u64> {
    let mut deleted = 0;
    for row in target.list(folder)?.iter().filter(|row| !row.is_folder) {
        let key = Key::new(format!("{folder}/{}", row.name));
        if !keep(&key) {
            target.delete(&key)?;
            deleted += 1;
        }
    }
    Ok(deleted)
}

/// One target, for people and programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TargetStatus {
    /// Its folder.
    pub path: String,
    /// Its identity.
    pub id: String,
    /// `ok`, `away`, `read-only`, `full` or `leaving`.
    pub state: &'static str,
    /// What is wrong with it.
    pub why: Option<String>,
    /// Bytes of its medium.
    pub bytes_total: Option<u64>,
    /// Bytes that are free on it.
    pub bytes_free: Option<u64>,
    /// VMs that have their objects on it.
    pub vms: u64,
    /// Of these, those whose log it decides over.
    pub vms_arbitrated: u64,
}

/// The state of all targets; none for a store that is one folder. Cost: a listing, and a file without a name on each.
///
/// # Errors
/// `Unavailable`, `Denied` when the VMs cannot be listed.
pub fn target_list(store: &Store) -> Result<Vec<TargetStatus>> {
    let Some(replicated) = store.backend().replicated() else { return Ok(Vec::new()) };
    let layout = replicated.layout();
    let names = store.vm_names()?;
    let mut rows = Vec::new();
    for (target, leaving) in &layout.targets {
        let probe = || -> Result<()> {
            let mut upload = target.create(&Key::new("probe"))?;
            upload.append(&[1; 4096])
        };
        let (state, why) = match probe() {
            Ok(()) if *leaving => ("leaving", None),
            Ok(()) => ("ok", None),
            Err(e) if e.kind() == ErrorKind::ReadOnly => ("read-only", Some(e.to_string())),
            Err(e) if e.kind() == ErrorKind::NoSpace => ("full", Some(e.to_string())),
            Err(e) => ("away", Some(e.to_string())),
        };
        let space = target.space();
        let mut status = TargetStatus {
            path: target.name().to_owned(),
            id: target.id().to_string(),
            state,
            why,
            bytes_total: space.map(|(total, _)| total),
            bytes_free: space.map(|(_, free)| free),
            vms: 0,
            vms_arbitrated: 0,
        };
        for name in &names {
            let homes = layout.places(&format!("vms/{name}/log")).homes;
            status.vms += u64::from(homes.iter().any(|home| home.id() == target.id()));
            status.vms_arbitrated += u64::from(homes.first().is_some_and(|home| home.id() == target.id()));
        }
        rows.push(status);
    }
    Ok(rows)
}
