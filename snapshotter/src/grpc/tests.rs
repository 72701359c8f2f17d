//! The service, spoken to in messages, with a fake source of lazy layers.

mod clients;
mod subject;

use lazarette_fetcher::types::Digest;
use lazarette_proto::snapshots::PrepareSnapshotRequest;
use tonic::Code;

use self::subject::{Remote, own};
use crate::metastore::{Kind, Labels, Relabel};
use crate::overlay::contract::{self, Refusal, Seen, Subject as _};
use crate::remote::{REF, REMOTE};

#[test]
fn the_service_keeps_the_contract() {
    contract::all(|check| check(&Remote::new()));
}

#[test]
fn the_service_keeps_the_contract_over_a_socket_and_the_database() {
    contract::all(|check| check(&Remote::over_socket()));
}

/// Labels of a layer as containerd's CRI plugin gives them.
fn of_layer(target: &Digest, blob_digest: &Digest) -> Labels {
    let pairs = [
        (REF, target.to_string()),
        (
            "containerd.io/snapshot/cri.image-ref",
            own("reg.example/app:1"),
        ),
        (
            "containerd.io/snapshot/cri.layer-digest",
            blob_digest.to_string(),
        ),
    ];
    pairs
        .into_iter()
        .map(|(key, value)| (own(key), value))
        .collect()
}

/// What containerd's metadata asks for after `AlreadyExists`.
fn brought(remote: &Remote, target: &Digest, parent: &str) -> Vec<Seen> {
    let filter = format!("labels.{REF:?}=={target},parent=={parent:?}");
    remote.list(&[&filter]).unwrap()
}

#[test]
fn a_layer_that_can_be_brought_exists_already() {
    let remote = Remote::new();
    let [base, top, blob] = [b"base", b"tops", b"blob"].map(|text| Digest::sha256(text));
    remote.layers.available.lock().insert(blob);
    let labels = of_layer(&base, &blob);
    let prepare = |key: &str, parent: &str, labels: &Labels| remote.prepare(key, parent, labels);
    assert_eq!(
        prepare("extract-1", "", &labels),
        Err(Refusal::AlreadyExists)
    );
    let [lower] = &brought(&remote, &base, "")[..] else {
        panic!("one is expected")
    };
    assert_eq!(lower.kind, Kind::Committed);
    assert_eq!(
        lower.labels.get(REMOTE).map(String::as_str),
        Some("remote snapshot")
    );
    assert_eq!(remote.usage(&lower.name).unwrap().bytes, 4096);
    // Again, and by somebody who does not name the image.
    assert_eq!(
        prepare("extract-2", "", &labels),
        Err(Refusal::AlreadyExists)
    );
    let bare = Labels::from([(own(REF), base.to_string())]);
    assert_eq!(prepare("extract-3", "", &bare), Err(Refusal::AlreadyExists));
    // Also where another namespace took off what containerd looks for it by.
    let bare_of_all = Relabel::All(Labels::new());
    remote.relabel(&lower.name, &bare_of_all).unwrap();
    assert!(brought(&remote, &base, "").is_empty());
    let again = prepare("extract-2", "", &labels);
    assert_eq!(again, Err(Refusal::AlreadyExists));
    assert_eq!(brought(&remote, &base, "").len(), 1);
    // The next layer's blob is nowhere to be had: containerd unpacks it.
    let labels = of_layer(&top, &Digest::sha256(b"elsewhere"));
    let mounts = prepare("extract-4", &lower.name, &labels).unwrap();
    let place = remote.layers.root.path().join(blob.hex());
    let place = format!("lowerdir={}", place.display());
    assert!(mounts[0].options.contains(&place), "{mounts:?}");
    remote.commit("ns/4/top", "extract-4", "", &bare).unwrap();
    assert!(brought(&remote, &top, &lower.name).is_empty());
    // It goes with the last snapshot that names it.
    remote.remove("ns/4/top").unwrap();
    assert_eq!(remote.layers.mounted.lock().len(), 1);
    remote.remove(&lower.name).unwrap();
    assert!(remote.layers.mounted.lock().is_empty());
    assert!(remote.list(&[]).unwrap().is_empty());
}

#[test]
fn a_snapshot_that_cannot_be_mounted_is_taken_back() {
    let remote = Remote::new();
    let [target, blob] = [b"target", b"a blob"].map(|text| Digest::sha256(text));
    remote.layers.available.lock().insert(blob);
    remote
        .prepare("extract", "", &of_layer(&target, &blob))
        .unwrap_err();
    let base = brought(&remote, &target, "").remove(0).name;
    // As after a restart without a registry.
    remote.layers.mounted.lock().clear();
    let request = PrepareSnapshotRequest {
        key: own("container"),
        parent: base,
        ..Default::default()
    };
    let status = remote
        .runtime
        .block_on(remote.client.prepare(request))
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(remote.stat("container"), Err(Refusal::NotFound));
}
