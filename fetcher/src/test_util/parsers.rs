//! Parsers that no other crate sees, for the fuzz targets: of what servers send and of
//! what disks keep.
//!
//! Invariant: each function hands its input to the one that production uses; none decides
//! anything.

use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;

use crate::source::BlobRef;
use crate::source::hosts::parse::{self, Origin};
use crate::source::registry::multipart::{Multipart, boundary};
use crate::store::chunks::{ChunkTable, Place};
use crate::store::file::pinned;
use crate::store::origin;

/// What an answer with several ranges brought.
#[derive(Debug, PartialEq, Eq)]
pub struct Parts {
    /// Bytes of the blob and where they begin.
    pub runs: Vec<(u64, Bytes)>,
    /// Whether the last part has ended.
    pub is_over: bool,
}

/// What a body of this `Content-Type` has of a blob of `size` bytes, no run going on past
/// `end` unless it begins there; `None` where that is no type for several ranges. The
/// error is the parser's own words.
pub fn byteranges(
    content_type: &str,
    size: u64,
    pieces: impl Iterator<Item = Bytes>,
    end: u64,
) -> Option<Result<Parts, String>> {
    let mut multipart = Multipart::new(boundary(content_type)?, size);
    let mut runs = Vec::new();
    for mut piece in pieces {
        loop {
            match multipart.next(&mut piece, end) {
                Ok(Some(run)) => runs.push(run),
                Ok(None) => break,
                Err(error) => return Some(Err(error)),
            }
        }
    }
    let is_over = multipart.is_over();
    Some(Ok(Parts { runs, is_over }))
}

/// How many hosts a file `hosts.toml` in `/d` names, the last one included; the error says
/// what is wrong.
pub fn hosts(text: &str, is_plain: bool) -> Result<usize, crate::Error> {
    let file = Path::new("/d/hosts.toml");
    let hosts = parse::parse(text, Origin { file, is_plain })?;
    Ok(hosts.mirrors.len() + 1)
}

/// The table of the chunks that a store holds. A place is the layer's number and an offset
/// in its data file.
pub struct Chunks(ChunkTable);

impl Chunks {
    /// The table in the file `chunks` of this directory, whatever the file holds.
    pub fn open(root: &Path) -> Self {
        Self(ChunkTable::open(root))
    }

    /// Where bytes with this digest may be.
    pub fn find(&self, chunk_digest: &[u8; 32]) -> Vec<(u32, u64)> {
        let found = self.0.find(chunk_digest).into_iter();
        found
            .map(|place| (place.layer, place.data_offset))
            .collect()
    }

    /// Notes that they were put there.
    pub fn note(&self, chunk_digest: &[u8; 32], place: (u32, u64)) {
        self.0.note(chunk_digest, place_of(place));
    }

    /// Drops a place where they were not.
    pub fn forget(&self, chunk_digest: &[u8; 32], place: (u32, u64)) {
        self.0.forget(chunk_digest, place_of(place));
    }
}

fn place_of((layer, data_offset): (u32, u64)) -> Place {
    Place { layer, data_offset }
}

/// Extents that a file `pinned` of a layer with as many extents pins at `now`.
pub fn pinned(file: &[u8], extents: usize, now: SystemTime) -> Vec<u32> {
    pinned::extents(&pinned::decode(file, extents), now)
}

/// Where a file `origin` says that an index is.
pub fn origin(file: &[u8]) -> Option<BlobRef> {
    origin::decode(file)
}

/// The file `origin` that says so.
pub fn origin_file(origin: &BlobRef) -> Vec<u8> {
    origin::encode(origin)
}
