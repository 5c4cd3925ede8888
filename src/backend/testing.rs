//! Doubles for tests; not used by the program: objects in memory, a recorder of calls, and enumerated faults.
//!
//! [`Recorder`] and [`Faulty`] stand before any other backend, so they can be stacked in any order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::replicate::Replicated;
use crate::backend::{Backend, Guard, Key, Listed, Upload};
use crate::error::{Error, ErrorKind, Result, corrupt, invalid, not_found};
use crate::limits::RESERVE_BYTES;

/// Calls that a [`Recorder`] keeps in order. Later ones are only counted.
pub const LOG_CALLS_MAX: usize = 100_000;

/// The reserve of a [`Memory`] with a limit is at most this part of its capacity.
const RESERVE_PART: u64 = 8;

/// Objects in memory. A clone is another handle to the same objects, as a second process would have.
#[derive(Debug, Clone)]
pub struct Memory {
    shared: Arc<Mutex<Medium>>,
    has_blind_pins: bool,
}

#[derive(Debug, Default)]
struct Medium {
    objects: BTreeMap<String, Object>,
    locks: BTreeSet<String>,
    /// Bytes of `objects`.
    object_bytes: u64,
    /// Bytes appended to unfinished uploads.
    upload_bytes: u64,
    capacity: Option<u64>,
    reserve_bytes: u64,
    has_reserve: bool,
    /// The medium's own clock.
    now: Duration,
}

#[derive(Debug)]
struct Object {
    bytes: Arc<Vec<u8>>,
    /// When it came, by that clock.
    received: Duration,
    /// Every pin holds a clone.
    pins: Arc<()>,
}

impl Memory {
    /// Room for any number of bytes.
    pub fn new() -> Self {
        let medium = Medium { reserve_bytes: RESERVE_BYTES, ..Medium::default() };
        Self { shared: Arc::new(Mutex::new(medium)), has_blind_pins: false }
    }

    /// Room for `bytes` of objects, unfinished uploads and reserve together; `NoSpace` beyond. The reserve is
    /// `RESERVE_BYTES`, but at most an eighth of the capacity.
    pub fn with_capacity_limit(bytes: u64) -> Self {
        let memory = Self::new().with_reserve_bytes(RESERVE_BYTES.min(bytes / RESERVE_PART));
        held(&memory.shared).capacity = Some(bytes);
        memory
    }

    /// The same with a reserve of this size, once [`Backend::keep_reserve`] is called.
    #[must_use]
    pub fn with_reserve_bytes(self, bytes: u64) -> Self {
        held(&self.shared).reserve_bytes = bytes;
        self
    }

    /// Another handle to the same objects, as on a host whose file locks no other host sees: nobody sees its pins.
    #[must_use]
    pub fn with_blind_pins(&self) -> Self {
        Self { has_blind_pins: true, ..self.clone() }
    }

    /// Moves the medium's own clock on, which stands still otherwise.
    pub fn advance(&self, by: Duration) {
        held(&self.shared).now += by;
    }

    /// All objects by key. The contents are shared, never changed in place.
    pub fn objects(&self) -> BTreeMap<String, Arc<Vec<u8>>> {
        held(&self.shared).objects.iter().map(|(key, object)| (key.clone(), Arc::clone(&object.bytes))).collect()
    }

    /// Puts these bytes under `key`, free or not and whatever the capacity, as damage does. Pins stay.
    pub fn replace(&self, key: &Key, bytes: impl Into<Vec<u8>>) {
        let mut medium = held(&self.shared);
        let (received, pins) =
            medium.take(key.as_str()).map_or((medium.now, Arc::default()), |object| (object.received, object.pins));
        medium.insert(key.as_str(), Object { bytes: Arc::new(bytes.into()), received, pins });
    }

    /// Takes the object away, as damage does, and returns what it held.
    pub fn remove(&self, key: &Key) -> Option<Arc<Vec<u8>>> {
        held(&self.shared).take(key.as_str()).map(|object| object.bytes)
    }

    /// An independent copy as another machine would find it after a crash: objects, capacity and reserve, but no
    /// unfinished uploads, pins or locks. Cost: one entry an object, no contents.
    pub fn fork(&self) -> Self {
        let fork = Self::new();
        let medium = held(&self.shared);
        let mut copy = held(&fork.shared);
        for (key, object) in &medium.objects {
            let bytes = Arc::clone(&object.bytes);
            copy.insert(key, Object { bytes, received: object.received, pins: Arc::default() });
        }
        copy.now = medium.now;
        copy.capacity = medium.capacity;
        copy.reserve_bytes = medium.reserve_bytes;
        copy.has_reserve = medium.has_reserve;
        drop(copy);
        drop(medium);
        fork
    }

    /// Makes these the only objects, as after [`Memory::objects`] at an earlier time. Pins on the former ones end.
    pub fn restore(&self, objects: &BTreeMap<String, Arc<Vec<u8>>>) {
        let mut medium = held(&self.shared);
        medium.objects.clear();
        medium.object_bytes = 0;
        let received = medium.now;
        for (key, bytes) in objects {
            medium.insert(key, Object { bytes: Arc::clone(bytes), received, pins: Arc::default() });
        }
    }

    fn get(&self, key: &Key) -> Result<Arc<Vec<u8>>> {
        let medium = held(&self.shared);
        let object = medium.objects.get(key.as_str()).ok_or_else(|| not_found(key.to_string()))?;
        Ok(Arc::clone(&object.bytes))
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Medium {
    fn insert(&mut self, key: &str, object: Object) {
        self.object_bytes += object.bytes.len() as u64;
        self.objects.insert(key.to_owned(), object);
    }

    fn take(&mut self, key: &str) -> Option<Object> {
        let object = self.objects.remove(key)?;
        self.object_bytes -= object.bytes.len() as u64;
        Some(object)
    }

    fn bytes_taken(&self) -> u64 {
        let reserve_bytes = if self.has_reserve { self.reserve_bytes } else { 0 };
        self.object_bytes + self.upload_bytes + reserve_bytes
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.capacity.is_none_or(|capacity| self.bytes_taken().saturating_add(bytes) <= capacity)
    }
}

impl Backend for Memory {
    fn create(&self, key: &Key) -> Result<Box<dyn Upload>> {
        Ok(Box::new(MemoryUpload {
            shared: Arc::clone(&self.shared),
            key: key.clone(),
            bytes: Vec::new(),
            is_over: false,
        }))
    }

    fn create_over(&self, key: &Key) -> Result<Box<dyn Upload>> {
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(MemoryUpload { shared, key: key.clone(), bytes: Vec::new(), is_over: true }))
    }

    fn read(&self, key: &Key, offset: u64, out: &mut [u8]) -> Result<()> {
        let bytes = self.get(key)?;
        let part = range(&bytes, offset, out.len()).ok_or_else(|| {
            let end = offset.saturating_add(out.len() as u64);
            corrupt(format!("{key}: ends at {}, wanted bytes {offset}..{end}", bytes.len()))
        })?;
        out.copy_from_slice(part);
        Ok(())
    }

    fn read_all(&self, key: &Key, bytes_max: u64) -> Result<Vec<u8>> {
        let bytes = self.get(key)?;
        if bytes.len() as u64 > bytes_max {
            let len = bytes.len();
            return Err(corrupt(format!("{key}: has {len} bytes, at most {bytes_max} are allowed")));
        }
        Ok(bytes.to_vec())
    }

    fn len(&self, key: &Key) -> Result<u64> {
        Ok(self.get(key)?.len() as u64)
    }

    fn ages(&self, keys: &[Key]) -> Result<Vec<Option<Duration>>> {
        let medium = held(&self.shared);
        let age = |key: &Key| Some(medium.now.saturating_sub(medium.objects.get(key.as_str())?.received));
        Ok(keys.iter().map(age).collect())
    }

    fn list(&self, prefix: &Key) -> Result<Vec<Listed>> {
        let start = if prefix.as_str().is_empty() { String::new() } else { format!("{prefix}/") };
        let mut rows = BTreeMap::new();
        let medium = held(&self.shared);
        for (key, object) in medium.objects.range(start.clone()..) {
            let Some(rest) = key.strip_prefix(&start) else { break };
            let (name, bytes, is_folder) = match rest.split_once('/') {
                Some((name, _)) => (name, 0, true),
                None => (rest, object.bytes.len() as u64, false),
            };
            rows.insert(name.to_owned(), Listed { name: name.to_owned(), bytes, is_folder });
        }
        Ok(rows.into_values().collect())
    }

    fn delete(&self, key: &Key) -> Result<()> {
        held(&self.shared).take(key.as_str());
        Ok(())
    }

    fn pin(&self, key: &Key) -> Result<Box<dyn Guard>> {
        let medium = held(&self.shared);
        let object = medium.objects.get(key.as_str()).ok_or_else(|| not_found(key.to_string()))?;
        let count = if self.has_blind_pins { Arc::default() } else { Arc::clone(&object.pins) };
        Ok(Box::new(Pin { _count: count }))
    }

    fn is_pinned(&self, key: &Key) -> Result<bool> {
        let medium = held(&self.shared);
        let is_pinned = medium.objects.get(key.as_str()).is_some_and(|object| Arc::strong_count(&object.pins) > 1);
        Ok(is_pinned || medium.locks.contains(key.as_str()))
    }

    fn try_lock(&self, key: &Key) -> Result<Option<Box<dyn Guard>>> {
        if !held(&self.shared).locks.insert(key.as_str().to_owned()) {
            return Ok(None);
        }
        Ok(Some(Box::new(Lock { shared: Arc::clone(&self.shared), key: key.clone() })))
    }

    fn release_reserve(&self) -> bool {
        std::mem::take(&mut held(&self.shared).has_reserve)
    }

    fn keep_reserve(&self) {
        let mut medium = held(&self.shared);
        if !medium.has_reserve && medium.has_room(medium.reserve_bytes) {
            medium.has_reserve = true;
        }
    }

    fn space(&self) -> Option<(u64, u64)> {
        let medium = held(&self.shared);
        medium.capacity.map(|capacity| (capacity, capacity.saturating_sub(medium.bytes_taken())))
    }
}

struct MemoryUpload {
    shared: Arc<Mutex<Medium>>,
    key: Key,
    bytes: Vec<u8>,
    /// Whether it takes the place of what is there.
    is_over: bool,
}

impl Upload for MemoryUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let mut medium = held(&self.shared);
        if !medium.has_room(bytes.len() as u64) {
            return Err(Error::new(ErrorKind::NoSpace, format!("{}: no room for {} bytes", self.key, bytes.len())));
        }
        medium.upload_bytes += bytes.len() as u64;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let part = range(&self.bytes, offset, out.len()).ok_or_else(|| {
            let (key, end) = (&self.key, offset.saturating_add(out.len() as u64));
            invalid(format!("{key}: {} bytes were appended, wanted bytes {offset}..{end}", self.bytes.len()))
        })?;
        out.copy_from_slice(part);
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let mut medium = held(&shared);
        let key = self.key.clone();
        if self.is_over {
            medium.take(key.as_str());
        }
        if medium.objects.contains_key(key.as_str()) {
            // Given back first: the upload takes the lock when it is dropped.
            drop(medium);
            return Err(Error::new(ErrorKind::Exists, key.to_string()));
        }
        let bytes = std::mem::take(&mut self.bytes);
        medium.upload_bytes -= bytes.len() as u64;
        let received = medium.now;
        medium.insert(key.as_str(), Object { bytes: Arc::new(bytes), received, pins: Arc::default() });
        drop(medium);
        Ok(())
    }
}

impl Drop for MemoryUpload {
    fn drop(&mut self) {
        held(&self.shared).upload_bytes -= self.bytes.len() as u64;
    }
}

struct Pin {
    _count: Arc<()>,
}

impl Guard for Pin {}

struct Lock {
    shared: Arc<Mutex<Medium>>,
    key: Key,
}

impl Guard for Lock {}

impl Drop for Lock {
    fn drop(&mut self) {
        held(&self.shared).locks.remove(self.key.as_str());
    }
}

/// The calls that are counted and made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    /// [`Backend::create`].
    Create,
    /// [`Backend::put_new`].
    PutNew,
    /// [`Upload::append`].
    Append,
    /// [`Upload::finish`].
    Finish,
    /// [`Backend::read`]; reading an upload back is not counted.
    Read,
    /// [`Backend::read_all`].
    ReadAll,
    /// [`Backend::len`].
    Len,
    /// [`Backend::ages`], under the first of its keys.
    Ages,
    /// [`Backend::list`].
    List,
    /// [`Backend::delete`].
    Delete,
    /// [`Backend::pin`].
    Pin,
    /// [`Backend::is_pinned`].
    IsPinned,
    /// [`Backend::try_lock`].
    TryLock,
}

impl Operation {
    /// Whether it changes what the medium holds.
    pub fn is_mutation(self) -> bool {
        self.takes_room() || matches!(self, Self::Delete | Self::TryLock)
    }

    /// Whether it fails on a full medium.
    fn takes_room(self) -> bool {
        matches!(self, Self::Create | Self::PutNew | Self::Append | Self::Finish)
    }
}

/// Calls of each operation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the count of the operation of its name")]
pub struct Counts {
    pub create: u64,
    pub put_new: u64,
    pub append: u64,
    pub finish: u64,
    pub read: u64,
    pub read_all: u64,
    pub len: u64,
    pub ages: u64,
    pub list: u64,
    pub delete: u64,
    pub pin: u64,
    pub is_pinned: u64,
    pub try_lock: u64,
}

impl Counts {
    fn of(&mut self, operation: Operation) -> &mut u64 {
        match operation {
            Operation::Create => &mut self.create,
            Operation::PutNew => &mut self.put_new,
            Operation::Append => &mut self.append,
            Operation::Finish => &mut self.finish,
            Operation::Read => &mut self.read,
            Operation::ReadAll => &mut self.read_all,
            Operation::Len => &mut self.len,
            Operation::Ages => &mut self.ages,
            Operation::List => &mut self.list,
            Operation::Delete => &mut self.delete,
            Operation::Pin => &mut self.pin,
            Operation::IsPinned => &mut self.is_pinned,
            Operation::TryLock => &mut self.try_lock,
        }
    }
}

/// What is done before a call of a backend; its error is the call's.
pub type Hook = Box<dyn Fn(Operation, &Key) -> Result<()> + Send + Sync>;

/// Counts the calls to another backend and keeps them in order, those that fail too.
pub struct Recorder {
    inner: Arc<dyn Backend>,
    record: Arc<Mutex<Record>>,
    hook: Hook,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(out)
    }
}

#[derive(Debug, Default)]
struct Record {
    counts: Counts,
    log: Vec<(Operation, Key)>,
}

impl Record {
    fn add(&mut self, operation: Operation, key: &Key) {
        *self.counts.of(operation) += 1;
        if self.log.len() < LOG_CALLS_MAX {
            self.log.push((operation, key.clone()));
        }
    }
}

impl Recorder {
    /// Records the calls to `inner`.
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        Self::with_hook(inner, |_, _| Ok(()))
    }

    /// The same, with a hook before each call of `inner`; what is done to an upload is only recorded.
    pub fn with_hook(
        inner: Arc<dyn Backend>,
        hook: impl Fn(Operation, &Key) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self { inner, record: Arc::default(), hook: Box::new(hook) }
    }

    /// Calls since the beginning or the last reset.
    pub fn counts(&self) -> Counts {
        held(&self.record).counts
    }

    /// The same calls in order, the first [`LOG_CALLS_MAX`] of them.
    pub fn log(&self) -> Vec<(Operation, Key)> {
        held(&self.record).log.clone()
    }

    /// Calls that read objects: `read` and `read_all`.
    pub fn reads(&self) -> u64 {
        let counts = self.counts();
        counts.read + counts.read_all
    }

    /// Forgets the calls so far.
    pub fn reset(&self) {
        *held(&self.record) = Record::default();
    }

    fn call(&self, operation: Operation, key: &Key) -> Result<()> {
        held(&self.record).add(operation, key);
        (self.hook)(operation, key)
    }
}

impl Backend for Recorder {
    fn create(&self, key: &Key) -> Result<Box<dyn Upload>> {
        self.call(Operation::Create, key)?;
        let inner = self.inner.create(key)?;
        Ok(Box::new(RecordedUpload { inner, record: Arc::clone(&self.record), key: key.clone() }))
    }

    fn create_over(&self, key: &Key) -> Result<Box<dyn Upload>> {
        self.call(Operation::Create, key)?;
        let inner = self.inner.create_over(key)?;
        Ok(Box::new(RecordedUpload { inner, record: Arc::clone(&self.record), key: key.clone() }))
    }

    fn read_checked(
        &self,
        key: &Key,
        offset: u64,
        out: &mut [u8],
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.call(Operation::Read, key)?;
        self.inner.read_checked(key, offset, out, verify)
    }

    fn read_all_checked(
        &self,
        key: &Key,
        bytes_max: u64,
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Vec<u8>> {
        self.call(Operation::ReadAll, key)?;
        self.inner.read_all_checked(key, bytes_max, verify)
    }

    fn settle(&self, key: &Key, verify: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.inner.settle(key, verify)
    }

    fn replicated(&self) -> Option<&Replicated> {
        self.inner.replicated()
    }

    fn put_new(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        self.call(Operation::PutNew, key)?;
        self.inner.put_new(key, bytes)
    }

    fn read(&self, key: &Key, offset: u64, out: &mut [u8]) -> Result<()> {
        self.call(Operation::Read, key)?;
        self.inner.read(key, offset, out)
    }

    fn read_all(&self, key: &Key, bytes_max: u64) -> Result<Vec<u8>> {
        self.call(Operation::ReadAll, key)?;
        self.inner.read_all(key, bytes_max)
    }

    fn len(&self, key: &Key) -> Result<u64> {
        self.call(Operation::Len, key)?;
        self.inner.len(key)
    }

    fn ages(&self, keys: &[Key]) -> Result<Vec<Option<Duration>>> {
        self.call(Operation::Ages, &first_of(keys))?;
        self.inner.ages(keys)
    }

    fn list(&self, prefix: &Key) -> Result<Vec<Listed>> {
        self.call(Operation::List, prefix)?;
        self.inner.list(prefix)
    }

    fn delete(&self, key: &Key) -> Result<()> {
        self.call(Operation::Delete, key)?;
        self.inner.delete(key)
    }

    fn will_need(&self, key: &Key, offset: u64, bytes: u64) {
        self.inner.will_need(key, offset, bytes);
    }

    fn pin(&self, key: &Key) -> Result<Box<dyn Guard>> {
        self.call(Operation::Pin, key)?;
        self.inner.pin(key)
    }

    fn is_pinned(&self, key: &Key) -> Result<bool> {
        self.call(Operation::IsPinned, key)?;
        self.inner.is_pinned(key)
    }

    fn try_lock(&self, key: &Key) -> Result<Option<Box<dyn Guard>>> {
        self.call(Operation::TryLock, key)?;
        self.inner.try_lock(key)
    }

    fn release_reserve(&self) -> bool {
        self.inner.release_reserve()
    }

    fn keep_reserve(&self) {
        self.inner.keep_reserve();
    }

    fn remove_litter(&self) -> Result<u64> {
        self.inner.remove_litter()
    }

    fn space(&self) -> Option<(u64, u64)> {
        self.inner.space()
    }
}

struct RecordedUpload {
    inner: Box<dyn Upload>,
    record: Arc<Mutex<Record>>,
    key: Key,
}

impl Upload for RecordedUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        held(&self.record).add(Operation::Append, &self.key);
        self.inner.append(bytes)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.inner.read(offset, out)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        held(&self.record).add(Operation::Finish, &self.key);
        self.inner.finish()
    }
}

/// What happens at the chosen call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A crash before: this call and all later ones fail `Unavailable` without effect.
    CutBefore,
    /// A crash after: this call takes effect and fails `Unavailable`; all later ones fail without effect.
    CutAfter,
    /// Only this call fails `Unavailable`, without effect.
    Blip,
    /// From this call on, `create`, `put_new`, `append` and `finish` fail `NoSpace` without effect; all else works.
    NoSpace,
}

/// Which calls are counted towards the chosen one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All operations but `is_pinned`.
    All,
    /// Those that change what the medium holds: `create`, `put_new`, `append`, `finish`, `delete`, `try_lock`.
    Mutations,
}

impl Scope {
    fn counts(self, operation: Operation) -> bool {
        match self {
            Self::All => operation != Operation::IsPinned,
            Self::Mutations => operation.is_mutation(),
        }
    }
}

/// Makes one chosen call to another backend fail, and later ones as the fault demands.
///
/// A test runs the same work with `at` = 0, 1, 2, … until [`Faulty::fired`] is `false`: then it has seen a fault at
/// every call. Calls that are not counted (`is_pinned`, reading an upload back, `remove_litter`, the reserve) never
/// start a fault, but fail after a cut like all others.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Backend>,
    switch: Arc<Switch>,
}

#[derive(Debug)]
struct Switch {
    fault: Fault,
    scope: Scope,
    at: usize,
    state: Mutex<SwitchState>,
}

#[derive(Debug, Default)]
struct SwitchState {
    calls: usize,
    /// Whether the chosen call has come.
    is_reached: bool,
    has_fired: bool,
}

/// What to do with one call.
enum Verdict {
    Pass,
    ApplyAndFail,
    Fail(ErrorKind),
}

impl Faulty {
    /// Fails the call with the index `at`, counted from 0 over all operations.
    pub fn new(inner: Arc<dyn Backend>, fault: Fault, at: usize) -> Self {
        Self::with_scope(inner, fault, at, Scope::All)
    }

    /// The same, counted over the operations of `scope`.
    pub fn with_scope(inner: Arc<dyn Backend>, fault: Fault, at: usize, scope: Scope) -> Self {
        Self { inner, switch: Arc::new(Switch { fault, scope, at, state: Mutex::default() }) }
    }

    /// Whether any call was made to fail.
    pub fn fired(&self) -> bool {
        held(&self.switch.state).has_fired
    }

    /// Counted calls so far, those that failed included.
    pub fn calls(&self) -> usize {
        held(&self.switch.state).calls
    }
}

impl Switch {
    fn judge(&self, operation: Operation) -> Verdict {
        let mut state = held(&self.state);
        let was_reached = state.is_reached;
        let mut is_chosen = false;
        if self.scope.counts(operation) {
            is_chosen = state.calls == self.at;
            state.calls += 1;
            state.is_reached |= is_chosen;
        }
        let verdict = match self.fault {
            Fault::CutAfter if is_chosen => Verdict::ApplyAndFail,
            Fault::CutBefore | Fault::Blip if is_chosen => Verdict::Fail(ErrorKind::Unavailable),
            Fault::CutBefore | Fault::CutAfter if was_reached => Verdict::Fail(ErrorKind::Unavailable),
            Fault::NoSpace if state.is_reached && operation.takes_room() => Verdict::Fail(ErrorKind::NoSpace),
            _ => Verdict::Pass,
        };
        state.has_fired |= !matches!(verdict, Verdict::Pass);
        verdict
    }

    fn run<T>(&self, operation: Operation, key: &Key, call: impl FnOnce() -> Result<T>) -> Result<T> {
        let kind = match self.judge(operation) {
            Verdict::Pass => return call(),
            Verdict::Fail(kind) => kind,
            Verdict::ApplyAndFail => {
                // Whatever it returns, nobody is left to see it.
                let _ = call();
                ErrorKind::Unavailable
            }
        };
        Err(Error::new(kind, format!("{key}: fault {:?} at call {}, {operation:?}", self.fault, self.at)))
    }

    /// Whether nothing reaches the medium any more.
    fn is_cut(&self) -> bool {
        matches!(self.fault, Fault::CutBefore | Fault::CutAfter) && held(&self.state).is_reached
    }

    fn unless_cut<T>(&self, call: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.is_cut() {
            return Err(Error::new(ErrorKind::Unavailable, format!("fault {:?} at call {}", self.fault, self.at)));
        }
        call()
    }
}

impl Backend for Faulty {
    fn create(&self, key: &Key) -> Result<Box<dyn Upload>> {
        let inner = self.switch.run(Operation::Create, key, || self.inner.create(key))?;
        Ok(Box::new(FaultyUpload { inner, switch: Arc::clone(&self.switch), key: key.clone() }))
    }

    fn create_over(&self, key: &Key) -> Result<Box<dyn Upload>> {
        let inner = self.switch.run(Operation::Create, key, || self.inner.create_over(key))?;
        Ok(Box::new(FaultyUpload { inner, switch: Arc::clone(&self.switch), key: key.clone() }))
    }

    fn read_checked(
        &self,
        key: &Key,
        offset: u64,
        out: &mut [u8],
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.switch.run(Operation::Read, key, || self.inner.read_checked(key, offset, out, verify))
    }

    fn read_all_checked(
        &self,
        key: &Key,
        bytes_max: u64,
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Vec<u8>> {
        self.switch.run(Operation::ReadAll, key, || self.inner.read_all_checked(key, bytes_max, verify))
    }

    fn settle(&self, key: &Key, verify: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.switch.unless_cut(|| self.inner.settle(key, verify))
    }

    fn replicated(&self) -> Option<&Replicated> {
        self.inner.replicated()
    }

    fn put_new(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        self.switch.run(Operation::PutNew, key, || self.inner.put_new(key, bytes))
    }

    fn read(&self, key: &Key, offset: u64, out: &mut [u8]) -> Result<()> {
        self.switch.run(Operation::Read, key, || self.inner.read(key, offset, out))
    }

    fn read_all(&self, key: &Key, bytes_max: u64) -> Result<Vec<u8>> {
        self.switch.run(Operation::ReadAll, key, || self.inner.read_all(key, bytes_max))
    }

    fn len(&self, key: &Key) -> Result<u64> {
        self.switch.run(Operation::Len, key, || self.inner.len(key))
    }

    fn ages(&self, keys: &[Key]) -> Result<Vec<Option<Duration>>> {
        self.switch.run(Operation::Ages, &first_of(keys), || self.inner.ages(keys))
    }

    fn list(&self, prefix: &Key) -> Result<Vec<Listed>> {
        self.switch.run(Operation::List, prefix, || self.inner.list(prefix))
    }

    fn delete(&self, key: &Key) -> Result<()> {
        self.switch.run(Operation::Delete, key, || self.inner.delete(key))
    }

    fn will_need(&self, key: &Key, offset: u64, bytes: u64) {
        if !self.switch.is_cut() {
            self.inner.will_need(key, offset, bytes);
        }
    }

    fn pin(&self, key: &Key) -> Result<Box<dyn Guard>> {
        self.switch.run(Operation::Pin, key, || self.inner.pin(key))
    }

    fn is_pinned(&self, key: &Key) -> Result<bool> {
        self.switch.run(Operation::IsPinned, key, || self.inner.is_pinned(key))
    }

    fn try_lock(&self, key: &Key) -> Result<Option<Box<dyn Guard>>> {
        self.switch.run(Operation::TryLock, key, || self.inner.try_lock(key))
    }

    fn release_reserve(&self) -> bool {
        !self.switch.is_cut() && self.inner.release_reserve()
    }

    fn keep_reserve(&self) {
        if !self.switch.is_cut() {
            self.inner.keep_reserve();
        }
    }

    fn remove_litter(&self) -> Result<u64> {
        self.switch.unless_cut(|| self.inner.remove_litter())
    }

    fn space(&self) -> Option<(u64, u64)> {
        self.inner.space()
    }
}

struct FaultyUpload {
    inner: Box<dyn Upload>,
    switch: Arc<Switch>,
    key: Key,
}

impl Upload for FaultyUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let inner = &mut self.inner;
        self.switch.run(Operation::Append, &self.key, || inner.append(bytes))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.switch.unless_cut(|| self.inner.read(offset, out))
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let Self { inner, switch, key } = *self;
        switch.run(Operation::Finish, &key, || inner.finish())
    }
}

fn first_of(keys: &[Key]) -> Key {
    keys.first().cloned().unwrap_or_else(|| Key::new(""))
}

/// The bytes from `offset`, if there are as many.
fn range(bytes: &[u8], offset: u64, len: usize) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..start.checked_add(len)?)
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
