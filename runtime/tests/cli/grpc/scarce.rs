//! A node that lacks something: room on the disk, descriptors, what it mounts with.
//!
//! Promise: the client gets the code and the words that say what is missing, what is there
//! goes on, nothing of what failed is left, and all is as it was once it is there again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::types::Digest;
use lazarette_proto::snapshots::PrepareSnapshotRequest;
use lazarette_proto::types::Mount;
use tonic::Code;

use super::bed::{clean, program};
use super::{Node, Wanted, layer, lowers, mounts_below, read};
use crate::support::{
    Changes, Layer, Pushed, Root, estargz, gzipped, is_root, push, with_own_mounts,
};

/// Tells a node's process its directory, and the image that it is to bring.
const DIR: &str = "LAZ_SCARCE_TEST_DIR";
const IMAGE: &str = "LAZ_SCARCE_TEST_IMAGE";
/// Snapshots that fit into what a database sets apart, of 4 KB each.
const FITTING_MAX: usize = 10_000;
/// Longest wait for what was lacking to be found to be there again, on a machine that does much else.
const RECOVERED_MAX: Duration = Duration::from_secs(180);

pub(super) fn wanted<'a>(image: &'a Pushed, layer: &Layer) -> Wanted<'a> {
    Wanted {
        image,
        chain_id: layer.diff_id,
        blob: Digest::sha256(&layer.blob),
        all: &[],
    }
}

/// Prepares a snapshot; code and text of the refusal.
async fn refused(node: &Node, key: &str, wanted: Option<&Wanted<'_>>) -> (Code, String) {
    let answer = ask(node, key, wanted).await;
    answer.map(|mounts| panic!("{mounts:?}")).unwrap_err()
}

pub(super) async fn ask(
    node: &Node,
    key: &str,
    wanted: Option<&Wanted<'_>>,
) -> Result<Vec<Mount>, (Code, String)> {
    let request = PrepareSnapshotRequest {
        key: key.to_owned(),
        labels: wanted.map(Wanted::labels).unwrap_or_default(),
        ..Default::default()
    };
    let answer = node.client.prepare(request).await;
    let answer = answer.map_err(|status| (status.code(), status.message().to_owned()));
    answer.map(|answer| answer.mounts)
}

/// Brings a layer that could not be had before: that stands for a while, and is forgotten then.
async fn bring_in_the_end(node: &Node, wanted: &Wanted<'_>) -> String {
    let began = Instant::now();
    loop {
        let answer = ask(node, "extract", Some(wanted)).await;
        if matches!(answer, Err((Code::AlreadyExists, _))) {
            return node.bring("", wanted).await;
        }
        let waited = began.elapsed();
        assert!(waited < RECOVERED_MAX, "it stays as if lacking: {answer:?}");
        node.remove("extract").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Makes snapshots until the room is used up that the database had set apart; how many.
async fn fill_database(node: &Node) -> usize {
    for number in 0..FITTING_MAX {
        let request = PrepareSnapshotRequest {
            key: format!("fits-{number}"),
            labels: [("label".to_owned(), "x".repeat(4000))].into(),
            ..Default::default()
        };
        if node.client.prepare(request).await.is_err() {
            return number;
        }
    }
    panic!("there is room without end");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_full_disk_is_said_and_passes() {
    if !is_root("privileged_a_full_disk_is_said_and_passes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let small = Root::mount(dir.path(), "tmpfs", "size=24m");
    let registry = FakeRegistry::start().await;
    let (first, second) = (
        estargz(layer("first", b"one")),
        gzipped(layer("second", b"two")),
    );
    let image = push(&registry, &first, &Changes::default());
    let other = push(
        &registry,
        &second,
        &Changes {
            tag: "other",
            ..Changes::default()
        },
    );
    let (node, _) = Node::open(dir.path()).await;
    let name = node.bring("", &wanted(&image, &first)).await;
    let mounts = node.prepare("container", &name, None).await.unwrap();
    let lower = lowers(&mounts)[0].clone();
    assert_eq!(read(lower.join("first")).await, b"one");

    small.fill();
    let fitted = fill_database(&node).await;
    let (code, text) = refused(&node, "full", None).await;
    assert_eq!(code, Code::ResourceExhausted, "{text}");
    assert!(text.contains("no space left on the device"), "{text}");
    // It cannot be left to containerd either, which would unpack to the same disk.
    let (code, text) = refused(&node, "full", Some(&wanted(&other, &second))).await;
    assert_eq!(code, Code::ResourceExhausted, "{text}");
    assert_eq!(read(lower.join("first")).await, b"one");
    assert_eq!(node.list("").await.len(), 2 + fitted, "nothing half made");
    let dirs = fs::read_dir(dir.path().join("root/snapshots")).unwrap();
    assert_eq!(dirs.count(), 1 + fitted, "those of containers");

    small.free();
    let began = Instant::now();
    while ask(&node, "again", None).await.is_err() {
        assert!(began.elapsed() < RECOVERED_MAX, "it stays as if full");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let name = bring_in_the_end(&node, &wanted(&other, &second)).await;
    let mounts = node.prepare("container-2", &name, None).await.unwrap();
    assert_eq!(read(lowers(&mounts)[0].join("second")).await, b"two");
    node.close().await;
    let (node, restored) = Node::open(dir.path()).await;
    assert_eq!((restored, node.list("").await.len()), (2, 5 + fitted));
    node.close().await;
    assert_eq!(mounts_below(dir.path()), 1, "the small one");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_where_overlay_cannot_write_it_is_said() {
    if !is_root("privileged_where_overlay_cannot_write_it_is_said") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path.display().to_string()
    });
    // As in a container without a volume.
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let _root = Root::mount(dir.path(), "overlay", &options);
    let (node, _) = Node::open(dir.path()).await;
    for key in ["one", "two"] {
        let (code, text) = refused(&node, key, None).await;
        assert_eq!(code, Code::FailedPrecondition, "{text}");
        let words = [
            "overlay cannot write to",
            "root/snapshots",
            "use a --root on",
        ];
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
    assert_eq!(node.list("").await.len(), 0);
    let left = fs::read_dir(dir.path().join("root/snapshots")).unwrap();
    assert_eq!(left.count(), 0);
    node.close().await;
}

/// Ends what a process left, also where the test fails.
pub(super) struct Cleaned<'a>(pub(super) &'a Path);

impl Drop for Cleaned<'_> {
    fn drop(&mut self) {
        clean(self.0);
    }
}

/// Runs one of the ignored tests as a process of its own, behind `wrapper`.
async fn run(test: &str, dir: &Path, image: &Pushed, wrapper: &[&str]) {
    let _cleaned = Cleaned(dir);
    // Not a pipe: the mount server has it too, and outlives the process.
    let log = fs::File::create(dir.join("log")).unwrap();
    let mut command = tokio::process::Command::new(wrapper[0]);
    let status = command
        .args(&wrapper[1..])
        .arg(std::env::current_exe().unwrap())
        .args([&format!("grpc::scarce::{test}"), "--exact", "--ignored"])
        .env(DIR, dir)
        .env(IMAGE, &image.reference)
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .status();
    let status = status.await.unwrap();
    let said = fs::read_to_string(dir.join("log")).unwrap();
    assert!(status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
}

/// What a process was told.
fn told() -> (PathBuf, Pushed) {
    let of = |name| std::env::var_os(name).expect("a test runs this");
    let reference = of(IMAGE).into_string().unwrap();
    (of(DIR).into(), Pushed { reference })
}

/// The layer of all these images.
fn some_layer() -> Layer {
    estargz(layer("file", b"text"))
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "another test runs it, as a process of its own"]
async fn with_few_descriptors() {
    let (dir, image) = told();
    let layer = some_layer();
    let (node, _) = Node::open(&dir).await;
    let ballast = || -> Vec<_> { std::iter::from_fn(|| fs::File::open("/").ok()).collect() };

    let held = ballast();
    let (code, text) = refused(&node, "none left", None).await;
    assert_eq!(code, Code::ResourceExhausted, "{text}");
    assert!(text.contains("Too many open files"), "{text}");
    let (code, text) = refused(&node, "none left", Some(&wanted(&image, &layer))).await;
    assert_eq!(code, Code::ResourceExhausted, "{text}");
    drop(held);
    assert_eq!(node.list("").await.len(), 0, "nothing half made");

    let name = bring_in_the_end(&node, &wanted(&image, &layer)).await;
    let mounts = node.prepare("container", &name, None).await.unwrap();
    let file = lowers(&mounts)[0].join("file");
    assert_eq!(read(file).await, b"text");

    // Again and again leaks none.
    let before = open_descriptors();
    for _ in 0..20 {
        let held = ballast();
        refused(&node, "none left", None).await;
        drop(held);
    }
    assert!(open_descriptors() <= before);
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_descriptors_that_run_out_are_said_and_come_back() {
    if !is_root("privileged_descriptors_that_run_out_are_said_and_come_back") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &some_layer(), &Changes::default());
    let few = ["prlimit", "--nofile=256:256"];
    run("with_few_descriptors", dir.path(), &image, &few).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "another test runs it, as a process of its own"]
async fn without_fuse() {
    let (dir, image) = told();
    let layer = some_layer();
    let (node, _) = Node::open_served(&dir, &program("laz-mountd")).await;
    let mounts = ask(&node, "extract", Some(&wanted(&image, &layer))).await;
    assert_eq!(mounts.unwrap()[0].r#type, "overlay", "containerd brings it");
    assert_eq!(node.list("").await.len(), 1);
    node.remove("extract").await;
    node.close().await;
    let left = fs::read_dir(dir.join("root/snapshots")).unwrap();
    assert_eq!(left.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_without_fuse_containerd_brings_layers() {
    if !is_root("privileged_without_fuse_containerd_brings_layers") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &some_layer(), &Changes::default());
    let hide = "mount --bind /dev/null /dev/fuse && exec \"$0\" \"$@\"";
    let wrapper = with_own_mounts(hide);
    let wrapper = wrapper.each_ref().map(String::as_str);
    run("without_fuse", dir.path(), &image, &wrapper).await;
}
