//! The `laz` command.
//!
//! Invariant: the executor host is entered before anything else has run: it must be a
//! process with one thread (see `executor`).

use std::process::ExitCode;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: lazarette_runtime::Allocator = lazarette_runtime::Allocator;

fn main() -> ExitCode {
    let origin = Instant::now();
    lazarette_runtime::executor::host::dispatch()
        .unwrap_or_else(|| lazarette_runtime::cli::main(origin))
}
