//! Zstandard frames: whole pieces at once, and one long frame bit by bit.
//!
//! Invariant: a frame depends on its input and level only: no checksum, no dictionary, no
//! state of an earlier frame. So equal input gives equal bytes on every thread. Never
//! splits its input: callers bound the size of a piece.

use std::io::{self, Write as _};

/// Highest compression level; the ones above need hundreds of megabytes to decode.
pub const LEVEL_MAX: u32 = 19;

/// First four bytes of a frame that decoders skip, whose payload is anything.
const SKIPPABLE_MAGIC: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
/// Bytes of a skippable frame before its payload.
pub const SKIPPABLE_HEADER_LEN: u64 = 8;

/// Makes frames; reuse one per thread, its tables are large.
pub struct FrameCompressor {
    zstd: zstd::bulk::Compressor<'static>,
}

impl FrameCompressor {
    /// A compressor of `level`, 1 to [`LEVEL_MAX`]; what is beyond is taken as the nearest.
    pub fn new(level: u32) -> io::Result<Self> {
        let zstd = zstd::bulk::Compressor::new(zstd_level(level))?;
        Ok(Self { zstd })
    }

    /// `plain` as one frame that states its decoded length. Fails only without memory.
    pub fn compress(&mut self, plain: &[u8]) -> io::Result<Vec<u8>> {
        self.zstd.compress(plain)
    }
}

/// One frame in memory, written bit by bit.
pub struct FrameWriter {
    zstd: zstd::stream::write::Encoder<'static, Vec<u8>>,
    plain_len: u64,
}

impl FrameWriter {
    /// An empty frame of `level`, as [`FrameCompressor::new`] takes it.
    pub fn new(level: u32) -> io::Result<Self> {
        let zstd = zstd::stream::write::Encoder::new(Vec::new(), zstd_level(level))?;
        Ok(Self { zstd, plain_len: 0 })
    }

    /// Appends to what the frame decodes to.
    pub fn write(&mut self, plain: &[u8]) -> io::Result<()> {
        self.plain_len += plain.len() as u64;
        self.zstd.write_all(plain)
    }

    /// Bytes that the frame has so far; a little behind what was written.
    pub fn encoded_len(&self) -> usize {
        self.zstd.get_ref().len()
    }

    /// The frame, and the length in bytes of what it decodes to.
    pub fn finish(self) -> io::Result<(Vec<u8>, u64)> {
        Ok((self.zstd.finish()?, self.plain_len))
    }
}

/// `payload` as a frame that decoders skip; `None` beyond 4 GiB.
pub fn skippable(payload: &[u8]) -> Option<Vec<u8>> {
    let len = u32::try_from(payload.len()).ok()?;
    Some([&SKIPPABLE_MAGIC[..], &len.to_le_bytes(), payload].concat())
}

fn zstd_level(level: u32) -> i32 {
    i32::try_from(level.clamp(1, LEVEL_MAX)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_decode_and_do_not_depend_on_the_past() {
        let noise: Vec<u8> = (0..70_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
            .collect();
        for level in [1, 9, 19] {
            let mut reused = FrameCompressor::new(level).unwrap();
            for plain in [&b""[..], b"x", &vec![0; 300_000], &noise, b"x", &noise] {
                let frame = reused.compress(plain).unwrap();
                let fresh = FrameCompressor::new(level).unwrap().compress(plain);
                assert!(frame == fresh.unwrap());
                assert_eq!(zstd::decode_all(&frame[..]).unwrap(), plain);
            }
        }
    }

    #[test]
    fn a_long_frame_and_a_skippable_one() {
        let mut writer = FrameWriter::new(3).unwrap();
        let plain = b"segment".repeat(100_000);
        for piece in plain.chunks(999) {
            writer.write(piece).unwrap();
        }
        let (frame, len) = writer.finish().unwrap();
        assert_eq!(len, plain.len() as u64);
        let both = [skippable(b"not this").unwrap(), frame].concat();
        assert_eq!(both[..16], *b"\x50\x2a\x4d\x18\x08\0\0\0not this");
        assert!(zstd::decode_all(&both[..]).unwrap() == plain);
    }
}
