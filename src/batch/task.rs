//! The two passes of a batch through the dataflow: who has and who wants what (detect), and where what was shared lies
//! (link).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::batch::image::{ScanWriter, Scanned, Taken, line_of, position};
use crate::catalog::vm::Vm;
use crate::cluster::detect::{Feed, Holder, Task};
use crate::cluster::record::{Member, WANTED};
use crate::cluster::spill::Spill;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{Fingerprint, digest, fingerprint_blocks, is_zero};
use crate::ingest::backup::read_segment;
use crate::ingest::change_map::ChangeMap;
use crate::ingest::writer::verify_unchanged;
use crate::limits::{BLOCK_BYTES, SEGMENT_BYTES};
use crate::name::VmName;
use crate::pack::Content;
use crate::pack::reader::{Packs, read_slot_page};
use crate::store::Store;
use crate::units::{PackNumber, SegmentIndex, SlotId, VmGroup};
use crate::wire::wire_struct;

/// Bytes of a verdict on its way: member, kind, position, value.
pub const VERDICT_BYTES: usize = 4 + 1 + 8 + 8;

/// Bytes of a verdict at its image: position, kind, value; big-endian, so that they sort by position.
pub const NOTE_BYTES: usize = 8 + 1 + 8;

/// Segments of an untouched part that are read all the same, at the least.
const SAMPLES_MIN: u32 = 16;

/// What is told of a block that is not simply new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// It is in this slot.
    Held = 1,
    /// It becomes common, and another VM writes it.
    Shared = 2,
    /// It becomes common, and is to be written for all.
    Donated = 3,
    /// It is the same as the block at this earlier position.
    Repeats = 4,
}

/// A verdict on a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// Where.
    pub position: u64,
    /// What.
    pub kind: Kind,
    /// Slot or position.
    pub value: u64,
}

impl Note {
    /// The bytes that sort by position.
    pub fn to_bytes(self) -> [u8; NOTE_BYTES] {
        let mut bytes = [0; NOTE_BYTES];
        let parts = [&self.position.to_be_bytes()[..], &[self.kind as u8], &self.value.to_be_bytes()].concat();
        bytes.copy_from_slice(&parts);
        bytes
    }

    /// The verdict of these bytes, if they are one.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (position, rest) = bytes.split_first_chunk()?;
        let (kind, value) = rest.split_first()?;
        let kinds = [Kind::Held, Kind::Shared, Kind::Donated, Kind::Repeats];
        let kind = kinds.into_iter().find(|known| *known as u8 == *kind)?;
        let value = u64::from_be_bytes(*value.first_chunk()?);
        Some(Self { position: u64::from_be_bytes(*position), kind, value })
    }

    fn to_row(self, member: Member, rows: &mut Vec<u8>) {
        rows.extend_from_slice(&member.0.to_le_bytes());
        rows.extend_from_slice(&self.to_bytes());
    }
}

wire_struct! {
    /// One who takes part: a VM, or the common packs of a VM group.
    pub struct MemberRow {
        /// Of the VM; empty for common packs.
        pub vm: String,
        /// Whose blocks it may share.
        pub group: VmGroup,
        /// The host that writes it; `None` where it only has blocks.
        pub host: Option<u32>,
    }
}

wire_struct! {
    /// What all hosts of a batch must know alike.
    pub struct Description {
        /// All members, by group.
        pub members: Vec<MemberRow>,
        /// Common packs that were there before the batch.
        pub common_packs: Vec<PackNumber>,
    }
}

/// What both passes share: the store, the members, and the images of this host in this round.
pub struct Round {
    /// The store.
    pub store: Arc<Store>,
    /// Members and old common packs.
    pub description: Arc<Description>,
    /// Numbers of groups.
    groups: HashMap<VmGroup, u32>,
    /// The images, by line.
    pub images: HashMap<u32, Mutex<Taken>>,
    /// Lines of each member.
    pub lines: HashMap<Member, Vec<u32>>,
    /// Change maps, by line.
    pub maps: HashMap<u32, ChangeMap>,
    /// Verdicts, by the order of lines.
    pub notes: Mutex<Spill<NOTE_BYTES>>,
    /// The place of each line in `notes`.
    pub places: HashMap<u32, usize>,
    /// Where files are.
    pub scratch: std::path::PathBuf,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Round {
    /// A round over these images.
    ///
    /// # Errors
    /// `NoSpace`, `Denied`, `Unavailable` of the scratch folder.
    pub fn new(
        store: Arc<Store>,
        description: Arc<Description>,
        images: Vec<(Taken, Option<ChangeMap>)>,
        scratch: &std::path::Path,
        memory_bytes: usize,
    ) -> Result<Self> {
        let mut groups = HashMap::new();
        for row in &description.members {
            let next = groups.len() as u32;
            groups.entry(row.group).or_insert(next);
        }
        let notes = Mutex::new(Spill::new(scratch, images.len(), memory_bytes)?);
        let member_of: HashMap<&str, Member> =
            description.members.iter().zip(0..).map(|(row, at)| (row.vm.as_str(), Member(at))).collect();
        let mut lines: HashMap<Member, Vec<u32>> = HashMap::new();
        let mut places = HashMap::new();
        let mut by_line = HashMap::new();
        let mut maps = HashMap::new();
        for (place, (taken, map)) in images.into_iter().enumerate() {
            let line = taken.image.line;
            if let Some(member) = member_of.get(taken.image.name.vm.as_str()) {
                lines.entry(*member).or_default().push(line);
            }
            places.insert(line, place);
            maps.extend(map.map(|map| (line, map)));
            by_line.insert(line, Mutex::new(taken));
        }
        Ok(Self {
            store,
            groups,
            images: by_line,
            lines,
            maps,
            notes,
            places,
            scratch: scratch.to_owned(),
            description,
        })
    }

    fn row(&self, member: Member) -> Option<&MemberRow> {
        self.description.members.get(member.0 as usize)
    }

    fn is_common(&self, member: Member) -> bool {
        self.row(member).is_some_and(|row| row.vm.is_empty())
    }

    fn host_of(&self, member: Member, hosts: usize) -> usize {
        self.row(member).and_then(|row| row.host).map_or(member.0 as usize % hosts, |host| host as usize)
    }

    fn group_of(&self, member: Member) -> u32 {
        self.row(member).and_then(|row| self.groups.get(&row.group)).copied().unwrap_or(u32::MAX)
    }

    /// Notes a verdict.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn note(&self, note: Note) -> Result<()> {
        match self.places.get(&line_of(note.position)) {
            Some(place) => lock(&self.notes).add(*place, &note.to_bytes()),
            // Of an image that an earlier run of this job has committed.
            None => Ok(()),
        }
    }

    /// Gives all slots of data packs of a home that `wanted` names.
    fn feed_packs(&self, home: &Arc<Vm>, wanted: &dyn Fn(PackNumber) -> bool, feed: &mut Feed<'_, '_>) -> Result<()> {
        let packs: Arc<Packs> = self.store.packs(home);
        let state = home.state();
        for entry in state.packs.values().filter(|p| p.content == Content::Data && wanted(p.number)) {
            let mut pages = || -> Result<()> {
                let place = packs.locate(entry.number)?;
                let index = packs.index(&place)?;
                let member = index.member(entry.number)?;
                for page in 0..member.pages() {
                    let page = read_slot_page(&**packs.backend(), &place, member, page)?;
                    for (slot, print) in page.slots.iter().zip(&page.fingerprints) {
                        feed.give(*print, SlotId::new(entry.number, *slot).0 & !WANTED)?;
                    }
                }
                feed.tick()
            };
            match pages() {
                // What cannot be read is not deduplicated against.
                Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
                    log::warn!("pack {} is left out of deduplication: {e}; run snapfs check", entry.number);
                }
                fed => fed?,
            }
        }
        Ok(())
    }

    fn feed_home(&self, member: Member, wanted: &dyn Fn(PackNumber) -> bool, feed: &mut Feed<'_, '_>) -> Result<()> {
        let Some(row) = self.row(member) else { return Ok(()) };
        if row.vm.is_empty() {
            let home = self.store.common_home();
            return match home.refresh() {
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
                Err(e) => Err(e),
                Ok(state) => {
                    self.feed_packs(home, &|pack| state.popular.group_of(pack) == row.group && wanted(pack), feed)
                }
            };
        }
        match self.store.vm(&VmName::new(&row.vm)?) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
            Ok((vm, _)) => self.feed_packs(&vm, wanted, feed),
        }
    }

    /// Reads a source: levels 0 and 1, and the fingerprints of what is left.
    fn scan(&self, taken: &mut Taken, map: Option<&ChangeMap>, feed: &mut Feed<'_, '_>) -> Result<()> {
        taken.began = self.store.clock().elapsed();
        let image = &taken.image;
        let mut writer = ScanWriter::new(&self.scratch)?;
        let mut buffer = vec![0; SEGMENT_BYTES];
        let mut next = 0;
        let segments = image.grid.segments(image.bytes);
        while next < segments {
            let segment = SegmentIndex(next);
            next += 1;
            let from = image.grid.image_offset(segment.grid_offset());
            let to = image.grid.image_offset(segment.grid_offset() + SEGMENT_BYTES as u64).min(image.bytes);
            let is_hole = image.source.next_data(from)?.is_none_or(|(start, _)| start >= to);
            let parent = match &image.parent {
                Some(parent) => parent_digest(parent, segment)?,
                None => None,
            };
            if map.is_some_and(|map| !map.touches(from, to)) {
                let is_sample = segment.0.is_multiple_of((segments / SAMPLES_MIN).clamp(1, 100));
                if is_sample {
                    read_segment(&image.source, image.grid, image.bytes, segment, &mut buffer)?;
                    verify_unchanged(parent, &buffer, segment)?;
                }
                if parent.is_some() {
                    writer.add(&Scanned::Unchanged(segment))?;
                }
                continue;
            }
            if is_hole {
                continue;
            }
            read_segment(&image.source, image.grid, image.bytes, segment, &mut buffer)?;
            let blocks = buffer.as_chunks::<BLOCK_BYTES>().0;
            let is_data: Vec<bool> = blocks.iter().map(|block| !is_zero(block)).collect();
            if !is_data.contains(&true) {
                continue;
            }
            let found = digest(&buffer);
            if parent == Some(found) {
                writer.add(&Scanned::Unchanged(segment))?;
                feed.tick()?;
                continue;
            }
            let data: Vec<&[u8; BLOCK_BYTES]> =
                blocks.iter().zip(&is_data).filter(|(_, d)| **d).map(|(b, _)| b).collect();
            let mut found_prints = Vec::with_capacity(data.len());
            fingerprint_blocks(&data, &mut found_prints);
            let mut found_prints = found_prints.into_iter();
            let prints: Vec<Option<Fingerprint>> =
                is_data.iter().map(|is_data| if *is_data { found_prints.next() } else { None }).collect();
            let first = position(image.line, segment);
            for (at, print) in (first..).zip(&prints) {
                if let Some(print) = print {
                    feed.give(*print, at | WANTED)?;
                }
            }
            writer.add(&Scanned::Changed(segment, found, prints))?;
            feed.tick()?;
        }
        image.source.verify_unchanged()?;
        taken.scan = Some(Arc::new(writer.finish()?));
        Ok(())
    }
}

/// The digest of a parent's segment; what is damaged is not compared with.
fn parent_digest(parent: &crate::image::reader::Image, segment: SegmentIndex) -> Result<Option<Fingerprint>> {
    match parent.tree().recipe(segment) {
        Ok(recipe) => Ok(recipe.map(|recipe| recipe.digest)),
        Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
            log::warn!("segment {} of the parent is not compared with: {e}", segment.0);
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

fn member_of_row(row: &[u8]) -> Option<Member> {
    row.first_chunk().map(|bytes| Member(u32::from_le_bytes(*bytes)))
}

fn noted(round: &Round, row: &[u8]) -> Result<()> {
    let note = row.get(4..).and_then(Note::from_bytes);
    round.note(note.ok_or_else(|| Error::new(ErrorKind::Corrupt, "batch: a verdict that is none"))?)
}

/// Detect: all that the store has, and all that the batch wants.
pub struct Detect(pub Arc<Round>);

impl Task for Detect {
    fn members(&self) -> u32 {
        self.0.description.members.len() as u32
    }

    fn host_of(&self, member: Member, hosts: usize) -> usize {
        self.0.host_of(member, hosts)
    }

    fn group_of(&self, member: Member) -> u32 {
        self.0.group_of(member)
    }

    fn feed(&self, member: Member, feed: &mut Feed<'_, '_>) -> Result<()> {
        self.0.feed_home(member, &|_| true, feed)?;
        for line in self.0.lines.get(&member).into_iter().flatten() {
            if let Some(taken) = self.0.images.get(line) {
                let mut taken = lock(taken);
                let name = taken.image.name.to_string();
                self.0.scan(&mut taken, self.0.maps.get(line), feed).map_err(|e| e.within(name))?;
            }
        }
        Ok(())
    }

    fn row_bytes(&self) -> usize {
        VERDICT_BYTES
    }

    fn judge(&self, _: &Fingerprint, holders: &[Holder], rows: &mut Vec<u8>) {
        let common = holders.iter().find(|holder| self.0.is_common(holder.member)).and_then(|holder| holder.slot);
        let donor = holders.iter().find(|holder| holder.wanted.is_some()).map(|holder| holder.member);
        for holder in holders {
            let Some(position) = holder.wanted else { continue };
            let (kind, value) = match (holder.slot, common) {
                (Some(slot), _) => (Kind::Held, slot),
                (None, Some(slot)) => (Kind::Held, slot | WANTED),
                // Nobody else has or wants it: it is simply new.
                _ if holders.len() < 2 => continue,
                _ if donor == Some(holder.member) => (Kind::Donated, 0),
                _ => (Kind::Shared, 0),
            };
            Note { position, kind, value }.to_row(holder.member, rows);
        }
    }

    fn repeats(&self, member: Member, first: u64, position: u64, rows: &mut Vec<u8>) {
        Note { position, kind: Kind::Repeats, value: first }.to_row(member, rows);
    }

    fn member_of(&self, row: &[u8]) -> Option<Member> {
        member_of_row(row)
    }

    fn verdict(&self, _: Member, row: &[u8]) -> Result<()> {
        noted(&self.0, row)
    }
}

/// Link: what was shared, and who waits for it.
pub struct Link {
    /// The round.
    pub round: Arc<Round>,
    /// For each line, the file of what it waits for: fingerprint and position.
    pub wants: HashMap<u32, std::fs::File>,
}

/// Bytes of a row of what an image waits for: fingerprint, position.
pub const WANT_BYTES: usize = 32 + 8;

impl Task for Link {
    fn members(&self) -> u32 {
        self.round.description.members.len() as u32
    }

    fn host_of(&self, member: Member, hosts: usize) -> usize {
        self.round.host_of(member, hosts)
    }

    fn group_of(&self, member: Member) -> u32 {
        self.round.group_of(member)
    }

    fn feed(&self, member: Member, feed: &mut Feed<'_, '_>) -> Result<()> {
        let old = &self.round.description.common_packs;
        if self.round.is_common(member) {
            return self.round.feed_home(member, &|pack| old.binary_search(&pack).is_err(), feed);
        }
        for line in self.round.lines.get(&member).into_iter().flatten() {
            let Some(file) = self.wants.get(line) else { continue };
            each_row::<WANT_BYTES>(file, &mut |row| {
                let (print, position) = row.split_at(32);
                let print = Fingerprint(print.first_chunk().copied().unwrap_or_default());
                let position = position.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
                feed.give(print, position | WANTED)
            })?;
        }
        Ok(())
    }

    fn row_bytes(&self) -> usize {
        VERDICT_BYTES
    }

    fn judge(&self, _: &Fingerprint, holders: &[Holder], rows: &mut Vec<u8>) {
        let common = holders.iter().find(|holder| self.round.is_common(holder.member)).and_then(|holder| holder.slot);
        let Some(slot) = common else { return };
        for holder in holders {
            if let Some(position) = holder.wanted {
                Note { position, kind: Kind::Held, value: slot | WANTED }.to_row(holder.member, rows);
            }
        }
    }

    fn repeats(&self, _: Member, _: u64, _: u64, _: &mut Vec<u8>) {}

    fn member_of(&self, row: &[u8]) -> Option<Member> {
        member_of_row(row)
    }

    fn verdict(&self, _: Member, row: &[u8]) -> Result<()> {
        noted(&self.round, row)
    }
}

/// Gives each row of `N` bytes of a file.
///
/// # Errors
/// `Unavailable`; those of `take`.
pub fn each_row<const N: usize>(file: &std::fs::File, take: &mut dyn FnMut(&[u8; N]) -> Result<()>) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let failed = |e| Error::io("scratch file", e);
    let rows = file.metadata().map_err(failed)?.len() / N as u64;
    let mut buffer = [[0; N]; 1024];
    let mut at = 0;
    while at < rows {
        let count = (rows - at).min(1024) as usize;
        let part = buffer.get_mut(..count).unwrap_or_default();
        file.read_exact_at(part.as_flattened_mut(), at * N as u64).map_err(failed)?;
        part.iter().try_for_each(&mut *take)?;
        at += count as u64;
    }
    Ok(())
}
