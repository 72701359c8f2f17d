//! Snapshots on disk, and real overlays over real lazy layers.

mod many;
mod model;
mod owners;

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use lazarette_fetcher::types::Digest;

use super::dirs::Dirs;
use super::execute::Api;
use super::{Mount, Snapshots, unmount};
use crate::fuse::{Backend, FuseOptions, LayerMount, LayerMounts};
use crate::metastore::{Kind, Labels, MemoryMetastore, Relabel, Usage};
use crate::test_util::{LayerBuilder, database, must_be_root, on_each_backend};
use crate::{Error, Result};

fn open(root: &Path, store: &Arc<MemoryMetastore>) -> Snapshots {
    let store = Arc::clone(store);
    Snapshots::open(root, store).unwrap()
}

fn none(_: &Digest) -> Result<PathBuf> {
    panic!("no layer is lazy here")
}

/// Waits for what is deleted by a thread of its own.
fn emptied(dir: &Path) {
    let begun = std::time::Instant::now();
    while fs::read_dir(dir).unwrap().count() > 0 {
        assert!(begun.elapsed().as_secs() < 60, "{} stays", dir.display());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn numbers(root: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(root.join("snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_snapshot_lives_from_prepare_to_remove() {
    let root = tempfile::tempdir().unwrap();
    let store = Arc::default();
    let snapshots = open(root.path(), &store);
    let labels = Labels::from([("k".to_owned(), "v".to_owned())]);
    snapshots.prepare("key", None, &labels).unwrap();
    let [Mount::Bind { source, read_only }] = &snapshots.mounts("key", &none).unwrap()[..] else {
        panic!("a snapshot on nothing is a directory");
    };
    assert!(!read_only);
    fs::write(source.join("file"), vec![1; 10_000]).unwrap();
    fs::hard_link(source.join("file"), source.join("again")).unwrap();
    let usage = snapshots.usage("key").unwrap();
    assert_eq!(usage.inodes, 2);
    assert!(usage.bytes >= 10_000 && usage.bytes < 40_000, "{usage:?}");

    snapshots.commit("name", "key", &Labels::new()).unwrap();
    assert!(matches!(snapshots.stat("key"), Err(Error::NotFound { .. })));
    let record = snapshots.stat("name").unwrap();
    assert_eq!((record.kind, record.usage), (Kind::Committed, Some(usage)));
    assert!(record.labels.is_empty());
    let all = Relabel::All(labels.clone());
    assert_eq!(snapshots.relabel("name", &all).unwrap().labels, labels);
    assert_eq!(snapshots.stat("name").unwrap().labels, labels);
    let error = snapshots.mounts("name", &none).unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot mount snapshot \"name\": it is committed; make a view of it"
    );

    snapshots.view("look", Some("name"), &labels).unwrap();
    let mounts = snapshots.mounts("look", &none).unwrap();
    assert_eq!(mounts[0].source(), source);
    assert_eq!(mounts[0].options(), ["rbind", "ro"]);
    snapshots.remove("name").unwrap_err();
    snapshots.remove("look").unwrap();
    snapshots.remove("name").unwrap();
    assert!(snapshots.list().unwrap().is_empty());
    assert!(numbers(root.path()).is_empty());
    assert_eq!(fs::read_dir(root.path().join("trash")).unwrap().count(), 0);
}

#[test]
fn a_refused_snapshot_leaves_no_directory() {
    let root = tempfile::tempdir().unwrap();
    let store = Arc::default();
    let snapshots = open(root.path(), &store);
    snapshots.prepare("key", None, &Labels::new()).unwrap();
    snapshots.prepare("key", None, &Labels::new()).unwrap_err();
    snapshots
        .prepare("other", Some("no"), &Labels::new())
        .unwrap_err();
    assert_eq!(numbers(root.path()).len(), 1);
}

#[test]
fn open_removes_what_a_crash_left_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let store = Arc::default();
    let first = open(root.path(), &store);
    first.prepare("kept", None, &Labels::new()).unwrap();
    let kept = numbers(root.path());
    // Made, but the process died before the record was.
    fs::create_dir_all(root.path().join("snapshots/77/fs/deep")).unwrap();
    fs::write(root.path().join("snapshots/77/fs/deep/file"), b"x").unwrap();
    // The record was removed, and deletion began.
    fs::create_dir_all(root.path().join("trash/5.1.0/fs")).unwrap();
    // Not ours.
    fs::create_dir_all(root.path().join("snapshots/notes")).unwrap();

    // While another process makes a snapshot nothing is judged.
    let making = first.dirs.make().unwrap();
    let second = open(root.path(), &store);
    assert!(root.path().join("snapshots/77").exists());
    drop(making);
    drop(second);
    let second = open(root.path(), &store);
    let mut expected = kept;
    expected.push("notes".to_owned());
    assert_eq!(numbers(root.path()), expected);
    emptied(&root.path().join("trash"));
    // Two processes never share a directory.
    first.prepare("one", None, &Labels::new()).unwrap();
    second.prepare("two", None, &Labels::new()).unwrap();
    let source = |key| first.mounts(key, &none).unwrap()[0].source().to_path_buf();
    assert_ne!(source("one"), source("two"));
}

/// What a power cut leaves on a file system that does not keep the order in which names are made.
#[test]
fn what_a_power_cut_took_of_a_snapshot_is_there_again_and_empty() {
    let root = tempfile::tempdir().unwrap();
    let store = Arc::default();
    let snapshots = open(root.path(), &store);
    let labels = Labels::new();
    snapshots.prepare("base", None, &labels).unwrap();
    snapshots.commit("name", "base", &labels).unwrap();
    snapshots.prepare("whole", Some("name"), &labels).unwrap();
    snapshots.prepare("work", Some("name"), &labels).unwrap();
    snapshots.view("view", Some("name"), &labels).unwrap();
    let upper = |snapshots: &Snapshots, key| {
        let mounts = snapshots.mounts(key, &none).unwrap();
        match &mounts[..] {
            [Mount::Overlay(overlay)] => overlay.upper.clone().unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let (whole, work) = (upper(&snapshots, "whole"), upper(&snapshots, "work"));
    // Of this one a file was synced, and with it what leads there.
    fs::write(work.dir.join("file"), "synced").unwrap();
    fs::remove_dir(&work.work).unwrap();
    fs::remove_dir_all(whole.dir.parent().unwrap()).unwrap();
    let view = root.path().join("snapshots/4");
    fs::remove_dir_all(&view).unwrap();
    drop(snapshots);

    let snapshots = open(root.path(), &store);
    assert_eq!(numbers(root.path()), ["1", "2", "3", "4"]);
    for (key, before, files) in [("whole", whole, 0), ("work", work, 1)] {
        let upper = upper(&snapshots, key);
        assert_eq!(upper, before);
        assert_eq!(fs::read_dir(&upper.dir).unwrap().count(), files);
        assert_eq!(fs::read_dir(&upper.work).unwrap().count(), 0);
        let mode = |path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&upper.dir), mode(&upper.work)), (0o755, 0o700));
    }
    assert!(view.join("fs").exists());
}

#[test]
fn what_another_process_removes_meanwhile_is_not_made_again() {
    let root = tempfile::tempdir().unwrap();
    let dirs = Dirs::open(root.path()).unwrap();
    let looks = std::cell::Cell::new(0);
    let recorded = |is_removed: bool| {
        looks.set(looks.get() + 1);
        let is_there = looks.get() == 1 || !is_removed;
        Ok(is_there.then_some((7, Kind::Active)).into_iter().collect())
    };
    dirs.restore(&|| recorded(true)).unwrap();
    assert_eq!(numbers(root.path()), [""; 0]);
    dirs.restore(&|| recorded(false)).unwrap();
    assert_eq!(numbers(root.path()), ["7"]);
}

/// Between fork and exec a process that another thread starts has all files open that we have.
#[test]
fn what_another_thread_starts_keeps_no_orphans() {
    let root = tempfile::tempdir().unwrap();
    let snapshots = open(root.path(), &Arc::default());
    // A number that none of ours comes to.
    let orphan = root.path().join("snapshots/77777777");
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| {
            for _ in 0..100 {
                Command::new("true").status().unwrap();
            }
        });
        let mut number = 0;
        while !starting.is_finished() {
            number += 1;
            let key = number.to_string();
            snapshots.prepare(&key, None, &Labels::new()).unwrap();
            fs::create_dir(&orphan).unwrap();
            snapshots.cleanup().unwrap();
            assert!(!orphan.exists(), "round {number}");
            snapshots.remove(&key).unwrap();
        }
    });
}

#[test]
fn a_lazy_layer_is_a_committed_snapshot() {
    let root = tempfile::tempdir().unwrap();
    let store = Arc::default();
    let snapshots = open(root.path(), &store);
    let (base, top) = (Digest::sha256(b"base"), Digest::sha256(b"top"));
    let labels = Labels::new();
    snapshots.commit_layer("base", None, base, &labels).unwrap();
    snapshots
        .commit_layer("top", Some("base"), top, &labels)
        .unwrap();
    let error = snapshots
        .commit_layer("top", Some("base"), top, &labels)
        .unwrap_err();
    assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
    assert!(numbers(root.path()).is_empty());
    assert_eq!(snapshots.usage("top").unwrap(), Usage::default());

    snapshots.view("look", Some("top"), &labels).unwrap();
    assert_eq!(snapshots.layers("look").unwrap(), [top, base]);
    let resolve = |digest: &Digest| Ok(PathBuf::from(if *digest == top { "/t" } else { "/b" }));
    let mounts = snapshots.mounts("look", &resolve).unwrap();
    assert!(mounts[0].options().contains(&"lowerdir=/t:/b".to_owned()));
    let failing = |digest: &Digest| {
        Err(Error::NotFound {
            key: digest.to_string(),
        })
    };
    snapshots.mounts("look", &failing).unwrap_err();
}

on_each_backend! {
    privileged_overlay_applies_whiteouts_and_opaque_directories
    privileged_writes_stay_in_their_snapshot_and_commit_to_a_layer
    privileged_single_layers_and_no_layers_mount_too
    privileged_both_mount_apis_mount_the_same
    privileged_what_passes_is_not_synced_and_not_mounted_again
}

/// Lazy layers, snapshots and one mountpoint in a temporary directory.
struct Fixture {
    dir: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
    mounts: LayerMounts,
    snapshots: Snapshots,
    mounted: RefCell<HashMap<Digest, Arc<LayerMount>>>,
}

impl Fixture {
    fn new(backend: Backend) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let handle = runtime.handle().clone();
        let options = FuseOptions {
            backend,
            ..FuseOptions::default()
        };
        let mounts = LayerMounts::new(dir.path().join("layers"), handle, options);
        let snapshots = open(&dir.path().join("root"), &Arc::default());
        fs::create_dir(dir.path().join("target")).unwrap();
        Self {
            dir,
            _runtime: runtime,
            mounts,
            snapshots,
            mounted: RefCell::default(),
        }
    }

    /// Mounts a layer and commits it under its name.
    fn layer(&self, name: &str, parent: Option<&str>, layer: &LayerBuilder) {
        let digest = layer.digest();
        let mount = self
            .mounts
            .mount(digest, layer.tree(), layer.data())
            .unwrap();
        self.mounted.borrow_mut().insert(digest, mount);
        self.snapshots
            .commit_layer(name, parent, digest, &Labels::new())
            .unwrap();
    }

    fn plan(&self, key: &str) -> Mount {
        let mounted = self.mounted.borrow();
        let resolve = |digest: &Digest| Ok(mounted[digest].path().to_path_buf());
        self.snapshots.mounts(key, &resolve).unwrap().remove(0)
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("target")
    }

    /// Runs `look` with the snapshot mounted.
    fn with_mounted(&self, key: &str, look: impl FnOnce(&Path)) {
        self.plan(key).mount_at(&self.target()).unwrap();
        look(&self.target());
        unmount(&self.target()).unwrap();
    }

    fn assert_clean(self) {
        self.mounted.borrow_mut().clear();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(
            !table.contains(self.dir.path().to_str().unwrap()),
            "{table}"
        );
    }
}

/// A base, and a layer that deletes a file, hides a directory and adds its own.
fn two_layers(fixture: &Fixture) {
    let mut base = LayerBuilder::new("base");
    base.dir("").mode = 0o751;
    base.file("etc/keep", b"keep");
    base.file("etc/gone", b"gone");
    base.file("opt/hidden", b"hidden");
    base.file("usr/replaced", b"old");
    let mut top = LayerBuilder::new("top");
    top.dir("").mode = 0o751;
    top.file("etc/.wh.gone", b"");
    top.file("opt/.wh..wh..opq", b"");
    top.file("opt/new", b"new");
    top.file("usr/replaced", b"newer");
    fixture.layer("base", None, &base);
    fixture.layer("top", Some("base"), &top);
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn privileged_overlay_applies_whiteouts_and_opaque_directories(backend: Backend) {
    let fixture = Fixture::new(backend);
    two_layers(&fixture);
    fixture
        .snapshots
        .view("look", Some("top"), &Labels::new())
        .unwrap();
    fixture
        .snapshots
        .prepare("run", Some("top"), &Labels::new())
        .unwrap();
    for key in ["look", "run"] {
        fixture.with_mounted(key, |root| {
            assert_eq!(names(root), ["etc", "opt", "usr"]);
            assert_eq!(names(&root.join("etc")), ["keep"]);
            assert_eq!(names(&root.join("opt")), ["new"]);
            assert!(!root.join("etc/gone").exists());
            assert!(!root.join("opt/hidden").exists());
            assert_eq!(fs::read(root.join("usr/replaced")).unwrap(), b"newer");
            assert_eq!(fs::metadata(root).unwrap().mode() & 0o7777, 0o751);
        });
    }
    fixture.assert_clean();
}

fn privileged_writes_stay_in_their_snapshot_and_commit_to_a_layer(backend: Backend) {
    let fixture = Fixture::new(backend);
    two_layers(&fixture);
    let snapshots = &fixture.snapshots;
    snapshots
        .prepare("run", Some("top"), &Labels::new())
        .unwrap();
    fixture.with_mounted("run", |root| {
        fs::write(root.join("etc/own"), b"own").unwrap();
        fs::write(root.join("etc/keep"), b"changed").unwrap();
        fs::remove_file(root.join("usr/replaced")).unwrap();
        fs::remove_dir_all(root.join("opt")).unwrap();
        fs::set_permissions(root, fs::Permissions::from_mode(0o700)).unwrap();
    });
    snapshots.commit("mine", "run", &Labels::new()).unwrap();
    assert!(snapshots.usage("mine").unwrap().inodes >= 5);
    snapshots
        .prepare("next", Some("mine"), &Labels::new())
        .unwrap();
    fixture.with_mounted("next", |root| {
        assert_eq!(names(root), ["etc", "usr"]);
        assert_eq!(fs::read(root.join("etc/keep")).unwrap(), b"changed");
        assert_eq!(fs::read(root.join("etc/own")).unwrap(), b"own");
        assert!(names(&root.join("usr")).is_empty());
        assert_eq!(fs::metadata(root).unwrap().mode() & 0o7777, 0o700);
    });
    // The layers below are as they were.
    snapshots.view("look", Some("top"), &Labels::new()).unwrap();
    fixture.with_mounted("look", |root| {
        assert_eq!(fs::read(root.join("etc/keep")).unwrap(), b"keep");
        fs::write(root.join("etc/keep"), b"x").unwrap_err();
    });
    for key in ["next", "mine", "look"] {
        snapshots.remove(key).unwrap();
    }
    fixture.assert_clean();
}

fn privileged_single_layers_and_no_layers_mount_too(backend: Backend) {
    let fixture = Fixture::new(backend);
    two_layers(&fixture);
    let snapshots = &fixture.snapshots;
    snapshots
        .prepare("one", Some("base"), &Labels::new())
        .unwrap();
    fixture.with_mounted("one", |root| {
        assert_eq!(names(&root.join("etc")), ["gone", "keep"]);
        fs::write(root.join("new"), b"new").unwrap();
    });
    snapshots
        .view("one-look", Some("base"), &Labels::new())
        .unwrap();
    fixture.with_mounted("one-look", |root| {
        assert!(!root.join("new").exists());
        fs::write(root.join("new"), b"new").unwrap_err();
    });
    snapshots.prepare("scratch", None, &Labels::new()).unwrap();
    fixture.with_mounted("scratch", |root| {
        assert!(names(root).is_empty());
        fs::write(root.join("new"), b"new").unwrap();
    });
    snapshots.view("nothing", None, &Labels::new()).unwrap();
    fixture.with_mounted("nothing", |root| {
        assert!(names(root).is_empty());
        let error = fs::write(root.join("new"), b"new").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    });
    fixture.assert_clean();
}

fn privileged_both_mount_apis_mount_the_same(backend: Backend) {
    let fixture = Fixture::new(backend);
    two_layers(&fixture);
    fixture
        .snapshots
        .prepare("run", Some("top"), &Labels::new())
        .unwrap();
    let Mount::Overlay(overlay) = fixture.plan("run") else {
        panic!("two layers make an overlay");
    };
    for api in [Api::New, Api::Classic] {
        overlay.mount_at(&fixture.target(), api).unwrap();
        assert_eq!(names(&fixture.target().join("etc")), ["keep"], "{api:?}");
        fs::write(fixture.target().join("etc/own"), b"own").unwrap();
        fs::remove_file(fixture.target().join("etc/own")).unwrap();
        unmount(&fixture.target()).unwrap();
    }
    fixture.assert_clean();
}

fn privileged_what_passes_is_not_synced_and_not_mounted_again(backend: Backend) {
    let fixture = Fixture::new(backend);
    two_layers(&fixture);
    let target = fixture.target();
    for (key, api) in [("new", Api::New), ("classic", Api::Classic)] {
        let prepared = fixture.snapshots.prepare(key, Some("top"), &Labels::new());
        prepared.unwrap();
        let Mount::Overlay(overlay) = fixture.plan(key).passing() else {
            panic!("two layers make an overlay");
        };
        overlay.mount_at(&target, api).unwrap();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut lines = table.lines();
        let line = lines.find(|line| line.contains(target.to_str().unwrap()));
        assert!(line.unwrap().contains("volatile"), "{api:?}");
        fs::write(target.join("etc/own"), b"own").unwrap();
        unmount(&target).unwrap();
        fixture.plan(key).mount_at(&target).unwrap_err();
        fixture.snapshots.remove(key).unwrap();
    }
    fixture.assert_clean();
}

#[test]
fn privileged_hundreds_of_layers_with_long_paths_mount() {
    if !must_be_root("privileged_hundreds_of_layers_with_long_paths_mount") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let long = dir
        .path()
        .join("a,b:c")
        .join("n".repeat(200))
        .join("m".repeat(100));
    let lowers: Vec<_> = (0..400)
        .map(|number| {
            let lower = long.join(number.to_string());
            fs::create_dir_all(&lower).unwrap();
            fs::write(lower.join(format!("f{number}")), b"x").unwrap();
            fs::write(lower.join("same"), number.to_string()).unwrap();
            lower
        })
        .collect();
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    let overlay = super::OverlayMount {
        lowers,
        upper: None,
    };
    let error = overlay
        .mount_at(&target, Api::Classic)
        .unwrap_err()
        .to_string();
    assert!(error.contains("use Linux 6.7 or later"), "{error}");
    overlay.mount_at(&target, Api::New).unwrap();
    assert_eq!(names(&target).len(), 401);
    assert_eq!(fs::read(target.join("same")).unwrap(), b"0");
    unmount(&target).unwrap();
}

#[test]
fn privileged_a_refused_overlay_says_what_the_kernel_says() {
    if !must_be_root("privileged_a_refused_overlay_says_what_the_kernel_says") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let lowers = vec![dir.path().join("no"), dir.path().join("such")];
    let overlay = super::OverlayMount {
        lowers,
        upper: None,
    };
    let mount = Mount::Overlay(overlay);
    let error = mount.mount_at(dir.path()).unwrap_err().to_string();
    assert!(error.starts_with("cannot mount overlay at "), "{error}");
    assert!(error.contains("No such file or directory"), "{error}");
}

#[test]
fn the_library_keeps_the_contract() {
    super::contract::all(|check| {
        let root = tempfile::tempdir().unwrap();
        let snapshots = open(root.path(), &Arc::default());
        check(&super::contract::Library(snapshots, root.path()));
    });
}

#[test]
fn the_library_keeps_the_contract_over_the_database() {
    super::contract::all(|check| {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        let snapshots = Snapshots::open(&root, database(dir.path())).unwrap();
        check(&super::contract::Library(snapshots, &root));
    });
}
