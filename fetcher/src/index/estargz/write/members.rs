//! Compresses members on several threads and writes them in order.
//!
//! Invariant: members leave in the order they came, and at most [`DEPTH`] of them per
//! thread are held. Each thread has its own two queues and members go round robin, so
//! nothing is shared and no lock is taken. Dropping it ends and joins the threads.

use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::{Fault, Options, WORKERS_MAX};
use crate::codec::deflate::MemberCompressor;
use crate::types::{Algorithm, Digest, Hasher};

/// Members that one thread may have queued or finished: enough to even out that members
/// differ in size, few enough that memory is a few chunks per thread.
const DEPTH: usize = 8;

/// One member to write.
pub(super) struct Member {
    /// What it decompresses to.
    pub(super) plain: Vec<u8>,
    /// The chunk it starts with, if it does.
    pub(super) chunk: Option<ChunkTag>,
}

/// The chunk at the start of a member.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChunkTag {
    /// Position of its TOC entry.
    pub(super) entry: usize,
    /// Its length in bytes.
    pub(super) len: usize,
}

/// A chunk whose place in the blob is known.
pub(super) struct Placed {
    /// Position of its TOC entry.
    pub(super) entry: usize,
    /// Where its member starts in the blob.
    pub(super) blob_offset: u64,
    pub(super) chunk_digest: Digest,
}

struct Done {
    gzip: Vec<u8>,
    chunk: Option<(usize, Digest)>,
}

struct Worker {
    jobs: SyncSender<Member>,
    done: Receiver<Done>,
    thread: JoinHandle<()>,
}

/// The blob being written.
pub(super) struct Members<'a, W> {
    output: &'a mut W,
    blob: Hasher,
    blob_offset: u64,
    workers: Vec<Worker>,
    submitted: usize,
    collected: usize,
}

impl<'a, W: Write> Members<'a, W> {
    /// Starts the threads that `options` asks for.
    pub(super) fn new(output: &'a mut W, options: &Options) -> Result<Self, Fault> {
        let mut workers = Vec::new();
        for _ in 0..options.workers.clamp(1, WORKERS_MAX) {
            workers.push(Worker::start(options.level)?);
        }
        Ok(Self {
            output,
            blob: Hasher::new(Algorithm::Sha256),
            blob_offset: 0,
            workers,
            submitted: 0,
            collected: 0,
        })
    }

    /// Queues a member. Waits for, writes and yields the oldest one if the queues are full.
    pub(super) fn submit(&mut self, member: Member) -> Result<Option<Placed>, Fault> {
        let full = self.submitted - self.collected >= self.workers.len() * DEPTH;
        let placed = if full { self.collect()? } else { None };
        let next = self.submitted % self.workers.len();
        let worker = self.workers.get(next).ok_or_else(gone)?;
        worker.jobs.send(member).map_err(|_| gone())?;
        self.submitted += 1;
        Ok(placed)
    }

    /// Writes and yields the oldest member, if it is still queued and starts with a chunk.
    /// Call until [`Self::is_idle`] to write all.
    pub(super) fn collect(&mut self) -> Result<Option<Placed>, Fault> {
        if self.is_idle() {
            return Ok(None);
        }
        let next = self.collected % self.workers.len();
        let worker = self.workers.get(next).ok_or_else(gone)?;
        let done = worker.done.recv().map_err(|_| gone())?;
        self.collected += 1;
        let blob_offset = self.blob_offset;
        self.write(&done.gzip)?;
        Ok(done.chunk.map(|(entry, chunk_digest)| Placed {
            entry,
            blob_offset,
            chunk_digest,
        }))
    }

    /// Whether every member that was submitted has been written.
    pub(super) fn is_idle(&self) -> bool {
        self.submitted == self.collected
    }

    /// Where the next byte goes in the blob, once idle.
    pub(super) fn blob_offset(&self) -> u64 {
        self.blob_offset
    }

    /// Writes bytes as they are.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.output.write_all(bytes).map_err(Fault::write)?;
        self.blob.update(bytes);
        self.blob_offset += bytes.len() as u64;
        Ok(())
    }

    /// Flushes the output and yields the blob's digest and size in bytes.
    pub(super) fn finish(self) -> Result<(Digest, u64), Fault> {
        self.output.flush().map_err(Fault::write)?;
        Ok((self.blob.clone().finish(), self.blob_offset))
    }
}

impl<W> Drop for Members<'_, W> {
    fn drop(&mut self) {
        for Worker { jobs, done, thread } in self.workers.drain(..) {
            drop((jobs, done));
            // A panic there has already been reported as a closed queue.
            let _ = thread.join();
        }
    }
}

impl Worker {
    fn start(level: u32) -> Result<Self, Fault> {
        let (jobs, todo) = sync_channel::<Member>(DEPTH);
        let (finished, done) = sync_channel(DEPTH);
        let thread = std::thread::Builder::new()
            .name("compress".to_owned())
            .spawn(move || {
                let mut compressor = MemberCompressor::new(level);
                for member in todo {
                    if finished.send(run(&mut compressor, &member)).is_err() {
                        return;
                    }
                }
            })
            .map_err(|error| Fault::Io("start a thread for", error))?;
        Ok(Self { jobs, done, thread })
    }
}

fn run(compressor: &mut MemberCompressor, member: &Member) -> Done {
    let digest = |tag: ChunkTag| {
        let chunk = member.plain.get(..tag.len).unwrap_or_default();
        (tag.entry, Digest::sha256(chunk))
    };
    Done {
        gzip: compressor.compress(&member.plain),
        chunk: member.chunk.map(digest),
    }
}

fn gone() -> Fault {
    Fault::Io(
        "compress",
        std::io::Error::other("a compression thread ended early"),
    )
}
