//! One layer through its spool files: fetched, decoded, verified, written anew.
//!
//! Invariant: a [`Spooled`] tar has the diff_id that the config promises, and came from
//! a blob with the digest that the manifest promises. Decoding, hashing and writing run
//! on a blocking thread; a short queue of pieces connects it with the network.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bytes::{Buf as _, Bytes};
use futures_util::StreamExt as _;
use lazarette_fetcher::codec::unpack::decoder;
use lazarette_fetcher::index::estargz::write::{Options, Written, write_estargz};
use lazarette_fetcher::source::Body;
use lazarette_fetcher::types::{Descriptor, Digest, Hasher};
use lazarette_fetcher::{Error, Result};
use tokio::sync::mpsc;

use super::ConvertOptions;

/// Pieces between network and decoder; a piece is some 16 to 256 KiB.
const QUEUE_PIECES: usize = 32;
/// Bytes decoded at once.
const BUFFER_BYTES: usize = 256 << 10;
/// Bytes collected before a write to the spool file.
const WRITE_BYTES: usize = 1 << 20;

/// A nameless file, positioned at its start, and its length in bytes.
#[derive(Debug)]
pub(super) struct Spooled {
    pub(super) file: File,
    pub(super) len: u64,
}

/// Decodes the blob that `body` yields into a spool file and verifies both digests.
pub(super) async fn spool(
    mut body: Body,
    layer: &Descriptor,
    diff_id: &Digest,
    options: &ConvertOptions,
) -> Result<Spooled> {
    let (pieces, queue) = mpsc::channel(QUEUE_PIECES);
    let job = SpoolJob {
        what: format!("layer {}", layer.digest),
        blob_digest: layer.digest,
        diff_id: *diff_id,
        bytes_max: options.layer_bytes_max,
        dir: options.spool_dir.clone(),
    };
    let decoding =
        tokio::task::spawn_blocking(move || job.run(Pieces::new(queue, job.blob_digest)));
    let mut failed = None;
    while let Some(piece) = body.next().await {
        match piece {
            Ok(piece) => {
                // The decoder gave up: its error says why.
                if pieces.send(piece).await.is_err() {
                    break;
                }
            }
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    drop((body, pieces));
    let spooled = joined(decoding.await);
    match failed {
        Some(error) => Err(error),
        None => spooled,
    }
}

/// Writes a spooled tar as eStargz into another spool file.
pub(super) async fn compress(
    tar: Spooled,
    layer: &Descriptor,
    options: &ConvertOptions,
) -> Result<(File, Written)> {
    let what = format!("layer {}", layer.digest);
    let (write, dir) = (options.write.clone(), options.spool_dir.clone());
    let work = move || compress_blocking(&what, tar, &write, &dir);
    joined(tokio::task::spawn_blocking(work).await)
}

/// Puts bytes that are in memory where blobs come from.
pub(super) async fn spool_bytes(bytes: Vec<u8>, options: &ConvertOptions) -> Result<Spooled> {
    let dir = options.spool_dir.clone();
    let work = move || {
        let mut file = create(&dir)?;
        file.write_all(&bytes).map_err(|error| full(&dir, error))?;
        Ok(Spooled {
            file: rewound(file, &dir)?,
            len: bytes.len() as u64,
        })
    };
    joined(tokio::task::spawn_blocking(work).await)
}

fn compress_blocking(
    what: &str,
    mut tar: Spooled,
    options: &Options,
    dir: &Path,
) -> Result<(File, Written)> {
    let mut output = BufWriter::with_capacity(WRITE_BYTES, create(dir)?);
    let written = write_estargz(what, &mut tar.file, &mut output, options)?;
    let file = output
        .into_inner()
        .map_err(|error| full(dir, error.into_error()))?;
    Ok((rewound(file, dir)?, written))
}

/// What decoding one blob needs to know.
struct SpoolJob {
    what: String,
    blob_digest: Digest,
    diff_id: Digest,
    bytes_max: u64,
    dir: PathBuf,
}

impl SpoolJob {
    fn run(&self, mut pieces: Pieces) -> Result<Spooled> {
        let file = create(&self.dir)?;
        let decoded = self.decode(&mut pieces, file);
        // Wrong bytes are the reason for whatever the decoder says of them.
        let give_up = matches!(decoded, Err(Error::NoSpace { .. } | Error::Limit { .. }));
        if !give_up {
            let actual = pieces.finish();
            if actual != self.blob_digest {
                return Err(self.corrupt("", self.blob_digest, actual));
            }
        }
        let (file, len, actual) = decoded?;
        if actual != self.diff_id {
            return Err(self.corrupt(" (uncompressed)", self.diff_id, actual));
        }
        let file = rewound(file, &self.dir)?;
        Ok(Spooled { file, len })
    }

    fn decode(&self, pieces: &mut Pieces, file: File) -> Result<(File, u64, Digest)> {
        let broken = |error: io::Error| {
            Error::malformed(
                self.what.as_str(),
                format!("it cannot be decompressed: {error}"),
            )
        };
        let mut decoder = decoder(pieces).map_err(broken)?;
        let mut hasher = Hasher::new(self.diff_id.algorithm());
        let mut output = BufWriter::with_capacity(WRITE_BYTES, file);
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut len = 0;
        loop {
            let count = match decoder.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(broken(error)),
            };
            len += count as u64;
            if len > self.bytes_max {
                let detail = format!("it decompresses to more than {} bytes", self.bytes_max);
                return Err(Error::limit(self.what.as_str(), detail));
            }
            let decoded = buffer.get(..count).unwrap_or_default();
            hasher.update(decoded);
            output
                .write_all(decoded)
                .map_err(|error| full(&self.dir, error))?;
        }
        let file = output
            .into_inner()
            .map_err(|error| full(&self.dir, error.into_error()))?;
        Ok((file, len, hasher.finish()))
    }

    fn corrupt(&self, part: &str, expected: Digest, actual: Digest) -> Error {
        Error::Corrupt {
            what: format!("{}{part}", self.what),
            expected,
            actual,
        }
    }
}

/// The queue as a reader that hashes what passes. Blocks while the queue is empty.
struct Pieces {
    queue: mpsc::Receiver<Bytes>,
    current: Bytes,
    hasher: Hasher,
}

impl Pieces {
    fn new(queue: mpsc::Receiver<Bytes>, digest: Digest) -> Self {
        Self {
            queue,
            current: Bytes::new(),
            hasher: Hasher::new(digest.algorithm()),
        }
    }

    /// Takes what the decoder left and yields the digest of everything.
    fn finish(mut self) -> Digest {
        while let Some(piece) = self.queue.blocking_recv() {
            self.hasher.update(&piece);
        }
        self.hasher.finish()
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.current.has_remaining() {
            match self.queue.blocking_recv() {
                Some(piece) => {
                    self.hasher.update(&piece);
                    self.current = piece;
                }
                None => return Ok(0),
            }
        }
        let count = self.current.remaining().min(buffer.len());
        if let Some(room) = buffer.get_mut(..count) {
            self.current.copy_to_slice(room);
        }
        Ok(count)
    }
}

fn create(dir: &Path) -> Result<File> {
    tempfile::tempfile_in(dir).map_err(|error| Error::io("create a spool file in", dir, error))
}

fn full(dir: &Path, error: io::Error) -> Error {
    Error::io("write to a spool file in", dir, error)
}

fn rewound(mut file: File, dir: &Path) -> Result<File> {
    file.seek(SeekFrom::Start(0))
        .map_err(|error| Error::io("rewind a spool file in", dir, error))?;
    Ok(file)
}

/// The result of a blocking task; its panic goes on here.
fn joined<T>(outcome: std::result::Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    match outcome {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::io(
                "finish work on",
                "a layer",
                io::Error::other("the runtime is shutting down"),
            )),
        },
    }
}
