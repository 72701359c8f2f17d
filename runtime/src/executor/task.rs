//! Containers as executor hosts make them: launching one, following it, removing it, and what is left of
//! those that nobody followed to the end.
//!
//! Invariant: what is to be made is written down before any of it is, for who sweeps.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use super::console::Console;
use super::hosts::{Host, Hosts, Program, Progress};
use super::protocol::{self, HostPlan, Request, Runtime, Stage};
use super::{ContainerIo, Error, Executor, ExitStatus, LaunchPlan, Launched, Task, Times, owner};
use crate::sys::process;

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
    /// The executor host is this very program; its `main` must call [`dispatch`](super::host::dispatch).
    #[must_use]
    pub fn new() -> Self {
        Self::with_host("/proc/self/exe")
    }

    /// Another program whose `main` calls [`dispatch`](super::host::dispatch).
    #[must_use]
    pub fn with_host(program: impl Into<PathBuf>) -> Self {
        Self {
            hosts: Hosts::new(program.into()),
        }
    }

    /// Ends and removes the containers that a process left below `state_root` which died together
    /// with their hosts, whichever executor it had. Must not be called for one that lives.
    ///
    /// # Errors
    /// [`Error::Delete`] if something is left, which may be tried again; [`Error::Io`] if it cannot be
    /// told what there was.
    pub async fn sweep(&self, state_root: &Path) -> Result<(), Error> {
        let plans = recorded(state_root).map_err(Error::io("read what was to be made"))?;
        for plan in plans {
            sweep(&self.hosts.program, &plan).await?;
        }
        Ok(())
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
        self.hosts.warm_up(Some(&Request::Prepare));
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<Launched, Error> {
        launch(&self.hosts, Runtime::Embedded, plan).await
    }
}

#[async_trait]
impl Executor for External {
    fn warm_up(&self) {
        self.hosts.warm_up(None);
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<Launched, Error> {
        let runtime = Runtime::External {
            binary: self.binary.clone(),
        };
        launch(&self.hosts, runtime, plan).await
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
    let recorded = record(&host_plan);
    let prepared = recorded.and_then(|()| prepare(hosts, &host_plan, plan.io, uid));
    let (mut host, console) = prepared.inspect_err(|_| {
        // No host, so nobody else removes it; what is in it is ours alone.
        if let Err(error) = std::fs::remove_dir_all(&host_plan.state) {
            tracing::warn!(error = %error, "state directory could not be removed");
        }
    })?;
    match start(&mut host, &host_plan.id, console).await {
        Ok((pid, times, console)) => {
            let program = Arc::clone(&hosts.program);
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

/// Writes the plan where [`Embedded::sweep`] finds it, before anything of it exists.
fn record(plan: &HostPlan) -> Result<(), Error> {
    let write = || -> io::Result<()> {
        let text = protocol::encode(plan)?;
        std::fs::write(plan.state.join(protocol::PLAN), text)
    };
    write().map_err(Error::io("write down what is to be made"))
}

/// The plans of the containers whose state is below `root`, of those that had one.
fn recorded(root: &Path) -> io::Result<Vec<HostPlan>> {
    use io::ErrorKind::{NotFound, UnexpectedEof};
    let mut plans = Vec::new();
    let dirs = match std::fs::read_dir(root) {
        Err(error) if error.kind() == NotFound => return Ok(plans),
        dirs => dirs?,
    };
    for dir in dirs {
        let read = File::open(dir?.path().join(protocol::PLAN)).and_then(protocol::read);
        match read {
            Ok(plan) => plans.extend::<Option<HostPlan>>(plan),
            // Nothing was made, as whoever wrote it did not come to the end; or everything is gone.
            Err(error) if matches!(error.kind(), NotFound | UnexpectedEof) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(plans)
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
async fn remove(mut host: Host, program: &Program, plan: &HostPlan) -> Result<(), Error> {
    // Refused when the host has finished already; its last word is what counts.
    let _ = host.send(&Request::Delete);
    match host.deleted(&plan.id).await {
        Err(Error::HostLost { .. }) if plan.state.exists() => sweep(program, plan).await,
        Ok(()) | Err(Error::HostLost { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes what a container left whose host was killed; waits for a host that is not.
async fn sweep(program: &Program, plan: &HostPlan) -> Result<(), Error> {
    let mut host = Host::spawn(program)?;
    host.begin(&Request::Sweep(plan.clone()), &[])?;
    host.deleted(&plan.id).await
}

struct HostTask {
    host: Host,
    plan: HostPlan,
    program: Arc<Program>,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_found_again_and_half_of_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let found = || recorded(dir.path());
        assert_eq!(found().unwrap(), []);
        assert_eq!(recorded(&dir.path().join("none")).unwrap(), []);
        let plan = |id: &str| HostPlan {
            id: id.to_owned(),
            bundle: "/bundle".into(),
            state: dir.path().join(id),
            terminal: false,
            runtime: Runtime::Embedded,
        };
        for id in ["whole", "half", "gone"] {
            std::fs::create_dir(dir.path().join(id)).unwrap();
            record(&plan(id)).unwrap();
        }
        std::fs::remove_file(dir.path().join("gone").join(protocol::PLAN)).unwrap();
        let half = dir.path().join("half").join(protocol::PLAN);
        let bytes = std::fs::read(&half).unwrap();
        for len in 0..bytes.len() {
            std::fs::write(&half, &bytes[..len]).unwrap();
            assert_eq!(found().unwrap(), [plan("whole")], "{len}");
        }
        let other = [&bytes[..4], &vec![b'x'; bytes.len() - 4]].concat();
        std::fs::write(&half, other).unwrap();
        assert_eq!(found().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
