//! What a layer holds and how to fetch each piece of it alone.
//!
//! Invariant: **format knowledge ends here**. Every layer format becomes one
//! [`LayerIndex`]; nothing outside this module knows what a TOC, a footer or a tar header
//! is. A `LayerIndex` made by [`LayerIndex::new`] keeps every rule written at its fields,
//! and every parser of this module makes it that way. Whiteouts are still plain file
//! entries named `.wh.*` here; the inode tree gives them their meaning. Nothing here reads
//! the network or writes a file.
//!
//! Layout of the data file: payloads of the non-empty regular files in the order of the
//! file table, each starting at the next multiple of [`DATA_ALIGN`], with nothing else
//! between or after them. A file's chunks follow one another without gaps.

mod attributes;
pub mod details;
pub mod estargz;
pub mod ingest;
mod limits;
mod path;
mod relink;
pub mod seams;
pub mod shape;
pub mod soci;
mod tables;
pub mod tar;
mod time;
mod validate;
pub mod wire;
pub mod write;
pub mod zstdchunked;

pub use limits::{CHUNK_LEN_MAX, DATA_LEN_MAX, ENTRIES_MAX, METADATA_LEN_MAX, PATH_LEN_MAX};

use crate::Result;
use crate::types::{ByteRange, Digest};

/// Payloads of files start at multiples of this in a layer's data file, so that a page
/// of a file is a page of the data file.
pub const DATA_ALIGN: u64 = 4096;

/// How a layer's blob is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerFormat {
    /// eStargz: gzip members, TOC, footer; every chunk can be fetched alone.
    Estargz,
    /// Uncompressed tar.
    Tar,
    /// Plain gzip.
    Gzip,
    /// Plain zstd.
    Zstd,
    /// zstd:chunked: zstd frames, TOC; every chunk can be fetched alone.
    ZstdChunked,
}

/// Position of a chunk in [`LayerIndex::chunks`].
pub type ChunkId = u32;

/// File table and chunk table of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerIndex {
    /// Digest of the blob as the registry serves it.
    pub blob_digest: Digest,
    /// Size of that blob in bytes.
    pub blob_size: u64,
    /// Its layout.
    pub format: LayerFormat,
    /// Files in the order of the tar; parents may come after children or be absent;
    /// of two entries with one path the last counts.
    pub files: Vec<FileEntry>,
    /// Chunks in the order of the data file: each starts where its predecessor's last
    /// byte, rounded up to a file's start, ends. They cover every byte of every file
    /// and overlap nowhere.
    pub chunks: Vec<Chunk>,
    /// Places of a gzip, eStargz or tar blob where decoding can begin, ascending; empty for
    /// other formats.
    pub spans: Vec<Span>,
    /// Length of the data file in bytes: where the last payload ends.
    pub data_len: u64,
}

/// What a [`LayerIndex`] says of the blob as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerBlob {
    /// Digest of the blob as the registry serves it.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its layout.
    pub format: LayerFormat,
}

impl LayerIndex {
    /// Checks every rule of the tables and of their parts; the length of the data file
    /// follows from them. Errors name the file or chunk that breaks a rule.
    pub fn new(blob: LayerBlob, files: Vec<FileEntry>, chunks: Vec<Chunk>) -> Result<Self> {
        Self::with_spans(blob, files, chunks, Vec::new())
    }

    /// [`Self::new`] for a gzip blob that can be entered at `spans`.
    pub fn with_spans(
        blob: LayerBlob,
        files: Vec<FileEntry>,
        chunks: Vec<Chunk>,
        mut spans: Vec<Span>,
    ) -> Result<Self> {
        let data_len = validate::tables(&blob, &files, &chunks)?;
        validate::spans(&blob, &chunks, &mut spans)?;
        Ok(Self {
            blob_digest: blob.digest,
            blob_size: blob.size,
            format: blob.format,
            files,
            chunks,
            spans,
            data_len,
        })
    }

    /// How many digests the details of `span` begin with: one for each of its chunks, or
    /// one for all of the span.
    pub fn digests_of(&self, span: &Span) -> u32 {
        let first = usize::try_from(span.first_chunk).ok();
        let first = first.and_then(|at| self.chunks.get(at));
        match first.map(|chunk| chunk.encoding) {
            Some(Encoding::WholeSpan { .. } | Encoding::WholeMember { .. }) => 1,
            _ => span.chunk_count,
        }
    }

    /// Whether some of its spans are verified whole, so that digests of their chunks become
    /// known only when they are decoded.
    pub fn has_whole_spans(&self) -> bool {
        let whole = |chunk: &Chunk| {
            matches!(
                chunk.encoding,
                Encoding::WholeSpan { .. } | Encoding::WholeMember { .. }
            )
        };
        self.chunks.iter().any(whole)
    }

    /// Whether nothing but somebody's word says what its spans decode to: a zTOC has digests of
    /// encoded bytes only.
    pub fn is_by_ztoc(&self) -> bool {
        let whole = |chunk: &Chunk| matches!(chunk.encoding, Encoding::WholeSpan { .. });
        self.chunks.iter().any(whole)
    }

    /// Whether some of its chunks are pieces of members that are verified whole.
    pub fn has_whole_members(&self) -> bool {
        let whole = |chunk: &Chunk| matches!(chunk.encoding, Encoding::WholeMember { .. });
        self.chunks.iter().any(whole)
    }

    /// The chunks that chunk `id` is verified with, itself among them: all of its member
    /// where that is verified whole, else only itself.
    pub(crate) fn verified_with(&self, id: ChunkId) -> std::ops::Range<ChunkId> {
        let at = |number: u32| usize::try_from(number).ok();
        let chunk = at(id).and_then(|at| self.chunks.get(at));
        let span = match chunk.map(|chunk| chunk.encoding) {
            Some(Encoding::WholeMember { span, .. }) => at(span).and_then(|at| self.spans.get(at)),
            _ => None,
        };
        match span {
            Some(span) => span.first_chunk..span.first_chunk.saturating_add(span.chunk_count),
            None => id..id.saturating_add(1),
        }
    }

    /// Decoded bytes that are held to verify chunk `id`; 0 if there is none.
    pub(crate) fn held_for(&self, id: ChunkId) -> u64 {
        let ids = self.verified_with(id);
        let chunk = |id: ChunkId| self.chunks.get(usize::try_from(id).ok()?);
        let last = ids.end.checked_sub(1).and_then(chunk);
        match (chunk(ids.start), last) {
            (Some(first), Some(last)) => {
                let end = last.data_offset.saturating_add(last.len.into());
                end.saturating_sub(first.data_offset)
            }
            _ => 0,
        }
    }
}

/// A place of a blob where decoding can begin: in gzip between two deflate blocks, in a tar
/// anywhere.
///
/// What decoding and verifying it takes, its *details*, is long and only needed when it is
/// touched: it stands behind the tables ([`details`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its first byte in the blob.
    pub start: u64,
    /// How many bits of that byte, its highest, belong to it; 0 for the whole byte.
    pub bits: u8,
    /// Its first chunk.
    pub first_chunk: ChunkId,
    /// Number of its chunks, which follow one another.
    pub chunk_count: u32,
    /// Where its details are, from the first details on.
    pub details: ByteRange,
    /// SHA-256 of its details.
    pub details_digest: [u8; 32],
}

/// The next multiple of [`DATA_ALIGN`] at or after `offset`, `None` past `u64::MAX`.
pub(crate) fn align_up(offset: u64) -> Option<u64> {
    offset.checked_next_multiple_of(DATA_ALIGN)
}

/// The smallest piece that can be fetched, decoded and verified alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Where its encoded bytes are and how to decode them.
    pub encoding: Encoding,
    /// Where its first byte goes in the data file.
    pub data_offset: u64,
    /// Decoded length in bytes, never 0.
    pub len: u32,
    /// SHA-256 of the decoded bytes; `None` where the details of its span have it, or vouch
    /// for all bytes of the span.
    pub chunk_digest: Option<[u8; 32]>,
}

impl Chunk {
    /// Whether its bytes can be fetched again without streaming the whole blob.
    pub fn is_refetchable(&self) -> bool {
        !matches!(self.encoding, Encoding::Stream)
    }
}

/// How to get a chunk's bytes out of the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Only by streaming the whole blob.
    Stream,
    /// They are `blob` itself, as long as the chunk.
    Stored {
        /// The chunk's bytes.
        blob: ByteRange,
    },
    /// Inside the gzip member that fills `blob`: skip `skip` decoded bytes, take `len`.
    GzipMember {
        /// Encoded bytes of the member (or of the members up to the next chunk's).
        blob: ByteRange,
        /// Decoded bytes before the chunk in its member.
        skip: u64,
    },
    /// Inside the gzip stream from the start of a span on: skip `skip` decoded bytes, take
    /// `len`.
    GzipSpan {
        /// Encoded bytes from the span's start as far as the chunk needs them.
        blob: ByteRange,
        /// Decoded bytes before the chunk in its span.
        skip: u64,
        /// Position in [`LayerIndex::spans`].
        span: u32,
    },
    /// Inside a span that fills `blob` and is verified whole, as it is encoded: skip `skip`
    /// decoded bytes, take `len`. The blob's layout says how it is encoded.
    WholeSpan {
        /// All encoded bytes of the span. Neighbours may share a byte.
        blob: ByteRange,
        /// Decoded bytes before the chunk in its span.
        skip: u64,
        /// Position in [`LayerIndex::spans`].
        span: u32,
    },
    /// A piece of a member that fills `blob` and is verified whole, as it is decoded: skip
    /// `skip` decoded bytes, take `len`. All pieces of the member together have one SHA-256.
    WholeMember {
        /// Encoded bytes of the member.
        blob: ByteRange,
        /// Decoded bytes before the piece in its member.
        skip: u64,
        /// Position in [`LayerIndex::spans`] of the member.
        span: u32,
    },
    /// Inside the zstd frames that fill `blob`: skip `skip` decoded bytes, take `len`.
    ZstdFrame {
        /// Encoded bytes of the frame (or of the frames up to the next chunk's).
        blob: ByteRange,
        /// Decoded bytes before the chunk in its frame.
        skip: u64,
    },
}

impl Encoding {
    /// The encoded bytes that reading the chunk takes; `None` where it cannot be fetched
    /// alone. Chunks whose encoded bytes begin at one place are decoded together.
    pub fn blob(&self) -> Option<ByteRange> {
        match self {
            Self::Stream => None,
            Self::Stored { blob }
            | Self::GzipMember { blob, .. }
            | Self::GzipSpan { blob, .. }
            | Self::WholeSpan { blob, .. }
            | Self::WholeMember { blob, .. }
            | Self::ZstdFrame { blob, .. } => Some(*blob),
        }
    }

    /// Decoded bytes before the chunk in what [`Self::blob`] decodes to.
    pub fn skip(&self) -> u64 {
        match self {
            Self::Stream | Self::Stored { .. } => 0,
            Self::GzipMember { skip, .. }
            | Self::GzipSpan { skip, .. }
            | Self::WholeSpan { skip, .. }
            | Self::WholeMember { skip, .. }
            | Self::ZstdFrame { skip, .. } => *skip,
        }
    }
}

/// One entry of the file table.
///
/// A hard link names an entry of the same layer that is, perhaps through other hard
/// links, something else than a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Path in the layer: relative, `/`-separated, no empty, `.` or `..` part, no NUL;
    /// empty only for the root directory itself. Not necessarily UTF-8.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, `0o7777`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since 1970 (may be negative) and nanoseconds.
    pub mtime: Timestamp,
    /// Extended attributes, name and value, names unique.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timestamp {
    /// Seconds since 1970-01-01, negative before.
    pub secs: i64,
    /// Nanoseconds, under 1,000,000,000.
    pub nanos: u32,
}

/// Kind of a file and what only that kind has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A regular file: `size` bytes at `data_offset` (a multiple of [`DATA_ALIGN`]) of the data file.
    Regular {
        /// Length in bytes.
        size: u64,
        /// Where it starts in the data file; 0 for an empty file.
        data_offset: u64,
    },
    /// A symbolic link to `target`, 1 to 4095 bytes, any but NUL.
    Symlink {
        /// Where it points, uninterpreted.
        target: Vec<u8>,
    },
    /// Another name of the file at `target`.
    Hardlink {
        /// Path in the same layer, in the form of [`FileEntry::path`]. Symbolic links above it
        /// are followed.
        target: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}
