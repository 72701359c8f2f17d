//! One containerd, its overlayfs snapshotter, and a `lazd` for each backend.
//!
//! Invariant: everything lies below the scratch directory and ends with the [`Bed`]: the mounts,
//! then containerd, then what serves it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::Options;
use super::root::Root;
use crate::plan::Image;
use crate::process::{self, Daemon};

/// The snapshotter that ratios are to.
pub(super) const REFERENCE: &str = "overlayfs";

/// Longest wait for layers to be the kernel's alone.
const KERNEL_WAIT: Duration = Duration::from_secs(20);

/// What runs while images are measured.
pub(super) struct Bed {
    dir: PathBuf,
    registry: String,
    ctr: PathBuf,
    socket: PathBuf,
    writable: bool,
    /// Names of the snapshotters.
    systems: Vec<String>,
    mounted: RefCell<Vec<PathBuf>>,
    // In the order in which they end.
    _containerd: Daemon,
    _lazds: Vec<Daemon>,
}

impl Bed {
    /// Starts the daemons.
    pub(super) fn start(options: &Options) -> Result<Self> {
        let dir = options.scratch.clone();
        let mut systems = vec![REFERENCE.to_owned()];
        let mut lazds = Vec::new();
        for backend in &options.backends {
            let lazd = lazd(options, backend, &dir);
            lazds.push(lazd.with_context(|| format!("lazd with the backend {backend}"))?);
            systems.push(system(backend));
        }
        let (daemon, socket) = containerd(&options.containerd, &options.backends, &dir)?;
        Ok(Self {
            dir,
            registry: options.registry.clone(),
            ctr: options.containerd.join("ctr"),
            socket,
            writable: options.writable,
            systems,
            mounted: RefCell::default(),
            _containerd: daemon,
            _lazds: lazds,
        })
    }

    /// Pulls `image` with every snapshotter and mounts it.
    pub(super) fn roots(&self, image: Image) -> Result<Vec<Root>> {
        let mut roots = Vec::new();
        for system in &self.systems {
            let name = self.reference(image);
            eprintln!("{}: pulling with {system}", image.name());
            let pull = [
                "images",
                "pull",
                "--plain-http",
                "--snapshotter",
                system,
                &name,
            ];
            process::output(self.ctr().args(pull))?;
            let path = self.path(image, system);
            fs::create_dir_all(&path)?;
            self.mount(image, system, &path)?;
            roots.push(Root::at(system.clone(), path, system != REFERENCE)?);
        }
        Ok(roots)
    }

    /// Mounts `image` again at the same places, as a container finds it that begins when
    /// everything is there.
    pub(super) fn mount_again(&self, image: Image) -> Result<()> {
        for system in self.systems.iter().filter(|system| *system != REFERENCE) {
            let layers = self.dir.join(system).join("run/layers");
            let by_kernel = wait_for_kernel(&layers)?;
            let (name, path) = (image.name(), self.path(image, system));
            eprintln!("{name}: {system} shows {by_kernel} layers by the kernel alone");
            for path in [path.join("proc"), path.clone()] {
                process::run(Command::new("umount").arg(&path))?;
                self.mounted.borrow_mut().retain(|other| *other != path);
            }
            let mut remove = self.ctr();
            let remove = remove.args(["snapshots", "--snapshotter", system, "remove"]);
            process::output(remove.arg(&path))?;
            self.mount(image, system, &path)?;
        }
        Ok(())
    }

    fn mount(&self, image: Image, system: &str, path: &Path) -> Result<()> {
        let mut mount = self.ctr();
        mount.args(["images", "mount", "--snapshotter", system]);
        if self.writable {
            mount.arg("--rw");
        }
        process::output(mount.arg(self.reference(image)).arg(path))?;
        self.mounted.borrow_mut().push(path.to_path_buf());
        // Java looks there for itself; who walks the root does not go in.
        let proc = path.join("proc");
        process::run(
            Command::new("mount")
                .args(["-t", "proc", "proc"])
                .arg(&proc),
        )?;
        self.mounted.borrow_mut().push(proc);
        Ok(())
    }

    fn reference(&self, image: Image) -> String {
        format!("{}/{}:gzip", self.registry, image.name())
    }

    fn path(&self, image: Image, system: &str) -> PathBuf {
        let name = format!("{}-{system}", image.name());
        self.dir.join("roots").join(name)
    }

    fn ctr(&self) -> Command {
        let mut ctr = Command::new(&self.ctr);
        ctr.arg("--address").arg(&self.socket);
        ctr
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for path in self.mounted.get_mut().drain(..).rev() {
            if let Err(error) = process::run(Command::new("umount").arg(&path)) {
                eprintln!("{}: {error:#}", path.display());
            }
        }
    }
}

/// Waits until all layers that are mounted in `layers` are the kernel's alone, for a while at
/// most: other builds and backends have none. How many are.
fn wait_for_kernel(layers: &Path) -> Result<usize> {
    let since = Instant::now();
    loop {
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        let counts = erofs(&table, layers);
        let by_kernel = counts.values().filter(|count| **count > 1).count();
        if by_kernel == counts.len() || since.elapsed() > KERNEL_WAIT {
            return Ok(by_kernel);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// How many EROFS lie on each directory in `layers`.
fn erofs(table: &str, layers: &Path) -> BTreeMap<PathBuf, usize> {
    let mut counts = BTreeMap::new();
    for line in table.lines().filter(|line| line.contains(" - erofs ")) {
        let at = line.split(' ').nth(4).map(PathBuf::from);
        if let Some(at) = at.filter(|at| at.starts_with(layers)) {
            *counts.entry(at).or_default() += 1;
        }
    }
    counts
}

/// What a `lazd` with this backend is called.
fn system(backend: &str) -> String {
    format!("laz-{backend}")
}

fn lazd(options: &Options, backend: &str, dir: &Path) -> Result<Daemon> {
    let dir = dir.join(system(backend));
    fs::create_dir_all(&dir)?;
    let config = dir.join("config.toml");
    // With a budget no layer is ever the kernel's alone, however soon it is complete.
    let store = if options.begun {
        "[store]\nbudget = \"1000g\"\n"
    } else {
        ""
    };
    let text = format!("[mounts]\nbackend = \"{backend}\"\n{store}");
    fs::write(&config, text)?;
    let mut command = Command::new(&options.lazd);
    command.arg("--config").arg(&config);
    command.arg("--root").arg(dir.join("root"));
    command.arg("--state").arg(dir.join("run"));
    Daemon::start(&mut command, &dir.join("log"), &socket_of(&dir))
}

/// Where a `lazd` whose directory is `dir` listens.
fn socket_of(dir: &Path) -> PathBuf {
    dir.join("run/snapshotter.sock")
}

fn containerd(programs: &Path, backends: &[String], dir: &Path) -> Result<(Daemon, PathBuf)> {
    let own = dir.join("c");
    fs::create_dir_all(&own)?;
    let (socket, config) = (own.join("containerd.sock"), own.join("config.toml"));
    fs::write(&config, configuration(&own, backends, dir))?;
    let mut command = Command::new(programs.join("containerd"));
    command.arg("--config").arg(&config);
    let daemon = Daemon::start(&mut command, &own.join("log"), &socket)?;
    Ok((daemon, socket))
}

fn configuration(own: &Path, backends: &[String], dir: &Path) -> String {
    let own = own.display();
    let mut out = format!(
        "version = 3\nroot = \"{own}/root\"\nstate = \"{own}/state\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
         [grpc]\naddress = \"{own}/containerd.sock\"\n\
         [ttrpc]\naddress = \"{own}/containerd.sock.ttrpc\"\n"
    );
    let unpack = |out: &mut String, system: &str| {
        let _ = write!(
            out,
            "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n\
             platform = \"linux\"\nsnapshotter = \"{system}\"\n"
        );
    };
    unpack(&mut out, REFERENCE);
    for backend in backends {
        let system = system(backend);
        let socket = socket_of(&dir.join(&system));
        unpack(&mut out, &system);
        let _ = write!(
            out,
            "[proxy_plugins.{system}]\ntype = \"snapshot\"\naddress = \"{}\"\n\
             [proxy_plugins.{system}.exports]\nenable_remote_snapshot_annotations = \"true\"\n",
            socket.display()
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_on_a_layers_place() {
        let table = "1 0 0:5 / /run/layers/0 ro - fuse.lazarette lazarette ro\n\
                     2 1 0:6 / /run/layers/0 ro - erofs none ro\n\
                     3 2 0:7 / /run/layers/0 ro - erofs none ro\n\
                     4 0 0:8 / /run/layers/1 ro - erofs none ro\n\
                     5 0 0:9 / /other/layers/1 ro - erofs none ro\n";
        let counts = erofs(table, Path::new("/run/layers"));
        assert_eq!(counts.into_values().collect::<Vec<_>>(), [2, 1]);
    }

    #[test]
    fn every_backend_is_a_snapshotter_that_pulls_go_to() {
        let backends = ["erofs".to_owned(), "fuse".to_owned()];
        let config = configuration(Path::new("/d/c"), &backends, Path::new("/d"));
        for wanted in [
            "root = \"/d/c/root\"",
            "snapshotter = \"overlayfs\"",
            "snapshotter = \"laz-erofs\"",
            "[proxy_plugins.laz-fuse]\ntype = \"snapshot\"\n\
             address = \"/d/laz-fuse/run/snapshotter.sock\"\n",
        ] {
            assert!(config.contains(wanted), "{wanted}\n{config}");
        }
    }
}
