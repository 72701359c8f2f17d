//! Giving a gzip index the spans that its starts want.
//!
//! A start that reads in the middle of a span fetches the span from its start. With the
//! layer's seams ([`super::seams`]) an index can begin a span where the read begins, for
//! some KiB of window; and give up windows between spans that no start reads, so that all
//! of it stays small. Ids, places, lengths and digests of chunks stay what they were: only
//! the spans differ, and what each chunk says of its span.
//!
//! Three steps: [`Shaper::splits`] tells where a span is worth splitting; whoever has the
//! data file makes the windows; [`Shaper::choose`] takes as many as fit, and
//! [`Shaper::build`] makes the index. Invariant: pure; whatever seams and hot chunks say,
//! what comes out is a checked index of the same chunks, or an error.

mod build;
mod choose;
mod layout;
pub mod members;

use std::ops::Range;

pub use self::build::OldDetails;
pub use self::choose::Entry;
pub use self::layout::{Layout, Stretch};
use super::seams::{Seam, Seams};
use super::{ChunkId, Encoding, LayerIndex, Span};
use crate::{Error, Result};

/// Encoded bytes that a split must save. A request for less costs as much as the bytes.
const SAVED_BYTES_MIN: u64 = 8 << 10;

/// A place worth beginning a span at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Where.
    pub seam: Seam,
    /// Encoded bytes of the span that starts would not fetch any more.
    pub saved: u64,
}

/// One layer about to be shaped.
pub struct Shaper {
    index: LayerIndex,
    /// Where each chunk begins in the tar.
    starts: Vec<u64>,
    /// Where each span begins.
    spans: Vec<Seam>,
    seams: Vec<Seam>,
    /// Chunks that starts read, ascending.
    hot: Vec<ChunkId>,
}

impl Shaper {
    /// For `index`, as it was made, with `hot` what starts read, in any order. Fails where
    /// `seams` are not those of this index.
    pub fn new(index: LayerIndex, seams: &Seams, hot: &[ChunkId]) -> Result<(Self, Layout)> {
        let layout = Layout::new(&index, seams)?;
        let starts = layout.starts(&index)?;
        let spans = span_places(&index, &starts, &seams.seams)?;
        let mut hot = hot.to_vec();
        hot.sort_unstable();
        hot.dedup();
        let shaper = Self {
            index,
            starts,
            spans,
            seams: seams.seams.clone(),
            hot,
        };
        Ok((shaper, layout))
    }

    /// Where spans are worth splitting; ascending. What one saves does not depend on
    /// whether another is made.
    pub fn splits(&self) -> Vec<Split> {
        let mut splits = Vec::new();
        let mut fetched = (0, 0);
        for id in &self.hot {
            let Some((span, blob, start)) = self.in_span(*id) else {
                continue;
            };
            if fetched.0 != blob.start() {
                fetched = (blob.start(), blob.start());
            }
            let seam = last_at(&self.seams, start).filter(|seam| seam.decoded > span.decoded);
            if let Some(seam) = seam {
                let saved = seam.start.saturating_sub(fetched.1);
                if saved >= SAVED_BYTES_MIN {
                    splits.push(Split { seam: *seam, saved });
                }
            }
            fetched.1 = fetched.1.max(blob.end());
        }
        splits
    }

    /// Encoded bytes that reading all hot chunks takes with this index, or with `other` of
    /// the same layer.
    pub fn fetched(&self, other: Option<&LayerIndex>) -> u64 {
        fetched_bytes(other.unwrap_or(&self.index), &self.hot)
    }

    fn in_span(&self, id: ChunkId) -> Option<(&Seam, crate::types::ByteRange, u64)> {
        let at = usize::try_from(id).ok()?;
        let Encoding::GzipSpan { blob, span, .. } = self.index.chunks.get(at)?.encoding else {
            return None;
        };
        let span = self.spans.get(usize::try_from(span).ok()?)?;
        Some((span, blob, *self.starts.get(at)?))
    }
}

/// Encoded bytes that reading `hot` (ascending) takes, each span once from its start.
pub fn fetched_bytes(index: &LayerIndex, hot: &[ChunkId]) -> u64 {
    let (mut all, mut last) = (0_u64, (u64::MAX, 0));
    for id in hot {
        let chunk = usize::try_from(*id).ok();
        let chunk = chunk.and_then(|at| index.chunks.get(at));
        let Some(blob) = chunk.and_then(|chunk| chunk.encoding.blob()) else {
            continue;
        };
        let from = if last.0 == blob.start() {
            last.1
        } else {
            blob.start()
        };
        all = all.saturating_add(blob.end().saturating_sub(from));
        last = (blob.start(), blob.end().max(from));
    }
    all
}

/// Where the spans begin, which their chunks tell and the seams must too.
fn span_places(index: &LayerIndex, starts: &[u64], seams: &[Seam]) -> Result<Vec<Seam>> {
    let place = |span: &Span| {
        let chunks = index.chunks.get(chunks_of(span))?;
        let starts = starts.get(chunks_of(span))?;
        let mut places = chunks.iter().zip(starts);
        let begin = |(chunk, start): (&super::Chunk, &u64)| match chunk.encoding {
            Encoding::GzipSpan { skip, .. } => start.checked_sub(skip),
            _ => None,
        };
        let seam = Seam {
            start: span.start,
            bits: span.bits,
            decoded: begin(places.next()?)?,
        };
        let agree = places.all(|place| begin(place) == Some(seam.decoded));
        (agree
            && seams
                .binary_search_by_key(&seam.decoded, |s| s.decoded)
                .is_ok_and(|at| seams.get(at) == Some(&seam)))
        .then_some(seam)
    };
    index
        .spans
        .iter()
        .map(place)
        .collect::<Option<_>>()
        .ok_or_else(|| foreign("its spans are not at seams"))
}

/// The chunks of a span, as positions.
fn chunks_of(span: &Span) -> Range<usize> {
    let at = |id: u32| usize::try_from(id).unwrap_or(usize::MAX);
    at(span.first_chunk)..at(span.first_chunk.saturating_add(span.chunk_count))
}

fn last_at(seams: &[Seam], decoded: u64) -> Option<&Seam> {
    let behind = seams.partition_point(|seam| seam.decoded <= decoded);
    seams.get(behind.checked_sub(1)?)
}

fn foreign(detail: &str) -> Error {
    Error::malformed(
        "seams of a layer",
        format!("they are of another index: {detail}"),
    )
}

#[cfg(test)]
mod tests;
