//! What Go's tar readers tell of a file, as every table of contents made with them repeats it.
//!
//! Invariant: nothing out of range gets into the file table: what does not fit is refused,
//! with the rule it breaks, and never cut.

use super::{FileEntry, FileKind, path, time};

/// Longest time that is looked at; with nanoseconds and zone it takes 35 bytes.
const TIME_LEN_MAX: usize = 64;

/// Facts about one file, as they stand in a table of contents.
pub(super) struct Attributes<'a> {
    /// `dir`, `reg`, `symlink`, `hardlink`, `char`, `block` or `fifo`.
    pub(super) kind: &'a str,
    /// Bytes of a regular file.
    pub(super) size: i64,
    /// Mode of a tar header; only permission bits count.
    pub(super) mode: i64,
    /// Owner.
    pub(super) uid: i64,
    /// Group.
    pub(super) gid: i64,
    /// RFC 3339; empty if it is not known.
    pub(super) mtime: &'a str,
    /// Target of a link.
    pub(super) link: &'a [u8],
    /// Major number of a device.
    pub(super) dev_major: i64,
    /// Minor number of a device.
    pub(super) dev_minor: i64,
}

impl Attributes<'_> {
    /// An entry without a path, xattrs and a place in the data file; `Err` says which rule
    /// the facts break.
    pub(super) fn entry(&self) -> Result<FileEntry, String> {
        let mtime = (self.mtime.len() <= TIME_LEN_MAX)
            .then(|| time::parse(self.mtime))
            .flatten();
        let mtime =
            mtime.ok_or_else(|| format!("its modtime {:?} is not RFC 3339", short(self.mtime)))?;
        let mode = u64::try_from(self.mode)
            .ok()
            .and_then(|mode| u16::try_from(mode & 0o7777).ok())
            .ok_or_else(|| format!("its mode is {}", self.mode))?;
        Ok(FileEntry {
            path: Vec::new(),
            kind: self.kind()?,
            mode,
            uid: fits("uid", self.uid)?,
            gid: fits("gid", self.gid)?,
            mtime,
            xattrs: Vec::new(),
        })
    }

    fn kind(&self) -> Result<FileKind, String> {
        let device = || {
            let major = fits("devMajor", self.dev_major)?;
            Ok::<_, String>((major, fits("devMinor", self.dev_minor)?))
        };
        Ok(match self.kind {
            "dir" => FileKind::Directory,
            "reg" => FileKind::Regular {
                size: fits("size", self.size)?,
                data_offset: 0,
            },
            "symlink" => FileKind::Symlink {
                target: self.link.to_vec(),
            },
            "hardlink" => FileKind::Hardlink {
                target: path::normalize(self.link)
                    .map_err(|rule| format!("hard link target: {rule}"))?,
            },
            "char" => {
                let (major, minor) = device()?;
                FileKind::CharDevice { major, minor }
            }
            "block" => {
                let (major, minor) = device()?;
                FileKind::BlockDevice { major, minor }
            }
            "fifo" => FileKind::Fifo,
            other => return Err(format!("its type is {:?}", short(other))),
        })
    }
}

/// Text from outside for a message, cut to 100 characters.
pub(super) fn short(text: &str) -> String {
    text.chars().take(100).collect()
}

fn fits<T: TryFrom<i64>>(field: &str, value: i64) -> Result<T, String> {
    T::try_from(value).map_err(|_| format!("its {field} is {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: Attributes<'static> = Attributes {
        kind: "reg",
        size: 5,
        mode: 0o100_644,
        uid: 1,
        gid: 70_000,
        mtime: "2023-11-14T22:13:20Z",
        link: b"",
        dev_major: 0,
        dev_minor: 0,
    };

    #[test]
    fn what_fits_is_taken_and_the_rest_named() {
        let file = FILE.entry().unwrap();
        assert_eq!(
            (file.mode, file.gid, file.mtime.secs),
            (0o644, 70_000, 1_700_000_000)
        );
        let long = format!("2023-11-14T22:13:20.{}Z", "0".repeat(100));
        let bad = |change: &dyn Fn(&mut Attributes<'_>)| {
            let mut file = Attributes { ..FILE };
            change(&mut file);
            file.entry().unwrap_err()
        };
        assert_eq!(bad(&|f| f.size = -1), "its size is -1");
        assert_eq!(bad(&|f| f.mode = -1), "its mode is -1");
        assert_eq!(bad(&|f| f.uid = 1 << 32), "its uid is 4294967296");
        assert_eq!(bad(&|f| f.kind = "chunk"), "its type is \"chunk\"");
        assert!(bad(&|f| f.mtime = "yesterday").contains("RFC 3339"));
        let error = Attributes {
            mtime: &long,
            ..FILE
        }
        .entry()
        .unwrap_err();
        assert!(error.contains("RFC 3339"), "{error}");
        let link = bad(&|f| (f.kind, f.link) = ("hardlink", b"../x"));
        assert!(link.starts_with("hard link target: "), "{link}");
        let device = bad(&|f| (f.kind, f.dev_minor) = ("block", -1));
        assert_eq!(device, "its devMinor is -1");
    }
}
