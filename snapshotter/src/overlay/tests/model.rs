//! Random requests to snapshots whose directories are on disk, against a simple map: what
//! they answer, what is listed, which directories are mounted, what is in them and how much.
//! In between everything is opened anew, as after a crash that left directories behind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use lazarette_fetcher::types::Digest;
use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use proptest::test_runner::{Config, FileFailurePersistence};

use super::super::contract::{Refusal, entries, refused};
use super::super::{Mount, Snapshots};
use super::emptied;
use crate::Result;
use crate::metastore::{Content, Kind, Labels, MemoryMetastore, Metastore, Relabel, Usage};
use crate::test_util::database;

/// What may be asked for or happen; small numbers stand for names.
#[derive(Debug, Clone)]
enum Op {
    Create(Kind, u8, Option<u8>, u8),
    Layer(u8, Option<u8>, u8),
    Commit(u8, u8, Option<u8>, u8),
    Relabel(u8, bool, u8),
    Remove(u8),
    Write(u8, u8, u16),
    Link(u8, u8, u8),
    Cleanup,
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let name = || 0..6_u8;
    let parent = || proptest::option::of(0..6_u8);
    let kind = prop_oneof![Just(Kind::Active), Just(Kind::View)];
    let number = || any::<u8>();
    prop_oneof![
        4 => (kind, name(), parent(), number()).prop_map(|(k, n, p, l)| Op::Create(k, n, p, l)),
        2 => (name(), parent(), number()).prop_map(|(n, p, l)| Op::Layer(n, p, l)),
        4 => (name(), name(), parent(), number()).prop_map(|(n, k, p, l)| Op::Commit(n, k, p, l)),
        1 => (name(), any::<bool>(), number()).prop_map(|(n, all, l)| Op::Relabel(n, all, l)),
        2 => name().prop_map(Op::Remove),
        4 => (name(), 0..3_u8, 0..20_000_u16).prop_map(|(n, file, len)| Op::Write(n, file, len)),
        1 => (name(), 0..3_u8, 0..3_u8).prop_map(|(n, file, to)| Op::Link(n, file, to)),
        1 => Just(Op::Cleanup),
        1 => Just(Op::Reopen),
    ]
}

fn name(number: u8) -> String {
    format!("ns/{number}/name")
}

fn named(number: Option<u8>) -> Option<String> {
    number.map(name)
}

fn labels(number: u8) -> Labels {
    let pair = |n: u8| (format!("example.com/l{}", n % 4), n.to_string());
    (0..number % 3)
        .map(|n| pair(number.wrapping_add(n)))
        .collect()
}

/// Of few layers, so that some have several names.
fn digest(number: u8) -> Digest {
    Digest::sha256(&[number % 3])
}

/// What a snapshot should be.
#[derive(Debug, Clone)]
struct Made {
    kind: Kind,
    parent: Option<String>,
    labels: Labels,
    files: Files,
}

#[derive(Debug, Clone, PartialEq)]
enum Files {
    Own(BTreeMap<String, Vec<u8>>),
    Layer(Digest),
}

/// All that should be there.
#[derive(Default)]
struct Model(BTreeMap<String, Made>);

type Answer<T = ()> = std::result::Result<T, Refusal>;

impl Model {
    fn create(&mut self, key: String, made: Made) -> Answer {
        if self.0.contains_key(&key) {
            return Err(Refusal::AlreadyExists);
        }
        self.may_lie_on(made.parent.as_deref())?;
        self.0.insert(key, made);
        Ok(())
    }

    fn may_lie_on(&self, parent: Option<&str>) -> Answer {
        match parent.map(|parent| self.0.get(parent)) {
            None => Ok(()),
            Some(None) => Err(Refusal::NotFound),
            Some(Some(below)) if below.kind != Kind::Committed => Err(Refusal::Invalid),
            Some(Some(_)) => Ok(()),
        }
    }

    fn commit(&mut self, to: String, key: &str, on: Option<String>, labels: Labels) -> Answer {
        if self.0.contains_key(&to) {
            return Err(Refusal::AlreadyExists);
        }
        let made = self.0.get(key).ok_or(Refusal::NotFound)?.clone();
        if made.kind != Kind::Active {
            return Err(Refusal::Precondition);
        }
        if made.parent.is_some() && on.is_some() && on != made.parent {
            return Err(Refusal::Invalid);
        }
        self.may_lie_on(on.as_deref())?;
        self.0.remove(key);
        let done = Made {
            kind: Kind::Committed,
            parent: made.parent.clone().or(on),
            labels,
            ..made
        };
        self.0.insert(to, done);
        Ok(())
    }

    /// The layer that nobody names any more.
    fn remove(&mut self, key: &str) -> Answer<Option<Digest>> {
        let made = self.0.get(key).ok_or(Refusal::NotFound)?.clone();
        if self.0.values().any(|m| m.parent.as_deref() == Some(key)) {
            return Err(Refusal::Precondition);
        }
        self.0.remove(key);
        let files = made.files;
        let is_last = self.0.values().all(|other| other.files != files);
        match files {
            Files::Layer(digest) if is_last => Ok(Some(digest)),
            Files::Layer(_) | Files::Own(_) => Ok(None),
        }
    }

    fn relabel(&mut self, key: &str, all: bool, labels: Labels) -> Answer {
        let made = self.0.get_mut(key).ok_or(Refusal::NotFound)?;
        match all {
            true => made.labels = labels,
            false => made.labels.extend(labels),
        }
        Ok(())
    }

    /// The files of an active snapshot.
    fn writable(&mut self, key: &str) -> Option<&mut BTreeMap<String, Vec<u8>>> {
        let made = self.0.get_mut(key)?;
        match &mut made.files {
            Files::Own(files) if made.kind == Kind::Active => Some(files),
            Files::Own(_) | Files::Layer(_) => None,
        }
    }
}

/// Snapshots that can be opened anew.
struct Subject<'a> {
    dir: &'a Path,
    open: &'a dyn Fn(&Path) -> Arc<dyn Metastore>,
    snapshots: Option<Snapshots>,
}

impl Subject<'_> {
    fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// As the next process does it; the one before left what no record names.
    fn reopen(&mut self) {
        drop(self.snapshots.take());
        let store = (self.open)(self.dir);
        self.snapshots = Some(Snapshots::open(&self.root(), store).unwrap());
    }

    fn get(&self) -> &Snapshots {
        self.snapshots.as_ref().unwrap()
    }

    /// What a crash leaves.
    fn leave_orphans(&self) {
        for orphan in ["snapshots/4711/fs/deep", "trash/9.9.9/fs"] {
            fs::create_dir_all(self.root().join(orphan)).unwrap();
        }
    }

    /// Where the lazy layer is mounted.
    fn place(&self, digest: &Digest) -> PathBuf {
        let place = self.dir.join("layers").join(digest.hex());
        fs::create_dir_all(&place).unwrap();
        place
    }

    /// Where the files of `key` are.
    fn files(&self, key: &str) -> PathBuf {
        match self.get().stat(key).unwrap().content {
            Content::Directory(number) => self.root().join(format!("snapshots/{number}/fs")),
            Content::Layer(digest) => self.place(&digest),
        }
    }
}

fn answer<T>(outcome: Result<T>) -> Answer<T> {
    outcome.map_err(|error| refused(&error))
}

/// Does it to both, and compares what they say.
fn perform(subject: &mut Subject<'_>, model: &mut Model, op: &Op) {
    let own = || Files::Own(BTreeMap::new());
    match *op {
        Op::Create(kind, key, parent, number) => {
            let (key, parent, labels) = (name(key), named(parent), labels(number));
            let done = match kind {
                Kind::View => subject.get().view(&key, parent.as_deref(), &labels),
                _ => subject.get().prepare(&key, parent.as_deref(), &labels),
            };
            let files = own();
            let made = Made {
                kind,
                parent,
                labels,
                files,
            };
            assert_eq!(answer(done), model.create(key, made), "{op:?}");
        }
        Op::Layer(key, parent, number) => {
            let (key, parent, labels) = (name(key), named(parent), labels(number));
            let (digest, kind) = (digest(number), Kind::Committed);
            let snapshots = subject.get();
            let done = snapshots.commit_layer(&key, parent.as_deref(), digest, &labels);
            let files = Files::Layer(digest);
            let made = Made {
                kind,
                parent,
                labels,
                files,
            };
            assert_eq!(answer(done), model.create(key, made), "{op:?}");
        }
        Op::Commit(to, key, on, number) => {
            let (to, key, on, labels) = (name(to), name(key), named(on), labels(number));
            let done = subject.get().commit_on(&to, &key, on.as_deref(), &labels);
            assert_eq!(answer(done), model.commit(to, &key, on, labels), "{op:?}");
        }
        Op::Relabel(key, all, number) => {
            let (key, labels) = (name(key), labels(number));
            let change = match all {
                true => Relabel::All(labels.clone()),
                false => Relabel::Some(labels.clone()),
            };
            let done = subject.get().relabel(&key, &change).map(drop);
            assert_eq!(answer(done), model.relabel(&key, all, labels), "{op:?}");
        }
        Op::Remove(key) => {
            let done = subject.get().remove(&name(key));
            assert_eq!(answer(done), model.remove(&name(key)), "{op:?}");
        }
        Op::Write(key, file, len) => {
            if let Some(files) = model.writable(&name(key)) {
                let bytes = vec![file + 1; len.into()];
                let path = subject.files(&name(key)).join(file.to_string());
                // Not through a link that was made to it.
                let _ = fs::remove_file(&path);
                fs::write(path, &bytes).unwrap();
                files.insert(file.to_string(), bytes);
            }
        }
        Op::Link(key, file, to) => link(subject, model, &name(key), [file, to]),
        Op::Cleanup => {
            subject.leave_orphans();
            subject.get().cleanup().unwrap();
        }
        Op::Reopen => {
            subject.leave_orphans();
            subject.reopen();
        }
    }
}

/// Gives a file a second name.
fn link(subject: &Subject<'_>, model: &mut Model, key: &str, names: [u8; 2]) {
    let [file, to] = names.map(|number| number.to_string());
    if let Some(files) = model.writable(key)
        && let Some(bytes) = files.get(&file).cloned()
        && !files.contains_key(&to)
    {
        let dir = subject.files(key);
        fs::hard_link(dir.join(file), dir.join(&to)).unwrap();
        files.insert(to, bytes);
    }
}

fn compare(subject: &Subject<'_>, model: &Model) {
    let snapshots = subject.get();
    let all = snapshots.list().unwrap();
    let keys: Vec<_> = all.iter().map(|record| &record.key).collect();
    assert_eq!(keys, model.0.keys().collect::<Vec<_>>());
    for (record, made) in all.iter().zip(model.0.values()) {
        assert_eq!(*record, snapshots.stat(&record.key).unwrap());
        assert_eq!((record.kind, &record.parent), (made.kind, &made.parent));
        assert_eq!(record.labels, made.labels);
        assert_eq!(record.usage.is_some(), made.kind == Kind::Committed);
        let usage = snapshots.usage(&record.key).unwrap();
        match &made.files {
            Files::Layer(digest) => {
                assert_eq!(record.content, Content::Layer(*digest));
                assert_eq!(usage, Usage::default());
            }
            Files::Own(files) => {
                let found = contents(&subject.files(&record.key));
                assert_eq!(&found, files, "{}", record.key);
            }
        }
        if made.kind != Kind::Committed {
            compare_mounts(subject, model, &record.key);
        }
    }
    let own = |made: &&Made| matches!(made.files, Files::Own(_));
    let directories = model.0.values().filter(own).count();
    assert_eq!(
        entries(&subject.root().join("snapshots")).len(),
        directories
    );
    emptied(&subject.root().join("trash"));
}

/// That what is mounted is the directories of the snapshot and of all below it.
fn compare_mounts(subject: &Subject<'_>, model: &Model, key: &str) {
    let made = &model.0[key];
    let mut below = Vec::new();
    let mut next = made.parent.as_ref();
    while let Some(parent) = next {
        let place = subject.files(parent);
        if !below.contains(&place) {
            below.push(place);
        }
        next = model.0[parent].parent.as_ref();
    }
    let resolve = |digest: &Digest| Ok(subject.place(digest));
    let mounts = subject.get().mounts(key, &resolve).unwrap();
    let own = subject.files(key);
    let (found, upper) = match &mounts[..] {
        [Mount::Overlay(overlay)] => (
            overlay.lowers.clone(),
            overlay.upper.as_ref().map(|upper| &upper.dir),
        ),
        [Mount::Bind { source, read_only }] => {
            assert_eq!(*read_only, made.kind == Kind::View);
            match below.is_empty() {
                true => (Vec::new(), Some(source)),
                false => (vec![source.clone()], None),
            }
        }
        other => panic!("{other:?}"),
    };
    let is_own = made.kind == Kind::Active || below.is_empty();
    assert_eq!((found, upper), (below, is_own.then_some(&own)), "{key}");
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let file = |path: PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, fs::read(path).unwrap())
    };
    entries(dir).into_iter().map(file).collect()
}

/// That usage is what du counts.
fn compare_usage(subject: &Subject<'_>, model: &Model) {
    for (key, made) in &model.0 {
        if let Files::Own(_) = made.files {
            let [bytes, inodes] = ["--block-size=1", "--inodes"].map(|option| {
                let mut du = Command::new("du");
                let du = du.args(["-s", option]).arg(subject.files(key));
                let out = String::from_utf8(du.output().unwrap().stdout).unwrap();
                out.split_whitespace().next().unwrap().parse().unwrap()
            });
            let usage = subject.get().usage(key).unwrap();
            assert_eq!(usage, Usage { bytes, inodes }, "{key}");
        }
    }
}

fn agrees_with_the_model(open: &dyn Fn(&Path) -> Arc<dyn Metastore>, ops: &[Op]) {
    let dir = tempfile::tempdir().unwrap();
    let mut subject = Subject {
        dir: dir.path(),
        open,
        snapshots: None,
    };
    subject.reopen();
    let mut model = Model::default();
    for op in ops {
        perform(&mut subject, &mut model, op);
        compare(&subject, &model);
    }
    compare_usage(&subject, &model);
    subject.reopen();
    compare(&subject, &model);
    compare_usage(&subject, &model);
}

fn config(cases: u32) -> Config {
    Config {
        cases,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..Config::default()
    }
}

proptest! {
    #![proptest_config(config(128))]

    #[test]
    fn snapshots_agree_with_the_model(ops in proptest::collection::vec(op(), 0..40)) {
        let store = Arc::<MemoryMetastore>::default();
        agrees_with_the_model(&|_| Arc::clone(&store) as _, &ops);
    }
}

proptest! {
    // Each case makes a database, and opens it several times.
    #![proptest_config(config(16))]

    #[test]
    fn snapshots_in_a_database_agree_with_the_model(
        ops in proptest::collection::vec(op(), 0..60)
    ) {
        agrees_with_the_model(&|dir| database(dir) as _, &ops);
    }
}
