//! What hosts said that could not answer, and what is said of all of them together.
//!
//! Invariant: the error is of the kind that the deciding host's is, for callers react to the
//! kind, and it names every host that was asked and why that did not help. Bounded: so many
//! hosts as are asked, and a short reason for each.

use super::Candidate;
use crate::Error;

/// Longest reason that is repeated, in characters.
const REASON_CHARS_MAX: usize = 160;

/// Hosts that were asked in vain, in that order.
#[derive(Default)]
pub(super) struct Tried(Vec<Failure>);

struct Failure {
    name: String,
    decides: bool,
    error: Error,
}

impl Tried {
    /// One more.
    pub(super) fn add(&mut self, candidate: &Candidate, error: Error) {
        self.0.push(Failure {
            name: candidate.name.to_string(),
            decides: candidate.decides,
            error,
        });
    }

    /// What that host said counts no more: it is asked again.
    pub(super) fn forget(&mut self, candidate: &Candidate) {
        self.0.retain(|failure| *failure.name != *candidate.name);
    }

    /// The error of them all.
    pub(super) fn into_error(self) -> Error {
        let mut failures = self.0;
        let decides = failures.iter().rposition(|failure| failure.decides);
        let at = decides.unwrap_or(failures.len().saturating_sub(1));
        if at >= failures.len() {
            // Nobody was asked, which nobody does.
            return Error::malformed("hosts of a registry", "there are none");
        }
        let Failure { error, .. } = failures.remove(at);
        if failures.is_empty() {
            return error;
        }
        let others: Vec<String> = failures.iter().map(Failure::short).collect();
        with_others(error, &others.join("; "))
    }
}

impl Failure {
    fn short(&self) -> String {
        let name = &self.name;
        let reason = match &self.error {
            Error::NotFound { .. } => "not found".to_owned(),
            Error::Denied { detail, .. } => format!("denied: {detail}"),
            Error::RateLimited { .. } => "it limits the rate of requests".to_owned(),
            Error::Unavailable { detail, .. } => detail.clone(),
            Error::Corrupt { actual, .. } => format!("other bytes, {actual}"),
            Error::Malformed { detail, .. }
            | Error::Limit { detail, .. }
            | Error::Unsupported { detail, .. } => detail.clone(),
            other => other.to_string(),
        };
        let reason: String = reason.chars().take(REASON_CHARS_MAX).collect();
        format!("{name}: {reason}")
    }
}

/// The same error with what the others said.
fn with_others(error: Error, others: &str) -> Error {
    let also = |text: String| format!("{text} (asked too: {others})");
    match error {
        Error::NotFound { what, host } => Error::NotFound {
            what,
            host: also(host),
        },
        Error::Denied { what, host, detail } => Error::Denied {
            what,
            host,
            detail: also(detail),
        },
        Error::RateLimited {
            what,
            host,
            retry_after,
        } => Error::RateLimited {
            what: also(what),
            host,
            retry_after,
        },
        Error::Unavailable { what, host, detail } => Error::Unavailable {
            what,
            host,
            detail: also(detail),
        },
        Error::Corrupt {
            what,
            expected,
            actual,
        } => Error::Corrupt {
            what: also(what),
            expected,
            actual,
        },
        Error::Malformed { what, detail } => Error::Malformed {
            what,
            detail: also(detail),
        },
        Error::Limit { what, detail } => Error::Limit {
            what,
            detail: also(detail),
        },
        Error::Unsupported { what, detail } => Error::Unsupported {
            what,
            detail: also(detail),
        },
        local @ (Error::NoSpace { .. } | Error::Io { .. } | Error::Db { .. }) => local,
    }
}
