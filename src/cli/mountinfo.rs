//! The kernel's mount table, `/proc/self/mountinfo`: what is mounted where, asked without touching any mount.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

const PATH: &str = "/proc/self/mountinfo";

/// What the table shows as the type of our mounts.
pub const SNAPFS_TYPE: &str = "fuse.snapfs";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Number of the mount.
    pub id: u64,
    /// Number of the mount it lies on.
    pub parent: u64,
    /// Device as `major:minor`.
    pub device: String,
    /// What of the filesystem is mounted: `/`, but for a bind mount of a part of it.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Whether nothing can be changed through this mount, for its own sake or the filesystem's.
    pub read_only: bool,
    /// Type of the filesystem, such as `ext4` or `fuse.snapfs`.
    pub kind: String,
    /// What is mounted: a device, a path, or a word.
    pub source: OsString,
}

/// Reads the table of this process.
///
/// # Errors
/// `Unavailable` without `/proc`.
pub fn read() -> Result<Vec<Row>> {
    Ok(parse(&std::fs::read(PATH).map_err(|e| Error::io(PATH, e))?))
}

/// Takes the table apart. A line that is none is left out: the kernel may add to the format.
pub fn parse(table: &[u8]) -> Vec<Row> {
    table.split(|&b| b == b'\n').filter_map(row).collect()
}

/// The mount that a path shows: the topmost one that is mounted right there.
pub fn top<'a>(rows: &'a [Row], mountpoint: &Path) -> Option<&'a Row> {
    let here = |row: &&Row| row.mountpoint == mountpoint;
    // Order of the lines is not order of mounting in every kernel: the topmost is the one that carries no other.
    let carries = |row: &Row| rows.iter().filter(here).any(|other| other.parent == row.id && other.id != row.id);
    rows.iter().filter(here).rfind(|row| !carries(row))
}

// 36 35 98:0 /root /mountpoint options optional... - type source options
fn row(line: &[u8]) -> Option<Row> {
    let mut words = line.split(|&b| b == b' ');
    let id = number(words.next()?)?;
    let parent = number(words.next()?)?;
    let device = std::str::from_utf8(words.next()?).ok()?.to_owned();
    let root = PathBuf::from(unescaped(words.next()?));
    let mountpoint = PathBuf::from(unescaped(words.next()?));
    let read_only = has_ro(words.next()?);
    let mut words = words.skip_while(|word| *word != b"-").skip(1);
    let kind = String::from_utf8(unescaped(words.next()?).into_vec()).ok()?;
    let source = unescaped(words.next()?);
    let read_only = read_only || has_ro(words.next().unwrap_or_default());
    Some(Row { id, parent, device, root, mountpoint, read_only, kind, source })
}

fn has_ro(options: &[u8]) -> bool {
    options.split(|&b| b == b',').any(|option| option == b"ro")
}

fn number(word: &[u8]) -> Option<u64> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescaped(word: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                out.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                rest = after;
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
36 22 0:45 / /mnt/a\\040b\\134c\\011d rw,nosuid,nodev shared:5 master:1 - fuse.snapfs /srv/my\\040store rw,user_id=0
this is no line of the table
37 22 0:46 / /mnt/x rw - tmpfs tmpfs rw
40 37 0:47 / /mnt/x rw - fuse.snapfs /srv/b rw
41 22 0:48 / /mnt/y\\ rw - fuse none ro
42 22 0:46 /.snapfs/clones /mnt/z ro,nosuid shared:7 - fuse.snapfs /srv/b rw
";

    #[test]
    fn a_table_is_taken_apart() {
        let rows = parse(TABLE);
        assert_eq!(rows.len(), 6);
        let expected = Row {
            id: 36,
            parent: 22,
            device: "0:45".to_owned(),
            root: PathBuf::from("/"),
            mountpoint: PathBuf::from("/mnt/a b\\c\td"),
            read_only: false,
            kind: SNAPFS_TYPE.to_owned(),
            source: OsString::from("/srv/my store"),
        };
        assert_eq!(rows[1], expected);
        assert_eq!(rows[4].mountpoint, Path::new("/mnt/y\\"));
        let read_only: Vec<bool> = rows.iter().map(|row| row.read_only).collect();
        assert_eq!(read_only, [false, false, false, false, true, true]);
        assert_eq!(rows[5].root, Path::new("/.snapfs/clones"));
    }

    #[test]
    fn the_topmost_mount_counts_in_any_order() {
        let mut rows = parse(TABLE);
        assert_eq!(top(&rows, Path::new("/mnt/x")).unwrap().id, 40);
        rows.reverse();
        assert_eq!(top(&rows, Path::new("/mnt/x")).unwrap().id, 40);
        assert!(top(&rows, Path::new("/mnt")).is_none());
    }

    #[test]
    fn names_with_any_byte_are_kept() {
        assert_eq!(unescaped(b"\\377\\000x\\9\\12"), OsString::from_vec(b"\xff\0x\\9\\12".to_vec()));
    }

    #[test]
    fn the_table_of_this_machine_has_a_root() {
        assert!(top(&read().unwrap(), Path::new("/")).is_some());
    }
}
