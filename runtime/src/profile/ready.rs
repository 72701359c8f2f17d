//! When a start is over.
//!
//! Invariant: pure; the clock is an argument. A decision once made is never taken back:
//! the caller stops asking.

use std::time::Duration;

use serde::Serialize;

/// What ended a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReadyBy {
    /// The container wrote something.
    Output,
    /// It ended without having written anything.
    Exit,
    /// One of its processes listens on a TCP port.
    Port,
    /// It read nothing new for a while.
    Quiet,
    /// None of these for so long that it does not matter any more.
    Cap,
}

impl ReadyBy {
    /// One word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::Exit => "exit",
            Self::Port => "port",
            Self::Quiet => "quiet",
            Self::Cap => "cap",
        }
    }
}

/// How long is long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadyLimits {
    /// Without anything new read, this long is quiet.
    pub quiet: Duration,
    /// After the first output, this long without anything new read. Entrypoint scripts say
    /// what they are about to start, and that is not yet the start of it.
    pub settle: Duration,
    /// Longest recording.
    pub cap: Duration,
}

impl Default for ReadyLimits {
    fn default() -> Self {
        Self {
            quiet: Duration::from_secs(2),
            settle: Duration::from_millis(150),
            cap: Duration::from_secs(60),
        }
    }
}

/// What is known of a start at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// Since the container was launched.
    pub running_for: Duration,
    /// Since something new was read, or the launch.
    pub quiet_for: Duration,
    /// Whether anything was read.
    pub has_read: bool,
    /// Whether a read waits for data now.
    pub is_waiting: bool,
    /// Whether the container has written something.
    pub has_output: bool,
    /// Whether it listens.
    pub is_listening: bool,
    /// Whether it has ended.
    pub has_exited: bool,
}

/// What has ended the start, if something has.
pub fn decide(seen: &Seen, limits: &ReadyLimits) -> Option<ReadyBy> {
    let still = |wait: Duration| !seen.is_waiting && seen.quiet_for >= wait;
    if seen.has_exited {
        let by = if seen.has_output {
            ReadyBy::Output
        } else {
            ReadyBy::Exit
        };
        return Some(by);
    }
    if seen.is_listening {
        return Some(ReadyBy::Port);
    }
    if seen.has_output && still(limits.settle) {
        return Some(ReadyBy::Output);
    }
    if seen.has_read && still(limits.quiet) {
        return Some(ReadyBy::Quiet);
    }
    (seen.running_for >= limits.cap).then_some(ReadyBy::Cap)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ReadyLimits = ReadyLimits {
        quiet: Duration::from_secs(2),
        settle: Duration::from_millis(100),
        cap: Duration::from_secs(60),
    };

    fn reading(quiet_ms: u64) -> Seen {
        Seen {
            running_for: Duration::from_secs(5),
            quiet_for: Duration::from_millis(quiet_ms),
            has_read: true,
            ..Seen::default()
        }
    }

    #[test]
    fn each_sign_ends_a_start() {
        let output = |seen| Seen {
            has_output: true,
            ..seen
        };
        let waiting = |seen| Seen {
            is_waiting: true,
            ..seen
        };
        let exited = |seen| Seen {
            has_exited: true,
            ..seen
        };
        let old = |seen| Seen {
            running_for: LIMITS.cap,
            ..seen
        };
        let listening = |seen| Seen {
            is_listening: true,
            ..seen
        };
        let unread = |seen| Seen {
            has_read: false,
            ..seen
        };
        let table = [
            (Seen::default(), None),
            (reading(0), None),
            (reading(1999), None),
            (reading(2000), Some(ReadyBy::Quiet)),
            (waiting(reading(9000)), None),
            (unread(reading(9000)), None),
            (output(reading(99)), None),
            (output(reading(100)), Some(ReadyBy::Output)),
            (output(waiting(reading(100))), None),
            (listening(waiting(output(reading(0)))), Some(ReadyBy::Port)),
            (exited(reading(0)), Some(ReadyBy::Exit)),
            (exited(listening(output(reading(0)))), Some(ReadyBy::Output)),
            (old(waiting(reading(0))), Some(ReadyBy::Cap)),
            (old(unread(reading(0))), Some(ReadyBy::Cap)),
        ];
        for (seen, expected) in table {
            assert_eq!(decide(&seen, &LIMITS), expected, "{seen:?}");
        }
    }
}
