//! One store used by several at once: two handles in a process, several processes, and
//! processes that are killed.
//!
//! The tests run this binary again as children, which work on the store until they are
//! done or killed and say what they were promised; the parent looks at what is left.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod damage;
mod evict;
mod flush;
mod handles;
mod lent;
mod processes;
mod support;
mod sys;
mod whole;
mod worker;

use std::path::Path;

use crate::worker::{DIR, SEED, WORK, work};

/// What the children do; see [`work`].
#[test]
#[ignore = "the child process of other tests"]
fn child() {
    let var = |name| std::env::var(name).expect("the parent sets it");
    let seed = var(SEED).parse().unwrap();
    work(Path::new(&var(DIR)), &var(WORK), seed);
    eprintln!("end");
}
