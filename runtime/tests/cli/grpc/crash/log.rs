//! What the clients of a node were told, in a file that outlives all of them.
//!
//! Invariant: a worker writes down what is to change before it asks, and that it was answered
//! afterwards. So what is there after a crash is what was answered, and of the last question
//! of each worker all or nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What is known of a snapshot that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    pub(super) parent: String,
    pub(super) what: What,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum What {
    /// Committed: this layer of its worker's.
    Layer(usize),
    /// Active, whatever was written to it.
    Active,
    /// Committed: a directory with these files, counted before.
    Files { seed: u64, bytes: i64, inodes: i64 },
}

/// Names of snapshots and what becomes of them, together.
pub(super) type Changes = Vec<(String, Option<Known>)>;

#[derive(Debug, Serialize, Deserialize)]
enum Line {
    Asked(usize, Changes),
    Answered(usize),
    /// After a crash: none of it was done.
    Lost(usize),
}

pub(super) struct Log {
    file: File,
    there: BTreeMap<String, Known>,
    asked: BTreeMap<usize, Changes>,
}

impl Log {
    /// Reads what was written so far.
    pub(super) fn open(path: &Path) -> Self {
        let mut log = Self {
            file: File::options()
                .create(true)
                .append(true)
                .open(path)
                .unwrap(),
            there: BTreeMap::new(),
            asked: BTreeMap::new(),
        };
        for line in fs::read_to_string(path).unwrap().lines() {
            log.follow(serde_json::from_str(line).unwrap());
        }
        log
    }

    /// What was answered.
    pub(super) fn there(&self) -> &BTreeMap<String, Known> {
        &self.there
    }

    pub(super) fn ask(&mut self, worker: usize, changes: Changes) {
        self.write(Line::Asked(worker, changes));
    }

    pub(super) fn answered(&mut self, worker: usize) {
        self.write(Line::Answered(worker));
    }

    /// Finds out what became of questions that were not answered, by the names of what is
    /// there, and that nothing else is.
    pub(super) fn settle(&mut self, found: &BTreeSet<String>) {
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
        let mut text = serde_json::to_string(&line).unwrap();
        text.push('\n');
        self.file.write_all(text.as_bytes()).unwrap();
        self.follow(line);
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
