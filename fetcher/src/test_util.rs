//! Fakes that implement the real traits.
