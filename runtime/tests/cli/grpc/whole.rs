//! Complete layers, which the kernel reads by itself.
//!
//! Promise: they need no process of ours and no registry, nothing is evicted from them while a
//! container has them, and where nothing else is left they give way before the disk is full.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use lazarette_fetcher::test_util::{Endpoint, Fault};
use lazarette_runtime::engine::EvictWhat;

use super::bed::{Bed, program};
use crate::support::{PATIENT, is_root};
use crate::sys;

/// Waits until so many file systems are mounted below the node's directory.
fn wait_for_mounts(bed: &Bed, count: usize) {
    let since = Instant::now();
    while bed.mounts().len() != count {
        let late = since.elapsed() > Duration::from_secs(120);
        assert!(!late, "{:?} {}", bed.mounts(), bed.files.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_is_complete_needs_no_process_of_ours() {
    if !is_root("privileged_what_is_complete_needs_no_process_of_ours") {
        return;
    }
    let mut bed = Bed::configured(PATIENT, "").await;
    bed.start_lazd(&program("lazd"));
    // Three for each of two layers, and the container that was there before.
    wait_for_mounts(&bed, 7);
    let list = Command::new(program("laz-mountd"))
        .arg("list")
        .arg("--socket")
        .arg(bed.path().join("state/mountd.sock"))
        .output()
        .unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let by_kernel = list.lines().filter(|line| line.ends_with("\tkernel"));
    assert_eq!(by_kernel.count(), 2, "{list}");
    let state = bed.path().join("state");
    let later = bed.path().join("later");
    let [base, top] = [0, 1].map(|number| state.join(format!("layers/{number}")));
    let lowers = format!("ro,lowerdir={}:{}", top.display(), base.display());
    fs::create_dir_all(&later).unwrap();
    let mut mount = Command::new("mount");
    let mount = mount.args(["-t", "overlay", "overlay", "-o", &lowers]);
    assert!(mount.arg(&later).status().unwrap().success());
    bed.kill_lazd();
    bed.servers().into_iter().for_each(sys::kill_by_id);
    bed.wait_for_servers(0);
    assert!(!bed.store().evict(), "the kernel reads it by itself");
    bed.read_all_at(&later).await;

    // Nothing but the disk is left, and nobody but it is asked.
    bed.reset();
    for endpoint in [Endpoint::Blob, Endpoint::Manifest] {
        bed.registry.always(endpoint, Fault::Status(503, None));
    }
    bed.start_lazd(&program("lazd"));
    wait_for_mounts(&bed, 6);
    assert!(!bed.store().evict());
    bed.stop_lazd();
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_no_container_has_is_evicted_when_nothing_else_is_left() {
    if !is_root("privileged_what_no_container_has_is_evicted_when_nothing_else_is_left") {
        return;
    }
    let bed = Bed::configured(PATIENT, "").await;
    let node = bed.node().await;
    wait_for_mounts(&bed, 7);
    let evicted = async || {
        let report = node.engine.evict(EvictWhat::To(0)).await.unwrap();
        report.evicted_chunks
    };
    assert_eq!(evicted().await, 0, "a container has it all");
    assert_eq!(bed.mounts().len(), 7);
    bed.unmount();
    assert_eq!(evicted().await, 0, "its snapshot is there");
    node.remove("container").await;
    assert!(evicted().await > 0);
    // Seen through the server again, which fetches what is missing.
    assert_eq!(bed.mounts().len(), 4);
    let parent = node.list("kind==committed").await;
    let is_top = |name: &str| parent.iter().all(|info| info.parent != name);
    let top = parent.iter().find(|info| is_top(&info.name)).unwrap();
    let mounts = node.prepare("container", &top.name, None).await.unwrap();
    bed.mount(&mounts);
    bed.read_all_here().await;
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_is_complete_outlives_its_removal_and_all_of_ours() {
    if !is_root("privileged_what_is_complete_outlives_its_removal_and_all_of_ours") {
        return;
    }
    let bed = Bed::configured(PATIENT, "").await;
    let node = bed.node().await;
    wait_for_mounts(&bed, 7);
    bed.unmount();
    let mounts = bed.ask_mounts(&node).await;
    bed.mount(&mounts);
    bed.remove(&node).await;
    let left = fs::read_dir(bed.path().join("root/layers")).unwrap();
    assert_eq!(left.count(), 0);
    bed.read_all_here().await;
    node.close().await;
    bed.servers().into_iter().for_each(sys::kill_by_id);
    bed.wait_for_servers(0);
    bed.read_all_here().await;
}
