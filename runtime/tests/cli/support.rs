//! A scratch root for `laz`, and small images made on the spot.

use std::io::{Cursor, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lazarette_fetcher::index::write::{Options, write_layer};
use lazarette_fetcher::test_util::{FakeRegistry, content};
use lazarette_fetcher::types::{Digest, MediaType};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::sys;

/// A deadline of registries that is longer than anything here takes: what fails by it is a failure.
pub(crate) const PATIENT: &str = "2m";
/// One for registries that are away: what they should have answered fails by it. Never for those
/// that answer, as on a machine that does much else that takes longer at times.
pub(crate) const IMPATIENT: &str = "900ms";

/// Lines of config by which registries have so much time.
pub(crate) fn source(deadline: &str) -> String {
    let stall = match deadline {
        IMPATIENT => "300ms",
        _ => "1m",
    };
    format!("[source]\ndeadline = {deadline:?}\nstall_timeout = {stall:?}\n")
}

/// One `laz` installation of its own.
pub(crate) struct Laz {
    dir: TempDir,
    pub(crate) binary: PathBuf,
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Laz {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.toml"), source(PATIENT)).unwrap();
        Self {
            dir,
            binary: PathBuf::from(env!("CARGO_BIN_EXE_laz")),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// From now on its registries have `deadline`.
    pub(crate) fn give(&self, deadline: &str) {
        let config = std::fs::read_to_string(self.path("config.toml")).unwrap();
        let before = [PATIENT, IMPATIENT].map(source);
        let mut rest = before
            .iter()
            .filter_map(|before| config.strip_prefix(before));
        let config = source(deadline) + rest.next().expect("it was made by `new`");
        std::fs::write(self.path("config.toml"), config).unwrap();
    }

    /// From now on it asks `mirror` first for what `registry` has.
    pub(crate) fn set_mirror(&self, registry: &FakeRegistry, mirror: &FakeRegistry) {
        let hosts = self.path("certs.d").join(registry.url_host());
        std::fs::create_dir_all(&hosts).unwrap();
        let mirrored = format!("[host.\"http://{}\"]\n", mirror.url_host());
        std::fs::write(hosts.join("hosts.toml"), mirrored).unwrap();
        let config = std::fs::read_to_string(self.path("config.toml")).unwrap();
        let dir = self.path("certs.d").display().to_string();
        let named = format!("[source]\nhosts_dir = {dir:?}\n");
        let config = config.replacen("[source]\n", &named, 1);
        std::fs::write(self.path("config.toml"), config).unwrap();
    }

    /// The command line, run under `wrapper` (for example `unshare -m`).
    pub(crate) fn command(&self, wrapper: &[&str], args: &[&str]) -> Command {
        let mut words: Vec<&std::ffi::OsStr> = wrapper.iter().map(std::ffi::OsStr::new).collect();
        words.push(self.binary.as_os_str());
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(args);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.dir.path());
        command
            .env("LAZARETTE_ROOT", self.path("root"))
            .env("LAZARETTE_STATE", self.path("state"));
        command.env("LAZARETTE_CONFIG", self.path("config.toml"));
        command
    }

    /// Runs `laz args` to its end; off the async workers, as the fake registry runs there.
    pub(crate) async fn run(&self, args: &[&str]) -> Said {
        let command = self.command(&[], args);
        said(command).await
    }
}

/// Runs a command to its end.
pub(crate) async fn said(mut command: Command) -> Said {
    let output: Output = tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap()
        .unwrap();
    Said {
        code: output
            .status
            .code()
            .unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0)),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A file system at `dir/root`, until it is dropped.
pub(crate) struct Root(PathBuf);

impl Root {
    pub(crate) fn mount(dir: &Path, kind: &str, options: &str) -> Self {
        let root = dir.join("root");
        std::fs::create_dir(&root).unwrap();
        let status = Command::new("mount")
            .args(["-t", kind, "-o", options, kind])
            .arg(&root)
            .status();
        assert!(status.unwrap().success());
        Self(root)
    }

    /// An ext4 of so many MiB, none of which is anybody's beforehand, in a file of `dir`.
    pub(crate) fn ext4(dir: &Path, mib: u64) -> Self {
        let disk = dir.join("disk");
        let file = std::fs::File::create(&disk).unwrap();
        file.set_len(mib << 20).unwrap();
        let mut make = Command::new("mkfs.ext4");
        let made = make.args(["-q", "-m", "0"]).arg(&disk).status();
        assert!(made.unwrap().success());
        let root = dir.join("root");
        std::fs::create_dir(&root).unwrap();
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-o", "loop"]).args([&disk, &root]).status();
        assert!(mounted.unwrap().success());
        Self(root)
    }

    /// Takes all the room that is left.
    pub(crate) fn fill(&self) {
        let mut ballast = std::fs::File::create(self.0.join("ballast")).unwrap();
        while ballast.write_all(&[7; 4096]).is_ok() {}
        // What is not on the disk yet may turn out to need more.
        let _ = ballast.sync_all();
    }

    pub(crate) fn free(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        sys::detach(&self.0);
    }
}

/// A layer as it is pushed.
pub(crate) struct Layer {
    pub(crate) blob: Vec<u8>,
    pub(crate) diff_id: Digest,
    pub(crate) toc_digest: Option<Digest>,
}

/// A file of an image.
pub(crate) struct File<'a> {
    pub(crate) path: &'a str,
    pub(crate) mode: u32,
    pub(crate) bytes: &'a [u8],
}

/// Bytes that no compressor makes much smaller, the same every time.
pub(crate) fn incompressible(len: usize) -> Vec<u8> {
    content::noise(1, 0xff, len)
}

/// An uncompressed tar with these files; the same whenever and by whichever process it is made.
pub(crate) fn tar(files: &[File<'_>]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    for file in files {
        let path = dir.path().join(file.path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, file.bytes).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(file.mode)).unwrap();
    }
    let output = Command::new("tar")
        .args(["--owner=0", "--group=0", "--mtime=@0", "--sort=name"])
        .args(["-cf", "-", "-C"])
        .arg(dir.path())
        .arg(".")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// The tar as an uncompressed layer.
pub(crate) fn plain(tar: Vec<u8>) -> Layer {
    Layer {
        diff_id: Digest::sha256(&tar),
        blob: tar,
        toc_digest: None,
    }
}

/// The tar as a gzip layer.
pub(crate) fn gzipped(tar: Vec<u8>) -> Layer {
    let diff_id = Digest::sha256(&tar);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    std::fs::write(&path, tar).unwrap();
    let output = Command::new("gzip").arg("-nc").arg(&path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    Layer {
        diff_id,
        blob: output.stdout,
        toc_digest: None,
    }
}

/// The tar as an eStargz layer with chunks of 64 KiB.
pub(crate) fn estargz(tar: Vec<u8>) -> Layer {
    let mut blob = Vec::new();
    let options = Options {
        chunk_bytes: 64 << 10,
        ..Options::default()
    };
    let written = write_layer("test layer", &mut Cursor::new(tar), &mut blob, &options).unwrap();
    Layer {
        blob,
        diff_id: written.diff_id,
        toc_digest: written.toc_digest,
    }
}

/// Where an image stands in a registry.
pub(crate) struct Pushed {
    pub(crate) reference: String,
}

/// What may be changed of an image before it is pushed.
pub(crate) struct Changes<'a> {
    pub(crate) architecture: &'a str,
    pub(crate) repository: &'a str,
    pub(crate) tag: &'a str,
    pub(crate) edit: &'a dyn Fn(&mut Value),
}

impl Default for Changes<'_> {
    fn default() -> Self {
        Self {
            architecture: "amd64",
            repository: "test/image",
            tag: "v1",
            edit: &|_| {},
        }
    }
}

/// Pushes a one-layer image whose command is `/bin/busybox sh -c 'echo hello'`.
pub(crate) fn push(registry: &FakeRegistry, layer: &Layer, changes: &Changes<'_>) -> Pushed {
    push_layers(registry, std::slice::from_ref(layer), changes)
}

/// The same of several layers, base first.
pub(crate) fn push_layers(
    registry: &FakeRegistry,
    layers: &[Layer],
    changes: &Changes<'_>,
) -> Pushed {
    let diff_ids: Vec<String> = layers.iter().map(|l| l.diff_id.to_string()).collect();
    let config = json!({
        "os": "linux", "architecture": changes.architecture,
        "config": {"Cmd": ["/bin/busybox", "sh", "-c", "echo hello"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = serde_json::to_vec(&config).unwrap();
    let config_digest = registry.add_blob(config.clone());
    let descriptor = |layer: &Layer| {
        let digest = registry.add_blob(layer.blob.clone()).to_string();
        let mut annotations = serde_json::Map::new();
        if let Some(toc) = layer.toc_digest {
            annotations.insert(
                "containerd.io/snapshot/stargz/toc.digest".into(),
                json!(toc.to_string()),
            );
        }
        json!({"mediaType": MediaType::OciLayerGzip.as_str(), "digest": digest,
               "size": layer.blob.len(), "annotations": annotations})
    };
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": MediaType::OciManifest.as_str(),
        "config": {"mediaType": MediaType::OciConfig.as_str(), "digest": config_digest.to_string(),
                   "size": config.len()},
        "layers": layers.iter().map(descriptor).collect::<Vec<_>>(),
    });
    (changes.edit)(&mut manifest);
    let bytes = serde_json::to_vec(&manifest).unwrap();
    let (repository, tag) = (changes.repository, changes.tag);
    registry.add_manifest(repository, tag, MediaType::OciManifest, bytes);
    Pushed {
        reference: format!("{}/{repository}:{tag}", registry.url_host()),
    }
}

/// Copies a program to where it is run. By a process of its own: a program that anybody has open to
/// write cannot be run, and a process that another test is starting has what we have open, too.
pub(crate) fn install(program: &Path, to: &Path) {
    let mut install = Command::new("install");
    let install = install.args(["-m", "755"]).args([program, to]);
    assert!(install.status().unwrap().success());
}

/// Waits for what a thread deletes.
pub(crate) fn wait_until_empty(dir: &Path) {
    let since = std::time::Instant::now();
    while std::fs::read_dir(dir).unwrap().count() > 0 {
        assert!(
            since.elapsed().as_secs() < 60,
            "not empty: {}",
            dir.display()
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// A wrapper that runs a command, `"$0" "$@"`, by `script` with mounts of its own.
pub(crate) fn with_own_mounts(script: &str) -> [String; 5] {
    let script = without_others_mounts(script);
    ["unshare", "-m", "sh", "-c", &script].map(str::to_owned)
}

/// `script`, for a shell with mounts of its own. Those of other tests go first: whoever has a
/// copy of a mount keeps what that stands on from being unmounted.
pub(crate) fn without_others_mounts(script: &str) -> String {
    let others = std::env::temp_dir();
    let forget = "awk -v dir=\"$LAZ_TEST_MOUNTS/\" 'index($5, dir) == 1 {print $5}' \
                  /proc/self/mountinfo | tac | while read -r at; do umount -l \"$at\"; done";
    format!("LAZ_TEST_MOUNTS='{}'; {forget}; {script}", others.display())
}

/// Debian's static busybox: a whole user land in one file.
pub(crate) fn busybox() -> Vec<u8> {
    let path = Path::new("/usr/bin/busybox");
    let alternative = Path::new("/bin/busybox");
    let path = if path.exists() { path } else { alternative };
    std::fs::read(path).expect("busybox-static is installed (tests/lib/deps.sh does that)")
}

/// Whether this process is root; says loudly when a test is left out because it is not.
pub(crate) fn is_root(test: &str) -> bool {
    let root = std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0);
    if !root {
        eprintln!("SKIPPED (needs root): {test}");
    }
    root
}
