//! What each fuzz target does with its input: one place for libFuzzer's targets and for
//! the smoke test that runs on stable, so that the two cannot drift.
//!
//! Invariant: for any input an error or a value that keeps its rules; never a panic,
//! never memory beyond the limits.

#[path = "bodies/files.rs"]
pub(crate) mod files;
#[path = "bodies/formats.rs"]
pub(crate) mod formats;
#[path = "bodies/learned.rs"]
pub(crate) mod learned;
#[path = "bodies/members.rs"]
pub(crate) mod members;
#[path = "bodies/streams.rs"]
pub(crate) mod streams;
