//! What the conformance tests need: a busybox root file system, containers on it, and a
//! look at everything a container could leave behind.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up must fail")]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lazarette_runtime::executor::{
    ContainerIo, Embedded, Error, Executor, External, LaunchPlan, Size, Task, Times,
};
use lazarette_runtime::spec::bundle::{self, Bundle};
use lazarette_runtime::spec::{ContainerOptions, HostFacts, ImageConfig};
use lazarette_runtime::stdio::{Attach, Pty, Streams, User, attach, pipes};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;

/// The slowest step here takes well under a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether root-only tests can run; says so loudly when not.
pub(crate) fn is_root(test: &str) -> bool {
    let root = std::fs::metadata("/proc/self")
        .is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0);
    if !root {
        eprintln!("SKIPPED (needs root): {test}");
    }
    root
}

pub(crate) fn embedded() -> Embedded {
    Embedded::with_host(env!("CARGO_BIN_EXE_laz"))
}

/// Both executors. A machine without runc fails the test: it would prove half of it.
pub(crate) fn executors() -> Vec<(&'static str, Box<dyn Executor>)> {
    let host = env!("CARGO_BIN_EXE_laz");
    let runc = External::new("runc").expect("these tests need runc: apt-get install runc");
    vec![
        ("embedded", Box::new(embedded()) as Box<dyn Executor>),
        ("runc", Box::new(runc.with_host(host))),
    ]
}

/// A container that runs `script`.
pub(crate) fn sh(script: &str) -> ContainerOptions {
    let args = ["sh", "-c", script].map(str::to_owned).into();
    ContainerOptions {
        args,
        ..ContainerOptions::default()
    }
}

pub(crate) async fn bounded<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("took longer than a minute")
}

/// Polls until `holds`, for a minute at most.
pub(crate) async fn wait_gone(holds: impl Fn() -> bool) {
    bounded(async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

pub(crate) fn alive(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    !status.is_empty() && !status.contains("State:\tZ")
}

pub(crate) fn parent_of(pid: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = status
        .lines()
        .find_map(|line| line.strip_prefix("PPid:"))
        .unwrap();
    parent.trim().parse().unwrap()
}

/// SIGKILL to one process, by id.
pub(crate) fn kill(pid: u32) {
    signal("-KILL", pid);
}

/// SIGSTOP to one process, by id.
pub(crate) fn stop(pid: u32) {
    signal("-STOP", pid);
}

fn signal(name: &str, pid: u32) {
    let status = std::process::Command::new("kill")
        .args([name, &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// How a container ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: u8,
    pub(crate) out: String,
    pub(crate) err: String,
    pub(crate) times: Times,
    pub(crate) seen: Attach,
}

/// A directory with a root file system and the state of the containers on it.
pub(crate) struct Bench {
    dir: PathBuf,
    _owned: Option<tempfile::TempDir>,
    tag: String,
    next: AtomicU32,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let owned = tempfile::tempdir().unwrap();
        let bench = Self::at(owned.path().canonicalize().unwrap());
        bench.make_rootfs();
        Self {
            _owned: Some(owned),
            ..bench
        }
    }

    /// On a directory that another process made.
    pub(crate) fn at(dir: PathBuf) -> Self {
        let tag = dir
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .trim_start_matches('.')
            .to_owned();
        Self {
            dir,
            _owned: None,
            tag,
            next: AtomicU32::new(0),
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn next_id(&self) -> String {
        format!("{}-{}", self.tag, self.next.fetch_add(1, Ordering::SeqCst))
    }

    fn make_rootfs(&self) {
        let root = self.path("rootfs");
        for dir in ["bin", "etc", "tmp", "root", "srv", "proc", "sys", "dev"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|p| Path::new(p).exists());
        let busybox = busybox.expect("these tests need busybox: apt-get install busybox-static");
        install(Path::new(busybox), &root.join("bin/busybox"));
        let list = std::process::Command::new(busybox)
            .arg("--list")
            .output()
            .unwrap();
        for applet in String::from_utf8(list.stdout).unwrap().lines() {
            if applet != "busybox" {
                symlink("/bin/busybox", root.join("bin").join(applet)).unwrap();
            }
        }
        let passwd = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/srv:/bin/sh\n";
        std::fs::write(root.join("etc/passwd"), passwd).unwrap();
        std::fs::write(
            root.join("etc/group"),
            "root:x:0:\nwww:x:33:\nvideo:x:44:www\n",
        )
        .unwrap();
    }

    /// Adds an executable file to the root file system's `/bin`.
    pub(crate) fn program(&self, name: &str, text: &str) {
        let draft = self.path("draft");
        std::fs::write(&draft, text).unwrap();
        install(&draft, &self.path("rootfs/bin").join(name));
        std::fs::remove_file(draft).unwrap();
    }

    fn bundle(&self, options: &mut ContainerOptions) -> Bundle {
        if options.id.is_empty() {
            options.id = self.next_id();
        }
        options.rootfs = self.path("rootfs");
        let path = self.path("bundles").join(&options.id);
        let facts = HostFacts::probe().unwrap();
        bundle::write(&path, options, &ImageConfig::default(), &facts, None).unwrap()
    }

    async fn launch(
        &self,
        executor: &dyn Executor,
        mut options: ContainerOptions,
        io: ContainerIo,
    ) -> Result<lazarette_runtime::executor::Launched, Error> {
        let bundle = self.bundle(&mut options);
        let plan = LaunchPlan {
            id: options.id,
            uid: bundle.uid(),
            bundle: bundle.path,
            state_root: self.path("state"),
            io,
        };
        bounded(executor.launch(plan)).await
    }

    /// Starts a container with pipes.
    pub(crate) async fn start(
        &self,
        executor: &dyn Executor,
        options: ContainerOptions,
    ) -> Result<Running, Error> {
        let (io, streams) = pipes(true).unwrap();
        let launched = self.launch(executor, options, io).await?;
        Ok(Running::new(launched.task, streams, None))
    }

    /// Starts a container with a terminal.
    pub(crate) async fn start_terminal(
        &self,
        executor: &dyn Executor,
        mut options: ContainerOptions,
        size: Size,
    ) -> Result<Running, Error> {
        options.terminal = true;
        let io = ContainerIo::Terminal { size: Some(size) };
        let launched = self.launch(executor, options, io).await?;
        let pty = Pty::new(launched.console.unwrap()).unwrap();
        Ok(Running::new(
            launched.task,
            Streams::Terminal(pty.clone()),
            Some(pty),
        ))
    }

    /// Runs a container without input to its end.
    pub(crate) async fn run(
        &self,
        executor: &dyn Executor,
        options: ContainerOptions,
    ) -> Result<Ended, Error> {
        let mut running = self.start(executor, options).await?;
        running.close_input();
        Ok(running.finish().await)
    }

    /// Everything of this bench's containers that still exists outside its directory, and
    /// state inside it.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut found: Vec<String> = entries(&self.path("state"));
        for hierarchy in entries(Path::new("/sys/fs/cgroup")) {
            let dirs = entries(Path::new(&hierarchy));
            found.extend(dirs.into_iter().filter(|dir| dir.contains(&self.tag)));
        }
        found.extend(
            entries(Path::new("/sys/fs/cgroup"))
                .into_iter()
                .filter(|dir| dir.contains(&self.tag)),
        );
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = mounts
            .lines()
            .filter(|line| line.contains(self.dir.to_str().unwrap()));
        found.extend(ours.map(str::to_owned));
        found
    }

    pub(crate) fn assert_clean(&self, kind: &str) {
        assert_eq!(
            self.leftovers(),
            Vec::<String>::new(),
            "{kind} left something behind"
        );
    }
}

/// Copies a program to where it is run. By a process of its own: a program that anybody has open to
/// write cannot be run, and a process that another test is starting has what we have open, too.
fn install(program: &Path, to: &Path) {
    let mut install = std::process::Command::new("install");
    let install = install.args(["-m", "755"]).args([program, to]);
    assert!(install.status().unwrap().success());
}

fn entries(dir: &Path) -> Vec<String> {
    let Ok(list) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    list.map(|entry| entry.unwrap().path().display().to_string())
        .collect()
}

/// A started container with its pumps.
pub(crate) struct Running {
    task: Option<Box<dyn Task>>,
    keys: Option<DuplexStream>,
    out: DuplexStream,
    seen: String,
    err: JoinHandle<String>,
    pump: JoinHandle<std::io::Result<Attach>>,
    pty: Option<Pty>,
}

impl Running {
    fn new(task: Box<dyn Task>, streams: Streams, pty: Option<Pty>) -> Self {
        let (keys, stdin) = tokio::io::duplex(4096);
        let (out, stdout) = tokio::io::duplex(4096);
        let (mut errors, stderr) = tokio::io::duplex(4096);
        let err = tokio::spawn(async move {
            let mut text = String::new();
            errors.read_to_string(&mut text).await.unwrap();
            text
        });
        let pump = tokio::spawn(attach(
            streams,
            User {
                stdin,
                stdout,
                stderr,
            },
        ));
        let (task, keys) = (Some(task), Some(keys));
        Self {
            task,
            keys,
            out,
            seen: String::new(),
            err,
            pump,
            pty,
        }
    }

    pub(crate) fn task(&self) -> &dyn Task {
        self.task.as_deref().unwrap()
    }

    pub(crate) fn resize(&self, size: Size) {
        self.pty.as_ref().unwrap().resize(size).unwrap();
    }

    pub(crate) async fn type_keys(&mut self, keys: &[u8]) {
        self.keys.as_mut().unwrap().write_all(keys).await.unwrap();
    }

    pub(crate) fn close_input(&mut self) {
        self.keys = None;
    }

    pub(crate) async fn wait_for_output(&mut self, text: &str) {
        let mut block = [0; 4096];
        while !self.seen.contains(text) {
            let read = bounded(self.out.read(&mut block)).await.unwrap();
            assert_ne!(read, 0, "output ended without {text:?}: {:?}", self.seen);
            self.seen
                .push_str(std::str::from_utf8(&block[..read]).unwrap());
        }
    }

    /// Waits for the end, then deletes.
    pub(crate) async fn finish(mut self) -> Ended {
        bounded(self.out.read_to_string(&mut self.seen))
            .await
            .unwrap();
        let seen = bounded(&mut self.pump).await.unwrap().unwrap();
        let task = self.task.take().unwrap();
        let (code, times) = (bounded(task.wait()).await.unwrap().code, task.times());
        bounded(task.delete()).await.unwrap();
        let err = bounded(&mut self.err).await.unwrap();
        Ended {
            code,
            out: std::mem::take(&mut self.seen),
            err,
            times,
            seen,
        }
    }

    /// Deletes without waiting for the end.
    pub(crate) async fn delete(mut self) {
        bounded(self.task.take().unwrap().delete()).await.unwrap();
        self.pump.abort();
        self.err.abort();
    }
}
