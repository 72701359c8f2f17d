//! One mount: the kernel's session, the data file, the store's number of evictions.
//!
//! Invariant: bytes are sent only after [`State::holds`](crate::state::State::holds) said so
//! of a number that was read after them.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{Ordering, fence};

use super::Shared;
use crate::fuse::answer::{self, HEADER_BYTES};
use crate::ranges::Span;
use crate::state::{Decision, Read};

/// How often a read begins again because somebody evicted meanwhile. Each time takes
/// another eviction in the microseconds of a read.
const ATTEMPTS_MAX: u32 = 100;

pub(super) const EIO: i32 = 5;
pub(super) const EINTR: i32 = 4;

/// What serving one mount takes.
pub(super) struct Served {
    pub(super) mount: u64,
    /// Bytes of the file that is shown.
    pub(super) size: u64,
    /// Bytes of the data file: as many, or less by not quite a block.
    pub(super) data_len: u64,
    pub(super) fuse: File,
    pub(super) data: File,
    pub(super) evictions: File,
    pub(super) path: PathBuf,
}

impl Served {
    /// The store's number of evictions now. What this thread read before stays before it.
    pub(super) fn number_now(&self) -> io::Result<u64> {
        fence(Ordering::SeqCst);
        let mut bytes = [0; 8];
        match self.evictions.read_at(&mut bytes, 0)? {
            8 => Ok(u64::from_le_bytes(bytes)),
            _ => Ok(0),
        }
    }

    /// The next request, if there is one.
    pub(super) fn receive<'a>(&self, buf: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let len = (&self.fuse).read(buf)?;
        Ok(buf.get(..len).unwrap_or_default())
    }

    /// Sends an answer. A request that the kernel knows no longer needs none.
    pub(super) fn send(&self, bytes: &[u8]) {
        let _ = (&self.fuse).write(bytes);
    }

    /// Answers with an errno.
    pub(super) fn refuse(&self, unique: u64, errno: i32) {
        self.send(&answer::error(unique, errno));
    }

    /// Has the kernel send again what nobody answered.
    pub(super) fn resend(&self) -> io::Result<()> {
        (&self.fuse).write(&answer::resend()).map(drop)
    }
}

impl Shared {
    /// Answers a read, or lets it wait. `buf` is for its bytes.
    pub(super) fn serve(&self, served: &Served, read: Read, buf: &mut Vec<u8>) {
        for _ in 0..ATTEMPTS_MAX {
            // Not in the match: the lock would be held in its arms.
            let decision = self.state.lock().read(read);
            let ticket = match decision {
                Decision::Serve(ticket) => ticket,
                Decision::Waits => return self.poke.ring(),
                Decision::Refuse(errno) => return served.refuse(read.unique, errno),
            };
            let Ok(number) = fill(served, read, buf) else {
                return served.refuse(read.unique, EIO);
            };
            if self.state.lock().holds(read.mount, ticket, number) {
                return served.send(buf);
            }
        }
        served.refuse(read.unique, EIO);
    }
}

/// Reads the bytes behind the header of a good answer, and then the number.
fn fill(served: &Served, read: Read, buf: &mut Vec<u8>) -> io::Result<u64> {
    let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let len = u32::try_from(read.span.len()).map_err(too_long)?;
    let whole = len.saturating_add(read.zeros);
    buf.clear();
    buf.extend_from_slice(&answer::ok_header(read.unique, whole));
    buf.resize(HEADER_BYTES + whole as usize, 0);
    let body = buf.get_mut(HEADER_BYTES..HEADER_BYTES + len as usize);
    let body = body.unwrap_or_default();
    served.data.read_exact_at(body, read.span.start())?;
    served.number_now()
}

/// What a read of `len` bytes takes of the data file, all of it inside what is shown; `None`
/// where it takes nothing but zeros.
pub(super) fn wanted(data_len: u64, offset: u64, len: u32) -> Option<(Span, u32)> {
    let end = offset.saturating_add(u64::from(len));
    let span = Span::new(offset, end.min(data_len))?;
    let zeros = u64::from(len) - span.len();
    Some((span, u32::try_from(zeros).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_data_is_zeros() {
        let span = |start, end| Span::new(start, end).unwrap();
        let table = [
            ((0, 4096), Some((span(0, 4096), 0))),
            ((4096, 4096), Some((span(4096, 5000), 3192))),
            ((4999, 1), Some((span(4999, 5000), 0))),
            ((4999, 2), Some((span(4999, 5000), 1))),
            ((5000, 3192), None),
            ((8191, 1), None),
        ];
        for ((offset, len), expected) in table {
            assert_eq!(wanted(5000, offset, len), expected, "{len} at {offset}");
        }
    }
}
