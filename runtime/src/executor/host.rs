//! The executor host: a single-threaded child process that holds one container.
//!
//! It is the container's subreaper, so it can wait for its init; it makes the container,
//! reports over the socket that is its standard input, and takes requests from there. When
//! that socket ends, for whatever reason, it kills the container and cleans up. It never
//! starts a thread or an async runtime: libcontainer forks without care for either.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use super::embedded::EmbeddedRuntime;
use super::external::ExternalRuntime;
use super::filter;
use super::protocol::{self, Event, Failure, Request, Runtime, Stage};
use crate::sys::{number, process, socket};

/// The hidden subcommand that [`main`] implements.
pub const SUBCOMMAND: &str = "executor-host";

/// A runtime makes the mount points a root file system lacks, and those must not be closed
/// to the container's user because the files of who started us are.
const MOUNT_POINT_UMASK: u32 = 0o022;

/// The standard descriptors of the container, absent when it gets a terminal.
pub(super) struct Stdio {
    pub(super) stdin: OwnedFd,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

/// What a runtime does for the host; blocking, one container per value.
pub(super) trait HostRuntime {
    /// Sets everything up short of running the command; the pid of init.
    fn create(&mut self, stdio: Option<Stdio>) -> Result<i32, Failure>;
    /// Runs the command. `Ok` means it is running as far as the runtime can tell.
    fn start(&mut self) -> Result<(), Failure>;
    /// Removes cgroup and state. Init has ended before this is called, or was never made.
    fn delete(&mut self) -> Result<(), String>;
}

/// Runs the host when the program was called as `<program> executor-host`; `None` for any
/// other call. Must be the first thing a program does: before any thread, runtime or
/// logging exists.
#[must_use]
pub fn dispatch() -> Option<ExitCode> {
    let asked = std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == SUBCOMMAND);
    asked.then(main)
}

/// The host's whole life. Standard input must be the control socket.
#[must_use]
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{SUBCOMMAND}: {error}: this command is started by laz itself");
            ExitCode::from(125)
        }
    }
}

fn run() -> io::Result<()> {
    process::set_name(c"laz-executor");
    let control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let Some((request, stdio)) = receive_plan(&control)? else {
        return Ok(()); // nobody needed this host
    };
    process::reset_signals()?;
    process::become_subreaper()?;
    process::set_umask(MOUNT_POINT_UMASK);
    // A path that vanishes under us must not matter.
    std::env::set_current_dir("/")?;
    let (plan, launch) = match request {
        Request::Launch(plan) => (plan, true),
        Request::Sweep(plan) => (plan, false),
        Request::Prepare | Request::Start | Request::Signal { .. } | Request::Delete => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "expected a plan first",
            ));
        }
    };
    let state = plan.state.clone();
    let Some(_lock) = lock(&state, launch)? else {
        // Whoever had it has removed everything.
        protocol::write(&control, &Event::Deleted { error: None })?;
        return Ok(());
    };
    let mut runtime: Box<dyn HostRuntime> = match &plan.runtime {
        Runtime::Embedded => Box::new(EmbeddedRuntime::new(plan)),
        Runtime::External { binary } => Box::new(ExternalRuntime::new(binary.clone(), plan)),
    };
    // Nobody may be listening any more; cleaning up goes on regardless.
    if launch && let Err(failure) = hold(&control, runtime.as_mut(), stdio) {
        let _ = protocol::write(&control, &Event::Failed(failure));
    }
    let mut deleted = runtime.delete();
    process::reap_ended();
    if deleted.is_ok() {
        deleted = std::fs::remove_dir_all(&state)
            .map_err(|error| format!("cannot remove {}: {error}", state.display()));
    }
    let _ = protocol::write(
        &control,
        &Event::Deleted {
            error: deleted.err(),
        },
    );
    Ok(())
}

/// Locks the plan in `state` for the life of this process, and of none that it forks. A sweep waits for
/// the host that has it; `None` if nothing is left by then.
fn lock(state: &Path, launch: bool) -> io::Result<Option<File>> {
    let path = state.join(protocol::PLAN);
    let plan = match File::options().write(true).open(&path) {
        Err(error) if !launch && error.kind() == io::ErrorKind::NotFound => return Ok(None),
        plan => plan?,
    };
    process::lock_file(&plan)?;
    Ok((launch || path.exists()).then_some(plan))
}

/// The first frame that is not about preparing, as [`receive`] gives it.
fn receive_plan(control: &UnixStream) -> io::Result<Option<(Request, Option<Stdio>)>> {
    loop {
        match receive(control)? {
            Some((Request::Prepare, _)) => drop(filter::prepare()),
            other => return Ok(other),
        }
    }
}

/// The next frame, and the descriptors that came with its header; `None` if there is none.
fn receive(control: &UnixStream) -> io::Result<Option<(Request, Option<Stdio>)>> {
    let mut header = [0; 4];
    let (received, fds) = socket::recv_with_fds(control, &mut header)?;
    if received == 0 {
        return Ok(None);
    }
    let unread = header.get_mut(received..).unwrap_or_default();
    let mut reader = control;
    reader.read_exact(unread)?;
    let mut body = vec![0; protocol::body_length(header)?];
    reader.read_exact(&mut body)?;
    let request = protocol::decode(&body)?;
    let stdio = match <[OwnedFd; 3]>::try_from(fds) {
        Ok([stdin, stdout, stderr]) => Some(Stdio {
            stdin,
            stdout,
            stderr,
        }),
        Err(none) if none.is_empty() => None,
        Err(_) => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "expected 3 descriptors",
            ));
        }
    };
    Ok(Some((request, stdio)))
}

/// Creates, starts and follows the container until its init has ended.
fn hold(
    control: &UnixStream,
    runtime: &mut dyn HostRuntime,
    stdio: Option<Stdio>,
) -> Result<(), Failure> {
    let pid = runtime.create(stdio)?;
    let init = Init::new(pid).map_err(|error| {
        Failure::engine(
            Stage::Create,
            format!("cannot follow the container's init: {error}"),
        )
    })?;
    let wanted = tell(
        control,
        &Event::Created {
            pid: pid.unsigned_abs(),
        },
    ) && matches!(protocol::read(control), Ok(Some(Request::Start)));
    if wanted {
        runtime.start()?;
        if tell(control, &Event::Started) {
            serve(control, &init);
        }
    }
    let code = init.end();
    tell(control, &Event::Exited { code });
    Ok(())
}

/// Whether the engine is still there to be told.
fn tell(control: &UnixStream, event: &Event) -> bool {
    protocol::write(control, event).is_ok()
}

/// Answers requests until init ends, the engine goes away, or it asks to delete.
fn serve(control: &UnixStream, init: &Init) {
    loop {
        let Ok((asked, ended)) = process::poll_two(control.as_fd(), init.pidfd.as_fd(), None)
        else {
            return;
        };
        if ended {
            return;
        }
        if asked {
            match protocol::read(control) {
                Ok(Some(Request::Signal { number })) => {
                    // Refused numbers are the caller's mistake; the container goes on.
                    let _ = process::pidfd_signal(init.pidfd.as_fd(), number);
                }
                Ok(Some(_) | None) | Err(_) => return,
            }
        }
    }
}

/// The container's init. Dropping it kills and reaps the process, and with it every
/// process of its Linux pid namespace.
struct Init {
    pid: i32,
    pidfd: OwnedFd,
    reaped: bool,
}

impl Init {
    fn new(pid: i32) -> io::Result<Self> {
        Ok(Self {
            pid,
            pidfd: process::pidfd_open(pid)?,
            reaped: false,
        })
    }

    /// Kills init unless it has ended by itself; its exit code.
    fn end(mut self) -> u8 {
        self.reap()
    }

    fn reap(&mut self) -> u8 {
        self.reaped = true;
        // A process that has ended keeps its exit code until it is waited for.
        let _ = process::pidfd_signal(self.pidfd.as_fd(), number::SIGKILL);
        let code = process::wait_for(self.pid).unwrap_or(255);
        u8::try_from(code & 0xff).unwrap_or(255)
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        if !self.reaped {
            self.reap();
        }
    }
}

impl Failure {
    pub(super) fn engine(stage: Stage, message: String) -> Self {
        Self {
            stage,
            message: protocol::shorten(message),
            code: 125,
        }
    }
}
