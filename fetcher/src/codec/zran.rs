//! Random access into gzip: which bytes before a place its decoding really needs.
//!
//! Deflate refers back up to 32 KiB, so decoding can begin between two blocks for whoever
//! knows the 32 KiB before. Most of them are never referred to. Invariant: decoding from a
//! place with [`sparse_window`] of it gives the same bytes as decoding from the front.

pub(super) mod sys;

use self::sys::WINDOW_LEN;
use super::gzip::Inflater;
use super::pieces::fill_decoded;
use crate::Result;

/// Decoded bytes after a place in which it can be referred back past it.
pub const REACH: usize = WINDOW_LEN;

/// `window` with zeros for all that is not needed to decode what follows it: `decoded`, at
/// least [`REACH`] bytes or all there are, of `encoded`, of whose first byte only the
/// `bits` highest bits count unless `bits` is 0.
///
/// It decodes twice, with windows whose bytes tell their own place: where both disagree
/// with the right bytes, they say which byte of the window was copied.
pub fn sparse_window(encoded: &[u8], bits: u8, window: &[u8], decoded: &[u8]) -> Result<Vec<u8>> {
    let decoded = decoded.get(..REACH).unwrap_or(decoded);
    let place = |at: usize| u16::try_from(at).unwrap_or(u16::MAX).to_le_bytes();
    let trial = |byte: usize| -> Result<Vec<u8>> {
        let marked: Vec<u8> = (0..window.len())
            .map(|at| place(at).get(byte).copied().unwrap_or_default())
            .collect();
        decode(encoded, bits, &marked, decoded.len())
    };
    let (low, high) = (trial(0)?, trial(1)?);
    let mut needed = vec![0; window.len()];
    let mut keep = |at: usize| {
        if let (Some(to), Some(from)) = (needed.get_mut(at), window.get(at)) {
            *to = *from;
        }
    };
    for ((right, low), high) in decoded.iter().zip(&low).zip(&high) {
        if low != right || high != right {
            keep(usize::from(u16::from_le_bytes([*low, *high])));
        }
    }
    // Places that look alike in both trials cannot be told from bytes that are right.
    for byte in 0..=u8::MAX {
        keep(usize::from(u16::from_le_bytes([byte, byte])));
    }
    Ok(needed)
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
