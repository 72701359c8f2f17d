//! Bad input gets a clear error and loses nothing.

use std::collections::HashMap;
use std::os::unix::fs::{FileExt as _, PermissionsExt};
use std::sync::Arc;
use std::time::Duration;

use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, Fault};
use lazarette_fetcher::types::{Digest, MediaType};
use serde_json::json;

use crate::store::{data_file, ok};
use crate::support::{
    Changes, File, IMPATIENT, Layer, Laz, Said, busybox, estargz, gzipped, incompressible, install,
    is_root, plain, push, said, tar, with_own_mounts,
};

/// Lets a request through: the body ends long before this.
const HARMLESS: Fault = Fault::CloseAfter(1 << 30);

/// A layer with one file of 300 kB.
fn noise() -> Vec<u8> {
    noise_of(0)
}

/// One of several such.
fn noise_of(seed: u8) -> Vec<u8> {
    let mut bytes = incompressible(300_000);
    bytes.iter_mut().for_each(|byte| *byte ^= seed);
    tar(&[File {
        path: "data/noise",
        mode: 0o644,
        bytes: &bytes,
    }])
}

fn assert_says(said: &Said, code: i32, words: &[&str]) {
    for word in words {
        assert!(said.err.contains(word), "no {word:?} in {said:?}");
    }
    assert_eq!(said.code, code, "{said:?}");
    assert!(!said.err.contains("panicked"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_registry_answers_is_told() {
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &plain(noise()), &Changes::default());
    let host = registry.url_host();
    let laz = Laz::new();
    let unknown = format!("{host}/no/such:tag");
    assert_says(
        &laz.run(&["pull", &unknown]).await,
        125,
        &[&unknown, "not found", &host],
    );
    let table: [(u16, Option<&str>, &str); 5] = [
        (401, None, "denied"),
        (403, None, "denied"),
        (404, None, "not found"),
        (429, Some("3600"), "429"),
        (503, None, "503"),
    ];
    for (status, retry_after, word) in table {
        registry.always(
            Endpoint::Manifest,
            Fault::Status(status, retry_after.map(str::to_owned)),
        );
        let said = laz.run(&["pull", &image.reference]).await;
        assert_says(&said, 125, &[&image.reference, &host, word]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_image_makes_right_is_told_before_one_is_asked_for() {
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &plain(noise()), &Changes::default());
    let laz = Laz::new();
    let table: [([&str; 2], &[&str]); 6] = [
        (["--memory", "64"], &["memory", "6 MiB"]),
        (["--cpus", "0"], &["cpus", "0.01"]),
        (
            ["-v", "/no/such/source:/data"],
            &["/no/such/source", "create it first"],
        ),
        (["-e", "=x"], &["\"=x\"", "KEY=VALUE"]),
        (["-w", "app"], &["\"app\"", "absolute"]),
        (["--hostname", "a b"], &["\"a b\"", "letters"]),
    ];
    for (option, words) in table {
        let [name, value] = option;
        let said = laz.run(&["run", name, value, &image.reference]).await;
        assert_says(&said, 125, words);
    }
    assert_eq!(registry.requests().manifests, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_hangs_costs_the_deadline_and_no_more() {
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &plain(noise()), &Changes::default());
    registry.always(Endpoint::Manifest, Fault::Hang);
    let laz = Laz::new();
    laz.give(IMPATIENT);
    let said = laz.run(&["pull", &image.reference]).await;
    assert_says(
        &said,
        125,
        &["cannot read", &image.reference, &registry.url_host()],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_is_not_what_the_digest_says_is_refused() {
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &plain(noise()), &Changes::default());
    let laz = Laz::new();
    let report = laz
        .run(&["--output", "json", "pull", &image.reference])
        .await;
    let report: serde_json::Value = serde_json::from_str(&report.out).unwrap();
    let digest = report["manifest_digest"].as_str().unwrap();
    registry.always(Endpoint::Manifest, Fault::CorruptBytes);
    let pinned = format!("{}@{digest}", image.reference);
    let said = laz.run(&["pull", &pinned]).await;
    assert_says(&said, 125, &["manifest", "is corrupt", digest]);
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_configs_tocs_chunks_and_layers_name_themselves() {
    let wrong = Digest::sha256(b"something else");
    let lying_toc = Layer {
        toc_digest: Some(wrong),
        ..estargz(noise())
    };
    let lying_diff_id = Layer {
        diff_id: wrong,
        ..plain(noise())
    };
    type Case<'a> = (Layer, &'a [Fault], &'a [&'a str]);
    let cases: [Case<'_>; 4] = [
        (
            plain(noise()),
            &[Fault::CorruptBytes, Fault::CorruptBytes],
            &["config sha256:", "is corrupt"],
        ),
        (
            plain(noise()),
            &[HARMLESS, Fault::CorruptBytes, Fault::CorruptBytes],
            &["sha256:", "is corrupt"],
        ),
        (lying_toc, &[], &["TOC of layer", "is corrupt"]),
        (lying_diff_id, &[], &["is corrupt", "expected sha256:"]),
    ];
    for (layer, faults, words) in cases {
        let registry = FakeRegistry::start().await;
        let image = push(&registry, &layer, &Changes::default());
        for fault in faults {
            registry.script_on(Endpoint::Blob, fault.clone());
        }
        let laz = Laz::new();
        assert_says(
            &laz.run(&["pull", "--full", &image.reference]).await,
            125,
            words,
        );
        let layers = laz.run(&["--output", "json", "store", "df"]).await;
        assert_eq!(layers.out.trim(), "[]", "nothing of a bad layer is kept");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_whose_copies_are_damaged_keeps_nobody_from_an_image() {
    // The layer's end, the config, and the rest of the layer, or all of it: each once.
    for (layer, asked) in [(estargz(noise()), 3), (plain(noise()), 2)] {
        let registry = FakeRegistry::start().await;
        let mirror = FakeRegistry::start().await;
        let image = push(&registry, &layer, &Changes::default());
        push(&mirror, &layer, &Changes::default());
        mirror.always(Endpoint::Blob, Fault::CorruptBytes);
        let laz = Laz::new();
        laz.set_mirror(&registry, &mirror);
        let pulled = laz.run(&["pull", "--full", &image.reference]).await;
        assert_says(&pulled, 0, &[]);
        let requests = mirror.requests();
        assert_eq!((requests.manifests, requests.blobs), (1, asked));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_chunk_is_dropped_and_comes_later() {
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(noise()), &Changes::default());
    let laz = Laz::new();
    assert_says(&laz.run(&["pull", &image.reference]).await, 0, &[]);
    registry.always(Endpoint::Blob, Fault::CorruptBytes);
    assert_says(
        &laz.run(&["pull", "--full", &image.reference]).await,
        125,
        &["layer", "corrupt"],
    );
    registry.always(Endpoint::Blob, HARMLESS);
    assert_says(
        &laz.run(&["pull", "--full", &image.reference]).await,
        0,
        &[],
    );
    let df = laz.run(&["--output", "json", "store", "df"]).await;
    let df: serde_json::Value = serde_json::from_str(&df.out).unwrap();
    assert_eq!(df[0]["present_bytes"], df[0]["data_bytes"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_blob_is_an_error_and_not_a_short_file() {
    for layer in [plain(noise()), estargz(noise())] {
        let registry = FakeRegistry::start().await;
        let image = push(&registry, &layer, &Changes::default());
        registry.script_on(Endpoint::Blob, HARMLESS);
        registry.always(Endpoint::Blob, Fault::Half);
        let said = Laz::new().run(&["pull", "--full", &image.reference]).await;
        assert_says(&said, 125, &["sha256:", &registry.url_host()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_without_ranges_still_serves_whole_layers() {
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(noise()), &Changes::default());
    registry.always(Endpoint::Blob, Fault::IgnoreRange);
    let said = Laz::new().run(&["pull", &image.reference]).await;
    assert_says(&said, 0, &["pulling it whole", "ignores Range"]);
}

/// One that has been streamed has an index, by which nothing can be read from there again.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_without_ranges_serves_whole_layers_again() {
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &gzipped(noise()), &Changes::default());
    registry.always(Endpoint::Blob, Fault::IgnoreRange);
    let laz = Laz::new();
    ok(&laz, &["pull", &image.reference]).await;
    ok(&laz, &["store", "evict", "--all"]).await;
    let said = laz.run(&["pull", "--full", &image.reference]).await;
    assert_says(&said, 0, &["streaming it"]);

    let data = std::fs::File::options().write(true).open(data_file(&laz));
    data.unwrap().write_all_at(b"rot", 5000).unwrap();
    let repaired = ok(&laz, &["store", "check", "--repair"]).await;
    assert_eq!(repaired["layers"][0]["repaired"], true, "{repaired}");
    // All of it, where nobody knows any more what was there.
    std::fs::write(data_file(&laz).with_file_name("bitmap"), b"rot").unwrap();
    let repaired = ok(&laz, &["store", "check", "--repair"]).await;
    assert_eq!(repaired["layers"][0]["repaired"], true, "{repaired}");
    let df = ok(&laz, &["store", "df"]).await;
    assert_eq!(df[0]["present_bytes"], df[0]["data_bytes"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn images_for_other_machines_and_broken_documents_are_refused() {
    let registry = FakeRegistry::start().await;
    let foreign = Changes {
        architecture: "s390x",
        ..Changes::default()
    };
    let image = push(&registry, &plain(noise()), &foreign);
    let laz = Laz::new();
    let said = laz.run(&["pull", &image.reference]).await;
    assert_says(
        &said,
        125,
        &[&image.reference, "linux/s390x", "this host is linux/"],
    );

    let no_layers = |manifest: &mut serde_json::Value| manifest["layers"] = json!([]);
    let changes = Changes {
        edit: &no_layers,
        ..Changes::default()
    };
    let image = push(&registry, &plain(noise()), &changes);
    let said = laz.run(&["pull", &image.reference]).await;
    assert_says(&said, 125, &[&image.reference, "0 layers", "1 diff_ids"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_need_not_say_which_platform_its_image_is_for() {
    for (architecture, code) in [("amd64", 0), ("s390x", 125)] {
        let registry = FakeRegistry::start().await;
        let listed = std::cell::RefCell::new(Vec::new());
        let keep = |manifest: &mut serde_json::Value| {
            *listed.borrow_mut() = serde_json::to_vec(manifest).unwrap();
        };
        let changes = Changes {
            architecture,
            edit: &keep,
            ..Changes::default()
        };
        push(&registry, &plain(noise()), &changes);
        let (kind, manifest) = (MediaType::OciManifest, listed.take());
        let digest = Digest::sha256(&manifest).to_string();
        let entry = json!({"mediaType": kind.as_str(), "digest": digest, "size": manifest.len()});
        let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [entry]})).unwrap();
        registry.add_manifest("test/image", "index", MediaType::OciIndex, index);
        let reference = format!("{}/test/image:index", registry.url_host());
        let said = Laz::new().run(&["pull", &reference]).await;
        let words: &[&str] = match code {
            0 => &[],
            _ => &[&reference, "linux/s390x", "this host is linux/"],
        };
        assert_says(&said, code, words);
    }
}

/// A tag that somebody pushes to all the time: each pull gets one image, and all of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_moves_meanwhile_is_one_image_or_the_other() {
    for make in [plain, estargz, gzipped] {
        let registry = Arc::new(FakeRegistry::start().await);
        let layers: Vec<Layer> = [0, 1].map(|seed| make(noise_of(seed))).into();
        // What a node has that never saw the other.
        let mut right = HashMap::new();
        for layer in &layers {
            let (image, laz) = (push(&registry, layer, &Changes::default()), Laz::new());
            let report = ok(&laz, &["pull", "--full", &image.reference]).await;
            let digest = report["manifest_digest"].as_str().unwrap().to_owned();
            right.insert(digest, std::fs::read(data_file(&laz)).unwrap());
        }
        assert_eq!(right.len(), 2);
        let moving = tokio::spawn({
            let registry = Arc::clone(&registry);
            async move {
                for layer in layers.iter().cycle() {
                    push(&registry, layer, &Changes::default());
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        });
        let reference = format!("{}/test/image:v1", registry.url_host());
        for _ in 0..8 {
            let laz = Laz::new();
            let report = ok(&laz, &["pull", "--full", &reference]).await;
            let digest = report["manifest_digest"].as_str().unwrap();
            assert_eq!(report["layers"], 1);
            assert!(std::fs::read(data_file(&laz)).unwrap() == right[digest]);
        }
        moving.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_that_make_no_sense_are_explained() {
    let laz = Laz::new();
    let table: [(&[&str], &[&str]); 5] = [
        (&["pull", "Debian"], &["Debian", "lower case"]),
        (&["run", "-v", "relative:/x", "debian"], &["absolute"]),
        (&["run", "-m", "lots", "debian"], &["512m"]),
        (&["run", "--cpus", "0", "debian"], &["number of cores"]),
        (
            &["rmi", "127.0.0.1:1/never/pulled"],
            &["not found", "laz images"],
        ),
    ];
    for (args, words) in table {
        assert_says(&laz.run(args).await, 125, words);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_cannot_be_written_is_an_error() {
    let laz = Laz::new();
    for format in [&["images"][..], &["--output", "json", "images"]] {
        let mut command = laz.command(&[], format);
        let full = std::fs::File::options().write(true).open("/dev/full");
        command.stdout(full.unwrap());
        assert_says(&said(command).await, 125, &["standard output", "No space"]);
        // Who has read enough closes its end: nothing is wrong.
        let (closed, end) = std::io::pipe().unwrap();
        drop(closed);
        let mut command = laz.command(&[], format);
        command.stdout(end);
        let quiet = said(command).await;
        assert!(quiet.code == 0 && quiet.err.is_empty(), "{quiet:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_full_disk_is_named_and_nothing_is_half_recorded() {
    if !is_root("privileged_a_full_disk_is_named_and_nothing_is_half_recorded") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let big: Vec<u8> = noise().repeat(100);
    let layer = plain(tar(&[File {
        path: "big",
        mode: 0o644,
        bytes: &big,
    }]));
    let image = push(&registry, &layer, &Changes::default());
    let laz = Laz::new();
    std::fs::create_dir(laz.path("root")).unwrap();
    // A mount namespace of its own: the small file system goes with the last process in it.
    let script = format!(
        "mount -t tmpfs -o size=20m tmpfs {root} && \"$0\" \"$@\"; code=$?; \
         find {root}/layers {root}/ingest -type f | sed 's/^/left: /'; exit $code",
        root = laz.path("root").display()
    );
    let wrapper = with_own_mounts(&script);
    let wrapper = wrapper.each_ref().map(String::as_str);
    let said = said(laz.command(&wrapper, &["pull", &image.reference])).await;
    assert_says(&said, 125, &["no space left on the device", "--root"]);
    assert!(!said.out.contains("left: "), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_run_says_when_it_lacks_root_or_fuse() {
    if !is_root("privileged_run_says_when_it_lacks_root_or_fuse") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let files = [File {
        path: "bin/busybox",
        mode: 0o755,
        bytes: &busybox(),
    }];
    let image = push(&registry, &estargz(tar(&files)), &Changes::default());

    let mut laz = Laz::new();
    let copy = laz.path("laz");
    install(&laz.binary, &copy);
    std::fs::set_permissions(laz.path(""), PermissionsExt::from_mode(0o777)).unwrap();
    laz.binary = copy;
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let unprivileged = said(laz.command(&nobody, &["run", &image.reference])).await;
    assert_says(&unprivileged, 125, &["laz run needs root", "sudo"]);

    let laz = Laz::new();
    let hide = "mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3 && mknod /dev/zero c 1 5 && \
                mknod /dev/urandom c 1 9 && exec \"$0\" \"$@\"";
    let wrapper = with_own_mounts(hide);
    let wrapper = wrapper.each_ref().map(String::as_str);
    let hidden = said(laz.command(&wrapper, &["run", &image.reference])).await;
    assert_says(&hidden, 125, &["/dev/fuse", "modprobe fuse"]);
}
