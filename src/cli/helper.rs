//! What mount(8) and umount(8) call, by way of `mount-helpers/`: their arguments, and only here their exit codes.
//!
//! ```text
//!   mount -t snapfs STORE FOLDER ──> mount.snapfs STORE FOLDER -o OPTIONS ──> snapfs mount-helper ...
//!   mount.fuse3 STORE FOLDER -t fuse.snapfs ─────────────────────────────────> snapfs STORE FOLDER -o OPTIONS
//!   umount FOLDER ──> umount.snapfs FOLDER [-flnrv] ─────────────────────────> snapfs umount-helper ...
//! ```

use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use clap::error::ErrorKind as Refusal;
use log::LevelFilter;
use rustix::thread::LinkNameSpaceType;

use crate::cli::logging::{LogTarget, init_logging};
use crate::cli::mount::{self, Mount, Mountpoint};
use crate::cli::mount_options::{MountOptions, list, words};
use crate::cli::mountinfo::SNAPFS_TYPE;
use crate::cli::{output, umount};
use crate::error::{Error, ErrorKind, invalid};

/// All is done.
const DONE: u8 = 0;
/// Called wrongly, or not allowed.
const USAGE: u8 = 1;
/// The system lacks something that mounting needs.
pub const SYSTEM: u8 = 2;
/// It is not mounted, or not unmounted.
const FAILED: u8 = 32;

const MOUNT_USAGE: &str = "usage: mount.snapfs STORE FOLDER [-fnrsvw] [-N NAMESPACE] [-o OPTION,...] [-t TYPE]";
const UMOUNT_USAGE: &str = "usage: umount.snapfs FOLDER [-flnrv] [-N NAMESPACE] [-t TYPE]";

/// FUSE's own helper: mounts, gives up privileges, and starts the program of a type.
const FUSE_HELPER: &str = "mount.fuse3";

/// Which helper is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Helper {
    /// `mount.snapfs`.
    Mount,
    /// `umount.snapfs`.
    Umount,
}

/// How mount(8) calls its helper.
#[derive(Debug, clap::Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct MountCall {
    store: PathBuf,
    folder: PathBuf,
    #[arg(short = 'o')]
    options: Vec<String>,
    /// Unknown options are no errors.
    #[arg(short = 's', action = clap::ArgAction::Count)]
    sloppy: u8,
    /// Everything but the mount itself.
    #[arg(short = 'f', action = clap::ArgAction::Count)]
    fake: u8,
    #[arg(short = 'r', action = clap::ArgAction::Count)]
    read_only: u8,
    #[arg(short = 'w', action = clap::ArgAction::Count)]
    _read_write: u8,
    /// There is no table to keep, and mount(8) itself says what it did.
    #[arg(short = 'n', action = clap::ArgAction::Count)]
    _no_table: u8,
    #[arg(short = 'v', action = clap::ArgAction::Count)]
    _verbose: u8,
    #[arg(short = 't')]
    _kind: Vec<OsString>,
    #[arg(short = 'N')]
    namespace: Option<PathBuf>,
}

/// How umount(8) calls its helper.
#[derive(Debug, clap::Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct UmountCall {
    folder: PathBuf,
    #[arg(short = 'f', action = clap::ArgAction::Count)]
    force: u8,
    #[arg(short = 'l', action = clap::ArgAction::Count)]
    lazy: u8,
    #[arg(short = 'n', action = clap::ArgAction::Count)]
    _no_table: u8,
    /// A store that is in use stays what it is.
    #[arg(short = 'r', action = clap::ArgAction::Count)]
    _read_only: u8,
    #[arg(short = 'v', action = clap::ArgAction::Count)]
    _verbose: u8,
    #[arg(short = 't')]
    _kind: Vec<OsString>,
    #[arg(short = 'N')]
    namespace: Option<PathBuf>,
}

/// Why a helper fails: mount(8)'s exit code, and the line for standard error.
#[derive(Debug)]
struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    fn usage(error: Error) -> Self {
        Self { code: USAGE, message: error.to_string() }
    }

    fn system(error: Error) -> Self {
        Self { code: SYSTEM, message: error.to_string() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = if error.kind() == ErrorKind::Denied { USAGE } else { FAILED };
        Self { code, message: error.to_string() }
    }
}

impl Helper {
    /// The helper that the arguments of this program (its name comes first) call, and what they tell it.
    pub fn called(args: &[OsString]) -> Option<(Self, &[OsString])> {
        let (first, rest) = args.get(1..)?.split_first()?;
        match first.to_str() {
            Some("mount-helper") => Some((Self::Mount, rest)),
            Some("umount-helper") => Some((Self::Umount, rest)),
            // No command has a slash in its name: this is how mount.fuse3 calls the program of a type.
            _ if first.as_bytes().contains(&b'/') && !rest.is_empty() => Some((Self::Mount, args.get(1..)?)),
            _ => None,
        }
    }

    /// Does what is asked for; a failure is one line on standard error. Returns mount(8)'s exit code.
    pub fn run(self, args: &[OsString]) -> u8 {
        init_logging(LogTarget::Stderr, LevelFilter::Warn);
        let outcome = match self {
            Self::Mount => parse(args, MOUNT_USAGE).and_then(MountCall::run),
            Self::Umount => parse(args, UMOUNT_USAGE).and_then(UmountCall::run),
        };
        match outcome {
            Ok(()) => DONE,
            Err(failure) => {
                output::message(&failure.message);
                failure.code
            }
        }
    }
}

fn parse<C: Parser>(args: &[OsString], usage: &str) -> Result<C, Failure> {
    C::try_parse_from(args).map_err(|refused| {
        let said = refused.to_string();
        let first = said.lines().next().unwrap_or_default();
        let message = match refused.kind() {
            Refusal::MissingRequiredArgument => usage.to_owned(),
            _ => format!("{}; {usage}", first.strip_prefix("error: ").unwrap_or(first)),
        };
        Failure { code: USAGE, message }
    })
}

impl MountCall {
    fn run(self) -> Result<(), Failure> {
        if let Some(namespace) = &self.namespace {
            enter(namespace)?;
        }
        let asked = self.asked()?;
        let mountpoint = Mountpoint::of(&self.folder)?;
        if self.fake > 0 {
            return Ok(mount::check(&self.store, &mountpoint, &asked.options)?);
        }
        if asked.by_fuse_helper {
            return Err(self.hand_over(&asked)?);
        }
        // Each word a list of its own: whatever is in it, it stays one word.
        let options = asked.words.iter().map(|word| list(&[word])).collect();
        let args = Mount { options, foreground: false, log: None, ready_on_stdout: false };
        let daemon = mount::start(&self.store, &mountpoint, &args, None).map_err(Failure::system)?;
        let (said, outcome) = mount::wait_until_ready(daemon, &mountpoint);
        outcome?;
        mount::relay(&said);
        Ok(())
    }

    /// What the options ask for.
    fn asked(&self) -> Result<Asked, Failure> {
        let mut asked = Asked::default();
        let read_only = (self.read_only > 0).then(|| "ro".to_owned());
        for word in self.options.iter().flat_map(|list| words(list)).chain(read_only) {
            if word == "remount" {
                return Err(invalid("remount: a store is unmounted and mounted again instead").into());
            }
            if word == "drop_privileges" || word.starts_with("setuid=") {
                asked.by_fuse_helper = true;
            } else if !asked.options.take(&word).map_err(Failure::usage)? {
                if self.sloppy > 0 {
                    continue;
                }
                return Err(Failure::usage(invalid(format!("mount option {word:?}: unknown"))));
            }
            asked.words.push(word);
        }
        Ok(asked)
    }

    /// Becomes `mount.fuse3`, which mounts, gives up privileges, and calls this program again with what is left to do.
    /// Returns only when that is impossible.
    fn hand_over(&self, asked: &Asked) -> Result<Failure, Failure> {
        let store = mount::canonical(&self.store)?;
        let program = std::env::current_exe().map_err(|e| Failure::system(Error::io("own program", e)))?;
        let failed = Command::new(FUSE_HELPER)
            .args([store.as_os_str(), self.folder.as_os_str(), OsStr::new("-t"), OsStr::new(SNAPFS_TYPE)])
            .args(["-o", &list(&asked.for_fuse_helper(&store))])
            .env("PATH", search_path(program.parent()))
            .exec();
        Ok(Failure::system(Error::io(FUSE_HELPER, failed)))
    }
}

/// What the options of a call ask for.
#[derive(Debug, Default)]
struct Asked {
    options: MountOptions,
    /// The options as they were written, without those that are unknown.
    words: Vec<String>,
    /// Another user is to serve the mount, or nobody with privileges.
    by_fuse_helper: bool,
}

impl Asked {
    /// The options with which `mount.fuse3` makes the mount that we would make.
    fn for_fuse_helper(&self, store: &Path) -> Vec<String> {
        let is_ours = |word: &&String| !word.starts_with("fsname=") && !word.starts_with("subtype=");
        let mut words: Vec<String> =
            self.words.iter().filter(is_ours).filter(|word| *word != "noallow_other").cloned().collect();
        let drops = words.iter().any(|word| word == "drop_privileges");
        // Where privileges are dropped root mounts, and mounts for everybody as always; a user may not be allowed to.
        let for_all = self.options.allow_other.unwrap_or(drops);
        for (word, wanted) in
            [("default_permissions", true), ("nodev", true), ("nosuid", true), ("allow_other", for_all)]
        {
            if wanted && !words.iter().any(|w| w == word) {
                words.push(word.to_owned());
            }
        }
        words.push(format!("fsname={}", store.to_string_lossy().replace('\\', "\\\\")));
        words
    }
}

/// Where `mount.fuse3` looks for programs: for this one first of all.
fn search_path(own: Option<&Path>) -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    let folders = own.map(Path::to_owned).into_iter().chain(std::env::split_paths(&path)).chain(system);
    // A folder whose name holds a colon cannot be in a search path.
    std::env::join_paths(folders).unwrap_or(path)
}

impl UmountCall {
    fn run(self) -> Result<(), Failure> {
        if let Some(namespace) = &self.namespace {
            enter(namespace)?;
        }
        let outcome = if self.force > 0 || self.lazy > 0 {
            umount::at_once(&self.folder, self.force > 0, self.lazy > 0)
        } else {
            umount::run(&self.folder)
        };
        Ok(outcome?)
    }
}

/// Goes over into a mount namespace: from then on paths and mounts are those of it.
fn enter(namespace: &Path) -> Result<(), Failure> {
    let about = format!("namespace {}", namespace.display());
    let file = std::fs::File::open(namespace).map_err(|e| Failure::system(Error::io(&about, e)))?;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(|e| Failure::system(Error::io(about, e.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    fn call(line: &str) -> Result<MountCall, Failure> {
        parse(&arguments(line), MOUNT_USAGE)
    }

    fn asked(line: &str) -> Asked {
        call(line).unwrap().asked().unwrap()
    }

    #[test]
    fn a_helper_is_called_by_name_or_by_the_path_of_a_store() {
        let table = [
            ("snapfs mount-helper /s /m", Some((Helper::Mount, "/s /m"))),
            ("snapfs umount-helper /m -l", Some((Helper::Umount, "/m -l"))),
            ("snapfs /s /m -o dev,suid", Some((Helper::Mount, "/s /m -o dev,suid"))),
            ("snapfs ./s /dev/fd/5", Some((Helper::Mount, "./s /dev/fd/5"))),
            ("snapfs mount /s /m", None),
            ("snapfs /s", None),
            ("snapfs", None),
        ];
        for (line, expected) in table {
            let line = arguments(line);
            let called = Helper::called(&line);
            let expected = expected.map(|(helper, rest)| (helper, arguments(rest)));
            assert_eq!(called.map(|(helper, rest)| (helper, rest.to_vec())), expected);
        }
    }

    #[test]
    fn flags_stand_anywhere_and_together() {
        for line in
            ["/s /m -sfnv", "-s -f -n -v /s /m", "/s -sf /m -nv -t fuse.snapfs -N /proc/1/ns/mnt", "-sfo rw /s /m"]
        {
            let call = call(line).unwrap();
            assert_eq!((call.store.as_path(), call.folder.as_path()), (Path::new("/s"), Path::new("/m")));
            assert!(call.sloppy > 0 && call.fake > 0, "{line}");
        }
        let options = asked("/s /m -o ro,log=/x -orw -o max_memory=1G").options;
        assert_eq!((options.read_only, options.max_memory), (false, Some(1 << 30)));
        assert!(asked("-r /s /m -o rw").options.read_only);
        assert_eq!(call("-o ro -- /s -m").unwrap().folder, Path::new("-m"));
        let umount: UmountCall = parse(&arguments("/m -fl -nrv -t fuse.snapfs"), UMOUNT_USAGE).unwrap();
        assert!(umount.force > 0 && umount.lazy > 0);
    }

    #[test]
    fn a_wrong_call_is_one_line_and_code_1() {
        for line in ["", "/s", "/s /m /x", "/s /m -x", "/s /m -o", "/s /m --foreground"] {
            let refused = call(line).unwrap_err();
            assert_eq!(refused.code, USAGE, "{line}");
            assert!(refused.message.contains("usage:") && !refused.message.contains('\n'), "{}", refused.message);
        }
        let unknown = call("/s /m -o ro,frobnicate=7").unwrap().asked().unwrap_err();
        assert!(unknown.code == USAGE && unknown.message.contains("frobnicate=7"), "{unknown:?}");
        assert_eq!(call("/s /m -s -o max_memory=lots").unwrap().asked().unwrap_err().code, USAGE);
        assert_eq!(call("/s /m -s -o remount,ro").unwrap().asked().unwrap_err().code, FAILED);
    }

    #[test]
    fn sloppy_leaves_out_what_is_unknown() {
        assert_eq!(asked("/s /m -s -o ro,frobnicate=7,nofail").words, ["ro", "nofail"]);
    }

    #[test]
    fn the_fuse_helper_makes_the_same_mount() {
        let plain = asked("/s /m -o ro,seal_after=1s");
        assert!(!plain.by_fuse_helper);
        let dropped = asked("/s /m -o drop_privileges,ro,fsname=x");
        assert!(dropped.by_fuse_helper);
        let expected =
            ["drop_privileges", "ro", "default_permissions", "nodev", "nosuid", "allow_other", r"fsname=/a\\b,c"];
        assert_eq!(dropped.for_fuse_helper(Path::new(r"/a\b,c")), expected);
        let user = asked("/s /m -o setuid=backup,noallow_other,nodev");
        let expected = ["setuid=backup", "nodev", "default_permissions", "nosuid", "fsname=/s"];
        assert_eq!(user.for_fuse_helper(Path::new("/s")), expected);
    }

    #[test]
    fn what_is_not_allowed_is_code_1_and_the_rest_32() {
        let table = [(ErrorKind::Denied, USAGE), (ErrorKind::NotFound, FAILED), (ErrorKind::Busy, FAILED)];
        for (kind, code) in table {
            assert_eq!(Failure::from(Error::new(kind, "x")).code, code);
        }
    }
}
