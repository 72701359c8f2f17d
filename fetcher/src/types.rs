//! The vocabulary: strings from outside become these types once, at the edge.
//!
//! Invariant: a value of one of these types is valid. Nothing below parses them again.

mod descriptor;
mod digest;
mod platform;
mod range;
mod reference;

pub use descriptor::{Descriptor, MediaType};
pub use digest::{Algorithm, Digest, Hasher};
pub use platform::Platform;
pub use range::ByteRange;
pub use reference::{Reference, Repository};

/// A string from outside that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what} {input:?}: {reason}")]
pub struct ParseError {
    /// What was expected ("reference", "digest", "platform").
    pub what: &'static str,
    /// The offending text, cut to 256 characters.
    pub input: String,
    /// Which rule it breaks.
    pub reason: &'static str,
}

impl ParseError {
    pub(crate) fn new(what: &'static str, input: &str, reason: &'static str) -> Self {
        Self {
            what,
            input: input.chars().take(256).collect(),
            reason,
        }
    }
}
