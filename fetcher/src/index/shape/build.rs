//! Making the index with the spans that were chosen.
//!
//! Invariant: every chunk keeps its id, place, length and digest; it belongs to the last
//! span that begins at or before it, and its encoded bytes end where they ended. Old details
//! are used only after they were compared with their SHA-256. Pure.

use bytes::Bytes;

use super::choose::{Entry, Window};
use super::{Shaper, foreign};
use crate::codec;
use crate::index::details::Spans;
use crate::index::{Chunk, ChunkId, Encoding, LayerBlob, LayerIndex, Span};
use crate::types::ByteRange;
use crate::{Error, Result};

/// Bytes of one digest.
const DIGEST_LEN: usize = 32;

/// What is behind the tables of the old index, span by span, compared.
pub struct OldDetails {
    spans: Vec<(Bytes, usize)>,
}

impl OldDetails {
    /// Of `index`; `bytes` are those of all spans, from a disk.
    pub fn new(index: &LayerIndex, bytes: &Bytes) -> Result<Self> {
        let check = |span: &Span| {
            let slice = slice(bytes, span.details);
            let slice = slice.ok_or_else(|| Error::malformed("details of a layer", "cut off"))?;
            let what = || format!("details of the span at {} of a layer", span.start);
            let verified = codec::verify_chunk(what, &span.details_digest, slice)?;
            let count = usize::try_from(index.digests_of(span)).unwrap_or(usize::MAX);
            Ok((verified.into_bytes(), count.saturating_mul(DIGEST_LEN)))
        };
        let spans = index.spans.iter().map(check).collect::<Result<_>>()?;
        Ok(Self { spans })
    }

    /// Digest `number` of span number `span`.
    pub(super) fn digest(&self, span: u32, number: u32) -> Option<[u8; 32]> {
        let (bytes, _) = self.spans.get(usize::try_from(span).ok()?)?;
        let at = usize::try_from(number).ok()?.checked_mul(DIGEST_LEN)?;
        bytes.get(at..at.checked_add(DIGEST_LEN)?)?.try_into().ok()
    }

    /// The packed window of span number `span`.
    pub fn window(&self, span: u32) -> Option<&[u8]> {
        let (bytes, digests) = self.spans.get(usize::try_from(span).ok()?)?;
        bytes.get(*digests..)
    }
}

fn slice(bytes: &Bytes, range: ByteRange) -> Option<Bytes> {
    let start = usize::try_from(range.start()).ok()?;
    let end = usize::try_from(range.end()).ok()?;
    (end <= bytes.len()).then(|| bytes.slice(start..end))
}

impl Shaper {
    /// The index whose spans begin at `entries` (ascending), and the details of them all.
    /// `windows` are those of the splits, packed.
    pub fn build(
        &self,
        entries: &[Entry],
        old: &OldDetails,
        windows: &[Vec<u8>],
    ) -> Result<(LayerIndex, Vec<u8>)> {
        let mut digests: Vec<Vec<[u8; 32]>> = vec![Vec::new(); entries.len()];
        let mut chunks = Vec::with_capacity(self.index.chunks.len());
        for (id, chunk) in (0..).zip(&self.index.chunks) {
            let moved = self.moved((id, chunk), entries, old, &mut digests);
            chunks.push(moved.ok_or_else(|| foreign("a chunk is before all spans"))?);
        }
        let mut spans = Spans::default();
        for (entry, digests) in entries.iter().zip(digests) {
            let window = match entry.window {
                Window::OfSpan(span) => old.window(span),
                Window::OfSplit(at) => windows.get(at).map(Vec::as_slice),
            };
            let window = window.ok_or_else(|| foreign("a window is missing"))?;
            spans.push((entry.seam.start, entry.seam.bits), &digests, window)?;
        }
        let (spans, all) = spans.finish();
        let blob = LayerBlob {
            digest: self.index.blob_digest,
            size: self.index.blob_size,
            format: self.index.format,
        };
        let files = self.index.files.clone();
        Ok((LayerIndex::with_spans(blob, files, chunks, spans)?, all))
    }

    /// The chunk in the span it belongs to now, whose digests get its own.
    fn moved(
        &self,
        (id, chunk): (ChunkId, &Chunk),
        entries: &[Entry],
        old: &OldDetails,
        digests: &mut [Vec<[u8; 32]>],
    ) -> Option<Chunk> {
        let Encoding::GzipSpan { blob, span, .. } = chunk.encoding else {
            return Some(chunk.clone());
        };
        let start = *self.starts.get(usize::try_from(id).ok()?)?;
        let behind = entries.partition_point(|entry| entry.seam.decoded <= start);
        let to = behind.checked_sub(1)?;
        let seam = entries.get(to)?.seam;
        let first = self
            .index
            .spans
            .get(usize::try_from(span).ok()?)?
            .first_chunk;
        digests
            .get_mut(to)?
            .push(old.digest(span, id.checked_sub(first)?)?);
        Some(Chunk {
            encoding: Encoding::GzipSpan {
                blob: ByteRange::new(seam.start, blob.end())?,
                skip: start.checked_sub(seam.decoded)?,
                span: u32::try_from(to).ok()?,
            },
            ..chunk.clone()
        })
    }
}
