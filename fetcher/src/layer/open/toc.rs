//! Reading a layer's table of contents, in whatever format it has.
//!
//! Invariant: only reads, and never more than the limits of the format at hand. `None`
//! where the layer has no TOC to be found; [`Error::Unsupported`] and [`Error::Limit`] where
//! it has one that cannot be used: either way the layer must be read in another way. Anything
//! else that fails fails the layer, above all a TOC that is not the promised one when it is read
//! for the second time; the first is laid to who sent it.

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use serde::Deserialize;

use super::ahead::Ahead;
use super::{LayerRequest, TocPromise};
use crate::index::estargz::{self, Footer, FooterKind, TocLayer};
use crate::index::zstdchunked::{self, Position, Proof};
use crate::source::{BlobRef, BlobSource, read_twice};
use crate::task::blocking;
use crate::types::{ByteRange, Descriptor, Digest, Reference};
use crate::{Error, Result};

/// What is read of the blob first, whatever it turns out to be.
pub(super) fn first_read(promise: &TocPromise, blob: &BlobRef) -> Option<ByteRange> {
    match promise {
        TocPromise::Json(_) => tail(blob).ok(),
        TocPromise::ZstdChunked(promise) => Some(promise.position.blob),
        TocPromise::None | TocPromise::Contradiction(_) => None,
    }
}

/// The TOC that the manifest promises, read and checked.
pub(super) async fn read_toc(
    (source, ahead): (&dyn BlobSource, &Ahead),
    request: &LayerRequest,
) -> Result<Option<TocLayer>> {
    let blob = &request.blob;
    let first = async |range| match ahead.take(&blob.digest, range).await {
        Some(outcome) => outcome,
        None => read(source, blob, range).await,
    };
    match &request.toc {
        TocPromise::None => Ok(None),
        TocPromise::Json(digest) => {
            let tail = tail(blob)?;
            let found = read_twice(source, blob, || async {
                let (start, bytes) = (tail.start(), first(tail).await?);
                by_footer(source, blob, Tail { start, bytes }, *digest).await
            });
            match found.await? {
                Found::Nothing => Ok(None),
                Found::Toc(toc) => Ok(Some(toc)),
                Found::External(footer) => external(source, request, footer, *digest).await,
            }
        }
        TocPromise::ZstdChunked(promise) => {
            let (position, proof) = (promise.position, promise.proof);
            let toc = read_twice(source, blob, || async {
                let toc = first(position.blob).await?;
                zstd_chunked(blob, position, toc, proof).await
            });
            let toc = toc.await?;
            // A landmark in the blob is the flavour's own mark.
            Ok(Some(TocLayer {
                prefetch: toc.prefetch.or(promise.prefetch),
                ..toc
            }))
        }
        TocPromise::Contradiction(detail) => Err(Error::Unsupported {
            what: format!("reading layer {} lazily", request.blob.digest),
            detail: detail.clone(),
        }),
    }
}

/// The end of a blob: footer, and with luck the TOC.
struct Tail {
    start: u64,
    bytes: Bytes,
}

fn tail(blob: &BlobRef) -> Result<ByteRange> {
    let start = blob.size.saturating_sub(estargz::tail_len(blob.size));
    span(blob, start, blob.size)
}

/// What a blob's footer leads to.
enum Found {
    Nothing,
    Toc(TocLayer),
    /// A TOC in another image.
    External(Footer),
}

/// Reads, by the footer in the blob's tail, the TOC whose JSON has `toc_digest`.
async fn by_footer(
    source: &dyn BlobSource,
    blob: &BlobRef,
    tail: Tail,
    toc_digest: Digest,
) -> Result<Found> {
    if let Some(footer) = estargz::read_footer(&tail.bytes, blob.size)? {
        return match footer.kind() {
            FooterKind::External => Ok(Found::External(footer)),
            FooterKind::Estargz | FooterKind::Legacy => {
                let toc = inside(source, blob, footer, tail, toc_digest).await;
                toc.map(Found::Toc)
            }
        };
    }
    if let Some(position) = zstdchunked::read_footer(&tail.bytes, blob.size)? {
        let toc = match cut(&tail, position.blob) {
            Some(toc) => toc,
            None => read(source, blob, position.blob).await?,
        };
        let proof = Proof::Json {
            json: toc_digest,
            compressed: None,
        };
        let toc = zstd_chunked(blob, position, toc, proof).await;
        return toc.map(Found::Toc);
    }
    tracing::warn!(digest = %blob.digest, "layer has a TOC digest but no footer that leads to a TOC");
    Ok(Found::Nothing)
}

/// eStargz with its TOC in the blob.
async fn inside(
    source: &dyn BlobSource,
    blob: &BlobRef,
    footer: Footer,
    tail: Tail,
    toc_digest: Digest,
) -> Result<TocLayer> {
    estargz::check_toc_len(footer.toc_len())?;
    let toc = span(blob, footer.toc_offset(), blob.size)?;
    let bytes = match cut(&tail, toc) {
        Some(bytes) => bytes,
        None => {
            let before = span(blob, footer.toc_offset(), tail.start)?;
            let mut joined = BytesMut::from(read(source, blob, before).await?.as_ref());
            joined.extend_from_slice(&tail.bytes);
            joined.freeze()
        }
    };
    let blob = blob.clone();
    blocking(move || estargz::parse_toc(&blob, &footer, &bytes, &toc_digest)).await
}

/// eStargz with its TOC in a blob of another image, which has a name made from this one's.
async fn external(
    source: &dyn BlobSource,
    request: &LayerRequest,
    footer: Footer,
    toc_digest: Digest,
) -> Result<Option<TocLayer>> {
    let blob = &request.blob;
    let nowhere = |detail: String| Error::Unsupported {
        what: format!("reading layer {} lazily", blob.digest),
        detail,
    };
    let Some(reference) = request.reference.as_ref().and_then(external_reference) else {
        return Err(nowhere(
            "its TOC is in another image, which is found by a tag, and none is known".to_owned(),
        ));
    };
    let document = match source.resolve(&reference).await {
        Ok(document) => document,
        Err(Error::NotFound { .. }) => {
            return Err(nowhere(format!("its TOC image {reference} does not exist")));
        }
        Err(error) => return Err(error),
    };
    let Some(toc) = external_layer(&reference, &document.bytes, &blob.digest)? else {
        return Err(nowhere(format!(
            "its TOC image {reference} has no TOC of it"
        )));
    };
    estargz::check_toc_len(toc.size)?;
    let toc = BlobRef {
        repository: blob.repository.clone(),
        digest: toc.digest,
        size: toc.size,
    };
    let whole = span(&toc, 0, toc.size)?;
    let toc = read_twice(source, &toc, || async {
        let (member, blob) = (read(source, &toc, whole).await?, blob.clone());
        blocking(move || estargz::parse_external_toc(&blob, &footer, &member, &toc_digest)).await
    });
    toc.await.map(Some)
}

fn external_reference(image: &Reference) -> Option<Reference> {
    let tag = estargz::external_toc_tag(image.tag()?);
    Reference::parse(&format!("{}:{tag}", image.repository())).ok()
}

/// The layer of a TOC image that holds the TOC of `layer`.
fn external_layer(
    reference: &Reference,
    manifest: &[u8],
    layer: &Digest,
) -> Result<Option<Descriptor>> {
    #[derive(Deserialize)]
    struct Manifest {
        #[serde(default)]
        layers: Vec<Descriptor>,
    }
    let manifest: Manifest = serde_json::from_slice(manifest)
        .map_err(|e| Error::malformed(format!("manifest of {reference}"), e.to_string()))?;
    let wanted = layer.to_string();
    let is_it = |toc: &Descriptor| {
        let of = toc.annotations.get(estargz::LAYER_DIGEST_ANNOTATION);
        of.is_some_and(|of| *of == wanted)
    };
    Ok(manifest.layers.into_iter().find(is_it))
}

async fn zstd_chunked(
    blob: &BlobRef,
    position: Position,
    toc: Bytes,
    proof: Proof,
) -> Result<TocLayer> {
    let blob = blob.clone();
    blocking(move || zstdchunked::parse_toc(&blob, &position, &toc, &proof)).await
}

/// `wanted` of the blob, if the tail has all of it.
fn cut(tail: &Tail, wanted: ByteRange) -> Option<Bytes> {
    let start = usize::try_from(wanted.start().checked_sub(tail.start)?).ok()?;
    let end = start.checked_add(usize::try_from(wanted.len()).ok()?)?;
    (end <= tail.bytes.len()).then(|| tail.bytes.slice(start..end))
}

fn span(blob: &BlobRef, start: u64, end: u64) -> Result<ByteRange> {
    ByteRange::new(start, end).ok_or_else(|| {
        let what = format!("layer {}", blob.digest);
        Error::malformed(what, "its TOC starts after its end")
    })
}

pub(super) async fn read(
    source: &dyn BlobSource,
    blob: &BlobRef,
    range: ByteRange,
) -> Result<Bytes> {
    let mut body = source.read_range(blob, range).await?;
    let mut bytes = BytesMut::new();
    while let Some(piece) = body.next().await {
        bytes.extend_from_slice(&piece?);
    }
    Ok(bytes.freeze())
}
