//! Where the blocks of an image are: recipes of segments, group pages, root pages.
//!
//! A recipe lists runs of slots; a group page lists the recipes of 512 segments with the bitmap of all slots that
//! they use; a root page lists the group pages of a snapshot. Recipes and group pages are slots of recipe packs.

use std::io::Cursor;

use roaring::RoaringTreemap;

use crate::clock::Timestamp;
use crate::error::{Result, corrupt};
use crate::fingerprint::Fingerprint;
use crate::limits::{CONDEMNED_SLOTS_MAX, GROUP_SEGMENTS, IMAGE_BYTES_MAX, PACK_SLOTS_MAX, SEGMENT_BLOCKS};
use crate::units::{FileId, Generation, Grid, Incarnation, PackNumber, RootId, Serial, SlotId};
use crate::wire::{Reader, Wire, decode, encode, wire_struct};

/// First byte of a recipe's stored form.
const RECIPE: u8 = 1;
/// First byte of a group page's stored form.
const GROUP_PAGE: u8 = 2;

/// A run of blocks of a segment that lie in consecutive slots of one pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First block within the segment.
    pub first_block: u16,
    /// Blocks; at least 1.
    pub blocks: u16,
    /// Slot of the first block.
    pub first_slot: SlotId,
}

impl Extent {
    /// The block after its last one.
    pub fn end_block(&self) -> u16 {
        self.first_block + self.blocks
    }
}

/// Where the blocks of a segment are. Blocks in no extent are holes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// BLAKE3-256 of the segment's 2 MiB, holes and what lies outside of the image as zeros.
    pub digest: Fingerprint,
    /// Runs in block order; never empty, never overlapping.
    pub extents: Vec<Extent>,
}

impl Recipe {
    /// Builds the runs from one slot (or hole) per block.
    pub fn from_slots(digest: Fingerprint, slots: &[Option<SlotId>]) -> Self {
        let mut extents: Vec<Extent> = Vec::new();
        for (block, slot) in slots.iter().enumerate().take(SEGMENT_BLOCKS) {
            let Some(slot) = *slot else { continue };
            let block = block as u16;
            match extents.last_mut() {
                Some(last)
                    if last.end_block() == block && last.first_slot.plus(u32::from(last.blocks)) == Some(slot) =>
                {
                    last.blocks += 1;
                }
                _ => extents.push(Extent { first_block: block, blocks: 1, first_slot: slot }),
            }
        }
        Self { digest, extents }
    }

    /// The slot of a block, `None` in a hole.
    pub fn slot_of(&self, block: u16) -> Option<SlotId> {
        let at = self.extents.partition_point(|e| e.end_block() <= block);
        let extent = self.extents.get(at).filter(|e| e.first_block <= block)?;
        extent.first_slot.plus(u32::from(block - extent.first_block))
    }

    /// One slot (or hole) per block of the segment.
    pub fn slots(&self) -> Vec<Option<SlotId>> {
        let mut slots = vec![None; SEGMENT_BLOCKS];
        for extent in &self.extents {
            for (offset, slot) in slots.iter_mut().skip(usize::from(extent.first_block)).enumerate() {
                if offset >= usize::from(extent.blocks) {
                    break;
                }
                *slot = extent.first_slot.plus(offset as u32);
            }
        }
        slots
    }

    /// Blocks with data.
    pub fn data_blocks(&self) -> u32 {
        self.extents.iter().map(|e| u32::from(e.blocks)).sum()
    }

    /// Stored form: kind, digest, table of packs, extents of 8 bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut packs: Vec<PackNumber> = self.extents.iter().map(|e| e.first_slot.pack()).collect();
        packs.sort_unstable();
        packs.dedup();
        let mut out = Vec::with_capacity(40 + packs.len() * 8 + self.extents.len() * 8);
        out.push(RECIPE);
        out.extend_from_slice(&self.digest.0);
        packs.put(&mut out);
        (self.extents.len() as u32).put(&mut out);
        for extent in &self.extents {
            let pack = packs.partition_point(|p| *p < extent.first_slot.pack()) as u16;
            for field in [extent.first_block, extent.blocks, pack, extent.first_slot.slot()] {
                field.put(&mut out);
            }
        }
        out
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        if u8::take(&mut reader)? != RECIPE {
            return Err(corrupt("recipe: slot holds something else"));
        }
        let digest = Fingerprint(reader.array()?);
        let packs = Vec::<PackNumber>::take(&mut reader)?;
        let sorted = packs.windows(2).all(|p| matches!(p, [a, b] if a < b));
        let mut used = vec![false; packs.len()];
        let count = u32::take(&mut reader)? as usize;
        if !sorted || packs.len() > SEGMENT_BLOCKS || count > SEGMENT_BLOCKS || count == 0 {
            return Err(corrupt(format!("recipe: {count} extents, {} packs", packs.len())));
        }
        let mut extents = Vec::with_capacity(count);
        let mut end = 0;
        for _ in 0..count {
            let [first_block, blocks, pack, slot] =
                [u16::take(&mut reader)?, u16::take(&mut reader)?, u16::take(&mut reader)?, u16::take(&mut reader)?];
            let last = u32::from(first_block) + u32::from(blocks);
            let fits = first_block >= end && blocks > 0 && last as usize <= SEGMENT_BLOCKS;
            let known = packs.get(usize::from(pack)).zip(used.get_mut(usize::from(pack)));
            match known {
                Some((number, used)) if fits && u32::from(slot) + u32::from(blocks) <= PACK_SLOTS_MAX => {
                    *used = true;
                    extents.push(Extent { first_block, blocks, first_slot: SlotId::new(*number, slot) });
                }
                _ => return Err(corrupt(format!("recipe: extent at block {first_block} is out of bounds"))),
            }
            end = last as u16;
        }
        reader.end()?;
        let recipe = Self { digest, extents };
        // Runs that could be one, and packs that no run uses, are not what the writer makes.
        if used.contains(&false) || Self::from_slots(digest, &recipe.slots()) != recipe {
            return Err(corrupt("recipe: not in its shortest form"));
        }
        Ok(recipe)
    }
}

/// A recipe (or group page), and where its bytes were when the reference was written: a hint that saves a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The slot in a recipe pack.
    pub slot: SlotId,
    /// Generation of the object that the hint is about.
    pub generation: Generation,
    /// Offset of the frame in that object.
    pub frame_offset: u32,
    /// Stored bytes of the frame.
    pub frame_bytes: u32,
    /// First 8 bytes of the slot's fingerprint: what was read through the hint is believed only if it matches.
    pub check: u64,
}

/// What a group page says about 512 segments.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GroupPage {
    /// One recipe (or hole) per segment of the group, in order; shorter than 512 when the rest are holes.
    pub recipes: Vec<Option<Place>>,
    /// Blocks with data in the group.
    pub data_blocks: u32,
    /// Every slot of the VM's data packs that the recipes use.
    pub slots: RoaringTreemap,
    /// Every slot of common packs that the recipes use.
    pub common: RoaringTreemap,
}

impl GroupPage {
    /// The recipe of a segment, `None` for a hole.
    pub fn recipe(&self, in_group: u16) -> Option<Place> {
        self.recipes.get(usize::from(in_group)).copied().flatten()
    }

    /// Adds what a recipe uses: to the slots of the VM, or to those of common packs.
    pub fn add_slots_of(&mut self, recipe: &Recipe) {
        for extent in &recipe.extents {
            let bitmap = if extent.first_slot.pack().is_common() { &mut self.common } else { &mut self.slots };
            bitmap.insert_range(extent.first_slot.0..extent.first_slot.0 + u64::from(extent.blocks));
        }
    }

    /// Stored form: kind, table of packs with generation, one 22-byte row per segment with data, bitmaps.
    pub fn encode(&self) -> Vec<u8> {
        let mut packs: Vec<(PackNumber, Generation)> =
            self.recipes.iter().flatten().map(|p| (p.slot.pack(), p.generation)).collect();
        packs.sort_unstable();
        packs.dedup();
        let mut out = vec![GROUP_PAGE];
        packs.put(&mut out);
        (self.recipes.iter().flatten().count() as u32).put(&mut out);
        for (segment, place) in self.recipes.iter().enumerate() {
            let Some(place) = place else { continue };
            let pack = packs.partition_point(|p| *p < (place.slot.pack(), place.generation)) as u16;
            (segment as u16).put(&mut out);
            pack.put(&mut out);
            place.slot.slot().put(&mut out);
            place.frame_offset.put(&mut out);
            place.frame_bytes.put(&mut out);
            place.check.put(&mut out);
        }
        self.data_blocks.put(&mut out);
        put_bitmap(&self.slots, &mut out);
        put_bitmap(&self.common, &mut out);
        out
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        if u8::take(&mut reader)? != GROUP_PAGE {
            return Err(corrupt("group page: slot holds something else"));
        }
        let packs = Vec::<(PackNumber, Generation)>::take(&mut reader)?;
        let sorted = packs.windows(2).all(|p| matches!(p, [a, b] if a < b));
        let count = u32::take(&mut reader)? as usize;
        if !sorted || count > GROUP_SEGMENTS || packs.len() > GROUP_SEGMENTS {
            return Err(corrupt(format!("group page: {count} recipes, {} packs", packs.len())));
        }
        let mut recipes = Vec::new();
        let mut used = vec![false; packs.len()];
        for _ in 0..count {
            let segment = usize::from(u16::take(&mut reader)?);
            let pack = usize::from(u16::take(&mut reader)?);
            let slot = u16::take(&mut reader)?;
            let frame_offset = u32::take(&mut reader)?;
            let frame_bytes = u32::take(&mut reader)?;
            let check = u64::take(&mut reader)?;
            match packs.get(pack).zip(used.get_mut(pack)) {
                Some(((number, generation), used)) if segment < GROUP_SEGMENTS && segment >= recipes.len() => {
                    *used = true;
                    recipes.resize(segment, None);
                    recipes.push(Some(Place {
                        slot: SlotId::new(*number, slot),
                        generation: *generation,
                        frame_offset,
                        frame_bytes,
                        check,
                    }));
                }
                _ => return Err(corrupt(format!("group page: row of segment {segment} is out of bounds"))),
            }
        }
        let data_blocks = u32::take(&mut reader)?;
        let blocks = (GROUP_SEGMENTS * SEGMENT_BLOCKS) as u64;
        let slots = take_bitmap(&mut reader, blocks)?;
        let common = take_bitmap(&mut reader, blocks)?;
        reader.end()?;
        if used.contains(&false) || data_blocks as usize > GROUP_SEGMENTS * SEGMENT_BLOCKS {
            return Err(corrupt("group page: not in its shortest form"));
        }
        Ok(Self { recipes, data_blocks, slots, common })
    }
}

fn put_bitmap(bitmap: &RoaringTreemap, out: &mut Vec<u8>) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    // How the set came about must not show: each container has its shortest form, runs only where they are shorter.
    let without_runs = bitmap.bitmaps().filter(|(_, part)| !part.is_empty()).map(|(key, part)| {
        let mut part = part.clone();
        part.remove_run_compression();
        (key, part)
    });
    let mut bitmap = RoaringTreemap::from_bitmaps(without_runs);
    bitmap.optimize();
    // Writing into a vector cannot fail; should it, the empty bitmap that remains is found by `check`.
    let written = bitmap.serialize_into(&mut *out).map(|()| out.len() - at - 4).unwrap_or(0);
    if let Some(length) = out.get_mut(at..at + 4) {
        length.copy_from_slice(&(written as u32).to_le_bytes());
    }
}

fn take_bitmap(reader: &mut Reader<'_>, slots_max: u64) -> Result<RoaringTreemap> {
    let count = u32::take(reader)? as usize;
    let bytes = reader.bytes(count)?;
    let bitmap =
        RoaringTreemap::deserialize_from(Cursor::new(bytes)).map_err(|e| corrupt("bitmap of slots").because(e))?;
    // Also keeps the memory in bounds that a few bytes of runs would take below.
    if bitmap.len() > slots_max {
        return Err(corrupt(format!("bitmap of too many slots, slots={}", bitmap.len())));
    }
    let mut again = Vec::with_capacity(count);
    put_bitmap(&bitmap, &mut again);
    if again.get(4..) == Some(bytes) { Ok(bitmap) } else { Err(corrupt("bitmap of slots in another form")) }
}

/// A set of slots as a field of a record.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SlotSet(pub RoaringTreemap);

impl Eq for SlotSet {}

impl Wire for SlotSet {
    fn put(&self, out: &mut Vec<u8>) {
        put_bitmap(&self.0, out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        take_bitmap(reader, CONDEMNED_SLOTS_MAX).map(Self)
    }
}

/// Where a group page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupRef {
    /// Index of the group within the grid.
    pub group: u32,
    /// Blocks with data in the group.
    pub data_blocks: u32,
    /// The page.
    pub page: Place,
}

impl Wire for GroupRef {
    fn put(&self, out: &mut Vec<u8>) {
        self.group.put(out);
        self.data_blocks.put(out);
        self.page.slot.pack().put(out);
        self.page.slot.slot().put(out);
        self.page.generation.put(out);
        self.page.frame_offset.put(out);
        self.page.frame_bytes.put(out);
        self.page.check.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        let group = u32::take(reader)?;
        let data_blocks = u32::take(reader)?;
        let pack = Serial::take(reader)?;
        let slot = u16::take(reader)?;
        Ok(Self {
            group,
            data_blocks,
            page: Place {
                slot: SlotId::new(pack, slot),
                generation: Wire::take(reader)?,
                frame_offset: Wire::take(reader)?,
                frame_bytes: Wire::take(reader)?,
                check: Wire::take(reader)?,
            },
        })
    }
}

wire_struct! {
    /// What the levels of deduplication did for a snapshot, in blocks of 4 KiB.
    #[derive(Default, serde::Serialize)]
    pub struct Tally {
        /// Blocks with data that were looked at (level 0 took the others).
        pub blocks_data: u64,
        /// Level 1: in segments that are unchanged since the parent.
        pub blocks_unchanged: u64,
        /// Level 2: same content at the same place of the parent's segment.
        pub blocks_same_place: u64,
        /// Level 2: found elsewhere in the VM's history.
        pub blocks_similar: u64,
        /// Level 2: found in the snapshot being written.
        pub blocks_repeated: u64,
        /// Level 3: found in the popular set.
        pub blocks_popular: u64,
        /// Stored.
        pub blocks_new: u64,
        /// Bytes of their frames.
        pub bytes_stored: u64,
    }
}

impl Tally {
    /// Adds what another part of the work did.
    pub fn add(&mut self, other: &Self) {
        self.blocks_data += other.blocks_data;
        self.blocks_unchanged += other.blocks_unchanged;
        self.blocks_same_place += other.blocks_same_place;
        self.blocks_similar += other.blocks_similar;
        self.blocks_repeated += other.blocks_repeated;
        self.blocks_popular += other.blocks_popular;
        self.blocks_new += other.blocks_new;
        self.bytes_stored += other.bytes_stored;
    }
}

wire_struct! {
    /// The root page of a snapshot: everything but its name, which is the log's.
    pub struct RootPage {
        /// The VM's incarnation.
        pub incarnation: Incarnation,
        /// Its own number.
        pub id: RootId,
        /// The file that it is a state of.
        pub file: FileId,
        /// Bytes of the image.
        pub image_bytes: u64,
        /// Zero bytes thought in front of the image.
        pub lead: u32,
        /// When it was committed, by the writer's clock.
        pub created: Timestamp,
        /// The snapshot that it was compared with.
        pub parent: Option<RootId>,
        /// Blocks with data.
        pub data_blocks: u64,
        /// What deduplication did.
        pub tally: Tally,
        /// Groups with data, in order.
        pub groups: Vec<GroupRef>,
    }
}

impl RootPage {
    /// The stored body.
    pub fn encode_body(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a body and checks what can be checked without other objects.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode_body(bytes: &[u8]) -> Result<Self> {
        let root: Self = decode(bytes).map_err(|e| e.within("root page"))?;
        let grid = Grid::from_lead(root.lead)?;
        if root.image_bytes > IMAGE_BYTES_MAX {
            return Err(corrupt(format!("root page: image over the limit, size={}", root.image_bytes)));
        }
        let groups = grid.segments(root.image_bytes).div_ceil(GROUP_SEGMENTS as u32);
        let ordered = root.groups.windows(2).all(|g| matches!(g, [a, b] if a.group < b.group));
        let blocks: u64 = root.groups.iter().map(|g| u64::from(g.data_blocks)).sum();
        let fits = ordered && blocks == root.data_blocks && root.groups.last().is_none_or(|g| g.group < groups);
        if !fits {
            return Err(corrupt(format!("root page: {} groups, size {}", root.groups.len(), root.image_bytes)));
        }
        Ok(root)
    }

    /// How the image lies on the grid.
    pub fn grid(&self) -> Grid {
        Grid::from_lead(self.lead).unwrap_or_default()
    }

    /// Where the page of a group is, `None` where the group is a hole.
    pub fn group(&self, group: u32) -> Option<GroupRef> {
        self.groups.binary_search_by_key(&group, |g| g.group).ok().and_then(|at| self.groups.get(at)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::RecordNumber;

    fn slot(pack: u16, slot: u16) -> SlotId {
        SlotId::new(Serial::new(RecordNumber(3), pack), slot)
    }

    #[test]
    fn a_recipe_comes_back() {
        let mut slots = vec![None; SEGMENT_BLOCKS];
        for (block, value) in slots.iter_mut().enumerate() {
            *value = match block {
                0..=9 => Some(slot(1, block as u16)),
                20 => Some(slot(0, 65535)),
                21 => Some(slot(1, 0)),
                500.. => Some(slot(2, block as u16 - 500)),
                _ => None,
            };
        }
        let recipe = Recipe::from_slots(Fingerprint([7; 32]), &slots);
        assert_eq!(recipe.extents.len(), 4);
        assert_eq!(recipe.slots(), slots);
        for (block, slot) in slots.iter().enumerate() {
            assert_eq!(recipe.slot_of(block as u16), *slot);
        }
        let bytes = recipe.encode();
        assert_eq!(Recipe::decode(&bytes).unwrap(), recipe);
        for cut in 0..bytes.len() {
            assert!(Recipe::decode(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn a_group_page_comes_back() {
        let place = |n: u16| Place {
            slot: slot(4, n),
            generation: Generation(u32::from(n % 2)),
            frame_offset: 64,
            frame_bytes: 100,
            check: 9,
        };
        let mut page = GroupPage { recipes: vec![Some(place(1)), None, Some(place(2))], ..GroupPage::default() };
        page.data_blocks = 700;
        page.slots.insert_range(slot(1, 10).0..slot(1, 4000).0);
        page.slots.insert(slot(9, 3).0);
        assert_eq!(GroupPage::decode(&page.encode()).unwrap(), page);
        assert_eq!(page.recipe(1), None);
        assert_eq!(page.recipe(2), Some(place(2)));
        assert_eq!(page.recipe(511), None);
    }
}
