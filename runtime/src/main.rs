//! The `laz` command.

fn main() {}
