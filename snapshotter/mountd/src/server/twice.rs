//! What memory has twice: an EROFS that reads the data file itself keeps what it read, and so
//! does the data file.
//!
//! Once a layer is complete nobody is asked about it any more. What was asked about until
//! then is dropped from the data file's cache: the EROFS has it, and whoever reads it next
//! reads that. What nobody has asked about stays, as its first reader finds it there.
//!
//! The kernel drops nothing that is not on the disk, and what came last is not. It is written
//! first, which takes as long as the disk does: in a thread of its own, so nobody who answers the
//! kernel waits. Memory is all that is at stake: what fails is left to the kernel.
//!
//! Invariant: one such thread at most, and it ends when nothing is left to be done. What
//! waits for it is bounded by the mounts: a mount has something to drop until it is complete.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;

use crate::ranges::{Ranges, Span};
use crate::{log, sys};

/// Stack of the thread, bytes.
const STACK_BYTES: usize = 64 << 10;

/// What all mounts through fanotify have twice. Locks: each field has its own, held for a
/// moment, never one within another.
#[derive(Default)]
pub(super) struct Twice {
    asked: Mutex<HashMap<u64, Ranges>>,
    /// What is to be dropped, while there is a thread that does it.
    queue: Arc<Mutex<Option<Vec<Drops>>>>,
}

/// Parts of a data file.
struct Drops {
    data: File,
    spans: Ranges,
}

impl Twice {
    /// An EROFS is about to read this of a mount's data file.
    pub(super) fn note(&self, mount: u64, span: Span) {
        self.asked.lock().entry(mount).or_default().insert(span);
    }

    /// Forgets what was noted of a mount.
    pub(super) fn remove(&self, mount: u64) -> Ranges {
        self.asked.lock().remove(&mount).unwrap_or_default()
    }

    /// Has what was noted of a mount dropped from the cache of its data file, soon.
    pub(super) fn forget(&self, mount: u64, data: &File) {
        let spans = self.remove(mount);
        if spans.spans().is_empty() {
            return;
        }
        // Not a duplicate, which would keep what is locked with the file.
        let Ok(data) = File::open(format!("/proc/self/fd/{}", data.as_raw_fd())) else {
            return;
        };
        let drops = Drops { data, spans };
        let mut queue = self.queue.lock();
        match &mut *queue {
            Some(queue) => return queue.push(drops),
            None => *queue = Some(vec![drops]),
        }
        drop(queue);
        self.start();
    }

    /// Starts the thread, which somebody has just given something to do.
    fn start(&self) {
        let queue = Arc::clone(&self.queue);
        let work = move || {
            while let Some(drops) = next(&queue) {
                drops.now();
            }
        };
        let builder = thread::Builder::new().stack_size(STACK_BYTES);
        if let Err(error) = builder.spawn(work) {
            *self.queue.lock() = None;
            log::say(&format!("what memory has twice stays there: {error}"));
        }
    }
}

/// What the thread does next; `None` where it has to end, as nobody comes to it any more.
fn next(queue: &Mutex<Option<Vec<Drops>>>) -> Option<Drops> {
    let mut queue = queue.lock();
    let next = queue.as_mut().and_then(Vec::pop);
    if next.is_none() {
        *queue = None;
    }
    next
}

impl Drops {
    fn now(&self) {
        for span in self.spans.spans() {
            if sys::write_out(&self.data, *span).is_ok() {
                let _ = sys::forget(&self.data, *span);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_about_is_dropped_and_once() {
        let span = |start, end| Span::new(start, end).unwrap();
        let twice = Twice::default();
        twice.note(1, span(0, 8192));
        twice.note(2, span(4096, 8192));
        twice.note(1, span(8192, 12_288));
        assert_eq!(twice.remove(1).spans(), [span(0, 12_288)]);
        assert_eq!(twice.remove(1).spans(), []);
        assert_eq!(twice.remove(2).spans(), [span(4096, 8192)]);
    }

    #[test]
    fn whoever_comes_when_the_thread_has_ended_gets_another() {
        let twice = Twice::default();
        let data = tempfile::tempfile().unwrap();
        for mount in 0..50 {
            twice.note(mount, Span::new(0, 4096).unwrap());
            twice.forget(mount, &data);
            while mount % 2 == 0 && twice.queue.lock().is_some() {
                thread::yield_now();
            }
        }
        while twice.queue.lock().is_some() {
            thread::yield_now();
        }
    }
}
