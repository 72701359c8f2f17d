//! zstd:chunked: a tar.zst of one frame per chunk, whose table of contents (TOC) lies in
//! skippable frames at its end.
//!
//! Two tools write it, and differ in who vouches for the TOC and in where it is found:
//!
//! | | annotations | what they promise | footer |
//! |---|---|---|---|
//! | containers/storage | `io.github.containers.zstd-chunked.*` | SHA-256 of the compressed TOC | never read by its own reader |
//! | stargz | `io.containers.zstd-chunked.*` and the TOC digest of eStargz | SHA-256 of the TOC's JSON | where the TOC is |
//!
//! (containers/storage used the second prefix at first, with its own kind of promise.)
//!
//! What counts is the digest in the manifest; where the TOC lies is only where to look. So
//! a position in the annotations is used without a look at the footer, and without one
//! the footer of either tool will do. A descriptor that carries the promises of both tools
//! at once is refused: they could be of two different TOCs, and what a node shows would
//! depend on who reads.
//!
//! Invariant: an index comes out only of a TOC with the promised digest, decoded to exactly
//! the promised length and never to more than [`TOC_JSON_LEN_MAX`]. The blob is untrusted
//! throughout. The tar-split data behind the TOC is never read: it only serves to write
//! the tar again.
#![warn(clippy::indexing_slicing)]

mod annotations;
mod footer;

use super::estargz::{TOC_JSON_LEN_MAX, TocLayer, toc, unusable};
use super::{LayerBlob, LayerFormat};
use crate::codec;
use crate::codec::stream::{Compression, Decoder};
use crate::source::BlobRef;
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};

pub use annotations::{PREFETCH_END_ANNOTATION, Promise, promise};
pub use footer::{FOOTER_LEN_MAX, read_footer};

/// Most compressed bytes of a TOC that are fetched: what containers/storage accepts.
pub const TOC_LEN_MAX: u64 = 150 << 20;
/// Bytes of a skippable frame's header, before what a [`Position`] names.
const FRAME_HEADER_LEN: u64 = 8;
/// The only kind of TOC there is.
const TOC_TYPE: u64 = 1;

/// Where a TOC is, and how long it is decoded. Inside its blob and within the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The compressed TOC.
    pub blob: ByteRange,
    /// Bytes of its JSON.
    pub json_len: u64,
}

/// What the manifest says the TOC is. The bytes must match all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// Digest of the compressed TOC.
    Compressed(Digest),
    /// Digest of its JSON and, where it is known, also of the compressed TOC.
    Json {
        /// Of the JSON.
        json: Digest,
        /// Of the compressed TOC.
        compressed: Option<Digest>,
    },
}

/// The four numbers that annotations and footers hold alike.
#[derive(Debug, Clone, Copy)]
struct Numbers {
    offset: u64,
    len: u64,
    json_len: u64,
    toc_type: u64,
}

impl Position {
    /// Checks numbers that `what` holds against the size of the blob and the limits.
    fn new(what: &str, numbers: Numbers, blob_size: u64) -> Result<Self> {
        let Numbers {
            offset,
            len,
            json_len,
            toc_type,
        } = numbers;
        if toc_type != TOC_TYPE {
            return Err(Error::Unsupported {
                what: what.to_owned(),
                detail: format!("the TOC is of type {toc_type}, not {TOC_TYPE}"),
            });
        }
        if len > TOC_LEN_MAX || json_len > TOC_JSON_LEN_MAX {
            let detail = format!(
                "the TOC has {len} bytes of at most {TOC_LEN_MAX}, \
                 decoded {json_len} of at most {TOC_JSON_LEN_MAX}"
            );
            return Err(Error::limit(what, detail));
        }
        let blob = ByteRange::at(offset, len)
            .filter(|blob| !blob.is_empty() && blob.start() >= FRAME_HEADER_LEN)
            .filter(|blob| blob.end() <= blob_size);
        match blob {
            Some(blob) => Ok(Self { blob, json_len }),
            None => Err(Error::malformed(
                what,
                format!("it puts a TOC of {len} bytes at {offset} of a blob of {blob_size}"),
            )),
        }
    }
}

/// Reads the TOC of `blob`; `toc` is what the blob holds at `position`.
pub fn parse_toc(
    blob: &BlobRef,
    position: &Position,
    toc: &[u8],
    proof: &Proof,
) -> Result<TocLayer> {
    let what = || format!("TOC of layer {}", blob.digest);
    let (compressed, json_digest) = match proof {
        Proof::Compressed(digest) => (Some(digest), None),
        Proof::Json { json, compressed } => (compressed.as_ref(), Some(json)),
    };
    if let Some(digest) = compressed {
        drop(codec::verify(what, digest, toc.to_vec())?);
    }
    let json = decode(toc, position.json_len)
        .map_err(|error| Error::malformed(what(), error.to_string()))?;
    if let Some(digest) = json_digest {
        drop(codec::verify(what, digest, json.clone())?);
    }
    let layer = LayerBlob {
        digest: blob.digest,
        size: blob.size,
        format: LayerFormat::ZstdChunked,
    };
    toc::parse(&layer, position.blob.start() - FRAME_HEADER_LEN, &json).map_err(unusable)
}

/// Decodes `toc`, which must come to exactly `json_len` bytes.
fn decode(toc: &[u8], json_len: u64) -> Result<bytes::Bytes> {
    let mut decoder = Decoder::new(Compression::Zstd, json_len)?;
    let mut json = Vec::new();
    decoder.push(toc, &mut |run| {
        json.extend_from_slice(run.decoded);
        Ok(())
    })?;
    decoder.finish()?;
    if json.len() as u64 != json_len {
        let detail = format!("it decodes to {} bytes, not to {json_len}", json.len());
        return Err(Error::malformed("zstd data", detail));
    }
    Ok(json.into())
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a wrong index fails the test")]
mod tests;
