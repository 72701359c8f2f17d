//! What was measured, as data: samples, medians and ratios.
//!
//! Invariant: pure. The table, the JSON and the HTML are made from one `Report` and from nothing
//! else, so they can never tell different stories.

pub(crate) mod html;
mod svg;
pub(crate) mod table;

use serde::{Deserialize, Serialize};

use crate::facts;
use crate::plan::{Image, Link, System, Workload, find};

/// What one cold start took.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Start {
    /// From the first command to ready, seconds.
    pub(crate) ready_seconds: f64,
    /// Received from the registry until ready, bytes on the wire, HTTP heads included.
    pub(crate) wire_bytes: u64,
    /// Requests for blobs until ready.
    pub(crate) requests: usize,
    /// (ms since caches were dropped, bytes received by then) until ready.
    pub(crate) bytes_over_time: Vec<(u64, u64)>,
    /// Steps of `laz run`'s own record; empty for others.
    pub(crate) spans: Vec<Span>,
}

/// A step of a start, as `laz run --trace-file` writes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Span {
    /// Which step.
    pub(crate) name: String,
    /// Layer number, for steps done per layer.
    #[serde(default)]
    pub(crate) layer: Option<usize>,
    /// When it began, ms since the command began.
    pub(crate) start_ms: f64,
    /// How long it took, ms.
    pub(crate) duration_ms: f64,
}

/// One cold start of a cell.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Sample {
    /// Over which link.
    pub(crate) link: Link,
    /// What was started.
    pub(crate) image: Image,
    /// Who started it.
    pub(crate) system: &'static str,
    /// In which round, from 1.
    pub(crate) round: u32,
    /// What it took.
    #[serde(flatten)]
    pub(crate) start: Start,
}

/// A system that could not be measured, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Skip {
    /// What would have been started.
    pub(crate) image: Image,
    /// Who would have started it.
    pub(crate) system: &'static str,
    /// Why not.
    pub(crate) reason: String,
}

/// A start that failed, and how.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Failure {
    /// Over which link.
    pub(crate) link: Link,
    /// What would have been started.
    pub(crate) image: Image,
    /// Who should have started it.
    pub(crate) system: &'static str,
    /// In which round, from 1.
    pub(crate) round: u32,
    /// What went wrong, with its causes.
    pub(crate) error: String,
}

/// One full pull.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct FullPull {
    /// Who pulled.
    pub(crate) system: &'static str,
    /// Over which link.
    pub(crate) link: Link,
    /// What.
    pub(crate) image: Image,
    /// In which round, from 1.
    pub(crate) round: u32,
    /// Until it can be mounted, seconds.
    pub(crate) seconds: f64,
    /// Received from the registry, bytes.
    pub(crate) wire_bytes: u64,
    /// Most resident memory of the process that pulls.
    pub(crate) peak_memory_bytes: u64,
}

/// Readers of the same cold file at once.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct FanIn {
    /// Over which link.
    pub(crate) link: Link,
    /// How many.
    pub(crate) readers: u32,
    /// Size of the file, bytes.
    pub(crate) file_bytes: u64,
    /// Until the last reader was done.
    pub(crate) seconds: f64,
    /// Requests for blobs.
    pub(crate) requests: usize,
    /// Received from the registry, bytes.
    pub(crate) wire_bytes: u64,
    /// Bytes that were asked for more than once.
    pub(crate) asked_twice_bytes: u64,
}

/// Reads of 4 KiB that miss, beside the registry's own time for the same ranges.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Misses {
    /// Over which link.
    pub(crate) link: Link,
    /// Reads; those that found a neighbour's bytes are among them.
    pub(crate) reads: usize,
    /// Requests that they caused.
    pub(crate) requests: usize,
    /// Median of the reads, ms.
    pub(crate) miss_p50_ms: f64,
    /// 99th percentile of the reads, ms.
    pub(crate) miss_p99_ms: f64,
    /// Median of the plain requests, ms.
    pub(crate) registry_p50_ms: f64,
    /// 99th percentile of the plain requests, ms.
    pub(crate) registry_p99_ms: f64,
}

/// Everything of a run.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    /// When and on what it ran, a line each.
    pub(crate) machine: Vec<String>,
    /// The system that ratios are to.
    pub(crate) reference: &'static str,
    /// Every start.
    pub(crate) samples: Vec<Sample>,
    /// What was not measured.
    pub(crate) skipped: Vec<Skip>,
    /// What went wrong.
    pub(crate) failures: Vec<Failure>,
    /// Every full pull.
    pub(crate) full_pulls: Vec<FullPull>,
    /// Many readers.
    pub(crate) fan_in: Vec<FanIn>,
    /// Single misses.
    pub(crate) misses: Vec<Misses>,
}

/// All samples of one cell, summed up: a row of the table.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// Over which link.
    pub(crate) link: Link,
    /// What was started.
    pub(crate) image: Image,
    /// Who started it.
    pub(crate) system: &'static str,
    /// How often.
    pub(crate) starts: usize,
    /// Time to ready, seconds.
    pub(crate) ready: Spread,
    /// Median of the bytes received until ready.
    pub(crate) wire_bytes: f64,
    /// Median of the requests until ready.
    pub(crate) requests: f64,
    /// Ready as a multiple of the reference's with the same workload.
    pub(crate) of_reference: Option<f64>,
    /// Ready as a multiple of the limit; known for recorded workloads.
    pub(crate) of_limit: Option<f64>,
}

/// Median, least and most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// Median.
    pub(crate) median: f64,
    /// Least.
    pub(crate) min: f64,
    /// Most.
    pub(crate) max: f64,
}

/// Bytes as the 10^6 that registries and links count in.
pub(crate) fn megabytes(bytes: f64) -> f64 {
    bytes / 1e6
}

impl Report {
    /// Takes a skip in, once however many rounds and links there are; whether it is new.
    pub(crate) fn skip(&mut self, skip: Skip) -> bool {
        let new = !self.skipped.contains(&skip);
        if new {
            self.skipped.push(skip);
        }
        new
    }

    /// One row per cell that was measured, by link and image, in the order of the starts.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut cells: Vec<(Link, Image, &'static str)> = Vec::new();
        for s in &self.samples {
            let cell = (s.link, s.image, s.system);
            if !cells.contains(&cell) {
                cells.push(cell);
            }
        }
        cells.sort_by_key(|cell| (cell.0, cell.1));
        cells.into_iter().map(|cell| self.row(cell)).collect()
    }

    fn row(&self, (link, image, system): (Link, Image, &'static str)) -> Row {
        let starts = self.starts(link, image, system);
        let values = |get: fn(&Start) -> f64| spread(starts.iter().copied().map(get));
        let ready = values(|start| start.ready_seconds);
        let reference = reference_for(self.reference, system)
            .map(|name| self.starts(link, image, name))
            .filter(|starts| !starts.is_empty())
            .map(|starts| spread(starts.iter().map(|start| start.ready_seconds)));
        let limit = is_recorded(system).then(|| facts::start_limit(image, link));
        Row {
            link,
            image,
            system,
            starts: starts.len(),
            ready,
            wire_bytes: values(|start| count(start.wire_bytes)).median,
            requests: values(|start| count(start.requests as u64)).median,
            of_reference: reference.map(|reference| ready.median / reference.median),
            of_limit: limit.map(|limit| ready.median / limit),
        }
    }

    fn starts(&self, link: Link, image: Image, system: &str) -> Vec<&Start> {
        self.samples
            .iter()
            .filter(|s| (s.link, s.image, s.system) == (link, image, system))
            .map(|s| &s.start)
            .collect()
    }

    /// The start of a cell whose time is the median (the slower one of two), for charts.
    pub(crate) fn typical(&self, row: &Row) -> Option<&Start> {
        let mut starts = self.starts(row.link, row.image, row.system);
        starts.sort_by(|a, b| a.ready_seconds.total_cmp(&b.ready_seconds));
        starts.get(starts.len() / 2).copied()
    }

    /// The report and its rows as pretty JSON, fields and elements always in the same order.
    pub(crate) fn json(&self) -> serde_json::Result<String> {
        #[derive(Serialize)]
        struct Whole<'a> {
            rows: Vec<Row>,
            #[serde(flatten)]
            report: &'a Report,
        }
        let rows = self.rows();
        serde_json::to_string_pretty(&Whole { rows, report: self }).map(|text| text + "\n")
    }
}

/// Whom a system is compared with: the reference, or the same on the other workload.
fn reference_for(reference: &str, system: &str) -> Option<&'static str> {
    let workload = find(system).ok()?.workload;
    let name = match workload {
        Workload::Recorded => reference.to_owned(),
        Workload::Other => format!("{reference}-other"),
    };
    find(&name).ok().map(|system: &System| system.name)
}

fn is_recorded(system: &str) -> bool {
    find(system).is_ok_and(|system| system.workload == Workload::Recorded)
}

/// Counts stay far below 2^53, where they are exact.
fn count(value: u64) -> f64 {
    value as f64
}

/// Median, least and most of values; not a number where there are none.
pub(crate) fn spread(values: impl Iterator<Item = f64>) -> Spread {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let at = |i: Option<usize>| i.and_then(|i| sorted.get(i)).copied().unwrap_or(f64::NAN);
    let (middle, last) = (sorted.len() / 2, sorted.len().checked_sub(1));
    let median = if sorted.len() % 2 == 1 {
        at(Some(middle))
    } else {
        f64::midpoint(at(middle.checked_sub(1)), at(Some(middle)))
    };
    Spread {
        median,
        min: at(Some(0)),
        max: at(last),
    }
}

/// The value that `percent` of all are at or below (nearest rank); not a number of none.
pub(crate) fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let below = |rank: &usize| count(*rank as u64) * 100.0 < percent * count(sorted.len() as u64);
    let rank = (1..=sorted.len()).take_while(below).count();
    let last = sorted.len().saturating_sub(1);
    sorted.get(rank.min(last)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests;
