//! The error of the engine's seam, and its exit codes.
//!
//! Invariant: one text says what failed, on what and what to do. Exit codes are docker's:
//! 125 the engine, 126 the command cannot be invoked, 127 it is not there.

use std::path::PathBuf;

/// Exit codes that are not the container's own.
pub mod exit {
    /// The engine failed before or beside the container.
    pub const ENGINE: u8 = 125;
    /// The command is there but cannot be executed.
    pub const CANNOT_INVOKE: u8 = 126;
    /// The command is not there.
    pub const NOT_FOUND: u8 = 127;
}

/// What can go wrong in the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A config file is wrong.
    #[error("config {}: {detail}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        detail: String,
    },
    /// Registries, layers or the store.
    #[error(transparent)]
    Fetch(#[from] lazarette_fetcher::Error),
    /// Mounts and snapshots.
    #[error(transparent)]
    Snapshot(#[from] lazarette_snapshotter::Error),
    /// The container could not be described.
    #[error(transparent)]
    Spec(#[from] crate::spec::SpecError),
    /// The container could not be started or followed.
    #[error(transparent)]
    Execute(#[from] crate::executor::Error),
    /// The user must run this in another way.
    #[error("{what}: {todo}")]
    Refused {
        /// What was asked for and is not possible.
        what: String,
        /// What to do instead.
        todo: String,
    },
    /// A local file operation failed.
    #[error("cannot {op} {}: {source}", path.display())]
    Io {
        /// The operation in plain words.
        op: &'static str,
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The user pressed Ctrl-C or asked to stop before the container ran.
    #[error("stopped by signal {signal} before the container started")]
    Interrupted {
        /// Signal number.
        signal: u8,
    },
}

impl Error {
    /// A failed file operation.
    pub fn io(op: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io {
            op,
            path: path.into(),
            source,
        }
    }

    /// What `laz` exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Execute(error) => error.exit_code(),
            Self::Spec(error) => error.exit_code(),
            Self::Interrupted { signal } => 128u8.saturating_add(*signal),
            Self::Config { .. }
            | Self::Fetch(_)
            | Self::Snapshot(_)
            | Self::Refused { .. }
            | Self::Io { .. } => exit::ENGINE,
        }
    }

    /// The text for people: the error and every cause that it does not already quote.
    pub fn report(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let inner = error.to_string();
            if !text.contains(&inner) {
                text = format!("{text}: {inner}");
            }
            cause = error.source();
        }
        text
    }
}
