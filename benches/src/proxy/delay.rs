//! One direction of a delayed connection: bytes come out a fixed time after they went in.
//!
//! Invariant: order and content are kept; at most `window` bytes (and one piece more) wait at a
//! time, so a slow reader slows the writer as TCP would. Once closed, what is inside still
//! comes out in time.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How late a direction is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    /// Every piece, after it came in.
    pub(super) one_way: Duration,
    /// The first piece, on top of that.
    pub(super) first: Duration,
}

/// Pieces under way.
#[derive(Debug)]
pub(super) struct Queue {
    way: Way,
    window: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    pieces: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    begun: bool,
    closed: bool,
}

impl Queue {
    /// An empty direction that holds up to `window` bytes.
    pub(super) fn new(way: Way, window: usize) -> Self {
        Self {
            way,
            window,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Puts bytes in that arrived at `now`, when there is room; false once it is closed.
    pub(super) fn push(&self, bytes: &[u8], now: Instant) -> bool {
        let mut state = self.lock();
        while state.bytes >= self.window && !state.closed {
            state = self.wait(state);
        }
        if state.closed {
            return false;
        }
        let first = if state.begun {
            Duration::ZERO
        } else {
            self.way.first
        };
        state.begun = true;
        state.bytes += bytes.len();
        state
            .pieces
            .push_back((now + self.way.one_way + first, bytes.to_vec()));
        self.changed.notify_all();
        true
    }

    /// The next piece, when it is due; none when the queue is closed and empty.
    pub(super) fn pop(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        let (due, bytes) = loop {
            if let Some(piece) = state.pieces.pop_front() {
                break piece;
            }
            if state.closed {
                return None;
            }
            state = self.wait(state);
        };
        drop(state);
        // There is one taker, so the order holds while it sleeps.
        thread::sleep(due.saturating_duration_since(Instant::now()));
        self.lock().bytes -= bytes.len();
        self.changed.notify_all();
        Some(bytes)
    }

    /// Nothing more goes in.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(one_way_ms: u64, first_ms: u64, window: usize) -> Queue {
        let way = Way {
            one_way: Duration::from_millis(one_way_ms),
            first: Duration::from_millis(first_ms),
        };
        Queue::new(way, window)
    }

    #[test]
    fn everything_comes_out_in_order_and_not_before_its_time() {
        let queue = queue(5, 10, 1 << 20);
        let began = Instant::now();
        assert!(queue.push(b"one", began) && queue.push(b"two", began));
        queue.close();
        assert_eq!(queue.pop().as_deref(), Some(&b"one"[..]));
        assert!(began.elapsed() >= Duration::from_millis(15));
        assert_eq!(queue.pop().as_deref(), Some(&b"two"[..]));
        assert_eq!(queue.pop(), None);
        assert!(!queue.push(b"three", began));
    }

    #[test]
    fn a_full_window_holds_the_writer_until_the_reader_takes() {
        let queue = queue(0, 0, 4);
        assert!(queue.push(b"12345", Instant::now()));
        thread::scope(|scope| {
            let pushed = scope.spawn(|| queue.push(b"6", Instant::now()));
            assert_eq!(queue.pop().as_deref(), Some(&b"12345"[..]));
            assert!(pushed.join().unwrap());
            assert_eq!(queue.pop().as_deref(), Some(&b"6"[..]));
        });
    }

    #[test]
    fn closing_frees_a_writer_that_waits() {
        let queue = queue(0, 0, 1);
        assert!(queue.push(b"1", Instant::now()));
        thread::scope(|scope| {
            let pushed = scope.spawn(|| queue.push(b"2", Instant::now()));
            queue.close();
            assert!(!pushed.join().unwrap());
        });
    }
}
