//! Recording what was fetched.
//!
//! Invariant: what was fetched is recorded [`FlushPolicy::age`](crate::store::FlushPolicy) later
//! at the latest, whether or not anything is fetched after it: till then a crash takes it, and
//! the store is not brought back within its bounds. Where that fails it is tried again as late
//! after it. One task at most waits for that. It does not keep the layer, and ends with it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Layer, Shared};
use crate::Result;
use crate::task::blocking;

impl Layer {
    /// Starts to record what is present; see [`LayerFile::flush`](crate::store::LayerFile::flush).
    /// Nobody waits for it: what a crash takes before it is done is fetched again.
    pub fn flush_behind(&self) {
        let shared = Arc::clone(&self.shared);
        let flush = move || {
            if let Err(error) = shared.file.flush() {
                tracing::warn!(digest = %shared.blob.digest, %error, "layer could not be recorded");
            }
        };
        // Owned and waited for by the tracker.
        drop(self.shared.tasks.spawn_blocking(flush));
    }

    /// Records what is present; see [`LayerFile::flush`](crate::store::LayerFile::flush).
    pub async fn flush(&self) -> Result<()> {
        let file = Arc::clone(&self.shared.file);
        blocking(move || file.flush()).await
    }
}

impl Shared {
    /// Records what was fetched if that is worth it by now, else later.
    pub(super) async fn flush_if_due(self: &Arc<Self>) {
        if self.file.is_flush_due(self.config.flush, Instant::now()) {
            self.record().await;
        }
        self.record_later();
    }

    /// A failure to record costs a refetch after a crash, not a read: it is logged here
    /// and shows again when the owner flushes.
    async fn record(&self) {
        let file = Arc::clone(&self.file);
        let flushed = blocking(move || file.flush()).await;
        if let Err(error) = flushed {
            tracing::warn!(%error, "cannot record fetched chunks yet");
        }
    }

    /// Has what was not recorded yet recorded, also if this was the last fetch.
    fn record_later(self: &Arc<Self>) {
        if !self.file.is_dirty() || self.will_record.swap(true, Ordering::AcqRel) {
            return;
        }
        let (shared, cancel) = (Arc::downgrade(self), self.cancel.clone());
        let age = self.config.flush.age;
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(age) => {}
            }
            if let Some(shared) = shared.upgrade() {
                // Who fetches from here on has another task wait.
                shared.will_record.store(false, Ordering::Release);
                shared.record().await;
                shared.record_later();
            }
        });
    }
}
