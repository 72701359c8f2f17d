//! Damage on the device, and how it heals.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt as _;

use lazarette_fetcher::Error;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::types::Digest;

use crate::support::{BLOCK, CHUNKS, all, check, fill, found, index};

#[test]
fn a_check_drops_what_is_not_right_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    fill(&store, "shared", 3, |_| {});
    let blobs = [&b"a manifest"[..], b"a config"];
    for blob in blobs {
        store.put_blob(&Digest::sha256(blob), blob).unwrap();
    }
    let digest = index("shared").blob_digest;
    let path = dir.path().join("layers").join(digest.file_name());
    let data = std::fs::File::options().write(true).open(path.join("data"));
    data.unwrap()
        .write_all_at(&[0xff; 3], 9 * BLOCK + 17)
        .unwrap();
    let blob = dir.path().join("content");
    let blob = blob.join(Digest::sha256(blobs[1]).file_name());
    std::fs::write(blob, b"a c0nfig").unwrap();
    let report = store.check().unwrap();
    let (of, layer) = &report.layers[0];
    let layer = layer.as_ref().unwrap();
    assert_eq!((*of, &layer.dropped[..]), (digest, &[9][..]));
    assert_eq!(layer.chunks, u64::from(CHUNKS));
    assert_eq!(report.blobs.right, 1);
    assert_eq!(report.blobs.dropped, [Digest::sha256(blobs[1])]);
    let again = store.check().unwrap();
    let layer = again.layers[0].1.as_ref().unwrap();
    assert!(layer.dropped.is_empty() && again.blobs.dropped.is_empty());
    assert_eq!(layer.chunks, u64::from(CHUNKS) - 1);
    // A record that is lost is said to be.
    drop(store);
    std::fs::write(path.join("bitmap"), b"LAZ").unwrap();
    let mut here = all();
    here.remove(&9);
    let checked = || {
        let store = Store::open(dir.path()).unwrap();
        let layer = store.check().unwrap().layers.remove(0).1.unwrap();
        (layer.bitmap_lost, layer.chunks)
    };
    assert_eq!(checked(), (true, u64::from(CHUNKS) - 1));
    assert_eq!(
        found(dir.path(), "shared"),
        here,
        "the data says what is there"
    );
    assert_eq!(checked(), (false, u64::from(CHUNKS) - 1));
}

#[test]
fn a_damaged_blob_is_dropped_and_can_be_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let bytes = b"a manifest";
    let digest = Digest::sha256(bytes);
    let damages: [&[u8]; 4] = [b"a manifesT", b"a manifes", b"", b"a manifest and more"];
    for damage in damages {
        store.put_blob(&digest, bytes).unwrap();
        let path = dir.path().join("content").join(digest.file_name());
        std::fs::write(&path, damage).unwrap();
        assert_eq!(store.get_blob(&digest).unwrap(), None);
        assert!(!path.exists() && store.blobs().unwrap().is_empty());
        assert!(!store.remove_blob(&digest).unwrap());
    }
    store.put_blob(&digest, bytes).unwrap();
    assert_eq!(
        store.get_blob(&digest).unwrap().as_deref(),
        Some(&bytes[..])
    );
}

#[test]
fn a_damaged_layer_is_filled_again_or_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir
        .path()
        .join("layers")
        .join(index("torn").blob_digest.file_name());
    let half = |name: &str| {
        let bytes = std::fs::read(path.join(name)).unwrap();
        std::fs::write(path.join(name), &bytes[..bytes.len() / 2]).unwrap();
    };
    let flip = |name: &str| {
        let mut bytes = std::fs::read(path.join(name)).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(path.join(name), &bytes).unwrap();
    };
    let version = |name: &str| {
        let mut bytes = std::fs::read(path.join(name)).unwrap();
        bytes[8] += 1;
        std::fs::write(path.join(name), &bytes).unwrap();
    };
    let gone = |name: &str| std::fs::remove_file(path.join(name)).unwrap();
    // The file, what happens to it, and whether the layer opens then.
    type Row<'a> = (&'static str, &'a dyn Fn(&str), bool);
    let table: [Row<'_>; 8] = [
        ("bitmap", &half, true),
        ("bitmap", &flip, true),
        ("bitmap", &gone, true),
        ("index", &half, false),
        ("index", &flip, false),
        ("index", &gone, false),
        ("index", &version, false),
        ("data", &half, false),
    ];
    for (name, damage, opens) in table {
        let store = Store::open(dir.path()).unwrap();
        fill(&store, "torn", 7, |_| {});
        drop(store);
        assert_eq!(found(dir.path(), "torn"), all());
        damage(name);
        let store = Store::open(dir.path()).unwrap();
        match store.open_layer(&index("torn").blob_digest) {
            Ok(file) => {
                assert!(opens, "{name}");
                assert_eq!(check(&file.unwrap()), BTreeSet::new());
            }
            Err(error) => {
                assert!(
                    !opens && matches!(error, Error::Malformed { .. }),
                    "{error}"
                );
                let listed = store.layers().unwrap();
                assert!(listed.iter().all(|(_, usage)| usage.is_err()), "{name}");
                let checked = &store.check().unwrap().layers[0].1;
                let is_malformed = matches!(checked, Err(Error::Malformed { .. }));
                assert!(is_malformed, "{name}: {checked:?}");
            }
        }
        fill(&store, "torn", 8, |_| {});
        assert_eq!(found(dir.path(), "torn"), all(), "{name}");
    }
}
