//! Between our types and containerd's.
//!
//! Pure. Invariant: an empty text means that something was not given, as proto3 has it.

use lazarette_proto::snapshots::{Info, UpdateSnapshotRequest, UsageResponse, kind};
use lazarette_proto::types::{self, Timestamp};

use crate::metastore::{Kind, Labels, Record, Relabel, Usage};
use crate::overlay::Mount;
use crate::{Error, Result};

/// What an empty text stands for.
pub(super) fn named(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

pub(super) fn mounts(mounts: &[Mount]) -> Vec<types::Mount> {
    let one = |mount: &Mount| types::Mount {
        r#type: mount.fs_type().to_owned(),
        source: mount.source().to_string_lossy().into_owned(),
        target: String::new(),
        options: mount.options(),
    };
    mounts.iter().map(one).collect()
}

pub(super) fn info(record: Record) -> Info {
    let at = |seconds| Some(Timestamp { seconds, nanos: 0 });
    Info {
        name: record.key,
        parent: record.parent.unwrap_or_default(),
        kind: match record.kind {
            Kind::View => kind::VIEW,
            Kind::Active => kind::ACTIVE,
            Kind::Committed => kind::COMMITTED,
        },
        created_at: at(record.created),
        updated_at: at(record.updated),
        labels: record.labels,
    }
}

pub(super) fn usage(usage: Usage) -> UsageResponse {
    let number = |number| i64::try_from(number).unwrap_or(i64::MAX);
    UsageResponse {
        size: number(usage.bytes),
        inodes: number(usage.inodes),
    }
}

/// Which snapshot changes, and how. The mask's paths name labels by their whole key.
pub(super) fn relabel(request: UpdateSnapshotRequest) -> Result<(String, Relabel)> {
    let Some(mut info) = request.info else {
        return Err(Error::Invalid {
            what: "update",
            input: String::new(),
            detail: "it names no snapshot",
        });
    };
    let paths = request.update_mask.unwrap_or_default().paths;
    let mut some = Labels::new();
    let mut all = paths.is_empty();
    for path in paths {
        match path.split_once('.') {
            None if path == "labels" => all = true,
            Some(("labels", key)) => {
                let value = info.labels.get(key).cloned().unwrap_or_default();
                some.insert(key.to_owned(), value);
            }
            _ => {
                return Err(Error::Invalid {
                    what: "path of an update",
                    input: path.chars().take(256).collect(),
                    detail: "only labels may change",
                });
            }
        }
    }
    let change = if all {
        Relabel::All(std::mem::take(&mut info.labels))
    } else {
        Relabel::Some(some)
    };
    Ok((info.name, change))
}

#[cfg(test)]
mod tests {
    use lazarette_proto::types::FieldMask;

    use super::*;

    fn request(paths: &[&str]) -> UpdateSnapshotRequest {
        let label = |key: &str| (key.to_owned(), format!("value of {key}"));
        UpdateSnapshotRequest {
            snapshotter: String::new(),
            info: Some(Info {
                name: "k".to_owned(),
                labels: Labels::from([label("a"), label("b.c/d")]),
                ..Info::default()
            }),
            update_mask: Some(FieldMask {
                paths: paths.iter().map(|&path| path.to_owned()).collect(),
            }),
        }
    }

    #[test]
    fn a_mask_names_labels() {
        let labels = request(&[]).info.unwrap().labels;
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let table: [(&[&str], Relabel); 4] = [
            (&[], Relabel::All(labels.clone())),
            (&["labels"], Relabel::All(labels.clone())),
            (&["labels.a", "labels"], Relabel::All(labels)),
            (
                &["labels.b.c/d", "labels.gone"],
                Relabel::Some(Labels::from([
                    pair("b.c/d", "value of b.c/d"),
                    pair("gone", ""),
                ])),
            ),
        ];
        for (paths, change) in table {
            assert_eq!(relabel(request(paths)).unwrap(), ("k".to_owned(), change));
        }
        for bad in ["name", "kind", "parent", "label", "labelsx.a", ""] {
            relabel(request(&[bad])).unwrap_err();
        }
        relabel(UpdateSnapshotRequest::default()).unwrap_err();
    }
}
