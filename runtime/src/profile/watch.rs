//! Waiting until a start is over, beside the container.
//!
//! Nothing tells when a process in another Linux namespace begins to listen, so it is
//! looked at ten times a second until the decision; that is the only polling, and it is
//! bounded by [`ReadyLimits::cap`].
//!
//! Invariant: never touches the container, never holds it up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lazarette_fetcher::task::blocking;

use super::ports;
use super::ready::{ReadyBy, ReadyLimits, Seen, decide};
use super::record::Recorder;

/// Between two looks. Finer than any start that a profile could help.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Waits until the container whose init is `pid` is ready. `output` becomes true with its
/// first byte.
pub async fn until_ready(
    recorder: &Recorder,
    pid: u32,
    output: &AtomicBool,
    limits: &ReadyLimits,
) -> ReadyBy {
    let began = Instant::now();
    let first = tokio::time::Instant::now() + LOOK_EVERY;
    let mut looks = tokio::time::interval_at(first, LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let is_listening = blocking(move || ports::is_listening(pid)).await;
        let running_for = began.elapsed();
        let seen = Seen {
            running_for,
            quiet_for: recorder.quiet_for().min(running_for),
            has_read: recorder.has_any(),
            is_waiting: recorder.is_waiting(),
            has_output: output.load(Ordering::Relaxed),
            is_listening,
            has_exited: false,
        };
        if let Some(by) = decide(&seen, limits) {
            return by;
        }
    }
}
