//! Snapshots of containers in user namespaces: the owners their files are shown with, and the
//! mounts that are made for it, which never outlast them.

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::sync::Weak;
use std::time::{Duration, Instant};

use super::super::OverlayMount;
use super::*;
use crate::cleanup::unmount_below;
use crate::idmap::{GID_LABEL, UID_LABEL};
use crate::metastore::{Change, Metastore as _, Records};
use crate::sys;
use crate::test_util::FakeData;

/// Host's id of the container's root.
const ROOT: u32 = 100_000;
const MAP: &str = "0:100000:65536";
/// How the kernel shows who is nobody here.
const NOBODY: u32 = 65534;

fn labels(users: &str, groups: &str) -> Labels {
    let pairs = [(UID_LABEL, users), (GID_LABEL, groups)];
    pairs
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

fn of_pod() -> Labels {
    labels(MAP, MAP)
}

fn owner(path: &Path) -> (u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.uid(), meta.gid())
}

/// How many mounts lie below `dir`.
fn mounted(dir: &Path) -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = format!(" {}/", dir.display());
    table.lines().filter(|line| line.contains(&at)).count()
}

/// Where the lowers of an overlay are.
fn lowers(mount: &Mount) -> Vec<PathBuf> {
    match mount {
        Mount::Overlay(overlay) => overlay.lowers.clone(),
        Mount::Bind { .. } => panic!("it lies on something: {mount:?}"),
    }
}

on_each_backend! {
    privileged_files_have_the_owners_of_the_user_namespace
    privileged_a_layer_that_was_mounted_anew_is_shown_anew
}

fn privileged_files_have_the_owners_of_the_user_namespace(backend: Backend) {
    let fixture = Fixture::new(backend);
    two_layers(&fixture);
    let mut more = LayerBuilder::new("more");
    more.dir("").mode = 0o751;
    more.file("mine", b"mine").uid = 1000;
    let far = more.file("far", b"far");
    (far.uid, far.gid) = (70_000, 7);
    fixture.layer("more", Some("top"), &more);
    // The pod's user must get to what is mounted.
    fs::set_permissions(fixture.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let snapshots = &fixture.snapshots;
    snapshots.prepare("run", Some("more"), &of_pod()).unwrap();
    snapshots.view("look", Some("more"), &of_pod()).unwrap();
    let Mount::Overlay(overlay) = fixture.plan("run") else {
        panic!("three layers make an overlay");
    };
    assert_eq!(overlay.lowers.len(), 3);
    assert_eq!(mounted(&fixture.dir.path().join("root")), 3);
    for key in ["look", "run"] {
        fixture.with_mounted(key, |root| {
            assert_eq!(owner(root), (ROOT, ROOT), "{key}");
            assert_eq!(fs::metadata(root).unwrap().mode() & 0o7777, 0o751);
            assert_eq!(owner(&root.join("etc/keep")), (ROOT, ROOT));
            assert_eq!(owner(&root.join("mine")), (ROOT + 1000, ROOT));
            assert_eq!(owner(&root.join("far")), (NOBODY, ROOT + 7));
            assert_eq!(fs::read(root.join("usr/replaced")).unwrap(), b"newer");
            assert_eq!(names(&root.join("opt")), ["new"]);
        });
    }
    fixture.with_mounted("run", |root| {
        let script =
            "echo new >file && chmod 600 mine && echo changed >>etc/keep && rm usr/replaced";
        let mut as_root_of_pod = Command::new("sh");
        as_root_of_pod
            .arg("-c")
            .arg(format!("cd {} && {script}", root.display()));
        // Changing what belongs to others takes its capabilities, in its namespace only.
        let refused = as_root_of_pod.uid(ROOT).gid(ROOT).output().unwrap();
        assert!(!refused.status.success(), "{refused:?}");
        let mut as_user = Command::new("sh");
        let script = script.replace("chmod 600 mine && ", "");
        as_user
            .arg("-c")
            .arg(format!("cd {} && {script}", root.display()));
        let done = as_user.uid(ROOT).gid(ROOT).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    });
    let upper = overlay.upper.unwrap().dir;
    for path in ["", "file", "etc/keep"] {
        assert_eq!(owner(&upper.join(path)), (ROOT, ROOT), "{path}");
    }
    assert_eq!(fs::read(upper.join("etc/keep")).unwrap(), b"keepchanged\n");
    // What another one sees is as it was.
    snapshots
        .prepare("plain", Some("more"), &Labels::new())
        .unwrap();
    fixture.with_mounted("plain", |root| {
        assert_eq!(owner(&root.join("etc/keep")), (0, 0));
        assert_eq!(fs::read(root.join("etc/keep")).unwrap(), b"keep");
    });
    for key in ["run", "look", "plain"] {
        snapshots.remove(key).unwrap();
    }
    assert_eq!(mounted(&fixture.dir.path().join("root")), 0);
    fixture.assert_clean();
}

/// Mounts a layer; its data lives as long as somebody has the mount in use.
fn show(fixture: &Fixture, layer: &LayerBuilder) -> Weak<FakeData> {
    let data = layer.data();
    let in_use = Arc::downgrade(&data);
    let mount = fixture.mounts.mount(layer.digest(), layer.tree(), data);
    let mut mounted = fixture.mounted.borrow_mut();
    mounted.insert(layer.digest(), mount.unwrap());
    in_use
}

/// A process that another thread is starting may have it open for a moment.
fn wait_until_let_go(data: &Weak<FakeData>) {
    let since = Instant::now();
    while data.strong_count() > 0 {
        assert!(since.elapsed() < Duration::from_secs(60), "it is held");
        std::thread::yield_now();
    }
}

/// What a mount server that died with its guard brings about: other file systems, elsewhere.
fn privileged_a_layer_that_was_mounted_anew_is_shown_anew(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut base = LayerBuilder::new("base");
    base.file("file", b"text");
    let first = show(&fixture, &base);
    let snapshots = &fixture.snapshots;
    let digest = base.digest();
    let none = Labels::new();
    snapshots.commit_layer("base", None, digest, &none).unwrap();
    snapshots.prepare("run", Some("base"), &of_pod()).unwrap();
    let before = fixture.plan("run");
    assert_eq!(before, fixture.plan("run"));
    let root = fixture.dir.path().join("root");
    assert_eq!(mounted(&root), 1, "once is enough");

    drop(fixture.mounted.borrow_mut().remove(&digest));
    assert!(first.strong_count() > 0, "it is in use");
    let second = show(&fixture, &base);
    assert_eq!(before, fixture.plan("run"));
    assert_eq!(mounted(&root), 1, "the old one is gone");
    wait_until_let_go(&first);
    fixture.with_mounted("run", |root| {
        assert_eq!(fs::read(root.join("file")).unwrap(), b"text");
        assert_eq!(owner(&root.join("file")), (ROOT, ROOT));
    });
    snapshots.remove("run").unwrap();
    drop(fixture.mounted.borrow_mut().remove(&digest));
    wait_until_let_go(&second);
    fixture.assert_clean();
}

/// A root with a committed directory, `base`, with one file of the user 5.
struct Plain {
    dir: tempfile::TempDir,
    store: Arc<MemoryMetastore>,
}

impl Plain {
    /// `None` for who may not mount.
    fn new(test: &str) -> Option<Self> {
        if !must_be_root(test) {
            return None;
        }
        let plain = Self {
            dir: tempfile::tempdir().unwrap(),
            store: Arc::default(),
        };
        let snapshots = plain.open();
        snapshots.prepare("key", None, &Labels::new()).unwrap();
        let files = snapshots.mounts("key", &none).unwrap()[0]
            .source()
            .to_path_buf();
        fs::write(files.join("file"), b"text").unwrap();
        std::os::unix::fs::chown(files.join("file"), Some(5), Some(6)).unwrap();
        snapshots.commit("base", "key", &Labels::new()).unwrap();
        Some(plain)
    }

    fn open(&self) -> Snapshots {
        open(self.dir.path(), &self.store)
    }

    /// The one directory below the snapshot `key`, as it is shown.
    fn shown(snapshots: &Snapshots, key: &str) -> PathBuf {
        lowers(&snapshots.mounts(key, &none).unwrap()[0]).remove(0)
    }

    fn base(&self) -> PathBuf {
        self.dir.path().join("snapshots/1/fs")
    }

    fn assert_clean(&self) {
        assert_eq!(mounted(self.dir.path()), 0);
        assert_eq!(fs::read(self.base().join("file")).unwrap(), b"text");
        assert_eq!(owner(&self.base().join("file")), (5, 6));
    }
}

impl Drop for Plain {
    /// Whatever becomes of a test, no mount of it is left.
    fn drop(&mut self) {
        let _ = unmount_below(self.dir.path());
    }
}

#[test]
fn privileged_directories_are_shown_with_other_owners_and_not_written_to() {
    let test = "privileged_directories_are_shown_with_other_owners_and_not_written_to";
    let Some(plain) = Plain::new(test) else {
        return;
    };
    let snapshots = plain.open();
    let groups = "0:200000:3,3:300000:10";
    let map = labels(MAP, groups);
    snapshots.prepare("run", Some("base"), &map).unwrap();
    snapshots.view("look", Some("base"), &map).unwrap();
    let shown = Plain::shown(&snapshots, "run");
    assert_eq!(owner(&shown.join("file")), (ROOT + 5, 300_003));
    assert_eq!(owner(&shown), (ROOT, 200_000));
    let error = fs::remove_file(shown.join("file")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let [Mount::Bind { source, read_only }] = &snapshots.mounts("look", &none).unwrap()[..] else {
        panic!("one directory is shown as it is");
    };
    assert!(read_only);
    assert_eq!(owner(&source.join("file")), (ROOT + 5, 300_003));
    // The mounts of what is removed in use end, and nothing is removed through them.
    let held = std::fs::File::open(shown.join("file")).unwrap();
    snapshots.remove("run").unwrap();
    snapshots.remove("look").unwrap();
    drop(held);
    assert_eq!(numbers(plain.dir.path()), ["1"]);
    assert_eq!(
        fs::read_dir(plain.dir.path().join("trash"))
            .unwrap()
            .count(),
        0
    );
    plain.assert_clean();
}

/// A layer that is whole gets another file system over the one it was shown by.
#[test]
fn privileged_what_is_mounted_over_a_layer_is_not_seen_where_its_owners_are_mapped() {
    let test = "privileged_what_is_mounted_over_a_layer_is_not_seen_where_its_owners_are_mapped";
    let Some(plain) = Plain::new(test) else {
        return;
    };
    let [layer, other] = ["layer", "other"].map(|name| plain.dir.path().join(name));
    for dir in [&layer, &other] {
        fs::create_dir(dir).unwrap();
    }
    fs::write(layer.join("file"), b"layer").unwrap();
    let mount = |arguments: &[&std::ffi::OsStr]| {
        let mounted = Command::new("mount").args(arguments).output().unwrap();
        assert!(mounted.status.success(), "{mounted:?}");
    };
    // As the root of most machines, so that mounts on it appear wherever else it is.
    mount(&["--bind".as_ref(), layer.as_ref(), layer.as_ref()]);
    mount(&["--make-shared".as_ref(), layer.as_ref()]);
    let snapshots = plain.open();
    let digest = Digest::sha256(b"layer");
    let committed = snapshots.commit_layer("lazy", None, digest, &Labels::new());
    committed.unwrap();
    snapshots.prepare("run", Some("lazy"), &of_pod()).unwrap();
    let resolve = |_: &Digest| Ok(layer.clone());
    let shown = lowers(&snapshots.mounts("run", &resolve).unwrap()[0]).remove(0);
    mount(&["--bind".as_ref(), other.as_ref(), layer.as_ref()]);
    assert!(!layer.join("file").exists(), "it is covered");
    assert_eq!(fs::read(shown.join("file")).unwrap(), b"layer");
    assert_eq!(owner(&shown.join("file")), (ROOT, ROOT));
    for _ in 0..2 {
        sys::detach(&layer).unwrap();
    }
    snapshots.remove("run").unwrap();
    plain.assert_clean();
}

#[test]
fn privileged_what_is_mounted_with_other_owners_outlasts_a_restart() {
    let test = "privileged_what_is_mounted_with_other_owners_outlasts_a_restart";
    let Some(plain) = Plain::new(test) else {
        return;
    };
    let snapshots = plain.open();
    snapshots.prepare("run", Some("base"), &of_pod()).unwrap();
    snapshots.prepare("gone", Some("base"), &of_pod()).unwrap();
    let run = snapshots.mounts("run", &none).unwrap();
    let shown = Plain::shown(&snapshots, "gone");
    drop(snapshots);
    let snapshots = plain.open();
    assert_eq!(mounted(plain.dir.path()), 2);
    assert_eq!(snapshots.mounts("run", &none).unwrap(), run);
    assert_eq!(mounted(plain.dir.path()), 2, "it was mounted anew");

    // As after a reboot, or where a process died before it had mounted what it made a name for.
    let lower = Plain::shown(&snapshots, "run");
    sys::detach(&lower).unwrap();
    drop(snapshots);
    let snapshots = plain.open();
    assert!(!lower.exists(), "whoever mounts it would lack a layer");
    assert!(shown.join("file").exists(), "this one is there");
    assert_eq!(snapshots.mounts("run", &none).unwrap(), run);
    assert_eq!(owner(&lower.join("file")), (ROOT + 5, ROOT + 6));

    // A crash between the end of the record and that of the directory.
    let delete = |_: &dyn Records| Ok(vec![Change::Delete("gone".to_owned())]);
    plain.store.update(&mut { delete }).unwrap();
    drop(snapshots);
    let snapshots = plain.open();
    assert_eq!(mounted(plain.dir.path()), 1);
    assert_eq!(numbers(plain.dir.path()), ["1", "2"]);
    snapshots.remove("run").unwrap();
    plain.assert_clean();
}

#[test]
fn privileged_a_snapshot_that_is_committed_keeps_no_mount() {
    let test = "privileged_a_snapshot_that_is_committed_keeps_no_mount";
    let Some(plain) = Plain::new(test) else {
        return;
    };
    let snapshots = plain.open();
    snapshots.prepare("run", Some("base"), &of_pod()).unwrap();
    snapshots.mounts("run", &none).unwrap();
    assert_eq!(mounted(plain.dir.path()), 1);
    snapshots.commit("done", "run", &of_pod()).unwrap();
    assert_eq!(mounted(plain.dir.path()), 0);
    snapshots.remove("done").unwrap();
    plain.assert_clean();
}

/// Containerd that was not told of us gives a copy of the image to the host's owners, and asks
/// for a snapshot on it with the maps.
#[test]
fn privileged_what_was_given_to_the_hosts_owners_before_is_shown_as_it_is() {
    let test = "privileged_what_was_given_to_the_hosts_owners_before_is_shown_as_it_is";
    let Some(plain) = Plain::new(test) else {
        return;
    };
    let snapshots = plain.open();
    snapshots
        .prepare("copy-remap", Some("base"), &Labels::new())
        .unwrap();
    let Mount::Overlay(overlay) = snapshots.mounts("copy-remap", &none).unwrap().remove(0) else {
        panic!("it lies on a layer");
    };
    let upper = overlay.upper.unwrap().dir;
    std::os::unix::fs::chown(&upper, Some(ROOT), Some(ROOT)).unwrap();
    snapshots
        .commit("copy", "copy-remap", &Labels::new())
        .unwrap();
    snapshots.prepare("run", Some("copy"), &of_pod()).unwrap();
    let mount = snapshots.mounts("run", &none).unwrap().remove(0);
    assert_eq!(lowers(&mount), [upper, plain.base()]);
    let Mount::Overlay(OverlayMount { upper, .. }) = mount else {
        panic!("it lies on layers");
    };
    assert_eq!(owner(&upper.unwrap().dir), (ROOT, ROOT));
    plain.assert_clean();
}

#[test]
fn privileged_a_snapshot_on_nothing_belongs_to_the_containers_root() {
    let test = "privileged_a_snapshot_on_nothing_belongs_to_the_containers_root";
    let Some(plain) = Plain::new(test) else {
        return;
    };
    let snapshots = plain.open();
    snapshots.prepare("scratch", None, &of_pod()).unwrap();
    let files = || {
        let mounts = snapshots.mounts("scratch", &none).unwrap();
        mounts[0].source().to_path_buf()
    };
    let at = files();
    assert_eq!(owner(&at), (ROOT, ROOT));
    fs::write(at.join("file"), b"").unwrap();
    std::os::unix::fs::chown(&at, Some(ROOT + 5), Some(ROOT)).unwrap();
    assert_eq!(
        owner(&files()),
        (ROOT + 5, ROOT),
        "the container's own doing"
    );
    plain.assert_clean();
}

#[test]
fn privileged_what_cannot_be_mapped_is_refused_and_leaves_nothing() {
    let test = "privileged_what_cannot_be_mapped_is_refused_and_leaves_nothing";
    let Some(plain) = Plain::new(test) else {
        return;
    };
    let snapshots = plain.open();
    let layer = Digest::sha256(b"layer");
    let none = Labels::new();
    let committed = snapshots.commit_layer("lazy", Some("base"), layer, &none);
    committed.unwrap();
    snapshots.prepare("run", Some("lazy"), &of_pod()).unwrap();
    // The kernel maps no owners there.
    let resolve = |_: &Digest| Ok(PathBuf::from("/proc/sys"));
    let error = snapshots.mounts("run", &resolve).unwrap_err();
    assert!(matches!(error, Error::Environment { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("at /proc/sys: Invalid argument"), "{text}");
    assert!(
        text.starts_with("cannot map owners for a user namespace: "),
        "{text}"
    );
    snapshots.remove("run").unwrap();
    snapshots.remove("lazy").unwrap();
    assert_eq!(numbers(plain.dir.path()), ["1"]);
    plain.assert_clean();
}

#[test]
fn maps_stay_as_they_were_when_the_snapshot_was_made() {
    let root = tempfile::tempdir().unwrap();
    let snapshots = open(root.path(), &Arc::default());
    snapshots.prepare("plain", None, &Labels::new()).unwrap();
    let given = Relabel::Some(of_pod());
    let error = snapshots.relabel("plain", &given).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    snapshots.prepare("mapped", None, &of_pod()).unwrap();
    let taken = Relabel::All(Labels::new());
    snapshots.relabel("mapped", &taken).unwrap_err();
    let other = Relabel::Some([("k".to_owned(), "v".to_owned())].into());
    snapshots.relabel("mapped", &other).unwrap();
    // Nobody mounts what is committed.
    snapshots.commit("done", "mapped", &of_pod()).unwrap();
    snapshots.relabel("done", &taken).unwrap();
}

/// What it was made by is gone, and its number may be another's.
#[test]
fn privileged_nobody_is_in_a_user_namespace_that_is_there_for_its_maps() {
    let test = "privileged_nobody_is_in_a_user_namespace_that_is_there_for_its_maps";
    if !must_be_root(test) {
        return;
    }
    let make = || sys::user_namespace("0 5 1\n", "0 6 1\n").unwrap();
    let all: Vec<_> = std::thread::scope(|threads| {
        let makers: Vec<_> = (0..8).map(|_| threads.spawn(make)).collect();
        makers.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let name = |fd| format!("user:[{}]", fs::metadata(sys::path_of(fd)).unwrap().ino());
    let all: Vec<_> = all
        .iter()
        .map(|namespace| name(namespace.as_fd()))
        .collect();
    for entry in fs::read_dir("/proc").unwrap() {
        // Most are no processes, and those may end.
        let Ok(of) = fs::read_link(entry.unwrap().path().join("ns/user")) else {
            continue;
        };
        assert!(!all.iter().any(|name| of == Path::new(name)), "{of:?}");
    }
    sys::user_namespace("0 5 1\n0 6 1\n", "0 6 1\n").unwrap_err();
}
