//! Executor hosts as the engine has them: the program they run, spawning them, following what they say.
//!
//! Invariant: a host that is dropped here ends, and its container with it; one that ends before its
//! container did has that killed here. Never signals a process but by its pidfd.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::protocol::{self, Event, Failure, Request};
use super::{Error, host};
use crate::sys::{number, process, socket};

/// How long removing a container may take: cgroups are retried for half a second, and a
/// runtime binary needs tens of milliseconds.
const DELETE_WAIT: Duration = Duration::from_secs(20);

/// Search path of the host, which otherwise gets no environment.
const HOST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What an executor host runs.
#[derive(Debug)]
pub(super) struct Program {
    path: PathBuf,
    /// The file in a mount that nobody can write through. A container can have the host's own file:
    /// its init is forked from the host, and runs that until it runs the command, which may be that
    /// very file again. `None` where the kernel has no such mount to give.
    view: OnceLock<Option<OwnedFd>>,
}

impl Program {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            view: OnceLock::new(),
        }
    }

    /// What to execute, for as long as this exists.
    fn path(&self) -> PathBuf {
        let view = self.view.get_or_init(|| {
            let view = process::read_only_view(&self.path);
            let view = view.inspect_err(|error| {
                tracing::debug!(%error, "executor hosts run a file that can be written");
            });
            view.ok()
        });
        view.as_ref()
            .map_or_else(|| self.path.clone(), |view| process::path_of(view.as_fd()))
    }
}

/// Where executor hosts come from.
#[derive(Debug)]
pub(super) struct Hosts {
    pub(super) program: Arc<Program>,
    /// One that has been spawned and waits for its request. Spawning takes milliseconds
    /// with a cold cache, which a start has while it waits for its image.
    idle: Mutex<Option<Host>>,
}

impl Hosts {
    pub(super) fn new(program: PathBuf) -> Self {
        Self {
            program: Arc::new(Program::new(program)),
            idle: Mutex::default(),
        }
    }

    /// Has one wait, which is told of `before`. A failure shows when a host is needed.
    pub(super) fn warm_up(&self, before: Option<&Request>) {
        let mut idle = self.idle.lock();
        if idle.is_none() {
            *idle = Host::spawn(&self.program).ok();
            if let (Some(host), Some(before)) = (idle.as_ref(), before) {
                // One that is gone is noticed when it is taken.
                let _ = host.begin(before, &[]);
            }
        }
    }

    /// A host for one request.
    pub(super) fn take(&self) -> Result<Host, Error> {
        let idle = self.idle.lock().take();
        match idle.filter(|host| !host.progress.borrow().closed) {
            Some(host) => Ok(host),
            None => Host::spawn(&self.program),
        }
    }
}

/// Everything the host has said so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    pub(super) created: Option<(u32, Instant)>,
    pub(super) started: Option<Instant>,
    pub(super) exited: Option<u8>,
    pub(super) failure: Option<Failure>,
    deleted: Option<Result<(), String>>,
    /// The host is gone; nothing will be added.
    pub(super) closed: bool,
}

impl Progress {
    fn add(&mut self, event: Event) {
        match event {
            Event::Created { pid } => self.created = Some((pid, Instant::now())),
            Event::Started => self.started = Some(Instant::now()),
            Event::Exited { code } => self.exited = Some(code),
            Event::Failed(failure) => self.failure = Some(failure),
            Event::Deleted { error } => self.deleted = Some(error.map_or(Ok(()), Err)),
        }
    }

    pub(super) fn launch_error(self, id: &str) -> Error {
        match self.failure {
            Some(Failure {
                stage,
                message,
                code,
            }) => Error::Launch {
                stage,
                message,
                code,
            },
            None => Error::HostLost { id: id.to_owned() },
        }
    }
}

/// A connection to an executor host. Dropping it makes the host kill its container, or end
/// if it has none.
#[derive(Debug)]
pub(super) struct Host {
    requests: Mutex<OwnedWriteHalf>,
    pub(super) progress: watch::Receiver<Progress>,
}

impl Host {
    /// One that waits for [`Host::begin`].
    pub(super) fn spawn(program: &Program) -> Result<Self, Error> {
        let make = || -> io::Result<(StdStream, StdStream)> {
            let (ours, theirs) = StdStream::pair()?;
            ours.set_nonblocking(true)?;
            Ok((ours, theirs))
        };
        let (ours, theirs) = make().map_err(Error::io("prepare the executor host"))?;
        let child = Command::new(program.path())
            .arg(host::SUBCOMMAND)
            .env_clear()
            .env("PATH", HOST_PATH)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            // Keys like Ctrl-C signal the engine's process group; the host must survive them.
            .process_group(0)
            .spawn()
            .map_err(Error::io("spawn the executor host"))?;
        let stream = UnixStream::from_std(ours).map_err(Error::io("watch the executor host"))?;
        let (reader, writer) = stream.into_split();
        let (sender, progress) = watch::channel(Progress::default());
        tokio::spawn(follow(reader, child, sender));
        Ok(Self {
            requests: Mutex::new(writer),
            progress,
        })
    }

    /// Sends a first request, with the container's descriptors if it has them.
    pub(super) fn begin(&self, first: &Request, fds: &[OwnedFd]) -> Result<(), Error> {
        let send = || {
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let requests = self.requests.lock();
            let stream: &UnixStream = requests.as_ref();
            // Bounded well below the socket's empty buffer, so this cannot block.
            socket::send_with_fds(stream, &protocol::encode(first)?, &borrowed)
        };
        send().map_err(Error::io("give the executor host its container"))
    }

    /// Waits until `enough` holds, the launch failed, or the host is gone.
    pub(super) async fn reached(&mut self, enough: impl Fn(&Progress) -> bool) -> Progress {
        let settled =
            |progress: &Progress| enough(progress) || progress.failure.is_some() || progress.closed;
        let mut receiver = self.progress.clone();
        let waited = receiver
            .wait_for(settled)
            .await
            .map(|progress| progress.clone());
        waited.unwrap_or_else(|_| self.progress.borrow().clone())
    }

    pub(super) fn send(&self, request: &Request) -> io::Result<()> {
        let frame = protocol::encode(request)?;
        let written = self.requests.lock().try_write(&frame)?;
        if written == frame.len() {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::WriteZero,
                "the executor host does not read",
            ))
        }
    }

    /// Waits, bounded, until the host has cleaned up and ended.
    pub(super) async fn deleted(&mut self, id: &str) -> Result<(), Error> {
        let left = |message: String| Error::Delete {
            id: id.to_owned(),
            message,
        };
        let mut receiver = self.progress.clone();
        let closed = receiver.wait_for(|progress| progress.closed);
        if tokio::time::timeout(DELETE_WAIT, closed).await.is_err() {
            return Err(left("the executor host did not finish in time".to_owned()));
        }
        let progress = self.progress.borrow().clone();
        match progress.deleted {
            Some(outcome) => outcome.map_err(left),
            None => Err(Error::HostLost { id: id.to_owned() }),
        }
    }
}

/// Records what the host says until it ends, then reaps it. If it ends before its
/// container did, the container is killed here.
async fn follow(mut reader: OwnedReadHalf, mut child: Child, sender: watch::Sender<Progress>) {
    let mut init = None;
    while let Some(event) = next_event(&mut reader).await {
        if let Event::Created { pid } = event {
            init = i32::try_from(pid)
                .ok()
                .and_then(|pid| process::pidfd_open(pid).ok());
        }
        sender.send_modify(|progress| progress.add(event));
    }
    let ended = {
        let progress = sender.borrow();
        progress.exited.is_some() || progress.deleted.is_some()
    };
    if let (Some(init), false) = (init, ended) {
        // Fails only when it is gone already, which is the aim.
        let _ = process::pidfd_signal(init.as_fd(), number::SIGKILL);
    }
    if let Err(error) = child.wait().await {
        tracing::warn!(error = %error, "executor host could not be reaped");
    }
    sender.send_modify(|progress| progress.closed = true);
}

async fn next_event(reader: &mut OwnedReadHalf) -> Option<Event> {
    let mut header = [0; 4];
    reader.read_exact(&mut header).await.ok()?;
    let mut body = vec![0; protocol::body_length(header).ok()?];
    reader.read_exact(&mut body).await.ok()?;
    protocol::decode(&body).ok()
}
