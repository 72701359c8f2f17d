//! The rules against a simple map, for every implementation of the store.

use std::collections::BTreeMap;
use std::sync::Arc;

use lazarette_fetcher::db::{Db, Table as _};
use lazarette_fetcher::types::Digest;
use proptest::prelude::{Just, Strategy, prop_oneof, proptest};
use proptest::test_runner::{Config, FileFailurePersistence};

use super::{
    Commit, Content, Create, DbMetastore, Decide, Kind, Labels, MemoryMetastore, Metastore, Record,
    SnapshotTable, Usage,
};
use crate::{Error, Result};

/// What a client may ask for; small numbers stand for names.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Create(Kind, u8, Option<u8>),
    Layer(u8, Option<u8>),
    Commit(u8, u8, Option<u8>),
    Remove(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let name = || 0..6_u8;
    let parent = || proptest::option::of(0..6_u8);
    let kind = prop_oneof![Just(Kind::Active), Just(Kind::View)];
    prop_oneof![
        (kind, name(), parent()).prop_map(|(kind, key, parent)| Op::Create(kind, key, parent)),
        (name(), parent()).prop_map(|(name, parent)| Op::Layer(name, parent)),
        (name(), name(), parent()).prop_map(|(name, key, on)| Op::Commit(name, key, on)),
        name().prop_map(Op::Remove),
    ]
}

fn create(key: &str, kind: Kind, parent: Option<&str>) -> impl FnMut(Look<'_>) -> Outcome {
    let (key, parent) = (key.to_owned(), parent.map(str::to_owned));
    move |records| {
        let labels = Labels::new();
        let new = Create {
            key: &key,
            kind,
            parent: parent.as_deref(),
            content: Content::Directory(1),
            labels: &labels,
            now: 7,
        };
        match kind {
            Kind::Committed => super::commit_layer(records, new, Digest::sha256(b"layer")),
            Kind::Active | Kind::View => super::create(records, new),
        }
    }
}

type Look<'a> = &'a dyn super::Records;
type Outcome = Result<Vec<super::Change>>;

fn commit(name: &str, key: &str, on: Option<&str>) -> impl FnMut(Look<'_>) -> Outcome {
    let (name, key, on) = (name.to_owned(), key.to_owned(), on.map(str::to_owned));
    move |records| {
        let labels = Labels::new();
        let commit = Commit {
            name: &name,
            key: &key,
            parent: on.as_deref(),
            labels: &labels,
            usage: Usage {
                bytes: 1,
                inodes: 2,
            },
            now: 8,
        };
        super::commit(records, commit)
    }
}

fn update(store: &dyn Metastore, mut decide: impl FnMut(Look<'_>) -> Outcome) -> Result<()> {
    let decide: Decide<'_> = &mut decide;
    store.update(decide)
}

fn all(store: &dyn Metastore) -> Vec<Record> {
    let mut found = Vec::new();
    store
        .read(&mut |records| {
            found = records.all()?;
            Ok(())
        })
        .unwrap();
    found
}

/// The rules once more: a map from name to state and parent.
type Model = BTreeMap<String, (Kind, Option<String>)>;

/// Applies `op` if it is allowed; says whether it was.
fn apply(model: &mut Model, op: &Op) -> bool {
    let name = |number: u8| format!("n{number}");
    let committed = |model: &Model, parent: &Option<u8>| {
        parent.is_none_or(|parent| matches!(model.get(&name(parent)), Some((Kind::Committed, _))))
    };
    match op {
        Op::Create(_, key, parent) | Op::Layer(key, parent) => {
            let allowed = !model.contains_key(&name(*key)) && committed(model, parent);
            if allowed {
                let kind = match op {
                    Op::Create(kind, ..) => *kind,
                    _ => Kind::Committed,
                };
                model.insert(name(*key), (kind, parent.map(name)));
            }
            allowed
        }
        Op::Commit(to, key, on) => match model.get(&name(*key)).cloned() {
            Some((Kind::Active, parent))
                if !model.contains_key(&name(*to))
                    && (on.is_none()
                        || on.map(name) == parent
                        || (parent.is_none() && committed(model, on))) =>
            {
                model.remove(&name(*key));
                model.insert(name(*to), (Kind::Committed, on.map(name).or(parent)));
                true
            }
            _ => false,
        },
        Op::Remove(key) => {
            let child = Some(name(*key));
            let leaf = model.values().all(|(_, parent)| *parent != child);
            leaf && model.remove(&name(*key)).is_some()
        }
    }
}

fn perform(store: &dyn Metastore, op: &Op) -> Result<()> {
    let name = |number: u8| format!("n{number}");
    match op {
        Op::Create(kind, key, parent) => {
            let parent = parent.map(name);
            update(store, create(&name(*key), *kind, parent.as_deref()))
        }
        Op::Layer(key, parent) => {
            let parent = parent.map(name);
            update(
                store,
                create(&name(*key), Kind::Committed, parent.as_deref()),
            )
        }
        Op::Commit(to, key, on) => {
            let on = on.map(name);
            update(store, commit(&name(*to), &name(*key), on.as_deref()))
        }
        Op::Remove(key) => update(store, |records| {
            super::remove(records, &name(*key)).map(|(_, changes)| changes)
        }),
    }
}

/// Runs `ops` on the store and on the model and compares after each.
pub(super) fn agrees_with_the_model(store: &dyn Metastore, ops: &[Op], between: &mut dyn FnMut()) {
    let mut model = Model::new();
    for op in ops {
        let before = all(store);
        let allowed = apply(&mut model, op);
        between();
        let done = perform(store, op);
        assert_eq!(done.is_ok(), allowed, "{op:?}: {done:?}");
        let after = all(store);
        if done.is_err() {
            assert_eq!(before, after, "{op:?} failed and changed something");
        }
        let found: Model = after
            .into_iter()
            .map(|record| (record.key, (record.kind, record.parent)))
            .collect();
        assert_eq!(found, model, "{op:?}");
    }
}

/// Random requests.
pub(super) fn ops() -> impl Strategy<Value = Vec<Op>> {
    proptest::collection::vec(op(), 0..40)
}

proptest! {
    #![proptest_config(Config {
        cases: 256,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..Config::default()
    })]

    #[test]
    fn memory_agrees_with_the_model(ops in ops()) {
        agrees_with_the_model(&MemoryMetastore::default(), &ops, &mut || {});
    }
}

fn open_db(dir: &std::path::Path) -> DbMetastore {
    DbMetastore::new(Arc::new(
        Db::open(dir.join("db"), &[SnapshotTable::NAME]).unwrap(),
    ))
}

proptest! {
    // Each case makes a database.
    #![proptest_config(Config {
        cases: 12,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..Config::default()
    })]

    #[test]
    fn the_database_agrees_with_the_model(ops in ops(), releases: Vec<bool>) {
        let dir = tempfile::tempdir().unwrap();
        let store = open_db(dir.path());
        let mut releases = releases.into_iter().cycle();
        agrees_with_the_model(&store, &ops, &mut || {
            if releases.next().unwrap_or(false) {
                store.release();
            }
        });
        // What is known by heart is what a restart finds.
        let known = all(&store);
        store.release();
        assert_eq!(all(&store), known);
    }
}

#[test]
fn records_survive_a_restart_and_are_shared_between_openers() {
    let dir = tempfile::tempdir().unwrap();
    let first = open_db(dir.path());
    update(&first, create("base", Kind::Committed, None)).unwrap();
    // What another process would do, once this one lets go.
    first.release();
    let second = open_db(dir.path());
    update(&second, create("work", Kind::Active, Some("base"))).unwrap();
    second.release();
    assert_eq!(all(&first), {
        first.release();
        all(&second)
    });
    second.release();
    update(&first, create("work", Kind::Active, None)).unwrap_err();
}

#[test]
fn refusals_say_why() {
    let store = MemoryMetastore::default();
    update(&store, create("base", Kind::Committed, None)).unwrap();
    update(&store, create("work", Kind::Active, Some("base"))).unwrap();
    let fails = |outcome: Result<()>| outcome.unwrap_err();
    let error = fails(update(&store, create("work", Kind::View, None)));
    assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
    let error = fails(update(&store, create("x", Kind::Active, Some("no"))));
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    let error = fails(update(&store, create("x", Kind::Active, Some("work"))));
    assert_eq!(
        error.to_string(),
        "invalid parent \"work\": it is not committed"
    );
    let error = fails(update(&store, create("", Kind::Active, None)));
    assert_eq!(error.to_string(), "invalid snapshot key \"\": it is empty");
    let error = fails(update(&store, commit("done", "base", None)));
    assert_eq!(
        error.to_string(),
        "cannot commit snapshot \"base\": it is not active"
    );
    let error = fails(update(&store, |records| {
        super::remove(records, "base").map(|(_, changes)| changes)
    }));
    let message =
        "cannot remove snapshot \"base\": snapshot \"work\" lies on it; remove that first";
    assert_eq!(error.to_string(), message);
}

#[test]
fn a_chain_ends_where_overlay_does() {
    let store = MemoryMetastore::default();
    let mut parent: Option<String> = None;
    for number in 0..super::CHAIN_MAX {
        let name = format!("layer{number}");
        update(&store, create(&name, Kind::Committed, parent.as_deref())).unwrap();
        parent = Some(name);
    }
    update(&store, create("top", Kind::Active, parent.as_deref())).unwrap();
    store
        .read(&mut |records| {
            let chain = super::chain(records, Some("top"))?;
            assert_eq!(chain.len(), super::CHAIN_MAX + 1);
            assert_eq!(chain[1].key, parent.clone().unwrap());
            Ok(())
        })
        .unwrap();
    update(&store, create("extra", Kind::Committed, parent.as_deref())).unwrap_err();
}

#[test]
fn a_record_survives_its_serialised_form() {
    let record = Record {
        key: "k".to_owned(),
        kind: Kind::Committed,
        parent: Some("p".to_owned()),
        content: Content::Layer(Digest::sha256(b"layer")),
        labels: Labels::from([("a".to_owned(), "b".to_owned())]),
        created: 1,
        updated: 2,
        usage: Some(Usage {
            bytes: 3,
            inodes: 4,
        }),
    };
    let text = serde_json::to_string(&record).unwrap();
    assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
}
