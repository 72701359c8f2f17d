//! Compresses members on several threads and writes them in order.
//!
//! A member is what is compressed alone: a gzip member or a zstd frame. Invariant: members
//! leave in the order they came, and what is held is at most [`HELD_BYTES_MAX`] and one
//! member, however many threads there are. Each thread has its own two queues and members
//! go round robin, so nothing is shared and no lock is taken. Dropping it ends and joins
//! the threads.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::{Fault, Format, Options, WORKERS_MAX};
use crate::codec::deflate::MemberCompressor;
use crate::codec::zstd_write::FrameCompressor;
use crate::types::{Algorithm, Digest, Hasher};

/// Members that one thread may have queued or finished: enough to even out that members
/// differ in size.
const DEPTH: usize = 8;
/// Bytes before compression that all threads of one layer hold; about as much may wait
/// compressed. Several layers are converted at once.
const HELD_BYTES_MAX: usize = 16 << 20;

/// One member to write.
#[derive(Default)]
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
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    /// Position of its TOC entry.
    pub(super) entry: usize,
    /// Where its member starts in the blob.
    pub(super) blob_offset: u64,
    /// Where its member ends in the blob.
    pub(super) blob_end: u64,
    pub(super) chunk_digest: Digest,
}

struct Done {
    bytes: io::Result<Vec<u8>>,
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
    /// Plain lengths of the members that are not yet written, oldest first.
    held: VecDeque<usize>,
    held_bytes: usize,
    submitted: usize,
    collected: usize,
}

impl<'a, W: Write> Members<'a, W> {
    /// Starts the threads that `options` asks for.
    pub(super) fn new(output: &'a mut W, options: &Options) -> Result<Self, Fault> {
        let mut workers = Vec::new();
        for _ in 0..options.workers.clamp(1, WORKERS_MAX) {
            workers.push(Worker::start(options)?);
        }
        Ok(Self {
            output,
            blob: Hasher::new(Algorithm::Sha256),
            blob_offset: 0,
            workers,
            held: VecDeque::new(),
            held_bytes: 0,
            submitted: 0,
            collected: 0,
        })
    }

    /// Whether the oldest member must be collected before the next is submitted.
    pub(super) fn is_full(&self) -> bool {
        self.held.len() >= self.workers.len() * DEPTH || self.held_bytes > HELD_BYTES_MAX
    }

    /// Queues a member; not while [`Self::is_full`].
    pub(super) fn submit(&mut self, member: Member) -> Result<(), Fault> {
        let next = self.submitted % self.workers.len();
        let worker = self.workers.get(next).ok_or_else(gone)?;
        let len = member.plain.len();
        worker.jobs.send(member).map_err(|_| gone())?;
        self.submitted += 1;
        self.held.push_back(len);
        self.held_bytes += len;
        Ok(())
    }

    /// Writes the oldest member, and yields the chunk it starts with. Call until
    /// [`Self::is_idle`] to write all.
    pub(super) fn collect(&mut self) -> Result<Option<Placed>, Fault> {
        let Some(len) = self.held.pop_front() else {
            return Ok(None);
        };
        self.held_bytes -= len;
        let next = self.collected % self.workers.len();
        let worker = self.workers.get(next).ok_or_else(gone)?;
        let done = worker.done.recv().map_err(|_| gone())?;
        self.collected += 1;
        let blob_offset = self.blob_offset;
        self.write(&done.bytes.map_err(Fault::compress)?)?;
        let blob_end = self.blob_offset;
        Ok(done.chunk.map(|(entry, chunk_digest)| Placed {
            entry,
            blob_offset,
            blob_end,
            chunk_digest,
        }))
    }

    /// Whether every member that was submitted has been written.
    pub(super) fn is_idle(&self) -> bool {
        self.held.is_empty()
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
    fn start(options: &Options) -> Result<Self, Fault> {
        let (jobs, todo) = sync_channel::<Member>(DEPTH);
        let (finished, done) = sync_channel(DEPTH);
        let mut compressor = Compressor::new(options)?;
        let thread = std::thread::Builder::new()
            .name("compress".to_owned())
            .spawn(move || {
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

enum Compressor {
    Gzip(MemberCompressor),
    Zstd(FrameCompressor),
}

impl Compressor {
    fn new(options: &Options) -> Result<Self, Fault> {
        Ok(match options.format {
            Format::Estargz | Format::Gzip => Self::Gzip(MemberCompressor::new(options.level)),
            Format::ZstdChunked(_) => {
                Self::Zstd(FrameCompressor::new(options.level).map_err(Fault::compress)?)
            }
        })
    }

    fn compress(&mut self, plain: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::Gzip(gzip) => Ok(gzip.compress(plain)),
            Self::Zstd(zstd) => zstd.compress(plain),
        }
    }
}

fn run(compressor: &mut Compressor, member: &Member) -> Done {
    let digest = |tag: ChunkTag| {
        let chunk = member.plain.get(..tag.len).unwrap_or_default();
        (tag.entry, Digest::sha256(chunk))
    };
    Done {
        bytes: compressor.compress(&member.plain),
        chunk: member.chunk.map(digest),
    }
}

fn gone() -> Fault {
    Fault::compress(io::Error::other("a compression thread ended early"))
}
