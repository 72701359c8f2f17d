//! An OCI runtime binary (runc, crun), called by the executor host.
//!
//! The runtime's init is handed to the host, its subreaper, when the runtime's own process
//! ends. Errors are read from the runtime's JSON log, never from the container's stderr.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as CommandStdio};

use serde::Deserialize;

use super::host::{HostRuntime, Stdio};
use super::protocol::{self, CONSOLE_SOCKET, Failure, HostPlan, Stage};

pub(super) struct ExternalRuntime {
    binary: PathBuf,
    plan: HostPlan,
}

impl ExternalRuntime {
    pub(super) fn new(binary: PathBuf, plan: HostPlan) -> Self {
        Self { binary, plan }
    }

    fn log(&self) -> PathBuf {
        self.plan.state.join("log.json")
    }

    /// The runtime with its global options, then `verb`; standard descriptors closed off.
    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .arg("--root")
            .arg(self.plan.state.join("runtime"))
            .arg("--log")
            .arg(self.log())
            .args(["--log-format", "json", verb])
            .stdin(CommandStdio::null())
            .stdout(CommandStdio::null())
            .stderr(CommandStdio::null());
        command
    }

    fn run(&self, stage: Stage, mut command: Command) -> Result<(), Failure> {
        let name = self.binary.display();
        let status = command
            .status()
            .map_err(|error| Failure::engine(stage, format!("cannot run {name}: {error}")))?;
        if status.success() {
            return Ok(());
        }
        let reason = fs::read(self.log()).ok().and_then(|log| last_error(&log));
        let reason = reason.unwrap_or_else(|| status.to_string());
        let (code, advice) = classify(&reason);
        let message = protocol::shorten(format!("{name}: {reason}{advice}"));
        Err(Failure {
            stage,
            message,
            code,
        })
    }
}

impl HostRuntime for ExternalRuntime {
    fn create(&mut self, stdio: Option<Stdio>) -> Result<i32, Failure> {
        let pid_file = self.plan.state.join("pid");
        let mut command = self.command("create");
        command
            .arg("--bundle")
            .arg(&self.plan.bundle)
            .arg("--pid-file")
            .arg(&pid_file);
        // Open until the runtime has ended: it reaches the socket through this directory.
        let state = File::open(&self.plan.state);
        if self.plan.terminal {
            let state = state.as_ref().map_err(|error| {
                let dir = self.plan.state.display();
                Failure::engine(Stage::Create, format!("cannot open {dir}: {error}"))
            })?;
            command
                .arg("--console-socket")
                .arg(short_socket_path(state));
        }
        if let Some(Stdio {
            stdin,
            stdout,
            stderr,
        }) = stdio
        {
            command.stdin(stdin).stdout(stdout).stderr(stderr);
        }
        command.arg(&self.plan.id);
        self.run(Stage::Create, command)?;
        read_pid(&pid_file)
    }

    fn start(&mut self) -> Result<(), Failure> {
        let mut command = self.command("start");
        command.arg(&self.plan.id);
        self.run(Stage::Start, command)
    }

    fn delete(&mut self) -> Result<(), String> {
        let mut command = self.command("delete");
        command.args(["--force", &self.plan.id]);
        self.run(Stage::Start, command)
            .map_err(|failure| failure.message)
    }
}

/// The console socket's path by way of our open directory: a socket address holds 108
/// bytes, and the runtime changes its working directory, so neither the full path nor a
/// relative one would do.
fn short_socket_path(state: &File) -> PathBuf {
    let (pid, fd) = (std::process::id(), state.as_raw_fd());
    PathBuf::from(format!("/proc/{pid}/fd/{fd}/{CONSOLE_SOCKET}"))
}

fn read_pid(path: &Path) -> Result<i32, Failure> {
    let wrong = |reason: String| {
        Failure::engine(
            Stage::Create,
            format!("pid file {}: {reason}", path.display()),
        )
    };
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    match text.trim().parse() {
        Ok(pid) if pid > 1 => Ok(pid),
        Ok(_) | Err(_) => Err(wrong(format!("not a process id: {text:?}"))),
    }
}

/// The last error a runtime logged.
fn last_error(log: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let lines = log.split(|&byte| byte == b'\n');
    let lines = lines.filter_map(|line| serde_json::from_slice::<Line>(line).ok());
    lines
        .filter(|line| matches!(line.level.as_str(), "error" | "fatal"))
        .map(|line| line.msg)
        .next_back()
}

/// What runtimes say of a command they found: of a directory, runc the second, crun the third.
const CANNOT_BE_INVOKED: [&str; 4] = [
    "permission denied",
    "is a directory",
    "operation not permitted",
    "exec format error",
];

/// Docker's exit code for a runtime's error text, and what to tell the user beyond it. What
/// went wrong is named by Go's words for it or, by crun, by the C library's: they differ in case.
fn classify(reason: &str) -> (u8, &'static str) {
    let reason = reason.to_lowercase();
    let about_command = reason.contains("exec");
    let says = |part: &str| about_command && reason.contains(part);
    if says("executable file") && says("not found") || says("executable not found") {
        (127, ": the command is not in the image's PATH")
    } else if says("no such file or directory") {
        (
            127,
            ": the command, or the interpreter it names, is not in the image",
        )
    } else if CANNOT_BE_INVOKED.into_iter().any(says) {
        (126, ": the command cannot be invoked")
    } else {
        (125, "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtime_errors_get_dockers_codes() {
        let prefix = "runc create failed: unable to start container process:";
        for (reason, code) in [
            ("exec: \"nope\": executable file not found in $PATH", 127),
            (
                "exec: \"/nope\": stat /nope: no such file or directory",
                127,
            ),
            (
                "executable file `nope` not found in $PATH: No such file or directory",
                127,
            ),
            ("open executable: No such file or directory", 127),
            ("exec container process `/x`: Exec format error", 126),
            ("open executable: Permission denied", 126),
            ("open executable: Operation not permitted", 126),
            ("exec: \"/etc/passwd\": permission denied", 126),
            ("exec: \"/etc\": is a directory", 126),
            ("exec /x: exec format error", 126),
            ("error mounting \"/x\": no such file or directory", 125),
            ("something else", 125),
        ] {
            assert_eq!(classify(&format!("{prefix} {reason}")).0, code, "{reason}");
        }
        let log = b"{\"level\":\"error\",\"msg\":\"first\"}\nrubbish\n\
            {\"level\":\"error\",\"msg\":\"second\"}\n{\"level\":\"warning\",\"msg\":\"w\"}\n";
        assert_eq!(last_error(log).as_deref(), Some("second"));
        assert_eq!(last_error(b""), None);
    }
}
