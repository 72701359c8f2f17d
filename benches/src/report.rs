//! Samples to medians and ratios, as a table and as JSON.
//!
//! Invariant: the table is computed from the samples in the JSON and from nothing else.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::system::Start;

/// One cold start.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Sample {
    /// Who started it.
    pub(crate) system: &'static str,
    /// What was started.
    pub(crate) image: &'static str,
    /// In which round, from 1.
    pub(crate) round: u32,
    /// What it took.
    #[serde(flatten)]
    pub(crate) start: Start,
}

/// All samples of a run.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    samples: Vec<Sample>,
}

/// Bytes as the 10^6 that registries and links count in.
pub(crate) fn megabytes(bytes: u64) -> f64 {
    // Far below 2^53: exact.
    bytes as f64 / 1e6
}

impl Report {
    /// Takes a sample in.
    pub(crate) fn add(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    /// Whether there is no sample.
    pub(crate) fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Writes the samples, pretty-printed, to `path`.
    pub(crate) fn write_json(&self, path: &Path) -> Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Medians per image and system; `x` says how many times the first system's time it took.
    pub(crate) fn table(&self) -> String {
        let mut groups: BTreeMap<(&str, usize), Vec<&Sample>> = BTreeMap::new();
        let order = self.systems();
        for sample in &self.samples {
            let place = order
                .iter()
                .position(|name| *name == sample.system)
                .unwrap_or(order.len());
            groups
                .entry((sample.image, place))
                .or_default()
                .push(sample);
        }
        let mut out = format!(
            "\n{:<8} {:<20} {:>8} {:>15} {:>6} {:>9}\n",
            "image", "system", "ready s", "(min-max)", "x", "wire MB"
        );
        let mut base = 0.0;
        for ((image, place), samples) in &groups {
            let (times, bytes) = columns(samples);
            let ready = median(&times);
            if *place == 0 {
                base = ready;
            }
            let spread = format!(
                "({:.2}-{:.2})",
                times.first().unwrap_or(&0.0),
                times.last().unwrap_or(&0.0)
            );
            let (system, ratio) = (order.get(*place).unwrap_or(&""), ready / base);
            let wire = median(&bytes);
            let _ = writeln!(
                out,
                "{image:<8} {system:<20} {ready:>8.2} {spread:>15} {ratio:>6.2} {wire:>9.1}"
            );
        }
        out
    }

    /// Systems in the order they were first measured.
    fn systems(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for sample in &self.samples {
            if !names.contains(&sample.system) {
                names.push(sample.system);
            }
        }
        names
    }
}

/// Sorted seconds and sorted megabytes of a group.
fn columns(samples: &[&Sample]) -> (Vec<f64>, Vec<f64>) {
    let mut times: Vec<f64> = samples.iter().map(|s| s.start.ready_seconds).collect();
    let mut bytes: Vec<f64> = samples
        .iter()
        .map(|s| megabytes(s.start.wire_bytes))
        .collect();
    times.sort_by(f64::total_cmp);
    bytes.sort_by(f64::total_cmp);
    (times, bytes)
}

/// Middle of sorted values; the mean of the two middle ones when they are even in number.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle).copied().unwrap_or(f64::NAN);
    if sorted.len() % 2 == 1 {
        return upper;
    }
    let lower = middle
        .checked_sub(1)
        .and_then(|i| sorted.get(i))
        .copied()
        .unwrap_or(f64::NAN);
    f64::midpoint(lower, upper)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(system: &'static str, round: u32, ready_seconds: f64, wire_bytes: u64) -> Sample {
        Sample {
            system,
            image: "debian",
            round,
            start: Start {
                ready_seconds,
                wire_bytes,
            },
        }
    }

    #[test]
    fn medians() {
        for (values, wanted) in [
            (&[3.0][..], 3.0),
            (&[1.0, 2.0, 9.0], 2.0),
            (&[1.0, 2.0], 1.5),
        ] {
            assert!((median(values) - wanted).abs() < 1e-9, "{values:?}");
        }
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn ratios_are_to_the_system_measured_first() {
        let mut report = Report::default();
        for (round, factor) in [(1, 1.0), (2, 3.0), (3, 2.0)] {
            report.add(sample("laz", round, 0.25 * factor, 1_500_000));
            report.add(sample("containerd", round, factor, 63_000_000));
        }
        let table = report.table();
        let rows: Vec<Vec<&str>> = table
            .lines()
            .skip(2)
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            rows,
            [
                ["debian", "laz", "0.50", "(0.25-0.75)", "1.00", "1.5"],
                [
                    "debian",
                    "containerd",
                    "2.00",
                    "(1.00-3.00)",
                    "4.00",
                    "63.0"
                ],
            ]
        );
    }
}
