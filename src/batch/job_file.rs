//! The job file of a batch: `SNAPSHOT<TAB>SOURCE[<TAB>HOST[<TAB>MAP]]` a line, the same file on every host.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use crate::error::{Error, Result, invalid};
use crate::limits::BATCH_LINES_MAX;
use crate::name::SnapshotName;

/// One image of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobLine {
    /// The new snapshot.
    pub name: SnapshotName,
    /// What to back up: a file or a block device of its host.
    pub source: PathBuf,
    /// The host that has the source.
    pub host: usize,
    /// A change map against the newest snapshot of the disk, on the same host.
    pub map: Option<PathBuf>,
}

/// Reads a job file for so many hosts. VMs of which no line names a host are dealt out in turn.
///
/// # Errors
/// `Invalid`, with the number of the line: no such line, a snapshot twice, a host that is not there, a VM on two hosts,
/// or no line at all.
pub fn parse(text: &[u8], hosts: usize) -> Result<Vec<JobLine>> {
    let text = std::str::from_utf8(text).map_err(|e| invalid("job file: is not UTF-8 text").because(e))?;
    let mut rows = Vec::new();
    let mut names = BTreeSet::new();
    let mut told: BTreeMap<String, usize> = BTreeMap::new();
    for (at, line) in text.strip_suffix('\n').unwrap_or(text).split('\n').enumerate() {
        let number = at + 1;
        let wrong = |what: &str| invalid(format!("job file: line {number}: {what}"));
        if rows.len() >= BATCH_LINES_MAX {
            return Err(wrong(&format!("more than {BATCH_LINES_MAX} images")));
        }
        let fields: Vec<&str> = line.split('\t').collect();
        let (name, source, rest) = match fields.as_slice() {
            [name, source, rest @ ..] if !source.is_empty() && rest.len() <= 2 => (name, source, rest),
            _ => return Err(wrong(&format!("is not SNAPSHOT<TAB>SOURCE[<TAB>HOST[<TAB>MAP]], found={line:?}"))),
        };
        let name = SnapshotName::parse(name).map_err(|e| e.within(format!("job file: line {number}")))?;
        if !names.insert(name.to_string()) {
            return Err(wrong(&format!("{name} is there a second time")));
        }
        let host = match rest.first().filter(|host| !host.is_empty()) {
            Some(host) => Some(host.parse::<usize>().ok().filter(|host| *host < hosts).ok_or_else(|| {
                wrong(&format!("there is no host {host:?}; hosts are numbered from 0, there are {hosts}"))
            })?),
            None => None,
        };
        let vm = name.vm.as_str().to_owned();
        if let Some(host) = host
            && *told.entry(vm.clone()).or_insert(host) != host
        {
            return Err(wrong(&format!(
                "VM {vm:?} is on another host in an earlier line; a VM is written by one host"
            )));
        }
        let map = rest.get(1).filter(|map| !map.is_empty()).map(PathBuf::from);
        rows.push(JobLine { name, source: PathBuf::from(source), host: usize::MAX, map });
    }
    let mut next = 0;
    for row in &mut rows {
        row.host = *told.entry(row.name.vm.as_str().to_owned()).or_insert_with(|| {
            next += 1;
            (next - 1) % hosts.max(1)
        });
    }
    Ok(rows)
}

/// What is wrong with a line that was read.
pub fn in_line(line: &JobLine, e: Error) -> Error {
    e.within(format!("job file: {}", line.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn lines_are_dealt_out_by_vm() {
        let text = b"a/1.img\t/x\nb/d/1.img\t/y y\t\t/map\nc/1.img\t/z\t0\nb/e/1.img\t/w\nd/1.img\t/v\n";
        let rows = parse(text, 2).unwrap();
        let hosts: Vec<_> = rows.iter().map(|row| (row.name.to_string(), row.host)).collect();
        let want = [("a/1.img", 0), ("b/d/1.img", 1), ("c/1.img", 0), ("b/e/1.img", 1), ("d/1.img", 0)];
        assert_eq!(hosts, want.map(|(name, host)| (name.to_owned(), host)));
        assert_eq!(rows[1].source, PathBuf::from("/y y"));
        assert_eq!(rows.iter().filter_map(|row| row.map.clone()).collect::<Vec<_>>(), [PathBuf::from("/map")]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let refused = |text: &str, want: &str| {
            let error = parse(text.as_bytes(), 2).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            assert!(error.to_string().contains(want), "{error}");
        };
        refused("", "line 1: is not SNAPSHOT");
        refused("a/1.img\t/x\ngarbage\n", "line 2: is not SNAPSHOT");
        refused("a/1.img\t/x\n\n", "line 2: is not SNAPSHOT");
        refused("a/1.img\t\n", "line 1: is not SNAPSHOT");
        refused("a/1.img\t/x\t0\t/m\tmore\n", "line 1: is not SNAPSHOT");
        refused("../1.img\t/x\n", "line 1");
        refused("a\t/x\n", "line 1");
        refused("a/1.img\t/x\na/1.img\t/y\n", "line 2: a/1.img is there a second time");
        refused("a/1.img\t/x\t2\n", "there is no host \"2\"");
        refused("a/1.img\t/x\tone\n", "there is no host \"one\"");
        refused("a/1.img\t/x\t0\na/2.img\t/x\t1\n", "line 2: VM \"a\" is on another host");
        assert!(parse(&[0xff, 0xfe], 1).is_err());
    }
}
