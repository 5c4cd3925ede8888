//! One image of a batch on its host: what the scan saw, on disk until it is written.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result, corrupt};
use crate::fingerprint::Fingerprint;
use crate::image::reader::Image;
use crate::ingest::source::Source;
use crate::limits::SEGMENT_BLOCKS;
use crate::name::SnapshotName;
use crate::units::{Grid, SegmentIndex, SlotId};

/// A position within a batch: the line of the job file, the segment, the block.
pub const LINE_SHIFT: u32 = 40;

/// The position of a segment's first block.
pub fn position(line: u32, segment: SegmentIndex) -> u64 {
    (u64::from(line) << LINE_SHIFT) | (u64::from(segment.0) * SEGMENT_BLOCKS as u64)
}

/// The line of a position.
pub fn line_of(position: u64) -> u32 {
    (position >> LINE_SHIFT) as u32
}

/// An image that is being taken up.
pub struct BatchImage {
    /// Its line in the job file.
    pub line: u32,
    /// The new snapshot.
    pub name: SnapshotName,
    /// What is read.
    pub source: Source,
    /// Its size.
    pub bytes: u64,
    /// How it lies on the grid.
    pub grid: Grid,
    /// What it was compared with, held until the image is written.
    pub parent: Option<Image>,
}

/// A segment as the scan saw it; holes are left out.
#[derive(Debug, PartialEq, Eq)]
pub enum Scanned {
    /// As in the parent.
    Unchanged(SegmentIndex),
    /// With new content: its digest, and a fingerprint for each block that is not zeros.
    Changed(SegmentIndex, Fingerprint, Vec<Option<Fingerprint>>),
}

fn failed(e: std::io::Error) -> Error {
    Error::io("scan file", e)
}

/// Writes what a scan sees, in image order.
pub struct ScanWriter(BufWriter<File>);

/// What a scan saw.
pub struct ScanFile(File);

impl ScanWriter {
    /// A file without a name in `folder`.
    ///
    /// # Errors
    /// `NoSpace`, `Denied`, `Unavailable`.
    pub fn new(folder: &Path) -> Result<Self> {
        Ok(Self(BufWriter::with_capacity(64 << 10, tempfile::tempfile_in(folder).map_err(failed)?)))
    }

    /// Adds a segment.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn add(&mut self, scanned: &Scanned) -> Result<()> {
        let bytes = match scanned {
            Scanned::Unchanged(segment) => [&segment.0.to_le_bytes()[..], &[0]].concat(),
            Scanned::Changed(segment, digest, prints) => {
                let mut bytes = [&segment.0.to_le_bytes()[..], &[1], &digest.0].concat();
                let mut bits = [0_u8; SEGMENT_BLOCKS / 8];
                for (at, _) in prints.iter().enumerate().filter(|(_, print)| print.is_some()) {
                    if let Some(byte) = bits.get_mut(at / 8) {
                        *byte |= 1 << (at % 8);
                    }
                }
                bytes.extend_from_slice(&bits);
                prints.iter().flatten().for_each(|print| bytes.extend_from_slice(&print.0));
                bytes
            }
        };
        self.0.write_all(&bytes).map_err(failed)
    }

    /// All is there.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn finish(self) -> Result<ScanFile> {
        self.0.into_inner().map(ScanFile).map_err(|e| failed(e.into_error()))
    }
}

impl ScanFile {
    /// Gives each segment, in image order.
    ///
    /// # Errors
    /// `Unavailable`, `Corrupt`; those of `take`.
    pub fn read(&self, take: &mut dyn FnMut(Scanned) -> Result<()>) -> Result<()> {
        let mut file = self.0.try_clone().map_err(failed)?;
        let end = file.seek(SeekFrom::End(0)).map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let mut reader = BufReader::with_capacity(64 << 10, file);
        while reader.stream_position().map_err(failed)? < end {
            let mut head = [0; 5];
            reader.read_exact(&mut head).map_err(failed)?;
            let [a, b, c, d, kind] = head;
            let segment = SegmentIndex(u32::from_le_bytes([a, b, c, d]));
            let scanned = match kind {
                0 => Scanned::Unchanged(segment),
                1 => {
                    let mut digest = [0; 32];
                    let mut bits = [0_u8; SEGMENT_BLOCKS / 8];
                    reader.read_exact(&mut digest).map_err(failed)?;
                    reader.read_exact(&mut bits).map_err(failed)?;
                    let is_data = |at: usize| bits.get(at / 8).is_some_and(|byte| byte & (1 << (at % 8)) != 0);
                    let mut prints = vec![None; SEGMENT_BLOCKS];
                    for (_, print) in prints.iter_mut().enumerate().filter(|(at, _)| is_data(*at)) {
                        let mut bytes = [0; 32];
                        reader.read_exact(&mut bytes).map_err(failed)?;
                        *print = Some(Fingerprint(bytes));
                    }
                    Scanned::Changed(segment, Fingerprint(digest), prints)
                }
                other => return Err(corrupt(format!("scan file: kind {other}"))),
            };
            take(scanned)?;
        }
        Ok(())
    }
}

/// The slots of an image's blocks by position, on disk: a later block that is the same finds its slot here.
pub struct SlotJournal(File);

impl SlotJournal {
    /// An empty one.
    ///
    /// # Errors
    /// `NoSpace`, `Denied`, `Unavailable`.
    pub fn new(folder: &Path) -> Result<Self> {
        Ok(Self(tempfile::tempfile_in(folder).map_err(failed)?))
    }

    /// Notes a segment's slots.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn note(&self, segment: SegmentIndex, slots: &[Option<SlotId>]) -> Result<()> {
        let bytes: Vec<u8> = slots.iter().flat_map(|slot| slot.map_or(0, |slot| slot.0).to_le_bytes()).collect();
        self.0.write_all_at(&bytes, u64::from(segment.0) * (SEGMENT_BLOCKS * 8) as u64).map_err(failed)
    }

    /// The slot at a position of its line, if one was noted.
    ///
    /// # Errors
    /// `Unavailable`.
    pub fn slot(&self, position: u64) -> Result<Option<SlotId>> {
        let mut bytes = [0; 8];
        let at = (position & ((1 << LINE_SHIFT) - 1)) * 8;
        match self.0.read_exact_at(&mut bytes, at) {
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            read => read.map_err(failed).map(|()| Some(SlotId(u64::from_le_bytes(bytes))).filter(|slot| slot.0 != 0)),
        }
    }
}

/// What a batch keeps of an image between its stages.
pub struct Taken {
    /// The image.
    pub image: BatchImage,
    /// What the scan saw; `None` until it is done.
    pub scan: Option<Arc<ScanFile>>,
    /// When its scan began: from then on the source should not change.
    pub began: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fingerprint::fingerprint;

    #[test]
    fn a_scan_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let prints: Vec<_> = (0..512_u32).map(|n| (n % 3 != 0).then(|| fingerprint(&n.to_le_bytes()))).collect();
        let rows = [
            Scanned::Unchanged(SegmentIndex(0)),
            Scanned::Changed(SegmentIndex(7), fingerprint(b"d"), prints),
            Scanned::Changed(SegmentIndex(8), fingerprint(b"e"), vec![None; 512]),
            Scanned::Unchanged(SegmentIndex(33_554_431)),
        ];
        let mut writer = ScanWriter::new(folder.path()).unwrap();
        rows.iter().for_each(|row| writer.add(row).unwrap());
        let scan = writer.finish().unwrap();
        for _ in 0..2 {
            let mut found = Vec::new();
            scan.read(&mut |row| {
                found.push(row);
                Ok(())
            })
            .unwrap();
            assert_eq!(found, rows);
        }
    }

    #[test]
    fn slots_are_found_by_position() {
        let folder = tempfile::tempdir().unwrap();
        let journal = SlotJournal::new(folder.path()).unwrap();
        journal.note(SegmentIndex(3), &[None, Some(SlotId(77)), Some(SlotId(1 << 63 | 5))]).unwrap();
        let at = position(9, SegmentIndex(3));
        assert_eq!(line_of(at), 9);
        let slot = |block| journal.slot(at + block).unwrap();
        assert_eq!((slot(0), slot(1), slot(2), slot(3)), (None, Some(SlotId(77)), Some(SlotId(1 << 63 | 5)), None));
        assert_eq!(journal.slot(position(9, SegmentIndex(0))).unwrap(), None);
    }
}
