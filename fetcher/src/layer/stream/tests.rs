//! Streams of parts that come when they like.

use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures_util::stream;
use parking_lot::Mutex;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::layer::EngineConfig;
use crate::source::Document;
use crate::types::{Descriptor, Digest, Reference, Repository};

/// What goes wrong with ranges that begin at or after some place.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wrong {
    Nothing,
    Unsupported,
    BreaksOff,
    /// Ranges are not served, and the whole of it breaks off there.
    WholeBreaksOff,
}

/// A blob whose bodies make way for each other at random.
struct Restless {
    blob: Bytes,
    wrong: (u64, Wrong),
    random: Mutex<StdRng>,
    ranges: Mutex<Vec<ByteRange>>,
    wholes: AtomicU64,
    distrusted: AtomicU64,
}

impl Restless {
    fn new(len: usize, seed: u64, wrong: (u64, Wrong)) -> Arc<Self> {
        let mut random = StdRng::seed_from_u64(seed);
        let blob: Vec<u8> = (0..len).map(|_| random.random()).collect();
        Arc::new(Self {
            blob: blob.into(),
            wrong,
            random: Mutex::new(random),
            ranges: Mutex::default(),
            wholes: AtomicU64::new(0),
            distrusted: AtomicU64::new(0),
        })
    }

    fn body(&self, from: usize, to: usize, end: Option<Error>) -> Body {
        let mut random = StdRng::seed_from_u64(self.random.lock().random());
        let mut left = self.blob.slice(from..to);
        let mut pieces: Vec<(usize, Result<Bytes>)> = Vec::new();
        while !left.is_empty() {
            let piece = left.split_to(random.random_range(1..=left.len().min(5000)));
            pieces.push((random.random_range(0..40), Ok(piece)));
        }
        pieces.extend(end.map(|error| (0, Err(error))));
        let waits = |(yields, piece): (usize, Result<Bytes>)| async move {
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
            piece
        };
        stream::iter(pieces).then(waits).boxed()
    }
}

fn error(unsupported: bool) -> Error {
    let (what, detail) = ("a test blob".to_owned(), "scripted".to_owned());
    match unsupported {
        true => Error::Unsupported { what, detail },
        false => Error::Unavailable {
            what,
            host: "localhost".to_owned(),
            detail,
        },
    }
}

#[async_trait]
impl BlobSource for Restless {
    async fn resolve(&self, _: &Reference) -> Result<Document> {
        Err(error(true))
    }

    async fn stat(&self, _: &Repository, _: &Digest) -> Result<u64> {
        Ok(self.blob.len() as u64)
    }

    async fn read_range(&self, _: &BlobRef, range: ByteRange) -> Result<Body> {
        self.ranges.lock().push(range);
        let at = |n: u64| usize::try_from(n).unwrap();
        let (from, to) = (at(range.start()), at(range.end()));
        match self.wrong {
            (place, Wrong::Unsupported | Wrong::WholeBreaksOff) if range.start() >= place => {
                Err(error(true))
            }
            (place, Wrong::BreaksOff) if range.start() >= place => {
                let half = from.midpoint(to);
                Ok(self.body(from, half, Some(error(false))))
            }
            _ => Ok(self.body(from, to, None)),
        }
    }

    fn distrust(&self, _: &BlobRef) {
        self.distrusted.fetch_add(1, Ordering::Relaxed);
    }

    async fn read_all(&self, _: &BlobRef) -> Result<Body> {
        let times = self.wholes.fetch_add(1, Ordering::Relaxed);
        assert!(times < 100, "it is begun again for ever");
        match self.wrong {
            (place, Wrong::WholeBreaksOff) => {
                let place = usize::try_from(place).unwrap();
                Ok(self.body(0, place, Some(error(true))))
            }
            _ => Ok(self.body(0, self.blob.len(), None)),
        }
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

const PART: u64 = 64 << 10;

fn open(source: &Arc<Restless>, engine: &Arc<FetchEngine>, lines: fn(Link) -> usize) -> Stream {
    let blob = BlobRef {
        repository: Reference::parse("localhost/x")
            .unwrap()
            .repository()
            .clone(),
        digest: Digest::sha256(&source.blob),
        size: source.blob.len() as u64,
    };
    let source = Arc::clone(source) as Arc<dyn BlobSource>;
    let stream = Stream::new(source, blob, Arc::clone(engine));
    Stream { lines, ..stream }
}

/// Room for the parts of `parts` lines ahead.
fn engine(parts: u64) -> Arc<FetchEngine> {
    FetchEngine::new(EngineConfig {
        memory_bytes_max: parts * 2 * PART,
        ..EngineConfig::default()
    })
}

/// All bytes, and the most that the engine counted meanwhile.
async fn drain(mut stream: Stream) -> Result<(Vec<u8>, u64)> {
    let (mut all, mut most) = (Vec::new(), 0);
    while let Some(piece) = stream.next().await? {
        most = most.max(stream.engine.memory_bytes());
        all.extend_from_slice(&piece);
    }
    Ok((all, most))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
}

/// Ends what aborted tasks still hold.
async fn settle(engine: &FetchEngine) {
    for _ in 0..1000 {
        if engine.memory_bytes() == 0 {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("{} bytes are still counted", engine.memory_bytes());
}

#[test]
fn a_link_gets_as_many_connections_as_it_can_use() {
    let link = |ms, megabytes: u64| Link {
        round_trip: Duration::from_millis(ms),
        bytes_per_second: megabytes * 1_000_000,
    };
    for (link, expected) in [
        (Link::GUESS, 1),
        (link(0, 2000), 1),
        (link(1, 1250), 1),
        (link(10, 125), 1),
        (link(30, 125), 2),
        (link(50, 125), 3),
        (link(10, 1250), 4),
        (link(10_000, u64::MAX / 1_000_000), 4),
    ] {
        assert_eq!(lines(link), expected, "{link:?}");
    }
}

#[tokio::test]
async fn what_is_short_or_comes_over_one_connection_takes_few_requests() {
    for (len, lines, ranges, wholes) in [
        (0, 3, 0, 1),
        (100, 3, 0, 1),
        (2 * PART, 3, 0, 1),
        (2 * PART + 1, 3, 3, 0),
        (10 * PART, 3, 10, 0),
        (10 * PART, 1, 2, 0),
    ] {
        let source = Restless::new(usize::try_from(len).unwrap(), 1, (0, Wrong::Nothing));
        let decide = if lines == 1 { |_| 1 } else { |_| 3 };
        let (all, _) = drain(open(&source, &engine(4), decide)).await.unwrap();
        assert!(all == source.blob);
        let asked = (
            source.ranges.lock().len(),
            source.wholes.load(Ordering::Relaxed),
        );
        assert_eq!(asked, (ranges, wholes), "{len} bytes, {lines} connections");
    }
}

#[tokio::test]
async fn a_host_that_serves_no_ranges_is_asked_for_everything() {
    for from in [0, 1, 4 * PART, 9 * PART] {
        let source = Restless::new(600_000, 2, (from, Wrong::Unsupported));
        let (all, _) = drain(open(&source, &engine(4), |_| 3)).await.unwrap();
        assert!(all == source.blob, "from {from}");
        assert_eq!(source.wholes.load(Ordering::Relaxed), 1, "from {from}");
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_at_the_same_place_twice_ends_the_stream() {
    let place = 3 * PART;
    let source = Restless::new(8 << 16, 5, (place, Wrong::WholeBreaksOff));
    let engine = FetchEngine::new(EngineConfig::default());
    let error = drain(open(&source, &engine, |_| 2)).await.unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    // What came of the second try was no more.
    assert_eq!(source.wholes.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_part_that_fails_ends_the_stream_when_it_is_its_turn() {
    let source = Restless::new(600_000, 3, (4 * PART, Wrong::BreaksOff));
    let engine = engine(4);
    let mut stream = open(&source, &engine, |_| 4);
    let mut all = Vec::new();
    let error = loop {
        match stream.next().await {
            Ok(piece) => all.extend_from_slice(&piece.unwrap()),
            Err(error) => break error,
        }
    };
    assert!(error.is_transient(), "{error}");
    let before = usize::try_from(4 * PART + PART / 2).unwrap();
    assert!(all == source.blob[..before]);
    drop(stream);
    settle(&engine).await;
}

#[tokio::test]
async fn what_is_ahead_lets_readers_go_first_and_the_stream_goes_on() {
    let source = Restless::new(600_000, 4, (0, Wrong::Nothing));
    let engine = engine(4);
    let reader = Ask {
        class: Priority::OnDemand,
        host: "localhost".into(),
        bytes: 1,
    };
    let reading = engine.gate.enter(reader).pass().await.unwrap();
    let (all, most) = drain(open(&source, &engine, |_| 4)).await.unwrap();
    assert!(all == source.blob);
    assert_eq!(most, 1, "the reader's alone");
    // One after another: none began before its turn.
    let ranges = source.ranges.lock().clone();
    assert!(ranges.is_sorted_by_key(ByteRange::start));
    drop(reading);
    settle(&engine).await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bytes_come_in_order_within_the_budget(
        seed in any::<u64>(),
        len in 0_usize..1_200_000,
        many in 0_usize..4,
        parts in 1_u64..6,
    ) {
        let decide: [fn(Link) -> usize; 4] = [|_| 1, |_| 2, |_| 3, |_| 4];
        let (source, engine) = (Restless::new(len, seed, (0, Wrong::Nothing)), engine(parts));
        let outcome = runtime().block_on(async {
            let drained = drain(open(&source, &engine, decide[many])).await;
            settle(&engine).await;
            drained
        });
        let (all, most) = outcome.unwrap();
        prop_assert!(all == source.blob);
        prop_assert!(most <= parts * PART, "{} bytes", most);
        let mut asked = source.ranges.lock().clone();
        asked.sort_unstable_by_key(ByteRange::start);
        for pair in asked.windows(2) {
            prop_assert_eq!(pair[0].end(), pair[1].start());
        }
    }
}

#[tokio::test]
async fn a_source_is_told_of_bytes_that_are_not_the_blobs() {
    let wrong = |kind: u8| match kind {
        0 => Ok(()),
        1 => Err(error(false)),
        2 => Err(Error::malformed("a layer", "it is no tar")),
        _ => Err(Error::Corrupt {
            what: "a layer".to_owned(),
            expected: Digest::sha256(b"a"),
            actual: Digest::sha256(b"b"),
        }),
    };
    for (kind, told) in [(0, 0), (1, 0), (2, 1), (3, 1)] {
        let source = Restless::new(1000, 1, (0, Wrong::Nothing));
        let stream = open(&source, &engine(4), |_| 1);
        let received = AtomicU64::new(0);
        let outcome = stream.into_ingest(&received, move |_| wrong(kind));
        assert_eq!(outcome.await.is_ok(), kind == 0);
        assert_eq!(source.distrusted.load(Ordering::Relaxed), told, "{kind}");
    }
}
