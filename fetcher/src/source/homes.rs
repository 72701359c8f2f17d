//! Repositories that have a blob, and a wrapper that reads it from another one of them.
//!
//! A layer is read from the repository that brought it here first, also for images of others:
//! when that one is deleted, or what a pull of it came with has expired, theirs still have it.
//!
//! Invariant: another repository is asked only for what a blob's own has refused or does not
//! have, with its own credentials, and first only as long as it gives it; of a blob
//! [`REPOSITORIES_MAX`] are known, and of a bounded number of blobs any. Does not look at the
//! bytes: verifying is not a source's business.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::{BlobRef, BlobSource, Body, Document};
use crate::types::{ByteRange, Descriptor, Digest, Reference, Repository};
use crate::{Error, Result};

/// Repositories known of one blob; those named longest ago go first.
pub const REPOSITORIES_MAX: usize = 8;
/// Blobs of which any are known: more than the layers of a node.
const BLOBS_MAX: usize = 16_384;

/// Which repositories have which blobs.
#[derive(Debug, Default)]
pub struct Homes {
    known: Mutex<HashMap<Digest, Known>>,
}

#[derive(Debug, Default)]
struct Known {
    /// The last named first.
    repositories: Vec<Repository>,
    /// The one that gave it last, if that was not its own.
    good: Option<Repository>,
}

impl Homes {
    /// `repository` has this blob: an image there names it.
    pub fn note(&self, blob: &Digest, repository: &Repository) {
        let mut known = self.known.lock();
        if known.len() >= BLOBS_MAX && !known.contains_key(blob) {
            return;
        }
        let repositories = &mut known.entry(*blob).or_default().repositories;
        repositories.retain(|other| other != repository);
        repositories.insert(0, repository.clone());
        repositories.truncate(REPOSITORIES_MAX);
    }

    /// The blob is not wanted any more.
    pub fn forget(&self, blob: &Digest) {
        self.known.lock().remove(blob);
    }

    /// Where to ask for `blob`, the likeliest first; its own repository is among them.
    fn order(&self, blob: &BlobRef) -> Vec<Repository> {
        let own = blob.repository.clone();
        let known = self.known.lock();
        let Some(known) = known.get(&blob.digest) else {
            return vec![own];
        };
        let mut order: Vec<Repository> = known.good.iter().cloned().collect();
        for repository in std::iter::once(&own).chain(&known.repositories) {
            if !order.contains(repository) {
                order.push(repository.clone());
            }
        }
        order
    }

    /// `repository` gave `blob`.
    fn gave(&self, blob: &BlobRef, repository: Repository) {
        if let Some(known) = self.known.lock().get_mut(&blob.digest) {
            known.good = (repository != blob.repository).then_some(repository);
        }
    }

    /// `repository`, which is not its own, could not give `blob`.
    fn failed(&self, blob: &BlobRef, repository: &Repository) {
        if let Some(known) = self.known.lock().get_mut(&blob.digest) {
            known.good.take_if(|good| good == repository);
        }
    }
}

/// See the module's documentation.
pub(super) struct AtHome<S> {
    inner: S,
    homes: Arc<Homes>,
}

/// What is read of a blob.
#[derive(Clone, Copy)]
enum Of<'a> {
    Range(ByteRange),
    Parts(&'a [ByteRange]),
    All,
}

impl<S: BlobSource> AtHome<S> {
    /// Reads from `inner`, by what `homes` knows.
    pub(super) fn new(inner: S, homes: Arc<Homes>) -> Self {
        Self { inner, homes }
    }

    async fn read(&self, blob: &BlobRef, of: Of<'_>) -> Result<Body> {
        let mut refused: Option<Error> = None;
        for repository in self.homes.order(blob) {
            let there = BlobRef {
                repository,
                ..blob.clone()
            };
            let body = match of {
                Of::Range(range) => self.inner.read_range(&there, range).await,
                Of::Parts(parts) => self.inner.read_parts(&there, parts).await,
                Of::All => self.inner.read_all(&there).await,
            };
            match body {
                Ok(body) => {
                    self.homes.gave(blob, there.repository);
                    return Ok(body);
                }
                Err(error @ (Error::Denied { .. } | Error::NotFound { .. })) => {
                    // What its own repository says is what its user can mend.
                    if refused.is_none() || there.repository == blob.repository {
                        refused = Some(error);
                    }
                }
                Err(error) if there.repository == blob.repository => return Err(error),
                // Its own may be well again, since it refused this.
                Err(error) => {
                    self.homes.failed(blob, &there.repository);
                    refused.get_or_insert(error);
                }
            }
        }
        Err(refused.unwrap_or_else(|| Error::NotFound {
            what: format!("blob {}", blob.digest),
            host: blob.repository.host().to_owned(),
        }))
    }
}

#[async_trait]
impl<S: BlobSource> BlobSource for AtHome<S> {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        self.inner.resolve(reference).await
    }

    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64> {
        self.inner.stat(repository, digest).await
    }

    async fn read_range(&self, blob: &BlobRef, range: ByteRange) -> Result<Body> {
        self.read(blob, Of::Range(range)).await
    }

    fn parts_max(&self, blob: &BlobRef) -> usize {
        self.inner.parts_max(blob)
    }

    async fn read_parts(&self, blob: &BlobRef, parts: &[ByteRange]) -> Result<Body> {
        self.read(blob, Of::Parts(parts)).await
    }

    fn distrust(&self, blob: &BlobRef) {
        self.inner.distrust(blob);
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        self.read(blob, Of::All).await
    }

    async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        self.inner
            .referrers(repository, digest, artifact_type)
            .await
    }
}
