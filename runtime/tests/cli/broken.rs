//! Layers that are damaged, in every format: what `laz pull` says of each, and that nothing of
//! it is kept. Digests of blobs are right: somebody pushed them so, or the damage is in what is
//! said of them.

use std::io::Cursor;

use lazarette_fetcher::index::write::{Flavour, Format, Options, write_layer};
use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, Fault};
use lazarette_fetcher::types::Digest;
use serde_json::{Map, Value, json};

use crate::referrers::{artifact, described, push_document, trusting};
use crate::soci::push_index_of;
use crate::store::ok;
use crate::support::{Changes, File, Layer, Laz, Pushed, Said, gzipped, incompressible, push, tar};

const CHECKSUM: &str = "io.github.containers.zstd-chunked.manifest-checksum";
const POSITION: &str = "io.github.containers.zstd-chunked.manifest-position";
const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

fn noise() -> Vec<u8> {
    let bytes = incompressible(300_000);
    tar(&[File {
        path: "data/noise",
        mode: 0o644,
        bytes: &bytes,
    }])
}

/// A layer, and what its manifest says of it.
type Described = (Layer, Map<String, Value>);

fn written(format: Format) -> Described {
    let (mut input, mut blob) = (Cursor::new(noise()), Vec::new());
    let options = Options {
        chunk_bytes: 64 << 10,
        ..Options::new(format)
    };
    let written = write_layer("x", &mut input, &mut blob, &options).unwrap();
    let notes = written.annotations.into_iter();
    let notes = notes.map(|(key, value)| (key.to_owned(), json!(value)));
    let layer = Layer {
        blob,
        diff_id: written.diff_id,
        toc_digest: None,
    };
    (layer, notes.collect())
}

/// Zstd of which nobody says anything.
fn zstd() -> Described {
    let (layer, _) = written(Format::ZstdChunked(Flavour::Stargz));
    (layer, Map::new())
}

fn gzip() -> Described {
    (gzipped(noise()), Map::new())
}

/// The layer without its end.
fn cut((mut layer, notes): Described) -> Described {
    layer.blob.truncate(layer.blob.len() / 2);
    (layer, notes)
}

/// The layer with some wrong bytes behind its first ones.
fn spoilt((mut layer, notes): Described) -> Described {
    let bytes = layer.blob.iter_mut().skip(100_000).take(64);
    bytes.for_each(|byte| *byte = !*byte);
    (layer, notes)
}

/// The layer of which something else is said.
fn said_of((layer, mut notes): Described, key: &str, value: &str) -> Described {
    assert!(
        notes.insert(key.to_owned(), json!(value)).is_some(),
        "{key}"
    );
    (layer, notes)
}

fn push_as(registry: &FakeRegistry, (layer, notes): &Described) -> (Pushed, Value) {
    let own = std::cell::RefCell::new(Value::Null);
    let edit = |manifest: &mut Value| {
        manifest["layers"][0]["annotations"] = Value::Object(notes.clone());
        *own.borrow_mut() = described(manifest);
    };
    let changes = Changes {
        edit: &edit,
        ..Changes::default()
    };
    (push(registry, layer, &changes), own.into_inner())
}

fn assert_says(said: &Said, code: i32, words: &[&str], case: &str) {
    for word in words {
        assert!(said.err.contains(word), "{case}: no {word:?} in {said:?}");
    }
    assert_eq!(said.code, code, "{case}: {said:?}");
    assert!(!said.err.contains("panicked"), "{case}: {said:?}");
}

/// What is damaged, and what is said of it.
type Case = (&'static str, Described, &'static [&'static str]);

fn damaged() -> [Case; 10] {
    let wrong = Digest::sha256(b"something else").to_string();
    let podman = || written(Format::ZstdChunked(Flavour::ContainersStorage));
    let stargz = || written(Format::ZstdChunked(Flavour::Stargz));
    let estargz = || written(Format::Estargz);
    let not_a_tar = Layer {
        blob: incompressible(5000),
        ..gzip().0
    };
    [
        (
            "no tar",
            (not_a_tar, Map::new()),
            &["tar of layer sha256:", "checksum"],
        ),
        (
            "gzip, cut",
            cut(gzip()),
            &["gzip data of layer", "cut off after"],
        ),
        ("gzip, spoilt", spoilt(gzip()), &["layer sha256:"]),
        (
            "zstd, cut",
            cut(zstd()),
            &["zstd data of layer", "cut off after"],
        ),
        ("zstd, spoilt", spoilt(zstd()), &["layer sha256:"]),
        (
            "eStargz, spoilt",
            spoilt(estargz()),
            &["by its table, streaming it", "layer sha256:"],
        ),
        (
            "podman's, spoilt",
            spoilt(podman()),
            &["by its table, streaming it", "layer sha256:"],
        ),
        (
            "stargz's, spoilt",
            spoilt(stargz()),
            &["by its table, streaming it", "layer sha256:"],
        ),
        (
            "podman's, wrong TOC",
            said_of(podman(), CHECKSUM, &wrong),
            &["TOC", "is corrupt"],
        ),
        (
            "stargz's, wrong TOC",
            said_of(stargz(), TOC_DIGEST, &wrong),
            &["TOC", "is corrupt"],
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_of_every_format_is_named_and_nothing_of_it_is_kept() {
    for (case, layer, words) in damaged() {
        let registry = FakeRegistry::start().await;
        let (image, _) = push_as(&registry, &layer);
        let laz = Laz::new();
        let said = laz.run(&["pull", "--full", &image.reference]).await;
        assert_says(&said, 125, words, case);
        let df = ok(&laz, &["store", "df"]).await;
        let present = df.as_array().unwrap().iter();
        let present: u64 = present.map(|l| l["present_bytes"].as_u64().unwrap()).sum();
        assert!(present < 300_000, "{case}: {df}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_help_costs_laziness_and_a_line() {
    // What makes a gzip layer lazy is not part of it.
    let ztocs: [(&str, Vec<u8>); 3] = [
        ("empty", Vec::new()),
        ("noise", incompressible(5000)),
        ("JSON", b"{\"layers\":[]}".to_vec()),
    ];
    for (case, ztoc) in ztocs {
        let registry = FakeRegistry::start().await;
        let (layer, _) = gzip();
        let index = push_index_of(&registry, &layer.blob, ztoc);
        let edit = |manifest: &mut Value| {
            manifest["annotations"] = json!({"com.amazon.soci.index-digest": index});
        };
        let changes = Changes {
            edit: &edit,
            ..Changes::default()
        };
        let image = push(&registry, &layer, &changes);
        let said = Laz::new().run(&["pull", &image.reference]).await;
        let words = ["not using the layer's zTOC", "zTOC of layer sha256:"];
        assert_says(&said, 0, &words, case);
    }
    // Nor is what is said of where a table is.
    for position in ["1:100:100:1", "99999999999:9:9:1", "here"] {
        let registry = FakeRegistry::start().await;
        let podman = written(Format::ZstdChunked(Flavour::ContainersStorage));
        let (image, _) = push_as(&registry, &said_of(podman, POSITION, position));
        let said = Laz::new().run(&["pull", &image.reference]).await;
        let words = ["table of contents cannot be used", "annotation"];
        assert_says(&said, 0, &words, position);
    }
    let indexes: [(&str, &[u8], &str); 3] = [
        ("empty", b"", "layer index"),
        (
            "noise",
            b"noise, and none of our magic; noise, and none of our magic",
            "layer index",
        ),
        (
            "of nobody",
            include_bytes!("../../../fetcher/tests/fixtures/index-v3.bin"),
            "no key of trust.index_keys",
        ),
    ];
    for (case, bytes, word) in indexes {
        let registry = FakeRegistry::start().await;
        let described = gzip();
        let (image, own) = push_as(&registry, &described);
        let blob = registry.add_blob(bytes.to_vec());
        let mut beside = artifact(&own);
        beside["layers"] = json!([{
            "mediaType": "application/vnd.lazarette.index.v3",
            "digest": blob.to_string(), "size": bytes.len(),
            "annotations": {
                "vnd.lazarette.index.layer": Digest::sha256(&described.0.blob).to_string(),
                "vnd.lazarette.index.signature": "AAAA",
            },
        }]);
        push_document(&registry, "", &beside);
        let said = trusting().run(&["pull", &image.reference]).await;
        assert_says(
            &said,
            0,
            &["not using the index beside the image", word],
            case,
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_by_an_index_of_ours_and_comes_wrong_is_named() {
    for (case, layer) in [("gzip", gzip()), ("zstd", zstd())] {
        let registry = FakeRegistry::start().await;
        let (image, _) = push_as(&registry, &layer);
        let laz = Laz::new();
        let full = ["pull", "--full", &image.reference];
        ok(&laz, &full).await;
        ok(&laz, &["store", "evict", "--all"]).await;
        registry.always(Endpoint::Blob, Fault::CorruptBytes);
        let said = laz.run(&full).await;
        let words = ["by its table, streaming it", "layer sha256:", "is corrupt"];
        assert_says(&said, 125, &words, case);
        registry.behave();
        ok(&laz, &full).await;
    }
}
