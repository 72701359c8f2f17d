//! Making the layers of an image readable, and counting how far that is.
//!
//! Invariant: layers are opened in parallel, at most [`LAYERS_AT_ONCE`] of them, and
//! handed on one by one as they are ready, so that mounting need not wait for the last.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest, OfferedIndex, OpenedBy};
use lazarette_fetcher::plan::whole::{Share, Why};
use lazarette_fetcher::source::BlobRef;
use lazarette_fetcher::types::{Digest, Reference};
use lazarette_fetcher::{Error, Result};
use parking_lot::Mutex;

use super::resolve::ResolvedManifest;
use super::soci::Ztocs;
use super::{Image, ImageLayer};
use crate::trace::{LayerShare, Trace};

/// Layers opened at once. Indexes are small and wait on the network; whole layers are
/// bound by two or three cores anyway.
pub const LAYERS_AT_ONCE: usize = 8;

/// Lazy where the layer allows it, or everything now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullMode {
    /// Read indexes where there are any; data comes when it is read.
    Lazy,
    /// Fetch every byte.
    Full,
}

/// What to do with the files that an eStargz's builder marked to be fetched first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landmarks {
    /// Fetch them.
    Honour,
    /// Leave them: something knows better.
    Ignore,
}

/// How far a pull is; read by whoever draws it.
#[derive(Debug, Default)]
pub struct PullProgress {
    layers: Mutex<Vec<Arc<LayerProgress>>>,
}

/// How far one layer is.
#[derive(Debug)]
pub struct LayerProgress {
    digest: Digest,
    total: u64,
    streamed: AtomicU64,
    stage: AtomicU8,
    layer: OnceLock<Arc<Layer>>,
}

/// Opens layers and keeps count.
pub struct Puller {
    opener: LayerOpener,
    /// Where steps are recorded.
    pub trace: Trace,
    /// Where counts go.
    pub progress: Arc<PullProgress>,
    /// How much is fetched.
    pub mode: PullMode,
    /// Whether a container is about to read what comes; see [`LayerRequest::read_soon`].
    pub read_soon: bool,
    /// Indexes that the registry has beside the image, by layer; set before layers open.
    pub offered: OnceLock<HashMap<Digest, OfferedIndex>>,
    /// SOCI zTOCs that may be used, by layer; set before layers open.
    pub ztocs: OnceLock<Ztocs>,
}

impl PullProgress {
    /// Layers that have been begun, in the order they were.
    pub fn layers(&self) -> Vec<Arc<LayerProgress>> {
        self.layers.lock().clone()
    }

    /// Decoded bytes that layers took from other layers of this node, in this run.
    pub fn copied(&self) -> u64 {
        self.layers.lock().iter().map(|layer| layer.copied()).sum()
    }

    fn begin(&self, blob: &BlobRef) -> Arc<LayerProgress> {
        let progress = Arc::new(LayerProgress {
            digest: blob.digest,
            total: blob.size,
            streamed: AtomicU64::new(0),
            stage: AtomicU8::new(0),
            layer: OnceLock::new(),
        });
        self.layers.lock().push(Arc::clone(&progress));
        progress
    }
}

impl LayerProgress {
    const STATES: [&'static str; 5] = [
        "opening",
        "in the store",
        "ready, loads lazily",
        "filling",
        "complete",
    ];

    /// Which layer.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Size of the blob, bytes.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Encoded bytes received in this run.
    pub fn received(&self) -> u64 {
        let lazy = self
            .layer
            .get()
            .map_or(0, |layer| layer.counters().bytes_fetched);
        self.streamed.load(Ordering::Relaxed) + lazy
    }

    /// Decoded bytes that other layers of this node had, copied in this run.
    pub fn copied(&self) -> u64 {
        let layer = self.layer.get();
        layer.map_or(0, |layer| layer.counters().bytes_copied)
    }

    /// What is happening, in a few words.
    pub fn state(&self) -> &'static str {
        let stage = usize::from(self.stage.load(Ordering::Relaxed));
        Self::STATES.get(stage).copied().unwrap_or_default()
    }

    fn stage(&self, stage: u8) {
        self.stage.store(stage, Ordering::Relaxed);
    }
}

impl Puller {
    /// A puller that opens layers with `opener`.
    pub fn new(opener: LayerOpener, trace: Trace, mode: PullMode) -> Self {
        Self {
            opener,
            trace,
            progress: Arc::default(),
            mode,
            read_soon: true,
            offered: OnceLock::new(),
            ztocs: OnceLock::new(),
        }
    }

    /// What opens layers, for who knows a layer but not its image.
    pub fn opener(&self) -> &LayerOpener {
        &self.opener
    }

    /// Begins to read what layers have for a table of contents, while the image's config is
    /// still to come. Waits for none of it.
    pub async fn look_ahead(&self, reference: &Reference, resolved: &ResolvedManifest) {
        let layers = &resolved.manifest.layers;
        self.opener.look_ahead(reference.repository(), layers).await;
    }

    /// What it takes to open a layer of `image`.
    pub fn request(
        &self,
        image: &Image,
        layer: &ImageLayer,
        landmarks: Landmarks,
    ) -> Result<LayerRequest> {
        let repository = image.reference.repository().clone();
        let digest = &layer.descriptor.digest;
        let request = LayerRequest::new(repository, &layer.descriptor, layer.diff_id)
            .of_image(&image.reference);
        Ok(LayerRequest {
            index: self.offered.get().and_then(|all| all.get(digest)).cloned(),
            ztoc: self.ztocs.get().and_then(|all| all.get(digest)).cloned(),
            fetch_landmark: landmarks == Landmarks::Honour,
            read_soon: self.read_soon,
            ..request
        })
    }

    /// Makes layer `number` of `image` readable and, in full mode, complete.
    pub async fn layer(
        &self,
        image: &Image,
        number: usize,
        layer: &ImageLayer,
        landmarks: Landmarks,
    ) -> Result<Arc<Layer>> {
        self.open(number, self.request(image, layer, landmarks)?)
            .await
    }

    /// The same of the layer that `request` is for.
    pub async fn open(&self, number: usize, request: LayerRequest) -> Result<Arc<Layer>> {
        let progress = self.progress.begin(&request.blob);
        let request = LayerRequest {
            is_wanted_whole: self.mode == PullMode::Full,
            ..request
        };
        let span = self.trace.start("index", Some(number));
        let (opened, by) = self.opener.open(&request, &progress.streamed).await?;
        span.end();
        let _ = progress.layer.set(Arc::clone(&opened));
        progress.stage(match by {
            OpenedBy::Store => 1,
            OpenedBy::Toc => 2,
            OpenedBy::Stream => 4,
        });
        if by == OpenedBy::Stream {
            self.trace.shared(LayerShare {
                layer: number,
                share: Share::Full,
                why: Why::NoTable,
                missing_bytes: request.blob.size,
                covered_bytes: None,
            });
        }
        match self.mode {
            PullMode::Lazy => Ok(opened),
            PullMode::Full => self.fill(opened, number, (&request, &progress)).await,
        }
    }

    async fn fill(
        &self,
        layer: Arc<Layer>,
        number: usize,
        (request, progress): (&LayerRequest, &LayerProgress),
    ) -> Result<Arc<Layer>> {
        progress.stage(3);
        let span = self.trace.start("fill", Some(number));
        let layer = match layer.fill_all().await {
            Ok(()) => layer,
            // What came may be right and the table wrong: the tar has a digest of its own. Or it
            // cannot be fetched in parts from there: as a stream it came once.
            Err(
                error @ (Error::Corrupt { .. }
                | Error::Malformed { .. }
                | Error::Unsupported { .. }),
            ) => {
                let digest = &request.blob.digest;
                tracing::warn!(%digest, %error, "the layer cannot be read by its table, streaming it");
                let streamed = &progress.streamed;
                self.opener.open_by_stream(request, streamed).await?
            }
            Err(error) => return Err(error),
        };
        span.end();
        progress.stage(4);
        Ok(layer)
    }
}
