//! Tables, scans, sharing a directory, and damage.

use serde::Deserialize;

use super::*;
use crate::types::Digest;

struct Names;
impl Table for Names {
    const NAME: &'static str = "names";
    type Key = String;
    type Value = Digest;
}

#[derive(Debug, PartialEq, serde::Serialize, Deserialize)]
struct Fact {
    n: u64,
    #[serde(default)]
    note: Option<String>,
}

struct Facts;
impl Table for Facts {
    const NAME: &'static str = "facts";
    type Key = u64;
    type Value = Fact;
}

/// The same family read as something else: what an older or damaged build leaves.
struct Strings;
impl Table for Strings {
    const NAME: &'static str = "facts";
    type Key = String;
    type Value = serde_json::Value;
}

fn open(dir: &Path) -> Db {
    Db::open(dir.join("db"), &["names", "facts"]).unwrap()
}

fn fact(n: u64) -> Fact {
    Fact { n, note: None }
}

#[test]
fn a_batch_spans_tables_and_survives_release() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(dir.path());
    let digest = Digest::sha256(b"x");
    let mut batch = Batch::new();
    batch.put::<Names>(&"debian".to_owned(), &digest).unwrap();
    batch.put::<Facts>(&7, &fact(7)).unwrap();
    db.commit(batch).unwrap();
    db.release();
    assert_eq!(db.get::<Names>(&"debian".to_owned()).unwrap(), Some(digest));
    assert_eq!(db.get::<Facts>(&7).unwrap(), Some(fact(7)));
    let mut batch = Batch::new();
    batch.delete::<Facts>(&7);
    db.commit(batch).unwrap();
    assert_eq!(db.get::<Facts>(&7).unwrap(), None);
}

#[test]
fn scans_cross_pages_in_order_and_stop_at_the_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(dir.path());
    let mut batch = Batch::new();
    for n in (0..1000_u64).rev() {
        batch.put::<Facts>(&n, &fact(n)).unwrap();
        let name = format!("{}/{n:04}", if n % 2 == 0 { "even" } else { "odd" });
        batch.put::<Names>(&name, &Digest::sha256(b"")).unwrap();
    }
    db.commit(batch).unwrap();
    let keys: Vec<u64> = db.scan::<Facts>(b"").map(|e| e.unwrap().0).collect();
    assert_eq!(keys, (0..1000).collect::<Vec<_>>());
    let even: Vec<String> = db.scan::<Names>(b"even/").map(|e| e.unwrap().0).collect();
    assert_eq!(even.len(), 500);
    assert!(even.is_sorted() && even.iter().all(|name| name.starts_with("even/")));
    assert_eq!(db.scan::<Names>(b"none").count(), 0);
}

#[test]
fn a_second_holder_is_named_and_gets_in_after_release() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let first = Db::open(&path, &["names"]).unwrap();
    let wait = Duration::from_millis(30);
    let error = Db::open_within(&path, &["names"], wait).unwrap_err();
    assert!(matches!(error, Error::Db { .. }));
    let pid = format!("process {}", std::process::id());
    assert!(error.to_string().contains(&pid), "{error}");
    first.release();
    let second = Db::open_within(&path, &["names"], wait).unwrap();
    second.release();
    assert_eq!(first.get::<Names>(&"x".to_owned()).unwrap(), None);
}

#[test]
fn values_that_do_not_decode_name_the_table_and_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(dir.path());
    let mut batch = Batch::new();
    batch
        .put::<Strings>(&"8 bytes!".to_owned(), &serde_json::json!("text"))
        .unwrap();
    db.commit(batch).unwrap();
    let key = u64::from_be_bytes(*b"8 bytes!");
    let error = db.get::<Facts>(&key).unwrap_err().to_string();
    assert!(
        error.contains("facts") && error.contains("8 bytes!"),
        "{error}"
    );
    let mut batch = Batch::new();
    batch
        .put::<Strings>(&"short".to_owned(), &serde_json::json!({"n": 1}))
        .unwrap();
    db.commit(batch).unwrap();
    let mut scan = db.scan::<Facts>(b"short");
    let error = scan.next().unwrap().unwrap_err().to_string();
    assert!(
        error.contains("facts") && error.contains("short"),
        "{error}"
    );
    assert!(scan.next().is_none());
    for (bytes, says) in [(&b""[..], "empty"), (b"\x02{}", "newer"), (b"\x01{", "EOF")] {
        let error = table::decode_value::<Facts>(&1, bytes).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
    let newer = b"\x01{\"n\":1,\"unknown\":true}";
    assert_eq!(table::decode_value::<Facts>(&1, newer).unwrap(), fact(1));
}

#[test]
fn families_of_a_newer_build_do_not_stop_an_older_one() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let older = Db::open(dir.path().join("db"), &["names"]).unwrap();
    assert_eq!(older.get::<Names>(&"x".to_owned()).unwrap(), None);
    struct Other;
    impl Table for Other {
        const NAME: &'static str = "other";
        type Key = u64;
        type Value = u64;
    }
    let error = older.get::<Other>(&1).unwrap_err().to_string();
    assert!(error.contains("without table other"), "{error}");
}

#[test]
fn damage_is_an_error_that_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let path = dir.path().join("db");
    for entry in std::fs::read_dir(&path).unwrap() {
        let entry = entry.unwrap().path();
        let name = entry.file_name().unwrap().to_str().unwrap();
        if name.starts_with("MANIFEST-") {
            std::fs::write(&entry, vec![0xff; 4096]).unwrap();
        }
    }
    let error = Db::open(&path, &["names"]).unwrap_err();
    assert!(matches!(error, Error::Db { .. }));
    assert!(
        error.to_string().contains("move the directory away"),
        "{error}"
    );
}

/// Names of the files of the database, but for RocksDB's own log and lock.
fn files(path: &Path) -> Vec<String> {
    let names = std::fs::read_dir(path).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with("LO")).collect();
    names.sort_unstable();
    names
}

#[test]
fn reading_writes_nothing_and_sees_what_was_committed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let put = |n| {
        let db = open(dir.path());
        let mut batch = Batch::new();
        batch.put::<Facts>(&n, &fact(n)).unwrap();
        db.commit(batch).unwrap();
    };
    // What is in tables and in logs alike.
    (0..3).for_each(put);
    let before = files(&path);
    for _ in 0..3 {
        let db = open(dir.path());
        assert_eq!(db.get::<Facts>(&1).unwrap(), Some(fact(1)));
        assert_eq!(db.scan::<Facts>(b"").count(), 3);
    }
    assert_eq!(files(&path), before);
}

#[test]
fn nobody_gets_in_between_reading_and_writing() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let (path, wait) = (dir.path().join("db"), Duration::from_millis(30));
    let first = open(dir.path());
    assert_eq!(first.get::<Facts>(&1).unwrap(), None);
    Db::open_within(&path, &["facts"], wait).unwrap_err();
    std::thread::scope(|scope| {
        // Reads go on while it is opened to write, and see a commit once it is one.
        let reading = scope.spawn(|| {
            while first.get::<Facts>(&1).unwrap().is_none() {
                std::thread::yield_now();
            }
        });
        first.prepare_commit().unwrap();
        Db::open_within(&path, &["facts"], wait).unwrap_err();
        let mut batch = Batch::new();
        batch.put::<Facts>(&1, &fact(1)).unwrap();
        first.commit(batch).unwrap();
        reading.join().unwrap();
    });
    Db::open_within(&path, &["facts"], wait).unwrap_err();
    first.release();
    let second = Db::open_within(&path, &["facts"], wait).unwrap();
    assert_eq!(second.get::<Facts>(&1).unwrap(), Some(fact(1)));
}

#[test]
fn a_table_that_is_not_there_yet_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    drop(Db::open(&path, &["names"]).unwrap());
    let more = Db::open(&path, &["names", "facts"]).unwrap();
    assert_eq!(more.get::<Facts>(&1).unwrap(), None);
}
