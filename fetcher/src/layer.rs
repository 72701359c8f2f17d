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
//! request, more of them the more of such were read before; nobody waits for those, and
//! each is there as soon as its own bytes are.
//!
//! Readers go first, over all layers that share a [`FetchEngine`]: what a profile expects
//! or nobody waits for begins only while no reader's request waits. Who wants a chunk that
//! a less urgent request brings hurries that request on.
//!
//! A reader that waits says what will be read next (`foresight`): it is fetched behind all
//! readers.
//!
//! A reader's request whose answer is late is sent once more, within a budget.
//!
//! Memory: a request holds its largest member encoded, two of its chunks decoded and one
//! piece of the body as it came. It begins once the engine's budget has room for them. What
//! could never fit is refused; [`open`] makes no layer lazy that has such a chunk.

mod ahead;
mod behind;
mod counters;
mod decode;
mod details;
mod engine;
mod fetch;
mod first;
mod foresight;
mod gate;
mod inflight;
mod local;
pub mod open;
mod record;
mod stream;
mod window;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Instant, SystemTime};

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::ahead::Ahead;
use self::behind::Pace;
use self::counters::Counters;
pub use self::counters::LayerCounters;
use self::details::Remote;
use self::engine::Host;
pub use self::engine::{EngineConfig, FetchEngine};
use self::foresight::Foresight;
pub use self::foresight::{Needs, OnNeeds};
use self::gate::{Ask, Pass, Ticket};
use self::inflight::{Inflight, Mine};
use crate::index::{ChunkId, LayerIndex};
use crate::plan::whole::LayerFacts;
use crate::plan::{self, PlanLimits};
use crate::source::{BlobRef, BlobSource};
use crate::store::{FlushPolicy, LayerFile};
use crate::types::ByteRange;
use crate::{Error, Result};

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

impl Priority {
    /// All of them, the most urgent first.
    pub const ALL: [Self; 3] = [Self::OnDemand, Self::Profile, Self::Background];
}

/// How one layer is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// How chunks become requests at most; the link and who waits make it tighter.
    pub plan: PlanLimits,
    /// Most encoded bytes behind a missing chunk's member in which small missing chunks come
    /// with it, in the same request. Files that are next to each other in a layer are
    /// often read one after another, and a round trip costs more than this many bytes do.
    /// How many it is follows from what was read of such chunks before.
    pub read_ahead_encoded_bytes_max: u64,
    /// When fetched chunks are recorded.
    pub flush: FlushPolicy,
}

impl Default for LayerConfig {
    fn default() -> Self {
        Self {
            plan: PlanLimits::default(),
            read_ahead_encoded_bytes_max: ahead::BYTES_MAX,
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
    host: Arc<Host>,
    inflight: Inflight,
    ahead: Mutex<Ahead>,
    foresight: Foresight,
    /// Of an index that came without its details.
    remote: Option<Remote>,
    engine: Arc<FetchEngine>,
    /// Turns of copying from other layers.
    copying: Semaphore,
    counters: Counters,
    /// Whether a task waits to record what was fetched.
    will_record: AtomicBool,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

impl Layer {
    /// Joins a stored layer with the source that can fill it, and an engine of its own.
    pub fn new(file: Arc<LayerFile>, source: Arc<dyn BlobSource>, blob: BlobRef) -> Arc<Self> {
        let engine = FetchEngine::new(EngineConfig::default());
        Self::with_engine(file, source, blob, LayerConfig::default(), engine)
    }

    /// [`Layer::new`] with an engine that other layers share.
    pub fn with_engine(
        file: Arc<LayerFile>,
        source: Arc<dyn BlobSource>,
        blob: BlobRef,
        config: LayerConfig,
        engine: Arc<FetchEngine>,
    ) -> Arc<Self> {
        let origin = file.details_origin();
        let remote = origin.map(|(index, start)| Remote::new(index.clone(), start));
        let shared = Arc::new(Shared {
            remote,
            file,
            source,
            host: engine.host(blob.repository.host()),
            blob,
            engine,
            config,
            copying: Semaphore::new(local::TURNS),
            inflight: Inflight::default(),
            ahead: Mutex::default(),
            foresight: Foresight::default(),
            counters: Counters::default(),
            will_record: AtomicBool::new(false),
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
        let read = self.shared.file.read_at(data_offset, buf)?;
        if read && let Some(place) = ByteRange::at(data_offset, buf.len() as u64) {
            self.shared.ahead.lock().read(place);
        }
        Ok(read)
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
        let priority = Priority::OnDemand;
        let claim = shared.inflight.claim(&missing, priority, is_present, more);
        shared.hurry(&claim.hurry, priority);
        let (is_miss, began) = (!claim.mine.is_empty(), Instant::now());
        shared.start(claim.mine, None);
        if is_miss {
            foresight::missed(shared, range.start());
        }
        let outcome = inflight::wait(claim.waits).await;
        foresight::log_wait(shared, range, began);
        outcome
    }

    /// Makes these chunks present, in about this order, ids out of range ignored. Dropping
    /// the future abandons only this wait.
    pub async fn fill_chunks(&self, ids: &[ChunkId], priority: Priority) -> Result<()> {
        let shared = &self.shared;
        let count = shared.file.index().chunks.len();
        let is_known = |id: &ChunkId| usize::try_from(*id).is_ok_and(|id| id < count);
        let wanted: Vec<ChunkId> = ids.iter().copied().filter(is_known).collect();
        inflight::wait(shared.fetch(&wanted, priority, None)).await
    }

    /// Says that these chunks will be wanted soon, so that what decoding them takes is asked
    /// for together and not chunk by chunk. Nobody waits for it; what does not come is asked
    /// for again with the chunks.
    pub fn expect(&self, ids: Vec<ChunkId>) {
        if self.shared.remote.is_none() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move {
            let begun = details::begin(&shared, &ids, Priority::Profile).await;
            if let Err(error) = begun {
                tracing::debug!(digest = %shared.blob.digest, %error, "cannot look for details");
            }
        });
    }

    /// Fetches what the index lacks of its details: then nothing but the layer's own blob is
    /// needed to read all of it.
    pub async fn fill_details(&self) -> Result<()> {
        let chunks = ChunkId::try_from(self.index().chunks.len()).unwrap_or(ChunkId::MAX);
        let all: Vec<ChunkId> = (0..chunks).collect();
        details::ready(&self.shared, &all, Priority::Background).await
    }

    /// Makes the whole layer present, behind readers: a few requests at a time, begun only
    /// while nobody else's is under way or waits. So a reader never waits for these, unless
    /// one of them brings what it wants. One under way when a reader comes stops reading
    /// after its current chunk until the reader has been served. The first error ends it.
    /// Dropping the future stops it after the requests under way.
    pub async fn fill_all(&self) -> Result<()> {
        behind::fill(&self.shared, None, Pace::Now).await?;
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
                outcome = behind::fill(&shared, Some(blob_end), Pace::Now) => if let Err(error) = outcome {
                    tracing::debug!(digest = %shared.blob.digest, %error, "prefetch ended early");
                }
            }
        });
    }

    /// Starts to fetch everything that is missing: at once as what a start reads if it is
    /// `soon` needed, else in the same way as [`Self::fill_all`]. Nobody waits for it.
    pub fn fetch_rest(&self, soon: bool) {
        if !soon {
            return self.prefetch(u64::MAX);
        }
        let missing: Vec<ChunkId> = self.shared.file.missing_from(0).collect();
        drop(self.shared.fetch(&missing, Priority::Profile, None));
    }

    /// What decides whether it is fetched whole, by a profile that names `covered` of it.
    pub fn facts(&self, covered: Option<&[ChunkId]>) -> LayerFacts {
        let (shared, index) = (&self.shared, self.shared.file.index());
        let total: u64 = index.chunks.iter().map(|c| u64::from(c.len)).sum();
        let missing = total.saturating_sub(shared.file.present_bytes());
        let named = |ids: &[ChunkId]| {
            let ids = ids.iter().copied();
            let absent: Vec<ChunkId> = ids.filter(|id| !shared.file.is_present(*id)).collect();
            // One that cannot be fetched alone is not fetched early.
            plan::whole::encoded_bytes(index, &absent).unwrap_or(0)
        };
        LayerFacts {
            missing_bytes: plan::whole::part_of(shared.blob.size, missing, total),
            covered_bytes: covered.map(named),
            link: shared.host.link(),
        }
    }

    /// Asks that these chunks, which a start reads, outlast others; see [`LayerFile::pin`].
    pub fn pin(&self, ids: Vec<ChunkId>) {
        let file = Arc::clone(&self.shared.file);
        let pin = move || file.pin(ids, SystemTime::now());
        // Owned and waited for by the tracker; a hint that is lost costs nobody a read.
        drop(self.shared.tasks.spawn_blocking(pin));
    }

    /// Decoded bytes that are present.
    pub fn present_bytes(&self) -> u64 {
        self.shared.file.present_bytes()
    }

    /// What it has cost so far.
    pub fn counters(&self) -> LayerCounters {
        self.shared.counters.snapshot()
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
        let index = self.file.index();
        let mut more = plan::siblings(index, claimed);
        let Some(last) = more.last().copied() else {
            return more;
        };
        let mut ahead = self.ahead.lock();
        let bytes_max = ahead.bytes(self.host.link());
        let bytes_max = bytes_max.min(self.config.read_ahead_encoded_bytes_max);
        let limits = self.limits(Priority::OnDemand);
        let behind = plan::ahead(index, last, bytes_max, limits, free);
        let chunks = behind.iter().filter_map(|id| plan::chunk(index, *id).ok());
        for place in chunks.filter_map(|c| ByteRange::at(c.data_offset, c.len.into())) {
            ahead.brought(place);
        }
        more.extend(plan::whole_members(index, &behind));
        more.extend(behind);
        more
    }

    /// How chunks become requests on the link as it is known now.
    fn limits(&self, priority: Priority) -> PlanLimits {
        let parts_max = self.source.parts_max(&self.blob);
        self.config.plan.on(self.host.link(), parts_max, priority)
    }

    /// Claims what is missing of `wanted` and fetches it, the first request on `pass`; what
    /// to wait for.
    fn fetch(
        self: &Arc<Self>,
        wanted: &[ChunkId],
        priority: Priority,
        pass: Option<Pass>,
    ) -> Vec<inflight::Wait> {
        let is_present = |id| self.file.is_present(id);
        let index = self.file.index();
        let whole =
            |claimed: &[ChunkId], _: &dyn Fn(ChunkId) -> bool| plan::whole_members(index, claimed);
        let claim = self.inflight.claim(wanted, priority, is_present, whole);
        self.hurry(&claim.hurry, priority);
        self.start(claim.mine, pass);
        claim.waits
    }

    fn hurry(&self, tickets: &[Ticket], priority: Priority) {
        for ticket in tickets {
            self.engine.gate.promote(*ticket, priority);
        }
    }

    /// What the gate must know of a request for `ids`.
    fn ask(&self, class: Priority, ids: &[ChunkId]) -> Result<Ask> {
        Ok(Ask {
            class,
            host: Arc::clone(&self.host.name),
            bytes: self.check_memory(ids)?,
        })
    }

    /// Bytes of memory that a request for `ids` takes; an error where the budget never has
    /// as many.
    fn check_memory(&self, ids: &[ChunkId]) -> Result<u64> {
        let (need, max) = (
            fetch::memory_of(self, ids),
            self.engine.config.memory_bytes_max,
        );
        if need <= max {
            return Ok(need);
        }
        let first = ids.first().copied().unwrap_or_default();
        let what = format!("chunk {first} of layer {}", self.blob.digest);
        let detail = format!(
            "decoding it takes {need} bytes of memory, {max} are allowed; \
             remove the image and pull it again: then this layer is streamed"
        );
        Err(Error::limit(what, detail))
    }

    /// Fills the claimed chunks in a task of the layer's own: from other layers of this node
    /// as far as they have them, the rest from the source, the first request on `pass`.
    fn start(self: &Arc<Self>, mine: Mine, pass: Option<Pass>) {
        if mine.is_empty() {
            return;
        }
        let shared = Arc::clone(self);
        self.tasks.spawn(async move {
            let cancel = shared.cancel.clone();
            shared.begin_details(&mine).await;
            let mine = Arc::new(local::first(&shared, mine).await);
            tokio::select! {
                biased;
                () = cancel.cancelled() => mine.fail_rest(closed(&shared.blob)),
                () = fetch::run(&shared, &mine, pass) => {}
            }
            shared.flush_if_due().await;
        });
    }

    /// Sees to it that the details of claimed chunks are on their way. A failure shows again
    /// where they are needed.
    async fn begin_details(self: &Arc<Self>, mine: &Mine) {
        let priority = mine.priority();
        let is_remaking = self.remote.as_ref().is_some_and(Remote::is_remaking);
        let outcome = match priority {
            // The chunks' own bytes would wait for them meanwhile, and keep others out.
            _ if is_remaking => details::ready(self, mine.ids(), priority).await,
            // Another layer may have these; that is seen by their digests.
            Priority::Profile if self.file.has_neighbours() => {
                details::ready(self, mine.ids(), priority).await
            }
            Priority::Background => details::ready(self, mine.ids(), priority).await,
            Priority::OnDemand | Priority::Profile => {
                details::begin(self, mine.ids(), priority).await.map(drop)
            }
        };
        if let Err(error) = outcome {
            tracing::debug!(digest = %self.blob.digest, %error, "no details yet");
        }
    }
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
