//! The step before every fetch: what other layers of this node hold is copied from there.
//!
//! Invariant: a claim ends with success only after its chunk is present; what is not
//! found stays claimed and is fetched. A chunk that nobody waits for, and that was only to
//! come along, is left to its reader if this node has it, or if nothing is fetched that it
//! could come along with. Never fails and never touches the network.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Shared;
use super::inflight::Mine;

/// Copies under way at once for one layer, each of which holds one chunk in memory.
pub(super) const TURNS: usize = 4;

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

fn copy(shared: &Shared, mut mine: Mine) -> Mine {
    let (file, counters) = (&shared.file, &shared.counters);
    let mut tried = HashSet::new();
    loop {
        let (mut awaited, mut along) = mine.split();
        let is_left = !awaited.is_empty();
        awaited.retain(|id| tried.insert(*id));
        if !awaited.is_empty() {
            file.copy_local(&awaited, |id, bytes| {
                counters.chunks_copied.fetch_add(1, Ordering::Relaxed);
                counters.bytes_copied.fetch_add(bytes, Ordering::Relaxed);
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
