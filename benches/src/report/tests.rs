//! From samples to rows, text, JSON and HTML.

use super::*;

fn sample(system: &'static str, round: u32, ready_seconds: f64, wire_bytes: u64) -> Sample {
    Sample {
        link: Link::Gigabit,
        image: Image::Debian,
        system,
        round,
        start: Start {
            ready_seconds,
            wire_bytes,
            requests: 3,
            bytes_over_time: vec![(0, 10), (20, wire_bytes)],
            spans: Vec::new(),
        },
    }
}

fn report() -> Report {
    let mut report = Report {
        reference: "stargz",
        ..Report::default()
    };
    for (round, factor) in [(1, 1.0), (2, 3.0), (3, 2.0)] {
        report
            .samples
            .push(sample("laz", round, 0.25 * factor, 1_500_000));
        report
            .samples
            .push(sample("stargz", round, factor, 3_000_000));
        report.samples.push(sample("laz-other", round, factor, 1));
    }
    report
}

#[test]
fn medians_and_spreads() {
    for (values, wanted) in [
        (&[3.0][..], (3.0, 3.0, 3.0)),
        (&[9.0, 1.0, 2.0], (2.0, 1.0, 9.0)),
        (&[2.0, 1.0], (1.5, 1.0, 2.0)),
    ] {
        let got = spread(values.iter().copied());
        assert_eq!((got.median, got.min, got.max), wanted, "{values:?}");
    }
    let nothing = spread(std::iter::empty());
    assert!(nothing.median.is_nan() && nothing.min.is_nan() && nothing.max.is_nan());
}

#[test]
fn percentiles_are_of_the_nearest_rank() {
    let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
    for (percent, wanted) in [
        (1.0, 1.0),
        (50.0, 50.0),
        (99.0, 99.0),
        (100.0, 100.0),
        (0.0, 1.0),
    ] {
        assert!(
            (percentile(&hundred, percent) - wanted).abs() < 1e-9,
            "{percent}"
        );
    }
    assert!((percentile(&[7.0], 99.0) - 7.0).abs() < 1e-9);
    assert!((percentile(&[1.0, 2.0, 3.0], 99.0) - 3.0).abs() < 1e-9);
    assert!(percentile(&[], 50.0).is_nan());
}

#[test]
fn ratios_are_to_the_reference_with_the_same_workload() {
    let mut report = report();
    let of = |report: &Report, name| {
        let rows = report.rows();
        let row = rows.iter().find(|row| row.system == name).unwrap();
        (row.of_reference, row.of_limit)
    };
    assert_eq!(of(&report, "laz").0, Some(0.25));
    assert_eq!(of(&report, "stargz").0, Some(1.0));
    assert_eq!(of(&report, "laz-other"), (None, None));
    assert!((of(&report, "laz").1.unwrap() - 0.5 / 0.054).abs() < 1e-9);
    report.samples.push(sample("stargz-other", 1, 4.0, 1));
    assert_eq!(of(&report, "laz-other"), (Some(0.5), None));
    assert_eq!(of(&report, "stargz-other").0, Some(1.0));
}

#[test]
fn the_table_has_a_line_per_row_and_says_what_was_skipped() {
    let mut report = report();
    let skip = Skip {
        image: Image::Debian,
        system: "laz-index",
        reason: "this laz has no `store evict`".into(),
    };
    assert!(report.skip(skip.clone()) && !report.skip(skip));
    report.failures.push(Failure {
        link: Link::Gigabit,
        image: Image::Debian,
        system: "containerd",
        round: 2,
        error: "no disk".into(),
    });
    let text = table::text(&report);
    let line = |name: &str| {
        let line = text.lines().find(|l| l.contains(name)).unwrap();
        line.split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(
        line(" laz "),
        [
            "debian",
            "laz",
            "0.50",
            "(0.25-0.75)",
            "0.25x",
            "9.26x",
            "1.5",
            "3"
        ]
    );
    assert_eq!(
        line("laz-other"),
        [
            "debian",
            "laz-other",
            "2.00",
            "(1.00-3.00)",
            "-",
            "-",
            "0.0",
            "3"
        ]
    );
    assert_eq!(
        text.matches("skipped: laz-index on debian: this laz")
            .count(),
        1
    );
}

#[test]
fn the_same_samples_are_the_same_json() {
    let (once, again) = (report().json().unwrap(), report().json().unwrap());
    assert_eq!(once, again);
    let value: serde_json::Value = serde_json::from_str(&once).unwrap();
    assert_eq!(value["rows"][0]["link"], "1g");
    assert_eq!(value["rows"][0]["ready"]["median"], 0.5);
    assert_eq!(value["samples"][0]["wire_bytes"], 1_500_000);
    assert_eq!(value["samples"].as_array().map(Vec::len), Some(9));
}

#[test]
fn the_page_stands_alone_and_escapes() {
    let mut report = report();
    report.machine = vec!["<kernel>".into()];
    for sample in &mut report.samples {
        sample.start.spans = vec![Span {
            name: "<mount>".into(),
            layer: Some(1),
            start_ms: 1.0,
            duration_ms: 2.0,
        }];
    }
    let page = html::page(&report);
    assert!(page.contains("&lt;kernel&gt;") && page.contains("&lt;mount&gt; 1"));
    let foreign = ["<script", "src=", "href=", "@import", "url(", "<mount>"];
    assert!(foreign.iter().all(|word| !page.contains(word)));
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
}

#[test]
fn the_typical_start_is_the_median_one() {
    let report = report();
    let rows = report.rows();
    let row = rows.iter().find(|row| row.system == "stargz").unwrap();
    assert!((report.typical(row).unwrap().ready_seconds - 2.0).abs() < 1e-9);
}
