//! `snapfs reap`: frees what is attached for nobody any more.
//!
//! A guest whose toolstack was killed never had its script called again; a device may be freed by hand. What belongs to
//! an owner of whom nothing is known stays.

use crate::cli::attach::loop_device::{Binding, Shows};
use crate::cli::attach::registry::{Attachment, Owner, Registry};
use crate::cli::attach::{release, xenstore};
use crate::cli::{DONE, FAILED, Outcome, output};
use crate::error::Result;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs reap
  snapfs reap --dry-run

It frees what was attached for disks of Xen guests that are gone from the xenstore, and forgets devices that are not
there any more. Clones that were made for these are dropped, unless they are to be kept. It is safe at any time.";

/// Arguments of `reap`.
#[derive(Debug, clap::Args)]
pub struct Reap {
    /// Only tell what would be freed
    #[arg(long)]
    dry_run: bool,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// What became of one attachment.
#[derive(Debug, serde::Serialize)]
struct Row {
    owner: Owner,
    target: String,
    device: String,
    /// The clone that goes with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    clone: Option<String>,
    /// Why it is freed.
    reason: &'static str,
    /// Why it could not be.
    #[serde(skip_serializing_if = "Option::is_none")]
    failed: Option<String>,
}

impl Reap {
    /// Runs the command. The exit code is 1 when something could not be freed, or not be judged.
    ///
    /// # Errors
    /// `Denied` for all but root, `Corrupt`, `Unavailable`.
    pub fn run(&self) -> Outcome {
        let registry = Registry::open()?;
        let mut code = DONE;
        let mut rows = Vec::new();
        for owner in registry.owners()? {
            match self.look_at(&registry, &owner) {
                Ok(None) => {}
                Ok(Some(row)) => {
                    if row.failed.is_some() {
                        code = FAILED;
                    }
                    rows.push(row);
                }
                Err(error) => {
                    code = FAILED;
                    output::message(error.within(owner));
                }
            }
        }
        if !self.dry_run {
            registry.sweep()?;
        }
        if self.json {
            output::json(&rows)?;
        } else {
            for row in &rows {
                let verb = if self.dry_run { "would be freed" } else { "freed" };
                let clone = row.clone.as_ref().map_or_else(String::new, |name| format!(", clone {name}"));
                let what = format!("{} ({}, {}{clone})", row.target, row.device, row.owner);
                match &row.failed {
                    None => output::line(format!("{what}: {verb}, {}", row.reason))?,
                    Some(why) => output::message(format!("{what}: {why}")),
                }
            }
        }
        Ok(code)
    }

    fn look_at(&self, registry: &Registry, owner: &Owner) -> Result<Option<Row>> {
        let held = registry.lock(owner)?;
        let Some(attachment) = held.get()? else { return Ok(None) };
        let Some(reason) = why_gone(&attachment)? else { return Ok(None) };
        let freed = if self.dry_run { Ok(()) } else { release(&held, &attachment) };
        let (device, clone) = (attachment.device(), attachment.clone.filter(|clone| !clone.keep));
        Ok(Some(Row {
            owner: attachment.owner,
            target: attachment.target,
            device,
            clone: clone.map(|clone| clone.name),
            reason,
            failed: freed.err().map(|e| e.to_string()),
        }))
    }
}

/// Why nobody needs an attachment any more; `None` while somebody may.
fn why_gone(attachment: &Attachment) -> Result<Option<&'static str>> {
    let backend = xenstore::backend_of(&attachment.owner);
    // No guest outlives the host's boot, and another may have its number now.
    let is_of_this_boot = attachment.binding.as_ref().map_or(Ok(true), Binding::is_of_this_boot)?;
    if backend.is_some() && !is_of_this_boot {
        return Ok(Some("its guest is gone"));
    }
    let is_free = attachment.shows()? == Shows::Other;
    match backend {
        Some(backend) if !xenstore::is_there(backend)? => Ok(Some("its guest is gone")),
        // What a guest has written stays as long as the guest.
        Some(_) if attachment.clone.is_some() => Ok(None),
        _ if is_free && attachment.binding.is_none() => Ok(Some("attaching it was cut off")),
        _ if is_free => Ok(Some("its device is gone")),
        _ => Ok(None),
    }
}
