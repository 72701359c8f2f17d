//! What a path leads to in the layers of an image, as overlay shows them.
//!
//! Invariant: pure and bounded: no more symbolic links than the kernel follows, no path
//! longer than it takes. Hides what overlay hides: deleted names, what lies below an opaque
//! directory, and what lies below anything that is no directory.

use std::collections::VecDeque;
use std::sync::Arc;

use super::name::OPAQUE_XATTR;
use super::{Ino, Kind, ROOT_INO, Tree};

/// Symbolic links that are followed, as by the kernel.
pub(super) const LINKS_MAX: usize = 40;
/// Names that are looked up for one path, those of its symbolic links included.
pub(super) const NAMES_MAX: usize = 4096;

/// The layers of an image, the base first.
#[derive(Debug, Clone)]
pub struct Merged {
    trees: Vec<Arc<Tree>>,
}

/// A regular file of one of the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Position of the layer, from the base.
    pub layer: usize,
    /// Its length in bytes.
    pub size: u64,
    /// Where it starts in the layer's data file.
    pub data_offset: u64,
}

/// A directory: those that are merged into it, the uppermost first.
type Directory = Vec<(usize, Ino)>;

enum Node {
    Directory(Directory),
    Symlink(Vec<u8>),
    File(Found),
}

impl Merged {
    /// The layers of an image, the base first.
    pub fn new(trees: Vec<Arc<Tree>>) -> Self {
        Self { trees }
    }

    /// The regular file that `path`, seen from the root, leads to.
    pub fn file(&self, path: &[u8]) -> Option<Found> {
        let mut above = vec![self.root()];
        let mut names: VecDeque<Vec<u8>> = parts(path).collect();
        let mut links = 0;
        for _ in 0..NAMES_MAX {
            let name = names.pop_front()?;
            match name.as_slice() {
                b"." => continue,
                b".." => {
                    if above.len() > 1 {
                        above.pop();
                    }
                    continue;
                }
                _ => {}
            }
            match self.child(above.last()?, &name)? {
                Node::Directory(directory) => above.push(directory),
                Node::File(found) => return names.is_empty().then_some(found),
                Node::Symlink(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return None;
                    }
                    if target.starts_with(b"/") {
                        above.truncate(1);
                    }
                    for name in parts(&target).rev() {
                        names.push_front(name);
                    }
                }
            }
        }
        None
    }

    fn root(&self) -> Directory {
        (0..self.trees.len())
            .rev()
            .map(|at| (at, ROOT_INO))
            .collect()
    }

    /// What this name of a directory is.
    fn child(&self, directory: &Directory, name: &[u8]) -> Option<Node> {
        let mut merged = Directory::new();
        for (layer, ino) in directory {
            let tree = self.trees.get(*layer)?;
            let Some(inode) = tree.lookup(*ino, name) else {
                continue;
            };
            match inode.kind() {
                Kind::Directory { .. } => {
                    merged.push((*layer, inode.ino()));
                    if inode.xattr(OPAQUE_XATTR.0) == Some(OPAQUE_XATTR.1) {
                        break;
                    }
                }
                // Below a directory, nothing but directories shows.
                _ if !merged.is_empty() => break,
                Kind::Symlink { target } => return Some(Node::Symlink(target.to_vec())),
                Kind::Regular { size, data_offset } => {
                    return Some(Node::File(Found {
                        layer: *layer,
                        size,
                        data_offset,
                    }));
                }
                Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo => return None,
            }
        }
        (!merged.is_empty()).then_some(Node::Directory(merged))
    }
}

fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> + '_ {
    let names = path.split(|byte| *byte == b'/');
    names.filter(|name| !name.is_empty()).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{build, file, symlink};
    use super::*;
    use lazarette_fetcher::index::FileEntry;

    /// Sizes tell the files apart.
    fn merged(layers: Vec<Vec<FileEntry>>) -> Merged {
        Merged::new(layers.into_iter().map(|all| Arc::new(build(all))).collect())
    }

    #[track_caller]
    fn assert_files(merged: &Merged, table: &[(&str, Option<(usize, u64)>)]) {
        for (path, expected) in table {
            let found = merged.file(path.as_bytes());
            let found = found.map(|found| (found.layer, found.size));
            assert_eq!(found, *expected, "{path}");
        }
    }

    #[test]
    fn upper_layers_hide_lower_ones_as_overlay_does() {
        let base = vec![
            file("a/both", 1),
            file("a/low", 2),
            file("gone", 3),
            file("opaque/old", 4),
            file("turned/x", 5),
            file("file", 6),
        ];
        let upper = vec![
            file("a/both", 11),
            file("a/high", 12),
            file(".wh.gone", 0),
            file("opaque/.wh..wh..opq", 0),
            file("opaque/new", 13),
            file("turned", 14),
            file("file/below", 15),
        ];
        let table = [
            ("/a/both", Some((1, 11))),
            ("a/low", Some((0, 2))),
            ("/a//./high", Some((1, 12))),
            ("/gone", None),
            ("/opaque/old", None),
            ("/opaque/new", Some((1, 13))),
            ("/turned/x", None),
            ("/turned", Some((1, 14))),
            ("/file", None),
            ("/file/below", Some((1, 15))),
            ("/a", None),
            ("/", None),
            ("/nothing/here", None),
        ];
        assert_files(&merged(vec![base, upper]), &table);
    }

    #[test]
    fn symbolic_links_are_followed_over_layers_and_not_for_ever() {
        let base = vec![
            symlink("lib", "usr/lib"),
            file("usr/lib/x.so.1", 1),
            symlink("loop", "pool"),
            symlink("pool", "./loop"),
        ];
        let upper = vec![
            symlink("usr/lib/x.so", "x.so.1"),
            symlink("etc/alternatives/x", "/lib/x.so"),
            symlink("up", "../../../etc/alternatives/x"),
            symlink("lib64", "usr/lib"),
            file("lib64/y.so", 2),
        ];
        let table = [
            ("/lib/x.so.1", Some((0, 1))),
            ("/lib/x.so", Some((0, 1))),
            ("/etc/alternatives/x", Some((0, 1))),
            ("/up", Some((0, 1))),
            ("/usr/lib/../../lib/x.so", Some((0, 1))),
            ("/lib64/y.so", Some((1, 2))),
            ("/lib/y.so", Some((1, 2))),
            ("/lib64/x.so.1", Some((0, 1))),
            ("/loop", None),
            ("/lib/x.so/beyond", None),
        ];
        assert_files(&merged(vec![base, upper]), &table);
    }

    #[test]
    fn long_paths_end() {
        let merged = merged(vec![vec![file("a", 1)]]);
        assert!(merged.file("../".repeat(NAMES_MAX).as_bytes()).is_none());
        assert!(merged.file(b"").is_none());
    }
}
