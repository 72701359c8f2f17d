//! Layers that have files in directories which they do not list.

use std::process::Command;

use super::*;
use crate::support::push_layers;

/// A tar of nothing but a file: no directory is listed.
fn lone_file(path: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(path);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, b"lone").unwrap();
    let mut tar = Command::new("tar");
    let tar = tar.args(["--owner=0", "--group=0", "-cf", "-", "-C"]);
    let output = tar.arg(dir.path()).arg(path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// A tar of two directories, one of them everybody's.
fn base() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    for (name, mode) in [("tmp", 0o1777), ("etc", 0o755)] {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode))
            .unwrap();
    }
    let mut tar = Command::new("tar");
    let tar = tar.args(["--owner=0", "--group=0", "-cf", "-", "-C"]);
    let output = tar.arg(dir.path()).args(["tmp", "etc"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_directory_that_a_layer_does_not_list_is_left_to_containerd_if_it_differs() {
    if !is_root(
        "privileged_a_directory_that_a_layer_does_not_list_is_left_to_containerd_if_it_differs",
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let layers = [
        estargz(base()),
        estargz(lone_file("etc/new/file")),
        estargz(lone_file("tmp/file")),
    ];
    let image = push_layers(&registry, &layers, &Changes::default());
    let all = layers.each_ref().map(|layer| Digest::sha256(&layer.blob));
    let second = chain(&layers[0], &layers[1]);
    let third = Digest::sha256(format!("{second} {}", layers[2].diff_id).as_bytes());
    let wanted = |number: usize, chain_id| Wanted {
        image: &image,
        chain_id,
        blob: all[number],
        all: &all[number..],
    };
    let (mut node, _) = Node::open(dir.path()).await;
    let base = node.bring("", &wanted(0, layers[0].diff_id)).await;
    // A new directory, in one that looks as if it were made up.
    let middle = node.bring(&base, &wanted(1, second)).await;
    // What lies below is known to the next process, too, and nothing of the refused layer stays.
    for _ in 0..2 {
        let top = node
            .prepare("extract", &middle, Some(&wanted(2, third)))
            .await;
        assert!(!top.unwrap().is_empty(), "containerd unpacks it there");
        node.remove("extract").await;
        let stored = std::fs::read_dir(dir.path().join("root/layers")).unwrap();
        assert_eq!(stored.count(), 2);
        node.close().await;
        (node, _) = Node::open(dir.path()).await;
    }
    node.close().await;
}
