//! How a FUSE thread answers a read: with what is present, or by handing it over.
//!
//! Invariant: no thread waits for the network, and what is counted as a miss is exactly
//! what was handed over.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fuser::ReplyData;

use super::errno;
use super::miss::{Misses, Wanted};

/// What a mount has answered so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FuseStats {
    /// Names looked up; the kernel remembers the answers.
    pub lookups: u64,
    /// Read requests, each up to the read-ahead window.
    pub reads: u64,
    /// Bytes those asked for, within the files.
    pub read_bytes: u64,
    /// Reads that had to wait for data.
    pub misses: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    lookups: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    misses: AtomicU64,
}

impl Counters {
    pub(super) fn stats(&self) -> FuseStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FuseStats {
            lookups: get(&self.lookups),
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            misses: get(&self.misses),
        }
    }

    pub(super) fn lookup(&self) {
        count(&self.lookups, 1);
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Reads of one mount's data.
pub(super) struct Reader {
    misses: Misses,
    counters: Arc<Counters>,
}

impl Reader {
    pub(super) fn new(misses: Misses, counters: Arc<Counters>) -> Self {
        Self { misses, counters }
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Answers `reply`, now or later. `wanted` is at most as long as the kernel asked for.
    pub(super) fn answer(&self, wanted: Wanted, reply: ReplyData) {
        thread_local! {
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let range = wanted.range;
        count(&self.counters.reads, 1);
        count(&self.counters.read_bytes, range.len());
        // At most what the kernel asked for, which is at most a mebibyte.
        let len = usize::try_from(range.len()).unwrap_or(0);
        BUFFER.with_borrow_mut(|buffer| {
            buffer.resize(len, 0);
            match self.misses.data().try_read(range.start(), buffer) {
                Ok(true) => {
                    buffer.resize(len.saturating_add(wanted.zeros), 0);
                    reply.data(buffer);
                }
                Ok(false) => {
                    count(&self.counters.misses, 1);
                    self.misses.hand_over(wanted, reply);
                }
                Err(error) => {
                    tracing::warn!(%range, %error, "read failed");
                    reply.error(errno::of(&error));
                }
            }
        });
    }
}
