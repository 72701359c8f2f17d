//! `laz`: its stores before a start, and its command lines.
//!
//! Invariant: a prepared store is made once per link, image, tag and kind by the recorded workload, is
//! evicted unless all of the image is to be in it, and is then only copied: no timed start can teach
//! the next one anything.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::Job;
use crate::plan::{Store, Workload};
use crate::process;
use crate::report::Start;

/// What a `laz` can do of what some systems need.
#[derive(Debug, Default)]
pub(crate) struct Abilities {
    evict: bool,
    profiles: bool,
}

impl Abilities {
    /// Asks the program itself.
    pub(crate) fn of(program: Option<&Path>) -> Self {
        let help = |command: &[&str]| {
            let mut laz = Command::new(program?);
            process::output(laz.args(command).arg("--help")).ok()
        };
        Self {
            evict: help(&["store", "evict"]).is_some(),
            profiles: help(&["run"]).is_some_and(|text| text.contains("--no-profile")),
        }
    }

    /// Why a start from such a store cannot be measured, if it cannot.
    pub(super) fn missing(&self, store: Store) -> Option<String> {
        match store {
            Store::Fresh | Store::Local => None,
            Store::Indexed | Store::Profiled if !self.evict => {
                Some("this laz has no `store evict`".into())
            }
            Store::Indexed | Store::Profiled if !self.profiles => {
                Some("this laz has no start-up profiles (`run --no-profile`)".into())
            }
            Store::Indexed | Store::Profiled => None,
        }
    }
}

impl Job<'_> {
    /// `laz` on the store of this start.
    pub(crate) fn laz_program(&self) -> Result<Command> {
        let program = self.bench.programs.laz.as_ref();
        let mut laz = Command::new(program.context("no laz was given")?);
        laz.arg("--root")
            .arg(self.dir.join("root"))
            .arg("--state")
            .arg(self.dir.join("state"));
        Ok(laz)
    }

    pub(super) fn laz(&self, store: Store) -> Result<Start> {
        let mut run = self.laz_program()?;
        run.args(["run", "--rm", "--trace-file"])
            .arg(self.dir.join("trace.json"));
        self.prepare_store(store)?;
        if store == Store::Indexed {
            run.arg("--no-profile");
        }
        run.arg(&self.reference).args(self.command());
        let start = self.time(&mut run)?;
        match store {
            Store::Local => ensure_local(&start)?,
            _ => ensure_cold(&start)?,
        }
        Ok(start)
    }

    /// A store of that kind: a copy of the one that was made once.
    pub(super) fn prepare_store(&self, store: Store) -> Result<()> {
        let kind = match store {
            Store::Fresh => return Ok(()),
            Store::Indexed | Store::Profiled => "evicted",
            Store::Local => "local",
        };
        let (cell, root) = (&self.cell, self.dir.join("root"));
        let name = [cell.link.name(), cell.image.name(), cell.system.tag, kind].join("-");
        let kept = self.bench.scratch.join("prepared").join(name);
        if !kept.exists() {
            let (command, ready) = cell.image.workload(Workload::Recorded);
            let mut run = self.laz_program()?;
            run.args(["run", "--rm", &self.reference]).args(command);
            process::run_until_ready(&mut run, ready, || ())?;
            let last: &[&str] = match store {
                Store::Local => &["pull", "--full", &self.reference],
                _ => &["store", "evict", "--all"],
            };
            process::run(self.laz_program()?.args(last))?;
            fs::create_dir_all(kept.parent().context("a kept store has a directory")?)?;
            return copy(&root, &kept);
        }
        copy(&kept, &root)
    }
}

/// Content that was still here would be a warm start under the name of a cold one.
pub(super) fn ensure_cold(start: &Start) -> Result<()> {
    ensure!(
        start.wire_bytes > 0,
        "nothing was fetched: the store was not empty or evicted"
    );
    Ok(())
}

/// What was fetched would be a lazy start under the name of a local one.
fn ensure_local(start: &Start) -> Result<()> {
    ensure!(
        start.requests == 0,
        "{} requests for blobs: the image was not complete",
        start.requests
    );
    Ok(())
}

/// Copies a store with its holes.
fn copy(from: &Path, to: &Path) -> Result<()> {
    process::run(
        Command::new("cp")
            .args(["--archive", "--sparse=auto", "--no-target-directory"])
            .args([from, to]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let can = |evict, profiles| Abilities { evict, profiles };
        let table = [
            (can(false, false), Store::Fresh, None),
            (can(false, true), Store::Indexed, Some("store evict")),
            (
                can(true, false),
                Store::Profiled,
                Some("no start-up profiles"),
            ),
            (can(true, true), Store::Profiled, None),
            (can(false, false), Store::Local, None),
        ];
        for (abilities, store, wanted) in table {
            let got = abilities.missing(store);
            assert_eq!(got.is_some(), wanted.is_some(), "{abilities:?} {store:?}");
            assert!(got.unwrap_or_default().contains(wanted.unwrap_or("")));
        }
        assert!(Abilities::of(None).missing(Store::Indexed).is_some());
    }
}
