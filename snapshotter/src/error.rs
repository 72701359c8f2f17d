//! The error of this crate's seam.
//!
//! Invariant: a variant exists because a caller reacts differently to it, and every
//! message says what failed, on what, and what to do. Never holds an errno or a gRPC
//! status: those tables live at the edges.

use std::path::{Path, PathBuf};

/// Result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a layer index and a mounted root file system.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading, checking or storing bytes or facts failed.
    #[error(transparent)]
    Store(#[from] lazarette_fetcher::Error),
    /// No snapshot has this key or name.
    #[error("snapshot {key:?} not found")]
    NotFound {
        /// The key or name that was asked for.
        key: String,
    },
    /// A snapshot has this key or name already.
    #[error("snapshot {key:?} already exists")]
    AlreadyExists {
        /// The key or name that was to be made.
        key: String,
    },
    /// The snapshot is in a state that does not allow this.
    #[error("cannot {op} snapshot {key:?}: {detail}")]
    Precondition {
        /// What was to be done ("commit", "remove").
        op: &'static str,
        /// Its key or name.
        key: String,
        /// Which state forbids it, and what to do.
        detail: String,
    },
    /// An argument can never be right.
    #[error("invalid {what} {input:?}: {detail}")]
    Invalid {
        /// Which argument.
        what: &'static str,
        /// Its value.
        input: String,
        /// Which rule it breaks.
        detail: &'static str,
    },
    /// This machine or process lacks something that mounting needs.
    #[error("cannot {op}: {detail}")]
    Environment {
        /// What was to be done.
        op: &'static str,
        /// What is missing, and how to get it.
        detail: String,
    },
    /// The kernel refused to mount or unmount.
    #[error("cannot {op} {}: {source}{}", path.display(), after(detail))]
    Mount {
        /// What was to be done ("mount overlay at").
        op: &'static str,
        /// The mountpoint.
        path: PathBuf,
        /// What the kernel logged, or what to do; may be empty.
        detail: String,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// Wraps a failed file operation.
    pub(crate) fn io(op: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        lazarette_fetcher::Error::io(op, path, source).into()
    }

    /// Wraps a refused mount or unmount.
    pub(crate) fn mount(op: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Mount {
            op,
            path: path.to_path_buf(),
            detail: String::new(),
            source,
        }
    }
}

fn after(detail: &str) -> String {
    if detail.is_empty() {
        String::new()
    } else {
        format!(" ({detail})")
    }
}
