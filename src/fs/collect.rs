//! `gc=on`: what is forgotten through the mount is collected by the mount itself, in the background.
//!
//! One VM at a time, in rounds: a round holds the VM's write lock, drops what is dead as a whole, compacts a bounded
//! number of bytes, and lets go; then three times as long nothing happens. Whoever wants to write the VM through this
//! mount stops the round at the object that it is at. Readers need no lock.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::collect::gc::{Bounds, GcReport, collect_some};
use crate::error::{ErrorKind, Result};
use crate::fs::{MountedStore, lock};
use crate::name::VmName;

/// Nothing is collected before so much time has passed since the last removal: `rm` of many is one collection.
const QUIET: Duration = Duration::from_secs(5);

/// While somebody writes the VM, or reads what was removed, it is tried again after this.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// Bytes that a round writes: below a second on a disk, less than another process waits for the lock.
const ROUND_BYTES: u64 = 64 << 20;

/// After a round, so many times its own length without one: a quarter of the disk's time at the most.
const PAUSE_FACTOR: u32 = 3;

/// How often it is looked whether anything is due.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What waits for collection, and what is being collected.
#[derive(Debug, Default)]
pub(super) struct Collecting {
    /// VMs, and when they are due.
    due: Mutex<HashMap<String, Duration>>,
    /// The VM of the round that runs.
    at_work: Mutex<Option<String>>,
    /// The round is to end.
    stop: AtomicBool,
    is_ending: AtomicBool,
}

impl MountedStore {
    /// Something of a VM was removed through this mount.
    pub(super) fn note_forgotten(&self, vm: &str) {
        if self.options.collect {
            self.collect_after(vm, QUIET);
        }
    }

    fn collect_after(&self, vm: &str, wait: Duration) {
        lock(&self.collecting.due).insert(vm.to_owned(), self.store.clock().elapsed().saturating_add(wait));
    }

    /// Somebody is about to wait for a VM's session: a round in it ends soon.
    pub(super) fn stop_collecting(&self, vm: &str) {
        if lock(&self.collecting.at_work).as_deref() == Some(vm) {
            self.collecting.stop.store(true, Ordering::Relaxed);
        }
    }

    /// The mount ends: no round begins any more, and one that runs ends soon. What was not collected is by the next
    /// `gc`.
    pub fn end_collecting(&self) {
        self.collecting.is_ending.store(true, Ordering::Relaxed);
        self.collecting.stop.store(true, Ordering::Relaxed);
    }

    /// Does one round of what is due; returns how long nothing is to be done then.
    pub fn collect_due(&self) -> Duration {
        let now = self.store.clock().elapsed();
        let next = {
            let due = lock(&self.collecting.due);
            let ready = due.iter().filter(|(_, at)| **at <= now).min_by_key(|(_, at)| **at);
            ready.map(|(vm, _)| vm.clone())
        };
        let Some(name) = next else { return LOOK_EVERY };
        let Ok(vm) = VmName::new(&name) else { return LOOK_EVERY };
        lock(&self.collecting.due).remove(&name);
        let outcome = self.without_session(&name, || self.collect_round(&vm));
        self.judge(&name, outcome);
        let took = self.store.clock().elapsed().saturating_sub(now);
        (took * PAUSE_FACTOR).max(LOOK_EVERY)
    }

    fn collect_round(&self, vm: &VmName) -> Result<GcReport> {
        let work = &self.collecting;
        {
            let mut at_work = lock(&work.at_work);
            work.stop.store(work.is_ending.load(Ordering::Relaxed), Ordering::Relaxed);
            *at_work = Some(vm.as_str().to_owned());
        }
        let outcome = collect_some(&self.store, vm, Bounds { bytes: ROUND_BYTES, stop: &work.stop });
        *lock(&work.at_work) = None;
        outcome
    }

    /// What comes after a round; `None`: there was none, since somebody writes the VM through this mount.
    fn judge(&self, name: &str, outcome: Option<Result<GcReport>>) {
        match outcome {
            None => self.collect_after(name, TRY_AGAIN_AFTER),
            Some(Ok(report)) => {
                log::info!("{name}: {} bytes collected", report.bytes_reclaimed);
                if report.busy || report.roots_pinned > 0 {
                    self.collect_after(name, TRY_AGAIN_AFTER);
                } else if report.partial {
                    self.collect_after(name, Duration::ZERO);
                } else if report.roots_young > 0 {
                    self.collect_after(name, Duration::from_secs(report.young_for_seconds).max(TRY_AGAIN_AFTER));
                }
            }
            Some(Err(e)) if e.kind() == ErrorKind::Busy => self.collect_after(name, TRY_AGAIN_AFTER),
            // Deleted together with its log.
            Some(Err(e)) if e.kind() == ErrorKind::NotFound => {}
            Some(Err(e)) => log::warn!("{name}: what was removed is not collected: {e}"),
        }
    }
}
