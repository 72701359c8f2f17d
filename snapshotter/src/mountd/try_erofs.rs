//! Whether this kernel makes an EROFS of plain files, which the mount server rests on, and how
//! far it can be relied on.
//!
//! Invariant: mounts nothing where anybody could see it, and leaves no file.

use std::path::Path;

use super::sample::{self, CUT, Sample, WHOLE};
use crate::fuse::create_image;
use crate::{Error, Result};

/// Tries it with a small image below `dir`, a directory on a disk, which is made if absent.
/// Whether a read that gets less than it wanted fails, see [`CUT`].
///
/// # Errors
/// `Mount` where the kernel refuses: it is older than 6.12, or was made without that.
/// `Environment` where it does not read what is there.
pub(super) fn try_erofs(dir: &Path) -> Result<bool> {
    let sample = Sample::new(dir, "try")?;
    let files = [sample.image(), sample.data()];
    let mounted = create_image(&files, sample.dir())?;
    let whole = sample::read(&mounted, WHOLE);
    if sample::is_content(&whole) {
        return Ok(sample::read(&mounted, CUT).is_err());
    }
    Err(Error::Environment {
        op: "read a small layer through erofs",
        detail: whole.map_or_else(|error| error.to_string(), |_| "it is not right".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::test_util::must_be_root;

    #[test]
    fn privileged_it_leaves_nothing_whether_it_works_or_not() {
        if !must_be_root("privileged_it_leaves_nothing_whether_it_works_or_not") {
            return;
        }
        let disk = tempfile::tempdir().unwrap();
        let dir = disk.path().join("meta");
        assert!(
            try_erofs(&dir).unwrap(),
            "layers are shown another way here"
        );
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        // A tmpfs is what every kernel refuses.
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let error = try_erofs(memory.path()).unwrap_err();
        assert!(matches!(error, Error::Mount { .. }), "{error}");
        assert_eq!(fs::read_dir(memory.path()).unwrap().count(), 0);
    }
}
