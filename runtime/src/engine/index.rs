//! Layer indexes that travel beside their image.
//!
//! Invariant: what is pushed was made by this node from layers it verified, and is signed;
//! what is found is only an offer, which [`LayerOpener`] checks.
//!
//! [`LayerOpener`]: lazarette_fetcher::layer::open::LayerOpener

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use lazarette_fetcher::index::LayerFormat;
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{OFFERED_BYTES_MAX, OfferedIndex, core_bytes, core_digest};
use lazarette_fetcher::source::BlobRef;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::trust::{SigningKey, Statement};
use lazarette_fetcher::types::Digest;
use serde::Serialize;

use super::Engine;
use crate::image::Image;
use crate::image::artifact::{self, ArtifactBlob};
use crate::image::pull::{PullMode, Puller};
use crate::image::soci::{self, Ztocs};
use crate::{Error, Result};

/// Kind of the artifact and media type of its blobs.
const INDEX_TYPE: &str = "application/vnd.lazarette.index.v3";
/// Annotation of a blob: digest of the layer it is the index of.
const LAYER: &str = "vnd.lazarette.index.layer";
/// Annotation of a blob: signature of its core for that layer, in base64.
const SIGNATURE: &str = "vnd.lazarette.index.signature";
/// Annotation of a blob: bytes of its header and core, which is what is read first.
const CORE_BYTES: &str = "vnd.lazarette.index.core";

/// The index of one layer, as `laz image index` tells of it.
#[derive(Debug, Clone, Serialize)]
pub struct IndexSummary {
    /// The layer's blob.
    pub layer: Digest,
    /// How it is laid out.
    pub format: String,
    /// Size of the blob, bytes.
    pub blob_bytes: u64,
    /// Size of the index, bytes.
    pub index_bytes: u64,
    /// Share of the layer's bytes that can be fetched alone.
    pub lazy_percent: f64,
}

impl Engine {
    /// What the indexes of opened layers are like, base first.
    pub async fn indexes(&self, layers: &[Arc<Layer>]) -> Result<Vec<IndexSummary>> {
        let (store, layers) = (Arc::clone(&self.store), layers.to_vec());
        blocking(move || {
            let summary = |layer: &Arc<Layer>| {
                let index = layer.index();
                let file = store.open_index(&index.blob_digest)?;
                let size = file.and_then(|file| file.metadata().ok());
                let all: u64 = index.chunks.iter().map(|chunk| u64::from(chunk.len)).sum();
                let alone = index
                    .chunks
                    .iter()
                    .filter(|chunk| chunk.encoding.blob().is_some());
                let alone: u64 = alone.map(|chunk| u64::from(chunk.len)).sum();
                Ok(IndexSummary {
                    layer: index.blob_digest,
                    format: format!("{:?}", index.format).to_lowercase(),
                    blob_bytes: index.blob_size,
                    index_bytes: size.map_or(0, |meta| meta.len()),
                    lazy_percent: crate::trace::percent(alone, all.max(1)),
                })
            };
            layers.iter().map(summary).collect()
        })
        .await
    }

    /// Pushes the indexes of those of `layers` that carry none themselves, signed with the
    /// key in `key`, beside `image`. Returns how many, and the digest of the artifact.
    pub async fn push_indexes(
        &self,
        image: &Image,
        layers: &[Arc<Layer>],
        key: &Path,
    ) -> Result<(usize, Digest)> {
        let (store, key) = (Arc::clone(&self.store), key.to_path_buf());
        let plain = layers.iter().filter(|layer| is_plain(layer));
        let plain: Vec<&Arc<Layer>> = plain.collect();
        for layer in &plain {
            layer.fill_details().await?;
        }
        let digests: Vec<Digest> = plain.into_iter().map(digest).collect();
        let blobs = blocking(move || {
            let key = SigningKey::read(&key)?;
            let mut blobs: Vec<ArtifactBlob> = Vec::new();
            for layer in digests {
                let Some(file) = store.open_index(&layer)? else {
                    continue;
                };
                let mut bytes = Vec::new();
                file.take(OFFERED_BYTES_MAX)
                    .read_to_end(&mut bytes)
                    .map_err(|e| lazarette_fetcher::Error::io("read", "a layer index", e))?;
                blobs.push(signed(layer, bytes.into(), &key)?);
            }
            Ok::<_, lazarette_fetcher::Error>(blobs)
        })
        .await?;
        if blobs.is_empty() {
            return Err(Error::Refused {
                what: format!(
                    "{} needs no indexes: its layers have their own",
                    image.reference
                ),
                todo: "start it as it is".to_owned(),
            });
        }
        let count = blobs.len();
        let repository = image.reference.repository();
        let registry = self.registry.registry_of(repository).await?;
        let ends = (&registry, &self.pusher);
        let digest = artifact::push(ends, repository, &image.manifest, INDEX_TYPE, blobs).await?;
        Ok((count, digest))
    }

    /// Tells `puller` of the tables that the registry has beside `image` and that may be
    /// used. Asks for none where every layer is here. A failure is logged: it only costs
    /// laziness.
    pub(super) async fn look_for_indexes(&self, image: &Image, puller: &Puller) {
        let may_find = !self.keys.is_empty() || self.may_find_ztocs(image, puller);
        if may_find && self.lacks_index(image).await {
            self.find_indexes(image, puller).await;
        }
    }

    /// Who wants all of it streams what a zTOC is of.
    fn may_find_ztocs(&self, image: &Image, puller: &Puller) -> bool {
        puller.mode == PullMode::Lazy && (image.soci_index.is_some() || self.formats.soci_referrers)
    }

    /// [`Self::look_for_indexes`], whatever is here.
    pub(super) async fn find_indexes(&self, image: &Image, puller: &Puller) {
        if !self.keys.is_empty() {
            self.look_for_signed(image, puller).await;
        }
        if self.may_find_ztocs(image, puller) {
            self.look_for_ztocs(image, puller).await;
        }
    }

    /// Those of the index that the image names; only where it names none, referring ones.
    async fn look_for_ztocs(&self, image: &Image, puller: &Puller) {
        let source = self.resolver.source.as_ref();
        let found = match image.soci_index {
            Some(_) => soci::of_image(source, image).await,
            None => soci::of_referrers(source, image).await,
        };
        let found = found.unwrap_or_else(|error| {
            tracing::warn!(image = %image.reference, %error, "cannot read the image's SOCI index");
            Ztocs::default()
        });
        let _ = puller.ztocs.set(found);
    }

    async fn look_for_signed(&self, image: &Image, puller: &Puller) {
        let repository = image.reference.repository();
        let source = self.resolver.source.as_ref();
        let found = artifact::find(source, repository, &image.manifest.digest, INDEX_TYPE).await;
        let found = found.unwrap_or_else(|error| {
            tracing::warn!(image = %image.reference, %error, "cannot look for indexes beside the image");
            Vec::new()
        });
        let mut offered = HashMap::new();
        for blob in found {
            let layer = blob
                .annotations
                .get(LAYER)
                .and_then(|text| Digest::parse(text).ok());
            let (Some(layer), Some(signature)) = (layer, blob.annotations.get(SIGNATURE)) else {
                continue;
            };
            offered.entry(layer).or_insert_with(|| OfferedIndex {
                blob: BlobRef {
                    repository: repository.clone(),
                    digest: blob.digest,
                    size: blob.size,
                },
                signature: signature.clone(),
                core_bytes: blob
                    .annotations
                    .get(CORE_BYTES)
                    .and_then(|n| n.parse().ok()),
            });
        }
        let _ = puller.offered.set(offered);
    }

    /// Whether some layer is not here yet.
    async fn lacks_index(&self, image: &Image) -> bool {
        let store = Arc::clone(&self.store);
        let digests: Vec<Digest> = image.layers.iter().map(|l| l.descriptor.digest).collect();
        let absent = blocking(move || {
            let absent = |digest: &Digest| !matches!(store.open_index(digest), Ok(Some(_)));
            Ok::<_, Error>(digests.iter().any(absent))
        });
        absent.await.unwrap_or(false)
    }
}

fn digest(layer: &Arc<Layer>) -> Digest {
    layer.index().blob_digest
}

/// Whether its blob says nothing of where its files are, and this node found it out itself.
fn is_plain(layer: &Arc<Layer>) -> bool {
    let index = layer.index();
    match index.format {
        LayerFormat::Tar | LayerFormat::Gzip | LayerFormat::Zstd => !index.has_whole_spans(),
        LayerFormat::Estargz | LayerFormat::ZstdChunked => false,
    }
}

fn signed(
    layer: Digest,
    bytes: Bytes,
    key: &SigningKey,
) -> Result<ArtifactBlob, lazarette_fetcher::Error> {
    let statement = Statement {
        blob_digest: layer,
        core_digest: core_digest(&bytes)?,
    };
    let annotations = BTreeMap::from([
        (LAYER.to_owned(), layer.to_string()),
        (SIGNATURE.to_owned(), key.sign(&statement)),
        (CORE_BYTES.to_owned(), core_bytes(&bytes)?.to_string()),
    ]);
    Ok(ArtifactBlob { bytes, annotations })
}
