//! The `laz` program against a registry that can be told to misbehave: what users see;
//! and the service of `lazd` against the same.
//!
//! Every message is asserted in full enough to say what failed, on what, and what to do.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends at the first surprise"
)]

mod broken;
mod confined;
mod crowded;
mod damage;
mod disk;
mod errors;
mod floor;
mod grpc;
mod memory;
mod profile;
mod referrers;
mod run;
mod soci;
mod store;
mod support;
mod sys;
mod terminal;
