//! A store: one folder of objects with one configuration, opened with its caches.
//!
//! ```text
//!   Store ── caches, memory shares, clock
//!     └── Backend (local folder; wrappers around it in tests)
//!           vms/<vm>/{log,snapshots,packs}   common/{log,packs,popular}   derived/   config/   snapfs.toml
//! ```

pub mod common;
pub mod config;
pub mod session;
pub mod sightings;
pub mod targets;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::limit::Limited;
use crate::backend::local::Local;
use crate::backend::{Backend, Guard, Key};
use crate::catalog::hold::HoldId;
use crate::catalog::record::Attributes;
use crate::catalog::roots::{read_root, root_key};
use crate::catalog::state::{FileEntry, VmState};
use crate::catalog::vm::{COMMON_HOME, Vm, home_folder};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result, corrupt, invalid, not_found};
use crate::image::reader::{Image, IsGone};
use crate::limits::{MEMORY_BYTES_DEFAULT, MEMORY_BYTES_MIN};
use crate::name::{Reference, SnapshotName, VmName};
use crate::pack::reader::{Caches, Packs};
use crate::popular::current::CurrentIndex;
use crate::store::common::Homes;
use crate::store::config::{Settings, StoreConfig};
use crate::store::targets::NewTargets;
use crate::units::RootId;

/// How the memory cap is shared out. What is left is for the program, its stacks and the allocator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryShares {
    /// Decompressed frames, indexes, slot pages.
    pub cache_bytes: usize,
    /// Segments being written, of all files together.
    pub segments: usize,
    /// Maps of the clones that are open.
    pub map_bytes: u64,
    /// The popular index.
    pub popular_bytes: usize,
    /// Common blocks that it does not have, and what other VMs have.
    pub sighting_bytes: usize,
}

impl MemoryShares {
    /// The shares of a cap.
    ///
    /// # Errors
    /// `Invalid` below [`MEMORY_BYTES_MIN`].
    pub fn of(cap_bytes: u64) -> Result<Self> {
        if cap_bytes < MEMORY_BYTES_MIN {
            return Err(invalid(format!("max-memory is {cap_bytes} bytes, the least is {MEMORY_BYTES_MIN}")));
        }
        let spare = cap_bytes - (MEMORY_BYTES_MIN - (32 << 20));
        let cache_bytes = usize::try_from(spare / 3).unwrap_or(usize::MAX);
        let segments = usize::try_from(spare / 3 / (2 << 20)).unwrap_or(usize::MAX).clamp(12, 4096);
        let popular_bytes = usize::try_from(spare / 5 - spare / 20).unwrap_or(usize::MAX);
        let sighting_bytes = usize::try_from(spare / 20).unwrap_or(usize::MAX);
        Ok(Self { cache_bytes, segments, map_bytes: spare / 8, popular_bytes, sighting_bytes })
    }
}

impl Default for MemoryShares {
    fn default() -> Self {
        Self::of(MEMORY_BYTES_DEFAULT).unwrap_or(Self {
            cache_bytes: 48 << 20,
            segments: 24,
            map_bytes: 20 << 20,
            popular_bytes: 24 << 20,
            sighting_bytes: 8 << 20,
        })
    }
}

/// An open store.
pub struct Store {
    backend: Arc<dyn Backend>,
    derived: Option<PathBuf>,
    caches: Arc<Caches>,
    clock: Arc<dyn Clock>,
    shares: MemoryShares,
    config: StoreConfig,
    vms: Mutex<HashMap<String, Arc<Vm>>>,
    // Of a store in one folder: who gives it targets must know that nobody goes on writing to the folder alone.
    alone: Option<Box<dyn Guard>>,
    common: Arc<Vm>,
    popular: Arc<CurrentIndex>,
    promotes: bool,
}

/// The key of a VM's lock.
pub fn lock_key(vm: &str) -> Key {
    Key::new(format!("{}/write.lock", home_folder(vm)))
}

impl Store {
    /// Makes a store in a folder that is empty or not there yet.
    ///
    /// # Errors
    /// `Exists` when there is a store or anything else, `Denied`, `ReadOnly`, `NoSpace`, `Unavailable`.
    pub fn init(root: &Path, clock: &dyn Clock) -> Result<()> {
        config::make_folder(root)?;
        let backend = Local::open(root)?;
        config::write_new(&backend, clock)?;
        backend.keep_reserve();
        Ok(())
    }

    /// Makes a store over several targets: folders that are empty or not there yet. `root` has only the configuration.
    ///
    /// # Errors
    /// `Invalid` for numbers that do not fit; as [`Store::init`].
    pub fn init_with(root: &Path, new: &NewTargets, clock: &dyn Clock) -> Result<()> {
        let replicas = new.replicas()?;
        if new.paths.is_empty() {
            return Self::init(root, clock);
        }
        let overlap = |path: &PathBuf| path.starts_with(root) || root.starts_with(path);
        if let Some(path) = new.paths.iter().find(|path| overlap(path)) {
            let what = format!("target {} and store {}: one is in the other", path.display(), root.display());
            return Err(invalid(what));
        }
        config::make_folder(root)?;
        let config = config::new_config(clock)?;
        let mut record = config::new_record(&config, clock);
        record.targets = targets::make_targets(&config.store, &new.paths)?;
        record.replicas = replicas;
        for path in &new.paths {
            let target = Local::open(path)?;
            config::write_first(&target, &config, &record)?;
            target.keep_reserve();
        }
        // Last: its presence makes the store.
        config::write_first(&Local::open(root)?, &config, &record)
    }

    /// Opens the store in a folder.
    ///
    /// # Errors
    /// `NotFound` when there is none, `Corrupt` or `Unsupported` when its configuration cannot be used; all name
    /// the path.
    pub fn open(root: &Path, clock: Arc<dyn Clock>, shares: MemoryShares) -> Result<Self> {
        let about = |e: Error| e.within(format!("store {}", root.display()));
        if !root.is_dir() {
            return Err(not_found(format!("store {}: there is no such folder", root.display())));
        }
        let home: Arc<dyn Backend> = Arc::new(Local::open(root).map_err(about)?);
        let derived = Some(root.join("derived"));
        let config = config::read_file(&*home).map_err(about)?;
        // Before the record is read: see `add_target`. A medium without locks has no other hosts either.
        let alone = home.pin(&Key::new(config::FILE_NAME)).ok();
        // Damage of the one record that is here may be made up for by the targets.
        let has_targets = match config::newest_record(&*home, &config) {
            Ok((_, record)) => !record.targets.is_empty(),
            Err(e) => targets::are_told(&*home, &config).then_some(true).ok_or(e).map_err(about)?,
        };
        if !has_targets {
            let mut store = Self::with_config(home, config, derived, clock, shares).map_err(about)?;
            store.alone = alone;
            return Ok(store);
        }
        drop(alone);
        let root = std::path::absolute(root).map_err(|e| about(Error::io("its path", e)))?;
        let backend = targets::open_replicated(&root, home, &config, &clock).map_err(about)?;
        Self::with_config(Arc::new(backend), config, derived, clock, shares).map_err(about)
    }

    /// Opens the store that a backend holds; `derived` is where rebuildable data may lie.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn with_backend(
        backend: Arc<dyn Backend>,
        derived: Option<PathBuf>,
        clock: Arc<dyn Clock>,
        shares: MemoryShares,
    ) -> Result<Self> {
        let config = config::read(&*backend)?;
        Self::with_config(backend, config, derived, clock, shares)
    }

    fn with_config(
        backend: Arc<dyn Backend>,
        config: StoreConfig,
        derived: Option<PathBuf>,
        clock: Arc<dyn Clock>,
        shares: MemoryShares,
    ) -> Result<Self> {
        let caches = Arc::new(Caches::new(shares.cache_bytes));
        let common = Arc::new(Vm::new(COMMON_HOME, backend.clone(), clock.clone()));
        let popular = Arc::default();
        Ok(Self {
            backend,
            derived,
            caches,
            clock,
            shares,
            config,
            vms: Mutex::default(),
            common,
            popular,
            promotes: false,
            alone: None,
        })
    }

    /// The same store, whose reading and writing is held to so many bytes a second. To be called before anything else.
    #[must_use]
    pub fn limited_to(mut self, bytes_per_second: u64) -> Self {
        self.backend = Arc::new(Limited::new(self.backend, self.clock.clone(), bytes_per_second));
        self.vms = Mutex::default();
        self.common = Arc::new(Vm::new(COMMON_HOME, self.backend.clone(), self.clock.clone()));
        self
    }

    /// The same store, whose writers put blocks that another VM of the group has into common packs at once (second
    /// sighting), or not, as it is without this.
    #[must_use]
    pub fn promoting(mut self, on: bool) -> Self {
        self.promotes = on;
        self
    }

    /// Whether writers look for what other VMs have.
    pub fn promotes(&self) -> bool {
        self.promotes
    }

    /// Lets others know no longer that the store is open in one folder: for who gives it targets.
    pub fn forget_alone(&mut self) {
        self.alone = None;
    }

    /// Where objects are.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The store's configuration.
    pub fn config(&self) -> &StoreConfig {
        &self.config
    }

    /// What is set in the store now; others may change it at any time. Cost: a listing and a read.
    ///
    /// # Errors
    /// As [`config::newest_record`].
    pub fn settings(&self) -> Result<Settings> {
        Ok(config::newest_record(&*self.backend, &self.config)?.1.settings)
    }

    /// Changes what is set in the store, for all who use it; returns what is set then.
    ///
    /// # Errors
    /// What `change` returns; as [`config::change_record`].
    pub fn change_settings(&self, change: impl Fn(&mut Settings) -> Result<()>) -> Result<Settings> {
        let changed =
            config::change_record(&*self.backend, &self.config, &*self.clock, |record| change(&mut record.settings))?;
        Ok(changed.settings)
    }

    /// The store's clock.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// How memory is shared out.
    pub fn shares(&self) -> MemoryShares {
        self.shares
    }

    /// The folder of a VM's derived data, if derived data is kept.
    pub fn derived_folder(&self, vm: &str) -> Option<PathBuf> {
        self.derived.as_ref().map(|folder| folder.join("vms").join(vm))
    }

    /// The folder of all derived data, if it is kept.
    pub fn derived_root(&self) -> Option<&Path> {
        self.derived.as_deref()
    }

    /// The handle of a VM, whether it is there or not. No I/O.
    pub fn vm_handle(&self, name: &VmName) -> Arc<Vm> {
        let mut vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
        vms.entry(name.as_str().to_owned())
            .or_insert_with(|| Arc::new(Vm::new(name.as_str(), self.backend.clone(), self.clock.clone())))
            .clone()
    }

    /// A VM and its newest state.
    ///
    /// # Errors
    /// `NotFound` when it is not there (or was deleted), `Corrupt`, `Unavailable`.
    pub fn vm(&self, name: &VmName) -> Result<(Arc<Vm>, Arc<VmState>)> {
        let vm = self.vm_handle(name);
        let state = vm.refresh()?;
        if state.exists() { Ok((vm, state)) } else { Err(not_found(format!("VM {:?} is not there", name.as_str()))) }
    }

    /// The names of all VMs that have a log, deleted ones included. Cost: one listing.
    ///
    /// # Errors
    /// `Unavailable`, `Denied`.
    pub fn vm_names(&self) -> Result<Vec<VmName>> {
        let rows = self.backend.list(&Key::new("vms"))?;
        // A name that is not legal was not made by us: `check` tells of it.
        Ok(rows.iter().filter(|r| r.is_folder).filter_map(|r| VmName::new(&r.name).ok()).collect())
    }

    /// A VM that can be written to, made if it is not there.
    ///
    /// # Errors
    /// `NoSpace`, `ReadOnly`, `Corrupt`, `Unavailable`.
    pub fn vm_or_create(&self, name: &VmName) -> Result<Arc<Vm>> {
        let vm = self.vm_handle(name);
        match vm.refresh() {
            Ok(state) if state.exists() => return Ok(vm),
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        vm.create(self.new_folder())?;
        Ok(vm)
    }

    /// Attributes of a folder that this process makes.
    pub fn new_folder(&self) -> Attributes {
        Attributes {
            mode: 0o700,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            mtime: self.clock.now(),
        }
    }

    /// The packs of a VM as a reader sees them, and the common ones.
    pub fn packs(&self, vm: &Arc<Vm>) -> Arc<Packs> {
        let homes = Homes { vm: vm.clone(), common: self.common.clone() };
        Arc::new(Packs::new(self.backend.clone(), self.caches.clone(), Arc::new(homes)))
    }

    /// The caches that all readers share.
    pub fn caches(&self) -> &Arc<Caches> {
        &self.caches
    }

    /// The home of common packs, whether it is there or not. No I/O.
    pub fn common_home(&self) -> &Arc<Vm> {
        &self.common
    }

    /// The popular index that this process has in memory.
    pub fn popular(&self) -> &Arc<CurrentIndex> {
        &self.popular
    }

    /// The file that a reference means in a state.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn resolve(state: &VmState, reference: &Reference) -> Result<FileEntry> {
        let disk = reference.disk.as_ref().map(|d| d.as_str());
        let found = match &reference.file {
            Some(file) => state.find(disk, file.as_str()),
            None => state.latest(disk),
        };
        found.cloned().ok_or_else(|| not_found(format!("snapshot {reference} is not there")))
    }

    /// Opens a snapshot (or a draft's last commit) for reading, held against collection (I6).
    ///
    /// # Errors
    /// `NotFound`, `Stale` when it was forgotten meanwhile, `Corrupt`, `Unavailable`.
    pub fn open_image(&self, vm: &Arc<Vm>, file: &FileEntry) -> Result<Image> {
        let name = format!("{}/{}", vm.name(), file.path());
        let about = |e: Error| e.within(&name);
        let key = root_key(vm.name(), file.root);
        let missing = |e: Error| match e.kind() {
            ErrorKind::NotFound => {
                // Gone because it was forgotten, or gone although the log has it?
                let still = vm.refresh().is_ok_and(|now| now.files.get(&file.id).is_some_and(|f| f.root == file.root));
                let kind = if still { ErrorKind::Corrupt } else { ErrorKind::Stale };
                Error::new(kind, format!("{key}: is missing")).because(e)
            }
            _ => e,
        };
        let pin = self.backend.pin(&key).map_err(missing).map_err(about)?;
        // Collection asks for pins after it has read the forget record. Whoever pins and then still finds the
        // file in the log was early enough; the other is told that it is gone.
        let now = vm.refresh()?;
        if now.files.get(&file.id).is_none_or(|f| f.root != file.root) {
            return Err(about(Error::new(ErrorKind::Stale, "was forgotten or replaced meanwhile")));
        }
        let root = read_root(&*self.backend, vm.name(), now.incarnation, file.root).map_err(missing).map_err(about)?;
        Ok(Image::new(name.clone(), Arc::new(root), self.packs(vm), pin, is_gone(vm, file.root)))
    }

    /// Opens a snapshot that a hold keeps, forgotten or not; `name` is for messages. Works for a VM that was deleted.
    /// The image is pinned as any other: it can be read to its end though the hold is released meanwhile.
    ///
    /// # Errors
    /// `Stale` when neither a hold nor the log has the snapshot any more, `Corrupt`, `Unavailable`.
    pub fn open_held(&self, vm: &Arc<Vm>, hold: HoldId, name: &str) -> Result<Image> {
        let about = |e: Error| e.within(name);
        let id = hold.root;
        let key = root_key(vm.name(), id);
        let gone = || Error::new(ErrorKind::Stale, format!("{key}: neither a hold nor the log has it any more"));
        let is_kept = || -> Result<bool> {
            let state = vm.refresh()?;
            Ok(state.files.values().any(|f| f.root == id) || vm.held_roots()?.contains(&id))
        };
        let missing = |e: Error| match (e.kind(), is_kept()) {
            (ErrorKind::NotFound, Ok(true)) => corrupt(format!("{key}: is missing")).because(e),
            (ErrorKind::NotFound, Ok(false)) => gone().because(e),
            _ => e,
        };
        let pin = self.backend.pin(&key).map_err(missing).map_err(about)?;
        // Collection lists holds and then asks for pins: who pins and then still finds the hold was early enough.
        if !is_kept().map_err(about)? {
            return Err(about(gone()));
        }
        let incarnation = vm.state().incarnation;
        let root = read_root(&*self.backend, vm.name(), incarnation, id).map_err(missing).map_err(about)?;
        Ok(Image::new(name.to_owned(), Arc::new(root), self.packs(vm), pin, is_gone(vm, id)))
    }

    /// Opens what a reference means.
    ///
    /// # Errors
    /// As [`Store::open_image`].
    pub fn open_reference(&self, reference: &Reference) -> Result<(Arc<Vm>, FileEntry, Image)> {
        let (vm, state) = self.vm(&reference.vm).map_err(|e| match e.kind() {
            ErrorKind::NotFound => not_found(format!("snapshot {reference} is not there")).because(e),
            _ => e,
        })?;
        // A draft that commits between the look at the log and the open is looked up again.
        let mut state = state;
        for _ in 0..16 {
            let file = Self::resolve(&state, reference)?;
            match self.open_image(&vm, &file) {
                Err(e) if e.kind() == ErrorKind::Stale => state = vm.refresh()?,
                Err(e) => return Err(e),
                Ok(image) => return Ok((vm, file, image)),
            }
        }
        Err(Error::new(ErrorKind::Unavailable, format!("{reference}: changes all the time")))
    }
}

/// Whether the log of a VM does not know a root page any more.
fn is_gone(vm: &Arc<Vm>, root: RootId) -> IsGone {
    let vm = vm.clone();
    Box::new(move || vm.refresh().is_ok_and(|now| !now.knows_root(root)) && vm.damage().is_none())
}

/// The name of a file of a VM.
pub fn full_name(vm: &str, file: &FileEntry) -> String {
    format!("{vm}/{}", file.path())
}

/// Splits a snapshot name into what the log keeps.
pub fn disk_and_file(name: &SnapshotName) -> (Option<String>, String) {
    (name.disk.as_ref().map(|d| d.as_str().to_owned()), name.file.as_str().to_owned())
}
