//! Layers that one daemon leaves half brought or half removed.
//!
//! Promise: the next one removes them.

use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use lazarette_fetcher::types::Reference;
use lazarette_snapshotter::remote::{self, LazyLayers as _};

use super::bed::{clean, program};
use super::scarce::wanted;
use super::*;
use crate::sys;

/// Less than a layer of these tests has, bytes.
const BUDGET: u64 = 64 << 10;

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_layer_that_nothing_came_to_name_is_dropped_by_the_next_daemon() {
    if !is_root("privileged_a_layer_that_nothing_came_to_name_is_dropped_by_the_next_daemon") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let layer = gzipped(layer("file", b"text"));
    let image = push(&registry, &layer, &Changes::default());
    let wanted = remote::Wanted {
        chain_id: layer.diff_id,
        has_parent: false,
        reference: Reference::parse(&image.reference).unwrap(),
        manifest_digest: None,
        blob_digest: Digest::sha256(&layer.blob),
        ahead: Vec::new(),
    };
    let (node, _) = Node::open(dir.path()).await;
    // As if the daemon ended before it could commit the snapshot.
    node.layers.claim(&wanted).await.unwrap();
    assert_eq!(mounts_below(dir.path()), 1);
    node.close().await;
    let (node, restored) = Node::open(dir.path()).await;
    assert_eq!((restored, mounts_below(dir.path())), (0, 0));
    let left = std::fs::read_dir(dir.path().join("root/layers")).unwrap();
    assert_eq!(left.count(), 0);
    node.layers
        .mountpoint(&wanted.blob_digest)
        .await
        .unwrap_err();
    node.close().await;
}

/// A layer's directory that cannot be moved, until this is dropped.
struct Stuck(PathBuf);

impl Stuck {
    fn new(dir: &Path, digest: &Digest) -> Self {
        let path = dir.join("root/layers").join(digest.file_name());
        let mut mount = std::process::Command::new("mount");
        let mount = mount.arg("--bind").args([&path, &path]);
        assert!(mount.status().unwrap().success());
        Self(path)
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        sys::detach(&self.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_layer_that_cannot_be_removed_is_removed_by_the_next_daemon() {
    if !is_root("privileged_a_layer_that_cannot_be_removed_is_removed_by_the_next_daemon") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let layer = gzipped(layer("file", b"text"));
    let image = push(&registry, &layer, &Changes::default());
    let wanted = wanted(&image, &layer);
    let stored = || {
        std::fs::read_dir(dir.path().join("root/layers"))
            .unwrap()
            .count()
    };
    let (node, _) = Node::open(dir.path()).await;
    let name = node.bring("", &wanted).await;
    // As where a crash comes between the snapshot's removal and the layer's.
    let [trash, away] = ["root/trash", "root/away"].map(|name| dir.path().join(name));
    std::fs::rename(&trash, &away).unwrap();
    std::fs::write(&trash, b"no directory").unwrap();
    node.remove(&name).await;
    assert_eq!(stored(), 1);
    std::fs::remove_file(&trash).unwrap();
    std::fs::rename(&away, &trash).unwrap();
    node.close().await;
    // One that cannot do it either, as something is mounted there, has others to serve.
    let stuck = Stuck::new(dir.path(), &Digest::sha256(&layer.blob));
    let (node, _) = Node::open(dir.path()).await;
    assert_eq!(stored(), 1);
    node.close().await;
    drop(stuck);
    let (node, restored) = Node::open(dir.path()).await;
    assert_eq!((restored, stored()), (0, 0));
    node.bring("", &wanted).await;
    node.close().await;
}

/// An image of two plain layers.
fn push_base_and_top(registry: &FakeRegistry) -> (Layer, Layer, Pushed) {
    let [base, top] =
        [("base", b"below"), ("top", b"above")].map(|(name, text)| gzipped(layer(name, text)));
    let image = push_two(registry, [&base, &top]);
    (base, top, image)
}

/// Waits until the node has so many layers.
async fn until_stored(dir: &Path, count: usize) {
    let layers = dir.join("root/layers");
    let since = Instant::now();
    while std::fs::read_dir(&layers).map_or(0, Iterator::count) != count {
        assert!(since.elapsed() < Duration::from_secs(60), "not {count}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_was_opened_ahead_is_dropped_by_the_next_daemon() {
    if !is_root("privileged_what_was_opened_ahead_is_dropped_by_the_next_daemon") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let (base, top, image) = push_base_and_top(&registry);
    let all = [Digest::sha256(&base.blob), Digest::sha256(&top.blob)];
    let wanted = Wanted {
        image: &image,
        chain_id: base.diff_id,
        blob: all[0],
        all: &all,
    };
    let (node, _) = Node::open(dir.path()).await;
    node.bring("", &wanted).await;
    until_stored(dir.path(), 2).await;
    node.close().await;
    // Nobody asked for the one above.
    let (node, restored) = Node::open(dir.path()).await;
    assert_eq!(restored, 1);
    until_stored(dir.path(), 1).await;
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_was_opened_ahead_goes_when_nobody_comes_for_it() {
    if !is_root("privileged_what_was_opened_ahead_goes_when_nobody_comes_for_it") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let (base, top, image) = push_base_and_top(&registry);
    let all = [Digest::sha256(&base.blob), Digest::sha256(&top.blob)];
    let wanted = Wanted {
        image: &image,
        chain_id: base.diff_id,
        blob: all[0],
        all: &all,
    };
    // Longer than it takes from a layer being open to its being held.
    let keep = Keep {
        done: Duration::from_secs(5),
        ..Keep::default()
    };
    let file = config(dir.path(), PATIENT, "");
    let (node, _) = Node::open_keeping(Path::new("/none"), file, keep).await;
    let lower = node.bring("", &wanted).await;
    until_stored(dir.path(), 2).await;
    until_stored(dir.path(), 1).await;
    // It is brought anew for who comes late.
    let late = Wanted {
        chain_id: chain(&base, &top),
        blob: all[1],
        ..wanted
    };
    node.bring(&lower, &late).await;
    until_stored(dir.path(), 2).await;
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_layer_that_is_let_go_while_it_comes_keeps_its_record() {
    if !is_root("privileged_a_layer_that_is_let_go_while_it_comes_keeps_its_record") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let (base, top, image) = push_base_and_top(&registry);
    let [below, above] = [Digest::sha256(&base.blob), Digest::sha256(&top.blob)];
    let (node, _) = Node::open(dir.path()).await;
    let wanted = Wanted {
        image: &image,
        chain_id: base.diff_id,
        blob: below,
        all: &[],
    };
    node.bring("", &wanted).await;
    // Asked for again, with the one above, which begins to come.
    let later = Some("2".to_owned());
    registry.script_on(Endpoint::Blob, Fault::Status(503, later));
    let lowest = remote::Wanted {
        chain_id: base.diff_id,
        has_parent: false,
        reference: Reference::parse(&image.reference).unwrap(),
        manifest_digest: None,
        blob_digest: below,
        ahead: vec![above],
    };
    node.layers.claim(&lowest).await.unwrap();
    let without_parent = remote::Wanted {
        chain_id: chain(&base, &top),
        blob_digest: above,
        ahead: Vec::new(),
        ..lowest
    };
    node.layers.claim(&without_parent).await.unwrap_err();
    node.layers.release(&above).await.unwrap();
    // What it was let go of before it came is still found.
    until_stored(dir.path(), 2).await;
    node.close().await;
    let (node, restored) = Node::open(dir.path()).await;
    assert_eq!(restored, 1);
    until_stored(dir.path(), 1).await;
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_was_tried_out_is_removed_by_the_next_daemon() {
    if !is_root("privileged_what_was_tried_out_is_removed_by_the_next_daemon") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let meta = dir.path().join("root/meta");
    std::fs::create_dir_all(meta.join("try.1")).unwrap();
    std::fs::write(meta.join("try.1/metadata"), b"an image").unwrap();
    std::fs::write(meta.join("of no layer"), b"another").unwrap();
    let (node, _) = Node::open_served(dir.path(), &program("laz-mountd")).await;
    let left = std::fs::read_dir(&meta).unwrap().count();
    node.close().await;
    clean(dir.path());
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_store_that_one_daemon_leaves_too_full_is_trimmed_by_the_next() {
    if !is_root("privileged_a_store_that_one_daemon_leaves_too_full_is_trimmed_by_the_next") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let layer = gzipped(layer("file", b"text"));
    let image = push(&registry, &layer, &Changes::default());
    let wanted = wanted(&image, &layer);
    let (node, _) = Node::open(dir.path()).await;
    node.bring("", &wanted).await;
    node.close().await;
    let mut layers = std::fs::read_dir(dir.path().join("root/layers")).unwrap();
    let data = layers.next().unwrap().unwrap().path().join("data");
    let used = || std::fs::metadata(&data).unwrap().blocks() * 512;
    assert!(used() > BUDGET, "{}", used());
    // Nothing is fetched, so nothing is recorded that would bring it about.
    let more = format!(
        "[snapshotter]\nfill = false\n[store]\nbudget = \"{BUDGET}\"\nfree_floor = \"0\"\n"
    );
    let (node, restored) = Node::open_with(dir.path(), &more).await;
    assert_eq!(restored, 1);
    let since = Instant::now();
    while used() > BUDGET {
        assert!(since.elapsed() < Duration::from_secs(60), "{}", used());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    node.close().await;
}
