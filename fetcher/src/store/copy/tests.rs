//! Copying between layers that share chunks, whatever becomes of the other one.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::*;
use crate::index::LayerFormat;
use crate::test_util::disk::CrashDisk;
use crate::test_util::layers::regular_file;
use crate::types::{ByteRange, Digest};

/// Bytes of a content: as long as asked, never zero.
fn content(seed: u32, len: u32) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at * 13 + seed * 31) % 255 + 1).unwrap())
        .collect()
}

/// A layer of one file for each list of chunks; a chunk is a seed and a length.
fn index(name: &str, files: &[&[(u32, u32)]]) -> LayerIndex {
    let (mut entries, mut chunks, mut end) = (Vec::new(), Vec::new(), 0_u64);
    for (number, file) in files.iter().enumerate() {
        let start = align_up(end).unwrap();
        end = start;
        for (seed, len) in *file {
            let digest = Digest::sha256(&content(*seed, *len));
            chunks.push(Chunk {
                encoding: Encoding::Stored {
                    blob: ByteRange::at(end, u64::from(*len)).unwrap(),
                },
                data_offset: end,
                len: *len,
                chunk_digest: digest.as_bytes().try_into().ok(),
            });
            end += u64::from(*len);
        }
        entries.push(regular_file(&format!("file{number}"), end - start, start));
    }
    LayerIndex {
        blob_digest: Digest::sha256(name.as_bytes()),
        blob_size: end,
        format: LayerFormat::Tar,
        files: entries,
        chunks,
        spans: Vec::new(),
        data_len: end,
    }
}

fn layer(store: &Arc<Store>, name: &str, files: &[&[(u32, u32)]]) -> Arc<LayerFile> {
    store.create_layer(index(name, files)).unwrap()
}

fn put(file: &LayerFile, id: ChunkId, seed: u32) {
    let bytes = content(seed, file.chunk(id).unwrap().len);
    let digest = Digest::sha256(&bytes);
    let verified = codec::verify(String::new, &digest, bytes).unwrap();
    file.put(id, &verified).unwrap();
}

fn read(file: &LayerFile, id: ChunkId) -> Option<Vec<u8>> {
    let chunk = file.chunk(id).unwrap();
    let mut bytes = vec![0xee; chunk.len as usize];
    let read = file.read_at(chunk.data_offset, &mut bytes).unwrap();
    read.then_some(bytes)
}

fn all(file: &LayerFile) -> Vec<ChunkId> {
    (0..).take(file.index().chunks.len()).collect()
}

/// Files of one chunk, of several that share blocks, and of several that do not.
const A: &[&[(u32, u32)]] = &[
    &[(1, 100)],
    &[(2, 40_000), (3, 40_000)],
    &[(4, 65_536), (5, 65_536), (6, 40_000)],
    &[(7, 50_000)],
];
/// The same contents in another order, among others.
const B: &[&[(u32, u32)]] = &[
    &[(9, 70_000)],
    &[(4, 65_536), (5, 65_536), (6, 40_000)],
    &[(7, 50_000)],
    &[(1, 100)],
    &[(2, 40_000), (3, 40_000), (10, 5)],
];
const B_SEEDS: [u32; 9] = [9, 4, 5, 6, 7, 1, 2, 3, 10];

/// Fills all of layer A, as another handle of the store.
fn fill_a(store: &Arc<Store>) -> Arc<LayerFile> {
    let a = layer(store, "a", A);
    for (id, seed) in (0..).zip([1, 2, 3, 4, 5, 6, 7]) {
        put(&a, id, seed);
    }
    a.flush().unwrap();
    a
}

fn check_b(b: &LayerFile, copied: Copied, done: &[ChunkId]) {
    assert_eq!(done, [1, 2, 3, 4, 5, 6, 7], "all but 0 and 8");
    let bytes = 65_536 * 2 + 40_000 * 3 + 50_000 + 100;
    assert_eq!(copied, Copied { chunks: 7, bytes });
    for (id, seed) in (0..).zip(B_SEEDS) {
        let found = read(b, id);
        let expected = content(seed, b.chunk(id).unwrap().len);
        assert_eq!(found, done.contains(&id).then_some(expected), "chunk {id}");
    }
    let meta = b.usage().unwrap();
    assert_eq!((meta.copied, meta.present), (bytes, bytes));
}

#[test]
fn what_another_layer_has_is_copied_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    fill_a(&store);
    // Another process, which has never opened layer A.
    let store = Store::open(dir.path()).unwrap();
    let b = layer(&store, "b", B);
    let mut done = Vec::new();
    let copied = b.copy_local(&all(&b), |id, _| done.push(id));
    check_b(&b, copied, &done);
    b.flush().unwrap();
    drop(b);
    let again = Store::open(dir.path()).unwrap();
    let b = again
        .open_layer(&index("b", B).blob_digest)
        .unwrap()
        .unwrap();
    check_b(&b, copied, &done);
    assert_eq!(b.data_len_on_disk(), b.index().data_len);
}

#[test]
fn blocks_are_shared_where_the_disk_can() {
    let dir = tempfile::tempdir().unwrap();
    // This disk can, whatever the file system below it.
    let disk = Arc::new(CrashDisk::new(dir.path(), None));
    let store = Store::open_on(dir.path(), Arc::clone(&disk) as Arc<_>).unwrap();
    fill_a(&store);
    let b = layer(&store, "b", B);
    let mut done = Vec::new();
    let copied = b.copy_local(&all(&b), |id, _| done.push(id));
    check_b(&b, copied, &done);
    assert_eq!(disk.shared(), 3, "large ones that share no block");
    assert_eq!(b.data_len_on_disk(), b.index().data_len);
    // Who holds the other layer is not waited for.
    store.remove_layer(b.digest()).unwrap();
    let b = layer(&store, "b", B);
    let lock = super::super::file::lock_layer(&store.layer_dir(&index("a", A).blob_digest));
    assert_eq!(b.copy_local(&all(&b), |_, _| {}), copied);
    assert_eq!(disk.shared(), 3);
    drop(lock);
}

impl LayerFile {
    fn data_len_on_disk(&self) -> u64 {
        let store = self.store().unwrap();
        let path = store.layer_dir(self.digest()).join(DATA);
        std::fs::metadata(path).unwrap().size()
    }
}

#[test]
fn what_is_stale_or_made_up_is_not_copied_and_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let a = fill_a(&store);
    let b = layer(&store, "b", B);
    let digest = |id| b.chunk_digest(id).unwrap();
    // Evicted, rotten, and noted where it never was.
    a.evict(&[0]).unwrap();
    let path = store.layer_dir(a.digest()).join(DATA);
    let data = File::options().write(true).open(path).unwrap();
    let at = a.chunk(6).unwrap().data_offset;
    data.write_all_at(b"rotten", at + 100).unwrap();
    let nowhere = Place {
        layer: 77,
        data_offset: 0,
    };
    store.chunks.note(&digest(0), nowhere);
    let beyond = Place {
        layer: short(a.digest()),
        data_offset: u64::MAX - 5,
    };
    store.chunks.note(&digest(8), beyond);
    let mut done = Vec::new();
    b.copy_local(&all(&b), |id, _| done.push(id));
    assert_eq!(done, [1, 2, 3, 6, 7]);
    for id in [0, 4, 5, 8] {
        assert!(!b.is_present(id) && store.chunks.find(&digest(id)).is_empty());
    }
    // A layer that is gone is not looked for again.
    store.remove_layer(a.digest()).unwrap();
    b.evict_all().unwrap();
    assert_eq!(b.copy_local(&all(&b), |_, _| {}), Copied::default());
    let left = store.chunks.find(&digest(1));
    assert!(left.iter().all(|place| place.layer == short(b.digest())));
}

#[test]
fn asking_about_a_layer_that_is_gone_forgets_its_places() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let a = fill_a(&store);
    let b = layer(&store, "b", B);
    assert_eq!(b.maybe_local(&all(&b)), [1, 2, 3, 4, 5, 6, 7]);
    store.remove_layer(a.digest()).unwrap();
    // Of two processes one knows the name of the layer yet.
    let other = Store::open(dir.path()).unwrap();
    let others = other.open_layer(b.digest()).unwrap().unwrap();
    for (file, asked) in [(&b, &[1, 2][..]), (&others, &[3, 4, 5, 6, 7])] {
        assert_eq!(file.maybe_local(asked), [0_u32; 0]);
        for id in asked {
            let left = store.chunks.find(&b.chunk_digest(*id).unwrap());
            assert!(left.is_empty(), "chunk {id}: {left:?}");
        }
    }
}

#[test]
fn the_layers_are_listed_once_for_all_chunks_of_one_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (digest, layer) = ([5; 32], Digest::sha256(b"gone"));
    let place = |data_offset| Place {
        layer: short(&layer),
        data_offset,
    };
    let mut sources = Sources::of(&store);
    assert!(sources.get(&digest, place(0)).is_none());
    // Who listed again would find it.
    std::fs::create_dir_all(store.layer_dir(&layer)).unwrap();
    std::fs::write(store.layer_dir(&layer).join(DATA), b"bytes").unwrap();
    assert!(sources.get(&digest, place(4096)).is_none());
    let found = Sources::of(&store).get(&digest, place(0)).is_some();
    assert!(found, "the next call looks anew");
}

#[test]
fn a_layer_that_cannot_be_looked_at_is_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let a = fill_a(&store);
    let b = layer(&store, "b", B);
    // What is no directory cannot be listed.
    let (layers, aside) = (dir.path().join("layers"), dir.path().join("aside"));
    std::fs::rename(&layers, &aside).unwrap();
    std::fs::write(&layers, b"").unwrap();
    assert_eq!(b.maybe_local(&[1]), [0_u32; 0]);
    std::fs::remove_file(&layers).unwrap();
    std::fs::rename(&aside, &layers).unwrap();
    assert_eq!(b.maybe_local(&[1]), [1]);
    drop(a);
}

#[test]
fn a_check_finds_again_where_everything_is() {
    let dir = tempfile::tempdir().unwrap();
    fill_a(&Store::open(dir.path()).unwrap());
    std::fs::remove_file(dir.path().join("chunks")).unwrap();
    let store = Store::open(dir.path()).unwrap();
    let b = layer(&store, "b", B);
    assert_eq!(b.copy_local(&all(&b), |_, _| {}), Copied::default());
    store.check().unwrap();
    assert_eq!(b.copy_local(&all(&b), |_, _| {}).chunks, 7);
}

#[test]
fn a_copy_beside_evictions_of_its_source_is_right_or_absent() {
    for can_share in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let store = match can_share {
            true => {
                let disk = Arc::new(CrashDisk::new(dir.path(), None));
                Store::open_on(dir.path(), disk).unwrap()
            }
            false => Store::open(dir.path()).unwrap(),
        };
        let a = fill_a(&store);
        let b = layer(&store, "b", B);
        let stop = AtomicBool::new(false);
        let mut copied = BTreeSet::new();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    a.evict_all().unwrap();
                    for (id, seed) in (0..).zip([1, 2, 3, 4, 5, 6, 7]) {
                        put(&a, id, seed);
                    }
                }
            });
            for _ in 0..40 {
                b.copy_local(&all(&b), |id, _| {
                    copied.insert(id);
                });
                for (id, seed) in (0..).zip(B_SEEDS) {
                    if let Some(bytes) = read(&b, id) {
                        assert!(bytes == content(seed, b.chunk(id).unwrap().len), "{id}");
                    }
                }
                b.evict_all().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(!copied.contains(&0) && !copied.contains(&8), "{copied:?}");
    }
}

#[test]
fn only_whole_blocks_of_one_chunk_are_shared() {
    let index = index(
        "x",
        &[
            &[(1, 100)],
            &[(2, 65_536), (3, 65_536), (4, 40_000)],
            &[(5, 40_000), (6, 40_000)],
            &[(7, 40_000)],
        ],
    );
    let stretch = |id, from| stretch(&index, id, from).map(|stretch| (stretch.to, stretch.len));
    assert_eq!(stretch(0, 0), None, "small");
    assert_eq!(stretch(1, 8192), Some((4096, 65_536)));
    assert_eq!(stretch(1, 8191), None, "begins within a block there");
    assert_eq!(stretch(3, 0), Some((135_168, 40_960)), "with its padding");
    assert_eq!(
        stretch(4, 0),
        None,
        "its last block has the next one's bytes"
    );
    assert_eq!(stretch(5, 0), None, "begins within a block here");
    assert_eq!(
        stretch(6, 0),
        None,
        "the data file ends within its last block"
    );
    assert_eq!(stretch(7, 0), None, "no such chunk");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn whatever_the_table_says_only_right_bytes_are_put(
        notes in prop::collection::vec((0_u32..9, any::<bool>(), 0_u64..400_000), 0..60),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let a = fill_a(&store);
        let b = layer(&store, "b", B);
        for (id, of_a, data_offset) in notes {
            let layer = short(if of_a { a.digest() } else { b.digest() });
            store.chunks.note(&b.chunk_digest(id).unwrap(), Place { layer, data_offset });
        }
        b.copy_local(&all(&b), |_, _| {});
        for (id, seed) in (0..).zip(B_SEEDS) {
            if let Some(bytes) = read(&b, id) {
                prop_assert!(bytes == content(seed, b.chunk(id).unwrap().len));
            }
        }
    }
}
