//! `snapfs attach`: a snapshot becomes a block device, for a guest or for whoever wants to look into it.
//!
//! ```text
//!   target ──────> the file in a mount ──> loop device, direct I/O ──> its path
//!      └─ --write ─> a clone of it ──┘
//!                                 record: owner, target, clone, device, file
//! ```
//!
//! Each attachment belongs to an owner. Attaching the same again for an owner finds it; attaching something else puts
//! that in its place, unless something could be lost by that. No step waits for ever, and none leaves a device or a
//! clone that no record names.

pub mod detach;
pub mod loop_device;
pub mod own_clone;
pub mod reap;
pub mod registry;
pub mod target;
pub mod tool;
pub mod xenstore;

use crate::cli::attach::loop_device::{Access, Binding, LoopDevice, Shows, boot};
use crate::cli::attach::own_clone::OwnClone;
use crate::cli::attach::registry::{Attachment, Held, Owner, Registry};
use crate::cli::attach::target::{Kind, Target};
use crate::cli::host_config::HostConfig;
use crate::cli::{DONE, Outcome, Stop, output};
use crate::error::{Error, ErrorKind, Result, busy};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs attach /mnt/snapfs/web01/monday.img
  snapfs attach web01/latest --owner rescue
  snapfs attach web01/latest --write --owner test
  snapfs attach /mnt/snapfs/.snapfs/clones/web01-now --write
  snapfs detach --owner rescue

A name without a path is looked for in the mount that the host's configuration has, \"mountpoint\" in
/etc/snapfs/snapfs.toml. With --owner, calling it again prints the same device, and calling it with another target
puts that in its place. With --write a snapshot stays as it is: what is written goes to a clone that is made for this
and dropped by detach, unless --keep is given. A clone that is named by its path stays in any case.";

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
pub struct Attach {
    /// The snapshot: its absolute path in a mount, or its name; NAME latest is the newest. Or the path of a clone
    #[arg(value_name = "TARGET")]
    target: String,

    /// For whom: one word, for detach and for calling it again
    #[arg(long, value_name = "KEY")]
    owner: Option<String>,

    /// A device that can be written to: a clone of the snapshot, or the clone that is named
    #[arg(long)]
    write: bool,

    /// Keep the clone when it is detached
    #[arg(long, requires = "write")]
    keep: bool,

    /// Begin anew: first detach what the owner has
    #[arg(long)]
    fresh: bool,
}

impl Attach {
    /// Runs the command.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a target that is no snapshot or lies in no mount; `Busy` when another process works
    /// for this owner, the owner has something attached in another way, or somebody else has the clone attached;
    /// `ReadOnly` where nothing can be written; `Denied` for all but root; `Unavailable`.
    pub fn run(&self) -> Outcome {
        let owner = self.owner.as_deref().map(Owner::new).transpose().map_err(Stop::usage)?;
        let owner = owner.map_or_else(Owner::random, Ok)?;
        let registry = Registry::open()?;
        let held = registry.lock(&owner)?;
        let device = self.attach(&registry, &owner, &held)?;
        output::line(device.path().display().to_string())?;
        Ok(DONE)
    }

    fn attach(&self, registry: &Registry, owner: &Owner, held: &Held<'_>) -> Result<LoopDevice> {
        let mut clone = None;
        if let Some(old) = held.get()? {
            let shows = old.shows()?;
            let is_same = old.target == self.target && old.writable == self.write;
            if self.fresh {
                release(held, &old)?;
            } else if is_same && shows == Shows::File && old.binding.as_ref().map_or(Ok(false), Binding::answers)? {
                return self.again(held, old);
            } else if is_same && old.clone.as_ref().is_some_and(OwnClone::is_there) {
                // The mount's daemon has died, or the host has: what was written is still there.
                old.binding.as_ref().map_or(Ok(()), Binding::free)?;
                clone = old.clone.map(|clone| OwnClone { keep: clone.keep || self.keep, ..clone });
            } else if !is_same && (old.writable || self.write) && (shows != Shows::Other || old.clone.is_some()) {
                let how = if old.writable { "for writing" } else { "read-only" };
                let what = format!("{} is attached {how}, {}: detach it first", old.target, old.device());
                return Err(busy(format!("owner {owner}: {what}")));
            } else {
                release(held, &old)?;
            }
        }
        let begun = Attachment {
            owner: owner.clone(),
            target: self.target.clone(),
            writable: self.write,
            clone,
            binding: None,
        };
        let had_clone = begun.clone.is_some();
        let bound = self.begin(registry, held, begun);
        // What was written before stays, and so does the record that knows of it.
        if bound.is_err()
            && !had_clone
            && let Some(left) = held.get()?
        {
            // It names a clone that nobody has seen, and a device that is not in use, or not for us.
            let dropped = left.clone.as_ref().map_or(Ok(()), OwnClone::remove).and_then(|()| held.delete());
            if let Err(e) = dropped {
                log::warn!("{owner}: left for `snapfs reap`: {e}");
            }
        }
        bound
    }

    /// What is attached already. That it is to be kept can be said later.
    fn again(&self, held: &Held<'_>, mut old: Attachment) -> Result<LoopDevice> {
        if self.keep
            && let Some(clone) = old.clone.as_mut().filter(|clone| !clone.keep)
        {
            clone.keep = true;
            held.put(&old)?;
        }
        let device = old.binding.map(|binding| binding.device);
        device.ok_or_else(|| Error::new(ErrorKind::Unavailable, "the record has no device"))
    }

    fn begin(&self, registry: &Registry, held: &Held<'_>, mut attachment: Attachment) -> Result<LoopDevice> {
        let mut target = match &attachment.clone {
            Some(clone) => Target::at_path(&clone.path)?,
            None => Target::find(&self.target, &HostConfig::read()?)?,
        };
        if self.write
            && let Kind::Snapshot(snapshot) = &target.kind
        {
            let made = OwnClone::make(&target, snapshot, self.keep, |clone| {
                held.put(&Attachment { clone: Some(clone.clone()), ..attachment.clone() })
            })?;
            target = Target::at_path(&made.path)?;
            attachment.clone = Some(made);
        }
        let _alone = match target.kind {
            Kind::Clone => Some(self.alone(registry, &target, &attachment.owner)?),
            Kind::Snapshot(_) => None,
        };
        let boot = boot()?;
        let record = |device: &LoopDevice| {
            let (device, boot) = (device.clone(), boot.clone());
            let binding = Binding { device, path: target.path.clone(), file: target.file.clone(), boot };
            Attachment { binding: Some(binding), ..attachment.clone() }
        };
        let access = if self.write { Access::ReadWrite } else { Access::ReadOnly };
        LoopDevice::bind(
            &target.path,
            access,
            |device| held.put(&record(device)),
            |plain| if self.write { target.made_writable(plain) } else { plain },
        )
    }

    /// Makes sure that nobody else has a clone attached when one of the two writes: a filesystem on it would be
    /// destroyed. While the result lives, nobody comes to have it.
    fn alone<'a>(&self, registry: &'a Registry, target: &Target, owner: &Owner) -> Result<Held<'a>> {
        let held = registry.lock(&Owner::new(&format!("file:{}:{}", target.file.device, target.file.inode))?)?;
        for other in registry.owners()?.into_iter().filter(|other| other != owner) {
            let Some(of) = registry.get(&other)? else { continue };
            let Some(binding) = of.binding.as_ref().filter(|binding| binding.file == target.file) else { continue };
            if (of.writable || self.write) && binding.shows()? == Shows::File {
                let what = format!("{}: is attached for {other}, {}", target.path.display(), of.device());
                return Err(busy(what));
            }
        }
        Ok(held)
    }
}

/// Frees what an attachment has, drops the clone that was made for it unless that is to be kept, and forgets it last:
/// what is cut off in between is taken up again.
///
/// # Errors
/// `Busy` while the device is in use; `Denied`, `Unavailable`.
pub fn release(held: &Held<'_>, attachment: &Attachment) -> Result<()> {
    attachment.binding.as_ref().map_or(Ok(()), Binding::free)?;
    if let Some(clone) = attachment.clone.as_ref().filter(|clone| !clone.keep) {
        clone.remove()?;
    }
    held.delete()
}

/// Who has a file of a filesystem attached, by the filesystem's device as `major:minor`: a writable device on a mount
/// with `ro` is nothing that the kernel would call busy. As far as we may know.
pub fn user_of(filesystem: &str) -> Option<String> {
    let registry = Registry::existing()?;
    registry.owners().ok()?.into_iter().find_map(|owner| {
        let attachment = registry.get(&owner).ok()??;
        let binding = attachment.binding.as_ref().filter(|binding| binding.file.device == filesystem)?;
        let is_shown = binding.shows().is_ok_and(|shows| shows == Shows::File);
        is_shown.then(|| format!("{} is attached for {owner}", attachment.device()))
    })
}
