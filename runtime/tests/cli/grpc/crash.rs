//! A node that is killed while it brings and removes layers.
//!
//! Promise: whenever that happens, the next one starts, serves what was committed, and
//! leaves nothing of what was not. The test runs this binary again as the node.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::types::Digest;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::bed::{clean, mounts, program};
use super::{Node, Wanted, lowers, read};
use crate::support::{Changes, File, Pushed, estargz, is_root, push, tar};

/// Names the directory of the test to a node's process.
const DIR: &str = "LAZ_CRASH_TEST_DIR";
const READY: &str = "the node is open";
const KILLS: u32 = 40;
/// Images that are brought and removed, of one layer each.
const IMAGES: usize = 4;

/// What a node is told of an image, a line each: reference, diff_id, blob.
fn images(dir: &Path) -> Vec<(Pushed, Digest, Digest)> {
    let text = fs::read_to_string(dir.join("images")).unwrap();
    let image = |line: &str| {
        let mut words = line.split(' ');
        let reference = words.next().unwrap().to_owned();
        let mut digest = || Digest::parse(words.next().unwrap()).unwrap();
        (Pushed { reference }, digest(), digest())
    };
    text.lines().map(image).collect()
}

/// What the layer of image `number` holds.
fn content(number: usize) -> Vec<u8> {
    let byte = u8::try_from(number + 1).unwrap();
    vec![byte; 50_000]
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
    let _ = writeln!(std::io::stdout(), "{READY}");
    remove_containers(&node).await;
    let mut rng = StdRng::seed_from_u64(u64::from(std::process::id()));
    loop {
        let number = rng.random_range(0..IMAGES);
        let (image, diff_id, blob) = &images[number];
        let wanted = Wanted {
            image,
            chain_id: *diff_id,
            blob: *blob,
            all: &[],
        };
        let name = node.bring("", &wanted).await;
        check(&node, number, &name, rng.random()).await;
        if rng.random() {
            node.remove(&name).await;
        }
    }
}

/// Removes what the last one was at.
async fn remove_containers(node: &Node) {
    for info in node.list("kind==active").await {
        node.remove(&info.name).await;
    }
}

/// Reads the layer's file through a container of its own.
async fn check(node: &Node, number: usize, name: &str, id: u64) {
    let key = format!("container {id}");
    let mounts = node.prepare(&key, name, None).await.unwrap();
    assert!(read(lowers(&mounts)[0].join("file")).await == content(number));
    node.remove(&key).await;
}

fn start(dir: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["grpc::crash::node", "--exact", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
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
    let mut lines = String::new();
    for number in 0..IMAGES {
        let layer = estargz(tar(&[File {
            path: "file",
            mode: 0o644,
            bytes: &content(number),
        }]));
        let tag = format!("v{number}");
        let image = push(
            &registry,
            &layer,
            &Changes {
                tag: &tag,
                ..Changes::default()
            },
        );
        let blob = Digest::sha256(&layer.blob);
        lines.push_str(&format!("{} {} {blob}\n", image.reference, layer.diff_id));
    }
    fs::write(dir.path().join("images"), lines).unwrap();
    let mut running = Running {
        dir: dir.path(),
        child: None,
    };
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..KILLS {
        let place = dir.path().to_path_buf();
        // Off the async workers, which are the registry.
        let child = tokio::task::spawn_blocking(move || start(&place)).await;
        running.child = Some(child.unwrap());
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..250))).await;
        running.kill();
    }

    let images = images(dir.path());
    let node = open(dir.path()).await;
    let committed = node.list("kind==committed").await;
    assert_eq!(node.restored, committed.len());
    // Over those that are complete lies one more, soon.
    let (mounted, count) = (mounts(dir.path()).len(), committed.len());
    assert!((2 * count..=3 * count).contains(&mounted), "{mounted}");
    remove_containers(&node).await;
    for (id, info) in (0..).zip(&committed) {
        let target = info.labels["containerd.io/snapshot.ref"].clone();
        let of = |(_, diff_id, _): &(_, Digest, _)| diff_id.to_string() == target;
        let number = images.iter().position(of).unwrap();
        check(&node, number, &info.name, id).await;
        node.remove(&info.name).await;
    }
    node.close().await;
    assert_eq!(mounts(dir.path()), Vec::<PathBuf>::new());
    for left in ["state/layers", "root/meta", "root/layers"] {
        let left = fs::read_dir(dir.path().join(left)).unwrap();
        assert_eq!(left.count(), 0);
    }
}
