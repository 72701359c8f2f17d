//! Run directories of living, dead and killed processes.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{RunDir, unmount_below};
use crate::fuse::{Backend, FuseOptions, LayerMounts};
use crate::overlay::Mount;
use crate::test_util::{LayerBuilder, must_be_root, on_each_backend};
use crate::{Error, sys};

/// Tells the test below that it is the child, and where to live.
const CHILD_STATE: &str = "LAZARETTE_TEST_CHILD_STATE";
/// Which backend it uses.
const CHILD_BACKEND: &str = "LAZARETTE_TEST_CHILD_BACKEND";
const READY: &str = "child is ready";

fn mounts_below(dir: &Path) -> usize {
    super::mounts_below(&dir.canonicalize().unwrap())
        .unwrap()
        .len()
}

#[test]
fn a_directory_that_is_left_is_swept_though_its_lock_was_inherited() {
    let state = tempfile::tempdir().unwrap();
    let left = RunDir::create(state.path(), "left").unwrap();
    // As a process that another thread starts meanwhile has it.
    let inherited = left.lock.try_clone().unwrap();
    assert_eq!(RunDir::sweep(state.path()).unwrap().removed.len(), 0);
    left.leave().unwrap();
    assert_eq!(RunDir::sweep(state.path()).unwrap().removed.len(), 1);
    drop(inherited);
}

#[test]
fn a_living_directory_is_left_alone_and_a_dead_one_removed() {
    let state = tempfile::tempdir().unwrap();
    let alive = RunDir::create(state.path(), "alive").unwrap();
    fs::write(alive.path().join("file"), b"x").unwrap();
    let mode = fs::metadata(alive.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "layers with set-uid programs go there");
    let dead = state.path().join("dead");
    fs::create_dir_all(dead.join("deep/er")).unwrap();
    File::create(dead.join("lock")).unwrap();
    // Made by a process that died before it locked anything.
    fs::create_dir(state.path().join("half")).unwrap();
    fs::write(state.path().join("a file"), b"not ours").unwrap();

    let swept = RunDir::sweep(state.path()).unwrap();
    assert_eq!(swept.removed.len(), 2, "{swept:?}");
    assert!(swept.failed.is_empty(), "{swept:?}");
    assert!(alive.path().join("file").exists());
    assert!(state.path().join("a file").exists());
    assert!(!dead.exists());
    let path = alive.path().to_path_buf();
    alive.close().unwrap();
    assert!(!path.exists());
}

#[test]
fn what_a_directory_stands_for_is_released_before_it_goes() {
    let state = tempfile::tempdir().unwrap();
    let run = RunDir::create(state.path(), "left").unwrap();
    let path = run.path().to_path_buf();
    run.leave().unwrap();
    // It cannot be released now, and is tried again.
    for fails in [true, false] {
        let release = |id: &str| {
            assert!(id == "left" && path.exists());
            match fails {
                true => Err(Error::NotFound { key: id.to_owned() }),
                false => Ok(()),
            }
        };
        let swept = RunDir::sweep_after(state.path(), &release).unwrap();
        assert_eq!(swept.failed.len(), usize::from(fails), "{swept:?}");
        assert_eq!(path.exists(), fails);
    }
}

#[test]
fn names_are_checked() {
    let state = tempfile::tempdir().unwrap();
    for id in ["", ".", "..", "a/b", "lock", "a\0b"] {
        let error = RunDir::create(state.path(), id).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{id:?}: {error}");
    }
    let _alive = RunDir::create(state.path(), "a").unwrap();
    let error = RunDir::create(state.path(), "a").unwrap_err();
    assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
    assert!(
        RunDir::sweep(&state.path().join("absent"))
            .unwrap()
            .removed
            .is_empty()
    );
}

#[test]
fn privileged_unmounts_stacks_and_nothing_outside() {
    if !must_be_root("privileged_unmounts_stacks_and_nothing_outside") {
        return;
    }
    let state = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("precious"), b"x").unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    sys::bind(outside.path(), elsewhere.path()).unwrap();
    let run = RunDir::create(state.path(), "run").unwrap();
    let at = run.path().join("with space");
    fs::create_dir(&at).unwrap();
    sys::bind(outside.path(), &at).unwrap();
    sys::bind(outside.path(), &at).unwrap();
    let inner = at.join("inner");
    fs::create_dir(&inner).unwrap();
    sys::bind(outside.path(), &inner).unwrap();
    let busy = File::open(inner.join("precious")).unwrap();
    assert!(mounts_below(run.path()) >= 3);
    unmount_below(run.path()).unwrap();
    assert_eq!(mounts_below(run.path()), 0);
    drop((busy, run));
    assert!(
        outside.path().join("precious").exists(),
        "the source of a bind stays"
    );
    assert_eq!(mounts_below(elsewhere.path()), 1);
    sys::unmount(elsewhere.path()).unwrap();
}

/// The life of the child: a lazy layer, an overlay on it, a file held open; then it waits
/// to be killed.
#[test]
fn privileged_child_that_is_killed() {
    let Some(state) = std::env::var_os(CHILD_STATE) else {
        return;
    };
    let run = RunDir::create(Path::new(&state), "child").unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let layers = run.path().join("layers");
    let backend = std::env::var_os(CHILD_BACKEND).unwrap();
    let options = FuseOptions {
        backend: if backend == "Erofs" {
            Backend::Erofs
        } else {
            Backend::Fuse
        },
        ..FuseOptions::default()
    };
    let mounts = LayerMounts::new(layers, runtime.handle().clone(), options);
    let mut layer = LayerBuilder::new("child");
    layer.file("file", b"content");
    let mounted = mounts
        .mount(layer.digest(), layer.tree(), layer.data())
        .unwrap();
    for dir in ["root", "upper", "work"] {
        fs::create_dir(run.path().join(dir)).unwrap();
    }
    let overlay = crate::overlay::OverlayMount {
        lowers: vec![mounted.path().to_path_buf()],
        upper: Some(crate::overlay::Upper {
            dir: run.path().join("upper"),
            work: run.path().join("work"),
            passing: false,
        }),
    };
    let root = run.path().join("root");
    Mount::Overlay(overlay).mount_at(&root).unwrap();
    assert_eq!(fs::read(root.join("file")).unwrap(), b"content");
    let _open = File::open(root.join("file")).unwrap();
    println!("\n{READY}");
    loop {
        std::thread::park();
    }
}

on_each_backend! {
    privileged_a_killed_process_leaves_nothing_after_a_sweep
}

fn privileged_a_killed_process_leaves_nothing_after_a_sweep(backend: Backend) {
    let state = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            "cleanup::tests::privileged_child_that_is_killed",
        ])
        .env(CHILD_STATE, state.path())
        .env(CHILD_BACKEND, format!("{backend:?}"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = lines.map_while(Result::ok).any(|line| line == READY);
    if ready {
        // An overlay, and what shows the layer.
        let mounts = if backend == Backend::Erofs { 3 } else { 2 };
        assert_eq!(mounts_below(state.path()), mounts);
        assert!(
            RunDir::sweep(state.path()).unwrap().removed.is_empty(),
            "it lives"
        );
        assert_eq!(mounts_below(state.path()), mounts);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(ready, "the child failed; see its output above");

    let swept = RunDir::sweep(state.path()).unwrap();
    assert!(swept.failed.is_empty(), "{swept:?}");
    assert_eq!(swept.removed.len(), 1);
    assert_eq!(mounts_below(state.path()), 0);
    assert!(!state.path().join("child").exists());
}
