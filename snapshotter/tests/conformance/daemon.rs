//! A daemon in a process of its own, which ends, hangs or fails at a point that a test chose.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::store::{Kept, Lent, Vouched};
use lazarette_fetcher::types::ByteRange;
use lazarette_fetcher::{Error, Result};
use lazarette_snapshotter::data::{Filling, LayerData};
use lazarette_snapshotter::mountd::{
    LentData, MountServer, Mounted, Place, Shown, Through, hide_whole, show_whole,
};
use lazarette_snapshotter::tree::Tree;
use rand::Rng as _;
use tokio::runtime::Runtime;

use crate::{layer, sys};

const READY: &str = "the daemon is ready";
const ASKED: &str = "the daemon was asked";
const BEGINS: &str = "the daemon changes who shows the layer";
const ENDS: &str = "the daemon has changed that";
const FILLED: &str = "the daemon has what it was asked for";
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
    /// It has the kernel show the layer alone, and no more, again and again.
    Shows,
}

const ALL: [Does; 8] = [
    Does::Right,
    Does::DiesBefore,
    Does::DiesWhile,
    Does::DiesBehind,
    Does::DiesVouching,
    Does::Hangs,
    Does::Fails,
    Does::Shows,
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
                    // Mostly inside, however fast a fill is here, and anywhere in there.
                    let mut rng = rand::rng();
                    let soon = rng.random_range(0..1500_u64) >> (3 * rng.random_range(0..4));
                    let soon = Duration::from_micros(soon);
                    std::thread::spawn(move || {
                        std::thread::sleep(soon);
                        die()
                    });
                }
                Does::DiesBehind => {
                    self.layer.fill(range).await?;
                    die()
                }
                Does::DiesVouching | Does::Shows => {}
                Does::Hangs => std::future::pending().await,
                Does::Fails => {
                    return Err(Error::NotFound {
                        what: "bytes, as the test says".to_owned(),
                        host: String::new(),
                    });
                }
            }
            let filled = self.layer.fill(range).await;
            let _ = writeln!(std::io::stdout(), "{FILLED}");
            filled
        })
    }

    fn keep(&self) -> Result<Kept> {
        self.layer.keep()
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
    filled: Receiver<()>,
    /// Whether it began, and whether it ended.
    changes: Receiver<bool>,
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
        let (tell_asked, asked) = channel();
        let (tell_filled, filled) = channel();
        let (tell_changes, changes) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                // Nobody may listen, and that must not stop the daemon.
                let _ = match () {
                    () if line.contains(ASKED) => tell_asked.send(()).is_ok(),
                    () if line.contains(FILLED) => tell_filled.send(()).is_ok(),
                    () if line.contains(BEGINS) => tell_changes.send(true).is_ok(),
                    () if line.contains(ENDS) => tell_changes.send(false).is_ok(),
                    () => true,
                };
            }
        });
        Self {
            child,
            asked,
            filled,
            changes,
        }
    }

    /// Waits until it changes that for the first time.
    pub(crate) fn wait_for_change(&self) {
        let began = self.changes.recv_timeout(Duration::from_secs(60));
        began.expect("it changes who shows the layer");
    }

    /// Whether one that was killed had begun to change who shows the layer, and not ended.
    pub(crate) fn is_inside(&self) -> bool {
        // The channel ends with what it said.
        self.changes.iter().last().unwrap_or(true)
    }

    /// Whether one that has died had made anything present that it was asked for.
    pub(crate) fn has_filled(&self) -> bool {
        // The channel ends with what it said.
        self.filled.recv_timeout(Duration::from_secs(60)).is_ok()
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
        let since = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            let late = since.elapsed() > Duration::from_secs(60);
            assert!(!late, "the daemon lives: nobody asked it");
            std::thread::sleep(Duration::from_micros(200));
        }
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

fn show(server: &MountServer, dir: &Path, data: &Arc<Data>, through: Through) -> Mounted {
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
    server.mount_shown(&shown, place).unwrap()
}

/// Until it is killed.
fn show_and_hide(runtime: &Runtime, data: &Data, mounted: &Mounted) -> ! {
    let say = |line| drop(writeln!(std::io::stdout(), "{line}"));
    // Refused where the daemon before left the kernel to show it, and somebody reads.
    let _ = hide_whole(mounted);
    let _ = data.layer.file().evict_all();
    runtime.block_on(data.layer.fill_all()).unwrap();
    assert!(data.layer.file().is_whole().unwrap());
    loop {
        say(BEGINS);
        assert!(show_whole(mounted, data.layer.file()).unwrap());
        say(ENDS);
        say(BEGINS);
        let _ = hide_whole(mounted);
        say(ENDS);
    }
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
    // What comes along with more than was asked for is much of such a layer.
    layer.set_foresight(layer.index().spans.is_empty());
    let data = Arc::new(Data { layer, does });
    loop {
        let (server, mounts) = connect(&dir, &runtime);
        let mounted = match mounts.first() {
            None => show(&server, &dir, &data, through.unwrap()),
            Some(mounted) => {
                let tree = || Tree::build(data.layer.index());
                let (bytes, image) = (Arc::clone(&data) as _, dir.join("metadata"));
                // A server that is gone by now is noticed below.
                let attached = server.attach_layer(mounted, tree, bytes, &image);
                assert_eq!(Some(mounted.through), through, "{attached:?}");
                mounted.clone()
            }
        };
        let _ = writeln!(std::io::stdout(), "{READY}");
        if does == Does::Shows {
            show_and_hide(&runtime, &data, &mounted);
        }
        runtime.block_on(server.closed());
    }
}
