//! The synchronous batch: many images, of many VMs, on several hosts, deduplicated exactly: within themselves, with each
//! other, and with all that the store has.
//!
//! | stage | what happens |
//! |---|---|
//! | scan | read the sources; levels 0 and 1; fingerprints of what changed go to the owners of their partitions |
//! | detect | partition by partition: who has it, who wants it; verdicts come back |
//! | share | what several VMs want, or another VM has, is written to common packs, once, by its *donor* |
//! | link | the slots of these blocks go to all who want them: the same dataflow once more |
//! | write | each VM's new blocks, recipes, pages, and one record for all its snapshots |
//!
//! Verdicts are hints: they count when a slot table confirms them, and where none does the block is stored. So whatever
//! becomes of a source, a host or a partition's result, no wrong byte is stored, at worst one too many.

pub mod image;
pub mod job_file;
pub mod rounds;
pub mod run;
pub mod task;
