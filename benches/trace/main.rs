//! Deduplication across VMs on a generated trace, fingerprints only: what is left after each level, what elections on past
//! days and second sighting find, and the batch with 1, 2 and 4 processes.
//!
//!     cargo bench --bench trace -- levels [WORD]
//!     cargo bench --bench trace -- batch SCRATCH-FOLDER [VMS]
//!
//! The trace is not measured anywhere: it is made from a seed, see `make.rs`. What finds the shared blocks in it is the
//! program's own code: the election's choice, the popular index, the promoted blocks, the sampled blocks of other VMs.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a bench prints and measures"
)]

mod batch;
mod levels;
mod make;
mod model;

use std::path::Path;

fn percent(part: f64, whole: f64) -> f64 {
    100.0 * part / whole
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["levels"] => levels::levels(""),
        ["levels", word] => levels::levels(word),
        ["batch", folder] => batch::batch(Path::new(folder), make::VMS),
        ["batch", folder, vms] => batch::batch(Path::new(folder), vms.parse().expect("a number of VMs")),
        _ => println!("trace: cargo bench --bench trace -- levels [WORD], or: -- batch SCRATCH-FOLDER [VMS]"),
    }
}
