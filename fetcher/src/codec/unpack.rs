//! Pull decoders for whole layers, for code that runs on a blocking thread.
//!
//! Invariant: memory stays bounded whatever the input (zstd windows over 128 MiB are
//! refused by the decoder). Never bounds the output: callers count what they take.

use std::io::{self, BufReader, Cursor, Read};

use super::stream::{Compression, DETECT_LEN, detect};

/// Bytes read ahead of a decoder.
const BUFFER_BYTES: usize = 256 << 10;

/// The decoded bytes of `input`, whose compression is told from its first bytes. All
/// members or frames are decoded, one after another.
pub fn decoder<'a>(mut input: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    // One read may bring fewer, however much is still to come.
    let mut head = Vec::with_capacity(DETECT_LEN);
    input
        .by_ref()
        .take(DETECT_LEN as u64)
        .read_to_end(&mut head)?;
    let compression = detect(&head);
    let input = BufReader::with_capacity(BUFFER_BYTES, Cursor::new(head).chain(input));
    Ok(match compression {
        Compression::Stored => Box::new(input),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(input)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::deflate::MemberCompressor;

    /// Brings one byte a read.
    struct Slow(io::Cursor<Vec<u8>>);

    impl Read for Slow {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let len = buf.len().min(1);
            self.0.read(&mut buf[..len])
        }
    }

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
            let whole: Box<dyn Read + Send> = Box::new(io::Cursor::new(encoded.clone()));
            let slow = Box::new(Slow(io::Cursor::new(encoded)));
            for input in [whole, slow] {
                let mut back = Vec::new();
                let mut decoder = decoder(input).unwrap();
                decoder.read_to_end(&mut back).unwrap();
                assert_eq!(back, plain, "{compression:?}");
            }
        }
    }
}
