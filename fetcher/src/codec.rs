//! Bounded decoders and hashing.
//!
//! Invariant: [`VerifiedBytes`] exist only for bytes whose digest was compared here with
//! the promised one, alone or with others ([`member`]), or that were decoded from such bytes
//! ([`whole`]). Decoders never panic on any input, never keep more than their window and what
//! they were asked for, and stop at the output limit they were given. Never reads or writes a
//! file.

pub mod deflate;
pub mod gzip;
pub mod member;
pub mod pieces;
pub mod stream;
pub mod twin;
pub mod unpack;
pub mod whole;
pub mod zran;
pub mod zstd_write;

use std::cell::RefCell;
use std::io;

use bytes::Bytes;

use crate::types::{Algorithm, Digest, Hasher};
use crate::{Error, Result};

/// Level of what [`Packer`] makes. Higher ones save a tenth, and take tens of MiB and as
/// much time as all the rest of indexing.
const PACK_LEVEL: i32 = 3;
/// Level of what is packed while a layer streams, and not kept for others.
const PACK_LEVEL_FAST: i32 = 1;

/// Bytes that have the digest they were promised to have.
#[must_use = "bytes are verified in order to be used"]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedBytes(Bytes);

impl VerifiedBytes {
    /// The bytes, by reference count.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }
}

impl std::ops::Deref for VerifiedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for VerifiedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Checks `bytes` (untrusted) against `expected` (trusted). `what` names them in the
/// error and is only called for it.
pub fn verify(
    what: impl FnOnce() -> String,
    expected: &Digest,
    bytes: impl Into<Bytes>,
) -> Result<VerifiedBytes> {
    let bytes = bytes.into();
    let actual = Digest::of(expected.algorithm(), &bytes);
    same(what, expected, actual)?;
    Ok(VerifiedBytes(bytes))
}

/// [`verify`] for the bare SHA-256 that a chunk table holds.
pub fn verify_chunk(
    what: impl FnOnce() -> String,
    expected: &[u8; 32],
    bytes: impl Into<Bytes>,
) -> Result<VerifiedBytes> {
    verify(what, &Digest::Sha256(*expected), bytes)
}

/// Makes zstd frames for files of our own; reuse it, its tables are large.
pub struct Packer(zstd::bulk::Compressor<'static>);

impl Packer {
    /// A packer with nothing in it yet.
    pub fn new() -> Result<Self> {
        Self::at(PACK_LEVEL)
    }

    /// One that takes a third of the time, and makes a little more of it.
    pub fn fast() -> Result<Self> {
        Self::at(PACK_LEVEL_FAST)
    }

    fn at(level: i32) -> Result<Self> {
        let compressor = zstd::bulk::Compressor::new(level);
        compressor.map(Self).map_err(cannot_pack)
    }

    /// `bytes` as one frame.
    pub fn pack(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let mut packed = self.0.compress(bytes).map_err(cannot_pack)?;
        // It has room for the worst case, and windows are kept by the thousand.
        packed.shrink_to_fit();
        Ok(packed)
    }
}

fn cannot_pack(error: io::Error) -> Error {
    Error::io("compress", "a layer index", error)
}

/// What a [`Packer`] made, back; at most `len_max` bytes.
pub fn unpacked(packed: &[u8], len_max: usize) -> Result<Vec<u8>> {
    thread_local! {
        // A start unpacks thousands of windows, and making one of these takes half as long
        // as unpacking one. It has no memory of its own beyond its tables, some 95 KiB.
        static UNPACKER: RefCell<Option<zstd::bulk::Decompressor<'static>>> =
            const { RefCell::new(None) };
    }
    let unpack = |slot: &mut Option<zstd::bulk::Decompressor<'static>>| {
        let mut unpacker = match slot.take() {
            Some(unpacker) => unpacker,
            None => zstd::bulk::Decompressor::new()?,
        };
        // Each frame begins anew; one that was refused takes its decoder with it.
        let plain = unpacker.decompress(packed, len_max)?;
        *slot = Some(unpacker);
        Ok(plain)
    };
    let plain = UNPACKER.with_borrow_mut(unpack);
    plain.map_err(|error: io::Error| Error::malformed("zstd data", error.to_string()))
}

/// Compares the digest of a finished stream with the promised one.
pub fn verify_stream(
    what: impl FnOnce() -> String,
    expected: &Digest,
    hasher: Hasher,
) -> Result<()> {
    same(what, expected, hasher.finish())
}

/// Compares the digest that something has with the promised one.
pub fn verify_digest(
    what: impl FnOnce() -> String,
    expected: &Digest,
    actual: Digest,
) -> Result<()> {
    same(what, expected, actual)
}

/// SHA-256 over pieces, as a chunk table holds it.
#[derive(Debug, Clone)]
pub struct ChunkHasher(Hasher);

impl ChunkHasher {
    /// Of no bytes yet.
    pub fn new() -> Self {
        Self(Hasher::new(Algorithm::Sha256))
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of what was added.
    pub fn finish(self) -> [u8; 32] {
        match self.0.finish() {
            Digest::Sha256(digest) => digest,
            Digest::Sha512(_) => unreachable!("the hasher was made for SHA-256"),
        }
    }
}

impl Default for ChunkHasher {
    fn default() -> Self {
        Self::new()
    }
}

fn same(what: impl FnOnce() -> String, expected: &Digest, actual: Digest) -> Result<()> {
    if actual == *expected {
        return Ok(());
    }
    Err(Error::Corrupt {
        what: what(),
        expected: *expected,
        actual,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_promised_bytes_pass() {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let digest = Digest::of(algorithm, b"abc");
            let good = verify(|| unreachable!("nothing to name"), &digest, &b"abc"[..]).unwrap();
            assert_eq!(&*good, b"abc");
            let bad = verify(|| "manifest x".to_owned(), &digest, &b"abd"[..]).unwrap_err();
            assert!(
                bad.to_string().starts_with(&format!(
                    "manifest x is corrupt: expected {digest}, got sha"
                )),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_frame_that_is_refused_does_not_spoil_the_next() {
        let plain = b"window ".repeat(4000);
        let packed = Packer::new().unwrap().pack(&plain).unwrap();
        for _ in 0..3 {
            assert_eq!(unpacked(&packed, plain.len()).unwrap(), plain);
            unpacked(&packed[..packed.len() - 1], plain.len()).unwrap_err();
            unpacked(&packed, plain.len() - 1).unwrap_err();
            unpacked(b"no frame", 100).unwrap_err();
        }
    }

    #[test]
    fn pieces_hash_like_the_whole() {
        let mut hasher = ChunkHasher::new();
        hasher.update(b"a");
        hasher.update(b"bc");
        let digest = hasher.finish();
        assert_eq!(Digest::Sha256(digest), Digest::sha256(b"abc"));
        assert!(verify_chunk(String::new, &digest, &b"abc"[..]).is_ok());
        assert!(verify_chunk(String::new, &digest, &b""[..]).is_err());
    }
}
