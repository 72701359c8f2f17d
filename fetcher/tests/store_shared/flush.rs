//! Flushes that wait for the device, beside readers and evictions.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use lazarette_fetcher::store::disk::{Disk, RealDisk};
use lazarette_fetcher::store::{LayerFile, Store};
use lazarette_fetcher::test_util::layers::put_chunk;
use lazarette_fetcher::test_util::{Synced, SyncedBy};
use parking_lot::Mutex;

use crate::support::{found, index, read};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// The real disk, where `before` is done before the data of the layer "shared" in `root` is
/// synced, with how often it has been.
fn disk(root: &Path, before: impl Fn(u32) + Send + Sync + 'static) -> Arc<impl Disk> {
    let digest = index("shared").blob_digest;
    let data = root.join("layers").join(digest.file_name()).join("data");
    let (times, inode) = (AtomicU32::new(0), |meta: std::fs::Metadata| meta.ino());
    let is_data = move |file: &File| -> io::Result<bool> {
        let named = std::fs::metadata(&data).map(inode);
        Ok(named.ok() == Some(inode(file.metadata()?)))
    };
    Arc::new(SyncedBy(move |sync: Synced<'_>| match sync {
        Synced::Data(file) => {
            if is_data(file)? {
                before(times.fetch_add(1, Ordering::Relaxed));
            }
            RealDisk.sync_data(file)
        }
        Synced::Names(path) => RealDisk.sync_dir(path),
    }))
}

/// The layer as another process has it.
fn another(root: &Path) -> Arc<LayerFile> {
    let store = Store::open(root).unwrap();
    let digest = index("shared").blob_digest;
    store.open_layer(&digest).unwrap().unwrap()
}

#[test]
fn neither_readers_nor_evictions_wait_for_a_device_that_is_slow() {
    let dir = tempfile::tempdir().unwrap();
    let (synced, syncs) = sync_channel(1);
    let (goes_on, go_on) = sync_channel::<()>(1);
    let go_on = Mutex::new(go_on);
    let slow = disk(dir.path(), move |times| {
        if times == 1 {
            synced.send(()).unwrap();
            go_on.lock().recv_timeout(2 * PATIENCE).unwrap();
        }
    });
    let store = Store::open_on(dir.path(), slow).unwrap();
    let mine = store.create_layer(index("shared")).unwrap();
    [5, 6].iter().for_each(|id| put_chunk(&mine, *id).unwrap());
    mine.flush().unwrap();
    let other = another(dir.path());
    put_chunk(&mine, 7).unwrap();
    std::thread::scope(|threads| {
        let flush = threads.spawn(|| mine.flush());
        syncs.recv_timeout(PATIENCE).unwrap();
        assert_eq!(other.evict(&[5]).unwrap().chunks, 1);
        let (done, seen) = sync_channel(1);
        threads.spawn({
            let mine = Arc::clone(&mine);
            move || {
                let seen = [5, 6, 7].map(|id| read(&mine, id));
                done.send((seen, mine.evict(&[6]).unwrap().chunks))
            }
        });
        let seen = seen.recv_timeout(PATIENCE);
        goes_on.send(()).unwrap();
        assert_eq!(seen, Ok(([false, true, true], 1)));
        flush.join().unwrap().unwrap();
    });
    assert_eq!(found(dir.path(), "shared"), [7].into());
}

#[test]
fn a_flush_beside_evictions_without_end_comes_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_path_buf();
    let times = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&times);
    let evicted_from = disk(dir.path(), move |now| {
        seen.store(now + 1, Ordering::Relaxed);
        // The last one nobody can evict beside.
        if now < 3 {
            assert_eq!(another(&root).evict(&[now]).unwrap().chunks, 1);
        }
    });
    {
        let store = Store::open(dir.path()).unwrap();
        let file = store.create_layer(index("shared")).unwrap();
        (0..4).for_each(|id| put_chunk(&file, id).unwrap());
        file.flush().unwrap();
    }
    let store = Store::open_on(dir.path(), evicted_from).unwrap();
    let mine = store.create_layer(index("shared")).unwrap();
    put_chunk(&mine, 8).unwrap();
    mine.flush().unwrap();
    assert_eq!(times.load(Ordering::Relaxed), 4);
    assert_eq!(found(dir.path(), "shared"), [3, 8].into());
}
