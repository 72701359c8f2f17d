//! Follows symbolic links within a draft, as docker and containerd do when they unpack.
//!
//! Invariant: pure and bounded, for each path and for the layer, and never above the root of
//! the layer: `..` stops there, and absolute targets start there. Links of the layers below are
//! not seen, as these tools do not see them where they unpack for overlay. What a hard link
//! shares with a symbolic link is not followed.

use lazarette_fetcher::index::FileKind;

use super::{Draft, NodeId, ROOT};
use crate::Result;
use crate::tree::check::{check_name, components};
use crate::tree::merged::{LINKS_MAX, NAMES_MAX};

/// Most names that are gone through for all links of a layer. One of a million hard links, in
/// directories eight deep, takes half of it.
const STEPS_MAX: usize = 1 << 24;

impl<'a> Draft<'a> {
    /// Counts names that are gone through for the entry `path`.
    pub(super) fn step(&self, path: &[u8], names: usize) -> Result<()> {
        let steps = self.steps.get().saturating_add(names);
        self.steps.set(steps);
        if steps > STEPS_MAX {
            let rule = format!("links of the layer lead through more than {STEPS_MAX} names");
            return Err(self.what.limit(path, &rule));
        }
        Ok(())
    }

    /// The names of the directory that `dir` leads to, from the root and without symbolic
    /// links. What does not exist is taken as it is spelt: whoever asks may make it. `path`
    /// is whose directory it is, for messages.
    pub(super) fn follow(&self, path: &[u8], dir: &'a [u8]) -> Result<Vec<&'a [u8]>> {
        // Only a link's target may have names like `..`.
        for name in components(dir) {
            check_name(self.what, path, name)?;
        }
        let mut todo: Vec<&[u8]> = components(dir).rev().collect();
        let mut found: Vec<(&[u8], Option<NodeId>)> = Vec::new();
        let mut links = 0;
        for _ in 0..NAMES_MAX {
            self.step(path, 1)?;
            let Some(name) = todo.pop() else {
                return Ok(found.into_iter().map(|(name, _)| name).collect());
            };
            match name {
                b"." => continue,
                b".." => {
                    found.pop();
                    continue;
                }
                _ => {}
            }
            let above = found.last().map_or(Some(ROOT), |(_, id)| *id);
            let child = above.and_then(|above| self.child(above, name));
            let Some(target) = child.and_then(|id| self.symlink(id)) else {
                found.push((name, child));
                continue;
            };
            links += 1;
            if links > LINKS_MAX {
                break;
            }
            if target.starts_with(b"/") {
                found.clear();
            }
            todo.extend(components(target).rev());
        }
        let rule = "symbolic links above it lead in a circle or through too many names";
        Err(self.what.malformed(path, rule))
    }

    /// The target of a symbolic link; none for anything else.
    pub(super) fn symlink(&self, id: NodeId) -> Option<&'a [u8]> {
        match &self.nodes.get(id)?.entry?.kind {
            FileKind::Symlink { target } => Some(target),
            FileKind::Directory
            | FileKind::Regular { .. }
            | FileKind::Hardlink { .. }
            | FileKind::CharDevice { .. }
            | FileKind::BlockDevice { .. }
            | FileKind::Fifo => None,
        }
    }
}
