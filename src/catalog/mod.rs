//! What exists: the log of a VM and the state that it tells.

pub mod hold;
pub mod record;
pub mod roots;
pub mod state;
pub mod vm;
