//! Where the details of a layer's index can be had that this node has not fetched yet.
//!
//! An index that somebody signed is taken over without its details: those of a span are
//! fetched when one of its chunks is wanted. A file beside the index says from where:
//!
//! ```text
//!  0  magic "LAZORIGN"                                   8
//!  8  version, 1                                         u32
//! 12  CRC-32 (IEEE) of the rest                          u32
//! 16  size of the index there, bytes                     u64
//! 24  where: repository@digest, as references have it    to the end
//! ```
//!
//! Invariant: only a place to ask. What comes from there is compared with the index's
//! SHA-256 of it, so whatever the file says costs a fetch and never a wrong byte. A file
//! that does not check out is none: details that are not here are then damage.

use std::path::Path;

use super::disk::Disk;
use super::file::write_new;
use super::read_bounded;
use crate::source::BlobRef;
use crate::types::Reference;
use crate::{Error, Result};

/// Name inside a layer's directory.
pub(super) const ORIGIN: &str = "origin";
const MAGIC: [u8; 8] = *b"LAZORIGN";
const VERSION: u32 = 1;
/// Largest file that is read: a repository has 255 characters at most.
const FILE_BYTES_MAX: u64 = 1024;

/// Writes the file of the layer in `dir`, synced.
pub(super) fn create(disk: &dyn Disk, dir: &Path, origin: &BlobRef) -> Result<()> {
    write_new(disk, &dir.join(ORIGIN), &encode(origin)).map(drop)
}

/// What the file of the layer in `dir` says, if it has one that checks out.
pub(super) fn read(dir: &Path) -> Result<Option<BlobRef>> {
    let path = dir.join(ORIGIN);
    match read_bounded(&path, FILE_BYTES_MAX) {
        Ok(bytes) => {
            let origin = decode(&bytes);
            if origin.is_none() {
                tracing::warn!(path = %path.display(), "file is damaged, not using it");
            }
            Ok(origin)
        }
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(Error::Limit { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the layer in `dir` has a file that does not check out.
pub(super) fn is_damaged(dir: &Path) -> Result<bool> {
    Ok(dir.join(ORIGIN).exists() && read(dir)?.is_none())
}

/// The bytes of the file.
pub(crate) fn encode(origin: &BlobRef) -> Vec<u8> {
    let place = origin.repository.with_digest(origin.digest).to_string();
    let rest = [&origin.size.to_le_bytes()[..], place.as_bytes()].concat();
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(&rest).to_le_bytes());
    out.extend_from_slice(&rest);
    out
}

/// What such bytes say, if they check out.
pub(crate) fn decode(bytes: &[u8]) -> Option<BlobRef> {
    let (head, rest) = bytes.split_at_checked(16)?;
    let expected = [
        &MAGIC[..],
        &VERSION.to_le_bytes(),
        &crc32fast::hash(rest).to_le_bytes(),
    ];
    if head != expected.concat() {
        return None;
    }
    let (size, place) = rest.split_at_checked(8)?;
    let place = Reference::parse(std::str::from_utf8(place).ok()?).ok()?;
    Some(BlobRef {
        repository: place.repository().clone(),
        digest: *place.digest()?,
        size: u64::from_le_bytes(size.try_into().ok()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Digest;

    fn origin() -> BlobRef {
        let reference = Reference::parse("localhost:5000/a/b:c").unwrap();
        BlobRef {
            repository: reference.repository().clone(),
            digest: Digest::sha256(b"an index"),
            size: 0x0102_0304,
        }
    }

    #[test]
    fn the_file_is_golden_and_round_trips() {
        let bytes = encode(&origin());
        let place = format!("localhost:5000/a/b@{}", Digest::sha256(b"an index"));
        let golden = [
            b"LAZORIGN".as_slice(),
            &[1, 0, 0, 0],
            &bytes[12..16],
            &[4, 3, 2, 1, 0, 0, 0, 0],
            place.as_bytes(),
        ];
        assert_eq!(bytes, golden.concat());
        assert_eq!(decode(&bytes), Some(origin()));
    }

    #[test]
    fn any_torn_or_flipped_byte_means_nothing() {
        let bytes = encode(&origin());
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), None, "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert_eq!(decode(&bad), None, "flipped at {at}");
        }
    }
}
