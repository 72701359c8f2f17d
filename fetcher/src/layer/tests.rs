//! One fetch per chunk, cancellation, faults, and reads against a plain copy.

use std::collections::VecDeque;
use std::io::Write as _;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Notify;

use super::*;
use crate::index::{Chunk, Encoding, LayerFormat};
use crate::source::{Body, Document};
use crate::store::Store;
use crate::test_util::layers::regular_file;
use crate::types::{Descriptor, Digest, Reference, Repository};

/// What the source does to one ranged read.
#[derive(Debug, Clone, Copy)]
enum Act {
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
struct TestSource {
    blob: Bytes,
    script: Mutex<VecDeque<Act>>,
    random: Mutex<Option<StdRng>>,
    /// Reads wait until this is true.
    gate: tokio::sync::watch::Sender<bool>,
    /// Only reads that begin before this offset wait for the gate.
    gated_to: Mutex<u64>,
    /// Bodies end their wait for the gate only after this many bytes.
    free_bytes: Mutex<usize>,
    piece_bytes: Mutex<usize>,
    arrived: Notify,
    asked: Mutex<Vec<ByteRange>>,
}

impl TestSource {
    fn new(blob: Vec<u8>) -> Arc<Self> {
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

struct Bench {
    sample: Sample,
    source: Arc<TestSource>,
    layer: Arc<Layer>,
    store: Arc<Store>,
    dir: tempfile::TempDir,
}

fn bench(members: &[&[u32]], config: LayerConfig) -> Bench {
    bench_within(members, config, patient())
}

/// Sends nothing twice, however long a source is held back.
fn patient() -> EngineConfig {
    EngineConfig {
        late_after_min: Duration::from_secs(3600),
        ..EngineConfig::default()
    }
}

fn bench_within(members: &[&[u32]], config: LayerConfig, bounds: EngineConfig) -> Bench {
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

fn join(
    store: &Arc<Store>,
    sample: &Sample,
    source: &Arc<TestSource>,
    config: LayerConfig,
) -> Arc<Layer> {
    let engine = FetchEngine::new(patient());
    join_with(store, sample, source, config, engine)
}

fn join_with(
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
    Layer::with_engine(file, source, blob, config, engine)
}

/// One request per member, to count by.
fn unmerged() -> LayerConfig {
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

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::at(start, len).unwrap()
}

impl Bench {
    /// The chunk at which each request of the source so far began, of one chunk a member.
    fn asked(&self) -> Vec<usize> {
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
    async fn quiet(&self) {
        let quiet = async {
            while !self.layer.shared.inflight.is_empty() {
                tokio::task::yield_now().await;
            }
        };
        let quiet = tokio::time::timeout(Duration::from_secs(60), quiet);
        quiet.await.expect("every claim ends");
    }

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

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_readers_of_a_cold_file_fetch_every_chunk_once() {
    let members: Vec<&[u32]> = vec![&[9000, 300]; 60];
    for (config, is_filled) in [(unmerged(), true), (LayerConfig::default(), false)] {
        let bench = bench(&members, config);
        let background = Arc::clone(&bench.layer);
        let background = tokio::spawn(async move {
            match is_filled {
                true => background.fill_all().await,
                false => Ok(()),
            }
        });
        let end = bench.sample.index.data_len;
        let readers: Vec<_> = (0..50)
            .map(|n| {
                let layer = Arc::clone(&bench.layer);
                tokio::spawn(async move {
                    for at in 0..end / 1000 {
                        // Some forwards, some backwards.
                        let at = if n % 2 == 0 { at } else { end / 1000 - 1 - at };
                        layer.fill(range(at * 1000, 1000)).await?;
                    }
                    Ok::<(), Error>(())
                })
            })
            .collect();
        for reader in readers {
            reader.await.unwrap().unwrap();
        }
        background.await.unwrap().unwrap();
        bench.layer.close().await.unwrap();
        let counters = bench.layer.counters();
        assert_eq!(counters.chunks_filled, 120);
        assert_eq!(counters.bytes_fetched, bench.sample.index.blob_size);
        assert!(bench.read(range(0, end)));
    }
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
    let config = LayerConfig {
        read_ahead_encoded_bytes_max: 0,
        ..LayerConfig::default()
    };
    let bench = bench(&[&[5000, 6000, 7000], &[100], &[9000]], config);
    let second = bench.sample.index.chunks[1].data_offset;
    bench.layer.fill(range(second, 1)).await.unwrap();
    bench.layer.fill_all().await.unwrap();
    let counters = bench.layer.counters();
    assert_eq!((counters.requests, counters.chunks_filled), (2, 5));
    assert_eq!(counters.bytes_fetched, bench.sample.index.blob_size);
    assert!(bench.layer.file().is_complete());
    assert!(bench.read(range(0, bench.sample.index.data_len)));
}

/// The table of chunks still names their places, which are holes now.
#[tokio::test]
async fn evicted_neighbours_come_along_again() {
    let bench = bench(
        &[&[3000], &[3000], &[3000], &[3000]],
        LayerConfig::default(),
    );
    let begin = bench.sample.index.chunks[0].data_offset;
    let counters = || bench.layer.counters();
    for round in 1..4 {
        bench.layer.fill(range(begin, 1)).await.unwrap();
        while !bench.layer.file().is_complete() {
            tokio::task::yield_now().await;
        }
        assert_eq!((counters().requests, counters().chunks_copied), (round, 0));
        bench.layer.flush().await.unwrap();
        bench.layer.file().evict_all().unwrap();
    }
}

#[tokio::test]
async fn small_followers_come_in_the_same_request_and_are_not_waited_for() {
    let bench = bench(
        &[&[3000], &[3000], &[3000], &[400_000], &[3000]],
        LayerConfig::default(),
    );
    let index = &bench.sample.index;
    // Let the wanted member through, and a little of the next; hold back the rest.
    let Encoding::GzipMember { blob, .. } = index.chunks[0].encoding else {
        unreachable!()
    };
    *bench.source.free_bytes.lock() = usize::try_from(blob.len()).unwrap() + 100;
    bench.source.gate.send_replace(false);
    bench.layer.fill(range(0, 1)).await.unwrap();
    assert!(bench.read(range(0, 3000)));
    assert!(!bench.read(range(4096, 3000)));
    let mut second = Box::pin(bench.layer.fill(range(4096, 1)));
    assert!(futures_util::poll!(&mut second).is_pending());
    bench.source.gate.send_replace(true);
    second.await.unwrap();
    bench.layer.fill(range(8192, 1)).await.unwrap();
    assert_eq!(bench.layer.counters().requests, 1, "all three in one");
    // The large one was not taken along, and takes the one behind it along.
    bench.layer.fill(range(12_288, 1)).await.unwrap();
    bench.quiet().await;
    assert_eq!(bench.layer.counters().requests, 2);
    assert!(bench.read(range(0, index.data_len)));
}

/// What a burst of small reads costs with and without followers. Prints, asserts counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_reads_in_a_row_cost_fewer_requests() {
    let members: Vec<&[u32]> = vec![&[4000]; 400];
    for (bytes, requests_max) in [(0, 400), (128 << 10, 30)] {
        let config = LayerConfig {
            read_ahead_encoded_bytes_max: bytes,
            ..LayerConfig::default()
        };
        let bench = bench(&members, config);
        let began = Instant::now();
        for n in 0..400 {
            let wanted = range(n * 4096, 4000);
            bench.layer.fill(wanted).await.unwrap();
            assert!(bench.read(wanted));
        }
        let (requests, took) = (bench.layer.counters().requests, began.elapsed());
        println!("ahead {bytes:>6}: 400 reads of 4000 bytes, {requests} requests, {took:?}");
        assert!(requests <= requests_max, "{requests}");
    }
}

#[tokio::test]
async fn a_reader_does_not_wait_for_a_background_fill() {
    let members: Vec<&[u32]> = vec![&[5000]; 40];
    let bounds = EngineConfig {
        background_max: 1,
        ..patient()
    };
    let bench = bench_within(&members, unmerged(), bounds);
    let index = bench.sample.index.clone();
    let start_of = |id: usize| index.chunks[id].encoding.blob().unwrap().start();
    // The source never answers for what the background asks first.
    bench.source.gate.send_replace(false);
    *bench.source.gated_to.lock() = start_of(1);
    let layer = Arc::clone(&bench.layer);
    let background = tokio::spawn(async move { layer.fill_all().await });
    bench.source.arrived.notified().await;
    for id in [39, 1, 20] {
        let wanted = range(index.chunks[id].data_offset, 5000);
        let filled = tokio::time::timeout(Duration::from_secs(60), bench.layer.fill(wanted));
        filled.await.expect("it must not wait").unwrap();
        assert!(bench.read(wanted));
    }
    let asked: Vec<u64> = bench
        .source
        .asked
        .lock()
        .iter()
        .map(ByteRange::start)
        .collect();
    assert_eq!(
        asked,
        [0, 39, 1, 20].map(start_of),
        "one request of the background"
    );
    // A reader of the very chunk it fetches waits for that one request, no more.
    let mut same = Box::pin(bench.layer.fill(range(0, 1)));
    assert!(futures_util::poll!(&mut same).is_pending());
    bench.source.gate.send_replace(true);
    same.await.unwrap();
    background.await.unwrap().unwrap();
    assert!(bench.layer.file().is_complete());
    assert_eq!(
        bench.layer.counters().requests,
        40,
        "nothing was fetched twice"
    );
    assert!(bench.read(range(0, index.data_len)));
}

#[tokio::test]
async fn a_background_fill_has_several_requests_under_way() {
    let members: Vec<&[u32]> = vec![&[5000]; 12];
    let bench = bench(&members, unmerged());
    bench.source.gate.send_replace(false);
    let mut fill = Box::pin(bench.layer.fill_all());
    while bench.source.asked.lock().len() < 3 {
        assert!(futures_util::poll!(&mut fill).is_pending());
        tokio::task::yield_now().await;
    }
    bench.source.gate.send_replace(true);
    fill.await.unwrap();
    assert!(bench.layer.file().is_complete());
    let mut asked = bench.asked();
    // Of those under way at once any may be sent first.
    for (place, number) in asked.iter().enumerate() {
        assert!(place.abs_diff(*number) < 3, "about in order: {asked:?}");
    }
    asked.sort_unstable();
    assert_eq!(asked, (0..12).collect::<Vec<_>>(), "once");
}

#[tokio::test]
async fn a_reader_is_answered_though_a_request_is_lost() {
    let hasty = EngineConfig {
        late_after_min: Duration::ZERO,
        ..EngineConfig::default()
    };
    let bench = bench_within(&[&[5000], &[5000], &[5000]], unmerged(), hasty);
    let table: [&[Act]; 3] = [
        &[Act::Stall, Act::Serve],
        &[Act::Stall, Act::Corrupt, Act::Stall, Act::Serve],
        &[Act::Serve],
    ];
    for (chunk, acts) in bench.sample.index.chunks.iter().zip(table) {
        bench.source.script(acts);
        let wanted = range(chunk.data_offset, 5000);
        bench.layer.fill(wanted).await.unwrap();
        assert!(bench.read(wanted));
    }
    bench.layer.close().await.unwrap();
    assert_eq!(bench.layer.shared.engine.memory_bytes(), 0);
}

#[tokio::test]
async fn one_error_of_two_is_not_an_answer() {
    let hasty = EngineConfig {
        late_after_min: Duration::ZERO,
        ..EngineConfig::default()
    };
    let bench = bench_within(&[&[5000]], unmerged(), hasty);
    bench.source.script(&[Act::Stall, Act::Refuse]);
    let mut fill = Box::pin(bench.layer.fill(range(0, 1)));
    while !bench.source.script.lock().is_empty() {
        assert!(futures_util::poll!(&mut fill).is_pending());
        tokio::task::yield_now().await;
    }
    assert!(
        futures_util::poll!(&mut fill).is_pending(),
        "the first may answer"
    );
    bench.layer.close().await.unwrap();
    assert!(fill.await.is_err());
}

#[tokio::test]
async fn nobody_but_readers_asks_again_and_they_not_for_ever() {
    let hasty = EngineConfig {
        late_after_min: Duration::ZERO,
        on_demand_max: 50,
        profile_max: 50,
        ..EngineConfig::default()
    };
    let members: Vec<&[u32]> = vec![&[5000]; 34];
    let bench = bench_within(&members, unmerged(), hasty);
    let ids: Vec<ChunkId> = (0..34).collect();
    bench.source.script(&[Act::Stall; 200]);
    let mut profile = Box::pin(bench.layer.fill_chunks(&ids[..4], Priority::Profile));
    assert!(futures_util::poll!(&mut profile).is_pending());
    let mut readers = Box::pin(bench.layer.fill_chunks(&ids[4..], Priority::OnDemand));
    // 30 first ones; four second ones are saved up, and one is earned by then.
    while bench.layer.counters().requests < 4 + 30 + 4 {
        assert!(futures_util::poll!(&mut readers).is_pending());
        tokio::task::yield_now().await;
    }
    let counters = bench.layer.counters();
    assert!(counters.second_tries <= 4 + 1, "{counters:?}");
    bench.layer.close().await.unwrap();
    assert!(readers.await.is_err() && profile.await.is_err());
    assert_eq!(bench.layer.shared.engine.memory_bytes(), 0);
}

#[tokio::test]
async fn a_reader_hurries_on_what_a_profile_has_in_line() {
    let members: Vec<&[u32]> = vec![&[5000]; 60];
    let bounds = EngineConfig {
        profile_max: 1,
        ..patient()
    };
    let bench = bench_within(&members, unmerged(), bounds);
    bench.source.gate.send_replace(false);
    let all: Vec<ChunkId> = (0..60).collect();
    let mut profile = Box::pin(bench.layer.fill_chunks(&all, Priority::Profile));
    assert!(futures_util::poll!(&mut profile).is_pending());
    bench.source.arrived.notified().await;
    // One is in line, the other one of those that have no place in it yet.
    let at = |id: usize| bench.sample.index.chunks[id].data_offset;
    let mut readers = [7, 55].map(|id| Box::pin(bench.layer.fill(range(at(id), 1))));
    for reader in &mut readers {
        assert!(futures_util::poll!(reader).is_pending());
    }
    bench.source.arrived.notified().await;
    assert_eq!(bench.asked(), [0, 7], "at once, beside the other");
    bench.source.gate.send_replace(true);
    futures_util::future::try_join_all(readers).await.unwrap();
    profile.await.unwrap();
    assert_eq!(bench.asked().len(), 60, "nothing was fetched twice");
    let place = bench.asked().iter().position(|id| *id == 55).unwrap();
    assert!(place < 5, "it went {place}th");
}

/// Two layers of one engine: what one fills for nobody waits for a reader of the other.
#[tokio::test]
async fn a_background_request_under_way_yields_after_its_chunk() {
    for pause_max in [Duration::ZERO, Duration::from_secs(3600)] {
        let bounds = EngineConfig {
            background_max: 1,
            pause_max,
            ..patient()
        };
        let members: Vec<&[u32]> = vec![&[5000]; 40];
        let bench = bench_within(&members, LayerConfig::default(), bounds);
        let other = sample(&[&[5000]]);
        let source = TestSource::new(other.blob.clone());
        let engine = Arc::clone(&bench.layer.shared.engine);
        let read = join_with(&bench.store, &other, &source, unmerged(), engine);
        // The background's body stops within its third chunk.
        let ends = |id: usize| bench.sample.index.chunks[id].encoding.blob().unwrap().end();
        *bench.source.free_bytes.lock() = usize::try_from(ends(1)).unwrap() + 100;
        bench.source.gate.send_replace(false);
        let layer = Arc::clone(&bench.layer);
        let background = tokio::spawn(async move { layer.fill_all().await });
        while !bench.layer.file().is_present(1) {
            tokio::task::yield_now().await;
        }
        source.gate.send_replace(false);
        let reader = Arc::clone(&read);
        let reader = tokio::spawn(async move { reader.fill(range(0, 1)).await });
        source.arrived.notified().await;
        bench.source.gate.send_replace(true);
        let alone = fetch::memory_of(&read.shared, &[0]);
        let engine = &bench.layer.shared.engine;
        let has_stopped = || match pause_max.is_zero() {
            true => engine.memory_bytes() == alone,
            false => engine.gate.pausing() == 1,
        };
        while !has_stopped() {
            tokio::task::yield_now().await;
        }
        assert!(!bench.layer.file().is_present(4), "it went on regardless");
        source.gate.send_replace(true);
        reader.await.unwrap().unwrap();
        background.await.unwrap().unwrap();
        let left = if pause_max.is_zero() { 2 } else { 1 };
        assert_eq!(bench.layer.counters().requests, left, "{pause_max:?}");
        assert_eq!(
            bench.layer.counters().chunks_filled,
            40,
            "none of them twice"
        );
        assert!(bench.layer.file().is_complete());
    }
}

/// A table may list files in another order than the blob holds them.
#[tokio::test]
async fn a_background_fill_reaches_every_chunk_in_any_order() {
    let mut sample = sample(&[&[5000], &[5000], &[5000], &[5000]]);
    let ends = [0, 3];
    let encodings = ends.map(|id: usize| sample.index.chunks[id].encoding);
    let digests = ends.map(|id| sample.index.chunks[id].chunk_digest);
    for (n, id) in [(0, 3), (1, 0)] {
        sample.index.chunks[id].encoding = encodings[n];
        sample.index.chunks[id].chunk_digest = digests[n];
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let config = LayerConfig {
        plan: PlanLimits {
            parts_max: 1,
            gap_bytes_max: 0,
            wanted_per_gap: 0,
            request_bytes_max: 1,
            total_bytes_max: 1,
        },
        ..LayerConfig::default()
    };
    let layer = join(&store, &sample, &source, config);
    layer.fill_all().await.unwrap();
    assert!(layer.file().is_complete());
    assert_eq!(layer.counters().requests, 4);
}

/// Inflating from the member's start for every part of it would take minutes here.
#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_brings_what_is_before_the_landmark_and_no_more() {
    let bench = bench(
        &[&[5000], &[5000], &[5000], &[5000]],
        LayerConfig::default(),
    );
    let Encoding::GzipMember { blob, .. } = bench.sample.index.chunks[2].encoding else {
        panic!("the sample is made of members");
    };
    bench.layer.prefetch(blob.start());
    bench.layer.shared.tasks.close();
    bench.layer.shared.tasks.wait().await;
    let present: Vec<bool> = (0..4).map(|id| bench.layer.file().is_present(id)).collect();
    assert_eq!(present, [true, true, false, false]);
    assert_eq!(bench.layer.counters().requests, 1);
}

#[tokio::test]
async fn a_member_of_very_many_chunks_is_decoded_once() {
    let mut sample = sample(&[&[8_000_000, 8_000_000, 8_000_000]]);
    let Encoding::GzipMember { blob, .. } = sample.index.chunks[0].encoding else {
        unreachable!()
    };
    let mut chunks = Vec::new();
    for whole in sample.index.chunks.clone() {
        let Encoding::GzipMember { skip, .. } = whole.encoding else {
            unreachable!()
        };
        for n in 0..2000_u32 {
            let data_offset = whole.data_offset + u64::from(n) * 4000;
            let at = usize::try_from(data_offset).unwrap();
            let digest = Digest::sha256(&sample.data[at..at + 4000]);
            chunks.push(Chunk {
                encoding: Encoding::GzipMember {
                    blob,
                    skip: skip + u64::from(n) * 4000,
                },
                data_offset,
                len: 4000,
                chunk_digest: digest.as_bytes().try_into().ok(),
            });
        }
    }
    sample.index.chunks = chunks;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let layer = join(&store, &sample, &source, unmerged());
    // The last one first, which brings all others.
    let last = layer.index().data_len - 1;
    layer.fill(range(last, 1)).await.unwrap();
    layer.fill(range(0, last)).await.unwrap();
    let counters = layer.counters();
    assert_eq!((counters.requests, counters.chunks_filled), (1, 6000));
    let mut all = vec![0; sample.data.len()];
    assert!(layer.try_read(0, &mut all).unwrap());
    assert!(all == sample.data);
}

#[tokio::test]
async fn a_member_over_the_budget_is_refused_and_takes_no_other_with_it() {
    let bounds = EngineConfig {
        memory_bytes_max: 400 << 10,
        ..patient()
    };
    let bench = bench_within(
        &[&[5000], &[300_000], &[5000]],
        LayerConfig::default(),
        bounds,
    );
    let error = bench.layer.fill(range(8192, 1)).await.unwrap_err();
    assert!(matches!(error, Error::Limit { .. }), "{error}");
    assert!(error.to_string().contains("pull it again"), "{error}");
    let last = bench.sample.index.data_len - 1;
    bench.layer.fill(range(last, 1)).await.unwrap();
    bench.layer.fill(range(0, 1)).await.unwrap();
    assert!(bench.layer.fill_all().await.is_err());
    // Others of its requests may be under way still.
    bench.layer.close().await.unwrap();
    assert!(bench.layer.shared.inflight.is_empty());
    assert_eq!(bench.layer.shared.engine.memory_bytes(), 0);
}

#[tokio::test]
async fn pieces_of_a_body_count_as_long_as_they_are() {
    let bench = bench(&[&[3_000_000]], unmerged());
    *bench.source.piece_bytes.lock() = 1 << 20;
    *bench.source.free_bytes.lock() = 1;
    bench.source.gate.send_replace(false);
    let mut fill = Box::pin(bench.layer.fill(range(0, 1)));
    assert!(futures_util::poll!(&mut fill).is_pending());
    bench.source.arrived.notified().await;
    while bench.layer.counters().bytes_fetched == 0 {
        tokio::task::yield_now().await;
    }
    let shared = &bench.layer.shared;
    let counted = fetch::memory_of(shared, &[0]);
    let chunk = &bench.layer.index().chunks[0];
    assert_eq!(
        counted,
        fetch::memory_of_one(chunk),
        "which opening goes by"
    );
    assert_eq!(
        shared.engine.memory_bytes(),
        counted + (1 << 20) - (64 << 10)
    );
    bench.source.gate.send_replace(true);
    fill.await.unwrap();
    bench.layer.close().await.unwrap();
    assert_eq!(bench.layer.shared.engine.memory_bytes(), 0);
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
    sample.index.chunks[1].chunk_digest = Some([9; 32]);
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
        (Act::Truncate, "the body ended after"),
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

/// What is being decoded when a layer is closed would otherwise be written later.
#[tokio::test]
async fn closing_waits_for_what_is_being_stored() {
    let bench = bench(&[&[20_000_000]], unmerged());
    let mut fill = Box::pin(bench.layer.fill(range(0, 1)));
    assert!(futures_util::poll!(&mut fill).is_pending());
    let all = bench.sample.blob.len() as u64;
    while bench.layer.counters().bytes_fetched < all {
        tokio::task::yield_now().await;
    }
    bench.layer.close().await.unwrap();
    assert_eq!(
        Arc::strong_count(&bench.layer.shared),
        1,
        "nobody works on it"
    );
    drop(fill);
}

#[tokio::test]
async fn permits_bound_what_is_held_in_memory() {
    let bounds = EngineConfig {
        memory_bytes_max: 512 << 10,
        on_demand_max: 16,
        ..patient()
    };
    let members: Vec<&[u32]> = vec![&[60_000]; 40];
    let bench = bench_within(&members, unmerged(), bounds);
    bench.source.gate.send_replace(false);
    let fill = bench.layer.fill(range(0, bench.sample.index.data_len));
    let mut fill = Box::pin(fill);
    assert!(futures_util::poll!(&mut fill).is_pending());
    bench.source.arrived.notified().await;
    // Each request needs 60,000 bytes decoded, twice, the member, a piece and the decoder.
    let under_way = bench.layer.counters().requests;
    assert_eq!(under_way, 1, "two of them need more than 512 KiB");
    bench.source.gate.send_replace(true);
    fill.await.unwrap();
    assert!(bench.read(range(0, bench.sample.index.data_len)));
    bench.layer.close().await.unwrap();
    assert_eq!(bench.layer.shared.engine.memory_bytes(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn random_reads_under_faults_equal_a_plain_copy() {
    for seed in 0..24 {
        let mut rng = StdRng::seed_from_u64(seed);
        let members = random_members(&mut rng);
        let members: Vec<&[u32]> = members.iter().map(Vec::as_slice).collect();
        let config = LayerConfig {
            plan: PlanLimits {
                parts_max: 1,
                gap_bytes_max: rng.random_range(0..70_000),
                wanted_per_gap: rng.random_range(0..10),
                request_bytes_max: rng.random_range(1..300_000),
                total_bytes_max: rng.random_range(1..600_000),
            },
            read_ahead_encoded_bytes_max: rng.random_range(0..200_000),
            ..LayerConfig::default()
        };
        let bounds = EngineConfig {
            on_demand_max: rng.random_range(1..5),
            profile_max: rng.random_range(1..5),
            background_max: rng.random_range(1..5),
            memory_bytes_max: rng.random_range(800_000..2_000_000),
            pause_max: Duration::from_millis(rng.random_range(0..3)),
            late_after_min: Duration::from_micros(rng.random_range(0..300)),
        };
        let bench = Arc::new(bench_within(&members, config, bounds));
        *bench.source.piece_bytes.lock() = rng.random_range(1..100_000);
        *bench.source.random.lock() = Some(StdRng::seed_from_u64(seed));
        let background = Arc::clone(&bench.layer);
        let background = tokio::spawn(async move { drop(background.fill_all().await) });
        let readers: Vec<_> = (0..4)
            .map(|reader| tokio::spawn(random_reads(Arc::clone(&bench), seed * 10 + reader)))
            .collect();
        for reader in readers {
            reader.await.unwrap();
        }
        background.await.unwrap();
        bench.quiet().await;
        *bench.source.random.lock() = None;
        bench.layer.fill_all().await.unwrap();
        assert!(bench.read(range(0, bench.sample.index.data_len)));
        reopened_equals(&bench);
    }
}

/// Mostly small files, as in an image, with a large one here and there.
fn random_members(rng: &mut StdRng) -> Vec<Vec<u32>> {
    let file = |rng: &mut StdRng| match rng.random_range(0..10) {
        0 => rng.random_range(1..100_000),
        1..4 => 4096,
        _ => rng.random_range(1..6000),
    };
    (0..rng.random_range(1..40))
        .map(|_| {
            let files = rng.random_range(1..4);
            (0..files).map(|_| file(rng)).collect()
        })
        .collect()
}

async fn random_reads(bench: Arc<Bench>, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..40 {
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

#[tokio::test]
async fn what_another_layer_has_is_not_fetched_and_brings_nothing_along() {
    let config = LayerConfig::default();
    let bench = bench(&[&[5000], &[70_000], &[10]], config);
    bench.layer.fill_all().await.unwrap();
    // The same first two files, and another third one; as another process sees them.
    let sample = sample(&[&[5000], &[70_000], &[11]]);
    assert_eq!(
        sample.index.chunks[1].chunk_digest,
        bench.sample.index.chunks[1].chunk_digest
    );
    let source = TestSource::new(sample.blob.clone());
    let store = Store::open(bench.dir.path()).unwrap();
    let other = Bench {
        layer: join(&store, &sample, &source, config),
        sample,
        source,
        store,
        dir: tempfile::tempdir().unwrap(),
    };
    let at = other.sample.index.chunks[1].data_offset;
    other.layer.fill(range(at, 70_000)).await.unwrap();
    assert!(other.read(range(at, 70_000)));
    other.quiet().await;
    let counters = other.layer.counters();
    assert_eq!((counters.requests, counters.chunks_copied), (0, 1));
    assert!(
        !other.layer.file().is_present(2),
        "nothing was fetched ahead"
    );
    // What is fetched does not bring along what is here.
    let last = other.sample.index.chunks[2].data_offset;
    other.layer.fill(range(0, last + 11)).await.unwrap();
    let counters = other.layer.counters();
    assert_eq!((counters.requests, counters.chunks_filled), (1, 1));
    assert_eq!((counters.chunks_copied, counters.bytes_copied), (2, 75_000));
    assert!(other.read(range(0, last + 11)));
    other.layer.close().await.unwrap();
}

#[tokio::test]
async fn what_is_too_long_for_the_memory_for_copies_is_not_copied() {
    let bench = bench(&[&[5000], &[70_000], &[10]], LayerConfig::default());
    bench.layer.fill_all().await.unwrap();
    let sample = sample(&[&[5000], &[70_000], &[11]]);
    let source = TestSource::new(sample.blob.clone());
    // Nothing can be fetched within so little, and the first file be copied.
    let engine = FetchEngine::new(EngineConfig {
        memory_bytes_max: 64 << 10,
        ..patient()
    });
    let layer = join_with(&bench.store, &sample, &source, unmerged(), engine);
    layer.fill(range(0, 5000)).await.unwrap();
    let at = sample.index.chunks[1].data_offset;
    let error = layer.fill(range(at, 1)).await.unwrap_err();
    assert!(matches!(error, Error::Limit { .. }), "{error}");
    let counters = layer.counters();
    assert_eq!((counters.chunks_copied, counters.requests), (1, 0));
    layer.close().await.unwrap();
}

#[tokio::test]
async fn more_chunks_than_one_run_are_copied() {
    let many = [3; 100];
    let bench = bench(&[&many, &[10]], LayerConfig::default());
    bench.layer.fill_all().await.unwrap();
    let sample = sample(&[&many, &[11]]);
    let source = TestSource::new(sample.blob.clone());
    let layer = join(&bench.store, &sample, &source, unmerged());
    let end = sample.index.chunks[100].data_offset;
    layer.fill(range(0, end)).await.unwrap();
    let counters = layer.counters();
    assert_eq!((counters.chunks_copied, counters.requests), (100, 0));
    layer.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_beside_evictions_and_faults_of_either_layer_are_right() {
    let bench = bench(&[&[5000], &[70_000], &[300, 400]], unmerged());
    bench.layer.fill_all().await.unwrap();
    let sample = sample(&[&[5000], &[70_000], &[300, 401]]);
    let source = TestSource::new(sample.blob.clone());
    *source.random.lock() = Some(StdRng::seed_from_u64(3));
    let layer = join(&bench.store, &sample, &source, unmerged());
    let stop = AtomicBool::new(false);
    let runtime = tokio::runtime::Handle::current();
    std::thread::scope(|threads| {
        let evictor = threads.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                bench.layer.file().evict_all().unwrap();
                layer.file().evict_all().unwrap();
            }
        });
        let reader = threads.spawn(|| {
            runtime.block_on(async {
                let mut right = 0;
                for n in 0..300 {
                    let id = n % 4;
                    let chunk = &sample.index.chunks[id];
                    let place = range(chunk.data_offset, u64::from(chunk.len));
                    let other = &bench.sample.index.chunks[id];
                    let same = range(other.data_offset, u64::from(other.len));
                    let _ = bench.layer.fill(same).await;
                    let _ = layer.fill(place).await;
                    let mut buf = vec![0; chunk.len as usize];
                    if layer.try_read(place.start(), &mut buf).unwrap() {
                        let at = usize::try_from(place.start()).unwrap();
                        assert!(buf == sample.data[at..at + buf.len()]);
                        right += 1;
                    }
                }
                right
            })
        });
        let right = reader.join();
        stop.store(true, Ordering::Relaxed);
        evictor.join().unwrap();
        assert!(right.unwrap() > 0);
    });
}
