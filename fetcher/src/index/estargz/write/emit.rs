//! Writes what the plan says.
//!
//! Invariant: bytes reach the digest of the decompressed stream in the order in which
//! their members reach the blob, and no member grows beyond a chunk and [`EXTRA_BYTES_MAX`].

use std::io::{Read, Seek, SeekFrom, Write};

use super::entry::{BLOCK, Kind, Meta, plain_header};
use super::members::{ChunkTag, Member, Members, Placed};
use super::order::Plan;
use super::scan::Scanned;
use super::toc::{Piece, Toc};
use super::{Fault, NO_PREFETCH_LANDMARK, Options, PREFETCH_LANDMARK, TOC_NAME, Written};
use crate::index::Timestamp;
use crate::types::{Algorithm, Digest, Hasher};

/// The one byte of a landmark.
const LANDMARK: [u8; 1] = [0x0f];

/// Headers collected in one member after its chunk, in bytes. A reader of the chunk
/// fetches them along, so a long run of empty files starts a member of its own.
const EXTRA_BYTES_MAX: usize = 64 << 10;

/// Length of the footer in bytes.
const FOOTER_BYTES: usize = 51;

/// Writes the planned `entries` of `input` to `output`.
pub(super) fn emit(
    entries: &[Scanned],
    plan: Plan,
    input: &mut (impl Read + Seek),
    output: &mut impl Write,
    options: &Options,
) -> Result<Written, Fault> {
    let mut emitter = Emitter {
        members: Members::new(output, options)?,
        toc: Toc::default(),
        pending: Member {
            plain: Vec::new(),
            chunk: None,
        },
        diff: Hasher::new(Algorithm::Sha256),
        uncompressed_size: 0,
        chunk_bytes: u64::from(options.chunk_bytes),
    };
    let planned = |index: &usize| entries.get(*index);
    for entry in plan.front.iter().filter_map(planned) {
        emitter.entry(entry, input)?;
    }
    emitter.landmark(!plan.front.is_empty())?;
    for entry in plan.rest.iter().filter_map(planned) {
        emitter.entry(entry, input)?;
    }
    emitter.finish(plan.missing)
}

struct Emitter<'a, W: Write> {
    members: Members<'a, W>,
    toc: Toc,
    /// The member being collected.
    pending: Member,
    diff: Hasher,
    uncompressed_size: u64,
    chunk_bytes: u64,
}

impl<W: Write> Emitter<'_, W> {
    fn entry(&mut self, entry: &Scanned, input: &mut (impl Read + Seek)) -> Result<(), Fault> {
        let meta = &entry.meta;
        input
            .seek(SeekFrom::Start(entry.head_offset))
            .map_err(Fault::read)?;
        self.make_room()?;
        self.append(entry.head_len, input)?;
        let regular = self.toc.push(meta);
        if meta.size == 0 {
            return Ok(());
        }
        let several = meta.size > self.chunk_bytes;
        let mut whole = several.then(|| Hasher::new(Algorithm::Sha256));
        let mut file_offset = 0;
        while file_offset < meta.size {
            let len = self.chunk_bytes.min(meta.size - file_offset);
            let chunk = self.chunk(regular, Piece { file_offset, len }, input)?;
            if let Some(hasher) = &mut whole {
                hasher.update(chunk);
            }
            file_offset += len;
        }
        if let (Some(hasher), Some(entry)) = (whole, self.toc.entries.get_mut(regular)) {
            entry.digest = Some(hasher.finish());
        }
        self.pad(meta.size);
        Ok(())
    }

    /// Starts a member with a chunk and yields the chunk's bytes.
    fn chunk(
        &mut self,
        regular: usize,
        piece: Piece,
        input: &mut impl Read,
    ) -> Result<&[u8], Fault> {
        self.flush()?;
        let len = usize::try_from(piece.len)
            .map_err(|_| Fault::Limit(format!("a chunk of {} bytes", piece.len)))?;
        let entry = self.toc.push_chunk(regular, piece);
        self.pending.chunk = Some(ChunkTag { entry, len });
        self.append(len, input)?;
        Ok(&self.pending.plain)
    }

    fn landmark(&mut self, prioritized: bool) -> Result<(), Fault> {
        let name = match prioritized {
            true => PREFETCH_LANDMARK,
            false => NO_PREFETCH_LANDMARK,
        };
        let len = LANDMARK.len() as u64;
        self.pending
            .plain
            .extend_from_slice(&plain_header(name, len));
        let regular = self.toc.push(&own_file(name, len));
        let piece = Piece {
            file_offset: 0,
            len,
        };
        self.chunk(regular, piece, &mut &LANDMARK[..])?;
        self.pad(len);
        Ok(())
    }

    /// Appends the next `len` bytes of `input` to the member being collected.
    fn append(&mut self, len: usize, input: &mut impl Read) -> Result<(), Fault> {
        let start = self.pending.plain.len();
        self.pending.plain.resize(start + len, 0);
        let room = self.pending.plain.get_mut(start..).unwrap_or_default();
        input.read_exact(room).map_err(Fault::read)
    }

    /// Zeros up to the next block after a payload of `len` bytes.
    fn pad(&mut self, len: u64) {
        let over = usize::try_from(len % BLOCK as u64).unwrap_or(0);
        if over > 0 {
            let padded = self.pending.plain.len() + BLOCK - over;
            self.pending.plain.resize(padded, 0);
        }
    }

    /// Ends the member being collected if it has many headers after its chunk.
    fn make_room(&mut self) -> Result<(), Fault> {
        let chunk = self.pending.chunk.map_or(0, |tag| tag.len);
        if self.pending.plain.len() - chunk > EXTRA_BYTES_MAX {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Fault> {
        if self.pending.plain.is_empty() {
            return Ok(());
        }
        let next = Member {
            plain: Vec::new(),
            chunk: None,
        };
        let member = std::mem::replace(&mut self.pending, next);
        self.diff.update(&member.plain);
        self.uncompressed_size += member.plain.len() as u64;
        let placed = self.members.submit(member)?;
        self.note(placed);
        Ok(())
    }

    fn note(&mut self, placed: Option<Placed>) {
        let Some(placed) = placed else { return };
        if let Some(entry) = self.toc.entries.get_mut(placed.entry) {
            entry.offset = placed.blob_offset;
            entry.chunk_digest = Some(placed.chunk_digest);
            // A file of one chunk was hashed with it.
            if entry.is_whole_file() {
                entry.digest = Some(placed.chunk_digest);
            }
        }
    }

    fn drain(&mut self) -> Result<(), Fault> {
        self.flush()?;
        while !self.members.is_idle() {
            let placed = self.members.collect()?;
            self.note(placed);
        }
        Ok(())
    }

    fn finish(mut self, missing: Vec<String>) -> Result<Written, Fault> {
        self.drain()?;
        let json = self.toc.to_json()?;
        let (toc_digest, toc_size) = (Digest::sha256(&json), json.len() as u64);
        let toc_offset = self.members.blob_offset();
        self.pending
            .plain
            .extend_from_slice(&plain_header(TOC_NAME, toc_size));
        self.pending.plain.extend_from_slice(&json);
        drop(json);
        self.pad(toc_size);
        let end = self.pending.plain.len() + 2 * BLOCK;
        self.pending.plain.resize(end, 0);
        self.drain()?;
        self.members.write(&footer(toc_offset))?;
        let (blob_digest, blob_size) = self.members.finish()?;
        Ok(Written {
            blob_digest,
            blob_size,
            diff_id: self.diff.finish(),
            toc_digest,
            uncompressed_size: self.uncompressed_size,
            toc_size,
            missing,
        })
    }
}

/// What the TOC says of a file of our own.
fn own_file(name: &str, size: u64) -> Meta {
    Meta {
        name: name.to_owned(),
        kind: Kind::Regular,
        size,
        mode: 0o444,
        uid: 0,
        gid: 0,
        user: String::new(),
        group: String::new(),
        mtime: Timestamp::default(),
        link: String::new(),
        major: 0,
        minor: 0,
        xattrs: std::collections::BTreeMap::new(),
    }
}

/// An empty gzip member whose extra field says where the TOC's member starts.
fn footer(toc_offset: u64) -> Vec<u8> {
    let field = format!("{toc_offset:016x}STARGZ");
    let mut footer = Vec::with_capacity(FOOTER_BYTES);
    // Deflate, with an extra field of 26 bytes: one subfield "SG" of 22.
    footer.extend_from_slice(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0]);
    footer.extend_from_slice(b"SG\x16\x00");
    footer.extend_from_slice(field.as_bytes());
    // One empty stored block; CRC-32 and length of nothing.
    footer.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    footer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_footer_is_as_specified() {
        let footer = footer(0x1234);
        assert_eq!(footer.len(), FOOTER_BYTES);
        assert_eq!(&footer[16..38], b"0000000000001234STARGZ");
    }
}
