//! Where each chunk of a plain layer is to be found again.
//!
//! A tar's chunks are bytes of the blob. Zstd is entered at its frames, if those are small.
//! Gzip is entered between two deflate blocks wherever [`SPAN_LEN`] decoded bytes have
//! passed, with as much of the 32 KiB before as the first 32 KiB behind refer to.
//! Invariant: what is recorded decodes to what was hashed; chunks of a span follow one
//! another. Memory: the windows that are kept, packed, 32 bytes for each chunk, and a bounded
//! number of encoded bytes and of frames' places, whatever the blob holds.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{PIECE_LEN, Position, STREAM_CHUNK_LEN};
use crate::Result;
use crate::codec::Packer;
use crate::codec::stream::{BlockEnd, Compression, Run, Stop};
use crate::codec::zran::{REACH, sparse_window};
use crate::index::details::Spans;
use crate::index::{Chunk, Encoding, Span};
use crate::types::ByteRange;

/// Decoded bytes after which gzip is entered anew. Reading a piece decodes all that is
/// before it in its span; each span costs some KiB of details.
const SPAN_LEN: u64 = 512 << 10;
/// Decoded bytes before a chunk that are worth decoding for it. Past this, in a zstd frame
/// or a deflate block that does not end, chunks come only with the whole layer.
const SKIP_MAX: u64 = 8 << 20;

/// Decoded bytes of a zstd frame at least that is entered. Shorter ones are decoded with what
/// is before them, so that as many frames as a blob may have take no memory.
const FRAME_LEN_MIN: u64 = 512;

/// Encoded bytes after a place that are kept to tell what its window is needed for. [`REACH`]
/// decoded bytes take more only where most of them decode to nothing, as in empty blocks.
const PROBE_LEN_MAX: usize = 2 * REACH;

/// Places of zstd frames that are kept however little each of them holds.
const FRAMES_MAX: usize = 4096;
/// Decoded bytes of a frame at least that is entered beyond these: even without a file that
/// they are dropped behind, all of a layer's come to 64 MiB.
const FRAME_LEN_MIN_BEYOND: u64 = 64 << 10;

/// What is known of one blob so far.
pub(super) enum Locator {
    /// The blob is the tar.
    Stored,
    /// Where zstd frames begin.
    Zstd(Frames),
    /// Where gzip can be entered.
    Gzip(Box<Gzip>),
}

impl Locator {
    pub(super) fn new(compression: Compression) -> Self {
        match compression {
            Compression::Stored => Self::Stored,
            Compression::Gzip => Self::Gzip(Box::default()),
            Compression::Zstd => Self::Zstd(Frames::default()),
        }
    }

    /// How long a chunk may be that begins at `start` of the tar.
    pub(super) fn chunk_len(&self, start: u64) -> u32 {
        let from = match self {
            Self::Stored => Some(start),
            Self::Zstd(frames) => frames.of(start).map(|frame| frame.decoded),
            Self::Gzip(gzip) => gzip.entry(start).map(|(_, entry)| entry.decoded),
        };
        match from {
            Some(from) if start.saturating_sub(from) <= SKIP_MAX => PIECE_LEN,
            _ => STREAM_CHUNK_LEN,
        }
    }

    /// How far the blob has to be read for what a step decoded, after which it is at `now`. Of
    /// the last block of a frame zstd says that a byte is left until all of its output was taken.
    pub(super) fn reach(&self, run: &Run<'_>, now: Position) -> u64 {
        match (self, &run.stop) {
            (Self::Zstd(_), Stop::Anywhere) => now.encoded.saturating_add(1),
            _ => now.encoded,
        }
    }

    /// How to find the chunk that began at `start` of the tar, now that all of it was
    /// decoded, which takes the blob up to `end`.
    pub(super) fn chunk(&mut self, start: u64, len: u32, end: u64) -> Encoding {
        let near = |from: u64| start.checked_sub(from).filter(|skip| *skip <= SKIP_MAX);
        let found = match self {
            Self::Stored => {
                ByteRange::at(start, u64::from(len)).map(|blob| Encoding::Stored { blob })
            }
            Self::Zstd(frames) => frames.take(start).and_then(|frame| {
                let blob = ByteRange::new(frame.encoded, end);
                blob.zip(near(frame.decoded))
                    .map(|(blob, skip)| Encoding::ZstdFrame { blob, skip })
            }),
            Self::Gzip(gzip) => gzip.chunk(start, end),
        };
        found.unwrap_or(Encoding::Stream)
    }

    /// Takes note of a step, after its bytes were looked at; whether a span of gzip begins
    /// where it stopped.
    pub(super) fn ran(&mut self, run: &Run<'_>, now: Position) -> Result<bool> {
        match (self, &run.stop) {
            (Self::Zstd(frames), Stop::Frame) => frames.ended(now),
            (Self::Gzip(gzip), stop) => return gzip.ran(run, stop, now),
            (Self::Stored | Self::Zstd(_), _) => {}
        }
        Ok(false)
    }

    /// The spans that have chunks, and the details of all of them. `digests` are those of
    /// `chunks`, one each; here they come to where they belong.
    pub(super) fn finish(
        self,
        chunks: &mut [Chunk],
        digests: &[[u8; 32]],
    ) -> Result<(Vec<Span>, Bytes)> {
        let spans = match self {
            Self::Gzip(gzip) => gzip.finish(chunks, digests)?,
            Self::Stored | Self::Zstd(_) => (Vec::new(), Bytes::new()),
        };
        for (chunk, digest) in chunks.iter_mut().zip(digests) {
            if !matches!(chunk.encoding, Encoding::GzipSpan { .. }) {
                chunk.chunk_digest = Some(*digest);
            }
        }
        Ok(spans)
    }
}

/// Where the frames of a zstd blob begin, from the one on that the next chunk may begin in.
pub(super) struct Frames(VecDeque<Position>);

impl Default for Frames {
    fn default() -> Self {
        Self(VecDeque::from([Position::default()]))
    }
}

impl Frames {
    /// The frame that has `start` of the tar.
    fn of(&self, start: u64) -> Option<Position> {
        let frames = self.0.iter().rev();
        frames.copied().find(|frame| frame.decoded <= start)
    }

    /// The same, for a chunk; those that come later begin behind it. It may end in another
    /// frame.
    fn take(&mut self, start: u64) -> Option<Position> {
        let before = self.0.partition_point(|frame| frame.decoded <= start);
        self.0.drain(..before.saturating_sub(1));
        self.of(start)
    }

    /// A frame ended, and the next begins.
    fn ended(&mut self, now: Position) {
        let passed = self.0.back().map_or(0, |last| now.decoded - last.decoded);
        if passed == 0 {
            self.0.pop_back();
        }
        let least = if self.0.len() < FRAMES_MAX {
            FRAME_LEN_MIN
        } else {
            FRAME_LEN_MIN_BEYOND
        };
        if passed == 0 || passed >= least {
            self.0.push_back(now);
        }
    }
}

/// Places in a gzip blob, and what is needed to enter it there.
#[derive(Default)]
pub(super) struct Gzip {
    /// Made for the first window.
    packer: Option<Packer>,
    entries: Vec<Entry>,
    /// The window of the last entry, until it is known what of it is needed.
    probe: Option<Probe>,
}

struct Entry {
    start: u64,
    bits: u8,
    /// Place in the tar.
    decoded: u64,
    /// Number among those with chunks.
    number: Option<u32>,
    /// As much as is needed, packed.
    window: Vec<u8>,
}

struct Probe {
    window: Vec<u8>,
    /// What came since, and the byte that the entry is in.
    encoded: Vec<u8>,
    /// Place of the entry in the tar.
    start: u64,
}

impl Gzip {
    /// The last place at or before `start` of the tar.
    fn entry(&self, start: u64) -> Option<(usize, &Entry)> {
        let entries = self.entries.iter().enumerate();
        entries.rev().find(|(_, entry)| entry.decoded <= start)
    }

    fn chunk(&mut self, start: u64, encoded: u64) -> Option<Encoding> {
        let (at, entry) = self.entry(start)?;
        let skip = start
            .checked_sub(entry.decoded)
            .filter(|skip| *skip <= SKIP_MAX)?;
        let number = match entry.number {
            Some(number) => number,
            None => self.next_number()?,
        };
        let entry = self.entries.get_mut(at)?;
        entry.number = Some(number);
        Some(Encoding::GzipSpan {
            blob: ByteRange::new(entry.start, encoded)?,
            skip,
            span: number,
        })
    }

    fn next_number(&self) -> Option<u32> {
        let last = self.entries.iter().rev().find_map(|entry| entry.number);
        last.map_or(Some(0), |last| last.checked_add(1))
    }

    fn ran(&mut self, run: &Run<'_>, stop: &Stop<'_>, now: Position) -> Result<bool> {
        if let Some(probe) = &mut self.probe {
            probe.encoded.extend_from_slice(run.encoded);
            // What is cut off does not tell, so all of the window is kept.
            if now.decoded.saturating_sub(probe.start) >= REACH as u64
                || probe.encoded.len() > PROBE_LEN_MAX
            {
                self.settle()?;
            }
        }
        if let Stop::Block(end) = stop
            && self
                .entries
                .last()
                .is_none_or(|last| now.decoded - last.decoded >= SPAN_LEN)
        {
            self.enter(end, run.encoded.last().copied(), now)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Begins a span where the decoder stands.
    fn enter(&mut self, end: &BlockEnd<'_>, last: Option<u8>, now: Position) -> Result<()> {
        self.settle()?;
        let partial = last.filter(|_| end.bits > 0);
        self.entries.push(Entry {
            start: now.encoded.saturating_sub(u64::from(end.bits > 0)),
            bits: end.bits,
            decoded: now.decoded,
            number: None,
            window: Vec::new(),
        });
        let window = end.window();
        // Of no window nothing is needed.
        self.probe = (!window.is_empty()).then(|| Probe {
            window,
            encoded: partial.into_iter().collect(),
            start: now.decoded,
        });
        Ok(())
    }

    /// Keeps what is needed of the last entry's window.
    fn settle(&mut self) -> Result<()> {
        let (Some(probe), Some(entry)) = (self.probe.take(), self.entries.last_mut()) else {
            return Ok(());
        };
        let window = sparse_window(&probe.encoded, entry.bits, &probe.window);
        let packer = match &mut self.packer {
            Some(packer) => packer,
            none => none.insert(Packer::fast()?),
        };
        entry.window = packer.pack(&window)?;
        Ok(())
    }

    fn finish(mut self, chunks: &[Chunk], digests: &[[u8; 32]]) -> Result<(Vec<Span>, Bytes)> {
        self.settle()?;
        let windows: usize = self.entries.iter().map(|entry| entry.window.len()).sum();
        let most = windows.saturating_add(digests.len().saturating_mul(size_of::<[u8; 32]>()));
        // Tens of MiB of a large layer: not to be moved while it grows.
        let mut spans = Spans::with_capacity(self.entries.len(), most);
        let mut of_spans = chunks
            .iter()
            .zip(digests)
            .filter_map(span_and_digest)
            .peekable();
        let mut of_span = Vec::new();
        for entry in self
            .entries
            .into_iter()
            .filter(|entry| entry.number.is_some())
        {
            of_span.clear();
            while let Some((_, digest)) = of_spans.next_if(|(span, _)| Some(*span) == entry.number)
            {
                of_span.push(*digest);
            }
            spans.push((entry.start, entry.bits), &of_span, &entry.window)?;
        }
        let (spans, details) = spans.finish();
        Ok((spans, details.into()))
    }
}

/// The number of the span that has the chunk's digest, if one has.
fn span_and_digest<'a>((chunk, digest): (&Chunk, &'a [u8; 32])) -> Option<(u32, &'a [u8; 32])> {
    match chunk.encoding {
        Encoding::GzipSpan { span, .. } => Some((span, digest)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
