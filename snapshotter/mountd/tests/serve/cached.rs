//! The file whose bytes the kernel keeps: what is asked for, and by whom it is waited for.

use std::fs::File;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use lazarette_mountd::client::Connection;
use lazarette_mountd::ranges::Span;
use lazarette_mountd::wire::Message;

use crate::bed::{Bed, must_be_root, read_right};
use crate::daemon::{connect, mount};
use crate::store::PAGE;
use crate::sys;

const PAGES: u64 = 256;
const EIO: u32 = 5;

/// A server, and this process as its daemon.
fn bed() -> (Bed, Connection, u64) {
    let bed = Bed::new(PAGES, 120);
    let (server, _) = connect(&bed.path().join("socket"));
    let number = mount(&server, &bed.layer(), "layer", &bed.path().join("mnt"));
    (bed, server, number)
}

/// What the server wants next: number and pages.
fn wanted(server: &Connection) -> (u64, std::ops::Range<u64>) {
    match server.receive().unwrap().0 {
        Message::Want { want, span, .. } => (want, span.start() / PAGE..span.end() / PAGE),
        other => panic!("wants nothing: {other:?}"),
    }
}

/// Fetches pages and says so.
fn grant(bed: &Bed, server: &Connection, mount: u64, want: u64, pages: std::ops::Range<u64>) {
    let span = Span::new(pages.start * PAGE, pages.end * PAGE).unwrap();
    let number = bed.layer().fill(pages);
    let grant = Message::Grant {
        want,
        mount,
        number,
        span,
    };
    server.send(&grant, &[]).unwrap();
}

fn read_later(file: &File, first: u64, count: u64) -> std::thread::JoinHandle<bool> {
    let file = file.try_clone().unwrap();
    std::thread::spawn(move || read_right(&file, first, count))
}

/// Says that one page cannot be had as often as the kernel asks: for the page, and once more.
fn fail(server: &Connection, mount: u64, file: &File, page: u64) {
    let read = read_later(file, page, 1);
    for _ in 0..2 {
        let (want, pages) = wanted(server);
        assert_eq!(pages, page..page + 1);
        let errno = EIO;
        let failed = Message::Failed { want, mount, errno };
        server.send(&failed, &[]).unwrap();
    }
    assert!(!read.join().unwrap(), "an error is an error");
}

#[test]
fn privileged_nobody_waits_for_more_than_is_read() {
    if !must_be_root("privileged_nobody_waits_for_more_than_is_read") {
        return;
    }
    let (bed, server, mount) = bed();
    let file = bed.open_small();
    let read = read_later(&file, 10, 1);
    let (want, pages) = wanted(&server);
    assert_eq!(pages, 10..11);
    grant(&bed, &server, mount, want, pages);
    assert!(read.join().unwrap());
    // What follows it is read in order: its end may be asked for with what comes next, by
    // another request, which nobody answers here.
    let read = read_later(&file, 11, 2);
    let (want, pages) = wanted(&server);
    assert_eq!(pages, 11..13);
    grant(&bed, &server, mount, want, pages);
    assert!(read.join().unwrap());
    server
        .send(&Message::Unmount { request: 1, mount }, &[])
        .unwrap();
}

#[test]
fn privileged_what_was_read_needs_nobody() {
    if !must_be_root("privileged_what_was_read_needs_nobody") {
        return;
    }
    let (mut bed, server, mount) = bed();
    let file = bed.open_small();
    grant(&bed, &server, mount, 0, 0..PAGES);
    for first in 0..PAGES / 4 {
        assert!(read_right(&file, 4 * first, 4));
    }
    bed.kill_server();
    assert!(read_right(&file, 0, PAGES), "the kernel has it");
    bed.start_server();
}

#[test]
fn privileged_a_signal_is_no_error() {
    if !must_be_root("privileged_a_signal_is_no_error") {
        return;
    }
    sys::hear_interrupts();
    let (bed, server, mount) = bed();
    let file = bed.open_small();
    // Twice: the kernel waits in another way for what failed once.
    for failed in [false, true] {
        let page = 50 + 10 * u64::from(failed);
        if failed {
            fail(&server, mount, &file, page);
        }
        let (tell, told) = channel();
        let again = file.try_clone().unwrap();
        let read = std::thread::spawn(move || {
            tell.send(sys::this_thread()).unwrap();
            read_right(&again, page, 1)
        });
        let thread = told.recv().unwrap();
        let (want, pages) = wanted(&server);
        assert_eq!(pages, page..page + 1);
        for _ in 0..20 {
            sys::interrupt(thread);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!read.is_finished(), "it waits on");
        grant(&bed, &server, mount, want, pages);
        assert!(read.join().unwrap(), "and gets what it waits for");
    }
}

#[test]
fn privileged_who_is_killed_waits_no_longer() {
    if !must_be_root("privileged_who_is_killed_waits_no_longer") {
        return;
    }
    let (bed, server, mount) = bed();
    let file = bed.open_small();
    for failed in [false, true] {
        let page = 80 + 10 * u64::from(failed);
        if failed {
            fail(&server, mount, &file, page);
        }
        let mut reader = Command::new("dd");
        let reader = reader.args(["bs=4096", "count=1", &format!("skip={page}")]);
        let reader = reader.stdin(bed.open_small()).stdout(Stdio::null());
        let mut reader = reader.stderr(Stdio::null()).spawn().unwrap();
        let (_, pages) = wanted(&server);
        assert_eq!(pages, page..page + 1);
        reader.kill().unwrap();
        assert!(!reader.wait().unwrap().success());
    }
}
