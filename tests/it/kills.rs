//! Tier 7: kill -9 of the real binary, at seeded moments of seeded commands on one store, and what must hold after each.
//!
//! After every round: `check --read-data` finds nothing lost, the snapshots listed are those that were acknowledged and
//! perhaps the one that was being made (or those being forgotten), and what is listed restores byte for byte. The
//! commands are a table, [`VERBS`]. `SNAPFS_KILL_ROUNDS=200` runs more rounds, `SNAPFS_KILL_SEED=7` others.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rustix::process::Signal;
use snapfs::clock::{Clock, SystemClock};

use crate::whole::{MIB, Mount, Place, Running, can_mount, eventually, image, is_running, same, signal, skip};
use crate::world::{Rng, noise};

const NAME: &str = "kills::nothing_is_lost_whatever_is_killed";

/// Rounds of a plain run of the tests.
const ROUNDS: u64 = 16;

/// More snapshots than this, and some are forgotten.
const SNAPSHOTS_MAX: usize = 8;

/// How long a command is taken to last until one has come to its end.
const USUAL: Duration = Duration::from_millis(200);

const VMS: [&str; 2] = ["web01", "db02"];

/// What a round can do.
struct Verb {
    name: &'static str,
    weight: u64,
    needs_mount: bool,
    begin: for<'a> fn(&mut Rounds<'a>) -> Begun<'a>,
}

const VERBS: [Verb; 5] = [
    Verb { name: "backup", weight: 4, needs_mount: false, begin: |rounds| rounds.backup() },
    Verb { name: "forget", weight: 2, needs_mount: false, begin: |rounds| rounds.forget() },
    Verb { name: "gc", weight: 3, needs_mount: false, begin: |rounds| rounds.command("gc store") },
    Verb { name: "gc --exact", weight: 1, needs_mount: false, begin: |rounds| rounds.command("gc store --exact") },
    Verb { name: "copy into the mount", weight: 3, needs_mount: true, begin: |rounds| rounds.copy() },
];

/// What a command changes when it is done, and may have changed when it was killed.
enum Effect {
    Nothing,
    Makes(String, Vec<u8>),
    Forgets(BTreeSet<String>),
}

/// A command that runs.
struct Begun<'a> {
    /// Who acknowledges.
    process: Running,
    /// Who is killed.
    victim: i32,
    effect: Effect,
    mount: Option<Mount<'a>>,
}

struct Rounds<'a> {
    place: &'a Place,
    rng: Rng,
    round: u64,
    /// What must be there.
    snapshots: BTreeMap<String, Vec<u8>>,
    /// The newest image of each VM, which the next one is made of.
    images: BTreeMap<&'static str, Vec<u8>>,
}

impl<'a> Rounds<'a> {
    fn new(place: &'a Place, seed: u64) -> Self {
        let images = VMS.iter().enumerate().map(|(at, vm)| (*vm, image(seed + at as u64, 6))).collect();
        Self { place, rng: Rng(seed * 0x9e37_79b9 + 1), round: 0, snapshots: BTreeMap::new(), images }
    }

    /// The next image of a VM: some runs of blocks are new, one is moved, one is zeroed.
    fn evolve(&mut self, vm: &'static str) -> Vec<u8> {
        let mut bytes = self.images[vm].clone();
        let blocks = (bytes.len() / 4096) as u64;
        for change in 0..6 {
            let count = 1 + self.rng.below(60) as usize;
            let at = self.rng.below(blocks - count as u64) as usize * 4096;
            let range = at..at + count * 4096;
            match change {
                0 => bytes[range].fill(0),
                1 => bytes.copy_within(range, (blocks as usize - count) * 4096 / 2),
                _ => {
                    let new = noise(self.rng.next(), range.len());
                    bytes[range].copy_from_slice(&new);
                }
            }
        }
        self.images.insert(vm, bytes.clone());
        bytes
    }

    fn command(&mut self, words: &str) -> Begun<'a> {
        let process = self.place.start(words);
        Begun { victim: process.pid(), process, effect: Effect::Nothing, mount: None }
    }

    /// A new image in `source.img`, and the name it is to get.
    fn source(&mut self) -> (String, Vec<u8>) {
        let vm = VMS[self.rng.below(2) as usize];
        let bytes = self.evolve(vm);
        self.place.write("source.img", &bytes);
        (format!("{vm}/{:04}.img", self.round), bytes)
    }

    fn backup(&mut self) -> Begun<'a> {
        let (name, bytes) = self.source();
        let begun = self.command(&format!("backup store {name} source.img"));
        Begun { effect: Effect::Makes(name, bytes), ..begun }
    }

    fn forget(&mut self) -> Begun<'a> {
        let count = 1 + self.rng.below(2) + (self.snapshots.len().saturating_sub(SNAPSHOTS_MAX)) as u64;
        let mut names: Vec<String> = self.snapshots.keys().cloned().collect();
        let mut gone = BTreeSet::new();
        while (gone.len() as u64) < count && !names.is_empty() {
            gone.insert(names.swap_remove(self.rng.below(names.len() as u64) as usize));
        }
        let list: Vec<&str> = gone.iter().map(String::as_str).collect();
        // With nothing to forget it is told so: a name that is not there.
        let begun = self.command(&format!(
            "forget store {}",
            if list.is_empty() { "none/none.img".into() } else { list.join(" ") }
        ));
        Begun { effect: Effect::Forgets(gone), ..begun }
    }

    /// The daemon is killed while something copies into its mount.
    fn copy(&mut self) -> Begun<'a> {
        let (name, bytes) = self.source();
        let (vm, _) = name.split_once('/').unwrap();
        let part = format!("mnt/{vm}/{:04}.part", self.round);
        let mount = self.place.mount("seal_after=1h");
        let line = format!("mkdir -p mnt/{vm} && cp source.img {part} && mv {part} mnt/{name}");
        let process = self.place.start_shell(&line);
        Begun { victim: mount.pid, process, effect: Effect::Makes(name, bytes), mount: Some(mount) }
    }

    /// Runs a command, kills it at a moment by chance, and judges what is left; whether it came to its end.
    fn run(&mut self, verb: &Verb, usual: &mut Duration) -> bool {
        let clock = SystemClock::new();
        let mut begun = (verb.begin)(self);
        let began = clock.elapsed();
        let wait = usual.mul_f64(self.rng.below(1300) as f64 / 1000.0);
        while !begun.process.has_ended() && clock.elapsed() - began < wait {
            std::thread::sleep(Duration::from_millis(1));
        }
        let is_whole = begun.process.has_ended();
        let took = clock.elapsed() - began;
        signal(begun.victim, Signal::KILL);
        let done = begun.process.finish();
        if let Some(mount) = begun.mount {
            mount.kill();
            let victim = begun.victim;
            eventually("a killed daemon ends", || !is_running(victim));
            self.place.snapfs("umount mnt").ok();
        }
        if is_whole {
            let is_empty = matches!(&begun.effect, Effect::Forgets(names) if names.is_empty());
            assert_eq!(done.code, if is_empty { 3 } else { 0 }, "{}: {}", done.command, done.err);
            // The first of them begins the measure.
            *usual = if *usual == USUAL { took } else { (*usual + took) / 2 };
        }
        self.judge(begun.effect, done.code == 0);
        is_whole
    }

    fn judge(&mut self, effect: Effect, is_acknowledged: bool) {
        let store = self.place.snapfs("check store --read-data");
        assert_eq!(store.code, 0, "check: {}{}", store.text(), store.err);
        let listed = self.place.snapfs("list store --json").ok().json();
        let listed: BTreeSet<String> =
            listed.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect();
        match effect {
            Effect::Nothing => {}
            Effect::Makes(name, bytes) => {
                if is_acknowledged || listed.contains(&name) {
                    self.snapshots.insert(name, bytes);
                }
            }
            Effect::Forgets(names) => {
                for name in names {
                    if is_acknowledged || !listed.contains(&name) {
                        self.snapshots.remove(&name);
                    }
                }
            }
        }
        assert_eq!(listed, self.snapshots.keys().cloned().collect(), "what is listed");
        // `check` has proven all against their digests; these against what was written.
        let names: Vec<&String> = self.snapshots.keys().collect();
        let newest = names.last().copied();
        let any = (!names.is_empty()).then(|| names[self.rng.below(names.len() as u64) as usize]);
        for name in newest.into_iter().chain(any) {
            same(&self.place.snapfs(&format!("restore store {name} -")).ok().out, &self.snapshots[name], name);
        }
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn nothing_is_lost_whatever_is_killed() {
    let can_mount = can_mount();
    if let Err(why) = &can_mount {
        skip(NAME, &format!("the mount is left out: {why}"));
    }
    let verbs: Vec<&Verb> = VERBS.iter().filter(|verb| !verb.needs_mount || can_mount.is_ok()).collect();
    let (count, seed) = (number("SNAPFS_KILL_ROUNDS", ROUNDS), number("SNAPFS_KILL_SEED", 1));
    let place = Place::new();
    let mut rounds = Rounds::new(&place, seed);
    let mut usual: BTreeMap<&str, Duration> = BTreeMap::new();
    let mut tally: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for round in 0..count {
        rounds.round = round;
        let mut ticket = rounds.rng.below(verbs.iter().map(|verb| verb.weight).sum());
        let chosen = verbs.iter().find(|verb| {
            let is_it = ticket < verb.weight;
            ticket = ticket.saturating_sub(verb.weight);
            is_it
        });
        let verb = if rounds.snapshots.len() > SNAPSHOTS_MAX { &VERBS[1] } else { chosen.unwrap() };
        println!("seed {seed}, round {round}: {}", verb.name);
        let is_whole = rounds.run(verb, usual.entry(verb.name).or_insert(USUAL));
        let (killed, whole) = tally.entry(verb.name).or_default();
        *(if is_whole { whole } else { killed }) += 1;
    }
    println!("killed, and came to their end: {tally:?}");
    assert!(tally.values().map(|(killed, _)| killed).sum::<u64>() > 0, "nobody was killed: the test is no test");
    // What the killed ones left is found and freed, and nothing else is.
    place.snapfs("gc store --exact").ok();
    let idle = place.snapfs("gc store --exact --json").ok().json();
    assert!(idle["vms"].as_array().unwrap().iter().all(|vm| vm["idle"] == true), "{idle}");
    rounds.judge(Effect::Nothing, true);
    let live: usize = rounds.snapshots.values().map(Vec::len).sum();
    println!("{} snapshots, {} MiB", rounds.snapshots.len(), live / MIB);
}
