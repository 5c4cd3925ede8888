//! ext2, ext3 and ext4, read by a library in this process: no kernel, no device, no root.

use std::io::Write;
use std::ops::Range;

use ext4_view::{Ext4, Ext4Error, Ext4Read, FileType, Metadata};

use crate::cli::files::entry::{Entry, EntryKind, Filesystem, printable};
use crate::error::{Error, ErrorKind, Result, invalid, not_found, unsupported};
use crate::image::reader::Image;

/// Bytes that are copied at a time.
const COPY_BYTES: usize = 256 << 10;

/// Entries of a folder that are listed: they are held in memory.
const ENTRIES_MAX: usize = 1 << 20;

/// A filesystem in a part of an image.
pub struct Ext {
    inner: Ext4,
}

struct Part {
    image: Image,
    range: Range<u64>,
}

impl Ext4Read for Part {
    fn read(
        &mut self,
        start: u64,
        out: &mut [u8],
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let end = start.checked_add(out.len() as u64).and_then(|end| end.checked_add(self.range.start));
        if end.is_none_or(|end| end > self.range.end) {
            return Err(Box::new(invalid(format!("reaches over its partition, offset={start}"))));
        }
        self.image.read_at(self.range.start + start, out).map_err(|e| Box::new(e).into())
    }
}

impl Ext {
    /// Opens the filesystem in `range` of an image.
    ///
    /// # Errors
    /// `Invalid` when it is damaged, `Unsupported`; those of reading the image.
    pub fn open(image: Image, range: Range<u64>) -> Result<Self> {
        let inner = Ext4::load(Box::new(Part { image, range })).map_err(|e| error_of(e, "filesystem"))?;
        Ok(Self { inner })
    }

    fn entry(&self, name: &[u8], path: ext4_view::Path<'_>, metadata: &Metadata) -> Entry {
        let kind = match metadata.file_type() {
            FileType::Regular => EntryKind::File,
            FileType::Directory => EntryKind::Folder,
            FileType::Symlink => EntryKind::Link,
            _ => EntryKind::Special,
        };
        let target = if kind == EntryKind::Link { self.inner.read_link(path).ok() } else { None };
        Entry {
            name: printable(name),
            kind,
            mode: u32::from(metadata.mode()),
            uid: metadata.uid(),
            gid: metadata.gid(),
            bytes: metadata.len(),
            mtime: metadata.modified().seconds(),
            target: target.map(|target| printable(target.as_ref())),
        }
    }
}

impl Filesystem for Ext {
    fn entries(&self, path: &str) -> Result<Vec<Entry>> {
        let at = |e| error_of(e, path);
        let real = ext4_view::Path::try_from(path).map_err(|e| invalid(format!("{path:?}")).because(e))?;
        let metadata = self.inner.metadata(real).map_err(at)?;
        if !metadata.is_dir() {
            let metadata = self.inner.symlink_metadata(real).map_err(at)?;
            return Ok(vec![self.entry(path.as_bytes(), real, &metadata)]);
        }
        let mut entries = Vec::new();
        for row in self.inner.read_dir(real).map_err(at)? {
            let row = row.map_err(at)?;
            let name = row.file_name();
            if name.as_ref() == b"." || name.as_ref() == b".." {
                continue;
            }
            if entries.len() == ENTRIES_MAX {
                return Err(unsupported(format!("{path}: has more than {ENTRIES_MAX} entries")));
            }
            let metadata = row.metadata().map_err(at)?;
            entries.push(self.entry(name.as_ref(), row.path().as_path(), &metadata));
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn copy(&self, path: &str, out: &mut dyn Write) -> Result<u64> {
        let at = |e| error_of(e, path);
        let real = ext4_view::Path::try_from(path).map_err(|e| invalid(format!("{path:?}")).because(e))?;
        let mut file = self.inner.open(real).map_err(at)?;
        let mut buffer = vec![0; COPY_BYTES];
        let mut bytes = 0;
        loop {
            // Fewer bytes at a time than writing should have.
            let mut filled = 0;
            while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
                match file.read_bytes(rest).map_err(at)? {
                    0 => break,
                    count => filled += count,
                }
            }
            let Some(part) = buffer.get(..filled).filter(|part| !part.is_empty()) else { return Ok(bytes) };
            out.write_all(part).map_err(|e| Error::io("write", e))?;
            bytes += filled as u64;
        }
    }
}

/// What is wrong with a guest's filesystem is no damage of the store: only reading the image can tell of that.
fn error_of(error: Ext4Error, path: &str) -> Error {
    if let Some(ours) = error.as_io().and_then(|inner| inner.downcast_ref::<Error>()) {
        return ours.duplicate();
    }
    match error {
        Ext4Error::NotFound => not_found(format!("{path}: there is no such file in the image")),
        Ext4Error::IsADirectory => Error::new(ErrorKind::IsFolder, format!("{path}: is a folder")),
        Ext4Error::NotADirectory => Error::new(ErrorKind::NotFolder, format!("{path}: is not in a folder")),
        Ext4Error::IsASpecialFile => invalid(format!("{path}: is no regular file")),
        Ext4Error::NotAbsolute => invalid(format!("{path}: must begin with /")),
        error @ (Ext4Error::Incompatible(_) | Ext4Error::Encrypted) => unsupported(path).because(error),
        error @ Ext4Error::Corrupt(_) => invalid(format!("{path}: the guest's filesystem is damaged")).because(error),
        error => invalid(path).because(error),
    }
}
