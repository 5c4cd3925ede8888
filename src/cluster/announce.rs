//! What host 0 has decided and all others must know before they can work on a job: which job it is.

use std::sync::{Arc, Mutex, PoisonError};

use crate::cluster::detect::{Feed, Holder, Progress, Setup, Task, run};
use crate::cluster::hosts::Hosts;
use crate::cluster::job::Job;
use crate::cluster::record::Member;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Fingerprint;

/// Bytes of a row: member, what is told.
const ROW_BYTES: usize = 4 + 32;

/// One member a host; host 0 tells.
struct Announcement {
    hosts: u32,
    told: Option<Fingerprint>,
    heard: Mutex<Option<Fingerprint>>,
}

/// Tells what host 0 says to all hosts, each of which calls this; only host 0 has something to `tell`. `gate` is a job
/// that all can open without knowing more than the store; nothing is kept in it.
///
/// # Errors
/// As [`run`].
pub fn announce(setup: &Setup, gate: &Job, tell: Option<Fingerprint>) -> Result<Fingerprint> {
    let hosts = setup.hosts.as_ref().map_or(1, Hosts::count);
    let tell_all = setup.progress.clone();
    let progress = Arc::new(move |now| {
        if let Progress::Waiting(_) = &now {
            tell_all(now);
        }
    });
    // A result would still be there the next time.
    let setup = Setup { backend: None, progress, ..setup.clone() };
    let hosts = u32::try_from(hosts).unwrap_or(u32::MAX);
    let task = Arc::new(Announcement { hosts, told: tell, heard: Mutex::default() });
    run(&setup, gate, task.clone())?;
    let heard = *task.heard.lock().unwrap_or_else(PoisonError::into_inner);
    heard.ok_or_else(|| Error::new(ErrorKind::Unavailable, "host 0 told nothing: is it started with --index 0?"))
}

impl Task for Announcement {
    fn members(&self) -> u32 {
        self.hosts
    }

    fn host_of(&self, member: Member, _: usize) -> usize {
        member.0 as usize
    }

    fn group_of(&self, _: Member) -> u32 {
        0
    }

    fn feed(&self, member: Member, feed: &mut Feed<'_, '_>) -> Result<()> {
        match self.told {
            Some(told) if member.0 == 0 => feed.give(told, 0),
            _ => Ok(()),
        }
    }

    fn row_bytes(&self) -> usize {
        ROW_BYTES
    }

    fn judge(&self, print: &Fingerprint, _: &[Holder], rows: &mut Vec<u8>) {
        for host in 0..self.hosts {
            rows.extend_from_slice(&host.to_le_bytes());
            rows.extend_from_slice(&print.0);
        }
    }

    fn repeats(&self, _: Member, _: u64, _: u64, _: &mut Vec<u8>) {}

    fn member_of(&self, row: &[u8]) -> Option<Member> {
        row.first_chunk().map(|bytes| Member(u32::from_le_bytes(*bytes)))
    }

    fn verdict(&self, _: Member, row: &[u8]) -> Result<()> {
        let told = row.get(4..).and_then(|told| told.first_chunk()).map(|told| Fingerprint(*told));
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = told;
        Ok(())
    }
}
