//! Cold starts, and the warm path, measured beside the peers, each in one run.
//!
//! Invariant: every start that `measure` takes is cold. Its daemon is new, its directory is empty but for what its
//! system is said to know, the page cache is dropped, and bytes are counted on a proxy in front of
//! the registry. It never installs, builds, pushes or shapes anything: `benches/run.sh` has done
//! that before, and takes it away after.

mod facts;
mod http;
mod machine;
mod plan;
mod probe;
mod process;
mod proxy;
mod pull;
mod report;
mod sys;
mod system;
mod warm;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};

use plan::{Image, Link, SYSTEMS, Selection, System};
use proxy::Proxy;
use report::{Failure, Report, Sample, Skip};
use system::{Abilities, Bench, Outcome, Programs};

/// Cold starts of real images: laz, lazd in containerd, containerd with overlayfs, stargz-snapshotter.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure and report
    Measure(Box<Measure>),
    /// Measure complete images beside overlayfs on ext4 and report
    Warm(Box<warm::Options>),
    /// End what names DIR or lives on it, unmount what is below it, and delete it
    CleanUp {
        /// A directory of an earlier `measure`
        dir: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Measure {
    /// Registry that holds the images, behind a link: LINK=HOST:PORT; loopback has to be there
    #[arg(long = "registry", required = true, value_name = "LINK=HOST:PORT", value_parser = parse_registry)]
    registries: Vec<(Link, String)>,
    /// Empty directory for stores, sockets and logs
    #[arg(long)]
    scratch: PathBuf,
    /// The laz program; without it only the peers are measured
    #[arg(long)]
    laz: Option<PathBuf>,
    /// The lazd program, with laz-mountd beside it; without it its rows are left out
    #[arg(long)]
    lazd: Option<PathBuf>,
    /// Directory with containerd-stargz-grpc and ctr-remote
    #[arg(long)]
    stargz: Option<PathBuf>,
    /// Directory of the newest containerd
    #[arg(long)]
    containerd_new: Option<PathBuf>,
    /// Images to start
    #[arg(long, value_enum, value_delimiter = ',', required = true)]
    images: Vec<Image>,
    /// Links to start them over
    #[arg(long, value_enum, value_delimiter = ',', required = true)]
    links: Vec<Link>,
    /// Systems to start them on [default: all]
    #[arg(long, value_delimiter = ',', value_parser = plan::find)]
    systems: Vec<&'static System>,
    /// The system that ratios are to
    #[arg(long, default_value = "stargz", value_parser = plan::find)]
    reference: &'static System,
    /// Rounds; each starts every image once on every system over every link
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Leave out full pulls and reads inside a container
    #[arg(long)]
    starts_only: bool,
    /// Directory for cold-start.json and cold-start.html
    #[arg(long)]
    out: PathBuf,
}

fn parse_registry(text: &str) -> Result<(Link, String), String> {
    let (link, host) = text.split_once('=').ok_or("expected LINK=HOST:PORT")?;
    Ok((clap::ValueEnum::from_str(link, false)?, host.to_owned()))
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Measure(args) => measure(*args),
        Command::Warm(options) => warm::measure(&options),
        Command::CleanUp { dir } => process::clean_up(&dir),
    }
}

fn measure(args: Measure) -> Result<()> {
    let bench = bench(&args)?;
    let selection = Selection {
        links: args.links,
        images: args.images,
        systems: if args.systems.is_empty() {
            SYSTEMS.iter().collect()
        } else {
            args.systems
        },
        rounds: args.rounds,
    };
    let mut report = Report {
        machine: this_machine(args.rounds),
        reference: args.reference.name,
        ..Report::default()
    };
    starts(&bench, &selection, &mut report);
    let measured = if args.starts_only {
        Ok(())
    } else {
        pulls(&bench, &selection, &mut report)
            .and_then(|()| probes(&bench, &selection, &mut report))
    };
    // What was measured before a failure is not lost.
    write(&report, &args.out)?;
    print!("{}", report::table::text(&report));
    println!(
        "\nsamples: {0}/cold-start.json, charts: {0}/cold-start.html",
        args.out.display()
    );
    measured?;
    if !report.failures.is_empty() {
        bail!("{} starts failed", report.failures.len());
    }
    if report.samples.is_empty() {
        bail!("nothing was measured");
    }
    Ok(())
}

fn bench(args: &Measure) -> Result<Bench> {
    let registry = |wanted: Link| {
        let found = args.registries.iter().find(|(link, _)| *link == wanted);
        found.map(|(_, host)| host.clone())
    };
    let mut proxies = Vec::new();
    for &link in &args.links {
        let upstream = registry(link).with_context(|| format!("no --registry {}=", link.name()))?;
        proxies.push((link, Proxy::start(&upstream, link.one_way())?));
    }
    Ok(Bench {
        abilities: Abilities::of(args.laz.as_deref()),
        programs: Programs {
            laz: args.laz.clone(),
            lazd: args.lazd.clone(),
            stargz: args.stargz.clone(),
            containerd_new: args.containerd_new.clone(),
        },
        registry: registry(Link::Loopback).context("no --registry loopback=")?,
        scratch: args.scratch.clone(),
        proxies,
    })
}

/// Every start; one that fails is in the report, and the others go on.
fn starts(bench: &Bench, selection: &Selection, report: &mut Report) {
    for cell in selection.cells() {
        let (system, image, link) = (cell.system.name, cell.image.name(), cell.link.name());
        match bench.start(&cell) {
            Ok(Outcome::Skipped(reason)) => {
                let line = format!("skipped: {system} on {image}: {reason}");
                let image = cell.image;
                if report.skip(Skip {
                    image,
                    system,
                    reason,
                }) {
                    eprintln!("{line}");
                }
            }
            Ok(Outcome::Measured(start)) => {
                eprintln!(
                    "round {}: {link:<8} {image:<7} {system:<22} {:>6.2} s {:>7.1} MB",
                    cell.round,
                    start.ready_seconds,
                    report::megabytes(start.wire_bytes as f64),
                );
                report.samples.push(Sample {
                    link: cell.link,
                    image: cell.image,
                    system,
                    round: cell.round,
                    start,
                });
            }
            Err(error) => {
                let error = format!("{error:#}");
                eprintln!("FAILED: {system} on {image} over {link}: {error}");
                report.failures.push(Failure {
                    link: cell.link,
                    image: cell.image,
                    system,
                    round: cell.round,
                    error,
                });
            }
        }
    }
}

/// Full pulls of the largest image that was asked for, without a link between.
fn pulls(bench: &Bench, selection: &Selection, report: &mut Report) -> Result<()> {
    let largest = |a: &&Image, b: &&Image| {
        facts::of(**a)
            .gzip_bytes
            .total_cmp(&facts::of(**b).gzip_bytes)
    };
    let Some(&image) = selection.images.iter().max_by(largest) else {
        return Ok(());
    };
    if !selection.links.contains(&Link::Loopback) {
        eprintln!("skipped: full pulls: they are measured over loopback");
        return Ok(());
    }
    for round in 1..=selection.rounds {
        let pulls = pull::measure(bench, round, Link::Loopback, image)?;
        for pull in &pulls {
            eprintln!(
                "round {round}: {} of {}: {:.2} s",
                pull.system,
                image.name(),
                pull.seconds
            );
        }
        report.full_pulls.extend(pulls);
    }
    Ok(())
}

/// Reads inside the python image, without a link between.
fn probes(bench: &Bench, selection: &Selection, report: &mut Report) -> Result<()> {
    let reason = if bench.programs.laz.is_none() {
        "no laz was given"
    } else if !selection.images.contains(&Image::Python) {
        "the image python was not asked for"
    } else if !selection.links.contains(&Link::Loopback) {
        "they are measured over loopback"
    } else {
        report.fan_in = probe::fan_in(bench, Link::Loopback)?;
        report.misses.extend(probe::misses(bench, Link::Loopback)?);
        return Ok(());
    };
    eprintln!("skipped: many readers and single misses: {reason}");
    Ok(())
}

fn write(report: &Report, out: &Path) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("create {}", out.display()))?;
    for (name, text) in [
        ("cold-start.json", report.json()?),
        ("cold-start.html", report::html::page(report)),
    ] {
        let path = out.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// What it runs on, for the reader of a report.
fn this_machine(rounds: u32) -> Vec<String> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = load.split(' ').next().unwrap_or("unknown").to_owned();
    vec![format!(
        "Linux {}, {cores} cores, load {load} before the first start; {rounds} round(s)",
        kernel.trim()
    )]
}
