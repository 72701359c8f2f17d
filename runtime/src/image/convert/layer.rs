//! One layer through its spool files: fetched, decoded, verified, written anew.
//!
//! Invariant: a [`Spooled`] tar has the diff_id that the config promises, and came from
//! a blob with the digest that the manifest promises. Decoding, hashing and writing run
//! on a blocking thread; a short queue of pieces connects it with the network.

use std::io::{self, BufWriter, Read, Write};
use std::sync::{Arc, Weak};

use bytes::{Buf as _, Bytes};
use futures_util::StreamExt as _;
use lazarette_fetcher::codec::unpack::decoder;
use lazarette_fetcher::index::write::{HotFiles, Survey, Written, write_surveyed};
use lazarette_fetcher::source::Body;
use lazarette_fetcher::types::{Descriptor, Digest, Hasher};
use lazarette_fetcher::{Error, Result};
use tokio::sync::mpsc;

use super::ConvertOptions;
use super::spool::{SpoolDir, SpoolFile, Spooled};

/// Pieces between network and decoder; a piece is some 16 to 256 KiB.
const QUEUE_PIECES: usize = 32;
/// Bytes decoded at once.
const BUFFER_BYTES: usize = 256 << 10;

/// A verified layer, unpacked and looked through.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) tar: Spooled,
    pub(super) survey: Survey,
}

/// Decodes the blob that `body` yields into a spool file, verifies both digests, and
/// reads the headers.
pub(super) async fn spool(
    mut body: Body,
    layer: &Descriptor,
    diff_id: &Digest,
    options: &ConvertOptions,
) -> Result<Staged> {
    let (pieces, queue) = mpsc::channel(QUEUE_PIECES);
    let job = SpoolJob {
        what: format!("layer {}", layer.digest),
        blob_digest: layer.digest,
        diff_id: *diff_id,
        bytes_max: options.layer_bytes_max,
        dir: SpoolDir::of(options),
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

/// Writes a staged layer anew into another spool file.
pub(super) async fn compress(
    mut staged: Staged,
    layer: &Descriptor,
    hot: Option<HotFiles>,
    options: &ConvertOptions,
) -> Result<(Spooled, Written)> {
    let what = format!("layer {}", layer.digest);
    let (write, dir) = (options.write.clone(), SpoolDir::of(options));
    // Dropped with this future.
    let wanted = Arc::new(());
    let still_wanted = Arc::downgrade(&wanted);
    let work = move || {
        let mut output = Wanted {
            spool: dir.create()?,
            still_wanted,
        };
        let ends = (&mut staged.tar.file, &mut output);
        let written = write_surveyed(&what, &staged.survey, hot.as_ref(), ends, &write)?;
        Ok((dir.finish(output.spool)?, written))
    };
    let done = joined(tokio::task::spawn_blocking(work).await);
    drop(wanted);
    done
}

/// A spool that takes no more bytes once nobody waits for them: threads cannot be dropped.
struct Wanted<W> {
    spool: W,
    still_wanted: Weak<()>,
}

impl<W: Write> Write for Wanted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.still_wanted.strong_count() == 0 {
            return Err(io::Error::other("the conversion was given up"));
        }
        self.spool.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.spool.flush()
    }
}

/// Puts bytes that are in memory where blobs come from.
pub(super) async fn spool_bytes(bytes: Vec<u8>, options: &ConvertOptions) -> Result<Spooled> {
    let dir = SpoolDir::of(options);
    let work = move || {
        let mut spool = dir.create()?;
        spool.write_all(&bytes).map_err(|error| dir.failed(error))?;
        dir.finish(spool)
    };
    joined(tokio::task::spawn_blocking(work).await)
}

/// What decoding one blob needs to know.
struct SpoolJob {
    what: String,
    blob_digest: Digest,
    diff_id: Digest,
    bytes_max: u64,
    dir: SpoolDir,
}

impl SpoolJob {
    fn run(&self, mut pieces: Pieces) -> Result<Staged> {
        let spool = self.dir.create()?;
        let decoded = self.decode(&mut pieces, spool);
        // Wrong bytes are the reason for whatever the decoder says of them.
        let give_up = matches!(decoded, Err(Error::NoSpace { .. } | Error::Limit { .. }));
        if !give_up {
            let actual = pieces.finish();
            if actual != self.blob_digest {
                return Err(self.corrupt("", self.blob_digest, actual));
            }
        }
        let (mut tar, actual) = decoded?;
        if actual != self.diff_id {
            return Err(self.corrupt(" (uncompressed)", self.diff_id, actual));
        }
        let survey = Survey::take(&self.what, &mut tar.file)?;
        Ok(Staged { tar, survey })
    }

    fn decode(
        &self,
        pieces: &mut Pieces,
        mut output: BufWriter<SpoolFile>,
    ) -> Result<(Spooled, Digest)> {
        let broken = |error: io::Error| {
            Error::malformed(
                self.what.as_str(),
                format!("it cannot be decompressed: {error}"),
            )
        };
        let mut decoder = decoder(pieces).map_err(broken)?;
        let mut hasher = Hasher::new(self.diff_id.algorithm());
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
                .map_err(|error| self.dir.failed(error))?;
        }
        Ok((self.dir.finish(output)?, hasher.finish()))
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

/// The result of a blocking task; its panic goes on here.
pub(super) fn joined<T>(
    outcome: std::result::Result<Result<T>, tokio::task::JoinError>,
) -> Result<T> {
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
