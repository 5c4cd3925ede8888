//! Tier 2: random operations on the mounted tree (without FUSE) equal a plain vector of bytes. A failure prints
//! its seed; `SNAPFS_MODEL_SEEDS=from..to` runs others.

use std::sync::Arc;

use snapfs::fs::MountedStore;
use snapfs::fs::types::{Allocate, Caller, Handle, Ino, Options, ROOT};

use crate::world::{Rng, World, get, noise, put};

const MIB: u64 = 1 << 20;
const CALLER: Caller = Caller { uid: 0, gid: 0 };

fn tree(world: &World) -> Arc<MountedStore> {
    MountedStore::new(Arc::new(world.store()), Options::default())
}

fn read_all(fs: &MountedStore, handle: Handle, bytes: u64) -> Vec<u8> {
    let mut out = vec![0xaa; bytes as usize + 10];
    let count = fs.read(handle, 0, &mut out).unwrap();
    out.truncate(count);
    out
}

fn same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    if let Some(at) = got.iter().zip(want).position(|(a, b)| a != b) {
        panic!("{what}: differs at {at}: {} for {}", got[at], want[at]);
    }
}

/// SEEK_DATA and SEEK_HOLE say for each 4 KiB block (of the image, phase 0) whether it has data.
fn check_holes(fs: &MountedStore, handle: Handle, want: &[u8]) {
    let mut at = 0;
    let mut seen = vec![false; want.len().div_ceil(4096)];
    while let Some(start) = fs.seek_data(handle, at).unwrap() {
        let end = fs.seek_hole(handle, start).unwrap().unwrap();
        assert!(end > start);
        for block in start / 4096..end.div_ceil(4096) {
            seen[block as usize] = true;
        }
        at = end;
    }
    for (block, seen) in seen.iter().enumerate() {
        let bytes = &want[block * 4096..want.len().min(block * 4096 + 4096)];
        assert_eq!(*seen, bytes.iter().any(|b| *b != 0), "block {block}");
    }
}

fn run(seed: u64, with_parent: bool) {
    let world = World::new();
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let limit = 9 * MIB;
    if with_parent {
        let mut image = noise(1, 7 * MIB as usize);
        image[3 * MIB as usize..5 * MIB as usize].fill(0);
        put(&world.store(), "vm/parent.img", &image).unwrap();
    }
    let mut fs = tree(&world);
    let folder = match fs.lookup(ROOT, "vm") {
        Ok(attributes) => attributes.ino,
        Err(_) => fs.make_folder(ROOT, "vm", 0o755, CALLER).unwrap().ino,
    };
    let (attributes, opened) = fs.create(folder, "draft.part", CALLER).unwrap();
    let (ino, mut handle) = (attributes.ino, opened.handle);
    let mut model: Vec<u8> = Vec::new();
    let parent = noise(1, 7 * MIB as usize);
    for step in 0..120 {
        let mut offset = rng.below(limit);
        let length = [1, 511, 512, 4080, 4096, 8191, 65536, 300_000, 2_500_000][rng.below(9) as usize];
        match rng.below(3) {
            0 => offset -= offset % 4096,
            1 => offset -= offset % (2 * MIB),
            _ => {}
        }
        match rng.below(100) {
            0..=44 => {
                let bytes = match rng.below(5) {
                    0 => vec![0; length],
                    // What the parent has, at its place or moved.
                    1 if (offset as usize + length) <= parent.len() => parent[offset as usize..][..length].to_vec(),
                    2 => parent[4096 * (step % 100)..][..length].to_vec(),
                    _ => noise(seed * 1000 + step as u64, length),
                };
                fs.write(handle, offset, &bytes).unwrap();
                let end = offset as usize + bytes.len();
                if model.len() < end {
                    model.resize(end, 0);
                }
                model[offset as usize..end].copy_from_slice(&bytes);
            }
            45..=52 => {
                let set = snapfs::fs::types::SetAttributes { bytes: Some(offset), ..Default::default() };
                fs.set_attributes(ino, Some(handle), set).unwrap();
                model.resize(offset as usize, 0);
            }
            53..=66 => {
                let how = [
                    Allocate::Punch,
                    Allocate::Zero,
                    Allocate::ZeroKeepSize,
                    Allocate::Reserve,
                    Allocate::ReserveKeepSize,
                ][rng.below(5) as usize];
                fs.allocate(handle, offset, length as u64, how).unwrap();
                let end = offset as usize + length;
                if matches!(how, Allocate::Zero | Allocate::Reserve) && model.len() < end {
                    model.resize(end, 0);
                }
                if matches!(how, Allocate::Punch | Allocate::Zero | Allocate::ZeroKeepSize) {
                    let end = end.min(model.len());
                    if (offset as usize) < end {
                        model[offset as usize..end].fill(0);
                    }
                }
            }
            67..=70 => {
                fs.flush(handle).unwrap();
                fs.release(handle);
                handle = fs.open(ino, true, false).unwrap().handle;
            }
            71..=75 => fs.sync(handle).unwrap(),
            76..=77 => {
                // A new daemon.
                fs.flush(handle).unwrap();
                fs.release(handle);
                fs.shut_down().unwrap();
                fs = tree(&world);
                let folder = fs.lookup(ROOT, "vm").unwrap().ino;
                assert_eq!(fs.lookup(folder, "draft.part").unwrap().ino, ino, "step {step}: inode");
                handle = fs.open(ino, true, false).unwrap().handle;
            }
            78..=80 => check_holes(&fs, handle, &model),
            _ => {
                let mut out = vec![0x55; length];
                let count = fs.read(handle, offset, &mut out).unwrap();
                let from = (offset as usize).min(model.len());
                let to = (from + length).min(model.len());
                same(&out[..count], &model[from..to], &format!("seed {seed} step {step}: read at {offset}"));
            }
        }
        assert_eq!(
            fs.attributes(ino, Some(handle)).unwrap().bytes,
            model.len() as u64,
            "seed {seed} step {step}: size"
        );
    }
    same(&read_all(&fs, handle, limit * 2), &model, "before the close");
    fs.flush(handle).unwrap();
    fs.release(handle);
    fs.rename(folder_of(&fs), "draft.part", folder_of(&fs), "a.img", false).unwrap();
    drop(fs);
    same(&get(&world.store(), "vm/a.img").unwrap(), &model, &format!("seed {seed}: the snapshot"));
}

fn folder_of(fs: &MountedStore) -> Ino {
    fs.lookup(ROOT, "vm").unwrap().ino
}

#[test]
fn random_operations_equal_a_vector_of_bytes() {
    let seeds = std::env::var("SNAPFS_MODEL_SEEDS").ok().and_then(|text| {
        let (from, to) = text.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    });
    for seed in seeds.unwrap_or(0..6) {
        run(seed, seed % 2 == 1);
    }
}

#[test]
fn a_backup_gives_back_every_byte_whatever_its_size() {
    let world = World::new();
    for size in [0usize, 1, 511, 4095, 4096, 4097, 17408, 17409, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, (5 << 20) + 123]
    {
        let bytes = noise(size as u64, size);
        put(&world.store(), &format!("vm/{size}.img"), &bytes).unwrap();
        same(&get(&world.store(), &format!("vm/{size}.img")).unwrap(), &bytes, &format!("size {size}"));
    }
}
