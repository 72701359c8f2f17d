//! What is done in every root, from which state, and what is aimed at.
//!
//! Invariant: pure data.

use serde::Serialize;

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) act: Act,
    pub(super) state: State,
    pub(super) unit: Unit,
    pub(super) aim: Aim,
}

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    /// `find ROOT`, by names alone.
    Find,
    /// `find ROOT -printf %s`, which asks for the attributes of each.
    FindStat,
    /// Open, read to the end, close: every file of 1 to 65,536 bytes. Per file.
    SmallFiles,
    /// The largest file in pieces of 1 MiB.
    Sequential,
    /// 4 KiB at shuffled pages of the largest file. Median of the reads.
    Random,
    /// `tar` into a pipe that is read.
    Tar,
    /// The image's interpreter, chrooted, to its end.
    Exec,
}

/// What the kernel remembers when a step begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum State {
    /// Everything: the same was done just before.
    Warm,
    /// Contents; names and attributes were dropped (`drop_caches` of 2).
    NamesDropped,
    /// What the disk below holds is in memory, and nothing of it in the file system that is
    /// looked at, names included. overlayfs on ext4 is that disk: only its names were dropped.
    MountCold,
    /// Nothing (`drop_caches` of 3).
    Disk,
}

/// How a value is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Milliseconds,
    Microseconds,
}

/// What is aimed at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Aim {
    /// At most so many times what overlayfs takes.
    Times(f64),
    /// At most so many microseconds more.
    More(f64),
    /// Shown to be known.
    None,
}

/// All of them, in the order of the table.
pub(super) const STEPS: [Step; 17] = [
    ms("find", Act::Find, State::Warm, Aim::Times(0.85)),
    ms("find", Act::Find, State::NamesDropped, Aim::Times(0.85)),
    ms("find", Act::Find, State::Disk, Aim::Times(0.85)),
    ms("find + stat", Act::FindStat, State::Warm, Aim::Times(0.85)),
    ms(
        "find + stat",
        Act::FindStat,
        State::NamesDropped,
        Aim::Times(0.85),
    ),
    ms("find + stat", Act::FindStat, State::Disk, Aim::Times(0.85)),
    us(
        "open/read/close",
        Act::SmallFiles,
        State::Warm,
        Aim::Times(1.05),
    ),
    us(
        "open/read/close",
        Act::SmallFiles,
        State::MountCold,
        Aim::Times(2.5),
    ),
    ms(
        "sequential read",
        Act::Sequential,
        State::Warm,
        Aim::Times(1.05),
    ),
    ms(
        "sequential read",
        Act::Sequential,
        State::MountCold,
        Aim::None,
    ),
    ms(
        "sequential read",
        Act::Sequential,
        State::Disk,
        Aim::Times(1.05),
    ),
    us("random 4 KiB", Act::Random, State::Warm, Aim::Times(1.05)),
    us(
        "random 4 KiB",
        Act::Random,
        State::MountCold,
        Aim::More(25.0),
    ),
    ms("tar", Act::Tar, State::Warm, Aim::Times(1.05)),
    ms("tar", Act::Tar, State::Disk, Aim::Times(1.05)),
    ms("exec", Act::Exec, State::Warm, Aim::Times(1.05)),
    ms("exec", Act::Exec, State::Disk, Aim::Times(1.05)),
];

const fn ms(name: &'static str, act: Act, state: State, aim: Aim) -> Step {
    let unit = Unit::Milliseconds;
    Step {
        name,
        act,
        state,
        unit,
        aim,
    }
}

const fn us(name: &'static str, act: Act, state: State, aim: Aim) -> Step {
    let unit = Unit::Microseconds;
    Step {
        name,
        act,
        state,
        unit,
        aim,
    }
}

impl State {
    /// For the table.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::NamesDropped => "names dropped",
            Self::MountCold => "mount cold",
            Self::Disk => "from disk",
        }
    }
}

impl Aim {
    /// Whether `value` beside the reference's is what is aimed at; none where nothing is.
    pub(super) fn is_met(self, value: f64, reference: f64) -> Option<bool> {
        match self {
            Self::Times(most) => Some(value <= reference * most),
            Self::More(most) => Some(value - reference <= most),
            Self::None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_steps_are_the_same() {
        for (at, step) in STEPS.iter().enumerate() {
            let same = |other: &&Step| other.name == step.name && other.state == step.state;
            let first = STEPS.iter().position(|other| same(&other));
            assert_eq!(first, Some(at), "{} {}", step.name, step.state.name());
        }
    }

    #[test]
    fn aims_are_times_or_more() {
        for (aim, value, reference, met) in [
            (Aim::Times(0.85), 8.5, 10.0, Some(true)),
            (Aim::Times(0.85), 8.6, 10.0, Some(false)),
            (Aim::More(25.0), 26.0, 1.0, Some(true)),
            (Aim::More(25.0), 26.5, 1.0, Some(false)),
            (Aim::None, 26.5, 1.0, None),
        ] {
            assert_eq!(aim.is_met(value, reference), met, "{aim:?} {value}");
        }
    }
}
