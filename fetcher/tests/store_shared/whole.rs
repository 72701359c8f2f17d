//! A layer whose data file the kernel reads by itself, beside those who evict from it. In place
//! of an EROFS there is an open image: that is what the store goes by.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lazarette_fetcher::store::{LayerFile, Store, Whole};
use lazarette_fetcher::test_util::layers::{CHUNK_LEN, chunk_bytes, put_chunk};
use lazarette_fetcher::{Error, Result};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::support::{BLOCK, CHUNKS, StopOnDrop, all, check, fill, found, index, soon};

/// The name of a layer's file.
fn path(root: &Path, name: &str) -> PathBuf {
    let layer = index("layer").blob_digest.file_name();
    root.join("layers").join(layer).join(name)
}

/// A complete layer, opened by as many processes, as far as the store can tell.
fn complete<const N: usize>(root: &Path) -> ([Arc<Store>; N], [Arc<LayerFile>; N]) {
    fill(&Store::open(root).unwrap(), "layer", 1, |_| {});
    let stores = [(); N].map(|()| Store::open(root).unwrap());
    let digest = index("layer").blob_digest;
    let files = stores.each_ref();
    let files = files.map(|store| store.open_layer(&digest).unwrap().unwrap());
    (stores, files)
}

/// What an EROFS has open.
fn open_image(whole: &Whole<'_>) -> File {
    if !whole.is_open {
        fs::write(whole.image, b"an image").unwrap();
    }
    File::open(whole.image).unwrap()
}

fn show(file: &LayerFile) -> Result<Option<File>> {
    file.show_whole(|whole| Ok(open_image(&whole)))
}

/// Every byte of the data file, as the kernel reads it: with nobody's leave.
fn assert_all_there(data: &File) {
    for id in 0..CHUNKS {
        let mut bytes = vec![0; CHUNK_LEN as usize];
        data.read_exact_at(&mut bytes, u64::from(id) * BLOCK)
            .unwrap();
        assert!(bytes == chunk_bytes(id), "chunk {id}");
    }
}

#[test]
fn nobody_evicts_from_what_the_kernel_reads_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, [mine, other]) = complete::<2>(dir.path());
    let image = path(dir.path(), "image");
    assert!(mine.is_whole().unwrap() && !image.exists());
    let shown = show(&mine).unwrap().unwrap();
    // Where it was made matters to nobody, nor whether that process lives.
    drop(mine);
    let data = other.lend().unwrap().data;
    let len = data.metadata().unwrap().len();
    assert_eq!(len % BLOCK, 0, "the kernel reads whole blocks");
    for ids in [&[1][..], &[1, 7, 100], &[]] {
        match other.evict(ids) {
            Ok(evicted) => assert!(ids.is_empty() && evicted.chunks == 0),
            Err(error) => assert!(error.to_string().contains("by itself"), "{error}"),
        }
    }
    let trim = stores[1].trim(0).unwrap();
    assert_eq!(trim.evicted.chunks, 0, "{trim:?}");
    let trim = stores[1].evict_layers(None).unwrap();
    assert_eq!((trim.evicted.chunks, trim.kept.len()), (0, 1), "{trim:?}");
    assert_all_there(&data);
    // Shown twice: the last one counts.
    assert!(other.is_whole().unwrap());
    let again = show(&other).unwrap().unwrap();
    drop(shown);
    assert!(other.evict_all().is_err());
    drop(again);
    let evicted = soon(|| other.evict_all());
    assert_eq!(evicted.chunks, u64::from(CHUNKS));
    assert!(!image.exists(), "of no use any more");
    assert_eq!(other.usage().unwrap().allocated, 0);
}

#[test]
fn what_is_in_nobodys_use_yields_when_nothing_else_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, [file]) = complete::<1>(dir.path());
    let store = &stores[0];
    assert!(file.is_whole().unwrap());
    let shown = Arc::new(Mutex::new(show(&file).unwrap()));
    let told = Arc::new(AtomicUsize::new(0));
    let (hidden, count) = (Arc::clone(&shown), Arc::clone(&told));
    let yields = Arc::new(AtomicBool::new(false));
    let may = Arc::clone(&yields);
    store.hide_by(Arc::new(move |digest| {
        assert_eq!(*digest, index("layer").blob_digest);
        count.fetch_add(1, Ordering::Relaxed);
        if may.load(Ordering::Relaxed) {
            drop(hidden.lock().unwrap().take());
        }
    }));
    fill(store, "other", 2, |_| {});
    let used = || file.usage().unwrap().allocated;
    let whole = used();
    // There is something else.
    store.trim(whole).unwrap();
    assert_eq!((told.load(Ordering::Relaxed), used()), (0, whole));
    // Somebody needs it.
    store.trim(0).unwrap();
    assert_eq!(used(), whole);
    assert!(told.swap(0, Ordering::Relaxed) > 0);
    yields.store(true, Ordering::Relaxed);
    soon(|| match store.trim(whole / 2)?.evicted.chunks {
        0 => Err(Error::limit("a test", "nothing is evicted")),
        _ => Ok(()),
    });
    assert!(used() <= whole / 2 && shown.lock().unwrap().is_none());
}

#[test]
fn only_what_is_there_recorded_and_right_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (_stores, [file, other]) = complete::<2>(dir.path());
    let never = |file: &LayerFile| {
        let shown = file.show_whole(|_| -> Result<()> { panic!("it is not whole") });
        assert!(shown.unwrap().is_none());
    };
    // Nobody of this process has looked at it.
    assert!(!file.is_known_whole());
    never(&file);
    assert!(file.is_whole().unwrap() && file.is_known_whole());
    // Another process evicts, and this one has not heard of it.
    other.evict(&[7]).unwrap();
    assert!(file.is_known_whole());
    never(&file);
    assert!(!file.is_whole().unwrap());
    // There, and not recorded.
    put_chunk(&file, 7).unwrap();
    assert!(file.is_whole().unwrap());
    never(&file);
    file.flush().unwrap();
    drop(show(&file).unwrap().unwrap());
    // Rotten, which only who reads it can know.
    let data = File::options().write(true).open(path(dir.path(), "data"));
    let data = data.unwrap();
    data.write_all_at(&[!chunk_bytes(9)[0]], 9 * BLOCK).unwrap();
    let store = Store::open(dir.path()).unwrap();
    let third = store.open_layer(file.digest()).unwrap().unwrap();
    assert!(!third.is_whole().unwrap() && !third.is_present(9));
    never(&third);
}

#[test]
fn an_image_that_nobody_has_open_keeps_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (_stores, [file]) = complete::<1>(dir.path());
    fs::write(path(dir.path(), "image"), b"of before a boot").unwrap();
    assert_eq!(soon(|| file.evict(&[3])).chunks, 1);
    assert!(!path(dir.path(), "image").exists());
    put_chunk(&file, 3).unwrap();
    file.flush().unwrap();
    assert!(file.is_whole().unwrap());
    // What has nothing open would not be noticed by who evicts.
    let unseen = file.show_whole(|whole| {
        fs::write(whole.image, b"an image").unwrap();
        Ok::<_, Error>(())
    });
    assert!(matches!(unseen, Err(Error::Unsupported { .. })));
    let failed = file.show_whole(|_| Err::<(), _>(Error::limit("a test", "it fails")));
    assert!(matches!(failed, Err(Error::Limit { .. })));
    assert_eq!(soon(|| file.evict(&[3])).chunks, 1);
}

#[test]
fn wrong_bytes_under_the_kernel_are_written_over_and_never_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    let (_stores, [file, other]) = complete::<2>(dir.path());
    assert!(file.is_whole().unwrap() && other.is_whole().unwrap());
    let shown = show(&file).unwrap().unwrap();
    let mut options = File::options();
    let options = options.read(true).write(true);
    let data = options.open(path(dir.path(), "data")).unwrap();
    data.write_all_at(&[0; 16], 9 * BLOCK).unwrap();
    let blocks = data.metadata().unwrap().blocks();
    let found_wrong = file.check_all().unwrap().dropped;
    assert_eq!(found_wrong, [9]);
    assert_eq!(data.metadata().unwrap().blocks(), blocks, "there is a hole");
    let mut left = all();
    left.remove(&9);
    assert_eq!(check(&other), left, "others hear of it");
    put_chunk(&file, 9).unwrap();
    file.flush().unwrap();
    assert_all_there(&data);
    assert!(file.is_whole().unwrap());
    drop(shown);
    assert_eq!(found(dir.path(), "layer"), all());
}

#[test]
fn a_layer_that_is_removed_stays_as_it_was_for_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, [file]) = complete::<1>(dir.path());
    assert!(file.is_whole().unwrap());
    let data = file.lend().unwrap().data;
    let _shown = show(&file).unwrap().unwrap();
    assert!(stores[0].remove_layer(file.digest()).unwrap());
    assert_eq!(file.evict_all().unwrap().chunks, 0);
    assert!(show(&file).unwrap().is_none());
    fill(&stores[0], "layer", 2, |_| {});
    let other = stores[0].open_layer(file.digest()).unwrap().unwrap();
    assert!(other.evict_all().unwrap().chunks > 0, "it is another file");
    assert_all_there(&data);
}

/// The rule by which the kernel reads: as long as the EROFS is there it looks at nothing else.
#[test]
fn the_kernel_never_reads_a_hole_while_others_evict() {
    let dir = tempfile::tempdir().unwrap();
    let (_stores, [mine, other]) = complete::<2>(dir.path());
    let (stop, mut read, data) = (AtomicBool::new(false), 0, mine.lend().unwrap().data);
    std::thread::scope(|threads| {
        let _stop = StopOnDrop(&stop);
        let evictor = threads.spawn(|| {
            let _stop = StopOnDrop(&stop);
            let (mut rng, mut done, mut refused) = (StdRng::seed_from_u64(5), 0, 0);
            while done < 3 || refused < 3 {
                match other.evict(&[rng.random_range(0..CHUNKS)]) {
                    Ok(evicted) => done += evicted.chunks,
                    Err(Error::Unsupported { .. }) => refused += 1,
                    Err(error) => panic!("{error}"),
                }
                // Without a break something is always missing, and the kernel is shown nothing.
                std::thread::sleep(Duration::from_micros(rng.random_range(0..20_000)));
            }
        });
        while !stop.load(Ordering::Relaxed) {
            for id in mine.missing(index_range()) {
                put_chunk(&mine, id).unwrap();
            }
            mine.flush().unwrap();
            if let Some(_erofs) = show(&mine).unwrap() {
                assert_all_there(&data);
                read += 1;
            }
            // Learns what was evicted meanwhile.
            let _ = mine.is_whole().unwrap();
        }
        evictor.join().unwrap();
    });
    assert!(read > 0);
}

fn index_range() -> lazarette_fetcher::types::ByteRange {
    lazarette_fetcher::types::ByteRange::new(0, u64::from(CHUNKS) * BLOCK).unwrap()
}
