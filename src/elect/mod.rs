//! The election: finds the blocks that several VMs hold, copies the most popular ones into common packs, and publishes
//! a new epoch of the popular index.
//!
//! ```text
//!   members ── slot tables, common references ── count ── choice ── common packs ── index ── epoch
//!   (groups)      all hosts: the dataflow of jobs │ one host: bounded, donor order
//! ```

pub mod copy;
pub mod count;

pub mod members;

pub mod run;
