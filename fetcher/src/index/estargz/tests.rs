//! Blobs of the reference writer, and every lie a TOC can tell.

use std::io::Write as _;

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};

use super::*;
use crate::index::{Encoding, FileEntry, FileKind, Timestamp};
use crate::test_util::content::noise;
use crate::types::Reference;

/// Made by the reference writer: 1024-byte chunks, one file prioritised.
const PLAIN: &[u8] = include_bytes!("../../../tests/fixtures/estargz/plain.esgz");
const PLAIN_TOC: &str = "sha256:35ca35b45d961cf651d513be99a20f0b34ecd80fad1f2e793bc85a3b794bd503";
/// The same files with several chunks per gzip member.
const PACKED: &[u8] = include_bytes!("../../../tests/fixtures/estargz/packed.esgz");
const PACKED_TOC: &str = "sha256:fc8d50758b11a3318af08518446ade450f20a4438fc5daae1db5487734bec0db";

fn blob_ref(bytes: &[u8]) -> BlobRef {
    BlobRef {
        repository: Reference::parse("example.com/a/b:latest")
            .unwrap()
            .repository()
            .clone(),
        digest: Digest::sha256(bytes),
        size: bytes.len() as u64,
    }
}

fn open(bytes: &[u8], toc_digest: &str) -> Result<TocLayer> {
    let footer = read_footer(bytes, bytes.len() as u64)?.expect("it has a footer");
    let start = usize::try_from(footer.toc_offset()).unwrap();
    let digest = Digest::parse(toc_digest).unwrap();
    parse_toc(&blob_ref(bytes), &footer, &bytes[start..], &digest)
}

/// Decodes every chunk from the blob and checks its digest; returns the data file.
fn data_file(bytes: &[u8], index: &LayerIndex) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(index.data_len).unwrap()];
    for chunk in &index.chunks {
        let Encoding::GzipMember { blob, skip } = chunk.encoding else {
            panic!("eStargz chunks are in gzip members");
        };
        let member =
            &bytes[usize::try_from(blob.start()).unwrap()..usize::try_from(blob.end()).unwrap()];
        let decoded = gzip::decode_member(member, skip, chunk.len).unwrap();
        let verified =
            codec::verify_chunk(|| "chunk".to_owned(), &chunk.chunk_digest.unwrap(), decoded)
                .unwrap();
        let at = usize::try_from(chunk.data_offset).unwrap();
        data[at..at + verified.len()].copy_from_slice(&verified);
    }
    data
}

fn find<'a>(index: &'a LayerIndex, path: &str) -> &'a FileEntry {
    index
        .files
        .iter()
        .find(|f| f.path == path.as_bytes())
        .unwrap_or_else(|| panic!("no {path}"))
}

/// What the fixtures' generator puts into `bin/big`.
fn pattern(len: usize) -> Vec<u8> {
    noise(1, 0x0f, len)
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn reads_what_the_reference_writer_makes() {
    for (bytes, toc_digest) in [(PLAIN, PLAIN_TOC), (PACKED, PACKED_TOC)] {
        let layer = open(bytes, toc_digest).unwrap();
        let index = &layer.index;
        let data = data_file(bytes, index);
        let content = |path: &str| match find(index, path).kind {
            FileKind::Regular { size, data_offset } => {
                let at = usize::try_from(data_offset).unwrap();
                &data[at..at + usize::try_from(size).unwrap()]
            }
            ref other => panic!("{path} is {other:?}"),
        };
        assert_eq!(content("bin/big"), pattern(3000));
        assert_eq!(content("bin/small"), b"small file\n");
        assert_eq!(content("bin/empty"), b"");
        assert_eq!(content("etc/a"), b"aaaa");
        assert_eq!(content("etc/b"), b"bbbbbbbb");
        assert_eq!(content("etc/.wh.gone"), b"");
        assert_eq!(content("etc/.wh..wh..opq"), b"");
        assert_eq!(index.files.len(), 14, "landmarks are hidden");
        let big = find(index, "bin/big");
        assert_eq!((big.mode, big.uid, big.gid), (0o4755, 10, 20));
        assert_eq!(
            big.mtime,
            Timestamp {
                secs: 1_700_000_000,
                nanos: 0
            }
        );
        let mut xattrs = big.xattrs.clone();
        xattrs.sort();
        assert_eq!(
            xattrs,
            [
                (
                    b"security.capability".to_vec(),
                    b"\x01\0\0\x02\0\x20\0\0".to_vec()
                ),
                (b"user.note".to_vec(), b"hello".to_vec()),
            ]
        );
        assert_eq!(find(index, "bin").kind, FileKind::Directory);
        assert_eq!(
            find(index, "bin/sh").kind,
            FileKind::Symlink {
                target: b"../bin/big".to_vec()
            }
        );
        assert_eq!(
            find(index, "bin/hard").kind,
            FileKind::Hardlink {
                target: b"bin/big".to_vec()
            }
        );
        assert_eq!(
            find(index, "dev/null").kind,
            FileKind::CharDevice { major: 1, minor: 3 }
        );
        assert_eq!(
            find(index, "dev/sda").kind,
            FileKind::BlockDevice { major: 8, minor: 0 }
        );
        assert_eq!(find(index, "dev/pipe").kind, FileKind::Fifo);
    }
    assert_eq!(
        open(PLAIN, PLAIN_TOC).unwrap().prefetch,
        ByteRange::new(0, 223)
    );
    assert_eq!(open(PACKED, PACKED_TOC).unwrap().prefetch, None);
    let packed = open(PACKED, PACKED_TOC).unwrap().index;
    assert!(
        packed
            .chunks
            .iter()
            .any(|c| matches!(c.encoding, Encoding::GzipMember { skip, .. } if skip > 0))
    );
}

#[test]
fn a_toc_with_another_digest_is_corrupt() {
    let error = open(PLAIN, PACKED_TOC).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }));
    assert!(
        error.to_string().contains("TOC of layer sha256:"),
        "{error}"
    );
}

#[test]
fn damaged_toc_bytes_are_errors() {
    let footer = read_footer(PLAIN, PLAIN.len() as u64).unwrap().unwrap();
    let start = usize::try_from(footer.toc_offset()).unwrap();
    let digest = Digest::parse(PLAIN_TOC).unwrap();
    let blob = blob_ref(PLAIN);
    let toc = &PLAIN[start..];
    for cut in [0, 1, 20, 200, toc.len() - 52] {
        let error = parse_toc(&blob, &footer, &toc[..cut], &digest)
            .unwrap_err()
            .to_string();
        assert!(error.contains("bytes are there"), "{error}");
    }
    let good = parse_toc(&blob, &footer, toc, &digest).unwrap();
    let mut refused = 0;
    for at in (0..toc.len() - 51).step_by(7) {
        let mut bad = toc.to_vec();
        bad[at] ^= 0x10;
        // Where damage hits what says nothing (a time stamp, padding), nothing changes.
        match parse_toc(&blob, &footer, &bad, &digest) {
            Err(_) => refused += 1,
            Ok(layer) => assert_eq!(layer, good, "{at}"),
        }
    }
    assert!(refused > 100, "{refused}");
}

const OFFSET: u64 = 1000;

/// A blob of nothing but a TOC and a footer, after `OFFSET` bytes that nobody reads.
fn blob_of(json: &[u8], name: &str) -> Vec<u8> {
    let mut header = [0_u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000444");
    header[124..135].copy_from_slice(format!("{:011o}", json.len()).as_bytes());
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let mut encoder = GzEncoder::new(
        vec![0; usize::try_from(OFFSET).unwrap()],
        Compression::fast(),
    );
    encoder.write_all(&header).unwrap();
    encoder.write_all(json).unwrap();
    let mut blob = encoder.finish().unwrap();
    blob.extend_from_slice(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0]);
    blob.extend_from_slice(format!("SG\x16\0{OFFSET:016x}STARGZ").as_bytes());
    blob.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    blob
}

fn parse_json(json: &[u8]) -> Result<TocLayer> {
    open(&blob_of(json, TOC_NAME), &Digest::sha256(json).to_string())
}

fn parse_entries(entries: Value) -> Result<TocLayer> {
    parse_json(
        json!({"version": 1, "entries": entries})
            .to_string()
            .as_bytes(),
    )
}

/// An entry with what `extra` adds or replaces.
fn entry(name: &str, kind: &str, extra: Value) -> Value {
    let mut value =
        json!({"name": name, "type": kind, "modtime": "2023-11-14T22:13:20Z", "mode": 420});
    let fields = value.as_object_mut().unwrap();
    fields.extend(extra.as_object().unwrap().clone());
    value
}

fn digest() -> String {
    Digest::sha256(b"x").to_string()
}

fn reg(name: &str, size: u64, extra: Value) -> Value {
    let mut value = entry(
        name,
        "reg",
        json!({"size": size, "offset": 10, "chunkDigest": digest()}),
    );
    value
        .as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    value
}

fn chunk(name: &str, at: u64, extra: Value) -> Value {
    let mut value = json!({"name": name, "type": "chunk", "offset": 20, "chunkOffset": at, "chunkDigest": digest()});
    value
        .as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    value
}

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
        (
            json!([reg("/etc/passwd", 1, none())]),
            "\"/etc/passwd\": its name is absolute",
        ),
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
    assert!(matches!(error, Error::Limit { .. }), "{error}");
    assert!(
        error.to_string().contains("more than 2000000 entries"),
        "{error}"
    );
}

#[test]
fn a_toc_over_the_limit_is_refused_unread() {
    let mut header = [0_u8; 512];
    let blob = blob_of(b"{}", TOC_NAME);
    let footer = read_footer(&blob, blob.len() as u64).unwrap().unwrap();
    let start = usize::try_from(OFFSET).unwrap();
    header.copy_from_slice(&gzip::decode_member(&blob[start..], 0, 512).unwrap());
    header[124..135].copy_from_slice(b"77777777777");
    let sum: u32 = header
        .iter()
        .enumerate()
        .map(|(at, b)| {
            if (148..156).contains(&at) {
                32
            } else {
                u32::from(*b)
            }
        })
        .sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
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
