//! The invariants as an assertion over bare memory, for the tests of crashes, damage and fences.
//!
//! `check` proves I1 to I5 of what the log has; reading every snapshot back proves I9 against what the test knows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use snapfs::backend::testing::Memory;
use snapfs::backend::{Backend, Key};
use snapfs::catalog::record::Dead;
use snapfs::catalog::roots::root_key;
use snapfs::catalog::vm::{COMMON_HOME, pack_key};
use snapfs::check::{CheckOptions, Severity, check_store};
use snapfs::clock::{Clock, ManualClock};
use snapfs::collect::common::collect_common;
use snapfs::collect::gc::{GcOptions, GcReport, collect_vm};
use snapfs::error::Result;
use snapfs::image::reader::Image;
use snapfs::store::{MemoryShares, Store, full_name};
use snapfs::units::SegmentIndex;

/// What a store shows: files by full name with their bytes, and folders, whose names end in `/`, with none.
pub type Shown = BTreeMap<String, Arc<Vec<u8>>>;

/// Files and folders for a comparison.
pub fn shown<'a>(rows: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Shown {
    rows.into_iter().map(|(name, bytes)| (name.to_owned(), Arc::new(bytes.to_vec()))).collect()
}

/// A store without derived data: another machine after a crash.
pub fn open(backend: Arc<dyn Backend>, clock: &Arc<ManualClock>) -> Result<Store> {
    Store::with_backend(backend, None, clock.clone() as Arc<dyn Clock>, MemoryShares::default())
}

/// All bytes of an open image, every digest proven.
pub fn read_image(image: &Image) -> Result<Vec<u8>> {
    let mut bytes = vec![0; image.bytes() as usize];
    image.read_at(0, &mut bytes)?;
    let mut segment = vec![0; 2 << 20];
    for index in 0..image.grid().segments(image.bytes()) {
        image.read_segment_verified(SegmentIndex(index), &mut segment)?;
    }
    Ok(bytes)
}

/// All that a store shows, drafts too.
pub fn read_store(store: &Store) -> Result<Shown> {
    let mut rows = Shown::new();
    for name in store.vm_names()? {
        let (vm, state) = match store.vm(&name) {
            Ok(found) => found,
            Err(e) if e.kind() == snapfs::error::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        assert!(vm.damage().is_none(), "{:?}", vm.damage());
        rows.insert(format!("{name}/"), Arc::default());
        rows.extend(state.disks.keys().map(|disk| (format!("{name}/{disk}/"), Arc::default())));
        for file in state.files.values() {
            let image = store.open_image(&vm, file)?;
            rows.insert(full_name(vm.name(), file), Arc::new(read_image(&image)?));
        }
    }
    Ok(rows)
}

/// Asserts that a check finds nothing that is lost, and that the store shows one of `wanted`; which of them.
pub fn assert_one_of(memory: &Memory, clock: &Arc<ManualClock>, wanted: &[Shown], what: &str) -> usize {
    let store = open(Arc::new(memory.clone()), clock).unwrap();
    let options = CheckOptions { read_data: true, sample_percent: None, repair: false };
    let report = check_store(&store, options, &mut |_| {}).unwrap();
    let lost: Vec<_> = report.findings.iter().filter(|f| f.severity == Severity::Must).collect();
    assert!(lost.is_empty(), "{what}: {lost:?}");
    let there = read_store(&store).unwrap_or_else(|e| panic!("{what}: {e}"));
    wanted.iter().position(|rows| *rows == there).unwrap_or_else(|| {
        let brief = |rows: &Shown| {
            let brief = rows.iter().map(|(name, bytes)| format!("{name} {} {}", bytes.len(), blake3::hash(bytes)));
            brief.collect::<Vec<_>>().join("; ")
        };
        let wanted: Vec<_> = wanted.iter().map(brief).collect();
        panic!("{what}: the store shows [{}], wanted one of {wanted:#?}", brief(&there))
    })
}

/// Asserts that nothing is lost and that the store shows just this, byte for byte.
pub fn assert_invariants(memory: &Memory, clock: &Arc<ManualClock>, wanted: &Shown, what: &str) {
    assert_one_of(memory, clock, std::slice::from_ref(wanted), what);
}

/// Collects every VM, and the common packs.
pub fn collect_all(store: &Store, exact: bool) -> Result<Vec<GcReport>> {
    let options = GcOptions { exact, dry_run: false };
    let reports = store.vm_names()?.iter().map(|vm| collect_vm(store, vm, options, &mut |_| {})).collect();
    // Leaks go a run after they were seen.
    for _ in 0..3 {
        collect_common(store, options, &mut |_| {})?;
    }
    reports
}

/// Asserts that the objects of all VMs are just those that their logs need.
pub fn assert_no_leaks(memory: &Memory, clock: &Arc<ManualClock>, what: &str) {
    let store = open(Arc::new(memory.clone()), clock).unwrap();
    let mut needed = BTreeSet::new();
    for name in store.vm_names().unwrap() {
        let vm = store.vm_handle(&name);
        let state = vm.refresh().unwrap();
        needed.extend(state.objects().into_keys().map(|object| pack_key(name.as_str(), object).to_string()));
        needed.extend(state.files.values().map(|f| root_key(name.as_str(), f.root).to_string()));
        assert!(state.condemned.is_empty(), "{what}: {:?}", state.condemned);
        let dropped = |dead: &Dead| match dead {
            Dead::Root { id } => root_key(name.as_str(), *id),
            Dead::Pack { object } => pack_key(name.as_str(), *object),
        };
        for key in state.dropping.iter().map(dropped) {
            assert!(!needed.contains(key.as_str()), "{what}: {key} is needed and may be deleted");
        }
    }
    if let Ok(state) = store.common_home().refresh() {
        needed.extend(state.objects().into_keys().map(|object| pack_key(COMMON_HOME, object).to_string()));
    }
    let is_object = |key: &&String| key.contains("/packs/") || key.contains("/snapshots/");
    let there: BTreeSet<String> = memory.objects().keys().filter(is_object).cloned().collect();
    assert_eq!(there, needed, "{what}");
}

/// The keys of a folder of a VM.
pub fn keys(memory: &Memory, prefix: &str) -> Vec<Key> {
    memory.objects().keys().filter(|key| key.starts_with(prefix)).map(|key| Key::new(key.clone())).collect()
}
