//! A daemon in a process of its own, that fills, grants and evicts until it is killed.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use lazarette_mountd::client::Connection;
use lazarette_mountd::ranges::Span;
use lazarette_mountd::wire::{FileId, Message, Role, Through};

use crate::store::{Layer, PAGE, Random};

const READY: &str = "the daemon is ready";
/// Names the directory of the test to a daemon's process.
const DIR: &str = "LAZ_MOUNTD_TEST_DIR";
/// Set for one that evicts all the time.
const EVICTS: &str = "LAZ_MOUNTD_TEST_EVICTS";

/// A daemon's process.
pub(crate) struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts one for the layer in `dir`; returns when it has mounted or attached it.
    pub(crate) fn start(dir: &Path, evicts: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["daemon::process", "--exact", "--ignored", "--nocapture"]);
        command.env(DIR, dir).stdout(Stdio::piped());
        if evicts {
            command.env(EVICTS, "1");
        }
        let mut child = command.spawn().unwrap();
        let out = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut lines = std::io::BufRead::lines(out);
        assert!(
            lines.any(|line| line.unwrap().contains(READY)),
            "the daemon failed"
        );
        // What it says later is of no interest, and must not stop it.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects as daemon as soon as there is a server that has none; the mounts it has.
pub(crate) fn connect(socket: &Path) -> (Connection, Vec<(u64, PathBuf)>) {
    loop {
        if let Some(connected) = try_connect(socket) {
            return connected;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn try_connect(socket: &Path) -> Option<(Connection, Vec<(u64, PathBuf)>)> {
    let server = Connection::connect(socket).ok()?;
    server.send(&Message::Hello(Role::Daemon), &[]).ok()?;
    let Message::Welcome { mounts } = server.receive().ok()?.0 else {
        return None;
    };
    let mut all = Vec::new();
    for _ in 0..mounts {
        let Message::Listed(listed) = server.receive().ok()?.0 else {
            return None;
        };
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&listed.path));
        all.push((listed.mount, path));
    }
    Some((server, all))
}

/// Mounts a layer; its number.
pub(crate) fn mount(server: &Connection, layer: &Layer, name: &str, at: &Path) -> u64 {
    let mounted = try_mount(server, layer, name, at);
    mounted.unwrap_or_else(|errno| panic!("not mounted: {errno}"))
}

/// The same, or why the server would not.
pub(crate) fn try_mount(
    server: &Connection,
    layer: &Layer,
    name: &str,
    at: &Path,
) -> Result<u64, u32> {
    let [data, number] = layer.lend();
    let message = Message::Mount {
        request: 1,
        through: Through::Fuse,
        size: layer.pages * PAGE,
        name: name.as_bytes().to_vec(),
        path: at.as_os_str().as_bytes().to_vec(),
    };
    server
        .send(&message, &[data.as_fd(), number.as_fd()])
        .unwrap();
    match server.receive().unwrap().0 {
        Message::Done {
            errno: 0, mount, ..
        } => Ok(mount),
        Message::Done { errno, .. } => Err(errno),
        other => panic!("this is no answer: {other:?}"),
    }
}

/// Answers one want; sometimes more than was asked for, sometimes late, sometimes twice.
fn answer(server: &Connection, layer: &Layer, random: &mut Random, want: (u64, u64, Span)) -> bool {
    let (want, mount, span) = want;
    let first = span.start() / PAGE;
    let last = (span.end().div_ceil(PAGE) + random.below(8)).min(layer.pages);
    if random.below(16) == 0 {
        std::thread::sleep(Duration::from_micros(random.below(3000)));
    }
    let number = layer.fill(first..last);
    let span = Span::new(first * PAGE, last * PAGE).unwrap();
    let grant = Message::Grant {
        want,
        mount,
        number,
        span,
    };
    let twice = random.below(32) == 0;
    let sent = server.send(&grant, &[]).is_ok();
    if twice {
        let _ = server.send(&grant, &[]);
    }
    sent
}

fn evict_for_ever(layer: &Layer) {
    let mut random = Random(u64::from(std::process::id()));
    loop {
        let first = random.below(layer.pages);
        let last = (first + 1 + random.below(16)).min(layer.pages);
        let pause = random.below(200);
        layer.evict(first..last, || {
            std::thread::sleep(Duration::from_micros(pause))
        });
        std::thread::sleep(Duration::from_micros(random.below(2000)));
    }
}

#[test]
#[ignore = "other tests run it, as a process that they kill"]
fn process() {
    let dir = PathBuf::from(std::env::var_os(DIR).expect("a test runs this"));
    let layer = Arc::new(Layer::open(&dir));
    let mut random = Random(u64::from(std::process::id()) << 20);
    if std::env::var_os(EVICTS).is_some() {
        let layer = Arc::clone(&layer);
        std::thread::spawn(move || evict_for_ever(&layer));
    }
    loop {
        let (server, mounts) = connect(&dir.join("socket"));
        let at = dir.join("mnt");
        if mounts.is_empty() {
            mount(&server, &layer, "layer", &at);
        }
        for (mount, _) in mounts {
            let file = FileId::of(&layer.lend()[0]).unwrap();
            let attach = Message::Attach {
                request: 2,
                mount,
                file,
            };
            // A server that is gone by now is noticed below.
            let _ = server.send(&attach, &[]);
        }
        let _ = writeln!(std::io::stdout(), "{READY}");
        loop {
            match server.receive() {
                Ok((Message::Want { want, mount, span }, _)) => {
                    if !answer(&server, &layer, &mut random, (want, mount, span)) {
                        break;
                    }
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
    }
}
