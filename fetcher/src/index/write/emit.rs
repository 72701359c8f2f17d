//! Writes what the plan says.
//!
//! Invariant: no member grows beyond a chunk and [`EXTRA_BYTES_MAX`], and one header.

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom, Write};

use super::crc64::Crc64;
use super::entry::{BLOCK, Meta, plain_header};
use super::hot::{HotFile, HotFiles};
use super::members::ChunkTag;
use super::order::Plan;
use super::pieces::{Heat, Piece, pieces};
use super::scan::Scanned;
use super::stream::Stream;
use super::tarsplit::TarSplit;
use super::toc::Toc;
use super::{
    Fault, Flavour, Format, NO_PREFETCH_LANDMARK, Options, PREFETCH_LANDMARK, Written, tail,
};
use crate::index::zstdchunked::PREFETCH_END_ANNOTATION;
use crate::types::{Algorithm, ByteRange, Hasher};

/// The one byte of a landmark.
const LANDMARK: [u8; 1] = [0x0f];

/// Headers collected in one member after its chunk, in bytes. A reader of the chunk
/// fetches them along, so a long run of empty files starts a member of its own.
const EXTRA_BYTES_MAX: usize = 64 << 10;
/// Members of plain gzip: large enough to cost nothing, small enough to compress on all
/// threads and to start reading in the middle.
const PLAIN_MEMBER_BYTES: usize = 1 << 20;
/// Bytes of a payload read at once for plain gzip.
const COPY_BYTES: u64 = 256 << 10;

/// Writes the planned entries of `input` to `output`.
pub(super) fn emit(
    (entries, plan): (&[Scanned], Plan),
    hot: Option<&HotFiles>,
    input: &mut (impl Read + Seek),
    output: &mut impl Write,
    options: &Options,
) -> Result<Written, Fault> {
    let flavour = match options.format {
        Format::Gzip => return emit_plain((entries, plan), input, output, options),
        Format::Estargz => None,
        Format::ZstdChunked(flavour) => Some(flavour),
    };
    let split = match flavour {
        Some(Flavour::ContainersStorage) => Some(TarSplit::new(options.level)?),
        Some(Flavour::Stargz) | None => None,
    };
    let mut emitter = Emitter {
        stream: Stream::new(output, options)?,
        toc: Toc::new(options.format),
        split,
        heat: Heats::new(hot),
        chunk_bytes: options.chunk_bytes,
        chunks_alone: flavour.is_some(),
    };
    let planned = |index: &usize| entries.get(*index);
    for entry in plan.front.iter().filter_map(planned) {
        emitter.entry(entry, input)?;
    }
    let mut first_end = None;
    if options.format.has_landmarks() {
        emitter.landmark(!plan.front.is_empty())?;
    } else if !plan.front.is_empty() {
        // Its place must be known, which it is only behind what is being compressed.
        emitter.stream.drain()?;
        first_end = Some(emitter.stream.members.blob_offset());
    }
    for entry in plan.rest.iter().filter_map(planned) {
        emitter.entry(entry, input)?;
    }
    let mut written = emitter.finish((flavour, options.level))?;
    let end = first_end.map(|end| (PREFETCH_END_ANNOTATION, end.to_string()));
    written.annotations.extend(end);
    Ok(written)
}

/// Plain gzip: the tar and nothing else.
fn emit_plain(
    (entries, plan): (&[Scanned], Plan),
    input: &mut (impl Read + Seek),
    output: &mut impl Write,
    options: &Options,
) -> Result<Written, Fault> {
    let mut stream = Stream::new(output, options)?;
    let planned = plan.front.iter().chain(&plan.rest);
    for entry in planned.filter_map(|index| entries.get(*index)) {
        seek(input, entry)?;
        let mut left = entry.head_len as u64 + entry.meta.size;
        while left > 0 {
            let len = left.min(COPY_BYTES);
            stream.copy(usize::try_from(len).unwrap_or(0), input)?;
            left -= len;
            if stream.extra_len() >= PLAIN_MEMBER_BYTES {
                stream.flush()?;
            }
        }
        stream.put(padding(entry.meta.size));
    }
    stream.put(&[0; 2 * BLOCK]);
    tail::plain(stream)
}

struct Emitter<'a, W: Write> {
    stream: Stream<'a, W>,
    toc: Toc,
    split: Option<TarSplit>,
    heat: Heats<'a>,
    chunk_bytes: u32,
    /// Whether a chunk's member holds nothing else.
    chunks_alone: bool,
}

impl<W: Write> Emitter<'_, W> {
    fn entry(&mut self, entry: &Scanned, input: &mut (impl Read + Seek)) -> Result<(), Fault> {
        seek(input, entry)?;
        if self.stream.extra_len() > EXTRA_BYTES_MAX {
            self.stream.flush()?;
        }
        let head = self.stream.copy(entry.head_len, input)?;
        if let Some(split) = &mut self.split {
            split.segment(head);
        }
        self.payload(&entry.meta, input)
    }

    fn landmark(&mut self, prioritized: bool) -> Result<(), Fault> {
        let name = match prioritized {
            true => PREFETCH_LANDMARK,
            false => NO_PREFETCH_LANDMARK,
        };
        let len = LANDMARK.len() as u64;
        self.stream.put(&plain_header(name, len));
        self.payload(&Meta::of_our_own(name, len), &mut &LANDMARK[..])
    }

    /// Writes the payload of an entry whose headers are written.
    fn payload(&mut self, meta: &Meta, input: &mut impl Read) -> Result<(), Fault> {
        let regular = self.toc.push(meta);
        let pieces = pieces(meta.size, self.heat.of(&meta.name), self.chunk_bytes);
        let mut whole = (pieces.len() > 1).then(|| Hasher::new(Algorithm::Sha256));
        let mut crc = self.split.is_some().then(Crc64::new);
        for piece in pieces {
            let bytes = self.chunk(regular, piece, input)?;
            if let Some(hasher) = &mut whole {
                hasher.update(bytes);
            }
            if let Some(crc) = &mut crc {
                crc.update(bytes);
            }
            if self.chunks_alone {
                self.stream.flush()?;
            }
        }
        if let Some(hasher) = whole {
            self.toc.set_digest(regular, hasher.finish());
        }
        let padding = padding(meta.size);
        self.stream.put(padding);
        if let (Some(split), Some(crc)) = (&mut self.split, crc) {
            let sum = (meta.size > 0).then(|| crc.finish());
            split.file(&meta.raw.name, meta.size, sum)?;
            split.segment(padding);
        }
        for placed in self.stream.take_placed() {
            self.toc.place(placed);
        }
        Ok(())
    }

    /// Starts a member with a chunk and yields the chunk's bytes.
    fn chunk(
        &mut self,
        regular: usize,
        piece: Piece,
        input: &mut impl Read,
    ) -> Result<&[u8], Fault> {
        let len = usize::try_from(piece.len)
            .map_err(|_| Fault::Limit(format!("a chunk of {} bytes", piece.len)))?;
        let entry = self.toc.push_chunk(regular, piece);
        self.stream.chunk(ChunkTag { entry, len }, input)
    }

    fn finish(mut self, (flavour, level): (Option<Flavour>, u32)) -> Result<Written, Fault> {
        self.stream.drain()?;
        for placed in self.stream.take_placed() {
            self.toc.place(placed);
        }
        let Some(flavour) = flavour else {
            return tail::estargz(self.stream, &self.toc);
        };
        let split = match self.split {
            Some(mut split) => {
                split.segment(&[0; 2 * BLOCK]);
                Some(split.finish()?)
            }
            None => None,
        };
        tail::zstd_chunked(self.stream, (&self.toc, split), (flavour, level))
    }
}

/// What is known of the use of each file.
struct Heats<'a>(Option<HashMap<&'a str, &'a [ByteRange]>>);

impl<'a> Heats<'a> {
    fn new(hot: Option<&'a HotFiles>) -> Self {
        let file = |file: &'a HotFile| (file.path.as_str(), file.ranges.as_slice());
        Self(hot.map(|hot| hot.files.iter().map(file).collect()))
    }

    fn of(&self, name: &str) -> Heat<'a> {
        match self.0.as_ref().map(|files| files.get(name)) {
            None => Heat::Unknown,
            Some(Some([])) => Heat::Hot,
            Some(Some(ranges)) => Heat::Ranges(ranges),
            Some(None) => Heat::Cold,
        }
    }
}

fn seek(input: &mut impl Seek, entry: &Scanned) -> Result<(), Fault> {
    let start = SeekFrom::Start(entry.head_offset);
    input.seek(start).map(|_| ()).map_err(Fault::read)
}

/// Zeros up to the next block after a payload of `len` bytes.
fn padding(len: u64) -> &'static [u8] {
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    let over = len.wrapping_neg() % BLOCK as u64;
    let over = usize::try_from(over).unwrap_or(0);
    ZEROS.get(..over).unwrap_or_default()
}
