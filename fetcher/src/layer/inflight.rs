//! Which chunks are being fetched, and who waits for them.
//!
//! Invariant: a chunk is claimed by one fetch at a time, and every claim ends: with a
//! result, or, when its fetch is dropped, with an error. Results are not kept. A claim
//! that nobody waits for takes some 40 bytes, for one fetch may claim very many.
//!
//! A claim knows the most urgent of those who want it, and the request that will bring it
//! as soon as there is one, so that who comes later can hurry that request on.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::Priority;
use super::gate::Ticket;
use crate::index::ChunkId;
use crate::{Error, Result};

/// How a claim ended; `None` until then.
type Outcome = Option<Result<(), Arc<Error>>>;
pub(super) type Wait = watch::Receiver<Outcome>;

/// The table of claims. Its lock is held for look-ups only.
#[derive(Default)]
pub(super) struct Inflight {
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    claims: HashMap<ChunkId, Held>,
    /// Number of the next [`Mine`].
    next: u64,
}

/// One claim.
struct Held {
    /// Number of the [`Mine`] that has it.
    owner: u64,
    /// The request that brings it; 0 before there is one.
    ticket: Ticket,
    /// Of all who want it, the most urgent.
    urgency: Priority,
    /// Made for the first who waits.
    tell: Option<watch::Sender<Outcome>>,
}

/// What a reader got.
pub(super) struct Claim {
    /// Chunks to fetch now.
    pub(super) mine: Mine,
    /// What the wanted chunks wait for; present ones wait for nothing.
    pub(super) waits: Vec<Wait>,
    /// Requests of others that bring wanted chunks less urgently than this.
    pub(super) hurry: Vec<Ticket>,
}

/// Claimed chunks. Dropping it ends the claims that have no result yet.
pub(super) struct Mine {
    table: Arc<Mutex<Table>>,
    owner: u64,
    priority: Priority,
    ids: Vec<ChunkId>,
}

impl Inflight {
    /// Claims those of `wanted` that are neither present nor claimed; then, if there were
    /// any, those that `more` makes of them and of what else may be claimed. Waits are for
    /// `wanted` only.
    pub(super) fn claim(
        &self,
        wanted: &[ChunkId],
        priority: Priority,
        is_present: impl Fn(ChunkId) -> bool,
        more: impl FnOnce(&[ChunkId], &dyn Fn(ChunkId) -> bool) -> Vec<ChunkId>,
    ) -> Claim {
        let mut table = self.table.lock();
        let owner = table.next;
        table.next += 1;
        let mut ids = Vec::new();
        let (mut waits, mut hurry) = (Vec::new(), Vec::new());
        // Presence is asked under the lock: a claim ends only after its chunk is present.
        for id in wanted.iter().copied().filter(|id| !is_present(*id)) {
            let held = table.claims.entry(id).or_insert_with(|| {
                ids.push(id);
                Held::new(owner, priority)
            });
            if held.urgency > priority {
                held.urgency = priority;
                // One of no request yet is asked about when there is one.
                if held.ticket != 0 && !hurry.contains(&held.ticket) {
                    hurry.push(held.ticket);
                }
            }
            let tell = held.tell.get_or_insert_with(|| watch::channel(None).0);
            waits.push(tell.subscribe());
        }
        if !ids.is_empty() {
            let is_free = |id| !table.claims.contains_key(&id) && !is_present(id);
            for id in more(&ids, &is_free) {
                if is_present(id) {
                    continue;
                }
                if let Entry::Vacant(free) = table.claims.entry(id) {
                    free.insert(Held::new(owner, priority));
                    ids.push(id);
                }
            }
        }
        drop(table);
        ids.sort_unstable();
        let table = Arc::clone(&self.table);
        let mine = Mine {
            table,
            owner,
            priority,
            ids,
        };
        Claim { mine, waits, hurry }
    }

    /// What `look` makes of the table, which it asks whether a chunk is claimed.
    pub(super) fn look<T>(&self, look: impl FnOnce(&dyn Fn(ChunkId) -> bool) -> T) -> T {
        let table = self.table.lock();
        look(&|id| table.claims.contains_key(&id))
    }

    /// A claim to nothing.
    pub(super) fn nothing(&self) -> Mine {
        let table = Arc::clone(&self.table);
        Mine {
            table,
            owner: u64::MAX,
            priority: Priority::Background,
            ids: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.table.lock().claims.is_empty()
    }
}

impl Held {
    fn new(owner: u64, urgency: Priority) -> Self {
        Self {
            owner,
            ticket: 0,
            urgency,
            tell: None,
        }
    }
}

impl Table {
    /// Ends those of `ids` that `owner` has; returns whom to tell.
    fn end(&mut self, owner: u64, ids: &[ChunkId]) -> Vec<watch::Sender<Outcome>> {
        let mut tell = Vec::new();
        for id in ids {
            if let Entry::Occupied(held) = self.claims.entry(*id)
                && held.get().owner == owner
            {
                tell.extend(held.remove().tell);
            }
        }
        tell
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

    /// How urgent it was when it was claimed.
    pub(super) fn priority(&self) -> Priority {
        self.priority
    }

    /// Whether somebody wants any of `ids` more urgently than this fetch does.
    pub(super) fn is_hurried(&self, ids: impl IntoIterator<Item = ChunkId>) -> bool {
        if self.priority == Priority::OnDemand {
            return false;
        }
        let table = self.table.lock();
        let mut held = ids.into_iter().filter_map(|id| table.claims.get(&id));
        held.any(|held| held.owner == self.owner && held.urgency < self.priority)
    }

    /// Says which request brings `ids` from now on; returns the most urgent of those who
    /// want any of them. Who comes later finds the ticket.
    pub(super) fn comes_with(&self, ids: &[ChunkId], ticket: Ticket) -> Priority {
        let mut table = self.table.lock();
        let mut urgency = self.priority;
        for id in ids {
            if let Some(held) = table.claims.get_mut(id)
                && held.owner == self.owner
            {
                held.ticket = ticket;
                urgency = urgency.min(held.urgency);
            }
        }
        urgency
    }

    /// Ends the claims of `ids` and tells everyone who waits. Ended ones stay as they are.
    pub(super) fn finish(&self, ids: &[ChunkId], result: &Result<(), Arc<Error>>) {
        let tell = self.table.lock().end(self.owner, ids);
        for sender in tell {
            sender.send_replace(Some(result.clone()));
        }
    }

    /// Those that somebody waits for, and the rest; ended ones cease to be claimed.
    pub(super) fn split(&mut self) -> (Vec<ChunkId>, Vec<ChunkId>) {
        let table = self.table.lock();
        let held = |id: &ChunkId| table.claims.get(id).filter(|held| held.owner == self.owner);
        self.ids.retain(|id| held(id).is_some());
        let is_awaited = |id: &ChunkId| held(id).is_some_and(|held| held.tell.is_some());
        self.ids.iter().copied().partition(is_awaited)
    }

    /// Gives up those of `ids` that nobody waits for; `false` if somebody does for one.
    pub(super) fn release(&mut self, ids: &[ChunkId]) -> bool {
        let mut table = self.table.lock();
        let mut gone = HashSet::new();
        for id in ids {
            if let Entry::Occupied(held) = table.claims.entry(*id)
                && held.get().owner == self.owner
                && held.get().tell.is_none()
            {
                held.remove();
                gone.insert(*id);
            }
        }
        self.ids.retain(|id| !gone.contains(id));
        gone.len() == ids.len()
    }

    /// Ends what is left with one error.
    pub(super) fn fail_rest(&self, error: Error) {
        self.finish(&self.ids, &Err(Arc::new(error)));
    }
}

impl Drop for Mine {
    /// The fetch ended without a result for these: a panic, or the runtime went away.
    /// Dropping the senders tells who waits.
    fn drop(&mut self) {
        let tell = self.table.lock().end(self.owner, &self.ids);
        drop(tell);
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
