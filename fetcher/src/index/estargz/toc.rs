//! The TOC's JSON, one entry at a time, into the tables: of eStargz and of zstd:chunked,
//! which writes the same entries with a few more fields.
//!
//! Invariant: entries are never all held at once; what the limits refuse is refused when
//! it is met. Chunks of a file follow it directly, in order, and cover it exactly once.
//! Names that the format uses itself never reach the file table.

mod document;

use std::borrow::Cow;

use base64::Engine as _;
use serde::de::DeserializeSeed;

use self::document::{Document, Entry};
use super::TocLayer;
use crate::codec::ChunkHasher;
use crate::index::attributes::{Attributes, short};
use crate::index::limits::{CHUNK_LEN_MAX, SKIP_MAX};
use crate::index::tables::Tables;
use crate::index::{Encoding, FileEntry, FileKind, LayerBlob, LayerFormat, path};
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};

/// Length of the pieces that a hole is cut into where the TOC's own digest is of no use.
const HOLE_PIECE_LEN: u32 = 4 << 20;
/// Bytes of holes that are hashed for one TOC, apart from whole pieces.
const HOLE_HASHED_MAX: u64 = 1 << 30;

/// Reads verified TOC JSON of `blob`, whose chunks all end at or before `toc_offset`.
pub(in crate::index) fn parse(blob: &LayerBlob, toc_offset: u64, json: &[u8]) -> Result<TocLayer> {
    let mut reader = Reader::new(blob, toc_offset);
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let outcome = Document(&mut reader)
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end());
    if let Some(refused) = reader.refused.take() {
        return Err(refused);
    }
    outcome.map_err(|e| Error::malformed(reader.tables.what(), format!("its JSON: {e}")))?;
    reader.finish(blob)
}

/// The regular file whose chunks are being read.
struct Current {
    path: Vec<u8>,
    size: u64,
    /// Bytes that chunks cover so far.
    covered: u64,
    /// A file of the format itself: read past.
    hidden: bool,
}

struct Reader {
    tables: Tables,
    format: LayerFormat,
    toc_offset: u64,
    current: Option<Current>,
    /// Where members or frames with data start, or where the last one of a file ends.
    starts: Vec<u64>,
    holes: Holes,
    prefetch: Option<ByteRange>,
    /// The error of ours that made the JSON parser stop.
    refused: Option<Error>,
}

impl Reader {
    fn new(blob: &LayerBlob, toc_offset: u64) -> Self {
        Self {
            tables: Tables::new(format!("TOC of layer {}", blob.digest)),
            format: blob.format,
            toc_offset,
            current: None,
            starts: Vec::new(),
            holes: Holes::default(),
            prefetch: None,
            refused: None,
        }
    }

    fn entry(&mut self, entry: &Entry<'_>) -> Result<()> {
        let name = entry.name.as_bytes();
        let path = path::normalize(name).map_err(|rule| self.tables.malformed(name, rule))?;
        if entry.kind == "chunk" {
            return self.further_chunk(entry, &path);
        }
        self.end_file()?;
        if path::is_format_file(&path) {
            return self.format_file(entry, path);
        }
        let file = self.file(entry, path)?;
        let regular = match file.kind {
            FileKind::Regular { size, .. } if size > 0 => Some(Current {
                path: file.path.clone(),
                size,
                covered: 0,
                hidden: false,
            }),
            _ => None,
        };
        self.tables.file(file)?;
        match regular {
            Some(current) => self.chunk(entry, current),
            None => Ok(()),
        }
    }

    fn file(&self, entry: &Entry<'_>, path: Vec<u8>) -> Result<FileEntry> {
        let xattrs = self.xattrs(entry, &path)?;
        let attributes = Attributes {
            kind: &entry.kind,
            size: entry.size,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: &entry.modtime,
            link: entry.link_name.as_bytes(),
            dev_major: entry.dev_major,
            dev_minor: entry.dev_minor,
        };
        let file = attributes.entry();
        let mut file = file.map_err(|rule| self.tables.malformed(&path, rule))?;
        (file.path, file.xattrs) = (path, xattrs);
        Ok(file)
    }

    fn xattrs(&self, entry: &Entry<'_>, path: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let Some(xattrs) = &entry.xattrs else {
            return Ok(Vec::new());
        };
        let engine = &base64::engine::general_purpose::STANDARD;
        let decode = |(name, value): &(Cow<'_, str>, Cow<'_, str>)| {
            let value = engine.decode(value.as_bytes()).map_err(|e| {
                let rule = format!(
                    "its xattr {} is not base64: {e}",
                    path::show(name.as_bytes())
                );
                self.tables.malformed(path, rule)
            })?;
            Ok((name.as_bytes().to_vec(), value))
        };
        xattrs.0.iter().map(decode).collect()
    }

    fn format_file(&mut self, entry: &Entry<'_>, path: Vec<u8>) -> Result<()> {
        let offset = self.unsigned(&path, "offset", entry.offset)?;
        if offset > self.toc_offset {
            return Err(self.outside(&path, offset));
        }
        if path == b".prefetch.landmark" {
            self.prefetch = ByteRange::new(0, offset).filter(|range| !range.is_empty());
        }
        self.starts.push(offset);
        self.current = Some(Current {
            path,
            size: 0,
            covered: 0,
            hidden: true,
        });
        Ok(())
    }

    fn further_chunk(&mut self, entry: &Entry<'_>, path: &[u8]) -> Result<()> {
        let Some(current) = self.current.take_if(|current| current.path == path) else {
            return Err(self
                .tables
                .malformed(path, "a chunk of it comes where its file does not precede"));
        };
        if current.hidden {
            self.starts
                .push(self.unsigned(path, "offset", entry.offset)?);
            self.current = Some(current);
            return Ok(());
        }
        self.chunk(entry, current)
    }

    /// Takes the chunk that `entry` describes; it must continue where the last one ended.
    fn chunk(&mut self, entry: &Entry<'_>, mut current: Current) -> Result<()> {
        let path = &current.path;
        let chunk_offset = self.unsigned(path, "chunkOffset", entry.chunk_offset)?;
        if chunk_offset != current.covered {
            let how = if chunk_offset < current.covered {
                "overlaps what precedes it"
            } else {
                "leaves a gap"
            };
            let rule = format!(
                "its chunk at {chunk_offset} {how}, which ends at {}",
                current.covered
            );
            return Err(self.tables.malformed(path, rule));
        }
        let rest = current.size - current.covered;
        let len = match self.unsigned(path, "chunkSize", entry.chunk_size)? {
            0 => rest,
            len => len,
        };
        if len > rest || len == 0 {
            let rule = format!(
                "its chunk of {len} bytes at {chunk_offset} exceeds its size of {}",
                current.size
            );
            return Err(self.tables.malformed(path, rule));
        }
        let encoding = self.member(entry, path)?;
        current.covered += len;
        if self.format == LayerFormat::ZstdChunked {
            self.end_of_file(entry, path)?;
            if self.is_hole(entry, path)?
                && (len > u64::from(CHUNK_LEN_MAX) || entry.chunk_digest.is_empty())
            {
                self.hole(&encoding, len, path)?;
                self.current = Some(current);
                return Ok(());
            }
        }
        let digest = self.chunk_digest(entry, &current, len)?;
        let len = u32::try_from(len)
            .ok()
            .filter(|len| *len <= CHUNK_LEN_MAX)
            .ok_or_else(|| {
                let path = &current.path;
                self.too_large(
                    path,
                    &format!("a chunk of {len} bytes, of at most {CHUNK_LEN_MAX}"),
                )
            })?;
        self.tables.chunk(encoding, len, digest);
        self.current = Some(current);
        Ok(())
    }

    /// Whether the chunk is a hole. Its frame decodes to its zeros like any other.
    fn is_hole(&self, entry: &Entry<'_>, path: &[u8]) -> Result<bool> {
        match &*entry.chunk_type {
            "" => Ok(false),
            "zeros" => Ok(true),
            other => {
                let rule = format!("its chunkType is {:?}", short(other));
                Err(self.tables.malformed(path, rule))
            }
        }
    }

    /// Takes a hole whose digest is missing or covers too much to be decoded at once. Its
    /// bytes are known, so each piece has a digest of ours; and as any part of the frame
    /// is as good as another, each is read from its start.
    fn hole(&mut self, encoding: &Encoding, len: u64, path: &[u8]) -> Result<()> {
        let mut left = len;
        while left > 0 {
            let piece = u32::try_from(left).map_or(HOLE_PIECE_LEN, |l| l.min(HOLE_PIECE_LEN));
            let Some(digest) = self.holes.digest(piece) else {
                return Err(self.too_large(path, "holes without digests beyond any use"));
            };
            self.tables.chunk(*encoding, piece, digest);
            left -= u64::from(piece);
        }
        Ok(())
    }

    /// Notes where the file's last frame ends, so that no more than it is fetched.
    fn end_of_file(&mut self, entry: &Entry<'_>, path: &[u8]) -> Result<()> {
        match self.unsigned(path, "endOffset", entry.end_offset)? {
            0 => Ok(()),
            end if end > self.toc_offset => Err(self.outside(path, end)),
            end => {
                self.starts.push(end);
                Ok(())
            }
        }
    }

    /// The chunk's member or frame, for now up to the TOC: its end is the next start.
    fn member(&mut self, entry: &Entry<'_>, path: &[u8]) -> Result<Encoding> {
        let offset = self.unsigned(path, "offset", entry.offset)?;
        let skip = self.unsigned(path, "innerOffset", entry.inner_offset)?;
        let Some(blob) = ByteRange::new(offset, self.toc_offset).filter(|range| !range.is_empty())
        else {
            return Err(self.outside(path, offset));
        };
        if skip > SKIP_MAX {
            return Err(self.too_large(
                path,
                &format!("a chunk {skip} bytes into its member, of at most {SKIP_MAX}"),
            ));
        }
        if self.starts.last() != Some(&offset) {
            self.starts.push(offset);
        }
        Ok(match self.format {
            LayerFormat::ZstdChunked => Encoding::ZstdFrame { blob, skip },
            LayerFormat::Estargz | LayerFormat::Tar | LayerFormat::Gzip | LayerFormat::Zstd => {
                Encoding::GzipMember { blob, skip }
            }
        })
    }

    /// The digest of the chunk. zstd:chunked gives a file of one chunk only its own.
    fn chunk_digest(&self, entry: &Entry<'_>, file: &Current, len: u64) -> Result<[u8; 32]> {
        let path = &file.path;
        let whole = self.format == LayerFormat::ZstdChunked && len == file.size;
        let (field, text) = if entry.chunk_digest.is_empty() && whole {
            ("digest", &entry.digest)
        } else {
            ("chunkDigest", &entry.chunk_digest)
        };
        if text.is_empty() {
            let rule = format!("a chunk of it has no {field}, so it cannot be verified");
            return Err(self.tables.malformed(path, rule));
        }
        match Digest::parse(text) {
            Ok(Digest::Sha256(digest)) => Ok(digest),
            Ok(Digest::Sha512(_)) => Err(Error::Unsupported {
                what: format!("{}, file {}", self.tables.what(), path::show(path)),
                detail: format!("its {field} is not sha256; the layer must be pulled whole"),
            }),
            Err(e) => Err(self.tables.malformed(path, format!("its {field}: {e}"))),
        }
    }

    /// Checks that the chunks of the file before this entry cover it.
    fn end_file(&mut self) -> Result<()> {
        match self.current.take() {
            Some(file) if !file.hidden && file.covered != file.size => {
                let rule = format!("its chunks end at byte {} of {}", file.covered, file.size);
                Err(self.tables.malformed(&file.path, rule))
            }
            _ => Ok(()),
        }
    }

    fn finish(mut self, blob: &LayerBlob) -> Result<TocLayer> {
        self.end_file()?;
        self.starts.sort_unstable();
        self.starts.dedup();
        for chunk in self.tables.chunks_mut() {
            if let Encoding::GzipMember { blob, .. } | Encoding::ZstdFrame { blob, .. } =
                &mut chunk.encoding
            {
                let next = self.starts.partition_point(|start| *start <= blob.start());
                let end = self
                    .starts
                    .get(next)
                    .map_or(blob.end(), |next| blob.end().min(*next));
                if let Some(member) = ByteRange::new(blob.start(), end) {
                    *blob = member;
                }
            }
        }
        Ok(TocLayer {
            index: self.tables.finish(*blob)?,
            prefetch: self.prefetch,
        })
    }

    fn unsigned(&self, path: &[u8], field: &str, value: i64) -> Result<u64> {
        u64::try_from(value).map_err(|_| {
            self.tables
                .malformed(path, format!("its {field} is {value}"))
        })
    }

    fn outside(&self, path: &[u8], offset: u64) -> Error {
        let rule = format!(
            "its offset {offset} is not before the TOC at {}",
            self.toc_offset
        );
        self.tables.malformed(path, rule)
    }

    fn too_large(&self, path: &[u8], detail: &str) -> Error {
        Error::Unsupported {
            what: format!("{}, file {}", self.tables.what(), path::show(path)),
            detail: format!("it has {detail}; the layer must be pulled whole"),
        }
    }
}

/// Digests of runs of zeros.
#[derive(Default)]
struct Holes {
    whole_piece: Option<[u8; 32]>,
    hashed: u64,
}

impl Holes {
    /// SHA-256 of `len` zeros; `None` once a TOC has asked for too many.
    fn digest(&mut self, len: u32) -> Option<[u8; 32]> {
        if len == HOLE_PIECE_LEN {
            return Some(*self.whole_piece.get_or_insert_with(|| zeros(len)));
        }
        self.hashed += u64::from(len);
        (self.hashed <= HOLE_HASHED_MAX).then(|| zeros(len))
    }
}

fn zeros(len: u32) -> [u8; 32] {
    let block = [0; 4096];
    let mut hasher = ChunkHasher::new();
    let mut left = usize::try_from(len).unwrap_or_default();
    while left > 0 {
        let take = left.min(block.len());
        hasher.update(block.get(..take).unwrap_or_default());
        left -= take;
    }
    hasher.finish()
}
