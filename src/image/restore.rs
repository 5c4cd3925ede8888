//! Restores a whole image: every segment's digest is proven before its bytes are written, holes stay holes.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, RenameFlags, SeekFrom};

use crate::error::{Error, ErrorKind, Result, corrupt, invalid};
use crate::fingerprint::is_zero;
use crate::image::reader::Image;
use crate::limits::{BLOCK_BYTES, GROUP_BYTES, GROUP_SEGMENTS, NAME_BYTES_MAX, SEGMENT_BYTES};
use crate::units::SegmentIndex;

/// Segments read ahead of a stream: one is written while others are read.
const BUFFERS_AHEAD: usize = 4;

/// Zeros and old bytes are handled in pieces of this size.
const PIECE_BYTES: usize = 1 << 20;

/// The unit in which holes are made: file systems and devices need no smaller one.
const HOLE_BYTES: u64 = BLOCK_BYTES as u64;

/// Told how many bytes of the image more are done, from any thread.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

/// Gets each segment's bytes, `None` for a hole, from any thread.
type Visit<'a> = &'a (dyn Fn(SegmentIndex, Option<&[u8]>) -> Result<()> + Sync);

/// What a restore did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Restored {
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Bytes that were written; the rest were holes, or there already.
    pub bytes_written: u64,
}

/// Restores to a path: a new file, a file or block device that is there (only what differs is written), or a FIFO
/// or character device, which gets all bytes in order.
///
/// A new file appears under its name when it is complete and durable. Cost: 2 MiB of memory a thread, 4 MiB where
/// old bytes are compared; each stored frame is read once.
///
/// # Errors
/// `Invalid` for a folder and for a device that is too small, before anything is written; `Busy` for a device in
/// use; `Corrupt` (naming snapshot, offset and object), `NoSpace`, `Denied`, as the system has it otherwise. After
/// an error there is no new file, but one that was there, or a device, is half written.
pub fn restore_to_file(image: &Image, dest: &Path, threads: usize, progress: Progress<'_>) -> Result<Restored> {
    let about = |e: io::Error| Error::io(dest.display().to_string(), e);
    let file_type = match std::fs::metadata(dest) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return restore_new(image, dest, threads, progress),
        Err(e) => return Err(about(e)),
    };
    if file_type.is_file() {
        let file = OpenOptions::new().read(true).write(true).open(dest).map_err(about)?;
        let there = There::new(file, dest);
        there.restore(image, threads, progress)?;
        there.file.set_len(image.bytes()).map_err(about)?;
        there.finish(image)
    } else if file_type.is_block_device() {
        // O_EXCL: the kernel refuses a device that is mounted or otherwise in use.
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(dest).map_err(about)?;
        let bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| about(e.into()))?;
        if bytes < image.bytes() {
            let (dest, wanted) = (dest.display(), image.bytes());
            return Err(invalid(format!("{dest}: the device is too small, bytes={bytes} image={wanted}")));
        }
        let there = There::new(file, dest);
        there.restore(image, threads, progress)?;
        there.finish(image)
    } else if file_type.is_fifo() || file_type.is_char_device() {
        let mut file = OpenOptions::new().write(true).open(dest).map_err(about)?;
        restore_to_stream(image, &mut file, progress).map_err(|e| e.within(dest.display()))
    } else {
        let what = if file_type.is_dir() { "a folder" } else { "a socket" };
        Err(invalid(format!("{}: is {what}, neither a file nor a device", dest.display())))
    }
}

/// Where a segment's bytes belong: its range of the image, and of the segment's buffer.
fn place_of(image: &Image, segment: SegmentIndex) -> (u64, Range<usize>) {
    let grid = image.grid();
    let start = grid.image_offset(segment.grid_offset());
    let end = grid.image_offset(segment.grid_offset() + SEGMENT_BYTES as u64).min(image.bytes());
    // Only the first segment begins before the image does.
    let within = (grid.offset(start) - segment.grid_offset()) as usize;
    (start, within..within + end.saturating_sub(start) as usize)
}

/// The runs of equal `class` among the blocks of `range` of a segment's buffer.
fn runs<T: PartialEq>(range: Range<usize>, class: impl Fn(Range<usize>) -> T) -> Vec<(Range<usize>, T)> {
    let mut found: Vec<(Range<usize>, T)> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(range.end);
        let this = class(at..end);
        match found.last_mut() {
            Some((last, same)) if *same == this => last.end = end,
            _ => found.push((at..end, this)),
        }
        at = end;
    }
    found
}

/// Ranges of the image, in order, that whole groups of holes take.
fn hole_groups(image: &Image) -> Vec<Range<u64>> {
    let grid = image.grid();
    let mut found = Vec::new();
    let mut at = 0;
    for group in &image.tree().root().groups {
        let start = grid.image_offset(u64::from(group.group) * GROUP_BYTES);
        if at < start {
            found.push(at..start);
        }
        at = grid.image_offset((u64::from(group.group) + 1) * GROUP_BYTES);
    }
    if at < image.bytes() {
        found.push(at..image.bytes());
    }
    found
}

/// Reads the segments of all groups with data, in threads, each proven against its digest.
fn for_each_segment(image: &Image, threads: usize, visit: Visit<'_>) -> Result<()> {
    let groups = &image.tree().root().groups;
    let segments = image.grid().segments(image.bytes());
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let work = || -> Result<()> {
        let mut buffer = vec![0; SEGMENT_BYTES];
        while !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let (group, within) = (at / GROUP_SEGMENTS as u64, at % GROUP_SEGMENTS as u64);
            let group = usize::try_from(group).ok().and_then(|g| groups.get(g));
            let Some(group) = group else { return Ok(()) };
            let index = u64::from(group.group) * GROUP_SEGMENTS as u64 + within;
            let Some(segment) = u32::try_from(index).ok().filter(|s| *s < segments) else { continue };
            let segment = SegmentIndex(segment);
            let done = image
                .read_segment_verified(segment, &mut buffer)
                .and_then(|has_data| visit(segment, has_data.then_some(buffer.as_slice())));
            if let Err(e) = done {
                failed.store(true, Ordering::Relaxed);
                return Err(e);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let mut outcome = Ok(());
        for worker in workers {
            let ended = worker.join();
            let ended = ended.unwrap_or_else(|_| Err(Error::new(ErrorKind::Unavailable, "a restoring thread died")));
            outcome = outcome.and(ended);
        }
        outcome
    })
}

/// A file that is being written under another name; removed unless it is kept.
struct Partial {
    path: PathBuf,
    is_kept: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_kept {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// `.NAME.snapfs-partial-PID`, the name cut where it would become too long.
fn partial_path(dest: &Path) -> Result<PathBuf> {
    let no_name = || invalid(format!("{}: is no name of a file", dest.display()));
    let name = dest.file_name().ok_or_else(no_name)?.as_bytes();
    let ending = format!(".snapfs-partial-{}", std::process::id());
    let kept = name.len().min(NAME_BYTES_MAX - 1 - ending.len());
    let mut partial = b".".to_vec();
    partial.extend_from_slice(name.get(..kept).unwrap_or_default());
    partial.extend_from_slice(ending.as_bytes());
    Ok(folder_of(dest).join(std::ffi::OsStr::from_bytes(&partial)))
}

fn folder_of(dest: &Path) -> &Path {
    dest.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn restore_new(image: &Image, dest: &Path, threads: usize, progress: Progress<'_>) -> Result<Restored> {
    let about = |e: io::Error| Error::io(dest.display().to_string(), e);
    let path = partial_path(dest)?;
    // A disk's content is nobody else's business.
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(about)?;
    let mut partial = Partial { path, is_kept: false };
    file.set_len(image.bytes()).map_err(about)?;
    let written = AtomicU64::new(0);
    for hole in hole_groups(image) {
        progress(hole.end - hole.start);
    }
    for_each_segment(image, threads, &|segment, bytes| {
        let (start, range) = place_of(image, segment);
        let whole = range.clone();
        if let Some(bytes) = bytes {
            let part = |r: Range<usize>| bytes.get(r).unwrap_or_default();
            for (run, is_hole) in runs(range, |block| is_zero(part(block))) {
                if !is_hole {
                    let offset = start + (run.start - whole.start) as u64;
                    written.fetch_add(run.len() as u64, Ordering::Relaxed);
                    file.write_all_at(part(run), offset).map_err(about)?;
                }
            }
        }
        progress(whole.len() as u64);
        Ok(())
    })?;
    // Durable before the rename: a name must never lead to missing bytes.
    file.sync_all().map_err(about)?;
    rename_new(&partial.path, dest).map_err(about)?;
    partial.is_kept = true;
    File::open(folder_of(dest)).and_then(|folder| folder.sync_all()).map_err(about)?;
    Ok(Restored { image_bytes: image.bytes(), bytes_written: written.into_inner() })
}

/// Renames without replacing what came there meanwhile, where the file system can.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => std::fs::rename(from, to),
        done => Ok(done?),
    }
}

/// What a block that is there needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Nothing,
    Zeros,
    Bytes,
}

/// A file or device that is there: only what differs is written.
struct There {
    file: File,
    name: String,
    written: AtomicU64,
}

impl There {
    fn new(file: File, path: &Path) -> Self {
        Self { file, name: path.display().to_string(), written: AtomicU64::new(0) }
    }

    fn about(&self, offset: u64, e: io::Error) -> Error {
        Error::io(format!("{}: byte {offset}", self.name), e)
    }

    fn restore(&self, image: &Image, threads: usize, progress: Progress<'_>) -> Result<()> {
        for hole in hole_groups(image) {
            let bytes = hole.end - hole.start;
            self.clear(hole)?;
            progress(bytes);
        }
        for_each_segment(image, threads, &|segment, bytes| {
            let (start, range) = place_of(image, segment);
            let count = range.len() as u64;
            match bytes {
                Some(bytes) => self.overwrite(start, bytes, range)?,
                None => self.clear(start..start + count)?,
            }
            progress(count);
            Ok(())
        })
    }

    fn finish(self, image: &Image) -> Result<Restored> {
        self.file.sync_all().map_err(|e| Error::io(self.name, e))?;
        Ok(Restored { image_bytes: image.bytes(), bytes_written: self.written.into_inner() })
    }

    /// Writes those blocks of a segment that differ from what is there.
    fn overwrite(&self, start: u64, bytes: &[u8], range: Range<usize>) -> Result<()> {
        let mut old = vec![0; range.len()];
        self.read_old(start, &mut old)?;
        let new = |r: &Range<usize>| bytes.get(r.clone()).unwrap_or_default();
        let first = range.start;
        let changes = runs(range, |block| {
            let there = old.get(block.start - first..block.end - first).unwrap_or_default();
            match new(&block) {
                same if same == there => Change::Nothing,
                zeros if is_zero(zeros) => Change::Zeros,
                _ => Change::Bytes,
            }
        });
        for (run, change) in changes {
            let offset = start + (run.start - first) as u64;
            match change {
                Change::Nothing => {}
                Change::Zeros => self.clear(offset..offset + run.len() as u64)?,
                Change::Bytes => self.write(offset, new(&run))?,
            }
        }
        Ok(())
    }

    /// Makes a range read as zeros: by a hole if the medium can, else by writing zeros where others are.
    fn clear(&self, range: Range<u64>) -> Result<()> {
        let hole = range.start.next_multiple_of(HOLE_BYTES)..range.end / HOLE_BYTES * HOLE_BYTES;
        if hole.start < hole.end {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Whatever keeps it from making a hole, writing will show.
            if rustix::fs::fallocate(&self.file, flags, hole.start, hole.end - hole.start).is_ok() {
                self.clear_by_writing(range.start..hole.start)?;
                return self.clear_by_writing(hole.end..range.end);
            }
        }
        self.clear_by_writing(range)
    }

    fn clear_by_writing(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        let mut old = Vec::new();
        while at < range.end {
            // Holes of a file that is there need not be read. A device knows of none.
            match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => at = data,
                Err(rustix::io::Errno::NXIO) => break,
                Err(_) => {}
            }
            let count = (range.end.saturating_sub(at)).min(PIECE_BYTES as u64) as usize;
            old.resize(count, 0);
            self.read_old(at, &mut old)?;
            if !is_zero(&old) {
                old.fill(0);
                self.write(at, &old)?;
            }
            at += count as u64;
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.file.write_all_at(bytes, offset).map_err(|e| self.about(offset, e))
    }

    /// What is there; zeros past the end.
    fn read_old(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + filled as u64) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(count) => filled += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.about(offset, e)),
            }
        }
        Ok(())
    }
}

/// A part of the image on its way to a stream.
enum Piece {
    Bytes(Vec<u8>, Range<usize>),
    Zeros(u64),
}

/// Restores in order to a stream. Holes become zeros. Cost: up to 8 MiB of memory.
///
/// # Errors
/// `Corrupt` (naming snapshot, offset and object), what writing meets. What was written till then is right.
pub fn restore_to_stream(image: &Image, out: &mut dyn Write, progress: Progress<'_>) -> Result<Restored> {
    let written = std::thread::scope(|scope| {
        let (send, receive) = crossbeam_channel::bounded::<Result<Piece>>(BUFFERS_AHEAD);
        let (give_back, given_back) = crossbeam_channel::bounded::<Vec<u8>>(BUFFERS_AHEAD);
        scope.spawn(move || {
            if let Err(e) = read_in_order(image, &send, &given_back) {
                // Nobody there: writing failed, which is the better message.
                let _ = send.send(Err(e));
            }
        });
        let zeros = vec![0; PIECE_BYTES];
        let mut written = 0;
        for piece in receive {
            match piece? {
                Piece::Bytes(buffer, range) => {
                    let bytes = buffer.get(range).unwrap_or_default();
                    write_stream(out, bytes, &mut written, progress)?;
                    // A full channel only means that enough buffers are about.
                    let _ = give_back.try_send(buffer);
                }
                Piece::Zeros(mut count) => {
                    while count > 0 {
                        let now = count.min(PIECE_BYTES as u64);
                        write_stream(out, zeros.get(..now as usize).unwrap_or_default(), &mut written, progress)?;
                        count -= now;
                    }
                }
            }
        }
        out.flush().map_err(|e| Error::io("write", e))?;
        Ok(written)
    })?;
    if written != image.bytes() {
        return Err(corrupt(format!("{}: ends early, bytes={written} of {}", image.name(), image.bytes())));
    }
    Ok(Restored { image_bytes: image.bytes(), bytes_written: written })
}

fn write_stream(out: &mut dyn Write, bytes: &[u8], written: &mut u64, progress: Progress<'_>) -> Result<()> {
    out.write_all(bytes).map_err(|e| Error::io(format!("write at byte {written}"), e))?;
    *written += bytes.len() as u64;
    progress(bytes.len() as u64);
    Ok(())
}

fn read_in_order(
    image: &Image,
    send: &crossbeam_channel::Sender<Result<Piece>>,
    given_back: &crossbeam_channel::Receiver<Vec<u8>>,
) -> Result<()> {
    let segments = image.grid().segments(image.bytes());
    // The end of what was sent, in bytes of the image: what is left out up to the next data are zeros.
    let mut sent = 0;
    let closed = |_| Error::new(ErrorKind::Unavailable, "the writing side has ended");
    for group in &image.tree().root().groups {
        let first = u64::from(group.group) * GROUP_SEGMENTS as u64;
        for segment in first..first + GROUP_SEGMENTS as u64 {
            let Some(segment) = u32::try_from(segment).ok().filter(|s| *s < segments) else { break };
            let segment = SegmentIndex(segment);
            let mut buffer = given_back.try_recv().unwrap_or_else(|_| vec![0; SEGMENT_BYTES]);
            if !image.read_segment_verified(segment, &mut buffer)? {
                continue;
            }
            let (start, range) = place_of(image, segment);
            if start > sent {
                send.send(Ok(Piece::Zeros(start - sent))).map_err(closed)?;
            }
            sent = start + range.len() as u64;
            send.send(Ok(Piece::Bytes(buffer, range))).map_err(closed)?;
        }
    }
    if sent < image.bytes() {
        send.send(Ok(Piece::Zeros(image.bytes() - sent))).map_err(closed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_at_blocks() {
        let odd = |r: Range<usize>| r.start / BLOCK_BYTES % 2 == 1;
        assert_eq!(runs(0..0, odd), []);
        assert_eq!(runs(512..4096, odd), [(512..4096, false)]);
        assert_eq!(runs(512..9000, odd), [(512..4096, false), (4096..8192, true), (8192..9000, false)]);
        assert_eq!(runs(100..20000, |_| 7), [(100..20000, 7)]);
    }

    #[test]
    fn a_partial_name_fits() {
        let pid = std::process::id();
        assert_eq!(partial_path(Path::new("a.img")).unwrap(), PathBuf::from(format!("./.a.img.snapfs-partial-{pid}")));
        let long = partial_path(&Path::new("/x").join("n".repeat(255))).unwrap();
        assert_eq!(long.file_name().unwrap().len(), 255);
        assert!(partial_path(Path::new("/")).is_err());
    }

    fn there(bytes: &[u8]) -> (tempfile::TempDir, There) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        (folder, There::new(file, &path))
    }

    #[test]
    fn only_what_differs_is_written() {
        let (folder, there) = there(&[7; 5 * BLOCK_BYTES]);
        let mut segment = vec![7; SEGMENT_BYTES];
        segment[BLOCK_BYTES..2 * BLOCK_BYTES].fill(9);
        segment[3 * BLOCK_BYTES..4 * BLOCK_BYTES].fill(0);
        there.overwrite(0, &segment, 512..512 + 6 * BLOCK_BYTES).unwrap();
        let want = &segment[512..512 + 6 * BLOCK_BYTES];
        assert_eq!(std::fs::read(folder.path().join("file")).unwrap(), want);
        there.written.store(0, Ordering::Relaxed);
        there.overwrite(0, &segment, 512..512 + 6 * BLOCK_BYTES).unwrap();
        assert_eq!(there.written.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_cleared_range_reads_as_zeros_and_nothing_else_does() {
        for clear in [There::clear, There::clear_by_writing] {
            for range in [0..1, 100..100, 1..4096, 4096..8192, 100..3 * PIECE_BYTES as u64 + 5, 9000..9001] {
                let bytes = 3 * PIECE_BYTES + 4096;
                let (folder, there) = there(&vec![7; bytes]);
                clear(&there, range.clone()).unwrap();
                let mut want = vec![7; bytes];
                want[range.start as usize..range.end as usize].fill(0);
                assert!(std::fs::read(folder.path().join("file")).unwrap() == want, "{range:?}");
            }
        }
    }
}
