//! Bytes of stored structures: little-endian, fixed width, no padding, lists length-prefixed.
//!
//! A decoder takes any bytes: it never panics, allocates no more than a constant times the input's length, and
//! `decode(bytes) = Ok(x)` implies `encode(x) = bytes`.

use crate::clock::Timestamp;
use crate::error::{Result, corrupt};
use crate::units::{Generation, Incarnation, ObjectId, RecordNumber, Serial, SlotId};

/// Elements of a list take at most this many times the bytes of their stored form, but for short lists.
const EXPANSION_MAX: usize = 16;

/// Reads a structure from bytes, front to back.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A reader of all of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// `Corrupt` when there are fewer.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        match self.rest.split_at_checked(count) {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(head)
            }
            None => Err(corrupt(format!("ends early: wanted {count} bytes, have {}", self.rest.len()))),
        }
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// `Corrupt` when there are fewer.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        match self.rest.split_first_chunk::<N>() {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(*head)
            }
            None => Err(corrupt(format!("ends early: wanted {N} bytes, have {}", self.rest.len()))),
        }
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Asserts that all was read.
    ///
    /// # Errors
    /// `Corrupt` when bytes are left.
    pub fn end(self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(corrupt(format!("{} bytes too many", self.rest.len()))) }
    }
}

/// A structure with a stored form.
pub trait Wire: Sized {
    /// Appends the stored form.
    fn put(&self, out: &mut Vec<u8>);

    /// Reads the stored form.
    ///
    /// # Errors
    /// `Corrupt` when the bytes are no stored form.
    fn take(reader: &mut Reader<'_>) -> Result<Self>;
}

/// The stored form of `value`.
pub fn encode<T: Wire>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    value.put(&mut out);
    out
}

/// Reads one structure that takes all of `bytes`.
///
/// # Errors
/// `Corrupt`.
pub fn decode<T: Wire>(bytes: &[u8]) -> Result<T> {
    let mut reader = Reader::new(bytes);
    let value = T::take(&mut reader)?;
    reader.end()?;
    Ok(value)
}

macro_rules! wire_number {
    ($($t:ty),*) => {$(
        impl Wire for $t {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn take(reader: &mut Reader<'_>) -> Result<Self> {
                Ok(<$t>::from_le_bytes(reader.array()?))
            }
        }
    )*};
}
wire_number!(u8, u16, u32, u64, u128);

macro_rules! wire_newtype {
    ($($t:ident($inner:ty)),*) => {$(
        impl Wire for $t {
            fn put(&self, out: &mut Vec<u8>) {
                self.0.put(out);
            }
            fn take(reader: &mut Reader<'_>) -> Result<Self> {
                Ok(Self(<$inner>::take(reader)?))
            }
        }
    )*};
}
wire_newtype!(Timestamp(u64), RecordNumber(u32), Generation(u32));

impl Wire for Serial {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        let serial = Self(u64::take(reader)?);
        if serial.is_valid() { Ok(serial) } else { Err(corrupt(format!("serial over 48 bits, serial={serial}"))) }
    }
}

impl Wire for SlotId {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        Ok(Self(u64::take(reader)?))
    }
}

impl Wire for Incarnation {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        Ok(Self(reader.array()?))
    }
}

impl Wire for ObjectId {
    fn put(&self, out: &mut Vec<u8>) {
        self.number.put(out);
        self.generation.put(out);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        Ok(Self { number: Wire::take(reader)?, generation: Wire::take(reader)? })
    }
}

impl Wire for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self) + 1);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        match u8::take(reader)? {
            1 => Ok(false),
            2 => Ok(true),
            other => Err(corrupt(format!("flag is neither 1 nor 2, value={other}"))),
        }
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        Ok(if bool::take(reader)? { Some(T::take(reader)?) } else { None })
    }
}

impl Wire for String {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        out.extend_from_slice(self.as_bytes());
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        let count = u32::take(reader)? as usize;
        let bytes = reader.bytes(count)?.to_vec();
        Self::from_utf8(bytes).map_err(|e| corrupt("text is not UTF-8").because(e))
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        for value in self {
            value.put(out);
        }
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        let count = u32::take(reader)? as usize;
        // Every element takes a byte at least, so the input's own length bounds what is set aside.
        let fits = count <= reader.remaining()
            && count.saturating_mul(size_of::<T>()) <= reader.remaining().saturating_mul(EXPANSION_MAX) + 4096;
        if !fits {
            return Err(corrupt(format!("list of {count} in {} bytes", reader.remaining())));
        }
        let mut values = Self::new();
        for _ in 0..count {
            values.push(T::take(reader)?);
        }
        Ok(values)
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        Ok((A::take(reader)?, B::take(reader)?))
    }
}

impl Wire for [u8; 16] {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        reader.array()
    }
}

/// Declares a structure together with its stored form: the fields in their order.
macro_rules! wire_struct {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
        }
        impl $crate::wire::Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $($crate::wire::Wire::put(&self.$field, out);)*
            }
            fn take(reader: &mut $crate::wire::Reader<'_>) -> $crate::error::Result<Self> {
                Ok(Self { $($field: $crate::wire::Wire::take(reader)?,)* })
            }
        }
    };
}

/// Declares an enumeration together with its stored form: one tag byte (0 is reserved), then the fields.
macro_rules! wire_enum {
    ($(#[$meta:meta])* pub enum $name:ident {
        $($(#[$variant_meta:meta])* $tag:literal => $variant:ident {
            $($(#[$field_meta:meta])* $field:ident: $type:ty),* $(,)?
        }),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[expect(missing_docs, reason = "the variant's doc speaks of its fields")]
        pub enum $name {
            $($(#[$variant_meta])* $variant { $($(#[$field_meta])* $field: $type,)* },)*
        }
        impl $crate::wire::Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$variant { $($field),* } => {
                        out.push($tag);
                        $($crate::wire::Wire::put($field, out);)*
                    })*
                }
            }
            fn take(reader: &mut $crate::wire::Reader<'_>) -> $crate::error::Result<Self> {
                match <u8 as $crate::wire::Wire>::take(reader)? {
                    $($tag => Ok(Self::$variant { $($field: $crate::wire::Wire::take(reader)?,)* }),)*
                    other => Err($crate::error::corrupt(format!(
                        concat!(stringify!($name), ": unknown tag, value={}"), other))),
                }
            }
        }
    };
}

pub(crate) use {wire_enum, wire_struct};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back() {
        let value: Vec<(Option<u32>, String)> = vec![(None, "a".into()), (Some(7), "\u{e9}".into())];
        assert_eq!(decode::<Vec<(Option<u32>, String)>>(&encode(&value)).unwrap(), value);
    }

    #[test]
    fn what_is_not_canonical_is_refused() {
        assert!(decode::<bool>(&[0]).is_err());
        assert!(decode::<bool>(&[1, 1]).is_err());
        assert!(decode::<String>(&[1, 0, 0, 0, 0xff]).is_err());
        assert!(decode::<Vec<u8>>(&[0xff, 0xff, 0xff, 0xff, 1]).is_err());
        assert!(decode::<Serial>(&[0, 0, 0, 0, 0, 0, 1, 0]).is_err());
    }
}
