//! `snapfs diff`: the ranges in which two snapshots differ.

use std::ffi::OsString;
use std::io::{self, BufWriter, Write};

use crate::cli::output::{self, Progress};
use crate::cli::store_arg::{StoreArg, reference};
use crate::cli::{DONE, Outcome, Stop};
use crate::error::{Error, Result, corrupt};
use crate::image::reader::Image;
use crate::limits::{BLOCK_BYTES, GROUP_SEGMENTS, SEGMENT_BYTES};
use crate::units::{Grid, SegmentIndex};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs diff /srv/snapfs web01/monday.img web01/tuesday.img
  snapfs diff /srv/snapfs web01/monday.img web01/latest --json

Ranges are in bytes and whole blocks of 4 KiB. What only the longer image has counts as different.";

/// Arguments of `diff`.
#[derive(Debug, clap::Args)]
pub struct Diff {
    #[command(flatten)]
    store: StoreArg,

    /// One snapshot
    #[arg(value_name = "OLD")]
    old: OsString,

    /// The other
    #[arg(value_name = "NEW")]
    new: OsString,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

impl Diff {
    /// Runs the command. Ranges are printed as they are found: there may be any number of them.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Unavailable`.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let (old, new) = (reference(&self.old)?, reference(&self.new)?);
        let (_, _, old) = store.open_reference(&old)?;
        let (_, _, new) = store.open_reference(&new)?;
        let bar = Progress::new("diff", Some(old.bytes().max(new.bytes())), self.json);
        let mut out = Ranges {
            out: BufWriter::new(io::stdout().lock()),
            json: self.json,
            pending: None,
            ranges: 0,
            bytes: 0,
            failed: None,
        };
        out.begin(&old, &new)?;
        let compared = compare(&old, &new, &mut out, &mut |at| bar.set(at));
        drop(bar);
        match (out.failed.take(), compared) {
            (Some(e), _) => Err(out_error(e)),
            (None, Err(e)) => {
                // What was found till then is right; without the end nobody takes it for all.
                let _ = out.out.flush();
                Err(e.into())
            }
            (None, Ok(())) => {
                out.end()?;
                Ok(DONE)
            }
        }
    }
}

fn out_error(e: io::Error) -> Stop {
    if e.kind() == io::ErrorKind::BrokenPipe { Stop::quiet() } else { Error::io("standard output", e).into() }
}

/// Takes ranges in order, joins neighbours, and prints them.
struct Ranges<W: Write> {
    out: W,
    json: bool,
    pending: Option<(u64, u64)>,
    ranges: u64,
    bytes: u64,
    failed: Option<io::Error>,
}

impl<W: Write> Ranges<W> {
    fn begin(&mut self, old: &Image, new: &Image) -> std::result::Result<(), Stop> {
        if self.json {
            let quoted = |name: &str| serde_json::to_string(name).map_err(|e| corrupt("JSON").because(e));
            let (old, new) = (quoted(old.name())?, quoted(new.name())?);
            write!(self.out, "{{\"old\": {old}, \"new\": {new}, \"ranges\": [").map_err(out_error)?;
        }
        Ok(())
    }

    /// Takes `start..end`. Returns whether more is wanted.
    fn add(&mut self, start: u64, end: u64) -> bool {
        match &mut self.pending {
            _ if start >= end => {}
            Some((_, last)) if *last == start => *last = end,
            _ => {
                self.flush_pending();
                self.pending = Some((start, end));
            }
        }
        self.failed.is_none()
    }

    fn flush_pending(&mut self) {
        let Some((start, end)) = self.pending.take() else { return };
        let length = end - start;
        let written = if self.json {
            let comma = if self.ranges == 0 { "" } else { "," };
            write!(self.out, "{comma}\n  {{\"start\": {start}, \"length\": {length}}}")
        } else {
            writeln!(self.out, "{start:>16} +{length}")
        };
        self.ranges += 1;
        self.bytes += length;
        if let Err(e) = written {
            self.failed = Some(e);
        }
    }

    fn end(&mut self) -> std::result::Result<(), Stop> {
        self.flush_pending();
        if let Some(e) = self.failed.take() {
            return Err(out_error(e));
        }
        let Self { ranges, bytes, .. } = *self;
        let written = if self.json {
            writeln!(self.out, "\n], \"changed_bytes\": {bytes}}}")
        } else if ranges == 0 {
            writeln!(self.out, "no difference")
        } else {
            writeln!(self.out, "{ranges} ranges, {} differ", output::size(bytes))
        };
        written.and_then(|()| self.out.flush()).map_err(out_error)
    }
}

fn compare<W: Write>(old: &Image, new: &Image, out: &mut Ranges<W>, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let common = old.bytes().min(new.bytes());
    let wants_more = if old.grid() == new.grid() {
        compare_by_segments(old, new, common, out, progress)?
    } else {
        compare_by_bytes(old, new, common, out, progress)?
    };
    if wants_more {
        out.add(common, old.bytes().max(new.bytes()));
    }
    Ok(())
}

/// Both lie on the same grid: what has the same recipe is equal unread.
fn compare_by_segments<W: Write>(
    old: &Image,
    new: &Image,
    common: u64,
    out: &mut Ranges<W>,
    progress: &mut dyn FnMut(u64),
) -> Result<bool> {
    let (grid, segments) = (old.grid(), old.grid().segments(common));
    let same_vm = old.tree().root().incarnation == new.tree().root().incarnation;
    let mut bytes = [vec![0; SEGMENT_BYTES], vec![0; SEGMENT_BYTES]];
    let mut groups: Vec<u32> =
        [old, new].iter().flat_map(|image| image.tree().root().groups.iter().map(|g| g.group)).collect();
    groups.sort_unstable();
    groups.dedup();
    for group in groups {
        let slot = |image: &Image| image.tree().root().group(group).map(|g| g.page.slot);
        if same_vm && slot(old) == slot(new) {
            continue;
        }
        let first = group.saturating_mul(GROUP_SEGMENTS as u32);
        for segment in (first..first.saturating_add(GROUP_SEGMENTS as u32)).take_while(|s| *s < segments) {
            let segment = SegmentIndex(segment);
            if !is_equal_unread(old, new, segment, same_vm)?
                && !compare_segment(old, new, segment, common, &mut bytes, out)?
            {
                return Ok(false);
            }
        }
        progress(grid.image_offset(u64::from(first) * SEGMENT_BYTES as u64));
    }
    Ok(true)
}

fn is_equal_unread(old: &Image, new: &Image, segment: SegmentIndex, same_vm: bool) -> Result<bool> {
    let about = |image: &Image, e: Error| e.within(format!("{}: segment {}", image.name(), segment.0));
    let place = |image: &Image| image.tree().place(segment).map_err(|e| about(image, e));
    let (a, b) = (place(old)?, place(new)?);
    match (a, b) {
        (None, None) => return Ok(true),
        (Some(a), Some(b)) if same_vm && a.slot == b.slot => return Ok(true),
        (Some(_), Some(_)) => {}
        _ => return Ok(false),
    }
    let digest = |image: &Image| Ok(image.tree().recipe(segment).map_err(|e| about(image, e))?.map(|r| r.digest));
    Ok(digest(old)? == digest(new)?)
}

fn compare_segment<W: Write>(
    old: &Image,
    new: &Image,
    segment: SegmentIndex,
    common: u64,
    bytes: &mut [Vec<u8>; 2],
    out: &mut Ranges<W>,
) -> Result<bool> {
    for (image, buffer) in [old, new].into_iter().zip(bytes.iter_mut()) {
        if !image.read_segment_verified(segment, buffer)? {
            buffer.fill(0);
        }
    }
    let [a, b] = bytes;
    let grid = old.grid();
    for (block, (a, b)) in a.chunks(BLOCK_BYTES).zip(b.chunks(BLOCK_BYTES)).enumerate() {
        if a != b {
            let (start, end) = block_range(grid, segment, block, common);
            if !out.add(start, end) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The range of the image that a block of a segment is.
fn block_range(grid: Grid, segment: SegmentIndex, block: usize, image_bytes: u64) -> (u64, u64) {
    let at = segment.grid_offset() + (block * BLOCK_BYTES) as u64;
    let end = grid.image_offset(at + BLOCK_BYTES as u64).min(image_bytes);
    (grid.image_offset(at).min(end), end)
}

/// The grids differ: compares bytes, where either has data.
fn compare_by_bytes<W: Write>(
    old: &Image,
    new: &Image,
    common: u64,
    out: &mut Ranges<W>,
    progress: &mut dyn FnMut(u64),
) -> Result<bool> {
    let mut bytes = [vec![0; SEGMENT_BYTES], vec![0; SEGMENT_BYTES]];
    let mut at = 0;
    while at < common {
        let next = [old.seek_data(at)?, new.seek_data(at)?].into_iter().flatten().min();
        let Some(next) = next.filter(|next| *next < common) else { break };
        at = at.max(next / BLOCK_BYTES as u64 * BLOCK_BYTES as u64);
        let count = (common - at).min(SEGMENT_BYTES as u64) as usize;
        let [a, b] = &mut bytes;
        a.truncate(count);
        b.truncate(count);
        old.read_at(at, a)?;
        new.read_at(at, b)?;
        for (a, b) in a.chunks(BLOCK_BYTES).zip(b.chunks(BLOCK_BYTES)) {
            let end = at + a.len() as u64;
            if a != b && !out.add(at, end) {
                return Ok(false);
            }
            at = end;
        }
        progress(at);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(json: bool, ranges: &[(u64, u64)]) -> String {
        let mut out = Ranges { out: Vec::new(), json, pending: None, ranges: 0, bytes: 0, failed: None };
        for (start, end) in ranges {
            assert!(out.add(*start, *end));
        }
        out.end().unwrap();
        String::from_utf8(out.out).unwrap()
    }

    #[test]
    fn neighbours_are_one_range() {
        assert_eq!(printed(false, &[]), "no difference\n");
        assert_eq!(printed(false, &[(5, 5)]), "no difference\n");
        let text = printed(false, &[(0, 4096), (4096, 8192), (12288, 16384)]);
        assert_eq!(text, format!("{:>16} +8192\n{:>16} +4096\n2 ranges, 12.0 KiB differ\n", 0, 12288));
        let text = printed(true, &[(0, 4096), (8192, 8193)]);
        let value: serde_json::Value = serde_json::from_str(&format!("{{\"ranges\": [{text}")).unwrap();
        assert_eq!(value["changed_bytes"], 4097);
        assert_eq!(value["ranges"][1]["start"], 8192);
    }

    #[test]
    fn a_first_block_may_be_short() {
        let grid = Grid::with_phase(512);
        assert_eq!(block_range(grid, SegmentIndex(0), 0, 1 << 20), (0, 512));
        assert_eq!(block_range(grid, SegmentIndex(0), 1, 1 << 20), (512, 4608));
        assert_eq!(block_range(grid, SegmentIndex(0), 1, 1000), (512, 1000));
        assert_eq!(block_range(grid, SegmentIndex(1), 0, 1 << 30), ((2 << 20) - 3584, (2 << 20) + 512));
    }
}
