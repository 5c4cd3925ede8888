//! Which blocks are held by how many VMs of a group: in several passes, each of which looks at one part of all
//! fingerprints, so that memory stays bounded whatever the size of the store.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::elect::members::Member;
use crate::error::Result;
use crate::fingerprint::Fingerprint;
use crate::popular::choice::Chosen;

/// Bytes that a distinct block takes in memory during its pass, the table's empty places included.
const ENTRY_BYTES: u64 = 112;

/// A block, and who holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// The block.
    pub print: Fingerprint,
    /// VMs that hold it; at least 1.
    pub popularity: u32,
    /// Where it can be had: in a common pack if it is in one, else of the first VM.
    pub donor: Chosen,
}

/// Finds all blocks of a group.
pub trait Candidates {
    /// Shows each distinct block that the members hold once, in any order.
    ///
    /// # Errors
    /// What `visit` returns; `Unavailable`, `NoSpace`.
    fn visit(&self, members: &[Member], visit: &mut dyn FnMut(Candidate) -> Result<()>) -> Result<()>;
}

/// Finds them in this process, in passes over all slot tables.
///
/// Cost: reads the slot tables once for each pass; a pass for each `memory_bytes` of distinct blocks.
#[derive(Debug, Clone, Copy)]
pub struct Passes {
    /// Memory of a pass.
    pub memory_bytes: u64,
}

/// Fingerprints are uniform: their first bytes are their hash.
#[derive(Default)]
struct Prefix(u64);

impl Hasher for Prefix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        // The last ones: the first choose the pass.
        self.0 = bytes.last_chunk::<8>().map_or(0, |tail| u64::from_le_bytes(*tail));
    }
    fn write_usize(&mut self, _: usize) {}
}

#[derive(Clone, Copy)]
struct Entry {
    popularity: u32,
    last: u32,
    donor: Chosen,
}

impl Candidates for Passes {
    fn visit(&self, members: &[Member], visit: &mut dyn FnMut(Candidate) -> Result<()>) -> Result<()> {
        let slots: u64 = members.iter().map(Member::slots).sum();
        let passes = (slots * ENTRY_BYTES).div_ceil(self.memory_bytes.max(ENTRY_BYTES)).max(1);
        for pass in 0..passes {
            let mut entries: HashMap<Fingerprint, Entry, BuildHasherDefault<Prefix>> = HashMap::default();
            for (number, member) in (0..).zip(members) {
                member.visit(&mut |print, slot| {
                    if pass_of(&print, passes) == pass {
                        let donor = Chosen { donor: number, slot };
                        let entry = entries.entry(print).or_insert(Entry { popularity: 1, last: number, donor });
                        if entry.last != number {
                            entry.popularity += 1;
                            entry.last = number;
                        }
                        if slot.pack().is_common() && !entry.donor.slot.pack().is_common() {
                            entry.donor = donor;
                        }
                    }
                    Ok(())
                })?;
            }
            for (print, entry) in entries {
                visit(Candidate { print, popularity: entry.popularity, donor: entry.donor })?;
            }
        }
        Ok(())
    }
}

/// The pass that looks at a fingerprint.
fn pass_of(print: &Fingerprint, passes: u64) -> u64 {
    let head = print.0.first_chunk::<8>().map_or(0, |head| u64::from_be_bytes(*head));
    ((u128::from(head) * u128::from(passes)) >> 64) as u64
}
