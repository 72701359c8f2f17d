//! Pieces of what encoded bytes decode to, front to back.
//!
//! Invariant: encoded bytes are decoded once however many pieces are taken, and what is
//! held is at most the last piece and the one being made. Pieces may overlap, for a layer's
//! table may say so; each byte of a piece then costs one copy, never another decoding.
#![warn(clippy::indexing_slicing)]

use bytes::Bytes;

use super::gzip::{self, Inflater};
use super::stream::Zstd;
use crate::{Error, Result};

/// Output is made in pieces of this size where it is only skipped.
const SCRATCH_LEN: usize = 64 << 10;

/// A decoder that can stop and go on anywhere.
pub(super) trait Decode {
    /// What it decodes, for messages.
    const WHAT: &'static str;
    /// Most decoded bytes per encoded byte, where the format has such a bound.
    const EXPANSION_MAX: u64;

    /// Decodes from `input` into `out` until one of them is used up; returns how many
    /// bytes of `out` are filled. 0 with a non-empty `out` means that all input is
    /// consumed.
    fn run(&mut self, input: &mut &[u8], out: &mut [u8]) -> Result<usize>;
}

impl Decode for Inflater {
    const WHAT: &'static str = "gzip data";
    const EXPANSION_MAX: u64 = gzip::EXPANSION_MAX;

    fn run(&mut self, input: &mut &[u8], out: &mut [u8]) -> Result<usize> {
        Self::run(self, input, out)
    }
}

impl Decode for Zstd {
    const WHAT: &'static str = "zstd data";
    // A block of 128 KiB of one byte takes four.
    const EXPANSION_MAX: u64 = u64::MAX;

    fn run(&mut self, input: &mut &[u8], out: &mut [u8]) -> Result<usize> {
        loop {
            let produced = Self::run(self, input, out)?;
            if produced > 0 || input.is_empty() || out.is_empty() {
                return Ok(produced);
            }
        }
    }
}

/// Decodes some encoded bytes forward. After an error no further piece is right.
pub struct Pieces<'a>(Kind<'a>);

enum Kind<'a> {
    Gzip(Forward<'a, Inflater>),
    Zstd(Forward<'a, Zstd>),
    Stored(&'a [u8]),
}

impl<'a> Pieces<'a> {
    /// Of the gzip members in `encoded`.
    pub fn gzip(encoded: &'a [u8]) -> Result<Self> {
        Ok(Self(Kind::Gzip(Forward::new(Inflater::new()?, encoded))))
    }

    /// Of the gzip stream that `encoded` is a part of: it begins between two deflate
    /// blocks. The `bits` highest bits of its first byte, all of it if 0, belong to what
    /// follows; `window` is what was decoded before, as far as it is referred back to.
    pub fn span(encoded: &'a [u8], bits: u8, window: &[u8]) -> Result<Self> {
        let (first, rest) = match encoded.split_first() {
            Some((first, rest)) if bits > 0 => (*first, rest),
            _ => (0, encoded),
        };
        let inflater = Inflater::resume(bits, first, window)?;
        Ok(Self(Kind::Gzip(Forward::new(inflater, rest))))
    }

    /// Of the zstd frames in `encoded`; skippable ones decode to nothing.
    pub fn zstd(encoded: &'a [u8]) -> Result<Self> {
        Ok(Self(Kind::Zstd(Forward::new(Zstd::new()?, encoded))))
    }

    /// Of `plain` itself.
    pub fn stored(plain: &'a [u8]) -> Self {
        Self(Kind::Stored(plain))
    }

    /// The `len` decoded bytes after the first `skip`. Calls must come in ascending order
    /// of `skip`. Never allocates more than `len` bytes plus about 120 KiB, and the window
    /// that a zstd frame asks for.
    pub fn take(&mut self, skip: u64, len: u32) -> Result<Bytes> {
        match &mut self.0 {
            Kind::Gzip(forward) => forward.take(skip, len),
            Kind::Zstd(forward) => forward.take(skip, len),
            Kind::Stored(plain) => stored(plain, skip, len),
        }
    }
}

fn stored(plain: &[u8], skip: u64, len: u32) -> Result<Bytes> {
    let end = skip.saturating_add(u64::from(len));
    let place = usize::try_from(skip).ok().zip(usize::try_from(end).ok());
    let piece = place.and_then(|(start, end)| plain.get(start..end));
    let piece = piece.ok_or_else(|| ends_early("tar", plain.len() as u64, end))?;
    Ok(Bytes::copy_from_slice(piece))
}

struct Forward<'a, D> {
    decoder: D,
    input: &'a [u8],
    /// Decoded bytes so far.
    at: u64,
    /// The last piece from its start on; ends at `at`.
    tail: Bytes,
    /// What the input can expand to at most.
    possible: u64,
}

impl<'a, D: Decode> Forward<'a, D> {
    fn new(decoder: D, encoded: &'a [u8]) -> Self {
        Self {
            decoder,
            input: encoded,
            at: 0,
            tail: Bytes::new(),
            possible: (encoded.len() as u64).saturating_mul(D::EXPANSION_MAX),
        }
    }

    fn take(&mut self, skip: u64, len: u32) -> Result<Bytes> {
        let end = skip.saturating_add(u64::from(len));
        if end > self.possible {
            let input = self.possible / D::EXPANSION_MAX;
            return Err(Error::malformed(
                D::WHAT,
                format!("{input} bytes cannot hold {end} decoded bytes"),
            ));
        }
        let wanted = usize::try_from(len).unwrap_or(usize::MAX);
        let kept = self.keep_from(skip)?;
        if kept.len() >= wanted {
            self.tail = kept;
            return Ok(self.tail.slice(..wanted));
        }
        if skip > self.at {
            skip_decoded(&mut self.decoder, &mut self.input, skip - self.at)?;
        }
        let mut out = Vec::with_capacity(wanted);
        out.extend_from_slice(&kept);
        out.resize(wanted, 0);
        let fresh = out.get_mut(kept.len()..).unwrap_or_default();
        let before = end - fresh.len() as u64;
        fill_decoded(&mut self.decoder, &mut self.input, fresh, before)?;
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
            return Err(Error::malformed(
                D::WHAT,
                format!("its pieces are out of order: {skip} comes after {start}"),
            ));
        };
        let before = usize::try_from(before).unwrap_or(usize::MAX);
        Ok(tail.slice(before.min(tail.len())..))
    }
}

/// Fills `out` with the next decoded bytes, `before` of which came already.
pub(super) fn fill_decoded<D: Decode>(
    decoder: &mut D,
    input: &mut &[u8],
    out: &mut [u8],
    before: u64,
) -> Result<()> {
    let wanted = before.saturating_add(out.len() as u64);
    let mut filled = 0;
    while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match decoder.run(input, rest)? {
            0 => {
                let got = before.saturating_add(filled as u64);
                return Err(ends_early(D::WHAT, got, wanted));
            }
            produced => filled += produced,
        }
    }
    Ok(())
}

/// Drops the next `skip` decoded bytes.
pub(super) fn skip_decoded<D: Decode>(decoder: &mut D, input: &mut &[u8], skip: u64) -> Result<()> {
    if skip == 0 {
        return Ok(());
    }
    let mut scratch = vec![0; SCRATCH_LEN];
    let mut left = skip;
    while left > 0 {
        let take = usize::try_from(left).map_or(SCRATCH_LEN, |left| left.min(SCRATCH_LEN));
        let produced = match scratch.get_mut(..take) {
            Some(piece) => decoder.run(input, piece)?,
            None => 0,
        };
        if produced == 0 {
            return Err(ends_early(D::WHAT, skip - left, skip));
        }
        left -= produced as u64;
    }
    Ok(())
}

fn ends_early(what: &str, got: u64, wanted: u64) -> Error {
    Error::malformed(
        what,
        format!("it ends after {got} of {wanted} decoded bytes"),
    )
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a wrong index fails the test")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::deflate::MemberCompressor;

    #[test]
    fn what_cannot_be_there_is_refused() {
        let plain = [7; 1000];
        let gzip = MemberCompressor::new(1).compress(&plain);
        let zstd = zstd::encode_all(&plain[..], 1).unwrap();
        let beyond: &[(u64, u32)] = &[(0, 1001)];
        let table: [(&[(u64, u32)], &str); 4] = [
            (beyond, "it ends after"),
            (&[(1000, 1)], "it ends after"),
            (&[(0, u32::MAX)], "cannot hold"),
            (&[(500, 10), (400, 10)], "out of order"),
        ];
        let take = |mut pieces: Pieces<'_>, wanted: &[(u64, u32)]| -> String {
            let taken: Result<Vec<_>> = wanted.iter().map(|(s, l)| pieces.take(*s, *l)).collect();
            taken.unwrap_err().to_string()
        };
        for (wanted, says) in table {
            let error = take(Pieces::gzip(&gzip).unwrap(), wanted);
            assert!(error.contains(says), "{wanted:?}: {error}");
        }
        assert!(take(Pieces::zstd(&zstd).unwrap(), beyond).contains("it ends after"));
        assert!(take(Pieces::stored(&plain), beyond).contains("it ends after"));
        assert!(take(Pieces::stored(&plain), &[(u64::MAX, 1)]).contains("it ends after"));
    }

    proptest! {
        #[test]
        fn pieces_equal_slices_of_the_whole(
            seed in any::<u32>(),
            cut in 1_usize..59_999,
            mut wanted in prop::collection::vec((0_u64..50_000, 1_u32..9000), 1..30),
        ) {
            let plain: Vec<u8> = (0..60_000_u32)
                .map(|i| (i.wrapping_mul(seed | 1) >> 11).to_le_bytes()[0] & 0x1f)
                .collect();
            let mut gzip = MemberCompressor::new(1);
            let members = [gzip.compress(&plain[..cut]), gzip.compress(&plain[cut..])].concat();
            let frames = [
                zstd::encode_all(&plain[..cut], 1).unwrap(),
                b"\x50\x2a\x4d\x18\x01\0\0\0x".to_vec(),
                zstd::encode_all(&plain[cut..], 1).unwrap(),
            ]
            .concat();
            wanted.sort_unstable();
            for mut pieces in [
                Pieces::gzip(&members).unwrap(),
                Pieces::zstd(&frames).unwrap(),
                Pieces::stored(&plain),
            ] {
                for (skip, len) in wanted.iter().copied() {
                    let start = usize::try_from(skip).unwrap();
                    let piece = pieces.take(skip, len).unwrap();
                    let end = start + len as usize;
                    prop_assert!(plain.get(start..end) == Some(&*piece));
                }
            }
        }
    }
}
