//! Lines for whoever operates the node, on standard error: systemd keeps them.
//!
//! Invariant: never fails and never blocks what it tells of.

use std::io::Write as _;

/// What a server or a guard says on standard output, once, when it listens.
pub const READY: &[u8] = b"ready\n";

/// Says that it listens, to whoever started it.
pub(crate) fn ready() {
    let mut out = std::io::stdout();
    // Who does not listen does not need to know.
    let _ = out.write_all(READY).and_then(|()| out.flush());
}

/// Says one line.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "laz-mountd: {line}");
}
