//! A wrapper that holds reading and writing to a rate, for work that others should not notice.
//!
//! A bucket of tokens, told as time: each byte moves the moment from which on the next may pass. Who comes before that
//! moment waits. After a pause as much as a fixed burst brings may pass at once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::replicate::Replicated;
use crate::backend::{Backend, Guard, Key, Listed, Upload};
use crate::clock::Clock;
use crate::error::Result;

/// How much time's bytes may pass at once after a pause: long against a request, short against what people notice.
const BURST: Duration = Duration::from_millis(250);

/// Another backend at a limited rate. Bytes are those of objects' contents, read and written alike; listings, lengths
/// and deletions pass.
#[derive(Debug)]
pub struct Limited {
    inner: Arc<dyn Backend>,
    bucket: Arc<Bucket>,
}

struct Bucket {
    clock: Arc<dyn Clock>,
    bytes_per_second: u64,
    /// When all that has passed so far is paid for.
    paid_at: Mutex<Duration>,
}

impl Limited {
    /// Limits `inner` to so many bytes a second, at least one.
    pub fn new(inner: Arc<dyn Backend>, clock: Arc<dyn Clock>, bytes_per_second: u64) -> Self {
        let paid_at = Mutex::new(clock.elapsed());
        Self { inner, bucket: Arc::new(Bucket { clock, bytes_per_second: bytes_per_second.max(1), paid_at }) }
    }
}

impl Bucket {
    fn paid_at(&self) -> MutexGuard<'_, Duration> {
        self.paid_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so many bytes may pass. One that is larger than a burst passes as a whole, and is paid for by those
    /// after it.
    fn pass(&self, bytes: usize) {
        let price = Duration::try_from_secs_f64(bytes as f64 / self.bytes_per_second as f64).unwrap_or(Duration::MAX);
        let wait = {
            let mut paid_at = self.paid_at();
            let now = self.clock.elapsed();
            let from = (*paid_at).max(now.saturating_sub(BURST));
            *paid_at = from.saturating_add(price);
            from.saturating_sub(now)
        };
        if !wait.is_zero() {
            self.clock.sleep(wait);
        }
    }
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} bytes a second", self.bytes_per_second)
    }
}

impl Backend for Limited {
    fn create(&self, key: &Key) -> Result<Box<dyn Upload>> {
        Ok(Box::new(LimitedUpload { inner: self.inner.create(key)?, bucket: Arc::clone(&self.bucket) }))
    }

    fn put_new(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        self.bucket.pass(bytes.len());
        self.inner.put_new(key, bytes)
    }

    fn read(&self, key: &Key, offset: u64, out: &mut [u8]) -> Result<()> {
        self.bucket.pass(out.len());
        self.inner.read(key, offset, out)
    }

    fn read_all(&self, key: &Key, bytes_max: u64) -> Result<Vec<u8>> {
        let bytes = self.inner.read_all(key, bytes_max)?;
        self.bucket.pass(bytes.len());
        Ok(bytes)
    }

    fn read_checked(
        &self,
        key: &Key,
        offset: u64,
        out: &mut [u8],
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.bucket.pass(out.len());
        self.inner.read_checked(key, offset, out, verify)
    }

    fn read_all_checked(
        &self,
        key: &Key,
        bytes_max: u64,
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let bytes = self.inner.read_all_checked(key, bytes_max, verify)?;
        self.bucket.pass(bytes.len());
        Ok(bytes)
    }

    fn create_over(&self, key: &Key) -> Result<Box<dyn Upload>> {
        Ok(Box::new(LimitedUpload { inner: self.inner.create_over(key)?, bucket: Arc::clone(&self.bucket) }))
    }

    fn settle(&self, key: &Key, verify: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.inner.settle(key, verify)
    }

    fn replicated(&self) -> Option<&Replicated> {
        self.inner.replicated()
    }

    fn len(&self, key: &Key) -> Result<u64> {
        self.inner.len(key)
    }

    fn ages(&self, keys: &[Key]) -> Result<Vec<Option<Duration>>> {
        self.inner.ages(keys)
    }

    fn list(&self, prefix: &Key) -> Result<Vec<Listed>> {
        self.inner.list(prefix)
    }

    fn delete(&self, key: &Key) -> Result<()> {
        self.inner.delete(key)
    }

    fn will_need(&self, key: &Key, offset: u64, bytes: u64) {
        self.inner.will_need(key, offset, bytes);
    }

    fn pin(&self, key: &Key) -> Result<Box<dyn Guard>> {
        self.inner.pin(key)
    }

    fn is_pinned(&self, key: &Key) -> Result<bool> {
        self.inner.is_pinned(key)
    }

    fn try_lock(&self, key: &Key) -> Result<Option<Box<dyn Guard>>> {
        self.inner.try_lock(key)
    }

    fn release_reserve(&self) -> bool {
        self.inner.release_reserve()
    }

    fn keep_reserve(&self) {
        self.inner.keep_reserve();
    }

    fn remove_litter(&self) -> Result<u64> {
        self.inner.remove_litter()
    }

    fn tidy(&self) {
        self.inner.tidy();
    }

    fn space(&self) -> Option<(u64, u64)> {
        self.inner.space()
    }
}

struct LimitedUpload {
    inner: Box<dyn Upload>,
    bucket: Arc<Bucket>,
}

impl Upload for LimitedUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.bucket.pass(bytes.len());
        self.inner.append(bytes)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.inner.read(offset, out)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.inner.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::Memory;
    use crate::clock::{ManualClock, Timestamp};

    const MIB: usize = 1 << 20;

    fn limited(bytes_per_second: u64) -> (Arc<ManualClock>, Limited) {
        let clock = Arc::new(ManualClock::at(Timestamp(1_000_000_000_000)));
        (clock.clone(), Limited::new(Arc::new(Memory::new()), clock, bytes_per_second))
    }

    fn seconds(clock: &ManualClock) -> f64 {
        (clock.elapsed() - Duration::from_secs(1000)).as_secs_f64()
    }

    #[test]
    fn what_is_read_and_written_takes_its_time() {
        let (clock, limited) = limited(MIB as u64);
        let key = Key::new("object");
        let mut upload = limited.create(&key).unwrap();
        for _ in 0..8 {
            upload.append(&vec![1; MIB / 2]).unwrap();
        }
        upload.finish().unwrap();
        limited.put_new(&Key::new("small"), &vec![2; MIB]).unwrap();
        limited.read(&key, 0, &mut vec![0; 2 * MIB]).unwrap();
        assert_eq!(limited.read_all(&key, 1 << 30).unwrap().len(), 4 * MIB);
        // What passed last is paid for by the next.
        limited.read(&key, 0, &mut [0]).unwrap();
        let took = seconds(&clock);
        assert!((10.7..=11.1).contains(&took), "11 MiB at 1 MiB a second took {took} s");
        // The rest costs nothing.
        limited.len(&key).unwrap();
        limited.list(&Key::new("")).unwrap();
        limited.delete(&key).unwrap();
        assert!(seconds(&clock) - took < 0.001);
    }

    #[test]
    fn a_pause_is_worth_a_quarter_of_a_second_and_no_more() {
        let (clock, limited) = limited(1000);
        let put = |name: &str, bytes: usize| limited.put_new(&Key::new(name), &vec![0; bytes]).unwrap();
        clock.advance(Duration::from_secs(3600));
        let begin = seconds(&clock);
        for number in 0..10 {
            put(&number.to_string(), 100);
        }
        let took = seconds(&clock) - begin;
        assert!((0.6..=0.76).contains(&took), "1000 bytes at 1000 a second took {took} s after a pause");
    }
}
