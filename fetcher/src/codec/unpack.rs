//! Pull decoders for whole layers, for code that runs on a blocking thread.
//!
//! Invariant: memory stays bounded whatever the input (zstd windows over 128 MiB are
//! refused by the decoder). Never bounds the output: callers count what they take.

use std::io::{self, BufRead, BufReader, Read};

use super::stream::{Compression, detect};

/// Bytes read ahead of a decoder.
const BUFFER_BYTES: usize = 256 << 10;

/// The decoded bytes of `input`, whose compression is told from its first bytes. All
/// members or frames are decoded, one after another.
pub fn decoder<'a>(input: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut input = BufReader::with_capacity(BUFFER_BYTES, input);
    Ok(match detect(input.fill_buf()?) {
        Compression::Stored => Box::new(input),
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
            (plain.clone(), Compression::Stored),
            (members, Compression::Gzip),
            (frames, Compression::Zstd),
        ] {
            assert_eq!(detect(&encoded), compression);
            let mut back = Vec::new();
            let mut decoder = decoder(io::Cursor::new(encoded)).unwrap();
            decoder.read_to_end(&mut back).unwrap();
            assert_eq!(back, plain, "{compression:?}");
        }
    }
}
