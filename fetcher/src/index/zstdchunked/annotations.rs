//! What a layer's descriptor says of its zstd:chunked TOC.
//!
//! Invariant: a [`Promise`] holds at least one digest of the TOC and a position inside the
//! blob. The descriptor is trusted, for it is part of a verified manifest, but may be
//! nonsense.

use std::collections::BTreeMap;

use super::{Numbers, Position, Proof};
use crate::index::estargz::TOC_DIGEST_ANNOTATION;
use crate::types::{ByteRange, Descriptor, Digest};
use crate::{Error, Result};

/// Annotations of containers/storage.
const STORAGE_PREFIX: &str = "io.github.containers.zstd-chunked.";
/// Annotations of stargz, and of containers/storage at first.
const STARGZ_PREFIX: &str = "io.containers.zstd-chunked.";
/// Annotation of ours: the blob up to here is what starts read first, in bytes. Says for
/// containers/storage, which has nothing of the kind, what a landmark says in eStargz.
pub const PREFETCH_END_ANNOTATION: &str = "vnd.lazarette.prefetch.end";
const CHECKSUM: &str = "manifest-checksum";
const POSITION: &str = "manifest-position";

/// Where a TOC is and what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promise {
    /// Where to look.
    pub position: Position,
    /// What must be there.
    pub proof: Proof,
    /// Bytes of the blob that whoever built it wants fetched first, where an annotation
    /// says so; all before the TOC.
    pub prefetch: Option<ByteRange>,
}

/// Reads the annotations of a layer's descriptor. `None` where there are none of
/// zstd:chunked, or no position among them. Promises of both tools at once are
/// [`Error::Unsupported`]: the layer must be pulled whole.
pub fn promise(descriptor: &Descriptor) -> Result<Option<Promise>> {
    let notes = Notes {
        what: format!("layer {}", descriptor.digest),
        map: &descriptor.annotations,
    };
    let json = notes.digest(TOC_DIGEST_ANNOTATION)?;
    let storage = notes.flavour(STORAGE_PREFIX, descriptor.size)?;
    let stargz = notes.flavour(STARGZ_PREFIX, descriptor.size)?;
    let conflict = |detail: &str| {
        Err(Error::Unsupported {
            what: format!("reading {} lazily", notes.what),
            detail: detail.to_owned(),
        })
    };
    match (storage, stargz, json) {
        (Some(_), _, Some(_)) => conflict(
            "its manifest promises a TOC of containers/storage and one of stargz, \
             which need not be the same",
        ),
        (Some(_), Some(_), None) => {
            conflict("its manifest has zstd:chunked annotations of two kinds")
        }
        (Some(found), None, None) | (None, Some(found), None) => {
            let promised = found.checksum.zip(found.position);
            Ok(promised
                .map(|(checksum, position)| notes.promise(position, Proof::Compressed(checksum))))
        }
        (None, Some(found), Some(json)) => Ok(found.position.map(|position| {
            let compressed = found.checksum;
            notes.promise(position, Proof::Json { json, compressed })
        })),
        (None, None, _) => Ok(None),
    }
}

/// Annotations of one prefix.
struct Found {
    checksum: Option<Digest>,
    position: Option<Position>,
}

struct Notes<'a> {
    what: String,
    map: &'a BTreeMap<String, String>,
}

impl Notes<'_> {
    fn promise(&self, position: Position, proof: Proof) -> Promise {
        Promise {
            position,
            proof,
            prefetch: self.prefetch(position.blob.start()),
        }
    }

    /// Only a hint: one that makes no sense is named in the log and costs a prefetch.
    fn prefetch(&self, toc_start: u64) -> Option<ByteRange> {
        let text = self.map.get(PREFETCH_END_ANNOTATION)?;
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let end = text.parse().ok().filter(|_| is_number);
        let range = end.and_then(|end| ByteRange::new(0, end));
        let range = range.filter(|range| !range.is_empty() && range.end() <= toc_start);
        if range.is_none() {
            let what = &self.what;
            tracing::warn!(%what, value = %text, "ignoring where its first part ends: {PREFETCH_END_ANNOTATION} is no place before its table");
        }
        range
    }

    fn digest(&self, name: &str) -> Result<Option<Digest>> {
        let parse = |text: &String| {
            Digest::parse(text)
                .map_err(|e| Error::malformed(&*self.what, format!("its annotation {name}: {e}")))
        };
        self.map.get(name).map(parse).transpose()
    }

    fn flavour(&self, prefix: &str, blob_size: u64) -> Result<Option<Found>> {
        let checksum = self.digest(&format!("{prefix}{CHECKSUM}"))?;
        let name = format!("{prefix}{POSITION}");
        let position = match self.map.get(&name) {
            Some(text) => Some(self.position(&name, text, blob_size)?),
            None => None,
        };
        let found = Found { checksum, position };
        let any = found.checksum.is_some() || found.position.is_some();
        Ok(any.then_some(found))
    }

    fn position(&self, name: &str, text: &str, blob_size: u64) -> Result<Position> {
        let what = format!("annotation {name} of {}", self.what);
        match numbers(text) {
            Some(numbers) => Position::new(&what, numbers, blob_size),
            None => Err(Error::malformed(what, "it is not four numbers")),
        }
    }
}

/// `offset:length:decoded length:type`, each in decimal.
fn numbers(text: &str) -> Option<Numbers> {
    let mut parts = text.split(':').map(|part| {
        let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| part.parse::<u64>().ok()).flatten()
    });
    let numbers = Numbers {
        offset: parts.next()??,
        len: parts.next()??,
        json_len: parts.next()??,
        toc_type: parts.next()??,
    };
    parts.next().is_none().then_some(numbers)
}
