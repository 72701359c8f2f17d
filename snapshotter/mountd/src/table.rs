//! Which file systems lie on a mountpoint, from the kernel's table of mounts.
//!
//! Invariant: of a line that is not understood nothing is taken. Paths are compared as the
//! kernel writes them, with `\\040` for a space.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The table of the mounts that this process sees.
const TABLE: &str = "/proc/self/mountinfo";
/// What the kernel calls an EROFS.
const EROFS: &[u8] = b"erofs";
/// Between a mount's own fields and those of its file system.
const SEPARATOR: &[u8] = b"-";
/// Which field is the mountpoint.
const MOUNTPOINT: usize = 4;

/// All mounts, as the kernel lists them.
pub struct Table(Vec<u8>);

impl Table {
    /// The mounts that there are now.
    pub fn read() -> io::Result<Self> {
        fs::read(TABLE).map(Self)
    }

    /// How many EROFS lie on `path`, absolute and without symbolic links, one over the other.
    pub fn erofs_at(&self, path: &Path) -> usize {
        let path = escaped(path.as_os_str().as_bytes());
        let lines = self.0.split(|byte| *byte == b'\n');
        let kinds = lines.filter_map(parse).filter(|(at, _)| *at == path);
        kinds.filter(|(_, kind)| *kind == EROFS).count()
    }
}

/// Mountpoint and kind of file system of a line.
fn parse(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut fields = line.split(|byte| *byte == b' ');
    let at = fields.nth(MOUNTPOINT)?;
    fields.find(|field| *field == SEPARATOR)?;
    Some((at, fields.next()?))
}

/// A path as the table has it.
fn escaped(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    for byte in path {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => out.extend(format!("\\{byte:03o}").bytes()),
            _ => out.push(*byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_on_a_path() {
        let table = Table(
            b"22 1 8:1 / / rw shared:1 - ext4 /dev/vda rw\n\
              40 22 0:50 / /run/l/1 ro - fuse.lazarette lazarette ro\n\
              41 40 0:51 / /run/l/1 ro shared:2 master:7 - erofs none ro\n\
              42 41 0:52 / /run/l/1 ro - erofs /proc/self/fd/9 ro\n\
              43 22 0:53 / /run/l/10 ro - erofs none ro\n\
              44 22 0:54 / /run/a\\040b\\134c ro - erofs none ro\n\
              45 22 0:55 / /run/cut ro\n\
              46 22\n\n"
                .to_vec(),
        );
        let counts = [
            ("/", 0),
            ("/run/l/1", 2),
            ("/run/l/10", 1),
            ("/run/l", 0),
            ("/run/a b\\c", 1),
            ("/run/cut", 0),
        ];
        for (path, count) in counts {
            assert_eq!(table.erofs_at(Path::new(path)), count, "{path}");
        }
    }

    #[test]
    fn the_kernels_own_table_is_understood() {
        let table = Table::read().unwrap();
        let lines = table.0.split(|byte| *byte == b'\n');
        let whole = lines.filter(|line| !line.is_empty());
        assert!(whole.clone().count() > 0);
        assert!(whole.into_iter().all(|line| parse(line).is_some()));
    }
}
