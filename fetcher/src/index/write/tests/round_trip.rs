//! What is written, read by the readers of this crate: the same tree and the same bytes as
//! the tar that went in.

use std::collections::BTreeMap;

use super::*;
use crate::codec::gzip::decode_member;
use crate::index::estargz::{parse_toc, read_footer};
use crate::index::ingest::{Ingest, IngestPlan, LayerSink};
use crate::index::{Encoding, FileEntry, FileKind, LayerIndex};
use crate::source::BlobRef;
use crate::types::Reference;

/// A data file in memory.
#[derive(Default)]
struct Memory(Vec<u8>);

impl LayerSink for Memory {
    fn write_at(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()> {
        self.0.resize(usize::try_from(data_offset).unwrap(), 0);
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// Entries by path, without where their bytes are, and the bytes. Of two entries with one
/// path the last counts.
type Tree = BTreeMap<Vec<u8>, (FileEntry, Vec<u8>)>;

fn tree(index: &LayerIndex, data: &[u8]) -> Tree {
    let file = |file: &FileEntry| {
        let mut file = file.clone();
        let mut bytes = Vec::new();
        if let FileKind::Regular { size, data_offset } = &mut file.kind {
            let start = usize::try_from(std::mem::take(data_offset)).unwrap();
            bytes = data[start..start + usize::try_from(*size).unwrap()].to_vec();
        }
        (file.path.clone(), (file, bytes))
    };
    index.files.iter().map(file).collect()
}

/// A blob streamed in full, whatever it is.
fn streamed(blob: &[u8], diff_id: Digest) -> Tree {
    let plan = IngestPlan::new(Digest::sha256(blob), blob.len() as u64, Some(diff_id));
    let mut ingest = Ingest::new(plan, Memory::default());
    for piece in blob.chunks(10_000) {
        ingest.push(piece).unwrap();
    }
    let ingested = ingest.finish().unwrap();
    let (index, Memory(mut data)) = (ingested.index, ingested.sink);
    data.resize(usize::try_from(index.data_len).unwrap(), 0);
    tree(&index, &data)
}

/// An eStargz blob through its TOC, every chunk decoded and verified alone.
fn lazy(blob: &[u8], written: &Written) -> Tree {
    let footer = read_footer(blob, blob.len() as u64).unwrap().unwrap();
    let tail = &blob[usize::try_from(footer.toc_offset()).unwrap()..];
    let reference = Reference::parse("localhost/x:y").unwrap();
    let source = BlobRef {
        repository: reference.repository().clone(),
        digest: written.blob_digest,
        size: written.blob_size,
    };
    let toc_digest = written.toc_digest.unwrap();
    let layer = parse_toc(&source, &footer, tail, &toc_digest).unwrap();
    let mut data = vec![0; usize::try_from(layer.index.data_len).unwrap()];
    for chunk in &layer.index.chunks {
        let Encoding::GzipMember { blob: range, skip } = chunk.encoding else {
            panic!("{:?}", chunk.encoding)
        };
        let [start, end] = [range.start(), range.end()].map(|at| usize::try_from(at).unwrap());
        let bytes = decode_member(&blob[start..end], skip, chunk.len).unwrap();
        let digest = chunk.chunk_digest.map(Digest::Sha256);
        assert_eq!(digest, Some(Digest::sha256(&bytes)));
        let at = usize::try_from(chunk.data_offset).unwrap();
        data[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    tree(&layer.index, &data)
}

#[test]
fn every_format_reads_as_the_tar_did() {
    let big: Vec<u8> = (0..50_000u32).flat_map(u32::to_le_bytes).collect();
    let items = [
        dir("./usr"),
        file("./usr/big", &big),
        file("./usr/empty", b""),
        hard("./usr/link", "./usr/big"),
        item(b'2', "bin", "usr", b""),
        item(b'6', "pipe", "", b""),
        file("etc/.wh.gone", b""),
    ];
    let tar = tarball(&items);
    let before = streamed(&tar, Digest::sha256(&tar));
    assert_eq!(before.len(), items.len());
    for format in FORMATS {
        for hot in [&[][..], &["/bin/link", "usr"]] {
            let options = Options {
                chunk_bytes: 64 << 10,
                ..Options::new(format)
            };
            let (blob, written) = convert_hot(&tar, hot, &options).unwrap();
            assert!(streamed(&blob, written.diff_id) == before, "{format:?}");
            if format == Format::Estargz {
                assert!(lazy(&blob, &written) == before);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_tar_reads_the_same_after_any_conversion(items in items(), chunk_bytes in 4096u32..30_000) {
        let tar = tarball(&items);
        let before = streamed(&tar, Digest::sha256(&tar));
        let (blob, written) = convert(&tar, &options(chunk_bytes, 2)).unwrap();
        prop_assert!(streamed(&blob, written.diff_id) == before);
        prop_assert!(lazy(&blob, &written) == before);
        // And through the others.
        let mut tar = gunzip(&blob);
        for format in FORMATS {
            let (blob, written) = convert(&tar, &Options::new(format)).unwrap();
            prop_assert!(streamed(&blob, written.diff_id) == before, "{format:?}");
            tar = Vec::new();
            decoder(&blob[..]).unwrap().read_to_end(&mut tar).unwrap();
        }
    }
}
