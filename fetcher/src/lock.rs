//! Advisory locks between processes, waited for with a bound.
//!
//! Invariant: the kernel drops a lock with the last descriptor of its open file, so a
//! process that dies holds nothing. Never waits longer than told: a stopped process that
//! holds a lock makes others fail with a message, not hang.

use std::fs::{File, TryLockError};
use std::io;
use std::ops::Deref;
use std::time::{Duration, Instant};

/// First and longest pause between attempts.
const PAUSE_FIRST: Duration = Duration::from_micros(200);
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// A file whose lock is given up when this is dropped. Closing it would not be enough: a
/// process that another thread is just starting has it open as well, until it runs its program.
#[derive(Debug)]
pub struct LockFile(File);

impl From<File> for LockFile {
    fn from(file: File) -> Self {
        Self(file)
    }
}

impl Deref for LockFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::debug!(%error, "a lock goes with its last descriptor");
        }
    }
}

/// Takes the exclusive lock of `file`; `false` when `wait` passed without getting it.
/// Blocks the calling thread.
pub(crate) fn lock_within(file: &File, wait: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + wait;
    let mut pause = PAUSE_FIRST;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) => {}
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Whether some open file holds the lock of `file` now; takes it if none does.
pub(crate) fn is_held(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lock_is_seen_and_the_wait_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = File::create(&path).unwrap();
        let second = File::open(&path).unwrap();
        assert!(lock_within(&first, Duration::ZERO).unwrap());
        assert!(is_held(&second).unwrap());
        assert!(!lock_within(&second, Duration::from_millis(5)).unwrap());
        drop(first);
        assert!(lock_within(&second, Duration::ZERO).unwrap());
    }

    #[test]
    fn a_lock_that_others_inherited_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = LockFile::from(File::create(&path).unwrap());
        let second = File::open(&path).unwrap();
        let inherited = lock.try_clone().unwrap();
        assert!(!is_held(&lock).unwrap());
        assert!(is_held(&second).unwrap());
        drop(lock);
        assert!(!is_held(&second).unwrap());
        drop(inherited);
    }
}
