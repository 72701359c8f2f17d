//! The threads that answer the kernel.
//!
//! Invariant: a worker takes some requests at a time and is done with them, or has put them
//! into the state, before it takes another; so when all have ended, what is not answered waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::layer::{self, EINTR, Served, receive, send};
use super::{QUESTIONS, STOP, Shared};
use crate::fanotify::QUESTIONS_BYTES;
use crate::fuse::answer::{HEADER_BYTES, Reaction, react};
use crate::fuse::{self, READ_MAX, REQUEST_BYTES};
use crate::state::Read;
use crate::{Error, Result};

/// Stack of a worker, bytes: its buffers are on the heap.
const STACK_BYTES: usize = 128 << 10;
/// The kernel let go of a session.
const ENODEV: i32 = 19;

/// Running workers.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` of them.
    pub(super) fn start(shared: &Arc<Shared>, count: usize) -> Result<Self> {
        shared.stop.hush();
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
        self.shared.stop.ring();
        for thread in self.threads.drain(..) {
            // One that panicked has ended, too.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Shared) {
    let mut request = vec![0; REQUEST_BYTES.max(QUESTIONS_BYTES)];
    let mut answer = Vec::with_capacity(HEADER_BYTES + READ_MAX as usize);
    loop {
        let mount = match shared.epoll.next() {
            Ok(STOP) => return,
            Ok(QUESTIONS) => {
                shared.take_questions(&mut request);
                continue;
            }
            Ok(mount) => mount,
            Err(_) => continue,
        };
        let Some(served) = shared.layer(mount) else {
            continue;
        };
        let Some(fuse) = served.fuse() else {
            continue;
        };
        match receive(fuse, &mut request) {
            Ok(bytes) => handle(shared, &served, bytes, &mut answer),
            Err(error) if error.raw_os_error() == Some(ENODEV) => {
                // Unmounted by somebody else; the daemon will say so.
                let _ = shared.epoll.remove(fuse);
            }
            // Another worker was faster, or the request was withdrawn.
            Err(_) => {}
        }
    }
}

fn handle(shared: &Shared, served: &Served, bytes: &[u8], answer: &mut Vec<u8>) {
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
