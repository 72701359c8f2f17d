//! Every lie that a TOC can tell, and what only looks like one.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use super::support::{
    OFFSET, blob_of, blob_ref, chunk, entry, open, parse_entries, parse_json, reg,
};
use crate::Error;
use crate::index::estargz::{TOC_JSON_LEN_MAX, TOC_NAME, parse_toc, read_footer};
use crate::index::{Encoding, FileKind};
use crate::test_util::content::tar_header;
use crate::types::Digest;

#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn every_lie_has_its_error() {
    let none = || json!({});
    let long = "x".repeat(256);
    let deep = "ab/".repeat(1400);
    let big_value =
        base64::Engine::encode(&base64::engine::general_purpose::STANDARD, vec![0; 65537]);
    let table: Vec<(Value, &str)> = vec![
        // Names.
        (
            json!([reg("../etc/shadow", 1, none())]),
            "\"../etc/shadow\": its name has a '..' part",
        ),
        (json!([reg("a/../../b", 1, none())]), "'..' part"),
        (json!([reg("/../etc/shadow", 1, none())]), "'..' part"),
        (json!([reg("a\0b", 1, none())]), "NUL"),
        (json!([reg(&long, 1, none())]), "longer than 255 bytes"),
        (json!([reg(&deep, 1, none())]), "longer than 4095 bytes"),
        (
            json!([reg("./", 1, none())]),
            "the root of a layer can only be a directory",
        ),
        // Chunks.
        (
            json!([reg("a", 10, json!({"chunkSize": 6})), chunk("a", 4, none())]),
            "\"a\": its chunk at 4 overlaps what precedes it, which ends at 6",
        ),
        (
            json!([reg("a", 10, json!({"chunkSize": 6})), chunk("a", 8, none())]),
            "its chunk at 8 leaves a gap",
        ),
        (
            json!([reg("a", 10, json!({"chunkSize": 6}))]),
            "its chunks end at byte 6 of 10",
        ),
        (
            json!([
                reg("a", 10, json!({"chunkSize": 6})),
                entry("b", "dir", none())
            ]),
            "its chunks end at byte 6 of 10",
        ),
        (
            json!([reg("a", 10, json!({"chunkSize": 11}))]),
            "its chunk of 11 bytes at 0 exceeds its size of 10",
        ),
        (
            json!([
                reg("a", 10, json!({"chunkSize": 6})),
                chunk("a", 6, json!({"chunkSize": 5}))
            ]),
            "exceeds its size of 10",
        ),
        (
            json!([reg("a", 10, none()), chunk("a", 10, none())]),
            "its chunk of 0 bytes at 10 exceeds its size of 10",
        ),
        (
            json!([reg("a", 10, json!({"chunkOffset": 3}))]),
            "its chunk at 3 leaves a gap",
        ),
        (
            json!([chunk("a", 0, none())]),
            "\"a\": a chunk of it comes where its file does not precede",
        ),
        (
            json!([reg("a", 10, json!({"chunkSize": 6})), chunk("b", 6, none())]),
            "where its file does not precede",
        ),
        (
            json!([entry("a", "reg", json!({"size": 0})), chunk("a", 0, none())]),
            "where its file does not precede",
        ),
        (
            json!([reg("a", 10, json!({"chunkDigest": ""}))]),
            "has no chunkDigest, so it cannot be verified",
        ),
        (
            json!([reg("a", 10, json!({"chunkDigest": "sha256:zz"}))]),
            "its chunkDigest: invalid digest",
        ),
        (
            json!([reg(
                "a",
                10,
                json!({"chunkDigest": format!("sha512:{}", "0".repeat(128))})
            )]),
            "is not sha256; the layer must be pulled whole",
        ),
        (
            json!([reg("a", 10, json!({"offset": 1000}))]),
            "its offset 1000 is not before the TOC at 1000",
        ),
        (
            json!([reg("a", 10, json!({"offset": i64::MAX}))]),
            "is not before the TOC",
        ),
        (
            json!([entry(".prefetch.landmark", "reg", json!({"offset": 5000}))]),
            "its offset 5000 is not before the TOC",
        ),
        (
            json!([reg("a", 1 << 40, none())]),
            "a chunk of 1099511627776 bytes, of at most 67108864",
        ),
        (
            json!([reg("a", 10, json!({"innerOffset": 1_u64 << 40}))]),
            "bytes into its member",
        ),
        (
            json!([reg("a", i64::MAX as u64, json!({"chunkSize": 4}))]),
            "take the layer over 17592186044416",
        ),
        // Numbers.
        (
            json!([entry("a", "reg", json!({"size": -1}))]),
            "its size is -1",
        ),
        (
            json!([reg("a", 10, json!({"offset": -1}))]),
            "its offset is -1",
        ),
        (
            json!([reg("a", 10, json!({"innerOffset": -1}))]),
            "its innerOffset is -1",
        ),
        (
            json!([reg("a", 10, json!({"chunkSize": -1}))]),
            "its chunkSize is -1",
        ),
        (
            json!([reg("a", 10, json!({"chunkOffset": -5}))]),
            "its chunkOffset is -5",
        ),
        (
            json!([entry("a", "dir", json!({"uid": -1}))]),
            "its uid is -1",
        ),
        (
            json!([entry("a", "dir", json!({"gid": 4294967296_u64}))]),
            "its gid is 4294967296",
        ),
        (
            json!([entry("a", "dir", json!({"mode": -1}))]),
            "its mode is -1",
        ),
        (
            json!([entry("a", "char", json!({"devMajor": -1}))]),
            "its devMajor is -1",
        ),
        (
            json!([entry("a", "dir", json!({"uid": 1e30}))]),
            "its JSON: invalid type: floating point",
        ),
        (
            json!([entry("a", "dir", json!({"uid": "0"}))]),
            "its JSON: invalid type: string",
        ),
        (
            json!([entry("a", "dir", json!({"modtime": "yesterday"}))]),
            "its modtime \"yesterday\" is not RFC 3339",
        ),
        // Kinds and links.
        (json!([entry("a", "door", none())]), "its type is \"door\""),
        (json!([entry("a", "", none())]), "its type is \"\""),
        (
            json!([entry("a", "symlink", none())]),
            "its link target is empty",
        ),
        (
            json!([entry("a", "symlink", json!({"linkName": "x\0"}))]),
            "its link target contains a NUL byte",
        ),
        (
            json!([entry("a", "symlink", json!({"linkName": deep}))]),
            "its link target is longer than 4095 bytes",
        ),
        (
            json!([entry("a", "hardlink", json!({"linkName": "b"}))]),
            "\"a\": it is a hard link to \"b\", which is not in this layer",
        ),
        (
            json!([entry("a", "hardlink", json!({"linkName": "../b"}))]),
            "hard link target: its name has a '..' part",
        ),
        (
            json!([entry("a", "hardlink", json!({"linkName": "a"}))]),
            "it is a hard link to itself",
        ),
        (
            json!([
                entry("d", "dir", none()),
                entry("a", "hardlink", json!({"linkName": "d"}))
            ]),
            "it is a hard link to the directory \"d\"",
        ),
        (
            json!([
                entry("a", "hardlink", json!({"linkName": "b"})),
                entry("b", "hardlink", json!({"linkName": "a"}))
            ]),
            "or in a circle",
        ),
        // Xattrs.
        (
            json!([entry("a", "dir", json!({"xattrs": {"user.x": "%%%"}}))]),
            "its xattr \"user.x\" is not base64",
        ),
        (
            json!([entry("a", "dir", json!({"xattrs": {"": ""}}))]),
            "is not 1 to 255 bytes without NUL",
        ),
        (
            json!([entry("a", "dir", json!({"xattrs": {long.as_str(): ""}}))]),
            "is not 1 to 255 bytes without NUL",
        ),
        (
            json!([entry("a", "dir", json!({"xattrs": {"user.x": big_value}}))]),
            "its xattr \"user.x\" is longer than 65536 bytes",
        ),
        (
            json!([entry("a", "dir", json!({"xattrs": [1]}))]),
            "its JSON: invalid type: sequence",
        ),
        // The document.
        (json!("entries"), "its JSON: invalid type: string"),
        (json!([1]), "its JSON: invalid type: integer"),
    ];
    for (entries, text) in table {
        let shown = entries.to_string();
        let error = parse_entries(entries)
            .expect_err(&shown[..shown.len().min(300)])
            .to_string();
        assert!(error.contains(text), "{error:?} lacks {text:?}");
        assert!(
            error.contains("TOC of layer sha256:") || error.contains("index of layer sha256:"),
            "{error}"
        );
    }
}

#[test]
fn documents_that_are_no_toc() {
    for (json, text) in [
        (&b""[..], "EOF"),
        (b"[]", "expected a TOC"),
        (b"{}", "missing field `version`"),
        (br#"{"version":1}"#, "missing field `entries`"),
        (br#"{"version":2,"entries":[]}"#, "unknown version 2"),
        (
            br#"{"version":1,"entries":[],"entries":[]}"#,
            "duplicate field `entries`",
        ),
        (br#"{"version":1,"entries":[]} x"#, "trailing characters"),
        (
            br#"{"version":1,"entries":[{"name":"a","type":"dir","xattrs":{"u":"","u":""}}]}"#,
            "appears twice",
        ),
        (b"\xff\xfe", "expected value"),
    ] {
        let error = parse_json(json).unwrap_err().to_string();
        assert!(error.contains(text), "{error:?} lacks {text:?}");
    }
    let nested = [&b"{\"version\":1,\"x\":"[..], &b"[".repeat(100_000)].concat();
    assert!(parse_json(&nested).is_err());
    let json = br#"{"version":1,"entries":[]}"#;
    let error = open(
        &blob_of(json, "other.json"),
        &Digest::sha256(json).to_string(),
    )
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("\"other.json\" is where stargz.index.json should be"),
        "{error}"
    );
}

#[test]
fn what_looks_odd_but_is_right() {
    assert_eq!(
        parse_json(br#"{"version":1,"entries":null}"#)
            .unwrap()
            .index
            .files,
        []
    );
    let layer = parse_entries(json!([
        entry("./", "dir", json!({})),
        entry("./etc/", "dir", json!({"xattrs": null})),
        reg(
            "etc/a",
            10,
            json!({"chunkSize": 4, "unknown": [1, {"x": null}]})
        ),
        chunk("./etc/a", 4, json!({"chunkSize": 4})),
        chunk("etc/a", 8, json!({"offset": 30})),
        // Twice: the last counts, in the tree.
        reg("etc/a", 3, json!({"offset": 40, "innerOffset": 7})),
        entry("etc/a", "hardlink", json!({"linkName": "etc/a"})),
        entry("z", "hardlink", json!({"linkName": "y"})),
        entry("y", "hardlink", json!({"linkName": "./etc/a"})),
        entry("late", "reg", json!({})),
    ]))
    .unwrap();
    let index = layer.index;
    assert_eq!(index.files.len(), 7, "the link to itself is gone");
    assert_eq!(index.files[0].path, b"");
    assert_eq!(index.data_len, 4096 + 3);
    let places: Vec<_> = index
        .chunks
        .iter()
        .map(|c| (c.data_offset, c.len))
        .collect();
    assert_eq!(places, [(0, 4), (4, 4), (8, 2), (4096, 3)]);
    let members: Vec<_> = index
        .chunks
        .iter()
        .map(|c| match c.encoding {
            Encoding::GzipMember { blob, skip } => (blob.start(), blob.end(), skip),
            other => panic!("{other:?} in eStargz"),
        })
        .collect();
    assert_eq!(
        members,
        [(10, 20, 0), (20, 30, 0), (30, 40, 0), (40, 1000, 7)]
    );
}

/// `count` entries, made as text: a value tree of them would take a GiB.
fn many(count: u64) -> Vec<u8> {
    let mut json = br#"{"version":1,"entries":[{"name":"d","type":"dir"}"#.to_vec();
    for _ in 1..count {
        json.extend_from_slice(br#",{"type":"dir"}"#);
    }
    json.extend_from_slice(b"]}");
    json
}

#[test]
fn ten_million_entries_are_refused() {
    let json = many(10_000_000 - 1);
    assert!(json.len() as u64 <= TOC_JSON_LEN_MAX, "{}", json.len());
    let error = parse_json(&json).unwrap_err();
    // The stream of the layer is counted anew.
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(
        error.to_string().contains("more than 2000000 entries"),
        "{error}"
    );
}

#[test]
fn a_toc_over_the_limit_is_refused_unread() {
    let blob = blob_of(b"{}", TOC_NAME);
    let footer = read_footer(&blob, blob.len() as u64).unwrap().unwrap();
    let header = tar_header(TOC_NAME.as_bytes(), b'0', 0o77_777_777_777, |_| {});
    let mut encoder = GzEncoder::new(Vec::new(), Compression::none());
    encoder.write_all(&header).unwrap();
    let mut tail = encoder.finish().unwrap();
    tail.resize(
        usize::try_from(footer.toc_len()).unwrap().max(tail.len()),
        0,
    );
    let whole = u64::try_from(tail.len()).unwrap();
    let footer = read_footer(&blob, OFFSET + whole + 51).unwrap().unwrap();
    let error = parse_toc(&blob_ref(&blob), &footer, &tail, &Digest::sha256(b"")).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("8589934591 bytes of at most 157286400"),
        "{error}"
    );
}

/// Kaniko and containers/storage write what the tar says.
#[test]
fn names_may_be_spelt_as_in_the_tar() {
    let layer = parse_entries(json!([
        entry("/", "dir", json!({"mode": 0o750})),
        reg("/a", 10, json!({"chunkSize": 6})),
        chunk("/a", 6, json!({})),
        entry("/b", "hardlink", json!({"linkName": "/a"})),
        entry("/c", "symlink", json!({"linkName": "/a"})),
        reg("//.prefetch.landmark", 1, json!({})),
    ]))
    .unwrap();
    let files = &layer.index.files;
    let paths: Vec<_> = files.iter().map(|file| file.path.as_slice()).collect();
    assert_eq!(paths, [&b""[..], b"a", b"b", b"c"]);
    assert_eq!(files[0].mode, 0o750);
    let target = b"a".to_vec();
    assert_eq!(files[2].kind, FileKind::Hardlink { target });
    let target = b"/a".to_vec();
    assert_eq!(files[3].kind, FileKind::Symlink { target });
    assert_eq!(layer.index.chunks.len(), 2);
}
