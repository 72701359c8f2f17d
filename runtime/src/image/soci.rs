//! Finding the zTOCs of an image's layers: in the SOCI index that its manifest names, or in
//! one that refers to it.
//!
//! Invariant: what the manifest names is as much a part of the image as its layers are. Who
//! refers to an image is anyone who may push to its repository, so referrers are asked only
//! where the caller was told to trust them. Numbers are bounded; nothing but descriptors is
//! read here.

use std::collections::HashMap;

use lazarette_fetcher::index::soci::{
    INDEX_DIGEST_ANNOTATION, INDEX_TYPE_V1, INDEX_TYPE_V2, LAYER_DIGEST_ANNOTATION, ZTOC_TYPE,
};
use lazarette_fetcher::source::{BlobRef, BlobSource};
use lazarette_fetcher::types::{Descriptor, Digest, Reference, Repository};
use lazarette_fetcher::{Error, Result};
use serde::Deserialize;

use super::{Image, ManifestDocument};

/// Referring indexes that are looked at; one per time the image was indexed.
const INDEXES_MAX: usize = 8;
/// Blobs of one index: a zTOC and a hint for each layer of the largest image.
const BLOBS_MAX: usize = 1024;

/// zTOCs by the digest of their layer.
pub type Ztocs = HashMap<Digest, BlobRef>;

/// The manifest of a SOCI index.
#[derive(Deserialize)]
struct IndexManifest {
    config: Descriptor,
    #[serde(default)]
    layers: Vec<Descriptor>,
    subject: Option<Descriptor>,
}

/// The SOCI index that a manifest names, if it names one.
pub(super) fn named_by(manifest: &ManifestDocument) -> Option<Digest> {
    let text = manifest.annotations.get(INDEX_DIGEST_ANNOTATION)?;
    match Digest::parse(text) {
        Ok(digest) => Some(digest),
        Err(error) => {
            tracing::warn!(%error, "the manifest names a SOCI index by what is no digest");
            None
        }
    }
}

/// The zTOCs of the index that `image` names; none if it names none.
pub async fn of_image(source: &dyn BlobSource, image: &Image) -> Result<Ztocs> {
    let Some(digest) = image.soci_index else {
        return Ok(Ztocs::new());
    };
    let repository = image.reference.repository();
    let reference = repository.with_digest(digest);
    let index = read(source, &reference, INDEX_TYPE_V2).await?;
    let mut found = Ztocs::new();
    collect(repository, index, &mut found);
    Ok(found)
}

/// The zTOCs of the indexes that refer to `image`, those of the last listed first. An index
/// that cannot be read is passed over.
pub async fn of_referrers(source: &dyn BlobSource, image: &Image) -> Result<Ztocs> {
    let (repository, subject) = (image.reference.repository(), image.manifest.digest);
    let listed = source.referrers(repository, &subject, Some(INDEX_TYPE_V1));
    let mut found = Ztocs::new();
    for listed in listed.await?.iter().rev().take(INDEXES_MAX) {
        let reference = repository.with_digest(listed.digest);
        match read(source, &reference, INDEX_TYPE_V1).await {
            Ok(index) if index.subject.as_ref().is_some_and(|s| s.digest == subject) => {
                collect(repository, index, &mut found);
            }
            Ok(_) => tracing::warn!(index = %listed.digest, "SOCI index is of another image"),
            Err(error) => {
                tracing::warn!(index = %listed.digest, %error, "passing over a SOCI index");
            }
        }
    }
    Ok(found)
}

async fn read(source: &dyn BlobSource, reference: &Reference, kind: &str) -> Result<IndexManifest> {
    let document = source.resolve(reference).await?;
    let what = || format!("SOCI index {reference}");
    let index: IndexManifest = serde_json::from_slice(&document.bytes)
        .map_err(|error| Error::malformed(what(), error.to_string()))?;
    if index.config.media_type.as_str() != kind {
        let detail = format!("it is of kind {:?}", index.config.media_type.as_str());
        return Err(Error::malformed(what(), detail));
    }
    if index.layers.len() > BLOBS_MAX {
        let detail = format!("{} blobs of at most {BLOBS_MAX}", index.layers.len());
        return Err(Error::limit(what(), detail));
    }
    Ok(index)
}

/// Adds the zTOCs of layers that have none yet.
fn collect(repository: &Repository, index: IndexManifest, found: &mut Ztocs) {
    for blob in index.layers {
        let layer = blob.annotations.get(LAYER_DIGEST_ANNOTATION);
        let layer = layer.and_then(|text| Digest::parse(text).ok());
        let Some(layer) = layer.filter(|_| blob.media_type.as_str() == ZTOC_TYPE) else {
            continue;
        };
        found.entry(layer).or_insert_with(|| BlobRef {
            repository: repository.clone(),
            digest: blob.digest,
            size: blob.size,
        });
    }
}
