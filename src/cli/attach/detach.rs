//! `snapfs detach`: frees a device that `snapfs attach` has made.

use std::path::PathBuf;

use crate::cli::attach::loop_device::{LoopDevice, Shows};
use crate::cli::attach::registry::{Attachment, Held, Owner, Registry};
use crate::cli::attach::release;
use crate::cli::{DONE, Outcome, Stop};
use crate::error::{Result, invalid};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs detach /dev/loop3
  snapfs detach --owner rescue
  snapfs detach --owner test --keep

The clone that attach has made for it is dropped, with all that was written to it, unless --keep is given here or was
given there; `snapfs clones` lists what is kept. It is done when nothing is attached, too. A device that is in use stays (exit code 5) and is freed by the kernel when its
last user closes it.";

/// Arguments of `detach`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["device", "owner"])))]
pub struct Detach {
    /// The device that attach has printed
    #[arg(value_name = "DEVICE")]
    device: Option<PathBuf>,

    /// For whom it was attached
    #[arg(long, value_name = "KEY")]
    owner: Option<String>,

    /// Keep the clone that was made for it
    #[arg(long)]
    keep: bool,
}

impl Detach {
    /// Runs the command.
    ///
    /// # Errors
    /// `Busy` while the device is in use; `Invalid` for a device that something else has made; `Denied`,
    /// `Unavailable`.
    pub fn run(&self) -> Outcome {
        let registry = Registry::open()?;
        if let Some(key) = &self.owner {
            let owner = Owner::new(key).map_err(Stop::usage)?;
            self.detach_owner(&registry, &owner)?;
        } else if let Some(path) = &self.device {
            let device = LoopDevice::parse(path).map_err(Stop::usage)?;
            self.detach_device(&registry, &device)?;
        }
        Ok(DONE)
    }

    fn detach_owner(&self, registry: &Registry, owner: &Owner) -> Result<()> {
        let held = registry.lock(owner)?;
        held.get()?.map_or(Ok(()), |attachment| self.release(&held, attachment))
    }

    fn detach_device(&self, registry: &Registry, device: &LoopDevice) -> Result<()> {
        let has_it = |attachment: &Attachment| attachment.binding.as_ref().is_some_and(|b| b.device == *device);
        let mut is_ours = false;
        for owner in registry.owners()? {
            if !registry.get(&owner)?.is_some_and(|attachment| has_it(&attachment)) {
                continue;
            }
            let held = registry.lock(&owner)?;
            // Only now nobody can change it. A record whose device has come to show another file is of something long
            // gone. With a clone it is left to reap: it cannot be what is meant.
            if let Some(attachment) = held.get()?.filter(has_it) {
                let is_shown = attachment.shows()? != Shows::Other;
                if is_shown || attachment.clone.is_none() || !device.is_bound() {
                    self.release(&held, attachment)?;
                }
                is_ours |= is_shown;
            }
        }
        if !is_ours && device.is_bound() {
            return Err(invalid(format!("{}: was not made by snapfs attach", device.path().display())));
        }
        Ok(())
    }

    fn release(&self, held: &Held<'_>, mut attachment: Attachment) -> Result<()> {
        if let Some(clone) = attachment.clone.as_mut().filter(|_| self.keep) {
            clone.keep = true;
            // Also when it is cut off now.
            held.put(&attachment)?;
        }
        release(held, &attachment)
    }
}
