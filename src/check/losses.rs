//! Which bytes of which snapshots stand on what was found lost, and the marks that tell of them in the log.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::Serialize;

use crate::catalog::record::Op;
use crate::catalog::roots::read_root;
use crate::catalog::state::VmState;
use crate::catalog::vm::Vm;
use crate::check::faults::{Faults, Subject};
use crate::error::Result;
use crate::image::tree::{read_group, read_recipe};
use crate::limits::{BLOCK_BYTES, GROUP_BYTES, GROUP_SEGMENTS, SEGMENT_BLOCKS};
use crate::pack::reader::Packs;
use crate::recipe::{GroupRef, RootPage};
use crate::store::full_name;
use crate::units::{FileId, PackNumber, RootId};

/// Ranges of one snapshot that a finding tells. More are only counted.
const RANGES_MAX: usize = 16;

/// Ranges of a group page that are remembered. Beyond, only their blocks are counted.
const GROUP_RANGES_MAX: usize = 1024;

/// Ranges remembered for all group pages (about 16 MiB). Beyond, a page that many share is read again for each.
const RANGES_KNOWN_MAX: usize = 1 << 20;

/// Bytes of an image, from `offset` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LostRange {
    /// Offset in the image.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// What a snapshot has lost with an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// The snapshot.
    pub snapshot: String,
    /// Bytes of it that cannot be read. Where a whole recipe or more is lost, its holes are among them.
    pub bytes: u64,
    /// Where, in the order of offsets; at most 16.
    pub ranges: Vec<LostRange>,
    /// Ranges that are not in the list, or more: very many in one GiB count as one.
    pub ranges_more: u64,
}

impl Lost {
    fn of(snapshot: &str) -> Self {
        Self { snapshot: snapshot.to_owned(), bytes: 0, ranges: Vec::new(), ranges_more: 0 }
    }

    fn add(&mut self, offset: u64, bytes: u64) {
        self.bytes += bytes;
        let is_full = self.ranges.len() == RANGES_MAX;
        match self.ranges.last_mut() {
            Some(last) if self.ranges_more == 0 && last.offset + last.bytes == offset => last.bytes += bytes,
            _ if is_full => self.ranges_more += 1,
            _ => self.ranges.push(LostRange { offset, bytes }),
        }
    }
}

/// Blocks of a group that are lost: with which pack, the first block, how many.
#[derive(Debug, Default)]
struct GroupLoss {
    ranges: Vec<(PackNumber, u32, u32)>,
    /// Blocks that are not in the list, with the pack of the last of them.
    beyond: Option<(PackNumber, u32)>,
}

impl GroupLoss {
    fn add(&mut self, pack: PackNumber, first: u32, blocks: u32) {
        let is_full = self.ranges.len() == GROUP_RANGES_MAX;
        match self.ranges.last_mut() {
            Some((of, from, count)) if *of == pack && *from + *count == first && self.beyond.is_none() => {
                *count += blocks;
            }
            _ if is_full => self.beyond = Some((pack, self.beyond.map_or(0, |(_, count)| count) + blocks)),
            _ => self.ranges.push((pack, first, blocks)),
        }
    }
}

/// Names the snapshots that stand on what `faults` has lost, with the ranges; bytes lost of each file, 0 included. `held`
/// are forgotten snapshots and their names.
///
/// Memory: about 16 MiB at most for what is remembered of pages. Cost: nothing when nothing is lost; else all group
/// pages, and the recipes of those that are concerned.
pub fn name_losses(
    vm: &Vm,
    packs: &Packs,
    state: &VmState,
    common: Option<&VmState>,
    held: &BTreeMap<RootId, String>,
    faults: &mut Faults,
) -> BTreeMap<FileId, u64> {
    let mut search = Search { packs, known: HashMap::new(), ranges_known: 0 };
    let mut lost = BTreeMap::new();
    let files = state.files.values().map(|file| (file.root, full_name(vm.name(), file), Some(file)));
    let held = held.iter().map(|(root, name)| (*root, name.clone(), None));
    for (id, name, file) in files.chain(held) {
        let mut bytes = 0;
        if faults.lost_roots.contains(&id) {
            let mut found = Lost::of(&name);
            if let Some(file) = file.filter(|file| file.image_bytes > 0) {
                found.add(0, file.image_bytes);
                bytes = found.bytes;
            }
            faults.concern(&Subject::Root(id), found);
        } else if faults.has_losses()
            && let Ok(root) = read_root(&**vm.backend(), vm.name(), state.incarnation, id)
        {
            for (pack, found) in search.of_snapshot(&root, &name, faults) {
                bytes += found.bytes;
                faults.concern(&Subject::of_pack(pack, state, common), found);
            }
        }
        if let Some(file) = file {
            lost.insert(file.id, bytes);
        }
    }
    lost
}

struct Search<'a> {
    packs: &'a Packs,
    known: HashMap<u64, Arc<GroupLoss>>,
    ranges_known: usize,
}

impl Search<'_> {
    fn of_snapshot(&mut self, root: &RootPage, name: &str, faults: &Faults) -> BTreeMap<PackNumber, Lost> {
        let mut found: BTreeMap<PackNumber, Lost> = BTreeMap::new();
        let grid = root.grid();
        for group in &root.groups {
            let loss = self.of_group(group, faults);
            let start = u64::from(group.group) * GROUP_BYTES;
            for (pack, first, blocks) in &loss.ranges {
                let at = |block: u32| {
                    let offset = grid.image_offset(start + u64::from(block) * BLOCK_BYTES as u64);
                    offset.min(root.image_bytes)
                };
                let (from, to) = (at(*first), at(first + blocks));
                if to > from {
                    found.entry(*pack).or_insert_with(|| Lost::of(name)).add(from, to - from);
                }
            }
            if let Some((pack, blocks)) = loss.beyond {
                let lost = found.entry(pack).or_insert_with(|| Lost::of(name));
                lost.bytes += u64::from(blocks) * BLOCK_BYTES as u64;
                lost.ranges_more += 1;
            }
        }
        found
    }

    fn of_group(&mut self, group: &GroupRef, faults: &Faults) -> Arc<GroupLoss> {
        let slot = group.page.slot.0;
        if let Some(known) = self.known.get(&slot) {
            return known.clone();
        }
        let loss = Arc::new(self.read_group(group, faults));
        if self.ranges_known < RANGES_KNOWN_MAX {
            self.ranges_known += 1 + loss.ranges.len();
            self.known.insert(slot, loss.clone());
        }
        loss
    }

    fn read_group(&self, group: &GroupRef, faults: &Faults) -> GroupLoss {
        let mut loss = GroupLoss::default();
        let slot = group.page.slot;
        let page = if faults.is_lost(slot) { None } else { read_group(self.packs, &group.page).ok() };
        let Some(page) = page else {
            loss.add(slot.pack(), 0, (GROUP_SEGMENTS * SEGMENT_BLOCKS) as u32);
            return loss;
        };
        let stands = faults.touch(&page.slots) || faults.touch(&page.common);
        for (segment, place) in (0_u32..).zip(&page.recipes) {
            let Some(place) = place else { continue };
            let first = segment * SEGMENT_BLOCKS as u32;
            let is_lost = faults.is_lost(place.slot);
            if !is_lost && !stands {
                continue;
            }
            let recipe = if is_lost { None } else { read_recipe(self.packs, place).ok() };
            let Some(recipe) = recipe else {
                loss.add(place.slot.pack(), first, SEGMENT_BLOCKS as u32);
                continue;
            };
            for extent in &recipe.extents {
                for block in 0..u32::from(extent.blocks) {
                    let Some(slot) = extent.first_slot.plus(block).filter(|slot| faults.is_lost(*slot)) else {
                        continue;
                    };
                    loss.add(slot.pack(), first + u32::from(extent.first_block) + block, 1);
                }
            }
        }
        loss
    }
}

/// Marks sealed snapshots in the log by what they have lost, and takes marks away; `lost` is what a check found. A check
/// that did not read all data (`is_complete` is false) may have overlooked losses: it only marks more. How many
/// snapshots are marked anew or with another number, and how many marks went.
///
/// Cost: two listings; a record when the log says otherwise.
///
/// # Errors
/// `NoSpace`, `ReadOnly`, `Corrupt`, `Unavailable`: then nothing was marked.
pub fn mark(vm: &Vm, seen: &VmState, lost: &BTreeMap<FileId, u64>, is_complete: bool) -> Result<(u64, u64)> {
    let ops_of = |state: &VmState| -> Vec<Op> {
        let files = state.files.values().filter(|file| file.sealed.is_some());
        // Of a file that changed since it was checked nothing is known.
        let checked = files.filter(|file| seen.files.get(&file.id).is_some_and(|then| then.root == file.root));
        let marks = checked.filter_map(|file| {
            let old = state.lost.get(&file.id).copied().unwrap_or(0);
            let found = *lost.get(&file.id)?;
            let lost_bytes = if is_complete { found } else { found.max(old) };
            (lost_bytes != old).then_some(Op::Mark { file: file.id, lost_bytes })
        });
        marks.collect()
    };
    vm.append(None, |state| {
        let ops = ops_of(state);
        let gone = ops.iter().filter(|op| matches!(op, Op::Mark { lost_bytes: 0, .. })).count() as u64;
        let marked = ops.len() as u64 - gone;
        Ok((ops, (marked, gone)))
    })
}
