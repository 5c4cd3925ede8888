//! How many segments may wait in memory, of all drafts of a process together (I8), and their buffers.

use std::sync::{Mutex, PoisonError};

use crate::limits::SEGMENT_BYTES;

/// Buffers that are kept for the next segment: fresh memory costs more than what is done with it.
const BUFFERS_KEPT: usize = 16;

/// Counts segments of 2 MiB, and keeps buffers of that size.
#[derive(Debug)]
pub struct Budget {
    free: Mutex<i64>,
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Budget {
    /// A budget of `segments`.
    pub fn new(segments: usize) -> Self {
        Self { free: Mutex::new(i64::try_from(segments).unwrap_or(i64::MAX)), buffers: Mutex::default() }
    }

    /// Takes one if there is one.
    pub fn try_take(&self) -> bool {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = *free > 0;
        if is_free {
            *free -= 1;
        }
        is_free
    }

    /// Takes one that is not there: every draft must have one to go on at all.
    pub fn overdraw(&self) {
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
    }

    /// Gives one back.
    pub fn give(&self) {
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    /// A buffer of 2 MiB with any bytes in it.
    pub fn buffer(&self) -> Vec<u8> {
        let kept = self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(|| vec![0; SEGMENT_BYTES])
    }

    /// Keeps a buffer for the next segment.
    pub fn recycle(&self, buffer: Vec<u8>) {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.len() < BUFFERS_KEPT && buffer.len() == SEGMENT_BYTES {
            buffers.push(buffer);
        }
    }
}
