//! A wrapper that holds any source to the trait's promise about shape.
//!
//! Invariant: a body that leaves here has exactly the promised length, or ends in an
//! error; a range that is empty or outside its blob never reaches the inner source. Does
//! not look at the bytes: verifying is not a source's business.

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};

use super::{BlobRef, BlobSource, Body, Document};
use crate::types::{ByteRange, Descriptor, Digest, Reference, Repository};
use crate::{Error, Result};

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct Exact<S> {
    inner: S,
}

impl<S: BlobSource> Exact<S> {
    /// Wraps a source.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

/// The error for a range that no blob can serve.
pub(crate) fn check_range(blob: &BlobRef, range: ByteRange) -> Result<()> {
    if range.is_empty() || range.end() > blob.size {
        return Err(Error::malformed(
            format!("range {range} of blob {}", blob.digest),
            format!(
                "it is empty or reaches beyond the blob's {} bytes",
                blob.size
            ),
        ));
    }
    Ok(())
}

/// The error for parts that are not in order, or that no blob can serve.
pub(crate) fn check_parts(blob: &BlobRef, parts: &[ByteRange]) -> Result<()> {
    let mut reached = 0;
    for part in parts {
        check_range(blob, *part)?;
        if part.start() < reached {
            return Err(Error::malformed(
                format!("part {part} of blob {}", blob.digest),
                format!("it comes after a part that ends at {reached}"),
            ));
        }
        reached = part.end();
    }
    if parts.is_empty() {
        let what = format!("a read of blob {}", blob.digest);
        return Err(Error::malformed(what, "it is of no part"));
    }
    Ok(())
}

#[async_trait]
impl<S: BlobSource> BlobSource for Exact<S> {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        self.inner.resolve(reference).await
    }

    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64> {
        self.inner.stat(repository, digest).await
    }

    async fn read_range(&self, blob: &BlobRef, range: ByteRange) -> Result<Body> {
        check_range(blob, range)?;
        let body = self.inner.read_range(blob, range).await?;
        Ok(exactly(body, blob, range.len()))
    }

    fn parts_max(&self, blob: &BlobRef) -> usize {
        self.inner.parts_max(blob)
    }

    async fn read_parts(&self, blob: &BlobRef, parts: &[ByteRange]) -> Result<Body> {
        check_parts(blob, parts)?;
        let body = self.inner.read_parts(blob, parts).await?;
        Ok(exactly(body, blob, parts.iter().map(ByteRange::len).sum()))
    }

    fn distrust(&self, blob: &BlobRef) {
        self.inner.distrust(blob);
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        let body = self.inner.read_all(blob).await?;
        Ok(exactly(body, blob, blob.size))
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

/// Passes `body` on for `len` bytes, no more and no fewer.
fn exactly(body: Body, blob: &BlobRef, len: u64) -> Body {
    let what = format!("blob {}", blob.digest);
    let host = blob.repository.host().to_owned();
    stream::try_unfold((body, len), move |(mut body, left)| {
        let (what, host) = (what.clone(), host.clone());
        async move {
            match body.next().await {
                Some(Ok(piece)) => match left.checked_sub(piece.len() as u64) {
                    Some(left) => Ok(Some((piece, (body, left)))),
                    None => Err(Error::malformed(
                        what,
                        format!("{host} sent more bytes than were asked for"),
                    )),
                },
                Some(Err(error)) => Err(error),
                None if left == 0 => Ok(None),
                None => Err(Error::Unavailable {
                    what,
                    host,
                    detail: format!("the body ended {left} bytes early"),
                }),
            }
        }
    })
    .boxed()
}
