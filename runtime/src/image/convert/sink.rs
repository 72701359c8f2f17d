//! Where converted images go.

use std::fs::File;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, stream};
use lazarette_fetcher::source::Pusher;
use lazarette_fetcher::types::{Digest, MediaType, Reference, Repository};
use lazarette_fetcher::{Error, Result};
use tokio::io::AsyncReadExt as _;

/// Bytes read from a spool file at once.
const PIECE_BYTES: usize = 256 << 10;

/// Writes blobs and manifests.
///
/// Every method may be repeated after a failure; a blob or manifest is there completely
/// or not at all. Dropping a future abandons only that call.
#[async_trait]
pub trait BlobSink: Send + Sync {
    /// Whether `repository` has the blob.
    async fn blob_exists(&self, repository: &Repository, digest: &Digest) -> Result<bool>;

    /// Stores a blob of `size` bytes, read from the start of `file`. See [`file_stream`].
    async fn push_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        size: u64,
        file: File,
    ) -> Result<()>;

    /// Stores a manifest under the reference's tag and yields its digest. All blobs that
    /// it names are there already.
    async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &MediaType,
        bytes: Bytes,
    ) -> Result<Digest>;
}

#[async_trait]
impl BlobSink for Pusher {
    async fn blob_exists(&self, repository: &Repository, digest: &Digest) -> Result<bool> {
        Self::blob_exists(self, repository, digest).await
    }

    async fn push_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        size: u64,
        file: File,
    ) -> Result<()> {
        Self::push_blob(self, repository, digest, size, file_stream(file)).await
    }

    async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &MediaType,
        bytes: Bytes,
    ) -> Result<Digest> {
        Self::push_manifest(self, reference, media_type, bytes).await
    }
}

/// The bytes of a file from its current position on, in pieces.
pub fn file_stream(file: File) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
    stream::try_unfold(tokio::fs::File::from_std(file), async |mut file| {
        let mut piece = BytesMut::with_capacity(PIECE_BYTES);
        match file.read_buf(&mut piece).await {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some((piece.freeze(), file))),
            Err(error) => Err(Error::io("read back", "a converted blob", error)),
        }
    })
}
