//! Places of a data file to the chunks that cover them.
//!
//! The layout of a data file follows from the layer's file table alone, so places stay
//! right when the same blob is opened with another index, whose chunks differ.
//!
//! Chunks that are decoded together come together, all at the earliest rank of any: the
//! encoded bytes before a later one are those of the earlier ones, and would be fetched
//! once more.
//!
//! Invariant: pure. Every chunk is named at most once. Time and memory are bounded by the
//! number of places and by the index, whatever places say.

use std::collections::{HashMap, HashSet};

use crate::index::{ChunkId, LayerIndex};
use crate::plan;
use crate::types::ByteRange;

/// Bytes of a data file that one place is about.
pub const BLOCK_BYTES: u64 = 64 << 10;
/// Bytes of one bit of [`Place::pages`]. Files begin at multiples of it, so small files
/// that share a block are told apart.
pub const PAGE_BYTES: u64 = 4 << 10;

/// Parts of one block of a data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the block: it begins at `block * BLOCK_BYTES`.
    pub block: u32,
    /// Which of its 16 pages, the lowest bit the first.
    pub pages: u16,
}

/// A chunk to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Position of its place in the profile, over all layers, or of the first place that
    /// wants a chunk decoded with it. Lower ones were read first.
    pub rank: u32,
    /// The chunk.
    pub id: ChunkId,
    /// Decoded length, bytes.
    pub len: u32,
}

/// What a profile wants of one layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerPlan {
    /// Chunks by rank, none twice; those of one rank ascending.
    pub wanted: Vec<Wanted>,
    /// Places that no chunk covers.
    pub unknown: u64,
}

/// The chunks of `index` that `places` touch. Each place comes with its rank; ranks
/// ascend.
pub fn chunks_of(index: &LayerIndex, places: impl IntoIterator<Item = (u32, Place)>) -> LayerPlan {
    let mut plan = LayerPlan::default();
    let mut known = HashSet::new();
    let mut blocks = HashSet::new();
    for (rank, place) in places {
        // A block named again adds nothing but work.
        let mut covered = !blocks.insert((place.block, place.pages));
        if !covered {
            for range in place.ranges() {
                for (id, len) in covering(index, range) {
                    covered = true;
                    if known.insert(id) {
                        plan.wanted.push(Wanted { rank, id, len });
                    }
                }
            }
        }
        plan.unknown += u64::from(!covered);
    }
    join(index, &mut plan.wanted);
    plan
}

/// Gives chunks that are decoded together the rank of the earliest of them.
fn join(index: &LayerIndex, wanted: &mut [Wanted]) {
    let mut earliest: HashMap<u64, u32> = HashMap::new();
    for each in &mut *wanted {
        let chunk = usize::try_from(each.id).ok();
        let chunk = chunk.and_then(|at| index.chunks.get(at));
        if let Some(blob) = chunk.and_then(|chunk| chunk.encoding.blob()) {
            each.rank = *earliest.entry(blob.start()).or_insert(each.rank);
        }
    }
    wanted.sort_unstable_by_key(|each| (each.rank, each.id));
}

/// `wanted` (by rank) with all that its chunks can only be verified with, which come with them.
pub(super) fn with_whole_members(index: &LayerIndex, wanted: Vec<Wanted>) -> Vec<Wanted> {
    let mut all = Vec::with_capacity(wanted.len());
    let mut last = 0..0;
    for each in wanted {
        if last.contains(&each.id) {
            continue;
        }
        last = index.verified_with(each.id);
        if last.len() <= 1 {
            all.push(each);
            continue;
        }
        // Those of one member have one rank, and so follow one another.
        all.extend(last.clone().filter_map(|id| {
            let chunk = index.chunks.get(usize::try_from(id).ok()?)?;
            let (rank, len) = (each.rank, chunk.len);
            Some(Wanted { rank, id, len })
        }));
    }
    all
}

impl Place {
    /// Number of bytes its pages have.
    pub fn bytes(&self) -> u64 {
        u64::from(self.pages.count_ones()) * PAGE_BYTES
    }

    /// Runs of its pages as ranges of the data file, ascending.
    pub fn ranges(self) -> impl Iterator<Item = ByteRange> {
        let start = u64::from(self.block) * BLOCK_BYTES;
        let mut pages = u32::from(self.pages);
        let mut at = 0_u32;
        std::iter::from_fn(move || {
            if pages == 0 {
                return None;
            }
            let skip = pages.trailing_zeros();
            pages >>= skip;
            let run = pages.trailing_ones();
            pages >>= run;
            let from = at + skip;
            at = from + run;
            ByteRange::at(
                start + u64::from(from) * PAGE_BYTES,
                u64::from(run) * PAGE_BYTES,
            )
        })
    }
}

/// Where these chunks are in the data file, in their order; those that follow one another are one.
pub(super) fn ranges_of(index: &LayerIndex, ids: &[ChunkId]) -> Vec<ByteRange> {
    let mut ranges: Vec<ByteRange> = Vec::new();
    for id in ids {
        let chunk = plan::chunk(index, *id).ok();
        let range = chunk.and_then(|chunk| ByteRange::at(chunk.data_offset, chunk.len.into()));
        let Some(range) = range else { continue };
        match ranges.last_mut() {
            Some(last) if range.start() == last.end() => *last = last.cover(&range),
            Some(_) | None => ranges.push(range),
        }
    }
    ranges
}

/// Chunks that have a byte in `range`, with their lengths.
fn covering(index: &LayerIndex, range: ByteRange) -> impl Iterator<Item = (ChunkId, u32)> + '_ {
    let chunks = &index.chunks;
    let end = |at: usize| {
        let chunk = chunks.get(at);
        chunk.map_or(0, |chunk| {
            chunk.data_offset.saturating_add(chunk.len.into())
        })
    };
    // Chunks are in the order of the data file and do not overlap: at most one that begins
    // before the range reaches into it.
    let after = chunks.partition_point(|chunk| chunk.data_offset < range.start());
    let from = match after.checked_sub(1) {
        Some(before) if end(before) > range.start() => before,
        Some(_) | None => after,
    };
    let rest = chunks.iter().enumerate().skip(from);
    rest.take_while(move |(_, chunk)| chunk.data_offset < range.end())
        .filter_map(|(id, chunk)| Some((ChunkId::try_from(id).ok()?, chunk.len)))
}

#[cfg(test)]
mod tests;
