//! Reading an index that somebody pushed beside an image.
//!
//! Invariant: nothing of it is used unless a trusted key signed its core for this layer,
//! and it is of this layer. It is only a shortcut: whatever is wrong with it is said in
//! the log, and the layer is streamed.
//!
//! Of a large one only the core is read. Its details come later, span by span, each
//! compared with its digest in the core; see `layer::details`.

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;

use super::{LayerRequest, document};
use crate::index::LayerIndex;
use crate::index::wire::{self, HEADER_LEN, Header};
use crate::layer::details::LEN_MAX;
use crate::source::{BlobRef, BlobSource};
use crate::store::PartialIndex;
use crate::task::blocking;
use crate::trust::{Statement, TrustedKeys};
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};

/// Largest offered index that is read: fifty times that of a layer of a gigabyte.
pub const OFFERED_BYTES_MAX: u64 = 512 << 20;
/// Up to here an index is read whole: a second request costs more than its details do.
const WHOLE_BYTES_MAX: u64 = 128 << 10;
/// What is read first of an index that does not say how long its core is.
const FIRST_BYTES: u64 = 64 << 10;

/// An index that a registry has for a layer, and who says that it is right.
#[derive(Debug, Clone)]
pub struct OfferedIndex {
    /// Where it is.
    pub blob: BlobRef,
    /// Signature of its core for this layer, in base64.
    pub signature: String,
    /// Bytes of header and core, if somebody said so; a wrong number costs a request.
    pub core_bytes: Option<u64>,
}

/// An index that is to be used.
pub(super) enum Offered {
    /// With the details of its spans.
    Whole(LayerIndex, Bytes),
    /// Without them.
    Core(PartialIndex),
}

impl Offered {
    /// What it says of the layer.
    pub(super) fn index(&self) -> &LayerIndex {
        match self {
            Self::Whole(index, _) => index,
            Self::Core(partial) => &partial.index,
        }
    }
}

/// The index; the reason where it is not to be used.
pub(super) async fn read(
    source: &dyn BlobSource,
    request: &LayerRequest,
    offered: &OfferedIndex,
    keys: &TrustedKeys,
) -> Result<Offered> {
    if offered.blob.size > WHOLE_BYTES_MAX {
        match head(source, offered).await {
            Ok(head) => {
                let checked = checked(request, offered, head, keys).await?;
                let is_short = |span: &crate::index::Span| span.details.len() <= LEN_MAX;
                if checked.index.spans.iter().all(is_short) {
                    return Ok(Offered::Core(checked));
                }
            }
            Err(Error::Unsupported { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let bytes = document::read(source, &offered.blob, OFFERED_BYTES_MAX).await?;
    let bytes = bytes.into_bytes();
    let checked = checked(request, offered, bytes.clone(), keys).await?;
    if bytes.len() as u64 != offered.blob.size {
        let what = format!("index {}", offered.blob.digest);
        return Err(Error::malformed(what, "it does not have its length"));
    }
    Ok(Offered::Whole(
        checked.index,
        bytes.slice(checked.head.len()..),
    ))
}

/// Digest of the core of an index that is held whole, or at least up to there.
pub fn core_digest(bytes: &[u8]) -> Result<Digest> {
    core(bytes).map(Digest::sha256)
}

/// Bytes of header and core of an index that is held whole.
pub fn core_bytes(bytes: &[u8]) -> Result<u64> {
    core(bytes).map(|core| core.len() as u64)
}

fn core(bytes: &[u8]) -> Result<&[u8]> {
    let header = Header::parse(bytes)?;
    let core = usize::try_from(header.core_end()).ok();
    let core = core.and_then(|end| bytes.get(..end));
    core.ok_or_else(|| Error::malformed("layer index", "it is cut off"))
}

/// The first bytes of the index: header and core at least.
async fn head(source: &dyn BlobSource, offered: &OfferedIndex) -> Result<Bytes> {
    let blob = &offered.blob;
    if blob.size > OFFERED_BYTES_MAX {
        let detail = format!("{} bytes of at most {OFFERED_BYTES_MAX}", blob.size);
        return Err(Error::limit(format!("index {}", blob.digest), detail));
    }
    let first = offered.core_bytes.unwrap_or(FIRST_BYTES);
    let first = first.clamp(HEADER_LEN as u64, blob.size.max(HEADER_LEN as u64));
    let mut bytes = BytesMut::new();
    append(source, blob, first, &mut bytes).await?;
    let end = Header::parse(&bytes)?.core_end();
    if end > blob.size {
        let what = format!("index {}", blob.digest);
        return Err(Error::malformed(what, "its core ends behind it"));
    }
    append(source, blob, end, &mut bytes).await?;
    Ok(bytes.freeze())
}

/// Reads on up to `end` of the blob.
async fn append(
    source: &dyn BlobSource,
    blob: &BlobRef,
    end: u64,
    bytes: &mut BytesMut,
) -> Result<()> {
    let range = ByteRange::new(bytes.len() as u64, end);
    let Some(range) = range.filter(|range| !range.is_empty()) else {
        return Ok(());
    };
    let mut body = source.read_range(blob, range).await?;
    while let Some(piece) = body.next().await {
        bytes.extend_from_slice(&piece?);
    }
    Ok(())
}

async fn checked(
    request: &LayerRequest,
    offered: &OfferedIndex,
    bytes: Bytes,
    keys: &TrustedKeys,
) -> Result<PartialIndex> {
    let (blob, offered, keys) = (request.blob.clone(), offered.clone(), keys.clone());
    blocking(move || check(&blob, offered, &bytes, &keys)).await
}

fn check(
    blob: &BlobRef,
    offered: OfferedIndex,
    bytes: &Bytes,
    keys: &TrustedKeys,
) -> Result<PartialIndex> {
    let what = || format!("index {} of layer {}", offered.blob.digest, blob.digest);
    let statement = Statement {
        blob_digest: blob.digest,
        core_digest: core_digest(bytes)?,
    };
    let Some(key) = keys.signer(&statement, &offered.signature) else {
        let detail = "no key of trust.index_keys signed it for this layer";
        return Err(Error::malformed(what(), detail));
    };
    tracing::debug!(layer = %blob.digest, key = %key.display(), "layer index is signed");
    let header = Header::parse(bytes)?;
    let head = bytes.slice(..core(bytes)?.len());
    let index = wire::decode_core(&header, head.get(HEADER_LEN..).unwrap_or_default())?;
    if index.blob_digest != blob.digest || index.blob_size != blob.size {
        return Err(Error::malformed(what(), "it is of another blob"));
    }
    if header.total_len() != offered.blob.size {
        return Err(Error::malformed(
            what(),
            "it does not have the length it says",
        ));
    }
    Ok(PartialIndex {
        index,
        head,
        origin: offered.blob,
    })
}
