//! Where decoding the pieces of members that are verified whole can begin.
//!
//! It is learned with the digests of the pieces ([`super::learned`]) when a member is decoded,
//! and kept in a file beside the data file, one record for each chunk of the layer:
//!
//! ```text
//!  0  where decoding can begin, from the member's first byte on    u32
//!  4  decoded bytes from there to the chunk, and in the three
//!     highest bits how many bits of the first byte count           u32
//!  8  end of the chunk's encoded bytes, from the member's first on  u32
//! 12  CRC-32 (IEEE) of the chunk's number (u32), its SHA-256 (32
//!     bytes, which are in the other file) and bytes 0..12           u32
//! ```
//!
//! Integers are little endian. Invariant: only a help, never synced. A record that is lost,
//! torn or rotten, or whose digest is, does not have its checksum, and its member stays as it
//! is; what is made of one that was wrong all the same does not decode to bytes with the
//! pieces' digests.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::disk::Disk;
use super::file::chunk_count;
use crate::codec::member;
use crate::index::{ChunkId, LayerIndex};
use crate::{Error, Result};

/// Name inside a layer's directory.
pub(super) const ENTRIES: &str = "entries";
/// Bytes of one record.
const RECORD_LEN: usize = 16;
/// How many bits of the second number count decoded bytes.
const BEFORE_BITS: u32 = 29;

/// What it takes to decode one chunk of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// Where decoding can begin, from the member's first byte on.
    pub(super) start: u32,
    /// How many bits of that byte, its highest, are behind it; 0 for the whole byte.
    pub(super) bits: u8,
    /// Decoded bytes from there to the chunk.
    pub(super) before: u32,
    /// Where the encoded bytes of the chunk end, from the member's first on.
    pub(super) end: u32,
}

impl Record {
    /// Of a piece that begins `skip` decoded bytes into its member; `None` where it does not
    /// fit a record.
    pub(super) fn of(piece: &member::Piece, skip: u64) -> Option<Self> {
        let before = skip.checked_sub(piece.entry.decoded)?;
        let record = Self {
            start: u32::try_from(piece.entry.start).ok()?,
            bits: piece.entry.bits,
            before: u32::try_from(before).ok()?,
            end: u32::try_from(piece.encoded_end).ok()?,
        };
        record.is_sound().then_some(record)
    }

    fn is_sound(&self) -> bool {
        self.bits < 8 && self.before >> BEFORE_BITS == 0 && self.start < self.end
    }

    fn encode(&self, (id, digest): Whose<'_>) -> [u8; RECORD_LEN] {
        let before = self.before | u32::from(self.bits) << BEFORE_BITS;
        let mut out = [0; RECORD_LEN];
        let numbers = [self.start, before, self.end];
        for (to, number) in out.chunks_exact_mut(4).zip(numbers) {
            to.copy_from_slice(&number.to_le_bytes());
        }
        let sum = checksum((id, digest), &out);
        if let Some(to) = out.last_chunk_mut() {
            *to = sum;
        }
        out
    }

    fn decode(whose: Whose<'_>, bytes: &[u8; RECORD_LEN]) -> Option<Self> {
        let (numbers, []) = bytes.as_chunks::<4>() else {
            return None;
        };
        let [start, before, end, sum] = *numbers else {
            return None;
        };
        let before = u32::from_le_bytes(before);
        let record = Self {
            start: u32::from_le_bytes(start),
            bits: u8::try_from(before >> BEFORE_BITS).ok()?,
            before: before & !(u32::MAX << BEFORE_BITS),
            end: u32::from_le_bytes(end),
        };
        (sum == checksum(whose, bytes) && record.is_sound()).then_some(record)
    }
}

/// A chunk and its SHA-256.
pub(super) type Whose<'a> = (ChunkId, &'a [u8; 32]);

/// Of a record and whose it is, as it stands in the record.
fn checksum((id, digest): Whose<'_>, record: &[u8; RECORD_LEN]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&id.to_le_bytes());
    hasher.update(digest);
    hasher.update(record.split_last_chunk::<4>().map_or(&[], |(all, _)| all));
    hasher.finalize().to_le_bytes()
}

/// The file of one layer.
pub(super) struct Entries {
    file: File,
    path: PathBuf,
}

/// Makes the file of a layer in `dir`, if its index needs one, with no record in it.
pub(super) fn create(disk: &dyn Disk, dir: &Path, index: &LayerIndex) -> Result<()> {
    if !index.has_whole_members() {
        return Ok(());
    }
    let path = dir.join(ENTRIES);
    let len = u64::from(chunk_count(index)?) * RECORD_LEN as u64;
    let make = || disk.set_len(&disk.create(&path)?, len);
    make().map_err(|error| Error::io("write", &path, error))
}

/// Opens the file of the layer in `dir`, if there is one.
pub(super) fn open(dir: &Path) -> Result<Option<Entries>> {
    let path = dir.join(ENTRIES);
    match File::options().read(true).write(true).open(&path) {
        Ok(file) => Ok(Some(Entries { file, path })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("open", &path, error)),
    }
}

impl Entries {
    /// The records of chunks from `first` on, whose `digests` are known; `None` if one of them
    /// is not there.
    pub(super) fn read(&self, first: ChunkId, digests: &[[u8; 32]]) -> Result<Option<Vec<Record>>> {
        let mut bytes = vec![0; digests.len().saturating_mul(RECORD_LEN)];
        match self.file.read_exact_at(&mut bytes, place(first)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(Error::io("read", &self.path, error)),
        }
        let (records, _) = bytes.as_chunks();
        let records = (first..).zip(digests).zip(records);
        Ok(records
            .map(|(whose, record)| Record::decode(whose, record))
            .collect())
    }

    /// Writes the records of chunks from `first` on, each with the chunk's digest.
    pub(super) fn note(
        &self,
        disk: &dyn Disk,
        first: ChunkId,
        records: &[(Record, [u8; 32])],
    ) -> io::Result<()> {
        let records = (first..).zip(records);
        let encoded = records.map(|(id, (record, digest))| record.encode((id, digest)));
        let bytes: Vec<u8> = encoded.flatten().collect();
        disk.write_at(&self.file, place(first), &bytes)
    }

    /// Chunks whose records do not check out, `digest` being what was learned of each; `None`
    /// where the file is not one of `made`, the index as it was made.
    pub(super) fn wrong(
        &self,
        made: &LayerIndex,
        digest: impl Fn(ChunkId) -> Result<[u8; 32]>,
    ) -> Result<Option<Vec<ChunkId>>> {
        let count = chunk_count(made)?;
        let err = |error| Error::io("read", &self.path, error);
        let len = self.file.metadata().map_err(err)?.len();
        if len != place(count) {
            return Ok(None);
        }
        let mut wrong = Vec::new();
        for id in 0..count {
            let mut record = [0; RECORD_LEN];
            let read = self.file.read_exact_at(&mut record, place(id));
            read.map_err(err)?;
            if record != [0; RECORD_LEN] && Record::decode((id, &digest(id)?), &record).is_none() {
                wrong.push(id);
            }
        }
        Ok(Some(wrong))
    }

    /// Makes records as if they had never been written.
    pub(super) fn erase(&self, disk: &dyn Disk, ids: &[ChunkId]) -> Result<()> {
        ids.iter().try_for_each(|id| {
            let erased = disk.write_at(&self.file, place(*id), &[0; RECORD_LEN]);
            erased.map_err(|error| Error::io("write to", &self.path, error))
        })
    }
}

fn place(id: ChunkId) -> u64 {
    u64::from(id) * RECORD_LEN as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> impl Strategy<Value = Record> {
        let before = 0..1_u32 << BEFORE_BITS;
        (0..u32::MAX, 0_u8..8, before, 1..=u32::MAX).prop_map(|(start, bits, before, len)| Record {
            start,
            bits,
            before,
            end: start.saturating_add(len),
        })
    }

    #[test]
    fn the_record_is_golden() {
        let record = Record {
            start: 0x0403_0201,
            bits: 5,
            before: 0x0006_0504,
            end: 0x0903_0201,
        };
        let digest = [8; 32];
        let bytes = record.encode((7, &digest));
        assert_eq!(bytes[..12], [1, 2, 3, 4, 4, 5, 6, 0xa0, 1, 2, 3, 9]);
        let whose = [&[7, 0, 0, 0], &digest[..], &bytes[..12]].concat();
        assert_eq!(bytes[12..], crc32fast::hash(&whose).to_le_bytes());
        assert_eq!(Record::decode((7, &digest), &bytes), Some(record));
        assert_eq!(
            Record::decode((8, &digest), &bytes),
            None,
            "another chunk's"
        );
        let never = Record::decode((0, &[0; 32]), &[0; RECORD_LEN]);
        assert_eq!(never, None, "never written");
    }

    proptest! {
        #[test]
        fn any_flipped_bit_of_a_record_means_none(
            record in record(),
            id in any::<u32>(),
            digest in any::<[u8; 32]>(),
            (bit, of_digest) in (0..RECORD_LEN * 8, 0_usize..256),
        ) {
            let mut bytes = record.encode((id, &digest));
            prop_assert_eq!(Record::decode((id, &digest), &bytes), Some(record));
            let mut other = digest;
            other[of_digest / 8] ^= 1 << (of_digest % 8);
            prop_assert_eq!(Record::decode((id, &other), &bytes), None);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Record::decode((id, &digest), &bytes), None);
        }
    }
}
