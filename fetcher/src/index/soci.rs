//! SOCI: a table of contents of an unmodified gzip or tar layer, the zTOC, that its image
//! (version 2) or a referrer of it (version 1) leads to.
//!
//! A zTOC is a FlatBuffer: the files of the tar, with the place of each payload in it;
//! *checkpoints*, where gzip can be entered, each with the 32 KiB before it; and the SHA-256
//! of the encoded bytes of each *span*, from one checkpoint to the next. Decoded bytes have
//! no digest. So a span is fetched and verified whole before any of it is decoded
//! ([`Encoding::WholeSpan`]), and what was decoded is hashed by the store, for the disk.
//!
//! Who vouches for what: span digests bind the blob to the zTOC. That the zTOC says of the
//! blob what is in it (which bytes are whose, what was before a checkpoint) nothing can
//! tell short of decoding all of it; as with every table of contents its author decides what
//! is read. So callers hand over only a zTOC whose digest comes from the image's manifest, or
//! from somebody whom the config trusts. Invariant: whatever it says leads to an error or to
//! an index that keeps its rules: payloads inside the tar, ascending and apart; checkpoints
//! ascending on both sides; spans inside the blob, of lengths that can be held in memory and
//! could have been encoded so.
#![warn(clippy::indexing_slicing)]

mod checkpoints;
mod files;
mod flatbuffer;

use bytes::Bytes;

use self::files::Placer;
use self::flatbuffer::{Found, Table};
use super::{LayerBlob, LayerFormat, LayerIndex};
use crate::codec::VerifiedBytes;
use crate::source::BlobRef;
use crate::types::Digest;
use crate::{Error, Result};

#[cfg(doc)]
use super::Encoding;

/// Annotation of an image's manifest: digest of its SOCI index, version 2.
pub const INDEX_DIGEST_ANNOTATION: &str = "com.amazon.soci.index-digest";
/// Media type of the config, and so the artifact type, of a SOCI index that refers to an image.
pub const INDEX_TYPE_V1: &str = "application/vnd.amazon.soci.index.v1+json";
/// The same of one that its image leads to.
pub const INDEX_TYPE_V2: &str = "application/vnd.amazon.soci.index.v2+json";
/// Annotation of a zTOC in a SOCI index: digest of the layer that it is of.
pub const LAYER_DIGEST_ANNOTATION: &str = "com.amazon.soci.image-layer-digest";
/// Media type of a zTOC. Other things in a SOCI index are hints.
pub const ZTOC_TYPE: &str = "application/octet-stream";
/// Largest zTOC that is read: with usual spans of 4 MiB, that of a layer of 30 GiB.
pub const ZTOC_LEN_MAX: u64 = 256 << 20;

/// What a zTOC says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ztoc {
    /// File table and chunk table.
    pub index: LayerIndex,
    /// The details of its spans, one after another.
    pub details: Bytes,
}

/// Numbers of the fields, in the order of the schema.
mod field {
    pub(super) const COMPRESSED_SIZE: u16 = 2;
    pub(super) const UNCOMPRESSED_SIZE: u16 = 3;
    pub(super) const TOC: u16 = 4;
    pub(super) const COMPRESSION: u16 = 5;
    /// Of the table of contents.
    pub(super) const METADATA: u16 = 0;
    /// Of the compression.
    pub(super) const ALGORITHM: u16 = 0;
    pub(super) const SPAN_ID_MAX: u16 = 1;
    pub(super) const SPAN_DIGESTS: u16 = 2;
    pub(super) const CHECKPOINTS: u16 = 3;
}

/// Reads a zTOC of `blob`.
pub fn parse(blob: &BlobRef, ztoc: &VerifiedBytes) -> Result<Ztoc> {
    let what = || format!("zTOC of layer {}", blob.digest);
    if ztoc.len() as u64 > ZTOC_LEN_MAX {
        let detail = format!("{} bytes of at most {ZTOC_LEN_MAX}", ztoc.len());
        return Err(Error::limit(what(), detail));
    }
    let head = Head::read(ztoc, blob.size);
    let head = head.map_err(|rule| Error::malformed(what(), rule))?;
    let checkpoints = match head.format {
        LayerFormat::Tar => checkpoints::of_tar(&head, blob.size),
        _ => checkpoints::of_gzip(&head, blob.size),
    };
    let checkpoints = checkpoints.map_err(|rule| Error::malformed(what(), rule))?;
    let mut placer = Placer::new(what(), &checkpoints, head.tar_len, ztoc.len());
    for number in 0..head.files.len() {
        placer.file(&head.files, number)?;
    }
    let (tables, used) = placer.finish();
    let (spans, details) = checkpoints::spans(&head, &checkpoints, &used)?;
    let blob = LayerBlob {
        digest: blob.digest,
        size: blob.size,
        format: head.format,
    };
    let index = tables.finish_with(blob, spans)?;
    Ok(Ztoc { index, details })
}

/// The parts of a zTOC, none looked at closely.
struct Head<'a> {
    format: LayerFormat,
    /// Length of the tar, as far as files may be in it.
    tar_len: u64,
    files: flatbuffer::Refs<'a>,
    span_digests: flatbuffer::Refs<'a>,
    checkpoints: &'a [u8],
}

impl<'a> Head<'a> {
    fn read(ztoc: &'a [u8], blob_size: u64) -> Found<Self> {
        let root = Table::root(ztoc)?;
        let size = |number| {
            let size = root.i64(number)?;
            u64::try_from(size).map_err(|_| format!("it is of {size} bytes"))
        };
        let compressed = size(field::COMPRESSED_SIZE)?;
        if compressed != blob_size {
            return Err(format!(
                "it is of a blob of {compressed} bytes, not of {blob_size}"
            ));
        }
        let toc = root.table(field::TOC)?.ok_or("it has no table of files")?;
        let compression = root.table(field::COMPRESSION)?;
        let compression = compression.ok_or("it says nothing of the compression")?;
        let format = match compression.i8(field::ALGORITHM)? {
            // What is absent has the default value of its schema, which is gzip.
            None | Some(1) => LayerFormat::Gzip,
            Some(2) => LayerFormat::Tar,
            Some(other) => return Err(format!("its compression is of unknown kind {other}")),
        };
        let span_digests = compression.refs(field::SPAN_DIGESTS)?;
        let last = compression.i32(field::SPAN_ID_MAX)?;
        let count = i64::try_from(span_digests.len()).unwrap_or(i64::MAX);
        if i64::from(last) + 1 != count || count == 0 {
            return Err(format!("its last span is {last}, with {count} digests"));
        }
        Ok(Self {
            format,
            tar_len: size(field::UNCOMPRESSED_SIZE)?,
            files: toc.refs(field::METADATA)?,
            span_digests,
            checkpoints: compression.bytes(field::CHECKPOINTS)?,
        })
    }

    /// The digest of the encoded bytes of span `number`.
    fn span_digest(&self, number: usize) -> Found<[u8; 32]> {
        let text = self.span_digests.bytes(number)?;
        let text = text.get(..text.len().min(200)).unwrap_or_default();
        match Digest::parse(&String::from_utf8_lossy(text)) {
            Ok(Digest::Sha256(digest)) => Ok(digest),
            Ok(Digest::Sha512(_)) => Err(format!("the digest of span {number} is not sha256")),
            Err(error) => Err(format!("the digest of span {number}: {error}")),
        }
    }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a wrong index fails the test")]
mod tests;
