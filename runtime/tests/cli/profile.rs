//! Start-up profiles from one `laz run` to the next, and from one node to another.

use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::types::{Digest, MediaType};
use serde_json::Value;

use crate::support::{
    Changes, File, Layer, Laz, Pushed, Said, busybox, estargz, incompressible, is_root, push,
    push_layers, tar,
};

/// Files that the usual command reads, between files that nobody reads.
const FILES: usize = 24;

/// More than a read-ahead and a merged gap together, so that nothing comes by chance.
const APART: usize = 400 << 10;

fn layer() -> Layer {
    let (read, unread) = (incompressible(20 << 10), incompressible(APART));
    let paths: Vec<(String, String)> = (0..FILES)
        .map(|n| (format!("data/{n:02}.read"), format!("data/{n:02}.other")))
        .collect();
    let busybox = busybox();
    let file = |path, bytes| File {
        path,
        mode: 0o755,
        bytes,
    };
    let mut files = vec![file("bin/busybox", &busybox)];
    for (wanted, other) in &paths {
        files.push(file(wanted, &read));
        files.push(file(other, &unread));
    }
    estargz(tar(&files))
}

/// Reads them one after another, backwards, so that read-ahead does not help.
const READ_ALL: &str = "for n in $(busybox ls -r /data | busybox grep '.read$'); \
                        do busybox cat /data/$n > /dev/null; done; echo ready";

async fn run(laz: &Laz, image: &Pushed, options: &[&str], script: &str) -> Value {
    run_and_tell(laz, image, options, script).await.0
}

/// The same, and what was said.
async fn run_and_tell(laz: &Laz, image: &Pushed, options: &[&str], script: &str) -> (Value, Said) {
    let file = laz.path("trace.json").display().to_string();
    let mut args = vec!["run", "--trace-file", &file];
    args.extend(options);
    args.extend([&image.reference, "/bin/busybox", "sh", "-c", script]);
    let said = laz.run(&args).await;
    assert_eq!(said.code, 0, "{said:?}");
    let record = serde_json::from_slice(&std::fs::read(&file).unwrap());
    (record.unwrap(), said)
}

async fn json(laz: &Laz, args: &[&str]) -> Value {
    let mut all = vec!["--output", "json"];
    all.extend(args);
    let said = laz.run(&all).await;
    assert_eq!(said.code, 0, "{said:?}");
    serde_json::from_str(&said.out).unwrap()
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("not a number: {value}"))
}

/// Throws away every layer; profiles stay.
async fn empty(laz: &Laz, image: &Pushed) {
    assert_eq!(laz.run(&["rmi", &image.reference]).await.code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_the_second_start_waits_for_less() {
    if !is_root("privileged_the_second_start_waits_for_less") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &layer(), &Changes::default());
    let laz = Laz::new();
    let first = run(&laz, &image, &[], READ_ALL).await;
    assert_eq!(first["profile"], Value::Null);
    assert_eq!(first["ready_by"], "output");
    // What it read is to be evicted last, by any process.
    let mut layers = std::fs::read_dir(laz.path("root/layers")).unwrap();
    let pinned = layers.next().unwrap().unwrap().path().join("pinned");
    let pins = || {
        let hours = std::fs::read(&pinned).unwrap();
        let extents = hours.chunks(4).map(|hour| hour != [0; 4]);
        extents.collect::<Vec<bool>>()
    };
    let first_pins = pins();
    assert!(first_pins.contains(&true), "{first_pins:?}");
    std::fs::remove_file(&pinned).unwrap();
    let (misses, blocks) = (
        number(&first["misses"]),
        number(&first["recorded"]["blocks"]),
    );
    assert!(misses >= FILES as u64, "{first}");
    // Of every file that was read at least a block, and of the others little or nothing.
    let bytes = number(&first["recorded"]["bytes"]);
    assert!(
        blocks >= FILES as u64 && bytes < (FILES * APART / 2) as u64,
        "{first}"
    );

    empty(&laz, &image).await;
    let second = run(&laz, &image, &[], READ_ALL).await;
    assert_eq!(pins(), first_pins, "a known start pins too");
    let used = &second["profile"];
    assert_eq!(
        (number(&used["blocks"]), number(&used["runs"])),
        (blocks, 1)
    );
    assert_eq!(
        (number(&used["unknown_blocks"]), &used["guess"]),
        (0, &Value::Bool(false))
    );
    assert!(number(&used["fetched_chunks"]) > 0, "{second}");
    assert!(number(&second["misses"]) < misses, "{first} {second}");
    assert!(
        second["spans"]
            .as_array()
            .unwrap()
            .iter()
            .any(|span| span["name"] == "prefetch")
    );

    // Neither used nor recorded.
    empty(&laz, &image).await;
    let without = run(&laz, &image, &["--no-profile"], READ_ALL).await;
    for key in ["profile", "recorded", "ready_by"] {
        assert_eq!(without[key], Value::Null, "{key}");
    }
    let shown = json(&laz, &["image", "profile", "show", &image.reference]).await;
    assert_eq!(shown.as_array().unwrap().len(), 1);
    assert!((1..=2).contains(&number(&shown[0]["runs"])), "{shown}");
    assert_eq!(shown[0]["program"], "/bin/busybox");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_an_unknown_command_guesses_and_learns_its_own() {
    if !is_root("privileged_an_unknown_command_guesses_and_learns_its_own") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &layer(), &Changes::default());
    let laz = Laz::new();
    run(&laz, &image, &[], "echo short").await;
    empty(&laz, &image).await;
    let other = run(
        &laz,
        &image,
        &[],
        "busybox cat /data/03.read > /dev/null; echo other",
    )
    .await;
    assert_eq!(other["profile"]["guess"], true, "{other}");
    let shown = json(&laz, &["image", "profile", "show", &image.reference]).await;
    assert_eq!(shown.as_array().unwrap().len(), 2, "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_server_that_listens_is_remembered_while_it_runs() {
    if !is_root("privileged_a_server_that_listens_is_remembered_while_it_runs") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &layer(), &Changes::default());
    let laz = Laz::new();
    // It never says anything: what ends its start is the port, and it is remembered then.
    let script = "busybox nc -l -p 4000 > /dev/null & busybox sleep 3; kill $!; exit 0";
    let record = run(&laz, &image, &["--net", "none"], script).await;
    assert_eq!(record["ready_by"], "port", "{record}");
    let shown = json(&laz, &["image", "profile", "show", &image.reference]).await;
    assert_eq!(number(&shown[0]["runs"]), 1, "once, not again at the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_start_without_a_word_is_over_when_it_is_quiet_or_ends() {
    if !is_root("privileged_a_start_without_a_word_is_over_when_it_is_quiet_or_ends") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &layer(), &Changes::default());
    // What is read after two quiet seconds belongs to no start.
    let read = |n| format!("busybox cat /data/{n:02}.read > /dev/null");
    let quiet = format!("{}; busybox sleep 4; {}", read(3), read(20));
    let short = read(3);
    let mut blocks = Vec::new();
    for (script, by) in [(quiet, "quiet"), (short, "exit")] {
        let laz = Laz::new();
        let record = run(&laz, &image, &["--net", "none"], &script).await;
        assert_eq!(record["ready_by"], by, "{record}");
        let shown = json(&laz, &["image", "profile", "show", &image.reference]).await;
        assert_eq!(number(&shown[0]["runs"]), 1, "{by}: {shown}");
        assert_eq!(shown[0]["blocks"], record["recorded"]["blocks"], "{by}");
        blocks.push(number(&shown[0]["blocks"]));
    }
    assert!(blocks[0].abs_diff(blocks[1]) <= 1, "{blocks:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_each_layer_is_fetched_as_its_size_and_its_profile_say() {
    if !is_root("privileged_each_layer_is_fetched_as_its_size_and_its_profile_say") {
        return;
    }
    let (busybox, noise) = (busybox(), incompressible(4 << 20));
    let file = |path, bytes| File {
        path,
        mode: 0o755,
        bytes,
    };
    // More than any link has for small; less than every one has; and again more.
    let layers = [
        vec![file("bin/busybox", &busybox[..]), file("unread", &noise)],
        vec![file("small", &noise[..50_000])],
        vec![file("read", &noise[..3 << 20])],
    ];
    let registry = FakeRegistry::start().await;
    let layers = layers.map(|files| estargz(tar(&files)));
    let image = push_layers(&registry, &layers, &Changes::default());
    let laz = Laz::new();
    let script = "busybox cat /small /read > /dev/null; echo ready";
    let first = ["lazily: large", "whole: small", "lazily: large"];
    let second = [
        "lazily: not covered by the profile",
        "whole: covered by the profile",
        "whole: covered by the profile",
    ];
    for (expected, start) in [(first, "first"), (second, "second")] {
        let (record, said) = run_and_tell(&laz, &image, &["--trace"], script).await;
        let words = |layer: &Value| {
            let how = match layer["share"].as_str().unwrap() {
                "full" => "whole",
                "lazy" => "lazily",
                other => panic!("{other}"),
            };
            let why = match layer["why"].as_str().unwrap() {
                "covered" => "covered by the profile",
                "uncovered" => "not covered by the profile",
                other => other,
            };
            format!("{how}: {why}")
        };
        let told: Vec<String> = record["layers"]
            .as_array()
            .unwrap()
            .iter()
            .map(words)
            .collect();
        assert_eq!(told, expected, "{start}: {record}");
        for (number, how) in expected.iter().enumerate() {
            let line = format!("layer {number} {how}, ");
            assert!(said.err.contains(&line), "{start}: {line}: {said:?}");
        }
        empty(&laz, &image).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_profile_travels_as_a_file() {
    if !is_root("privileged_a_profile_travels_as_a_file") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &layer(), &Changes::default());
    let (here, there) = (Laz::new(), Laz::new());
    let recorded = run(&here, &image, &[], READ_ALL).await;
    let file = here.path("profile.json").display().to_string();
    json(
        &here,
        &["image", "profile", "export", &image.reference, &file],
    )
    .await;
    let mine = std::fs::read(&file).unwrap();

    // A fresh node resolves the image, takes the profile, and its first start uses it.
    json(
        &there,
        &["image", "profile", "import", &image.reference, &file],
    )
    .await;
    let first = run(&there, &image, &[], READ_ALL).await;
    assert_eq!(first["profile"]["blocks"], recorded["recorded"]["blocks"]);
    assert!(
        number(&first["misses"]) < number(&recorded["misses"]),
        "{first}"
    );

    // The same file out again, from a node that has only imported it.
    let third = Laz::new();
    json(
        &third,
        &["image", "profile", "import", &image.reference, &file],
    )
    .await;
    let again = third.path("again.json").display().to_string();
    json(
        &third,
        &["image", "profile", "export", &image.reference, &again],
    )
    .await;
    assert_eq!(std::fs::read(&again).unwrap(), mine);

    for (from, to, words) in [
        (r#""sha256:"#, r#""sha257:"#, "malformed"),
        ("profile.v1", "profile.v9", "media type"),
    ] {
        let text = String::from_utf8(mine.clone())
            .unwrap()
            .replacen(from, to, 1);
        std::fs::write(&file, text).unwrap();
        let said = third
            .run(&["image", "profile", "import", &image.reference, &file])
            .await;
        assert!(said.code == 125 && said.err.contains(words), "{said:?}");
    }
}

/// Puts `document` beside the image it names, as `laz image profile push` does.
fn put_beside(registry: &FakeRegistry, document: &[u8]) {
    let kind = "application/vnd.lazarette.profile.v1+json";
    let subject = serde_json::from_slice::<Value>(document).unwrap()["manifest"].clone();
    let descriptor = |media_type: &str, bytes: &[u8]| {
        let digest = registry.add_blob(bytes.to_vec()).to_string();
        serde_json::json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    };
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": kind,
        "config": descriptor("application/vnd.oci.empty.v1+json", b"{}"),
        "layers": [descriptor(kind, document)],
        "subject": {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": subject,
            "size": 1,
        },
    });
    let tag = Digest::sha256(document).file_name();
    registry.add_manifest(
        "test/image",
        &tag,
        MediaType::OciManifest,
        manifest.to_string(),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_fresh_node_finds_the_profile_beside_the_image() {
    if !is_root("privileged_a_fresh_node_finds_the_profile_beside_the_image") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &layer(), &Changes::default());
    let (here, there) = (Laz::new(), Laz::new());
    let recorded = run(&here, &image, &[], READ_ALL).await;
    let file = here.path("profile.json").display().to_string();
    let export = ["image", "profile", "export", &image.reference, &file];
    json(&here, &export).await;
    let mine = std::fs::read_to_string(&file).unwrap();

    // What others put there does no harm, and does not hide what is right.
    let layer = mine.split_once("\"layers\":[\"").unwrap().1;
    let foreign = mine.replace(&layer[..71], &Digest::sha256(b"other").to_string());
    put_beside(&registry, foreign.as_bytes());
    put_beside(
        &registry,
        mine.replace("profile.v1+json\"", "profile.v9+json\"")
            .as_bytes(),
    );
    let without = run(&there, &image, &[], READ_ALL).await;
    assert_eq!(without["profile"], Value::Null);

    put_beside(&registry, mine.as_bytes());
    let third = Laz::new();
    let first = run(&third, &image, &[], READ_ALL).await;
    assert_eq!(first["profile"]["blocks"], recorded["recorded"]["blocks"]);
    let shown = json(&third, &["image", "profile", "show", &image.reference]).await;
    assert_eq!(
        number(&shown[0]["blocks"]),
        number(&recorded["recorded"]["blocks"])
    );

    // One that knows the image already asks only when it is told to.
    let pulled = json(&there, &["image", "profile", "pull", &image.reference]).await;
    assert_eq!(pulled[0]["blocks"], shown[0]["blocks"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_one_node_pushes_another_starts_with() {
    if !is_root("privileged_what_one_node_pushes_another_starts_with") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &layer(), &Changes::default());
    let (here, there, third) = (Laz::new(), Laz::new(), Laz::new());
    let recorded = run(&here, &image, &[], READ_ALL).await;
    let shown = json(&here, &["image", "profile", "show", &image.reference]).await;
    let push = [
        "--output",
        "json",
        "image",
        "profile",
        "push",
        &image.reference,
    ];
    let said = here.run(&push).await;
    assert!(
        said.code == 0 && said.err.contains("pushed as sha256:"),
        "{said:?}"
    );
    let pushed: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(pushed, shown);
    assert!(registry.requests().uploads > 0);

    // One that is told to takes it; one that is told nothing finds it.
    let pulled = json(&there, &["image", "profile", "pull", &image.reference]).await;
    assert_eq!(pulled, shown);
    let first = run(&third, &image, &[], READ_ALL).await;
    assert_eq!(first["profile"]["blocks"], recorded["recorded"]["blocks"]);
    // The same once more is the same artifact.
    let again = here.run(&push).await;
    assert_eq!((again.code, again.err), (0, said.err));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_that_is_not_there_or_not_ours_says_so() {
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &layer(), &Changes::default());
    let laz = Laz::new();
    let said = laz
        .run(&["image", "profile", "show", &image.reference])
        .await;
    assert!(said.code == 125 && said.err.contains("laz run"), "{said:?}");
    for (what, words) in [("push", "laz run"), ("pull", "laz image profile push")] {
        let said = laz.run(&["image", "profile", what, &image.reference]).await;
        assert!(said.code == 125 && said.err.contains(words), "{said:?}");
    }
    let file = laz.path("other.json");
    let digest = Digest::sha256(b"another image");
    let text = format!(
        r#"{{"mediaType":"application/vnd.lazarette.profile.v1+json","manifest":"{digest}","layers":[],"commands":[]}}"#
    );
    std::fs::write(&file, text).unwrap();
    let file = file.display().to_string();
    let said = laz
        .run(&["image", "profile", "import", &image.reference, &file])
        .await;
    assert!(
        said.code == 125 && said.err.contains("of another image"),
        "{said:?}"
    );
}
