//! The layers that scenarios make.

use std::sync::LazyLock;

use lazarette_fetcher::Result;
use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::index::estargz;
use lazarette_fetcher::index::ingest::{Ingest, IngestPlan, LayerSink};
use lazarette_fetcher::index::wire::Header;
use lazarette_fetcher::index::{ChunkId, Encoding, LayerFormat, LayerIndex, Span, wire};
use lazarette_fetcher::source::BlobRef;
use lazarette_fetcher::store::{LayerFile, PartialIndex};
use lazarette_fetcher::test_util::content::{noise, tar};
use lazarette_fetcher::test_util::layers::{CHUNK_LEN, chunk_bytes, layer_of};
use lazarette_fetcher::types::{ByteRange, Digest, Reference};

pub(crate) const CHUNKS: u32 = 5;

/// The layers of the scenario `copy`: large enough for their blocks to be shared.
pub(crate) const LARGE: [&str; 2] = ["large", "other large"];
/// Layers of the same chunks as those of other scenarios, which take them from there.
pub(crate) const TAKERS: [&str; 2] = ["taker", "large taker"];
pub(crate) const LARGE_LEN: u32 = 33_000;
/// The layer of the scenario `ingest past the page cache`: longer than one write of it.
pub(crate) const PAST: &str = "past";
/// The layer of the scenario `shape`.
pub(crate) const STREAMED: &str = "streamed";
/// The layer of the scenario `shape members`.
const MEMBER: &str = "member";

/// A layer of one file per chunk, with padding between them.
pub(crate) fn index(name: &str) -> LayerIndex {
    if LARGE.contains(&name) || name == TAKERS[1] {
        let bytes = |id| vec![u8::try_from(id + 1).unwrap(); LARGE_LEN as usize];
        return layer_of(name, &[bytes(0), bytes(1), bytes(2)]);
    }
    if name == PAST {
        return layer_of(name, &(0..CHUNKS).map(past_bytes).collect::<Vec<_>>());
    }
    layer_of(name, &(0..CHUNKS).map(chunk_bytes).collect::<Vec<_>>())
}

/// The bytes of chunk `id` of the layer [`PAST`].
pub(crate) fn past_bytes(id: ChunkId) -> Vec<u8> {
    chunk_bytes(id).repeat(50)
}

/// The same layer with two spans, whose details came without it; and those.
pub(crate) fn index_without_details(name: &str) -> (PartialIndex, [Vec<u8>; 2]) {
    let mut index = index(name);
    index.format = LayerFormat::Gzip;
    let span_of = |id: u32| u32::from(id >= 3);
    for (id, chunk) in (0..).zip(&mut index.chunks) {
        let span = span_of(id);
        chunk.encoding = Encoding::GzipSpan {
            blob: ByteRange::new(u64::from(span) * 300, u64::from(id + 1) * 100).unwrap(),
            skip: u64::from(id - span * 3) * u64::from(CHUNK_LEN),
            span,
        };
        chunk.chunk_digest = None;
    }
    let digests = |ids: std::ops::Range<u32>| {
        let digest = |id| Digest::sha256(&chunk_bytes(id)).as_bytes().to_vec();
        ids.flat_map(digest).collect::<Vec<u8>>()
    };
    let details = [digests(0..3), digests(3..CHUNKS)];
    let mut start = 0;
    for (span, details) in (0_u32..).zip(&details) {
        let len = details.len() as u64;
        index.spans.push(Span {
            start: u64::from(span) * 300,
            bits: 0,
            first_chunk: span * 3,
            chunk_count: u32::try_from(details.len() / 32).unwrap(),
            details: ByteRange::at(start, len).unwrap(),
            details_digest: Digest::sha256(details).as_bytes().try_into().unwrap(),
        });
        start += len;
    }
    let whole = wire::encode(&index, &details.concat()).unwrap();
    let head = Header::parse(&whole).unwrap().core_end();
    let origin = BlobRef {
        repository: Reference::parse("example.com/a:b")
            .unwrap()
            .repository()
            .clone(),
        digest: Digest::sha256(&whole),
        size: whole.len() as u64,
    };
    let head = whole[..usize::try_from(head).unwrap()].to_vec().into();
    let index = PartialIndex {
        index,
        head,
        origin,
    };
    (index, details)
}

/// The same layer, of whose chunks only encoded bytes have a promised digest.
pub(crate) fn index_of_whole_spans(name: &str) -> LayerIndex {
    let mut index = index(name);
    index.format = LayerFormat::Gzip;
    for chunk in &mut index.chunks {
        chunk.encoding = Encoding::WholeSpan {
            blob: ByteRange::at(0, 100).unwrap(),
            skip: chunk.data_offset,
            span: 0,
        };
        chunk.chunk_digest = None;
    }
    index.spans = vec![Span {
        start: 0,
        bits: 0,
        first_chunk: 0,
        chunk_count: CHUNKS,
        details: ByteRange::at(0, 32).unwrap(),
        details_digest: [0; 32],
    }];
    index
}

/// An eStargz layer of one member, its only file, which is verified whole.
pub(crate) struct OneMember {
    pub(crate) index: LayerIndex,
    pub(crate) details: Vec<u8>,
    pub(crate) blob: Vec<u8>,
    pub(crate) payload: Vec<u8>,
    /// What of it starts read.
    pub(crate) hot: ChunkId,
}

pub(crate) fn one_member() -> &'static OneMember {
    static ONE_MEMBER: LazyLock<OneMember> = LazyLock::new(|| {
        let payload = noise(2, 0x7f, 320 << 10);
        let blob = MemberCompressor::new(6).compress(&payload);
        let mut whole = layer_of(MEMBER, std::slice::from_ref(&payload));
        whole.blob_size = blob.len() as u64 + 1;
        for chunk in &mut whole.chunks {
            chunk.encoding = Encoding::GzipMember {
                blob: ByteRange::at(0, blob.len() as u64).unwrap(),
                skip: 0,
            };
        }
        let (index, details) = estargz::cut(whole).unwrap();
        assert_eq!(index.chunks.len(), CHUNKS as usize);
        OneMember {
            index,
            details,
            blob,
            payload,
            hot: 4,
        }
    });
    &ONE_MEMBER
}

/// Gives a layer that lacks details all of them.
pub(crate) fn complete_details(file: &LayerFile) -> Result<()> {
    if file.details_origin().is_none() {
        return Ok(());
    }
    let (_, details) = index_without_details("lazy");
    for (number, details) in (0..).zip(details) {
        file.put_details(number, details.into())?;
    }
    Ok(())
}

/// A gzip layer, streamed once, and what of it starts read.
pub(crate) struct Streamed {
    pub(crate) index: LayerIndex,
    pub(crate) details: Vec<u8>,
    pub(crate) seams: Option<Vec<u8>>,
    pub(crate) payload: Vec<u8>,
    pub(crate) hot: ChunkId,
}

/// Keeps payloads that follow one another.
struct Memory(Vec<u8>);

impl LayerSink for Memory {
    fn write_at(&mut self, _: u64, bytes: &[u8]) -> Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

pub(crate) fn streamed() -> &'static Streamed {
    static STREAMED: LazyLock<Streamed> = LazyLock::new(|| {
        let payload = noise(1, 0x7f, 320 << 10);
        let tar = tar(&[("file", &payload)]);
        let blob = MemberCompressor::new(6).compress(&tar);
        let plan = IngestPlan::new(Digest::sha256(&blob), blob.len() as u64, None);
        let mut ingest = Ingest::new(plan, Memory(Vec::new()));
        ingest.push(&blob).unwrap();
        let ingested = ingest.finish().unwrap();
        assert_eq!(ingested.sink.0, payload);
        Streamed {
            index: ingested.index,
            details: ingested.details.to_vec(),
            seams: ingested.seams,
            payload,
            hot: 4,
        }
    });
    &STREAMED
}
