//! The read path R1-R5: (snapshot, range) to bytes. Never imports the write path or deduplication.

pub mod reader;
pub mod restore;
pub mod tree;
