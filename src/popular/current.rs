//! The popular index that this process has in memory: loaded when it is first wanted, shared by all writers, replaced
//! when a newer epoch appears.

use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::Backend;
use crate::popular::index::{IndexIdentity, PopularIndex};

/// Holds the index of one epoch. Writers that have an older one keep theirs until they end.
#[derive(Debug, Default)]
pub struct CurrentIndex {
    /// What was loaded last, `None` where that failed: a damaged index is not read again and again.
    loaded: Mutex<Option<(IndexIdentity, Option<Arc<PopularIndex>>)>>,
}

impl CurrentIndex {
    /// The index of an epoch, of which at most about `memory_bytes_max` stay in memory. One that is damaged, missing
    /// or unreadable is one warning and `None`: writers then go without level 3, and lose nothing else.
    ///
    /// Cost: reads the object when the epoch is another than the last; other callers wait for it.
    pub fn get(
        &self,
        backend: &dyn Backend,
        identity: IndexIdentity,
        memory_bytes_max: usize,
    ) -> Option<Arc<PopularIndex>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, index)) = loaded.as_ref().filter(|(known, _)| *known == identity) {
            log::trace!("popular index of epoch {} is in memory", known.epoch.0);
            return index.clone();
        }
        // The old one goes first where nobody has it any more: two at a time are the exception.
        *loaded = None;
        let index = match PopularIndex::read(backend, identity, memory_bytes_max) {
            Ok(index) => Some(Arc::new(index)),
            Err(e) => {
                log::warn!("blocks of other VMs are not found: {e}; run snapfs check");
                None
            }
        };
        if let Some(index) = index.as_ref().filter(|index| index.sampling() > 1) {
            log::info!("popular index: one of {} entries fits into memory", index.sampling());
        }
        *loaded = Some((identity, index.clone()));
        index
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::Memory;
    use crate::fingerprint::fingerprint;
    use crate::popular::index::{IndexBuilder, index_key};
    use crate::units::{Epoch, Incarnation, Serial, SlotId, VmGroup};

    #[test]
    fn it_is_loaded_once_and_replaced_by_a_newer_epoch() {
        let memory = Memory::default();
        let identity = |epoch| IndexIdentity { incarnation: Incarnation([1; 16]), epoch: Epoch(epoch) };
        for epoch in [1, 2] {
            let mut builder = IndexBuilder::default();
            let slot = SlotId::new(Serial((1 << 47) | epoch), 5);
            builder.add(VmGroup::default(), &fingerprint(b"a"), slot).unwrap();
            builder.write(&memory, identity(epoch)).unwrap();
        }
        let current = CurrentIndex::default();
        let first = current.get(&memory, identity(1), usize::MAX).unwrap();
        memory.delete(&index_key(Epoch(1))).unwrap();
        assert!(Arc::ptr_eq(&first, &current.get(&memory, identity(1), usize::MAX).unwrap()));
        let second = current.get(&memory, identity(2), usize::MAX).unwrap();
        assert_eq!(second.identity().epoch, Epoch(2));
        assert!(current.get(&memory, identity(1), usize::MAX).is_none(), "its object is gone");
        assert_eq!(first.candidates(VmGroup::default(), &fingerprint(b"a")).count(), 1, "who has it goes on");
    }
}
