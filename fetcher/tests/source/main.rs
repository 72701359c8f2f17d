//! Registries as a source of blobs: what is asked of them, and what of their answers is believed.
//!
//! One program, as each that is linked to the library takes half a minute to build.

mod contract;
mod errors;
mod keyring;
mod mirrors;
mod push;
mod referrers;
mod registry;
mod tls;
