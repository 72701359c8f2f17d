//! Containers that go on while `lazd`, the mount server or the whole node dies.
//!
//! Promise: whatever is read is right; while the mount server and its data are there no
//! read fails; and after everything died at once a node comes back from its disk alone.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, Fault};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::asked::ASKED;
use super::bed::{Bed, EIO, Evicting, Readers, WAIT_MAX, mount, program};
use super::lowers;
use crate::support::{IMPATIENT, PATIENT, install, is_root};
use crate::sys;

/// Times that `lazd` is killed: at each of them a few readers are in the middle of it.
const KILLS: u32 = 200;
/// As long as the slowest upgrade or restart of a node's services takes.
const AWAY: Duration = Duration::from_secs(60);
/// How much later than a registry's deadline a read may fail, on a machine that does much else.
const LATE_MAX: Duration = Duration::from_secs(30);

/// Layers come as they are read, through FUSE and through fanotify.
const BACKENDS: [&str; 2] = ["[snapshotter]\nfill = false\n", ASKED];

/// The programs in a directory of their own, as an upgrade brings them.
fn another(dir: &Path) -> PathBuf {
    let new = dir.join("new");
    fs::create_dir(&new).unwrap();
    for name in ["lazd", "laz-mountd"] {
        install(&program(name), &new.join(name));
    }
    new.join("lazd")
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_lazd_is_killed_and_upgraded_while_a_container_reads() {
    if !is_root("privileged_lazd_is_killed_and_upgraded_while_a_container_reads") {
        return;
    }
    let mut bed = Bed::new(PATIENT).await;
    let programs = [program("lazd"), another(bed.path())];
    let mounted = bed.mounts();
    bed.start_lazd(&programs[0]);
    let readers = Readers::start(&bed.files, 3);
    let evicting = Evicting::start(bed.store());
    let mut rng = StdRng::seed_from_u64(7);
    for kill in 0..KILLS {
        let program = &programs[usize::from(kill % 5 == 0)];
        std::thread::sleep(Duration::from_millis(rng.random_range(0..200)));
        bed.kill_lazd();
        // Some die before they serve.
        if kill % 3 == 0 {
            drop(bed.spawn_lazd(program));
            std::thread::sleep(Duration::from_millis(rng.random_range(0..200)));
            bed.kill_lazd();
        }
        bed.start_lazd(program);
        readers.wait_for(3);
    }
    let evictions = evicting.end();
    readers.wait_for(100);
    let (right, failed) = (readers.right(), readers.failed());
    let _ = writeln!(
        std::io::stderr(),
        "{KILLS} kills, {evictions} evictions of everything: {right} reads right, {failed} failed"
    );
    assert_eq!(failed, 0, "{}", bed.files.log());
    assert!(evictions > 0, "nothing was ever missing");
    assert_eq!(
        bed.mounts(),
        mounted,
        "something was mounted anew, or twice"
    );

    // Nobody there for a while: what is on the disk is read, and all names are.
    bed.files.read_all();
    bed.stop_lazd();
    let right = readers.right();
    bed.files.read_all();
    assert_eq!(bed.files.names(), bed.files.count());
    readers.wait_for(20);
    assert!(readers.right() > right);
    assert_eq!(readers.failed(), 0);
    assert_eq!(bed.mounts(), mounted);
    assert!(!bed.store().evict(), "nobody could fetch it again now");
    bed.start_lazd(&programs[1]);
    assert!(bed.store().evict());
    bed.files.read_all();
    readers.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_minute_without_lazd_costs_a_minute() {
    if !is_root("privileged_a_minute_without_lazd_costs_a_minute") {
        return;
    }
    let mut bed = Bed::configured(PATIENT, "[snapshotter]\nfill = false\n").await;
    bed.start_lazd(&program("lazd"));
    bed.files.read("base/f1").unwrap();
    assert!(bed.store().evict());
    bed.files.read("base/f2").unwrap();
    bed.kill_lazd();
    let waiting = Readers::start(&bed.files, 2);
    let look = |until: Instant| {
        while Instant::now() < until {
            assert_eq!(bed.files.names(), bed.files.count());
            bed.files.read("base/f2").unwrap();
            std::thread::sleep(Duration::from_millis(500));
        }
        waiting.right()
    };
    let began = Instant::now();
    let half = look(began + AWAY / 2);
    assert_eq!(
        look(began + AWAY),
        half,
        "both met what is missing, and wait"
    );
    bed.start_lazd(&program("lazd"));
    waiting.wait_for(100);
    assert_eq!(waiting.failed(), 0, "{}", bed.files.log());
    waiting.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_no_registry_brings_fails_in_time_and_is_read_later() {
    if !is_root("privileged_what_no_registry_brings_fails_in_time_and_is_read_later") {
        return;
    }
    for (more, away) in BACKENDS
        .into_iter()
        .flat_map(|more| Away::ALL.map(|away| (more, away)))
    {
        fails_in_time(more, away).await;
    }
}

/// Nothing of the layers is there when their registry goes away.
async fn fails_in_time(more: &'static str, away: Away) {
    const DEADLINE: Duration = Duration::from_millis(900);
    let mut bed = Bed::configured(IMPATIENT, more).await;
    away.begin(&mut bed.registry).await;
    bed.start_lazd(&program("lazd"));
    for path in ["base/f2", "top/f2"] {
        let began = Instant::now();
        let error = bed.files.read(path).expect_err("nothing was missing");
        let took = began.elapsed();
        let _ = writeln!(
            std::io::stderr(),
            "{away:?}: {path}: {error} after {took:?}"
        );
        assert_eq!(error.raw_os_error(), Some(EIO), "{away:?}");
        assert!(took >= away.least(DEADLINE), "{away:?}: {took:?} is no try");
        assert!(took < DEADLINE + LATE_MAX, "{away:?}: {took:?}");
    }
    assert_eq!(bed.files.names(), bed.files.count());
    away.end(&mut bed.registry).await;
    bed.files.wait_until_readable();
    bed.files.read_all();
}

/// What a registry does that is away.
#[derive(Debug, Clone, Copy)]
enum Away {
    Refuses,
    Fails,
    Hangs,
}

impl Away {
    const ALL: [Self; 3] = [Self::Refuses, Self::Fails, Self::Hangs];

    async fn begin(self, registry: &mut FakeRegistry) {
        match self {
            Self::Refuses => registry.close().await,
            Self::Fails => registry.always(Endpoint::Blob, Fault::Status(503, None)),
            Self::Hangs => registry.always(Endpoint::Blob, Fault::Hang),
        }
    }

    async fn end(self, registry: &mut FakeRegistry) {
        match self {
            Self::Refuses => registry.reopen().await.unwrap(),
            Self::Fails | Self::Hangs => registry.behave(),
        }
    }

    /// How long a read waits at least. Who is refused, or told so, may know sooner that there is
    /// no use; whoever hears nothing goes on until no other try could end in time.
    fn least(self, deadline: Duration) -> Duration {
        match self {
            Self::Refuses | Self::Fails => Duration::ZERO,
            Self::Hangs => deadline / 2,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_mount_server_that_dies_costs_errors_and_nothing_else() {
    if !is_root("privileged_a_mount_server_that_dies_costs_errors_and_nothing_else") {
        return;
    }
    let mut bed = Bed::new(PATIENT).await;
    bed.start_lazd(&program("lazd"));
    let mounted = bed.mounts();
    let readers = Readers::start(&bed.files, 2);
    for _ in 0..3 {
        readers.wait_for(10);
        let [server, _guard] = bed.servers()[..] else {
            panic!("a server and its guard: {:?}", bed.servers());
        };
        // Else it may have started another before anybody reads.
        let failing = bed.while_lazd_sleeps(|| {
            sys::kill_by_id(server);
            bed.files.failing()
        });
        assert!(failing > 0, "nobody noticed");
        bed.files.wait_until_readable();
        assert!(bed.store().evict());
        bed.files.read_all();
        assert_eq!(bed.mounts(), mounted);
    }
    readers.end();

    // With its guard: what was mounted is lost, and mounted anew for who comes then.
    let failing = bed.while_lazd_sleeps(|| {
        bed.servers().into_iter().rev().for_each(sys::kill_by_id);
        bed.files.failing_unguarded()
    });
    assert!(failing > 0, "nobody noticed");
    bed.unmount();
    bed.wait_for_servers(2);
    bed.stop_lazd();
    let node = bed.node().await;
    let mounts = bed.ask_mounts(&node).await;
    bed.mount(&mounts);
    bed.read_all_here().await;
    node.close().await;
    assert_eq!(bed.mounts().len(), mounted.len());
}

/// Begins to replace the mount server.
fn start_successor(bed: &Bed) -> Child {
    let mut successor = Command::new(program("laz-mountd"));
    let socket = bed.path().join("state/mountd.sock");
    successor.arg("--socket").arg(socket).arg("--take-over");
    successor.stdout(Stdio::null()).spawn().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_mount_server_that_is_upgraded_costs_nothing() {
    if !is_root("privileged_a_mount_server_that_is_upgraded_costs_nothing") {
        return;
    }
    let mut bed = Bed::new(PATIENT).await;
    bed.start_lazd(&program("lazd"));
    let mounted = bed.mounts();
    let readers = Readers::start(&bed.files, 3);
    let evicting = Evicting::start(bed.store());
    for _ in 0..5 {
        let before = bed.servers()[0];
        let mut successor = start_successor(&bed);
        bed.wait_for_end_of(before);
        // Missing bytes come from lazd, which has found the new one.
        readers.wait_for(100);
        assert!(successor.try_wait().unwrap().is_none());
        bed.reap_later(successor);
    }
    assert!(evicting.end() > 0);
    bed.files.read_all();
    assert_eq!(readers.failed(), 0, "{}", bed.files.log());
    assert_eq!(bed.mounts(), mounted);
    readers.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_layer_that_cannot_be_answered_for_at_once_is_soon() {
    if !is_root("privileged_a_layer_that_cannot_be_answered_for_at_once_is_soon") {
        return;
    }
    let mut bed = Bed::new(PATIENT).await;
    bed.start_lazd(&program("lazd"));
    let mounted = bed.mounts();
    assert!(bed.store().evict());
    // What has to be lent to a mount server, and cannot be for a while.
    let [there, away] = ["evictions", "away"].map(|name| bed.path().join("root").join(name));
    fs::rename(&there, &away).unwrap();
    let before = bed.servers()[0];
    let successor = start_successor(&bed);
    bed.reap_later(successor);
    bed.wait_for_end_of(before);
    let since = Instant::now();
    while !bed.files.log().contains("is not answered for") {
        assert!(since.elapsed() < WAIT_MAX, "{}", bed.files.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(bed.mounts(), mounted, "containers have these");
    fs::rename(&away, &there).unwrap();
    bed.files.read_all();
    assert_eq!(bed.mounts(), mounted, "{}", bed.files.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_node_comes_back_from_its_disk_alone() {
    if !is_root("privileged_a_node_comes_back_from_its_disk_alone") {
        return;
    }
    let mut bed = Bed::new(PATIENT).await;
    bed.start_lazd(&program("lazd"));
    bed.files.read_all();
    bed.stop_lazd();
    bed.registry
        .always(Endpoint::Blob, Fault::Status(503, None));
    bed.registry
        .always(Endpoint::Manifest, Fault::Status(503, None));
    let images = bed.path().join("root/meta");
    for damage in ["none", "images", "no images"] {
        bed.reset();
        for image in fs::read_dir(&images).unwrap() {
            let path = image.unwrap().path();
            match damage {
                "images" => {
                    let len = fs::metadata(&path).unwrap().len();
                    fs::write(&path, vec![7; usize::try_from(len).unwrap()]).unwrap();
                }
                "no images" => fs::remove_file(&path).unwrap(),
                _ => {}
            }
        }
        let node = bed.node().await;
        assert_eq!(node.restored, 2, "{damage}");
        let mounts = bed.ask_mounts(&node).await;
        bed.mount(&mounts);
        bed.read_all_here().await;
        node.close().await;
        // And what is there is there for the real one.
        bed.start_lazd(&program("lazd"));
        bed.files.read_all();
        bed.stop_lazd();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_layer_that_is_removed_in_use_goes_on_and_is_not_in_the_way() {
    if !is_root("privileged_a_layer_that_is_removed_in_use_goes_on_and_is_not_in_the_way") {
        return;
    }
    let bed = Bed::new(PATIENT).await;
    let node = bed.node().await;
    bed.read_all_here().await;
    // The container's root file system still lies on both. Containerd never does this: it
    // keeps what a container has.
    bed.remove(&node).await;
    assert_eq!(
        failing(&bed).await,
        0,
        "it was all there: {}",
        bed.files.log()
    );
    let left = bed.mounts();
    assert!(left.len() > 1, "it was in use: {left:?}");
    // Other data files of the same layers, elsewhere.
    let mounts = bed.bring(&node).await;
    assert!(lowers(&mounts).iter().all(|lower| !left.contains(lower)));
    let below = bed.path().join("rootfs-2");
    mount(&mounts, &below);
    bed.read_all_at(&below).await;
    assert_eq!(failing(&bed).await, 0, "{}", bed.files.log());
    sys::detach(&bed.files.rootfs);
    // Nobody asks for anything.
    wait_for_mounts(&bed, |mounts| mounts.iter().all(|one| !left.contains(one)));
    bed.read_all_at(&below).await;
    bed.remove(&node).await;
    assert!(!bed.mounts().is_empty(), "it is in use");
    sys::detach(&below);
    wait_for_mounts(&bed, |mounts| mounts.is_empty());
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_is_missing_of_a_layer_that_is_removed_fails_and_is_never_wrong() {
    if !is_root("privileged_what_is_missing_of_a_layer_that_is_removed_fails_and_is_never_wrong") {
        return;
    }
    let bed = Bed::configured(PATIENT, "[snapshotter]\nfill = false\n").await;
    let node = bed.node().await;
    assert!(bed.store().evict());
    let files = std::sync::Arc::clone(&bed.files);
    let read = tokio::task::spawn_blocking(move || files.read("base/f4"));
    read.await.unwrap().unwrap();
    bed.remove(&node).await;
    // Reads compare what they get.
    let failing = failing(&bed).await;
    assert!((1..bed.files.count()).contains(&failing), "{failing}");
    let files = std::sync::Arc::clone(&bed.files);
    let read = tokio::task::spawn_blocking(move || files.read("base/f4"));
    read.await.unwrap().unwrap();
    node.close().await;
}

/// Waits until what is mounted is so.
fn wait_for_mounts(bed: &Bed, is_so: impl Fn(&[PathBuf]) -> bool) {
    let began = Instant::now();
    while !is_so(&bed.mounts()) {
        let late = began.elapsed() > Duration::from_secs(120);
        assert!(!late, "{:?} {}", bed.mounts(), bed.files.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How many of the container's files cannot be read, off the async workers.
async fn failing(bed: &Bed) -> usize {
    let files = std::sync::Arc::clone(&bed.files);
    let failing = tokio::task::spawn_blocking(move || files.failing());
    failing.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_without_the_servers_program_lazd_mounts_and_says_what_that_costs() {
    if !is_root("privileged_without_the_servers_program_lazd_mounts_and_says_what_that_costs") {
        return;
    }
    let mut bed = Bed::new(PATIENT).await;
    let mounted = bed.mounts();
    let alone = bed.path().join("lazd");
    install(&program("lazd"), &alone);
    bed.start_lazd(&alone);
    let log = bed.files.log();
    assert_eq!(log.matches("laz-mountd is not beside lazd").count(), 1);
    assert!(log.contains("fail when lazd ends"), "{log}");
    assert_eq!(bed.mounts().len(), 2 * mounted.len() - 1, "its own, beside");
    bed.stop_lazd();
    assert_eq!(bed.mounts(), mounted);
    bed.start_lazd(&program("lazd"));
    bed.files.read_all();
    assert_eq!(bed.mounts(), mounted);
}
