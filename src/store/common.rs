//! The common home: the packs of blocks that several VMs hold, and the popular set's epochs.
//!
//! It has a log as a VM has. Many writers may add packs at the same time: each *joins* with a record of its own, from
//! which its numbers derive, and brings its packs with another; neither fences anybody, since adding commutes. Who takes
//! something away (G6) or publishes an epoch is exclusive: a [`crate::store::session::Session`] of the common home.

use std::sync::{Arc, Mutex, PoisonError};

use crate::catalog::record::{Attributes, Op, PackEntry};
use crate::catalog::state::VmState;
use crate::catalog::vm::Vm;
use crate::error::{Error, ErrorKind, Result, busy};
use crate::pack::reader::{Locate, ObjectPlace, Packs};
use crate::store::Store;
use crate::units::{PackNumber, RecordNumber, Serial, VmGroup};

/// Where packs are made: a VM's session, or somebody who adds common packs.
pub trait PackHome: Send + Sync {
    /// Whose log will name the packs.
    fn home(&self) -> &Arc<Vm>;

    /// Where they are shown while they are written.
    fn packs(&self) -> &Arc<Packs>;

    /// A number that was never used in this home.
    ///
    /// # Errors
    /// `Busy` when the writer was fenced; as [`Vm::append`].
    fn next_serial(&self) -> Result<Serial>;
}

/// Finds the packs of a VM and, by their numbers, common ones.
pub struct Homes {
    /// The VM.
    pub vm: Arc<Vm>,
    /// The common home.
    pub common: Arc<Vm>,
}

impl Homes {
    fn of(&self, pack: PackNumber) -> &Vm {
        if pack.is_common() { &self.common } else { &self.vm }
    }
}

impl Locate for Homes {
    fn locate(&self, pack: PackNumber) -> Result<ObjectPlace> {
        self.of(pack).locate(pack).map_err(as_lost)
    }

    fn relocate(&self, pack: PackNumber) -> Result<ObjectPlace> {
        self.of(pack).relocate(pack).map_err(as_lost)
    }
}

/// Somebody who adds common packs of one VM group. Joins when the first number is wanted.
pub struct CommonAdder {
    home: Arc<Vm>,
    packs: Arc<Packs>,
    group: VmGroup,
    folder: Attributes,
    serials: Mutex<Option<(RecordNumber, u32)>>,
}

impl CommonAdder {
    /// Nothing is written yet. `packs` shows what is being written: to the VM that will refer to it.
    pub fn new(store: &Store, packs: Arc<Packs>, group: VmGroup) -> Self {
        Self::of(store.common_home().clone(), store.new_folder(), packs, group)
    }

    /// The same for the common home of an open store; `folder` is what it is made with, if it is not there yet.
    pub fn of(home: Arc<Vm>, folder: Attributes, packs: Arc<Packs>, group: VmGroup) -> Self {
        Self { home, packs, group, folder, serials: Mutex::new(None) }
    }

    /// Tells the log of packs that are durable: from now on anything may refer to them.
    ///
    /// # Errors
    /// `Busy` when their writer was fenced; as [`Vm::append`]. After `Unavailable` the record may be there.
    pub fn bring(&self, packs: &[PackEntry]) -> Result<()> {
        if packs.is_empty() {
            return Ok(());
        }
        self.home.append(None, |state| {
            if packs.iter().any(|pack| pack.number.begin() < state.popular.fence) {
                return Err(busy("common packs: whoever adds these was held to be dead"));
            }
            // Packs of an append whose outcome was not known.
            let new: Vec<PackEntry> = packs.iter().filter(|p| !state.packs.contains_key(&p.number)).copied().collect();
            let op = Op::Bring { group: self.group, packs: new.clone() };
            Ok((if new.is_empty() { Vec::new() } else { vec![op] }, ()))
        })?;
        // Collection may move them from here on: the log knows where they are, not the writer.
        packs.iter().for_each(|pack| self.packs.hide(pack.number));
        Ok(())
    }

    fn join(&self) -> Result<RecordNumber> {
        self.home.create(self.folder)?;
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let process = std::process::id();
        self.home.append(None, |state| Ok((vec![Op::Join { host: host.clone(), process }], state.number.next()?)))
    }
}

impl PackHome for CommonAdder {
    fn home(&self) -> &Arc<Vm> {
        &self.home
    }

    fn packs(&self) -> &Arc<Packs> {
        &self.packs
    }

    fn next_serial(&self) -> Result<Serial> {
        let mut serials = self.serials.lock().unwrap_or_else(PoisonError::into_inner);
        let (begin, next) = match *serials {
            Some((begin, next)) if u16::try_from(next).is_ok() => (begin, next),
            _ => (self.join()?, 0),
        };
        *serials = Some((begin, next + 1));
        Ok(Serial::common(begin, next as u16))
    }
}

/// The state of the common home; `None` when there is none yet. Cost: a listing, and a read for each new record.
///
/// # Errors
/// `Corrupt` when its log cannot be read to its end, `Unavailable`.
pub fn common_state(home: &Vm) -> Result<Option<Arc<VmState>>> {
    match home.refresh() {
        Ok(state) => match home.damage() {
            Some(damage) => Err(damage.duplicate()),
            None => Ok(Some(state)),
        },
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// The VM group of this name; the empty name is that of all VMs without one.
pub fn group_of(name: &str) -> VmGroup {
    if name.is_empty() {
        return VmGroup::default();
    }
    VmGroup(crate::fingerprint::short(b"snapfs group", &[name.as_bytes()]))
}

/// Who refers to a pack of a home that is not there stands on damage.
fn as_lost(e: Error) -> Error {
    match e.kind() {
        ErrorKind::NotFound => e.as_kind(ErrorKind::Corrupt),
        _ => e,
    }
}
