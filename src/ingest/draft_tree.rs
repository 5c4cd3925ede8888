//! The metadata of an image that is being written: which recipe each segment has, group by group.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::error::Result;
use crate::image::tree::{Tree, read_group, read_recipe};
use crate::ingest::lane::RecipeLane;
use crate::limits::GROUP_SEGMENTS;
use crate::pack::reader::Packs;
use crate::recipe::{GroupPage, GroupRef, Place, RootPage};
use crate::units::SegmentIndex;

/// Groups that are kept as tables (256 GiB of image, 5 MiB of memory); beyond, the one used longest ago is written.
const TABLES_KEPT: usize = 256;

struct Table {
    places: Vec<Option<Place>>,
    is_dirty: bool,
    used: u64,
}

/// The recipes of all segments of a draft.
pub struct DraftTree {
    packs: Arc<Packs>,
    // Pages as they were last written; a dirty table is newer than its page.
    pages: BTreeMap<u32, GroupRef>,
    tables: HashMap<u32, Table>,
    // An untouched group shares this snapshot's page.
    parent: Option<Arc<Tree>>,
    clock: u64,
}

impl DraftTree {
    /// The tree of an image that is all hole.
    pub fn empty(packs: Arc<Packs>, parent: Option<Arc<Tree>>) -> Self {
        Self { packs, pages: BTreeMap::new(), tables: HashMap::new(), parent, clock: 0 }
    }

    /// The tree of a committed image.
    pub fn of_root(root: &RootPage, packs: Arc<Packs>, parent: Option<Arc<Tree>>) -> Self {
        Self { pages: root.groups.iter().map(|g| (g.group, *g)).collect(), ..Self::empty(packs, parent) }
    }

    /// The packs that it leads to.
    pub fn packs(&self) -> &Arc<Packs> {
        &self.packs
    }

    /// Where the recipe of a segment is, `None` for a hole. Cost: a backend read when the group is not loaded.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn place(&mut self, segment: SegmentIndex) -> Result<Option<Place>> {
        if !self.has_group(segment.group()) {
            return Ok(None);
        }
        let at = usize::from(segment.in_group());
        Ok(self.table(segment.group())?.places.get(at).copied().flatten())
    }

    /// Whether a group has, or may have, any data.
    pub fn has_group(&self, group: u32) -> bool {
        self.tables.contains_key(&group) || self.pages.contains_key(&group)
    }

    /// Gives a segment another recipe, or makes it a hole.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn set(&mut self, segment: SegmentIndex, place: Option<Place>) -> Result<()> {
        if place.is_none() && !self.has_group(segment.group()) {
            return Ok(());
        }
        let at = usize::from(segment.in_group());
        let table = self.table(segment.group())?;
        if table.places.len() <= at {
            if place.is_none() {
                return Ok(());
            }
            table.places.resize(at + 1, None);
        }
        if let Some(old) = table.places.get_mut(at)
            && *old != place
        {
            *old = place;
            table.is_dirty = true;
        }
        Ok(())
    }

    /// Makes holes of all segments from `first` on.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn truncate(&mut self, first: SegmentIndex) -> Result<()> {
        let whole = if first.in_group() == 0 { first.group() } else { first.group() + 1 };
        self.pages.split_off(&whole);
        self.tables.retain(|group, _| *group < whole);
        if whole > first.group() && self.has_group(first.group()) {
            let table = self.table(first.group())?;
            let keep = usize::from(first.in_group());
            if table.places.len() > keep {
                table.places.truncate(keep);
                table.is_dirty = true;
            }
        }
        Ok(())
    }

    fn table(&mut self, group: u32) -> Result<&mut Table> {
        self.clock += 1;
        if !self.tables.contains_key(&group) {
            let places = match self.pages.get(&group) {
                Some(reference) => read_group(&self.packs, &reference.page)?.recipes,
                None => Vec::new(),
            };
            self.tables.insert(group, Table { places, is_dirty: false, used: 0 });
        }
        let clock = self.clock;
        let table = self.tables.entry(group).or_insert_with(|| Table { places: Vec::new(), is_dirty: false, used: 0 });
        table.used = clock;
        Ok(table)
    }

    /// Writes the pages of groups that do not fit into memory any more. To be called now and then.
    ///
    /// # Errors
    /// `NoSpace`, `Corrupt`, `Unavailable`.
    pub fn shrink(&mut self, lane: &mut RecipeLane) -> Result<()> {
        while self.tables.len() > TABLES_KEPT {
            let oldest = self.tables.iter().min_by_key(|(_, t)| t.used).map(|(group, _)| *group);
            let Some(oldest) = oldest else { break };
            self.write_page(oldest, lane)?;
            self.tables.remove(&oldest);
        }
        Ok(())
    }

    /// W8: writes the pages of all touched groups, each recomputed from its recipes; returns all references.
    ///
    /// Cost: reads the recipes of the touched groups.
    ///
    /// # Errors
    /// `NoSpace`, `Corrupt`, `Unavailable`.
    pub fn write_pages(&mut self, lane: &mut RecipeLane) -> Result<Vec<GroupRef>> {
        let mut dirty: Vec<u32> = self.tables.iter().filter(|(_, t)| t.is_dirty).map(|(group, _)| *group).collect();
        dirty.sort_unstable();
        for group in dirty {
            self.write_page(group, lane)?;
        }
        lane.flush()?;
        for reference in self.pages.values_mut() {
            reference.page = lane.with_hint(reference.page);
        }
        Ok(self.pages.values().copied().collect())
    }

    /// The parent's page of a group, if all segments have the same recipes there.
    fn parents_page(&self, group: u32) -> Option<GroupRef> {
        let parent = self.parent.as_ref()?;
        let reference = parent.root().group(group)?;
        // A page that cannot be read is not shared.
        let page = parent.group(group).ok().flatten()?;
        let table = self.tables.get(&group)?;
        let slots = |places: &[Option<Place>]| {
            let mut slots: Vec<_> = places.iter().map(|p| p.map(|p| p.slot)).collect();
            slots.truncate(slots.iter().rposition(Option::is_some).map_or(0, |last| last + 1));
            slots
        };
        (slots(&page.recipes) == slots(&table.places)).then_some(reference)
    }

    fn write_page(&mut self, group: u32, lane: &mut RecipeLane) -> Result<()> {
        // Recipes get their hints when their frame is written.
        lane.flush()?;
        let shared = self.parents_page(group).filter(|reference| lane.may_refer_to(reference.page.slot.pack()));
        let Some(table) = self.tables.get_mut(&group).filter(|t| t.is_dirty) else { return Ok(()) };
        if let Some(reference) = shared {
            table.is_dirty = false;
            self.pages.insert(group, reference);
            return Ok(());
        }
        let mut page = GroupPage::default();
        for (at, place) in table.places.iter_mut().enumerate().take(GROUP_SEGMENTS) {
            let Some(place) = place else { continue };
            *place = lane.with_hint(*place);
            page.recipes.resize(at, None);
            page.recipes.push(Some(*place));
            let recipe = read_recipe(&self.packs, place)?;
            page.data_blocks += recipe.data_blocks();
            page.add_slots_of(&recipe);
        }
        table.is_dirty = false;
        if page.recipes.is_empty() {
            self.pages.remove(&group);
            return Ok(());
        }
        let data_blocks = page.data_blocks;
        let place = lane.store(page.encode())?;
        self.pages.insert(group, GroupRef { group, data_blocks, page: place });
        Ok(())
    }
}
