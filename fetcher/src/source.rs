//! Where bytes come from: the trait, and one small wrapper per concern.
//!
//! Invariant: bytes of a [`Body`] are untrusted. What a source does promise is the
//! *shape*: a range body yields exactly the range's bytes in order, or an error; it is
//! never short, never long, never of another range. Network policy (auth, redirects,
//! retries, deadlines) ends in this module.

mod auth;
mod config;
mod endpoint;
pub(crate) mod exact;
mod homes;
pub(crate) mod hosts;
mod http;
mod mirrors;
mod push;
pub(crate) mod registry;
mod retry;
mod single_flight;
pub mod stack;
mod stats;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;

use crate::codec::{self, VerifiedBytes};
use crate::types::{ByteRange, Descriptor, Digest, MediaType, Reference, Repository};
use crate::{Error, Result};

pub use self::auth::credentials::Credential;
pub use self::auth::keyring::{Given, Keyring, PullAuth};
pub use self::config::{SourceConfig, default_docker_config, default_hosts_dir};
pub use self::exact::Exact;
pub use self::homes::{Homes, REPOSITORIES_MAX};
pub use self::http::proxy::ProxySettings;
pub use self::http::tls::install_tls_provider;
pub use self::mirrors::Mirrors;
pub use self::push::Pusher;
pub use self::registry::RegistrySource;
pub use self::stats::SourceStats;

/// Bytes of a blob as they arrive; pieces of any size. Dropping it cancels the transfer.
/// After an error the stream ends.
pub type Body = BoxStream<'static, Result<Bytes>>;

/// A blob in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BlobRef {
    /// The repository that serves it (and whose credentials apply).
    pub repository: Repository,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes, from a verified manifest.
    pub size: u64,
}

/// A manifest or index document, byte for byte, whose digest has been checked.
#[derive(Debug, Clone)]
pub struct Document {
    /// Digest, size and media type of `bytes`.
    pub descriptor: Descriptor,
    /// The document as served, at most 4 MiB.
    pub bytes: Bytes,
}

impl Document {
    /// Wraps bytes whose digest the caller computed or checked.
    pub fn new(media_type: MediaType, digest: Digest, bytes: Bytes) -> Self {
        let descriptor = Descriptor::new(media_type, digest, bytes.len() as u64);
        Self { descriptor, bytes }
    }
}

/// Reads blobs by digest and range.
///
/// Every method may be called from many tasks at once, is cancel-safe (dropping the
/// future or the body abandons only that call), waits no longer than the source's
/// deadline without progress, and reports a failure that a retry could mend as
/// [`Error::is_transient`] only after the retries the source itself does.
#[async_trait]
pub trait BlobSource: Send + Sync + 'static {
    /// The manifest or index that `reference` names now. A reference with a digest gets
    /// bytes of that digest or [`Error::Corrupt`].
    async fn resolve(&self, reference: &Reference) -> Result<Document>;

    /// Size of a blob in bytes as the source reports it; untrusted.
    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64>;

    /// Exactly the bytes of `range`, which must not be empty and must lie within
    /// `blob.size`. A source that cannot serve ranges answers
    /// [`Error::Unsupported`], and the caller falls back to [`Self::read_all`].
    async fn read_range(&self, blob: &BlobRef, range: ByteRange) -> Result<Body>;

    /// How many parts of a blob [`Self::read_parts`] takes at once; at least 1. What is
    /// known now, so it may fall.
    fn parts_max(&self, _blob: &BlobRef) -> usize {
        1
    }

    /// The bytes of all `parts` of a blob one after another, without those between them.
    /// The parts ascend, do not overlap, and each is as [`Self::read_range`] wants it;
    /// there is at least one and at most [`Self::parts_max`].
    async fn read_parts(&self, blob: &BlobRef, parts: &[ByteRange]) -> Result<Body> {
        match parts {
            [range] => self.read_range(blob, *range).await,
            _ => Err(Error::Unsupported {
                what: format!("{} parts of blob {} at once", parts.len(), blob.digest),
                detail: "this source reads one".to_owned(),
            }),
        }
    }

    /// Bytes of a blob that came from here last turned out not to be the blob's. A source
    /// that has several places to read it from reads it from another next.
    fn distrust(&self, _blob: &BlobRef) {}

    /// The whole blob: exactly `blob.size` bytes.
    async fn read_all(&self, blob: &BlobRef) -> Result<Body>;

    /// Descriptors of manifests whose subject is `digest`, optionally of one artifact type.
    async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>>;
}

/// All of `blob` in memory, which `what` names in errors: for what is known to be small.
pub async fn read_verified(
    source: &dyn BlobSource,
    blob: &BlobRef,
    what: impl Fn() -> String,
) -> Result<VerifiedBytes> {
    read_twice(source, blob, || async {
        let mut body = source.read_all(blob).await?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = body.next().await {
            bytes.extend_from_slice(&piece?);
        }
        codec::verify(&what, &blob.digest, bytes.freeze())
    })
    .await
}

/// What `read` makes of bytes of `blob`. Where they are not the blob's, that is laid to who sent
/// them, and it reads once more.
pub async fn read_twice<T, R: Future<Output = Result<T>>>(
    source: &dyn BlobSource,
    blob: &BlobRef,
    read: impl Fn() -> R,
) -> Result<T> {
    match read().await {
        Err(error @ (Error::Corrupt { .. } | Error::Malformed { .. })) => {
            tracing::warn!(digest = %blob.digest, %error, "reading it once more");
            source.distrust(blob);
            read().await
        }
        other => other,
    }
}
