//! Estimates of a simulated link.

use proptest::prelude::*;

use super::*;

/// A link that carries bodies one after another.
struct Simulated {
    began: Instant,
    now: Duration,
    truth: Link,
    estimator: LinkEstimator,
}

impl Simulated {
    fn new(round_trip_ms: u64, bytes_per_second: u64) -> Self {
        Self {
            began: Instant::now(),
            now: Duration::ZERO,
            truth: Link {
                round_trip: Duration::from_millis(round_trip_ms),
                bytes_per_second,
            },
            estimator: LinkEstimator::default(),
        }
    }

    /// One body in pieces of 16 KiB; `idle` is time that the node does not read in
    /// between, and what came meanwhile is then read at once.
    fn body(&mut self, bytes: u64, queued: Duration, idle: Duration) {
        let took = self.truth.round_trip + queued;
        self.now += took;
        self.estimator.begin(took, self.began + self.now);
        let (mut sent, start) = (0, self.now);
        while sent < bytes {
            let piece = (16 << 10).min(bytes - sent);
            sent += piece;
            let carried = Duration::from_nanos(sent * 1_000_000_000 / self.truth.bytes_per_second);
            self.now = (start + carried).max(self.now) + idle;
            self.estimator.piece(piece, self.began + self.now);
        }
        self.estimator.end();
    }
}

fn within(actual: f64, expected: f64, share: f64) -> bool {
    (actual - expected).abs() <= expected * share
}

#[test]
fn without_samples_it_guesses() {
    let mut estimator = LinkEstimator::default();
    assert_eq!(estimator.link(), Link::GUESS);
    assert_eq!(estimator.first_byte_median(), None);
    estimator.piece(9 << 20, Instant::now());
    estimator.end();
    assert_eq!(estimator.link(), Link::GUESS, "no body is under way");
    assert_eq!(Link::GUESS.round_trip_bytes(), 1_250_000);
}

#[test]
fn a_link_that_becomes_slower_is_noticed() {
    let mut link = Simulated::new(2, 125_000_000);
    for _ in 0..20 {
        link.body(8 << 20, Duration::ZERO, Duration::ZERO);
    }
    link.truth = Link {
        round_trip: Duration::from_millis(40),
        bytes_per_second: 12_500_000,
    };
    for _ in 0..80 {
        link.body(1 << 20, Duration::ZERO, Duration::ZERO);
    }
    let seen = link.estimator.link();
    assert!(
        within(seen.bytes_per_second as f64, 12_500_000.0, 0.1),
        "{seen:?}"
    );
    assert_eq!(seen.round_trip, Duration::from_millis(40));
}

proptest! {
    #[test]
    fn it_is_learned_in_spite_of_queues_and_pauses(
        round_trip_ms in 1_u64..100,
        bytes_per_second in 1_000_000_u64..1_000_000_000,
        bodies in prop::collection::vec((0_u64..6 << 20, 0_u64..50, 0_u64..3), 16..40),
    ) {
        let mut link = Simulated::new(round_trip_ms, bytes_per_second);
        let mut is_clean = 0;
        for (n, (bytes, queued_ms, idle_us)) in bodies.into_iter().enumerate() {
            // Every third has the link to itself, and is long enough to be measured.
            let own = n % 3 == 0;
            is_clean += usize::from(own);
            let queued = Duration::from_millis(if own { 0 } else { queued_ms });
            let idle = Duration::from_micros(if own { 0 } else { idle_us });
            let long = bytes_per_second / 20 + (512 << 10);
            link.body(if own { long } else { bytes }, queued, idle);
        }
        prop_assert!(is_clean >= 6);
        let seen = link.estimator.link();
        prop_assert_eq!(seen.round_trip, Duration::from_millis(round_trip_ms));
        let (rate, truth) = (seen.bytes_per_second as f64, bytes_per_second as f64);
        prop_assert!(within(rate, truth, 0.15), "{} of {}", rate, truth);
    }
}
