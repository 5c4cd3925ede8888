//! `snapfs batch`: many images at once, on one or several hosts, deduplicated exactly.

use std::path::PathBuf;
use std::sync::Arc;

use crate::batch::run::{BatchOptions, BatchProgress, BatchReport, batch};
use crate::cli::job_args::{JobArgs, read};
use crate::cli::output::{self, Levels};
use crate::cli::store_arg::StoreArg;
use crate::cli::{DONE, Outcome, Stop};
use crate::clock::SystemClock;
use crate::cluster::detect::Progress;
use crate::cluster::mesh::Patience;
use crate::error::Error;
use crate::limits::{JOB_MEMORY_BYTES, MEMORY_BYTES_MIN};
use crate::store::{MemoryShares, Store};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
A job file has a line for each image, the same file on every host, fields separated by tabs:
  SNAPSHOT  SOURCE  [HOST  [MAP]]
HOST is the number of the host that has the source; without it VMs are dealt out in turn. MAP is a change map against
the newest snapshot of the disk. A hosts file has one ADDRESS:PORT a line, line N, from 0, being --index N.

A job that was cut off is started again, on all hosts, with the same job file.

Examples:
  snapfs batch /srv/snapfs tonight.job
  snapfs batch /mnt/shared/snapfs tonight.job --hosts hosts --index 0";

/// Arguments of `batch`.
#[derive(Debug, clap::Args)]
pub struct Batch {
    #[command(flatten)]
    store: StoreArg,

    /// The images: SNAPSHOT, SOURCE and, if wanted, HOST and MAP, with tabs between them, a line each
    #[arg(value_name = "JOBFILE")]
    jobs: PathBuf,

    #[command(flatten)]
    job: JobArgs,

    /// Take the VMs up in so many rounds, largest first, so that sources must stay unchanged for a shorter time
    #[arg(long, value_name = "N", default_value_t = 1)]
    rounds: usize,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

impl Batch {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`batch`]; `NotFound` without job file or hosts file.
    pub fn run(&self) -> Outcome {
        let shares = MemoryShares::of(self.store.max_memory.unwrap_or(MEMORY_BYTES_MIN)).map_err(Stop::usage)?;
        let store = Arc::new(Store::open(&self.store.store, Arc::new(SystemClock::new()), shares)?);
        let text = read("job file", &self.jobs)?;
        let hosts = self.job.hosts()?;
        let default = || store.derived_root().map_or_else(std::env::temp_dir, |derived| derived.join("spill"));
        let scratch = self.job.scratch.clone().unwrap_or_else(default);
        std::fs::create_dir_all(&scratch).map_err(|e| Error::io(scratch.display().to_string(), e))?;
        let options = BatchOptions {
            hosts,
            threads: self.job.threads,
            rounds: self.rounds,
            memory_bytes: (JOB_MEMORY_BYTES / 2) as usize,
            scratch,
            patience: Patience::default(),
        };
        let bar = output::Progress::new("batch", None, self.json);
        let tell = move |progress: BatchProgress| match &progress {
            BatchProgress::Job(_, Progress::Waiting(hosts)) => output::message(format!("waiting for {hosts}")),
            _ => bar.note(|| in_words(&progress)),
        };
        let report = batch(&store, &text, &options, Arc::new(tell))?;
        self.print(&report)
    }

    fn print(&self, report: &BatchReport) -> Outcome {
        if self.json {
            output::json(report)?;
            return Ok(DONE);
        }
        for name in &report.done_before {
            output::line(format!("{name}: was committed by an earlier run of this job"))?;
        }
        for vm in &report.vms {
            let levels = Levels::of(vm.image_bytes, &vm.tally);
            let [size, new, stored] = [vm.image_bytes, levels.new_bytes, levels.stored_bytes].map(output::size);
            let frozen = format!("frozen for {:.1} s in round {}", vm.frozen_seconds, vm.round);
            output::line(format!("{}: {size}, {new} new, {stored} stored; {frozen}", vm.snapshots.join(", ")))?;
        }
        let [sent, spilled] = [report.bytes_sent, report.spilled_bytes].map(output::size);
        let shared = report.blocks_shared;
        output::line(format!("{shared} blocks shared, {sent} sent to other hosts, {spilled} of scratch for records"))?;
        Ok(DONE)
    }
}

fn in_words(progress: &BatchProgress) -> String {
    match progress {
        BatchProgress::Job(stage, Progress::Scan(done, total)) => format!("{stage}: {done} of {total} members read"),
        BatchProgress::Job(stage, Progress::Detect(done, total)) => format!("{stage}: {done} of {total} partitions"),
        BatchProgress::Job(stage, Progress::Waiting(hosts)) => format!("{stage}: waiting for {hosts}"),
        BatchProgress::Share(image) => format!("share: {image}"),
        BatchProgress::Write(vm) => format!("write: {vm}"),
    }
}
