//! Containers that read while there is no memory for what they read.
//!
//! Promise: readers, `lazd`, the mount server and its guard share a cgroup that holds a part of
//! what is read. Whatever is read is right, nothing hangs, and when the kernel kills for memory
//! it is neither the server nor its guard: each has the score that its unit gives.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::bed::{Bed, EVICTABLE, program, start_server};
use super::group::{Group, score_shift};
use crate::support::{PATIENT, is_root};

/// Longest wait for so many reads.
const READS_WAIT: Duration = Duration::from_secs(240);
/// Large files are so much larger: all have about 120 MB.
const TIMES: usize = 54;
/// What all together may take. Programs alone have about half of it.
const LIMIT_BYTES: u64 = 80 << 20;
/// How often something takes all that is left.
const HOGS: u64 = 5;
/// Takes more than the limit, and bounded should there be none.
const HOG_BLOCK: &str = "bs=256M";
const SIGKILL: i32 = 9;
/// Readers go before the servers, and what takes too much before readers.
const READER_SCORE: i32 = 500;

/// Compares all files again and again, in any order: `right` or what is wrong, a line each.
const READER: &str = r#"cd "$1" || exit 1
while :; do
    for file in $(shuf -e */*); do
        if said=$(cmp "$file" "$2/$file" 2>&1); then echo right; else echo "$file: $? $said"; fi
    done
done"#;

/// Processes in a group that read everything, until this is dropped.
struct Comparing {
    children: Vec<Child>,
    log: PathBuf,
}

/// What they met.
#[derive(Debug, Default, Clone, Copy)]
struct Met {
    right: u64,
    failed: u64,
}

impl Comparing {
    fn start(group: &Group, bed: &Bed, right: &Path, count: usize) -> Self {
        let log = bed.path().join("reads.log");
        let lines = File::options().create(true).append(true).open(&log);
        let lines = lines.unwrap();
        let start = |_| {
            let mut command = group.command(READER_SCORE, Path::new("/bin/sh"));
            command.args(["-c", READER, "sh"]).arg(right);
            command.arg(&bed.files.rootfs).env("LC_ALL", "C");
            command.stdin(Stdio::null());
            command.stdout(lines.try_clone().unwrap()).spawn().unwrap()
        };
        let children = (0..count).map(start).collect();
        Self { children, log }
    }

    /// Looks at all that was read so far; nothing of it may be wrong.
    fn met(&self) -> Met {
        let mut met = Met::default();
        let text = fs::read_to_string(&self.log).unwrap();
        // The last line may not be whole.
        let (whole, _) = text.rsplit_once('\n').unwrap_or_default();
        for line in whole.lines() {
            match line {
                "right" => met.right += 1,
                _ if line.ends_with("Input/output error") => met.failed += 1,
                _ => panic!("neither right nor an error: {line}"),
            }
        }
        met
    }

    /// Waits until `count` more files were read.
    fn wait_for(&mut self, count: u64) -> Met {
        let (goal, since) = (self.met().right + count, Instant::now());
        loop {
            let met = self.met();
            if met.right >= goal {
                return met;
            }
            let ended = self
                .children
                .iter_mut()
                .find_map(|child| child.try_wait().unwrap());
            assert!(ended.is_none(), "a reader ended: {ended:?}");
            assert!(since.elapsed() < READS_WAIT, "readers hang: {met:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Comparing {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The score that a unit gives.
fn score(unit: &str) -> i32 {
    let of = |line: &str| line.strip_prefix("OOMScoreAdjust=")?.parse().ok();
    let score: i32 = unit.lines().find_map(of).unwrap();
    score + score_shift()
}

/// Starts everything of a node in `group`, as its units do, and mounts the container.
async fn start(bed: &mut Bed, group: &Group) {
    let lazd = bed.path().join("lazd-in-group");
    let lazd_score = score(include_str!("../../../../deploy/lazd.service"));
    group.launcher(lazd_score, &program("lazd"), &lazd);
    bed.reset();
    let state = bed.path().join("state");
    fs::DirBuilder::new().mode(0o711).create(&state).unwrap();
    let server_score = score(include_str!("../../../../deploy/laz-mountd.service"));
    let mut server = group.command(server_score, &program("laz-mountd"));
    let server = server.arg("--socket").arg(state.join("mountd.sock"));
    bed.reap_later(start_server(server));
    bed.wait_for_servers(2);
    let node = bed.node().await;
    let mounts = bed.ask_mounts(&node).await;
    bed.mount(&mounts);
    node.close().await;
    bed.start_lazd(&lazd);
    for pid in bed.servers() {
        let given = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        assert_eq!(given.trim(), server_score.to_string(), "of {pid}");
        assert!(group.has(pid), "{pid} is elsewhere");
    }
}

/// Has the kernel kill what takes too much.
fn hog(group: &Group) {
    let mut hog: Command = group.command(1000, Path::new("/bin/dd"));
    hog.args(["if=/dev/zero", "of=/dev/null", HOG_BLOCK, "count=1"]);
    let ended = hog.output().unwrap();
    assert_eq!(ended.status.signal(), Some(SIGKILL), "{ended:?}");
}

async fn press(more: &'static str) {
    // Dropped last: whatever is still in it ends then.
    let group = Group::new(LIMIT_BYTES);
    let mut bed = Bed::sized(PATIENT, more, TIMES).await;
    start(&mut bed, &group).await;
    let (servers, mounted) = (bed.servers(), bed.mounts());
    let right = bed.path().join("right");
    let bytes = bed.files.copy_to(&right);
    assert!(bytes > LIMIT_BYTES, "it has room for everything");
    let passes = bed.files.count() as u64;

    // What is missing is fetched, and made a hole of again where the backend can.
    let mut comparing = Comparing::start(&group, &bed, &right, 3);
    let mut evictions = 0;
    for _ in 0..3 {
        comparing.wait_for(passes);
        evictions += u32::from(bed.store().evict());
    }
    let before = group.taken_back();
    let met = comparing.wait_for(3 * passes);
    let taken = group.taken_back() - before;
    assert!(taken > bytes / 2, "no pressure: {taken} bytes taken back");
    assert_eq!((met.failed, group.kills()), (0, 0), "{}", bed.files.log());
    let _ = writeln!(
        std::io::stderr(),
        "pressure: {bytes} bytes in {LIMIT_BYTES}, {evictions} evictions, {taken} bytes taken back \
         in three passes: {met:?}"
    );

    // Nothing is left at all, while what is missing is asked for.
    for _ in 0..HOGS {
        bed.store().evict();
        hog(&group);
        comparing.wait_for(passes / 4);
    }
    let met = comparing.wait_for(passes);
    drop(comparing);
    let _ = writeln!(std::io::stderr(), "{} killed: {met:?}", group.kills());
    assert_eq!(group.kills(), HOGS, "somebody else was killed");
    assert_eq!(bed.servers(), servers, "not the ones that were started");
    assert_eq!(bed.mounts(), mounted);
    bed.files.read_all();
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_a_container_reads_is_right_without_memory_for_it() {
    if !is_root("privileged_what_a_container_reads_is_right_without_memory_for_it") {
        return;
    }
    press(EVICTABLE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_the_kernel_reads_itself_is_right_without_memory_for_it() {
    if !is_root("privileged_what_the_kernel_reads_itself_is_right_without_memory_for_it") {
        return;
    }
    press("[mounts]\nbackend = \"fanotify\"\n[store]\nbudget = \"1t\"\n").await;
}
