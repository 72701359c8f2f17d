//! Gzip: members one after another (RFC 1952), as gzip, pigz and eStargz write them.
//!
//! Invariant: every member that is read to its end has its CRC-32 and length checked;
//! memory is one inflate state (about 50 KiB) and what the caller asked for. The framing
//! is ours so that one inflate state serves all members of a stream: an eStargz layer has
//! one per file. Of a member that was entered in the middle, neither is checked. Never
//! accepts anything but another member after a member.
#![warn(clippy::indexing_slicing)]

use super::pieces::{fill_decoded, skip_decoded};
use super::zran::sys::RawInflate;
use crate::{Error, Result};

/// Deflate cannot expand more than this many times (a 258-byte match costs two bits).
pub(crate) const EXPANSION_MAX: u64 = 1032;

const FLAG_HEADER_CRC: u8 = 2;
const FLAG_EXTRA: u8 = 4;
const FLAG_NAME: u8 = 8;
const FLAG_COMMENT: u8 = 16;

/// Decodes the gzip member (or members) in `encoded`, drops the first `skip` decoded
/// bytes and returns the next `len`. Decoding stops there; what follows is not looked at.
/// Never allocates more than `len` bytes plus about 120 KiB, and no more than `encoded`
/// can possibly expand to.
pub fn decode_member(encoded: &[u8], skip: u64, len: u32) -> Result<Vec<u8>> {
    let possible = (encoded.len() as u64).saturating_mul(EXPANSION_MAX);
    let wanted = skip.saturating_add(u64::from(len));
    if wanted > possible {
        return Err(malformed(format!(
            "{} bytes cannot hold {wanted} decoded bytes",
            encoded.len()
        )));
    }
    let mut inflater = Inflater::new()?;
    let mut input = encoded;
    skip_decoded(&mut inflater, &mut input, skip)?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let mut out = vec![0; len];
    fill_decoded(&mut inflater, &mut input, &mut out, skip)?;
    Ok(out)
}

/// Where in a member the next input byte belongs.
enum Stage {
    /// The ten fixed bytes.
    Fixed([u8; 10], usize),
    /// Length of the extra field, little endian.
    ExtraLen([u8; 2], usize),
    /// Extra field, so many bytes left.
    Extra(u16),
    /// File name up to its NUL.
    Name,
    /// Comment up to its NUL.
    Comment,
    /// CRC of the header, so many bytes left.
    HeaderCrc(u8),
    /// Deflate data.
    Body,
    /// CRC-32 and length of the decoded bytes.
    Trailer([u8; 8], usize),
}

/// Push-style decoder of a sequence of members.
pub(super) struct Inflater {
    raw: RawInflate,
    stage: Stage,
    flags: u8,
    crc: crc32fast::Hasher,
    /// Decoded bytes of this member modulo 2^32, as the trailer counts them.
    member_len: u32,
    /// Whether this member was decoded from its beginning.
    whole: bool,
    members: u64,
    stop_at_blocks: bool,
    block_end: Option<u8>,
}

impl Inflater {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            raw: RawInflate::new().ok_or_else(no_memory)?,
            stage: Stage::Fixed([0; 10], 0),
            flags: 0,
            crc: crc32fast::Hasher::new(),
            member_len: 0,
            whole: true,
            members: 0,
            stop_at_blocks: false,
            block_end: None,
        })
    }

    /// A decoder that stops where a deflate block ends.
    pub(super) fn stopping_at_blocks() -> Result<Self> {
        Ok(Self {
            stop_at_blocks: true,
            ..Self::new()?
        })
    }

    /// A decoder inside a member: `bits` bits of `first`, its highest, come before the
    /// next input, and `window` is the output before them.
    pub(super) fn resume(bits: u8, first: u8, window: &[u8]) -> Result<Self> {
        let mut inflater = Self::new()?;
        let unused = 8_u32.saturating_sub(u32::from(bits));
        let value = first.checked_shr(unused).unwrap_or(0);
        if bits > 7 || !inflater.raw.resume(bits, value, window) {
            return Err(malformed("it cannot be entered there"));
        }
        inflater.stage = Stage::Body;
        inflater.whole = false;
        Ok(inflater)
    }

    /// Whether the last run stopped at the end of a block that is not its member's last:
    /// so many bits of the last byte belong to the next block.
    pub(super) fn block_end(&self) -> Option<u8> {
        self.block_end
    }

    /// The last decoded bytes of this member, as far as deflate may refer back to them.
    pub(super) fn window(&self) -> Vec<u8> {
        self.raw.window()
    }

    /// Decodes from `input` into `out` until one of them is used up; returns how many
    /// bytes of `out` are filled. 0 with a non-empty `out` means that all input is
    /// consumed, or that a block ended where it was asked to stop.
    pub(super) fn run(&mut self, input: &mut &[u8], out: &mut [u8]) -> Result<usize> {
        self.block_end = None;
        loop {
            if let Stage::Body = self.stage {
                let produced = self.body(input, out)?;
                let ended = !matches!(self.stage, Stage::Body);
                if produced > 0 || !ended {
                    return Ok(produced);
                }
            }
            let Some((&byte, rest)) = input.split_first() else {
                return Ok(0);
            };
            *input = rest;
            self.framing(byte)?;
            // The library tells of the ends of blocks only, not of where the first begins.
            if self.stop_at_blocks && matches!(self.stage, Stage::Body) {
                self.block_end = Some(0);
                return Ok(0);
            }
        }
    }

    /// Whether the input ended where a member ended.
    pub(super) fn at_end(&self) -> bool {
        self.members > 0 && matches!(self.stage, Stage::Fixed(_, 0))
    }

    fn body(&mut self, input: &mut &[u8], out: &mut [u8]) -> Result<usize> {
        loop {
            let step = self.raw.run(input, out, self.stop_at_blocks);
            let step = step.ok_or_else(|| malformed("its deflate data is damaged"))?;
            *input = input.get(step.consumed..).unwrap_or_default();
            let decoded = out.get(..step.produced).unwrap_or_default();
            self.crc.update(decoded);
            self.member_len = self
                .member_len
                .wrapping_add(u32::try_from(step.produced).unwrap_or(u32::MAX));
            self.block_end = step.block_end;
            if step.ended {
                self.stage = Stage::Trailer([0; 8], 0);
                return Ok(step.produced);
            }
            if step.produced > 0 || step.block_end.is_some() || input.is_empty() || out.is_empty() {
                return Ok(step.produced);
            }
            if step.consumed == 0 {
                return Err(malformed("its deflate data does not advance"));
            }
        }
    }

    fn framing(&mut self, byte: u8) -> Result<()> {
        match &mut self.stage {
            Stage::Fixed(bytes, filled) => {
                if fill(bytes, filled, byte) {
                    let header = *bytes;
                    self.begin(header)?;
                }
            }
            Stage::ExtraLen(bytes, filled) => {
                if fill(bytes, filled, byte) {
                    self.stage = Stage::Extra(u16::from_le_bytes(*bytes));
                    self.skip_empty();
                }
            }
            Stage::Extra(left) => {
                *left = left.saturating_sub(1);
                self.skip_empty();
            }
            Stage::Name if byte == 0 => self.after_name(),
            Stage::Comment if byte == 0 => self.after_comment(),
            Stage::Name | Stage::Comment | Stage::Body => {}
            Stage::HeaderCrc(left) => {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    self.stage = Stage::Body;
                }
            }
            Stage::Trailer(bytes, filled) => {
                if fill(bytes, filled, byte) {
                    let trailer = *bytes;
                    self.end(trailer)?;
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, header: [u8; 10]) -> Result<()> {
        let [0x1f, 0x8b, method, flags, ..] = header else {
            return Err(malformed(if self.members == 0 {
                "it does not begin with a gzip header".to_owned()
            } else {
                format!(
                    "after {} members comes something that is not gzip",
                    self.members
                )
            }));
        };
        if method != 8 {
            return Err(malformed(format!("unknown compression method {method}")));
        }
        if flags & 0xe0 != 0 {
            return Err(malformed(format!(
                "reserved header flags {flags:#04x} are set"
            )));
        }
        self.flags = flags;
        if flags & FLAG_EXTRA != 0 {
            self.stage = Stage::ExtraLen([0; 2], 0);
        } else {
            self.after_extra();
        }
        Ok(())
    }

    fn skip_empty(&mut self) {
        if let Stage::Extra(0) = self.stage {
            self.after_extra();
        }
    }

    fn after_extra(&mut self) {
        if self.flags & FLAG_NAME != 0 {
            self.stage = Stage::Name;
        } else {
            self.after_name();
        }
    }

    fn after_name(&mut self) {
        if self.flags & FLAG_COMMENT != 0 {
            self.stage = Stage::Comment;
        } else {
            self.after_comment();
        }
    }

    fn after_comment(&mut self) {
        self.stage = if self.flags & FLAG_HEADER_CRC != 0 {
            Stage::HeaderCrc(2)
        } else {
            Stage::Body
        };
    }

    fn end(&mut self, trailer: [u8; 8]) -> Result<()> {
        let [c0, c1, c2, c3, l0, l1, l2, l3] = trailer;
        let crc = std::mem::take(&mut self.crc).finalize();
        let whole = std::mem::replace(&mut self.whole, true);
        if whole && crc != u32::from_le_bytes([c0, c1, c2, c3]) {
            return Err(malformed("the CRC-32 of a member does not match its data"));
        }
        if whole && self.member_len != u32::from_le_bytes([l0, l1, l2, l3]) {
            return Err(malformed("the length of a member does not match its data"));
        }
        if !self.raw.reset() {
            return Err(no_memory());
        }
        self.member_len = 0;
        self.members += 1;
        self.stage = Stage::Fixed([0; 10], 0);
        Ok(())
    }
}

/// Puts `byte` at `filled`; true once `bytes` is full.
fn fill(bytes: &mut [u8], filled: &mut usize, byte: u8) -> bool {
    if let Some(slot) = bytes.get_mut(*filled) {
        *slot = byte;
    }
    *filled += 1;
    *filled >= bytes.len()
}

fn no_memory() -> Error {
    Error::limit("gzip data", "there is no memory for an inflate state")
}

pub(super) fn malformed(detail: impl Into<String>) -> Error {
    Error::malformed("gzip data", detail)
}

#[cfg(test)]
mod tests;
