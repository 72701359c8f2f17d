//! Random access into gzip: which bytes before a place its decoding really needs.
//!
//! Deflate refers back up to 32 KiB, so decoding can begin between two blocks for whoever
//! knows the 32 KiB before. Most of them are never referred to. Invariant: decoding from a
//! place with [`sparse_window`] of it gives the same bytes as decoding from the front.

pub(super) mod sys;

use std::collections::HashMap;

use self::sys::WINDOW_LEN;
use super::gzip::Inflater;
use super::pieces::fill_decoded;
use crate::Result;

/// Decoded bytes after a place in which it can be referred back past it.
pub const REACH: usize = WINDOW_LEN;
/// Decoded bytes that are looked at together.
const PIECE_LEN: usize = 64;
/// Bytes that deflate copies at least.
const COPY_LEN_MIN: usize = 3;

/// `window` with zeros for all that is not needed to decode what follows it: `decoded`, at
/// least [`REACH`] bytes or all there are, of `encoded`, of whose first byte only the
/// `bits` highest bits count unless `bits` is 0.
///
/// It decodes twice, with windows whose bytes tell their own place: where both disagree
/// with the right bytes, they say which byte of the window was copied.
pub fn sparse_window(encoded: &[u8], bits: u8, window: &[u8], decoded: &[u8]) -> Result<Vec<u8>> {
    let decoded = decoded.get(..REACH).unwrap_or(decoded);
    let trial = |mark: fn([u8; size_of::<usize>()]) -> u8| -> Result<Vec<u8>> {
        let places = (0..window.len()).map(usize::to_le_bytes);
        let marked: Vec<u8> = places.map(mark).collect();
        decode(encoded, bits, &marked, decoded.len())
    };
    let (low, high) = (trial(|[low, ..]| low)?, trial(|[_, high, ..]| high)?);
    let mut needed = vec![0; window.len()];
    let mut keep = |at: usize| {
        if let (Some(to), Some(from)) = (needed.get_mut(at), window.get(at)) {
            *to = *from;
        }
    };
    let pieces = decoded.chunks(PIECE_LEN).zip(low.chunks(PIECE_LEN));
    for ((right, low), high) in pieces.zip(high.chunks(PIECE_LEN)) {
        // Most of it was not copied from the window, and is compared at once.
        if right == low && right == high {
            continue;
        }
        for ((right, low), high) in right.iter().zip(low).zip(high) {
            if low != right || high != right {
                keep(usize::from(u16::from_le_bytes([*low, *high])));
            }
        }
    }
    // Places that look alike in both trials cannot be told from bytes that are right.
    for byte in 0..=u8::MAX {
        keep(usize::from(u16::from_le_bytes([byte, byte])));
    }
    Ok(needed)
}

/// `window` with zeros for what cannot be needed to decode what follows it, however that is
/// encoded: `next`, at least [`REACH`] bytes or all there are. Without the encoded bytes it
/// leaves more than [`sparse_window`] does.
///
/// Deflate copies three bytes at least, from at most [`REACH`] before. So a byte is needed
/// only if it is one of three in a row that are there again behind the place, near enough.
pub fn likely_window(window: &[u8], next: &[u8]) -> Vec<u8> {
    let next = next.get(..REACH).unwrap_or(next);
    let mut first: HashMap<[u8; COPY_LEN_MIN], usize> = HashMap::with_capacity(next.len());
    for (at, three) in next.windows(COPY_LEN_MIN).enumerate() {
        if let Ok(three) = three.try_into() {
            first.entry(three).or_insert(at);
        }
    }
    let around = [window, next.get(..COPY_LEN_MIN - 1).unwrap_or(next)].concat();
    let mut needed = vec![0; window.len()];
    for (at, three) in around.windows(COPY_LEN_MIN).enumerate() {
        // From the oldest byte of a whole window it is REACH to the place itself.
        let before = window.len().saturating_sub(at);
        let is_again = first
            .get(three)
            .is_some_and(|behind| before.saturating_add(*behind) <= REACH);
        if is_again {
            let run = at..at.saturating_add(COPY_LEN_MIN).min(window.len());
            if let (Some(to), Some(from)) = (needed.get_mut(run.clone()), window.get(run)) {
                to.copy_from_slice(from);
            }
        }
    }
    needed
}

fn decode(encoded: &[u8], bits: u8, window: &[u8], len: usize) -> Result<Vec<u8>> {
    let (first, rest) = match encoded.split_first() {
        Some((first, rest)) if bits > 0 => (*first, rest),
        _ => (0, encoded),
    };
    let mut inflater = Inflater::resume(bits, first, window)?;
    let mut out = vec![0; len];
    let mut input = rest;
    fill_decoded(&mut inflater, &mut input, &mut out, 0)?;
    Ok(out)
}

#[cfg(test)]
mod tests;
