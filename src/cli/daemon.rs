//! The daemon of a mount: opens the store, mounts it, serves until it is unmounted, commits.
//!
//! ```text
//!   snapfs mount ──starts──> daemon: checks · opens · mounts
//!        │ <──"ready"──────── serves: request threads · tick · signals
//!        └ returns            unmounted, by anyone ──> commits, ends
//! ```

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::cli::mountinfo::{self, SNAPFS_TYPE};
use crate::cli::supervisor;
use crate::cli::umount::{How, is_dead, unmount};
use crate::clock::SystemClock;
use crate::error::{Error, ErrorKind, Result};
use crate::fs::MountedStore;
use crate::fs::types::Options;
use crate::fuse::{self, MountSettings};
use crate::ingest::background::step_back;
use crate::store::{MemoryShares, Store};

/// How often what is due is sealed.
const TICK: Duration = Duration::from_millis(300);

/// Read-ahead of a mount. The kernel allows a filesystem to ask for no more than 128 KiB, which costs almost twice
/// the processor time per byte.
const READ_AHEAD_KIB: &str = "1024";

/// What a daemon has to do.
#[derive(Debug)]
pub(super) struct Assignment {
    /// The store, without links.
    pub store: PathBuf,
    pub shares: MemoryShares,
    /// Whether writers look for what other VMs have.
    pub promotes: bool,
    pub options: Options,
    pub settings: MountSettings,
}

/// What a daemon tells the command that has started it: one line.
#[derive(Debug)]
pub(super) enum News {
    /// The mount answers.
    Ready,
    /// There is no mount, because.
    Failed(Error),
}

/// Kinds that go through the pipe by name; another one arrives as `Unavailable`.
const KINDS: [ErrorKind; 18] = [
    ErrorKind::NotFound,
    ErrorKind::Exists,
    ErrorKind::Corrupt,
    ErrorKind::Unavailable,
    ErrorKind::Busy,
    ErrorKind::NoSpace,
    ErrorKind::Unsupported,
    ErrorKind::Invalid,
    ErrorKind::Sealed,
    ErrorKind::ReadOnly,
    ErrorKind::Denied,
    ErrorKind::Stale,
    ErrorKind::NotEmpty,
    ErrorKind::CrossVm,
    ErrorKind::TooLong,
    ErrorKind::TooLarge,
    ErrorKind::IsFolder,
    ErrorKind::NotFolder,
];

impl News {
    /// The line.
    pub(super) fn encode(&self) -> String {
        match self {
            Self::Ready => "ready\n".to_owned(),
            Self::Failed(error) => {
                format!("failed {:?} {}\n", error.kind(), error.to_string().trim().replace('\n', " "))
            }
        }
    }

    /// What a line says; `None` for anything else, such as the end of a daemon that was killed.
    pub(super) fn decode(line: &str) -> Option<Self> {
        let line = line.strip_suffix('\n')?;
        if line == "ready" {
            return Some(Self::Ready);
        }
        let (kind, message) = line.strip_prefix("failed ")?.split_once(' ')?;
        let kind = KINDS.into_iter().find(|k| format!("{k:?}") == kind).unwrap_or(ErrorKind::Unavailable);
        Some(Self::Failed(Error::new(kind, message)))
    }
}

/// Runs the daemon until the store is unmounted and committed. With `in_background` somebody reads standard output.
pub(super) fn run(in_background: bool, assignment: impl FnOnce() -> Result<Assignment>) -> Result<()> {
    if in_background {
        log_panics();
    }
    match assignment().and_then(|assignment| Session::begin(assignment, in_background)) {
        Ok(session) => {
            supervisor::ready(&format!("serving {}", session.about));
            if in_background && tell(&News::Ready).is_err() {
                // Whoever wanted the mount was stopped before it was there.
                log::warn!("nobody waits for the mount any more: unmounting");
                session.leave();
            }
            session.serve()
        }
        Err(error) => {
            if in_background {
                // It reaches the user by the other process; the main program's own message goes nowhere.
                let _ = tell(&News::Failed(error.duplicate()));
            }
            Err(error)
        }
    }
}

/// Logs where a panic came from. Each place once: a bug that every read meets must not fill the log.
fn log_panics() {
    let seen = Mutex::new(HashSet::new());
    std::panic::set_hook(Box::new(move |panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        if seen.lock().unwrap_or_else(PoisonError::into_inner).insert(place) {
            log::error!("{panic}");
        }
    }));
}

/// Tells the news, and lets go of both pipes, so that whoever reads them finds their end.
fn tell(news: &News) -> std::io::Result<()> {
    let nowhere = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stderr(&nowhere)?;
    let mut out = std::io::stdout().lock();
    let told = out.write_all(news.encode().as_bytes()).and_then(|()| out.flush());
    rustix::stdio::dup2_stdout(&nowhere)?;
    told
}

/// Why service ends.
enum End {
    /// The mount is gone, or the connection to the kernel broke.
    Served(Result<()>),
    /// Somebody is in a hurry: files are still open.
    Cut,
}

/// A mount being served.
struct Session {
    fs: Arc<MountedStore>,
    /// The store and the mountpoint.
    about: String,
    /// `None` when somebody else has mounted: then only they can unmount.
    place: Option<Place>,
    ticker: Ticker,
    collector: Option<Collector>,
    signals: SignalThread,
    end: Receiver<End>,
    cut: Sender<End>,
}

impl Session {
    fn begin(assignment: Assignment, in_background: bool) -> Result<Self> {
        let Assignment { store, shares, promotes, options, settings } = assignment;
        // The daemon must not keep any folder busy, least of all one in a mount.
        std::env::set_current_dir("/").map_err(|e| Error::io("/", e))?;
        prepare_process();
        // Before the mount: a signal in between must not leave a dead one.
        let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|e| Error::io("signals", e))?;
        let store = Store::open(&store, Arc::new(SystemClock::new()), shares)?.promoting(promotes);
        let is_read_only = options.read_only;
        let collects = options.collect && !is_read_only;
        let fs = MountedStore::new(Arc::new(store), options);
        let about = format!("{} at {}", settings.fsname, settings.mountpoint.display());
        let mounted = fuse::mount(fs.clone(), &settings)?;
        let place = if settings.device.is_none() { Some(Place::find(&settings.mountpoint)?) } else { None };
        if let Some(place) = &place {
            if is_read_only
                && !settings.read_only
                && let Err(e) = place.make_read_only(settings.no_exec)
            {
                place.leave();
                return Err(e);
            }
            place.set_read_ahead();
        }
        if in_background {
            // Away from the terminal: its signals are not for us. Not before the mount: where systemd mounts on demand,
            // all but the process group that it started wait until there is one.
            rustix::process::setsid().map_err(|e| Error::io("setsid", e.into()))?;
        }
        let ticker = Ticker::start(fs.clone())?;
        let collector = collects.then(|| Collector::start(fs.clone())).transpose()?;
        let (ended, end) = mpsc::channel();
        let signals = SignalThread::start(signals, place.clone(), !in_background, ended.clone())?;
        let cut = ended.clone();
        spawn("session", move || {
            // Nobody listens any more after a cut.
            let _ = ended.send(End::Served(mounted.join()));
        })?;
        Ok(Self { fs, about, place, ticker, collector, signals, end, cut })
    }

    /// Ends the mount as a signal does.
    fn leave(&self) {
        leave(self.place.as_ref(), &self.cut);
    }

    fn serve(self) -> Result<()> {
        let end = self.end.recv();
        supervisor::stopping("committing");
        let cut = matches!(end, Ok(End::Cut));
        let served = match end {
            Ok(End::Served(served)) => served,
            Ok(End::Cut) => {
                match &self.place {
                    Some(place) => log::warn!("{}: ending with files open", place.mountpoint.display()),
                    None => log::warn!("ending while still mounted: whoever has mounted has to unmount"),
                }
                Ok(())
            }
            Err(e) => Err(Error::new(ErrorKind::Unavailable, "session thread").because(e)),
        };
        // At once: from here on the mountpoint and the device number may be those of somebody else's mount.
        self.signals.stop();
        if let Some(place) = self.place.filter(|_| !cut) {
            place.clean_up();
        }
        if let Some(collector) = self.collector {
            collector.stop(&self.fs);
        }
        self.ticker.stop();
        // Even when the connection broke: what was written is to be kept.
        let committed = self.fs.shut_down();
        if let Err(error) = &served {
            log::error!("{error}");
        }
        committed.and(served)
    }
}

fn prepare_process() {
    // Memory that the daemon asks for must not be won by writing to its own mount. Needs a privilege.
    if let Err(e) = rustix::process::configure_io_flusher_behavior(true) {
        log::debug!("io flusher: {e}");
    }
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(e) = rustix::process::setrlimit(Resource::Nofile, raised) {
        log::debug!("limit of open files: {e}");
    }
}

/// Where the mount is, and which one it is: found in the mount table, never by asking the mount itself.
#[derive(Debug, Clone)]
struct Place {
    mountpoint: PathBuf,
    device: String,
}

impl Place {
    fn find(mountpoint: &Path) -> Result<Self> {
        let rows = mountinfo::read()?;
        let row = mountinfo::top(&rows, mountpoint).filter(|row| row.kind == SNAPFS_TYPE);
        let row = row.ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, format!("{}: is not in the mount table", mountpoint.display()))
        })?;
        Ok(Self { mountpoint: mountpoint.to_owned(), device: row.device.clone() })
    }

    /// Makes this mount of the filesystem read-only, and not the filesystem: clones can be written through another mount
    /// of it, which somebody binds to their folder.
    fn make_read_only(&self, no_exec: bool) -> Result<()> {
        // A remount sets all of a mount's own flags: those of before are repeated.
        let mut flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
        if no_exec {
            flags |= MountFlags::NOEXEC;
        }
        rustix::mount::mount_remount(&self.mountpoint, flags, c"")
            .map_err(|e| Error::io(format!("{}: make it read-only", self.mountpoint.display()), e.into()))
    }

    /// Best effort: without the privilege the mount is slower, no more.
    fn set_read_ahead(&self) {
        let path = format!("/sys/class/bdi/{}/read_ahead_kb", self.device);
        if let Err(e) = std::fs::write(&path, READ_AHEAD_KIB) {
            log::debug!("{path}: {e}");
        }
    }

    /// Whether what is seen at the mountpoint is our mount. Only while it is served: device numbers are used again.
    fn is_ours(&self) -> bool {
        let Ok(rows) = mountinfo::read() else { return false };
        mountinfo::top(&rows, &self.mountpoint).is_some_and(|row| row.device == self.device)
    }

    /// Unmounts; when it is in use, it disappears now and ends with its last user.
    fn leave(&self) {
        if !self.is_ours() {
            let what = "the store is not what is mounted here: waiting until its last file is closed";
            log::warn!("{}: {what}", self.mountpoint.display());
            return;
        }
        let left = unmount(&self.mountpoint, How::Cleanly).or_else(|e| {
            log::warn!("{e}: unmounting lazily, the daemon ends when the last file is closed");
            unmount(&self.mountpoint, How::Lazily)
        });
        if let Err(e) = left {
            log::error!("{e}");
        }
    }

    /// After the end of service: a mount of ours that is still seen is dead. One that answers is a new one.
    fn clean_up(&self) {
        if self.is_ours() && is_dead(&self.mountpoint) {
            log::warn!("{}: service ended without an unmount", self.mountpoint.display());
            if let Err(e) = unmount(&self.mountpoint, How::Lazily) {
                log::error!("{e}");
            }
        }
    }
}

/// Unmounts; where only others can, service ends all the same.
fn leave(place: Option<&Place>, ended: &Sender<End>) {
    match place {
        Some(place) => place.leave(),
        None => drop(ended.send(End::Cut)),
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(|e| Error::io(format!("thread {name}"), e))
}

/// Lets the tree do what is due.
struct Ticker {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Ticker {
    fn start(fs: Arc<MountedStore>) -> Result<Self> {
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = spawn("tick", move || {
            while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                // A panic is a bug and is logged by the hook; sealing must go on for all other files.
                let _ = catch_unwind(AssertUnwindSafe(|| fs.tick()));
            }
        })?;
        Ok(Self { stop, thread })
    }

    fn stop(self) {
        drop(self.stop);
        let _ = self.thread.join();
    }
}

/// Collects in the background what was forgotten: `gc=on`.
struct Collector {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Collector {
    fn start(fs: Arc<MountedStore>) -> Result<Self> {
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = spawn("gc", move || {
            step_back();
            let mut pause = TICK;
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                // As above: a panic must not end it for all other VMs.
                pause = catch_unwind(AssertUnwindSafe(|| fs.collect_due())).unwrap_or(TICK);
            }
        })?;
        Ok(Self { stop, thread })
    }

    /// Waits for the object that is being written at the most.
    fn stop(self, fs: &MountedStore) {
        fs.end_collecting();
        drop(self.stop);
        let _ = self.thread.join();
    }
}

/// Turns signals into an unmount. A second one does not wait for files to be closed.
struct SignalThread {
    handle: Handle,
    thread: JoinHandle<()>,
}

impl SignalThread {
    /// With `has_terminal` the end of the terminal is the end of the mount.
    fn start(mut signals: Signals, place: Option<Place>, has_terminal: bool, ended: Sender<End>) -> Result<Self> {
        let handle = signals.handle();
        let thread = spawn("signals", move || {
            let mut asked = false;
            for signal in signals.forever() {
                match signal {
                    SIGHUP if !has_terminal => {}
                    _ if asked => drop(ended.send(End::Cut)),
                    _ => {
                        asked = true;
                        supervisor::stopping("unmounting, waits until the last file is closed");
                        leave(place.as_ref(), &ended);
                    }
                }
            }
        })?;
        Ok(Self { handle, thread })
    }

    fn stop(self) {
        self.handle.close();
        let _ = self.thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_arrive_as_they_were_sent() {
        assert!(matches!(News::decode(&News::Ready.encode()), Some(News::Ready)));
        for kind in KINDS {
            let sent = Error::new(kind, "store /a b: no such folder\nreally");
            let Some(News::Failed(got)) = News::decode(&News::Failed(sent).encode()) else { panic!("{kind:?}") };
            assert_eq!((got.kind(), got.to_string()), (kind, "store /a b: no such folder really".to_owned()));
        }
        for line in ["", "ready", "read\n", "failed\n", "failed Busy\n"] {
            assert!(News::decode(line).is_none(), "{line:?}");
        }
    }
}
