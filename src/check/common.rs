//! Checks the common home: its log, its packs, and the popular index. Comes before the VMs, which stand on it.

use std::collections::BTreeSet;
use std::sync::Arc;

use roaring::RoaringTreemap;

use crate::backend::Key;
use crate::catalog::state::VmState;
use crate::catalog::vm::{COMMON_HOME, log_prefix};
use crate::check::faults::{Faults, Severity, Subject};
use crate::check::store::{CheckOptions, CheckReport};
use crate::check::vm::{check_log, check_objects, count_leaks, list};
use crate::error::{ErrorKind, Result};
use crate::popular::index::{IndexIdentity, PopularIndex, index_key, parse_index_name};
use crate::store::Store;
use crate::units::{Epoch, PackNumber};

/// What the check of the common home found.
#[derive(Debug, Default)]
pub struct Common {
    /// Its state, if there is one.
    pub state: Option<Arc<VmState>>,
    lost_packs: BTreeSet<PackNumber>,
    lost_slots: RoaringTreemap,
}

impl Common {
    /// Checks it and adds what is found to the report.
    ///
    /// # Errors
    /// `Unavailable`, `Denied` when its folders cannot be listed.
    pub fn check(store: &Store, options: CheckOptions, report: &mut CheckReport) -> Result<Self> {
        let home = store.common_home();
        let log = log_prefix(COMMON_HOME).to_string();
        let state = match home.refresh() {
            Ok(state) => state,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let there = list(home, "packs")?.len();
                if there > 0 {
                    report.add_one("", log, format!("there is no log, but {there} packs"), Severity::Must);
                }
                return Ok(Self::default());
            }
            Err(e) => {
                report.add_one("", log, e.to_string(), Severity::Must);
                return Ok(Self::default());
            }
        };
        let mut faults = Faults::default();
        let whole = check_log(home, &mut faults)?;
        check_objects(store, home, &state, options, &mut faults, report, &mut |_, _| {});
        check_indexes(store, &state, &mut faults)?;
        if whole {
            count_leaks(home, &mut faults, report)?;
        }
        if let Ok(now) = home.refresh()
            && now.number != state.number
        {
            faults.forget_stale(&now, &[]);
        }
        let (lost_packs, lost_slots) = (faults.lost_packs.clone(), faults.lost_slots.clone());
        let (findings, dropped) = faults.into_findings(COMMON_HOME);
        report.add(findings, dropped);
        Ok(Self { state: Some(state), lost_packs, lost_slots })
    }

    /// What a VM's check begins with: it stands on the common packs.
    pub fn faults(&self) -> Faults {
        let mut faults = Faults::default();
        faults.lost_packs.clone_from(&self.lost_packs);
        faults.lost_slots.clone_from(&self.lost_slots);
        faults
    }
}

/// The popular indexes: that of the newest epoch must be whole, since writers would share nothing without it.
fn check_indexes(store: &Store, state: &VmState, faults: &mut Faults) -> Result<()> {
    let backend = &**store.backend();
    let newest = Epoch(state.popular.index);
    let mut epochs: BTreeSet<Epoch> = BTreeSet::new();
    for row in backend.list(&Key::new("common/popular"))? {
        match parse_index_name(&row.name) {
            Some(epoch) => {
                epochs.insert(epoch);
            }
            None => {
                let key = format!("common/popular/{}", row.name);
                faults.note(Subject::Other(key), Severity::Should, "is no object of snapfs");
            }
        }
    }
    if newest > Epoch(0) {
        epochs.insert(newest);
    }
    for epoch in epochs {
        let identity = IndexIdentity { incarnation: state.incarnation, epoch };
        let subject = Subject::Other(index_key(epoch).to_string());
        let severity = if epoch == newest { Severity::Must } else { Severity::Should };
        match PopularIndex::read(backend, identity, store.shares().popular_bytes) {
            Ok(index) if epoch == newest => {
                let missing = index.packs().iter().filter(|row| !state.packs.contains_key(&row.pack)).count();
                if missing > 0 {
                    faults.note(subject, Severity::Should, format!("leads to {missing} packs that are not there"));
                }
            }
            Ok(_) => {}
            // An older one goes with every election.
            Err(e) if e.kind() == ErrorKind::NotFound && epoch != newest => {}
            Err(e) if e.kind() == ErrorKind::NotFound => faults.note(subject, severity, "is missing"),
            Err(e) => faults.note(subject, severity, e.to_string()),
        }
    }
    Ok(())
}
