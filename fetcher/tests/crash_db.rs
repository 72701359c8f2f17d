//! The database loses no acknowledged batch and shows no partial one, however often the
//! process is killed.
//!
//! The test runs itself as a child, which commits a script of batches. It is killed just
//! before and just after each commit, by itself; and at moments that nobody chose, by the
//! parent, which it tells what it has committed. The parent looks at what is left.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use lazarette_fetcher::db::{Batch, Db, Table};
use lazarette_fetcher::test_util::commits::{CommitFault, FaultyCommits};

const DIR: &str = "LAZARETTE_CRASH_DB_DIR";
/// The commit that kills the child, and whether it does before it or after it.
const DEATH: &str = "LAZARETTE_CRASH_DB_DEATH";
const BATCHES: u64 = 24;
const KEYS_PER_BATCH: u64 = 20;

struct Left;
impl Table for Left {
    const NAME: &'static str = "left";
    type Key = u64;
    type Value = String;
}

struct Right;
impl Table for Right {
    const NAME: &'static str = "right";
    type Key = String;
    type Value = u64;
}

const TABLES: [&str; 2] = [Left::NAME, Right::NAME];

fn open(dir: &Path) -> Db {
    Db::open(dir.join("db"), &TABLES).unwrap()
}

/// Batch `n` adds keys of `n` to both tables and removes those of `n - 2` from one.
fn batch(n: u64) -> Batch {
    let mut batch = Batch::new();
    for key in 0..KEYS_PER_BATCH {
        let id = n * KEYS_PER_BATCH + key;
        batch.put::<Left>(&id, &"x".repeat(3000)).unwrap();
        batch.put::<Right>(&format!("{n}/{key}"), &id).unwrap();
        if let Some(old) = n.checked_sub(2) {
            batch.delete::<Right>(&format!("{old}/{key}"));
        }
    }
    batch
}

/// Commits the rest of the script, from what is there.
#[test]
#[ignore = "the child process of the test below"]
fn child() {
    let dir = std::env::var_os(DIR).expect("the parent sets it");
    let commits = Arc::new(FaultyCommits::new(death()));
    let db = Db::open_on(Path::new(&dir).join("db"), &TABLES, commits).unwrap();
    let done = db.scan::<Left>(b"").count() as u64 / KEYS_PER_BATCH;
    for n in done..BATCHES {
        db.commit(batch(n)).unwrap();
        eprintln!("committed {n}");
    }
    eprintln!("end");
}

/// Where the child dies, if that is said.
fn death() -> Option<(u64, CommitFault)> {
    let said = std::env::var(DEATH).ok()?;
    let (when, at) = said.split_once(' ').unwrap();
    let fault = match when {
        "before" => CommitFault::DieBefore,
        _ => CommitFault::DieAfter,
    };
    Some((at.parse().unwrap(), fault))
}

fn start(dir: &Path, death: Option<&str>) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "child",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(DIR, dir)
        .envs(death.map(|death| (DEATH, death)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Lets the child acknowledge `batches` more, kills it, returns the last acknowledged.
fn kill_after(dir: &Path, batches: u64) -> Option<u64> {
    let mut child = start(dir, None);
    let mut last = None;
    let mut seen = 0;
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        assert!(!line.contains("panicked"), "{line}");
        if let Some(n) = line.strip_prefix("committed ") {
            last = Some(n.parse().unwrap());
            seen += 1;
        }
        if seen == batches || line == "end" {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    last
}

/// Every batch is there whole or not at all, with no gap; returns how many are.
fn whole_batches(dir: &Path) -> u64 {
    let db = open(dir);
    let left: Vec<u64> = db.scan::<Left>(b"").map(|e| e.unwrap().0).collect();
    assert_eq!(left, (0..left.len() as u64).collect::<Vec<_>>());
    assert_eq!(left.len() as u64 % KEYS_PER_BATCH, 0, "a batch is partial");
    let batches = left.len() as u64 / KEYS_PER_BATCH;
    let mut right: Vec<u64> = db.scan::<Right>(b"").map(|e| e.unwrap().1).collect();
    right.sort_unstable();
    let first = batches.saturating_sub(2) * KEYS_PER_BATCH;
    assert_eq!(right, (first..batches * KEYS_PER_BATCH).collect::<Vec<_>>());
    batches
}

#[test]
fn a_kill_before_a_commit_leaves_none_of_it_and_one_after_it_all() {
    for at in 0..BATCHES {
        for (when, whole) in [("before", at), ("after", at + 1)] {
            let dir = tempfile::tempdir().unwrap();
            let death = format!("{when} {at}");
            let ended = start(dir.path(), Some(&death)).wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&ended.stderr);
            assert_eq!(ended.status.code(), None, "{death}: {said}");
            assert_eq!(whole_batches(dir.path()), whole, "{death}");
            // What is left goes on.
            let ended = start(dir.path(), None).wait_with_output().unwrap();
            assert!(ended.status.success(), "{death}");
            assert_eq!(whole_batches(dir.path()), BATCHES, "{death}");
        }
    }
}

#[test]
fn a_kill_at_any_moment_keeps_every_acknowledged_batch_whole() {
    // One database killed again and again: each run recovers what the last one left.
    let dir = tempfile::tempdir().unwrap();
    let mut whole = 0;
    while whole < BATCHES {
        let last = kill_after(dir.path(), 1).unwrap();
        let now = whole_batches(dir.path());
        assert!(last >= whole && now > last, "{whole}, {last}, {now}");
        whole = now;
    }
    // And fresh ones, killed ever later.
    for run in 2..BATCHES {
        let dir = tempfile::tempdir().unwrap();
        let last = kill_after(dir.path(), run).unwrap();
        assert!(whole_batches(dir.path()) > last);
    }
}
