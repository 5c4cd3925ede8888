//! The tour's image: an ext4 with real files, and what a day of work does to it.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::cli::demo::Made;
use crate::cli::demo::machine::{Machine, Tool};
use crate::cli::{Stop, output};
use crate::error::{Error, Result};

/// Where files are taken from: each gives its share of the budget.
const SOURCES: [&str; 3] = ["/usr/bin", "/usr/lib", "/usr/share"];

/// Larger files would fill the image alone.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Files and folders looked at, at the most: a folder of millions must not make the tour long.
const ENTRIES_MAX: usize = 20_000;

/// One file in this many is rewritten, one moves.
const CHANGED_ONE_IN: usize = 24;

/// Bytes that the log in the image grows by.
const LOG_BYTES: usize = 1 << 20;

/// The folder that becomes the image's content.
const FILES: &str = "files";

/// The log in it.
const LOG: &str = "messages.log";

/// Where files move to.
const ATTIC: &str = "moved";

/// Commands for debugfs.
const SCRIPT: &str = "debugfs.script";

fn about(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    move |e| Error::io(path.display().to_string(), e)
}

/// Makes `image`, an ext4 of `size` bytes with real files; without mke2fs, the files' bytes one after another.
pub fn make_image(machine: &Machine, image: &str, size: u64) -> std::result::Result<Made, Stop> {
    let files = machine.path(FILES);
    let count = gather(machine, &files, size / 2)?;
    output::line(format!("{} files, {}", count.files, output::size(count.bytes)))?;
    let mut made = Made { has_file_system: false, files, size };
    made.has_file_system = match find_mke2fs(machine)? {
        Some(mke2fs) => {
            format(machine, &mke2fs, image, size)?;
            true
        }
        None => {
            output::line("No mke2fs here: the image is plain files one after another, without a file system.")?;
            concatenate(&made.files, &machine.path(image), size)?;
            false
        }
    };
    Ok(made)
}

/// Where mke2fs is; installs it where that is possible.
fn find_mke2fs(machine: &Machine) -> std::result::Result<Option<PathBuf>, Stop> {
    let found = machine.tool("mke2fs");
    let Some(apt) = machine.tool("apt-get").filter(|_| found.is_none() && machine.is_root()) else { return Ok(found) };
    let args = ["install", "-y", "--no-remove", "e2fsprogs"];
    machine.show(&format!("apt-get {}", args.join(" ")))?;
    let quick = ["-q", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10", "-o", "DPkg::Lock::Timeout=5"];
    if let Err(e) = machine.quietly(Tool::new(apt).args(quick).args(args)) {
        machine.check_signal()?;
        output::line(format!("That failed: {e}"))?;
    }
    Ok(machine.tool("mke2fs"))
}

fn format(machine: &Machine, mke2fs: &Path, image: &str, size: u64) -> std::result::Result<(), Stop> {
    let kib = format!("{}k", size >> 10);
    machine.show(&format!("mke2fs -q -F -t ext4 -m 0 -d {FILES} {image} {kib}"))?;
    let args = ["-q", "-F", "-t", "ext4", "-m", "0", "-d", FILES, image, kib.as_str()];
    Ok(machine.quietly(Tool::new(mke2fs).args(args))?)
}

#[derive(Default)]
struct Gathered {
    files: usize,
    bytes: u64,
}

/// Copies files of this machine below `to`, in the order of their names, until `budget` bytes are there.
fn gather(machine: &Machine, to: &Path, budget: u64) -> Result<Gathered> {
    let mut all = Gathered::default();
    std::fs::create_dir(to).map_err(about(to))?;
    for (at, source) in SOURCES.iter().enumerate() {
        let share = (budget - all.bytes.min(budget)) / (SOURCES.len() - at) as u64;
        let mut part = Gathered::default();
        let mut entries = 0;
        gather_folder(machine, Path::new(source), to, share, &mut part, &mut entries)?;
        all.files += part.files;
        all.bytes += part.bytes;
    }
    // Something to grow, and something to find when there is nothing else.
    let log = to.join(LOG);
    std::fs::write(&log, log_text(0, LOG_BYTES)).map_err(about(&log))?;
    all.files += 1;
    all.bytes += LOG_BYTES as u64;
    Ok(all)
}

fn gather_folder(
    machine: &Machine,
    from: &Path,
    to: &Path,
    share: u64,
    part: &mut Gathered,
    entries: &mut usize,
) -> Result<()> {
    machine.check_signal()?;
    for path in sorted(from) {
        *entries += 1;
        if part.bytes >= share || *entries > ENTRIES_MAX {
            break;
        }
        let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
        if metadata.is_dir() {
            gather_folder(machine, &path, to, share, part, entries)?;
        } else if metadata.is_file() && metadata.len() <= FILE_BYTES_MAX && part.bytes + metadata.len() <= share {
            // What cannot be read is left out.
            let Ok(mut file) = File::open(&path) else { continue };
            let copy = to.join(path.strip_prefix("/").unwrap_or(&path));
            if let Some(folder) = copy.parent() {
                std::fs::create_dir_all(folder).map_err(about(folder))?;
            }
            // Not with its mode: nothing here is to be run, least of all as another user.
            let copied = File::create(&copy).and_then(|mut out| std::io::copy(&mut file, &mut out));
            part.bytes += copied.map_err(about(&copy))?;
            part.files += 1;
        }
    }
    Ok(())
}

/// What is in a folder, by name; nothing where it cannot be read.
fn sorted(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    paths
}

/// All regular files below a folder, by name.
fn all_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for path in sorted(folder) {
        match std::fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => all_files(&path, found),
            Ok(metadata) if metadata.is_file() && metadata.len() > 0 => found.push(path),
            _ => {}
        }
    }
}

/// Lines of a log, different from `first` on.
fn log_text(first: usize, bytes: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes + 100);
    let mut number = first;
    while text.len() < bytes {
        let mixed = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        text.extend_from_slice(
            format!("web01 service[{number}]: request {mixed:016x} took {} ms\n", mixed % 900).as_bytes(),
        );
        number += 1;
    }
    text.truncate(bytes);
    text
}

/// Bytes that are in no file of this machine.
fn new_content(seed: usize, bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    let mut state = seed as u64 ^ 0x2545_f491_4f6c_dd1d;
    for chunk in content.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (state ^ (state >> 29)).to_le_bytes();
        chunk.copy_from_slice(mixed.get(..chunk.len()).unwrap_or_default());
    }
    content
}

fn concatenate(files: &Path, image: &Path, size: u64) -> Result<()> {
    let mut out = File::create(image).map_err(about(image))?;
    let mut paths = Vec::new();
    all_files(files, &mut paths);
    let mut at = 0;
    for path in paths {
        let mut bytes = std::fs::read(&path).map_err(about(&path))?;
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        if at + bytes.len() as u64 > size {
            break;
        }
        at += bytes.len() as u64;
        out.write_all(&bytes).map_err(about(image))?;
    }
    out.set_len(size).map_err(about(image))
}

/// Copies `old` to `new` and lets a day pass in it, in the most real way that there is here: as root in the mounted
/// image, else by debugfs, else by making it anew from changed files.
pub fn change_image(machine: &Machine, made: &Made, old: &str, new: &str) -> std::result::Result<(), Stop> {
    copy_sparsely(machine, old, new)?;
    if !made.has_file_system {
        change_bytes(&machine.path(new), made.size)?;
        return output::line("some of its bytes are written anew, some are copied to another place");
    }
    if machine.is_root() {
        match change_mounted(machine, new) {
            Ok(changes) => return tell(&changes),
            Err(e) => {
                machine.check_signal()?;
                output::line(format!("The image cannot be mounted and changed here ({e})."))?;
                copy_sparsely(machine, old, new)?;
            }
        }
    }
    let changes = change_folder(&made.files)?;
    tell(&changes)?;
    match (machine.tool("debugfs"), machine.tool("mke2fs")) {
        (Some(debugfs), _) => change_by_debugfs(machine, &debugfs, &changes, new),
        (None, Some(mke2fs)) => format(machine, &mke2fs, new, made.size),
        (None, None) => Ok(()),
    }
}

fn copy_sparsely(machine: &Machine, from: &str, to: &str) -> Result<()> {
    match machine.tool("cp") {
        Some(cp) => machine.quietly(Tool::new(cp).args(["--sparse=always", from, to])),
        None => std::fs::copy(machine.path(from), machine.path(to)).map(|_| ()).map_err(about(Path::new(to))),
    }
}

fn change_mounted(machine: &Machine, image: &str) -> Result<Vec<Change>> {
    if !machine.path("work").is_dir() {
        machine.make_folder("work")?;
    }
    machine.will_mount("work", false);
    machine.quietly(Tool::new("mount").args(["-o", "loop", image, "work"]))?;
    let changes = change_folder(&machine.path("work"));
    machine.quietly(Tool::new("umount").args(["work"]))?;
    machine.is_unmounted("work");
    changes
}

/// What happened to a file; names are relative to the folder.
enum Change {
    Rewritten(PathBuf),
    Moved(PathBuf, PathBuf),
    Grown(PathBuf),
}

fn tell(changes: &[Change]) -> std::result::Result<(), Stop> {
    let count = |wanted: fn(&Change) -> bool| changes.iter().filter(|change| wanted(change)).count();
    let rewritten = count(|change| matches!(change, Change::Rewritten(_)));
    let moved = count(|change| matches!(change, Change::Moved(..)));
    output::line(format!(
        "{rewritten} files rewritten in part, {moved} moved, {} more log",
        output::size(LOG_BYTES as u64)
    ))
}

/// A day of work in a folder of files.
fn change_folder(folder: &Path) -> Result<Vec<Change>> {
    let mut files = Vec::new();
    all_files(folder, &mut files);
    files.retain(|file| !file.ends_with(LOG));
    let attic = folder.join(ATTIC);
    std::fs::create_dir_all(&attic).map_err(about(&attic))?;
    let mut changes = Vec::new();
    for (number, path) in files.iter().enumerate() {
        let name = path.strip_prefix(folder).unwrap_or(path).to_owned();
        match number % CHANGED_ONE_IN {
            3 => {
                rewrite(path, number)?;
                changes.push(Change::Rewritten(name));
            }
            11 => {
                // A copy and an unlink, as between file systems: its bytes go to another place of the disk.
                let moved = Path::new(ATTIC).join(number.to_string());
                let to = folder.join(&moved);
                std::fs::copy(path, &to).map_err(about(&to))?;
                std::fs::remove_file(path).map_err(about(path))?;
                changes.push(Change::Moved(name, moved));
            }
            _ => {}
        }
    }
    let log = folder.join(LOG);
    let mut file = File::options().append(true).open(&log).map_err(about(&log))?;
    file.write_all(&log_text(1 << 30, LOG_BYTES)).map_err(about(&log))?;
    changes.push(Change::Grown(PathBuf::from(LOG)));
    Ok(changes)
}

/// Gives the second half of a file new content.
fn rewrite(path: &Path, seed: usize) -> Result<()> {
    let mut content = std::fs::read(path).map_err(about(path))?;
    let half = content.len() / 2;
    let rest = content.get_mut(half..).unwrap_or_default();
    rest.copy_from_slice(&new_content(seed, rest.len()));
    std::fs::write(path, content).map_err(about(path))
}

/// Brings the changed files into the image without mounting it.
fn change_by_debugfs(
    machine: &Machine,
    debugfs: &Path,
    changes: &[Change],
    image: &str,
) -> std::result::Result<(), Stop> {
    let mut script = format!("mkdir {ATTIC}\n");
    for change in changes {
        let (gone, new) = match change {
            Change::Rewritten(name) | Change::Grown(name) => (name, name),
            Change::Moved(from, to) => (from, to),
        };
        let at = |path: &Path, command: &str| {
            let folder = path.parent().unwrap_or(Path::new("")).display().to_string();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            format!("cd /{folder}\n{command} {name}\n")
        };
        let remove = at(gone, "rm");
        let write = at(new, &format!("write {FILES}/{}", new.display()));
        // Names that its parser would take apart stay as they are.
        if remove.contains(['\t', '"']) || gone.to_string_lossy().contains(' ') {
            continue;
        }
        // What moves gets its new place while the old one is still taken.
        let [first, second] = if gone == new { [remove, write] } else { [write, remove] };
        script.push_str(&first);
        script.push_str(&second);
    }
    let path = machine.path(SCRIPT);
    std::fs::write(&path, script).map_err(about(&path))?;
    machine.show(&format!("debugfs -w -f {SCRIPT} {image}"))?;
    Ok(machine.quietly(Tool::new(debugfs).args(["-w", "-f", SCRIPT, image]))?)
}

/// A day of work in an image without a file system.
fn change_bytes(image: &Path, size: u64) -> Result<()> {
    let file = File::options().read(true).write(true).open(image).map_err(about(image))?;
    let mut moved = vec![0; 1 << 20];
    file.read_exact_at(&mut moved, 0).map_err(about(image))?;
    file.write_all_at(&moved, size - (2 << 20)).map_err(about(image))?;
    for step in 0..8 {
        let at = size / 16 * step / 4096 * 4096;
        file.write_all_at(&new_content(step as usize, 256 << 10), at).map_err(about(image))?;
    }
    Ok(())
}
