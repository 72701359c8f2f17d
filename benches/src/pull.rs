//! Full pulls of unmodified images: until every byte is here and the image can be mounted.
//!
//! Invariant: as cold as a start. The memory is that of the one process that does the work: `laz`
//! itself, or the daemon (what it starts to unpack is not in it, to containerd's advantage).

use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use crate::machine;
use crate::plan::{Cell, Image, Kind, Link, Release, System, Workload};
use crate::process;
use crate::report::FullPull;
use crate::system::{Bench, Job, Plugin};

/// Who pulls; the names are those of the table.
const PULLERS: [System; 2] = [
    System {
        name: "laz pull --full",
        kind: Kind::Laz(crate::plan::Store::Fresh),
        tag: "gzip",
        workload: Workload::Recorded,
    },
    System {
        name: "containerd pull",
        kind: Kind::Containerd(Release::Newest),
        tag: "gzip",
        workload: Workload::Recorded,
    },
];

/// Pulls `image` over `link` once with each system that is here.
pub(crate) fn measure(
    bench: &Bench,
    round: u32,
    link: Link,
    image: Image,
) -> Result<Vec<FullPull>> {
    let mut pulls = Vec::new();
    for system in &PULLERS {
        if matches!(system.kind, Kind::Laz(_)) && bench.programs.laz.is_none() {
            continue;
        }
        let Some(blobs) = machine::blobs(&bench.registry, image.name(), system.tag)? else {
            continue;
        };
        let cell = Cell {
            round,
            link,
            image,
            system,
        };
        let job = bench.job(&cell, blobs)?;
        let pulled = pull(&job, &cell);
        let cleaned = process::clean_up(&job.dir);
        pulls.push(pulled?);
        cleaned?;
    }
    Ok(pulls)
}

fn pull(job: &Job<'_>, cell: &Cell) -> Result<FullPull> {
    let log = job.dir.join("pull.log");
    let (mut command, daemon) = match cell.system.kind {
        Kind::Containerd(release) => {
            let (daemon, socket) = job.start_containerd(release, &Plugin::None)?;
            (job.pull(release, &socket, &[]), Some(daemon))
        }
        Kind::Laz(_) | Kind::Lazd(_) | Kind::Stargz => (laz_pull(job)?, None),
    };
    let meter = job.go_cold()?;
    let began = Instant::now();
    let own = process::run_watching_memory(&mut command, &log)?;
    let seconds = began.elapsed().as_secs_f64();
    let peak_memory_bytes = match &daemon {
        Some(daemon) => process::peak_memory(daemon.id()).unwrap_or(0),
        None => own,
    };
    Ok(FullPull {
        system: cell.system.name,
        link: cell.link,
        image: cell.image,
        round: cell.round,
        seconds,
        wire_bytes: meter.received(),
        peak_memory_bytes,
    })
}

fn laz_pull(job: &Job<'_>) -> Result<Command> {
    let mut pull = job.laz_program()?;
    pull.args(["pull", "--full", &job.reference]);
    Ok(pull)
}
