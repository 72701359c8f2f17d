//! What starts of an image need, and in which layers that is (pure).
//!
//! Invariant: a path is looked up as a container would: in the merged tree of all layers,
//! through symlinks (at most [`SYMLINKS_MAX`] of them), `..` stopping at the root. Every
//! name that comes out is one that its layer has.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use super::entry::Kind;
use super::scan::Survey;
use crate::types::ByteRange;

/// Most symlinks on the way to one file: the kernel's limit.
const SYMLINKS_MAX: usize = 40;

/// Prefix of the name of what a whiteout hides.
pub(super) const WHITEOUT: &str = ".wh.";
/// Name of the whiteout of all that lies in its directory.
pub(super) const OPAQUE: &str = ".wh..wh..opq";

/// A file that a start needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotFile {
    /// Where it is: as someone wrote it for [`resolve`], as its layer names it after that.
    pub path: String,
    /// What of it is needed, in bytes of the file; any order and overlap, what is beyond
    /// its end means nothing. None means all of it.
    pub ranges: Vec<ByteRange>,
}

/// What starts need, in order of first access.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HotFiles {
    /// Most urgent first.
    pub files: Vec<HotFile>,
}

impl HotFiles {
    /// All of each of these files.
    pub fn whole(paths: impl IntoIterator<Item = String>) -> Self {
        let file = |path| HotFile {
            path,
            ranges: Vec::new(),
        };
        Self {
            files: paths.into_iter().map(file).collect(),
        }
    }
}

/// Where hot files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// For each layer its part, under the names that the layer has for it.
    pub layers: Vec<HotFiles>,
    /// Paths that are nowhere in the image, as they were written.
    pub missing: Vec<String>,
}

/// Finds `hot` in an image of these `layers`, the lowest first.
pub fn resolve(layers: &[&Survey], hot: &HotFiles) -> Resolved {
    let mut tree = Tree::default();
    for (number, survey) in layers.iter().enumerate() {
        tree.apply(number, survey);
    }
    let mut sorted = Sorted::new(layers.len());
    let mut missing = Vec::new();
    for file in &hot.files {
        match tree.walk(&file.path) {
            Some(touched) => {
                for name in touched {
                    sorted.add(&tree, name, &file.ranges);
                }
            }
            None => missing.push(file.path.clone()),
        }
    }
    Resolved {
        layers: sorted.layers,
        missing,
    }
}

/// The merged tree. Directories that only show in the paths of others are not in it.
#[derive(Default)]
struct Tree<'a> {
    nodes: BTreeMap<&'a str, Node<'a>>,
    /// Hard links of each layer: name to target.
    links: Vec<HashMap<&'a str, &'a str>>,
}

#[derive(Clone, Copy)]
struct Node<'a> {
    layer: usize,
    kind: Kind,
    /// Target of a symlink.
    link: &'a str,
}

impl<'a> Tree<'a> {
    fn apply(&mut self, layer: usize, survey: &'a Survey) {
        // A layer's whiteouts are about the layers below it only.
        for entry in &survey.entries {
            let (parent, name) = split(&entry.meta.name);
            if name == OPAQUE {
                self.remove_below(parent);
            } else if let Some(gone) = name.strip_prefix(WHITEOUT) {
                let path = join(parent, gone);
                self.nodes.remove(path.as_str());
                self.remove_below(&path);
            }
        }
        let mut links = HashMap::new();
        for entry in &survey.entries {
            let meta = &entry.meta;
            let name = meta.name.as_str();
            if split(name).1.starts_with(WHITEOUT) {
                continue;
            }
            if meta.kind == Kind::Hardlink {
                if meta.link == meta.name {
                    continue;
                }
                links.insert(name, meta.link.as_str());
            } else {
                links.remove(name);
            }
            if meta.kind != Kind::Directory {
                self.remove_below(name);
            }
            let node = Node {
                layer,
                kind: meta.kind,
                link: &meta.link,
            };
            self.nodes.insert(name, node);
        }
        self.links.push(links);
    }

    fn remove_below(&mut self, path: &str) {
        let prefix = match path {
            "" => String::new(),
            path => format!("{path}/"),
        };
        let below = (Bound::Excluded(prefix.as_str()), Bound::Unbounded);
        let names = self.nodes.range::<str, _>(below).map(|(name, _)| *name);
        let gone: Vec<&str> = names.take_while(|name| name.starts_with(&prefix)).collect();
        for name in gone {
            self.nodes.remove(name);
        }
    }

    /// The symlinks on the way to `path` and what is there, in the order of access; none
    /// if nothing is there.
    fn walk(&self, path: &str) -> Option<Vec<(&'a str, usize)>> {
        let mut touched = Vec::new();
        let mut symlinks = 0;
        let mut at = String::new();
        let mut todo: Vec<&str> = path.rsplit('/').collect();
        while let Some(part) = todo.pop() {
            match part {
                "" | "." => continue,
                ".." => {
                    at.truncate(at.rfind('/').unwrap_or(0));
                    continue;
                }
                part => {
                    let next = join(&at, part);
                    let node = self.nodes.get_key_value(next.as_str());
                    let symlink = node.filter(|(_, node)| node.kind == Kind::Symlink);
                    let Some((name, node)) = symlink else {
                        at = next;
                        continue;
                    };
                    symlinks += 1;
                    if symlinks > SYMLINKS_MAX {
                        return None;
                    }
                    touched.push((*name, node.layer));
                    if node.link.starts_with('/') {
                        at.clear();
                    }
                    todo.extend(node.link.rsplit('/'));
                }
            }
        }
        let (name, node) = self.nodes.get_key_value(at.as_str())?;
        touched.push((*name, node.layer));
        Some(touched)
    }
}

/// Hot files by layer.
struct Sorted<'a> {
    layers: Vec<HotFiles>,
    places: HashMap<(usize, &'a str), usize>,
}

impl<'a> Sorted<'a> {
    fn new(layers: usize) -> Self {
        Self {
            layers: vec![HotFiles::default(); layers],
            places: HashMap::new(),
        }
    }

    /// Adds a name, and what it is a hard link to.
    fn add(&mut self, tree: &Tree<'a>, (name, layer): (&'a str, usize), ranges: &[ByteRange]) {
        let mut next = Some(name);
        // A link names an entry before it, so chains end; the limit is for lying tars.
        for _ in 0..SYMLINKS_MAX {
            let Some(name) = next else { return };
            self.put((name, layer), ranges);
            next = tree
                .links
                .get(layer)
                .and_then(|links| links.get(name))
                .copied();
        }
    }

    fn put(&mut self, (name, layer): (&'a str, usize), ranges: &[ByteRange]) {
        let Some(hot) = self.layers.get_mut(layer) else {
            return;
        };
        let place = *self.places.entry((layer, name)).or_insert_with(|| {
            hot.files.push(HotFile {
                path: name.to_owned(),
                ranges: ranges.to_vec(),
            });
            hot.files.len() - 1
        });
        if let Some(file) = hot.files.get_mut(place) {
            match (file.ranges.is_empty(), ranges.is_empty()) {
                (false, false) if file.ranges != ranges => file.ranges.extend(ranges),
                (false, true) => file.ranges.clear(),
                (true, _) | (false, false) => {}
            }
        }
    }
}

/// Directory and last part of a path.
pub(super) fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

pub(super) fn join(parent: &str, name: &str) -> String {
    match parent {
        "" => name.to_owned(),
        parent => format!("{parent}/{name}"),
    }
}

#[cfg(test)]
mod tests;
