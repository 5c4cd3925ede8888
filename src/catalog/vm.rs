//! A VM in the catalog: reads its log, and appends to it with create-only puts, which order all writers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::backend::replicate::Replicated;
use crate::backend::{Backend, Key};
use crate::catalog::record::{Attributes, Op, PackEntry, Record, checkpoint_object, open_checkpoint};
use crate::catalog::state::VmState;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result, busy, corrupt, not_found};
use crate::limits::{LOG_CHECKPOINT_INTERVAL, LOG_RECORD_BYTES_MAX};
use crate::pack::index::object_name;
use crate::pack::reader::{Locate, ObjectPlace};
use crate::random::fill_random;
use crate::units::{Incarnation, ObjectId, PackNumber, RecordNumber, RootId};

/// How often a record is tried again when others append at the same time.
const APPEND_TRIES: usize = 1000;

/// The home of common packs, where a VM's name is expected: no VM can be called so. It has a log and packs as a VM has.
pub const COMMON_HOME: &str = "/common";

/// The folder of a VM, or of the common home.
pub fn home_folder(vm: &str) -> String {
    match vm {
        COMMON_HOME => "common".to_owned(),
        vm => format!("vms/{vm}"),
    }
}

/// What a VM or the common home is called in messages.
pub fn title(vm: &str) -> String {
    match vm {
        COMMON_HOME => "common packs".to_owned(),
        vm => format!("VM {vm:?}"),
    }
}

/// The folder of a VM's log.
pub fn log_prefix(vm: &str) -> Key {
    Key::new(format!("{}/log", home_folder(vm)))
}

/// The key of a log record.
pub fn record_key(vm: &str, number: RecordNumber) -> Key {
    Key::new(format!("{}/log/{:010}", home_folder(vm), number.0))
}

/// The key of a pack object.
pub fn pack_key(vm: &str, object: ObjectId) -> Key {
    Key::new(format!("{}/packs/{}", home_folder(vm), object_name(object)))
}

/// Where the object that holds a pack is, by the entry that the log has of the pack.
pub fn object_place(vm: &str, incarnation: Incarnation, entry: &PackEntry) -> ObjectPlace {
    ObjectPlace {
        key: pack_key(vm, entry.object),
        incarnation,
        object: entry.object,
        content: entry.content,
        bytes: entry.object_bytes,
        tail_bytes: entry.tail_bytes,
    }
}

/// The key of a checkpoint: the state after a record.
pub fn checkpoint_key(vm: &str, number: RecordNumber) -> Key {
    Key::new(format!("{}/log/{:010}.checkpoint", home_folder(vm), number.0))
}

/// What a file name in a log stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogEntry {
    /// A record.
    Record(RecordNumber),
    /// The state after a record.
    Checkpoint(RecordNumber),
}

/// What a file name in a log stands for, if it is spelled as the writer spells it.
pub fn parse_log_name(name: &str) -> Option<LogEntry> {
    let (digits, is_checkpoint) = match name.strip_suffix(".checkpoint") {
        Some(digits) => (digits, true),
        None => (name, false),
    };
    let number = RecordNumber(digits.parse().ok()?);
    let is_ours = format!("{:010}", number.0) == digits;
    is_ours.then_some(if is_checkpoint { LogEntry::Checkpoint(number) } else { LogEntry::Record(number) })
}

/// The entries of a log: records and checkpoints, ascending.
#[derive(Debug, Default)]
struct Numbers {
    records: Vec<RecordNumber>,
    checkpoints: Vec<RecordNumber>,
}

/// A VM and what is known of its log.
pub struct Vm {
    name: String,
    backend: Arc<dyn Backend>,
    clock: Arc<dyn Clock>,
    state: RwLock<Known>,
    // One refresh or append of this process at a time; readers of `state` do not wait for it.
    appending: Mutex<()>,
    // Whose records these are, where copies had to be asked for it.
    agreed: Mutex<Option<Incarnation>>,
}

#[derive(Clone)]
struct Known {
    state: Arc<VmState>,
    // The newest checkpoint that was seen.
    checkpoint: RecordNumber,
    // Why the log cannot be read further. Reading goes on with what is known, writing does not.
    damage: Option<Arc<Error>>,
}

impl Vm {
    /// A VM whose log is not read yet.
    pub fn new(name: &str, backend: Arc<dyn Backend>, clock: Arc<dyn Clock>) -> Self {
        let state = RwLock::new(Known { state: Arc::default(), checkpoint: RecordNumber(0), damage: None });
        Self { name: name.to_owned(), backend, clock, state, appending: Mutex::new(()), agreed: Mutex::default() }
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

    fn know(&self, state: Arc<VmState>, checkpoint: Option<RecordNumber>, damage: Option<Arc<Error>>) {
        let mut known = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let checkpoint = checkpoint.unwrap_or(known.checkpoint);
        *known = Known { state, checkpoint, damage };
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
                    if self.numbers()?.records.is_empty() {
                        return Err(not_found(format!("{} is not there", title(&self.name))));
                    }
                }
                done => return done,
            }
        }
        Err(Error::new(
            ErrorKind::Unavailable,
            format!("{}: changes faster than it can be read", log_prefix(&self.name)),
        ))
    }

    fn numbers(&self) -> Result<Numbers> {
        let mut numbers = Numbers::default();
        for row in self.backend.list(&log_prefix(&self.name))? {
            match parse_log_name(&row.name) {
                Some(LogEntry::Record(number)) => numbers.records.push(number),
                Some(LogEntry::Checkpoint(number)) => numbers.checkpoints.push(number),
                None => {}
            }
        }
        numbers.records.sort_unstable();
        numbers.checkpoints.sort_unstable();
        Ok(numbers)
    }

    fn read_record(&self, number: RecordNumber) -> Result<Record> {
        let key = record_key(&self.name, number);
        let mut record = None;
        let agreed = *self.agreed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut verify = |bytes: &[u8]| {
            let read = open_numbered(&key, bytes, number)?;
            if agreed.is_some_and(|agreed| agreed != read.incarnation) {
                return Err(corrupt(format!("{key}: is of another VM")));
            }
            record = Some(read);
            Ok(())
        };
        self.backend.read_all_checked(&key, LOG_RECORD_BYTES_MAX, &mut verify)?;
        record.ok_or_else(|| corrupt(format!("{key}: was not read")))
    }

    fn read_checkpoint(&self, number: RecordNumber) -> Result<VmState> {
        let key = checkpoint_key(&self.name, number);
        let agreed = *self.agreed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = None;
        let mut verify = |bytes: &[u8]| {
            let told = open_checkpoint(bytes).map_err(|e| e.within(&key))?;
            if told.number != number {
                return Err(corrupt(format!("{key}: is of record {}", told.number.0)));
            }
            if agreed.is_some_and(|agreed| agreed != told.incarnation) {
                return Err(corrupt(format!("{key}: is of another VM")));
            }
            state = Some(told);
            Ok(())
        };
        self.backend.read_all_checked(&key, LOG_RECORD_BYTES_MAX, &mut verify)?;
        state.ok_or_else(|| corrupt(format!("{key}: was not read")))
    }

    /// Reads the log. Where there are copies and what was read does not go together, one of them may be another VM's:
    /// then what most copies say decides, and the log is read again.
    fn read_log(&self) -> Result<Arc<VmState>> {
        let outcome = self.read_log_once();
        let is_damaged = match &outcome {
            Ok(_) => self.damage().is_some(),
            Err(e) => e.kind() == ErrorKind::Corrupt,
        };
        let was_agreed = self.agreed.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        match self.backend.replicated() {
            Some(copies) if is_damaged && !was_agreed => {
                let agreed = incarnation_by_copies(&self.name, copies)?;
                *self.agreed.lock().unwrap_or_else(PoisonError::into_inner) = agreed;
                // What was read of another VM must not count for anything.
                self.know(Arc::default(), Some(RecordNumber(0)), None);
                self.read_log_once()
            }
            _ => outcome,
        }
    }

    fn read_log_once(&self) -> Result<Arc<VmState>> {
        let numbers = self.numbers()?;
        let known = self.state();
        let Some(newest) = numbers.records.last().copied() else {
            return Err(not_found(format!("{} is not there", title(&self.name))));
        };
        let checkpoint = numbers.checkpoints.last().copied().unwrap_or_default();
        if newest == known.number && self.damage().is_none() {
            self.know(known.clone(), Some(checkpoint), None);
            return Ok(known);
        }
        let (base, mut damage) = self.base(&numbers, &known)?;
        let mut records = Vec::new();
        for number in numbers.records.iter().copied().filter(|n| *n > base.number) {
            match self.read_record(number) {
                Ok(record) => records.push(record),
                Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                    // What comes after it cannot be trusted to be all there is.
                    damage = Some(e);
                    break;
                }
                Err(e) => return Err(e),
            }
        }
        let (state, broken) = replay(&base, &records);
        let damage = broken.or(damage).filter(|_| state.number < newest);
        let damage = damage.map(|e| Arc::new(e.within(format!("{}: log is damaged", title(&self.name)))));
        let state = Arc::new(state);
        self.know(state.clone(), Some(checkpoint), damage);
        Ok(state)
    }

    /// Where reading begins: what is known, the newest whole checkpoint, or nothing before the first record. With it
    /// the damage that was met on the way, which counts only if what follows cannot make up for it.
    fn base(&self, numbers: &Numbers, known: &VmState) -> Result<(VmState, Option<Error>)> {
        let has = |number: RecordNumber| numbers.records.binary_search(&number).is_ok();
        if known.number > RecordNumber(0) && has(known.number) && known.number.next().is_ok_and(has) {
            return Ok((known.clone(), None));
        }
        let mut damage = None;
        for number in numbers.checkpoints.iter().rev().copied() {
            if number < known.number && has(known.number) {
                break;
            }
            // A record beside it proves that it is this VM's.
            let witness = if has(number) { number } else { number.next()? };
            let told = self.read_checkpoint(number).and_then(|state| match self.read_record(witness) {
                Ok(record) if record.incarnation != state.incarnation => {
                    Err(corrupt(format!("{}: is of another VM", checkpoint_key(&self.name, number))))
                }
                Err(e) if e.kind() == ErrorKind::NotFound => Err(e),
                _ => Ok(state),
            });
            match told {
                Ok(state) => return Ok((state, damage)),
                Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => damage = Some(e),
                Err(e) => return Err(e),
            }
        }
        if known.number > RecordNumber(0) && has(known.number) {
            return Ok((known.clone(), damage));
        }
        if numbers.records.first() == Some(&RecordNumber(1)) {
            return Ok((VmState::default(), damage));
        }
        let missing = format!("{}: neither its first record nor a checkpoint is whole", log_prefix(&self.name));
        Err(match damage {
            Some(e) => e.within(missing),
            None => corrupt(missing),
        })
    }

    /// The entries of the log that tell since when root pages are condemned: the record that says so of each, or the
    /// oldest whole checkpoint that has it. What is condemned later than `until` is left out.
    ///
    /// Cost: a listing, a checkpoint, and a read for each record since.
    ///
    /// # Errors
    /// `NotFound` when others deleted meanwhile what is read, `Corrupt`, `Unsupported`, `Unavailable`.
    pub fn condemned_since(&self, until: RecordNumber) -> Result<BTreeMap<RootId, Key>> {
        let numbers = self.numbers()?;
        let whole = numbers.checkpoints.iter().filter(|n| **n <= until).find_map(|n| self.read_checkpoint(*n).ok());
        let mut state = whole.unwrap_or_default();
        let first = state.number;
        let oldest = checkpoint_key(&self.name, first);
        let mut since: BTreeMap<RootId, Key> = state.condemned.keys().map(|root| (*root, oldest.clone())).collect();
        for number in numbers.records.iter().copied().filter(|n| *n > first && *n <= until) {
            state.apply(&self.read_record(number)?)?;
            for root in state.condemned.keys().filter(|root| !since.contains_key(root)).copied().collect::<Vec<_>>() {
                since.insert(root, record_key(&self.name, number));
            }
        }
        Ok(since)
    }

    /// Appends one record made from the newest state. `change` may run several times, each time on the state that
    /// its record will follow; when it returns no ops, nothing is written.
    ///
    /// Cost: two listings and a put; more when others append at the same time.
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
            if state.number > RecordNumber(0) {
                self.settle(state.number)?;
            }
            if self.put(&state, session, ops)? {
                self.checkpoint_if_due();
                return Ok(value);
            }
        }
        Err(busy(format!("{}: others write to its log all the time", title(&self.name))))
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
        if object.len() as u64 > LOG_RECORD_BYTES_MAX {
            return Err(Error::new(ErrorKind::TooLarge, format!("{key}: record of {} bytes", object.len())));
        }
        match self.put_durably(&key, &object) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::Exists => return Ok(false),
            // May or may not be there: only what is there tells.
            Err(e) if e.kind() == ErrorKind::Unavailable => {
                if self.settle(number).is_err() {
                    return Err(e);
                }
                match self.backend.read_all(&key, LOG_RECORD_BYTES_MAX) {
                    Ok(there) if there == object => {}
                    Ok(_) => return Ok(false),
                    Err(_) => return Err(e),
                }
            }
            Err(e) => return Err(e),
        }
        if self.is_too_late(&key, number)? {
            return Ok(false);
        }
        self.know(Arc::new(next), None, None);
        Ok(true)
    }

    /// Sees that a record is on enough targets before another one follows it. Free where there is one target.
    fn settle(&self, number: RecordNumber) -> Result<()> {
        let key = record_key(&self.name, number);
        self.backend.settle(&key, &mut |bytes| open_numbered(&key, bytes, number).map(drop))
    }

    /// Whether a record that was just put under a free key stands where another stood: who is paused for two
    /// checkpoints between reading the log and putting finds the key free because the record that took it was
    /// deleted, and nobody will ever read what is put there. Cost: one listing.
    ///
    /// # Errors
    /// `Unavailable`: the record may or may not count.
    fn is_too_late(&self, key: &Key, number: RecordNumber) -> Result<bool> {
        // The record is there: one failure to look is no reason to tell that it may not be.
        let numbers = self.numbers().or_else(|_| self.numbers())?;
        // A record is deleted when two checkpoints cover it; from then on there are always two.
        if numbers.checkpoints.iter().filter(|n| **n >= number).count() < 2 {
            return Ok(false);
        }
        // Records are deleted lowest first: one that was there in time does not outlive the next.
        let has = |number: RecordNumber| numbers.records.binary_search(&number).is_ok();
        if !has(number) || has(number.next()?) {
            let what = format!("{key}: others wrote two checkpoints meanwhile, whether it counts is not known");
            return Err(Error::new(ErrorKind::Unavailable, what));
        }
        self.backend.delete(key)?;
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

    /// Writes the whole state now and then, and removes what no reader needs any more. The checkpoint before the
    /// newest stays with all records that follow it: a damaged checkpoint then costs nothing.
    fn checkpoint_if_due(&self) {
        let known = self.state.read().unwrap_or_else(PoisonError::into_inner).clone();
        let number = known.state.number;
        if u64::from(number.0 - known.checkpoint.0.min(number.0)) < LOG_CHECKPOINT_INTERVAL {
            return;
        }
        let object = checkpoint_object(&known.state);
        if object.len() as u64 > LOG_RECORD_BYTES_MAX {
            log::warn!("{}: its state of {} bytes is too large for a checkpoint", title(&self.name), object.len());
            return;
        }
        match self.backend.put_new(&checkpoint_key(&self.name, number), &object) {
            // Another process wrote the same state: just as good.
            Err(e) if e.kind() != ErrorKind::Exists => {
                log::debug!("{}: no checkpoint: {e}", title(&self.name));
                return;
            }
            _ => {}
        }
        self.know(known.state, Some(number), None);
        let Ok(numbers) = self.numbers() else { return };
        let Some(needed) = numbers.checkpoints.iter().rev().nth(1).copied() else { return };
        // Records first: a checkpoint without what follows it would be of no use to anybody.
        let old_records = numbers.records.iter().filter(|n| **n <= needed).map(|n| record_key(&self.name, *n));
        let old_checkpoints =
            numbers.checkpoints.iter().filter(|n| **n < needed).map(|n| checkpoint_key(&self.name, *n));
        for key in old_records.chain(old_checkpoints) {
            if let Err(e) = self.backend.delete(&key) {
                log::debug!("{key}: stays: {e}");
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
        let entry = state.pack(pack).map_err(|e| e.within(title(&self.name)))?;
        Ok(object_place(&self.name, state.incarnation, entry))
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

/// The incarnation that most copies of the log's entries have. Cost: reads all of them.
///
/// # Errors
/// `Unavailable`.
pub fn incarnation_by_copies(vm: &str, replicated: &Replicated) -> Result<Option<Incarnation>> {
    let mut votes: BTreeMap<[u8; 16], usize> = BTreeMap::new();
    for row in replicated.list(&log_prefix(vm))? {
        let Some(entry) = parse_log_name(&row.name) else { continue };
        let key = Key::new(format!("{}/{}", log_prefix(vm), row.name));
        // While objects move, the homes may have nothing yet.
        for target in replicated.places(&key).all() {
            let Ok(bytes) = target.read_all(&key, LOG_RECORD_BYTES_MAX) else { continue };
            let told = match entry {
                LogEntry::Record(_) => Record::from_object(&bytes).map(|record| record.incarnation),
                LogEntry::Checkpoint(_) => open_checkpoint(&bytes).map(|state| state.incarnation),
            };
            if let Ok(incarnation) = told {
                *votes.entry(incarnation.0).or_default() += 1;
            }
        }
    }
    Ok(votes.into_iter().max_by_key(|(_, count)| *count).map(|(incarnation, _)| Incarnation(incarnation)))
}

fn open_numbered(key: &Key, bytes: &[u8], number: RecordNumber) -> Result<Record> {
    let record = Record::from_object(bytes).map_err(|e| e.within(key))?;
    if record.number == number { Ok(record) } else { Err(corrupt(format!("{key}: is record {}", record.number.0))) }
}

fn check_session(vm: &str, state: &VmState, session: Option<RecordNumber>) -> Result<()> {
    let Some(begin) = session else { return Ok(()) };
    match &state.session {
        Some(now) if now.begin == begin => Ok(()),
        Some(now) => {
            Err(busy(format!("{}: another writer took over: process {} on {}", title(vm), now.process, now.host)))
        }
        None => Err(busy(format!("{}: the writer's begin record is gone", title(vm)))),
    }
}

/// Applies records in order; the state after the last good one, and what is wrong with the next.
fn replay(base: &VmState, records: &[Record]) -> (VmState, Option<Error>) {
    let mut state = base.clone();
    for (at, record) in records.iter().enumerate() {
        if let Err(e) = state.apply(record) {
            // The state is half changed now: once more, up to here.
            let good = records.get(..at).unwrap_or_default();
            return (replay(base, good).0, Some(e));
        }
    }
    (state, None)
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
