//! Programs of other projects, run and ended by process id.
//!
//! Invariant: nothing started here outlives its `Daemon`, and only processes that carry our
//! scratch directory on their command line are ever signalled besides our own children.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How long a daemon may take to listen, and to end after TERM.
const PATIENCE: Duration = Duration::from_secs(20);
/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(10);

/// A background program with a socket; ended when dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts `command` with its output in `log` and waits until `socket` exists.
    pub(crate) fn start(command: &mut Command, log: &Path, socket: &Path) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("create {}", log.display()))?;
        command
            .stdout(file.try_clone()?)
            .stderr(file)
            .stdin(Stdio::null());
        let child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let mut daemon = Self { child };
        let deadline = Instant::now() + PATIENCE;
        while !socket.exists() {
            if let Some(status) = daemon.child.try_wait()? {
                bail!(
                    "{command:?} ended ({status}) before it listened; see:\n{}",
                    tail(log)
                );
            }
            if Instant::now() > deadline {
                bail!("{} did not appear; see:\n{}", socket.display(), tail(log));
            }
            std::thread::sleep(POLL);
        }
        Ok(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        signal("TERM", self.child.id());
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(POLL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end; its output is the error if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Runs a command to its end; returns when it was ready: at its first output line that starts
/// with `mark`, or at its exit when there is no mark. `at_ready` is called at that moment.
pub(crate) fn run_until_ready<T>(
    command: &mut Command,
    mark: Option<&str>,
    at_ready: impl Fn() -> T,
) -> Result<T> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let mut errors = child.stderr.take().context("stderr is piped")?;
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = errors.read_to_string(&mut text);
        text
    });
    let mut ready = None;
    for line in BufReader::new(child.stdout.take().context("stdout is piped")?).lines() {
        if mark.is_some_and(|mark| line.as_deref().unwrap_or("").starts_with(mark)) {
            ready.get_or_insert_with(&at_ready);
        }
    }
    let status = child.wait()?;
    if mark.is_none() {
        ready = Some(at_ready());
    }
    let errors = errors.join().unwrap_or_default();
    match ready {
        Some(ready) if status.success() => Ok(ready),
        _ => bail!("{command:?} did not get ready ({status}): {errors}"),
    }
}

/// Ends what is left of a start and takes its directory away: shims and daemons that name `dir`
/// on their command line, mounts below it, the files.
pub(crate) fn clean_up(dir: &Path) -> Result<()> {
    for pid in naming(dir) {
        signal("KILL", pid);
    }
    let deadline = Instant::now() + PATIENCE;
    while !naming(dir).is_empty() && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
    for point in mounts_below(dir)? {
        run(Command::new("umount").arg("--lazy").arg(&point))?;
    }
    run(Command::new("rm")
        .args(["-rf", "--one-file-system"])
        .arg(dir))
}

fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let mut points: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from)
        .filter(|point| point.starts_with(dir))
        .collect();
    // A mount is listed after what it stands on.
    points.reverse();
    Ok(points)
}

/// Processes, ours aside, whose command line has an argument below `dir`.
fn naming(dir: &Path) -> Vec<u32> {
    let needle = format!("{}/", dir.display());
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != std::process::id())
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&needle))
        })
        .collect()
}

fn signal(name: &str, pid: u32) {
    let _ = Command::new("sh")
        .args(["-c", "kill -s \"$0\" \"$1\"", name, &pid.to_string()])
        .stderr(Stdio::null())
        .status();
}

/// The last lines of a log, for an error message.
fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(10).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn ready_is_the_marked_line_or_the_exit() {
        let cases = [
            ("echo warming; echo READY 1", Some("READY"), true),
            ("echo nothing", Some("READY"), false),
            ("echo READY; exit 3", Some("READY"), false),
            ("true", None, true),
            ("exit 1", None, false),
        ];
        for (script, mark, wanted) in cases {
            let got = run_until_ready(&mut shell(script), mark, || ());
            assert_eq!(got.is_ok(), wanted, "{script}: {got:?}");
        }
    }

    #[test]
    fn a_failure_carries_what_the_program_said() {
        let error = run_until_ready(&mut shell("echo no disk >&2; exit 1"), None, || ());
        assert!(error.unwrap_err().to_string().contains("no disk"));
    }
}
