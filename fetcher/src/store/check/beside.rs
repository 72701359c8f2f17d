//! Verifying what a layer keeps beside its data.
//!
//! Everything that has a checksum is read and compared: all of the index file, with the details
//! of spans of which nothing is present; the index as it was made; seams; entries; the origin.
//! Digests that were learned are compared with the data, by who checks that.
//!
//! Invariant: nothing goes that was right when it was looked at under the layer's lock. What
//! only helps and does not check out is removed, or as if it had never come. An index that does
//! not gives way to the one that it was made from; where there is none, the layer counts as
//! damaged from now on, and who opens it next makes it again. Never touches data.

use std::path::Path;

use crate::index::seams::{SEAMS_LEN_MAX, Seams};
use crate::index::{ChunkId, LayerIndex};
use crate::store::details::{self, Compared};
use crate::store::entries::{self, ENTRIES};
use crate::store::file::{INDEX, PLAIN, SEAMS, lock_layer};
use crate::store::origin::{self, ORIGIN};
use crate::store::{Store, learned, read_bounded};
use crate::types::Digest;
use crate::{Error, Result};

/// What is said of details that came from elsewhere and are not right any more.
const DETAILS: &str = "details";

/// What is not right.
#[derive(Default)]
struct Found {
    /// Names of files that only help.
    helps: Vec<&'static str>,
    /// Why the index cannot be used.
    index: Option<Error>,
    /// Whether there is another one that is right.
    has_plain: bool,
    /// Spans of an index that came without details, whose details are wrong.
    details: Option<(Compared, Vec<u32>)>,
    /// Chunks whose records of entries are wrong.
    entries: Vec<ChunkId>,
}

impl Found {
    fn is_sound(&self) -> bool {
        self.helps.is_empty()
            && self.index.is_none()
            && self.details.is_none()
            && self.entries.is_empty()
    }
}

/// Compares what the layer keeps beside its data; names of files that were damaged, each gone
/// now, or without what was wrong in it. An error where the layer cannot be read any more.
pub(super) fn check(store: &Store, digest: &Digest) -> Result<Vec<&'static str>> {
    let dir = store.layer_dir(digest);
    let look = |dir: &Path| look(dir).map_err(|error| details::unusable(digest, error));
    if look(&dir)?.is_sound() {
        return Ok(Vec::new());
    }
    let Some(_lock) = lock_layer(&dir)? else {
        return Ok(Vec::new());
    };
    // Somebody may have been writing it.
    let found = look(&dir)?;
    if found.is_sound() {
        return Ok(Vec::new());
    }
    mend(store, (digest, &dir), found)
}

fn look(dir: &Path) -> Result<Found> {
    let mut found = Found::default();
    if origin::is_damaged(dir)? {
        found.helps.push(ORIGIN);
    }
    if are_damaged(dir)? {
        found.helps.push(SEAMS);
    }
    let plain = compare(&dir.join(PLAIN))?;
    let plain = match plain {
        Some(Ok(plain)) if plain.is_whole() => Some(plain),
        Some(_) => {
            found.helps.push(PLAIN);
            None
        }
        None => None,
    };
    found.has_plain = plain.is_some();
    let current = match compare(&dir.join(INDEX))? {
        Some(Ok(current)) => current,
        Some(Err(error)) => {
            found.index = Some(error);
            return Ok(found);
        }
        None if found.has_plain => {
            let what = format!("layer directory {}", dir.display());
            found.index = Some(Error::malformed(what, "it has no index"));
            return Ok(found);
        }
        // Who opens the layer tells what that means.
        None => return Ok(found),
    };
    let made = plain.as_ref().unwrap_or(&current);
    match wrong_entries(dir, &made.index)? {
        Some(wrong) => found.entries = wrong,
        None => found.helps.push(ENTRIES),
    }
    if !current.wrong.is_empty() {
        let wrong = current.wrong.clone();
        found.details = Some((current, wrong));
    }
    Ok(found)
}

/// The index file at `path`, or why it cannot be used; `None` where there is none.
fn compare(path: &Path) -> Result<Option<Result<Compared>>> {
    match details::compare(path) {
        Ok(compared) => Ok(Some(Ok(compared))),
        Err(error @ (Error::Malformed { .. } | Error::Corrupt { .. })) => Ok(Some(Err(error))),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the layer has seams that do not check out.
fn are_damaged(dir: &Path) -> Result<bool> {
    let seams = match read_bounded(&dir.join(SEAMS), SEAMS_LEN_MAX) {
        Ok(bytes) => Seams::parse(bytes.into()).and_then(|seams| seams.check_frames()),
        Err(error) => Err(error),
    };
    match seams {
        Ok(()) => Ok(false),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error @ Error::Io { .. }) => Err(error),
        Err(_) => Ok(true),
    }
}

/// Chunks whose records of entries do not check out; `None` where none of the file can.
fn wrong_entries(dir: &Path, made: &LayerIndex) -> Result<Option<Vec<ChunkId>>> {
    let Some(entries) = entries::open(dir)? else {
        return Ok(Some(Vec::new()));
    };
    match learned::open(dir, made) {
        Ok(Some(learned)) => entries.wrong(made, |id| learned.read(id)),
        Ok(None) => Ok(None),
        // Who opens the layer tells of it.
        Err(Error::Malformed { .. }) => Ok(Some(Vec::new())),
        Err(error) => Err(error),
    }
}

/// Removes what is not right. The caller holds the layer's lock.
fn mend(store: &Store, (digest, dir): (&Digest, &Path), found: Found) -> Result<Vec<&'static str>> {
    let disk = store.disk();
    let mut damaged = found.helps;
    for name in &damaged {
        let path = dir.join(name);
        let removed = disk.remove_file(&path);
        removed.map_err(|e| Error::io("remove", path, e))?;
    }
    if !found.entries.is_empty()
        && let Some(entries) = entries::open(dir)?
    {
        entries.erase(disk, &found.entries)?;
        damaged.push(ENTRIES);
    }
    if let Some((compared, wrong)) = found.details {
        compared.erase(disk, &wrong)?;
        damaged.push(DETAILS);
    }
    let index = dir.join(INDEX);
    let outcome = match found.index {
        None => Ok(()),
        Some(_) if found.has_plain => {
            damaged.push(INDEX);
            let back = disk.rename(&dir.join(PLAIN), &index);
            back.map_err(|e| Error::io("replace", &index, e))
        }
        Some(error @ Error::Corrupt { .. }) => {
            // Its tables are right, and would be read on with.
            let removed = disk.remove_file(&index);
            removed.map_err(|e| Error::io("remove", &index, e))?;
            Err(error)
        }
        Some(error) => Err(error),
    };
    disk.sync_dir(dir).map_err(|e| Error::io("sync", dir, e))?;
    store.forget_layer(digest);
    tracing::warn!(%digest, ?damaged, "files beside the data of a layer were damaged");
    outcome.map(|()| damaged)
}
