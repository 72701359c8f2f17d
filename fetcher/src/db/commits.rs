//! The one way from a batch to the database, behind one small trait.
//!
//! Invariant: every batch that changes the database goes through a [`Commits`], once, so
//! that another implementation sees all of them, and can fail or stop at any one. It never
//! looks into a batch, never decides, never retries.

use crate::Result;

/// Lets batches through to the database, one call for each. May be called by several
/// threads at once.
pub trait Commits: Send + Sync + 'static {
    /// Calls `write` at most once and returns what it did. When `write` returns, the batch
    /// is on the device, whole. Blocks on the device.
    fn commit(&self, write: &dyn Fn() -> Result<()>) -> Result<()>;
}

/// Nothing in between.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Straight;

impl Commits for Straight {
    fn commit(&self, write: &dyn Fn() -> Result<()>) -> Result<()> {
        write()
    }
}
