//! What the mount server, daemons, successors and the guard say to each other, one datagram
//! (`SOCK_SEQPACKET`) per message.
//!
//! Invariant: [`decode`] returns a message only if all of the datagram makes sense: magic,
//! version, kind, length, checksum, every limit, nothing left over. Descriptors travel
//! beside the bytes; how many a message has is [`Message::descriptors`].
//!
//! ```text
//!  0  magic     "LZMD"
//!  4  version   u16, 2; another one is another protocol
//!  6  kind      u16, see below
//!  8  length    u32, bytes of the body
//! 12  checksum  u32, CRC-32 of bytes 0..12 and of the body
//! 16  body      little endian; a text is its length (u16) and its bytes
//!
//! kind              from      body                                        descriptors
//!  1 Hello          client    role u8
//!  2 Mount          daemon    request u64, through u8, size u64,          data, number
//!                             name, path
//!  3 Attach         daemon    request u64, mount u64, dev u64, ino u64
//!  4 Unmount        daemon    request u64, mount u64
//!  5 Grant          daemon    want u64, mount u64, number u64, start u64, end u64
//!  6 Failed         daemon    want u64, mount u64, errno u32
//!  7 Taken          successor (all that was handed over has arrived)
//!  8 Mark           daemon    request u64, mount u64                      mounted data
//! 32 Welcome        server    mounts u32, so many Listed follow
//! 33 Listed         server    mount u64, through u8, size u64, name, path
//! 34 Done           server    request u64, mount u64, errno u32, 0 if it worked
//! 35 Want           server    want u64, mount u64, start u64, end u64
//! 64 Handed         holder    mount u64, through u8, size u64, name,      data, number,
//!                             path, trust u8, number u64, mark u64,       and fuse if so
//!                             count u32, count * (start u64, end u64)
//! 65 HandedAll      server    next mount u64, guarded u8                  listener, and guard if so
//! 66 Dropped        server    mount u64, to the guard
//! 67 HandedByGuard  guard     next mount u64
//! 68 HandedGroup    holder    (before every mount that needs it)          group
//! 69 HandedRead     server    mount u64, number u32, waited u64 in ms,
//!                             start u64, end u64
//! ```

mod decode;
mod encode;
mod reader;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use crate::ranges::{SPANS_MAX, Span};

pub use self::decode::decode;
pub use self::encode::encode;

const MAGIC: [u8; 4] = *b"LZMD";
const VERSION: u16 = 2;
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
    #[error("not version 2 of the mount server's protocol")]
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

/// Through what the kernel gets the data of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Through {
    /// A file that the server shows at the mountpoint, by FUSE.
    Fuse,
    /// The data file itself; by fanotify the kernel asks before it reads of it.
    Fanotify,
}

/// Which file it is. What a daemon grants is about the data file that it has open; a layer
/// that was removed and fetched again is another file under the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    /// What it is made of.
    pub through: Through,
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
    /// On a lock that keeps everybody from evicting, until there is a daemon.
    Lock,
    /// On such a lock for as long as there is the mount; when it was taken the store's number
    /// was this. Mounts through fanotify stand on nothing else.
    Kept(u64),
}

/// One mount, from whoever held it to whoever holds it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handed {
    /// Which.
    pub listed: Listed,
    /// On what `granted` stands.
    pub basis: Basis,
    /// The kernel's number of the mount that bears the mark, 0 for none; see [`crate::fanotify`].
    pub mark: u64,
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
        through: Through,
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
    Mark {
        request: u64,
        mount: u64,
    },
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
    HandedGroup,
    HandedRead {
        mount: u64,
        number: u32,
        waited_ms: u64,
        span: Span,
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
            Self::Mark { .. } => 8,
            Self::Welcome { .. } => 32,
            Self::Listed(_) => 33,
            Self::Done { .. } => 34,
            Self::Want { .. } => 35,
            Self::Handed(_) => 64,
            Self::HandedAll { .. } => 65,
            Self::Dropped { .. } => 66,
            Self::HandedByGuard { .. } => 67,
            Self::HandedGroup => 68,
            Self::HandedRead { .. } => 69,
        }
    }

    /// How many descriptors travel with it.
    pub fn descriptors(&self) -> usize {
        match self {
            Self::Mark { .. } | Self::HandedGroup | Self::HandedAll { guarded: false, .. } => 1,
            Self::Mount { .. } | Self::HandedAll { guarded: true, .. } => 2,
            Self::Handed(handed) => match handed.listed.through {
                Through::Fanotify => 2,
                Through::Fuse => 3,
            },
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
            | Self::HandedByGuard { .. }
            | Self::HandedRead { .. } => 0,
        }
    }
}
