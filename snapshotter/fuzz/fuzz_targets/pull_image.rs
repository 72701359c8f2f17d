//! The body of a pull's request, as kubelet sends it: an error or a value, never a panic.
#![no_main]

use lazarette_snapshotter::grpc::images::pulled;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let framed = [&[0; 5], data].concat();
    for body in [data, &framed] {
        if let Ok(Some((repository, credential))) = pulled(body) {
            assert!(!repository.path().is_empty());
            assert!(format!("{credential:?}").len() < 16, "a secret is never printed");
        }
    }
});
