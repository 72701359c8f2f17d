//! The task that fetches what a profile names.
//!
//! Invariant: at most [`PrefetchOptions::batches_max`] batches are under way, and it ends
//! with the last of them, when [`Prefetch::finish`] is called, or when it is dropped. A
//! layer that fails is left alone from then on: readers meet its error themselves. Nobody
//! ever waits for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::places::{Place, chunks_of, ranges_of, with_whole_members};
use super::queue::{Batch, Queue};
use crate::Result;
use crate::index::ChunkId;
use crate::layer::{Layer, Priority};
use crate::types::ByteRange;

/// Bounds of one prefetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefetchOptions {
    /// Batches under way at once.
    pub batches_max: usize,
    /// Decoded bytes of the first batch. Small, so that its bytes are there early.
    pub first_bytes: u64,
    /// Decoded bytes of later ones, which double until here. What a reader may have to
    /// share the link with.
    pub batch_bytes_max: u64,
}

impl Default for PrefetchOptions {
    /// Right also for a profile of another command: reads it did not foresee go first.
    fn default() -> Self {
        Self {
            batches_max: 3,
            first_bytes: 512 << 10,
            batch_bytes_max: 4 << 20,
        }
    }
}

/// Places by layer, with their ranks, and how to fetch them.
pub type WantedPlaces = (BTreeMap<usize, Vec<(u32, Place)>>, PrefetchOptions);

/// What a prefetch did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefetchUse {
    /// Chunks that were asked for and came.
    pub chunks: u64,
    /// Their decoded bytes.
    pub bytes: u64,
    /// Places that no chunk covers.
    pub unknown: u64,
    /// Batches that failed.
    pub failed: u64,
    /// When the last batch came.
    pub last: Option<Instant>,
}

/// Is told the number of a layer and what of its data file is present by now: what was named and
/// was there already, and whatever comes.
pub type OnPresent = Box<dyn Fn(usize, Vec<ByteRange>) + Send + Sync>;

/// A prefetch under way. Dropping it ends it.
#[derive(Debug)]
pub struct Prefetch {
    opened: mpsc::UnboundedSender<(usize, Arc<Layer>)>,
    used: Arc<Mutex<PrefetchUse>>,
    task: JoinHandle<()>,
}

impl Prefetch {
    /// Starts to fetch the places that `wanted` comes up with, if it does. Layers may be
    /// opened meanwhile. Must run inside a tokio runtime.
    pub fn start(
        wanted: impl Future<Output = Option<WantedPlaces>> + Send + 'static,
        on_present: Option<OnPresent>,
    ) -> Self {
        // Holds at most one message for each layer of an image.
        let (opened, inbox) = mpsc::unbounded_channel();
        let used = Arc::new(Mutex::new(PrefetchUse::default()));
        let its_use = Arc::clone(&used);
        let task = tokio::spawn(async move {
            let Some((places, options)) = wanted.await else {
                return;
            };
            let driver = Driver {
                places,
                options,
                inbox,
                used: its_use,
                on_present,
                queue: Queue::default(),
                layers: BTreeMap::new(),
            };
            driver.run().await;
        });
        Self { opened, used, task }
    }

    /// Says that a layer can be read now. Never waits.
    pub fn opened(&self, layer: usize, opened: &Arc<Layer>) {
        // Nobody listens any more once everything has been fetched.
        let _ = self.opened.send((layer, Arc::clone(opened)));
    }

    /// Ends it and waits for that; what it did.
    pub async fn finish(mut self) -> PrefetchUse {
        self.task.abort();
        if let Err(error) = (&mut self.task).await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
        *self.used.lock()
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Driver {
    places: BTreeMap<usize, Vec<(u32, Place)>>,
    options: PrefetchOptions,
    inbox: mpsc::UnboundedReceiver<(usize, Arc<Layer>)>,
    used: Arc<Mutex<PrefetchUse>>,
    queue: Queue,
    layers: BTreeMap<usize, Arc<Layer>>,
    on_present: Option<OnPresent>,
}

impl Driver {
    /// Ends when no layer is missing and nothing is left.
    async fn run(mut self) {
        let mut size = self.options.first_bytes;
        let mut flying = FuturesUnordered::new();
        loop {
            while flying.len() < self.options.batches_max.max(1)
                && let Some((batch, layer)) = self.next(size)
            {
                flying.push(fetch(layer, batch));
                size = size.saturating_mul(2).min(self.options.batch_bytes_max);
            }
            tokio::select! {
                Some((number, layer)) = self.inbox.recv(), if !self.places.is_empty() => {
                    self.add(number, layer);
                }
                Some((batch, outcome)) = flying.next(), if !flying.is_empty() => {
                    self.note(&batch, outcome);
                }
                else => return,
            }
        }
    }

    fn next(&mut self, size: u64) -> Option<(Batch, Arc<Layer>)> {
        let batch = self.queue.next(size)?;
        let layer = Arc::clone(self.layers.get(&batch.layer)?);
        Some((batch, layer))
    }

    /// Queues what is wanted of a layer and not here yet.
    fn add(&mut self, number: usize, layer: Arc<Layer>) {
        let Some(places) = self.places.remove(&number) else {
            return;
        };
        let plan = chunks_of(layer.index(), places);
        self.used.lock().unknown += plan.unknown;
        let wanted = with_whole_members(layer.index(), plan.wanted).into_iter();
        let (present, absent): (Vec<_>, Vec<_>) =
            wanted.partition(|wanted| layer.file().is_present(wanted.id));
        layer.expect(absent.iter().map(|wanted| wanted.id).collect());
        self.queue.add(number, absent);
        self.layers.insert(number, layer);
        let present: Vec<_> = present.iter().map(|wanted| wanted.id).collect();
        self.tell_present(number, &present);
    }

    fn tell_present(&self, number: usize, ids: &[ChunkId]) {
        let (Some(tell), Some(layer)) = (&self.on_present, self.layers.get(&number)) else {
            return;
        };
        if !ids.is_empty() {
            tell(number, ranges_of(layer.index(), ids));
        }
    }

    fn note(&mut self, batch: &Batch, outcome: Result<()>) {
        let mut used = self.used.lock();
        match outcome {
            Ok(()) => {
                used.chunks += batch.ids.len() as u64;
                used.bytes += batch.bytes;
                used.last = Some(Instant::now());
                drop(used);
                self.tell_present(batch.layer, &batch.ids);
            }
            Err(error) => {
                used.failed += 1;
                drop(used);
                self.queue.drop_layer(batch.layer);
                tracing::debug!(%error, "prefetch of a layer ended early");
            }
        }
    }
}

async fn fetch(layer: Arc<Layer>, batch: Batch) -> (Batch, Result<()>) {
    let outcome = layer.fill_chunks(&batch.ids, Priority::Profile).await;
    (batch, outcome)
}

#[cfg(test)]
mod tests;
