//! What is declared agrees with the definition files.

#![expect(
    clippy::unwrap_used,
    reason = "a definition that does not parse fails the test"
)]

use std::collections::BTreeMap;

use lazarette_proto::images::{self, AuthConfig, ImageSpec, PullImageRequest};
use lazarette_proto::snapshots::{self, SnapshotsServer};
use lazarette_proto::types::{Empty, FieldMask, Mount, Timestamp};
use lazarette_proto::{Declared, Secret};
use prost::Message;

const SNAPSHOTS: &str = include_str!("../proto/services/snapshots/v1/snapshots.proto");
const IMAGES: &str = include_str!("../proto/runtime/v1/images.proto");
const MOUNT: &str = include_str!("../proto/types/mount.proto");

/// Name, number and type of each field of each message.
type Messages = BTreeMap<String, Vec<(String, u32, String)>>;

/// Reads messages out of a definition file: as much of the language as those here use.
fn messages(text: &str) -> Messages {
    let mut found = Messages::new();
    let mut inside: Option<String> = None;
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("message ") {
            let (name, rest) = rest.split_once(' ').unwrap();
            found.insert(name.to_owned(), Vec::new());
            inside = (!rest.contains('}')).then(|| name.to_owned());
        } else if line == "}" {
            inside = None;
        } else if let (Some(name), Some((left, number))) = (&inside, line.split_once(" = ")) {
            let (ty, field) = left.rsplit_once(' ').unwrap();
            let number = number.trim_end_matches(';').parse().unwrap();
            let fields = found.get_mut(name).unwrap();
            fields.push((field.to_owned(), number, ty.to_owned()));
        }
    }
    found
}

/// Compares one message, and takes it out of those that are left.
fn compare<M: Declared>(left: &mut Messages) {
    let defined = left
        .remove(M::NAME)
        .unwrap_or_else(|| panic!("{} is not defined", M::NAME));
    let defined: Vec<_> = defined
        .into_iter()
        .map(|(name, number, ty)| {
            let ty = ty
                .replace("containerd.types.", "")
                .replace("google.protobuf.", "");
            let ty = if ty == "Kind" { "enum".to_owned() } else { ty };
            (name, number, ty)
        })
        .collect();
    let declared: Vec<_> = M::FIELDS
        .iter()
        .map(|(name, number, ty)| {
            (
                name.trim_start_matches("r#").to_owned(),
                *number,
                (*ty).to_owned(),
            )
        })
        .collect();
    assert_eq!(declared, defined, "{}", M::NAME);
}

#[test]
fn messages_agree_with_their_definition() {
    let mut left = messages(SNAPSHOTS);
    macro_rules! all {
        ($($name:ident)*) => { $( compare::<snapshots::$name>(&mut left); )* };
    }
    all! {
        PrepareSnapshotRequest PrepareSnapshotResponse ViewSnapshotRequest ViewSnapshotResponse
        MountsRequest MountsResponse RemoveSnapshotRequest CommitSnapshotRequest
        StatSnapshotRequest Info StatSnapshotResponse UpdateSnapshotRequest
        UpdateSnapshotResponse ListSnapshotsRequest ListSnapshotsResponse UsageRequest
        UsageResponse CleanupRequest
    }
    assert!(left.is_empty(), "not declared: {left:?}");
    compare::<Mount>(&mut messages(MOUNT));
    let mut left = messages(IMAGES);
    compare::<ImageSpec>(&mut left);
    compare::<AuthConfig>(&mut left);
    compare::<PullImageRequest>(&mut left);
    assert!(left.is_empty(), "not declared: {left:?}");
}

#[test]
fn paths_of_the_image_service_agree_with_its_definition() {
    let package = IMAGES
        .lines()
        .find_map(|line| line.strip_prefix("package "));
    let service = IMAGES
        .lines()
        .find_map(|line| line.strip_prefix("service "));
    let named = |text: Option<&str>| text.unwrap().trim_end_matches([';', '{', ' ']).to_owned();
    let service = format!("/{}.{}/", named(package), named(service));
    assert_eq!(images::SERVICE, service);
    assert_eq!(images::PULL_IMAGE, format!("{service}PullImage"));
    assert!(IMAGES.contains("rpc PullImage(PullImageRequest)"));
}

#[test]
fn secrets_travel_and_are_not_printed() {
    let request = PullImageRequest {
        image: Some(ImageSpec {
            image: "i".to_owned(),
        }),
        auth: Some(AuthConfig {
            username: Secret("u".to_owned()),
            registry_token: Secret("hidden".to_owned()),
            ..Default::default()
        }),
    };
    let bytes = b"\x0a\x03\x0a\x01i\x12\x0b\x0a\x01u\x32\x06hidden";
    assert_eq!(request.encode_to_vec(), bytes);
    assert_eq!(PullImageRequest::decode(&bytes[..]).unwrap(), request);
    let text = format!("{request:?}");
    assert!(text.contains("..") && !text.contains("hidden"), "{text}");
}

#[test]
fn methods_agree_with_their_definition() {
    let defined = SNAPSHOTS.lines().filter_map(|line| {
        let rest = line.trim().strip_prefix("rpc ")?;
        Some(rest.split_once('(')?.0)
    });
    assert_eq!(SnapshotsServer::<()>::METHODS, defined.collect::<Vec<_>>());
}

#[test]
fn kinds_agree_with_their_definition() {
    use snapshots::kind;
    let table = [
        ("UNKNOWN", kind::UNKNOWN),
        ("VIEW", kind::VIEW),
        ("ACTIVE", kind::ACTIVE),
        ("COMMITTED", kind::COMMITTED),
    ];
    for (name, number) in table {
        assert!(
            SNAPSHOTS.contains(&format!("  {name} = {number};")),
            "{name}"
        );
    }
}

#[test]
fn messages_look_like_protobuf_on_the_wire() {
    let commit = snapshots::CommitSnapshotRequest {
        snapshotter: "s".to_owned(),
        name: "n".to_owned(),
        labels: [("k".to_owned(), "v".to_owned())].into(),
        parent: "p".to_owned(),
        ..Default::default()
    };
    let bytes = b"\x0a\x01s\x12\x01n\x22\x06\x0a\x01k\x12\x01v\x2a\x01p";
    assert_eq!(commit.encode_to_vec(), bytes);
    assert_eq!(
        snapshots::CommitSnapshotRequest::decode(&bytes[..]).unwrap(),
        commit
    );
    let info = snapshots::Info {
        kind: snapshots::kind::COMMITTED,
        created_at: Some(Timestamp {
            seconds: 300,
            nanos: -1,
        }),
        ..Default::default()
    };
    let bytes = info.encode_to_vec();
    assert_eq!(bytes[..6], *b"\x18\x03\x22\x0e\x08\xac");
    assert_eq!(snapshots::Info::decode(&bytes[..]).unwrap(), info);
    let mask = FieldMask {
        paths: vec!["labels.a".to_owned(), "labels".to_owned()],
    };
    assert_eq!(mask.encode_to_vec(), b"\x0a\x08labels.a\x0a\x06labels");
    // A field of a later version is skipped, and an empty message is no bytes.
    assert_eq!(Empty::decode(&b"\x7a\x02hi"[..]).unwrap(), Empty {});
    assert!(Empty {}.encode_to_vec().is_empty());
}

#[test]
fn malformed_messages_are_errors() {
    for bytes in [
        &b"\x0a\x05ab"[..],
        b"\x0a\x02\xff\xff",
        b"\x22\x7f",
        b"\x18",
        b"\x08\x01\x0a",
    ] {
        assert!(snapshots::Info::decode(bytes).is_err(), "{bytes:?}");
    }
    proptest::proptest!(|(bytes: Vec<u8>)| {
        let _ = snapshots::Info::decode(&bytes[..]);
        let _ = snapshots::ListSnapshotsResponse::decode(&bytes[..]);
        let _ = PullImageRequest::decode(&bytes[..]);
    });
}
