//! `snapfs detach`: frees a device that `snapfs attach` has made.

use std::path::PathBuf;

use crate::cli::attach::loop_device::LoopDevice;
use crate::cli::attach::registry::{Owner, Registry};
use crate::cli::attach::release;
use crate::cli::{DONE, Outcome, Stop};
use crate::error::{Result, invalid};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs detach /dev/loop3
  snapfs detach --owner rescue

It is done when nothing is attached, too. A device that is in use stays (exit code 5) and is freed by the kernel when its
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
            detach_owner(&registry, &owner)?;
        } else if let Some(path) = &self.device {
            let device = LoopDevice::parse(path).map_err(Stop::usage)?;
            detach_device(&registry, &device)?;
        }
        Ok(DONE)
    }
}

fn detach_owner(registry: &Registry, owner: &Owner) -> Result<()> {
    let held = registry.lock(owner)?;
    held.get()?.map_or(Ok(()), |attachment| release(&held, &attachment))
}

fn detach_device(registry: &Registry, device: &LoopDevice) -> Result<()> {
    let mut is_ours = false;
    for owner in registry.owners()? {
        if registry.get(&owner)?.is_none_or(|attachment| attachment.device != *device) {
            continue;
        }
        let held = registry.lock(&owner)?;
        // Only now nobody can change it.
        if let Some(attachment) = held.get()?.filter(|attachment| attachment.device == *device) {
            // A record whose device has come to show another file is of something long gone.
            is_ours |= attachment.device.shows(&attachment.file)?;
            release(&held, &attachment)?;
        }
    }
    if !is_ours && device.is_bound() {
        return Err(invalid(format!("{}: was not made by snapfs attach", device.path().display())));
    }
    Ok(())
}
