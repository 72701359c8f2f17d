//! SHA-256 of a stream and of pieces of it, in one pass.
//!
//! A layer's tar has a digest, and so has every chunk in it: each byte is hashed twice. A
//! processor that computes SHA-256 waits most of the time for its own last result, so two
//! digests of the same blocks take little more than one, and what is made of a block before
//! its rounds is made once. Invariant: digests are those of `sha2`, however the bytes were cut
//! and whatever the processor can do. Where a piece does not begin on a block of the stream, or
//! the stream's digest is another algorithm's, both are computed one after the other.
#![warn(clippy::indexing_slicing)]

mod sys;

use sha2::block_api::compress256;

use crate::types::{Algorithm, Digest, Hasher};

/// Bytes of a block.
const BLOCK_LEN: usize = 64;
/// Where the length of the message begins in its last block.
const LENGTH_AT: usize = BLOCK_LEN - 8;
/// What SHA-256 begins with (FIPS 180-4, 5.3.3).
const BEGINNING: Words = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// What one digest has come to.
type Words = [u32; 8];
type Block = [u8; BLOCK_LEN];

/// See the module's documentation.
pub struct TwinHasher {
    whole: Whole,
    piece: State,
}

/// The digest of everything.
enum Whole {
    Unwanted,
    Sha256(State),
    Other(Hasher),
}

impl TwinHasher {
    /// Of no bytes yet. `whole` says which digest of everything is wanted, if any.
    pub fn new(whole: Option<Algorithm>) -> Self {
        Self {
            whole: match whole {
                None => Whole::Unwanted,
                Some(Algorithm::Sha256) => Whole::Sha256(State::new()),
                Some(other @ Algorithm::Sha512) => Whole::Other(Hasher::new(other)),
            },
            piece: State::new(),
        }
    }

    /// Adds bytes that are in no piece.
    pub fn between(&mut self, bytes: &[u8]) {
        match &mut self.whole {
            Whole::Unwanted => {}
            Whole::Sha256(state) => state.update(bytes),
            Whole::Other(hasher) => hasher.update(bytes),
        }
    }

    /// Adds the next bytes of the piece.
    pub fn piece(&mut self, bytes: &[u8]) {
        match &mut self.whole {
            Whole::Sha256(whole) if whole.filled == self.piece.filled => {
                both(whole, &mut self.piece, bytes);
                return;
            }
            Whole::Unwanted => {}
            Whole::Sha256(whole) => whole.update(bytes),
            Whole::Other(hasher) => hasher.update(bytes),
        }
        self.piece.update(bytes);
    }

    /// Ends the piece, and returns its digest; the next one begins with what is added next.
    pub fn end_piece(&mut self) -> [u8; 32] {
        std::mem::replace(&mut self.piece, State::new()).finish()
    }

    /// The digest of everything, where it was wanted.
    pub fn finish(self) -> Option<Digest> {
        match self.whole {
            Whole::Unwanted => None,
            Whole::Sha256(state) => Some(Digest::Sha256(state.finish())),
            Whole::Other(hasher) => Some(hasher.finish()),
        }
    }
}

/// Adds `bytes` to both, whose last blocks are filled alike.
fn both(a: &mut State, b: &mut State, bytes: &[u8]) {
    let rest = a.complete(bytes);
    b.complete(bytes);
    let (blocks, tail) = rest.as_chunks();
    sys::compress_both(&mut a.words, &mut b.words, blocks);
    for state in [a, b] {
        state.blocks = state.blocks.wrapping_add(blocks.len() as u64);
        state.keep(tail);
    }
}

/// One digest that is being computed.
struct State {
    words: Words,
    /// Blocks that are in `words`.
    blocks: u64,
    /// The block that is not full yet.
    last: Block,
    /// Bytes of it that are there.
    filled: usize,
}

impl State {
    fn new() -> Self {
        Self {
            words: BEGINNING,
            blocks: 0,
            last: [0; BLOCK_LEN],
            filled: 0,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        let rest = self.complete(bytes);
        let (blocks, tail) = rest.as_chunks();
        compress256(&mut self.words, blocks);
        self.blocks = self.blocks.wrapping_add(blocks.len() as u64);
        self.keep(tail);
    }

    /// Completes a block that was begun with the first of `bytes`; what is left of them.
    fn complete<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        if self.filled == 0 {
            return bytes;
        }
        let room = BLOCK_LEN.saturating_sub(self.filled);
        let (head, rest) = bytes.split_at_checked(room).unwrap_or((bytes, &[]));
        self.keep(head);
        rest
    }

    /// Adds `bytes` to the last block, which has room for them.
    fn keep(&mut self, bytes: &[u8]) {
        let end = self.filled.saturating_add(bytes.len());
        if let Some(room) = self.last.get_mut(self.filled..end) {
            room.copy_from_slice(bytes);
        }
        self.filled = end;
        if self.filled == BLOCK_LEN {
            compress256(&mut self.words, std::slice::from_ref(&self.last));
            self.blocks = self.blocks.wrapping_add(1);
            self.filled = 0;
        }
    }

    fn finish(mut self) -> [u8; 32] {
        let bytes = self.blocks.wrapping_mul(BLOCK_LEN as u64);
        let bits = bytes.wrapping_add(self.filled as u64).wrapping_mul(8);
        self.keep(&[0x80]);
        while self.filled != LENGTH_AT {
            self.keep(&[0]);
        }
        self.keep(&bits.to_be_bytes());
        let mut digest = [0; 32];
        for (to, word) in digest.chunks_exact_mut(4).zip(self.words) {
            to.copy_from_slice(&word.to_be_bytes());
        }
        digest
    }
}

#[cfg(test)]
mod tests;
