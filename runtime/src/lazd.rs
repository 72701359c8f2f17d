//! The `lazd` daemon.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: lazarette_runtime::Allocator = lazarette_runtime::Allocator;

fn main() -> ExitCode {
    lazarette_runtime::daemon::main()
}
