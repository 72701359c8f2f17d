//! Keeping the store small: evicting, pruning.
//!
//! Invariant: nothing that an image record or a container's snapshot names is removed, and
//! what is evicted can be fetched again. Whatever could not be done is told, with why.

use std::collections::HashSet;
use std::sync::Arc;

use lazarette_fetcher::store::{Space, Trim};
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::{Digest, Reference};
use lazarette_snapshotter::metastore::{Content, Kind};
use lazarette_snapshotter::remote;
use serde::Serialize;

use super::Engine;
use super::lazy::ServedLayerTable;
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
        let Trim { evicted, kept, .. } = trim;
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

    /// Layers below snapshots of containers, and those that are served to containerd, or are
    /// being brought for it.
    fn used_by_containers(&self) -> Result<HashSet<Digest>> {
        let mut used = HashSet::new();
        for entry in self.db.scan::<ServedLayerTable>(b"") {
            used.insert(entry?.0);
        }
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
