//! What reading a layer costs, counted.
//!
//! Invariant: counters only grow. They order nothing, so relaxed atomics suffice.

use std::sync::atomic::{AtomicU64, Ordering};

/// What reading a layer has cost so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerCounters {
    /// Ranged requests sent to the source.
    pub requests: u64,
    /// Those of them that were sent because a first one was late.
    pub second_tries: u64,
    /// Encoded bytes received from the source.
    pub bytes_fetched: u64,
    /// Chunks fetched, verified and stored.
    pub chunks_filled: u64,
    /// Chunks that another layer of this node had, verified and stored.
    pub chunks_copied: u64,
    /// Their decoded bytes.
    pub bytes_copied: u64,
    /// Pieces that did not decode or verify and were dropped.
    pub chunks_corrupt: u64,
    /// Bytes received of the details of an index that came without them.
    pub details_fetched: u64,
}

/// The live counters; see [`LayerCounters`].
#[derive(Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) second_tries: AtomicU64,
    pub(super) bytes_fetched: AtomicU64,
    pub(super) chunks_filled: AtomicU64,
    pub(super) chunks_copied: AtomicU64,
    pub(super) bytes_copied: AtomicU64,
    pub(super) chunks_corrupt: AtomicU64,
    pub(super) details_fetched: AtomicU64,
}

impl Counters {
    /// A copy of all counters; not one instant's, each on its own.
    pub(super) fn snapshot(&self) -> LayerCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LayerCounters {
            requests: read(&self.requests),
            second_tries: read(&self.second_tries),
            bytes_fetched: read(&self.bytes_fetched),
            chunks_filled: read(&self.chunks_filled),
            chunks_copied: read(&self.chunks_copied),
            bytes_copied: read(&self.bytes_copied),
            chunks_corrupt: read(&self.chunks_corrupt),
            details_fetched: read(&self.details_fetched),
        }
    }
}

pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
