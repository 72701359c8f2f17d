//! What the fetch engine adds to a miss: a read of 4 KiB that is not there, beside a plain
//! ranged request for the same bytes of the same registry on loopback, taking turns in
//! one run. And 50 readers of one cold file, with every request counted.
//!
//!     cargo bench --workspace --bench miss --profile dev [-- MISSES]
//!
//! The registry is the one of the tests, in this process: it answers from memory, so what
//! the engine adds shows more than beside a real one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, future};
use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::index::{Chunk, Encoding, LayerBlob, LayerFormat, LayerIndex};
use lazarette_fetcher::layer::{EngineConfig, FetchEngine, Layer, LayerConfig};
use lazarette_fetcher::source::{BlobRef, BlobSource, SourceConfig, stack};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::test_util::layers::regular_file;
use lazarette_fetcher::types::{ByteRange, Digest, Reference};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Decoded bytes of a chunk, and of a read.
const CHUNK: u32 = 4096;
/// Chunks from one miss to the next: more than what mostly comes along with a miss.
const STRIDE: usize = 64;
/// Misses before those that count.
const WARM: usize = 20;
const READERS: usize = 50;

fn main() -> Result<()> {
    let number = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    let misses: usize = number.unwrap_or(1000);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let registry = FakeRegistry::start().await;
        one_after_another(&registry, misses, LayerConfig::default()).await?;
        let alone = LayerConfig {
            read_ahead_encoded_bytes_max: 0,
            ..LayerConfig::default()
        };
        one_after_another(&registry, misses, alone).await?;
        all_at_once(&registry).await
    })
}

async fn one_after_another(
    registry: &FakeRegistry,
    misses: usize,
    config: LayerConfig,
) -> Result<()> {
    let ahead = config.read_ahead_encoded_bytes_max;
    let cold = Cold::new(registry, (misses + WARM) * STRIDE, config)?;
    let (mut plain, mut filled) = (Vec::new(), Vec::new());
    for miss in 0..misses + WARM {
        let chunk = cold.layer.index().chunks.get(miss * STRIDE);
        let chunk = chunk.context("the layer is long enough")?;
        let blob = chunk.encoding.blob().context("it has bytes of its own")?;
        let began = Instant::now();
        let mut body = cold.source.read_range(&cold.blob, blob).await?;
        while let Some(piece) = body.next().await {
            piece?;
        }
        let took = began.elapsed();
        let mut buf = vec![0; CHUNK as usize];
        let range = ByteRange::at(chunk.data_offset, u64::from(CHUNK)).context("no range")?;
        if cold.layer.try_read(range.start(), &mut buf)? {
            // A busy machine takes the registry for one that is far away, and fetches more ahead.
            ensure!(ahead > 0, "not cold");
            continue;
        }
        let began = Instant::now();
        cold.layer.fill(range).await?;
        ensure!(cold.layer.try_read(range.start(), &mut buf)?, "not filled");
        let filling = began.elapsed();
        if miss >= WARM {
            plain.push(took);
            filled.push(filling);
        }
    }
    let misses = filled.len();
    ensure!(misses > 0, "nothing was cold");
    for (name, percent) in [("p50", 50), ("p99", 99)] {
        let (plain, filled) = (
            quantile(&mut plain, percent),
            quantile(&mut filled, percent),
        );
        let ratio = filled.as_secs_f64() / plain.as_secs_f64();
        println!(
            "miss of 4 KiB, {ahead} bytes ahead, {name} of {misses}: plain {plain:?}, filled {filled:?}, {ratio:.2}x"
        );
    }
    cold.layer.close().await?;
    Ok(())
}

async fn all_at_once(registry: &FakeRegistry) -> Result<()> {
    let cold = Cold::new(registry, 1024, LayerConfig::default())?;
    let asked = registry.requests().blobs;
    let end = cold.layer.index().data_len;
    let began = Instant::now();
    let readers = (0..READERS).map(|_| async {
        let mut buf = vec![0; 64 << 10];
        for at in (0..end).step_by(buf.len()) {
            let range = ByteRange::at(at, buf.len() as u64).context("no range")?;
            cold.layer.fill(range).await?;
            ensure!(cold.layer.try_read(at, &mut buf)?, "not filled");
        }
        anyhow::Ok(())
    });
    future::try_join_all(readers).await?;
    let took = began.elapsed();
    cold.layer.close().await?;
    let counters = cold.layer.counters();
    let requests = registry.requests().blobs - asked;
    println!(
        "{READERS} readers of {end} cold bytes: {took:?}, {requests} requests, {} of {} encoded bytes",
        counters.bytes_fetched, cold.blob.size
    );
    ensure!(
        counters.bytes_fetched == cold.blob.size,
        "not each byte once"
    );
    Ok(())
}

/// The value that `percent` of all are below.
fn quantile(took: &mut [Duration], percent: usize) -> Duration {
    took.sort_unstable();
    let at = took.len() * percent / 100;
    took.get(at).copied().unwrap_or_default()
}

/// A layer of one file of which nothing is here, and a registry that has it.
struct Cold {
    source: Arc<dyn BlobSource>,
    blob: BlobRef,
    layer: Arc<Layer>,
    _root: tempfile::TempDir,
}

impl Cold {
    fn new(registry: &FakeRegistry, chunks: usize, config: LayerConfig) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(chunks as u64);
        let mut compressor = MemberCompressor::new(6);
        let (mut blob, mut table) = (Vec::new(), Vec::new());
        for number in 0..chunks as u64 {
            let plain: Vec<u8> = (0..CHUNK).map(|_| rng.random_range(b'a'..=b'p')).collect();
            let member = compressor.compress(&plain);
            let range = ByteRange::at(blob.len() as u64, member.len() as u64);
            blob.extend_from_slice(&member);
            table.push(Chunk {
                encoding: Encoding::GzipMember {
                    blob: range.context("no range")?,
                    skip: 0,
                },
                data_offset: number * u64::from(CHUNK),
                len: CHUNK,
                chunk_digest: Digest::sha256(&plain).as_bytes().try_into().ok(),
            });
        }
        let (digest, size) = (Digest::sha256(&blob), blob.len() as u64);
        registry.add_blob(blob);
        let file = regular_file("file", chunks as u64 * u64::from(CHUNK), 0);
        let format = LayerFormat::Estargz;
        let about = LayerBlob {
            digest,
            size,
            format,
        };
        let index = LayerIndex::new(about, vec![file], table)?;
        let reference = Reference::parse(&format!("{}/bench", registry.url_host()))?;
        let blob = BlobRef {
            repository: reference.repository().clone(),
            digest,
            size,
        };
        let root = tempfile::tempdir()?;
        let (source, _) = stack::build(SourceConfig::default())?;
        let file = Store::open(root.path())?.create_layer(index)?;
        let engine = FetchEngine::new(EngineConfig::default());
        let layer = Layer::with_engine(file, Arc::clone(&source), blob.clone(), config, engine);
        // A miss alone, beside a request alone.
        layer.set_foresight(false);
        Ok(Self {
            layer,
            source,
            blob,
            _root: root,
        })
    }
}
