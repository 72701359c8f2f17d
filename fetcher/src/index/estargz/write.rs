//! Writes eStargz: a tar in, a lazily readable gzip blob with the same entries out.
//!
//! Invariant: the blob, decompressed, is a tar with the header blocks of the input byte
//! for byte, in the input's order (prioritised files apart), plus a landmark and the TOC.
//! Equal input and options give equal bytes, however many threads compress. What a TOC
//! cannot say is refused; nothing is approximated or dropped in silence, except what
//! extracting the tar would not leave behind either (entries replaced by later ones).
//!
//! The work is decided before it is done: `scan` reads the headers, `order` picks
//! what to write and where, `emit` writes it. That needs a seekable input (a spooled
//! layer) and keeps memory bounded by the number of entries, not by their bytes.
//!
//! ```text
//! blob = member("landmark header") member("landmark payload, next headers")
//!        { member(chunk of a file [, padding, headers up to the next payload]) }
//!        member(TOC tar header, TOC JSON, padding, end of archive) footer
//! ```

mod emit;
mod entry;
mod members;
mod order;
mod scan;
mod toc;

use std::io::{self, Read, Seek, Write};

use crate::codec::deflate;
use crate::types::Digest;
use crate::{Error, Result};

/// Name of the TOC's tar entry, always the last.
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

/// Default of [`Options::level`]: deflate's usual compromise.
pub const LEVEL_DEFAULT: u32 = 6;

/// Most compression threads; more would only hold more memory.
const WORKERS_MAX: usize = 16;

/// How to write a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Largest chunk in bytes before compression, 4 KiB to 64 MiB.
    pub chunk_bytes: u32,
    /// Deflate level, 1 to 9.
    pub level: u32,
    /// Compression threads, at least 1. The output does not depend on it.
    pub workers: usize,
    /// Paths in a layer that go first, in this order, with their parent directories and
    /// hard link targets. A leading `/` or `./` means nothing.
    pub prioritized: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            chunk_bytes: CHUNK_BYTES_DEFAULT,
            level: LEVEL_DEFAULT,
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            prioritized: Vec::new(),
        }
    }
}

impl Options {
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
        if !(1..=deflate::LEVEL_MAX).contains(&self.level) {
            return Err(Error::limit(
                "compression level",
                format!("{}; use 1 to {}", self.level, deflate::LEVEL_MAX),
            ));
        }
        Ok(())
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Digest of the blob.
    pub blob_digest: Digest,
    /// Size of the blob in bytes.
    pub blob_size: u64,
    /// Digest of everything the blob decompresses to, the TOC's tar entry included.
    pub diff_id: Digest,
    /// Digest of the TOC's JSON.
    pub toc_digest: Digest,
    /// Length of what the blob decompresses to in bytes.
    pub uncompressed_size: u64,
    /// Length of the TOC's JSON in bytes.
    pub toc_size: u64,
    /// The prioritised paths that this layer does not have, in the caller's spelling.
    pub missing: Vec<String>,
}

/// Converts the uncompressed tar `input`, read from its start, to an eStargz blob.
///
/// `what` names the input in errors. Blocks; on an error `output` holds a useless prefix.
pub fn write_estargz(
    what: &str,
    input: &mut (impl Read + Seek),
    output: &mut impl Write,
    options: &Options,
) -> Result<Written> {
    options.check()?;
    write(input, output, options).map_err(|fault| fault.into_error(what))
}

fn write(
    input: &mut (impl Read + Seek),
    output: &mut impl Write,
    options: &Options,
) -> Result<Written, Fault> {
    let entries = scan::scan(input)?;
    let plan = order::order(&entries, &options.prioritized)?;
    emit::emit(&entries, plan, input, output, options)
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
