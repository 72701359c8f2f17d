//! Entries below symbolic links of their own layer go where docker and containerd unpack
//! them to.

use lazarette_fetcher::index::LayerBlob;

use super::*;

#[test]
fn entries_go_where_earlier_links_lead() {
    // What does not exist is made.
    assert_tree(
        vec![symlink("lib", "usr/lib"), file("lib/x", 1)],
        &[
            ("/lib", 'l', 7),
            ("/usr", 'd', 0),
            ("/usr/lib", 'd', 0),
            ("/usr/lib/x", 'f', 1),
        ],
    );
    // From the link's own directory, and through links to links.
    assert_tree(
        vec![
            symlink("a/l", "../b"),
            symlink("b", "./c/"),
            dir("a/l/d"),
            file("a/l/d/x", 1),
        ],
        &[
            ("/a", 'd', 0),
            ("/a/l", 'l', 4),
            ("/b", 'l', 4),
            ("/c", 'd', 0),
            ("/c/d", 'd', 0),
            ("/c/d/x", 'f', 1),
        ],
    );
    // Never above the root, and what `..` leaves again is not made.
    assert_tree(
        vec![symlink("a/l", "/../../b/no/../c"), file("a/l/x", 1)],
        &[
            ("/a", 'd', 0),
            ("/a/l", 'l', 16),
            ("/b", 'd', 0),
            ("/b/c", 'd', 0),
            ("/b/c/x", 'f', 1),
        ],
    );
    assert_tree(
        vec![symlink("l", ".."), file("l/x", 1)],
        &[("/l", 'l', 2), ("/x", 'f', 1)],
    );
    // A file in the way gives way, as it does without a link.
    assert_tree(
        vec![symlink("l", "f"), file("f", 1), file("l/x", 2)],
        &[("/l", 'l', 1), ("/f", 'd', 0), ("/f/x", 'f', 2)],
    );
}

#[test]
fn a_link_is_replaced_only_by_its_own_name() {
    assert_tree(
        vec![file("lib/x", 1), symlink("lib", "usr")],
        &[("/lib", 'l', 3)],
    );
    assert_tree(
        vec![symlink("lib", "usr"), dir("lib"), file("lib/x", 1)],
        &[("/lib", 'd', 0), ("/lib/x", 'f', 1)],
    );
    assert_tree(
        vec![
            symlink("lib", "usr"),
            symlink("lib/l", "x"),
            file("lib/l", 1),
        ],
        &[("/lib", 'l', 3), ("/usr", 'd', 0), ("/usr/l", 'f', 1)],
    );
}

#[test]
fn whiteouts_and_hard_links_see_the_same_links() {
    // By the rules of an index, too, which leaves such links to the tree.
    let files = vec![
        symlink("lib", "usr/lib"),
        file("lib/x", 0),
        file("lib/.wh.gone", 0),
        file("lib/d/.wh..wh..opq", 0),
        link("top", "lib/x"),
        link("lib/y", "lib/x"),
        link("z", "usr/lib/y"),
    ];
    let blob = LayerBlob {
        digest: Digest::sha256(b"a layer"),
        size: 1,
        format: LayerFormat::Estargz,
    };
    let index = LayerIndex::new(blob, files, Vec::new()).unwrap();
    let tree = Tree::build(&index).unwrap();
    assert!(find(&tree, "usr/lib/gone").unwrap().is_whiteout());
    let opaque = find(&tree, "usr/lib/d").unwrap();
    assert!(opaque.xattr(b"trusted.overlay.opaque").is_some());
    let one = find(&tree, "usr/lib/x").unwrap();
    assert_eq!((one.nlink(), one.size()), (4, 0));
    for path in ["top", "usr/lib/y", "z"] {
        assert_eq!(find(&tree, path).unwrap().ino(), one.ino(), "{path}");
    }
    let Kind::Symlink { target } = find(&tree, "lib").unwrap().kind() else {
        panic!("the link is gone");
    };
    assert_eq!(target, b"usr/lib");
}

#[test]
fn circles_and_long_ways_end() {
    let circle = [symlink("a", "b"), symlink("b", "./a")];
    let with = |last| [&circle[..], &[last]].concat();
    let long = "x/../".repeat(800);
    let long = |name: &str, next: &str| symlink(name, &format!("{long}{next}"));
    let table = [
        (with(file("a/x", 1)), "/a/x: symbolic links above it lead"),
        (with(file("b/.wh.x", 1)), "symbolic links above it lead"),
        (with(link("h", "a/x")), "/h: symbolic links above it lead"),
        (
            vec![
                long("a", "b"),
                long("b", "c"),
                long("c", "d"),
                file("a/x", 1),
            ],
            "or through too many names",
        ),
        (
            vec![symlink("a", "b"), file("a/../x", 1)],
            "/a/../x: a name is",
        ),
        (
            vec![symlink("a", "b"), link("h", "a/x")],
            "/h: hard link to /a/x, which does not exist",
        ),
        (
            vec![symlink("a", ".wh.b"), file("a/x", 1)],
            "/a/x: a whiteout has files below it",
        ),
        (
            vec![symlink("a", &"n".repeat(256)), file("a/x", 1)],
            "a name is longer than 255 bytes",
        ),
        (
            vec![symlink("a", &"d/".repeat(DEPTH_MAX + 1)), file("a/x", 1)],
            "lies deeper than 1024",
        ),
    ];
    for (files, message) in table {
        let error = Tree::build(&index(files)).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

/// What each path may cost is not what all of them may.
#[test]
fn many_long_ways_end() {
    let around = "x/../".repeat(800);
    let mut files = vec![
        symlink("a", &format!("{around}b")),
        symlink("b", &format!("{around}d")),
        dir("x"),
    ];
    // Real layers have as many that lead through a few names each.
    let mut real = vec![symlink("lib", "usr/lib"), file("lib/target", 1)];
    for number in 0..8_000 {
        files.push(file(&format!("a/{number}"), 0));
        real.push(link(&format!("lib/{number}"), "lib/target"));
    }
    let error = Tree::build(&index(files)).unwrap_err();
    assert!(
        matches!(
            error,
            crate::Error::Store(lazarette_fetcher::Error::Limit { .. })
        ),
        "{error}"
    );
    assert!(
        error.to_string().contains("lead through more than"),
        "{error}"
    );
    // The root, usr, usr/lib, lib, and the file with its names.
    assert_eq!(Tree::build(&index(real)).unwrap().len(), 5);

    // A chain that each of many walks to its end.
    let name = |number| format!("{}c{number}", "deep/".repeat(100));
    let mut files = vec![file(&name(0), 1)];
    files.extend((1..60).map(|number| link(&name(number), &name(number - 1))));
    files.extend((0..3_500).map(|number| link(&format!("h/{number}"), &name(59))));
    let error = Tree::build(&index(files)).unwrap_err().to_string();
    assert!(error.contains("lead through more than"), "{error}");
}
