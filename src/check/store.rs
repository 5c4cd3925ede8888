//! Checks the common home, then all VMs of a store, one after the other.

use serde::Serialize;

use crate::backend::Key;
use crate::check::common::Common;
use crate::check::copies::check_copies;
use crate::check::faults::{FINDINGS_MAX, Finding, LOST_MAX, Severity};
use crate::check::live::LiveImage;
use crate::check::mend::mend_store;
use crate::check::vm::check_vm;
use crate::error::{Error, Result, invalid};
use crate::name::VmName;
use crate::store::Store;

/// How thoroughly to check.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CheckOptions {
    /// Read every frame and compare every slot with its fingerprint (I3).
    pub read_data: bool,
    /// Read this share of the frames, at random, at least one of each pack: from 0 to 100. `read_data` reads all.
    pub sample_percent: Option<f64>,
    /// Put back copies that are missing, and replace damaged ones, in a store over several targets; mark in the log which
    /// snapshots have lost bytes that could not be healed.
    pub repair: bool,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// VMs looked at.
    pub vms: u64,
    /// Snapshots and drafts.
    pub snapshots: u64,
    /// Forgotten snapshots that holds keep.
    pub snapshots_held: u64,
    /// Pack objects.
    pub objects: u64,
    /// Frames whose content was compared with its fingerprints.
    pub frames_read: u64,
    /// Stored bytes of these frames.
    pub bytes_read: u64,
    /// Objects that no log knows: of writers that died, or are at work. `gc --exact` removes the former.
    pub leaked_objects: u64,
    /// Their bytes.
    pub leaked_bytes: u64,
    /// What is wrong, at most [`FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    /// Findings that are not in the list.
    pub findings_dropped: u64,
    /// Findings that mean loss.
    pub damaged: u64,
    /// Copies looked at, in a store over several targets.
    pub copies: u64,
    /// Of these, damaged or missing ones although another is whole.
    pub copies_bad: u64,
    /// Of these, repaired ones.
    pub copies_repaired: u64,
    /// Of the bad ones, those of objects that have a part that is whole in no copy.
    pub copies_hopeless: u64,
    /// Frames that were whole in no copy, and were put together again from live images.
    pub frames_mended: u64,
    /// Such frames that could not be.
    pub frames_unmended: u64,
    /// Snapshots that the log marks as damaged: a repair found bytes of them that it could not heal.
    pub snapshots_damaged: u64,
    /// Of these, snapshots that were marked, or with another number of bytes, by this check.
    pub snapshots_marked: u64,
    /// Marks that this check took away.
    pub snapshots_unmarked: u64,
    /// Targets that are not there.
    pub targets_away: Vec<String>,
    #[serde(skip)]
    lost_kept: usize,
}

impl CheckReport {
    /// Whether anything is lost: exit code 4.
    pub fn is_damaged(&self) -> bool {
        self.damaged > 0 || self.copies_bad > self.copies_repaired || !self.targets_away.is_empty()
    }

    pub(crate) fn add(&mut self, findings: Vec<Finding>, dropped: u64) {
        self.findings_dropped += dropped;
        for mut finding in findings {
            if self.lost_kept + finding.lost.len() > LOST_MAX {
                finding.lost.clear();
            }
            self.lost_kept += finding.lost.len();
            self.damaged += u64::from(finding.severity == Severity::Must);
            if self.findings.len() < FINDINGS_MAX {
                self.findings.push(finding);
            } else {
                self.findings_dropped += 1;
            }
        }
    }

    pub(crate) fn add_one(&mut self, vm: &str, object: String, what: String, severity: Severity) {
        let finding = Finding { vm: vm.to_owned(), object, snapshots: Vec::new(), lost: Vec::new(), what, severity };
        self.add(vec![finding], 0);
    }
}

/// How far a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of pack objects checked, of the VM being checked.
    pub bytes_done: u64,
    /// Bytes of its pack objects.
    pub bytes_total: u64,
    /// VMs done.
    pub vms_done: u64,
    /// VMs of the store.
    pub vms_total: u64,
}

/// Checks a store. Damage is no error: it is in the report.
///
/// Memory: one group page, the index and slot table of one pack, and 4 MiB of frames at a time, and the store's
/// caches. Cost: all metadata; with data all objects.
///
/// # Errors
/// `Invalid` options; `Unavailable` or `Denied` when the VMs cannot be listed.
pub fn check_store(store: &Store, options: CheckOptions, progress: &mut dyn FnMut(Progress)) -> Result<CheckReport> {
    check_store_from(store, options, &[], progress)
}

/// As [`check_store`]; before the VMs are checked, what is whole in no copy is healed from live images that still have
/// the blocks, as [`mend_store`] says.
///
/// # Errors
/// As [`check_store`] and [`mend_store`]; `Invalid` when there are images, but the options do not ask for repair.
pub fn check_store_from(
    store: &Store,
    options: CheckOptions,
    images: &[&dyn LiveImage],
    progress: &mut dyn FnMut(Progress),
) -> Result<CheckReport> {
    if options.sample_percent.is_some_and(|percent| !(0.0..=100.0).contains(&percent)) {
        return Err(invalid("the share of frames to check is not from 0 to 100"));
    }
    if !images.is_empty() && !options.repair {
        return Err(invalid("images to heal from, but no repair is asked for"));
    }
    let mut report = CheckReport::default();
    if let Some(replicated) = store.backend().replicated() {
        // What is found is told, and repaired only by who asks for it.
        replicated.set_healing(false);
    }
    if !images.is_empty() {
        mend_store(store, images, &mut report)?;
    }
    if let Some(replicated) = store.backend().replicated() {
        check_copies(store, replicated, options, &mut report)?;
    }
    let common = Common::check(store, options, &mut report)?;
    let rows = store.backend().list(&Key::new("vms"))?;
    for (done, row) in rows.iter().enumerate() {
        let key = format!("vms/{}", row.name);
        let name = match VmName::new(&row.name) {
            Ok(name) if row.is_folder => name,
            Ok(_) => {
                report.add_one(&row.name, key, "is no folder of a VM".into(), Severity::Should);
                continue;
            }
            Err(e) => {
                report.add_one(&row.name, key, format!("is no legal name of a VM: {e}"), Severity::Should);
                continue;
            }
        };
        let mut tell = |bytes_done, bytes_total| {
            progress(Progress { bytes_done, bytes_total, vms_done: done as u64, vms_total: rows.len() as u64 });
        };
        report.vms += 1;
        if let Err(e) = check_vm(store, &name, options, &common, &mut report, &mut tell) {
            let e: Error = e;
            report.add_one(&row.name, key, format!("cannot be checked: {e}"), Severity::Must);
        }
    }
    Ok(report)
}
