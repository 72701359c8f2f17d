//! What making a container costs: `launch` of the embedded runtime and of runc, by turns in one
//! run, on a root file system of busybox, until its command runs; and how long removing it takes.
//!
//!     cargo bench --workspace --bench launch --profile dev [-- ROUNDS]
//!
//! Root only. It leaves no container, cgroup or file behind, and asserts no time. Run by
//! `cargo test` it launches once, to see that it works.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lazarette_runtime::executor::{Embedded, Executor, External, LaunchPlan, host};
use lazarette_runtime::spec::{ContainerOptions, HostFacts, ImageConfig, bundle};
use lazarette_runtime::stdio;

/// Launches of each before those that count.
const WARM: usize = 3;

fn main() -> Result<ExitCode> {
    if let Some(code) = host::dispatch() {
        return Ok(code);
    }
    let owner = std::fs::metadata("/proc/self")?.uid();
    if owner != 0 {
        println!("SKIPPED (needs root): launch");
        return Ok(ExitCode::SUCCESS);
    }
    let measures = std::env::args().any(|arg| arg == "--bench");
    let number = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    let rounds: usize = number.unwrap_or(if measures { 50 } else { 1 });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(compare(rounds))?;
    Ok(ExitCode::SUCCESS)
}

async fn compare(rounds: usize) -> Result<()> {
    let stage = Stage::new()?;
    let embedded = Embedded::new();
    let runc = External::new("runc")?;
    let mut samples = [Samples::default(), Samples::default()];
    for round in 0..rounds + WARM {
        let executors: [&dyn Executor; 2] = [&embedded, &runc];
        for (executor, samples) in executors.into_iter().zip(&mut samples) {
            let launch = stage.launch(executor).await?;
            if round >= WARM {
                samples.add(launch);
            }
        }
    }
    let [mut embedded, mut runc] = samples;
    for (what, embedded, runc) in [
        ("created", &mut embedded.created, &mut runc.created),
        ("running", &mut embedded.running, &mut runc.running),
        ("removed", &mut embedded.removed, &mut runc.removed),
    ] {
        let (embedded, runc) = (median(embedded), median(runc));
        let ratio = embedded.as_secs_f64() / runc.as_secs_f64();
        println!(
            "{what}, median of {rounds}: embedded {embedded:.1?}, runc {runc:.1?}, {ratio:.2}x"
        );
    }
    Ok(())
}

/// How long each step of one launch took; the first two from its beginning.
struct Launch {
    created: Duration,
    running: Duration,
    removed: Duration,
}

#[derive(Default)]
struct Samples {
    created: Vec<Duration>,
    running: Vec<Duration>,
    removed: Vec<Duration>,
}

impl Samples {
    fn add(&mut self, launch: Launch) {
        self.created.push(launch.created);
        self.running.push(launch.running);
        self.removed.push(launch.removed);
    }
}

fn median(took: &mut [Duration]) -> Duration {
    took.sort_unstable();
    took.get(took.len() / 2).copied().unwrap_or_default()
}

/// A directory with a root file system, and what a document needs to know of the host.
struct Stage {
    dir: tempfile::TempDir,
    facts: HostFacts,
}

impl Stage {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let root = dir.path().join("rootfs");
        for name in ["bin", "etc", "proc", "sys", "dev"] {
            std::fs::create_dir_all(root.join(name))?;
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new);
        let busybox = busybox.into_iter().find(|path| path.exists());
        let busybox = busybox.context("this needs busybox: apt-get install busybox-static")?;
        // A program that anybody has open to be written cannot be run: another process copies it.
        let mut install = Command::new("install");
        let install = install.arg(busybox).arg(root.join("bin/true"));
        ensure!(install.status()?.success(), "cannot install busybox");
        let facts = HostFacts::probe()?;
        Ok(Self { dir, facts })
    }

    async fn launch(&self, executor: &dyn Executor) -> Result<Launch> {
        let options = ContainerOptions {
            id: format!("launch-bench-{}", std::process::id()),
            args: vec!["/bin/true".to_owned()],
            rootfs: self.dir.path().join("rootfs"),
            ..ContainerOptions::default()
        };
        let path: PathBuf = self.dir.path().join("bundle");
        let written = bundle::write(&path, &options, &ImageConfig::default(), &self.facts, None)?;
        let (io, _streams) = stdio::pipes(true)?;
        // As `laz run` does while it waits for the image.
        executor.warm_up();
        executor.expect_launch();
        tokio::time::sleep(Duration::from_millis(15)).await;
        let plan = LaunchPlan {
            id: options.id,
            uid: written.uid(),
            bundle: path.clone(),
            state_root: self.dir.path().join("state"),
            io,
        };
        let began = Instant::now();
        let launched = executor.launch(plan).await?;
        let times = launched.task.times();
        let status = launched.task.wait().await?;
        ensure!(status.code == 0, "the command ended with {}", status.code);
        let ended = Instant::now();
        launched.task.delete().await?;
        let removed = ended.elapsed();
        std::fs::remove_dir_all(&path)?;
        Ok(Launch {
            created: times.created - began,
            running: times.started - began,
            removed,
        })
    }
}
