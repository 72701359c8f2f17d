//! When to try again, and when to give up.
//!
//! Invariant: no operation goes on longer than its deadline without progress, its own or, while
//! it stands in line for a host, of those before it; and no wait is started that would end after
//! it. The decision ([`next_wait`]) is pure; the waiting is `tokio::time`, so a paused clock can
//! stand in for it.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, header};
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::StdRng;
use tokio::time::{Instant, sleep, timeout_at};

use super::http::line::Place;
use super::stats::{Count, Counters};
use crate::{Error, Result};

/// Failures in a row before giving up, but for what lasts: with the waits below about 6 s on
/// average.
const FAILURES_MAX: u32 = 8;
/// Failures in a row when nobody even answers the connection: a wrong address should not
/// cost a user more than a second.
const CONNECT_FAILURES_MAX: u32 = 3;
/// Upper bound of the first wait; doubles with every failure.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// Upper bound of any wait the server did not ask for.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// What an operation is about, for error texts.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    /// In the user's words: a reference, or `blob sha256:…`.
    pub(crate) what: String,
    /// The registry host as the user wrote it.
    pub(crate) host: String,
}

/// Why one attempt failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// Trying again cannot help.
    Fatal(Error),
    /// Trying again may help.
    Transient(Transient),
}

/// A failure that another attempt may mend.
#[derive(Debug)]
pub(crate) struct Transient {
    /// What happened, for the final error.
    pub(crate) detail: String,
    /// What kind of trouble it is.
    pub(crate) kind: Trouble,
}

/// Kinds of transient trouble, which differ in patience and in the final error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// No connection could be made.
    Connect,
    /// A connection was there, and nothing came over it.
    Silent,
    /// A connection broke, stalled, or carried a server error.
    Broken {
        /// The server's `Retry-After`.
        retry_after: Option<Duration>,
    },
    /// 429.
    Limited {
        /// The server's `Retry-After`.
        retry_after: Option<Duration>,
    },
}

impl Trouble {
    /// How long the server asked to be left alone.
    pub(crate) fn retry_after(self) -> Option<Duration> {
        match self {
            Self::Connect | Self::Silent => None,
            Self::Broken { retry_after } | Self::Limited { retry_after } => retry_after,
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

impl Fault {
    /// A connection that broke.
    pub(crate) fn broken(detail: impl Into<String>) -> Self {
        Self::Transient(Transient {
            detail: detail.into(),
            kind: Trouble::Broken { retry_after: None },
        })
    }

    /// A connection over which nothing came for too long.
    pub(crate) fn silent(detail: impl Into<String>) -> Self {
        Self::Transient(Transient {
            detail: detail.into(),
            kind: Trouble::Silent,
        })
    }
}

/// How soon an operation gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Patience {
    /// As long as there is a chance: there is nobody else to ask.
    #[default]
    Full,
    /// Until the deadline: the host is known to have been there, and who waits may be a
    /// container, to which a registry's restart is to be a pause.
    Lasting,
    /// A body that breaks is resumed once; else somebody else is asked.
    Brief,
}

impl Patience {
    /// Failures of this kind in a row before there is no chance. Pure.
    fn failures_max(self, kind: Trouble) -> u32 {
        match (self, kind) {
            (Self::Lasting, _) => u32::MAX,
            (_, Trouble::Connect) => CONNECT_FAILURES_MAX,
            (_, Trouble::Silent | Trouble::Broken { .. } | Trouble::Limited { .. }) => FAILURES_MAX,
        }
    }

    /// Whether so many failures in a row, of which the last is of this kind, are enough
    /// whatever time is left. Pure.
    fn ends(self, failures: u32, kind: Trouble) -> bool {
        match (self, kind) {
            (Self::Full | Self::Lasting, _) => false,
            (Self::Brief, Trouble::Broken { retry_after: None }) => failures > 1,
            (
                Self::Brief,
                Trouble::Connect
                | Trouble::Silent
                | Trouble::Broken { .. }
                | Trouble::Limited { .. },
            ) => true,
        }
    }
}

/// Randomness for backoff, shared by the operations of one source.
#[derive(Clone)]
pub(crate) struct Jitter(Arc<Mutex<StdRng>>);

impl Jitter {
    /// Jitter drawn from `rng`.
    pub(crate) fn new(rng: StdRng) -> Self {
        Self(Arc::new(Mutex::new(rng)))
    }

    fn fraction(&self) -> f64 {
        self.0.lock().random::<f64>()
    }
}

/// How long to wait before attempt `failures + 1`, or `None` to give up.
///
/// `fraction` is in `0..1`: full jitter, so that a crowd of clients does not come back in
/// step. A server's `Retry-After` is a lower bound, never ignored.
pub(crate) fn next_wait(
    patience: Patience,
    failures: u32,
    kind: Trouble,
    remaining: Duration,
    fraction: f64,
) -> Option<Duration> {
    if failures >= patience.failures_max(kind) {
        return None;
    }
    let ceiling = BACKOFF_FIRST
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(BACKOFF_MAX);
    let wait = ceiling
        .mul_f64(fraction.clamp(0.0, 1.0))
        .max(kind.retry_after().unwrap_or(Duration::ZERO));
    (wait < remaining).then_some(wait)
}

/// The wait a `Retry-After` header asks for: seconds, or an HTTP date against `now`.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse::<u64>() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?;
            Some(date.duration_since(now).unwrap_or(Duration::ZERO))
        }
    }
}

/// How an operation is to ask, and why it gave up, if it did. Clones share the latter.
#[derive(Debug, Clone, Default)]
pub(crate) struct Manner {
    patience: Patience,
    gave_up: Arc<Mutex<Option<Trouble>>>,
}

impl Manner {
    /// To ask with `patience`.
    pub(crate) fn new(patience: Patience) -> Self {
        Self {
            patience,
            gave_up: Arc::default(),
        }
    }

    /// The trouble because of which an operation gave up the host; none if the host said no.
    pub(crate) fn gave_up(&self) -> Option<Trouble> {
        *self.gave_up.lock()
    }
}

/// One operation's attempts, from its first request to success or the final error.
pub(crate) struct Attempts {
    subject: Subject,
    deadline: Duration,
    jitter: Jitter,
    counters: Arc<Counters>,
    manner: Manner,
    place: Place,
    since_progress: Instant,
    failures: u32,
    last_detail: Option<String>,
}

impl Attempts {
    /// Starts the clock.
    pub(crate) fn new(
        subject: Subject,
        deadline: Duration,
        jitter: Jitter,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            subject,
            deadline,
            jitter,
            counters,
            manner: Manner::default(),
            place: Place::default(),
            since_progress: Instant::now(),
            failures: 0,
            last_detail: None,
        }
    }

    /// The same in that manner.
    pub(crate) fn asking(mut self, manner: Manner) -> Self {
        self.manner = manner;
        self
    }

    /// The same for what is known to be there, unless somebody else can be asked.
    pub(crate) fn lasting(mut self) -> Self {
        if self.manner.patience == Patience::Full {
            self.manner.patience = Patience::Lasting;
        }
        self
    }

    /// What the operation is about.
    pub(crate) fn subject(&self) -> &Subject {
        &self.subject
    }

    /// Bytes arrived: the deadline and the failure count start over.
    pub(crate) fn progress(&mut self) {
        self.since_progress = Instant::now();
        self.failures = 0;
        self.last_detail = None;
    }

    /// Runs one attempt, cut off at the deadline.
    pub(crate) async fn bound<T>(
        &mut self,
        attempt: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let place = self.place.clone();
        let mut attempt = pin!(place.with(attempt));
        loop {
            let end = self.since_progress + self.deadline;
            if let Ok(outcome) = timeout_at(end, attempt.as_mut()).await {
                return outcome;
            }
            match place.good_until(self.deadline) {
                Some(later) if later > end => self.since_progress = later - self.deadline,
                _ => return Err(Fault::Fatal(self.out_of_time())),
            }
        }
    }

    /// Waits before the next attempt, or turns `fault` into the operation's error.
    pub(crate) async fn after(&mut self, fault: Fault) -> Result<()> {
        let transient = match fault {
            Fault::Fatal(error) => return Err(error),
            Fault::Transient(transient) => transient,
        };
        self.failures += 1;
        let remaining = self.deadline.saturating_sub(self.since_progress.elapsed());
        let patience = self.manner.patience;
        let wait = next_wait(
            patience,
            self.failures,
            transient.kind,
            remaining,
            self.jitter.fraction(),
        );
        match wait.filter(|_| !patience.ends(self.failures, transient.kind)) {
            Some(wait) => {
                tracing::debug!(
                    error = transient.detail,
                    host = self.subject.host,
                    "request failed, trying again"
                );
                self.counters.add(Count::Retries, 1);
                self.last_detail = Some(transient.detail);
                sleep(wait).await;
                Ok(())
            }
            None => Err(self.give_up(transient)),
        }
    }

    /// Repeats `attempt` until it succeeds or gives up.
    pub(crate) async fn run<T, F: Future<Output = Result<T, Fault>>>(
        &mut self,
        attempt: impl Fn() -> F,
    ) -> Result<T> {
        loop {
            match self.bound(attempt()).await {
                Ok(value) => return Ok(value),
                Err(fault) => self.after(fault).await?,
            }
        }
    }

    fn give_up(&self, transient: Transient) -> Error {
        let Subject { what, host } = self.subject.clone();
        *self.manner.gave_up.lock() = Some(transient.kind);
        if let Trouble::Limited { retry_after } = transient.kind {
            return Error::RateLimited {
                what,
                host,
                retry_after,
            };
        }
        let detail = format!(
            "{} (tried {} times in {}, deadline {})",
            transient.detail,
            self.failures,
            seconds(self.since_progress.elapsed()),
            seconds(self.deadline),
        );
        Error::Unavailable { what, host, detail }
    }

    fn out_of_time(&self) -> Error {
        *self.manner.gave_up.lock() = Some(Trouble::Silent);
        let Subject { what, host } = self.subject.clone();
        let last = self
            .last_detail
            .as_ref()
            .map_or(String::new(), |detail| format!("; before that: {detail}"));
        let detail = format!(
            "no progress within the deadline of {}{last}",
            seconds(self.deadline)
        );
        Error::Unavailable { what, host, detail }
    }
}

/// A duration for people: `15 s`, `0.3 s`.
pub(crate) fn seconds(duration: Duration) -> String {
    if duration.subsec_millis() == 0 || duration.as_secs() >= 10 {
        format!("{} s", duration.as_secs())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

#[cfg(test)]
mod tests;
