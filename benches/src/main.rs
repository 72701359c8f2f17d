//! Cold starts measured beside the peers, in one run.
//!
//! Invariant: every start is cold. Its daemon is new, its store is an empty directory, the page
//! cache is dropped, and the bytes are counted on a proxy of its own in front of the registry.
//! Systems take turns within a round, so that a slow minute of the machine hits all of them.
//! It never installs, builds or pushes anything: `benches/run.sh` has done that before.

mod process;
mod proxy;
mod report;
mod system;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Parser;

use report::{Report, Sample};
use system::{Bench, Image, System};

/// Cold starts of real images over loopback: laz, containerd with overlayfs, stargz-snapshotter.
#[derive(Debug, Parser)]
struct Args {
    /// Registry that holds IMAGE:gzip, IMAGE:esgz and IMAGE:optimized, as host:port
    #[arg(long)]
    registry: String,
    /// Empty directory for stores, sockets and logs
    #[arg(long)]
    scratch: PathBuf,
    /// The laz program; without it only the peers are measured
    #[arg(long)]
    laz: Option<PathBuf>,
    /// Directory with containerd-stargz-grpc and ctr-remote
    #[arg(long)]
    stargz: PathBuf,
    /// Directory of another containerd to measure too, as its newest release
    #[arg(long)]
    containerd_new: Option<PathBuf>,
    /// Rounds; each starts every image once on every system
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Where to write the samples as JSON
    #[arg(long)]
    json: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let systems = systems(&args);
    let bench = Bench {
        registry: args.registry.clone(),
        scratch: args.scratch.clone(),
    };
    let mut report = Report::default();
    for round in 1..=args.rounds {
        for image in Image::ALL {
            for system in &systems {
                let start = bench
                    .cold_start(system, image)
                    .with_context(|| format!("{} starting {}", system.name(), image.name()))?;
                eprintln!(
                    "round {round}: {:<18} {:<7} {:>6.2} s {:>7.1} MB",
                    system.name(),
                    image.name(),
                    start.ready_seconds,
                    report::megabytes(start.wire_bytes),
                );
                report.add(Sample {
                    system: system.name(),
                    image: image.name(),
                    round,
                    start,
                });
            }
        }
    }
    if report.is_empty() {
        bail!("nothing was measured");
    }
    report.write_json(&args.json)?;
    print!("{}", report.table());
    println!("samples: {}", args.json.display());
    Ok(())
}

/// Who is measured, in the order of a round.
fn systems(args: &Args) -> Vec<System> {
    let mut systems = Vec::new();
    if let Some(program) = &args.laz {
        systems.extend([false, true].map(|optimized| System::Laz {
            program: program.clone(),
            optimized,
        }));
    }
    systems.push(System::Stargz {
        bin: args.stargz.clone(),
    });
    systems.push(System::Containerd { bin: None });
    if let Some(bin) = &args.containerd_new {
        systems.push(System::Containerd {
            bin: Some(bin.clone()),
        });
    }
    systems
}
