//! Mounts through fanotify: which file is whose, and which mounts bear a mark.
//!
//! Invariant: a question is about a mount that is known, or is denied. A mount is forgotten
//! only when no EROFS is left that could ask: then the kernel has taken its mark away.
//!
//! Locks: each field has its own, held for a moment, never one within another.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;

use super::Shared;
use super::layer::Served;
use super::twice::Twice;
use crate::fanotify::{self, Group, Question};
use crate::log;
use crate::ranges::Span;
use crate::state::Read;
use crate::wire::FileId;

const EBUSY: i32 = 16;

/// What all mounts through fanotify share.
#[derive(Default)]
pub(super) struct Marked {
    /// Made with the first of them.
    group: OnceLock<Arc<Group>>,
    /// Mounts by their data files: one that was to end and is used still may have another beside it.
    files: Mutex<HashMap<FileId, Vec<u64>>>,
    /// Mounts by the kernel's numbers of the mounts that bear their marks. Those numbers are
    /// used again: whoever had one before has no mark any more.
    marks: Mutex<HashMap<u64, u64>>,
    twice: Twice,
}

impl Marked {
    /// The group, if there is one yet.
    pub(super) fn group(&self) -> Option<&Arc<Group>> {
        self.group.get()
    }

    /// Has the group of another process. Only before there is one.
    pub(super) fn adopt(&self, group: Arc<Group>) {
        // It fails only where there is one.
        let _ = self.group.set(group);
    }

    /// Questions about this file are about that mount.
    pub(super) fn insert(&self, file: FileId, mount: u64, mark: u64) {
        self.files.lock().entry(file).or_default().push(mount);
        if mark != 0 {
            self.bears(mount, mark);
        }
    }

    /// A mount bears this mark, and none that it had.
    fn bears(&self, mount: u64, mark: u64) {
        let mut marks = self.marks.lock();
        marks.retain(|_, owner| *owner != mount);
        marks.insert(mark, mount);
    }

    /// The mount that a question about this file is for: they are not told apart, and have the same
    /// bytes. The last one is what its daemon goes on with.
    fn mount_of(&self, file: FileId) -> Option<u64> {
        self.files.lock().get(&file)?.last().copied()
    }

    /// Marks the kernel's mount behind `mounted` for one of ours; its number.
    pub(super) fn mark(&self, mount: u64, mounted: BorrowedFd<'_>) -> io::Result<u64> {
        let group = self.group().ok_or(io::ErrorKind::NotFound)?;
        if self.is_used(mount)? {
            return Err(io::Error::from_raw_os_error(EBUSY));
        }
        let number = fanotify::mount_of(mounted)?;
        group.mark(mounted)?;
        self.bears(mount, number);
        Ok(number)
    }

    /// The number of the kernel's mount that bears the mark of this one, 0 for none.
    pub(super) fn mark_of(&self, mount: u64) -> u64 {
        let marks = self.marks.lock();
        let own = marks.iter().find(|(_, owner)| **owner == mount);
        own.map_or(0, |(number, _)| *number)
    }

    /// Whether an EROFS is left that reads the data of this mount.
    pub(super) fn is_used(&self, mount: u64) -> io::Result<bool> {
        let mark = self.mark_of(mount);
        match self.group() {
            Some(group) if mark != 0 => Ok(group.marked()?.contains(&mark)),
            _ => Ok(false),
        }
    }

    /// Forgets a mount that is not used.
    pub(super) fn remove(&self, mount: u64) {
        self.files.lock().retain(|_, owners| {
            owners.retain(|owner| *owner != mount);
            !owners.is_empty()
        });
        self.marks.lock().retain(|_, owner| *owner != mount);
        self.twice.remove(mount);
    }
}

impl Shared {
    /// Takes the questions that wait now, and answers them or lets them wait.
    pub(super) fn take_questions(&self, buf: &mut [u8]) {
        let Some(group) = self.marked.group() else {
            return;
        };
        let questions = match group.next(buf) {
            Ok(questions) => questions,
            // Another worker was faster; or the kernel has denied one, having no descriptor
            // for it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => return log::say(&format!("a question of the kernel is lost: {error}")),
        };
        for question in questions {
            self.take_question(group, question);
        }
    }

    fn take_question(&self, group: &Group, question: Question) {
        let mount = self.marked.mount_of(question.file);
        let Some(served) = mount.and_then(|mount| self.layer(mount)) else {
            return group.deny(question.unique);
        };
        let all = Span::new(0, served.size);
        let read = Read {
            thread: None,
            mount: served.mount,
            unique: question.unique,
            span: match question.span.or(all) {
                Some(span) => span,
                // Of an empty file there is nothing to wait for.
                None => return group.allow(question.unique),
            },
            zeros: 0,
            since: Instant::now(),
        };
        self.serve(&served, read, &mut []);
    }

    /// Lets a reader read what is granted; for ever, once everything is.
    pub(super) fn allow(&self, served: &Served, group: &Group, read: Read) {
        if !self.state.lock().is_complete(served.mount) {
            self.marked.twice.note(served.mount, read.span);
            return group.allow(read.unique);
        }
        match group.allow_for_ever(read.unique) {
            Ok(()) => self.marked.twice.forget(served.mount, &served.data),
            Err(error) => log::say(&format!(
                "{} is complete, and asked about all the same: {error}",
                served.path.display()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_bears_its_last_mark() {
        let file = FileId { dev: 1, ino: 2 };
        // Each map has an order of its own.
        for _ in 0..50 {
            let marked = Marked::default();
            marked.insert(file, 1, 44);
            marked.insert(file, 1, 50);
            assert_eq!(marked.mark_of(1), 50);
        }
    }
}
