//! Keeping the store small and sound: evicting, checking, pruning.
//!
//! Invariant: nothing that an image record or a container's snapshot names is removed, and
//! what is evicted can be fetched again. Whatever could not be done is told, with why.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest};
use lazarette_fetcher::layer::{Layer, Priority};
use lazarette_fetcher::store::{LayerCheck, Space, Trim};
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::{Digest, Reference};
use lazarette_snapshotter::metastore::{Content, Kind};
use lazarette_snapshotter::remote;
use serde::Serialize;

use super::Engine;
use crate::image::ImageRecord;
use crate::{Error, Result};

/// What the store takes and may take, in bytes.
#[derive(Debug, Clone, Serialize)]
pub struct StoreSummary {
    /// Occupied by layers.
    pub used_bytes: u64,
    /// The most that may be, if that was configured.
    pub budget_bytes: Option<u64>,
    /// Free on the file system.
    pub free_bytes: u64,
    /// What must stay free.
    pub free_floor_bytes: u64,
}

/// What to evict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EvictWhat {
    /// Everything that can be fetched again.
    All,
    /// As much as it takes until layers occupy at most so many bytes.
    To(u64),
    /// Everything of these images that can be fetched again.
    Images(Vec<Reference>),
}

/// What an eviction did.
#[derive(Debug, Clone, Serialize)]
pub struct EvictReport {
    /// Chunks that were present and are not any more.
    pub evicted_chunks: u64,
    /// Their decoded bytes.
    pub evicted_bytes: u64,
    /// Layers that were not evicted, or not wholly.
    pub kept: Vec<Kept>,
    /// The store afterwards.
    pub store: StoreSummary,
}

/// A layer that stayed, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Kept {
    /// Blob digest.
    pub digest: Digest,
    /// Why.
    pub reason: String,
}

/// What a check found.
#[derive(Debug, Clone, Serialize)]
pub struct CheckReport {
    /// Layers, sorted by digest.
    pub layers: Vec<CheckedLayer>,
    /// Manifests and configs that are right.
    pub blobs_right: u64,
    /// Manifests and configs that were not, and are gone; pulling the image brings them back.
    pub blobs_dropped: Vec<Digest>,
}

/// What a check found of one layer.
#[derive(Debug, Clone, Serialize)]
pub struct CheckedLayer {
    /// Blob digest.
    pub digest: Digest,
    /// Chunks that were read and compared.
    pub chunks: u64,
    /// Their decoded bytes.
    pub bytes: u64,
    /// Chunks that were not right and were dropped.
    pub dropped_chunks: usize,
    /// Whether the record of what is present was unreadable.
    pub bitmap_lost: bool,
    /// Why the layer, or its repair, could not be read.
    pub error: Option<String>,
    /// Whether what was dropped is there again.
    pub repaired: bool,
}

impl CheckedLayer {
    /// Whether anything was wrong with it.
    pub fn is_damaged(&self) -> bool {
        self.dropped_chunks > 0 || self.bitmap_lost || self.error.is_some()
    }
}

impl CheckReport {
    /// Whether nothing is missing that was there before.
    pub fn is_sound(&self) -> bool {
        let lacks = |layer: &CheckedLayer| layer.is_damaged() && !layer.repaired;
        self.blobs_dropped.is_empty() && !self.layers.iter().any(lacks)
    }
}

/// What pruning removed.
#[derive(Debug, Clone, Serialize)]
pub struct Pruned {
    /// Layers.
    pub layers: Vec<Digest>,
    /// Manifests and configs.
    pub blobs: Vec<Digest>,
    /// Disk space the layers took, bytes.
    pub freed_bytes: u64,
    /// Layers that no image names but something still uses.
    pub kept: Vec<Kept>,
}

impl Engine {
    /// What the store takes and may take.
    pub async fn store_summary(self: &Arc<Self>) -> Result<StoreSummary> {
        let store = Arc::clone(&self.store);
        Ok(blocking(move || store.space()).await?.into())
    }

    /// Drops bytes that can be fetched again, also under running containers.
    pub async fn evict(self: &Arc<Self>, what: EvictWhat) -> Result<EvictReport> {
        let engine = Arc::clone(self);
        blocking(move || engine.evict_now(&what)).await
    }

    /// Reads everything in the store and drops what is not right; with `repair`, fetches it
    /// again where an image still names the layer.
    pub async fn check(self: &Arc<Self>, repair: bool) -> Result<CheckReport> {
        let store = Arc::clone(&self.store);
        let found = blocking(move || store.check()).await?;
        let mut layers = Vec::new();
        for (digest, outcome) in found.layers {
            let mut line = checked(digest, &outcome);
            if repair && line.is_damaged() {
                match self.repair(digest, outcome.ok()).await {
                    Ok(()) => (line.error, line.repaired) = (None, true),
                    Err(error) => line.error = Some(error.to_string()),
                }
            }
            layers.push(line);
        }
        Ok(CheckReport {
            layers,
            blobs_right: found.blobs.right,
            blobs_dropped: found.blobs.dropped,
        })
    }

    /// Removes layers and blobs that no image and no container uses.
    pub async fn prune(self: &Arc<Self>) -> Result<Pruned> {
        let engine = Arc::clone(self);
        blocking(move || engine.prune_now()).await
    }

    fn evict_now(&self, what: &EvictWhat) -> Result<EvictReport> {
        let trim = match what {
            EvictWhat::All => self.store.evict_layers(None)?,
            EvictWhat::To(bytes) => self.store.trim(*bytes)?,
            EvictWhat::Images(references) => {
                let records = self.records()?;
                let mut only = Vec::new();
                for reference in references {
                    let record = records.iter().find(|record| record.reference == *reference);
                    let record = record.ok_or_else(|| not_here(reference))?;
                    only.extend(record.layers.iter().map(|layer| layer.blob_digest));
                }
                self.store.evict_layers(Some(&only))?
            }
        };
        let Trim { evicted, kept } = trim;
        Ok(EvictReport {
            evicted_chunks: evicted.chunks,
            evicted_bytes: evicted.bytes,
            kept: kept
                .into_iter()
                .map(|(digest, error)| Kept {
                    digest,
                    reason: error.to_string(),
                })
                .collect(),
            store: self.store.space()?.into(),
        })
    }

    /// Fetches again what a check dropped. A layer that cannot be opened, or whose bytes
    /// only a stream of all of it brings, is pulled anew.
    async fn repair(self: &Arc<Self>, digest: Digest, found: Option<LayerCheck>) -> Result<()> {
        let request = self.request_of(digest).await?;
        let source = Arc::clone(&self.resolver.source);
        let opener = LayerOpener::new(Arc::clone(&self.store), source)
            .fetching_with(Arc::clone(&self.fetching));
        let dropped = found.as_ref().map(|found| found.dropped.clone());
        if !self.can_refetch(digest, dropped.as_deref()).await? {
            let store = Arc::clone(&self.store);
            blocking(move || store.remove_layer(&digest)).await?;
        }
        let (layer, _): (Arc<Layer>, _) = opener.open(&request, &AtomicU64::new(0)).await?;
        let again = dropped.unwrap_or_default();
        layer.fill_chunks(&again, Priority::Background).await?;
        Ok(layer.close().await?)
    }

    /// Whether the layer opens and each of these chunks can be fetched alone.
    async fn can_refetch(&self, digest: Digest, dropped: Option<&[u32]>) -> Result<bool> {
        let Some(dropped) = dropped.map(<[u32]>::to_vec) else {
            return Ok(false);
        };
        let store = Arc::clone(&self.store);
        let file = blocking(move || store.open_layer(&digest)).await?;
        Ok(file.is_some_and(|file| {
            let chunks = &file.index().chunks;
            let at = |id: &u32| usize::try_from(*id).ok().and_then(|id| chunks.get(id));
            let can = |id: &u32| at(id).is_some_and(|chunk| chunk.is_refetchable());
            dropped.iter().all(can) && chunks.iter().all(|chunk| chunk.is_refetchable())
        }))
    }

    /// Where the layer comes from, by an image that names it.
    async fn request_of(self: &Arc<Self>, digest: Digest) -> Result<LayerRequest> {
        let engine = Arc::clone(self);
        let records = blocking(move || engine.records()).await?;
        let names = |record: &&ImageRecord| record.layers.iter().any(|l| l.blob_digest == digest);
        for record in records.iter().filter(names) {
            let Some(image) = self.local(&record.reference).await? else {
                continue;
            };
            let layer = image.layers.iter().find(|l| l.descriptor.digest == digest);
            if let Some(layer) = layer {
                let repository = image.reference.repository().clone();
                let request = LayerRequest::new(repository, &layer.descriptor, layer.diff_id)?;
                return Ok(request);
            }
        }
        Err(Error::Refused {
            what: format!("no image here names layer {digest}"),
            todo: "pull one that does, or remove it with `laz store prune`".to_owned(),
        })
    }

    fn prune_now(&self) -> Result<Pruned> {
        let records = self.records()?;
        let named = Named::by(&records);
        let mut kept = Vec::new();
        let used = self.used_by_containers()?;
        let mut layers = Vec::new();
        for digest in self.store.layers()?.into_iter().map(|(digest, _)| digest) {
            if named.layers.contains(&digest) {
                continue;
            }
            if used.contains(&digest) {
                let reason = "a container or containerd uses it".to_owned();
                kept.push(Kept { digest, reason });
                continue;
            }
            layers.push(digest);
        }
        self.forget_snapshots(&layers)?;
        let before = self.store.space()?.used;
        for digest in &layers {
            self.store.remove_layer(digest)?;
        }
        let mut blobs = self.store.blobs()?;
        blobs.retain(|digest| !named.blobs.contains(digest));
        for digest in &blobs {
            self.store.remove_blob(digest)?;
        }
        Ok(Pruned {
            layers,
            blobs,
            freed_bytes: before.saturating_sub(self.store.space()?.used),
            kept,
        })
    }

    /// Layers below snapshots of containers, and those that are served to containerd.
    fn used_by_containers(&self) -> Result<HashSet<Digest>> {
        let mut used = HashSet::new();
        for record in self.snapshots.list()? {
            match record.kind {
                Kind::Active | Kind::View => used.extend(self.snapshots.layers(&record.key)?),
                // One of containerd's, which may make containers of it at any time.
                Kind::Committed if record.labels.contains_key(remote::REMOTE) => {
                    used.extend(self.snapshots.layers(&record.key)?);
                }
                Kind::Committed => {}
            }
        }
        Ok(used)
    }

    /// Forgets the committed snapshots of these layers, those on top first.
    fn forget_snapshots(&self, layers: &[Digest]) -> Result<()> {
        let of_layers = |content: Content| match content {
            Content::Layer(digest) => layers.contains(&digest),
            Content::Directory(_) => false,
        };
        loop {
            let all = self.snapshots.list()?;
            let parents: HashSet<&str> = all.iter().filter_map(|r| r.parent.as_deref()).collect();
            let leaves: Vec<&str> = all
                .iter()
                .filter(|record| of_layers(record.content))
                .map(|record| record.key.as_str())
                .filter(|key| !parents.contains(key))
                .collect();
            if leaves.is_empty() {
                return Ok(());
            }
            for key in leaves {
                self.snapshots.remove(key)?;
            }
        }
    }
}

/// What image records name.
struct Named {
    layers: HashSet<Digest>,
    blobs: HashSet<Digest>,
}

impl Named {
    fn by(records: &[ImageRecord]) -> Self {
        let layers = records.iter().flat_map(|record| &record.layers);
        let blobs = records
            .iter()
            .flat_map(|record| [record.manifest.digest, record.config_digest]);
        Self {
            layers: layers.map(|layer| layer.blob_digest).collect(),
            blobs: blobs.collect(),
        }
    }
}

fn checked(digest: Digest, outcome: &lazarette_fetcher::Result<LayerCheck>) -> CheckedLayer {
    let nothing = LayerCheck::default();
    let found = outcome.as_ref().unwrap_or(&nothing);
    CheckedLayer {
        digest,
        chunks: found.chunks,
        bytes: found.bytes,
        dropped_chunks: found.dropped.len(),
        bitmap_lost: found.bitmap_lost,
        error: outcome.as_ref().err().map(ToString::to_string),
        repaired: false,
    }
}

fn not_here(reference: &Reference) -> Error {
    lazarette_fetcher::Error::NotFound {
        what: format!("image {reference}"),
        host: "this node; `laz images` lists what is here".into(),
    }
    .into()
}

impl From<Space> for StoreSummary {
    fn from(space: Space) -> Self {
        Self {
            used_bytes: space.used,
            budget_bytes: space.budget,
            free_bytes: space.free,
            free_floor_bytes: space.free_floor,
        }
    }
}
