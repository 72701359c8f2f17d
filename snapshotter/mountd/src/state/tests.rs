//! Single decisions, one after another.

use super::*;
use crate::wire::Through;

const WAIT: Duration = Duration::from_secs(60);

fn span(start: u64, end: u64) -> Span {
    Span::new(start, end).unwrap()
}

/// A mount that is asked for.
pub(super) fn listed(size: u64, name: &str, path: &str) -> Listed {
    Listed {
        mount: 0,
        through: Through::Fuse,
        size,
        name: name.as_bytes().to_vec(),
        path: path.as_bytes().to_vec(),
    }
}

fn with_mount() -> (State, u64) {
    let mut state = State::new(WAIT);
    let mount = state.mount(listed(1 << 20, "a", "/a"), None).unwrap();
    (state, mount)
}

fn read(mount: u64, unique: u64, span: Span) -> Read {
    Read {
        thread: None,
        mount,
        unique,
        span,
        zeros: 0,
        since: Instant::now(),
    }
}

#[test]
fn a_read_waits_is_asked_for_and_granted() {
    let (mut state, mount) = with_mount();
    let one = read(mount, 1, span(0, 4096));
    assert_eq!(state.read(one), Decision::Waits);
    let want = state.next_want().unwrap();
    assert_eq!((want.mount, want.span), (mount, one.span));
    assert_eq!(state.next_want(), None, "asked for once");
    let granted = state.grant(mount, want.want, 7, span(0, 8192));
    assert_eq!((granted.again, granted.refused), (vec![one], None));
    let Decision::Serve(ticket) = state.read(one) else {
        panic!("it was granted");
    };
    assert!(state.holds(mount, ticket, 7));
    assert!(!state.holds(mount, ticket, 8), "somebody evicted meanwhile");
    assert_eq!(state.read(one), Decision::Waits, "nothing is left of it");
}

#[test]
fn a_grant_at_another_number_is_all_that_is_left() {
    let (mut state, mount) = with_mount();
    state.grant(mount, 0, 7, span(0, 4096));
    state.grant(mount, 0, 8, span(8192, 12_288));
    assert_eq!(state.read(read(mount, 1, span(0, 4096))), Decision::Waits);
    let there = state.read(read(mount, 2, span(8192, 12_288)));
    assert!(matches!(there, Decision::Serve(_)));
}

#[test]
fn a_grant_that_misses_its_read_refuses_it() {
    let (mut state, mount) = with_mount();
    let one = read(mount, 1, span(0, 8192));
    state.read(one);
    let want = state.next_want().unwrap().want;
    let granted = state.grant(mount, want, 7, span(0, 4096));
    assert_eq!((granted.again, granted.refused), (vec![], Some(one)));
    assert_eq!(state.next_expiry(), None, "nobody waits");
}

#[test]
fn without_a_daemon_what_is_there_stays_and_the_rest_is_asked_for_later() {
    let (mut state, mount) = with_mount();
    let (here, absent) = (span(0, 4096), span(8192, 12_288));
    state.grant(mount, 0, 7, here);
    state.read(read(mount, 1, absent));
    let asked = state.next_want().unwrap();
    state.disconnected();
    assert_eq!(state.to_lock(), [mount]);
    assert!(state.locked(mount, 7));
    assert_eq!(state.to_lock(), [0_u64; 0]);
    let Decision::Serve(ticket) = state.read(read(mount, 2, here)) else {
        panic!("it was granted");
    };
    assert!(
        state.holds(mount, ticket, 99),
        "whatever others evict elsewhere"
    );
    assert_eq!(
        state.grant(mount, asked.want, 7, absent),
        Granted::default(),
        "too late"
    );
    assert_eq!(state.fail(mount, asked.want), None, "too late");
    assert_eq!(state.next_want(), None, "there is nobody to ask");

    assert!(state.attach(mount, 99));
    assert!(
        !state.holds(mount, ticket, 99),
        "the lock is not ours any more"
    );
    assert_eq!(state.next_want(), Some(asked), "asked for again");
    let Decision::Serve(ticket) = state.read(read(mount, 3, here)) else {
        panic!("it stayed");
    };
    assert!(state.holds(mount, ticket, 99));
}

#[test]
fn a_lock_that_came_too_late_keeps_nothing() {
    let (mut state, mount) = with_mount();
    state.grant(mount, 0, 7, span(0, 4096));
    assert!(!state.locked(mount, 7), "a daemon is there");
    state.disconnected();
    assert!(state.locked(mount, 8));
    assert_eq!(state.read(read(mount, 1, span(0, 4096))), Decision::Waits);
}

#[test]
fn reads_end_by_time_interruption_and_unmount() {
    let (mut state, mount) = with_mount();
    let reads = [1, 2, 3].map(|unique| read(mount, unique, span(0, 1)));
    for read in reads {
        assert_eq!(state.read(read), Decision::Waits);
    }
    assert_eq!(state.interrupt(mount, 2), Some(reads[1]));
    assert_eq!(state.interrupt(mount, 2), None);
    assert_eq!(state.next_expiry(), reads[0].since.checked_add(WAIT));
    assert_eq!(state.expire(reads[0].since), []);
    let over = reads[0].since + WAIT;
    assert_eq!(
        state.expire(over),
        if reads[2].since == reads[0].since {
            vec![reads[0], reads[2]]
        } else {
            vec![reads[0]]
        }
    );
    state.expire(reads[2].since + WAIT);
    let four = read(mount, 4, span(0, 1));
    state.read(four);
    assert_eq!(state.unmount(mount), [four]);
    assert_eq!(state.unmount(mount), []);
    assert_eq!(state.read(four), Decision::Refuse(5));
}

#[test]
fn an_interruption_that_overtakes_its_read_is_told_of_it() {
    let (mut state, mount) = with_mount();
    let reads = [1, 2].map(|unique| read(mount, unique, span(0, 1)));
    assert_eq!(state.interrupted(mount, 1), None);
    assert_eq!(state.read(reads[1]), Decision::Waits);
    assert_eq!(state.read(reads[0]), Decision::WaitsInterrupted);
    assert_eq!(state.interrupted(mount, 1), Some(reads[0]));
    assert_eq!(state.interrupted(mount, 2), Some(reads[1]));
    assert_eq!(state.interrupted(mount + 1, 1), None);

    let late = |unique| read(mount, unique, span(0, 1));
    for unique in 100..=100 + EARLY_MAX as u64 {
        assert_eq!(state.interrupted(mount, unique), None);
    }
    assert_eq!(state.read(late(100)), Decision::Waits, "as many are kept");
    assert_eq!(state.read(late(101)), Decision::WaitsInterrupted);
}

#[test]
fn mounts_and_waiting_reads_are_bounded() {
    let (mut state, mount) = with_mount();
    for unique in 0..WAITING_MAX as u64 {
        assert_eq!(state.read(read(mount, unique, span(0, 1))), Decision::Waits);
    }
    assert_eq!(state.read(read(mount, 0, span(0, 1))), Decision::Refuse(5));
    assert_eq!(state.unmount(mount).len(), WAITING_MAX);
    let mut mount = |name: &str, path: &str| state.mount(listed(1, name, path), None);
    for number in 0..MOUNTS_MAX {
        mount(&number.to_string(), &format!("/{number}")).unwrap();
    }
    assert_eq!(mount("x", "/x"), Err(24));
    state.unmount(state.list()[0].mount);
    let mut mount = |name: &str, path: &str| state.mount(listed(1, name, path), None);
    assert_eq!(mount("x", "/5"), Err(17), "one layer per mount");
    // One that was removed in use, and came again.
    mount("5", "/x").unwrap();
}

#[test]
fn a_successor_knows_what_its_predecessor_knew() {
    let (mut state, mount) = with_mount();
    state.grant(mount, 0, 7, span(0, 4096));
    let second = state.mount(listed(5, "b", "/b"), None).unwrap();
    state.disconnected();
    state.locked(second, 0);
    let (handed, next) = state.hand_over();
    let mut successor = State::new(WAIT);
    handed
        .into_iter()
        .for_each(|handed| successor.adopt(handed));
    successor.skip_to(next);
    assert_eq!(successor.list(), state.list());
    assert_eq!(successor.to_lock(), [mount], "the other lock came along");
    let decision = successor.read(read(mount, 1, span(0, 4096)));
    let Decision::Serve(ticket) = decision else {
        panic!("it was granted to the first");
    };
    assert!(successor.holds(mount, ticket, 7) && !successor.holds(mount, ticket, 8));
    let third = successor.mount(listed(1, "c", "/c"), None).unwrap();
    assert!(third > second);
}

#[test]
fn a_kept_mount_stands_on_its_lock_whatever_comes_and_goes() {
    let mut state = State::new(WAIT);
    let asked = Listed {
        through: Through::Fanotify,
        ..listed(8192, "a", "/a")
    };
    let mount = state.mount(asked, Some(5)).unwrap();
    let all = span(0, 8192);
    state.grant(mount, 0, 4, all);
    let before = state.read(read(mount, 1, span(0, 1)));
    assert_eq!(before, Decision::Waits, "verified before the lock");
    state.grant(mount, 0, 5, span(0, 4096));
    state.grant(mount, 0, 9, span(4096, 8191));
    assert!(!state.is_complete(mount), "a byte is missing");
    state.disconnected();
    assert_eq!(state.to_lock(), [0_u64; 0], "it is locked already");
    assert!(state.attach(mount, 11));
    state.grant(mount, 0, 10, span(8191, 8192));
    assert!(state.is_complete(mount), "other numbers take nothing away");
    let Decision::Serve(ticket) = state.read(read(mount, 2, all)) else {
        panic!("all of it was granted");
    };
    assert!(state.holds(mount, ticket, 12));

    let (handed, _) = state.hand_over();
    assert_eq!(handed[0].basis, Basis::Kept(5));
    let mut successor = State::new(WAIT);
    handed
        .into_iter()
        .for_each(|handed| successor.adopt(handed));
    assert!(successor.is_complete(mount));
}

#[test]
fn what_is_not_kept_is_never_complete() {
    let (mut state, mount) = with_mount();
    state.grant(mount, 0, 7, span(0, 1 << 20));
    assert!(!state.is_complete(mount));
}

#[test]
fn reads_that_wait_are_listed_and_wait_on() {
    let (mut state, mount) = with_mount();
    let one = read(mount, 1, span(0, 4096));
    state.read(one);
    assert_eq!(state.waiting(mount), [one]);
    assert_eq!(state.waiting(mount), [one]);
    assert_eq!(state.waiting(mount + 1), []);
}
