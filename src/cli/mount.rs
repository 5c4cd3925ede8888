//! `snapfs mount`: starts the daemon, and returns when the mount answers.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use log::LevelFilter;
use rustix::fs::{AtFlags, FileType, Stat, major, minor};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::cli::clone_place::clones_root;
use crate::cli::daemon::{self, Assignment, News};
use crate::cli::logging::{LogTarget, init_logging};
use crate::cli::mount_options::MountOptions;
use crate::cli::mountinfo::{self, SNAPFS_TYPE};
use crate::cli::store_arg::{PROMOTE_VARIABLE, promotes};
use crate::cli::supervisor::SOCKET_VARIABLE;
use crate::cli::umount::{How, is_dead, resolve, unmount};
use crate::clock::SystemClock;
use crate::error::{Error, ErrorKind, Result, busy, invalid, not_found};
use crate::fs::types::Options;
use crate::fuse::MountSettings;
use crate::limits::MEMORY_BYTES_DEFAULT;
use crate::store::{MemoryShares, Store};

/// Request threads if nothing else is said: one for each core, but at least and at most so many. Few of them would
/// let slow reads hold up quick ones, many only take memory.
const THREADS_MIN: usize = 4;
const THREADS_MAX: usize = 16;

/// Mounts of dead daemons that may lie on each other at one mountpoint.
const DEAD_MOUNTS_MAX: usize = 16;

/// Major and minor number of `/dev/fuse`, the same everywhere.
const FUSE_DEVICE: (u32, u32) = (10, 229);

/// A message of the daemon is a line; what it logs until then is some lines.
const MESSAGE_BYTES_MAX: u64 = 64 << 10;

/// Arguments of `snapfs mount`, but for the store and the mountpoint.
#[derive(Debug, clap::Args)]
pub struct Mount {
    /// Options: ro, allow_other, noallow_other, noexec, nodelete, seal_after=TIME, max_memory=SIZE, threads=N,
    /// log=FILE, clones=DIR, gc=on, promote=off
    #[arg(short = 'o', value_name = "OPTION,...")]
    pub options: Vec<String>,

    /// Stay until the store is unmounted
    #[arg(long)]
    pub foreground: bool,

    /// Log to this file instead of the system log
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,

    /// Tell on standard output what became of the mount, then let go of it: what the daemon is started with
    #[arg(long, hide = true)]
    pub ready_on_stdout: bool,
}

/// Where to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mountpoint {
    /// A folder, as the mount table has it.
    Folder(PathBuf),
    /// `/dev/fd/N`: an open `/dev/fuse` that whoever started us has mounted already, somewhere that we are not told.
    Open(i32),
}

impl Mountpoint {
    /// What a path means.
    ///
    /// # Errors
    /// As [`resolve`]; `Invalid` for a number that is none.
    pub(super) fn of(path: &Path) -> Result<Self> {
        match path.strip_prefix("/dev/fd") {
            Ok(number) => match number.to_str().and_then(|number| number.parse().ok()) {
                Some(number) if number > 2 => Ok(Self::Open(number)),
                _ => Err(invalid(format!("{}: is not /dev/fd/N", path.display()))),
            },
            Err(_) => Ok(Self::Folder(resolve(path)?)),
        }
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Folder(path) => path.clone(),
            Self::Open(number) => PathBuf::from(format!("/dev/fd/{number}")),
        }
    }
}

/// Mounts the store. In the foreground this returns when it is unmounted, else when it answers.
///
/// # Errors
/// `Invalid` for a wrong option or a mountpoint that cannot be used, `NotFound`, `Busy` when a store is mounted there,
/// and whatever the store cannot be opened for.
pub fn run(store: &Path, mountpoint: &Path, args: &Mount, max_memory: Option<u64>) -> Result<()> {
    let options = MountOptions::parse(&args.options)?;
    let shares = shares(&options, max_memory)?;
    if !args.foreground && !args.ready_on_stdout {
        init_logging(LogTarget::Stderr, LevelFilter::Warn);
        let mountpoint = Mountpoint::of(mountpoint)?;
        let (said, outcome) = wait_until_ready(start(store, &mountpoint, args, max_memory)?, &mountpoint);
        relay(&said);
        return outcome;
    }
    let log_file = args.log.as_deref().or(options.log.as_deref()).map(open_log).transpose()?;
    let target = match (args.ready_on_stdout, log_file) {
        (true, file) => LogTarget::Background(file),
        (false, Some(file)) => LogTarget::File(file),
        (false, None) => LogTarget::Stderr,
    };
    init_logging(target, LevelFilter::Warn);
    daemon::run(args.ready_on_stdout, || assignment(store, mountpoint, &options, shares))
}

/// Checks all that can be checked without mounting; changes nothing.
///
/// # Errors
/// As [`run`].
pub(super) fn check(store: &Path, mountpoint: &Mountpoint, options: &MountOptions) -> Result<()> {
    let shares = shares(options, None)?;
    let store = canonical(store)?;
    match mountpoint {
        Mountpoint::Open(number) => drop(device(*number)?),
        Mountpoint::Folder(folder) => {
            let rows = mountinfo::read()?;
            match mountinfo::top(&rows, folder).filter(|row| row.kind == SNAPFS_TYPE) {
                Some(row) if !is_dead(folder) => return Err(mounted_there(folder, row)),
                // A dead mount would be taken away; what is below cannot be seen yet.
                Some(_) => {}
                None => check_mountpoint(folder, &store)?,
            }
        }
    }
    Store::open(&store, Arc::new(SystemClock::new()), shares).map(drop)
}

fn shares(options: &MountOptions, max_memory: Option<u64>) -> Result<MemoryShares> {
    MemoryShares::of(max_memory.or(options.max_memory).unwrap_or(MEMORY_BYTES_DEFAULT))
}

/// The path of a store, absolute and without links.
///
/// # Errors
/// `NotFound`, `Denied`, `Unavailable`.
pub(super) fn canonical(store: &Path) -> Result<PathBuf> {
    store.canonicalize().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => not_found(format!("store {}: there is no such folder", store.display())),
        _ => Error::io(format!("store {}", store.display()), e),
    })
}

/// All that the daemon must know; checks what can be checked before the store is opened.
fn assignment(store: &Path, mountpoint: &Path, options: &MountOptions, shares: MemoryShares) -> Result<Assignment> {
    let mountpoint = Mountpoint::of(mountpoint)?;
    let (store, device, allow_other) = match &mountpoint {
        Mountpoint::Folder(folder) => {
            let store = canonical(store)?;
            clear_of_dead(folder)?;
            check_mountpoint(folder, &store)?;
            // Permissions are checked all the same, and a folder of a VM is its creator's: root mounts for everybody.
            (store, None, options.allow_other.unwrap_or_else(|| rustix::process::geteuid().is_root()))
        }
        Mountpoint::Open(number) => {
            check_not_inside_a_mount(store)?;
            let allow_other = options.allow_other.unwrap_or(false);
            if allow_other && !options.default_permissions {
                // The kernel would check nothing, and here nothing is checked either: everybody could read every disk.
                return Err(invalid("allow_other: needs default_permissions when somebody else has mounted"));
            }
            (canonical(store)?, Some(device(*number)?), allow_other)
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let is_root = rustix::process::geteuid().is_root();
    let settings = MountSettings {
        mountpoint: mountpoint.path(),
        device,
        fsname: store.to_string_lossy().into_owned(),
        // Clones are written in a read-only mount too: root makes the mountpoint read-only, not the filesystem.
        read_only: options.read_only && !is_root,
        allow_other,
        no_exec: options.no_exec,
        threads: options.threads.unwrap_or(cores.clamp(THREADS_MIN, THREADS_MAX)),
    };
    let defaults = Options::default();
    let seal_after = options.seal_after.unwrap_or(defaults.seal_after);
    let clones = match clones_root(options.clones.as_deref()) {
        Ok(folder) => Some(folder),
        Err(e) => {
            log::warn!("there are no clones in this mount: {e}");
            None
        }
    };
    let (no_delete, collect) = (options.no_delete, options.collect);
    let promotes = match options.promote {
        Some(on) => on,
        None => promotes(std::env::var_os(PROMOTE_VARIABLE))?,
    };
    let options = Options { read_only: options.read_only, seal_after, clones, no_delete, collect };
    Ok(Assignment { store, shares, promotes, options, settings })
}

/// An open `/dev/fuse`, by its number. The number itself stays open too, until the process ends.
fn device(number: i32) -> Result<OwnedFd> {
    let about = format!("/dev/fd/{number}");
    // The one way to own a number without believing that it is open.
    let this = pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).map_err(|e| Error::io(&about, e.into()))?;
    let device = pidfd_getfd(this, number, PidfdGetfdFlags::empty()).map_err(|e| Error::io(&about, e.into()))?;
    let status = rustix::fs::fstat(&device).map_err(|e| Error::io(&about, e.into()))?;
    let is_device = FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice;
    if !is_device || (major(status.st_rdev), minor(status.st_rdev)) != FUSE_DEVICE {
        return Err(invalid(format!("{about}: is not /dev/fuse")));
    }
    Ok(device)
}

/// A mount that nobody serves yet hangs whoever looks into it: so this looks at the mount table only.
fn check_not_inside_a_mount(store: &Path) -> Result<()> {
    let path = std::path::absolute(store).map_err(|e| Error::io(store.display().to_string(), e))?;
    let rows = mountinfo::read()?;
    match rows.iter().find(|row| row.kind == SNAPFS_TYPE && path.starts_with(&row.mountpoint)) {
        Some(row) => Err(invalid(format!("store {}: lies in the mount {}", path.display(), row.mountpoint.display()))),
        None => Ok(()),
    }
}

fn open_log(path: &Path) -> Result<std::fs::File> {
    let file = std::fs::File::options().create(true).append(true).open(path);
    file.map_err(|e| Error::io(format!("log {}", path.display()), e))
}

/// Takes away mounts whose daemon has died.
fn clear_of_dead(mountpoint: &Path) -> Result<()> {
    for _ in 0..DEAD_MOUNTS_MAX {
        let rows = mountinfo::read()?;
        let Some(row) = mountinfo::top(&rows, mountpoint).filter(|row| row.kind == SNAPFS_TYPE) else { return Ok(()) };
        let mounted = mounted_there(mountpoint, row);
        if !is_dead(mountpoint) {
            return Err(mounted);
        }
        log::warn!("{mounted}, but its daemon has died: unmounting");
        unmount(mountpoint, How::Lazily)?;
    }
    Err(busy(format!("{}: too many dead mounts on each other", mountpoint.display())))
}

fn mounted_there(mountpoint: &Path, row: &mountinfo::Row) -> Error {
    busy(format!("{}: {} is mounted there", mountpoint.display(), row.source.to_string_lossy()))
}

/// A mountpoint must be a folder, and must not hide the store nor lie in it: the daemon would wait for itself.
fn check_mountpoint(mountpoint: &Path, store: &Path) -> Result<()> {
    let at = status_of(mountpoint)?;
    if FileType::from_raw_mode(at.st_mode) != FileType::Directory {
        return Err(invalid(format!("{}: is no folder", mountpoint.display())));
    }
    let of_store = status_of(store)?;
    // By identity, not by path: a bind mount is another path to the same folder.
    let same = |a: &Stat, b: &Stat| (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino);
    let within = |inner: &Path, outer: &Stat| {
        inner.ancestors().any(|folder| status_of(folder).is_ok_and(|folder| same(&folder, outer)))
    };
    let relation = if same(&at, &of_store) {
        "is"
    } else if mountpoint.starts_with(store) || within(mountpoint, &of_store) {
        "lies in"
    } else if store.starts_with(mountpoint) || within(store, &at) {
        "holds"
    } else {
        return Ok(());
    };
    Err(invalid(format!("{}: {relation} the store {}", mountpoint.display(), store.display())))
}

/// Where systemd mounts on demand the mountpoint is a trigger: what the standard library asks would wait for this very
/// mount.
fn status_of(path: &Path) -> Result<Stat> {
    rustix::fs::statat(rustix::fs::CWD, path, AtFlags::NO_AUTOMOUNT)
        .map_err(|e| Error::io(path.display().to_string(), e.into()))
}

/// Starts the daemon.
///
/// # Errors
/// `Unavailable` and others when there can be no new process.
pub(super) fn start(store: &Path, mountpoint: &Mountpoint, args: &Mount, max_memory: Option<u64>) -> Result<Child> {
    let program = std::env::current_exe().map_err(|e| Error::io("own program", e))?;
    Command::new(program)
        .args(daemon_arguments(store, mountpoint, args, max_memory)?)
        // Whose service this is, a mount in the background is not it.
        .env_remove(SOCKET_VARIABLE)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Error::io("start the daemon", e))
}

/// Waits until the mount answers. Also returns what the daemon has logged until then.
pub(super) fn wait_until_ready(mut daemon: Child, mountpoint: &Mountpoint) -> (String, Result<()>) {
    let (news, said) = listen(&mut daemon);
    let outcome = match news {
        Some(News::Ready) => check_answers(mountpoint),
        Some(News::Failed(error)) => {
            // Its end is near; so it leaves no zombie to a caller that stays.
            let _ = daemon.wait();
            Err(error)
        }
        None => {
            let status = daemon.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
            let last = said.lines().rfind(|line| !line.is_empty()).unwrap_or("it said nothing");
            let last = last.strip_prefix("snapfs: ").unwrap_or(last);
            let context = format!("the daemon ended before it was ready, {status}: {last}");
            return (String::new(), Err(Error::new(ErrorKind::Unavailable, context)));
        }
    };
    (said, outcome)
}

/// What the daemon says: its news, and what it has logged on standard error until then.
fn listen(child: &mut Child) -> (Option<News>, String) {
    let errors = child.stderr.take();
    // Read at the same time: a daemon that fills one pipe must not wait for us at the other.
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut pipe) = errors {
            let _ = pipe.by_ref().take(MESSAGE_BYTES_MAX).read_to_end(&mut text);
            let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let mut line = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        let _ = BufReader::new(pipe.take(MESSAGE_BYTES_MAX)).read_until(b'\n', &mut line);
    }
    let news = News::decode(&String::from_utf8_lossy(&line));
    // The daemon lets go of standard error before it tells its news, or ends: this ends too.
    (news, errors.join().unwrap_or_default())
}

/// Says on standard error what the daemon has logged.
pub(super) fn relay(said: &str) {
    let _ = std::io::stderr().write_all(said.as_bytes());
}

/// The last word on whether it is mounted has the kernel, and on whether it answers, the mount.
fn check_answers(mountpoint: &Mountpoint) -> Result<()> {
    // Nothing to look at: the daemon's word counts.
    let Mountpoint::Folder(mountpoint) = mountpoint else { return Ok(()) };
    let rows = mountinfo::read()?;
    if mountinfo::top(&rows, mountpoint).is_none_or(|row| row.kind != SNAPFS_TYPE) {
        let context = format!("{}: was unmounted at once", mountpoint.display());
        return Err(Error::new(ErrorKind::Unavailable, context));
    }
    std::fs::metadata(mountpoint).map(drop).map_err(|e| Error::io(mountpoint.display().to_string(), e))
}

/// The arguments that start the daemon. Paths become absolute, so that none looks like an option.
fn daemon_arguments(
    store: &Path,
    mountpoint: &Mountpoint,
    args: &Mount,
    max_memory: Option<u64>,
) -> Result<Vec<OsString>> {
    let absolute = |path: &Path| {
        std::path::absolute(path).map(PathBuf::into_os_string).map_err(|e| Error::io(path.display().to_string(), e))
    };
    let mut words: Vec<OsString> = vec!["mount".into(), "--ready-on-stdout".into()];
    words.extend(["--store".into(), absolute(store)?]);
    for list in &args.options {
        words.extend(["-o".into(), list.into()]);
    }
    if let Some(bytes) = max_memory {
        words.extend(["--max-memory".into(), bytes.to_string().into()]);
    }
    if let Some(log) = &args.log {
        words.extend(["--log".into(), absolute(log)?]);
    }
    words.push(mountpoint.path().into_os_string());
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_mountpoint_in_or_around_the_store_is_refused() {
        let outer = tempfile::tempdir().unwrap();
        let outer = outer.path().canonicalize().unwrap();
        let (store, inside, beside) = (outer.join("store"), outer.join("store/mnt"), outer.join("store-mnt"));
        std::fs::create_dir_all(&inside).unwrap();
        std::fs::create_dir(&beside).unwrap();
        std::fs::write(outer.join("file"), "").unwrap();
        for (point, word) in [(&inside, "lies in"), (&store, "is the store"), (&outer, "holds")] {
            let refused = check_mountpoint(point, &store).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Invalid);
            assert!(refused.to_string().contains(word), "{refused}");
        }
        assert_eq!(check_mountpoint(&outer.join("file"), &store).unwrap_err().kind(), ErrorKind::Invalid);
        assert!(check_mountpoint(&beside, &store).is_ok());
    }

    #[test]
    fn the_daemon_gets_the_same_order() {
        let args = Mount {
            options: vec!["ro".to_owned(), "seal_after=1s,threads=2".to_owned()],
            foreground: false,
            log: Some(PathBuf::from("/var/log/x")),
            ready_on_stdout: false,
        };
        let folder = Mountpoint::Folder(PathBuf::from("/mnt/a b"));
        let words = daemon_arguments(Path::new("/srv/s"), &folder, &args, Some(1 << 30)).unwrap();
        let expected = "mount|--ready-on-stdout|--store|/srv/s|-o|ro|-o|seal_after=1s,threads=2|--max-memory|1073741824|\
                        --log|/var/log/x|/mnt/a b";
        assert_eq!(words.join(std::ffi::OsStr::new("|")), expected);
        let words = daemon_arguments(Path::new("-s"), &Mountpoint::Open(7), &args, None).unwrap();
        assert!(words.iter().skip_while(|word| *word != "--store").nth(1).is_some_and(|s| Path::new(s).is_absolute()));
        assert_eq!(words.last().unwrap(), "/dev/fd/7");
    }

    #[test]
    fn an_open_device_is_a_mountpoint() {
        assert_eq!(Mountpoint::of(Path::new("/dev/fd/7")).unwrap(), Mountpoint::Open(7));
        for path in ["/dev/fd/", "/dev/fd/x", "/dev/fd/-1", "/dev/fd/1", "/dev/fd/7/8"] {
            assert_eq!(Mountpoint::of(Path::new(path)).unwrap_err().kind(), ErrorKind::Invalid, "{path}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Mountpoint::of(folder.path()).unwrap(), Mountpoint::Folder(_)));
        // Open, but no /dev/fuse; and not open at all.
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(device(file.as_raw_fd()).unwrap_err().kind(), ErrorKind::Invalid);
        assert!(device(1 << 20).is_err());
    }
}
