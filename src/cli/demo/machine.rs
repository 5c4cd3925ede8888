//! What the tour needs of this machine: a folder, tools, mounts that are taken away whatever happens, signals.

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::TempDir;

use crate::cli::store_arg::STORE_VARIABLE;
use crate::cli::{FAILED, Stop, output};
use crate::error::{Error, ErrorKind, Result, not_found};

/// Folders of tools that are not on everybody's path.
const TOOL_FOLDERS: [&str; 6] = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin"];

/// The folder takes: two images with their data, the store, and in the worst case a restored copy.
const ROOM_PER_IMAGE: u64 = 3;

/// How long an unmount is tried again while something still closes its files.
const UNMOUNT_TRIES: u32 = 20;

/// The pause between.
const UNMOUNT_PAUSE: Duration = Duration::from_millis(250);

/// A tool and its arguments.
pub struct Tool {
    program: PathBuf,
    args: Vec<OsString>,
}

impl Tool {
    /// A tool without arguments.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), args: Vec::new() }
    }

    /// The same with more arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }
}

/// A mount that the tour has made, or may have.
struct Mounted {
    name: &'static str,
    is_store: bool,
}

/// The place of the tour. Dropped, it unmounts what is still mounted and removes its folder.
pub struct Machine {
    folder: TempDir,
    program: PathBuf,
    mounts: RefCell<Vec<Mounted>>,
    signalled: Arc<AtomicBool>,
}

impl Machine {
    /// A folder with room for the tour with an image of this size.
    ///
    /// # Errors
    /// `NoSpace`, or whatever keeps a folder from being made.
    pub fn new(image_bytes: u64) -> Result<Self> {
        let signalled = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // Without it a signal would leave a mount behind.
            signal_hook::flag::register(signal, signalled.clone()).map_err(|e| Error::io("signals", e))?;
        }
        let program = std::env::current_exe().map_err(|e| Error::io("this program", e))?;
        let needed = image_bytes.saturating_mul(ROOM_PER_IMAGE);
        let places = [std::env::temp_dir(), PathBuf::from("/var/tmp")];
        let place = places.iter().find(|place| free_bytes(place).is_some_and(|free| free >= needed));
        let Some(place) = place else {
            let context = format!("{} of free space are needed for temporary files (TMPDIR)", output::size(needed));
            return Err(Error::new(ErrorKind::NoSpace, context));
        };
        let folder = tempfile::Builder::new().prefix("snapfs-demo-").tempdir_in(place);
        let folder = folder.map_err(|e| Error::io(place.display().to_string(), e))?;
        Ok(Self { folder, program, mounts: RefCell::default(), signalled })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a folder in it.
    ///
    /// # Errors
    /// As the system has it.
    pub fn make_folder(&self, name: &str) -> Result<()> {
        std::fs::create_dir(self.path(name)).map_err(|e| Error::io(name, e))
    }

    /// Whether this is root.
    pub fn is_root(&self) -> bool {
        rustix::process::geteuid().is_root()
    }

    /// A tool by its name, from the path or from where tools of the system are.
    pub fn tool(&self, name: &str) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain(TOOL_FOLDERS.iter().map(PathBuf::from))
            .map(|folder| folder.join(name))
            .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file())
    }

    /// Whether a mount can be tried.
    ///
    /// # Errors
    /// Why it cannot, for people.
    pub fn can_mount(&self) -> std::result::Result<(), String> {
        let device = Path::new("/dev/fuse");
        match std::fs::OpenOptions::new().read(true).write(true).open(device) {
            Err(e) => Err(format!("{}: {e}", device.display())),
            Ok(_) if self.is_root() || self.tool("fusermount3").is_some() => Ok(()),
            Ok(_) => Err("neither root nor fusermount3".to_owned()),
        }
    }

    /// Shows a command as a user would type it.
    ///
    /// # Errors
    /// As [`output::line`]; `Unavailable` when a signal came.
    pub fn show(&self, command: &str) -> std::result::Result<(), Stop> {
        self.check_signal()?;
        output::line(format!("$ {command}"))
    }

    /// Ends the tour after a signal.
    ///
    /// # Errors
    /// `Unavailable` when one came.
    pub fn check_signal(&self) -> Result<()> {
        if self.signalled.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Unavailable, "the tour was interrupted"));
        }
        Ok(())
    }

    /// Runs a command of this program in the folder, and shows it and what it says.
    ///
    /// # Errors
    /// Its exit code and its message.
    pub fn snapfs(&self, args: &[&str]) -> std::result::Result<(), Stop> {
        self.show(&format!("snapfs {}", args.join(" ")))?;
        let tool = Tool::new(&self.program).args(args);
        let (text, code) = self.run(&tool, true)?;
        output::print(&text)?;
        if code == Some(0) {
            return Ok(());
        }
        let said = std::fs::read_to_string(self.path("stderr")).unwrap_or_default();
        let said = said.lines().last().unwrap_or("it says nothing").trim_start_matches("snapfs: ").to_owned();
        let code = code.and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED);
        Err(Stop { code, message: Some(format!("{}: {said}", args.first().copied().unwrap_or_default())) })
    }

    /// Runs a tool in the folder.
    ///
    /// # Errors
    /// `NotFound` without the tool, `Unavailable` with the last line that it said when it fails.
    pub fn quietly(&self, tool: Tool) -> Result<()> {
        self.output(tool).map(|_| ())
    }

    /// The same; what it printed.
    ///
    /// # Errors
    /// As [`Machine::quietly`].
    pub fn output(&self, tool: Tool) -> Result<String> {
        let (text, code) = self.run(&tool, false)?;
        if code == Some(0) {
            return Ok(text);
        }
        let said = std::fs::read_to_string(self.path("stderr")).unwrap_or_default();
        let said = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("failed").trim().to_owned();
        let name = tool.program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Err(Error::new(ErrorKind::Unavailable, format!("{name}: {said}")))
    }

    fn run(&self, tool: &Tool, keeps_warnings: bool) -> Result<(String, Option<i32>)> {
        self.check_signal()?;
        let name = tool.program.display().to_string();
        let about = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::NotFound => not_found(format!("{name}: is not installed")),
            _ => Error::io(name.clone(), e),
        };
        // New files each time: a daemon may still have the last ones.
        let stream = |name: &str| {
            let _ = std::fs::remove_file(self.path(name));
            std::fs::File::create_new(self.path(name)).map_err(|e| Error::io(name, e))
        };
        // Files and not pipes: a daemon that stays would keep a pipe open.
        let status = Command::new(&tool.program)
            .args(&tool.args)
            .current_dir(self.folder())
            .env("LC_ALL", "C.UTF-8")
            // The tour names its store itself.
            .env_remove(STORE_VARIABLE)
            .stdin(Stdio::null())
            .stdout(stream("stdout")?)
            .stderr(stream("stderr")?)
            .status()
            .map_err(about)?;
        let text = |name: &str| {
            let bytes = std::fs::read(self.path(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        if keeps_warnings && status.success() {
            for line in text("stderr").lines() {
                output::message(line.trim_start_matches("snapfs: "));
            }
        }
        Ok((text("stdout"), status.code()))
    }

    /// From now on `name` may be mounted.
    pub fn will_mount(&self, name: &'static str, is_store: bool) {
        self.mounts.borrow_mut().push(Mounted { name, is_store });
    }

    /// `name` is unmounted.
    pub fn is_unmounted(&self, name: &str) {
        self.mounts.borrow_mut().retain(|mount| mount.name != name);
    }

    /// Unmounts, with some patience, by whatever works. Returns whether nothing is mounted any more.
    fn unmount(&self, mount: &Mounted) -> bool {
        let path = self.path(mount.name);
        for turn in 1..=UNMOUNT_TRIES {
            for mut command in self.unmount_commands(mount, &path, turn == UNMOUNT_TRIES) {
                if !is_mounted(&path) {
                    return true;
                }
                let silent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                // Whether it worked, the mount table tells.
                let _ = silent.status();
            }
            if !is_mounted(&path) {
                return true;
            }
            std::thread::sleep(UNMOUNT_PAUSE);
        }
        false
    }

    fn unmount_commands(&self, mount: &Mounted, path: &Path, is_last: bool) -> Vec<Command> {
        let mut commands = Vec::new();
        let mut add = |program: &Path, args: &[&str]| {
            let mut command = Command::new(program);
            command.args(args).arg(path);
            commands.push(command);
        };
        if mount.is_store && !is_last {
            add(&self.program, &["umount"]);
        }
        add(Path::new("umount"), if is_last { &["-l"] } else { &[] });
        if let Some(fusermount) = self.tool("fusermount3").filter(|_| mount.is_store) {
            add(&fusermount, if is_last { &["-u", "-z"] } else { &["-u"] });
        }
        commands
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let mounts = std::mem::take(&mut *self.mounts.borrow_mut());
        let mut is_clean = true;
        for mount in mounts.iter().rev() {
            is_clean &= self.unmount(mount);
        }
        if !is_clean {
            // Never remove what may be a mount's content.
            self.folder.disable_cleanup(true);
            output::message(format!("{}: is still mounted and stays", self.folder.path().display()));
        }
    }
}

/// Whether something is mounted at `path`: it lies on another device than its folder, or does not answer.
fn is_mounted(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| std::fs::symlink_metadata(path).map(|m| m.dev());
    match (device(path), path.parent().map(device)) {
        (Ok(here), Some(Ok(above))) => here != above,
        // A mount whose daemon died answers ENOTCONN.
        (Err(e), _) => e.kind() != std::io::ErrorKind::NotFound,
        _ => false,
    }
}

fn free_bytes(folder: &Path) -> Option<u64> {
    let space = rustix::fs::statvfs(folder).ok()?;
    space.f_bavail.checked_mul(space.f_frsize)
}
