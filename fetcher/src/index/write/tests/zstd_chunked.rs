//! Tests of the zstd:chunked writer: what comes out is read back with nothing but unzstd
//! and JSON.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::*;
use crate::index::write::crc64::Crc64;
use crate::index::zstdchunked::PREFETCH_END_ANNOTATION;
use crate::types::ByteRange;

const STORAGE: &str = "io.github.containers.zstd-chunked.";
const STARGZ: &str = "io.containers.zstd-chunked.";

fn chunked(flavour: Flavour) -> Options {
    Options {
        chunk_bytes: 4096,
        workers: 2,
        ..Options::new(Format::ZstdChunked(flavour))
    }
}

fn unzstd(bytes: &[u8]) -> Vec<u8> {
    zstd::decode_all(bytes).unwrap()
}

/// The numbers of a position annotation.
fn position(written: &Written, key: &str) -> Vec<usize> {
    let text = &written.annotations[key];
    text.split(':').map(|n| n.parse().unwrap()).collect()
}

/// The TOC that the annotations of `prefix` point at, checked against footer and digests.
fn toc_of(blob: &[u8], written: &Written, prefix: &str) -> Value {
    let key = |name: &str| format!("{prefix}{name}");
    let at = position(written, &key("manifest-position"));
    let [offset, len, decoded, 1] = at[..] else {
        panic!("{at:?}")
    };
    let frame = &blob[offset..offset + len];
    let checksum = &written.annotations[key("manifest-checksum").as_str()];
    assert_eq!(*checksum, Digest::sha256(frame).to_string());
    let json = unzstd(frame);
    assert_eq!(json.len(), decoded);
    assert_eq!(json.len() as u64, written.toc_size);
    assert_eq!(written.toc_digest, Some(Digest::sha256(&json)));
    assert_eq!(blob[offset - 8..offset - 4], *b"\x50\x2a\x4d\x18");
    serde_json::from_slice(&json).unwrap()
}

fn footer(blob: &[u8], numbers: usize) -> Vec<u64> {
    let payload = &blob[blob.len() - numbers * 8 - 8..blob.len() - 8];
    let header = &blob[blob.len() - numbers * 8 - 16..][..8];
    assert_eq!(header[..4], *b"\x50\x2a\x4d\x18");
    assert_eq!(usize::from(header[4]), numbers * 8 + 8);
    payload
        .as_chunks::<8>()
        .0
        .iter()
        .map(|n| u64::from_le_bytes(*n))
        .collect()
}

/// Reads every file through its entries, each chunk from its own frame.
fn files(blob: &[u8], toc: &Value) -> HashMap<String, Vec<u8>> {
    let mut files: HashMap<String, Vec<u8>> = HashMap::new();
    let entries = toc["entries"].as_array().unwrap();
    let number = |entry: &Value, key: &str| entry[key].as_u64().unwrap_or(0);
    for (at, entry) in entries.iter().enumerate() {
        let kind = entry["type"].as_str().unwrap();
        if !["reg", "chunk"].contains(&kind) {
            continue;
        }
        let name = entry["name"].as_str().unwrap().to_owned();
        let file = files.entry(name).or_default();
        assert_eq!(number(entry, "chunkOffset"), file.len() as u64);
        let start = usize::try_from(number(entry, "offset")).unwrap();
        let len = match (number(entry, "chunkSize"), kind) {
            (0, _) => number(entry, "size"),
            (len, _) => len,
        };
        if len == 0 {
            continue;
        }
        let mut decoder = zstd::stream::read::Decoder::new(&blob[start..])
            .unwrap()
            .single_frame();
        let mut bytes = Vec::new();
        decoder.read_to_end(&mut bytes).unwrap();
        assert_eq!(
            bytes.len() as u64,
            len,
            "a chunk is not alone in its frame: {entry}"
        );
        let alone = entries
            .get(at + 1)
            .is_none_or(|next| next["type"] != "chunk")
            && kind == "reg";
        let digest = if alone {
            &entry["digest"]
        } else {
            &entry["chunkDigest"]
        };
        assert_eq!(*digest, Digest::sha256(&bytes).to_string());
        file.extend(bytes);
    }
    for entry in entries.iter().filter(|entry| entry["type"] == "reg") {
        let file = &files[entry["name"].as_str().unwrap()];
        if !file.is_empty() {
            assert_eq!(entry["digest"], Digest::sha256(file).to_string());
        }
    }
    files
}

fn sample() -> Vec<Item> {
    let big: Vec<u8> = (0..5000u32).flat_map(u32::to_le_bytes).collect();
    vec![
        dir("./"),
        file("./big", &big),
        file("./empty", b""),
        hard("./link", "./big"),
        item(b'2', "./sym", "../x", b""),
        file("small", b"small"),
    ]
}

/// The tar put together from the tar-split and the files, as podman does it.
fn assembled(
    blob: &[u8],
    written: &Written,
    toc: &Value,
    files: &HashMap<String, Vec<u8>>,
) -> Vec<u8> {
    let at = position(written, &format!("{STORAGE}tarsplit-position"));
    let [offset, len, decoded] = at[..] else {
        panic!("{at:?}")
    };
    let frame = &blob[offset..offset + len];
    assert_eq!(toc["tarSplitDigest"], Digest::sha256(frame).to_string());
    let lines = unzstd(frame);
    assert_eq!(lines.len(), decoded);
    let mut tar = Vec::new();
    let lines = lines
        .strip_suffix(b"\n")
        .unwrap()
        .split(|byte| *byte == b'\n');
    for (number, line) in lines.enumerate() {
        let line: Value = serde_json::from_slice(line).unwrap();
        assert_eq!(line["position"], number);
        let payload = line["payload"]
            .as_str()
            .map(|text| STANDARD.decode(text).unwrap());
        match line["type"].as_u64().unwrap() {
            2 => tar.extend(payload.unwrap()),
            1 if line["size"].is_null() => assert_eq!(payload, None),
            1 => {
                let file = &files[line["name"].as_str().unwrap()];
                assert_eq!(line["size"], file.len());
                let mut crc = Crc64::new();
                crc.update(file);
                assert_eq!(payload.unwrap(), crc.finish());
                tar.extend(file);
            }
            other => panic!("type {other}"),
        }
    }
    tar
}

#[test]
fn containers_storage_finds_everything_by_annotations() {
    let tar = tarball(&sample());
    let (blob, written) = convert(&tar, &chunked(Flavour::ContainersStorage)).unwrap();
    assert_eq!(written.blob_digest, Digest::sha256(&blob));
    assert!(
        unzstd(&blob) == tar,
        "the blob is the tar for everyone else"
    );
    assert_eq!(written.diff_id, Digest::sha256(&tar));
    let toc = toc_of(&blob, &written, STORAGE);
    let files = files(&blob, &toc);
    assert_eq!(files["small"], b"small");
    assert!(assembled(&blob, &written, &toc, &files) == tar);
    let at = position(&written, &format!("{STORAGE}manifest-position"));
    let split = position(&written, &format!("{STORAGE}tarsplit-position"));
    let numbers: Vec<u64> = at.iter().chain(&split).map(|n| *n as u64).collect();
    assert_eq!(footer(&blob, 7), numbers);
    assert!(blob.ends_with(b"GNUlInUx"));
    let toc_digest = "containerd.io/snapshot/stargz/toc.digest";
    assert!(
        !written.annotations.contains_key(toc_digest),
        "podman refuses both"
    );
}

#[test]
fn containers_storage_entries_are_spelt_as_the_headers_are() {
    let mut items = sample();
    items.insert(0, file("mode", b"m"));
    let mut tar = tarball(&items);
    // Type bits in the mode, as docker's old layers have them.
    tar[100..107].copy_from_slice(b"0100644");
    tar[148..156].fill(b' ');
    let sum: u64 = tar[..512].iter().map(|b| u64::from(*b)).sum();
    tar[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let (blob, written) = convert(&tar, &chunked(Flavour::ContainersStorage)).unwrap();
    let toc = toc_of(&blob, &written, STORAGE);
    let entries = toc["entries"].as_array().unwrap();
    let whole = entries.iter().filter(|entry| entry["type"] != "chunk");
    let names: Vec<&str> = whole.clone().map(|e| e["name"].as_str().unwrap()).collect();
    let expected = ["mode", "./", "./big", "./empty", "./link", "./sym", "small"];
    assert_eq!(names, expected);
    assert_eq!(entries[0]["mode"], 0o100_644);
    let by_name: HashMap<&str, &Value> = whole.map(|e| (e["name"].as_str().unwrap(), e)).collect();
    assert_eq!(by_name["./link"]["linkName"], "./big");
    assert!(by_name["./empty"]["digest"].is_null());
    // A file of one chunk has no chunk digest, and every file says where it ends.
    assert!(by_name["small"]["chunkDigest"].is_null());
    for name in ["small", "./big"] {
        let end = usize::try_from(by_name[name]["endOffset"].as_u64().unwrap()).unwrap();
        assert_eq!(
            blob[end..end + 4],
            *b"\x28\xb5\x2f\xfd",
            "a frame starts behind {name}"
        );
    }
}

#[test]
fn stargz_finds_everything_by_footer() {
    let (blob, written) = convert(&tarball(&sample()), &chunked(Flavour::Stargz)).unwrap();
    let toc = toc_of(&blob, &written, STARGZ);
    let at = position(&written, &format!("{STARGZ}manifest-position"));
    let numbers: Vec<u64> = at.iter().map(|n| *n as u64).collect();
    assert_eq!(footer(&blob, 4), numbers);
    assert!(blob.ends_with(b"GnUlInUx"));
    let toc_digest = &written.annotations["containerd.io/snapshot/stargz/toc.digest"];
    assert_eq!(
        Some(toc_digest.clone()),
        written.toc_digest.map(|d| d.to_string())
    );
    let files = files(&blob, &toc);
    assert_eq!(files["big"].len(), 20_000);
    assert_eq!(files[NO_PREFETCH_LANDMARK], b"\x0f");
    let entries = toc["entries"].as_array().unwrap();
    for entry in entries.iter().filter(|e| e["size"].as_u64() > Some(0)) {
        assert!(entry["chunkDigest"].is_string(), "{entry}");
    }
    assert!(unzstd(&blob).ends_with(&tarball(&sample())));
}

#[test]
fn hot_ranges_get_small_chunks_and_cold_files_large_ones() {
    let items = [file("cold", &[1; 300_000]), file("d/hot", &[2; 2 << 20])];
    let mut input = Cursor::new(tarball(&items));
    let survey = Survey::take("l", &mut input).unwrap();
    let hot = HotFiles {
        files: vec![HotFile {
            path: "/d/hot".to_owned(),
            ranges: vec![ByteRange::new(65_536, 65_540).unwrap()],
        }],
    };
    let hot = resolve(&[&survey], &hot).layers.remove(0);
    for flavour in [Flavour::ContainersStorage, Flavour::Stargz] {
        let options = Options {
            chunk_bytes: 32 << 10,
            ..chunked(flavour)
        };
        let mut blob = Vec::new();
        let ends = (&mut input, &mut blob);
        let written = write_surveyed("l", &survey, Some(&hot), ends, &options).unwrap();
        let prefix = match flavour {
            Flavour::ContainersStorage => STORAGE,
            Flavour::Stargz => STARGZ,
        };
        let toc = toc_of(&blob, &written, prefix);
        let sizes = |name: &str| -> Vec<u64> {
            let entries = toc["entries"].as_array().unwrap().iter();
            let own = entries.filter(|entry| entry["name"] == name);
            own.map(|entry| entry["chunkSize"].as_u64().unwrap_or(0))
                .collect()
        };
        assert_eq!(sizes("cold"), [0]);
        assert_eq!(
            sizes("d/hot"),
            [65_536, 32_768, 32_768, 1 << 20, (1 << 20) - 131_072]
        );
        let first = toc["entries"][0]["name"].as_str().unwrap();
        assert_eq!(first, "d/hot");
        assert_eq!(files(&blob, &toc)["d/hot"], [2; 2 << 20]);
        let end = written.annotations.get(PREFETCH_END_ANNOTATION);
        assert_eq!(end.is_some(), flavour == Flavour::ContainersStorage);
        let end: u64 = end.map_or(0, |end| end.parse().unwrap());
        let entries = toc["entries"].as_array().unwrap().iter();
        for entry in entries.filter(|entry| end > 0 && entry["offset"].is_u64()) {
            let is_first = entry["offset"].as_u64().unwrap() < end;
            assert_eq!(is_first, entry["name"] == "d/hot", "{entry} and {end}");
        }
        assert!(unzstd(&blob).len() as u64 == written.uncompressed_size);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn the_tar_can_be_put_together_again(items in items(), chunk_bytes in 4096u32..30_000) {
        let tar = tarball(&items);
        let options = Options { chunk_bytes, ..chunked(Flavour::ContainersStorage) };
        let (blob, written) = convert(&tar, &options).unwrap();
        prop_assert!(unzstd(&blob) == tar);
        let toc = toc_of(&blob, &written, STORAGE);
        let files = files(&blob, &toc);
        prop_assert!(assembled(&blob, &written, &toc, &files) == tar);
        // And converting it again changes nothing.
        let again = convert(&unzstd(&blob), &options).unwrap();
        prop_assert!(again == (blob, written));
    }
}
