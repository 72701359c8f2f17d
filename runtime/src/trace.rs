//! The record of one cold start: what happened when, and what it cost.
//!
//! Invariant: times are milliseconds since the command began, from one monotonic clock.
//! A span is recorded when it ends; one that never ended is not in the record. Printing
//! lives here too, so that `--trace` and the JSON can never tell different stories.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use lazarette_fetcher::plan::whole::{Share, Why};
use parking_lot::Mutex;
use serde::Serialize;

use crate::profile::{ProfileUse, ReadyBy, Recorded};

/// Width of the waterfall's bars in characters.
const BAR_CHARS: usize = 40;

/// Collects the spans of one run; clones share one record.
#[derive(Debug, Clone)]
pub struct Trace {
    origin: Instant,
    spans: Arc<Mutex<Vec<Span>>>,
    shares: Arc<Mutex<BTreeMap<usize, LayerShare>>>,
}

/// One step of a start.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct Span {
    /// Step: `resolve`, `config`, `index`, `mount`, `snapshot`, `create`, `start`, …
    pub name: &'static str,
    /// Layer number from the base up, for steps done per layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// When it began, ms since the command began.
    pub start_ms: f64,
    /// How long it took, ms.
    pub duration_ms: f64,
}

/// Whether a layer was fetched whole, and why.
#[derive(Debug, Clone, Copy, Serialize, PartialEq)]
pub struct LayerShare {
    /// Layer number from the base up.
    pub layer: usize,
    /// What was decided.
    pub share: Share,
    /// What decided it.
    pub why: Why,
    /// Encoded bytes that were missing then, about.
    pub missing_bytes: u64,
    /// What of them the profile named; none without a profile of this command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub covered_bytes: Option<u64>,
}

/// Bytes and requests of one source.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct SourceUse {
    /// Host, or `store` for what was already here.
    pub name: String,
    /// Requests sent.
    pub requests: u64,
    /// Bytes received.
    pub bytes: u64,
}

/// The whole record.
#[derive(Debug, Clone, Serialize)]
pub struct StartRecord {
    /// The reference as parsed.
    pub reference: String,
    /// The manifest that was run.
    pub manifest_digest: String,
    /// Sum of the layers' sizes in the registry, bytes.
    pub image_bytes: u64,
    /// Number of layers.
    pub image_layers: usize,
    /// Steps in order of their start.
    pub spans: Vec<Span>,
    /// How each layer was fetched.
    pub layers: Vec<LayerShare>,
    /// Until the first byte of output, or the exit if there was none, ms.
    pub ready_ms: f64,
    /// Until the first byte of output, ms.
    pub first_byte_ms: Option<f64>,
    /// Until the exit, ms.
    pub exit_ms: f64,
    /// Exit code as the shell sees it.
    pub exit_code: u8,
    /// Everything received, by source.
    pub sources: Vec<SourceUse>,
    /// Everything received over the network, bytes.
    pub fetched_bytes: u64,
    /// Taken from other layers of this node instead, bytes of files.
    pub copied_bytes: u64,
    /// Reads that had to wait for data.
    pub misses: u64,
    /// What ended the recording of what the start read; none without one.
    pub ready_by: Option<ReadyBy>,
    /// The profile that was found and used.
    pub profile: Option<ProfileUse>,
    /// What was recorded for the next start.
    pub recorded: Option<Recorded>,
}

/// A span that is running; dropping it records nothing.
#[must_use = "a span is recorded by `end`"]
pub struct Running {
    trace: Trace,
    name: &'static str,
    layer: Option<usize>,
    began: Instant,
}

impl Trace {
    /// A record whose clock starts at `origin`.
    pub fn new(origin: Instant) -> Self {
        Self {
            origin,
            spans: Arc::default(),
            shares: Arc::default(),
        }
    }

    /// Notes how a layer is fetched; the first word on it stands.
    pub fn shared(&self, share: LayerShare) {
        tracing::debug!(
            layer = share.layer,
            share = ?share.share,
            why = share.why.as_str(),
            bytes = share.missing_bytes,
            "decided how a layer is fetched"
        );
        self.shares.lock().entry(share.layer).or_insert(share);
    }

    /// How layers are fetched, as far as it has been decided.
    pub fn shares(&self) -> Vec<LayerShare> {
        self.shares.lock().values().copied().collect()
    }

    /// Starts a step.
    pub fn start(&self, name: &'static str, layer: Option<usize>) -> Running {
        Running {
            trace: self.clone(),
            name,
            layer,
            began: Instant::now(),
        }
    }

    /// Records a step that ran from `began` to `ended`.
    pub fn record(&self, name: &'static str, began: Instant, ended: Instant) {
        self.push(name, None, began, ended);
    }

    /// Milliseconds from the origin to `at`.
    pub fn ms(&self, at: Instant) -> f64 {
        millis(at.saturating_duration_since(self.origin))
    }

    /// What has been recorded, in order of start.
    pub fn spans(&self) -> Vec<Span> {
        let mut spans = self.spans.lock().clone();
        spans.sort_by(|a, b| a.start_ms.total_cmp(&b.start_ms));
        spans
    }

    fn push(&self, name: &'static str, layer: Option<usize>, began: Instant, ended: Instant) {
        let span = Span {
            name,
            layer,
            start_ms: self.ms(began),
            duration_ms: millis(ended.saturating_duration_since(began)),
        };
        self.spans.lock().push(span);
    }
}

impl Running {
    /// Ends the step and records it.
    pub fn end(self) {
        self.trace
            .push(self.name, self.layer, self.began, Instant::now());
    }
}

impl StartRecord {
    /// The waterfall: one line per step, a bar where it ran, then totals.
    pub fn waterfall(&self) -> String {
        let total = self.exit_ms.max(self.ready_ms).max(1.0);
        let mut out = format!("{:<12} {:>9} {:>9}\n", "step", "start ms", "took ms");
        for span in &self.spans {
            let name = match span.layer {
                Some(layer) => format!("{} {layer}", span.name),
                None => span.name.to_owned(),
            };
            let bar = bar(span.start_ms / total, span.duration_ms / total);
            let _ = writeln!(
                out,
                "{name:<12} {:>9.1} {:>9.1} |{bar}|",
                span.start_ms, span.duration_ms
            );
        }
        if let Some(first) = self.first_byte_ms {
            let _ = writeln!(
                out,
                "{:<12} {first:>9.1} {:>9} |{}|",
                "first byte",
                "",
                bar(first / total, 0.0)
            );
        }
        let _ = writeln!(
            out,
            "{:<12} {:>9.1} {:>9} |{}|",
            "exit",
            self.exit_ms,
            "",
            bar(1.0, 0.0)
        );
        for share in &self.layers {
            let how = match share.share {
                Share::Lazy => "lazily",
                Share::Full => "whole",
            };
            let missing = human_bytes(share.missing_bytes);
            let (number, why) = (share.layer, share.why.as_str());
            let _ = writeln!(out, "layer {number} {how}: {why}, {missing} missing");
        }
        for source in &self.sources {
            let _ = writeln!(
                out,
                "from {}: {} in {} requests",
                source.name,
                human_bytes(source.bytes),
                source.requests
            );
        }
        self.write_profile(&mut out);
        let _ = writeln!(
            out,
            "ready after {:.0} ms with {} of {} fetched ({:.1} %){}",
            self.ready_ms,
            human_bytes(self.fetched_bytes),
            human_bytes(self.image_bytes),
            percent(self.fetched_bytes, self.image_bytes),
            copied_words(self.copied_bytes)
        );
        out
    }

    /// A line on the profile that was used, and one on what was recorded.
    fn write_profile(&self, out: &mut String) {
        if let Some(used) = &self.profile {
            let of = if used.guess { " (a guess)" } else { "" };
            let _ = writeln!(
                out,
                "profile of {} starts{of}: {} blocks, {}; {} fetched in {} chunks",
                used.runs,
                used.blocks,
                human_bytes(used.bytes),
                human_bytes(used.fetched_bytes),
                used.fetched_chunks
            );
        }
        if let (Some(recorded), Some(by)) = (&self.recorded, self.ready_by) {
            let _ = writeln!(
                out,
                "recorded until {}: {} blocks, {}; {} reads waited",
                by.as_str(),
                recorded.blocks,
                human_bytes(recorded.bytes),
                self.misses
            );
        }
    }
}

/// `part` of `whole` in percent; 0 of nothing is 0.
#[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
pub fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 * 100.0 / whole as f64
    }
}

/// What a total says of bytes that were here already; nothing if there were none.
pub fn copied_words(bytes: u64) -> String {
    match bytes {
        0 => String::new(),
        _ => format!("; {} copied from layers that were here", human_bytes(bytes)),
    }
}

/// Bytes for people, in powers of 1000 as registries and disks count: `12.3 MB`.
#[expect(clippy::cast_precision_loss, reason = "three digits for people")]
pub fn human_bytes(bytes: u64) -> String {
    let units = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", units.get(unit).unwrap_or(&"EB"))
}

fn millis(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// `from` and `length` as parts of 1; at least one mark.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "clamped to 0..=BAR_CHARS before the cast"
)]
fn bar(from: f64, length: f64) -> String {
    let cells = BAR_CHARS as f64;
    let start = (from * cells).floor().clamp(0.0, cells - 1.0) as usize;
    let marks = (length * cells).round().clamp(1.0, cells - start as f64) as usize;
    let mark = if length > 0.0 { "#" } else { "*" };
    format!(
        "{}{}{}",
        " ".repeat(start),
        mark.repeat(marks),
        " ".repeat(BAR_CHARS - start - marks)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn spans_are_in_order_of_start() {
        let origin = Instant::now();
        let trace = Trace::new(origin);
        let at = |ms| origin + Duration::from_millis(ms);
        trace.record("start", at(30), at(40));
        trace.record("resolve", at(0), at(20));
        let spans = trace.spans();
        assert_eq!(
            spans.iter().map(|s| s.name).collect::<Vec<_>>(),
            ["resolve", "start"]
        );
        assert!((spans[1].duration_ms - 10.0).abs() < 0.001);
    }

    #[test]
    fn bytes_read_well() {
        let table = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_960, "1.0 MB"),
            (12_345_678, "12.3 MB"),
        ];
        for (bytes, text) in table {
            assert_eq!(human_bytes(bytes), text);
        }
        assert_eq!(human_bytes(u64::MAX), "18.4 EB");
    }

    #[test]
    fn bars_stay_in_their_frame() {
        for (from, length) in [
            (0.0, 0.0),
            (0.0, 1.0),
            (1.0, 0.0),
            (0.99, 0.5),
            (f64::NAN, 2.0),
        ] {
            assert_eq!(bar(from, length).chars().count(), BAR_CHARS);
        }
    }
}
