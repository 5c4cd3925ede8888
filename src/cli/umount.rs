//! `snapfs umount`: unmounts, and returns when the daemon has committed everything and is gone.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::cli::attach::user_of;
use crate::cli::mountinfo::{self, SNAPFS_TYPE};
use crate::error::{Error, ErrorKind, Result, busy, invalid, not_found};

/// The file of a mount that tells the daemon's process number, among other things.
const STATUS_FILE: &str = ".snapfs/status";

/// The status file is a page of text.
const STATUS_BYTES_MAX: u64 = 1 << 20;

/// A mount is busy for a moment after a loop device was detached or a file was closed: asked again after
/// [`BUSY_PAUSE`].
const BUSY_TRIES: usize = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// How often a long wait is told of.
const WAIT_NOTICE_SECONDS: i64 = 30;

/// Links that a mountpoint's path may have at its end.
const LINKS_MAX: usize = 16;

/// Unmounts the store at `mountpoint` and waits for its daemon, however long it takes to commit.
///
/// # Errors
/// `NotFound` when nothing is mounted there, `Invalid` when it is no store of ours, `Busy` when it is in use,
/// `Denied`, `Unavailable`.
pub fn run(mountpoint: &Path) -> Result<()> {
    let path = resolve(mountpoint)?;
    check_is_ours(&path)?;
    if is_dead(&path) {
        return unmount(&path, How::Lazily);
    }
    check_is_not_attached(&path)?;
    let daemon = daemon_of(&path);
    let mut tries = 1;
    loop {
        match unmount(&path, How::Cleanly) {
            Err(e) if e.kind() == ErrorKind::Busy && tries < BUSY_TRIES => std::thread::sleep(BUSY_PAUSE),
            outcome => break outcome?,
        }
        tries += 1;
    }
    daemon.map_or(Ok(()), |daemon| daemon.wait(&path))
}

/// Unmounts without asking the daemon for anything, and does not wait for it: it may hang. `force` ends what is under
/// way with an error; `lazy` takes the mount out of sight when it is in use.
///
/// # Errors
/// As [`run`].
pub(super) fn at_once(mountpoint: &Path, force: bool, lazy: bool) -> Result<()> {
    let rows = mountinfo::read()?;
    // A path of the table is taken as it is: to resolve it would ask the daemon.
    let path = match mountinfo::top(&rows, mountpoint) {
        Some(_) => mountpoint.to_owned(),
        None => resolve(mountpoint)?,
    };
    check_is_ours(&path)?;
    let forced = if force { unmount(&path, How::Forcibly) } else { Err(in_use(&path)) };
    match forced {
        Err(e) if e.kind() == ErrorKind::Busy && lazy => unmount(&path, How::Lazily),
        outcome => outcome,
    }
}

fn check_is_ours(path: &Path) -> Result<()> {
    let rows = mountinfo::read()?;
    match mountinfo::top(&rows, path) {
        None => Err(not_found(format!("{}: nothing is mounted there", path.display()))),
        Some(row) if row.kind != SNAPFS_TYPE => {
            Err(invalid(format!("{}: is a mount of type {}, not a store", path.display(), row.kind)))
        }
        Some(_) => Ok(()),
    }
}

/// Refuses while a device shows a file of the filesystem that goes with this mount, its last one.
fn check_is_not_attached(path: &Path) -> Result<()> {
    let rows = mountinfo::read()?;
    let Some(top) = mountinfo::top(&rows, path) else { return Ok(()) };
    if rows.iter().any(|row| row.device == top.device && row.id != top.id) {
        return Ok(());
    }
    match user_of(&top.device) {
        Some(user) => Err(busy(format!("{}: is in use: {user}", path.display()))),
        None => Ok(()),
    }
}

/// How to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Not while it is in use.
    Cleanly,
    /// Out of sight at once, and really when nobody uses it any more.
    Lazily,
    /// Ends all requests that wait for the daemon first.
    Forcibly,
}

/// Unmounts what is topmost at `path`.
pub(super) fn unmount(path: &Path, how: How) -> Result<()> {
    let flags = match how {
        How::Cleanly => UnmountFlags::NOFOLLOW,
        How::Lazily => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
        How::Forcibly => UnmountFlags::NOFOLLOW | UnmountFlags::FORCE,
    };
    match rustix::mount::unmount(path, flags) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => Err(in_use(path)),
        Err(Errno::PERM) => through_helper(path, how),
        Err(e) => Err(Error::io(format!("umount {}", path.display()), e.into())),
    }
}

fn in_use(path: &Path) -> Error {
    busy(format!("{}: is in use", path.display()))
}

/// Only root may unmount; others go through FUSE's own program, which looks whose mount it is.
fn through_helper(path: &Path, how: How) -> Result<()> {
    let options = if how == How::Lazily { "-uz" } else { "-u" };
    let output = Command::new("fusermount3").arg(options).arg("--").arg(path).stdin(Stdio::null()).output();
    let output = output
        .map_err(|e| Error::new(ErrorKind::Denied, format!("umount {}: fusermount3", path.display())).because(e))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(in_use(path));
    }
    let said = said.lines().next().unwrap_or("fusermount3 failed");
    Err(Error::new(ErrorKind::Denied, format!("umount {}: {said}", path.display())))
}

/// Whether the daemon of the mount at `path` has died.
pub(super) fn is_dead(path: &Path) -> bool {
    // statfs always asks the daemon; what stat tells may come from the kernel's cache.
    matches!(rustix::fs::statfs(path), Err(Errno::NOTCONN | Errno::CONNABORTED))
}

/// The path of a mountpoint as the mount table has it: absolute, without links. Works on one whose daemon has died.
///
/// # Errors
/// `NotFound`, `Denied`, `Unavailable`.
pub(super) fn resolve(path: &Path) -> Result<PathBuf> {
    let failed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => not_found(format!("{}: there is no such folder", path.display())),
        _ => Error::io(path.display().to_string(), e),
    };
    let mut current = std::path::absolute(path).map_err(failed)?;
    for _ in 0..LINKS_MAX {
        match current.canonicalize() {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)) => {}
            outcome => return outcome.map_err(failed),
        }
        // The last part cannot be asked: resolve what leads to it.
        let (Some(parent), Some(name)) = (current.parent(), current.file_name()) else { return Ok(current) };
        let parent = parent.canonicalize().map_err(failed)?;
        let full = parent.join(name);
        match full.read_link() {
            Ok(target) => current = parent.join(target),
            Err(_) => return Ok(full),
        }
    }
    Err(invalid(format!("{}: too many links", path.display())))
}

/// The process that serves a mount, held so that its number cannot come to mean another.
struct Daemon {
    pid: i32,
    handle: rustix::fd::OwnedFd,
}

/// The daemon of a mount; `None` when it does not tell.
fn daemon_of(path: &Path) -> Option<Daemon> {
    use std::io::Read;
    let mut text = Vec::new();
    let file = std::fs::File::open(path.join(STATUS_FILE)).ok()?;
    file.take(STATUS_BYTES_MAX).read_to_end(&mut text).ok()?;
    let pid = pid_in(&text)?;
    let handle = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    Some(Daemon { pid, handle })
}

fn pid_in(status: &[u8]) -> Option<i32> {
    let status: serde_json::Value = serde_json::from_slice(status).ok()?;
    i32::try_from(status.get("pid")?.as_i64()?).ok().filter(|pid| *pid > 0)
}

impl Daemon {
    fn wait(&self, path: &Path) -> Result<()> {
        let notice = Timespec { tv_sec: WAIT_NOTICE_SECONDS, tv_nsec: 0 };
        loop {
            let mut fds = [PollFd::from_borrowed_fd(self.handle.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&notice)) {
                Ok(0) => log::warn!("{}: waiting for process {} to commit", path.display(), self.pid),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(Error::io(format!("wait for process {}", self.pid), e.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_number_is_read_from_the_status() {
        assert_eq!(pid_in(br#"{"version": "1", "pid": 4711, "vms": []}"#), Some(4711));
        for text in [&b""[..], b"[]", b"{}", br#"{"pid": "1"}"#, br#"{"pid": -1}"#, br#"{"pid": 0}"#, b"\xff"] {
            assert_eq!(pid_in(text), None);
        }
    }

    #[test]
    fn a_path_is_resolved_like_the_mount_table_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap().join("mnt");
        std::fs::create_dir(&real).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("mnt", &link).unwrap();
        assert_eq!(resolve(&link).unwrap(), real);
        assert_eq!(resolve(&folder.path().join("mnt/../mnt/.")).unwrap(), real);
        assert_eq!(resolve(&folder.path().join("none")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_is_no_store_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(run(folder.path()).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(run(Path::new("/proc")).unwrap_err().kind(), ErrorKind::Invalid);
    }
}
