//! A store in memory with a clock that stands still, and images to put into it.

use std::sync::Arc;
use std::time::Duration;

use snapfs::backend::Backend;
use snapfs::backend::testing::Memory;
use snapfs::clock::{Clock, ManualClock, Timestamp};
use snapfs::error::Result;
use snapfs::ingest::backup::{BackupOptions, BackupReport, backup};
use snapfs::ingest::source::Source;
use snapfs::name::SnapshotName;
use snapfs::store::config::write_new;
use snapfs::store::{MemoryShares, Store};

/// A store over any backend, without derived data unless a folder is given.
pub struct World {
    pub memory: Memory,
    pub clock: Arc<ManualClock>,
    pub derived: Option<tempfile::TempDir>,
}

impl World {
    pub fn new() -> Self {
        let memory = Memory::new();
        let clock = Arc::new(ManualClock::at(Timestamp(1_700_000_000_000_000_000)));
        write_new(&memory, &*clock).unwrap();
        Self { memory, clock, derived: Some(tempfile::tempdir().unwrap()) }
    }

    pub fn store(&self) -> Store {
        self.store_over(Arc::new(self.memory.clone())).unwrap()
    }

    pub fn store_over(&self, backend: Arc<dyn Backend>) -> Result<Store> {
        // Time goes on between two openings, so that nothing depends on its standing still.
        self.clock.advance(Duration::from_secs(1));
        let derived = self.derived.as_ref().map(|d| d.path().to_owned());
        Store::with_backend(backend, derived, self.clock.clone() as Arc<dyn Clock>, MemoryShares::default())
    }
}

pub fn name(text: &str) -> SnapshotName {
    SnapshotName::parse(text).unwrap()
}

/// Backs bytes up as a snapshot.
pub fn put(store: &Store, snapshot: &str, bytes: &[u8]) -> Result<BackupReport> {
    let source = Source::stream("test", std::io::Cursor::new(bytes.to_vec()));
    backup(store, &name(snapshot), source, BackupOptions::default(), &|_| {})
}

/// All bytes of a snapshot, every digest proven.
pub fn get(store: &Store, snapshot: &str) -> Result<Vec<u8>> {
    let reference = SnapshotName::parse_reference(snapshot).unwrap();
    let (_, _, image) = store.open_reference(&reference)?;
    let mut bytes = vec![0; image.bytes() as usize];
    image.read_at(0, &mut bytes)?;
    let mut segment = vec![0; 2 << 20];
    for index in 0..image.grid().segments(image.bytes()) {
        image.read_segment_verified(snapfs::units::SegmentIndex(index), &mut segment)?;
    }
    Ok(bytes)
}

/// Bytes that do not compress and do not repeat, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// A small generator, so that every test says its seed.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}
