//! The systems that are measured, and how each starts a container from nothing.
//!
//! Invariant: what is timed is what a user waits for: from the first command to ready. Starting
//! the daemon and cleaning up after it is not. A start shares nothing with the one before.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::process::{self, Daemon};
use crate::proxy::Proxy;

/// An image of `tests/images`, with what "ready" means for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Image {
    /// One layer; ready when `/bin/true` exits.
    Debian,
    /// Three layers; ready when its program prints READY after its imports.
    Python,
}

impl Image {
    /// All of them, in the order of a round.
    pub(crate) const ALL: [Self; 2] = [Self::Debian, Self::Python];

    /// Repository in the registry.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Python => "python",
        }
    }

    fn command(self) -> &'static [&'static str] {
        match self {
            Self::Debian => &["/bin/true"],
            Self::Python => &["python3", "/app/app.py"],
        }
    }

    fn mark(self) -> Option<&'static str> {
        match self {
            Self::Debian => None,
            Self::Python => Some("READY"),
        }
    }
}

/// A container system under test.
#[derive(Debug)]
pub(crate) enum System {
    /// This project.
    Laz {
        /// The `laz` program.
        program: PathBuf,
        /// On the image optimised for stargz instead of its own conversion.
        optimized: bool,
    },
    /// containerd with overlayfs, pulling in full.
    Containerd {
        /// Where containerd, ctr and the shim are; the system's when absent.
        bin: Option<PathBuf>,
    },
    /// containerd with stargz-snapshotter, on images optimised for exactly this workload.
    Stargz {
        /// Where containerd-stargz-grpc and ctr-remote are.
        bin: PathBuf,
    },
}

impl System {
    /// Name in the report.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Laz {
                optimized: false, ..
            } => "laz",
            Self::Laz {
                optimized: true, ..
            } => "laz (optimised image)",
            Self::Containerd { bin: None } => "containerd",
            Self::Containerd { bin: Some(_) } => "containerd (newest)",
            Self::Stargz { .. } => "stargz",
        }
    }

    /// The tag it does best with.
    fn tag(&self) -> &'static str {
        match self {
            Self::Laz {
                optimized: false, ..
            } => "esgz",
            Self::Containerd { .. } => "gzip",
            Self::Laz {
                optimized: true, ..
            }
            | Self::Stargz { .. } => "optimized",
        }
    }
}

/// What one cold start took.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Start {
    /// From the first command to ready, seconds.
    pub(crate) ready_seconds: f64,
    /// Received from the registry until ready, bytes on the wire.
    pub(crate) wire_bytes: u64,
}

/// Where starts happen.
#[derive(Debug)]
pub(crate) struct Bench {
    /// The registry behind the proxy, `host:port`.
    pub(crate) registry: String,
    /// Every start gets a directory below, and leaves none.
    pub(crate) scratch: PathBuf,
}

impl Bench {
    /// Starts `image` on `system` with nothing of it on this machine.
    pub(crate) fn cold_start(&self, system: &System, image: Image) -> Result<Start> {
        let dir = self.scratch.join("start");
        process::clean_up(&dir)?;
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let proxy = Proxy::start(&self.registry)?;
        let job = Job {
            reference: format!("{}/{}:{}", proxy.address(), image.name(), system.tag()),
            dir: &dir,
            image,
            proxy: &proxy,
        };
        let start = match system {
            System::Laz { program, .. } => job.laz(program),
            System::Containerd { bin } => job.containerd(bin.as_deref()),
            System::Stargz { bin } => job.stargz(bin),
        };
        let cleaned = process::clean_up(&dir);
        let start = start?;
        cleaned?;
        Ok(start)
    }
}

/// One start: everything it needs to run on any system.
struct Job<'a> {
    reference: String,
    dir: &'a Path,
    image: Image,
    proxy: &'a Proxy,
}

impl Job<'_> {
    fn laz(&self, program: &Path) -> Result<Start> {
        let mut run = Command::new(program);
        run.arg("--root")
            .arg(self.dir.join("root"))
            .arg("--state")
            .arg(self.dir.join("state"));
        run.args(["run", "--rm", &self.reference])
            .args(self.image.command());
        self.time(&mut [], &mut run)
    }

    fn containerd(&self, bin: Option<&Path>) -> Result<Start> {
        let (_daemon, socket) = self.start_containerd(bin, None)?;
        let ctr = bin.map_or_else(|| PathBuf::from("ctr"), |bin| bin.join("ctr"));
        let mut pull = Command::new(&ctr);
        pull.arg("--address").arg(&socket).args([
            "images",
            "pull",
            "--plain-http",
            &self.reference,
        ]);
        let mut run = Command::new(&ctr);
        run.arg("--address")
            .arg(&socket)
            .args(["run", "--rm", &self.reference, "bench"]);
        run.args(self.image.command());
        self.time(&mut [pull], &mut run)
    }

    fn stargz(&self, bin: &Path) -> Result<Start> {
        let (socket, root) = (self.dir.join("stargz.sock"), self.dir.join("stargz"));
        fs::create_dir_all(&root)?;
        let mut daemon = Command::new(bin.join("containerd-stargz-grpc"));
        daemon.arg(&socket).arg(&root);
        let _snapshotter = Daemon::start(&mut daemon, &self.dir.join("stargz.log"), &socket)?;
        let (_daemon, containerd) = self.start_containerd(None, Some(&socket))?;
        let ctr = bin.join("ctr-remote");
        let mut pull = Command::new(&ctr);
        pull.arg("--address").arg(&containerd).args([
            "images",
            "rpull",
            "--plain-http",
            &self.reference,
        ]);
        let mut run = Command::new(&ctr);
        run.arg("--address")
            .arg(&containerd)
            .args(["run", "--rm", "--snapshotter=stargz"]);
        run.args([&self.reference, "bench"])
            .args(self.image.command());
        self.time(&mut [pull], &mut run)
    }

    fn start_containerd(
        &self,
        bin: Option<&Path>,
        stargz: Option<&Path>,
    ) -> Result<(Daemon, PathBuf)> {
        let socket = self.dir.join("containerd.sock");
        let config = self.dir.join("containerd.toml");
        fs::write(&config, containerd_config(self.dir, &socket, stargz))?;
        let mut daemon =
            Command::new(bin.map_or_else(|| "containerd".into(), |b| b.join("containerd")));
        if let Some(bin) = bin {
            // It looks for its shim on the PATH.
            let path = std::env::var("PATH").unwrap_or_default();
            daemon.env("PATH", format!("{}:{path}", bin.display()));
        }
        daemon.arg("--config").arg(&config);
        let daemon = Daemon::start(&mut daemon, &self.dir.join("containerd.log"), &socket)?;
        Ok((daemon, socket))
    }

    /// The clock: drops the page cache, runs the commands, stops at ready.
    fn time(&self, before: &mut [Command], run: &mut Command) -> Result<Start> {
        drop_page_cache()?;
        let bytes_before = self.proxy.received();
        let began = Instant::now();
        for command in before {
            process::run(command)?;
        }
        process::run_until_ready(run, self.image.mark(), || Start {
            ready_seconds: began.elapsed().as_secs_f64(),
            wire_bytes: self.proxy.received() - bytes_before,
        })
    }
}

/// Kubernetes' plugin and metrics off; everything else as it comes.
fn containerd_config(dir: &Path, socket: &Path, stargz: Option<&Path>) -> String {
    let (dir, socket) = (dir.display(), socket.display());
    let mut config = format!(
        "version = 2\nroot = \"{dir}/containerd\"\nstate = \"{dir}/containerd-state\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
         [grpc]\naddress = \"{socket}\"\n"
    );
    if let Some(stargz) = stargz {
        let stargz = stargz.display();
        config += &format!("[proxy_plugins.stargz]\ntype = \"snapshot\"\naddress = \"{stargz}\"\n");
    }
    config
}

fn drop_page_cache() -> Result<()> {
    process::run(&mut Command::new("sync"))?;
    fs::write("/proc/sys/vm/drop_caches", "3")
        .context("drop the page cache (cold starts need root and a writable /proc/sys)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_snapshotter_is_plugged_in_only_where_it_is_measured() {
        let (dir, socket) = (Path::new("/d"), Path::new("/d/s"));
        let plain = containerd_config(dir, socket, None);
        assert!(plain.contains("root = \"/d/containerd\"") && !plain.contains("proxy_plugins"));
        let lazy = containerd_config(dir, socket, Some(Path::new("/d/z")));
        assert!(lazy.ends_with("type = \"snapshot\"\naddress = \"/d/z\"\n"));
    }
}
