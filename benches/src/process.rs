//! Programs of other projects, run and ended by process id.
//!
//! Invariant: nothing started here outlives its `Daemon`, and besides our own children only
//! processes are ever signalled that name our scratch directory on their command line or
//! have their root file system on it (containers of a shim that is gone).

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::http;
use crate::plan::Ready;

/// How long a daemon may take to listen, and to end after TERM.
const PATIENCE: Duration = Duration::from_secs(20);
/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(10);
/// Pause between two looks at a port that is part of what is timed.
const PORT_POLL: Duration = Duration::from_millis(5);
/// Longest a start may take: the slowest system needs a third of it for the largest image.
const START_MAX: Duration = Duration::from_mins(10);
/// Where containers of the host's network are reached.
const LOOPBACK: &str = "127.0.0.1";

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

    /// Process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
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

/// Runs a command to its end; its errors are the error if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs a command to its end and returns its standard output; its errors are the error if it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
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
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command until it is ready and calls `at_ready` at that moment. One whose port answers is
/// ended then (TERM); others are waited for and have to succeed.
pub(crate) fn run_until_ready<T>(
    command: &mut Command,
    ready: Ready,
    at_ready: impl Fn() -> T,
) -> Result<T> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Ready::Port(port) = ready
        && TcpStream::connect((LOOPBACK, port)).is_ok()
    {
        bail!("port {port} answers before the start: end what listens there");
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let errors = collect(child.stderr.take().context("stderr is piped")?);
    let output = child.stdout.take().context("stdout is piped")?;
    let guard = Watchdog::over(child.id());
    let (reached, ended_by_us) = match ready {
        Ready::Exit => {
            // What it says is not asked for, but has to be taken.
            drop(collect(output));
            (None, false)
        }
        Ready::Line(mark) => (first_line(output, mark, &at_ready), false),
        Ready::Port(port) => {
            drop(collect(output));
            let reached = first_answer(&mut child, port, &at_ready)?;
            signal("TERM", child.id());
            (reached, true)
        }
    };
    let status = child.wait()?;
    let reached = match ready {
        Ready::Exit => Some(at_ready()),
        Ready::Line(_) | Ready::Port(_) => reached,
    };
    drop(guard);
    let errors = errors.join().unwrap_or_default();
    match reached {
        Some(reached) if ended_by_us || status.success() => Ok(reached),
        _ => bail!("{command:?} did not get ready ({status}): {errors}"),
    }
}

/// Reads a stream to its end on a thread of its own.
fn collect(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn first_line<T>(output: ChildStdout, mark: &str, at_ready: impl Fn() -> T) -> Option<T> {
    let mut reached = None;
    for line in BufReader::new(output).lines() {
        if line.is_ok_and(|line| line.starts_with(mark)) {
            reached.get_or_insert_with(&at_ready);
        }
    }
    reached
}

fn first_answer<T>(child: &mut Child, port: u16, at_ready: impl Fn() -> T) -> Result<Option<T>> {
    let host = format!("{LOOPBACK}:{port}");
    while child.try_wait()?.is_none() {
        if http::answers(&host) {
            return Ok(Some(at_ready()));
        }
        std::thread::sleep(PORT_POLL);
    }
    Ok(None)
}

/// Kills a child that takes longer than any start may, so that a run ends whatever hangs.
struct Watchdog {
    done: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    fn over(pid: u32) -> Self {
        let (done, waits) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            if waits.recv_timeout(START_MAX) == Err(RecvTimeoutError::Timeout) {
                signal("KILL", pid);
            }
        });
        Self {
            done: Some(done),
            thread: Some(thread),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.done.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Most memory that a process ever had resident, bytes; none when it is gone.
pub(crate) fn peak_memory(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Runs a command to its end, looking at its memory on the way; returns the peak, bytes. What it
/// took after the last look (20 ms) is not in it.
pub(crate) fn run_watching_memory(command: &mut Command, log: &Path) -> Result<u64> {
    let file = File::create(log)?;
    command
        .stdout(file.try_clone()?)
        .stderr(file)
        .stdin(Stdio::null());
    let mut child = command
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let guard = Watchdog::over(child.id());
    let mut peak = 0;
    let status = loop {
        peak = peak.max(peak_memory(child.id()).unwrap_or(0));
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(2 * POLL);
    };
    drop(guard);
    if !status.success() {
        bail!("{command:?} failed ({status}): {}", tail(log));
    }
    Ok(peak)
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

/// Processes, ours aside, that name something below `dir` on their command line or live on it.
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
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&needle) || root_is_on(&mounts, &needle)
        })
        .collect()
}

/// Whether the root file system of this mount table is made of something below `needle`.
fn root_is_on(mounts: &str, needle: &str) -> bool {
    mounts
        .lines()
        .filter(|line| line.split(' ').nth(1) == Some("/"))
        .any(|line| line.contains(needle))
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
        let line = Ready::Line("READY");
        let cases = [
            ("echo warming; echo READY 1", line, true),
            ("echo nothing", line, false),
            ("echo READY; exit 3", line, false),
            ("true", Ready::Exit, true),
            ("echo much; exit 0", Ready::Exit, true),
            ("exit 1", Ready::Exit, false),
        ];
        for (script, ready, wanted) in cases {
            let got = run_until_ready(&mut shell(script), ready, || ());
            assert_eq!(got.is_ok(), wanted, "{script}: {got:?}");
        }
    }

    #[test]
    fn a_program_that_ends_before_its_port_answers_is_not_ready() {
        let free = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap();
        let port = Ready::Port(free.local_addr().unwrap().port());
        let taken = run_until_ready(&mut shell("true"), port, || ());
        assert!(taken.unwrap_err().to_string().contains("before the start"));
        drop(free);
        assert!(run_until_ready(&mut shell("true"), port, || ()).is_err());
    }

    #[test]
    fn a_failure_carries_what_the_program_said() {
        let error = run_until_ready(&mut shell("echo no disk >&2; exit 1"), Ready::Exit, || ());
        assert!(error.unwrap_err().to_string().contains("no disk"));
    }

    #[test]
    fn memory_is_the_highest_seen() {
        assert!(peak_memory(std::process::id()).is_some_and(|bytes| bytes > 1 << 20));
        assert_eq!(peak_memory(u32::MAX), None);
    }

    #[test]
    fn a_container_is_known_by_its_root() {
        let mounts = "proc /proc proc rw 0 0\noverlay / overlay rw,upperdir=/s/start/up 0 0\n";
        assert!(root_is_on(mounts, "/s/start/"));
        assert!(!root_is_on(mounts, "/s/other/"));
        assert!(!root_is_on(
            "overlay /s/start/m overlay rw,upperdir=/s/start/up 0 0\n",
            "/s/start/"
        ));
    }
}
