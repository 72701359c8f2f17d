//! What comes after the tar: TOC and footer of each format.
//!
//! Invariant: positions in footers and annotations are those of the bytes written here.
//!
//! ```text
//! zstd:chunked footers, numbers little-endian of 8 bytes, in a skippable frame:
//! containers/storage: TOC offset | length | decoded length | 1 |
//!                     tar-split offset | length | decoded length | "GNUlInUx"
//! stargz:             TOC offset | length | decoded length | 1 | "GnUlInUx"
//! Offsets point behind the skippable frames' headers.
//! ```

use std::collections::BTreeMap;
use std::io::Write;

use super::entry::{BLOCK, plain_header};
use super::stream::Stream;
use super::toc::Toc;
use super::{Fault, Flavour, TOC_NAME, Written};
use crate::codec::zstd_write::{FrameCompressor, SKIPPABLE_HEADER_LEN, skippable};
use crate::types::Digest;

const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
const UNCOMPRESSED_SIZE: &str = "io.containers.estargz.uncompressed-size";

/// Length of eStargz's footer in bytes.
const ESTARGZ_FOOTER_BYTES: usize = 51;
/// The only kind of TOC that zstd:chunked has.
const TOC_KIND: u64 = 1;

/// Ends an eStargz blob: the TOC is the tar's last entry.
pub(super) fn estargz<W: Write>(mut stream: Stream<'_, W>, toc: &Toc) -> Result<Written, Fault> {
    stream.drain()?;
    let json = toc.to_json(None)?;
    let (toc_digest, toc_size) = (Digest::sha256(&json), json.len() as u64);
    let toc_offset = stream.members.blob_offset();
    stream.put(&plain_header(TOC_NAME, toc_size));
    stream.put(&json);
    let padding = json.len().next_multiple_of(BLOCK) - json.len();
    drop(json);
    stream.put(&vec![0; padding + 2 * BLOCK]);
    stream.drain()?;
    stream.members.write(&estargz_footer(toc_offset))?;
    let mut written = plain(stream)?;
    written.toc_digest = Some(toc_digest);
    written.toc_size = toc_size;
    written.annotations = BTreeMap::from([
        (TOC_DIGEST, toc_digest.to_string()),
        (UNCOMPRESSED_SIZE, written.uncompressed_size.to_string()),
    ]);
    Ok(written)
}

/// Ends a zstd:chunked blob. `split` is the tar-split's frame and the length of what it
/// decodes to, if this flavour has one.
pub(super) fn zstd_chunked<W: Write>(
    mut stream: Stream<'_, W>,
    (toc, split): (&Toc, Option<(Vec<u8>, u64)>),
    (flavour, level): (Flavour, u32),
) -> Result<Written, Fault> {
    stream.put(&[0; 2 * BLOCK]);
    stream.drain()?;
    let split_digest = split.as_ref().map(|(frame, _)| Digest::sha256(frame));
    let json = toc.to_json(split_digest)?;
    let frame = FrameCompressor::new(level).and_then(|mut zstd| zstd.compress(&json));
    let frame = frame.map_err(Fault::compress)?;
    let (toc_digest, toc_size) = (Digest::sha256(&json), json.len() as u64);
    drop(json);
    let toc_at = put_skippable(&mut stream, &frame, toc_size)?;
    let checksum = Digest::sha256(&frame);
    let mut footer = toc_at.to_bytes();
    footer.extend_from_slice(&TOC_KIND.to_le_bytes());
    let position = format!("{toc_at}:{TOC_KIND}");
    let mut annotations = BTreeMap::new();
    match flavour {
        Flavour::ContainersStorage => {
            let (frame, len) = split.unwrap_or_default();
            let split_at = put_skippable(&mut stream, &frame, len)?;
            footer.extend_from_slice(&split_at.to_bytes());
            footer.extend_from_slice(b"GNUlInUx");
            const PREFIX: [&str; 3] = [
                "io.github.containers.zstd-chunked.manifest-checksum",
                "io.github.containers.zstd-chunked.manifest-position",
                "io.github.containers.zstd-chunked.tarsplit-position",
            ];
            let values = [checksum.to_string(), position, split_at.to_string()];
            annotations.extend(PREFIX.into_iter().zip(values));
        }
        Flavour::Stargz => {
            footer.extend_from_slice(b"GnUlInUx");
            let keys = [
                "io.containers.zstd-chunked.manifest-checksum",
                "io.containers.zstd-chunked.manifest-position",
                TOC_DIGEST,
            ];
            let values = [checksum.to_string(), position, toc_digest.to_string()];
            annotations.extend(keys.into_iter().zip(values));
        }
    }
    stream
        .members
        .write(&skippable(&footer).unwrap_or_default())?;
    let mut written = plain(stream)?;
    written.toc_digest = Some(toc_digest);
    written.toc_size = toc_size;
    written.annotations = annotations;
    Ok(written)
}

/// Ends a blob that is nothing but a compressed tar.
pub(super) fn plain<W: Write>(stream: Stream<'_, W>) -> Result<Written, Fault> {
    let totals = stream.finish()?;
    let (blob_digest, blob_size) = totals.blob;
    Ok(Written {
        blob_digest,
        blob_size,
        diff_id: totals.diff_id,
        uncompressed_size: totals.uncompressed_size,
        toc_digest: None,
        toc_size: 0,
        annotations: BTreeMap::new(),
    })
}

/// Where a frame inside a skippable one is.
#[derive(Debug, Clone, Copy)]
struct Place {
    offset: u64,
    len: u64,
    decoded_len: u64,
}

impl Place {
    fn to_bytes(self) -> Vec<u8> {
        [self.offset, self.len, self.decoded_len]
            .map(u64::to_le_bytes)
            .concat()
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.offset, self.len, self.decoded_len)
    }
}

fn put_skippable<W: Write>(
    stream: &mut Stream<'_, W>,
    frame: &[u8],
    decoded_len: u64,
) -> Result<Place, Fault> {
    let offset = stream.members.blob_offset() + SKIPPABLE_HEADER_LEN;
    let wrapped = skippable(frame)
        .ok_or_else(|| Fault::Limit(format!("a frame of {} bytes", frame.len())))?;
    stream.members.write(&wrapped)?;
    Ok(Place {
        offset,
        len: frame.len() as u64,
        decoded_len,
    })
}

/// An empty gzip member whose extra field says where the TOC's member starts.
fn estargz_footer(toc_offset: u64) -> Vec<u8> {
    let field = format!("{toc_offset:016x}STARGZ");
    let mut footer = Vec::with_capacity(ESTARGZ_FOOTER_BYTES);
    // Deflate, with an extra field of 26 bytes: one subfield "SG" of 22.
    footer.extend_from_slice(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0]);
    footer.extend_from_slice(b"SG\x16\x00");
    footer.extend_from_slice(field.as_bytes());
    // One empty stored block; CRC-32 and length of nothing.
    footer.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    footer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estargz_footer_is_as_specified() {
        let footer = estargz_footer(0x1234);
        assert_eq!(footer.len(), ESTARGZ_FOOTER_BYTES);
        assert_eq!(&footer[16..38], b"0000000000001234STARGZ");
    }
}
