//! Asking for a request's bytes, up to the first of them; for a reader once more if they are late.
//!
//! Most requests of a host are answered alike, so one that takes several times as long as
//! usual is often lost on the way, or stuck behind something. Then a second one is sent; who
//! answers first is read, the other is dropped. Over HTTP/1.1 it goes on another connection.
//! Over HTTP/2 it may go on the same one: that helps against a server that is late with one
//! answer, and not against a connection that stalls.
//!
//! Invariant: at most two requests for a range at once, and second ones are a small part
//! of all ([`SecondTries`]): without that bound, a host that becomes slow for everybody
//! would get twice the requests at the worst moment. Only before a byte has come, so no
//! byte of a body is read twice. An error is final only when both failed.

use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::{Either, select};
use tokio::time::timeout;

use super::counters::add;
use super::{Priority, Shared};
use crate::Result;
use crate::source::Body;
use crate::types::ByteRange;

/// How many times as long as usual the first byte may take.
const LATE: u32 = 3;
/// How many times the shortest wait it may take while nothing is known of the host.
const LATE_UNKNOWN: u32 = 10;
/// Requests of readers for each second one: 5 %.
const REQUESTS_PER_SECOND_TRY: u32 = 20;
/// Second ones that may be saved up, and that there are at first.
const SAVED_MAX: u32 = 4;

/// A body that has begun to arrive.
pub(super) struct First {
    /// Its first bytes; empty only if it has none.
    pub(super) piece: Bytes,
    /// What is still to come.
    pub(super) body: Body,
    /// From the request to the first byte.
    pub(super) took: Duration,
}

/// How many second requests a host may still get. Pure.
#[derive(Debug)]
pub(super) struct SecondTries {
    /// In requests of readers.
    saved: u32,
}

impl Default for SecondTries {
    fn default() -> Self {
        Self {
            saved: SAVED_MAX * REQUESTS_PER_SECOND_TRY,
        }
    }
}

impl SecondTries {
    /// A reader's request was sent.
    pub(super) fn earn(&mut self) {
        self.saved = (self.saved + 1).min(SAVED_MAX * REQUESTS_PER_SECOND_TRY);
    }

    /// Takes one, if there is one.
    pub(super) fn spend(&mut self) -> bool {
        let left = self.saved.checked_sub(REQUESTS_PER_SECOND_TRY);
        self.saved = left.unwrap_or(self.saved);
        left.is_some()
    }
}

/// How long a reader's request may go without a byte, when half of them took at most
/// `median`; never less than `shortest`.
pub(super) fn late_after(median: Option<Duration>, shortest: Duration) -> Duration {
    match median {
        Some(median) => median.saturating_mul(LATE).max(shortest),
        None => shortest.saturating_mul(LATE_UNKNOWN),
    }
}

/// Asks the source for `parts` of the blob, for a request of this class.
pub(super) async fn bytes(
    shared: &Shared,
    parts: &[ByteRange],
    class: Option<Priority>,
) -> Result<First> {
    let mut first = pin!(ask(shared, parts));
    if class != Some(Priority::OnDemand) {
        return first.await;
    }
    let wait = shared.host.sends(shared.engine.config.late_after_min);
    if let Ok(outcome) = timeout(wait, &mut first).await {
        return outcome;
    }
    if !shared.host.may_try_again() {
        return first.await;
    }
    add(&shared.counters.second_tries, 1);
    tracing::debug!(digest = %shared.blob.digest, ?parts, "late answer, asking once more");
    let second = pin!(ask(shared, parts));
    match select(first, second).await {
        Either::Left((Err(error), second)) => second.await.map_err(|_| error),
        Either::Right((Err(_), first)) => first.await,
        Either::Left((first, _)) => first,
        Either::Right((second, _)) => second,
    }
}

async fn ask(shared: &Shared, parts: &[ByteRange]) -> Result<First> {
    add(&shared.counters.requests, 1);
    let sent = Instant::now();
    let mut body = shared.source.read_parts(&shared.blob, parts).await?;
    let piece = body.next().await.transpose()?.unwrap_or_default();
    Ok(First {
        piece,
        body,
        took: sent.elapsed(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn late_is_late_for_this_host() {
        let ms = Duration::from_millis;
        let table = [(None, 100, 1000), (Some(2), 100, 100), (Some(50), 100, 150)];
        for (median, shortest, expected) in table {
            assert_eq!(late_after(median.map(ms), ms(shortest)), ms(expected));
        }
        assert_eq!(
            late_after(Some(Duration::MAX), Duration::MAX),
            Duration::MAX
        );
    }

    proptest! {
        #[test]
        fn second_tries_are_a_small_part(late in prop::collection::vec(any::<bool>(), 0..2000)) {
            let (mut tries, mut spent, mut sent) = (SecondTries::default(), 0, 0);
            for is_late in late {
                tries.earn();
                sent += 1;
                spent += u32::from(is_late && tries.spend());
                prop_assert!(spent <= SAVED_MAX + sent / REQUESTS_PER_SECOND_TRY);
            }
        }
    }
}
