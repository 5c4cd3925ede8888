//! `snapfs gc`: frees the bytes of what was forgotten, VM by VM.

use std::ffi::OsString;
use std::time::Duration;

use crate::cli::output::{self, Progress};
use crate::cli::store_arg::{StoreArg, parse_size, vm_name};
use crate::cli::{BUSY, DAMAGED, DONE, Outcome, exit_code};
use crate::clock;
use crate::collect::common::collect_common;
use crate::collect::gc::{self, GcOptions, GcReport, collect_vm};
use crate::error::{ErrorKind, Result, invalid};
use crate::ingest::background::step_back_for_all;
use crate::limits::GC_RATE_BYTES_MIN;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs gc /srv/snapfs
  snapfs gc /srv/snapfs web01 --dry-run
  snapfs gc /srv/snapfs --limit-rate 50M
  snapfs gc /srv/snapfs --exact";

/// Arguments of `gc`.
#[derive(Debug, clap::Args)]
pub struct Gc {
    #[command(flatten)]
    store: StoreArg,

    /// Only this VM
    #[arg(value_name = "VM")]
    vm: Option<OsString>,

    /// Read all recipes, and free what crashed writers left as well
    #[arg(long)]
    exact: bool,

    /// Say what would be freed, and change nothing
    #[arg(long)]
    dry_run: bool,

    /// Read and write so many bytes a second at the most, for example 50M
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    limit_rate: Option<u64>,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

fn parse_rate(text: &str) -> Result<u64> {
    match parse_size(text)? {
        bytes if bytes < GC_RATE_BYTES_MIN => Err(invalid("less than 64K a second: it would not end")),
        bytes => Ok(bytes),
    }
}

#[derive(serde::Serialize)]
struct Report {
    vms: Vec<GcReport>,
    dry_run: bool,
}

impl Gc {
    /// Runs the command. Without a VM, one that is being written to is skipped.
    ///
    /// # Errors
    /// As [`collect_vm`] for a VM that was named; other VMs' errors are told and the rest is collected.
    pub fn run(&self) -> Outcome {
        // Backups of other VMs go on beside it, and guests run on the same cores.
        step_back_for_all();
        let mut store = self.store.open()?;
        if let Some(bytes_per_second) = self.limit_rate {
            store = store.limited_to(bytes_per_second);
        }
        let names = match &self.vm {
            Some(vm) => vec![vm_name(vm)?],
            None => store.vm_names()?,
        };
        let options = GcOptions { exact: self.exact, dry_run: self.dry_run };
        let mut report = Report { vms: Vec::new(), dry_run: self.dry_run };
        let mut code = DONE;
        let bar = Progress::new("gc", None, self.json);
        for name in &names {
            let mut progress = |progress| bar.note(|| format!("{name}: {}", in_words(progress)));
            match collect_vm(&store, name, options, &mut progress) {
                Ok(done) => {
                    if done.busy && self.vm.is_some() {
                        code = code.max(BUSY);
                    }
                    if !done.damaged.is_empty() || done.recipes_damaged > 0 {
                        code = code.max(DAMAGED);
                    }
                    report.vms.push(done);
                }
                Err(e) if self.vm.is_some() => return Err(e.into()),
                // Its log was removed with the rest of it.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => {
                    output::message(&e);
                    code = code.max(exit_code(e.kind()));
                }
            }
        }
        if self.vm.is_none() {
            let mut progress = |progress| bar.note(|| format!("common packs: {}", in_words(progress)));
            match collect_common(&store, options, &mut progress) {
                Ok(done) => {
                    let done = done.filter(|done| !done.idle || done.slots_condemned > 0);
                    if done.as_ref().is_some_and(|done| !done.damaged.is_empty()) {
                        code = code.max(DAMAGED);
                    }
                    report.vms.extend(done);
                }
                Err(e) => {
                    output::message(&e);
                    code = code.max(exit_code(e.kind()));
                }
            }
        }
        drop(bar);
        for done in &report.vms {
            tell(done);
        }
        if self.json {
            output::json(&report)?;
        } else {
            output::print(&as_text(&report))?;
        }
        Ok(code)
    }
}

fn in_words(progress: gc::Progress) -> String {
    match progress {
        gc::Progress::Planning => "finding out what is live".to_owned(),
        gc::Progress::Deleting(done) => format!("{done} objects deleted"),
        gc::Progress::Compacting(done, all) => format!("{done} of {all} objects compacted"),
    }
}

/// What did not go as it should.
fn tell(report: &GcReport) {
    let vm = &report.vm;
    if report.busy {
        output::message(format!("{vm}: skipped, it is being written to"));
    }
    if report.no_space {
        output::message(format!("{vm}: compaction stopped, no space is left; run gc again when there is some"));
    }
    if !report.waiting_for.is_empty() {
        let vms = report.waiting_for.join(", ");
        output::message(format!("{vm}: more can go when the writers have ended of {vms}"));
    }
    for object in &report.damaged {
        output::message(format!("{object}: damaged, left alone; run snapfs check"));
    }
    if report.recipes_damaged > 0 {
        output::message(format!("{vm}: {} recipes are damaged; run snapfs check", report.recipes_damaged));
    }
}

/// What stays although it was forgotten, and why.
fn kept(report: &GcReport) -> String {
    if report.slots_condemned > 0 {
        return format!("; {} blocks are used by nobody and go with the next gc", report.slots_condemned);
    }
    let roots = |why: &str, count: u64| {
        (count > 0).then(|| format!("{why}: {count} forgotten snapshot{}", if count == 1 { "" } else { "s" }))
    };
    let when = format!(
        "within gc_grace, the first for {} more",
        clock::in_words(Duration::from_secs(report.young_for_seconds))
    );
    let stay =
        [roots("held", report.roots_held), roots("still open", report.roots_pinned), roots(&when, report.roots_young)];
    let stay: Vec<String> = stay.into_iter().flatten().collect();
    if stay.is_empty() { String::new() } else { format!("; {}", stay.join(", ")) }
}

fn as_text(report: &Report) -> String {
    let (would, note) = if report.dry_run { ("would be ", " (dry run: nothing was changed)") } else { ("", "") };
    let mut text = String::new();
    for done in &report.vms {
        if done.busy {
            continue;
        }
        if done.idle {
            text.push_str(&format!("{}: nothing to collect{}{note}\n", done.vm, kept(done)));
            continue;
        }
        text.push_str(&format!(
            "{}: {} {would}freed, {} objects {would}deleted, {} {would}compacted{}{note}\n",
            done.vm,
            output::size(done.bytes_reclaimed),
            done.objects_deleted,
            done.packs_compacted,
            kept(done)
        ));
    }
    if text.is_empty() {
        text.push_str(&format!("nothing to collect{note}\n"));
    }
    text
}
