//! Cold starts measured beside the peers, in one run.

fn main() {}
