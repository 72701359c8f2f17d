//! For how long somebody waits for a stream who could have the layer otherwise.
//!
//! Invariant: a stream that is given up would have taken longer than was granted from when it
//! was asked for, at the rate it came from then on; it is given a part of that time first, to
//! show its rate. Never ends one because of a pause alone that its rate so far makes up for.
//! One that nobody has asked for is not judged by its rate: it ends when one of its image was
//! given up, or when nobody came for it in [`UNASKED_TIMES`] of what is granted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until};

use crate::layer::open::{Asker, others_took_too_long};
use crate::source::BlobRef;
use crate::{Error, Result};

/// A stream is looked at so many times in what it is granted.
const LOOKS: u32 = 6;
/// A stream that nobody asks for may take so many times as long: who pulls an image comes for all
/// of its layers within minutes, and one that trickles shall not keep its turn for ever.
const UNASKED_TIMES: u32 = 10;

pub(super) struct Patience {
    asker: Option<Asker>,
    began: Instant,
    /// From when somebody has waited.
    granted: Option<Granted>,
    blob: BlobRef,
}

struct Granted {
    began: Instant,
    /// Bytes that had come until then.
    before: u64,
    looks: Interval,
}

impl Patience {
    /// Endless without `asker`.
    pub(super) fn new(asker: Option<Asker>, blob: BlobRef) -> Self {
        Self {
            asker,
            began: Instant::now(),
            granted: None,
            blob,
        }
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
        let Some(asker) = &self.asker else {
            return next.await;
        };
        tokio::pin!(next);
        if self.granted.is_none() {
            let forgotten = self.began + asker.within.saturating_mul(UNASKED_TIMES);
            tokio::select! {
                biased;
                () = asker.asked.wait() => {}
                () = asker.too_long.wait() => return Err(others_took_too_long(&self.blob)),
                came = &mut next => return came,
                () = sleep_until(forgotten) => return Err(nobody_came(&self.blob)),
            }
        }
        let granted = self
            .granted
            .get_or_insert_with(|| Granted::new(asker.within, received.load(Ordering::Relaxed)));
        loop {
            tokio::select! {
                biased;
                _ = granted.looks.tick() => {
                    let received = received.load(Ordering::Relaxed).saturating_sub(granted.before);
                    let size = self.blob.size.saturating_sub(granted.before);
                    let elapsed = granted.began.elapsed();
                    if let Some(all) = too_long(elapsed, received, size, asker.within) {
                        asker.too_long.say();
                        return Err(given_up(&self.blob, all, asker.within));
                    }
                }
                came = &mut next => return came,
            }
        }
    }
}

impl Granted {
    fn new(within: Duration, before: u64) -> Self {
        let (began, between) = (Instant::now(), within / LOOKS);
        let between = between.max(Duration::from_millis(1));
        let mut looks = interval_at(began + between, between);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            began,
            before,
            looks,
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

fn nobody_came(blob: &BlobRef) -> Error {
    Error::Unsupported {
        what: format!("layer {}", blob.digest),
        detail: "it has no index here, and nobody came for it while it was streamed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::open::{Lines, Said};
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

    fn asker(within: Duration) -> Asker {
        Asker {
            within,
            asked: Said::default(),
            too_long: Said::default(),
            lines: Lines::new(1, 1),
        }
    }

    fn blob() -> BlobRef {
        let repository = Reference::parse("reg.example/app").unwrap();
        BlobRef {
            repository: repository.repository().clone(),
            digest: Digest::sha256(b"a blob"),
            size: 1 << 30,
        }
    }

    async fn never() -> Result<()> {
        std::future::pending().await
    }

    #[tokio::test]
    async fn who_waits_for_ever_is_not_asked_to() {
        let received = AtomicU64::new(0);
        let asker = asker(Duration::from_millis(6));
        asker.asked.say();
        let mut patience = Patience::new(Some(asker.clone()), blob());
        let error = patience.wait(never(), &received).await.unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(
            asker.too_long.is_said(),
            "the others are streamed none the less"
        );
        let mut patience = Patience::new(None, blob());
        patience.wait(async { Ok(()) }, &received).await.unwrap();
    }

    #[tokio::test]
    async fn patience_counts_from_when_somebody_waits() {
        let within = Duration::from_millis(60);
        let (asker, received) = (asker(within), AtomicU64::new(0));
        let mut patience = Patience::new(Some(asker.clone()), blob());
        // Slow, but nobody waits.
        let slow = async {
            tokio::time::sleep(within / 2).await;
            received.store(10, Ordering::Relaxed);
            Ok(())
        };
        patience.wait(slow, &received).await.unwrap();
        assert!(patience.granted.is_none());
        asker.asked.say();
        let error = patience.wait(never(), &received).await.unwrap_err();
        assert!(error.to_string().contains("to stream"), "{error}");
        assert_eq!(patience.granted.unwrap().before, 10);
    }

    #[tokio::test]
    async fn what_nobody_asks_for_ends_with_its_image_or_when_it_is_forgotten() {
        let received = AtomicU64::new(0);
        let asker = asker(Duration::from_millis(1));
        let mut patience = Patience::new(Some(asker.clone()), blob());
        let error = patience.wait(never(), &received).await.unwrap_err();
        assert!(error.to_string().contains("nobody came"), "{error}");
        assert!(!asker.too_long.is_said());
        let mut patience = Patience::new(Some(asker.clone()), blob());
        asker.too_long.say();
        let error = patience.wait(never(), &received).await.unwrap_err();
        assert!(error.to_string().contains("another layer"), "{error}");
    }
}
