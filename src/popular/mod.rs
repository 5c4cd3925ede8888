//! The popular set: blocks that several VMs hold, kept once in common packs. The index that finds them, and the pure
//! part of the election that chooses them.

pub mod choice;
pub mod current;
pub mod index;
pub mod promoted;
pub mod sighting;
