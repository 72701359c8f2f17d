//! Layers of every kind damaged in every file: what a repair leaves.

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::Command;

use lazarette_fetcher::index::write::{Flavour, Format, Options, write_layer};
use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::types::MediaType;
use serde_json::{Value, json};

use crate::soci;
use crate::store::{data_file, json, ok, present};
use crate::support::{
    Changes, File, Layer, Laz, Pushed, estargz, gzipped, incompressible, plain, push, tar,
};

/// Some MiB in a few files, of which half can be compressed.
fn files() -> Vec<u8> {
    let noise = incompressible(1_500_000);
    let words: Vec<u8> = noise
        .iter()
        .map(|byte| b"laz\n"[usize::from(byte % 4)])
        .collect();
    let file = |path, bytes| File {
        path,
        mode: 0o644,
        bytes,
    };
    tar(&[
        file("data/empty", b""),
        file("data/noise", &noise),
        file("data/small", &noise[..5000]),
        file("data/words", &words),
    ])
}

/// A tar whose windows are needed, so many that an index of it comes without them.
fn referring() -> Vec<u8> {
    let mut bytes = incompressible(12 << 20);
    for at in (32 << 10..bytes.len() - 64).step_by(64) {
        let from = at - 1000 - at * 7919 % 30_000;
        bytes.copy_within(from..from + 40, at);
    }
    tar(&[File {
        path: "data/refers",
        mode: 0o644,
        bytes: &bytes,
    }])
}

/// The tar as zstd frames of a chunk each.
fn zstd_frames(tar: Vec<u8>) -> Layer {
    let mut blob = Vec::new();
    let options = Options::new(Format::ZstdChunked(Flavour::ContainersStorage));
    let written = write_layer("test layer", &mut Cursor::new(tar), &mut blob, &options).unwrap();
    Layer {
        blob,
        diff_id: written.diff_id,
        toc_digest: None,
    }
}

/// The files behind so much else in one zstd frame that they are only had with all of it.
fn zstd_stream() -> Layer {
    let noise = incompressible(10 << 20);
    let file = |path, bytes| File {
        path,
        mode: 0o644,
        bytes,
    };
    let tar = tar(&[file("a", &noise), file("b", &noise[..200_000])]);
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("layer");
    std::fs::write(&path, &tar).unwrap();
    let output = Command::new("zstd").arg("-qc").arg(&path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    Layer {
        blob: output.stdout,
        ..plain(tar)
    }
}

fn push_zstd(registry: &FakeRegistry, layer: &Layer) -> Pushed {
    let edit = |manifest: &mut Value| {
        manifest["layers"][0]["mediaType"] = json!(MediaType::OciLayerZstd.as_str());
    };
    let changes = Changes {
        edit: &edit,
        ..Changes::default()
    };
    push(registry, layer, &changes)
}

/// A node that trusts the index which another one pushed beside the image.
async fn with_offered_index(registry: &FakeRegistry) -> (Laz, Pushed) {
    let image = push(registry, &gzipped(referring()), &Changes::default());
    let (maker, laz) = (Laz::new(), Laz::new());
    let [key, public] = ["key.pem", "key.pub"].map(|name| maker.path(name));
    let openssl = |args: &[&str], out: &Path| {
        let output = Command::new("openssl")
            .args(args)
            .arg("-out")
            .arg(out)
            .output();
        assert!(output.unwrap().status.success());
    };
    openssl(&["genpkey", "-algorithm", "ed25519"], &key);
    let from = key.to_str().unwrap();
    openssl(&["pkey", "-in", from, "-pubout"], &public);
    ok(
        &maker,
        &["image", "index", "--push", "--key", from, &image.reference],
    )
    .await;
    let kept = laz.path("key.pub");
    std::fs::copy(&public, &kept).unwrap();
    let trust = format!("[trust]\nindex_keys = [{:?}]\n", kept.to_str().unwrap());
    let config = std::fs::read_to_string(laz.path("config.toml")).unwrap();
    std::fs::write(laz.path("config.toml"), config + &trust).unwrap();
    (laz, image)
}

/// A node, and an image of this kind for it.
async fn of_kind(kind: &str, registry: &FakeRegistry) -> (Laz, Pushed) {
    let pushed = |layer| push(registry, &layer, &Changes::default());
    let image = match kind {
        "offered index" => return with_offered_index(registry).await,
        "estargz" => pushed(estargz(files())),
        "gzip" => pushed(gzipped(files())),
        "tar" => pushed(plain(files())),
        "zstd frames" => push_zstd(registry, &zstd_frames(files())),
        "one zstd frame" => push_zstd(registry, &zstd_stream()),
        "soci" => soci::push_lazy(registry),
        other => panic!("no layers are {other}"),
    };
    (Laz::new(), image)
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

fn flip(path: &Path, at: impl FnOnce(usize) -> usize) {
    change(path, |bytes| {
        let at = at(bytes.len());
        bytes[at] ^= 0x20;
    });
}

/// The blobs that are kept: manifest and config.
fn blobs(laz: &Laz) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(laz.path("root/content")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Each way to damage what a node has of its only image.
const DAMAGES: [&str; 10] = [
    "data",
    "bitmap",
    "no bitmap",
    "index",
    "index end",
    "no index",
    "short data",
    "no data",
    "blobs",
    "all of it",
];

fn damage(laz: &Laz, what: &str) {
    let data = data_file(laz);
    let [bitmap, index] = ["bitmap", "index"].map(|name| data.with_file_name(name));
    match what {
        "data" => {
            // What is no padding: the first and the last of the files.
            let is_some = |byte: &u8| *byte != 0;
            let bytes = std::fs::read(&data).unwrap();
            let first = bytes.iter().position(is_some).unwrap();
            let last = bytes.iter().rposition(is_some).unwrap();
            flip(&data, |_| first);
            flip(&data, |_| last);
        }
        "bitmap" => flip(&bitmap, |len| len - 1),
        "no bitmap" => std::fs::remove_file(bitmap).unwrap(),
        "index" => flip(&index, |_| 200),
        // What comes last are details of spans, where there are any.
        "index end" => flip(&index, |len| len - 1),
        "no index" => std::fs::remove_file(index).unwrap(),
        "short data" => change(&data, |bytes| bytes.truncate(bytes.len() / 2)),
        "no data" => std::fs::remove_file(data).unwrap(),
        "blobs" => blobs(laz).iter().for_each(|blob| flip(blob, |_| 10)),
        "all of it" => ["data", "bitmap", "index end", "blobs"]
            .iter()
            .for_each(|what| damage(laz, what)),
        other => panic!("nothing is damaged by {other}"),
    }
}

/// How many manifests and configs a check missed.
fn lost(check: &Value) -> usize {
    check["blobs_lost"].as_array().map_or(0, Vec::len)
}

/// All that is there of the only layer, which has no holes.
async fn assert_whole(laz: &Laz, right: &[u8], when: &str) {
    let (there, all) = present(laz).await;
    assert_eq!(there, all, "{when}");
    let data = std::fs::read(data_file(laz)).unwrap();
    assert!(
        data.len() >= right.len() && data[..right.len()] == *right,
        "wrong bytes: {when}"
    );
    let check = ok(laz, &["store", "check"]).await;
    assert_eq!(check["layers"][0]["bytes"], all, "{when}: {check}");
    assert_eq!(check["layers"][0]["dropped_chunks"], 0, "{when}: {check}");
    assert_eq!(check["blobs_right"], 2, "{when}: {check}");
    assert_eq!(lost(&check), 0, "{when}: {check}");
}

async fn repairs_all_of(kind: &str) {
    let registry = FakeRegistry::start().await;
    let (laz, image) = of_kind(kind, &registry).await;
    ok(&laz, &["pull", "--full", &image.reference]).await;
    let right = std::fs::read(data_file(&laz)).unwrap();
    let index = std::fs::read(data_file(&laz).with_file_name("index")).unwrap();
    assert_whole(&laz, &right, kind).await;
    for what in DAMAGES {
        let when = format!("{kind}, {what}");
        damage(&laz, what);
        let repaired = ok(&laz, &["store", "check", "--repair"]).await;
        let layer = &repaired["layers"][0];
        match what {
            "blobs" => assert_eq!(lost(&repaired), 2, "{when}: {repaired}"),
            _ => assert_eq!(layer["repaired"], true, "{when}: {repaired}"),
        }
        assert_whole(&laz, &right, &when).await;
        let now = std::fs::read(data_file(&laz).with_file_name("index")).unwrap();
        // Where spans of what is streamed begin depends on how its bytes come.
        let is_streamed = !["estargz", "offered index"].contains(&kind);
        assert!(now == index || is_streamed, "opened in another way: {when}");
        // The image is what it was, too.
        let images = ok(&laz, &["images"]).await;
        assert_eq!(images[0]["reference"], image.reference, "{when}");
        assert_eq!(
            images[0]["present_bytes"], images[0]["data_bytes"],
            "{when}"
        );
    }
}

/// A test of each kind.
macro_rules! repairs {
    ($($name:ident $kind:literal)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                repairs_all_of($kind).await;
            }
        )*
    };
}

repairs! {
    a_repair_brings_back_all_of_estargz "estargz"
    a_repair_brings_back_all_of_gzip "gzip"
    a_repair_brings_back_all_of_gzip_by_an_offered_index "offered index"
    a_repair_brings_back_all_of_a_tar "tar"
    a_repair_brings_back_all_of_zstd_frames "zstd frames"
    a_repair_brings_back_all_of_one_zstd_frame "one zstd frame"
    a_repair_brings_back_all_of_what_soci_indexed "soci"
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_there_is_not_fetched_by_a_repair() {
    for kind in ["estargz", "gzip", "tar", "zstd frames"] {
        let registry = FakeRegistry::start().await;
        let (laz, image) = of_kind(kind, &registry).await;
        ok(&laz, &["pull", "--full", &image.reference]).await;
        ok(&laz, &["store", "evict", "--to", "2m"]).await;
        let (there, all) = present(&laz).await;
        assert!(0 < there && there < all, "{kind}: {there} of {all}");
        let right = std::fs::read(data_file(&laz)).unwrap();
        let some = right.iter().position(|byte| *byte != 0).unwrap();
        flip(&data_file(&laz), |_| some);
        let repaired = ok(&laz, &["store", "check", "--repair"]).await;
        assert_eq!(
            repaired["layers"][0]["repaired"], true,
            "{kind}: {repaired}"
        );
        assert_eq!(present(&laz).await.0, there, "{kind}: {repaired}");
        let now = std::fs::read(data_file(&laz)).unwrap();
        assert!(now == right, "{kind}: wrong bytes");
        // What a lost record spoke of is what the data has; the rest comes for good measure.
        damage(&laz, "bitmap");
        let (said, found) = json(&laz, &["store", "check"]).await;
        assert_eq!(
            (said.code, present(&laz).await.0),
            (1, there),
            "{kind}: {found}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_fetched_stays_told_and_takes_nothing_along() {
    let registry = FakeRegistry::start().await;
    let (laz, image) = of_kind("gzip", &registry).await;
    ok(&laz, &["pull", "--full", &image.reference]).await;
    drop(registry);
    damage(&laz, "blobs");
    let (said, found) = json(&laz, &["store", "check", "--repair"]).await;
    assert_eq!(said.code, 1, "{found}");
    for blob in found["blobs_lost"].as_array().unwrap() {
        assert_eq!(blob["repaired"], false, "{found}");
        assert!(
            blob["error"].as_str().unwrap().contains("127.0.0.1"),
            "{found}"
        );
    }
    // Dropped before, and missed still.
    let (said, found) = json(&laz, &["store", "check"]).await;
    assert_eq!(said.code, 1, "{found}");
    assert_eq!(lost(&found), 2, "{found}");
    let (there, all) = present(&laz).await;
    assert_eq!(there, all, "layers are what they were");
    damage(&laz, "index");
    let (said, found) = json(&laz, &["store", "check", "--repair"]).await;
    assert_eq!(said.code, 1, "{found}");
    let data = std::fs::metadata(data_file(&laz)).unwrap();
    assert!(
        data.len() >= all,
        "what another index may be made for is not thrown away"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_lost_where_its_details_are_is_opened_again() {
    let registry = FakeRegistry::start().await;
    let (laz, image) = with_offered_index(&registry).await;
    // Nothing of it is here, and no details either.
    ok(&laz, &["pull", &image.reference]).await;
    let origin = data_file(&laz).with_file_name("origin");
    let right = std::fs::read(&origin).unwrap();
    flip(&origin, |_| 20);
    let (said, found) = json(&laz, &["store", "check"]).await;
    assert_eq!(said.code, 1, "{found}");
    ok(&laz, &["store", "check", "--repair"]).await;
    assert!(
        std::fs::read(&origin).unwrap() == right,
        "by the same index"
    );
    let data = std::fs::read(data_file(&laz)).unwrap();
    assert_whole(&laz, &data, "all of it is here").await;
    // All details are here: nobody has to be asked for them any more.
    flip(&origin, |_| 20);
    let found = ok(&laz, &["store", "check"]).await;
    assert_eq!(
        found["layers"][0]["damaged_files"],
        json!(["origin"]),
        "{found}"
    );
    assert!(!origin.exists());
    assert_whole(&laz, &data, "without its origin").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_kernels_mount_are_compared() {
    let registry = FakeRegistry::start().await;
    let (laz, image) = of_kind("estargz", &registry).await;
    ok(&laz, &["pull", "--full", &image.reference]).await;
    let layer = data_file(&laz);
    let name = layer
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap();
    let shown = laz.path("root/meta").join(format!("{name}.erofs"));
    std::fs::create_dir(laz.path("root/meta")).unwrap();
    for path in [shown, layer.with_file_name("image")] {
        std::fs::write(&path, b"something else").unwrap();
        let found = ok(&laz, &["store", "check"]).await;
        let files = found["layers"][0]["damaged_files"].as_array().unwrap();
        assert_eq!(files.len(), 1, "{found}");
        assert!(!path.exists());
    }
    let data = std::fs::read(layer).unwrap();
    assert_whole(&laz, &data, "what is mounted is made again").await;
}
