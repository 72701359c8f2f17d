//! The second stage of an ingest: the digests of the tar and of its chunks, and the data file.
//!
//! Decoded bytes are gathered in batches. A batch is hashed and written in one go, on a
//! thread beside the decoder if there is one, so that a layer uses two cores; what a file has
//! in a batch is one write, however small the decoder's steps were.
//!
//! Invariant: batches are taken in order and whole, so the sink sees what it would see
//! without a thread. An error of the sink comes back some batches later at the latest with
//! [`Writer::finish`]. Memory: [`BATCHES_MAX`] batches. The thread ends with the writer,
//! which waits for it.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;

use super::LayerSink;
use crate::codec::twin::TwinHasher;
use crate::types::Algorithm;
use crate::{Error, Result};

/// Decoded bytes of a batch: large enough that waking a thread costs nothing beside it, and
/// small enough to be in the cache still when it is hashed.
const BATCH_BYTES: usize = 256 << 10;
/// Batches of one ingest: one being filled, one being written, and some between them.
const BATCHES_MAX: usize = 4;

/// Decoded bytes, and where some of them go.
#[derive(Default)]
struct Batch {
    /// Place of the first byte in the tar.
    start: u64,
    tar: Vec<u8>,
    writes: Vec<Write>,
    /// Where in `tar` chunks end, ascending. The next one begins with the payload after that;
    /// one that ended before is said to end at 0.
    ends: Vec<usize>,
}

/// Bytes of a batch for the data file.
struct Write {
    from: usize,
    len: usize,
    data_offset: u64,
}

impl Batch {
    fn clear(&mut self, start: u64) {
        self.start = start;
        self.tar.clear();
        self.writes.clear();
        self.ends.clear();
    }

    /// Bytes of it between two places; none if the first is behind the second.
    fn slice(&self, from: usize, to: usize) -> &[u8] {
        self.tar.get(from..to).unwrap_or_default()
    }
}

/// What is done with a batch.
pub(super) struct Work<S> {
    /// Of the tar, where its digest is to be checked, and of the chunk that passes.
    pub(super) hasher: TwinHasher,
    /// Of the chunks that passed, in order.
    pub(super) chunk_digests: Vec<[u8; 32]>,
    /// Where payloads go.
    pub(super) sink: S,
}

impl<S: LayerSink> Work<S> {
    /// With nothing done. `whole` is the algorithm of the tar's digest, where it is wanted.
    pub(super) fn new(whole: Option<Algorithm>, sink: S) -> Self {
        Self {
            hasher: TwinHasher::new(whole),
            chunk_digests: Vec::new(),
            sink,
        }
    }

    fn take(&mut self, batch: &Batch) -> Result<()> {
        let mut ends = batch.ends.iter().copied().peekable();
        let mut at = 0;
        for write in &batch.writes {
            self.hasher.between(batch.slice(at, write.from));
            while ends.next_if(|end| *end <= write.from).is_some() {
                self.end_chunk();
            }
            at = write.from;
            let write_end = write.from.saturating_add(write.len);
            while let Some(end) = ends.next_if(|end| *end <= write_end) {
                self.hasher.piece(batch.slice(at, end));
                self.end_chunk();
                at = end;
            }
            self.hasher.piece(batch.slice(at, write_end));
            at = write_end;
            self.sink
                .write_at(write.data_offset, batch.slice(write.from, write_end))?;
        }
        self.hasher.between(batch.slice(at, batch.tar.len()));
        ends.for_each(|_| self.end_chunk());
        Ok(())
    }

    fn end_chunk(&mut self) {
        self.chunk_digests.push(self.hasher.end_piece());
    }
}

type Starter<S> = fn(Work<S>) -> Result<Beside<S>>;

/// See the module's documentation.
pub(super) struct Writer<S> {
    batch: Batch,
    stage: Stage<S>,
    /// Starts the thread, once there is a whole batch for it.
    start: Option<Starter<S>>,
}

#[expect(
    clippy::large_enum_variant,
    reason = "there is one per layer, and it moves once for each batch"
)]
enum Stage<S> {
    Here(Work<S>),
    Beside(Beside<S>),
    /// It failed, and the error was told.
    Failed,
}

impl<S: LayerSink> Writer<S> {
    /// A writer that does all its work in its caller's thread.
    pub(super) fn new(work: Work<S>) -> Self {
        Self {
            batch: Batch::default(),
            stage: Stage::Here(work),
            start: None,
        }
    }

    /// Makes no digest of the tar. Called before the first byte.
    pub(super) fn hash_nothing(&mut self) {
        if let Stage::Here(work) = &mut self.stage {
            work.hasher = TwinHasher::new(None);
        }
    }

    /// Takes the next decoded bytes, which [`Self::write`] may speak of until the next call.
    pub(super) fn push(&mut self, tar: &[u8]) -> Result<()> {
        let len = self.batch.tar.len();
        if len > 0 && len.saturating_add(tar.len()) > BATCH_BYTES {
            self.send()?;
        }
        self.batch.tar.extend_from_slice(tar);
        Ok(())
    }

    /// Says that the `len` bytes at `at` of the tar, which came with the last push, are
    /// those at `data_offset` of the data file.
    pub(super) fn write(&mut self, at: u64, len: usize, data_offset: u64) {
        let from = at.saturating_sub(self.batch.start);
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        if let Some(last) = self.batch.writes.last_mut()
            && last.from.saturating_add(last.len) == from
            && last.data_offset.saturating_add(last.len as u64) == data_offset
        {
            last.len = last.len.saturating_add(len);
            return;
        }
        self.batch.writes.push(Write {
            from,
            len,
            data_offset,
        });
    }

    /// Says that a chunk ends before `at` of the tar, which is no further than what was
    /// pushed. What is written after that belongs to the next one.
    pub(super) fn end_chunk(&mut self, at: u64) {
        let end = at.saturating_sub(self.batch.start);
        let end = usize::try_from(end).unwrap_or(usize::MAX);
        self.batch.ends.push(end);
    }

    /// Waits until everything is written.
    pub(super) fn finish(mut self) -> Result<Work<S>> {
        self.send()?;
        match self.stage {
            Stage::Here(work) => Ok(work),
            Stage::Beside(beside) => beside.finish(),
            Stage::Failed => Err(told_already()),
        }
    }

    fn send(&mut self) -> Result<()> {
        let next = self.batch.start.saturating_add(self.batch.tar.len() as u64);
        let mut stage = std::mem::replace(&mut self.stage, Stage::Failed);
        if let (Stage::Here(_), Some(start)) = (&stage, self.start)
            && self.batch.tar.len().saturating_mul(2) > BATCH_BYTES
            && let Stage::Here(work) = stage
        {
            stage = Stage::Beside(start(work)?);
        }
        match &mut stage {
            Stage::Here(work) => work.take(&self.batch)?,
            Stage::Beside(beside) => match beside.swap(&mut self.batch) {
                Some(()) => {}
                None => {
                    let Stage::Beside(beside) = stage else {
                        return Err(told_already());
                    };
                    // It ends early only with an error.
                    return beside.finish().map(drop).and(Err(told_already()));
                }
            },
            Stage::Failed => return Err(told_already()),
        }
        self.stage = stage;
        self.batch.clear(next);
        Ok(())
    }
}

impl<S: LayerSink + Send + 'static> Writer<S> {
    /// The same, with a thread of its own for what is longer than a batch.
    pub(super) fn beside(self) -> Self {
        Self {
            start: Some(Beside::start),
            ..self
        }
    }
}

/// The thread.
struct Beside<S> {
    full: Option<SyncSender<Batch>>,
    empty: Receiver<Batch>,
    /// Batches that exist, the one being filled counted.
    batches: usize,
    thread: Option<JoinHandle<Result<Work<S>>>>,
}

impl<S: LayerSink + Send + 'static> Beside<S> {
    fn start(mut work: Work<S>) -> Result<Self> {
        let (full, inbox) = sync_channel::<Batch>(BATCHES_MAX);
        let (back, empty) = sync_channel(BATCHES_MAX);
        let run = move || {
            for batch in inbox {
                work.take(&batch)?;
                // Nobody needs it any more at the end.
                let _ = back.send(batch);
            }
            Ok(work)
        };
        let thread = std::thread::Builder::new().name("laz-ingest".to_owned());
        let thread = thread
            .spawn(run)
            .map_err(|e| Error::io("start", "a thread for a layer", e))?;
        Ok(Self {
            full: Some(full),
            empty,
            batches: 1,
            thread: Some(thread),
        })
    }
}

impl<S> Beside<S> {
    /// Hands `batch` on and puts an empty one in its place; `None` if the thread has ended.
    fn swap(&mut self, batch: &mut Batch) -> Option<()> {
        let next = match self.empty.try_recv() {
            Ok(empty) => empty,
            Err(TryRecvError::Empty) if self.batches < BATCHES_MAX => {
                self.batches += 1;
                Batch::default()
            }
            Err(TryRecvError::Empty) => self.empty.recv().ok()?,
            Err(TryRecvError::Disconnected) => return None,
        };
        let full = std::mem::replace(batch, next);
        self.full.as_ref()?.send(full).ok()
    }

    fn finish(mut self) -> Result<Work<S>> {
        self.full = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => outcome,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Err(told_already()),
        }
    }
}

impl<S> Drop for Beside<S> {
    /// Whatever the sink holds is gone when this returns.
    fn drop(&mut self) {
        self.full = None;
        if let Some(thread) = self.thread.take() {
            // An ingest that is given up has no use for its outcome.
            let _ = thread.join();
        }
    }
}

fn told_already() -> Error {
    let error = io::Error::other("an earlier write failed");
    Error::io("write to", "a layer that is being stored", error)
}

#[cfg(test)]
mod tests;
