//! One fetch per chunk, cancellation, faults, and reads against a plain copy.

use std::collections::VecDeque;
use std::io::Write as _;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Notify;

use super::*;
use crate::index::{Chunk, FileEntry, FileKind, LayerFormat, Timestamp};
use crate::source::{Body, Document};
use crate::store::Store;
use crate::types::{Descriptor, Digest, Reference, Repository};

/// What the source does to one ranged read.
#[derive(Debug, Clone, Copy)]
enum Act {
    Serve,
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
struct TestSource {
    blob: Bytes,
    script: Mutex<VecDeque<Act>>,
    random: Mutex<Option<StdRng>>,
    /// Reads wait until this is true.
    gate: tokio::sync::watch::Sender<bool>,
    arrived: Notify,
}

impl TestSource {
    fn new(blob: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            blob: blob.into(),
            script: Mutex::default(),
            random: Mutex::new(None),
            gate: tokio::sync::watch::Sender::new(true),
            arrived: Notify::new(),
        })
    }

    fn script(&self, acts: &[Act]) {
        self.script.lock().extend(acts);
    }

    fn next_act(&self) -> Act {
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

fn unavailable() -> Error {
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

    async fn read_range(&self, _: &BlobRef, range: ByteRange) -> Result<Body> {
        self.arrived.notify_one();
        let mut gate = self.gate.subscribe();
        gate.wait_for(|open| *open)
            .await
            .map_err(|_| unavailable())?;
        let at = |n: u64| usize::try_from(n).unwrap();
        let mut bytes = self.blob[at(range.start())..at(range.end())].to_vec();
        let half = bytes.len() / 2;
        let mut end = None;
        match self.next_act() {
            Act::Serve => {}
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
            .chunks(777)
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        pieces.extend(end);
        Ok(futures_util::stream::iter(pieces).boxed())
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
struct Sample {
    index: LayerIndex,
    blob: Vec<u8>,
    data: Vec<u8>,
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Files of the given members; a member is a list of files, a file a list of chunk lengths.
fn sample(members: &[&[u32]]) -> Sample {
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
                chunk_digest: Digest::sha256(&payload).as_bytes().try_into().unwrap(),
            });
            files.push(FileEntry {
                path: format!("f{}", files.len()).into_bytes(),
                kind: FileKind::Regular {
                    size: u64::from(len),
                    data_offset,
                },
                mode: 0o644,
                uid: 0,
                gid: 0,
                mtime: Timestamp::default(),
                xattrs: Vec::new(),
            });
        }
    }
    let index = LayerIndex {
        blob_digest: Digest::sha256(&blob),
        blob_size: blob.len() as u64,
        format: LayerFormat::Estargz,
        files,
        chunks,
        data_len: data.len() as u64,
    };
    Sample { index, blob, data }
}

struct Bench {
    sample: Sample,
    source: Arc<TestSource>,
    layer: Arc<Layer>,
    store: Arc<Store>,
    dir: tempfile::TempDir,
}

fn bench(members: &[&[u32]], config: LayerConfig) -> Bench {
    let sample = sample(members);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let layer = join(&store, &sample, &source, config);
    Bench {
        sample,
        source,
        layer,
        store,
        dir,
    }
}

fn join(
    store: &Arc<Store>,
    sample: &Sample,
    source: &Arc<TestSource>,
    config: LayerConfig,
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
    Layer::with_config(
        file,
        Arc::clone(source) as Arc<dyn BlobSource>,
        blob,
        config,
    )
}

/// One request per member, to count by.
fn unmerged() -> LayerConfig {
    LayerConfig {
        plan: PlanLimits {
            gap_bytes_max: 0,
            request_bytes_max: 1,
            total_bytes_max: u64::MAX,
        },
        ..LayerConfig::default()
    }
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::at(start, len).unwrap()
}

impl Bench {
    /// Reads the range if it is present and compares it with the plain copy.
    fn read(&self, range: ByteRange) -> bool {
        let mut buf = vec![0xee; usize::try_from(range.len()).unwrap()];
        let read = self.layer.try_read(range.start(), &mut buf).unwrap();
        let at = |n: u64| usize::try_from(n).unwrap();
        if read {
            assert!(buf == self.sample.data[at(range.start())..at(range.end())]);
        }
        read
    }
}

#[tokio::test]
async fn fifty_readers_of_one_chunk_cost_one_request() {
    let bench = bench(&[&[5000], &[70_000], &[10]], unmerged());
    bench.source.gate.send_replace(false);
    let at = bench.sample.index.chunks[1].data_offset;
    let readers: Vec<_> = (0..50)
        .map(|n| {
            let layer = Arc::clone(&bench.layer);
            tokio::spawn(async move { layer.fill(range(at + n * 100, 50)).await })
        })
        .collect();
    bench.source.arrived.notified().await;
    tokio::task::yield_now().await;
    bench.source.gate.send_replace(true);
    for reader in readers {
        reader.await.unwrap().unwrap();
    }
    assert!(bench.read(range(at, 70_000)));
    let counters = bench.layer.counters();
    assert_eq!((counters.requests, counters.chunks_filled), (1, 1));
    let Encoding::GzipMember { blob, .. } = bench.sample.index.chunks[1].encoding else {
        unreachable!()
    };
    assert_eq!(counters.bytes_fetched, blob.len());
    assert!(bench.layer.shared.inflight.is_empty());
}

#[tokio::test]
async fn a_reader_that_goes_away_stops_nobody_else() {
    let bench = bench(&[&[5000]], unmerged());
    bench.source.gate.send_replace(false);
    let mut first = Box::pin(bench.layer.fill(range(0, 10)));
    assert!(futures_util::poll!(&mut first).is_pending());
    bench.source.arrived.notified().await;
    let second = bench.layer.fill(range(100, 10));
    drop(first);
    bench.source.gate.send_replace(true);
    second.await.unwrap();
    assert_eq!(bench.layer.counters().requests, 1);
    assert!(bench.read(range(0, 5000)));
}

#[tokio::test]
async fn chunks_of_one_member_come_together_and_neighbours_merge() {
    let bench = bench(
        &[&[5000, 6000, 7000], &[100], &[9000]],
        LayerConfig::default(),
    );
    let second = bench.sample.index.chunks[1].data_offset;
    bench.layer.fill(range(second, 1)).await.unwrap();
    assert_eq!(bench.layer.counters().chunks_filled, 3);
    assert!(bench.read(range(0, second + 6000)));
    bench.layer.fill_all().await.unwrap();
    let counters = bench.layer.counters();
    assert_eq!((counters.requests, counters.chunks_filled), (2, 5));
    assert_eq!(counters.bytes_fetched, bench.sample.index.blob_size);
    assert!(bench.layer.file().is_complete());
    assert!(bench.read(range(0, bench.sample.index.data_len)));
}

#[tokio::test]
async fn read_ahead_fetches_more_and_waits_for_less() {
    let config = LayerConfig {
        read_ahead_bytes: 8192,
        ..unmerged()
    };
    let bench = bench(&[&[4096], &[4096], &[4096], &[4096]], config);
    bench.layer.fill(range(0, 4096)).await.unwrap();
    bench.layer.fill(range(4096, 8192)).await.unwrap();
    bench.layer.close().await.unwrap();
    assert!(bench.layer.counters().requests >= 3);
    assert!(bench.read(range(0, 12_288)));
}

#[tokio::test]
async fn corrupt_bytes_are_fetched_once_more_and_then_an_error() {
    let bench = bench(&[&[5000], &[6000]], unmerged());
    bench.source.script(&[Act::Corrupt]);
    bench.layer.fill(range(0, 1)).await.unwrap();
    let counters = bench.layer.counters();
    assert_eq!((counters.requests, counters.chunks_corrupt), (2, 1));
    assert!(bench.read(range(0, 5000)));
    bench.source.script(&[Act::Corrupt, Act::Corrupt]);
    let error = bench.layer.fill(range(8192, 1)).await.unwrap_err();
    let corrupt = matches!(error, Error::Corrupt { .. } | Error::Malformed { .. });
    assert!(corrupt, "{error}");
    assert!(!bench.read(range(8192, 1)));
    bench.layer.fill(range(8192, 1)).await.unwrap();
    assert!(bench.read(range(8192, 6000)), "errors are not kept");
}

#[tokio::test]
async fn one_bad_chunk_of_a_member_does_not_take_the_others() {
    let mut sample = sample(&[&[5000, 6000, 7000]]);
    sample.index.chunks[1].chunk_digest = [9; 32];
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let layer = join(&store, &sample, &source, unmerged());
    layer.fill(range(0, 1)).await.unwrap();
    layer.fill(range(16_384, 1)).await.unwrap();
    let error = layer.fill(range(8192, 1)).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(
        error.to_string().contains("chunk 1 of layer sha256:"),
        "{error}"
    );
}

#[tokio::test]
async fn every_waiter_gets_the_error_and_what_to_do() {
    let table: [(Act, &str); 4] = [
        (Act::Truncate, "the body ended at byte"),
        (Act::Break, "scripted"),
        (Act::Refuse, "scripted"),
        (Act::NoRanges, "--full"),
    ];
    for (act, says) in table {
        let bench = bench(&[&[5000]], unmerged());
        bench.source.gate.send_replace(false);
        bench.source.script(&[act]);
        let mut first = Box::pin(bench.layer.fill(range(0, 10)));
        let mut second = Box::pin(bench.layer.fill(range(20, 10)));
        assert!(futures_util::poll!(&mut first).is_pending());
        assert!(futures_util::poll!(&mut second).is_pending());
        bench.source.gate.send_replace(true);
        for waiter in [first, second] {
            let error = waiter.await.unwrap_err().to_string();
            assert!(error.contains(says), "{act:?}: {error}");
        }
        assert_eq!(bench.layer.counters().requests, 1);
        assert!(bench.layer.shared.inflight.is_empty());
    }
}

#[tokio::test]
async fn a_layer_that_can_only_be_streamed_says_so() {
    let mut sample = sample(&[&[5000]]);
    sample.index.format = LayerFormat::Gzip;
    sample.index.chunks[0].encoding = Encoding::Stream;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let layer = join(&store, &sample, &source, unmerged());
    let error = layer.fill(range(0, 1)).await.unwrap_err();
    assert!(error.to_string().contains("--full"), "{error}");
    assert_eq!(layer.counters().requests, 0);
}

#[tokio::test]
async fn closing_ends_fetches_and_waiters() {
    let bench = bench(&[&[5000]], unmerged());
    bench.source.gate.send_replace(false);
    let mut waiter = Box::pin(bench.layer.fill(range(0, 10)));
    assert!(futures_util::poll!(&mut waiter).is_pending());
    bench.source.arrived.notified().await;
    bench.layer.close().await.unwrap();
    let error = waiter.await.unwrap_err();
    assert!(error.to_string().contains("closed"), "{error}");
    assert!(bench.layer.shared.inflight.is_empty());
}

#[tokio::test]
async fn permits_bound_what_is_held_in_memory() {
    let config = LayerConfig {
        memory_bytes_max: 512 << 10,
        requests_max: 16,
        ..unmerged()
    };
    let members: Vec<&[u32]> = vec![&[60_000]; 40];
    let bench = bench(&members, config);
    let total = bench.layer.shared.memory.available_permits() as u64 * 4096;
    assert_eq!(total, 512 << 10);
    bench.source.gate.send_replace(false);
    let fill = bench.layer.fill(range(0, bench.sample.index.data_len));
    let mut fill = Box::pin(fill);
    assert!(futures_util::poll!(&mut fill).is_pending());
    bench.source.arrived.notified().await;
    // Each request needs over 60,000 bytes decoded, encoded twice, and a piece.
    let under_way = bench.layer.counters().requests;
    assert!(
        (1..=4).contains(&under_way),
        "{under_way} requests hold memory"
    );
    bench.source.gate.send_replace(true);
    fill.await.unwrap();
    assert!(bench.read(range(0, bench.sample.index.data_len)));
    bench.layer.close().await.unwrap();
    let after = bench.layer.shared.memory.available_permits() as u64 * 4096;
    assert_eq!(after, total);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn random_reads_under_faults_equal_a_plain_copy() {
    for seed in 0..6 {
        let members: Vec<&[u32]> = vec![&[10, 5000, 1], &[30_000], &[4096, 4096], &[70_000], &[1]];
        let config = if seed % 2 == 0 {
            LayerConfig::default()
        } else {
            unmerged()
        };
        let bench = Arc::new(bench(&members, config));
        *bench.source.random.lock() = Some(StdRng::seed_from_u64(seed));
        let readers: Vec<_> = (0..4)
            .map(|reader| tokio::spawn(random_reads(Arc::clone(&bench), seed * 10 + reader)))
            .collect();
        for reader in readers {
            reader.await.unwrap();
        }
        assert!(bench.layer.shared.inflight.is_empty());
        *bench.source.random.lock() = None;
        bench.layer.fill_all().await.unwrap();
        assert!(bench.read(range(0, bench.sample.index.data_len)));
        reopened_equals(&bench);
    }
}

async fn random_reads(bench: Arc<Bench>, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..60 {
        let start = rng.random_range(0..bench.sample.index.data_len);
        let len = rng.random_range(0..=(bench.sample.index.data_len - start).min(9000));
        let wanted = range(start, len);
        match bench.layer.fill(wanted).await {
            Ok(()) => assert!(bench.read(wanted), "filled {wanted} is not present"),
            // Whatever is present is right all the same.
            Err(_) => drop(bench.read(wanted)),
        }
    }
}

/// A second process on the same root sees all of it.
fn reopened_equals(bench: &Bench) {
    let other = Store::open(bench.dir.path()).unwrap();
    let file = other.open_layer(&bench.sample.index.blob_digest);
    let file = file.unwrap().unwrap();
    let mut buf = vec![0; bench.sample.data.len()];
    assert!(file.read_at(0, &mut buf).unwrap());
    assert!(buf == bench.sample.data);
    drop(Arc::clone(&bench.store));
}
