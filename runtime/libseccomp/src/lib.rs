//! What libcontainer takes from the crate of this name, and no more, over the system's libseccomp.
//!
//! libcontainer asks a context for a filter, rule by rule, and has it loaded, all of it in the
//! container's init, while somebody waits for that container. Three things are different here:
//!
//! * A context only takes down what it is asked for. libseccomp makes a program of it when it is
//!   loaded, which takes 9 ms for the default filter, or before: see [`prepare`].
//! * libcontainer 0.7 takes the two values of a masked comparison the wrong way round, and so allowed
//!   clone(2) every new Linux namespace. [`ScmpArgCompare::new`] turns them back.
//! * System calls that are newer than the filter fail with ENOSYS, as under runc: see `newer`.
//!
//! Invariant: what is loaded is what libseccomp makes of what was asked for, every part of it, behind
//! that. A program that was prepared is loaded for the very same filter and for no other.

mod ask;
mod filter;
mod newer;
mod sys;
#[cfg(test)]
mod tests;

pub mod error;

pub use ask::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpSyscall};
pub use filter::{Program, ScmpFilterContext, prepare};
