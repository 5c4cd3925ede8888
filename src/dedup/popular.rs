//! Level 3: the popular set, blocks that several VMs hold, in common packs.

use crate::fingerprint::Fingerprint;
use crate::units::SlotId;

/// The popular index: fingerprints held in common packs. Empty until an election has been held.
#[derive(Debug, Default, Clone)]
pub struct PopularIndex {
    entries: Vec<(Fingerprint, SlotId)>,
}

impl PopularIndex {
    /// An index of these entries.
    pub fn new(mut entries: Vec<(Fingerprint, SlotId)>) -> Self {
        entries.sort_unstable_by_key(|e| e.0);
        Self { entries }
    }

    /// The common slot of a block. Believed only because the whole fingerprint is compared.
    pub fn lookup(&self, fingerprint: &Fingerprint) -> Option<SlotId> {
        let at = self.entries.binary_search_by_key(fingerprint, |e| e.0).ok()?;
        self.entries.get(at).map(|e| e.1)
    }
}
