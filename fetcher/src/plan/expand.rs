//! Which chunks are worth fetching together with wanted ones.
//!
//! Invariant: linear in what is looked at, however a hostile table is laid out, and what
//! comes along is bounded in encoded bytes, decoded bytes and number. Pure.

use super::{PlanLimits, begins_in, chunk};
use crate::index::{ChunkId, LayerIndex};
use crate::types::ByteRange;

/// Chunks that come along at most: more are not small files next to each other.
const AHEAD_CHUNKS_MAX: usize = 256;
/// Decoded bytes per encoded byte that may come along. Text shrinks 4 to 6 times; what
/// shrinks more costs more to decode than it saves.
const AHEAD_EXPANSION_MAX: u64 = 8;

/// The chunks in `wanted` (ascending) that share encoded bytes with others, and those
/// others as far as they are next to them in the table. Ascending; each is looked at once.
pub(crate) fn siblings(index: &LayerIndex, wanted: &[ChunkId]) -> Vec<ChunkId> {
    let mut found = Vec::new();
    // Everything below was looked at for an earlier one.
    let mut next = 0;
    for id in wanted.iter().copied() {
        if id < next {
            continue;
        }
        let Some(blob) = member(index, id) else {
            continue;
        };
        let same = |other: &ChunkId| member(index, *other).is_some_and(|other| within(other, blob));
        let start = (next..id).rev().take_while(same).last().unwrap_or(id);
        next = id.saturating_add(1);
        next = (next..).find(|other| !same(other)).unwrap_or(next);
        found.extend(start..next);
    }
    found
}

/// The chunks that those of `wanted` can only be verified with, where there are others.
/// Ascending if `wanted` does.
pub(crate) fn whole_members(index: &LayerIndex, wanted: &[ChunkId]) -> Vec<ChunkId> {
    let mut found = Vec::new();
    let mut last = 0..0;
    for id in wanted {
        if !last.contains(id) {
            last = index.verified_with(*id);
            if last.len() > 1 {
                found.extend(last.clone());
            }
        }
    }
    found
}

/// Missing chunks whose encoded bytes follow those of `last` closely enough to come with
/// them: all within `bytes_max` behind its member, in one request with it by `limits`, and
/// up to the first member that is not missing.
pub(crate) fn ahead(
    index: &LayerIndex,
    last: ChunkId,
    bytes_max: u64,
    limits: PlanLimits,
    is_missing: impl Fn(ChunkId) -> bool,
) -> Vec<ChunkId> {
    let mut found = Vec::new();
    let Some(wanted) = member(index, last) else {
        return found;
    };
    let request_end = wanted.start().saturating_add(limits.request_bytes_max);
    let end_max = wanted.end().saturating_add(bytes_max).min(request_end);
    let mut decoded_left = bytes_max.saturating_mul(AHEAD_EXPANSION_MAX);
    let (mut fetched_to, mut current) = (wanted.end(), wanted);
    let behind = last.saturating_add(1)..;
    for id in behind.take(AHEAD_CHUNKS_MAX) {
        let Some(blob) = member(index, id) else { break };
        let is_near = match blob.start().checked_sub(fetched_to) {
            Some(gap) => gap <= limits.gap_bytes_max,
            None => blob.start() == current.start() || begins_in(current, blob),
        };
        if !is_near || blob.end() > end_max {
            break;
        }
        if !is_missing(id) {
            if blob.start() == current.start() {
                continue;
            }
            // What is beyond it would bring its bytes once more, for a guess.
            break;
        }
        let len = chunk(index, id).map_or(0, |chunk| u64::from(chunk.len));
        let Some(left) = decoded_left.checked_sub(len) else {
            break;
        };
        decoded_left = left;
        (fetched_to, current) = (blob.end().max(fetched_to), blob);
        found.push(id);
    }
    found
}

/// The first of `ids` whose members come to at most `bytes_max` encoded bytes; one member
/// at least, and none in part.
pub(crate) fn first_bytes(
    index: &LayerIndex,
    ids: impl Iterator<Item = ChunkId>,
    bytes_max: u64,
) -> Vec<ChunkId> {
    let mut found = Vec::new();
    let (mut total, mut current) = (0_u64, None::<ByteRange>);
    for id in ids {
        if let Some(blob) = member(index, id) {
            // Of a member that is counted in part, what is new.
            let from = match current.filter(|current| current.start() == blob.start()) {
                Some(current) => current.end(),
                None => blob.start(),
            };
            total = total.saturating_add(blob.end().saturating_sub(from));
            current = Some(
                current
                    .filter(|c| within(*c, blob))
                    .map_or(blob, |c| c.cover(&blob)),
            );
        }
        if total > bytes_max && !found.is_empty() {
            break;
        }
        found.push(id);
    }
    found
}

/// Whether decoding `blob` passes `other` on the way.
fn within(other: ByteRange, blob: ByteRange) -> bool {
    other.start() == blob.start() && other.end() <= blob.end()
}

/// Encoded bytes of the chunk; `None` if it cannot be fetched alone or does not exist.
fn member(index: &LayerIndex, id: ChunkId) -> Option<ByteRange> {
    chunk(index, id).ok()?.encoding.blob()
}
