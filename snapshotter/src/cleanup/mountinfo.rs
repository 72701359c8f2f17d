//! Reads `/proc/self/mountinfo`.
//!
//! Pure. A line is `id parent major:minor root mountpoint options... - type source ...`;
//! space, tab, newline and backslash in a path are written as `\040` and so on.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Position of the mountpoint among the fields of a line.
const MOUNTPOINT: usize = 4;

/// Mountpoints at or below `dir`, innermost first, of two at one place the upper one first.
pub(super) fn below(text: &[u8], dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = text
        .split(|byte| *byte == b'\n')
        .filter_map(mountpoint)
        .filter(|path| path.starts_with(dir))
        .collect();
    // The kernel lists them in the order they were made; a stable sort keeps that.
    found.reverse();
    found.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    found
}

fn mountpoint(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(MOUNTPOINT)?;
    Some(PathBuf::from(OsStr::from_bytes(&unescape(field))))
}

/// Undoes `\ooo`; anything that is no such escape stays.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = (first == b'\\').then(|| octal(tail)).flatten();
        match escaped {
            Some((byte, tail)) => {
                out.push(byte);
                rest = tail;
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

fn octal(text: &[u8]) -> Option<(u8, &[u8])> {
    let (digits, tail) = text.split_at_checked(3)?;
    let text = std::str::from_utf8(digits).ok()?;
    Some((u8::from_str_radix(text, 8).ok()?, tail))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_below_innermost_first() {
        let text = b"\
21 1 8:1 / / rw - ext4 /dev/vda rw\n\
30 21 0:5 / /run/a rw,relatime shared:1 - tmpfs tmpfs rw\n\
31 30 0:6 / /run/a/b rw - fuse.lazarette lazarette ro\n\
32 30 0:7 / /run/a/with\\040space\\134n rw - overlay overlay rw\n\
33 31 0:8 / /run/a/b/c/d rw - overlay overlay rw\n\
34 31 0:9 / /run/a/b rw - overlay later rw\n\
35 21 0:9 / /run/ab rw - tmpfs tmpfs rw\n\
broken line\n";
        let found = below(text, Path::new("/run/a"));
        let names: Vec<_> = found.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(
            names,
            [
                "/run/a/b/c/d",
                "/run/a/b",
                "/run/a/with space\\n",
                "/run/a/b",
                "/run/a"
            ]
        );
    }

    #[test]
    fn leaves_alone_what_is_no_escape() {
        for (field, path) in [
            (&b"/a\\040b"[..], &b"/a b"[..]),
            (b"/a\\04", b"/a\\04"),
            (b"/a\\999", b"/a\\999"),
            (b"\\", b"\\"),
        ] {
            assert_eq!(unescape(field), path);
        }
    }
}
