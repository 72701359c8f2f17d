//! The engine's side of an executor host: spawning it, following it, talking to it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::console::Console;
use super::protocol::{self, Event, Failure, HostPlan, Request, Runtime, Stage};
use super::{
    ContainerIo, Error, Executor, ExitStatus, LaunchPlan, Launched, Task, Times, host, owner,
};
use crate::sys::{number, process, socket};

/// How long removing a container may take: cgroups are retried for half a second, and a
/// runtime binary needs tens of milliseconds.
const DELETE_WAIT: Duration = Duration::from_secs(20);

/// Search path of the host, which otherwise gets no environment.
const HOST_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Starts containers with libcontainer.
#[derive(Debug)]
pub struct Embedded {
    hosts: Hosts,
}

impl Default for Embedded {
    fn default() -> Self {
        Self::new()
    }
}

impl Embedded {
    /// The executor host is this very program; its `main` must call [`host::dispatch`].
    #[must_use]
    pub fn new() -> Self {
        Self::with_host("/proc/self/exe")
    }

    /// Another program whose `main` calls [`host::dispatch`].
    #[must_use]
    pub fn with_host(program: impl Into<PathBuf>) -> Self {
        Self {
            hosts: Hosts::new(program.into()),
        }
    }
}

/// Starts containers with an OCI runtime binary.
#[derive(Debug)]
pub struct External {
    hosts: Hosts,
    binary: PathBuf,
}

impl External {
    /// `runtime` is a path, or a name looked up in `PATH`.
    ///
    /// # Errors
    /// [`Error::Launch`] with code 125 when there is no such program.
    pub fn new(runtime: &str) -> Result<Self, Error> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let candidates: Vec<PathBuf> = if runtime.contains('/') {
            vec![PathBuf::from(runtime)]
        } else {
            std::env::split_paths(&path)
                .map(|dir| dir.join(runtime))
                .collect()
        };
        let usable = |file: &PathBuf| file.is_file() && process::may_execute(file).is_ok();
        let found = candidates
            .into_iter()
            .find(usable)
            .and_then(|file| file.canonicalize().ok());
        let binary = found.ok_or_else(|| Error::Launch {
            stage: Stage::Prepare,
            message: format!(
                "runtime {runtime:?} not found: install it, give its path, or leave --runtime \
                 out to use the embedded one"
            ),
            code: 125,
        })?;
        Ok(Self {
            hosts: Hosts::new("/proc/self/exe".into()),
            binary,
        })
    }

    /// Replaces the host program; see [`Embedded::with_host`].
    #[must_use]
    pub fn with_host(self, program: impl Into<PathBuf>) -> Self {
        Self {
            hosts: Hosts::new(program.into()),
            ..self
        }
    }
}

#[async_trait]
impl Executor for Embedded {
    fn warm_up(&self) {
        self.hosts.warm_up();
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<Launched, Error> {
        launch(&self.hosts, Runtime::Embedded, plan).await
    }
}

#[async_trait]
impl Executor for External {
    fn warm_up(&self) {
        self.hosts.warm_up();
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<Launched, Error> {
        let runtime = Runtime::External {
            binary: self.binary.clone(),
        };
        launch(&self.hosts, runtime, plan).await
    }
}

/// Where executor hosts come from.
#[derive(Debug)]
struct Hosts {
    program: PathBuf,
    /// One that has been spawned and waits for its request. Spawning takes milliseconds
    /// with a cold cache, which a start has while it waits for its image.
    idle: Mutex<Option<Host>>,
}

impl Hosts {
    fn new(program: PathBuf) -> Self {
        Self {
            program,
            idle: Mutex::default(),
        }
    }

    /// A failure shows when a host is needed.
    fn warm_up(&self) {
        let mut idle = self.idle.lock();
        if idle.is_none() {
            *idle = Host::spawn(&self.program).ok();
        }
    }

    /// A host for one request.
    fn take(&self) -> Result<Host, Error> {
        let idle = self.idle.lock().take();
        match idle.filter(|host| !host.progress.borrow().closed) {
            Some(host) => Ok(host),
            None => Host::spawn(&self.program),
        }
    }
}

async fn launch(hosts: &Hosts, runtime: Runtime, plan: LaunchPlan) -> Result<Launched, Error> {
    let state = claim_state(&plan.state_root, &plan.id)?;
    let host_plan = HostPlan {
        bundle: plan
            .bundle
            .canonicalize()
            .map_err(Error::io("use the bundle directory"))?,
        terminal: matches!(plan.io, ContainerIo::Terminal { .. }),
        id: plan.id,
        state,
        runtime,
    };
    // Runtime binaries give the streams away themselves.
    let uid = match host_plan.runtime {
        Runtime::Embedded => Some(plan.uid),
        Runtime::External { .. } => None,
    };
    let prepared = prepare(hosts, &host_plan, plan.io, uid);
    let (mut host, console) = prepared.inspect_err(|_| {
        // No host, so nobody else removes it; what is in it is ours alone.
        if let Err(error) = std::fs::remove_dir_all(&host_plan.state) {
            tracing::warn!(error = %error, "state directory could not be removed");
        }
    })?;
    match start(&mut host, &host_plan.id, console).await {
        Ok((pid, times, console)) => {
            let program = hosts.program.clone();
            let task = Box::new(HostTask {
                host,
                plan: host_plan,
                program,
                pid,
                times,
            });
            Ok(Launched { task, console })
        }
        Err(error) => {
            remove(host, &hosts.program, &host_plan).await?;
            Err(error)
        }
    }
}

/// Makes the container's state directory; that it did not exist is what makes ids unique.
fn claim_state(root: &Path, id: &str) -> Result<PathBuf, Error> {
    let make = || -> io::Result<PathBuf> {
        std::fs::create_dir_all(root)?;
        let state = root.canonicalize()?.join(id);
        std::fs::create_dir(&state)?;
        // libcontainer resolves its root before making it.
        std::fs::create_dir(state.join("runtime"))?;
        Ok(state)
    };
    make().map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Error::Launch {
            stage: Stage::Prepare,
            message: format!("a container with id {id} exists already: use another id"),
            code: 125,
        },
        _ => Error::Io {
            what: "make the container's state directory",
            source: error,
        },
    })
}

/// Gives a host its container, whose streams go to the user `uid`, and expects its terminal
/// when it is to have one.
fn prepare(
    hosts: &Hosts,
    plan: &HostPlan,
    io: ContainerIo,
    uid: Option<u32>,
) -> Result<(Host, Option<Console>), Error> {
    let (fds, console) = match io {
        ContainerIo::Fds {
            stdin,
            stdout,
            stderr,
        } => (vec![stdin, stdout, stderr], None),
        ContainerIo::Terminal { size } => {
            (Vec::new(), Some(Console::expect(&plan.state, size, uid)?))
        }
    };
    if let Some(uid) = uid {
        let given = owner::give_pipes(&fds, uid);
        given.map_err(Error::io("give the container's user its streams"))?;
    }
    let host = hosts.take()?;
    host.begin(&Request::Launch(plan.clone()), &fds)?;
    Ok((host, console))
}

/// Follows a spawned host until the command runs.
async fn start(
    host: &mut Host,
    id: &str,
    console: Option<Console>,
) -> Result<(u32, Times, Option<OwnedFd>), Error> {
    let progress = host.reached(|progress| progress.created.is_some()).await;
    let (pid, created) = progress.created.ok_or_else(|| progress.launch_error(id))?;
    let console = console.map(|console| console.receive()).transpose()?;
    // Refused only by a host that is gone, which is noticed next.
    let _ = host.send(&Request::Start);
    let progress = host.reached(|progress| progress.started.is_some()).await;
    let started = progress.started.ok_or_else(|| progress.launch_error(id))?;
    Ok((pid, Times { created, started }, console))
}

/// Has the host remove its container; does so itself when the host was lost.
async fn remove(mut host: Host, program: &Path, plan: &HostPlan) -> Result<(), Error> {
    // Refused when the host has finished already; its last word is what counts.
    let _ = host.send(&Request::Delete);
    match host.deleted(&plan.id).await {
        Err(Error::HostLost { .. }) if plan.state.exists() => sweep(program, plan).await,
        Ok(()) | Err(Error::HostLost { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes what a container left whose host was killed.
async fn sweep(program: &Path, plan: &HostPlan) -> Result<(), Error> {
    let mut host = Host::spawn(program)?;
    host.begin(&Request::Sweep(plan.clone()), &[])?;
    host.deleted(&plan.id).await
}

/// Everything the host has said so far.
#[derive(Clone, Debug, Default)]
struct Progress {
    created: Option<(u32, Instant)>,
    started: Option<Instant>,
    exited: Option<u8>,
    failure: Option<Failure>,
    deleted: Option<Result<(), String>>,
    /// The host is gone; nothing will be added.
    closed: bool,
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

    fn launch_error(self, id: &str) -> Error {
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
struct Host {
    requests: Mutex<OwnedWriteHalf>,
    progress: watch::Receiver<Progress>,
}

impl Host {
    /// One that waits for [`Host::begin`].
    fn spawn(program: &Path) -> Result<Self, Error> {
        let make = || -> io::Result<(StdStream, StdStream)> {
            let (ours, theirs) = StdStream::pair()?;
            ours.set_nonblocking(true)?;
            Ok((ours, theirs))
        };
        let (ours, theirs) = make().map_err(Error::io("prepare the executor host"))?;
        let (name, path) = HOST_PATH.split_once('=').unwrap_or_default();
        let child = Command::new(program)
            .arg(host::SUBCOMMAND)
            .env_clear()
            .env(name, path)
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

    /// Sends the first request, with the container's descriptors.
    fn begin(&self, first: &Request, fds: &[OwnedFd]) -> Result<(), Error> {
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
    async fn reached(&mut self, enough: impl Fn(&Progress) -> bool) -> Progress {
        let settled =
            |progress: &Progress| enough(progress) || progress.failure.is_some() || progress.closed;
        let mut receiver = self.progress.clone();
        let waited = receiver
            .wait_for(settled)
            .await
            .map(|progress| progress.clone());
        waited.unwrap_or_else(|_| self.progress.borrow().clone())
    }

    fn send(&self, request: &Request) -> io::Result<()> {
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
    async fn deleted(&mut self, id: &str) -> Result<(), Error> {
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

struct HostTask {
    host: Host,
    plan: HostPlan,
    program: PathBuf,
    pid: u32,
    times: Times,
}

#[async_trait]
impl Task for HostTask {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn times(&self) -> Times {
        self.times
    }

    async fn wait(&self) -> Result<ExitStatus, Error> {
        let mut receiver = self.host.progress.clone();
        let over = |progress: &Progress| progress.exited.is_some() || progress.closed;
        let code = match receiver.wait_for(over).await {
            Ok(progress) => progress.exited,
            Err(_) => None,
        };
        code.map(|code| ExitStatus { code })
            .ok_or_else(|| Error::HostLost {
                id: self.plan.id.clone(),
            })
    }

    fn signal(&self, signal: i32) -> Result<(), Error> {
        let gone = |_| Error::NotRunning {
            id: self.plan.id.clone(),
        };
        if self.host.progress.borrow().exited.is_some() {
            return Err(Error::NotRunning {
                id: self.plan.id.clone(),
            });
        }
        self.host
            .send(&Request::Signal { number: signal })
            .map_err(gone)
    }

    async fn delete(self: Box<Self>) -> Result<(), Error> {
        let HostTask {
            host,
            plan,
            program,
            ..
        } = *self;
        remove(host, &program, &plan).await
    }
}
