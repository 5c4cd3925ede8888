//! The invariants as a program: reads everything that a store should have, and says what is missing or wrong.
//! Changes nothing (but for [`rebuild()`] and, when asked for, [`copies`], [`mend`] and the marks of [`losses`]), needs no lock, and runs beside writers and collection.
//!
//! ```text
//!   common:   log ── objects, popular index
//!   each VM:  log ── objects: length, header, index, slot table, frames      (I1, I3, I4)
//!    holds ────┴──── snapshots: root, group pages, recipes, their slots      (I1, I2, I5)
//!                     └── which bytes of which snapshots stand on a damaged object
//! ```

pub mod store;

pub mod common;

pub mod vm;

pub mod copies;

pub mod live;

pub mod mend;

pub mod moving;

pub mod holds;

pub mod trees;

pub mod losses;

pub mod objects;

pub mod faults;

pub mod rebuild;

#[cfg(test)]
mod tests;

#[cfg(test)]
#[allow(dead_code, missing_docs, clippy::duplicate_mod, reason = "shared with the tests of `collect`")]
#[path = "../collect/testing.rs"]
mod testing;

pub use crate::check::faults::{Finding, Severity};
pub use crate::check::rebuild::{RebuildReport, rebuild};
pub use crate::check::store::{CheckOptions, CheckReport, Progress, check_store, check_store_from};
