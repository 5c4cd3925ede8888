//! COLLECT (G1-G6): forgets snapshots, finds what nobody needs any more, and gives its room back. One VM at a time,
//! under its write lock; other VMs are never looked at. What VMs share comes after them all (G6).
//!
//! ```text
//!   forget ── a log record (G1)
//!   gc ────── plan: live slots (G2) -> dead packs, packs worth rewriting (G3, G4)      no lock, changes nothing
//!        └─── lock, plan again -> record -> delete; compact -> record -> delete        resumable at every step
//! ```

pub mod forget;

pub mod keep;

pub mod young;

pub mod grace;

pub mod protect;

pub mod gc;

pub mod common;

pub mod compact;

pub mod plan;

pub mod live;

mod pace;

#[cfg(test)]
#[allow(dead_code, missing_docs, reason = "shared with the tests of `check`")]
mod testing;

#[cfg(test)]
mod tests;
