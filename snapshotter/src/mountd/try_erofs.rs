//! Whether this kernel makes an EROFS of plain files, which the mount server rests on.
//!
//! Invariant: mounts nothing where anybody could see it, and leaves no file.

use std::fs::{self, File};
use std::path::Path;

use lazarette_fetcher::index::{LayerFormat, LayerIndex};
use lazarette_fetcher::types::Digest;

use super::{BLOCK_BYTES, DATA, image};
use crate::erofs::Devices;
use crate::fuse::create_image;
use crate::tree::Tree;
use crate::{Error, Result};

/// Tries it with a small image below `dir`, a directory on a disk, which is made if absent.
///
/// # Errors
/// `Mount` where the kernel refuses: it is older than 6.12, or was made without that.
pub(super) fn try_erofs(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    let here = dir.join(format!("try.{}", std::process::id()));
    let outcome = try_below(&here);
    match fs::remove_dir_all(&here) {
        Ok(()) => outcome,
        Err(error) => outcome.and(Err(Error::io("remove", &here, error))),
    }
}

fn try_below(here: &Path) -> Result<()> {
    fs::create_dir_all(here).map_err(|e| Error::io("create", here, e))?;
    let nothing = LayerIndex {
        blob_digest: Digest::sha256(b""),
        blob_size: 0,
        format: LayerFormat::Tar,
        files: Vec::new(),
        chunks: Vec::new(),
        spans: Vec::new(),
        data_len: BLOCK_BYTES,
    };
    let [metadata, data] = ["metadata", DATA].map(|name| here.join(name));
    image::put(&Tree::build(&nothing)?, Devices::One, &metadata)?;
    let make = || File::create_new(&data)?.set_len(BLOCK_BYTES);
    make().map_err(|e| Error::io("write", &data, e))?;
    create_image(&[metadata, data], here).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::must_be_root;

    #[test]
    fn privileged_it_leaves_nothing_whether_it_works_or_not() {
        if !must_be_root("privileged_it_leaves_nothing_whether_it_works_or_not") {
            return;
        }
        let disk = tempfile::tempdir().unwrap();
        let dir = disk.path().join("meta");
        try_erofs(&dir).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        // A tmpfs is what every kernel refuses.
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let error = try_erofs(memory.path()).unwrap_err();
        assert!(matches!(error, Error::Mount { .. }), "{error}");
        assert_eq!(fs::read_dir(memory.path()).unwrap().count(), 0);
    }
}
