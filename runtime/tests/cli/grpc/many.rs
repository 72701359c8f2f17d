//! Many layers at once, and what the mount server takes for them.

use std::fs;
use std::io::Write as _;

use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::types::Digest;

use super::bed::{clean, mounts, program, servers};
use super::{Node, Wanted, lowers, read};
use crate::support::{Changes, File, estargz, is_root, push, tar};
use crate::sys;

/// As many as a node may have mounted, by what is promised.
const LAYERS: usize = 500;
/// Where memory is looked at on the way.
const HUNDRED: usize = 100;
/// The promise for that many, KiB.
const RSS_KIB_MAX: u64 = 15 << 10;

/// Memory of the mount server and of its guard, KiB.
fn memory(pids: &[i32]) -> Vec<u64> {
    let rss = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse().unwrap()
    };
    pids.iter().map(rss).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_five_hundred_layers_are_mounted_at_once() {
    if !is_root("privileged_five_hundred_layers_are_mounted_at_once") {
        return;
    }
    sys::raise_open_files();
    let dir = tempfile::tempdir().unwrap();
    let _clean = Clean(dir.path());
    let registry = FakeRegistry::start().await;
    let (node, _) = Node::open_served(dir.path(), &program("laz-mountd")).await;
    let mut names = Vec::new();
    for number in 0..LAYERS {
        let text = format!("layer {number}");
        let layer = estargz(tar(&[File {
            path: "file",
            mode: 0o644,
            bytes: text.as_bytes(),
        }]));
        // Under the tag that the one before had.
        let image = push(&registry, &layer, &Changes::default());
        let wanted = Wanted {
            image: &image,
            chain_id: layer.diff_id,
            blob: Digest::sha256(&layer.blob),
            all: &[],
        };
        let name = node.bring("", &wanted).await;
        check(&node, number, &name).await;
        names.push(name);
        if number + 1 == HUNDRED {
            let memory = memory(&servers(dir.path()));
            let _ = writeln!(std::io::stderr(), "{HUNDRED} layers: {memory:?} KiB");
            assert!(memory.iter().all(|kib| *kib <= RSS_KIB_MAX), "{memory:?}");
        }
    }
    let memory = memory(&servers(dir.path()));
    let _ = writeln!(std::io::stderr(), "{LAYERS} layers: {memory:?} KiB");
    must_be_mounted(dir.path());
    node.close().await;

    drop(registry);
    let (node, restored) = Node::open_served(dir.path(), &program("laz-mountd")).await;
    assert_eq!(restored, LAYERS);
    must_be_mounted(dir.path());
    for (number, name) in names.iter().enumerate() {
        check(&node, number, name).await;
        node.remove(name).await;
    }
    node.close().await;
    assert_eq!(mounts(dir.path()).len(), 0);
    for left in ["state/layers", "root/meta", "root/layers"] {
        assert_eq!(fs::read_dir(dir.path().join(left)).unwrap().count(), 0);
    }
}

/// Each is an EROFS over a FUSE; over those that are complete is one of the kernel alone.
fn must_be_mounted(dir: &std::path::Path) {
    let mounted = mounts(dir).len();
    assert!((2 * LAYERS..=3 * LAYERS).contains(&mounted), "{mounted}");
}

/// Reads a layer's file through a container's mounts.
async fn check(node: &Node, number: usize, name: &str) {
    let key = format!("container {number}");
    let mounts = node.prepare(&key, name, None).await.unwrap();
    let file = lowers(&mounts)[0].join("file");
    assert_eq!(read(file).await, format!("layer {number}").as_bytes());
    node.remove(&key).await;
}

/// Leaves no process and no mount, also where the test fails.
struct Clean<'a>(&'a std::path::Path);

impl Drop for Clean<'_> {
    fn drop(&mut self) {
        clean(self.0);
    }
}
