//! The dataflow of elections and batches: records of fingerprints go to the owner of their partition, which groups one
//! partition at a time in bounded memory; verdicts go back to the owner of the VM.
//!
//! ```text
//!   Task::feed ── rows ──> partition's owner: spill ── sort, group ──> Task::judge ── object in the store
//!                                                                                          │
//!   Task::verdict <───────────────── owner of the VM <──────────── rows ───────────────────┘
//! ```
//!
//! It runs on timely dataflow: threads of one process, or of several hosts. A finished partition is an object, so that
//! a job that was cut off goes on where it was.

pub mod announce;
pub mod detect;
pub mod flow;
pub mod health;
pub mod hosts;
pub mod job;
pub mod link;
pub mod mesh;
pub mod record;
pub mod spill;
