//! Crashes and failures of the store at every single operation.
//!
//! Each scenario runs once to count its operations, then once per operation and fault.
//! After a crash, several states that the device may be left in are opened and checked:
//! what is present hashes right, what was reported as recorded is there, nothing that
//! was being made is visible.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::index::ingest::{Ingest, IngestPlan, LayerSink};
use lazarette_fetcher::index::wire::{self, Header};
use lazarette_fetcher::index::{ChunkId, Encoding, LayerFormat, LayerIndex, Span};
use lazarette_fetcher::source::BlobRef;
use lazarette_fetcher::store::disk::{Disk, RealDisk, Stretch};
use lazarette_fetcher::store::{Bounds, LayerFile, PartialIndex, Store};
use lazarette_fetcher::test_util::content::{noise, tar};
use lazarette_fetcher::test_util::disk::{CrashDisk, Fault, scratch};
use lazarette_fetcher::test_util::layers::{
    CHUNK_LEN, chunk_bytes, layer_of, put_bytes, put_chunk,
};
use lazarette_fetcher::types::{ByteRange, Digest, Reference};
use lazarette_fetcher::{Error, Result};

const SEEDS: u64 = 6;
const CHUNKS: u32 = 5;

/// The layers of [`copy`]: large enough for their blocks to be shared.
const LARGE: [&str; 2] = ["large", "other large"];
const LARGE_LEN: u32 = 33_000;
/// The layer of [`shape`].
const STREAMED: &str = "streamed";

/// A layer of one file per chunk, with padding between them.
fn index(name: &str) -> LayerIndex {
    if LARGE.contains(&name) {
        let bytes = |id| vec![u8::try_from(id + 1).unwrap(); LARGE_LEN as usize];
        return layer_of(name, &[bytes(0), bytes(1), bytes(2)]);
    }
    layer_of(name, &(0..CHUNKS).map(chunk_bytes).collect::<Vec<_>>())
}

/// The same layer with two spans, whose details came without it; and those.
fn index_without_details(name: &str) -> (PartialIndex, [Vec<u8>; 2]) {
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
fn index_of_whole_spans(name: &str) -> LayerIndex {
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

/// The real disk, which nobody unplugs while a state is only looked at: syncs of
/// thousands of states would take minutes and show nothing.
struct Unsynced;

impl Disk for Unsynced {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<File> {
        RealDisk.create(path)
    }
    fn write_at(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        RealDisk.write_at(file, offset, bytes)
    }
    fn share(&self, from: &File, to: &File, stretch: Stretch) -> io::Result<()> {
        RealDisk.share(from, to, stretch)
    }
    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        RealDisk.set_len(file, len)
    }
    fn punch(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        RealDisk.punch(file, offset, len)
    }
    fn sync_data(&self, _: &File) -> io::Result<()> {
        Ok(())
    }
    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        RealDisk.exchange(a, b)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir(path)
    }
}

/// What the scenario was told is safe. A crash must not take it.
#[derive(Default, Clone, Debug)]
struct Acked {
    /// Chunks of layer "lazy" that a flush recorded.
    chunks: BTreeSet<ChunkId>,
    /// Chunks of layer "other large" that a flush recorded.
    copied: BTreeSet<ChunkId>,
    /// Layers that must be complete.
    complete: BTreeSet<&'static str>,
    /// Whether the streamed layer must have another index than it was made with, or must not.
    shaped: Option<bool>,
    /// Layers that must be gone.
    removed: BTreeSet<&'static str>,
    /// Blobs that must be there.
    blobs: BTreeSet<Vec<u8>>,
}

/// Runs all of it, or up to the first error; notes what was acknowledged.
type Scenario = fn(&Arc<Store>, &mut Acked) -> Result<()>;

fn fill_and_flush(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let file = store.create_layer(index("lazy"))?;
    fill(&file, acked)
}

fn learn_and_flush(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let index = index_of_whole_spans("lazy");
    let file = store.create_layer_with(index, &[0; 32])?;
    fill(&file, acked)
}

/// Details come just before the chunks that they speak of.
fn take_details_and_flush(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let (partial, details) = index_without_details("lazy");
    let file = store.create_layer_without_details(&partial)?;
    for (batch, span) in [(&[2_u32, 0][..], 0), (&[4, 3], 1), (&[1], 0)] {
        file.put_details(span, details[span as usize].clone().into())?;
        for id in batch {
            put_chunk(&file, *id)?;
        }
        file.flush()?;
        acked.chunks.extend(batch);
    }
    Ok(())
}

fn fill(file: &LayerFile, acked: &mut Acked) -> Result<()> {
    complete_details(file)?;
    for batch in [&[3_u32, 0][..], &[4], &[1, 2]] {
        for id in batch {
            put_chunk(file, *id)?;
        }
        file.flush()?;
        acked.chunks.extend(batch);
    }
    Ok(())
}

fn ingest(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let index = index("whole");
    let mut ingest = store.begin_ingest(&index.blob_digest)?;
    for id in 0..CHUNKS {
        ingest.write_at(u64::from(id) * 4096, &chunk_bytes(id))?;
    }
    ingest.commit(index, &[])?;
    acked.complete.insert("whole");
    Ok(())
}

/// Published first, recorded later.
fn publish_and_flush(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let index = index("lazy");
    let mut ingest = store.begin_ingest(&index.blob_digest)?;
    for id in 0..CHUNKS {
        ingest.write_at(u64::from(id) * 4096, &chunk_bytes(id))?;
    }
    let file = ingest.publish(index, &[])?;
    assert!(file.is_complete());
    assert_eq!(check_layer(&file).len(), CHUNKS as usize);
    file.flush()?;
    acked.complete.insert("lazy");
    Ok(())
}

fn ingest_over_a_partial_layer(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let index = index("lazy");
    let file = store.create_layer(index.clone())?;
    put_chunk(&file, 2)?;
    file.flush()?;
    acked.chunks.insert(2);
    let mut ingest = store.begin_ingest(&index.blob_digest)?;
    for id in 0..CHUNKS {
        ingest.write_at(u64::from(id) * 4096, &chunk_bytes(id))?;
    }
    put_chunk(&file, 1)?;
    let whole = ingest.commit(index, &[])?;
    acked.complete.insert("lazy");
    assert!(whole.is_complete());
    put_chunk(&file, 3)?;
    file.flush()
}

fn aborted_ingest(store: &Arc<Store>, _: &mut Acked) -> Result<()> {
    let index = index("aborted");
    let mut ingest = store.begin_ingest(&index.blob_digest)?;
    ingest.write_at(0, &chunk_bytes(0))?;
    drop(ingest);
    Ok(())
}

fn remove(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    ingest(store, acked)?;
    let digest = index("whole").blob_digest;
    let open = store.open_layer(&digest)?;
    acked.complete.clear();
    assert!(store.remove_layer(&digest)?);
    acked.removed.insert("whole");
    drop(open);
    Ok(())
}

fn blobs(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    for bytes in [&b"a manifest"[..], b"a config", &[7; 5000]] {
        store.put_blob(&Digest::sha256(bytes), bytes)?;
        acked.blobs.insert(bytes.to_vec());
    }
    acked.blobs.remove(&b"a config"[..]);
    assert!(store.remove_blob(&Digest::sha256(b"a config"))?);
    Ok(())
}

fn evict_and_fill_again(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let file = store.create_layer(index("lazy"))?;
    for id in 0..CHUNKS {
        put_chunk(&file, id)?;
    }
    file.flush()?;
    acked.chunks.extend([0, 2, 4]);
    file.evict(&[1, 3])?;
    put_chunk(&file, 3)?;
    file.flush()?;
    acked.chunks = [3].into();
    file.evict(&[0, 2, 4])?;
    acked.chunks.clear();
    file.evict_all()?;
    put_chunk(&file, 0)?;
    file.flush()?;
    acked.chunks.insert(0);
    Ok(())
}

/// One layer takes what another has, which is then evicted and removed.
fn copy(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let [large, other] = LARGE.map(index);
    let from = store.create_layer(large)?;
    for id in 0..3 {
        put_bytes(
            &from,
            id,
            vec![u8::try_from(id + 1).unwrap(); LARGE_LEN as usize],
        )?;
    }
    let to = store.create_layer(other)?;
    for ids in [[0], [2]] {
        to.copy_local(&ids, |_, _| {});
        let present = (0..3).filter(|id| to.is_present(*id)).collect();
        to.flush()?;
        acked.copied = present;
    }
    from.evict_all()?;
    acked.copied.remove(&0);
    to.evict(&[0])?;
    store.remove_layer(from.digest())?;
    // Nobody has it any more: it stays absent.
    to.copy_local(&[0, 1], |_, _| {});
    to.flush()
}

/// Hints beside a layer's data, which everything leaves as they are or drops.
fn pin_and_trim(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    fill_and_flush(store, acked)?;
    let file = store.create_layer(index("lazy"))?;
    let mut buf = vec![0; 100];
    file.read_at(0, &mut buf)?;
    file.pin([0, 1], SystemTime::now());
    file.flush()?;
    acked.chunks.clear();
    store.trim(0)?;
    put_chunk(&file, 1)?;
    file.flush()?;
    acked.chunks.insert(1);
    Ok(())
}

/// A gzip layer, streamed once, and what of it starts read.
struct Streamed {
    index: LayerIndex,
    details: Vec<u8>,
    seams: Option<Vec<u8>>,
    payload: Vec<u8>,
    hot: ChunkId,
}

/// Keeps payloads that follow one another.
struct Memory(Vec<u8>);

impl LayerSink for Memory {
    fn write_at(&mut self, _: u64, bytes: &[u8]) -> Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

fn streamed() -> &'static Streamed {
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

/// A layer gets an index that was made for its starts.
fn shape(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let streamed = streamed();
    let mut ingest = store.begin_ingest(&streamed.index.blob_digest)?;
    ingest.write_at(0, &streamed.payload)?;
    let ingest = ingest.with_seams(streamed.seams.clone());
    let file = ingest.commit(streamed.index.clone(), &streamed.details)?;
    acked.complete.insert(STREAMED);
    let shaped = file.shape(&[streamed.hot])?.expect("it is worth it");
    assert!(shaped.after_bytes < shaped.before_bytes);
    acked.shaped = Some(true);
    Ok(())
}

/// It turns out to be wrong.
fn shape_and_doubt(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    shape(store, acked)?;
    let file = store.open_layer(&streamed().index.blob_digest)?;
    let file = file.expect("it was made");
    assert_ne!(file.index().spans, streamed().index.spans);
    acked.shaped = None;
    file.doubt(streamed().hot)?;
    acked.shaped = Some(false);
    Ok(())
}

/// Whole with either index, and with the one that was acknowledged.
fn check_streamed(store: &Store, acked: &Acked, when: &str) {
    let file = store.open_layer(&streamed().index.blob_digest);
    let file = file.unwrap_or_else(|e| panic!("{when}: streamed layer: {e}"));
    assert!(
        file.is_some() || !acked.complete.contains(STREAMED),
        "{when}"
    );
    let Some(file) = file else {
        return;
    };
    assert!(file.is_complete(), "{when}");
    for span in 0..u32::try_from(file.index().spans.len()).unwrap() {
        file.span_details(span).unwrap();
    }
    let checked = file.check_all().unwrap();
    assert_eq!(checked.dropped, Vec::<ChunkId>::new(), "{when}");
    let mut read = vec![0; streamed().payload.len()];
    assert!(
        file.read_at(0, &mut read).unwrap() && read == streamed().payload,
        "{when}"
    );
    if let Some(shaped) = acked.shaped {
        assert_eq!(
            shaped,
            file.index().spans != streamed().index.spans,
            "{when}"
        );
    }
}

const SCENARIOS: [(&str, Scenario); 14] = [
    ("shape", shape),
    ("shape and doubt", shape_and_doubt),
    ("take details and flush", take_details_and_flush),
    ("copy", copy),
    ("pin and trim", pin_and_trim),
    ("learn digests and flush", learn_and_flush),
    ("evict and fill again", evict_and_fill_again),
    ("fill and flush", fill_and_flush),
    ("ingest", ingest),
    ("publish and flush", publish_and_flush),
    ("ingest over a partial layer", ingest_over_a_partial_layer),
    ("aborted ingest", aborted_ingest),
    ("remove", remove),
    ("blobs", blobs),
];

/// Whatever is present in a layer reads as it should; returns what is.
fn check_layer(file: &LayerFile) -> BTreeSet<ChunkId> {
    let mut present = BTreeSet::new();
    for (id, chunk) in (0..).zip(&file.index().chunks) {
        let mut buf = vec![0xee; chunk.len as usize];
        let claimed = file.is_present(id);
        let read = file.read_at(chunk.data_offset, &mut buf).unwrap();
        assert_eq!(read, claimed, "chunk {id} is claimed but not right");
        if read {
            let expected = match chunk.chunk_digest {
                Some(digest) => Digest::Sha256(digest),
                None => Digest::sha256(&chunk_bytes(id)),
            };
            let digest = Digest::sha256(&buf);
            assert_eq!(digest, expected, "chunk {id} is present but wrong");
            present.insert(id);
        }
    }
    present
}

fn check(root: &Path, acked: &Acked, when: &str) {
    let store = Store::open_on(root, Arc::new(Unsynced)).unwrap_or_else(|e| panic!("{when}: {e}"));
    for leftovers in ["ingest", "trash"] {
        let left = std::fs::read_dir(root.join(leftovers)).unwrap().count();
        assert_eq!(left, 0, "{when}: {leftovers}");
    }
    for name in ["lazy", "whole", "aborted", LARGE[0], LARGE[1]] {
        let file = store
            .open_layer(&index(name).blob_digest)
            .unwrap_or_else(|e| panic!("{when}: layer {name}: {e}"));
        let present = file.as_deref().map(check_layer).unwrap_or_default();
        if name == "lazy" {
            assert!(acked.chunks.is_subset(&present), "{when}: {present:?}");
        } else if name == LARGE[1] {
            assert!(acked.copied.is_subset(&present), "{when}: {present:?}");
        } else if let Some(file) = file.as_ref().filter(|_| name != LARGE[0]) {
            assert!(file.is_complete(), "{when}: {name} is half visible");
        }
        if acked.complete.contains(name) {
            assert_eq!(present.len(), CHUNKS as usize, "{when}: {name}");
        }
        if acked.removed.contains(name) {
            assert!(file.is_none(), "{when}: {name} came back");
        }
        assert!(name != "aborted" || file.is_none(), "{when}");
    }
    check_streamed(&store, acked, when);
    for digest in store.blobs().unwrap() {
        // Verifies: a damaged blob would come back as absent.
        assert!(
            store.get_blob(&digest).unwrap().is_some(),
            "{when}: {digest}"
        );
    }
    for bytes in &acked.blobs {
        let found = store.get_blob(&Digest::sha256(bytes)).unwrap();
        assert_eq!(found.as_deref(), Some(&bytes[..]), "{when}");
    }
    if when.ends_with("seed 0") {
        still_usable(&store, when);
    }
}

/// Gives a layer that lacks details all of them.
fn complete_details(file: &LayerFile) -> Result<()> {
    if file.details_origin().is_none() {
        return Ok(());
    }
    let (_, details) = index_without_details("lazy");
    for (number, details) in (0..).zip(details) {
        file.put_details(number, details.into())?;
    }
    Ok(())
}

/// The store works on after whatever happened.
fn still_usable(store: &Arc<Store>, when: &str) {
    for scenario in [fill_and_flush, ingest] {
        let mut acked = Acked::default();
        scenario(store, &mut acked).unwrap_or_else(|e| panic!("{when}, then: {e}"));
    }
    for name in ["lazy", "whole"] {
        let file = store.open_layer(&index(name).blob_digest).unwrap().unwrap();
        assert_eq!(check_layer(&file).len(), CHUNKS as usize, "{when}");
    }
}

/// Opens a store on `disk` and runs the scenario.
fn run(root: &Path, disk: &Arc<CrashDisk>, scenario: Scenario, acked: &mut Acked) -> Result<()> {
    let disk: Arc<CrashDisk> = Arc::clone(disk);
    scenario(&Store::open_on(root, disk)?, acked)
}

fn operations_of(scenario: Scenario) -> u64 {
    let dir = scratch();
    let disk = Arc::new(CrashDisk::new(dir.path(), None));
    run(dir.path(), &disk, scenario, &mut Acked::default()).unwrap();
    disk.ops()
}

#[test]
fn a_crash_at_any_operation_leaves_nothing_wrong() {
    for (name, scenario) in SCENARIOS {
        let ops = operations_of(scenario);
        assert!(ops > 5, "{name} does something");
        for at in 0..=ops {
            let dir = scratch();
            let disk = Arc::new(CrashDisk::new(dir.path(), Some((at, Fault::Crash))));
            let mut acked = Acked::default();
            let result = run(dir.path(), &disk, scenario, &mut acked);
            // A crash while cleaning up after success or abort is not an error.
            assert!(
                disk.crashed() || at == ops && result.is_ok(),
                "{name} at {at}"
            );
            for seed in 0..SEEDS {
                let after = scratch();
                disk.materialise(after.path(), seed).unwrap();
                check(
                    after.path(),
                    &acked,
                    &format!("{name}, op {at}/{ops}, seed {seed}"),
                );
            }
        }
    }
}

#[test]
fn a_failure_at_any_operation_loses_nothing() {
    for (name, scenario) in SCENARIOS {
        let ops = operations_of(scenario);
        for at in 0..ops {
            for fault in [Fault::NoSpace, Fault::Io] {
                let when = format!("{name}, {fault:?} at {at}/{ops}");
                let dir = scratch();
                let disk = Arc::new(CrashDisk::new(dir.path(), Some((at, fault))));
                let mut acked = Acked::default();
                let result = run(dir.path(), &disk, scenario, &mut acked);
                if let Err(error) = result {
                    let full = matches!(error, Error::NoSpace { .. });
                    assert_eq!(full, fault == Fault::NoSpace, "{when}: {error}");
                }
                // The same process goes on with the same disk, and crashes after that.
                let store = Store::open_on(dir.path(), Arc::clone(&disk) as Arc<_>).unwrap();
                let mut later = acked.clone();
                later.removed.clear();
                fill_and_flush(&store, &mut later).unwrap_or_else(|e| panic!("{when}: {e}"));
                drop(store);
                for seed in 0..3 {
                    let after = scratch();
                    disk.materialise(after.path(), seed).unwrap();
                    check(after.path(), &later, &format!("{when}, seed {seed}"));
                }
                check(dir.path(), &acked, &when);
            }
        }
    }
}

#[test]
fn a_disk_that_is_full_from_any_operation_on_loses_nothing() {
    for (name, scenario) in SCENARIOS {
        let ops = operations_of(scenario);
        for at in 0..ops {
            let when = format!("{name}, full from {at}/{ops} on");
            let dir = scratch();
            let disk = Arc::new(CrashDisk::new(dir.path(), Some((at, Fault::Full))));
            let mut acked = Acked::default();
            let result = run(dir.path(), &disk, scenario, &mut acked);
            if let Err(error) = &result {
                assert!(matches!(error, Error::NoSpace { .. }), "{when}: {error}");
            }
            // Nothing that was kept went, nothing half made came.
            for seed in 0..3 {
                let after = scratch();
                disk.materialise(after.path(), seed).unwrap();
                check(after.path(), &acked, &format!("{when}, seed {}", seed + 1));
            }
            // Then there is room again, for the same process.
            disk.relieve();
            let store = Store::open_on(dir.path(), Arc::clone(&disk) as Arc<_>).unwrap();
            let mut later = Acked::default();
            fill_and_flush(&store, &mut later).unwrap_or_else(|e| panic!("{when}: {e}"));
            ingest(&store, &mut later).unwrap_or_else(|e| panic!("{when}: {e}"));
            drop(store);
            check(dir.path(), &later, &when);
        }
    }
}

#[test]
fn a_copy_shares_blocks_and_survives_its_source() {
    let dir = scratch();
    let disk = Arc::new(CrashDisk::new(dir.path(), None));
    let mut acked = Acked::default();
    run(dir.path(), &disk, copy, &mut acked).unwrap();
    // The last one ends within its last block: it was written.
    assert_eq!((disk.shared(), acked.copied), (1, [2].into()));
}

#[test]
fn a_fill_on_a_full_disk_evicts_if_it_may() {
    let full_at = |ops, bounds: Option<Bounds>| {
        let dir = scratch();
        let disk = Arc::new(CrashDisk::new(dir.path(), Some((ops, Fault::NoSpace))));
        let store = Store::open_on(dir.path(), Arc::clone(&disk) as Arc<_>).unwrap();
        if let Some(bounds) = bounds {
            store.keep_within_bounds(bounds);
        }
        fill_and_flush(&store, &mut Acked::default()).unwrap();
        let file = store.create_layer(index("other")).unwrap();
        let before = disk.ops();
        let outcome = put_chunk(&file, 2);
        let lazy = store
            .open_layer(&index("lazy").blob_digest)
            .unwrap()
            .unwrap();
        (before, outcome, check_layer(&file), check_layer(&lazy))
    };
    let unbounded = Bounds {
        budget: None,
        free_floor: Some(0),
    };
    let (at, outcome, ..) = full_at(u64::MAX, None);
    outcome.unwrap();
    let (_, outcome, there, lazy) = full_at(at, None);
    assert!(matches!(outcome, Err(Error::NoSpace { .. })), "{outcome:?}");
    assert_eq!((there.len(), lazy.len()), (0, CHUNKS as usize));
    let (_, outcome, there, lazy) = full_at(at, Some(unbounded));
    outcome.unwrap();
    assert_eq!((there, lazy.len()), ([2].into(), 0));
}
