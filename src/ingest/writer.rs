//! W3-W8: whole segments in, recipes out, and the commit. One writer for each image that is being written.

use std::sync::Arc;

use rayon::prelude::*;

use crate::catalog::record::{Commit, Op, PackEntry};
use crate::catalog::roots::{root_key, root_object};
use crate::catalog::state::VmState;
use crate::clock::Timestamp;
use crate::dedup::ladder::{Held, Origin, Plan, plan};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{Fingerprint, digest, fingerprint_blocks, is_zero};
use crate::image::tree::Tree;
use crate::ingest::common::CommonWriter;
use crate::ingest::draft_tree::DraftTree;
use crate::ingest::lane::{DataLane, RecipeLane};
use crate::ingest::sighted::{Trail, sighted};
use crate::limits::{BLOCK_BYTES, SEGMENT_BLOCKS};
use crate::recipe::{Place, Recipe, RootPage, Tally};
use crate::store::session::Session;
use crate::units::{FileId, Grid, RootId, SegmentIndex, SlotId};

/// Pages of slot tables that one segment is compared with, at the most: 8 192 blocks.
const PAGES_MAX: usize = 64;

/// Pages of common packs beside them: in the worst case every block is popular and alone on its page.
const POPULAR_PAGES_MAX: usize = SEGMENT_BLOCKS;

/// How often a plan is made again with further pages.
const ROUNDS_MAX: usize = 4;

/// What a commit says about its file.
#[derive(Debug, Clone)]
pub struct CommitRequest {
    /// The file.
    pub file: FileId,
    /// Disk folder and name, for a file that the log does not know yet.
    pub disk: Option<String>,
    /// Name.
    pub name: String,
    /// Whether an earlier commit is in the log: then it must still be there.
    pub is_known: bool,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// How the image lies on the grid.
    pub grid: Grid,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Whether the last writer has closed it.
    pub closed: bool,
    /// Whether it is sealed at once.
    pub sealed: bool,
}

/// Writes one image.
pub struct Writer {
    session: Arc<Session>,
    parent: Option<Arc<Tree>>,
    data: DataLane,
    // For blocks that another VM has; made when the first is met.
    common: Option<CommonWriter>,
    trail: Trail,
    recipes: RecipeLane,
    tally: Tally,
    stored_before: u64,
    brought: Vec<PackEntry>,
}

/// What the first look at a segment tells.
struct Seen {
    is_data: Vec<bool>,
    digest: Option<Fingerprint>,
}

impl Writer {
    /// A writer whose segments are compared with those of `parent`.
    pub fn new(session: Arc<Session>, parent: Option<Arc<Tree>>) -> Self {
        Self {
            data: DataLane::new(session.clone()),
            common: None,
            trail: Trail::default(),
            recipes: RecipeLane::new(session.clone()),
            session,
            parent,
            tally: Tally::default(),
            stored_before: 0,
            brought: Vec::new(),
        }
    }

    /// The session that it writes in.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// What the levels did since the writer was made.
    pub fn tally(&self) -> Tally {
        let mut tally = self.tally.clone();
        tally.bytes_stored = self.bytes_stored() - self.stored_before;
        tally
    }

    fn bytes_stored(&self) -> u64 {
        self.data.bytes_stored() + self.common.as_ref().map_or(0, CommonWriter::bytes_stored)
    }

    /// W4: the parent's recipe of a segment that is known to be unchanged; `None` when it cannot be reused (a pack
    /// that it needs is gone), and the segment must be read.
    ///
    /// # Errors
    /// `Unavailable`.
    pub fn reuse(&mut self, segment: SegmentIndex) -> Result<Option<Option<Place>>> {
        let Some(parent) = self.parent.clone() else { return Ok(None) };
        match self.usable(&parent, segment)? {
            Usable::Hole => Ok(Some(None)),
            Usable::Recipe(place, recipe) => {
                let blocks = u64::from(recipe.data_blocks());
                self.tally.blocks_data += blocks;
                self.tally.blocks_unchanged += blocks;
                Ok(Some(Some(place)))
            }
            Usable::No => Ok(None),
        }
    }

    /// The digest of the parent's segment, `None` for a hole.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn parent_digest(&self, segment: SegmentIndex) -> Result<Option<Fingerprint>> {
        let Some(parent) = &self.parent else { return Ok(None) };
        Ok(parent.recipe(segment)?.map(|r| r.digest))
    }

    /// What of the parent's segment may be referred to.
    fn usable(&self, parent: &Tree, segment: SegmentIndex) -> Result<Usable> {
        let found = parent.place(segment).and_then(|place| Ok((place, parent.recipe(segment)?)));
        match found {
            Ok((Some(place), Some(recipe))) => {
                let absent = |slot: SlotId| self.session.is_absent(slot.pack());
                if absent(place.slot) || recipe.extents.iter().any(|e| absent(e.first_slot)) {
                    return Ok(Usable::No);
                }
                Ok(Usable::Recipe(place, recipe))
            }
            Ok(_) => Ok(Usable::Hole),
            // What is damaged is not leaned on: the segment is stored again.
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
                log::warn!("segment {} of the parent is not compared with: {e}", segment.0);
                Ok(Usable::No)
            }
            Err(e) => Err(e),
        }
    }

    /// W3-W7: takes whole segments of 2 MiB as they lie on the grid, in image order; returns the recipe of each,
    /// `None` for a hole. All cores work on it.
    ///
    /// # Errors
    /// `NoSpace`, `Busy` when fenced, `Unavailable`.
    pub fn take(&mut self, batch: &[(SegmentIndex, &[u8])]) -> Result<Vec<(SegmentIndex, Option<Place>)>> {
        let seen: Vec<Seen> = batch.par_iter().map(|(_, bytes)| look(bytes)).collect();
        let mut places = vec![None; batch.len()];
        let mut changed = Vec::new();
        for (at, ((segment, _), seen)) in batch.iter().zip(&seen).enumerate() {
            let Some(digest) = seen.digest else { continue };
            let parent = self.parent.clone();
            let known = match &parent {
                Some(parent) => self.usable(parent, *segment)?,
                None => Usable::Hole,
            };
            match known {
                Usable::Recipe(place, recipe) if recipe.digest == digest => {
                    let blocks = seen.is_data.iter().filter(|d| **d).count() as u64;
                    self.tally.blocks_data += blocks;
                    self.tally.blocks_unchanged += blocks;
                    if let Some(slot) = places.get_mut(at) {
                        *slot = Some(place);
                    }
                }
                Usable::Recipe(_, recipe) => changed.push((at, digest, Some(recipe))),
                _ => changed.push((at, digest, None)),
            }
        }
        let prints: Vec<Vec<Option<Fingerprint>>> = changed
            .par_iter()
            .map(|(at, _, _)| match (batch.get(*at), seen.get(*at)) {
                (Some((_, bytes)), Some(seen)) => fingerprints_of(bytes, &seen.is_data),
                _ => Vec::new(),
            })
            .collect();
        for ((at, digest, parent), prints) in changed.into_iter().zip(prints) {
            let Some((_, bytes)) = batch.get(at) else { continue };
            let place = self.store_segment(bytes, digest, parent.as_deref(), &prints)?;
            if let Some(slot) = places.get_mut(at) {
                *slot = Some(place);
            }
        }
        self.flush_full_frames()?;
        Ok(batch.iter().map(|(segment, _)| *segment).zip(places).collect())
    }

    /// W5-W7 for one changed segment.
    fn store_segment(
        &mut self,
        bytes: &[u8],
        digest: Fingerprint,
        parent: Option<&Recipe>,
        prints: &[Option<Fingerprint>],
    ) -> Result<Place> {
        let plan = self.plan(parent, prints);
        let sighted = match self.session.others() {
            Some(others) if plan.tally.blocks_new > 0 => sighted(others, prints, &plan, &mut self.trail),
            _ => Vec::new(),
        };
        self.store_planned(bytes, digest, prints, &plan, &sighted).map(|(place, _)| place)
    }

    /// W7 for one changed segment; `bytes` may be empty when nothing of it is new. What was sighted goes to common packs.
    fn store_planned(
        &mut self,
        bytes: &[u8],
        digest: Fingerprint,
        prints: &[Option<Fingerprint>],
        plan: &Plan,
        sighted: &[bool],
    ) -> Result<(Place, Vec<Option<SlotId>>)> {
        let mut slots: Vec<Option<SlotId>> = Vec::with_capacity(plan.origins.len());
        let mut fresh = Vec::new();
        for (at, (print, origin)) in prints.iter().zip(&plan.origins).enumerate() {
            let block = bytes.get(at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES);
            let slot = match (origin, print, block) {
                (Origin::Held(slot), ..) => Some(*slot),
                (Origin::Repeats(first), ..) => slots.get(usize::from(*first)).copied().flatten(),
                (Origin::New, Some(print), Some(block)) => {
                    let slot = match sighted.get(at).filter(|sighted| **sighted).and_then(|_| self.common()) {
                        Some(common) => common.store(block, *print)?,
                        None => self.data.store(block, *print)?,
                    };
                    fresh.push((slot, *print));
                    Some(slot)
                }
                _ => None,
            };
            slots.push(slot);
        }
        self.tally.add(&plan.tally);
        // W9 in memory: the rest of this snapshot may refer to what was just stored.
        self.session.remember(fresh);
        let place = self.recipes.store(Recipe::from_slots(digest, &slots).encode())?;
        Ok((place, slots))
    }

    /// W5-W7 for a segment of which digest and fingerprints are known already: `hints` has for each block a slot that may
    /// hold it, which counts when its slot table says so; where none does, the block is new. `read` is asked for the
    /// segment only if something is new; `None` from it gives `None`. Returns the recipe's place and each block's slot.
    ///
    /// # Errors
    /// As [`Writer::take`]; those of `read`.
    pub fn take_known(
        &mut self,
        digest: Fingerprint,
        prints: &[Option<Fingerprint>],
        hints: &[Option<SlotId>],
        read: &mut dyn FnMut() -> Result<Option<Vec<u8>>>,
    ) -> Result<Option<(Place, Vec<Option<SlotId>>)>> {
        let mut held = Held::default();
        let hinted: Vec<SlotId> = hints.iter().flatten().copied().collect();
        self.add_pages(&mut held, &hinted, SEGMENT_BLOCKS);
        let plan = plan(prints, &[], &held, self.session.begin_record());
        let bytes = match plan.tally.blocks_new {
            0 => Vec::new(),
            _ => match read()? {
                Some(bytes) => bytes,
                None => return Ok(None),
            },
        };
        self.store_planned(&bytes, digest, prints, &plan, &[]).map(Some)
    }

    /// Compresses and appends the frames that are full: to be called every few segments after [`Writer::take_known`].
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn flush_full_frames(&mut self) -> Result<()> {
        if let Some(common) = &mut self.common {
            common.flush_full_frames()?;
        }
        self.data.flush_full_frames()
    }

    fn common(&mut self) -> Option<&mut CommonWriter> {
        if self.common.is_none() {
            let adder = self.session.others()?.adder(self.session.packs().clone());
            self.common = Some(CommonWriter::over(adder));
        }
        self.common.as_mut()
    }

    /// W5, W6: gathers what the segment is compared with, and plans; again with further pages while runs go on.
    fn plan(&self, parent: Option<&Recipe>, prints: &[Option<Fingerprint>]) -> Plan {
        let mut held = Held::default();
        let mut same_place = vec![None; SEGMENT_BLOCKS];
        for extent in parent.iter().flat_map(|r| &r.extents) {
            let mut page: Option<Arc<crate::pack::reader::SlotPage>> = None;
            for block in extent.first_block..extent.end_block() {
                let Some(slot) = extent.first_slot.plus(u32::from(block - extent.first_block)) else { break };
                if page.as_ref().is_none_or(|p| p.fingerprint_of(slot.slot()).is_none()) {
                    page = self.session.page_of(slot);
                    if let Some(page) = &page {
                        held.add(page.clone());
                    }
                }
                let print = page.as_ref().and_then(|p| p.fingerprint_of(slot.slot()));
                if let (Some(print), Some(entry)) = (print, same_place.get_mut(usize::from(block))) {
                    *entry = Some((slot, print));
                }
            }
        }
        let session = self.session.begin_record();
        let mut planned = plan(prints, &same_place, &held, session);
        let mut asked_similar = false;
        for _ in 0..ROUNDS_MAX {
            let mut wanted = std::mem::take(&mut planned.wanted);
            if !asked_similar && planned.tally.blocks_new > 0 {
                asked_similar = true;
                let hooks: Vec<u64> = left(prints, &planned).filter_map(|print| print.hook()).collect();
                wanted.extend(self.session.look_up(&hooks));
            }
            if !self.add_pages(&mut held, &wanted, PAGES_MAX) {
                break;
            }
            planned = plan(prints, &same_place, &held, session);
        }
        let pages_max = held.len() + POPULAR_PAGES_MAX;
        let mut grew = self.add_popular(&mut held, prints, &planned);
        for _ in 0..ROUNDS_MAX {
            if !grew {
                break;
            }
            planned = plan(prints, &same_place, &held, session);
            grew = self.add_pages(&mut held, &planned.wanted, pages_max);
        }
        planned
    }

    /// Adds the pages of these slots; whether there was any.
    fn add_pages(&self, held: &mut Held, wanted: &[SlotId], pages_max: usize) -> bool {
        let before = held.len();
        for slot in wanted {
            if held.len() >= pages_max {
                break;
            }
            if !held.has(*slot)
                && let Some(page) = self.session.page_of(*slot)
            {
                held.add(page);
            }
        }
        held.len() > before
    }

    /// W6: adds the pages of common packs that hold blocks that would be new; whether there was any.
    fn add_popular(&self, held: &mut Held, prints: &[Option<Fingerprint>], planned: &Plan) -> bool {
        let before = held.len();
        for print in left(prints, planned) {
            if held.holds(print) {
                continue;
            }
            for slot in self.session.popular_hints(print) {
                // A hint that its page does not confirm is chance, or another epoch's.
                if let Some(page) = self.session.page_of(slot)
                    && page.fingerprint_of(slot.slot()) == Some(*print)
                {
                    held.add(page);
                    break;
                }
            }
        }
        held.len() > before
    }

    /// Lets the tree write pages that do not fit into memory.
    ///
    /// # Errors
    /// As [`DraftTree::shrink`].
    pub fn shrink(&mut self, tree: &mut DraftTree) -> Result<()> {
        tree.shrink(&mut self.recipes)
    }

    /// W8: makes all that was taken durable and puts the record that makes it exist.
    ///
    /// # Errors
    /// `Exists` when another file has the name, `Stale` when the file was forgotten meanwhile, `Busy` when fenced,
    /// `NoSpace`, `Corrupt`, `Unavailable`.
    pub fn commit(&mut self, tree: &mut DraftTree, request: &CommitRequest) -> Result<Arc<RootPage>> {
        let prepared = self.prepare(tree, request)?;
        let root = prepared.root.clone();
        let session = self.session.clone();
        commit_together(&session, &mut [(self, prepared)])?;
        Ok(root)
    }

    /// The part of W8 before the record: all is durable, nothing is visible.
    ///
    /// # Errors
    /// `Busy` when fenced, `NoSpace`, `Corrupt`, `Unavailable`.
    pub fn prepare(&mut self, tree: &mut DraftTree, request: &CommitRequest) -> Result<Prepared> {
        let vm = self.session.vm().clone();
        // First, so that nothing ever refers to a common pack that is not there.
        if let Some(common) = &mut self.common {
            common.commit()?;
        }
        self.brought.extend(self.data.finish()?);
        let groups = tree.write_pages(&mut self.recipes)?;
        self.brought.extend(self.recipes.finish()?);
        let id: RootId = self.session.next_serial()?;
        let root = Arc::new(RootPage {
            incarnation: vm.state().incarnation,
            id,
            file: request.file,
            image_bytes: request.image_bytes,
            lead: request.grid.lead(),
            created: vm.clock().now(),
            parent: self.parent.as_ref().map(|p| p.root().id),
            data_blocks: groups.iter().map(|g| u64::from(g.data_blocks)).sum(),
            tally: self.tally(),
            groups,
        });
        vm.backend().put_new(&root_key(vm.name(), id), &root_object(&root))?;
        Ok(Prepared { root, request: request.clone() })
    }

    /// Gives up what was not committed: its objects are deleted, its space is free.
    pub fn abandon(mut self) {
        if let Some(common) = self.common.take() {
            common.abandon();
        }
        let mut given_up = std::mem::take(&mut self.brought);
        given_up.extend(self.data.abandon());
        given_up.extend(self.recipes.abandon());
        let vm = self.session.vm();
        for pack in given_up {
            let key = crate::catalog::vm::pack_key(vm.name(), pack.object);
            // What stays is a leak that `gc --exact` finds.
            if let Err(e) = vm.backend().delete(&key) {
                log::debug!("{key}: stays: {e}");
            }
        }
    }
}

/// An image that is durable, and for whose visibility only the record is missing.
#[derive(Debug)]
pub struct Prepared {
    /// Its root page.
    pub root: Arc<RootPage>,
    request: CommitRequest,
}

/// Puts the one record that makes all these images of a VM exist, or none of them.
///
/// # Errors
/// As [`Writer::commit`]. After any but `Unavailable` the root pages are gone; the packs are the writers' to abandon.
pub fn commit_together(session: &Session, images: &mut [(&mut Writer, Prepared)]) -> Result<()> {
    let outcome = session.append(|state| {
        let commit = |(writer, prepared): &(&mut Writer, Prepared)| {
            let (root, request) = (&prepared.root, &prepared.request);
            let (disk, name) = name_now(state, request)?;
            let commit = Commit {
                file: request.file,
                disk,
                name,
                root: root.id,
                image_bytes: request.image_bytes,
                data_blocks: root.data_blocks,
                uid: request.uid,
                gid: request.gid,
                mtime: request.mtime,
                closed: request.closed,
                sealed: request.sealed,
                packs: writer.brought.clone(),
            };
            Ok(Op::Commit { commit: Box::new(commit) })
        };
        Ok((images.iter().map(commit).collect::<Result<Vec<_>>>()?, ()))
    });
    if let Err(e) = outcome {
        // `Unavailable` leaves open whether the record is there: then nothing may be deleted.
        if e.kind() != ErrorKind::Unavailable {
            let vm = session.vm();
            for (_, prepared) in images.iter() {
                let key = root_key(vm.name(), prepared.root.id);
                if let Err(e) = vm.backend().delete(&key) {
                    log::debug!("{key}: stays: {e}");
                }
            }
        }
        return Err(e);
    }
    for (writer, _) in images {
        session.cover_committed(&writer.brought);
        writer.brought.clear();
        writer.tally = Tally::default();
        writer.stored_before = writer.bytes_stored();
    }
    Ok(())
}

/// The fingerprints of the blocks that a plan calls new.
fn left<'a>(prints: &'a [Option<Fingerprint>], planned: &'a Plan) -> impl Iterator<Item = &'a Fingerprint> {
    let new = prints.iter().zip(&planned.origins).filter(|(_, origin)| **origin == Origin::New);
    new.filter_map(|(print, _)| print.as_ref())
}

/// What the parent offers for a segment.
enum Usable {
    Hole,
    Recipe(Place, Arc<Recipe>),
    No,
}

/// Name of the file now: the log's if it knows the file, else the one it was made with.
fn name_now(state: &VmState, request: &CommitRequest) -> Result<(Option<String>, String)> {
    let stale = || Error::new(ErrorKind::Stale, format!("{:?} was forgotten while it was written", request.name));
    if !state.exists() {
        return Err(stale());
    }
    if let Some(file) = state.files.get(&request.file) {
        if file.sealed.is_some() {
            return Err(Error::new(ErrorKind::Sealed, format!("{:?} is sealed", file.name)));
        }
        return Ok((file.disk.clone(), file.name.clone()));
    }
    if request.is_known {
        return Err(stale());
    }
    if let Some(disk) = &request.disk
        && !state.disks.contains_key(disk)
    {
        return Err(stale());
    }
    match state.find(request.disk.as_deref(), &request.name) {
        Some(_) => Err(Error::new(ErrorKind::Exists, format!("{:?} exists already", request.name))),
        None => Ok((request.disk.clone(), request.name.clone())),
    }
}

fn look(bytes: &[u8]) -> Seen {
    let is_data: Vec<bool> = bytes.chunks(BLOCK_BYTES).map(|block| !is_zero(block)).collect();
    let digest = is_data.contains(&true).then(|| digest(bytes));
    Seen { is_data, digest }
}

/// One fingerprint per block with data.
fn fingerprints_of(bytes: &[u8], is_data: &[bool]) -> Vec<Option<Fingerprint>> {
    let (blocks, _) = bytes.as_chunks::<BLOCK_BYTES>();
    let wanted: Vec<&[u8; BLOCK_BYTES]> = blocks.iter().zip(is_data).filter(|(_, d)| **d).map(|(b, _)| b).collect();
    let mut prints = Vec::with_capacity(wanted.len());
    fingerprint_blocks(&wanted, &mut prints);
    let mut prints = prints.into_iter();
    is_data.iter().map(|is_data| if *is_data { prints.next() } else { None }).collect()
}

/// Proves that a segment of the source is what the parent has: for change maps.
///
/// # Errors
/// `Invalid` when it is not.
pub fn verify_unchanged(parent: Option<Fingerprint>, bytes: &[u8], segment: SegmentIndex) -> Result<()> {
    let now = (!is_zero(bytes)).then(|| digest(bytes));
    if now == parent {
        return Ok(());
    }
    let start = segment.grid_offset();
    Err(Error::new(
        ErrorKind::Invalid,
        format!("change map: it calls the segment at offset {start} unchanged, but it differs from the parent"),
    ))
}
