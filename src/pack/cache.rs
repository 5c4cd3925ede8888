//! A cache bounded by bytes, shared by threads: least recently used goes first.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lru::LruCache;

/// Shards, so that parallel readers of one image seldom wait for each other.
const SHARDS: usize = 8;

/// A map from `K` to cheaply cloned `V` whose weights together stay under a limit.
#[derive(Debug)]
pub struct Cache<K: Hash + Eq, V> {
    shards: Vec<Mutex<Shard<K, V>>>,
    shard_bytes_max: usize,
}

#[derive(Debug)]
struct Shard<K: Hash + Eq, V> {
    entries: LruCache<K, (V, usize)>,
    bytes: usize,
}

impl<K: Hash + Eq, V: Clone> Cache<K, V> {
    /// A cache of at most `bytes_max` bytes, as the weights given to [`Cache::put`] count them.
    pub fn new(bytes_max: usize) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::new(Shard { entries: LruCache::unbounded(), bytes: 0 })).collect();
        Self { shards, shard_bytes_max: bytes_max / SHARDS }
    }

    fn shard(&self, key: &K) -> Option<MutexGuard<'_, Shard<K, V>>> {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let at = (hasher.finish() % SHARDS as u64) as usize;
        self.shards.get(at).map(|s| s.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The value, made the most recent.
    pub fn get(&self, key: &K) -> Option<V> {
        self.shard(key)?.entries.get(key).map(|(value, _)| value.clone())
    }

    /// Whether the value is there; changes nothing.
    pub fn contains(&self, key: &K) -> bool {
        self.shard(key).is_some_and(|s| s.entries.contains(key))
    }

    /// Keeps a value that takes `bytes`; the oldest go until there is room. One larger than a shard is not kept.
    pub fn put(&self, key: K, value: V, bytes: usize) {
        if bytes > self.shard_bytes_max {
            return;
        }
        let Some(mut shard) = self.shard(&key) else { return };
        if let Some((_, old)) = shard.entries.put(key, (value, bytes)) {
            shard.bytes -= old;
        }
        shard.bytes += bytes;
        while shard.bytes > self.shard_bytes_max {
            match shard.entries.pop_lru() {
                Some((_, (_, old))) => shard.bytes -= old,
                None => break,
            }
        }
    }

    /// Bytes kept now.
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|s| s.lock().unwrap_or_else(PoisonError::into_inner).bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_holds_more_than_its_bytes_and_drops_the_oldest() {
        let cache = Cache::new(SHARDS * 100);
        for key in 0..10_000u32 {
            cache.put(key, key, 10);
            assert!(cache.bytes() <= SHARDS * 100);
        }
        assert_eq!(cache.get(&9_999), Some(9_999));
        assert_eq!(cache.get(&0), None);
        cache.put(1, 1, 101);
        assert!(!cache.contains(&1), "one that is larger than a shard is not kept");
    }
}
