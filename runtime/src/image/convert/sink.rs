//! Where converted images go.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{Stream, stream};
use lazarette_fetcher::source::Pusher;
use lazarette_fetcher::types::{Digest, MediaType, Reference, Repository};
use lazarette_fetcher::{Error, Result};

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

    /// Stores a blob of `size` bytes, which are those of `file`. See [`file_stream`].
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

/// The bytes of a file from its start, in pieces. Its position is neither used nor moved,
/// so that a stream that was given up does not disturb the next one.
pub fn file_stream(file: File) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
    stream::try_unfold((Arc::new(file), 0), async |(file, at)| {
        let reader = Arc::clone(&file);
        let piece = tokio::task::spawn_blocking(move || read_piece(&reader, at)).await;
        let piece = piece.unwrap_or_else(|stopped| Err(io::Error::other(stopped)));
        match piece.map_err(|error| Error::io("read back", "a converted blob", error))? {
            empty if empty.is_empty() => Ok(None),
            piece => {
                let next = at + piece.len() as u64;
                Ok(Some((piece, (file, next))))
            }
        }
    })
}

/// What is at `at`, at most [`PIECE_BYTES`]; nothing at the end.
fn read_piece(file: &File, at: u64) -> io::Result<Bytes> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match file.read_at(&mut piece, at) {
            Ok(len) => {
                piece.truncate(len);
                return Ok(piece.into());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
