//! containerd: with overlayfs, with stargz-snapshotter beside it, and as a daemon for `lazd`.
//!
//! Invariant: daemons are new for every start, keep everything below its directory, and end
//! with it. Kubernetes' plugin and metrics are off; everything else is as it comes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::Job;
use crate::plan::{Ready, Release};
use crate::process::Daemon;
use crate::report::Start;

impl Job<'_> {
    pub(super) fn containerd(&self, release: Release) -> Result<Start> {
        let (_daemon, socket) = self.start_containerd(release, &Plugin::None)?;
        let pull = self.pull(release, &socket, &[]);
        let mut run = Command::new(self.ctr(release));
        run.arg("--address").arg(&socket).args(["run", "--rm"]);
        self.host_network(&mut run);
        run.args([&self.reference, "bench"]).args(self.command());
        self.time_both(Some(pull), &mut run)
    }

    /// The command that pulls and unpacks the image; `options` are more of its options.
    pub(crate) fn pull(&self, release: Release, socket: &Path, options: &[&str]) -> Command {
        let mut pull = Command::new(self.ctr(release));
        pull.arg("--address").arg(socket);
        pull.args(["images", "pull", "--plain-http"]);
        pull.args(options).arg(&self.reference);
        pull
    }

    pub(super) fn stargz(&self) -> Result<Start> {
        let bin = self.bench.programs.stargz.as_ref();
        let bin = bin.context("no stargz-snapshotter was given")?;
        let (socket, root) = (self.dir.join("stargz.sock"), self.dir.join("stargz"));
        fs::create_dir_all(&root)?;
        let mut daemon = Command::new(bin.join("containerd-stargz-grpc"));
        daemon.arg(&socket).arg(&root);
        let _snapshotter = Daemon::start(&mut daemon, &self.dir.join("stargz.log"), &socket)?;
        let (_daemon, containerd) =
            self.start_containerd(Release::System, &Plugin::Stargz(&socket))?;
        let ctr = bin.join("ctr-remote");
        let mut pull = Command::new(&ctr);
        pull.arg("--address").arg(&containerd);
        pull.args(["images", "rpull", "--plain-http", &self.reference]);
        let mut run = Command::new(&ctr);
        run.arg("--address")
            .arg(&containerd)
            .args(["run", "--rm", "--snapshotter=stargz"]);
        self.host_network(&mut run);
        run.args([&self.reference, "bench"]).args(self.command());
        self.time_both(Some(pull), &mut run)
    }

    /// What is reached by its port is run in the host's network, as `laz run` does by itself.
    pub(super) fn host_network(&self, run: &mut Command) {
        let (_, ready) = self.image().workload(self.cell.system.workload);
        if let Ready::Port(_) = ready {
            run.arg("--net-host");
        }
    }

    pub(super) fn ctr(&self, release: Release) -> PathBuf {
        self.bin(release)
            .map_or_else(|| PathBuf::from("ctr"), |bin| bin.join("ctr"))
    }

    fn bin(&self, release: Release) -> Option<&Path> {
        match release {
            Release::Newest => self.bench.programs.containerd_new.as_deref(),
            Release::System => None,
        }
    }

    /// A daemon and its socket.
    pub(crate) fn start_containerd(
        &self,
        release: Release,
        plugin: &Plugin<'_>,
    ) -> Result<(Daemon, PathBuf)> {
        let bin = self.bin(release);
        let socket = self.dir.join("containerd.sock");
        let config = self.dir.join("containerd.toml");
        fs::write(&config, configuration(&self.dir, &socket, plugin))?;
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
}

/// A snapshotter beside containerd.
pub(crate) enum Plugin<'a> {
    /// None: it has its own.
    None,
    /// stargz-snapshotter, at this socket.
    Stargz(&'a Path),
    /// `lazd`, whose part of the config this is.
    Lazd(&'a str),
}

fn configuration(dir: &Path, socket: &Path, plugin: &Plugin<'_>) -> String {
    let version = match plugin {
        Plugin::None | Plugin::Stargz(_) => 2,
        Plugin::Lazd(_) => 3,
    };
    let (dir, socket) = (dir.display(), socket.display());
    let config = format!(
        "version = {version}\nroot = \"{dir}/containerd\"\nstate = \"{dir}/containerd-state\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
         [grpc]\naddress = \"{socket}\"\n"
    );
    config
        + &match plugin {
            Plugin::None => String::new(),
            Plugin::Stargz(at) => {
                let at = at.display();
                format!("[proxy_plugins.stargz]\ntype = \"snapshot\"\naddress = \"{at}\"\n")
            }
            Plugin::Lazd(part) => (*part).to_owned(),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_snapshotter_is_plugged_in_only_where_it_is_measured() {
        let (dir, socket) = (Path::new("/d"), Path::new("/d/s"));
        let plain = configuration(dir, socket, &Plugin::None);
        assert!(plain.contains("root = \"/d/containerd\"") && !plain.contains("proxy_plugins"));
        let lazy = configuration(dir, socket, &Plugin::Stargz(Path::new("/d/z")));
        assert!(lazy.ends_with("type = \"snapshot\"\naddress = \"/d/z\"\n"));
        let ours = configuration(dir, socket, &Plugin::Lazd("[part]\n"));
        assert!(ours.starts_with("version = 3\n") && ours.ends_with("[part]\n"));
    }
}
