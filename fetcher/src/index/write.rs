//! Writes layers: a tar in, a compressed blob with the same entries out, which readers of
//! its [`Format`] can load lazily.
//!
//! Invariant: the blob, decompressed, is a tar with the header blocks of the input byte
//! for byte, in the input's order (prioritised files apart), plus what the format adds to
//! the tar (eStargz: a landmark and the TOC). Equal input and options give equal bytes,
//! however many threads compress. What a table of contents cannot say is refused; nothing
//! is approximated or dropped in silence, except what extracting the tar would not leave
//! behind either (entries replaced by later ones, comments, tables of an earlier
//! conversion).
//!
//! The work is decided before it is done: [`Survey`] reads the headers, `order` picks
//! what to write and where, `pieces` cuts files into chunks, `emit` writes them. That
//! needs a seekable input (a spooled layer) and keeps memory bounded by the number of
//! entries, not by their bytes.
//!
//! ```text
//! eStargz:
//! blob = member("landmark header") member("landmark payload, next headers")
//!        { member(chunk of a file [, padding, headers up to the next payload]) }
//!        member(TOC tar header, TOC JSON, padding, end of archive) footer
//! zstd:chunked:
//! blob = frame(headers up to the first payload)
//!        { frame(chunk of a file) [ frame(padding, headers up to the next payload) ] }
//!        skippable(frame(TOC JSON)) [ skippable(frame(tar-split)) ] skippable(footer)
//! gzip:
//! blob = { member(1 MiB of the tar) }
//! ```

mod crc64;
mod emit;
mod entry;
mod hot;
mod members;
mod order;
mod pieces;
mod scan;
mod stream;
mod tail;
mod tarsplit;
mod toc;

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, Write};

use crate::codec::{deflate, zstd_write};
use crate::types::Digest;
use crate::{Error, Result};

pub use hot::{HotFile, HotFiles, Resolved, resolve};
pub use scan::Survey;

/// Name of eStargz's TOC entry, always the last.
pub const TOC_NAME: &str = "stargz.index.json";
/// Name of the landmark that ends the prioritised files.
pub const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
/// Name of the landmark that says that nothing is prioritised.
pub const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";

/// Default of [`Options::chunk_bytes`].
///
/// Starting python touches 31 MB of its files in pieces of 64 KiB, 40 MB in pieces of
/// 1 MiB and 55 MB in pieces of 4 MiB, so pieces should be small. Each piece costs TOC
/// bytes and restarts the deflate window: measured on a Debian base layer, blobs grow by
/// 0.3 % at 256 KiB and by 1.6 % at 64 KiB over those with 4 MiB. Neighbours can be
/// fetched by one ranged request, so smaller pieces need not cost round trips.
pub const CHUNK_BYTES_DEFAULT: u32 = 256 << 10;
const CHUNK_BYTES_MIN: u32 = 4 << 10;
const CHUNK_BYTES_MAX: u32 = 64 << 20;

/// Most compression threads; more would only hold more memory.
const WORKERS_MAX: usize = 16;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Gzip with a TOC: every runtime reads it, stargz-snapshotter and we lazily.
    Estargz,
    /// Zstandard with a TOC behind the tar.
    ZstdChunked(Flavour),
    /// Gzip and nothing else.
    Gzip,
}

/// Whose zstd:chunked. The tar's part of the blob is read by everyone; what is behind it
/// and the annotations differ, and containers/storage refuses the annotation that
/// stargz-snapshotter cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// Podman's, buildah's, CRI-O's.
    ContainersStorage,
    /// stargz-snapshotter's, with landmarks.
    Stargz,
}

impl Format {
    /// Whether landmark files tell readers what to fetch first.
    fn has_landmarks(self) -> bool {
        match self {
            Self::Estargz | Self::ZstdChunked(Flavour::Stargz) => true,
            Self::ZstdChunked(Flavour::ContainersStorage) | Self::Gzip => false,
        }
    }

    /// Deflate's usual compromise; for zstd what costs about as much time and gives
    /// blobs a tenth smaller.
    fn level_default(self) -> u32 {
        match self {
            Self::Estargz | Self::Gzip => 6,
            Self::ZstdChunked(_) => 9,
        }
    }

    fn level_max(self) -> u32 {
        match self {
            Self::Estargz | Self::Gzip => deflate::LEVEL_MAX,
            Self::ZstdChunked(_) => zstd_write::LEVEL_MAX,
        }
    }
}

/// How to write a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What to write.
    pub format: Format,
    /// Largest chunk of a file that starts may need, in bytes before compression, 4 KiB
    /// to 64 MiB. Files that no start touched get larger ones.
    pub chunk_bytes: u32,
    /// Compression level: 1 to 9 of gzip, 1 to 19 of zstd.
    pub level: u32,
    /// Compression threads, at least 1. The output does not depend on it.
    pub workers: usize,
}

impl Options {
    /// The defaults for `format`.
    pub fn new(format: Format) -> Self {
        Self {
            format,
            chunk_bytes: CHUNK_BYTES_DEFAULT,
            level: format.level_default(),
            workers: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// Refuses values out of range.
    pub fn check(&self) -> Result<()> {
        if !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&self.chunk_bytes) {
            return Err(Error::limit(
                "chunk size",
                format!(
                    "{} bytes; use {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}",
                    self.chunk_bytes
                ),
            ));
        }
        let level_max = self.format.level_max();
        if !(1..=level_max).contains(&self.level) {
            return Err(Error::limit(
                "compression level",
                format!("{}; use 1 to {level_max}", self.level),
            ));
        }
        Ok(())
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::new(Format::Estargz)
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Digest of the blob.
    pub blob_digest: Digest,
    /// Size of the blob in bytes.
    pub blob_size: u64,
    /// Digest of everything the blob decompresses to; of eStargz, the TOC's entry too.
    pub diff_id: Digest,
    /// Length of what the blob decompresses to in bytes.
    pub uncompressed_size: u64,
    /// Digest of the TOC's JSON, of a format with a TOC.
    pub toc_digest: Option<Digest>,
    /// Length of the TOC's JSON in bytes; 0 of a format without.
    pub toc_size: u64,
    /// What the layer's descriptor must say for readers to find and trust the TOC.
    pub annotations: BTreeMap<&'static str, String>,
}

/// Converts the uncompressed tar `input`, read from its start, with no hot files.
///
/// `what` names the input in errors. Blocks; on an error `output` holds a useless prefix.
pub fn write_layer(
    what: &str,
    input: &mut (impl Read + Seek),
    output: &mut impl Write,
    options: &Options,
) -> Result<Written> {
    let survey = Survey::take(what, input)?;
    write_surveyed(what, &survey, None, (input, output), options)
}

/// Converts the tar that `survey` was taken of. The paths in `hot` are those of this
/// layer, see [`resolve`]; ones it does not have are passed over. Some without any means
/// that no start needs this layer, none that nothing is known.
pub fn write_surveyed(
    what: &str,
    survey: &Survey,
    hot: Option<&HotFiles>,
    (input, output): (&mut (impl Read + Seek), &mut impl Write),
    options: &Options,
) -> Result<Written> {
    options.check()?;
    let written = order::order(&survey.entries, hot)
        .and_then(|plan| emit::emit((&survey.entries, plan), hot, input, output, options));
    written.map_err(|fault| fault.into_error(what))
}

/// Why a layer cannot be written, before it is known what the caller calls the layer.
#[derive(Debug)]
enum Fault {
    Malformed(String),
    Unsupported(String),
    Limit(String),
    Io(&'static str, io::Error),
}

impl Fault {
    fn malformed(detail: impl Into<String>) -> Self {
        Self::Malformed(detail.into())
    }

    fn unsupported(detail: impl Into<String>) -> Self {
        Self::Unsupported(detail.into())
    }

    fn read(error: io::Error) -> Self {
        Self::Io("read", error)
    }

    fn write(error: io::Error) -> Self {
        Self::Io("write the converted", error)
    }

    fn compress(error: io::Error) -> Self {
        Self::Io("compress", error)
    }

    /// Names the entry that is at fault.
    fn about(self, name: &str) -> Self {
        let put = |detail: String| {
            let name: String = name.chars().take(256).collect();
            format!("entry {name:?}: {detail}")
        };
        match self {
            Self::Malformed(detail) => Self::Malformed(put(detail)),
            Self::Unsupported(detail) => Self::Unsupported(put(detail)),
            Self::Limit(detail) => Self::Limit(put(detail)),
            Self::Io(op, error) => Self::Io(op, error),
        }
    }

    fn into_error(self, what: &str) -> Error {
        match self {
            Self::Malformed(detail) => Error::malformed(what, detail),
            Self::Unsupported(detail) => Error::Unsupported {
                what: what.to_owned(),
                detail,
            },
            Self::Limit(detail) => Error::limit(what, detail),
            Self::Io(op, error) => Error::io(op, what, error),
        }
    }
}

#[cfg(test)]
mod tests;
