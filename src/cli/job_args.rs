//! Arguments of commands that several hosts can work on together.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::cluster::hosts::Hosts;
use crate::error::{Error, ErrorKind, Result, invalid};
use crate::limits::JOB_BYTES_MAX;

/// How a job is run.
#[derive(Debug, clap::Args)]
pub struct JobArgs {
    /// All hosts that work on the job: ADDRESS:PORT a line
    #[arg(long, value_name = "FILE", requires = "index")]
    hosts: Option<PathBuf>,

    /// Which of them this is, from 0
    #[arg(long, value_name = "N", requires = "hosts")]
    index: Option<usize>,

    /// Threads that read and detect, the same on all hosts
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub threads: usize,

    /// Where scratch files are made, on a disk of this host [default: derived/spill in the store]
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
}

impl JobArgs {
    /// Whether there are other hosts.
    pub fn has_hosts(&self) -> bool {
        self.hosts.is_some()
    }

    /// The hosts, if there are others.
    ///
    /// # Errors
    /// `NotFound` without the file; as [`Hosts::parse`].
    pub fn hosts(&self) -> Result<Option<Hosts>> {
        let (Some(file), Some(index)) = (&self.hosts, self.index) else { return Ok(None) };
        let text = String::from_utf8(read("hosts file", file)?);
        let text = text.map_err(|e| invalid("hosts file: is not UTF-8 text").because(e))?;
        Ok(Some(Hosts::parse(&text, index)?))
    }
}

/// Reads a file that a job is told of.
///
/// # Errors
/// `TooLarge`, or as the system has it, naming the file.
pub fn read(what: &str, path: &Path) -> Result<Vec<u8>> {
    let about = |e| Error::io(format!("{what} {}", path.display()), e);
    let mut text = Vec::new();
    File::open(path).and_then(|file| file.take(JOB_BYTES_MAX / 2 + 1).read_to_end(&mut text)).map_err(about)?;
    if text.len() as u64 > JOB_BYTES_MAX / 2 {
        let message = format!("{what} {}: has over {} bytes", path.display(), JOB_BYTES_MAX / 2);
        return Err(Error::new(ErrorKind::TooLarge, message));
    }
    Ok(text)
}
