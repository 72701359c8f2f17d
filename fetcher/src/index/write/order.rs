//! Which entries to write, and in which order (pure).
//!
//! Invariant: every hard link comes after the entry it links to, every prioritised entry
//! after its parent directories and the whiteouts of it and of these, and no path comes
//! twice. Extracting the result leaves the same files as extracting the input.

use std::collections::HashMap;

use super::Fault;
use super::entry::Kind;
use super::hot::{HotFiles, OPAQUE, WHITEOUT, join, split};
use super::scan::Scanned;

/// What to write. Numbers are positions in the scanned entries.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Before the landmark.
    pub(super) front: Vec<usize>,
    /// After it.
    pub(super) rest: Vec<usize>,
}

/// Plans the order of `entries` with the hot files first, as far as they are there.
pub(super) fn order(entries: &[Scanned], hot: Option<&HotFiles>) -> Result<Plan, Fault> {
    let live = Live::new(entries);
    let targets = link_targets(entries, &live)?;
    let mut placer = Placer {
        entries,
        live: &live,
        targets: &targets,
        placed: vec![false; entries.len()],
        front: Vec::new(),
    };
    for file in hot.iter().flat_map(|hot| &hot.files) {
        if let Some(index) = live.find(&file.path) {
            placer.place(index);
        }
    }
    let Placer { placed, front, .. } = placer;
    let rest = placed
        .iter()
        .enumerate()
        .filter(|(index, placed)| !**placed && !live.is_dropped(*index))
        .map(|(index, _)| index)
        .collect();
    Ok(Plan { front, rest })
}

/// Which entries are left when the whole tar has been extracted.
struct Live<'a> {
    /// The last entry of each path.
    last: HashMap<&'a str, usize>,
    dropped: Vec<bool>,
}

impl<'a> Live<'a> {
    fn new(entries: &'a [Scanned]) -> Self {
        let mut last = HashMap::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            // GNU tar stores a file that is named twice as a link to itself.
            if !links_to_itself(entry) {
                last.insert(entry.meta.name.as_str(), index);
            }
        }
        let replaced = |index: usize, entry: &Scanned| {
            last.get(entry.meta.name.as_str()) != Some(&index)
                || parents(&entry.meta.name).any(|parent| {
                    // A later file in the place of a directory takes its children along.
                    last.get(parent).is_some_and(|at| {
                        *at > index && kind(entries, *at) != Some(Kind::Directory)
                    })
                })
        };
        let dropped = entries
            .iter()
            .enumerate()
            .map(|(index, entry)| replaced(index, entry))
            .collect();
        Self { last, dropped }
    }

    fn is_dropped(&self, index: usize) -> bool {
        self.dropped.get(index).copied().unwrap_or(true)
    }

    fn find(&self, name: &str) -> Option<usize> {
        let index = self.last.get(name).copied()?;
        (!self.is_dropped(index)).then_some(index)
    }
}

/// For each entry that is a hard link: the entry it links to.
fn link_targets(entries: &[Scanned], live: &Live<'_>) -> Result<HashMap<usize, usize>, Fault> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let mut targets = HashMap::new();
    for (index, entry) in entries.iter().enumerate() {
        if links_to_itself(entry) {
            continue;
        }
        let meta = &entry.meta;
        if meta.kind == Kind::Hardlink && !live.is_dropped(index) {
            let target = seen.get(meta.link.as_str()).copied();
            let target = target.filter(|at| kind(entries, *at) != Some(Kind::Directory));
            let target = target.ok_or_else(|| {
                Fault::malformed(format!(
                    "it is a hard link to {:?}, which is no file before it in this layer",
                    meta.link
                ))
                .about(&meta.name)
            })?;
            if live.is_dropped(target) {
                return Err(Fault::unsupported(format!(
                    "it is a hard link to {:?}, which the layer replaces later; \
                     rebuild the layer without the duplicate",
                    meta.link
                ))
                .about(&meta.name));
            }
            targets.insert(index, target);
        }
        seen.insert(&meta.name, index);
    }
    Ok(targets)
}

/// Moves entries to the front, with what must come before them.
struct Placer<'a> {
    entries: &'a [Scanned],
    live: &'a Live<'a>,
    targets: &'a HashMap<usize, usize>,
    placed: Vec<bool>,
    front: Vec<usize>,
}

impl Placer<'_> {
    fn place(&mut self, index: usize) {
        // A link's target is an earlier entry, so the chain ends.
        let mut chain = vec![index];
        while let Some(target) = chain.last().and_then(|at| self.targets.get(at)) {
            chain.push(*target);
        }
        if chain.iter().any(|at| self.is_below_a_file(*at)) {
            return;
        }
        for index in chain.into_iter().rev() {
            let entries = self.entries;
            let Some(Scanned { meta, .. }) = entries.get(index) else {
                continue;
            };
            for parent in parents(&meta.name) {
                self.put_whiteout_of(parent);
                if let Some(at) = self.live.find(parent)
                    && kind(self.entries, at) == Some(Kind::Directory)
                {
                    self.put(at);
                }
                self.put_if_live(&join(parent, OPAQUE));
            }
            self.put_whiteout_of(&meta.name);
            self.put(index);
        }
    }

    /// Whether a symbolic link above it says where it is. Before that, it would be elsewhere.
    fn is_below_a_file(&self, index: usize) -> bool {
        self.entries.get(index).is_some_and(|entry| {
            parents(&entry.meta.name)
                .filter_map(|parent| self.live.find(parent))
                .any(|at| kind(self.entries, at) != Some(Kind::Directory))
        })
    }

    /// A whiteout speaks of the layers below only, but docker and containerd delete what
    /// they find at its name, of its own layer too; an opaque one, what lies in directories
    /// that no entry of the layer names.
    fn put_whiteout_of(&mut self, name: &str) {
        let (parent, last) = split(name);
        self.put_if_live(&join(parent, &format!("{WHITEOUT}{last}")));
    }

    fn put_if_live(&mut self, name: &str) {
        if let Some(at) = self.live.find(name) {
            self.put(at);
        }
    }

    fn put(&mut self, index: usize) {
        if let Some(placed) = self.placed.get_mut(index).filter(|placed| !**placed) {
            *placed = true;
            self.front.push(index);
        }
    }
}

fn kind(entries: &[Scanned], index: usize) -> Option<Kind> {
    entries.get(index).map(|entry| entry.meta.kind)
}

fn links_to_itself(entry: &Scanned) -> bool {
    entry.meta.kind == Kind::Hardlink && entry.meta.link == entry.meta.name
}

/// The directories above `name`, the root (`""`) first; none for the root itself.
pub(super) fn parents(name: &str) -> impl Iterator<Item = &str> {
    let root = (!name.is_empty()).then_some("");
    let rest = name.match_indices('/').filter_map(|(at, _)| name.get(..at));
    root.into_iter().chain(rest)
}
