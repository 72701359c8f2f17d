//! A plain layer, streamed in full: its index is made while its bytes pass.
//!
//! Encoded bytes go in; payloads come out at their places in the data file, and at the end
//! an index whose chunks are hashed and, as far as the compression allows, can be fetched
//! alone from then on (`locate`). Invariant: [`Ingest::finish`] returns an index only
//! if the blob has its digest and size and the tar its diff_id; what the sink got before
//! that is not to be trusted. Memory is bounded by the decoder, the tar parser and the
//! limits on a layer's tables, whatever the size of the layer.

mod locate;
mod writer;

use bytes::Bytes;

use self::locate::Locator;
use self::writer::{Work, Writer};
use super::path::is_format_file;
use super::seams::{Recorder, Seam};
use super::tables::Tables;
use super::tar::{Parser, Step};
use super::{FileKind, LayerBlob, LayerFormat, LayerIndex};
use crate::codec::{self, stream};
use crate::types::{Digest, Hasher};
use crate::{Error, Result};

/// Decoded bytes per chunk where chunks can be fetched again. A start reads files in
/// places: pieces of this size bring hardly more than it needs.
pub const PIECE_LEN: u32 = 64 << 10;
/// Decoded bytes per chunk where the layer can only be streamed anew.
pub const STREAM_CHUNK_LEN: u32 = 1 << 20;
/// Decoded bytes of one step of gzip at least. How far the encoded bytes of a chunk reach is
/// known to this many decoded bytes, and what a start reads too much of them adds up; shorter
/// steps take more time.
const STEP_LEN_MIN: usize = 8 << 10;
/// Most decoded bytes of one layer unless a plan says otherwise. No real layer comes
/// near; a bomb of 1 GiB of gzip would make a TiB.
pub const DECODED_LEN_MAX: u64 = 256 << 30;

/// What is known of a layer before its first byte comes.
#[derive(Debug, Clone)]
pub struct IngestPlan {
    blob_digest: Digest,
    blob_size: u64,
    diff_id: Option<Digest>,
    decoded_len_max: u64,
}

impl IngestPlan {
    /// A layer of `blob_size` encoded bytes. `diff_id` is the digest of its tar, where a
    /// config names one.
    pub fn new(blob_digest: Digest, blob_size: u64, diff_id: Option<Digest>) -> Self {
        Self {
            blob_digest,
            blob_size,
            diff_id,
            decoded_len_max: DECODED_LEN_MAX,
        }
    }

    /// Changes how many decoded bytes are accepted.
    #[must_use]
    pub fn decoded_len_max(self, bytes: u64) -> Self {
        Self {
            decoded_len_max: bytes,
            ..self
        }
    }
}

/// Where payloads go. Bytes come in ascending order of offset, each once; what lies
/// between payloads is never written and reads as zeros.
pub trait LayerSink {
    /// Writes `bytes` at `data_offset` of the layer's data file. An error ends the ingest.
    fn write_at(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()>;
}

/// A layer that was streamed.
pub struct Ingested<S> {
    /// Its tables.
    pub index: LayerIndex,
    /// The details of its spans, one after another.
    pub details: Bytes,
    /// What it takes to shape the index later ([`super::seams`]), where it can be shaped.
    pub seams: Option<Vec<u8>>,
    /// Where its payloads went.
    pub sink: S,
}

/// A layer being streamed.
pub struct Ingest<S> {
    plan: IngestPlan,
    received: u64,
    blob_hasher: Hasher,
    /// First bytes of the blob, until there are enough to tell its compression.
    head: Vec<u8>,
    decoder: Option<(stream::Compression, stream::Decoder)>,
    unpack: Unpack<S>,
    /// Why the content is unusable. Told only once the blob turned out to be the right
    /// one: damage on the way is no fault of the image.
    broken: Option<Error>,
}

impl<S: LayerSink> Ingest<S> {
    /// Ready for the first byte.
    pub fn new(plan: IngestPlan, sink: S) -> Self {
        let what = format!("layer {}", plan.blob_digest);
        Self {
            received: 0,
            blob_hasher: Hasher::new(plan.blob_digest.algorithm()),
            head: Vec::with_capacity(stream::DETECT_LEN),
            decoder: None,
            unpack: Unpack {
                parser: Some(Parser::new(what.clone())),
                tables: Tables::new(what),
                locator: Locator::Stored,
                recorder: None,
                at: Position::default(),
                reach: 0,
                file: Payload::None,
                writer: Writer::new(Work::new(
                    plan.diff_id.as_ref().map(Digest::algorithm),
                    sink,
                )),
            },
            broken: None,
            plan,
        }
    }

    /// Takes the next encoded bytes. Errors of limits come back at once, those of the sink
    /// soon; errors of content wait for [`Ingest::finish`].
    pub fn push(&mut self, encoded: &[u8]) -> Result<()> {
        self.received = self.received.saturating_add(encoded.len() as u64);
        if self.received > self.plan.blob_size {
            return Err(self.wrong_size("more than"));
        }
        self.blob_hasher.update(encoded);
        if self.broken.is_some() {
            return Ok(());
        }
        let outcome = self.decode(encoded);
        self.keep_content_error(outcome)
    }

    /// Checks size and digests, and returns what was made of the layer.
    pub fn finish(mut self) -> Result<Ingested<S>> {
        if self.received < self.plan.blob_size {
            return Err(self.wrong_size("only"));
        }
        let hasher = std::mem::replace(
            &mut self.blob_hasher,
            Hasher::new(self.plan.blob_digest.algorithm()),
        );
        let blob_digest = self.plan.blob_digest;
        codec::verify_stream(|| format!("layer {blob_digest}"), &blob_digest, hasher)?;
        if let Some(error) = self.broken {
            return Err(error);
        }
        if self.decoder.is_none() {
            self.start()?;
        }
        let format = match self.decoder {
            Some((compression, decoder)) => {
                decoder.finish().map_err(|e| in_layer(&blob_digest, e))?;
                format_of(compression)
            }
            None => LayerFormat::Tar,
        };
        let blob = LayerBlob {
            digest: blob_digest,
            size: self.plan.blob_size,
            format,
        };
        self.unpack.finish(blob, self.plan.diff_id.as_ref())
    }

    fn decode(&mut self, encoded: &[u8]) -> Result<()> {
        if self.decoder.is_some() {
            return self.feed(encoded);
        }
        let missing = stream::DETECT_LEN.saturating_sub(self.head.len());
        let (head, rest) = encoded.split_at_checked(missing).unwrap_or((encoded, &[]));
        self.head.extend_from_slice(head);
        if self.head.len() < stream::DETECT_LEN {
            return Ok(());
        }
        self.start()?;
        self.feed(rest)
    }

    /// Chooses the decoder and feeds it the first bytes.
    fn start(&mut self) -> Result<()> {
        let compression = stream::detect(&self.head);
        if compression == stream::Compression::Stored
            && self
                .plan
                .diff_id
                .is_some_and(|diff_id| diff_id == self.plan.blob_digest)
        {
            // The blob is the tar: one hash says both.
            self.unpack.writer.hash_nothing();
            self.plan.diff_id = None;
        }
        let decoder = stream::Decoder::new(compression, self.plan.decoded_len_max)?;
        self.unpack.locator = Locator::new(compression);
        self.unpack.recorder = match compression {
            stream::Compression::Gzip => Some(Recorder::new()?),
            stream::Compression::Stored | stream::Compression::Zstd => None,
        };
        self.decoder = Some((compression, decoder));
        let head = std::mem::take(&mut self.head);
        self.feed(&head)
    }

    fn feed(&mut self, encoded: &[u8]) -> Result<()> {
        let unpack = &mut self.unpack;
        match &mut self.decoder {
            Some((_, decoder)) => decoder.push_stepping(encoded, &mut |run| {
                unpack.push(&run)?;
                Ok(unpack.step_len())
            }),
            None => Ok(()),
        }
    }

    fn keep_content_error(&mut self, outcome: Result<()>) -> Result<()> {
        match outcome {
            Err(error @ (Error::Malformed { .. } | Error::Unsupported { .. })) => {
                self.broken = Some(in_layer(&self.plan.blob_digest, error));
                Ok(())
            }
            other => other,
        }
    }

    fn wrong_size(&self, how: &str) -> Error {
        Error::malformed(
            format!("layer {}", self.plan.blob_digest),
            format!(
                "{how} {} bytes came of the {} that its manifest promises",
                self.received.min(self.plan.blob_size),
                self.plan.blob_size
            ),
        )
    }
}

impl<S: LayerSink + Send + 'static> Ingest<S> {
    /// The same, that makes the digest of the tar and writes to the sink on a thread beside
    /// the caller's. The sink sees what it would see without.
    #[must_use]
    pub fn beside(mut self) -> Self {
        self.unpack.writer = self.unpack.writer.beside();
        self
    }
}

/// Names the layer in an error of a decoder, which knows of none.
fn in_layer(blob_digest: &Digest, error: Error) -> Error {
    match error {
        Error::Malformed { what, detail } if !what.contains("layer") => {
            Error::malformed(format!("{what} of layer {blob_digest}"), detail)
        }
        other => other,
    }
}

fn format_of(compression: stream::Compression) -> LayerFormat {
    match compression {
        stream::Compression::Stored => LayerFormat::Tar,
        stream::Compression::Gzip => LayerFormat::Gzip,
        stream::Compression::Zstd => LayerFormat::Zstd,
    }
}

/// How far the blob is.
#[derive(Debug, Clone, Copy, Default)]
struct Position {
    /// Encoded bytes.
    encoded: u64,
    /// Decoded bytes.
    decoded: u64,
}

/// The decoded side: tar to tables and payloads.
struct Unpack<S> {
    parser: Option<Parser>,
    tables: Tables,
    locator: Locator,
    /// Of gzip.
    recorder: Option<Recorder>,
    /// After the step that is being looked at.
    at: Position,
    /// How far the blob has to be read for what that step decoded.
    reach: u64,
    file: Payload,
    writer: Writer<S>,
}

/// What to do with the payload that is passing.
enum Payload {
    /// Nothing passes.
    None,
    /// It belongs to the format, not to the image.
    Dropped,
    /// It is kept; a chunk begins with its next byte.
    Kept,
    /// It is kept; the chunk so far, its first byte's place in the tar and its full length.
    Chunk { len: u32, start: u64, len_max: u32 },
}

impl<S: LayerSink> Unpack<S> {
    fn push(&mut self, run: &stream::Run<'_>) -> Result<()> {
        let before = self.at;
        self.at.encoded = before.encoded.saturating_add(run.encoded.len() as u64);
        self.at.decoded = before.decoded.saturating_add(run.decoded.len() as u64);
        self.reach = self.locator.reach(run, self.at);
        self.writer.push(run.decoded)?;
        self.tar(run.decoded)?;
        let is_entered = self.locator.ran(run, self.at)?;
        if let (Some(recorder), stream::Stop::Block(end)) = (&mut self.recorder, &run.stop) {
            let seam = Seam {
                start: self.at.encoded.saturating_sub(u64::from(end.bits > 0)),
                bits: end.bits,
                decoded: self.at.decoded,
            };
            recorder.seam(seam, is_entered);
        }
        Ok(())
    }

    /// How many decoded bytes are wanted next: as many as end the chunk that passes, so that it
    /// is known how far its encoded bytes reach, or few, where it is not known what comes.
    fn step_len(&self) -> usize {
        let left = self.parser.as_ref().map_or(0, Parser::payload_left);
        let room = match self.file {
            Payload::Chunk { len, len_max, .. } => len_max.saturating_sub(len),
            Payload::Kept => PIECE_LEN,
            Payload::None | Payload::Dropped => 0,
        };
        let wanted = usize::try_from(left.min(u64::from(room))).unwrap_or(usize::MAX);
        wanted.clamp(STEP_LEN_MIN, stream::STEP_LEN_MAX)
    }

    /// Takes note of what passed of `tar` since the last payload, before `left` bytes of it.
    fn gap(&mut self, tar: &[u8], passed: usize, left: usize) -> Result<()> {
        let gap = tar.get(passed..tar.len().saturating_sub(left));
        match &mut self.recorder {
            Some(recorder) => recorder.gap(gap.unwrap_or_default()),
            None => Ok(()),
        }
    }

    fn tar(&mut self, tar: &[u8]) -> Result<()> {
        let Some(mut parser) = self.parser.take() else {
            return Ok(());
        };
        let mut input = tar;
        // Bytes that were payload or are noted as none.
        let mut passed = 0;
        loop {
            match parser.step(&mut input)? {
                Step::NeedInput => break,
                Step::Entry(entry) => {
                    if is_format_file(&entry.path) {
                        self.file = Payload::Dropped;
                        continue;
                    }
                    self.file = match entry.kind {
                        FileKind::Regular { .. } => Payload::Kept,
                        _ => Payload::None,
                    };
                    self.tables.file(entry)?;
                }
                Step::Data(bytes) => {
                    let behind = bytes.len() + input.len();
                    if matches!(self.file, Payload::Kept | Payload::Chunk { .. }) {
                        self.gap(tar, passed, behind)?;
                        passed = tar.len().saturating_sub(input.len());
                        self.recorder.iter_mut().for_each(Recorder::payload);
                    }
                    self.data(bytes, self.at.decoded.saturating_sub(behind as u64))?;
                }
                Step::EndOfFile => {
                    self.end_chunk();
                    self.file = Payload::None;
                }
            }
        }
        self.parser = Some(parser);
        self.gap(tar, passed, input.len())
    }

    /// Takes payload whose first byte is at `at` of the tar.
    fn data(&mut self, bytes: &[u8], mut at: u64) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if matches!(self.file, Payload::Kept) {
                self.file = Payload::Chunk {
                    len: 0,
                    start: at,
                    len_max: self.locator.chunk_len(at),
                };
            }
            let Payload::Chunk { len, len_max, .. } = &mut self.file else {
                return Ok(());
            };
            let room = usize::try_from(*len_max - *len).unwrap_or(usize::MAX);
            let (piece, after) = rest.split_at_checked(room).unwrap_or((rest, &[]));
            let data_offset = self.tables.chunk_offset() + u64::from(*len);
            self.writer.write(at, piece.len(), data_offset);
            *len = len.saturating_add(u32::try_from(piece.len()).unwrap_or(u32::MAX));
            at = at.saturating_add(piece.len() as u64);
            if *len == *len_max {
                self.end_chunk();
            }
            rest = after;
        }
        Ok(())
    }

    /// Records the chunk that passed, if there is one.
    fn end_chunk(&mut self) {
        match std::mem::replace(&mut self.file, Payload::Kept) {
            Payload::Chunk { len, start, .. } => {
                self.writer.end_chunk(start.saturating_add(u64::from(len)));
                let encoding = self.locator.chunk(start, len, self.reach);
                // Its digest is with the writer until the end.
                self.tables.chunk_of_span(encoding, len, None);
            }
            other => self.file = other,
        }
    }

    fn finish(mut self, blob: LayerBlob, diff_id: Option<&Digest>) -> Result<Ingested<S>> {
        let Work {
            hasher,
            chunk_digests,
            sink,
        } = self.writer.finish()?;
        if let (Some(expected), Some(actual)) = (diff_id, hasher.finish()) {
            let what = || format!("tar of layer {} (its diff_id)", blob.digest);
            codec::verify_digest(what, expected, actual)?;
        }
        if let Some(parser) = self.parser {
            parser.finish()?;
        }
        let chunks = self.tables.chunks_mut();
        let (spans, details) = self.locator.finish(chunks, &chunk_digests)?;
        let seams = match self.recorder {
            Some(recorder) => recorder.finish(&blob.digest)?,
            None => None,
        };
        Ok(Ingested {
            index: self.tables.finish_with(blob, spans)?,
            details,
            seams,
            sink,
        })
    }
}

#[cfg(test)]
mod tests;
