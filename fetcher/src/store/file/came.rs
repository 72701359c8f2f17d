//! How many bytes came to a layer, and how many of them flushes tried to record, and did.
//!
//! Invariant: what came counts as unrecorded until a flush that began after it returned well,
//! whatever other flushes do meanwhile. It may count longer, which costs a flush that finds
//! nothing to do. It says nothing of which bytes they are: bitmaps do.

use std::sync::atomic::{AtomicU64, Ordering};

/// Decoded bytes since the layer was opened; none of these ever gets smaller.
#[derive(Debug, Default)]
pub(super) struct Came {
    all: AtomicU64,
    tried: AtomicU64,
    recorded: AtomicU64,
}

impl Came {
    /// After the bits of these bytes were set.
    pub(super) fn add(&self, bytes: u64) {
        self.all.fetch_add(bytes, Ordering::Release);
    }

    /// What a flush that begins now records at least. Flushes come one after another.
    pub(super) fn begin_flush(&self) -> u64 {
        let all = self.all.load(Ordering::Acquire);
        self.tried.store(all, Ordering::Relaxed);
        all
    }

    /// The flush that began with `tried` returned well.
    pub(super) fn set_recorded(&self, tried: u64) {
        self.recorded.store(tried, Ordering::Release);
    }

    /// Came since the last flush began.
    pub(super) fn untried(&self) -> u64 {
        let tried = self.tried.load(Ordering::Relaxed);
        self.all.load(Ordering::Relaxed).saturating_sub(tried)
    }

    /// Came and is not known to be recorded.
    pub(super) fn unrecorded(&self) -> u64 {
        let recorded = self.recorded.load(Ordering::Relaxed);
        self.all.load(Ordering::Relaxed).saturating_sub(recorded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_flush_did_not_record_counts_on() {
        let came = Came::default();
        came.add(10);
        let failed = came.begin_flush();
        assert_eq!((failed, came.untried(), came.unrecorded()), (10, 0, 10));
        came.add(5);
        assert_eq!((came.untried(), came.unrecorded()), (5, 15));
        let good = came.begin_flush();
        // While it runs.
        came.add(1);
        assert_eq!((came.untried(), came.unrecorded()), (1, 16));
        came.set_recorded(good);
        assert_eq!((came.untried(), came.unrecorded()), (1, 1));
    }
}
