//! Payloads on their way to the device past the page cache.
//!
//! What nobody is about to read is better on the device than in memory: there it pushes out what
//! others read, and new pages for a file cost a virtual machine more than inflating what goes
//! into them.
//!
//! Invariant: what was written is in the file, at its places, once [`Past::finish`] returned
//! well; none of it is on the device for certain before the file is synced. Memory is
//! [`BUFFERS_MAX`] buffers, however slow the device is: where all of them wait for it, the next
//! bytes go through the page cache, so a layer waits no longer than it would without this. Both
//! ways never meet in one block. The thread ends with this, which waits for it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;

use crate::{Error, Result};

/// What memory, places and lengths of such writes are multiples of: the largest block of any
/// device and file system here, and what payloads are aligned at.
const BLOCK_LEN: usize = 4096;
/// Bytes of one write. A device takes less time for longer ones, until about here.
pub(super) const BUFFER_LEN: usize = 512 << 10;
/// Buffers of one layer: one being filled, one being written, and two between them.
const BUFFERS_MAX: usize = 4;

/// How a file is written.
pub(super) trait Ways: Send + Sync + 'static {
    /// Writes whole blocks at the start of one, past the page cache; `false` where that cannot
    /// be done, and nothing was. Blocks on the device.
    fn past(&self, start: u64, blocks: &[u8]) -> Result<bool>;
    /// Writes through the page cache.
    fn through(&self, start: u64, bytes: &[u8]) -> Result<()>;
}

/// Bytes of the file from `start` on, which is a block's beginning.
struct Buffer {
    memory: Vec<u8>,
    /// Where a block begins in memory.
    skip: usize,
    start: u64,
    len: usize,
    room: usize,
}

impl Buffer {
    /// Of `room` bytes, a multiple of [`BLOCK_LEN`].
    fn new(room: usize) -> Self {
        let memory = vec![0; room.saturating_add(BLOCK_LEN)];
        // Past the page cache the kernel reads blocks only, of memory too.
        let skip = memory.as_ptr().align_offset(BLOCK_LEN).min(BLOCK_LEN);
        Self {
            memory,
            skip,
            start: 0,
            len: 0,
            room,
        }
    }

    fn end(&self) -> u64 {
        self.start.saturating_add(self.len as u64)
    }

    fn slice(&self, len: usize) -> &[u8] {
        let end = self.skip.saturating_add(len);
        self.memory.get(self.skip..end).unwrap_or_default()
    }

    /// What was added.
    fn bytes(&self) -> &[u8] {
        self.slice(self.len)
    }

    /// The same and zeros up to the end of the last block.
    fn blocks(&self) -> &[u8] {
        self.slice(self.len.next_multiple_of(BLOCK_LEN))
    }

    /// Begins anew at `start`.
    fn clear(&mut self, start: u64) {
        (self.start, self.len) = (start, 0);
    }

    /// Adds as many of `bytes` as there is room for; the others.
    fn add<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let room = self.room.saturating_sub(self.len);
        let (now, later) = bytes.split_at_checked(room).unwrap_or((bytes, &[]));
        let from = self.skip.saturating_add(self.len);
        if let Some(to) = self.memory.get_mut(from..from.saturating_add(now.len())) {
            to.copy_from_slice(now);
        }
        self.len = self.len.saturating_add(now.len());
        later
    }

    /// Zeros up to `len`, and to the end of that block.
    fn zeros(&mut self, len: usize) {
        let from = self.skip.saturating_add(self.len);
        let to = self.skip.saturating_add(len.next_multiple_of(BLOCK_LEN));
        if let Some(gap) = self.memory.get_mut(from..to) {
            gap.fill(0);
        }
        self.len = self.len.max(len);
    }
}

/// See the module's documentation.
pub(super) struct Past<W> {
    ways: Arc<W>,
    filling: Buffer,
    /// Once there was a whole buffer for it.
    thread: Option<Thread>,
}

impl<W: Ways> Past<W> {
    /// Gathers up to `room` bytes for one write, a multiple of [`BLOCK_LEN`].
    pub(super) fn new(ways: W, room: usize) -> Self {
        Self {
            ways: Arc::new(ways),
            filling: Buffer::new(room),
            thread: None,
        }
    }

    /// Writes `bytes` at `offset`, which is no less than where the last ones ended.
    pub(super) fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let gap = offset.saturating_sub(self.filling.start);
        match usize::try_from(gap) {
            Ok(gap) if self.filling.len > 0 && gap < self.filling.room => self.filling.zeros(gap),
            _ => self.begin(offset)?,
        }
        let mut rest = self.filling.add(bytes);
        while !rest.is_empty() {
            let next = self.filling.end();
            self.hand_over(next)?;
            rest = self.filling.add(rest);
        }
        Ok(())
    }

    /// Returns once everything is written.
    pub(super) fn finish(mut self) -> Result<()> {
        self.hand_over(0)?;
        match self.thread.take() {
            Some(thread) => thread.finish(),
            None => Ok(()),
        }
    }

    /// Has the next bytes go to `offset`.
    fn begin(&mut self, offset: u64) -> Result<()> {
        let into = offset % BLOCK_LEN as u64;
        let start = offset.saturating_sub(into);
        self.hand_over(start)?;
        // A file's payload begins a block. Bytes that do not would meet zeros in theirs.
        self.filling.zeros(usize::try_from(into).unwrap_or(0));
        Ok(())
    }

    /// Passes on what was gathered; the next begins at `next`.
    fn hand_over(&mut self, next: u64) -> Result<()> {
        let is_whole = self.filling.len == self.filling.room;
        self.filling.zeros(self.filling.len);
        let taken = match &mut self.thread {
            _ if self.filling.len == 0 => Taken::Written,
            Some(thread) => thread.take(&mut self.filling),
            None if is_whole => {
                let thread = self.thread.insert(Thread::start(Arc::clone(&self.ways))?);
                thread.take(&mut self.filling)
            }
            None => Taken::Busy,
        };
        match taken {
            Taken::Written => {}
            Taken::Busy => self
                .ways
                .through(self.filling.start, self.filling.bytes())?,
            Taken::Failed => {
                // It ends early only with an error.
                let outcome = self.thread.take().map_or(Ok(()), Thread::finish);
                return outcome.and(Err(told_already()));
            }
        }
        self.filling.clear(next);
        Ok(())
    }
}

/// What became of a buffer.
enum Taken {
    /// Its bytes are written, or will be.
    Written,
    /// All buffers wait for the device.
    Busy,
    /// The thread has ended.
    Failed,
}

/// Writes past the page cache.
struct Thread {
    full: Option<SyncSender<Buffer>>,
    empty: Receiver<Buffer>,
    /// Buffers that exist, the one being filled counted.
    buffers: usize,
    handle: Option<JoinHandle<Result<()>>>,
}

impl Thread {
    fn start(ways: Arc<impl Ways>) -> Result<Self> {
        let (full, inbox) = sync_channel::<Buffer>(BUFFERS_MAX);
        let (back, empty) = sync_channel(BUFFERS_MAX);
        let run = move || {
            for buffer in inbox {
                if !ways.past(buffer.start, buffer.blocks())? {
                    ways.through(buffer.start, buffer.bytes())?;
                }
                // Nobody needs it any more at the end.
                let _ = back.send(buffer);
            }
            Ok(())
        };
        let handle = std::thread::Builder::new().name("laz-write".to_owned());
        let handle = handle
            .spawn(run)
            .map_err(|e| Error::io("start", "a thread for a layer", e))?;
        Ok(Self {
            full: Some(full),
            empty,
            buffers: 1,
            handle: Some(handle),
        })
    }

    /// Puts an empty buffer in the place of `buffer`, if there is one.
    fn take(&mut self, buffer: &mut Buffer) -> Taken {
        let next = match self.empty.try_recv() {
            Ok(empty) => empty,
            Err(TryRecvError::Empty) if self.buffers < BUFFERS_MAX => {
                self.buffers += 1;
                Buffer::new(buffer.room)
            }
            Err(TryRecvError::Empty) => return Taken::Busy,
            Err(TryRecvError::Disconnected) => return Taken::Failed,
        };
        let full = std::mem::replace(buffer, next);
        match self.full.as_ref().map(|to| to.send(full)) {
            Some(Ok(())) => Taken::Written,
            Some(Err(_)) | None => Taken::Failed,
        }
    }

    fn finish(mut self) -> Result<()> {
        self.full = None;
        match self.handle.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => outcome,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

impl Drop for Thread {
    /// The file is nobody's any more when this returns.
    fn drop(&mut self) {
        self.full = None;
        if let Some(handle) = self.handle.take() {
            // A layer that is given up has no use for its outcome.
            let _ = handle.join();
        }
    }
}

fn told_already() -> Error {
    let error = io::Error::other("an earlier write failed");
    Error::io("write to", "a layer that is being stored", error)
}

#[cfg(test)]
mod tests;
