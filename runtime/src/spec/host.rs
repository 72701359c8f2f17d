//! What the host can and allows: gathered once, so that building a spec stays pure.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use crate::sys::process;

/// Most bytes read of any host text file; resolv.conf and hosts are far smaller.
const TEXT_BYTES_MAX: u64 = 1 << 20;

/// Which resource controllers the kernel offers to us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "four independent facts, not states"
)]
pub struct Controllers {
    /// Memory limits.
    pub memory: bool,
    /// Limits on memory plus swap.
    pub swap: bool,
    /// CPU bandwidth limits.
    pub cpu: bool,
    /// Limits on the number of processes.
    pub pids: bool,
}

/// Facts about the host that a spec depends on.
#[derive(Clone, Debug, Default)]
pub struct HostFacts {
    /// Controllers found.
    pub controllers: Controllers,
    /// Names of the cgroup version 1 hierarchies, sorted; empty with version 2.
    pub cgroup_hierarchies: Vec<String>,
    /// Our own `oom_score_adj`: a container cannot be given a lower one without
    /// `CAP_SYS_RESOURCE`, and must not be given one anyway.
    pub oom_score_adj: i32,
    /// Our hard limit of open files.
    pub nofile_hard: u64,
    /// Whether a mount can be made read-only with all that is mounted below it.
    pub recursive_read_only: bool,
    /// Host name.
    pub hostname: String,
    /// Text of `/etc/hosts`.
    pub hosts: String,
    /// Text of `/etc/resolv.conf`.
    pub resolv_conf: String,
}

impl HostFacts {
    /// Looks at this host. A missing `hosts` or `resolv.conf` counts as empty.
    ///
    /// # Errors
    /// When `/proc/self` or our limits cannot be read.
    pub fn probe() -> io::Result<Self> {
        let oom_score_adj = fs::read_to_string("/proc/self/oom_score_adj")?;
        Ok(Self {
            controllers: Controllers::probe(Path::new("/sys/fs/cgroup")),
            cgroup_hierarchies: hierarchies(Path::new("/sys/fs/cgroup"))?,
            oom_score_adj: oom_score_adj.trim().parse().map_err(io::Error::other)?,
            nofile_hard: process::nofile_hard()?,
            recursive_read_only: process::can_change_mount_trees(),
            hostname: process::hostname(),
            hosts: text("/etc/hosts")?,
            resolv_conf: text("/etc/resolv.conf")?,
        })
    }
}

impl Controllers {
    /// Looks below the cgroup mount point `root`, version 2 or version 1 (and hybrid).
    #[must_use]
    pub fn probe(root: &Path) -> Self {
        if let Ok(list) = fs::read_to_string(root.join("cgroup.controllers")) {
            let has = |name| list.split_whitespace().any(|word| word == name);
            let (memory, cpu, pids) = (has("memory"), has("cpu"), has("pids"));
            return Self {
                memory,
                swap: memory,
                cpu,
                pids,
            };
        }
        Self {
            memory: root.join("memory/memory.limit_in_bytes").exists(),
            swap: root.join("memory/memory.memsw.limit_in_bytes").exists(),
            cpu: root.join("cpu").is_dir(),
            pids: root.join("pids").is_dir(),
        }
    }
}

/// The version 1 hierarchies mounted below `root`.
fn hierarchies(root: &Path) -> io::Result<Vec<String>> {
    if root.join("cgroup.controllers").exists() || !root.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(root)? {
        names.extend(entry?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn text(path: &str) -> io::Result<String> {
    let mut text = Vec::new();
    match fs::File::open(path) {
        Ok(file) => file.take(TEXT_BYTES_MAX).read_to_end(&mut text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_of_both_versions_are_found() {
        let v2 = tempfile::tempdir().unwrap();
        fs::write(v2.path().join("cgroup.controllers"), "cpuset cpu memory\n").unwrap();
        let expected = Controllers {
            memory: true,
            swap: true,
            cpu: true,
            pids: false,
        };
        assert_eq!(Controllers::probe(v2.path()), expected);

        let v1 = tempfile::tempdir().unwrap();
        fs::create_dir_all(v1.path().join("memory")).unwrap();
        fs::create_dir_all(v1.path().join("pids")).unwrap();
        fs::write(v1.path().join("memory/memory.limit_in_bytes"), "").unwrap();
        let expected = Controllers {
            memory: true,
            swap: false,
            cpu: false,
            pids: true,
        };
        assert_eq!(Controllers::probe(v1.path()), expected);
        assert_eq!(
            Controllers::probe(Path::new("/nowhere")),
            Controllers::default()
        );
    }

    #[test]
    fn this_host_can_be_probed() {
        let facts = HostFacts::probe().unwrap();
        assert!(facts.nofile_hard > 0);
        assert!((-1000..=1000).contains(&facts.oom_score_adj));
    }
}
