//! The error of this crate's seam.
//!
//! Invariant: a variant exists because a caller reacts differently to it, and every
//! variant says what failed and on what. Never holds an errno or a gRPC status: those
//! tables live with the file system and the API edges.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::types::Digest;

/// Result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a reference and verified bytes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source answered that it does not have this. Asking again will not help.
    #[error("{what} not found{}", at(host))]
    NotFound {
        /// What was asked for, in the user's words (a reference, or "blob sha256:…").
        what: String,
        /// The host that answered; empty when this node itself lacks it.
        host: String,
    },
    /// Credentials are missing, wrong, or do not reach this far (401 and 403).
    #[error("access to {what} denied by {host}: {detail}")]
    Denied {
        /// What was asked for.
        what: String,
        /// The host that refused.
        host: String,
        /// The registry's own words, or what to do about it.
        detail: String,
    },
    /// The source asked to slow down, for longer than the deadline allows (429).
    #[error(
        "{host} limits the rate of requests (429) for {what}; try again{}",
        after(retry_after)
    )]
    RateLimited {
        /// What was asked for.
        what: String,
        /// The host that limits.
        host: String,
        /// How long it asked to wait, if it said.
        retry_after: Option<Duration>,
    },
    /// The source could not be reached, hung, or failed, until the deadline passed.
    #[error("cannot read {what} from {host}: {detail}")]
    Unavailable {
        /// What was asked for.
        what: String,
        /// The host that failed.
        host: String,
        /// What happened last, and how long was tried.
        detail: String,
    },
    /// Bytes do not have the digest that was promised. They were dropped.
    #[error("{what} is corrupt: expected {expected}, got {actual}")]
    Corrupt {
        /// Which thing failed the check ("manifest of …", "chunk 12 of layer sha256:…").
        what: String,
        /// The promised digest.
        expected: Digest,
        /// The digest of the bytes that came.
        actual: Digest,
    },
    /// A document, index or file of ours breaks its format. Nothing of it is used.
    #[error("{what} is malformed: {detail}")]
    Malformed {
        /// Which document.
        what: String,
        /// Which rule it breaks, and where.
        detail: String,
    },
    /// Input exceeds a limit that keeps the node safe.
    #[error("{what} exceeds the limit: {detail}")]
    Limit {
        /// Which input.
        what: String,
        /// The size seen and the limit.
        detail: String,
    },
    /// Well-formed, but not something this build can handle.
    #[error("{what} is not supported: {detail}")]
    Unsupported {
        /// Which input.
        what: String,
        /// Why, and what to do.
        detail: String,
    },
    /// The file system that holds the store is full.
    #[error(
        "no space left on the device that holds {}; free some space or use another --root",
        path.display()
    )]
    NoSpace {
        /// The path that was being written.
        path: PathBuf,
    },
    /// A local file operation failed.
    #[error("cannot {op} {}: {source}", path.display())]
    Io {
        /// The operation in plain words ("open", "write to").
        op: &'static str,
        /// The path it failed on.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The database of facts failed or is held by another process for too long.
    #[error("database {}: {detail}", path.display())]
    Db {
        /// Directory of the database.
        path: PathBuf,
        /// What it answered.
        detail: String,
    },
}

impl Error {
    /// Wraps a failed file operation, telling a full disk from everything else.
    pub fn io(op: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { path }
            }
            _ => Self::Io { op, path, source },
        }
    }

    /// A document or index that breaks its format.
    pub fn malformed(what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Malformed {
            what: what.into(),
            detail: detail.into(),
        }
    }

    /// Input over a limit.
    pub fn limit(what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Limit {
            what: what.into(),
            detail: detail.into(),
        }
    }

    /// The same error once more, for everyone who waited for one failed operation. Only
    /// the cause inside an `Io` may lose its type; its text and kind stay.
    pub(crate) fn duplicate(&self) -> Self {
        let again = |e: &std::io::Error| match e.raw_os_error() {
            Some(code) => std::io::Error::from_raw_os_error(code),
            None => std::io::Error::new(e.kind(), e.to_string()),
        };
        let (what, host, detail) = self.words();
        match self {
            Self::NotFound { .. } => Self::NotFound { what, host },
            Self::Denied { .. } => Self::Denied { what, host, detail },
            Self::RateLimited { retry_after, .. } => Self::RateLimited {
                what,
                host,
                retry_after: *retry_after,
            },
            Self::Unavailable { .. } => Self::Unavailable { what, host, detail },
            Self::Corrupt {
                expected, actual, ..
            } => Self::Corrupt {
                what,
                expected: *expected,
                actual: *actual,
            },
            Self::Malformed { .. } => Self::Malformed { what, detail },
            Self::Limit { .. } => Self::Limit { what, detail },
            Self::Unsupported { .. } => Self::Unsupported { what, detail },
            Self::NoSpace { path } => Self::NoSpace { path: path.clone() },
            Self::Io { op, path, source } => Self::Io {
                op,
                path: path.clone(),
                source: again(source),
            },
            Self::Db { path, .. } => Self::Db {
                path: path.clone(),
                detail,
            },
        }
    }

    /// Owned copies of `what`, `host` and `detail`; empty where a variant has none.
    fn words(&self) -> (String, String, String) {
        let (what, host, detail) = match self {
            Self::NotFound { what, host } | Self::RateLimited { what, host, .. } => {
                (what.as_str(), host.as_str(), "")
            }
            Self::Denied { what, host, detail } | Self::Unavailable { what, host, detail } => {
                (what.as_str(), host.as_str(), detail.as_str())
            }
            Self::Corrupt { what, .. } => (what.as_str(), "", ""),
            Self::Malformed { what, detail }
            | Self::Limit { what, detail }
            | Self::Unsupported { what, detail } => (what.as_str(), "", detail.as_str()),
            Self::NoSpace { .. } | Self::Io { .. } => ("", "", ""),
            Self::Db { detail, .. } => ("", "", detail.as_str()),
        };
        (what.to_owned(), host.to_owned(), detail.to_owned())
    }

    /// Whether the same call may succeed later without anything being changed.
    /// Retry and log level both ask this.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RateLimited { .. } | Self::Unavailable { .. } => true,
            Self::NotFound { .. }
            | Self::Denied { .. }
            | Self::Corrupt { .. }
            | Self::Malformed { .. }
            | Self::Limit { .. }
            | Self::Unsupported { .. }
            | Self::NoSpace { .. }
            | Self::Io { .. }
            | Self::Db { .. } => false,
        }
    }
}

fn at(host: &str) -> String {
    if host.is_empty() {
        String::new()
    } else {
        format!(" at {host}")
    }
}

fn after(retry_after: &Option<Duration>) -> String {
    match retry_after {
        Some(wait) => format!(" in {} s", wait.as_secs()),
        None => " later".to_owned(),
    }
}
