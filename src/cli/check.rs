//! `snapfs check`: proves the store against its invariants, and tells of every damage.

use std::path::{Path, PathBuf};

use crate::check::live::LiveImage;
use crate::check::losses::Lost;
use crate::check::{CheckOptions, Finding, Progress as Checked, check_store_from, rebuild};
use crate::cli::output::{self, Progress};
use crate::cli::store_arg::StoreArg;
use crate::cli::{DAMAGED, DONE, FAILED, Outcome};
use crate::error::Result;
use crate::ingest::source::Source;

/// Ranges of a snapshot that a line shows; the JSON has more of them.
const RANGES_SHOWN: usize = 4;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs check /srv/snapfs
  snapfs check /srv/snapfs --read-data
  snapfs check /srv/snapfs --sample 5
  snapfs check /srv/snapfs --read-data --repair
  snapfs check /srv/snapfs --repair --from /dev/vg0/web01
  snapfs check /srv/snapfs --rebuild";

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct Check {
    #[command(flatten)]
    store: StoreArg,

    /// Read all data and prove it, not only the metadata
    #[arg(long)]
    read_data: bool,

    /// Read this share of the data, in percent
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent, conflicts_with = "read_data")]
    sample: Option<f64>,

    /// Put back copies that are missing and replace damaged ones, in a store over several targets; mark snapshots of
    /// which bytes are lost for good, and take the mark from those that were healed (with --read-data)
    #[arg(long)]
    repair: bool,

    /// Heal what no copy has whole from this image (a file or a block device) that still has the blocks; reads all
    /// data. May be given several times
    #[arg(long, value_name = "SOURCE", requires = "repair", conflicts_with = "sample")]
    from: Vec<PathBuf>,

    /// Make all derived data anew first
    #[arg(long)]
    rebuild: bool,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

impl Check {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`check_store_from`] and [`rebuild()`]. Damage that was found is no error of theirs.
    pub fn run(&self) -> Outcome {
        let sources: Vec<Live> = self.from.iter().map(|path| Live::open(path)).collect::<Result<_>>()?;
        let images: Vec<&dyn LiveImage> = sources.iter().map(|live| live as &dyn LiveImage).collect();
        let store = self.store.open()?;
        let mut code = DONE;
        if self.rebuild {
            let rebuilt = rebuild(&store)?;
            for vm in &rebuilt.busy {
                output::message(format!("{vm}: not rebuilt, it is being written to"));
            }
            for reason in &rebuilt.failed {
                output::message(format!("not rebuilt: {reason}"));
                code = FAILED;
            }
        }
        let options = CheckOptions {
            read_data: self.read_data || !images.is_empty(),
            sample_percent: self.sample,
            repair: self.repair,
        };
        let bar = Progress::new("check", Some(0), self.json);
        let report = check_store_from(&store, options, &images, &mut |at: Checked| {
            bar.note(|| format!("check, VM {} of {}", at.vms_done + 1, at.vms_total));
            bar.set_total(at.bytes_total);
            bar.set(at.bytes_done);
        })?;
        drop(bar);
        if self.json {
            output::json(&report)?;
        } else {
            let mut text: String = report.findings.iter().map(as_line).collect();
            let verdict = if report.is_damaged() { "damage was found" } else { "no damage was found" };
            text.push_str(&format!(
                "{verdict}: VMs {}, snapshots {}, objects {}, {} of data read\n",
                report.vms,
                report.snapshots,
                report.objects,
                output::size(report.bytes_read)
            ));
            if report.copies > 0 {
                text.push_str(&format!(
                    "copies on the targets {}, bad {}, repaired {}, targets away {}\n",
                    report.copies,
                    report.copies_bad,
                    report.copies_repaired,
                    report.targets_away.len()
                ));
            }
            if !images.is_empty() {
                text.push_str(&format!(
                    "frames healed from images {}, not healed {}\n",
                    report.frames_mended, report.frames_unmended
                ));
            }
            if report.snapshots_damaged + report.snapshots_unmarked > 0 {
                text.push_str(&format!(
                    "snapshots marked as damaged {}, marked now {}, marks taken away {}\n",
                    report.snapshots_damaged, report.snapshots_marked, report.snapshots_unmarked
                ));
            }
            if report.snapshots_held > 0 {
                text.push_str(&format!("{} more snapshots are forgotten and held\n", report.snapshots_held));
            }
            if report.findings_dropped > 0 {
                text.push_str(&format!("{} more findings are not shown\n", report.findings_dropped));
            }
            if report.leaked_objects > 0 {
                let leaked = output::size(report.leaked_bytes);
                text.push_str(&format!("{} objects are in no log, {leaked}: see gc --exact\n", report.leaked_objects));
            }
            output::print(&text)?;
        }
        Ok(if report.is_damaged() { DAMAGED } else { code })
    }
}

/// A file or block device as an image to heal from.
struct Live {
    bytes: u64,
    source: Source,
}

impl Live {
    fn open(path: &Path) -> Result<Self> {
        let source = Source::open(path)?;
        Ok(Self { bytes: source.bytes().unwrap_or(0), source })
    }
}

impl LiveImage for Live {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn next_data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        self.source.next_data(from)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.source.read_at(offset, out)
    }
}

fn as_line(finding: &Finding) -> String {
    let concerned: Vec<String> = finding
        .snapshots
        .iter()
        .map(|name| match finding.lost.iter().find(|lost| lost.snapshot == *name) {
            Some(lost) => format!("{name}: {}", as_ranges(lost)),
            None => name.clone(),
        })
        .collect();
    let concerns = if concerned.is_empty() { String::new() } else { format!(" (concerns {})", concerned.join("; ")) };
    format!("{}: {}{concerns}\n", finding.object, finding.what)
}

fn as_ranges(lost: &Lost) -> String {
    let shown = lost.ranges.iter().take(RANGES_SHOWN);
    let ranges: Vec<String> = shown.map(|range| format!("{}+{}", range.offset, range.bytes)).collect();
    let more = lost.ranges_more + lost.ranges.len().saturating_sub(RANGES_SHOWN) as u64;
    let more = if more > 0 { format!(" and {more} more ranges") } else { String::new() };
    format!("{} bytes at {}{more}", lost.bytes, ranges.join(", "))
}

fn parse_percent(text: &str) -> std::result::Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<f64>();
    number.ok().filter(|n| (0.0..=100.0).contains(n)).ok_or_else(|| "not a number from 0 to 100".to_owned())
}
