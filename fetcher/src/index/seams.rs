//! What it takes to enter a gzip layer anew at places chosen later, without its bytes.
//!
//! While a layer streams, every so often a place between two deflate blocks is noted, a
//! *seam*, and so are the *gaps* of the tar: its bytes that are no payload kept in the data
//! file (headers, padding). With both and the data file, what was decoded before any seam
//! can be put together again: the window that decoding from there needs.
//!
//! ```text
//!  0  magic "LAZSEAMS"                                 8
//!  8  version, 1                                       u32
//! 12  CRC-32 (IEEE) of the tables as they stand here   u32
//! 16  length of the tables in bytes                    u64
//! 24  length of the body they unpack to                u64
//! 32  length of the frames in bytes                    u64
//! 40  tables: the body as one zstd frame
//!     frames: all gaps, one after another, in zstd frames of FRAME_LEN bytes; the last of less
//!
//! body:   algorithm (1 sha256, 2 sha512) u8 | blob_digest 32 or 64
//!         | seams v  | (blob start minus that before v | bits u8 | place in the tar minus that before v) ...
//!         | gaps v   | (length v) ...    the first before the first payload, one after the last
//!         | frames v | (length v | CRC-32 of it u32) ...
//! ```
//!
//! Integers as in [`super::wire`]. Invariant: only a help. It never leaves the node, is
//! checked whole before it is used, and a layer without it, or with one that is damaged,
//! keeps the index it has. Neither half of this module touches a file.

mod record;

use bytes::Bytes;

pub(super) use self::record::Recorder;
use super::wire::reader::Reader;
use crate::codec;
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"LAZSEAMS";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 40;
/// Bytes of gaps in one frame: what is unpacked to read one header.
const FRAME_LEN: usize = 256 << 10;
/// Largest file that is written or read. Layers of ten thousands of files take some MiB.
pub const SEAMS_LEN_MAX: u64 = 64 << 20;
/// Largest body.
const BODY_LEN_MAX: u64 = 64 << 20;
/// Bytes that no seam, and no frame, of a body can do without.
const SEAM_LEN_MIN: usize = 3;
const FRAME_ENTRY_LEN_MIN: usize = 5;

/// A place between two deflate blocks of a gzip blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seam {
    /// Its first byte in the blob.
    pub start: u64,
    /// How many bits of that byte, its highest, are behind it; 0 for the whole byte.
    pub bits: u8,
    /// Place in the tar, decoded bytes.
    pub decoded: u64,
}

/// The seams and gaps of one layer, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seams {
    /// The layer.
    pub blob_digest: Digest,
    /// Ascending in the blob and in the tar.
    pub seams: Vec<Seam>,
    /// Lengths of the gaps: one before each non-empty regular file, one after the last.
    pub gaps: Vec<u64>,
    frames: Vec<(ByteRange, u32)>,
    bytes: Bytes,
}

impl Seams {
    /// Reads the file back. `bytes` come from a disk and may be anything.
    pub fn parse(bytes: Bytes) -> Result<Self> {
        let tables = tables(&bytes)?;
        let mut reader = Reader::new(&tables.body);
        let mut seams = parse_body(&mut reader, tables.frames)
            .filter(|_| reader.left() == 0)
            .ok_or_else(|| malformed("its tables are damaged"))?;
        let all: Option<u64> = seams
            .gaps
            .iter()
            .try_fold(0, |sum: u64, len| sum.checked_add(*len));
        let frames = all.map(|all| all.div_ceil(FRAME_LEN as u64));
        if frames != Some(seams.frames.len() as u64) {
            return Err(malformed("it does not have the gaps it says"));
        }
        seams.bytes = bytes;
        Ok(seams)
    }

    /// The bytes of frame `number`: those of the gaps, one after another, from
    /// `number * frame_len()` on.
    pub fn frame(&self, number: u64) -> Result<Vec<u8>> {
        let place = usize::try_from(number).ok();
        let place = place.and_then(|at| self.frames.get(at));
        let slice = |range: ByteRange| {
            let start = usize::try_from(range.start()).ok()?;
            self.bytes.get(start..usize::try_from(range.end()).ok()?)
        };
        let packed = place.and_then(|(range, crc)| Some((slice(*range)?, *crc)));
        let (packed, crc) = packed.ok_or_else(|| malformed("it has no such frame"))?;
        if crc32fast::hash(packed) != crc {
            return Err(malformed("the checksum of a frame does not match"));
        }
        codec::unpacked(packed, FRAME_LEN)
    }

    /// Unpacks every frame; an error where one is damaged.
    pub fn check_frames(&self) -> Result<()> {
        (0..self.frames.len() as u64).try_for_each(|number| self.frame(number).map(drop))
    }

    /// Bytes of gaps in each frame but the last.
    pub fn frame_len() -> u64 {
        FRAME_LEN as u64
    }
}

/// What the header leads to.
struct Tables {
    body: Vec<u8>,
    /// Where the frames are.
    frames: ByteRange,
}

fn tables(bytes: &[u8]) -> Result<Tables> {
    let mut reader = Reader::new(bytes);
    if reader.array() != Some(*MAGIC) {
        return Err(malformed("it does not begin with LAZSEAMS"));
    }
    if reader.array().map(u32::from_le_bytes) != Some(VERSION) {
        return Err(malformed("it is of another version"));
    }
    let cut_off = || malformed("it is cut off");
    let crc = reader.array().map(u32::from_le_bytes);
    let mut len = || reader.array().map(u64::from_le_bytes);
    let (Some(crc), Some(packed), Some(body), Some(frames)) = (crc, len(), len(), len()) else {
        return Err(cut_off());
    };
    let packed = ByteRange::at(HEADER_LEN as u64, packed);
    let frames = packed.and_then(|packed| ByteRange::at(packed.end(), frames));
    let (Some(packed), Some(frames)) = (packed, frames) else {
        return Err(cut_off());
    };
    if frames.end() != bytes.len() as u64 || frames.end() > SEAMS_LEN_MAX || body > BODY_LEN_MAX {
        return Err(malformed("it does not have the length it says"));
    }
    let end = usize::try_from(packed.end()).map_err(|_| cut_off())?;
    let packed = bytes.get(HEADER_LEN..end).ok_or_else(cut_off)?;
    if crc32fast::hash(packed) != crc {
        return Err(malformed("its checksum does not match"));
    }
    let len = usize::try_from(body).map_err(|_| cut_off())?;
    let body = codec::unpacked(packed, len)?;
    if body.len() != len {
        return Err(malformed("its body does not have the length it says"));
    }
    Ok(Tables { body, frames })
}

fn parse_body(reader: &mut Reader<'_>, place: ByteRange) -> Option<Seams> {
    let blob_digest = match reader.byte()? {
        1 => Digest::Sha256(reader.array()?),
        2 => Digest::Sha512(reader.array()?),
        _ => return None,
    };
    let seams = parse_seams(reader)?;
    let gaps = (0..count(reader, 1)?)
        .map(|_| reader.varint())
        .collect::<Option<_>>()?;
    let mut frames = Vec::new();
    let mut end = place.start();
    for _ in 0..count(reader, FRAME_ENTRY_LEN_MIN)? {
        let frame = ByteRange::at(end, reader.varint()?)?;
        end = frame.end();
        frames.push((frame, u32::from_le_bytes(reader.array()?)));
    }
    (end == place.end()).then_some(Seams {
        blob_digest,
        seams,
        gaps,
        frames,
        bytes: Bytes::new(),
    })
}

fn parse_seams(reader: &mut Reader<'_>) -> Option<Vec<Seam>> {
    let mut seams: Vec<Seam> = Vec::new();
    for _ in 0..count(reader, SEAM_LEN_MIN)? {
        let (start, bits, decoded) = (reader.varint()?, reader.byte()?, reader.varint()?);
        let seam = match seams.last() {
            None => Seam {
                start,
                bits,
                decoded,
            },
            Some(last) => Seam {
                start: last.start.checked_add(start).filter(|_| start > 0)?,
                bits,
                decoded: last.decoded.checked_add(decoded).filter(|_| decoded > 0)?,
            },
        };
        if bits > 7 {
            return None;
        }
        seams.push(seam);
    }
    Some(seams)
}

/// A number of entries of at least `len_min` bytes each, which must be there.
fn count(reader: &mut Reader<'_>, len_min: usize) -> Option<usize> {
    let count = usize::try_from(reader.varint()?).ok()?;
    (count <= reader.left() / len_min).then_some(count)
}

fn malformed(detail: &str) -> Error {
    Error::malformed("seams of a layer", detail)
}

#[cfg(test)]
mod tests;
