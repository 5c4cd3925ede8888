//! The similarity index of one VM: which slots hold a block whose fingerprint starts with a given hook.
//!
//! Derived data: every answer is a hint that the caller verifies, and the folder may be deleted at any time. The
//! store is `sled`, which costs tens of megabytes of memory per million keys and trusts the bytes of its files.
//! Hence two layers around it:
//!
//! * Entries are kept in *runs*, sorted arrays cut in pages; a page is one key of `sled`. Only the first hook of
//!   each page and a small filter stay in memory. Runs of similar size are merged, so that a lookup visits few of them.
//! * `close` writes a *manifest*, the length and BLAKE3 of every file; `open` verifies it before `sled` sees a byte
//!   and removes it while the index is open. A crash or a damaged file therefore means an empty index, never a
//!   `sled` that parses garbage. Nothing needs to be durable in any order: the hashes decide.
//!
//! When anything fails, the index warns once and goes on in memory, with a bounded number of entries.
//!
//! ```text
//! <folder>/manifest      written by close, absent while open
//! <folder>/db0 or db1    the sled files
//!   key 'p' run page     page:  checksum[8] (hook u64, slot u64)*      run, page, chunk: u32 big-endian
//!   key 'f' run chunk    fences: checksum[8] hook*                     all other numbers: little-endian
//!   key 'b' run chunk    filter: checksum[8] bits
//!   key 'm' 0 chunk      meta:  checksum[8] bytes
//! ```

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use roaring::RoaringTreemap;

use crate::error::{Error, ErrorKind, Result, corrupt};

/// Entries of a page (2 KiB): `sled` keeps eight to sixteen pages in a node, which is what it reads, writes and
/// caches. Smaller pages cost memory for their bookkeeping, larger ones for the cached nodes.
const PAGE_ENTRIES: usize = 128;

/// Bytes of an entry: hook and slot.
const ENTRY_BYTES: usize = 16;

/// Bytes of the checksum in front of each value.
const CHECKSUM_BYTES: usize = 8;

/// Fences of one stored value (4 KiB).
const FENCE_CHUNK: usize = 512;

/// Bytes of meta or of a filter in one stored value.
const BYTES_CHUNK: usize = 4096;

/// Bits of a run's filter per entry, of which an entry sets two: three of four hooks that are not there are told
/// from it, without a read, for 6 MiB of memory per 16 million entries.
const FILTER_BITS: u64 = 3;

/// Entries of the buffer; a spill is a run of this many. In memory they take some 2 MiB.
const BUFFER_ENTRIES: usize = 1 << 16;

/// Entries of an index that could not use its folder: some 30 MiB.
const MEMORY_ENTRIES_MAX: usize = 1 << 20;

/// Slots kept per hook, the newest: more are popular blocks, which other means find.
const SLOTS_PER_HOOK: usize = 4;

/// Runs of one size class before they are merged. Less is fewer pages per lookup, more is fewer rewrites.
const RUNS_PER_CLASS_MAX: usize = 6;

/// Runs of a decoded meta: far more than the size classes of 2^64 entries can hold.
const RUNS_MAX: usize = 1024;

/// Values written between two flushes: `sled` queues what it has not written in memory, without a limit.
const WRITES_PER_FLUSH: u32 = 256;

/// Bytes of `sled`'s cache. It keeps a node in each of its 256 shards whatever it is told; this asks for no more.
const CACHE_BYTES: u64 = 1 << 20;

/// Bytes of a segment of `sled`'s file. Nodes over a quarter of it would become files of their own.
const SEGMENT_BYTES: usize = 256 << 10;

/// Accesses after which a shard of `sled`'s cache looks at its size. Until then everything read stays in memory.
const SHARD_ACCESSES: usize = 65;

/// Pages of a node of `sled` that was filled in order.
const NODE_PAGES: usize = 8;

/// Bytes of a manifest that is read: thousands of files; there are about three.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// Files of the index that are listed, for the same reason.
const FILES_MAX: usize = 4096;

/// Files are hashed in pieces of this size.
const HASH_BUFFER_BYTES: usize = 1 << 20;

/// Files may take this many times the payload, and `BLOAT_BYTES`, before they are written anew.
const BLOAT_FACTOR: u64 = 3;

/// What an almost empty `sled` takes, and more.
const BLOAT_BYTES: u64 = 1 << 20;

/// An index of this many entries or less (8 MiB) may stay in `sled`'s cache as a whole.
const CACHED_ENTRIES_MAX: u64 = 1 << 19;

/// Milliseconds that `close` waits for `sled`'s threads to let go of the files.
const RELEASE_MS_MAX: u32 = 5000;

const MANIFEST: &str = "manifest";
const MANIFEST_MAGIC: &[u8; 8] = b"snapfsi1";
const META_MAGIC: &[u8; 8] = b"snapfsm1";

/// A hook and its slot. The order is the order of answers: by hook, then the newest (largest) slot first.
type Entry = (u64, Reverse<u64>);

/// The similarity index of one VM: hook to slot (pack number << 16 | number of the slot in the pack).
///
/// One process opens a folder at a time; the lock of the VM sees to that. (A second one would start empty and both
/// would be lost at close: never wrong, only useless.) Memory: the buffer, half a byte per entry, and
/// what `sled` takes, which is flat.
pub struct SimilarityIndex {
    folder: PathBuf,
    /// `None`: in memory only.
    disk: Option<Disk>,
    buffer: BTreeSet<Entry>,
    /// Packs all of whose hooks are in here.
    covered: RoaringTreemap,
    /// Packs that got entries since `open` and are not covered yet: their entries count, until `close`.
    fresh: RoaringTreemap,
    /// Packs forgotten since the last merge of all runs.
    forgotten: u64,
}

impl SimilarityIndex {
    /// Opens the index in `folder`, which is created; what is damaged is removed and the index starts empty.
    ///
    /// Never fails: an index that cannot use its folder works in memory. Each loss is one warning.
    /// Cost: reads all files once, to verify them.
    pub fn open(folder: &Path) -> SimilarityIndex {
        let mut index = Self::empty(folder);
        let outcome = guarded(|| index.load());
        if let Err(error) = outcome {
            if folder.join(MANIFEST).exists() {
                log::warn!("similarity index starts empty, folder={}: {error}", folder.display());
            } else {
                // Its last writer was killed: nothing is damaged, and it is built anew.
                log::info!("similarity index was not closed and starts empty, folder={}", folder.display());
            }
            index = Self::empty(folder);
            if let Err(error) = guarded(|| index.start_anew()) {
                log::warn!("similarity index works in memory only, folder={}: {error}", folder.display());
                index.disk = None;
            }
        }
        index
    }

    /// The packs whose hooks are all in here. The caller adds those of the others.
    pub fn covered(&self) -> &RoaringTreemap {
        &self.covered
    }

    /// Adds an entry. Of each hook, the `SLOTS_PER_HOOK` largest slots are kept.
    ///
    /// Cost: memory only; every `BUFFER_ENTRIES` entries a run is written, and runs may be merged.
    pub fn add(&mut self, hook: u64, slot: u64) {
        let pack = slot >> 16;
        if !self.covered.contains(pack) {
            self.fresh.insert(pack);
        }
        self.buffer.insert((hook, Reverse(slot)));
        if self.disk.is_some() && self.buffer.len() >= BUFFER_ENTRIES {
            let outcome = guarded(|| self.spill());
            self.survive(outcome);
        }
        if self.buffer.len() > MEMORY_ENTRIES_MAX {
            self.shed();
        }
    }

    /// Marks `pack` as covered: all its entries were added. Durable, like they, after `close`.
    pub fn cover(&mut self, pack: u64) {
        self.covered.insert(pack);
        self.fresh.remove(pack);
    }

    /// Forgets the covered packs for which `present` is false. Their entries are found no more, and go at merges.
    pub fn forget_packs(&mut self, present: impl Fn(u64) -> bool) {
        let gone: RoaringTreemap = self.covered.iter().filter(|&pack| !present(pack)).collect();
        self.covered -= &gone;
        self.forgotten = self.forgotten.saturating_add(gone.len());
    }

    /// Appends all entries of `hooks` to `out`: by hook, and for each hook the newest slot first.
    ///
    /// `hooks` may have any order and repetitions; a repeated hook is answered once.
    /// Cost: for each run, one read per page that a hook falls into; a filter saves most reads of hooks that are not
    /// there.
    pub fn lookup(&mut self, hooks: &[u64], out: &mut Vec<(u64, u64)>) {
        let mut hooks = hooks.to_vec();
        hooks.sort_unstable();
        hooks.dedup();
        let mut found: Vec<Entry> = Vec::new();
        for &hook in &hooks {
            found.extend(self.buffer.range((hook, Reverse(u64::MAX))..=(hook, Reverse(0))));
        }
        if let Some(disk) = &self.disk {
            let outcome = guarded(|| disk.find(&hooks, &mut found));
            self.survive(outcome);
        }
        found.retain(|&(_, Reverse(slot))| self.is_alive(slot));
        found.sort_unstable();
        found.dedup();
        let mut same = 0;
        let mut last = None;
        for (hook, Reverse(slot)) in found {
            same = if last == Some(hook) { same + 1 } else { 0 };
            last = Some(hook);
            if same < SLOTS_PER_HOOK {
                out.push((hook, slot));
            }
        }
    }

    /// Entries kept. An upper bound: what several runs hold, and what merges will drop, is counted.
    pub fn len(&self) -> u64 {
        let stored = self.disk.as_ref().map_or(0, Disk::entries);
        stored.saturating_add(self.buffer.len() as u64)
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Stores everything, closes the files and writes the manifest. Without it, the next `open` starts empty.
    ///
    /// Never fails; a failure is one warning. Cost: a spill, perhaps a merge, and reading all files once.
    pub fn close(mut self) {
        if self.disk.is_none() {
            return;
        }
        let outcome = guarded(|| self.store());
        if let Err(error) = outcome {
            log::warn!("similarity index is lost at close, folder={}: {error}", self.folder.display());
            self.drop_disk();
        }
    }

    fn empty(folder: &Path) -> SimilarityIndex {
        SimilarityIndex {
            folder: folder.to_owned(),
            disk: None,
            buffer: BTreeSet::new(),
            covered: RoaringTreemap::new(),
            fresh: RoaringTreemap::new(),
            forgotten: 0,
        }
    }

    fn load(&mut self) -> Result<()> {
        match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.start_anew(),
            Err(error) => return Err(Error::io("similarity folder", error)),
            Ok(mut entries) => {
                if entries.next().is_none() {
                    return self.start_anew();
                }
            }
        }
        let home = verify_manifest(&self.folder)?;
        let path = self.folder.join(MANIFEST);
        fs::remove_file(&path).map_err(|error| Error::io("similarity manifest: remove", error))?;
        let (disk, meta) = Disk::open(home)?;
        self.covered = meta.covered;
        self.forgotten = meta.forgotten;
        self.disk = Some(disk);
        Ok(())
    }

    fn start_anew(&mut self) -> Result<()> {
        self.drop_disk();
        remove_folder(&self.folder)?;
        self.disk = Some(Disk::create(self.folder.join("db0"))?);
        Ok(())
    }

    fn is_alive(&self, slot: u64) -> bool {
        let pack = slot >> 16;
        self.covered.contains(pack) || self.fresh.contains(pack)
    }

    /// Writes the buffer as a run, and merges runs where there are too many.
    fn spill(&mut self) -> Result<()> {
        let Some(disk) = &mut self.disk else { return Ok(()) };
        let (covered, fresh) = (&self.covered, &self.fresh);
        let is_alive = |slot: u64| covered.contains(slot >> 16) || fresh.contains(slot >> 16);
        if !self.buffer.is_empty() {
            let mut writer = RunWriter::new(disk.take_run_id(), self.buffer.len() as u64);
            for &(hook, Reverse(slot)) in self.buffer.iter().filter(|entry| is_alive(entry.1.0)) {
                writer.push(&disk.store, hook, slot)?;
            }
            if let Some(run) = writer.finish(&disk.store)? {
                disk.runs.push(run);
            }
            self.buffer.clear();
        }
        // Merges by size may never reach a large run full of entries of packs that are gone.
        if self.forgotten > self.covered.len().saturating_add(16) {
            disk.merge(u32::MAX, &is_alive)?;
            self.forgotten = 0;
        }
        while let Some(class) = disk.crowded_class() {
            disk.merge(class, &is_alive)?;
        }
        Ok(())
    }

    fn store(&mut self) -> Result<()> {
        self.spill()?;
        let Some(mut disk) = self.disk.take() else { return Ok(()) };
        disk.finish(&self.covered, self.forgotten)?;
        let payload = disk.entries().saturating_mul(ENTRY_BYTES as u64);
        let bytes_max = payload.saturating_mul(BLOAT_FACTOR).saturating_add(BLOAT_BYTES);
        if list_files(&self.folder)?.iter().map(|(_, bytes)| bytes).sum::<u64>() > bytes_max {
            disk = disk.rewrite(&self.folder, &|slot| self.is_alive(slot))?;
            self.forgotten = 0;
            disk.finish(&self.covered, self.forgotten)?;
        }
        disk.close()?;
        write_manifest(&self.folder, list_files(&self.folder)?)
    }

    /// Goes on in memory after a failure. What was stored is lost, so nothing counts as covered any more.
    fn survive(&mut self, outcome: Result<()>) {
        let Err(error) = outcome else { return };
        log::warn!("similarity index goes on in memory only, folder={}: {error}", self.folder.display());
        self.drop_disk();
        self.fresh |= &self.covered;
        self.covered.clear();
    }

    /// Lets go of the files and removes them: without a manifest they are of no use.
    fn drop_disk(&mut self) {
        if let Some(disk) = self.disk.take() {
            let _ = guarded(|| {
                let closed = disk.close();
                remove_folder(&self.folder)?;
                closed
            });
        }
    }

    /// Drops the older half of an index that is in memory only. Its packs are not covered any more.
    fn shed(&mut self) {
        let mut slots: Vec<u64> = self.buffer.iter().map(|entry| entry.1.0).collect();
        let middle = slots.len() / 2;
        let (_, &mut median, _) = slots.select_nth_unstable(middle);
        drop(slots);
        self.buffer.retain(|entry| entry.1.0 > median);
        let oldest = (median >> 16).saturating_add(1);
        self.covered.remove_range(..oldest);
    }
}

impl Drop for SimilarityIndex {
    fn drop(&mut self) {
        if let Some(disk) = self.disk.take() {
            let _ = guarded(|| disk.close());
        }
    }
}

/// What is known of a run without reading it.
struct Run {
    id: u32,
    entries: u64,
    /// The first hook of each page.
    fences: Vec<u64>,
    /// Bits that are set for the hooks of the run, see [`filter_bits`]. Empty while it is merged.
    filter: Vec<u8>,
    filter_len: usize,
    /// Whether the fences and the filter are stored.
    is_stored: bool,
}

impl Run {
    /// Runs of one class differ in size by less than four times.
    fn class(&self) -> u32 {
        self.entries.max(1).ilog2() / 2
    }

    /// False if `hook` is not in the run, true if it probably is.
    fn may_hold(&self, hook: u64) -> bool {
        filter_bits(self.filter.len(), hook)
            .into_iter()
            .all(|(at, mask)| self.filter.get(at).is_none_or(|byte| byte & mask != 0))
    }
}

/// What the meta value holds besides the runs.
#[derive(Default)]
struct Meta {
    covered: RoaringTreemap,
    forgotten: u64,
}

/// `sled` and the count of what it was given since the last flush.
struct Store {
    db: sled::Db,
    writes: Cell<u32>,
}

impl Store {
    fn open(home: &Path) -> Result<Store> {
        let config = sled::Config::new()
            .path(home)
            .mode(sled::Mode::LowSpace)
            .cache_capacity(CACHE_BYTES)
            .segment_size(SEGMENT_BYTES)
            .flush_every_ms(None);
        Ok(Store { db: config.open().map_err(sled_error)?, writes: Cell::new(0) })
    }

    fn put(&self, key: [u8; 9], payload: &[u8]) -> Result<()> {
        let mut value = Vec::with_capacity(CHECKSUM_BYTES + payload.len());
        value.extend_from_slice(&checksum(&key, payload));
        value.extend_from_slice(payload);
        self.db.insert(key, value).map_err(sled_error)?;
        if self.writes.get().is_multiple_of(NODE_PAGES as u32) {
            self.evict(key)?;
        }
        self.count()
    }

    fn remove(&self, key: [u8; 9]) -> Result<()> {
        self.db.remove(key).map_err(sled_error)?;
        self.count()
    }

    fn count(&self) -> Result<()> {
        self.writes.set(self.writes.get() + 1);
        if self.writes.get() >= WRITES_PER_FLUSH {
            self.writes.set(0);
            self.db.flush().map_err(sled_error)?;
        }
        Ok(())
    }

    /// The payload under `key`, or `None` where there is no such key. `Corrupt` if its checksum differs.
    fn get(&self, key: [u8; 9]) -> Result<Option<sled::IVec>> {
        let Some(value) = self.db.get(key).map_err(sled_error)? else { return Ok(None) };
        match value.split_at_checked(CHECKSUM_BYTES) {
            Some((sum, payload)) if sum == checksum(&key, payload) => {
                Ok(Some(value.subslice(CHECKSUM_BYTES, payload.len())))
            }
            _ => Err(corrupt(format!("similarity index: value checksum, key={key:?}"))),
        }
    }

    /// Makes `sled` evict what is in the way of the node of `key`, see `SHARD_ACCESSES`. Cost: some microseconds.
    ///
    /// Called once per node read or written, it bounds the cache; without it, every read stays in memory.
    fn evict(&self, key: [u8; 9]) -> Result<()> {
        for _ in 0..SHARD_ACCESSES {
            self.db.contains_key(key).map_err(sled_error)?;
        }
        Ok(())
    }

    fn page(&self, run: u32, page: usize, out: &mut Vec<Entry>) -> Result<()> {
        out.clear();
        let payload = self.get(key(b'p', run, page)?)?;
        let payload = payload.ok_or_else(|| corrupt(format!("similarity index: no page {page} of run {run}")))?;
        for pair in payload.chunks_exact(ENTRY_BYTES) {
            let (hook, slot) = pair.split_at(ENTRY_BYTES / 2);
            out.push((number(hook), Reverse(number(slot))));
        }
        Ok(())
    }
}

/// The runs in `sled`.
struct Disk {
    home: PathBuf,
    store: Store,
    runs: Vec<Run>,
    next_run: u32,
}

impl Disk {
    fn create(home: PathBuf) -> Result<Disk> {
        fs::create_dir_all(&home).map_err(|error| Error::io("similarity folder: create", error))?;
        let store = Store::open(&home)?;
        Ok(Disk { home, store, runs: Vec::new(), next_run: 1 })
    }

    fn open(home: PathBuf) -> Result<(Disk, Meta)> {
        let store = Store::open(&home)?;
        let mut bytes = Vec::new();
        for chunk in 0.. {
            let Some(payload) = store.get(key(b'm', 0, chunk)?)? else { break };
            bytes.extend_from_slice(&payload);
        }
        let (mut runs, next_run, meta) = decode_meta(&bytes)?;
        for run in &mut runs {
            load_fences(&store, run)?;
            load_filter(&store, run)?;
        }
        Ok((Disk { home, store, runs, next_run }, meta))
    }

    fn entries(&self) -> u64 {
        self.runs.iter().fold(0, |sum, run| sum.saturating_add(run.entries))
    }

    fn take_run_id(&mut self) -> u32 {
        let id = self.next_run;
        self.next_run = self.next_run.wrapping_add(1).max(1);
        id
    }

    /// Appends to `found` the entries of `hooks`, which are sorted.
    fn find(&self, hooks: &[u64], found: &mut Vec<Entry>) -> Result<()> {
        let is_cached = self.entries() <= CACHED_ENTRIES_MAX;
        let mut page: Vec<Entry> = Vec::with_capacity(PAGE_ENTRIES);
        for run in &self.runs {
            let mut held = usize::MAX;
            for &hook in hooks.iter().filter(|&&hook| run.may_hold(hook)) {
                // A hook that starts a page may have its first entries at the end of the page before.
                let first = run.fences.partition_point(|&fence| fence < hook).saturating_sub(1);
                let end = run.fences.partition_point(|&fence| fence <= hook);
                for number in first..end {
                    if number != held {
                        self.store.page(run.id, number, &mut page)?;
                        if !is_cached {
                            self.store.evict(key(b'p', run.id, number)?)?;
                        }
                        held = number;
                    }
                    let from = page.partition_point(|entry| entry.0 < hook);
                    found.extend(page.iter().skip(from).take_while(|entry| entry.0 == hook));
                }
            }
        }
        Ok(())
    }

    /// The smallest size class with too many runs.
    fn crowded_class(&self) -> Option<u32> {
        let mut counts = [0_usize; 33];
        for run in &self.runs {
            if let Some(count) = counts.get_mut(run.class() as usize) {
                *count += 1;
            }
        }
        let at = counts.iter().position(|&count| count > RUNS_PER_CLASS_MAX)?;
        u32::try_from(at).ok()
    }

    /// Merges all runs up to size class `class` into one. Cost: reads and writes them; one page of each in memory.
    fn merge(&mut self, class: u32, is_alive: &dyn Fn(u64) -> bool) -> Result<()> {
        let (mut merged, kept): (Vec<Run>, _) =
            std::mem::take(&mut self.runs).into_iter().partition(|run| run.class() <= class);
        self.runs = kept;
        // Not the old filters and the new one at the same time in memory.
        merged.iter_mut().for_each(|run| run.filter = Vec::new());
        let id = self.take_run_id();
        self.runs.extend(merge_runs(&self.store, &merged, &self.store, id, is_alive)?);
        for run in &merged {
            for page in 0..run.fences.len() {
                self.store.remove(key(b'p', run.id, page)?)?;
            }
            if run.is_stored {
                for chunk in 0..run.fences.len().div_ceil(FENCE_CHUNK) {
                    self.store.remove(key(b'f', run.id, chunk)?)?;
                }
                for chunk in 0..run.filter_len.div_ceil(BYTES_CHUNK) {
                    self.store.remove(key(b'b', run.id, chunk)?)?;
                }
            }
        }
        Ok(())
    }

    /// Stores the fences of new runs and the meta.
    fn finish(&mut self, covered: &RoaringTreemap, forgotten: u64) -> Result<()> {
        for run in self.runs.iter_mut().filter(|run| !run.is_stored) {
            for (chunk, fences) in run.fences.chunks(FENCE_CHUNK).enumerate() {
                let payload: Vec<u8> = fences.iter().flat_map(|fence| fence.to_le_bytes()).collect();
                self.store.put(key(b'f', run.id, chunk)?, &payload)?;
            }
            for (chunk, payload) in run.filter.chunks(BYTES_CHUNK).enumerate() {
                self.store.put(key(b'b', run.id, chunk)?, payload)?;
            }
            run.is_stored = true;
        }
        let bytes = encode_meta(&self.runs, self.next_run, covered, forgotten)?;
        let mut chunk_count = 0;
        for (chunk, payload) in bytes.chunks(BYTES_CHUNK).enumerate() {
            self.store.put(key(b'm', 0, chunk)?, payload)?;
            chunk_count = chunk + 1;
        }
        // The meta of the last session may have been longer.
        while self.store.get(key(b'm', 0, chunk_count)?)?.is_some() {
            self.store.remove(key(b'm', 0, chunk_count)?)?;
            chunk_count += 1;
        }
        self.store.db.flush().map_err(sled_error)?;
        Ok(())
    }

    /// Writes all runs as one into a new `sled` and removes the old one, whose files only ever grow.
    fn rewrite(mut self, folder: &Path, is_alive: &dyn Fn(u64) -> bool) -> Result<Disk> {
        let name = if self.home.ends_with("db0") { "db1" } else { "db0" };
        let mut disk = Disk::create(folder.join(name))?;
        self.runs.iter_mut().for_each(|run| run.filter = Vec::new());
        let id = disk.take_run_id();
        disk.runs.extend(merge_runs(&self.store, &self.runs, &disk.store, id, is_alive)?);
        let home = self.home.clone();
        self.close()?;
        remove_folder(&home)?;
        Ok(disk)
    }

    /// Closes `sled` and waits until none of its threads can write any more.
    fn close(self) -> Result<()> {
        let Disk { home, store, .. } = self;
        drop(store);
        // `sled` locks its file for as long as any of its threads holds it.
        let file = File::open(home.join("db")).map_err(|error| Error::io("similarity index: reopen", error))?;
        for _ in 0..RELEASE_MS_MAX {
            match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(1)),
                Err(error) => return Err(Error::io("similarity index: lock", error.into())),
            }
        }
        Err(Error::new(ErrorKind::Busy, "similarity index: the files are still in use"))
    }
}

/// Writes one run, page by page, from entries in order.
struct RunWriter {
    run: Run,
    page: Vec<u8>,
    last: Option<(u64, u64)>,
    /// Entries of the hook of `last` so far.
    same: usize,
}

impl RunWriter {
    /// A writer of at most `entries_max` entries.
    fn new(id: u32, entries_max: u64) -> RunWriter {
        let bytes = entries_max.saturating_mul(FILTER_BITS) / 8 + 1;
        let filter = vec![0; usize::try_from(bytes).unwrap_or(1)];
        let filter_len = filter.len();
        let run = Run { id, entries: 0, fences: Vec::new(), filter, filter_len, is_stored: false };
        RunWriter { run, page: Vec::with_capacity(PAGE_ENTRIES * ENTRY_BYTES), last: None, same: 0 }
    }

    /// Adds the next entry; drops it if it is a repetition, or beyond the slots kept of a hook.
    fn push(&mut self, store: &Store, hook: u64, slot: u64) -> Result<()> {
        match self.last {
            Some(last) if last == (hook, slot) => return Ok(()),
            Some((other, _)) if other == hook => self.same += 1,
            _ => {
                self.same = 1;
                for (at, mask) in filter_bits(self.run.filter_len, hook) {
                    if let Some(byte) = self.run.filter.get_mut(at) {
                        *byte |= mask;
                    }
                }
            }
        }
        self.last = Some((hook, slot));
        if self.same > SLOTS_PER_HOOK {
            return Ok(());
        }
        if self.page.is_empty() {
            self.run.fences.push(hook);
        }
        self.page.extend_from_slice(&hook.to_le_bytes());
        self.page.extend_from_slice(&slot.to_le_bytes());
        self.run.entries += 1;
        if self.page.len() >= PAGE_ENTRIES * ENTRY_BYTES {
            self.write(store)?;
        }
        Ok(())
    }

    fn write(&mut self, store: &Store) -> Result<()> {
        if !self.page.is_empty() {
            let page = self.run.fences.len().saturating_sub(1);
            store.put(key(b'p', self.run.id, page)?, &self.page)?;
            self.page.clear();
        }
        Ok(())
    }

    /// The run, or `None` if it has no entry.
    fn finish(mut self, store: &Store) -> Result<Option<Run>> {
        self.write(store)?;
        self.run.fences.shrink_to_fit();
        Ok(Some(self.run).filter(|run| run.entries > 0))
    }
}

/// Writes the entries of `runs` of `source` as one run of `target`. Cost: one page of each run in memory.
fn merge_runs(
    source: &Store,
    runs: &[Run],
    target: &Store,
    id: u32,
    is_alive: &dyn Fn(u64) -> bool,
) -> Result<Option<Run>> {
    let entries_max = runs.iter().fold(0_u64, |sum, run| sum.saturating_add(run.entries));
    let mut writer = RunWriter::new(id, entries_max);
    let mut cursors: Vec<Cursor> = runs.iter().map(Cursor::new).collect();
    loop {
        let mut least: Option<(Entry, &mut Cursor)> = None;
        for cursor in &mut cursors {
            if let Some(entry) = cursor.peek(source)?
                && least.as_ref().is_none_or(|(other, _)| entry < *other)
            {
                least = Some((entry, cursor));
            }
        }
        let Some(((hook, Reverse(slot)), cursor)) = least else { return writer.finish(target) };
        cursor.at += 1;
        if is_alive(slot) {
            writer.push(target, hook, slot)?;
        }
    }
}

/// Reads one run in order, for a merge.
struct Cursor {
    run: u32,
    pages: usize,
    next_page: usize,
    page: Vec<Entry>,
    at: usize,
}

impl Cursor {
    fn new(run: &Run) -> Cursor {
        Cursor { run: run.id, pages: run.fences.len(), next_page: 0, page: Vec::new(), at: 0 }
    }

    fn peek(&mut self, store: &Store) -> Result<Option<Entry>> {
        while self.at >= self.page.len() && self.next_page < self.pages {
            store.page(self.run, self.next_page, &mut self.page)?;
            if self.next_page.is_multiple_of(NODE_PAGES) {
                store.evict(key(b'p', self.run, self.next_page)?)?;
            }
            self.next_page += 1;
            self.at = 0;
        }
        Ok(self.page.get(self.at).copied())
    }
}

/// Runs `work`; a panic, which `sled` raises on more than it should, becomes an error.
fn guarded(work: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(corrupt("similarity index: panic in the store")))
}

fn sled_error(error: sled::Error) -> Error {
    Error::new(ErrorKind::Unavailable, "similarity index: store").because(error)
}

fn key(kind: u8, run: u32, number: usize) -> Result<[u8; 9]> {
    let number = u32::try_from(number).map_err(|_| corrupt("similarity index: too many pages"))?;
    let mut key = [kind; 9];
    for (to, from) in key.iter_mut().skip(1).zip(run.to_be_bytes().into_iter().chain(number.to_be_bytes())) {
        *to = from;
    }
    Ok(key)
}

/// The checksum covers the key as well, so that a value under a wrong key is found.
fn checksum(key: &[u8; 9], payload: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(key);
    hasher.update(payload);
    let mut sum = [0; CHECKSUM_BYTES];
    for (to, from) in sum.iter_mut().zip(hasher.finalize().as_bytes()) {
        *to = *from;
    }
    sum
}

/// The little-endian number in at most eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, &byte| (sum << 8) | u64::from(byte))
}

/// Takes `len` bytes off the front of `bytes`.
fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Result<&'a [u8]> {
    let (head, tail) = bytes.split_at_checked(len).ok_or_else(|| corrupt("similarity index: cut short"))?;
    *bytes = tail;
    Ok(head)
}

/// `magic, forgotten u64, next run u32, run count u32, (id u32, entries u64)*, covered`.
fn encode_meta(runs: &[Run], next_run: u32, covered: &RoaringTreemap, forgotten: u64) -> Result<Vec<u8>> {
    let mut out = META_MAGIC.to_vec();
    out.extend_from_slice(&forgotten.to_le_bytes());
    out.extend_from_slice(&next_run.to_le_bytes());
    let count = u32::try_from(runs.len()).map_err(|_| corrupt("similarity index: too many runs"))?;
    out.extend_from_slice(&count.to_le_bytes());
    for run in runs {
        out.extend_from_slice(&run.id.to_le_bytes());
        out.extend_from_slice(&run.entries.to_le_bytes());
    }
    covered.serialize_into(&mut out).map_err(|error| Error::io("similarity index: covered packs", error))?;
    Ok(out)
}

fn decode_meta(mut bytes: &[u8]) -> Result<(Vec<Run>, u32, Meta)> {
    if take(&mut bytes, META_MAGIC.len())? != META_MAGIC {
        return Err(corrupt("similarity index: meta magic"));
    }
    let forgotten = number(take(&mut bytes, 8)?);
    let [next_run, count] = [take(&mut bytes, 4)?, take(&mut bytes, 4)?].map(number);
    let next_run = u32::try_from(next_run).map_err(|_| corrupt("similarity index: next run"))?;
    let count = usize::try_from(count).ok().filter(|&count| count <= RUNS_MAX);
    let mut runs = Vec::new();
    for _ in 0..count.ok_or_else(|| corrupt("similarity index: run count"))? {
        let id = u32::try_from(number(take(&mut bytes, 4)?)).map_err(|_| corrupt("similarity index: run id"))?;
        let entries = number(take(&mut bytes, 8)?);
        runs.push(Run { id, entries, fences: Vec::new(), filter: Vec::new(), filter_len: 0, is_stored: true });
    }
    let covered =
        RoaringTreemap::deserialize_from(bytes).map_err(|error| Error::io("similarity index: covered packs", error))?;
    Ok((runs, next_run, Meta { covered, forgotten }))
}

fn load_fences(store: &Store, run: &mut Run) -> Result<()> {
    let pages = usize::try_from(run.entries).unwrap_or(usize::MAX).div_ceil(PAGE_ENTRIES);
    for chunk in 0..pages.div_ceil(FENCE_CHUNK) {
        let payload = store.get(key(b'f', run.id, chunk)?)?;
        let payload = payload.ok_or_else(|| corrupt(format!("similarity index: no fences of run {}", run.id)))?;
        run.fences.extend(payload.chunks_exact(8).map(number));
    }
    if run.fences.len() != pages || !run.fences.is_sorted() {
        return Err(corrupt(format!("similarity index: fences of run {}", run.id)));
    }
    Ok(())
}

fn load_filter(store: &Store, run: &mut Run) -> Result<()> {
    for chunk in 0.. {
        let Some(payload) = store.get(key(b'b', run.id, chunk)?)? else { break };
        run.filter.extend_from_slice(&payload);
        if chunk.is_multiple_of(NODE_PAGES) {
            store.evict(key(b'b', run.id, chunk)?)?;
        }
    }
    run.filter.shrink_to_fit();
    run.filter_len = run.filter.len();
    Ok(())
}

/// The two bits of `hook` in a filter of `len` bytes: byte and mask. In an empty filter there are none to miss.
fn filter_bits(len: usize, hook: u64) -> [(usize, u8); 2] {
    // Hooks are uniform, but for a hostile guest, which can make its own index slow, and no more.
    [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f].map(|factor: u64| {
        let spread = (hook ^ (hook >> 32)).wrapping_mul(factor);
        let bit = (u128::from(spread) * (len as u128 * 8)) >> 64;
        (usize::try_from(bit / 8).unwrap_or(usize::MAX), 1 << (bit % 8))
    })
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("similarity folder: remove", error)),
        _ => Ok(()),
    }
}

/// A file as the manifest has it: path below the folder, length, BLAKE3.
type Listed = (String, u64, [u8; 32]);

/// All files under `folder` but the manifest, sorted by path, not hashed yet. `Corrupt` if there is anything else.
fn list_files(folder: &Path) -> Result<Vec<(String, u64)>> {
    let mut files = Vec::new();
    let mut folders = vec![String::new()];
    let mut seen = 0;
    while let Some(parent) = folders.pop() {
        let entries = fs::read_dir(folder.join(&parent)).map_err(|error| Error::io("similarity folder", error))?;
        for entry in entries {
            let entry = entry.map_err(|error| Error::io("similarity folder", error))?;
            // Not following a link.
            let kind = entry.metadata().map_err(|error| Error::io("similarity folder", error))?;
            let name = entry.file_name().into_string().map_err(|_| corrupt("similarity folder: name"))?;
            let path = if parent.is_empty() { name } else { format!("{parent}/{name}") };
            seen += 1;
            if seen > FILES_MAX {
                return Err(corrupt("similarity folder: too many files"));
            }
            if kind.is_dir() {
                folders.push(path);
            } else if !kind.is_file() {
                return Err(corrupt(format!("similarity folder: neither file nor folder, path={path}")));
            } else if path != MANIFEST {
                files.push((path, kind.len()));
            }
        }
    }
    files.sort();
    Ok(files)
}

fn hash_file(path: &Path, buffer: &mut [u8]) -> Result<[u8; 32]> {
    let error = |error| Error::io("similarity folder: read", error);
    let mut file = File::open(path).map_err(error)?;
    let mut hasher = blake3::Hasher::new();
    loop {
        let len = file.read(buffer).map_err(error)?;
        match buffer.get(..len) {
            Some(piece) if len > 0 => hasher.update(piece),
            _ => return Ok(*hasher.finalize().as_bytes()),
        };
    }
}

/// `magic, file count u32, (path length u32, path, file length u64, BLAKE3[32])*, BLAKE3[32] of all that`.
fn write_manifest(folder: &Path, files: Vec<(String, u64)>) -> Result<()> {
    let mut out = MANIFEST_MAGIC.to_vec();
    let len = |len: usize| u32::try_from(len).map_err(|_| corrupt("similarity manifest: too long"));
    out.extend_from_slice(&len(files.len())?.to_le_bytes());
    let mut buffer = vec![0; HASH_BUFFER_BYTES];
    for (path, bytes) in files {
        let hash = hash_file(&folder.join(&path), &mut buffer)?;
        out.extend_from_slice(&len(path.len())?.to_le_bytes());
        out.extend_from_slice(path.as_bytes());
        out.extend_from_slice(&bytes.to_le_bytes());
        out.extend_from_slice(&hash);
    }
    let hash = blake3::hash(&out);
    out.extend_from_slice(hash.as_bytes());
    fs::write(folder.join(MANIFEST), out).map_err(|error| Error::io("similarity manifest: write", error))
}

fn read_manifest(folder: &Path) -> Result<Vec<Listed>> {
    let error = |error| Error::io("similarity manifest", error);
    let file = File::open(folder.join(MANIFEST)).map_err(error)?;
    let mut bytes = Vec::new();
    file.take(MANIFEST_BYTES_MAX).read_to_end(&mut bytes).map_err(error)?;
    let (mut body, hash) = bytes
        .len()
        .checked_sub(32)
        .and_then(|at| bytes.split_at_checked(at))
        .ok_or_else(|| corrupt("similarity manifest: cut short"))?;
    if blake3::hash(body).as_bytes() != hash {
        return Err(corrupt("similarity manifest: checksum"));
    }
    if take(&mut body, MANIFEST_MAGIC.len())? != MANIFEST_MAGIC {
        return Err(corrupt("similarity manifest: magic"));
    }
    let count = number(take(&mut body, 4)?);
    let mut files = Vec::new();
    for _ in 0..count {
        let len = usize::try_from(number(take(&mut body, 4)?)).unwrap_or(usize::MAX);
        let path = String::from_utf8(take(&mut body, len)?.to_vec())
            .map_err(|cause| corrupt("similarity manifest: path").because(cause))?;
        let bytes = number(take(&mut body, 8)?);
        let hash = <[u8; 32]>::try_from(take(&mut body, 32)?)
            .map_err(|cause| corrupt("similarity manifest: hash").because(cause))?;
        files.push((path, bytes, hash));
    }
    Ok(files)
}

/// Proves that the files under `folder` are those of the manifest. Returns the folder of `sled`.
fn verify_manifest(folder: &Path) -> Result<PathBuf> {
    // First, because it refuses what would hang a read, such as a pipe named like the manifest.
    let present = list_files(folder)?;
    let listed = read_manifest(folder)?;
    if !listed.iter().map(|(path, bytes, _)| (path, bytes)).eq(present.iter().map(|(path, bytes)| (path, bytes))) {
        return Err(corrupt("similarity folder: the files are not those of the manifest"));
    }
    let mut buffer = vec![0; HASH_BUFFER_BYTES];
    for (path, _, hash) in &listed {
        if hash_file(&folder.join(path), &mut buffer)? != *hash {
            return Err(corrupt(format!("similarity folder: content of {path}")));
        }
    }
    let home = listed.iter().find_map(|(path, ..)| path.strip_suffix("/db"));
    let home = home.ok_or_else(|| corrupt("similarity folder: no store"))?;
    Ok(folder.join(home))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// A seeded source of numbers (splitmix64).
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut x = self.0;
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ (x >> 31)
        }

        fn below(&mut self, end: u64) -> u64 {
            self.next() % end
        }
    }

    fn temporary() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("similar");
        (parent, folder)
    }

    fn found(index: &mut SimilarityIndex, hooks: &[u64]) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        index.lookup(hooks, &mut out);
        out
    }

    type Model = BTreeMap<u64, BTreeSet<Reverse<u64>>>;

    fn expected(model: &Model, hooks: &[u64]) -> Vec<(u64, u64)> {
        let hooks: BTreeSet<u64> = hooks.iter().copied().collect();
        let slots = |hook: u64| model.get(&hook).into_iter().flatten().take(SLOTS_PER_HOOK).map(move |s| (hook, s.0));
        hooks.into_iter().flat_map(slots).collect()
    }

    #[test]
    fn random_operations_equal_a_model() {
        for seed in 0..12 {
            let (_parent, folder) = temporary();
            let mut numbers = Numbers(seed);
            // Few hooks make long rows of one hook, over the ends of pages; many make several runs.
            let hooks_end = if seed % 3 == 0 { 40 } else { 1 << (10 + seed) };
            let mut model = Model::new();
            let mut index = SimilarityIndex::open(&folder);
            let mut entries = 0_u64;
            for _ in 0..60 {
                match numbers.below(4) {
                    0 => {
                        for pack in 0..=entries >> 10 {
                            index.cover(pack);
                        }
                        index.close();
                        index = SimilarityIndex::open(&folder);
                    }
                    1 => index.spill().unwrap(),
                    _ => {
                        for _ in 0..numbers.below(9000) {
                            let (hook, slot) = (numbers.below(hooks_end), ((entries >> 10) << 16) | numbers.below(100));
                            index.add(hook, slot);
                            model.entry(hook).or_default().insert(Reverse(slot));
                            entries += 1;
                        }
                    }
                }
                let hooks: Vec<u64> = (0..200).map(|_| numbers.below(hooks_end + 9)).collect();
                assert_eq!(found(&mut index, &hooks), expected(&model, &hooks), "seed {seed}");
            }
            assert!(index.disk.is_some(), "seed {seed}");
        }
    }

    #[test]
    fn merges_keep_everything_in_few_runs() {
        let (_parent, folder) = temporary();
        let mut index = SimilarityIndex::open(&folder);
        let count = 500_000;
        for number in 0..count {
            index.add(Numbers(number).next(), ((number / 1000) << 16) | (number % 1000));
            index.cover(number / 1000);
        }
        let disk = index.disk.as_ref().unwrap();
        assert!(disk.runs.len() <= 2 * RUNS_PER_CLASS_MAX, "runs {}", disk.runs.len());
        assert_eq!(index.len(), count);
        index.close();
        let mut index = SimilarityIndex::open(&folder);
        assert_eq!(index.covered().len(), count / 1000);
        for chunk in (0..count).collect::<Vec<u64>>().chunks(10_000) {
            let mut entries: Vec<(u64, u64)> = chunk
                .iter()
                .map(|&number| (Numbers(number).next(), ((number / 1000) << 16) | (number % 1000)))
                .collect();
            entries.sort_unstable();
            let hooks: Vec<u64> = entries.iter().map(|entry| entry.0).collect();
            assert_eq!(found(&mut index, &hooks), entries);
        }
    }

    #[test]
    fn the_manifest_verifies_after_every_close_and_files_stay_small() {
        let (_parent, folder) = temporary();
        for session in 0..50 {
            let mut index = SimilarityIndex::open(&folder);
            assert_eq!(index.covered().len(), session, "session {session}");
            for number in 0..3000 {
                index.add(Numbers((session << 32) | number).next(), (session << 16) | number);
            }
            index.cover(session);
            index.close();
            verify_manifest(&folder).unwrap();
            let bytes: u64 = list_files(&folder).unwrap().iter().map(|file| file.1).sum();
            let payload = (session + 1) * 3000 * ENTRY_BYTES as u64;
            assert!(bytes <= BLOAT_FACTOR * payload + BLOAT_BYTES, "session {session}: {bytes} for {payload}");
        }
    }

    #[test]
    fn forgotten_packs_are_found_no_more_and_their_entries_go() {
        let (_parent, folder) = temporary();
        let mut index = SimilarityIndex::open(&folder);
        for number in 0..40_000 {
            index.add(number, (number % 40) << 16);
        }
        (0..40).for_each(|pack| index.cover(pack));
        index.close();
        let mut index = SimilarityIndex::open(&folder);
        index.forget_packs(|pack| pack % 4 == 0);
        assert_eq!(index.covered().len(), 10);
        assert_eq!(found(&mut index, &[7, 8, 9]), [(8, 8 << 16)]);
        index.close();
        let mut index = SimilarityIndex::open(&folder);
        assert_eq!(index.len(), 10_000);
        assert_eq!(found(&mut index, &[7, 8, 9]), [(8, 8 << 16)]);
    }

    #[test]
    fn a_crash_means_an_empty_index() {
        let (_parent, folder) = temporary();
        fill(&folder);
        let mut index = SimilarityIndex::open(&folder);
        assert!(!index.is_empty());
        index.add(1, 2 << 16);
        drop(index);
        let index = SimilarityIndex::open(&folder);
        assert!(index.is_empty() && index.covered().is_empty() && index.disk.is_some());
    }

    /// Entries, `number -> number << 16` for all numbers below 5000, in several runs.
    fn fill(folder: &Path) {
        let mut index = SimilarityIndex::open(folder);
        for number in 0..5000 {
            index.add(number, number << 16);
            index.cover(number);
            if number % 1700 == 0 {
                index.spill().unwrap();
            }
        }
        index.close();
        // Opening existing files makes `sled` write a snapshot file.
        SimilarityIndex::open(folder).close();
    }

    fn flip(file: &Path, mut bytes: Vec<u8>, at: usize) {
        bytes[at] ^= 1;
        fs::write(file, bytes).unwrap();
    }

    #[test]
    fn damage_is_found_and_the_index_starts_empty() {
        let (_parent, folder) = temporary();
        fill(&folder);
        let mut paths: Vec<String> = list_files(&folder).unwrap().into_iter().map(|file| file.0).collect();
        paths.push(MANIFEST.to_owned());
        assert!(paths.len() >= 4, "{paths:?}");
        let damages = [
            "none",
            "missing",
            "cut",
            "empty",
            "longer",
            "flip start",
            "flip middle",
            "flip end",
            "swap",
            "folder",
            "extra",
            "link",
        ];
        for path in &paths {
            for damage in damages {
                remove_folder(&folder).unwrap();
                fill(&folder);
                let file = folder.join(path);
                let bytes = fs::read(&file).unwrap();
                let len = bytes.len();
                match damage {
                    "missing" => fs::remove_file(&file).unwrap(),
                    "cut" => fs::write(&file, &bytes[..len - 1]).unwrap(),
                    "empty" => fs::write(&file, b"").unwrap(),
                    "longer" => fs::write(&file, [&bytes[..], &[0]].concat()).unwrap(),
                    "flip start" => flip(&file, bytes, 0),
                    "flip middle" => flip(&file, bytes, len / 2),
                    "flip end" => flip(&file, bytes, len - 1),
                    "swap" => {
                        let other = folder.join(paths.iter().find(|other| *other != path).unwrap());
                        let others = fs::read(&other).unwrap();
                        fs::write(&other, bytes).unwrap();
                        fs::write(&file, others).unwrap();
                    }
                    "folder" => {
                        fs::remove_file(&file).unwrap();
                        fs::create_dir(&file).unwrap();
                    }
                    "extra" => fs::write(folder.join(format!("{path}x")), b"x").unwrap(),
                    "link" => {
                        let target = folder.with_extension("target");
                        fs::rename(&file, &target).unwrap();
                        std::os::unix::fs::symlink(&target, &file).unwrap();
                    }
                    _ => {}
                }
                let mut index = SimilarityIndex::open(&folder);
                let intact = damage == "none";
                assert_eq!(index.is_empty(), !intact, "{path} {damage}");
                assert_eq!(index.covered().len(), if intact { 5000 } else { 0 });
                let entries = found(&mut index, &[17, 4000]);
                assert_eq!(entries.len(), if intact { 2 } else { 0 });
                index.add(9999, 9999 << 16);
                index.cover(9999);
                index.close();
                let mut index = SimilarityIndex::open(&folder);
                assert_eq!(found(&mut index, &[9999]), [(9999, 9999 << 16)], "{path} {damage}");
            }
        }
    }

    #[test]
    fn damaged_values_are_an_error_and_the_index_goes_on() {
        let (_parent, folder) = temporary();
        fill(&folder);
        let mut index = SimilarityIndex::open(&folder);
        index.add(1, 70_000 << 16);
        let disk = index.disk.as_ref().unwrap();
        let (run, store) = (disk.runs[0].id, &disk.store);
        let mut value = store.db.get(key(b'p', run, 0).unwrap()).unwrap().unwrap().to_vec();
        value[20] ^= 1;
        store.db.insert(key(b'p', run, 0).unwrap(), value).unwrap();
        // What was in the buffer is kept; what was stored is lost, and not covered any more.
        // Hook 0 is the only one of the damaged run, whose filter may tell that others are not in it.
        assert_eq!(found(&mut index, &[0, 1]), [(1, 70_000 << 16)]);
        assert!(index.disk.is_none() && index.covered().is_empty());
        index.close();
        assert!(SimilarityIndex::open(&folder).is_empty());
    }

    #[test]
    fn any_meta_is_decoded_or_refused() {
        let covered: RoaringTreemap = (0..100).chain([1 << 40]).collect();
        let run = Run { id: 3, entries: 700, fences: Vec::new(), filter: Vec::new(), filter_len: 0, is_stored: true };
        let bytes = encode_meta(&[run], 4, &covered, 5).unwrap();
        let (runs, next_run, meta) = decode_meta(&bytes).unwrap();
        assert_eq!((runs[0].id, runs[0].entries, next_run, meta.forgotten), (3, 700, 4, 5));
        assert_eq!(meta.covered, covered);
        for len in 0..bytes.len() {
            assert!(decode_meta(&bytes[..len]).is_err(), "{len}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let _ = decode_meta(&damaged);
        }
    }

    #[test]
    fn without_a_folder_it_works_in_memory_and_stays_bounded() {
        let (_parent, folder) = temporary();
        fs::write(&folder, b"a file").unwrap();
        let mut index = SimilarityIndex::open(&folder);
        assert!(index.disk.is_none());
        let count = MEMORY_ENTRIES_MAX as u64 + 1000;
        for number in 0..count {
            index.add(number, (number / 1000) << 16);
            if number % 1000 == 999 {
                index.cover(number / 1000);
            }
        }
        assert!(index.len() <= MEMORY_ENTRIES_MAX as u64);
        let newest = count - 1;
        assert_eq!(found(&mut index, &[newest, 0]), [(newest, (newest / 1000) << 16)]);
        // A covered pack has all its entries.
        let oldest = index.covered().min().unwrap();
        let hooks: Vec<u64> = (oldest * 1000..(oldest + 1) * 1000).collect();
        assert!(oldest > 0);
        assert_eq!(found(&mut index, &hooks).len(), 1000);
        index.close();
        assert_eq!(fs::read(&folder).unwrap(), b"a file");
    }
}
