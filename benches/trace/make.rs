//! The trace: what VMs hold day by day, from a seed.
//!
//! Parameters are what the papers measured: 100 VMs of 7 systems, 10 days; 15.7 % of the 2 MiB segments changed a day and 14.5 %
//! of the blocks in them new to the VM, so that 24.14 % are left after level 1 and 12.05 % after level 2; popularity by
//! Zipf's law, so that perfect deduplication leaves 5.62 % and the most popular 1, 2, 4 % of the blocks are 19 to 24, 22 to
//! 34, 31 to 39 % of what level 2 leaves; popular blocks in runs of less than seven. An image has 1/64 of the papers' 40 GB, so
//! that the trace fits into memory.
//!
//! Three things the papers do not tell, and here are as bad as can be: whatever comes on a day is new to all VMs, so
//! that an election knows nothing of it beforehand; a file is in one VM or not independently of its neighbours; and what
//! is a VM's own lies between what it shares.

/// VMs of the trace.
pub const VMS: usize = 100;
/// Days.
pub const DAYS: usize = 10;
/// Blocks of a segment.
pub const SEGMENT: usize = 512;
/// Blocks of an image: 640 MiB, 1/64 of 40 GB.
pub const BLOCKS: usize = SEGMENT * SEGMENTS;
/// Exponent of the popularity that files are given; what is fitted to the outcome is printed.
pub const ALPHA: f64 = 0.75;

const SEGMENTS: usize = 320;
const SYSTEMS: u64 = 7;
/// Segments changed a day, and new blocks in these.
const DIRTY: f64 = 0.157;
const CHANGED: f64 = 0.145;
/// Of what a VM has, or gets on a day: the share that comes from what others may have, too.
const SHARED: f64 = 0.71;
/// Blocks of a file, on average.
const FILE: u64 = 5;
/// VMs that get what is new a day later than the others.
const LATE: f64 = 0.3;

/// A block is a number; equal numbers are equal blocks.
pub type Block = u64;

/// A stream of random numbers that follows from its seed.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
    fn unit(&mut self) -> f64 {
        unit(self.next())
    }
}

fn unit(random: u64) -> f64 {
    (random >> 11) as f64 / (1_u64 << 53) as f64
}

/// Spreads a number over 64 bits; different numbers stay different.
pub fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

fn file_blocks(of: u64, file: u64) -> impl Iterator<Item = Block> {
    let seed = mix(mix(of ^ 0x5eed) ^ file);
    let length = 1 + mix(seed ^ 1) % (2 * FILE - 1);
    (0..length).map(move |at| mix(seed ^ (at + 2)))
}

/// Segments that changed on a day, and what they hold.
pub type Day = Vec<(usize, Vec<Block>)>;

/// One VM's image, day by day.
pub struct Vm {
    number: u64,
    vms: f64,
    image: Vec<Block>,
    rng: Rng,
    is_late: bool,
    own_files: u64,
}

impl Vm {
    /// VM `number` of `vms`.
    pub fn new(number: u64, vms: usize) -> Self {
        let mut rng = Rng(mix(number) ^ 0xabcd);
        let is_late = rng.unit() < LATE;
        Self { number, vms: vms as f64, image: vec![0; BLOCKS], rng, is_late, own_files: 0 }
    }

    /// Data that is new to the VM, `blocks` of them: files of a pool, in the pool's order, and files of its own between them.
    ///
    /// Of `ranks` files in a pool the one of rank i is in min(`vms`, (`ranks` / i)^`ALPHA`) VMs, as far as these go: of one
    /// system, and of more where one has not as many.
    fn fresh(&mut self, blocks: usize, pool: u64) -> Vec<Block> {
        let capped = self.vms.powf(-1.0 / ALPHA);
        let holders_mean = self.vms * capped + (1.0 - capped.powf(1.0 - ALPHA)) / (1.0 - ALPHA);
        let files = blocks as f64 * SHARED / FILE as f64;
        let ranks = files * self.vms / holders_mean;
        let of_system = self.vms / SYSTEMS as f64;
        let mut out = Vec::with_capacity(blocks + 16);
        for file in 0..ranks as u64 {
            let seed = mix(mix(pool ^ 0xf11e) ^ file);
            let rank = unit(seed) * ranks + 1.0;
            let holders = (ranks / rank).powf(ALPHA).min(self.vms);
            let systems = (holders / of_system).ceil();
            let distance = (self.number + mix(seed) % SYSTEMS) % SYSTEMS;
            if distance as f64 >= systems || self.rng.unit() >= holders / (systems * of_system) {
                continue;
            }
            out.extend(file_blocks(pool, file));
            if self.rng.unit() < (1.0 - SHARED) / SHARED {
                self.own_file(&mut out);
            }
        }
        while out.len() < blocks {
            self.own_file(&mut out);
        }
        out.truncate(blocks);
        out
    }

    fn own_file(&mut self, out: &mut Vec<Block>) {
        out.extend(file_blocks(1 << 32 | self.number, self.own_files));
        self.own_files += 1;
    }

    /// The changed segments of a day; on the first, all.
    pub fn day(&mut self, day: usize) -> Day {
        if day == 0 {
            self.image = self.fresh(BLOCKS, 0);
            return self.image.chunks(SEGMENT).map(<[u64]>::to_vec).enumerate().collect();
        }
        let dirty: Vec<usize> = (0..SEGMENTS).filter(|_| self.rng.unit() < DIRTY).collect();
        let count = (dirty.len() as f64 * SEGMENT as f64 * CHANGED) as usize;
        let fresh = self.fresh(count, 100 + day as u64 - u64::from(self.is_late));
        let each = count.div_ceil(dirty.len().max(1));
        for (segment, part) in dirty.iter().zip(fresh.chunks(each)) {
            let at = segment * SEGMENT + self.rng.next() as usize % (SEGMENT - part.len().min(SEGMENT - 1));
            self.image[at..at + part.len()].copy_from_slice(part);
        }
        dirty.iter().map(|s| (*s, self.image[s * SEGMENT..(s + 1) * SEGMENT].to_vec())).collect()
    }
}
