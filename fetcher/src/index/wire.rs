//! The binary form of a [`LayerIndex`]: what a store keeps beside the data file.
//!
//! ```text
//!  0  magic "LAZINDEX"                       8
//!  8  version, 2                             u32
//! 12  CRC-32 (IEEE) of the body              u32
//! 16  length of the body in bytes            u64
//! 24  body, and nothing after it
//!
//! body:   algorithm (1 sha256, 2 sha512) u8 | blob_digest 32 or 64 | blob_size v
//!         | format (1 eStargz, 2 tar, 3 gzip, 4 zstd, 5 zstd:chunked) u8 | files v | file ...
//! file:   path shared with the file before v | rest of the path b | mode v | uid v | gid v
//!         | seconds z | nanoseconds v | xattrs v | (name b | value b) ... | kind u8 | of the kind:
//!           1 directory, 7 fifo: -        2 regular: size v | chunk ... until size is covered
//!           3 symlink, 4 hard link: target b       5 char, 6 block device: major v | minor v
//! chunk:  len v | digest 32 | encoding u8, and unless it is 0 also blob start minus that of
//!         the chunk before z | of the encoding:
//!           0 stream, 1 stored: -    2 gzip member, 3 zstd frame: blob len v | skip v
//! ```
//!
//! u32 and u64 are little endian; v is LEB128, z the same of a zigzag value, b a v length
//! and as many bytes. Places in the data file are not stored: they follow.
//!
//! Invariant: [`decode`] accepts only what [`encode`] writes of a valid index, and gives
//! exactly that index back. Neither touches a file.

mod reader;

use super::limits::XATTRS_MAX;
use super::tables::Tables;
use super::{Encoding, FileEntry, FileKind, LayerBlob, LayerFormat, LayerIndex, Timestamp};
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};
use reader::Reader;

const MAGIC: &[u8; 8] = b"LAZINDEX";
const VERSION: u32 = 2;
const HEADER_LEN: usize = 24;
/// Largest body that is written or read: tables at their limits stay below.
const BODY_LEN_MAX: u64 = 1 << 30;
/// Bytes that no file of a body can do without.
const FILE_LEN_MIN: usize = 9;

/// The binary form of a valid index.
pub fn encode(index: &LayerIndex) -> Vec<u8> {
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
    body.varint(index.files.len() as u64);
    let (mut path, mut blob_start) = (&[][..], 0);
    let mut chunks = index.chunks.iter();
    for file in &index.files {
        body.file(file, path);
        path = &file.path;
        let FileKind::Regular { size, .. } = file.kind else {
            continue;
        };
        let mut left = size;
        while let Some(chunk) = (left > 0).then(|| chunks.next()).flatten() {
            left = left.saturating_sub(u64::from(chunk.len));
            body.varint(u64::from(chunk.len));
            body.0.extend_from_slice(&chunk.chunk_digest);
            body.encoding(&chunk.encoding, &mut blob_start);
        }
    }
    let body = body.0;
    let mut out = Vec::with_capacity(HEADER_LEN + body.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    out.extend_from_slice(&(body.len() as u64).to_le_bytes());
    out.extend_from_slice(&body);
    out
}

/// Reads the binary form back. `bytes` come from a disk or another node and may be
/// anything.
pub fn decode(bytes: &[u8]) -> Result<LayerIndex> {
    let body = body(bytes)?;
    let mut reader = Reader::new(body);
    let blob =
        blob(&mut reader).ok_or_else(|| malformed("its description of the blob is damaged"))?;
    let what = format!("stored index of layer {}", blob.digest);
    let count = reader
        .varint()
        .and_then(|count| usize::try_from(count).ok())
        .filter(|count| *count <= reader.left() / FILE_LEN_MIN)
        .ok_or_else(|| Error::malformed(&*what, "it has fewer files than it says"))?;
    let mut tables = Tables::new(what.clone());
    tables.reserve(count);
    let (mut path, mut blob_start) = (Vec::new(), 0);
    for number in 0..count {
        let damaged = || Error::malformed(&*what, format!("file {number} is damaged"));
        let file = file(&mut reader, &path).ok_or_else(damaged)?;
        path.clone_from(&file.path);
        let size = match file.kind {
            FileKind::Regular { size, .. } => size,
            _ => 0,
        };
        tables.file(file)?;
        let mut left = size;
        while left > 0 {
            let chunk = chunk(&mut reader, &mut blob_start);
            let (encoding, len, digest) = chunk.ok_or_else(damaged)?;
            left = left
                .checked_sub(u64::from(len))
                .filter(|_| len > 0)
                .ok_or_else(damaged)?;
            tables.chunk(encoding, len, digest);
        }
    }
    if reader.left() > 0 {
        return Err(Error::malformed(what, "something follows the last file"));
    }
    tables.finish(blob)
}

/// Checks the header; returns the body.
fn body(bytes: &[u8]) -> Result<&[u8]> {
    let mut reader = Reader::new(bytes);
    if reader.array() != Some(*MAGIC) {
        return Err(malformed("it does not begin with LAZINDEX"));
    }
    match reader.array().map(u32::from_le_bytes) {
        Some(VERSION) => {}
        Some(version) => {
            return Err(Error::Unsupported {
                what: "stored layer index".to_owned(),
                detail: format!("it has version {version}, this build reads {VERSION}"),
            });
        }
        None => return Err(malformed("it is cut off")),
    }
    let crc = reader.array().map(u32::from_le_bytes);
    let len = reader.array().map(u64::from_le_bytes);
    let body = reader.rest();
    match len {
        Some(len) if len > BODY_LEN_MAX => Err(Error::limit(
            "stored layer index",
            format!("it has {len} bytes of at most {BODY_LEN_MAX}"),
        )),
        Some(len) if len == body.len() as u64 => Ok(()),
        _ => Err(malformed("it does not have the length it says")),
    }?;
    if crc != Some(crc32fast::hash(body)) {
        return Err(malformed("its checksum does not match"));
    }
    Ok(body)
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

fn file(reader: &mut Reader<'_>, before: &[u8]) -> Option<FileEntry> {
    let shared = before.get(..usize::try_from(reader.varint()?).ok()?)?;
    let rest = reader.bytes()?;
    let path = [shared, rest].concat();
    if shared.len() != shared_len(&path, before) {
        return None;
    }
    let mode = reader.small()?;
    let (uid, gid) = (reader.small()?, reader.small()?);
    let mtime = Timestamp {
        secs: reader.signed()?,
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

fn chunk(reader: &mut Reader<'_>, blob_start: &mut u64) -> Option<(Encoding, u32, [u8; 32])> {
    let (len, digest) = (reader.small()?, reader.array()?);
    let kind = reader.byte()?;
    if kind != 0 {
        *blob_start = blob_start.wrapping_add(reader.signed()?.cast_unsigned());
    }
    let start = *blob_start;
    let mut alone = || Some((ByteRange::at(start, reader.varint()?)?, reader.varint()?));
    let encoding = match kind {
        0 => Encoding::Stream,
        1 => Encoding::Stored {
            blob: ByteRange::at(start, u64::from(len))?,
        },
        2 => alone().map(|(blob, skip)| Encoding::GzipMember { blob, skip })?,
        3 => alone().map(|(blob, skip)| Encoding::ZstdFrame { blob, skip })?,
        _ => return None,
    };
    Some((encoding, len, digest))
}

fn shared_len(path: &[u8], before: &[u8]) -> usize {
    path.iter().zip(before).take_while(|(a, b)| a == b).count()
}

fn malformed(detail: &str) -> Error {
    Error::malformed("stored layer index", detail)
}

/// Appends to a body.
struct Writer(Vec<u8>);

impl Writer {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    fn varint(&mut self, mut value: u64) {
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

    fn encoding(&mut self, encoding: &Encoding, blob_start: &mut u64) {
        self.byte(match encoding {
            Encoding::Stream => 0,
            Encoding::Stored { .. } => 1,
            Encoding::GzipMember { .. } => 2,
            Encoding::ZstdFrame { .. } => 3,
        });
        let Some(blob) = encoding.blob() else {
            return;
        };
        self.signed(blob.start().wrapping_sub(*blob_start).cast_signed());
        *blob_start = blob.start();
        if !matches!(encoding, Encoding::Stored { .. }) {
            self.varint(blob.len());
            self.varint(encoding.skip());
        }
    }

    fn file(&mut self, file: &FileEntry, before: &[u8]) {
        let shared = shared_len(&file.path, before);
        self.varint(shared as u64);
        self.bytes(file.path.get(shared..).unwrap_or_default());
        self.varint(u64::from(file.mode));
        self.varint(u64::from(file.uid));
        self.varint(u64::from(file.gid));
        self.signed(file.mtime.secs);
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
