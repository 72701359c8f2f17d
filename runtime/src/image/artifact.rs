//! Things that belong to an image and are kept beside it in its registry: OCI artifacts
//! whose subject is the image's manifest.
//!
//! Invariant: nothing here is vouched for by the image. Whoever uses what [`find`] returns
//! checks it as input from anyone. Numbers and sizes are bounded. Registries without the
//! referrers API get the tag scheme of the distribution spec kept up to date.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::stream;
use lazarette_fetcher::source::{BlobSource, Pusher, RegistrySource};
use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Reference, Repository};
use lazarette_fetcher::{Error, Result};
use serde::{Deserialize, Serialize};

/// Artifacts of one kind that are looked at; the newest is listed last by most registries.
const FOUND_MAX: usize = 8;
/// Blobs of one artifact.
const BLOBS_MAX: usize = 1024;
/// Media type and bytes of a config that says nothing.
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
const EMPTY: &[u8] = b"{}";

/// The manifest of an artifact, as far as we write and read it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArtifactManifest {
    schema_version: u32,
    media_type: MediaType,
    artifact_type: String,
    config: Descriptor,
    layers: Vec<Descriptor>,
    subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

/// The index that stands for the referrers API where there is none.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReferrersIndex {
    schema_version: u32,
    media_type: MediaType,
    manifests: Vec<serde_json::Value>,
}

/// One blob of an artifact, in memory.
pub struct ArtifactBlob {
    /// Its bytes.
    pub bytes: Bytes,
    /// What is said of it.
    pub annotations: BTreeMap<String, String>,
}

/// Pushes an artifact of `kind`, which is its blobs' media type too, for the image whose
/// manifest is `subject`. Returns the digest of its manifest.
pub async fn push(
    (source, sink): (&RegistrySource, &Pusher),
    repository: &Repository,
    subject: &Descriptor,
    kind: &str,
    blobs: Vec<ArtifactBlob>,
) -> Result<Digest> {
    let empty = push_blob(sink, repository, EMPTY_TYPE, EMPTY).await?;
    let mut layers = Vec::with_capacity(blobs.len());
    for blob in blobs {
        let mut layer = push_blob(sink, repository, kind, &blob.bytes).await?;
        layer.annotations = blob.annotations;
        layers.push(layer);
    }
    let mut subject = subject.clone();
    subject.annotations.clear();
    let manifest = ArtifactManifest {
        schema_version: 2,
        media_type: MediaType::OciManifest,
        artifact_type: kind.to_owned(),
        config: empty,
        layers,
        subject: Some(subject.clone()),
        annotations: BTreeMap::new(),
    };
    let bytes = json(&manifest)?;
    let digest = Digest::sha256(&bytes);
    let size = bytes.len() as u64;
    let reference = repository.with_digest(digest);
    sink.push_manifest(&reference, &MediaType::OciManifest, bytes)
        .await?;
    let listed = source.referrers(repository, &subject.digest, Some(kind));
    if !listed.await?.iter().any(|found| found.digest == digest) {
        let pushed = Descriptor::new(MediaType::OciManifest, digest, size);
        list_by_tag((source, sink), repository, &subject.digest, &pushed, kind).await?;
    }
    Ok(digest)
}

/// Adds an artifact to the index under the subject's tag.
async fn list_by_tag(
    (source, sink): (&RegistrySource, &Pusher),
    repository: &Repository,
    subject: &Digest,
    pushed: &Descriptor,
    kind: &str,
) -> Result<()> {
    let tag = Reference::parse(&format!("{repository}:{}", subject.file_name()))
        .map_err(|error| Error::malformed("the tag of referrers", error.to_string()))?;
    let mut index = match source.resolve(&tag).await {
        Ok(document) => serde_json::from_slice(&document.bytes)
            .map_err(|error| Error::malformed(tag.to_string(), error.to_string()))?,
        Err(Error::NotFound { .. }) => ReferrersIndex {
            schema_version: 2,
            media_type: MediaType::OciIndex,
            manifests: Vec::new(),
        },
        Err(error) => return Err(error),
    };
    index.manifests.push(serde_json::json!({
        "mediaType": pushed.media_type.as_str(),
        "digest": pushed.digest.to_string(),
        "size": pushed.size,
        "artifactType": kind,
    }));
    sink.push_manifest(&tag, &MediaType::OciIndex, json(&index)?)
        .await?;
    Ok(())
}

/// The blobs of the artifacts of `kind` that refer to `subject`, the last listed first.
/// One that cannot be read is passed over.
pub async fn find(
    source: &dyn BlobSource,
    repository: &Repository,
    subject: &Digest,
    kind: &str,
) -> Result<Vec<Descriptor>> {
    let listed = source.referrers(repository, subject, Some(kind)).await?;
    let mut blobs = Vec::new();
    for found in listed.iter().rev().take(FOUND_MAX) {
        match read(source, &repository.with_digest(found.digest), subject, kind).await {
            Ok(found) => blobs.extend(found),
            Err(error) => {
                tracing::warn!(artifact = %found.digest, %error, "passing over an artifact");
            }
        }
    }
    Ok(blobs)
}

async fn read(
    source: &dyn BlobSource,
    reference: &Reference,
    subject: &Digest,
    kind: &str,
) -> Result<Vec<Descriptor>> {
    let document = source.resolve(reference).await?;
    let what = || format!("artifact {reference}");
    let manifest: ArtifactManifest = serde_json::from_slice(&document.bytes)
        .map_err(|error| Error::malformed(what(), error.to_string()))?;
    let is_of = manifest.subject.as_ref().map(|subject| subject.digest);
    if manifest.artifact_type != kind || is_of != Some(*subject) {
        return Err(Error::malformed(
            what(),
            "it is of another kind or another image",
        ));
    }
    if manifest.layers.len() > BLOBS_MAX {
        let detail = format!("{} blobs of at most {BLOBS_MAX}", manifest.layers.len());
        return Err(Error::limit(what(), detail));
    }
    Ok(manifest.layers)
}

async fn push_blob(
    sink: &Pusher,
    repository: &Repository,
    media_type: &str,
    bytes: &[u8],
) -> Result<Descriptor> {
    let digest = Digest::sha256(bytes);
    let size = bytes.len() as u64;
    if !sink.blob_exists(repository, &digest).await? {
        let body = stream::iter([Ok(Bytes::copy_from_slice(bytes))]);
        sink.push_blob(repository, &digest, size, body).await?;
    }
    let media_type = MediaType::from(media_type.to_owned());
    Ok(Descriptor::new(media_type, digest, size))
}

fn json(value: &impl Serialize) -> Result<Bytes> {
    let bytes = serde_json::to_vec(value);
    bytes
        .map(Bytes::from)
        .map_err(|error| Error::malformed("a document that was to be pushed", error.to_string()))
}
