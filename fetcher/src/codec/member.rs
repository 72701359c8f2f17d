//! Pieces of a decoded gzip member, front to back.
//!
//! Invariant: the member is inflated once however many pieces are taken, and what is held
//! is at most the last piece and the one being made. Pieces may overlap, for a layer's
//! table may say so; each byte of a piece then costs one copy, never another inflation.
#![warn(clippy::indexing_slicing)]

use bytes::Bytes;

use super::gzip::{EXPANSION_MAX, Inflater, fill_decoded, malformed, skip_decoded};
use crate::Result;

/// Decodes the members in `encoded` forward. After an error no further piece is right.
pub struct MemberDecoder<'a> {
    inflater: Inflater,
    input: &'a [u8],
    /// Decoded bytes so far.
    at: u64,
    /// The last piece from its start on; ends at `at`.
    tail: Bytes,
    /// What the input can expand to at most.
    possible: u64,
}

impl<'a> MemberDecoder<'a> {
    /// A decoder at the start of `encoded`.
    pub fn new(encoded: &'a [u8]) -> Self {
        Self {
            inflater: Inflater::new(),
            input: encoded,
            at: 0,
            tail: Bytes::new(),
            possible: (encoded.len() as u64).saturating_mul(EXPANSION_MAX),
        }
    }

    /// The `len` decoded bytes after the first `skip`. Calls must come in ascending order
    /// of `skip`. Never allocates more than `len` bytes plus about 120 KiB.
    pub fn take(&mut self, skip: u64, len: u32) -> Result<Bytes> {
        let end = skip.saturating_add(u64::from(len));
        if end > self.possible {
            let input = self.possible / EXPANSION_MAX;
            return Err(malformed(format!(
                "{input} bytes cannot hold {end} decoded bytes"
            )));
        }
        let wanted = usize::try_from(len).unwrap_or(usize::MAX);
        let kept = self.keep_from(skip)?;
        if kept.len() >= wanted {
            self.tail = kept;
            return Ok(self.tail.slice(..wanted));
        }
        if skip > self.at {
            skip_decoded(&mut self.inflater, &mut self.input, skip - self.at)?;
        }
        let mut out = Vec::with_capacity(wanted);
        out.extend_from_slice(&kept);
        out.resize(wanted, 0);
        let fresh = out.get_mut(kept.len()..).unwrap_or_default();
        let before = end - fresh.len() as u64;
        fill_decoded(&mut self.inflater, &mut self.input, fresh, before)?;
        self.at = end;
        self.tail = Bytes::from(out);
        Ok(self.tail.clone())
    }

    /// What the last piece already has from `skip` on; forgets it otherwise, so that its
    /// memory is free before the next is made.
    fn keep_from(&mut self, skip: u64) -> Result<Bytes> {
        let tail = std::mem::take(&mut self.tail);
        let start = self.at - tail.len() as u64;
        let Some(before) = skip.checked_sub(start) else {
            return Err(malformed(format!(
                "its pieces are out of order: {skip} comes after {start}"
            )));
        };
        let before = usize::try_from(before).unwrap_or(usize::MAX);
        Ok(tail.slice(before.min(tail.len())..))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::deflate::MemberCompressor;

    #[test]
    fn what_cannot_be_there_is_refused() {
        let encoded = MemberCompressor::new(1).compress(&[7; 1000]);
        let table: [(&[(u64, u32)], &str); 4] = [
            (&[(0, 1001)], "it ends after"),
            (&[(1000, 1)], "it ends after"),
            (&[(0, u32::MAX)], "cannot hold"),
            (&[(500, 10), (400, 10)], "out of order"),
        ];
        for (pieces, says) in table {
            let mut decoder = MemberDecoder::new(&encoded);
            let taken: Result<Vec<_>> = pieces.iter().map(|(s, l)| decoder.take(*s, *l)).collect();
            let error = taken.unwrap_err().to_string();
            assert!(error.contains(says), "{pieces:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn pieces_equal_slices_of_the_whole(
            seed in any::<u32>(),
            mut pieces in prop::collection::vec((0_u64..50_000, 1_u32..9000), 1..30),
        ) {
            let plain: Vec<u8> = (0..60_000_u32)
                .map(|i| (i.wrapping_mul(seed | 1) >> 11).to_le_bytes()[0] & 0x1f)
                .collect();
            let encoded = MemberCompressor::new(1).compress(&plain);
            pieces.sort_unstable();
            let mut decoder = MemberDecoder::new(&encoded);
            for (skip, len) in pieces {
                let start = usize::try_from(skip).unwrap();
                let piece = decoder.take(skip, len).unwrap();
                let end = start + len as usize;
                prop_assert!(plain.get(start..end) == Some(&*piece));
            }
        }
    }
}
