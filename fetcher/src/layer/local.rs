//! The step before every fetch: what other layers of this node hold is copied from there.
//!
//! Invariant: a claim ends with success only after its chunk is present; what is not
//! found stays claimed and is fetched. A chunk that nobody waits for, and that was only to
//! come along, is left to its reader if this node has it, or if nothing is fetched that it
//! could come along with. Never fails and never touches the network.
//!
//! Memory: a copy holds its chunk, for the milliseconds it takes. All copies of an engine's
//! layers together hold at most what its requests may, besides those; see [`Room`].

use std::collections::HashSet;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::Shared;
use super::counters::add;
use super::inflight::Mine;
use crate::index::ChunkId;

/// Copies under way at once for one layer, each of which holds one chunk in memory.
pub(super) const TURNS: usize = 4;
/// Chunks copied with the room of the longest. Their sources stay open meanwhile; more would
/// keep others out for longer than a tenth of a second.
const RUN_MAX: usize = 32;
/// What room is counted in.
const UNIT_BYTES: u64 = 64 << 10;

/// Memory for copies, shared by all layers of an engine. Apart from that of requests,
/// because those wait for the network, and a copy must not wait for them.
#[derive(Debug)]
pub(super) struct Room {
    units: Semaphore,
    units_max: u32,
}

impl Room {
    /// Room for `bytes_max` at once.
    pub(super) fn new(bytes_max: u64) -> Self {
        let units_max = u32::try_from(bytes_max / UNIT_BYTES).unwrap_or(u32::MAX);
        let units = usize::try_from(units_max).unwrap_or(usize::MAX);
        Self {
            units: Semaphore::new(units.min(Semaphore::MAX_PERMITS)),
            units_max,
        }
    }

    /// Whether there is ever room for a chunk of this length.
    fn fits(&self, len: u64) -> bool {
        len.div_ceil(UNIT_BYTES) <= u64::from(self.units_max)
    }

    /// Waits until there is. `None` where that is never.
    async fn take(&self, len: u64) -> Option<SemaphorePermit<'_>> {
        let units = u32::try_from(len.div_ceil(UNIT_BYTES)).ok()?;
        if !self.fits(len) {
            return None;
        }
        self.units.acquire_many(units).await.ok()
    }
}

/// Copies what it can of `mine`; what is left to fetch.
pub(super) async fn first(shared: &Arc<Shared>, mine: Mine) -> Mine {
    let Ok(_turn) = shared.copying.acquire().await else {
        return mine;
    };
    let held = Arc::clone(shared);
    // Tracked on its own: closing the layer waits for it.
    let copied = shared.tasks.spawn_blocking(move || copy(&held, mine));
    match copied.await {
        Ok(mine) => mine,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime went away, and the claims with it.
        Err(_) => shared.inflight.nothing(),
    }
}

/// On a blocking thread.
fn copy(shared: &Shared, mut mine: Mine) -> Mine {
    let (file, counters, room) = (&shared.file, &shared.counters, &shared.engine.copies);
    let len = |id: &ChunkId| file.index().held_for(*id);
    let mut tried = HashSet::new();
    loop {
        let (mut awaited, mut along) = mine.split();
        let is_left = !awaited.is_empty();
        // One that is too long is fetched.
        awaited.retain(|id| !tried.contains(id) && room.fits(len(id)));
        awaited.truncate(RUN_MAX);
        tried.extend(awaited.iter().copied());
        let longest = awaited.iter().map(len).max();
        if let Some(longest) = longest
            && let Some(_room) = Handle::current().block_on(room.take(longest))
        {
            file.copy_local(&awaited, |id, bytes| {
                add(&counters.chunks_copied, 1);
                add(&counters.bytes_copied, bytes);
                mine.finish(&[id], &Ok(()));
            });
            continue;
        }
        if is_left {
            along = file.maybe_local(&along);
        }
        // Somebody may have come to wait for one; then it is looked for first.
        if mine.release(&along) {
            return mine;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;

    use super::*;

    #[tokio::test]
    async fn copies_together_hold_no_more_than_there_is_room_for() {
        let room = Room::new(4 * UNIT_BYTES + 1);
        assert!(room.fits(4 * UNIT_BYTES) && !room.fits(4 * UNIT_BYTES + 1));
        assert!(room.take(4 * UNIT_BYTES + 1).await.is_none());
        assert!(room.take(u64::MAX).await.is_none());
        let (three, one) = (room.take(2 * UNIT_BYTES + 1).await, room.take(1).await);
        assert!(three.is_some() && one.is_some());
        let mut next = Box::pin(room.take(2));
        assert!(poll!(&mut next).is_pending());
        drop(one);
        assert!(next.await.is_some());
        drop(three);
        assert!(room.take(4 * UNIT_BYTES).await.is_some());
    }
}
