//! Thousands of snapshots, and many who want the same.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Barrier};

use lazarette_fetcher::types::Digest;
use parking_lot::Mutex;

use super::super::Snapshots;
use super::super::contract::entries;
use crate::metastore::{Decide, Kind, Labels, MemoryMetastore, Metastore, Record, Records};
use crate::test_util::database;
use crate::{Error, Result};

/// Counts looks at single records and at all of them.
#[derive(Default)]
struct Counting {
    store: MemoryMetastore,
    looks: Mutex<Looks>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Looks {
    one: usize,
    all: usize,
}

struct Counted<'a>(&'a dyn Records, &'a Mutex<Looks>);

impl Records for Counted<'_> {
    fn get(&self, key: &str) -> Result<Option<Record>> {
        self.1.lock().one += 1;
        self.0.get(key)
    }

    fn all(&self) -> Result<Vec<Record>> {
        self.1.lock().all += 1;
        self.0.all()
    }

    fn find(&self, wanted: &dyn Fn(&Record) -> bool) -> Result<Option<Record>> {
        self.1.lock().all += 1;
        self.0.find(wanted)
    }
}

impl Metastore for Counting {
    fn read(&self, look: &mut dyn FnMut(&dyn Records) -> Result<()>) -> Result<()> {
        self.store
            .read(&mut |records| look(&Counted(records, &self.looks)))
    }

    fn update(&self, decide: Decide<'_>) -> Result<()> {
        self.store
            .update(&mut |records| decide(&Counted(records, &self.looks)))
    }
}

#[test]
fn what_is_asked_of_one_of_thousands_looks_at_few() {
    let root = tempfile::tempdir().unwrap();
    let store = Arc::new(Counting::default());
    let snapshots = Snapshots::open(root.path(), Arc::clone(&store) as _).unwrap();
    let layer = |number: usize| Digest::sha256(&number.to_le_bytes());
    for number in 0..10_000 {
        let name = format!("layer-{number}");
        snapshots
            .commit_layer(&name, None, layer(number), &Labels::new())
            .unwrap();
    }
    let looks = |what: &dyn Fn()| {
        *store.looks.lock() = Looks::default();
        what();
        *store.looks.lock()
    };
    let list = looks(&|| assert_eq!(snapshots.list().unwrap().len(), 10_000));
    assert_eq!(list, Looks { one: 0, all: 1 });
    let prepare = looks(&|| {
        let parent = Some("layer-9");
        snapshots.prepare("key", parent, &Labels::new()).unwrap();
    });
    assert!(prepare.all == 0 && prepare.one < 8, "{prepare:?}");
    let stat = looks(&|| drop(snapshots.stat("layer-5000").unwrap()));
    assert_eq!(stat, Looks { one: 1, all: 0 });
    // For its children, and for others of its layer.
    let remove = looks(&|| assert!(snapshots.remove("layer-5000").unwrap().is_some()));
    assert_eq!(remove, Looks { one: 1, all: 2 });
}

/// Who wants the same at once.
const MANY: usize = 32;

/// What all of them get who call at the same time.
fn at_once(call: impl Fn(usize) -> Result<()> + Sync) -> Vec<Result<()>> {
    let together = Barrier::new(MANY);
    let one = |number| {
        together.wait();
        call(number)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..MANY).map(|n| scope.spawn(move || one(n))).collect();
        let answers = threads.into_iter().map(|thread| thread.join().unwrap());
        answers.collect()
    })
}

/// That one was answered well, and all others with `refused`.
fn one_of(answers: &[Result<()>], refused: fn(&Error) -> bool) {
    let done = answers.iter().filter(|answer| answer.is_ok()).count();
    assert_eq!(done, 1, "{answers:?}");
    let refusals = answers.iter().filter_map(|answer| answer.as_ref().err());
    assert!(refusals.into_iter().all(refused), "{answers:?}");
}

fn one_of_many_is_served(root: &Path, store: Arc<dyn Metastore>) {
    let snapshots = Snapshots::open(root, store).unwrap();
    let exists = |error: &Error| matches!(error, Error::AlreadyExists { .. });
    let gone = |error: &Error| matches!(error, Error::NotFound { .. });
    let none = Labels::new();
    let directories = || {
        assert!(entries(&root.join("trash")).is_empty());
        entries(&root.join("snapshots")).len()
    };
    one_of(&at_once(|_| snapshots.prepare("one", None, &none)), exists);
    assert_eq!((snapshots.list().unwrap().len(), directories()), (1, 1));
    // Active or a view: whichever was first.
    let mixed = |number: usize| match number % 2 {
        0 => snapshots.prepare("two", None, &none),
        _ => snapshots.view("two", None, &none),
    };
    one_of(&at_once(mixed), exists);
    assert_eq!((snapshots.list().unwrap().len(), directories()), (2, 2));
    // Who comes too late learns that it was done, not that the key is gone.
    one_of(&at_once(|_| snapshots.commit("done", "one", &none)), exists);
    assert_eq!(snapshots.stat("done").unwrap().kind, Kind::Committed);
    let keys: Vec<_> = (0..MANY).map(|number| format!("key-{number}")).collect();
    for key in &keys {
        snapshots.prepare(key, None, &none).unwrap();
    }
    one_of(
        &at_once(|n| snapshots.commit("first", &keys[n], &none)),
        exists,
    );
    let left: BTreeSet<_> = snapshots
        .list()
        .unwrap()
        .into_iter()
        .map(|r| r.key)
        .collect();
    assert_eq!((left.len(), directories()), (MANY + 2, MANY + 2));
    one_of(&at_once(|_| snapshots.remove("two").map(drop)), gone);
    assert_eq!(directories(), MANY + 1);
}

#[test]
fn one_of_many_who_want_the_same_is_served() {
    let dir = tempfile::tempdir().unwrap();
    one_of_many_is_served(&dir.path().join("a"), Arc::<MemoryMetastore>::default());
    one_of_many_is_served(&dir.path().join("b"), database(dir.path()));
}
