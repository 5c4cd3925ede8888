//! The overlay against a model, under parallel writers, and after a crash at every single operation on its files.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crate::clones::blocks::Blocks;
use crate::clones::file::{LocalFile, OsFile};
use crate::clones::map::{CloneId, ENTRY_BYTES, End, Entry, Header, append, load, write};
use crate::clones::{Base, MapMemory, Overlay};
use crate::error::{Error, ErrorKind, Result, corrupt};

const BLOCK: usize = 4096;
const CLONE: CloneId = CloneId([9; 16]);

/// Forty blocks and a part of one; every fifth block of the base is a hole.
const IMAGE_BYTES: usize = 40 * BLOCK + 700;

struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) % end.max(1)
    }
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

struct Pattern(Vec<u8>);

impl Pattern {
    fn new() -> Self {
        let mut bytes = noise(0, IMAGE_BYTES);
        bytes.chunks_mut(BLOCK).step_by(5).for_each(|block| block.fill(0));
        Self(bytes)
    }
    fn seek(&self, offset: u64, data: bool) -> u64 {
        let mut at = offset as usize;
        while at < self.0.len() && ((at / BLOCK).is_multiple_of(5) == data) {
            at = (at / BLOCK + 1) * BLOCK;
        }
        at.min(self.0.len()) as u64
    }
}

impl Base for Pattern {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        out.copy_from_slice(&self.0[offset as usize..][..out.len()]);
        Ok(())
    }
    fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        let found = self.seek(offset, true);
        Ok((found < self.bytes()).then_some(found))
    }
    fn seek_hole(&self, offset: u64) -> Result<u64> {
        Ok(self.seek(offset, false))
    }
}

/// What happens at which operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Everything ends before it.
    Crash,
    /// It fails with half of it done; what follows works.
    Full,
    /// As `Full`, if it is a sync; nothing of what it should have synced need be there.
    LostSync,
}

/// Counts operations over all files, and says when one fails.
#[derive(Debug)]
struct Trigger {
    fault: Option<(Fault, u64)>,
    count: Mutex<u64>,
}

impl Trigger {
    fn new(fault: Option<(Fault, u64)>) -> Arc<Self> {
        Arc::new(Self { fault, count: Mutex::new(0) })
    }

    fn next(&self) -> Option<Fault> {
        let mut count = self.count.lock().unwrap();
        *count += 1;
        match self.fault {
            Some((Fault::Crash, at)) if *count > at => Some(Fault::Crash),
            Some((fault, at)) if *count == at + 1 => Some(fault),
            _ => None,
        }
    }
}

/// A file that knows what of it is durable, in units that are written as a whole: a page of the data file, as the kernel
/// writes pages; a sector of the map, which is the worst that a disk does.
#[derive(Debug, Clone)]
struct Content {
    unit: usize,
    now: Vec<u8>,
    durable: Vec<u8>,
    // Since the last sync: every state that a unit was in, and every length.
    versions: BTreeMap<usize, Vec<Vec<u8>>>,
    lengths: Vec<usize>,
}

impl Content {
    fn new(unit: usize) -> Self {
        Self { unit, now: Vec::new(), durable: Vec::new(), versions: BTreeMap::new(), lengths: Vec::new() }
    }

    fn note(&mut self, from: usize, until: usize) {
        for unit in from / self.unit..until.div_ceil(self.unit) {
            let end = ((unit + 1) * self.unit).min(self.now.len());
            let mut version = self.now.get(unit * self.unit..end).unwrap_or_default().to_vec();
            version.resize(self.unit, 0);
            self.versions.entry(unit).or_default().push(version);
        }
        self.lengths.push(self.now.len());
    }

    fn sync(&mut self) {
        self.durable.clone_from(&self.now);
        self.versions.clear();
        self.lengths.clear();
    }

    /// What is on the disk after the power failed: for each unit and the length any state since the last sync.
    fn crashed(&self, choose: &mut dyn FnMut(usize) -> usize) -> Self {
        let mut now = self.durable.clone();
        for (unit, versions) in &self.versions {
            let Some(chosen) = choose(versions.len() + 1).checked_sub(1) else { continue };
            now.resize(now.len().max((unit + 1) * self.unit), 0);
            now[unit * self.unit..][..self.unit].copy_from_slice(&versions[chosen]);
        }
        let length = choose(self.lengths.len() + 1).checked_sub(1).map_or(self.durable.len(), |n| self.lengths[n]);
        now.resize(length, 0);
        let mut content = Self::new(self.unit);
        content.now.clone_from(&now);
        content.durable = now;
        content
    }
}

#[derive(Debug, Clone)]
struct Fragile {
    content: Arc<Mutex<Content>>,
    trigger: Arc<Trigger>,
}

impl Fragile {
    fn new(unit: usize, trigger: &Arc<Trigger>) -> Self {
        Self { content: Arc::new(Mutex::new(Content::new(unit))), trigger: trigger.clone() }
    }

    fn of(content: Content, trigger: &Arc<Trigger>) -> Self {
        Self { content: Arc::new(Mutex::new(content)), trigger: trigger.clone() }
    }

    fn failed(fault: Fault) -> Error {
        let kind = if fault == Fault::Full { ErrorKind::NoSpace } else { ErrorKind::Unavailable };
        Error::new(kind, "the test's disk")
    }
}

impl LocalFile for Fragile {
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let content = self.content.lock().unwrap();
        let from = content.now.get(offset as usize..).and_then(|rest| rest.get(..out.len()));
        out.copy_from_slice(from.ok_or_else(|| corrupt("ends early"))?);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let fault = self.trigger.next();
        let written = match fault {
            Some(Fault::Crash) => return Err(Self::failed(Fault::Crash)),
            Some(_) => bytes.len() / 2,
            None => bytes.len(),
        };
        let mut content = self.content.lock().unwrap();
        let (from, until) = (offset as usize, offset as usize + written);
        if content.now.len() < until {
            content.now.resize(until, 0);
        }
        content.now[from..until].copy_from_slice(&bytes[..written]);
        content.note(from, until);
        fault.map_or(Ok(()), |_| Err(Self::failed(Fault::Full)))
    }

    fn zero(&self, offset: u64, bytes: u64) -> Result<()> {
        self.write_at(offset, &vec![0; bytes as usize])
    }

    fn reserve(&self, _offset: u64, _bytes: u64) -> Result<()> {
        self.trigger.next().map_or(Ok(()), |fault| Err(Self::failed(fault)))
    }

    fn set_len(&self, bytes: u64) -> Result<()> {
        if let Some(fault) = self.trigger.next() {
            return Err(Self::failed(fault));
        }
        let mut content = self.content.lock().unwrap();
        let old = content.now.len();
        content.now.resize(bytes as usize, 0);
        content.note(old.min(bytes as usize), old.max(bytes as usize));
        Ok(())
    }

    fn bytes(&self) -> Result<u64> {
        Ok(self.content.lock().unwrap().now.len() as u64)
    }

    fn sync(&self) -> Result<()> {
        if let Some(fault) = self.trigger.next() {
            return Err(Self::failed(fault));
        }
        self.content.lock().unwrap().sync();
        Ok(())
    }

    fn next(&self, offset: u64, data: bool) -> Result<u64> {
        let content = self.content.lock().unwrap();
        let is_data = |at: usize| content.now[at..].iter().take(BLOCK - at % BLOCK).any(|b| *b != 0);
        let mut at = offset as usize;
        while at < content.now.len() && is_data(at) != data {
            at = (at / BLOCK + 1) * BLOCK;
        }
        Ok(at.min(content.now.len()) as u64)
    }
}

/// The two files of a new clone, all durable.
fn new_files(trigger: &Arc<Trigger>) -> (Fragile, Fragile) {
    let quiet = Trigger::new(None);
    let (data, map) = (Fragile::new(BLOCK, &quiet), Fragile::new(512, &quiet));
    data.set_len(IMAGE_BYTES as u64).unwrap();
    data.sync().unwrap();
    write(&map, CLONE, IMAGE_BYTES as u64, &Blocks::default()).unwrap();
    (Fragile { trigger: trigger.clone(), ..data }, Fragile { trigger: trigger.clone(), ..map })
}

fn memory() -> Arc<MapMemory> {
    Arc::new(MapMemory::new(1 << 20))
}

fn open(data: &Fragile, map: &Fragile) -> Result<Overlay> {
    Overlay::open("test", CLONE, IMAGE_BYTES as u64, Box::new(data.clone()), Arc::new(map.clone()), memory())
}

fn all(overlay: &Overlay, base: &Pattern) -> Vec<u8> {
    let mut out = vec![0xee; IMAGE_BYTES];
    overlay.read_at(base, 0, &mut out).unwrap();
    out
}

/// A step of a script.
#[derive(Debug, Clone)]
enum Step {
    Write { offset: usize, bytes: Vec<u8> },
    Zero { offset: usize, bytes: usize },
    Flush,
}

fn script(seed: u64, steps: u64) -> Vec<Step> {
    let mut rng = Rng::new(seed);
    let lengths = [1, 512, 4096, 4096, 8192, 5000, 20_000];
    let steps = (0..steps).map(|step| {
        let mut offset = rng.below(IMAGE_BYTES as u64) as usize;
        if rng.below(2) == 0 {
            offset -= offset % [512, BLOCK][rng.below(2) as usize];
        }
        let length = lengths[rng.below(lengths.len() as u64) as usize].min(IMAGE_BYTES - offset);
        match rng.below(10) {
            0..=5 => Step::Write { offset, bytes: noise(seed * 1000 + step + 1, length) },
            6..=7 => Step::Zero { offset, bytes: length },
            _ => Step::Flush,
        }
    });
    steps.chain([Step::Flush]).collect()
}

/// What each block may be after a crash: as of the last flush, or as of anything since.
struct Model {
    now: Vec<u8>,
    allowed: Vec<Vec<Vec<u8>>>,
}

impl Model {
    fn new(base: &Pattern) -> Self {
        let mut model = Self { now: base.0.clone(), allowed: Vec::new() };
        model.flushed();
        model
    }

    fn flushed(&mut self) {
        self.allowed = self.now.chunks(BLOCK).map(|block| vec![block.to_vec()]).collect();
    }

    /// A write has begun; it may be done in part, block by block.
    fn begun(&mut self, offset: usize, bytes: &[u8]) {
        let mut next = self.now.clone();
        next[offset..offset + bytes.len()].copy_from_slice(bytes);
        for block in offset / BLOCK..(offset + bytes.len()).div_ceil(BLOCK) {
            let end = ((block + 1) * BLOCK).min(IMAGE_BYTES);
            self.allowed[block].push(next[block * BLOCK..end].to_vec());
        }
    }

    fn done(&mut self, offset: usize, bytes: &[u8]) {
        self.now[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn check(&self, got: &[u8], about: &str) {
        for (block, bytes) in got.chunks(BLOCK).enumerate() {
            assert!(self.allowed[block].iter().any(|a| a == bytes), "{about}: block {block} is what it never was");
        }
    }
}

/// Runs a script until it is done or a crash. Steps that fail otherwise leave their blocks old or new.
fn run(overlay: &Overlay, base: &Pattern, model: &mut Model, steps: &[Step], fault: Option<Fault>) {
    for step in steps {
        let (offset, bytes) = match step {
            Step::Write { offset, bytes } => (*offset, bytes.clone()),
            Step::Zero { offset, bytes } => (*offset, vec![0; *bytes]),
            Step::Flush => {
                match overlay.flush() {
                    Ok(()) => model.flushed(),
                    Err(e) if fault == Some(Fault::Full) => assert_eq!(e.kind(), ErrorKind::NoSpace),
                    Err(_) => {}
                }
                continue;
            }
        };
        model.begun(offset, &bytes);
        let done = match step {
            Step::Zero { .. } => overlay.zero(base, offset as u64, bytes.len() as u64),
            _ => overlay.write_at(base, offset as u64, &bytes),
        };
        match done {
            Ok(()) => model.done(offset, &bytes),
            // The file has whatever was written of it.
            Err(_) => {
                let mut now = vec![0; IMAGE_BYTES];
                overlay.read_at(base, 0, &mut now).unwrap();
                for block in offset / BLOCK..(offset + bytes.len()).div_ceil(BLOCK) {
                    let end = ((block + 1) * BLOCK).min(IMAGE_BYTES);
                    // Half a write may leave half a block, as on any disk.
                    model.allowed[block].push(now[block * BLOCK..end].to_vec());
                }
                model.now = now;
            }
        }
    }
}

#[test]
fn it_equals_a_vector_of_bytes() {
    let base = Pattern::new();
    for seed in 0..300 {
        let trigger = Trigger::new(None);
        let (data, map) = new_files(&trigger);
        let mut overlay = open(&data, &map).unwrap();
        let mut model = Model::new(&base);
        let mut rng = Rng::new(seed + 77);
        for step in script(seed, 40) {
            run(&overlay, &base, &mut model, std::slice::from_ref(&step), None);
            let offset = rng.below(IMAGE_BYTES as u64) as usize;
            let length = rng.below((IMAGE_BYTES - offset) as u64 + 1) as usize;
            let mut out = vec![0xee; length];
            overlay.read_at(&base, offset as u64, &mut out).unwrap();
            assert!(out == model.now[offset..][..length], "seed {seed} after {step:?}");
            if let Step::Flush = step {
                overlay = open(&data, &map).unwrap();
                assert!(all(&overlay, &base) == model.now, "seed {seed}: opened again");
            }
        }
        check_holes(&overlay, &base, &model.now);
    }
}

fn check_holes(overlay: &Overlay, base: &Pattern, now: &[u8]) {
    let mut seen = vec![false; now.len().div_ceil(BLOCK)];
    let mut at = 0;
    while let Some(start) = overlay.seek_data(base, at).unwrap() {
        let end = overlay.seek_hole(base, start).unwrap();
        assert!(end > start && start >= at);
        (start as usize / BLOCK..(end as usize).div_ceil(BLOCK)).for_each(|block| seen[block] = true);
        at = end;
    }
    for (block, bytes) in now.chunks(BLOCK).enumerate() {
        assert_eq!(seen[block], bytes.iter().any(|b| *b != 0), "block {block}");
    }
}

/// Ways in which the disk may have chosen among the states since the last sync.
fn choices() -> Vec<Box<dyn FnMut(usize) -> usize>> {
    let mut choices: Vec<Box<dyn FnMut(usize) -> usize>> = vec![
        Box::new(|_| 0),
        Box::new(|count| count - 1),
        // Only the length is new, and only the content is.
        Box::new({
            let mut calls = 0;
            move |count| {
                calls += 1;
                if calls % 2 == 0 { 0 } else { count - 1 }
            }
        }),
    ];
    for seed in 0..5 {
        let mut rng = Rng::new(seed);
        choices.push(Box::new(move |count| rng.below(count as u64) as usize));
    }
    choices
}

/// The files after a loss of power; opened as the next daemon does. The data, and the map that is used then.
fn recover(data: &Fragile, map: &Fragile, choose: &mut dyn FnMut(usize) -> usize) -> (Fragile, Fragile, Overlay) {
    let quiet = Trigger::new(None);
    let data = Fragile::of(data.content.lock().unwrap().crashed(choose), &quiet);
    let map = Fragile::of(map.content.lock().unwrap().crashed(choose), &quiet);
    let overlay = open(&data, &map).unwrap();
    if !overlay.load(Arc::new(map.clone())).unwrap() {
        return (data, map, overlay);
    }
    let new = Fragile::new(512, &quiet);
    overlay.write_map(&new).unwrap();
    assert!(!overlay.load(Arc::new(new.clone())).unwrap(), "a map that was written anew is torn");
    (data, new, overlay)
}

/// After a recovery nothing of the lost writes may come back by what is written then, and all of that is kept.
fn go_on(data: &Fragile, map: &Fragile, overlay: &Overlay, base: &Pattern) {
    let mut now = all(overlay, base);
    for block in 0..IMAGE_BYTES.div_ceil(BLOCK) {
        let offset = block * BLOCK + 100;
        overlay.write_at(base, offset as u64, b"patch").unwrap();
        now[offset..offset + 5].copy_from_slice(b"patch");
        if block % 10 == 9 {
            overlay.flush().unwrap();
        }
    }
    assert!(all(overlay, base) == now, "a partial write brought something else along");
    overlay.flush().unwrap();
    assert!(all(&open(data, map).unwrap(), base) == now, "what was flushed after a recovery is not there");
}

#[test]
fn i9_a_crash_at_every_operation_leaves_what_was_flushed() {
    let base = Pattern::new();
    let mut crashes = 0;
    for seed in 0..6 {
        let steps = script(seed, 30);
        for at in 0.. {
            let trigger = Trigger::new(Some((Fault::Crash, at)));
            let (data, map) = new_files(&trigger);
            let overlay = open(&data, &map).unwrap();
            let mut model = Model::new(&base);
            run(&overlay, &base, &mut model, &steps, Some(Fault::Crash));
            for (number, mut choose) in choices().into_iter().enumerate() {
                let (data, map, again) = recover(&data, &map, &mut choose);
                let about = format!("seed {seed}, crash at {at}, choice {number}");
                model.check(&all(&again, &base), &about);
                go_on(&data, &map, &again, &base);
                crashes += 1;
            }
            if *trigger.count.lock().unwrap() <= at {
                break;
            }
        }
    }
    assert!(crashes > 1000, "{crashes} crashes");
}

#[test]
fn i9_a_full_disk_at_every_operation_loses_nothing_that_was_flushed() {
    let base = Pattern::new();
    for seed in 0..6 {
        let steps = script(seed, 30);
        for at in 0.. {
            let trigger = Trigger::new(Some((Fault::Full, at)));
            let (data, map) = new_files(&trigger);
            let overlay = open(&data, &map).unwrap();
            let mut model = Model::new(&base);
            run(&overlay, &base, &mut model, &steps, None);
            for (number, mut choose) in choices().into_iter().enumerate() {
                let (_, _, again) = recover(&data, &map, &mut choose);
                model.check(&all(&again, &base), &format!("seed {seed}, full at {at}, choice {number}"));
            }
            if *trigger.count.lock().unwrap() <= at {
                break;
            }
        }
    }
}

#[test]
fn after_a_sync_that_failed_nothing_is_called_durable() {
    let base = Pattern::new();
    for seed in 0..6 {
        let steps = script(seed, 30);
        let mut lost = 0;
        for at in 0.. {
            let trigger = Trigger::new(Some((Fault::LostSync, at)));
            let (data, map) = new_files(&trigger);
            let overlay = open(&data, &map).unwrap();
            let mut model = Model::new(&base);
            run(&overlay, &base, &mut model, &steps, None);
            if overlay.is_lost.load(Ordering::SeqCst) {
                lost += 1;
                assert_eq!(overlay.flush().unwrap_err().kind(), ErrorKind::Unavailable);
                assert_eq!(overlay.write_at(&base, 0, b"x").unwrap_err().kind(), ErrorKind::Unavailable);
            }
            for mut choose in choices() {
                let (_, _, again) = recover(&data, &map, &mut choose);
                model.check(&all(&again, &base), &format!("seed {seed}, lost at {at}"));
            }
            if *trigger.count.lock().unwrap() <= at {
                break;
            }
        }
        assert!(lost > 0, "no sync failed");
    }
}

/// A base that takes its time, so that others come in between.
struct Slow(Pattern);

impl Base for Slow {
    fn bytes(&self) -> u64 {
        self.0.bytes()
    }
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        std::thread::sleep(std::time::Duration::from_micros(200));
        self.0.read_at(offset, out)
    }
    fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        self.0.seek_data(offset)
    }
    fn seek_hole(&self, offset: u64) -> Result<u64> {
        self.0.seek_hole(offset)
    }
}

#[test]
fn parallel_writers_of_one_block_lose_nothing() {
    let base = Slow(Pattern::new());
    let trigger = Trigger::new(None);
    let (data, map) = new_files(&trigger);
    let overlay = open(&data, &map).unwrap();
    let sectors = IMAGE_BYTES / 512;
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let (overlay, base) = (&overlay, &base);
            scope.spawn(move || {
                for sector in (0..sectors).filter(|s| s % 8 == writer) {
                    let bytes = noise(sector as u64 + 1, 512);
                    overlay.write_at(base, sector as u64 * 512, &bytes).unwrap();
                    let mut out = [0; 512];
                    overlay.read_at(base, sector as u64 * 512, &mut out).unwrap();
                    assert!(out[..] == bytes[..], "sector {sector}");
                    if sector % 32 == writer {
                        overlay.flush().unwrap();
                    }
                }
            });
        }
    });
    overlay.flush().unwrap();
    let overlay = open(&data, &map).unwrap();
    let out = all(&overlay, &base.0);
    for sector in 0..sectors {
        assert!(out[sector * 512..][..512] == noise(sector as u64 + 1, 512)[..], "sector {sector}");
    }
    assert!(out[sectors * 512..] == base.0.0[sectors * 512..]);
}

#[test]
fn what_lies_outside_of_the_image_is_refused() {
    let base = Pattern::new();
    let trigger = Trigger::new(None);
    let (data, map) = new_files(&trigger);
    let overlay = open(&data, &map).unwrap();
    let end = IMAGE_BYTES as u64;
    for (offset, bytes) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2)] {
        assert_eq!(overlay.write_at(&base, offset, &vec![1; bytes]).unwrap_err().kind(), ErrorKind::TooLarge);
        assert_eq!(overlay.zero(&base, offset, bytes as u64).unwrap_err().kind(), ErrorKind::TooLarge);
        assert_eq!(overlay.read_at(&base, offset, &mut vec![0; bytes]).unwrap_err().kind(), ErrorKind::Invalid);
    }
    overlay.write_at(&base, end, &[]).unwrap();
    overlay.zero(&base, end, 0).unwrap();
    assert_eq!(overlay.blocks_local(), 0);
    data.set_len(end - 1).unwrap();
    assert_eq!(open(&data, &map).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn i8_the_map_takes_no_more_memory_than_it_may() {
    let base = Pattern::new();
    let trigger = Trigger::new(None);
    let (data, map) = new_files(&trigger);
    let memory = Arc::new(MapMemory::new(10));
    let overlay =
        Overlay::open("test", CLONE, IMAGE_BYTES as u64, Box::new(data), Arc::new(map.clone()), memory.clone())
            .unwrap();
    overlay.write_at(&base, 0, &[1; BLOCK]).unwrap();
    overlay.count_memory(&mut overlay.state_mut());
    let refused = overlay.write_at(&base, 8 * BLOCK as u64, &[1; BLOCK]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
    assert!(refused.to_string().contains("max_memory"), "{refused}");
    // What is local already can be written, and all can be flushed.
    overlay.write_at(&base, 0, &[2; BLOCK]).unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    assert_eq!(memory.used.load(Ordering::Relaxed), 0);
}

#[test]
fn a_bad_entry_is_damage_unless_it_may_be_unfinished() {
    let trigger = Trigger::new(None);
    let map = Fragile::new(512, &trigger);
    let mut begun = Blocks::default();
    begun.insert(2..4);
    begun.insert(400..401);
    let mut end = write(&map, CLONE, 1 << 30, &begun).unwrap();
    assert_eq!(end, End { entries: 3, round: 1 });
    // Rounds of one, two and three entries.
    for round in 2..5_u64 {
        let mut blocks = Blocks::default();
        (0..round - 1).for_each(|n| blocks.insert(round * 10_000 + n * 1000..round * 10_000 + n * 1000 + 3));
        end = append(&map, CLONE, end, &blocks).unwrap();
    }
    assert_eq!(end, End { entries: 9, round: 4 });
    let whole = map.content.lock().unwrap().now.clone();
    let loaded = |bytes: &[u8]| {
        let file = Fragile::new(512, &trigger);
        file.write_at(0, bytes).unwrap();
        load(&file, CLONE, 1 << 30).map(|loaded| (loaded.blocks.count(), loaded.is_torn))
    };
    assert_eq!(loaded(&whole).unwrap(), (21, false));
    // The last round has the entries 6, 7 and 8. Anything may be wrong with it, and nothing with those before.
    for entry in 0..9 {
        for bit in [0, 70, 200, 8 * ENTRY_BYTES - 1] {
            let mut bad = whole.clone();
            bad[entry * ENTRY_BYTES + bit / 8] ^= 1 << (bit % 8);
            match loaded(&bad) {
                Ok((count, is_torn)) => {
                    assert!(entry >= 6 && is_torn, "entry {entry}");
                    assert_eq!(count, 12 + 3 * (entry as u64 - 6));
                }
                Err(e) => assert!(entry < 6 && e.kind() == ErrorKind::Corrupt, "entry {entry}: {e}"),
            }
        }
    }
    for length in 0..whole.len() {
        match loaded(&whole[..length]) {
            // A map cut at the end of a round is whole as far as anybody can tell.
            Ok((_, is_torn)) => assert_eq!(is_torn, ![3, 4, 6].contains(&(length / 64)) || length % 64 != 0),
            Err(e) => assert!(length < 3 * ENTRY_BYTES && e.kind() == ErrorKind::Corrupt, "{length}: {e}"),
        }
    }
    // Entries of another clone, or from another place, are none.
    let mut moved = whole.clone();
    moved.copy_within(ENTRY_BYTES..2 * ENTRY_BYTES, 2 * ENTRY_BYTES);
    assert_eq!(loaded(&moved).unwrap_err().kind(), ErrorKind::Corrupt);
    let file = Fragile::new(512, &trigger);
    file.write_at(0, &whole).unwrap();
    assert_eq!(load(&file, CloneId([8; 16]), 1 << 30).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(load(&file, CLONE, 1 << 29).unwrap_err().kind(), ErrorKind::Corrupt);
    let entry = Entry::parse(CLONE, 1 << 18, 1, &whole[64..128]).unwrap();
    assert_eq!(entry.run().chain(entry.masked()).collect::<Vec<_>>(), [2, 3]);
    assert!(Entry::parse(CLONE, 3, 1, &whole[64..128]).is_err(), "past the end of the image");
}

#[test]
fn a_newer_map_is_refused_by_name() {
    let header = Header { version: 2, ..Header::new(CLONE, 4096, &Blocks::default()) };
    let refused = Header::parse(&header.to_bytes()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.to_string().contains("version 2"), "{refused}");
}

/// A base of zeros.
struct Zeros(u64);

impl Base for Zeros {
    fn bytes(&self) -> u64 {
        self.0
    }
    fn read_at(&self, _offset: u64, out: &mut [u8]) -> Result<()> {
        out.fill(0);
        Ok(())
    }
    fn seek_data(&self, _offset: u64) -> Result<Option<u64>> {
        Ok(None)
    }
    fn seek_hole(&self, offset: u64) -> Result<u64> {
        Ok(offset)
    }
}

#[test]
fn i9_a_round_of_many_sectors_may_be_cut_in_any_way() {
    const BYTES: u64 = 1 << 30;
    let base = Zeros(BYTES);
    let quiet = Trigger::new(None);
    let write_some = |overlay: &Overlay, range: std::ops::Range<u64>| {
        // So far apart that each takes an entry.
        range.into_iter().try_for_each(|n| overlay.write_at(&base, n * 1000 * BLOCK as u64, &[n as u8 + 1; BLOCK]))
    };
    let has = |overlay: &Overlay, n: u64| {
        let mut out = [0; BLOCK];
        overlay.read_at(&base, n * 1000 * BLOCK as u64, &mut out).unwrap();
        assert!(out == [n as u8 + 1; BLOCK] || out == [0; BLOCK], "block {n} is what it never was");
        out[0] != 0
    };
    let mut cuts = std::collections::BTreeSet::new();
    for code in 0.. {
        let data = tempfile::tempfile().unwrap();
        data.set_len(BYTES).unwrap();
        let open = |map: &Fragile| {
            let data = Box::new(OsFile::new("data", data.try_clone().unwrap()));
            Overlay::open("test", CLONE, BYTES, data, Arc::new(map.clone()), memory()).unwrap()
        };
        let trigger = Trigger::new(None);
        let map = Fragile::new(512, &trigger);
        write(&map, CLONE, BYTES, &Blocks::default()).unwrap();
        let overlay = open(&map);
        write_some(&overlay, 0..3).unwrap();
        overlay.flush().unwrap();
        write_some(&overlay, 3..23).unwrap();
        let durable = map.content.lock().unwrap().clone();
        overlay.flush().unwrap();
        let mut content = durable;
        let whole = map.content.lock().unwrap().now.clone();
        content.now = whole;
        content.note(4 * ENTRY_BYTES, 24 * ENTRY_BYTES);
        let mut rest = code;
        let crashed = content.crashed(&mut |count| {
            let digit = rest % count;
            rest /= count;
            digit
        });
        if rest > 0 {
            break;
        }
        let map = Fragile::of(crashed, &quiet);
        let overlay = open(&map);
        let mut used = map.clone();
        if overlay.load(Arc::new(map)).unwrap() {
            used = Fragile::new(512, &quiet);
            overlay.write_map(&used).unwrap();
            overlay.load(Arc::new(used.clone())).unwrap();
        }
        assert!((0..3).all(|n| has(&overlay, n)), "cut {code}: what was flushed is gone");
        let there: Vec<u64> = (0..23).filter(|n| has(&overlay, *n)).collect();
        cuts.insert(there.len());
        write_some(&overlay, 30..35).unwrap();
        overlay.flush().unwrap();
        let overlay = open(&used);
        let again: Vec<u64> = (0..35).filter(|n| has(&overlay, *n)).collect();
        assert_eq!(again, there.into_iter().chain(30..35).collect::<Vec<_>>(), "cut {code}: opened again");
    }
    assert!(cuts.len() > 3, "{cuts:?}");
}
