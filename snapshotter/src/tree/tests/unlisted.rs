//! Which directories a layer leaves out, and whether those below say otherwise.

use super::*;
use crate::tree::unlisted::Unlisted;

fn with(mut entry: FileEntry, mode: u16, uid: u32) -> FileEntry {
    (entry.mode, entry.uid) = (mode, uid);
    entry
}

/// The first that differs, the layers below from the uppermost on.
fn differs(layer: Vec<FileEntry>, below: Vec<Vec<FileEntry>>) -> Option<String> {
    let layer = index(layer);
    let below: Vec<_> = below.into_iter().map(index).collect();
    let mut unlisted = Unlisted::of(&layer);
    let found = below.iter().find_map(|below| unlisted.differs(below));
    found.map(|path| String::from_utf8(path.to_vec()).unwrap())
}

#[test]
fn only_what_a_layer_leaves_out_is_looked_for() {
    let tmp = || with(dir("tmp"), 0o1777, 0);
    let plain = |path| with(dir(path), 0o755, 0);
    for (layer, expected) in [
        (vec![file("tmp/x", 1)], Some("tmp")),
        (vec![file("tmp/.wh.x", 1)], Some("tmp")),
        (vec![file("tmp/a/b/x", 1), file("tmp/a/y", 1)], Some("tmp")),
        // In any order.
        (vec![file("tmp/x", 1), plain("tmp")], None),
        (vec![plain("tmp"), file("tmp/a/x", 1)], None),
        (vec![symlink("tmp", "var"), file("tmp/x", 1)], None),
        (vec![file("etc/x", 1), file("new/x", 1), file("x", 1)], None),
        (vec![tmp()], None),
        (vec![], None),
    ] {
        let base = vec![plain(""), tmp(), plain("etc")];
        let said = format!("{layer:?}");
        assert_eq!(differs(layer, vec![base]).as_deref(), expected, "{said}");
    }
}

#[test]
fn the_uppermost_layer_that_lists_a_directory_counts() {
    let home = |mode, uid| vec![with(dir("home/app"), mode, uid)];
    let layer = || vec![file("home/app/run", 1)];
    let found = |below| differs(layer(), below);
    assert_eq!(found(vec![home(0o755, 0)]), None);
    assert_eq!(found(vec![home(0o700, 0)]).as_deref(), Some("home/app"));
    assert_eq!(found(vec![home(0o755, 7)]).as_deref(), Some("home/app"));
    assert_eq!(found(vec![home(0o755, 0), home(0o700, 7)]), None);
    let both = vec![layer(), home(0o700, 7)];
    assert_eq!(found(both).as_deref(), Some("home/app"));
    // Of one that lists it twice the last.
    let twice = |first, last| vec![[home(first, 0), home(last, 0)].concat()];
    assert_eq!(found(twice(0o700, 0o755)), None);
    assert!(found(twice(0o755, 0o700)).is_some());
    let mut acl = home(0o755, 0);
    acl[0].xattrs = vec![(b"system.posix_acl_default".to_vec(), b"v".to_vec())];
    assert!(found(vec![acl]).is_some());
}
