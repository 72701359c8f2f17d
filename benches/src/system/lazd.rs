//! `lazd` as a snapshotter of unmodified containerd, by the part of its config that users get.
//!
//! Invariant: `lazd`, its mount server and containerd are new for every start; what is timed are the
//! commands of containerd's own `ctr`. The store is as `laz` would have it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::Job;
use super::containerd::Plugin;
use super::laz::ensure_cold;
use crate::plan::{Release, Store};
use crate::process::Daemon;
use crate::report::Start;

/// What users add to containerd's config.
const PART: &str = include_str!("../../../deploy/containerd-v3.toml");
/// Where it expects `lazd`, and the store.
const SOCKET: &str = "/run/lazarette/snapshotter.sock";
const ROOT: &str = "/var/lib/lazarette";

impl Job<'_> {
    pub(super) fn lazd(&self, store: Store) -> Result<Start> {
        self.prepare_store(store)?;
        let program = self.bench.programs.lazd.as_ref();
        let program = program.context("no lazd was given")?;
        let (root, state) = (self.dir.join("root"), self.dir.join("state"));
        let socket = state.join("snapshotter.sock");
        fs::create_dir_all(&state)?;
        let mut daemon = Command::new(program);
        daemon.arg("--root").arg(&root).arg("--state").arg(&state);
        let _lazd = Daemon::start(&mut daemon, &self.dir.join("lazd.log"), &socket)?;
        let part = part(&socket, &root);
        let release = Release::Newest;
        let (_daemon, containerd) = self.start_containerd(release, &Plugin::Lazd(&part))?;
        let snapshotter = "--snapshotter=lazarette";
        let pull = self.pull(release, &containerd, &[snapshotter]);
        let mut run = Command::new(self.ctr(release));
        run.arg("--address").arg(&containerd);
        run.args(["run", "--rm", snapshotter]);
        self.host_network(&mut run);
        run.args([&self.reference, "bench"]).args(self.command());
        let start = self.time_both(Some(pull), &mut run)?;
        ensure_cold(&start)?;
        Ok(start)
    }
}

/// The part of the config, for a `lazd` at this place.
fn part(socket: &Path, root: &Path) -> String {
    let quoted = |path: &str| format!("\"{path}\"");
    PART.replace(&quoted(SOCKET), &quoted(&socket.to_string_lossy()))
        .replace(&quoted(ROOT), &quoted(&root.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_of_users_leads_to_this_lazd() {
        let part = part(Path::new("/d/sock"), Path::new("/d/root"));
        assert!(part.contains("address = \"/d/sock\"\n"));
        assert!(part.contains("root = \"/d/root\"\n"));
        assert!(!part.contains(SOCKET) && !part.contains(ROOT));
        assert!(part.contains("enable_remote_snapshot_annotations = \"true\""));
    }
}
