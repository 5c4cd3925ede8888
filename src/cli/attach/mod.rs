//! `snapfs attach`: a snapshot becomes a block device, for a guest or for whoever wants to look into it.
//!
//! ```text
//!   target ──> the file in a mount ──> loop device, direct I/O ──> its path
//!                                 record: owner, target, device, file
//! ```
//!
//! Each attachment belongs to an owner. Attaching the same again for an owner finds it; attaching something else puts
//! that in its place. No step waits for ever, and none leaves a device that no record names.

pub mod detach;
pub mod loop_device;
pub mod reap;
pub mod registry;
pub mod target;
pub mod tool;
pub mod xenstore;

use crate::cli::attach::loop_device::{Access, LoopDevice};
use crate::cli::attach::registry::{Attachment, Held, Owner, Registry};
use crate::cli::attach::target::Target;
use crate::cli::host_config::HostConfig;
use crate::cli::{DONE, Outcome, Stop, output};
use crate::error::Result;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs attach /mnt/snapfs/web01/monday.img
  snapfs attach web01/latest --owner rescue
  snapfs detach --owner rescue

A name without a path is looked for in the mount that the host's configuration has, \"mountpoint\" in
/etc/snapfs/snapfs.toml. With --owner, calling it again prints the same device, and calling it with another target
puts that in its place.";

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
pub struct Attach {
    /// The snapshot: its absolute path in a mount, or its name; NAME latest is the newest
    #[arg(value_name = "TARGET")]
    target: String,

    /// For whom: one word, for detach and for calling it again
    #[arg(long, value_name = "KEY")]
    owner: Option<String>,
}

impl Attach {
    /// Runs the command.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a target that is no snapshot or lies in no mount; `Busy` when another process works
    /// for this owner, or what the owner had before is in use; `Denied` for all but root; `Unavailable`.
    pub fn run(&self) -> Outcome {
        let owner = self.owner.as_deref().map(Owner::new).transpose().map_err(Stop::usage)?;
        let owner = owner.map_or_else(Owner::random, Ok)?;
        let registry = Registry::open()?;
        let held = registry.lock(&owner)?;
        let device = self.attach(&owner, &held)?;
        output::line(device.path().display().to_string())?;
        Ok(DONE)
    }

    fn attach(&self, owner: &Owner, held: &Held<'_>) -> Result<LoopDevice> {
        if let Some(old) = held.get()? {
            if old.target == self.target && old.device.shows(&old.file)? {
                return Ok(old.device);
            }
            release(held, &old)?;
        }
        let target = Target::find(&self.target, &HostConfig::read()?)?;
        let record = |device: &LoopDevice| Attachment {
            owner: owner.clone(),
            target: self.target.clone(),
            writable: false,
            device: device.clone(),
            path: target.path.clone(),
            file: target.file.clone(),
        };
        let bound = LoopDevice::bind(&target.path, Access::ReadOnly, |device| held.put(&record(device)), |plain| plain);
        if bound.is_err() {
            // It names a device that is not in use, or not for us.
            held.delete()?;
        }
        bound
    }
}

/// Frees what an attachment has, and forgets it last: what is cut off in between is taken up again.
///
/// # Errors
/// `Busy` while the device is in use; `Denied`, `Unavailable`.
pub fn release(held: &Held<'_>, attachment: &Attachment) -> Result<()> {
    attachment.device.free(&attachment.file)?;
    held.delete()
}
