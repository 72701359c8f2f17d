//! Gzip members, one whole piece at a time.
//!
//! Invariant: a member depends on its input and level only: no time, no name, no state of
//! an earlier member. So equal input gives equal bytes on every thread. Never streams:
//! callers bound the size of a piece.

use flate2::{Compress, Compression, FlushCompress, Status};

/// Header of a member: deflate, no flags, no time, no extra flags, unknown system.
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];

/// Highest compression level.
pub const LEVEL_MAX: u32 = 9;

/// Makes gzip members; reuse one per thread, its tables are large.
pub struct MemberCompressor {
    deflate: Compress,
}

impl MemberCompressor {
    /// A compressor of `level`, 0 (store) to [`LEVEL_MAX`]; more is taken as the highest.
    pub fn new(level: u32) -> Self {
        Self {
            deflate: Compress::new(Compression::new(level.min(LEVEL_MAX)), false),
        }
    }

    /// `plain` as one gzip member.
    pub fn compress(&mut self, plain: &[u8]) -> Vec<u8> {
        self.deflate.reset();
        let mut out = Vec::with_capacity(plain.len() / 2 + 64);
        out.extend_from_slice(&HEADER);
        loop {
            let read = usize::try_from(self.deflate.total_in()).unwrap_or(plain.len());
            let rest = plain.get(read..).unwrap_or_default();
            let status = self
                .deflate
                .compress_vec(rest, &mut out, FlushCompress::Finish);
            if matches!(status, Ok(Status::StreamEnd)) {
                break;
            }
            // Out of room is the only reason not to end: all input is given at once.
            out.reserve(out.capacity().max(4096));
        }
        out.extend_from_slice(&crc32fast::hash(plain).to_le_bytes());
        // ISIZE is the length modulo 2^32 by definition.
        let size = (plain.len() as u64 & 0xffff_ffff) as u32;
        out.extend_from_slice(&size.to_le_bytes());
        out
    }
}

/// What the first member of `blob` decompresses to.
#[cfg(test)]
pub(crate) fn first_member(blob: &[u8]) -> Vec<u8> {
    use std::io::Read as _;
    let mut plain = Vec::new();
    let mut decoder = flate2::read::GzDecoder::new(blob);
    decoder.read_to_end(&mut plain).expect("a gzip member");
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_decode_and_do_not_depend_on_the_past() {
        let noise: Vec<u8> = (0..70_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
            .collect();
        let mut reused = MemberCompressor::new(6);
        for plain in [&b""[..], b"x", &vec![0; 300_000], &noise, b"x"] {
            let member = reused.compress(plain);
            assert_eq!(member, MemberCompressor::new(6).compress(plain));
            assert_eq!(first_member(&member), plain);
        }
    }
}
