//! Bytes of chance, for names and secrets that nobody else has.

use crate::error::{Error, Result};

/// Fills `out` with random bytes of the kernel.
///
/// # Errors
/// `Unavailable`.
pub fn fill_random(out: &mut [u8]) -> Result<()> {
    let mut rest = out;
    while !rest.is_empty() {
        match rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::io("random bytes", e.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::fill_random;

    #[test]
    fn all_of_it_is_filled() {
        // The kernel gives at most 256 bytes without a break.
        let (mut one, mut two) = (vec![0; 5000], vec![0; 5000]);
        fill_random(&mut one).unwrap();
        fill_random(&mut two).unwrap();
        for (one, two) in one.chunks(16).zip(two.chunks(16)) {
            assert!(one.len() < 16 || (one != [0; 16] && one != two));
        }
        fill_random(&mut []).unwrap();
    }
}
