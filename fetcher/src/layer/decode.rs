//! From the encoded bytes of a member to bytes of its chunks.
//!
//! Invariant: what comes out says whether it is verified already: of a span that is verified
//! whole it is, and then all of the span was compared with its digest before any of it was
//! decoded; everything else is compared chunk by chunk by who takes it. Blocks on the device.

use bytes::Bytes;

use crate::codec::VerifiedBytes;
use crate::codec::pieces::Pieces;
use crate::codec::whole::{SpanEncoding, WholeSpan};
use crate::index::{ChunkId, Encoding, LayerFormat};
use crate::plan::{self, Member};
use crate::store::LayerFile;
use crate::{Error, Result};

/// Decoded bytes of one chunk.
pub(super) enum Decoded {
    /// They must be compared with the chunk's digest.
    Unverified(Bytes),
    /// They come of bytes that were.
    Verified(VerifiedBytes),
}

/// A decoder of one member's bytes.
pub(super) enum Decoder<'a> {
    /// Each chunk has a digest.
    Pieces(Pieces<'a>),
    /// The span has one.
    Whole(WholeSpan<'a>),
}

impl<'a> Decoder<'a> {
    /// Decodes `encoded`, by how the first chunk of `member` is encoded.
    pub(super) fn new(file: &LayerFile, member: &Member, encoded: &'a [u8]) -> Result<Self> {
        let first = member.chunks.first().copied().unwrap_or_default();
        let bits = |span: u32| {
            let span = usize::try_from(span).ok();
            let span = span.and_then(|at| file.index().spans.get(at));
            span.map_or(0, |span| span.bits)
        };
        let pieces = match plan::chunk(file.index(), first)?.encoding {
            Encoding::GzipMember { .. } => Pieces::gzip(encoded),
            Encoding::GzipSpan { span, .. } => {
                let details = file.span_details(span)?;
                Pieces::span(encoded, bits(span), &details.window)
            }
            Encoding::WholeSpan { span, .. } => {
                return whole(file, (span, bits(span)), first, encoded).map(Self::Whole);
            }
            Encoding::ZstdFrame { .. } => Pieces::zstd(encoded),
            // Their pieces have a way of their own, as nothing is verified before all are.
            Encoding::WholeMember { .. } => Pieces::gzip(encoded),
            Encoding::Stored { .. } | Encoding::Stream => Ok(Pieces::stored(encoded)),
        };
        pieces.map(Self::Pieces)
    }

    /// The `len` decoded bytes after the first `skip`; ascending calls.
    pub(super) fn take(&mut self, skip: u64, len: u32) -> Result<Decoded> {
        match self {
            Self::Pieces(pieces) => pieces.take(skip, len).map(Decoded::Unverified),
            Self::Whole(span) => span.take(skip, len).map(Decoded::Verified),
        }
    }
}

fn whole<'a>(
    file: &LayerFile,
    (number, bits): (u32, u8),
    first: ChunkId,
    encoded: &'a [u8],
) -> Result<WholeSpan<'a>> {
    let what = || {
        format!(
            "span {number} of layer {}, chunk {first} on,",
            file.digest()
        )
    };
    let details = file.span_details(number)?;
    let digest = details.digest(0);
    let digest = digest.ok_or_else(|| Error::malformed(what(), "its index has no digest of it"))?;
    let encoding = match file.index().format {
        LayerFormat::Gzip | LayerFormat::Estargz => SpanEncoding::Gzip {
            bits,
            window: &details.window,
        },
        LayerFormat::Tar | LayerFormat::Zstd | LayerFormat::ZstdChunked => SpanEncoding::Stored,
    };
    WholeSpan::verified(what, &digest, encoded, encoding)
}
