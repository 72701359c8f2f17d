//! The daemon dies, and the server does not.

use std::fs::File;
use std::time::{Duration, Instant};

use lazarette_mountd::wire::{FileId, Message};

use crate::bed::{Bed, HANGS, Readers, must_be_root, read_right};
use crate::daemon::{Daemon, connect, mount};
use crate::store::{PAGE, Random};
use crate::sys;

/// How often the daemon is killed.
const KILLS: u32 = 200;
/// Pages of the layer: more than the kernel reads ahead, few enough that evictions meet reads.
const PAGES: u64 = 512;

#[test]
fn privileged_a_daemon_that_is_killed_200_times_breaks_no_read() {
    if !must_be_root("privileged_a_daemon_that_is_killed_200_times_breaks_no_read") {
        return;
    }
    let bed = Bed::new(PAGES, 120);
    let mut daemon = Daemon::start(bed.path(), true);
    let readers = Readers::start(&bed, 6);
    let mut random = Random(5);
    for kill in 0..KILLS {
        // At any instant, before and after it is ready.
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        daemon.kill();
        if kill % 4 == 0 {
            // Somebody else evicts meanwhile, here or elsewhere in the store.
            let layer = bed.layer();
            let first = random.below(PAGES - 8);
            layer.evict(first..first + 8, || {});
            layer.advance();
        }
        daemon = Daemon::start(bed.path(), true);
        if kill % 20 == 0 {
            readers.wait_for(20);
        }
    }
    readers.wait_for(200);
    let (right, failed) = readers.stop();
    assert_eq!(failed, 0, "of {right}");
}

#[test]
fn privileged_without_a_daemon_local_data_goes_on_and_the_rest_waits() {
    if !must_be_root("privileged_without_a_daemon_local_data_goes_on_and_the_rest_waits") {
        return;
    }
    let bed = Bed::new(PAGES, 120);
    let mut daemon = Daemon::start(bed.path(), false);
    let file = bed.open(true);
    assert!(read_right(&file, 0, 8));
    daemon.kill();
    let absent = std::thread::spawn({
        let file = file.try_clone().unwrap();
        move || read_right(&file, 100, 4)
    });
    let layer = bed.layer();
    let mut evicted_before_lock = 0;
    while layer.evict(300..301, || {}) {
        // The server has not noticed yet; then what it was granted is of no use any more.
        evicted_before_lock += 1;
    }
    // Somebody evicts elsewhere in the store.
    layer.advance();
    if evicted_before_lock == 0 {
        assert!(
            read_right(&file, 0, 8),
            "it is there and nobody may evict it"
        );
    }
    let meta = file.metadata().unwrap();
    assert_eq!(meta.len(), PAGES * PAGE, "metadata goes on");
    assert!(!absent.is_finished(), "nobody has it");
    let _daemon = Daemon::start(bed.path(), false);
    assert!(absent.join().unwrap());
    assert!(
        layer.evict(0..8, || {}),
        "with a daemon everybody may evict"
    );
    assert!(read_right(&file, 0, 8), "and it is fetched again");
}

#[test]
fn privileged_a_read_waits_no_longer_than_it_may() {
    if !must_be_root("privileged_a_read_waits_no_longer_than_it_may") {
        return;
    }
    let bed = Bed::new(PAGES, 1);
    let mut daemon = Daemon::start(bed.path(), false);
    let files = [bed.open(true), bed.open(false), bed.open_small()];
    daemon.kill();
    for file in &files {
        assert!(!read_right(file, 10, 1), "there is nobody to fetch it");
    }
    let daemon = Daemon::start(bed.path(), false);
    for file in &files {
        // Errors are not remembered.
        read_in_the_end(file, 10);
    }
    sys::pause(daemon.pid(), true);
    assert!(
        !read_right(&files[0], 200, 1),
        "a daemon that hangs is none"
    );
    sys::pause(daemon.pid(), false);
    read_in_the_end(&files[0], 200);
}

/// Reads a page that a daemon has to bring within a second, which it may miss on a machine that does
/// much else.
fn read_in_the_end(file: &File, page: u64) {
    let since = Instant::now();
    while !read_right(file, page, 1) {
        assert!(since.elapsed() < HANGS, "no daemon brings it");
    }
}

#[test]
fn privileged_a_daemon_with_another_file_is_not_the_layers() {
    if !must_be_root("privileged_a_daemon_with_another_file_is_not_the_layers") {
        return;
    }
    let bed = Bed::new(PAGES, 120);
    let layer = bed.layer();
    let (server, _) = connect(&bed.path().join("socket"));
    let mount = mount(&server, &layer, "layer", &bed.path().join("mnt"));
    drop(server);
    let (server, mounts) = connect(&bed.path().join("socket"));
    assert_eq!(mounts.len(), 1);
    let [data, number] = layer.lend();
    // Removed and fetched again, it would be another inode, as the number's file is.
    for (file, expected) in [(&number, 116), (&data, 0)] {
        let file = FileId::of(file).unwrap();
        let attach = Message::Attach {
            request: 7,
            mount,
            file,
        };
        server.send(&attach, &[]).unwrap();
        let done = Message::Done {
            request: 7,
            mount,
            errno: expected,
        };
        assert_eq!(server.receive().unwrap().0, done);
    }
}
