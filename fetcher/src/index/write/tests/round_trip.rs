//! What is written, read by the readers of this crate: the same tree and the same bytes as
//! the tar that went in.

use std::collections::BTreeMap;

use super::*;
use crate::codec::gzip::decode_member;
use crate::codec::pieces::Pieces;
use crate::index::estargz::{TocLayer, parse_toc, read_footer};
use crate::index::ingest::{Ingest, IngestPlan, LayerSink};
use crate::index::{Encoding, FileEntry, FileKind, LayerIndex, zstdchunked};
use crate::source::BlobRef;
use crate::types::{ByteRange, Descriptor, MediaType, Reference};

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

fn at(bytes: &[u8], range: ByteRange) -> &[u8] {
    let [start, end] = [range.start(), range.end()].map(|at| usize::try_from(at).unwrap());
    &bytes[start..end]
}

/// What the TOC of a blob says; none where its format has no TOC.
fn toc_layer(blob: &[u8], written: &Written, format: Format) -> Option<TocLayer> {
    let reference = Reference::parse("localhost/x:y").unwrap();
    let source = BlobRef {
        repository: reference.repository().clone(),
        digest: written.blob_digest,
        size: written.blob_size,
    };
    let layer = match format {
        Format::Gzip => return None,
        Format::Estargz => {
            let footer = read_footer(blob, written.blob_size).unwrap().unwrap();
            let tail = &blob[usize::try_from(footer.toc_offset()).unwrap()..];
            parse_toc(&source, &footer, tail, &written.toc_digest.unwrap())
        }
        Format::ZstdChunked(_) => {
            let kind = MediaType::OciLayerZstd;
            let mut descriptor = Descriptor::new(kind, source.digest, source.size);
            let notes = written.annotations.iter();
            descriptor.annotations = notes.map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
            let promise = zstdchunked::promise(&descriptor).unwrap().unwrap();
            let toc = at(blob, promise.position.blob);
            zstdchunked::parse_toc(&source, &promise.position, toc, &promise.proof)
        }
    };
    Some(layer.unwrap())
}

/// A blob through its TOC, every chunk decoded and verified alone.
fn lazy(blob: &[u8], written: &Written, format: Format) -> Option<Tree> {
    let layer = toc_layer(blob, written, format)?;
    let mut data = vec![0; usize::try_from(layer.index.data_len).unwrap()];
    for chunk in &layer.index.chunks {
        let bytes = match chunk.encoding {
            Encoding::GzipMember { blob: range, skip } => {
                decode_member(at(blob, range), skip, chunk.len).unwrap()
            }
            Encoding::ZstdFrame { blob: range, skip } => {
                let mut pieces = Pieces::zstd(at(blob, range)).unwrap();
                pieces.take(skip, chunk.len).unwrap().to_vec()
            }
            other => panic!("{other:?}"),
        };
        let digest = chunk.chunk_digest.map(Digest::Sha256);
        assert_eq!(digest, Some(Digest::sha256(&bytes)));
        let at = usize::try_from(chunk.data_offset).unwrap();
        data[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    Some(tree(&layer.index, &data))
}

/// Checks that a tar reads the same from every format that it is converted to, as a whole
/// and through its TOC.
#[track_caller]
fn assert_reads_as_before(tar: &[u8], hot: &[&str]) {
    let before = streamed(tar, Digest::sha256(tar));
    for format in FORMATS {
        let options = Options {
            chunk_bytes: 64 << 10,
            ..Options::new(format)
        };
        let (blob, written) = convert_hot(tar, hot, &options).unwrap();
        assert!(streamed(&blob, written.diff_id) == before, "{format:?}");
        if let Some(lazy) = lazy(&blob, &written, format) {
            assert!(lazy == before, "{format:?}");
        }
    }
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
    assert_eq!(streamed(&tar, Digest::sha256(&tar)).len(), items.len());
    for hot in [&[][..], &["/bin/link", "usr"]] {
        assert_reads_as_before(&tar, hot);
    }
}

/// Kaniko's tars. zstd:chunked for podman keeps the spelling of every name in its TOC.
#[test]
fn absolute_names_read_as_the_tar_did() {
    let big: Vec<u8> = (0..50_000u32).flat_map(u32::to_le_bytes).collect();
    let items = [
        dir("/"),
        dir("/bin/"),
        file("/bin/a", &big),
        hard("/bin/b", "/bin/a"),
        hard("bin/c", "//bin/b"),
        item(b'2', "/lib", "/bin", b""),
        file("/etc/.wh.gone", b""),
    ];
    let tar = tarball(&items);
    let names: Vec<_> = streamed(&tar, Digest::sha256(&tar)).into_keys().collect();
    let expected = ["", "bin", "bin/a", "bin/b", "bin/c", "etc/.wh.gone", "lib"];
    assert_eq!(names, expected.map(|name| name.as_bytes().to_vec()));
    for hot in [&[][..], &["/lib/b"]] {
        assert_reads_as_before(&tar, hot);
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
        prop_assert!(lazy(&blob, &written, Format::Estargz).as_ref() == Some(&before));
        // And through the others.
        let mut tar = gunzip(&blob);
        for format in FORMATS {
            let (blob, written) = convert(&tar, &Options::new(format)).unwrap();
            prop_assert!(streamed(&blob, written.diff_id) == before, "{format:?}");
            let lazy = lazy(&blob, &written, format);
            prop_assert!(lazy.is_none_or(|lazy| lazy == before), "{format:?}");
            tar = Vec::new();
            decoder(&blob[..]).unwrap().read_to_end(&mut tar).unwrap();
        }
    }
}
