//! A layer that file systems read from: what is present comes from the data file, what
//! is not is fetched, verified and kept.
//!
//! Invariant: [`Layer::try_read`] and [`Layer::fill`] never expose a byte that was not
//! verified against the index. One fetch per chunk however many readers wait for it; a
//! fetch belongs to the layer, not to a reader, so a reader that goes away stops nothing.
//! An error reaches everyone who waits and is forgotten: the next reader tries again.
//!
//! What another layer of this node holds is copied from there and never fetched.
//!
//! A wanted chunk brings others along. First the missing chunks of its gzip member, whose
//! bytes come with it anyway. Then small ones that follow it in the blob, in the same
//! request; nobody waits for those, and each is there as soon as its own bytes are.
//!
//! Readers go first: [`Layer::fill_all`] claims no more than it is about to fetch in one
//! request, and begins it only while no reader's request is under way or waits.
//!
//! Memory: a request holds its largest member encoded, two of its chunks decoded and one
//! piece of the body as it came. It begins once the budget has room for them, and what
//! could never fit is refused.

mod fetch;
mod gate;
mod inflight;
mod local;
pub mod open;
mod window;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::gate::{Gate, Pass};
use self::inflight::{Inflight, Mine};
use crate::index::{ChunkId, LayerIndex};
use crate::plan::{self, PlanLimits};
use crate::source::{BlobRef, BlobSource};
use crate::store::{FlushPolicy, LayerFile};
use crate::task::blocking;
use crate::types::ByteRange;
use crate::{Error, Result};

/// Encoded bytes that [`Layer::fill_all`] asks for at a time. A reader that comes while
/// they arrive shares the link with them and may need one of them: 4 MiB are 30 ms of a
/// gigabit, and still many round trips' worth.
const BEHIND_BYTES: u64 = 4 << 20;

/// Who waits for a chunk. Earlier ones go first, strictly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A reader.
    OnDemand,
    /// A start that is expected to read it soon.
    Profile,
    /// Nobody.
    Background,
}

/// What reading a layer has cost so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerCounters {
    /// Ranged requests sent to the source.
    pub requests: u64,
    /// Encoded bytes received from the source.
    pub bytes_fetched: u64,
    /// Chunks fetched, verified and stored.
    pub chunks_filled: u64,
    /// Chunks that another layer of this node had, verified and stored.
    pub chunks_copied: u64,
    /// Their decoded bytes.
    pub bytes_copied: u64,
    /// Pieces that did not decode or verify and were dropped.
    pub chunks_corrupt: u64,
}

/// Bounds of what one layer does at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// How chunks become requests.
    pub plan: PlanLimits,
    /// Requests under way at once for readers. More than a handful only splits the link.
    pub requests_max: u32,
    /// Bytes held in memory by all requests. A chunk that needs more alone is refused.
    pub memory_bytes_max: u64,
    /// Encoded bytes behind a missing chunk's member in which small missing chunks come
    /// with it, in the same request. Files that are next to each other in a layer are
    /// often read one after another, and a round trip costs more than this many bytes do.
    pub read_ahead_encoded_bytes: u64,
    /// When fetched chunks are recorded.
    pub flush: FlushPolicy,
}

impl Default for LayerConfig {
    fn default() -> Self {
        Self {
            plan: PlanLimits::default(),
            requests_max: 4,
            // What the largest chunk that an index may have needs, with some room. With
            // the usual chunks of 4 MiB, four requests use a fifth of it.
            memory_bytes_max: 256 << 20,
            // What a gigabit carries in one millisecond, the kernel's usual read-ahead.
            read_ahead_encoded_bytes: 128 << 10,
            flush: FlushPolicy::default(),
        }
    }
}

/// One layer: its index, its data file, and the source that fills it.
pub struct Layer {
    shared: Arc<Shared>,
}

/// What fetches share with the layer. They hold it, so it outlives them.
struct Shared {
    file: Arc<LayerFile>,
    source: Arc<dyn BlobSource>,
    blob: BlobRef,
    config: LayerConfig,
    inflight: Inflight,
    gate: Arc<Gate>,
    /// Turns of copying from other layers.
    copying: Semaphore,
    counters: Counters,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    bytes_fetched: AtomicU64,
    chunks_filled: AtomicU64,
    chunks_copied: AtomicU64,
    bytes_copied: AtomicU64,
    chunks_corrupt: AtomicU64,
}

impl Layer {
    /// Joins a stored layer with the source that can fill it.
    pub fn new(file: Arc<LayerFile>, source: Arc<dyn BlobSource>, blob: BlobRef) -> Arc<Self> {
        Self::with_config(file, source, blob, LayerConfig::default())
    }

    /// [`Layer::new`] with other bounds.
    pub fn with_config(
        file: Arc<LayerFile>,
        source: Arc<dyn BlobSource>,
        blob: BlobRef,
        config: LayerConfig,
    ) -> Arc<Self> {
        let shared = Arc::new(Shared {
            file,
            source,
            blob,
            gate: Gate::new(config.requests_max, config.memory_bytes_max),
            config,
            copying: Semaphore::new(local::TURNS),
            inflight: Inflight::default(),
            counters: Counters::default(),
            cancel: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        Arc::new(Self { shared })
    }

    /// The file and chunk tables.
    pub fn index(&self) -> &Arc<LayerIndex> {
        self.shared.file.index()
    }

    /// The layer on disk.
    pub fn file(&self) -> &Arc<LayerFile> {
        &self.shared.file
    }

    /// Reads `buf.len()` bytes at `data_offset` of the data file if all of them are
    /// present, without waiting for the network. `false` (and `buf` unspecified) if not.
    pub fn try_read(&self, data_offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.shared.file.read_at(data_offset, buf)
    }

    /// Makes every chunk that touches `range` of the data file present. Dropping the
    /// future abandons only this wait, never the fetch that others wait for.
    pub async fn fill(&self, range: ByteRange) -> Result<()> {
        let shared = &self.shared;
        let missing = shared.file.missing(range);
        if missing.is_empty() {
            return Ok(());
        }
        let is_present = |id| shared.file.is_present(id);
        let more =
            |claimed: &[ChunkId], free: &dyn Fn(ChunkId) -> bool| shared.along_with(claimed, free);
        let claim = shared.inflight.claim(&missing, is_present, more);
        shared.start(claim.mine, Leave::Asked(Priority::OnDemand));
        inflight::wait(claim.waits).await
    }

    /// Makes these chunks present, in about this order, ids out of range ignored. Dropping
    /// the future abandons only this wait.
    pub async fn fill_chunks(&self, ids: &[ChunkId], priority: Priority) -> Result<()> {
        let shared = &self.shared;
        let count = shared.file.index().chunks.len();
        let is_known = |id: &ChunkId| usize::try_from(*id).is_ok_and(|id| id < count);
        let wanted: Vec<ChunkId> = ids.iter().copied().filter(is_known).collect();
        let is_present = |id| shared.file.is_present(id);
        let nothing = |_: &[ChunkId], _: &dyn Fn(ChunkId) -> bool| Vec::new();
        let claim = shared.inflight.claim(&wanted, is_present, nothing);
        shared.start(claim.mine, Leave::Asked(priority));
        inflight::wait(claim.waits).await
    }

    /// Makes the whole layer present, behind readers: one request at a time, begun only
    /// while none of theirs is under way or waits. So a reader never waits for more than
    /// one request of this, and only if that request brings what it wants or holds memory
    /// that it needs. The first error ends it. Dropping the future stops it after the
    /// request under way.
    pub async fn fill_all(&self) -> Result<()> {
        self.shared.fill_behind(None).await?;
        self.flush().await
    }

    /// Starts to fetch the chunks up to the first whose encoded bytes begin at or after
    /// `blob_end`, in the same way as [`Self::fill_all`]. Nobody waits for it: a failure is
    /// logged, and readers meet it themselves.
    pub fn prefetch(&self, blob_end: u64) {
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move {
            let cancel = shared.cancel.clone();
            tokio::select! {
                biased;
                () = cancel.cancelled() => {}
                outcome = shared.fill_behind(Some(blob_end)) => if let Err(error) = outcome {
                    tracing::debug!(digest = %shared.blob.digest, %error, "prefetch ended early");
                }
            }
        });
    }

    /// Asks that these chunks, which a start reads, outlast others; see [`LayerFile::pin`].
    pub fn pin(&self, ids: Vec<ChunkId>) {
        let file = Arc::clone(&self.shared.file);
        let pin = move || file.pin(ids, SystemTime::now());
        // Owned and waited for by the tracker; a hint that is lost costs nobody a read.
        drop(self.shared.tasks.spawn_blocking(pin));
    }

    /// Records what is present; see [`LayerFile::flush`].
    pub async fn flush(&self) -> Result<()> {
        let file = Arc::clone(&self.shared.file);
        blocking(move || file.flush()).await
    }

    /// Decoded bytes that are present.
    pub fn present_bytes(&self) -> u64 {
        self.shared.file.present_bytes()
    }

    /// What it has cost so far.
    pub fn counters(&self) -> LayerCounters {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LayerCounters {
            requests: read(&counters.requests),
            bytes_fetched: read(&counters.bytes_fetched),
            chunks_filled: read(&counters.chunks_filled),
            chunks_copied: read(&counters.chunks_copied),
            bytes_copied: read(&counters.bytes_copied),
            chunks_corrupt: read(&counters.chunks_corrupt),
        }
    }

    /// Ends all fetches, waits until they have ended, and records what is present. Who
    /// waits for a fetch gets an error; later fills fail.
    pub async fn close(&self) -> Result<()> {
        self.shared.cancel.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.flush().await
    }
}

impl Drop for Layer {
    /// Nobody reads any more, so nobody needs what is being fetched.
    fn drop(&mut self) {
        self.shared.cancel.cancel();
    }
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer")
            .field("file", &self.shared.file)
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// What newly claimed chunks (ascending) bring along of those that are `free`.
    fn along_with(&self, claimed: &[ChunkId], free: &dyn Fn(ChunkId) -> bool) -> Vec<ChunkId> {
        let (index, config) = (self.file.index(), &self.config);
        let mut more = plan::siblings(index, claimed);
        if let Some(last) = more.last().copied() {
            let bytes_max = config.read_ahead_encoded_bytes;
            more.extend(plan::ahead(index, last, bytes_max, config.plan, free));
        }
        more
    }

    /// Fills missing chunks one background request after another, in the order of the data
    /// file, up to the first that begins at or after `blob_end` in the blob.
    async fn fill_behind(self: &Arc<Self>, blob_end: Option<u64>) -> Result<()> {
        let mut from = 0;
        while let Some(mut next) = self.behind(from)? {
            if let Some(end) = blob_end {
                if self.begins_at(next.first) >= end {
                    break;
                }
                next.ids.retain(|id| self.begins_at(*id) < end);
            }
            from = next.first.saturating_add(1);
            let need = fetch::memory_of(self, &next.ids);
            let pass = self.gate.enter(Priority::Background, need).await;
            // Readers may have claimed or filled some of it while we waited.
            let is_present = |id| self.file.is_present(id);
            let nothing = |_: &[ChunkId], _: &dyn Fn(ChunkId) -> bool| Vec::new();
            let claim = self.inflight.claim(&next.ids, is_present, nothing);
            let leave = pass.map_or(Leave::Asked(Priority::Background), Leave::Given);
            self.start(claim.mine, leave);
            inflight::wait(claim.waits).await?;
        }
        Ok(())
    }

    /// Where a chunk's encoded bytes begin; past every blob for one that has none alone.
    fn begins_at(&self, id: ChunkId) -> u64 {
        let chunks = &self.file.index().chunks;
        let chunk = usize::try_from(id).ok().and_then(|id| chunks.get(id));
        let blob = chunk.and_then(|chunk| chunk.encoding.blob());
        blob.map_or(u64::MAX, |blob| blob.start())
    }

    /// The next request of a background fill, at or after the chunk `from`.
    fn behind(&self, from: ChunkId) -> Result<Option<Behind>> {
        let index = self.file.index();
        let missing = self.file.missing_from(from);
        let ids = plan::first_bytes(index, missing, BEHIND_BYTES);
        let Some(first) = ids.first().copied() else {
            return Ok(None);
        };
        let plan = plan::plan(index, &ids, self.config.plan)?;
        let has_first = |request: &plan::Request| request.chunks().any(|id| id == first);
        let request = plan.requests.iter().find(|request| has_first(request));
        // A table out of the blob's order may leave it for a later plan; then it goes alone.
        let mut ids: Vec<ChunkId> = match request {
            Some(request) => request.chunks().collect(),
            None => vec![first],
        };
        ids.sort_unstable();
        Ok(Some(Behind { first, ids }))
    }

    /// Fills the claimed chunks in a task of the layer's own: from other layers of this node
    /// as far as they have them, the rest from the source.
    fn start(self: &Arc<Self>, mine: Mine, leave: Leave) {
        if mine.is_empty() {
            return;
        }
        let shared = Arc::clone(self);
        self.tasks.spawn(async move {
            let cancel = shared.cancel.clone();
            let mine = Arc::new(local::first(&shared, mine).await);
            let fetch = async {
                match leave {
                    Leave::Given(pass) => fetch::run_behind(&shared, &mine, pass).await,
                    Leave::Asked(priority) => fetch::run(&shared, &mine, priority).await,
                }
            };
            tokio::select! {
                biased;
                () = cancel.cancelled() => mine.fail_rest(closed(&shared.blob)),
                () = fetch => {}
            }
            shared.flush_if_due().await;
        });
    }

    /// A failure to record costs a refetch after a crash, not a read: it is logged here
    /// and shows again when the owner flushes.
    async fn flush_if_due(&self) {
        if !self.file.is_flush_due(self.config.flush, Instant::now()) {
            return;
        }
        let file = Arc::clone(&self.file);
        let flushed = blocking(move || file.flush()).await;
        if let Err(error) = flushed {
            tracing::warn!(%error, "cannot record fetched chunks yet");
        }
    }
}

/// What lets a fetch send its requests.
enum Leave {
    /// Each of them asks the gate.
    Asked(Priority),
    /// All of them go, one after another, on this.
    Given(Pass),
}

/// What a background fill asks for next.
struct Behind {
    /// The first missing chunk.
    first: ChunkId,
    /// What one request brings, the first chunk among it; ascending.
    ids: Vec<ChunkId>,
}

fn closed(blob: &BlobRef) -> Error {
    Error::Unavailable {
        what: format!("layer {}", blob.digest),
        host: blob.repository.host().to_owned(),
        detail: "it was closed while being fetched".to_owned(),
    }
}

#[cfg(test)]
mod tests;
