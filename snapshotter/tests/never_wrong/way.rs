//! Bits that flip between the registry and the node.

use std::sync::Arc;

use lazarette_fetcher::source::BlobSource;
use lazarette_fetcher::test_util::FaultySource;

use crate::blobs::{self, Blob};
use crate::node::{Node, Shows, TRIES_MAX, evict};
use crate::read_everything;

/// One request in so many meets a fault; not all faults are wrong bytes.
const ONE_IN: u32 = 3;
/// Wrong pieces that each format must have met, so that it is known to have been tested.
const CORRUPT_MIN: u64 = 2;
/// Readers at a time.
const READERS: usize = 3;

/// Reads each layer from nothing, again and again, until enough of it came wrong.
pub(crate) fn flip(shows: Shows) {
    for (seed, blob) in (0..).zip(blobs::all()) {
        let faulty = FaultySource::seeded(blob.serve(), seed, ONE_IN);
        let source: Arc<dyn BlobSource> = Arc::new(faulty);
        let mut node = Node::new();
        let layer = node.open_lazily(blob, &source);
        let before = layer.counters().chunks_corrupt;
        let is_enough = (0..TRIES_MAX).any(|_| {
            // Nothing is here: what is read comes in pieces, by the table.
            evict(&layer);
            assert_eq!(layer.present_bytes(), 0);
            let mount = node.show(&layer, shows).expect("all of it comes some time");
            read_until_clean(mount.path(), blob, shows);
            node.hide(mount);
            layer.counters().chunks_corrupt - before >= CORRUPT_MIN
        });
        assert!(is_enough, "{}: hardly a bit flips", blob.name);
        node.close(&layer);
    }
}

fn read_until_clean(root: &std::path::Path, blob: &Blob, shows: Shows) {
    let what = format!("{}, {shows:?}", blob.name);
    let clean = (0..TRIES_MAX).any(|_| {
        let failed: usize = std::thread::scope(|scope| {
            let reader = || read_everything(root, &blob.content, &what);
            let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(reader)).collect();
            let failed = readers.into_iter().map(|reader| reader.join().unwrap());
            failed.sum()
        });
        failed == 0
    });
    assert!(clean, "{what}: some reads never succeed");
}
