//! The table of chunks, beside what a crash leaves of the rest.
//!
//! It holds only hints, so the store changes it without syncing and outside the recorded
//! operations: after a crash it may be as the process last wrote it, with places of what
//! never reached the device; as it was long ago; torn; or nonsense.

use std::fs;
use std::path::Path;

/// As `store/chunks.rs` draws it.
const NAME: &str = "chunks";
const HEAD_BYTES: usize = 4096;
const BUCKET_BYTES: usize = 128;
/// Few, so that a table is copied in no time.
const BUCKETS: u32 = 64;
const SECTOR: usize = 512;

/// What is left of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    Nothing,
    /// What the process last wrote.
    AsItWas,
    /// Every other sector of that.
    Torn,
    /// Nobody's places.
    Noise,
    /// Places of nobody knows what.
    WithoutHead,
}

/// Whether there is one.
pub(crate) fn is_in(root: &Path) -> bool {
    root.join(NAME).exists()
}

/// Makes an empty table where none is.
pub(crate) fn make_small(root: &Path) {
    if is_in(root) {
        return;
    }
    let mut bytes = b"LAZCHNKS".to_vec();
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(BUCKETS.to_le_bytes());
    bytes.resize(HEAD_BYTES + BUCKETS as usize * BUCKET_BYTES, 0);
    fs::write(root.join(NAME), bytes).unwrap();
}

/// Puts what is left of the table in `from` into `to`; another thing with each seed.
pub(crate) fn carry(from: &Path, to: &Path, seed: u64) -> Left {
    let left = match seed {
        0 => Left::Nothing,
        3 => Left::Torn,
        4 => Left::Noise,
        5 => Left::WithoutHead,
        _ => Left::AsItWas,
    };
    let mut bytes = fs::read(from.join(NAME)).unwrap();
    match left {
        Left::Nothing => return left,
        Left::AsItWas => {}
        Left::Torn => {
            let buckets = &mut bytes[HEAD_BYTES..];
            for sector in buckets.chunks_mut(SECTOR).step_by(2) {
                sector.fill(0);
            }
        }
        Left::Noise => {
            for (byte, at) in bytes[HEAD_BYTES..].iter_mut().zip(0_u32..) {
                *byte ^= (at.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0];
            }
        }
        Left::WithoutHead => bytes[..SECTOR].fill(0),
    }
    fs::write(to.join(NAME), bytes).unwrap();
    left
}
