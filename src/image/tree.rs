//! R1, R2: from the root page over group pages to the recipe of a segment.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use crate::error::Result;
use crate::pack::reader::Packs;
use crate::recipe::{GroupPage, Place, Recipe, RootPage};
use crate::units::SegmentIndex;

/// Group pages that an open snapshot keeps (16 GiB of image): about 32 KiB each at the most in practice.
const GROUPS_KEPT: NonZeroUsize = NonZeroUsize::new(16).unwrap();

/// Recipes that an open snapshot keeps decoded: those of a few parallel readers and what they read ahead.
const RECIPES_KEPT: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// The metadata of one snapshot, read as it is needed.
pub struct Tree {
    root: Arc<RootPage>,
    packs: Arc<Packs>,
    groups: Mutex<LruCache<u32, Arc<GroupPage>>>,
    recipes: Mutex<LruCache<u32, Option<Arc<Recipe>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tree {
    /// The tree below a root page. No I/O.
    pub fn new(root: Arc<RootPage>, packs: Arc<Packs>) -> Self {
        Self {
            root,
            packs,
            groups: Mutex::new(LruCache::new(GROUPS_KEPT)),
            recipes: Mutex::new(LruCache::new(RECIPES_KEPT)),
        }
    }

    /// The root page.
    pub fn root(&self) -> &Arc<RootPage> {
        &self.root
    }

    /// The packs that it leads to.
    pub fn packs(&self) -> &Arc<Packs> {
        &self.packs
    }

    /// The page of a group, `None` for a hole. Cost: one backend read when it is not cached.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn group(&self, group: u32) -> Result<Option<Arc<GroupPage>>> {
        let Some(reference) = self.root.group(group) else { return Ok(None) };
        if let Some(page) = lock(&self.groups).get(&group) {
            return Ok(Some(page.clone()));
        }
        let page = Arc::new(read_group(&self.packs, &reference.page)?);
        lock(&self.groups).put(group, page.clone());
        Ok(Some(page))
    }

    /// Where the recipe of a segment is, `None` for a hole.
    ///
    /// # Errors
    /// As [`Tree::group`].
    pub fn place(&self, segment: SegmentIndex) -> Result<Option<Place>> {
        Ok(self.group(segment.group())?.and_then(|page| page.recipe(segment.in_group())))
    }

    /// The recipe of a segment, `None` for a hole. Cost: one backend read when it is not cached, and the group's.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable`.
    pub fn recipe(&self, segment: SegmentIndex) -> Result<Option<Arc<Recipe>>> {
        if let Some(recipe) = lock(&self.recipes).get(&segment.0) {
            return Ok(recipe.clone());
        }
        let recipe = match self.place(segment)? {
            Some(place) => Some(Arc::new(read_recipe(&self.packs, &place)?)),
            None => None,
        };
        lock(&self.recipes).put(segment.0, recipe.clone());
        Ok(recipe)
    }
}

/// Reads a recipe. Cost: one backend read when its frame is not cached.
///
/// # Errors
/// `Corrupt`, `Unavailable`.
pub fn read_recipe(packs: &Packs, place: &Place) -> Result<Recipe> {
    Recipe::decode(&packs.read_slot(place)?).map_err(|e| e.within(format!("recipe {:?}", place.slot)))
}

/// Reads a group page. Cost: one backend read when its frame is not cached.
///
/// # Errors
/// `Corrupt`, `Unavailable`.
pub fn read_group(packs: &Packs, place: &Place) -> Result<GroupPage> {
    GroupPage::decode(&packs.read_slot(place)?).map_err(|e| e.within(format!("group page {:?}", place.slot)))
}
