//! When drafts become snapshots: a grace time after the last close, or at once by a rename.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::backend::Guard;
use crate::catalog::record::Op;
use crate::catalog::state::FileEntry;
use crate::catalog::vm::Vm;
use crate::collect::gc::{GcOptions, collect_vm};
use crate::error::{ErrorKind, Result};
use crate::fs::{FileKey, MountedStore, lock};
use crate::name::{FileName, VmName};
use crate::store::lock_key;

/// A seal that failed is tried again no sooner than this.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// A draft with this many commits has its small packs merged when it is sealed: as many as collection merges.
const COMMITS_TO_MERGE: u32 = 8;

/// A draft that is sealed when its time has come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    due: Duration,
}

/// Why this process may seal: it is the VM's writer itself, or nobody is.
pub(super) enum SealGuard {
    OurSession,
    Locked(#[expect(dead_code, reason = "held, not read")] Box<dyn Guard>),
}

impl MountedStore {
    /// The right to seal in a VM; `None` when another process writes it, whose draft it may be.
    pub(super) fn seal_guard(&self, vm: &Arc<Vm>, name: &str) -> Result<Option<SealGuard>> {
        self.stop_collecting(name);
        if self.has_session(name) {
            return Ok(Some(SealGuard::OurSession));
        }
        Ok(vm.backend().try_lock(&lock_key(name))?.map(SealGuard::Locked))
    }

    /// The last writer has closed a file: its grace time begins, or it is over already.
    pub(super) fn consider(&self, key: &FileKey, at_once: bool) {
        let grace = if at_once { Duration::ZERO } else { self.options.seal_after };
        let due = self.store.clock().elapsed() + grace;
        lock(&self.candidates).insert(key.clone(), Candidate { due });
        if at_once {
            self.seal_due(false);
        }
    }

    /// What a rename means for the grace time.
    pub(super) fn after_rename(&self, key: &FileKey, has_writers: bool, name: &FileName) {
        if name.is_draft_name() {
            return;
        }
        if has_writers {
            if let Some(open) = lock(&self.open_files).get(key) {
                open.renamed();
            }
            return;
        }
        let is_draft = self.file(key).is_ok_and(|(_, entry)| entry.sealed.is_none() && entry.data_blocks > 0);
        if is_draft {
            // Another process had the VM: soon.
            self.consider(key, false);
        } else {
            lock(&self.candidates).remove(key);
        }
    }

    /// Seals what is due, lets go of what is idle. Called every half second or so by the mount's own thread.
    pub fn tick(&self) {
        if !self.options.read_only {
            if !self.is_scanned.load(Ordering::Relaxed) && self.find_candidates() {
                self.is_scanned.store(true, Ordering::Relaxed);
            }
            self.seal_due(false);
        }
        self.merge_small_packs();
        let now = self.store.clock().elapsed();
        self.store.backend().tidy();
        lock(&self.lingering_links).retain(|_, until| *until > now);
    }

    /// W8: a draft that was committed often has left many small packs. Collection of its VM merges them, once it is
    /// sealed, and drops what its earlier commits alone referred to.
    pub(super) fn note_sealed(&self, vm: &str, entry: &FileEntry) {
        if entry.commits >= COMMITS_TO_MERGE {
            lock(&self.to_merge).insert(vm.to_owned());
        }
    }

    fn merge_small_packs(&self) {
        let waiting = std::mem::take(&mut *lock(&self.to_merge));
        for name in waiting {
            let Ok(vm) = VmName::new(&name) else { continue };
            match collect_vm(&self.store, &vm, GcOptions::default(), &mut |_| {}) {
                Ok(report) if report.busy => {
                    lock(&self.to_merge).insert(name);
                }
                Ok(_) => {}
                Err(e) => log::warn!("{name}: small packs are not merged: {e}"),
            }
        }
    }

    /// Drafts that were closed before the daemon ended get their grace time now. `false` when a VM did not answer:
    /// then it has to be done again.
    fn find_candidates(&self) -> bool {
        let Ok(names) = self.store.vm_names() else { return false };
        let mut is_complete = true;
        for name in names {
            let state = match self.vm(name.as_str()) {
                Ok((_, state)) => state,
                Err(e) => {
                    is_complete &= e.kind() != ErrorKind::Unavailable;
                    continue;
                }
            };
            for file in state.files.values().filter(|f| f.sealed.is_none() && f.closed && f.data_blocks > 0) {
                let key = (name.as_str().to_owned(), file.id);
                let is_known = lock(&self.candidates).contains_key(&key);
                if !is_known && !lock(&self.open_files).contains_key(&key) {
                    self.consider(&key, false);
                }
            }
        }
        is_complete
    }

    fn seal_due(&self, all: bool) {
        let now = self.store.clock().elapsed();
        let due: Vec<FileKey> =
            lock(&self.candidates).iter().filter(|(_, c)| all || c.due <= now).map(|(key, _)| key.clone()).collect();
        for key in due {
            match self.seal(&key) {
                Ok(true) => {
                    lock(&self.candidates).remove(&key);
                }
                // Another process writes the VM: at the next tick.
                Ok(false) => {}
                // The medium does not answer or is full, which may pass: not too soon.
                Err(e) if matches!(e.kind(), ErrorKind::Unavailable | ErrorKind::NoSpace | ErrorKind::Busy) => {
                    log::warn!("{}: a draft is not sealed yet: {e}", key.0);
                    let due = now + self.options.seal_after.max(TRY_AGAIN_AFTER);
                    lock(&self.candidates).insert(key, Candidate { due });
                }
                Err(e) => {
                    if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Stale) {
                        log::warn!("{}: a draft is not sealed: {e}", key.0);
                    }
                    lock(&self.candidates).remove(&key);
                }
            }
        }
    }

    /// Seals a draft, if it is one that is sealed by time; `false` when it has to be tried again.
    fn seal(&self, key: &FileKey) -> Result<bool> {
        let (vm, entry) = self.file(key)?;
        let is_never = |name: &str| FileName::new(name).map_or(true, |n| n.is_draft_name());
        if entry.sealed.is_some() || entry.data_blocks == 0 || is_never(&entry.name) {
            return Ok(true);
        }
        let Some(_guard) = self.seal_guard(&vm, &key.0)? else { return Ok(false) };
        if lock(&self.open_files).get(key).is_some_and(|f| f.has_writers()) {
            return Ok(true);
        }
        vm.append(None, |state| {
            let file = state.file(key.1)?;
            let fits = file.sealed.is_none() && file.data_blocks > 0 && !is_never(&file.name);
            Ok((if fits { vec![Op::Seal { file: key.1 }] } else { Vec::new() }, ()))
        })?;
        self.note_sealed(&key.0, &entry);
        Ok(true)
    }

    /// Commits everything, and seals what waits for its grace time: nobody can write through this mount any more.
    ///
    /// # Errors
    /// The first error of a commit.
    pub fn shut_down(&self) -> Result<()> {
        let flushed = self.flush_clones();
        if self.options.read_only {
            return flushed;
        }
        let outcome = self.commit_all();
        self.seal_due(true);
        outcome.and(flushed)
    }
}
