//! The kernel's questions before it reads a data file, and our answers.
//!
//! An EROFS whose data file was opened through a *mount of its own*, which bears a mark of a
//! [`Group`], asks the group about every read. Nobody else has that mount, so nobody else's
//! reads and writes are asked about, whoever opened the file when: no daemon, and no server,
//! ever waits for itself. The mount lives as long as the EROFS has the file open, and the
//! mark as long as the mount; so the group knows which EROFS are left, also of those that
//! nobody sees any more.
//!
//! Invariant: a read is allowed only by [`Group::allow`]; what cannot be understood, or is not
//! known, is denied. The kernel tells questions apart by a number that may be another
//! question's as soon as a descriptor of that number is closed. So the descriptor stays open
//! until the answer is given, and a server that takes questions over occupies their numbers,
//! before it reads others; where it cannot, the answer is no.
//!
//! When the last descriptor of a group is closed the kernel allows everything. The server and
//! its guard both have one.
//!
//! Locks: `open`, held for a moment.

mod event;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use parking_lot::Mutex;

use self::event::{Event, events};
use crate::ranges::Span;
use crate::sys::fanotify::{ALLOW, DENY};
use crate::wire::FileId;
use crate::{log, sys};

/// Bytes that a thread reads questions into: more than any single one has.
pub const QUESTIONS_BYTES: usize = 4096;
/// No descriptor of a server has a higher number, so neither has a question. More than
/// [`WAITING_MAX`](crate::state::WAITING_MAX) and everything else a server opens.
pub const NUMBERS_MAX: u32 = 1 << 15;

/// A question that waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Names it in the answer; never used twice in this process.
    pub unique: u64,
    /// The data file.
    pub file: FileId,
    /// Its bytes; `None` where the kernel does not say, and may mean all.
    pub span: Option<Span>,
}

/// Where questions come from.
pub struct Group {
    file: File,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    next: u64,
    /// Their descriptors, or what occupies the number of one.
    questions: HashMap<u64, OwnedFd>,
}

impl Group {
    /// A group without a mark.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without privilege, `EINVAL` where it knows no such groups.
    pub fn new() -> io::Result<Self> {
        Ok(Self::of(sys::fanotify::new_group()?))
    }

    /// The group that another process made.
    pub(crate) fn of(file: File) -> Self {
        let open = Mutex::default();
        Self { file, open }
    }

    /// Asks, from now on, about every file that will be opened through the mount of `mounted`.
    ///
    /// # Errors
    /// The kernel's: `EOPNOTSUPP` for a file system that it cannot ask about, `EINVAL` where
    /// it does not know the question.
    pub fn mark(&self, mounted: BorrowedFd<'_>) -> io::Result<()> {
        sys::fanotify::mark(&self.file, mounted)
    }

    /// The questions that wait now, some of them at least; `buf` has [`QUESTIONS_BYTES`].
    ///
    /// # Errors
    /// `WouldBlock` where none does.
    pub fn next(&self, buf: &mut [u8]) -> io::Result<Vec<Question>> {
        let len = (&self.file).read(buf)?;
        let mut questions = Vec::new();
        for event in events(buf.get(..len).unwrap_or_default()) {
            match event {
                Event::Asks { number, span } => questions.extend(self.take(number, span)),
                Event::Tells { number } => drop(sys::fanotify::opened_by_event(number)),
                Event::Nothing => {}
                Event::Foreign => log::say("the kernel asks in a way that is not understood"),
            }
        }
        Ok(questions)
    }

    /// Waits until there is a question, `other` can be read or has ended, or the time is over;
    /// which of the two came.
    pub fn wait(&self, other: BorrowedFd<'_>, time: Duration) -> io::Result<[bool; 2]> {
        let fds = [(self.file.as_fd(), false), (other, false)];
        let ready = sys::wait(&fds, Some(time))?;
        let at = |index| ready.get(index).copied().unwrap_or(false);
        Ok([at(0), at(1)])
    }

    fn take(&self, number: i32, span: Option<Span>) -> Option<Question> {
        let opened = File::from(sys::fanotify::opened_by_event(number));
        let Ok(file) = FileId::of(&opened) else {
            self.write(number, DENY);
            return None;
        };
        let unique = self.open.lock().insert(opened.into());
        Some(Question { unique, file, span })
    }

    /// Takes a question over from the server that read it; what names it here. `None` where it
    /// had to be denied. Only before anything is read from the group here.
    pub(crate) fn inherit(&self, number: u32) -> Option<u64> {
        let number = i32::try_from(number).ok()?;
        match sys::fanotify::duplicate_as(&self.file, number) {
            Ok(Some(descriptor)) => Some(self.open.lock().insert(descriptor)),
            Ok(None) | Err(_) => {
                self.write(number, DENY);
                None
            }
        }
    }

    /// The kernel's number of a question, for a successor.
    pub(crate) fn number_of(&self, unique: u64) -> Option<u32> {
        let open = self.open.lock();
        u32::try_from(open.questions.get(&unique)?.as_raw_fd()).ok()
    }

    /// Lets the reader read. The caller knows that the bytes are there, and stay.
    pub fn allow(&self, unique: u64) {
        self.answer(unique, ALLOW);
    }

    /// Has the reader fail with `EIO`; nothing of it is remembered.
    pub fn deny(&self, unique: u64) {
        self.answer(unique, DENY);
    }

    /// Asks no more about the mount that this question is about, and lets the reader read.
    ///
    /// # Errors
    /// The kernel's; the reader reads all the same.
    pub(crate) fn allow_for_ever(&self, unique: u64) -> io::Result<()> {
        // The lock is held across one call, which waits for nobody.
        let unmarked = match self.open.lock().questions.get(&unique) {
            Some(descriptor) => sys::fanotify::unmark(&self.file, descriptor.as_fd()),
            None => Ok(()),
        };
        self.allow(unique);
        unmarked
    }

    fn answer(&self, unique: u64, response: u32) {
        let asked = self.open.lock().questions.remove(&unique);
        if let Some(descriptor) = asked {
            // Before it is closed, and its number another question's.
            self.write(descriptor.as_raw_fd(), response);
        }
    }

    /// Denies whatever a process that died had read and not answered. Only while nobody else
    /// reads from the group.
    pub(crate) fn deny_all(&self) {
        *self.open.lock() = Open::default();
        for number in (0..NUMBERS_MAX).filter_map(|number| i32::try_from(number).ok()) {
            self.write(number, DENY);
        }
    }

    /// Fails where nobody waits for this answer any more, and then it needs none.
    fn write(&self, number: i32, response: u32) {
        let answer = [number.to_ne_bytes(), response.to_ne_bytes()].concat();
        let _ = (&self.file).write(&answer);
    }

    /// Which mounts bear its marks, as the kernel numbers mounts: those of every EROFS that is
    /// left.
    pub fn marked(&self) -> io::Result<Vec<u64>> {
        let facts = format!("/proc/self/fdinfo/{}", self.file.as_raw_fd());
        Ok(marked_in(&fs::read_to_string(facts)?))
    }
}

impl Open {
    fn insert(&mut self, descriptor: OwnedFd) -> u64 {
        self.next += 1;
        self.questions.insert(self.next, descriptor);
        self.next
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The kernel's number of the mount that a descriptor was opened through.
pub fn mount_of(mounted: BorrowedFd<'_>) -> io::Result<u64> {
    let facts = fs::read_to_string(format!("/proc/self/fdinfo/{}", mounted.as_raw_fd()))?;
    let number = facts.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let number = number.and_then(|number| number.trim().parse().ok());
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Mounts in what the kernel says of a group, their numbers hexadecimal.
fn marked_in(facts: &str) -> Vec<u64> {
    let marks = facts
        .lines()
        .filter_map(|line| line.strip_prefix("fanotify mnt_id:"));
    let number = |mark: &str| u64::from_str_radix(mark.split(' ').next()?, 16).ok();
    marks.filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_of_marks() {
        let facts = "pos:\t0\nflags:\t02004002\nmnt_id:\t17\nfanotify flags:3b event-flags:88000\n\
                     fanotify mnt_id:2c mflags:0 mask:100008 ignored_mask:0\n\
                     fanotify ino:5 sdev:1 mflags:0 mask:1 ignored_mask:0 fhandle-bytes:8\n\
                     fanotify mnt_id:zz mflags:0\nfanotify mnt_id:1f0 mflags:0 mask:8 ignored_mask:0\n";
        assert_eq!(marked_in(facts), [0x2c, 0x1f0]);
        assert_eq!(marked_in(""), [0_u64; 0]);
    }

    #[test]
    fn a_descriptor_says_through_which_mount_it_was_opened() {
        let file = File::open("/proc/self/status").unwrap();
        let again = File::open("/proc/self/stat").unwrap();
        let numbers = [&file, &again].map(|file| mount_of(file.as_fd()).unwrap());
        assert_eq!(numbers[0], numbers[1]);
    }
}
