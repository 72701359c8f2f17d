//! What the warm path took, as data and as a table.
//!
//! Invariant: pure. A ratio is of medians over the same rounds of one run.

use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;

use super::bed::REFERENCE;
use super::step::{Aim, STEPS, State, Step, Unit};
use crate::plan::Image;
use crate::report::{Spread, spread};

/// Everything of a run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// On what it ran.
    pub(super) machine: Vec<String>,
    /// Whether roots were mounted with a directory for what is written.
    writable: bool,
    pub(super) samples: Vec<Sample>,
}

/// One step in one root.
#[derive(Debug, Serialize)]
pub(super) struct Sample {
    pub(super) image: Image,
    pub(super) system: String,
    pub(super) step: &'static str,
    pub(super) state: State,
    pub(super) round: u32,
    /// In milliseconds or microseconds, as the step says.
    pub(super) value: f64,
}

impl Report {
    pub(super) fn new(machine: Vec<String>, writable: bool) -> Self {
        Self {
            machine,
            writable,
            samples: Vec::new(),
        }
    }

    pub(super) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// The reference, then each system with its ratio. One that misses its aim is marked.
    pub(super) fn table(&self, image: Image) -> String {
        let systems = self.systems(image);
        let mut out = format!("\n{}: medians, ! misses its aim\n", image.name());
        let _ = write!(out, "{:<16} {:<14} {:>8} {:>12}", "", "", "aim", REFERENCE);
        for system in &systems {
            let _ = write!(out, " {system:>20}");
        }
        out.push('\n');
        for step in &STEPS {
            let Some(reference) = self.median(image, REFERENCE, step) else {
                continue;
            };
            let (state, aim) = (step.state.name(), aim_text(step.aim));
            let _ = write!(out, "{:<16} {state:<14} {aim:>8} ", step.name);
            let _ = write!(out, "{:>12}", value_text(step.unit, reference));
            for system in &systems {
                let median = self.median(image, system, step).unwrap_or(f64::NAN);
                let mark = match step.aim.is_met(median, reference) {
                    Some(false) => '!',
                    Some(true) | None => ' ',
                };
                let (value, ratio) = (value_text(step.unit, median), median / reference);
                let _ = write!(out, " {value:>11} {ratio:>6.2}x{mark}");
            }
            out.push('\n');
        }
        out
    }

    /// All but the reference, in the order in which they came.
    fn systems(&self, image: Image) -> Vec<&str> {
        let mut systems = Vec::new();
        for sample in self.samples.iter().filter(|sample| sample.image == image) {
            let system = sample.system.as_str();
            if system != REFERENCE && !systems.contains(&system) {
                systems.push(system);
            }
        }
        systems.sort_unstable();
        systems
    }

    fn median(&self, image: Image, system: &str, step: &Step) -> Option<f64> {
        let of = |sample: &&Sample| {
            sample.image == image
                && sample.system == system
                && sample.step == step.name
                && sample.state == step.state
        };
        let values = self.samples.iter().filter(of).map(|sample| sample.value);
        let Spread { median, .. } = spread(values);
        (!median.is_nan()).then_some(median)
    }
}

fn aim_text(aim: Aim) -> String {
    match aim {
        Aim::Times(most) => format!("{most:.2}x"),
        Aim::More(most) => format!("+{most:.0} us"),
        Aim::None => "-".to_owned(),
    }
}

fn value_text(unit: Unit, value: f64) -> String {
    match unit {
        Unit::Milliseconds => format!("{value:.1} ms"),
        Unit::Microseconds => format!("{value:.2} us"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_medians_ratios_and_what_is_missed() {
        let mut report = Report::new(vec!["a machine".to_owned()], false);
        for (round, reference, ours) in [(1, 100.0, 80.0), (2, 110.0, 90.0), (3, 100.0, 500.0)] {
            for (system, value) in [(REFERENCE, reference), ("laz-b", ours), ("laz-a", 50.0)] {
                report.samples.push(Sample {
                    image: Image::Python,
                    system: system.to_owned(),
                    step: "find",
                    state: State::Warm,
                    round,
                    value,
                });
            }
        }
        let text = report.table(Image::Python);
        let row = text.lines().last().unwrap();
        let words: Vec<&str> = row.split_whitespace().collect();
        let wanted = "find warm 0.85x 100.0 ms 50.0 ms 0.50x 90.0 ms 0.90x!";
        assert_eq!(words.join(" "), wanted, "{text}");
        assert!(text.starts_with("\npython: "), "{text}");
        assert!(report.json().unwrap().contains("\"state\": \"warm\""));
    }
}
