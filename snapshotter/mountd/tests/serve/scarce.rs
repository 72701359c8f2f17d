//! A server that may open, or start, hardly anything more.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lazarette_mountd::client::Connection;
use lazarette_mountd::ranges::Span;
use lazarette_mountd::wire::{FileId, Message, Role};

use crate::bed::{Bed, HANGS, Mounted, ends, must_be_root, open, read_right};
use crate::daemon::{connect, mount, try_mount};
use crate::store::{Layer, PAGE};
use crate::sys;

const EMFILE: u32 = 24;
const PAGES: u64 = 8;
/// More than any of these servers needs.
const ENOUGH: usize = 4096;

/// Gives a process so many descriptors.
fn limit(pid: u32, files: usize) {
    let mut prlimit = Command::new("prlimit");
    prlimit.args([
        "--pid",
        &pid.to_string(),
        &format!("--nofile={files}:{ENOUGH}"),
    ]);
    assert!(prlimit.status().unwrap().success());
}

fn open_files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Leaves a process so many descriptors more: a limit is one of their numbers, and there may be
/// holes between those that it has.
fn leave(pid: u32, mut left: usize) {
    let numbers = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let numbers = numbers.filter_map(|fd| fd.unwrap().file_name().to_str()?.parse().ok());
    let used: BTreeSet<usize> = numbers.collect();
    let mut end = 0;
    while left > 0 || used.contains(&end) {
        left -= usize::from(!used.contains(&end));
        end += 1;
    }
    limit(pid, end);
}

/// A cgroup in which a process may have one thread, in whichever of the kernel's two hierarchies
/// has the controller.
struct OneThread(PathBuf);

impl OneThread {
    /// Takes a process in, with the threads that it has.
    fn take(pid: u32) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let apart = root.join("pids");
        let parent = match apart.is_dir() {
            true => apart,
            false => root.to_path_buf(),
        };
        let group = Self(parent.join(format!("laz-mountd-test-{pid}")));
        fs::create_dir(&group.0).unwrap();
        fs::write(group.0.join("pids.max"), "1")
            .expect("ENVIRONMENT: no pids controller that a test may use");
        fs::write(group.0.join("cgroup.procs"), pid.to_string()).unwrap();
        group
    }
}

impl Drop for OneThread {
    fn drop(&mut self) {
        // What was in it is gone a moment after it was waited for.
        for _ in 0..1000 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Milliseconds of processor time that a process has had.
fn cpu_ms(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks = fields.split(' ').skip(11).take(2);
    ticks.map(|ticks| ticks.parse::<u64>().unwrap() * 10).sum()
}

/// A new layer below `dir`, and where it is to be mounted.
fn make(dir: &Path, number: usize) -> (Layer, PathBuf) {
    let dir = dir.join(format!("layer{number}"));
    Layer::create(&dir, PAGES);
    let at = dir.join("mnt");
    fs::create_dir(&at).unwrap();
    (Layer::open(&dir), at)
}

/// Mounts a new layer of which everything is granted.
fn mount_whole(server: &Connection, dir: &Path, number: usize) -> PathBuf {
    let (layer, at) = make(dir, number);
    let mount = mount(server, &layer, &number.to_string(), &at);
    grant_all(server, &layer, mount);
    at
}

fn grant_all(server: &Connection, layer: &Layer, mount: u64) {
    let number = layer.fill(0..PAGES);
    let span = Span::new(0, PAGES * PAGE).unwrap();
    let grant = Message::Grant {
        want: 0,
        mount,
        number,
        span,
    };
    server.send(&grant, &[]).unwrap();
}

/// Answers for a mount of which everything is granted.
fn attach(server: &Connection, layer: &Layer, mount: u64) {
    let file = FileId::of(&layer.lend()[0]).unwrap();
    let attach = Message::Attach {
        request: 2,
        mount,
        file,
    };
    server.send(&attach, &[]).unwrap();
    grant_all(server, layer, mount);
}

/// Returns when the server has done all that was to be done before.
fn meet(server: &Connection) {
    let nothing = Message::Unmount {
        request: 3,
        mount: u64::MAX,
    };
    server.send(&nothing, &[]).unwrap();
    let answer = server.receive_within(HANGS).unwrap().0;
    assert!(matches!(answer, Message::Done { request: 3, .. }));
}

#[track_caller]
fn is_read(at: &Path) {
    let file = open(&at.join("data"), true);
    let read = std::thread::spawn(move || read_right(&file, 0, PAGES));
    assert!(ends(read), "it fails");
}

#[test]
fn privileged_a_server_without_descriptors_mounts_nothing_and_goes_on() {
    if !must_be_root("privileged_a_server_without_descriptors_mounts_nothing_and_goes_on") {
        return;
    }
    let bed = Bed::new(1, 120);
    let (socket, pid) = (bed.path().join("socket"), bed.server.id());
    let (server, _) = connect(&socket);
    let mut mounted = Mounted(vec![mount_whole(&server, bed.path(), 0)]);
    is_read(&mounted.0[0]);
    let (layer, at) = make(bed.path(), 1);
    let before = open_files(pid);
    // From none that is left on to all but those which mounts leave.
    for left in [0, 1, 2, 3, 5, 10, 18] {
        leave(pid, left);
        for _ in 0..3 {
            let refused = try_mount(&server, &layer, "1", &at);
            assert_eq!(refused, Err(EMFILE), "{left} left");
        }
        assert_eq!(open_files(pid), before, "{left} left");
        is_read(&mounted.0[0]);
    }

    // Who comes now waits, and costs nobody anything.
    leave(pid, 0);
    let guest = Connection::connect(&socket).unwrap();
    guest.send(&Message::Hello(Role::Guest), &[]).unwrap();
    let began = cpu_ms(pid);
    std::thread::sleep(Duration::from_secs(1));
    let took = cpu_ms(pid) - began;
    assert!(took < 200, "{took} ms of a second for nothing");
    is_read(&mounted.0[0]);
    limit(pid, ENOUGH);
    let welcome = guest.receive_within(HANGS).unwrap().0;
    assert_eq!(welcome, Message::Welcome { mounts: 1 });
    mounted.0.push(mount_whole(&server, bed.path(), 2));
    is_read(&mounted.0[1]);
}

#[test]
fn privileged_a_successor_without_descriptors_takes_nothing_over() {
    if !must_be_root("privileged_a_successor_without_descriptors_takes_nothing_over") {
        return;
    }
    let mut bed = Bed::new(1, 120);
    let (server, _) = connect(&bed.path().join("socket"));
    let mounts = (0..20).map(|number| mount_whole(&server, bed.path(), number));
    let mounted = Mounted(mounts.collect());
    drop(server);
    for few in [12, 30, 55] {
        let mut successor = Command::new("prlimit");
        successor.arg(format!("--nofile={few}:{few}"));
        successor
            .arg(env!("CARGO_BIN_EXE_laz-mountd"))
            .arg("--take-over");
        successor.arg("--socket").arg(bed.path().join("socket"));
        let ended = successor.output().unwrap();
        assert!(!ended.status.success(), "{few}: {ended:?}");
        assert!(
            bed.server.try_wait().unwrap().is_none(),
            "{few}: it goes on"
        );
        mounted.0.iter().for_each(|at| is_read(at));
    }
    assert!(bed.upgrade_server().success());
    mounted.0.iter().for_each(|at| is_read(at));
}

#[test]
fn privileged_a_server_that_cannot_go_on_ends() {
    if !must_be_root("privileged_a_server_that_cannot_go_on_ends") {
        return;
    }
    let mut bed = Bed::new(1, 120);
    let socket = bed.path().join("socket");
    let (server, _) = connect(&socket);
    let (layer, at) = make(bed.path(), 0);
    let mounted = Mounted(vec![at]);
    let number = mount(&server, &layer, "0", &mounted.0[0]);
    grant_all(&server, &layer, number);
    is_read(&mounted.0[0]);
    drop(server);
    let group = OneThread::take(bed.server.id());
    // A successor that dies as soon as it has come.
    let successor = Connection::connect(&socket).unwrap();
    let hello = Message::Hello(Role::Successor);
    successor.send(&hello, &[]).unwrap();
    drop(successor);

    // Whoever reads finds the guard.
    let file = open(&mounted.0[0].join("data"), true);
    let read = std::thread::spawn(move || while read_right(&file, 0, 1) {});
    ends(read);
    let ended = bed.server.wait().unwrap();
    assert!(!ended.success(), "{ended}");
    drop(group);
    bed.start_server();
    let (server, _) = connect(&socket);
    attach(&server, &layer, number);
    is_read(&mounted.0[0]);
}

#[test]
fn privileged_a_guard_that_cannot_be_replaced_is_replaced_later() {
    if !must_be_root("privileged_a_guard_that_cannot_be_replaced_is_replaced_later") {
        return;
    }
    let mut bed = Bed::new(1, 120);
    let (socket, pid) = (bed.path().join("socket"), bed.server.id());
    let (server, _) = connect(&socket);
    let (layer, at) = make(bed.path(), 0);
    let mounted = Mounted(vec![at]);
    let number = mount(&server, &layer, "0", &mounted.0[0]);
    let first = bed.guard().unwrap();
    let before = open_files(pid);
    leave(pid, 0);
    sys::kill_by_id(first);
    // It has seen that; and when it answers what it is told now, it has tried to have another.
    let since = Instant::now();
    while open_files(pid) >= before {
        assert!(since.elapsed() < HANGS, "it does not see that");
        std::thread::sleep(Duration::from_millis(1));
    }
    meet(&server);
    assert_eq!(bed.guard(), None);
    limit(pid, ENOUGH);
    let second = bed.next_guard(first);
    meet(&server);

    bed.kill_server();
    let file = open(&mounted.0[0].join("data"), true);
    let read = std::thread::spawn(move || read_right(&file, 0, 1));
    assert!(!ends(read), "nobody answers but the guard");
    bed.start_server();
    assert_eq!(bed.guard(), Some(second));
    let (server, _) = connect(&socket);
    attach(&server, &layer, number);
    is_read(&mounted.0[0]);
}
