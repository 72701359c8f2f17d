//! Starting processes: the seam between the engine and whatever makes containers.
//!
//! An [`Executor`] turns a [`LaunchPlan`] into a running [`Task`]. Two exist, with the same
//! behaviour (one conformance suite runs on both): [`Embedded`], which uses libcontainer,
//! and [`External`], which calls an OCI runtime binary. Both do their work in a small
//! child process, the executor host ([`host`]): libcontainer forks in ways no
//! multi-threaded process survives, and a container's init can be waited for only by its
//! parent. The host kills the container when this process goes away; of those whose host is killed
//! together with it, the kernel ends libcontainer's, and [`Embedded::sweep`] removes all.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use async_trait::async_trait;

mod cause;
mod cgroup;
mod console;
mod embedded;
mod external;
mod filter;
pub mod host;
mod hosts;
mod owner;
mod protocol;
mod task;

pub use crate::sys::terminal::Size;
pub use protocol::Stage;
pub use task::{Embedded, External};

/// Why a container did not start, or could not be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The container could not be created or started.
    #[error("{message}")]
    Launch {
        /// How far it got.
        stage: Stage,
        /// What failed, on what, and what to do.
        message: String,
        /// 125, 126 (command cannot be invoked) or 127 (command not found).
        code: u8,
    },
    /// The child process that holds the container ended before the container did.
    #[error("the executor host of container {id} ended unexpectedly; the container was killed")]
    HostLost {
        /// The container.
        id: String,
    },
    /// A request to a task that has ended.
    #[error("container {id} is not running")]
    NotRunning {
        /// The container.
        id: String,
    },
    /// The container could not be removed completely.
    #[error("container {id} left something behind: {message}")]
    Delete {
        /// The container.
        id: String,
        /// What.
        message: String,
    },
    /// Talking to the executor host failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// The exit code `laz run` ends with: docker's 125, 126 or 127.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Launch { code, .. } => *code,
            Self::HostLost { .. }
            | Self::NotRunning { .. }
            | Self::Delete { .. }
            | Self::Io { .. } => 125,
        }
    }

    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// What the container's process gets as standard input, output and error.
#[derive(Debug)]
pub enum ContainerIo {
    /// Three descriptors, usually pipe ends; see [`crate::stdio::pipes`].
    Fds {
        /// Read by the container.
        stdin: OwnedFd,
        /// Written by the container.
        stdout: OwnedFd,
        /// Written by the container.
        stderr: OwnedFd,
    },
    /// A terminal, made by the runtime inside the container. The document's
    /// `process.terminal` must say so too. The master end is in [`Launched::console`].
    Terminal {
        /// Size before the process starts; `None` leaves it at zero.
        size: Option<Size>,
    },
}

/// Everything an executor needs to start one container.
#[derive(Debug)]
pub struct LaunchPlan {
    /// Id, unique below `state_root`.
    pub id: String,
    /// Directory with `config.json`; must outlive the task.
    pub bundle: PathBuf,
    /// User id that the container's process starts with, as its document says: pipes and
    /// terminal are given to that user, who could not open them by name otherwise.
    pub uid: u32,
    /// Directory for runtime state; created when missing. Nothing of this container is
    /// left in it after [`Task::delete`].
    pub state_root: PathBuf,
    /// Standard descriptors.
    pub io: ContainerIo,
}

/// A started container.
pub struct Launched {
    /// Its handle.
    pub task: Box<dyn Task>,
    /// Master end of its terminal, when it has one.
    pub console: Option<OwnedFd>,
}

/// When a container reached which state.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// All Linux namespaces, mounts and limits were in place.
    pub created: Instant,
    /// The command was running (embedded: its exec had succeeded).
    pub started: Instant,
}

/// How a container's init ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus {
    /// Its exit code, or 128 + the number of the signal that ended it.
    pub code: u8,
}

/// Starts containers.
///
/// Contract for implementers: `launch` returns when the command runs, or an error after
/// which nothing of the container is left (no process, cgroup, mount or state). It is
/// cancel-safe: dropping the future undoes the container. It never blocks the async
/// thread and needs no cleanup when this process is killed.
#[async_trait]
pub trait Executor: Send + Sync {
    /// Does beforehand what the next [`Executor::launch`] needs whatever its plan. Must run
    /// inside a tokio runtime. Never waits; a failure shows at the launch.
    fn warm_up(&self);

    /// Does beforehand what helps a [`Executor::launch`] only for a few tens of milliseconds.
    /// Must run inside a tokio runtime. Never waits; a failure shows at the launch.
    fn expect_launch(&self) {
        // Every runtime moves a first process into cgroups. This ends by itself within
        // milliseconds, whether or not anything is launched.
        drop(tokio::task::spawn_blocking(cgroup::wait_before_move));
    }

    /// Creates and starts the container of `plan`. Unbounded: its first reads may come
    /// from a registry; callers that want a deadline wrap it in a timeout.
    async fn launch(&self, plan: LaunchPlan) -> Result<Launched, Error>;
}

/// One running container.
///
/// Dropping a task without [`Task::delete`] kills the container and lets the host clean up
/// on its own; `delete` does the same and waits for it.
#[async_trait]
pub trait Task: Send + Sync {
    /// Process id of the container's init, as this process sees it.
    fn pid(&self) -> u32;

    /// When it was created and started.
    fn times(&self) -> Times;

    /// Waits for init to end. May be called again, and by several at once; all get the
    /// same answer.
    async fn wait(&self) -> Result<ExitStatus, Error>;

    /// Sends signal number `signal` to init. Never blocks.
    fn signal(&self, signal: i32) -> Result<(), Error>;

    /// Removes the container; kills it first when it still runs.
    async fn delete(self: Box<Self>) -> Result<(), Error>;
}
