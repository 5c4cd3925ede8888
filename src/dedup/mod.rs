//! Deciding where the blocks of a segment come from. Pure: bytes and hints in, a plan out; no I/O, no clock.

pub mod ladder;
