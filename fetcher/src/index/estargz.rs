//! eStargz: a tar.gz whose table of contents (TOC) says where each chunk of each file is.
//!
//! Invariant: an index comes out only of a TOC whose uncompressed JSON has the digest the
//! manifest promised, and every chunk in it carries its own digest; so whatever the TOC
//! says, bytes are never taken from it unverified. The blob is untrusted throughout.
//!
//! Reading one: fetch the last [`tail_len`] bytes, [`read_footer`], fetch what is missing
//! from [`Footer::toc_offset`] on (within [`check_toc_len`]), [`parse_toc`]. Where the
//! footer says that the TOC is external, it is a layer of the image that
//! [`external_toc_tag`] names: [`parse_external_toc`].

mod cut;
mod footer;
pub(super) mod toc;

pub use cut::cut;
pub use footer::{Footer, FooterKind, check_toc_len, read_footer, tail_len};

use super::{LayerBlob, LayerFormat, LayerIndex};
use crate::codec;
use crate::codec::gzip;
use crate::source::BlobRef;
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};

/// Annotation of a layer descriptor that holds the digest of its TOC.
pub const TOC_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Annotation of a layer of a TOC image that says which layer's TOC it holds.
pub const LAYER_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/layer.digest";
/// Name of the tar entry that holds the TOC.
pub const TOC_NAME: &str = "stargz.index.json";
/// Largest TOC that is decoded, in bytes of JSON: what other readers accept.
pub const TOC_JSON_LEN_MAX: u64 = 150 << 20;

const TAR_BLOCK_LEN: usize = 512;

/// What a TOC says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocLayer {
    /// File table and chunk table.
    pub index: LayerIndex,
    /// Bytes of the blob that whoever built it wants fetched first.
    pub prefetch: Option<ByteRange>,
}

/// Reads the TOC of `blob`. `tail` is the blob from [`Footer::toc_offset`] on, with or
/// without its footer; `toc_digest` is what the manifest promises.
pub fn parse_toc(
    blob: &BlobRef,
    footer: &Footer,
    tail: &[u8],
    toc_digest: &Digest,
) -> Result<TocLayer> {
    footer.check_inside(&blob.digest)?;
    let what = || format!("TOC of layer {}", blob.digest);
    let len = footer.toc_len();
    check_toc_len(len)?;
    let member = usize::try_from(len).ok().and_then(|len| tail.get(..len));
    let member = member.ok_or_else(|| {
        let rule = format!("only {} of its {len} bytes are there", tail.len());
        Error::malformed(what(), rule)
    })?;
    parse_member(blob, footer, member, toc_digest)
}

/// Reads the TOC of `blob`, whose footer says that it is external. `member` is the blob
/// that holds it; `toc_digest` is what the manifest of `blob` promises, so `member` may
/// come from anywhere.
pub fn parse_external_toc(
    blob: &BlobRef,
    footer: &Footer,
    member: &[u8],
    toc_digest: &Digest,
) -> Result<TocLayer> {
    check_toc_len(member.len() as u64)?;
    parse_member(blob, footer, member, toc_digest)
}

/// The tag of the image that holds the external TOCs of the image tagged `tag`.
pub fn external_toc_tag(tag: &str) -> String {
    format!("{tag}-esgztoc")
}

fn parse_member(
    blob: &BlobRef,
    footer: &Footer,
    member: &[u8],
    toc_digest: &Digest,
) -> Result<TocLayer> {
    let blob = LayerBlob {
        digest: blob.digest,
        size: blob.size,
        format: LayerFormat::Estargz,
    };
    let json = toc_json(&blob, member)?;
    let what = || format!("TOC of layer {}", blob.digest);
    let json = codec::verify(what, toc_digest, json)?;
    toc::parse(&blob, footer.toc_offset(), &json).map_err(unusable)
}

/// Of a TOC that is the promised one, but breaks a rule or a limit of ours. The layer may be
/// right all the same, which its own digests tell.
pub(super) fn unusable(error: Error) -> Error {
    match error {
        Error::Malformed { what, detail } | Error::Limit { what, detail } => Error::Unsupported {
            what,
            detail: format!("{detail}; the layer must be pulled whole"),
        },
        error => error,
    }
}

/// Decodes the gzip member of a TOC: one tar header and the JSON.
fn toc_json(blob: &LayerBlob, member: &[u8]) -> Result<Vec<u8>> {
    let malformed =
        |detail: String| Error::malformed(format!("TOC of layer {}", blob.digest), detail);
    let in_toc = |error: Error| malformed(error.to_string());
    let header = gzip::decode_member(member, 0, 512).map_err(in_toc)?;
    let header: &[u8; TAR_BLOCK_LEN] = header
        .as_slice()
        .try_into()
        .map_err(|_| malformed("its tar header is cut off".to_owned()))?;
    let (name, size) = super::tar::simple_header(header).map_err(malformed)?;
    if name.as_slice() != TOC_NAME.as_bytes() {
        return Err(malformed(format!(
            "a file {} is where {TOC_NAME} should be",
            super::path::show(&name)
        )));
    }
    if size > TOC_JSON_LEN_MAX {
        return Err(Error::limit(
            format!("TOC of layer {}", blob.digest),
            format!("it has {size} bytes of at most {TOC_JSON_LEN_MAX}"),
        ));
    }
    let size = u32::try_from(size).map_err(|_| malformed("its size does not fit".to_owned()))?;
    gzip::decode_member(member, TAR_BLOCK_LEN as u64, size).map_err(in_toc)
}

#[cfg(test)]
mod tests;
