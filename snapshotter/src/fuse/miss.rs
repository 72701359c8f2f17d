//! Where a read that cannot be answered leaves its FUSE thread.
//!
//! Invariant: every reply handed over is answered exactly once: with the bytes, with the
//! error of the fill, or with `EIO` when the mount closes. At most [`WAITING_MAX`] wait.
//! Buffers are made when the bytes are there, so a waiting read costs no memory to speak of.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fuser::{Errno, ReplyData};
use lazarette_fetcher::types::ByteRange;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::errno;
use crate::data::{LayerData, failed, fill_and};

/// Reads of one mount that may wait at a time; further ones fail with `EIO`. The kernel
/// sends one per blocked thread and some read-ahead, so only a runaway program gets here;
/// without a bound it could fill our memory.
const WAITING_MAX: usize = 16_384;

/// What a read is answered with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Bytes of the layer's data.
    pub(super) range: ByteRange,
    /// Zeros behind them.
    pub(super) zeros: usize,
}

/// What a mount needs to answer its misses.
pub(super) struct Misses {
    handle: Handle,
    data: Arc<dyn LayerData>,
    waiting: Arc<AtomicUsize>,
    closed: watch::Receiver<bool>,
    /// Which layer, for the log.
    what: Arc<str>,
}

impl Misses {
    /// Runs tasks on `handle` until `closed` becomes true.
    pub(super) fn new(
        handle: Handle,
        data: Arc<dyn LayerData>,
        closed: watch::Receiver<bool>,
        what: Arc<str>,
    ) -> Self {
        Self {
            handle,
            data,
            waiting: Arc::default(),
            closed,
            what,
        }
    }

    /// The data behind the mount.
    pub(super) fn data(&self) -> &dyn LayerData {
        &*self.data
    }

    /// Takes over a read; returns at once.
    pub(super) fn hand_over(&self, wanted: Wanted, reply: ReplyData) {
        let Wanted { range, zeros } = wanted;
        let Some(seat) = Seat::take(&self.waiting) else {
            tracing::warn!(layer = &*self.what, "too many reads wait for data");
            return reply.error(Errno::EIO);
        };
        let data = Arc::clone(&self.data);
        let mut closed = self.closed.clone();
        let what = Arc::clone(&self.what);
        self.handle.spawn(async move {
            let _seat = seat;
            let filled = fill_and(&data, range, move |data| read(data, range));
            let outcome = tokio::select! {
                biased;
                _ = closed.wait_for(|closed| *closed) => Err(Errno::EIO),
                outcome = filled => outcome.map_err(|error| {
                    tracing::warn!(layer = &*what, %range, %error, "read failed");
                    errno::of(&error)
                }),
            };
            match outcome {
                Ok(mut bytes) => {
                    bytes.resize(bytes.len().saturating_add(zeros), 0);
                    reply.data(&bytes);
                }
                Err(errno) => reply.error(errno),
            }
        });
    }
}

fn read(data: &dyn LayerData, range: ByteRange) -> lazarette_fetcher::Result<Option<Vec<u8>>> {
    let len =
        usize::try_from(range.len()).map_err(|_| failed(range, "the read is too long to hold"))?;
    let mut bytes = vec![0; len];
    let present = data.try_read(range.start(), &mut bytes)?;
    Ok(present.then_some(bytes))
}

/// A place among those who wait, given back on drop.
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(waiting: &Arc<AtomicUsize>) -> Option<Self> {
        waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                (taken < WAITING_MAX).then_some(taken + 1)
            })
            .ok()
            .map(|_| Self(Arc::clone(waiting)))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
