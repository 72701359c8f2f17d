//! Details that nobody has any more, made again of the layer.
//!
//! An index beside an image may vanish while its layer is read. Whoever made it streamed the
//! layer; streamed once more, the layer gives the same details, so readers wait for that.
//! Payloads that pass are dropped: they are fetched by their chunks afterwards, as before.
//!
//! Invariant: details are kept only if the signed core has their SHA-256, as ever. Where
//! some come out differently, for another release made the index or it was shaped for
//! starts, no second stream is tried, and wanting one of those costs the layer its index:
//! whoever opens the layer next makes it again. One stream a layer at a time, and
//! [`TURNS`] of an engine.

use std::sync::Arc;

use bytes::Bytes;

use super::{Remote, absent};
use crate::Result;
use crate::index::ingest::{Ingest, IngestPlan, LayerSink};
use crate::index::{LayerIndex, Span};
use crate::layer::fetch::joined;
use crate::layer::stream::{Pieces, Stream};
use crate::layer::{Shared, closed};
use crate::task::blocking;

/// Layers of an engine that are streamed at once for their details: each takes a core, and
/// memory for the tables of one layer.
pub(in crate::layer) const TURNS: usize = 2;

/// Held while a layer is streamed for its details.
#[derive(Default)]
pub(super) struct Remaking {
    turn: tokio::sync::Mutex<Past>,
}

/// What streaming the layer has brought so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Past {
    /// It was not streamed, or all details came of it.
    #[default]
    Promising,
    /// Some that its index wants did not.
    Vain,
}

impl Remaking {
    /// Whether a layer is being streamed: what wants details will wait.
    pub(super) fn is_under_way(&self) -> bool {
        self.turn.try_lock().is_err()
    }
}

/// Where payloads go that are not wanted.
struct Nowhere;

impl LayerSink for Nowhere {
    fn write_at(&mut self, _data_offset: u64, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }
}

/// The tables and the details that streaming a layer gives.
struct Made {
    index: LayerIndex,
    details: Bytes,
}

impl Made {
    /// The details of a span of it.
    fn details(&self, span: &Span) -> Option<Bytes> {
        let start = usize::try_from(span.details.start()).ok()?;
        let end = usize::try_from(span.details.end()).ok()?;
        (end <= self.details.len()).then(|| self.details.slice(start..end))
    }

    /// Those of the spans of `index` that are here, by number. Pure.
    fn matching<'a>(&'a self, index: &'a LayerIndex) -> impl Iterator<Item = (u32, Bytes)> + 'a {
        (0_u32..).zip(&index.spans).filter_map(|(number, wanted)| {
            let spans = &self.index.spans;
            let at = spans.binary_search_by_key(&wanted.start, |span| span.start);
            let span = spans.get(at.ok()?)?;
            let is_same = span.details_digest == wanted.details_digest;
            Some((number, self.details(span).filter(|_| is_same)?))
        })
    }
}

/// Makes the details of the spans `numbers` again, which are gone from where they were; those
/// that could not be.
pub(super) async fn remake(
    shared: &Arc<Shared>,
    remote: &Remote,
    numbers: &[u32],
) -> Result<Vec<u32>> {
    let mut past = remote.remaking.turn.lock().await;
    // Who had the turn before may have made them.
    let mut left = absent(shared, numbers.to_vec()).await?;
    if !left.is_empty() && *past == Past::Promising {
        let digest = &shared.blob.digest;
        tracing::warn!(%digest, index = %remote.blob.digest, "the layer's index is gone, streaming the layer to make it again");
        let is_all = keep(shared, stream(shared).await?).await?;
        if !is_all {
            *past = Past::Vain;
        }
        left = absent(shared, left).await?;
    }
    if !left.is_empty() {
        let file = Arc::clone(&shared.file);
        blocking(move || file.give_up_index()).await;
    }
    Ok(left)
}

/// Streams the layer for what stands behind its tables.
async fn stream(shared: &Arc<Shared>) -> Result<Made> {
    let turn = shared.engine.remakes.acquire();
    let _turn = turn.await.map_err(|_| closed(&shared.blob))?;
    let (source, engine) = (Arc::clone(&shared.source), Arc::clone(&shared.engine));
    let body = Stream::new(source, shared.blob.clone(), engine);
    let plan = IngestPlan::new(shared.blob.digest, shared.blob.size, None);
    let work = move |pieces: Pieces| {
        let made = pieces.feed(Ingest::new(plan, Nowhere))?;
        let (index, details) = (made.index, made.details);
        Ok(Made { index, details })
    };
    body.into_ingest(&shared.counters.bytes_fetched, work).await
}

/// Keeps what the index wants of `made`; whether that is all of it.
async fn keep(shared: &Arc<Shared>, made: Made) -> Result<bool> {
    let held = Arc::clone(shared);
    // Tracked on its own: closing the layer waits for it.
    let kept = shared.tasks.spawn_blocking(move || {
        let index = held.file.index();
        let mut count = 0;
        for (number, details) in made.matching(index) {
            held.file.put_details(number, details)?;
            count += 1;
        }
        Ok(count == index.spans.len())
    });
    joined(kept).await
}
