//! The stream of headers and payloads, taken apart piece by piece.
//!
//! Invariant: consumes its input in order and keeps at most one header and one extended
//! header of [`META_LEN_MAX`] bytes. After an error it must not be used again.
#![warn(clippy::indexing_slicing)]

use super::BLOCK_LEN;
use super::header::Header;
use super::pax::Overrides;
use crate::index::{FileEntry, FileKind, Timestamp, path};
use crate::{Error, Result};

/// Largest extended header that is kept. Real ones hold a few paths and xattrs; the
/// largest xattr that Linux has is 64 KiB.
const META_LEN_MAX: u64 = 1 << 20;

/// What the next bytes of the stream are.
#[derive(Debug)]
pub enum Step<'i> {
    /// All input is consumed.
    NeedInput,
    /// An entry. A regular file's payload of its `size` follows; its `data_offset` is not
    /// yet set (0).
    Entry(FileEntry),
    /// The next bytes of the last entry's payload, never empty.
    Data(&'i [u8]),
    /// The payload of the last regular file of at least one byte is complete.
    EndOfFile,
}

/// What an extended header is about.
#[derive(Debug, Clone, Copy)]
enum Meta {
    Pax,
    GlobalPax,
    LongName,
    LongLink,
}

#[expect(
    clippy::large_enum_variant,
    reason = "there is one per layer; boxing would allocate for every header"
)]
enum State {
    Header {
        block: [u8; BLOCK_LEN],
        filled: usize,
    },
    Meta {
        kind: Meta,
        left: u64,
        padding: u64,
        bytes: Vec<u8>,
    },
    Data {
        left: u64,
        padding: u64,
    },
    Padding {
        left: u64,
    },
    /// Two zero blocks came. What follows them is padding of the medium.
    Ended,
}

/// A tar stream being read.
pub struct Parser {
    state: State,
    /// The layer, for messages.
    what: String,
    /// Position in the stream, for messages.
    at: u64,
    zero_blocks: u32,
    global: Overrides,
    pax: Option<Overrides>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Parser {
    /// At the start of the tar of `what`.
    pub fn new(what: String) -> Self {
        Self {
            state: State::header(),
            what,
            at: 0,
            zero_blocks: 0,
            global: Overrides::default(),
            pax: None,
            long_name: None,
            long_link: None,
        }
    }

    /// Consumes from the start of `input` and says what it was.
    pub fn step<'i>(&mut self, input: &mut &'i [u8]) -> Result<Step<'i>> {
        loop {
            match &mut self.state {
                State::Data { left: 0, padding } => {
                    self.state = State::Padding { left: *padding };
                    return Ok(Step::EndOfFile);
                }
                State::Padding { left: 0 } => self.state = State::header(),
                State::Meta { left: 0, .. } => self.end_meta()?,
                _ if input.is_empty() => return Ok(Step::NeedInput),
                State::Header { block, filled } => {
                    let piece = take(input, (BLOCK_LEN - *filled) as u64, &mut self.at);
                    if let Some(slot) = block.get_mut(*filled..*filled + piece.len()) {
                        slot.copy_from_slice(piece);
                    }
                    *filled += piece.len();
                    if *filled == BLOCK_LEN {
                        let block = *block;
                        if let Some(entry) = self.header(&block)? {
                            return Ok(Step::Entry(entry));
                        }
                    }
                }
                State::Meta { left, bytes, .. } => {
                    let piece = take(input, *left, &mut self.at);
                    *left -= piece.len() as u64;
                    bytes.extend_from_slice(piece);
                }
                State::Data { left, .. } => {
                    let piece = take(input, *left, &mut self.at);
                    *left -= piece.len() as u64;
                    return Ok(Step::Data(piece));
                }
                State::Padding { left } => {
                    *left -= take(input, *left, &mut self.at).len() as u64;
                }
                State::Ended => {
                    take(input, u64::MAX, &mut self.at);
                }
            }
        }
    }

    /// How many bytes of the payload that passes are left; 0 where none passes.
    pub fn payload_left(&self) -> u64 {
        match &self.state {
            State::Data { left, .. } => *left,
            State::Header { .. } | State::Meta { .. } | State::Padding { .. } | State::Ended => 0,
        }
    }

    /// Checks that the stream ended where an entry ended. The two zero blocks may be
    /// missing, and what fills the last payload's block: some writers leave them out, and
    /// digests guard against a cut.
    pub fn finish(self) -> Result<()> {
        let complete = match &self.state {
            State::Header { filled, .. } => *filled == 0,
            State::Padding { .. } | State::Ended => true,
            State::Meta { .. } | State::Data { .. } => false,
        };
        if complete && self.pax.is_none() && self.long_name.is_none() && self.long_link.is_none() {
            return Ok(());
        }
        Err(self.malformed("it is cut off"))
    }

    fn header(&mut self, block: &[u8; BLOCK_LEN]) -> Result<Option<FileEntry>> {
        if block.iter().all(|byte| *byte == 0) {
            self.zero_blocks += 1;
            self.state = if self.zero_blocks == 2 {
                State::Ended
            } else {
                State::header()
            };
            return Ok(None);
        }
        if self.zero_blocks > 0 {
            return Err(self.malformed("a header follows a single zero block"));
        }
        let header = Header::read(block).map_err(|rule| self.malformed(&rule))?;
        let meta = match header.type_flag {
            b'x' | b'X' => Meta::Pax,
            b'g' => Meta::GlobalPax,
            b'L' => Meta::LongName,
            b'K' => Meta::LongLink,
            _ => return self.entry(header).map(Some),
        };
        if header.size > META_LEN_MAX {
            return Err(Error::limit(
                format!("tar of {}", self.what),
                format!(
                    "an extended header has {} bytes of at most {META_LEN_MAX}",
                    header.size
                ),
            ));
        }
        self.state = State::Meta {
            kind: meta,
            left: header.size,
            padding: padding(header.size),
            bytes: Vec::new(),
        };
        Ok(None)
    }

    fn end_meta(&mut self) -> Result<()> {
        let state = std::mem::replace(&mut self.state, State::header());
        let State::Meta {
            kind,
            padding,
            bytes,
            ..
        } = state
        else {
            return Ok(());
        };
        let until_nul = |bytes: &[u8]| bytes.split(|byte| *byte == 0).next().map(<[u8]>::to_vec);
        match kind {
            Meta::LongName => self.long_name = until_nul(&bytes),
            Meta::LongLink => self.long_link = until_nul(&bytes),
            Meta::Pax => {
                let mut pax = self.pax.take().unwrap_or_else(|| self.global.clone());
                pax.apply(&bytes).map_err(|rule| self.malformed(&rule))?;
                self.pax = Some(pax);
            }
            Meta::GlobalPax => {
                let mut global = std::mem::take(&mut self.global);
                global.apply(&bytes).map_err(|rule| self.malformed(&rule))?;
                self.global = global;
            }
        }
        self.state = State::Padding { left: padding };
        Ok(())
    }

    /// Joins a header with the extended headers before it.
    fn entry(&mut self, header: Header) -> Result<FileEntry> {
        let pax = self.pax.take().unwrap_or_else(|| self.global.clone());
        let long_name = self.long_name.take();
        let name = pax.path.or(long_name).unwrap_or(header.name);
        let long_link = self.long_link.take();
        let link = pax.link_path.or(long_link).unwrap_or(header.link_name);
        let path = self.normalize(&name, &name)?;
        if pax.sparse || header.type_flag == b'S' {
            return Err(self.unsupported(
                &name,
                "it is a sparse file; build the layer without --sparse",
            ));
        }
        let size = pax.size.unwrap_or(header.size);
        let kind = match header.type_flag {
            b'0' | 0 if name.ends_with(b"/") => FileKind::Directory,
            b'0' | 0 | b'7' => FileKind::Regular {
                size,
                data_offset: 0,
            },
            b'1' => FileKind::Hardlink {
                target: self.normalize(&link, &name)?,
            },
            b'2' => FileKind::Symlink { target: link },
            b'3' => FileKind::CharDevice {
                major: header.major,
                minor: header.minor,
            },
            b'4' => FileKind::BlockDevice {
                major: header.major,
                minor: header.minor,
            },
            b'5' => FileKind::Directory,
            b'6' => FileKind::Fifo,
            other => {
                let rule = format!(
                    "its type is {:?}, which no layer should have",
                    char::from(other)
                );
                return Err(self.unsupported(&name, &rule));
            }
        };
        self.state = match kind {
            FileKind::Regular { size, .. } if size > 0 => State::Data {
                left: size,
                padding: padding(size),
            },
            _ => State::header(),
        };
        Ok(FileEntry {
            path,
            kind,
            mode: header.mode,
            uid: pax.uid.unwrap_or(header.uid),
            gid: pax.gid.unwrap_or(header.gid),
            mtime: pax.mtime.unwrap_or(Timestamp {
                secs: header.mtime,
                nanos: 0,
            }),
            xattrs: pax.xattrs,
        })
    }

    fn normalize(&self, raw: &[u8], name: &[u8]) -> Result<Vec<u8>> {
        path::normalize(raw)
            .map_err(|rule| self.malformed(&format!("{}: {rule}", path::show(name))))
    }

    fn malformed(&self, rule: &str) -> Error {
        Error::malformed(
            format!("tar of {}", self.what),
            format!("{rule} (before byte {})", self.at),
        )
    }

    fn unsupported(&self, name: &[u8], rule: &str) -> Error {
        Error::Unsupported {
            what: format!("file {} of {}", path::show(name), self.what),
            detail: rule.to_owned(),
        }
    }
}

impl State {
    fn header() -> Self {
        Self::Header {
            block: [0; BLOCK_LEN],
            filled: 0,
        }
    }
}

/// Zeros between a payload of `len` bytes and the next header.
fn padding(len: u64) -> u64 {
    len.wrapping_neg() % BLOCK_LEN as u64
}

/// Takes up to `max` bytes off the front of `input` and counts them.
fn take<'i>(input: &mut &'i [u8], max: u64, at: &mut u64) -> &'i [u8] {
    let len = usize::try_from(max).map_or(input.len(), |max| max.min(input.len()));
    let (piece, rest) = input.split_at_checked(len).unwrap_or((*input, &[]));
    *input = rest;
    *at = at.saturating_add(piece.len() as u64);
    piece
}
