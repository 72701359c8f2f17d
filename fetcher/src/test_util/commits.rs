//! A database whose commits fail, or kill the process, at a chosen one.
//!
//! Invariant: commits are counted in the order in which they come, from 0. What dies does so
//! by SIGKILL, so that nothing of the process runs any more: no destructor, no flush.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::db::Commits;
use crate::{Error, Result};

/// What happens at the chosen commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitFault {
    /// The process is killed before the batch reaches the database.
    DieBefore,
    /// The process is killed once the batch is on the device, before anyone hears of it.
    DieAfter,
    /// The disk is full: nothing is written.
    NoSpace,
    /// The disk is full, and the batch is there all the same: what failed was to sync it.
    NoSpaceAfter,
}

/// Meets a fault at one commit.
#[derive(Debug, Default)]
pub struct FaultyCommits {
    seen: AtomicU64,
    fault: Option<(u64, CommitFault)>,
}

impl FaultyCommits {
    /// Meets `fault` at the commit of that number.
    pub fn new(fault: Option<(u64, CommitFault)>) -> Self {
        Self {
            seen: AtomicU64::new(0),
            fault,
        }
    }

    /// Commits seen so far, the failed one included.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }
}

impl Commits for FaultyCommits {
    fn commit(&self, write: &dyn Fn() -> Result<()>) -> Result<()> {
        let now = self.seen.fetch_add(1, Ordering::Relaxed);
        let fault = self.fault.filter(|(at, _)| *at == now);
        let full = || Error::NoSpace {
            path: "the database".into(),
        };
        match fault.map(|(_, fault)| fault) {
            None => write(),
            Some(CommitFault::DieBefore) => die(),
            Some(CommitFault::DieAfter) => {
                write()?;
                die()
            }
            Some(CommitFault::NoSpace) => Err(full()),
            Some(CommitFault::NoSpaceAfter) => {
                write()?;
                Err(full())
            }
        }
    }
}

/// Has this process killed. There is no safe call for it in the standard library.
fn die() -> ! {
    let mut shell = Command::new("sh");
    let kill = shell.args(["-c", "kill -KILL $PPID"]).stdin(Stdio::null());
    let outcome = kill.status();
    unreachable!("the process lives on: {outcome:?}")
}
