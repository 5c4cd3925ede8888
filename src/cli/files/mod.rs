//! `snapfs files`: looks into an image, without letting anything of it near this host.
//!
//! Nothing is attached, so no LVM, no RAID and no automounter gets to see what an image holds. ext2, ext3 and ext4 are
//! read by a library in this process; what only the kernel can read is mounted when that is asked for (see `kernel`).

pub mod entry;
pub mod ext;
pub mod kernel;
pub mod partitions;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde::Serialize;

use crate::cli::files::entry::{Filesystem, as_table};
use crate::cli::files::ext::Ext;
use crate::cli::files::kernel::{ImageFile, mount_options, run_inside};
use crate::cli::files::partitions::{Content, Partition, Source, partitions};
use crate::cli::output;
use crate::cli::store_arg::{StoreArg, reference};
use crate::cli::{DONE, Outcome, Stop};
use crate::error::{Error, ErrorKind, Result, invalid, not_found, unsupported};
use crate::image::reader::Image;
use crate::store::full_name;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs files /srv/snapfs web01/monday.img
  snapfs files /srv/snapfs web01/latest /etc
  snapfs files /srv/snapfs web01/latest /etc/fstab --output -
  snapfs files /srv/snapfs web01/latest /var/lib/db.sqlite --output db.sqlite --partition 2

Without PATH it lists what is in the image. ext2, ext3 and ext4 are read without the kernel and without root. XFS needs
--mount and root: the kernel mounts it read-only and out of sight; do not do that with images of people that you do not
trust.";

/// Arguments of `files`.
#[derive(Debug, clap::Args)]
pub struct Files {
    #[command(flatten)]
    store: StoreArg,

    /// The snapshot: VM/NAME or VM/DISK/NAME; NAME latest is the newest
    #[arg(value_name = "SNAPSHOT")]
    snapshot: OsString,

    /// A path in the guest's filesystem, from its root on; a folder is listed
    #[arg(value_name = "PATH")]
    path: Option<String>,

    /// Copy the file to this new file, or to standard output with -
    #[arg(long, short, value_name = "FILE", requires = "path")]
    output: Option<PathBuf>,

    /// The partition; needed when several have a filesystem
    #[arg(long, short, value_name = "NUMBER", requires = "path")]
    partition: Option<u32>,

    /// Let the kernel of this host mount a filesystem that snapfs cannot read itself
    #[arg(long, requires = "path")]
    mount: bool,

    /// Report in JSON
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

/// What is wanted of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// What lies there.
    Listing {
        /// For programs.
        json: bool,
    },
    /// The bytes of a file.
    Content,
}

#[derive(Serialize)]
struct Row {
    /// `None`: the image has no partitions.
    partition: Option<u32>,
    start: u64,
    bytes: u64,
    content: &'static str,
}

impl Files {
    /// Runs the command.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when the image or what it holds makes no sense; `Unsupported` for a filesystem that cannot
    /// be read; `Exists` when the output file is there; `Corrupt`, `Unavailable`.
    pub fn run(&self) -> Outcome {
        let to_stream = self.output.as_deref().is_some_and(|path| path.as_os_str() == "-");
        if to_stream && io::stdout().is_terminal() {
            return Err(Stop::usage(invalid("a file of a guest is not written to a terminal")));
        }
        let store = self.store.open()?;
        let (vm, file, image) = store.open_reference(&reference(&self.snapshot)?)?;
        let read = |offset: u64, out: &mut [u8]| image.read_at(offset, out);
        let found = partitions(&Source { bytes: image.bytes(), read: &read })?;
        let Some(path) = self.path.as_deref() else { return self.list_partitions(&found) };
        if !path.starts_with('/') {
            return Err(Stop::usage(invalid(format!("{path:?} must begin with /"))));
        }
        let partition = choose(&found, self.partition).map_err(|e| e.within(image.name()))?.clone();
        match (partition.content, &self.output) {
            (Content::Ext, output) => {
                let filesystem = Ext::open(image, partition.range)?;
                let what = if output.is_some() { What::Content } else { What::Listing { json: self.json } };
                show(&filesystem, path, what, output.as_deref().filter(|_| !to_stream))
            }
            _ => self.through_kernel(&image, &full_name(vm.name(), &file), &partition, path),
        }
    }

    fn list_partitions(&self, found: &[Partition]) -> Outcome {
        let row = |p: &Partition| Row {
            partition: p.number,
            start: p.range.start,
            bytes: p.range.end - p.range.start,
            content: p.content.name(),
        };
        let rows: Vec<Row> = found.iter().map(row).collect();
        if self.json {
            output::json(&rows)?;
            return Ok(DONE);
        }
        let number = |row: &Row| row.partition.map_or_else(|| "(none)".to_owned(), |number| number.to_string());
        let cells =
            |row: &Row| vec![number(row), row.start.to_string(), output::size(row.bytes), row.content.to_owned()];
        let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
        output::print(&output::table(&["partition", "start", "size", "content"], &[3], &cells))?;
        Ok(DONE)
    }

    fn through_kernel(&self, image: &Image, name: &str, partition: &Partition, path: &str) -> Outcome {
        let content = partition.content;
        if mount_options(content).is_none() {
            let why =
                format!("{}: {} cannot be read: see docs/OPERATIONS.md for other ways", image.name(), what(partition));
            return Err(unsupported(why).into());
        }
        if !self.mount {
            let why = format!("{}: {} is read by the kernel only: --mount lets it", image.name(), what(partition));
            return Err(unsupported(why).into());
        }
        let file = ImageFile::find(&self.store.store, name)?;
        let run = |what, out| run_inside(&file.path, content, &partition.range, path, what, out);
        match self.output.as_deref() {
            None => run(What::Listing { json: self.json }, Stdio::inherit()),
            Some(output) if output.as_os_str() == "-" => run(What::Content, Stdio::inherit()),
            Some(output) => {
                let part = NewFile::create(output)?;
                let out = part.file.as_file().try_clone().map_err(|e| Error::io(output.display().to_string(), e))?;
                run(What::Content, Stdio::from(out))?;
                part.finish()?;
                Ok(DONE)
            }
        }
    }
}

fn what(partition: &Partition) -> String {
    match partition.number {
        Some(number) => format!("partition {number} ({})", partition.content.name()),
        None => format!("its content ({})", partition.content.name()),
    }
}

/// Whether a path can be looked for in it.
fn is_readable(partition: &Partition) -> bool {
    partition.content == Content::Ext || mount_options(partition.content).is_some()
}

/// The partition that is meant: the one with this number, or the only one that can be read.
fn choose(found: &[Partition], number: Option<u32>) -> Result<&Partition> {
    if let Some(number) = number {
        let named = found.iter().find(|partition| partition.number == Some(number));
        return named.ok_or_else(|| not_found(format!("has no partition {number}")));
    }
    let mut readable = found.iter().filter(|partition| is_readable(partition));
    match (readable.next(), readable.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => {
            let held: Vec<String> = found.iter().map(what).collect();
            Err(unsupported(format!("has no filesystem that can be read: {}", held.join(", "))))
        }
        (Some(_), Some(_)) => {
            let several: Vec<String> = found.iter().filter(|p| is_readable(p)).map(what).collect();
            Err(invalid(format!("say which with --partition: {}", several.join(", "))))
        }
    }
}

/// Shows a path: prints what lies there, or copies a file to `target`, or to standard output when there is none.
///
/// # Errors
/// Those of the filesystem; `Exists` when the target is there.
pub fn show(filesystem: &dyn Filesystem, path: &str, what: What, target: Option<&Path>) -> Outcome {
    match (what, target) {
        (What::Listing { json }, _) => {
            let entries = filesystem.entries(path)?;
            if json {
                output::json(&entries)?;
            } else {
                output::print(&as_table(&entries))?;
            }
        }
        (What::Content, None) => {
            // Not through the buffer of the standard library, which looks for ends of lines.
            let out = rustix::io::dup(rustix::stdio::stdout()).map_err(|e| Error::io("standard output", e.into()))?;
            filesystem.copy(path, &mut File::from(out))?;
        }
        (What::Content, Some(target)) => {
            let mut part = NewFile::create(target)?;
            filesystem.copy(path, part.file.as_file_mut())?;
            part.finish()?;
        }
    }
    Ok(DONE)
}

/// A file that appears when it is complete, with mode 0600, and never in the place of another.
struct NewFile {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

impl NewFile {
    fn create(path: &Path) -> Result<Self> {
        let about = || path.display().to_string();
        if path.symlink_metadata().is_ok() {
            return Err(Error::new(ErrorKind::Exists, format!("{}: is there already", about())));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::NamedTempFile::new_in(folder).map_err(|e| Error::io(about(), e))?;
        Ok(Self { file, path: path.to_owned() })
    }

    fn finish(mut self) -> Result<()> {
        let about = self.path.display().to_string();
        self.file.flush().map_err(|e| Error::io(&about, e))?;
        self.file.persist_noclobber(&self.path).map_err(|e| Error::io(&about, e.error))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition(number: u32, content: Content) -> Partition {
        Partition { number: Some(number), range: 0..1, content }
    }

    #[test]
    fn the_only_filesystem_needs_no_number() {
        let [boot, swap, root] =
            [(1, Content::Fat), (2, Content::Swap), (3, Content::Ext)].map(|(n, c)| partition(n, c));
        let mut found = vec![boot, swap, root];
        assert_eq!(choose(&found, None).unwrap().number, Some(3));
        assert_eq!(choose(&found, Some(1)).unwrap().number, Some(1));
        assert_eq!(choose(&found, Some(9)).unwrap_err().kind(), ErrorKind::NotFound);
        found.push(partition(4, Content::Xfs));
        let told = choose(&found, None).unwrap_err().to_string();
        assert_eq!(told, "say which with --partition: partition 3 (ext4), partition 4 (xfs)");
        let told = choose(&found[..2], None).unwrap_err().to_string();
        assert_eq!(told, "has no filesystem that can be read: partition 1 (fat), partition 2 (swap)");
        let whole = Partition { number: None, range: 0..1, content: Content::Ext };
        assert_eq!(choose(std::slice::from_ref(&whole), None).unwrap(), &whole);
    }

    #[test]
    fn a_new_file_never_takes_the_place_of_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut part = NewFile::create(&path).unwrap();
        part.file.write_all(b"x").unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "mine").unwrap();
        assert_eq!(part.finish().unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(NewFile::create(&path).map(drop).unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
