//! What lies where layers are mounted and no server knows of.
//!
//! Invariant: what is in use goes on for who uses it, as it is only taken out of the tree of
//! mounts; nothing that is still mounted is removed.

use std::fs;
use std::io;
use std::path::Path;

use crate::{Error, Result, sys};

/// File systems that lie on one mountpoint at most, and some more.
const MOUNTS_MAX: usize = 8;

/// Unmounts and removes what `dir` holds, except what `is_known`. Returns how many there
/// were. One that cannot be removed is logged and does not keep the others.
pub fn clear(dir: &Path, is_known: &dyn Fn(&Path) -> bool) -> Result<usize> {
    let fail = |e| Error::io("list", dir, e);
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(fail(e)),
    };
    let mut cleared = 0;
    for entry in entries {
        let path = entry.map_err(fail)?.path();
        if is_known(&path) {
            continue;
        }
        match clear_one(&path) {
            Ok(()) => cleared += 1,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot remove what a server left");
            }
        }
    }
    Ok(cleared)
}

fn clear_one(path: &Path) -> io::Result<()> {
    for _ in 0..MOUNTS_MAX {
        match sys::detach(path) {
            Ok(()) => {}
            // It is no mountpoint, or no more.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => break,
            Err(e) => return Err(e),
        }
    }
    // It fails on what is still mounted, and on what holds something.
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::must_be_root;

    #[test]
    fn privileged_what_is_not_known_is_taken_away() {
        if !must_be_root("privileged_what_is_not_known_is_taken_away") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["known", "empty", "mounted", "holds"] {
            fs::create_dir(path(name)).unwrap();
        }
        fs::write(path("holds").join("file"), b"of somebody").unwrap();
        // One over the other, and in use.
        sys::bind(&path("holds"), &path("mounted")).unwrap();
        sys::bind(&path("known"), &path("mounted")).unwrap();
        let used = sys::open_path(&path("mounted")).unwrap();
        let known = path("known");
        assert_eq!(clear(dir.path(), &|path| path == known).unwrap(), 2);
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["holds", "known"]);
        drop(used);
        assert_eq!(clear(&path("absent"), &|_| false).unwrap(), 0);
    }
}
