//! `snapfs backup`: reads a source from front to back and commits a sealed snapshot, all or nothing.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::catalog::record::Op;
use crate::catalog::state::{FileEntry, VmState};
use crate::catalog::vm::Vm;
use crate::error::{Error, ErrorKind, Result, invalid, not_found};
use crate::fingerprint::Fingerprint;
use crate::image::tree::Tree;
use crate::ingest::budget::Budget;
use crate::ingest::change_map::ChangeMap;
use crate::ingest::draft_tree::DraftTree;
use crate::ingest::partition::{FIRST_BYTES, grid_phase};
use crate::ingest::source::Source;
use crate::ingest::writer::{CommitRequest, Writer, verify_unchanged};
use crate::limits::{BATCH_SEGMENTS, IMAGE_BYTES_MAX, SEGMENT_BYTES};
use crate::name::{Reference, SnapshotName};
use crate::recipe::{RootPage, Tally};
use crate::store::session::Session;
use crate::store::{Store, disk_and_file};
use crate::units::{Grid, SegmentIndex};

/// Batches on their way from the source: one is read while one is worked on.
const BATCHES_AHEAD: usize = 1;

/// Segments of an untouched part that are read all the same, at the least, to catch a change map that lies.
const SAMPLES_MIN: u32 = 16;

/// One segment in this many is read all the same.
const SAMPLE_ONE_IN: u32 = 100;

/// How a backup is made.
#[derive(Debug, Default)]
pub struct BackupOptions {
    /// Compare with this and not with the newest snapshot of the disk.
    pub parent: Option<Parent>,
    /// What is known of what changed since the parent.
    pub changed: Option<Changed>,
}

/// What an image is compared with.
#[derive(Debug)]
pub enum Parent {
    /// A snapshot of the same VM.
    Snapshot(Reference),
    /// The root page of one, forgotten or not; the caller has it open.
    Root(Arc<RootPage>),
}

/// What is known of what changed since the parent.
pub enum Changed {
    /// The text of a change map. A sample of what it calls unchanged is read all the same, or with `verify` all of it, and
    /// the map refused if it is not true.
    Map {
        /// The text.
        text: Vec<u8>,
        /// Read everything.
        verify: bool,
    },
    /// Whether any byte from the first to before the second offset changed, told by who cannot be wrong: nothing else
    /// is read.
    Known(Box<dyn Fn(u64, u64) -> bool + Send + Sync>),
}

impl fmt::Debug for Changed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map { text, verify } => {
                out.debug_struct("Map").field("bytes", &text.len()).field("verify", verify).finish()
            }
            Self::Known(_) => out.write_str("Known"),
        }
    }
}

/// How far a backup is.
#[derive(Debug, Clone, Copy)]
pub struct BackupProgress {
    /// Bytes of the image that are done.
    pub bytes_done: u64,
    /// Bytes of the image, where the source tells.
    pub bytes_total: Option<u64>,
}

/// What a backup did.
#[derive(Debug, Clone, serde::Serialize)]
pub struct BackupReport {
    /// The snapshot.
    pub name: String,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// What each level did.
    pub tally: Tally,
}

/// What the reader thread hands over.
struct Batch {
    segments: Vec<(SegmentIndex, Vec<u8>)>,
    done: u64,
}

/// Backs a source up as a new sealed snapshot.
///
/// # Errors
/// `Exists`, `NotFound` (the parent), `Invalid` (the source changed, the map is wrong), `Busy`, `NoSpace`,
/// `TooLarge`, `ReadOnly`, `Corrupt`, `Unavailable`. Nothing is visible after any of them.
pub fn backup(
    store: &Store,
    name: &SnapshotName,
    source: Source,
    options: BackupOptions,
    progress: &dyn Fn(BackupProgress),
) -> Result<BackupReport> {
    let (disk, file_name) = disk_and_file(name);
    let early = early_checks(store, name, &options)?;
    let vm = match early {
        Some(vm) => vm,
        None => store.vm_or_create(&name.vm)?,
    };
    let session = Arc::new(Session::begin(store, &vm)?);
    let state = vm.state();
    refuse_taken_name(&state, name)?;
    if let Some(disk) = &disk
        && !state.disks.contains_key(disk)
    {
        let attributes = store.new_folder();
        session.append(|state| {
            let op = Op::MakeDisk { name: disk.clone(), attributes };
            Ok((if state.disks.contains_key(disk) { Vec::new() } else { vec![op] }, ()))
        })?;
    }
    let parent = match &options.parent {
        Some(Parent::Root(root)) => Some(Arc::new(Tree::new(root.clone(), session.packs().clone()))),
        Some(Parent::Snapshot(reference)) => {
            let file = Store::resolve(&state, reference)?;
            open_parent(store, &vm, &session, Some(&file), true)?
        }
        None => open_parent(store, &vm, &session, state.latest(disk.as_deref()), false)?,
    };
    let mut work = Work {
        writer: Writer::new(session.clone(), parent.clone()),
        tree: DraftTree::empty(session.packs().clone(), parent.clone()),
        parent,
        buffers: Arc::new(Budget::new(0)),
        progress,
    };
    match work.run(source, &options) {
        Ok((grid, image_bytes)) => {
            let now = store.clock().now();
            let request = CommitRequest {
                file: session.next_serial()?,
                disk,
                name: file_name,
                is_known: false,
                image_bytes,
                grid,
                uid: rustix::process::geteuid().as_raw(),
                gid: rustix::process::getegid().as_raw(),
                mtime: now,
                closed: true,
                sealed: true,
            };
            match work.writer.commit(&mut work.tree, &request) {
                Ok(root) => Ok(BackupReport { name: name.to_string(), image_bytes, tally: root.tally.clone() }),
                Err(e) => {
                    if e.kind() != ErrorKind::Unavailable {
                        work.writer.abandon();
                    }
                    Err(e.within(name))
                }
            }
        }
        Err(e) => {
            work.writer.abandon();
            Err(e.within(name))
        }
    }
}

/// Refuses what can be refused before anything is written, a begin record included.
fn early_checks(store: &Store, name: &SnapshotName, options: &BackupOptions) -> Result<Option<Arc<Vm>>> {
    if options.changed.is_some() && options.parent.is_none() {
        return Err(invalid("a change map needs the snapshot that it was taken against: --parent"));
    }
    let parent = match &options.parent {
        Some(Parent::Snapshot(parent)) if parent.vm != name.vm => {
            return Err(invalid(format!("parent {parent} is of another VM than {name}")));
        }
        Some(Parent::Snapshot(parent)) => Some(parent),
        Some(Parent::Root(_)) | None => None,
    };
    match store.vm(&name.vm) {
        Ok((vm, state)) => {
            refuse_taken_name(&state, name)?;
            if let Some(parent) = parent {
                Store::resolve(&state, parent)?;
            }
            Ok(Some(vm))
        }
        Err(e) if e.kind() == ErrorKind::NotFound => match parent {
            Some(parent) => Err(not_found(format!("snapshot {parent} is not there"))),
            None => Ok(None),
        },
        Err(e) => Err(e),
    }
}

/// Refuses a name that something has.
///
/// # Errors
/// `Exists`.
pub fn refuse_taken_name(state: &VmState, name: &SnapshotName) -> Result<()> {
    let (disk, file) = disk_and_file(name);
    let taken = match (&disk, state.find(disk.as_deref(), &file)) {
        (_, Some(_)) => "exists already",
        (None, None) if state.disks.contains_key(&file) => "is a disk's folder",
        (Some(disk), None) if state.find(None, disk).is_some() => "lies below a snapshot",
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::Exists, format!("{name} {taken}")))
}

/// The parent's tree, through the session's view of the packs. A parent that was chosen by us and is damaged is
/// done without; one that was asked for must be whole.
fn open_parent(
    store: &Store,
    vm: &Arc<Vm>,
    session: &Session,
    file: Option<&FileEntry>,
    is_asked_for: bool,
) -> Result<Option<Arc<Tree>>> {
    let Some(file) = file else { return Ok(None) };
    match store.open_image(vm, file) {
        Ok(image) => Ok(Some(Arc::new(Tree::new(image.tree().root().clone(), session.packs().clone())))),
        Err(e) if !is_asked_for && e.kind() == ErrorKind::Corrupt => {
            log::warn!("{}: not compared with its parent: {e}", vm.name());
            Ok(None)
        }
        // Forgotten between the look at the log and here: the similarity index still leads to its blocks.
        Err(e) if !is_asked_for && matches!(e.kind(), ErrorKind::Stale | ErrorKind::NotFound) => Ok(None),
        Err(e) => Err(e),
    }
}

/// A parent for a writer that has none yet: the newest snapshot of the disk.
///
/// # Errors
/// `Unavailable`.
pub fn newest_parent(store: &Store, session: &Session, disk: Option<&str>) -> Result<Option<Arc<Tree>>> {
    let vm = session.vm();
    let file = vm.state().latest(disk).cloned();
    open_parent(store, vm, session, file.as_ref(), false)
}

struct Work<'a> {
    writer: Writer,
    tree: DraftTree,
    parent: Option<Arc<Tree>>,
    buffers: Arc<Budget>,
    progress: &'a dyn Fn(BackupProgress),
}

impl Work<'_> {
    /// Reads all of the source; the grid and the size of the image.
    fn run(&mut self, source: Source, options: &BackupOptions) -> Result<(Grid, u64)> {
        let total = source.bytes();
        if total.is_some_and(|bytes| bytes > IMAGE_BYTES_MAX) {
            return Err(Error::new(ErrorKind::TooLarge, format!("the source has over {IMAGE_BYTES_MAX} bytes")));
        }
        let parent_root = self.parent.as_ref().map(|p| p.root().clone());
        let Some(bytes) = total else {
            if options.changed.is_some() {
                return Err(invalid("a change map goes with a file or a device, not with a stream"));
            }
            return self.run_stream(source, parent_root.map(|root| root.grid()));
        };
        let grid = match &parent_root {
            Some(root) => root.grid(),
            None => grid_of(&source, bytes)?,
        };
        if let (Some(_), Some(root)) = (&options.changed, &parent_root)
            && root.image_bytes != bytes
        {
            let (then, now) = (root.image_bytes, bytes);
            return Err(invalid(format!("change map: the parent has {then} bytes, the source {now}")));
        }
        let unread = match &options.changed {
            Some(Changed::Map { text, verify }) => {
                let map = ChangeMap::parse(text, bytes)?;
                let sample = if *verify { Sample::All } else { Sample::Some };
                Some(self.reuse_unchanged(&|start, end| map.touches(start, end), grid, bytes, sample)?)
            }
            Some(Changed::Known(touches)) => Some(self.reuse_unchanged(touches, grid, bytes, Sample::None)?),
            None => None,
        };
        let source = &source;
        self.pump(Some(bytes), move |batcher| read_file(source, grid, bytes, unread.as_ref(), batcher))?;
        source.verify_unchanged()?;
        Ok((grid, bytes))
    }

    fn run_stream(&mut self, mut source: Source, grid: Option<Grid>) -> Result<(Grid, u64)> {
        let mut first = vec![0; FIRST_BYTES];
        let count = source.read_full(&mut first)?;
        first.truncate(count);
        let grid = grid.unwrap_or_else(|| Grid::with_phase(grid_phase(&first, u64::MAX)));
        let bytes = self.pump(None, move |batcher| read_stream(source, grid, &first, batcher))?;
        Ok((grid, bytes))
    }

    /// Takes over what the map calls unchanged, but for a sample that is read all the same. Returns what must not
    /// be read, and what must turn out unchanged.
    fn reuse_unchanged(
        &mut self,
        touches: &dyn Fn(u64, u64) -> bool,
        grid: Grid,
        bytes: u64,
        sample: Sample,
    ) -> Result<Unread> {
        let mut unread = Unread::default();
        let mut offset = [0; 4];
        crate::random::fill_random(&mut offset)?;
        let untouched: Vec<u32> = (0..grid.segments(bytes))
            .filter(|s| {
                let start = SegmentIndex(*s).grid_offset();
                let end = start + SEGMENT_BYTES as u64;
                !touches(grid.image_offset(start), grid.image_offset(end).min(bytes))
            })
            .collect();
        let step = (untouched.len() as u32 / SAMPLES_MIN).clamp(1, SAMPLE_ONE_IN);
        let shift = u32::from_le_bytes(offset) % step;
        for (at, segment) in untouched.iter().enumerate() {
            let segment = SegmentIndex(*segment);
            let is_sample = match sample {
                Sample::None => false,
                Sample::Some => at as u32 % step == shift,
                Sample::All => true,
            };
            if is_sample {
                unread.to_verify.insert(segment.0, self.writer.parent_digest(segment)?);
            } else if let Some(place) = self.writer.reuse(segment)? {
                self.tree.set(segment, place)?;
                unread.taken.insert(segment.0);
            }
        }
        Ok(unread)
    }

    /// Runs `read` in a thread of its own and works on what it sends. Returns what `read` returns.
    fn pump<T: Send>(&mut self, total: Option<u64>, read: impl FnOnce(&mut Batcher) -> Result<T> + Send) -> Result<T> {
        let buffers = self.buffers.clone();
        std::thread::scope(|scope| {
            let (send, receive) = sync_channel::<Batch>(BATCHES_AHEAD);
            let reader = scope.spawn(move || read(&mut Batcher { send, buffers, segments: Vec::new() }));
            let worked = self.work(&receive, total);
            // A reader that still sends is told by the closed channel.
            drop(receive);
            let read = reader.join().map_err(|_| Error::new(ErrorKind::Unavailable, "the reading thread died"))?;
            worked?;
            read
        })
    }

    fn work(&mut self, receive: &Receiver<Batch>, total: Option<u64>) -> Result<()> {
        for batch in receive {
            let segments: Vec<(SegmentIndex, &[u8])> =
                batch.segments.iter().map(|(segment, bytes)| (*segment, bytes.as_slice())).collect();
            for (segment, place) in self.writer.take(&segments)? {
                self.tree.set(segment, place)?;
            }
            self.writer.shrink(&mut self.tree)?;
            (self.progress)(BackupProgress { bytes_done: batch.done, bytes_total: total });
            batch.segments.into_iter().for_each(|(_, buffer)| self.buffers.recycle(buffer));
        }
        Ok(())
    }
}

/// How much of what is called unchanged is read all the same.
#[derive(Clone, Copy)]
enum Sample {
    None,
    Some,
    All,
}

/// What a change map spares.
#[derive(Default)]
struct Unread {
    taken: roaring::RoaringBitmap,
    to_verify: std::collections::BTreeMap<u32, Option<Fingerprint>>,
}

/// Collects segments into batches.
struct Batcher {
    send: SyncSender<Batch>,
    buffers: Arc<Budget>,
    segments: Vec<(SegmentIndex, Vec<u8>)>,
}

impl Batcher {
    fn push(&mut self, segment: SegmentIndex, bytes: Vec<u8>, done: u64) -> Result<()> {
        self.segments.push((segment, bytes));
        if self.segments.len() >= BATCH_SEGMENTS { self.flush(done) } else { Ok(()) }
    }

    fn flush(&mut self, done: u64) -> Result<()> {
        let segments = std::mem::take(&mut self.segments);
        let closed = |_| Error::new(ErrorKind::Unavailable, "the writing side has ended");
        self.send.send(Batch { segments, done }).map_err(closed)
    }
}

fn read_file(source: &Source, grid: Grid, bytes: u64, unread: Option<&Unread>, batcher: &mut Batcher) -> Result<()> {
    let mut at = 0;
    while let Some((start, end)) = source.next_data(at)? {
        let first = SegmentIndex::holding(grid.offset(start.max(at)));
        let last = SegmentIndex::holding(grid.offset(end - 1));
        for segment in first.0..=last.0 {
            let segment = SegmentIndex(segment);
            let to = grid.image_offset(segment.grid_offset() + SEGMENT_BYTES as u64).min(bytes);
            at = to;
            if unread.is_some_and(|u| u.taken.contains(segment.0)) {
                continue;
            }
            let mut buffer = batcher.buffers.buffer();
            read_segment(source, grid, bytes, segment, &mut buffer)?;
            if let Some(parent) = unread.and_then(|u| u.to_verify.get(&segment.0)) {
                verify_unchanged(*parent, &buffer, segment)?;
            }
            batcher.push(segment, buffer, to)?;
        }
        if at >= bytes {
            break;
        }
    }
    verify_holes(unread, source, grid, bytes)?;
    batcher.flush(bytes)
}

/// Reads a segment of a source of `bytes` bytes into `buffer`, which has the size of one: zeros where the image has
/// none of it, or a hole.
///
/// # Errors
/// As [`Source::read_at`].
pub fn read_segment(source: &Source, grid: Grid, bytes: u64, segment: SegmentIndex, buffer: &mut [u8]) -> Result<()> {
    let from = grid.image_offset(segment.grid_offset());
    let to = grid.image_offset(segment.grid_offset() + SEGMENT_BYTES as u64).min(bytes);
    let skip = (grid.offset(from) - segment.grid_offset()) as usize;
    let count = to.saturating_sub(from) as usize;
    buffer.get_mut(..skip).unwrap_or_default().fill(0);
    buffer.get_mut(skip + count..).unwrap_or_default().fill(0);
    read_data(source, from, buffer.get_mut(skip..skip + count).unwrap_or_default())
}

/// The grid of a source that has no parent: by where its first partition begins.
///
/// # Errors
/// As [`Source::read_at`].
pub fn grid_of(source: &Source, bytes: u64) -> Result<Grid> {
    let mut first = vec![0; FIRST_BYTES.min(usize::try_from(bytes).unwrap_or(usize::MAX))];
    source.read_at(0, &mut first)?;
    Ok(Grid::with_phase(grid_phase(&first, bytes)))
}

/// Reads a range: data from the source, zeros where it has holes.
fn read_data(source: &Source, from: u64, out: &mut [u8]) -> Result<()> {
    let until = from + out.len() as u64;
    let mut at = from;
    while at < until {
        let (start, end) = source.next_data(at)?.unwrap_or((until, until));
        let (start, end) = (start.clamp(at, until), end.clamp(at, until));
        out.get_mut((at - from) as usize..(start - from) as usize).unwrap_or_default().fill(0);
        let part = out.get_mut((start - from) as usize..(end - from) as usize).unwrap_or_default();
        if !part.is_empty() {
            source.read_at(start, part)?;
        }
        at = end;
    }
    Ok(())
}

/// Segments of the sample that the source has as holes were not read: the parent must have holes there, too.
fn verify_holes(unread: Option<&Unread>, source: &Source, grid: Grid, bytes: u64) -> Result<()> {
    let Some(unread) = unread else { return Ok(()) };
    for (segment, parent) in unread.to_verify.iter().filter(|(_, parent)| parent.is_some()) {
        let segment = SegmentIndex(*segment);
        let from = grid.image_offset(segment.grid_offset());
        let to = grid.image_offset(segment.grid_offset() + SEGMENT_BYTES as u64).min(bytes);
        if source.next_data(from)?.is_none_or(|(start, _)| start >= to) {
            verify_unchanged(*parent, &[0; 8], segment)?;
        }
    }
    Ok(())
}

fn read_stream(mut source: Source, grid: Grid, first: &[u8], batcher: &mut Batcher) -> Result<u64> {
    let mut bytes = 0;
    let mut head = first;
    for segment in 0.. {
        let segment = SegmentIndex(segment);
        let mut buffer = batcher.buffers.buffer();
        let skip = (grid.offset(bytes) - segment.grid_offset()) as usize;
        let (lead, room) = buffer.split_at_mut(skip);
        lead.fill(0);
        let from_head = head.len().min(room.len());
        let (now, later) = head.split_at(from_head);
        let (start, rest) = room.split_at_mut(from_head);
        start.copy_from_slice(now);
        head = later;
        let wanted = rest.len();
        let count = if first.len() < FIRST_BYTES { 0 } else { source.read_full(rest)? };
        rest.get_mut(count..).unwrap_or_default().fill(0);
        bytes += (from_head + count) as u64;
        if bytes > IMAGE_BYTES_MAX {
            return Err(Error::new(ErrorKind::TooLarge, format!("the source has over {IMAGE_BYTES_MAX} bytes")));
        }
        if from_head + count > 0 {
            batcher.push(segment, buffer, bytes)?;
        }
        if count < wanted {
            break;
        }
    }
    batcher.flush(bytes)?;
    Ok(bytes)
}
