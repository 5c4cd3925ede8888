//! What the tests of the whole program share: a folder with a store, the real binary, the real mount, and guards that
//! leave nothing behind whatever happens.
//!
//! A test that lacks something prints `skipped: NAME: why` past the test harness and returns; `tests/run` counts
//! these lines.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use crate::world::noise;

pub const MIB: usize = 1 << 20;

/// The program under test.
pub const SNAPFS: &str = env!("CARGO_BIN_EXE_snapfs");

/// Only liveness is judged by time: what has not happened after five minutes never will.
const POLLS_MAX: usize = 30_000;
const POLL_PAUSE: Duration = Duration::from_millis(10);

/// Tells, past the capture of the harness, that a test cannot run here.
pub fn skip(name: &str, why: &str) {
    let line = format!("\nskipped: {name}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Returns from the test unless each of these tools is installed.
macro_rules! need_tools {
    ($name:expr, $($tool:expr),+) => {
        $(if !$crate::whole::has_tool($tool) {
            $crate::whole::skip($name, concat!($tool, " is not installed"));
            return;
        })+
    };
}

/// Returns from the test unless a filesystem can be mounted here.
macro_rules! need_mount {
    ($name:expr) => {
        if let Err(why) = $crate::whole::can_mount() {
            $crate::whole::skip($name, &why);
            return;
        }
    };
}

/// Returns from the test unless loop devices can be used.
macro_rules! need_loop {
    ($name:expr) => {
        if let Err(why) = $crate::whole::can_loop() {
            $crate::whole::skip($name, &why);
            return;
        }
    };
}

pub(crate) use {need_loop, need_mount, need_tools};

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Tools of the administrator may lie outside of the user's path.
fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin:/usr/local/sbin");
    path
}

pub fn has_tool(name: &str) -> bool {
    std::env::split_paths(&search_path()).any(|folder| folder.join(name).is_file())
}

/// Whether a store can be mounted: tried once, with an empty one.
pub fn can_mount() -> Result<(), String> {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    TRIED
        .get_or_init(|| {
            if !Path::new("/dev/fuse").exists() {
                return Err("there is no /dev/fuse".to_owned());
            }
            if !is_root() && !has_tool("fusermount3") {
                return Err("fusermount3 is not installed".to_owned());
            }
            let place = Place::new();
            std::fs::create_dir(place.path("mnt")).unwrap();
            let tried = place.snapfs("mount store mnt");
            let refused = ["not permitted", "denied", "ermission"].iter().any(|word| tried.err.contains(word));
            if tried.code != 0 && refused {
                return Err(format!("mounting is not allowed here: {}", tried.err.trim()));
            }
            // Anything else is for the tests to find.
            place.snapfs("umount mnt");
            Ok(())
        })
        .clone()
}

/// Whether loop devices can be used: tried once.
pub fn can_loop() -> Result<(), String> {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    TRIED
        .get_or_init(|| {
            if !is_root() {
                return Err("loop devices need root".to_owned());
            }
            if !has_tool("losetup") {
                return Err("losetup is not installed".to_owned());
            }
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("file");
            std::fs::write(&file, vec![0; MIB]).unwrap();
            Loop::attach(&file, &[]).map(drop).map_err(|why| format!("loop devices do not work here: {why}"))
        })
        .clone()
}

/// Waits until something is the case. Panics when it never is.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..POLLS_MAX {
        if is_so() {
            return;
        }
        std::thread::sleep(POLL_PAUSE);
    }
    panic!("never: {what}");
}

/// How a command ended.
pub struct Done {
    pub command: String,
    pub code: i32,
    pub out: Vec<u8>,
    pub err: String,
}

impl Done {
    pub fn of(command: String, output: std::process::Output) -> Self {
        let code = output.status.code().unwrap_or(-1);
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        Self { command, code, out: output.stdout, err }
    }

    /// It was done, and nothing was complained about.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{}: {}", self.command, self.err);
        assert!(!self.err.contains("WARN") && !self.err.contains("ERROR"), "{}: {}", self.command, self.err);
        self
    }

    /// It failed as it should: this exit code, a message with this word, no internal error.
    #[track_caller]
    pub fn fails(self, code: i32, word: &str) -> Self {
        assert_eq!(self.code, code, "{}: {}", self.command, self.err);
        assert!(self.err.contains(word), "{}: no {word:?} in {:?}", self.command, self.err);
        assert!(!self.err.contains("internal error") && !self.err.contains("panicked"), "{}", self.err);
        self
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.out.clone()).unwrap()
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.out).unwrap_or_else(|e| panic!("{}: {e}: {}", self.command, self.text()))
    }
}

/// A temporary folder with a store in it, `store`. Commands run in the folder. Everybody may pass through it.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let place = Self::without_store();
        place.snapfs("init store").ok();
        place
    }

    pub fn without_store() -> Self {
        let folder = tempfile::Builder::new().prefix("snapfs-it-").tempdir().unwrap();
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        Self { folder }
    }

    /// A store with a snapshot, `web01/a.img`, of the file `a`, and the bytes of that.
    pub fn with_snapshot() -> (Self, Vec<u8>) {
        let place = Self::new();
        let bytes = image(1, 8);
        place.write("a", &bytes);
        place.snapfs("backup store web01/a.img a").ok();
        (place, bytes)
    }

    /// The host's configuration names the mount of this place, and its folder of clones.
    pub fn write_host_config(&self) {
        let config = format!("mountpoint = {:?}\nclones = {:?}\n", self.path("mnt"), self.path("clones"));
        self.write("host.toml", config.as_bytes());
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn mode(&self, name: &str) -> u32 {
        std::fs::metadata(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}")).mode() & 0o7777
    }

    pub fn exists(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    /// A command of any program, in the folder, with nothing of the environment that could change what it does.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.folder.path()).stdin(Stdio::null()).env("PATH", search_path()).env("LC_ALL", "C");
        command.env("SNAPFS_CONFIG", self.path("host.toml")).env("SNAPFS_ATTACHED", self.path("attached"));
        for variable in ["SNAPFS_STORE", "SNAPFS_LOG", "SNAPFS_PROMOTE", "RUST_LOG"] {
            command.env_remove(variable);
        }
        command
    }

    /// Runs the program with these words, which are separated by blanks.
    pub fn snapfs(&self, words: &str) -> Done {
        self.run(&words.split(' ').collect::<Vec<_>>())
    }

    /// Runs the program.
    pub fn run(&self, words: &[&str]) -> Done {
        let output = self.command(SNAPFS).args(words).output().unwrap();
        Done::of(format!("snapfs {}", words.join(" ")), output)
    }

    /// Starts the program; its standard input and error are pipes.
    pub fn start(&self, words: &str) -> Running {
        let mut command = self.command(SNAPFS);
        command.args(words.split(' ')).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        Running { command: format!("snapfs {words}"), child: Some(command.spawn().unwrap()) }
    }

    /// Starts a line of shell in the folder.
    pub fn start_shell(&self, line: &str) -> Running {
        let mut command = self.command("sh");
        command.args(["-c", line]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        Running { command: line.to_owned(), child: Some(command.spawn().unwrap()) }
    }

    /// Runs a line of shell in the folder.
    pub fn shell(&self, line: &str) -> Done {
        let output = self.command("sh").args(["-c", line]).output().unwrap();
        Done::of(line.to_owned(), output)
    }

    /// Numbers of the records in a VM's log.
    pub fn records(&self, vm: &str) -> usize {
        std::fs::read_dir(self.path(&format!("store/vms/{vm}/log"))).map_or(0, Iterator::count)
    }

    /// The files of a VM's folder in the store, largest first.
    pub fn objects(&self, vm: &str, folder: &str) -> Vec<PathBuf> {
        let rows = std::fs::read_dir(self.path(&format!("store/vms/{vm}/{folder}"))).unwrap();
        let mut files: Vec<_> = rows.map(|row| row.unwrap().path()).collect();
        files.sort_by_key(|path| std::cmp::Reverse(path.metadata().unwrap().len()));
        files
    }

    /// Mounts the store at `mnt`.
    pub fn mount(&self, options: &str) -> Mount<'_> {
        self.mount_at("mnt", options)
    }

    /// Mounts the store at a folder, which is made if it is not there.
    pub fn mount_at(&self, name: &str, options: &str) -> Mount<'_> {
        // It may be there: also one whose daemon has died, which cannot be asked.
        let _ = std::fs::create_dir(self.path(name));
        let mut words = vec!["mount", "store", name];
        if !options.is_empty() {
            words.extend(["-o", options]);
        }
        let done = self.run(&words);
        assert_eq!(done.code, 0, "{}: {}", done.command, done.err);
        let status = self.read(&format!("{name}/.snapfs/status"));
        let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
        let pid = i32::try_from(status["pid"].as_i64().unwrap()).unwrap();
        Mount { place: self, name: name.to_owned(), pid, is_over: false }
    }
}

/// A mount. What the test did not unmount itself is taken away: first the daemon, so that nothing can hang.
pub struct Mount<'a> {
    place: &'a Place,
    name: String,
    pub pid: i32,
    is_over: bool,
}

impl Mount<'_> {
    /// Unmounts as a user does.
    #[track_caller]
    pub fn umount(mut self) {
        self.place.run(&["umount", &self.name]).ok();
        self.is_over = true;
        assert!(!is_running(self.pid), "umount returned, and the daemon is still there");
    }

    /// kill -9, and waits for the end. The dead mount stays.
    pub fn kill(mut self) {
        signal(self.pid, rustix::process::Signal::KILL);
        let pid = self.pid;
        eventually("a killed daemon ends", || !is_running(pid));
        self.is_over = true;
    }

    /// The mount ends by itself; waits for that.
    pub fn wait(mut self) {
        let pid = self.pid;
        eventually("the daemon ends", || !is_running(pid));
        self.is_over = true;
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        // Its own program still: the number must not have come to mean another process.
        let program = std::fs::read_link(format!("/proc/{}/exe", self.pid));
        if program.is_ok_and(|path| path == Path::new(SNAPFS)) {
            signal(self.pid, rustix::process::Signal::KILL);
        }
        let umount = if is_root() { "umount -l" } else { "fusermount3 -uz" };
        self.place.shell(&format!("{umount} {} 2>/dev/null", self.name));
    }
}

/// Takes the dead mounts of a place away, whatever became of the test.
pub struct Cleared<'a>(pub &'a Place, pub &'a str);

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        let umount = if is_root() { "umount -l" } else { "fusermount3 -uz" };
        self.0.shell(&format!("while {umount} {} 2>/dev/null; do :; done", self.1));
    }
}

pub fn signal(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Whether a process is there and is no zombie.
pub fn is_running(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with(['Z', 'X']))
}

/// A program that was started. Killed if the test ends before it.
pub struct Running {
    command: String,
    child: Option<Child>,
}

impl Running {
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().unwrap().id()).unwrap()
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.child.as_mut().unwrap().stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    /// Closes its standard input and waits for its end.
    pub fn finish(mut self) -> Done {
        let mut child = self.child.take().unwrap();
        drop(child.stdin.take());
        Done::of(self.command.clone(), child.wait_with_output().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A loop device; detached at the end.
pub struct Loop(pub PathBuf);

impl Loop {
    pub fn attach(file: &Path, options: &[&str]) -> Result<Self, String> {
        let mut command = Command::new("losetup");
        command.env("PATH", search_path()).args(["--find", "--show"]).args(options).arg(file);
        let output = command.output().map_err(|e| e.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(Self(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())))
    }
}

/// The loop devices whose backing file lies in a place. What the kernel tells of a path may lack where its mount was:
/// then the filesystem's number tells.
pub fn loops_of(place: &Place) -> Vec<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let root = place.path("").canonicalize().unwrap();
    let device = |path: &Path| path.metadata().map(|m| m.dev());
    let mount = device(&place.path("mnt")).ok().filter(|mount| *mount != device(&root).unwrap());
    let mount = mount.map(|dev| format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev)));
    let rows = std::fs::read_dir("/sys/block").unwrap().map(|row| row.unwrap().file_name());
    let mut found = Vec::new();
    for name in rows {
        let Ok(path) = std::fs::read_to_string(Path::new("/sys/block").join(&name).join("loop/backing_file")) else {
            continue;
        };
        let device = Path::new("/dev").join(name);
        let of_mount = || {
            let list = ["--list", "--noheadings", "--output", "BACK-MAJ:MIN"];
            let told = Command::new("losetup").env("PATH", search_path()).args(list).arg(&device).output().unwrap();
            Some(String::from_utf8_lossy(&told.stdout).trim()) == mount.as_deref()
        };
        if Path::new(path.trim_end()).starts_with(&root) || of_mount() {
            found.push(device);
        }
    }
    found.sort();
    found
}

/// Frees the loop devices of a place, whatever became of the test.
pub struct Freed<'a>(pub &'a Place);

impl Drop for Freed<'_> {
    fn drop(&mut self) {
        for device in loops_of(self.0) {
            drop(Loop(device));
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").env("PATH", search_path()).arg("-d").arg(&self.0).output();
    }
}

/// A small ext4 file system in a file, mounted at a folder of a place; unmounted at the end.
pub struct Disk<'a> {
    place: &'a Place,
    name: String,
}

impl<'a> Disk<'a> {
    pub fn mount(place: &'a Place, name: &str, bytes: usize) -> Self {
        let file = std::fs::File::create(place.path(&format!("{name}.ext4"))).unwrap();
        file.set_len(bytes as u64).unwrap();
        place.shell(&format!("mke2fs -q -F -t ext4 -m 0 {name}.ext4 && mkdir {name}")).ok();
        place.shell(&format!("mount -o loop {name}.ext4 {name}")).ok();
        Self { place, name: name.to_owned() }
    }

    pub fn remount(&self, options: &str) {
        self.place.shell(&format!("mount -o remount,{options} {}", self.name)).ok();
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        self.place.shell(&format!("umount {0} || umount -l {0}", self.name));
    }
}

/// An image of `mebibytes`: noise, with zeros in its third quarter.
pub fn image(seed: u64, mebibytes: usize) -> Vec<u8> {
    let mut bytes = noise(seed, mebibytes * MIB);
    bytes[mebibytes * MIB / 2..mebibytes * MIB * 3 / 4].fill(0);
    bytes
}

/// Two byte strings are equal; says where they are not, without printing them.
#[track_caller]
pub fn same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    if let Some(at) = got.iter().zip(want).position(|(a, b)| a != b) {
        panic!("{what}: differs at byte {at}: {} for {}", got[at], want[at]);
    }
}
