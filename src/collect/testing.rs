//! A store in memory and a small writer for the tests of collection and check: images as lists of block contents.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::backend::testing::Memory;
use crate::backend::{Backend, Key};
use crate::catalog::record::{Commit, Op};
use crate::catalog::roots::{root_key, root_object};
use crate::clock::{ManualClock, Timestamp};
use crate::error::Result;
use crate::fingerprint::{digest, fingerprint};
use crate::ingest::lane::{DataLane, RecipeLane};
use crate::limits::{BLOCK_BYTES, SEGMENT_BYTES};
use crate::name::{Reference, SnapshotName, VmName};
use crate::recipe::{GroupPage, GroupRef, Place, Recipe, RootPage, Tally};
use crate::store::session::Session;
use crate::store::{MemoryShares, Store, config};
use crate::units::SlotId;

/// One content number for each block; 0 is a hole.
pub type Model = Vec<u64>;

/// A store with the snapshots that it should have.
pub struct Bench {
    pub memory: Memory,
    pub store: Store,
    pub wanted: BTreeMap<String, Model>,
    /// Slots that are left out of the bitmap of every group page, as no right writer does.
    pub bitmap_lacks: usize,
    slots: HashMap<(String, u64), SlotId>,
    recipes: HashMap<(String, Model), Place>,
}

pub fn open(backend: Arc<dyn Backend>) -> Store {
    let clock = Arc::new(ManualClock::at(Timestamp(1_000_000_000)));
    Store::with_backend(backend, None, clock, MemoryShares::default()).unwrap()
}

/// Noise that shrinks by half.
pub fn block(content: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES];
    if content != 0 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&content.to_le_bytes());
        hasher.finalize_xof().fill(&mut bytes[..BLOCK_BYTES / 2]);
    }
    bytes
}

pub fn vm(name: &str) -> VmName {
    VmName::new(name).unwrap()
}

impl Bench {
    pub fn new() -> Self {
        Self::in_memory(Memory::new())
    }

    pub fn in_memory(memory: Memory) -> Self {
        config::write_new(&memory, &ManualClock::default()).unwrap();
        let store = open(Arc::new(memory.clone()));
        Self { memory, store, wanted: BTreeMap::new(), bitmap_lacks: 0, slots: HashMap::new(), recipes: HashMap::new() }
    }

    /// Slots and recipes that were stored may be gone: do not refer to them.
    pub fn forget_slots(&mut self) {
        self.slots.clear();
        self.recipes.clear();
    }

    pub fn backup(&mut self, name: &str, model: Model) {
        self.write(name, &model, true).unwrap();
        self.wanted.insert(name.to_owned(), model);
    }

    /// Stores what is not stored yet; without `commit` as a writer does that is killed before its commit.
    pub fn write(&mut self, name: &str, model: &Model, commit: bool) -> Result<()> {
        let name = SnapshotName::parse(name).unwrap();
        let handle = self.store.vm_or_create(&name.vm)?;
        let session = Arc::new(Session::begin_without_index(&self.store, &handle)?);
        let mut data = DataLane::new(session.clone());
        let mut recipes = RecipeLane::new(session.clone());
        let mut page = GroupPage::default();
        let mut known = (self.slots.clone(), self.recipes.clone());
        for contents in model.chunks(512) {
            if contents.iter().all(|c| *c == 0) {
                page.recipes.push(None);
                continue;
            }
            let mut slots = Vec::new();
            let mut bytes = Vec::new();
            for content in contents {
                let block = block(*content);
                slots.push(match known.0.get(&(name.vm.to_string(), *content)) {
                    _ if *content == 0 => None,
                    Some(slot) => Some(*slot),
                    None => {
                        let slot = data.store(&block, fingerprint(&block))?;
                        known.0.insert((name.vm.to_string(), *content), slot);
                        Some(slot)
                    }
                });
                bytes.extend(block);
            }
            data.flush_full_frames()?;
            bytes.resize(SEGMENT_BYTES, 0);
            for slot in slots.iter().flatten() {
                page.slots.insert(slot.0);
            }
            page.data_blocks += slots.iter().flatten().count() as u32;
            let recipe = Recipe::from_slots(digest(&bytes), &slots);
            let place = match known.1.get(&(name.vm.to_string(), contents.to_vec())) {
                Some(place) => *place,
                None => {
                    let place = recipes.store(recipe.encode())?;
                    known.1.insert((name.vm.to_string(), contents.to_vec()), place);
                    place
                }
            };
            page.recipes.push(Some(place));
        }
        for slot in page.slots.iter().take(self.bitmap_lacks).collect::<Vec<_>>() {
            page.slots.remove(slot);
        }
        while page.recipes.last() == Some(&None) {
            page.recipes.pop();
        }
        recipes.flush()?;
        for place in page.recipes.iter_mut().flatten() {
            *place = recipes.with_hint(*place);
        }
        let groups = if page.recipes.is_empty() {
            Vec::new()
        } else {
            let place = recipes.store(page.encode())?;
            recipes.flush()?;
            vec![GroupRef { group: 0, data_blocks: page.data_blocks, page: recipes.with_hint(place) }]
        };
        let mut packs = data.finish()?;
        packs.extend(recipes.finish()?);
        let file = session.next_serial()?;
        let root = RootPage {
            incarnation: handle.state().incarnation,
            id: session.next_serial()?,
            file,
            image_bytes: (model.len() * BLOCK_BYTES) as u64,
            lead: 0,
            created: Timestamp(1),
            parent: None,
            data_blocks: u64::from(page.data_blocks),
            tally: Tally::default(),
            groups,
        };
        handle.backend().put_new(&root_key(handle.name(), root.id), &root_object(&root))?;
        if commit {
            session.append(|_| {
                let commit = Commit {
                    file,
                    disk: None,
                    name: name.file.as_str().to_owned(),
                    root: root.id,
                    image_bytes: root.image_bytes,
                    data_blocks: root.data_blocks,
                    uid: 0,
                    gid: 0,
                    mtime: Timestamp(1),
                    closed: true,
                    sealed: true,
                    packs: packs.clone(),
                };
                Ok((vec![Op::Commit { commit: Box::new(commit) }], ()))
            })?;
            (self.slots, self.recipes) = known;
        }
        Ok(())
    }

    pub fn forget(&mut self, names: &[&str]) {
        let names: Vec<_> = names.iter().map(|n| SnapshotName::parse(n).unwrap()).collect();
        crate::collect::forget::forget(&self.store, &names).unwrap();
        for name in names {
            self.wanted.remove(&name.to_string());
        }
    }

    /// Everything that should be there is, and nothing else.
    pub fn verify(&self, backend: &Memory) {
        let store = open(Arc::new(backend.clone()));
        let mut names = Vec::new();
        for vm in store.vm_names().unwrap() {
            let Ok((handle, state)) = store.vm(&vm) else { continue };
            names.extend(state.files.values().map(|f| crate::store::full_name(handle.name(), f)));
        }
        names.sort();
        assert_eq!(names, self.wanted.keys().cloned().collect::<Vec<_>>());
        for (name, model) in &self.wanted {
            read(&store, name, model);
        }
    }

    pub fn bytes(&self, prefix: &str) -> u64 {
        let objects = self.memory.objects();
        objects.iter().filter(|(key, _)| key.starts_with(prefix)).map(|(_, bytes)| bytes.len() as u64).sum()
    }

    pub fn keys(&self, prefix: &str) -> Vec<Key> {
        self.memory.objects().keys().filter(|key| key.starts_with(prefix)).map(|key| Key::new(key.clone())).collect()
    }
}

pub fn read(store: &Store, name: &str, model: &Model) {
    let reference: Reference = SnapshotName::parse_reference(name).unwrap();
    let (_, _, image) = store.open_reference(&reference).unwrap();
    let mut out = vec![0; model.len() * BLOCK_BYTES];
    image.read_at(0, &mut out).unwrap_or_else(|e| panic!("{name}: {e}"));
    for (at, content) in model.iter().enumerate() {
        assert!(out[at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES] == block(*content), "{name}: block {at}");
    }
}
