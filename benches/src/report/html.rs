//! The report as one HTML page that needs nothing else.
//!
//! Invariant: no script, no style sheet, font or picture from elsewhere; every text is escaped.

use std::fmt::Write as _;

use super::svg::{self, Bar, Line, escape};
use super::table::{self, ratio};
use super::{Report, Row, Span, Start, megabytes};
use crate::facts;
use crate::plan::{Image, Link};

const HEAD: &str = "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>lazarette: cold starts</title>\n\
    <style>body{font:14px sans-serif;margin:2em auto;max-width:900px}table{border-collapse:collapse}\
    td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}\
    pre{overflow-x:auto;background:#f5f5f5;padding:1em}h3{margin-top:2em}</style>\n<h1>Cold starts</h1>\n";

/// The whole page.
pub(crate) fn page(report: &Report) -> String {
    let mut out = HEAD.to_owned();
    for line in &report.machine {
        let _ = writeln!(out, "<p>{}</p>", escape(line));
    }
    let rows = report.rows();
    let mut cells: Vec<(Link, Image)> = rows.iter().map(|row| (row.link, row.image)).collect();
    cells.dedup();
    let mut link = None;
    for cell in cells {
        if link != Some(cell.0) {
            link = Some(cell.0);
            let _ = writeln!(out, "<h2>{}</h2>", escape(cell.0.title()));
        }
        let rows: Vec<&Row> = rows
            .iter()
            .filter(|row| (row.link, row.image) == cell)
            .collect();
        out += &section(report, &rows, cell);
    }
    let _ = writeln!(
        out,
        "<h2>All figures</h2>\n<pre>{}</pre>\n</html>",
        escape(&table::text(report))
    );
    out
}

/// One image over one link: bars, bytes over time, and waterfalls where there are records.
fn section(report: &Report, rows: &[&Row], (link, image): (Link, Image)) -> String {
    let mut out = format!("<h3>{}: time to ready</h3>\n", escape(image.name()));
    let limit = facts::start_limit(image, link);
    let bars: Vec<Bar> = rows.iter().map(|row| ready_bar(row)).collect();
    out += &svg::bars(&bars, Some(limit));
    out += &figures(report, rows);
    let typical: Vec<(&Row, &Start)> = rows
        .iter()
        .filter_map(|row| Some((*row, report.typical(row)?)))
        .collect();
    let lines: Vec<Line> = typical
        .iter()
        .map(|(row, start)| bytes_line(row, start))
        .collect();
    let _ = writeln!(
        out,
        "<h3>{}: bytes over time, to ready</h3>",
        escape(image.name())
    );
    out += &svg::lines(&lines, "s", "MB");
    for (row, start) in typical.iter().filter(|(_, start)| !start.spans.is_empty()) {
        let title = format!("{}: where {} spends its start", image.name(), row.system);
        let _ = writeln!(out, "<h3>{}</h3>", escape(&title));
        out += &waterfall(&start.spans, start.ready_seconds * 1e3);
    }
    out
}

fn ready_bar(row: &Row) -> Bar {
    Bar {
        name: row.system.to_owned(),
        start: 0.0,
        length: row.ready.median,
        figure: format!("{:.2} s", row.ready.median),
    }
}

fn figures(report: &Report, rows: &[&Row]) -> String {
    let mut out = format!(
        "<table><tr><th>system</th><th>ready s</th><th>min to max</th><th>of {}</th><th>of the limit</th>\
         <th>MB</th><th>requests</th></tr>\n",
        escape(report.reference)
    );
    for row in rows {
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td>{:.2}</td><td>{:.2} to {:.2}</td><td>{}</td><td>{}</td><td>{:.1}</td><td>{:.0}</td></tr>",
            escape(row.system),
            row.ready.median,
            row.ready.min,
            row.ready.max,
            ratio(row.of_reference),
            ratio(row.of_limit),
            megabytes(row.wire_bytes),
            row.requests
        );
    }
    out + "</table>\n"
}

/// Bytes so far at each moment, ending at ready.
fn bytes_line(row: &Row, start: &Start) -> Line {
    let mut points = vec![(0.0, 0.0)];
    let samples = start.bytes_over_time.iter();
    points.extend(samples.map(|&(ms, bytes)| (ms as f64 / 1e3, megabytes(bytes as f64))));
    points.push((start.ready_seconds, megabytes(start.wire_bytes as f64)));
    Line {
        name: row.system.to_owned(),
        points,
    }
}

fn waterfall(spans: &[Span], ready_ms: f64) -> String {
    let mut bars: Vec<Bar> = spans
        .iter()
        .map(|span| Bar {
            name: match span.layer {
                Some(layer) => format!("{} {layer}", span.name),
                None => span.name.clone(),
            },
            start: span.start_ms,
            length: span.duration_ms,
            figure: format!("{:.0} ms", span.duration_ms),
        })
        .collect();
    bars.push(Bar {
        name: "until ready".to_owned(),
        start: 0.0,
        length: ready_ms,
        figure: format!("{ready_ms:.0} ms"),
    });
    svg::bars(&bars, None)
}
