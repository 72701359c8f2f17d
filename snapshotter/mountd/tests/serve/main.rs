//! A real server, real FUSE mounts, and daemons in processes that are killed.
//!
//! Promise: whatever dies when, a read returns the right bytes, or fails where it may; never
//! anything else, and never does it hang.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod bed;
mod cached;
mod daemon;
mod daemon_dies;
mod memory;
mod scarce;
mod server_dies;
mod store;
mod sys;
