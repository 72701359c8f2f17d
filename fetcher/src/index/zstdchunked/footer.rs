//! The last bytes of a zstd:chunked blob: numbers in a skippable frame that say where the
//! TOC is. All little endian.
//!
//! ```text
//! containers/storage (64)  toc offset u64 | len u64 | decoded len u64 | type u64
//!                          | tar-split offset u64 | len u64 | decoded len u64 | "GNUlInUx"
//! stargz (40)              toc offset u64 | len u64 | decoded len u64 | type u64 | "GnUlInUx"
//! ```
//!
//! Invariant: the TOC of what [`read_footer`] returns ends before the footer begins.

use super::{Numbers, Position};
use crate::Result;

/// Bytes of the longest footer.
pub const FOOTER_LEN_MAX: u64 = 64;

const STORAGE_LEN: usize = 64;
const STORAGE_MAGIC: &[u8] = b"GNUlInUx";
const STARGZ_LEN: usize = 40;
const STARGZ_MAGIC: &[u8] = b"GnUlInUx";

/// Finds a footer of either tool at the end of `tail`, the last bytes of a blob of
/// `blob_size` bytes. `None` where there is none.
pub fn read_footer(tail: &[u8], blob_size: u64) -> Result<Option<Position>> {
    let len = if tail.ends_with(STORAGE_MAGIC) {
        STORAGE_LEN
    } else if tail.ends_with(STARGZ_MAGIC) {
        STARGZ_LEN
    } else {
        return Ok(None);
    };
    let numbers = tail
        .len()
        .checked_sub(len)
        .and_then(|at| tail.get(at..))
        .and_then(numbers);
    let (Some(numbers), Some(end)) = (numbers, blob_size.checked_sub(len as u64)) else {
        return Ok(None);
    };
    Position::new("zstd:chunked footer", numbers, end).map(Some)
}

fn numbers(mut bytes: &[u8]) -> Option<Numbers> {
    let mut next = || {
        let (number, rest) = bytes.split_first_chunk()?;
        bytes = rest;
        Some(u64::from_le_bytes(*number))
    };
    Some(Numbers {
        offset: next()?,
        len: next()?,
        json_len: next()?,
        toc_type: next()?,
    })
}
