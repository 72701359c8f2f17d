//! One mount: what the kernel asks through, the data file, the store's number of evictions.
//!
//! Invariant: bytes are sent only after [`State::holds`](crate::state::State::holds) said so
//! of a number that was read after them. A reader through fanotify reads the data file
//! itself: it is let to only where the bytes are there to stay.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::Shared;
use super::pace::Pace;
use super::workers::interrupt;
use crate::fanotify::Group;
use crate::fuse::READ_MAX;
use crate::fuse::answer::{self, HEADER_BYTES};
use crate::ranges::Span;
use crate::state::{Decision, Read};

/// How often a read begins again because somebody evicted meanwhile. Each time takes
/// another eviction in the microseconds of a read.
const ATTEMPTS_MAX: u32 = 100;

/// Longest answer to a read.
pub(super) const ANSWER_BYTES_MAX: usize = HEADER_BYTES + READ_MAX as usize;

pub(super) const EIO: i32 = 5;
pub(super) const EINTR: i32 = 4;

/// What serving one mount takes.
pub(super) struct Served {
    pub(super) mount: u64,
    /// Bytes of the file that is shown.
    pub(super) size: u64,
    /// Bytes of the data file: as many, or less by not quite a block.
    pub(super) data_len: u64,
    pub(super) way: Way,
    pub(super) data: File,
    pub(super) evictions: File,
    pub(super) path: PathBuf,
    pub(super) pace: Pace,
}

/// Through what the kernel asks.
pub(super) enum Way {
    /// A session of its own.
    Fuse(File),
    /// The group of all.
    Fanotify(Arc<Group>),
}

impl Served {
    /// Its session, if it has one.
    pub(super) fn fuse(&self) -> Option<&File> {
        match &self.way {
            Way::Fuse(fuse) => Some(fuse),
            Way::Fanotify(_) => None,
        }
    }

    /// What a successor and the guard get.
    pub(super) fn files(&self) -> Vec<&File> {
        let files = [&self.data, &self.evictions];
        files.into_iter().chain(self.fuse()).collect()
    }

    /// The store's number of evictions now. What this thread read before stays before it.
    pub(super) fn number_now(&self) -> io::Result<u64> {
        fence(Ordering::SeqCst);
        let mut bytes = [0; 8];
        match self.evictions.read_at(&mut bytes, 0)? {
            8 => Ok(u64::from_le_bytes(bytes)),
            _ => Ok(0),
        }
    }

    /// Answers with an errno; through fanotify that is always `EIO`.
    pub(super) fn refuse(&self, unique: u64, errno: i32) {
        match &self.way {
            Way::Fuse(fuse) => send(fuse, &answer::error(unique, errno)),
            Way::Fanotify(group) => group.deny(unique),
        }
    }
}

/// The next request of a session, if there is one.
pub(super) fn receive<'a>(mut fuse: &File, buf: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let len = fuse.read(buf)?;
    Ok(buf.get(..len).unwrap_or_default())
}

/// Sends an answer. A request that the kernel knows no longer needs none.
pub(super) fn send(mut fuse: &File, bytes: &[u8]) {
    let _ = fuse.write(bytes);
}

/// Has the kernel send again what nobody answered.
pub(super) fn resend(mut fuse: &File) -> io::Result<()> {
    fuse.write(&answer::resend()).map(drop)
}

impl Shared {
    /// Answers a read, or lets it wait. `buf` is for its bytes, and holds any answer.
    pub(super) fn serve(&self, served: &Served, read: Read, buf: &mut [u8]) {
        for _ in 0..ATTEMPTS_MAX {
            // Not in the match: the lock would be held in its arms.
            let decision = self.state.lock().read(read);
            let ticket = match decision {
                Decision::Serve(ticket) => ticket,
                Decision::Waits => return self.poke.ring(),
                Decision::WaitsInterrupted => {
                    interrupt(self, served, read.unique);
                    return self.poke.ring();
                }
                Decision::Refuse(errno) => return served.refuse(read.unique, errno),
            };
            let fuse = match &served.way {
                Way::Fuse(fuse) => fuse,
                Way::Fanotify(group) => return self.allow(served, group, read),
            };
            let Ok((number, answer)) = fill(served, read, buf) else {
                return served.refuse(read.unique, EIO);
            };
            if self.state.lock().holds(read.mount, ticket, number) {
                return send(fuse, answer);
            }
        }
        served.refuse(read.unique, EIO);
    }
}

/// Reads the bytes behind the header of a good answer, and then the number; both.
fn fill<'a>(served: &Served, read: Read, buf: &'a mut [u8]) -> io::Result<(u64, &'a [u8])> {
    let too_long = || io::Error::from(io::ErrorKind::InvalidInput);
    let len = u32::try_from(read.span.len()).map_err(|_| too_long())?;
    let whole = len.saturating_add(read.zeros);
    let answer = buf.get_mut(..HEADER_BYTES + whole as usize);
    let answer = answer.ok_or_else(too_long)?;
    let (header, body) = answer.split_at_mut(HEADER_BYTES);
    header.copy_from_slice(&answer::ok_header(read.unique, whole));
    let (bytes, zeros) = body.split_at_mut(len as usize);
    served.data.read_exact_at(bytes, read.span.start())?;
    zeros.fill(0);
    Ok((served.number_now()?, answer))
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
