//! A VM in the catalog: reads its log, and appends to it with create-only puts, which order all writers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::backend::{Backend, Key};
use crate::catalog::record::{Attributes, Op, Record};
use crate::catalog::state::VmState;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result, busy, corrupt, not_found};
use crate::limits::{LOG_CHECKPOINT_INTERVAL, LOG_RECORD_BYTES_MAX};
use crate::pack::index::object_name;
use crate::pack::reader::{Locate, ObjectPlace};
use crate::units::{Incarnation, ObjectId, PackNumber, RecordNumber};

/// How often a record is tried again when others append at the same time.
const APPEND_TRIES: usize = 1000;

/// The folder of a VM's log.
pub fn log_prefix(vm: &str) -> Key {
    Key::new(format!("vms/{vm}/log"))
}

/// The key of a log record.
pub fn record_key(vm: &str, number: RecordNumber) -> Key {
    Key::new(format!("vms/{vm}/log/{:010}", number.0))
}

/// The key of a pack object.
pub fn pack_key(vm: &str, object: ObjectId) -> Key {
    Key::new(format!("vms/{vm}/packs/{}", object_name(object)))
}

fn parse_record_name(name: &str) -> Option<RecordNumber> {
    let number = RecordNumber(name.parse().ok()?);
    (format!("{:010}", number.0) == name).then_some(number)
}

/// A VM and what is known of its log.
pub struct Vm {
    name: String,
    backend: Arc<dyn Backend>,
    clock: Arc<dyn Clock>,
    state: RwLock<Known>,
    // One refresh or append of this process at a time; readers of `state` do not wait for it.
    appending: Mutex<()>,
}

#[derive(Clone)]
struct Known {
    state: Arc<VmState>,
    // Why the log cannot be read further. Reading goes on with what is known, writing does not.
    damage: Option<Arc<Error>>,
}

impl Vm {
    /// A VM whose log is not read yet.
    pub fn new(name: &str, backend: Arc<dyn Backend>, clock: Arc<dyn Clock>) -> Self {
        let state = RwLock::new(Known { state: Arc::default(), damage: None });
        Self { name: name.to_owned(), backend, clock, state, appending: Mutex::new(()) }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is known; no I/O.
    pub fn state(&self) -> Arc<VmState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).state.clone()
    }

    /// Why the log cannot be read to its end, if so; no I/O.
    pub fn damage(&self) -> Option<Arc<Error>> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).damage.clone()
    }

    fn appending(&self) -> MutexGuard<'_, ()> {
        self.appending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn know(&self, state: Arc<VmState>, damage: Option<Arc<Error>>) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = Known { state, damage };
    }

    /// Reads what is new in the log. Cost: one listing, and a read per new record.
    ///
    /// A log that is damaged at its end is read as far as it is whole: see [`Vm::damage`].
    ///
    /// # Errors
    /// `NotFound` when there is no such VM, `Corrupt` when nothing of the log can be used, `Unavailable`.
    pub fn refresh(&self) -> Result<Arc<VmState>> {
        let _appending = self.appending();
        self.refresh_locked()
    }

    fn refresh_locked(&self) -> Result<Arc<VmState>> {
        // Records vanish under a reader when another process writes a checkpoint: then look again.
        let mut last = None;
        for _ in 0..16 {
            match self.read_log() {
                Err(e) if e.kind() == ErrorKind::NotFound && last.is_none_or(|l| l < 15) => {
                    last = Some(last.unwrap_or(0) + 1);
                    if self.numbers()?.is_empty() {
                        return Err(not_found(format!("VM {:?} is not there", self.name)));
                    }
                }
                done => return done,
            }
        }
        Err(Error::new(ErrorKind::Unavailable, format!("vms/{}/log: changes faster than it can be read", self.name)))
    }

    fn numbers(&self) -> Result<Vec<RecordNumber>> {
        let rows = self.backend.list(&log_prefix(&self.name))?;
        let mut numbers: Vec<_> = rows.iter().filter_map(|row| parse_record_name(&row.name)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn read_record(&self, number: RecordNumber) -> Result<Record> {
        let key = record_key(&self.name, number);
        let bytes = self.backend.read_all(&key, LOG_RECORD_BYTES_MAX)?;
        let record = Record::from_object(&bytes).map_err(|e| e.within(&key))?;
        if record.number == number {
            Ok(record)
        } else {
            Err(corrupt(format!("{key}: is record {}", record.number.0)))
        }
    }

    fn read_log(&self) -> Result<Arc<VmState>> {
        let numbers = self.numbers()?;
        let known = self.state();
        let Some(newest) = numbers.last().copied() else {
            return Err(not_found(format!("VM {:?} is not there", self.name)));
        };
        if newest == known.number && self.damage().is_none() {
            return Ok(known);
        }
        // Backwards to what is known, or to the newest whole checkpoint.
        let mut records: Vec<Record> = Vec::new();
        let mut damage: Option<Error> = None;
        let mut base = None;
        for number in numbers.iter().rev().copied() {
            if number <= known.number {
                if number == known.number {
                    base = Some((*known).clone());
                }
                break;
            }
            match self.read_record(number) {
                Ok(record) if self.is_strange_checkpoint(&record, &known, records.last())? => {
                    damage = Some(corrupt(format!("{}: checkpoint of another VM", record_key(&self.name, number))));
                }
                Ok(record) => {
                    let is_base = record.checkpoint().is_some() || number == RecordNumber(1);
                    records.push(record);
                    if is_base {
                        base = Some(VmState::default());
                        break;
                    }
                }
                Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => damage = Some(e),
                Err(e) => return Err(e),
            }
        }
        let Some(mut state) = base else {
            let missing = format!("vms/{}/log: neither its first record nor a checkpoint is whole", self.name);
            return Err(match damage {
                Some(e) => e.within(missing),
                None => corrupt(missing),
            });
        };
        for record in records.iter().rev() {
            let mut next = state.clone();
            match next.apply(record) {
                Ok(()) => state = next,
                // What comes after a gap or a damaged record cannot be trusted to be all there is.
                Err(e) => {
                    damage = Some(damage.unwrap_or(e));
                    break;
                }
            }
        }
        let damage = damage.map(|e| Arc::new(e.within(format!("VM {:?}: log is damaged", self.name))));
        let state = Arc::new(state);
        self.know(state.clone(), damage);
        Ok(state)
    }

    /// Whether a checkpoint, which brings its own state, is of another VM than the records around it: whoever
    /// believed it would take all objects of this VM for leaked. Cost: a read when nothing is behind it.
    fn is_strange_checkpoint(&self, record: &Record, known: &VmState, behind: Option<&Record>) -> Result<bool> {
        if record.checkpoint().is_none() {
            return Ok(false);
        }
        if known.number != RecordNumber(0) {
            return Ok(record.incarnation != known.incarnation);
        }
        let is_strange_behind = behind.map(|b| b.incarnation != record.incarnation);
        if is_strange_behind == Some(false) {
            return Ok(false);
        }
        match self.read_record(RecordNumber(record.number.0.saturating_sub(1))) {
            Ok(before) => Ok(record.incarnation != before.incarnation),
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::NotFound) => {
                Ok(is_strange_behind == Some(true))
            }
            Err(e) => Err(e),
        }
    }

    /// Appends one record made from the newest state. `change` may run several times, each time on the state that
    /// its record will follow; when it returns no ops, nothing is written.
    ///
    /// Cost: a listing and a put; more when others append at the same time.
    ///
    /// # Errors
    /// What `change` returns; `Busy` when `session` has been fenced by another writer; `Corrupt` when the log is
    /// damaged; `NoSpace`, `ReadOnly`, `Unavailable`. After `Unavailable` the record may or may not be there.
    pub fn append<T>(
        &self,
        session: Option<RecordNumber>,
        mut change: impl FnMut(&VmState) -> Result<(Vec<Op>, T)>,
    ) -> Result<T> {
        let _appending = self.appending();
        for _ in 0..APPEND_TRIES {
            let state = self.refresh_locked()?;
            if let Some(damage) = self.damage() {
                return Err(damage.duplicate());
            }
            check_session(&self.name, &state, session)?;
            let (ops, value) = change(&state)?;
            if ops.is_empty() {
                return Ok(value);
            }
            if self.put(&state, session, ops)? {
                self.checkpoint_if_due();
                return Ok(value);
            }
        }
        Err(busy(format!("VM {:?}: others write to its log all the time", self.name)))
    }

    /// Puts a record after `state`; `false` when another one is there already.
    fn put(&self, state: &Arc<VmState>, session: Option<RecordNumber>, ops: Vec<Op>) -> Result<bool> {
        let number = state.number.next()?;
        let record = Record { incarnation: state.incarnation, number, time: self.clock.now(), session, ops };
        let mut next = (**state).clone();
        // A record that does not apply must never be written.
        next.apply(&record).map_err(|e| e.as_kind(ErrorKind::Invalid))?;
        let key = record_key(&self.name, number);
        let object = record.to_object();
        match self.put_durably(&key, &object) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::Exists => return Ok(false),
            // May or may not be there: only what is there tells.
            Err(e) if e.kind() == ErrorKind::Unavailable => match self.backend.read_all(&key, LOG_RECORD_BYTES_MAX) {
                Ok(there) if there == object => {}
                Ok(_) => return Ok(false),
                Err(_) => return Err(e),
            },
            Err(e) => return Err(e),
        }
        self.know(Arc::new(next), None);
        Ok(true)
    }

    /// A log record is what frees space, so it may use the reserve.
    fn put_durably(&self, key: &Key, object: &[u8]) -> Result<()> {
        match self.backend.put_new(key, object) {
            Err(e) if e.kind() == ErrorKind::NoSpace && self.backend.release_reserve() => {
                self.backend.put_new(key, object)
            }
            done => done,
        }
    }

    /// Writes the whole state now and then, and removes the records that no reader needs any more. The checkpoint
    /// before the newest stays with all that follows it: a damaged checkpoint then costs nothing.
    fn checkpoint_if_due(&self) {
        let state = self.state();
        let since = u64::from(state.number.0 - state.checkpoints.0.0);
        if since < LOG_CHECKPOINT_INTERVAL {
            return;
        }
        let op = Op::Checkpoint { state: Box::new((*state).clone()) };
        match self.put(&state, None, vec![op]) {
            Ok(true) => {}
            // Another process was faster, or there is no room: the next record tries again.
            Ok(false) => return,
            Err(e) => {
                log::debug!("VM {:?}: no checkpoint: {e}", self.name);
                return;
            }
        }
        let needed = self.state().checkpoints.1;
        let Ok(numbers) = self.numbers() else { return };
        for number in numbers.into_iter().take_while(|n| *n < needed) {
            if let Err(e) = self.backend.delete(&record_key(&self.name, number)) {
                log::debug!("VM {:?}: old record stays: {e}", self.name);
                return;
            }
        }
    }

    /// Makes the VM if it is not there; returns whether it did.
    ///
    /// # Errors
    /// `NoSpace`, `ReadOnly`, `Unavailable`, `Corrupt` (its log is damaged).
    pub fn create(&self, attributes: Attributes) -> Result<bool> {
        match self.refresh() {
            Ok(_) => self.append(None, |state| {
                if state.exists() { Ok((Vec::new(), false)) } else { Ok((vec![Op::Create { attributes }], true)) }
            }),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let appending = self.appending();
                let mut incarnation = Incarnation::default();
                fill_random(&mut incarnation.0)?;
                let state = Arc::new(VmState::of_new_vm(incarnation));
                let made = self.put(&state, None, vec![Op::Create { attributes }])?;
                drop(appending);
                // Somebody else was faster: then it is there, and has to be read.
                if made { Ok(true) } else { self.create(attributes) }
            }
            Err(e) => Err(e),
        }
    }

    /// The place of a pack by a state.
    fn place(&self, state: &VmState, pack: PackNumber) -> Result<ObjectPlace> {
        let entry = state.pack(pack).map_err(|e| e.within(format!("VM {:?}", self.name)))?;
        Ok(ObjectPlace {
            key: pack_key(&self.name, entry.object),
            incarnation: state.incarnation,
            object: entry.object,
            content: entry.content,
            bytes: entry.object_bytes,
            tail_bytes: entry.tail_bytes,
        })
    }

    /// Where objects are.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The time by the store's clock.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }
}

fn check_session(vm: &str, state: &VmState, session: Option<RecordNumber>) -> Result<()> {
    let Some(begin) = session else { return Ok(()) };
    match &state.session {
        Some(now) if now.begin == begin => Ok(()),
        Some(now) => Err(busy(format!("VM {vm:?}: another writer took over: process {} on {}", now.process, now.host))),
        None => Err(busy(format!("VM {vm:?}: the writer's begin record is gone"))),
    }
}

/// Fills `out` with random bytes of the kernel.
///
/// # Errors
/// `Unavailable`.
pub fn fill_random(out: &mut [u8]) -> Result<()> {
    let mut rest = out;
    while !rest.is_empty() {
        let count = rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::io("random bytes", e.into()))?;
        rest = rest.get_mut(count..).unwrap_or_default();
    }
    Ok(())
}

impl Locate for Vm {
    fn locate(&self, pack: PackNumber) -> Result<ObjectPlace> {
        match self.place(&self.state(), pack) {
            Ok(place) => Ok(place),
            // Written since the log was read.
            Err(_) => self.relocate(pack),
        }
    }

    fn relocate(&self, pack: PackNumber) -> Result<ObjectPlace> {
        let state = self.refresh()?;
        self.place(&state, pack)
    }
}
