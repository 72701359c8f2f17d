//! A source that holds blobs and manifests in memory.
//!
//! Invariant: answers as a well-behaved registry would, at once and without a network.

use std::collections::HashMap;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;

use crate::source::exact::check_parts;
use crate::source::{BlobRef, BlobSource, Body, Document};
use crate::types::{ByteRange, Descriptor, Digest, MediaType, Reference, Repository};
use crate::{Error, Result};

/// Pieces a body is cut into: small enough that a test blob has several.
const PIECE_BYTES: usize = 16 << 10;
const PARTS_MAX: usize = 48;

/// See the module's documentation. Content can be added while it is in use.
#[derive(Debug, Default)]
pub struct MemorySource {
    content: Mutex<Content>,
}

/// What a repository holds; blobs are shared by all repositories.
#[derive(Debug, Default)]
pub(super) struct Content {
    pub(super) blobs: HashMap<Digest, Bytes>,
    /// By repository path and by tag or digest.
    pub(super) manifests: HashMap<(String, String), (MediaType, Bytes)>,
}

impl Content {
    /// Stores a blob.
    pub(super) fn add_blob(&mut self, bytes: Bytes) -> Digest {
        let digest = Digest::sha256(&bytes);
        self.blobs.insert(digest, bytes);
        digest
    }

    /// Stores a manifest under its digest and under `tag` unless that is empty.
    pub(super) fn add_manifest(
        &mut self,
        repository: &str,
        tag: &str,
        media_type: MediaType,
        bytes: Bytes,
    ) -> Digest {
        let digest = Digest::sha256(&bytes);
        for target in [tag.to_owned(), digest.to_string()] {
            let key = (repository.to_owned(), target);
            self.manifests
                .insert(key, (media_type.clone(), bytes.clone()));
        }
        digest
    }

    /// JSON descriptors of manifests in `repository` whose subject is `digest`.
    pub(super) fn referrers(&self, repository: &str, digest: &Digest) -> Vec<serde_json::Value> {
        let subject = digest.to_string();
        let mut found: Vec<_> = self
            .manifests
            .iter()
            .filter(|((repo, target), _)| repo == repository && target.starts_with("sha256:"))
            .filter_map(|((_, target), (media_type, bytes))| {
                let json: serde_json::Value = serde_json::from_slice(bytes).ok()?;
                (json.pointer("/subject/digest")?.as_str()? == subject).then(|| {
                    serde_json::json!({
                        "mediaType": media_type.as_str(),
                        "digest": target,
                        "size": bytes.len(),
                        // As registries have it: the config's type stands in for it.
                        "artifactType": json
                            .get("artifactType")
                            .or_else(|| json.pointer("/config/mediaType")),
                        "annotations": json.get("annotations"),
                    })
                })
            })
            .collect();
        found.sort_by_key(|entry| entry["digest"].to_string());
        found
    }
}

impl MemorySource {
    /// An empty source.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a blob to every repository.
    pub fn add_blob(&self, bytes: impl Into<Bytes>) -> Digest {
        self.content.lock().add_blob(bytes.into())
    }

    /// Adds a manifest to `repository` (its path) under its digest and `tag`.
    pub fn add_manifest(
        &self,
        repository: &str,
        tag: &str,
        media_type: MediaType,
        bytes: impl Into<Bytes>,
    ) -> Digest {
        let bytes = bytes.into();
        self.content
            .lock()
            .add_manifest(repository, tag, media_type, bytes)
    }

    fn blob(&self, repository: &Repository, digest: &Digest) -> Result<Bytes> {
        let blob = self.content.lock().blobs.get(digest).cloned();
        blob.ok_or_else(|| Error::NotFound {
            what: format!("blob {digest}"),
            host: repository.host().to_owned(),
        })
    }
}

/// A body of `bytes` in small pieces.
pub(super) fn body(bytes: &Bytes) -> Body {
    let pieces: Vec<_> = bytes
        .chunks(PIECE_BYTES)
        .map(|piece| Ok(bytes.slice_ref(piece)))
        .collect();
    stream::iter(pieces).boxed()
}

#[async_trait]
impl BlobSource for MemorySource {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        let key = (reference.repository().path().to_owned(), reference.target());
        let found = self.content.lock().manifests.get(&key).cloned();
        let (media_type, bytes) = found.ok_or_else(|| Error::NotFound {
            what: reference.to_string(),
            host: reference.host().to_owned(),
        })?;
        Ok(Document::new(media_type, Digest::sha256(&bytes), bytes))
    }

    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64> {
        Ok(self.blob(repository, digest)?.len() as u64)
    }

    async fn read_range(&self, blob: &BlobRef, range: ByteRange) -> Result<Body> {
        self.read_parts(blob, &[range]).await
    }

    fn parts_max(&self, _: &BlobRef) -> usize {
        PARTS_MAX
    }

    async fn read_parts(&self, blob: &BlobRef, parts: &[ByteRange]) -> Result<Body> {
        let bytes = self.blob(&blob.repository, &blob.digest)?;
        let held = BlobRef {
            size: bytes.len() as u64,
            ..blob.clone()
        };
        check_parts(&held, parts)?;
        let at = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let part = |part: &ByteRange| body(&bytes.slice(at(part.start())..at(part.end())));
        let parts: Vec<Body> = parts.iter().map(part).collect();
        Ok(stream::iter(parts).flatten().boxed())
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        Ok(body(&self.blob(&blob.repository, &blob.digest)?))
    }

    async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        let entries = self.content.lock().referrers(repository.path(), digest);
        let wanted = entries.into_iter().filter(|entry| {
            artifact_type.is_none_or(|kind| entry["artifactType"].as_str() == Some(kind))
        });
        wanted
            .map(|entry| {
                serde_json::from_value(entry)
                    .map_err(|e| Error::malformed("referrer", e.to_string()))
            })
            .collect()
    }
}
