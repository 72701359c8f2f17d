//! What every way to reach snapshots must do: a suite over the library and over gRPC.
//!
//! Each function takes a fresh, empty subject.

use std::fs;
use std::path::{Path, PathBuf};

use super::Snapshots;
use crate::idmap::{GID_LABEL, UID_LABEL};
use crate::metastore::filter::Filters;
use crate::metastore::{Kind, Labels, Record, Relabel, Usage};
use crate::remote::REF;
use crate::{Error, Result};

/// Why something was refused, as far as a caller can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    NotFound,
    AlreadyExists,
    Precondition,
    Invalid,
    Other,
}

type Answer<T> = Result<T, Refusal>;

/// A mount as containerd sees it: type, source, options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SeenMount {
    pub(crate) fs_type: String,
    pub(crate) source: PathBuf,
    pub(crate) options: Vec<String>,
}

/// What is known of a snapshot, as containerd sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) name: String,
    pub(crate) parent: String,
    pub(crate) kind: Kind,
    pub(crate) labels: Labels,
}

/// A way to reach snapshots.
pub(crate) trait Subject {
    fn prepare(&self, key: &str, parent: &str, labels: &Labels) -> Answer<Vec<SeenMount>>;
    fn view(&self, key: &str, parent: &str, labels: &Labels) -> Answer<Vec<SeenMount>>;
    fn mounts(&self, key: &str) -> Answer<Vec<SeenMount>>;
    fn commit(&self, name: &str, key: &str, parent: &str, labels: &Labels) -> Answer<()>;
    fn remove(&self, key: &str) -> Answer<()>;
    fn stat(&self, key: &str) -> Answer<Seen>;
    fn relabel(&self, key: &str, change: &Relabel) -> Answer<Seen>;
    fn list(&self, filters: &[&str]) -> Answer<Vec<Seen>>;
    fn usage(&self, key: &str) -> Answer<Usage>;
    fn cleanup(&self) -> Answer<()>;
    /// Where its directories are.
    fn root(&self) -> &Path;
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

fn none() -> Labels {
    Labels::new()
}

/// A committed snapshot with one file.
fn base(subject: &dyn Subject, name: &str, parent: &str) {
    let key = format!("{name}-key");
    let mounts = subject.prepare(&key, parent, &none()).unwrap();
    fs::write(writable(&mounts).join(name), vec![7; 9000]).unwrap();
    subject.commit(name, &key, "", &none()).unwrap();
}

/// Where writes to these mounts go.
pub(crate) fn writable(mounts: &[SeenMount]) -> PathBuf {
    let [mount] = mounts else {
        panic!("one mount is expected: {mounts:?}")
    };
    let upper = |option: &String| option.strip_prefix("upperdir=").map(PathBuf::from);
    let upper = mount.options.iter().find_map(upper);
    upper.unwrap_or_else(|| mount.source.clone())
}

/// Runs all of it, each on a subject of its own.
pub(crate) fn all(run: impl Fn(&dyn Fn(&dyn Subject))) {
    run(&a_snapshot_lives);
    run(&mounts_are_what_containerd_mounts);
    run(&refusals_tell_why);
    run(&one_made_on_nothing_may_be_moved_when_it_is_committed);
    run(&a_layer_on_nothing_is_unpacked_with_its_whiteouts);
    run(&maps_that_are_none_make_no_snapshot);
    run(&labels_change_by_key_or_all_at_once);
    run(&lists_are_filtered);
    run(&thousands_are_listed_whole);
    run(&usage_is_what_lies_on_disk);
    run(&namespaces_are_only_part_of_keys);
    run(&cleanup_removes_orphans_and_nothing_else);
}

fn a_snapshot_lives(subject: &dyn Subject) {
    let given = labels(&[("a", "1")]);
    subject.prepare("key", "", &given).unwrap();
    let seen = subject.stat("key").unwrap();
    assert_eq!((seen.kind, seen.parent.as_str()), (Kind::Active, ""));
    assert_eq!(seen.labels, given);
    let other = labels(&[("b", "2")]);
    subject.commit("name", "key", "", &other).unwrap();
    let seen = subject.stat("name").unwrap();
    assert_eq!((seen.kind, &seen.labels), (Kind::Committed, &other));
    subject.view("look", "name", &none()).unwrap();
    let seen = subject.stat("look").unwrap();
    assert_eq!((seen.kind, seen.parent.as_str()), (Kind::View, "name"));
    subject.remove("look").unwrap();
    subject.remove("name").unwrap();
    subject.cleanup().unwrap();
    assert!(subject.list(&[]).unwrap().is_empty());
}

fn mounts_are_what_containerd_mounts(subject: &dyn Subject) {
    let mounts = subject.prepare("one", "", &none()).unwrap();
    assert_eq!(mounts[0].fs_type, "bind");
    assert_eq!(mounts[0].options, ["rbind", "rw"]);
    assert_eq!(mounts, subject.mounts("one").unwrap());
    let lower = writable(&mounts);
    subject.commit("base", "one", "", &none()).unwrap();
    let mounts = subject.view("look", "base", &none()).unwrap();
    assert_eq!(
        (mounts[0].fs_type.as_str(), &mounts[0].source),
        ("bind", &lower)
    );
    assert_eq!(mounts[0].options, ["rbind", "ro"]);
    let mounts = subject.prepare("two", "base", &none()).unwrap();
    assert_eq!(
        (mounts[0].fs_type.as_str(), mounts[0].source.as_path()),
        ("overlay", Path::new("overlay"))
    );
    let lowers = format!("lowerdir={}", lower.display());
    assert!(mounts[0].options.contains(&lowers), "{mounts:?}");
    assert_eq!(mounts, subject.mounts("two").unwrap());
}

fn refusals_tell_why(subject: &dyn Subject) {
    base(subject, "base", "");
    subject.prepare("active", "base", &none()).unwrap();
    subject.view("view", "base", &none()).unwrap();
    let long = labels(&[("k", &"v".repeat(5000))]);
    let prepare = |key: &str, parent: &str, labels: &Labels| {
        subject.prepare(key, parent, labels).unwrap_err()
    };
    let commit = |name: &str, key: &str, parent: &str| {
        subject.commit(name, key, parent, &none()).unwrap_err()
    };
    let table = [
        (prepare("active", "", &none()), Refusal::AlreadyExists),
        (prepare("base", "", &none()), Refusal::AlreadyExists),
        (prepare("new", "nowhere", &none()), Refusal::NotFound),
        (prepare("new", "active", &none()), Refusal::Invalid),
        (prepare("new", "view", &none()), Refusal::Invalid),
        (prepare("", "", &none()), Refusal::Invalid),
        (prepare("a\0b", "", &none()), Refusal::Invalid),
        (prepare("new", "", &long), Refusal::Invalid),
        (prepare("new", "", &labels(&[("", "v")])), Refusal::Invalid),
        (commit("done", "nowhere", ""), Refusal::NotFound),
        (commit("done", "view", ""), Refusal::Precondition),
        (commit("done", "base", ""), Refusal::Precondition),
        (commit("base", "active", ""), Refusal::AlreadyExists),
        (commit("base", "base-key", ""), Refusal::AlreadyExists),
        (commit("", "active", ""), Refusal::Invalid),
        (commit("done", "active", "view"), Refusal::Invalid),
        (subject.mounts("base").unwrap_err(), Refusal::Precondition),
        (subject.mounts("nowhere").unwrap_err(), Refusal::NotFound),
        (subject.remove("base").unwrap_err(), Refusal::Precondition),
        (subject.remove("nowhere").unwrap_err(), Refusal::NotFound),
        (subject.stat("nowhere").unwrap_err(), Refusal::NotFound),
        (subject.usage("nowhere").unwrap_err(), Refusal::NotFound),
        (subject.list(&["kind=="]).unwrap_err(), Refusal::Invalid),
    ];
    for (number, (found, expected)) in table.into_iter().enumerate() {
        assert_eq!(found, expected, "line {number}");
    }
    let relabel = |key| subject.relabel(key, &Relabel::All(none()));
    assert_eq!(relabel("nowhere").unwrap_err(), Refusal::NotFound);
    assert_eq!(
        subject.list(&[]).unwrap().len(),
        3,
        "nothing was made or lost"
    );
}

fn one_made_on_nothing_may_be_moved_when_it_is_committed(subject: &dyn Subject) {
    base(subject, "base", "");
    base(subject, "other", "");
    subject.prepare("loose", "", &none()).unwrap();
    let moved = |parent| subject.commit("top", "loose", parent, &none());
    assert_eq!(moved("nowhere"), Err(Refusal::NotFound));
    moved("base").unwrap();
    assert_eq!(subject.stat("top").unwrap().parent, "base");
    assert_eq!(subject.remove("base"), Err(Refusal::Precondition));
    subject.prepare("fixed", "base", &none()).unwrap();
    let fixed = |parent| subject.commit("fixed-top", "fixed", parent, &none());
    assert_eq!(fixed("other"), Err(Refusal::Invalid));
    fixed("base").unwrap();
}

/// Containerd that unpacks layers at the same time makes them on nothing; of a directory's whiteouts it
/// keeps none, and what they hide would be seen again.
fn a_layer_on_nothing_is_unpacked_with_its_whiteouts(subject: &dyn Subject) {
    base(subject, "base", "");
    let layer = labels(&[(REF, "a chain of layers")]);
    let mounts = subject.prepare("loose", "", &layer).unwrap();
    assert_eq!(mounts[0].fs_type, "overlay", "{mounts:?}");
    assert_eq!(mounts, subject.mounts("loose").unwrap());
    assert_eq!(entries(&lower(&mounts)), [] as [PathBuf; 0]);
    let upper = writable(&mounts);
    subject.commit("top", "loose", "base", &layer).unwrap();
    let mounts = subject.view("look", "top", &none()).unwrap();
    let lowers = lower(&mounts).display().to_string();
    assert!(
        lowers.starts_with(&format!("{}:", upper.display())),
        "{lowers}"
    );
}

fn maps_that_are_none_make_no_snapshot(subject: &dyn Subject) {
    let good = "0:100000:65536";
    for (users, groups) in [(good, "0:1"), ("1:1:1", good), ("", "")] {
        let bad = labels(&[(UID_LABEL, users), (GID_LABEL, groups)]);
        assert_eq!(subject.prepare("key", "", &bad), Err(Refusal::Invalid));
        assert_eq!(subject.view("key", "", &bad), Err(Refusal::Invalid));
    }
    let half = labels(&[(GID_LABEL, good)]);
    assert_eq!(subject.prepare("key", "", &half), Err(Refusal::Invalid));
    assert!(subject.list(&[]).unwrap().is_empty());
    assert!(entries(&subject.root().join("snapshots")).is_empty());
}

fn labels_change_by_key_or_all_at_once(subject: &dyn Subject) {
    subject
        .prepare("key", "", &labels(&[("a", "1"), ("b.c/d", "2")]))
        .unwrap();
    let some = Relabel::Some(labels(&[("b.c/d", "3"), ("e", "4"), ("a", "")]));
    let seen = subject.relabel("key", &some).unwrap();
    assert_eq!(seen.labels, labels(&[("b.c/d", "3"), ("e", "4")]));
    assert_eq!(subject.stat("key").unwrap(), seen);
    let all = labels(&[("f", "5")]);
    subject.relabel("key", &Relabel::All(all.clone())).unwrap();
    assert_eq!(subject.stat("key").unwrap().labels, all);
    let long = Relabel::Some(labels(&[("f", &"x".repeat(4096))]));
    assert_eq!(subject.relabel("key", &long), Err(Refusal::Invalid));
    assert_eq!(subject.stat("key").unwrap().labels, all);
}

fn lists_are_filtered(subject: &dyn Subject) {
    base(subject, "base", "");
    subject
        .prepare("one", "base", &labels(&[("x/y.z", "1")]))
        .unwrap();
    subject.view("two", "base", &none()).unwrap();
    let names = |filters: &[&str]| {
        let mut names: Vec<_> = subject
            .list(filters)
            .unwrap()
            .into_iter()
            .map(|s| s.name)
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&[]), ["base", "one", "two"]);
    assert_eq!(names(&["parent==base"]), ["one", "two"]);
    assert_eq!(names(&["labels.\"x/y.z\""]), ["one"]);
    assert_eq!(names(&["kind==view", "kind==committed"]), ["base", "two"]);
    assert_eq!(names(&["kind!=view,name~=e$"]), ["base", "one"]);
}

fn thousands_are_listed_whole(subject: &dyn Subject) {
    let keys: Vec<String> = (0..1050).map(|n| format!("key-{n:05}")).collect();
    for key in &keys {
        subject.prepare(key, "", &none()).unwrap();
    }
    let mut found: Vec<_> = subject
        .list(&[])
        .unwrap()
        .into_iter()
        .map(|s| s.name)
        .collect();
    found.sort();
    assert_eq!(found, keys);
}

fn usage_is_what_lies_on_disk(subject: &dyn Subject) {
    let mounts = subject.prepare("key", "", &none()).unwrap();
    let empty = subject.usage("key").unwrap();
    assert_eq!(empty.inodes, 1);
    fs::write(writable(&mounts).join("file"), vec![1; 100_000]).unwrap();
    let full = subject.usage("key").unwrap();
    assert_eq!(full.inodes, 2);
    assert!(full.bytes >= empty.bytes + 100_000, "{full:?}");
    subject.commit("name", "key", "", &none()).unwrap();
    assert_eq!(subject.usage("name").unwrap(), full);
}

/// Containerd's metadata puts the namespace before each key, and refuses a parent that this
/// namespace does not know. Below it keys are mere texts, for containerd's own snapshotters
/// too: its garbage collection walks those of all namespaces at once, and a layer that one
/// namespace has is shared with another.
fn namespaces_are_only_part_of_keys(subject: &dyn Subject) {
    for key in ["ns1/1/k", "ns2/2/k"] {
        let mounts = subject.prepare(key, "", &labels(&[("of", key)])).unwrap();
        fs::write(writable(&mounts).join("file"), key).unwrap();
    }
    subject
        .commit("ns1/3/base", "ns1/1/k", "", &none())
        .unwrap();
    assert_eq!(subject.stat("ns1/1/k"), Err(Refusal::NotFound));
    let other = subject.stat("ns2/2/k").unwrap();
    assert_eq!(
        (other.kind, &other.labels["of"][..]),
        (Kind::Active, "ns2/2/k")
    );
    for near in [
        "k",
        "ns1",
        "ns1/3",
        "ns1/3/",
        "ns1/3/bas",
        "ns2/3/base",
        "/ns1/3/base",
    ] {
        assert_eq!(subject.stat(near), Err(Refusal::NotFound), "{near}");
        assert_eq!(subject.remove(near), Err(Refusal::NotFound), "{near}");
        let on = subject.prepare("ns1/5/c", near, &none());
        assert_eq!(on, Err(Refusal::NotFound), "{near}");
    }
    let taken = subject.commit("ns1/3/base", "ns2/2/k", "", &none());
    assert_eq!(taken, Err(Refusal::AlreadyExists));

    let mounts = subject.prepare("ns2/4/c", "ns1/3/base", &none()).unwrap();
    let lower = lower(&mounts);
    assert_eq!(fs::read_to_string(lower.join("file")).unwrap(), "ns1/1/k");
    assert_eq!(subject.remove("ns1/3/base"), Err(Refusal::Precondition));
    let names = |filter| {
        let found = subject.list(&[filter]).unwrap();
        let names: std::collections::BTreeSet<_> = found.into_iter().map(|s| s.name).collect();
        names.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(names(""), ["ns1/3/base", "ns2/2/k", "ns2/4/c"]);
    assert_eq!(names("name~=\"^ns2/\""), ["ns2/2/k", "ns2/4/c"]);
    assert_eq!(names("parent==ns1/3/base"), ["ns2/4/c"]);
    subject.remove("ns2/4/c").unwrap();
    subject.remove("ns1/3/base").unwrap();
    assert_eq!(names(""), ["ns2/2/k"]);
    let left = writable(&subject.mounts("ns2/2/k").unwrap()).join("file");
    assert_eq!(fs::read_to_string(left).unwrap(), "ns2/2/k");
}

/// The one directory below these mounts.
fn lower(mounts: &[SeenMount]) -> PathBuf {
    let lower = |option: &String| option.strip_prefix("lowerdir=").map(PathBuf::from);
    mounts[0].options.iter().find_map(lower).unwrap()
}

fn cleanup_removes_orphans_and_nothing_else(subject: &dyn Subject) {
    base(subject, "base", "");
    let mounts = subject.prepare("work", "base", &none()).unwrap();
    fs::write(writable(&mounts).join("file"), "mine").unwrap();
    subject.view("look", "base", &none()).unwrap();
    let root = subject.root();
    let all = || {
        let mut all = entries(&root.join("snapshots"));
        all.extend(entries(&root.join("trash")));
        all
    };
    // Not ours.
    fs::create_dir(root.join("snapshots/notes")).unwrap();
    let before = all();
    assert_eq!(before.len(), 4);
    // As a crash leaves them: before the record was made, and after it was removed.
    for dir in [
        "snapshots/900/fs/deep",
        "snapshots/901",
        "trash/5.1.0/fs/deep",
    ] {
        fs::create_dir_all(root.join(dir)).unwrap();
        fs::write(root.join(dir).join("file"), "orphan").unwrap();
    }
    assert_eq!(all().len(), 7);
    let seen = subject.list(&[]).unwrap();
    subject.cleanup().unwrap();
    assert_eq!(all(), before);
    assert_eq!(subject.list(&[]).unwrap(), seen);
    assert_eq!(subject.mounts("work").unwrap(), mounts);
    let file = writable(&mounts).join("file");
    assert_eq!(fs::read_to_string(file).unwrap(), "mine");
    assert_eq!(fs::read(lower(&mounts).join("base")).unwrap(), [7; 9000]);
}

/// What is in a directory, in order.
pub(crate) fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    all.sort();
    all
}

/// The library itself, with its directories there.
pub(crate) struct Library<'a>(pub(crate) Snapshots, pub(crate) &'a Path);

pub(crate) fn refused(error: &Error) -> Refusal {
    match error {
        Error::NotFound { .. } => Refusal::NotFound,
        Error::AlreadyExists { .. } => Refusal::AlreadyExists,
        Error::Precondition { .. } => Refusal::Precondition,
        Error::Invalid { .. } => Refusal::Invalid,
        Error::Store(_) | Error::Environment { .. } | Error::Mount { .. } => Refusal::Other,
    }
}

fn seen(record: Record) -> Seen {
    Seen {
        name: record.key,
        parent: record.parent.unwrap_or_default(),
        kind: record.kind,
        labels: record.labels,
    }
}

fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

impl Library<'_> {
    fn answer<T>(&self, call: impl FnOnce(&Snapshots) -> Result<T>) -> Answer<T> {
        call(&self.0).map_err(|error| refused(&error))
    }
}

impl Subject for Library<'_> {
    fn prepare(&self, key: &str, parent: &str, labels: &Labels) -> Answer<Vec<SeenMount>> {
        self.answer(|s| s.prepare(key, given(parent), labels))?;
        self.mounts(key)
    }

    fn view(&self, key: &str, parent: &str, labels: &Labels) -> Answer<Vec<SeenMount>> {
        self.answer(|s| s.view(key, given(parent), labels))?;
        self.mounts(key)
    }

    fn mounts(&self, key: &str) -> Answer<Vec<SeenMount>> {
        let mounts = self.answer(|s| s.mounts(key, &|_| panic!("no layer is lazy here")))?;
        let mounts = mounts.iter().map(|mount| SeenMount {
            fs_type: mount.fs_type().to_owned(),
            source: mount.source().to_path_buf(),
            options: mount.options(),
        });
        Ok(mounts.collect())
    }

    fn commit(&self, name: &str, key: &str, parent: &str, labels: &Labels) -> Answer<()> {
        self.answer(|s| s.commit_on(name, key, given(parent), labels))
    }

    fn remove(&self, key: &str) -> Answer<()> {
        self.answer(|s| s.remove(key)).map(drop)
    }

    fn stat(&self, key: &str) -> Answer<Seen> {
        self.answer(|s| s.stat(key)).map(seen)
    }

    fn relabel(&self, key: &str, change: &Relabel) -> Answer<Seen> {
        self.answer(|s| s.relabel(key, change)).map(seen)
    }

    fn list(&self, filters: &[&str]) -> Answer<Vec<Seen>> {
        let filters = Filters::parse(filters).map_err(|error| refused(&error))?;
        let all = self.answer(Snapshots::list)?;
        Ok(all
            .into_iter()
            .filter(|r| filters.matches(r))
            .map(seen)
            .collect())
    }

    fn usage(&self, key: &str) -> Answer<Usage> {
        self.answer(|s| s.usage(key))
    }

    fn cleanup(&self) -> Answer<()> {
        self.answer(Snapshots::cleanup)
    }

    fn root(&self) -> &Path {
        self.1
    }
}
