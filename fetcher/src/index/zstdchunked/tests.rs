//! Blobs of both tools, and every lie that annotations, footers and TOCs can tell.

use std::collections::BTreeMap;
use std::io::Read as _;

use serde_json::{Value, json};

use super::*;
use crate::codec::pieces::Pieces;
use crate::index::tar::{Parser, Step};
use crate::index::{Encoding, FileKind, LayerIndex};
use crate::types::{Descriptor, MediaType, Reference};

/// Made by the tools themselves from one tar; see the recipe beside them.
const TAR: &[u8] = include_bytes!("../../../tests/fixtures/zstdchunked/layer.tar.gz");
const STORAGE: &[u8] = include_bytes!("../../../tests/fixtures/zstdchunked/storage.zst");
const STORAGE_NOTES: &str = include_str!("../../../tests/fixtures/zstdchunked/storage.zst.json");
const STARGZ: &[u8] = include_bytes!("../../../tests/fixtures/zstdchunked/stargz.zst");
const STARGZ_NOTES: &str = include_str!("../../../tests/fixtures/zstdchunked/stargz.zst.json");

const STORAGE_PREFIX: &str = "io.github.containers.zstd-chunked.manifest-";
const STARGZ_PREFIX: &str = "io.containers.zstd-chunked.manifest-";
const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

fn descriptor(bytes: &[u8], notes: &str) -> Descriptor {
    let mut d = Descriptor::new(
        MediaType::OciLayerZstd,
        Digest::sha256(bytes),
        bytes.len() as u64,
    );
    d.annotations = serde_json::from_str(notes).unwrap();
    d
}

fn blob_ref(bytes: &[u8]) -> BlobRef {
    let reference = Reference::parse("example.com/a/b:latest").unwrap();
    BlobRef {
        repository: reference.repository().clone(),
        digest: Digest::sha256(bytes),
        size: bytes.len() as u64,
    }
}

fn at(bytes: &[u8], range: ByteRange) -> &[u8] {
    let place = |at| usize::try_from(at).unwrap();
    &bytes[place(range.start())..place(range.end())]
}

fn open(bytes: &[u8], notes: &str) -> TocLayer {
    let promise = promise(&descriptor(bytes, notes)).unwrap().unwrap();
    let toc = at(bytes, promise.position.blob);
    parse_toc(&blob_ref(bytes), &promise.position, toc, &promise.proof).unwrap()
}

/// Path and content of every regular file, each chunk decoded alone and verified.
fn contents(bytes: &[u8], index: &LayerIndex) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut data = vec![0; usize::try_from(index.data_len).unwrap()];
    for chunk in &index.chunks {
        let Encoding::ZstdFrame { blob, skip } = chunk.encoding else {
            panic!("its chunks are in zstd frames");
        };
        let mut pieces = Pieces::zstd(at(bytes, blob)).unwrap();
        let decoded = pieces.take(skip, chunk.len).unwrap();
        let verified =
            codec::verify_chunk(String::new, &chunk.chunk_digest.unwrap(), decoded).unwrap();
        let to = usize::try_from(chunk.data_offset).unwrap();
        data[to..to + verified.len()].copy_from_slice(&verified);
    }
    let regular = index.files.iter().filter_map(|file| match file.kind {
        FileKind::Regular { size, data_offset } => {
            let place = ByteRange::at(data_offset, size).unwrap();
            Some((file.path.clone(), at(&data, place).to_vec()))
        }
        _ => None,
    });
    regular.collect()
}

/// What the tar itself says.
fn expected() -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut tar = Vec::new();
    flate2::read::GzDecoder::new(TAR)
        .read_to_end(&mut tar)
        .unwrap();
    let mut parser = Parser::new("tar".to_owned());
    let (mut found, mut current) = (BTreeMap::new(), None);
    let mut input = &tar[..];
    loop {
        match parser.step(&mut input).unwrap() {
            Step::NeedInput => break,
            Step::Entry(entry) => {
                current = matches!(entry.kind, FileKind::Regular { .. })
                    .then(|| found.entry(entry.path.clone()).or_insert_with(Vec::new))
                    .map(|_| entry.path);
            }
            Step::Data(data) => {
                let path = current.as_ref().expect("data has a file");
                found.get_mut(path).unwrap().extend_from_slice(data);
            }
            Step::EndOfFile => {}
        }
    }
    found
}

#[test]
fn reads_what_both_tools_write() {
    let expected = expected();
    assert_eq!(expected.len(), 6);
    for (bytes, notes) in [(STORAGE, STORAGE_NOTES), (STARGZ, STARGZ_NOTES)] {
        let layer = open(bytes, notes);
        assert_eq!(contents(bytes, &layer.index), expected);
        assert_eq!(layer.index.format, LayerFormat::ZstdChunked);
        let find = |path: &[u8]| layer.index.files.iter().find(|f| f.path == path).unwrap();
        assert_eq!(
            find(b"bin/hard").kind,
            FileKind::Hardlink {
                target: b"bin/big".to_vec()
            }
        );
        assert_eq!(find(b"bin/big").mode, 0o4755);
        assert_eq!(
            find(b"bin/small").xattrs,
            [(b"user.note".to_vec(), b"hello".to_vec())]
        );
        assert_eq!(
            find(b"dev/null").kind,
            FileKind::CharDevice { major: 1, minor: 3 }
        );
    }
    let layer = open(STORAGE, STORAGE_NOTES);
    let longest = |c: &crate::index::Chunk| c.encoding.blob().map_or(0, |b| b.len());
    assert!(
        layer.index.chunks.iter().map(longest).max().unwrap() < 9500,
        "no chunk reaches beyond its file's last frame"
    );
}

#[test]
fn footers_lead_to_the_same_place_as_annotations() {
    for (bytes, notes) in [(STORAGE, STORAGE_NOTES), (STARGZ, STARGZ_NOTES)] {
        let promised = promise(&descriptor(bytes, notes)).unwrap().unwrap();
        let size = bytes.len() as u64;
        assert_eq!(read_footer(bytes, size).unwrap(), Some(promised.position));
        let tail = &bytes[bytes.len() - 64..];
        assert_eq!(read_footer(tail, size).unwrap(), Some(promised.position));
        assert_eq!(read_footer(&bytes[bytes.len() - 39..], size).unwrap(), None);
        assert_eq!(read_footer(&bytes[..bytes.len() - 1], size).unwrap(), None);
    }
}

#[test]
fn a_footer_of_the_one_serves_the_promise_of_the_other() {
    let position = read_footer(STORAGE, STORAGE.len() as u64).unwrap().unwrap();
    let toc = at(STORAGE, position.blob);
    let json = decode(toc, position.json_len).unwrap();
    let right = Proof::Json {
        json: Digest::sha256(&json),
        compressed: None,
    };
    let blob = blob_ref(STORAGE);
    assert!(parse_toc(&blob, &position, toc, &right).is_ok());
    let wrong = [
        Proof::Compressed(Digest::sha256(&json)),
        Proof::Json {
            json: Digest::sha256(toc),
            compressed: None,
        },
        Proof::Json {
            json: Digest::sha256(&json),
            compressed: Some(Digest::sha256(&json)),
        },
    ];
    for proof in wrong {
        let error = parse_toc(&blob, &position, toc, &proof).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    }
}

#[test]
fn lying_footers_are_refused() {
    let footer = |numbers: [u64; 4]| {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        [bytes, b"GnUlInUx".to_vec()].concat()
    };
    let table: [([u64; 4], &str); 8] = [
        ([100, 10, 10, 2], "type 2"),
        ([0, 10, 10, 1], "puts a TOC"),
        ([100, 0, 10, 1], "puts a TOC"),
        ([951, 10, 10, 1], "puts a TOC"),
        ([u64::MAX, 10, 10, 1], "puts a TOC"),
        ([u64::MAX, u64::MAX, 10, 1], "exceeds the limit"),
        ([100, (150 << 20) + 1, 10, 1], "exceeds the limit"),
        ([100, 10, (150 << 20) + 1, 1], "exceeds the limit"),
    ];
    for (numbers, says) in table {
        let error = read_footer(&footer(numbers), 1000).unwrap_err().to_string();
        assert!(error.contains(says), "{numbers:?}: {error}");
    }
    assert!(
        read_footer(&footer([950, 10, 10, 1]), 1000)
            .unwrap()
            .is_some()
    );
    assert_eq!(read_footer(&footer([100, 10, 10, 1]), 39).unwrap(), None);
}

#[test]
fn nonsense_in_annotations_is_refused() {
    let digest = Digest::sha256(b"x").to_string();
    let read = |notes: Value| {
        let notes = notes.to_string();
        promise(&descriptor(&[0; 1000], &notes)).map_err(|e| e.to_string())
    };
    for text in [
        "",
        "1:2:3",
        "1:2:3:1:5",
        "+9:2:3:1",
        "9:-2:3:1",
        "9:2:3:",
        "9:2:3:x",
    ] {
        let notes = json!({ format!("{STORAGE_PREFIX}position"): text });
        let error = read(notes).unwrap_err();
        assert!(error.contains("four numbers"), "{text:?}: {error}");
    }
    let position = format!("{STARGZ_PREFIX}position");
    let outside = read(json!({ &position: "900:200:3:1" })).unwrap_err();
    assert!(
        outside.contains("puts a TOC of 200 bytes at 900"),
        "{outside}"
    );
    let typed = read(json!({ &position: "900:20:3:7" })).unwrap_err();
    assert!(typed.contains("type 7"), "{typed}");
    let bad = read(json!({ format!("{STORAGE_PREFIX}checksum"): "sha256:00" })).unwrap_err();
    assert!(bad.contains("is malformed"), "{bad}");
    assert_eq!(read(json!({})).unwrap(), None);
    assert_eq!(read(json!({ TOC_DIGEST: digest })).unwrap(), None);
    let alone = json!({ format!("{STORAGE_PREFIX}checksum"): digest });
    assert_eq!(read(alone).unwrap(), None, "a digest without a place");
    let alone = json!({ &position: "900:20:3:1" });
    assert_eq!(read(alone).unwrap(), None, "a place without a digest");
}

#[test]
fn where_the_first_part_ends_is_a_hint_that_may_be_nonsense() {
    let digest = Digest::sha256(b"x").to_string();
    let table = [
        ("892", Some(892)),
        ("1", Some(1)),
        ("893", None),
        ("0", None),
        ("", None),
        ("+9", None),
        ("-9", None),
        ("9.5", None),
        ("99999999999999999999999", None),
        ("all", None),
    ];
    for (text, end) in table {
        let notes = json!({
            format!("{STORAGE_PREFIX}checksum"): digest,
            format!("{STORAGE_PREFIX}position"): "892:20:3:1",
            PREFETCH_END_ANNOTATION: text,
        });
        let found = promise(&descriptor(&[0; 1000], &notes.to_string()));
        let prefetch = found.unwrap().unwrap().prefetch;
        let expected = end.map(|end| ByteRange::new(0, end).unwrap());
        assert_eq!(prefetch, expected, "{text:?}");
    }
    let other = json!({ PREFETCH_END_ANNOTATION: "9" }).to_string();
    assert_eq!(promise(&descriptor(&[0; 1000], &other)).unwrap(), None);
}

#[test]
fn promises_of_both_tools_are_refused() {
    let digest = Digest::sha256(b"x").to_string();
    let storage = format!("{STORAGE_PREFIX}checksum");
    let stargz = format!("{STARGZ_PREFIX}checksum");
    for notes in [
        json!({ &storage: digest, TOC_DIGEST: digest }),
        json!({ &storage: digest, &stargz: digest }),
        json!({ &storage: digest, &stargz: digest, TOC_DIGEST: digest }),
        json!({ format!("{STORAGE_PREFIX}position"): "9:2:3:1", TOC_DIGEST: digest }),
    ] {
        let error = promise(&descriptor(&[0; 1000], &notes.to_string())).unwrap_err();
        assert!(
            matches!(error, Error::Unsupported { .. }),
            "{notes}: {error}"
        );
    }
}

#[test]
fn the_first_spelling_of_containers_storage_is_understood() {
    let notes = STORAGE_NOTES.replace("io.github.containers.", "io.containers.");
    let layer = open(STORAGE, &notes);
    assert_eq!(layer, open(STORAGE, STORAGE_NOTES));
}

/// Opens a TOC of `entries` in a blob with room for them.
fn toc(entries: &Value) -> Result<TocLayer> {
    let json = json!({ "version": 1, "entries": entries }).to_string();
    let toc = zstd::encode_all(json.as_bytes(), 1).unwrap();
    let blob = BlobRef {
        size: 2008 + toc.len() as u64,
        ..blob_ref(b"")
    };
    let position = Position {
        blob: ByteRange::at(2008, toc.len() as u64).unwrap(),
        json_len: json.len() as u64,
    };
    parse_toc(
        &blob,
        &position,
        &toc,
        &Proof::Compressed(Digest::sha256(&toc)),
    )
}

#[test]
fn lying_entries_are_refused() {
    let digest = Digest::sha256(b"x").to_string();
    let file = |more: Value| {
        let mut entry = json!({ "type": "reg", "name": "a", "size": 10, "offset": 100 });
        let Value::Object(more) = more else { panic!() };
        entry.as_object_mut().unwrap().extend(more);
        json!([entry])
    };
    let table = [
        (file(json!({})), "no digest"),
        (
            file(json!({ "chunkSize": 5, "digest": digest })),
            "no chunkDigest",
        ),
        (file(json!({ "digest": "sha256:1" })), "its digest"),
        (
            file(json!({ "digest": digest, "offset": 2000 })),
            "not before the TOC",
        ),
        (
            file(json!({ "digest": digest, "endOffset": 2001 })),
            "not before the TOC",
        ),
        (
            file(json!({ "digest": digest, "endOffset": -1 })),
            "endOffset is -1",
        ),
        (
            file(json!({ "digest": digest, "chunkType": "ones" })),
            "chunkType",
        ),
        (
            file(json!({ "digest": digest, "size": 65 << 20 })),
            "of at most",
        ),
    ];
    for (entries, says) in table {
        let error = toc(&entries).unwrap_err().to_string();
        assert!(error.contains(says), "{entries}: {error}");
    }
    assert!(toc(&file(json!({ "digest": digest, "endOffset": 200 }))).is_ok());
}

#[test]
fn holes_need_no_digest_and_may_be_long() {
    let hole = |size: u64| {
        json!([{ "type": "reg", "name": "a", "size": size, "offset": 100, "endOffset": 150,
                 "chunkType": "zeros" }])
    };
    let len = (9 << 20) + 5;
    let index = toc(&hole(len)).unwrap().index;
    let lens: Vec<u32> = index.chunks.iter().map(|c| c.len).collect();
    assert_eq!(lens, [4 << 20, 4 << 20, (1 << 20) + 5]);
    for chunk in &index.chunks {
        let zeros = vec![0; chunk.len as usize];
        assert_eq!(
            chunk.chunk_digest.map(Digest::Sha256),
            Some(Digest::sha256(&zeros))
        );
        let blob = ByteRange::new(100, 150).unwrap();
        assert_eq!(chunk.encoding, Encoding::ZstdFrame { blob, skip: 0 });
    }
    let many: Vec<Value> = (0..300)
        .map(|n| {
            json!({ "type": "reg", "name": format!("f{n}"), "size": (4 << 20) - 1, "offset": 100,
                    "chunkType": "zeros" })
        })
        .collect();
    let error = toc(&Value::Array(many)).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

#[test]
fn a_toc_decodes_to_what_it_promises_or_not_at_all() {
    let promise = promise(&descriptor(STARGZ, STARGZ_NOTES)).unwrap().unwrap();
    let toc = at(STARGZ, promise.position.blob);
    let read = |json_len, toc: &[u8]| {
        let position = Position {
            json_len,
            ..promise.position
        };
        let compressed = Some(Digest::sha256(toc));
        let Proof::Json { json, .. } = promise.proof else {
            panic!("stargz promises the JSON");
        };
        parse_toc(
            &blob_ref(STARGZ),
            &position,
            toc,
            &Proof::Json { json, compressed },
        )
    };
    let len = promise.position.json_len;
    assert!(read(len, toc).is_ok());
    for (json_len, toc) in [
        (len - 1, toc),
        (len + 1, toc),
        (len, &toc[..toc.len() - 1]),
        (len, &b"GNUlInUx"[..]),
        (len, &b""[..]),
    ] {
        assert!(read(json_len, toc).is_err(), "{json_len} {}", toc.len());
    }
    let bomb = zstd::encode_all(&vec![b' '; 32 << 20][..], 1).unwrap();
    assert!(read(len, &bomb).is_err());
}
