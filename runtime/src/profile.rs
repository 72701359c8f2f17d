//! Start-up profiles: what the starts of an image read, in the order they read it.
//!
//! [`record`] notes what one start reads and [`ready`] decides when it is over, [`merge`]
//! joins it with what earlier starts taught, and [`document`] is how all of it is kept in
//! the database and exchanged as a file. Using a profile is the fetcher's work
//! ([`lazarette_fetcher::prefetch`]).
//!
//! Invariant: a profile is a hint. It is read as hostile input wherever it comes from, and
//! the worst one costs some bytes behind every reader: it is never trusted, so it needs no
//! signature.

pub mod document;
pub mod merge;
pub mod ports;
pub mod ready;
pub mod record;
mod table;
pub mod watch;

pub use document::{Block, Command, CommandProfile, ImageProfiles};
pub use ready::ReadyBy;
pub use record::{Recorder, Touch};
pub use table::ProfileTable;

use serde::Serialize;

/// What a start made of the profile it found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ProfileUse {
    /// Starts it was made of.
    pub runs: u32,
    /// Whether it is of another command with the same program.
    pub guess: bool,
    /// Blocks it names.
    pub blocks: u64,
    /// Bytes of the data files it names.
    pub bytes: u64,
    /// Chunks that were fetched for it until the container ended.
    pub fetched_chunks: u64,
    /// Their decoded bytes.
    pub fetched_bytes: u64,
    /// Blocks that no chunk covers.
    pub unknown_blocks: u64,
    /// Batches of chunks that could not be fetched.
    pub failed: u64,
}

/// What a start taught.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Recorded {
    /// Blocks read until it was ready.
    pub blocks: u64,
    /// Bytes of the pages of those, whole pages counted.
    pub bytes: u64,
}
