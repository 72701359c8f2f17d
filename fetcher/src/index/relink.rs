//! Hard links to what a later entry took the name of.
//!
//! A link in a tar means the file that has its target's name by then; in a file table it means
//! the one that has it in the end. Invariant: after [`to_earlier_files`] both are the same for
//! every link whose target comes before it; payloads keep their order. Linear in the length
//! of all paths. What it cannot tell apart it refuses, never guesses.

use std::collections::{HashMap, HashSet};

use super::{FileEntry, FileKind};

/// Has hard links lead to the files that they meant. A file whose own name is taken gets that
/// of the first such link, in the place of it. `Err` is the link that cannot be, and why.
pub(super) fn to_earlier_files(files: &mut Vec<FileEntry>) -> Result<(), (Vec<u8>, &'static str)> {
    let Plan { heirs, renamed } = plan(files);
    if heirs.is_empty() && renamed.is_empty() {
        return Ok(());
    }
    if let Some(link) = stuck(files, &heirs) {
        let path = files.get(link).map(|link| link.path.clone());
        let rule = "it is a hard link to what the layer replaces later; \
                    rebuild the layer without the duplicate";
        return Err((path.unwrap_or_default(), rule));
    }
    let path_of = |at: &usize| files.get(*at).map(|file| file.path.clone());
    let targets: Vec<_> = renamed
        .iter()
        .filter_map(|(link, to)| Some((*link, path_of(heirs.get(to).unwrap_or(to))?)))
        .collect();
    let names: Vec<_> = heirs
        .iter()
        .filter_map(|(file, link)| Some((*file, path_of(link)?)))
        .collect();
    for (link, path) in targets {
        if let Some(FileKind::Hardlink { target }) = files.get_mut(link).map(|link| &mut link.kind)
        {
            *target = path;
        }
    }
    for (file, path) in names {
        if let Some(file) = files.get_mut(file) {
            file.path = path;
        }
    }
    let gone: HashSet<usize> = heirs.into_values().collect();
    let mut at = 0..;
    files.retain(|_| at.next().is_none_or(|at| !gone.contains(&at)));
    Ok(())
}

/// What to do; all numbers are positions in the file table.
#[derive(Default)]
struct Plan {
    /// Files whose names are taken, and the link each one gets the name of.
    heirs: HashMap<usize, usize>,
    /// Other links, and the files they mean.
    renamed: Vec<(usize, usize)>,
}

fn plan(files: &[FileEntry]) -> Plan {
    let links = || {
        let target = |(at, file): (usize, &'_ FileEntry)| match &file.kind {
            FileKind::Hardlink { .. } => Some(at),
            _ => None,
        };
        files.iter().enumerate().filter_map(target)
    };
    // The names that count, and who has them by now.
    let mut holder: HashMap<&[u8], Option<usize>> = HashMap::new();
    for file in links().filter_map(|at| files.get(at)) {
        if let FileKind::Hardlink { target } = &file.kind {
            holder.insert(target, None);
            holder.insert(&file.path, None);
        }
    }
    // Of each link the entry it names, and the file that is.
    let mut meant: HashMap<usize, (usize, usize)> = HashMap::new();
    for (at, file) in files.iter().enumerate() {
        if let FileKind::Hardlink { target } = &file.kind
            && let Some(named) = holder.get(target.as_slice()).copied().flatten()
        {
            let is_link = files.get(named).is_some_and(is_hard_link);
            let root = match meant.get(&named) {
                Some((_, root)) => Some(*root),
                None => (!is_link).then_some(named),
            };
            meant.extend(root.map(|root| (at, (named, root))));
        }
        if let Some(has) = holder.get_mut(file.path.as_slice()) {
            *has = Some(at);
        }
    }
    let has = |at: usize| {
        let file = files.get(at)?;
        holder.get(file.path.as_slice()).copied().flatten()
    };
    let mut plan = Plan::default();
    for link in links().filter(|link| has(*link) == Some(*link)) {
        let Some((named, file)) = meant.get(&link).copied() else {
            continue;
        };
        let is_directory = files
            .get(file)
            .is_none_or(|f| f.kind == FileKind::Directory);
        if is_directory || has(named) == Some(named) {
            continue;
        }
        if has(file) == Some(file) || plan.heirs.contains_key(&file) {
            plan.renamed.push((link, file));
        } else {
            plan.heirs.insert(file, link);
        }
    }
    plan
}

/// An heir whose name may be another place, or taken, where its file comes in the table:
/// something but a directory is above it, or the name is used between the two.
fn stuck(files: &[FileEntry], heirs: &HashMap<usize, usize>) -> Option<usize> {
    let name = |link: &usize| Some(files.get(*link)?.path.as_slice());
    let mut spans: HashMap<&[u8], (usize, usize)> = HashMap::new();
    let mut above: HashMap<&[u8], usize> = HashMap::new();
    for (file, link) in heirs {
        let Some(name) = name(link) else { continue };
        spans.insert(name, (*file, *link));
        above.extend(parents(name).map(|parent| (parent, *link)));
    }
    for (at, file) in files.iter().enumerate() {
        if let Some(link) = above.get(file.path.as_slice())
            && file.kind != FileKind::Directory
        {
            return Some(*link);
        }
        let names = parents(&file.path).chain([file.path.as_slice()]);
        for (from, link) in names.filter_map(|name| spans.get(name)) {
            if *from < at && at < *link {
                return Some(*link);
            }
        }
    }
    None
}

fn is_hard_link(file: &FileEntry) -> bool {
    matches!(file.kind, FileKind::Hardlink { .. })
}

/// The directories that `path` lies in, but the root.
pub(super) fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
    slashes.filter_map(|(at, _)| path.get(..at))
}

#[cfg(test)]
mod tests;
