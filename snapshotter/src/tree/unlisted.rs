//! Directories that a layer has something in and does not list.
//!
//! In a tree they are `root:root` 0755, as docker unpacks them, and overlay shows that in place of
//! what the layers below say: a `/tmp` that not everybody may write to. Containerd, where it
//! unpacks, gives them what they have below. Pure. Takes paths as they are spelt: what is below a
//! symbolic link is not followed, and a name that is deleted in between hides nothing. The root is
//! left out: of that containerd keeps no more than the owner.

use std::collections::{HashMap, HashSet};

use lazarette_fetcher::index::{FileEntry, FileKind, LayerIndex};

use super::check::split_last;
use super::freeze::{SYNTHESISED, attr};
use super::name::OVERLAY_XATTRS;

/// What a layer does not list, and no layer that was looked at lists either.
#[derive(Debug)]
pub struct Unlisted<'a>(HashSet<&'a [u8]>);

impl<'a> Unlisted<'a> {
    /// Those of a layer. There are no more than its tree has inodes.
    pub fn of(index: &'a LayerIndex) -> Self {
        let leads = |entry: &&FileEntry| {
            matches!(entry.kind, FileKind::Directory | FileKind::Symlink { .. })
        };
        let listed: HashSet<&[u8]> = index
            .files
            .iter()
            .filter(leads)
            .map(|entry| entry.path.as_slice())
            .collect();
        let mut unlisted = HashSet::new();
        // Most entries lie where the one before does.
        let mut last: &[u8] = b"";
        for entry in &index.files {
            let mut dir = split_last(&entry.path).0;
            if std::mem::replace(&mut last, dir) == dir {
                continue;
            }
            while !dir.is_empty() && !listed.contains(dir) && unlisted.insert(dir) {
                dir = split_last(dir).0;
            }
        }
        Self(unlisted)
    }

    /// Whether nothing is left to look for.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first of them that the layer `below` gives another mode, owner or attribute than
    /// they are shown with. What it lists is not looked for any further down.
    pub fn differs(&mut self, below: &LayerIndex) -> Option<&'a [u8]> {
        let mut found: HashMap<&'a [u8], &FileEntry> = HashMap::new();
        for entry in &below.files {
            if entry.kind == FileKind::Directory
                && let Some(path) = self.0.get(entry.path.as_slice())
            {
                // The last of several is the one that counts.
                found.insert(*path, entry);
            }
        }
        self.0.retain(|path| !found.contains_key(path));
        let differing = found.iter().filter(|(_, entry)| !is_made_up(entry));
        differing.map(|(path, _)| *path).min()
    }
}

/// Whether a directory that no entry describes looks like this one, but for its time.
fn is_made_up(entry: &FileEntry) -> bool {
    let like = super::Attr {
        mtime: SYNTHESISED.mtime,
        ..attr(entry)
    };
    let shown = |(name, _): &(Vec<u8>, Vec<u8>)| !name.starts_with(OVERLAY_XATTRS);
    like == SYNTHESISED && !entry.xattrs.iter().any(shown)
}
