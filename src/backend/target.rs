//! One target of several: opened when it is there, left alone while it is not, and given up on when it does not answer.
//!
//! Calls run on threads of the target, so that a medium that hangs holds up its own threads and nobody else: who has
//! waited long enough goes on with another copy. A call that was given up may still take effect later; the contract
//! calls that `Unavailable`. While such a call hangs, further ones fail at once.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use crate::backend::placement::TargetId;
use crate::backend::{Backend, Guard, Key, Listed, Upload};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{TARGET_CALLS_MAX, TARGET_PATIENCE};

/// How long a target that is not there is left alone before it is looked for again.
const RETRY: Duration = Duration::from_secs(5);

/// Opens a target, after it has made sure that it is the one that is meant.
pub type Opener = Box<dyn Fn() -> Result<Arc<dyn Backend>> + Send + Sync>;

/// A target. A clone is another handle to the same one.
///
/// As a backend it is its one copy of everything: reading through it asks no other.
#[derive(Clone)]
pub struct Target(Arc<Inner>);

struct Inner {
    id: TargetId,
    name: String,
    opener: Arc<Opener>,
    clock: Arc<dyn Clock>,
    patience: Duration,
    state: Mutex<State>,
    crew: Crew,
}

#[derive(Default)]
struct State {
    backend: Option<Arc<dyn Backend>>,
    /// Why it is not there, or what it last failed with.
    trouble: Option<String>,
    /// When to look for it again.
    retry_at: Option<Duration>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Target {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "target {} ({})", self.0.name, self.0.id)
    }
}

impl Target {
    /// A target that is opened when it is first used; `name` is for messages.
    pub fn new(id: TargetId, name: impl Into<String>, clock: Arc<dyn Clock>, opener: Opener) -> Self {
        Self::with_patience(id, name, clock, opener, TARGET_PATIENCE)
    }

    /// The same with another patience, for tests.
    pub fn with_patience(
        id: TargetId,
        name: impl Into<String>,
        clock: Arc<dyn Clock>,
        opener: Opener,
        patience: Duration,
    ) -> Self {
        let state = Mutex::default();
        let opener = Arc::new(opener);
        Self(Arc::new(Inner { id, name: name.into(), opener, clock, patience, state, crew: Crew::new() }))
    }

    /// Its identity.
    pub fn id(&self) -> TargetId {
        self.0.id
    }

    /// Its name for people: a path.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What is wrong with it, as far as is known. No I/O.
    pub fn trouble(&self) -> Option<String> {
        if self.0.crew.stuck.load(Ordering::SeqCst) > 0 {
            return Some("does not answer".to_owned());
        }
        held(&self.0.state).trouble.clone()
    }

    /// Whether it is there. Cost: opens it, if that was not done yet.
    pub fn is_there(&self) -> bool {
        self.backend().is_ok()
    }

    /// Whether it is there, and nothing is known to be wrong with it. Cost: as [`Target::is_there`].
    pub fn is_well(&self) -> bool {
        self.is_there() && self.trouble().is_none()
    }

    /// The opened target.
    ///
    /// # Errors
    /// `Unavailable`, with the reason.
    pub fn backend(&self) -> Result<Arc<dyn Backend>> {
        let away = |why: &str| Error::new(ErrorKind::Unavailable, format!("target {}: {why}", self.0.name));
        if self.0.crew.stuck.load(Ordering::SeqCst) > 0 {
            return Err(away("does not answer"));
        }
        let mut state = held(&self.0.state);
        let now = self.0.clock.elapsed();
        let is_due = state.retry_at.is_none_or(|at| now >= at);
        match &state.backend {
            Some(backend) if state.trouble.is_none() || !is_due => return Ok(backend.clone()),
            None if !is_due => return Err(away(state.trouble.as_deref().unwrap_or("is not there"))),
            _ => {}
        }
        let opener = Arc::clone(&self.0.opener);
        match self.0.crew.start(move || opener()).wait(self.0.patience, &self.0.name) {
            Ok(backend) => {
                if state.trouble.take().is_some() {
                    log::info!("target {}: is there", self.0.name);
                }
                state.retry_at = None;
                state.backend = Some(backend.clone());
                Ok(backend)
            }
            Err(e) => {
                let why = e.to_string();
                if state.trouble.as_ref() != Some(&why) {
                    log::warn!("target {}: is left out: {why}", self.0.name);
                }
                state.trouble = Some(why.clone());
                state.retry_at = Some(now + RETRY);
                state.backend = None;
                Err(away(&why))
            }
        }
    }

    /// Begins a call. What it does may still happen after [`Call::wait`] gave up.
    pub fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Backend) -> Result<T> + Send + 'static,
    ) -> Call<'_, T> {
        let pending = self.backend().map(|backend| self.0.crew.start(move || work(&*backend)));
        Call { target: self, pending }
    }

    /// A call, and its result.
    ///
    /// # Errors
    /// What `work` returns; `Unavailable` when the target is not there or does not answer.
    pub fn call<T: Send + 'static>(&self, work: impl FnOnce(&dyn Backend) -> Result<T> + Send + 'static) -> Result<T> {
        self.start(work).wait()
    }

    /// Begins work on something that belongs to the target already.
    pub fn start_with<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Call<'_, T> {
        Call { target: self, pending: Ok(self.0.crew.start(work)) }
    }

    /// Remembers that it failed: it is opened anew in a while, in case its medium came back as another one.
    fn note(&self, error: &Error) {
        let mut state = held(&self.0.state);
        if state.trouble.is_none() {
            log::debug!("target {}: {error}", self.0.name);
            state.trouble = Some(error.to_string());
            state.retry_at = Some(self.0.clock.elapsed() + RETRY);
        }
    }
}

/// A call that was begun.
#[must_use]
pub struct Call<'a, T> {
    target: &'a Target,
    pending: Result<Pending<T>>,
}

impl<T> Call<'_, T> {
    /// Its result, or that it is not there for too long.
    ///
    /// # Errors
    /// As [`Target::call`].
    pub fn wait(self) -> Result<T> {
        let outcome = self.pending?.wait(self.target.0.patience, &self.target.0.name);
        if let Err(e) = &outcome
            && e.kind() == ErrorKind::Unavailable
        {
            self.target.note(e);
        }
        outcome
    }
}

impl Backend for Target {
    fn create(&self, key: &Key) -> Result<Box<dyn Upload>> {
        self.start_create(key).wait()
    }

    fn put_new(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        let (key, bytes) = (key.clone(), bytes.to_vec());
        self.call(move |backend| backend.put_new(&key, &bytes))
    }

    fn read(&self, key: &Key, offset: u64, out: &mut [u8]) -> Result<()> {
        let (key, bytes) = (key.clone(), out.len());
        let read = self.call(move |backend| {
            let mut out = vec![0; bytes];
            backend.read(&key, offset, &mut out)?;
            Ok(out)
        })?;
        out.copy_from_slice(&read);
        Ok(())
    }

    fn read_all(&self, key: &Key, bytes_max: u64) -> Result<Vec<u8>> {
        let key = key.clone();
        self.call(move |backend| backend.read_all(&key, bytes_max))
    }

    fn create_over(&self, key: &Key) -> Result<Box<dyn Upload>> {
        let key = key.clone();
        let inner = self.call(move |backend| backend.create_over(&key))?;
        Ok(Box::new(TargetUpload { target: self.clone(), inner: Some(inner), is_over: true }))
    }

    fn len(&self, key: &Key) -> Result<u64> {
        let key = key.clone();
        self.call(move |backend| backend.len(&key))
    }

    fn ages(&self, keys: &[Key]) -> Result<Vec<Option<Duration>>> {
        let keys = keys.to_vec();
        self.call(move |backend| backend.ages(&keys))
    }

    fn list(&self, prefix: &Key) -> Result<Vec<Listed>> {
        let prefix = prefix.clone();
        self.call(move |backend| backend.list(&prefix))
    }

    fn delete(&self, key: &Key) -> Result<()> {
        let key = key.clone();
        self.call(move |backend| backend.delete(&key))
    }

    fn will_need(&self, key: &Key, offset: u64, bytes: u64) {
        let key = key.clone();
        // Nobody waits for a hint.
        let _ = self.start(move |backend| {
            backend.will_need(&key, offset, bytes);
            Ok(())
        });
    }

    fn pin(&self, key: &Key) -> Result<Box<dyn Guard>> {
        let key = key.clone();
        self.call(move |backend| backend.pin(&key))
    }

    fn is_pinned(&self, key: &Key) -> Result<bool> {
        let key = key.clone();
        self.call(move |backend| backend.is_pinned(&key))
    }

    fn try_lock(&self, key: &Key) -> Result<Option<Box<dyn Guard>>> {
        let key = key.clone();
        self.call(move |backend| backend.try_lock(&key))
    }

    fn release_reserve(&self) -> bool {
        self.call(|backend| Ok(backend.release_reserve())).unwrap_or(false)
    }

    fn keep_reserve(&self) {
        // Without room, or without the target, there is no reserve.
        let _ = self.call(|backend| {
            backend.keep_reserve();
            Ok(())
        });
    }

    fn remove_litter(&self) -> Result<u64> {
        self.call(|backend| backend.remove_litter())
    }

    fn tidy(&self) {
        let _ = self.call(|backend| {
            backend.tidy();
            Ok(())
        });
    }

    fn space(&self) -> Option<(u64, u64)> {
        self.call(|backend| Ok(backend.space())).ok().flatten()
    }
}

impl Target {
    /// Begins [`Backend::create`].
    pub fn start_create(&self, key: &Key) -> Call<'_, Box<dyn Upload>> {
        let (key, target) = (key.clone(), self.clone());
        self.start(move |backend| {
            let inner = backend.create(&key)?;
            Ok(Box::new(TargetUpload { target, inner: Some(inner), is_over: false }) as Box<dyn Upload>)
        })
    }
}

/// An upload whose calls run on the target's threads. After one that was given up, nobody has it any more.
struct TargetUpload {
    target: Target,
    inner: Option<Box<dyn Upload>>,
    is_over: bool,
}

impl TargetUpload {
    fn lost(&self) -> Error {
        Error::new(ErrorKind::Unavailable, format!("target {}: an upload was given up", self.target.name()))
    }
}

impl Upload for TargetUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(mut inner) = self.inner.take() else { return Err(self.lost()) };
        let bytes = bytes.to_vec();
        let done = self.target.start_with(move || {
            let outcome = inner.append(&bytes);
            Ok((inner, outcome))
        });
        let (inner, outcome) = done.wait()?;
        self.inner = Some(inner);
        outcome
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        // Of what was just written: in memory, on all media.
        self.inner.as_ref().ok_or_else(|| self.lost())?.read(offset, out)
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        let Some(inner) = self.inner.take() else { return Err(self.lost()) };
        let done = self.target.start_with(move || inner.finish()).wait();
        if self.is_over {
            // Files that are open here only for speed are still the replaced ones.
            self.target.tidy();
        }
        done
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The threads of a target.
struct Crew {
    jobs: Sender<Job>,
    queue: Receiver<Job>,
    idle: Arc<AtomicUsize>,
    threads: Arc<AtomicUsize>,
    /// Calls that were given up and have not returned.
    stuck: Arc<AtomicUsize>,
}

const RUNNING: u8 = 0;
const RETURNED: u8 = 1;
const GIVEN_UP: u8 = 2;

struct Pending<T> {
    answer: Receiver<Result<T>>,
    state: Arc<AtomicU8>,
    stuck: Arc<AtomicUsize>,
}

impl Crew {
    fn new() -> Self {
        let (jobs, queue) = unbounded();
        Self { jobs, queue, idle: Arc::default(), threads: Arc::default(), stuck: Arc::default() }
    }

    fn start<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Pending<T> {
        let (sender, answer) = bounded(1);
        let state = Arc::new(AtomicU8::new(RUNNING));
        let (told, stuck) = (Arc::clone(&state), Arc::clone(&self.stuck));
        let job: Job = Box::new(move || {
            let outcome = work();
            // Sent before it is called returned: who sees that finds the answer.
            let _ = sender.send(outcome);
            if told.swap(RETURNED, Ordering::SeqCst) == GIVEN_UP {
                stuck.fetch_sub(1, Ordering::SeqCst);
            }
        });
        // A queue without readers is not possible: one is in `self`.
        let _ = self.jobs.send(job);
        let threads = self.threads.load(Ordering::SeqCst);
        if self.idle.load(Ordering::SeqCst) < self.queue.len() && threads < TARGET_CALLS_MAX {
            self.hire();
        }
        Pending { answer, state, stuck: Arc::clone(&self.stuck) }
    }

    fn hire(&self) {
        let (queue, idle, threads) = (self.queue.clone(), Arc::clone(&self.idle), Arc::clone(&self.threads));
        threads.fetch_add(1, Ordering::SeqCst);
        let work = move || {
            idle.fetch_add(1, Ordering::SeqCst);
            // It ends with its crew.
            while let Ok(job) = queue.recv() {
                idle.fetch_sub(1, Ordering::SeqCst);
                if std::panic::catch_unwind(AssertUnwindSafe(job)).is_err() {
                    log::error!("a call to a target ended badly");
                }
                idle.fetch_add(1, Ordering::SeqCst);
            }
            idle.fetch_sub(1, Ordering::SeqCst);
            threads.fetch_sub(1, Ordering::SeqCst);
        };
        if std::thread::Builder::new().name("target".to_owned()).spawn(work).is_err() {
            self.threads.fetch_sub(1, Ordering::SeqCst);
            log::warn!("no thread for a target");
        }
    }
}

impl<T> Pending<T> {
    fn wait(self, patience: Duration, name: &str) -> Result<T> {
        match self.answer.recv_timeout(patience) {
            Ok(outcome) => return outcome,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::new(ErrorKind::Unavailable, format!("target {name}: a call ended without answer")));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        // Counted before it is given up: who returns then counts down.
        self.stuck.fetch_add(1, Ordering::SeqCst);
        let raced = self.state.compare_exchange(RUNNING, GIVEN_UP, Ordering::SeqCst, Ordering::SeqCst);
        if raced.is_err() {
            // It returned at the last moment.
            self.stuck.fetch_sub(1, Ordering::SeqCst);
            if let Ok(outcome) = self.answer.recv() {
                return outcome;
            }
        } else {
            log::warn!("target {name}: does not answer; it is left out until it does");
        }
        Err(Error::new(ErrorKind::Unavailable, format!("target {name}: does not answer")))
    }
}
