//! Gzip members that are verified whole, as they are decoded, and taken apart.
//!
//! A table that promises one digest for 4 MiB makes a reader of one page fetch and decode all
//! of them. Once they were, this node knows more: the digest of each piece, and where between
//! two deflate blocks its decoding could have begun. Invariant: nothing comes out unless all
//! pieces together have the promised digest; the digests of pieces are those of the very
//! bytes that come out. Memory: the decoded pieces.
#![warn(clippy::indexing_slicing)]

use bytes::Bytes;

use super::gzip::{self, Inflater};
use super::twin::TwinHasher;
use super::{VerifiedBytes, same};
use crate::types::{Algorithm, Digest};
use crate::{Error, Result};

/// One piece of a member.
#[derive(Debug)]
pub struct Piece {
    /// Its bytes, which are right.
    pub bytes: VerifiedBytes,
    /// Their SHA-256.
    pub digest: [u8; 32],
    /// Where decoding it can begin.
    pub entry: Entry,
    /// Encoded bytes of the member up to its end, as far as decoding it looks at them.
    pub encoded_end: u64,
}

/// A place between two deflate blocks of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its first byte, from the member's first on.
    pub start: u64,
    /// How many bits of that byte, its highest, are behind it; 0 for the whole byte.
    pub bits: u8,
    /// Decoded bytes before it.
    pub decoded: u64,
}

/// Decodes the pieces that `encoded` (untrusted) begins with, `lens` bytes each, if all of them
/// together have the SHA-256 `expected` (trusted). `what` names them in the error. Never
/// allocates more than `encoded` can possibly expand to, and the inflate state.
pub fn pieces(
    what: impl FnOnce() -> String,
    expected: &[u8; 32],
    encoded: &[u8],
    lens: impl IntoIterator<Item = u32>,
) -> Result<Vec<Piece>> {
    let mut member = Member::new(encoded)?;
    let mut found = Vec::new();
    for len in lens {
        found.push(member.piece(len)?);
    }
    let Some(actual) = member.hasher.finish() else {
        return Err(gzip::malformed("it has no digest"));
    };
    same(what, &Digest::Sha256(*expected), actual)?;
    Ok(found)
}

/// Takes `plain` (untrusted) apart into pieces of `lens` bytes, each with its SHA-256, if all of
/// them together have the SHA-256 `expected` (trusted). `what` names them in the error.
pub fn split(
    what: impl FnOnce() -> String,
    expected: &[u8; 32],
    plain: &Bytes,
    lens: impl IntoIterator<Item = u32>,
) -> Result<Vec<(VerifiedBytes, [u8; 32])>> {
    let mut hasher = TwinHasher::new(Some(Algorithm::Sha256));
    let (mut found, mut rest) = (Vec::new(), plain.clone());
    for len in lens {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > rest.len() {
            return Err(gzip::malformed("its pieces are longer than all of it"));
        }
        let piece = rest.split_to(len);
        hasher.piece(&piece);
        found.push((VerifiedBytes(piece), hasher.end_piece()));
    }
    let Some(actual) = hasher.finish() else {
        return Err(gzip::malformed("it has no digest"));
    };
    same(what, &Digest::Sha256(*expected), actual)?;
    Ok(found)
}

/// A member that is being decoded.
struct Member<'a> {
    inflater: Inflater,
    hasher: TwinHasher,
    encoded: &'a [u8],
    /// What of it is left.
    input: &'a [u8],
    /// Decoded bytes so far.
    decoded: u64,
    /// The last place between two blocks.
    entry: Option<Entry>,
}

impl<'a> Member<'a> {
    fn new(encoded: &'a [u8]) -> Result<Self> {
        Ok(Self {
            inflater: Inflater::stopping_at_blocks()?,
            hasher: TwinHasher::new(Some(Algorithm::Sha256)),
            encoded,
            input: encoded,
            decoded: 0,
            entry: None,
        })
    }

    /// The next `len` bytes, which are verified only once all are.
    fn piece(&mut self, len: u32) -> Result<Piece> {
        let possible = (self.encoded.len() as u64).saturating_mul(gzip::EXPANSION_MAX);
        if self.decoded.saturating_add(len.into()) > possible {
            return Err(self.ends_early(len));
        }
        let mut out = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        let (mut filled, mut entry) = (0, self.entry);
        while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let produced = self.inflater.run(&mut self.input, rest)?;
            self.decoded = self.decoded.saturating_add(produced as u64);
            filled = filled.saturating_add(produced);
            if let Some(bits) = self.inflater.block_end() {
                self.entry = Some(Entry {
                    start: self.consumed().saturating_sub(u64::from(bits > 0)),
                    bits,
                    decoded: self.decoded,
                });
            } else if produced == 0 {
                return Err(self.ends_early(len));
            }
            if filled == 0 {
                entry = self.entry;
            }
        }
        self.hasher.piece(&out);
        Ok(Piece {
            bytes: VerifiedBytes(Bytes::from(out)),
            digest: self.hasher.end_piece(),
            // The first block begins before the first byte.
            entry: entry.ok_or_else(|| gzip::malformed("it has no block"))?,
            encoded_end: self.consumed(),
        })
    }

    fn consumed(&self) -> u64 {
        (self.encoded.len() as u64).saturating_sub(self.input.len() as u64)
    }

    fn ends_early(&self, len: u32) -> Error {
        gzip::malformed(format!(
            "a member of {} bytes ends after {} decoded ones, before another {len}",
            self.encoded.len(),
            self.decoded
        ))
    }
}

#[cfg(test)]
mod tests;
