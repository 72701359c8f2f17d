//! Containers in user namespaces, whose files have other owners on the host, while `lazd`, the
//! mount server or the whole node dies.
//!
//! Promise: what is read is right and has the owners of the namespace, and no layer is copied;
//! when all is removed nothing is mounted, and the layers are gone.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lazarette_proto::snapshots::{MountsRequest, PrepareSnapshotRequest};
use lazarette_proto::types::Mount;

use super::asked::ASKED;
use super::bed::{Bed, EVICTABLE, mount, mounts, program};
use super::{Node, lowers};
use crate::support::{PATIENT, is_root};
use crate::sys;

/// Key of the container's snapshot.
const KEY: &str = "pod";
/// Host's id of the container's root.
const ROOT: u32 = 100_000;
const MAP: &str = "0:100000:65536";
/// Longest wait for what has to happen.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Has `node` make a container in a user namespace, on what the bed's lies on.
async fn prepare(node: &Node) -> Vec<Mount> {
    let committed = node.list("kind==committed").await;
    let mut top = committed.into_iter().filter(|info| !info.parent.is_empty());
    let map = |of: &str| {
        (
            format!("containerd.io/snapshot/{of}mapping"),
            MAP.to_owned(),
        )
    };
    let request = PrepareSnapshotRequest {
        key: KEY.to_owned(),
        parent: top.next().unwrap().name,
        labels: ["uid", "gid"].map(map).into(),
        ..Default::default()
    };
    node.client.prepare(request).await.unwrap().mounts
}

/// Its mounts as they are now.
async fn ask_mounts(node: &Node) -> Vec<Mount> {
    let request = MountsRequest {
        key: KEY.to_owned(),
        ..Default::default()
    };
    node.client.mounts(request).await.unwrap().mounts
}

/// Makes a hole of everything; that is refused while one server takes over from another.
fn evict(bed: &Bed) {
    let since = Instant::now();
    while !bed.store().evict() {
        assert!(since.elapsed() < WAIT_MAX, "{}", bed.files.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Everything can be read, and belongs to the container's root.
async fn is_right(bed: &Bed, rootfs: &Path) {
    bed.read_all_at(rootfs).await;
    for path in ["", "base", "base/f1", "top/f5"] {
        let meta = fs::symlink_metadata(rootfs.join(path)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (ROOT, ROOT), "{path}");
    }
}

/// All is removed, and so are the layers: nothing held them any more.
async fn remove_all(bed: &Bed, node: Node, rootfs: &[&Path]) {
    rootfs.iter().for_each(|at| sys::detach(at));
    node.remove(KEY).await;
    bed.remove(&node).await;
    assert_eq!(bed.mounts(), Vec::<PathBuf>::new());
    let left = fs::read_dir(bed.path().join("root/layers")).unwrap();
    assert_eq!(left.count(), 0, "{}", bed.files.log());
    let left = fs::read_dir(bed.path().join("root/snapshots")).unwrap();
    assert_eq!(left.count(), 0);
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_user_namespace_costs_no_copy_and_holds_no_layer() {
    if !is_root("privileged_a_user_namespace_costs_no_copy_and_holds_no_layer") {
        return;
    }
    for more in ["[snapshotter]\nfill = false\n", ASKED] {
        let bed = Bed::configured(PATIENT, more).await;
        let node = bed.node().await;
        let rootfs = bed.path().join("rootfs-pod");
        let mapped = prepare(&node).await;
        assert_eq!(lowers(&mapped).len(), 2, "one each");
        assert_eq!(mapped, ask_mounts(&node).await);
        mount(&mapped, &rootfs);
        assert!(!bed.store().is_complete(), "nobody has read them yet");
        is_right(&bed, &rootfs).await;
        // Who is in none sees them as they are.
        let meta = fs::metadata(bed.files.rootfs.join("base/f1")).unwrap();
        assert_eq!(meta.uid(), 0);
        remove_all(&bed, node, &[&rootfs, &bed.files.rootfs]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_owners_outlast_lazd_the_mount_server_and_the_node() {
    if !is_root("privileged_owners_outlast_lazd_the_mount_server_and_the_node") {
        return;
    }
    let mut bed = Bed::configured(PATIENT, EVICTABLE).await;
    let rootfs = bed.path().join("rootfs-pod");
    let node = bed.node().await;
    mount(&prepare(&node).await, &rootfs);
    node.close().await;
    bed.start_lazd(&program("lazd"));
    bed.kill_lazd();
    bed.start_lazd(&program("lazd"));
    is_right(&bed, &rootfs).await;
    let mounted = bed.mounts();

    // A server that dies is succeeded, and so is one that hands over.
    let [server, _guard] = bed.servers()[..] else {
        panic!("a server and its guard: {:?}", bed.servers());
    };
    sys::kill_by_id(server);
    bed.wait_for_end_of(server);
    bed.files.wait_until_readable();
    evict(&bed);
    is_right(&bed, &rootfs).await;
    let before = bed.servers()[0];
    let mut successor = Command::new(program("laz-mountd"));
    successor.arg("--take-over").arg("--socket");
    successor.arg(bed.path().join("state/mountd.sock"));
    bed.reap_later(successor.stdout(Stdio::null()).spawn().unwrap());
    bed.wait_for_end_of(before);
    evict(&bed);
    is_right(&bed, &rootfs).await;
    assert_eq!(bed.mounts(), mounted);

    // With its guard: what was mounted is lost, and what is shown of it is made anew for who comes.
    let failing = bed.while_lazd_sleeps(|| {
        bed.servers().into_iter().rev().for_each(sys::kill_by_id);
        bed.files.failing_unguarded()
    });
    assert!(failing > 0, "nobody noticed");
    bed.unmount();
    sys::detach(&rootfs);
    bed.wait_for_servers(2);
    bed.stop_lazd();
    let node = bed.node().await;
    mount(&ask_mounts(&node).await, &rootfs);
    bed.mount(&bed.ask_mounts(&node).await);
    is_right(&bed, &rootfs).await;
    assert_eq!(bed.mounts().len(), mounted.len());
    node.close().await;

    // The power fails: all that is left is on the disk.
    bed.reset();
    assert_eq!(mounts(bed.path()).len(), 0);
    let node = bed.node().await;
    let mapped = ask_mounts(&node).await;
    mount(&mapped, &rootfs);
    is_right(&bed, &rootfs).await;
    remove_all(&bed, node, &[&rootfs]).await;
}
