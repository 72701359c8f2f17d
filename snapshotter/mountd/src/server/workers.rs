//! The threads that answer the kernel.
//!
//! Invariant: a worker takes some requests at a time and is done with them, or has put them
//! into the state, before it takes another; so when all have ended, what is not answered waits.
//! Each time a session has something one worker is told, and goes on until nothing is left: two
//! that wake up for one request cost more than the request. Nobody is told while a worker looks.
//! There is one worker at least, or an error.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::layer::{self, ANSWER_BYTES_MAX, EINTR, Served, receive, send};
use super::pace::LOOK;
use super::{QUESTIONS, STOP, Shared};
use crate::fanotify::QUESTIONS_BYTES;
use crate::fuse::answer::{Reaction, react};
use crate::fuse::{self, REQUEST_BYTES, SMALL};
use crate::state::Read;
use crate::{Error, Result, log};

/// Stack of a worker, bytes: its buffers are on the heap.
const STACK_BYTES: usize = 128 << 10;
/// The kernel let go of a session.
const ENODEV: i32 = 19;
const ENOENT: i32 = 2;
const EAGAIN: i32 = 11;

/// Running workers.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` of them; fewer where no more can be had.
    ///
    /// # Errors
    /// Where there would be none.
    pub(super) fn start(shared: &Arc<Shared>, count: usize) -> Result<Self> {
        shared.stopping.store(false, Ordering::Relaxed);
        shared.stop.hush();
        // Those before may have left something, of which nobody would be told.
        for served in shared.layers.read().values() {
            // One that was unmounted by somebody else has nothing.
            let _ = served
                .fuse()
                .map(|fuse| shared.epoll.tell_again(fuse, served.mount));
        }
        let threads = start_some(count.max(1), || {
            let shared = Arc::clone(shared);
            let builder = thread::Builder::new().stack_size(STACK_BYTES);
            builder.spawn(move || work(&shared))
        });
        Ok(Self {
            shared: Arc::clone(shared),
            threads: threads.map_err(|e| Error::io("start", "a worker", e))?,
        })
    }

    /// Has them end and waits for that: the time of a local read.
    pub(super) fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared.stop.ring();
        for thread in self.threads.drain(..) {
            // One that panicked has ended, too.
            let _ = thread.join();
        }
    }
}

/// What `start` gives when it is asked `count` times, up to the first failure. Fails with that where
/// there is nothing before it.
fn start_some<T>(count: usize, mut start: impl FnMut() -> io::Result<T>) -> io::Result<Vec<T>> {
    let mut started = Vec::new();
    while started.len() < count {
        match start() {
            Ok(one) => started.push(one),
            Err(error) if started.is_empty() => return Err(error),
            Err(error) => {
                let there = started.len();
                log::say(&format!(
                    "going on with {there} of {count} workers: {error}"
                ));
                break;
            }
        }
    }
    Ok(started)
}

fn work(shared: &Shared) {
    let mut request = vec![0; REQUEST_BYTES.max(QUESTIONS_BYTES)];
    let mut answer = vec![0; ANSWER_BYTES_MAX];
    loop {
        match shared.epoll.next() {
            Ok(STOP) => return,
            Ok(QUESTIONS) => shared.take_questions(&mut request),
            Ok(mount) => {
                if let Some(served) = shared.layer(mount) {
                    drain(shared, &served, &mut request, &mut answer);
                }
            }
            Err(_) => {}
        }
    }
}

/// Takes all requests of a session that are there now, unless the workers are to end, and looks
/// for more where they come quickly. Of those that come later one worker is told, once; of what
/// is left here nobody would be.
fn drain(shared: &Shared, served: &Served, request: &mut [u8], answer: &mut [u8]) {
    let Some(fuse) = served.fuse() else {
        return;
    };
    let is_quick = served.pace.is_quick();
    while take(shared, served, request, answer) == Taken::One {}
    if is_quick
        && let Some(_turn) = served.pace.turn()
        && shared.epoll.tell_nobody(fuse, served.mount).is_ok()
    {
        look(shared, served, request, answer);
        // Of what has come since nobody was told. Fails where nobody is asked any more.
        let _ = shared.epoll.tell_again(fuse, served.mount);
    }
}

/// Takes requests as they come until none has for a moment, or two at once: then others may help.
fn look(shared: &Shared, served: &Served, request: &mut [u8], answer: &mut [u8]) {
    let mut until = Instant::now() + LOOK;
    let mut is_one_of_two = false;
    loop {
        match take(shared, served, request, answer) {
            Taken::One if is_one_of_two => return,
            Taken::One => {
                is_one_of_two = true;
                until = Instant::now() + LOOK;
            }
            Taken::None if Instant::now() < until => {
                is_one_of_two = false;
                thread::yield_now();
            }
            Taken::None | Taken::End => return,
        }
    }
}

/// What came of taking a request.
#[derive(PartialEq, Eq)]
enum Taken {
    One,
    /// There is none now.
    None,
    /// None is to be taken any more.
    End,
}

fn take(shared: &Shared, served: &Served, request: &mut [u8], answer: &mut [u8]) -> Taken {
    let Some(fuse) = served.fuse() else {
        return Taken::End;
    };
    if shared.stopping.load(Ordering::Relaxed) {
        return Taken::End;
    }
    match receive(fuse, request) {
        Ok(bytes) => {
            handle(shared, served, bytes, answer);
            served.pace.mark();
        }
        Err(error) => match error.raw_os_error() {
            // The request was withdrawn while it was read; there may be others.
            Some(ENOENT | EINTR) => {}
            Some(EAGAIN) => return Taken::None,
            Some(ENODEV) => {
                // Unmounted by somebody else; the daemon will say so.
                let _ = shared.epoll.remove(fuse);
                return Taken::End;
            }
            _ => return Taken::End,
        },
    }
    Taken::One
}

fn handle(shared: &Shared, served: &Served, bytes: &[u8], answer: &mut [u8]) {
    // Bytes that are no request have no number that an answer could name.
    let (Ok(request), Some(session)) = (fuse::parse(bytes), served.fuse()) else {
        return;
    };
    if let fuse::Op::Init(init) = request.op {
        let resends = fuse::answer::can_resend(&init);
        shared.resends.store(resends, Ordering::Relaxed);
    }
    match react(&request, served.size) {
        Reaction::Send(bytes) => send(session, &bytes),
        Reaction::Nothing => {}
        Reaction::Interrupt(unique) => interrupt(shared, served, unique),
        Reaction::Read { offset, len } => {
            let Some((span, zeros)) = layer::wanted(served.data_len, offset, len) else {
                let zeros = vec![0; len as usize];
                return send(session, &fuse::answer::ok(request.unique, &zeros));
            };
            let read = Read {
                mount: served.mount,
                unique: request.unique,
                span,
                zeros,
                since: Instant::now(),
                thread: (request.node == SMALL).then_some(request.thread),
            };
            shared.serve(served, read, answer);
        }
    }
}

/// A reader of `unique` got a signal. What is cached may be read by a request that the kernel
/// would fail for any signal, and the file with it: that one is answered only where its reader ends.
pub(super) fn interrupt(shared: &Shared, served: &Served, unique: u64) {
    let Some(read) = shared.state.lock().interrupted(served.mount, unique) else {
        return;
    };
    if read.thread.is_some_and(|thread| !is_ending(thread)) {
        return;
    }
    let interrupted = shared.state.lock().interrupt(served.mount, unique);
    if interrupted.is_some() {
        served.refuse(unique, EINTR);
    }
}

/// Whether a thread was told to end by a signal that nobody can ignore; not if that is unknown.
fn is_ending(thread: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{thread}/status"));
    status.is_ok_and(|status| has_kill(&status))
}

/// Whether `SIGKILL` is among the pending signals of a thread, whose `/proc` file this is.
fn has_kill(status: &str) -> bool {
    const KILL: u64 = 1 << 8;
    let pending = status.lines().filter_map(|line| {
        line.strip_prefix("SigPnd:")
            .or(line.strip_prefix("ShdPnd:"))
    });
    let mut pending = pending.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    pending.any(|mask| mask & KILL != 0)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::{has_kill, start_some};

    #[test]
    fn workers_that_have_started_are_kept() {
        for (may_start, kept) in [
            (0, None),
            (1, Some(1)),
            (2, Some(2)),
            (4, Some(4)),
            (9, Some(4)),
        ] {
            let mut left = may_start;
            let started = start_some(4, || match left {
                0 => Err(io::Error::from(io::ErrorKind::WouldBlock)),
                _ => {
                    left -= 1;
                    Ok(())
                }
            });
            assert_eq!(started.ok().map(|all| all.len()), kept, "{may_start}");
        }
    }

    #[test]
    fn only_what_ends_a_thread_counts() {
        let status = |own: &str, all: &str| {
            format!("Name:\tsome\nSigPnd:\t{own}\nShdPnd:\t{all}\nSigBlk:\tffffffffffffffff\n")
        };
        let (none, kill, urgent) = ("0000000000000000", "0000000000000100", "0000000000400000");
        for (own, all, ends) in [
            (none, none, false),
            (urgent, urgent, false),
            (kill, none, true),
            (none, kill, true),
            ("0000000000400100", none, true),
            ("x", "", false),
        ] {
            assert_eq!(has_kill(&status(own, all)), ends, "{own} {all}");
        }
        assert!(!has_kill(""));
    }
}
