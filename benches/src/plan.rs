//! What is measured: systems, images, links, and the order of their starts.
//!
//! Invariant: pure. A plan is a list made before anything runs; within a round every system
//! starts the same image over the same link one after another, so that a slow minute of the
//! machine hits all of them.

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

/// An image of `tests/images`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub(crate) enum Image {
    /// One layer; ready when `/bin/true` exits.
    Debian,
    /// Three layers; ready when its imports are done.
    Python,
    /// Three layers; ready when it has said hello.
    Java,
    /// Three layers; ready when its port answers.
    Nginx,
    /// Five layers, 1 GB; ready when torch is imported.
    Ml,
}

/// How one knows that a container is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ready {
    /// It has ended.
    Exit,
    /// It printed a line that starts so.
    Line(&'static str),
    /// This port of loopback answers an HTTP request with 200; the container goes on.
    Port(u16),
}

/// What runs in the container: the workload that is recorded, or one that nobody recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workload {
    /// The image's own command.
    Recorded,
    /// Other files of the same image.
    Other,
}

/// The line that a workload prints when it is ready.
const MARK: Ready = Ready::Line("READY");

impl Image {
    /// Repository in the registry, and name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Python => "python",
            Self::Java => "java",
            Self::Nginx => "nginx",
            Self::Ml => "ml",
        }
    }

    /// Command of a workload in the container, and when it is ready.
    pub(crate) fn workload(self, workload: Workload) -> (&'static [&'static str], Ready) {
        let packages = &[
            "sh",
            "-c",
            "dpkg -l | wc -l && perl -MPOSIX -e 'print qq(READY\n)'",
        ];
        match (self, workload) {
            (Self::Debian, Workload::Recorded) => (&["/bin/true"], Ready::Exit),
            (Self::Python | Self::Ml, Workload::Recorded) => (&["python3", "/app/app.py"], MARK),
            (Self::Java, Workload::Recorded) => (&["java", "-cp", "/app", "Hello"], MARK),
            (Self::Nginx, Workload::Recorded) => (&["nginx"], Ready::Port(18080)),
            (Self::Debian | Self::Nginx, Workload::Other) => (packages, MARK),
            (Self::Python, Workload::Other) => (
                &[
                    "python3",
                    "-c",
                    "import asyncio, sqlite3, unittest, xml.dom.minidom; print('READY')",
                ],
                MARK,
            ),
            (Self::Java, Workload::Other) => (&["java", "-cp", "/app", "Other"], MARK),
            (Self::Ml, Workload::Other) => (
                &[
                    "python3",
                    "-c",
                    "import pandas, scipy.stats, sklearn.linear_model; print('READY')",
                ],
                MARK,
            ),
        }
    }
}

/// The way between the registry and this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
pub(crate) enum Link {
    /// No shaping at all.
    #[value(name = "loopback")]
    #[serde(rename = "loopback")]
    Loopback,
    /// 1 Gbit/s, 5 ms each way.
    #[value(name = "1g")]
    #[serde(rename = "1g")]
    Gigabit,
    /// 100 Mbit/s, 20 ms each way.
    #[value(name = "100m")]
    #[serde(rename = "100m")]
    HundredMegabit,
}

impl Link {
    /// Name in options and reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Gigabit => "1g",
            Self::HundredMegabit => "100m",
        }
    }

    /// For people.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Gigabit => "1 Gbit/s, 5 ms each way",
            Self::HundredMegabit => "100 Mbit/s, 20 ms each way",
        }
    }

    /// Delay of each direction.
    pub(crate) fn one_way(self) -> Duration {
        match self {
            Self::Loopback => Duration::ZERO,
            Self::Gigabit => Duration::from_millis(5),
            Self::HundredMegabit => Duration::from_millis(20),
        }
    }

    /// What `benches/links.sh` shapes it to, bytes a second; none is unlimited.
    pub(crate) fn bytes_per_second(self) -> Option<f64> {
        match self {
            Self::Loopback => None,
            Self::Gigabit => Some(125e6),
            Self::HundredMegabit => Some(12.5e6),
        }
    }
}

/// The state of our store before the timed start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// Empty.
    Fresh,
    /// The image ran once and was evicted: manifests and indexes are there. Profiles are ignored.
    Indexed,
    /// As `Indexed`, and the start-up profile of the recorded workload is used.
    Profiled,
    /// Every byte of the image is on the disk, and the recorded workload ran once.
    Local,
}

/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Release {
    /// The one of Debian's sid.
    Newest,
    /// The one of this machine.
    System,
}

/// What a system is built of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// This project's `laz`.
    Laz(Store),
    /// This project's `lazd` as a snapshotter of the newest containerd.
    Lazd(Store),
    /// containerd with stargz-snapshotter.
    Stargz,
    /// containerd with overlayfs, pulling in full.
    Containerd(Release),
}

/// A system under test: one row of the table.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct System {
    /// Name in options and reports.
    pub(crate) name: &'static str,
    /// What it is built of.
    pub(crate) kind: Kind,
    /// Tag of the image it starts: `gzip` (unmodified), `esgz` (our conversion), `optimized`
    /// (by ctr-remote, for exactly the recorded workload) or `profiled` (our conversion to
    /// zstd:chunked, ordered by the recorded profile).
    pub(crate) tag: &'static str,
    /// What it runs.
    pub(crate) workload: Workload,
}

const fn system(name: &'static str, kind: Kind, tag: &'static str) -> System {
    System {
        name,
        kind,
        tag,
        workload: Workload::Recorded,
    }
}

const fn other(name: &'static str, kind: Kind, tag: &'static str) -> System {
    System {
        name,
        kind,
        tag,
        workload: Workload::Other,
    }
}

/// All of them, in the order of a round.
pub(crate) const SYSTEMS: [System; 16] = [
    system("laz", Kind::Laz(Store::Fresh), "esgz"),
    system("laz-optimized", Kind::Laz(Store::Fresh), "optimized"),
    system("laz-index", Kind::Laz(Store::Indexed), "gzip"),
    system("laz-profile", Kind::Laz(Store::Profiled), "gzip"),
    system(
        "laz-optimized-profile",
        Kind::Laz(Store::Profiled),
        "optimized",
    ),
    system("laz-local", Kind::Laz(Store::Local), "gzip"),
    system("laz-converted", Kind::Laz(Store::Fresh), "profiled"),
    system("lazd-optimized", Kind::Lazd(Store::Fresh), "optimized"),
    system("lazd-profile", Kind::Lazd(Store::Profiled), "gzip"),
    system("stargz", Kind::Stargz, "optimized"),
    system("containerd", Kind::Containerd(Release::Newest), "gzip"),
    system("containerd-1.6", Kind::Containerd(Release::System), "gzip"),
    other("laz-other", Kind::Laz(Store::Fresh), "optimized"),
    other("laz-profile-other", Kind::Laz(Store::Profiled), "gzip"),
    other("lazd-other", Kind::Lazd(Store::Fresh), "optimized"),
    other("stargz-other", Kind::Stargz, "optimized"),
];

/// The system of that name.
pub(crate) fn find(name: &str) -> Result<&'static System, String> {
    SYSTEMS.iter().find(|s| s.name == name).ok_or_else(|| {
        let names: Vec<_> = SYSTEMS.iter().map(|s| s.name).collect();
        format!("there are {}", names.join(", "))
    })
}

/// One start to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Cell {
    /// From 1.
    pub(crate) round: u32,
    /// Over which link.
    pub(crate) link: Link,
    /// Which image.
    pub(crate) image: Image,
    /// By whom.
    pub(crate) system: &'static System,
}

/// What was asked for.
#[derive(Debug)]
pub(crate) struct Selection {
    /// Links, in order.
    pub(crate) links: Vec<Link>,
    /// Images, in order.
    pub(crate) images: Vec<Image>,
    /// Systems, in order.
    pub(crate) systems: Vec<&'static System>,
    /// How often.
    pub(crate) rounds: u32,
}

impl Selection {
    /// Every start, in order: rounds outside, systems inside.
    pub(crate) fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for round in 1..=self.rounds {
            for &link in &self.links {
                for &image in &self.images {
                    cells.extend(self.systems.iter().map(|&system| Cell {
                        round,
                        link,
                        image,
                        system,
                    }));
                }
            }
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_take_turns_inside_a_round() {
        let selection = Selection {
            links: vec![Link::Loopback, Link::Gigabit],
            images: vec![Image::Debian],
            systems: vec![find("laz").unwrap(), find("stargz").unwrap()],
            rounds: 2,
        };
        let order: Vec<_> = selection
            .cells()
            .iter()
            .map(|c| format!("{} {} {}", c.round, c.link.name(), c.system.name))
            .collect();
        let round = |n| {
            ["loopback laz", "loopback stargz", "1g laz", "1g stargz"]
                .map(|rest| format!("{n} {rest}"))
        };
        assert_eq!(order, [round(1), round(2)].concat());
    }

    #[test]
    fn names_are_unique_and_unknown_ones_are_refused() {
        for system in &SYSTEMS {
            assert_eq!(find(system.name), Ok(system));
        }
        assert!(find("docker").unwrap_err().contains("stargz-other"));
    }

    #[test]
    fn another_workload_runs_another_command() {
        for image in Image::value_variants() {
            assert_ne!(
                image.workload(Workload::Recorded),
                image.workload(Workload::Other)
            );
        }
    }
}
