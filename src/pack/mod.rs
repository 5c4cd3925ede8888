//! Packs: objects of up to 64 MiB of frames, with an index for reading and a slot table for deduplication.
//!
//! Layout (docs/FORMAT.md): header, frames, slot table, index, trailer. One read of the end of the object, whose
//! length the log knows, gives all that reading needs; the slot table is read only by deduplication and `check`.

pub mod cache;
pub mod copies;
pub mod frame;
pub mod index;
pub mod mend;
pub mod reader;
pub mod writer;

/// What the slots of a pack hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Content {
    /// Blocks of 4 KiB.
    Data = 1,
    /// Recipes and group pages.
    Recipes = 2,
}

impl Content {
    /// From its stored number.
    ///
    /// # Errors
    /// `Corrupt` for any other.
    pub fn from_stored(value: u8) -> crate::error::Result<Self> {
        match value {
            1 => Ok(Self::Data),
            2 => Ok(Self::Recipes),
            other => Err(crate::error::corrupt(format!("pack: unknown content, value={other}"))),
        }
    }
}

impl crate::wire::Wire for Content {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(*self as u8);
    }
    fn take(reader: &mut crate::wire::Reader<'_>) -> crate::error::Result<Self> {
        Self::from_stored(crate::wire::Wire::take(reader)?)
    }
}
