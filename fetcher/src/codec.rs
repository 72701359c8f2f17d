//! Bounded decoders and hashing.
