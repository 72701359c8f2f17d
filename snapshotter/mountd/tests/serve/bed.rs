//! A server over one layer, and readers who check every byte.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lazarette_mountd::client::Connection;
use lazarette_mountd::wire::{Message, Role};

use crate::store::{Layer, PAGE, Random, content};
use crate::sys;

/// Whether this process is root; if not, says loudly that `test` does not run.
pub(crate) fn must_be_root(test: &str) -> bool {
    if !sys::is_root() {
        let _ = writeln!(io::stderr(), "SKIPPED (needs root): {test}");
    }
    sys::is_root()
}

/// A read that takes longer hangs: nothing here waits for its own time to be over.
pub(crate) const HANGS: Duration = Duration::from_secs(90);

/// What a thread that reads comes to. One that hangs fails the test, and is left behind.
#[track_caller]
pub(crate) fn ends<T>(thread: JoinHandle<T>) -> T {
    let since = Instant::now();
    while !thread.is_finished() {
        assert!(
            since.elapsed() < HANGS,
            "a read has not ended after {HANGS:?}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    thread.join().unwrap()
}

/// Takes down what a test mounted, also where it failed.
pub(crate) struct Mounted(pub(crate) Vec<PathBuf>);

impl Drop for Mounted {
    fn drop(&mut self) {
        self.0.iter().for_each(|at| sys::detach(at));
    }
}

/// A layer on disk, its mountpoint, and the server.
pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) server: Child,
    wait: u64,
}

impl Bed {
    pub(crate) fn new(pages: u64, wait: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Layer::create(dir.path(), pages);
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let server = start(dir.path(), wait, false);
        Self { dir, server, wait }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn layer(&self) -> Layer {
        Layer::open(self.path())
    }

    /// The served file, opened past the page cache or not.
    pub(crate) fn open(&self, direct: bool) -> File {
        open(&self.path().join("mnt/data"), direct)
    }

    /// The same file under the name whose bytes the kernel keeps.
    pub(crate) fn open_small(&self) -> File {
        open(&self.path().join("mnt/small"), false)
    }

    /// The guard's process, while there is one.
    pub(crate) fn guard(&self) -> Option<u32> {
        let socket = self.path().join("socket");
        let is_guard = |pid: &u32| {
            // One that is gone by now is none.
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut args = line.split(|byte| *byte == 0).skip(1);
            args.next() == Some(b"guard")
                && args.any(|arg| arg == socket.as_os_str().as_encoded_bytes())
        };
        let all = fs::read_dir("/proc").unwrap();
        let mut pids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        pids.find(is_guard)
    }

    /// Waits for a guard other than `old`.
    pub(crate) fn next_guard(&self, old: u32) -> u32 {
        let since = Instant::now();
        loop {
            match self.guard() {
                Some(pid) if pid != old => return pid,
                _ => assert!(since.elapsed() < HANGS, "nobody guards the server"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills the server; the guard goes on.
    pub(crate) fn kill_server(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    /// Starts a server after that.
    pub(crate) fn start_server(&mut self) {
        self.server = start(self.path(), self.wait, false);
    }

    /// Replaces the server; how the old one ended.
    pub(crate) fn upgrade_server(&mut self) -> ExitStatus {
        let successor = start(self.path(), self.wait, true);
        let mut old = std::mem::replace(&mut self.server, successor);
        old.wait().unwrap()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        sys::detach(&self.path().join("mnt"));
        let _ = self.server.kill();
        let _ = self.server.wait();
        // Its guard has nothing left to hold, and ends.
    }
}

fn start(dir: &Path, wait: u64, take_over: bool) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_laz-mountd"));
    command.arg("--socket").arg(dir.join("socket"));
    command.args(["--wait", &wait.to_string()]);
    if take_over {
        command.arg("--take-over");
    }
    let server = command.spawn().unwrap();
    if !take_over {
        while !answers(&dir.join("socket")) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    server
}

/// Whether a server is there and serves what it has.
fn answers(socket: &Path) -> bool {
    let Ok(server) = Connection::connect(socket) else {
        return false;
    };
    let asked = server.send(&Message::Hello(Role::Guest), &[]);
    let answers = asked.is_ok() && server.receive().is_ok();
    // Not only closed: a process that another test is starting has it open, too, and the server
    // would take us for a guest until that has begun.
    server.shut_down();
    answers
}

pub(crate) fn open(path: &PathBuf, direct: bool) -> File {
    let mut options = File::options();
    options.read(true);
    if direct {
        options.custom_flags(sys::DIRECT);
    }
    options.open(path).unwrap()
}

/// Reads pages and compares them; `false` for `EIO`, everything else but the right bytes is
/// the end of the test.
pub(crate) fn read_right(file: &File, first: u64, count: u64) -> bool {
    let mut bytes = vec![0; usize::try_from(count * PAGE).unwrap()];
    match file.read_exact_at(&mut bytes, first * PAGE) {
        Ok(()) => {}
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(5), "{error}");
            return false;
        }
    }
    for (page, bytes) in (first..).zip(bytes.chunks(usize::try_from(PAGE).unwrap())) {
        assert!(bytes == content(page), "wrong bytes in page {page}");
    }
    true
}

/// Threads that read until they are told to stop.
pub(crate) struct Readers {
    stop: Arc<AtomicBool>,
    right: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    /// A third of `count` read past the page cache, one with it, and one what the kernel keeps;
    /// that one has it forget all once in a while.
    pub(crate) fn start(bed: &Bed, count: u64) -> Self {
        let mut readers = Self {
            stop: Arc::default(),
            right: Arc::default(),
            failed: Arc::default(),
            threads: Vec::new(),
        };
        let pages = bed.layer().pages;
        for seed in 0..count {
            let is_kept = seed % 3 == 2;
            let file = match is_kept {
                true => bed.open_small(),
                false => bed.open(seed % 3 == 0),
            };
            let stop = Arc::clone(&readers.stop);
            let (right, failed) = (Arc::clone(&readers.right), Arc::clone(&readers.failed));
            readers.threads.push(std::thread::spawn(move || {
                let mut random = Random(seed);
                while !stop.load(Ordering::Relaxed) {
                    if is_kept && random.below(64) == 0 {
                        sys::forget(&file);
                    }
                    let count = 1 + random.below(12);
                    let first = random.below(pages - count);
                    let outcome = if read_right(&file, first, count) {
                        &right
                    } else {
                        &failed
                    };
                    outcome.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        readers
    }

    /// Waits until so many more reads were right.
    pub(crate) fn wait_for(&self, more: u64) {
        let (goal, since) = (self.right.load(Ordering::Relaxed) + more, Instant::now());
        while self.right.load(Ordering::Relaxed) < goal {
            // One that has panicked will never get there.
            assert!(self.threads.iter().all(|thread| !thread.is_finished()));
            assert!(since.elapsed() < HANGS, "readers hang");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends them; how many reads were right, and how many failed.
    pub(crate) fn stop(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(ends);
        (
            self.right.load(Ordering::Relaxed),
            self.failed.load(Ordering::Relaxed),
        )
    }
}
