//! The server is replaced or killed, under load.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use lazarette_mountd::Error;
use lazarette_mountd::client::Connection;
use lazarette_mountd::ranges::Span;
use lazarette_mountd::wire::{Message, Role};

use crate::bed::{Bed, HANGS, Mounted, Readers, ends, must_be_root, read_right};
use crate::daemon::{Daemon, connect, mount};
use crate::store::{Layer, PAGE};
use crate::sys;

const PAGES: u64 = 512;
const ROUNDS: u32 = 20;

/// Readers of pages that nobody has granted, each in a thread; whether they read right.
fn read_what_is_missing(file: &File, readers: u64) -> Vec<JoinHandle<bool>> {
    let read = |reader| read_behind(file, 100 + 10 * reader, 2);
    (0..readers).map(read).collect()
}

/// Reads pages in a thread; whether it reads right.
fn read_behind(file: &File, first: u64, count: u64) -> JoinHandle<bool> {
    let file = file.try_clone().unwrap();
    std::thread::spawn(move || read_right(&file, first, count))
}

#[test]
fn privileged_a_server_that_is_upgraded_breaks_no_read() {
    if !must_be_root("privileged_a_server_that_is_upgraded_breaks_no_read") {
        return;
    }
    let mut bed = Bed::new(PAGES, 120);
    let _daemon = Daemon::start(bed.path(), true);
    let readers = Readers::start(&bed, 6);
    for _ in 0..ROUNDS {
        readers.wait_for(20);
        let ended = bed.upgrade_server();
        assert!(ended.success(), "{ended}");
    }
    readers.wait_for(50);
    let (right, failed) = readers.stop();
    assert_eq!(failed, 0, "of {right}");
}

#[test]
fn privileged_reads_that_wait_go_to_the_successor() {
    if !must_be_root("privileged_reads_that_wait_go_to_the_successor") {
        return;
    }
    let mut bed = Bed::new(PAGES, 120);
    let daemon = Daemon::start(bed.path(), false);
    let file = bed.open(true);
    assert!(read_right(&file, 0, 4));
    sys::pause(daemon.pid(), true);
    let waiting = read_what_is_missing(&file, 8);
    for _ in 0..3 {
        assert!(bed.upgrade_server().success());
        assert!(
            read_right(&file, 0, 4),
            "what was granted is known to the successor"
        );
    }
    assert!(waiting.iter().all(|read| !read.is_finished()));
    sys::pause(daemon.pid(), false);
    for read in waiting {
        assert!(ends(read));
    }
}

#[test]
fn privileged_a_server_that_is_killed_costs_errors_and_no_mount() {
    if !must_be_root("privileged_a_server_that_is_killed_costs_errors_and_no_mount") {
        return;
    }
    let mut bed = Bed::new(PAGES, 120);
    let _daemon = Daemon::start(bed.path(), true);
    let readers = Readers::start(&bed, 6);
    let before = bed.open(true);
    for _ in 0..ROUNDS {
        readers.wait_for(20);
        bed.kill_server();
        bed.start_server();
    }
    readers.wait_for(50);
    readers.stop();
    for first in 0..PAGES / 8 {
        assert!(
            read_right(&before, first * 8, 8),
            "opened before the first kill"
        );
    }
}

#[test]
fn privileged_without_a_server_reads_fail_at_once() {
    if !must_be_root("privileged_without_a_server_reads_fail_at_once") {
        return;
    }
    let mut bed = Bed::new(PAGES, 120);
    let daemon = Daemon::start(bed.path(), false);
    let file = bed.open(true);
    assert!(read_right(&file, 0, 4));
    sys::pause(daemon.pid(), true);
    let waiting = read_what_is_missing(&file, 4);
    bed.kill_server();
    for read in waiting {
        assert!(!ends(read), "it was under way when the server died");
    }
    let read = read_behind(&file, 0, 4);
    assert!(!ends(read), "the guard serves nothing");
    assert!(
        bed.path().join("mnt/data").exists(),
        "names and attributes go on"
    );
    bed.start_server();
    sys::pause(daemon.pid(), false);
    // Until it has its daemon again reads wait.
    assert!(read_right(&file, 0, 4));
    assert!(read_right(&file, 100, 2));
}

#[test]
fn privileged_a_successor_that_takes_nothing_is_given_up() {
    /// More of them than a socket holds while nobody takes them.
    const MOUNTS: usize = 6;
    const SPANS: u64 = 4000;
    if !must_be_root("privileged_a_successor_that_takes_nothing_is_given_up") {
        return;
    }
    let mut bed = Bed::new(2 * SPANS, 120);
    let socket = bed.path().join("socket");
    let (server, _) = connect(&socket);
    let layer = bed.layer();
    let mut places = vec![bed.path().join("mnt")];
    places.extend((1..MOUNTS).map(|at| bed.path().join(format!("mnt{at}"))));
    let number = layer.fill(0..1);
    for at in &places {
        fs::create_dir_all(at).unwrap();
        let mount = mount(&server, &layer, &at.display().to_string(), at);
        for page in (0..2 * SPANS).step_by(2) {
            let span = Span::new(page * PAGE, (page + 1) * PAGE).unwrap();
            let grant = Message::Grant {
                want: 0,
                mount,
                number,
                span,
            };
            server.send(&grant, &[]).unwrap();
        }
    }
    let _mounted = Mounted(places);
    let file = bed.open(true);
    assert!(ends(read_behind(&file, 0, 1)));
    let successor = Connection::connect(&socket).unwrap();
    successor
        .send(&Message::Hello(Role::Successor), &[])
        .unwrap();
    // From then on everything is handed over, and no worker is there.
    let gone = server.receive_within(HANGS);
    assert!(matches!(gone, Err(Error::Closed)), "{gone:?}");
    assert!(ends(read_behind(&file, 0, 1)), "the server goes on");
    drop(successor);
    assert!(bed.upgrade_server().success());
    assert!(ends(read_behind(&file, 0, 1)));
}

#[test]
fn privileged_a_guard_that_dies_at_any_point_is_replaced() {
    if !must_be_root("privileged_a_guard_that_dies_at_any_point_is_replaced") {
        return;
    }
    let bed = Bed::new(1, 120);
    let (server, _) = connect(&bed.path().join("socket"));
    let (layer, at) = (bed.layer(), bed.path().join("mnt"));
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        // Nearly all the time the server is about to tell its guard something.
        let daemon = threads.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                come_and_go(&server, &layer, &at);
            }
        });
        let _stop = StopOnDrop(&stop);
        let mut guard = bed.guard().unwrap();
        for _ in 0..ROUNDS {
            sys::kill_by_id(guard);
            guard = bed.next_guard(guard);
        }
        assert!(!daemon.is_finished(), "it failed");
    });
}

/// Mounts a layer and takes it down: the guard is told of both.
fn come_and_go(server: &Connection, layer: &Layer, at: &Path) {
    let mount = mount(server, layer, "layer", at);
    let unmount = Message::Unmount { request: 2, mount };
    server.send(&unmount, &[]).unwrap();
    let done = server.receive_within(HANGS).unwrap().0;
    assert!(matches!(done, Message::Done { errno: 0, .. }), "{done:?}");
}

#[test]
fn privileged_a_guard_that_takes_nothing_is_replaced() {
    if !must_be_root("privileged_a_guard_that_takes_nothing_is_replaced") {
        return;
    }
    let bed = Bed::new(1, 120);
    let (server, _) = connect(&bed.path().join("socket"));
    let (layer, at) = (bed.layer(), bed.path().join("mnt"));
    let first = bed.guard().unwrap();
    sys::pause(first, true);
    let since = Instant::now();
    while bed.guard() == Some(first) && since.elapsed() < HANGS {
        come_and_go(&server, &layer, &at);
    }
    if bed.guard() == Some(first) {
        sys::kill_by_id(first);
        panic!("it is there still");
    }
    bed.next_guard(first);
}

/// Tells others to end, also where the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
