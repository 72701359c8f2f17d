//! Whether the next request of a session is worth looking for before sleeping.
//!
//! Who reads page after page asks again microseconds after an answer, and waking a thread for that
//! takes longer than the answer itself. So after a request that came soon after the one before, one
//! thread looks for the next for a moment. Invariant: one thread at a time looks at a session, and
//! only while its readers show that it pays; a session that is quiet costs nothing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long to look: a little more than a wake-up takes that is saved so.
pub(super) const LOOK: Duration = Duration::from_micros(50);
/// What comes so soon after an answer, its own wake-up counted in, would have been found.
const SOON: Duration = Duration::from_micros(100);

/// How fast a session's requests follow its answers.
pub(super) struct Pace {
    since: Instant,
    /// When a request was last done with, in nanoseconds since `since`; 0 before.
    done: AtomicU64,
    is_looked_at: AtomicBool,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            done: AtomicU64::new(0),
            is_looked_at: AtomicBool::new(false),
        }
    }

    /// Whether what has come just now came soon.
    pub(super) fn is_quick(&self) -> bool {
        let done = Duration::from_nanos(self.done.load(Ordering::Relaxed));
        let gap = self.since.elapsed().saturating_sub(done);
        !done.is_zero() && gap < SOON
    }

    /// A request is done with.
    pub(super) fn mark(&self) {
        let nanos = u64::try_from(self.since.elapsed().as_nanos());
        self.done
            .store(nanos.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Lets one thread look, until the turn is dropped.
    pub(super) fn turn(&self) -> Option<Turn<'_>> {
        (!self.is_looked_at.swap(true, Ordering::Acquire)).then_some(Turn(self))
    }
}

/// The right to look.
pub(super) struct Turn<'a>(&'a Pace);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.is_looked_at.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    #[test]
    fn only_what_comes_soon_after_another_is_quick() {
        let pace = Pace::new();
        assert!(!pace.is_quick(), "the first");
        let soon = |_| {
            pace.mark();
            pace.is_quick()
        };
        // Each try may be interrupted for longer.
        assert!((0..1000).any(soon));
        pace.mark();
        sleep(SOON);
        assert!(!pace.is_quick());
    }

    #[test]
    fn one_looks_at_a_time() {
        let pace = Pace::new();
        let turn = pace.turn();
        assert!(turn.is_some() && pace.turn().is_none());
        drop(turn);
        assert!(pace.turn().is_some());
    }
}
