//! Giving members spans where starts read, by what was learned when they were decoded.
//!
//! Invariant: what is on disk of that is used only with its checksums, windows are made of
//! payload that was compared with its SHA-256 right then, and the pieces keep the digests that
//! were verified against the TOC. Members of which something is missing stay as they are.

use std::collections::BTreeMap;

use super::{INDEX_PART, Indexes, LayerFile, SAVED_BYTES_MIN, SPARE_BYTES, Shaped, Whole};
use crate::Result;
use crate::codec::{Packer, zran};
use crate::index::seams::Seam;
use crate::index::shape::fetched_bytes;
use crate::index::shape::members::{LearnedMember, LearnedPiece, MemberSplit, build};
use crate::index::{ChunkId, Encoding, LayerIndex, Span, wire};
use crate::store::entries::{self, Entries, Record};
use crate::store::file::read::touching;
use crate::store::learned;
use crate::types::ByteRange;

/// Bytes that a piece takes in an index: its digest, and its place.
const PIECE_COST: u64 = 36;
/// Bytes that a span takes there beside its window: its digest, and its place.
const SPAN_COST: u64 = 40;

impl LayerFile {
    /// [`LayerFile::shape`] of eStargz.
    pub(super) fn shape_members(&self, hot: &[ChunkId]) -> Result<Option<Shaped>> {
        let Some(entries) = entries::open(&self.dir)? else {
            return Ok(None);
        };
        let mut hot = hot.to_vec();
        hot.sort_unstable();
        hot.dedup();
        let Indexes { plain, shaped } = self.indexes()?;
        let members = self.learned_members(&plain.index, &entries)?;
        let len = plain.bytes.len() as u64;
        let limit = len.max(plain.index.blob_size / INDEX_PART);
        let pieces: usize = members.iter().map(LearnedMember::count).sum();
        let fixed = [
            len,
            (pieces as u64).saturating_mul(PIECE_COST),
            (members.len() as u64).saturating_mul(SPAN_COST),
            SPARE_BYTES,
        ];
        let fixed = fixed.into_iter().fold(0, u64::saturating_add);
        let mut splits: Vec<MemberSplit> = members.iter().flat_map(|m| m.splits(&hot)).collect();
        splits.sort_unstable_by_key(|split| std::cmp::Reverse((split.saved, split.id)));
        let room = limit.saturating_sub(fixed);
        let windows = self.member_windows(&plain.index, &splits, shaped.as_ref(), room)?;
        let (index, details) = build(&plain.index, &plain.details, &members, &windows)?;
        let bytes = wire::encode(&index, &details)?;
        let before = shaped.as_ref().map_or(&plain.index, |shaped| &shaped.index);
        let made = Shaped {
            before_bytes: fetched_bytes(before, &hot),
            after_bytes: fetched_bytes(&index, &hot),
            index_bytes: bytes.len() as u64,
        };
        let saved = made.before_bytes.saturating_sub(made.after_bytes);
        if saved < SAVED_BYTES_MIN || made.index_bytes > limit {
            return Ok(None);
        }
        // What a reader will do with it.
        wire::decode(&bytes)?;
        let unkept = shaped.is_none().then_some(&plain.bytes[..]);
        let replaced = self.replace_index(&bytes, unkept)?;
        Ok(replaced.then_some(made))
    }

    /// The members of which all is known, ascending.
    fn learned_members(&self, plain: &LayerIndex, entries: &Entries) -> Result<Vec<LearnedMember>> {
        let Some(learned) = learned::open(&self.dir, plain)? else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        for span in &plain.spans {
            let ids = span.first_chunk..span.first_chunk.saturating_add(span.chunk_count);
            let digests = ids.map(|id| learned.read(id)).collect::<Result<Vec<_>>>()?;
            let records = entries.read(span.first_chunk, &digests)?;
            let pieces = records.and_then(|records| pieces(plain, span, records, digests));
            found.extend(pieces.and_then(|p| LearnedMember::new(plain, span.first_chunk, p)));
        }
        Ok(found)
    }

    /// The windows of as many of `splits` as fit `room` bytes, the first ones first, packed. Of
    /// those that are not in `shaped` all that is needed has to be here.
    fn member_windows(
        &self,
        plain: &LayerIndex,
        splits: &[MemberSplit],
        shaped: Option<&Whole>,
        room: u64,
    ) -> Result<BTreeMap<ChunkId, Vec<u8>>> {
        let mut packer = Packer::new()?;
        let (mut windows, mut all) = (BTreeMap::new(), 0_u64);
        for split in splits {
            let packed = match shaped.and_then(|shaped| shaped.window(split.entry)) {
                Some(window) => Some(window.to_vec()),
                None => match self.member_window(plain, split)? {
                    Some(window) => Some(packer.pack(&window)?),
                    None => None,
                },
            };
            let Some(packed) = packed else {
                continue;
            };
            let cost = SPAN_COST.saturating_add(packed.len() as u64);
            if all.saturating_add(cost) > room {
                break;
            }
            all = all.saturating_add(cost);
            windows.insert(split.id, packed);
        }
        Ok(windows)
    }

    /// What decoding from a split on may need of what is before it.
    fn member_window(&self, plain: &LayerIndex, split: &MemberSplit) -> Result<Option<Vec<u8>>> {
        let ids = plain.verified_with(split.id);
        let begin = self.chunk(ids.start)?.data_offset;
        let end = begin.saturating_add(plain.held_for(split.id));
        let at = begin.saturating_add(split.entry.decoded);
        let reach = zran::REACH as u64;
        let before = ByteRange::new(at.saturating_sub(reach).max(begin), at);
        let Some(window) = before.map(|range| self.verified_bytes(range)).transpose()? else {
            return Ok(None);
        };
        let Some(window) = window else {
            return Ok(None);
        };
        let telling = zran::TELLING as u64;
        let behind = ByteRange::new(at, at.saturating_add(telling).min(end));
        let behind = behind.map(|range| self.verified_bytes(range)).transpose()?;
        Ok(Some(match behind.flatten() {
            Some(next) => zran::likely_window(&window, &next),
            None => window,
        }))
    }

    /// Bytes of the data file, all of one file, verified; `None` where some are not here.
    fn verified_bytes(&self, range: ByteRange) -> Result<Option<Vec<u8>>> {
        let mut out = Vec::new();
        for id in touching(&self.index.chunks, range) {
            let Some(bytes) = self.verified(id)? else {
                return Ok(None);
            };
            let begin = self.chunk(id)?.data_offset;
            let at = |place: u64| usize::try_from(place.saturating_sub(begin)).ok();
            let (from, to) = (at(range.start()), at(range.end()));
            let to = to.map(|to| to.min(bytes.len()));
            let Some(part) = from.zip(to).and_then(|(from, to)| bytes.get(from..to)) else {
                return Ok(None);
            };
            out.extend_from_slice(part);
        }
        Ok((out.len() as u64 == range.len()).then_some(out))
    }
}

/// What is known of the pieces of a member; `None` where that cannot be.
fn pieces(
    plain: &LayerIndex,
    span: &Span,
    records: Vec<Record>,
    digests: Vec<[u8; 32]>,
) -> Option<Vec<LearnedPiece>> {
    let piece = |(id, (record, digest)): (ChunkId, (Record, [u8; 32]))| {
        let chunk = plain.chunks.get(usize::try_from(id).ok()?)?;
        let Encoding::WholeMember { blob, skip, .. } = chunk.encoding else {
            return None;
        };
        Some(LearnedPiece {
            entry: Seam {
                start: blob.start().checked_add(record.start.into())?,
                bits: record.bits,
                decoded: skip.checked_sub(record.before.into())?,
            },
            end: blob.start().checked_add(record.end.into())?,
            digest,
        })
    };
    let known = records.into_iter().zip(digests);
    (span.first_chunk..).zip(known).map(piece).collect()
}
