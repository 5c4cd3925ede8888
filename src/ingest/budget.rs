//! How many segments may wait in memory, of all drafts of a process together (I8).

use std::sync::{Mutex, PoisonError};

/// Counts segments of 2 MiB.
#[derive(Debug)]
pub struct Budget {
    free: Mutex<i64>,
}

impl Budget {
    /// A budget of `segments`.
    pub fn new(segments: usize) -> Self {
        Self { free: Mutex::new(i64::try_from(segments).unwrap_or(i64::MAX)) }
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

    /// Whether none is left.
    pub fn is_spent(&self) -> bool {
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) <= 0
    }
}
