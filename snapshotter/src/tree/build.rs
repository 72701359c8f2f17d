//! Places the entries of a file table in a draft tree.
//!
//! The draft is a map of names per directory, where the rules for duplicates and
//! whiteouts apply; `freeze` makes the [`Tree`] of it. Invariant: nothing is placed that
//! breaks a bound, so freezing cannot overflow; and nothing is placed below a symbolic link,
//! but where it leads. Never recurses: depth is data from outside.

mod follow;

use std::cell::Cell;
use std::collections::BTreeMap;

use lazarette_fetcher::index::{FileEntry, FileKind, LayerIndex};

use super::check::{Subject, check_entry, check_name, components, split_last};
use super::freeze::freeze;
use super::name::Name;
use super::{DEPTH_MAX, INODES_MAX, LINK_CHAIN_MAX, Tree};
use crate::Result;

/// Position in [`Draft::nodes`].
pub(super) type NodeId = usize;
pub(super) const ROOT: NodeId = 0;

pub(super) fn build(index: &LayerIndex) -> Result<Tree> {
    let what = Subject(index);
    let mut draft = Draft::new(what);
    for entry in &index.files {
        draft.place(entry)?;
    }
    draft.apply_whiteouts()?;
    freeze(&draft)
}

pub(super) struct Draft<'a> {
    pub(super) what: Subject<'a>,
    pub(super) nodes: Vec<Node<'a>>,
    /// Directories that hide the ones below, and deleted names per directory.
    whiteouts: Vec<(NodeId, &'a [u8])>,
    /// Names gone through for links so far.
    steps: Cell<usize>,
}

pub(super) struct Node<'a> {
    /// What describes it; none for the root and parents that no entry names.
    pub(super) entry: Option<&'a FileEntry>,
    pub(super) body: NodeBody<'a>,
}

pub(super) enum NodeBody<'a> {
    Directory {
        children: BTreeMap<&'a [u8], NodeId>,
        opaque: bool,
    },
    Whiteout,
    /// Anything else; the entry says what.
    Leaf,
}

impl<'a> Node<'a> {
    fn directory(entry: Option<&'a FileEntry>) -> Self {
        let body = NodeBody::Directory {
            children: BTreeMap::new(),
            opaque: false,
        };
        Self { entry, body }
    }

    fn child(&self, name: &[u8]) -> Option<NodeId> {
        match &self.body {
            NodeBody::Directory { children, .. } => children.get(name).copied(),
            NodeBody::Whiteout | NodeBody::Leaf => None,
        }
    }

    pub(super) fn is_directory(&self) -> bool {
        matches!(self.body, NodeBody::Directory { .. })
    }
}

impl<'a> Draft<'a> {
    fn new(what: Subject<'a>) -> Self {
        Self {
            what,
            nodes: vec![Node::directory(None)],
            whiteouts: Vec::new(),
            steps: Cell::new(0),
        }
    }

    /// Puts one entry in its place.
    fn place(&mut self, entry: &'a FileEntry) -> Result<()> {
        check_entry(self.what, entry)?;
        if entry.path.is_empty() {
            return self.place_root(entry);
        }
        let (dir, name) = split_last(&entry.path);
        let parent = self.make_parents(&entry.path, dir)?;
        match Name::of(name) {
            Name::Plain | Name::Reserved => self.place_file(parent, name, entry),
            Name::Opaque => {
                self.set_opaque(parent);
                Ok(())
            }
            Name::Whiteout(deleted) => {
                self.whiteouts.push((parent, deleted));
                Ok(())
            }
            Name::Empty => Err(self
                .what
                .malformed(&entry.path, "the whiteout names no file")),
        }
    }

    fn place_root(&mut self, entry: &'a FileEntry) -> Result<()> {
        if entry.kind != FileKind::Directory {
            return Err(self.what.malformed(b"", "the root is not a directory"));
        }
        if let Some(root) = self.nodes.get_mut(ROOT) {
            root.entry = Some(entry);
        }
        Ok(())
    }

    fn place_file(&mut self, parent: NodeId, name: &'a [u8], entry: &'a FileEntry) -> Result<()> {
        let directory = entry.kind == FileKind::Directory;
        if directory
            && let Some(old) = self.child(parent, name)
            && let Some(node) = self.nodes.get_mut(old)
            && node.is_directory()
        {
            node.entry = Some(entry);
            return Ok(());
        }
        let node = if directory {
            Node::directory(Some(entry))
        } else {
            Node {
                entry: Some(entry),
                body: NodeBody::Leaf,
            }
        };
        self.insert(parent, name, node, &entry.path)?;
        Ok(())
    }

    /// The directory `dir`, made where it is missing or where a file stands in the way. A
    /// symbolic link of an earlier entry is followed.
    fn make_parents(&mut self, path: &[u8], dir: &'a [u8]) -> Result<NodeId> {
        if let Some(made) = self.make(path, components(dir))? {
            return Ok(made);
        }
        let names = self.follow(path, dir)?;
        // What was followed has no symbolic links any more.
        let made = self.make(path, names.into_iter())?;
        made.ok_or_else(|| self.what.malformed(path, "a symbolic link leads to itself"))
    }

    /// The directory with these names, from the root; none once a symbolic link is met.
    fn make(
        &mut self,
        path: &[u8],
        names: impl Iterator<Item = &'a [u8]>,
    ) -> Result<Option<NodeId>> {
        let mut at = ROOT;
        for (depth, name) in names.enumerate() {
            if depth >= DEPTH_MAX {
                let rule = format!("lies deeper than {DEPTH_MAX} directories");
                return Err(self.what.limit(path, &rule));
            }
            check_name(self.what, path, name)?;
            if !matches!(Name::of(name), Name::Plain | Name::Reserved) {
                return Err(self.what.malformed(path, "a whiteout has files below it"));
            }
            at = match self.child(at, name) {
                Some(old) if self.nodes.get(old).is_some_and(Node::is_directory) => old,
                Some(old) if self.symlink(old).is_some() => return Ok(None),
                Some(_) | None => self.insert(at, name, Node::directory(None), path)?,
            };
        }
        Ok(Some(at))
    }

    /// Names a new node, over whatever had the name before.
    fn insert(
        &mut self,
        parent: NodeId,
        name: &'a [u8],
        node: Node<'a>,
        path: &[u8],
    ) -> Result<NodeId> {
        if self.nodes.len() >= INODES_MAX {
            let rule = format!("the layer holds more than {INODES_MAX} files");
            return Err(self.what.limit(path, &rule));
        }
        let id = self.nodes.len();
        self.nodes.push(node);
        if let Some(NodeBody::Directory { children, .. }) = self.body_mut(parent) {
            children.insert(name, id);
        }
        Ok(id)
    }

    /// Whiteouts speak of the layers below, so they come last, whatever their order: a file
    /// of this layer hides what lies below by itself, a directory does once it is opaque.
    fn apply_whiteouts(&mut self) -> Result<()> {
        for (parent, name) in std::mem::take(&mut self.whiteouts) {
            match self.child(parent, name) {
                Some(same) => self.set_opaque(same),
                None => {
                    let node = Node {
                        entry: None,
                        body: NodeBody::Whiteout,
                    };
                    self.insert(parent, name, node, name)?;
                }
            }
        }
        Ok(())
    }

    /// Does nothing to what is not a directory.
    fn set_opaque(&mut self, id: NodeId) {
        if let Some(NodeBody::Directory { opaque, .. }) = self.body_mut(id) {
            *opaque = true;
        }
    }

    fn body_mut(&mut self, id: NodeId) -> Option<&mut NodeBody<'a>> {
        self.nodes.get_mut(id).map(|node| &mut node.body)
    }

    fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        self.nodes.get(parent)?.child(name)
    }

    /// What `path` names, itself not followed; the directories above it are.
    fn lookup(&self, link: &FileEntry, path: &'a [u8]) -> Result<Option<NodeId>> {
        self.step(&link.path, components(path).count())?;
        let mut names = components(path);
        if let Some(found) = names.try_fold(ROOT, |at, name| self.child(at, name)) {
            return Ok(Some(found));
        }
        let (dir, name) = split_last(path);
        let names = self.follow(&link.path, dir)?;
        let dir = names
            .into_iter()
            .try_fold(ROOT, |at, name| self.child(at, name));
        Ok(dir.and_then(|dir| self.child(dir, name)))
    }

    /// The node that `link` is another name of, through any links between.
    pub(super) fn resolve(&self, link: &'a FileEntry, target: &'a [u8]) -> Result<NodeId> {
        let fail = |rule: &str| {
            let target = target.escape_ascii();
            let rule = format!("hard link to /{target}, which {rule}");
            self.what.malformed(&link.path, &rule)
        };
        let mut target = target;
        for _ in 0..LINK_CHAIN_MAX {
            let id = self.lookup(link, target)?;
            let id = id.ok_or_else(|| fail("does not exist"))?;
            let Some(node) = self.nodes.get(id) else {
                return Err(fail("does not exist"));
            };
            match (&node.body, node.entry) {
                (NodeBody::Directory { .. }, _) => return Err(fail("is a directory")),
                (NodeBody::Whiteout, _) | (NodeBody::Leaf, None) => {
                    return Err(fail("does not exist"));
                }
                (NodeBody::Leaf, Some(entry)) => match &entry.kind {
                    FileKind::Hardlink { target: next } => target = next,
                    FileKind::Directory
                    | FileKind::Regular { .. }
                    | FileKind::Symlink { .. }
                    | FileKind::CharDevice { .. }
                    | FileKind::BlockDevice { .. }
                    | FileKind::Fifo => return Ok(id),
                },
            }
        }
        Err(fail("leads in a circle or through too many links"))
    }
}
