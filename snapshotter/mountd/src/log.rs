//! Lines for whoever operates the node, on standard error: systemd keeps them.
//!
//! Invariant: never fails and never blocks what it tells of.

use std::io::Write as _;

/// Says one line.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "laz-mountd: {line}");
}
