//! Decoding a whole layer blob while it arrives.
//!
//! Invariant: memory is one decoder window (32 KiB for gzip, at most
//! 2^[`ZSTD_WINDOW_LOG_MAX`] bytes for zstd) and one output buffer whatever the input
//! claims, and no more than `out_max` bytes ever reach the sink. A stream counts as
//! complete only where a member or frame ends. Never hashes and never interprets.
#![warn(clippy::indexing_slicing)]

use zstd::stream::raw::{DParameter, Decoder as ZstdDecoder, InBuffer, Operation as _, OutBuffer};

use super::gzip::Inflater;
use crate::{Error, Result};

/// Bytes of a blob that [`detect`] wants to see.
pub const DETECT_LEN: usize = 4;
/// Largest zstd window that is accepted: 128 MiB. It is what `zstd` itself accepts
/// without being asked to, and the largest that its levels up to 22 write. Lower refuses
/// real layers, higher lets a blob take more memory.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Decoded bytes are handed on in pieces of at most this size, or as the sink wants them. What
/// is read of a blob to get at a piece is known to as many decoded bytes.
pub const STEP_LEN_MAX: usize = 64 << 10;

/// How the tar inside a blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
    Stored,
    /// Gzip, one member or many.
    Gzip,
    /// Zstd, one frame or many, with or without skippable frames.
    Zstd,
}

/// Tells the compression from the first [`DETECT_LEN`] bytes of a blob. A tar begins with
/// a file name, so none begins with either magic unless it is made to.
pub fn detect(head: &[u8]) -> Compression {
    match head {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        _ => Compression::Stored,
    }
}

/// Receives what the decoder does, step by step, in order.
pub type Sink<'a> = dyn FnMut(Run<'_>) -> Result<()> + 'a;

/// A [`Sink`] that answers how many decoded bytes the next step of gzip may make at most, from 1
/// to [`STEP_LEN_MAX`]: where a step ends, it is known how many encoded bytes it took.
pub type Stepping<'a> = dyn FnMut(Run<'_>) -> Result<usize> + 'a;

/// One step of a decoder.
pub struct Run<'a> {
    /// The encoded bytes it consumed, perhaps none.
    pub encoded: &'a [u8],
    /// The decoded bytes it made, perhaps none.
    pub decoded: &'a [u8],
    /// Where it stopped.
    pub stop: Stop<'a>,
}

/// Whether decoding can begin where a step stopped.
pub enum Stop<'a> {
    /// It cannot, or nothing needs to be known for it.
    Anywhere,
    /// Between two deflate blocks.
    Block(BlockEnd<'a>),
    /// Before a zstd frame, or at the end of the last.
    Frame,
}

/// The end of a deflate block, the beginning of a member's first one included.
pub struct BlockEnd<'a> {
    /// How many bits of the last consumed byte, its highest, belong to the next block.
    pub bits: u8,
    inflater: &'a Inflater,
}

impl BlockEnd<'_> {
    /// The decoded bytes of this member that the next block may refer back to, at most
    /// 32 KiB.
    pub fn window(&self) -> Vec<u8> {
        self.inflater.window()
    }
}

/// A push-style decoder of one blob.
pub struct Decoder {
    state: State,
    buffer: Vec<u8>,
    /// Decoded bytes of the next step at most.
    step_len: usize,
    out: Budget,
}

enum State {
    Stored,
    Gzip(Box<Inflater>),
    Zstd(Zstd),
}

/// Output so far and its limit.
struct Budget {
    len: u64,
    max: u64,
}

impl Decoder {
    /// A decoder that hands on at most `out_max` bytes.
    pub fn new(compression: Compression, out_max: u64) -> Result<Self> {
        let (state, buffer) = match compression {
            Compression::Stored => (State::Stored, Vec::new()),
            Compression::Gzip => {
                let inflater = Inflater::stopping_at_blocks()?;
                (State::Gzip(Box::new(inflater)), vec![0; STEP_LEN_MAX])
            }
            Compression::Zstd => (State::Zstd(Zstd::new()?), vec![0; STEP_LEN_MAX]),
        };
        let out = Budget {
            len: 0,
            max: out_max,
        };
        Ok(Self {
            state,
            buffer,
            step_len: STEP_LEN_MAX,
            out,
        })
    }

    /// Decodes `input` and hands every step to `sink`, whose errors end it.
    pub fn push(&mut self, input: &[u8], sink: &mut Sink<'_>) -> Result<()> {
        self.push_stepping(input, &mut |run| sink(run).map(|()| STEP_LEN_MAX))
    }

    /// [`Self::push`] in steps as long as `sink` wants them.
    pub fn push_stepping(&mut self, input: &[u8], sink: &mut Stepping<'_>) -> Result<()> {
        let Self {
            state,
            buffer,
            step_len,
            out,
        } = self;
        let mut rest = input;
        if input.is_empty() {
            return Ok(());
        }
        loop {
            let before = rest;
            // Whether there may be more output without more input.
            let is_full;
            let (produced, stop) = match state {
                State::Stored => {
                    for piece in input.chunks(STEP_LEN_MAX) {
                        out.spend(piece.len())?;
                        sink(Run {
                            encoded: piece,
                            decoded: piece,
                            stop: Stop::Anywhere,
                        })?;
                    }
                    return Ok(());
                }
                State::Gzip(inflater) => {
                    let room = (*step_len).clamp(1, buffer.len().max(1));
                    let produced =
                        inflater.run(&mut rest, buffer.get_mut(..room).unwrap_or_default())?;
                    is_full = produced == room;
                    let block_end = inflater.block_end();
                    let stop = block_end.map_or(Stop::Anywhere, |bits| {
                        Stop::Block(BlockEnd { bits, inflater })
                    });
                    (produced, stop)
                }
                State::Zstd(zstd) => {
                    let produced = zstd.run(&mut rest, buffer)?;
                    is_full = produced == buffer.len();
                    let stop = if zstd.at_end {
                        Stop::Frame
                    } else {
                        Stop::Anywhere
                    };
                    (produced, stop)
                }
            };
            out.spend(produced)?;
            let consumed = before.len() - rest.len();
            let is_done = rest.is_empty() && !is_full;
            // Gzip says so itself: what is left of it makes no output.
            let is_idle = consumed == 0 && produced == 0 && matches!(stop, Stop::Anywhere);
            *step_len = sink(Run {
                encoded: before.get(..consumed).unwrap_or_default(),
                decoded: buffer.get(..produced).unwrap_or_default(),
                stop,
            })?;
            if is_done || is_idle {
                return Ok(());
            }
        }
    }

    /// Decoded bytes so far.
    pub fn decoded_len(&self) -> u64 {
        self.out.len
    }

    /// Checks that the blob ended where a member or frame ends.
    pub fn finish(self) -> Result<()> {
        let (complete, what) = match &self.state {
            State::Stored => (true, "tar"),
            State::Gzip(inflater) => (inflater.at_end(), "gzip data"),
            State::Zstd(zstd) => (zstd.at_end, "zstd data"),
        };
        if complete {
            return Ok(());
        }
        Err(Error::malformed(
            what,
            format!("it is cut off after {} decoded bytes", self.out.len),
        ))
    }
}

impl Budget {
    fn spend(&mut self, bytes: usize) -> Result<()> {
        self.len = self.len.saturating_add(bytes as u64);
        if self.len > self.max {
            return Err(Error::limit(
                "decoded layer",
                format!("it is larger than {} bytes", self.max),
            ));
        }
        Ok(())
    }
}

/// Zstd frames, one after another.
pub(super) struct Zstd {
    raw: ZstdDecoder<'static>,
    /// The last byte consumed ended a frame and all its output was taken.
    at_end: bool,
}

impl Zstd {
    pub(super) fn new() -> Result<Self> {
        let mut raw = ZstdDecoder::new().map_err(zstd_error)?;
        raw.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX))
            .map_err(zstd_error)?;
        Ok(Self { raw, at_end: false })
    }

    /// One step: consumes from `input`, fills `out`, returns how many bytes of it.
    pub(super) fn run(&mut self, input: &mut &[u8], out: &mut [u8]) -> Result<usize> {
        if input.is_empty() && self.at_end {
            return Ok(0);
        }
        let mut from = InBuffer::around(input);
        let mut to = OutBuffer::around(out);
        let hint = self.raw.run(&mut from, &mut to).map_err(zstd_error)?;
        let (consumed, produced) = (from.pos(), to.pos());
        self.at_end = hint == 0;
        *input = input.get(consumed..).unwrap_or_default();
        Ok(produced)
    }
}

fn zstd_error(error: std::io::Error) -> Error {
    Error::malformed("zstd data", error.to_string())
}

#[cfg(test)]
mod tests;
