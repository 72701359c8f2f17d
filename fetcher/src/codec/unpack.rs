//! Pull decoders for whole layers, for code that runs on a blocking thread.
//!
//! Invariant: memory stays bounded whatever the input (zstd windows over 128 MiB are
//! refused by the decoder). Never bounds the output: callers count what they take.

use std::io::{self, BufRead, BufReader, Read};

/// Bytes read ahead of a decoder.
const BUFFER_BYTES: usize = 256 << 10;

/// How a layer's tar is compressed, told from its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// Gzip, one or more members.
    Gzip,
    /// Zstandard, one or more frames.
    Zstd,
}

impl Compression {
    /// Tells from the first four bytes (or all there are).
    pub fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame: zstd too, if nothing of a tar starts like this.
            [first, 0x2a, 0x4d, 0x18, ..] if first & 0xf0 == 0x50 => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// The decoded bytes of `input`, whose compression is told from its first bytes. All
/// members or frames are decoded, one after another.
pub fn decoder<'a>(input: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut input = BufReader::with_capacity(BUFFER_BYTES, input);
    let compression = Compression::of(input.fill_buf()?);
    Ok(match compression {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(input)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::deflate::MemberCompressor;

    #[test]
    fn decodes_every_compression_and_all_members() {
        let plain = b"ustar".repeat(1000);
        let mut gzip = MemberCompressor::new(1);
        let members = [gzip.compress(&plain[..7]), gzip.compress(&plain[7..])].concat();
        let frames = [
            zstd::encode_all(&plain[..7], 1).unwrap(),
            b"\x50\x2a\x4d\x18\x01\0\0\0x".to_vec(),
            zstd::encode_all(&plain[7..], 1).unwrap(),
        ]
        .concat();
        for (encoded, compression) in [
            (plain.clone(), Compression::None),
            (members, Compression::Gzip),
            (frames, Compression::Zstd),
        ] {
            assert_eq!(Compression::of(&encoded), compression);
            let mut back = Vec::new();
            let mut decoder = decoder(io::Cursor::new(encoded)).unwrap();
            decoder.read_to_end(&mut back).unwrap();
            assert_eq!(back, plain, "{compression:?}");
        }
    }
}
