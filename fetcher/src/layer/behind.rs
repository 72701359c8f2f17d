//! Filling a layer for nobody in particular: in the order of its data file, several
//! requests at a time, behind everybody else.
//!
//! Invariant: it claims no more than it is about to fetch, one request's worth for each
//! pass it was given; so what a reader wants is either not claimed yet, or on its way. A pass over
//! the layer ends with the first error, or when nothing is missing; who has time makes another one
//! after a pause, as what is missing today may be had tomorrow.
//!
//! Chunks that others fetch meanwhile are left to them at first, and waited for at the
//! end, where those that still miss are fetched one request after another.

use std::sync::Arc;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, timeout};

use super::engine::QUIET_WAITS;
use super::{Layer, Priority, Shared, inflight};
use crate::Result;
use crate::index::ChunkId;
use crate::plan;

/// Encoded bytes of one request at most. A reader may need one that is on its way: 4 MiB
/// are 30 ms of a gigabit, and still many round trips' worth.
const BYTES_MAX: u64 = 4 << 20;

/// After how many times [`EngineConfig::quiet`](super::EngineConfig::quiet) a layer is tried again
/// that could not be filled: a minute.
const PAUSE_QUIETS: u32 = 30;
/// How many times as long the longest pause is, after as many failures: a quarter of an hour. A
/// registry that is away or credentials that are not here yet cost a request in that time.
const PAUSES_MAX: u32 = 16;

/// When requests begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// Whenever nobody else's is under way or waits.
    Now,
    /// When there has been none for a while, so as not to be in the way of the next one,
    /// either: of its bytes on the link, and of the cores.
    Quiet,
}

/// What is asked for next.
struct Batch {
    /// The first missing chunk.
    first: ChunkId,
    /// What one request brings, the first chunk among it; ascending.
    ids: Vec<ChunkId>,
}

/// Which chunks are considered.
#[derive(Clone, Copy)]
struct Reach {
    /// The first one.
    from: ChunkId,
    /// They end before the first that begins at or after this in the blob.
    blob_end: Option<u64>,
    /// Those that somebody fetches are left out.
    is_free_only: bool,
}

impl Layer {
    /// [`Layer::fill_all`] for who has time: requests begin only when nobody has waited for anything on
    /// this node for some seconds, or as slowly as if there were no end to that. So starts are
    /// not slowed down by the rest of what they are starting. What fails is said in the log and
    /// tried again later. `false` if the layer was closed before.
    ///
    /// # Errors
    /// If what came could not be recorded.
    pub async fn fill_when_quiet(&self) -> Result<bool> {
        tokio::select! {
            biased;
            () = self.shared.cancel.cancelled() => return Ok(false),
            () = fill_in_time(&self.shared) => {}
        }
        self.flush().await?;
        Ok(true)
    }
}

/// Fills the layer, however often that fails.
async fn fill_in_time(shared: &Arc<Shared>) {
    let quiet = shared.engine.config.quiet;
    let (mut pause, longest) = (
        quiet.saturating_mul(PAUSE_QUIETS),
        quiet.saturating_mul(PAUSE_QUIETS.saturating_mul(PAUSES_MAX)),
    );
    while let Err(error) = fill(shared, None, Pace::Quiet).await {
        let digest = &shared.blob.digest;
        tracing::info!(%digest, %error, again_after = ?pause, "the rest of a layer cannot be had now");
        tokio::time::sleep(pause).await;
        pause = pause.saturating_mul(2).min(longest);
    }
}

/// Fills the layer up to the first chunk that begins at or after `blob_end` in the blob.
pub(super) async fn fill(shared: &Arc<Shared>, blob_end: Option<u64>, pace: Pace) -> Result<()> {
    let began = Instant::now();
    let flying_max = usize::try_from(shared.engine.config.background_max).unwrap_or(1);
    for (is_free_only, flying_max) in [(true, flying_max), (false, 1)] {
        let mut reach = Reach {
            from: 0,
            blob_end,
            is_free_only,
        };
        let mut flying = FuturesUnordered::new();
        loop {
            if pace == Pace::Quiet {
                wait_for_quiet(shared, began).await;
            }
            let Some(batch) = next(shared, reach)? else {
                break;
            };
            reach.from = batch.first.saturating_add(1);
            flying.push(inflight::wait(fetch(shared, &batch).await));
            while flying.len() >= flying_max
                && let Some(outcome) = flying.next().await
            {
                outcome?;
            }
            while let Some(Some(outcome)) = flying.next().now_or_never() {
                outcome?;
            }
        }
        while let Some(outcome) = flying.next().await {
            outcome?;
        }
    }
    Ok(())
}

/// Waits until nobody has waited for anything for a while, but not for ever.
async fn wait_for_quiet(shared: &Shared, began: Instant) {
    let quiet = shared.engine.config.quiet;
    let wait = shared.engine.gate.quiet(began, quiet);
    // Late is as good as quiet.
    let _ = timeout(quiet.saturating_mul(QUIET_WAITS), wait).await;
}

/// Waits for a pass, and starts to fetch on it what is still missing then.
async fn fetch(shared: &Arc<Shared>, batch: &Batch) -> Vec<inflight::Wait> {
    let priority = Priority::Background;
    // What cannot be had within the budget is refused where it is fetched.
    let pass = match shared.ask(priority, &batch.ids) {
        Ok(ask) => shared.engine.gate.enter(ask).pass().await,
        Err(_) => None,
    };
    shared.fetch(&batch.ids, priority, pass)
}

fn next(shared: &Shared, reach: Reach) -> Result<Option<Batch>> {
    let index = shared.file.index();
    let missing = shared.file.missing_from(reach.from);
    let ids = shared.inflight.look(|is_claimed| {
        let is_wanted = |id: &ChunkId| !reach.is_free_only || !is_claimed(*id);
        plan::first_bytes(index, missing.filter(is_wanted), BYTES_MAX)
    });
    let Some(first) = ids.first().copied() else {
        return Ok(None);
    };
    let plan = plan::plan(index, &ids, shared.limits(Priority::Background))?;
    let has_first = |request: &plan::Request| request.chunks().any(|id| id == first);
    let request = plan.requests.iter().find(|request| has_first(request));
    // A table out of the blob's order may leave it for a later plan; then it goes alone.
    let mut ids: Vec<ChunkId> = match request {
        Some(request) => request.chunks().collect(),
        None => vec![first],
    };
    ids.sort_unstable();
    if let Some(end) = reach.blob_end {
        if begins_at(shared, first) >= end {
            return Ok(None);
        }
        ids.retain(|id| begins_at(shared, *id) < end);
    }
    Ok(Some(Batch { first, ids }))
}

/// Where a chunk's encoded bytes begin; past every blob for one that has none alone.
fn begins_at(shared: &Shared, id: ChunkId) -> u64 {
    let chunks = &shared.file.index().chunks;
    let chunk = usize::try_from(id).ok().and_then(|id| chunks.get(id));
    let blob = chunk.and_then(|chunk| chunk.encoding.blob());
    blob.map_or(u64::MAX, |blob| blob.start())
}
