//! Lazy or whole: the decision for one layer of one start, alone.
//!
//! A layer that can be read lazily is always mounted at once. The question is whether all of
//! it is fetched behind the readers, in few large requests. It is
//! - where all that is missing is *small*: the requests of its readers, one after another,
//!   would take longer than two round trips, in which the link carries as much;
//! - where a profile *covers* most of what is missing: the rest costs little, and nobody
//!   waits for the reads that the profile did not foresee.
//!
//! A profile that names little of a layer, or nothing, says that the rest is not needed:
//! then only what costs no more than a request anyway comes along.
//!
//! Invariant: pure; a layer that lacks fewer bytes, or of which the profile covers more, is
//! never treated more lazily.

use serde::Serialize;

use super::members;
use crate::index::{ChunkId, LayerIndex};
use crate::link::Link;

/// What costs about as much as asking for it: the headers, and the server's work.
const SMALL_BYTES_MIN: u64 = 128 << 10;
/// What is small on no link: starts should not fetch megabytes that nobody reads.
const SMALL_BYTES_MAX: u64 = 2 << 20;
/// Round trips in which a small layer comes.
const ROUND_TRIPS: u64 = 2;
/// Percent of what is missing that a profile covers if it covers most.
const COVERED_PERCENT: u64 = 70;

/// What is known of a layer. All in encoded bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerFacts {
    /// What of its pieces is not here, about.
    pub missing_bytes: u64,
    /// What of that a profile of this very command names, if there is one.
    pub covered_bytes: Option<u64>,
    /// The link it would come over.
    pub link: Link,
}

/// How a layer is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Share {
    /// What is read, or expected to be.
    Lazy,
    /// All of it.
    Full,
}

/// Why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Nothing is missing.
    Complete,
    /// It has no table: it had to be streamed.
    NoTable,
    /// All of it comes in two round trips.
    Small,
    /// The profile names most of it.
    Covered,
    /// The profile names nothing, or too little, of it.
    Uncovered,
    /// It is large, and nothing says what of it will be read.
    Large,
}

impl Why {
    /// A word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::NoTable => "no table",
            Self::Small => "small",
            Self::Covered => "covered by the profile",
            Self::Uncovered => "not covered by the profile",
            Self::Large => "large",
        }
    }
}

/// Decides about one layer that has a table.
pub fn decide(facts: &LayerFacts) -> (Share, Why) {
    let missing = facts.missing_bytes;
    if missing == 0 {
        return (Share::Full, Why::Complete);
    }
    let two_trips = facts.link.round_trip_bytes().saturating_mul(ROUND_TRIPS);
    match facts.covered_bytes {
        None if missing <= two_trips.clamp(SMALL_BYTES_MIN, SMALL_BYTES_MAX) => {
            (Share::Full, Why::Small)
        }
        None => (Share::Lazy, Why::Large),
        Some(0) => (Share::Lazy, Why::Uncovered),
        Some(covered) if is_most(covered, missing) => (Share::Full, Why::Covered),
        Some(_) if missing <= SMALL_BYTES_MIN => (Share::Full, Why::Small),
        Some(_) => (Share::Lazy, Why::Uncovered),
    }
}

fn is_most(covered: u64, missing: u64) -> bool {
    u128::from(covered) * 100 >= u128::from(missing) * u128::from(COVERED_PERCENT)
}

/// The share of `bytes` that `part` of `whole` stands for, rounded up.
pub(crate) fn part_of(bytes: u64, part: u64, whole: u64) -> u64 {
    let scaled = u128::from(bytes) * u128::from(part);
    let scaled = scaled.div_ceil(u128::from(whole.max(1)));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// Encoded bytes that are fetched for `ids` of `index`; none if one of them cannot be
/// fetched alone.
pub(crate) fn encoded_bytes(index: &LayerIndex, ids: &[ChunkId]) -> Option<u64> {
    let members = members(index, ids).ok()?;
    Some(members.iter().map(|member| member.blob.len()).sum())
}

#[cfg(test)]
mod tests;
