//! Advisory locks between processes, waited for with a bound.
//!
//! Invariant: the kernel drops a lock with the last descriptor of its open file, so a
//! process that dies holds nothing. Never waits longer than told: a stopped process that
//! holds a lock makes others fail with a message, not hang.

use std::fs::{File, TryLockError};
use std::io;
use std::time::{Duration, Instant};

/// First and longest pause between attempts.
const PAUSE_FIRST: Duration = Duration::from_micros(200);
const PAUSE_MAX: Duration = Duration::from_millis(20);

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
}
