//! Which layers no container has.
//!
//! Pure. Invariant: a layer below any snapshot that is active or a view is in use, whatever a
//! record below it lacks.

use std::collections::{HashMap, HashSet};

use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::metastore::{Content, Kind, Record};

/// The layers below snapshots that something may have mounted.
pub(super) fn used(records: &[Record]) -> HashSet<Digest> {
    let by_key: HashMap<&str, &Record> = records
        .iter()
        .map(|record| (record.key.as_str(), record))
        .collect();
    let mut used = HashSet::new();
    let mut seen = HashSet::new();
    for top in records
        .iter()
        .filter(|record| record.kind != Kind::Committed)
    {
        let mut next = Some(top);
        // What was seen already has been followed to its end.
        while let Some(record) = next.filter(|record| seen.insert(record.key.as_str())) {
            if let Content::Layer(digest) = record.content {
                used.insert(digest);
            }
            let parent = record.parent.as_deref();
            next = parent.and_then(|parent| by_key.get(parent).copied());
        }
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_below_something_that_may_be_mounted() {
        let layer = |name: &str| Digest::sha256(name.as_bytes());
        let record = |key: &str, kind, parent: Option<&str>| Record {
            key: key.to_owned(),
            kind,
            parent: parent.map(str::to_owned),
            content: match kind {
                Kind::Committed => Content::Layer(layer(key)),
                Kind::Active | Kind::View => Content::Directory(1),
            },
            labels: Default::default(),
            created: 0,
            updated: 0,
            usage: None,
        };
        let committed = |key, parent| record(key, Kind::Committed, parent);
        let mut records = vec![
            committed("base", None),
            committed("top", Some("base")),
            committed("other", Some("base")),
            committed("alone", Some("gone")),
            committed("a", Some("b")),
            committed("b", Some("a")),
        ];
        assert!(used(&records).is_empty());
        records.push(record("container", Kind::Active, Some("top")));
        assert_eq!(used(&records), ["base", "top"].map(layer).into());
        for (key, below) in [("view", "alone"), ("round", "a"), ("lost", "gone")] {
            records.push(record(key, Kind::View, Some(below)));
        }
        let all = ["base", "top", "alone", "a", "b"].map(layer);
        assert_eq!(used(&records), all.into());
    }
}
