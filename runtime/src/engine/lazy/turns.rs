//! One at a time, layer by layer.
//!
//! Invariant: of two who have a layer's turn one waits for the other. A turn costs nothing
//! once nobody has it or waits for it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use lazarette_fetcher::types::Digest;
use parking_lot::Mutex;
use tokio::sync::{Mutex as Turn, OwnedMutexGuard};

/// The turns of all layers.
#[derive(Default)]
pub(super) struct Turns {
    turns: Mutex<HashMap<Digest, Weak<Turn<()>>>>,
}

impl Turns {
    /// Waits for the layer's turn, and has it until the answer is dropped.
    pub(super) async fn of(&self, digest: &Digest) -> OwnedMutexGuard<()> {
        self.find(digest).lock_owned().await
    }

    /// The layer's turn if nobody has it, until the answer is dropped.
    pub(super) fn try_of(&self, digest: &Digest) -> Option<OwnedMutexGuard<()>> {
        self.find(digest).try_lock_owned().ok()
    }

    fn find(&self, digest: &Digest) -> Arc<Turn<()>> {
        let mut turns = self.turns.lock();
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(digest).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        turns.insert(*digest, Arc::downgrade(&turn));
        turn
    }
}
