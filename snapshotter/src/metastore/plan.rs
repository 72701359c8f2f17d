//! The rules by which snapshots change, containerd's.
//!
//! Pure: each function looks at records and returns the changes. Invariant: a parent is
//! always committed and exists as long as it has children.

use super::{
    CHAIN_MAX, Change, Content, KEY_LEN_MAX, Kind, LABEL_LEN_MAX, LABELS_MAX, Labels, Record,
    Records, Relabel, Usage,
};
use crate::idmap::{GID_LABEL, UID_LABEL};
use crate::{Error, Result};
use lazarette_fetcher::types::Digest;

/// A new active snapshot or view.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Create<'a> {
    pub(crate) key: &'a str,
    pub(crate) kind: Kind,
    pub(crate) parent: Option<&'a str>,
    pub(crate) content: Content,
    pub(crate) labels: &'a Labels,
    /// Seconds since 1970.
    pub(crate) now: i64,
}

/// Makes a record, if its key is free and its parent committed.
pub(crate) fn create(records: &dyn Records, new: Create<'_>) -> Result<Vec<Change>> {
    check_key(new.key)?;
    check_labels(new.labels)?;
    must_be_free(records, new.key)?;
    if let Some(parent) = new.parent {
        check_parent(records, new.key, parent, new.kind)?;
    }
    Ok(vec![Change::Put(Record {
        key: new.key.to_owned(),
        kind: new.kind,
        parent: new.parent.map(str::to_owned),
        content: new.content,
        labels: new.labels.clone(),
        created: new.now,
        updated: new.now,
        usage: None,
    })])
}

/// Makes a lazy layer a committed snapshot.
pub(crate) fn commit_layer(
    records: &dyn Records,
    new: Create<'_>,
    blob_digest: Digest,
) -> Result<Vec<Change>> {
    let new = Create {
        kind: Kind::Committed,
        content: Content::Layer(blob_digest),
        ..new
    };
    let mut changes = create(records, new)?;
    for change in &mut changes {
        if let Change::Put(record) = change {
            // Its bytes belong to the store, which accounts for them.
            record.usage = Some(Usage::default());
        }
    }
    Ok(changes)
}

/// What turns an active snapshot into a committed one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Commit<'a> {
    pub(crate) name: &'a str,
    pub(crate) key: &'a str,
    /// What it shall lie on; only one that was made on nothing may be moved.
    pub(crate) parent: Option<&'a str>,
    pub(crate) labels: &'a Labels,
    pub(crate) usage: Usage,
    pub(crate) now: i64,
}

/// Renames an active snapshot to its final name and closes it.
pub(crate) fn commit(records: &dyn Records, commit: Commit<'_>) -> Result<Vec<Change>> {
    check_key(commit.name)?;
    check_labels(commit.labels)?;
    // First: who asks a second time learns that it was done.
    must_be_free(records, commit.name)?;
    let record = must_exist(records, commit.key)?;
    if record.kind != Kind::Active {
        return Err(Error::Precondition {
            op: "commit",
            key: commit.key.to_owned(),
            detail: "it is not active".to_owned(),
        });
    }
    let parent = match (&record.parent, commit.parent) {
        (below, None) => below.clone(),
        (Some(below), Some(parent)) if below == parent => Some(parent.to_owned()),
        (Some(_), Some(parent)) => {
            return Err(Error::Invalid {
                what: "parent",
                input: parent.to_owned(),
                detail: "the snapshot was made on another one",
            });
        }
        (None, Some(parent)) => {
            check_parent(records, commit.name, parent, Kind::Committed)?;
            Some(parent.to_owned())
        }
    };
    Ok(vec![
        Change::Delete(record.key),
        Change::Put(Record {
            key: commit.name.to_owned(),
            kind: Kind::Committed,
            parent,
            labels: commit.labels.clone(),
            updated: commit.now,
            usage: Some(commit.usage),
            ..record
        }),
    ])
}

/// Forgets a snapshot that no other one lies on.
pub(crate) fn remove(records: &dyn Records, key: &str) -> Result<(Record, Vec<Change>)> {
    let record = must_exist(records, key)?;
    let child = records.find(&|other| other.parent.as_deref() == Some(key))?;
    if let Some(child) = child {
        return Err(Error::Precondition {
            op: "remove",
            key: key.to_owned(),
            detail: format!("snapshot {:?} lies on it; remove that first", child.key),
        });
    }
    Ok((record, vec![Change::Delete(key.to_owned())]))
}

/// The snapshot with changed labels.
pub(crate) fn relabel(
    records: &dyn Records,
    key: &str,
    change: &Relabel,
    now: i64,
) -> Result<Record> {
    let record = must_exist(records, key)?;
    let mut labels = match change {
        Relabel::All(labels) => labels.clone(),
        Relabel::Some(some) => {
            let mut labels = record.labels.clone();
            labels.extend(some.clone());
            labels
        }
    };
    labels.retain(|_, value| !value.is_empty());
    check_labels(&labels)?;
    if record.kind != Kind::Committed {
        check_maps(&record.labels, &labels)?;
    }
    Ok(Record {
        labels,
        updated: now,
        ..record
    })
}

/// Whether the files of some snapshot are those of this layer.
pub(crate) fn is_named(records: &dyn Records, blob_digest: &Digest) -> Result<bool> {
    let content = Content::Layer(*blob_digest);
    let named = records.find(&|record| record.content == content)?;
    Ok(named.is_some())
}

/// The snapshot `key` and everything below it, topmost first. Empty for `None`.
pub(crate) fn chain(records: &dyn Records, key: Option<&str>) -> Result<Vec<Record>> {
    let mut chain: Vec<Record> = Vec::new();
    let mut next = key.map(str::to_owned);
    while let Some(key) = next.take() {
        // The topmost may itself lie on CHAIN_MAX others; more means a circle.
        if chain.len() > CHAIN_MAX {
            let detail = format!("more than {CHAIN_MAX} parents");
            return Err(lazarette_fetcher::Error::malformed("snapshot records", detail).into());
        }
        let record = must_exist(records, &key)?;
        next.clone_from(&record.parent);
        chain.push(record);
    }
    Ok(chain)
}

/// Whether `key`, of this kind, may lie on `parent`.
fn check_parent(records: &dyn Records, key: &str, parent: &str, kind: Kind) -> Result<()> {
    let below = must_exist(records, parent)?;
    if below.kind != Kind::Committed {
        return Err(Error::Invalid {
            what: "parent",
            input: parent.to_owned(),
            detail: "it is not committed",
        });
    }
    // A committed one will lie below something itself.
    let depth = chain(records, Some(parent))?.len() + usize::from(kind == Kind::Committed);
    if depth > CHAIN_MAX {
        let detail = format!("it makes {depth} layers, overlay takes {CHAIN_MAX}");
        return Err(lazarette_fetcher::Error::limit(format!("snapshot {key:?}"), detail).into());
    }
    Ok(())
}

fn must_exist(records: &dyn Records, key: &str) -> Result<Record> {
    records.get(key)?.ok_or_else(|| Error::NotFound {
        key: key.to_owned(),
    })
}

fn must_be_free(records: &dyn Records, key: &str) -> Result<()> {
    match records.get(key)? {
        None => Ok(()),
        Some(_) => Err(Error::AlreadyExists {
            key: key.to_owned(),
        }),
    }
}

fn check_labels(labels: &Labels) -> Result<()> {
    let bad = |input: &str, detail| {
        Err(Error::Invalid {
            what: "label",
            input: input.chars().take(64).collect(),
            detail,
        })
    };
    if let Some((key, _)) = labels.iter().nth(LABELS_MAX) {
        return bad(key, "there are more than 256 labels");
    }
    for (key, value) in labels {
        if key.is_empty() {
            return bad(value, "its key is empty");
        }
        if key.len() + value.len() > LABEL_LEN_MAX {
            return bad(key, "its key and value take more than 4096 bytes");
        }
    }
    Ok(())
}

/// What has been written to a snapshot was written with the owners that it was made with.
fn check_maps(before: &Labels, after: &Labels) -> Result<()> {
    for label in [UID_LABEL, GID_LABEL] {
        if before.get(label) != after.get(label) {
            return Err(Error::Invalid {
                what: "label",
                input: label.to_owned(),
                detail: "owners of a snapshot are mapped as they were when it was made",
            });
        }
    }
    Ok(())
}

fn check_key(key: &str) -> Result<()> {
    let detail = if key.is_empty() {
        "it is empty"
    } else if key.len() > KEY_LEN_MAX {
        "it is longer than 1024 bytes"
    } else if key.contains('\0') {
        "it holds a NUL"
    } else {
        return Ok(());
    };
    Err(Error::Invalid {
        what: "snapshot key",
        input: key.chars().take(64).collect(),
        detail,
    })
}
