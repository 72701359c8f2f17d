//! Keeping the store small and sound, as users do it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Stdio;

use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, Fault};
use serde_json::Value;

use crate::support::{
    Changes, File, IMPATIENT, Laz, PATIENT, Said, busybox, estargz, gzipped, incompressible,
    is_root, push, tar,
};

/// A layer with one file of a MiB.
fn noise(seed: u8) -> Vec<u8> {
    let mut bytes = incompressible(1 << 20);
    bytes.iter_mut().for_each(|byte| *byte ^= seed);
    tar(&[File {
        path: "data/noise",
        mode: 0o644,
        bytes: &bytes,
    }])
}

pub(crate) async fn ok(laz: &Laz, args: &[&str]) -> Value {
    let said = json(laz, args).await;
    assert_eq!(said.0.code, 0, "{:?}", said.0);
    said.1
}

pub(crate) async fn json(laz: &Laz, args: &[&str]) -> (Said, Value) {
    let args: Vec<&str> = ["--output", "json"].iter().chain(args).copied().collect();
    let said = laz.run(&args).await;
    let value = serde_json::from_str(&said.out).unwrap_or_default();
    (said, value)
}

pub(crate) async fn present(laz: &Laz) -> (u64, u64) {
    let df = ok(laz, &["store", "df"]).await;
    let sum = |key: &str| {
        let layers = df.as_array().unwrap().iter();
        layers.map(|layer| layer[key].as_u64().unwrap()).sum()
    };
    (sum("present_bytes"), sum("data_bytes"))
}

/// The only layer's data file.
pub(crate) fn data_file(laz: &Laz) -> PathBuf {
    let mut layers = std::fs::read_dir(laz.path("root/layers")).unwrap();
    layers.next().unwrap().unwrap().path().join("data")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_evicted_is_gone_from_the_disk_and_comes_back() {
    for layer in [estargz(noise(0)), gzipped(noise(0))] {
        let registry = FakeRegistry::start().await;
        let image = push(&registry, &layer, &Changes::default());
        let laz = Laz::new();
        ok(&laz, &["pull", "--full", &image.reference]).await;
        let (before, all) = present(&laz).await;
        assert_eq!(before, all);
        let used = ok(&laz, &["store", "df", "--summary"]).await["used_bytes"].clone();
        assert!(used.as_u64().unwrap() >= all, "{used}");

        let nothing = ok(&laz, &["store", "evict", "--to", "1g"]).await;
        assert_eq!(nothing["evicted_chunks"], 0, "{nothing}");
        let evicted = ok(&laz, &["store", "evict", "--all"]).await;
        assert_eq!(evicted["evicted_bytes"], all, "{evicted}");
        assert_eq!(evicted["kept"], serde_json::json!([]));
        assert_eq!(evicted["store"]["used_bytes"], 0, "{evicted}");
        assert_eq!(present(&laz).await.0, 0);

        ok(&laz, &["pull", "--full", &image.reference]).await;
        assert_eq!(present(&laz).await, (all, all));
        let evicted = ok(&laz, &["store", "evict", &image.reference]).await;
        assert_eq!(evicted["evicted_bytes"], all, "{evicted}");
        let text = laz.run(&["store", "df"]).await.out;
        assert!(text.contains("layers take 0 B on disk"), "{text}");
    }
}

/// Two MiB that are in every image of the next test, and something of its own.
fn with_shared_files(own: u8) -> Vec<u8> {
    let (a, b) = (incompressible(1 << 20), incompressible(1_100_000));
    let own: Vec<u8> = a[..50_000].iter().map(|byte| byte ^ own).collect();
    let file = |path, bytes| File {
        path,
        mode: 0o644,
        bytes,
    };
    tar(&[
        file("lib/a", &a),
        file("lib/b", &b[100_000..]),
        file("own", &own),
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_another_image_has_are_not_fetched_again() {
    let registry = FakeRegistry::start().await;
    let laz = Laz::new();
    let shared = (1 << 20) + 1_000_000;
    let first = push(
        &registry,
        &estargz(with_shared_files(1)),
        &Changes::default(),
    );
    let report = ok(&laz, &["pull", "--full", &first.reference]).await;
    assert_eq!(report["copied_bytes"], 0, "{report}");
    assert!(
        report["fetched_bytes"].as_u64().unwrap() > shared,
        "{report}"
    );

    let second = push(
        &registry,
        &estargz(with_shared_files(2)),
        &Changes::default(),
    );
    let report = ok(&laz, &["pull", "--full", &second.reference]).await;
    assert!(
        report["copied_bytes"].as_u64().unwrap() >= shared,
        "{report}"
    );
    // Manifest, config, the end of the blob, and the one file that is new.
    assert!(
        report["fetched_bytes"].as_u64().unwrap() < 200_000,
        "{report}"
    );
    let df = ok(&laz, &["store", "df"]).await;
    let copied = |layer: &Value| layer["copied_bytes"].as_u64().unwrap();
    let copied: u64 = df.as_array().unwrap().iter().map(copied).sum();
    assert_eq!(copied, report["copied_bytes"], "{df}");
    let (there, all) = present(&laz).await;
    assert_eq!(there, all);
    let check = ok(&laz, &["store", "check"]).await;
    assert_eq!(check["layers"].as_array().unwrap().len(), 2, "{check}");
    let text = laz.run(&["pull", "--full", &second.reference]).await.out;
    assert!(!text.contains("copied"), "nothing was left to copy: {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_is_kept_while_pulling() {
    let registry = FakeRegistry::start().await;
    let laz = Laz::new();
    let mut config = std::fs::read_to_string(laz.path("config.toml")).unwrap();
    config.push_str("[store]\nbudget = \"2500k\"\n");
    std::fs::write(laz.path("config.toml"), config).unwrap();
    for (n, tag) in ["a", "b", "c", "d"].into_iter().enumerate() {
        let layer = estargz(noise(u8::try_from(n).unwrap() + 1));
        let image = push(&registry, &layer, &Changes::default());
        ok(&laz, &["pull", "--full", &image.reference]).await;
        let df = ok(&laz, &["store", "df", "--summary"]).await;
        let used = df["used_bytes"].as_u64().unwrap();
        assert!(used <= 2500 << 10, "{used} after {tag}");
        assert_eq!(df["budget_bytes"], 2500 << 10);
    }
    let (there, all) = present(&laz).await;
    assert!(there > 0 && there < all, "{there} of {all}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_finds_damage_and_repairs_it() {
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(noise(0)), &Changes::default());
    let laz = Laz::new();
    ok(&laz, &["pull", "--full", &image.reference]).await;
    let sound = ok(&laz, &["store", "check"]).await;
    assert_eq!(sound["layers"][0]["dropped_chunks"], 0, "{sound}");
    assert_eq!(sound["layers"][0]["bytes"], 1 << 20, "{sound}");
    assert_eq!(sound["blobs_right"], 2, "{sound}");

    let damage = || {
        let data = std::fs::File::options().write(true).open(data_file(&laz));
        data.unwrap().write_all_at(b"rot", 5000).unwrap();
    };
    damage();
    let (said, found) = json(&laz, &["store", "check"]).await;
    assert_eq!(
        (said.code, &found["layers"][0]["dropped_chunks"]),
        (1, &1.into())
    );
    ok(&laz, &["pull", "--full", &image.reference]).await;

    damage();
    registry.always(Endpoint::Blob, Fault::Status(503, None));
    laz.give(IMPATIENT);
    let (said, found) = json(&laz, &["store", "check", "--repair"]).await;
    laz.give(PATIENT);
    assert_eq!(said.code, 1, "the registry is away: {found}");
    assert!(
        found["layers"][0]["error"]
            .as_str()
            .unwrap()
            .contains("503")
    );
    registry.always(Endpoint::Blob, Fault::CloseAfter(1 << 30));
    ok(&laz, &["pull", "--full", &image.reference]).await;
    damage();
    let repaired = ok(&laz, &["store", "check", "--repair"]).await;
    assert_eq!(repaired["layers"][0]["repaired"], true, "{repaired}");
    let (there, all) = present(&laz).await;
    assert_eq!(there, all);

    // An index that cannot be read is a layer to pull anew.
    let index = data_file(&laz).with_file_name("index");
    std::fs::write(&index, b"rot").unwrap();
    let (said, _) = json(&laz, &["store", "check"]).await;
    assert_eq!(said.code, 1, "{said:?}");
    ok(&laz, &["store", "check", "--repair"]).await;
    ok(&laz, &["store", "check"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_goes_on_behind_an_image_that_is_not_here() {
    let registry = FakeRegistry::start().await;
    let laz = Laz::new();
    let image = push(&registry, &estargz(noise(1)), &Changes::default());
    let changes = Changes {
        tag: "v2",
        ..Changes::default()
    };
    let other = push(&registry, &estargz(noise(2)), &changes).reference;
    for name in [&image.reference, &other] {
        ok(&laz, &["pull", name]).await;
    }
    let missing = other.replace(":v2", ":v3");
    let (said, removed) = json(&laz, &["rmi", &image.reference, &missing, &other]).await;
    assert_eq!(said.code, 125, "{said:?}");
    assert!(said.err.contains(&missing), "{said:?}");
    let names = [0, 1].map(|n| removed[n]["reference"].as_str().unwrap().to_owned());
    assert_eq!(names, [image.reference, other]);
    assert_eq!(ok(&laz, &["images"]).await, serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn pruning_takes_what_no_image_names() {
    let registry = FakeRegistry::start().await;
    let laz = Laz::new();
    let mut names = Vec::new();
    for seed in [1, 2] {
        let image = push(&registry, &estargz(noise(seed)), &Changes::default());
        ok(&laz, &["pull", "--full", &image.reference]).await;
        names.push(image.reference);
    }
    assert_eq!(names[0], names[1], "the tag moved on");
    let before = ok(&laz, &["store", "df"]).await;
    assert_eq!(before.as_array().unwrap().len(), 2);
    let pruned = ok(&laz, &["store", "prune"]).await;
    assert_eq!(pruned["layers"].as_array().unwrap().len(), 1, "{pruned}");
    assert_eq!(pruned["blobs"].as_array().unwrap().len(), 2, "{pruned}");
    assert!(
        pruned["freed_bytes"].as_u64().unwrap() >= 1 << 20,
        "{pruned}"
    );
    let again = ok(&laz, &["store", "prune"]).await;
    assert_eq!(again["layers"], serde_json::json!([]), "{again}");
    ok(&laz, &["store", "check"]).await;
    let (there, all) = present(&laz).await;
    assert_eq!((there, all), (1 << 20, 1 << 20), "what is named stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_running_container_reads_on_after_an_eviction() {
    if !is_root("privileged_a_running_container_reads_on_after_an_eviction") {
        return;
    }
    let big = incompressible(4 << 20);
    let layer = estargz(tar(&[
        File {
            path: "bin/busybox",
            mode: 0o755,
            bytes: &busybox(),
        },
        File {
            path: "data/big",
            mode: 0o644,
            bytes: &big,
        },
    ]));
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &layer, &Changes::default());
    let laz = Laz::new();
    let script = "echo ready; read go; exec /bin/busybox cat /data/big";
    let line = ["/bin/busybox", "sh", "-c", script];
    let args = [&["run", "-i", "--full", &image.reference][..], &line].concat();
    let mut child = laz
        .command(&[], &args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut ready = String::new();
    let out = tokio::task::spawn_blocking(move || {
        out.read_line(&mut ready).unwrap();
        assert_eq!(ready, "ready\n");
        out
    });
    let mut out = out.await.unwrap();
    // It knows that everything is there; another process takes it away.
    let evicted = ok(&laz, &["store", "evict", "--all"]).await;
    assert!(evicted["evicted_bytes"].as_u64().unwrap() > 4 << 20);
    assert_eq!(evicted["store"]["used_bytes"], 0, "{evicted}");
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let ended = tokio::task::spawn_blocking(move || {
        let mut read = Vec::new();
        out.read_to_end(&mut read).unwrap();
        (read, child.wait().unwrap())
    });
    let (read, status) = ended.await.unwrap();
    assert!(status.success(), "{status}");
    assert!(read == big, "{} bytes, not those of the file", read.len());
    assert!(present(&laz).await.0 >= 4 << 20, "they were fetched again");
}
