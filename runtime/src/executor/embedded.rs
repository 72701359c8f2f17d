//! libcontainer, inside the executor host.
//!
//! The command is looked up and executed by code of ours ([`Command`]) that runs in the
//! container's init: it reports through a pipe why it could not, and the pipe's end
//! (close-on-exec) says that it could. So the start time is the exec itself, and a missing
//! command is told from one that fails.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::Spec;

use super::cause::Cause;
use super::host::{HostRuntime, Stdio};
use super::protocol::{self, CONSOLE_SOCKET, Failure, HostPlan, Stage};
use crate::sys::{number, process};

/// How long a container that failed to be made may take to say why. Its init is already
/// ending then; past this the runtime's own message has to do.
const REPORT_WAIT_MS: u16 = 2000;

/// libcontainer's state lies below the container's state directory.
const ROOT_DIR: &str = "runtime";

pub(super) struct EmbeddedRuntime {
    plan: HostPlan,
    container: Option<Container>,
    report: Option<File>,
}

impl EmbeddedRuntime {
    pub(super) fn new(plan: HostPlan) -> Self {
        Self {
            plan,
            container: None,
            report: None,
        }
    }

    fn root(&self) -> PathBuf {
        self.plan.state.join(ROOT_DIR)
    }

    fn build(&self, stdio: Option<Stdio>, report: OwnedFd) -> Result<Container, LibcontainerError> {
        let mut builder = ContainerBuilder::new(self.plan.id.clone(), SyscallType::default())
            .with_root_path(self.root())?
            .with_executor(Command {
                report: Arc::new(report),
            })
            .validate_id()?;
        if let Some(Stdio {
            stdin,
            stdout,
            stderr,
        }) = stdio
        {
            builder = builder
                .with_stdin(stdin)
                .with_stdout(stdout)
                .with_stderr(stderr);
        }
        if self.plan.terminal {
            builder = builder.with_console_socket(Some(self.plan.state.join(CONSOLE_SOCKET)));
        }
        builder
            .as_init(&self.plan.bundle)
            .with_systemd(false)
            .with_detach(true)
            .build()
    }
}

impl HostRuntime for EmbeddedRuntime {
    fn create(&mut self, stdio: Option<Stdio>) -> Result<i32, Failure> {
        let engine = |message| Failure::engine(Stage::Create, message);
        let (reader, writer) = process::pipe()
            .map_err(|error| engine(format!("cannot make the report pipe: {error}")))?;
        let mut reader = File::from(reader);
        let cause = Cause::new()
            .map_err(|error| engine(format!("cannot make a file for errors: {error}")))?;
        match cause.watch(|| self.build(stdio, writer)) {
            Ok(container) => {
                let pid = container.pid().map(|pid| pid.as_raw());
                self.container = Some(container);
                self.report = Some(reader);
                pid.ok_or_else(|| engine("the runtime made a container without a process".into()))
            }
            Err(error) => Err(late_report(&mut reader).unwrap_or_else(|| {
                let mut text = chain(&error);
                if let Some(cause) = cause.first() {
                    add(&mut text, &cause);
                }
                engine(format!("cannot create the container: {text}"))
            })),
        }
    }

    fn start(&mut self) -> Result<(), Failure> {
        let engine = |message| Failure::engine(Stage::Start, message);
        let (Some(container), Some(mut report)) = (self.container.as_mut(), self.report.take())
        else {
            return Err(engine("start was asked for before create".into()));
        };
        container
            .start()
            .map_err(|error| engine(format!("cannot start the container: {}", chain(&error))))?;
        match protocol::read(&mut report) {
            Ok(None) => Ok(()),
            Ok(Some(failure)) => Err(failure),
            Err(error) => Err(engine(format!(
                "cannot learn whether the command runs: {error}"
            ))),
        }
    }

    fn delete(&mut self) -> Result<(), String> {
        let root = self.root().join(&self.plan.id);
        let container = match self.container.take() {
            Some(container) => Some(container),
            None if root.exists() => Some(Container::load(root).map_err(|error| chain(&error))?),
            None => None,
        };
        container.map_or(Ok(()), |mut made| {
            made.delete(true).map_err(|error| chain(&error))
        })
    }
}

/// The report of a container that could not be made, if its init managed to write one.
fn late_report(reader: &mut File) -> Option<Failure> {
    let ready = process::poll_two(reader.as_fd(), reader.as_fd(), Some(REPORT_WAIT_MS))
        .ok()?
        .0;
    if ready {
        protocol::read(reader.by_ref()).ok().flatten()
    } else {
        None
    }
}

/// An error with all its causes; a cause already quoted by the one above is left out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        add(&mut text, &inner.to_string());
        cause = inner.source();
    }
    text
}

/// Adds a cause to an error's text unless it is quoted there.
fn add(text: &mut String, cause: &str) {
    if !text.contains(cause) {
        text.push_str(": ");
        text.push_str(cause);
    }
}

/// Looks up and executes the container's command, inside the container.
#[derive(Clone)]
struct Command {
    report: Arc<OwnedFd>,
}

impl Command {
    fn fail(&self, failure: &Failure) -> String {
        if let Ok(pipe) = self.report.try_clone() {
            let _ = protocol::write(File::from(pipe), failure);
        }
        failure.message.clone()
    }
}

impl Executor for Command {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        // After the last change of who it is, which forgets this, and before it waits to be started.
        process::die_with_parent();
        match resolve(spec) {
            Ok(_) => Ok(()),
            Err(failure) => Err(ExecutorValidationError::ArgValidationError(
                self.fail(&failure),
            )),
        }
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let failure = match resolve(spec) {
            Ok((path, args)) => {
                let error = process::exec(&path, &args);
                invocation_failure(&path.to_string_lossy(), &error)
            }
            Err(failure) => failure,
        };
        Err(ExecutorError::Other(self.fail(&failure)))
    }
}

/// The file to execute, and the arguments.
fn resolve(spec: &Spec) -> Result<(CString, Vec<CString>), Failure> {
    let process = spec.process().as_ref();
    let words = process.and_then(|process| process.args().as_ref());
    let none = || Failure::engine(Stage::Create, "the document names no command".into());
    let words = words.ok_or_else(none)?;
    let name = words.first().ok_or_else(none)?;
    let env = process.and_then(|process| process.env().as_ref());
    let path = env.and_then(|env| env.iter().find_map(|text| text.strip_prefix("PATH=")));
    let file = look_up(name, path.unwrap_or_default())?;
    let c_string = |text: Vec<u8>| {
        CString::new(text)
            .map_err(|_| Failure::engine(Stage::Create, "a command word holds a NUL byte".into()))
    };
    let args = words.iter().map(|word| c_string(word.clone().into_bytes()));
    Ok((
        c_string(file.into_os_string().into_encoded_bytes())?,
        args.collect::<Result<_, _>>()?,
    ))
}

/// A name with a slash is a path; any other is searched for in `search`, where a match
/// that cannot be executed is passed over but remembered.
fn look_up(name: &str, search: &str) -> Result<PathBuf, Failure> {
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(error) => Err(invocation_failure(name, &error)),
        };
    }
    let mut refused = None;
    for dir in search.split(':') {
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error) if is_missing(&error) => {}
            Err(error) => {
                refused.get_or_insert(invocation_failure(&candidate.to_string_lossy(), &error));
            }
        }
    }
    Err(refused.unwrap_or_else(|| Failure {
        stage: Stage::Create,
        message: protocol::shorten(format!(
            "command {name:?} not found in the image: no directory of its PATH ({search}) has it"
        )),
        code: 127,
    }))
}

fn executable(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path)?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    process::may_execute(path)
}

fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// What a user is told about a command that exists, or should, and could not be executed.
fn invocation_failure(path: &str, error: &io::Error) -> Failure {
    let (message, code) = if is_missing(error) {
        (
            format!(
                "command {path:?} not found in the image: no such file (for a script: check \
                 that the interpreter in its first line is in the image)"
            ),
            127,
        )
    } else if error.raw_os_error() == Some(number::ENOEXEC) {
        (
            format!(
                "command {path:?} cannot be invoked: not a program of this machine's \
                 architecture, or a script without #! line"
            ),
            126,
        )
    } else {
        let reason = match error.kind() {
            io::ErrorKind::IsADirectory => "it is a directory".to_owned(),
            io::ErrorKind::PermissionDenied => {
                "permission denied (is the file executable for this user?)".to_owned()
            }
            _ => error.to_string(),
        };
        (format!("command {path:?} cannot be invoked: {reason}"), 126)
    };
    Failure {
        stage: Stage::Create,
        message: protocol::shorten(message),
        code,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn commands_are_looked_up_like_a_shell_does() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        for (file, mode) in [
            (one.join("plain"), 0o644),
            (two.join("plain"), 0o755),
            (two.join("tool"), 0o755),
            (one.join("data"), 0o644),
        ] {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        std::fs::create_dir(one.join("folder")).unwrap();
        let search = format!("/nowhere:{}:{}", one.display(), two.display());
        let found = |name: &str| look_up(name, &search).map_err(|failure| failure.code);
        assert_eq!(found("tool"), Ok(two.join("tool")));
        assert_eq!(
            found("plain"),
            Ok(two.join("plain")),
            "the executable one wins"
        );
        assert_eq!(found("data"), Err(126));
        assert_eq!(found("folder"), Err(126));
        assert_eq!(found("absent"), Err(127));
        assert_eq!(found(one.join("data").to_str().unwrap()), Err(126));
        assert_eq!(found(one.join("data/below").to_str().unwrap()), Err(127));
        assert_eq!(found("/nowhere/tool"), Err(127));
        let message = look_up("absent", &search).unwrap_err().message;
        assert!(
            message.contains("absent") && message.contains("PATH"),
            "{message}"
        );
    }
}
