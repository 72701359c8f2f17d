//! A part of a test in a process of its own, in Linux namespaces of its own for mounts and
//! processes.
//!
//! Promise: whatever becomes of that part or of who runs it, a panic, a hang or SIGKILL, the
//! kernel ends every process that it started and takes down every mount that it made, and with
//! these the loop devices below them.

use std::fs;
use std::io::{Read as _, Seek as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::without_others_mounts;

/// Names the directory to the part.
const DIR: &str = "LAZ_CONFINED_TEST_DIR";

/// Longest wait for a part, on a machine that does much else: it is taken to hang then.
const WAIT_MAX: Duration = Duration::from_secs(900);

/// Runs the ignored test `name` of this program to its end; what it said. Panics where it fails
/// or hangs.
pub(crate) fn run(name: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut out = tempfile::tempfile().unwrap();
    // The first ends with this thread, the second ends what it started when it ends itself.
    let child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL"])
        .args(["unshare", "--mount", "--pid", "--fork"])
        .args(["--kill-child", "--mount-proc", "--", "sh", "-c"])
        .arg(without_others_mounts(r#"exec "$0" "$@""#))
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--ignored", "--nocapture"])
        .env(DIR, dir.path())
        .stdin(Stdio::null())
        .stdout(out.try_clone().unwrap())
        .stderr(out.try_clone().unwrap())
        .spawn();
    let done = wait(&mut Ended(child.unwrap()));
    let mut said = String::new();
    out.rewind().unwrap();
    out.read_to_string(&mut said).unwrap();
    assert_eq!(done, Some(true), "{name}: {said}");
    // Else the name is of no test.
    assert!(said.contains("1 passed"), "{name}: {said}");
    said
}

/// Where the part that is running may write; panics where nobody runs it as one.
pub(crate) fn dir() -> PathBuf {
    PathBuf::from(std::env::var_os(DIR).expect("another test runs this"))
}

/// Whether it ended well; `None` if it does not end.
fn wait(child: &mut Ended) -> Option<bool> {
    let since = Instant::now();
    while since.elapsed() < WAIT_MAX {
        if let Some(status) = child.0.try_wait().unwrap() {
            return Some(status.success());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

/// Ends with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "another test runs it, as a part that fails"]
fn part_that_leaves_everything() {
    let dir = dir();
    let at = dir.join("mounted");
    fs::create_dir(&at).unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "tmpfs"])
        .arg(&at)
        .status();
    assert!(mount.unwrap().success());
    let sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    // It is its own first process, and sees no other.
    assert_eq!(std::process::id(), 1);
    drop(sleeper);
    panic!("of {}", at.display());
}

#[test]
fn privileged_a_part_that_fails_says_so_and_leaves_nothing() {
    if !crate::support::is_root("privileged_a_part_that_fails_says_so_and_leaves_nothing") {
        return;
    }
    let name = "confined::part_that_leaves_everything";
    let failed = std::panic::catch_unwind(|| run(name)).unwrap_err();
    let said = failed.downcast_ref::<String>().unwrap();
    let place = said.split("of ").find_map(|rest| {
        let path = rest.split('\n').next()?;
        path.ends_with("mounted").then(|| path.to_owned())
    });
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&place.unwrap()));
    let none = std::panic::catch_unwind(|| run("confined::no_such_part")).unwrap_err();
    let said = none.downcast_ref::<String>().unwrap();
    assert!(said.contains("0 passed"), "{said}");
}
