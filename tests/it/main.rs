//! All integration tests, one binary: see docs/TESTING.md for the tiers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test that cannot go on says why and ends"
)]

mod attach;
mod away;
mod backend_suite;
mod batch;
mod cli;
mod clone_store;
mod clones;
mod cluster;
mod cost;
mod crash;
mod damage;
mod dedup;
mod docs;
mod elect;
mod fence;
mod files;
mod forget;
mod format;
mod fuzz;
mod grace;
mod heal;
mod hold;
mod invariants;
mod kills;
mod manual;
mod marks;
mod model;
mod mount;
mod mount_helper;
mod peers;
mod popular;
mod power;
mod sighting;
mod targets;
mod whole;
mod world;
mod xen;
