//! Making the next move between control groups a fast one.
//!
//! Linux lets a process into a cgroup only when everybody who is just forking or ending has
//! been waited for, which takes some 10 ms the first time (an RCU grace period) and nothing
//! for about as long afterwards. A container's first process is moved into up to a dozen
//! cgroups while everybody waits for it, so the first wait is had before.
//!
//! Invariant: no process changes its cgroup here. This one is "moved" to where it is, and only
//! after the kernel listed it there: paths of `/proc/self/cgroup` mean something else where the
//! cgroups that are mounted are not those of this process's Linux namespace.

use std::io;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

/// Where cgroups are mounted.
const MOUNT: &str = "/sys/fs/cgroup";

/// Has the wait that the next move would have, now. Blocks for about 10 ms; while somebody
/// does so already it does nothing. A failure leaves the wait to whoever moves next.
pub(super) fn wait_before_move() {
    static WAITING: Mutex<()> = Mutex::new(());
    let Some(_waiting) = WAITING.try_lock() else {
        return;
    };
    if let Err(error) = move_in_place() {
        tracing::debug!(%error, "the first move to a cgroup will take longer");
    }
}

fn move_in_place() -> io::Result<()> {
    let own = std::fs::read_to_string("/proc/self/cgroup")?;
    let me = std::process::id().to_string();
    let file = candidates(Path::new(MOUNT), &own).find(|file| {
        std::fs::read_to_string(file).is_ok_and(|listed| listed.lines().any(|pid| pid == me))
    });
    // One wait is for all hierarchies.
    std::fs::write(file.ok_or(io::ErrorKind::NotFound)?, &me)
}

/// The files that list the processes of the cgroups in `own`, the text of
/// `/proc/self/cgroup`: with one hierarchy for all controllers, and with one for each.
fn candidates<'a>(mount: &'a Path, own: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    own.lines().filter_map(move |line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let path = path.strip_prefix('/')?;
        let hierarchy = controllers.strip_prefix("name=").unwrap_or(controllers);
        let is_plain = |text: &str| !text.split('/').any(|part| part == "..");
        (is_plain(hierarchy) && is_plain(path))
            .then(|| mount.join(hierarchy).join(path).join("cgroup.procs"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_below_the_mount() {
        let table: [(&str, &[&str]); 6] = [
            ("0::/user.slice/a b\n", &["/c/user.slice/a b/cgroup.procs"]),
            ("0::/\n", &["/c/cgroup.procs"]),
            (
                "4:memory:/x:y\n2:cpu,cpuacct:/\n1:name=systemd:/s\n",
                &[
                    "/c/memory/x:y/cgroup.procs",
                    "/c/cpu,cpuacct/cgroup.procs",
                    "/c/systemd/s/cgroup.procs",
                ],
            ),
            ("0::/../../other\n", &[]),
            ("0:/..:/x\n", &[]),
            ("nonsense\n3:cpu\n:::\n", &[]),
        ];
        for (own, expected) in table {
            let found: Vec<PathBuf> = candidates(Path::new("/c"), own).collect();
            let expected: Vec<PathBuf> = expected.iter().map(PathBuf::from).collect();
            assert_eq!(found, expected, "{own}");
        }
    }

    #[test]
    fn nobody_changes_cgroup() {
        let own = || std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let before = own();
        wait_before_move();
        assert_eq!(own(), before);
    }
}
