//! A blob streamed in full through an ingest.
//!
//! Invariant: the body is read here, on the caller's task, and decoded on a blocking thread.
//! What waits between them comes to [`WAITING_BYTES_MAX`] and a piece, over all streams of an
//! engine. What comes back was checked as a whole. Where the body breaks off, or the caller
//! goes away, the ingest ends with an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::Stream;
use super::patience::Patience;
use crate::index::ingest::{Ingest, Ingested, LayerSink};
use crate::task::blocking;
use crate::{Error, Result};

/// Bytes of bodies that may wait for their decoders. A decoder takes as many in some tens of
/// milliseconds; less would have it wait for the network's thread instead.
pub(in crate::layer) const WAITING_BYTES_MAX: usize = 4 << 20;
/// Pieces of one body that may wait. They have some hundred KiB at most, so that one whose
/// decoder stands still leaves room for others.
const PIECES_WAITING_MAX: usize = 8;

/// The body as it comes, for a blocking thread.
pub(in crate::layer) struct Pieces {
    inbox: mpsc::Receiver<Waiting>,
}

/// A piece, and its share of what may wait.
struct Waiting {
    piece: Bytes,
    _leave: OwnedSemaphorePermit,
}

/// Waits until `piece` may wait for its decoder; `None` only if nothing may any more.
async fn leave(room: &Arc<Semaphore>, piece: &Bytes) -> Option<OwnedSemaphorePermit> {
    let bytes = piece.len().min(WAITING_BYTES_MAX);
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
    Arc::clone(room).acquire_many_owned(bytes).await.ok()
}

impl Pieces {
    /// Feeds all of it to `ingest`. One that broke off is too short for its digest.
    pub(in crate::layer) fn feed<S: LayerSink>(
        mut self,
        mut ingest: Ingest<S>,
    ) -> Result<Ingested<S>> {
        while let Some(waiting) = self.inbox.blocking_recv() {
            ingest.push(&waiting.piece)?;
        }
        ingest.finish()
    }
}

impl Stream {
    /// Gives the whole body to `work`, which runs on a blocking thread; what that makes of
    /// it. `received` counts encoded bytes as they come.
    pub(in crate::layer) async fn into_ingest<T: Send + 'static>(
        mut self,
        received: &AtomicU64,
        work: impl FnOnce(Pieces) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mut patience = Patience::new(self.asker.clone(), self.from.blob.clone());
        let (pieces, inbox) = mpsc::channel(PIECES_WAITING_MAX);
        // Spawned now, so that the channel is drained while the body is read.
        let worker = tokio::spawn(blocking(move || work(Pieces { inbox })));
        let mut broken = None;
        loop {
            match patience.wait(self.next(), received).await {
                Ok(Some(piece)) => {
                    received.fetch_add(piece.len() as u64, Ordering::Relaxed);
                    let Some(leave) = leave(&self.engine.waiting, &piece).await else {
                        break;
                    };
                    let waiting = Waiting {
                        piece,
                        _leave: leave,
                    };
                    if pieces.send(waiting).await.is_err() {
                        break; // the worker failed; its error says why
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    broken = Some(error);
                    break;
                }
            }
        }
        drop(pieces);
        let outcome = match worker.await {
            Ok(outcome) => outcome,
            Err(stopped) => std::panic::resume_unwind(stopped.into_panic()),
        };
        match (broken, outcome) {
            (Some(error), _) => Err(error),
            (None, Err(error)) => {
                if matches!(error, Error::Corrupt { .. } | Error::Malformed { .. }) {
                    self.from.source.distrust(&self.from.blob);
                }
                Err(error)
            }
            (None, done) => done,
        }
    }
}
