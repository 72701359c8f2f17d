//! A node that is killed at any point: while it brings layers, makes, commits and removes
//! snapshots, or opens after the kill before.
//!
//! Promise: whatever was answered is there, with its parent, its usage and its bytes, and
//! nothing is half there; what is served can be mounted. The test runs this binary again as
//! the node, which looks at what the one before left before it says that it is open.

pub(super) mod log;
pub(super) mod work;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::future::join_all;
use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::remote;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;

use self::log::Log;
use self::work::{Worker, check};
use super::bed::{clean, mounts, program};
use super::{Node, chain, push_two_with};
use crate::support::{File, Layer, Pushed, estargz, is_root, tar};

/// Names the directory of the test to a node's process.
const DIR: &str = "LAZ_CRASH_TEST_DIR";
const READY: &str = "the node is open";
/// One in four comes before the node is open.
const KILLS: u32 = 60;
const WORKERS: usize = 2;
/// Layers of each worker: a base, and one on it for each of two images.
pub(super) const LAYERS: usize = 3;

/// An image of two layers, the base first.
pub(super) struct Image {
    pub(super) pushed: Pushed,
    pub(super) chains: [Digest; 2],
    pub(super) blobs: [Digest; 2],
}

impl Image {
    /// Of the layers' snapshots.
    pub(super) fn names(&self) -> [String; 2] {
        let [base, top] = self.chains.map(|chain| chain.to_string());
        let base = remote::name(None, &base);
        let top = remote::name(Some(&base), &top);
        [base, top]
    }

    /// A line of the file that a node finds them in.
    fn line(&self) -> String {
        let digests = self.chains.iter().chain(&self.blobs);
        let digests: Vec<_> = digests.map(Digest::to_string).collect();
        format!("{} {}\n", self.pushed.reference, digests.join(" "))
    }

    fn parse(line: &str) -> Self {
        let mut words = line.split(' ');
        let reference = words.next().unwrap().to_owned();
        let mut digests = || [(); 2].map(|()| Digest::parse(words.next().unwrap()).unwrap());
        Self {
            pushed: Pushed { reference },
            chains: digests(),
            blobs: digests(),
        }
    }
}

fn images(dir: &Path) -> Vec<Image> {
    let text = fs::read_to_string(dir.join("images")).unwrap();
    text.lines().map(Image::parse).collect()
}

/// What a layer of a worker holds.
fn content(worker: usize, layer: usize) -> Vec<u8> {
    let byte = u8::try_from(1 + worker * LAYERS + layer).unwrap();
    vec![byte; 50_000]
}

/// Two images for each of so many workers; `pack` makes a layer of a number of a tar.
pub(super) fn push_all(
    registry: &FakeRegistry,
    workers: usize,
    pack: impl Fn(usize, Vec<u8>) -> Layer,
) -> Vec<Image> {
    let mut images = Vec::new();
    for worker in 0..workers {
        let tar_of = |layer| {
            tar(&[File {
                path: "file",
                mode: 0o644,
                bytes: &content(worker, layer),
            }])
        };
        let layers: Vec<Layer> = (0..LAYERS)
            .map(|layer| pack(layer, tar_of(layer)))
            .collect();
        for top in 1..LAYERS {
            let (base, above) = (&layers[0], &layers[top]);
            let tag = format!("v{worker}-{top}");
            images.push(Image {
                pushed: push_two_with(registry, [base, above], &tag, &json!({})),
                chains: [base.diff_id, chain(base, above)],
                blobs: [base, above].map(|layer| Digest::sha256(&layer.blob)),
            });
        }
    }
    images
}

async fn open(dir: &Path) -> Node {
    Node::open_served(dir, &program("laz-mountd")).await.0
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "another test runs it, as a process that it kills"]
async fn node() {
    let dir = PathBuf::from(std::env::var_os(DIR).expect("a test runs this"));
    let images = images(&dir);
    let node = open(&dir).await;
    let mut log = Log::open(&dir.join("log"));
    check(&node, &dir, &images, &mut log).await;
    let _ = writeln!(std::io::stdout(), "{READY}");
    let log = Mutex::new(log);
    let workers: Vec<_> = images
        .chunks(LAYERS - 1)
        .enumerate()
        .map(|(number, images)| Worker {
            number,
            node: &node,
            images,
            log: &log,
            mounts_at: None,
        })
        .collect();
    join_all(workers.iter().map(|worker| worker.work(&dir))).await;
}

/// Starts a node; one that is `awaited` is open then.
fn start(dir: &Path, awaited: bool) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["grpc::crash::node", "--exact", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    if !awaited {
        std::thread::spawn(move || lines.for_each(drop));
        return child;
    }
    let opened = lines.any(|line| line.is_ok_and(|line| line.contains(READY)));
    if !opened {
        let _ = child.kill();
        panic!("the node does not open: {:?}", child.wait());
    }
    std::thread::spawn(move || lines.for_each(drop));
    child
}

/// Leaves no process and no mount, also where the test fails.
struct Running<'a> {
    dir: &'a Path,
    child: Option<Child>,
}

impl Running<'_> {
    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It ends of itself only where it fails.
            assert!(child.try_wait().unwrap().is_none(), "the node failed");
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        clean(self.dir);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_node_that_is_killed_leaves_nothing_half_done() {
    if !is_root("privileged_a_node_that_is_killed_leaves_nothing_half_done") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let images = push_all(&registry, WORKERS, |_, tar| estargz(tar));
    let lines: String = images.iter().map(Image::line).collect();
    fs::write(dir.path().join("images"), lines).unwrap();
    let mut running = Running {
        dir: dir.path(),
        child: None,
    };
    let mut rng = StdRng::seed_from_u64(1);
    for kill in 0..KILLS {
        let place = dir.path().to_path_buf();
        let awaited = kill % 4 != 3;
        // Off the async workers, which are the registry.
        let child = tokio::task::spawn_blocking(move || start(&place, awaited)).await;
        running.child = Some(child.unwrap());
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..250))).await;
        running.kill();
    }

    let node = open(dir.path()).await;
    let mut log = Log::open(&dir.path().join("log"));
    check(&node, dir.path(), &images, &mut log).await;
    let answered = fs::read_to_string(dir.path().join("log")).unwrap();
    let answered = answered.matches("Answered").count();
    let _ = writeln!(
        std::io::stderr(),
        "{KILLS} kills, {answered} answers, {} snapshots at the end",
        log.there().len()
    );
    remove_all(&node).await;
    node.close().await;
    assert_eq!(mounts(dir.path()), Vec::<PathBuf>::new());
    for left in ["state/layers", "root/meta", "root/layers", "root/snapshots"] {
        let left = fs::read_dir(dir.path().join(left)).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, Vec::<PathBuf>::new());
    }
}

/// Those first that nothing lies on.
async fn remove_all(node: &Node) {
    loop {
        let all = node.list("").await;
        if all.is_empty() {
            return;
        }
        let is_leaf = |name: &str| all.iter().all(|other| other.parent != name);
        for info in all.iter().filter(|info| is_leaf(&info.name)) {
            node.remove(&info.name).await;
        }
    }
}
