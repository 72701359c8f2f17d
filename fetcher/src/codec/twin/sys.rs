//! The rounds of SHA-256 for two digests at once, by the processor's instructions for it.
//!
//! Invariant: [`compress_both`] does what `sha2` does to each of both, on any processor; a
//! property test compares them. Knows nothing of lengths and padding.

#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "instructions that not every processor has")
)]

use sha2::block_api::compress256;

use super::{Block, Words};

/// Takes the same `blocks` into two digests.
pub(super) fn compress_both(a: &mut Words, b: &mut Words, blocks: &[Block]) {
    #[cfg(target_arch = "x86_64")]
    if is_supported() {
        // SAFETY: the processor has the instructions, as was just asked of it.
        unsafe { x86::compress_both(a, b, blocks) };
        return;
    }
    compress256(a, blocks);
    compress256(b, blocks);
}

/// Whether this processor has what [`x86::compress_both`] needs; asked of it once.
#[cfg(target_arch = "x86_64")]
fn is_supported() -> bool {
    std::is_x86_feature_detected!("sha") && std::is_x86_feature_detected!("sse4.1")
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_blend_epi16, _mm_loadu_si128, _mm_set_epi64x,
        _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8,
        _mm_shuffle_epi32, _mm_storeu_si128,
    };

    use super::{Block, Words};

    /// The constants of the rounds (FIPS 180-4, 4.2.2): four for each step, of which four use up
    /// the words that there are of the message.
    #[rustfmt::skip]
    const ROUNDS: [[[u32; 4]; 4]; 4] = [
        [[0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5],
         [0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5],
         [0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3],
         [0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174]],
        [[0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc],
         [0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da],
         [0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7],
         [0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967]],
        [[0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13],
         [0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85],
         [0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3],
         [0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070]],
        [[0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5],
         [0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3],
         [0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208],
         [0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2]],
    ];

    /// A digest as the instructions want it: words a, b, e, f and words c, d, g, h.
    #[derive(Clone, Copy)]
    struct Halves {
        abef: __m128i,
        cdgh: __m128i,
    }

    /// See the module's documentation. What is made of a block before its rounds is made
    /// once, and the rounds of one digest are done while those of the other are waited for.
    #[target_feature(enable = "sha,sse4.1")]
    pub(super) fn compress_both(a: &mut Words, b: &mut Words, blocks: &[Block]) {
        let (mut x, mut y) = (load(a), load(b));
        let [first, later @ ..] = &ROUNDS;
        for block in blocks {
            let (before_x, before_y) = (x, y);
            let [mut w0, mut w1, mut w2, mut w3] = message(block);
            for (words, constants) in [w0, w1, w2, w3].into_iter().zip(first) {
                step(&mut x, &mut y, _mm_add_epi32(words, quad(constants)));
            }
            // Written out: the words of the message then never leave their registers.
            for [c0, c1, c2, c3] in later {
                w0 = next(w0, w1, w2, w3);
                step(&mut x, &mut y, _mm_add_epi32(w0, quad(c0)));
                w1 = next(w1, w2, w3, w0);
                step(&mut x, &mut y, _mm_add_epi32(w1, quad(c1)));
                w2 = next(w2, w3, w0, w1);
                step(&mut x, &mut y, _mm_add_epi32(w2, quad(c2)));
                w3 = next(w3, w0, w1, w2);
                step(&mut x, &mut y, _mm_add_epi32(w3, quad(c3)));
            }
            x = sum_of(x, before_x);
            y = sum_of(y, before_y);
        }
        store(x, a);
        store(y, b);
    }

    /// Four rounds of both, with the sum of words and constants.
    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn step(x: &mut Halves, y: &mut Halves, sum: __m128i) {
        x.cdgh = _mm_sha256rnds2_epu32(x.cdgh, x.abef, sum);
        y.cdgh = _mm_sha256rnds2_epu32(y.cdgh, y.abef, sum);
        let sum = _mm_shuffle_epi32(sum, 0x0e);
        x.abef = _mm_sha256rnds2_epu32(x.abef, x.cdgh, sum);
        y.abef = _mm_sha256rnds2_epu32(y.abef, y.cdgh, sum);
    }

    /// The four words of the message that follow on sixteen, the oldest first.
    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn next(oldest: __m128i, second: __m128i, third: __m128i, last: __m128i) -> __m128i {
        let sum = _mm_sha256msg1_epu32(oldest, second);
        let sum = _mm_add_epi32(sum, _mm_alignr_epi8(last, third, 4));
        _mm_sha256msg2_epu32(sum, last)
    }

    /// The words of a block, which are big-endian there.
    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn message(block: &Block) -> [__m128i; 4] {
        let order = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        // SAFETY: a block has as many bytes as four such values, of which any bits are one.
        let quads: [__m128i; 4] = unsafe { std::mem::transmute(*block) };
        quads.map(|quad| _mm_shuffle_epi8(quad, order))
    }

    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn quad(words: &[u32; 4]) -> __m128i {
        // SAFETY: the load needs no alignment, and 16 bytes are there.
        unsafe { _mm_loadu_si128(words.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn sum_of(a: Halves, b: Halves) -> Halves {
        Halves {
            abef: _mm_add_epi32(a.abef, b.abef),
            cdgh: _mm_add_epi32(a.cdgh, b.cdgh),
        }
    }

    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn load(words: &Words) -> Halves {
        let [a, b, c, d, e, f, g, h] = *words;
        let cdab = _mm_shuffle_epi32(quad(&[a, b, c, d]), 0xb1);
        let efgh = _mm_shuffle_epi32(quad(&[e, f, g, h]), 0x1b);
        Halves {
            abef: _mm_alignr_epi8(cdab, efgh, 8),
            cdgh: _mm_blend_epi16(efgh, cdab, 0xf0),
        }
    }

    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn store(halves: Halves, words: &mut Words) {
        let feba = _mm_shuffle_epi32(halves.abef, 0x1b);
        let dchg = _mm_shuffle_epi32(halves.cdgh, 0xb1);
        let dcba = _mm_blend_epi16(feba, dchg, 0xf0);
        let hgfe = _mm_alignr_epi8(dchg, feba, 8);
        let (quads, _) = words.as_chunks_mut::<4>();
        for (to, quad) in quads.iter_mut().zip([dcba, hgfe]) {
            // SAFETY: the store needs no alignment, and there is room for 16 bytes.
            unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), quad) };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn both_become_what_each_would(
            mut a in any::<Words>(), mut b in any::<Words>(),
            bytes in prop::collection::vec(any::<u8>(), 0..1000),
        ) {
            let (blocks, _) = bytes.as_chunks();
            let (mut one, mut other) = (a, b);
            compress256(&mut one, blocks);
            compress256(&mut other, blocks);
            compress_both(&mut a, &mut b, blocks);
            prop_assert_eq!((a, b), (one, other));
        }
    }
}
