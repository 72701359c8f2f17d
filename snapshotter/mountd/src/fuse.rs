//! The part of the FUSE protocol that one file needs: requests from bytes, answers to bytes.
//!
//! Invariant: whatever the bytes are, [`parse`] returns a request or an error and reads
//! nothing beyond them. Pure: no descriptor is touched here. Numbers are in the machine's
//! order, as `linux/fuse.h` says.
//!
//! The file system it speaks of has a root and one regular file under two names, read-only, for
//! ever the same. [`FILE_NAME`] is not cached. [`SMALL_NAME`] is: small files are read through
//! it, which lie beside each other, and the kernel asks for the next page while one is used.

pub mod answer;
#[cfg(test)]
mod tests;

/// Node of the root directory, fixed by the protocol.
pub const ROOT: u64 = 1;
/// Node of the file that is not cached.
pub const FILE: u64 = 2;
/// Its name.
pub const FILE_NAME: &[u8] = b"data";
/// Node of the same file that is.
pub const SMALL: u64 = 3;
/// Its name.
pub const SMALL_NAME: &[u8] = b"small";

/// Size of the buffer that requests are read into: the kernel refuses less, and we let it
/// send nothing longer (no writes).
pub const REQUEST_BYTES: usize = 8192;
/// Longest read answered at once, bytes: 64 pages, told to the kernel in `INIT`.
pub const READ_MAX: u32 = 256 << 10;

/// Bit of a request's number that says: you may have seen it before.
pub const RESENT: u64 = 1 << 63;

const HEADER_BYTES: usize = 40;

/// Why bytes are no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Shorter than its header or than the header says.
    #[error("a request of {0} bytes is cut short")]
    Short(usize),
    /// Longer than its header says.
    #[error("a request of {0} bytes says that it is shorter")]
    Long(usize),
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request<'a> {
    /// Names it in the answer.
    pub unique: u64,
    /// The node it is about; from the kernel, unchecked.
    pub node: u64,
    /// The thread that made it, as this process knows it; 0 if it does not.
    pub thread: u32,
    /// What is asked for.
    pub op: Op<'a>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op<'a> {
    /// Agree on a version.
    Init(Init),
    /// The node of a name in a directory.
    Lookup(&'a [u8]),
    /// Attributes.
    GetAttr,
    /// Open; `write` if more than reading is asked for.
    Open {
        /// Whether the opener wants to write.
        write: bool,
    },
    /// Bytes of a file.
    Read {
        /// First byte.
        offset: u64,
        /// At most so many.
        size: u32,
    },
    /// Facts of the file system.
    StatFs,
    /// Nobody waits for that request any more. Itself never answered.
    Interrupt {
        /// Its number.
        unique: u64,
    },
    /// A node is forgotten. Never answered.
    Forget,
    /// Needs no more than "yes": flush, release, destroy.
    Fine,
    /// Anything else, by its number.
    Other(u32),
}

/// What the kernel offers when a file system is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init {
    /// Major version; 7 is the only one we speak.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
    /// Longest read-ahead, bytes.
    pub max_readahead: u32,
    /// Offered features, the second word above the first.
    pub flags: u64,
}

/// Takes a request apart.
pub fn parse(bytes: &[u8]) -> Result<Request<'_>, Malformed> {
    let short = Malformed::Short(bytes.len());
    let (head, body) = bytes.split_at_checked(HEADER_BYTES).ok_or(short)?;
    match (u32_at(head, 0).ok_or(short)? as usize).cmp(&bytes.len()) {
        std::cmp::Ordering::Less => return Err(Malformed::Long(bytes.len())),
        std::cmp::Ordering::Greater => return Err(short),
        std::cmp::Ordering::Equal => {}
    }
    let opcode = u32_at(head, 4).ok_or(short)?;
    Ok(Request {
        unique: u64_at(head, 8).ok_or(short)?,
        node: u64_at(head, 16).ok_or(short)?,
        thread: u32_at(head, 32).ok_or(short)?,
        op: parse_op(opcode, body).ok_or(short)?,
    })
}

/// `None` where the body is too short for its operation.
fn parse_op(opcode: u32, body: &[u8]) -> Option<Op<'_>> {
    Some(match opcode {
        1 => Op::Lookup(body.split(|byte| *byte == 0).next()?),
        2 | 42 => Op::Forget,
        3 => Op::GetAttr,
        14 => Op::Open {
            write: u32_at(body, 0)? & 3 != 0,
        },
        15 => Op::Read {
            offset: u64_at(body, 8)?,
            size: u32_at(body, 16)?,
        },
        17 => Op::StatFs,
        18 | 25 | 38 => Op::Fine,
        26 => Op::Init(parse_init(body)?),
        36 => Op::Interrupt {
            unique: u64_at(body, 0)?,
        },
        other => Op::Other(other),
    })
}

fn parse_init(body: &[u8]) -> Option<Init> {
    let low = u64::from(u32_at(body, 12)?);
    let extended = low & answer::INIT_EXT != 0;
    let high = match u32_at(body, 16) {
        Some(high) if extended => u64::from(high),
        _ => 0,
    };
    Some(Init {
        major: u32_at(body, 0)?,
        minor: u32_at(body, 4)?,
        max_readahead: u32_at(body, 8)?,
        flags: low | high << 32,
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}
