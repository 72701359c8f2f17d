//! Blobs of nothing but a TOC, and the entries of one.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use crate::Result;
use crate::index::estargz::{TOC_NAME, TocLayer, parse_toc, read_footer};
use crate::source::BlobRef;
use crate::test_util::content::tar_header;
use crate::types::{Digest, Reference};

pub(super) const OFFSET: u64 = 1000;

pub(super) fn blob_ref(bytes: &[u8]) -> BlobRef {
    BlobRef {
        repository: Reference::parse("example.com/a/b:latest")
            .unwrap()
            .repository()
            .clone(),
        digest: Digest::sha256(bytes),
        size: bytes.len() as u64,
    }
}

pub(super) fn open(bytes: &[u8], toc_digest: &str) -> Result<TocLayer> {
    let footer = read_footer(bytes, bytes.len() as u64)?.expect("it has a footer");
    let start = usize::try_from(footer.toc_offset()).unwrap();
    let digest = Digest::parse(toc_digest).unwrap();
    parse_toc(&blob_ref(bytes), &footer, &bytes[start..], &digest)
}

/// A blob of nothing but a TOC and a footer, after `OFFSET` bytes that nobody reads.
pub(super) fn blob_of(json: &[u8], name: &str) -> Vec<u8> {
    let header = tar_header(name.as_bytes(), b'0', json.len() as u64, |_| {});
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

pub(super) fn parse_json(json: &[u8]) -> Result<TocLayer> {
    open(&blob_of(json, TOC_NAME), &Digest::sha256(json).to_string())
}

pub(super) fn parse_entries(entries: Value) -> Result<TocLayer> {
    parse_json(
        json!({"version": 1, "entries": entries})
            .to_string()
            .as_bytes(),
    )
}

/// An entry with what `extra` adds or replaces.
pub(super) fn entry(name: &str, kind: &str, extra: Value) -> Value {
    let mut value =
        json!({"name": name, "type": kind, "modtime": "2023-11-14T22:13:20Z", "mode": 420});
    let fields = value.as_object_mut().unwrap();
    fields.extend(extra.as_object().unwrap().clone());
    value
}

pub(super) fn digest() -> String {
    Digest::sha256(b"x").to_string()
}

pub(super) fn reg(name: &str, size: u64, extra: Value) -> Value {
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

pub(super) fn chunk(name: &str, at: u64, extra: Value) -> Value {
    let mut value = json!({"name": name, "type": "chunk", "offset": 20, "chunkOffset": at, "chunkDigest": digest()});
    value
        .as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    value
}
