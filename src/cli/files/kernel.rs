//! Filesystems that only the kernel can read, for those who trust the image: mounted read-only, in a mount namespace
//! of a process that does nothing else, which has nothing else in sight.
//!
//! ```text
//!   snapfs files ── mount of the store (a live one, or its own) ── path of the image
//!        └─ unshare --mount ── snapfs files-inside: mount -o loop,ro,norecovery,... ── chroot ── list, or copy
//! ```
//!
//! The loop device shows one partition only and frees itself with the namespace, whatever is killed.

use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::cli::attach::tool::{command, succeed};
use crate::cli::files::entry::{Entry, EntryKind, Filesystem, printable};
use crate::cli::files::partitions::Content;
use crate::cli::mountinfo::{self, SNAPFS_TYPE};
use crate::cli::{DONE, Outcome, Stop, files};
use crate::error::{Error, ErrorKind, Result, invalid, not_found};

/// What mounting may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A snapshot appears in a mount within a second: asked so often, with this pause.
const APPEAR_TRIES: usize = 30;
const APPEAR_PAUSE: Duration = Duration::from_millis(100);

/// How each filesystem is mounted so that nothing is written and nothing of the host is touched: no log is replayed,
/// and an image of this very host may have the same identity as what is mounted here.
pub fn mount_options(content: Content) -> Option<&'static str> {
    match content {
        Content::Xfs => Some("norecovery,nouuid"),
        _ => None,
    }
}

/// Where the file of a snapshot can be read.
pub struct ImageFile {
    /// Its path.
    pub path: PathBuf,
    own: Option<OwnMount>,
}

/// A mount that was made for one command.
struct OwnMount {
    folder: tempfile::TempDir,
}

impl Drop for OwnMount {
    fn drop(&mut self) {
        if let Err(e) = crate::cli::umount::run(self.folder.path()) {
            log::warn!("{e}");
        }
    }
}

impl ImageFile {
    /// Finds the file of a snapshot, by its full name, in a live mount of the store; mounts the store if there is none.
    ///
    /// # Errors
    /// As mounting; `NotFound` when the snapshot does not appear.
    pub fn find(store: &Path, name: &str) -> Result<Self> {
        let store = store.canonicalize().map_err(|e| Error::io(store.display().to_string(), e))?;
        for row in mountinfo::read()?.iter().filter(|row| row.kind == SNAPFS_TYPE && store == Path::new(&row.source)) {
            let path = row.mountpoint.join(name);
            if path.is_file() {
                return Ok(Self { path, own: None });
            }
        }
        let folder = tempfile::Builder::new().prefix("snapfs-files-").tempdir().map_err(|e| Error::io("folder", e))?;
        let program = std::env::current_exe().map_err(|e| Error::io("own program", e))?;
        let mut mount = Command::new(program);
        mount.stdin(Stdio::null()).arg("mount").arg(&store).arg(folder.path()).args(["-o", "ro"]);
        succeed(mount, LIMIT).map_err(|e| e.within("mount the store"))?;
        let own = OwnMount { folder };
        let path = own.folder.path().join(name);
        for _ in 0..APPEAR_TRIES {
            if path.is_file() {
                return Ok(Self { path, own: Some(own) });
            }
            std::thread::sleep(APPEAR_PAUSE);
        }
        Err(not_found(format!("{name}: is not in the mount of its store")))
    }

    /// Whether the store was mounted for this.
    pub fn has_own_mount(&self) -> bool {
        self.own.is_some()
    }
}

/// What the process in the namespace has to do.
#[derive(Debug, clap::Args)]
pub struct Inside {
    /// Where to mount: a folder that the caller deletes.
    folder: PathBuf,
    /// The file of the image.
    image: PathBuf,
    /// The filesystem's type for mount(8).
    kind: String,
    /// All options for mount(8).
    options: String,
    /// The path in the filesystem.
    path: String,
    /// Copy the file to standard output.
    #[arg(long)]
    content: bool,
    /// List in JSON.
    #[arg(long)]
    json: bool,
}

/// Does what [`files::Files`] does, in a process of its own; what that prints goes to `out`, its messages to standard
/// error. Returns its exit code.
///
/// # Errors
/// `Denied` for all but root, `NotFound` without `unshare`, `Unavailable`.
pub fn run_inside(
    image: &Path,
    content: Content,
    range: &Range<u64>,
    path: &str,
    what: files::What,
    out: Stdio,
) -> Outcome {
    let Some(options) = mount_options(content) else {
        return Err(invalid(format!("{}: is not mounted", content.name())).into());
    };
    if !rustix::process::geteuid().is_root() {
        return Err(Error::new(ErrorKind::Denied, "only root can have a filesystem mounted").into());
    }
    let folder = tempfile::Builder::new().prefix("snapfs-inside-").tempdir().map_err(|e| Error::io("folder", e))?;
    let program = std::env::current_exe().map_err(|e| Error::io("own program", e))?;
    let (offset, bytes) = (range.start, range.end - range.start);
    let options = format!("ro,loop,offset={offset},sizelimit={bytes},nosuid,nodev,noexec,{options}");
    let mut child = command("unshare");
    child.args(["--mount", "--propagation", "private", "--"]).arg(program).arg("files-inside");
    match what {
        files::What::Content => drop(child.arg("--content")),
        files::What::Listing { json: true } => drop(child.arg("--json")),
        files::What::Listing { json: false } => {}
    }
    child.arg("--").arg(folder.path()).arg(image).args([content.name(), &options, path]);
    let status = child.stdout(out).status().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => not_found("unshare is not installed"),
        _ => Error::io("unshare", e),
    })?;
    // It has told what went wrong.
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    match code {
        Some(DONE) => Ok(DONE),
        Some(code) => Err(Stop { code, message: None }),
        None => Err(Error::new(ErrorKind::Unavailable, format!("files-inside: {status}")).into()),
    }
}

impl Inside {
    /// Runs in the namespace: mounts, leaves all else out of sight, and looks.
    ///
    /// # Errors
    /// `Unavailable` with the words of mount(8); those of the filesystem.
    pub fn run(&self) -> Outcome {
        let mut mount = command("mount");
        mount.args(["-t", &self.kind, "-o", &self.options]).arg(&self.image).arg(&self.folder);
        succeed(mount, LIMIT)?;
        // An absolute link in the image leads into the image from here on.
        rustix::process::chroot(&self.folder).map_err(|e| Error::io("chroot", e.into()))?;
        std::env::set_current_dir("/").map_err(|e| Error::io("/", e))?;
        let what = if self.content { files::What::Content } else { files::What::Listing { json: self.json } };
        files::show(&Root, &self.path, what, None)
    }
}

/// The filesystem that this process has in sight.
struct Root;

impl Filesystem for Root {
    fn entries(&self, path: &str) -> Result<Vec<Entry>> {
        let metadata = std::fs::metadata(path).map_err(|e| error_of(e, path))?;
        if !metadata.is_dir() {
            let metadata = std::fs::symlink_metadata(path).map_err(|e| error_of(e, path))?;
            return Ok(vec![entry(path.as_bytes(), Path::new(path), &metadata)]);
        }
        let mut entries = Vec::new();
        for row in std::fs::read_dir(path).map_err(|e| error_of(e, path))? {
            let row = row.map_err(|e| error_of(e, path))?;
            let metadata = row.metadata().map_err(|e| error_of(e, path))?;
            entries.push(entry(row.file_name().as_encoded_bytes(), &row.path(), &metadata));
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn copy(&self, path: &str, out: &mut dyn Write) -> Result<u64> {
        let metadata = std::fs::metadata(path).map_err(|e| error_of(e, path))?;
        if metadata.is_dir() {
            return Err(Error::new(ErrorKind::IsFolder, format!("{path}: is a folder")));
        }
        if !metadata.is_file() {
            return Err(invalid(format!("{path}: is no regular file")));
        }
        let mut file = File::open(path).map_err(|e| error_of(e, path))?;
        let mut buffer = vec![0; 256 << 10];
        let mut bytes = 0;
        loop {
            let count = file.read(&mut buffer).map_err(|e| error_of(e, path))?;
            let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else { return Ok(bytes) };
            out.write_all(part).map_err(|e| Error::io("write", e))?;
            bytes += count as u64;
        }
    }
}

fn entry(name: &[u8], path: &Path, metadata: &std::fs::Metadata) -> Entry {
    let kind = metadata.file_type();
    let kind = if kind.is_file() {
        EntryKind::File
    } else if kind.is_dir() {
        EntryKind::Folder
    } else if kind.is_symlink() {
        EntryKind::Link
    } else {
        EntryKind::Special
    };
    let target = if kind == EntryKind::Link { std::fs::read_link(path).ok() } else { None };
    Entry {
        name: printable(name),
        kind,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        bytes: metadata.len(),
        mtime: metadata.mtime(),
        target: target.map(|target| printable(target.as_os_str().as_encoded_bytes())),
    }
}

fn error_of(error: std::io::Error, path: &str) -> Error {
    match error.kind() {
        std::io::ErrorKind::NotFound => not_found(format!("{path}: there is no such file in the image")),
        _ => Error::io(path, error),
    }
}
