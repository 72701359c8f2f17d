//! Whether this kernel makes an EROFS of plain files, which the mount server rests on, and how
//! far it can be relied on.
//!
//! Invariant: mounts nothing where anybody could see it, and leaves no file.

use std::path::Path;

use super::choose::Trial;
use super::sample::{self, CUT, Sample, WHOLE};
use crate::fuse::create_image;

/// Tries it with a small image below `dir`, a directory on a disk, which is made if absent.
/// Short reads are those of [`CUT`].
pub(super) fn try_erofs(dir: &Path) -> Trial {
    let sample = match Sample::new(dir, "try") {
        Ok(sample) => sample,
        Err(error) => return Trial::Untried(error.to_string()),
    };
    let files = [sample.image(), sample.data()];
    let mounted = match create_image(&files, sample.dir()) {
        Ok(mounted) => mounted,
        Err(error) => return Trial::Fails(error.to_string()),
    };
    let whole = sample::read(&mounted, WHOLE);
    if sample::is_content(&whole) {
        let fails_short_reads = sample::read(&mounted, CUT).is_err();
        return Trial::Works { fails_short_reads };
    }
    let detail = whole.map_or_else(|error| error.to_string(), |_| "it is not right".to_owned());
    Trial::Fails(format!("cannot read a small layer through erofs: {detail}"))
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
        let works = Trial::Works {
            fails_short_reads: true,
        };
        assert_eq!(try_erofs(&dir), works, "layers are shown another way here");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        // A tmpfs is what every kernel refuses.
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let refused = try_erofs(memory.path());
        assert!(matches!(refused, Trial::Fails(_)), "{refused:?}");
        assert_eq!(fs::read_dir(memory.path()).unwrap().count(), 0);
        // A place where nothing can be made says nothing of the kernel.
        let file = disk.path().join("file");
        fs::write(&file, "").unwrap();
        let untried = try_erofs(&file);
        assert!(matches!(untried, Trial::Untried(_)), "{untried:?}");
    }
}
