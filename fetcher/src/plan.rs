//! Wanted chunks to merged ranged requests.
//!
//! Invariant: every wanted chunk is in exactly one request, requests are in blob order
//! and within the limits, except that a piece that exceeds a limit alone is requested
//! alone. What the limits should be on a given link is [`PlanLimits::on`]. Pure: no I/O, no clock, no state.

mod expand;
mod shape;
pub mod whole;

use crate::index::{Chunk, ChunkId, LayerIndex};
use crate::types::ByteRange;
use crate::{Error, Result};

pub(crate) use expand::{ahead, first_bytes, siblings, whole_members};

/// Decoded bytes from a member's start to the end of a wanted chunk: what the limits of
/// an index on a chunk's place in its member and on its length come to together. Reading
/// the chunk decodes all of them.
pub const MEMBER_SPAN_MAX: u64 = 128 << 20;

/// Encoded bytes that two pieces may have in common and still be of one request: a chunk
/// that begins in a span of gzip and ends in the next, where the other is wanted too.
const OVERLAP_BYTES_MAX: u64 = 128 << 10;

/// What a request may be. All in encoded bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanLimits {
    /// Unwanted bytes in a row worth fetching to save a request.
    pub gap_bytes_max: u64,
    /// Wanted bytes that a request must have for each unwanted one; 0 where it may have
    /// as many of those as the gaps come to.
    pub wanted_per_gap: u64,
    /// Parts of the blob that a request may ask for, at least 1.
    pub parts_max: usize,
    /// Longest request. Longer ones save nothing and make a failure dearer.
    pub request_bytes_max: u64,
    /// Longest all requests of a plan together.
    pub total_bytes_max: u64,
}

impl Default for PlanLimits {
    fn default() -> Self {
        Self {
            gap_bytes_max: 64 << 10,
            wanted_per_gap: 0,
            parts_max: 1,
            request_bytes_max: 8 << 20,
            total_bytes_max: 64 << 20,
        }
    }
}

/// One ranged request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Bytes of the blob to ask for: ascending, apart, none empty, at least one.
    pub parts: Vec<ByteRange>,
    /// The pieces to decode from them, in blob order; each lies in one part.
    pub members: Vec<Member>,
}

impl Request {
    /// A request for pieces that have one part of the blob in common.
    pub fn of(member: Member) -> Self {
        Self {
            parts: vec![member.blob],
            members: vec![member],
        }
    }

    /// Bytes it brings.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(ByteRange::len).sum()
    }

    /// Whether it brings none, which no planned request does.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the bytes of one of its members are in its answer.
    pub fn place(&self, member: ByteRange) -> Option<ByteRange> {
        let mut before = 0_u64;
        for part in &self.parts {
            if part.contains(&member) {
                return ByteRange::at(before + (member.start() - part.start()), member.len());
            }
            before += part.len();
        }
        None
    }

    /// What is left of it from the byte `start` of the blob on; `None` if no member is.
    pub fn rest(&self, start: u64) -> Option<Self> {
        let later = |part: &ByteRange| ByteRange::new(part.start().max(start), part.end());
        let parts = self.parts.iter().filter_map(later);
        let parts: Vec<ByteRange> = parts.filter(|part| !part.is_empty()).collect();
        let members = self.members.iter();
        let members = members.filter(|member| member.blob.start() >= start);
        let members: Vec<Member> = members.cloned().collect();
        (!members.is_empty()).then_some(Self { parts, members })
    }

    /// The chunks it yields, in the order in which they can be decoded.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkId> + '_ {
        let members = self.members.iter();
        members.flat_map(|member| member.chunks.iter().copied())
    }
}

/// Encoded bytes that decode to one or more wanted chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its bytes of the blob, as far as the last wanted chunk needs them.
    pub blob: ByteRange,
    /// The wanted chunks inside, ascending by what is skipped before them.
    pub chunks: Vec<ChunkId>,
}

/// What to ask for, and what is left for the next plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Requests in blob order.
    pub requests: Vec<Request>,
    /// Wanted chunks that did not fit `total_bytes_max`, ascending.
    pub rest: Vec<ChunkId>,
}

/// Plans how to fetch `wanted` (any order, no id twice) of `index`. At least one request
/// results from a wanted chunk, however long. A chunk that cannot be fetched alone is an
/// error, for then none of them should be fetched.
pub fn plan(index: &LayerIndex, wanted: &[ChunkId], limits: PlanLimits) -> Result<Plan> {
    Ok(of_members(members(index, wanted)?, limits))
}

/// Plans how to fetch `members`, which ascend in the blob.
pub(crate) fn of_members(members: Vec<Member>, limits: PlanLimits) -> Plan {
    let mut plan = Plan::default();
    let mut total = 0_u64;
    // Bytes of the last request that are of no member.
    let mut gaps = 0_u64;
    for member in members {
        let last = plan.requests.last();
        let joined = last.and_then(|request| join(request, gaps, member.blob, limits));
        let gap = match joined {
            Some(Joined::Over(gap)) => gap,
            Some(Joined::Into(_) | Joined::Beside) | None => 0,
        };
        let grows = match joined {
            Some(Joined::Into(new)) => new,
            _ => gap.saturating_add(member.blob.len()),
        };
        let fits = total.saturating_add(grows) <= limits.total_bytes_max;
        if !plan.rest.is_empty() || !fits && !plan.requests.is_empty() {
            plan.rest.extend(member.chunks);
            continue;
        }
        total = total.saturating_add(grows);
        match (joined, plan.requests.last_mut()) {
            (Some(joined), Some(request)) => {
                gaps += gap;
                match (joined, request.parts.last_mut()) {
                    (Joined::Over(_) | Joined::Into(_), Some(part)) => {
                        *part = part.cover(&member.blob)
                    }
                    _ => request.parts.push(member.blob),
                }
                request.members.push(member);
            }
            _ => {
                gaps = 0;
                plan.requests.push(Request::of(member));
            }
        }
    }
    plan.rest.sort_unstable();
    plan
}

/// How a piece goes into a request.
#[derive(Debug, Clone, Copy)]
enum Joined {
    /// With the last part, over a gap of so many bytes.
    Over(u64),
    /// With the last part, which has its first bytes already, and so many new ones.
    Into(u64),
    /// As a part of its own.
    Beside,
}

/// Whether `next` begins in the piece `last`, and so near its end that of that no more than
/// [`OVERLAP_BYTES_MAX`] has to be held for it.
fn begins_in(last: ByteRange, next: ByteRange) -> bool {
    let shared = last.end().checked_sub(next.start());
    next.start() > last.start() && shared.is_some_and(|shared| shared <= OVERLAP_BYTES_MAX)
}

/// How `next` goes into `request`, which has `gaps` unwanted bytes, if that is allowed and
/// worth it. One that [begins in](begins_in) the last piece goes with it.
fn join(request: &Request, gaps: u64, next: ByteRange, limits: PlanLimits) -> Option<Joined> {
    let end = request.parts.last()?.end();
    let Some(gap) = next.start().checked_sub(end) else {
        let last = request.members.last()?.blob;
        let new = next.end().checked_sub(end)?;
        let follows = last.end() == end && begins_in(last, next);
        let fits = request.len().saturating_add(new) <= limits.request_bytes_max;
        return (follows && fits).then_some(Joined::Into(new));
    };
    let apart = request.len().saturating_add(next.len());
    let together = apart.saturating_add(gap);
    let gaps = gaps.saturating_add(gap);
    let wanted = together.saturating_sub(gaps);
    let is_near = gap <= limits.gap_bytes_max;
    let is_dense = gap == 0 || gaps.saturating_mul(limits.wanted_per_gap) <= wanted;
    if is_near && is_dense && together <= limits.request_bytes_max {
        return Some(Joined::Over(gap));
    }
    let fits = gap > 0 && apart <= limits.request_bytes_max;
    (fits && request.parts.len() < limits.parts_max).then_some(Joined::Beside)
}

/// Wanted chunks by the encoded bytes they share, in blob order.
fn members(index: &LayerIndex, wanted: &[ChunkId]) -> Result<Vec<Member>> {
    let mut places = wanted
        .iter()
        .map(|id| place(index, *id))
        .collect::<Result<Vec<_>>>()?;
    places.sort_unstable_by_key(|place| (place.blob.start(), place.skip, place.id));
    let mut members: Vec<Member> = Vec::new();
    for place in places {
        match members.last_mut() {
            Some(member) if member.blob.start() == place.blob.start() => {
                member.blob = member.blob.cover(&place.blob);
                member.chunks.push(place.id);
            }
            _ => members.push(Member {
                blob: place.blob,
                chunks: vec![place.id],
            }),
        }
    }
    Ok(members)
}

struct Place {
    blob: ByteRange,
    skip: u64,
    id: ChunkId,
}

fn place(index: &LayerIndex, id: ChunkId) -> Result<Place> {
    let chunk = chunk(index, id)?;
    let Some(blob) = chunk.encoding.blob() else {
        return Err(Error::Unsupported {
            what: format!("fetching chunk {id} of layer {} alone", index.blob_digest),
            detail: format!(
                "a {:?} layer can only be read whole and this one is incomplete; \
                 remove the image and pull it again with --full",
                index.format
            ),
        });
    };
    let skip = chunk.encoding.skip();
    let span = skip.saturating_add(u64::from(chunk.len));
    if span > MEMBER_SPAN_MAX {
        return Err(Error::limit(
            format!("chunk {id} of layer {}", index.blob_digest),
            format!(
                "it ends {span} bytes into what is decoded with it, at most \
                 {MEMBER_SPAN_MAX} are; remove the image and pull it again: then this \
                 layer is streamed"
            ),
        ));
    }
    Ok(Place { blob, skip, id })
}

/// The chunk of this id.
pub(crate) fn chunk(index: &LayerIndex, id: ChunkId) -> Result<&Chunk> {
    let at = usize::try_from(id).ok();
    let chunk = at.and_then(|at| index.chunks.get(at));
    chunk.ok_or_else(|| Error::NotFound {
        what: format!("chunk {id} of layer {}", index.blob_digest),
        host: String::new(),
    })
}

#[cfg(test)]
mod tests;
