//! Images against the trees they were made of: read back here, checked by fsck.erofs and
//! mounted by the kernel.

mod kernel;
mod reader;

use lazarette_fetcher::index::{FileEntry, FileKind, LayerFormat, LayerIndex, Timestamp};
use lazarette_fetcher::test_util::content::entry;
use lazarette_fetcher::types::Digest;
use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use proptest::test_runner::{Config, FileFailurePersistence};

use super::{Devices, Image, Unfit};
use crate::test_util::LayerBuilder;
use crate::tree::Tree;

pub(super) fn image_of(tree: &Tree) -> Vec<u8> {
    image_for(tree, Devices::One)
}

pub(super) fn image_for(tree: &Tree, devices: Devices) -> Vec<u8> {
    let image = Image::of(tree).unwrap().for_devices(devices);
    let mut bytes = Vec::new();
    image.write_to(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, image.image_len());
    bytes
}

fn tree(files: Vec<FileEntry>, data_len: u64) -> Tree {
    Tree::build(&LayerIndex {
        blob_digest: Digest::sha256(b"a layer"),
        blob_size: 1,
        format: LayerFormat::Estargz,
        files,
        chunks: Vec::new(),
        spans: Vec::new(),
        data_len,
    })
    .unwrap()
}

fn regular(data_offset: u64, size: u64) -> FileKind {
    FileKind::Regular { size, data_offset }
}

/// Everything the format has a form for, once at least.
fn everything() -> LayerBuilder {
    let mut layer = LayerBuilder::new("everything");
    layer.file("bin/tool", b"#!/bin/sh\n").mode = 0o4755;
    layer.file("empty", b"");
    let old = layer.file("old", &[7; 5000]);
    (old.uid, old.gid) = (3_000_000, 4_000_000_000);
    old.mtime = Timestamp {
        secs: -2,
        nanos: 250_000_001,
    };
    layer.link("bin/tool2", "bin/tool");
    layer.symlink("short", "bin/tool");
    layer.symlink("long", &"x/".repeat(2047));
    let (major, minor) = (259, 70_000);
    layer.add("disk", FileKind::BlockDevice { major, minor });
    layer.add("tty", FileKind::CharDevice { major: 5, minor: 1 });
    layer.add("pipe", FileKind::Fifo);
    layer.file("gone/.wh.old", b"");
    layer.file(&format!("gone/.wh.{}", "n".repeat(255)), b"");
    layer.file("opaque/.wh..wh..opq", b"");
    layer.file("opaque2/.wh..wh..opq", b"");
    // Names that sort before and around the dots.
    for name in ["!", "-", ".a", "..", "...", "+", "~"] {
        if name != ".." {
            layer.file(&format!("dots/{name}"), name.as_bytes());
        }
    }
    layer.file(&format!("names/{}", "n".repeat(255)), b"long");
    for number in 0..1000 {
        layer.file(&format!("many/file-{number:05}"), b"");
    }
    for name in ["a", "b", "c"] {
        layer.file(&format!("x/{name}"), name.as_bytes()).xattrs = vec![
            (b"user.same".to_vec(), vec![b's'; 100]),
            (b"user.own".to_vec(), name.as_bytes().to_vec()),
            (b"trusted.large".to_vec(), name.repeat(5000).into_bytes()),
        ];
    }
    layer
}

#[test]
fn an_image_says_what_its_tree_says() {
    let tree = everything().tree();
    let image = image_of(&tree);
    assert_eq!(reader::of_image(&image), reader::of_tree(&tree));
    assert_eq!(image, image_of(&tree));
    let two = image_for(&tree, Devices::SmallApart);
    assert_eq!(reader::of_image(&two), reader::of_tree(&tree));
    assert_eq!(two.len(), image.len());
    assert_ne!(two, image);
    let empty = LayerBuilder::new("empty").tree();
    assert_eq!(reader::of_image(&image_of(&empty)), reader::of_tree(&empty));
}

#[test]
fn the_format_does_not_change_unseen() {
    let image = image_of(&everything().tree());
    assert_eq!(
        Digest::sha256(&image).to_string(),
        "sha256:b4f7dba03d61d89e0786953abb99c544708d14ea2d8d155fabd8aa67b63e2073"
    );
}

#[test]
fn what_is_often_the_same_is_written_once() {
    let mut layer = LayerBuilder::new("shared");
    let value = [b'v'; 1000];
    for number in 0..100 {
        layer.file(&format!("f{number}"), b"").xattrs =
            vec![(b"user.same".to_vec(), value.to_vec())];
    }
    let tree = layer.tree();
    let image = image_of(&tree);
    let copies = image.windows(1000).filter(|bytes| *bytes == value).count();
    assert_eq!(copies, 1);
    assert_eq!(reader::of_image(&image), reader::of_tree(&tree));
}

#[test]
fn what_the_format_cannot_hold_is_refused() {
    let with_xattrs = |xattrs: Vec<(Vec<u8>, Vec<u8>)>| {
        let mut file = entry("file", regular(0, 0));
        file.xattrs = xattrs;
        tree(vec![file], 0)
    };
    let xattr = |name: &str, len: usize| (name.as_bytes().to_vec(), vec![0; len]);
    let limit = |what: &'static str, value, max| Unfit::Limit { what, value, max };
    let unnamed = |name: &str| Unfit::XattrName {
        ino: 2,
        name: name.to_owned(),
    };
    let many = (0..5).map(|number| xattr(&format!("user.{number}"), 60_000));
    for (tree, refusal) in [
        (
            tree(vec![entry("file", regular(4097, 5))], 8192),
            Unfit::Unaligned {
                ino: 2,
                data_offset: 4097,
            },
        ),
        (with_xattrs(vec![xattr("com.x", 1)]), unnamed("com.x")),
        (with_xattrs(vec![xattr("user.", 1)]), unnamed("user.")),
        (
            with_xattrs(vec![xattr("user.a", 65_536)]),
            limit("the length of an extended attribute", 65_536, 65_535),
        ),
        (
            with_xattrs(many.collect()),
            limit(
                "the length of one file's extended attributes",
                12 + 5 * 60_008,
                262_148,
            ),
        ),
        (
            tree(vec![entry("file", regular(0, 1 << 44))], 1 << 44),
            limit(
                "the number of blocks of the data file",
                1 << 32,
                (1 << 32) - 2,
            ),
        ),
    ] {
        assert_eq!(Image::of(&tree).unwrap_err(), refusal);
    }
    // What lies just inside.
    for tree in [
        with_xattrs(vec![xattr("user.a", 65_535)]),
        tree(
            vec![entry("f", regular(0, (1 << 44) - 8192))],
            (1 << 44) - 8192,
        ),
        // Empty files have no place.
        tree(vec![entry("file", regular(4097, 0))], 0),
    ] {
        assert_eq!(reader::of_image(&image_of(&tree)), reader::of_tree(&tree));
    }
}

#[test]
fn a_failing_writer_is_an_error() {
    struct Full(usize);
    impl std::io::Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let len = bytes.len().min(self.0);
            self.0 -= len;
            Ok(len)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let tree = everything().tree();
    let image = Image::of(&tree).unwrap();
    let len = usize::try_from(image.image_len()).unwrap();
    image.write_to(Full(len)).unwrap();
    let error = image.write_to(Full(len - 1)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WriteZero);
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => vec(b'a'..=b'd', 1..3),
        2 => vec(any::<u8>().prop_filter("no name has it", |c| !b"/\0".contains(c)), 1..20)
            .prop_filter("reserved", |n| n != b"." && n != b".." && !n.starts_with(b".wh.")),
        1 => (240..=255_usize, b'e'..=b'z').prop_map(|(len, c)| vec![c; len]),
    ]
}

fn kind() -> impl Strategy<Value = FileKind> {
    let size = prop_oneof![Just(0), 1..10_000_u64, 1 << 20..1_u64 << 43];
    prop_oneof![
        2 => Just(FileKind::Directory),
        4 => (0..1_u64 << 31, size).prop_map(|(block, size)| regular(block * 4096, size)),
        2 => vec(b'a'..=b'z', 1..200).prop_map(|target| FileKind::Symlink { target }),
        1 => vec(b'a'..=b'z', 3900..=4095).prop_map(|target| FileKind::Symlink { target }),
        1 => (0..4096_u32, 0..1_u32 << 20)
            .prop_map(|(major, minor)| FileKind::CharDevice { major, minor }),
        1 => (0..4096_u32, 0..1_u32 << 20)
            .prop_map(|(major, minor)| FileKind::BlockDevice { major, minor }),
        1 => Just(FileKind::Fifo),
    ]
}

fn xattrs() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
    let name = prop_oneof![
        Just("user.a"),
        Just("user.longer-name"),
        Just("trusted.x"),
        Just("security.capability"),
        Just("system.posix_acl_access"),
        Just("system.posix_acl_default"),
    ];
    let value = prop_oneof![
        Just(Vec::new()),
        vec(0..3_u8, 1..4),
        Just(vec![9; 300]),
        vec(any::<u8>(), 0..6000),
    ];
    proptest::collection::btree_map(name, value, 0..4).prop_map(|set| {
        set.into_iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value))
            .collect()
    })
}

fn file() -> impl Strategy<Value = FileEntry> {
    let path = vec(name(), 1..4).prop_map(|names| names.join(&b'/'));
    let times = (any::<i64>(), 0..1_000_000_000_u32);
    let numbers = (0..0o10_000_u16, any::<u32>(), any::<u32>());
    (path, kind(), numbers, times, xattrs()).prop_map(|(path, kind, numbers, times, xattrs)| {
        let (mode, uid, gid) = numbers;
        let (secs, nanos) = times;
        FileEntry {
            path,
            kind,
            mode,
            uid,
            gid,
            mtime: Timestamp { secs, nanos },
            xattrs,
        }
    })
}

proptest! {
    #![proptest_config(Config {
        cases: 256,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..Config::default()
    })]

    #[test]
    fn any_tree_comes_back(
        mut files in vec(file(), 0..60),
        links in vec((name(), 0..60_usize), 0..4),
        crowd in 0..400_usize,
    ) {
        // What lies below a symbolic link would be where that leads, in the way of others.
        let below: Vec<_> = (files.iter())
            .filter(|file| matches!(file.kind, FileKind::Symlink { .. }))
            .map(|file| [&file.path[..], b"/"].concat())
            .collect();
        files.retain(|file| !below.iter().any(|dir| file.path.starts_with(dir)));
        // Names that stay what they are, whatever else is placed.
        let under = |path: &[u8], other: &[u8]| path.starts_with(other) || other.starts_with(path);
        let targets: Vec<_> = (files.iter().enumerate())
            .filter(|(_, file)| file.kind != FileKind::Directory)
            .filter(|(at, file)| {
                let mut others = files.iter().enumerate().filter(|(other, _)| other != at);
                !others.any(|(_, other)| under(&file.path, &other.path))
            })
            .map(|(_, file)| file.path.clone())
            .collect();
        for (name, at) in links {
            if let Some(target) = targets.get(at) {
                let path = [b"links/", &name[..]].concat();
                files.push(entry(path, FileKind::Hardlink { target: target.clone() }));
            }
        }
        // Directories about as long as blocks.
        for number in 0..crowd {
            files.push(entry(format!("crowd/{number:0width$}", width = 3 + crowd % 40), regular(0, 0)));
        }
        let tree = tree(files, (1 << 44) - 8192);
        for devices in [Devices::One, Devices::SmallApart] {
            let image = image_for(&tree, devices);
            proptest::prop_assert_eq!(reader::of_image(&image), reader::of_tree(&tree), "{:?}", devices);
        }
    }
}
