//! The write path W1-W9: from written ranges to a committed snapshot.

pub mod background;
pub mod backup;
pub mod budget;
pub mod change_map;
pub mod clone;
pub mod common;
pub mod draft;
pub mod draft_tree;
pub mod lane;
pub mod partition;
pub mod ranges;
pub mod sighted;
pub mod source;
pub mod writer;
