//! Frame size and zstd level: ratio, speed of one core, and what one random 4 KiB read has to decompress.
//!
//!     cargo bench --bench frames -- IMAGE...
//!
//! Takes the distinct blocks with data of the images, in order, as the write path would store them.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a bench prints and measures")]

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use snapfs::fingerprint::{fingerprint, is_zero};
use snapfs::pack::frame::{compress, decompress};

const BLOCK: usize = 4096;
/// Enough for a steady figure, little enough for memory.
const SAMPLE_BYTES: usize = 256 << 20;

fn sample(paths: &[String]) -> Vec<u8> {
    let mut seen = HashSet::new();
    let mut blocks = Vec::new();
    let share = SAMPLE_BYTES / paths.len().max(1);
    for path in paths {
        let file = File::open(path).unwrap();
        let size = file.metadata().unwrap().len();
        let from = blocks.len();
        let mut chunk = vec![0; 1 << 20];
        for offset in (0..size).step_by(1 << 20) {
            let count = file.read_at(&mut chunk, offset).unwrap();
            for block in chunk[..count].chunks_exact(BLOCK) {
                if !is_zero(block) && seen.insert(fingerprint(block)) {
                    blocks.extend_from_slice(block);
                }
            }
            if blocks.len() - from >= share {
                break;
            }
        }
    }
    blocks
}

fn main() {
    let paths: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    if paths.is_empty() {
        println!("frames: give images: cargo bench --bench frames -- IMAGE...");
        return;
    }
    let blocks = sample(&paths);
    let raw = blocks.len() as f64;
    println!("{:.0} MB of distinct blocks from {} images", raw / 1e6, paths.len());
    println!("| frame | zstd | ratio | compress MB/s | decompress MB/s | one random block, us |");
    println!("|---|---|---|---|---|---|");
    for frame_blocks in [1, 4, 8, 16, 32, 64] {
        for level in [-1, 1, 3] {
            let began = Instant::now();
            let frames: Vec<(u8, Vec<u8>, usize)> = blocks
                .chunks(frame_blocks * BLOCK)
                .map(|raw| {
                    let (codec, stored) = compress(raw, level);
                    (codec, stored, raw.len())
                })
                .collect();
            let compressing = began.elapsed().as_secs_f64();
            let stored: usize = frames.iter().map(|(_, stored, _)| stored.len() + 36).sum();
            let began = Instant::now();
            for (codec, stored, length) in &frames {
                std::hint::black_box(decompress(*codec, stored, *length).unwrap());
            }
            let opening = began.elapsed().as_secs_f64();
            println!(
                "| {} KiB | {level} | {:.3} | {:.0} | {:.0} | {:.1} |",
                frame_blocks * BLOCK / 1024,
                raw / stored as f64,
                raw / 1e6 / compressing,
                raw / 1e6 / opening,
                opening * 1e6 / frames.len() as f64,
            );
        }
    }
}
