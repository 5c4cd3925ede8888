//! The election: finds the blocks that several VMs hold, copies the most popular ones into common packs, and publishes
//! a new epoch of the popular index.
//!
//! ```text
//!   members ── slot tables, common references ── candidates ── choice ── common packs ── index ── epoch
//!   (groups)          partition by partition                   bounded     donor order
//! ```

pub mod candidates;

pub mod members;

pub mod run;
