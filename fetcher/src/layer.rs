//! A layer that file systems read from: what is present comes from the data file, what
//! is not is fetched, verified and kept.
//!
//! Invariant: [`Layer::try_read`] and [`Layer::fill`] never expose a byte that was not
//! verified against the index. One fetch per chunk however many readers wait for it; a
//! fetch belongs to the layer, not to a reader, so a reader that goes away stops nothing.
//! An error reaches everyone who waits and is forgotten: the next reader tries again.
//!
//! Read-ahead is two rules. A wanted chunk brings the missing chunks of its gzip member,
//! whose bytes come with it anyway. Then `read_ahead_bytes` of the data file behind the
//! range are fetched too, and nobody waits for them.
//!
//! Memory: a fetch holds, of each request under way, at most its largest piece, encoded
//! and decoded, and one piece of the body. Permits for that are taken before the request.

mod fetch;
mod inflight;
pub mod open;
mod window;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::inflight::{Claim, Inflight};
use crate::index::{ChunkId, Encoding, LayerIndex};
use crate::plan::PlanLimits;
use crate::source::{BlobRef, BlobSource};
use crate::store::{FlushPolicy, LayerFile};
use crate::types::ByteRange;
use crate::{Error, Result};

/// Data bytes that [`Layer::fill_all`] asks for at a time: few enough that a reader's
/// request never waits behind more, enough to keep requests long.
const FILL_ALL_BYTES: u64 = 32 << 20;

/// What reading a layer has cost so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerCounters {
    /// Ranged requests sent to the source.
    pub requests: u64,
    /// Encoded bytes received from the source.
    pub bytes_fetched: u64,
    /// Chunks verified and stored.
    pub chunks_filled: u64,
    /// Pieces that did not decode or verify and were dropped.
    pub chunks_corrupt: u64,
}

/// Bounds of what one layer does at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// How chunks become requests.
    pub plan: PlanLimits,
    /// Requests under way at once. More than a handful only splits the link.
    pub requests_max: u32,
    /// Bytes held in memory by all of them. A piece that needs more runs alone.
    pub memory_bytes_max: u64,
    /// Bytes of the data file fetched behind a wanted range. 0 because a chunk is
    /// already a larger read-ahead than most programs make use of.
    pub read_ahead_bytes: u64,
    /// When fetched chunks are recorded.
    pub flush: FlushPolicy,
}

impl Default for LayerConfig {
    fn default() -> Self {
        Self {
            plan: PlanLimits::default(),
            requests_max: 4,
            memory_bytes_max: 64 << 20,
            read_ahead_bytes: 0,
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
    requests: Semaphore,
    memory: Semaphore,
    counters: Counters,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    bytes_fetched: AtomicU64,
    chunks_filled: AtomicU64,
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
        let requests = usize::try_from(config.requests_max.max(1)).unwrap_or(1);
        let shared = Arc::new(Shared {
            file,
            source,
            blob,
            requests: Semaphore::new(requests),
            memory: Semaphore::new(fetch::permits_total(config.memory_bytes_max)),
            config,
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
        let claim = shared.claim(&missing);
        shared.start(claim.mine);
        shared.read_ahead(range);
        inflight::wait(claim.waits).await
    }

    /// Makes the whole layer present, a window at a time, behind readers.
    pub async fn fill_all(&self) -> Result<()> {
        let end = self.index().data_len;
        let mut at = 0;
        while at < end {
            let next = at.saturating_add(FILL_ALL_BYTES).min(end);
            if let Some(window) = ByteRange::new(at, next) {
                self.fill(window).await?;
            }
            at = next;
        }
        self.flush().await
    }

    /// Records what is present; see [`LayerFile::flush`].
    pub async fn flush(&self) -> Result<()> {
        let file = Arc::clone(&self.shared.file);
        fetch::blocking(move || file.flush()).await
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
    /// Claims the chunks that nobody fetches, with their members' other missing chunks;
    /// waits only for those in `wanted`.
    fn claim(&self, wanted: &[ChunkId]) -> Claim {
        let siblings = siblings(self.file.index(), wanted);
        let file = &self.file;
        self.inflight
            .claim(wanted, &siblings, |id| file.is_present(id))
    }

    /// Fetches the claimed chunks in a task of the layer's own.
    fn start(self: &Arc<Self>, mine: inflight::Mine) {
        if mine.is_empty() {
            return;
        }
        let shared = Arc::clone(self);
        self.tasks.spawn(async move {
            let cancel = shared.cancel.clone();
            tokio::select! {
                biased;
                () = cancel.cancelled() => mine.fail_rest(closed(&shared.blob)),
                () = fetch::run(&shared, &mine) => {}
            }
            shared.flush_if_due().await;
        });
    }

    fn read_ahead(self: &Arc<Self>, range: ByteRange) {
        let end = range
            .end()
            .saturating_add(self.config.read_ahead_bytes)
            .min(self.file.index().data_len);
        let Some(ahead) = ByteRange::new(range.end(), end).filter(|r| !r.is_empty()) else {
            return;
        };
        let missing = self.file.missing(ahead);
        self.start(self.claim(&missing).mine);
    }

    /// A failure to record costs a refetch after a crash, not a read: it is logged here
    /// and shows again when the owner flushes.
    async fn flush_if_due(&self) {
        let (file, policy) = (Arc::clone(&self.file), self.config.flush);
        let flushed = fetch::blocking(move || file.flush_if_due(policy, Instant::now())).await;
        if let Err(error) = flushed {
            tracing::warn!(%error, "cannot record fetched chunks yet");
        }
    }
}

/// Chunks next to the wanted ones that have the same encoded bytes.
fn siblings(index: &LayerIndex, wanted: &[ChunkId]) -> Vec<ChunkId> {
    let member = |id: ChunkId| match crate::plan::chunk(index, id).ok()?.encoding {
        Encoding::GzipMember { blob, .. } => Some(blob),
        Encoding::Stream => None,
    };
    let mut found = Vec::new();
    for id in wanted {
        let Some(blob) = member(*id) else { continue };
        let same = |other: &ChunkId| member(*other) == Some(blob);
        found.extend((0..*id).rev().take_while(same));
        found.extend((id.saturating_add(1)..).take_while(same));
    }
    found.sort_unstable();
    found.dedup();
    found
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
