//! What others make of our images: fsck.erofs, and the kernel that mounts them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use lazarette_fetcher::index::{FileKind, Timestamp};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::reader::{self, Body, Facts};
use super::{entry, everything, image_for, image_of, regular, tree};
use crate::erofs::Devices;
use crate::sys::{self, FsContext, test_support};
use crate::test_util::{LayerBuilder, must_be_root};
use crate::tree::Tree;

/// What [`Files`] has, and of how many devices: `laz run` mounts the one, the mount server the
/// other.
const IMAGES: [(&str, usize); 2] = [("image", 1), ("two", 2)];
/// Inodes of a layer that is large, as Debian's with Python is: directories of many blocks.
const LARGE: u32 = 35_000;

/// Both images and their data file, on a disk: the kernel takes none from a tmpfs.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new(tree: &Tree, data: &[u8]) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::write(dir.path().join("image"), image_of(tree)).unwrap();
        let two = image_for(tree, Devices::SmallApart);
        fs::write(dir.path().join("two"), two).unwrap();
        let file = File::create(dir.path().join("data")).unwrap();
        file.write_all_at(data, 0).unwrap();
        file.set_len(tree.data_len().next_multiple_of(4096))
            .unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Has fsck.erofs look at each image; `layer` is told where it finds something.
    fn fsck(&self, layer: &str) {
        for (image, devices) in IMAGES {
            let device = format!("--device={}", self.path("data").display());
            let output = Command::new("fsck.erofs")
                .args(std::iter::repeat_n(&device, devices))
                // Reads all contents, too.
                .arg("--extract")
                .arg(self.path(image))
                .output()
                .expect("fsck.erofs is in Debian's erofs-utils; make test installs it");
            assert!(output.status.success(), "{layer}, {image}: {output:?}");
        }
    }

    fn mount(&self) -> Mounted {
        self.mount_of("image", 1)
    }

    fn mount_of(&self, image: &str, devices: usize) -> Mounted {
        let at = self.path(&format!("mount-{image}"));
        fs::create_dir(&at).unwrap();
        let context = FsContext::open("erofs").unwrap();
        context.set("source", &self.path(image)).unwrap();
        for _ in 0..devices {
            context.set("device", &self.path("data")).unwrap();
        }
        let mount = context.create(true).unwrap_or_else(|error| {
            panic!("{error}: {}", context.log());
        });
        sys::attach(&mount, &at).unwrap();
        Mounted(at)
    }
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Another test may be starting a program that has our files open until it runs.
        sys::detach(&self.0).unwrap();
    }
}

impl Mounted {
    fn at(&self, path: &[u8]) -> PathBuf {
        self.0
            .join(OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path)))
    }
}

/// Compares everything that system calls say with the tree; contents with `data`.
fn assert_shows(mounted: &Mounted, tree: &Tree, data: &[u8]) {
    let view = reader::of_tree(tree);
    let mut inodes = std::collections::HashMap::new();
    for (path, facts) in &view {
        let at = mounted.at(path);
        let stat = fs::symlink_metadata(&at).unwrap();
        assert_eq!(stat.mode(), u32::from(facts.mode), "{at:?}");
        assert_eq!((stat.uid(), stat.gid()), facts.owner, "{at:?}");
        let Timestamp { secs, nanos } = facts.mtime;
        assert_eq!(
            (stat.mtime(), stat.mtime_nsec()),
            (secs, nanos.into()),
            "{at:?}"
        );
        assert_eq!(stat.nlink(), u64::from(facts.nlink), "{at:?}");
        assert_eq!(stat.blksize(), 4096);
        assert_eq!(
            *inodes.entry(facts.ino).or_insert(stat.ino()),
            stat.ino(),
            "{at:?}"
        );
        for (name, value) in &facts.xattrs {
            let name = str::from_utf8(name).unwrap();
            assert_eq!(
                test_support::get_xattr(&at, name).unwrap(),
                *value,
                "{at:?} {name}"
            );
        }
        let names = test_support::list_xattrs(&at).unwrap();
        assert_eq!(names.len(), facts.xattrs.len(), "{at:?}: {names:?}");
        assert_body(&at, &stat, facts, data);
        if facts.body == Body::Directory {
            let prefix = [&path[..], b"/"].concat();
            let expected = view
                .keys()
                .filter_map(|path| path.strip_prefix(&prefix[..]));
            let expected: Vec<_> = expected.filter(|name| !name.contains(&b'/')).collect();
            let listed = fs::read_dir(&at).unwrap();
            let mut names: Vec<_> = listed.map(|name| name.unwrap().file_name()).collect();
            names.sort();
            let names: Vec<_> = names.iter().map(|name| name.as_bytes()).collect();
            assert_eq!(names, expected, "{at:?}");
        }
    }
}

fn assert_body(at: &Path, stat: &fs::Metadata, facts: &Facts, data: &[u8]) {
    match &facts.body {
        Body::Directory | Body::Fifo => {}
        Body::Empty => assert_eq!(stat.size(), 0),
        Body::Data { start, size } => {
            let (start, size) = (
                usize::try_from(*start).unwrap(),
                usize::try_from(*size).unwrap(),
            );
            assert!(fs::read(at).unwrap() == data[start..start + size], "{at:?}");
        }
        Body::Symlink(target) => {
            assert_eq!(fs::read_link(at).unwrap().as_os_str().as_bytes(), target);
            assert_eq!(stat.size(), target.len() as u64);
        }
        Body::Device(rdev) => {
            let (major, minor) = (rdev >> 8 & 0xfff, rdev & 0xff | rdev >> 12 & !0xff);
            let expected = (u64::from(major), u64::from(minor));
            assert_eq!(sys::split_dev(stat.rdev()), expected, "{at:?}");
        }
    }
}

/// A layer of some hundred files of every kind that `seed` stands for.
fn random(seed: u64) -> LayerBuilder {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut layer = LayerBuilder::new("random");
    let mut files: Vec<String> = Vec::new();
    for number in 0..rng.random_range(0..400) {
        let padding = "p".repeat(rng.random_range(0..240));
        let path = format!(
            "d{}/e{}/{number}{padding}",
            number % 3,
            rng.random_range(0..5)
        );
        let entry = match rng.random_range(0..10) {
            0 => {
                let target = "t".repeat(rng.random_range(1..4096));
                layer.symlink(&path, &target);
                continue;
            }
            1 if !files.is_empty() => {
                let target = files[rng.random_range(0..files.len())].clone();
                layer.link(&path, &target);
                continue;
            }
            2 => layer.dir(&path),
            3 => layer.add(&path, FileKind::CharDevice { major: 0, minor: 0 }),
            4 => layer.add(
                &path,
                FileKind::BlockDevice {
                    major: 8,
                    minor: number,
                },
            ),
            5 => layer.add(&path, FileKind::Fifo),
            _ => {
                let size = [0, 1, 4095, 4096, 4097, 60_000][rng.random_range(0..6)];
                let bytes: Vec<u8> = (0..size).map(|_| rng.random()).collect();
                files.push(path.clone());
                layer.file(&path, &bytes)
            }
        };
        entry.mode = rng.random_range(0..0o10_000);
        (entry.uid, entry.gid) = (rng.random_range(0..100_000), rng.random_range(0..100_000));
        entry.mtime = Timestamp {
            secs: rng.random_range(-10_000_000_000..10_000_000_000),
            nanos: rng.random_range(0..1_000_000_000),
        };
        for number in 0..rng.random_range(0..3) {
            let value = vec![b'v'; rng.random_range(0..2) * rng.random_range(0..3000)];
            entry
                .xattrs
                .push((format!("trusted.{number}").into_bytes(), value));
        }
    }
    layer
}

/// A layer of many inodes, of which one directory has a half.
fn large() -> LayerBuilder {
    let mut layer = LayerBuilder::new("large");
    for number in 0..LARGE / 2 {
        let text = number.to_string();
        layer.file(&format!("crowd/file-{number}"), text.as_bytes());
        let file = layer.file(&format!("d{}/e{}/{number}", number % 300, number % 7), b"");
        file.xattrs = vec![(b"user.number".to_vec(), text.into_bytes())];
    }
    layer
}

#[test]
fn fsck_finds_nothing_wrong() {
    let check = |name: &str, layer: LayerBuilder| {
        Files::new(&layer.tree(), &layer.bytes()).fsck(name);
    };
    check("everything", everything());
    check("empty", LayerBuilder::new("empty"));
    check("large", large());
    // Some that it has always been, and as many that nobody has seen.
    for seed in (1..9).chain(std::iter::repeat_with(rand::random).take(8)) {
        check(&format!("random({seed})"), random(seed));
    }
}

#[test]
fn fsck_sees_what_is_wrong_with_either_image() {
    let layer = everything();
    let files = Files::new(&layer.tree(), &layer.bytes());
    for (image, _) in IMAGES {
        let right = fs::read(files.path(image)).unwrap();
        let mut wrong = right.clone();
        // The root's inode.
        wrong[4096..4128].fill(0xff);
        fs::write(files.path(image), wrong).unwrap();
        let found = std::panic::catch_unwind(|| files.fsck("everything"));
        assert!(found.is_err(), "{image}");
        fs::write(files.path(image), right).unwrap();
    }
}

#[test]
fn privileged_the_kernel_shows_what_the_tree_says() {
    if !must_be_root("privileged_the_kernel_shows_what_the_tree_says") {
        return;
    }
    let layers = [everything(), LayerBuilder::new("empty")];
    for layer in layers.into_iter().chain((3..15).map(random)) {
        let (tree, data) = (layer.tree(), layer.bytes());
        let files = Files::new(&tree, &data);
        for (image, devices) in IMAGES {
            let mounted = files.mount_of(image, devices);
            assert_shows(&mounted, &tree, &data);
        }
    }
}

#[test]
fn privileged_the_kernel_refuses_an_image_with_a_flipped_bit() {
    if !must_be_root("privileged_the_kernel_refuses_an_image_with_a_flipped_bit") {
        return;
    }
    let layer = everything();
    let files = Files::new(&layer.tree(), &layer.bytes());
    let mut image = fs::read(files.path("image")).unwrap();
    image[1100] ^= 1;
    fs::write(files.path("image"), image).unwrap();
    let context = FsContext::open("erofs").unwrap();
    context.set("source", &files.path("image")).unwrap();
    context.set("device", &files.path("data")).unwrap();
    let error = context.create(true).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(74), "EBADMSG: {error}");
}

#[test]
fn privileged_files_of_terabytes_have_two_chunks() {
    if !must_be_root("privileged_files_of_terabytes_have_two_chunks") {
        return;
    }
    const SIZE: u64 = (9 << 40) + 5;
    let after = SIZE.next_multiple_of(4096);
    let files = vec![
        entry("huge", regular(0, SIZE)),
        entry("after", regular(after, 5)),
    ];
    let tree = tree(files, after + 5);
    let files = Files::new(&tree, b"begin");
    let data = File::options()
        .write(true)
        .open(files.path("data"))
        .unwrap();
    for (at, bytes) in [(8 << 40, b"chunk"), (SIZE - 5, b"final"), (after, b"after")] {
        data.write_all_at(bytes, at).unwrap();
    }
    let mounted = files.mount();
    let read = |name: &str, at: u64| {
        let mut bytes = [0; 5];
        let file = File::open(mounted.0.join(name)).unwrap();
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    assert_eq!(&read("huge", 0), b"begin");
    assert_eq!(&read("huge", 8 << 40), b"chunk");
    assert_eq!(&read("huge", SIZE - 5), b"final");
    assert_eq!(&read("after", 0), b"after");
}
