//! Fetching what an earlier start of the same image read, before this one asks for it.
//!
//! A profile names places of layers' data files in the order in which they were first
//! read. [`chunks_of`] turns those of one layer into chunks of the index that this layer
//! happens to have; [`Prefetch`] fetches them, across layers in the profile's order, each
//! layer's as soon as its index is open.
//!
//! Invariant: a profile is a hint from anywhere. Whatever it says, nothing here fails,
//! panics, or fetches a byte twice: places that no chunk covers are counted and left out.
//! It runs as [`Priority::Profile`](crate::layer::Priority::Profile), behind readers.
//! Never knows how profiles are recorded or kept.

mod places;
mod queue;
mod run;

pub use places::{BLOCK_BYTES, LayerPlan, PAGE_BYTES, Place, Wanted, chunks_of};
pub use queue::{Batch, Queue};
pub use run::{OnPresent, Prefetch, PrefetchOptions, PrefetchUse, WantedPlaces};
