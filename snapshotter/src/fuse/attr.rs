//! From an inode of the tree to what FUSE calls its attributes.
//!
//! Pure. Times are exact to the nanosecond, also before 1970.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use lazarette_fetcher::index::Timestamp;

use crate::tree::{InodeRef, Kind};

/// What `stat` calls the preferred block size: the kernel's page, the unit of our data.
pub(super) const BLOCK_SIZE: u32 = 4096;

/// `st_blocks` counts these.
const SECTOR: u64 = 512;

pub(super) fn of(inode: InodeRef<'_>) -> FileAttr {
    let attr = inode.attr();
    let mtime = system_time(attr.mtime);
    FileAttr {
        ino: INodeNo(inode.ino()),
        size: inode.size(),
        blocks: match inode.kind() {
            Kind::Regular { size, .. } => size.div_ceil(SECTOR),
            Kind::Directory { .. }
            | Kind::Symlink { .. }
            | Kind::CharDevice { .. }
            | Kind::BlockDevice { .. }
            | Kind::Fifo => 0,
        },
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: file_type(inode),
        perm: attr.mode,
        nlink: inode.nlink(),
        uid: attr.uid,
        gid: attr.gid,
        rdev: match inode.kind() {
            Kind::CharDevice { rdev } | Kind::BlockDevice { rdev } => rdev,
            Kind::Directory { .. } | Kind::Regular { .. } | Kind::Symlink { .. } | Kind::Fifo => 0,
        },
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// A name that does not exist, in the form the kernel remembers: inode 0.
pub(super) fn absent(root: InodeRef<'_>) -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        ..of(root)
    }
}

pub(super) fn file_type(inode: InodeRef<'_>) -> FileType {
    match inode.kind() {
        Kind::Directory { .. } => FileType::Directory,
        Kind::Regular { .. } => FileType::RegularFile,
        Kind::Symlink { .. } => FileType::Symlink,
        Kind::CharDevice { .. } => FileType::CharDevice,
        Kind::BlockDevice { .. } => FileType::BlockDevice,
        Kind::Fifo => FileType::NamedPipe,
    }
}

/// The epoch for a time that this platform's clock type cannot hold.
fn system_time(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.secs.unsigned_abs());
    let whole = if time.secs < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    whole
        .and_then(|whole| whole.checked_add(Duration::from_nanos(u64::from(time.nanos))))
        .unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_keep_their_nanoseconds() {
        let time = system_time(Timestamp {
            secs: -2,
            nanos: 800_000_000,
        });
        assert_eq!(time, UNIX_EPOCH - Duration::from_millis(1200));
        for secs in [i64::MIN, i64::MAX] {
            let _ = system_time(Timestamp {
                secs,
                nanos: 999_999_999,
            });
        }
    }
}
