//! The command line: parses, runs one command, turns its outcome into an exit code. One command a file.

pub mod attach;
pub mod backup;
pub mod batch;
pub mod check;
pub mod clone;
pub mod clone_place;
pub mod clones;
pub mod commit;
pub mod daemon;
pub mod demo;
pub mod diff;
pub mod files;
pub mod forget;
pub mod gc;
pub mod helper;
pub mod host_config;
pub mod init;
pub mod job_args;
pub mod list;
pub mod logging;
pub mod mount;
pub mod mount_options;
pub mod mountinfo;
pub mod output;
pub mod popular;
pub mod protect;
pub mod restore;
pub mod settings;
pub mod show;
pub mod stats;
pub mod store_arg;
pub mod supervisor;
pub mod target;
pub mod umount;
pub mod unclone;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use log::LevelFilter;

use crate::cli::helper::Helper;
use crate::cli::host_config::HostConfig;
use crate::cli::logging::{LogTarget, init_logging};
use crate::cli::store_arg::{STORE_VARIABLE, parse_size, with_store};
use crate::error::{Error, ErrorKind, invalid};

/// All is done.
pub const DONE: u8 = 0;
/// It failed.
pub const FAILED: u8 = 1;
/// The command was called wrongly.
pub const USAGE: u8 = 2;
/// The named thing is not there.
pub const NOT_FOUND: u8 = 3;
/// Damaged data was found.
pub const DAMAGED: u8 = 4;
/// Another is at work.
pub const BUSY: u8 = 5;
/// No room is left.
pub const NO_SPACE: u8 = 6;

const EXIT_CODES: &str = "\
Exit codes:
  0 done, 1 failed, 2 usage, 3 not found, 4 damaged data found, 5 busy, 6 no space

With SNAPFS_STORE set, or --store STORE given, the argument STORE is left out.

Examples:
  snapfs init /srv/snapfs
  snapfs backup /srv/snapfs web01/monday.img /dev/vg/web01
  snapfs restore /srv/snapfs web01/latest web01.img
  snapfs demo";

const MOUNT_EXAMPLES: &str = "\
Examples:
  snapfs mount /srv/snapfs /mnt/snapfs
  snapfs mount /srv/snapfs /mnt/snapfs -o ro,allow_other
  cp web01.img /mnt/snapfs/web01/monday.part && mv /mnt/snapfs/web01/monday.part /mnt/snapfs/web01/monday.img

Mount options:
  ro                 nothing of the store can change
  seal_after=TIME    grace time after the last close: 500ms, 5s, 2m, 1h [default: 5s]
  max_memory=SIZE    memory to use at the most [default: 256M]
  threads=N          threads that answer requests [default: one a core, 4 to 16]
  allow_other        other users may ask; permissions count all the same [default for root]
  noallow_other      only the user who mounts may ask [default for others]
  noexec             no programs are run from the mount
  nodelete           nothing can be removed through this mount (EPERM)
  gc=on              what is forgotten through this mount is collected in the background [default: off]
  promote=off        blocks that another VM has are not shared before an election [default: on]
  clones=DIR         where writable clones are kept [default: /var/lib/snapfs/clones for root]
  log=FILE           log to a file instead of the system log

With mount -t snapfs and in fstab there are also
  setuid=USER        served by this user, who owns the store
  drop_privileges    served without any privilege";

const UMOUNT_EXAMPLES: &str = "\
Examples:
  snapfs umount /mnt/snapfs";

/// A snapshot filesystem for VM disk images: every snapshot is a file, stored once
#[derive(Debug, Parser)]
#[command(name = "snapfs", version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a store in a folder that is empty or not there yet
    #[command(after_help = init::EXAMPLES)]
    Init(init::Init),
    /// Mount a store: every snapshot is a file; returns when the mount answers
    #[command(after_help = MOUNT_EXAMPLES)]
    Mount(MountCommand),
    /// Unmount a store; returns when all is committed
    #[command(after_help = UMOUNT_EXAMPLES)]
    Umount(Umount),
    /// Back up a file, a block device or standard input as a new snapshot
    #[command(after_help = backup::EXAMPLES)]
    Backup(backup::Backup),
    /// Back up many images at once, on one or several hosts, each distinct block once
    #[command(after_help = batch::EXAMPLES)]
    Batch(batch::Batch),
    /// Restore a snapshot to a file, a block device or standard output
    #[command(after_help = restore::EXAMPLES)]
    Restore(restore::Restore),
    /// List snapshots
    #[command(after_help = list::EXAMPLES)]
    List(list::List),
    /// Show a snapshot, and what each level of deduplication saved
    #[command(after_help = show::EXAMPLES)]
    Show(show::Show),
    /// Show the ranges in which two snapshots differ
    #[command(after_help = diff::EXAMPLES)]
    Diff(diff::Diff),
    /// Forget snapshots, by name or by rules; gc frees their space
    #[command(after_help = forget::EXAMPLES)]
    Forget(forget::Forget),
    /// Protect snapshots against being forgotten
    #[command(after_help = protect::EXAMPLES)]
    Protect(protect::Protect),
    /// Let protected snapshots be forgotten again
    #[command(after_help = protect::UNPROTECT_EXAMPLES)]
    Unprotect(protect::Protect),
    /// Free the space of forgotten snapshots
    #[command(after_help = gc::EXAMPLES)]
    Gc(gc::Gc),
    /// Elect the blocks that VMs share, or show what that is worth
    #[command(after_help = popular::EXAMPLES)]
    Popular(popular::Popular),
    /// Check the store for damage
    #[command(after_help = check::EXAMPLES)]
    Check(check::Check),
    /// Show what the store holds and what it saves
    #[command(after_help = stats::EXAMPLES)]
    Stats(stats::Stats),
    /// List, add or remove the targets of a store: the folders that hold its objects
    #[command(after_help = target::EXAMPLES)]
    Target(target::Target),
    /// Make a block device of a snapshot
    #[command(after_help = attach::EXAMPLES)]
    Attach(attach::Attach),
    /// Free a block device that attach has made
    #[command(after_help = attach::detach::EXAMPLES)]
    Detach(attach::detach::Detach),
    /// Look into an image: list a folder of it, copy a file out
    #[command(after_help = files::EXAMPLES)]
    Files(files::Files),
    /// What files does in a process of its own
    #[command(hide = true)]
    FilesInside(files::kernel::Inside),
    /// Free what is attached for guests that are gone
    #[command(after_help = attach::reap::EXAMPLES)]
    Reap(attach::reap::Reap),
    /// Make a writable clone of a snapshot, and print the path of its file in the mount
    #[command(after_help = clone::EXAMPLES)]
    Clone(clone::Clone),
    /// List the writable clones of a store on this host
    #[command(after_help = clones::EXAMPLES)]
    Clones(clones::Clones),
    /// Remove a writable clone and all that was written to it
    #[command(after_help = unclone::EXAMPLES)]
    Unclone(unclone::Unclone),
    /// Show or change what is set in the store, for all who use it
    #[command(after_help = settings::EXAMPLES)]
    Settings(settings::Settings),
    /// Make a new snapshot of a writable clone; reads only what was written to it
    #[command(after_help = commit::EXAMPLES)]
    Commit(commit::Commit),
    /// Take the whole tour on a made image, in a temporary folder
    #[command(after_help = demo::EXAMPLES)]
    Demo(demo::Demo),
}

#[derive(Debug, clap::Args)]
struct MountCommand {
    /// The store: a folder; left out when --store, SNAPFS_STORE or the host's configuration tells it
    #[arg(value_name = "STORE")]
    store: Option<PathBuf>,

    /// Where to mount: an existing folder outside of the store; left out when the host's configuration tells it
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: Option<PathBuf>,

    /// The store, in place of the first argument
    #[arg(long = "store", value_name = "STORE", id = "store_option")]
    store_option: Option<PathBuf>,

    /// Memory to use at the most, for example 512M [default: 256M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_memory: Option<u64>,

    #[command(flatten)]
    mount: mount::Mount,
}

impl MountCommand {
    fn run(&self) -> Outcome {
        let store = or_configured(self.store.as_deref(), "store", |host| host.store)?;
        let mountpoint = or_configured(self.mountpoint.as_deref(), "mountpoint", |host| host.mountpoint)?;
        done(mount::run(&store, &mountpoint, &self.mount, self.max_memory))
    }
}

#[derive(Debug, clap::Args)]
struct Umount {
    /// Where the store is mounted; left out when the host's configuration tells it
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: Option<PathBuf>,
}

impl Umount {
    fn run(&self) -> Outcome {
        done(umount::run(&or_configured(self.mountpoint.as_deref(), "mountpoint", |host| host.mountpoint)?))
    }
}

/// What was given, or else what the host's configuration has under `key`.
fn or_configured(
    given: Option<&Path>,
    key: &str,
    pick: impl FnOnce(HostConfig) -> Option<PathBuf>,
) -> Result<PathBuf, Stop> {
    if let Some(given) = given {
        return Ok(given.to_owned());
    }
    pick(HostConfig::read()?).ok_or_else(|| {
        let argument = key.to_uppercase();
        Stop::usage(invalid(format!("no {argument} is given, and {} has no {key:?}", host_config::file().display())))
    })
}

/// Why a command ends before it is done: an exit code, and the message for standard error.
#[derive(Debug)]
pub struct Stop {
    code: u8,
    message: Option<String>,
}

impl Stop {
    /// The command was called wrongly.
    pub fn usage(error: Error) -> Self {
        Self { code: USAGE, message: Some(error.to_string()) }
    }

    /// Nobody listens any more.
    pub fn quiet() -> Self {
        Self { code: DONE, message: None }
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self { code: exit_code(error.kind()), message: Some(error.to_string()) }
    }
}

/// How a command ends: its exit code, or why it stopped.
pub type Outcome = Result<u8, Stop>;

/// The exit code of an error (docs/OPERATIONS.md has the table).
pub fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::NotFound | ErrorKind::Stale => NOT_FOUND,
        ErrorKind::Corrupt => DAMAGED,
        ErrorKind::Busy => BUSY,
        ErrorKind::NoSpace => NO_SPACE,
        ErrorKind::Exists
        | ErrorKind::Unavailable
        | ErrorKind::Unsupported
        | ErrorKind::Invalid
        | ErrorKind::Sealed
        | ErrorKind::ReadOnly
        | ErrorKind::Denied
        | ErrorKind::NotEmpty
        | ErrorKind::CrossVm
        | ErrorKind::TooLong
        | ErrorKind::TooLarge
        | ErrorKind::IsFolder
        | ErrorKind::NotFolder => FAILED,
    }
}

/// What the program can be told: for the manual, which is made from it.
pub fn command() -> clap::Command {
    <Arguments as clap::CommandFactory>::command()
}

/// Runs the program with the arguments and the environment of this process.
pub fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        // One line, whatever was said: a report of it is the user's, the place is for us.
        let place = panic.location().map_or_else(String::new, |l| format!(" ({}:{})", l.file(), l.line()));
        let payload = panic.payload();
        let text =
            payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let said = text.unwrap_or("no message");
        output::message(format!("internal error: {said}{place}"));
    }));
    let args: Vec<OsString> = std::env::args_os().collect();
    let code = match Helper::called(&args) {
        Some((helper, args)) => std::panic::catch_unwind(|| helper.run(args)).unwrap_or(helper::SYSTEM),
        None => {
            let args = with_store(args, std::env::var_os(STORE_VARIABLE));
            std::panic::catch_unwind(|| run(args)).unwrap_or(FAILED)
        }
    };
    ExitCode::from(code)
}

/// Runs one command; messages are printed. Returns the exit code.
fn run(args: Vec<OsString>) -> u8 {
    let arguments = match Arguments::try_parse_from(args) {
        Ok(arguments) => arguments,
        Err(e) => {
            // Help goes to standard output; one who reads only its beginning is no failure.
            let _ = e.print();
            let _ = std::io::stdout().flush();
            return u8::try_from(e.exit_code()).unwrap_or(USAGE);
        }
    };
    if !matches!(arguments.command, Command::Mount(_)) {
        init_logging(LogTarget::Stderr, LevelFilter::Warn);
    }
    let outcome = match &arguments.command {
        Command::Init(command) => command.run(),
        Command::Mount(command) => command.run(),
        Command::Umount(command) => command.run(),
        Command::Backup(command) => command.run(),
        Command::Batch(command) => command.run(),
        Command::Restore(command) => command.run(),
        Command::List(command) => command.run(),
        Command::Show(command) => command.run(),
        Command::Diff(command) => command.run(),
        Command::Forget(command) => command.run(),
        Command::Protect(command) => command.run(true),
        Command::Unprotect(command) => command.run(false),
        Command::Gc(command) => command.run(),
        Command::Popular(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Stats(command) => command.run(),
        Command::Target(command) => command.run(),
        Command::Attach(command) => command.run(),
        Command::Detach(command) => command.run(),
        Command::Reap(command) => command.run(),
        Command::Files(command) => command.run(),
        Command::FilesInside(command) => command.run(),
        Command::Clone(command) => command.run(),
        Command::Clones(command) => command.run(),
        Command::Unclone(command) => command.run(),
        Command::Settings(command) => command.run(),
        Command::Commit(command) => command.run(),
        Command::Demo(command) => command.run(),
    };
    match outcome {
        Ok(code) => code,
        Err(stop) => {
            if let Some(text) = &stop.message {
                output::message(text);
            }
            stop.code
        }
    }
}

fn done(result: crate::error::Result<()>) -> Outcome {
    result?;
    Ok(DONE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_parser_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example_and_a_summary() {
        for mut command in Arguments::command().get_subcommands().filter(|c| !c.is_hide_set()).cloned() {
            let name = command.get_name().to_owned();
            let help = command.render_long_help().to_string();
            assert!(help.contains("Examples:"), "{name}: {help}");
            assert!(help.contains(&format!("snapfs {name}")), "{name}: {help}");
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(!about.is_empty() && !about.contains("arguments that every"), "{name}: {about}");
        }
    }

    #[test]
    fn a_missing_or_wrong_argument_is_a_usage_error() {
        let calls: [&[&str]; 14] = [
            &["snapfs"],
            &["snapfs", "frobnicate"],
            &["snapfs", "list", "/s", "--no-such-option"],
            &["snapfs", "backup", "/s"],
            &["snapfs", "forget", "/s"],
            &["snapfs", "forget", "/s", "--keep-last", "many", "web01"],
            &["snapfs", "protect", "/s"],
            &["snapfs", "settings", "/s", "min_age"],
            &["snapfs", "settings", "/s", "min_age=soon"],
            &["snapfs", "settings", "/s", "colour=blue"],
            &["snapfs", "backup", "/s", "a/b", "c", "--changed", "map"],
            &["snapfs", "backup", "/s", "a/b", "c", "--parent", "a/0", "--verify-map"],
            &["snapfs", "list", "/s", "--max-memory", "lots"],
            &["snapfs", "check", "/s", "--sample", "101"],
        ];
        for call in calls {
            let refused = Arguments::try_parse_from(call).unwrap_err();
            assert_eq!(refused.exit_code(), i32::from(USAGE), "{call:?}");
        }
        for call in [&["snapfs", "--help"][..], &["snapfs", "backup", "--help"], &["snapfs", "--version"]] {
            assert_eq!(Arguments::try_parse_from(call).unwrap_err().exit_code(), i32::from(DONE), "{call:?}");
        }
    }
}
