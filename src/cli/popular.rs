//! `snapfs popular`: elects the blocks that VMs share, and shows what that is worth.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;

use crate::catalog::record::Op;
use crate::cli::job_args::JobArgs;
use crate::cli::output::{self, Progress};
use crate::cli::store_arg::{parse_size, vm_name};
use crate::cli::{DONE, Outcome, Stop};
use crate::clock::SystemClock;
use crate::cluster::detect;
use crate::elect::count::CountOptions;
use crate::elect::run::{
    self, ELECTION_BYTES_DEFAULT, ELECTION_BYTES_MIN, ElectOptions, ElectReport, Elected, census, elect, popular_now,
};
use crate::error::{Error, Result, invalid};
use crate::limits::BLOCK_BYTES;
use crate::name::VmName;
use crate::popular::choice::Point;
use crate::store::{MemoryShares, Store};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Actions:
  elect   choose the blocks that most VMs hold, keep them once, and let later snapshots and gc refer to them
  show    tell how many blocks are shared, and what keeping the most popular ones once is worth
  group   tell, or set, the VM group of a VM: blocks are shared within a group only

With --hosts each host reads its part of the VMs; start elect on all of them, with the same hosts file (one ADDRESS:PORT
a line, line N, from 0, being --index N). Host 0 chooses, copies and publishes; the others end when they have told all.

Examples:
  snapfs popular /srv/snapfs elect
  snapfs popular /mnt/shared/snapfs elect --hosts hosts --index 0
  snapfs popular /srv/snapfs show --plot curve.svg
  snapfs popular /srv/snapfs group web01 tenant-a
  snapfs popular /srv/snapfs group web01 ''";

/// Points of the curve: shares of all distinct blocks, in percent.
const SIGMAS: [f64; 12] = [0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 50.0, 75.0, 100.0];

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Action {
    Elect,
    Show,
    Group,
}

/// Arguments of `popular`.
#[derive(Debug, clap::Args)]
pub struct Popular {
    /// The store: a folder; left out when --store or SNAPFS_STORE tells it
    #[arg(value_name = "STORE")]
    store: PathBuf,

    /// The store, in place of the first argument
    #[arg(long = "store", value_name = "STORE", id = "store_option")]
    store_option: Option<PathBuf>,

    /// What to do
    #[arg(value_name = "ACTION", value_enum)]
    action: Action,

    /// With group: the VM
    #[arg(value_name = "VM")]
    vm: Option<OsString>,

    /// With group: the name of its VM group from now on; empty: that of all VMs without one
    #[arg(value_name = "NAME")]
    group: Option<String>,

    /// With elect: memory for the popular blocks, 16 bytes each [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_memory: Option<u64>,

    /// With elect: choose at the most this share of all distinct blocks
    #[arg(long, value_name = "PERCENT", value_parser = parse_share)]
    sigma: Option<f64>,

    /// With show: draw the curve into this file, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    #[command(flatten)]
    job: JobArgs,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Shown {
    epoch: u64,
    blocks_popular: u64,
    blocks_condemned: u64,
    common_bytes: u64,
    blocks_distinct: u64,
    blocks_held: u64,
    blocks_shared: u64,
    blocks_duplicate: u64,
    zipf_alpha: Option<f64>,
    worth: Point,
    curve: Vec<Point>,
}

#[derive(serde::Serialize)]
struct Group {
    vm: String,
    group: String,
}

impl Popular {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`elect()`] and [`census()`]; a usage error for arguments that do not go together.
    pub fn run(&self) -> Outcome {
        self.check_arguments().map_err(Stop::usage)?;
        let store = Arc::new(Store::open(&self.store, Arc::new(SystemClock::new()), MemoryShares::default())?);
        match (self.action, &self.vm) {
            (Action::Elect, _) => self.elect(&store),
            (Action::Show, _) => self.show(&store),
            (Action::Group, Some(vm)) => self.group(&store, &vm_name(vm)?),
            (Action::Group, None) => Err(Stop::usage(invalid("group wants a VM"))),
        }
    }

    fn check_arguments(&self) -> Result<()> {
        let only_with = |given: bool, action: Action, what: &str| {
            let name = action.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
            if given && self.action != action { Err(invalid(format!("{what} goes with {name} only"))) } else { Ok(()) }
        };
        only_with(self.max_memory.is_some(), Action::Elect, "--max-memory")?;
        only_with(self.sigma.is_some(), Action::Elect, "--sigma")?;
        only_with(self.job.has_hosts(), Action::Elect, "--hosts")?;
        only_with(self.plot.is_some(), Action::Show, "--plot")?;
        only_with(self.vm.is_some(), Action::Group, "a VM")?;
        match self.max_memory {
            Some(bytes) if bytes < ELECTION_BYTES_MIN => {
                Err(invalid(format!("max-memory is {bytes} bytes, the least is {ELECTION_BYTES_MIN}")))
            }
            _ => Ok(()),
        }
    }

    fn count_options(&self) -> Result<CountOptions> {
        let (threads, scratch) = (self.job.threads, self.job.scratch.clone());
        Ok(CountOptions { hosts: self.job.hosts()?, threads, scratch, ..CountOptions::default() })
    }

    fn tell(&self, what: &'static str) -> run::Tell {
        let bar = Progress::new(what, None, self.json);
        Arc::new(move |at| match at {
            run::Progress::Counting(detect::Progress::Waiting(hosts)) => {
                output::message(format!("waiting for {hosts}"));
            }
            at => bar.note(|| in_words(&at)),
        })
    }

    fn elect(&self, store: &Arc<Store>) -> Outcome {
        let options = ElectOptions {
            memory_bytes: self.max_memory.unwrap_or(ELECTION_BYTES_DEFAULT),
            sigma_percent: self.sigma,
            count: self.count_options()?,
        };
        let report = match elect(store, &options, self.tell("elect"))? {
            Elected::Chosen(report) => report,
            Elected::Fed(report) if self.json => return output::json(&report).map(|()| DONE),
            Elected::Fed(report) => {
                let (host, sent) = (report.host, output::size(report.bytes_sent));
                output::line(format!("host {host}: read {} VMs, {sent} sent; host 0 goes on alone", report.vms))?;
                return Ok(DONE);
            }
        };
        if report.blocks_lost > 0 {
            output::message(format!("{} popular blocks could not be read; run snapfs check", report.blocks_lost));
        }
        if self.json {
            output::json(&report)?;
        } else {
            output::print(&as_text(&report))?;
        }
        Ok(DONE)
    }

    fn show(&self, store: &Arc<Store>) -> Outcome {
        let census = census(store, &self.count_options()?, self.tell("popular"))?;
        let now = popular_now(store)?;
        let shown = Shown {
            epoch: now.epoch,
            blocks_popular: now.blocks_popular,
            blocks_condemned: now.blocks_condemned,
            common_bytes: now.common_bytes,
            blocks_distinct: census.distinct(),
            blocks_held: census.held(),
            blocks_shared: census.shared(),
            blocks_duplicate: census.duplicates(),
            zipf_alpha: census.zipf_alpha(),
            worth: census.point(now.blocks_popular.min(census.shared())),
            curve: census.curve(&SIGMAS),
        };
        if let Some(path) = &self.plot {
            write_plot(path, &shown)?;
        }
        if self.json {
            output::json(&shown)?;
        } else {
            output::print(&as_table(&shown))?;
        }
        Ok(DONE)
    }

    fn group(&self, store: &Store, name: &VmName) -> Outcome {
        let (vm, state) = store.vm(name)?;
        let group = match &self.group {
            None => state.group.clone(),
            Some(group) => {
                if !group.is_empty() {
                    VmName::new(group).map_err(|e| Stop::usage(e.within("name of a VM group")))?;
                }
                vm.append(None, |state| {
                    let op = Op::Group { name: group.clone() };
                    Ok((if state.group == *group { Vec::new() } else { vec![op] }, ()))
                })?;
                group.clone()
            }
        };
        if self.json {
            output::json(&Group { vm: name.as_str().to_owned(), group })?;
        } else if group.is_empty() {
            output::line(format!("{name} shares blocks with all VMs without a group"))?;
        } else {
            output::line(format!("{name} shares blocks within group {group}"))?;
        }
        Ok(DONE)
    }
}

fn parse_share(text: &str) -> std::result::Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<f64>();
    number.ok().filter(|n| *n > 0.0 && *n <= 100.0).ok_or_else(|| "not a number over 0 and up to 100".to_owned())
}

fn in_words(progress: &run::Progress) -> String {
    match progress {
        run::Progress::Counting(detect::Progress::Scan(done, total)) => {
            format!("count: {done} of {total} members read")
        }
        run::Progress::Counting(detect::Progress::Detect(done, total)) => {
            format!("count: {done} of {total} partitions")
        }
        run::Progress::Counting(detect::Progress::Waiting(hosts)) => format!("count: waiting for {hosts}"),
        run::Progress::Copying(done, all) => format!("copy: {done} of {all} blocks"),
    }
}

fn blocks(count: u64) -> String {
    format!("{count} blocks ({})", output::size(count.saturating_mul(BLOCK_BYTES as u64)))
}

fn alpha_text(alpha: Option<f64>) -> String {
    alpha.map_or_else(|| "-".to_owned(), |alpha| format!("{alpha:.2}"))
}

fn as_text(report: &ElectReport) -> String {
    let Some(epoch) = report.epoch else {
        return format!("{} VMs share no block: nothing is elected\n", report.vms);
    };
    format!(
        "epoch {epoch}: {} are popular, {} copied ({} stored)\n{} of {} distinct blocks are shared by {} VMs\n{}",
        blocks(report.blocks_popular),
        report.blocks_copied,
        output::size(report.bytes_stored),
        report.blocks_shared,
        report.blocks_distinct,
        report.vms,
        worth_text(&report.worth, report.zipf_alpha)
    )
}

/// The efficiency that was measured, and beside it what the model says.
fn worth_text(worth: &Point, alpha: Option<f64>) -> String {
    let predicted = worth.predicted_percent.map_or_else(|| "-".to_owned(), |p| format!("{p:.1} %"));
    format!(
        "they are {:.2} % of the distinct blocks and cover {:.1} % of what VMs hold (predicted {predicted} with alpha {}),\n\
         {:.1} % of the duplicates between VMs\n",
        worth.sigma_percent,
        worth.coverage_percent,
        alpha_text(alpha),
        worth.duplicates_percent
    )
}

fn as_table(shown: &Shown) -> String {
    let mut text = format!(
        "epoch {}: {} are popular, common packs take {}\n{} of {} distinct blocks are shared, {} copies could be saved\n{}\n",
        shown.epoch,
        blocks(shown.blocks_popular),
        output::size(shown.common_bytes),
        shown.blocks_shared,
        shown.blocks_distinct,
        shown.blocks_duplicate,
        worth_text(&shown.worth, shown.zipf_alpha)
    );
    let header = ["SIGMA", "BLOCKS", "COVERAGE", "PREDICTED", "DUPLICATES"];
    let percent = |value: f64| format!("{value:.1} %");
    let rows: Vec<Vec<String>> = shown
        .curve
        .iter()
        .map(|point| {
            vec![
                format!("{:.2} %", point.sigma_percent),
                point.blocks.to_string(),
                percent(point.coverage_percent),
                point.predicted_percent.map_or_else(|| "-".to_owned(), percent),
                percent(point.duplicates_percent),
            ]
        })
        .collect();
    text.push_str(&output::table(&header, &[], &rows));
    text
}

/// What a line of the drawing shows of a point.
type Value = fn(&Point) -> Option<f64>;

/// Draws coverage, prediction and saved duplicates over the share of popular blocks, which goes logarithmically.
fn write_plot(path: &Path, shown: &Shown) -> Result<()> {
    let (left, top, width, height) = (60.0, 40.0, 560.0, 320.0);
    let x = |sigma: f64| left + width * ((sigma.max(0.1) / 0.1).log10() / 3.0).clamp(0.0, 1.0);
    let y = |percent: f64| top + height * (1.0 - percent / 100.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 660 420\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"660\" height=\"420\" fill=\"white\"/>\n\
         <text x=\"{left}\" y=\"22\" font-size=\"14\">Coverage of the popular set, epoch {}, alpha {}</text>\n",
        shown.epoch,
        alpha_text(shown.zipf_alpha)
    );
    for percent in [0.0, 20.0, 40.0, 60.0, 80.0, 100.0] {
        let at = y(percent);
        svg.push_str(&format!(
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"52\" y=\"{:.1}\" text-anchor=\"end\">{percent} %</text>\n",
            left + width,
            at + 4.0
        ));
    }
    for sigma in [0.1, 1.0, 10.0, 100.0] {
        let at = x(sigma);
        svg.push_str(&format!(
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{sigma} %</text>\n",
            top + height,
            top + height + 18.0
        ));
    }
    svg.push_str(
        "<text x=\"340\" y=\"400\" text-anchor=\"middle\">popular blocks, share of all distinct ones</text>\n",
    );
    let lines: [(&str, &str, Value); 3] = [
        ("coverage", "#1f77b4", |point| Some(point.coverage_percent)),
        ("duplicates saved", "#2ca02c", |point| Some(point.duplicates_percent)),
        ("predicted coverage", "#d62728", |point| point.predicted_percent),
    ];
    for (at, (name, colour, value)) in lines.iter().enumerate() {
        let points: Vec<String> = shown
            .curve
            .iter()
            .filter_map(|point| Some(format!("{:.1},{:.1}", x(point.sigma_percent), y(value(point)?))))
            .collect();
        svg.push_str(&format!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>\n\
             <text x=\"70\" y=\"{}\" fill=\"{colour}\">{name}</text>\n",
            points.join(" "),
            60 + 16 * at
        ));
    }
    svg.push_str("</svg>\n");
    std::fs::write(path, svg).map_err(|e| Error::io(path.display().to_string(), e))
}
