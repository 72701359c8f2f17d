//! Layers that are nowhere but in a store: an index, and bytes to put into it.
//!
//! Their blobs do not exist. Digests of chunks are right, so what a store has of a layer can
//! be compared.

use crate::index::{
    Chunk, ChunkId, DATA_ALIGN, Encoding, FileEntry, FileKind, LayerFormat, LayerIndex, Timestamp,
};
use crate::store::LayerFile;
use crate::types::{ByteRange, Digest};
use crate::{Result, codec};

/// Bytes of a chunk of [`chunk_bytes`].
pub const CHUNK_LEN: u32 = 3000;
/// After how many bytes those of a chunk repeat; a prime, so no two chunks begin alike.
const PERIOD: u32 = 251;
/// Bytes of the blob that each chunk is said to take.
const ENCODED_LEN: u64 = 100;

/// The bytes of chunk `id`, the same in every layer that is made of such.
pub fn chunk_bytes(id: ChunkId) -> Vec<u8> {
    let byte = |at: u32| ((at * 7 + id * 31 + 1) % PERIOD).to_le_bytes()[0];
    let period: Vec<u8> = (0..PERIOD).map(byte).collect();
    let mut bytes = period.repeat(CHUNK_LEN.div_ceil(PERIOD) as usize);
    bytes.truncate(CHUNK_LEN as usize);
    bytes
}

/// The entry of a regular file whose `size` bytes begin at `data_offset` of the data file.
pub fn regular_file(path: &str, size: u64, data_offset: u64) -> FileEntry {
    FileEntry {
        path: path.as_bytes().to_vec(),
        kind: FileKind::Regular { size, data_offset },
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
    }
}

/// A layer called `name` of one file for each payload, which is a chunk and a gzip member.
pub fn layer_of(name: &str, payloads: &[Vec<u8>]) -> LayerIndex {
    let (mut files, mut chunks, mut data_len) = (Vec::new(), Vec::new(), 0_u64);
    for (id, payload) in (0_u64..).zip(payloads) {
        let data_offset = data_len.next_multiple_of(DATA_ALIGN);
        let len = payload.len() as u64;
        data_len = data_offset + len;
        let blob = ByteRange::at(id * ENCODED_LEN, ENCODED_LEN);
        chunks.push(Chunk {
            encoding: Encoding::GzipMember {
                blob: blob.expect("it is short"),
                skip: 0,
            },
            data_offset,
            len: u32::try_from(len).expect("it is short"),
            chunk_digest: Digest::sha256(payload).as_bytes().try_into().ok(),
        });
        files.push(regular_file(&format!("file{id}"), len, data_offset));
    }
    LayerIndex {
        blob_digest: Digest::sha256(name.as_bytes()),
        blob_size: payloads.len() as u64 * ENCODED_LEN,
        format: LayerFormat::Estargz,
        files,
        chunks,
        spans: Vec::new(),
        data_len,
    }
}

/// Puts `bytes` into a layer as its chunk `id`, whatever that is.
pub fn put_bytes(file: &LayerFile, id: ChunkId, bytes: Vec<u8>) -> Result<()> {
    let digest = Digest::sha256(&bytes);
    let what = || "a test chunk".to_owned();
    file.put(id, &codec::verify(what, &digest, bytes)?)
}

/// Puts [`chunk_bytes`] into a layer that is made of such.
pub fn put_chunk(file: &LayerFile, id: ChunkId) -> Result<()> {
    put_bytes(file, id, chunk_bytes(id))
}
