//! The formats that layers come in, and our writing of them.

use std::io::Read as _;

use lazarette_fetcher::codec;
use lazarette_fetcher::codec::unpack::decoder;
use lazarette_fetcher::index::details::SpanDetails;
use lazarette_fetcher::index::write::{Flavour, Format, Options, write_layer};
use lazarette_fetcher::index::{estargz, soci, wire, zstdchunked};
use lazarette_fetcher::source::BlobRef;
use lazarette_fetcher::test_util::content::tar_header;
use lazarette_fetcher::types::{ByteRange, Descriptor, Digest, MediaType, Reference};

/// A blob's last bytes: [`estargz::read_footer`].
pub(crate) fn fuzz_footer(data: &[u8]) {
    for blob_size in [data.len() as u64, 0, 1 << 40, u64::MAX] {
        if let Ok(Some(footer)) = estargz::read_footer(data, blob_size) {
            assert!(footer.toc_offset() <= blob_size);
            assert!(footer.toc_len() <= blob_size - footer.toc_offset());
        }
    }
}

/// TOC JSON behind a right digest: [`estargz::parse_toc`].
pub(crate) fn fuzz_toc(json: &[u8]) {
    let blob = toc_blob(json);
    let size = blob.len() as u64;
    let footer = estargz::read_footer(&blob, size)
        .expect("the footer is well-formed")
        .expect("there is one");
    let blob_ref = blob_of(size);
    let start = usize::try_from(footer.toc_offset()).expect("the blob is in memory");
    if let Ok(layer) = estargz::parse_toc(&blob_ref, &footer, &blob[start..], &Digest::sha256(json))
    {
        let bytes = wire::encode(&layer.index, &[]).expect("memory");
        assert_eq!(wire::decode(&bytes).expect("what was encoded"), layer.index);
    }
}

/// A tar, written in every format: [`write_layer`]. What comes out decodes to the layer it
/// says it is.
pub(crate) fn fuzz_write(data: &[u8]) {
    for format in [
        Format::Estargz,
        Format::ZstdChunked(Flavour::ContainersStorage),
        Format::ZstdChunked(Flavour::Stargz),
        Format::Gzip,
    ] {
        let options = Options {
            chunk_bytes: 4096,
            level: 1,
            workers: 1,
            ..Options::new(format)
        };
        let mut blob = Vec::new();
        let mut input = std::io::Cursor::new(data);
        let Ok(written) = write_layer("layer", &mut input, &mut blob, &options) else {
            continue;
        };
        let mut plain = Vec::new();
        decoder(&blob[..])
            .and_then(|mut decoder| decoder.read_to_end(&mut plain))
            .expect("what was encoded");
        assert_eq!(written.diff_id, Digest::sha256(&plain));
        assert_eq!(written.uncompressed_size, plain.len() as u64);
    }
}

/// A blob's last bytes, and a descriptor's annotations, of zstd:chunked:
/// [`zstdchunked::read_footer`], [`zstdchunked::promise`].
pub(crate) fn fuzz_zstdchunked_place(data: &[u8]) {
    for blob_size in [data.len() as u64, 0, 1 << 40, u64::MAX] {
        if let Ok(Some(position)) = zstdchunked::read_footer(data, blob_size) {
            assert!(position.blob.end() <= blob_size && !position.blob.is_empty());
        }
    }
    let Ok(annotations) = serde_json::from_slice(data) else {
        return;
    };
    let mut layer = Descriptor::new(MediaType::OciLayerZstd, Digest::sha256(b"blob"), 20_000);
    layer.annotations = annotations;
    if let Ok(Some(promise)) = zstdchunked::promise(&layer) {
        assert!(promise.position.blob.end() <= layer.size);
    }
}

/// TOC JSON behind a right digest: [`zstdchunked::parse_toc`].
pub(crate) fn fuzz_zstdchunked_toc(json: &[u8]) {
    let toc = stored_frame(json);
    let blob = blob_of(40_000 + toc.len() as u64);
    let position = zstdchunked::Position {
        blob: ByteRange::at(40_000, toc.len() as u64).expect("it is short"),
        json_len: json.len() as u64,
    };
    let proof = zstdchunked::Proof::Compressed(Digest::sha256(&toc));
    if let Ok(layer) = zstdchunked::parse_toc(&blob, &position, &toc, &proof) {
        let bytes = wire::encode(&layer.index, &[]).expect("memory");
        assert_eq!(wire::decode(&bytes).expect("what was encoded"), layer.index);
    }
}

/// A SOCI zTOC behind a right digest, and before it the size of its blob:
/// [`soci::parse`].
pub(crate) fn fuzz_soci(data: &[u8]) {
    let Some(found) = read_ztoc(data) else {
        return;
    };
    let bytes = wire::encode(&found.index, &found.details).expect("memory");
    assert_eq!(wire::decode(&bytes).expect("what was encoded"), found.index);
    for span in &found.index.spans {
        let place = |at| usize::try_from(at).expect("it is in memory");
        let details = place(span.details.start())..place(span.details.end());
        let details = found.details.slice(details);
        let digests = found.index.digests_of(span);
        SpanDetails::parse(span, digests, details).expect("what was encoded");
    }
}

/// What is accepted of an input of [`fuzz_soci`].
pub(crate) fn read_ztoc(data: &[u8]) -> Option<soci::Ztoc> {
    let (size, ztoc) = data.split_first_chunk()?;
    let blob = blob_of(u64::from_le_bytes(*size));
    let verified = codec::verify(String::new, &Digest::sha256(ztoc), ztoc.to_vec());
    soci::parse(&blob, &verified.expect("its own digest")).ok()
}

/// Where a blob of this size is.
fn blob_of(size: u64) -> BlobRef {
    let image = Reference::parse("example.com/a:b").expect("it is one");
    BlobRef {
        repository: image.repository().clone(),
        digest: Digest::sha256(b"blob"),
        size,
    }
}

/// A zstd frame of stored blocks, so that the fuzzer's bytes stay readable.
fn stored_frame(bytes: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    let len = u32::try_from(bytes.len()).expect("a fuzzer's input is short");
    frame.extend_from_slice(&len.to_le_bytes());
    for block in bytes.chunks(1024) {
        let header = u32::try_from(block.len()).expect("a block is short") << 3;
        frame.extend_from_slice(&header.to_le_bytes()[..3]);
        frame.extend_from_slice(block);
    }
    frame.extend_from_slice(&[1, 0, 0]);
    frame
}

/// A gzip member (stored, so that the fuzzer's bytes stay readable) and a footer.
fn toc_blob(json: &[u8]) -> Vec<u8> {
    let mut tar = tar_header(b"stargz.index.json", b'0', json.len() as u64, |_| {});
    tar.extend_from_slice(json);
    // Room for the offsets that entries name.
    let mut blob = vec![0; 4096];
    blob.extend_from_slice(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff]);
    let mut blocks = tar.chunks(0xffff).peekable();
    while let Some(block) = blocks.next() {
        let len = u16::try_from(block.len()).expect("a stored block fits");
        blob.push(u8::from(blocks.peek().is_none()));
        blob.extend_from_slice(&len.to_le_bytes());
        blob.extend_from_slice(&(!len).to_le_bytes());
        blob.extend_from_slice(block);
    }
    blob.extend_from_slice(&crc32fast::hash(&tar).to_le_bytes());
    blob.extend_from_slice(&u32::try_from(tar.len()).unwrap_or(u32::MAX).to_le_bytes());
    blob.extend_from_slice(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0]);
    blob.extend_from_slice(b"SG\x16\x000000000000001000STARGZ");
    blob.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    blob
}
