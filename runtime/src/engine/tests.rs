//! What an engine leaves that is killed, or finds the disk full, at any commit of what users
//! ask of it.
//!
//! A script pulls two images, makes what a container starts from and takes it down,
//! remembers accounts and a profile, makes snapshots as containerd does, and removes an
//! image. It runs once to count its commits, then once for each of them and each fault. The
//! test runs itself as the child that is killed, so that what is left is what a dead process
//! leaves.

mod keep;
mod profiles;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use lazarette_fetcher::db::Db;
use lazarette_fetcher::prefetch::Place;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::test_util::commits::{CommitFault, FaultyCommits};
use lazarette_fetcher::test_util::disk::scratch;
use lazarette_fetcher::test_util::{FakeRegistry, content};
use lazarette_fetcher::types::{Digest, MediaType, Reference};
use lazarette_snapshotter::metastore::{Content, Kind, Labels};
use lazarette_snapshotter::overlay::Snapshots;
use serde_json::json;

use super::Engine;
use super::stage::Stage;
use crate::Result;
use crate::config::Config;
use crate::image::Image;
use crate::image::pull::PullMode;
use crate::profile::{self, Block, CommandProfile, ImageProfiles};
use crate::spec::bundle::AccountFiles;
use crate::trace::Trace;

const DIR: &str = "LAZARETTE_CRASH_ENGINE_DIR";
const IMAGES: &str = "LAZARETTE_CRASH_ENGINE_IMAGES";
/// The commit that kills the child, and whether it does before it or after it.
const DEATH: &str = "LAZARETTE_CRASH_ENGINE_DEATH";
/// What the child says of each step of the script that it is done with.
const DONE: &str = "done with ";
/// Snapshots of the script that no image names, those on others first.
const OWN: [&str; 3] = ["look", "work", "made"];

type Images = [Reference; 2];
type Steps = BTreeSet<String>;

fn open(dir: &Path, commits: &Arc<FaultyCommits>) -> Arc<Engine> {
    let config = Config {
        root: Some(dir.join("root")),
        state: Some(dir.join("state")),
        ..Config::default()
    };
    let open_db = |path: &Path, tables: &[&str]| {
        let commits = Arc::clone(commits);
        Db::open_on(path, tables, commits)
    };
    Engine::open_with(config, None, &open_db).unwrap()
}

/// Two images of one base.
fn push(registry: &FakeRegistry) -> Images {
    let layer = |name: &str| content::tar(&[(name, &content::noise(1, 0x3f, 20_000)[..])]);
    ["a", "b"].map(|name| {
        let layers = [layer("base"), layer(name)];
        let diff_ids: Vec<Digest> = layers.iter().map(|tar| Digest::sha256(tar)).collect();
        let config = json!({
            "os": "linux", "architecture": "amd64", "config": {"Cmd": [name]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let descriptor = |kind: MediaType, bytes: Vec<u8>| {
            let size = bytes.len();
            json!({"mediaType": kind.as_str(), "digest": registry.add_blob(bytes), "size": size})
        };
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MediaType::OciManifest.as_str(),
            "config": descriptor(MediaType::OciConfig, config.to_string().into()),
            "layers": layers.map(|tar| descriptor(MediaType::OciLayerTar, tar)),
        });
        let bytes = manifest.to_string();
        registry.add_manifest(name, "1", MediaType::OciManifest, bytes);
        Reference::parse(&format!("{}/{name}:1", registry.url_host())).unwrap()
    })
}

fn accounts() -> AccountFiles {
    AccountFiles {
        passwd: "me:x:7:7::/:/bin/sh\n".to_owned(),
        group: "us:x:7:\n".to_owned(),
    }
}

fn profiles_of(image: &Image) -> ImageProfiles {
    let command = profile::Command::new(&["a".to_owned()]);
    let place = Place { block: 0, pages: 3 };
    let blocks = [0, 1].map(|layer| Block {
        layer,
        place,
        seen: 1,
        born: 1,
    });
    let layers = image.layers.iter().map(|layer| layer.descriptor.digest);
    let mut all = ImageProfiles::empty(image.manifest.digest, layers.collect());
    all.put(CommandProfile {
        runs: 1,
        updated_at: 7,
        blocks: blocks.into(),
        ..CommandProfile::empty(&command)
    });
    all
}

/// The script; `done` is told of each step. What an earlier one left is no hindrance.
async fn perform(
    engine: &Arc<Engine>,
    images: &Images,
    mut done: impl FnMut(&'static str),
) -> Result<()> {
    let mut pulled = Vec::new();
    for reference in images {
        let trace = Trace::new(Instant::now());
        let image = engine.resolve(reference, &trace).await?;
        let puller = engine.puller(PullMode::Full, trace);
        for layer in engine.pull(&image, &puller).await? {
            layer.close().await?;
        }
        pulled.push(image);
    }
    done("pull");
    let image = &pulled[0];
    let mut stage = Stage::open(engine).await?;
    let claimed = stage.claim(engine, image).await;
    let struck = stage.strike(engine).await;
    claimed?;
    struck?;
    done("start");
    engine
        .remember_accounts(image.manifest.digest, accounts())
        .await;
    done("accounts");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        serde_json::to_vec(&profiles_of(image)).unwrap(),
    )
    .unwrap();
    engine.import_profiles(&images[0], file.path()).await?;
    done("profile");
    let snapshots = Arc::clone(&engine.snapshots);
    blocking(move || directory(&snapshots)).await?;
    done("directory");
    engine.remove_image(&images[0]).await?;
    done("remove");
    Ok(())
}

/// A snapshot of a directory, from prepare to remove.
fn directory(snapshots: &Snapshots) -> Result<(), lazarette_snapshotter::Error> {
    forget_own(snapshots);
    let labels = Labels::new();
    snapshots.prepare("work", None, &labels)?;
    let mounts = snapshots.mounts("work", &|_| unreachable!("no layer is below it"))?;
    std::fs::write(mounts[0].source().join("file"), b"written").unwrap();
    snapshots.commit("made", "work", &labels)?;
    snapshots.view("look", Some("made"), &labels)?;
    snapshots.remove("look")?;
    snapshots.remove("made")?;
    Ok(())
}

fn forget_own(snapshots: &Snapshots) {
    for key in OWN {
        match snapshots.remove(key) {
            Ok(_) | Err(lazarette_snapshotter::Error::NotFound { .. }) => {}
            Err(error) => panic!("{key}: {error}"),
        }
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

/// What an engine must be like whatever happened to the one before it, which was done with
/// these steps.
async fn check(engine: &Arc<Engine>, images: &Images, done: &Steps, when: &str) {
    // Every run begins with a sweep.
    let stage = Stage::open(engine).await.unwrap();
    stage.strike(engine).await.unwrap();
    assert_eq!(names_in(&engine.state.join("runs")), ["lock"], "{when}");
    check_snapshots(engine, when);
    let named: Vec<_> = engine.records().unwrap();
    let named: Vec<&Reference> = named.iter().map(|record| &record.reference).collect();
    let is_done = |step: &str| done.contains(step);
    for (number, reference) in images.iter().enumerate() {
        let image = engine.local(reference).await.unwrap();
        assert_eq!(image.is_some(), named.contains(&reference), "{when}: half");
        let is_removed = number == 0 && is_done("directory");
        if is_done("pull") && !is_removed {
            assert!(image.is_some(), "{when}: {reference} is gone");
        }
        assert!(
            number == 1 || image.is_none() || !is_done("remove"),
            "{when}"
        );
        let Some(image) = image else { continue };
        for layer in &image.layers {
            let file = engine.store.open_layer(&layer.descriptor.digest).unwrap();
            let is_whole = file.is_some_and(|file| file.is_complete());
            assert!(is_whole || !is_done("pull"), "{when}: {reference}");
        }
        if number == 0 {
            let found = engine.accounts(image.manifest.digest).await;
            assert!(found.is_some() || !is_done("accounts"), "{when}");
            assert!(found.is_none_or(|found| found == accounts()), "{when}");
            match engine.profiles(reference).await {
                // One that was imported twice counts twice.
                Ok(mut found) => {
                    found.commands[0].runs = 1;
                    for block in &mut found.commands[0].blocks {
                        (block.seen, block.born) = (1, 1);
                    }
                    assert_eq!(found, profiles_of(&image), "{when}");
                }
                Err(error) => assert!(!is_done("profile"), "{when}: {error}"),
            }
        }
    }
    let report = engine.check(false).await.unwrap();
    assert!(report.is_sound(), "{when}: {report:?}");
}

/// Records and directories of snapshots fit each other.
fn check_snapshots(engine: &Engine, when: &str) {
    let all = engine.snapshots.list().unwrap();
    let mut numbers = Vec::new();
    for record in &all {
        if let Some(parent) = &record.parent {
            let parent = all.iter().find(|other| other.key == *parent);
            let is_committed = parent.is_some_and(|parent| parent.kind == Kind::Committed);
            assert!(is_committed, "{when}: {record:?}");
        }
        // Those of runs went with the sweep.
        let is_own = OWN.contains(&record.key.as_str());
        match record.content {
            Content::Directory(number) => {
                assert!(is_own, "{when}: {record:?} is of nobody");
                numbers.push(number.to_string());
            }
            Content::Layer(_) => assert_eq!(record.kind, Kind::Committed, "{when}"),
        }
        if record.key == "made" {
            let view = engine.snapshots.view("check", Some("made"), &Labels::new());
            view.unwrap();
            let mounts = engine.snapshots.mounts("check", &|_| unreachable!());
            let file = mounts.unwrap()[0].source().join("file");
            assert_eq!(std::fs::read(file).unwrap(), b"written", "{when}");
            engine.snapshots.remove("check").unwrap();
        }
    }
    numbers.sort_unstable();
    let snapshots = engine.root.join("snapshots");
    assert_eq!(names_in(&snapshots), numbers, "{when}: directories");
    for number in numbers {
        let parts = names_in(&snapshots.join(number));
        assert_eq!(parts, ["fs", "work"], "{when}");
    }
    assert_eq!(names_in(&engine.root.join("trash")), [""; 0], "{when}");
    assert_eq!(names_in(&engine.root.join("ingest")), [""; 0], "{when}");
}

/// Removes what can be named, prunes, and finds that nothing else is left.
async fn clean(engine: &Arc<Engine>, when: &str) {
    for record in engine.records().unwrap() {
        engine.remove_image(&record.reference).await.unwrap();
    }
    forget_own(&engine.snapshots);
    engine.prune().await.unwrap();
    assert_eq!(engine.snapshots.list().unwrap(), [], "{when}");
    check_snapshots(engine, when);
    for dir in ["layers", "content", "snapshots"] {
        assert_eq!(names_in(&engine.root.join(dir)), [""; 0], "{when}: {dir}");
    }
}

fn all_steps() -> Steps {
    let all = [
        "pull",
        "start",
        "accounts",
        "profile",
        "directory",
        "remove",
    ];
    all.map(str::to_owned).into()
}

/// How many commits the script makes.
async fn commits_of(images: &Images) -> u64 {
    let dir = scratch();
    let commits = Arc::new(FaultyCommits::default());
    let engine = open(dir.path(), &commits);
    let mut done = Steps::new();
    let outcome = perform(&engine, images, |step| {
        done.insert(step.to_owned());
    });
    outcome.await.unwrap();
    assert_eq!(done, all_steps());
    let count = commits.seen();
    check(&engine, images, &done, "nothing happened").await;
    clean(&engine, "nothing happened").await;
    count
}

/// Runs the script until it dies.
#[test]
#[ignore = "the child process of the test below"]
fn child() {
    let said = |name| std::env::var(name).expect("the parent sets it");
    let (death, images) = (said(DEATH), said(IMAGES));
    let (when, at) = death.split_once(' ').unwrap();
    let fault = match when {
        "before" => CommitFault::DieBefore,
        _ => CommitFault::DieAfter,
    };
    let commits = FaultyCommits::new(Some((at.parse().unwrap(), fault)));
    let mut images = images
        .split(' ')
        .map(|name| Reference::parse(name).unwrap());
    let images = [(); 2].map(|()| images.next().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let engine = open(Path::new(&said(DIR)), &Arc::new(commits));
        let done = |step| eprintln!("{DONE}{step}");
        perform(&engine, &images, done).await.unwrap();
    });
}

/// Has a child die; the steps that it was done with.
async fn killed(dir: &Path, images: &Images, death: &str) -> Steps {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child
        .args(["--exact", "engine::tests::child", "--ignored"])
        .args(["--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .env(IMAGES, format!("{} {}", images[0], images[1]))
        .env(DEATH, death)
        .stdin(Stdio::null());
    let ended = blocking(move || child.output()).await.unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), None, "{death}: {said}");
    let done = said.lines().filter_map(|line| line.strip_prefix(DONE));
    done.map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_commit_leaves_what_the_next_engine_goes_on_with() {
    let registry = FakeRegistry::start().await;
    let images = push(&registry);
    let commits = commits_of(&images).await;
    assert!(commits >= 14, "{commits} commits");
    let mut last = Steps::new();
    for at in 0..commits {
        for when in ["before", "after"] {
            let dir = scratch();
            let death = format!("death {when} {at}");
            let done = killed(dir.path(), &images, &format!("{when} {at}")).await;
            assert!(done.is_superset(&last), "{death}: {done:?}");
            last.clone_from(&done);
            let engine = open(dir.path(), &Arc::default());
            check(&engine, &images, &done, &death).await;
            if when == "before" {
                let again = perform(&engine, &images, |_| {}).await;
                again.unwrap_or_else(|error| panic!("{death}, then: {error}"));
                check(&engine, &images, &all_steps(), &death).await;
            }
            clean(&engine, &death).await;
        }
    }
    assert_eq!(last.len(), all_steps().len() - 1, "{last:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_at_any_commit_loses_nothing() {
    let registry = FakeRegistry::start().await;
    let images = push(&registry);
    let commits = commits_of(&images).await;
    let mut failed = 0;
    for at in 0..commits {
        for fault in [CommitFault::NoSpace, CommitFault::NoSpaceAfter] {
            let when = format!("{fault:?} at {at}");
            let dir = scratch();
            let faulty = Arc::new(FaultyCommits::new(Some((at, fault))));
            let engine = open(dir.path(), &faulty);
            let mut done = Steps::new();
            let outcome = perform(&engine, &images, |step| {
                done.insert(step.to_owned());
            });
            match outcome.await {
                Err(error) => {
                    let said = error.report();
                    assert!(said.contains("no space left"), "{when}: {said}");
                    failed += 1;
                }
                // Only what a later start can do without.
                Ok(()) => assert_eq!(done, all_steps(), "{when}"),
            }
            done.remove("accounts");
            // The same process goes on, and so does the next.
            engine.snapshots.cleanup().unwrap();
            check(&engine, &images, &done, &when).await;
            let again = perform(&engine, &images, |_| {}).await;
            again.unwrap_or_else(|error| panic!("{when}, then: {error}"));
            check(&engine, &images, &all_steps(), &when).await;
            engine.release_db();
            drop(engine);
            let engine = open(dir.path(), &Arc::default());
            check(&engine, &images, &all_steps(), &when).await;
            clean(&engine, &when).await;
        }
    }
    assert_eq!(failed, 2 * (commits - 1), "only accounts may be forgotten");
}
