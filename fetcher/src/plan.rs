//! Wanted chunks to merged ranged requests.
//!
//! Invariant: every wanted chunk is in exactly one request, requests are in blob order
//! and within the limits, except that a piece that exceeds a limit alone is requested
//! alone. What the limits should be on a given link is [`PlanLimits::on`]. Pure: no I/O, no clock, no state.

mod expand;
mod shape;

use crate::index::{Chunk, ChunkId, LayerIndex};
use crate::types::ByteRange;
use crate::{Error, Result};

pub(crate) use expand::{ahead, first_bytes, siblings};

/// Decoded bytes from a member's start to the end of a wanted chunk: what the limits of
/// an index on a chunk's place in its member and on its length come to together. Reading
/// the chunk decodes all of them.
pub const MEMBER_SPAN_MAX: u64 = 128 << 20;

/// What a request may be. All in encoded bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanLimits {
    /// Unwanted bytes in a row worth fetching to save a request.
    pub gap_bytes_max: u64,
    /// Wanted bytes that a request must have for each unwanted one; 0 where it may have
    /// as many of those as the gaps come to.
    pub wanted_per_gap: u64,
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
            request_bytes_max: 8 << 20,
            total_bytes_max: 64 << 20,
        }
    }
}

/// One ranged request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Bytes of the blob to ask for, never empty.
    pub blob: ByteRange,
    /// The pieces to decode from them, in blob order.
    pub members: Vec<Member>,
}

impl Request {
    /// A request for pieces that have one part of the blob in common.
    pub fn of(member: Member) -> Self {
        Self {
            blob: member.blob,
            members: vec![member],
        }
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
    let mut plan = Plan::default();
    let mut total = 0_u64;
    // Bytes of the last request that are of no member.
    let mut gaps = 0_u64;
    for member in members(index, wanted)? {
        let joined = plan
            .requests
            .last()
            .and_then(|request| join(request.blob, gaps, member.blob, limits));
        let grows = match (joined, plan.requests.last()) {
            (Some(blob), Some(request)) => blob.len() - request.blob.len(),
            _ => member.blob.len(),
        };
        let fits = total.saturating_add(grows) <= limits.total_bytes_max;
        if !plan.rest.is_empty() || !fits && !plan.requests.is_empty() {
            plan.rest.extend(member.chunks);
            continue;
        }
        total = total.saturating_add(grows);
        match (joined, plan.requests.last_mut()) {
            (Some(blob), Some(request)) => {
                gaps += member.blob.start() - request.blob.end();
                request.blob = blob;
                request.members.push(member);
            }
            _ => {
                gaps = 0;
                plan.requests.push(Request::of(member));
            }
        }
    }
    plan.rest.sort_unstable();
    Ok(plan)
}

/// `request`, which has `gaps` unwanted bytes, and `next` as one request, if that is
/// allowed and worth it. Never for parts that overlap: who takes a request apart takes each
/// byte once.
fn join(request: ByteRange, gaps: u64, next: ByteRange, limits: PlanLimits) -> Option<ByteRange> {
    let gap = next.start().checked_sub(request.end())?;
    let both = request.cover(&next);
    let gaps = gaps.saturating_add(gap);
    let wanted = both.len().saturating_sub(gaps);
    let is_near = gap <= limits.gap_bytes_max;
    let is_dense = gap == 0 || gaps.saturating_mul(limits.wanted_per_gap) <= wanted;
    (is_near && is_dense && both.len() <= limits.request_bytes_max).then_some(both)
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
                 {MEMBER_SPAN_MAX} are; pull the image whole with --full"
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
