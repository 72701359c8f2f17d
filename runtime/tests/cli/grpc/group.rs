//! A memory cgroup of a test, in whichever of the kernel's two hierarchies has memory.
//!
//! Promise: no other cgroup is changed, and whatever becomes of the test, nothing that ran in
//! this one and no directory of it is left.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::support::install;
use crate::sys;

/// Where the kernel's hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// Lets a process lower its score.
const CAP_SYS_RESOURCE: u32 = 24;
/// Longest wait for what was killed in it to be gone.
const GONE_WAIT: Duration = Duration::from_secs(30);
/// Joins a group, takes a score for the OOM killer, becomes the program.
const ENTER: &str = r#"echo $$ > "$1/cgroup.procs" || exit 97
echo "$2" > /proc/self/oom_score_adj || exit 98
shift 2
exec "$@""#;

/// Names of its files.
struct Names {
    limit: &'static str,
    limit_with_swap: &'static str,
    none: &'static str,
    /// What of `memory.stat` counts pages that were taken back.
    taken: &'static str,
    /// Has the number of processes that were killed, after `oom_kill`.
    kills_in: &'static str,
}

const V1: Names = Names {
    limit: "memory.limit_in_bytes",
    limit_with_swap: "memory.memsw.limit_in_bytes",
    none: "-1",
    taken: "total_pgpgout",
    kills_in: "memory.oom_control",
};

const V2: Names = Names {
    limit: "memory.max",
    limit_with_swap: "memory.swap.max",
    none: "max",
    taken: "pgsteal",
    kills_in: "memory.events",
};

/// What has to be added to scores for the OOM killer where this process may not lower its own:
/// their order stays, and only what is never killed could be.
pub(super) fn score_shift() -> i32 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let may = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let may = u64::from_str_radix(may.unwrap().trim(), 16).unwrap();
    if may & 1 << CAP_SYS_RESOURCE == 0 {
        eprintln!("no CAP_SYS_RESOURCE: scores for the OOM killer are all higher by 1000");
        return 1000;
    }
    0
}

/// A group.
pub(super) struct Group {
    dir: PathBuf,
    names: &'static Names,
}

impl Group {
    /// Makes one that may take so many bytes. Fails loudly where the kernel has none for us.
    pub(super) fn new(bytes: u64) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let Some((parent, names)) = find() else {
            panic!("ENVIRONMENT: no memory controller below {ROOT} that a test may use");
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("lazarette-test-{}-{number}", std::process::id());
        let dir = parent.join(name);
        fs::create_dir(&dir)
            .unwrap_or_else(|e| panic!("ENVIRONMENT: no cgroup at {}: {e}", dir.display()));
        let group = Self { dir, names };
        fs::write(group.dir.join(names.limit), bytes.to_string()).unwrap();
        // Not everywhere is there one; nothing here is ever swapped where it is.
        let with_swap = if names.none == V1.none { bytes } else { 0 };
        let _ = fs::write(group.dir.join(names.limit_with_swap), with_swap.to_string());
        group
    }

    /// A command that runs `program` in it, and whose children are in it, too.
    pub(super) fn command(&self, score: i32, program: &Path) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", ENTER, "sh"]);
        command.arg(&self.dir).arg(score.to_string()).arg(program);
        command
    }

    /// The same as a file at `path`, which hands its arguments on.
    pub(super) fn launcher(&self, score: i32, program: &Path, path: &Path) {
        let (dir, program) = (self.dir.display(), program.display());
        let text = format!("#!/bin/sh\nset -- '{dir}' {score} '{program}' \"$@\"\n{ENTER}\n");
        let draft = path.with_extension("draft");
        fs::write(&draft, text).unwrap();
        install(&draft, path);
        fs::remove_file(draft).unwrap();
    }

    /// How many bytes of memory were taken from it, to be given to it again.
    pub(super) fn taken_back(&self) -> u64 {
        4096 * self.number("memory.stat", self.names.taken)
    }

    /// How many of its processes the kernel killed for memory.
    pub(super) fn kills(&self) -> u64 {
        self.number(self.names.kills_in, "oom_kill")
    }

    /// Whether a process is in it.
    pub(super) fn has(&self, pid: i32) -> bool {
        self.pids().contains(&pid)
    }

    fn number(&self, file: &str, key: &str) -> u64 {
        let text = fs::read_to_string(self.dir.join(file)).unwrap();
        let mut pairs = text.lines().filter_map(|line| line.split_once(' '));
        let (_, value) = pairs.find(|(name, _)| *name == key).unwrap();
        value.parse().unwrap()
    }

    fn pids(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|pid| pid.parse().ok()).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What has to end may need memory for that.
        for limit in [self.names.limit_with_swap, self.names.limit] {
            let _ = fs::write(self.dir.join(limit), self.names.none);
        }
        let since = Instant::now();
        while let Err(error) = fs::remove_dir(&self.dir) {
            if error.kind() == io::ErrorKind::NotFound || since.elapsed() > GONE_WAIT {
                eprintln!("{} is left: {error}", self.dir.display());
                return;
            }
            self.pids().into_iter().for_each(sys::kill_by_id);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Where a group can be made: with a hierarchy of memory alone below our own, which bounds it;
/// with that of everything beside our own, as no group there has both processes and groups.
fn find() -> Option<(PathBuf, &'static Names)> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut ours = text.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        Some((controllers, path.trim_start_matches('/')))
    });
    let of_memory = ours
        .clone()
        .find(|(controllers, _)| controllers.split(',').any(|name| name == "memory"));
    if let Some((controllers, path)) = of_memory {
        let dir = Path::new(ROOT).join(controllers).join(path);
        return dir.join(V1.limit).exists().then_some((dir, &V1));
    }
    let (_, path) = ours.find(|(controllers, _)| controllers.is_empty())?;
    let own = Path::new(ROOT).join(path);
    let beside = if path.is_empty() { &own } else { own.parent()? };
    let given = fs::read_to_string(beside.join("cgroup.subtree_control")).ok()?;
    let is_given = given.split_whitespace().any(|name| name == "memory");
    is_given.then(|| (beside.to_path_buf(), &V2))
}
