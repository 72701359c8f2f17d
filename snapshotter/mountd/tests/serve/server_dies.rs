//! The server is replaced or killed, under load.

use std::fs::File;
use std::thread::JoinHandle;

use crate::bed::{Bed, Readers, ends, must_be_root, read_right};
use crate::daemon::Daemon;
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
