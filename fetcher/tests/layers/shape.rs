//! Indexes that were shaped for what starts read: the same chunks, right and for fewer
//! bytes, whatever the layer is like; and nothing lost where something is wrong.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use lazarette_fetcher::Error;
use lazarette_fetcher::codec::Packer;
use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::index::details::{SpanDetails, Spans};
use lazarette_fetcher::index::wire::{self, Header};
use lazarette_fetcher::index::{ChunkId, LayerIndex};
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest};
use lazarette_fetcher::source::BlobSource;
use lazarette_fetcher::store::{LayerCheck, Shaped, Store};
use lazarette_fetcher::test_util::MemorySource;
use lazarette_fetcher::test_util::content::{TAR_END, tar_file};
use lazarette_fetcher::types::{ByteRange, Descriptor, Digest, MediaType, Reference};
use proptest::prelude::*;

/// Bytes of which about every `repeat`-th copies what was shortly before.
fn payload(len: usize, seed: u32, repeat: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let mut out: Vec<u8> = Vec::with_capacity(len + 64);
    while out.len() < len {
        if out.len() > 20_000 && next().is_multiple_of(repeat) {
            let back = usize::try_from(next() % 20_000).unwrap().max(64);
            let from = out.len() - back;
            out.extend_from_within(from..from + 40);
        } else {
            out.extend((0..16).map(|_| next().to_le_bytes()[0] & 0x7f));
        }
    }
    out.truncate(len);
    out
}

fn tar(payloads: &[Vec<u8>]) -> Vec<u8> {
    let file = |(number, payload): (usize, &Vec<u8>)| tar_file(&format!("file{number}"), payload);
    let files = payloads.iter().enumerate().flat_map(file);
    files.chain(TAR_END).collect()
}

struct World {
    source: Arc<MemorySource>,
    request: LayerRequest,
    digest: Digest,
    payloads: Vec<Vec<u8>>,
    dir: tempfile::TempDir,
}

impl World {
    fn new(payloads: Vec<Vec<u8>>, level: u32, members: usize) -> Self {
        let tar = tar(&payloads);
        let part = tar.len().div_ceil(members);
        let compressor = || MemberCompressor::new(level);
        let blob: Vec<u8> = tar
            .chunks(part)
            .flat_map(|part| compressor().compress(part))
            .collect();
        let size = blob.len() as u64;
        let source = Arc::new(MemorySource::new());
        let digest = source.add_blob(blob);
        let layer = Descriptor::new(MediaType::OciLayerGzip, digest, size);
        let reference = Reference::parse("example.com/a:b").unwrap();
        let repository = reference.repository().clone();
        let request = LayerRequest::new(repository, &layer, Digest::sha256(&tar));
        Self {
            source,
            request,
            digest,
            payloads,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// Two files of 6 MiB and a few small ones.
    fn usual() -> Self {
        let mut payloads: Vec<Vec<u8>> = (0..9).map(|n| payload(3000 * n, 7, 3)).collect();
        payloads.insert(4, payload(6 << 20, 1, 4));
        payloads.insert(7, payload(6 << 20, 2, 4));
        Self::new(payloads, 6, 1)
    }

    /// The layer as a process sees it that begins now.
    async fn open(&self) -> (Arc<Store>, Arc<Layer>) {
        let store = Store::open(self.dir.path()).unwrap();
        let source = Arc::clone(&self.source) as Arc<dyn BlobSource>;
        let opener = LayerOpener::new(Arc::clone(&store), source);
        let (layer, _) = opener
            .open(&self.request, &AtomicU64::new(0))
            .await
            .unwrap();
        // The next one is to see what this one streamed.
        layer.flush().await.unwrap();
        (store, layer)
    }

    async fn shape(&self, hot: &[ChunkId]) -> Option<Shaped> {
        let (_store, layer) = self.open().await;
        layer.file().shape(hot).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        let layers = self.dir.path().join("layers");
        layers.join(self.digest.file_name()).join(name)
    }

    /// Fetches chunks that are not here; what they are.
    async fn read(&self, layer: &Layer, id: ChunkId) -> Result<Vec<u8>, String> {
        let chunk = layer.index().chunks[id as usize].clone();
        let place = ByteRange::at(chunk.data_offset, u64::from(chunk.len)).unwrap();
        let mut bytes = vec![0; chunk.len as usize];
        // It may learn only from a read that somebody evicted it.
        while !layer.try_read(chunk.data_offset, &mut bytes).unwrap() {
            layer.fill(place).await.map_err(|error| error.to_string())?;
        }
        Ok(bytes)
    }

    /// What the data file should be.
    fn data(&self) -> Vec<u8> {
        let mut data: Vec<u8> = Vec::new();
        for payload in self.payloads.iter().filter(|payload| !payload.is_empty()) {
            data.resize(data.len().next_multiple_of(4096), 0);
            data.extend(payload);
        }
        data
    }

    async fn assert_reads(&self, layer: &Layer, ids: impl IntoIterator<Item = ChunkId>) {
        let data = self.data();
        for id in ids {
            let chunk = &layer.index().chunks[id as usize];
            let at = usize::try_from(chunk.data_offset).unwrap();
            let bytes = self.read(layer, id).await.unwrap();
            assert!(bytes == data[at..at + chunk.len as usize], "chunk {id}");
        }
    }
}

/// Encoded bytes of `hot` (ascending), each span from its start.
fn fetched(index: &LayerIndex, hot: &[ChunkId]) -> u64 {
    let mut ends = std::collections::BTreeMap::new();
    for id in hot {
        let blob = index.chunks[*id as usize].encoding.blob().unwrap();
        ends.insert(blob.start(), blob.end());
    }
    ends.iter().map(|(start, end)| end - start).sum()
}

/// All that must not change.
fn chunks(index: &LayerIndex) -> Vec<(u64, u32)> {
    let chunks = index.chunks.iter();
    chunks.map(|chunk| (chunk.data_offset, chunk.len)).collect()
}

#[tokio::test]
async fn a_start_fetches_less_and_a_reader_with_the_old_index_goes_on() {
    let world = World::usual();
    let (_old_store, old) = world.open().await;
    // One in the middle of every span but the first few.
    let last = ChunkId::try_from(old.index().chunks.len()).unwrap() - 1;
    let hot: Vec<ChunkId> = (40..last).step_by(9).collect();
    let shaped = world.shape(&hot).await.unwrap();
    assert_eq!(shaped.before_bytes, fetched(old.index(), &hot));
    assert!(shaped.after_bytes < shaped.before_bytes, "{shaped:?}");
    assert_eq!(world.shape(&hot).await, None, "it is shaped already");

    let (store, new) = world.open().await;
    assert_eq!(shaped.after_bytes, fetched(new.index(), &hot));
    assert_ne!(new.index().spans, old.index().spans);
    assert_eq!(chunks(new.index()), chunks(old.index()));
    let index_len = std::fs::metadata(world.path("index")).unwrap().len();
    assert_eq!(index_len, shaped.index_bytes);
    let plain_len = std::fs::metadata(world.path("index.plain")).unwrap().len();
    assert!(index_len <= plain_len.max(new.index().blob_size / 50));

    store.evict_layers(None).unwrap();
    world.assert_reads(&old, hot.iter().copied()).await;
    store.evict_layers(None).unwrap();
    world.assert_reads(&new, hot.iter().copied()).await;
    new.fill_all().await.unwrap();
    let check = new.file().check_all().unwrap();
    assert_eq!((check.dropped.len(), new.file().is_complete()), (0, true));
}

#[tokio::test]
async fn what_is_not_here_makes_no_window() {
    let world = World::usual();
    let (store, layer) = world.open().await;
    let last = ChunkId::try_from(layer.index().chunks.len()).unwrap() - 1;
    let hot: Vec<ChunkId> = (40..last).step_by(9).collect();
    store.evict_layers(None).unwrap();
    drop((store, layer));
    assert_eq!(world.shape(&hot).await, None);
    let (_store, layer) = world.open().await;
    layer.fill_all().await.unwrap();
    layer.file().flush().unwrap();
    // Rot in what would be a window goes into no index.
    let path = world.path("data");
    let mut data = std::fs::read(&path).unwrap();
    let len = data.len();
    data[4096..len - 4096].fill(0x55);
    std::fs::write(&path, data).unwrap();
    drop((_store, layer));
    assert_eq!(world.shape(&hot).await, None);
    assert!(!world.path("index.plain").exists());
}

#[tokio::test]
async fn damaged_seams_shape_nothing_and_cost_nothing() {
    let world = World::usual();
    let (_store, layer) = world.open().await;
    let hot: Vec<ChunkId> = (40..100).step_by(9).collect();
    let index = std::fs::read(world.path("index")).unwrap();
    let seams = std::fs::read(world.path("seams")).unwrap();
    assert!(
        seams.len() as u64 * 100 < layer.index().blob_size,
        "{}",
        seams.len()
    );
    for at in (0..seams.len()).step_by(seams.len() / 60) {
        let mut damaged = seams.clone();
        damaged[at] ^= 0x10;
        for bytes in [&damaged[..], &seams[..at]] {
            std::fs::write(world.path("seams"), bytes).unwrap();
            // Frames are only looked at where they are needed.
            let shaped = layer.file().shape(&hot);
            let untouched = matches!(shaped, Ok(None) | Err(Error::Malformed { .. }));
            assert!(
                untouched || at > 500 && bytes.len() == seams.len(),
                "{at}: {shaped:?}"
            );
            let same = std::fs::read(world.path("index")).unwrap() == index;
            assert_eq!(same, untouched, "{at}");
            // As it was, for the next.
            std::fs::write(world.path("index"), &index).unwrap();
            let _ = std::fs::remove_file(world.path("index.plain"));
        }
    }
    std::fs::remove_file(world.path("seams")).unwrap();
    assert_eq!(layer.file().shape(&hot).unwrap(), None);
    world.assert_reads(&layer, hot).await;
}

/// What a check by a process that begins now finds of the layer.
fn check(world: &World) -> Result<LayerCheck, Error> {
    let store = Store::open(world.dir.path()).unwrap();
    let (digest, found) = store.check().unwrap().layers.remove(0);
    assert_eq!(digest, world.digest);
    found
}

#[tokio::test]
async fn a_check_reads_every_file_and_the_layer_goes_on() {
    let world = World::usual();
    let (_store, layer) = world.open().await;
    let last = ChunkId::try_from(layer.index().chunks.len()).unwrap() - 1;
    let hot: Vec<ChunkId> = (40..last).step_by(9).collect();
    drop((_store, layer));
    world.shape(&hot).await.unwrap();
    assert_eq!(check(&world).unwrap().damaged_files, Vec::<&str>::new());
    let names = ["index", "index.plain", "seams"];
    let right = names.map(|name| std::fs::read(world.path(name)).unwrap());
    // The file, how far into it in percent, and what it is after the check.
    let [_, plain, _] = &right;
    let table = [
        ("seams", 0, None),
        ("seams", 60, None),
        ("seams", 100, None),
        ("index.plain", 1, None),
        ("index.plain", 100, None),
        ("index", 1, Some(plain)),
        ("index", 100, Some(plain)),
    ];
    for (name, percent, left) in table {
        let mut bytes = std::fs::read(world.path(name)).unwrap();
        let at = (bytes.len() - 1) * percent / 100;
        bytes[at] ^= 0x10;
        std::fs::write(world.path(name), bytes).unwrap();
        let found = check(&world).unwrap();
        assert_eq!(found.damaged_files, [name], "{percent} %");
        assert_eq!(found.dropped, Vec::<ChunkId>::new(), "{name}");
        assert_eq!(
            std::fs::read(world.path(name)).ok().as_ref(),
            left,
            "{name}"
        );
        assert_eq!(check(&world).unwrap().damaged_files, Vec::<&str>::new());
        let (store, layer) = world.open().await;
        store.evict_layers(None).unwrap();
        world.assert_reads(&layer, (0..=last).step_by(7)).await;
        layer.close().await.unwrap();
        for (name, bytes) in names.iter().zip(&right) {
            std::fs::write(world.path(name), bytes).unwrap();
        }
    }
}

#[tokio::test]
async fn an_index_whose_details_are_wrong_is_none() {
    let world = World::usual();
    let (store, layer) = world.open().await;
    // Of spans of which nothing is here.
    store.evict_layers(None).unwrap();
    drop((store, layer));
    let mut bytes = std::fs::read(world.path("index")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(world.path("index"), bytes).unwrap();
    let error = check(&world).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(!world.path("index").exists());
    let error = check(&world).unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    let (_store, layer) = world.open().await;
    assert!(layer.file().is_complete(), "it was streamed again");
    assert_eq!(check(&world).unwrap().damaged_files, Vec::<&str>::new());
}

/// Gives spans that the plain index lacks windows of zeros.
fn spoil(index: &Path, plain: &Path) {
    let (bytes, plain) = (std::fs::read(index).unwrap(), std::fs::read(plain).unwrap());
    let core_end = usize::try_from(Header::parse(&bytes).unwrap().core_end()).unwrap();
    let old = Bytes::from(bytes[core_end..].to_vec());
    let mut index_of = wire::decode(&bytes).unwrap();
    let plain = wire::decode(&plain).unwrap();
    let zeros = Packer::new().unwrap().pack(&[0; 32 << 10]).unwrap();
    let mut spans = Spans::default();
    for span in &index_of.spans {
        let at = usize::try_from(span.details.start()).unwrap();
        let end = usize::try_from(span.details.end()).unwrap();
        let bytes = old.slice(at..end);
        let parsed = SpanDetails::parse(span, span.chunk_count, bytes.clone()).unwrap();
        let digests = (0..span.chunk_count as usize).map(|n| parsed.digest(n).unwrap());
        let digests: Vec<_> = digests.collect();
        let is_old = plain.spans.iter().any(|other| other.start == span.start);
        let window = if is_old {
            &bytes[digests.as_flattened().len()..]
        } else {
            &zeros
        };
        spans
            .push((span.start, span.bits), &digests, window)
            .unwrap();
    }
    let (made, all) = spans.finish();
    for (span, made) in index_of.spans.iter_mut().zip(made) {
        (span.details, span.details_digest) = (made.details, made.details_digest);
    }
    std::fs::write(index, wire::encode(&index_of, &all).unwrap()).unwrap();
}

#[tokio::test]
async fn a_span_that_does_not_decode_brings_the_plain_index_back() {
    let world = World::usual();
    let (store, layer) = world.open().await;
    let hot: Vec<ChunkId> = (40..100).step_by(9).collect();
    let plain = layer.index().spans.clone();
    assert!(world.shape(&hot).await.is_some());
    spoil(&world.path("index"), &world.path("index.plain"));
    store.evict_layers(None).unwrap();
    drop((store, layer));

    let (_store, layer) = world.open().await;
    let mut failed = 0;
    for id in &hot {
        failed += u32::from(world.read(&layer, *id).await.is_err());
    }
    assert!(failed > 0);
    let (_store, layer) = world.open().await;
    assert_eq!(layer.index().spans, plain);
    world.assert_reads(&layer, hot.iter().copied()).await;
    layer.fill_all().await.unwrap();
    drop(layer);
    assert_eq!(world.shape(&hot).await, None, "nor is it shaped so again");
}

#[tokio::test]
async fn an_index_that_rots_gives_way_to_the_plain_one() {
    let world = World::usual();
    let (store, layer) = world.open().await;
    let hot: Vec<ChunkId> = (40..100).step_by(9).collect();
    let plain = layer.index().spans.clone();
    assert!(world.shape(&hot).await.is_some());
    drop((store, layer));
    let mut bytes = std::fs::read(world.path("index")).unwrap();
    bytes[60] ^= 1;
    std::fs::write(world.path("index"), bytes).unwrap();
    let (_store, layer) = world.open().await;
    assert_eq!(layer.index().spans, plain);
    assert!(layer.file().is_complete());
}

#[derive(Debug, Clone)]
struct Case {
    files: Vec<(usize, u32, u32)>,
    level: u32,
    members: usize,
    hot: Vec<prop::sample::Index>,
}

fn case() -> impl Strategy<Value = Case> {
    let size =
        prop_oneof![3 => 0..9000_usize, 2 => 9000..200_000_usize, 2 => (1_usize << 20)..(4 << 20)];
    let file = (size, any::<u32>(), 2_u32..9);
    let files = prop::collection::vec(file, 1..12);
    let hot = prop::collection::vec(any::<prop::sample::Index>(), 1..12);
    (files, 1_u32..10, 1_usize..5, hot).prop_map(|(files, level, members, hot)| Case {
        files,
        level,
        members,
        hot,
    })
}

async fn any_layer(case: Case) -> Result<(), TestCaseError> {
    let payloads = case.files.iter();
    let payloads = payloads
        .map(|(len, seed, repeat)| payload(*len, *seed, *repeat))
        .collect();
    let world = World::new(payloads, case.level, case.members);
    let (store, layer) = world.open().await;
    let count = layer.index().chunks.len();
    if count == 0 {
        prop_assert_eq!(layer.file().shape(&[]).unwrap(), None);
        return Ok(());
    }
    let hot = case
        .hot
        .iter()
        .map(|at| ChunkId::try_from(at.index(count)).unwrap());
    let mut hot: Vec<ChunkId> = hot.collect();
    let (before, blob_size) = (layer.index().clone(), layer.index().blob_size);
    let plain_len = std::fs::metadata(world.path("index")).unwrap().len();
    let shaped = layer.file().shape(&hot).unwrap();
    store.evict_layers(None).unwrap();
    drop((store, layer));
    let (_store, layer) = world.open().await;
    let after = layer.index();
    hot.sort_unstable();
    prop_assert_eq!(chunks(&before), chunks(after));
    let (had, has) = (fetched(&before, &hot), fetched(after, &hot));
    prop_assert!(has <= had);
    prop_assert_eq!(shaped.is_some(), before.spans != after.spans);
    let len = std::fs::metadata(world.path("index")).unwrap().len();
    prop_assert!(len <= plain_len.max(blob_size / 50));
    // Each alone, hot ones first: in an order in which no span is read as a whole.
    let rest = (0..u32::try_from(count).unwrap()).rev();
    world
        .assert_reads(&layer, hot.into_iter().rev().chain(rest))
        .await;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn every_chunk_of_any_layer_is_right_after_shaping(case in case()) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(any_layer(case))?;
    }
}
