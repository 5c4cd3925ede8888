//! Tier 7: kill -9 of the real binary, at seeded moments of seeded commands on one store, and what must hold after each.
//!
//! After every round: `check --read-data` finds nothing lost, the snapshots listed are those that were acknowledged and
//! perhaps the one that was being made (or those being forgotten), and what is listed restores byte for byte. The
//! commands are a table, [`VERBS`]. Three scenes: a store in one folder; three targets with two copies, both of which
//! must be there; and two copies of which one counts. In the latter two, copies are damaged before they are repaired, and
//! now and then one target is away or read-only, from any moment of a command on, and comes back as it was.
//! `SNAPFS_KILL_ROUNDS=200` runs more rounds, `SNAPFS_KILL_SEED=7` others; with `SNAPFS_KILL_KEEP=FOLDER` a store that
//! failed is kept there.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use snapfs::clock::{Clock, SystemClock};
use snapfs::pack::Content;
use snapfs::pack::index::{PackIndex, TRAILER_BYTES};

use crate::whole::{MIB, Mount, Place, Running, can_mount, eventually, image, is_root, is_running, same, signal, skip};
use crate::world::{Rng, noise};

/// Rounds of a plain run of the tests, for each scene.
const ROUNDS: u64 = 16;

/// More snapshots than this, and some are forgotten.
const SNAPSHOTS_MAX: usize = 8;

/// How long a command is taken to last until one has come to its end.
const USUAL: Duration = Duration::from_millis(200);

const VMS: [&str; 2] = ["web01", "db02"];

/// What a verb cannot do without.
#[derive(PartialEq, Eq)]
enum Needs {
    Nothing,
    Mount,
    Targets,
}

/// What a round can do.
struct Verb {
    name: &'static str,
    weight: u64,
    needs: Needs,
    begin: for<'a> fn(&mut Rounds<'a>) -> Begun<'a>,
}

const VERBS: [Verb; 10] = [
    Verb { name: "backup", weight: 4, needs: Needs::Nothing, begin: |rounds| rounds.backup() },
    Verb { name: "forget", weight: 2, needs: Needs::Nothing, begin: |rounds| rounds.forget() },
    Verb { name: "gc", weight: 3, needs: Needs::Nothing, begin: |rounds| rounds.command("gc store") },
    Verb { name: "gc --exact", weight: 1, needs: Needs::Nothing, begin: |rounds| rounds.command("gc store --exact") },
    Verb { name: "copy into the mount", weight: 3, needs: Needs::Mount, begin: |rounds| rounds.copy() },
    Verb { name: "elect", weight: 2, needs: Needs::Nothing, begin: |rounds| rounds.command("popular store elect") },
    Verb { name: "batch", weight: 2, needs: Needs::Nothing, begin: |rounds| rounds.batch() },
    Verb { name: "check --repair --from", weight: 2, needs: Needs::Nothing, begin: |rounds| rounds.heal() },
    Verb { name: "check --repair", weight: 3, needs: Needs::Targets, begin: |rounds| rounds.repair() },
    Verb {
        name: "target add, remove, settle",
        weight: 3,
        needs: Needs::Targets,
        begin: |rounds| rounds.change_targets(),
    },
];

/// What a command changes when it is done, and may have changed when it was killed.
enum Effect {
    Nothing,
    /// Those of one VM together or not at all.
    Makes(BTreeMap<String, Vec<u8>>),
    Forgets(BTreeSet<String>),
    /// All copies are whole, if all targets are there.
    Repairs,
    /// What no copy has whole is healed.
    Heals,
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

/// A target that is lost for some time.
#[derive(Clone)]
struct Loss {
    folder: String,
    /// Not away, but nothing can be written there.
    is_read_only: bool,
}

/// A store over several targets.
#[derive(Default)]
struct Targets {
    /// Copies that must be there before a write counts; two, or one of the two.
    quorum: usize,
    loss: Option<Loss>,
    /// Something may have one copy only, until a repair has come to its end.
    is_fragile: bool,
    losses: u64,
}

struct Rounds<'a> {
    place: &'a Place,
    rng: Rng,
    round: u64,
    /// What must be there.
    snapshots: BTreeMap<String, Vec<u8>>,
    /// What may be there: its making or its end was not acknowledged, and perhaps one target alone knows of it.
    unsure: BTreeMap<String, Vec<u8>>,
    /// The newest image of each VM, which the next one is made of.
    images: BTreeMap<&'static str, Vec<u8>>,
    /// The blocks that `live.img` has: all that ever were.
    blocks: BTreeSet<[u8; 32]>,
    targets: Option<Targets>,
}

impl<'a> Rounds<'a> {
    fn new(place: &'a Place, seed: u64, targets: Option<Targets>) -> Self {
        let images = VMS.iter().enumerate().map(|(at, vm)| (*vm, image(seed + at as u64, 6))).collect();
        let (snapshots, unsure, blocks) = Default::default();
        Self { place, rng: Rng(seed * 0x9e37_79b9 + 1), round: 0, snapshots, unsure, images, blocks, targets }
    }

    /// The next image of a VM: some runs of blocks are new, one is moved, one is zeroed, one is the other VM's.
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
                2 => {
                    let other = VMS.into_iter().find(|other| *other != vm).unwrap();
                    bytes[range.clone()].copy_from_slice(&self.images[other][range]);
                }
                _ => {
                    let new = noise(self.rng.next(), range.len());
                    bytes[range].copy_from_slice(&new);
                }
            }
        }
        self.remember(&bytes);
        self.images.insert(vm, bytes.clone());
        bytes
    }

    /// Puts the blocks of an image that were never seen behind those in `live.img`.
    fn remember(&mut self, image: &[u8]) {
        let path = self.place.path("live.img");
        let mut file = std::fs::File::options().append(true).create(true).open(path).unwrap();
        let new = image.chunks(4096).filter(|block| self.blocks.insert(*blake3::hash(block).as_bytes()));
        new.for_each(|block| file.write_all(block).unwrap());
    }

    fn command(&mut self, words: &str) -> Begun<'a> {
        let process = self.place.start(words);
        Begun { victim: process.pid(), process, effect: Effect::Nothing, mount: None }
    }

    /// A new image in a file, and the name it is to get.
    fn source(&mut self, file: &str) -> (String, Vec<u8>) {
        let vm = VMS[self.rng.below(2) as usize];
        let bytes = self.evolve(vm);
        self.place.write(file, &bytes);
        (format!("{vm}/{:04}.img", self.round), bytes)
    }

    fn backup(&mut self) -> Begun<'a> {
        let (name, bytes) = self.source("source.img");
        let begun = self.command(&format!("backup store {name} source.img"));
        Begun { effect: Effect::Makes([(name, bytes)].into()), ..begun }
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
        let (name, bytes) = self.source("source.img");
        let (vm, _) = name.split_once('/').unwrap();
        let part = format!("mnt/{vm}/{:04}.part", self.round);
        let mount = self.place.mount("seal_after=1h");
        let line = format!("mkdir -p mnt/{vm} && cp source.img {part} && mv {part} mnt/{name}");
        let process = self.place.start_shell(&line);
        Begun { victim: mount.pid, process, effect: Effect::Makes([(name, bytes)].into()), mount: Some(mount) }
    }

    /// One VM with a disk more, and perhaps the other.
    fn batch(&mut self) -> Begun<'a> {
        let (name, bytes) = self.source("batch0.img");
        let vm = VMS.into_iter().find(|vm| name.starts_with(vm)).unwrap();
        let second = self.evolve(vm);
        self.place.write("batch1.img", &second);
        let mut lines = format!("{name}\tbatch0.img\n{vm}/xvdb/{:04}.img\tbatch1.img\n", self.round);
        let mut made = BTreeMap::from([(name, bytes), (format!("{vm}/xvdb/{:04}.img", self.round), second)]);
        let (other, bytes) = self.source("batch2.img");
        if made.insert(other.clone(), bytes.clone()).is_none() {
            lines.push_str(&format!("{other}\tbatch2.img\n"));
        } else {
            // The same name: the first source has it.
            self.place.write("batch0.img", &bytes);
        }
        self.place.write("job.tsv", lines.as_bytes());
        let begun = self.command("batch store job.tsv");
        Begun { effect: Effect::Makes(made), ..begun }
    }

    /// Some copies are damaged, and repaired from the others.
    fn repair(&mut self) -> Begun<'a> {
        if self.is_whole() {
            for _ in 0..1 + self.rng.below(3) {
                self.damage_copy();
            }
        }
        let begun = self.command("check store --read-data --repair");
        Begun { effect: Effect::Repairs, ..begun }
    }

    /// A frame is damaged wherever it is, and healed from an image that has all blocks.
    fn heal(&mut self) -> Begun<'a> {
        if self.targets.is_some() && !self.is_whole() {
            return self.repair();
        }
        for _ in 0..1 + self.rng.below(3) {
            self.damage_frame();
        }
        self.remember(&[]);
        let begun = self.command(HEAL);
        Begun { effect: Effect::Heals, ..begun }
    }

    fn change_targets(&mut self) -> Begun<'a> {
        let (folders, is_moving) = self.list_targets();
        let loss = self.targets.as_ref().unwrap().loss.clone();
        let path = |folder: &str| self.place.path(folder).display().to_string();
        let words = match loss {
            _ if is_moving => "target store settle".to_owned(),
            // It has all that counts elsewhere; from then on that has one copy.
            Some(Loss { folder, is_read_only: false }) if !self.targets.as_ref().unwrap().is_fragile => {
                self.targets.as_mut().unwrap().is_fragile = true;
                format!("target store remove {} --lost", path(&folder))
            }
            _ if folders.len() <= 3 => format!("target store add {}", path(&format!("t{}", 100 + self.round))),
            _ => {
                let at = self.rng.below(folders.len() as u64) as usize;
                format!("target store remove {}", path(&folders[at]))
            }
        };
        println!("  {}", words.split('/').next_back().unwrap());
        self.command(&words)
    }

    /// The folders of the targets, and whether objects are moving.
    fn list_targets(&self) -> (Vec<String>, bool) {
        let list = self.place.snapfs("target store list --json");
        assert_eq!(list.code, 0, "{}", list.err);
        let list = list.json();
        let folder = |row: &serde_json::Value| {
            Path::new(row["path"].as_str().unwrap()).file_name().unwrap().to_str().unwrap().to_owned()
        };
        (list["targets"].as_array().unwrap().iter().map(folder).collect(), list["moving"] == true)
    }

    /// Whether all objects have all of their copies, as far as is known.
    fn is_whole(&self) -> bool {
        let targets = self.targets.as_ref().unwrap();
        targets.loss.is_none() && !targets.is_fragile && !self.list_targets().1
    }

    /// The folders in which objects are.
    fn folders(&self) -> Vec<PathBuf> {
        match self.targets {
            Some(_) => self.list_targets().0.iter().map(|folder| self.place.path(folder)).collect(),
            None => vec![self.place.path("store")],
        }
    }

    /// Damages one of at least two equal copies.
    fn damage_copy(&mut self) {
        let folders = self.folders();
        let mut copies: BTreeMap<PathBuf, Vec<usize>> = BTreeMap::new();
        for (at, folder) in folders.iter().enumerate() {
            for name in objects_in(folder) {
                copies.entry(name).or_default().push(at);
            }
        }
        copies.retain(|_, at| at.len() > 1);
        let Some((name, at)) = copies.iter().nth(self.rng.below(copies.len() as u64) as usize) else { return };
        let at = at[self.rng.below(at.len() as u64) as usize];
        let path = folders[at].join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        if copies[name].iter().any(|other| std::fs::read(folders[*other].join(name)).unwrap() != bytes) {
            // Of a killed writer, or damaged already.
            return;
        }
        let middle = self.rng.below(bytes.len() as u64) as usize;
        println!("  damages {} on {at}", name.display());
        std::fs::remove_file(&path).unwrap();
        match self.rng.below(3) {
            0 => {}
            1 => std::fs::write(&path, &bytes[..middle]).unwrap(),
            _ => {
                bytes[middle] ^= 0x20;
                std::fs::write(&path, &bytes).unwrap();
            }
        }
        self.targets.as_mut().unwrap().is_fragile = true;
    }

    /// Damages a frame of a data pack in all copies.
    fn damage_frame(&mut self) {
        let folders = self.folders();
        let packs: Vec<PathBuf> = objects_in(&folders[0]).into_iter().filter(|name| is_in(name, "packs")).collect();
        if packs.is_empty() {
            return;
        }
        let name = &packs[self.rng.below(packs.len() as u64) as usize];
        let bytes = std::fs::read(folders[0].join(name)).unwrap();
        // One that cannot be read is no log's: damaged when it was one's, or a killed writer's, and not worth a repair.
        let Some(index) = pack_index(&bytes) else { return };
        let frames: Vec<u64> = index.members.iter().flat_map(|member| member.offsets.iter().copied()).collect();
        if index.identity.content != Content::Data || frames.is_empty() {
            return;
        }
        let at = frames[self.rng.below(frames.len() as u64) as usize] as usize + 10;
        println!("  damages {} at {at}", name.display());
        for folder in &folders {
            let path = folder.join(name);
            let Ok(mut bytes) = std::fs::read(&path) else { continue };
            bytes[at] ^= 0x20;
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
    }

    /// Takes a target away, or the right to write to it.
    fn lose(&mut self) {
        let (folders, _) = self.list_targets();
        let folder = folders[self.rng.below(folders.len() as u64) as usize].clone();
        let is_read_only = is_root() && self.rng.below(2) == 0;
        println!("  loses {folder}, read-only: {is_read_only}");
        if is_read_only {
            self.place.shell(&format!("mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}")).ok();
        } else {
            std::fs::rename(self.place.path(&folder), self.place.path(&format!("{folder}.away"))).unwrap();
        }
        let targets = self.targets.as_mut().unwrap();
        targets.loss = Some(Loss { folder, is_read_only });
        targets.losses += 1;
        // With a quorum of one, what is written now is on one target.
        targets.is_fragile |= targets.quorum == 1;
    }

    /// The lost target is there again, as it was.
    fn find_again(&mut self) {
        let Some(loss) = self.targets.as_mut().and_then(|targets| targets.loss.take()) else { return };
        println!("  finds {} again", loss.folder);
        let folder = &loss.folder;
        if loss.is_read_only {
            self.place.shell(&format!("umount {folder} || umount -l {folder}")).ok();
        } else {
            std::fs::rename(self.place.path(&format!("{folder}.away")), self.place.path(folder)).unwrap();
        }
    }

    /// Whether a target may be lost now.
    fn can_lose(&self) -> bool {
        self.targets.as_ref().is_some_and(|targets| targets.loss.is_none() && !targets.is_fragile)
    }

    /// Runs a command, kills it at a moment by chance, and judges what is left; whether it came to its end.
    fn run(&mut self, verb: &Verb, usual: &mut Duration) -> bool {
        if self.rng.below(3) == 0 {
            self.find_again();
            self.repair_whole();
        }
        let clock = SystemClock::new();
        let mut begun = (verb.begin)(self);
        let began = clock.elapsed();
        let wait = usual.mul_f64(self.rng.below(1300) as f64 / 1000.0);
        let loses = self.rng.below(3) == 0 && self.can_lose() && !matches!(begun.effect, Effect::Heals);
        let mut lose_after = loses.then(|| usual.mul_f64(self.rng.below(1000) as f64 / 1000.0));
        while !begun.process.has_ended() && clock.elapsed() - began < wait {
            if lose_after.is_some_and(|after| clock.elapsed() - began >= after) {
                lose_after = None;
                self.lose();
            }
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
            let usual_code = if is_empty { 3 } else { 0 };
            let has_loss = self.targets.as_ref().is_some_and(|targets| targets.loss.is_some());
            let may_fail = has_loss && [1, 4].contains(&done.code) && !done.err.contains("internal error");
            assert!(
                done.code == usual_code || may_fail,
                "{}: {}: {}{}",
                done.command,
                done.code,
                done.text(),
                done.err
            );
            // The first of them begins the measure.
            *usual = if *usual == USUAL { took } else { (*usual + took) / 2 };
        } else if wait > *usual {
            // It takes longer than was thought; else it would never come to its end.
            *usual = wait * 3 / 2;
        }
        if lose_after.is_some() {
            self.lose();
        }
        let is_lost_meanwhile = loses && self.targets.as_ref().is_some_and(|targets| targets.quorum == 1);
        match &begun.effect {
            Effect::Heals => {
                let again = self.place.snapfs(HEAL);
                assert_eq!(again.code, 0, "healed at last: {}{}", again.text(), again.err);
            }
            Effect::Repairs if is_whole && done.code == 0 => self.is_repaired(),
            _ => {}
        }
        self.judge(begun.effect, done.code == 0 && !is_lost_meanwhile);
        is_whole
    }

    /// With all targets there, copies that are missing are put back, so that a target may be lost again.
    fn repair_whole(&mut self) {
        if self.targets.as_ref().is_some_and(|targets| targets.loss.is_none() && targets.is_fragile) {
            let done = self.place.snapfs("check store --read-data --repair");
            assert_eq!(done.code, 0, "{}{}", done.text(), done.err);
            self.is_repaired();
        }
    }

    /// A repair came to its end: everything has all copies, and what was seen last is what is.
    fn is_repaired(&mut self) {
        let Some(targets) = self.targets.as_mut().filter(|targets| targets.loss.is_none()) else { return };
        targets.is_fragile = false;
        let listed = self.listed();
        let unsure = std::mem::take(&mut self.unsure);
        self.snapshots.extend(unsure.into_iter().filter(|(name, _)| listed.contains(name)));
        let check = self.place.snapfs("check store --read-data");
        assert_eq!(check.code, 0, "after a repair: {}{}", check.text(), check.err);
    }

    fn listed(&self) -> BTreeSet<String> {
        let list = self.place.snapfs("list store --json");
        assert_eq!(list.code, 0, "{}", list.err);
        list.json().as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
    }

    fn judge(&mut self, effect: Effect, is_acknowledged: bool) {
        let check = self.place.snapfs("check store --read-data --json");
        if self.targets.is_some() {
            // Copies may be missing, and targets away.
            assert!([0, 4].contains(&check.code), "check: {}{}", check.text(), check.err);
            assert_eq!(check.json()["damaged"], 0, "check: {}{}", check.text(), check.err);
        } else {
            assert_eq!(check.code, 0, "check: {}{}", check.text(), check.err);
        }
        let listed = self.listed();
        match effect {
            Effect::Makes(made) => {
                for vm in VMS {
                    let of_vm: Vec<_> = made.keys().filter(|name| name.starts_with(vm)).collect();
                    let there = of_vm.iter().filter(|name| listed.contains(**name)).count();
                    assert!(there == 0 || there == of_vm.len(), "{there} of {of_vm:?} are visible");
                }
                (if is_acknowledged { &mut self.snapshots } else { &mut self.unsure }).extend(made);
            }
            Effect::Forgets(names) => {
                for name in names {
                    let bytes = self.snapshots.remove(&name).unwrap();
                    if !is_acknowledged {
                        self.unsure.insert(name, bytes);
                    }
                }
            }
            Effect::Nothing | Effect::Repairs | Effect::Heals => {}
        }
        if self.targets.is_none() {
            // One folder: what is there is there.
            let unsure = std::mem::take(&mut self.unsure);
            self.snapshots.extend(unsure.into_iter().filter(|(name, _)| listed.contains(name)));
        }
        let missing: Vec<_> = self.snapshots.keys().filter(|name| !listed.contains(*name)).collect();
        assert!(missing.is_empty(), "acknowledged, and not listed: {missing:?} of {listed:?}");
        for name in &listed {
            // `check` has proven all against their digests; these against what was written.
            let wanted = self.snapshots.get(name).or_else(|| self.unsure.get(name));
            let wanted = wanted.unwrap_or_else(|| panic!("{name} is listed, and should not be there"));
            let restored = self.place.snapfs(&format!("restore store {name} -"));
            assert_eq!(restored.code, 0, "{name}: {}", restored.err);
            same(&restored.out, wanted, name);
        }
    }
}

impl Drop for Rounds<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keep();
        }
        if self.targets.is_some() {
            self.place.shell("for target in t*; do umount -l $target 2>/dev/null; done");
        }
    }
}

impl Rounds<'_> {
    /// A store that was found broken is kept where the environment says, to be looked at.
    fn keep(&self) {
        if let Some(folder) = std::env::var_os("SNAPFS_KILL_KEEP") {
            let folder = folder.to_str().unwrap();
            self.place.shell(&format!("rm -rf {folder} && cp -a . {folder}"));
        }
    }
}

const HEAL: &str = "check store --repair --from live.img";

fn is_in(name: &Path, folder: &str) -> bool {
    name.components().any(|part| part.as_os_str() == folder)
}

/// The objects in a folder, by their keys, which say where they belong.
fn objects_in(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.join("vms"), folder.join("common")];
    while let Some(next) = open.pop() {
        let Ok(rows) = std::fs::read_dir(next) else { continue };
        for row in rows.map(Result::unwrap) {
            match row.file_type().unwrap().is_dir() {
                true => open.push(row.path()),
                false => found.push(row.path().strip_prefix(folder).unwrap().to_owned()),
            }
        }
    }
    found.retain(|name| ["log", "packs", "snapshots"].iter().any(|kind| is_in(name, kind)));
    found.sort();
    found
}

fn pack_index(bytes: &[u8]) -> Option<PackIndex> {
    let trailer = bytes.last_chunk::<TRAILER_BYTES>()?;
    let tail = PackIndex::tail_bytes_from_trailer(trailer).ok()? as usize;
    PackIndex::decode_tail(&bytes[bytes.len().checked_sub(tail)?..], bytes.len() as u64).ok()
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

fn play(test: &str, targets: Option<Targets>) {
    let can_mount = can_mount();
    if let Err(why) = &can_mount {
        skip(test, &format!("the mount is left out: {why}"));
    }
    let is_possible = |verb: &&Verb| match verb.needs {
        Needs::Nothing => true,
        Needs::Mount => can_mount.is_ok(),
        Needs::Targets => targets.is_some(),
    };
    let verbs: Vec<&Verb> = VERBS.iter().filter(is_possible).collect();
    let (count, seed) = (number("SNAPFS_KILL_ROUNDS", ROUNDS), number("SNAPFS_KILL_SEED", 1));
    let place = Place::without_store();
    match &targets {
        None => place.snapfs("init store").ok(),
        Some(Targets { quorum, .. }) => {
            let paths = ["t0", "t1", "t2"].map(|name| format!("--target {}", place.path(name).display())).join(" ");
            place.snapfs(&format!("init store {paths} --vm-replicas 2 --common-replicas 2")).ok();
            if *quorum == 1 {
                place.snapfs("target store set --quorum 1").ok();
            }
            place.snapfs("target store list")
        }
    };
    let mut rounds = Rounds::new(&place, seed, targets);
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
    if let Some(targets) = &rounds.targets {
        println!("targets lost {} times", targets.losses);
    }
    assert!(tally.values().map(|(killed, _)| killed).sum::<u64>() > 0, "nobody was killed: the test is no test");
    rounds.end();
    let live: usize = rounds.snapshots.values().map(Vec::len).sum();
    println!("{} snapshots, {} MiB", rounds.snapshots.len(), live / MIB);
}

impl Rounds<'_> {
    /// All targets are back, and what was cut off goes on: then all is whole, and what the killed ones left is found and
    /// freed, and nothing else is.
    fn end(&mut self) {
        self.find_again();
        if self.targets.is_some() {
            let settled = self.place.snapfs("target store settle");
            assert_eq!(settled.code, 0, "{}", settled.err);
            let repaired = self.place.snapfs("check store --read-data --repair");
            assert_eq!(repaired.code, 0, "{}{}", repaired.text(), repaired.err);
            self.is_repaired();
        }
        // Jobs that were cut off are never finished.
        let _ = std::fs::remove_dir_all(self.place.path("store/derived/jobs"));
        // Common packs go in three runs: of the VMs' own, condemned, deleted.
        for _ in 0..3 {
            self.place.snapfs("gc store --exact").ok();
        }
        let idle = self.place.snapfs("gc store --exact --json").ok().json();
        assert!(idle["vms"].as_array().unwrap().iter().all(|vm| vm["idle"] == true), "{idle}");
        self.judge(Effect::Nothing, true);
        self.place.snapfs("check store --read-data").ok();
    }
}

#[test]
fn nothing_is_lost_whatever_is_killed() {
    play("kills::nothing_is_lost_whatever_is_killed", None);
}

#[test]
fn nothing_is_lost_when_targets_are_lost_too() {
    let targets = Targets { quorum: 2, ..Targets::default() };
    play("kills::nothing_is_lost_when_targets_are_lost_too", Some(targets));
}

#[test]
fn nothing_is_lost_when_one_copy_counts() {
    let targets = Targets { quorum: 1, ..Targets::default() };
    play("kills::nothing_is_lost_when_one_copy_counts", Some(targets));
}
