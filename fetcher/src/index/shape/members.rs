//! Giving eStargz members that were verified whole spans of their own.
//!
//! A TOC has one digest for a chunk of 4 MiB. Once this node decoded and verified such a
//! member, it knows the digests of its pieces and where decoding each can begin; with those
//! the member is as good as a gzip layer that this node indexed: a reader fetches it from the
//! last entry before the first piece it wants up to the last piece it wants. Entries in its
//! middle cost a window each, so there are some only where starts begin to read.
//!
//! Invariant: pure; pieces keep id, place and length, members of which nothing was learned
//! stay what they are, and what comes out is a checked index, or an error.

use std::collections::BTreeMap;

use super::{OldDetails, SAVED_BYTES_MIN, foreign};
use crate::Result;
use crate::index::details::Spans;
use crate::index::seams::Seam;
use crate::index::{Chunk, ChunkId, Encoding, LayerBlob, LayerIndex};
use crate::types::ByteRange;

/// What is known of one piece of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LearnedPiece {
    /// Where decoding it can begin in the blob, and how far that is in the member.
    pub entry: Seam,
    /// Where its encoded bytes end in the blob.
    pub end: u64,
    /// SHA-256 of its bytes.
    pub digest: [u8; 32],
}

/// What is known of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LearnedMember {
    first: ChunkId,
    pieces: Vec<LearnedPiece>,
}

/// A piece at which a span may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberSplit {
    /// The piece.
    pub id: ChunkId,
    /// Where the span would begin.
    pub entry: Seam,
    /// Encoded bytes that starts would not fetch any more.
    pub saved: u64,
}

impl LearnedMember {
    /// Of the member whose pieces in `index` are `first` and those behind it, if that is
    /// what `pieces` can be: they come from a disk.
    pub fn new(index: &LayerIndex, first: ChunkId, pieces: Vec<LearnedPiece>) -> Option<Self> {
        let ids = index.verified_with(first);
        if ids.start != first || ids.len() != pieces.len() {
            return None;
        }
        let (mut start, mut end) = (0, 0);
        for (id, piece) in ids.zip(&pieces) {
            let chunk = index.chunks.get(usize::try_from(id).ok()?)?;
            let Encoding::WholeMember { blob, skip, .. } = chunk.encoding else {
                return None;
            };
            let range = ByteRange::new(piece.entry.start, piece.end)?;
            let ascends = piece.entry.start >= start && piece.end >= end;
            let is_inside = blob.contains(&range) && !range.is_empty();
            let can_begin = piece.entry.decoded <= skip && piece.entry.bits < 8;
            if !(ascends && is_inside && can_begin && piece.digest != [0; 32]) {
                return None;
            }
            (start, end) = (piece.entry.start, piece.end);
        }
        Some(Self { first, pieces })
    }

    /// Number of its pieces.
    pub fn count(&self) -> usize {
        self.pieces.len()
    }

    fn ids(&self) -> std::ops::Range<ChunkId> {
        let count = ChunkId::try_from(self.pieces.len()).unwrap_or(ChunkId::MAX);
        self.first..self.first.saturating_add(count)
    }

    fn piece(&self, id: ChunkId) -> Option<&LearnedPiece> {
        let at = usize::try_from(id.checked_sub(self.first)?).ok()?;
        self.pieces.get(at)
    }

    /// Where a span is worth beginning, for starts that read `hot` (ascending); ascending.
    /// What one saves does not depend on whether another is made.
    pub fn splits(&self, hot: &[ChunkId]) -> Vec<MemberSplit> {
        let ids = self.ids();
        let from = hot.partition_point(|id| *id < ids.start);
        let to = hot.partition_point(|id| *id < ids.end);
        let (mut splits, mut fetched) = (Vec::new(), None);
        for id in hot.get(from..to).unwrap_or_default() {
            let Some(piece) = self.piece(*id) else {
                continue;
            };
            let begin = self.pieces.first().map_or(0, |first| first.entry.start);
            let before = fetched.unwrap_or(begin);
            let saved = piece.entry.start.saturating_sub(before);
            if saved >= SAVED_BYTES_MIN && piece.entry.decoded > 0 {
                let (id, entry) = (*id, piece.entry);
                splits.push(MemberSplit { id, entry, saved });
            }
            fetched = Some(piece.end.max(before));
        }
        splits
    }
}

/// The index in which each of `members` (ascending) has spans: one from its start, and one
/// from each piece that `windows` has a window for, packed; and the details of all spans.
/// `old` are the details of `index`.
pub fn build(
    index: &LayerIndex,
    old: &OldDetails,
    members: &[LearnedMember],
    windows: &BTreeMap<ChunkId, Vec<u8>>,
) -> Result<(LayerIndex, Vec<u8>)> {
    let mut made = Made::default();
    let mut members = members.iter().peekable();
    for (id, chunk) in (0..).zip(&index.chunks) {
        while members.next_if(|member| member.ids().end <= id).is_some() {}
        let member = members.peek().filter(|member| member.ids().contains(&id));
        let kept = match (member, chunk.encoding) {
            (Some(member), _) => {
                let window = match id == member.first {
                    true => Some(&[][..]),
                    false => windows.get(&id).map(Vec::as_slice),
                };
                member
                    .piece(id)
                    .and_then(|piece| made.piece(chunk, piece, window))
            }
            (None, Encoding::WholeMember { span, .. }) => old
                .digest(span, 0)
                .and_then(|digest| made.whole(chunk, digest)),
            (None, _) => Some(chunk.clone()),
        };
        let kept = kept.ok_or_else(|| foreign("a piece is not in its member"))?;
        made.chunks.push(kept);
    }
    made.end_span()?;
    let blob = LayerBlob {
        digest: index.blob_digest,
        size: index.blob_size,
        format: index.format,
    };
    let (spans, details) = made.spans.finish();
    let index = LayerIndex::with_spans(blob, index.files.clone(), made.chunks, spans)?;
    Ok((index, details))
}

/// Tables under construction.
#[derive(Default)]
struct Made {
    chunks: Vec<Chunk>,
    spans: Spans,
    last: Option<Open>,
}

/// The span that the last chunk is in.
struct Open {
    seam: Seam,
    digests: Vec<[u8; 32]>,
    window: Vec<u8>,
    /// Whether it is a member of which nothing was learned.
    is_whole: bool,
}

impl Made {
    /// A piece that is in the span before, or begins one that has `window`.
    fn piece(
        &mut self,
        chunk: &Chunk,
        piece: &LearnedPiece,
        window: Option<&[u8]>,
    ) -> Option<Chunk> {
        if let Some(window) = window {
            self.begin(piece.entry, window, false).ok()?;
        }
        let open = self.last.as_mut().filter(|open| !open.is_whole)?;
        open.digests.push(piece.digest);
        let encoding = Encoding::GzipSpan {
            blob: ByteRange::new(open.seam.start, piece.end)?,
            skip: chunk.encoding.skip().checked_sub(open.seam.decoded)?,
            span: self.number()?,
        };
        Some(Chunk {
            encoding,
            ..chunk.clone()
        })
    }

    /// A piece of a member that stays whole, with its `digest`.
    fn whole(&mut self, chunk: &Chunk, digest: [u8; 32]) -> Option<Chunk> {
        let Encoding::WholeMember { blob, skip, .. } = chunk.encoding else {
            return None;
        };
        let is_begun = |open: &Open| open.is_whole && open.seam.start == blob.start();
        if !self.last.as_ref().is_some_and(is_begun) {
            let seam = Seam {
                start: blob.start(),
                bits: 0,
                decoded: 0,
            };
            self.begin(seam, &[], true).ok()?;
            self.last.as_mut()?.digests.push(digest);
        }
        let span = self.number()?;
        let encoding = Encoding::WholeMember { blob, skip, span };
        Some(Chunk {
            encoding,
            ..chunk.clone()
        })
    }

    fn begin(&mut self, seam: Seam, window: &[u8], is_whole: bool) -> Result<()> {
        self.end_span()?;
        self.last = Some(Open {
            seam,
            digests: Vec::new(),
            window: window.to_vec(),
            is_whole,
        });
        Ok(())
    }

    /// Number of the span that is open.
    fn number(&self) -> Option<u32> {
        u32::try_from(self.spans.count()).ok()
    }

    fn end_span(&mut self) -> Result<()> {
        let Some(open) = self.last.take() else {
            return Ok(());
        };
        let begin = (open.seam.start, open.seam.bits);
        self.spans.push(begin, &open.digests, &open.window)
    }
}

#[cfg(test)]
mod tests;
