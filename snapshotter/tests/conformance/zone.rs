//! A mount server in a process of its own, the layer that it shows, and reads of it in threads.
//!
//! Whatever becomes of a test, no process and no mount of it is left, and a read that hangs fails it.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use lazarette_snapshotter::mountd::Through;

use crate::bed::{end_servers, servers};
use crate::checks::assert_same;
use crate::daemon::{Daemon, Does};
use crate::layer::{self, Form};

const EIO: i32 = 5;
/// Seconds that a read may wait, where none should have to.
pub(crate) const PATIENT: u64 = 120;
/// A read that takes longer hangs.
const HANGS: Duration = Duration::from_secs(90);
/// Readers at a time.
pub(crate) const READERS: usize = 4;

/// A server, and the directories of it and of its daemons.
pub(crate) struct Zone {
    pub(crate) origin: tempfile::TempDir,
    pub(crate) dir: tempfile::TempDir,
    through: Through,
    wait: u64,
    pub(crate) server: Child,
    /// How many of the files that are alike were read.
    read: AtomicUsize,
}

impl Zone {
    pub(crate) fn new(through: Through, wait: u64) -> Self {
        Self::of(Form::Chunks, through, wait)
    }

    pub(crate) fn of(form: Form, through: Through, wait: u64) -> Self {
        let (origin, dir) = (layer::write_as(form), tempfile::tempdir().unwrap());
        layer::prepare(origin.path(), &dir.path().join("store"), form);
        Self {
            origin,
            server: start_server(dir.path(), wait, false),
            dir,
            through,
            wait,
            read: AtomicUsize::new(0),
        }
    }

    pub(crate) fn daemon(&self, does: Does) -> Daemon {
        Daemon::start(self.dir.path(), self.origin.path(), self.through, does)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("mnt").join(name)
    }

    /// Begins to read a file of which nothing is on the disk: the last one that nobody has read
    /// yet, as whatever fetches brings along what is behind.
    pub(crate) fn read_fresh(&self) -> Reading {
        self.read_behind(0)
    }

    /// The same, leaving out so many files, which lie between that one and the one before.
    pub(crate) fn read_behind(&self, left_out: usize) -> Reading {
        let read = self.read.fetch_add(1 + left_out, Ordering::Relaxed);
        let name = layer::fresh(layer::FRESH - 1 - read);
        let path = self.path(&name);
        let (done, read) = sync_channel(1);
        // Nobody may be there to be told.
        std::thread::spawn(move || drop(done.send(fs::read(path))));
        Reading {
            read,
            origin: layer::content(self.origin.path(), &name),
            name,
        }
    }

    pub(crate) fn read_some_fresh(&self) -> Vec<Reading> {
        (0..READERS).map(|_| self.read_fresh()).collect()
    }

    pub(crate) fn kill_server(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    pub(crate) fn start_server(&mut self) {
        self.server = start_server(self.dir.path(), self.wait, false);
    }

    pub(crate) fn replace_server(&mut self) {
        let successor = start_server(self.dir.path(), self.wait, true);
        let mut old = std::mem::replace(&mut self.server, successor);
        assert!(old.wait().unwrap().success());
    }

    pub(crate) fn guard(&self) -> Option<i32> {
        let all = servers(self.dir.path()).into_iter();
        all.filter(|(_, is_guard)| *is_guard)
            .map(|(pid, _)| pid)
            .next()
    }

    /// Reads everything twice; there is a daemon that does right.
    pub(crate) fn check_all(&self) {
        let _daemon = self.daemon(Does::Right);
        self.compare_all();
    }

    pub(crate) fn compare_all(&self) {
        for name in layer::files(self.origin.path()) {
            let origin = layer::content(self.origin.path(), &name);
            let path = self.path(&name);
            assert_same(&self.end_of(|| fs::read(&path)), &origin, &name);
            assert_same(&self.end_of(|| layer::read_anew(&path)), &origin, &name);
        }
    }

    /// What a read comes to that succeeds. Where reads may wait only shortly, a daemon may come too
    /// late for some on a machine that does much else.
    fn end_of(&self, read: impl Fn() -> io::Result<Vec<u8>>) -> Vec<u8> {
        let since = Instant::now();
        loop {
            match read() {
                Ok(bytes) => return bytes,
                Err(error) => {
                    let may_be_late = self.wait < PATIENT && error.raw_os_error() == Some(EIO);
                    assert!(may_be_late && since.elapsed() < HANGS, "{error}");
                }
            }
        }
    }
}

impl Drop for Zone {
    fn drop(&mut self) {
        end_servers(self.dir.path());
        let _ = self.server.wait();
    }
}

/// A read in a thread, which is left behind where it hangs.
pub(crate) struct Reading {
    read: Receiver<io::Result<Vec<u8>>>,
    origin: Vec<u8>,
    name: String,
}

impl Reading {
    #[track_caller]
    pub(crate) fn succeeds(self) {
        assert_same(&self.end().unwrap(), &self.origin, &self.name);
    }

    /// What came of it.
    #[track_caller]
    pub(crate) fn end(&self) -> io::Result<Vec<u8>> {
        let read = self.read.recv_timeout(HANGS);
        read.unwrap_or_else(|_| panic!("reading {} has not ended after {HANGS:?}", self.name))
    }

    /// Whether it waits still.
    pub(crate) fn waits(&self) -> bool {
        matches!(self.read.try_recv(), Err(TryRecvError::Empty))
    }

    #[track_caller]
    pub(crate) fn fails(self) {
        let error = self.end().expect_err("nothing is there");
        assert_eq!(error.raw_os_error(), Some(EIO), "{error}");
    }
}

pub(crate) fn start_server(dir: &Path, wait: u64, take_over: bool) -> Child {
    let mut command = Command::new(layer::program());
    command.arg("--socket").arg(dir.join("socket"));
    command.args(["--wait", &wait.to_string()]);
    if take_over {
        command.arg("--take-over");
    }
    let mut server = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = [0; lazarette_mountd::READY.len()];
    let out = server.stdout.as_mut().unwrap();
    out.read_exact(&mut said).expect("the server listens");
    server
}
