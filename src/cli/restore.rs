//! `snapfs restore`: a snapshot becomes a file, a block device's content, or a stream.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::cli::output::{self, Progress};
use crate::cli::store_arg::{StoreArg, reference};
use crate::cli::{DONE, Outcome, Stop};
use crate::error::{Error, invalid};
use crate::image::restore::{restore_to_file, restore_to_stream};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs restore /srv/snapfs web01/monday.img web01.img
  snapfs restore /srv/snapfs web01/latest /dev/vg/web01
  snapfs restore /srv/snapfs web01/monday.img - | ssh host dd of=/dev/vg/web01 bs=1M

A new file appears when it is complete, with mode 0600. In a file or device that is there only what differs is
written; a device keeps what lies beyond the image.";

/// Threads that read and decompress: more only wait for the medium.
const THREADS_MAX: usize = 8;

/// Arguments of `restore`.
#[derive(Debug, clap::Args)]
pub struct Restore {
    #[command(flatten)]
    store: StoreArg,

    /// The snapshot: VM/NAME or VM/DISK/NAME; NAME latest is the newest
    #[arg(value_name = "SNAPSHOT")]
    snapshot: OsString,

    /// Where to: a file, a block device, or - for standard output
    #[arg(value_name = "DEST")]
    dest: PathBuf,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Report {
    name: String,
    size: u64,
    bytes_written: u64,
}

impl Restore {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`restore_to_file`] and [`restore_to_stream`].
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let reference = reference(&self.snapshot)?;
        let is_stream = self.dest.as_os_str() == "-";
        if is_stream && self.json {
            return Err(Stop::usage(invalid("--json has no place to go when the image goes to standard output")));
        }
        if is_stream && io::stdout().is_terminal() {
            return Err(Stop::usage(invalid("an image is not written to a terminal")));
        }
        let (_, _, image) = store.open_reference(&reference)?;
        let bar = Progress::new("restore", Some(image.bytes()), self.json);
        let progress = |bytes| bar.add(bytes);
        let restored = if is_stream {
            // Not through the buffer of the standard library, which looks for ends of lines.
            let out = rustix::io::dup(rustix::stdio::stdout()).map_err(|e| Error::io("standard output", e.into()))?;
            restore_to_stream(&image, &mut File::from(out), &progress)
                .map_err(|e| e.within("restore to standard output"))?
        } else {
            let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
            restore_to_file(&image, &self.dest, threads, &progress)?
        };
        drop(bar);
        let (name, size, bytes_written) = (image.name().to_owned(), image.bytes(), restored.bytes_written);
        if self.json {
            output::json(&Report { name, size, bytes_written })?;
        } else if !is_stream && !goes_on(&self.dest) {
            let (size, written, dest) = (output::size(size), output::size(bytes_written), self.dest.display());
            output::line(format!("{name}: {size} restored to {dest}, {written} written"))?;
        }
        Ok(DONE)
    }
}

/// Whether a path is a stream: what it gets must be the image and nothing else, and it may be our standard output.
fn goes_on(dest: &Path) -> bool {
    let file_type = std::fs::metadata(dest).map(|metadata| metadata.file_type());
    file_type.is_ok_and(|t| t.is_fifo() || t.is_char_device())
}
