//! Fingerprints: what a block is called by everything that compares blocks, and the checksums of stored objects.
//!
//! A fingerprint is the whole BLAKE3 hash, so equal fingerprints mean equal blocks. A single 4 KiB block has only four
//! chunks and leaves most lanes of a wide processor idle. [`fingerprint_blocks`] fills them with the same chunk of
//! sixteen blocks instead; its results are those of `blake3::hash`, bit for bit.

use crate::limits::{BLOCK_BYTES, HOOK_SAMPLING};
use blake3::IncrementCounter;
use blake3::platform::Platform;
use std::fmt;

/// Bytes of a fingerprint.
pub const FINGERPRINT_BYTES: usize = 32;

/// Blocks hashed together: the lanes of the widest processor that BLAKE3 knows.
const LANES: usize = 16;

/// Below this many blocks, one at a time is as fast: each already fills four lanes with its own chunks.
const LANES_MIN: usize = 5;

/// Bytes of a BLAKE3 chunk, of a node of its tree, and chunks of one of our blocks.
const CHUNK_BYTES: usize = 1024;
const NODE_BYTES: usize = 2 * FINGERPRINT_BYTES;
const CHUNKS: usize = BLOCK_BYTES / CHUNK_BYTES;

const _: () = assert!(CHUNKS == 4, "the tree below has two nodes and a root over four chunks");

/// BLAKE3's initial value and flags, from its specification; the crate keeps them to itself.
const IV: [u32; 8] =
    [0x6A09_E667, 0xBB67_AE85, 0x3C6E_F372, 0xA54F_F53A, 0x510E_527F, 0x9B05_688C, 0x1F83_D9AB, 0x5BE0_CD19];
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;

/// Bytes that [`is_zero`] looks at before it decides whether to go on.
const ZERO_STEP_BYTES: usize = 128;

/// The BLAKE3 hash of a block or a segment: 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; FINGERPRINT_BYTES]);

impl Fingerprint {
    /// The key of this block in the similarity index, for the one block in `HOOK_SAMPLING` that has one.
    pub fn hook(&self) -> Option<u64> {
        // Sampling looks at other bytes than the key has, so that keys stay evenly spread.
        let [k0, k1, k2, k3, k4, k5, k6, k7, .., s0, s1, s2, s3, s4, s5, s6, s7] = self.0;
        let sample = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        sample.is_multiple_of(HOOK_SAMPLING).then(|| u64::from_le_bytes([k0, k1, k2, k3, k4, k5, k6, k7]))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

/// Whether all of `bytes` are zero. Any length and alignment; no bytes are zero.
///
/// Cost: stops within 128 bytes of the first other byte.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (steps, rest) = bytes.as_chunks::<ZERO_STEP_BYTES>();
    let step_is_zero = |step: &[u8; ZERO_STEP_BYTES]| {
        let (words, _) = step.as_chunks::<8>();
        words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
    };
    steps.iter().all(step_is_zero) && rest.iter().all(|byte| *byte == 0)
}

/// The fingerprint of one block.
pub fn fingerprint(block: &[u8]) -> Fingerprint {
    Fingerprint(*blake3::hash(block).as_bytes())
}

/// The digest of a whole segment. The same function as [`fingerprint`], over 2 MiB.
pub fn digest(bytes: &[u8]) -> Fingerprint {
    fingerprint(bytes)
}

/// Appends the fingerprints of `blocks` to `out`, in order: each exactly as [`fingerprint`] has it.
///
/// Cost: per block about half that of [`fingerprint`] or less; fastest in multiples of sixteen.
pub fn fingerprint_blocks(blocks: &[&[u8; BLOCK_BYTES]], out: &mut Vec<Fingerprint>) {
    out.reserve(blocks.len());
    let platform = Platform::detect();
    for batch in blocks.chunks(LANES) {
        if batch.len() < LANES_MIN {
            out.extend(batch.iter().map(|block| fingerprint(*block)));
        } else {
            fingerprint_batch(platform, batch, out);
        }
    }
}

/// BLAKE3 of up to sixteen blocks side by side: first their chunks, then two nodes each, then the roots.
fn fingerprint_batch(platform: Platform, batch: &[&[u8; BLOCK_BYTES]], out: &mut Vec<Fingerprint>) {
    // Any count but a power of two is hashed in ever narrower parts, down to a single lane. It is faster to fill up
    // with zeros, which are where no block is.
    let width = batch.len().next_power_of_two().min(LANES);

    // The counter of a chunk is its place in its block, hence one call for each place.
    let mut chunk_hashes = [[0; LANES * FINGERPRINT_BYTES]; CHUNKS];
    for (place, hashes) in (0_usize..).zip(&mut chunk_hashes) {
        let mut chunks = [&[0; CHUNK_BYTES]; LANES];
        for (chunk, block) in chunks.iter_mut().zip(batch) {
            *chunk = &block.as_chunks().0[place];
        }
        let counter = place as u64;
        let no = IncrementCounter::No;
        platform.hash_many(&chunks[..width], &IV, counter, no, 0, CHUNK_START, CHUNK_END, hashes);
    }

    // Left and right node of a block stand side by side, so that their hashes are the root's input as they lie.
    let [first, second, third, fourth] =
        chunk_hashes.each_ref().map(|hashes| hashes.as_chunks::<FINGERPRINT_BYTES>().0);
    let mut nodes = [[0; NODE_BYTES]; 2 * LANES];
    for (lane, pair) in nodes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let [left, right] = pair;
        left.as_chunks_mut().0.copy_from_slice(&[first[lane], second[lane]]);
        right.as_chunks_mut().0.copy_from_slice(&[third[lane], fourth[lane]]);
    }
    let mut node_hashes = [0; 2 * LANES * FINGERPRINT_BYTES];
    hash_nodes(platform, &nodes[..2 * width], PARENT, &mut node_hashes);

    let (roots, _) = node_hashes.as_chunks();
    let mut root_hashes = [0; LANES * FINGERPRINT_BYTES];
    hash_nodes(platform, &roots[..width], PARENT | ROOT, &mut root_hashes);
    out.extend(root_hashes.as_chunks().0.iter().take(batch.len()).copied().map(Fingerprint));
}

/// Hashes up to `2 * LANES` nodes of BLAKE3 trees, 32 bytes of `out` each.
fn hash_nodes(platform: Platform, nodes: &[[u8; NODE_BYTES]], flags: u8, out: &mut [u8]) {
    let mut inputs = [&[0; NODE_BYTES]; 2 * LANES];
    for (input, node) in inputs.iter_mut().zip(nodes) {
        *input = node;
    }
    platform.hash_many(&inputs[..nodes.len()], &IV, 0, IncrementCounter::No, flags, 0, 0, out);
}

/// A checksum: the first 16 bytes of BLAKE3 over `context` and `parts`, each preceded by its length (8 bytes, LE).
///
/// The lengths keep `["ab", "c"]` and `["a", "bc"]` apart; `context` keeps kinds of objects apart.
pub fn short(context: &[u8], parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    for part in std::iter::once(&context).chain(parts) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let mut checksum = [0; 16];
    hasher.finalize_xof().fill(&mut checksum);
    checksum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks that differ in every chunk.
    fn sample_blocks(count: usize) -> Vec<[u8; BLOCK_BYTES]> {
        let fill = |seed: usize| {
            let mut block = [0; BLOCK_BYTES];
            blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut block);
            block
        };
        (0..count).map(fill).collect()
    }

    #[test]
    fn many_blocks_hash_as_one_by_one() {
        let blocks = sample_blocks(40);
        for count in 0..=blocks.len() {
            let batch: Vec<_> = blocks[..count].iter().collect();
            // What is in the vector already stays.
            let mut found = vec![Fingerprint([7; 32])];
            fingerprint_blocks(&batch, &mut found);
            let mut expected = vec![Fingerprint([7; 32])];
            expected.extend(batch.iter().map(|block| Fingerprint(*blake3::hash(*block).as_bytes())));
            assert_eq!(found, expected, "{count} blocks");
        }
    }

    #[test]
    fn every_lane_count_of_the_batch_is_exact() {
        let blocks = sample_blocks(LANES);
        for platform in [Platform::detect(), Platform::portable()] {
            for count in 1..=LANES {
                let batch: Vec<_> = blocks[..count].iter().collect();
                let mut found = Vec::new();
                fingerprint_batch(platform, &batch, &mut found);
                let expected: Vec<_> = batch.iter().map(|block| fingerprint(*block)).collect();
                assert_eq!(found, expected, "{count} blocks on {platform:?}");
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn narrower_processors_agree() {
        let blocks = sample_blocks(LANES);
        let batch: Vec<_> = blocks.iter().collect();
        let expected: Vec<_> = batch.iter().map(|block| fingerprint(*block)).collect();
        for platform in [Platform::sse2(), Platform::sse41(), Platform::avx2()].into_iter().flatten() {
            let mut found = Vec::new();
            fingerprint_batch(platform, &batch, &mut found);
            assert_eq!(found, expected, "{platform:?}");
        }
    }

    #[test]
    fn zero_is_found_wherever_the_other_byte_is() {
        for len in (0..=3 * ZERO_STEP_BYTES + 1).chain([BLOCK_BYTES]) {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len} zeros");
            for at in 0..len {
                for value in [1, 0x80] {
                    bytes[at] = value;
                    assert!(!is_zero(&bytes), "{value} at {at} of {len}");
                }
                bytes[at] = 0;
            }
        }
        // Unaligned, and with other bytes around.
        let mut bytes = vec![9; BLOCK_BYTES + 64];
        for start in 1..32 {
            bytes.fill(9);
            bytes[start..start + BLOCK_BYTES].fill(0);
            assert!(is_zero(&bytes[start..start + BLOCK_BYTES]));
            assert!(!is_zero(&bytes[start..=start + BLOCK_BYTES]));
            assert!(!is_zero(&bytes[start - 1..start + BLOCK_BYTES]));
        }
    }

    #[test]
    fn one_block_in_eight_is_a_hook() {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&0x0102_0304_0506_0708_u64.to_le_bytes());
        for sample in 0..64_u64 {
            bytes[24..].copy_from_slice(&sample.to_le_bytes());
            let expected = (sample % HOOK_SAMPLING == 0).then_some(0x0102_0304_0506_0708);
            assert_eq!(Fingerprint(bytes).hook(), expected, "sample {sample}");
        }
        // The highest bits of the sample do not matter, the bytes between do not either.
        bytes[8..24].fill(0xff);
        bytes[24..].copy_from_slice(&0xffff_ffff_ffff_fff8_u64.to_le_bytes());
        assert_eq!(Fingerprint(bytes).hook(), Some(0x0102_0304_0506_0708));
    }

    #[test]
    fn fingerprints_print_as_hex() {
        // The published BLAKE3 hash of no bytes.
        let hex = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(fingerprint(b"").to_string(), hex);
        assert_eq!(format!("{:?}", digest(b"")), hex);
    }

    #[test]
    fn checksums_keep_parts_and_contexts_apart() {
        let all = [
            short(b"", &[]),
            short(b"", &[b""]),
            short(b"", &[b"", b""]),
            short(b"a", &[b"bc"]),
            short(b"a", &[b"b", b"c"]),
            short(b"ab", &[b"c"]),
            short(b"abc", &[]),
            short(b"", &[b"abc"]),
        ];
        for (index, one) in all.iter().enumerate() {
            assert!(!all[..index].contains(one), "checksum {index} is another's");
        }
        let mut whole = Vec::new();
        whole.extend([1, 0, 0, 0, 0, 0, 0, 0, b'a', 2, 0, 0, 0, 0, 0, 0, 0, b'b', b'c']);
        assert_eq!(short(b"a", &[b"bc"]), blake3::hash(&whole).as_bytes()[..16]);
    }
}
