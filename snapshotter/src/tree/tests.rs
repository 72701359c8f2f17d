//! The tree against hand-made cases and against a simple map of paths.

mod links;
mod unlisted;

use std::collections::BTreeMap;

use lazarette_fetcher::index::{FileEntry, FileKind, LayerFormat, LayerIndex, Timestamp};
use lazarette_fetcher::test_util::content::entry;
use lazarette_fetcher::types::Digest;
use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use proptest::test_runner::{Config, FileFailurePersistence};

use super::{DEPTH_MAX, InodeRef, Kind, LINK_CHAIN_MAX, ROOT_INO, Tree};

const DATA_LEN: u64 = 1 << 20;

fn index(files: Vec<FileEntry>) -> LayerIndex {
    LayerIndex {
        blob_digest: Digest::sha256(b"a layer"),
        blob_size: 1,
        format: LayerFormat::Estargz,
        files,
        chunks: Vec::new(),
        spans: Vec::new(),
        data_len: DATA_LEN,
    }
}

pub(super) fn file(path: &str, size: u64) -> FileEntry {
    let data_offset = 0;
    entry(path, FileKind::Regular { size, data_offset })
}

fn dir(path: &str) -> FileEntry {
    entry(path, FileKind::Directory)
}

fn link(path: &str, target: &str) -> FileEntry {
    let target = target.as_bytes().to_vec();
    entry(path, FileKind::Hardlink { target })
}

pub(super) fn symlink(path: &str, target: &str) -> FileEntry {
    let target = target.as_bytes().to_vec();
    entry(path, FileKind::Symlink { target })
}

pub(super) fn build(files: Vec<FileEntry>) -> Tree {
    Tree::build(&index(files)).unwrap()
}

/// Path, letter and size.
type Row = (&'static str, char, u64);

#[track_caller]
fn assert_tree(files: Vec<FileEntry>, expected: &[Row]) {
    let expected: BTreeMap<_, _> = expected
        .iter()
        .map(|(path, letter, size)| ((*path).to_owned(), (*letter, *size)))
        .collect();
    assert_eq!(listing(&build(files)), expected);
}

fn find<'a>(tree: &'a Tree, path: &str) -> Option<InodeRef<'a>> {
    path.split('/')
        .filter(|name| !name.is_empty())
        .try_fold(tree.root(), |at, name| {
            tree.lookup(at.ino(), name.as_bytes())
        })
}

/// Every path with a letter for its kind and its size; whiteouts are `w`.
fn listing(tree: &Tree) -> BTreeMap<String, (char, u64)> {
    let mut found = BTreeMap::new();
    let mut todo = vec![(String::new(), tree.root())];
    while let Some((path, dir)) = todo.pop() {
        let mut last: Option<&[u8]> = None;
        for entry in dir.entries(0) {
            assert!(last < Some(entry.name), "sorted and unique");
            last = Some(entry.name);
            let path = format!("{path}/{}", entry.name.escape_ascii());
            let letter = match entry.inode.kind() {
                Kind::Directory { parent } => {
                    assert_eq!(parent, dir.ino());
                    todo.push((path.clone(), entry.inode));
                    'd'
                }
                Kind::Regular { .. } => 'f',
                Kind::Symlink { .. } => 'l',
                Kind::CharDevice { rdev: 0 } => 'w',
                Kind::CharDevice { .. } => 'c',
                Kind::BlockDevice { .. } => 'b',
                Kind::Fifo => 'p',
            };
            found.insert(path, (letter, entry.inode.size()));
        }
    }
    found
}

#[test]
fn an_empty_layer_has_a_root() {
    let tree = build(vec![]);
    let root = tree.root();
    assert_eq!(
        (root.ino(), root.nlink(), root.attr().mode),
        (ROOT_INO, 2, 0o755)
    );
    assert_eq!(tree.len(), 1);
    assert!(tree.get(0).is_none() && tree.get(2).is_none());
    assert!(tree.lookup(7, b"a").is_none());
}

#[test]
fn attributes_are_kept_and_parents_made_up() {
    let mut root = dir("");
    root.mode = 0o1777;
    let mut leaf = file("usr/bin/su", 1000);
    leaf.mode = 0o4755;
    (leaf.uid, leaf.gid) = (7, 8);
    leaf.mtime = Timestamp { secs: -5, nanos: 9 };
    leaf.xattrs = vec![
        (b"user.b".to_vec(), b"2".to_vec()),
        (b"user.a".to_vec(), b"1".to_vec()),
        (b"trusted.overlay.redirect".to_vec(), b"/etc".to_vec()),
    ];
    let tree = build(vec![leaf, root]);
    assert_eq!(tree.root().attr().mode, 0o1777);
    assert_eq!(tree.root().nlink(), 3);
    let usr = find(&tree, "usr").unwrap();
    assert_eq!(
        (usr.attr().mode, usr.attr().mtime),
        (0o755, Timestamp::default())
    );
    let su = find(&tree, "usr/bin/su").unwrap();
    assert_eq!(su.attr().mode, 0o4755);
    assert_eq!((su.attr().uid, su.attr().gid), (7, 8));
    assert_eq!(su.attr().mtime, Timestamp { secs: -5, nanos: 9 });
    let xattrs: Vec<_> = su.xattrs().collect();
    assert_eq!(xattrs, [(&b"user.a"[..], &b"1"[..]), (b"user.b", b"2")]);
    assert_eq!(su.xattr(b"user.c"), None);
}

#[test]
fn of_two_entries_with_one_path_the_last_wins() {
    let symlink = |path| {
        let target = b"x".to_vec();
        entry(path, FileKind::Symlink { target })
    };
    let table: [(Vec<FileEntry>, &[Row]); 6] = [
        (vec![file("a", 1), file("a", 2)], &[("/a", 'f', 2)]),
        (vec![file("a", 1), dir("a")], &[("/a", 'd', 0)]),
        (
            vec![dir("a"), file("a/b", 1), symlink("a")],
            &[("/a", 'l', 1)],
        ),
        (
            vec![dir("a"), file("a/b", 1), dir("a")],
            &[("/a", 'd', 0), ("/a/b", 'f', 1)],
        ),
        (
            vec![file("a", 1), file("a/b", 2)],
            &[("/a", 'd', 0), ("/a/b", 'f', 2)],
        ),
        (
            vec![file("a/b", 1), file("a", 2), file("a/c", 3)],
            &[("/a", 'd', 0), ("/a/c", 'f', 3)],
        ),
    ];
    for (files, expected) in table {
        assert_tree(files, expected);
    }
}

#[test]
fn a_directory_over_a_directory_updates_its_attributes() {
    let mut again = dir("a");
    again.mode = 0o700;
    let tree = build(vec![dir("a"), file("a/b", 1), again]);
    assert_eq!(find(&tree, "a").unwrap().attr().mode, 0o700);
    assert!(find(&tree, "a/b").is_some());
}

#[test]
fn hard_links_share_an_inode_whatever_the_order() {
    let tree = build(vec![
        link("z/late", "a/one"),
        file("a/one", 5),
        link("a/two", "z/late"),
        entry(
            "s",
            FileKind::Symlink {
                target: b"t".to_vec(),
            },
        ),
        link("s2", "s"),
    ]);
    let inode = find(&tree, "a/one").unwrap();
    assert_eq!((inode.nlink(), inode.size()), (3, 5));
    for path in ["a/two", "z/late"] {
        assert_eq!(find(&tree, path).unwrap().ino(), inode.ino(), "{path}");
    }
    assert_eq!(find(&tree, "s2").unwrap().nlink(), 2);
    assert_eq!(find(&tree, "a").unwrap().nlink(), 2);
    assert_eq!(tree.root().nlink(), 4);
}

#[test]
fn whiteouts_become_what_overlay_expects() {
    let tree = build(vec![
        file("etc/.wh.gone", 0),
        file("opt/.wh..wh..opq", 0),
        file("opt/new", 1),
        // Of this layer, so it stays, and hides the whole directory below.
        file("var/.wh.both", 0),
        file("var/both/kept", 1),
        file("var/.wh.file", 0),
        file("var/file", 3),
        file(".wh..wh.plnk/7.1", 4),
        link("linked", ".wh..wh.plnk/7.1"),
        // Of the longest name that there is.
        file(&format!("etc/.wh.{}", "n".repeat(255)), 0),
    ]);
    let longest = find(&tree, &format!("etc/{}", "n".repeat(255)));
    assert!(longest.unwrap().is_whiteout());
    let gone = find(&tree, "etc/gone").unwrap();
    assert!(gone.is_whiteout());
    assert_eq!(gone.attr().mode, 0);
    let opaque = |path| find(&tree, path).unwrap().xattr(b"trusted.overlay.opaque");
    assert_eq!(opaque("opt"), Some(&b"y"[..]));
    assert_eq!(opaque("var/both"), Some(&b"y"[..]));
    assert_eq!(opaque("etc"), None);
    assert_eq!(opaque("var"), None);
    assert_eq!(find(&tree, "var/file").unwrap().size(), 3);
    assert_eq!(find(&tree, "linked").unwrap().size(), 4);
    assert_eq!(find(&tree, "linked").unwrap().nlink(), 1);
    let names: Vec<_> = listing(&tree).into_keys().collect();
    assert!(names.iter().all(|name| !name.contains(".wh.")), "{names:?}");
}

#[test]
fn errors_name_the_path_and_the_rule() {
    let device = |major, minor| entry("dev/x", FileKind::CharDevice { major, minor });
    let mut nanos = file("n", 0);
    nanos.mtime.nanos = 1_000_000_000;
    let mut xattr = file("x", 0);
    xattr.xattrs = vec![(vec![b'n'; 300], vec![])];
    let mut loops = vec![link("a", "b"), link("b", "a")];
    loops.push(file("c", 1));
    let chain = (0..=LINK_CHAIN_MAX)
        .map(|n| link(&format!("l{n}"), &format!("l{}", n + 1)))
        .chain([file(&format!("l{}", LINK_CHAIN_MAX + 1), 1)])
        .collect();
    let deep = format!("{}f", "d/".repeat(DEPTH_MAX + 1));
    let table: [(Vec<FileEntry>, &str); 20] = [
        (
            vec![link("a/b", "no")],
            "/a/b: hard link to /no, which does not exist",
        ),
        (
            vec![dir("d"), link("a", "d")],
            "/a: hard link to /d, which is a directory",
        ),
        (
            vec![link("a", "a")],
            "/a: hard link to /a, which leads in a circle",
        ),
        (loops, "which leads in a circle"),
        (chain, "through too many links"),
        (
            vec![link("a", "w"), file(".wh.w", 0)],
            "which does not exist",
        ),
        (vec![file("a/../b", 1)], "/a/../b: a name is"),
        (vec![file("a/.", 1)], "/a/.: a name is"),
        (vec![file("a\0b", 1)], "/a\\x00b: a name is"),
        (
            vec![file(&"n".repeat(256), 1)],
            "a name is longer than 255 bytes",
        ),
        (vec![file(&deep, 1)], "lies deeper than 1024"),
        (
            vec![file("a", DATA_LEN + 1)],
            "/a: its content lies outside",
        ),
        (vec![device(4096, 0)], "/dev/x: Linux has no device 4096:0"),
        (vec![nanos], "/n: the modification time"),
        (vec![xattr], "/x: the name of an extended attribute"),
        (vec![file(".wh.", 0)], "/.wh.: the whiteout names no file"),
        (vec![file("a/.wh..", 0)], "/a/.wh..: a name is"),
        (vec![file("a/.wh...", 0)], "/a/.wh...: a name is"),
        (
            vec![file(&format!(".wh.{}", "n".repeat(256)), 0)],
            "a name is longer than 255 bytes",
        ),
        (
            vec![file(".wh.a/b", 0)],
            "/.wh.a/b: a whiteout has files below it",
        ),
    ];
    for (files, message) in table {
        let error = Tree::build(&index(files)).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert!(error.contains("layer sha256:"), "{error}");
    }
    let root = entry("", FileKind::Fifo);
    let error = Tree::build(&index(vec![root])).unwrap_err().to_string();
    assert!(error.contains("the root is not a directory"), "{error}");
}

#[test]
fn devices_keep_their_numbers() {
    let (major, minor) = (0xabc, 0xf_1234);
    let tree = build(vec![entry("d", FileKind::BlockDevice { major, minor })]);
    let Kind::BlockDevice { rdev } = find(&tree, "d").unwrap().kind() else {
        panic!("not a block device");
    };
    assert_eq!(rdev, 0xf12a_bc34);
}

#[test]
fn numbers_do_not_depend_on_the_order_of_entries() {
    let mut files = vec![dir("b"), file("b/x", 1), file("a/y", 2), link("c", "b/x")];
    let first = build(files.clone());
    files.reverse();
    let second = build(files);
    for path in ["a", "a/y", "b", "b/x", "c"] {
        let ino = |tree| find(tree, path).unwrap().ino();
        assert_eq!(ino(&first), ino(&second), "{path}");
    }
}

#[test]
fn an_inode_costs_little_memory() {
    let files: Vec<_> = (0..50_000)
        .map(|n| file(&format!("usr/lib/d{}/some-file-name-{n}.py", n % 500), 1))
        .collect();
    let tree = build(files);
    let bytes = tree.heap_bytes() / tree.len();
    eprintln!("{} inodes, {bytes} bytes each", tree.len());
    assert!(bytes < 160, "{bytes} bytes per inode");
}

/// What a path of the model holds.
#[derive(Debug, Clone, PartialEq)]
enum Model {
    Dir,
    File(u64),
    Whiteout,
}

/// The rules once more, over a flat map of paths, without hard links.
fn model(files: &[FileEntry]) -> BTreeMap<String, Model> {
    let mut map = BTreeMap::new();
    let mut whiteouts: Vec<String> = Vec::new();
    for entry in files {
        let path = format!("/{}", String::from_utf8(entry.path.clone()).unwrap());
        let (above, name) = path.rsplit_once('/').unwrap();
        let mut prefix = String::new();
        for part in above.split('/').filter(|part| !part.is_empty()) {
            prefix = format!("{prefix}/{part}");
            put_dir(&mut map, &prefix);
        }
        if let Some(deleted) = name.strip_prefix(".wh.") {
            whiteouts.push(format!("{above}/{deleted}"));
            continue;
        }
        match entry.kind {
            FileKind::Regular { size, .. } => {
                replace_with_file(&mut map, &mut whiteouts, &path);
                map.insert(path, Model::File(size));
            }
            _ => put_dir(&mut map, &path),
        }
    }
    for path in whiteouts {
        map.entry(path).or_insert(Model::Whiteout);
    }
    map
}

fn put_dir(map: &mut BTreeMap<String, Model>, path: &str) {
    if map.get(path) != Some(&Model::Dir) {
        map.insert(path.to_owned(), Model::Dir);
    }
}

/// A file takes the place of a directory with all that was in it, whiteouts too.
fn replace_with_file(map: &mut BTreeMap<String, Model>, whiteouts: &mut Vec<String>, path: &str) {
    let below = format!("{path}/");
    map.retain(|other, _| !other.starts_with(&below));
    whiteouts.retain(|other| !other.starts_with(&below));
}

fn entries() -> impl Strategy<Value = Vec<FileEntry>> {
    let name = prop_oneof![Just("a"), Just("b"), Just("c")];
    let path = proptest::collection::vec(name, 1..4);
    let one = (path, 0..4_u8, 0..100_u64, any::<bool>()).prop_map(|(path, kind, size, white)| {
        let mut path: Vec<String> = path.into_iter().map(str::to_owned).collect();
        if white && kind == 0 {
            let last = path.pop().unwrap();
            path.push(format!(".wh.{last}"));
        }
        let path = path.join("/");
        if kind == 1 {
            dir(&path)
        } else {
            file(&path, size)
        }
    });
    proptest::collection::vec(one, 0..24)
}

proptest! {
    #![proptest_config(Config {
        cases: 512,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..Config::default()
    })]

    #[test]
    fn agrees_with_a_map_of_paths(files in entries()) {
        let tree = build(files.clone());
        let found: BTreeMap<String, Model> = listing(&tree)
            .into_iter()
            .map(|(path, (letter, size))| (path, match letter {
                'd' => Model::Dir,
                'w' => Model::Whiteout,
                _ => Model::File(size),
            }))
            .collect();
        proptest::prop_assert_eq!(&found, &model(&files));
        proptest::prop_assert_eq!(tree.len(), found.len() + 1);
        for (path, kind) in &found {
            let inode = find(&tree, path).unwrap();
            if *kind == Model::Dir {
                let subdirectories = found
                    .iter()
                    .filter(|(other, kind)| {
                        **kind == Model::Dir && other.rsplit_once('/').map(|at| at.0) == Some(path)
                    })
                    .count();
                proptest::prop_assert_eq!(inode.nlink() as usize, 2 + subdirectories);
            }
        }
    }
}
