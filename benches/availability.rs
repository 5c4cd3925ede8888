//! Availability: how many VMs have all their data when some machines are lost, simulated and by the papers' formula.
//!
//!     cargo bench --bench availability -- [VMS] [TRIALS]
//!
//! Packs a VM, as the papers measured them for 105 VMs: 703 where packs are filled by whatever comes (each then serves
//! 6.28 VMs); 274 of its own and 251 common ones (each serves 54.6 VMs) where they are not. Three copies, six of common
//! packs. The placements compared:
//!
//! * *oblivious*: packs of all VMs mixed, each on three machines by chance;
//! * *the papers' VM-centric*: own packs, each on three machines by chance; common ones on six;
//! * *ours*: all packs of a VM on the same three machines, by rendezvous hashing of its name; each common pack on six
//!   machines of its own, by rendezvous hashing of its key. This is the placement that the store uses.
//!
//! For each number of failures, TRIALS (400) sets of machines are lost by chance, seeded; a VM counts when each of its
//! packs has a copy left. VMS is 2500.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs, reason = "a bench prints and measures")]

use snapfs::backend::placement::{Copies, Scope, TargetId};

const MACHINES: [usize; 2] = [100, 1000];
const FAILURES: [usize; 4] = [3, 5, 10, 20];
const R: usize = 3;
const R_COMMON: usize = 6;
#[expect(clippy::approx_constant, reason = "VMs a pack, as the papers measured them; no angle")]
const OBLIVIOUS: (usize, f64) = (703, 6.28);
const OWN: usize = 274;
const COMMON: (usize, f64) = (251, 54.6);

/// What the papers print, in percent: (machines, failures) and oblivious / VM-centric of the thesis, then of MSST'15.
const PAPERS: [[f64; 4]; 8] = [
    [99.304, 99.774, 69.549, 99.660],
    [93.256, 97.763, 2.648, 96.653],
    [43.252, 76.094, 0.0, 66.246],
    [0.034, 5.614, 0.0, 1.133],
    [99.999_32, 99.999_78, 99.964_67, 99.999_67],
    [99.9932, 99.9978, 99.6472, 99.9967],
    [99.9185, 99.9736, 95.848, 99.960],
    [99.2285, 99.7490, 66.841, 99.623],
];

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    /// So many different ones of `end`.
    fn choose(&mut self, count: usize, end: usize) -> Vec<u16> {
        let mut chosen = Vec::with_capacity(count);
        while chosen.len() < count {
            let one = self.below(end) as u16;
            if !chosen.contains(&one) {
                chosen.push(one);
            }
        }
        chosen
    }
}

/// 1 - C(d, r) / C(p, r): a pack's chance to have a copy left.
fn left(p: usize, d: usize, r: usize) -> f64 {
    if d < r {
        return 1.0;
    }
    1.0 - (0..r).map(|k| (d - k) as f64 / (p - k) as f64).product::<f64>()
}

/// Where packs lie, and which packs each VM needs.
#[derive(Default)]
struct Placed {
    packs: Vec<Vec<u16>>,
    vms: Vec<Vec<u32>>,
}

impl Placed {
    /// Lets each VM need `count` packs of a pool that is as large as `sharing` VMs a pack make it.
    fn share(
        &mut self,
        rng: &mut Rng,
        (count, sharing): (usize, f64),
        mut place: impl FnMut(&mut Rng, usize) -> Vec<u16>,
    ) {
        let first = self.packs.len();
        let pool = (self.vms.len() as f64 * count as f64 / sharing).round() as usize;
        for number in 0..pool {
            let places = place(rng, number);
            self.packs.push(places);
        }
        for vm in &mut self.vms {
            vm.extend((0..count).map(|_| (first + rng.below(pool)) as u32));
        }
    }

    /// The share of VMs that have all their data.
    fn available(&self, failed: &[bool]) -> f64 {
        let lost: Vec<bool> = self.packs.iter().map(|pack| pack.iter().all(|at| failed[usize::from(*at)])).collect();
        let whole = self.vms.iter().filter(|vm| vm.iter().all(|pack| !lost[*pack as usize])).count();
        whole as f64 / self.vms.len() as f64
    }
}

fn main() {
    let words: Vec<usize> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let (vms, trials) = (words.first().copied().unwrap_or(2500), words.get(1).copied().unwrap_or(400));
    println!("{vms} VMs, {trials} trials; r = {R}, r_c = {R_COMMON}; percent of VMs with all data");
    println!(
        "| machines | failed | oblivious: thesis, MSST | simulated | formula | VM-centric: thesis, MSST | simulated | \
         formula | ours, simulated | formula | worst trial of ours |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    let mut papers = PAPERS.iter();
    for p in MACHINES {
        let mut rng = Rng(0x5eed + p as u64);
        let empty = || Placed { packs: Vec::new(), vms: vec![Vec::new(); vms] };
        let mut oblivious = empty();
        oblivious.share(&mut rng, OBLIVIOUS, |rng, _| rng.choose(R, p));
        let mut centric = empty();
        centric.share(&mut rng, COMMON, |rng, _| rng.choose(R_COMMON, p));
        for vm in 0..vms {
            for _ in 0..OWN {
                centric.vms[vm].push(centric.packs.len() as u32);
                let places = rng.choose(R, p);
                centric.packs.push(places);
            }
        }
        let targets: Vec<TargetId> =
            (0..p).map(|_| TargetId((u128::from(rng.next()) << 64 | u128::from(rng.next())).to_le_bytes())).collect();
        let copies = Copies { vm: R, common: R_COMMON, quorum: 0 };
        let places = |scope: Scope| scope.places(&targets, copies).into_iter().map(|at| at as u16).collect::<Vec<_>>();
        let mut ours = empty();
        ours.share(&mut rng, COMMON, |_, number| places(Scope::of(&format!("common/packs/{number:012x}.0000.pack"))));
        for vm in 0..vms {
            // One pack stands for all of the VM's own: they lie together.
            ours.vms[vm].push(ours.packs.len() as u32);
            ours.packs.push(places(Scope::of(&format!("vms/vm{vm:04}/packs"))));
        }
        for d in FAILURES {
            let paper = papers.next().unwrap();
            let mut sums = [0.0; 3];
            let mut worst: f64 = 1.0;
            for _ in 0..trials {
                let mut failed = vec![false; p];
                rng.choose(d, p).into_iter().for_each(|at| failed[usize::from(at)] = true);
                for (sum, placed) in sums.iter_mut().zip([&oblivious, &centric, &ours]) {
                    *sum += placed.available(&failed);
                }
                worst = worst.min(ours.available(&failed));
            }
            let percent = |at: usize| sums[at] * 100.0 / trials as f64;
            let of_common = left(p, d, R_COMMON).powf(COMMON.0 as f64);
            println!(
                "| {p} | {d} | {}, {} | {:.3} | {:.3} | {}, {} | {:.3} | {:.3} | **{:.4}** | {:.4} | {:.2} |",
                paper[0],
                paper[2],
                percent(0),
                left(p, d, R).powf(OBLIVIOUS.0 as f64) * 100.0,
                paper[1],
                paper[3],
                percent(1),
                left(p, d, R).powf(OWN as f64) * of_common * 100.0,
                percent(2),
                left(p, d, R) * of_common * 100.0,
                worst * 100.0,
            );
        }
    }
}
