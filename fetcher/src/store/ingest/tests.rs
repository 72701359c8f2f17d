//! What comes between a layer's publishing and its bits.

use super::*;
use crate::test_util::layers::{CHUNK_LEN, chunk_bytes, layer_of};

const CHUNKS: u32 = 100;

fn index() -> LayerIndex {
    let payloads: Vec<_> = (0..CHUNKS).map(chunk_bytes).collect();
    layer_of("layer", &payloads)
}

/// A layer that was streamed and has its name, and of which no bit speaks yet.
fn published(store: &Arc<Store>) -> Arc<LayerFile> {
    let index = index();
    let mut ingest = store.begin_ingest(&index.blob_digest).unwrap();
    for (id, chunk) in (0..).zip(&index.chunks) {
        ingest
            .write_at(chunk.data_offset, &chunk_bytes(id))
            .unwrap();
    }
    let bits = Bitmap::empty(CHUNKS);
    let (file, is_ours) = ingest.complete(index, &[], &bits).unwrap();
    assert!(is_ours && !file.is_present(0));
    file
}

/// The chunks that are present, all of which read as they should.
fn present(file: &LayerFile) -> Vec<u32> {
    let read = |id: &u32| {
        let at = file.index().chunks[*id as usize].data_offset;
        let mut buf = vec![0xee; CHUNK_LEN as usize];
        let read = file.read_at(at, &mut buf).unwrap();
        assert!(!read || buf == chunk_bytes(*id), "chunk {id} is wrong");
        assert_eq!(read, file.is_present(*id));
        read
    };
    (0..CHUNKS).filter(read).collect()
}

/// `evict` between the two; what is present then, and after a flush and a restart.
fn adopted(evict: impl FnOnce(&Path, &Arc<Store>, Arc<LayerFile>) -> Arc<LayerFile>) -> Vec<u32> {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let file = published(&store);
    let file = evict(dir.path(), &store, file);
    file.adopt_all().unwrap();
    let found = present(&file);
    let bytes = found.len() as u64 * u64::from(CHUNK_LEN);
    assert_eq!(file.present_bytes(), bytes);
    assert_eq!(file.is_known_whole(), found.len() == CHUNKS as usize);
    file.flush().unwrap();
    assert_eq!(present(&file), found, "a flush brings nothing back");
    drop((file, store));
    let store = Store::open(dir.path()).unwrap();
    let file = store.open_layer(&index().blob_digest).unwrap().unwrap();
    assert_eq!(present(&file), found);
    found
}

/// What another process does with the layer.
fn elsewhere(root: &Path, act: impl FnOnce(&LayerFile)) {
    let other = Store::open(root).unwrap();
    act(&other.open_layer(&index().blob_digest).unwrap().unwrap());
}

#[test]
fn what_is_not_evicted_meanwhile_is_adopted() {
    let all: Vec<u32> = (0..CHUNKS).collect();
    assert_eq!(adopted(|_, _, file| file), all);
    // Bits of another process are no eviction.
    let recorded = adopted(|root, _, file| {
        elsewhere(root, |other| {
            crate::test_util::layers::put_chunk(other, 7).unwrap();
            other.flush().unwrap();
        });
        file
    });
    assert_eq!(recorded, all);
}

#[test]
fn what_this_process_evicts_meanwhile_is_absent() {
    let none = adopted(|_, _, file| {
        file.evict_all().unwrap();
        file
    });
    assert!(none.is_empty(), "{none:?}");
    let rest = adopted(|_, _, file| {
        file.evict(&[3, 4, 70]).unwrap();
        file
    });
    let expected = (0..CHUNKS).filter(|id| ![3, 4, 70].contains(id));
    assert!(rest.iter().copied().eq(expected), "{rest:?}");
}

#[test]
fn what_another_process_evicts_meanwhile_is_absent() {
    let evict = |root: &Path| {
        elsewhere(root, |other| {
            other.evict_all().unwrap();
        });
    };
    let none = adopted(|root, _, file| {
        evict(root);
        file
    });
    assert!(none.is_empty(), "{none:?}");
    // The same before this process has it open.
    let none = adopted(|root, store, file| {
        evict(root);
        store.forget_layer(file.digest());
        store.open_layer(file.digest()).unwrap().unwrap()
    });
    assert!(none.is_empty(), "{none:?}");
    // The record of an eviction that was lost is no record of none.
    let none = adopted(|root, store, file| {
        evict(root);
        std::fs::write(store.layer_dir(file.digest()).join(BITMAP), b"LAZ").unwrap();
        file
    });
    assert!(none.is_empty(), "{none:?}");
}

#[test]
fn what_is_removed_meanwhile_is_compared() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let file = published(&store);
    elsewhere(dir.path(), |other| {
        other.evict(&[5]).unwrap();
    });
    assert!(store.remove_layer(file.digest()).unwrap());
    file.adopt_all().unwrap();
    let expected = (0..CHUNKS).filter(|id| *id != 5);
    assert!(present(&file).into_iter().eq(expected));
}
