//! What a link to a host can do, learned from the requests that go over it.
//!
//! Invariant: bounded memory, no clock of its own. Every estimate is of recent requests
//! only, so it follows a link that changes, and no single odd sample moves it far:
//! - *round trip*, the server's own time included: a low quantile of the times from a
//!   request to its first byte. Requests that queue behind others, or set a connection up,
//!   took longer than the link does; those are the upper part.
//! - *bandwidth*: the most of the rates seen over windows of time in which at least one
//!   body was under way all the while. A window in which the node was too busy to read, or
//!   the bodies too short, shows less than the link can do, never more; that is why the
//!   most is taken, and why windows are long enough for what sockets had buffered.
//!
//! Before there are samples it is [`Link::GUESS`].

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// First bytes that are remembered: some seconds of a busy start.
const FIRST_BYTES_MAX: usize = 64;
/// Samples before the median is worth anything.
const FIRST_BYTES_MIN: usize = 8;
/// Windows that are remembered.
const WINDOWS_MAX: usize = 16;
/// Shortest window. Shorter ones measure the socket buffer.
const WINDOW_MIN: Duration = Duration::from_millis(20);
/// Fewest bytes of a window.
const WINDOW_BYTES_MIN: u64 = 256 << 10;

/// What a link can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// From a request to its first byte, the server's own time included.
    pub round_trip: Duration,
    /// Bytes it carries in a second, never 0.
    pub bytes_per_second: u64,
}

impl Link {
    /// A gigabit to a registry near by.
    pub const GUESS: Self = Self {
        round_trip: Duration::from_millis(10),
        bytes_per_second: 125_000_000,
    };

    /// Bytes that the link carries in one round trip: what must be under way at once to
    /// keep it busy.
    pub fn round_trip_bytes(&self) -> u64 {
        let micros = u64::try_from(self.round_trip.as_micros()).unwrap_or(u64::MAX);
        self.bytes_per_second.saturating_mul(micros) / 1_000_000
    }
}

/// Learns a [`Link`]. All times it is told must be of one clock and not go back.
#[derive(Debug, Default)]
pub struct LinkEstimator {
    first_bytes: VecDeque<Duration>,
    rates: VecDeque<u64>,
    /// Bodies under way.
    bodies: u32,
    window: Option<Window>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    began: Instant,
    bytes: u64,
}

impl LinkEstimator {
    /// The first byte of an answer came `took` after its request was sent; its body is
    /// under way from `now` on. What came with that byte was on its way before, so it is
    /// not counted.
    pub fn begin(&mut self, took: Duration, now: Instant) {
        push(&mut self.first_bytes, took, FIRST_BYTES_MAX);
        self.bodies += 1;
        self.window.get_or_insert(Window {
            began: now,
            bytes: 0,
        });
    }

    /// Bytes of a body came.
    pub fn piece(&mut self, bytes: u64, now: Instant) {
        let Some(window) = &mut self.window else {
            return;
        };
        window.bytes = window.bytes.saturating_add(bytes);
        let took = now.saturating_duration_since(window.began);
        if took >= WINDOW_MIN && window.bytes >= WINDOW_BYTES_MIN {
            let rate = u128::from(window.bytes) * 1_000_000_000 / took.as_nanos().max(1);
            let rate = u64::try_from(rate).unwrap_or(u64::MAX).max(1);
            push(&mut self.rates, rate, WINDOWS_MAX);
            *window = Window {
                began: now,
                bytes: 0,
            };
        }
    }

    /// A body ended, whole or not. Without any, the time that follows says nothing.
    pub fn end(&mut self) {
        self.bodies = self.bodies.saturating_sub(1);
        if self.bodies == 0 {
            self.window = None;
        }
    }

    /// What the link can do, as far as is known.
    pub fn link(&self) -> Link {
        Link {
            round_trip: self.first_byte(4).unwrap_or(Link::GUESS.round_trip),
            bytes_per_second: self
                .rates
                .iter()
                .copied()
                .max()
                .unwrap_or(Link::GUESS.bytes_per_second),
        }
    }

    /// Half of the first bytes came within this; `None` while few have come.
    pub fn first_byte_median(&self) -> Option<Duration> {
        self.first_byte(2)
    }

    /// One in `parts` of the first bytes came within this.
    fn first_byte(&self, parts: usize) -> Option<Duration> {
        if self.first_bytes.len() < FIRST_BYTES_MIN {
            return None;
        }
        let mut sorted: Vec<Duration> = self.first_bytes.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / parts).copied()
    }
}

fn push<T>(line: &mut VecDeque<T>, value: T, len_max: usize) {
    if line.len() >= len_max {
        line.pop_front();
    }
    line.push_back(value);
}

#[cfg(test)]
mod tests;
