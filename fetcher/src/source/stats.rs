//! Counters of the network source.
//!
//! Invariant: counters only grow. They order nothing, so relaxed atomics suffice.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a source has done since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SourceStats {
    /// HTTP requests sent, token requests included.
    pub requests: u64,
    /// Bytes of response bodies received, before any decoding.
    pub bytes_received: u64,
    /// Requests that were repeated after a failure, and bodies resumed.
    pub retries: u64,
    /// Requests to token endpoints.
    pub token_requests: u64,
    /// Redirects answered by registries (not those remembered).
    pub redirects: u64,
}

/// One counter of [`SourceStats`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum Count {
    Requests,
    Bytes,
    Retries,
    Tokens,
    Redirects,
}

/// The live counters.
#[derive(Debug, Default)]
pub(crate) struct Counters([AtomicU64; 5]);

impl Counters {
    /// Adds `n` to one counter.
    pub(crate) fn add(&self, which: Count, n: u64) {
        self.slot(which).fetch_add(n, Ordering::Relaxed);
    }

    /// A copy of all counters; not one instant's, each on its own.
    pub(crate) fn snapshot(&self) -> SourceStats {
        let get = |which| self.slot(which).load(Ordering::Relaxed);
        SourceStats {
            requests: get(Count::Requests),
            bytes_received: get(Count::Bytes),
            retries: get(Count::Retries),
            token_requests: get(Count::Tokens),
            redirects: get(Count::Redirects),
        }
    }

    fn slot(&self, which: Count) -> &AtomicU64 {
        let [requests, bytes, retries, tokens, redirects] = &self.0;
        match which {
            Count::Requests => requests,
            Count::Bytes => bytes,
            Count::Retries => retries,
            Count::Tokens => tokens,
            Count::Redirects => redirects,
        }
    }
}
