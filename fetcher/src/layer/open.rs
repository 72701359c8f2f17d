//! From a layer's descriptor to a [`Layer`] that can be read.
//!
//! Three ways, tried in this order: the store already has it; its blob carries a TOC that
//! the manifest vouches for, so an index is read and the data comes later; otherwise the
//! blob is streamed in full, its digest and diff_id checked, and the index made on the
//! way. Invariant: a layer is in the store only with an index that one of the three
//! chains of trust reaches. Never decides whether a whole image is pulled: callers do.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::Layer;
use crate::index::estargz;
use crate::index::ingest::{Ingest, IngestPlan};
use crate::source::{BlobRef, BlobSource};
use crate::store::{LayerFile, LayerIngest, Store};
use crate::task::blocking;
use crate::types::{ByteRange, Descriptor, Digest, Repository};
use crate::{Error, Result};

/// Pieces of a body that may wait for the decoder. Bodies come in pieces of at most some
/// hundred KiB, so this bounds a streaming pull's memory to a few MiB.
const PIECES_WAITING_MAX: usize = 16;

/// What a manifest and a config say about one layer.
#[derive(Debug, Clone)]
pub struct LayerRequest {
    /// The blob.
    pub blob: BlobRef,
    /// Digest of the uncompressed tar; checked when the layer is streamed in full.
    pub diff_id: Digest,
    /// Digest of the eStargz TOC, where the manifest carries one.
    pub toc_digest: Option<Digest>,
}

impl LayerRequest {
    /// Reads what concerns layers out of a manifest's descriptor.
    pub fn new(repository: Repository, descriptor: &Descriptor, diff_id: Digest) -> Result<Self> {
        let toc_digest = match descriptor.annotations.get(estargz::TOC_DIGEST_ANNOTATION) {
            Some(text) => Some(Digest::parse(text).map_err(|e| {
                Error::malformed(
                    format!("layer {}", descriptor.digest),
                    format!("its TOC annotation: {e}"),
                )
            })?),
            None => None,
        };
        let blob = BlobRef {
            repository,
            digest: descriptor.digest,
            size: descriptor.size,
        };
        Ok(Self {
            blob,
            diff_id,
            toc_digest,
        })
    }
}

/// How a layer became readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenedBy {
    /// It was in the store.
    Store,
    /// Its TOC was read; data is fetched when it is needed.
    Toc,
    /// It was streamed in full.
    Stream,
}

/// Opens layers of one store from one source.
pub struct LayerOpener {
    store: Arc<Store>,
    source: Arc<dyn BlobSource>,
    /// One opening per layer at a time: an image may hold a layer twice, and two images
    /// may be pulled at once. Keys are dropped with their last user.
    opening: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

impl LayerOpener {
    /// An opener that fills `store` from `source`.
    pub fn new(store: Arc<Store>, source: Arc<dyn BlobSource>) -> Self {
        Self {
            store,
            source,
            opening: Mutex::default(),
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
        let digest = request.blob.digest;
        let store = Arc::clone(&self.store);
        let stored = move || match store.open_layer(&digest)? {
            // The caller records the image by this answer.
            Some(file) => file.settle().map(|()| Some(file)),
            None => Ok(None),
        };
        match blocking(stored).await {
            Ok(Some(file)) => return Ok((self.layer(file, request), OpenedBy::Store)),
            Ok(None) => {}
            // Whoever stores a layer puts it in the place of a damaged one.
            Err(error @ Error::Malformed { .. }) => {
                tracing::warn!(digest = %digest, %error, "stored layer is damaged, fetching it again");
            }
            Err(error) => return Err(error),
        }
        if let Some(toc_digest) = &request.toc_digest {
            match self.by_toc(request, toc_digest).await {
                Ok(Some((file, landmark))) => {
                    let layer = self.layer(file, request);
                    if let Some(landmark) = landmark {
                        layer.prefetch(landmark.end());
                    }
                    return Ok((layer, OpenedBy::Toc));
                }
                Ok(None) => {}
                Err(error @ Error::Unsupported { .. }) => {
                    tracing::warn!(digest = %digest, %error, "layer cannot be read lazily, pulling it whole");
                }
                Err(error) => return Err(error),
            }
        }
        let file = self.by_stream(request, received).await?;
        Ok((self.layer(file, request), OpenedBy::Stream))
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
        Layer::new(file, Arc::clone(&self.source), request.blob.clone())
    }

    /// Reads footer and TOC from the blob's tail. `None` where the blob has no footer
    /// that allows lazy verification, whatever its annotation says. With the layer comes the
    /// part of the blob that whoever built it wants fetched first.
    async fn by_toc(
        &self,
        request: &LayerRequest,
        toc_digest: &Digest,
    ) -> Result<Option<(Arc<LayerFile>, Option<ByteRange>)>> {
        let blob = &request.blob;
        let tail_start = blob.size.saturating_sub(estargz::tail_len(blob.size));
        let mut tail = self.read(blob, tail_start, blob.size).await?;
        let Some(footer) = estargz::read_footer(&tail, blob.size)? else {
            tracing::warn!(digest = %blob.digest, "layer has a TOC digest but no eStargz footer, pulling it whole");
            return Ok(None);
        };
        if footer.toc_offset() < tail_start {
            let mut joined = BytesMut::from(
                self.read(blob, footer.toc_offset(), tail_start)
                    .await?
                    .as_ref(),
            );
            joined.extend_from_slice(&tail);
            tail = joined.freeze();
        } else {
            let skip = usize::try_from(footer.toc_offset() - tail_start).unwrap_or(usize::MAX);
            tail = tail.slice(skip.min(tail.len())..);
        }
        let (blob, toc_digest, store) = (blob.clone(), *toc_digest, Arc::clone(&self.store));
        blocking(move || {
            let parsed = estargz::parse_toc(&blob, &footer, &tail, &toc_digest)?;
            Ok(Some((store.create_layer(parsed.index)?, parsed.prefetch)))
        })
        .await
    }

    async fn read(&self, blob: &BlobRef, start: u64, end: u64) -> Result<Bytes> {
        let range = ByteRange::new(start, end).ok_or_else(|| {
            Error::malformed(
                format!("layer {}", blob.digest),
                "its TOC starts after its end",
            )
        })?;
        estargz::check_toc_len(range.len())?;
        let mut body = self.source.read_range(blob, range).await?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = body.next().await {
            bytes.extend_from_slice(&piece?);
        }
        Ok(bytes.freeze())
    }

    /// Streams the whole blob through the decoder into the store.
    async fn by_stream(
        &self,
        request: &LayerRequest,
        received: &AtomicU64,
    ) -> Result<Arc<LayerFile>> {
        let mut body = self.source.read_all(&request.blob).await?;
        let (pieces, inbox) = mpsc::channel(PIECES_WAITING_MAX);
        let (store, request) = (Arc::clone(&self.store), request.clone());
        // Spawned now, so that the channel is drained while the body is read.
        let worker = tokio::spawn(blocking(move || ingest(&store, &request, inbox)));
        let mut broken = None;
        while let Some(piece) = body.next().await {
            match piece {
                Ok(piece) => {
                    received.fetch_add(piece.len() as u64, Ordering::Relaxed);
                    if pieces.send(piece).await.is_err() {
                        break; // the worker failed; its error says why
                    }
                }
                Err(error) => {
                    broken = Some(error);
                    break;
                }
            }
        }
        drop(pieces);
        let outcome = match worker.await {
            Ok(outcome) => outcome,
            Err(stopped) => std::panic::resume_unwind(stopped.into_panic()),
        };
        match broken {
            Some(error) => Err(error),
            None => outcome,
        }
    }
}

/// The blocking half of a full stream. Ends without a commit when the sender went away
/// early: the blob is then too short for its digest.
fn ingest(
    store: &Arc<Store>,
    request: &LayerRequest,
    mut inbox: mpsc::Receiver<Bytes>,
) -> Result<Arc<LayerFile>> {
    let sink: LayerIngest = store.begin_ingest(&request.blob.digest)?;
    let plan = IngestPlan::new(
        request.blob.digest,
        request.blob.size,
        Some(request.diff_id),
    );
    let mut ingest = Ingest::new(plan, sink);
    while let Some(piece) = inbox.blocking_recv() {
        ingest.push(&piece)?;
    }
    let ingested = ingest.finish()?;
    ingested.sink.commit(ingested.index, &ingested.details)
}
