//! Rules for paths and single entries.
//!
//! Pure. Invariant: an entry that passes [`check_entry`] needs no further check but that
//! of its place among the others.

use lazarette_fetcher::index::{FileEntry, FileKind, LayerIndex};
use lazarette_fetcher::types::ByteRange;

use super::name::Name;
use super::{NAME_LEN_MAX, SYMLINK_LEN_MAX, XATTR_SIZE_MAX};
use crate::{Error, Result};

/// The layer, for error messages.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a>(pub(super) &'a LayerIndex);

impl Subject<'_> {
    fn name(self) -> String {
        format!("layer {}", self.0.blob_digest)
    }

    pub(super) fn malformed(self, path: &[u8], rule: &str) -> Error {
        let detail = format!("/{}: {rule}", path.escape_ascii());
        lazarette_fetcher::Error::malformed(self.name(), detail).into()
    }

    pub(super) fn limit(self, path: &[u8], rule: &str) -> Error {
        let detail = format!("/{}: {rule}", path.escape_ascii());
        lazarette_fetcher::Error::limit(self.name(), detail).into()
    }
}

pub(super) fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
}

pub(super) fn split_last(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

pub(super) fn check_name(what: Subject<'_>, path: &[u8], name: &[u8]) -> Result<()> {
    if name.len() > NAME_LEN_MAX {
        let rule = format!("a name is longer than {NAME_LEN_MAX} bytes");
        return Err(what.limit(path, &rule));
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&0) {
        return Err(what.malformed(path, "a name is empty, '.', '..' or holds a NUL"));
    }
    Ok(())
}

/// Everything about an entry that does not depend on the others.
pub(super) fn check_entry(what: Subject<'_>, entry: &FileEntry) -> Result<()> {
    let path = &entry.path;
    if !path.is_empty() {
        let name = split_last(path).1;
        // The name of a whiteout stands for a shorter one, which is the one to be shown.
        let shown = match Name::of(name) {
            Name::Whiteout(deleted) => deleted,
            Name::Plain | Name::Opaque | Name::Reserved | Name::Empty => name,
        };
        check_name(what, path, shown)?;
    }
    if entry.mtime.nanos >= 1_000_000_000 {
        return Err(what.malformed(path, "the modification time has a billion nanoseconds"));
    }
    check_xattrs(what, entry)?;
    match &entry.kind {
        FileKind::Regular { size, data_offset } => {
            let end = ByteRange::at(*data_offset, *size).map(|range| range.end());
            if *size > 0 && end.is_none_or(|end| end > what.0.data_len) {
                return Err(what.malformed(path, "its content lies outside the layer's data"));
            }
        }
        FileKind::Symlink { target } => {
            if target.is_empty() || target.contains(&0) {
                return Err(what.malformed(path, "the symbolic link has no valid target"));
            }
            if target.len() > SYMLINK_LEN_MAX {
                let rule = format!("the symbolic link is longer than {SYMLINK_LEN_MAX} bytes");
                return Err(what.limit(path, &rule));
            }
        }
        FileKind::CharDevice { major, minor } | FileKind::BlockDevice { major, minor } => {
            if rdev(*major, *minor).is_none() {
                let rule = format!("Linux has no device {major}:{minor}");
                return Err(what.malformed(path, &rule));
            }
        }
        FileKind::Directory | FileKind::Hardlink { .. } | FileKind::Fifo => {}
    }
    Ok(())
}

fn check_xattrs(what: Subject<'_>, entry: &FileEntry) -> Result<()> {
    let mut list = 0;
    for (name, value) in &entry.xattrs {
        list += name.len() + 1;
        if name.is_empty() || name.len() > NAME_LEN_MAX || name.contains(&0) {
            let rule = "the name of an extended attribute is empty, too long or holds a NUL";
            return Err(what.malformed(&entry.path, rule));
        }
        if value.len() > XATTR_SIZE_MAX || list > XATTR_SIZE_MAX {
            let rule = format!("extended attributes exceed {XATTR_SIZE_MAX} bytes");
            return Err(what.limit(&entry.path, &rule));
        }
    }
    Ok(())
}

/// The kernel's 32-bit device number: 12 bits of major, 20 of minor.
pub(super) fn rdev(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20)
        .then_some((major << 8) | (minor & 0xff) | ((minor & !0xff) << 12))
}
