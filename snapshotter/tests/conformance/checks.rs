//! What holds of every backend.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::bed::Bed;
use crate::{layer, sys};

/// A check, and what it is of.
type Check = (&'static str, fn(&Bed));

/// All of them; each begins with a layer of which nothing is on the disk.
pub(crate) const ALL: [Check; 12] = [
    ("names and attributes", names_and_attributes),
    ("bytes by read", bytes_by_read),
    ("bytes by pread, backwards", bytes_backwards),
    ("bytes by mmap", bytes_by_mmap),
    ("bytes by copy_file_range", bytes_by_copy),
    ("what is read ahead", bytes_ahead),
    ("programs", programs),
    ("many threads", many_threads),
    ("under an overlay", under_an_overlay),
    ("past the page cache", past_the_page_cache),
    ("names that are not", names_that_are_not),
    ("hard links", hard_links),
];

/// Everything in a directory, whole paths, sorted.
fn walk(root: &Path) -> Vec<PathBuf> {
    let (mut all, mut todo) = (vec![root.to_path_buf()], vec![root.to_path_buf()]);
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            }
            all.push(entry.path());
        }
    }
    all.sort();
    all
}

fn names_and_attributes(bed: &Bed) {
    let tree = bed.origin.join("tree");
    let (shown, origin) = (walk(&bed.path()), walk(&tree));
    let names = |all: &[PathBuf], root: &Path| {
        let names = all.iter().map(|path| path.strip_prefix(root).unwrap());
        names.map(Path::to_path_buf).collect::<Vec<_>>()
    };
    assert_eq!(names(&shown, &bed.path()), names(&origin, &tree));
    for (shown, origin) in shown.iter().zip(&origin).skip(1) {
        let (a, b) = (shown, origin);
        let (a, b) = [a, b]
            .map(|path| fs::symlink_metadata(path).unwrap())
            .into();
        assert_eq!(a.mode(), b.mode(), "{origin:?}");
        assert_eq!((a.uid(), a.gid()), (b.uid(), b.gid()), "{origin:?}");
        assert_eq!(a.mtime(), b.mtime(), "{origin:?}");
        assert_eq!(a.rdev(), b.rdev(), "{origin:?}");
        if !a.is_dir() {
            assert_eq!((a.len(), a.nlink()), (b.len(), b.nlink()), "{origin:?}");
        }
        if a.is_symlink() {
            let targets = [shown, origin].map(|path| fs::read_link(path).unwrap());
            assert_eq!(targets[0], targets[1]);
        }
        assert_eq!(sys::xattrs(shown), sys::xattrs(origin), "{origin:?}");
    }
}

/// Compares without printing megabytes.
#[track_caller]
pub(crate) fn assert_same(read: &[u8], origin: &[u8], name: &str) {
    let differ = read.iter().zip(origin).position(|(a, b)| a != b);
    let zeros = read.iter().filter(|byte| **byte == 0).count();
    let len = (read.len(), origin.len());
    assert!(
        read == origin,
        "{name}: differs at {differ:?}, {zeros} zeros, lengths {len:?}"
    );
}

fn bytes_by_read(bed: &Bed) {
    for name in layer::files(&bed.origin) {
        let origin = layer::content(&bed.origin, &name);
        let path = bed.path().join(&name);
        assert_same(&fs::read(&path).unwrap(), &origin, &name);
        assert_same(&layer::read_anew(&path).unwrap(), &origin, &name);
    }
}

fn bytes_backwards(bed: &Bed) {
    for name in layer::files(&bed.origin) {
        let origin = layer::content(&bed.origin, &name);
        let file = File::open(bed.path().join(&name)).unwrap();
        let mut piece = vec![0; 9001];
        let mut end = origin.len();
        let beyond = file.read_at(&mut piece, end as u64).unwrap();
        assert_eq!(beyond, 0, "{name} ends where it ends");
        while end > 0 {
            let start = end.saturating_sub(piece.len());
            let piece = &mut piece[..end - start];
            file.read_exact_at(piece, start as u64).unwrap();
            assert_same(piece, &origin[start..end], &name);
            end = start;
        }
    }
}

fn bytes_by_mmap(bed: &Bed) {
    for name in layer::files(&bed.origin) {
        let mut origin = layer::content(&bed.origin, &name);
        origin.resize(origin.len().next_multiple_of(4096), 0);
        let file = File::open(bed.path().join(&name)).unwrap();
        assert_same(&sys::read_mapped(&file), &origin, &name);
    }
}

fn bytes_by_copy(bed: &Bed) {
    let to = bed.scratch("copies").join("copy");
    for name in layer::files(&bed.origin) {
        fs::copy(bed.path().join(&name), &to).unwrap();
        let origin = layer::content(&bed.origin, &name);
        assert_same(&fs::read(&to).unwrap(), &origin, &name);
        fs::remove_file(&to).unwrap();
    }
}

fn bytes_ahead(bed: &Bed) {
    for name in layer::files(&bed.origin) {
        let mut file = File::open(bed.path().join(&name)).unwrap();
        sys::read_soon(&file);
        let mut read = Vec::new();
        file.read_to_end(&mut read).unwrap();
        assert_same(&read, &layer::content(&bed.origin, &name), &name);
    }
}

fn programs(bed: &Bed) {
    says_hello(&bed.path().join(layer::ECHO));
}

fn says_hello(program: &Path) {
    let said = Command::new(program).arg("hello").output().unwrap();
    assert_eq!(said.stdout, b"hello\n");
}

fn many_threads(bed: &Bed) {
    let names = layer::files(&bed.origin);
    let read = |seed| {
        let mut rng = StdRng::seed_from_u64(seed);
        for _ in 0..60 {
            let name = &names[rng.random_range(0..names.len())];
            let origin = layer::content(&bed.origin, name);
            let file = File::open(bed.path().join(name)).unwrap();
            if rng.random_bool(0.2) {
                sys::forget(&file);
            }
            let start = rng.random_range(0..=origin.len());
            let end = (start + rng.random_range(0..200_000)).min(origin.len());
            let mut piece = vec![0; end - start];
            file.read_exact_at(&mut piece, start as u64).unwrap();
            assert_same(&piece, &origin[start..end], name);
        }
    };
    std::thread::scope(|threads| {
        for seed in 0..12 {
            threads.spawn(move || read(seed));
        }
    });
}

fn under_an_overlay(bed: &Bed) {
    let [upper, work, merged] = ["upper", "work", "merged"].map(|name| bed.scratch(name));
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        text(&bed.path()),
        text(&upper),
        text(&work)
    );
    sys::mount_overlay(&merged, &options);
    says_hello(&merged.join(layer::ECHO));
    // Copied up whole, though nothing of it was read.
    let name = layer::fresh(0);
    let mut origin = layer::content(&bed.origin, &name);
    let opened = File::options().append(true).open(merged.join(&name));
    opened.unwrap().write_all(b"more").unwrap();
    origin.extend(b"more");
    assert_same(&fs::read(merged.join(&name)).unwrap(), &origin, &name);
    fs::remove_file(merged.join(layer::fresh(1))).unwrap();
    assert!(!merged.join(layer::fresh(1)).exists());
    for name in layer::files(&bed.origin).iter().skip(2) {
        let origin = layer::content(&bed.origin, name);
        if name.starts_with("fresh/") && !merged.join(name).exists() {
            continue;
        }
        let shown = fs::read(merged.join(name)).unwrap();
        if *name != layer::fresh(0) {
            assert_same(&shown, &origin, name);
        }
        assert_same(&fs::read(bed.path().join(name)).unwrap(), &origin, name);
    }
    sys::unmount(&merged);
}

fn past_the_page_cache(bed: &Bed) {
    let name = "sizes/300000";
    let mut options = File::options();
    let opened = options
        .read(true)
        .custom_flags(sys::DIRECT)
        .open(bed.path().join(name));
    if bed.shows.is_erofs() {
        let error = opened.expect_err("no file of an erofs is read so");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        return;
    }
    let origin = layer::content(&bed.origin, name);
    let mut read = vec![0; 8192];
    let mut file = opened.unwrap();
    file.seek(std::io::SeekFrom::Start(4096)).unwrap();
    file.read_exact(&mut read).unwrap();
    assert_same(&read, &origin[4096..12_288], name);
}

fn names_that_are_not(bed: &Bed) {
    let table = [
        ("absent".to_owned(), ErrorKind::NotFound),
        ("sizes/absent".to_owned(), ErrorKind::NotFound),
        ("sizes/1/below".to_owned(), ErrorKind::NotADirectory),
        ("n".repeat(256), ErrorKind::InvalidFilename),
    ];
    for _ in 0..2 {
        for (name, expected) in &table {
            let error = fs::symlink_metadata(bed.path().join(name)).unwrap_err();
            assert_eq!(error.kind(), *expected, "{name}");
        }
    }
    let written = fs::write(bed.path().join("sizes/1"), "x").unwrap_err();
    assert_eq!(written.kind(), ErrorKind::ReadOnlyFilesystem);
}

fn hard_links(bed: &Bed) {
    let both = ["sizes/70001", "kinds/linked"].map(|name| bed.path().join(name));
    let inodes = both
        .each_ref()
        .map(|path| fs::metadata(path).unwrap().ino());
    assert_eq!(inodes[0], inodes[1]);
    let origin = layer::content(&bed.origin, "sizes/70001");
    for path in both {
        assert_same(&fs::read(path).unwrap(), &origin, "a hard link");
    }
}
