//! Spans that are verified as they are encoded, whole.
//!
//! Some tables promise a digest of the encoded bytes between two places and none of what
//! they decode to. Invariant: a [`WholeSpan`] exists only of encoded bytes that have their
//! digest, all of them; so what it yields depends on nothing but bytes that somebody
//! promised: the span, and the window, which came with the promise.

use super::pieces::Pieces;
use super::{VerifiedBytes, same};
use crate::Result;
use crate::types::Digest;

/// The decoded bytes of a span, front to back.
pub struct WholeSpan<'a>(Pieces<'a>);

/// How the bytes of a span are encoded.
#[derive(Debug, Clone, Copy)]
pub enum SpanEncoding<'a> {
    /// They are a part of a tar.
    Stored,
    /// They are a part of a gzip stream; see [`Pieces::span`].
    Gzip {
        /// How many bits of the first byte, its highest, belong to it; 0 for the whole byte.
        bits: u8,
        /// What was decoded before.
        window: &'a [u8],
    },
}

impl<'a> WholeSpan<'a> {
    /// Compares `encoded` (untrusted) with `expected` (trusted). `what` names it in the
    /// error.
    pub fn verified(
        what: impl FnOnce() -> String,
        expected: &[u8; 32],
        encoded: &'a [u8],
        encoding: SpanEncoding<'_>,
    ) -> Result<Self> {
        same(what, &Digest::Sha256(*expected), Digest::sha256(encoded))?;
        let pieces = match encoding {
            SpanEncoding::Stored => Pieces::stored(encoded),
            SpanEncoding::Gzip { bits, window } => Pieces::span(encoded, bits, window)?,
        };
        Ok(Self(pieces))
    }

    /// The `len` decoded bytes after the first `skip`; see [`Pieces::take`].
    pub fn take(&mut self, skip: u64, len: u32) -> Result<VerifiedBytes> {
        self.0.take(skip, len).map(VerifiedBytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn nothing_comes_out_of_other_bytes() {
        let Digest::Sha256(digest) = Digest::sha256(b"a tar") else {
            unreachable!("it is made with SHA-256");
        };
        let open = |bytes: &'static [u8]| {
            WholeSpan::verified(|| "span 3".to_owned(), &digest, bytes, SpanEncoding::Stored)
        };
        let mut span = open(b"a tar").unwrap();
        assert_eq!(&*span.take(2, 3).unwrap(), b"tar");
        assert!(span.take(2, 4).is_err());
        for bad in [&b"a tan"[..], b"a ta", b""] {
            let error = open(bad).map(|_| ()).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        }
    }
}
