//! A blob streamed in full through an ingest.
//!
//! Invariant: the body is read here, on the caller's task, and decoded on a blocking thread
//! that holds at most [`PIECES_WAITING_MAX`] pieces of it. What comes back was checked as a
//! whole. Where the body breaks off, or the caller goes away, the ingest ends with an error.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::Stream;
use crate::index::ingest::{Ingest, Ingested, LayerSink};
use crate::task::blocking;
use crate::{Error, Result};

/// Pieces of a body that may wait for the decoder. Bodies come in pieces of at most some
/// hundred KiB, so this bounds a streaming pull's memory to a few MiB.
const PIECES_WAITING_MAX: usize = 8;

/// The body as it comes, for a blocking thread.
pub(in crate::layer) struct Pieces {
    inbox: mpsc::Receiver<Bytes>,
}

impl Pieces {
    /// Feeds all of it to `ingest`. One that broke off is too short for its digest.
    pub(in crate::layer) fn feed<S: LayerSink>(
        mut self,
        mut ingest: Ingest<S>,
    ) -> Result<Ingested<S>> {
        while let Some(piece) = self.inbox.blocking_recv() {
            ingest.push(&piece)?;
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
        let (pieces, inbox) = mpsc::channel(PIECES_WAITING_MAX);
        // Spawned now, so that the channel is drained while the body is read.
        let worker = tokio::spawn(blocking(move || work(Pieces { inbox })));
        let mut broken = None;
        loop {
            match self.next().await {
                Ok(Some(piece)) => {
                    received.fetch_add(piece.len() as u64, Ordering::Relaxed);
                    if pieces.send(piece).await.is_err() {
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
