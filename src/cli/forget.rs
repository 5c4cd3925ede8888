//! `snapfs forget`: snapshots go from the log at once, by name or by rules; `gc` frees their bytes.

use std::ffi::OsString;

use jiff::tz::TimeZone;

use crate::cli::store_arg::{StoreArg, snapshot_name, vm_name};
use crate::cli::{DONE, Outcome, Stop, exit_code, output};
use crate::collect::forget::{Stays, Verdict, forget, forget_by_rules, resolve};
use crate::collect::keep::{Rule, Rules};
use crate::error::{ErrorKind, invalid};
use crate::name::VmName;
use crate::store::Store;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
With rules the arguments are VMs, every VM when none is named. Each folder (a VM, or a disk of it) is judged by itself:
a rule keeps the newest snapshot of each of the newest N hours, days, weeks, months or years that have any, in the time
zone of this machine, whatever time it is now. What no rule keeps is forgotten; drafts, protected snapshots and those
younger than the store's min_age stay.

Examples:
  snapfs forget /srv/snapfs web01/monday.img
  snapfs forget /srv/snapfs web01/monday.img web01/tuesday.img --dry-run
  snapfs forget /srv/snapfs --keep-last 3 --keep-daily 7 --keep-weekly 5 --keep-monthly 12 --dry-run
  snapfs forget /srv/snapfs web01 db02 --keep-daily 30";

/// Arguments of `forget`.
#[derive(Debug, clap::Args)]
pub struct Forget {
    #[command(flatten)]
    store: StoreArg,

    /// Snapshots to forget; with rules: VMs, every VM when none is named
    #[arg(value_name = "NAME", required_unless_present = "rules")]
    names: Vec<OsString>,

    #[command(flatten)]
    rules: Option<KeepRules>,

    /// Say what would be forgotten, and change nothing
    #[arg(long)]
    dry_run: bool,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// The rules of `forget`.
#[derive(Debug, clap::Args)]
#[group(id = "rules", multiple = true)]
struct KeepRules {
    /// Keep the newest N snapshots
    #[arg(long, value_name = "N")]
    keep_last: Option<u32>,

    /// Keep the newest of each of N hours
    #[arg(long, value_name = "N")]
    keep_hourly: Option<u32>,

    /// Keep the newest of each of N days
    #[arg(long, value_name = "N")]
    keep_daily: Option<u32>,

    /// Keep the newest of each of N weeks, which begin on Monday
    #[arg(long, value_name = "N")]
    keep_weekly: Option<u32>,

    /// Keep the newest of each of N months
    #[arg(long, value_name = "N")]
    keep_monthly: Option<u32>,

    /// Keep the newest of each of N years
    #[arg(long, value_name = "N")]
    keep_yearly: Option<u32>,
}

impl KeepRules {
    fn rules(&self) -> Result<Rules, Stop> {
        let rules = Rules {
            last: self.keep_last.unwrap_or(0),
            hourly: self.keep_hourly.unwrap_or(0),
            daily: self.keep_daily.unwrap_or(0),
            weekly: self.keep_weekly.unwrap_or(0),
            monthly: self.keep_monthly.unwrap_or(0),
            yearly: self.keep_yearly.unwrap_or(0),
        };
        if rules.is_empty() {
            return Err(Stop::usage(invalid("rules that keep nothing: name the snapshots to forget all of them")));
        }
        Ok(rules)
    }
}

#[derive(serde::Serialize)]
struct Report {
    forgotten: Vec<String>,
    dry_run: bool,
    /// By rules only.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<Vec<Kept>>,
}

#[derive(serde::Serialize)]
struct Kept {
    name: String,
    received: String,
    rules: Vec<Rule>,
    /// Why it stays although no rule keeps it.
    stays: Option<String>,
}

impl Forget {
    /// Runs the command.
    ///
    /// # Errors
    /// A usage error for rules that keep nothing; as [`forget`] and, for VMs that were named, [`forget_by_rules`];
    /// without names other VMs' errors are told and the rest is done.
    pub fn run(&self) -> Outcome {
        match &self.rules {
            Some(rules) => self.by_rules(&rules.rules()?),
            None => self.by_name(),
        }
    }

    fn by_name(&self) -> Outcome {
        let store = self.store.open()?;
        let names = self.names.iter().map(|name| snapshot_name(name)).collect::<Result<Vec<_>, Stop>>()?;
        let forgotten: Vec<String> = if self.dry_run {
            let found = resolve(&store, &names)?;
            found.into_values().flatten().map(|(name, _)| name.to_string()).collect()
        } else {
            forget(&store, &names)?.into_iter().map(|outcome| outcome.name).collect()
        };
        if self.json {
            output::json(&Report { forgotten, dry_run: self.dry_run, kept: None })?;
        } else {
            let word = if self.dry_run { "would forget" } else { "forgot" };
            let lines: String = forgotten.iter().map(|name| format!("{word} {name}\n")).collect();
            output::print(&lines)?;
        }
        Ok(DONE)
    }

    fn by_rules(&self, rules: &Rules) -> Outcome {
        let vms = self.names.iter().map(|name| vm_name(name)).collect::<Result<Vec<_>, Stop>>()?;
        let store = self.store.open()?;
        let zone = TimeZone::try_system().unwrap_or_else(|e| {
            log::warn!("time zone of this machine: {e}; days are those of UTC");
            TimeZone::UTC
        });
        let (verdicts, code) = self.judge(&store, &vms, rules, &zone)?;
        if self.json {
            let (gone, kept): (Vec<_>, Vec<_>) = verdicts.into_iter().partition(Verdict::is_forgotten);
            let kept = kept.into_iter().map(|v| Kept {
                received: output::time(v.received),
                stays: v.stays.as_ref().map(in_words),
                name: v.name,
                rules: v.rules,
            });
            let forgotten = gone.into_iter().map(|v| v.name).collect();
            output::json(&Report { forgotten, dry_run: self.dry_run, kept: Some(kept.collect()) })?;
        } else {
            output::print(&self.as_text(&verdicts, &zone))?;
        }
        Ok(code)
    }

    fn judge(&self, store: &Store, vms: &[VmName], rules: &Rules, zone: &TimeZone) -> Result<(Vec<Verdict>, u8), Stop> {
        let mut verdicts = Vec::new();
        let mut code = DONE;
        let all = if vms.is_empty() { store.vm_names()? } else { Vec::new() };
        for vm in vms.iter().chain(&all) {
            match forget_by_rules(store, vm, rules, zone, self.dry_run) {
                Ok(more) => verdicts.extend(more),
                Err(e) if !vms.is_empty() => return Err(e.into()),
                // A VM that was deleted leaves its log behind for a while.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => {
                    output::message(&e);
                    code = code.max(exit_code(e.kind()));
                }
            }
        }
        Ok((verdicts, code))
    }

    fn as_text(&self, verdicts: &[Verdict], zone: &TimeZone) -> String {
        let forgotten = if self.dry_run { "would be forgotten" } else { "forgotten" };
        let rows: Vec<Vec<String>> = verdicts
            .iter()
            .map(|verdict| {
                let words: Vec<&str> = verdict.rules.iter().map(|rule| rule.word()).collect();
                let why = match &verdict.stays {
                    Some(stays) => format!("kept: {}", in_words(stays)),
                    None if words.is_empty() => forgotten.to_owned(),
                    None => format!("kept: {}", words.join(", ")),
                };
                vec![verdict.name.clone(), output::local_time(verdict.received, zone), why]
            })
            .collect();
        let gone = verdicts.iter().filter(|v| v.is_forgotten()).count();
        let table = output::table(&["NAME", "CREATED", "VERDICT"], &[1, 2], &rows);
        format!("{table}{} kept, {gone} {forgotten}\n", verdicts.len() - gone)
    }
}

fn in_words(stays: &Stays) -> String {
    match stays {
        Stays::Protected => "protected".to_owned(),
        Stays::Young(why) => why.clone(),
    }
}
