//! Containers whose layers the kernel reads by itself and asks about first, while `lazd` and the
//! mount server die or are replaced.
//!
//! Promise: whatever is read is right; while the mount server is there no read fails. What is there
//! stays as long as it is mounted, so that something is missing takes layers that are new.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::bed::{Bed, EIO, Readers, program};
use crate::support::{PATIENT, is_root};
use crate::sys;

/// In the config where the kernel asks, and only what is read comes.
pub(super) const ASKED: &str =
    "[mounts]\nbackend = \"fanotify\"\n[snapshotter]\nfill = false\n[store]\nbudget = \"1t\"\n";

/// Nodes with layers of which nothing is there.
const BATCHES: u64 = 4;
/// Large files are so much larger, for something to be missing when `lazd` dies.
const TIMES: usize = 6;
/// Times that `lazd` is killed on one node, at most; mostly all is there before.
const KILLS_MAX: u32 = 12;
/// Times in all that something was missing.
const MISSING_MIN: u32 = 12;
/// Longest wait for what has to happen.
const WAIT_MAX: Duration = Duration::from_secs(60);

#[track_caller]
fn is_without_fuse(bed: &Bed) {
    let kinds = fs::read_to_string("/proc/self/mounts").unwrap();
    let path = bed.path().to_str().unwrap();
    let mut own = kinds.lines().filter(|line| line.contains(path));
    assert!(!own.any(|line| line.contains("fuse")), "{kinds}");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_the_kernel_reads_itself_is_right_while_lazd_dies() {
    if !is_root("privileged_what_the_kernel_reads_itself_is_right_while_lazd_dies") {
        return;
    }
    let (mut kills, mut missing) = (0, 0);
    for seed in 0..BATCHES {
        let mut bed = Bed::sized(PATIENT, ASKED, TIMES).await;
        is_without_fuse(&bed);
        let mounted = bed.mounts();
        let readers = Readers::start(&bed.files, 3);
        let mut rng = StdRng::seed_from_u64(seed);
        for _ in 0..KILLS_MAX {
            bed.start_lazd(&program("lazd"));
            std::thread::sleep(Duration::from_millis(rng.random_range(0..150)));
            bed.kill_lazd();
            kills += 1;
            if bed.store().is_complete() {
                break;
            }
            missing += 1;
        }
        bed.start_lazd(&program("lazd"));
        bed.files.read_all();
        readers.wait_for(20);
        assert_eq!(readers.failed(), 0, "{}", bed.files.log());
        assert!(!bed.store().evict(), "the kernel may read it at any time");
        assert_eq!(bed.mounts(), mounted);
        // All of it is there: nobody needs to be asked.
        bed.stop_lazd();
        bed.files.read_all();
        readers.end();
    }
    let said = format!("{kills} kills, {missing} with something missing\n");
    let _ = std::io::Write::write_all(&mut std::io::stderr(), said.as_bytes());
    assert!(missing >= MISSING_MIN, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_mount_server_that_dies_costs_who_is_asked_about_errors() {
    if !is_root("privileged_a_mount_server_that_dies_costs_who_is_asked_about_errors") {
        return;
    }
    let mut bed = Bed::sized(PATIENT, ASKED, TIMES).await;
    bed.start_lazd(&program("lazd"));
    let mounted = bed.mounts();
    // What is fetched brings along what is behind it, and maybe all of a layer.
    for path in ["base/f5", "top/f5"] {
        let [server, _guard] = bed.servers()[..] else {
            panic!("a server and its guard: {:?}", bed.servers());
        };
        // Else it may have started another before this reads.
        let read = bed.while_lazd_sleeps(|| {
            sys::kill_by_id(server);
            bed.wait_for_end_of(server);
            bed.files.read(path)
        });
        let error = read.expect_err(path);
        assert_eq!(error.raw_os_error(), Some(EIO));
        let since = Instant::now();
        while bed.files.read(path).is_err() {
            assert!(since.elapsed() < WAIT_MAX, "{}", bed.files.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(bed.mounts(), mounted);
    }
    bed.files.read_all();
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_reads_that_wait_do_not_notice_another_mount_server() {
    if !is_root("privileged_reads_that_wait_do_not_notice_another_mount_server") {
        return;
    }
    for more in ["[snapshotter]\nfill = false\n", ASKED] {
        let mut bed = Bed::configured(PATIENT, more).await;
        let mounted = bed.mounts();
        // Nobody is there who could bring anything.
        let readers = Readers::start(&bed.files, 4);
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(100));
            let before = bed.servers()[0];
            let mut successor = Command::new(program("laz-mountd"));
            successor.arg("--take-over").arg("--socket");
            successor.arg(bed.path().join("state/mountd.sock"));
            bed.reap_later(successor.stdout(Stdio::null()).spawn().unwrap());
            bed.wait_for_end_of(before);
        }
        assert_eq!((readers.right(), readers.failed()), (0, 0), "they wait");
        bed.start_lazd(&program("lazd"));
        bed.files.read_all();
        readers.wait_for(50);
        assert_eq!(readers.failed(), 0, "{}", bed.files.log());
        assert_eq!(bed.mounts(), mounted);
        readers.end();
    }
}
