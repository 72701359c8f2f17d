//! Plain layers made of many small parts, zstd of frames and gzip of members as pigz and others
//! write it: once they were streamed and evicted, a read fetches the parts that have its bytes.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::index::{ChunkId, Encoding, FileKind};
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest, OpenedBy};
use lazarette_fetcher::layer::{Layer, Priority};
use lazarette_fetcher::source::BlobSource;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::MemorySource;
use lazarette_fetcher::test_util::content::{noise, tar};
use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Reference};

const MIB: usize = 1 << 20;
/// Bytes of the shortest header of a member.
const GZIP_HEADER_LEN: u64 = 10;
/// Decoded bytes of a piece.
const PIECE: usize = 64 << 10;

/// A layer that was streamed and evicted, and where its parts begin in the blob.
struct World {
    layer: Arc<Layer>,
    bytes: Vec<u8>,
    starts: Vec<u64>,
    _dir: tempfile::TempDir,
}

impl World {
    /// A layer of one file, of whose tar each `part` bytes were compressed alone.
    async fn new(part: usize, mut compress: impl FnMut(&[u8]) -> Vec<u8>) -> Self {
        let bytes = noise(3, 0x7f, 4 * MIB + 77);
        let tar = tar(&[("small", b"a few"), ("file", &bytes)]);
        let (mut blob, mut starts) = (Vec::new(), Vec::new());
        for part in tar.chunks(part) {
            starts.push(blob.len() as u64);
            blob.extend(compress(part));
        }
        let dir = tempfile::tempdir().unwrap();
        let (size, source) = (blob.len() as u64, MemorySource::new());
        let digest = source.add_blob(blob);
        let descriptor = Descriptor::new(MediaType::OciLayerGzip, digest, size);
        let reference = Reference::parse("example.com/a:b").unwrap();
        let repository = reference.repository().clone();
        let request = LayerRequest::new(repository, &descriptor, Digest::sha256(&tar));
        let source: Arc<dyn BlobSource> = Arc::new(source);
        let opener = LayerOpener::new(Store::open(dir.path()).unwrap(), source);
        let opened = opener.open(&request, &AtomicU64::new(0)).await;
        let (layer, by) = opened.unwrap();
        assert_eq!(by, OpenedBy::Stream);
        // Only what is asked for comes: bytes are counted.
        layer.set_foresight(false);
        layer.file().evict_all().unwrap();
        assert_eq!(layer.present_bytes(), 0, "every chunk can be had alone");
        Self {
            layer,
            bytes,
            starts,
            _dir: dir,
        }
    }

    /// Reads a chunk alone, from nothing; the encoded bytes that it took, in one request.
    async fn read(&self, id: ChunkId) -> u64 {
        self.layer.file().evict_all().unwrap();
        let before = self.layer.counters();
        let priority = Priority::Profile;
        self.layer.fill_chunks(&[id], priority).await.unwrap();
        let after = self.layer.counters();
        assert_eq!(after.requests - before.requests, 1);
        self.assert_right(id);
        after.bytes_fetched - before.bytes_fetched
    }

    fn assert_right(&self, id: ChunkId) {
        let chunk = &self.layer.index().chunks[id as usize];
        let file = self
            .layer
            .index()
            .files
            .iter()
            .find(|file| file.path == b"file");
        let FileKind::Regular { data_offset, .. } = file.unwrap().kind else {
            panic!("it is a file");
        };
        let mut bytes = vec![0; chunk.len as usize];
        assert!(self.layer.try_read(chunk.data_offset, &mut bytes).unwrap());
        if let Some(at) = chunk.data_offset.checked_sub(data_offset) {
            let at = usize::try_from(at).unwrap();
            assert!(bytes == self.bytes[at..at + bytes.len()], "chunk {id}");
        }
    }

    fn chunks(&self) -> std::ops::Range<ChunkId> {
        0..ChunkId::try_from(self.layer.index().chunks.len()).unwrap()
    }

    /// The longest of the parts.
    fn longest(&self) -> u64 {
        let pairs = self.starts.windows(2).map(|pair| pair[1] - pair[0]);
        pairs.max().unwrap()
    }
}

#[tokio::test]
async fn a_read_of_zstd_fetches_the_frames_that_have_its_bytes() {
    // Shorter than a piece, about as long, and longer; none ends where a piece does.
    for part in [5000, 70_001, 300_000] {
        let compress = |part: &[u8]| zstd::encode_all(part, 3).unwrap();
        let world = World::new(part, compress).await;
        let frames = u64::try_from(PIECE.div_ceil(part) + 1).unwrap();
        for id in world.chunks() {
            let chunk = &world.layer.index().chunks[id as usize];
            let Encoding::ZstdFrame { blob, skip } = chunk.encoding else {
                panic!("{:?}", chunk.encoding);
            };
            assert!(world.starts.contains(&blob.start()), "{part}: chunk {id}");
            assert!(skip < part as u64, "{part}: chunk {id} skips {skip}");
            let fetched = world.read(id).await;
            let most = frames * world.longest();
            assert!(
                fetched <= most,
                "{part}: chunk {id} took {fetched} of {most}"
            );
        }
        world.layer.fill_all().await.unwrap();
        world.chunks().for_each(|id| world.assert_right(id));
    }
}

#[tokio::test]
async fn gzip_of_many_members_is_entered_where_they_begin_without_a_window() {
    for part in [8 << 10, 100_000] {
        let compress = |part: &[u8]| MemberCompressor::new(6).compress(part);
        let world = World::new(part, compress).await;
        let (index, file) = (world.layer.index(), world.layer.file());
        assert!(index.spans.len() > 4, "{}", index.spans.len());
        let mut begun = 0;
        for (number, span) in (0..).zip(&index.spans) {
            let before = world.starts.partition_point(|start| *start <= span.start);
            // Behind the header that the compressor writes.
            let is_begun = span.start == world.starts[before - 1] + GZIP_HEADER_LEN;
            begun += usize::from(is_begun);
            let window = &file.span_details(number).unwrap().window;
            assert!(!is_begun || window.is_empty(), "{part}: span {number}");
        }
        // Where members are short, each span does; else most begin inside one.
        let is_short = part < 32 << 10;
        assert_eq!(begun == index.spans.len(), is_short, "{part}: {begun}");
        for id in world.chunks().rev() {
            let blob = index.chunks[id as usize].encoding.blob().unwrap();
            let fetched = world.read(id).await;
            assert_eq!(fetched, blob.len(), "{part}: chunk {id}");
        }
        // All that is before a piece in its span, and it.
        let most = (512 << 10) + 2 * part as u64 + PIECE as u64;
        let span = |id: ChunkId| index.chunks[id as usize].encoding.blob().unwrap().len();
        assert!(world.chunks().all(|id| span(id) <= most), "{part}");
    }
}
