//! What containerd was served beside what users ask of the store: who keeps what, and what
//! it is said to take.

use std::process::Command;

use serde_json::json;

use super::*;
use crate::store::ok;
use crate::support::Laz;

/// An image of two layers, and where a node of it is.
struct Case {
    registry: FakeRegistry,
    laz: Laz,
    image: Pushed,
    base: Layer,
    top: Layer,
    blobs: [Digest; 2],
}

impl Case {
    async fn new() -> Self {
        let registry = FakeRegistry::start().await;
        let base = estargz(layer("base", b"from the base"));
        let top = gzipped(layer("top", b"from the top"));
        let image = push_two(&registry, [&base, &top]);
        let blobs = [Digest::sha256(&base.blob), Digest::sha256(&top.blob)];
        Self {
            registry,
            laz: Laz::new(),
            image,
            base,
            top,
            blobs,
        }
    }

    async fn node(&self) -> (Node, usize) {
        Node::open(&self.laz.path("")).await
    }

    /// Names of the snapshots of both layers.
    async fn bring(&self, node: &Node) -> [String; 2] {
        let at = |chain_id, number: usize| Wanted {
            image: &self.image,
            chain_id,
            blob: self.blobs[number],
            all: &self.blobs[number..],
        };
        let first = node.bring("", &at(self.base.diff_id, 0)).await;
        let chain_id = chain(&self.base, &self.top);
        let second = node.bring(&first, &at(chain_id, 1)).await;
        [first, second]
    }

    /// As containerd does when the image goes.
    async fn remove(&self, node: &Node, [first, second]: &[String; 2]) {
        node.remove(second).await;
        node.remove(first).await;
    }

    /// Names of what is below the root.
    fn stored(&self, name: &str) -> usize {
        let dir = self.laz.path("root").join(name);
        std::fs::read_dir(dir).unwrap().count()
    }

    /// Both layers' files, through their mounts.
    async fn is_read(&self, node: &Node, top: &str) {
        let places = lowers(&node.prepare("look", top, None).await.unwrap());
        assert_eq!(read(places[0].join("top")).await, b"from the top");
        assert_eq!(read(places[1].join("base")).await, b"from the base");
        node.remove("look").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_prune_keeps_what_containerd_was_served_until_it_removes_it() {
    if !is_root("privileged_prune_keeps_what_containerd_was_served_until_it_removes_it") {
        return;
    }
    let case = Case::new().await;
    let (node, _) = case.node().await;
    let names = case.bring(&node).await;
    node.close().await;
    let pruned = ok(&case.laz, &["store", "prune"]).await;
    assert_eq!(pruned["layers"], json!([]), "{pruned}");
    let kept = pruned["kept"].as_array().unwrap();
    let reason = |one: &Value| one["reason"].as_str().unwrap().contains("containerd");
    assert!(kept.len() == 2 && kept.iter().all(reason), "{pruned}");
    let (node, restored) = case.node().await;
    assert_eq!(restored, 2);
    case.is_read(&node, &names[1]).await;
    case.remove(&node, &names).await;
    assert_eq!(case.stored("layers"), 0, "freed at once");
    node.close().await;
    // What is left is the manifest and the config by which they were found.
    let pruned = ok(&case.laz, &["store", "prune"]).await;
    assert_eq!(pruned["kept"], json!([]), "{pruned}");
    assert_eq!(case.stored("content"), 0, "{pruned}");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_laz_and_containerd_both_have_goes_with_the_last() {
    if !is_root("privileged_what_laz_and_containerd_both_have_goes_with_the_last") {
        return;
    }
    for laz_removes_first in [true, false] {
        let case = Case::new().await;
        let (laz, reference) = (&case.laz, &case.image.reference);
        ok(laz, &["pull", "--full", reference]).await;
        let (node, _) = case.node().await;
        let names = case.bring(&node).await;
        if laz_removes_first {
            node.close().await;
            let removed = ok(laz, &["rmi", reference]).await;
            assert!(!removed.to_string().contains("\"layers\":2"), "{removed}");
            assert_eq!(case.stored("layers"), 2, "containerd has them");
            let (node, restored) = case.node().await;
            assert_eq!(restored, 2);
            case.is_read(&node, &names[1]).await;
            case.remove(&node, &names).await;
            node.close().await;
        } else {
            case.remove(&node, &names).await;
            assert_eq!(case.stored("layers"), 2, "laz has them");
            node.close().await;
            ok(laz, &["rmi", reference]).await;
        }
        assert_eq!(case.stored("layers"), 0);
    }
}

/// Bytes and inodes of a directory, by du.
fn du(dir: &Path) -> (i64, i64) {
    let number = |option: &str| {
        let output = Command::new("du").args(["-s", option]).arg(dir).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        text.split('\t').next().unwrap().parse::<i64>().unwrap()
    };
    (number("--block-size=1"), number("--inodes"))
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_usage_is_what_du_counts() {
    if !is_root("privileged_usage_is_what_du_counts") {
        return;
    }
    let case = Case::new().await;
    let (node, _) = case.node().await;
    let names = case.bring(&node).await;
    for (name, blob) in names.iter().zip(&case.blobs) {
        let dir = case.laz.path("root/layers").join(blob.file_name());
        let usage = async || {
            let request = UsageRequest {
                key: name.clone(),
                ..Default::default()
            };
            let usage = node.client.usage(request).await.unwrap();
            (usage.size, usage.inodes)
        };
        // The rest comes in the background, and the file system frees a block of its own where pieces
        // of a file meet: what is told and what is there agree once neither changes.
        let mut last = None;
        let agrees = async {
            loop {
                let (before, told, after) = (du(&dir), usage().await, du(&dir));
                last = Some((before, told, after));
                if before == after && told == before && before.0 > 300 << 10 {
                    return;
                }
            }
        };
        let bound = std::time::Duration::from_secs(60);
        let agreed = tokio::time::timeout(bound, agrees).await;
        assert!(agreed.is_ok(), "before, told and after: {last:?}");
    }
    case.remove(&node, &names).await;
    drop(case.registry);
    node.close().await;
}
