//! Adds blocks to common packs: for the election, for second sighting and for the batch.

use std::sync::Arc;

use crate::catalog::record::PackEntry;
use crate::catalog::vm::pack_key;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Fingerprint;
use crate::ingest::lane::DataLane;
use crate::pack::reader::Packs;
use crate::store::Store;
use crate::store::common::{CommonAdder, PackHome};
use crate::units::{SlotId, VmGroup};

/// Writes common packs of one VM group. Several may at the same time, in any processes. What it took can be read through
/// its `packs` at once, may be referred to once [`CommonWriter::commit`] has returned, and before that only by what is
/// itself committed after it.
pub struct CommonWriter {
    adder: Arc<CommonAdder>,
    data: DataLane,
    // Packs that are durable, but that the log of the common home does not have yet.
    brought: Vec<PackEntry>,
}

impl CommonWriter {
    /// A writer that has written nothing yet. `packs` are those of whoever will refer to the blocks.
    pub fn new(store: &Store, packs: Arc<Packs>, group: VmGroup) -> Self {
        Self::over(CommonAdder::new(store, packs, group))
    }

    /// The same for somebody who adds.
    pub fn over(adder: CommonAdder) -> Self {
        let adder = Arc::new(adder);
        Self { data: DataLane::new(adder.clone()), adder, brought: Vec::new() }
    }

    /// Takes a block; its slot is final. Blocks that follow each other are a run on disk.
    ///
    /// # Errors
    /// `NoSpace`, `Busy`, `Corrupt` (the common home's log is damaged), `Unavailable`.
    pub fn store(&mut self, block: &[u8], print: Fingerprint) -> Result<SlotId> {
        self.data.store(block, print)
    }

    /// Compresses and appends the frames that are full. To be called every few megabytes: until then they are in memory.
    ///
    /// # Errors
    /// `NoSpace`, `Unavailable`.
    pub fn flush_full_frames(&mut self) -> Result<()> {
        self.data.flush_full_frames()
    }

    /// Makes all that was taken durable, and tells the log.
    ///
    /// # Errors
    /// `NoSpace`, `Busy` (whoever writes was held to be dead), `Corrupt`, `Unavailable`. May be called again.
    pub fn commit(&mut self) -> Result<()> {
        self.brought.extend(self.data.finish()?);
        self.adder.bring(&self.brought)?;
        self.brought.clear();
        Ok(())
    }

    /// Bytes of frames so far.
    pub fn bytes_stored(&self) -> u64 {
        self.data.bytes_stored()
    }

    /// Gives up what was not committed: its objects are deleted.
    pub fn abandon(mut self) {
        let mut given_up = std::mem::take(&mut self.brought);
        given_up.extend(self.data.abandon());
        let home = self.adder.home();
        // After an append whose outcome is not known some of them may be in the log: these stay.
        let known = |e: &Error| e.kind() == ErrorKind::NotFound;
        let state = match home.refresh() {
            Err(e) if !known(&e) => return,
            other => other.ok(),
        };
        for pack in given_up {
            if state.as_ref().is_some_and(|state| state.packs.contains_key(&pack.number)) {
                continue;
            }
            let key = pack_key(home.name(), pack.object);
            // What stays is a leak that `gc --exact` finds.
            if let Err(e) = home.backend().delete(&key) {
                log::debug!("{key}: stays: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::Memory;
    use crate::backend::{Backend, Key};
    use crate::catalog::vm::COMMON_HOME;
    use crate::clock::{ManualClock, Timestamp};
    use crate::fingerprint::fingerprint;
    use crate::limits::{BLOCK_BYTES, PACK_SLOTS_MAX};
    use crate::name::VmName;
    use crate::store::session::Session;
    use crate::store::{MemoryShares, config};
    use std::sync::Arc;

    fn open(memory: &Memory) -> Store {
        let clock = Arc::new(ManualClock::at(Timestamp(1)));
        Store::with_backend(Arc::new(memory.clone()), None, clock, MemoryShares::default()).unwrap()
    }

    fn block(byte: u8) -> Vec<u8> {
        vec![byte; BLOCK_BYTES]
    }

    #[test]
    fn several_add_packs_at_the_same_time_and_any_vm_reads_them() {
        let memory = Memory::new();
        config::write_new(&memory, &ManualClock::default()).unwrap();
        let (one, two) = (open(&memory), open(&memory));
        let packs = |store: &Store, name: &str| {
            let vm = store.vm_or_create(&VmName::new(name).unwrap()).unwrap();
            store.packs(&vm)
        };
        let (packs_one, packs_two) = (packs(&one, "a"), packs(&two, "b"));
        let mut first = CommonWriter::new(&one, packs_one.clone(), VmGroup::default());
        let mut second = CommonWriter::new(&two, packs_two.clone(), VmGroup([7; 16]));
        let mut slots = Vec::new();
        for byte in 1..40 {
            let writer = if byte % 2 == 0 { &mut first } else { &mut second };
            slots.push((byte, writer.store(&block(byte), fingerprint(&block(byte))).unwrap()));
        }
        let read = |packs: &Packs, slot: SlotId| {
            let mut out = block(0);
            packs.read_blocks(slot, &mut out).map(|()| out)
        };
        first.flush_full_frames().unwrap();
        assert_eq!(read(&packs_one, slots[1].1).unwrap(), block(2), "its own before the commit");
        assert!(read(&packs_two, slots[1].1).is_err(), "the other's not yet");
        first.commit().unwrap();
        second.commit().unwrap();
        first.commit().unwrap();
        for (byte, slot) in &slots {
            assert!(slot.pack().is_common());
            for packs in [&packs_one, &packs_two] {
                assert_eq!(read(packs, *slot).unwrap(), block(*byte));
                let page = packs.page_of(*slot).unwrap().unwrap();
                assert_eq!(page.fingerprint_of(slot.slot()), Some(fingerprint(&block(*byte))));
            }
        }
        let state = open(&memory).common_home().refresh().unwrap();
        assert_eq!(state.packs.len(), 2);
        assert_eq!(state.popular.group_of(slots[0].1.pack()), VmGroup([7; 16]));
        assert_eq!(state.popular.group_of(slots[1].1.pack()), VmGroup::default());
        assert!(state.session.is_none(), "nobody was fenced");
        assert_eq!(memory.list(&Key::new("common/packs")).unwrap().len(), 2);
    }

    #[test]
    fn what_is_given_up_leaves_nothing_and_a_fence_refuses_what_came_before() {
        let memory = Memory::new();
        config::write_new(&memory, &ManualClock::default()).unwrap();
        let store = open(&memory);
        let vm = store.vm_or_create(&VmName::new("a").unwrap()).unwrap();
        let mut writer = CommonWriter::new(&store, store.packs(&vm), VmGroup::default());
        writer.store(&block(1), fingerprint(&block(1))).unwrap();
        writer.abandon();
        let mut writer = CommonWriter::new(&store, store.packs(&vm), VmGroup::default());
        writer.store(&block(1), fingerprint(&block(1))).unwrap();
        let home = store.common_home().clone();
        assert_eq!(home.name(), COMMON_HOME);
        let session = Session::begin_without_index(&store, &home).unwrap();
        let before = session.begin_record();
        session.append(|_| Ok((vec![crate::catalog::record::Op::Fence { before }], ()))).unwrap();
        assert_eq!(writer.commit().unwrap_err().kind(), ErrorKind::Busy);
        writer.abandon();
        assert_eq!(memory.list(&Key::new("common/packs")).unwrap(), []);
        assert!(home.refresh().unwrap().packs.is_empty());
    }

    #[test]
    fn a_pack_can_be_full_of_slots_before_it_is_full_of_bytes() {
        let memory = Memory::new();
        config::write_new(&memory, &ManualClock::default()).unwrap();
        let store = open(&memory);
        let packs = store.packs(&store.vm_or_create(&VmName::new("a").unwrap()).unwrap());
        let mut writer = CommonWriter::new(&store, packs.clone(), VmGroup::default());
        let block = |number: u32| number.to_le_bytes().repeat(BLOCK_BYTES / 4);
        let mut slots = Vec::new();
        for number in 0..PACK_SLOTS_MAX + 3 {
            slots.push(writer.store(&block(number), fingerprint(&block(number))).unwrap());
            if number % 1024 == 0 {
                writer.flush_full_frames().unwrap();
            }
        }
        writer.commit().unwrap();
        let last = PACK_SLOTS_MAX - 1;
        assert_eq!((slots[0].pack(), slots[last as usize].slot()), (slots[last as usize].pack(), u16::MAX));
        assert_ne!(slots[0].pack(), slots[PACK_SLOTS_MAX as usize].pack());
        for number in [0, 1, last - 8, last - 1, last, last + 1, last + 3] {
            let mut out = vec![0; BLOCK_BYTES];
            packs.read_blocks(slots[number as usize], &mut out).unwrap();
            assert!(out == block(number), "{number}");
        }
    }
}
