//! What the bytes of a layer's chunks must hash to.
//!
//! Invariant: a digest comes from the index, from details that the index vouches for, or,
//! where those vouch for encoded bytes only, from what was decoded of these. Details that do not check out cost the layer its index file.

use std::sync::Arc;

use bytes::Bytes;

use super::{INDEX, LayerFile, PLAIN};
use crate::index::details::SpanDetails;
use crate::index::{Chunk, ChunkId, Encoding, Span};
use crate::source::BlobRef;
use crate::store::details::{self, Place};
use crate::store::learned::Learned;
use crate::types::Digest;
use crate::{Error, Result};

impl LayerFile {
    /// SHA-256 of a chunk's bytes. Blocks on the device where it is among the details of
    /// its span. Of a chunk in a span or member that is verified whole, zeros before it was
    /// decoded.
    pub fn chunk_digest(&self, id: ChunkId) -> Result<[u8; 32]> {
        let chunk = self.chunk(id)?;
        let span = match (chunk.encoding, &self.learned) {
            (Encoding::GzipSpan { span, .. }, _) => span,
            (Encoding::WholeSpan { .. } | Encoding::WholeMember { .. }, Some(learned)) => {
                return learned.read(id);
            }
            _ => return chunk.chunk_digest.ok_or_else(|| self.no_digest(id)),
        };
        let first = self.span(span)?.first_chunk;
        let number = usize::try_from(id.saturating_sub(first)).unwrap_or(usize::MAX);
        let digest = self.span_details(span)?.digest(number);
        digest.ok_or_else(|| self.no_digest(id))
    }

    /// Where the digest of a chunk's verified bytes is to be written down, as the index has
    /// none; and that digest, which may be `known`.
    pub(super) fn lesson(
        &self,
        chunk: &Chunk,
        bytes: &[u8],
        known: Option<[u8; 32]>,
    ) -> Option<(&Learned, [u8; 32])> {
        let (Encoding::WholeSpan { .. } | Encoding::WholeMember { .. }) = chunk.encoding else {
            return None;
        };
        let digest = || Digest::sha256(bytes).as_bytes().try_into();
        let digest = known.or_else(|| digest().ok())?;
        Some((self.learned.as_ref()?, digest))
    }

    /// SHA-256 of all pieces of the member that chunk `id` is a piece of, where that member is
    /// verified whole. Blocks on the device.
    pub fn member_digest(&self, id: ChunkId) -> Result<Option<[u8; 32]>> {
        let Encoding::WholeMember { span, .. } = self.chunk(id)?.encoding else {
            return Ok(None);
        };
        let digest = self.span_details(span)?.digest(0);
        digest.map(Some).ok_or_else(|| self.no_digest(id))
    }

    /// What decoding the chunks of a span takes; [`Error::NotFound`] where it has not come
    /// yet. Blocks on the device.
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

    /// Where details that are not here can be had, and where those of the first span begin
    /// there; `None` where all are here.
    pub fn details_origin(&self) -> Option<(&BlobRef, u64)> {
        self.details.origin()
    }

    /// Whether the details of a span are known to be here. Looks only at memory.
    pub fn has_details(&self, number: u32) -> bool {
        self.details.is_here(number)
    }

    /// Those of the spans `numbers` whose details are not here. Blocks on the device.
    pub fn absent_details(&self, numbers: &[u32]) -> Result<Vec<u32>> {
        let mut absent = Vec::new();
        for number in numbers {
            if !self.details.look(*number, self.span(*number)?)? {
                absent.push(*number);
            }
        }
        Ok(absent)
    }

    /// Keeps the details of a span, which come from anywhere: [`Error::Corrupt`] if they are
    /// not the right ones. On a full disk the store first makes room, if it may. Blocks on
    /// the device.
    pub fn put_details(&self, number: u32, bytes: Bytes) -> Result<()> {
        let span = self.span(number)?;
        let bytes = details::verify(span, bytes)?;
        let place = Place {
            span,
            bytes: &bytes,
        };
        let put = || self.details.put(&*self.disk, number, &place);
        match self.store() {
            Some(store) => store.with_room(put),
            None => put(),
        }
    }

    /// Makes the layer count as damaged, for its missing details cannot be had any more:
    /// whoever opens it next makes it again. Who has it open goes on reading what is here.
    /// Does nothing to one that was made again already. Blocks on the device.
    pub fn give_up_index(&self) {
        let Ok(Some(_lock)) = self.lock_own() else {
            return;
        };
        let _ = self.disk.remove_file(&self.dir.join(INDEX));
        if let Some(store) = self.store() {
            store.forget_layer(&self.index.blob_digest);
        }
    }

    pub(crate) fn span(&self, number: u32) -> Result<&Span> {
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
