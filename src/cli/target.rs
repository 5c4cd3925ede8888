//! `snapfs target`: the targets of a store: adds, removes and lists them, and changes how many hold an object.

use std::sync::Arc;

use crate::check::moving::{
    MoveReport, TargetStatus, Wanted, add_target, remove_target, set_replicas, settle, target_list,
};
use crate::cli::store_arg::StoreArg;
use crate::cli::{DONE, Outcome, Stop, output};
use crate::clock::SystemClock;
use crate::error::Result;
use crate::store::targets::parse_url;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Actions:
  list                  the targets and their state: ok, away, read-only, full, leaving
  add URL               add a folder that is empty or not there yet, and move to it what belongs there
  remove URL [--lost]   move everything from it, and remove it; --lost when it never comes back
  set                   change how many targets hold an object: --vm-replicas, --common-replicas, --quorum
  settle                go on with what was cut off

URL is a path or file:///PATH.

Examples:
  snapfs target /srv/snapfs list
  snapfs target /srv/snapfs add /mnt/disk2/snapfs --vm-replicas 2
  snapfs target /srv/snapfs remove file:///mnt/disk1/snapfs
  snapfs target /srv/snapfs set --vm-replicas 3 --quorum 2";

/// Arguments of `target`.
#[derive(Debug, clap::Args)]
pub struct Target {
    #[command(flatten)]
    store: StoreArg,

    /// What to do
    #[arg(value_name = "ACTION", value_enum)]
    action: Action,

    /// The target to add or remove
    #[arg(value_name = "URL")]
    url: Option<String>,

    /// With add and set: how many targets hold a VM's objects
    #[arg(long, value_name = "N")]
    vm_replicas: Option<u16>,

    /// With add and set: how many targets hold a common pack
    #[arg(long, value_name = "N")]
    common_replicas: Option<u16>,

    /// With add and set: how many must have what is written before it counts; 0 for more than half
    #[arg(long, value_name = "N")]
    quorum: Option<u16>,

    /// With remove: the target never comes back, and what only it has is lost
    #[arg(long)]
    lost: bool,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Action {
    List,
    Add,
    Remove,
    Set,
    Settle,
}

#[derive(serde::Serialize)]
struct Listing {
    vm_replicas: u64,
    common_replicas: u64,
    quorum: u64,
    moving: bool,
    targets: Vec<TargetStatus>,
}

impl Target {
    /// Runs the command.
    ///
    /// # Errors
    /// A usage error; as the functions of [`crate::check::moving`].
    pub fn run(&self) -> Outcome {
        let needs_url = matches!(self.action, Action::Add | Action::Remove);
        let wrong = |what: &str| Err(Stop::usage(crate::error::invalid(format!("target: {what}"))));
        let wanted = Wanted { vm: self.vm_replicas, common: self.common_replicas, quorum: self.quorum };
        if needs_url != self.url.is_some() {
            return wrong(if needs_url { "URL is missing" } else { "URL is of no use here" });
        }
        if wanted != Wanted::default() && !matches!(self.action, Action::Add | Action::Set) {
            return wrong("numbers of replicas are for add and set");
        }
        if self.action == Action::Set && wanted == Wanted::default() {
            return wrong("nothing to set");
        }
        if self.lost && self.action != Action::Remove {
            return wrong("--lost is for remove");
        }
        let path = self.url.as_deref().map(parse_url).transpose().map_err(Stop::usage)?;
        let report = match (self.action, path) {
            (Action::List, _) => return self.list(),
            (Action::Add, Some(path)) => add_target(&self.store.store, &path, wanted, Arc::new(SystemClock::new()))?,
            (Action::Remove, Some(path)) => remove_target(&self.store.open()?, &path, self.lost)?,
            (Action::Set, _) => set_replicas(&self.store.open()?, wanted)?,
            _ => settle(&self.store.open()?)?,
        };
        self.tell(&report)?;
        Ok(DONE)
    }

    fn tell(&self, report: &MoveReport) -> std::result::Result<(), Stop> {
        if self.json {
            return output::json(report);
        }
        output::line(format!("all is where it belongs: {} copies made, {} deleted", report.copied, report.deleted))
    }

    fn list(&self) -> Outcome {
        let store = self.store.open()?;
        let targets = target_list(&store)?;
        let listing = match store.backend().replicated().map(|replicated| replicated.layout()) {
            Some(layout) => Listing {
                vm_replicas: layout.copies.vm as u64,
                common_replicas: layout.copies.common as u64,
                quorum: layout.copies.quorum_of(layout.copies.vm) as u64,
                moving: layout.is_moving,
                targets,
            },
            None => Listing { vm_replicas: 1, common_replicas: 1, quorum: 1, moving: false, targets },
        };
        if self.json {
            output::json(&listing)?;
        } else {
            output::print(&as_text(&listing)?)?;
        }
        Ok(DONE)
    }
}

fn as_text(listing: &Listing) -> Result<String> {
    if listing.targets.is_empty() {
        return Ok("the store is one folder and has no targets\n".to_owned());
    }
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), output::size);
    let row = |target: &TargetStatus| {
        vec![
            target.path.clone(),
            target.state.to_owned(),
            target.vms.to_string(),
            size(target.bytes_total),
            size(target.bytes_free),
            target.why.clone().unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = listing.targets.iter().map(row).collect();
    let mut text = output::table(&["TARGET", "STATE", "VMS", "SIZE", "FREE", ""], &[], &rows);
    let moving = if listing.moving { "; objects are moving, see settle" } else { "" };
    text.push_str(&format!(
        "{} copies of a VM's objects, {} of them must be there before they count; {} of common packs{moving}\n",
        listing.vm_replicas, listing.quorum, listing.common_replicas
    ));
    Ok(text)
}
