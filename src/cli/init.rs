//! `snapfs init`: makes a store.

use std::path::Path;

use crate::cli::store_arg::StoreArg;
use crate::cli::{DONE, Outcome, Stop, output};
use crate::clock::SystemClock;
use crate::error::Result;
use crate::store::Store;
use crate::store::targets::{NewTargets, parse_url};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs init /srv/snapfs
  snapfs init /srv/snapfs --target /mnt/disk1/snapfs --target /mnt/disk2/snapfs
  snapfs init /srv/snapfs --target /mnt/a --target /mnt/b --target /mnt/c --vm-replicas 2 --common-replicas 3";

/// Arguments of `init`.
#[derive(Debug, clap::Args)]
pub struct Init {
    #[command(flatten)]
    store: StoreArg,

    /// A folder that holds objects, on another disk for example: a path or file:///PATH; may be given several times.
    /// Without any, the store's own folder holds all
    #[arg(long = "target", value_name = "URL")]
    targets: Vec<String>,

    /// How many targets hold a VM's objects [default: 2]
    #[arg(long, value_name = "N")]
    vm_replicas: Option<u16>,

    /// How many targets hold a common pack [default: 3]
    #[arg(long, value_name = "N")]
    common_replicas: Option<u16>,

    /// How many targets must have what is written before it counts [default: more than half of the replicas]
    #[arg(long, value_name = "N")]
    quorum: Option<u16>,
}

impl Init {
    /// Runs the command.
    ///
    /// # Errors
    /// A usage error for numbers that do not fit; as [`Store::init_with`].
    pub fn run(&self) -> Outcome {
        let path: &Path = &self.store.store;
        let new = NewTargets {
            paths: self.targets.iter().map(|url| parse_url(url)).collect::<Result<_>>().map_err(Stop::usage)?,
            vm_replicas: self.vm_replicas,
            common_replicas: self.common_replicas,
            quorum: self.quorum,
        };
        new.replicas().map_err(Stop::usage)?;
        Store::init_with(path, &new, &SystemClock::new())?;
        output::line(format!("made a store in {}", path.display()))?;
        Ok(DONE)
    }
}
