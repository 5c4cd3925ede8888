//! Rows on disk by partition, and in the order of their fingerprints again, in bounded memory.
//!
//! One file without a name holds the pages of all partitions of a worker: each partition fills a page in memory, and
//! has a list of those that were written.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result, invalid};
use crate::limits::{SPILL_PAGE_BYTES_MAX, SPILL_PAGE_BYTES_MIN};

/// Rows of `N` bytes, by partition.
pub struct Spill<const N: usize> {
    file: File,
    page_bytes: usize,
    end: u64,
    partitions: Vec<Partition>,
}

#[derive(Default)]
struct Partition {
    // Where its full pages are.
    pages: Vec<u64>,
    filling: Vec<u8>,
}

fn failed(e: std::io::Error) -> Error {
    Error::io("spill file", e)
}

impl<const N: usize> Spill<N> {
    /// A spill for so many partitions, with a file in `folder`, whose pages take at most about `memory_bytes`.
    ///
    /// # Errors
    /// `NoSpace`, `Denied`, `Unavailable`.
    pub fn new(folder: &Path, partitions: usize, memory_bytes: usize) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).map_err(|e| Error::io(folder.display().to_string(), e))?;
        let page = (memory_bytes / partitions.max(1)).clamp(SPILL_PAGE_BYTES_MIN, SPILL_PAGE_BYTES_MAX);
        let page_bytes = page / N * N;
        Ok(Self { file, page_bytes, end: 0, partitions: (0..partitions).map(|_| Partition::default()).collect() })
    }

    /// Adds a row.
    ///
    /// # Errors
    /// `Invalid` for a partition that is not there, `NoSpace`, `Unavailable`.
    pub fn add(&mut self, partition: usize, row: &[u8]) -> Result<()> {
        let this = self.partitions.get_mut(partition);
        let this =
            this.ok_or_else(|| invalid(format!("row of a partition of another worker, partition={partition}")))?;
        this.filling.extend_from_slice(row);
        if this.filling.len() >= self.page_bytes {
            self.file.write_all_at(&this.filling, self.end).map_err(failed)?;
            this.pages.push(self.end);
            self.end += this.filling.len() as u64;
            this.filling.clear();
        }
        Ok(())
    }

    /// Bytes written to disk.
    pub fn disk_bytes(&self) -> u64 {
        self.end
    }

    /// Takes a partition's rows out, in order; `memory_bytes` are sorted at a time, the rest goes through `folder`.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn sorted(&mut self, partition: usize, memory_bytes: usize, folder: &Path) -> Result<Sorted<N>> {
        let taken = self.partitions.get_mut(partition).map(std::mem::take).unwrap_or_default();
        let rows_max = (memory_bytes / N).max(1024);
        let rows = taken.pages.len() * (self.page_bytes / N) + taken.filling.len() / N;
        let mut sorter = Sorter { rows: Vec::with_capacity(rows.min(rows_max)), runs: None, rows_max, folder };
        let mut page = vec![0; self.page_bytes];
        for at in taken.pages {
            self.file.read_exact_at(&mut page, at).map_err(failed)?;
            sorter.add(&page)?;
        }
        sorter.add(&taken.filling)?;
        sorter.finish(memory_bytes)
    }
}

struct Sorter<'a, const N: usize> {
    rows: Vec<[u8; N]>,
    runs: Option<(File, Vec<(u64, u64)>)>,
    rows_max: usize,
    folder: &'a Path,
}

impl<const N: usize> Sorter<'_, N> {
    fn add(&mut self, bytes: &[u8]) -> Result<()> {
        for row in bytes.as_chunks::<N>().0 {
            if self.rows.len() >= self.rows_max {
                self.write_run()?;
            }
            self.rows.push(*row);
        }
        Ok(())
    }

    fn write_run(&mut self) -> Result<()> {
        self.rows.sort_unstable();
        let (file, runs) = match &mut self.runs {
            Some(runs) => runs,
            None => self.runs.insert((tempfile::tempfile_in(self.folder).map_err(failed)?, Vec::new())),
        };
        let start = runs.last().map_or(0, |(_, end)| *end);
        let bytes = self.rows.as_flattened();
        file.write_all_at(bytes, start).map_err(failed)?;
        runs.push((start, start + bytes.len() as u64));
        self.rows.clear();
        Ok(())
    }

    fn finish(mut self, memory_bytes: usize) -> Result<Sorted<N>> {
        if self.runs.is_none() {
            self.rows.sort_unstable();
            return Ok(Sorted { memory: self.rows.into_iter(), merge: None });
        }
        self.write_run()?;
        let Some((file, runs)) = self.runs else { return Ok(Sorted { memory: Vec::new().into_iter(), merge: None }) };
        self.rows = Vec::new();
        let buffer_rows = (memory_bytes / N / runs.len().max(1)).clamp(64, 4096);
        let mut merge = Merge { file, runs: Vec::new(), heap: BinaryHeap::new(), buffer_rows };
        for (at, (start, end)) in runs.into_iter().enumerate() {
            merge.runs.push(Run { at: start, end, buffer: Vec::new(), next: 0 });
            merge.push_next(at)?;
        }
        Ok(Sorted { memory: Vec::new().into_iter(), merge: Some(merge) })
    }
}

/// Rows in order.
pub struct Sorted<const N: usize> {
    memory: std::vec::IntoIter<[u8; N]>,
    merge: Option<Merge<N>>,
}

struct Merge<const N: usize> {
    file: File,
    runs: Vec<Run<N>>,
    heap: BinaryHeap<Reverse<([u8; N], usize)>>,
    buffer_rows: usize,
}

struct Run<const N: usize> {
    at: u64,
    end: u64,
    buffer: Vec<[u8; N]>,
    next: usize,
}

impl<const N: usize> Merge<N> {
    fn push_next(&mut self, at: usize) -> Result<()> {
        let Some(run) = self.runs.get_mut(at) else { return Ok(()) };
        if run.next >= run.buffer.len() {
            let rows = ((run.end - run.at) / N as u64).min(self.buffer_rows as u64) as usize;
            run.buffer.resize(rows, [0; N]);
            self.file.read_exact_at(run.buffer.as_flattened_mut(), run.at).map_err(failed)?;
            run.at += (rows * N) as u64;
            run.next = 0;
        }
        if let Some(row) = run.buffer.get(run.next) {
            self.heap.push(Reverse((*row, at)));
            run.next += 1;
        }
        Ok(())
    }
}

impl<const N: usize> Sorted<N> {
    /// The next row.
    ///
    /// # Errors
    /// `Unavailable`.
    pub fn read_next(&mut self) -> Result<Option<[u8; N]>> {
        let Some(merge) = &mut self.merge else { return Ok(self.memory.next()) };
        let Some(Reverse((row, at))) = merge.heap.pop() else { return Ok(None) };
        merge.push_next(at)?;
        Ok(Some(row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::record::{Member, ROW_BYTES, Record, partition_of};
    use crate::fingerprint::fingerprint;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_row_comes_back_in_order(rows in 0_usize..9000, partitions in 1_u32..9, memory in 0_usize..200_000) {
            let folder = tempfile::tempdir().unwrap();
            let mut spill = Spill::new(folder.path(), partitions as usize, memory).unwrap();
            let mut want = vec![Vec::new(); partitions as usize];
            for n in 0..rows {
                // Some fingerprints come often.
                let print = fingerprint(&((n * n) % 97).to_le_bytes());
                let row = Record { print, member: Member(n as u32 % 5), place: n as u64 }.to_row();
                let partition = partition_of(&row, partitions) as usize;
                spill.add(partition, &row).unwrap();
                want[partition].push(row);
            }
            for (partition, mut want) in want.into_iter().enumerate() {
                want.sort_unstable();
                let mut sorted = spill.sorted(partition, memory, folder.path()).unwrap();
                let mut found = Vec::new();
                while let Some(row) = sorted.read_next().unwrap() {
                    found.push(row);
                }
                prop_assert_eq!(found, want);
            }
            prop_assert!(spill.add(partitions as usize, &[0; ROW_BYTES]).is_err());
        }
    }
}
