//! Verifying everything that is kept, and bringing back what was lost.
//!
//! Invariant: what is not right is never served, whether or not it can be repaired. A repair
//! ends with everything there that was there before; where the record of that was lost, with
//! all of the layer. It opens layers as a pull does, by the tables that came with their image
//! or are offered beside it. A layer that cannot be opened stays as it is until it is known
//! where another comes from, and one that is streamed again until that is whole.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use lazarette_fetcher::Error as FetchError;
use lazarette_fetcher::layer::Priority;
use lazarette_fetcher::layer::open::LayerRequest;
use lazarette_fetcher::store::{LayerCheck, LayerFile};
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::mountd;
use serde::Serialize;

use super::Engine;
use super::lazy::{ServedLayer, ServedLayerTable, image_of};
use crate::image::pull::{Landmarks, PullMode, Puller};
use crate::image::{Image, ImageRecord};
use crate::trace::Trace;
use crate::{Error, Result};

/// What a check found.
#[derive(Debug, Clone, Serialize)]
pub struct CheckReport {
    /// Layers, sorted by digest.
    pub layers: Vec<CheckedLayer>,
    /// Manifests and configs that are right.
    pub blobs_right: u64,
    /// Manifests and configs that were damaged, or that an image names and that are not here.
    pub blobs_lost: Vec<LostBlob>,
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
    /// Files beside the data that were damaged, and that nothing is missing without but speed.
    pub damaged_files: Vec<String>,
    /// Whether it is right by the word of whoever made its zTOC, and by nothing else. To check that
    /// takes all of the layer's bytes from the registry, so a full pull does, and nobody here.
    pub by_ztoc_alone: bool,
    /// Why the layer, or its repair, could not be read.
    pub error: Option<String>,
    /// Whether what was lost is there again.
    pub repaired: bool,
}

/// A manifest or config that is gone.
#[derive(Debug, Clone, Serialize)]
pub struct LostBlob {
    /// Its digest.
    pub digest: Digest,
    /// Why it could not be fetched again.
    pub error: Option<String>,
    /// Whether it is there again.
    pub repaired: bool,
}

impl CheckedLayer {
    /// Whether anything was wrong with it.
    pub fn is_damaged(&self) -> bool {
        self.lost_something() || !self.damaged_files.is_empty()
    }

    /// Whether something was there that had to be dropped.
    fn lost_something(&self) -> bool {
        self.dropped_chunks > 0 || self.bitmap_lost || self.error.is_some()
    }
}

impl CheckReport {
    /// Whether nothing is missing that was there before.
    pub fn is_sound(&self) -> bool {
        let lacks = |layer: &CheckedLayer| layer.lost_something() && !layer.repaired;
        self.blobs_lost.iter().all(|blob| blob.repaired) && !self.layers.iter().any(lacks)
    }
}

/// What a layer needs.
enum Need {
    /// Nothing: what was there is there.
    Nothing,
    /// These chunks.
    Chunks(Vec<u32>),
    /// All that is missing.
    Rest,
    /// All of it as one stream, as some of what is missing cannot be fetched alone.
    Stream,
    /// To be opened again; what is there cannot be, and gives way to what is opened.
    Opening,
    /// The same, but nothing can tell what is there; it is in the way.
    Replacing,
}

impl Need {
    /// Whether tables are needed that may lie beside the image.
    fn is_opening(&self) -> bool {
        matches!(self, Self::Opening | Self::Replacing)
    }
}

impl Engine {
    /// Reads everything in the store and drops what is not right; with `repair`, fetches it
    /// again where an image still names it.
    pub async fn check(self: &Arc<Self>, repair: bool) -> Result<CheckReport> {
        let engine = Arc::clone(self);
        let (found, records) =
            blocking(move || Ok::<_, Error>((engine.store.check()?, engine.records()?))).await?;
        // First of all: they say where layers come from.
        let lost = self.lost_blobs(found.blobs.dropped, &records).await?;
        let mut blobs_lost = Vec::new();
        for digest in lost {
            let outcome = match repair {
                true => self.fetch_blob(&digest, &records).await.map(|()| true),
                false => Ok(false),
            };
            blobs_lost.push(LostBlob {
                digest,
                repaired: matches!(outcome, Ok(true)),
                error: outcome.err().map(|error| error.to_string()),
            });
        }
        let mut layers = Vec::new();
        for (digest, outcome) in found.layers {
            let mut line = checked(digest, &outcome);
            if repair && line.lost_something() {
                match self.repair(digest, outcome, &records).await {
                    Ok(()) => (line.error, line.repaired) = (None, true),
                    Err(error) => line.error = Some(error.to_string()),
                }
            }
            let engine = Arc::clone(self);
            let images = blocking(move || engine.check_images(&digest));
            line.damaged_files.extend(images.await);
            layers.push(line);
        }
        Ok(CheckReport {
            layers,
            blobs_right: found.blobs.right,
            blobs_lost,
        })
    }

    /// Those of images that were `dropped`, or were not here.
    async fn lost_blobs(
        self: &Arc<Self>,
        mut dropped: Vec<Digest>,
        records: &[ImageRecord],
    ) -> Result<Vec<Digest>> {
        let mut named: Vec<Digest> = records.iter().flat_map(blobs_of).collect();
        named.sort_unstable();
        named.dedup();
        let store = Arc::clone(&self.store);
        blocking(move || {
            for digest in named {
                if !dropped.contains(&digest) && store.get_blob(&digest)?.is_none() {
                    dropped.push(digest);
                }
            }
            Ok(dropped)
        })
        .await
    }

    async fn fetch_blob(&self, digest: &Digest, records: &[ImageRecord]) -> Result<()> {
        let mut outcome = Err(Error::Refused {
            what: format!("no image here names blob {digest}"),
            todo: "nothing needs it".to_owned(),
        });
        for record in records.iter().filter(|r| blobs_of(r).contains(digest)) {
            outcome = self.documents(record).await.map(drop);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    /// The image of a record; of its documents those that are not here are fetched.
    async fn documents(&self, record: &ImageRecord) -> Result<Image> {
        let at = record.reference.repository();
        let manifest = match self.resolver.stored_manifest(&record.manifest).await {
            Err(FetchError::NotFound { .. }) => {
                let at = at.with_digest(record.manifest.digest);
                self.resolver.manifest(&at).await
            }
            known => known,
        };
        Ok(self.resolver.image(&record.reference, manifest?).await?)
    }

    /// Brings back what a check dropped.
    async fn repair(
        self: &Arc<Self>,
        digest: Digest,
        found: Result<LayerCheck, FetchError>,
        records: &[ImageRecord],
    ) -> Result<()> {
        let need = self.need(digest, found).await?;
        if matches!(need, Need::Nothing) {
            return Ok(());
        }
        let (puller, request) = self.way_to(digest, records, &need).await?;
        if matches!(need, Need::Replacing) {
            let store = Arc::clone(&self.store);
            blocking(move || store.remove_layer(&digest)).await?;
        }
        let received = AtomicU64::new(0);
        let opener = puller.opener();
        let layer = if matches!(need, Need::Stream) {
            opener.open_by_stream(&request, &received).await?
        } else {
            opener.open(&request, &received).await?.0
        };
        let filled = match need {
            Need::Nothing | Need::Stream => Ok(()),
            Need::Chunks(ids) => layer.fill_chunks(&ids, Priority::Background).await,
            Need::Rest | Need::Opening | Need::Replacing => layer.fill_all().await,
        };
        // From there it comes as a whole or not at all.
        if matches!(filled, Err(FetchError::Unsupported { .. })) {
            let layer = opener.open_by_stream(&request, &received).await?;
            return Ok(layer.close().await?);
        }
        let closed = layer.close().await;
        Ok(filled.and(closed)?)
    }

    async fn need(&self, digest: Digest, found: Result<LayerCheck, FetchError>) -> Result<Need> {
        let store = Arc::clone(&self.store);
        blocking(move || {
            let found = match found {
                Ok(found) => found,
                // Whoever opens it puts another in its place.
                Err(FetchError::Malformed { .. } | FetchError::Corrupt { .. }) => {
                    return Ok(Need::Opening);
                }
                Err(_) => return Ok(Need::Replacing),
            };
            let file = store.open_layer(&digest)?;
            Ok(file.map_or(Need::Opening, |file| need_of(&file, found)))
        })
        .await
    }

    /// What opens the layer, and from where, by an image that names it.
    async fn way_to(
        self: &Arc<Self>,
        digest: Digest,
        records: &[ImageRecord],
        need: &Need,
    ) -> Result<(Puller, LayerRequest)> {
        let mut failed = None;
        let names = |record: &&ImageRecord| record.layers.iter().any(|l| l.blob_digest == digest);
        for record in records.iter().filter(names) {
            match self.documents(record).await {
                Ok(image) => return self.way_by(&image, digest, need).await,
                Err(error) => failed = Some(error),
            }
        }
        let db = Arc::clone(&self.db);
        let served = blocking(move || db.get::<ServedLayerTable>(&digest)).await?;
        if let Some(served) = served {
            return self.way_as_served(served, need).await;
        }
        Err(failed.unwrap_or_else(|| Error::Refused {
            what: format!("no image here names layer {digest}"),
            todo: "pull one that does, or remove it with `laz store prune`".to_owned(),
        }))
    }

    async fn way_by(
        &self,
        image: &Image,
        digest: Digest,
        need: &Need,
    ) -> Result<(Puller, LayerRequest)> {
        let puller = self.background_puller();
        if need.is_opening() {
            self.find_indexes(image, &puller).await;
        }
        let layer = image.layers.iter().find(|l| l.descriptor.digest == digest);
        let layer = layer.ok_or_else(|| FetchError::NotFound {
            what: format!("layer {digest} in image {}", image.reference),
            host: String::new(),
        })?;
        let request = puller.request(image, layer, Landmarks::Ignore)?;
        Ok((puller, request))
    }

    /// Of a layer that is served to containerd. Its image is looked at for tables beside it only;
    /// the tag may name another by now.
    async fn way_as_served(
        &self,
        served: ServedLayer,
        need: &Need,
    ) -> Result<(Puller, LayerRequest)> {
        let digest = served.descriptor.digest;
        if need.is_opening() {
            let manifest = self.resolver.manifest(&served.reference).await?;
            let image = self.resolver.image(&served.reference, manifest).await?;
            if image.layers.iter().any(|l| l.descriptor.digest == digest) {
                return self.way_by(&image, digest, need).await;
            }
        }
        let repository = served.reference.repository().clone();
        let request = LayerRequest::new(repository, &served.descriptor, served.diff_id);
        let request = LayerRequest {
            fetch_landmark: false,
            read_soon: false,
            ..request.of_image(&served.reference)
        };
        Ok((self.background_puller(), request))
    }

    fn background_puller(&self) -> Puller {
        let mut puller = self.puller(PullMode::Full, Trace::new(Instant::now()));
        puller.read_soon = false;
        puller
    }

    /// Compares the images that kernels mount the layer from, and drops those that are wrong:
    /// who mounts it next makes them again. Names of those.
    fn check_images(&self, digest: &Digest) -> Vec<String> {
        let path = image_of(&self.root, digest);
        let Ok(Some(file)) = self.store.open_layer(digest) else {
            return Vec::new();
        };
        let is_right = |path: &Path| {
            // A layer that no image can show has none.
            mountd::is_image_of(file.index(), path).unwrap_or(false)
        };
        let mut wrong = Vec::new();
        if path.exists() && !is_right(&path) {
            match std::fs::remove_file(&path) {
                Ok(()) => wrong.push(path.display().to_string()),
                Err(error) => tracing::warn!(path = %path.display(), %error, "a wrong image stays"),
            }
        }
        match file.drop_wrong_image(is_right) {
            Ok(true) => wrong.push("image".to_owned()),
            Ok(false) => {}
            Err(error) => tracing::warn!(%digest, %error, "cannot check the layer's image"),
        }
        wrong
    }
}

fn need_of(file: &LayerFile, found: LayerCheck) -> Need {
    let is_absent = |id: &u32| !file.is_present(*id);
    let count = u32::try_from(file.index().chunks.len()).unwrap_or(u32::MAX);
    let missing: Vec<u32> = match found.bitmap_lost {
        true => (0..count).filter(is_absent).collect(),
        // Somebody may have read them meanwhile.
        false => found.dropped.into_iter().filter(is_absent).collect(),
    };
    let is_alone = |id: &u32| {
        let chunk = usize::try_from(*id).ok();
        let chunk = chunk.and_then(|at| file.index().chunks.get(at));
        chunk.is_some_and(|chunk| chunk.is_refetchable())
    };
    match (missing.is_empty(), missing.iter().all(is_alone)) {
        (true, _) => Need::Nothing,
        (false, false) => Need::Stream,
        (false, true) if found.bitmap_lost => Need::Rest,
        (false, true) => Need::Chunks(missing),
    }
}

fn blobs_of(record: &ImageRecord) -> [Digest; 2] {
    [record.manifest.digest, record.config_digest]
}

fn checked(digest: Digest, outcome: &Result<LayerCheck, FetchError>) -> CheckedLayer {
    let nothing = LayerCheck::default();
    let found = outcome.as_ref().unwrap_or(&nothing);
    let files = found.damaged_files.iter();
    CheckedLayer {
        digest,
        chunks: found.chunks,
        bytes: found.bytes,
        dropped_chunks: found.dropped.len(),
        bitmap_lost: found.bitmap_lost,
        damaged_files: files.map(|name| (*name).to_owned()).collect(),
        by_ztoc_alone: found.is_by_word && found.chunks > 0,
        error: outcome.as_ref().err().map(ToString::to_string),
        repaired: false,
    }
}
