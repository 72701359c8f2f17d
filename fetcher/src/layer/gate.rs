//! Who may send a request now, and the waiting for it.
//!
//! Invariant: what [`line`] decides is what happens, at once: every change of the lines
//! lets go whoever may go since. A request that is given up leaves its line, or gives back
//! the pass it was just given. The lines' lock, and within it that of a time, are held for
//! look-ups only. Never does I/O, never knows chunks.

mod line;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};

use self::line::Lines;
use super::{EngineConfig, Priority};

/// Number of a request. Lower ones came earlier; 0 is none's.
pub(super) type Ticket = u64;

/// What a request needs.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) class: Priority,
    pub(super) host: Arc<str>,
    /// Bytes it will hold, at most the budget.
    pub(super) bytes: u64,
}

/// Who goes before background requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ahead {
    Nobody,
    /// Under way, or waiting for a slot.
    Somebody,
    /// Waiting for memory, which a background request may hold.
    Starved,
}

/// What a request that is under way does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Go,
    /// Gives back its pass and gets into line again.
    Leave,
}

/// The gate of an engine.
#[derive(Debug)]
pub(super) struct Gate {
    lines: Mutex<Lines<oneshot::Sender<Pass>>>,
    /// When somebody was last ahead of background requests.
    busy: Mutex<Instant>,
    tickets: AtomicU64,
    pause_max: Duration,
    /// Written under the lock, so that the last word is the latest one.
    ahead: watch::Sender<Ahead>,
}

/// A place in line; dropped, it is given up.
pub(super) struct Entering {
    gate: Arc<Gate>,
    ticket: Ticket,
    told: oneshot::Receiver<Pass>,
}

/// Leave to send one request. Dropped, the next one goes.
#[derive(Debug)]
pub(super) struct Pass {
    /// Taken when it is given back.
    gate: Option<Arc<Gate>>,
    ticket: Ticket,
}

impl Gate {
    pub(super) fn new(config: EngineConfig) -> Arc<Self> {
        Arc::new(Self {
            lines: Mutex::new(Lines::new(config)),
            busy: Mutex::new(Instant::now()),
            tickets: AtomicU64::new(1),
            pause_max: config.pause_max,
            ahead: watch::Sender::new(Ahead::Nobody),
        })
    }

    /// Gets into line. Never waits.
    pub(super) fn enter(self: &Arc<Self>, ask: Ask) -> Entering {
        let (tell, told) = oneshot::channel();
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        self.lines.lock().push(ticket, ask, tell);
        self.settle();
        Entering {
            gate: Arc::clone(self),
            ticket,
            told,
        }
    }

    /// Makes a request more urgent. One that has ended is ignored.
    pub(super) fn promote(self: &Arc<Self>, ticket: Ticket, class: Priority) {
        self.lines.lock().promote(ticket, class);
        self.settle();
        // It may be paused, which this ends even if nobody's place changed.
        self.ahead.send_modify(|_| ());
    }

    /// Lets go whoever may.
    fn settle(self: &Arc<Self>) {
        loop {
            let next = {
                let mut lines = self.lines.lock();
                let next = lines.next();
                let ahead = lines.ahead();
                self.ahead.send_if_modified(|was| {
                    let was = std::mem::replace(was, ahead);
                    if (was, ahead) != (Ahead::Nobody, Ahead::Nobody) {
                        *self.busy.lock() = Instant::now();
                    }
                    was != ahead
                });
                next
            };
            let Some((ticket, tell)) = next else {
                return;
            };
            let pass = Pass {
                gate: Some(Arc::clone(self)),
                ticket,
            };
            // Who went away meanwhile leaves its place to the next round of this loop.
            if let Err(mut unused) = tell.send(pass) {
                unused.gate = None;
                self.lines.lock().end(ticket);
            }
        }
    }

    /// Waits until nobody has been ahead of background requests since `pause` ago, or since
    /// `since` if that was later.
    pub(super) async fn quiet(&self, since: Instant, pause: Duration) {
        let mut changes = self.ahead.subscribe();
        loop {
            let ahead = *changes.borrow_and_update();
            let until = (*self.busy.lock()).max(since) + pause;
            let is_quiet = ahead == Ahead::Nobody;
            if is_quiet && Instant::now() >= until {
                return;
            }
            tokio::select! {
                () = sleep_until(until), if is_quiet => {}
                changed = changes.changed() => if changed.is_err() {
                    return;
                },
            }
        }
    }

    /// Requests that pause.
    #[cfg(test)]
    pub(super) fn pausing(&self) -> usize {
        self.ahead.receiver_count()
    }

    /// Bytes that requests under way hold.
    pub(super) fn memory(&self) -> u64 {
        self.lines.lock().memory()
    }
}

impl Entering {
    pub(super) fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// Waits for leave; `None` is never the answer while the gate exists.
    pub(super) async fn pass(mut self) -> Option<Pass> {
        (&mut self.told).await.ok()
    }
}

impl Drop for Entering {
    fn drop(&mut self) {
        self.gate.lines.lock().leave(self.ticket);
        // Those behind it may have waited for it alone.
        self.gate.settle();
    }
}

impl Pass {
    pub(super) fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// How urgent it is now.
    pub(super) fn class(&self) -> Option<Priority> {
        self.gate.as_ref()?.lines.lock().class(self.ticket)
    }

    /// Counts `bytes` more that this request turned out to hold.
    pub(super) fn grow(&self, bytes: u64) {
        if let Some(gate) = self.gate.as_ref().filter(|_| bytes > 0) {
            gate.lines.lock().grow(self.ticket, bytes);
        }
    }

    /// Called between chunks. A background request waits here, not reading its body, while
    /// anybody is ahead of it, and leaves if they need its memory or take long. Others go.
    pub(super) async fn turn(&self) -> Turn {
        let Some(gate) = &self.gate else {
            return Turn::Go;
        };
        let mut changes = gate.ahead.subscribe();
        let wait = async {
            loop {
                let ahead = *changes.borrow_and_update();
                if self.class() != Some(Priority::Background) {
                    return Turn::Go;
                }
                match ahead {
                    Ahead::Nobody => return Turn::Go,
                    Ahead::Starved => return Turn::Leave,
                    Ahead::Somebody => {}
                }
                if changes.changed().await.is_err() {
                    return Turn::Go;
                }
            }
        };
        timeout(gate.pause_max, wait).await.unwrap_or(Turn::Leave)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if let Some(gate) = self.gate.take() {
            gate.lines.lock().end(self.ticket);
            gate.settle();
        }
    }
}

#[cfg(test)]
mod tests;
