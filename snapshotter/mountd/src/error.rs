//! The error of the mount server's seam.
//!
//! Invariant: a variant exists because a caller reacts differently to it.

use std::io;
use std::path::{Path, PathBuf};

/// Result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a mount server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The other side closed the connection, or never was.
    #[error("the mount server's connection is closed")]
    Closed,
    /// The other side broke the protocol. The connection is of no use any more.
    #[error("the other side of the mount server's socket broke the protocol: {0}")]
    Protocol(&'static str),
    /// This process has as many files open as it may, and could not take those that came with
    /// this message. The connection goes on.
    #[error("a message came with files that cannot be taken: as many are open as may be")]
    NoDescriptors(Box<crate::wire::Message>),
    /// Bytes that are no message.
    #[error(transparent)]
    Malformed(#[from] crate::wire::Malformed),
    /// The server would not do it.
    #[error("the mount server refuses to {op}: {source}")]
    Refused {
        /// What was asked for.
        op: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot {op} {}: {source}", path.display())]
    Io {
        /// What was to be done ("listen at").
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Wraps what the kernel refused.
    pub fn io(op: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        Self::Io { op, path, source }
    }
}
