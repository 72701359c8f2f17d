//! Which chunks are being fetched, and who waits for them.
//!
//! Invariant: a chunk is claimed by one fetch at a time, and every claim ends: with a
//! result, or, when its fetch is dropped, with an error. Results are not kept.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::index::ChunkId;
use crate::{Error, Result};

type Outcome = Option<Result<(), Arc<Error>>>;
type Wait = watch::Receiver<Outcome>;
type Table = HashMap<ChunkId, Wait>;

/// The table of claims. Its lock is held for look-ups only.
#[derive(Default)]
pub(super) struct Inflight {
    table: Arc<Mutex<Table>>,
}

/// What a reader got.
pub(super) struct Claim {
    /// Chunks to fetch now.
    pub(super) mine: Mine,
    /// What the wanted chunks wait for; present ones wait for nothing.
    pub(super) waits: Vec<Wait>,
}

/// Claimed chunks. Dropping it ends the claims that have no result yet.
pub(super) struct Mine {
    table: Arc<Mutex<Table>>,
    open: Mutex<HashMap<ChunkId, watch::Sender<Outcome>>>,
    ids: Vec<ChunkId>,
}

impl Inflight {
    /// Claims those of `wanted` and `siblings` that are neither present nor claimed.
    pub(super) fn claim(
        &self,
        wanted: &[ChunkId],
        siblings: &[ChunkId],
        is_present: impl Fn(ChunkId) -> bool,
    ) -> Claim {
        let mut table = self.table.lock();
        let mut open = HashMap::new();
        let mut waits = Vec::new();
        let mut take = |id: ChunkId| {
            // Asked under the lock: a claim ends only after its chunk is present.
            if is_present(id) {
                return None;
            }
            let wait = table.entry(id).or_insert_with(|| {
                let (tx, rx) = watch::channel(None);
                open.insert(id, tx);
                rx
            });
            Some(wait.clone())
        };
        for id in wanted {
            waits.extend(take(*id));
        }
        for id in siblings {
            take(*id);
        }
        let mut ids: Vec<ChunkId> = open.keys().copied().collect();
        ids.sort_unstable();
        let mine = Mine {
            table: Arc::clone(&self.table),
            open: Mutex::new(open),
            ids,
        };
        Claim { mine, waits }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.table.lock().is_empty()
    }
}

impl Mine {
    /// All claimed ids, ascending.
    pub(super) fn ids(&self) -> &[ChunkId] {
        &self.ids
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Ends the claims of `ids` and tells everyone who waits. Ended ones stay as they are.
    pub(super) fn finish(&self, ids: &[ChunkId], result: Result<(), Arc<Error>>) {
        for id in ids {
            let Some(sender) = self.open.lock().remove(id) else {
                continue;
            };
            self.table.lock().remove(id);
            sender.send_replace(Some(result.clone()));
        }
    }

    /// Ends what is left with one error.
    pub(super) fn fail_rest(&self, error: Error) {
        self.finish(&self.ids, Err(Arc::new(error)));
    }
}

impl Drop for Mine {
    /// The fetch ended without a result for these: a panic, or the runtime went away.
    /// Dropping the senders tells who waits.
    fn drop(&mut self) {
        let open = std::mem::take(self.open.get_mut());
        let mut table = self.table.lock();
        for id in open.keys() {
            table.remove(id);
        }
    }
}

/// Waits for all; the first error ends the wait.
pub(super) async fn wait(waits: Vec<Wait>) -> Result<()> {
    for mut wait in waits {
        let outcome = wait.wait_for(Option::is_some).await;
        match outcome.ok().and_then(|outcome| outcome.clone()) {
            Some(Ok(())) => {}
            Some(Err(error)) => return Err(error.duplicate()),
            None => {
                return Err(Error::Unavailable {
                    what: "a chunk".to_owned(),
                    host: "the source".to_owned(),
                    detail: "its fetch ended without a result".to_owned(),
                });
            }
        }
    }
    Ok(())
}
