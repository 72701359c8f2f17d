//! A layer that is here by a zTOC, streamed to see what is in it.
//!
//! A zTOC has no digest of decoded bytes, so what it says of them is its maker's word. Who wants
//! all of a layer need not take it: the layer is streamed, its digest and diff_id are checked,
//! and what comes of it takes the place of what is here, with an index of this node's own. Who
//! has the old one open goes on with it.
//!
//! Invariant: what is here is kept until the right layer is, unless the blob turned out to be
//! of another tar than the image says: then it goes, and nothing comes in its place. A zTOC that
//! lied is told of in the log, once, as what was read by it may have been wrong.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::{LayerOpener, LayerRequest, OpenedBy};
use crate::index::ChunkId;
use crate::layer::Layer;
use crate::store::LayerFile;
use crate::task::blocking;
use crate::types::ByteRange;
use crate::{Error, Result};

/// Bytes that are compared at a time.
const COMPARED_BYTES: u64 = 1 << 20;

impl LayerOpener {
    /// Streams the layer in place of `old`, and says what that had wrong.
    pub(super) async fn prove(
        &self,
        old: &Arc<LayerFile>,
        request: &LayerRequest,
        received: &AtomicU64,
    ) -> Result<(Arc<Layer>, OpenedBy)> {
        let digest = request.blob.digest;
        let new = match self.by_stream(request, received).await {
            Ok(new) => new,
            Err(error) => {
                if is_of_another_tar(&error, request) {
                    let store = Arc::clone(&self.store);
                    blocking(move || store.remove_layer(&digest)).await?;
                }
                return Err(error);
            }
        };
        let files = (Arc::clone(old), Arc::clone(&new));
        match blocking(move || first_lie(&files.0, &files.1)).await {
            Ok(None) => {}
            Ok(Some(lie)) => {
                tracing::warn!(%digest, lie, "the layer's zTOC was wrong, and so may be what was read by it; the layer was streamed and checked instead");
            }
            // The new one is right, whatever the old one was.
            Err(error) => {
                tracing::debug!(%digest, %error, "cannot compare the layer with what its zTOC said");
            }
        }
        Ok(self.streamed(new, request))
    }
}

/// Whether the right blob came, and its tar was not the image's.
fn is_of_another_tar(error: &Error, request: &LayerRequest) -> bool {
    let diff_id = request.diff_id;
    matches!(error, Error::Corrupt { expected, .. } if *expected == diff_id)
        && diff_id != request.blob.digest
}

/// What is in `old`, by its zTOC, and is not so in `new`, which was checked. Blocks on the
/// device.
fn first_lie(old: &LayerFile, new: &LayerFile) -> Result<Option<String>> {
    let (said, is) = (&old.index().files, &new.index().files);
    if said.len() != is.len() {
        return Ok(Some(format!("{} files of {}", said.len(), is.len())));
    }
    if let Some((file, _)) = said.iter().zip(is).find(|(said, is)| said != is) {
        let path = String::from_utf8_lossy(&file.path);
        return Ok(Some(format!("what it says of {path:?}")));
    }
    for (id, chunk) in (0..).zip(&old.index().chunks) {
        let place = ByteRange::at(chunk.data_offset, chunk.len.into());
        if let Some(place) = place
            && !is_same(old, new, id, place)?
        {
            return Ok(Some(format!("bytes {place} of its files")));
        }
    }
    Ok(None)
}

/// Whether both layers have the same bytes in a place, which is chunk `id` of the old one. What
/// is not here nobody has read.
fn is_same(old: &LayerFile, new: &LayerFile, id: ChunkId, place: ByteRange) -> Result<bool> {
    if !old.is_present(id) {
        return Ok(true);
    }
    let mut at = place.start();
    while at < place.end() {
        let len = COMPARED_BYTES.min(place.end() - at);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        let mut right = bytes.clone();
        if old.read_at(at, &mut bytes)? && new.read_at(at, &mut right)? && bytes != right {
            return Ok(false);
        }
        at = at.saturating_add(len);
    }
    Ok(true)
}
