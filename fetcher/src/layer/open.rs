//! From a layer's descriptor to a [`Layer`] that can be read.
//!
//! Three ways, tried in this order: the store already has it; there is a table that the
//! manifest vouches for, or somebody whom this node trusts, so an index is read and the data
//! comes later; otherwise the blob is streamed in full, its digest and diff_id checked, and the index made on the
//! way. A way that cannot be gone ([`Error::Unsupported`]) leads to the next one and a
//! line in the log; one that leads to wrong bytes is the end. A table with a chunk that this node
//! could never read alone is no way either, and that is seen before a container can meet it.
//! Who wants all of a layer at once has it streamed where a zTOC would be its table (`proven`).
//!
//! Invariant: a layer is in the store only with an index that a chain of trust reaches: from
//! the manifest (TOC, zTOC), from a key or a setting of this node, or its own streaming. Never decides whether a whole image is pulled: callers do.

mod ahead;
mod alone;
mod asker;
mod document;
mod offered;
mod proven;
mod request;
mod toc;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::available_parallelism;

use parking_lot::Mutex;

use super::stream::{Pieces, Stream};
use super::{EngineConfig, FetchEngine, Layer, LayerConfig};
use crate::index::LayerIndex;
use crate::index::estargz::{self, TocLayer};
use crate::index::ingest::{Ingest, IngestPlan};
use crate::index::soci;
use crate::source::{BlobRef, BlobSource};
use crate::store::{LayerFile, LayerIngest, Store};
use crate::task::blocking;
use crate::trust::TrustedKeys;
use crate::types::{Descriptor, Digest, Repository};
use crate::{Error, Result};

use self::ahead::Ahead;
pub(super) use self::asker::others_took_too_long;
pub use self::asker::{Asker, Lines, Said};
use self::offered::Offered;
pub use self::offered::{OFFERED_BYTES_MAX, OfferedIndex, core_bytes, core_digest};
pub use request::{LayerRequest, TocPromise};

/// How a layer became readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenedBy {
    /// It was in the store.
    Store,
    /// A table that came with it was read, its TOC, its zTOC or a signed index; data is fetched
    /// when it is needed.
    Toc,
    /// It was streamed in full.
    Stream,
}

/// Opens layers of one store from one source.
pub struct LayerOpener {
    store: Arc<Store>,
    source: Arc<dyn BlobSource>,
    /// What all its layers fetch with.
    engine: Arc<FetchEngine>,
    /// Whose indexes are used.
    keys: TrustedKeys,
    /// One opening per layer at a time: an image may hold a layer twice, and two images
    /// may be pulled at once. Keys are dropped with their last user.
    opening: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    /// Held by every stream under way, to count them.
    streaming: Arc<()>,
    ahead: Ahead,
}

impl LayerOpener {
    /// An opener that fills `store` from `source`.
    pub fn new(store: Arc<Store>, source: Arc<dyn BlobSource>) -> Self {
        Self {
            store,
            source,
            engine: FetchEngine::new(EngineConfig::default()),
            keys: TrustedKeys::default(),
            opening: Mutex::default(),
            streaming: Arc::default(),
            ahead: Ahead::default(),
        }
    }

    /// The same, that uses indexes signed by one of `keys`.
    #[must_use]
    pub fn trusting(self, keys: TrustedKeys) -> Self {
        Self { keys, ..self }
    }

    /// The same, whose layers fetch with `engine`: a node has one, however many openers.
    #[must_use]
    pub fn fetching_with(self, engine: Arc<FetchEngine>) -> Self {
        Self { engine, ..self }
    }

    /// Begins to read the tables of contents that a manifest promises of `layers`, which are
    /// about to be opened, unless they are in the store. Waits for none of them.
    pub async fn look_ahead(&self, repository: &Repository, layers: &[Descriptor]) {
        let store = Arc::clone(&self.store);
        let digests: Vec<Digest> = layers.iter().map(|layer| layer.digest).collect();
        let is_missing = move |digest: &Digest| !matches!(store.open_index(digest), Ok(Some(_)));
        let missing = move || digests.into_iter().filter(is_missing).collect();
        let missing: HashSet<Digest> = blocking(missing).await;
        for layer in layers
            .iter()
            .filter(|layer| missing.contains(&layer.digest))
        {
            let blob = BlobRef {
                repository: repository.clone(),
                digest: layer.digest,
                size: layer.size,
            };
            // What is wrong with a promise is said when its layer is opened.
            if let Some(range) = toc::first_read(&request::toc(layer), &blob) {
                self.ahead.begin(&self.source, blob, range);
            }
        }
    }

    /// Makes the layer readable. `received` counts encoded bytes of a full stream as they
    /// come, for progress.
    pub async fn open(
        &self,
        request: &LayerRequest,
        received: &AtomicU64,
    ) -> Result<(Arc<Layer>, OpenedBy)> {
        let turn = self.turn(request.blob.digest);
        let _turn = turn.lock().await;
        let opens = match &request.asker {
            Some(asker) => asker.opens().await,
            None => None,
        };
        let digest = request.blob.digest;
        let store = Arc::clone(&self.store);
        let stored = move || match store.open_layer(&digest)? {
            // The caller records the image by this answer.
            Some(file) => file.settle().map(|()| Some(file)),
            None => Ok(None),
        };
        match blocking(stored).await {
            Ok(Some(file)) if request.is_wanted_whole && file.index().is_by_ztoc() => {
                return self.prove(&file, request, received).await;
            }
            Ok(Some(file)) => return Ok((self.layer(file, request), OpenedBy::Store)),
            Ok(None) => {}
            // Whoever stores a layer puts it in the place of a damaged one.
            Err(error @ Error::Malformed { .. }) => {
                tracing::warn!(digest = %digest, %error, "stored layer is damaged, fetching it again");
            }
            Err(error) => return Err(error),
        }
        if let Some(layer) = self.by_index(request).await? {
            return Ok((layer, OpenedBy::Toc));
        }
        drop(opens);
        let file = self.by_stream(request, received).await?;
        Ok(self.streamed(file, request))
    }

    /// Streams the layer and checks it, whatever is here by a table that it cannot be read by.
    /// Who has that open goes on with it.
    pub async fn open_by_stream(
        &self,
        request: &LayerRequest,
        received: &AtomicU64,
    ) -> Result<Arc<Layer>> {
        let turn = self.turn(request.blob.digest);
        let _turn = turn.lock().await;
        let file = self.by_stream(request, received).await?;
        Ok(self.streamed(file, request).0)
    }

    fn streamed(&self, file: Arc<LayerFile>, request: &LayerRequest) -> (Arc<Layer>, OpenedBy) {
        let layer = self.layer(file, request);
        layer.flush_behind();
        (layer, OpenedBy::Stream)
    }

    fn turn(&self, digest: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut opening = self.opening.lock();
        opening.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = opening.get(&digest).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        opening.insert(digest, Arc::downgrade(&turn));
        turn
    }

    fn layer(&self, file: Arc<LayerFile>, request: &LayerRequest) -> Arc<Layer> {
        Layer::with_engine(
            file,
            Arc::clone(&self.source),
            request.blob.clone(),
            LayerConfig::default(),
            Arc::clone(&self.engine),
        )
    }

    /// Makes the layer readable by a table somebody else made, if there is one to trust.
    /// Each kind of table is one arm here, the likeliest first.
    async fn by_index(&self, request: &LayerRequest) -> Result<Option<Arc<Layer>>> {
        let read = toc::read_toc((self.source.as_ref(), &self.ahead), request).await;
        let check = |toc: &TocLayer| self.check(&toc.index);
        let read = read.and_then(|toc| toc.as_ref().map_or(Ok(()), check).map(|()| toc));
        match read {
            Ok(Some(toc)) => return self.lazily(request, toc).await.map(Some),
            Ok(None) => {}
            // Streaming holds no table, so its limits do not matter.
            Err(error @ (Error::Unsupported { .. } | Error::Limit { .. })) => {
                let digest = &request.blob.digest;
                tracing::warn!(%digest, %error, "the layer's table of contents cannot be used, pulling it whole");
            }
            Err(error) => return Err(error),
        }
        // Before a zTOC: it has smaller pieces, and the signer verified the layer.
        if let Some(offered) = request.index.as_ref().filter(|_| !self.keys.is_empty())
            && let Some(layer) = self.by_offered(request, offered).await?
        {
            return Ok(Some(layer));
        }
        match request.ztoc.as_ref().filter(|_| !request.is_wanted_whole) {
            Some(ztoc) => self.by_ztoc(request, ztoc).await,
            None => Ok(None),
        }
    }

    /// Whether a layer with this index may be lazy; one that is in the store is.
    fn check(&self, index: &LayerIndex) -> Result<()> {
        alone::check(index, self.engine.config.memory_bytes_max)
    }

    /// Makes the layer readable by an index that is no part of the image.
    async fn by_offered(
        &self,
        request: &LayerRequest,
        offered: &OfferedIndex,
    ) -> Result<Option<Arc<Layer>>> {
        let read = offered::read(self.source.as_ref(), request, offered, &self.keys).await;
        let checked = read.and_then(|offered| self.check(offered.index()).map(|()| offered));
        let offered = match checked {
            Ok(offered) => offered,
            Err(error) => {
                // Not read once more: most are of somebody whose key is not trusted here.
                if matches!(error, Error::Corrupt { .. } | Error::Malformed { .. }) {
                    self.source.distrust(&offered.blob);
                }
                let digest = &request.blob.digest;
                tracing::warn!(%digest, %error, "not using the index beside the image, pulling the layer whole");
                return Ok(None);
            }
        };
        let store = Arc::clone(&self.store);
        let create = move || match offered {
            Offered::Whole(index, details) => store.create_layer_with(index, &details),
            Offered::Core(partial) => store.create_layer_without_details(&partial),
        };
        let file = blocking(create).await?;
        Ok(Some(self.layer(file, request)))
    }

    /// Makes the layer readable by a SOCI zTOC. It is only a shortcut: whatever is wrong with
    /// it is said in the log.
    async fn by_ztoc(&self, request: &LayerRequest, ztoc: &BlobRef) -> Result<Option<Arc<Layer>>> {
        let read = document::read(self.source.as_ref(), ztoc, soci::ZTOC_LEN_MAX).await;
        let (store, blob) = (Arc::clone(&self.store), request.blob.clone());
        let parsed = match read {
            Ok(bytes) => blocking(move || soci::parse(&blob, &bytes)).await,
            Err(error) => Err(error),
        };
        let checked = parsed.and_then(|parsed| self.check(&parsed.index).map(|()| parsed));
        let parsed = match checked {
            Ok(parsed) => parsed,
            Err(error) => {
                let digest = &request.blob.digest;
                tracing::warn!(%digest, %error, "not using the layer's zTOC, pulling it whole");
                return Ok(None);
            }
        };
        let file = blocking(move || store.create_layer_with(parsed.index, &parsed.details)).await?;
        Ok(Some(self.layer(file, request)))
    }

    /// Puts the index into the store, and begins with what its builder wants fetched first.
    async fn lazily(&self, request: &LayerRequest, toc: TocLayer) -> Result<Arc<Layer>> {
        let store = Arc::clone(&self.store);
        let create = move || {
            let (index, details) = estargz::cut(toc.index)?;
            store.create_layer_with(index, &details)
        };
        let file = blocking(create).await?;
        let layer = self.layer(file, request);
        if let Some(landmark) = toc.prefetch.filter(|_| request.fetch_landmark) {
            layer.prefetch(landmark.end());
        }
        Ok(layer)
    }

    /// Streams the whole blob through the decoder into the store; once more where it is not the
    /// promised one, for there may be another host, which is asked first then.
    async fn by_stream(
        &self,
        request: &LayerRequest,
        received: &AtomicU64,
    ) -> Result<Arc<LayerFile>> {
        let _turn = match &request.asker {
            Some(asker) => asker.streams(&request.blob).await?,
            None => None,
        };
        let before = received.load(Ordering::Relaxed);
        match self.stream(request, received).await {
            Err(error @ (Error::Corrupt { .. } | Error::Malformed { .. })) => {
                tracing::warn!(digest = %request.blob.digest, %error, "streaming the layer once more");
                received.store(before, Ordering::Relaxed);
                self.stream(request, received).await
            }
            outcome => outcome,
        }
    }

    async fn stream(&self, request: &LayerRequest, received: &AtomicU64) -> Result<Arc<LayerFile>> {
        let (source, engine) = (Arc::clone(&self.source), Arc::clone(&self.engine));
        let body = Stream::new(source, request.blob.clone(), engine).of(request.asker.clone());
        let (store, request) = (Arc::clone(&self.store), request.clone());
        let counted = Arc::clone(&self.streaming);
        // Layers that stream at once keep the cores busy; a second thread for each would
        // only take memory.
        let streams = Arc::strong_count(&counted) - 1;
        let beside = available_parallelism().is_ok_and(|cores| cores.get() >= 2 * streams);
        let work = move |pieces| {
            let _counted = counted;
            ingest(&store, &request, beside, pieces)
        };
        body.into_ingest(received, work).await
    }
}

/// The blocking half of a full stream; hashing and writing go `beside` decoding on a thread
/// of their own. Ends without a commit when the sender went away early: the blob is then
/// too short for its digest.
fn ingest(
    store: &Arc<Store>,
    request: &LayerRequest,
    beside: bool,
    pieces: Pieces,
) -> Result<Arc<LayerFile>> {
    let mut sink: LayerIngest = store.begin_ingest(&request.blob.digest)?;
    if !request.read_soon {
        sink = sink.past_page_cache()?;
    }
    let plan = IngestPlan::new(
        request.blob.digest,
        request.blob.size,
        Some(request.diff_id),
    );
    let mut ingest = Ingest::new(plan, sink);
    if beside {
        ingest = ingest.beside();
    }
    let ingested = pieces.feed(ingest)?;
    let sink = ingested.sink.with_seams(ingested.seams);
    sink.publish(ingested.index, &ingested.details)
}
