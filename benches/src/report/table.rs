//! The report as text for a terminal.
//!
//! Invariant: one line per row, a dash where a figure is not known.

use std::fmt::Write as _;

use super::{FullPull, Report, Row, megabytes, spread};
use crate::facts;

/// All tables that have rows.
pub(crate) fn text(report: &Report) -> String {
    let mut out = starts(report);
    out += &full_pulls(report);
    out += &probes(report);
    for skip in &report.skipped {
        let _ = writeln!(
            out,
            "skipped: {} on {}: {}",
            skip.system,
            skip.image.name(),
            skip.reason
        );
    }
    for failure in &report.failures {
        let _ = writeln!(
            out,
            "FAILED: {} on {} over {} in round {}: {}",
            failure.system,
            failure.image.name(),
            failure.link.name(),
            failure.round,
            failure.error
        );
    }
    out
}

fn starts(report: &Report) -> String {
    let rows = report.rows();
    let mut out = String::new();
    let mut link = None;
    for row in &rows {
        if link != Some(row.link) {
            link = Some(row.link);
            let _ = writeln!(out, "\nCold start to ready, {}", row.link.title());
            let _ = writeln!(
                out,
                "{:<8} {:<22} {:>8} {:>15} {:>9} {:>8} {:>8} {:>8}",
                "image",
                "system",
                "ready s",
                "(min-max)",
                format!("/{}", report.reference),
                "/limit",
                "wire MB",
                "requests"
            );
        }
        let _ = writeln!(out, "{}", start(row));
    }
    out
}

fn start(row: &Row) -> String {
    let ready = row.ready;
    let range = format!("({:.2}-{:.2})", ready.min, ready.max);
    format!(
        "{:<8} {:<22} {:>8.2} {range:>15} {:>9} {:>8} {:>8.1} {:>8.0}",
        row.image.name(),
        row.system,
        ready.median,
        ratio(row.of_reference),
        ratio(row.of_limit),
        megabytes(row.wire_bytes),
        row.requests
    )
}

/// `0.42x`, or a dash.
pub(super) fn ratio(value: Option<f64>) -> String {
    match value {
        Some(value) if value.is_finite() => format!("{value:.2}x"),
        Some(_) | None => "-".to_owned(),
    }
}

fn full_pulls(report: &Report) -> String {
    let mut cells: Vec<&FullPull> = Vec::new();
    for pull in &report.full_pulls {
        if !cells.iter().any(|cell| same(cell, pull)) {
            cells.push(pull);
        }
    }
    let mut out = String::new();
    if !cells.is_empty() {
        let _ = writeln!(
            out,
            "\nFull pull until mountable\n{:<9} {:<8} {:<16} {:>8} {:>15} {:>8} {:>9} {:>8}",
            "link", "image", "system", "s", "(min-max)", "/limit", "peak MiB", "wire MB"
        );
    }
    for cell in cells {
        let all = || report.full_pulls.iter().filter(|pull| same(cell, pull));
        let seconds = spread(all().map(|pull| pull.seconds));
        let memory = spread(all().map(|pull| pull.peak_memory_bytes as f64));
        let limit = facts::pull_limit(cell.image, cell.link);
        let _ = writeln!(
            out,
            "{:<9} {:<8} {:<16} {:>8.2} {:>15} {:>8} {:>9.0} {:>8.1}",
            cell.link.name(),
            cell.image.name(),
            cell.system,
            seconds.median,
            format!("({:.2}-{:.2})", seconds.min, seconds.max),
            ratio(Some(seconds.median / limit)),
            memory.max / f64::from(1 << 20),
            megabytes(spread(all().map(|pull| pull.wire_bytes as f64)).median)
        );
    }
    out
}

fn same(a: &FullPull, b: &FullPull) -> bool {
    (a.link, a.image, a.system) == (b.link, b.image, b.system)
}

fn probes(report: &Report) -> String {
    let mut out = String::new();
    for probe in &report.fan_in {
        let _ = writeln!(
            out,
            "\n{} reader(s) of one cold file of {:.1} MB, {}: {:.2} s, {} requests, {:.1} MB on the wire, \
             {} bytes asked for more than once",
            probe.readers,
            megabytes(probe.file_bytes as f64),
            probe.link.title(),
            probe.seconds,
            probe.requests,
            megabytes(probe.wire_bytes as f64),
            probe.asked_twice_bytes
        );
    }
    for probe in &report.misses {
        let _ = writeln!(
            out,
            "\n{} reads of 4 KiB, {} requests, {}: p50 {:.2} ms, p99 {:.2} ms; the registry for the same ranges: \
             p50 {:.2} ms, p99 {:.2} ms; p99 is {} of it",
            probe.reads,
            probe.requests,
            probe.link.title(),
            probe.miss_p50_ms,
            probe.miss_p99_ms,
            probe.registry_p50_ms,
            probe.registry_p99_ms,
            ratio(Some(probe.miss_p99_ms / probe.registry_p99_ms))
        );
    }
    out
}
