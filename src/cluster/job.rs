//! A job and what is finished of it, as objects: `derived/jobs/<job>/job` and one object for each finished partition.
//! The layout is in docs/FORMAT.md. Deleting them loses nothing but work.

use crate::backend::{Backend, Key, Upload};
use crate::error::{Error, ErrorKind, Result, corrupt, invalid};
use crate::fingerprint::{Fingerprint, digest, short};
use crate::format::{ObjectKind, check_preamble, envelop, open_envelope, preamble};
use crate::limits::{JOB_BYTES_MAX, PARTITION_ROWS, PARTITIONS_MAX, RESULT_ROW_BYTES_MAX};
use crate::random::fill_random;
use crate::wire::{Reader, Wire, decode, encode, wire_struct};

/// Bytes of the header of a partition's object.
pub const PARTITION_HEADER_BYTES: usize = 16 + 32 + 4 + 4 + CHECKSUM_BYTES;

const CHECKSUM_BYTES: usize = 16;

/// Bytes of rows in a chunk of a partition's object.
const CHUNK_BYTES: usize = 64 << 10;

const _: () = assert!(PARTITION_HEADER_BYTES == 72, "docs/FORMAT.md: the header of a partition's result");

wire_struct! {
    /// A job: what all its hosts read before they begin.
    pub struct Job {
        /// Which job: a digest of the store and of all that decides about its result.
        pub id: Fingerprint,
        /// Random: whoever knows it can read the store. Hosts prove to each other that they do.
        pub key: Fingerprint,
        /// Ranges of fingerprints.
        pub partitions: u32,
        /// What the job is about, for who made it.
        pub body: Vec<u8>,
    }
}

impl Wire for Fingerprint {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        Ok(Self(reader.array()?))
    }
}

/// The folder of all jobs.
pub fn jobs_key() -> Key {
    Key::new("derived/jobs")
}

fn folder(id: Fingerprint) -> String {
    let hex: String = id.0.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("{}/{hex}", jobs_key())
}

/// Partitions for so many records.
pub fn partitions_for(records: u64) -> u32 {
    u32::try_from(records.div_ceil(PARTITION_ROWS)).unwrap_or(u32::MAX).clamp(1, PARTITIONS_MAX)
}

impl Job {
    /// The identity of a job: a digest of `parts`, of which the first names its kind.
    pub fn id_of(parts: &[&[u8]]) -> Fingerprint {
        let mut all = Vec::new();
        for part in parts {
            all.extend_from_slice(&(part.len() as u64).to_le_bytes());
            all.extend_from_slice(part);
        }
        digest(&all)
    }

    /// The key of a job's description.
    pub fn key_of(id: Fingerprint) -> Key {
        Key::new(format!("{}/job", folder(id)))
    }

    /// The job of this identity, as whoever was first described it: then a host that starts later, or again, works on
    /// the same.
    ///
    /// # Errors
    /// `Corrupt` for a damaged description or one of another job, `NoSpace`, `Unavailable`; those of `describe`.
    pub fn open_or_create(
        backend: &dyn Backend,
        id: Fingerprint,
        describe: impl FnOnce() -> Result<(u32, Vec<u8>)>,
    ) -> Result<Self> {
        let key = Self::key_of(id);
        match Self::open(backend, id) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            opened => return opened,
        }
        let (partitions, body) = describe()?;
        let mut secret = [0; 32];
        fill_random(&mut secret)?;
        let job = Self { id, key: Fingerprint(secret), partitions, body };
        match backend.put_new(&key, &envelop(ObjectKind::Job, &encode(&job))) {
            // Another host was first.
            Err(e) if e.kind() == ErrorKind::Exists => Self::open(backend, id),
            Err(e) => Err(e),
            Ok(()) => Ok(job),
        }
    }

    /// A job that is described.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Unsupported`, `Unavailable`.
    pub fn open(backend: &dyn Backend, id: Fingerprint) -> Result<Self> {
        let key = Self::key_of(id);
        let bytes = backend.read_all(&key, JOB_BYTES_MAX)?;
        let job = Self::from_object(&bytes).map_err(|e| e.within(&key))?;
        if job.id != id {
            return Err(corrupt(format!("{key}: describes another job")));
        }
        Ok(job)
    }

    /// Reads a stored description.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`.
    pub fn from_object(bytes: &[u8]) -> Result<Self> {
        let job: Self = decode(open_envelope(ObjectKind::Job, bytes)?)?;
        if job.partitions == 0 || job.partitions > PARTITIONS_MAX {
            return Err(corrupt(format!("job: over its limits, partitions={}", job.partitions)));
        }
        Ok(job)
    }

    /// The stored description.
    pub fn to_object(&self) -> Vec<u8> {
        envelop(ObjectKind::Job, &encode(self))
    }

    /// The key of a partition's result.
    pub fn partition_key(&self, partition: u32) -> Key {
        Key::new(format!("{}/{partition:05}.partition", folder(self.id)))
    }

    /// Which partitions are finished. Cost: one listing.
    ///
    /// # Errors
    /// `Unavailable`.
    pub fn finished(&self, backend: &dyn Backend) -> Result<Vec<bool>> {
        let mut finished = vec![false; self.partitions as usize];
        for row in backend.list(&Key::new(folder(self.id)))? {
            let number = row.name.strip_suffix(".partition").and_then(|number| number.parse::<usize>().ok());
            if let Some(place) = number.and_then(|number| finished.get_mut(number)) {
                *place = true;
            }
        }
        Ok(finished)
    }

    /// All jobs that are described, but for what cannot be read: leftovers that cost room. Cost: a listing, and a read for
    /// each.
    ///
    /// # Errors
    /// `Unavailable`, `Denied` of the listing.
    pub fn all(backend: &dyn Backend) -> Result<Vec<Self>> {
        let mut jobs = Vec::new();
        for row in backend.list(&jobs_key())?.into_iter().filter(|row| row.is_folder) {
            let key = Key::new(format!("{}/{}/job", jobs_key(), row.name));
            match backend.read_all(&key, JOB_BYTES_MAX).and_then(|bytes| Self::from_object(&bytes)) {
                Ok(job) if Self::key_of(job.id) == key => jobs.push(job),
                Ok(_) => log::debug!("{key}: describes another job"),
                Err(e) => log::debug!("{key}: {e}"),
            }
        }
        Ok(jobs)
    }

    /// Deletes all of a job that is done, the description last. What others deleted already is no error.
    ///
    /// # Errors
    /// `ReadOnly`, `Unavailable`.
    pub fn remove(&self, backend: &dyn Backend) -> Result<()> {
        let folder = folder(self.id);
        for row in backend.list(&Key::new(folder.clone()))?.iter().filter(|row| !row.is_folder && row.name != "job") {
            backend.delete(&Key::new(format!("{folder}/{}", row.name)))?;
        }
        backend.delete(&Self::key_of(self.id))
    }
}

fn header(job: Fingerprint, partition: u32, row_bytes: usize) -> Vec<u8> {
    let mut out = preamble(ObjectKind::Partition).to_vec();
    out.extend_from_slice(&job.0);
    partition.put(&mut out);
    (row_bytes as u32).put(&mut out);
    let checksum = short(b"snapfs partition header", &[&out]);
    out.extend_from_slice(&checksum);
    out
}

fn chunk_checksum(header: &[u8], number: u32, rows: &[u8]) -> [u8; CHECKSUM_BYTES] {
    short(b"snapfs partition chunk", &[header, &number.to_le_bytes(), rows])
}

/// Writes a partition's result, row by row.
pub struct ResultWriter {
    upload: Box<dyn Upload>,
    header: Vec<u8>,
    row_bytes: usize,
    number: u32,
    rows: Vec<u8>,
}

impl ResultWriter {
    /// Begins the result of a partition.
    ///
    /// # Errors
    /// `Invalid` for rows over the limit, `NoSpace`, `ReadOnly`, `Unavailable`.
    pub fn create(backend: &dyn Backend, job: &Job, partition: u32, row_bytes: usize) -> Result<Self> {
        if row_bytes == 0 || row_bytes > RESULT_ROW_BYTES_MAX {
            return Err(invalid(format!("rows of a result have {row_bytes} bytes")));
        }
        let mut upload = backend.create(&job.partition_key(partition))?;
        let header = header(job.id, partition, row_bytes);
        upload.append(&header)?;
        Ok(Self { upload, header, row_bytes, number: 0, rows: Vec::new() })
    }

    /// Adds a row.
    ///
    /// # Errors
    /// `Invalid` for one of another length, `NoSpace`, `Unavailable`.
    pub fn add(&mut self, row: &[u8]) -> Result<()> {
        if row.len() != self.row_bytes {
            return Err(invalid(format!("row of a result has {} bytes, not {}", row.len(), self.row_bytes)));
        }
        self.rows.extend_from_slice(row);
        if self.rows.len() + self.row_bytes > CHUNK_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let rows = std::mem::take(&mut self.rows);
        let checksum = chunk_checksum(&self.header, self.number, &rows);
        self.number += 1;
        self.upload.append(&[&(rows.len() as u32).to_le_bytes()[..], &rows, &checksum].concat())
    }

    /// Makes it durable. One that is there already is as good: the same rows in give the same rows out.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn finish(mut self) -> Result<()> {
        if !self.rows.is_empty() {
            self.flush()?;
        }
        // An empty chunk ends it.
        self.flush()?;
        match self.upload.finish() {
            Err(e) if e.kind() == ErrorKind::Exists => Ok(()),
            finished => finished,
        }
    }
}

/// Reads a partition's result, a chunk at a time, and gives each row to `take`.
///
/// # Errors
/// `NotFound`, `Corrupt`, `Unsupported`, `Unavailable`; those of `take`.
pub fn read_result(
    backend: &dyn Backend,
    job: &Job,
    partition: u32,
    row_bytes: usize,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let key = job.partition_key(partition);
    let bytes = backend.len(&key)?;
    let mut at = 0;
    let mut feed = |out: &mut [u8]| {
        // Before memory is set aside or bytes are asked for that are not there.
        if at + out.len() as u64 > bytes {
            return Err(corrupt(format!("{key}: ends early")));
        }
        backend.read(&key, at, out)?;
        at += out.len() as u64;
        Ok(())
    };
    let damaged = |e: Error| match e.kind() {
        ErrorKind::Corrupt => e.within(&key),
        _ => e,
    };
    decode_result(&mut feed, job.id, partition, row_bytes, take).map_err(damaged)?;
    if at != bytes {
        return Err(corrupt(format!("{key}: {} bytes too many", bytes - at)));
    }
    Ok(())
}

/// Reads a result from whatever fills buffers with its bytes.
///
/// # Errors
/// `Corrupt`, `Unsupported`; those of `feed` and `take`.
pub fn decode_result(
    feed: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    job: Fingerprint,
    partition: u32,
    row_bytes: usize,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut found = [0; PARTITION_HEADER_BYTES];
    feed(&mut found)?;
    let (told, checksum) = found.split_at(PARTITION_HEADER_BYTES - CHECKSUM_BYTES);
    if checksum != short(b"snapfs partition header", &[told]) {
        return Err(corrupt("checksum of the header does not match"));
    }
    check_preamble(&Reader::new(told).array()?, ObjectKind::Partition)?;
    let header = header(job, partition, row_bytes);
    if found[..] != header[..] {
        return Err(corrupt("is of another job, another partition or another kind of job"));
    }
    for number in 0.. {
        let mut length = [0; 4];
        feed(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > CHUNK_BYTES || !length.is_multiple_of(row_bytes) {
            return Err(corrupt(format!("chunk {number} has {length} bytes")));
        }
        let mut rows = vec![0; length];
        feed(&mut rows)?;
        let mut checksum = [0; CHECKSUM_BYTES];
        feed(&mut checksum)?;
        if checksum != chunk_checksum(&header, number, &rows) {
            return Err(corrupt(format!("checksum of chunk {number} does not match")));
        }
        if rows.is_empty() {
            break;
        }
        rows.chunks(row_bytes).try_for_each(&mut *take)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::Memory;

    fn job(partitions: u32) -> (Memory, Job) {
        let memory = Memory::default();
        let id = Job::id_of(&[b"test", b"1"]);
        let job = Job::open_or_create(&memory, id, || Ok((partitions, b"body".to_vec()))).unwrap();
        (memory, job)
    }

    fn rows_of(memory: &Memory, job: &Job, partition: u32) -> Result<Vec<Vec<u8>>> {
        let mut rows = Vec::new();
        read_result(memory, job, partition, 10, &mut |row| {
            rows.push(row.to_vec());
            Ok(())
        })?;
        Ok(rows)
    }

    fn write(memory: &Memory, job: &Job, partition: u32, rows: u32) -> Vec<Vec<u8>> {
        let mut writer = ResultWriter::create(memory, job, partition, 10).unwrap();
        let rows: Vec<Vec<u8>> = (0..rows).map(|n| format!("{n:010}").into_bytes()).collect();
        rows.iter().for_each(|row| writer.add(row).unwrap());
        writer.finish().unwrap();
        rows
    }

    #[test]
    fn the_first_host_describes_the_job_for_all() {
        let (memory, first) = job(3);
        let second = Job::open_or_create(&memory, first.id, || panic!("it is there")).unwrap();
        assert_eq!((&second.body, second.key, second.partitions), (&first.body, first.key, 3));
        assert_eq!(Job::from_object(&first.to_object()).unwrap(), first);
        first.remove(&memory).unwrap();
        assert_eq!(Job::open(&memory, first.id).unwrap_err().kind(), ErrorKind::NotFound);
        let again = Job::open_or_create(&memory, first.id, || Ok((1, Vec::new()))).unwrap();
        assert_ne!(again.key, first.key, "keys are fresh");
        assert_ne!(Job::id_of(&[b"ab", b"c"]), Job::id_of(&[b"a", b"bc"]));
    }

    #[test]
    fn results_come_back_row_by_row() {
        let (memory, job) = job(4);
        let mut finished = vec![false; 4];
        for (partition, rows) in [(0, 0), (2, 1), (3, 20_000)] {
            let want = write(&memory, &job, partition, rows);
            assert_eq!(rows_of(&memory, &job, partition).unwrap(), want);
            // Once more changes nothing.
            write(&memory, &job, partition, rows);
            finished[partition as usize] = true;
            assert_eq!(job.finished(&memory).unwrap(), finished);
        }
        assert_eq!(rows_of(&memory, &job, 1).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(ResultWriter::create(&memory, &job, 1, 10).unwrap().add(b"short").is_err());
        job.remove(&memory).unwrap();
        assert!(memory.list(&Key::new(folder(job.id))).unwrap().is_empty());
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let (memory, job) = job(1);
        write(&memory, &job, 0, 3);
        let bytes = memory.read_all(&job.partition_key(0), 1 << 20).unwrap();
        let read = |bytes: &[u8]| {
            let mut rest = bytes;
            let mut feed = |out: &mut [u8]| {
                let (now, later) = rest.split_at_checked(out.len()).ok_or_else(|| corrupt("ends early"))?;
                out.copy_from_slice(now);
                rest = later;
                Ok(())
            };
            decode_result(&mut feed, job.id, 0, 10, &mut |_| Ok(()))
        };
        read(&bytes).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read(&bad).unwrap_err().kind(), ErrorKind::Corrupt, "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert_eq!(read(&bytes[..length]).unwrap_err().kind(), ErrorKind::Corrupt, "{length} bytes");
        }
    }
}
