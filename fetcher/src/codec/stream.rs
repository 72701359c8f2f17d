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
/// Decoded bytes are handed on in pieces of at most this size.
const BUFFER_LEN: usize = 128 << 10;

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

/// Receives decoded bytes, in order.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// A push-style decoder of one blob.
pub struct Decoder {
    state: State,
    buffer: Vec<u8>,
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
            Compression::Gzip => (State::Gzip(Box::new(Inflater::new())), vec![0; BUFFER_LEN]),
            Compression::Zstd => (State::Zstd(Zstd::new()?), vec![0; BUFFER_LEN]),
        };
        let out = Budget {
            len: 0,
            max: out_max,
        };
        Ok(Self { state, buffer, out })
    }

    /// Decodes `input` and hands every decoded byte to `sink`, whose errors end it.
    pub fn push(&mut self, input: &[u8], sink: &mut Sink<'_>) -> Result<()> {
        let Self { state, buffer, out } = self;
        let mut input = input;
        if input.is_empty() {
            return Ok(());
        }
        match state {
            State::Stored => {
                out.spend(input.len())?;
                sink(input)
            }
            State::Gzip(inflater) => loop {
                let produced = inflater.run(&mut input, buffer)?;
                if produced == 0 {
                    return Ok(());
                }
                out.spend(produced)?;
                sink(buffer.get(..produced).unwrap_or_default())?;
            },
            State::Zstd(zstd) => loop {
                let produced = zstd.run(&mut input, buffer)?;
                out.spend(produced)?;
                sink(buffer.get(..produced).unwrap_or_default())?;
                if input.is_empty() && produced < buffer.len() {
                    return Ok(());
                }
            },
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
