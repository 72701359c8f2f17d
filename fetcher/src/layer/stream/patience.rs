//! For how long somebody waits for a stream who could have the layer otherwise.
//!
//! Invariant: a stream that is given up would have taken longer than was granted, at the rate it
//! came until then; it is given a part of that time first, to show its rate. Never ends one
//! because of a pause alone that its rate so far makes up for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use crate::source::BlobRef;
use crate::{Error, Result};

/// A stream is looked at so many times in what it is granted.
const LOOKS: u32 = 6;

pub(super) struct Patience {
    granted: Option<Granted>,
    blob: BlobRef,
}

struct Granted {
    within: Duration,
    began: Instant,
    looks: Interval,
}

impl Patience {
    /// Endless without `within`.
    pub(super) fn new(within: Option<Duration>, blob: BlobRef) -> Self {
        let granted = within.map(|within| {
            let (began, between) = (Instant::now(), within / LOOKS);
            let between = between.max(Duration::from_millis(1));
            let mut looks = interval_at(began + between, between);
            looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            Granted {
                within,
                began,
                looks,
            }
        });
        Self { granted, blob }
    }

    /// What `next` comes to, of a stream of which `received` bytes have come.
    ///
    /// # Errors
    /// `Unsupported` when all of it would take too long; `next` is dropped half way then.
    pub(super) async fn wait<T>(
        &mut self,
        next: impl Future<Output = Result<T>>,
        received: &AtomicU64,
    ) -> Result<T> {
        let Some(granted) = &mut self.granted else {
            return next.await;
        };
        tokio::pin!(next);
        loop {
            tokio::select! {
                biased;
                _ = granted.looks.tick() => {
                    let (elapsed, within) = (granted.began.elapsed(), granted.within);
                    let received = received.load(Ordering::Relaxed);
                    if let Some(all) = too_long(elapsed, received, self.blob.size, within) {
                        return Err(given_up(&self.blob, all, within));
                    }
                }
                came = &mut next => return came,
            }
        }
    }
}

/// How long all of `size` bytes take at the rate of the `received` ones, if that is more than
/// `within`. Pure.
fn too_long(elapsed: Duration, received: u64, size: u64, within: Duration) -> Option<Duration> {
    let nanos = elapsed.as_nanos().saturating_mul(u128::from(size)) / u128::from(received.max(1));
    let all = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
    (all > within).then_some(all)
}

fn given_up(blob: &BlobRef, all: Duration, within: Duration) -> Error {
    Error::Unsupported {
        what: format!("layer {}", blob.digest),
        detail: format!(
            "it has no index here, and would take some {} s to stream, of which who asked waits for {}",
            all.as_secs(),
            within.as_secs()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Digest, Reference};

    #[test]
    fn a_stream_is_too_long_by_its_rate_so_far() {
        const MINUTE: Duration = Duration::from_secs(60);
        let seconds = Duration::from_secs;
        for (elapsed, received, expected) in [
            (10, 200, None),
            (10, 166, Some(Duration::from_nanos(60_240_963_855))),
            (10, 100, Some(seconds(100))),
            (10, 0, Some(seconds(10_000))),
            (59, 990, None),
            (60, 1000, None),
        ] {
            let all = too_long(seconds(elapsed), received, 1000, MINUTE);
            assert_eq!(all, expected, "{received} of 1000 in {elapsed} s");
        }
        let longest = too_long(Duration::MAX, 1, u64::MAX, MINUTE);
        assert_eq!(longest, Some(Duration::from_nanos(u64::MAX)));
    }

    #[tokio::test]
    async fn who_waits_for_ever_is_not_asked_to() {
        let received = AtomicU64::new(0);
        let repository = Reference::parse("reg.example/app").unwrap();
        let blob = BlobRef {
            repository: repository.repository().clone(),
            digest: Digest::sha256(b"a blob"),
            size: 1 << 30,
        };
        let mut patience = Patience::new(Some(Duration::from_millis(6)), blob.clone());
        let never = std::future::pending::<Result<()>>();
        let error = patience.wait(never, &received).await.unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let mut patience = Patience::new(None, blob);
        patience.wait(async { Ok(()) }, &received).await.unwrap();
    }
}
