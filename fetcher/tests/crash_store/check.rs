//! What a store must be like whatever happened to it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use lazarette_fetcher::Result;
use lazarette_fetcher::index::ChunkId;
use lazarette_fetcher::store::{LayerFile, Store};
use lazarette_fetcher::test_util::layers::chunk_bytes;
use lazarette_fetcher::test_util::{Synced, SyncedBy};
use lazarette_fetcher::types::Digest;

use crate::layers::{CHUNKS, LARGE, PAST, STREAMED, TAKERS, index, one_member, streamed};
use crate::scenarios::{Acked, fill_and_flush, ingest};
use crate::table;

/// Opens a store whose disk nobody unplugs while it is only looked at: syncs of thousands of
/// states would take minutes and show nothing.
pub(crate) fn open_unsynced(root: &Path) -> Result<Arc<Store>> {
    Store::open_on(root, Arc::new(SyncedBy(|_: Synced<'_>| Ok(()))))
}

/// Returns how many chunks others could take of what is there.
pub(crate) fn check(root: &Path, acked: &Acked, when: &str) -> u64 {
    let has_table = table::is_in(root);
    let store = open_unsynced(root).unwrap_or_else(|e| panic!("{when}: {e}"));
    for leftovers in ["ingest", "trash"] {
        let left = std::fs::read_dir(root.join(leftovers)).unwrap().count();
        assert_eq!(left, 0, "{when}: {leftovers}");
    }
    for name in ["lazy", "whole", "aborted", PAST, LARGE[0], LARGE[1]] {
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
    check_member(&store, acked, when);
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
    let taken = if has_table {
        check_takers(&store, when)
    } else {
        0
    };
    if when.ends_with("seed 0") {
        still_usable(&store, when);
    }
    taken
}

/// Whatever the table of chunks says of where they are: what a layer takes is right.
fn check_takers(store: &Arc<Store>, when: &str) -> u64 {
    let taken = TAKERS.map(|name| {
        let index = index(name);
        let digest = index.blob_digest;
        let ids: Vec<ChunkId> = (0..).take(index.chunks.len()).collect();
        let taker = store.create_layer(index).unwrap();
        let copied = taker.copy_local(&ids, |_, _| {}).chunks;
        assert_eq!(check_layer(&taker).len() as u64, copied, "{when}: {name}");
        drop(taker);
        assert!(store.remove_layer(&digest).unwrap(), "{when}");
        copied
    });
    taken.into_iter().sum()
}

/// Whatever is present in a layer reads as it should; returns what is.
pub(crate) fn check_layer(file: &LayerFile) -> BTreeSet<ChunkId> {
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

/// Whole with either index, and with the one that was acknowledged.
pub(crate) fn check_streamed(store: &Store, acked: &Acked, when: &str) {
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

/// What is present of the layer of one member is right, whichever index it has.
fn check_member(store: &Store, acked: &Acked, when: &str) {
    let layer = one_member();
    let file = store.open_layer(&layer.index.blob_digest);
    let file = file.unwrap_or_else(|e| panic!("{when}: layer of one member: {e}"));
    let Some(file) = file else {
        assert!(acked.member.is_empty() && !acked.member_shaped, "{when}");
        return;
    };
    assert!(
        !acked.member_shaped || !file.index().has_whole_members(),
        "{when}"
    );
    let mut present = BTreeSet::new();
    for (id, chunk) in (0..).zip(&file.index().chunks) {
        let at = usize::try_from(chunk.data_offset).unwrap();
        let mut read = vec![0; chunk.len as usize];
        let claimed = file.is_present(id);
        assert_eq!(
            file.read_at(chunk.data_offset, &mut read).unwrap(),
            claimed,
            "{when}"
        );
        if claimed {
            assert!(
                read == layer.payload[at..at + read.len()],
                "{when}: chunk {id}"
            );
            present.insert(id);
        }
    }
    assert!(acked.member.is_subset(&present), "{when}: {present:?}");
}

/// The store works on after whatever happened.
pub(crate) fn still_usable(store: &Arc<Store>, when: &str) {
    for scenario in [fill_and_flush, ingest] {
        let mut acked = Acked::default();
        scenario(store, &mut acked).unwrap_or_else(|e| panic!("{when}, then: {e}"));
    }
    for name in ["lazy", "whole"] {
        let file = store.open_layer(&index(name).blob_digest).unwrap().unwrap();
        assert_eq!(check_layer(&file).len(), CHUNKS as usize, "{when}");
    }
}
