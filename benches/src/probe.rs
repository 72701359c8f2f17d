//! Reads inside a container: many readers of one cold file, and single misses.
//!
//! Invariant: python in the container takes the times (`probe/*.py`) and writes them into a
//! directory of ours; what was asked of the registry is seen by the proxy, not told by anyone.
//! Both begin when the program has started and been quiet for half a second.

use std::fs;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::http::Connection;
use crate::machine;
use crate::plan::{Cell, Image, Link, Ready, find};
use crate::process;
use crate::proxy::{Meter, Request, asked_twice};
use crate::report::{FanIn, Misses, percentile};
use crate::system::{Bench, Job};

/// Reads one file with as many processes as its argument says.
const READERS: &str = include_str!("probe/readers.py");
/// Reads 4 KiB of each of as many files.
const MISSES: &str = include_str!("probe/misses.py");
/// Readers of the same file at once.
const READERS_MANY: u32 = 50;
/// Files read from.
const MISS_READS: u32 = 300;

#[derive(Debug, Deserialize)]
struct ReadersResult {
    file_bytes: u64,
    seconds: f64,
}

#[derive(Debug, Deserialize)]
struct MissesResult {
    milliseconds: Vec<f64>,
}

/// What was read, and what it asked of the registry.
struct Probed<T> {
    result: T,
    requests: Vec<Request>,
    wire_bytes: u64,
}

/// One reader and fifty, each on a store that knows nothing.
pub(crate) fn fan_in(bench: &Bench, link: Link) -> Result<Vec<FanIn>> {
    let mut found = Vec::new();
    for readers in [1, READERS_MANY] {
        let probe: Option<(Probed<ReadersResult>, _)> = run(bench, link, READERS, readers)?;
        if let Some((probed, _)) = probe {
            found.push(FanIn {
                link,
                readers,
                file_bytes: probed.result.file_bytes,
                seconds: probed.result.seconds,
                requests: probed.requests.len(),
                wire_bytes: probed.wire_bytes,
                asked_twice_bytes: asked_twice(&probed.requests),
            });
        }
    }
    Ok(found)
}

/// Misses of 4 KiB, and the registry's own time for the same ranges over the same proxy.
pub(crate) fn misses(bench: &Bench, link: Link) -> Result<Option<Misses>> {
    let probe: Option<(Probed<MissesResult>, String)> = run(bench, link, MISSES, MISS_READS)?;
    let Some((probed, host)) = probe else {
        return Ok(None);
    };
    let registry = replay(&host, &probed.requests)?;
    let reads = probed.result.milliseconds;
    Ok(Some(Misses {
        link,
        reads: reads.len(),
        requests: probed.requests.len(),
        miss_p50_ms: percentile(&reads, 50.0),
        miss_p99_ms: percentile(&reads, 99.0),
        registry_p50_ms: percentile(&registry, 50.0),
        registry_p99_ms: percentile(&registry, 99.0),
    }))
}

/// Milliseconds that each of the same requests takes by plain HTTP, one after another.
fn replay(host: &str, requests: &[Request]) -> Result<Vec<f64>> {
    let mut connection = Connection::open(host)?;
    let mut times = Vec::new();
    for request in requests.iter().filter(|r| r.range.is_some()) {
        let began = Instant::now();
        let status = connection.get(&request.path, request.range, &mut std::io::sink())?;
        anyhow::ensure!(status == 206, "{}: {status}", request.path);
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(times)
}

/// Runs a script in the python image as `laz` converts it; none where that image is not.
fn run<T: DeserializeOwned>(
    bench: &Bench,
    link: Link,
    script: &str,
    argument: u32,
) -> Result<Option<(Probed<T>, String)>> {
    let system = find("laz").map_err(anyhow::Error::msg)?;
    let image = Image::Python;
    let Some(blobs) = machine::blobs(&bench.registry, image.name(), system.tag)? else {
        return Ok(None);
    };
    let cell = Cell {
        round: 1,
        link,
        image,
        system,
    };
    let job = bench.job(&cell, blobs)?;
    let probed = probe(&job, script, argument);
    let cleaned = process::clean_up(&job.dir);
    let probed = probed?;
    cleaned?;
    Ok(Some((probed, job.proxy.address())))
}

fn probe<T: DeserializeOwned>(job: &Job<'_>, script: &str, argument: u32) -> Result<Probed<T>> {
    let out = job.dir.join("out");
    fs::create_dir(&out)?;
    let mut run = job.laz_program()?;
    run.args([
        "run",
        "--rm",
        "--volume",
        &format!("{}:/out", out.display()),
    ]);
    run.args([&job.reference, "python3", "-c", script]);
    run.arg(argument.to_string());
    let meter: Arc<Meter> = job.go_cold()?;
    let before = process::run_until_ready(&mut run, Ready::Line("BEGIN"), || {
        (meter.requests().len(), meter.received())
    })?;
    let text = fs::read(out.join("result.json")).context("what the probe wrote")?;
    let requests = meter.requests();
    Ok(Probed {
        result: serde_json::from_slice(&text)?,
        requests: requests.get(before.0..).unwrap_or(&[]).to_vec(),
        wire_bytes: meter.received() - before.1,
    })
}
