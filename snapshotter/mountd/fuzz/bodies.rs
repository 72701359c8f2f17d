//! What each fuzz target does with its input: one place for libFuzzer's targets and for the
//! smoke test that runs on stable, so that the two cannot drift.
//!
//! Invariant: for any input an error or a value that keeps its rules; never a panic.

use lazarette_mountd::fuse::answer::{HEADER_BYTES, Reaction, react};
use lazarette_mountd::fuse::{READ_MAX, parse};
use lazarette_mountd::wire::{decode, encode};

/// A request from the kernel: it is understood or not, and what is answered is in order.
pub(crate) fn fuzz_request(data: &[u8]) {
    let Ok(request) = parse(data) else {
        return;
    };
    for size in [0, 1, 4096, 1 << 40, u64::MAX] {
        match react(&request, size) {
            Reaction::Send(bytes) => {
                assert!(bytes.len() >= HEADER_BYTES);
                let len = u32::try_from(bytes.len()).expect("it is short");
                assert_eq!(bytes[..4], len.to_ne_bytes());
                assert_eq!(bytes[8..16], request.unique.to_ne_bytes());
            }
            Reaction::Read { offset, len } => {
                assert!(len > 0 && len <= READ_MAX);
                assert!(offset < size && u64::from(len) <= size - offset);
            }
            Reaction::Interrupt(_) | Reaction::Nothing => {}
        }
    }
}

/// A datagram from a client: what decodes is encoded the same.
pub(crate) fn fuzz_datagram(data: &[u8]) {
    if let Ok(message) = decode(data) {
        assert_eq!(encode(&message), data);
    }
}
