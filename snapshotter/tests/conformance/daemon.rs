//! A daemon in a process of its own, which ends, hangs or fails at a point that a test chose.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::store::{Lent, Vouched};
use lazarette_fetcher::types::ByteRange;
use lazarette_fetcher::{Error, Result};
use lazarette_snapshotter::data::{Filling, LayerData};
use lazarette_snapshotter::mountd::{LentData, MountServer, Mounted, Place, Shown, Through};
use lazarette_snapshotter::tree::Tree;
use rand::Rng as _;
use tokio::runtime::Runtime;

use crate::{layer, sys};

const READY: &str = "the daemon is ready";
const ASKED: &str = "the daemon was asked";
/// Name the directories of a test, and what its daemon does, to its process.
const DIR: &str = "LAZ_CONFORMANCE_DIR";
const ORIGIN: &str = "LAZ_CONFORMANCE_ORIGIN";
const DOES: &str = "LAZ_CONFORMANCE_DOES";
const THROUGH: &str = "LAZ_CONFORMANCE_THROUGH";

/// What a daemon does about the first bytes that it is asked for and has not got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Does {
    /// It does as it should, at its own pace.
    Right,
    /// It is killed before it writes anything,
    DiesBefore,
    /// or at any moment of fetching and writing,
    DiesWhile,
    /// or when all is written and nobody knows,
    DiesBehind,
    /// or when it has vouched for them, and has not said so.
    DiesVouching,
    /// It does nothing.
    Hangs,
    /// It says that it cannot.
    Fails,
}

const ALL: [Does; 7] = [
    Does::Right,
    Does::DiesBefore,
    Does::DiesWhile,
    Does::DiesBehind,
    Does::DiesVouching,
    Does::Hangs,
    Does::Fails,
];

/// The points at which one dies.
pub(crate) const DEATHS: [Does; 4] = [
    Does::DiesBefore,
    Does::DiesWhile,
    Does::DiesBehind,
    Does::DiesVouching,
];

fn die() -> ! {
    sys::kill_by_id(i32::try_from(std::process::id()).unwrap());
    unreachable!("nobody survives that");
}

struct Data {
    layer: Arc<Layer>,
    does: Does,
}

impl LayerData for Data {
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.layer.try_read(offset, buf)
    }

    fn fill(&self, range: ByteRange) -> Filling<'_> {
        let _ = writeln!(std::io::stdout(), "{ASKED}");
        Box::pin(async move {
            match self.does {
                Does::Right => {
                    let pace = rand::rng().random_range(0..3000);
                    tokio::time::sleep(Duration::from_micros(pace)).await;
                }
                Does::DiesBefore => die(),
                Does::DiesWhile => {
                    let soon = Duration::from_micros(rand::rng().random_range(0..2500));
                    std::thread::spawn(move || {
                        std::thread::sleep(soon);
                        die()
                    });
                }
                Does::DiesBehind => {
                    self.layer.fill(range).await?;
                    die()
                }
                Does::DiesVouching => {}
                Does::Hangs => std::future::pending().await,
                Does::Fails => {
                    return Err(Error::NotFound {
                        what: "bytes, as the test says".to_owned(),
                        host: String::new(),
                    });
                }
            }
            self.layer.fill(range).await
        })
    }
}

impl LentData for Data {
    fn lend(&self) -> Result<Lent> {
        self.layer.lend()
    }

    fn vouch(&self, range: ByteRange) -> Result<Option<Vouched>> {
        let vouched = self.layer.vouch(range)?;
        if vouched.is_some() && self.does == Does::DiesVouching {
            die();
        }
        Ok(vouched)
    }

    fn pad(&self) -> Result<()> {
        LentData::pad(self.layer.as_ref())
    }
}

/// A daemon's process.
pub(crate) struct Daemon {
    child: Child,
    asked: Receiver<()>,
}

impl Daemon {
    /// Starts one; returns when it has mounted or attached the layer.
    pub(crate) fn start(dir: &Path, origin: &Path, through: Through, does: Does) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["daemon::process", "--exact", "--ignored", "--nocapture"]);
        command.env(DIR, dir).env(ORIGIN, origin);
        command.env(DOES, format!("{does:?}"));
        command.env(THROUGH, format!("{through:?}"));
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let is_ready = |line: std::io::Result<String>| line.unwrap().contains(READY);
        assert!(lines.any(is_ready), "the daemon failed");
        let (tell, asked) = channel();
        std::thread::spawn(move || {
            for line in lines {
                // Nobody may listen, and that must not stop the daemon.
                if line.is_ok_and(|line| line.contains(ASKED)) {
                    let _ = tell.send(());
                }
            }
        });
        Self { child, asked }
    }

    /// Waits until it was asked so many times more for bytes that it has not got.
    pub(crate) fn wait_for_asked(&self, count: usize) {
        for _ in 0..count {
            let asked = self.asked.recv_timeout(Duration::from_secs(60));
            asked.expect("the daemon is asked");
        }
    }

    /// Waits until it has died by itself.
    pub(crate) fn wait(&mut self) {
        self.child.wait().unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects as soon as there is a server that has no daemon.
pub(crate) fn connect(dir: &Path, runtime: &Runtime) -> (MountServer, Vec<Mounted>) {
    loop {
        let handle = runtime.handle().clone();
        if let Ok(connected) = MountServer::connect(&dir.join("socket"), handle) {
            return connected;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn show(server: &MountServer, dir: &Path, data: &Arc<Data>, through: Through) {
    let tree = Tree::build(data.layer.index()).unwrap();
    let shown = Shown {
        blob_digest: data.layer.index().blob_digest,
        tree: &tree,
        data: Arc::clone(data) as _,
        through,
    };
    let place = Place {
        path: &dir.join("mnt"),
        metadata: &dir.join("metadata"),
    };
    server.mount_shown(&shown, place).unwrap();
}

#[test]
#[ignore = "other tests run it, as a process that they kill"]
fn process() {
    let var = |name| std::env::var_os(name).expect("a test runs this");
    let dir = PathBuf::from(var(DIR));
    let does = ALL
        .into_iter()
        .find(|does| *format!("{does:?}") == *var(DOES))
        .unwrap();
    let through = [Through::Fuse, Through::Fanotify];
    let mut through = through.into_iter();
    let through = through.find(|through| *format!("{through:?}") == *var(THROUGH));
    let runtime = Runtime::new().unwrap();
    let layer = layer::open(&PathBuf::from(var(ORIGIN)), &dir.join("store"), &runtime);
    let data = Arc::new(Data { layer, does });
    loop {
        let (server, mounts) = connect(&dir, &runtime);
        match mounts.first() {
            None => show(&server, &dir, &data, through.unwrap()),
            Some(mounted) => {
                let tree = || Tree::build(data.layer.index());
                let (bytes, image) = (Arc::clone(&data) as _, dir.join("metadata"));
                // A server that is gone by now is noticed below.
                let attached = server.attach_layer(mounted, tree, bytes, &image);
                assert_eq!(Some(mounted.through), through, "{attached:?}");
            }
        }
        let _ = writeln!(std::io::stdout(), "{READY}");
        runtime.block_on(server.closed());
    }
}
