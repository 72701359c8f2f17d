//! Reading an index that somebody pushed beside an image.
//!
//! Invariant: nothing of it is used unless a trusted key signed its core for this layer,
//! and it is of this layer. It is only a shortcut: whatever is wrong with it is said in
//! the log, and the layer is streamed.

use bytes::Bytes;

use super::{LayerRequest, document};
use crate::index::LayerIndex;
use crate::index::wire::{self, HEADER_LEN, Header};
use crate::source::{BlobRef, BlobSource};
use crate::task::blocking;
use crate::trust::{Statement, TrustedKeys};
use crate::types::Digest;
use crate::{Error, Result};

/// Largest offered index that is read: fifty times that of a layer of a gigabyte.
pub const OFFERED_BYTES_MAX: u64 = 512 << 20;

/// An index that a registry has for a layer, and who says that it is right.
#[derive(Debug, Clone)]
pub struct OfferedIndex {
    /// Where it is.
    pub blob: BlobRef,
    /// Signature of its core for this layer, in base64.
    pub signature: String,
}

/// The index, and the details of its spans; the reason where it is not to be used.
pub(super) async fn read(
    source: &dyn BlobSource,
    request: &LayerRequest,
    offered: &OfferedIndex,
    keys: &TrustedKeys,
) -> Result<(LayerIndex, Bytes)> {
    let bytes = document::read(source, &offered.blob, OFFERED_BYTES_MAX).await?;
    let bytes = bytes.into_bytes();
    let (blob, offered, keys) = (request.blob.clone(), offered.clone(), keys.clone());
    blocking(move || check(&blob, &offered, bytes, &keys)).await
}

/// Digest of the core of an index that is held whole.
pub fn core_digest(bytes: &[u8]) -> Result<Digest> {
    let header = Header::parse(bytes)?;
    let core = usize::try_from(header.core_end()).ok();
    let core = core.and_then(|end| bytes.get(..end));
    core.map(Digest::sha256)
        .ok_or_else(|| Error::malformed("layer index", "it is cut off"))
}

fn check(
    blob: &BlobRef,
    offered: &OfferedIndex,
    bytes: Bytes,
    keys: &TrustedKeys,
) -> Result<(LayerIndex, Bytes)> {
    let what = || format!("index {} of layer {}", offered.blob.digest, blob.digest);
    let statement = Statement {
        blob_digest: blob.digest,
        core_digest: core_digest(&bytes)?,
    };
    let Some(key) = keys.signer(&statement, &offered.signature) else {
        let detail = "no key of trust.index_keys signed it for this layer";
        return Err(Error::malformed(what(), detail));
    };
    tracing::debug!(layer = %blob.digest, key = %key.display(), "layer index is signed");
    let header = Header::parse(&bytes)?;
    let end = usize::try_from(header.core_end()).unwrap_or(usize::MAX);
    let index = wire::decode_core(&header, bytes.get(HEADER_LEN..end).unwrap_or_default())?;
    let details = bytes.slice(end.min(bytes.len())..);
    if index.blob_digest != blob.digest || index.blob_size != blob.size {
        return Err(Error::malformed(what(), "it is of another blob"));
    }
    if header.total_len() != bytes.len() as u64 {
        return Err(Error::malformed(
            what(),
            "it does not have the length it says",
        ));
    }
    Ok((index, details))
}
