//! libFuzzer's way into `fuzz_ingest`.
#![no_main]

#[path = "../bodies.rs"]
#[allow(dead_code)]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::streams::fuzz_ingest(data));
