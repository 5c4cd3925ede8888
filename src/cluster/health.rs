//! Whether a job goes on: the first error of any thread ends it, here and on all hosts.

use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::cluster::link::Link;
use crate::error::{Error, ErrorKind, Result};

/// How often, and after which wait, a host is told the reason again whose connection is busy.
const LAST_WORDS_TRIES: u32 = 100;
const LAST_WORDS_WAIT: Duration = Duration::from_millis(10);

/// Shared by all threads of a job.
#[derive(Default)]
pub struct Health {
    failed: AtomicBool,
    first: Mutex<Option<Error>>,
    links: Mutex<Vec<Link>>,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
}

impl std::fmt::Debug for Health {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Health").field("failed", &self.is_failed()).finish_non_exhaustive()
    }
}

impl Health {
    /// Of a job that has just begun.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds a connection that ends with the job.
    pub fn watch(&self, link: Link) {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).push(link);
    }

    /// Ends the job. Only the first error counts: those that follow are mostly its consequences.
    pub fn fail(&self, error: Error) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_some() {
            log::debug!("after the first error of the job: {error}");
            return;
        }
        let text = error.to_string();
        *first = Some(error);
        drop(first);
        self.failed.store(true, Ordering::SeqCst);
        // The others learn why, as far as they still listen; then every thread that waits for them wakes up.
        let links = std::mem::take(&mut *self.links.lock().unwrap_or_else(PoisonError::into_inner));
        let mut untold: Vec<_> = links.iter().collect();
        for _ in 0..LAST_WORDS_TRIES {
            untold.retain(|link| !link.abort(&text));
            if untold.is_empty() {
                break;
            }
            std::thread::sleep(LAST_WORDS_WAIT);
        }
        links.iter().for_each(|link| link.shut(Shutdown::Both));
    }

    /// Whether it has ended with an error.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Goes on, or tells why not.
    ///
    /// # Errors
    /// The first error.
    pub fn check(&self) -> Result<()> {
        if !self.is_failed() {
            return Ok(());
        }
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let unknown = || Error::new(ErrorKind::Unavailable, "the job has ended");
        Err(first.as_ref().map_or_else(unknown, Error::duplicate))
    }

    /// Counts bytes on the wire.
    pub(super) fn count(&self, sent: u64, received: u64) {
        self.bytes_sent.fetch_add(sent, Ordering::Relaxed);
        self.bytes_received.fetch_add(received, Ordering::Relaxed);
    }

    /// Bytes on the wire so far, sent and received.
    pub fn traffic(&self) -> (u64, u64) {
        (self.bytes_sent.load(Ordering::Relaxed), self.bytes_received.load(Ordering::Relaxed))
    }
}
