//! Answers as the kernel wants them.
//!
//! Invariant: every answer carries the number of its request and its own length, and no
//! answer is made for what must not be answered.

use super::{FILE, FILE_NAME, Init, Op, READ_MAX, ROOT, Request, SMALL, SMALL_NAME};

/// The kernel's second word of features counts.
pub(super) const INIT_EXT: u64 = 1 << 30;
const ASYNC_READ: u64 = 1;
/// Reads of a file that is not cached may be answered in any order, and no signal that the
/// reader gets meanwhile interrupts them.
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES: u64 = 1 << 22;
const HAS_RESEND: u64 = 1 << 39;
/// Features we use where the kernel has them.
const WANTED: u64 = ASYNC_READ | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT | HAS_RESEND;

const MAJOR: u32 = 7;
/// What [`init_out`] is laid out for, and all that is used here.
const MINOR: u32 = 38;
/// Reads the kernel sends ahead at a time.
const BACKGROUND_MAX: u16 = 64;
/// The file never changes: a year, that is until the kernel needs the memory.
const TTL_SECONDS: u64 = 365 * 24 * 3600;
/// What one block of `stat` is, and what the file system calls its block.
const STAT_BLOCK: u64 = 512;
const BLOCK_BYTES: u32 = 4096;
/// Cache nothing of the file: the EROFS above has a cache of its own, and asks for what a
/// file of the layer needs and nothing beside it.
const DIRECT_IO: u32 = 1;
/// Keep what was cached of it before it is opened.
const KEEP_CACHE: u32 = 2;
/// How far the kernel reads ahead in what it caches, bytes: a page. With it, who reads in order has
/// the next page asked for while it uses one, by a request of its own; and nobody ever waits for
/// more than was wanted, which may have to be fetched.
const READ_AHEAD: u32 = BLOCK_BYTES;
/// `FUSE_NOTIFY_RESEND`.
const NOTIFY_RESEND: i32 = 7;

const ENOENT: i32 = 2;
const EIO: i32 = 5;
const ENOTDIR: i32 = 20;
const EISDIR: i32 = 21;
const EROFS: i32 = 30;
const ENOSYS: i32 = 38;
const EPROTO: i32 = 71;
const ESTALE: i32 = 116;

/// What to do about a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Send these bytes.
    Send(Vec<u8>),
    /// Read so many bytes of the data file from `offset` and send them; at least one.
    Read {
        /// First byte, inside the file.
        offset: u64,
        /// How many, all inside the file.
        len: u32,
    },
    /// Nobody waits for the read of that number any more.
    Interrupt(u64),
    /// Nothing.
    Nothing,
}

/// Decides about a request to a file of `size` bytes.
pub fn react(request: &Request<'_>, size: u64) -> Reaction {
    let unique = request.unique;
    let send = |body: &[u8]| Reaction::Send(ok(unique, body));
    let refuse = |errno| Reaction::Send(error(unique, errno));
    match (request.op, request.node) {
        (Op::Interrupt { unique }, _) => Reaction::Interrupt(unique),
        (Op::Forget, _) => Reaction::Nothing,
        (Op::Init(init), _) => match init_out(&init) {
            Some(body) => send(&body),
            None => refuse(EPROTO),
        },
        (Op::Fine, _) => send(&[]),
        (Op::StatFs, _) => send(&statfs_out(size)),
        (Op::Other(_), _) => refuse(ENOSYS),
        (_, node) if ![ROOT, FILE, SMALL].contains(&node) => refuse(ESTALE),
        (Op::Lookup(_), FILE | SMALL) => refuse(ENOTDIR),
        (Op::Lookup(FILE_NAME), _) => send(&entry_out(FILE, size)),
        (Op::Lookup(SMALL_NAME), _) => send(&entry_out(SMALL, size)),
        (Op::Lookup(_), _) => refuse(ENOENT),
        (Op::GetAttr, node) => send(&attr_out(node, size)),
        (Op::Open { write: true }, _) => refuse(EROFS),
        (Op::Open { write: false }, FILE) => send(&open_out(DIRECT_IO)),
        (Op::Open { write: false }, SMALL) => send(&open_out(KEEP_CACHE)),
        (Op::Open { .. } | Op::Read { .. }, ROOT) => refuse(EISDIR),
        (Op::Open { .. }, _) => refuse(ESTALE),
        (
            Op::Read {
                offset,
                size: asked,
            },
            _,
        ) => {
            let left = size
                .saturating_sub(offset)
                .min(u64::from(asked.min(READ_MAX)));
            match u32::try_from(left) {
                Ok(0) => send(&[]),
                Ok(len) => Reaction::Read { offset, len },
                Err(_) => refuse(EIO),
            }
        }
    }
}

/// Puts the header of a good answer of `body_len` bytes in front of `buf`, which it
/// begins; the body follows it.
pub fn ok_header(unique: u64, body_len: u32) -> [u8; HEADER_BYTES] {
    header(unique, 0, body_len)
}

/// Bytes of the header of an answer.
pub const HEADER_BYTES: usize = HEADER_LEN as usize;
const HEADER_LEN: u32 = 16;

/// An answer with `body`.
pub fn ok(unique: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
    out.extend_from_slice(&header(unique, 0, len));
    out.extend_from_slice(body);
    out
}

/// An answer that says no; `errno` is positive.
pub fn error(unique: u64, errno: i32) -> Vec<u8> {
    header(unique, errno.saturating_neg(), 0).to_vec()
}

/// Whether this kernel sends requests again when told to.
pub fn can_resend(init: &Init) -> bool {
    init.flags & HAS_RESEND != 0
}

/// Has the kernel send again what was read and not answered.
pub fn resend() -> [u8; HEADER_BYTES] {
    header(0, NOTIFY_RESEND, 0)
}

fn header(unique: u64, error: i32, body_len: u32) -> [u8; HEADER_BYTES] {
    let len = body_len.saturating_add(HEADER_LEN);
    let mut out = [0; HEADER_BYTES];
    let parts = len.to_ne_bytes().into_iter().chain(error.to_ne_bytes());
    for (to, from) in out.iter_mut().zip(parts.chain(unique.to_ne_bytes())) {
        *to = from;
    }
    out
}

/// Collects numbers in the machine's order.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }
}

/// `struct fuse_init_out`; `None` for a kernel we do not speak with.
fn init_out(init: &Init) -> Option<Vec<u8>> {
    if init.major != MAJOR {
        return None;
    }
    let flags = init.flags & WANTED;
    let word = |flags: u64| u32::try_from(flags & u64::from(u32::MAX)).unwrap_or_default();
    let pages = u16::try_from(READ_MAX / BLOCK_BYTES).unwrap_or(u16::MAX);
    let body = Body::default()
        .u32(MAJOR)
        .u32(MINOR.min(init.minor))
        .u32(init.max_readahead.min(READ_AHEAD))
        .u32(word(flags))
        .u16(BACKGROUND_MAX)
        .u16(BACKGROUND_MAX / 4 * 3)
        .u32(BLOCK_BYTES)
        .u32(1)
        .u16(pages)
        .u16(0)
        .u32(word(flags >> 32))
        .zeros(28);
    Some(body.0)
}

/// `struct fuse_attr` behind `body`. Root's alone: the file has the contents of every file
/// of the layer, whoever may read those.
fn attr(body: Body, node: u64, size: u64) -> Body {
    let (mode, size) = match node {
        ROOT => (0o040_500, 0),
        _ => (0o100_400, size),
    };
    body.u64(node)
        .u64(size)
        .u64(size.div_ceil(STAT_BLOCK))
        .zeros(36)
        .u32(mode)
        .u32(1)
        .zeros(12)
        .u32(BLOCK_BYTES)
        .u32(0)
}

fn attr_out(node: u64, size: u64) -> Vec<u8> {
    attr(Body::default().u64(TTL_SECONDS).u64(0), node, size).0
}

fn entry_out(node: u64, size: u64) -> Vec<u8> {
    let body = Body::default()
        .u64(node)
        .u64(0)
        .u64(TTL_SECONDS)
        .u64(TTL_SECONDS)
        .u64(0);
    attr(body, node, size).0
}

fn open_out(flags: u32) -> Vec<u8> {
    Body::default().u64(0).u32(flags).u32(0).0
}

fn statfs_out(size: u64) -> Vec<u8> {
    let blocks = size.div_ceil(u64::from(BLOCK_BYTES));
    let body = Body::default().u64(blocks).zeros(16).u64(2).u64(0);
    body.u32(BLOCK_BYTES).u32(255).u32(BLOCK_BYTES).zeros(28).0
}
