//! The mounts and hidden paths every container gets, and the user's volumes.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, MountBuilder};

use super::{HostFacts, SpecError, Volume};

/// Files and directories of the kernel that a container must not see.
pub(super) const MASKED_PATHS: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Files and directories of the kernel that a container may read but not write.
const READONLY_PATHS: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Where a container sees its control groups.
const CGROUPS: &str = "/sys/fs/cgroup";

/// All read-only paths. The control groups are among them although their mount says `ro`
/// already: libcontainer drops that option for version 1 hierarchies, and a container
/// could lift its own limits. The hierarchies come before the directory that holds them.
pub(super) fn readonly_paths(hierarchies: &[String]) -> Vec<String> {
    let fixed = READONLY_PATHS.iter().map(|&path| path.to_owned());
    let inner = hierarchies.iter().map(|name| format!("{CGROUPS}/{name}"));
    fixed.chain(inner).chain([CGROUPS.to_owned()]).collect()
}

struct Fixed {
    destination: &'static str,
    kind: &'static str,
    options: &'static [&'static str],
}

const fn fixed(
    destination: &'static str,
    kind: &'static str,
    options: &'static [&'static str],
) -> Fixed {
    Fixed {
        destination,
        kind,
        options,
    }
}

/// In mounting order: a parent before what lies in it.
const FIXED: &[Fixed] = &[
    fixed("/proc", "proc", &["nosuid", "noexec", "nodev"]),
    fixed(
        "/dev",
        "tmpfs",
        &["nosuid", "strictatime", "mode=755", "size=65536k"],
    ),
    fixed(
        "/dev/pts",
        "devpts",
        &[
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5",
        ],
    ),
    fixed("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    fixed(
        "/sys/fs/cgroup",
        "cgroup",
        &["nosuid", "noexec", "nodev", "relatime", "ro"],
    ),
    fixed("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
    fixed(
        "/dev/shm",
        "tmpfs",
        &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
    ),
];

/// All mounts of a container: the fixed ones, the files generated in `bundle`, then the
/// volumes, outer ones before inner ones.
pub(super) fn mounts(
    bundle: &Path,
    volumes: &[Volume],
    facts: &HostFacts,
) -> Result<Vec<Mount>, SpecError> {
    let mut mounts = Vec::with_capacity(FIXED.len() + super::GENERATED.len() + volumes.len());
    for fixed in FIXED {
        mounts.push(
            MountBuilder::default()
                .destination(fixed.destination)
                .typ(fixed.kind)
                .source(fixed.kind)
                .options(owned(fixed.options))
                .build()?,
        );
    }
    for name in super::GENERATED {
        mounts.push(bind(
            bundle.join(name),
            Path::new("/etc").join(name),
            &["rw"],
        )?);
    }
    let mut volumes: Vec<&Volume> = volumes.iter().collect();
    volumes.sort_by_key(|volume| volume.destination.components().count());
    for volume in volumes {
        mounts.push(bind(
            volume.source.clone(),
            volume.destination.clone(),
            access(volume.read_only, facts),
        )?);
    }
    Ok(mounts)
}

/// `ro` is of the mount itself: what is mounted below it needs the other word. A runtime that
/// does not know that one takes it for data of the file system, which a bind mount has none of.
fn access(read_only: bool, facts: &HostFacts) -> &'static [&'static str] {
    match (read_only, facts.recursive_read_only) {
        (true, true) => &["ro", "rro"],
        (true, false) => &["ro"],
        (false, _) => &["rw"],
    }
}

fn bind(source: PathBuf, destination: PathBuf, access: &[&str]) -> Result<Mount, SpecError> {
    Ok(MountBuilder::default()
        .destination(destination)
        .typ("bind")
        .source(source)
        .options(owned(&[&["rbind", "rprivate"], access].concat()))
        .build()?)
}

pub(super) fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}
