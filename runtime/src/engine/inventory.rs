//! What is here, what it takes, and removing it.
//!
//! Invariant: an image is removed only when no container uses it, and a layer only when
//! no remaining image names it. The record goes before the bytes: a crash in between
//! leaves bytes without a name, which `laz store prune` finds.

use std::collections::HashSet;
use std::sync::Arc;

use lazarette_fetcher::db::Batch;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::{Digest, Reference};
use lazarette_snapshotter::overlay::Snapshots;
use serde::Serialize;

use super::Engine;
use super::lazy::ServedLayerTable;
use crate::image::{ImageRecord, ImageTable};
use crate::{Error, Result};

/// One line of `laz images`.
#[derive(Debug, Clone, Serialize)]
pub struct ImageSummary {
    /// The reference it was pulled by.
    pub reference: Reference,
    /// The platform's manifest.
    pub manifest_digest: Digest,
    /// Number of layers.
    pub layers: usize,
    /// Size of the layers in the registry, bytes.
    pub image_bytes: u64,
    /// Size of the files in the layers that are open here, bytes.
    pub data_bytes: u64,
    /// How much of that is present, bytes.
    pub present_bytes: u64,
    /// When it was pulled, seconds since 1970.
    pub pulled_at: u64,
}

/// One line of `laz store df`.
#[derive(Debug, Clone, Serialize)]
pub struct LayerSummary {
    /// Blob digest.
    pub digest: Digest,
    /// How the blob is laid out.
    pub format: String,
    /// Entries of the file table.
    pub files: usize,
    /// Size of all files, bytes.
    pub data_bytes: u64,
    /// How much of that is present, bytes.
    pub present_bytes: u64,
    /// What it takes on disk, bytes.
    pub disk_bytes: u64,
    /// How much, of all that was ever filled, other layers here had already, bytes.
    pub copied_bytes: u64,
}

/// What a removal did.
#[derive(Debug, Clone, Serialize)]
pub struct Removed {
    /// The image.
    pub reference: Reference,
    /// How many layers went with it.
    pub layers: usize,
    /// Disk space they took, bytes.
    pub freed_bytes: u64,
}

impl Engine {
    /// Every image that was pulled, by reference.
    pub async fn images(self: &Arc<Self>) -> Result<Vec<ImageSummary>> {
        let engine = Arc::clone(self);
        blocking(move || {
            let usage = engine.layer_usage()?;
            Ok(engine
                .records()?
                .iter()
                .map(|record| summary(record, &usage))
                .collect())
        })
        .await
    }

    /// Every layer in the store.
    pub async fn layers(self: &Arc<Self>) -> Result<Vec<LayerSummary>> {
        let engine = Arc::clone(self);
        blocking(move || engine.layer_usage()).await
    }

    /// Forgets the image and removes the layers that only it named.
    pub async fn remove_image(self: &Arc<Self>, reference: &Reference) -> Result<Removed> {
        let (engine, reference) = (Arc::clone(self), reference.clone());
        blocking(move || engine.remove_now(&reference)).await
    }

    fn remove_now(&self, reference: &Reference) -> Result<Removed> {
        let records = self.records()?;
        let Some(record) = records.iter().find(|record| record.reference == *reference) else {
            let what = format!("image {reference}");
            return Err(lazarette_fetcher::Error::NotFound {
                what,
                host: "this node; `laz images` lists what is here".into(),
            }
            .into());
        };
        let kept: Vec<&ImageRecord> = records
            .iter()
            .filter(|r| r.reference != *reference)
            .collect();
        let mut plan = plan_removal(record, &kept);
        // Snapshots first: removing one that a container uses fails, and nothing is lost.
        for stack_id in &plan.stack_ids {
            remove_snapshot(&self.snapshots, stack_id).map_err(|error| match error {
                lazarette_snapshotter::Error::Precondition { .. } => Error::Refused {
                    what: format!("image {reference} is in use by a running container"),
                    todo: "stop the container first".to_owned(),
                },
                other => other.into(),
            })?;
        }
        // What containerd was served stays, and what is being brought for it.
        let mut free = Vec::new();
        for digest in plan.layers {
            let is_brought = self.db.get::<ServedLayerTable>(&digest)?.is_some();
            if !is_brought && !self.snapshots.is_named(&digest)? {
                free.push(digest);
            }
        }
        plan.layers = free;
        let mut batch = Batch::new();
        batch.delete::<ImageTable>(&reference.to_string());
        self.db.commit(batch)?;
        let freed_bytes = self
            .layer_usage()?
            .iter()
            .filter(|l| plan.layers.contains(&l.digest))
            .map(|l| l.disk_bytes)
            .sum();
        for digest in &plan.layers {
            self.store.remove_layer(digest)?;
        }
        for digest in &plan.blobs {
            self.store.remove_blob(digest)?;
        }
        Ok(Removed {
            reference: reference.clone(),
            layers: plan.layers.len(),
            freed_bytes,
        })
    }

    pub(super) fn records(&self) -> Result<Vec<ImageRecord>> {
        let entries = self
            .db
            .scan::<ImageTable>(b"")
            .map(|entry| entry.map(|(_, record)| record));
        Ok(entries.collect::<Result<_, _>>()?)
    }

    fn layer_usage(&self) -> Result<Vec<LayerSummary>> {
        let mut layers = Vec::new();
        for (digest, usage) in self.store.layers()? {
            if let Some(file) = self.store.open_layer(&digest)? {
                let (index, usage) = (file.index(), usage?);
                layers.push(LayerSummary {
                    digest,
                    format: format!("{:?}", index.format).to_lowercase(),
                    files: index.files.len(),
                    data_bytes: usage.total,
                    present_bytes: usage.present,
                    disk_bytes: usage.allocated,
                    copied_bytes: usage.copied,
                });
            }
        }
        Ok(layers)
    }
}

/// Removes a layer's snapshot; one that was never made is gone already.
fn remove_snapshot(snapshots: &Snapshots, stack_id: &Digest) -> lazarette_snapshotter::Result<()> {
    match snapshots.remove(&stack_id.to_string()) {
        Err(lazarette_snapshotter::Error::NotFound { .. }) => Ok(()),
        outcome => outcome.map(drop),
    }
}

/// What goes when an image goes.
#[derive(Debug, PartialEq, Eq)]
struct Removal {
    /// Snapshots nothing else stands on, topmost first.
    stack_ids: Vec<Digest>,
    /// Layers no other image names.
    layers: Vec<Digest>,
    /// Manifest and config no other image names.
    blobs: Vec<Digest>,
}

fn plan_removal(gone: &ImageRecord, kept: &[&ImageRecord]) -> Removal {
    let named = |pick: fn(&crate::image::LayerRecord) -> Digest| -> HashSet<Digest> {
        kept.iter()
            .flat_map(|record| record.layers.iter().map(pick))
            .collect()
    };
    let (stacks, blobs) = (named(|l| l.stack_id), named(|l| l.blob_digest));
    let mut seen = HashSet::new();
    Removal {
        stack_ids: gone
            .layers
            .iter()
            .rev()
            .map(|l| l.stack_id)
            .filter(|id| !stacks.contains(id))
            .collect(),
        layers: gone
            .layers
            .iter()
            .map(|l| l.blob_digest)
            .filter(|digest| !blobs.contains(digest) && seen.insert(*digest))
            .collect(),
        blobs: [gone.manifest.digest, gone.config_digest]
            .into_iter()
            .filter(|digest| {
                !kept
                    .iter()
                    .any(|r| r.manifest.digest == *digest || r.config_digest == *digest)
            })
            .collect(),
    }
}

fn summary(record: &ImageRecord, usage: &[LayerSummary]) -> ImageSummary {
    let of = |pick: fn(&LayerSummary) -> u64| -> u64 {
        record
            .layers
            .iter()
            .filter_map(|layer| usage.iter().find(|u| u.digest == layer.blob_digest))
            .map(pick)
            .sum()
    };
    ImageSummary {
        reference: record.reference.clone(),
        manifest_digest: record.manifest.digest,
        layers: record.layers.len(),
        image_bytes: record.layer_bytes(),
        data_bytes: of(|u| u.data_bytes),
        present_bytes: of(|u| u.present_bytes),
        pulled_at: record.pulled_at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::LayerRecord;
    use lazarette_fetcher::types::{Descriptor, MediaType};

    fn record(name: &str, layers: &[&str]) -> ImageRecord {
        let digest = |text: &str| Digest::sha256(text.as_bytes());
        ImageRecord {
            reference: Reference::parse(name).unwrap(),
            manifest: Descriptor::new(MediaType::OciManifest, digest(name), 1),
            config_digest: digest(&format!("config {name}")),
            layers: layers
                .iter()
                .map(|l| LayerRecord {
                    blob_digest: digest(l),
                    blob_size: 1,
                    stack_id: digest(&format!("stack {l}")),
                })
                .collect(),
            pulled_at: 0,
        }
    }

    #[test]
    fn only_what_nothing_else_names_goes() {
        let (a, b) = (
            record("a", &["base", "x", "x"]),
            record("b", &["base", "y"]),
        );
        let plan = plan_removal(&a, &[&b]);
        assert_eq!(plan.layers, [Digest::sha256(b"x")]);
        assert_eq!(plan.stack_ids.len(), 2);
        assert_eq!(plan.blobs.len(), 2);
        assert_eq!(plan_removal(&a, &[]).layers.len(), 2);
    }

    #[test]
    fn the_topmost_snapshot_goes_first() {
        let plan = plan_removal(&record("a", &["base", "top"]), &[]);
        assert_eq!(plan.stack_ids[0], Digest::sha256(b"stack top"));
    }
}
