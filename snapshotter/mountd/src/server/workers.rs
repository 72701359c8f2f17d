//! The threads that answer the kernel.
//!
//! Invariant: a worker takes some requests at a time and is done with them, or has put them
//! into the state, before it takes another; so when all have ended, what is not answered waits.
//! Each time a session has something one worker is told, and goes on until nothing is left: two
//! that wake up for one request cost more than the request.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::layer::{self, ANSWER_BYTES_MAX, EINTR, Served, receive, send};
use super::{QUESTIONS, STOP, Shared};
use crate::fanotify::QUESTIONS_BYTES;
use crate::fuse::answer::{Reaction, react};
use crate::fuse::{self, REQUEST_BYTES};
use crate::state::Read;
use crate::{Error, Result};

/// Stack of a worker, bytes: its buffers are on the heap.
const STACK_BYTES: usize = 128 << 10;
/// The kernel let go of a session.
const ENODEV: i32 = 19;
const ENOENT: i32 = 2;

/// Running workers.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` of them.
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
        let mut workers = Self {
            shared: Arc::clone(shared),
            threads: Vec::new(),
        };
        for _ in 0..count.max(1) {
            let shared = Arc::clone(shared);
            let builder = thread::Builder::new().stack_size(STACK_BYTES);
            let thread = builder.spawn(move || work(&shared));
            let thread = thread.map_err(|e| Error::io("start", "a worker", e))?;
            workers.threads.push(thread);
        }
        Ok(workers)
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

/// Takes all requests of a session that are there now, unless the workers are to end. Of those
/// that come later one worker is told, once; of what is left here nobody would be.
fn drain(shared: &Shared, served: &Served, request: &mut [u8], answer: &mut [u8]) {
    let Some(fuse) = served.fuse() else {
        return;
    };
    while !shared.stopping.load(Ordering::Relaxed) {
        match receive(fuse, request) {
            Ok(bytes) => handle(shared, served, bytes, answer),
            Err(error) => match error.raw_os_error() {
                // The request was withdrawn while it was read; there may be others.
                Some(ENOENT | EINTR) => {}
                Some(ENODEV) => {
                    // Unmounted by somebody else; the daemon will say so.
                    let _ = shared.epoll.remove(fuse);
                    return;
                }
                _ => return,
            },
        }
    }
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
        Reaction::Interrupt(unique) => {
            if shared
                .state
                .lock()
                .interrupt(served.mount, unique)
                .is_some()
            {
                served.refuse(unique, EINTR);
            }
        }
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
            };
            shared.serve(served, read, answer);
        }
    }
}
