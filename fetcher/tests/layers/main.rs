//! Layers from a registry to bytes, in every format and by every kind of table.
//!
//! One program, as each that is linked to the library takes half a minute to build.

mod budget;
mod contradictions;
mod frames;
mod full_stream;
mod members;
mod offered_details;
mod offered_index;
mod open;
mod shape;
mod shared_chunks;
mod soci;
