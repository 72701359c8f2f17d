//! What is told of a layer is what du(1) finds.

use std::process::Command;

use super::*;
use crate::test_util::layers::{chunk_bytes, layer_of, put_chunk};

/// Bytes and inodes by du.
fn du(dir: &std::path::Path) -> Taken {
    let number = |options: &[&str]| {
        let output = Command::new("du").args(options).arg(dir).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split('\t').next().unwrap().parse::<u64>().unwrap()
    };
    Taken {
        bytes: number(&["-s", "--block-size=1"]),
        inodes: number(&["-s", "--inodes"]),
    }
}

#[test]
fn a_layer_takes_what_du_counts() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let payloads: Vec<_> = (0..8).map(chunk_bytes).collect();
    let index = layer_of("layer", &payloads);
    let digest = index.blob_digest;
    assert_eq!(store.taken(&digest).unwrap(), Taken::default());
    let file = store.create_layer(index).unwrap();
    let dir = store.layer_dir(&digest);
    let empty = store.taken(&digest).unwrap();
    assert_eq!(empty, du(&dir));
    for chunk in 0..8 {
        put_chunk(&file, chunk).unwrap();
    }
    file.flush().unwrap();
    let filled = store.taken(&digest).unwrap();
    assert_eq!(filled, du(&dir));
    assert!(
        filled.bytes > empty.bytes && filled.inodes >= 4,
        "{filled:?}"
    );
    store.remove_layer(&digest).unwrap();
    assert_eq!(store.taken(&digest).unwrap(), Taken::default());
}
