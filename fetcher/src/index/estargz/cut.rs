//! Cutting long chunks of a TOC into pieces.
//!
//! Builders of eStargz write chunks of 4 MiB, and a TOC has one digest for each. All of a chunk
//! is fetched, decoded and verified at once then, but nothing says that all of it must be
//! counted as one: cut into pieces that have that digest together, what is evicted of it later,
//! and what was learned of it meanwhile, is told apart. Invariant: pieces of a chunk cover it,
//! and vouch for nothing but each other; every other chunk stays as it is. Pure.

use crate::Result;
use crate::index::details::Spans;
use crate::index::ingest::PIECE_LEN;
use crate::index::{Chunk, Encoding, LayerBlob, LayerIndex};
use crate::types::ByteRange;

/// Shortest chunk that is cut: two pieces are hardly worth their entries.
const CUT_LEN_MIN: u32 = 2 * PIECE_LEN + 1;
/// Longest chunk that is cut, for all its pieces are held while they are verified. Builders
/// write half of it unless they are told otherwise.
const CUT_LEN_MAX: u32 = 8 << 20;

/// `index` with its long chunks cut, and the details of its spans.
pub fn cut(index: LayerIndex) -> Result<(LayerIndex, Vec<u8>)> {
    let (mut chunks, mut spans) = (Vec::new(), Spans::default());
    let mut end = 0;
    for (at, chunk) in index.chunks.iter().enumerate() {
        let before = at.checked_sub(1).and_then(|at| index.chunks.get(at));
        let behind = index.chunks.get(at.saturating_add(1));
        match member(chunk, end).filter(|_| is_alone(chunk, [before, behind])) {
            Some((blob, digest)) => {
                end = blob.end();
                let Ok(number) = u32::try_from(spans.count()) else {
                    chunks.push(chunk.clone());
                    continue;
                };
                spans.push((blob.start(), 0), &[digest], &[])?;
                chunks.extend(pieces(chunk, blob, number));
            }
            None => chunks.push(chunk.clone()),
        }
    }
    let blob = LayerBlob {
        digest: index.blob_digest,
        size: index.blob_size,
        format: index.format,
    };
    let (spans, details) = spans.finish();
    let index = LayerIndex::with_spans(blob, index.files, chunks, spans)?;
    Ok((index, details))
}

/// Member and digest of a chunk that is worth cutting and begins at or behind `end`, where the
/// last one that was cut ends.
fn member(chunk: &Chunk, end: u64) -> Option<(ByteRange, [u8; 32])> {
    let Encoding::GzipMember { blob, skip: 0 } = chunk.encoding else {
        return None;
    };
    let is_long = (CUT_LEN_MIN..=CUT_LEN_MAX).contains(&chunk.len);
    let digest = chunk.chunk_digest.filter(|_| is_long)?;
    (blob.start() >= end).then_some((blob, digest))
}

/// Whether none of its neighbours is in the chunk's member.
fn is_alone(chunk: &Chunk, neighbours: [Option<&Chunk>; 2]) -> bool {
    let start = |chunk: &Chunk| chunk.encoding.blob().map(|blob| blob.start());
    let mut neighbours = neighbours.into_iter().flatten();
    neighbours.all(|other| start(other) != start(chunk))
}

fn pieces(chunk: &Chunk, blob: ByteRange, span: u32) -> impl Iterator<Item = Chunk> {
    let (len, data_offset) = (chunk.len, chunk.data_offset);
    let count = len.div_ceil(PIECE_LEN);
    (0..count).map(move |number| {
        let before = number.saturating_mul(PIECE_LEN);
        let skip = u64::from(before);
        Chunk {
            encoding: Encoding::WholeMember { blob, skip, span },
            data_offset: data_offset.saturating_add(skip),
            len: len.saturating_sub(before).min(PIECE_LEN),
            chunk_digest: None,
        }
    })
}

#[cfg(test)]
mod tests;
