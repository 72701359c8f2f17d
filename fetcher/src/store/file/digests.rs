//! What the bytes of a layer's chunks must hash to.
//!
//! Invariant: a digest comes from the index, from details that the index vouches for, or,
//! where those vouch for encoded bytes only, from what was decoded of these. Details that do not check out cost the layer its index file.

use std::io;
use std::sync::Arc;

use super::{INDEX, LayerFile, PLAIN};
use crate::index::details::SpanDetails;
use crate::index::{Chunk, ChunkId, Encoding, Span};
use crate::{Error, Result};

impl LayerFile {
    /// SHA-256 of a chunk's bytes. Blocks on the device where it is among the details of
    /// its span. Of a chunk in a span that is verified whole, zeros before it was decoded.
    pub fn chunk_digest(&self, id: ChunkId) -> Result<[u8; 32]> {
        let chunk = self.chunk(id)?;
        let span = match (chunk.encoding, &self.learned) {
            (Encoding::GzipSpan { span, .. }, _) => span,
            (Encoding::WholeSpan { .. }, Some(learned)) => return learned.read(id),
            _ => return chunk.chunk_digest.ok_or_else(|| self.no_digest(id)),
        };
        let first = self.span(span)?.first_chunk;
        let number = usize::try_from(id.saturating_sub(first)).unwrap_or(usize::MAX);
        let digest = self.span_details(span)?.digest(number);
        digest.ok_or_else(|| self.no_digest(id))
    }

    /// Writes down the digest of a chunk's verified bytes, where the index has none.
    pub(super) fn learn(&self, id: ChunkId, chunk: &Chunk, bytes: &[u8]) -> io::Result<()> {
        match (&self.learned, chunk.encoding) {
            (Some(learned), Encoding::WholeSpan { .. }) => learned.note(&*self.disk, id, bytes),
            _ => Ok(()),
        }
    }

    /// What decoding the chunks of a span takes. Blocks on the device.
    pub fn span_details(&self, number: u32) -> Result<Arc<SpanDetails>> {
        let span = self.span(number)?;
        let read = self.details.read(number, span, self.index.digests_of(span));
        if let Err(Error::Corrupt { .. }) = &read {
            // Nothing of the span can be told right from wrong any more. Without its index
            // the layer counts as damaged, and whoever opens it next makes it again; one that
            // was shaped has another first.
            let index = self.dir.join(INDEX);
            if self.disk.rename(&self.dir.join(PLAIN), &index).is_err() {
                let _ = self.disk.remove_file(&index);
            }
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
