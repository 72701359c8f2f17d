//! What it takes to decode one span of a blob and to verify its chunks.
//!
//! ```text
//! SHA-256 of each chunk of the span, in order;     32 each
//! of a span that is verified whole: one SHA-256,
//! of its encoded bytes
//! window, packed; absent where it is not needed    the rest
//! ```
//!
//! The window is what was decoded before the span, as far as the span refers back to it
//! (zeros for the rest), at most 32 KiB. Invariant: details are used only after their
//! SHA-256 was compared with that of the span.

use bytes::Bytes;

use super::Span;
use crate::codec;
use crate::codec::zran::REACH;
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};

/// Bytes of one digest.
const DIGEST_LEN: usize = 32;
/// Largest details of one span: tens of thousands of chunks and a window.
pub const DETAILS_LEN_MAX: u64 = 16 << 20;
/// Largest details of all spans of a layer together.
pub const DETAILS_TOTAL_MAX: u64 = 1 << 30;

/// Details of one span, verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanDetails {
    digests: Bytes,
    /// The window, unpacked; empty where none is needed.
    pub window: Vec<u8>,
}

impl SpanDetails {
    /// Reads `bytes`, which come from a file or a registry and begin with so many digests
    /// ([`LayerIndex::digests_of`](super::LayerIndex::digests_of)).
    pub fn parse(span: &Span, digests: u32, bytes: Bytes) -> Result<Self> {
        let what = || format!("details of the span at {} of a layer", span.start);
        let bytes = codec::verify_chunk(what, &span.details_digest, bytes)?.into_bytes();
        let len = usize::try_from(digests).map_or(usize::MAX, |n| n.saturating_mul(DIGEST_LEN));
        if len > bytes.len() {
            let detail = format!("{} bytes for {digests} digests", bytes.len());
            return Err(Error::malformed(what(), detail));
        }
        let packed = bytes.slice(len..);
        let window = if packed.is_empty() {
            Vec::new()
        } else {
            codec::unpacked(&packed, REACH)?
        };
        let digests = bytes.slice(..len);
        Ok(Self { digests, window })
    }

    /// The digest of this number.
    pub fn digest(&self, number: usize) -> Option<[u8; 32]> {
        let start = number.checked_mul(DIGEST_LEN)?;
        let digest = self.digests.get(start..start.checked_add(DIGEST_LEN)?)?;
        digest.try_into().ok()
    }
}

/// SHA-256 of chunk `number` of `span`, as `details`, those of all spans, have it: for whoever
/// made or verified them.
pub fn digest_in(details: &[u8], span: &Span, number: usize) -> Option<[u8; 32]> {
    let at = usize::try_from(span.details.start()).ok()?;
    let at = at.checked_add(number.checked_mul(DIGEST_LEN)?)?;
    let digest = details.get(at..at.checked_add(DIGEST_LEN)?)?;
    digest.try_into().ok()
}

/// The table of spans of an index that is being made, and the details of all of them.
#[derive(Debug, Default)]
pub struct Spans {
    spans: Vec<Span>,
    details: Vec<u8>,
}

impl Spans {
    /// None yet, with room for so many bytes of details.
    pub fn with_capacity(spans: usize, details: usize) -> Self {
        Self {
            spans: Vec::with_capacity(spans),
            details: Vec::with_capacity(details),
        }
    }

    /// How many there are, which is the number of the next one.
    pub fn count(&self) -> usize {
        self.spans.len()
    }

    /// Adds the span that begins with the `bits` highest bits of the byte at `start` (0: all of
    /// it) and has chunks of these `digests`; `window` is packed, and empty where none is
    /// needed. Fails where details are too long for a place to be told.
    pub fn push(
        &mut self,
        (start, bits): (u64, u8),
        digests: &[[u8; 32]],
        window: &[u8],
    ) -> Result<()> {
        let begin = self.details.len();
        self.details.extend_from_slice(digests.as_flattened());
        self.details.extend_from_slice(window);
        let added = self.details.get(begin..).unwrap_or_default();
        let place = ByteRange::at(begin as u64, added.len() as u64);
        self.spans.push(Span {
            start,
            bits,
            // Known once all chunks are: LayerIndex::with_spans.
            first_chunk: 0,
            chunk_count: 0,
            details: place.ok_or_else(|| Error::limit("layer index", "details are too long"))?,
            details_digest: Digest::sha256_bytes(added),
        });
        Ok(())
    }

    /// The spans, and the details of all of them.
    pub fn finish(self) -> (Vec<Span>, Vec<u8>) {
        (self.spans, self.details)
    }
}
