//! What the clients of a node were told, in a file that outlives all of them.
//!
//! Invariant: a worker writes down what is to change before it asks, and that it was answered
//! afterwards. So what is there after a crash is what was answered, and of the last question
//! of each worker all or nothing. Each line has the time of a clock that never goes back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What is known of a snapshot that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::grpc) struct Known {
    pub(in crate::grpc) parent: String,
    pub(in crate::grpc) what: What,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::grpc) enum What {
    /// Committed: this layer of its worker's.
    Layer(usize),
    /// Active, whatever was written to it.
    Active,
    /// Committed: a directory with these files, counted before.
    Files { seed: u64, bytes: i64, inodes: i64 },
}

/// Names of snapshots and what becomes of them, together.
pub(in crate::grpc) type Changes = Vec<(String, Option<Known>)>;

#[derive(Debug, Serialize, Deserialize)]
struct Timed {
    at: u64,
    line: Line,
}

#[derive(Debug, Serialize, Deserialize)]
enum Line {
    Asked(usize, Changes),
    Answered(usize),
    /// After a crash: none of it was done.
    Lost(usize),
}

pub(in crate::grpc) struct Log {
    file: File,
    clock: Box<dyn Fn() -> u64 + Send>,
    there: BTreeMap<String, Known>,
    asked: BTreeMap<usize, Changes>,
}

impl Log {
    /// Reads what was written so far; there is no time.
    pub(in crate::grpc) fn open(path: &Path) -> Self {
        Self::timed(path, Box::new(|| 0))
    }

    /// Reads what was written so far.
    pub(in crate::grpc) fn timed(path: &Path, clock: Box<dyn Fn() -> u64 + Send>) -> Self {
        let mut log = Self {
            clock,
            file: File::options()
                .create(true)
                .append(true)
                .open(path)
                .unwrap(),
            there: BTreeMap::new(),
            asked: BTreeMap::new(),
        };
        for Timed { line, .. } in lines(path) {
            log.follow(line);
        }
        log
    }

    /// The log in `path` as it was at that time, in `copy` from then on.
    pub(in crate::grpc) fn as_it_was(path: &Path, at: u64, copy: &Path) -> Self {
        let mut log = Self::open(copy);
        let then = lines(path).into_iter().take_while(|timed| timed.at <= at);
        then.for_each(|timed| log.write(timed.line));
        log
    }

    /// When something was answered, in order.
    pub(in crate::grpc) fn answers(path: &Path) -> Vec<u64> {
        let lines = lines(path).into_iter();
        let answers = lines.filter(|timed| matches!(timed.line, Line::Answered(_)));
        answers.map(|timed| timed.at).collect()
    }

    /// What was answered.
    pub(in crate::grpc) fn there(&self) -> &BTreeMap<String, Known> {
        &self.there
    }

    pub(in crate::grpc) fn ask(&mut self, worker: usize, changes: Changes) {
        self.write(Line::Asked(worker, changes));
    }

    pub(in crate::grpc) fn answered(&mut self, worker: usize) {
        self.write(Line::Answered(worker));
    }

    /// Finds out what became of questions that were not answered, by the names of what is
    /// there, and that nothing else is.
    pub(in crate::grpc) fn settle(&mut self, found: &BTreeSet<String>) {
        for (worker, changes) in self.asked.clone() {
            let is_done =
                |(name, after): &(String, Option<Known>)| found.contains(name) == after.is_some();
            let is_lost = |(name, _): &(String, Option<Known>)| {
                found.contains(name) == self.there.contains_key(name)
            };
            if changes.iter().all(is_done) {
                self.write(Line::Answered(worker));
            } else {
                assert!(changes.iter().all(is_lost), "half of it: {changes:?}");
                self.write(Line::Lost(worker));
            }
        }
        let there: BTreeSet<_> = self.there.keys().cloned().collect();
        assert_eq!(found, &there, "found, and answered");
    }

    /// A kill does not take back what was written, and a short line is written at once.
    fn write(&mut self, line: Line) {
        let at = (self.clock)();
        let timed = Timed { at, line };
        let mut text = serde_json::to_string(&timed).unwrap();
        text.push('\n');
        self.file.write_all(text.as_bytes()).unwrap();
        self.follow(timed.line);
    }

    fn follow(&mut self, line: Line) {
        match line {
            Line::Asked(worker, changes) => {
                let open = self.asked.insert(worker, changes);
                assert!(open.is_none(), "{open:?} was not answered");
            }
            Line::Answered(worker) => {
                for (name, after) in self.asked.remove(&worker).unwrap() {
                    match after {
                        Some(known) => self.there.insert(name, known),
                        None => self.there.remove(&name),
                    };
                }
            }
            Line::Lost(worker) => drop(self.asked.remove(&worker)),
        }
    }
}

fn lines(path: &Path) -> Vec<Timed> {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}
