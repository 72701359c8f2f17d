//! What layers of tests hold: bytes that look like files, and small tars of them.
//!
//! The same arguments give the same bytes, everywhere and always. Entries that only a parser
//! meets (long names, extensions, wrong sums) are made where parsers are tested.

use crate::index::{FileEntry, FileKind, Timestamp};

/// Bytes of a tar's block.
const BLOCK_LEN: usize = 512;
/// What a tar ends with.
pub const TAR_END: [u8; 2 * BLOCK_LEN] = [0; 2 * BLOCK_LEN];

/// An entry of a file table, of root and without anything that has to be told.
pub fn entry(path: impl AsRef<[u8]>, kind: FileKind) -> FileEntry {
    FileEntry {
        path: path.as_ref().to_vec(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
    }
}

/// `len` random bytes of which only the bits of `mask` are set: with fewer bits they
/// compress better.
pub fn noise(seed: u32, mask: u8, len: usize) -> Vec<u8> {
    let mut state = seed;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0] & mask
    })
    .take(len)
    .collect()
}

/// A header in ustar, with a right checksum. `name` has 100 bytes at most; what `edit` does
/// comes before the sum.
pub fn tar_header(
    name: &[u8],
    type_flag: u8,
    size: u64,
    edit: impl FnOnce(&mut [u8; BLOCK_LEN]),
) -> Vec<u8> {
    let mut block = [0_u8; BLOCK_LEN];
    block[..name.len()].copy_from_slice(name);
    block[100..107].copy_from_slice(b"0000644");
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[156] = type_flag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    edit(&mut block);
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block.to_vec()
}

/// A regular file in a tar: its header, its bytes, and what fills the last block.
pub fn tar_file(name: &str, bytes: &[u8]) -> Vec<u8> {
    let mut out = tar_header(name.as_bytes(), b'0', bytes.len() as u64, |_| {});
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(BLOCK_LEN), 0);
    out
}

/// A tar of regular files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let files = files.iter().map(|(name, bytes)| tar_file(name, bytes));
    let mut out: Vec<u8> = files.flatten().collect();
    out.extend_from_slice(&TAR_END);
    out
}
