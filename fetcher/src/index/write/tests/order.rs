//! What must come before a file that is moved to the front.

use super::*;

/// Docker and containerd would delete them at a whiteout that came later.
#[test]
fn prioritised_files_come_after_their_whiteouts() {
    let items = [
        file(".wh.d", b""),
        file(".wh.other", b""),
        dir("d/"),
        file("d/.wh..wh..opq", b""),
        file("d/.wh.y", b""),
        file("d/x", b"x"),
        file("d/y", b"y"),
        file("d/.wh.z", b""),
        hard("z", "d/y"),
    ];
    let first = |wanted: &[&str]| {
        let (blob, written) = convert_hot(&tarball(&items), wanted, &options(4096, 1)).unwrap();
        check(&blob, &written, 4096);
        let entries = toc(&blob, &written);
        let names = names(&entries).into_iter().map(str::to_owned);
        let first: Vec<_> = names.take_while(|name| name != PREFETCH_LANDMARK).collect();
        first
    };
    let opaque = "d/.wh..wh..opq";
    assert_eq!(first(&["d/x"]), [".wh.d", "d/", opaque, "d/x"]);
    let expected = [".wh.d", "d/", opaque, "d/.wh.y", "d/y", "z"];
    assert_eq!(first(&["z"]), expected);
    assert_eq!(first(&["d"]), [".wh.d", "d/"]);
}

/// Before the link, what lies below it would be in a directory of that name, and go with it.
#[test]
fn what_lies_below_a_symbolic_link_stays_behind_it() {
    let items = [
        item(b'2', "lib", "usr/lib", b""),
        file("lib/x", b"x"),
        file("y", b"y"),
        hard("top", "lib/x"),
    ];
    let wanted = ["top", "y"];
    let (blob, written) = convert_hot(&tarball(&items), &wanted, &options(4096, 1)).unwrap();
    check(&blob, &written, 4096);
    let expected = ["y", PREFETCH_LANDMARK, "lib", "lib/x", "top"];
    assert_eq!(names(&toc(&blob, &written)), expected);
}
