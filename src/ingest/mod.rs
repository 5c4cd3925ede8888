//! The write path W1-W9: from written ranges to a committed snapshot.


pub mod change_map;


pub mod lane;
pub mod partition;

pub mod source;

