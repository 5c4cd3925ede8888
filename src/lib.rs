//! snapfs: a snapshot filesystem for VM disk images.
//!
//! The modules stand in the order in which a byte travels; imports point down the list (docs/ARCHITECTURE.md).
#![warn(missing_docs)]

pub mod fuzz;

pub mod cli;

pub mod fuse;

pub mod fs;

pub mod elect;

pub mod batch;

pub mod ingest;

pub mod check;

pub mod collect;

pub mod clones;

pub mod store;

pub mod image;

pub mod cluster;

pub mod catalog;

pub mod similarity;

pub mod dedup;

pub mod popular;

pub mod pack;

pub mod recipe;

pub mod backend;

pub mod name;

pub mod format;

pub mod wire;

pub mod fingerprint;

pub mod units;

pub mod limits;

pub mod random;

pub mod clock;

pub mod error;
