//! The binary form of a [`LayerIndex`]: what a store keeps beside the data file, and what
//! registries carry.
//!
//! ```text
//!  0  magic "LAZINDEX"                                8
//!  8  version, 3                                      u32
//! 12  CRC-32 (IEEE) of the core as it stands here     u32
//! 16  length of the core in bytes                     u64
//! 24  length of the body it unpacks to                u64
//! 32  length of the details in bytes                  u64
//! 40  core: the body as one zstd frame
//!     details: those of each span, one after another, and nothing after them
//!
//! body:   algorithm (1 sha256, 2 sha512) u8 | blob_digest 32 or 64 | blob_size v
//!         | format (1 eStargz, 2 tar, 3 gzip, 4 zstd, 5 zstd:chunked) u8
//!         | spans v | span ... | files v | file ...
//! span:   start minus that of the span before v | bits u8 | length of its details v | SHA-256 32
//! file:   path shared with the file before v | rest of the path b | mode v | uid v | gid v
//!         | seconds minus those of the file before z | nanoseconds v
//!         | xattrs v | (name b | value b) ... | kind u8 | of the kind:
//!           1 directory, 7 fifo: -        2 regular: size v | chunk ... until size is covered
//!           3 symlink, 4 hard link: target b       5 char, 6 block device: major v | minor v
//! chunk:  len v | encoding u8 | of the encoding:
//!           0 stream: digest 32
//!           1 stored: blob start z | digest 32
//!           2 gzip member, 3 zstd frame: blob start z | blob len v | skip v | digest 32
//!           4 gzip span: span minus that of the chunk before v | blob end minus that of the
//!             chunk before, or minus the span's start for its first v | skip v
//!           5 span verified whole, 6 piece of a member verified whole: as 4
//! ```
//!
//! u32 and u64 are little endian; v is LEB128, z the same of a zigzag value, b a v length
//! and as many bytes. A blob start is stored as the difference from that of the chunk
//! before. Places in the data file are not stored: they follow. A reader of the core alone
//! needs the first 40 bytes and as many as they say; details are read span by span
//! ([`super::details`]), each with the SHA-256 that the core has for it.
//!
//! Invariant: [`decode`] accepts only what [`encode`] writes of a valid index, and gives
//! exactly that index back. Neither touches a file.

pub(super) mod reader;

use super::details::DETAILS_TOTAL_MAX;
use super::limits::XATTRS_MAX;
use super::tables::Tables;
use super::{Encoding, FileEntry, FileKind, LayerBlob, LayerFormat, LayerIndex, Span, Timestamp};
use crate::codec;
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};
use reader::Reader;

const MAGIC: &[u8; 8] = b"LAZINDEX";
const VERSION: u32 = 3;
/// Bytes before the core.
pub const HEADER_LEN: usize = 40;
/// Largest body that is written or read: tables at their limits stay below.
const BODY_LEN_MAX: u64 = 1 << 30;
/// Bytes that no file of a body can do without.
const FILE_LEN_MIN: usize = 9;
/// Bytes that no span of a body can do without.
const SPAN_LEN_MIN: usize = 35;

/// What the first bytes of an index say of the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    crc: u32,
    core_len: u64,
    body_len: u64,
    details_len: u64,
}

impl Header {
    /// Reads the first [`HEADER_LEN`] bytes of an index.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        if reader.array() != Some(*MAGIC) {
            return Err(malformed("it does not begin with LAZINDEX"));
        }
        match reader.array().map(u32::from_le_bytes) {
            Some(VERSION) => {}
            Some(version) => {
                return Err(Error::Unsupported {
                    what: "layer index".to_owned(),
                    detail: format!("it has version {version}, this build reads {VERSION}"),
                });
            }
            None => return Err(malformed("it is cut off")),
        }
        let crc = reader.array().map(u32::from_le_bytes);
        let mut len = || reader.array().map(u64::from_le_bytes);
        let (Some(crc), Some(core_len), Some(body_len), Some(details_len)) =
            (crc, len(), len(), len())
        else {
            return Err(malformed("it is cut off"));
        };
        for (len, max) in [
            (core_len, BODY_LEN_MAX),
            (body_len, BODY_LEN_MAX),
            (details_len, DETAILS_TOTAL_MAX),
        ] {
            if len > max {
                let detail = format!("a part of it has {len} bytes of at most {max}");
                return Err(Error::limit("layer index", detail));
            }
        }
        Ok(Self {
            crc,
            core_len,
            body_len,
            details_len,
        })
    }

    /// Where the core ends and the details begin.
    pub fn core_end(&self) -> u64 {
        self.core_len.saturating_add(HEADER_LEN as u64)
    }

    /// Length of all of it.
    pub fn total_len(&self) -> u64 {
        self.core_end().saturating_add(self.details_len)
    }
}

/// The binary form of a valid index and the details of its spans.
pub fn encode(index: &LayerIndex, details: &[u8]) -> Result<Vec<u8>> {
    let mut out = encode_head(index, details.len() as u64)?;
    out.extend_from_slice(details);
    Ok(out)
}

/// What [`encode`] writes before the details, of which there are so many bytes.
pub fn encode_head(index: &LayerIndex, details_len: u64) -> Result<Vec<u8>> {
    let body = encode_body(index);
    let core = codec::Packer::new()?.pack(&body)?;
    let mut out = Vec::with_capacity(HEADER_LEN + core.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(&core).to_le_bytes());
    for len in [core.len() as u64, body.len() as u64, details_len] {
        out.extend_from_slice(&len.to_le_bytes());
    }
    out.extend_from_slice(&core);
    Ok(out)
}

fn encode_body(index: &LayerIndex) -> Vec<u8> {
    let mut body = Writer(Vec::with_capacity(
        index.files.len() * 40 + index.chunks.len() * 44 + 128,
    ));
    body.byte(match index.blob_digest {
        Digest::Sha256(_) => 1,
        Digest::Sha512(_) => 2,
    });
    body.0.extend_from_slice(index.blob_digest.as_bytes());
    body.varint(index.blob_size);
    body.byte(match index.format {
        LayerFormat::Estargz => 1,
        LayerFormat::Tar => 2,
        LayerFormat::Gzip => 3,
        LayerFormat::Zstd => 4,
        LayerFormat::ZstdChunked => 5,
    });
    body.varint(index.spans.len() as u64);
    let mut start = 0;
    for span in &index.spans {
        body.varint(span.start.saturating_sub(start));
        start = span.start;
        body.byte(span.bits);
        body.varint(span.details.len());
        body.0.extend_from_slice(&span.details_digest);
    }
    body.varint(index.files.len() as u64);
    let (mut path, mut secs) = (&[][..], 0);
    let mut places = Places::default();
    let mut chunks = index.chunks.iter();
    for file in &index.files {
        body.file(file, path, secs);
        (path, secs) = (&file.path, file.mtime.secs);
        let FileKind::Regular { size, .. } = file.kind else {
            continue;
        };
        let mut left = size;
        while let Some(chunk) = (left > 0).then(|| chunks.next()).flatten() {
            left = left.saturating_sub(u64::from(chunk.len));
            body.varint(u64::from(chunk.len));
            body.encoding(&chunk.encoding, &mut places);
            if let Some(digest) = &chunk.chunk_digest {
                body.0.extend_from_slice(digest);
            }
        }
    }
    body.0
}

/// Where the chunk before was.
#[derive(Default)]
struct Places {
    blob_start: u64,
    span: u32,
    /// End of the last chunk of `span`, if it had one.
    span_end: Option<u64>,
}

/// Reads a whole index back. `bytes` come from a disk or another node and may be anything.
pub fn decode(bytes: &[u8]) -> Result<LayerIndex> {
    let header = Header::parse(bytes)?;
    if header.total_len() != bytes.len() as u64 {
        return Err(malformed("it does not have the length it says"));
    }
    let end = usize::try_from(header.core_end()).unwrap_or(usize::MAX);
    decode_core(&header, bytes.get(HEADER_LEN..end).unwrap_or_default())
}

/// Reads the part between header and details.
pub fn decode_core(header: &Header, core: &[u8]) -> Result<LayerIndex> {
    let body = body(header, core)?;
    let mut reader = Reader::new(&body);
    let blob =
        blob(&mut reader).ok_or_else(|| malformed("its description of the blob is damaged"))?;
    let what = format!("index of layer {}", blob.digest);
    let spans =
        spans(&mut reader).ok_or_else(|| Error::malformed(&*what, "its spans are damaged"))?;
    let details_len = spans.last().map_or(0, |span| span.details.end());
    if details_len != header.details_len {
        return Err(Error::malformed(
            what,
            "its details are not as long as its spans say",
        ));
    }
    let count = reader
        .varint()
        .and_then(|count| usize::try_from(count).ok())
        .filter(|count| *count <= reader.left() / FILE_LEN_MIN)
        .ok_or_else(|| Error::malformed(&*what, "it has fewer files than it says"))?;
    let mut tables = Tables::new(what.clone());
    tables.reserve(count);
    let (mut path, mut secs, mut places) = (Vec::new(), 0, Places::default());
    for number in 0..count {
        let damaged = || Error::malformed(&*what, format!("file {number} is damaged"));
        let file = file(&mut reader, &path, secs).ok_or_else(damaged)?;
        path.clone_from(&file.path);
        secs = file.mtime.secs;
        let size = match file.kind {
            FileKind::Regular { size, .. } => size,
            _ => 0,
        };
        tables.file(file)?;
        let mut left = size;
        while left > 0 {
            let chunk = chunk(&mut reader, &spans, &mut places);
            let (encoding, len, digest) = chunk.ok_or_else(damaged)?;
            left = left
                .checked_sub(u64::from(len))
                .filter(|_| len > 0)
                .ok_or_else(damaged)?;
            tables.chunk_of_span(encoding, len, digest);
        }
    }
    if reader.left() > 0 {
        return Err(Error::malformed(what, "something follows the last file"));
    }
    tables.finish_with(blob, spans)
}

/// Checks the core; returns the body.
fn body(header: &Header, core: &[u8]) -> Result<Vec<u8>> {
    if header.core_len != core.len() as u64 {
        return Err(malformed("it does not have the length it says"));
    }
    if header.crc != crc32fast::hash(core) {
        return Err(malformed("its checksum does not match"));
    }
    let len = usize::try_from(header.body_len).unwrap_or(usize::MAX);
    let body = codec::unpacked(core, len)?;
    if body.len() != len {
        return Err(malformed("its body does not have the length it says"));
    }
    Ok(body)
}

fn spans(reader: &mut Reader<'_>) -> Option<Vec<Span>> {
    let count = usize::try_from(reader.varint()?).ok()?;
    if count > reader.left() / SPAN_LEN_MIN {
        return None;
    }
    let mut spans = Vec::with_capacity(count);
    let (mut start, mut details) = (0_u64, 0_u64);
    for _ in 0..count {
        start = start.checked_add(reader.varint()?)?;
        let bits = reader.byte()?;
        let place = ByteRange::at(details, reader.varint()?)?;
        details = place.end();
        spans.push(Span {
            start,
            bits,
            first_chunk: 0,
            chunk_count: 0,
            details: place,
            details_digest: reader.array()?,
        });
    }
    Some(spans)
}

fn blob(reader: &mut Reader<'_>) -> Option<LayerBlob> {
    let digest = match reader.byte()? {
        1 => Digest::Sha256(reader.array()?),
        2 => Digest::Sha512(reader.array()?),
        _ => return None,
    };
    let size = reader.varint()?;
    let format = match reader.byte()? {
        1 => LayerFormat::Estargz,
        2 => LayerFormat::Tar,
        3 => LayerFormat::Gzip,
        4 => LayerFormat::Zstd,
        5 => LayerFormat::ZstdChunked,
        _ => return None,
    };
    Some(LayerBlob {
        digest,
        size,
        format,
    })
}

fn file(reader: &mut Reader<'_>, before: &[u8], secs: i64) -> Option<FileEntry> {
    let shared = before.get(..usize::try_from(reader.varint()?).ok()?)?;
    let rest = reader.bytes()?;
    let path = [shared, rest].concat();
    if shared.len() != shared_len(&path, before) {
        return None;
    }
    let mode = reader.small()?;
    let (uid, gid) = (reader.small()?, reader.small()?);
    let mtime = Timestamp {
        secs: secs.wrapping_add(reader.signed()?),
        nanos: reader.small()?,
    };
    let count = Some(reader.varint()?).filter(|count| *count <= XATTRS_MAX as u64)?;
    let xattrs = (0..count)
        .map(|_| Some((reader.bytes()?.to_vec(), reader.bytes()?.to_vec())))
        .collect::<Option<_>>()?;
    let kind = match reader.byte()? {
        1 => FileKind::Directory,
        2 => FileKind::Regular {
            size: reader.varint()?,
            data_offset: 0,
        },
        3 => FileKind::Symlink {
            target: reader.bytes()?.to_vec(),
        },
        // One to itself is never written, and the tables would drop it.
        4 => FileKind::Hardlink {
            target: reader.bytes().filter(|target| *target != path)?.to_vec(),
        },
        5 => FileKind::CharDevice {
            major: reader.small()?,
            minor: reader.small()?,
        },
        6 => FileKind::BlockDevice {
            major: reader.small()?,
            minor: reader.small()?,
        },
        7 => FileKind::Fifo,
        _ => return None,
    };
    Some(FileEntry {
        path,
        kind,
        mode,
        uid,
        gid,
        mtime,
        xattrs,
    })
}

fn chunk(
    reader: &mut Reader<'_>,
    spans: &[Span],
    places: &mut Places,
) -> Option<(Encoding, u32, Option<[u8; 32]>)> {
    let len = reader.small()?;
    let encoding = match reader.byte()? {
        0 => Encoding::Stream,
        1 => Encoding::Stored {
            blob: ByteRange::at(places.start(reader)?, u64::from(len))?,
        },
        2 => places.alone(reader, |blob, skip| Encoding::GzipMember { blob, skip })?,
        3 => places.alone(reader, |blob, skip| Encoding::ZstdFrame { blob, skip })?,
        4 => places.in_span(reader, spans, |blob, skip, span| Encoding::GzipSpan {
            blob,
            skip,
            span,
        })?,
        5 => places.in_span(reader, spans, |blob, skip, span| Encoding::WholeSpan {
            blob,
            skip,
            span,
        })?,
        6 => places.in_span(reader, spans, |blob, skip, span| Encoding::WholeMember {
            blob,
            skip,
            span,
        })?,
        _ => return None,
    };
    let digest = match encoding {
        Encoding::GzipSpan { .. } | Encoding::WholeSpan { .. } | Encoding::WholeMember { .. } => {
            None
        }
        _ => Some(reader.array()?),
    };
    Some((encoding, len, digest))
}

impl Places {
    fn start(&mut self, reader: &mut Reader<'_>) -> Option<u64> {
        let start = self
            .blob_start
            .wrapping_add(reader.signed()?.cast_unsigned());
        self.blob_start = start;
        Some(start)
    }

    fn alone(
        &mut self,
        reader: &mut Reader<'_>,
        encoding: fn(ByteRange, u64) -> Encoding,
    ) -> Option<Encoding> {
        let start = self.start(reader)?;
        let blob = ByteRange::at(start, reader.varint()?)?;
        Some(encoding(blob, reader.varint()?))
    }

    fn in_span(
        &mut self,
        reader: &mut Reader<'_>,
        spans: &[Span],
        encoding: fn(ByteRange, u64, u32) -> Encoding,
    ) -> Option<Encoding> {
        let further: u32 = reader.small()?;
        if further > 0 {
            self.span = self.span.checked_add(further)?;
            self.span_end = None;
        }
        let start = spans.get(usize::try_from(self.span).ok()?)?.start;
        let end = self
            .span_end
            .unwrap_or(start)
            .checked_add(reader.varint()?)?;
        self.span_end = Some(end);
        let blob = ByteRange::new(start, end)?;
        Some(encoding(blob, reader.varint()?, self.span))
    }
}

fn shared_len(path: &[u8], before: &[u8]) -> usize {
    path.iter().zip(before).take_while(|(a, b)| a == b).count()
}

fn malformed(detail: &str) -> Error {
    Error::malformed("layer index", detail)
}

/// Appends to a body.
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    pub(super) fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
    }

    fn signed(&mut self, value: i64) {
        self.varint(((value << 1) ^ (value >> 63)).cast_unsigned());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn encoding(&mut self, encoding: &Encoding, places: &mut Places) {
        match encoding {
            Encoding::Stream => self.byte(0),
            Encoding::Stored { blob } => {
                self.byte(1);
                self.start(blob, places);
            }
            Encoding::GzipMember { blob, skip } => self.alone(2, (blob, *skip), places),
            Encoding::ZstdFrame { blob, skip } => self.alone(3, (blob, *skip), places),
            Encoding::GzipSpan { blob, skip, span } => {
                self.in_span(4, (blob, *skip, *span), places);
            }
            Encoding::WholeSpan { blob, skip, span } => {
                self.in_span(5, (blob, *skip, *span), places);
            }
            Encoding::WholeMember { blob, skip, span } => {
                self.in_span(6, (blob, *skip, *span), places);
            }
        }
    }

    fn in_span(
        &mut self,
        kind: u8,
        (blob, skip, span): (&ByteRange, u64, u32),
        places: &mut Places,
    ) {
        self.byte(kind);
        self.varint(u64::from(span.saturating_sub(places.span)));
        if span != places.span {
            (places.span, places.span_end) = (span, None);
        }
        let before = places.span_end.unwrap_or(blob.start());
        self.varint(blob.end().saturating_sub(before));
        places.span_end = Some(blob.end());
        self.varint(skip);
    }

    fn alone(&mut self, kind: u8, (blob, skip): (&ByteRange, u64), places: &mut Places) {
        self.byte(kind);
        self.start(blob, places);
        self.varint(blob.len());
        self.varint(skip);
    }

    fn start(&mut self, blob: &ByteRange, places: &mut Places) {
        self.signed(blob.start().wrapping_sub(places.blob_start).cast_signed());
        places.blob_start = blob.start();
    }

    fn file(&mut self, file: &FileEntry, before: &[u8], secs: i64) {
        let shared = shared_len(&file.path, before);
        self.varint(shared as u64);
        self.bytes(file.path.get(shared..).unwrap_or_default());
        self.varint(u64::from(file.mode));
        self.varint(u64::from(file.uid));
        self.varint(u64::from(file.gid));
        self.signed(file.mtime.secs.wrapping_sub(secs));
        self.varint(u64::from(file.mtime.nanos));
        self.varint(file.xattrs.len() as u64);
        for (name, value) in &file.xattrs {
            self.bytes(name);
            self.bytes(value);
        }
        self.kind(&file.kind);
    }

    fn kind(&mut self, kind: &FileKind) {
        match kind {
            FileKind::Directory => self.byte(1),
            FileKind::Regular { size, .. } => {
                self.byte(2);
                self.varint(*size);
            }
            FileKind::Symlink { target } => {
                self.byte(3);
                self.bytes(target);
            }
            FileKind::Hardlink { target } => {
                self.byte(4);
                self.bytes(target);
            }
            FileKind::CharDevice { major, minor } => {
                self.byte(5);
                self.varint(u64::from(*major));
                self.varint(u64::from(*minor));
            }
            FileKind::BlockDevice { major, minor } => {
                self.byte(6);
                self.varint(u64::from(*major));
                self.varint(u64::from(*minor));
            }
            FileKind::Fifo => self.byte(7),
        }
    }
}

#[cfg(test)]
mod tests;
