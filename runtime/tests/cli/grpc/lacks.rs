//! A node with the real mount server that lacks something: descriptors, EROFS, room on the disk,
//! the server itself.
//!
//! Promise: what is mounted goes on and is right, what cannot be is left to containerd or refused
//! with words that say what to do, `lazd` never mounts in place of the server, and all is as it was
//! once what was lacking is there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_snapshotter::remote::{Ask, LazyLayers as _, ask as asks_for};
use tonic::Code;

use super::bed::{EIO, mounts, program, servers, start_server};
use super::scarce::{Cleaned, ask, wanted};
use super::{Node, Wanted, config, layer, lowers, mounts_below, read};
use crate::support::{Changes, File, Layer, Pushed, Root, estargz, install, is_root, push, tar};
use crate::sys;

/// Layers that are asked for.
const LAYERS: usize = 40;
/// Descriptors of a mount server that has too few for them.
const FEW: usize = 64;
/// And one that has enough.
const ENOUGH: usize = 4096;
/// Longest wait for what has to happen.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Small images, each of a layer of its own.
struct Images(Vec<(Pushed, Layer, String)>);

impl Images {
    fn push(registry: &FakeRegistry) -> Self {
        let image = |number| {
            let (tag, text) = (format!("t{number}"), format!("layer {number}"));
            let layer = estargz(tar(&[File {
                path: "file",
                mode: 0o644,
                bytes: text.as_bytes(),
            }]));
            let tag = &tag;
            let pushed = push(
                registry,
                &layer,
                &Changes {
                    tag,
                    ..Changes::default()
                },
            );
            (pushed, layer, text)
        };
        Self((0..LAYERS).map(image).collect())
    }

    fn wanted(&self, number: usize) -> Wanted<'_> {
        let (image, layer, _) = &self.0[number];
        wanted(image, layer)
    }

    /// Asks for one of them; whether it was brought. Else containerd was told to bring it.
    async fn bring(&self, node: &Node, number: usize) -> bool {
        match ask(node, "extract", Some(&self.wanted(number))).await {
            Err((Code::AlreadyExists, _)) => true,
            Ok(mounts) => {
                assert_eq!(mounts[0].r#type, "overlay", "containerd unpacks there");
                node.remove("extract").await;
                false
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    /// Begins a container on one that was brought, reads it there and ends it.
    async fn is_read(&self, node: &Node, number: usize) {
        let mounts = ask_on(node, &self.wanted(number)).await.unwrap();
        let file = lowers(&mounts)[0].join("file");
        assert_eq!(read(file).await, self.0[number].2.as_bytes());
        node.remove("container").await;
    }
}

/// Begins a container on a layer that was brought.
async fn ask_on(
    node: &Node,
    wanted: &Wanted<'_>,
) -> Result<Vec<lazarette_proto::types::Mount>, (Code, String)> {
    let name = lazarette_snapshotter::remote::name(None, &wanted.chain_id.to_string());
    let request = lazarette_proto::snapshots::PrepareSnapshotRequest {
        key: "container".to_owned(),
        parent: name,
        ..Default::default()
    };
    let answer = node.client.prepare(request).await;
    let answer = answer.map_err(|status| (status.code(), status.message().to_owned()));
    answer.map(|answer| answer.mounts)
}

/// Gives a process so many descriptors.
fn limit(pid: i32, files: usize) {
    let mut prlimit = Command::new("prlimit");
    prlimit.args([
        "--pid",
        &pid.to_string(),
        &format!("--nofile={files}:{ENOUGH}"),
    ]);
    assert!(prlimit.status().unwrap().success());
}

fn open_files(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Directories that the server has layers at.
fn places(dir: &Path) -> usize {
    fs::read_dir(dir.join("state/layers")).unwrap().count()
}

/// Layers in the store.
fn stored(dir: &Path) -> usize {
    fs::read_dir(dir.join("root/layers")).map_or(0, Iterator::count)
}

/// Whether everything mounted is the server's.
fn all_are_the_servers(dir: &Path) -> bool {
    let (mounts, layers) = (mounts(dir), dir.join("state/layers"));
    mounts.iter().all(|path| path.starts_with(&layers))
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_the_mount_server_has_no_descriptors_for_containerd_brings() {
    if !is_root("privileged_what_the_mount_server_has_no_descriptors_for_containerd_brings") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _cleaned = Cleaned(dir.path());
    let registry = FakeRegistry::start().await;
    let images = Images::push(&registry);
    let (node, _) = Node::open_served(dir.path(), &program("laz-mountd")).await;
    let pids = servers(dir.path());
    pids.iter().for_each(|pid| limit(*pid, FEW));
    let mut brought = Vec::new();
    for number in 0..LAYERS {
        if images.bring(&node, number).await {
            brought.push(number);
        }
    }
    assert!((5..20).contains(&brought.len()), "{brought:?}");
    assert_eq!(stored(dir.path()), brought.len(), "nobody has the others");
    let is_left = |number: &usize| !brought.contains(number);
    let left = (0..LAYERS).find(is_left).unwrap();
    let before: Vec<_> = pids.iter().map(|pid| open_files(*pid)).collect();

    // Again and again: it is said, leaks nothing, and takes nobody else's connection.
    let Ask::Layer(again) = asks_for(&images.wanted(left).labels(), false) else {
        panic!("it asks for a layer");
    };
    for _ in 0..20 {
        let said = node.layers.claim(&again).await.unwrap_err().to_string();
        let words = ["Too many open files", "laz-mountd", "LimitNOFILE="];
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }
    let after: Vec<_> = pids.iter().map(|pid| open_files(*pid)).collect();
    assert_eq!((after, servers(dir.path())), (before, pids.clone()));
    assert_eq!(places(dir.path()), brought.len(), "nothing half made");
    assert!(all_are_the_servers(dir.path()));
    for number in &brought {
        images.is_read(&node, *number).await;
    }

    pids.iter().for_each(|pid| limit(*pid, ENOUGH));
    assert!(images.bring(&node, left).await);
    images.is_read(&node, left).await;
    brought.push(left);
    node.close().await;

    // A server that cannot have again what the one before it had.
    pids.into_iter().for_each(sys::kill_by_id);
    mounts(dir.path()).iter().for_each(|path| sys::detach(path));
    let server = Server::start(dir.path());
    servers(dir.path())
        .into_iter()
        .for_each(|pid| limit(pid, FEW));
    let (node, restored) = Node::open_served(dir.path(), &program("laz-mountd")).await;
    assert!((1..brought.len()).contains(&restored), "{restored}");
    let mut refusals = 0;
    for number in &brought {
        match ask_on(&node, &images.wanted(*number)).await {
            Ok(_) => node.remove("container").await,
            Err((code, text)) => {
                assert_eq!(code, Code::ResourceExhausted, "{text}");
                assert!(text.contains("LimitNOFILE="), "{text}");
                refusals += 1;
            }
        }
    }
    assert_eq!(refusals + restored, brought.len());
    assert!(all_are_the_servers(dir.path()));
    servers(dir.path())
        .into_iter()
        .for_each(|pid| limit(pid, ENOUGH));
    for number in &brought {
        images.is_read(&node, *number).await;
    }
    node.close().await;
    drop(server);
}

/// A mount server that a test starts.
struct Server(std::process::Child);

impl Server {
    fn start(dir: &Path) -> Self {
        let mut server = Command::new(program("laz-mountd"));
        let server = server.arg("--socket").arg(dir.join("state/mountd.sock"));
        Self(start_server(server))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_until_there_is_a_mount_server_containerd_brings_layers() {
    if !is_root("privileged_until_there_is_a_mount_server_containerd_brings_layers") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _cleaned = Cleaned(dir.path());
    let registry = FakeRegistry::start().await;
    let images = Images::push(&registry);
    // No server can listen there.
    let socket = dir.path().join("state/mountd.sock");
    fs::create_dir_all(&socket).unwrap();
    let (node, _) = Node::open_served(dir.path(), &program("laz-mountd")).await;
    assert!(!images.bring(&node, 0).await);
    assert_eq!(mounts_below(dir.path()), 0, "lazd mounts nothing instead");
    assert_eq!(stored(dir.path()), 0, "nobody has it");
    fs::remove_dir(&socket).unwrap();
    let began = Instant::now();
    while !images.bring(&node, 0).await {
        assert!(began.elapsed() < WAIT_MAX, "it finds none");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    images.is_read(&node, 0).await;
    assert!(all_are_the_servers(dir.path()));
    node.close().await;
}

/// The daemon's own words when it ends, with this in its config.
fn ended(dir: &Path, more: &str, program: &Path) -> String {
    let output = Command::new("timeout")
        .arg("30")
        .arg(program)
        .arg("--config")
        .arg(config(dir, "2s", more))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code().unwrap();
    assert!(code != 0 && code != 124, "{code}: {said}");
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_backend_that_is_asked_for_and_cannot_be_had_is_refused() {
    if !is_root("privileged_a_backend_that_is_asked_for_and_cannot_be_had_is_refused") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _cleaned = Cleaned(dir.path());
    {
        // The kernel makes no EROFS of what lies there.
        let _root = Root::mount(dir.path(), "tmpfs", "size=64m");
        for backend in ["erofs", "fanotify"] {
            let more = format!("[mounts]\nbackend = {backend:?}\n");
            let said = ended(dir.path(), &more, &program("lazd"));
            let words = [
                "lazd ends",
                "cannot start as the config wants",
                "use the backend",
            ];
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        }
        auto_falls_back(dir.path()).await;
    }
    fs::remove_dir_all(dir.path().join("state")).unwrap();
    // A daemon without the server beside it.
    let alone = dir.path().join("lazd");
    install(&program("lazd"), &alone);
    let said = ended(dir.path(), "[mounts]\nbackend = \"fanotify\"\n", &alone);
    assert!(
        said.contains("the program laz-mountd is not beside lazd"),
        "{said}"
    );
    assert_eq!((servers(dir.path()), mounts(dir.path())), (vec![], vec![]));
}

/// With `auto` the layers are there all the same.
async fn auto_falls_back(dir: &Path) {
    let registry = FakeRegistry::start().await;
    let images = Images::push(&registry);
    let (node, _) = Node::open_served(dir, &program("laz-mountd")).await;
    assert!(images.bring(&node, 0).await && images.bring(&node, 1).await);
    for number in [0, 1, 0] {
        images.is_read(&node, number).await;
    }
    assert_eq!(servers(dir), [0; 0], "it could show none of them");
    node.close().await;
    assert_eq!(mounts_below(dir), 1, "the small disk");
}

/// What a read of a file off the async workers comes to.
async fn try_read(path: PathBuf) -> std::io::Result<Vec<u8>> {
    let read = tokio::task::spawn_blocking(move || fs::read(path));
    let read = tokio::time::timeout(WAIT_MAX, read).await;
    read.expect("a read hangs").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_reads_that_need_room_fail_until_there_is_some() {
    if !is_root("privileged_reads_that_need_room_fail_until_there_is_some") {
        return;
    }
    for backend in ["erofs", "fanotify"] {
        let dir = tempfile::tempdir().unwrap();
        let small = Root::ext4(dir.path(), 64);
        let cleaned = Cleaned(dir.path());
        let registry = FakeRegistry::start().await;
        let made = estargz(layer("file", b"text"));
        let image = push(&registry, &made, &Changes::default());
        let more = format!(
            "[mounts]\nbackend = {backend:?}\n[snapshotter]\nfill = false\n[store]\nfree_floor = \"0\"\n"
        );
        let file = config(dir.path(), "5s", &more);
        let (node, _) = Node::open_as(&program("laz-mountd"), file).await;
        let name = node.bring("", &wanted(&image, &made)).await;
        let mounts = node.prepare("container", &name, None).await.unwrap();
        let lower = lowers(&mounts)[0].clone();
        small.fill();
        for _ in 0..3 {
            let error = try_read(lower.join("file-big")).await.expect_err("no room");
            assert_eq!(error.raw_os_error(), Some(EIO), "{backend}: {error}");
        }
        assert_eq!(
            fs::metadata(lower.join("file-big")).unwrap().len(),
            300 << 10
        );
        small.free();
        let big = try_read(lower.join("file-big")).await.unwrap();
        assert!(
            big == crate::support::incompressible(300 << 10),
            "{backend}"
        );
        assert_eq!(try_read(lower.join("file")).await.unwrap(), b"text");
        node.close().await;
        // Before the disk that it all lies on.
        drop(cleaned);
    }
}
