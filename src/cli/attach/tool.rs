//! Programs of the system that commands call: run to their end, but never longer than a limit.
//!
//! A program that looks at a mount hangs as long as the mount's daemon does. What calls us may not wait for ever: libxl
//! kills a script after 40 seconds.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::error::{Error, ErrorKind, Result, not_found};

/// How long a killed program may take to end. One that hangs in the kernel does not, and is left behind.
const END_SECONDS: u64 = 1;

/// Folders of the administrator's programs, which need not be in everybody's search path.
const MORE_FOLDERS: &str = "/usr/local/sbin:/usr/sbin:/sbin";

/// A program by its name, in plain English and with no input.
pub fn command(program: &str) -> Command {
    let mut path = std::env::var_os("PATH").filter(|path| !path.is_empty()).unwrap_or_else(|| OsString::from("/bin"));
    path.push(":");
    path.push(MORE_FOLDERS);
    let mut command = Command::new(program);
    command.env("PATH", path).env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// Runs a program and returns what it said; kills it when that takes longer than `limit`.
///
/// # Errors
/// `NotFound` when it is not installed, `Unavailable` when it does not end in time, `Denied`.
pub fn run(mut command: Command, limit: Duration) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => not_found(format!("{name} is not installed")),
        _ => Error::io(&name, e),
    })?;
    // Opened before anybody waits for the child, so that the number means this child and no other.
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let handle = id.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let ended = bounded(&name, limit, move || child.wait_with_output().map_err(|e| Error::io("wait", e)));
    if ended.is_err()
        && let Some(handle) = handle
    {
        let _ = pidfd_send_signal(handle.as_fd(), Signal::KILL);
        let mut fds = [rustix::event::PollFd::new(&handle, rustix::event::PollFlags::IN)];
        let patience = rustix::event::Timespec { tv_sec: END_SECONDS as i64, tv_nsec: 0 };
        let _ = rustix::event::poll(&mut fds, Some(&patience));
    }
    ended
}

/// Runs a program that has to succeed, and returns what it printed.
///
/// # Errors
/// As [`run`]; for a program that failed its own words, as `Busy` or `Denied` where these say so, else `Unavailable`.
pub fn succeed(command: Command, limit: Duration) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = run(command, limit)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("failed and said nothing").trim();
    let kind = [("busy", ErrorKind::Busy), ("denied", ErrorKind::Denied), ("not permitted", ErrorKind::Denied)];
    let kind = kind.into_iter().find(|(word, _)| said.contains(word)).map_or(ErrorKind::Unavailable, |(_, kind)| kind);
    let prefix = format!("{name}: ");
    Err(Error::new(kind, format!("{name}: {}", said.strip_prefix(&prefix).unwrap_or(said))))
}

/// Does something that may hang, in a thread of its own, which is left behind when it does.
///
/// # Errors
/// `Unavailable` when it takes longer than `limit`; else its own.
pub fn bounded<T: Send + 'static>(
    what: &str,
    limit: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, outcome) = mpsc::channel();
    let started = std::thread::Builder::new().spawn(move || {
        // Nobody listens any more when the limit is over.
        let _ = done.send(work());
    });
    started.map_err(|e| Error::io("thread", e))?;
    outcome.recv_timeout(limit).unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Unavailable, format!("{what}: no answer within {} s", limit.as_secs())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Command {
        let mut command = command("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_a_program_prints_is_returned() {
        assert_eq!(succeed(shell("echo yes; echo no >&2"), LONG).unwrap(), "yes\n");
    }

    #[test]
    fn its_last_words_are_the_reason() {
        for (script, kind, said) in [
            (
                "echo first >&2; echo 'sh: /dev/x: Device or resource busy' >&2; false",
                ErrorKind::Busy,
                "sh: /dev/x: Dev",
            ),
            ("echo 'Permission denied' >&2; false", ErrorKind::Denied, "sh: Permission denied"),
            ("exit 7", ErrorKind::Unavailable, "sh: failed and said nothing"),
        ] {
            let refused = succeed(shell(script), LONG).unwrap_err();
            assert_eq!(refused.kind(), kind, "{script}");
            assert!(refused.to_string().starts_with(said), "{refused}");
        }
        let refused = succeed(command("no-such-program"), LONG).unwrap_err();
        assert_eq!(
            (refused.kind(), refused.to_string().as_str()),
            (ErrorKind::NotFound, "no-such-program is not installed")
        );
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let mut hanging = shell("echo $$ > pid; exec sleep 600");
        hanging.current_dir(folder.path());
        let refused = succeed(hanging, Duration::from_secs(1)).unwrap_err();
        assert!(refused.to_string().contains("no answer within 1 s"), "{refused}");
        let pid = std::fs::read_to_string(folder.path().join("pid")).unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        assert!(stat.is_err() || stat.is_ok_and(|stat| stat.contains(") Z ")), "it still runs");
    }
}
