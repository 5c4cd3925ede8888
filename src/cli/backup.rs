//! `snapfs backup`: a file, a block device or standard input becomes a sealed snapshot.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::cli::output::{self, Levels, Progress};
use crate::cli::store_arg::{StoreArg, reference, snapshot_name};
use crate::cli::{DONE, Outcome};
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::backup::{BackupOptions, BackupProgress, BackupReport, Changed, Parent, backup};
use crate::ingest::source::Source;
use crate::limits::BLOCK_BYTES;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs backup /srv/snapfs web01/monday.img /dev/vg/web01
  snapfs backup /srv/snapfs web01/xvda/monday.img web01.img
  ssh host cat /dev/vg/web01 | snapfs backup /srv/snapfs web01/monday.img -
  snapfs backup /srv/snapfs web01/tuesday.img web01.img --parent web01/monday.img --changed map.json";

/// A change map has at most 64 MiB, half a million ranges: it is held in memory as it is parsed.
const MAP_BYTES_MAX: u64 = 64 << 20;

/// Arguments of `backup`.
#[derive(Debug, clap::Args)]
pub struct Backup {
    #[command(flatten)]
    store: StoreArg,

    /// Name of the new snapshot: VM/NAME, or VM/DISK/NAME
    #[arg(value_name = "SNAPSHOT")]
    snapshot: OsString,

    /// What to back up: a file, a block device, or - for standard input
    #[arg(value_name = "SOURCE")]
    source: PathBuf,

    /// Compare with this snapshot, not with the newest of the same disk
    #[arg(long, value_name = "SNAPSHOT")]
    parent: Option<OsString>,

    /// Read only what changed since the parent, as this map says; JSON as qemu-img map --output=json prints it
    #[arg(long, value_name = "MAP", requires = "parent")]
    changed: Option<PathBuf>,

    /// Read everything, and refuse the map if it is wrong
    #[arg(long, requires = "changed")]
    verify_map: bool,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Report<'a> {
    name: &'a str,
    size: u64,
    data_bytes: u64,
    levels: Levels,
    stored_bytes: u64,
}

impl Backup {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`backup`]; `NotFound` without the source.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let name = snapshot_name(&self.snapshot)?;
        let parent = self.parent.as_deref().map(reference).transpose()?;
        let source = if self.source.as_os_str() == "-" { Source::stdin() } else { Source::open(&self.source)? };
        let changed = self.changed.as_deref().map(read_map).transpose()?;
        let bar = Progress::new("backup", source.bytes(), self.json);
        let changed = changed.map(|text| Changed::Map { text, verify: self.verify_map });
        let options = BackupOptions { parent: parent.map(Parent::Snapshot), changed };
        let report = backup(&store, &name, source, options, &|p: BackupProgress| bar.set(p.bytes_done))?;
        drop(bar);
        tell(&report, self.json)
    }
}

/// Tells what became of a new snapshot.
///
/// # Errors
/// As [`output::print`].
pub(super) fn tell(report: &BackupReport, as_json: bool) -> Outcome {
    let levels = Levels::of(report.image_bytes, &report.tally);
    let data_bytes = report.tally.blocks_data.saturating_mul(BLOCK_BYTES as u64);
    if as_json {
        let (name, size, stored_bytes) = (&report.name, report.image_bytes, levels.stored_bytes);
        output::json(&Report { name, size, data_bytes, levels, stored_bytes })?;
    } else {
        let [size, data, new, stored] =
            [report.image_bytes, data_bytes, levels.new_bytes, levels.stored_bytes].map(output::size);
        output::line(format!("{}: {size}, {data} of data, {new} new, {stored} stored", report.name))?;
    }
    Ok(DONE)
}

fn read_map(path: &Path) -> Result<Vec<u8>> {
    let about = |e| Error::io(format!("change map {}", path.display()), e);
    let mut text = Vec::new();
    File::open(path).and_then(|file| file.take(MAP_BYTES_MAX + 1).read_to_end(&mut text)).map_err(about)?;
    if text.len() as u64 > MAP_BYTES_MAX {
        let message = format!("change map {}: has over {MAP_BYTES_MAX} bytes", path.display());
        return Err(Error::new(ErrorKind::TooLarge, message));
    }
    Ok(text)
}
