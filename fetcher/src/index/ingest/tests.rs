//! Whole layers through the state machine, right and wrong.

use std::io::Write as _;

use super::*;
use crate::codec::pieces::Pieces;
use crate::index::details::SpanDetails;
use crate::index::{Chunk, DATA_ALIGN, Encoding, Span};
use crate::test_util::content::{TAR_END, tar_file};
use crate::types::ByteRange;

/// A data file in memory that insists on the order it was promised.
#[derive(Debug, Default, PartialEq)]
struct Memory(Vec<u8>);

impl LayerSink for Memory {
    fn write_at(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()> {
        let at = usize::try_from(data_offset).unwrap();
        assert!(at >= self.0.len() && !bytes.is_empty());
        self.0.resize(at, 0);
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

fn tar() -> Vec<u8> {
    let big: Vec<u8> = (0..(2 << 20) + 5_u32).map(|i| i.to_le_bytes()[1]).collect();
    [
        tar_file("empty", b""),
        tar_file("a", b"first"),
        tar_file("stargz.index.json", b"{}"),
        tar_file("big", &big),
        tar_file(".prefetch.landmark", b"\x0f"),
        tar_file("a", b"second"),
        tar_file("dir/.wh.gone", b""),
        TAR_END.to_vec(),
    ]
    .concat()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn run(plan: IngestPlan, blob: &[u8], piece: usize) -> Result<(LayerIndex, Memory)> {
    ingest(plan, blob, piece).map(|ingested| (ingested.index, ingested.sink))
}

fn ingest(plan: IngestPlan, blob: &[u8], piece: usize) -> Result<Ingested<Memory>> {
    let mut ingest = Ingest::new(plan, Memory::default());
    for piece in blob.chunks(piece) {
        ingest.push(piece)?;
    }
    ingest.finish()
}

/// Digests of the chunks, which gzip has among the details of its spans.
fn digests(ingested: &Ingested<Memory>) -> Vec<[u8; 32]> {
    let index = &ingested.index;
    let digest = |(id, chunk): (usize, &Chunk)| match chunk.encoding {
        Encoding::GzipSpan { span, .. } => {
            let (span, details) = details(ingested, span);
            details.digest(id - span.first_chunk as usize).unwrap()
        }
        _ => chunk.chunk_digest.unwrap(),
    };
    index.chunks.iter().enumerate().map(digest).collect()
}

fn slice(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()
}

fn details(ingested: &Ingested<Memory>, number: u32) -> (&Span, SpanDetails) {
    let span = &ingested.index.spans[number as usize];
    let bytes = ingested.details.slice(slice(span.details));
    (
        span,
        SpanDetails::parse(span, span.chunk_count, bytes).unwrap(),
    )
}

/// Every chunk, fetched and decoded alone, has its digest.
fn assert_chunks_stand_alone(ingested: &Ingested<Memory>, blob: &[u8]) {
    let index = &ingested.index;
    for (chunk, digest) in index.chunks.iter().zip(digests(ingested)) {
        let Some(range) = chunk.encoding.blob() else {
            continue;
        };
        let encoded = &blob[slice(range)];
        let mut pieces = match chunk.encoding {
            Encoding::GzipSpan { span, .. } => {
                let (span, details) = details(ingested, span);
                Pieces::span(encoded, span.bits, &details.window).unwrap()
            }
            Encoding::ZstdFrame { .. } => Pieces::zstd(encoded).unwrap(),
            _ => Pieces::stored(encoded),
        };
        let decoded = pieces.take(chunk.encoding.skip(), chunk.len).unwrap();
        assert!(codec::verify_chunk(String::new, &digest, decoded).is_ok());
    }
}

fn plan(blob: &[u8], tar: &[u8]) -> IngestPlan {
    IngestPlan::new(
        Digest::sha256(blob),
        blob.len() as u64,
        Some(Digest::sha256(tar)),
    )
}

#[test]
fn a_tar_may_end_with_its_last_payload() {
    let tar = [&tar_file("a", b"first")[..], &tar_file("b", b"last")[..516]].concat();
    for blob in [tar.clone(), gzip(&tar)] {
        let ingested = ingest(plan(&blob, &tar), &blob, 700).unwrap();
        assert_chunks_stand_alone(&ingested, &blob);
        assert!(ingested.sink.0.ends_with(b"last"));
    }
    let short = &tar[..tar.len() - 1];
    let error = run(plan(short, short), short, 700).unwrap_err().to_string();
    assert!(error.contains("it is cut off"), "{error}");
}

#[test]
fn a_link_is_the_file_that_came_before_it() {
    let link = |name: &[u8], target: &[u8]| {
        crate::test_util::content::tar_header(name, b'1', 0, |block| {
            block[157..157 + target.len()].copy_from_slice(target);
        })
    };
    let tar = [
        tar_file("a", b"one"),
        link(b"b", b"a"),
        tar_file("a", b"two, new"),
        TAR_END.to_vec(),
    ]
    .concat();
    let ingested = ingest(plan(&tar, &tar), &tar, 700).unwrap();
    let files = ingested.index.files.iter();
    let files: Vec<_> = files.map(|file| (&file.path[..], &file.kind)).collect();
    let at = |size, data_offset| FileKind::Regular { size, data_offset };
    assert_eq!(files, [(&b"b"[..], &at(3, 0)), (b"a", &at(8, DATA_ALIGN))]);
}

#[test]
fn every_compression_gives_the_same_data_file() {
    let tar = tar();
    let mut data_files = Vec::new();
    for (blob, format) in [
        (tar.clone(), LayerFormat::Tar),
        (gzip(&tar), LayerFormat::Gzip),
        (
            [gzip(&tar[..1000]), gzip(&tar[1000..])].concat(),
            LayerFormat::Gzip,
        ),
        (zstd::encode_all(&tar[..], 1).unwrap(), LayerFormat::Zstd),
    ] {
        for piece in [1 << 20, 777, 3] {
            let ingested = ingest(plan(&blob, &tar), &blob, piece).unwrap();
            assert_chunks_stand_alone(&ingested, &blob);
            let digests = digests(&ingested);
            let Ingested { index, sink, .. } = ingested;
            assert_eq!(index.format, format);
            assert!(
                index
                    .chunks
                    .iter()
                    .all(|chunk| chunk.encoding.blob().is_some())
            );
            assert_eq!(
                (index.blob_digest, index.blob_size),
                (Digest::sha256(&blob), blob.len() as u64)
            );
            let chunks: Vec<_> = index
                .chunks
                .iter()
                .map(|c| (c.data_offset, c.len))
                .collect();
            data_files.push((index.files, chunks, digests, index.data_len, sink));
        }
    }
    let (files, chunks, digests, data_len, data) = &data_files[0];
    assert!(data_files.iter().all(|other| other == &data_files[0]));
    let names: Vec<_> = files
        .iter()
        .map(|f| String::from_utf8_lossy(&f.path))
        .collect();
    assert_eq!(names, ["empty", "a", "big", "a", "dir/.wh.gone"]);
    assert_eq!(data.0.len() as u64, *data_len);
    let lens: Vec<_> = chunks.iter().map(|(_, len)| *len).collect();
    let pieces = [65_536; 32];
    assert_eq!(lens, [&[5][..], &pieces, &[5, 6]].concat());
    for ((data_offset, len), digest) in chunks.iter().zip(digests) {
        let at = usize::try_from(*data_offset).unwrap();
        let bytes = data.0[at..at + *len as usize].to_vec();
        assert!(codec::verify_chunk(String::new, digest, bytes).is_ok());
    }
    for file in files {
        if let FileKind::Regular { data_offset, .. } = file.kind {
            assert_eq!(data_offset % DATA_ALIGN, 0);
        }
    }
}

#[test]
fn empty_layers() {
    for tar in [&b""[..], &[0; 1024]] {
        for blob in [tar.to_vec(), gzip(tar)] {
            let (index, data) = run(plan(&blob, tar), &blob, 100).unwrap();
            assert_eq!(
                (index.files.len(), index.chunks.len(), index.data_len),
                (0, 0, 0)
            );
            assert_eq!(data, Memory::default());
        }
    }
}

#[test]
fn wrong_digests_are_corrupt_whatever_else_is_wrong() {
    let tar = tar();
    let blob = gzip(&tar);
    let mut damaged = blob.clone();
    damaged[3000] ^= 1;
    let error = run(plan(&blob, &tar), &damaged, 1000).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(error.to_string().starts_with("layer sha256:"), "{error}");
    let error = run(plan(&blob, b"another tar"), &blob, 1000).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("(its diff_id)"), "{error}");
    let stored = run(plan(&tar, b"another tar"), &tar, 1000).unwrap_err();
    assert!(matches!(stored, Error::Corrupt { .. }), "{stored}");
}

#[test]
fn says_what_is_wrong() {
    let tar = tar();
    let blob = gzip(&tar);
    let exact = |blob: &[u8]| IngestPlan::new(Digest::sha256(blob), blob.len() as u64, None);
    let sparse = {
        let mut t = tar_file("holes", b"");
        t[156] = b'S';
        t[148..155].copy_from_slice(b"       ");
        t
    };
    let cut = blob[..blob.len() - 9].to_vec();
    let no_tar = gzip(&[b'x'; 2000]);
    let short = tar[..1 << 20].to_vec();
    let table = [
        (
            exact(&blob),
            blob[..100].to_vec(),
            "only 100 bytes came of the",
        ),
        (
            exact(&blob[..100]),
            blob.clone(),
            "more than 100 bytes came of the 100",
        ),
        (
            exact(&cut),
            cut.clone(),
            "is malformed: it is cut off after",
        ),
        (
            exact(&no_tar),
            no_tar.clone(),
            "its checksum field is not a number",
        ),
        (exact(&short), short.clone(), "it is cut off"),
        (exact(&sparse), sparse.clone(), "header checksum"),
        (
            exact(&blob).decoded_len_max(1 << 20),
            blob.clone(),
            "it is larger than 1048576 bytes",
        ),
    ];
    for (plan, blob, text) in table {
        let error = run(plan, &blob, 50_000).unwrap_err().to_string();
        assert!(error.contains(text), "{error:?} lacks {text:?}");
    }
}

#[test]
fn the_error_of_the_sink_comes_back_at_once() {
    struct Full;
    impl LayerSink for Full {
        fn write_at(&mut self, _: u64, _: &[u8]) -> Result<()> {
            Err(Error::NoSpace {
                path: "/data".into(),
            })
        }
    }
    let tar = tar();
    let mut ingest = Ingest::new(plan(&tar, &tar), Full);
    assert!(matches!(ingest.push(&tar), Err(Error::NoSpace { .. })));
}
