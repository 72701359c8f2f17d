//! What the bytes of a layer's chunks must hash to.
//!
//! Invariant: a digest comes from the index or from details that the index vouches for.
//! Details that do not check out cost the layer its index file.

use std::sync::Arc;

use super::{INDEX, LayerFile};
use crate::index::details::SpanDetails;
use crate::index::{ChunkId, Encoding, Span};
use crate::{Error, Result};

impl LayerFile {
    /// SHA-256 of a chunk's bytes. Blocks on the device where it is among the details of
    /// its span.
    pub fn chunk_digest(&self, id: ChunkId) -> Result<[u8; 32]> {
        let chunk = self.chunk(id)?;
        let Encoding::GzipSpan { span, .. } = chunk.encoding else {
            return chunk.chunk_digest.ok_or_else(|| self.no_digest(id));
        };
        let first = self.span(span)?.first_chunk;
        let number = usize::try_from(id.saturating_sub(first)).unwrap_or(usize::MAX);
        let digest = self.span_details(span)?.digest(number);
        digest.ok_or_else(|| self.no_digest(id))
    }

    /// What decoding the chunks of a span takes. Blocks on the device.
    pub fn span_details(&self, number: u32) -> Result<Arc<SpanDetails>> {
        let read = self.details.read(number, self.span(number)?);
        if let Err(Error::Corrupt { .. }) = &read {
            // Nothing of the span can be told right from wrong any more. Without its index
            // the layer counts as damaged, and whoever opens it next makes it again.
            let _ = self.disk.remove_file(&self.dir.join(INDEX));
        }
        read
    }

    fn span(&self, number: u32) -> Result<&Span> {
        let span = usize::try_from(number)
            .ok()
            .and_then(|at| self.index.spans.get(at));
        span.ok_or_else(|| Error::NotFound {
            what: format!("span {number} of layer {}", self.index.blob_digest),
            host: String::new(),
        })
    }

    fn no_digest(&self, id: ChunkId) -> Error {
        let what = format!("index of layer {}", self.index.blob_digest);
        Error::malformed(what, format!("it has no digest of chunk {id}"))
    }
}
