//! The slots of one host, and the line for them.
//!
//! Invariant: at most as many requests to a host are under way as it has slots, and who stands in
//! line knows whether the line moves: while those before it get bytes, waiting is no failure.
//! Never gives a slot out of turn, and bounds no wait: the operation does, by its deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

tokio::task_local! {
    /// Where the operation that runs stands in line; set around every attempt.
    static PLACE: Place;
}

/// Slots of one host.
pub(super) struct Slots {
    free: Arc<Semaphore>,
    waiting: AtomicUsize,
    moved: Mutex<Option<Instant>>,
}

impl Slots {
    /// All of `count` slots free.
    pub(super) fn new(count: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(count)),
            waiting: AtomicUsize::new(0),
            moved: Mutex::new(None),
        }
    }

    /// Waits for a slot, in turn.
    pub(super) async fn take(self: &Arc<Self>) -> Result<Slot, AcquireError> {
        let permit = match self.free.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                let _standing = Standing::new(self);
                self.free.clone().acquire_owned().await?
            }
        };
        Ok(Slot {
            _permit: permit,
            slots: self.clone(),
        })
    }
}

/// A request's slot; free again when dropped.
pub(super) struct Slot {
    _permit: OwnedSemaphorePermit,
    slots: Arc<Slots>,
}

impl Slot {
    /// Bytes came, or it is free.
    pub(super) fn moves(&self) {
        if self.slots.waiting.load(Ordering::Relaxed) > 0 {
            *self.slots.moved.lock() = Some(Instant::now());
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.moves();
    }
}

/// An operation's place: the line that it stands in, if it does.
#[derive(Clone, Default)]
pub(crate) struct Place(Arc<Mutex<Option<Arc<Slots>>>>);

impl Place {
    /// Runs `attempt`, which has this place.
    pub(crate) async fn with<T>(&self, attempt: impl Future<Output = T>) -> T {
        PLACE.scope(self.clone(), attempt).await
    }

    /// Until when there is reason to wait: `patience` after the line moved last. `None` outside
    /// a line, and in one that has not moved.
    pub(crate) fn good_until(&self, patience: Duration) -> Option<Instant> {
        let slots = self.0.lock().clone()?;
        let moved = *slots.moved.lock();
        Some(moved? + patience)
    }
}

/// Standing in line; over when dropped.
struct Standing<'a> {
    slots: &'a Arc<Slots>,
    place: Option<Place>,
}

impl<'a> Standing<'a> {
    fn new(slots: &'a Arc<Slots>) -> Self {
        slots.waiting.fetch_add(1, Ordering::Relaxed);
        let place = PLACE.try_with(Place::clone).ok();
        if let Some(place) = &place {
            *place.0.lock() = Some(slots.clone());
        }
        Self { slots, place }
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        self.slots.waiting.fetch_sub(1, Ordering::Relaxed);
        if let Some(place) = &self.place {
            *place.0.lock() = None;
        }
    }
}
