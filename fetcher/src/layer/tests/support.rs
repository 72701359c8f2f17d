//! A source that can be held back and broken, and layers of random files to read from it.

use std::collections::VecDeque;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Notify;

use crate::index::{Chunk, Encoding, LayerFormat, LayerIndex};
use crate::layer::{EngineConfig, FetchEngine, Layer, LayerConfig};
use crate::plan::PlanLimits;
use crate::source::{BlobRef, BlobSource, Body, Document};
use crate::store::Store;
use crate::test_util::layers::regular_file;
use crate::types::{ByteRange, Descriptor, Digest, Reference, Repository};
use crate::{Error, Result};

/// What the source does to one ranged read.
#[derive(Debug, Clone, Copy)]
pub(super) enum Act {
    Serve,
    /// Never answer.
    Stall,
    /// Flip a bit in the middle.
    Corrupt,
    /// End after half.
    Truncate,
    /// Fail after half.
    Break,
    /// Fail at once.
    Refuse,
    /// Say that ranges are not possible.
    NoRanges,
}

/// A blob that can be held back and broken.
pub(super) struct TestSource {
    pub(super) blob: Bytes,
    pub(super) script: Mutex<VecDeque<Act>>,
    pub(super) random: Mutex<Option<StdRng>>,
    /// Reads wait until this is true.
    pub(super) gate: tokio::sync::watch::Sender<bool>,
    /// Only reads that begin before this offset wait for the gate.
    pub(super) gated_to: Mutex<u64>,
    /// Bodies end their wait for the gate only after this many bytes.
    pub(super) free_bytes: Mutex<usize>,
    pub(super) piece_bytes: Mutex<usize>,
    pub(super) arrived: Notify,
    pub(super) asked: Mutex<Vec<ByteRange>>,
    /// How often it was told that its bytes were not the blob's.
    pub(super) distrusted: AtomicU64,
}

impl TestSource {
    pub(super) fn new(blob: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            blob: blob.into(),
            script: Mutex::default(),
            random: Mutex::new(None),
            gate: tokio::sync::watch::Sender::new(true),
            gated_to: Mutex::new(u64::MAX),
            free_bytes: Mutex::new(0),
            piece_bytes: Mutex::new(777),
            arrived: Notify::new(),
            asked: Mutex::default(),
            distrusted: AtomicU64::new(0),
        })
    }

    pub(super) fn script(&self, acts: &[Act]) {
        self.script.lock().extend(acts);
    }

    pub(super) fn next_act(&self) -> Act {
        if let Some(act) = self.script.lock().pop_front() {
            return act;
        }
        let mut random = self.random.lock();
        let roll = random.as_mut().map(|rng| rng.random_range(0..12));
        match roll {
            Some(0) => Act::Corrupt,
            Some(1) => Act::Truncate,
            Some(2) => Act::Break,
            Some(3) => Act::Refuse,
            _ => Act::Serve,
        }
    }
}

pub(super) fn unavailable() -> Error {
    Error::Unavailable {
        what: "a test blob".to_owned(),
        host: "localhost".to_owned(),
        detail: "scripted".to_owned(),
    }
}

#[async_trait]
impl BlobSource for TestSource {
    async fn resolve(&self, _: &Reference) -> Result<Document> {
        Err(unavailable())
    }

    async fn stat(&self, _: &Repository, _: &Digest) -> Result<u64> {
        Ok(self.blob.len() as u64)
    }

    fn distrust(&self, _: &BlobRef) {
        self.distrusted.fetch_add(1, Ordering::Relaxed);
    }

    async fn read_range(&self, _: &BlobRef, range: ByteRange) -> Result<Body> {
        self.asked.lock().push(range);
        self.arrived.notify_one();
        let mut gate = self.gate.subscribe();
        let free = *self.free_bytes.lock();
        let gated = range.start() < *self.gated_to.lock();
        if gated && free == 0 {
            gate.wait_for(|open| *open)
                .await
                .map_err(|_| unavailable())?;
        }
        let at = |n: u64| usize::try_from(n).unwrap();
        let mut bytes = self.blob[at(range.start())..at(range.end())].to_vec();
        let half = bytes.len() / 2;
        let mut end = None;
        match self.next_act() {
            Act::Serve => {}
            Act::Stall => std::future::pending().await,
            Act::Corrupt => bytes[half] ^= 1,
            Act::Truncate => bytes.truncate(half),
            Act::Break => {
                bytes.truncate(half);
                end = Some(Err(unavailable()));
            }
            Act::Refuse => return Err(unavailable()),
            Act::NoRanges => {
                return Err(Error::Unsupported {
                    what: "a ranged read".to_owned(),
                    detail: "the registry ignores Range".to_owned(),
                });
            }
        }
        let mut pieces: Vec<Result<Bytes>> = bytes
            .chunks(*self.piece_bytes.lock())
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        pieces.extend(end);
        if free == 0 {
            return Ok(futures_util::stream::iter(pieces).boxed());
        }
        let body = futures_util::stream::unfold(
            (pieces.into_iter(), 0, gate),
            move |(mut pieces, mut sent, mut gate)| async move {
                if sent >= free {
                    gate.wait_for(|open| *open).await.ok()?;
                }
                let piece = pieces.next()?;
                sent += piece.as_ref().map_or(0, Bytes::len);
                Some((piece, (pieces, sent, gate)))
            },
        );
        Ok(body.boxed())
    }

    async fn read_all(&self, _: &BlobRef) -> Result<Body> {
        Err(unavailable())
    }

    async fn referrers(
        &self,
        _: &Repository,
        _: &Digest,
        _: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        Ok(Vec::new())
    }
}

/// A layer of random files and the plain copy of its data.
pub(super) struct Sample {
    pub(super) index: LayerIndex,
    pub(super) blob: Vec<u8>,
    pub(super) data: Vec<u8>,
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Files of the given members; a member is a list of files, a file a list of chunk lengths.
pub(super) fn sample(members: &[&[u32]]) -> Sample {
    let mut rng = StdRng::seed_from_u64(members.len() as u64);
    let (mut blob, mut data) = (Vec::new(), Vec::new());
    let (mut files, mut chunks) = (Vec::new(), Vec::new());
    for lens in members {
        let mut plain = Vec::new();
        let mut places = Vec::new();
        for len in *lens {
            // What a tar header would be: bytes of the member that no chunk covers.
            plain.extend_from_slice(&[0x55; 512]);
            let payload: Vec<u8> = (0..*len).map(|_| rng.random_range(b'a'..=b'p')).collect();
            data.resize(data.len().next_multiple_of(4096), 0);
            places.push((plain.len() as u64, data.len() as u64, payload.clone()));
            plain.extend_from_slice(&payload);
            data.extend_from_slice(&payload);
        }
        let encoded = gzip(&plain);
        let range = ByteRange::at(blob.len() as u64, encoded.len() as u64).unwrap();
        blob.extend(encoded);
        for (skip, data_offset, payload) in places {
            let len = u32::try_from(payload.len()).unwrap();
            chunks.push(Chunk {
                encoding: Encoding::GzipMember { blob: range, skip },
                data_offset,
                len,
                chunk_digest: Digest::sha256(&payload).as_bytes().try_into().ok(),
            });
            let path = format!("f{}", files.len());
            files.push(regular_file(&path, u64::from(len), data_offset));
        }
    }
    let index = LayerIndex {
        blob_digest: Digest::sha256(&blob),
        blob_size: blob.len() as u64,
        format: LayerFormat::Estargz,
        files,
        chunks,
        spans: Vec::new(),
        data_len: data.len() as u64,
    };
    Sample { index, blob, data }
}

pub(super) struct Bench {
    pub(super) sample: Sample,
    pub(super) source: Arc<TestSource>,
    pub(super) layer: Arc<Layer>,
    pub(super) store: Arc<Store>,
    pub(super) dir: tempfile::TempDir,
}

pub(super) fn bench(members: &[&[u32]], config: LayerConfig) -> Bench {
    bench_within(members, config, patient())
}

/// Sends nothing twice, however long a source is held back.
pub(super) fn patient() -> EngineConfig {
    EngineConfig {
        late_after_min: Duration::from_secs(3600),
        ..EngineConfig::default()
    }
}

pub(super) fn bench_within(members: &[&[u32]], config: LayerConfig, bounds: EngineConfig) -> Bench {
    let sample = sample(members);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let engine = FetchEngine::new(bounds);
    let layer = join_with(&store, &sample, &source, config, engine);
    Bench {
        sample,
        source,
        layer,
        store,
        dir,
    }
}

pub(super) fn join(
    store: &Arc<Store>,
    sample: &Sample,
    source: &Arc<TestSource>,
    config: LayerConfig,
) -> Arc<Layer> {
    let engine = FetchEngine::new(patient());
    join_with(store, sample, source, config, engine)
}

pub(super) fn join_with(
    store: &Arc<Store>,
    sample: &Sample,
    source: &Arc<TestSource>,
    config: LayerConfig,
    engine: Arc<FetchEngine>,
) -> Arc<Layer> {
    let file = store.create_layer(sample.index.clone()).unwrap();
    let blob = BlobRef {
        repository: Reference::parse("localhost/x")
            .unwrap()
            .repository()
            .clone(),
        digest: sample.index.blob_digest,
        size: sample.index.blob_size,
    };
    let source = Arc::clone(source) as Arc<dyn BlobSource>;
    let layer = Layer::with_engine(file, source, blob, config, engine);
    // Tests count requests; those of what is foreseen turn it on.
    layer.set_foresight(false);
    layer
}

/// One request per member, to count by.
pub(super) fn unmerged() -> LayerConfig {
    LayerConfig {
        plan: PlanLimits {
            parts_max: 1,
            gap_bytes_max: 0,
            wanted_per_gap: 0,
            request_bytes_max: 1,
            total_bytes_max: u64::MAX,
        },
        read_ahead_encoded_bytes_max: 0,
        ..LayerConfig::default()
    }
}

pub(super) fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::at(start, len).unwrap()
}

impl Bench {
    /// The chunk at which each request of the source so far began, of one chunk a member.
    pub(super) fn asked(&self) -> Vec<usize> {
        let chunks = &self.sample.index.chunks;
        let begins = |chunk: &Chunk| chunk.encoding.blob().map(|blob| blob.start());
        let asked = self.source.asked.lock();
        let asked = asked.iter().map(|range| Some(range.start()));
        asked
            .map(|at| chunks.iter().position(|chunk| begins(chunk) == at))
            .map(|id| id.expect("requests begin at members"))
            .collect()
    }

    /// Waits for the fetches that nobody waits for.
    pub(super) async fn quiet(&self) {
        let quiet = async {
            while !self.layer.shared.inflight.is_empty() {
                tokio::task::yield_now().await;
            }
        };
        let quiet = tokio::time::timeout(Duration::from_secs(60), quiet);
        quiet.await.expect("every claim ends");
    }

    /// Reads the range if it is present and compares it with the plain copy.
    pub(super) fn read(&self, range: ByteRange) -> bool {
        let mut buf = vec![0xee; usize::try_from(range.len()).unwrap()];
        let read = self.layer.try_read(range.start(), &mut buf).unwrap();
        let at = |n: u64| usize::try_from(n).unwrap();
        if read {
            assert!(buf == self.sample.data[at(range.start())..at(range.end())]);
        }
        read
    }
}
