//! The mount server: a small process that owns FUSE sessions, so that a daemon may die or be
//! upgraded while what it mounted goes on.
//!
//! For each layer it serves a file system of one file, the layer's data file ([`fuse`]);
//! what may be served of it is what a daemon granted ([`state`]), over a socket ([`wire`]).
//! It parses no trees and fetches nothing.

mod error;
pub mod fuse;
pub mod ranges;
pub mod state;
pub mod wire;

pub use error::{Error, Result};
