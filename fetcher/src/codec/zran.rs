//! Random access into gzip: which bytes before a place its decoding really needs.
//!
//! Deflate refers back up to 32 KiB, so decoding can begin between two blocks for whoever
//! knows the 32 KiB before. Most of them are never referred to. Invariant: decoding from a
//! place with [`sparse_window`] of it gives the same bytes as decoding from the front.

mod referred;
pub(super) mod sys;
mod threes;

use self::referred::referred;
use self::sys::WINDOW_LEN;
use self::threes::Threes;

/// Decoded bytes after a place in which it can be referred back past it.
pub const REACH: usize = WINDOW_LEN;
/// Bytes that deflate copies at least.
const COPY_LEN_MIN: usize = threes::LEN;
/// Decoded bytes after a place that tell which bytes before it can be needed: a copy that
/// begins within [`REACH`] may end behind it.
pub const TELLING: usize = REACH + COPY_LEN_MIN - 1;

/// `window` with zeros for all that is not needed to decode what follows it: `encoded`, up to
/// [`REACH`] decoded bytes or the end of its member, of whose first byte only the `bits`
/// highest bits count unless `bits` is 0. All of it where `encoded` does not tell.
pub fn sparse_window(encoded: &[u8], bits: u8, window: &[u8]) -> Vec<u8> {
    referred(encoded, bits, window, REACH).unwrap_or_else(|| window.to_vec())
}

/// `window` with zeros for what cannot be needed to decode what follows it, however that is
/// encoded: `next`, at least [`TELLING`] bytes or all there are. Without the encoded bytes it
/// leaves more than [`sparse_window`] does.
///
/// Deflate copies three bytes at least, from at most [`REACH`] before. So a byte is needed
/// only if it is one of three in a row that are there again behind the place, near enough.
pub fn likely_window(window: &[u8], next: &[u8]) -> Vec<u8> {
    let next = next.get(..TELLING).unwrap_or(next);
    let behind = Threes::new(next);
    let around = [window, next.get(..COPY_LEN_MIN - 1).unwrap_or(next)].concat();
    let mut needed = vec![0; window.len()];
    for (at, three) in around.windows(COPY_LEN_MIN).enumerate() {
        // From the oldest byte of a whole window it is REACH to the place itself.
        let before = window.len().saturating_sub(at);
        let is_again = behind
            .first(three)
            .is_some_and(|behind| before.saturating_add(behind) <= REACH);
        if is_again {
            let run = at..at.saturating_add(COPY_LEN_MIN).min(window.len());
            if let (Some(to), Some(from)) = (needed.get_mut(run.clone()), window.get(run)) {
                to.copy_from_slice(from);
            }
        }
    }
    needed
}

#[cfg(test)]
mod tests;
