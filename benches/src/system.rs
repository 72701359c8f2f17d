//! How each system starts a container from nothing.
//!
//! Invariant: what is timed is what a user waits for: from the first command to ready. Starting
//! a daemon, preparing a store and cleaning up are not. Every start gets an empty directory and
//! leaves none; all it can know from earlier is what its `Store` says.

mod containerd;
mod laz;
mod lazd;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::machine;
use crate::plan::{Cell, Image, Kind, Link, Store, System};
use crate::process;
use crate::proxy::{Meter, Proxy};
use crate::report::{Span, Start};

pub(crate) use containerd::Plugin;
pub(crate) use laz::Abilities;

/// The programs of all systems.
#[derive(Debug)]
pub(crate) struct Programs {
    /// `laz`; none to measure the peers alone.
    pub(crate) laz: Option<PathBuf>,
    /// `lazd`, with `laz-mountd` beside it; none to leave its rows out.
    pub(crate) lazd: Option<PathBuf>,
    /// Directory of containerd-stargz-grpc and ctr-remote; none without Go.
    pub(crate) stargz: Option<PathBuf>,
    /// Directory of the newest containerd, ctr and shim.
    pub(crate) containerd_new: Option<PathBuf>,
}

/// Where starts happen.
#[derive(Debug)]
pub(crate) struct Bench {
    /// Whom to start.
    pub(crate) programs: Programs,
    /// What this `laz` can do.
    pub(crate) abilities: Abilities,
    /// The registry without any link between, `host:port`.
    pub(crate) registry: String,
    /// Everything is below; `start` is the one start that runs.
    pub(crate) scratch: PathBuf,
    /// One proxy per link, for the whole run: references stay the same over all rounds.
    pub(crate) proxies: Vec<(Link, Proxy)>,
}

/// One start was measured, or cannot be.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// What it took.
    Measured(Start),
    /// Why there is nothing to measure.
    Skipped(String),
}

impl Bench {
    /// Starts an image on a system with nothing of it on this machine but what its store says.
    pub(crate) fn start(&self, cell: &Cell) -> Result<Outcome> {
        if let Some(reason) = self.missing(cell.system) {
            return Ok(Outcome::Skipped(reason));
        }
        let (image, tag) = (cell.image.name(), cell.system.tag);
        let Some(blobs) = machine::blobs(&self.registry, image, tag)? else {
            let reason = format!("{image}:{tag} could not be made: see the lines before the runs");
            return Ok(Outcome::Skipped(reason));
        };
        let job = self.job(cell, blobs)?;
        let start = match cell.system.kind {
            Kind::Laz(store) => job.laz(store),
            Kind::Lazd(store) => job.lazd(store),
            Kind::Stargz => job.stargz(),
            Kind::Containerd(release) => job.containerd(release),
        };
        let cleaned = process::clean_up(&job.dir);
        let start = start?;
        cleaned?;
        Ok(Outcome::Measured(start))
    }

    /// A start that is about to happen, in an empty directory.
    pub(crate) fn job<'a>(&'a self, cell: &Cell, blobs: Vec<String>) -> Result<Job<'a>> {
        let dir = self.scratch.join("start");
        process::clean_up(&dir)?;
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let (_, proxy) = self
            .proxies
            .iter()
            .find(|(link, _)| *link == cell.link)
            .context("no registry behind this link")?;
        let (image, tag) = (cell.image.name(), cell.system.tag);
        Ok(Job {
            bench: self,
            dir,
            cell: *cell,
            reference: format!("{}/{image}:{tag}", proxy.address()),
            blobs,
            proxy,
        })
    }

    fn missing(&self, system: &System) -> Option<String> {
        let programs = &self.programs;
        match system.kind {
            Kind::Laz(_) if programs.laz.is_none() => Some("no laz was given".into()),
            Kind::Laz(store) => self.abilities.missing(store),
            Kind::Lazd(_) if programs.lazd.is_none() => {
                Some("no lazd with its laz-mountd was given".into())
            }
            Kind::Lazd(_) if programs.containerd_new.is_none() => {
                Some("no containerd of 2.1 or later was given".into())
            }
            // Its store is made by `laz run`.
            Kind::Lazd(Store::Profiled) if programs.laz.is_none() => {
                Some("no laz was given".into())
            }
            Kind::Lazd(store) => self.abilities.missing(store),
            Kind::Stargz if programs.stargz.is_none() => {
                Some("stargz-snapshotter is built with Go, which is not here".into())
            }
            Kind::Stargz | Kind::Containerd(_) => None,
        }
    }
}

/// One start: everything it needs to run on any system.
pub(crate) struct Job<'a> {
    bench: &'a Bench,
    /// Its directory.
    pub(crate) dir: PathBuf,
    cell: Cell,
    /// What it starts, by way of its link.
    pub(crate) reference: String,
    blobs: Vec<String>,
    /// The link.
    pub(crate) proxy: &'a Proxy,
}

impl Job<'_> {
    fn image(&self) -> Image {
        self.cell.image
    }

    fn command(&self) -> &'static [&'static str] {
        self.image().workload(self.cell.system.workload).0
    }

    /// Drops caches; the meter of what comes next.
    pub(crate) fn go_cold(&self) -> Result<Arc<Meter>> {
        machine::make_cold(&self.bench.registry, self.image().name(), &self.blobs)?;
        Ok(self.proxy.measure())
    }

    /// The clock: cold caches, then the commands, until ready.
    fn time(&self, run: &mut Command) -> Result<Start> {
        self.time_both(None, run)
    }

    /// The same with a pull before.
    fn time_both(&self, pull: Option<Command>, run: &mut Command) -> Result<Start> {
        let (_, ready) = self.image().workload(self.cell.system.workload);
        let meter = self.go_cold()?;
        let began = Instant::now();
        let pulled = match pull {
            Some(mut pull) => {
                process::run(&mut pull)?;
                Some(began.elapsed())
            }
            None => None,
        };
        let mut start = process::run_until_ready(run, ready, || Start {
            ready_seconds: began.elapsed().as_secs_f64(),
            wire_bytes: meter.received(),
            requests: meter.requests().len(),
            bytes_over_time: meter.samples(),
            spans: Vec::new(),
        })?;
        start.spans = match pulled {
            Some(pulled) => two_steps(pulled, start.ready_seconds),
            None => spans(&self.dir.join("trace.json")),
        };
        Ok(start)
    }
}

/// A pull, and what follows until ready.
fn two_steps(pulled: Duration, ready_seconds: f64) -> Vec<Span> {
    let (pull_ms, ready_ms) = (pulled.as_secs_f64() * 1e3, ready_seconds * 1e3);
    let span = |name: &str, start_ms, end_ms| Span {
        name: name.to_owned(),
        layer: None,
        start_ms,
        duration_ms: end_ms - start_ms,
    };
    vec![span("pull", 0.0, pull_ms), span("run", pull_ms, ready_ms)]
}

/// The steps in a record of `laz run --trace-file`; none where there is no such record.
fn spans(record: &Path) -> Vec<Span> {
    #[derive(serde::Deserialize)]
    struct Record {
        spans: Vec<Span>,
    }
    let text = fs::read(record).unwrap_or_default();
    serde_json::from_slice(&text).map_or_else(|_| Vec::new(), |record: Record| record.spans)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_steps_fill_the_time_to_ready() {
        let spans = two_steps(Duration::from_millis(250), 0.75);
        let ends: Vec<_> = spans.iter().map(|s| s.start_ms + s.duration_ms).collect();
        assert_eq!((spans[0].start_ms, ends), (0.0, vec![250.0, 750.0]));
    }
}
