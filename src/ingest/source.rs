//! What `backup` reads: a file or a block device, read by ranges and in any order, or standard input, read once.

use crate::error::{Error, Result, invalid};
use rustix::fs::{Advice, FileType, Mode, OFlags, SeekFrom, fadvise, fcntl_setfl, fstat, open, seek, stat};
use rustix::io::Errno;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// An image to be read. May be shared by threads that read different ranges.
pub struct Source {
    /// For messages: the path, or what stands for it.
    name: String,
    input: Input,
}

enum Input {
    /// A regular file and the size it had when it was opened.
    File { file: File, bytes: u64 },
    /// A block device and its size.
    Device { file: File, bytes: u64 },
    /// What is put together from elsewhere.
    View(Box<dyn View>),
    /// Bytes that come once, one after another.
    Stream(Box<dyn Read + Send + Sync>),
}

/// An image that is put together from elsewhere, and does not change while it is read.
pub trait View: Send + Sync {
    /// Bytes of the image.
    fn bytes(&self) -> u64;

    /// As [`Source::next_data`].
    ///
    /// # Errors
    /// Those of where it comes from.
    fn next_data(&self, from: u64) -> Result<Option<(u64, u64)>>;

    /// As [`Source::read_at`].
    ///
    /// # Errors
    /// Those of where it comes from.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()>;
}

impl Source {
    /// Opens the regular file or block device at `path`; a link is followed.
    ///
    /// # Errors
    /// `NotFound`, `Denied`, `Invalid` for anything else than these two, as the system has it otherwise.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let failed = |errno: Errno| Error::io(name.clone(), errno.into());

        // Looked at before it is opened: to open some devices has effects, and a FIFO would wait for its writer.
        check_type(&name, FileType::from_raw_mode(stat(path).map_err(failed)?.st_mode))?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
        let file = File::from(open(path, flags | OFlags::NONBLOCK, Mode::empty()).map_err(failed)?);

        // And once more: what was opened need not be what was looked at.
        let status = fstat(&file).map_err(failed)?;
        let file_type = FileType::from_raw_mode(status.st_mode);
        check_type(&name, file_type)?;
        fcntl_setfl(&file, OFlags::empty()).map_err(failed)?;

        // Only advice: reading works without.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        let input = if file_type == FileType::BlockDevice {
            // Its status has no size.
            let bytes = seek(&file, SeekFrom::End(0)).map_err(failed)?;
            Input::Device { file, bytes }
        } else {
            Input::File { file, bytes: u64::try_from(status.st_size).unwrap_or(0) }
        };
        Ok(Self { name, input })
    }

    /// Standard input.
    pub fn stdin() -> Self {
        Self::stream("standard input", io::stdin())
    }

    /// An image that is put together from elsewhere; `name` is what messages call it.
    pub fn view(name: impl Into<String>, view: impl View + 'static) -> Self {
        Self { name: name.into(), input: Input::View(Box::new(view)) }
    }

    /// Whatever `input` gives; `name` is what messages call it.
    pub fn stream(name: impl Into<String>, input: impl Read + Send + Sync + 'static) -> Self {
        Self { name: name.into(), input: Input::Stream(Box::new(input)) }
    }

    /// The size in bytes when it was opened; `None` for a stream.
    pub fn bytes(&self) -> Option<u64> {
        match &self.input {
            Input::File { bytes, .. } | Input::Device { bytes, .. } => Some(*bytes),
            Input::View(view) => Some(view.bytes()),
            Input::Stream(_) => None,
        }
    }

    /// The next range with data at or after `from`: its first byte, and the first after it. `None` if there is none.
    ///
    /// What is between is a hole and reads as zeros. Without knowledge of holes, as on block devices, everything up to
    /// the end is data. Cost: two system calls.
    ///
    /// A file that shrank may look as if it ended with a hole: only [`Source::verify_unchanged`] tells.
    ///
    /// # Errors
    /// `Invalid` for a stream, as the system has it otherwise.
    pub fn next_data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        let (file, bytes) = match &self.input {
            Input::File { file, bytes } => (file, *bytes),
            Input::Device { bytes, .. } => return Ok((from < *bytes).then_some((from, *bytes))),
            Input::View(view) => return view.next_data(from),
            Input::Stream(_) => return Err(self.not_by_ranges()),
        };
        if from >= bytes {
            return Ok(None);
        }
        let failed = |errno: Errno| Error::io(format!("{}: look for data at byte {from}", self.name), errno.into());
        let start = match seek(file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((from, bytes))),
            Err(errno) => return Err(failed(errno)),
        };
        let end = match seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(bytes),
            // It shrank in between; to read the range will say so.
            Err(Errno::NXIO) => bytes,
            Err(errno) => return Err(failed(errno)),
        };
        Ok((start < end).then_some((start, end)))
    }

    /// Reads the bytes at `offset` into `out`, which is filled completely on `Ok` and unspecified on `Err`.
    ///
    /// # Errors
    /// `Invalid` past the end, which a source that shrank has too early, and for a stream; as the system has it
    /// otherwise, with the offset.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let file = match &self.input {
            Input::File { file, .. } | Input::Device { file, .. } => file,
            Input::View(view) => return view.read_at(offset, out).map_err(|e| e.within(&self.name)),
            Input::Stream(_) => return Err(self.not_by_ranges()),
        };
        let mut at = offset;
        let mut rest = &mut *out;
        while !rest.is_empty() {
            match file.read_at(rest, at) {
                Ok(0) => {
                    let end = at.saturating_add(rest.len() as u64);
                    let what = "source shrank while it was read: wanted bytes";
                    return Err(invalid(format!("{}: {what} {offset}..{end}", self.name)));
                }
                Ok(count) => {
                    rest = rest.get_mut(count..).unwrap_or_default();
                    at += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io(format!("{}: read at byte {at}", self.name), error)),
            }
        }
        Ok(())
    }

    /// Reads the next bytes of a stream into `out` and says how many. Fewer than fit only at the end, 0 from then on.
    ///
    /// # Errors
    /// `Invalid` for a file or device, as the system has it otherwise.
    pub fn read_full(&mut self, out: &mut [u8]) -> Result<usize> {
        let Input::Stream(stream) = &mut self.input else {
            return Err(invalid(format!("{}: read as a stream, but it is a file", self.name)));
        };
        let mut filled = 0;
        while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match stream.read(rest) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io(format!("{}: read", self.name), error)),
            }
        }
        Ok(filled)
    }

    /// To be asked when all is read: whether a file still has the size that was reported. Others always have.
    ///
    /// # Errors
    /// `Invalid` if it has not, as the system has it otherwise.
    pub fn verify_unchanged(&self) -> Result<()> {
        let Input::File { file, bytes } = &self.input else {
            return Ok(());
        };
        let status = fstat(file).map_err(|errno| Error::io(self.name.clone(), errno.into()))?;
        if u64::try_from(status.st_size) == Ok(*bytes) {
            return Ok(());
        }
        let what = "source changed size while it was read";
        Err(invalid(format!("{}: {what}, bytes={bytes} now={}", self.name, status.st_size)))
    }

    fn not_by_ranges(&self) -> Error {
        invalid(format!("{}: read by ranges, but it is a stream", self.name))
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Source").field("name", &self.name).field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

/// Only files and block devices have a size and can be read at any place.
fn check_type(name: &str, file_type: FileType) -> Result<()> {
    let found = match file_type {
        FileType::RegularFile | FileType::BlockDevice => return Ok(()),
        FileType::Directory => "a folder",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        _ => "something else",
    };
    Err(invalid(format!("{name}: source is {found}, neither a file nor a block device")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::io::Write;
    use tempfile::{NamedTempFile, tempdir};

    fn file_of(bytes: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_file_is_read_at_any_place() {
        let bytes: Vec<u8> = (0..10_000_u32).map(|n| n as u8).collect();
        let file = file_of(&bytes);
        let source = Source::open(file.path()).unwrap();
        assert_eq!(source.bytes(), Some(10_000));
        for (offset, len) in [(0, 10_000), (9_999, 1), (5_000, 77), (0, 0), (10_000, 0), (20_000, 0)] {
            let mut out = vec![0; len];
            source.read_at(offset, &mut out).unwrap();
            assert_eq!(out, bytes.get(offset as usize..).unwrap_or_default()[..len]);
        }
        source.verify_unchanged().unwrap();
    }

    #[test]
    fn an_empty_file_has_no_data() {
        let file = file_of(b"");
        let source = Source::open(file.path()).unwrap();
        assert_eq!((source.bytes(), source.next_data(0).unwrap()), (Some(0), None));
        source.verify_unchanged().unwrap();
    }

    #[test]
    fn holes_are_left_out() {
        const MIB: u64 = 1 << 20;
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(16 * MIB).unwrap();
        file.as_file().write_all_at(&[1; 65536], 4 * MIB).unwrap();
        file.as_file().write_all_at(&[2; 65536], 8 * MIB).unwrap();
        let source = Source::open(file.path()).unwrap();

        // A file system may know fewer holes than there are, but no more: walk what it says.
        let mut ranges = Vec::new();
        let mut from = 0;
        while let Some((start, end)) = source.next_data(from).unwrap() {
            assert!(from <= start && start < end && end <= 16 * MIB);
            ranges.push((start, end));
            from = end;
        }
        for written in [4 * MIB, 8 * MIB] {
            assert!(ranges.iter().any(|(start, end)| *start <= written && written + 65536 <= *end), "{ranges:?}");
        }
        if ranges[0].0 > 0 {
            assert_eq!(ranges, [(4 * MIB, 4 * MIB + 65536), (8 * MIB, 8 * MIB + 65536)]);
            assert_eq!(source.next_data(4 * MIB + 10).unwrap(), Some((4 * MIB + 10, 4 * MIB + 65536)));
            assert_eq!(source.next_data(9 * MIB).unwrap(), None);
        }
        for end in [16 * MIB, 16 * MIB + 1, u64::MAX] {
            assert_eq!(source.next_data(end).unwrap(), None);
        }
        // Holes read as zeros.
        let mut out = [9; 100];
        source.read_at(0, &mut out).unwrap();
        assert_eq!(out, [0; 100]);
    }

    #[test]
    fn a_file_of_holes_only_has_no_data() {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 30).unwrap();
        let source = Source::open(file.path()).unwrap();
        assert_eq!(source.bytes(), Some(1 << 30));
        assert!(matches!(source.next_data(0).unwrap(), None | Some((0, 0x4000_0000))));
    }

    #[test]
    fn a_source_that_shrinks_is_refused() {
        let file = file_of(&[7; 10_000]);
        let source = Source::open(file.path()).unwrap();
        file.as_file().set_len(5_000).unwrap();
        source.read_at(0, &mut [0; 5_000]).unwrap();
        let error = source.read_at(4_000, &mut [0; 2_000]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let name = file.path().display();
        let expected = format!("{name}: source shrank while it was read: wanted bytes 4000..6000");
        assert_eq!(error.to_string(), expected);
        assert_eq!(source.read_at(9_000, &mut [0; 1]).unwrap_err().kind(), ErrorKind::Invalid);
        // To look for data does not fail: what is past the new end looks like a hole.
        assert_eq!(source.next_data(6_000).unwrap(), None);

        let error = source.verify_unchanged().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let expected = format!("{name}: source changed size while it was read, bytes=10000 now=5000");
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn a_source_that_grows_is_refused_at_the_end() {
        let file = file_of(&[7; 10_000]);
        let source = Source::open(file.path()).unwrap();
        file.as_file().write_all_at(&[7; 10_000], 10_000).unwrap();
        assert_eq!(source.bytes(), Some(10_000));
        assert_eq!(source.next_data(0).unwrap(), Some((0, 10_000)));
        assert_eq!(source.next_data(10_000).unwrap(), None);
        assert_eq!(source.verify_unchanged().unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn only_files_and_block_devices_are_opened() {
        let folder = tempdir().unwrap();
        let refused = |path: &Path, found: &str| {
            let error = Source::open(path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            let expected = format!("{}: source is {found}, neither a file nor a block device", path.display());
            assert_eq!(error.to_string(), expected);
        };
        refused(folder.path(), "a folder");
        refused(Path::new("/dev/null"), "a character device");

        // Without a writer: to open it must not wait.
        let fifo = folder.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
        refused(&fifo, "a FIFO");
        let link = folder.path().join("link to fifo");
        std::os::unix::fs::symlink(&fifo, &link).unwrap();
        refused(&link, "a FIFO");
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        refused(&socket, "a socket");
    }

    #[test]
    fn a_missing_source_is_named() {
        let folder = tempdir().unwrap();
        let path = folder.path().join("missing.img");
        let error = Source::open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(error.to_string(), format!("{}: No such file or directory (os error 2)", path.display()));
        assert_eq!(Source::open(Path::new("")).unwrap_err().kind(), ErrorKind::NotFound);
        let below = file_of(b"x").path().join("below");
        assert!(matches!(Source::open(&below).unwrap_err().kind(), ErrorKind::NotFolder | ErrorKind::NotFound));
    }

    #[test]
    fn a_link_to_a_file_is_followed() {
        let file = file_of(b"abc");
        let folder = tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(file.path(), &link).unwrap();
        assert_eq!(Source::open(&link).unwrap().bytes(), Some(3));
    }

    /// A stream that gives one byte at a time, with interruptions, and then `end`.
    struct Trickle {
        left: usize,
        calls: usize,
        end: Option<io::ErrorKind>,
    }

    impl Read for Trickle {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.calls += 1;
            if self.calls.is_multiple_of(3) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if self.left == 0 {
                return self.end.map_or(Ok(0), |kind| Err(kind.into()));
            }
            self.left -= 1;
            out[0] = 5;
            Ok(1)
        }
    }

    #[test]
    fn a_stream_is_short_only_at_its_end() {
        let mut source = Source::stream("test", Trickle { left: 250, calls: 0, end: None });
        assert_eq!(source.bytes(), None);
        let mut out = [0; 100];
        let counts: Vec<_> = (0..5).map(|_| source.read_full(&mut out).unwrap()).collect();
        assert_eq!(counts, [100, 100, 50, 0, 0]);
        assert_eq!(out, [5; 100]);
        assert_eq!(source.read_full(&mut []).unwrap(), 0);
        source.verify_unchanged().unwrap();

        let end = Some(io::ErrorKind::ConnectionReset);
        let mut broken = Source::stream("test", Trickle { left: 10, calls: 0, end });
        let error = broken.read_full(&mut out).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert_eq!(error.to_string(), "test: read: connection reset");
    }

    #[test]
    fn files_and_streams_are_not_confused() {
        let stream = Source::stdin();
        assert_eq!(stream.bytes(), None);
        assert_eq!(stream.next_data(0).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(stream.read_at(0, &mut [0]).unwrap_err().kind(), ErrorKind::Invalid);
        let file = file_of(b"abc");
        let mut source = Source::open(file.path()).unwrap();
        assert_eq!(source.read_full(&mut [0]).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn a_source_may_be_shared() {
        fn is_shared<T: Send + Sync>() {}
        is_shared::<Source>();
    }
}
