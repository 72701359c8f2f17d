//! What the mount server, daemons, successors and the guard say to each other, one datagram
//! (`SOCK_SEQPACKET`) per message.
//!
//! Invariant: [`decode`] returns a message only if all of the datagram makes sense: magic,
//! version, kind, length, checksum, every limit, nothing left over. Descriptors travel
//! beside the bytes; how many a message has is [`Message::descriptors`].
//!
//! ```text
//!  0  magic     "LZMD"
//!  4  version   u16, 1; another one is another protocol
//!  6  kind      u16, see below
//!  8  length    u32, bytes of the body
//! 12  checksum  u32, CRC-32 of bytes 0..12 and of the body
//! 16  body      little endian; a text is its length (u16) and its bytes
//!
//! kind              from      body                                        descriptors
//!  1 Hello          client    role u8
//!  2 Mount          daemon    request u64, size u64, name, path           data, number
//!  3 Attach         daemon    request u64, mount u64, dev u64, ino u64
//!  4 Unmount        daemon    request u64, mount u64
//!  5 Grant          daemon    want u64, mount u64, number u64, start u64, end u64
//!  6 Failed         daemon    want u64, mount u64, errno u32
//!  7 Taken          successor (all that was handed over has arrived)
//! 32 Welcome        server    mounts u32, so many Listed follow
//! 33 Listed         server    mount u64, size u64, name, path
//! 34 Done           server    request u64, mount u64, errno u32, 0 if it worked
//! 35 Want           server    want u64, mount u64, start u64, end u64
//! 64 Handed         holder    mount u64, size u64, trust u8, number u64,  fuse, data, number
//!                             name, path, count u32, count * (start u64, end u64)
//! 65 HandedAll      server    next mount u64, guarded u8                  listener, and guard if so
//! 66 Dropped        server    mount u64, to the guard
//! 67 HandedByGuard  guard     next mount u64
//! ```

mod reader;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use self::reader::Reader;
use crate::ranges::{SPANS_MAX, Span};

const MAGIC: [u8; 4] = *b"LZMD";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 16;

/// Longest name of a layer: a sha512 digest with its algorithm is 135 bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest mountpoint: the kernel's longest path.
pub const PATH_BYTES_MAX: usize = 4095;
/// Longest datagram: a hand-over with as many spans as a mount remembers.
pub const DATAGRAM_BYTES_MAX: usize = SPANS_MAX * 16 + PATH_BYTES_MAX + NAME_BYTES_MAX + 128;
/// Most descriptors beside a datagram.
pub const DESCRIPTORS_MAX: usize = 3;
/// Largest data file: what a FUSE file may be.
pub const SIZE_MAX: u64 = i64::MAX as u64 / 2;

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Not this protocol, or not this version of it.
    #[error("not version 1 of the mount server's protocol")]
    Foreign,
    /// Its checksum or length is wrong.
    #[error("a message was damaged on its way")]
    Damaged,
    /// A field is missing, beyond its limit, or more follows the last one.
    #[error("a message of kind {0} breaks its format")]
    Body(u16),
}

/// What a client comes for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// To mount layers and answer wants. One at a time.
    Daemon,
    /// To take everything over.
    Successor,
    /// To see what is mounted.
    Guest,
}

/// Which file it is. What a daemon grants is about the data file that it has open; a layer
/// that was removed and fetched again is another file under the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    /// Its device.
    pub dev: u64,
    /// Its inode.
    pub ino: u64,
}

impl FileId {
    /// Of an open file.
    pub fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            dev: meta.dev(),
            ino: meta.ino(),
        })
    }
}

/// A mount as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its number at this server.
    pub mount: u64,
    /// Bytes of the file that is shown, at most [`SIZE_MAX`]: the data file, up to the end of
    /// its last block of 4096.
    pub size: u64,
    /// The layer, as the daemon calls it (its digest).
    pub name: Vec<u8>,
    /// The mountpoint, absolute.
    pub path: Vec<u8>,
}

/// On what the granted bytes of a mount stand; see [`crate::state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// On the store's number of evictions.
    Number(u64),
    /// On a lock that keeps everybody from evicting.
    Lock,
}

/// One mount, from whoever held it to whoever holds it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handed {
    /// Which.
    pub listed: Listed,
    /// On what `granted` stands.
    pub basis: Basis,
    /// Bytes that may be served.
    pub granted: Vec<Span>,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the table above says it")]
pub enum Message {
    Hello(Role),
    Mount {
        request: u64,
        size: u64,
        name: Vec<u8>,
        path: Vec<u8>,
    },
    Attach {
        request: u64,
        mount: u64,
        file: FileId,
    },
    Unmount {
        request: u64,
        mount: u64,
    },
    Grant {
        want: u64,
        mount: u64,
        number: u64,
        span: Span,
    },
    Failed {
        want: u64,
        mount: u64,
        errno: u32,
    },
    Taken,
    Welcome {
        mounts: u32,
    },
    Listed(Listed),
    Done {
        request: u64,
        mount: u64,
        errno: u32,
    },
    Want {
        want: u64,
        mount: u64,
        span: Span,
    },
    Handed(Handed),
    HandedAll {
        next_mount: u64,
        guarded: bool,
    },
    Dropped {
        mount: u64,
    },
    HandedByGuard {
        next_mount: u64,
    },
}

impl Message {
    fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => 1,
            Self::Mount { .. } => 2,
            Self::Attach { .. } => 3,
            Self::Unmount { .. } => 4,
            Self::Grant { .. } => 5,
            Self::Failed { .. } => 6,
            Self::Taken => 7,
            Self::Welcome { .. } => 32,
            Self::Listed(_) => 33,
            Self::Done { .. } => 34,
            Self::Want { .. } => 35,
            Self::Handed(_) => 64,
            Self::HandedAll { .. } => 65,
            Self::Dropped { .. } => 66,
            Self::HandedByGuard { .. } => 67,
        }
    }

    /// How many descriptors travel with it.
    pub fn descriptors(&self) -> usize {
        match self {
            Self::HandedAll { guarded: false, .. } => 1,
            Self::Mount { .. } | Self::HandedAll { guarded: true, .. } => 2,
            Self::Handed(_) => 3,
            Self::Hello(_)
            | Self::Attach { .. }
            | Self::Unmount { .. }
            | Self::Grant { .. }
            | Self::Failed { .. }
            | Self::Taken
            | Self::Welcome { .. }
            | Self::Listed(_)
            | Self::Done { .. }
            | Self::Want { .. }
            | Self::Dropped { .. }
            | Self::HandedByGuard { .. } => 0,
        }
    }
}

/// The datagram of a message. Texts and spans beyond their limits are cut: whoever made
/// them checked them, and the reader refuses what is missing.
pub fn encode(message: &Message) -> Vec<u8> {
    let mut out = Writer(Vec::with_capacity(64));
    out.0.extend_from_slice(&MAGIC);
    out.0.extend_from_slice(&VERSION.to_le_bytes());
    out.0.extend_from_slice(&message.kind().to_le_bytes());
    let mut body = Writer(Vec::with_capacity(64));
    write_body(&mut body, message);
    out.u32(u32::try_from(body.0.len()).unwrap_or(u32::MAX));
    let sum = checksum(&out.0, &body.0);
    out.u32(sum);
    out.0.extend_from_slice(&body.0);
    out.0
}

fn write_body(out: &mut Writer, message: &Message) {
    match message {
        Message::Hello(role) => out.0.push(match role {
            Role::Daemon => 0,
            Role::Successor => 1,
            Role::Guest => 2,
        }),
        Message::Mount {
            request,
            size,
            name,
            path,
        } => {
            out.u64s(&[*request, *size]);
            out.text(name);
            out.text(path);
        }
        Message::Attach {
            request,
            mount,
            file,
        } => {
            out.u64s(&[*request, *mount, file.dev, file.ino]);
        }
        Message::Unmount { request, mount } => out.u64s(&[*request, *mount]),
        Message::Grant {
            want,
            mount,
            number,
            span,
        } => {
            out.u64s(&[*want, *mount, *number, span.start(), span.end()]);
        }
        Message::Failed {
            want: id,
            mount,
            errno,
        }
        | Message::Done {
            request: id,
            mount,
            errno,
        } => {
            out.u64s(&[*id, *mount]);
            out.u32(*errno);
        }
        Message::Taken => {}
        Message::Welcome { mounts } => out.u32(*mounts),
        Message::Listed(listed) => {
            out.u64s(&[listed.mount, listed.size]);
            out.text(&listed.name);
            out.text(&listed.path);
        }
        Message::Want { want, mount, span } => {
            out.u64s(&[*want, *mount, span.start(), span.end()]);
        }
        Message::Handed(handed) => write_handed(out, handed),
        Message::HandedAll {
            next_mount,
            guarded,
        } => {
            out.u64s(&[*next_mount]);
            out.0.push(u8::from(*guarded));
        }
        Message::HandedByGuard { next_mount: mount } | Message::Dropped { mount } => {
            out.u64s(&[*mount]);
        }
    }
}

fn write_handed(out: &mut Writer, handed: &Handed) {
    let (basis, number) = match handed.basis {
        Basis::Number(number) => (0, number),
        Basis::Lock => (1, 0),
    };
    out.u64s(&[handed.listed.mount, handed.listed.size]);
    out.0.push(basis);
    out.u64s(&[number]);
    out.text(&handed.listed.name);
    out.text(&handed.listed.path);
    let granted = handed.granted.get(..SPANS_MAX).unwrap_or(&handed.granted);
    out.u32(u32::try_from(granted.len()).unwrap_or_default());
    for span in granted {
        out.u64s(&[span.start(), span.end()]);
    }
}

/// Takes a datagram apart.
pub fn decode(datagram: &[u8]) -> Result<Message, Malformed> {
    let (head, body) = datagram
        .split_at_checked(HEADER_BYTES)
        .ok_or(Malformed::Foreign)?;
    let (named, sum) = head.split_at_checked(12).ok_or(Malformed::Foreign)?;
    let (kind, len) = read_header(&mut Reader::new(named)).ok_or(Malformed::Foreign)?;
    let is_whole = usize::try_from(len).is_ok_and(|len| len == body.len());
    if !is_whole
        || datagram.len() > DATAGRAM_BYTES_MAX
        || sum != checksum(named, body).to_le_bytes()
    {
        return Err(Malformed::Damaged);
    }
    let mut fields = Reader::new(body);
    read_body(kind, &mut fields)
        .filter(|_| fields.is_empty())
        .ok_or(Malformed::Body(kind))
}

/// Kind and length, if it is of this protocol.
fn read_header(head: &mut Reader<'_>) -> Option<(u16, u32)> {
    let ours = head.bytes(4)? == MAGIC && head.u16()? == VERSION;
    let header = (head.u16()?, head.u32()?);
    ours.then_some(header)
}

fn read_body(kind: u16, body: &mut Reader<'_>) -> Option<Message> {
    Some(match kind {
        1 => Message::Hello(match body.u8()? {
            0 => Role::Daemon,
            1 => Role::Successor,
            2 => Role::Guest,
            _ => return None,
        }),
        2 => {
            let request = body.u64()?;
            let Listed {
                size, name, path, ..
            } = read_listed(0, body)?;
            Message::Mount {
                request,
                size,
                name,
                path,
            }
        }
        3 => Message::Attach {
            request: body.u64()?,
            mount: body.u64()?,
            file: FileId {
                dev: body.u64()?,
                ino: body.u64()?,
            },
        },
        4 => Message::Unmount {
            request: body.u64()?,
            mount: body.u64()?,
        },
        5 => Message::Grant {
            want: body.u64()?,
            mount: body.u64()?,
            number: body.u64()?,
            span: body.span()?,
        },
        6 => Message::Failed {
            want: body.u64()?,
            mount: body.u64()?,
            errno: body.u32()?,
        },
        7 => Message::Taken,
        _ => return read_from_server(kind, body),
    })
}

fn read_from_server(kind: u16, body: &mut Reader<'_>) -> Option<Message> {
    Some(match kind {
        32 => Message::Welcome {
            mounts: body.u32()?,
        },
        33 => {
            let mount = body.u64()?;
            Message::Listed(read_listed(mount, body)?)
        }
        34 => Message::Done {
            request: body.u64()?,
            mount: body.u64()?,
            errno: body.u32()?,
        },
        35 => Message::Want {
            want: body.u64()?,
            mount: body.u64()?,
            span: body.span()?,
        },
        64 => Message::Handed(read_handed(body)?),
        65 => Message::HandedAll {
            next_mount: body.u64()?,
            guarded: match body.u8()? {
                0 => false,
                1 => true,
                _ => return None,
            },
        },
        66 => Message::Dropped { mount: body.u64()? },
        67 => Message::HandedByGuard {
            next_mount: body.u64()?,
        },
        _ => return None,
    })
}

/// Size, name and path.
fn read_listed(mount: u64, body: &mut Reader<'_>) -> Option<Listed> {
    let size = body.u64().filter(|size| *size <= SIZE_MAX)?;
    let name = body.text(NAME_BYTES_MAX)?;
    let path = read_path(body)?;
    Some(Listed {
        mount,
        size,
        name,
        path,
    })
}

fn read_path(body: &mut Reader<'_>) -> Option<Vec<u8>> {
    let is_path = |path: &Vec<u8>| path.starts_with(b"/") && !path.contains(&0);
    body.text(PATH_BYTES_MAX).filter(is_path)
}

fn read_handed(body: &mut Reader<'_>) -> Option<Handed> {
    let mount = body.u64()?;
    let size = body.u64().filter(|size| *size <= SIZE_MAX)?;
    let basis = match (body.u8()?, body.u64()?) {
        (0, number) => Basis::Number(number),
        (1, 0) => Basis::Lock,
        _ => return None,
    };
    let name = body.text(NAME_BYTES_MAX)?;
    let path = read_path(body)?;
    let count = usize::try_from(body.u32()?).ok()?;
    if count > SPANS_MAX {
        return None;
    }
    let granted = (0..count).map(|_| body.span()).collect::<Option<_>>()?;
    let listed = Listed {
        mount,
        size,
        name,
        path,
    };
    Some(Handed {
        listed,
        basis,
        granted,
    })
}

fn checksum(head: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(body);
    hasher.finalize()
}

struct Writer(Vec<u8>);

impl Writer {
    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64s(&mut self, values: &[u64]) {
        for value in values {
            self.0.extend_from_slice(&value.to_le_bytes());
        }
    }

    fn text(&mut self, text: &[u8]) {
        let len = u16::try_from(text.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&len.to_le_bytes());
        self.0
            .extend_from_slice(text.get(..usize::from(len)).unwrap_or_default());
    }
}
