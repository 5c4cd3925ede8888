//! wip
#![warn(missing_docs)]
pub mod fs;
pub mod ingest;
pub mod store;
pub mod image;
pub mod catalog;
pub mod similarity;
pub mod dedup;
pub mod pack;
pub mod recipe;
pub mod backend;
pub mod name;
pub mod format;
pub mod wire;
pub mod fingerprint;
pub mod units;
pub mod limits;
pub mod clock;
pub mod error;
