//! Fakes that implement the real traits, for the tests of this crate and of those above.
//!
//! Invariant: nothing here is used outside tests, and nothing outside knows of it. Fakes
//! hold data in memory, listen on loopback only, and are gone when dropped.

pub mod commits;
pub mod content;
pub mod contract;
pub mod disk;
mod faulty;
pub mod layers;
mod memory;
pub mod parsers;
mod registry;
mod synced;

pub use self::faulty::{FaultySource, ReadFault};
pub use self::memory::MemorySource;
pub use self::registry::{
    Asked, Endpoint, FakeRegistry, FakeRegistryBuilder, Fault, Paging, Requests,
};
pub use self::synced::{Synced, SyncedBy};
