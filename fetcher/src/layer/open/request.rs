//! What a manifest and a config say about one layer.
//!
//! Invariant: everything here comes from verified documents, so a digest in it may be
//! trusted; where things are is only a hint.

use super::asker::Asker;
use super::offered::OfferedIndex;
use crate::index::{estargz, zstdchunked};
use crate::source::BlobRef;
use crate::types::{Descriptor, Digest, Reference, Repository};

/// A layer that is to be made readable.
#[derive(Debug, Clone)]
pub struct LayerRequest {
    /// The blob.
    pub blob: BlobRef,
    /// Digest of the uncompressed tar; checked when the layer is streamed in full.
    pub diff_id: Digest,
    /// What the manifest says of a table of contents.
    pub toc: TocPromise,
    /// How the image was named, where that is known: eStargz finds external TOCs by it.
    pub reference: Option<Reference>,
    /// An index that the registry has beside the image.
    pub index: Option<OfferedIndex>,
    /// A SOCI zTOC of it that its manifest leads to, or somebody whom the config trusts.
    pub ztoc: Option<BlobRef>,
    /// Whether all of it is wanted now. Then what its zTOC says counts for nothing: the layer is
    /// streamed and checked, also where it is here by that zTOC.
    pub is_wanted_whole: bool,
    /// Whether to start fetching what the builder marked to be fetched first.
    pub fetch_landmark: bool,
    /// Whether somebody is about to read its files: what a full stream brings is then left in
    /// the page cache, else it goes past it.
    pub read_soon: bool,
    /// Who it is streamed for, where they can have it otherwise: a stream that they would wait
    /// for too long is given up early, and is [`Error::Unsupported`](crate::Error::Unsupported).
    pub asker: Option<Asker>,
}

/// What a manifest says of a layer's table of contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TocPromise {
    /// Nothing.
    None,
    /// The digest of its JSON. The blob's footer says where it is, and in which format.
    Json(Digest),
    /// Where it is and what it must be, of zstd:chunked.
    ZstdChunked(zstdchunked::Promise),
    /// Things that are malformed, contradict one another or exceed a limit: the reason to pull the
    /// layer whole.
    Contradiction(String),
}

impl LayerRequest {
    /// Reads what concerns layers out of a manifest's descriptor.
    pub fn new(repository: Repository, descriptor: &Descriptor, diff_id: Digest) -> Self {
        let blob = BlobRef {
            repository,
            digest: descriptor.digest,
            size: descriptor.size,
        };
        Self {
            blob,
            diff_id,
            toc: toc(descriptor),
            reference: None,
            index: None,
            ztoc: None,
            is_wanted_whole: false,
            fetch_landmark: true,
            read_soon: true,
            asker: None,
        }
    }

    /// The same, of an image that was asked for by `reference`.
    #[must_use]
    pub fn of_image(mut self, reference: &Reference) -> Self {
        self.reference = Some(reference.clone());
        self
    }
}

pub(super) fn toc(descriptor: &Descriptor) -> TocPromise {
    match zstdchunked::promise(descriptor) {
        Ok(Some(promise)) => return TocPromise::ZstdChunked(promise),
        Ok(None) => {}
        Err(error) => return TocPromise::Contradiction(error.to_string()),
    }
    match descriptor.annotations.get(estargz::TOC_DIGEST_ANNOTATION) {
        Some(text) => match Digest::parse(text) {
            Ok(digest) => TocPromise::Json(digest),
            Err(error) => TocPromise::Contradiction(format!("its TOC annotation: {error}")),
        },
        None => TocPromise::None,
    }
}
