//! Real mounts over data that a test holds back, breaks and releases: the same tests for
//! FUSE alone and for EROFS over FUSE.

mod short;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use lazarette_fetcher::index::{FileKind, Timestamp};
use lazarette_fetcher::types::ByteRange;

use super::{Backend, FuseOptions, LayerMount, LayerMounts, ReadAhead};
use crate::sys;
use crate::test_util::{FakeData, LayerBuilder, must_be_root, on_each_backend};
use crate::warm::Warmer;

on_each_backend! {
    privileged_shows_exact_attributes
    privileged_lists_large_directories_and_remembers_absent_names
    privileged_extended_attributes_follow_the_calls_rules
    privileged_reads_the_right_bytes_by_every_way
    privileged_many_threads_read_many_files
    privileged_slow_misses_do_not_delay_warm_reads
    privileged_a_failed_fill_is_an_error_once_and_not_remembered
    privileged_reading_ahead_waits_for_nothing
    privileged_the_kernel_reads_as_far_ahead_as_it_is_told
    privileged_what_was_warmed_is_read_without_asking
    privileged_one_mount_per_layer_until_the_last_user_goes
    privileged_unmounts_under_open_files_and_waiting_reads
    privileged_other_users_see_what_the_modes_allow
}

struct Fixture {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    mounts: LayerMounts,
}

impl Fixture {
    fn new(backend: Backend) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let options = FuseOptions {
            backend,
            ..FuseOptions::default()
        };
        let mounts = LayerMounts::new(dir.path(), runtime.handle().clone(), options);
        Self {
            dir,
            runtime,
            mounts,
        }
    }

    fn mount(&self, layer: &LayerBuilder, data: &Arc<FakeData>) -> Arc<LayerMount> {
        let data = Arc::clone(data);
        self.mounts
            .mount(layer.digest(), layer.tree(), data)
            .unwrap()
    }

    /// Nothing is mounted and no mountpoint is left.
    fn assert_clean(self) {
        drop(self.mounts);
        drop(self.runtime);
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 0);
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!table.contains(self.dir.path().to_str().unwrap()));
    }
}

fn privileged_shows_exact_attributes(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("attributes");
    layer.dir("etc").mode = 0o1770;
    let su = layer.file("bin/su", b"#!");
    (su.mode, su.uid, su.gid) = (0o4755, 12, 34);
    su.mtime = Timestamp {
        secs: -2,
        nanos: 800_000_001,
    };
    layer.link("bin/su2", "bin/su");
    layer.symlink("sh", "bin/su");
    let (major, minor) = (5, 300);
    layer.add("tty", FileKind::CharDevice { major, minor });
    layer.add("disk", FileKind::BlockDevice { major: 8, minor: 1 });
    layer.add("pipe", FileKind::Fifo);
    let data = layer.data();
    let mount = fixture.mount(&layer, &data);
    let at = |name: &str| fs::symlink_metadata(mount.path().join(name)).unwrap();

    let su = at("bin/su");
    assert_eq!((su.mode() & 0o7777, su.uid(), su.gid()), (0o4755, 12, 34));
    assert_eq!((su.mtime(), su.mtime_nsec()), (-2, 800_000_001));
    assert_eq!((su.size(), su.nlink()), (2, 2));
    // EROFS counts whole blocks, FUSE what is in them.
    let blocks = if backend == Backend::Erofs { 8 } else { 1 };
    assert_eq!(su.blocks(), blocks);
    assert_eq!(at("bin/su2").ino(), su.ino());
    assert_eq!((at("etc").mode() & 0o7777, at("etc").nlink()), (0o1770, 2));
    assert_eq!(at("").nlink(), 4);
    assert_eq!(at("sh").size(), 6);
    assert_eq!(
        fs::read_link(mount.path().join("sh")).unwrap(),
        Path::new("bin/su")
    );
    assert!(at("tty").file_type().is_char_device());
    assert_eq!(sys::split_dev(at("tty").rdev()), (5, 300));
    assert!(at("disk").file_type().is_block_device());
    assert_eq!(sys::split_dev(at("disk").rdev()), (8, 1));
    assert!(at("pipe").file_type().is_fifo());
    // A line says who mounted, and that it is read-only.
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let path = mount.path().to_str().unwrap();
    let mut lines = table.lines().filter(|line| line.contains(path));
    let line = lines.next().unwrap();
    assert!(line.contains("lazarette") && line.contains(" ro"), "{line}");
    assert!(line.contains("default_permissions,allow_other"), "{line}");
    let over = lines.next();
    assert_eq!(over.is_some(), backend == Backend::Erofs);
    assert!(
        over.is_none_or(|line| line.contains(" - erofs ")),
        "{over:?}"
    );
    let error = fs::write(mount.path().join("new"), b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let (block, blocks, files, name) = sys::test_support::statfs(mount.path()).unwrap();
    assert_eq!((block, name), (4096, 255));
    // EROFS counts the image's blocks, too, and no files.
    if backend == Backend::Erofs {
        assert_eq!((blocks, files), (3, u64::MAX));
    } else {
        assert_eq!((blocks, files), (1, 8));
    }
    drop(mount);
    fixture.assert_clean();
}

fn privileged_lists_large_directories_and_remembers_absent_names(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("large");
    for number in 0..3000 {
        layer.file(&format!("many/file-with-a-longer-name-{number:05}"), b"");
    }
    let mount = fixture.mount(&layer, &layer.data());
    let many = mount.path().join("many");
    for _ in 0..2 {
        let names: Vec<_> = fs::read_dir(&many)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                assert!(entry.file_type().unwrap().is_file());
                entry.file_name()
            })
            .collect();
        assert_eq!(names.len(), 3000);
        assert!(names.is_sorted());
    }
    let absent = many.join("absent");
    assert!(!absent.exists());
    let before = mount.stats().lookups;
    for _ in 0..50 {
        assert!(!absent.exists());
    }
    assert_eq!(mount.stats().lookups, before, "the kernel remembers");
    drop(mount);
    fixture.assert_clean();
}

fn privileged_extended_attributes_follow_the_calls_rules(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("xattrs");
    // Revision 2, effective, CAP_NET_BIND_SERVICE: the kernel checks the form.
    let mut capability = [0; 20];
    (capability[0], capability[3], capability[5]) = (1, 2, 4);
    layer.file("a", b"x").xattrs = vec![
        (b"user.name".to_vec(), b"value".to_vec()),
        (b"security.capability".to_vec(), capability.to_vec()),
    ];
    layer.file("plain", b"x");
    layer.file("opaque/.wh..wh..opq", b"");
    let mount = fixture.mount(&layer, &layer.data());
    let at = |name: &str| mount.path().join(name);
    use sys::test_support::{get_xattr, get_xattr_sized, list_xattrs};

    assert_eq!(get_xattr(&at("a"), "user.name").unwrap(), b"value");
    assert_eq!(
        get_xattr(&at("a"), "security.capability").unwrap(),
        capability
    );
    assert_eq!(get_xattr_sized(&at("a"), "user.name", 0).unwrap(), 5);
    let error = get_xattr_sized(&at("a"), "user.name", 4).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(34), "ERANGE: {error}");
    for name in ["a", "plain"] {
        let error = get_xattr(&at(name), "user.other").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(61), "ENODATA: {error}");
    }
    let mut names = list_xattrs(&at("a")).unwrap();
    names.sort();
    assert_eq!(names, ["security.capability", "user.name"]);
    assert!(list_xattrs(&at("plain")).unwrap().is_empty());
    let opaque = get_xattr(&at("opaque"), "trusted.overlay.opaque").unwrap();
    assert_eq!(opaque, b"y");
    drop(mount);
    fixture.assert_clean();
}

/// Bytes that tell where they are from.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from(at * 7 % 251).unwrap())
        .collect()
}

fn privileged_reads_the_right_bytes_by_every_way(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("bytes");
    let big = pattern(3_000_001);
    layer.file("small", b"hello");
    layer.file("empty", b"");
    layer.file("big", &big);
    let program = fs::read("/bin/true").unwrap();
    layer.file("bin/true", &program).mode = 0o755;
    let data = layer.data();
    let mount = fixture.mount(&layer, &data);
    let at = |name: &str| mount.path().join(name);

    assert_eq!(fs::read(at("small")).unwrap(), b"hello");
    assert_eq!(fs::read(at("empty")).unwrap(), b"");
    let file = File::open(at("big")).unwrap();
    let mut part = vec![0; 5000];
    file.read_exact_at(&mut part, 1_234_567).unwrap();
    assert_eq!(part, big[1_234_567..1_239_567]);
    assert_eq!(file.read_at(&mut part, 3_000_001).unwrap(), 0);
    let sum = sys::test_support::sum_by_mmap(&file, big.len()).unwrap();
    assert_eq!(sum, big.iter().map(|byte| u64::from(*byte)).sum::<u64>());
    assert_eq!(fs::read(at("big")).unwrap(), big);
    let status = std::process::Command::new(at("bin/true")).status().unwrap();
    assert!(status.success());
    assert!(mount.stats().misses > 0, "the data started absent");
    drop((file, mount));
    fixture.assert_clean();
}

fn privileged_many_threads_read_many_files(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("threads");
    let contents: HashMap<String, Vec<u8>> = (0..64)
        .map(|number| (format!("d{}/f{number}", number % 7), pattern(number * 997)))
        .collect();
    for (path, bytes) in &contents {
        layer.file(path, bytes);
    }
    let mount = fixture.mount(&layer, &layer.data());
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                for (path, bytes) in &contents {
                    assert_eq!(fs::read(mount.path().join(path)).unwrap(), *bytes);
                }
            });
        }
    });
    drop(mount);
    fixture.assert_clean();
}

fn privileged_slow_misses_do_not_delay_warm_reads(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("slow");
    layer.file("warm", b"warm");
    for number in 0..32 {
        layer.file(&format!("cold{number}"), format!("cold{number}").as_bytes());
    }
    let data = layer.data();
    let mount = fixture.mount(&layer, &data);
    data.make_present(layer.range("warm"));
    data.hold();
    thread::scope(|scope| {
        let mount = &mount;
        let readers: Vec<_> = (0..32)
            .map(|number| {
                scope.spawn(move || fs::read(mount.path().join(format!("cold{number}"))).unwrap())
            })
            .collect();
        // More misses wait than there are threads; only then is the warm file read.
        data.wait_for_fills(32);
        assert_eq!(fs::read(mount.path().join("warm")).unwrap(), b"warm");
        assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 33);
        data.release();
        for (number, reader) in readers.into_iter().enumerate() {
            assert_eq!(reader.join().unwrap(), format!("cold{number}").into_bytes());
        }
    });
    assert_eq!(mount.stats().misses, 32);
    drop(mount);
    fixture.assert_clean();
}

fn privileged_a_failed_fill_is_an_error_once_and_not_remembered(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("failing");
    layer.file("a", b"content");
    let data = layer.data();
    let mount = fixture.mount(&layer, &data);
    data.fail_next(2);
    let read = || fs::read(mount.path().join("a"));
    // The kernel may try a page again by itself, so the second failure may be the same read.
    let error = read().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "EIO: {error}");
    data.fail_next(0);
    assert_eq!(read().unwrap(), b"content");
    drop(mount);
    fixture.assert_clean();
}

fn privileged_the_kernel_reads_as_far_ahead_as_it_is_told(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("window");
    layer.file("narrow", &pattern(1 << 20));
    layer.file("wide", &pattern(1 << 20));
    let data = layer.data();
    let mount = fixture.mount(&layer, &data);
    let mut before = 0;
    for (name, window, bytes) in [
        ("narrow", ReadAhead::Narrow, 32 << 10),
        ("wide", ReadAhead::Wide, 256 << 10),
    ] {
        mount.read_ahead(window);
        let file = File::open(mount.path().join(name)).unwrap();
        // A fault reads a whole window around it, and waits for its own page. A byte whose value
        // nobody wants need not be read.
        let first = sys::test_support::sum_by_mmap(&file, 1).unwrap();
        assert_eq!(first, u64::from(pattern(1)[0]), "{name}");
        let read = || mount.stats().read_bytes - before;
        let deadline = Instant::now() + Duration::from_secs(60);
        while read() < bytes && Instant::now() < deadline {
            thread::yield_now();
        }
        assert_eq!(read(), bytes, "{name}");
        before += bytes;
    }
    drop(mount);
    fixture.assert_clean();
}

fn privileged_what_was_warmed_is_read_without_asking(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("warmed");
    let (large, small) = (pattern(700_000), pattern(8192));
    layer.file("lib/large", &large);
    layer.file("small", &small);
    layer.file("cold", &small);
    let data = layer.data();
    let mount = fixture.mount(&layer, &data);
    mount.read_ahead(ReadAhead::Narrow);
    let part = ByteRange::at(layer.range("lib/large").start() + 65_536, 400_000).unwrap();
    let wanted = vec![part, layer.range("small")];
    let all = ByteRange::at(0, layer.tree().data_len()).unwrap();
    data.make_present(all);
    let warmer = Warmer::new(mount.path(), &layer.tree(), wanted);
    warmer.warm(&[all], || true);
    // The kernel has asked for all of it, page by page, and for nothing else.
    let pages = 400_000_u64.next_multiple_of(4096) + 8192;
    let deadline = Instant::now() + Duration::from_secs(60);
    let asked = || mount.stats().read_bytes;
    while asked() < pages && Instant::now() < deadline {
        thread::yield_now();
    }
    assert_eq!(asked(), pages);
    let reads = mount.stats().reads;
    let mut bytes = vec![0; 400_000];
    let file = File::open(mount.path().join("lib/large")).unwrap();
    file.read_exact_at(&mut bytes, 65_536).unwrap();
    assert!(bytes == large[65_536..465_536]);
    assert!(fs::read(mount.path().join("small")).unwrap() == small);
    assert_eq!(mount.stats().reads, reads);
    assert!(fs::read(mount.path().join("cold")).unwrap() == small);
    assert!(mount.stats().reads > reads);
    drop(mount);
    fixture.assert_clean();
}

fn privileged_reading_ahead_waits_for_nothing(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("ahead");
    let content = pattern(200_000);
    layer.file("a", &content);
    let data = layer.data();
    let mount = fixture.mount(&layer, &data);
    let file = File::open(mount.path().join("a")).unwrap();
    data.hold();
    thread::scope(|scope| {
        let (done, is_done) = mpsc::channel();
        let file = &file;
        scope.spawn(move || {
            sys::read_early(file, 0, 100_000).unwrap();
            done.send(()).unwrap();
        });
        data.wait_for_fills(1);
        // Long enough for any machine; what is released late would be no proof.
        let returned = is_done.recv_timeout(Duration::from_secs(60));
        data.release();
        returned.expect("the kernel reads ahead in the background");
    });
    assert_eq!(fs::read(mount.path().join("a")).unwrap(), content);
    drop((file, mount));
    fixture.assert_clean();
}

fn privileged_one_mount_per_layer_until_the_last_user_goes(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("shared");
    layer.file("a", b"a");
    let data = layer.data();
    let first = fixture.mount(&layer, &data);
    let second = fixture.mount(&layer, &data);
    assert!(Arc::ptr_eq(&first, &second));
    let path = first.path().to_path_buf();
    drop(first);
    assert_eq!(fs::read(path.join("a")).unwrap(), b"a");
    drop(second);
    assert!(!path.exists());
    let third = fixture.mount(&layer, &data);
    assert_eq!(fs::read(third.path().join("a")).unwrap(), b"a");
    let mounts = &fixture.mounts;
    thread::scope(|scope| {
        let both: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    mounts
                        .mount(layer.digest(), layer.tree(), data.clone())
                        .unwrap()
                })
            })
            .collect();
        for other in both {
            assert!(Arc::ptr_eq(&other.join().unwrap(), &third));
        }
    });
    drop(third);
    fixture.assert_clean();
}

fn privileged_unmounts_under_open_files_and_waiting_reads(backend: Backend) {
    let fixture = Fixture::new(backend);
    let mut layer = LayerBuilder::new("busy");
    layer.file("warm", b"warm");
    layer.file("cold", b"cold");
    let data = layer.data();
    let mount = fixture.mount(&layer, &data);
    data.make_present(layer.range("warm"));
    let open = File::open(mount.path().join("warm")).unwrap();
    let cold = File::open(mount.path().join("cold")).unwrap();
    data.hold();
    thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut buf = [0; 4];
            cold.read_at(&mut buf, 0).unwrap_err().raw_os_error()
        });
        data.wait_for_fills(1);
        drop(mount);
        assert_eq!(reader.join().unwrap(), Some(5), "EIO");
    });
    let mut buf = [0; 4];
    open.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(&buf, b"warm");
    drop(open);
    fixture.assert_clean();
}

/// What is mounted at a layer's path, from below.
fn types_at(path: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let lines = table
        .lines()
        .filter(|line| line.contains(path.to_str().unwrap()));
    lines
        .map(|line| {
            let rest = line.split_once(" - ").unwrap().1;
            rest.split(' ').next().unwrap().to_owned()
        })
        .collect()
}

#[test]
fn privileged_what_erofs_cannot_hold_is_served_by_fuse_unless_forbidden() {
    if !must_be_root("privileged_what_erofs_cannot_hold_is_served_by_fuse_unless_forbidden") {
        return;
    }
    let fixture = Fixture::new(Backend::Auto);
    let mut plain = LayerBuilder::new("plain");
    plain.file("a", b"plain");
    let mut odd = LayerBuilder::new("odd");
    odd.file("a", b"odd").xattrs = vec![(b"com.apple.x".to_vec(), b"v".to_vec())];
    for (layer, types, content) in [
        (&plain, &["fuse", "erofs"][..], &b"plain"[..]),
        (&odd, &["fuse"], b"odd"),
        (&plain, &["fuse", "erofs"], b"plain"),
    ] {
        let mount = fixture.mount(layer, &layer.data());
        assert_eq!(types_at(mount.path()), types);
        assert_eq!(fs::read(mount.path().join("a")).unwrap(), content);
    }
    fixture.assert_clean();
    let fixture = Fixture::new(Backend::Erofs);
    let refused = fixture.mounts.mount(odd.digest(), odd.tree(), odd.data());
    let error = refused.err().unwrap();
    assert!(error.to_string().contains("com.apple.x"), "{error}");
    fixture.assert_clean();
}

#[test]
fn privileged_where_erofs_is_refused_fuse_serves_from_then_on() {
    if !must_be_root("privileged_where_erofs_is_refused_fuse_serves_from_then_on") {
        return;
    }
    let mut layer = LayerBuilder::new("refused");
    layer.file("a", b"content");
    for backend in [Backend::Auto, Backend::Erofs] {
        let mut fixture = Fixture::new(backend);
        // The kernel takes no option as long as this path.
        let deep = fixture.dir.path().join("d".repeat(250));
        let options = FuseOptions {
            backend,
            ..FuseOptions::default()
        };
        fixture.mounts = LayerMounts::new(&deep, fixture.runtime.handle().clone(), options);
        let mounted = fixture
            .mounts
            .mount(layer.digest(), layer.tree(), layer.data());
        if backend == Backend::Auto {
            let mount = mounted.unwrap();
            assert_eq!(types_at(mount.path()), ["fuse"]);
            assert_eq!(fs::read(mount.path().join("a")).unwrap(), b"content");
        } else {
            let error = mounted.err().unwrap();
            assert!(matches!(error, crate::Error::Mount { .. }), "{error}");
        }
        fs::remove_dir(&deep).unwrap();
        fixture.assert_clean();
    }
}

fn privileged_other_users_see_what_the_modes_allow(backend: Backend) {
    let fixture = Fixture::new(backend);
    fs::set_permissions(fixture.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut layer = LayerBuilder::new("users");
    layer.file("open", b"yes").mode = 0o644;
    layer.file("closed", b"no").mode = 0o600;
    let mount = fixture.mount(&layer, &layer.data());
    let as_nobody = |name: &str| {
        use std::os::unix::process::CommandExt;
        std::process::Command::new("/bin/cat")
            .arg(mount.path().join(name))
            .uid(65_534)
            .gid(65_534)
            .output()
            .unwrap()
    };
    assert_eq!(as_nobody("open").stdout, b"yes");
    assert!(!as_nobody("closed").status.success());
    drop(mount);
    fixture.assert_clean();
}
