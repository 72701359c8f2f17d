//! A data file that somebody else serves, beside those who evict from it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use lazarette_fetcher::Error;
use lazarette_fetcher::store::{LayerFile, Lent, Store, Vouched};
use lazarette_fetcher::test_util::layers::{CHUNK_LEN, chunk_bytes, put_chunk};
use lazarette_fetcher::types::ByteRange;

use crate::support::{BLOCK, CHUNKS, StopOnDrop, evict_at_random, fill, index};
use crate::sys::forbid_holes;

/// Where a chunk's bytes are.
fn range(id: u32) -> ByteRange {
    ByteRange::at(u64::from(id) * BLOCK, CHUNK_LEN.into()).unwrap()
}

fn number(evictions: &File) -> u64 {
    let mut bytes = [0; 8];
    evictions.read_exact_at(&mut bytes, 0).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn what_is_present_is_vouched_for_with_what_is_around_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let file = store.create_layer(index("layer")).unwrap();
    assert_eq!(file.vouch(range(5)).unwrap(), None);
    for id in [4, 5, 6, 8] {
        put_chunk(&file, id).unwrap();
    }
    let around = ByteRange::new(range(3).end(), range(7).start()).unwrap();
    for id in [4, 5, 6] {
        let vouched = file.vouch(range(id)).unwrap();
        assert_eq!(vouched.map(|it| it.range), Some(around), "{id}");
    }
    let beyond = range(6).cover(&range(8));
    assert_eq!(file.vouch(beyond).unwrap(), None, "7 is missing");
    let before = file.vouch(range(5)).unwrap().unwrap();
    let evictions = file.lend().unwrap().evictions;
    assert_eq!(number(&evictions), before.evictions);
    file.evict(&[4]).unwrap();
    assert_ne!(
        number(&evictions),
        before.evictions,
        "what was vouched for is void"
    );
    let after = file.vouch(range(5)).unwrap().unwrap();
    assert_eq!(after.range.start(), range(4).end());
    assert_eq!(after.evictions, number(&evictions));
}

#[test]
fn nobody_evicts_from_a_layer_that_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (store, other) = (
        Store::open(dir.path()).unwrap(),
        Store::open(dir.path()).unwrap(),
    );
    let file = store.create_layer(index("layer")).unwrap();
    put_chunk(&file, 5).unwrap();
    file.flush().unwrap();
    let digest = index("layer").blob_digest;
    let elsewhere = other.open_layer(&digest).unwrap().unwrap();
    let (kept, again) = (file.keep().unwrap(), elsewhere.keep().unwrap());
    let refused = |file: &LayerFile| match file.evict(&[5]) {
        Err(Error::Unsupported { .. }) => true,
        Err(error) => panic!("{error}"),
        Ok(_) => false,
    };
    assert!(refused(&file) && refused(&elsewhere));
    // What comes meanwhile is as good as ever.
    put_chunk(&file, 6).unwrap();
    drop(kept);
    assert!(refused(&file) && refused(&elsewhere), "the other has it");
    assert!(file.vouch(range(5).cover(&range(6))).unwrap().is_some());
    drop(again);
    assert_eq!(elsewhere.evict(&[5]).unwrap().chunks, 1);
    assert_eq!(file.vouch(range(5)).unwrap(), None);
    store.remove_layer(&digest).unwrap();
    drop(file.keep().unwrap());
}

#[test]
fn a_data_file_that_ends_with_a_block_is_the_same_layer() {
    let dir = tempfile::tempdir().unwrap();
    let (index, last) = (index("layer"), CHUNKS - 1);
    let (digest, len) = (index.blob_digest, index.data_len);
    assert_ne!(len % BLOCK, 0);
    let store = Store::open(dir.path()).unwrap();
    let file = store.create_layer(index).unwrap();
    put_chunk(&file, last).unwrap();
    file.pad().unwrap();
    file.pad().unwrap();
    file.flush().unwrap();
    drop((file, store));
    let store = Store::open(dir.path()).unwrap();
    let file = store.open_layer(&digest).unwrap().unwrap();
    let data = file.lend().unwrap().data;
    assert_eq!(data.metadata().unwrap().len(), len.next_multiple_of(BLOCK));
    let vouched = file.vouch(range(last)).unwrap().unwrap().range;
    assert_eq!(vouched.end(), len.next_multiple_of(BLOCK));
    file.evict(&[last]).unwrap();
    assert_eq!(file.vouch(range(last)).unwrap(), None);
}

#[test]
fn bytes_that_rotted_are_not_vouched_for() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    fill(&store, "layer", 1, |_| {});
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    let file = store
        .open_layer(&index("layer").blob_digest)
        .unwrap()
        .unwrap();
    let name = index("layer").blob_digest.file_name();
    let data = dir.path().join("layers").join(name).join("data");
    let data = File::options().write(true).open(data).unwrap();
    data.write_all_at(&[!chunk_bytes(7)[0]], range(7).start())
        .unwrap();
    assert_eq!(file.vouch(range(7)).unwrap(), None);
    assert!(file.vouch(range(8)).unwrap().is_some());
    assert!(!file.is_present(7));
}

#[test]
fn who_serves_a_layer_can_forbid_evictions_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [1, 2].map(|_| Store::open(dir.path()).unwrap());
    fill(&stores[0], "kept", 1, |_| {});
    fill(&stores[0], "free", 2, |_| {});
    let open = |name| {
        stores[1]
            .open_layer(&index(name).blob_digest)
            .unwrap()
            .unwrap()
    };
    let (kept, free) = (open("kept"), open("free"));
    let Lent { data, .. } = kept.lend().unwrap();
    assert!(forbid_holes(&data, true));
    let refused = kept.evict(&[1]).unwrap_err();
    assert!(
        refused.to_string().contains("no daemon is there"),
        "{refused}"
    );
    assert!(kept.is_present(1));
    let trim = stores[1].trim(0).unwrap();
    assert!(
        trim.evicted.chunks > 0 && free.present_bytes() == 0,
        "{trim:?}"
    );
    assert_eq!(
        kept.present_bytes(),
        u64::from(CHUNKS) * u64::from(CHUNK_LEN)
    );
    put_chunk(&kept, 1).unwrap();
    kept.flush().unwrap();
    assert!(forbid_holes(&data, false));
    assert_eq!(kept.evict(&[1]).unwrap().chunks, 1);
}

/// The rule by which another process serves: bytes, then the number, then they go out.
#[test]
fn who_keeps_the_rule_never_serves_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [1, 2].map(|_| Store::open(dir.path()).unwrap());
    fill(&stores[0], "shared", 1, |_| {});
    let digest = index("shared").blob_digest;
    let [mine, other] = stores
        .each_ref()
        .map(|store| store.open_layer(&digest).unwrap().unwrap());
    let Lent { data, evictions } = mine.lend().unwrap();
    let (stop, mut served) = (AtomicBool::new(false), 0);
    std::thread::scope(|threads| {
        let _stop = StopOnDrop(&stop);
        threads.spawn(|| {
            let _stop = StopOnDrop(&stop);
            evict_at_random(&other, 3, 200);
        });
        let mut id = 0;
        while !stop.load(Ordering::Relaxed) {
            id = (id + 7) % CHUNKS;
            let Some(Vouched { evictions: at, .. }) = mine.vouch(range(id)).unwrap() else {
                put_chunk(&mine, id).unwrap();
                continue;
            };
            // As long as it may, and no longer.
            for _ in 0..3 {
                let mut bytes = vec![0; CHUNK_LEN as usize];
                data.read_exact_at(&mut bytes, range(id).start()).unwrap();
                if number(&evictions) != at {
                    break;
                }
                assert!(bytes == chunk_bytes(id), "chunk {id}");
                served += 1;
            }
        }
    });
    assert!(served > 0);
}
