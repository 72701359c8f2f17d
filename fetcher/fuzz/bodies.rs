//! What each fuzz target does with its input: one place for libFuzzer's targets and for
//! the smoke test that runs on stable, so that the two cannot drift.
//!
//! Invariant: for any input an error or a value that keeps its rules; never a panic,
//! never memory beyond the limits.

use std::cell::OnceCell;
use std::io::Read as _;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lazarette_fetcher::Result;
use lazarette_fetcher::codec::stream::{Decoder, detect};
use lazarette_fetcher::codec::unpack::decoder;
use lazarette_fetcher::codec::{self, Packer};
use lazarette_fetcher::index::details::SpanDetails;
use lazarette_fetcher::index::ingest::{Ingest, IngestPlan, LayerSink};
use lazarette_fetcher::index::seams::{Seam, Seams};
use lazarette_fetcher::index::tar::{Parser, Step};
use lazarette_fetcher::index::write::{Flavour, Format, Options, write_layer};
use lazarette_fetcher::index::{ChunkId, estargz, soci, wire, zstdchunked};
use lazarette_fetcher::layer::open::{core_bytes, core_digest};
use lazarette_fetcher::source::BlobRef;
use lazarette_fetcher::store::{PIN_TIME, Store};
use lazarette_fetcher::test_util::parsers;
use lazarette_fetcher::types::{ByteRange, Descriptor, Digest, MediaType, Reference};

/// Decoded bytes a target accepts: enough to leave every state, little enough to be quick.
const OUT_MAX: u64 = 1 << 22;

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
    let blob_ref = BlobRef {
        repository: Reference::parse("example.com/a:b")
            .expect("it is one")
            .repository()
            .clone(),
        digest: Digest::sha256(b"blob"),
        size,
    };
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
    let blob = BlobRef {
        repository: Reference::parse("example.com/a:b")
            .expect("it is one")
            .repository()
            .clone(),
        digest: Digest::sha256(b"blob"),
        size: 40_000 + toc.len() as u64,
    };
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
    let blob = BlobRef {
        repository: Reference::parse("example.com/a:b")
            .expect("it is one")
            .repository()
            .clone(),
        digest: Digest::sha256(b"blob"),
        size: u64::from_le_bytes(*size),
    };
    let verified = codec::verify(String::new, &Digest::sha256(ztoc), ztoc.to_vec());
    soci::parse(&blob, &verified.expect("its own digest")).ok()
}

/// A tar, pushed in two pieces and in small ones: [`Parser`].
pub(crate) fn fuzz_tar(data: &[u8]) {
    let whole = read_tar(data, usize::MAX);
    let pieces = read_tar(data, 97);
    assert_eq!(whole, pieces, "pieces must not matter");
}

fn read_tar(data: &[u8], piece: usize) -> Option<(usize, usize)> {
    let mut parser = Parser::new("layer".to_owned());
    let (mut entries, mut bytes) = (0, 0);
    for mut input in data.chunks(piece.min(data.len()).max(1)) {
        loop {
            match parser.step(&mut input).ok()? {
                Step::NeedInput => break,
                Step::Entry(_) => entries += 1,
                Step::Data(data) => bytes += data.len(),
                Step::EndOfFile => {}
            }
        }
    }
    parser.finish().ok()?;
    Some((entries, bytes))
}

/// Our own index file, with and without a right checksum: [`wire::decode`].
pub(crate) fn fuzz_wire(data: &[u8]) {
    check_wire(data);
    check_wire(&sealed_index(data));
}

/// An index file with these tables and no details.
fn sealed_index(tables: &[u8]) -> Vec<u8> {
    let core = Packer::new()
        .and_then(|mut packer| packer.pack(tables))
        .expect("memory");
    let mut sealed = b"LAZINDEX\x03\0\0\0".to_vec();
    sealed.extend_from_slice(&crc32fast::hash(&core).to_le_bytes());
    for len in [core.len(), tables.len(), 0] {
        sealed.extend_from_slice(&(len as u64).to_le_bytes());
    }
    sealed.extend_from_slice(&core);
    sealed
}

fn check_wire(bytes: &[u8]) {
    if let Ok(index) = wire::decode(bytes) {
        let len = index.spans.last().map_or(0, |span| span.details.end());
        let details = vec![0; usize::try_from(len).expect("64 bits")];
        let again = wire::encode(&index, &details).expect("memory");
        assert_eq!(wire::decode(&again).expect("what was encoded"), index);
    }
}

/// An index beside an image, of which only the first bytes are read: [`core_digest`],
/// [`core_bytes`], [`wire::decode_core`]. What is signed is what is decoded.
pub(crate) fn fuzz_offered(data: &[u8]) {
    check_offered(data);
    check_offered(&sealed_index(data));
}

fn check_offered(bytes: &[u8]) {
    let Ok(len) = core_bytes(bytes) else {
        assert!(core_digest(bytes).is_err());
        return;
    };
    let len = usize::try_from(len).expect("it is in memory");
    let (head, before) = (&bytes[..len], &bytes[..len - 1]);
    assert!(core_bytes(before).is_err(), "it is cut off");
    let digest = core_digest(bytes).expect("what has a length");
    assert_eq!(
        digest,
        Digest::sha256(head),
        "what is behind it is not signed"
    );
    let header = wire::Header::parse(head).expect("what has a length");
    let core = wire::decode_core(&header, &head[wire::HEADER_LEN..]);
    match wire::decode(bytes) {
        Ok(whole) => assert_eq!(core.expect("a part of the whole"), whole),
        // Details may have come short.
        Err(_) => drop(core),
    }
}

/// A body of several ranges, in one piece and in small ones, and the words of its type.
pub(crate) fn fuzz_byteranges(data: &[u8]) {
    const SIZE: u64 = 1000;
    const TYPE: &str = "multipart/byteranges; boundary=b0";
    let read = |content_type: &str, piece: usize, end: u64| {
        let pieces = data.chunks(piece).map(Bytes::copy_from_slice);
        let parts = parsers::byteranges(content_type, SIZE, pieces, end)?.ok()?;
        let (mut reached, mut bytes) = (0, Vec::new());
        for (at, run) in &parts.runs {
            let run_end = at + run.len() as u64;
            assert!(reached <= *at && *at < run_end && run_end <= SIZE);
            assert!(*at >= end || run_end <= end, "no run goes on past {end}");
            reached = run_end;
            bytes.extend((*at..).zip(run.iter().copied()));
        }
        Some((bytes, parts.is_over))
    };
    let whole = read(TYPE, usize::MAX, SIZE);
    assert_eq!(whole, read(TYPE, 7, 500), "pieces must not matter");
    read(&String::from_utf8_lossy(data), 100, SIZE);
}

/// The table of chunks, with and without a right header: [`parsers::Chunks`].
pub(crate) fn fuzz_chunks(data: &[u8]) {
    thread_local! {
        static DIR: tempfile::TempDir = tempfile::tempdir().expect("a directory");
    }
    // Two buckets.
    let mut table = b"LAZCHNKS\x01\0\0\0\x02\0\0\0".to_vec();
    table.resize(4096, 0);
    table.extend(data.iter().copied().chain(std::iter::repeat(0)).take(256));
    DIR.with(|dir| {
        for file in [data, &table] {
            std::fs::write(dir.path().join("chunks"), file).expect("a file");
            let chunks = parsers::Chunks::open(dir.path());
            // Their numbers of buckets and their tags are small numbers, too.
            for first in 0..4_u8 {
                let mut digest = [0; 32];
                (digest[0], digest[8]) = (first, first);
                let place = (7, 4096);
                assert!(chunks.find(&digest).len() <= 8);
                chunks.note(&digest, place);
                assert!(chunks.find(&digest).contains(&place));
                chunks.forget(&digest, place);
                assert!(!chunks.find(&digest).contains(&place));
            }
        }
    });
}

/// What start-ups pinned: [`parsers::pinned`].
pub(crate) fn fuzz_pinned(data: &[u8]) {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    for extents in [data.len() / 4, 0, 9] {
        let pinned = parsers::pinned(data, extents, now);
        assert!(pinned.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(pinned.iter().all(|extent| (*extent as usize) < extents));
        assert!(pinned.is_empty() || data.len() / 4 == extents);
        // Nothing holds for longer than it may.
        let later = now + PIN_TIME + Duration::from_secs(3600);
        let both = parsers::pinned(data, extents, later);
        assert!(both.iter().all(|extent| !pinned.contains(extent)));
    }
}

/// Where an index is, with and without a right checksum: [`parsers::origin`].
pub(crate) fn fuzz_origin(data: &[u8]) {
    let mut sealed = b"LAZORIGN\x01\0\0\0".to_vec();
    sealed.extend_from_slice(&crc32fast::hash(data).to_le_bytes());
    sealed.extend_from_slice(data);
    for file in [data, &sealed] {
        if let Some(origin) = parsers::origin(file) {
            let again = parsers::origin(&parsers::origin_file(&origin));
            assert_eq!(again, Some(origin));
        }
    }
}

/// Digests that were learned of a layer that is here in full, whatever the disk made of
/// them: chunks are absent whose digests are not what they were, and no others.
pub(crate) fn fuzz_learned(data: &[u8]) {
    thread_local! {
        static LAYER: OnceCell<LearnedLayer> = const { OnceCell::new() };
    }
    LAYER.with(|layer| {
        let layer = layer.get_or_init(LearnedLayer::new);
        layer.check(data);
        let mut over = layer.learned.clone();
        over.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        layer.check(&over);
    });
}

/// What [`fuzz_learned`] is right about.
pub(crate) fn learned_digests() -> Vec<u8> {
    LearnedLayer::new().learned
}

/// A store with a layer whose spans are verified whole, all of it present.
struct LearnedLayer {
    store: std::sync::Arc<Store>,
    dir: tempfile::TempDir,
    digest: Digest,
    learned: Vec<u8>,
}

impl LearnedLayer {
    const ZTOC: &[u8] = include_bytes!("../tests/fixtures/soci/tar.ztoc.gz");
    const BLOB_SIZE: u64 = 458_240;

    fn new() -> Self {
        let mut input = Self::BLOB_SIZE.to_le_bytes().to_vec();
        decoder(Self::ZTOC)
            .and_then(|mut ztoc| ztoc.read_to_end(&mut input))
            .expect("a fixture");
        let ztoc = read_ztoc(&input).expect("a right zTOC");
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("an empty store");
        let file = store.create_layer_with(ztoc.index, &ztoc.details);
        let file = file.expect("a new layer");
        for (id, chunk) in (0..).zip(&file.index().chunks) {
            let bytes = Self::bytes(id, chunk.len);
            let verified = codec::verify(String::new, &Digest::sha256(&bytes), bytes);
            file.put(id, &verified.expect("its own digest"))
                .expect("room on the disk");
        }
        file.flush().expect("room on the disk");
        let digest = *file.digest();
        drop(file);
        let mut made = Self {
            store,
            dir,
            digest,
            learned: Vec::new(),
        };
        made.learned = std::fs::read(made.path()).expect("spans that are verified whole");
        made
    }

    fn bytes(id: ChunkId, len: u32) -> Vec<u8> {
        vec![id.to_le_bytes()[0]; len as usize]
    }

    fn path(&self) -> std::path::PathBuf {
        let layer = self.dir.path().join("layers").join(self.digest.file_name());
        layer.join("learned")
    }

    fn check(&self, learned: &[u8]) {
        std::fs::write(self.path(), learned).expect("a file");
        let Ok(opened) = self.store.open_layer(&self.digest) else {
            assert_ne!(learned.len(), self.learned.len());
            return;
        };
        let file = opened.expect("the layer is there");
        let entries = learned.chunks(32).zip(self.learned.chunks(32));
        for ((id, chunk), (now, then)) in (0..).zip(&file.index().chunks).zip(entries) {
            let mut read = vec![0; chunk.len as usize];
            let is_here = file.read_at(chunk.data_offset, &mut read);
            assert_eq!(is_here.expect("a file"), now == then);
            assert!(now != then || read == Self::bytes(id, chunk.len));
        }
    }
}

/// What a layer's index is shaped by, with and without a right checksum: [`Seams::parse`].
pub(crate) fn fuzz_seams(data: &[u8]) {
    check_seams(data);
    let tables = Packer::new()
        .and_then(|mut packer| packer.pack(data))
        .expect("memory");
    let mut sealed = b"LAZSEAMS\x01\0\0\0".to_vec();
    sealed.extend_from_slice(&crc32fast::hash(&tables).to_le_bytes());
    for len in [tables.len(), data.len(), 0] {
        sealed.extend_from_slice(&(len as u64).to_le_bytes());
    }
    sealed.extend_from_slice(&tables);
    check_seams(&sealed);
}

fn check_seams(bytes: &[u8]) {
    if let Ok(seams) = Seams::parse(bytes.to_vec().into()) {
        let ascend =
            |pair: &[Seam]| pair[0].start < pair[1].start && pair[0].decoded < pair[1].decoded;
        assert!(seams.seams.windows(2).all(ascend));
        let _ = seams.frame(0);
    }
}

/// A blob in any compression: [`Decoder`].
pub(crate) fn fuzz_stream(data: &[u8]) {
    let Ok(mut decoder) = Decoder::new(detect(data), OUT_MAX) else {
        return;
    };
    let mut out = 0;
    let done = data.chunks(1000).try_for_each(|piece| {
        decoder.push(piece, &mut |run| {
            out += run.decoded.len() as u64;
            Ok(())
        })
    });
    assert!(out <= OUT_MAX);
    if done.is_ok() {
        drop(decoder.finish());
    }
}

/// A whole plain layer: [`Ingest`].
pub(crate) fn fuzz_ingest(data: &[u8]) {
    struct Count(u64);
    impl LayerSink for Count {
        fn write_at(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()> {
            assert!(data_offset >= self.0, "offsets ascend");
            self.0 = data_offset + bytes.len() as u64;
            Ok(())
        }
    }
    let plan =
        IngestPlan::new(Digest::sha256(data), data.len() as u64, None).decoded_len_max(OUT_MAX);
    let mut ingest = Ingest::new(plan, Count(0));
    if data
        .chunks(1000)
        .try_for_each(|piece| ingest.push(piece))
        .is_err()
    {
        return;
    }
    if let Ok(ingested) = ingest.finish() {
        let (index, Count(end)) = (ingested.index, ingested.sink);
        assert_eq!(index.data_len, end);
        let encoded = wire::encode(&index, &ingested.details).expect("memory");
        assert_eq!(wire::decode(&encoded).expect("what was encoded"), index);
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
    let mut tar = vec![0_u8; 512];
    tar[..17].copy_from_slice(b"stargz.index.json");
    tar[124..135].copy_from_slice(format!("{:011o}", json.len()).as_bytes());
    tar[156] = b'0';
    tar[148..156].copy_from_slice(b"        ");
    let sum: u32 = tar.iter().map(|byte| u32::from(*byte)).sum();
    tar[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
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
